"""`comoe export`: a step of the chain as an ordinary checkpoint, every weight written out, that transformers loads.

One file per sparse layer, made one layer at a time; the dense part is the pack's own file.
"""

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import torch
from torch import Tensor

from comoe.make.study import arrays
from comoe.runtime.experts import TORCH_DTYPES, SiteMath
from comoe.store.checkpoint import read_config, skeleton_of
from comoe.store.densefile import RawTensor, write_dense
from comoe.store.families import experts_modules, is_decorated
from comoe.store.manifest import DENSE, Certificate
from comoe.store.pack import Pack
from comoe.store.profile import PROFILE
from comoe.types import ExpertId, Progress, UnsupportedFamily, UsageError
from comoe.units import format_size

STORED = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
NAMED_APART = ("SwitchTransformersExperts",)
"""Modules whose experts are modules of their own; those with the experts interface hold stacked tensors."""

INDEX = "model.safetensors.index.json"
CARD = "README.md"


def export(opened: Pack, step: str, target: Path, progress: Progress) -> None:
    """Write the step `step`, or a form, as a checkpoint in the new folder `target`.

    Raises UsageError for a name that is neither, or a target that exists; UnsupportedFamily where transformers keeps a
    family's experts in a way that is not written yet.
    """
    manifest = opened.manifest
    names = (*(found.name for found in manifest.chain), *manifest.forms)
    if step not in names:
        raise UsageError(f"{opened.folder} has no step {step!r}: choose from {', '.join(dict.fromkeys(names))}.")
    if target.exists():
        raise UsageError(f"{target} exists: choose another name or remove it first.")
    opened.check_files()
    unfinished = target.with_name(f"{target.name}.partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    for name in manifest.files.keys() - {PROFILE}:
        shutil.copyfile(opened.folder / name, unfinished / name)
    places = dict.fromkeys(_names(unfinished), DENSE)
    model = skeleton_of(read_config(opened.folder))
    for at, (_, module) in enumerate(experts_modules(model)):
        progress(f"layer {at + 1} of {len(manifest.layers)}", at / len(manifest.layers))
        file = f"experts-{at:03}.safetensors"
        tensors = list(_layer(opened, at, module, manifest.assignment(step)[at]))
        write_dense(unfinished / file, [tensor.name for tensor in tensors], tensors)
        places |= dict.fromkeys((tensor.name for tensor in tensors), file)
    total = sum(path.stat().st_size for path in unfinished.glob("*.safetensors"))
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (unfinished / INDEX).write_bytes(msgspec.json.format(msgspec.json.encode(index)))
    (unfinished / CARD).write_text(card(opened, step), "utf-8")
    unfinished.replace(target)


def card(opened: Pack, step: str) -> str:
    """A model card: what was made of what, and what it costs."""
    manifest = opened.manifest
    certificate = next((found.certificate for found in manifest.chain if found.name == step), None)
    nbytes, whole = manifest.form_bytes(step), manifest.expert_bytes_bf16
    forms = [form for layer in manifest.assignment(step) for form in layer]
    shares = ", ".join(f"{forms.count(form) / len(forms):.0%} {form}" for form in manifest.forms if form in forms)
    lines = [
        "---",
        "library_name: transformers",
        "tags: [mixture-of-experts, comoe]",
        "---",
        f"# {manifest.model_type}, experts at {nbytes / whole:.1%} of their bytes",
        "",
        f"Written by comoe {manifest.provenance.comoe} from step `{step}` of a pack; of its experts {shares}.",
        f"Weights are written out in {manifest.dtype}, so this checkpoint takes what the original took; inside a pack",
        f"these experts take {format_size(nbytes)}.",
        "",
        _loss(certificate),
        "",
        "An expert that is all zero was dropped: it adds nothing.",
    ]
    return "\n".join(lines) + "\n"


def _loss(certificate: Certificate | None) -> str:
    if certificate is None:
        return "Its loss was not measured."
    low, high = certificate.loss_ci95
    return (
        f"Loss against the original, in nats per token on held-out calibration text: {certificate.loss:.2%} "
        f"({low:.2%} to {high:.2%}), at worst {certificate.loss_worst_domain:.2%} ({certificate.worst_domain})."
    )


def _names(folder: Path) -> list[str]:
    """Of the tensors of the dense part."""
    index = msgspec.json.decode((folder / INDEX).read_bytes())
    return list(index["weight_map"])


def _layer(opened: Pack, at: int, module: torch.nn.Module, forms: Sequence[str]) -> Iterator[RawTensor]:
    """A layer's expert tensors under transformers' own names."""
    site, dtype = opened.manifest.site(at), TORCH_DTYPES[opened.manifest.dtype]
    maths = SiteMath(module, site, dtype)
    experts = [expert_weights(opened, maths, ExpertId(at, index), form) for index, form in enumerate(forms)]
    if type(module).__name__ in NAMED_APART:
        for index, tensors in enumerate(experts):
            yield from (_raw(f"{site.name}.expert_{index}.{name}", tensor) for name, tensor in tensors.items())
    elif is_decorated(module):
        for leaf in site.leaves:
            yield _raw(f"{site.name}.{leaf.name}", torch.stack([tensors[leaf.name] for tensors in experts]))
    else:
        raise UnsupportedFamily(f"{opened.manifest.model_type} cannot be exported yet: please report it.")


def expert_weights(opened: Pack, maths: SiteMath, expert: ExpertId, form: str) -> dict[str, Tensor]:
    """An expert's tensors in a form, written out."""
    blobs = [opened.read_bytes(blob) for blob in opened.manifest.blobs(expert, form)]
    return {name: tensor.clone() for name, tensor in maths.tensors(form, arrays(blobs)).items()}


def _raw(name: str, tensor: Tensor) -> RawTensor:
    data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
    return RawTensor(name, STORED[str(tensor.dtype).removeprefix("torch.")], tuple(tensor.shape), data)
