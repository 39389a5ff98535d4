"""A package whose shared objects nobody else has mapped: a memory group pays only for pages that it read first."""

import os
import shutil
from importlib.util import find_spec
from pathlib import Path


def own_copy(package: str, folder: Path) -> dict[str, str]:
    """An environment in which `package` is imported from `folder`, where its shared objects are copied to.

    Everything else there is a link. ModuleNotFoundError where the package is not installed.
    """
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"no package {package}", name=package)
    _mirror(Path(spec.origin).parent, folder / package)
    path = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    return os.environ | {"PYTHONPATH": path}


def _mirror(source: Path, target: Path) -> None:
    target.mkdir(parents=True)
    for child in source.iterdir():
        if child.name == "lib":
            shutil.copytree(child, target / child.name)
        elif child.suffix == ".so":
            shutil.copy2(child, target / child.name)
        else:
            (target / child.name).symlink_to(child)
