"""Traces: read as they were written or refused whole, and what is recorded is what routers chose, call by call."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import CALIBRATION, Comoe, calibration_text, document
from conftest import save_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from models import save_random
from packs import refused
from tampering import bytes_of, tensors_of

from comoe.cli.profile import writing
from comoe.make.pack import pack
from comoe.make.recipe import Recipe
from comoe.make.trace import PROMPT_TOKENS, record
from comoe.runtime.generate import tokenizer_of
from comoe.runtime.load import load
from comoe.runtime.recorder import recording
from comoe.store.trace import DTYPES, Chunk, Foreseen, Trace, read_trace, write_trace
from comoe.types import UsageError

EXPERTS = (3, 2)
"""Of the invented model's layers."""

Passes = list[list[Chunk]]


def trace_of(passes: Passes, experts: tuple[int, ...] = EXPERTS) -> Trace:
    """Chunks laid end to end."""
    chunks = [chunk for of_pass in passes for chunk in of_pass]
    return Trace(
        experts=np.array(experts, np.int64),
        tokens=np.array([max([1, *(sum(chunk.counts) for chunk in found)]) for found in passes], np.int64),
        chunks=np.cumsum([0, *map(len, passes)]),
        layers=np.array([chunk.layer for chunk in chunks], np.int32),
        uses=np.cumsum([0, *(len(chunk.experts) for chunk in chunks)]),
        expert=np.array([expert for chunk in chunks for expert in chunk.experts], np.int32),
        count=np.array([count for chunk in chunks for count in chunk.counts], np.int32),
        gate=np.array([gate for chunk in chunks for gate in chunk.gates], np.float32),
    )


@st.composite
def chunks(draw: st.DrawFn) -> Chunk:
    layer = draw(st.integers(0, len(EXPERTS) - 1))
    used = sorted(draw(st.sets(st.integers(0, EXPERTS[layer] - 1))))
    counts = [draw(st.integers(1, 9)) for _ in used]
    return Chunk(0, layer, used, counts, [count / 8 for count in counts])


passes = st.lists(st.lists(chunks(), max_size=4), min_size=1, max_size=5).filter(
    lambda found: any(chunk.experts for of_pass in found for chunk in of_pass)
)


@given(passes)
@settings(deadline=None, max_examples=50)
def test_what_is_read_is_what_was_written_chunk_by_chunk(
    tmp_path_factory: pytest.TempPathFactory, given_: Passes
) -> None:
    path = tmp_path_factory.mktemp("trace") / "a.trace"
    wanted = [chunk._replace(in_pass=at) for at, of_pass in enumerate(given_) for chunk in of_pass]
    assert list(trace_of(given_)) == wanted
    write_trace(path, trace_of(given_))
    found = read_trace(path)
    assert list(found) == wanted
    assert all(np.array_equal(getattr(found, name), getattr(trace_of(given_), name)) for name in DTYPES)
    assert list(path.parent.iterdir()) == [path]


SEEN = trace_of(
    [
        [Chunk(0, 0, [0, 2], [3, 1], [1.5, 0.5]), Chunk(0, 0, [], [], []), Chunk(0, 1, [1], [4], [2.0])],
        [Chunk(0, 0, [1], [1], [1.0])],
    ]
)


def put(name: str, values: list[float]) -> Callable[[Path], object]:
    return tensors_of(lambda found: found.update({name: np.array(values, getattr(SEEN, name).dtype)}))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "nothing in it": bytes_of(lambda data: b""),
    "text": bytes_of(lambda data: b"pass,layer,expert\n" * 100),
    "cut short": bytes_of(lambda data: data[:-1]),
    "longer": bytes_of(lambda data: data + b"\0"),
    "another model's weights": tensors_of(lambda found: (found.clear(), found.update(w=np.ones(3, np.float32)))),
    "a tensor less": tensors_of(lambda found: found.pop("gate")),
    "a tensor more": tensors_of(lambda found: found.update(more=np.ones(3, np.int64))),
    "other numbers": tensors_of(lambda found: found.update(uses=SEEN.uses.astype(np.int32))),
    "another shape": tensors_of(lambda found: found.update(tokens=SEEN.tokens[:, None])),
    "one number": tensors_of(lambda found: found.update(tokens=np.array(1))),
    "no passes": tensors_of(lambda found: found.update(tokens=np.zeros(0, np.int64), chunks=np.zeros(1, np.int64))),
    "passes of nothing": put("tokens", [4, 0]),
    "layers without experts": put("experts", [3, 0]),
    "a pass too many": put("chunks", [0, 3, 4, 4]),
    "chunks that nobody has": put("chunks", [0, 3, 3]),
    "chunks before the first": put("chunks", [1, 3, 4]),
    "chunks that go back": put("chunks", [0, 5, 4]),
    "uses that go back": put("uses", [0, 3, 2, 3, 4]),
    "a layer too many": put("layers", [0, 0, 2, 0]),
    "a layer below 0": put("layers", [0, 0, -1, 0]),
    "an expert of another layer": put("expert", [0, 2, 2, 1]),
    "an expert twice": put("expert", [2, 2, 1, 1]),
    "experts in another order": put("expert", [2, 0, 1, 1]),
    "uses by nobody": put("count", [3, 1, 0, 1]),
    "a gate less": put("gate", [1.5, 0.5, 2.0]),
    "gates that are no numbers": put("gate", [1.5, np.nan, 2.0, 1.0]),
    "gates below 0": put("gate", [1.5, -1.0, 2.0, 1.0]),
}


