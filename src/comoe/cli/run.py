"""`comoe run`: text from a packed model inside a budget."""

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

from typer import Option

from comoe.cli.options import (
    CacheFolder,
    CacheSize,
    Context,
    Dtype,
    Exact,
    ExpertMemory,
    Json,
    Link,
    MaxLoss,
    Memory,
    PackPlace,
    PolicyName,
    ProfilePath,
    Seed,
    Source,
    Threads,
    TokenFile,
    Wish,
    access,
    switch,
    wish,
)
from comoe.cli.profile import alone, check_place, keep, writing
from comoe.cli.terminal import print_json, say, say_what_is_logged
from comoe.defaults import CONTEXT, MAX_NEW_TOKENS, POLICY, PREFETCH, ROUTING_BIAS, SEED, TEMPERATURE, TOP_K, TOP_P
from comoe.net.address import Access, host_port, is_url
from comoe.net.place import open_pack
from comoe.store.decisions import write_decisions
from comoe.store.manifest import read_manifest
from comoe.store.pack import Pack
from comoe.store.profile import read_profile
from comoe.types import UsageError
from comoe.units import format_size

if TYPE_CHECKING:
    from comoe.runtime.generate import Sampling


def command(
    pack: PackPlace,
    prompt: Annotated[str | None, Option("--prompt", "-p", metavar="TEXT", help="Text to go on from.")] = None,
    prompt_file: Annotated[Path | None, Option(metavar="FILE", help="The same from a file; - is stdin.")] = None,
    max_new_tokens: Annotated[
        int,
        Option("--max-new-tokens", "-n", envvar="COMOE_MAX_NEW_TOKENS", metavar="N", help="Most tokens to generate."),
    ] = MAX_NEW_TOKENS,
    ignore_eos: Annotated[bool, switch("ignore-eos", "Go on after the end of the text.")] = False,
    temperature: Annotated[
        float, Option(envvar="COMOE_TEMPERATURE", metavar="T", help="Randomness; 0 always takes the likeliest token.")
    ] = TEMPERATURE,
    top_k: Annotated[
        int, Option(envvar="COMOE_TOP_K", metavar="N", help="Choose among so many likeliest tokens; 0: all.")
    ] = TOP_K,
    top_p: Annotated[
        float, Option(envvar="COMOE_TOP_P", metavar="P", help="Choose among the likeliest of this probability.")
    ] = TOP_P,
    seed: Seed = SEED,
    stop: Annotated[
        list[str] | None, Option(metavar="TEXT...", help="Stop before this text, or the first of several.")
    ] = None,
    chat: Annotated[bool, switch("chat", "Frame the prompt by the model's chat template.")] = False,
    memory: Memory = None,
    expert_memory: ExpertMemory = None,
    max_loss: MaxLoss = None,
    exact: Exact = False,
    context: Context = None,
    dtype: Dtype = None,
    threads: Threads = None,
    source: Source = None,
    cache: CacheFolder = None,
    cache_size: CacheSize = None,
    token_file: TokenFile = None,
    link: Link = None,
    edge: Annotated[
        list[str] | None,
        Option(
            envvar="COMOE_EDGE",
            metavar="URL...",
            help="Edge nodes that send this pack, and run what misses.",
        ),
    ] = None,
    metrics: Annotated[
        str | None,
        Option(envvar="COMOE_METRICS", metavar="HOST:PORT", help="Show counters here, for Prometheus, while it runs."),
    ] = None,
    profile: ProfilePath = None,
    policy: PolicyName = POLICY,
    prefetch: Annotated[
        str,
        Option(envvar="COMOE_PREFETCH", metavar="auto|on|off", help="Read experts ahead; auto: while it saves time."),
    ] = PREFETCH,
    live: Annotated[
        bool | None,
        switch("live", "Give memory back while others need it; by default where no memory is given."),
    ] = None,
    deterministic: Annotated[
        bool, switch("deterministic", "Outputs depend on nothing measured or cached: one form for each expert.")
    ] = False,
    decisions: Annotated[
        Path | None, Option(metavar="FILE", help="Write down each choice that the output depends on.")
    ] = None,
    replay: Annotated[
        Path | None, Option(metavar="FILE", help="Choose as this log says: the same output, to the bit.")
    ] = None,
    routing_bias: Annotated[
        float,
        Option(
            envvar="COMOE_ROUTING_BIAS",
            metavar="LOGITS",
            help="Let decoding prefer experts in memory, within --max-loss: 1 is mild, 4 strong, 0 off.",
        ),
    ] = ROUTING_BIAS,
    json: Json = False,
) -> None:
    """Generate text inside a budget.

    \b
    comoe run qwen.comoe --memory 4GiB --prompt "Once upon a time"

    Without a prompt it asks for one, again and again. Text goes to stdout as it comes, figures to stderr.
    """
    from comoe.runtime.generate import Sampling

    sampling = Sampling(max_new_tokens, temperature, top_k, top_p, seed, tuple(stop or ()), ignore_eos)
    say_what_is_logged()
    reach = access(cache, cache_size, token_file, link)
    place = _place(pack, source, reach)
    session = Session(place, wish(memory, expert_memory, max_loss, exact), sampling, chat=chat)
    if link is not None and not is_url(pack) and not edge:
        say(f"{pack} is on this machine and no --edge is given: --link changes nothing.")
    given = _given(prompt, prompt_file)
    if given is None and json:
        raise UsageError("--json needs a prompt: give --prompt or --prompt-file.")
    known, listen = _existing(profile), host_port(metrics) if metrics is not None else None
    if decisions is not None:
        check_place(decisions)
    how = {"policy": policy, "prefetch": prefetch, "live": live, "deterministic": deterministic}
    options: dict[str, Any] = {"dtype": dtype, "threads": threads, "source": source, "profile": known, **how}
    options |= {"routing_bias": routing_bias, "access": reach}
    session.load(given, context, edges=tuple(edge or ()), log=decisions is not None, replay=replay, **options)
    with session.model.comoe, _metered(session, listen), _profiled(session, profile), _logged(session, decisions):
        if given is None:
            session.converse(_asked())
            return
        document = session.answer(given, show=not json)
        if json:
            print_json(document)


