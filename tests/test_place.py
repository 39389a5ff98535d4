"""The command line on packs behind addresses: nginx, a bucket, and a server that goes away."""

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from time import monotonic, sleep
from urllib.request import Request, urlopen

import obstore
import pytest
from commands import Comoe, document
from moto import server as moto
from obstore.store import S3Store
from webs import Web, free_port, serving

from comoe.net import origin
from comoe.net.address import Access, is_url
from comoe.net.place import open_pack

PROMPT = ("--prompt", "the quick brown fox", "--max-new-tokens", "4", "--temperature", "0", "--expert-memory", "40%")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(origin, "BACKOFF_S", 0.01)


@pytest.fixture
def web(published: Path) -> Iterator[Web]:
    with serving(published) as server:
        yield server


def test_urls_are_told_from_folders() -> None:
    assert is_url("http://host/pack") and is_url("s3://bucket/pack")
    assert not is_url("./pack") and not is_url("C:\\pack") and not is_url("httpish/pack")


def test_run_plan_and_inspect_take_an_address(comoe: Comoe, web: Web, published: Path) -> None:
    assert document(comoe("inspect", web.url, "--json"))["pack"] == web.url
    plans = document(comoe("plan", web.url, "--expert-memory", "40%", "--exact", "--json"))["plans"]
    assert plans[0]["target"] == "exact"
    assert not any("safetensors" in path and span is None for path, span in web.asked)
    local = document(comoe("run", published, *PROMPT, "--json"))
    first = document(comoe("run", web.url, *PROMPT, "--json"))
    sent = web.sent
    second = document(comoe("run", web.url, *PROMPT, "--json"))
    assert first["text"] == second["text"] == local["text"]
    assert first["bytes_read"]["origin"] > 0 and web.sent - sent < sent / 2


def test_a_link_is_planned_for(comoe: Comoe, web: Web) -> None:
    def ms(link: str) -> float:
        words = ("--expert-memory", "40%", "--exact", "--link", link, "--json")
        return float(document(comoe("plan", web.url, *words))["plans"][0]["ms_per_token"][1])

    assert ms("1Mbit,100ms") > 3 * ms("1Gbit,1ms")


def test_a_link_that_nothing_comes_over_is_said_to_change_nothing(comoe: Comoe, web: Web, published: Path) -> None:
    assert "--link changes nothing" in comoe("run", published, *PROMPT, "--link", "1Gbit,1ms").err
    assert "--link" not in comoe("run", web.url, *PROMPT, "--link", "1Gbit,1ms").err


def test_the_cache_is_listed_and_cleared(comoe: Comoe, web: Web, tmp_path: Path) -> None:
    comoe("run", web.url, *PROMPT)
    held = document(comoe("cache", "ls", "--json"))
    assert held["folder"] == str(tmp_path / "comoe") and held["blobs"] > 0 and len(held["packs"]) == 1
    assert f"{held['blobs']} blobs" in comoe("cache", "ls").out
    freed = document(comoe("cache", "clear", "--json"))["freed_bytes"]
    assert freed == held["blob_bytes"] + sum(held["packs"].values())
    assert document(comoe("cache", "ls", "--json"))["blobs"] == 0


def test_a_token_comes_from_a_file_or_the_environment(
    comoe: Comoe, published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "token").write_text("secret\n")
    with serving(published, token="secret") as web:
        refused = comoe("inspect", web.url)
        assert refused.code == 2 and "--token-file" in refused.sentence
        assert comoe("inspect", web.url, "--token-file", tmp_path / "token").code == 0
        monkeypatch.setenv("COMOE_TOKEN", "secret")
        assert comoe("inspect", web.url).code == 0


def test_a_server_that_is_not_there_is_said_with_its_own_code(comoe: Comoe, published: Path) -> None:
    with serving(published) as web:
        pass
    result = comoe("run", web.url, *PROMPT)
    assert (result.code, result.out) == (5, "") and "does not answer" in result.sentence


def test_a_server_that_goes_away_in_mid_run_ends_an_exact_run_in_one_sentence(
    comoe: Comoe, web: Web, tmp_path: Path
) -> None:
    open_pack(web.url, access=Access(tmp_path / "comoe", 0)).close()
    web.asked.clear()
    web.leave_after = 3  # requests: the manifest's, and two experts'
    words = ("--prompt", "a", "--max-new-tokens", "100", "--ignore-eos", "--expert-memory", "30%", "--cache-size", "0")
    result = comoe("run", web.url, *words)
    assert result.code == 5 and web.url in result.sentence


def await_port(port: int) -> None:
    end_s = monotonic() + 20
    while monotonic() < end_s:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        sleep(0.05)
    raise AssertionError(f"nothing listens on {port}")


NGINX = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")


@pytest.mark.skipif(NGINX is None, reason="needs nginx")
def test_nginx_serves_a_pack(comoe: Comoe, published: Path, tmp_path: Path) -> None:
    port = free_port()
    user = "user root;" if os.geteuid() == 0 else ""  # who else could not read the test's folders
    (tmp_path / "nginx.conf").write_text(
        f"daemon off; pid {tmp_path}/pid; error_log stderr; {user}\nevents {{}}\n"
        f"http {{ access_log off; server {{ listen 127.0.0.1:{port}; root {tmp_path}; }} }}\n"
    )
    server = subprocess.Popen([str(NGINX), "-c", str(tmp_path / "nginx.conf"), "-p", str(tmp_path)])
    try:
        await_port(port)
        found = document(comoe("run", f"http://127.0.0.1:{port}/{published.name}", *PROMPT, "--json"))
    finally:
        server.terminate()
        server.wait()
    assert found["text"] == document(comoe("run", published, *PROMPT, "--json"))["text"]
    assert found["bytes_read"]["origin"] > 0


def test_a_bucket_holds_a_pack(published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=free_port(), verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        for key, value in {
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ALLOW_HTTP": "true",
        }.items():
            monkeypatch.setenv(key, value)
        urlopen(Request(f"http://{host}:{port}/models", method="PUT")).close()
        bucket = S3Store("models", client_options={"allow_http": True})
        for path in published.iterdir():
            obstore.put(bucket, f"packs/tiny/{path.name}", path.read_bytes())
        remote, local = open_pack("s3://models/packs/tiny", access=Access(tmp_path / "cache")), open_pack(published)
        assert all(remote.read_bytes(blob) == local.read_bytes(blob) for blob in local.blob_ids()[::5])
    finally:
        server.stop()
