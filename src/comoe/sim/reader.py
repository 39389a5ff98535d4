"""What reads blobs on a virtual clock: one read in flight, which goes on while experts compute.

What is read, and when, is `memory.residency`'s to say; whether bytes move at all is the owner's.
"""

from collections.abc import Callable
from typing import NamedTuple

from comoe.memory.residency import Residency
from comoe.types import BlobId


class Times(NamedTuple):
    """Seconds of a device: to read so many bytes, one read at a time; to use an expert; of a token outside experts.

    A read takes `wake_s` more until who waits for it goes on; foretelling what a layer uses takes `ahead_s`.
    """

    read_s: Callable[[int], float] = lambda nbytes: 0.0
    use_s: float = 0.0
    token_s: float = 0.0
    wake_s: float = 0.0
    ahead_s: float = 0.0

    def load_s(self, nbytes: int) -> float:
        """Of a read, from one to the next."""
        return self.read_s(nbytes) + self.wake_s


class Reader:
    """Reads what `residency` asks for, `load_s` seconds for so many bytes; `read` is told of each when it ends."""

    def __init__(
        self,
        residency: Residency,
        nbytes: Callable[[BlobId], int],
        load_s: Callable[[int], float],
        read: Callable[[BlobId], None] = lambda blob: None,
    ) -> None:
        self._residency, self._nbytes, self._load_s, self._read = residency, nbytes, load_s, read
        self._reading: tuple[BlobId, float] | None = None
        self.now_s = 0.0
        self.bytes_read = 0

    def begin(self) -> None:
        """Begin what is to be read, if nothing is being read."""
        if self._reading is None and (blob := self._residency.next_load()) is not None:
            self._reading = blob, self.now_s + self._load_s(self._nbytes(blob))

    def end(self) -> None:
        """Wait for the read in flight to end; the next begins at once."""
        assert self._reading is not None, "nothing is read that could be waited for"
        blob, self.now_s = self._reading
        self._reading = None
        self.bytes_read += self._nbytes(blob)
        self._read(blob)
        self._residency.loaded(blob)
        self.begin()

    def advance(self, seconds: float) -> None:
        """Compute for so long; reads that end meanwhile have ended, and the next have begun."""
        end_s = self.now_s + seconds
        while self._reading is not None and self._reading[1] <= end_s:
            self.end()
        self.now_s = end_s
