"""The chain: assignments against brute force, nested sweeps, and what a pack's manifest makes of them."""

from collections.abc import Mapping, Sequence
from itertools import pairwise, product
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from packs import CLUSTERS, FORMS, write_pack

from comoe.make.chain import PROBED, SHARES, WORTH, chain, choices_of, restricted, used_forms, with_chain
from comoe.plan.chain import Candidate, Choices, sweep, within
from comoe.plan.ladder import ladder_of
from comoe.store.manifest import DIGITS, FORM_PARTS, MANIFEST, Certificate, ChainStep, Manifest, encode, read_manifest

SHARING = ("merged", "lowrank", "residual")
PRICES = st.sampled_from([0.0, 0.003, 0.02, 0.1, 0.7, 5.0])


@st.composite
def choices(draw: st.DrawFn, *, ordered: bool = False, most: int = 5) -> Choices:
    """Up to `most` experts of three to four candidates, the coarsest one's own; clusters that may be shared.

    `ordered`: errors fall and own bytes rise from candidate to candidate.
    """
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    num_experts, num_forms = draw(st.integers(1, most)), draw(st.integers(3, 4))
    errors = rng.uniform(0, 1, (num_forms, num_experts))
    nbytes = rng.integers(0, 20, (num_forms, num_experts)).astype(float)
    if ordered:
        errors, nbytes = -np.sort(-errors, 0), np.sort(nbytes, 0)
    shares = [None, *(draw(st.sampled_from([None, "merged", "base"])) for _ in range(num_forms - 2)), None]
    candidates = [Candidate(str(at), errors[at], nbytes[at], shares[at]) for at in range(num_forms)]
    if not draw(st.booleans()):
        candidates = [Candidate(str(at), errors[at], nbytes[at]) for at in range(num_forms)]
        return Choices(tuple(candidates), np.array([], np.int64), {})
    cluster = np.unique(rng.integers(0, draw(st.integers(1, num_experts)), num_experts), return_inverse=True)[1]
    sizes = {part: rng.integers(1, 30, cluster.max() + 1).astype(float) for part in ("merged", "base")}
    return Choices(tuple(candidates), cluster, sizes)


def slow_bytes(found: Choices, assignment: Sequence[int]) -> float:
    """Bytes of an assignment, expert by expert."""
    total, opened = 0.0, set()
    for expert, at in enumerate(assignment):
        total += found.candidates[at].nbytes[expert]
        if part := found.candidates[at].shared:
            opened.add((part, int(found.cluster[expert])))
    return total + sum(found.shared_nbytes[part][cluster] for part, cluster in opened)


def slow_error(found: Choices, assignment: Sequence[int]) -> float:
    return float(sum(found.candidates[at].errors[expert] for expert, at in enumerate(assignment)))


def slow_best(found: Choices, per_byte: float, finest: Sequence[int] | None, *, sharing: bool) -> float:
    """The least error + `per_byte` x bytes of all assignments that there are."""
    num_experts, last = len(found.candidates[0].errors), len(found.candidates) - 1
    ranges = [range((last if finest is None else finest[expert]) + 1) for expert in range(num_experts)]
    return min(
        slow_error(found, tried) + per_byte * slow_bytes(found, tried)
        for tried in product(*ranges)
        if sharing or not any(found.candidates[at].shared for at in tried)
    )


# --- one multiplier ---


@given(found=choices(), per_byte=PRICES, sharing=st.booleans(), seed=st.integers(0, 99) | st.none())
@settings(max_examples=150, deadline=None)
def test_the_best_assignment_is_that_of_brute_force(
    found: Choices, per_byte: float, sharing: bool, seed: int | None
) -> None:
    num_experts = len(found.candidates[0].errors)
    finest = None
    if seed is not None:
        finest = np.random.default_rng(seed).integers(0, len(found.candidates), num_experts)
    best = found.best(per_byte, finest, sharing=sharing)
    assert found.error(best) == pytest.approx(slow_error(found, best))
    assert found.nbytes(best) == slow_bytes(found, best)
    assert sharing or not any(found.candidates[at].shared for at in best)
    assert finest is None or (best <= finest).all()
    wanted = slow_best(found, per_byte, None if finest is None else finest.tolist(), sharing=sharing)
    assert found.error(best) + per_byte * found.nbytes(best) == pytest.approx(wanted)


