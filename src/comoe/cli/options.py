"""Flags that several commands share, each spelled and explained once, and what they mean together."""

import os
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from typer import Argument, Option

from comoe.net.address import Access
from comoe.types import UsageError
from comoe.units import parse_link, parse_share, parse_size


def switch(name: str, help: str) -> Any:
    """An on/off flag, with what turns it off again where the environment (COMOE_NAME) or comoe.toml turned it on."""
    twin = f"COMOE_{name.upper().replace('-', '_')}"
    return Option(f"--{name}/--no-{name}", envvar=twin, show_default=False, help=help)


PackPath = Annotated[Path, Argument(metavar="PACK", help="A folder that `comoe pack` made.", show_default=False)]
PackPlace = Annotated[
    str,
    Argument(
        metavar="PACK",
        help="A folder that `comoe pack` made, or where one is published: http(s)://, s3://.",
        show_default=False,
    ),
]
CacheFolder = Annotated[
    Path | None,
    Option(
        envvar="COMOE_CACHE",
        metavar="FOLDER",
        help="Where experts from the network are kept; by default ~/.cache/comoe.",
    ),
]
CacheSize = Annotated[
    str | None,
    Option(
        envvar="COMOE_CACHE_SIZE",
        metavar="SIZE",
        help="What they may take there: 8GiB; by default that, or half of what is free.",
    ),
]
TokenFile = Annotated[
    Path | None,
    Option(
        envvar="COMOE_TOKEN_FILE", metavar="FILE", help="A bearer token for the network; or the variable COMOE_TOKEN."
    ),
]
Link = Annotated[
    str | None,
    Option(
        envvar="COMOE_LINK",
        metavar="RATE,RTT",
        help="The link that experts come over, such as 40Mbit,20ms: planned for; files and answers keep within it.",
    ),
]
Json = Annotated[bool, switch("json", "Print one JSON document on stdout.")]
Memory = Annotated[
    str | None,
    Option(envvar="COMOE_MEMORY", metavar="SIZE", help="Memory of the whole process, a hard limit: 4GiB."),
]
ExpertMemory = Annotated[
    str | None,
    Option(
        envvar="COMOE_EXPERT_MEMORY",
        metavar="SIZE|PERCENT",
        help="Memory of the experts alone: 800MiB, or 30% of their bf16 bytes.",
    ),
]
MaxLoss = Annotated[
    str | None,
    Option(
        envvar="COMOE_MAX_LOSS",
        metavar="PERCENT",
        help="Bound of the loss in nats per token, in percent: 2% or 2; 0 is exact. In comoe.toml with its sign.",
    ),
]
Exact = Annotated[bool, switch("exact", "Exactly the checkpoint's outputs: no loss.")]
Context = Annotated[
    int | None,
    Option(envvar="COMOE_CONTEXT", min=1, metavar="TOKENS", help="Longest prompt and answer together."),
]
Dtype = Annotated[
    str | None,
    Option(
        envvar="COMOE_DTYPE",
        metavar="DTYPE",
        help="Compute in float32, bfloat16 or float16; by default as the checkpoint.",
    ),
]
Threads = Annotated[
    int | None, Option(envvar="COMOE_THREADS", min=1, metavar="N", help="Compute threads; by default all cores.")
]
Seed = Annotated[int, Option(envvar="COMOE_SEED", min=0, max=2**63 - 1, metavar="N", help="Seed of everything random.")]
Source = Annotated[
    Path | None,
    Option(
        envvar="COMOE_SOURCE", metavar="FOLDER", help="Where the checkpoint is now, if it moved since it was packed."
    ),
]
ProfilePath = Annotated[
    Path | None,
    Option(
        envvar="COMOE_PROFILE",
        metavar="FILE",
        help="How text uses experts: plans are for text like that. A run adds its own, and makes the file.",
    ),
]

PolicyName = Annotated[
    str, Option(envvar="COMOE_POLICY", metavar="lru|lfu|gdsf", help="Which experts leave the cache first.")
]


def token_in(file: Path) -> str:
    """The token in a file, without white space around it. Raises UsageError where it cannot be read."""
    try:
        return file.read_text("ascii").strip()
    except (OSError, UnicodeError) as error:
        raise UsageError(f"{file}: no token can be read from it: {error}.") from error


def access(cache: Path | None, cache_size: str | None, token_file: Path | None, link: str | None) -> Access:
    """The flags taken together. Raises UsageError."""
    token = os.environ.get("COMOE_TOKEN") if token_file is None else token_in(token_file)
    nbytes = parse_size(cache_size) if cache_size is not None else None
    return Access(cache, nbytes, token, link=parse_link(link) if link is not None else None)


class Wish(NamedTuple):
    """How much memory, and which loss, as flags ask for them; `max_loss` is a fraction."""

    memory: str | None
    expert_memory: str | None
    max_loss: float


def wish(memory: str | None, expert_memory: str | None, max_loss: str | None, exact: bool) -> Wish:
    """The flags taken together. Raises UsageError where they contradict each other."""
    bound = parse_share(max_loss or "0")
    if exact and bound:
        raise UsageError("--exact allows no loss: leave out --exact or --max-loss.")
    if memory and expert_memory:
        raise UsageError("give --memory for the whole process or --expert-memory, not both.")
    return Wish(memory, expert_memory, bound)
