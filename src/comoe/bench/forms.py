"""Rows of the quality benchmark by the whole protocol: eager transformers, and every expert in one form."""

import json
from typing import Any

import numpy as np

from comoe.bench.corpus import evaluate
from comoe.bench.losses import RAW, raw
from comoe.bench.rows import Row
from comoe.bench.served import Served
from comoe.make.verify import reference_model

DTYPE = "float32"


def reference_row(subject: Served) -> Row:
    """Eager transformers, beside the figures that the model carries: they are of all there is to measure on."""
    path = subject.folder / "eval.json"
    expected = json.loads(path.read_text("utf-8")) if subject.scope.is_whole and path.exists() else None
    return {**_evaluated(subject, reference_model(subject.folder)), "expected": expected}


def form_row(subject: Served, form: str) -> Row:
    """Every expert in `form` in memory."""
    model = subject.resident(form, DTYPE)
    with model.comoe:
        return {"resident_bytes": model.comoe.cache.resident_bytes, **_evaluated(subject, model)}


def _evaluated(subject: Served, model: Any) -> Row:
    """Nats and next-chunk accuracy; `windows` holds the nats of every window."""
    material = subject.material
    score = evaluate(model, subject.tokenizer, material.shared, list(material.valid), subject.scope.windows)
    right = np.array(subject.evaluation(model).next_chunk(material.items))
    of_domain = np.array([item.domain for item in material.items])
    return {
        "dtype": DTYPE,
        "nats": score.mean,
        "nats_per_domain": score.nats_per_token,
        "next_chunk": float(right.mean()),
        "next_chunk_per_domain": {name: float(right[of_domain == name].mean()) for name in score.domains},
        "next_chunk_items": len(right),
        RAW: raw(score),
    }