def pair(merged: float, fine: float) -> Choices:
    """Two experts of one cluster whose coarsest form is shared: 10 bytes for both; the fine one has 8 bytes each."""
    candidates = (
        Candidate("merged", np.array([merged, merged]), np.zeros(2), "merged"),
        Candidate("fine", np.array([fine, fine]), np.full(2, 8.0)),
    )
    return Choices(candidates, np.zeros(2, np.int64), {"merged": np.array([10.0])})


def test_a_blob_that_one_expert_cannot_do_without_costs_the_others_nothing() -> None:
    found, finest = pair(merged=0.5, fine=0.0), np.array([0, 1])
    best = found.best(0.1, finest)
    assert best.tolist() == [0, 0]
    assert found.error(best) + 0.1 * found.nbytes(best) == pytest.approx(slow_best(found, 0.1, [0, 1], sharing=True))


def test_a_shared_blob_is_opened_when_its_members_together_save_its_price() -> None:
    assert pair(merged=0.1, fine=0.0).best(0.1).tolist() == [0, 0]  # 1.2 beats 1.6
    assert pair(merged=0.4, fine=0.0).best(0.1).tolist() == [1, 1]  # 1.8 does not
    assert pair(merged=0.1, fine=0.0).best(0.1, sharing=False).tolist() == [1, 1]


def test_an_infinite_error_is_never_chosen() -> None:
    candidates = (
        Candidate("merged", np.array([np.inf, 0.1]), np.zeros(2), "merged"),
        Candidate("fine", np.zeros(2), np.full(2, 100.0)),
    )
    found = Choices(candidates, np.array([0, 1]), {"merged": np.array([1.0, 1.0])})
    assert found.best(1e6).tolist() == [1, 0]


# --- budgets ---


@given(found=choices(), budget=st.integers(0, 120), sharing=st.booleans())
@settings(max_examples=100, deadline=None)
def test_what_is_within_a_budget_is_on_the_hull_and_nothing_on_the_hull_that_fits_is_better(
    found: Choices, budget: int, sharing: bool
) -> None:
    """No assignment of brute force has less error at no more bytes; None only where the fewest bytes are too many."""
    best = within(found, budget, sharing=sharing)
    ranges = [range(len(found.candidates))] * len(found.candidates[0].errors)
    tried = [a for a in product(*ranges) if sharing or not any(found.candidates[at].shared for at in a)]
    if best is None:
        assert min(slow_bytes(found, a) for a in tried) > budget
        return
    nbytes, error = found.nbytes(best), found.error(best)
    assert nbytes <= budget
    assert not any(slow_bytes(found, a) <= nbytes and slow_error(found, a) < error - 1e-9 for a in tried)


def test_a_budget_for_everything_gives_the_least_error_and_one_for_nothing_none() -> None:
    found = pair(merged=0.1, fine=0.0)
    assert within(found, 16).tolist() == [1, 1]  # type: ignore[union-attr]
    assert within(found, 10).tolist() == [0, 0]  # type: ignore[union-attr]
    assert within(found, 9) is None
    assert within(found, 15, sharing=False) is None


budgets = st.lists(st.integers(0, 120), min_size=1, max_size=8)


