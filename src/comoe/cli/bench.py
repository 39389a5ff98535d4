"""`comoe bench`: the published tables, made again here."""

import os
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from comoe.cli.options import Json, Threads, switch
from comoe.cli.terminal import print_json, progress_bar
from comoe.types import UsageError

BENCHMARKS = ("quality",)


def command(
    name: Annotated[str, Argument(metavar="NAME", help=f"One of: {', '.join(BENCHMARKS)}.")],
    models: Annotated[
        Path | None,
        Option(envvar="COMOE_MODELS", metavar="FOLDER", help="Folder of models; by default COMOE_SHARED/models."),
    ] = None,
    quick: Annotated[bool, switch("quick", "A coarse run of about a minute.")] = False,
    out: Annotated[Path | None, Option(metavar="FOLDER", help="Keep finished rows here, and go on from them.")] = None,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Run a benchmark.

    \b
    comoe bench quality --quick
    """
    if name not in BENCHMARKS:
        raise UsageError(f"there is no benchmark {name!r}: choose from {', '.join(BENCHMARKS)}.")
    from comoe.bench.figures import page
    from comoe.bench.quality import run
    from comoe.runtime.generate import quiet_transformers
    from comoe.runtime.threads import use_threads

    quiet_transformers()
    use_threads(threads)
    shared = Path(os.environ.get("COMOE_SHARED") or "../shared")
    with progress_bar() as progress:
        document = run(models or shared / "models", shared, quick=quick, out=out, progress=progress)
    if json:
        print_json(document)
    else:
        print(page(document))
