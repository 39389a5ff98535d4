"""Remote runs on the wire: what is sent arrives, and anything else is one error."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from runs import request_of, requests

from comoe.net.wire import (
    ANSWER_HEAD,
    DTYPES,
    REQUEST_HEAD,
    VERSION,
    RunAnswer,
    RunRequest,
    Uses,
    decode_answer,
    decode_request,
    encode_answer,
    encode_request,
    fits,
    to_wire,
)
from comoe.types import HostileMessage


def same_bits(ours: object, theirs: object) -> bool:
    """NaN for NaN, whichever it is."""
    a, b = np.asarray(ours), np.asarray(theirs)
    return a.shape == b.shape and a.dtype == b.dtype and np.array_equal(a, b, equal_nan=a.dtype.kind == "f")


@given(requests())
def test_a_request_arrives_as_it_was_sent(request_: RunRequest) -> None:
    found = decode_request(encode_request(request_))
    for name in ("identity", "layer", "dtype", "activation", "gated", "summed", "shape"):
        assert getattr(found, name) == getattr(request_, name)
    for name in ("expert", "row", "gate", "form"):
        assert same_bits(getattr(found.uses, name), getattr(request_.uses, name))
    assert same_bits(found.x, request_.x)


def test_of_a_summed_request_the_answer_counts_by_rows() -> None:
    """128 uses of 4,096 numbers, of 16 rows: an answer by use would be more than a message may have."""
    uses = Uses(*(np.zeros(128, kind) for kind in (np.uint16, np.uint16, np.float32, np.uint8)))
    x = np.zeros((16, 4096), np.float32)
    by_use = RunRequest(b"12345678", 0, "bfloat16", "silu", True, uses, x)
    assert not fits(by_use)
    with pytest.raises(HostileMessage):
        encode_request(by_use)
    summed = replace(by_use, summed=True)
    assert fits(summed) and decode_request(encode_request(summed)).summed
    data = encode_request(summed)
    with pytest.raises(HostileMessage):
        decode_request(data[:7] + b"\x01" + data[8:])  # gated alone


@given(requests(), st.floats(0, 1000), st.integers(0, 256))
def test_an_answer_arrives_as_it_was_sent(request_: RunRequest, seconds: float, read: int) -> None:
    found = decode_answer(encode_answer(RunAnswer(request_.dtype, request_.x, seconds, read)))
    assert found.dtype == request_.dtype and same_bits(found.y, request_.x) and found.read == read
    assert found.seconds == pytest.approx(seconds, abs=1e-6)


@given(st.binary(max_size=300))
@example(b"")
@example(b"CMRQ")
@example(REQUEST_HEAD.pack(b"CMRQ", VERSION, 0, 0, 0, bytes(8), 0, 65535, 65535, 65535))
@example(REQUEST_HEAD.pack(b"CMRQ", VERSION, 0, 0, 4, bytes(8), 0, 0, 0, 0))
@example(ANSWER_HEAD.pack(b"CMRA", VERSION, 0, 65535, 65535, 0, 0))
def test_garbage_is_one_error(data: bytes) -> None:
    for decode in (decode_request, decode_answer):
        with pytest.raises(HostileMessage):
            decode(data)


@given(requests(), st.data())
def test_a_damaged_request_is_another_request_or_one_error(request_: RunRequest, data: st.DataObject) -> None:
    sent = bytearray(encode_request(request_))
    for _ in range(data.draw(st.integers(1, 3))):
        sent[data.draw(st.integers(0, len(sent) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(sent)))
    for damaged in (bytes(sent), bytes(sent[:cut])):
        try:
            found = decode_request(damaged)
        except HostileMessage:
            continue
        assert len(encode_request(found)) == len(damaged)
        assert int(found.uses.row.max()) < len(found.x) and np.isfinite(found.uses.gate).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("uses", "rows", "width"), [(257, 1, 1), (1, 1, 1 << 16), (200, 200, 4000), (1, 2, 4), (0, 0, 4), (1, 1, 0)]
)
def test_what_is_too_large_or_nothing_is_not_even_sent(uses: int, rows: int, width: int, dtype: str) -> None:
    small = request_of(np.zeros((1, 4)), [0] * max(uses, 1), [0] * max(uses, 1))
    several = Uses(*(getattr(small.uses, name)[:uses] for name in ("expert", "row", "gate", "form")))
    with pytest.raises(HostileMessage):
        encode_request(replace(small, dtype=dtype, uses=several, x=np.zeros((rows, width), np.float32)))


@settings(deadline=None)
@given(st.lists(st.floats(width=32), min_size=1, max_size=40))
def test_bfloat16_is_rounded_as_torch_rounds(values: list[float]) -> None:
    import torch

    x = np.array([values], np.float32)
    theirs = torch.from_numpy(x).to(torch.bfloat16).view(torch.int16).numpy().tobytes()
    ours = to_wire(x, "bfloat16")
    nan = np.repeat(np.isnan(x), 1)
    a, b = np.frombuffer(ours, np.uint16), np.frombuffer(theirs, np.uint16)
    assert ((a == b) | nan).all() and (a[nan] & 0x7FFF > 0x7F80).all()


def test_every_dtype_has_its_number_for_ever() -> None:
    assert DTYPES == ("float32", "bfloat16", "float16")
