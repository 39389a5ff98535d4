"""`comoe.load`: from a pack and a budget to a transformers model that generates."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from comoe.device import process
from comoe.device.costs import measured_costs
from comoe.device.memory import memory_limit
from comoe.memory.cache import BlobCache
from comoe.plan.cost import Costs
from comoe.plan.footprint import CHUNK_TOKENS, MARGIN_BYTES, Workload, beside_experts
from comoe.plan.ladder import Band, ladder_of
from comoe.plan.ledger import Ledger
from comoe.plan.planner import Plan, Planner, uniform
from comoe.runtime.budget import WarmUp, dtype_of, warm_up
from comoe.runtime.experts import TORCH_DTYPES, SiteMath
from comoe.runtime.handle import Comoe
from comoe.runtime.hook import attach
from comoe.runtime.layer import ServedLayer, Serving
from comoe.runtime.skeleton import load_skeleton
from comoe.store.families import experts_modules
from comoe.store.layout import PAGE, align, layout
from comoe.store.manifest import FORM_PARTS
from comoe.store.pack import Pack
from comoe.types import DoesNotFit, RemoteUnavailable, UsageError
from comoe.units import format_size, parse_budget, parse_size

DEFAULT_CONTEXT = 2048
DEFAULT_MEMORY_SHARE = 0.8


@dataclass(frozen=True, slots=True)
class Options:
    """How to serve a pack, beyond its budget.

    `max_loss` is a fraction; `context` the longest prompt and answer together, in tokens; `dtype` the compute dtype,
    by default the checkpoint's.
    """

    max_loss: float = 0.0
    context: int = DEFAULT_CONTEXT
    dtype: str | None = None
    threads: int | None = None


def load(
    pack: str | Path,
    memory: str | int | None = None,
    expert_memory: str | int | None = None,
    max_loss: float = 0.0,
    edges: Sequence[str] = (),
    *,
    context: int = DEFAULT_CONTEXT,
    dtype: str | None = None,
    threads: int | None = None,
    source: str | Path | None = None,
) -> Any:
    """A transformers model whose experts are streamed from `pack` within a budget; `model.comoe` is its handle.

    `memory` bounds the whole process ("4GiB" or bytes), `expert_memory` the experts only (also "30%" of their bf16
    bytes); without either, four fifths of what is free. `max_loss` bounds the predicted relative increase of nats per
    token (0.02 is 2 %); 0 is exact. `source` is where the checkpoint went, if the pack refers to one that moved.

    Raises DoesNotFit, before anything large is loaded, with the smallest budget that would do; PackError for a pack
    that cannot be used; UsageError for a budget that cannot be read.
    """
    if edges:
        raise RemoteUnavailable("this version of comoe reads packs from local disks only: leave `edges` empty.")
    if memory is not None and expert_memory is not None:
        raise UsageError("give memory for the whole process or expert memory, not both.")
    loader = Loader(
        Pack(Path(pack), source=Path(source) if source else None), Options(max_loss, context, dtype, threads)
    )
    if expert_memory is not None:
        return loader.within_experts(parse_budget(expert_memory, loader.pack.manifest.expert_bytes_bf16))
    limit = int(memory_limit().nbytes * DEFAULT_MEMORY_SHARE)
    return loader.within_process(parse_size(memory) if memory is not None else limit)


class Loader:
    """A pack on the way to being served: refuse early, load the dense part, warm up, plan, fill."""

    def __init__(self, pack: Pack, options: Options) -> None:
        self.pack, self.options = pack, options
        self.ladder = ladder_of(pack.manifest)
        self._work = Workload(options.context, dtype_of(pack.manifest, options.dtype))
        self._dtype = TORCH_DTYPES[self._work.dtype]
        process.steady_malloc()
        if options.threads is not None:
            torch.set_num_threads(options.threads)

    def within_process(self, memory: int) -> Any:
        """The model, with experts in what the rest of the process leaves of `memory` bytes."""
        least = Planner(self.ladder, Costs.unknown()).smallest(self.options.max_loss)
        self._refuse_below(beside_experts(self.pack.manifest, self._work, process.resident_bytes()) + least, memory)
        model = self._skeleton()
        warm = self._warm_up(model)
        overhead = warm.peak_bytes + MARGIN_BYTES
        self._refuse_below(overhead + least, memory)
        plan = self.planner(warm).best(memory - overhead, self.options.max_loss)
        return self._serve(model, plan, memory - overhead, memory=memory)

    def within_experts(self, budget: int) -> Any:
        """The model, with experts in `budget` bytes."""
        self.planner().best(budget, self.options.max_loss)  # refuses before anything is loaded
        model = self._skeleton()
        plan = self.planner(self._warm_up(model)).best(budget, self.options.max_loss)
        return self._serve(model, plan, budget)

    def resident(self, form: str) -> Any:
        """The model with every expert in `form` in memory: the reference of comparisons."""
        return self.streamed(form, self.ladder.rung(form).nbytes)

    def streamed(self, form: str, capacity: int) -> Any:
        """The model with every expert in `form` and at most `capacity` bytes of them in memory."""
        return self._serve(self._skeleton(), uniform(self.ladder, form), capacity)

    def largest_layer(self, form: str) -> int:
        """Memory of all experts of the largest layer in `form`."""
        layers = self.pack.manifest.layers
        parts = FORM_PARTS[form]
        return max(sum(layer.parts[p].rows * align(layer.parts[p].nbytes, PAGE) for p in parts) for layer in layers)

    def planner(self, warm: WarmUp | None = None) -> Planner:
        """A planner with this device's rates; `warm` says what a token costs beside its experts."""
        framework_ms = Band(warm.low_ms, warm.high_ms) if warm else None
        return Planner(self.ladder, measured_costs(self.pack, perf_counter, framework_ms))

    def _skeleton(self) -> Any:
        return load_skeleton(self.pack.folder, self._dtype)

    def _refuse_below(self, needed: int, memory: int) -> None:
        if memory < needed:
            raise DoesNotFit(
                f"{self.pack.folder} needs at least --memory {needed} ({format_size(needed)}) for a context of "
                f"{self.options.context} tokens; {format_size(memory)} were given.",
                needed,
            )

    def _warm_up(self, model: Any) -> WarmUp:
        maths = self._maths(model)
        sizes = [self.pack.manifest.site(layer).expert_bytes_bf16 for layer in range(len(maths))]
        attach(
            model, [WarmLayer(math, self) if at == np.argmax(sizes) else WarmLayer() for at, math in enumerate(maths)]
        )
        return warm_up(model, self._work)

    def _maths(self, model: Any) -> list[SiteMath]:
        return [
            SiteMath(module, self.pack.manifest.site(layer), self._dtype)
            for layer, (_, module) in enumerate(experts_modules(model))
        ]

    def _serve(self, model: Any, plan: Plan, capacity: int, *, memory: int | None = None) -> Any:
        manifest = self.pack.manifest
        cache = BlobCache(self.pack, capacity, largest_group=self._largest_group(plan))
        if plan.floor is not None:
            floor = plan.floor
            cache.hold([blob for expert in manifest.expert_ids for blob in manifest.blobs(expert, floor)])
        serving = Serving(manifest, cache, plan, Ledger(self.ladder, self.options.max_loss))
        attach(model, [ServedLayer(at, math, serving) for at, math in enumerate(self._maths(model))])
        object.__setattr__(model, "comoe", Comoe(self.pack, serving, self.options.context, memory))
        return model

    def _largest_group(self, plan: Plan) -> int:
        """Memory of the largest expert's refinement: of the parts of the target that the floor does not hold."""
        held = FORM_PARTS[plan.floor] if plan.floor else ()
        parts = [part for part in FORM_PARTS[plan.target] if part not in held]
        return max(sum(align(layer.parts[part].nbytes, PAGE) for part in parts) for layer in self.pack.manifest.layers)


class WarmLayer:
    """Stands for a layer's experts while memory is measured: the largest chunk that one expert may have to compute.

    Without `maths` it only adds nothing; one layer's work is enough, since layers run one after the other.
    """

    def __init__(self, maths: SiteMath | None = None, loader: Loader | None = None) -> None:
        self._maths, self._loader = maths, loader

    def forward(self, module: nn.Module, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        if self._maths is not None and self._loader is not None:
            chunk = x[:CHUNK_TOKENS]
            waiting = torch.zeros((chunk.shape[0] * index.shape[1], x.shape[1]), dtype=x.dtype)
            for form in self._loader.pack.manifest.forms:
                blobs = [np.zeros(layout(self._maths.site, part).nbytes, np.uint8) for part in FORM_PARTS[form]]
                self._maths.run(form, blobs, chunk)
            del waiting
        return torch.zeros_like(x)