@given(found=choices(most=8), budgets=budgets, shared_up_to=st.sampled_from([0.0, 40.0, np.inf]))
@settings(max_examples=100, deadline=None)
def test_steps_are_distinct_and_nested_and_share_blobs_up_to_a_size_alone(
    found: Choices, budgets: list[int], shared_up_to: float
) -> None:
    steps = sweep(found, budgets, shared_up_to)
    assert len({tuple(step) for step in steps}) == len(steps)
    anew = [not (coarse <= fine).all() for coarse, fine in pairwise(steps)]
    assert sum(anew) <= (bool(found.shared_nbytes) and 0 < shared_up_to < np.inf)  # where sharing begins
    for step in steps:
        nbytes = found.nbytes(step)
        assert nbytes <= max(budgets)
        assert nbytes <= shared_up_to or not any(found.candidates[at].shared for at in step)


@given(found=choices(ordered=True, most=8), budgets=budgets)
@settings(max_examples=100, deadline=None)
def test_more_bytes_lose_less_and_every_budget_has_its_step(found: Choices, budgets: list[int]) -> None:
    steps = sweep(found, budgets, 0.0)
    sizes = [found.nbytes(step) for step in steps]
    errors = [found.error(step) for step in steps]
    assert sizes == sorted(sizes)
    assert errors == sorted(errors, reverse=True)
    for budget in budgets:
        assert (within(found, budget, sharing=False) is None) == (not any(size <= budget for size in sizes))


def test_room_that_the_finer_step_leaves_is_not_filled_by_a_coarser_one() -> None:
    candidates = (
        Candidate("dropped", np.full(2, 1.0), np.zeros(2)),
        Candidate("lowrank", np.full(2, 0.05), np.full(2, 5.0), "base"),
        Candidate("q2", np.full(2, 0.1), np.full(2, 10.0)),
        Candidate("q3", np.full(2, 0.001), np.full(2, 16.0)),
    )
    found = Choices(candidates, np.zeros(2, np.int64), {"base": np.array([18.0])})
    assert [found.nbytes(step) for step in sweep(found, [29, 31])] == [20]


# --- a pack's chain ---

EXPERTS = len(CLUSTERS)
ERRORS = {
    "dropped": (0.4, 0.3, 0.2, 0.1),
    "merged": (0.08, 0.06, 0.04, 0.02),
    "q4": (0.02, 0.014, 0.01, 0.005),
    "q8": (0.0002, 0.00014, 0.0001, 0.00005),
}
"""By expert: a fifth of what dropping adds in the merged form, a twentieth in q4; in the second layer a tenth less."""

ALL_SHARES = (0.01, *SHARES, 0.6, 0.8)


@pytest.fixture
def toy(tmp_path: Path) -> Manifest:
    """Two layers of four experts in two clusters each, nothing certified yet."""
    write_pack(tmp_path / "pack", None)
    manifest = read_manifest(tmp_path / "pack")
    less = {form: tuple(0.9 * error for error in errors) for form, errors in ERRORS.items()}
    first, second = manifest.layers
    layers = (msgspec.structs.replace(first, errors=ERRORS), msgspec.structs.replace(second, errors=less))
    return msgspec.structs.replace(manifest, forms=("dropped", *FORMS), layers=layers, chain=())


def clustered(manifest: Manifest, clusters: tuple[int, ...]) -> Manifest:
    """With other clusters in every layer."""
    layers = []
    for layer in manifest.layers:
        part = msgspec.structs.replace(layer.parts["merged"], rows=max(clusters) + 1)
        layers.append(msgspec.structs.replace(layer, clusters=clusters, parts={**layer.parts, "merged": part}))
    return msgspec.structs.replace(manifest, layers=tuple(layers))


def reread(manifest: Manifest, folder: Path) -> Manifest:
    folder.mkdir()
    (folder / MANIFEST).write_bytes(encode(manifest))
    return read_manifest(folder)


def forms_of(manifest: Manifest) -> dict[str, set[str]]:
    """The forms that every step uses."""
    names = [step.name for step in manifest.chain]
    return {name: {form for layer in manifest.assignment(name) for form in layer} for name in names}


def share_of(manifest: Manifest, name: str) -> float:
    return manifest.form_bytes(name) / manifest.expert_bytes_bf16


