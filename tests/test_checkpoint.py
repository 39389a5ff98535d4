"""The importer: damaged checkpoints are refused by name, quantised ones are read one expert at a time."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import TOP_K
from models import edit_config, save_random
from quantised import WEIGHTS, save_fp8, save_mxfp4, save_plain
from safetensors.torch import load_file, save_file
from torch import Tensor

from comoe.store.checkpoint import Checkpoint
from comoe.types import (
    CheckpointError,
    HostileFile,
    MissingShard,
    NotAMoE,
    NotFinite,
    TruncatedShard,
    UnsupportedFamily,
    UsageError,
    WrongShape,
)

INDEX = "model.safetensors.index.json"
AN_EXPERT = "model.layers.1.mlp.experts.2.up_proj.weight"
A_DENSE_TENSOR = "model.layers.0.self_attn.o_proj.weight"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    save_random("qwen3_moe", folder, torch.bfloat16)
    return folder


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    """A copy of a sound checkpoint, to be damaged."""
    return Path(shutil.copytree(sound, tmp_path / "checkpoint"))


def edit_tensors(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS)


def edit_header(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    raw = (folder / WEIGHTS).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    edit(header)
    write_header(folder, json.dumps(header).encode(), raw[8 + length :])


def write_header(folder: Path, header: bytes, data: bytes) -> None:
    (folder / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header + data)


def shard(folder: Path) -> None:
    """Give every layer a file of its own, named by an index."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    files = {name: f"part-{name.split('.')[2] if '.layers.' in name else 'x'}.safetensors" for name in tensors}
    for file in set(files.values()):
        save_file({name: tensor for name, tensor in tensors.items() if files[name] == file}, folder / file)
    (folder / INDEX).write_text(json.dumps({"weight_map": files}))


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


# --- damaged ---


