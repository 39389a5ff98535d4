"""A small folder of texts and tasks for benchmarks, laid out as the shared one."""

import json
from pathlib import Path

from comoe.store.shipped import calibration_files, sample_files

DOMAINS = ("bible_en", "novels_en")


def shared_folder(folder: Path) -> Path:
    """Texts and tasks laid out as the shared folder's, made of the texts that ship."""
    corpus, tasks = folder / "data" / "corpus", folder / "data" / "tasks"
    corpus.mkdir(parents=True)
    tasks.mkdir()
    items = []
    for path, kind in [(path, "calib") for path in calibration_files()] + [(path, "valid") for path in sample_files()]:
        text = path.read_text("utf-8").encode("ascii", "ignore").decode()  # characters that the tiny model knows
        if path.stem in DOMAINS:
            (corpus / f"{path.stem}.{kind}.txt").write_text(text[:20_000], "utf-8")
            choices = [text[300 * at : 300 * at + 100] for at in (2, 8, 20, 30)]
            items += [{"domain": path.stem, "prefix": text[:600], "choices": choices, "answer": 0}] * 2
    (tasks / "next_chunk.jsonl").write_text("\n".join(map(json.dumps, items)) + "\n", "utf-8")
    return folder


def bench_folders(folder: Path, checkpoint: Path) -> tuple[Path, Path, Path]:
    """What a benchmark is given in `folder`: models, of which `checkpoint` is the only one, texts, and a place."""
    (folder / "models").mkdir()
    (folder / "models" / "tiny").symlink_to(checkpoint)
    return folder / "models", shared_folder(folder / "shared"), folder / "out"
