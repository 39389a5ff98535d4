"""comoe.toml: defaults for flags, checked key by key before a command runs.

Keys are the long flags without their dashes (`max-loss = "2%"`); at the top for every command that has the flag, in a
table such as `[run]` for one command, which is the stronger. Percentages are text with their sign.
"""

import tomllib
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from comoe.cli.rivals import displaced
from comoe.store.shipped import presets
from comoe.types import UnknownKey, UsageError

FILE = "comoe.toml"


def defaults_of(path: str | None, group: Any) -> dict[str, dict[str, Any]]:
    """{command: {parameter: value}} of the file or preset `path`, of ./comoe.toml where it is None and there is one.

    Raises UsageError for a file that cannot be read, UnknownKey for a key that no command has.
    """
    file = Path(path or FILE)
    if not file.exists():
        if path is None:
            return {}
        file = presets().get(path, file)
    try:
        document = tomllib.loads(file.read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{file} cannot be read: {error}. Presets are {', '.join(presets())}.") from error
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{file} is not TOML: {error}.") from error
    flags = {name: _flags(command) for name, command in group.commands.items()}
    shared = {key: value for key, value in document.items() if not isinstance(value, dict)}
    _check(shared, {flag: found for of_command in flags.values() for flag, found in of_command.items()}, str(file))
    tables = {key: value for key, value in document.items() if isinstance(value, dict)}
    _check_keys(tables, flags, f"{file}, table")
    for command, values in tables.items():
        _check(values, flags[command], f"{file}, [{command}]")
    found = {name: _merged(shared, tables.get(name, {}), known) for name, known in flags.items()}
    return {name: _for_each(group.commands[name], values) for name, values in found.items()}


def _merged(shared: Mapping[str, Any], own: Mapping[str, Any], flags: Mapping[str, Any]) -> dict[str, Any]:
    """A command's parameters from the top of the file and from its table, whose keys exclude rivals at the top."""
    top, table = ({flags[key].name: value for key, value in of.items() if key in flags} for of in (shared, own))
    gone = displaced((table, top))
    return {name: value for name, value in top.items() if name not in gone} | table


def _for_each(command: Any, values: dict[str, Any]) -> dict[str, Any]:
    """A command's parameters; a group's are those of each command below it."""
    return dict.fromkeys(command.commands, values) if hasattr(command, "commands") else values


def _flags(command: Any) -> dict[str, Any]:
    """A command's options by their long flags, without dashes; `json = false` is what turns an on/off flag off.

    A group has those of the commands below it.
    """
    return {
        flag.removeprefix("--"): parameter
        for each in getattr(command, "commands", {"": command}).values()
        for parameter in each.params
        for flag in parameter.opts
        if flag.startswith("--") and flag != "--help"
    }


def _check(values: Mapping[str, Any], flags: Mapping[str, Any], where: str) -> None:
    _check_keys(values, flags, where)
    for key, value in values.items():
        if _is_ambiguous(value, flags[key].metavar):
            hint = f'write it with its sign, as in {key} = "2%"'
            raise UsageError(f"{where}: {key} = {value} could be a percentage or a fraction: {hint}.")


def _is_ambiguous(value: Any, metavar: str | None) -> bool:
    """Whether 0.02 might be meant as 2 %: beside a flag stands PERCENT, in the file nothing does."""
    if metavar == "SIZE|PERCENT":
        return isinstance(value, float)
    return metavar == "PERCENT" and "%" not in str(value) and value not in (0, "0")


def _check_keys(keys: Iterable[str], known: Iterable[str], where: str) -> None:
    known = sorted(known)
    for key in keys:
        if key not in known:
            near = get_close_matches(key, known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}."
            raise UnknownKey(f"{where}: there is no key {key!r}; {hint}")
