"""The command line: one file per command, joined here. Data goes to stdout, talk to stderr.

A flag wins over its environment twin `COMOE_*`, that over comoe.toml, that over the default; so it does over those of
a setting that it excludes.
"""

import os
import sys
from collections.abc import Callable
from typing import Annotated

import typer

from comoe.cli.bench import command as bench
from comoe.cli.cache import app as cache
from comoe.cli.command import Command
from comoe.cli.config import defaults_of
from comoe.cli.demo import command as demo
from comoe.cli.doctor import command as doctor
from comoe.cli.ending import Commands, drop_unread, last_word
from comoe.cli.export import command as export
from comoe.cli.inspect import command as inspect
from comoe.cli.pack import command as pack
from comoe.cli.plan import command as plan
from comoe.cli.profile import app as profile
from comoe.cli.run import command as run
from comoe.cli.trace import command as trace
from comoe.cli.verify import command as verify
from comoe.types import ComoeError

RUN_PACKAGES = {"torch", "transformers", "safetensors", "scipy", "obstore"}

app = typer.Typer(
    name="comoe",
    cls=Commands,
    help="Run Mixture-of-Experts models that do not fit, inside whatever memory there is.\n\n"
    "\b\ncomoe demo\ncomoe pack ./Qwen3-30B-A3B -o qwen.comoe\ncomoe run qwen.comoe --memory 4GiB --prompt 'Once upon'"
    "\n\nA flag such as --memory 4GiB may also be given by the environment (COMOE_MEMORY=4GiB) or by comoe.toml "
    '(memory = "4GiB", at the top or in a table such as [run]). A flag wins over the environment, that over the file, '
    "also where two settings exclude each other.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
COMMANDS: dict[str, Callable[..., None]] = {
    "pack": pack,
    "plan": plan,
    "run": run,
    "trace": trace,
    "inspect": inspect,
    "verify": verify,
    "export": export,
    "doctor": doctor,
    "demo": demo,
    "bench": bench,
}
for name, command in COMMANDS.items():
    app.command(name, cls=Command)(command)
app.add_typer(profile, name="profile")
app.add_typer(cache, name="cache")


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(version("comoe"))
        raise typer.Exit


@app.callback()
def begin(
    context: typer.Context,
    config: Annotated[
        str | None,
        typer.Option(
            envvar="COMOE_CONFIG",
            metavar="FILE|PRESET",
            help="Settings file instead of ./comoe.toml, or faithful, balanced, small, slow-reads.",
        ),
    ] = None,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    context.default_map = defaults_of(config, context.command)


def main() -> None:
    """Run the command line; an error that comoe raises is one sentence on stderr and an exit code of its own.

    Compute threads sleep while they wait, where nobody said otherwise: threads that spin take a thousand times longer
    as soon as another process wants their core.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        app(prog_name="comoe")
    except ComoeError as error:
        _stop(str(error), error.exit_code)
    except ModuleNotFoundError as error:
        if error.name not in RUN_PACKAGES:
            raise
        _stop(f"this command needs {error.name}: pip install 'comoe[run]'.", 1)
    finally:
        drop_unread()


def _stop(sentence: str, code: int) -> None:
    last_word(sentence)
    sys.exit(code)
