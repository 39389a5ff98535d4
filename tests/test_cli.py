"""The commands: what they answer, and that bad input gets one sentence, its exit code and nothing half-written."""

import io
import json
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from commands import Comoe, calibration_text, document
from safetensors.torch import load_file, save_file

from comoe.make.pack import pack
from comoe.make.recipe import Recipe
from comoe.store.blobfile import read_header
from comoe.store.manifest import read_manifest
from comoe.store.pack import Pack
from comoe.store.shipped import presets

TOKENS = ("--calib-tokens", 4096)


# What the contract promises


def test_pack_answers_with_the_keys_of_the_contract(comoe: Comoe, tiny_checkpoint: Path, tmp_path: Path) -> None:
    text = calibration_text(tmp_path)
    got = document(comoe("pack", tiny_checkpoint, "-o", "p", "--calib", text, *TOKENS, "--json"))
    assert got.keys() >= {
        "pack", "model_type", "layers", "experts_per_layer", "expert_bytes_bf16", "pack_bytes", "forms", "seconds",
        "peak_bytes",
    }  # fmt: skip
    assert (got["layers"], got["experts_per_layer"], got["model_type"]) == (2, 8, "qwen3_moe")
    assert got["pack_bytes"] == sum(path.stat().st_size for path in Path("p").iterdir())


def test_inspect_lists_forms_and_chain(comoe: Comoe, packed: Path) -> None:
    got = document(comoe("inspect", packed, "--json"))
    manifest = read_manifest(packed)
    assert [form["name"] for form in got["forms"]] == list(manifest.forms)
    assert all(form.keys() == {"name", "bytes", "mean_error"} for form in got["forms"])
    assert [step["step"] for step in got["chain"]] == [step.name for step in manifest.chain]
    assert all(step.keys() >= {"step", "resident_bytes", "loss", "loss_worst_domain"} for step in got["chain"])
    assert all(
        step["loss"] == found.certificate.loss for step, found in zip(got["chain"], manifest.chain[:-1], strict=False)
    )
    assert all(sum(step["shares"].values()) == pytest.approx(1) for step in got["chain"])
    shown = comoe("inspect", packed).out
    assert all(name in shown for name in (*manifest.forms, *(step.name for step in manifest.chain)))


def test_inspect_needs_no_checkpoint_but_says_that_it_is_not_there(comoe: Comoe, copied: Path) -> None:
    before = document(comoe("inspect", copied, "--json"))
    assert before["source_problem"] is None
    source = copied.parent / "source"
    source.rename(copied.parent / "moved")
    result = comoe("inspect", copied, "--json")
    after = document(result)
    assert after | {"source_problem": None} == before
    assert str(source) in after["source_problem"] and after["source_problem"] in result.err
    shown = comoe("inspect", copied)
    assert "q8" in shown.out and "which is not there" in shown.err
    found = comoe("inspect", copied, "--source", copied.parent / "moved", "--json")
    assert document(found)["source_problem"] is None and found.err == ""


def test_plan_prints_a_frontier_and_says_what_fits(comoe: Comoe, packed: Path) -> None:
    got = document(comoe("plan", packed, "--expert-memory", "50%", "--max-loss", "50%", "--json"))
    assert got["fits"]
    assert got["smallest_memory"] > 0
    for plan in got["plans"]:
        assert plan.keys() >= {
            "name", "floor", "floor_bytes", "refinement_bytes", "total_bytes", "ms_per_token", "loss", "start_seconds",
            "fetch_bytes", "shares",
        }  # fmt: skip
        assert plan["total_bytes"] <= Pack(packed).manifest.expert_bytes_bf16 // 2
        assert sum(plan["shares"].values()) == pytest.approx(1)


def test_a_slower_link_makes_a_slower_plan(comoe: Comoe, packed: Path) -> None:
    slow, fast = (
        document(comoe("plan", packed, "--expert-memory", "20%", "--exact", "--link", link, "--json"))["plans"][0]
        for link in ("1Mbit,50ms", "1Gbit,1ms")
    )
    assert slow["ms_per_token"][0] > 10 * fast["ms_per_token"][0]


