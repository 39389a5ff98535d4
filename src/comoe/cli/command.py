"""A command of comoe as typer runs it: one flag may have several values, and rivals are settled before it is called."""

from collections.abc import Mapping, Sequence
from typing import Any

from typer.core import TyperCommand

from comoe.cli.rivals import displaced

SOURCES = ("COMMANDLINE", "ENVIRONMENT", "DEFAULT_MAP")
"""Where a parameter may come from, strongest first, as typer calls it: the last is comoe.toml."""


class Command(TyperCommand):
    """Spreads repeated flags, and takes back what a stronger source excludes."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        options = {flag: p for p in self.params if p.param_type_name == "option" for flag in p.opts}
        num_arguments = len([p for p in self.params if p.param_type_name == "argument"])
        return super().parse_args(ctx, spread(args, options, num_arguments))

    def invoke(self, ctx: Any) -> Any:
        gone = displaced([_from(source, ctx) for source in SOURCES])
        ctx.params.update((parameter.name, parameter.default) for parameter in self.params if parameter.name in gone)
        return super().invoke(ctx)


def spread(words: Sequence[str], options: Mapping[str, Any], num_arguments: int) -> list[str]:
    """`--calib a b` as `--calib a --calib b`, for those of `options` that may be repeated.

    Only behind the command's own arguments, where a bare word would be an error: before them it is one of them.
    """
    found: list[str] = []
    repeated, is_value = "", False
    for at, word in enumerate(words):
        if word == "--":
            return [*found, *words[at:]]
        if is_value:
            is_value = False
        elif word.startswith("-") and word != "-":
            flag, equals, _ = word.partition("=")
            option = options.get(flag)
            is_value = option is not None and not option.is_flag and not equals
            repeated = flag if option is not None and option.multiple else ""
        elif repeated and num_arguments <= 0:
            found.append(repeated)
        else:
            num_arguments -= 1
            repeated = ""
        found.append(word)
    return found


def _from(source: str, context: Any) -> dict[str, Any]:
    """The parameters that come from `source`."""
    return {name: value for name, value in context.params.items() if context.get_parameter_source(name).name == source}
