"""Profiles: they add up as their texts do, are refused whole or read exactly, and count what routers chose."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from commands import Comoe, document
from conftest import save_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from models import save_random
from packs import edit, refused
from safetensors.numpy import load_file
from tampering import bytes_of, tensors_of

from comoe.cli.profile import keep
from comoe.make.calibrate import Text, cut, fitted
from comoe.make.pack import pack
from comoe.make.protocol import DecoderEvaluation
from comoe.make.recipe import Recipe
from comoe.make.verify import reference_model
from comoe.runtime.generate import tokenizer_of
from comoe.runtime.load import load
from comoe.store.pack import Pack
from comoe.store.profile import DECODE, PHASES, PREFILL, PROFILE, Profile, Routed, read_profile, write_profile
from comoe.types import UsageError

EXPERTS = (3, 2)
"""Of the invented model's layers."""


class Token(NamedTuple):
    """One that came to a layer, and its uses there: (expert, gate). Gates of eighths add up exactly."""

    domain: str
    phase: str
    layer: int
    uses: tuple[tuple[int, float], ...]


def profile_of(tokens: Sequence[Token], experts: Sequence[int] = EXPERTS) -> Profile:
    """Counted one by one."""
    starts = np.cumsum([0, *experts])
    routed: dict[tuple[str, str], Routed] = {}
    for token in tokens:
        empty = Routed(np.zeros(len(experts), np.int64), np.zeros(starts[-1], np.int64), np.zeros(starts[-1]))
        found = routed.setdefault((token.domain, token.phase), empty)
        found.tokens[token.layer] += 1
        for expert, gate in token.uses:
            found.uses[starts[token.layer] + expert] += 1
            found.gates[starts[token.layer] + expert] += gate
    return Profile(tuple(experts), routed)


def same(one: Profile, other: Profile) -> bool:
    return (
        one.experts == other.experts
        and one.routed.keys() == other.routed.keys()
        and all(
            np.array_equal(ours, theirs) and ours.dtype == theirs.dtype
            for key in one.routed
            for ours, theirs in zip(one.routed[key], other.routed[key], strict=True)
        )
    )


domains = st.one_of(
    st.sampled_from(["code", "bible", "a/b", "", "session"]), st.text(st.characters(exclude_categories=["Cs"]))
)


@st.composite
def tokens(draw: st.DrawFn) -> Token:
    layer = draw(st.integers(0, len(EXPERTS) - 1))
    use = st.tuples(st.integers(0, EXPERTS[layer] - 1), st.integers(0, 40).map(lambda eighths: eighths / 8))
    return Token(draw(domains), draw(st.sampled_from(PHASES)), layer, tuple(draw(st.lists(use, max_size=2))))


texts = st.lists(tokens(), max_size=12)


# Sums


@given(texts, texts, texts)
def test_the_sum_of_profiles_is_the_profile_of_all_their_text_in_any_order(
    one: list[Token], two: list[Token], three: list[Token]
) -> None:
    a, b, c = map(profile_of, (one, two, three))
    whole = profile_of([*one, *two, *three])
    for found in ((a + b) + c, a + (b + c), c + b + a):
        assert same(found, whole)
    assert same(a, profile_of(one)) and same(b, profile_of(two))  # and nobody's own counts changed


@given(texts)
def test_uses_are_pooled_over_the_domains_and_phases_asked_for_and_none_where_nothing_was_seen(
    given_: list[Token],
) -> None:
    found = profile_of(given_)
    for of, phase in product((None, ["code"], ["code", "bible"]), (None, *PHASES)):
        chosen = [t for t in given_ if (of is None or t.domain in of) and phase in (None, t.phase)]
        uses, wanted = found.uses(of, phase), profile_of(chosen).uses()
        assert (uses is None) == (wanted is None) == (not chosen)
        assert uses is None or uses.tolist() == np.sum([r.uses for r in profile_of(chosen).routed.values()], 0).tolist()


