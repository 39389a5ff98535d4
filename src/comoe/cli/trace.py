"""`comoe trace`: which experts text uses, in order, recorded for comparisons of caches."""

from pathlib import Path
from typing import Annotated

from typer import Option

from comoe.cli.options import Dtype, ExpertMemory, Json, Memory, PackPath, Source, Threads, wish
from comoe.cli.profile import check_new, writing
from comoe.cli.terminal import print_json, progress_bar
from comoe.store.manifest import read_manifest
from comoe.store.trace import Trace, write_trace
from comoe.types import UsageError
from comoe.units import format_size


def command(
    pack: PackPath,
    output: Annotated[Path, Option("--output", "-o", metavar="FILE", help="The trace to write; it must not exist.")],
    prompt: Annotated[str | None, Option("--prompt", "-p", metavar="TEXT", help="Text to read.")] = None,
    calib: Annotated[
        list[Path] | None, Option(metavar="FILE...", help="Texts to read, taking turns; several may follow.")
    ] = None,
    tokens: Annotated[
        int, Option(envvar="COMOE_TOKENS", min=1, metavar="N", help="About so many tokens, as many of each text.")
    ] = 2048,
    memory: Memory = None,
    expert_memory: ExpertMemory = None,
    dtype: Dtype = None,
    threads: Threads = None,
    source: Source = None,
    json: Json = False,
) -> None:
    """Record which experts text uses, in order.

    \b
    comoe trace qwen.comoe --calib novel.txt -o novel.trace

    The exact model reads the text in windows, of each a prompt at once and the rest token by token, as if it were its
    own answer. Caches of any size and policy can then be compared on the trace, without the model.
    """
    from comoe.make.trace import CONTEXT, record
    from comoe.runtime.generate import quiet_transformers, tokenizer_of
    from comoe.runtime.load import load

    texts = _texts(prompt, calib)
    check_new(output)
    budget = wish(memory, expert_memory, None, True)
    quiet_transformers()
    read_manifest(pack)  # says what is wrong with the folder before a tokenizer does
    tokenizer = tokenizer_of(pack)
    with progress_bar() as progress:
        model = load(
            pack, budget.memory, budget.expert_memory, context=CONTEXT, dtype=dtype, threads=threads, source=source
        )
        with model.comoe:
            trace = record(model, tokenizer, texts, tokens, progress)
    with writing(output):
        write_trace(output, trace)
    _show(output, trace, json)


def _texts(prompt: str | None, calib: list[Path] | None) -> list[str]:
    if (prompt is None) == (not calib):
        raise UsageError("give text to read: --prompt or --calib, one of them.")
    if prompt is not None:
        return [prompt]
    try:
        return [path.read_text("utf-8") for path in calib or ()]
    except (OSError, UnicodeError) as error:
        raise UsageError(f"the text cannot be read as UTF-8 text: {error}.") from error


def _show(path: Path, trace: Trace, json: bool) -> None:
    decoded = int((trace.tokens == 1).sum())
    nbytes = path.stat().st_size
    if json:
        sizes = {"passes": len(trace.tokens), "decoded": decoded, "layers": len(trace.experts)}
        print_json({"trace": str(path), **sizes, "uses": len(trace.expert), "bytes": nbytes})
        return
    print(
        f"{path}: {len(trace.expert):,} uses of experts in {len(trace.tokens):,} passes, {decoded:,} of them of one "
        f"token; {format_size(nbytes)}."
    )
