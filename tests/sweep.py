"""The sweep: a family's random model, packed and served as users do it, and asked the same in several ways.

test_exact.py asserts what is found; docs/build_families.py writes it down.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from conftest import save_tokenizer
from families import INTERFACE, model_class
from models import Answer, answer, eager_model, inputs_of, save_random
from torch import Tensor, nn
from transformers import GenerationMixin

import comoe
from comoe.kernels import native
from comoe.make.calibrate import Text
from comoe.make.pack import pack
from comoe.make.recipe import Recipe
from comoe.make.shared import Sharing
from comoe.plan.ladder import ladder_of
from comoe.runtime import experts
from comoe.runtime.load import Loader
from comoe.runtime.options import Options
from comoe.store.checkpoint import Checkpoint
from comoe.store.families import experts_modules
from comoe.store.layout import PAGE, align
from comoe.store.pack import Pack, Pieces
from comoe.types import BlobId

TOLERANCE = 1e-5
"""Of logits in float32: what adding in another order may change."""

SWEPT_FORMS = ("merged", "q4", "q8")
"""One that is shared, one of a single part, one of two: the others are these parts, or are tested by fewer families."""

FEW_LESSONS = Sharing(distil_steps=4)
"""Enough to go the way; what they are good for is test_shared's."""

CONTEXT = 64
TEXT = Text("letters", "".join(chr(97 + i * i * i % 26) for i in range(600)))
NUM_CALIBRATION_TOKENS = 512


class Ways(NamedTuple):
    """The same question, answered with the C kernel for few tokens, and by torch alone; and the kernel's calls."""

    kernel: Answer
    torch: Answer
    calls: int

    def equals(self, other: "Ways") -> bool:
        return self.kernel.equals(other.kernel) and self.torch.equals(other.torch)


class Resized(NamedTuple):
    """Answers from a cache of one expert, and from one that was resized before every layer.

    `uses` are what routers asked for in the prompt, by site: (N, K) for every call; `prompts` the prompts' lengths.
    """

    smallest: Answer
    answer: Answer
    uses: list[list[Tensor]]
    prompts: set[int]


class Shifted(Pack):
    """A pack that serves, for every expert, the bytes of the next one."""

    def pieces(self, blob: BlobId) -> Pieces:
        rows = self.manifest.layers[blob.layer].parts[blob.part].rows
        return super().pieces(blob._replace(row=(blob.row + 1) % rows))


