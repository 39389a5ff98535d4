"""A model whose misses an edge node runs: the same answer to the bit, whatever becomes of the node."""

import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Event
from time import perf_counter
from typing import Any

import numpy as np
import pytest
import torch
from commands import Comoe, document
from edges import Edge, running, until
from models import PROMPT, Answer, answer, greedy
from sweep import Subject

from comoe.forms.plain import PlainMath
from comoe.net import remote_run
from comoe.net.remote_run import Node, RemoteRun, Timed, manifest_hash
from comoe.net.wire import RunAnswer, RunRequest, encode_request
from comoe.plan.missrule import HELP_S, WARM
from comoe.runtime.edgelink import Known, Link, known_answer, open_links
from comoe.runtime.edgetier import REFRESH_S, Ran, RemoteTier, Wanted
from comoe.runtime.load import Loader, load
from comoe.runtime.options import Options
from comoe.store.pack import Pack
from comoe.types import ExpertId, RemoteUnavailable, UsageError

NUM_TOKENS = 24
READ_S = 0.05
"""So slow is a read here that a node on this machine is sooner done."""


@contextmanager
def served(packed: Path, *edges: Edge, read_s: float = READ_S) -> Iterator[Any]:
    """The model with room for two experts, exact, whose reads are slow."""
    pack = Pack(packed)
    loader = Loader(pack, Options(edges=tuple(Node(edge.url) for edge in edges), prefetch="off"))
    loader.pace(lambda nbytes: read_s)
    room = 2 * loader.ladder.rung("exact").group_beside(None)
    model = loader.streamed("exact", room)
    with model.comoe:
        yield model


@pytest.fixture(scope="module")
def expected(packed: Path) -> list[int]:
    with served(packed, read_s=0.0) as model:
        return greedy(model, NUM_TOKENS)


def test_what_misses_is_run_by_the_node_and_the_answer_is_the_same_to_the_bit(
    packed: Path, expected: list[int]
) -> None:
    step = PROMPT[:, :1]
    with served(packed, read_s=0.0) as model, torch.inference_mode():
        logits = model(step).logits
    with running(packed) as edge, served(packed, edge) as model:
        assert greedy(model, NUM_TOKENS) == expected
        with torch.inference_mode():
            assert torch.equal(model(step).logits, logits)
        stats = model.comoe.stats()
        assert stats["edge_runs"] > 0 and stats["edge_bytes"] > 0
        assert edge.metric("comoe_edge_expert_runs_total") >= stats["edge_runs"]


def test_an_answer_says_how_many_experts_the_node_had_to_read(packed: Path) -> None:
    with running(packed) as edge, closing(Pack(packed)) as pack:
        plain = PlainMath(pack.manifest.site(0), "silu", True)
        node = Node(edge.url)
        client = Link(RemoteRun(node, manifest_hash(packed), perf_counter), known_answer(pack, plain, exact=True), None)
        assert [client.ask().answer.read for _ in range(2)] == [1, 0]


def test_a_prompt_of_a_few_tokens_is_run_by_the_node_too(packed: Path) -> None:
    few = PROMPT[:, :6]
    with served(packed, read_s=0.0) as model, torch.inference_mode():
        logits = model(few).logits
    with running(packed) as edge, served(packed, edge) as model, torch.inference_mode():
        assert torch.equal(model(few).logits, logits)
        stats = model.comoe.stats()
        assert stats["edge_runs"] > 0 and stats["edge_failures"] == 0


def test_a_request_has_those_rows_alone_that_its_uses_are_of(packed: Path) -> None:
    with running(packed) as edge, served(packed, edge) as model:
        remote, pack = model.comoe._serving.remote, model.comoe.pack
        plain = PlainMath(pack.manifest.site(0), "silu", True)
        x = torch.arange(6.0)[:, None].expand(6, plain.site.leaves[0].cols)
        four, both = torch.tensor([4]), torch.tensor([2, 4])
        wanted = [Wanted(0, 1, "exact", (), four, torch.ones(1)), Wanted(1, 3, "exact", (), both, torch.ones(2))]
        request, rows = remote._request(remote._links[edge.url], 0, plain, wanted, x)
        assert request.x[:, 0].tolist() == [2.0, 4.0] == rows.tolist()
        assert request.uses.row.tolist() == [1, 0, 1] and request.uses.expert.tolist() == [1, 3, 3]
        assert encode_request(request)


