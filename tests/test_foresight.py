"""Foresight: learnt from what layers saw, kept in a pack, refused where it is not whole."""

from pathlib import Path

import numpy as np
import pytest
import torch

from comoe.make.calibrate import LayerInputs
from comoe.make.foresight import foresight, links_of
from comoe.memory.predict import Learned
from comoe.runtime.load import load
from comoe.store.foresight import FORESIGHT, Link, read_foresight, write_foresight
from comoe.types import CorruptBlob, HostileFile

WEIGHTS = {Link(0, 1): np.arange(8, dtype=np.float32).reshape(4, 2), Link(1, 0, True): np.ones((4, 3), np.float32)}


def test_what_is_read_is_what_was_written_to_half_precision(tmp_path: Path) -> None:
    assert read_foresight(tmp_path, [3, 2]) == {}
    write_foresight(tmp_path / FORESIGHT, WEIGHTS)
    found = read_foresight(tmp_path, [3, 2])
    assert found.keys() == WEIGHTS.keys()
    assert all(np.array_equal(found[link], weights) for link, weights in WEIGHTS.items())


@pytest.mark.parametrize("experts", [[3, 3], [2, 2], [3]])
def test_that_of_another_model_is_refused(tmp_path: Path, experts: list[int]) -> None:
    write_foresight(tmp_path / FORESIGHT, WEIGHTS)
    with pytest.raises(HostileFile, match="no foresight of this model"):
        read_foresight(tmp_path, experts)


def test_a_damaged_one_is_refused(tmp_path: Path) -> None:
    path = tmp_path / FORESIGHT
    write_foresight(path, {Link(0, 1): np.full((4, 2), np.inf, np.float32)})
    with pytest.raises(HostileFile, match="what is no number"):
        read_foresight(tmp_path, [3, 2])
    write_foresight(path, WEIGHTS)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(HostileFile):
        read_foresight(tmp_path, [3, 2])


def test_layers_are_linked_within_a_stack_and_its_decoder_round() -> None:
    assert list(links_of([9, 9, 9])) == [Link(0, 1), Link(1, 2), Link(2, 0, later=True)]
    assert list(links_of([9, 9, 7, 7])) == [Link(0, 1), Link(2, 3), Link(3, 2, later=True)]
    assert list(links_of([9])) == list(links_of([0, 0])) == []


def test_what_decides_the_next_layer_is_learnt() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(600, 5, generator=generator)
    next_ = x[:, :3].topk(2, 1).indices  # the next layer takes the two largest of three
    later = torch.cat([next_[:1, :1], x[:-1, 3:].argmax(1, keepdim=True)])  # and the next token what two say of this
    layers = [LayerInputs(x, later, torch.ones_like(later)), LayerInputs(x, next_, torch.ones_like(next_))]
    found = foresight(layers.__getitem__, [2, 3])
    assert found.keys() == {Link(0, 1), Link(1, 0, later=True)}
    learned = Learned(found)
    said = np.stack([learned.chances(Link(0, 1), row[None]) for row in x.numpy()])
    used = np.zeros((600, 3), bool)
    np.put_along_axis(used, next_.numpy(), True, 1)
    assert ((said > 0.5) == used).mean() > 0.9
    said = np.stack([learned.chances(Link(1, 0, later=True), row[None]) for row in x.numpy()[:-1]])
    assert (said.argmax(1) == later[1:, 0].numpy()).mean() > 0.95


def test_a_calibrated_pack_has_one_and_a_run_refuses_a_changed_one(packed: Path, copied: Path) -> None:
    assert (packed / FORESIGHT).is_file()
    write_foresight(copied / FORESIGHT, WEIGHTS)
    with pytest.raises(CorruptBlob, match="pack again"):
        load(copied, expert_memory="30%")


def test_tensors_of_other_names_are_refused(tmp_path: Path) -> None:
    write_foresight(tmp_path / FORESIGHT, WEIGHTS)
    data = (tmp_path / FORESIGHT).read_bytes()
    (tmp_path / FORESIGHT).write_bytes(data.replace(b"000/001/now", b"000/001/abc"))
    with pytest.raises(HostileFile):
        read_foresight(tmp_path, [3, 2])
