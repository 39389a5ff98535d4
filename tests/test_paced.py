"""The paced source: the same bytes, and no sooner than they would come."""

import pytest
from sources import MemorySource, read

from comoe.store import paced
from comoe.store.paced import Paced
from comoe.types import BlobId


@pytest.mark.parametrize(("takes_s", "slept_s"), [(0.25, 0.75), (3.0, 0.0)])
def test_a_read_takes_as_long_as_said_or_as_it_does(
    monkeypatch: pytest.MonkeyPatch, takes_s: float, slept_s: float
) -> None:
    now_s, slept = [10.0], list[float]()
    monkeypatch.setattr(paced, "perf_counter", lambda: now_s[0])
    monkeypatch.setattr(paced, "sleep", slept.append)
    blob = BlobId(0, "exact", 3)

    class Slow(MemorySource):
        def read(self, blob: BlobId, into: memoryview) -> str:
            now_s[0] += takes_s
            return super().read(blob, into)

    pacing = Paced(Slow({blob: b"twelve bytes"}), lambda nbytes: nbytes / 12)
    assert (read(pacing, blob), pacing.nbytes(blob)) == (b"twelve bytes", 12)
    assert slept == [pytest.approx(slept_s)]
