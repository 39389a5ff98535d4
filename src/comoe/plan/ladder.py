"""The ladder as the planner sees it: what every rung costs in bytes and in quality, and how experts are used."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from comoe.store.layout import PAGE, align
from comoe.store.manifest import FORM_PARTS, LayerEntry, Manifest
from comoe.store.profile import Profile

Array = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]
Assignment = Sequence[Sequence[str]]

PRIOR_USES = 2
"""Of each expert, on average, as many uses as the pack's own shares count for beside those of a profile.

A short session has left most experts out by chance, not by nature. Shares are Dirichlet distributed around the pack's;
so many foretell both what it uses later and what it hits well: docs/decisions/012.
"""

LEAST_SHARE = 1e-4
"""Of a layer, what experts are taken to have had of the certified text where it gave them less: none had no part."""


class Band(NamedTuple):
    """A predicted quantity as an interval."""

    low: float
    high: float


@dataclass(frozen=True, slots=True, eq=False)
class Rung:
    """A form for every expert: the blobs that they need, and the certified loss with its interval.

    Of N experts and B blobs of the pack: `form` (N,) are indices into `forms`; `needs` (N, P) the blobs of each expert
    in order, -1 where it needs fewer; `sizes` (B + 1,) the memory that each blob takes, 0 for -1. `use` (N,) is as in
    the ladder. `errors[layer]` is the relative error of a layer's outputs; `loss` None where there is no certificate.
    """

    name: str
    forms: tuple[str, ...]
    form: Indices
    needs: Indices
    sizes: Indices
    use: Array
    loss: float | None
    loss_ci95: Band
    errors: tuple[float, ...]
    held: Flags = field(init=False)
    """Which blobs (B + 1,) are needed at all; the last one stands for none."""

    def __post_init__(self) -> None:
        held = np.zeros(len(self.sizes), np.bool_)
        held[self.needs.ravel()] = True
        object.__setattr__(self, "held", held)

    @property
    def nbytes(self) -> int:
        return int(self.sizes[self.held].sum())

    def beside(self, floor: "Rung | None") -> int:
        """Memory of the blobs that `floor` does not hold already."""
        held = self.held if floor is None else self.held & ~floor.held
        return int(self.sizes[held].sum())

    def groups_beside(self, floor: "Rung | None") -> Array:
        """Memory (N,) of each expert's blobs that `floor` does not hold."""
        sizes = self.sizes if floor is None else np.where(floor.held, 0, self.sizes)
        found: Array = sizes[self.needs].sum(1).astype(np.float64)
        return found

    def group_beside(self, floor: "Rung | None") -> int:
        """Memory of one expert's blobs that `floor` does not hold: of the largest."""
        return int(self.groups_beside(floor).max(initial=0))

    @property
    def shares(self) -> dict[str, float]:
        """Share of uses by form, coarse to exact."""
        return self.shares_over(None, 0.0)

    def shares_over(self, floor: "Rung | None", coarse: float) -> dict[str, float]:
        """Share of uses by form where `coarse` of those that are streamed beside `floor` take it."""
        moved = coarse * self.streamed_beside(floor)
        uses = np.bincount(self.form, self.use - moved, len(self.forms))
        if floor is not None:
            uses += np.bincount(floor.form, moved, len(self.forms))
        shares = uses / max(float(self.use.sum()), 1e-12)
        return {form: float(share) for form, share in zip(self.forms, shares, strict=True) if share > 0}

    def streamed_beside(self, floor: "Rung | None") -> Array:
        """Uses (N,) of the experts that are not whole in `floor`: 0 for the others, which never miss."""
        return np.where(self.groups_beside(floor) > 0, self.use, 0.0)

    @property
    def touched(self) -> dict[str, float]:
        """Bytes of weights that one token's experts take from memory, by form."""
        nbytes = np.bincount(self.form, self.use * self.groups_beside(None), len(self.forms))
        return {form: float(found) for form, found in zip(self.forms, nbytes, strict=True) if found}

    @property
    def price(self) -> float:
        """The loss to reckon with: the upper end of the certified interval. ValueError without a certificate."""
        if self.loss is None:
            raise ValueError(f"{self.name} has no certificate")
        return max(0.0, self.loss_ci95.high)

    @property
    def mean_error(self) -> float | None:
        """Mean over layers of the relative squared error of their outputs; None where nothing was calibrated."""
        if not self.errors:
            return None
        return sum(self.errors) / len(self.errors)

    def loss_rate(self, layer: int) -> float:
        """Price if only uses in `layer` took this form, times the number of layers: their mean is `price`.

        0 where the form has no certificate: only certification itself serves such a form.
        """
        if self.loss is None:
            return 0.0
        mean = sum(self.errors) / len(self.errors) if self.errors else 0.0
        return self.price * (self.errors[layer] / mean if mean else 1.0)


