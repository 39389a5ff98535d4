"""What a benchmark's figures were measured on: processor and versions. Rates are `device.doctor`'s."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from comoe.kernels import native


def machine() -> dict[str, object]:
    """This machine and the software that computes, for a benchmark's document."""
    return {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "machine": platform.machine(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": package_version("torch"),
        "transformers": package_version("transformers"),
        "kernel": native.kernel_name(),
    }


def package_version(package: str) -> str | None:
    """None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def cpu_model() -> str:
    """The processor's name; its architecture where the kernel gives none."""
    pairs = (line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines())
    found = {key.strip(): value.strip() for key, _, value in pairs}
    return found.get("model name") or found.get("Model") or found.get("Hardware") or platform.machine()