@pytest.mark.parametrize("words", [(), ("--link", "40Mbit,20ms")])
def test_before_a_pack_is_downloaded_its_manifest_is_planned(
    comoe: Comoe, packed: Path, words: tuple[str, ...]
) -> None:
    Path("p").mkdir()
    shutil.copy(packed / "comoe.json", "p")
    asked = ("--expert-memory", "40%", "--exact", "--json")
    result = comoe("plan", "p", *asked, *words)
    (here, *_), (there, *_) = document(result)["plans"], document(comoe("plan", packed, *asked))["plans"]
    assert "p holds a manifest and no weights yet" in result.err
    known = ("target", "floor_bytes", "refinement_bytes", "shares", "hit_rate", "fetch_bytes", "loss")
    assert {key: here[key] for key in known} == {key: there[key] for key in known}
    shutil.copy(packed / "dense.safetensors", "p")
    (part, *_) = (part for layer in read_manifest(packed).layers for part in layer.parts.values() if part.file)
    assert part.file is not None
    assert comoe("plan", "p", *asked, *words).code != 0  # a pack that lost files is none that is yet to come


def test_over_a_link_reads_take_its_rate_and_round_trip(comoe: Comoe, packed: Path) -> None:
    words = ("--expert-memory", "20%", "--exact", "--json", "--link")
    (slow, *_), (slower, *_) = (
        document(comoe("plan", packed, *words, link))["plans"] for link in ("8Mbit,100ms", "8Mbit,300ms")
    )
    reads = 4 * (1 - slow["hit_rate"])  # of two layers' top-2
    assert slower["ms_per_token"][0] - slow["ms_per_token"][0] == pytest.approx(200 * reads, rel=0.2)
    assert slow["start_seconds"] == pytest.approx(0.1 + slow["floor_bytes"] / 1e6)


def test_a_policy_that_keeps_the_most_used_is_planned_to_hit_no_less(comoe: Comoe, packed: Path) -> None:
    rates = {
        policy: document(comoe("plan", packed, "--expert-memory", "40%", "--exact", "--json", "--policy", policy))
        for policy in ("lru", "lfu")
    }
    assert rates["lfu"]["plans"][0]["hit_rate"] > rates["lru"]["plans"][0]["hit_rate"]
    refused = comoe("plan", packed, "--policy", "random")
    assert (refused.code, refused.out) == (2, "") and "choose from" in refused.sentence


def test_a_plan_counts_what_the_compute_dtype_takes(comoe: Comoe, packed: Path) -> None:
    needed = [
        document(comoe("plan", packed, "--memory", "2GiB", "--dtype", dtype, "--json"))["beside_experts_bytes"]
        for dtype in ("bfloat16", "float32")
    ]
    assert needed[0] + Pack(packed).manifest.dense_bytes < needed[1]


def test_a_plan_depends_on_how_many_threads_compute(
    comoe: Comoe, packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda process: range(4))
    monkeypatch.setattr("comoe.device.costs.memory_bps", lambda clock, *, threads=1: 1e3 * threads)

    def low(*words: object) -> float:
        plans = document(comoe("plan", packed, "--expert-memory", "100%", "--json", *words))["plans"]
        return float(plans[0]["ms_per_token"][0])

    assert low("--threads", 1) > 1.9 * low("--threads", 2) > 3.6 * low()


