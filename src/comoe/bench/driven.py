"""A device under way: `python -m comoe.bench.driven ORDERS` decodes given tokens from a pack on the network.

One JSON line for every token, and one at the end of the window, whatever happens meanwhile. It is told to begin by a
line on stdin, when its pack is open and links are what they should be. What lines mean is `bench.driven_figures`'s.
"""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import count
from pathlib import Path
from threading import Lock, Timer
from time import monotonic, sleep
from typing import Any, NamedTuple

import torch
from torch.nn.functional import cross_entropy

from comoe.bench.corpus import valid_texts
from comoe.bench.driven_figures import Known
from comoe.make.protocol import Evaluation
from comoe.make.trace import CONTEXT, turns
from comoe.net import origin
from comoe.net.address import Access
from comoe.net.place import open_pack
from comoe.runtime.generate import quiet_transformers, tokenizer_of
from comoe.runtime.load import load
from comoe.store.manifest import read_manifest
from comoe.types import ComoeError

PROMPT_TOKENS = 4

SLOW_S = 60.0
"""What reading a blob is said to take where everything that misses is to run elsewhere."""


class Step(NamedTuple):
    """A decoded token: its nats, the likeliest token in its place, and the milliseconds of the call."""

    nats: float
    greedy: int
    ms: float


@torch.no_grad()
def steps(evaluation: Evaluation, prompt: Sequence[int], target: Sequence[int]) -> Iterator[Step]:
    """Every token of `target`, teacher-forced, one call each."""
    wanted = torch.tensor(target)
    token, state = evaluation.begin(torch.tensor([prompt]), 1)
    for at in range(len(target)):
        start_s = monotonic()
        output = evaluation.model(**{evaluation.tokens_argument: token}, **state, use_cache=True)
        ms = 1e3 * (monotonic() - start_s)
        logits = output.logits[0, -1].float()
        yield Step(float(cross_entropy(logits, wanted[at])), int(logits.argmax()), ms)
        token, state = wanted[at].view(1, 1), {**state, "past_key_values": output.past_key_values}


def reading(pack: Path, shared: Path, num_tokens: int) -> tuple[list[tuple[list[int], list[int]]], list[Known]]:
    """What devices are to decode, (prompt, target) of a window of each validation text and about `num_tokens` in all,
    and what the exact model, all in memory, makes of it. A decoder's prompts are short, so that nothing is prefill."""
    whole = 2 * read_manifest(pack).expert_bytes_bf16
    model = load(str(pack), expert_memory=whole, context=CONTEXT, threads=1)
    with model.comoe:
        evaluation = Evaluation.for_model(model, tokenizer_of(pack))
        texts = list(valid_texts(shared / "data" / "corpus", None).values())
        first = 0 if model.config.is_encoder_decoder else -PROMPT_TOKENS
        cut = [(turn.prompt[first:], turn.target) for turn in turns(evaluation, texts, num_tokens)]
        found = [list(steps(evaluation, *of)) for of in cut]
    return cut, [Known([step.nats for step in of], [step.greedy for step in of]) for of in found]


class Driven:
    """A device with `orders`: `pack`, `cache` and `cache_bytes`; `load` for `comoe.load`; `remote_only`; whether the
    plan `stays`; `turns` of (prompt, target), again and again; `seconds` of them, no faster than one in `reader_s`.

    `piece_nbytes` are noticed when they come: a link that is slowed down brings smaller pieces in the same time.
    """

    def __init__(self, orders: dict[str, Any]) -> None:
        self._orders = orders
        origin.CHUNK_BYTES = orders["piece_nbytes"]
        self._access = Access(Path(orders["cache"]), orders["cache_bytes"])
        self._pack = open_pack(orders["pack"], None, self._access)
        self._tokenizer = tokenizer_of(self._pack.folder)
        self._model: Any = None
        self._writing = Lock()
        self._begun_s = self._loaded_s = 0.0

    def run(self) -> None:
        """The window; the process ends with it."""
        self._begun_s = monotonic()
        timer = Timer(self._orders["seconds"], self._end)
        timer.daemon = True
        timer.start()
        self._write({"begun_s": self._begun_s})
        try:
            self._load()
            self._decode()
        except ComoeError as error:
            self._end(str(error))

    def _decode(self) -> None:
        evaluation, due_s = Evaluation.for_model(self._model, self._tokenizer), 0.0
        for turn in count():
            prompt, target = self._orders["turns"][turn % len(self._orders["turns"])]
            self._model.comoe.begin_request()
            for at, step in enumerate(steps(evaluation, prompt, target)):
                at_s = self._now_s
                self._write({"turn": turn, "at": at, "at_s": at_s, **self._edge(), **step._asdict()})
                due_s = max(at_s, due_s + self._orders["reader_s"])
                sleep(max(0.0, due_s - self._now_s))

    def _load(self) -> None:
        model = load(self._pack, threads=1, access=self._access, **self._orders["load"])
        if self._orders["stays"] and model.comoe.following is not None:
            model.comoe.following.close()
        if self._orders["remote_only"]:
            serving = model.comoe._serving
            serving.remote._read_s = lambda blob: SLOW_S
            serving.cache.used_elsewhere = lambda groups: None
        self._model, self._loaded_s = model, self._now_s

    def _edge(self) -> dict[str, int]:
        """What nodes ran so far, and what of it they had to read first; nothing where none runs any."""
        remote = self._model.comoe._serving.remote
        return {"edge_runs": remote.counts.uses, "edge_read": remote.counts.read} if remote is not None else {}

    @property
    def _now_s(self) -> float:
        return monotonic() - self._begun_s

    def _write(self, line: dict[str, Any]) -> None:
        with self._writing:
            print(json.dumps(line), flush=True)

    def _end(self, failed: str | None = None) -> None:
        """The window is over, or decoding failed: tell what there is to tell, and go, also from amid a token."""
        found: dict[str, Any] = {"failed": failed, "stats": None, "loaded_s": None, "events": [], "links": {}}
        if self._model is not None:
            handle = self._model.comoe
            found |= {"stats": handle.stats(), "loaded_s": self._loaded_s}
            if handle.nodes is not None:
                found["events"] = [event._replace(at_s=event.at_s - self._begun_s) for event in handle.nodes.log]
                found["links"] = {node: asdict(link) for node, link in handle.nodes.links().items()}
        self._write(found)
        os._exit(0)


def main() -> None:
    """Read the orders, open the pack, say so, and wait for the word."""
    quiet_transformers()
    device = Driven(json.loads(Path(sys.argv[1]).read_text("utf-8")))
    print(json.dumps({"ready_s": monotonic()}), flush=True)
    sys.stdin.readline()
    device.run()


if __name__ == "__main__":
    main()
