"""The door of an edge node: who may come in, how many at once, and whether it is still open. Counts every request."""

import hmac
from collections.abc import Awaitable, Callable, MutableMapping
from time import perf_counter
from typing import Any

from starlette.responses import JSONResponse, Response

from comoe.serve.limits import RETRY_AFTER_S, Limits
from comoe.serve.metrics import Metrics

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN_ROUTE = "health"
AGAIN = 429
ROUTES = ("health", "metrics", "files", "run", "hot")


def refusal(status: int, sentence: str, **headers: str) -> Response:
    """One clear sentence as JSON; the connection ends with it, but where the client shall try again on it."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    ending = {} if status == AGAIN else {"connection": "close"}
    return JSONResponse({"error": sentence}, status, {**named, **ending})


def route_of(path: str) -> str:
    """Which of `ROUTES` a path is counted under: never the path itself, which anybody may make up."""
    words = path.split("/")
    if len(words) == 2 and words[1] in ("health", "metrics"):
        return words[1]
    return words[3] if len(words) == 4 and words[3] in ("run", "hot") else "files"


class Gate:
    """An ASGI application around another: token, draining, and the number of requests at once, in this order.

    Only health is told to everybody, and always.
    """

    def __init__(self, app: App, token: str | None, limits: Limits, metrics: Metrics) -> None:
        self._app, self._limits, self._metrics = app, limits, metrics
        self._authorization = f"Bearer {token}".encode() if token is not None else None
        self.running = 0
        self.draining = False
        metrics.gauge("comoe_num_requests_running", "Requests at work", lambda: self.running)

    @property
    def load(self) -> float:
        """From 0, idle, to 1, where the next request is refused."""
        return min(1.0, self.running / self._limits.requests)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        route = route_of(scope["path"])
        start_s, status = perf_counter(), 500

        async def counted(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            self._metrics.sent.labels(route).inc(len(message.get("body", b"")))
            await send(message)

        try:
            refused = None if route == OPEN_ROUTE else self._refusal(scope)
            if refused is not None:
                await refused(scope, receive, counted)
            else:
                await self._admitted(route, scope, receive, counted)
        finally:
            self._metrics.requests.labels(route, str(status)).inc()
            self._metrics.seconds.labels(route).observe(perf_counter() - start_s)

    async def _admitted(self, route: str, scope: Scope, receive: Receive, send: Send) -> None:
        counts = route not in ("health", "metrics")
        self.running += counts
        try:
            await self._app(scope, receive, send)
        finally:
            self.running -= counts

    def _refusal(self, scope: Scope) -> Response | None:
        if not self._authorized(scope):
            self.refused("token")
            sentence = "this node needs a token: send it as 'Authorization: Bearer TOKEN'."
            return refusal(401, sentence, www_authenticate="Bearer")
        if self.draining:
            self.refused("draining")
            return refusal(503, "this node is shutting down: ask another one.", retry_after=str(RETRY_AFTER_S))
        if self.running >= self._limits.requests and route_of(scope["path"]) != "metrics":
            self.refused("full")
            sentence = f"{self.running} requests are at work, the most there may be: try again later."
            return refusal(AGAIN, sentence, retry_after=str(RETRY_AFTER_S))
        return None

    def refused(self, reason: str) -> None:
        """Count a refusal."""
        self._metrics.refusals.labels(reason).inc()

    def _authorized(self, scope: Scope) -> bool:
        """Compared in constant time, as bytes: headers may hold any."""
        if self._authorization is None:
            return True
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        return len(given) == 1 and hmac.compare_digest(given[0], self._authorization)
