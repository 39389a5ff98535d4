"""`comoe edge`, a process that real sockets talk to: files, ranges, limits, the door, the end."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

import pytest
from commands import Comoe
from edges import SRC, Edge, running, until
from packs import write_pack

from comoe.store.manifest import MANIFEST, read_manifest

TOKEN = "a-token-of-some-length"
PACK = "toy.comoe"


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("edge") / PACK
    write_pack(folder, None)
    return folder


@pytest.fixture(scope="module")
def edge(toy: Path) -> Iterator[Edge]:
    with running(toy) as node:
        yield node


def blob_file(folder: Path, layer: int = 0, part: str = "high") -> Path:
    name = read_manifest(folder).layers[layer].parts[part].file
    assert name is not None
    return folder / name


def test_every_file_of_a_pack_is_served_as_it_is(edge: Edge, toy: Path) -> None:
    for path in toy.iterdir():
        answer = edge.file(PACK, path.name)
        assert (answer.status, answer.body) == (200, path.read_bytes())
        assert answer.headers["etag"].strip('"') in (path.stem.rpartition("-")[2], sha256(answer.body).hexdigest())


@pytest.mark.parametrize(
    "span", [(0, 1), (0, 4096), (4000, 4200), (4096, 4096 + 1792), (4100, 9000), (5887, 5889), (0, 11264)]
)
def test_a_range_is_those_bytes_whatever_it_cuts(edge: Edge, toy: Path, span: tuple[int, int]) -> None:
    path = blob_file(toy)
    whole = path.read_bytes()
    answer = edge.file(PACK, path.name, range=f"bytes={span[0]}-{span[1] - 1}")
    assert (answer.status, answer.body) == (206, whole[slice(*span)])
    assert answer.headers["content-range"] == f"bytes {span[0]}-{span[1] - 1}/{len(whole)}"


def test_a_range_outside_a_file_and_an_unchanged_file_are_not_sent(edge: Edge, toy: Path) -> None:
    path = blob_file(toy)
    answer = edge.file(PACK, path.name, range="bytes=999999-")
    assert answer.status == 416 and answer.headers["content-range"] == f"bytes */{path.stat().st_size}"
    etag = edge.file(PACK, path.name).headers["etag"]
    assert edge.file(PACK, path.name, if_none_match=etag).status == 304
    assert edge.file(PACK, path.name, range="bytes=0-0", if_range='"another"').status == 200
    head = edge.ask(f"/packs/{PACK}/{path.name}", "HEAD")
    assert (head.status, head.body, head.headers["content-length"]) == (200, b"", str(path.stat().st_size))


@pytest.mark.parametrize(
    "path",
    [
        "/packs/toy.comoe/../../../etc/passwd",
        "/packs/toy.comoe/..%2f..%2fetc%2fpasswd",
        "/packs/toy.comoe/%2e%2e/comoe.json",
        "/packs/../toy.comoe/comoe.json",
        "/packs/toy.comoe//etc/passwd",
        "/packs/toy.comoe/comoe.json%00",
        "/packs/toy.comoe/secret.txt",
        "/packs/other/comoe.json",
        "//etc/passwd",
        "/",
    ],
)
def test_no_path_leads_out_of_a_pack(edge: Edge, toy: Path, path: str) -> None:
    (toy / "secret.txt").write_text("not named by the manifest")
    answer = edge.ask(path)
    (toy / "secret.txt").unlink()
    assert answer.status == 404 and answer.sentence


@pytest.mark.parametrize("method", ["PUT", "POST", "DELETE", "PATCH"])
def test_nothing_can_be_uploaded_or_removed(edge: Edge, toy: Path, method: str) -> None:
    before = sorted(path.name for path in toy.iterdir())
    answer = edge.ask(f"/packs/{PACK}/{blob_file(toy).name}", method, b"x" * 100)
    assert answer.status == 405 and "read only" in answer.sentence
    assert sorted(path.name for path in toy.iterdir()) == before


def test_health_says_which_packs_are_there_and_metrics_where_their_bytes_came_from(toy: Path) -> None:
    with running(toy) as node:
        health = node.ask("/health").document
        identity = sha256((toy / MANIFEST).read_bytes()).hexdigest()
        assert health == {"status": "ok", "packs": {PACK: identity}, "load": 0, "queue": 0, "came": 0}
        name = blob_file(toy).name
        node.file(PACK, name)
        node.file(PACK, name)
        nbytes = 4 * read_manifest(toy).layers[0].parts["high"].nbytes
        assert node.metric("comoe_expert_bytes_total", tier="flash") == nbytes
        assert node.metric("comoe_expert_bytes_total", tier="ram") == nbytes
        assert node.metric("comoe_expert_requests_total", result="hit", tier="ram") == 4
        assert node.metric("comoe_expert_requests_total", result="miss", tier="ram") == 4
        assert node.metric("comoe_edge_request_seconds_count", route="files") == 2
        assert 0 < node.metric("comoe_resident_bytes", tier="ram") <= node.metric("comoe_budget_bytes")


def test_hot_experts_are_in_memory_before_they_are_asked_for(toy: Path) -> None:
    with running(toy) as node:
        answer = node.ask(f"/packs/{PACK}/hot", "POST", b'{"experts": [[0, 1, "q4"], [1, 3, "q8"]], "session": "s"}')
        assert (answer.status, answer.document) == (202, {"accepted": 2})
        until(lambda: node.metric("comoe_expert_requests_total", result="hit", tier="flash") == 3)  # high; high and low
        assert node.metric("comoe_resident_bytes", tier="ram") > 3 * 1792
        node.file(PACK, blob_file(toy).name, range="bytes=5888-7679")
        assert node.metric("comoe_expert_requests_total", result="hit", tier="ram") == 1


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b'{"experts": [[9, 0, "q4"]]}', b'{"experts": [[0, 99, "q4"]]}', b'{"experts": [[0, 0, "q1"]]}',
     b'{"experts": [[0, -1, "q4"]]}', b'{"experts": [], "more": 1}', b"\xff\xfe"],
)  # fmt: skip
def test_an_announcement_that_is_none_is_refused(edge: Edge, body: bytes) -> None:
    answer = edge.ask(f"/packs/{PACK}/hot", "POST", body)
    assert answer.status == 400 and "hot experts" in answer.sentence


def test_a_request_larger_than_any_is_refused_before_it_is_read(edge: Edge) -> None:
    with edge.connect() as connection:
        connection.sendall(b"POST /packs/toy.comoe/hot HTTP/1.1\r\nHost: x\r\nContent-Length: 999999999\r\n\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 413 ")


def test_a_body_without_a_length_is_bounded_too(edge: Edge) -> None:
    with edge.connect() as connection:
        connection.sendall(b"POST /packs/toy.comoe/hot HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        chunk = b"10000\r\n" + b"x" * 0x10000 + b"\r\n"
        answered = b""
        for _ in range(17):
            connection.sendall(chunk)
        answered = connection.recv(1000)
        assert answered.startswith(b"HTTP/1.1 413 ")


@pytest.fixture(scope="module")
def guarded(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Edge]:
    path = tmp_path_factory.mktemp("token") / "token"
    path.write_text(f"{TOKEN}\n")
    with running(toy, "--token-file", path) as node:
        yield node


@pytest.mark.parametrize(
    "given", [None, "", TOKEN, "Bearer", "Bearer wrong-but-long-enough", f"Bearer {TOKEN}x", f"Basic {TOKEN}"]
)
@pytest.mark.parametrize("path", ["/metrics", f"/packs/{PACK}/comoe.json", "/packs/none/x", "/none"])
def test_without_the_token_only_health_is_told(guarded: Edge, given: str | None, path: str) -> None:
    headers = {} if given is None else {"authorization": given}
    answer = guarded.ask(path, **headers)
    assert answer.status == 401 and answer.headers["www-authenticate"] == "Bearer" and "token" in answer.sentence
    assert TOKEN not in answer.sentence
    assert guarded.ask("/health").status == 200


def test_with_the_token_a_node_serves(guarded: Edge) -> None:
    assert guarded.file(PACK, MANIFEST, authorization=f"Bearer {TOKEN}").status == 200


def test_beyond_the_most_requests_at_once_clients_are_told_to_wait(toy: Path) -> None:
    with running(toy, "--max-requests", 2) as node:
        held = [node.connect() for _ in range(2)]
        for connection in held:
            connection.sendall(b"POST /packs/toy.comoe/hot HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n")
        until(lambda: node.metric("comoe_num_requests_running") == 2)
        answer = node.file(PACK, MANIFEST)
        assert (answer.status, answer.headers["retry-after"]) == (429, "1")
        assert node.ask("/health").document["load"] == 1
        for connection in held:
            connection.close()
        until(lambda: node.file(PACK, MANIFEST).status == 200)
        assert node.metric("comoe_edge_refusals_total", reason="full") >= 1


def test_sigterm_lets_what_runs_finish_says_so_and_ends_well(toy: Path) -> None:
    body = b'{"experts": []}'
    with running(toy) as node, node.connect() as held:
        length = str(len(body)).encode()
        held.sendall(b"POST /packs/toy.comoe/hot HTTP/1.1\r\nHost: x\r\nContent-Length: " + length + b"\r\n\r\n")
        until(lambda: node.metric("comoe_num_requests_running") == 1)
        node.terminate()
        until(lambda: node.ask("/health").document["status"] == "draining")
        answer = node.file(PACK, MANIFEST)
        assert answer.status == 503 and "retry-after" in answer.headers
        held.sendall(body)
        assert held.recv(1000).startswith(b"HTTP/1.1 202 ")
        assert node.end() == (0, "")


def test_what_does_not_finish_in_its_time_is_left(toy: Path) -> None:
    with running(toy, "--drain-seconds", "0.2") as node, node.connect() as held:
        held.sendall(b"POST /packs/toy.comoe/hot HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n")
        until(lambda: node.metric("comoe_num_requests_running") == 1)
        node.terminate()
        assert node.end()[0] == 0


def test_a_tampered_blob_is_not_served(toy: Path, tmp_path: Path) -> None:
    own = tmp_path / PACK
    shutil.copytree(toy, own)
    with running(own) as node:
        path = blob_file(own)
        content = bytearray(path.read_bytes())
        content[4100] ^= 1
        path.write_bytes(content)
        answer = node.file(PACK, path.name, range="bytes=4096-5887")
        assert answer.status == 500 and "has not the bytes that were packed" in answer.sentence
        assert node.file(PACK, path.name, range="bytes=5888-7679").body == content[5888:7680]


def test_many_clients_at_once_get_the_right_bytes_from_a_cache_that_holds_one_expert(toy: Path) -> None:
    with running(toy, "--max-requests", 32) as node:
        contents = {path.name: path.read_bytes() for path in toy.iterdir()}

        def fetch(at: int) -> bool:
            name = sorted(contents)[at % len(contents)]
            return node.file(PACK, name).body == contents[name]

        with ThreadPoolExecutor(16) as clients:
            assert all(clients.map(fetch, range(200)))


def test_a_node_never_loads_torch(edge: Edge, toy: Path) -> None:
    edge.file(PACK, blob_file(toy).name)
    mapped = Path(f"/proc/{edge.process.pid}/maps").read_text()
    assert "libtorch" not in mapped and "numpy" in mapped


def test_memory_is_for_the_whole_process_and_too_little_is_refused(comoe: Comoe, toy: Path) -> None:
    result = comoe("edge", toy, "--memory", "50MiB", "--listen", "127.0.0.1:0")
    assert result.code == 3 and "at least --memory" in result.sentence


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--listen", "nowhere"), "HOST:PORT"),
        (("--listen", "127.0.0.1:99999"), "HOST:PORT"),
        (("--listen", "192.0.2.1:1"), "nothing can listen"),
        (("--cert", "cert.pem"), "--cert and --key"),
        (("--cert", "none.pem", "--key", "none.pem"), "no certificate"),
        (("--token-file", "none"), "no token"),
    ],
)
def test_flags_that_cannot_be_are_refused_in_a_sentence(
    comoe: Comoe, toy: Path, words: tuple[str, ...], sentence: str
) -> None:
    result = comoe("edge", toy, *words)
    assert result.code == 2 and sentence in result.sentence


WITHOUT = "import sys; sys.modules[sys.argv.pop(1)] = None; from comoe.cli import main; main()"


@pytest.mark.parametrize("package", ["uvicorn", "httptools", "prometheus_client"])
def test_what_is_not_installed_is_named_with_its_extra(toy: Path, package: str) -> None:
    words = [sys.executable, "-c", WITHOUT, package, "edge", str(toy), "--listen", "127.0.0.1:0"]
    done = subprocess.run(words, env={**os.environ, "PYTHONPATH": str(SRC)}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stderr.strip().endswith(f"needs {package}: pip install 'comoe[edge]'.")


def test_a_short_token_and_two_packs_of_one_name_are_refused(comoe: Comoe, toy: Path, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("short")
    assert "at least 16" in comoe("edge", toy, "--token-file", tmp_path / "token").sentence
    shutil.copytree(toy, tmp_path / "other" / PACK)
    assert "same name" in comoe("edge", toy, tmp_path / "other" / PACK).sentence


def test_a_pack_that_is_published_elsewhere_is_read_through_once_and_kept_on_flash(toy: Path, tmp_path: Path) -> None:
    with running(toy) as origin:
        url = f"{origin.url}/packs/{PACK}"
        with running(url, "--cache", tmp_path / "cache") as node:
            for path in toy.iterdir():
                assert node.file(PACK, path.name).body == path.read_bytes()
            moved = node.metric("comoe_expert_bytes_total", tier="origin")
            assert moved == sum(toy_blobs(toy)) and node.metric("comoe_expert_bytes_total", tier="flash") == 0
            assert node.ask("/health").document["came"] > moved
        with running(url, "--cache", tmp_path / "cache") as node:
            assert node.file(PACK, blob_file(toy).name).body == blob_file(toy).read_bytes()
            assert node.metric("comoe_expert_requests_total", result="hit", tier="flash") == 4
            assert node.metric("comoe_expert_bytes_total", tier="origin") == 0


def test_what_the_origin_does_not_give_is_said_and_the_rest_is_served(toy: Path, tmp_path: Path) -> None:
    with running(toy) as origin, running(f"{origin.url}/packs/{PACK}", "--cache", tmp_path / "cache") as node:
        first, second = blob_file(toy), blob_file(toy, 1)
        assert node.file(PACK, first.name).status == 200
        origin.process.kill()
        origin.process.wait()
        answer = node.file(PACK, second.name, range="bytes=4096-4999")
        assert answer.status == 502 and answer.sentence
        assert node.file(PACK, first.name).body == first.read_bytes()


def test_an_origin_that_stalls_stops_nothing_that_is_in_memory(toy: Path, tmp_path: Path) -> None:
    with running(toy) as origin, running(f"{origin.url}/packs/{PACK}", "--cache", tmp_path / "cache") as node:
        first, second = blob_file(toy), blob_file(toy, 1)
        assert node.file(PACK, first.name).status == 200
        origin.process.send_signal(signal.SIGSTOP)
        held = [node.connect() for _ in range(12)]
        for connection in held:
            connection.sendall(f"GET /packs/{PACK}/{second.name} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        until(lambda: node.metric("comoe_num_requests_running") == len(held))
        assert node.file(PACK, first.name).body == first.read_bytes()
        assert node.metric("comoe_num_requests_running") == len(held)
        origin.process.send_signal(signal.SIGCONT)
        assert all(connection.recv(1000).startswith(b"HTTP/1.1 200 ") for connection in held)
        for connection in held:
            connection.close()


def toy_blobs(folder: Path) -> list[int]:
    """Bytes of every blob."""
    manifest = read_manifest(folder)
    return [part.nbytes for layer in manifest.layers for part in layer.parts.values() for _ in range(part.rows)]
