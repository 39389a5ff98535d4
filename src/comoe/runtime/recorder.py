"""Records the trace of a served model: which experts every call of it uses."""

from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np

from comoe.runtime.layer import Use
from comoe.store.trace import Trace


class Recorder:
    """What was used so far, in the order in which layers were called."""

    def __init__(self, experts: Sequence[int]) -> None:
        self._experts = experts
        self._tokens, self._chunks = array("q"), array("q", [0])
        self._layers, self._uses = array("i"), array("q", [0])
        self._expert, self._count, self._gate = array("i"), array("i"), array("f")
        self._came = Counter[int]()  # tokens by layer in the pass that is recorded

    def end_pass(self) -> None:
        """What comes next is another call of the model. Its tokens are the most that came to a layer."""
        if self._came:
            self._tokens.append(max(self._came.values()))
            self._chunks.append(len(self._layers))
            self._came.clear()

    def add(self, layer: int, tokens: int, uses: Sequence[Use]) -> None:
        """A chunk of so many tokens used these experts."""
        self._came[layer] += tokens
        self._layers.append(layer)
        for use in uses:
            self._expert.append(use.expert)
            self._count.append(len(use.tokens))
            self._gate.append(use.gate)
        self._uses.append(len(self._expert))

    def trace(self) -> Trace:
        """All of it."""
        self.end_pass()
        return Trace(
            experts=np.array(self._experts, np.int64),
            tokens=np.array(self._tokens, np.int64),
            chunks=np.array(self._chunks, np.int64),
            layers=np.array(self._layers, np.int32),
            uses=np.array(self._uses, np.int64),
            expert=np.array(self._expert, np.int32),
            count=np.array(self._count, np.int32),
            gate=np.array(self._gate, np.float32),
        )


@contextmanager
def recording(model: Any) -> Iterator[Recorder]:
    """Record what a served `model` uses, while it lasts. A call of an encoder alone is a pass, too."""
    recorder = Recorder([layer.num_experts for layer in model.comoe.pack.manifest.layers])
    called = [model, model.get_encoder()] if model.config.is_encoder_decoder else [model]
    with ExitStack() as stack:
        for module in called:
            stack.callback(module.register_forward_pre_hook(lambda *_: recorder.end_pass()).remove)
        stack.enter_context(model.comoe.heeded(recorder.add))
        yield recorder