def test_choices_are_the_packs_errors_and_bytes(toy: Manifest) -> None:
    found = choices_of(toy)
    assert found is not None
    assert [candidate.form for candidate in found.candidates] == list(toy.forms)
    assert [candidate.form for candidate in found.candidates if candidate.shared] == ["merged"]
    assert found.cluster.tolist() == [*CLUSTERS, *(2 + cluster for cluster in CLUSTERS)]
    for at, form in enumerate(toy.forms):
        errors = ERRORS.get(form, (0.0,) * EXPERTS)
        assert found.candidates[at].errors == pytest.approx([*errors, *(0.9 * error for error in errors)])
        assert found.nbytes(np.full(2 * EXPERTS, at)) == toy.form_bytes(form)


def test_without_a_measured_error_there_is_no_chain(toy: Manifest) -> None:
    blank = msgspec.structs.replace(
        toy, layers=tuple(msgspec.structs.replace(layer, errors={}) for layer in toy.layers)
    )
    assert choices_of(blank) is None and chain(blank, np.inf) == ()
    assert with_chain(blank, certificates_of(0.5, 1.0), shared=None, pruned=True) == blank


def test_a_layer_that_no_text_reached_adds_as_much_as_others_alike_by_expert(toy: Manifest) -> None:
    unseen = msgspec.structs.replace(toy.layers[1], errors={})
    found = choices_of(msgspec.structs.replace(toy, layers=(toy.layers[0], unseen)))
    assert found is not None
    assert found.candidates[0].errors == pytest.approx([*ERRORS["dropped"], *[0.25] * EXPERTS])


def test_a_form_that_was_not_measured_everywhere_is_no_choice(toy: Manifest) -> None:
    partly = msgspec.structs.replace(toy.layers[1], errors={k: v for k, v in ERRORS.items() if k != "q8"})
    found = choices_of(msgspec.structs.replace(toy, layers=(toy.layers[0], partly)))
    assert found is not None
    assert [candidate.form for candidate in found.candidates] == ["dropped", "merged", "q4", "exact"]


def test_steps_are_within_their_shares_and_tell_their_own_bytes(toy: Manifest) -> None:
    made = msgspec.structs.replace(toy, chain=chain(toy, np.inf, ALL_SHARES))
    names = [step.name for step in made.chain]
    assert len({*names}) == len(names) > 5 and names[-1] == "exact"
    assert {"dropped", "merged", "q4", "q8"} <= set.union(*forms_of(made).values())
    shares = [share_of(made, name) for name in names]
    assert shares == sorted(shares)
    for step, share in zip(made.chain[:-1], shares, strict=False):
        assert share <= max(ALL_SHARES)
        assert float(step.name.rstrip("%")) == pytest.approx(100 * share, rel=0.005)
        assert step.resident_bytes == ladder_of(made).rung(step.name).nbytes
    assert made.chain[-1].resident_bytes == ladder_of(toy).rung("exact").nbytes


def test_of_steps_whose_sizes_look_the_same_the_finest_is_kept(toy: Manifest) -> None:
    """The first layer's q4 comes to 14.4 %; the second's, of a byte each, are worth more than its q8."""
    first, second = toy.layers
    part = msgspec.structs.replace(second.parts["high"], nbytes=1)
    errors = dict(zip(ERRORS, ((error,) * EXPERTS for error in (3e-5, 3e-5, 1e-6, 1e-8)), strict=True))
    second = msgspec.structs.replace(second, parts={**second.parts, "high": part}, errors=errors)
    toy = msgspec.structs.replace(toy, layers=(first, second))
    q4 = EXPERTS * first.parts["high"].nbytes
    made = chain(toy, 0.0, [(q4 + extra + 0.5) / toy.expert_bytes_bf16 for extra in range(EXPERTS + 1)])
    assert [step.name for step in made] == ["14.4%", "exact"]
    assert made[0].assignment == (DIGITS[toy.forms.index("q4")] * EXPERTS,) * 2


