"""Profiles: they add up as their texts do, are refused whole or read exactly, and count what routers chose."""

from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from packs import refused
from safetensors.numpy import load_file, save_file

from comoe.store.profile import DECODE, PHASES, PREFILL, PROFILE, Profile, Routed, read_profile, write_profile
from comoe.types import UsageError

EXPERTS = (3, 2)
"""Of the invented model's layers."""


class Token(NamedTuple):
    """One that came to a layer, and its uses there: (expert, gate). Gates of eighths add up exactly."""

    domain: str
    phase: str
    layer: int
    uses: tuple[tuple[int, float], ...]


def profile_of(tokens: Sequence[Token], experts: Sequence[int] = EXPERTS) -> Profile:
    """Counted one by one."""
    starts = np.cumsum([0, *experts])
    routed: dict[tuple[str, str], Routed] = {}
    for token in tokens:
        empty = Routed(np.zeros(len(experts), np.int64), np.zeros(starts[-1], np.int64), np.zeros(starts[-1]))
        found = routed.setdefault((token.domain, token.phase), empty)
        found.tokens[token.layer] += 1
        for expert, gate in token.uses:
            found.uses[starts[token.layer] + expert] += 1
            found.gates[starts[token.layer] + expert] += gate
    return Profile(tuple(experts), routed)


def same(one: Profile, other: Profile) -> bool:
    return (
        one.experts == other.experts
        and one.routed.keys() == other.routed.keys()
        and all(
            np.array_equal(ours, theirs) and ours.dtype == theirs.dtype
            for key in one.routed
            for ours, theirs in zip(one.routed[key], other.routed[key], strict=True)
        )
    )


domains = st.one_of(
    st.sampled_from(["code", "bible", "a/b", "", "session"]), st.text(st.characters(exclude_categories=["Cs"]))
)


@st.composite
def tokens(draw: st.DrawFn) -> Token:
    layer = draw(st.integers(0, len(EXPERTS) - 1))
    use = st.tuples(st.integers(0, EXPERTS[layer] - 1), st.integers(0, 40).map(lambda eighths: eighths / 8))
    return Token(draw(domains), draw(st.sampled_from(PHASES)), layer, tuple(draw(st.lists(use, max_size=2))))


texts = st.lists(tokens(), max_size=12)


# Sums


@given(texts, texts, texts)
def test_the_sum_of_profiles_is_the_profile_of_all_their_text_in_any_order(
    one: list[Token], two: list[Token], three: list[Token]
) -> None:
    a, b, c = map(profile_of, (one, two, three))
    whole = profile_of([*one, *two, *three])
    for found in ((a + b) + c, a + (b + c), c + b + a):
        assert same(found, whole)
    assert same(a, profile_of(one)) and same(b, profile_of(two))  # and nobody's own counts changed


@given(texts)
def test_uses_are_pooled_over_the_domains_and_phases_asked_for_and_none_where_nothing_was_seen(
    given_: list[Token],
) -> None:
    found = profile_of(given_)
    for of, phase in product((None, ["code"], ["code", "bible"]), (None, *PHASES)):
        chosen = [t for t in given_ if (of is None or t.domain in of) and phase in (None, t.phase)]
        uses, wanted = found.uses(of, phase), profile_of(chosen).uses()
        assert (uses is None) == (wanted is None) == (not chosen)
        assert uses is None or uses.tolist() == np.sum([r.uses for r in profile_of(chosen).routed.values()], 0).tolist()


def test_values_of_all_experts_are_cut_into_layers() -> None:
    assert [layer.tolist() for layer in Profile(EXPERTS).by_layer(np.arange(5))] == [[0, 1, 2], [3, 4]]


def test_profiles_of_different_models_do_not_add_up() -> None:
    with pytest.raises(UsageError, match="of 5 experts in 2 layers, not of 5 in 1"):
        Profile(EXPERTS) + Profile((5,))


# The file


