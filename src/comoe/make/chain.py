"""The chain of a pack, from the errors that its layers measured; and which forms are worth their place in it."""

from collections.abc import Callable, Mapping, Sequence

import msgspec
import numpy as np

from comoe.make.shared import SHARING
from comoe.plan.chain import Candidate, Choices, sweep
from comoe.plan.ladder import Array, Indices, ladder_of
from comoe.store.manifest import DIGITS, FORM_PARTS, SHARED_PARTS, Certificate, ChainStep, Manifest

SHARES = (
    *(0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.08, 0.09, 0.1, 0.11, 0.12, 0.14),
    *(0.16, 0.18, 0.2, 0.22, 0.25, 0.28, 0.3, 0.35, 0.4, 0.45, 0.55),
)
"""Of the experts' bytes as bf16, the sizes of the steps below exact; two steps may turn out the same."""

PROBED = (0.04, 0.06, 0.08, 0.11, 0.16, 0.25)
"""Sizes at which steps with and without shared experts are compared."""

WORTH = 0.9
"""Shared experts must lose less than this times what steps without them do: below lies noise."""

Certify = Callable[[Manifest], Mapping[str, Certificate]]


def chain(manifest: Manifest, shared_up_to: float, shares: Sequence[float] = SHARES) -> tuple[ChainStep, ...]:
    """Steps without certificates, coarse to exact; none where no form's error was measured.

    Experts share blobs in steps of at most `shared_up_to` of the experts' bytes.
    """
    choices = choices_of(manifest)
    if choices is None:
        return ()
    whole = manifest.expert_bytes_bf16
    steps: dict[str, ChainStep] = {}
    for assignment in sweep(choices, [int(share * whole) for share in shares], shared_up_to * whole):
        name = f"{100 * choices.nbytes(assignment) / whole:.3g}%"
        forms = [manifest.forms.index(choices.candidates[at].form) for at in assignment]
        steps[name] = _step(manifest, name, forms)
    exact = _step(manifest, "exact", [manifest.forms.index("exact")] * len(manifest.expert_ids))
    return (*steps.values(), exact)


def choices_of(manifest: Manifest) -> Choices | None:
    """What every expert of a pack may become, and what that costs; None where no error was measured.

    An expert that is a cluster by itself has nothing to share.
    """
    measured = [layer for layer in manifest.layers if layer.errors]
    if not measured:
        return None
    forms = [form for form in manifest.forms if form == "exact" or all(form in layer.errors for layer in measured)]
    cluster, sizes = _clusters(manifest)
    alone = np.bincount(cluster)[cluster] == 1 if len(cluster) else False
    candidates = []
    for form in forms:
        errors = np.where(alone, np.inf, _errors(manifest, form)) if form in SHARING else _errors(manifest, form)
        shared = next((part for part in FORM_PARTS[form] if part in SHARED_PARTS), None)
        candidates.append(Candidate(form, errors, _bytes(manifest, form), shared))
    return Choices(tuple(candidates), cluster, sizes)


def with_chain(manifest: Manifest, certify: Certify | None, *, shared: bool | None, pruned: bool) -> Manifest:
    """`manifest` with its chain, certified; see `chosen` and `certified`."""
    return certified(chosen(manifest, certify, shared=shared, pruned=pruned), certify)


def chosen(manifest: Manifest, certify: Certify | None, *, shared: bool | None, pruned: bool) -> Manifest:
    """`manifest` with its chain; `certify` answers the certificates of a manifest's steps, but they are not kept.

    `shared` is whether experts may share blobs; None: if that loses less, measured. `pruned`: without unused forms.
    """
    if shared is None:
        up_to = _shared_up_to(manifest, certify) if certify is not None else 0.0
    else:
        up_to = np.inf if shared else 0.0
    manifest = msgspec.structs.replace(manifest, chain=chain(manifest, up_to))
    if pruned and manifest.chain:
        manifest = restricted(manifest, used_forms(manifest.chain, manifest.forms))
    return manifest


def certified(manifest: Manifest, certify: Certify | None) -> Manifest:
    """`manifest` with the certificates of its chain's steps."""
    if certify is None or not manifest.chain:
        return manifest
    found = certify(manifest)
    steps = tuple(msgspec.structs.replace(step, certificate=found.get(step.name)) for step in manifest.chain)
    return msgspec.structs.replace(manifest, chain=steps)