class Prices(NamedTuple):
    """What a use costs, by layer, in a plan's target and in its floor, as a fraction: 1 if all uses lost 100 %."""

    target: tuple[float, ...]
    floor: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Ladder:
    """Rungs from coarse to exact, and how experts are used: the forms, each for all experts, and the chain's steps.

    `use[layer]` (E,) is the expected number of uses of every expert per token, `calibrated[layer]` that of text such as
    losses were certified on, `mass[layer]` the shares of its gates; `gate_quantiles` as in the manifest.
    """

    rungs: tuple[Rung, ...]
    use: tuple[Array, ...]
    calibrated: tuple[Array, ...]
    mass: tuple[Array, ...]
    gate_quantiles: tuple[float, ...]
    expert_bytes_bf16: int

    @property
    def exact(self) -> Rung:
        return self.rungs[-1]

    @property
    def num_experts(self) -> int:
        return sum(len(layer) for layer in self.use)

    @property
    def certified(self) -> tuple[Rung, ...]:
        return tuple(rung for rung in self.rungs if rung.loss is not None)

    def within(self, max_loss: float) -> list[Rung]:
        """The certified rungs that lose no more: exact alone where nothing may be lost, whatever others measured."""
        return [rung for rung in self.certified if rung.price <= max_loss] if max_loss > 0 else [self.exact]

    def forms(self, max_loss: float) -> tuple[str, ...]:
        """The forms that a plan within `max_loss` may serve."""
        served = self.certified if max_loss > 0 else (self.exact,)
        used = {rung.forms[at] for rung in served for at in np.unique(rung.form)}
        return tuple(form for form in self.exact.forms if form in used)

    def prices(self, target: str, floor: str | None = None) -> Prices:
        """The prices of a plan, per gate: where all uses that may miss take the floor, the loss is the floor's.

        A floor may hold experts in the target's own form. Uses of those never take it, so the others bear its whole
        price: by their share of the gates when it was certified, whatever a session does.
        """
        wanted = self.rung(target)
        fine = tuple(wanted.loss_rate(layer) for layer in range(len(self.use)))
        if floor is None:
            return Prices(fine, fine)
        other = self.rung(floor)
        ends = np.cumsum([len(layer) for layer in self.use])[:-1]
        partial = np.split(wanted.groups_beside(other) > 0, ends)
        shares = [_share(layer, flags) for layer, flags in zip(self.mass, partial, strict=True)]
        coarse = (rate + (other.loss_rate(at) - rate) / shares[at] for at, rate in enumerate(fine))
        return Prices(fine, tuple(max(0.0, rate) for rate in coarse))

    def exposure(self, target: Rung, floor: Rung | None) -> float:
        """How often a session uses what is streamed beside `floor`, over how often the certified text did."""
        partial = target.groups_beside(floor) > 0
        certified = np.concatenate(self.calibrated)
        return _share(target.use, partial, 0.0) / _share(certified, partial)

    def using(self, use: Sequence[Array]) -> "Ladder":
        """The same ladder for a session that uses experts as in `use`, which is as in the ladder."""
        each = np.concatenate(use)
        return replace(self, rungs=tuple(replace(rung, use=each) for rung in self.rungs), use=tuple(use))

    def rung(self, name: str) -> Rung:
        """KeyError where the pack has no such form or step."""
        for rung in self.rungs:
            if rung.name == name:
                return rung
        raise KeyError(name)


def shares_of(values: Array, flags: Flags, least: float = LEAST_SHARE) -> Array:
    """Of all values (N,), the shares (P,) of those that each row of `flags` (P, N) has; 1 where it has none."""
    found: Array = np.maximum((flags @ values) / max(float(values.sum()), 1e-12), least)
    return np.where(flags.any(1), found, 1.0)