def test_experts_share_up_to_the_asked_share_of_bytes_alone(toy: Manifest) -> None:
    for up_to in (0.0, 0.25, np.inf):
        made = msgspec.structs.replace(toy, chain=chain(toy, up_to, ALL_SHARES))
        sharing = {name: "merged" in used for name, used in forms_of(made).items()}
        assert any(sharing.values()) == (up_to > 0)
        assert all(share_of(made, name) <= up_to for name, shared in sharing.items() if shared)


def test_an_expert_that_is_a_cluster_by_itself_is_never_merged(toy: Manifest) -> None:
    """Though it would lose next to nothing: it has a form of four bits of its own."""
    made = lossless(clustered(toy, (0, 1, 2, 1)))
    made = msgspec.structs.replace(made, chain=chain(made, np.inf, ALL_SHARES))
    digit = DIGITS[made.forms.index("merged")]
    layers = [layer for step in made.chain for layer in step.assignment]
    assert any(layer[1] == layer[3] == digit for layer in layers)
    assert not any(digit in (layer[0], layer[2]) for layer in layers)


def test_where_every_expert_is_a_cluster_nothing_is_merged(toy: Manifest) -> None:
    made = lossless(clustered(toy, (0, 1, 2, 3)))
    made = msgspec.structs.replace(made, chain=chain(made, np.inf, ALL_SHARES))
    assert len(made.chain) > 5
    assert not any("merged" in used for used in forms_of(made).values())


def lossless(manifest: Manifest) -> Manifest:
    """With merged experts that lose next to nothing."""
    none = {"merged": (1e-9,) * EXPERTS}
    layers = (msgspec.structs.replace(layer, errors={**layer.errors, **none}) for layer in manifest.layers)
    return msgspec.structs.replace(manifest, layers=tuple(layers))


# --- which forms are worth their place ---


def assigned(manifest: Manifest) -> dict[str, tuple[tuple[str, ...], ...]]:
    return {step.name: manifest.assignment(step.name) for step in manifest.chain}


def certificate(loss: float) -> Certificate:
    return Certificate(loss, (0.9 * loss, 1.1 * loss), 1.5 * loss, (loss, 2 * loss), "poems")


def certificates_of(up_to: float, gain: float) -> "Fake":
    return Fake(up_to, gain)


class Fake:
    """Certifies every step by its size; one with merged experts loses `gain` times that up to the share `up_to`, else
    twice. Remembers the manifests that it was given."""

    def __init__(self, up_to: float, gain: float) -> None:
        self.up_to, self.gain = up_to, gain
        self.given: list[Manifest] = []

    def __call__(self, manifest: Manifest) -> Mapping[str, Certificate]:
        self.given.append(manifest)
        used = forms_of(manifest)
        return {name: certificate(self.loss(manifest, name, used[name])) for name in used if name != "exact"}

    def loss(self, manifest: Manifest, name: str, used: set[str]) -> float:
        share = share_of(manifest, name)
        plain = 1.0 - share
        if "merged" not in used:
            return plain
        return plain * (self.gain if share <= self.up_to else 2.0)


@pytest.mark.parametrize("up_to", [0.08, 0.16, 0.25])
def test_experts_share_up_to_the_size_at_which_it_loses_less(toy: Manifest, up_to: float) -> None:
    made = with_chain(toy, certificates_of(up_to, 0.5), shared=None, pruned=True)
    sharing = [share_of(made, name) for name, used in forms_of(made).items() if "merged" in used]
    following = [share for share in PROBED if share > up_to]
    assert max(sharing, default=0.0) < (following[0] if following else np.inf)
    limits = [share for share in (*SHARES, np.inf) if up_to <= share < (following[0] if following else np.inf) + 1e-9]
    assert assigned(made) in [assigned(msgspec.structs.replace(toy, chain=chain(toy, limit))) for limit in limits]


