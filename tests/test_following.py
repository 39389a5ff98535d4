"""A running model that follows its link: what is read towards, what a miss does, and what is served meanwhile."""

from collections.abc import Iterator
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from edges import until
from webs import Web, serving

from comoe.net.address import Access
from comoe.plan.pin import Pin, pinned
from comoe.runtime.following import STEP_S, LinkNow
from comoe.runtime.layer import Serving, Way
from comoe.runtime.load import load

IDS = torch.arange(12)[None]
NEVER = 1e6


@pytest.fixture
def web(published: Path) -> Iterator[Web]:
    with serving(published) as server:
        yield server


def loaded(web: Web, tmp_path: Path, **options: Any) -> Any:
    link = (2e6, 0.01)
    given = {"expert_memory": "500%", "max_loss": "500%", "prefetch": "off"} | options
    return load(web.url, access=Access(tmp_path / "cache", 0, link=link), **given)


def halted(model: Any) -> Any:
    """What follows the link of a model, without its thread; a loss is as large as the error, which random weights do
    not have."""
    following = model.comoe.following
    following.close()
    streaming = following._streaming
    streaming.forms = replace(streaming.forms, curve=np.array([[0.0, 1.0], [0.0, 1.0]]))
    return following


def every_way(serving: Serving, rung: str) -> set[Way]:
    return {serving.way(layer, expert, rung) for layer, expert in serving.manifest.expert_ids}


def test_the_target_rises_with_the_rate_and_one_step_changes_it_at_most_once(web: Web, tmp_path: Path) -> None:
    model = loaded(web, tmp_path)
    with model.comoe as handle:
        following, steps = halted(model), handle._serving.steps
        assert len(steps) > 1 and handle.plan.floor not in steps
        handle.cache.aim([], [])
        found = []
        for at, rate_bps in enumerate((1.0, 1.0, 1e12, 1e12)):
            before = following.switches
            following._link = lambda rate_bps=rate_bps: LinkNow(rate_bps, 0.01, NEVER)
            following.step(10.0 * at)
            assert following.switches <= before + 1
            found.append(steps.index(handle.plan.target))
        assert found[0] < found[2]
        assert handle.stats()["plan_switches"] == following.switches >= 2
        assert handle.ledger.prices == following._ladder.prices(handle.plan.target, handle.plan.floor)


def test_a_plan_for_which_memory_shrank_too_far_is_not_followed_and_asked_for_again(web: Web, tmp_path: Path) -> None:
    model = loaded(web, tmp_path)
    with model.comoe as handle:
        following, before = halted(model), handle.plan
        following._link = lambda: LinkNow(1e12, 0.01, NEVER)
        capacity, handle.cache._residency.capacity = handle.cache.capacity, handle.plan.floor_bytes
        following.step(10.0)
        assert following.switches == 0 and following._follower.plan is None and handle.plan == before
        handle.cache._residency.capacity = capacity
        following.step(20.0)
        assert following.switches == 1


def test_a_miss_waits_or_runs_elsewhere_where_that_is_worth_more(web: Web, tmp_path: Path) -> None:
    model = loaded(web, tmp_path)
    with model.comoe as handle:
        following = halted(model)
        following._link = lambda: LinkNow(1.0, 0.01, 1e-4)
        following.step(10.0)
        assert handle.plan.wait_threshold == 0.0
        following._link = lambda: LinkNow(1.0, 0.01, NEVER)
        following.step(20.0)
        assert handle.plan.wait_threshold == inf


def test_what_is_read_comes_in_the_order_of_its_worth_and_no_more_than_fits(web: Web, tmp_path: Path) -> None:
    model = loaded(web, tmp_path)
    with model.comoe as handle:
        following, hints = halted(model), []
        handle.cache.aim = lambda groups, stay: hints.append((groups, stay))
        following.step(10.0)
        (groups, stay), target = hints.pop(), handle.plan.target
        ways = {way.blobs for way in every_way(handle._serving, target)}
        assert groups and set(groups) <= ways
        read = {blob for group in groups for blob in group}
        floor = {blob for way in every_way(handle._serving, handle.plan.floor) for blob in way.blobs}
        assert read <= set(stay) <= floor.union(*ways)
        room = handle.plan.floor_bytes + handle.pack.nbytes(groups[0][0]) // 2
        handle.cache._residency.capacity = room
        following.step(20.0)
        assert hints.pop()[0] == []