@given(texts, texts)
@settings(deadline=None, max_examples=50)
def test_what_is_read_is_what_was_written_and_the_same_sum_makes_the_same_bytes(
    tmp_path_factory: pytest.TempPathFactory, one: list[Token], two: list[Token]
) -> None:
    folder = tmp_path_factory.mktemp("profile")
    a, b = profile_of(one), profile_of(two)
    for name, profile in (("ab", a + b), ("ba", b + a)):
        write_profile(folder / name, profile)
    assert same(read_profile(folder / "ab"), a + b)
    assert (folder / "ab").read_bytes() == (folder / "ba").read_bytes()
    assert len(load_file(folder / "ab")) == 1 + 3 * len((a + b).routed)
    assert {path.name for path in folder.iterdir()} == {"ab", "ba"}


SEEN = profile_of([Token("code", phase, layer, ((1, 0.5),)) for phase in PHASES for layer in (0, 1)])
USES = f"{PREFILL}/code/uses"


def test_a_pack_may_be_given_for_its_profile(tmp_path: Path) -> None:
    write_profile(tmp_path / PROFILE, SEEN)
    assert same(read_profile(tmp_path), SEEN)


def bytes_of(change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(change(path.read_bytes()))


def tensors_of(change: Callable[[dict[str, np.ndarray]], object]) -> Callable[[Path], object]:
    def rewritten(path: Path) -> None:
        found = dict(load_file(path))
        change(found)
        save_file(found, path)

    return rewritten


def put(name: str, value: Any) -> Callable[[Path], object]:
    return tensors_of(lambda found: found.update({name: value(found.get(name))}))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "nothing in it": bytes_of(lambda data: b""),
    "text": bytes_of(lambda data: b"domain,expert,uses\n" * 100),
    "cut short": bytes_of(lambda data: data[:-1]),
    "longer": bytes_of(lambda data: data + b"\0"),
    "a header that is no JSON": bytes_of(lambda data: data.replace(b'"tokens', b"tokens", 1).replace(b"{", b"[", 1)),
    "a huge header": bytes_of(lambda data: (1 << 62).to_bytes(8, "little") + data[8:]),
    "another model's weights": tensors_of(lambda found: (found.clear(), found.update(w=np.ones(3, np.float32)))),
    "no uses": tensors_of(lambda found: found.pop(USES)),
    "no experts": tensors_of(lambda found: found.pop("experts")),
    "a tensor more": put("prefill/code/more", lambda old: np.ones(5, np.int64)),
    "a tensor of no name": put("uses", lambda old: np.ones(5, np.int64)),
    "a phase that nobody knows": tensors_of(
        lambda found: found.update({f"sleep/code/{part}": found[f"{PREFILL}/code/{part}"] for part in Routed._fields})
    ),
    "an expert less": put(USES, lambda old: old[:-1]),
    "another shape": put(USES, lambda old: old[:, None]),
    "other numbers": put(USES, lambda old: old.astype(np.int32)),
    "fewer than none": put(USES, lambda old: old - 1),
    "more than anybody counts": put(USES, lambda old: old + (1 << 60)),
    "gates that are no numbers": put(f"{DECODE}/code/gates", lambda old: old * np.nan),
    "layers without experts": put("experts", lambda old: np.array([5, 0])),
    "no layers": put("experts", lambda old: np.zeros(0, np.int64)),
    "experts that are one number": put("experts", lambda old: np.array(5)),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_or_foreign_file_is_refused(tmp_path: Path, damage: Callable[[Path], object]) -> None:
    path = tmp_path / "session.profile"
    write_profile(path, SEEN)
    damage(path)
    assert "leave it out or make it again" in refused(UsageError, lambda: read_profile(path), path)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    assert "there is no profile" in refused(UsageError, lambda: read_profile(tmp_path), tmp_path / PROFILE)
    absent = tmp_path / "absent"
    assert "there is no profile" in refused(UsageError, lambda: read_profile(absent), absent)
    long = tmp_path / ("x" * 300)
    refused(UsageError, lambda: read_profile(long), long)
