"""Layouts: fields in order, aligned, apart, and as many bytes as a form promises."""

from math import prod

import pytest
from hypothesis import given
from hypothesis import strategies as st

from comoe.store.layout import ALIGNMENT, DIRECT_ROW_BYTES, PAGE, Layout, align, group_size, layout, quantised
from comoe.types import Leaf, Site

PARTS = ("exact", "high", "low", "merged")

sides = st.one_of(st.integers(1, 100), st.sampled_from([32, 64, 768, 1024, 2048, 1056]))
shapes = st.one_of(st.tuples(sides), st.tuples(sides, sides))
leaves = st.builds(Leaf, st.just(""), shapes, st.booleans())
sites = st.builds(
    lambda leaves, dtype: Site(
        "experts", 4, tuple(Leaf(f"leaf{at}", leaf.shape, leaf.transposed) for at, leaf in enumerate(leaves)), dtype
    ),
    st.lists(leaves, min_size=1, max_size=5),
    st.sampled_from(["float32", "bfloat16", "float16"]),
)


@given(sites, st.sampled_from(PARTS))
def test_fields_are_aligned_in_order_and_do_not_overlap(site: Site, part: str) -> None:
    found = layout(site, part)
    end = 0
    for field in found.fields:
        assert field.offset == align(end, ALIGNMENT)
        end = field.offset + field.nbytes
    assert found.nbytes == end


@given(sites)
def test_every_leaf_is_in_a_layout_once_for_every_plane(site: Site) -> None:
    high = ["scales", "high"]
    planes = {leaf.name: high if quantised(leaf) else ["exact"] for leaf in site.leaves}
    for part in ("high", "merged"):
        found = [(field.leaf, field.plane) for field in layout(site, part).fields]
        assert found == [(name, plane) for name, wanted in planes.items() for plane in wanted]
    low = [(leaf.name, "low") for leaf in site.leaves if quantised(leaf)]
    assert [(field.leaf, field.plane) for field in layout(site, "low").fields] == low
    exact = [(field.leaf, field.shape, field.dtype) for field in layout(site, "exact").fields]
    assert exact == [(leaf.name, leaf.shape, site.dtype) for leaf in site.leaves]


@given(sites)
def test_planes_have_four_bits_for_every_weight_and_a_half_for_every_group(site: Site) -> None:
    for part in ("high", "low"):
        for field in layout(site, part).fields:
            leaf = next(leaf for leaf in site.leaves if leaf.name == field.leaf)
            if field.plane in ("high", "low"):
                assert field.nbytes * 2 == leaf.size
                assert (field.dtype, field.shape) == ("uint8", (leaf.rows, leaf.cols // 2))
            elif field.plane == "scales":
                group = group_size(leaf.cols)
                assert group is not None and field.nbytes == 2 * leaf.size // group
                assert (field.dtype, field.shape) == ("float16", (leaf.rows, leaf.cols // group))


@given(sites, st.sampled_from(PARTS))
def test_a_stride_holds_the_blob_and_pads_no_more_than_it_must(site: Site, part: str) -> None:
    found = layout(site, part)
    unit = PAGE if found.nbytes >= DIRECT_ROW_BYTES else ALIGNMENT
    assert found.stride % unit == 0 and 0 <= found.stride - found.nbytes < unit


@pytest.mark.parametrize(
    ("nbytes", "stride"), [(DIRECT_ROW_BYTES - 1, 262144), (DIRECT_ROW_BYTES + 1, 266240), (1, 64)]
)
def test_rows_are_whole_pages_from_256_kib_on(nbytes: int, stride: int) -> None:
    assert Layout((), nbytes).stride == stride


def test_a_transposed_matrix_is_stored_exactly_as_it_is_and_quantised_with_its_outputs_first() -> None:
    site = Site("experts", 1, (Leaf("w", (64, 96), transposed=True),), "bfloat16")
    assert layout(site, "exact").fields[0].shape == (64, 96)
    assert [field.shape for field in layout(site, "high").fields] == [(96, 2), (96, 32)]


@pytest.mark.parametrize(("cols", "group"), [(32, 32), (960, 32), (1024, 64), (1056, 32), (48, None), (1, None)])
def test_wide_rows_share_a_scale_among_64_weights_others_among_32_or_stay_exact(cols: int, group: int | None) -> None:
    assert group_size(cols) == group
    assert quantised(Leaf("w", (3, cols))) == (group is not None)


def test_a_vector_is_never_quantised() -> None:
    assert not quantised(Leaf("bias", (1024,)))


@given(st.integers(0, 10**12), st.sampled_from([1, 64, 4096]))
def test_align_is_the_next_multiple(nbytes: int, alignment: int) -> None:
    assert align(nbytes, alignment) % alignment == 0 and 0 <= align(nbytes, alignment) - nbytes < alignment


def test_the_bytes_of_an_expert_in_every_part_are_the_known_ones() -> None:
    """By hand, for a gated expert of hidden size 2048 and 768 hidden units."""
    site = Site("experts", 128, (Leaf("gate_up_proj", (1536, 2048)), Leaf("down_proj", (2048, 768))), "bfloat16")
    weights = 1536 * 2048 + 2048 * 768
    scales = 2 * (1536 * 2048 // 64 + 2048 * 768 // 32)
    sizes = {part: layout(site, part).nbytes for part in PARTS}
    assert sizes == {"exact": 2 * weights, "high": weights // 2 + scales, "low": weights // 2, "merged": sizes["high"]}
    assert prod(site.leaves[0].shape) + prod(site.leaves[1].shape) == weights


def test_an_unknown_part_is_a_key_error() -> None:
    with pytest.raises(KeyError):
        layout(Site("experts", 1, (Leaf("w", (2, 2)),), "float32"), "medium")
