"""A command of comoe as typer runs it: its parameters are settled before its function is called."""

from typing import Any

from typer.core import TyperCommand

from comoe.cli.rivals import displaced

SOURCES = ("COMMANDLINE", "ENVIRONMENT", "DEFAULT_MAP")
"""Where a parameter may come from, strongest first, as typer calls it: the last is comoe.toml."""


class Command(TyperCommand):
    """Takes back what a stronger source excludes."""

    def invoke(self, ctx: Any) -> Any:
        gone = displaced([_from(source, ctx) for source in SOURCES])
        ctx.params.update((parameter.name, parameter.default) for parameter in self.params if parameter.name in gone)
        return super().invoke(ctx)


def _from(source: str, context: Any) -> dict[str, Any]:
    """The parameters that come from `source`."""
    return {name: value for name, value in context.params.items() if context.get_parameter_source(name).name == source}