def _place(pack: str, source: Path | None, reach: Access) -> Path | Pack:
    """The pack's folder; what is behind an address, open, with all but its experts here."""
    if not is_url(pack):
        return Path(pack)
    say(f"fetching what {pack} has beside its experts, as far as it is not here yet")
    return open_pack(pack, source, reach)


class Session:
    """A model that answers prompts."""

    def __init__(self, pack: Path | Pack, wished: Wish, sampling: "Sampling", *, chat: bool) -> None:
        from comoe.runtime.generate import quiet_transformers, tokenizer_of

        quiet_transformers()
        self._folder = pack.folder if isinstance(pack, Pack) else pack
        read_manifest(self._folder)  # says what is wrong with the folder before a tokenizer does
        self._pack, self._wished, self._sampling, self._chat = pack, wished, sampling, chat
        self._tokenizer: Any = tokenizer_of(self._folder)
        if chat and not self._tokenizer.chat_template:
            raise UsageError(f"{self._folder}: the model has no chat template: leave out --chat.")
        self._messages: list[dict[str, str]] = []
        self.model: Any = None
        self._begun = self._warned = False

    def load(self, prompt: str | None, context: int | None, **options: Any) -> None:
        """Load the model for one prompt, or for any up to `context`."""
        from comoe.runtime.load import load

        if context is None and prompt is not None:
            context = self._num_tokens(prompt) + self._sampling.max_new_tokens
        memory, expert_memory, max_loss = self._wished
        if max_loss and not read_manifest(self._folder).chain:
            say(f"{self._folder} has no certificate, so --max-loss allows nothing and outputs are exact.")
        self.model = load(self._pack, memory, expert_memory, max_loss, context=context or CONTEXT, **options)

    def converse(self, prompts: Iterable[str]) -> None:
        """Answer each prompt; one that cannot be answered is said, and the next is taken."""
        for prompt in prompts:
            try:
                self.answer(prompt, show=True)
            except UsageError as error:
                say(f"comoe: {error}")

    def answer(self, prompt: str, *, show: bool) -> dict[str, Any]:
        """Generate, and say what it took; with `show` text goes to stdout as it comes."""
        from comoe.runtime.generate import generate, prompt_ids

        framed = self._framed(prompt)
        ids = prompt_ids(self._tokenizer, self.model.config, framed)
        self._warn_of_positions(ids.shape[1] + self._sampling.max_new_tokens)
        self.model.comoe.check_context(ids.shape[1] + self._sampling.max_new_tokens)
        self._begun = False
        answer = generate(self.model, self._tokenizer, ids, self._sampling, self._show if show else lambda text: None)
        if self._chat:
            self._messages += [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer.text}]
        stats = self.model.comoe.stats()
        document = {
            "text": answer.text,
            "tokens": answer.tokens,
            "prompt_tokens": answer.prompt_tokens,
            "prefill_ms": answer.prefill_ms,
            "ms_per_token": answer.ms_per_token,
            "framework_ms_per_token": answer.framework_ms_per_token,
            **{key: stats[key] for key in ("hit_rate", "floor_rate", "bytes_read")},
            **{key: stats[key] for key in ("plan_switches", "link_failures", "link_wait_ms")},
            **{key: stats[key] for key in ("edge", "edge_events", "announced_experts")},
            **{key: stats[key] for key in ("edge_runs", "edge_read", "edge_failures", "edge_bytes")},
            **{key: stats[key] for key in ("prefetching", "prefetched_bytes", "prefetch_wasted_bytes")},
            "expert_memory_bytes": stats["resident_bytes"],
            **{key: stats[key] for key in ("peak_bytes", "beside_experts_bytes", "yielded_bytes")},
            **{key: stats[key] for key in ("loss_ledger", "calibration_distance", "like_calibration")},
            **{key: stats[key] for key in ("moved_share", "shares")},
            "plan": self.model.comoe.plan.document(),
        }
        if show:
            print()
            say(_figures(document))
        self._warn_of_text()
        return document

    def _show(self, text: str) -> None:
        """Print a piece of the answer; before the first one, what its prompt tells of the text."""
        if not self._begun:
            self._warn_of_text()
        self._begun = True
        print(text, end="", flush=True)

    def _warn_of_text(self) -> None:
        """Say once a session that the loss bound was not certified for such text."""
        handle = self.model.comoe
        if not self._warned and _may_lose_more(handle.stats()):
            self._warned = True
            say(
                f"This text uses experts unlike the pack's calibration: the bound of {handle.ledger.bound:.1%} was "
                "certified for other text. Pack with --calib on text like yours, or use --exact."
            )

    def _warn_of_positions(self, tokens: int) -> None:
        known = getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        if known and tokens > known:
            say(f"Prompt and answer have {tokens} tokens, the model was made for {known}: expect nonsense beyond.")

    def _num_tokens(self, prompt: str) -> int:
        return len(self._tokenizer(self._framed(prompt)).input_ids) + 1

    def _framed(self, prompt: str) -> str:
        if not self._chat:
            return prompt
        messages = [*self._messages, {"role": "user", "content": prompt}]
        framed: str = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return framed


