"""Generated checkpoints: transformers and comoe take them for real ones, and every token is seen as it is made."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from comoe.store.tensorfiles import INDEX, stored_tensors
from comoe.testbed.checkpoints import QwenShape, Shape, SwitchShape, text, write_checkpoint
from comoe.testbed.libraries import own_copy

QWEN = QwenShape(hidden=64, layers=2, experts=4, active=2, width=32, heads=2, kv_heads=1, head=32, vocab=300)
SWITCH = SwitchShape(hidden=64, layers=2, experts=4, width=96, heads=2, head=32, vocab=300)
SHAPES = pytest.mark.parametrize("shape", [QWEN, SWITCH], ids=["qwen", "switch"])


def loaded(folder: Path) -> tuple[Any, dict[str, Any]]:
    """transformers' model of `folder`, and what it missed or did not expect."""
    from comoe.store.checkpoint import model_class, read_config

    model, report = model_class(read_config(folder)).from_pretrained(folder, output_loading_info=True)
    return model.eval(), report


@SHAPES
def test_transformers_finds_every_tensor_and_expects_each(shape: Shape, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "c", shape)
    _, report = loaded(tmp_path / "c")
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report


@SHAPES
def test_a_prompt_of_random_text_spreads_over_all_experts(shape: Shape, tmp_path: Path) -> None:
    import torch
    from transformers import AutoTokenizer

    write_checkpoint(tmp_path / "c", shape)
    model, _ = loaded(tmp_path / "c")
    used: set[int] = set()
    routers = [m for n, m in model.named_modules() if n.endswith(("mlp.gate", "mlp.router.classifier"))]
    for router in routers:
        router.register_forward_hook(lambda module, given, out: used.update(_choices(out)))
    ids = AutoTokenizer.from_pretrained(tmp_path / "c")(text(64, shape.vocab), return_tensors="pt").input_ids
    with torch.no_grad():
        model(input_ids=ids, **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}))
    assert used == set(range(4))


def _choices(out: Any) -> list[int]:
    logits = out[0] if isinstance(out, tuple) else out
    best: list[int] = logits.argmax(-1).flatten().tolist()
    return best


def test_switch_base_128_has_its_parameters() -> None:
    shape = SwitchShape(hidden=768, layers=12, experts=128, width=3072, heads=12)
    assert sum(int(np.prod(weight.shape)) for weight in shape.tensors()) == 7_415_217_408


def test_shards_are_no_larger_than_asked_for_and_the_index_names_them(tmp_path: Path) -> None:
    nbytes = write_checkpoint(tmp_path / "c", QWEN, shard_bytes=40_000)
    files = sorted((tmp_path / "c").glob("*.safetensors"))
    assert len(files) > 3
    tensors = stored_tensors(tmp_path / "c")
    sizes = {file.name: sum(t.extent.length for t in tensors.values() if t.extent.file == file.name) for file in files}
    assert max(sizes.values()) <= 40_000
    assert sum(sizes.values()) == nbytes == json.loads((tmp_path / "c" / INDEX).read_text())["metadata"]["total_size"]


def test_the_seed_decides_every_byte(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_checkpoint(tmp_path / name, QWEN, seed=seed)
    a, b, c = ((tmp_path / name / "model-00001-of-00001.safetensors").read_bytes() for name in "abc")
    assert a == b != c


def test_every_token_is_a_character_that_is_shown_as_it_comes(tmp_path: Path) -> None:
    from transformers import AutoTokenizer, TextStreamer

    write_checkpoint(tmp_path / "c", QWEN)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "c")
    prompt = text(50, QWEN.vocab)
    ids = tokenizer(prompt).input_ids
    assert (len(prompt), len(ids), tokenizer.decode(ids)) == (50, 50, prompt)
    shown: list[str] = []

    class Shown(TextStreamer):  # type: ignore[misc]
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            shown.append(text)

    streamer = Shown(tokenizer)
    for number, token in enumerate(ids, 1):
        streamer.put(np.array([token]))
        assert "".join(shown) == prompt[:number]


def test_an_own_copy_shares_no_library_with_the_original(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    libraries = ("packed/fast.so", "packed/a/b/deep.so.1", "packed.libs/libextra-1.so")
    for name in (*libraries, "packed/__init__.py", "packed/plain/data.txt"):
        file = tmp_path / "site" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("" if name.endswith("py") else name)
    monkeypatch.syspath_prepend(tmp_path / "site")
    environment = own_copy(("packed",), tmp_path / "own")
    assert environment["PYTHONPATH"].split(":")[0] == str(tmp_path / "own")
    for name in libraries:
        assert (tmp_path / "own" / name).read_text() == name
        assert not (tmp_path / "own" / name).samefile(tmp_path / "site" / name)
    for name in ("packed/__init__.py", "packed/plain/data.txt"):
        assert (tmp_path / "own" / name).samefile(tmp_path / "site" / name)


def test_a_package_that_is_not_there_cannot_be_copied(tmp_path: Path) -> None:
    with pytest.raises(ModuleNotFoundError):
        own_copy(("no_such_package",), tmp_path)
