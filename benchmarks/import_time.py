"""How long `import comoe` takes beside an empty interpreter: interleaved pairs, one JSON document on stdout.

Raw results lie beside it, in import_time.json. Needs no model; `--statement 'import comoe.cli'` measures that instead.
"""

import argparse
import json
import subprocess
import sys
from statistics import median
from time import perf_counter

from comoe.bench.ratio import median_interval
from comoe.device.machine import machine


def seconds(statement: str) -> float:
    """Wall time of a fresh interpreter that runs `statement`."""
    start = perf_counter()
    subprocess.run([sys.executable, "-c", statement], check=True)
    return perf_counter() - start


def measure(statement: str, pairs: int) -> dict[str, object]:
    """Medians over `pairs` interleaved pairs, after one unmeasured pair that fills the page cache."""
    samples = [(seconds("pass"), seconds(statement)) for _ in range(pairs + 1)][1:]
    bare, full = ([sample[i] for sample in samples] for i in (0, 1))
    added = [b - a for a, b in samples]
    return {
        "name": "import_time",
        "machine": machine(),
        "settings": {"statement": statement, "pairs": pairs},
        "interpreter_s": median(bare),
        "total_s": median(full),
        "import_s": median(added),
        "import_s_ci95": median_interval(added),
        "rows": [{"interpreter_s": a, "total_s": b} for a, b in samples],
    }


def main() -> None:
    """Read the flags, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--statement", default="import comoe")
    parser.add_argument("--pairs", type=int, default=21)
    flags = parser.parse_args()
    json.dump(measure(flags.statement, flags.pairs), sys.stdout, indent=1)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
