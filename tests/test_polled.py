"""What nodes count, as it is polled from a real server."""

import json
import sys
from pathlib import Path
from subprocess import PIPE, Popen

from webs import free_port, serving

from comoe.bench.driven_figures import PULLED, RAM, TOLD
from comoe.serve.metrics import Metrics
from comoe.testbed.polled import Sample, counters, samples


def test_a_nodes_counters_have_the_names_that_figures_ask_for() -> None:
    metrics = Metrics()
    metrics.expert_requests.labels("ram", "hit").inc(3)
    metrics.expert_bytes.labels("origin").inc(7)
    metrics.hot.inc(2)
    found = counters(metrics.text().decode())
    assert (found[RAM.format("hit")], found[PULLED], found[TOLD]) == (3, 7, 2)
    assert all(name.partition("{")[0].endswith("_total") for name in found)


def test_a_line_that_a_kill_cut_short_is_no_sample() -> None:
    sample = Sample(1.5, 0, {"a_total": 1.0})
    written = json.dumps(sample._asdict()) + "\n"
    assert samples(written + written[:9]) == [sample]


def test_nodes_are_polled_again_and_again_and_one_that_is_not_there_is_silent(tmp_path: Path) -> None:
    (tmp_path / "metrics").write_text("# TYPE a_total counter\na_total 2.0\nb 1.0\n")
    with serving(tmp_path) as web:
        command = [sys.executable, "-m", "comoe.testbed.polled", "0.05", f"http://127.0.0.1:{free_port()}", web.url]
        with Popen(command, stdout=PIPE, text=True) as process:
            assert process.stdout is not None
            found = samples(process.stdout.readline() + process.stdout.readline())
            process.kill()
    assert [(sample.node, sample.counters) for sample in found] == [(1, {"a_total": 2.0})] * 2
    assert found[0].at_s < found[1].at_s