AHEAD = Foreseen(
    np.array([0, 2, 2, 2, 3]), np.array([1, 0, 2], np.int32), np.array([0.9, 0.25, 1.0], np.float32)
)  # fmt: skip


def told(name: str, values: list[float]) -> Callable[[Path], object]:
    return tensors_of(lambda found: found.update({name: np.array(values, getattr(AHEAD, name).dtype)}))


@pytest.mark.parametrize(
    "damage",
    [
        tensors_of(lambda found: found.pop("chance")),
        told("foreseen", [0, 2, 2, 3]),
        told("foreseen", [0, 2, 1, 2, 3]),
        told("foreseen", [0, 2, 2, 2, 2]),
        told("candidate", [1, 0, 3]),
        told("candidate", [1, 0]),
        told("chance", [0.9, 0.25, 1.5]),
        told("chance", [0.9, 0.25]),
    ],
)
def test_what_was_foreseen_is_read_as_it_was_written_or_refused(
    tmp_path: Path, damage: Callable[[Path], object]
) -> None:
    path = tmp_path / "a.trace"
    write_trace(path, replace(SEEN, ahead=AHEAD))
    found = read_trace(path)
    assert found.ahead is not None
    assert all(np.array_equal(got, wanted) for got, wanted in zip(found.ahead, AHEAD, strict=True))
    damage(path)
    assert "record it again" in refused(UsageError, lambda: read_trace(path), path)


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_or_foreign_file_is_refused(tmp_path: Path, damage: Callable[[Path], object]) -> None:
    path = tmp_path / "a.trace"
    write_trace(path, SEEN)
    assert read_trace(path)
    damage(path)
    assert "record it again" in refused(UsageError, lambda: read_trace(path), path)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    assert "there is no trace" in refused(UsageError, lambda: read_trace(tmp_path / "absent"), tmp_path / "absent")
    refused(UsageError, lambda: read_trace(tmp_path), tmp_path)
    refused(UsageError, lambda: read_trace(tmp_path / ("x" * 300)), tmp_path)


# Recording


class Routers:
    """What a Qwen3-MoE's routers choose, seen from outside: (layer, tokens, {expert: (tokens, gates)})."""

    def __init__(self, model: Any) -> None:
        self.seen: list[tuple[int, int, dict[int, tuple[int, float]]]] = []
        for at, layer in enumerate(model.model.layers):
            layer.mlp.gate.register_forward_hook(self._hook(at))

    def _hook(self, at: int) -> Callable[..., None]:
        def seen(module: Any, inputs: Any, output: Any) -> None:
            _, gates, index = output
            used: dict[int, tuple[int, float]] = {}
            for expert, gate in zip(index.flatten().tolist(), gates.flatten().tolist(), strict=True):
                count, total = used.get(expert, (0, 0.0))
                used[expert] = (count + 1, total + gate)
            self.seen.append((at, len(index), used))

        return seen


def test_a_trace_is_what_the_routers_chose_call_by_call_and_only_while_it_is_recorded(packed: Path) -> None:
    model = load(packed, expert_memory="40%")
    with model.comoe, torch.no_grad():
        model(torch.arange(5, 9)[None])
        with recording(model) as recorder:
            routers = Routers(model)
            ids = torch.arange(5, 25)[None]
            model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False, eos_token_id=None
            )
        seen = list(routers.seen)
        model(torch.arange(5, 9)[None])
        trace = recorder.trace()
    assert trace.experts.tolist() == [8, 8]
    assert trace.tokens.tolist() == [20, 1, 1, 1]
    assert [(chunk.in_pass, chunk.layer) for chunk in trace] == [(at, layer) for at in range(4) for layer in (0, 1)]
    for chunk, (layer, _, used) in zip(trace, seen, strict=True):
        assert (chunk.layer, chunk.experts) == (layer, sorted(used))
        assert chunk.counts == [used[expert][0] for expert in chunk.experts]
        assert chunk.gates == pytest.approx([used[expert][1] for expert in chunk.experts], rel=0.02)  # of bfloat16


