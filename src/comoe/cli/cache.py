"""`comoe cache`: what is kept of packs on the network, and how to be rid of it."""

import typer

from comoe.cli.command import Command
from comoe.cli.options import CacheFolder, Json
from comoe.cli.terminal import print_json, print_table
from comoe.net.flash import FlashCache
from comoe.units import format_size

app = typer.Typer(
    help="See what is kept of packs on the network, and be rid of it.\n\n\b\ncomoe cache ls\ncomoe cache clear",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@app.command("ls", cls=Command)
def listed(cache: CacheFolder = None, json: Json = False) -> None:
    """Show what the cache on flash holds.

    \b
    comoe cache ls
    """
    opened = FlashCache(cache)
    held = opened.held()
    if json:
        print_json({"folder": str(opened.folder), "capacity_bytes": opened.capacity, **held._asdict()})
        return
    rows = [[name, format_size(nbytes)] for name, nbytes in held.packs.items()]
    rows.append([f"{held.blobs} blobs of experts", f"{format_size(held.blob_bytes)} of {format_size(opened.capacity)}"])
    print_table((str(opened.folder), "bytes"), rows)


@app.command("clear", cls=Command)
def cleared(cache: CacheFolder = None, json: Json = False) -> None:
    """Remove all that the cache on flash holds.

    \b
    comoe cache clear
    """
    freed = FlashCache(cache).clear()
    if json:
        print_json({"freed_bytes": freed})
    else:
        print(f"{format_size(freed)} are free again.")
