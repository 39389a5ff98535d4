"""The manifest: what was written is read back, and whatever else stands there is refused in one sentence."""

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from packs import CLUSTERS, FORMS, SITE, edit, refused, write_pack

from comoe.plan.ladder import ladder_of
from comoe.store.layout import layout
from comoe.store.manifest import FORMAT_VERSION, MANIFEST, LayerEntry, decode, encode, read_manifest
from comoe.types import BlobId, ComoeError, ExpertId, HostileFile, NotAPack, PackError, UnknownKey

Document = dict[str, Any]
Change = Callable[[Document], object]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The manifest of a sound pack that refers to a checkpoint."""
    folder = tmp_path_factory.mktemp("original")
    write_pack(folder / "pack", folder / "checkpoint")
    return (folder / "pack" / MANIFEST).read_bytes()


@pytest.fixture
def folder(tmp_path: Path, original: bytes) -> Path:
    (tmp_path / MANIFEST).write_bytes(original)
    return tmp_path


def test_what_was_written_is_read_back_and_written_to_the_same_bytes(folder: Path) -> None:
    assert encode(read_manifest(folder)) == (folder / MANIFEST).read_bytes()


def test_an_expert_in_a_form_is_the_blobs_of_the_forms_parts(folder: Path) -> None:
    manifest = read_manifest(folder)
    expert = ExpertId(1, 3)
    assert manifest.blobs(expert, "q4") == (BlobId(1, "high", 3),)
    assert manifest.blobs(expert, "q8") == (BlobId(1, "high", 3), BlobId(1, "low", 3))
    assert manifest.blobs(expert, "exact") == (BlobId(1, "exact", 3),)
    assert [manifest.blobs(ExpertId(0, e), "merged")[0].row for e in range(4)] == list(CLUSTERS)


def test_a_forms_bytes_are_those_of_all_its_blobs_with_shared_ones_once(folder: Path) -> None:
    manifest = read_manifest(folder)
    nbytes = {part: layout(SITE, part).nbytes for part in ("merged", "high", "low", "exact")}
    assert manifest.form_bytes("merged") == 2 * 2 * nbytes["merged"]
    assert manifest.form_bytes("q8") == 2 * 4 * (nbytes["high"] + nbytes["low"])
    assert manifest.form_bytes("exact") == manifest.expert_bytes_bf16 == 2 * 4 * nbytes["exact"]


def test_a_steps_bytes_are_those_of_the_blobs_of_its_assignment_with_shared_ones_once(folder: Path) -> None:
    manifest = read_manifest(folder)
    nbytes = {part: layout(SITE, part).nbytes for part in ("merged", "high", "low", "exact")}
    assert manifest.form_bytes("8%") == manifest.form_bytes("merged")  # 0000: both clusters
    assert manifest.form_bytes("20%") == 2 * (nbytes["merged"] + 3 * nbytes["high"])  # 0111
    assert manifest.form_bytes("40%") == 2 * (4 * nbytes["high"] + 2 * nbytes["low"])  # 1122


def test_an_assignment_names_every_experts_form_by_layer_whether_of_a_step_or_of_one_form(folder: Path) -> None:
    edit(folder, in_step(assignment=["0123", "3210"]))
    manifest = read_manifest(folder)
    assert manifest.assignment("8%") == (("merged", "q4", "q8", "exact"), ("exact", "q8", "q4", "merged"))
    assert manifest.assignment("q4") == (("q4",) * 4,) * 2
    for name in ("q2", "9%", ""):
        with pytest.raises(KeyError):
            manifest.assignment(name)


def test_experts_are_counted_layer_by_layer(folder: Path) -> None:
    assert read_manifest(folder).expert_ids == [ExpertId(layer, e) for layer in range(2) for e in range(4)]


def test_a_site_is_the_one_that_was_packed(folder: Path) -> None:
    site = read_manifest(folder).site(0)
    assert (site.name, site.num_experts, site.leaves, site.dtype) == (SITE.name, 4, SITE.leaves, "bfloat16")


@pytest.mark.parametrize("make", [Path.touch, Path.mkdir], ids=["nothing in it", "a folder for a manifest"])
def test_a_folder_without_a_manifest_is_no_pack(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / (MANIFEST if make is Path.mkdir else "other.json"))
    refused(NotAPack, lambda: read_manifest(tmp_path), tmp_path)


@pytest.mark.parametrize("name", ["nowhere", "a file", "x" * 300], ids=["missing", "a file", "too long"])
def test_what_is_no_folder_is_no_pack(tmp_path: Path, name: str) -> None:
    (tmp_path / "a file").touch()
    refused(PackError if len(name) > 255 else NotAPack, lambda: read_manifest(tmp_path / name), tmp_path / name)


@pytest.mark.parametrize("version", [0, FORMAT_VERSION - 1, FORMAT_VERSION + 1, -1])
def test_another_version_is_named_even_where_its_keys_are_unknown(folder: Path, version: int) -> None:
    edit(folder, lambda document: document.update(format_version=version, novelty=1))
    assert f"version {version}" in refused(NotAPack, lambda: read_manifest(folder), folder)


def first(document: Document) -> Document:
    return document["layers"][0]


def in_layer(**entries: object) -> Change:
    return lambda document: first(document).update(entries)


def unchained(change: Change) -> Change:
    """Without steps, which would tell first that experts are not as many."""
    return lambda document: (document.update(chain=[]), change(document))


def in_part(part: str, **entries: object) -> Change:
    return lambda document: first(document)["parts"][part].update(entries)


def in_extent(at: int, value: object) -> Change:
    """Change the file, the offset or the length of one extent."""
    return lambda document: first(document)["parts"]["exact"]["extents"][2][1].__setitem__(at, value)


def in_file(**entries: object) -> Change:
    return lambda document: document["source"]["files"][0].update(entries)


def in_leaf(**entries: object) -> Change:
    return lambda document: first(document)["leaves"][0].update(entries)


def in_step(**entries: object) -> Change:
    return lambda document: document["chain"][0].update(entries)


def in_certificate(**entries: object) -> Change:
    return lambda document: document["chain"][0]["certificate"].update(entries)


def on_top(**entries: object) -> Change:
    return lambda document: document.update(entries)


OUT, LEAVES, NAME = "leaves the pack's folder", "no sound leaves", "leaves the checkpoint's folder"
OUTSIDE, CLUSTERING, SHARE = "extents point outside", "clusters do not match", "not one share for every expert"
NEGATIVE, LADDER, PARTS = "sizes are negative", "no ladder", "parts are not those of its forms"
STEP, ASSIGNMENT, NAMES = "has no sound numbers", "does not give every expert a form", "two steps of its chain"
TREE, JOINED = "its tree joins what is not there yet", "does not join all experts, each of them once"
RISE, ERRORS, ROWS, LENGTH = "do not rise", "errors are of no form", "not one blob for every expert", "not the length"

HOSTILE: dict[str, tuple[Change, str]] = {
    "a blob file up the tree": (in_part("high", file="../../etc/passwd"), OUT),
    "a blob file at the root": (in_part("high", file="/etc/passwd"), OUT),
    "a blob file in a folder below": (in_part("high", file="below/file"), OUT),
    "the parent as a blob file": (in_part("high", file=".."), OUT),
    "the pack as a blob file": (in_part("high", file="."), OUT),
    "a blob file without a name": (in_part("high", file=""), OUT),
    "a blob file with a zero in its name": (in_part("high", file="a\0b"), OUT),
    "a blob file that hides in a part of no form": (
        lambda document: first(document)["parts"].update(extra={"rows": 4, "nbytes": 1, "file": "../x"}), PARTS),
    "a source up the tree": (in_file(name="../../etc/passwd"), NAME),
    "a source at the root": (in_file(name="/etc/passwd"), NAME),
    "a source in a folder below": (in_file(name="below/file"), NAME),
    "the parent as a source": (in_file(name=".."), NAME),
    "a source without a name": (in_file(name=""), NAME),
    "a source with a zero in its name": (in_file(name="a\0b"), NAME),
    "a source's folder with a zero in its name": (lambda document: document["source"].update(folder="a\0b"), "no path"),
    "a source of a negative size": (in_file(size=-1), NEGATIVE),
    "an extent of no file": (in_extent(0, 2), OUTSIDE),
    "an extent of the last file from behind": (in_extent(0, -1), OUTSIDE),
    "an extent that begins before its file": (in_extent(1, -1), OUTSIDE),
    "an extent that ends behind its file": (in_extent(1, 10**6), OUTSIDE),
    "an extent that begins beyond counting": (in_extent(1, 2**64), OUTSIDE),
    "an extent of a negative length": (in_extent(2, -4), OUTSIDE),
    "an extent of another length": (in_extent(2, 64), OUTSIDE),
    "lengths that only add up": (
        lambda document: first(document)["parts"]["exact"]["extents"][2].extend([[0, 9, 64], [0, 99, -64]]), OUTSIDE),
    "an extent of nothing": (
        lambda document: first(document)["parts"]["exact"]["extents"][2].append([0, 9, 0]), OUTSIDE),
    "a row of no extents": (lambda document: first(document)["parts"]["exact"]["extents"].__setitem__(2, []), OUTSIDE),
    "a row too few": (lambda document: first(document)["parts"]["exact"]["extents"].pop(), OUTSIDE),
    "a hash too few": (lambda document: first(document)["parts"]["exact"]["hashes"].pop(), OUTSIDE),
    "extents without a source": (lambda document: document.pop("source"), OUTSIDE),
    "a place of no kind": (lambda document: first(document)["parts"]["high"].pop("file"), OUTSIDE),
    "two places for one blob": (
        lambda document: first(document)["parts"]["exact"].update(file="x.safetensors"), "extents of the same blobs"),
    "blobs of another length": (in_part("high", nbytes=1), LENGTH),
    "blobs of a negative length": (in_part("high", nbytes=-1), LENGTH),
    "fewer blobs than experts": (in_part("low", rows=3), ROWS),
    "more blobs than experts": (in_part("merged", rows=5), "more blobs than experts"),
    "a negative number of blobs": (in_part("merged", rows=-1), "more blobs than experts"),
    "no experts": (unchained(in_layer(num_experts=0)), "more blobs than experts"),
    "a negative number of experts": (unchained(in_layer(num_experts=-4)), "more blobs than experts"),
    "an expert more than blobs": (unchained(in_layer(num_experts=5)), ROWS),
    "a layer without leaves": (in_layer(leaves=[]), LEAVES),
    "a leaf of negative sizes": (in_leaf(shape=[-64, -32]), LEAVES),
    "a leaf of no size": (in_leaf(shape=[0, 32]), LEAVES),
    "a leaf beyond counting": (in_leaf(shape=[2**64, 32]), LENGTH),
    "two leaves of one name": (in_leaf(name="norm"), LEAVES),
    "a part that is missing": (lambda document: first(document)["parts"].pop("low"), PARTS),
    "a part of no kind": (lambda document: first(document)["parts"].update(medium={"rows": 4, "nbytes": 1}), PARTS),
    "a cluster that is not there": (in_layer(clusters=[0, 1, 2, 1]), CLUSTERING),
    "a cluster from behind": (in_layer(clusters=[0, 1, -1, 1]), CLUSTERING),
    "a cluster too few": (in_layer(clusters=[0, 1, 1]), CLUSTERING),
    "a share too few": (in_layer(frequency=[0.5, 0.5]), SHARE),
    "a negative share": (in_layer(mass=[2, -1, 0, 0]), SHARE),
    "a tree that joins an expert beyond the last": (in_layer(tree=[[0, 4]]), TREE),
    "a tree that joins a pair with itself": (in_layer(tree=[[0, 1], [2, 5]]), TREE),
    "a tree that joins from behind": (in_layer(tree=[[0, -1]]), TREE),
    "a tree that joins an expert twice": (in_layer(tree=[[0, 1], [0, 2], [3, 4]]), JOINED),
    "a tree that joins a pair twice": (in_layer(tree=[[0, 1], [4, 4], [5, 5]]), JOINED),
    "a tree that leaves an expert out": (in_layer(tree=[[0, 1], [2, 4]]), JOINED),
    "a tree that goes on above its root": (in_layer(tree=[[0, 1], [2, 3], [4, 5], [6, 6]]), JOINED),
    "errors of no form": (in_layer(errors={"q2": [0.1] * 4}), ERRORS),
    "errors of an expert too few": (in_layer(errors={"q4": [0.1] * 3}), ERRORS),
    "errors of an expert too many": (in_layer(errors={"q4": [0.1] * 5}), ERRORS),
    "errors of no expert": (in_layer(errors={"q4": []}), ERRORS),
    "a negative error": (in_layer(errors={"q4": [0.1, 0.1, -0.1, 0.1]}), ERRORS),
    "one error for all experts": (in_layer(errors={"q4": 0.1}), "errors"),
    "no layers": (on_top(layers=[]), "no layers"),
    "a dtype of no kind": (on_top(dtype="int3"), "int3"),
    "a form of no kind": (on_top(forms=["q5", "exact"]), LADDER),
    "forms in another order": (on_top(forms=["exact", "q4"]), LADDER),
    "a form twice": (on_top(forms=["q4", "q4", "exact"]), LADDER),
    "no exact form": (on_top(forms=["merged", "q4", "q8"]), LADDER),
    "no forms": (on_top(forms=[]), LADDER),
    "no experts for a token": (on_top(experts_per_token=0), NEGATIVE),
    "more experts for a token than a float counts": (on_top(experts_per_token=10**400), NEGATIVE),
    "a dense part of a negative size": (on_top(dense_bytes=-1), NEGATIVE),
    "keys and values of a negative size": (on_top(dense={"kv": -(10**9)}), NEGATIVE),
    "quantiles that fall": (on_top(gate_quantiles=[0.0, 0.5, 0.4]), RISE),
    "two steps of one name": (lambda document: document["chain"][1].update(name="8%"), NAMES),
    "a step of a form's name": (in_step(name="q4"), NAMES),
    "an assignment of a layer too few": (in_step(assignment=["0000"]), ASSIGNMENT),
    "an assignment of a layer too many": (in_step(assignment=["0000"] * 3), ASSIGNMENT),
    "an assignment of an expert too few": (in_step(assignment=["0000", "000"]), ASSIGNMENT),
    "an assignment of an expert too many": (in_step(assignment=["0000", "00000"]), ASSIGNMENT),
    "an assignment of experts in the wrong layer": (in_step(assignment=["000", "00000"]), ASSIGNMENT),
    "an assignment of a form beyond the last": (in_step(assignment=["0000", "0400"]), ASSIGNMENT),
    "an assignment of a form from behind": (in_step(assignment=["0000", "-100"]), ASSIGNMENT),
    "an assignment in digits of another script": (in_step(assignment=["0000", "0\u066100"]), ASSIGNMENT),
    "an assignment that is a number": (in_step(assignment=[0, 0]), "assignment"),
    "a step of a negative size": (in_step(resident_bytes=-1), STEP),
    "an interval of the loss turned round": (in_certificate(loss_ci95=[0.2, 0.1]), STEP),
    "an interval of the worst domain's loss turned round": (in_certificate(loss_worst_domain_ci95=[0.2, 0.1]), STEP),
    "an interval of one end": (in_certificate(loss_ci95=[0.2]), "loss_ci95"),
    "a text for a number": (on_top(experts_per_token="2"), "experts_per_token"),
    "a fraction for a number": (on_top(experts_per_token=2.5), "experts_per_token"),
    "a truth for a number": (on_top(experts_per_token=True), "experts_per_token"),
    "null for a text": (on_top(model_type=None), "model_type"),
    "a version that is no number": (on_top(format_version="1"), "format_version"),
    "no version": (lambda document: document.pop("format_version"), "format_version"),
    "a missing key": (lambda document: document.pop("forms"), "forms"),
}  # fmt: skip


UNTRUE: dict[str, Change] = {
    "an exact step in which an expert is coarse": lambda document: document["chain"][-1].update(
        assignment=["3333", "3133"]
    ),
    "an exact step before the last": lambda document: document["chain"].insert(0, document["chain"].pop()),
}
"""What a reader takes for the exact form is."""


@pytest.mark.parametrize("change", UNTRUE.values(), ids=UNTRUE.keys())
def test_a_chain_whose_exact_step_is_not_the_exact_form_is_refused(folder: Path, change: Change) -> None:
    edit(folder, change)
    refused(HostileFile, lambda: read_manifest(folder), folder)


@pytest.mark.parametrize(("change", "reason"), HOSTILE.values(), ids=HOSTILE.keys())
def test_a_manifest_that_a_reader_could_not_rely_on_is_refused(folder: Path, change: Change, reason: str) -> None:
    edit(folder, change)
    assert reason in refused(HostileFile, lambda: read_manifest(folder), folder)


PLACES: dict[str, Callable[[Document], Document]] = {
    "the manifest": lambda document: document,
    "the source": lambda document: document["source"],
    "a source's file": lambda document: document["source"]["files"][0],
    "a layer": first,
    "a leaf": lambda document: first(document)["leaves"][0],
    "a part": lambda document: first(document)["parts"]["high"],
    "the chain": lambda document: document["chain"][0],
    "a certificate": lambda document: document["chain"][0]["certificate"],
    "the provenance": lambda document: document["provenance"],
}


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES.keys())
def test_an_unknown_key_is_named_wherever_it_stands(folder: Path, place: Callable[[Document], Document]) -> None:
    edit(folder, lambda document: place(document).update(novelty=1))
    assert "novelty" in refused(UnknownKey, lambda: read_manifest(folder), folder)


def test_a_key_that_stands_twice_is_refused(folder: Path) -> None:
    text = (folder / MANIFEST).read_text()
    (folder / MANIFEST).write_text(text.replace('"dtype":', '"dtype":"float32","dtype":', 1))
    assert "'dtype' is there twice" in refused(HostileFile, lambda: read_manifest(folder), folder)


@pytest.mark.parametrize(("old", "reason"), [('"mass":[0.4', SHARE), ('"loss":0.15', STEP), ('"q4":[0.005', ERRORS)])
def test_a_number_that_overflows_is_refused(folder: Path, old: str, reason: str) -> None:
    text = (folder / MANIFEST).read_text()
    assert old in text
    (folder / MANIFEST).write_text(text.replace(old, old.rstrip("0.1245") + "1e999", 1))
    assert reason in refused(HostileFile, lambda: read_manifest(folder), folder)


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe", b"[" * 200_000, b'{"a":' * 200_000, b"nonsense", b"{}{}"])
def test_what_is_not_json_is_refused(folder: Path, data: bytes) -> None:
    (folder / MANIFEST).write_bytes(data)
    assert "not JSON" in refused(HostileFile, lambda: read_manifest(folder), folder)


@pytest.mark.parametrize("data", [b"[]", b"17", b"null", b'"text"', b"{}"])
def test_json_of_another_kind_is_refused(folder: Path, data: bytes) -> None:
    (folder / MANIFEST).write_bytes(data)
    refused(HostileFile, lambda: read_manifest(folder), folder)


def test_a_manifest_larger_than_any_is_refused_unparsed(folder: Path) -> None:
    with (folder / MANIFEST).open("r+b") as file:
        file.truncate(101 * 1024 * 1024)
    assert "larger" in refused(HostileFile, lambda: read_manifest(folder), folder)


def test_a_layer_alone_is_read_as_strictly(folder: Path) -> None:
    layer = read_manifest(folder).layers[0]
    assert decode(encode(layer), LayerEntry, folder) == layer
    refused(UnknownKey, lambda: decode(encode(layer)[:-1] + b',"x":1}', LayerEntry, folder), folder)


def paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to everything inside a document."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from paths(inner, (*path, key))


ODD = st.sampled_from(
    [
        None,
        True,
        -1,
        0,
        1,
        3,
        2**31,
        2**63,
        2**64,
        10**400,
        -0.5,
        1e308,
        "",
        "..",
        "exact",
        "q4",
        "\0",
        [],
        {},
        [0],
        [[]],
    ]
)


@given(data=st.data(), value=ODD)
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_odd_value_anywhere_is_refused_by_name_or_harms_no_reader(
    folder: Path, original: bytes, data: st.DataObject, value: Any
) -> None:
    document = json.loads(original)
    path = data.draw(st.sampled_from(list(paths(document))))
    inner = document
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = copy.deepcopy(value)
    (folder / MANIFEST).write_text(json.dumps(document))
    try:
        manifest = read_manifest(folder)
    except ComoeError as error:
        assert isinstance(error, PackError | UnknownKey) and "\n" not in str(error)
        return
    ladder = ladder_of(manifest)
    assert {*FORMS} <= {rung.name for rung in ladder.rungs}
    assert all(rung.nbytes > 0 and len(rung.form) == ladder.num_experts for rung in ladder.rungs)
    assert all(len(manifest.blobs(expert, form)) > 0 for expert in manifest.expert_ids for form in FORMS)
    assert all(Path(file.name).name == file.name for file in manifest.source.files) if manifest.source else True