def test_values_of_all_experts_are_cut_into_layers() -> None:
    assert [layer.tolist() for layer in Profile(EXPERTS).by_layer(np.arange(5))] == [[0, 1, 2], [3, 4]]


def test_profiles_of_different_models_do_not_add_up() -> None:
    with pytest.raises(UsageError, match="of 5 experts in 2 layers, not of 5 in 1"):
        Profile(EXPERTS) + Profile((5,))


# The file


@given(texts, texts)
@settings(deadline=None, max_examples=50)
def test_what_is_read_is_what_was_written_and_the_same_sum_makes_the_same_bytes(
    tmp_path_factory: pytest.TempPathFactory, one: list[Token], two: list[Token]
) -> None:
    folder = tmp_path_factory.mktemp("profile")
    a, b = profile_of(one), profile_of(two)
    for name, profile in (("ab", a + b), ("ba", b + a)):
        write_profile(folder / name, profile)
    assert same(read_profile(folder / "ab"), a + b)
    assert (folder / "ab").read_bytes() == (folder / "ba").read_bytes()
    assert len(load_file(folder / "ab")) == 1 + 3 * len((a + b).routed)
    assert {path.name for path in folder.iterdir()} == {"ab", "ba"}


SEEN = profile_of([Token("code", phase, layer, ((1, 0.5),)) for phase in PHASES for layer in (0, 1)])
USES = f"{PREFILL}/code/uses"


def test_a_pack_may_be_given_for_its_profile(tmp_path: Path) -> None:
    write_profile(tmp_path / PROFILE, SEEN)
    assert same(read_profile(tmp_path), SEEN)


def put(name: str, value: Any) -> Callable[[Path], object]:
    return tensors_of(lambda found: found.update({name: value(found.get(name))}))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "nothing in it": bytes_of(lambda data: b""),
    "text": bytes_of(lambda data: b"domain,expert,uses\n" * 100),
    "cut short": bytes_of(lambda data: data[:-1]),
    "longer": bytes_of(lambda data: data + b"\0"),
    "a header that is no JSON": bytes_of(lambda data: data.replace(b'"tokens', b"tokens", 1).replace(b"{", b"[", 1)),
    "a huge header": bytes_of(lambda data: (1 << 62).to_bytes(8, "little") + data[8:]),
    "another model's weights": tensors_of(lambda found: (found.clear(), found.update(w=np.ones(3, np.float32)))),
    "no uses": tensors_of(lambda found: found.pop(USES)),
    "no experts": tensors_of(lambda found: found.pop("experts")),
    "a tensor more": put("prefill/code/more", lambda old: np.ones(5, np.int64)),
    "a tensor of no name": put("uses", lambda old: np.ones(5, np.int64)),
    "a phase that nobody knows": tensors_of(
        lambda found: found.update({f"sleep/code/{part}": found[f"{PREFILL}/code/{part}"] for part in Routed._fields})
    ),
    "an expert less": put(USES, lambda old: old[:-1]),
    "another shape": put(USES, lambda old: old[:, None]),
    "other numbers": put(USES, lambda old: old.astype(np.int32)),
    "fewer than none": put(USES, lambda old: old - 1),
    "more than anybody counts": put(USES, lambda old: old + (1 << 60)),
    "gates that are no numbers": put(f"{DECODE}/code/gates", lambda old: old * np.nan),
    "layers without experts": put("experts", lambda old: np.array([5, 0])),
    "no layers": put("experts", lambda old: np.zeros(0, np.int64)),
    "experts that are one number": put("experts", lambda old: np.array(5)),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_or_foreign_file_is_refused(tmp_path: Path, damage: Callable[[Path], object]) -> None:
    path = tmp_path / "session.profile"
    write_profile(path, SEEN)
    damage(path)
    assert "leave it out or make it again" in refused(UsageError, lambda: read_profile(path), path)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    assert "there is no profile" in refused(UsageError, lambda: read_profile(tmp_path), tmp_path / PROFILE)
    absent = tmp_path / "absent"
    assert "there is no profile" in refused(UsageError, lambda: read_profile(absent), absent)
    long = tmp_path / ("x" * 300)
    refused(UsageError, lambda: read_profile(long), long)


