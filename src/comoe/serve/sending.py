"""A file of a pack as an HTTP answer: whole or a range, in slices, no faster than its reader takes it."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from starlette.requests import Request
from starlette.responses import Response

from comoe.serve.gate import Receive, Scope, Send, refusal
from comoe.serve.limits import SLICE_BYTES
from comoe.serve.ranges import Span, parse_range
from comoe.serve.shelf import Served, ServedFile, Shelf
from comoe.types import PackError, RemoteUnavailable

CONTENT_TYPES = {".json": "application/json"}
BINARY = "application/octet-stream"
COPYING, WAITING = 2, 16


class Readers(NamedTuple):
    """Threads that copy what is in memory, and others that wait for flash or an origin, which may be slow."""

    copying: ThreadPoolExecutor
    waiting: ThreadPoolExecutor

    @staticmethod
    def start() -> "Readers":
        return Readers(ThreadPoolExecutor(COPYING, "comoe-copy"), ThreadPoolExecutor(WAITING, "comoe-read"))

    def close(self) -> None:
        self.copying.shutdown()
        self.waiting.shutdown()


class FileAnswer:
    """Answers one GET or HEAD for `file`; reads in the threads of `readers`."""

    def __init__(self, shelf: Shelf, served: Served, file: ServedFile, readers: Readers) -> None:
        self._shelf, self._served, self._file, self._readers = shelf, served, file, readers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request, file = Request(scope), self._file
        etag = f'"{file.etag}"'
        headers = {"etag": etag, "accept-ranges": "bytes", "cache-control": "no-cache"}
        if etag in request.headers.get("if-none-match", ""):
            await Response(status_code=304, headers=headers)(scope, receive, send)
            return
        wanted = request.headers.get("range")
        if request.headers.get("if-range", etag) != etag:
            wanted = None
        partial = parse_range(wanted, file.nbytes)
        span = partial or Span(0, file.nbytes)
        if partial is not None and not partial.nbytes:
            answer = refusal(416, "the range is outside the file.", content_range=f"bytes */{file.nbytes}")
            await answer(scope, receive, send)
            return
        if partial is not None:
            headers["content-range"] = f"bytes {span.start}-{span.stop - 1}/{file.nbytes}"
        headers["content-length"] = str(span.nbytes)
        headers["content-type"] = CONTENT_TYPES.get(file.path.suffix, BINARY)
        await self._send(
            Response(status_code=200 if partial is None else 206, headers=headers), span, scope, receive, send
        )

    async def _send(self, head: Response, span: Span, scope: Scope, receive: Receive, send: Send) -> None:
        """The head, once the first slice is there: what cannot be read is an error and no broken answer."""
        slices = _slices(span) if scope["method"] == "GET" else []
        try:
            body = await self._read(slices[0]) if slices else b""
        except (PackError, RemoteUnavailable) as error:
            status = 502 if isinstance(error, RemoteUnavailable) else 500
            await refusal(status, str(error))(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": head.status_code, "headers": head.raw_headers})
        gone = asyncio.ensure_future(_disconnected(receive))
        try:
            for following in slices[1:]:
                await send({"type": "http.response.body", "body": body, "more_body": True})
                if gone.done():
                    return
                body = await self._read(following)
            await send({"type": "http.response.body", "body": body, "more_body": False})
        finally:
            gone.cancel()

    async def _read(self, span: Span) -> bytes | bytearray:
        loop, shelf, readers = asyncio.get_running_loop(), self._shelf, self._readers
        threads = readers.copying if shelf.resident(self._served, self._file, span) else readers.waiting
        return await loop.run_in_executor(threads, shelf.read, self._served, self._file, span)


def _slices(span: Span) -> list[Span]:
    starts = range(span.start, span.stop, SLICE_BYTES)
    return [Span(start, min(start + SLICE_BYTES, span.stop)) for start in starts]


async def _disconnected(receive: Receive) -> None:
    """Returns when the client goes away."""
    while (await receive())["type"] != "http.disconnect":
        pass