def test_a_prompt_of_several_chunks_is_one_pass(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("comoe.runtime.layer.CHUNK_TOKENS", 16)
    model = load(packed, expert_memory="40%")
    with model.comoe, torch.no_grad(), recording(model) as recorder:
        model(torch.arange(5, 45)[None])
    trace = recorder.trace()
    assert trace.tokens.tolist() == [40]
    assert [(chunk.layer, sum(chunk.counts)) for chunk in trace] == [(at, 2 * n) for at in (0, 1) for n in (16, 16, 8)]


def test_texts_take_turns_and_are_read_token_by_token_after_a_prompt(packed: Path) -> None:
    model = load(packed, expert_memory="100%")
    with model.comoe:
        trace = record(model, tokenizer_of(packed), [CALIBRATION, "abc" * 10], 20)
        short = record(model, tokenizer_of(packed), ["abcd"], 20)
        with pytest.raises(UsageError, match="at least two tokens"):
            record(model, tokenizer_of(packed), [CALIBRATION, "a"], 20)
    assert trace.tokens.tolist() == [PROMPT_TOKENS - 1, *[1] * 10, 14, *[1] * 10]
    assert short.tokens.tolist() == [1, 1, 1]  # a prompt of two, of which the second is the first to be answered


def test_many_tokens_are_as_many_windows_as_hold_them(packed: Path) -> None:
    model = load(packed, expert_memory="100%")
    with model.comoe:
        trace = record(model, tokenizer_of(packed), [CALIBRATION, "abc" * 30], 500)
    long, short = [PROMPT_TOKENS - 1, *[1] * 125], [PROMPT_TOKENS - 1, *[1] * 58]
    assert trace.tokens.tolist() == [*long, *short, *long]


def test_an_encoder_is_a_pass_of_its_own(tmp_path: Path) -> None:
    save_random("switch_transformers", tmp_path / "source")
    save_tokenizer(tmp_path / "source")
    pack(tmp_path / "source", tmp_path / "pack", Recipe(forms=()), lambda step, done: None)
    model = load(tmp_path / "pack", expert_memory="100%")
    with model.comoe:
        trace = record(model, tokenizer_of(tmp_path / "pack"), [CALIBRATION], 5)
        with torch.no_grad(), recording(model) as recorder:
            model(input_ids=torch.arange(5, 25)[None], decoder_input_ids=torch.arange(5, 9)[None])
    assert trace.tokens.tolist() == [130, *[1] * 5]
    layers = [{chunk.layer for chunk in trace if chunk.in_pass == at} for at in range(6)]
    assert layers[0] and not layers[0] & layers[1] and layers[1:] == layers[1:2] * 5
    assert recorder.trace().tokens.tolist() == [20]


# The command


def test_a_trace_is_recorded_and_described(comoe: Comoe, packed: Path, tmp_path: Path) -> None:
    words = ("--expert-memory", "60%", "--tokens", 12)
    said = document(comoe("trace", packed, "--calib", calibration_text(tmp_path), "-o", "a.trace", *words, "--json"))
    trace = read_trace(Path("a.trace"))
    assert trace.tokens.tolist() == [PROMPT_TOKENS - 1, *[1] * 12]
    sizes = {"passes": 13, "decoded": 12, "layers": 2, "uses": len(trace.expert)}
    assert said == {"trace": "a.trace", **sizes, "bytes": Path("a.trace").stat().st_size}
    shown = comoe("trace", packed, "--prompt", CALIBRATION, "-o", "b.trace", *words)
    assert (shown.code, "in 13 passes, 12 of them of one token" in shown.out) == (0, True)
    assert list(read_trace(Path("b.trace"))) == list(trace)


def test_a_trace_is_refused_before_anything_is_loaded(
    comoe: Comoe, packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("comoe.runtime.load.load_skeleton", None)
    Path("there").write_text("text")
    Path("latin").write_bytes("é".encode("latin-1"))
    for words, said in {
        ("-p", "fox", "-o", "there"): "there exists",
        ("-p", "fox", "-o", packed / "a.trace"): "would change a pack",
        ("-o", "a"): "give text to read",
        ("-p", "fox", "--calib", "there", "-o", "a"): "give text to read",
        ("--calib", "absent", "-o", "a"): "cannot be read",
        ("--calib", "latin", "-o", "a"): "cannot be read",
        ("-p", "fox", "-o", "a", "--expert-memory", "30%", "--memory", "2GiB"): "not both",
    }.items():
        result = comoe("trace", packed, *words)
        assert (result.code, result.out) == (2, ""), words
        assert said in result.sentence
    assert {path.name for path in Path().iterdir()} == {"there", "latin"}


def test_a_trace_whose_gates_are_no_numbers_is_refused_and_not_written(tmp_path: Path) -> None:
    lost = trace_of([[Chunk(0, 0, [1], [1], [float("nan")])]])
    with pytest.raises(UsageError, match="no numbers"), writing(tmp_path / "lost.trace"):
        write_trace(tmp_path / "lost.trace", lost)
    assert not list(tmp_path.iterdir())