# Packs

NUM_TOKENS = 2048
TEXTS = (Text("fox", "the quick brown fox jumps over the lazy dog. " * 60), Text("digits", "31415926535897932 " * 150))
FAMILIES = ("qwen3_moe", "switch_transformers", "llama4")
"""Decoders, an encoder beside a decoder, and one whose rows come expert by expert."""


def quiet(step: str, done: float) -> None:
    pass


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Path]]:
    """Packs of a family: of each text, and `whole` of all."""
    made: dict[str, dict[str, Path]] = {}

    def packs_of(family: str) -> dict[str, Path]:
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            save_random(family, folder / "source")
            save_tokenizer(folder / "source")
            made[family] = {text.domain: folder / text.domain for text in TEXTS} | {"whole": folder / "whole"}
            for text in TEXTS:
                recipe = Recipe(forms=("q4",), texts=(text,), num_tokens=NUM_TOKENS, certified=False)
                pack(folder / "source", folder / text.domain, recipe, quiet)
            recipe = Recipe(forms=("q4",), texts=TEXTS, num_tokens=len(TEXTS) * NUM_TOKENS, certified=False)
            pack(folder / "source", folder / "whole", recipe, quiet)
        return made[family]

    return packs_of


@pytest.mark.parametrize("family", FAMILIES)
def test_profiles_of_shards_packs_add_up_to_that_of_the_whole(
    packs: Callable[[str], dict[str, Path]], comoe: Comoe, family: str
) -> None:
    made = packs(family)
    shards = [made[text.domain] for text in TEXTS]
    assert comoe("profile", "merge", *shards, "-o", "all.profile").code == 0
    assert same(read_profile(Path("all.profile")), read_profile(made["whole"]))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_packs_profile_has_the_shares_of_its_manifest(packs: Callable[[str], dict[str, Path]], family: str) -> None:
    opened = Pack(packs(family)["whole"])
    profile = read_profile(opened.folder)
    assert profile.routed.keys() == {(text.domain, PREFILL) for text in TEXTS}
    uses = profile.uses()
    gates = sum(routed.gates for routed in profile.routed.values())
    assert uses is not None and PROFILE in opened.manifest.files
    for layer, used, mass in zip(opened.manifest.layers, profile.by_layer(uses), profile.by_layer(gates), strict=True):
        assert used / used.sum() == pytest.approx(layer.frequency, rel=1e-6)
        assert mass / mass.sum() == pytest.approx(layer.mass, rel=1e-12)


def test_an_encoder_and_a_decoder_see_their_own_tokens(packs: Callable[[str], dict[str, Path]]) -> None:
    profile = read_profile(packs("switch_transformers")["fox"])
    windows = NUM_TOKENS // 224 - -(-NUM_TOKENS // 224 // 4)  # every fourth is held out
    tokens = profile.routed["fox", PREFILL].tokens.tolist()
    assert {*tokens} == {windows * (128 + 2), windows * (224 - 128)}


def test_a_packs_profile_is_what_transformers_own_routers_choose(packs: Callable[[str], dict[str, Path]]) -> None:
    folder = packs("qwen3_moe")["whole"]
    model, tokenizer = reference_model(folder.parent / "source"), tokenizer_of(folder)
    length = DecoderEvaluation.window_length
    for domain, windows in cut(tokenizer, TEXTS, length, len(TEXTS) * NUM_TOKENS).items():
        chosen = Routers(model)
        with torch.no_grad():
            for window in fitted({domain: windows}):
                model(torch.tensor([window[:-1]]))
        assert chosen.counts(PREFILL) == counts(read_profile(folder), domain, PREFILL)
        chosen.remove()


