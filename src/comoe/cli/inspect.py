"""`comoe inspect`: what a pack says of itself."""

from pathlib import Path
from typing import Annotated, Any

from typer import Option

from comoe.cli.options import CacheFolder, Json, PackPlace, Source, TokenFile, access
from comoe.cli.picture import picture_of
from comoe.cli.terminal import print_json, print_table, say
from comoe.net.place import folder_of
from comoe.plan.ladder import ladder_of
from comoe.store.manifest import Certificate, Manifest, read_manifest
from comoe.store.pack import folder_bytes, refuse_idle_source, source_problem
from comoe.types import UsageError
from comoe.units import format_loss, format_size


def command(
    pack: PackPlace,
    plot: Annotated[
        Path | None,
        Option(
            metavar="FILE", help="Draw losses, errors and clusters into this .svg, .png or .pdf, which is replaced."
        ),
    ] = None,
    source: Source = None,
    cache: CacheFolder = None,
    token_file: TokenFile = None,
    json: Json = False,
) -> None:
    """Show what is in a pack.

    \b
    comoe inspect qwen.comoe --plot qwen.svg

    Reads the manifest alone. A checkpoint that moved is remarked on; verify looks at every byte.
    """
    folder = folder_of(pack, access(cache, None, token_file, None))
    manifest = read_manifest(folder)
    refuse_idle_source(source, folder, manifest)
    problem = source_problem(folder, manifest, source)
    if plot is not None:
        _draw(manifest, plot)
    own = {
        "pack": pack,
        "pack_bytes": folder_bytes(folder),
        "source_problem": problem,
        "plot": None if plot is None else str(plot),
    }
    summary = {**own, **describe(manifest)}
    if problem:
        say(f"It could not run now: {problem}")
    if json:
        print_json(summary)
    else:
        _show(summary)


def _draw(manifest: Manifest, file: Path) -> None:
    try:
        from comoe.cli.plot import save
    except ModuleNotFoundError as error:
        raise UsageError(f"--plot needs {error.name}: pip install 'comoe[plot]'.") from error
    picture = picture_of(manifest)
    save(picture, file)
    parts = {"losses": picture.frontier, "errors by layer": picture.curves, "cluster trees": picture.trees}
    say(f"{file} shows {', '.join(name for name, part in parts.items() if part)}.")


def _show(summary: dict[str, Any]) -> None:
    print(
        f"{summary['pack']}: {summary['model_type']}, {summary['layers']} sparse layers of "
        f"{summary['experts_per_layer']} experts, {summary['experts_per_token']} per token, {summary['dtype']}; "
        f"{format_size(summary['pack_bytes'])} on disk, "
        + (f"exact experts in {summary['source']}" if summary["source"] else "self-contained")
    )
    whole = summary["expert_bytes_bf16"]
    columns = ("all experts in", "memory", "of bf16", "output error")
    print_table(columns, [_form_row(form, whole) for form in summary["forms"]])
    if summary["chain"]:
        print()
        print_table(
            ("step", "memory", "of bf16", "loss", "worst domain", "uses served by"),
            [_step_row(step, whole) for step in summary["chain"]],
        )


def _form_row(form: dict[str, Any], whole: int) -> tuple[str, ...]:
    error = f"{form['mean_error']:.2e}" if form["mean_error"] is not None else "-"
    return form["name"], format_size(form["bytes"]), f"{form['bytes'] / whole:.1%}", error


def _step_row(step: dict[str, Any], whole: int) -> tuple[str, ...]:
    losses = [format_loss(step[key]) if step[key] is not None else "-" for key in ("loss", "loss_worst_domain")]
    shares = ", ".join(f"{form} {share:.0%}" for form, share in step["shares"].items())
    nbytes = step["resident_bytes"]
    return step["step"], format_size(nbytes), f"{nbytes / whole:.1%}", *losses, shares


def _certified(certificate: Certificate | None) -> dict[str, Any]:
    """A step's measured loss; all None where it has no certificate."""
    return {key: getattr(certificate, key, None) for key in Certificate.__struct_fields__}


def describe(manifest: Manifest) -> dict[str, Any]:
    """The contract's summary of a manifest."""
    ladder = ladder_of(manifest)
    forms = [ladder.rung(form) for form in manifest.forms]
    return {
        "model_type": manifest.model_type,
        "dtype": manifest.dtype,
        "layers": len(manifest.layers),
        "experts_per_layer": max(layer.num_experts for layer in manifest.layers),
        "experts_per_token": manifest.experts_per_token,
        "expert_bytes_bf16": manifest.expert_bytes_bf16,
        "dense_bytes": manifest.dense_bytes,
        "source": manifest.source.folder if manifest.source else None,
        "forms": [{"name": rung.name, "bytes": rung.nbytes, "mean_error": rung.mean_error} for rung in forms],
        "chain": [
            {
                "step": step.name,
                "resident_bytes": step.resident_bytes,
                **_certified(step.certificate),
                "shares": ladder.rung(step.name).shares,
            }
            for step in manifest.chain
        ],
        "provenance": {
            "comoe": manifest.provenance.comoe,
            "transformers": manifest.provenance.transformers,
            "calibration": manifest.provenance.calibration,
            "calibration_tokens": manifest.provenance.calibration_tokens,
            "seed": manifest.provenance.seed,
            "healing_steps": manifest.provenance.healing_steps,
        },
    }
