"""The house's rules, read from the sources: floors, torch, cycles, sizes, names of tests, where errors live.

Nothing of comoe is imported here. What people see of comoe is test_public's.
"""

import ast
import builtins
from collections.abc import Iterator
from fnmatch import fnmatch
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
SRC = ROOT / "src"
PACKAGE = SRC / "comoe"

FLOORS = {
    **dict.fromkeys(("types", "defaults", "kernels"), 0),
    **dict.fromkeys(("store", "units"), 1),
    "forms": 2,
    **dict.fromkeys(("memory", "plan"), 3),
    **dict.fromkeys(("net", "device"), 4),
    "runtime": 5,
    **dict.fromkeys(("make", "serve", "sim"), 6),
    **dict.fromkeys(("testbed", "bench"), 7),
    "cli": 8,
    "__main__": 9,
}
"""A file imports from lower floors, or from its own folder. The package itself stands below all: see `imports`."""

TORCH_FILES = (
    "store/families.py",
    "store/checkpoint.py",
    "forms/compensate.py",
    "forms/distil.py",
    "forms/lowbit.py",
    "forms/lowrank.py",
    "forms/merge.py",
    "forms/quantise.py",
    "runtime/*.py",
    "make/*.py",
    "bench/*.py",
)
TORCH_NAMES = ("torch", "transformers", "safetensors.torch")
TEST_TOPICS = ("exact", "house", "public", "readme")
"""What test files may be about beside a module or a folder of them."""

MAX_FUNCTION_LINES, MAX_FILE_LINES = 35, 400


class Import(NamedTuple):
    """One imported name of one statement: `comoe.store.pack`, `torch.nn`. `lazy`: inside a function or a class."""

    name: str
    line: int
    lazy: bool


@cache
def modules() -> dict[str, Path]:
    """Every module of comoe by its dotted name."""
    paths = sorted(PACKAGE.rglob("*.py"))
    dotted = (path.relative_to(SRC).with_suffix("").parts for path in paths)
    return {".".join(parts).removesuffix(".__init__"): path for parts, path in zip(dotted, paths, strict=True)}


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports(path: Path) -> Iterator[Import]:
    """Every import of a file, those for type checkers and in functions too."""
    yield from _imports(tree(path), lazy=False)


def _imports(parent: ast.AST, lazy: bool) -> Iterator[Import]:
    for node in ast.iter_child_nodes(parent):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"line {node.lineno}: imports name the module in full"
            yield from (Import(_target(node.module or "", alias.name), node.lineno, lazy) for alias in node.names)
        inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or _is_type_checking(node)
        yield from _imports(node, lazy or inside)


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def _target(module: str, name: str) -> str:
    """What `from module import name` imports: a submodule where there is one; `comoe.load` is the runtime's."""
    if (module, name) == ("comoe", "load"):
        return "comoe.runtime.load"
    submodule = f"{module}.{name}"
    return submodule if submodule in modules() or module == "transformers" else module


def own_imports(name: str) -> list[Import]:
    """What module `name` imports of comoe. The package itself may name anything late, for it holds nothing."""
    found = [item for item in imports(modules()[name]) if item.name.split(".")[0] == "comoe"]
    return [item for item in found if not item.lazy] if name == "comoe" else found


def story(name: str) -> str:
    """The part of the house that a module belongs to: `store` of `comoe.store.pack`."""
    return name.split(".")[1]


def relative(name: str) -> str:
    return modules()[name].relative_to(PACKAGE).as_posix()


def is_torch_file(name: str) -> bool:
    return any(fnmatch(relative(name), pattern) for pattern in TORCH_FILES)


def is_torch(name: str) -> bool:
    return any(name == torch or name.startswith(f"{torch}.") for torch in TORCH_NAMES)


def functions() -> Iterator[tuple[str, int]]:
    """(where, lines) of every function."""
    for name, path in modules().items():
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno:
                yield f"{name}.{node.name}", node.end_lineno - node.lineno + 1


def test_every_module_stands_on_a_floor() -> None:
    assert {story(name) for name in modules() if name != "comoe"} <= FLOORS.keys()


def test_imports_point_down() -> None:
    up = [
        f"{relative(name)}:{item.line} imports {item.name}"
        for name in modules()
        if name != "comoe"
        for item in own_imports(name)
        if item.name != "comoe" and story(item.name) != story(name) and FLOORS[story(item.name)] >= FLOORS[story(name)]
    ]
    assert not up, "\n".join(up)


