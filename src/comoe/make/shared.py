"""What experts of a layer share: clusters by output, one distilled expert for each, and deltas of its members.

A merged expert is quantised as q4; a residual form adds what its member lacks, in two bits, compensated on what the
member sees.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor

from comoe.forms.distil import Lessons, refit_down, train
from comoe.forms.lowbit import quantise_low
from comoe.forms.lowrank import factorise
from comoe.forms.merge import align, clusters, dendrogram, merge, output_distances
from comoe.forms.quantise import quantise
from comoe.make.study import DOWN, Errors, Layer, Study, arrays, blob_bytes, grams, hidden, oriented
from comoe.runtime.experts import SiteMath
from comoe.runtime.hook import expert_forward
from comoe.store.layout import quantised, rank
from comoe.store.manifest import FORM_PARTS, PartEntry

SHARING = ("merged", "lowrank", "residual")
"""Forms that need a cluster's expert."""

EXPERTS_PER_CLUSTER = 16
PROBE_TOKENS = 64
LESSON_TOKENS = 4096
"""Of what the members of a cluster see, how much its expert is taught on."""


@dataclass(frozen=True, slots=True)
class Sharing:
    """How shared experts are made: steps of training for each, 0 for no distillation; hidden units aligned or not."""

    distil_steps: int = 100
    aligned: bool = True


AS_MEASURED = Sharing()
"""Teaching helps some models where almost nothing is kept, and hurts others: docs/analysis.md."""