def _shared_up_to(manifest: Manifest, certify: Certify) -> float:
    """Up to which share of the experts' bytes a step loses less where experts share blobs: infinite for all.

    Local errors do not tell: that of an average looks small and is not. So steps of a few sizes are certified.
    """
    if not {*SHARING} & {*manifest.forms} or choices_of(manifest) is None:
        return 0.0
    losses = [_probed(manifest, up_to, certify) for up_to in (np.inf, 0.0)]
    won = [size for size in PROBED if losses[0].get(size, np.inf) < WORTH * losses[1].get(size, np.inf)]
    if not won:
        return 0.0
    following = [size for size in PROBED if size > max(won)]
    return float(np.sqrt(max(won) * following[0])) if following else np.inf


def _probed(manifest: Manifest, up_to: float, certify: Certify) -> dict[float, float]:
    """The loss of the step at every probed size."""
    steps = chain(manifest, up_to, PROBED)
    found = certify(msgspec.structs.replace(manifest, chain=steps))
    manifest = msgspec.structs.replace(manifest, chain=steps)
    sizes = {name: manifest.form_bytes(name) / manifest.expert_bytes_bf16 for name in found}
    within = {size: [name for name, share in sizes.items() if share <= size] for size in PROBED}
    return {size: found[max(names, key=sizes.__getitem__)].loss for size, names in within.items() if names}


def used_forms(steps: Sequence[ChainStep], forms: Sequence[str]) -> tuple[str, ...]:
    """Of `forms`, to which the steps' digits refer, those that any expert takes in any step."""
    digits = {digit for step in steps for layer in step.assignment for digit in layer}
    return tuple(form for digit, form in zip(DIGITS, forms, strict=False) if digit in digits)


def restricted(manifest: Manifest, forms: Sequence[str]) -> Manifest:
    """`manifest` with no forms but `forms`, and no parts but theirs; its steps refer to the fewer forms."""
    parts = {part for form in forms for part in FORM_PARTS[form]}
    layers = tuple(
        msgspec.structs.replace(
            layer,
            parts={part: entry for part, entry in layer.parts.items() if part in parts},
            errors={form: found for form, found in layer.errors.items() if form in forms},
            clusters=layer.clusters if parts & {*SHARED_PARTS} else (),
        )
        for layer in manifest.layers
    )
    digit = {DIGITS[manifest.forms.index(form)]: DIGITS[at] for at, form in enumerate(forms)}
    steps = tuple(
        msgspec.structs.replace(
            step, assignment=tuple("".join(digit[old] for old in layer) for layer in step.assignment)
        )
        for step in manifest.chain
    )
    return msgspec.structs.replace(manifest, forms=tuple(forms), layers=layers, chain=steps)


def _step(manifest: Manifest, name: str, forms: Sequence[int]) -> ChainStep:
    ends = np.cumsum([layer.num_experts for layer in manifest.layers])[:-1]
    digits = tuple("".join(DIGITS[at] for at in layer) for layer in np.split(np.array(forms), ends))
    step = ChainStep(name, digits, 0)
    found = ladder_of(msgspec.structs.replace(manifest, chain=(step,))).rung(name)
    return msgspec.structs.replace(step, resident_bytes=found.nbytes)


def _errors(manifest: Manifest, form: str) -> Array:
    """Error (N,) that each expert adds in `form`. Experts of a layer that no text reached add alike, the mean."""
    if form == "exact":
        return np.zeros(len(manifest.expert_ids))
    mean = float(np.mean([sum(layer.errors[form]) for layer in manifest.layers if layer.errors]))
    layers = (layer.errors.get(form, (mean / layer.num_experts,) * layer.num_experts) for layer in manifest.layers)
    return np.concatenate([np.array(layer) for layer in layers])


def _bytes(manifest: Manifest, form: str) -> Array:
    """Bytes (N,) of each expert's own blobs in `form`."""
    own = [part for part in FORM_PARTS[form] if part not in SHARED_PARTS]
    layers = ([float(sum(layer.parts[part].nbytes for part in own))] * layer.num_experts for layer in manifest.layers)
    return np.concatenate([np.array(layer) for layer in layers])


def _clusters(manifest: Manifest) -> tuple[Indices, dict[str, Array]]:
    """The cluster (N,) of every expert, numbered through all layers, and the bytes (C,) of its blob of every part."""
    numbers: list[int] = []
    sizes: dict[str, list[float]] = {part: [] for part in SHARED_PARTS if part in manifest.layers[0].parts}
    first = 0
    for layer in manifest.layers:
        numbers += [first + cluster for cluster in layer.clusters]
        for part, found in sizes.items():
            found += [float(layer.parts[part].nbytes)] * layer.parts[part].rows
        first += max(layer.clusters, default=-1) + 1
    return np.array(numbers, np.int64), {part: np.array(found) for part, found in sizes.items()}
