"""comoe.toml: defaults for flags, checked key by key before a command runs.

Keys are the long flags without their dashes (`max-loss = "2%"`); at the top for every command that has the flag, in a
table such as `[run]` for one command.
"""

import tomllib
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from comoe.types import UnknownKey, UsageError

FILE = "comoe.toml"


def defaults_of(path: str | None, group: Any) -> dict[str, dict[str, Any]]:
    """{command: {parameter: value}} of the file `path`, of ./comoe.toml where it is None and there is one.

    Raises UsageError for a file that cannot be read, UnknownKey for a key that no command has.
    """
    file = Path(path or FILE)
    if path is None and not file.exists():
        return {}
    try:
        document = tomllib.loads(file.read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{file} cannot be read: {error}.") from error
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{file} is not TOML: {error}.") from error
    flags = {name: _flags(command) for name, command in group.commands.items()}
    shared = {key: value for key, value in document.items() if not isinstance(value, dict)}
    _check(shared, {flag for of_command in flags.values() for flag in of_command}, str(file))
    tables = {key: value for key, value in document.items() if isinstance(value, dict)}
    _check(tables, flags, f"{file}, table")
    for command, values in tables.items():
        _check(values, flags[command], f"{file}, [{command}]")
    found = {command: shared | tables.get(command, {}) for command in flags}
    return {
        command: {names[key]: value for key, value in found[command].items() if key in names}
        for command, names in flags.items()
    }


def _flags(command: Any) -> dict[str, str]:
    """{`max-loss`: `max_loss`} of a command's options; both spellings of an on/off flag."""
    return {
        flag.removeprefix("--"): parameter.name
        for parameter in command.params
        for flag in parameter.opts
        if flag.startswith("--") and flag != "--help"
    }


def _check(keys: Iterable[str], known: Iterable[str], where: str) -> None:
    known = sorted(known)
    for key in keys:
        if key not in known:
            near = get_close_matches(key, known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}."
            raise UnknownKey(f"{where}: there is no key {key!r}; {hint}")
