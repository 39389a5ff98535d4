"""What an edge node says of itself when it is asked: whether it serves a pack, and where, and whether bytes come to it.
Who asks is elsewhere."""

import json
from urllib.parse import quote

from comoe.types import RemoteUnavailable, UsageError

PATH = "/health"
MOST_NBYTES = 1 << 20
"""Of an answer, what is read."""


def unknown_token(url: str) -> UsageError:
    """What to say of a node that refuses a device's token, or its having none."""
    return UsageError(f"{url} does not know this token: give the file of its token as --token-file.")


def came_in(data: bytes) -> int:
    """Bytes that came to a node from where its packs are published, as it answered; 0 where it does not say."""
    try:
        return int(json.loads(data)["came"])
    except (ValueError, RecursionError, TypeError, KeyError, OverflowError):
        return 0


def folder_in(data: bytes, identity: str, url: str) -> str:
    """Where the node at `url` serves the pack whose manifest has the SHA-256 `identity`, as it answered: /packs/NAME.

    Raises RemoteUnavailable where it has other packs, or is no edge node.
    """
    try:
        packs = json.loads(data)["packs"]
        names = [str(name) for name, found in packs.items() if found == identity]
    except (ValueError, RecursionError, TypeError, KeyError, AttributeError) as error:
        raise RemoteUnavailable(f"{url} is no edge node: it has no health to tell.") from error
    if not names:
        raise RemoteUnavailable(f"{url} does not serve this pack: start `comoe edge` with the same one.")
    return f"/packs/{quote(names[0], safe='')}"
