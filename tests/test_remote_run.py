"""Experts that `comoe edge` runs for a device: the bits that the device computes itself, over real sockets."""

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from time import perf_counter

import numpy as np
import pytest
from edges import Edge, running
from runs import request_of

from comoe.forms.plain import Floats, PlainMath
from comoe.net.remote_run import Node, RemoteRun, manifest_hash
from comoe.net.wire import RunRequest, encode_request, from_wire, to_wire
from comoe.store.pack import Pack
from comoe.types import ExpertId, RemoteUnavailable, UsageError

PACK = "tiny.comoe"


@pytest.fixture(scope="module")
def edge(packed: Path) -> Iterator[Edge]:
    with running(packed, "--threads", 2) as node:
        yield node


@pytest.fixture
def remote(edge: Edge, packed: Path) -> Iterator[RemoteRun]:
    found = RemoteRun(Node(edge.url, timeout_s=30), manifest_hash(packed), perf_counter)
    yield found
    found.close()


def rows(num: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).standard_normal((num, 64)).astype(np.float32)


def locally(folder: Path, request_: RunRequest) -> Floats:
    """The same, by this process."""
    pack = Pack(folder)
    maths = PlainMath(pack.manifest.site(request_.layer), request_.activation, request_.gated)
    found = []
    for expert, row, form in zip(request_.uses.expert, request_.uses.row, request_.uses.form, strict=True):
        name = pack.manifest.forms[form]
        blobs = pack.manifest.blobs(ExpertId(request_.layer, int(expert)), name)
        data = [np.frombuffer(pack.read_bytes(blob), np.uint8) for blob in blobs]
        found.append(maths.run(name, data, request_.x[row : row + 1])[0])
    pack.close()
    return np.stack(found)


def own(packed: Path, request_: RunRequest) -> RunRequest:
    return replace(request_, identity=bytes.fromhex(manifest_hash(packed))[:8])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_node_computes_the_bits_that_the_device_would(remote: RemoteRun, packed: Path, dtype: str) -> None:
    pack = Pack(packed)
    forms = range(len(pack.manifest.forms))
    pack.close()
    x = from_wire(to_wire(rows(3), dtype), 0, (3, 64), dtype)
    asked = own(packed, request_of(x, [at % 8 for at in forms], [*forms], layer=1, dtype=dtype))
    found = remote.run(asked).answer
    expected = locally(packed, asked)
    np.testing.assert_array_equal(found.y, from_wire(to_wire(expected, dtype), 0, expected.shape, dtype))


def test_gates_multiply(remote: RemoteRun, packed: Path) -> None:
    asked = own(packed, request_of(rows(2), [1, 5], [0, 1]))
    halved = replace(asked, uses=replace(asked.uses, gate=np.full(4, 0.5, np.float32)))
    np.testing.assert_array_equal(remote.run(halved).answer.y, remote.run(asked).answer.y / 2)


def test_many_devices_at_once_each_get_their_own(edge: Edge, packed: Path) -> None:
    before = edge.metric("comoe_edge_run_rows_count")
    last = len(Pack(packed).manifest.forms) - 1
    wrong: list[int] = []

    def device(seed: int) -> None:
        client = RemoteRun(Node(edge.url, timeout_s=60), manifest_hash(packed), perf_counter)
        for turn in range(20):
            asked = own(packed, request_of(rows(1, 100 * seed + turn), [turn % 8], [last], layer=turn % 2))
            if not np.array_equal(client.run(asked).answer.y, locally_once(asked)):
                wrong.append(seed)
        client.close()

    pack = Pack(packed)

    def locally_once(asked: RunRequest) -> Floats:
        expert = ExpertId(asked.layer, int(asked.uses.expert[0]))
        data = [np.frombuffer(pack.read_bytes(blob), np.uint8) for blob in pack.manifest.blobs(expert, "exact")]
        return PlainMath(pack.manifest.site(asked.layer), "silu", True).run("exact", data, asked.x)

    threads = [threading.Thread(target=device, args=(seed,)) for seed in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    pack.close()
    assert not wrong
    assert edge.metric("comoe_edge_run_rows_sum") > 0
    assert 0 < edge.metric("comoe_edge_run_rows_count") - before <= 240


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({"layer": 7}, 400),
        ({"activation": "relu", "gated": False}, 400),
        ({"identity": bytes(8)}, 409),
    ],
)
def test_what_the_pack_has_not_is_refused(edge: Edge, packed: Path, changes: dict[str, object], status: int) -> None:
    asked = replace(own(packed, request_of(rows(1), [0], [0])), **changes)
    answer = edge.ask(f"/packs/{PACK}/run", "POST", encode_request(asked))
    assert answer.status == status and answer.sentence.endswith(".")


@pytest.mark.parametrize(("expert", "form"), [(8, 0), (0, 99)])
def test_an_expert_or_a_form_that_there_is_not_is_refused(edge: Edge, packed: Path, expert: int, form: int) -> None:
    asked = own(packed, request_of(rows(1), [expert], [form]))
    answer = edge.ask(f"/packs/{PACK}/run", "POST", encode_request(asked))
    assert answer.status == 400 and "no such expert" in answer.sentence


@pytest.mark.parametrize("body", [b"", b"CMRQ", b"\0" * 1000, b"\xff" * 100_000])
def test_garbage_is_refused_and_the_node_goes_on(edge: Edge, remote: RemoteRun, packed: Path, body: bytes) -> None:
    answer = edge.ask(f"/packs/{PACK}/run", "POST", body)
    assert answer.status == 400 and answer.sentence
    assert len(remote.run(own(packed, request_of(rows(1), [0], [0]))).answer.y) == 1


def test_a_node_that_is_gone_or_has_another_pack_is_unavailable(edge: Edge) -> None:
    asked = request_of(rows(1), [0], [0])
    with pytest.raises(RemoteUnavailable, match="does not serve this pack"):
        RemoteRun(Node(edge.url), "00" * 32, perf_counter).run(asked)
    with pytest.raises(RemoteUnavailable, match="does not answer"):
        RemoteRun(Node("http://127.0.0.1:1"), "00" * 32, perf_counter).run(asked)


def test_a_connection_that_the_node_closed_is_opened_again(packed: Path) -> None:
    asked = own(packed, request_of(rows(1), [0], [0]))
    with running(packed) as node:
        client = RemoteRun(Node(node.url), manifest_hash(packed), perf_counter)
        first = client.run(asked).answer.y
        assert client._connection is not None and client._connection.sock is not None
        client._connection.sock.shutdown(2)
        np.testing.assert_array_equal(client.run(asked).answer.y, first)
        node.process.kill()
        with pytest.raises(RemoteUnavailable):
            client.run(asked)


def test_a_wrong_token_is_said(packed: Path, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("a-token-of-some-length")
    asked = own(packed, request_of(rows(1), [0], [0]))
    with running(packed, "--token-file", tmp_path / "token") as node:
        right = RemoteRun(Node(node.url, "a-token-of-some-length"), manifest_hash(packed), perf_counter)
        assert len(right.run(asked).answer.y) == 1
        with pytest.raises(UsageError, match="token"):
            RemoteRun(Node(node.url, "another-token-of-length"), manifest_hash(packed), perf_counter).run(asked)


@pytest.mark.parametrize("url", ["", "host:1", "ftp://host", "http://", "http://host:99999", "http://host:x"])
def test_what_is_no_url_of_a_node_is_refused(url: str) -> None:
    with pytest.raises(UsageError, match="no edge node"):
        Node(url)