@pytest.mark.parametrize("tokens", [1, 5])
def test_where_outputs_may_lose_something_the_node_sums_them(packed: Path, tokens: int) -> None:
    some = PROMPT[:, :tokens]
    with served(packed, read_s=0.0) as model, torch.inference_mode():
        logits = model(some).logits
    with running(packed) as edge, served(packed, edge) as model, torch.inference_mode():
        remote, sent = model.comoe._serving.remote, []
        link = remote._links[edge.url]
        link.known = link.known._replace(tolerance=1e-3)
        assert link.known.lossy
        run = link.remote.run
        link.remote.run = lambda request: sent.append(request) or run(request)
        assert torch.allclose(model(some).logits, logits, atol=0.01)
        asked = [request for request in sent if request.summed]
        assert any(len(request.uses) > len(request.x) for request in asked)
        assert all(request.shape == request.x.shape for request in asked)
        stats = model.comoe.stats()
        assert stats["edge_runs"] == sum(len(set(request.uses.expert.tolist())) for request in asked)
        assert stats["edge_failures"] == 0


def test_a_node_that_is_slower_than_reading_runs_nothing(packed: Path, expected: list[int]) -> None:
    with running(packed) as edge, served(packed, edge, read_s=0.0) as model:
        link = model.comoe._serving.remote._links[edge.url]
        link.exchange_s = 10.0
        assert greedy(model, NUM_TOKENS) == expected
        assert model.comoe.stats()["edge_runs"] == 0


def killed(edge: Edge) -> None:
    edge.process.kill()


def stalled(edge: Edge) -> None:
    edge.process.send_signal(signal.SIGSTOP)


@pytest.mark.parametrize("end", [killed, stalled, Edge.terminate])
def test_a_node_that_is_killed_stalled_or_stopped_does_not_change_the_answer(
    packed: Path, expected: list[int], end: Callable[[Edge], None]
) -> None:
    with running(packed) as edge, served(packed, edge) as model:
        seen = 0

        def count(module: Any, given: Any, output: Any) -> None:
            nonlocal seen
            seen += 1
            if seen == NUM_TOKENS // 2:
                end(edge)

        hook = model.lm_head.register_forward_hook(count)
        assert greedy(model, NUM_TOKENS) == expected
        hook.remove()
        stats = model.comoe.stats()
        assert stats["edge_failures"] >= 1 and stats["edge_runs"] > 0
        assert model.comoe._serving.remote._links[edge.url].failures >= 1


def test_a_second_node_takes_over(packed: Path, expected: list[int]) -> None:
    with running(packed) as first, running(packed) as second, served(packed, first, second) as model:
        greedy(model, 4)
        first.process.kill()
        assert greedy(model, NUM_TOKENS) == expected
        asked = 6  # when it was opened: a known question, answered again and again
        assert second.metric("comoe_edge_expert_runs_total") > asked


def test_a_node_that_comes_back_is_used_again(packed: Path) -> None:
    with running(packed) as edge, served(packed, edge) as model:
        edge.process.send_signal(signal.SIGSTOP)
        greedy(model, 4)
        edge.process.send_signal(signal.SIGCONT)
        before = model.comoe.stats()["edge_runs"]
        for _ in range(40):
            greedy(model, 4)
            if model.comoe.stats()["edge_runs"] > before:
                break
        assert model.comoe.stats()["edge_runs"] > before