def test_verify_computes_with_so_many_threads(comoe: Comoe, packed: Path, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    try:
        comoe("verify", packed, "--text", calibration_text(tmp_path), "--threads", 1)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_run_answers_with_the_keys_of_the_contract(comoe: Comoe, packed: Path) -> None:
    got = document(comoe("run", packed, "--expert-memory", "30%", "-p", "fox", "-n", 5, "--ignore-eos", "--json"))
    assert got.keys() >= {
        "text", "tokens", "prefill_ms", "ms_per_token", "framework_ms_per_token", "hit_rate", "floor_rate",
        "bytes_read", "expert_memory_bytes", "peak_bytes", "loss_ledger", "calibration_distance", "like_calibration",
        "shares", "plan",
    }  # fmt: skip
    assert got["tokens"] == 5
    assert got["expert_memory_bytes"] <= 0.3 * Pack(packed).manifest.expert_bytes_bf16
    assert got["bytes_read"]["flash"] > 0


def test_run_says_once_that_a_text_is_unlike_the_calibration_and_so_may_lose_more(
    comoe: Comoe, packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exactly = ("run", packed, "--expert-memory", "30%", "-p", "fox", "-n", 5, "--ignore-eos")
    words = (*exactly, "--max-loss", "50%")
    told = "unlike the pack's calibration: the bound of 50.0% was certified for other text"
    monkeypatch.setattr("comoe.plan.likeness.UNLIKE", float("inf"))
    assert "unlike" not in comoe(*words).err
    monkeypatch.setattr("comoe.plan.likeness.UNLIKE", 0.0)
    result = comoe(*words)
    assert result.err.count(told) == 1 and result.err.endswith(", of text unlike the calibration.\n")
    reported = comoe(*words, "--json")
    assert told in reported.err and document(reported)["like_calibration"] is False
    exact = document(comoe(*exactly, "--json"))
    assert (exact["calibration_distance"], exact["like_calibration"]) == (None, None)


def test_run_streams_the_same_text_as_it_reports(comoe: Comoe, packed: Path) -> None:
    words = ("run", packed, "--expert-memory", "30%", "-p", "fox", "-n", 12, "--temperature", 1, "--seed", 7)
    streamed, reported = comoe(*words), document(comoe(*words, "--json"))
    assert streamed.out == reported["text"] + "\n"
    other = document(comoe(*words[:-1], 8, "--json"))
    assert other["text"] != reported["text"]


def test_a_stop_string_ends_the_text_before_it(comoe: Comoe, packed: Path) -> None:
    words = ("run", packed, "--expert-memory", "50%", "-p", "fox", "-n", 12, "--ignore-eos", "--json")
    text = document(comoe(*words))["text"]
    stop = text[5]
    assert document(comoe(*words, "--stop", stop))["text"] == text[: text.index(stop)]


def test_prompts_come_from_a_file_or_a_line_each_from_stdin(
    comoe: Comoe, packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("run", packed, "--expert-memory", "50%", "-n", 4)
    Path("prompt.txt").write_text("fox")
    alone = comoe(*words, "--prompt-file", "prompt.txt").out
    monkeypatch.setattr("sys.stdin", io.StringIO("fox\n\nfox\n"))
    assert comoe(*words).out == 2 * alone
    monkeypatch.setattr("sys.stdin", io.StringIO("fox"))
    assert comoe(*words, "--prompt-file", "-").out == alone


def test_verify_compares_promises_with_facts(comoe: Comoe, copied: Path, tmp_path: Path) -> None:
    words = ("verify", copied, "--text", calibration_text(tmp_path), "--max-loss", "50%", "--json")
    got = document(comoe(*words))
    assert got["ok"]
    assert got["exact"] == {"bit_equal": True, "allclose": True, "greedy_equal": True}
    assert got["predicted"].keys() & got["measured"].keys() >= {"ms_per_token", "hit_rate", "loss"}
    assert got["errors"] == []


def test_doctor_measures_and_names_problems(comoe: Comoe) -> None:
    got = document(comoe("doctor", "--json"))
    assert got.keys() == {
        "cpu", "threads", "kernel", "memory_limit", "memory_source", "memory_gbps", "disk_gbps", "direct_io", "cgroup",
        "psi", "torch", "transformers", "problems",
    }  # fmt: skip
    assert got["memory_gbps"] > 0 < got["disk_gbps"]
    assert list(Path().iterdir()) == []


def test_the_version_needs_no_command(comoe: Comoe) -> None:
    result = comoe("--version")
    assert (result.code, result.out, result.err) == (0, version("comoe") + "\n", "")


# Where a value comes from


def test_a_flag_wins_over_the_environment_and_that_over_the_file(
    comoe: Comoe, packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def first_plan(*words: object) -> int:
        return int(document(comoe("plan", packed, "--exact", "--json", *words))["plans"][0]["total_bytes"])

    whole = Pack(packed).manifest.expert_bytes_bf16
    Path("comoe.toml").write_text('[plan]\nexpert-memory = "40%"\n')
    assert first_plan() == int(0.4 * whole)
    monkeypatch.setenv("COMOE_EXPERT_MEMORY", "60%")
    assert first_plan() == int(0.6 * whole)
    assert first_plan("--expert-memory", "80%") == int(0.8 * whole)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('expert-memori = "30%"', "did you mean 'expert-memory'?"),
        ('[run]\nmax-los = "1%"', "did you mean 'max-loss'?"),
        ('[runn]\nmax-loss = "1%"', "did you mean 'run'?"),
        ("max-loss = ", "is not TOML"),
    ],
)
def test_an_unknown_key_of_the_settings_file_is_refused_with_the_nearest_known(
    comoe: Comoe, packed: Path, text: str, said: str
) -> None:
    Path("comoe.toml").write_text(text)
    result = comoe("inspect", packed)
    assert (result.code, result.out) == (2, "")
    assert said in result.sentence


@pytest.mark.parametrize("text", ["max-loss = 0.02", "max-loss = 2", '[run]\nmax-loss = "2"', "expert-memory = 0.3"])
def test_a_percentage_without_its_sign_is_refused_in_the_settings_file(comoe: Comoe, packed: Path, text: str) -> None:
    Path("comoe.toml").write_text(text)
    result = comoe("plan", packed)
    assert (result.code, result.out) == (2, "")
    assert "could be a percentage or a fraction" in result.sentence


@pytest.mark.parametrize(("value", "bounded"), [('"50%"', True), ('"50 %"', True), ("0", False), ('"0"', False)])
def test_a_percentage_of_the_settings_file_is_what_the_flag_would_be(
    comoe: Comoe, packed: Path, value: str, bounded: bool
) -> None:
    Path("comoe.toml").write_text(f'max-loss = {value}\nexpert-memory = "50%"')
    plans = document(comoe("plan", packed, "--json"))["plans"]
    assert ("bounded" in {plan["name"] for plan in plans}) == bounded


@pytest.mark.parametrize(
    ("preset", "bounded"), [("faithful", False), ("balanced", True), ("small", True), ("slow-reads", True)]
)
def test_a_preset_is_a_settings_file_that_comes_along(comoe: Comoe, packed: Path, preset: str, bounded: bool) -> None:
    plans = document(comoe("--config", preset, "plan", packed, "--expert-memory", "50%", "--json"))["plans"]
    assert ("bounded" in {plan["name"] for plan in plans}) == bounded
    assert preset in presets()


def test_an_unknown_preset_is_refused_with_those_that_there_are(comoe: Comoe, packed: Path) -> None:
    result = comoe("--config", "tiny", "plan", packed)
    assert (result.code, result.out) == (2, "")
    assert "balanced, faithful, slow-reads, small" in result.sentence


# Bad input


def not_a_moe(source: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    shutil.rmtree(source)
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=8, **sizes)).save_pretrained(source)


def missing_shard(source: Path) -> None:
    (source / "model.safetensors").unlink()


def truncated_shard(source: Path) -> None:
    file = source / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def wrong_shape(source: Path) -> None:
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.mlp.experts.0.up_proj.weight"] = tensors["model.norm.weight"].clone()
    save_file(tensors, source / "model.safetensors", {"format": "pt"})


def nan_weights(source: Path) -> None:
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * float("nan")
    save_file(tensors, source / "model.safetensors", {"format": "pt"})


def hostile_header(source: Path) -> None:
    file = source / "model.safetensors"
    file.write_bytes((1 << 62).to_bytes(8, "little") + file.read_bytes()[8:])


def no_config(source: Path) -> None:
    (source / "config.json").unlink()


def config_that_is_not_json(source: Path) -> None:
    (source / "config.json").write_text("{")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (not_a_moe, "not a Mixture-of-Experts model"),
        (missing_shard, "model.safetensors"),
        (truncated_shard, "download it again"),
        (wrong_shape, "shape"),
        (nan_weights, "NaN"),
        (hostile_header, "header"),
        (no_config, "no config.json"),
        (config_that_is_not_json, "config.json"),
    ],
)
def test_a_broken_checkpoint_is_refused_in_a_sentence_and_nothing_is_left(
    comoe: Comoe, tiny_checkpoint: Path, tmp_path: Path, damage: Callable[[Path], None], said: str
) -> None:
    shutil.copytree(tiny_checkpoint, tmp_path / "source")
    damage(tmp_path / "source")
    result = comoe("pack", "source", "-o", "p", "--calibrate", "none")
    assert result.code == 1
    assert said in result.sentence
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_checkpoint_changed_after_packing_is_noticed(comoe: Comoe, copied: Path) -> None:
    file = copied.parent / "source" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[20] ^= 1
    file.write_bytes(data)
    result = comoe("run", copied, "--expert-memory", "50%", "-p", "fox")
    assert (result.code, result.out) == (1, "")
    assert "is not the file that was packed" in result.sentence
    file.unlink()
    assert "--source" in comoe("run", copied, "--expert-memory", "50%", "-p", "fox").sentence