def test_without_calibration_there_is_no_profile_and_an_old_pack_needs_none(
    comoe: Comoe, tiny_checkpoint: Path, copied: Path, tmp_path: Path
) -> None:
    pack(tiny_checkpoint, tmp_path / "plain", Recipe(), quiet)
    assert not (tmp_path / "plain" / PROFILE).exists()
    edit(copied, lambda manifest: manifest["files"].pop(PROFILE))
    (copied / PROFILE).unlink()
    assert comoe("run", copied, "--expert-memory", "50%", "-p", "fox", "-n", 2).code == 0
    for folder in (copied, tmp_path / "plain"):
        result = comoe("profile", "show", folder)
        assert (result.code, result.out) == (2, "")
        assert "there is no profile" in result.sentence


# Runs


class Routers:
    """What a Qwen3-MoE's routers choose, by phase, seen from outside."""

    def __init__(self, model: Any) -> None:
        self.chosen: dict[str, list[Counter[int]]] = {phase: [] for phase in PHASES}
        self.tokens: dict[str, list[int]] = {phase: [] for phase in PHASES}
        self.gates: dict[str, list[Counter[int]]] = {phase: [] for phase in PHASES}
        self._handles = []
        for at, layer in enumerate(model.model.layers):
            for phase in PHASES:
                self.chosen[phase].append(Counter())
                self.gates[phase].append(Counter())
                self.tokens[phase].append(0)
            self._handles.append(layer.mlp.gate.register_forward_hook(self._hook(at)))

    def _hook(self, at: int) -> Callable[..., None]:
        def seen(module: Any, inputs: Any, output: Any) -> None:
            _, gates, index = output
            phase = PREFILL if len(index) > 1 else DECODE
            self.tokens[phase][at] += len(index)
            for expert, gate in zip(index.flatten().tolist(), gates.flatten().tolist(), strict=True):
                self.chosen[phase][at][expert] += 1
                self.gates[phase][at][expert] += gate  # type: ignore[assignment]

        return seen

    def counts(self, phase: str) -> list[tuple[int, dict[int, int]]]:
        return list(zip(self.tokens[phase], map(dict, self.chosen[phase]), strict=True))

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def counts(profile: Profile, domain: str, phase: str) -> list[tuple[int, dict[int, int]]]:
    """By layer, tokens and the uses of the experts that were used."""
    routed = profile.routed[domain, phase]
    layers = [layer.tolist() for layer in profile.by_layer(routed.uses)]
    used = [{expert: uses for expert, uses in enumerate(layer) if uses} for layer in layers]
    return list(zip(routed.tokens.tolist(), used, strict=True))


def test_a_runs_profile_counts_what_the_routers_chose_by_phase_since_the_model_was_loaded(packed: Path) -> None:
    model = load(packed, expert_memory="40%")
    with model.comoe:
        assert model.comoe.profile.routed == {}
        chosen = Routers(model)
        for length in (20, 7):
            model.comoe.begin_request()
            ids = torch.arange(5, 5 + length)[None]
            model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=9, do_sample=False, eos_token_id=None
            )
        profile = model.comoe.profile
        assert profile.routed.keys() == {("session", phase) for phase in PHASES}
        for phase, num_tokens in ((PREFILL, 27), (DECODE, 16)):
            assert counts(profile, "session", phase) == chosen.counts(phase)
            assert profile.routed["session", phase].tokens.tolist() == [num_tokens] * 2
            gates = profile.by_layer(profile.routed["session", phase].gates)
            for layer, wanted in zip(gates, chosen.gates[phase], strict=True):
                assert layer.tolist() == pytest.approx([wanted[expert] for expert in range(8)], rel=0.02)  # of bfloat16
        before = profile.routed["session", DECODE].uses.copy()
        model(torch.tensor([[7]]))
        assert (profile.routed["session", DECODE].uses == before).all()  # what was handed out stays
        assert model.comoe.profile.routed["session", DECODE].tokens.tolist() == [17] * 2


RUN = ("--expert-memory", "50%", "-p", "the fox", "-n", 5, "--ignore-eos", "--json")