class Fake:
    """A node that answers the known question and all others, or nothing; not before it is `open`. It had `read` of what
    it was asked for to read first."""

    identity = b""

    def __init__(self, known: Known, url: str = "http://node") -> None:
        self.answers, self.asked, self.known, self.url, self.read = True, 0, known, url, 0
        self.open = Event()
        self.open.set()

    def run(self, request: RunRequest) -> Timed:
        self.asked += 1
        self.open.wait()
        if not self.answers:
            raise RemoteUnavailable("gone")
        y = np.repeat(self.known.answer, len(request.uses), axis=0)
        return Timed(RunAnswer("float32", y, 0.001, self.read), 0.002, 100)

    def close(self) -> None:
        pass


class Tier:
    """A tier of fake nodes, of which the first serves, at a clock that stands; `run` has a use run there."""

    def __init__(self, packed: Path, *urls: str) -> None:
        self.now_s = 100.0
        self._pack = Pack(packed)
        self._plain = PlainMath(self._pack.manifest.site(0), "silu", True)
        known = known_answer(self._pack, self._plain, exact=True)
        self.nodes = [Fake(known, url) for url in urls]
        self.links = [Link(node, known, ThreadPoolExecutor(1)) for node in self.nodes]
        for link in self.links:
            link.measure(self.clock)
        self.serving = urls[0]
        self.tier = RemoteTier(self.links, lambda: self.serving, self._pack, lambda blob: 1.0, self.clock)

    def clock(self) -> float:
        return self.now_s

    def run(self) -> list[Ran] | None:
        x, row = torch.ones(1, self._plain.site.leaves[0].cols), torch.zeros(1, dtype=torch.long)
        blobs = self._pack.manifest.blobs(ExpertId(0, 0), "exact")
        sent = self.tier.send(0, self._plain, [Wanted(0, 0, "exact", blobs, row, torch.ones(1))], x)
        return self.tier.outputs(sent, x.dtype) if sent is not None else None

    def asked(self) -> list[int]:
        """Once nobody is at work."""
        for link in self.links:
            link.thread.submit(lambda: None).result()
        return [node.asked for node in self.nodes]

    def close(self) -> None:
        for node in self.nodes:
            node.open.set()
        self.tier.close()
        self._pack.close()


def test_a_node_that_failed_once_rests_is_asked_how_it_is_and_runs_again(packed: Path) -> None:
    with closing(Tier(packed, "http://node")) as of:
        (node,), (link,) = of.nodes, of.links
        assert of.tier.ready() and of.run() is not None
        node.answers = False
        assert of.run() is None and not of.tier.ready()
        of.now_s += 1.5
        assert not of.tier.ready()  # it has rested, but does not answer
        until(lambda: link.failures == 2)
        node.answers, asked = True, node.asked
        of.now_s += 1.5
        assert of.run() is None and node.asked == asked  # it rests, twice as long
        of.now_s += 1.0
        of.tier.ready()  # asks it
        until(lambda: node.asked > asked)
        until(of.tier.ready)
        assert of.run() is not None


def test_the_link_is_shared_as_long_as_an_answer_is_to_come_and_for_a_while_after_it(packed: Path) -> None:
    with closing(Tier(packed, "http://node")) as of, ThreadPoolExecutor(1) as device:
        (node,) = of.nodes
        assert of.tier.runs  # the first question is about to come
        of.now_s += 2 * REFRESH_S
        assert not of.tier.runs
        node.open.clear()
        ran = device.submit(of.run)
        until(lambda: of.tier.runs)
        of.now_s += 2 * REFRESH_S
        assert of.tier.runs  # over a slow link an exchange takes seconds
        node.open.set()
        assert ran.result() is not None and of.tier.runs
        of.now_s += 2 * REFRESH_S
        assert not of.tier.runs


@pytest.fixture
def moved(packed: Path) -> Iterator[Tier]:
    """A tier whose second node took over and had to read what it was asked for, so that the first one answered."""
    with closing(Tier(packed, "http://old", "http://new")) as of:
        assert of.run() is not None
        of.serving, of.nodes[1].read = of.nodes[1].url, 1
        answered_by(of, of.nodes[0])
        yield of


