"""What an edge node allows: how much at once, how large, how long. Values only."""

from dataclasses import dataclass

RETRY_AFTER_S = 1
"""What a refused client is told to wait."""

SLICE_BYTES = 512 << 10
"""A file is sent in pieces of this size: what one slow reader keeps in memory, twice."""

REQUEST_BYTES = 2 << 20
"""Memory that one request may take beside the cache: its body, or two slices, and what is computed with it."""

CONNECTION_BYTES = 64 << 10
"""Memory of a connection without a request: with TLS it was measured to be 54 KiB, else 7."""

FIXED_BYTES = 32 << 20
"""What the libraries may take beside what the process has when it starts."""


@dataclass(frozen=True, slots=True)
class Limits:
    """`requests`, `connections` and unfinished TLS `handshakes` at once; experts run in `threads`; times in seconds.

    `head_s` from a connection's first byte to the end of a request's head, `body_s` for a body, `stall_s` for a reader
    that takes nothing, `idle_s` between requests, `run_s` for an answer of experts, `drain_s` for what runs when the
    node is told to stop. `window_s` is how long experts wait for other devices' rows while another request runs.
    """

    requests: int = 64
    connections: int = 1024
    handshakes: int = 256
    threads: int = 1
    head_bytes: int = 16 << 10
    body_bytes: int = 1 << 20
    head_s: float = 10.0
    body_s: float = 10.0
    stall_s: float = 30.0
    idle_s: float = 75.0
    run_s: float = 10.0
    drain_s: float = 30.0
    window_s: float = 0.001

    @property
    def beside_bytes(self) -> int:
        """Memory to keep free beside the cache."""
        waiting = (self.connections + self.handshakes) * CONNECTION_BYTES
        return FIXED_BYTES + waiting + self.requests * REQUEST_BYTES
