"""What an edge node counts, under the names that docs/network.md lists, as Prometheus reads it."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """Counters of one node, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        count, time = self._counter, self._histogram
        self.expert_requests = count("comoe_expert_requests_total", "Blobs asked for by tier", "tier", "result")
        self.expert_bytes = count("comoe_expert_bytes_total", "Blob bytes served by tier", "tier")
        self.expert_fetch = time("comoe_expert_fetch_seconds", "Waiting for a blob by tier", "tier")
        self.requests = count("comoe_edge_requests_total", "Answered requests", "route", "status")
        self.refusals = count("comoe_edge_refusals_total", "Refused requests and connections", "reason")
        self.seconds = time("comoe_edge_request_seconds", "From a request's head to the end of its answer", "route")
        self.sent = count("comoe_edge_sent_bytes_total", "Bytes of bodies sent", "route")
        self.hot = count("comoe_edge_hot_experts_total", "Experts announced as hot")
        self.runs = count("comoe_edge_expert_runs_total", "Experts run for devices, once for all rows of a batch")
        help = "Rows that one run of an expert computed together"
        self.run_rows = Histogram("comoe_edge_run_rows", help, buckets=ROWS, registry=self.registry)

    def gauge(self, name: str, help: str, value: Callable[[], float], **labels: str) -> None:
        """Show what `value` returns whenever metrics are read."""
        gauge = Gauge(name, help, tuple(labels), registry=self.registry)
        (gauge.labels(**labels) if labels else gauge).set_function(value)

    def text(self) -> bytes:
        """Everything, in Prometheus' text format."""
        return generate_latest(self.registry)

    def _counter(self, name: str, help: str, *labels: str) -> Counter:
        return Counter(name, help, labels, registry=self.registry)

    def _histogram(self, name: str, help: str, *labels: str) -> Histogram:
        return Histogram(name, help, labels, buckets=SECONDS, registry=self.registry)
