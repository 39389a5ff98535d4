"""Where blobs' bytes come from: the seam that files, memory, HTTP and S3 implement."""

from typing import Protocol

from comoe.types import BlobId


class Source(Protocol):
    """Reads whole blobs.

    `read` is called from I/O threads, one call at a time per thread, and must release the GIL while it waits.
    """

    def nbytes(self, blob: BlobId) -> int:
        """Length of the blob's bytes, without padding. KeyError where there is no such blob."""
        ...

    def read(self, blob: BlobId, into: memoryview) -> str:
        """Fill the first `nbytes(blob)` bytes of `into`, a page-aligned writable buffer; where they came from.

        That is a tier, by which statistics are kept: `flash`, `edge` or `origin`.

        `into` is at least `nbytes` rounded up to 4096 long; the rest may be overwritten. Raises CorruptBlob where
        the bytes are not those that the pack recorded, SourceMissing or SourceChanged where the checkpoint moved,
        RemoteUnavailable where no node answers.
        """
        ...


class Through:
    """A source's sizes, for one that reads through another."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def nbytes(self, blob: BlobId) -> int:
        return self._source.nbytes(blob)