def test_a_sound_checkpoint_opens(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    assert (len(checkpoint.sites), checkpoint.dtype, checkpoint.experts_per_token) == (4, "bfloat16", TOP_K)


def test_a_sharded_checkpoint_gives_the_same_experts(sound: Path, folder: Path) -> None:
    shard(folder)
    one, many = Checkpoint.open(sound), Checkpoint.open(folder)
    assert len(many.files) == 5
    assert same(many.expert(1, 2), one.expert(1, 2))
    assert sorted(many.dense_names) == sorted(one.dense_names)


def test_a_path_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not a folder"):
        Checkpoint.open(tmp_path / "nowhere")


def test_a_missing_config_is_named(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json"):
        Checkpoint.open(folder)


def test_a_config_that_is_no_json_is_named(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    with pytest.raises(UnsupportedFamily, match=r"config\.json"):
        Checkpoint.open(folder)


def test_an_unknown_model_type_is_unsupported(folder: Path) -> None:
    edit_config(folder, model_type="no_such_model")
    with pytest.raises(UnsupportedFamily, match="no_such_model"):
        Checkpoint.open(folder)


def test_an_unknown_architecture_is_unsupported(folder: Path) -> None:
    edit_config(folder, architectures=["NoSuchForCausalLM"])
    with pytest.raises(UnsupportedFamily, match="NoSuchForCausalLM"):
        Checkpoint.open(folder)


def test_an_unknown_quantisation_is_unsupported(folder: Path) -> None:
    edit_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(UnsupportedFamily, match="quantised by 'gptq'"):
        Checkpoint.open(folder)


def test_a_dense_model_is_not_a_moe(folder: Path) -> None:
    edit_config(folder, mlp_only_layers=[0, 1, 2, 3])
    with pytest.raises(NotAMoE):
        Checkpoint.open(folder)


def test_a_shard_that_the_index_names_and_nobody_has_is_missing(folder: Path) -> None:
    shard(folder)
    (folder / "part-1.safetensors").unlink()
    with pytest.raises(MissingShard, match=r"part-1\.safetensors"):
        Checkpoint.open(folder)


def test_a_tensor_that_the_index_names_and_no_file_holds_is_missing(folder: Path) -> None:
    shard(folder)
    mapping = json.loads((folder / INDEX).read_text())["weight_map"]
    (folder / INDEX).write_text(json.dumps({"weight_map": mapping | {"model.extra": "part-1.safetensors"}}))
    with pytest.raises(MissingShard, match=r"model\.extra"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("mapping", [{"a": "../elsewhere.safetensors"}, {"a": 1}, {}, []], ids=str)
def test_an_index_that_names_no_files_of_the_folder_is_hostile(folder: Path, mapping: object) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": mapping}))
    with pytest.raises(HostileFile):
        Checkpoint.open(folder)


@pytest.mark.parametrize("name", [AN_EXPERT, A_DENSE_TENSOR, "lm_head.weight"])
def test_a_missing_tensor_is_named(folder: Path, name: str) -> None:
    edit_tensors(folder, lambda tensors: tensors.pop(name))
    with pytest.raises(MissingShard, match=r"experts, expert 2: gate_up_proj" if name == AN_EXPERT else name):
        Checkpoint.open(folder)


def test_an_empty_folder_is_missing_its_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    with pytest.raises(MissingShard, match=WEIGHTS):
        Checkpoint.open(folder)


def test_pickled_weights_are_refused(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="holds pickled weights"):
        Checkpoint.open(folder)


def test_a_truncated_file_is_named(folder: Path) -> None:
    raw = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(raw[:-1])
    with pytest.raises(TruncatedShard, match=WEIGHTS):
        Checkpoint.open(folder)


def test_a_file_that_ends_in_its_header_is_truncated(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:100])
    with pytest.raises(TruncatedShard, match="ends inside its header"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("header", [b"not json", b"\xff\xfe", b"[1, 2]", b'{"a": 1}', b'{"a": {"dtype": "F32"}}'])
def test_a_garbage_header_is_hostile(folder: Path, header: bytes) -> None:
    write_header(folder, header, b"")
    with pytest.raises(HostileFile, match=WEIGHTS):
        Checkpoint.open(folder)


@pytest.mark.parametrize("length", [2**63, 2**31, 100 * 1024 * 1024 + 1])
def test_a_huge_header_is_hostile_and_not_read(folder: Path, length: int) -> None:
    (folder / WEIGHTS).write_bytes(length.to_bytes(8, "little") + b"{}")
    with pytest.raises(HostileFile, match=str(length)):
        Checkpoint.open(folder)


def test_overlapping_tensors_are_hostile(folder: Path) -> None:
    def edit(header: dict[str, Any]) -> None:
        earlier, later = (header[f"model.layers.0.self_attn.{name}_proj.weight"] for name in "kv")
        later["data_offsets"] = earlier["data_offsets"]

    edit_header(folder, edit)
    with pytest.raises(HostileFile, match="tensors overlap"):
        Checkpoint.open(folder)


def test_a_gap_between_tensors_is_hostile(folder: Path) -> None:
    edit_header(folder, lambda header: header.pop(A_DENSE_TENSOR))
    with pytest.raises(HostileFile, match="tensors leave a gap"):
        Checkpoint.open(folder)


def test_bytes_after_the_last_tensor_are_hostile(folder: Path) -> None:
    with (folder / WEIGHTS).open("ab") as file:
        file.write(b"more")
    with pytest.raises(HostileFile, match="4 bytes after the last"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("entry", [{"shape": [2, 3]}, {"shape": [-1]}, {"dtype": "F3"}, {"data_offsets": [0]}], ids=str)
def test_an_entry_that_contradicts_itself_is_hostile(folder: Path, entry: dict[str, Any]) -> None:
    edit_header(folder, lambda header: header[A_DENSE_TENSOR].update(entry))
    with pytest.raises(HostileFile):
        Checkpoint.open(folder)


def test_a_dense_tensor_of_another_shape_than_the_configs_is_named(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({A_DENSE_TENSOR: torch.zeros(3, 32)}))
    with pytest.raises(WrongShape, match=A_DENSE_TENSOR):
        Checkpoint.open(folder)


@pytest.mark.parametrize("shape", [(16, 30), (14, 32)], ids=str)
def test_an_expert_of_another_shape_than_the_configs_is_named(folder: Path, shape: tuple[int, int]) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({AN_EXPERT: torch.zeros(shape)}))
    checkpoint = Checkpoint.open(folder)
    with pytest.raises(WrongShape, match="expert 2"):
        checkpoint.expert(1, 2)
    checkpoint.expert(1, 1)


def test_stacked_experts_of_another_number_than_the_configs_are_named(tmp_path: Path) -> None:
    save_random("granitemoe", tmp_path, torch.bfloat16)
    name = "model.layers.0.block_sparse_moe.input_linear.weight"
    edit_tensors(tmp_path, lambda tensors: tensors.update({name: tensors[name][:3].clone()}))
    with pytest.raises(WrongShape, match=name):
        Checkpoint.open(tmp_path).expert(0, 0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_expert_that_is_not_finite_is_named(folder: Path, value: float) -> None:
    edit_tensors(folder, lambda tensors: tensors[AN_EXPERT][3].fill_(value))
    with pytest.raises(NotFinite, match=r"layers\.1.*expert 2"):
        Checkpoint.open(folder).expert(1, 2)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_dense_tensor_that_is_not_finite_is_named(folder: Path, value: float) -> None:
    edit_tensors(folder, lambda tensors: tensors[A_DENSE_TENSOR][3].fill_(value))
    with pytest.raises(NotFinite, match=A_DENSE_TENSOR):
        Checkpoint.open(folder).dense_tensor(A_DENSE_TENSOR)


# --- layouts ---


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "switch_transformers", "granitemoe"])
def test_an_experts_extents_are_its_bytes(family: str, tmp_path: Path) -> None:
    save_random(family, tmp_path, torch.bfloat16)
    checkpoint = Checkpoint.open(tmp_path)
    for layer in range(len(checkpoint.sites)):
        for index in range(checkpoint.sites[layer].num_experts):
            extents = checkpoint.extents(layer, index)
            assert extents is not None
            stored = b"".join((tmp_path / e.file).read_bytes()[e.offset : e.offset + e.length] for e in extents)
            assert stored == b"".join(map(bytes_of, checkpoint.expert(layer, index).values()))


def bytes_of(tensor: Tensor) -> bytes:
    return bytes(tensor.contiguous().view(torch.uint8).numpy())


@pytest.mark.parametrize("square", [False, True])
def test_stacks_that_hubs_hold_transposed_are_turned(square: bool, tmp_path: Path) -> None:
    """As transformers: where the stack has not the model's shape. A square one is taken as it is."""
    model = save_random("qwen3_vl_moe", tmp_path, torch.bfloat16)
    leaf = "down_proj" if square else "gate_up_proj"
    name = f"model.language_model.layers.0.mlp.experts.{leaf}"
    whole = model.state_dict()[name]
    assert (whole.shape[1] == whole.shape[2]) is square
    edit_tensors(tmp_path, lambda tensors: tensors.update({name: whole.transpose(1, 2).contiguous()}))
    found = Checkpoint.open(tmp_path).expert(0, 3)[leaf]
    assert torch.equal(found, whole[3].T if square else whole[3])


# --- quantised ---


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_fp8_one_expert_at_a_time_is_the_whole_dequantised(family: str, tmp_path: Path) -> None:
    plain, quantised = save_fp8(family, tmp_path / "fp8")
    save_plain(plain, tmp_path / "fp8", tmp_path / "plain")
    found, expected = Checkpoint.open(tmp_path / "fp8"), Checkpoint.open(tmp_path / "plain")
    assert found.dtype == "bfloat16"
    assert any("experts" in name for name in quantised)
    for layer in range(len(found.sites)):
        for index in range(found.sites[layer].num_experts):
            assert same(found.expert(layer, index), expected.expert(layer, index))
            assert found.extents(layer, index) is None


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_fp8_dense_tensors_are_dequantised_and_their_scales_not_listed(family: str, tmp_path: Path) -> None:
    plain, quantised = save_fp8(family, tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    dense = {name for name in plain if ".experts." not in name}
    assert set(checkpoint.dense_names) == dense
    assert dense & set(quantised)
    for name in dense:
        assert torch.equal(checkpoint.dense_tensor(name), plain[name]), name


def test_an_fp8_weight_without_its_scale_is_named(tmp_path: Path) -> None:
    save_fp8("qwen3_moe", tmp_path)
    edit_tensors(tmp_path, lambda tensors: tensors.pop(f"{A_DENSE_TENSOR}_scale_inv"))
    with pytest.raises(MissingShard, match=A_DENSE_TENSOR):
        Checkpoint.open(tmp_path).dense_tensor(A_DENSE_TENSOR)
    edit_tensors(tmp_path, lambda tensors: tensors.pop(f"{AN_EXPERT}_scale_inv"))
    with pytest.raises(MissingShard, match="expert 2: gate_up_proj"):
        Checkpoint.open(tmp_path)


def test_fp8_weights_without_a_quantization_config_are_refused(tmp_path: Path) -> None:
    save_fp8("qwen3_moe", tmp_path)
    edit_config(tmp_path, quantization_config=None)
    checkpoint = Checkpoint.open(tmp_path)
    with pytest.raises(CheckpointError):
        checkpoint.expert(0, 0)
    with pytest.raises(CheckpointError, match="lacks its scale, or the config its quantization_config"):
        checkpoint.dense_tensor(A_DENSE_TENSOR)


def test_mxfp4_one_expert_at_a_time_is_the_whole_dequantised(tmp_path: Path) -> None:
    plain = save_mxfp4("gpt_oss", tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    assert set(checkpoint.dense_names) == {name for name in plain if ".experts." not in name}
    for layer, site in enumerate(checkpoint.sites):
        for index in range(site.num_experts):
            for leaf, tensor in checkpoint.expert(layer, index).items():
                assert torch.equal(tensor, plain[f"{site.name}.{leaf}"][index])
