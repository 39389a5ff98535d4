"""Records the trace of a served model: which experts every call of it uses."""

from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
from torch import Tensor

from comoe.memory.predict import Learned, likeliest
from comoe.runtime.layer import Use, floats
from comoe.store.foresight import Floats, Foresight, Link, read_foresight
from comoe.store.trace import Foreseen, Trace

LEAST_CHANCE = 0.05
"""What is foreseen with less is not recorded."""


class Recorder:
    """What was used so far, in the order in which layers were called, and what `foresight` said would be."""

    def __init__(self, experts: Sequence[int], foresight: Foresight) -> None:
        self._experts, self._predictor = experts, Learned(foresight)
        self._links = {link.layer: link for link in foresight}
        self._foreseen, self._candidate, self._chance = array("q", [0]), array("i"), array("f")
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

    def add(self, layer: int, x: Tensor, uses: Sequence[Use]) -> None:
        """A chunk of tokens, which give `x` (N, H) to experts, used these."""
        self._came[layer] += len(x)
        self._layers.append(layer)
        for use in uses:
            self._expert.append(use.expert)
            self._count.append(len(use.tokens))
            self._gate.append(use.gate)
        self._uses.append(len(self._expert))
        self._foresee(self._links.get(layer), floats(x))

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
            ahead=self._ahead if self._candidate else None,
        )

    @property
    def _ahead(self) -> Foreseen:
        return Foreseen(
            np.array(self._foreseen, np.int64),
            np.array(self._candidate, np.int32),
            np.array(self._chance, np.float32),
        )

    def _foresee(self, link: Link | None, x: Floats) -> None:
        if link is not None:
            chances = self._predictor.chances(link, x[-1:] if link.later else x)
            for expert in likeliest(chances, LEAST_CHANCE):
                self._candidate.append(expert)
                self._chance.append(float(chances[expert]))
        self._foreseen.append(len(self._candidate))


@contextmanager
def recording(model: Any) -> Iterator[Recorder]:
    """Record what a served `model` uses, while it lasts. A call of an encoder alone is a pass, too."""
    pack = model.comoe.pack
    experts = [layer.num_experts for layer in pack.manifest.layers]
    recorder = Recorder(experts, read_foresight(pack.folder, experts))
    called = [model, model.get_encoder()] if model.config.is_encoder_decoder else [model]
    with ExitStack() as stack:
        for module in called:
            stack.callback(module.register_forward_pre_hook(lambda *_: recorder.end_pass()).remove)
        stack.enter_context(model.comoe.heeded(recorder.add))
        yield recorder
