"""What to make of a checkpoint, and the report of what was made."""

from dataclasses import dataclass

from comoe.defaults import CALIBRATION_TOKENS, FORMS, SEED
from comoe.make.calibrate import Text
from comoe.make.shared import AS_MEASURED, SHARING, Sharing

CALIBRATED_FORMS = {"dropped", *SHARING}
"""Forms that say nothing without calibration text."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """What to make. Without `texts` nothing is calibrated: no shared experts, plain rounding, no chain.

    `pruned`: forms that no step of the chain uses are left out. `shared` says whether the chain may let experts share
    blobs; None: whichever loses less, measured. `heal` is for how many steps scales are trained end to end, 0: not at
    all. The rest is there to be left out by who compares: without `compensated` weights are rounded to nearest, without
    `certified` no step has a certificate.
    """

    forms: tuple[str, ...] = FORMS
    texts: tuple[Text, ...] = ()
    num_tokens: int = CALIBRATION_TOKENS
    self_contained: bool = False
    seed: int = SEED
    threads: int | None = None
    pruned: bool = True
    sharing: Sharing = AS_MEASURED
    shared: bool | None = None
    compensated: bool = True
    certified: bool = True
    heal: int = 0


@dataclass(frozen=True, slots=True)
class Report:
    """What was made, and what it took; the keys of the contract."""

    model_type: str
    layers: int
    experts_per_layer: int
    expert_bytes_bf16: int
    pack_bytes: int
    forms: tuple[str, ...]
    seconds: float
    estimated_seconds: float
    peak_bytes: int
