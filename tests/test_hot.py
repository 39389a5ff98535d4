"""What a node is told: what the session uses most and the device has not, within a share of the experts' bytes."""

from pathlib import Path

import pytest
from models import greedy

from comoe.runtime import hot
from comoe.runtime.hot import hot_experts
from comoe.runtime.load import load
from comoe.types import ExpertId


def test_nothing_is_hot_before_anything_was_used(packed: Path) -> None:
    with load(packed, expert_memory="20%", prefetch="off").comoe as handle:
        assert hot_experts(handle._serving) == []


def test_the_most_used_experts_that_are_not_in_memory_come_first_within_a_share(
    packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hot, "SHARE", 1.0)
    model = load(packed, expert_memory="20%", prefetch="off")
    with model.comoe as handle:
        greedy(model, 24)
        serving = handle._serving
        found = hot_experts(serving)
        assert found
        uses = [sum(phase.uses[expert] for phase in serving.seen[layer]) for layer, expert, _ in found]
        assert uses == sorted(uses, reverse=True) and uses[-1] > 0
        for layer, expert, form in found:
            assert form == "exact"
            assert not handle.cache.resident(handle.pack.manifest.blobs(ExpertId(layer, expert), form))
        monkeypatch.setattr(hot, "SHARE", 0.15)
        fewer = hot_experts(serving)
        assert fewer == found[: len(fewer)]
        nbytes = sum(serving.nbytes(serving.way(layer, expert, form)) for layer, expert, form in fewer)
        assert nbytes <= 0.15 * serving.manifest.expert_bytes_bf16
        monkeypatch.setattr(hot, "MOST_EXPERTS", 2)
        monkeypatch.setattr(hot, "SHARE", 1.0)
        assert hot_experts(serving) == found[:2]
