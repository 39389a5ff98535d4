"""What a batch of remote runs computes: each expert once, for the rows of all devices that ask for it. No torch."""

from collections.abc import Sequence
from functools import cache
from time import perf_counter
from typing import NamedTuple

import numpy as np

from comoe.forms.plain import Bytes, Floats, PlainMath, is_plain
from comoe.net.wire import IDENTITY_BYTES, RunRequest
from comoe.serve.metrics import Metrics
from comoe.serve.shelf import Served, Shelf
from comoe.types import BlobId, ExpertId, HostileMessage

MAX_ROWS = 32
"""Rows that the kernel computes at once: more gain nothing, and its scratch stays small."""


class Key(NamedTuple):
    """What runs together: one layer of one pack, by the same arithmetic."""

    pack: str
    layer: int
    activation: str
    gated: bool


class Place(NamedTuple):
    """Use `use` of request `request` of a batch."""

    request: int
    use: int


class ExpertRuns:
    """Runs experts of the packs of `shelf`. Calls may come from several threads."""

    def __init__(self, shelf: Shelf, metrics: Metrics) -> None:
        self._shelf, self._metrics = shelf, metrics
        self._maths = cache(self._math)
        self._fetched: set[tuple[BlobId, ...]] = set()

    def check(self, key: Key, request: RunRequest) -> None:
        """Raise HostileMessage where a request asks for what the pack has not."""
        manifest = self._shelf.packs[key.pack].pack.manifest
        if request.layer >= len(manifest.layers):
            raise HostileMessage(f"the pack has {len(manifest.layers)} layers with experts.")
        site = manifest.site(request.layer)
        if not is_plain(site, request.gated):
            raise HostileMessage("experts of this layer are not two linears with such an activation.")
        if request.x.shape[1] != site.leaves[0].cols:
            raise HostileMessage(f"experts of this layer take {site.leaves[0].cols} numbers.")
        if int(request.uses.expert.max()) >= site.num_experts or int(request.uses.form.max()) >= len(manifest.forms):
            raise HostileMessage("there is no such expert, or no such form.")

    def missing(self, key: Key, request: RunRequest) -> list[tuple[BlobId, ...]]:
        """What has to be read before `request` can run."""
        served = self._shelf.packs[key.pack]
        groups = [self._group(served, key.layer, expert, form) for expert, form in _places([request])]
        resident = self._shelf.cache.residents(groups)
        return [group for group, there in zip(groups, resident, strict=True) if not there]

    def fetch(self, groups: Sequence[tuple[BlobId, ...]]) -> None:
        """Wait for what is missing. Raises CorruptBlob, RemoteUnavailable."""
        self._shelf.fetch(groups)
        self._fetched.update(groups)

    def run(self, key: Key, requests: Sequence[RunRequest]) -> list[Floats]:
        """The outputs (U, H), or (N, H), of each of `requests`, which were checked. PackError for a broken blob."""
        served = self._shelf.packs[key.pack]
        outputs = [np.zeros(request.shape, np.float32) for request in requests]
        places = _places(requests)
        groups = [self._group(served, key.layer, expert, form) for expert, form in places]
        wanted = list(places.items())
        hits, began_s = self._shelf.cache.residents(groups), perf_counter()
        for at, blobs in self._shelf.cache.serve(groups):
            (_, form), found = wanted[at]
            if groups[at] in self._fetched:  # counted as it was
                self._fetched.discard(groups[at])
            else:
                self._shelf.count(groups[at], perf_counter() - began_s, hit=hits[at])
            self._compute(key, served.pack.manifest.forms[form], blobs, (found, requests, outputs))
            began_s = perf_counter()
        return outputs

    def _compute(
        self, key: Key, form: str, blobs: Sequence[Bytes], work: tuple[list[Place], Sequence[RunRequest], list[Floats]]
    ) -> None:
        places, requests, outputs = work
        self._metrics.runs.inc()
        self._metrics.run_rows.observe(len(places))
        for start in range(0, len(places), MAX_ROWS):
            some = places[start : start + MAX_ROWS]
            x = np.stack([requests[at].x[requests[at].uses.row[use]] for at, use in some])
            y = self._maths(key).run(form, blobs, x)
            for (at, use), row in zip(some, y, strict=True):
                uses = requests[at].uses
                outputs[at][uses.row[use] if requests[at].summed else use] += row * uses.gate[use]

    def _group(self, served: Served, layer: int, expert: int, form: int) -> tuple[BlobId, ...]:
        manifest = served.pack.manifest
        return self._shelf.group(served, manifest.blobs(ExpertId(layer, expert), manifest.forms[form]))

    def _math(self, key: Key) -> PlainMath:
        site = self._shelf.packs[key.pack].pack.manifest.site(key.layer)
        return PlainMath(site, key.activation, key.gated)


def same_pack(served: Served, request: RunRequest) -> bool:
    """Whether a request is about the pack that is served, and not another of its name."""
    return served.identity[: 2 * IDENTITY_BYTES] == request.identity.hex()


def _places(requests: Sequence[RunRequest]) -> dict[tuple[int, int], list[Place]]:
    """Who uses each (expert, form), in the order of the requests."""
    found: dict[tuple[int, int], list[Place]] = {}
    for at, request in enumerate(requests):
        pairs = zip(request.uses.expert.tolist(), request.uses.form.tolist(), strict=True)
        for use, pair in enumerate(pairs):
            found.setdefault(pair, []).append(Place(at, use))
    return found
