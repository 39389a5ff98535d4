"""How many threads torch computes with: a matter of the process, not of a model."""

import torch


def use_threads(threads: int | None) -> None:
    """Let torch compute with `threads` threads; None leaves it at what it has, by default all cores."""
    if threads is not None:
        torch.set_num_threads(threads)