def test_the_package_itself_imports_nothing_but_the_nouns() -> None:
    assert {item.name for item in own_imports("comoe")} <= {"comoe.types"}


def test_nobody_imports_the_package_whole() -> None:
    """`import comoe` hides what is used, and so would pass every rule here."""
    whole = [
        f"{relative(name)}:{node.lineno}"
        for name, path in modules().items()
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Import) and any(alias.name == "comoe" for alias in node.names)
    ]
    assert not whole, whole


def test_torch_is_imported_in_its_files_only() -> None:
    strays = [
        f"{relative(name)}:{item.line} imports {item.name}"
        for name, path in modules().items()
        if not is_torch_file(name)
        for item in imports(path)
        if is_torch(item.name)
    ]
    assert not strays, "\n".join(strays)


def test_files_without_torch_do_not_bring_it_in_through_others() -> None:
    """Only inside functions, as the command line does."""
    strays = [
        f"{relative(name)}:{item.line} imports {item.name}"
        for name in modules()
        if not is_torch_file(name)
        for item in own_imports(name)
        if not item.lazy and item.name in modules() and is_torch_file(item.name)
    ]
    assert not strays, "\n".join(strays)


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = {name: {item.name for item in own_imports(name)} - {name} for name in modules()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_nine_functions_in_ten_are_short() -> None:
    lengths = dict(functions())
    long = {where: lines for where, lines in lengths.items() if lines > MAX_FUNCTION_LINES}
    assert len(long) <= 0.1 * len(lengths), long


def test_files_stay_readable_in_one_sitting() -> None:
    lengths = {relative(name): len(path.read_text(encoding="utf-8").splitlines()) for name, path in modules().items()}
    assert {name: lines for name, lines in lengths.items() if lines > MAX_FILE_LINES} == {}


def test_the_contributors_guide_says_the_same_of_sizes() -> None:
    guide = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert f"{MAX_FILE_LINES} is the limit" in guide
    assert f"nine in ten up to {MAX_FUNCTION_LINES}" in guide


def defaulted() -> Iterator[tuple[str, str, ast.expr]]:
    """(where, name, default) of every parameter and annotated name that has one."""
    for name, path in modules().items():
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value:
                yield f"{relative(name)}:{node.lineno}", node.target.id, node.value
            if isinstance(node, ast.arguments):
                arguments = [*node.posonlyargs, *node.args]
                with_default = arguments[len(arguments) - len(node.defaults) :]
                pairs = [*zip(with_default, node.defaults, strict=True)]
                pairs += [(arg, value) for arg, value in zip(node.kwonlyargs, node.kw_defaults, strict=True) if value]
                yield from ((f"{relative(name)}:{arg.lineno}", arg.arg, value) for arg, value in pairs)


def test_defaults_are_written_down_once() -> None:
    """Where a parameter of that name has the same default, it is that one by name. Seeds of anything else may be 0."""
    assigned = [node for node in tree(PACKAGE / "defaults.py").body if isinstance(node, ast.Assign)]
    known = {ast.unparse(node.targets[0]).lower(): ast.unparse(node.value) for node in assigned}
    found = [(where, name, ast.unparse(value)) for where, name, value in defaulted()]
    assert {("context", "CONTEXT"), ("forms", "FORMS")} <= {(name, value) for _, name, value in found}
    copies = [place for place in found if place[1] != "seed" and known.get(place[1]) == place[2]]
    assert not copies, copies


def test_every_test_file_is_about_a_module_or_a_listed_topic() -> None:
    subjects = {part for name in modules() for part in name.split(".")} | set(TEST_TOPICS)
    files = {path.stem.removeprefix("test_") for path in (ROOT / "tests").glob("test_*.py")}
    assert files <= subjects


def test_errors_are_defined_in_the_tree_only() -> None:
    nouns = {node.name for node in tree(PACKAGE / "types.py").body if isinstance(node, ast.ClassDef)}
    errors = nouns | {name for name in dir(builtins) if name.endswith(("Error", "Exception"))}
    strays = [
        f"{relative(name)}: {node.name}"
        for name, path in modules().items()
        if name != "comoe.types"
        for node in ast.walk(tree(path))
        if isinstance(node, ast.ClassDef) and errors & {ast.unparse(base) for base in node.bases}
    ]
    assert not strays, strays
