"""What a layer's experts are given foretells which experts the next layer uses: logistic regressions on calibration.

The next layer's own norm and router on this layer's residual are such a map too, and need no text; but between lie
this layer's experts and an attention, on which the map that is fitted to text has an opinion: see decisions/017.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from comoe.make.calibrate import LayerInputs
from comoe.store.foresight import Foresight, Link

STEPS = 40
"""Of L-BFGS: a hundred find hardly better weights."""

MOST_TOKENS = 32768
DECAY = 1e-6


def foresight(seen: Callable[[int], LayerInputs], experts: Sequence[int]) -> Foresight:
    """The weights of every link between layers of so many `experts`; `seen` answers what a layer saw, of one text."""
    links = links_of([len(seen(layer).index) for layer in range(len(experts))])
    return {link: _fitted(*_pairs(link, seen), experts[link.target]).numpy() for link in links}


def links_of(tokens: Sequence[int]) -> Iterator[Link]:
    """Layers that follow each other, and the last and the first of those that decode, which the next token begins with.

    `tokens` came to each. An encoder's layers saw another number than a decoder's: no link leads from one to the other.
    """
    first = 0
    for at in range(1, len(tokens)):
        if tokens[at] != tokens[at - 1]:
            first = at
        elif tokens[at]:
            yield Link(at - 1, at)
    if len(tokens) - first > 1 and tokens[-1] > 1:
        yield Link(len(tokens) - 1, first, later=True)


def _pairs(link: Link, seen: Callable[[int], LayerInputs]) -> tuple[Tensor, Tensor]:
    """Inputs (T, H) of a link's layer and what its target chose (T, K), of tokens spread over all."""
    x, index = seen(link.layer).x, seen(link.target).index
    if link.later:
        x, index = x[:-1], index[1:]
    keep = -(-len(x) // MOST_TOKENS)
    return x[::keep], index[::keep]


@torch.enable_grad()
def _fitted(x: Tensor, index: Tensor, num_experts: int) -> Tensor:
    """Weights (H + 1, E) of the least cross entropy for what was chosen."""
    used = torch.zeros(len(x), num_experts + 1).scatter_(1, index.clamp(max=num_experts), 1.0)[:, :num_experts]
    given = torch.cat([x, torch.ones(len(x), 1)], 1)
    weights = torch.zeros(given.shape[1], num_experts, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=STEPS, history_size=8, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        found = F.binary_cross_entropy_with_logits(given @ weights, used) + DECAY * weights.square().sum()
        found.backward()  # type: ignore[no-untyped-call]
        return found

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    most = torch.finfo(torch.float16).max
    return weights.detach().clamp(-most, most)