def test_a_run_makes_a_profile_and_the_next_adds_to_it(comoe: Comoe, packed: Path) -> None:
    for runs in (1, 2):
        document(comoe("run", packed, *RUN, "--profile", "s.profile"))
        found = read_profile(Path("s.profile"))
        assert found.routed["session", PREFILL].tokens.tolist() == [7 * runs] * 2
        assert found.routed["session", DECODE].tokens.tolist() == [4 * runs] * 2
        assert found.routed["session", DECODE].uses.sum() == 4 * runs * 2 * 2
    assert [path.name for path in Path().iterdir()] == ["s.profile"]


def test_what_was_routed_before_a_run_failed_is_kept(
    comoe: Comoe, packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from comoe.runtime import generate

    def failing(model: Any, *rest: Any) -> None:
        model(torch.arange(5, 15)[None])
        raise UsageError("enough of it.")

    monkeypatch.setattr(generate, "generate", failing)
    result = comoe("run", packed, *RUN, "--profile", "s.profile")
    assert (result.code, result.sentence) == (2, "enough of it.")
    assert read_profile(Path("s.profile")).routed["session", PREFILL].tokens.tolist() == [10, 10]


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("damaged", "make it again"),
        ("other", "is of another model"),
        ("PACK", "cannot be written"),
        ("PACK/mine", "would change a pack"),
        ("nowhere/mine", "in a folder that is there"),
    ],
)
def test_a_run_refuses_what_it_cannot_add_to_before_anything_is_loaded(
    comoe: Comoe, packed: Path, monkeypatch: pytest.MonkeyPatch, file: str, said: str
) -> None:
    monkeypatch.setattr("comoe.runtime.load.load_skeleton", None)
    Path("damaged").write_text("no profile")
    write_profile(Path("other"), Profile((8,)))
    result = comoe("run", packed, *RUN, "--profile", file.replace("PACK", str(packed)))
    assert (result.code, result.out) == (2, "")
    assert said in result.sentence
    assert {path.name for path in Path().iterdir()} == {"damaged", "other"}


# Plans


