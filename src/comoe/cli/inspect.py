"""`comoe inspect`: what a pack says of itself."""

from typing import Any

from comoe.cli.options import Json, PackPath, Source
from comoe.cli.terminal import print_json, print_table, say
from comoe.plan.ladder import ladder_of
from comoe.store.manifest import Manifest, read_manifest
from comoe.store.pack import folder_bytes, refuse_idle_source, source_problem
from comoe.units import format_loss, format_size


def command(pack: PackPath, source: Source = None, json: Json = False) -> None:
    """Show what is in a pack.

    \b
    comoe inspect qwen.comoe

    Reads the manifest alone. A checkpoint that moved is remarked on; verify looks at every byte.
    """
    manifest = read_manifest(pack)
    refuse_idle_source(source, pack, manifest)
    problem = source_problem(pack, manifest, source)
    own = {"pack": str(pack), "pack_bytes": folder_bytes(pack), "source_problem": problem}
    summary = {**own, **describe(manifest)}
    if problem:
        say(f"It could not run now: {problem}")
    if json:
        print_json(summary)
    else:
        _show(summary)


def _show(summary: dict[str, Any]) -> None:
    print(
        f"{summary['pack']}: {summary['model_type']}, {summary['layers']} sparse layers of "
        f"{summary['experts_per_layer']} experts, {summary['experts_per_token']} per token, {summary['dtype']}; "
        f"{format_size(summary['pack_bytes'])} on disk, "
        + (f"exact experts in {summary['source']}" if summary["source"] else "self-contained")
    )
    losses = {step["form"]: step for step in summary["chain"]}
    rows = [
        (
            form["name"],
            format_size(form["bytes"]),
            f"{form['bytes'] / summary['expert_bytes_bf16']:.1%}",
            f"{form['mean_error']:.2e}" if form["mean_error"] is not None else "-",
            format_loss(losses[form["name"]]["loss"]) if form["name"] in losses else "-",
            format_loss(losses[form["name"]]["loss_worst_domain"]) if form["name"] in losses else "-",
        )
        for form in summary["forms"]
    ]
    print_table(("form", "memory", "of bf16", "output error", "loss", "worst domain"), rows)


def describe(manifest: Manifest) -> dict[str, Any]:
    """The contract's summary of a manifest."""
    ladder = ladder_of(manifest)
    return {
        "model_type": manifest.model_type,
        "dtype": manifest.dtype,
        "layers": len(manifest.layers),
        "experts_per_layer": max(layer.num_experts for layer in manifest.layers),
        "experts_per_token": manifest.experts_per_token,
        "expert_bytes_bf16": manifest.expert_bytes_bf16,
        "dense_bytes": manifest.dense_bytes,
        "source": manifest.source.folder if manifest.source else None,
        "forms": [{"name": rung.form, "bytes": rung.nbytes, "mean_error": rung.mean_error} for rung in ladder.rungs],
        "chain": [
            {
                "step": number,
                "form": step.form,
                "resident_bytes": step.resident_bytes,
                "loss": step.loss,
                "loss_ci95": step.loss_ci95,
                "loss_worst_domain": step.loss_worst_domain,
                "worst_domain": step.worst_domain,
            }
            for number, step in enumerate(manifest.chain)
        ],
        "provenance": {
            "comoe": manifest.provenance.comoe,
            "transformers": manifest.provenance.transformers,
            "calibration": manifest.provenance.calibration,
            "calibration_tokens": manifest.provenance.calibration_tokens,
            "seed": manifest.provenance.seed,
        },
    }
