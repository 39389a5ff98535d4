"""How well the next layer's experts can be foretold at all: one JSON document on stdout.

The pack's own foresight is a linear map from what a layer's experts are given. Beside it stand networks with a hidden
layer that are given as much, or more of what a device knows then: what experts of this layer and of all before it
were given, which of this layer's are used, and which of the next layer's the token before used. Each is fitted to a
quarter of the calibration text and to all of it, so that it shows whether more text would help, and judged on other
text. The exact model reads whole windows; no network would be quick enough to be used. Raw results in predictors.json.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from comoe.bench.corpus import valid_texts
from comoe.bench.rows import Row
from comoe.device.machine import machine
from comoe.make.calibrate import texts_of
from comoe.make.protocol import Evaluation
from comoe.make.text import windows
from comoe.runtime.generate import quiet_transformers, tokenizer_of
from comoe.runtime.layer import Use
from comoe.runtime.load import Loader
from comoe.runtime.options import Options
from comoe.store.pack import Pack

FITTED, JUDGED, QUARTER = 24, 6, 4
"""Windows of each domain, and the part of the fitted ones that shows whether more would help."""

HIDDEN, EPOCHS, PATIENCE, BATCH, RATE = 512, 60, 3, 2048, 2e-3
HELD_OUT = 8
"""One token in so many of the fitted ones says when to stop."""


class Seen(NamedTuple):
    """What a layer was given (T, H), and which of its experts it used (T, E)."""

    x: Tensor
    used: Tensor


class Sample(NamedTuple):
    """What a predictor is given (T, D), and what comes (T, E)."""

    given: Tensor
    comes: Tensor


def seen(model: Any, tokenizer: Any, texts: Sequence[str], per_text: int) -> list[list[Seen]]:
    """What the layers saw, one by one, of every window."""
    experts = [layer.num_experts for layer in model.comoe.pack.manifest.layers]
    evaluation, found = Evaluation.for_model(model, tokenizer), []
    for text in texts:
        for window in windows(tokenizer, text, evaluation.window_length, per_text):
            layers: dict[int, Seen] = {}

            def heed(layer: int, x: Tensor, uses: Sequence[Use], layers: dict[int, Seen] = layers) -> None:
                used = torch.zeros(len(x), experts[layer])
                for use in uses:
                    used[use.tokens, use.expert] = 1.0
                layers[layer] = Seen(x.float().clone(), used)

            with model.comoe.heeded(heed):
                evaluation.nats([window])
            found.append([layers[layer] for layer in sorted(layers)])
    return found


def decoding(window: Sequence[Seen]) -> list[Seen]:
    """The layers that decode: an encoder's saw another number of tokens."""
    return [layer for layer in window if len(layer.x) == len(window[-1].x)]


def sample(found: Sequence[Sequence[Seen]], target: int, *, everything: bool) -> Sample:
    """What is known when the layer before `target` begins, and what `target` uses: of the first layer, one token
    later."""
    given, comes = [], []
    for layers in map(decoding, found):
        there, later = layers[target], int(target == 0)
        passed = layers if later else layers[:target]
        known = [passed[-1].x]
        if everything:
            before = there.used if later else F.pad(there.used, (0, 0, 1, 0))[:-1]
            known = [*(layer.x for layer in passed), passed[-1].used, before]
        given.append(torch.cat(known, 1)[: len(there.x) - later])
        comes.append(there.used[later:])
    return Sample(torch.cat(given), torch.cat(comes))


def recall(chances: Tensor, comes: Tensor, times: int) -> float:
    """Of what a token uses, the share among so many times as many that were held likeliest."""
    count = int(comes[0].sum())
    likeliest = chances.topk(min(times * count, chances.shape[1]), dim=1).indices
    return float(comes.gather(1, likeliest).sum() / comes.sum())


def fit(of: Sample, hidden: int) -> nn.Module:
    """A network with a hidden layer, or none where `hidden` is 0; stopped when tokens that it is not fitted to say."""
    torch.manual_seed(0)
    width, experts = of.given.shape[1], of.comes.shape[1]
    deep = [nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, experts)]
    network = nn.Sequential(nn.BatchNorm1d(width, affine=False), *(deep if hidden else [nn.Linear(width, experts)]))
    held = torch.arange(len(of.given)) % HELD_OUT == 0
    x, y, held_x, held_y = of.given[~held], of.comes[~held], of.given[held], of.comes[held]
    optimizer = torch.optim.AdamW(network.parameters(), RATE, weight_decay=0.01)
    best, best_state, since = np.inf, {}, 0
    for _ in range(EPOCHS):
        network.train()
        for rows in torch.randperm(len(x)).split(BATCH):
            optimizer.zero_grad()
            F.binary_cross_entropy_with_logits(network(x[rows]), y[rows]).backward()
            optimizer.step()
        network.eval()
        with torch.no_grad():
            loss = float(F.binary_cross_entropy_with_logits(network(held_x), held_y))
        since += 1
        if loss < best:
            best, since = loss, 0
            best_state = {name: value.clone() for name, value in network.state_dict().items()}
        if since == PATIENCE:
            break
    network.load_state_dict(best_state)
    return network


KINDS = {"linear": (0, False), "network": (HIDDEN, False), "network, more of what is known": (HIDDEN, True)}


def layer_row(fitted: Sequence[Any], judged: Sequence[Any], target: int) -> Row:
    """What each kind of predictor foretells of a layer."""
    row: Row = {"layer": target, "recall": {}}
    for name, (hidden, everything) in KINDS.items():
        other = sample(judged, target, everything=everything)
        for part, some in (("a quarter", fitted[::QUARTER]), ("all", fitted)):
            network = fit(sample(some, target, everything=everything), hidden)
            with torch.no_grad():
                chances = network(other.given)
            found = [recall(chances, other.comes, times) for times in (1, 2)]
            row["recall"][f"{name}; {part}"] = found
            print(f"layer {target}: {name}, {part} of the text: {found[0]:.3f} ({found[1]:.3f})", file=sys.stderr)
    return row


def measure(folder: Path, shared: Path) -> Row:
    """All layers that decode, of a pack's model."""
    model = Loader(Pack(folder), Options(dtype="float32")).resident("exact")
    tokenizer, corpus = tokenizer_of(folder), shared / "data" / "corpus"
    with model.comoe, torch.no_grad():
        fitted = seen(model, tokenizer, [text.text for text in texts_of(sorted(corpus.glob("*.calib.txt")))], FITTED)
        judged = seen(model, tokenizer, list(valid_texts(corpus, None).values()), JUDGED)
    rows = [layer_row(fitted, judged, target) for target in range(len(decoding(judged[0])))]
    tokens = {name: sum(len(window[-1].x) for window in of) for name, of in (("fitted", fitted), ("judged", judged))}
    return {"model": folder.name, "tokens": tokens, "layers": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pack", type=Path, nargs="+")
    parser.add_argument("--shared", type=Path, required=True, help="The folder of the shared texts.")
    asked = parser.parse_args()
    quiet_transformers()
    torch.set_num_threads(2)
    rows = [measure(pack, asked.shared) for pack in asked.pack]
    for row in rows:
        names = row["layers"][0]["recall"]
        row["mean"] = {name: np.mean([of["recall"][name] for of in row["layers"]], 0).tolist() for name in names}
        row["least"] = {name: np.min([of["recall"][name] for of in row["layers"]], 0).tolist() for name in names}
    settings = {"fitted_windows": FITTED, "judged_windows": JUDGED, "hidden": HIDDEN, "most_epochs": EPOCHS}
    print(json.dumps({"name": "predictors", "machine": machine(), "settings": settings, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
