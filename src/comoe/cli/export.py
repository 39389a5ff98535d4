"""`comoe export`: a step of a pack as an ordinary checkpoint."""

from pathlib import Path
from typing import Annotated

from typer import Option

from comoe.cli.options import Json, PackPath, Source
from comoe.cli.terminal import print_json, progress_bar


def command(
    pack: PackPath,
    output: Annotated[Path, Option("-o", "--output", metavar="FOLDER", help="The checkpoint to write.")],
    step: Annotated[str, Option(metavar="STEP", help="A step of the chain, or a form: see inspect.")] = "exact",
    source: Source = None,
    json: Json = False,
) -> None:
    """Write a step of the chain as a checkpoint that transformers loads without comoe.

    \b
    comoe export qwen.comoe --step 16% -o qwen-16

    Every weight is written out in the checkpoint's dtype: the folder is as large as the original, and tells what it
    costs in a model card.
    """
    from comoe.make.export import export
    from comoe.runtime.generate import quiet_transformers
    from comoe.store.pack import Pack

    quiet_transformers()
    opened = Pack(pack, source=source)
    with progress_bar() as progress:
        export(opened, step, output, progress)
    opened.close()
    if json:
        print_json({"checkpoint": str(output), "step": step, "expert_bytes": opened.manifest.form_bytes(step)})
    else:
        print(f"{output}: step {step} of {pack} as a checkpoint; {output / 'README.md'} says what it costs.")