def one_sided(pack: Path, uses: int) -> Profile:
    """A session that keeps to two of eight experts in each layer."""
    experts = tuple(layer.num_experts for layer in Pack(pack).manifest.layers)
    counted = np.concatenate([[uses // 2] * 2 + [0] * (size - 2) for size in experts])
    return Profile(experts, {("session", DECODE): Routed(np.array([uses // 2] * len(experts)), counted, counted / 2)})


def test_a_plan_for_a_session_that_keeps_to_few_experts_predicts_more_hits(comoe: Comoe, packed: Path) -> None:
    write_profile(Path("few"), one_sided(packed, 1000))
    write_profile(Path("none"), Profile(one_sided(packed, 0).experts))

    def hit_rate(*words: object) -> float:
        plan = document(comoe("plan", packed, "--expert-memory", "40%", "--exact", "--json", *words))["plans"][0]
        return float(plan["hit_rate"])

    plain = hit_rate()
    assert hit_rate("--profile", "few") > 0.95 > plain + 0.2
    assert hit_rate("--profile", "none") == plain
    result = comoe("plan", packed, "--profile", "absent")
    assert (result.code, result.out) == (2, "")
    assert "there is no profile absent" in result.sentence


def test_a_profile_that_a_setting_names_and_no_run_made_yet_is_none(
    comoe: Comoe, packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("plan", packed, "--expert-memory", "40%", "--exact", "--json")
    plain = document(comoe(*words))["plans"][0]["hit_rate"]
    Path("comoe.toml").write_text('profile = "later"\n')
    from_file = comoe(*words)
    monkeypatch.setenv("COMOE_PROFILE", "soon")
    from_environment = comoe(*words)
    assert [document(got)["plans"][0]["hit_rate"] for got in (from_file, from_environment)] == [plain, plain]
    assert "no profile later yet" in from_file.err and "no profile soon yet" in from_environment.err
    Path("soon").write_text("damaged")
    assert comoe(*words).code == 2


def test_a_model_is_loaded_by_the_plan_for_its_session(packed: Path, tmp_path: Path) -> None:
    write_profile(tmp_path / "few", one_sided(packed, 1000))
    rates = []
    for profile in (None, tmp_path / "few"):
        model = load(packed, expert_memory="40%", profile=profile)
        with model.comoe:
            rates.append(model.comoe.plan.hit_rate)
    assert rates[1] > 0.95 > rates[0]


# The commands


def test_show_says_how_even_uses_are(comoe: Comoe) -> None:
    uses = np.array([6, 1, 1, 0, 5, 5, 5, 5, 0, 0])
    tokens = np.array([4, 10, 0])
    write_profile(Path("p"), Profile((4, 4, 2), {("code", PREFILL): Routed(tokens, uses, uses / 2)}))
    (seen,) = document(comoe("profile", "show", "p", "--json"))["seen"]
    shares = np.array([6, 1, 1]) / 8
    effective = float(np.exp(-(shares * np.log(shares)).sum()))
    assert seen == {
        "domain": "code",
        "phase": "prefill",
        "tokens": 10,
        "uses": 28,
        "busiest_quarter": [pytest.approx(0.75), pytest.approx(0.25), None],
        "effective_experts": [pytest.approx(effective), pytest.approx(4.0), None],
    }
    shown = comoe("profile", "show", "p").out.splitlines()
    assert shown[1].split() == ["code", "prefill", "10", "28", "25%", "to", "75%", f"{effective:.1f}", "to", "4.0"]


def test_show_lists_domains_and_prefill_before_decode(comoe: Comoe, packed: Path) -> None:
    more = profile_of([Token("a", DECODE, 0, ()), Token("a", PREFILL, 0, ((0, 1.0),)), Token("B", DECODE, 1, ())])
    write_profile(Path("p"), more)
    lines = [line.split()[:2] for line in comoe("profile", "show", "p").out.splitlines()[1:]]
    assert lines == [["B", DECODE], ["a", PREFILL], ["a", DECODE]]
    assert comoe("profile", "show", packed).out.splitlines()[1].split()[0] == "fox"


def test_merge_needs_a_place_of_its_own_and_one_model(comoe: Comoe, packed: Path) -> None:
    write_profile(Path("p"), SEEN)
    for words, said in {
        ("p", "p", "-o", "p"): "exists",
        ("p", packed, "-o", "q"): "another model",
        ("p", "absent", "-o", "q"): "there is no profile absent",
        ("p", "p", "-o", packed / "q"): "would change a pack",
    }.items():
        result = comoe("profile", "merge", *words)
        assert (result.code, result.out) == (2, "")
        assert said in result.sentence
    assert [path.name for path in Path().iterdir()] == ["p"] and not (packed / "q").exists()
    merged = document(comoe("profile", "merge", "p", "p", "p", "-o", "q", "--json"))
    assert merged["seen"][0]["uses"] == 6 and same(read_profile(Path("q")), SEEN + SEEN + SEEN)


def test_the_settings_file_holds_for_the_commands_of_a_group(comoe: Comoe) -> None:
    write_profile(Path("p"), SEEN)
    for text in ("json = true", "[profile]\njson = true"):
        Path("comoe.toml").write_text(text)
        assert json.loads(comoe("profile", "show", "p").out)["experts"] == list(EXPERTS)
    Path("comoe.toml").write_text("[profile]\njso = true")
    assert "did you mean 'json'?" in comoe("profile", "show", "p").sentence


def test_counts_that_are_no_numbers_are_not_kept_and_the_file_stays(tmp_path: Path) -> None:
    good = Profile((2,), {("session", DECODE): Routed(np.array([3]), np.array([1, 2]), np.array([0.5, 1.0]))})
    lost = Profile((2,), {("session", DECODE): Routed(np.array([3]), np.array([1, 2]), np.array([0.5, np.nan]))})
    keep(tmp_path / "s.profile", good)
    before = (tmp_path / "s.profile").read_bytes()
    with pytest.raises(UsageError, match="stays as it was"):
        keep(tmp_path / "s.profile", good + lost)
    assert (tmp_path / "s.profile").read_bytes() == before and len(list(tmp_path.iterdir())) == 1
