"""What routers chose between two moments of a running model, from its counters."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from comoe.runtime.layer import Seen
from comoe.store.profile import PHASES, Profile, Routed

SESSION = "session"
"""What the domain of a served model's profile is called."""

Seens = Sequence[tuple[Seen, Seen]]
"""By layer: of prefill, and of decoding."""


def copied(seen: Seens) -> Seens:
    """Counters as they are now."""
    return [(_copy(prompt), _copy(answer)) for prompt, answer in seen]


def nothing(seen: Seens) -> Seens:
    """Counters of the same model that have counted nothing."""
    return [(_zero(prompt), _zero(answer)) for prompt, answer in seen]


def _zero(seen: Seen) -> Seen:
    return Seen([0] * len(seen.uses), [0.0] * len(seen.gates))


def _copy(seen: Seen) -> Seen:
    return Seen([*seen.uses], [*seen.gates], seen.tokens)


def mean_tokens(seen: Seens) -> float:
    """Tokens that came to a layer, on average: encoders and decoders see different ones."""
    return sum(phase.tokens for layer in seen for phase in layer) / len(seen)


def uses_between(before: Seens, after: Seens) -> npt.NDArray[np.float64]:
    """Uses (N,) of all experts, of both phases, since `before`."""
    uses = [np.array([phase.uses for phase in layer], np.float64).sum(0) for layer in after]
    earlier = [np.array([phase.uses for phase in layer], np.float64).sum(0) for layer in before]
    found: npt.NDArray[np.float64] = np.concatenate(uses) - np.concatenate(earlier)
    return found


def profile_between(before: Seens, after: Seens) -> Profile:
    """What routers chose since `before`, by phase; the domain is `SESSION`."""
    routed = {}
    for at, phase in enumerate(PHASES):
        pairs = [(old[at], new[at]) for old, new in zip(before, after, strict=True)]
        tokens = np.array([new.tokens - old.tokens for old, new in pairs])
        if tokens.any():
            uses = np.concatenate([np.subtract(new.uses, old.uses) for old, new in pairs])
            gates = np.concatenate([np.subtract(new.gates, old.gates) for old, new in pairs])
            routed[SESSION, phase] = Routed(tokens, uses, gates)
    return Profile(tuple(len(layer[0].uses) for layer in after), routed)