def test_a_flipped_byte_stops_the_run_and_fails_verification(comoe: Comoe, copied: Path) -> None:
    for file in copied.glob("0*-*.safetensors"):
        header = read_header(file)
        data = bytearray(file.read_bytes())
        for row in range(header.rows):
            data[header.offset(row) + header.nbytes - 1] ^= 1
        file.write_bytes(data)
    result = comoe("run", copied, "--expert-memory", "40%", "--max-loss", "50%", "-p", "fox")
    assert result.code == 1
    assert "has not the bytes that were packed" in result.sentence
    checked = comoe("verify", copied, "--json")
    assert checked.code == 4
    assert not json.loads(checked.out)["ok"]
    assert json.loads(checked.out)["errors"]


@pytest.mark.parametrize("name", ["dense.safetensors", "profile.safetensors", "tokenizer.json"])
def test_a_flipped_byte_beside_the_blobs_stops_the_run_and_fails_verification(
    comoe: Comoe, copied: Path, name: str
) -> None:
    data = bytearray((copied / name).read_bytes())
    data[-2] ^= 1
    (copied / name).write_bytes(data)
    result = comoe("run", copied, "--expert-memory", "40%", "-p", "fox")
    assert result.code in (1, 2)
    checked = comoe("verify", copied, "--json")
    assert checked.code == 4
    assert name in json.loads(checked.out)["errors"][0]