def _share(values: Array, flags: Flags, least: float = LEAST_SHARE) -> float:
    """Of all values (N,), the share of those that are flagged; 1 where none is."""
    return max(float(values[flags].sum()) / max(float(values.sum()), 1e-12), least) if flags.any() else 1.0


def ladder_of(manifest: Manifest, profile: Profile | None = None) -> Ladder:
    """The ladder of a pack, for text that uses experts like that of `profile`, by default like the pack's calibration.

    UsageError for the profile of another model.
    """
    calibrated = _uses_per_token(manifest, None)
    use = _uses_per_token(manifest, profile)
    blobs = _Blobs(manifest)
    steps = {step.name: step.certificate for step in manifest.chain}
    names = [*(form for form in manifest.forms if form not in steps and form != "exact"), *steps]
    rungs = []
    for name in names if "exact" in steps else [*names, "exact"]:
        assignment = manifest.assignment(name)
        certificate = steps.get(name)
        exact = name == "exact"
        rungs.append(
            Rung(
                name=name,
                forms=manifest.forms,
                form=np.array([manifest.forms.index(form) for layer in assignment for form in layer]),
                needs=blobs.needs(assignment),
                sizes=blobs.sizes,
                use=np.concatenate(use),
                loss=0.0 if exact else certificate.loss if certificate else None,
                loss_ci95=Band(*certificate.loss_ci95) if certificate and not exact else Band(0.0, 0.0),
                errors=_errors(manifest, assignment),
            )
        )
    mass = tuple(
        np.array(layer.mass) if layer.mass else used for layer, used in zip(manifest.layers, calibrated, strict=True)
    )
    return Ladder(tuple(rungs), use, calibrated, mass, manifest.gate_quantiles, manifest.expert_bytes_bf16)


class _Blobs:
    """All blobs of a pack by number: those of a part of a layer follow each other."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._first: dict[tuple[int, str], int] = {}
        sizes: list[int] = []
        for at, layer in enumerate(manifest.layers):
            for part, entry in layer.parts.items():
                self._first[at, part] = len(sizes)
                sizes += [align(entry.nbytes, PAGE)] * entry.rows
        self.sizes = np.array([*sizes, 0], np.int64)

    def needs(self, assignment: Assignment) -> Indices:
        """The blobs (N, P) of every expert."""
        width = max(map(len, FORM_PARTS.values()))
        found = np.full((sum(map(len, assignment)), width), -1, np.int64)
        experts = zip(self._manifest.expert_ids, (form for layer in assignment for form in layer), strict=True)
        for at, (expert, form) in enumerate(experts):
            for place, blob in enumerate(self._manifest.blobs(expert, form)):
                found[at, place] = self._first[blob.layer, blob.part] + blob.row
        return found


def _errors(manifest: Manifest, assignment: Assignment) -> tuple[float, ...]:
    """Error by layer, empty where nothing was measured. A layer that no text reached is taken as the mean."""
    found = [layer_error(layer, forms) for layer, forms in zip(manifest.layers, assignment, strict=True)]
    measured = [error for error in found if error is not None]
    if not measured:
        return ()
    return tuple(sum(measured) / len(measured) if error is None else error for error in found)


def layer_error(layer: LayerEntry, forms: Sequence[str]) -> float | None:
    """The relative squared error of a layer's outputs, its experts in `forms`; None where a form's was not measured."""
    if any(form not in layer.errors for form in {*forms} - {"exact"}):
        return None
    return sum(layer.errors[form][expert] for expert, form in enumerate(forms) if form != "exact")


def _uses_per_token(manifest: Manifest, profile: Profile | None) -> tuple[Array, ...]:
    """Uses per token by layer: the pack's, uniform where nothing was calibrated, moved by what `profile` saw."""
    shares = [np.array(layer.frequency or [1 / layer.num_experts] * layer.num_experts) for layer in manifest.layers]
    if profile is not None:
        profile.check_experts([layer.num_experts for layer in manifest.layers])
        uses = profile.uses()
        if uses is not None:
            pairs = zip(shares, profile.by_layer(uses), strict=True)
            shares = [PRIOR_USES * len(prior) * prior + seen for prior, seen in pairs]
    return tuple(layer / max(layer.sum(), 1e-12) * manifest.experts_per_token for layer in shares)
