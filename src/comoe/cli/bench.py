"""`comoe bench`: the published tables, made again here."""

import os
from importlib import import_module
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from comoe.cli.options import Json, Threads, switch
from comoe.cli.terminal import print_json, progress_bar
from comoe.types import UsageError

BENCHMARKS = {
    "cache": ("comoe.bench.cache", "comoe.bench.cache_figures"),
    "handover": ("comoe.bench.handover", "comoe.bench.handover_figures"),
    "joint": ("comoe.bench.joint", "comoe.bench.joint_figures"),
    "ladder": ("comoe.bench.ladder", "comoe.bench.ladder_figures"),
    "network": ("comoe.bench.network", "comoe.bench.network_figures"),
    "quality": ("comoe.bench.quality", "comoe.bench.figures"),
}
"""Where each benchmark runs (`run`) and is written down (`page`)."""


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
    from comoe.runtime.generate import quiet_transformers
    from comoe.runtime.threads import use_threads

    runner, writer = map(import_module, BENCHMARKS[name])
    quiet_transformers()
    use_threads(threads)
    shared = Path(os.environ.get("COMOE_SHARED") or "../shared")
    with progress_bar() as progress:
        document = runner.run(models or shared / "models", shared, quick=quick, out=out, progress=progress)
    if json:
        print_json(document)
    else:
        print(writer.page(document))
