"""Packages whose shared objects nobody else has mapped: a memory group pays only for pages that it read first."""

import os
import shutil
from importlib.util import find_spec
from pathlib import Path


def own_copy(packages: tuple[str, ...], folder: Path) -> dict[str, str]:
    """An environment in which `packages` are imported from `folder`, where their shared objects are copied to.

    Everything else there is a link. Libraries that wheels keep beside a package, in `package.libs`, come along.
    ModuleNotFoundError where a package is not installed.
    """
    for package in packages:
        spec = find_spec(package)
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError(f"no package {package}", name=package)
        home = Path(spec.origin).parent
        for found in (home, home.with_name(f"{package}.libs")):
            if found.is_dir():
                _mirror(found, folder / found.name)
    path = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    return os.environ | {"PYTHONPATH": path}


def _mirror(source: Path, target: Path) -> None:
    target.mkdir(parents=True)
    for child in source.iterdir():
        if child.is_dir() and any(_is_shared_object(path) for path in child.rglob("*.so*")):
            _mirror(child, target / child.name)
        elif _is_shared_object(child):
            shutil.copy2(child, target / child.name)
        else:
            (target / child.name).symlink_to(child)


def _is_shared_object(path: Path) -> bool:
    return ".so" in path.suffixes and path.is_file()
