"""A thread that looks at something again and again: what drives a running model subclasses it and says how."""

import threading
from collections.abc import Callable


class Periodic:
    """Calls `step` every `period_s` from `start` until `close`, from a thread of its own."""

    def __init__(self, period_s: float, name: str) -> None:
        self._period_s, self._stop = period_s, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name=name)

    def start(self, clock: Callable[[], float]) -> None:
        """Begin; `clock` answers seconds."""
        self._clock = clock
        self._thread.start()

    def close(self) -> None:
        """Stop. May be called twice, and without having started."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def step(self, now_s: float) -> None:
        """One round."""
        raise NotImplementedError

    def _run(self) -> None:
        while not self._stop.wait(self._period_s):
            self.step(self._clock())