def test_a_checkpoint_for_a_pack_that_reads_none_is_refused_but_compared_with(
    comoe: Comoe, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    pack(tiny_checkpoint, Path("own"), Recipe(forms=("q4",), self_contained=True), lambda step, done: None)
    for words in (("plan", "own"), ("inspect", "own"), ("run", "own", "-p", "x")):
        result = comoe(*words, "--source", tiny_checkpoint)
        assert (result.code, result.out) == (2, "")
        assert "self-contained and reads no checkpoint" in result.sentence
    words = ("verify", "own", "--text", calibration_text(tmp_path), "--json")
    assert document(comoe(*words))["exact"]["allclose"] is None
    assert document(comoe(*words, "--source", tiny_checkpoint))["exact"]["allclose"]


def test_a_manifest_with_an_unknown_key_is_refused(comoe: Comoe, copied: Path) -> None:
    manifest = json.loads((copied / "comoe.json").read_bytes())
    (copied / "comoe.json").write_text(json.dumps(manifest | {"surprise": 1}))
    result = comoe("inspect", copied)
    assert result.code == 2
    assert "surprise" in result.sentence


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("run", "nowhere", "-p", "x"), 1, "is not a pack"),
        (("run", "PACK", "-p", ""), 2, "the prompt is empty"),
        (("run", "PACK", "-p", "x", "--prompt-file", "y"), 2, "not both"),
        (("run", "PACK", "--prompt-file", "absent.txt"), 2, "cannot be read"),
        (("run", "PACK", "-p", "x", "--memory", "4 apples"), 2, "is not a size"),
        (("run", "PACK", "-p", "x", "--memory", "1GiB", "--expert-memory", "30%"), 2, "not both"),
        (("run", "PACK", "-p", "x", "--exact", "--max-loss", "1%"), 2, "--exact"),
        (("run", "PACK", "-p", "x", "--max-loss", "much"), 2, "is not a percentage"),
        (("run", "PACK", "-p", "x", "--dtype", "int3"), 2, "float32, bfloat16, float16"),
        (("run", "PACK", "-p", "x", "-n", "0"), 2, "--max-new-tokens"),
        (("run", "PACK", "-p", "x", "--temperature", "-1"), 2, "negative"),
        (("run", "PACK", "-p", "x", "--temperature", "nan"), 2, "negative"),
        (("run", "PACK", "-p", "x", "--stop", ""), 2, "--stop"),
        (("run", "PACK", "-p", "\udcff"), 2, "UTF-8"),
        (("run", "PACK", "-p", "x", "--chat"), 2, "no chat template"),
        (("run", "PACK", "-p", "x", "--edge", "http://127.0.0.1:1"), 5, "does not answer"),
        (("run", "PACK", "-p", "x", "--edge", "nowhere"), 2, "no edge node"),
        (("run", "PACK", "--json"), 2, "needs a prompt"),
        (("run", "PACK", "-p", "x", "--expert-memory", "1KiB"), 3, "at least"),
        (("run", "PACK", "-p", "x", "--memory", "20MiB"), 3, "at least --memory"),
        (("run", "PACK", "-p", "some words", "--context", "5"), 2, "raise --context"),
        (("plan", "PACK", "--link", "fast"), 2, "is not a link"),
        (("plan", "PACK", "--dtype", "int3"), 2, "float32, bfloat16, float16"),
        (("plan", "PACK", "--expert-memory", "1KiB"), 3, "below --expert-memory"),
        (("pack", "CHECKPOINT", "-o", "p", "--forms", "q5"), 2, "choose from"),
        (("pack", "CHECKPOINT", "-o", "p", "--calib", "absent.txt"), 2, "cannot be read"),
        (("pack", "CHECKPOINT", "-o", "p", "--calib", "short.txt"), 2, "shorter than"),
        (("pack", "CHECKPOINT", "-o", "p", "--calibrate", "maybe"), 2, "text or none"),
        (("pack", "./absent", "-o", "p"), 2, "is not a folder"),
        (("bench", "nothing"), 2, "choose from"),
    ],
)
def test_what_cannot_work_is_said_in_one_sentence(
    comoe: Comoe, packed: Path, tiny_checkpoint: Path, words: tuple[str, ...], code: int, said: str
) -> None:
    Path("short.txt").write_text("too short")
    places = {"PACK": packed, "CHECKPOINT": tiny_checkpoint}
    result = comoe(*(places.get(word, word) for word in words))
    assert (result.code, result.out) == (code, "" if words[0] != "plan" else result.out)
    assert said in result.sentence
    assert "Traceback" not in result.err
    assert not Path("p").exists() and not Path("p.partial").exists()


def test_the_smallest_budget_that_is_named_does_work(comoe: Comoe, packed: Path) -> None:
    words = ("run", packed, "-p", "x", "-n", 2)
    refused = comoe(*words, "--expert-memory", "1KiB")
    smallest = int(next(word for word in refused.sentence.split() if word.isdigit()))
    assert comoe(*words, "--expert-memory", smallest).code == 0
    assert comoe(*words, "--expert-memory", smallest - 1).code == 3
