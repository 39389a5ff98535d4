"""What a device counts, read as Prometheus reads it."""

import re
from pathlib import Path
from urllib.request import urlopen

import pytest
from commands import Comoe
from edges import running
from models import greedy

from comoe.runtime.load import load
from comoe.serve.session import metrics_at
from comoe.types import UsageError


def shown(port: int) -> dict[str, float]:
    """Every series and its value."""
    with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
        text = answer.read().decode()
    return {found[1]: float(found[2]) for found in re.finditer(r"^(\S+) (\S+)$", text, re.MULTILINE)}


def test_experts_bytes_links_and_their_events_are_counted_over_all_answers(packed: Path) -> None:
    with running(packed) as edge:
        model = load(packed, expert_memory="20%", edges=[edge.url], prefetch="off")
        with model.comoe as handle, metrics_at(handle, "127.0.0.1", 0) as port:
            greedy(model, 4)
            uses = handle.stats()["uses"]
            handle.begin_request()
            greedy(model, 4)
            found = shown(port)
        ram = [found[f'comoe_expert_requests_total{{result="{result}",tier="ram"}}'] for result in ("hit", "miss")]
        assert sum(ram) == uses + handle.stats()["uses"]
        ran = [found[f'comoe_expert_requests_total{{result="{result}",tier="edge"}}'] for result in ("hit", "miss")]
        stats = handle.stats()
        assert ran == [stats["edge_runs"] - stats["edge_read"], stats["edge_read"]]
        assert found['comoe_expert_bytes_total{tier="flash"}'] == handle.cache.stats.bytes_read["flash"] > 0
        assert found['comoe_handovers_total{result="attached"}'] == 1
        assert found['comoe_handovers_total{result="lost"}'] == 0
        assert found[f'comoe_link_serving{{node="{edge.url}"}}'] == 1
        assert found[f'comoe_link_round_trip_seconds{{node="{edge.url}"}}'] > 0
        assert found["comoe_budget_bytes"] == handle.cache.capacity


def test_a_model_without_edge_nodes_has_no_links_to_show(packed: Path) -> None:
    model = load(packed, expert_memory="20%")
    with model.comoe as handle, metrics_at(handle, "127.0.0.1", 0) as port:
        assert not [name for name in shown(port) if "link" in name or "handover" in name]
        with (
            pytest.raises(UsageError, match=f"cannot listen at 127.0.0.1:{port}"),
            metrics_at(handle, "127.0.0.1", port),
        ):
            pass


def test_run_shows_metrics_where_it_is_told_and_refuses_what_is_no_place(comoe: Comoe, packed: Path) -> None:
    words = ("run", packed, "--prompt", "a", "--max-new-tokens", 2, "--ignore-eos", "--metrics")
    done = comoe(*words, "127.0.0.1:0")
    assert done.code == 0 and re.search(r"metrics at http://127.0.0.1:\d+/metrics", done.err)
    refused = comoe(*words, "everywhere")
    assert refused.code == 2 and "is no place to listen" in refused.err