def test_experts_that_are_there_in_a_finer_form_than_wanted_are_served_in_it(web: Web, tmp_path: Path) -> None:
    model = loaded(web, tmp_path)
    with model.comoe as handle:
        following, serving = halted(model), handle._serving
        finest, coarsest = serving.steps[-1], serving.steps[0]
        ways = every_way(serving, finest)
        handle.cache.prefetch([way.blobs for way in ways])
        until(lambda: all(handle.cache.residents([way.blobs for way in ways])))
        ladder = following._ladder
        plan = pinned(ladder, Pin(handle.plan.floor, coarsest, inf), handle.cache.capacity)
        handle.follow(plan, "link", ladder.prices(coarsest, plan.floor))
        handle.begin_request()
        model.generate(IDS, max_new_tokens=4, do_sample=False)
        assert handle.stats()["hit_rate"] == 1.0
        assert set(handle.stats()["shares"]) <= {way.form for way in ways}


def test_it_runs_by_itself_and_answers_keep_their_bound(web: Web, tmp_path: Path) -> None:
    model = loaded(web, tmp_path, max_loss="50%")
    with model.comoe as handle:
        until(lambda: handle.stats()["plan_switches"] > 0, 20 * STEP_S)
        for _ in range(3):
            handle.begin_request()
            model.generate(IDS, max_new_tokens=8, do_sample=False)
            assert handle.stats()["loss_ledger"] <= 0.5


@pytest.mark.parametrize("options", [{"max_loss": 0.0}, {"log": True}, {"deterministic": True}])
def test_what_depends_on_no_link_follows_none(web: Web, tmp_path: Path, options: dict[str, Any]) -> None:
    model = loaded(web, tmp_path, **options)
    with model.comoe as handle:
        assert handle.following is None and handle._serving.steps == ()


def test_a_pack_that_is_here_follows_no_link(published: Path) -> None:
    with load(published, expert_memory="500%", max_loss="500%").comoe as handle:
        assert handle.following is None


def test_where_not_all_of_a_step_fits_what_was_read_of_it_stays(web: Web, tmp_path: Path) -> None:
    """Memory is full of what was used in coarser forms, which a policy that counts uses would rather keep."""
    model = loaded(web, tmp_path, expert_memory="70%")
    with model.comoe as handle:
        following, residency = halted(model), handle.cache._residency
        found = []
        for at, rate_bps in enumerate((1.0, 1.0, *[1e12] * 6)):
            following._link = lambda rate_bps=rate_bps: LinkNow(rate_bps, 0.01, NEVER)
            following.step(10.0 * at)
            until(lambda: not residency._hints and not residency._num_loading)
            if rate_bps == 1.0:
                model.generate(IDS, max_new_tokens=8, do_sample=False)
            found.append(handle.cache.stats.tally.prefetched)
        assert found[1] < found[3] and len(set(found[3:])) == 1
        assert not following._streaming.complete("exact", following._resident(), following._use())


def test_what_another_text_uses_is_soon_read_towards(web: Web, tmp_path: Path) -> None:
    model = loaded(web, tmp_path)
    with model.comoe as handle:
        following, seen = halted(model), handle._serving.seen
        before = following._use()
        experts = len(seen[0][1].uses)
        for expert in (*[0] * 100, *[experts - 1] * 30):
            for _, answer in seen:
                answer.uses[expert] += 10
                answer.tokens += 10
            found = following._use()
        assert found[experts - 1] > 2 * found[0] > 0
        assert found[1] < before[1]


def test_once_it_is_closed_nothing_is_aimed_at(web: Web, tmp_path: Path) -> None:
    model = loaded(web, tmp_path)
    with model.comoe as handle:
        following, hints = halted(model), []
        handle.cache.aim = lambda groups, stay: hints.append((groups, stay))
        following.close()
        assert hints == [([], [])]