class Shared:
    """The clusters of one layer, whose inputs were recorded."""

    def __init__(self, layer: Layer, how: Sharing) -> None:
        self._layer, self._how = layer, how
        self._units = layer.units if how.aligned else None
        self.tree = dendrogram(output_distances(self._outputs()))
        self.clusters = clusters(self.tree, max(1, layer.site.num_experts // EXPERTS_PER_CLUSTER))

    def parts(self, forms: Sequence[str], errors: Errors) -> dict[str, PartEntry]:
        """Write what the clusters of `forms` need, and deltas; measure all of them."""
        wanted = [form for form in DELTAS if form in forms]
        names = ["merged"] * ("merged" in forms) + ["base"] * bool(wanted)
        blobs = [self.cluster_blobs(self._members(cluster), names) for cluster in range(max(self.clusters) + 1)]
        parts = {name: self._written(name, [found[name] for found in blobs]) for name in names}
        writers = {form: self._layer.writer(FORM_PARTS[form][-1], self._layer.site.num_experts) for form in wanted}
        for index, cluster in enumerate(self.clusters):
            study = self._layer.study(index)
            if "merged" in forms:
                errors.add(study, "merged", [blobs[cluster]["merged"]])
            for form, delta in self.deltas(study, blobs[cluster]["base"], wanted) if wanted else ():
                writers[form].add(delta)
                errors.add(study, form, [blobs[cluster]["base"], delta])
        for form, writer in writers.items():
            part = FORM_PARTS[form][-1]
            parts[part] = self._layer.entry(part, writer.commit())
        return parts

    def cluster_blobs(self, members: Sequence[Study], names: Sequence[str]) -> dict[str, bytes]:
        """What the `members` of a cluster share, by part: their average taught to put out what they do is `merged`.

        The `base` is the plain average, from which deltas are small: teaching leads away from all members.
        """
        weights, lessons = self._weights(members), self._lessons(members)
        made = dict.fromkeys(names, weights)
        if "merged" in made and len(lessons.x) and self._how.distil_steps:
            made["merged"] = self._taught(weights, lessons)
        return {name: self._stored(name, members, found, lessons) for name, found in made.items()}

    def deltas(self, study: Study, base: bytes, forms: Sequence[str]) -> Iterator[tuple[str, bytes]]:
        """What a member adds to its cluster's `base`, by form."""
        lacking = self._lacking(study, base)
        return ((form, DELTAS[form](lacking)) for form in forms)

    def _written(self, part: str, blobs: Sequence[bytes]) -> PartEntry:
        writer = self._layer.writer(part, len(blobs))
        for blob in blobs:
            writer.add(blob)
        return self._layer.entry(part, writer.commit())

    def _members(self, cluster: int) -> list[Study]:
        return [self._layer.study(index) for index, found in enumerate(self.clusters) if found == cluster]

    def _outputs(self) -> Tensor:
        """What all experts (E, S, H) put out on the same few inputs: some of those that they saw, noise for none."""
        layer = self._layer
        assert layer.inputs is not None
        seen = layer.inputs.x
        probe = seen[:: max(1, len(seen) // PROBE_TOKENS)][:PROBE_TOKENS]
        if not len(seen):
            width = next(leaf.cols for leaf in layer.site.leaves if leaf.is_matrix)
            probe = torch.randn(PROBE_TOKENS, width, generator=torch.Generator().manual_seed(0))
        experts = range(layer.site.num_experts)
        return torch.stack([layer.run(probe, layer.checkpoint.expert(layer.index, index)) for index in experts])

    @cached_property
    def _masses(self) -> list[float]:
        assert self._layer.inputs is not None
        return self._layer.inputs.mass(self._layer.site.num_experts)

    def _weights(self, members: Sequence[Study]) -> dict[str, Tensor]:
        return merge([m.tensors for m in members], [self._masses[m.index] for m in members], self._units)

    def _stored(self, part: str, members: Sequence[Study], weights: dict[str, Tensor], lessons: Lessons) -> bytes:
        found = grams(self._layer, lessons.x, weights, lessons.gate) if len(lessons.x) else {}
        stored = {name: tensor.to(members[0].tensors[name].dtype) for name, tensor in weights.items()}
        return Study(self._layer, members[0].index, stored, found).blob(part, quantise)

    def _lessons(self, members: Sequence[Study]) -> Lessons:
        """What the members see, as much of each as its share of all, and put out."""
        total = sum(len(member.seen[0]) for member in members)
        keep = max(1, -(-total // LESSON_TOKENS))
        taught = [member for member in members if len(member.seen[0])]
        if not taught:
            return Lessons(torch.empty(0, 0), torch.empty(0, 0), torch.empty(0))
        inputs = [member.seen[0][::keep] for member in taught]
        outputs = [self._layer.run(x, member.tensors) for x, member in zip(inputs, taught, strict=True)]
        gates = [member.seen[1][::keep] for member in taught]
        return Lessons(torch.cat(inputs), torch.cat(outputs), torch.cat(gates))

    def _taught(self, weights: dict[str, Tensor], lessons: Lessons) -> dict[str, Tensor]:
        """`weights` refitted, trained and refitted again, or what of that is best."""
        forward = partial(expert_forward, self._layer.module)
        refitted = self._refitted(weights, lessons)
        trained = self._refitted(train(refitted, forward, lessons, self._how.distil_steps), lessons)
        return min((weights, refitted, trained), key=lambda tried: lessons.error(forward(lessons.x, tried)))

    def _refitted(self, weights: dict[str, Tensor], lessons: Lessons) -> dict[str, Tensor]:
        down = next((leaf for leaf in self._layer.site.leaves if leaf.name in DOWN and leaf.is_matrix), None)
        found = hidden(self._layer, lessons.x, weights, down) if down is not None else None
        if down is None or found is None or f"{down.name}_bias" in weights:
            return weights
        fitted = refit_down(found, lessons)
        return {**weights, down.name: fitted.t().contiguous() if down.transposed else fitted}

    def _lacking(self, study: Study, base: bytes) -> Study:
        """What a member adds to its cluster's expert, its hidden units in the order of that one's."""
        layer = self._layer
        maths = SiteMath(layer.module, layer.site, torch.float32)
        shared = maths.tensors("merged", arrays([base]))
        own = {name: tensor.float() for name, tensor in study.tensors.items()}
        aligned = align(shared, own, self._units) if self._units is not None else own
        of_leaf = {leaf.name: leaf for leaf in layer.site.leaves}
        delta = {
            name: tensor - shared[name] if quantised(of_leaf[name]) else study.tensors[name]
            for name, tensor in aligned.items()
        }
        seen = Study(layer, study.index, aligned).grams
        return Study(layer, study.index, delta, seen)


def _low_bits(lacking: Study) -> bytes:
    return lacking.blob("delta", partial(quantise_low, bits=2))


def _factors(lacking: Study) -> bytes:
    """A delta as products of low rank, the error of its outputs the least."""
    site = lacking.layer.site
    fields = {(leaf.name, "exact"): lacking.tensors[leaf.name] for leaf in site.leaves if not quantised(leaf)}
    for leaf in site.leaves:
        if quantised(leaf):
            found = factorise(oriented(leaf, lacking.tensors[leaf.name]), rank(leaf), lacking.grams.get(leaf.name))
            fields |= {(leaf.name, "inner"): found.inner, (leaf.name, "out"): found.out}
    return blob_bytes(site, "factors", fields)


DELTAS: dict[str, Callable[[Study], bytes]] = {"lowrank": _factors, "residual": _low_bits}
"""How what an expert lacks is written, by form."""
