"""TLS of an edge node, as its clients see it."""

import ssl
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from time import perf_counter

import numpy as np
import pytest
from certificates import Certificate, self_signed
from edges import Edge, exchange, https, running
from runs import request_of

from comoe.net.remote_run import Node, RemoteRun, manifest_hash
from comoe.serve.listen import listener_of, tls_of
from comoe.types import RemoteUnavailable, UsageError

TOKEN = "a-token-of-some-length"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    return self_signed(tmp_path_factory.mktemp("good"))


@pytest.fixture(scope="module")
def edge(packed: Path, made: Certificate) -> Iterator[Edge]:
    (made.cert.parent / "token").write_text(TOKEN)
    flags = ("--cert", made.cert, "--key", made.key, "--token-file", made.cert.parent / "token")
    with running(packed, *flags) as node:
        yield node


def run(url: str, packed: Path, token: str | None = TOKEN) -> int:
    """Uses that the node answers."""
    asked = request_of(np.ones((1, 64)), [0], [0])
    client = RemoteRun(Node(url, token), manifest_hash(packed), perf_counter)
    try:
        return len(client.run(replace(asked, identity=client.identity)).answer.y)
    finally:
        client.close()


def test_a_device_that_trusts_the_certificate_is_served(
    edge: Edge, packed: Path, made: Certificate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(made.cert))
    assert edge.url.startswith("https://")
    assert run(edge.url, packed) == 1
    with pytest.raises(UsageError, match="token"):
        run(edge.url, packed, "another-token-of-length")


def test_a_certificate_that_nobody_vouches_for_is_refused(edge: Edge, packed: Path) -> None:
    with pytest.raises(RemoteUnavailable, match="certificate is refused, self-signed"):
        run(edge.url, packed)


def test_an_expired_certificate_is_refused(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = self_signed(tmp_path, days=-1)
    monkeypatch.setenv("SSL_CERT_FILE", str(old.cert))
    refused = pytest.raises(RemoteUnavailable, match="certificate is refused, certificate has expired")
    with running(packed, "--cert", old.cert, "--key", old.key) as node, refused:
        run(node.url, packed)


def test_nothing_is_served_in_the_clear_where_there_is_tls(edge: Edge, packed: Path) -> None:
    with pytest.raises(RemoteUnavailable, match="does not answer"):
        run(f"http://127.0.0.1:{edge.port}", packed)


def test_old_versions_of_tls_are_refused(edge: Edge, made: Certificate) -> None:
    context = ssl.create_default_context(cafile=str(made.cert))
    context.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
    context.maximum_version = ssl.TLSVersion.TLSv1_1
    with pytest.raises((ssl.SSLError, ConnectionError)):
        exchange(https(edge.port, context), "/health")


def test_a_key_of_another_certificate_is_refused(made: Certificate, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no certificate and its key"):
        tls_of(made.cert, self_signed(tmp_path).key)


def test_a_place_that_is_taken_is_said() -> None:
    with listener_of("127.0.0.1:0") as taken, pytest.raises(UsageError, match="nothing can listen"):
        listener_of(f"127.0.0.1:{taken.getsockname()[1]}")
