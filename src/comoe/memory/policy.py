"""Who leaves first: a policy is only bookkeeping. Bytes, pins and reads are `memory.residency`'s."""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from math import inf, log2
from typing import Protocol

from comoe.memory.ranking import Ranking
from comoe.types import BlobId

HALF_LIFE_PER_BLOB = 1.5
"""Uses after which one counts half, for each blob that was ever used: measured, see decisions/013."""


MARGIN = 3.0
"""What was used elsewhere is worth reading if it was used so many doublings more than what would leave. See
docs/decisions/021."""


class Policy(Protocol):
    """Order of eviction of the blobs that may leave."""

    def inserted(self, blob: BlobId, nbytes: int) -> None:
        """`blob` came in. If for a use, that is told as any other."""
        ...

    def touched(self, blob: BlobId) -> None:
        """`blob` was used."""
        ...

    def removed(self, blob: BlobId) -> None:
        """`blob` went."""
        ...

    def victims(self) -> Iterator[BlobId]:
        """Blobs in the order in which they should leave. The caller skips those that may not, and stops early."""
        ...

    def used_elsewhere(self, blob: BlobId) -> bool:
        """`blob`, which is not there, was used without it; whether it is worth more than what would leave first."""
        ...

    def age(self, half_lives: float) -> None:
        """What was learnt until now counts less from now on, where a policy forgets by half-lives."""
        ...


class LRU:
    """Least recently used first."""

    def __init__(self) -> None:
        self._order: OrderedDict[BlobId, None] = OrderedDict()

    def inserted(self, blob: BlobId, nbytes: int) -> None:
        self._order[blob] = None

    def touched(self, blob: BlobId) -> None:
        self._order.move_to_end(blob)

    def removed(self, blob: BlobId) -> None:
        del self._order[blob]

    def victims(self) -> Iterator[BlobId]:
        return iter(self._order)

    def used_elsewhere(self, blob: BlobId) -> bool:
        """What was used last is worth most."""
        return True

    def age(self, half_lives: float) -> None:
        """Nothing: it forgets as it goes."""


class LFU:
    """Least frequently used first, with ageing: a use counts half after `half_life` further uses of any blob.

    None: the more blobs were ever used, the more. Blobs that left are remembered: there are no more than a pack holds.
    """

    def __init__(self, half_life: float | None = None) -> None:
        self._half_life, self._now = half_life, 0.0
        self._ranks: dict[BlobId, float] = {}
        self._order = Ranking()

    def inserted(self, blob: BlobId, nbytes: int) -> None:
        self._order.put(blob, self._ranks.get(blob, -inf))

    def touched(self, blob: BlobId) -> None:
        self._order.put(blob, self._counted(blob))

    def removed(self, blob: BlobId) -> None:
        self._order.remove(blob)

    def victims(self) -> Iterator[BlobId]:
        return self._order.ascending()

    def used_elsewhere(self, blob: BlobId) -> bool:
        """Whether it was used more by `MARGIN`: else it would likely leave unused (after TinyLFU: Einziger, 2017)."""
        rank = self._counted(blob)
        least = next(self._order.ascending(), None)
        return least is None or rank > self._ranks.get(least, -inf) + MARGIN

    def age(self, half_lives: float) -> None:
        self._now += half_lives

    def _counted(self, blob: BlobId) -> float:
        """The rank of a blob with one use more.

        All scores decay alike, so their order stays: a rank is the logarithm of what a score is worth at time 0. Time
        is counted in half-lives.
        """
        before = self._ranks.setdefault(blob, -inf)
        self._now += 1 / (self._half_life or HALF_LIFE_PER_BLOB * len(self._ranks))
        self._ranks[blob] = rank = self._now + log2(1 + 2 ** (before - self._now))
        return rank


def read_seconds(latency_s: float, bps: float) -> Callable[[int], float]:
    """Seconds to read so many bytes from a tier."""
    return lambda nbytes: latency_s + nbytes / bps


FLASH = read_seconds(1e-4, 1e9)
"""Of a middling drive, where nobody measured: only how cost grows with size matters."""


class GDSF:
    """GreedyDual-Size-Frequency (Cherkasova, 1998): least first of uses x cost / size, above what left last.

    `cost` is seconds to read so many bytes. Uses are those since the blob came in.
    """

    def __init__(self, cost: Callable[[int], float] = FLASH) -> None:
        self._cost, self._age = cost, 0.0
        self._worth: dict[BlobId, float] = {}
        self._uses: dict[BlobId, int] = {}
        self._order = Ranking()

    def inserted(self, blob: BlobId, nbytes: int) -> None:
        self._worth[blob], self._uses[blob] = self._cost(nbytes) / max(nbytes, 1), 0
        self._order.put(blob, self._age)

    def touched(self, blob: BlobId) -> None:
        self._uses[blob] += 1
        self._order.put(blob, self._age + self._uses[blob] * self._worth[blob])

    def removed(self, blob: BlobId) -> None:
        self._age = max(self._age, self._order.remove(blob))
        del self._worth[blob], self._uses[blob]

    def victims(self) -> Iterator[BlobId]:
        return self._order.ascending()

    def used_elsewhere(self, blob: BlobId) -> bool:
        """What comes in is worth more than what left."""
        return True

    def age(self, half_lives: float) -> None:
        """Nothing: it forgets as it goes."""


class Fixed:
    """Of least `worth` first, whatever is used: what a plan pins stays."""

    def __init__(self, worth: Callable[[BlobId], float]) -> None:
        self._worth, self._order = worth, Ranking()

    def inserted(self, blob: BlobId, nbytes: int) -> None:
        self._order.put(blob, self._worth(blob))

    def touched(self, blob: BlobId) -> None:
        """Nothing: a use teaches nothing."""

    def removed(self, blob: BlobId) -> None:
        self._order.remove(blob)

    def victims(self) -> Iterator[BlobId]:
        return self._order.ascending()

    def used_elsewhere(self, blob: BlobId) -> bool:
        least = next(self._order.ascending(), None)
        return least is None or self._worth(blob) > self._worth(least)

    def age(self, half_lives: float) -> None:
        """Nothing: there is nothing that it learnt."""


POLICIES: Mapping[str, Callable[[], Policy]] = {"lru": LRU, "lfu": LFU, "gdsf": GDSF}
"""By the name that a setting has."""