def _existing(profile: Path | None) -> Path | None:
    """The profile to plan by, None where this run makes it. UsageError where that cannot be."""
    if profile is None:
        return None
    check_place(profile)
    return profile if profile.exists() else None


@contextmanager
def _metered(session: Session, place: tuple[str, int] | None) -> Iterator[None]:
    """Show a session's counters at a place, host and port, if one is given. Raises UsageError."""
    if place is None:
        yield
        return
    from comoe.serve.session import metrics_at

    with metrics_at(session.model.comoe, *place) as port:
        say(f"metrics at http://{place[0]}:{port}/metrics")
        yield


@contextmanager
def _profiled(session: Session, profile: Path | None) -> Iterator[None]:
    """Add to the file `profile` what a session routed, however it ends; another may have added to it meanwhile."""
    try:
        yield
    finally:
        if profile is not None:
            found = session.model.comoe.profile
            with alone(profile):
                keep(profile, read_profile(profile) + found if profile.exists() else found)


@contextmanager
def _logged(session: Session, decisions: Path | None) -> Iterator[None]:
    """Leave in the file `decisions` what a session chose, however it ends."""
    try:
        yield
    finally:
        if decisions is not None:
            with writing(decisions):
                write_decisions(decisions, session.model.comoe.choices.decisions())


def _given(prompt: str | None, prompt_file: Path | None) -> str | None:
    if prompt is not None and prompt_file is not None:
        raise UsageError("give --prompt or --prompt-file, not both.")
    try:
        if prompt_file is not None:
            prompt = _stdin().read() if str(prompt_file) == "-" else prompt_file.read_text("utf-8")
        (prompt or "").encode()
    except (OSError, UnicodeError) as error:
        raise UsageError(f"the prompt cannot be read as UTF-8 text: {error}.") from error
    return prompt


def _stdin() -> TextIO:
    if sys.stdin is None:  # closed by who started us
        raise UsageError("there is no prompt: give --prompt or --prompt-file.")
    return sys.stdin


def _asked() -> Iterator[str]:
    """Prompts typed, or piped, a line each, until the end of input."""
    terminal = _stdin().isatty()
    if terminal:
        say("Type a prompt; Ctrl-D ends.")
    while True:
        try:
            text = input("> " if terminal else "")
        except EOFError:
            return
        if text.strip():
            yield text


def _may_lose_more(stats: dict[str, Any]) -> bool:
    """Whether anything ran otherwise than exact, on text that no bound was certified for."""
    lossy = stats["shares"].keys() != {"exact"} or stats["moved_share"] > 0
    return lossy and stats["like_calibration"] is False


def _figures(document: dict[str, Any]) -> str:
    read = sum(document["bytes_read"].values())
    each = ""
    unlike = ", of text unlike the calibration" if _may_lose_more(document) else ""
    if document["ms_per_token"] is not None:
        outside = document["framework_ms_per_token"]
        each = f", then {document['ms_per_token']:.1f} ms each ({outside:.1f} outside experts)"
    return (
        f"{document['tokens']} tokens, first after {document['prefill_ms']:.0f} ms{each}; "
        f"{document['hit_rate']:.0%} of experts in memory, {format_size(read)} read; "
        f"experts {format_size(document['expert_memory_bytes'])}, "
        f"process {format_size(document['peak_bytes'])} at most; loss {document['loss_ledger']:.2%}{unlike}."
    )
