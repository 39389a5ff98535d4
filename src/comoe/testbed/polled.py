"""What nodes count, again and again: `python -m comoe.testbed.polled PERIOD_S URL...`, the servers' addresses.

One JSON line for every answer: when it came on the machine's clock, from which of the addresses, and its counters. A
node that does not answer is silent here, too.
"""

import json
import sys
from threading import Lock, Thread
from time import monotonic, sleep
from typing import NamedTuple
from urllib.request import urlopen

WAIT_S = 1.0


class Sample(NamedTuple):
    """Counters of `node` at a moment, by name with labels as Prometheus writes them."""

    at_s: float
    node: int
    counters: dict[str, float]


def counters(text: str) -> dict[str, float]:
    """The counters in Prometheus' text."""
    lines = (line.rpartition(" ") for line in text.splitlines() if line and not line.startswith("#"))
    return {name: float(value) for name, _, value in lines if name.partition("{")[0].endswith("_total")}


def samples(written: str) -> list[Sample]:
    """What whole lines of this say."""
    return [Sample(**json.loads(line)) for line in written.splitlines(keepends=True) if line.endswith("\n")]


def _follow(node: int, url: str, period_s: float, writing: Lock) -> None:
    while True:
        due_s = monotonic() + period_s
        try:
            with urlopen(f"{url}/metrics", timeout=WAIT_S) as answer:
                sample = Sample(monotonic(), node, counters(answer.read().decode()))
        except OSError:
            pass
        else:
            with writing:
                print(json.dumps(sample._asdict()), flush=True)
        sleep(max(0.0, due_s - monotonic()))


def main() -> None:
    """Poll until killed."""
    period_s, urls, writing = float(sys.argv[1]), sys.argv[2:], Lock()
    threads = [Thread(target=_follow, args=(node, url, period_s, writing)) for node, url in enumerate(urls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    main()
