"""How the command line ends before its time: its reader goes away, as `head` does, or somebody presses Ctrl-C."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from signal import SIGINT, SIGPIPE
from typing import Any, TextIO

from typer import Exit
from typer.core import TyperGroup

from comoe.cli.terminal import say

INTERRUPTED = 128 + SIGINT
UNREAD = 128 + SIGPIPE
"""What shells say of a process that the signal ended."""


class Commands(TyperGroup):
    """All commands; typer's own ways of ending them, silently or with a 1, do not get a chance."""

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        with _ending():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: Any) -> Any:
        with _ending():
            found = super().invoke(ctx)
            if sys.stdout is not None:
                sys.stdout.flush()
            return found


@contextmanager
def _ending() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise Exit(UNREAD) from None
    except KeyboardInterrupt:
        last_word("interrupted.")
        raise Exit(INTERRUPTED) from None


def last_word(sentence: str) -> None:
    """Why comoe ends, on stderr, if anybody reads it."""
    with suppress(BrokenPipeError):
        say(f"comoe: {sentence}")


def drop_unread() -> None:
    """Let go what is buffered for a reader that went away: Python would complain when it ends."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # None: closed by who started us
            _drop_unread(stream)


def _drop_unread(stream: TextIO) -> None:
    try:
        stream.flush()
    except BrokenPipeError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
