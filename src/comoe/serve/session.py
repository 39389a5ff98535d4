"""What a running model counts, as Prometheus reads it, on a port of its own: names are those of docs/network.md."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from comoe.memory.cache import BlobCache
from comoe.net.links import LinkState
from comoe.types import UsageError


class Links(Protocol):
    """What is known of edge nodes: `net.nodes.EdgeNodes`."""

    @property
    def serving(self) -> str | None: ...

    @property
    def counts(self) -> dict[str, int]: ...

    def links(self) -> dict[str, LinkState]: ...


class Running(Protocol):
    """What is asked of a model's handle: `runtime.handle.Comoe`."""

    nodes: Any
    """`Links`, or None without any."""

    @property
    def cache(self) -> BlobCache: ...

    def stats(self) -> dict[str, Any]: ...

    def used(self) -> tuple[int, int]: ...


class SessionMetrics(Collector):
    """Asks `running` whenever metrics are read."""

    def __init__(self, running: Running) -> None:
        self._running = running

    def collect(self) -> Iterator[Metric]:
        running, stats = self._running, self._running.stats()
        uses, hits = running.used()
        ran, not_there = stats["edge_runs"], stats["edge_read"]
        results = [(("ram", "hit"), hits), (("ram", "miss"), uses - hits)]
        results += [(("edge", "hit"), ran - not_there), (("edge", "miss"), not_there)]
        yield _counted("comoe_expert_requests", "Uses of experts, by whether their form was in memory", results)
        read = [((tier,), nbytes) for tier, nbytes in running.cache.stats.bytes_read.items()]
        yield _counted("comoe_expert_bytes", "Bytes of blobs that were read, by tier", read, ("tier",))
        yield _counted("comoe_edge_runs", "Uses that edge nodes ran", [((), ran)], ())
        yield _counted("comoe_edge_failures", "Requests to run that failed", [((), stats["edge_failures"])], ())
        yield _shown("comoe_resident_bytes", "Memory of resident blobs", [(("ram",), running.cache.resident_bytes)])
        yield _shown("comoe_budget_bytes", "Memory that blobs may take", [((), running.cache.capacity)], ())
        yield _shown("comoe_plan_quality_loss", "Predicted loss of the answer", [((), stats["loss_ledger"])], ())
        if running.nodes is not None:
            yield from _of_links(running.nodes, stats["announced_experts"])


@contextmanager
def metrics_at(running: Running, host: str, port: int) -> Iterator[int]:
    """Metrics of `running` at http://host:port/metrics while it lasts; the port. UsageError where that is taken."""
    registry = CollectorRegistry()
    registry.register(SessionMetrics(running))
    try:
        server, thread = start_http_server(port, host, registry)
    except OSError as error:
        raise UsageError(f"--metrics cannot listen at {host}:{port}: {error.strerror}.") from error
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _of_links(nodes: Links, announced: int) -> Iterator[Metric]:
    """Events, and what is known of each link."""
    events = [((kind,), count) for kind, count in nodes.counts.items()]
    yield _counted("comoe_handovers", "What became of links to edge nodes", events, ("result",))
    yield _counted("comoe_announced_experts", "Experts that nodes were told of", [((), announced)], ())
    links = nodes.links()
    rates = [((node,), link.rate_bps) for node, link in links.items()]
    trips = [((node,), link.rtt_s) for node, link in links.items() if link.rtt_s is not None]
    serves = [((node,), float(node == nodes.serving)) for node in links]
    yield _shown("comoe_link_bandwidth_bytes_per_second", "What may be counted on", rates, ("node",))
    yield _shown("comoe_link_round_trip_seconds", "Of light questions", trips, ("node",))
    yield _shown("comoe_link_serving", "1 of the node that serves", serves, ("node",))


Values = Iterable[tuple[tuple[str, ...], float]]


def _counted(name: str, help: str, values: Values, labels: tuple[str, ...] = ("tier", "result")) -> Metric:
    return _filled(CounterMetricFamily(name, help, labels=labels), values)


def _shown(name: str, help: str, values: Values, labels: tuple[str, ...] = ("tier",)) -> Metric:
    return _filled(GaugeMetricFamily(name, help, labels=labels), values)


def _filled(family: CounterMetricFamily | GaugeMetricFamily, values: Values) -> Metric:
    for label, value in values:
        family.add_metric(label, value)
    return family
