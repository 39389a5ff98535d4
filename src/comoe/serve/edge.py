"""The edge node as an ASGI application: packs' files, runs of experts, hot experts, health and metrics.

What a device may ask for is docs/network.md. Sockets, TLS and signals are `serve.listen`'s.
"""

import asyncio
from collections.abc import Sequence
from http import HTTPStatus
from time import perf_counter
from typing import Annotated, Any

import msgspec
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from comoe.forms.plain import Floats
from comoe.net.wire import RunAnswer, RunRequest, decode_request, encode_answer
from comoe.serve.batch import Batcher
from comoe.serve.expertruns import ExpertRuns, Key, same_pack
from comoe.serve.gate import Gate, refusal
from comoe.serve.limits import Limits
from comoe.serve.metrics import Metrics
from comoe.serve.sending import BINARY, FileAnswer, Readers
from comoe.serve.shelf import Served, Shelf
from comoe.types import BlobId, ExpertId, HostileMessage, PackError, RemoteUnavailable

SENTENCES = {
    404: "there is nothing here: ask for /packs/NAME/FILE.",
    405: "this cannot be done here: packs are read only.",
}
MAX_HOT = 4096


class Hot(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a device will want soon: [layer, expert, form] each, the likeliest first."""

    experts: Annotated[list[tuple[int, int, str]], msgspec.Meta(max_length=MAX_HOT)]
    session: Annotated[str, msgspec.Meta(max_length=200)] = ""


class EdgeNode:
    """The packs of `shelf`, for whoever knows `token` (None: for everybody). `app` is the ASGI application."""

    def __init__(self, shelf: Shelf, token: str | None, limits: Limits, metrics: Metrics) -> None:
        self.shelf, self.limits, self.metrics = shelf, limits, metrics
        self._readers = Readers.start()
        self._runs = ExpertRuns(shelf, metrics)
        self._batcher = Batcher(self._runs.run, limits.threads, limits.window_s)
        metrics.gauge("comoe_num_requests_waiting", "Runs that wait for a thread", lambda: self._batcher.queue)
        routes = [
            Route("/health", self._health),
            Route("/metrics", self._metrics),
            Route("/packs/{name}/run", self._run, methods=["POST"]),
            Route("/packs/{name}/hot", self._hot, methods=["POST"]),
            Route("/packs/{name}/{file}", self._file, methods=["GET", "HEAD"]),
        ]
        handlers: Any = {HTTPException: _refused}
        self.gate = Gate(Starlette(routes=routes, exception_handlers=handlers), token, limits, metrics)

    @property
    def app(self) -> Gate:
        return self.gate

    def close(self) -> None:
        self._batcher.close()
        self._readers.close()
        self.shelf.close()

    async def _health(self, request: Request) -> Response:
        packs = {name: served.identity for name, served in self.shelf.packs.items()}
        status = "draining" if self.gate.draining else "ok"
        told = {"load": self.gate.load, "queue": self._batcher.queue, "came": self.shelf.came}
        return JSONResponse({"status": status, "packs": packs, **told})

    async def _metrics(self, request: Request) -> Response:
        return Response(self.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    async def _file(self, request: Request) -> Any:
        served = self._served(request)
        file = served.files.get(request.path_params["file"])
        if file is None:
            raise HTTPException(404, f"the pack {request.path_params['name']!r} has no such file.")
        return FileAnswer(self.shelf, served, file, self._readers)

    async def _hot(self, request: Request) -> Response:
        served = self._served(request)
        body = await read_body(request, self.limits)
        try:
            hot = msgspec.json.decode(body, type=Hot)
            groups = [_blobs(served, *expert) for expert in hot.experts]
        except (msgspec.MsgspecError, UnicodeDecodeError, LookupError) as error:
            self.gate.refused("malformed")
            raise HTTPException(400, f"no announcement of hot experts: {error}.") from error
        self.shelf.warm(served, groups)
        self.metrics.hot.inc(len(groups))
        return JSONResponse({"accepted": len(groups)}, 202)

    async def _run(self, request: Request) -> Response:
        served, name = self._served(request), request.path_params["name"]
        with self._batcher.arriving():
            body = await read_body(request, self.limits)
        began_s = perf_counter()
        try:
            asked = decode_request(body)
            key = Key(name, asked.layer, asked.activation, asked.gated)
            self._runs.check(key, asked)
        except HostileMessage as error:
            self.gate.refused("malformed")
            raise HTTPException(400, str(error)) from error
        if not same_pack(served, asked):
            raise HTTPException(409, f"the pack {name!r} here is another one: /health says which.")
        missing = self._runs.missing(key, asked)
        y = await self._outputs(key, asked, missing)
        answer = RunAnswer(asked.dtype, y, perf_counter() - began_s, len(missing))
        return Response(encode_answer(answer), media_type=BINARY)

    async def _outputs(self, key: Key, asked: RunRequest, missing: Sequence[tuple[BlobId, ...]]) -> Floats:
        """What `asked` comes to, once what is `missing` was read."""
        try:
            async with asyncio.timeout(self.limits.run_s):
                if missing:
                    loop = asyncio.get_running_loop()
                    await loop.run_in_executor(self._readers.waiting, self._runs.fetch, missing)
                return await self._batcher.outputs(key, asked)
        except TimeoutError as error:
            raise HTTPException(503, f"experts were not there within {self.limits.run_s:g} seconds.") from error
        except PackError as error:
            raise HTTPException(500, str(error)) from error
        except RemoteUnavailable as error:
            raise HTTPException(502, str(error)) from error

    def _served(self, request: Request) -> Served:
        name = request.path_params["name"]
        served = self.shelf.packs.get(name)
        if served is None:
            raise HTTPException(404, "there is no pack of this name here: /health lists those there are.")
        return served


async def read_body(request: Request, limits: Limits) -> bytes:
    """The body of a request. Raises HTTPException where it is too large, or too slow."""
    announced = request.headers.get("content-length", "0")
    if not announced.isdecimal() or int(announced) > limits.body_bytes:
        raise HTTPException(413, f"a request may have {limits.body_bytes} bytes.")
    body = bytearray()
    try:
        async with asyncio.timeout(limits.body_s):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limits.body_bytes:
                    raise HTTPException(413, f"a request may have {limits.body_bytes} bytes.")
    except TimeoutError as error:
        raise HTTPException(408, f"the request did not come within {limits.body_s:g} seconds.") from error
    return bytes(body)


def _blobs(served: Served, layer: int, expert: int, form: str) -> Any:
    """The blobs of an expert. LookupError where there is none such."""
    manifest = served.pack.manifest
    if not 0 <= layer < len(manifest.layers) or not 0 <= expert < manifest.layers[layer].num_experts:
        raise LookupError(f"there is no expert {expert} in layer {layer}")
    if form not in manifest.forms:
        raise LookupError(f"there is no form {form!r}")
    return manifest.blobs(ExpertId(layer, expert), form)


async def _refused(request: Request, error: HTTPException) -> Response:
    plain = error.detail == HTTPStatus(error.status_code).phrase
    sentence = SENTENCES.get(error.status_code, error.detail) if plain else error.detail
    headers = {name.lower(): value for name, value in (error.headers or {}).items()}
    return refusal(error.status_code, sentence, **headers)