class Watched:
    """An `ExpertLayer` that resizes the cache before each layer and notes what routers asked for: (N, K) each."""

    def __init__(self, module: Any, handle: Any, sizes: Iterator[int]) -> None:
        self._layer, self._handle, self._sizes = module.comoe_layer, handle, sizes
        self.uses: list[Tensor] = []
        object.__setattr__(module, "comoe_layer", self)

    def forward(self, module: nn.Module, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        self.uses.append(index)
        self._handle.resize(next(self._sizes))
        out: Tensor = self._layer.forward(module, x, index, weight)
        return out


class Subject:
    """A family's tiny checkpoint and its pack; each way of asking it is asked once, computing in `dtype`.

    The pack is calibrated where the family generates text, and steps of its chain may share experts; else it holds no
    merged experts. Without `checkpoint`, a random one in `dtype` is made.
    """

    def __init__(
        self,
        family: str,
        folder: Path,
        dtype: torch.dtype = torch.float32,
        *,
        checkpoint: Path | None = None,
        forms: Sequence[str] = SWEPT_FORMS,
    ) -> None:
        self.family, self.dtype = family, dtype
        self._model: Any = None
        self.checkpoint, self.pack = checkpoint or folder / "checkpoint", folder / "pack"
        if checkpoint is None:
            save_random(family, self.checkpoint, dtype)
        save_tokenizer(self.checkpoint)
        texts = (TEXT,) if issubclass(model_class(family), GenerationMixin) else ()
        how = {"pruned": False, "shared": True, "sharing": FEW_LESSONS}
        recipe = Recipe(tuple(forms), texts, NUM_CALIBRATION_TOKENS, threads=1, **how)
        pack(self.checkpoint, self.pack, recipe, lambda step, done: None)
        self.manifest = Pack(self.pack).manifest
        layers = self.manifest.layers
        parts = [layer.parts["exact"] for layer in layers]
        self.expert_bytes = max(align(part.nbytes, PAGE) for part in parts)
        self.exact_bytes = sum(part.nbytes * part.rows for part in parts)
        self.num_layers, self.num_experts = len(layers), sum(layer.num_experts for layer in layers)

    @contextmanager
    def served(self, form: str = "exact", capacity: int | None = None, kind: type[Pack] = Pack) -> Iterator[Any]:
        """The model with experts in `form`: all in memory, or in `capacity` bytes. Its dense part is loaded once."""
        loader = Loader(kind(self.pack), Options(**self._options))
        room = loader.ladder.rung(form).nbytes if capacity is None else capacity
        model = self._model = loader.streamed(form, room, self._model)
        with model.comoe:
            yield model

    @property
    def _options(self) -> dict[str, Any]:
        return {"context": CONTEXT, "dtype": str(self.dtype).removeprefix("torch."), "threads": 1}

    @cached_property
    def eager(self) -> Answer:
        """What eager transformers says."""
        return answer(eager_model(self.family, self.checkpoint, self.dtype))

    @cached_property
    def resident(self) -> Ways:
        """With every expert in memory: what exactness is measured by."""
        with self.served() as model:
            return both_ways(model)

    @cached_property
    def budgeted(self) -> tuple[Ways, dict[str, Any]]:
        """With room for one expert per layer; and the handle's counters afterwards."""
        budget = self.expert_bytes * max(2, self.num_layers)
        model = comoe.load(self.pack, expert_memory=budget, **self._options)
        with model.comoe:
            return both_ways(model), model.comoe.stats()

    @cached_property
    def resized(self) -> Resized:
        """With room for one expert; then for another number before every layer.

        Most sizes keep all but a few, so that experts of a layer are there out of order.
        """
        total = self.num_experts
        counts = (total, total - 2, total - 1, total - 3, total, 2, total - 1, 1)
        with self.served(capacity=self.expert_bytes) as model:
            smallest, sizes = answer(model), cycle(self.expert_bytes * count for count in counts)
            layers = [Watched(module, model.comoe, sizes) for _, module in experts_modules(model)]
            inputs = inputs_of(model)
            with torch.no_grad():
                model(**inputs)
            uses = [list(layer.uses) for layer in layers]
            return Resized(smallest, answer(model), uses, {ids.numel() for ids in inputs.values()})

    @cached_property
    def shifted(self) -> Answer:
        """With every expert's neighbour in its place."""
        with self.served(kind=Shifted) as model:
            return answer(model)

    def coarse(self, form: str) -> tuple[Ways, Ways]:
        """In a coarse form or a step of the chain: all in memory, and streamed through the smallest cache."""
        rung = ladder_of(self.manifest).rung(form)
        with self.served(form) as model:
            resident = both_ways(model)
        with self.served(form, rung.group_beside(None)) as model:
            return resident, both_ways(model)


def both_ways(model: Any) -> Ways:
    with (
        mock.patch.object(native, "expert", wraps=native.expert) as whole,
        mock.patch.object(native, "linear", wraps=native.linear) as summed,
    ):
        usual = answer(model)
        calls = whole.call_count + summed.call_count
        if not calls:
            return Ways(usual, usual, 0)
        with mock.patch.object(experts, "KERNEL_TOKENS", 0):
            other = answer(model)
        assert whole.call_count + summed.call_count == calls
        return Ways(usual, other, calls)


@dataclass(frozen=True, slots=True)
class Finding:
    """What the sweep finds of a family: a row of docs/families.md."""

    family: str
    model: str
    hook: str
    stored: str
    exact: str
    runs: str
    weights: str
    forms: str
    bit_equal: bool
    allclose: bool
    greedy: bool | None
    control: bool

    def row(self) -> str:
        """The finding as a line of a table."""
        words = {True: "yes", False: "NO", None: "–", "": "–"}
        cells = (getattr(self, field.name) for field in fields(self))
        return f"| {' | '.join(words.get(cell, str(cell)) for cell in cells)} |"


HEADINGS = tuple(field.name.replace("_", "-") for field in fields(Finding))


def finding(subject: Subject) -> Finding:
    """Everything about `subject` that the page tells."""
    checkpoint = Checkpoint.open(subject.checkpoint)
    resident, eager = subject.resident.kernel, subject.eager
    return Finding(
        family=subject.family,
        model=model_class(subject.family).__name__,
        hook="interface" if subject.family.split()[0] in INTERFACE else "own",
        stored=_stored(checkpoint),
        exact=_exact(subject),
        runs="kernel" if subject.resident.calls else "torch",
        weights=_weights(checkpoint),
        forms=" ".join(form for form in subject.manifest.forms if form != "exact"),
        bit_equal=subject.budgeted[0].equals(subject.resident)
        and all(found.equals(resident) for found in (subject.resized.smallest, subject.resized.answer)),
        allclose=torch.allclose(resident.logits, eager.logits, rtol=TOLERANCE, atol=TOLERANCE),
        greedy=None if eager.tokens is None else resident.tokens == eager.tokens,
        control=differs(subject.shifted, eager),
    )


def differs(found: Answer, expected: Answer) -> bool:
    """Whether two answers are not the same model's: not by rounding, and not by little."""
    change = (found.logits - expected.logits).abs().max()
    return bool(change > 100 * TOLERANCE and change > 0.1 * expected.logits.std())


def _stored(checkpoint: Checkpoint) -> str:
    """How the checkpoint's files hold experts."""
    names = checkpoint.tensors.keys() - set(checkpoint.dense_names)
    return "per expert" if any(re.search(r"\bexperts?[._]\d+\b", name) for name in names) else "fused"


def _exact(subject: Subject) -> str:
    copied = {part.file is not None for layer in subject.manifest.layers for part in [layer.parts["exact"]]}
    return {(False,): "by reference", (True,): "copied"}.get(tuple(copied), "both")


def _weights(checkpoint: Checkpoint) -> str:
    """What is special about the experts' tensors."""
    leaves = [leaf for site in checkpoint.sites for leaf in site.leaves]
    special = {
        "transposed": any(leaf.transposed for leaf in leaves),
        "bias": any(leaf.name.endswith("bias") for leaf in leaves),
        "norm": any("norm" in leaf.name for leaf in leaves),
    }
    return ", ".join(name for name, found in special.items() if found)