def answered_by(of: Tier, node: Fake, times: int = 1, *, begun: Fake | None = None) -> None:
    """Uses run, and every other node is late; nobody is at work afterwards. `begun` has begun to answer, too."""
    others = [other for other in of.nodes if other is not node]
    asked = begun.asked if begun is not None else -1
    while times > 0 or (begun is not None and begun.asked == asked):
        times -= 1
        for other in others:
            other.open.clear()
        assert of.run() is not None
        if begun is None or begun.asked > asked:
            for other in others:
                other.open.set()
            of.asked()


def test_while_the_node_that_serves_reads_the_one_before_answers(moved: Tier) -> None:
    old, new = moved.nodes
    asked = old.asked, new.asked
    new.open.clear()
    for _ in range(3):
        assert moved.run() is not None
    assert old.asked == asked[0] + 3 and new.asked <= asked[1] + 1  # it has not come to the others
    assert moved.tier.counts.failures == 0 and moved.tier.counts.uses == 5


def test_answers_that_nobody_waited_for_tell_what_the_node_had_to_read(moved: Tier) -> None:
    old, new = moved.nodes
    new.read = 0
    answered_by(moved, new, WARM - 1)
    new.read = 1
    answered_by(moved, old, begun=new)
    new.read = 0
    answered_by(moved, new)
    before = old.asked
    answered_by(moved, old)
    assert old.asked == before + 1
    assert moved.tier.counts.nbytes > 100 * moved.tier.counts.uses  # theirs count, too


def test_the_one_before_is_asked_until_the_one_that_serves_had_all_in_memory_for_a_while(moved: Tier) -> None:
    old, new = moved.nodes
    answered_by(moved, new, WARM)  # which had to read
    before = old.asked
    answered_by(moved, old)
    assert old.asked == before + 1
    new.read = 0
    answered_by(moved, new, WARM)
    before = old.asked
    answered_by(moved, new, 2)
    assert old.asked == before
    new.read = 1
    answered_by(moved, new)
    answered_by(moved, old)
    assert old.asked == before + 1  # again, for there is more to read
    assert moved.tier.counts.failures == 0


@pytest.mark.parametrize("end", ["fails", "time"])
def test_the_one_before_is_asked_no_more_once_it_fails_or_for_long_enough(moved: Tier, end: str) -> None:
    old, new = moved.nodes
    if end == "fails":
        old.answers = False
        answered_by(moved, new, begun=old)
    else:
        moved.now_s += HELP_S + 1
    before = old.asked
    for _ in range(3):
        assert moved.run() is not None
        moved.asked()
    assert old.asked == before
    assert moved.tier.counts.failures == (end == "fails")


def test_a_node_that_is_late_for_another_question_does_not_rest(moved: Tier) -> None:
    old, new = moved.nodes
    new.open.clear()
    asked = new.asked
    while new.asked == asked:
        assert moved.run() is not None
    old.open.clear()
    assert moved.run() is None
    assert not moved.links[0].well and moved.links[1].well


def test_an_answer_that_says_more_was_read_than_was_asked_for_is_none(packed: Path) -> None:
    with running(packed) as edge, closing(Pack(packed)) as pack:
        plain = PlainMath(pack.manifest.site(0), "silu", True)
        client = RemoteRun(Node(edge.url), manifest_hash(packed), perf_counter)
        (link,) = open_links([client], [edge.url], pack, known_answer(pack, plain, exact=True), perf_counter)
        with pytest.MonkeyPatch.context() as patched, pytest.raises(RemoteUnavailable, match="something else"):
            decode = remote_run.decode_answer
            patched.setattr(remote_run, "decode_answer", lambda data: replace(decode(data), read=2))
            link.ask()
        link.close()


