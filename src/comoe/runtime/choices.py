"""The choices of a running model, written down; or taken from a log, whatever the cache holds."""

from array import array

import torch
from blake3 import blake3

from comoe.kernels.native import kernel_name
from comoe.plan.planner import Plan
from comoe.store.decisions import FORMAT_VERSION, Conditions, Decisions, Request, Switch, identity, packed
from comoe.store.manifest import Manifest
from comoe.types import UsageError


class Choices:
    """Keeps every choice of a session, request by request; with `replayed` the logged ones are taken again.

    Raises UsageError where a log is of a run under other conditions.
    """

    def __init__(self, conditions: Conditions, replayed: Decisions | None = None) -> None:
        if replayed is not None:
            check(replayed.conditions, conditions)
        self._conditions, self._replayed = conditions, replayed
        self._requests: list[Request] = []
        self._logged: list[bool] | None = None
        self._open(None)

    def begin(self, asked: str) -> None:
        """The next request; `asked` says all that it depends on. UsageError where the log's is another."""
        self._close()
        self._open(blake3(asked.encode()).hexdigest())
        if self._replayed is not None:
            self._logged = self._next_logged().bits()

    def settle(self, coarse: bool) -> bool:
        """Whether a use takes the floor: as it would, or as the log says. UsageError beyond the log's end."""
        if self._logged is not None:
            at = len(self._floors)
            if at == len(self._logged):
                raise UsageError("the decision log ends before this answer does: replay it with the flags of its run.")
            coarse = self._logged[at]
        self._floors.append(coarse)
        return coarse

    def switched(self, reason: str, capacity: int, plan: Plan) -> None:
        """The plan changed, or its capacity did. Callable from any thread."""
        threshold = plan.wait_threshold if plan.wait_threshold < float("inf") else None
        self._switches.append(Switch(len(self._floors), reason, capacity, threshold))

    def decisions(self) -> Decisions:
        """All of it."""
        requests = (*self._requests, *self._current())
        return Decisions(FORMAT_VERSION, self._conditions, requests)

    def _open(self, asked: str | None) -> None:
        self._asked, self._floors = asked, array("b")
        self._switches: list[Switch] = []

    def _current(self) -> list[Request]:
        if self._asked is None:
            return []
        floors = [bool(floor) for floor in self._floors]
        return [Request(self._asked, len(floors), packed(floors), tuple(self._switches))]

    def _close(self) -> None:
        self._requests += self._current()

    def _next_logged(self) -> Request:
        assert self._replayed is not None
        at = len(self._requests)
        if at >= len(self._replayed.requests):
            raise UsageError(f"the decision log has {at} requests: this is one more.")
        request = self._replayed.requests[at]
        if request.asked != self._asked:
            raise UsageError("the decision log is of another prompt, or of other sampling flags: give the same again.")
        return request


def conditions(manifest: Manifest, plan: Plan, max_loss: float, dtype: str) -> Conditions:
    """Those of a model that is served now."""
    return Conditions(
        identity(manifest), plan.floor, plan.target, max_loss, dtype, torch.get_num_threads(), kernel_name()
    )


def check(logged: Conditions, now: Conditions) -> None:
    """Raise UsageError where a log was written under other conditions, and say which."""
    for name in Conditions.__struct_fields__:
        was, is_ = getattr(logged, name), getattr(now, name)
        if was != is_:
            raise UsageError(f"the decision log is of a run with another {name.replace('_', ' ')}: {was}, not {is_}.")
