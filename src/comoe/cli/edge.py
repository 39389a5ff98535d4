"""`comoe edge`: a node that serves packs to devices near it."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from comoe.cli.options import CacheFolder, CacheSize, Threads, TokenFile, access, token_in
from comoe.cli.terminal import say
from comoe.device import process
from comoe.device.memory import check_possible, default_memory
from comoe.net.address import Access, is_url
from comoe.net.place import open_pack
from comoe.store.pack import Pack
from comoe.types import DoesNotFit, UsageError
from comoe.units import format_size, parse_size

if TYPE_CHECKING:
    from comoe.serve.limits import Limits
    from comoe.serve.shelf import Shelf

MIN_TOKEN_CHARS = 16
LOCAL = ("127.", "localhost:", "[::1]")


def command(
    packs: Annotated[
        list[str],
        Argument(
            metavar="PACK...", help="Folders that `comoe pack` made, or where packs are published: http(s)://, s3://."
        ),
    ],
    listen: Annotated[
        str, Option(envvar="COMOE_LISTEN", metavar="HOST:PORT", help="Where to listen; port 0 takes a free one.")
    ] = "127.0.0.1:8600",
    memory: Annotated[
        str | None,
        Option(envvar="COMOE_MEMORY", metavar="SIZE", help="Memory of the whole process: 4GiB. Experts get the rest."),
    ] = None,
    token_file: TokenFile = None,
    cert: Annotated[
        Path | None, Option(envvar="COMOE_CERT", metavar="FILE", help="TLS: the certificate chain, PEM.")
    ] = None,
    key: Annotated[Path | None, Option(envvar="COMOE_KEY", metavar="FILE", help="TLS: its key, PEM.")] = None,
    max_requests: Annotated[
        int, Option(envvar="COMOE_MAX_REQUESTS", min=1, metavar="N", help="Requests at once; more are told to wait.")
    ] = 64,
    drain_seconds: Annotated[
        float,
        Option(envvar="COMOE_DRAIN_SECONDS", min=0, metavar="S", help="On SIGTERM, let what runs have so long."),
    ] = 30.0,
    cache: CacheFolder = None,
    cache_size: CacheSize = None,
    threads: Threads = None,
) -> None:
    """Serve packs to devices: their files, and experts run for them.

    \b
    comoe edge qwen.comoe --listen 0.0.0.0:8600 --token-file token --cert cert.pem --key key.pem
    comoe edge https://origin/qwen.comoe

    What is published elsewhere is read through and kept on flash, with the token in COMOE_TOKEN. It answers until it
    gets SIGTERM or Ctrl-C, and then finishes what runs. What it serves is docs/network.md.
    """
    from comoe.serve.edge import EdgeNode
    from comoe.serve.limits import Limits
    from comoe.serve.listen import EdgeServer, listener_of, tls_of
    from comoe.serve.metrics import Metrics
    from comoe.serve.shelf import Shelf

    token, tls = own_token(token_file) if token_file else None, tls_of(cert, key)
    cores = threads or len(os.sched_getaffinity(0))
    limits, metrics = Limits(requests=max_requests, threads=cores, drain_s=drain_seconds), Metrics()
    listener = listener_of(listen)
    shelf = Shelf(opened(packs, access(cache, cache_size, None, None)), metrics)
    shelf.open(capacity_within(memory, shelf, limits))
    node = EdgeNode(shelf, token, limits, metrics)
    host, port = listener.getsockname()[:2]
    place = f"{'https' if tls else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"
    if token is None and not listen.startswith(LOCAL):
        say("Without --token-file, everybody who reaches this machine is served.")
    try:
        EdgeServer(node, listener, tls, lambda: say(f"Serving {', '.join(shelf.packs)} on {place}")).run()
    finally:
        node.close()


def opened(places: Sequence[str], reach: Access) -> dict[str, Pack]:
    """Packs by the names that devices ask for them by: those of their folders. UsageError where two have the same."""
    names = [place.rstrip("/").rpartition("/")[2] if is_url(place) else Path(place).resolve().name for place in places]
    if len({*names}) < len(names):
        raise UsageError("two packs have the same name, by which devices ask for them: rename a folder.")
    return {name: open_pack(place, access=reach) for name, place in zip(names, places, strict=True)}


def own_token(path: Path) -> str:
    """The token that devices must know. Raises UsageError where the file has none that is fit to guard anything."""
    token = token_in(path)
    if len(token) < MIN_TOKEN_CHARS or not token.isprintable() or " " in token:
        raise UsageError(f"{path}: a token has at least {MIN_TOKEN_CHARS} characters, and no spaces in it.")
    return token


def capacity_within(memory: str | None, shelf: "Shelf", limits: "Limits") -> int:
    """Bytes for blobs, of `memory` for the whole process. Raises DoesNotFit where there are too few."""
    given = parse_size(memory) if memory is not None else default_memory()
    check_possible(given)
    beside = process.resident().total + limits.beside_bytes
    if given < beside + shelf.smallest:
        least = beside + shelf.smallest
        raise DoesNotFit(
            f"this node needs at least --memory {least} ({format_size(least)}) for {limits.requests} requests at once; "
            f"{format_size(given)} were given.",
            least,
        )
    return given - beside
