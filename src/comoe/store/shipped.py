"""What the package brings along: a small trained model, calibration text, sample text that nothing is fitted to, and
settings for common cases."""

from importlib.resources import files
from pathlib import Path

DEMO_MODEL = "qwen3moe-mini"


def demo_checkpoint() -> Path:
    """The folder of a Qwen3-MoE of 12 M parameters in hub layout; its model card is beside it."""
    return _folder(DEMO_MODEL)


def calibration_files() -> list[Path]:
    """Public-domain text to calibrate on, a file for every domain."""
    return sorted(_folder("calibration").glob("*.txt"))


def sample_files() -> list[Path]:
    """Public-domain text of the same domains, to measure on."""
    return sorted(_folder("sample").glob("*.txt"))


def presets() -> dict[str, Path]:
    """Files of settings by the name that stands for them."""
    return {file.stem: file for file in sorted(_folder("presets").glob("*.toml"))}


def _folder(name: str) -> Path:
    return Path(str(files("comoe"))) / "data" / name