@pytest.mark.parametrize(("up_to", "gain"), [(0.0, 0.5), (1.0, 1.01 * WORTH)])
def test_experts_do_not_share_where_that_loses_no_less(toy: Manifest, up_to: float, gain: float) -> None:
    made = with_chain(toy, certificates_of(up_to, gain), shared=None, pruned=False)
    assert len(made.chain) > 5
    assert not any("merged" in used for used in forms_of(made).values())


def test_whether_experts_share_can_be_said_and_is_then_not_measured(toy: Manifest) -> None:
    for shared in (True, False):
        certify = certificates_of(0.0, 0.5)
        made = with_chain(toy, certify, shared=shared, pruned=False)
        assert any("merged" in used for used in forms_of(made).values()) == shared
        assert len(certify.given) == 1


def test_without_certificates_experts_do_not_share_unless_told_to(toy: Manifest) -> None:
    for shared in (None, True):
        made = with_chain(toy, None, shared=shared, pruned=False)
        assert any("merged" in used for used in forms_of(made).values()) == (shared is True)
        assert all(step.certificate is None for step in made.chain)


def test_unused_forms_are_pruned_with_their_parts_and_steps_mean_what_they_did(toy: Manifest) -> None:
    kept = with_chain(toy, None, shared=False, pruned=False)
    pruned = with_chain(toy, None, shared=False, pruned=True)
    assert kept.forms == toy.forms
    assert pruned.forms == used_forms(kept.chain, kept.forms) == ("dropped", "q4", "q8", "exact")
    for layer in pruned.layers:
        assert layer.parts.keys() == {"high", "low", "exact"}
        assert layer.errors.keys() == {"dropped", "q4", "q8"} and layer.clusters == ()
    assert [step.name for step in pruned.chain] == [step.name for step in kept.chain]
    for step in kept.chain:
        assert pruned.assignment(step.name) == kept.assignment(step.name)
        assert ladder_of(pruned).rung(step.name).nbytes == step.resident_bytes


def test_certificates_land_on_their_steps_and_are_of_the_pruned_pack(toy: Manifest) -> None:
    certify = certificates_of(1.0, 0.5)
    made = with_chain(toy, certify, shared=None, pruned=True)
    last = certify.given[-1]
    assert (last.forms, last.layers) == (made.forms, made.layers)
    for step in made.chain[:-1]:
        used = forms_of(made)[step.name]
        assert step.certificate == certificate(certify.loss(made, step.name, used))
    assert made.chain[-1].certificate is None
    assert len({step.certificate for step in made.chain}) > len(made.chain) // 2


@given(digits=st.lists(st.sampled_from([*FORM_PARTS]), min_size=1, max_size=4))
@settings(max_examples=40, deadline=None)
def test_used_forms_are_those_of_the_digits_from_coarse_to_exact(digits: list[str]) -> None:
    forms = tuple(FORM_PARTS)
    steps = [ChainStep(form, (DIGITS[forms.index(form)],), 0) for form in digits]
    assert used_forms(steps, forms) == tuple(form for form in forms if form in digits)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("pruned", [True, False])
def test_a_manifest_with_its_chain_is_read_back_as_it_was(
    toy: Manifest, tmp_path: Path, shared: bool, pruned: bool
) -> None:
    made = with_chain(toy, certificates_of(1.0, 0.5), shared=shared, pruned=pruned)
    assert reread(made, tmp_path / "again") == made


@pytest.mark.parametrize("forms", [("exact",), ("q4", "exact"), ("merged", "exact"), ("dropped", "q8", "exact")])
def test_a_manifest_of_fewer_forms_is_read_back_and_holds_nothing_else(
    toy: Manifest, tmp_path: Path, forms: tuple[str, ...]
) -> None:
    fewer = restricted(toy, forms)
    assert reread(fewer, tmp_path / "again") == fewer
    assert {part for layer in fewer.layers for part in layer.parts} == {p for form in forms for p in FORM_PARTS[form]}
    assert all(bool(layer.clusters) == ("merged" in forms) for layer in fewer.layers)
