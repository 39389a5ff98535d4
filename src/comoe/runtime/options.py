"""How a pack is served beyond its budget, as one noun. What becomes of it is `runtime.load`'s."""

from dataclasses import dataclass

from comoe.defaults import CONTEXT, POLICY, PREFETCH, ROUTING_BIAS
from comoe.memory.policy import POLICIES
from comoe.memory.prefetch import PREFETCHES
from comoe.net.remote_run import Node
from comoe.store.decisions import Decisions
from comoe.store.profile import Profile
from comoe.types import UsageError


@dataclass(frozen=True, slots=True)
class Options:
    """How to serve a pack, beyond its budget.

    `max_loss` is a fraction; `context` the longest prompt and answer together, in tokens; `dtype` the compute dtype,
    by default the checkpoint's; `profile` tells how the text to come uses experts, by default as the pack's own did;
    `policy` says which experts leave the cache first; `prefetch` whether the next layer's are read ahead: `auto`, while
    that is measured to save time, `on` or `off`.

    `live` lets the model follow its device and its text; `deterministic` makes outputs depend on neither; `log` keeps
    the choices that outputs depend on, `replay` takes them from a log. `routing_bias` is what decoding adds to the
    logits of experts in memory, 0 for nothing. `edges` are nodes that send and run experts, `link` what is taken from
    them at most: bytes per second, seconds of round trip.
    """

    max_loss: float = 0.0
    context: int = CONTEXT
    dtype: str | None = None
    threads: int | None = None
    profile: Profile | None = None
    policy: str = POLICY
    prefetch: str = PREFETCH
    live: bool = False
    deterministic: bool = False
    log: bool = False
    replay: Decisions | None = None
    routing_bias: float = ROUTING_BIAS
    edges: tuple[Node, ...] = ()
    link: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.max_loss < float("inf"):
            raise UsageError(f"a loss of {self.max_loss} is no bound: give a fraction such as 0.02, or 0 for exact.")
        if self.context < 1 or (self.threads is not None and self.threads < 1):
            raise UsageError("context and threads must be at least 1.")
        if self.policy not in POLICIES:
            raise UsageError(f"there is no policy {self.policy!r}: choose from {', '.join(POLICIES)}.")
        if self.prefetch not in PREFETCHES:
            raise UsageError(f"prefetch cannot be {self.prefetch!r}: choose from {', '.join(PREFETCHES)}.")
        if self.deterministic and self.replay is not None:
            raise UsageError("a log is replayed as it was written: leave out --deterministic.")
        self._check_bias()

    def _check_bias(self) -> None:
        if not 0 <= self.routing_bias < float("inf"):
            raise UsageError(f"a routing bias of {self.routing_bias} is none: give logits such as 1, or 0 for none.")
        if self.routing_bias and not self.max_loss:
            raise UsageError("a routing bias loses quality: bound it by --max-loss, or leave it out.")
        if self.routing_bias and (self.deterministic or self.log or self.replay is not None):
            raise UsageError(
                "a routing bias follows what is cached: leave it out with --deterministic, --decisions or --replay."
            )