def test_what_is_waited_for_runs_on_the_node_once_it_is_back(packed: Path) -> None:
    with served(packed, read_s=0.0) as model, torch.inference_mode():
        logits = model(PROMPT[:, :1] + 1).logits
    with running(packed) as edge, served(packed, edge, read_s=0.3) as model, torch.inference_mode():
        remote = model.comoe._serving.remote
        link = remote._links[edge.url]
        model(PROMPT[:, :1])
        before = model.comoe.stats()
        link.rests_until_s = perf_counter() + 0.1  # less than the first read takes
        assert torch.equal(model(PROMPT[:, :1] + 1).logits, logits)
        after = model.comoe.stats()
        assert after["edge_runs"] > before["edge_runs"]
        assert after["edge_failures"] == 0


NAN = float("nan")


@pytest.mark.parametrize(
    ("exact", "answers", "right"),
    [
        (True, 1.0, True),
        (True, 1.0000001, False),
        (True, NAN, False),
        (False, 1.0001, True),
        (False, 1.1, False),
        (False, NAN, False),
    ],
)
def test_a_node_is_right_to_the_bit_or_nearly(packed: Path, exact: bool, answers: float, right: bool) -> None:
    with running(packed) as edge:
        pack = Pack(packed)
        plain = PlainMath(pack.manifest.site(0), "silu", True)
        client = RemoteRun(Node(edge.url), manifest_hash(packed), perf_counter)
        (link,) = open_links([client], [edge.url], pack, known_answer(pack, plain, exact=exact), perf_counter)
        link.known = link.known._replace(answer=link.known.answer * np.float32(answers))
        if right:
            assert len(link.ask().answer.y) == 1
        else:
            with pytest.raises(RemoteUnavailable, match="otherwise than this device"):
                link.ask()
        link.close()
        pack.close()


def test_a_node_of_another_pack_or_none_is_refused_before_the_model_runs(packed: Path, copied: Path) -> None:
    (copied / "comoe.json").write_bytes((copied / "comoe.json").read_bytes() + b"\n")
    with running(copied) as edge, pytest.raises(RemoteUnavailable, match="does not serve this pack"):
        load(packed, expert_memory="50%", edges=[edge.url])
    with pytest.raises(RemoteUnavailable, match="does not answer"):
        load(packed, expert_memory="50%", edges=["http://127.0.0.1:1"])


def test_the_command_line_takes_nodes_and_their_token(comoe: Comoe, packed: Path, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("a-token-of-some-length\n")
    words = ("run", packed, "-p", "the quick", "-n", 4, "--expert-memory", "50%", "--json")
    alone = document(comoe(*words))
    with running(packed, "--token-file", token) as edge:
        helped = document(comoe(*words, "--edge", edge.url, "--token-file", token))
        assert comoe(*words, "--edge", edge.url).code == 2
    assert helped["text"] == alone["text"]
    assert {"edge_runs", "edge_bytes"} <= helped.keys()


def test_a_device_without_the_kernel_says_so(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("comoe.kernels.native.available", lambda: False)
    with pytest.raises(UsageError, match="with the kernel only"):
        load(packed, expert_memory="50%", edges=["http://127.0.0.1:1"])


@pytest.mark.parametrize(("family", "dtype"), [("switch_transformers", torch.float32), ("mixtral", torch.bfloat16)])
def test_other_families_answer_the_same_to_the_bit(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    subject = Subject(family, tmp_path, dtype, forms=("exact",))
    with running(subject.pack) as edge:
        loader = Loader(Pack(subject.pack), Options(edges=(Node(edge.url),)))
        loader.pace(lambda nbytes: 10 * READ_S)
        model = loader.streamed("exact", subject.expert_bytes)
        with model.comoe:
            assert answer(model, 5).equals(alone(subject))
            assert model.comoe.stats()["edge_runs"] > 0


def alone(subject: Subject) -> Answer:
    with subject.served() as model:
        return answer(model, 5)


def test_a_family_whose_experts_are_no_two_linears_is_refused(tmp_path: Path) -> None:
    subject = Subject("gpt_oss", tmp_path, forms=("exact",))
    with pytest.raises(UsageError, match="plain experts"):
        load(subject.pack, expert_memory="50%", edges=["http://127.0.0.1:1"])
