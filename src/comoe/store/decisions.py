"""The decision log: every choice of a run that changed its output, and its file. One bit for each use that had a floor.

What replays a log is `runtime.choices`.
"""

from base64 import b64decode, b64encode
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
from blake3 import blake3

from comoe.store.manifest import Manifest, encode
from comoe.store.untrusted import parse_json
from comoe.store.whole import whole
from comoe.types import UsageError

FORMAT_VERSION = 1


class Conditions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What outputs depend on beside choices; `pack` is `identity`, `threads` torch's, `kernel` comoe's."""

    pack: str
    floor: str | None
    target: str
    max_loss: float
    dtype: str
    threads: int
    kernel: str


class Switch(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The plan changed before choice number `choice` of a request: to `capacity` bytes of experts and a threshold.

    A threshold of None is infinite: any miss may take the floor. `reason` is `memory`, `pressure`, `room`, `domain`
    or `asked`.
    """

    choice: int
    reason: str
    capacity: int
    wait_threshold: float | None


class Request(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a request chose. `asked` is the hash of its prompt and sampling; `floors` the packed bits of `choices`."""

    asked: str
    choices: int
    floors: str
    switches: tuple[Switch, ...] = ()

    def bits(self) -> list[bool]:
        """Whether each use took the floor, in order. ValueError where there are not so many bits as choices."""
        packed = np.frombuffer(b64decode(self.floors, validate=True), np.uint8)
        if len(packed) != -(-self.choices // 8):
            raise ValueError("bits are missing, or left over")
        return [bool(bit) for bit in np.unpackbits(packed, count=self.choices)]


class Decisions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A session's log."""

    format_version: int
    conditions: Conditions
    requests: tuple[Request, ...]


def packed(floors: Sequence[bool]) -> str:
    """What `Request.floors` holds of these choices."""
    return b64encode(np.packbits(np.array(floors, np.bool_)).tobytes()).decode()


def identity(manifest: Manifest) -> str:
    """The hash of all that a pack is, but for where its checkpoint lies."""
    source = manifest.source and msgspec.structs.replace(manifest.source, folder="")
    return blake3(encode(msgspec.structs.replace(manifest, source=source))).hexdigest()


def write_decisions(path: Path, decisions: Decisions) -> None:
    """Write the log to the file `path`, which is whole or as it was. OSError where that cannot be."""
    with whole(path) as file:
        file.write(encode(decisions))


def read_decisions(path: Path) -> Decisions:
    """The log in the file `path`. Raises UsageError."""
    try:
        found = msgspec.convert(parse_json(path.read_bytes()), Decisions)
        for request in found.requests:
            request.bits()
        if found.format_version == FORMAT_VERSION:
            return found
    except FileNotFoundError as error:
        raise UsageError(f"there is no decision log {path}: `comoe run --decisions` writes one.") from error
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} holds no decision log, or a damaged one: record it again.") from error
    raise UsageError(f"{path} is a decision log of another version of comoe: record it again.")
