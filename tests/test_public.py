"""What people see of comoe: public names, the drawn error tree, a light import, documented commands, a strict CI.

Looked at in fresh interpreters, so that nothing which other tests imported can help.
"""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
SRC = ROOT / "src"
TYPES = ast.parse((SRC / "comoe" / "types.py").read_text(encoding="utf-8"))

PUBLIC_NAMES = ("ComoeError", "DoesNotFit", "__version__", "load")
HEAVY = {"torch", "transformers", "scipy", "matplotlib"}


def drawn_errors() -> dict[str, tuple[str, int]]:
    """{error: (parent, exit code)} from the drawing in types.py; a code that is not drawn is the parent's."""
    errors = {"Exception": ("", 0)}
    path = ["Exception"]
    for line in re.findall(r"^ {4}([ │├└─]*)(\w+)(?: +exit (\d+))?", ast.get_docstring(TYPES) or "", re.MULTILINE):
        branch, name, code = line
        path[1 + len(branch) // 4 :] = [name]
        errors[name] = (path[-2], int(code or errors[path[-2]][1]))
    return errors


def coded_errors() -> dict[str, tuple[str, int]]:
    """The same from the classes: the first base is the parent, an exit code that is not set is its."""
    errors = {"Exception": ("", 0)}
    for node in TYPES.body:
        parent = ast.unparse(node.bases[0]) if isinstance(node, ast.ClassDef) and node.bases else ""
        if isinstance(node, ast.ClassDef) and parent in errors:
            code = re.search(r"^ *exit_code.* = (\d+)$", ast.unparse(node), re.MULTILINE)
            errors[node.name] = (parent, int(code[1] if code else errors[parent][1]))
    return errors


def test_the_drawing_of_the_error_tree_is_the_tree() -> None:
    assert "DoesNotFit" in drawn_errors()
    assert drawn_errors() == coded_errors()


def run_python(code: str, *arguments: str) -> str:
    """Stdout of a fresh interpreter that imports from here."""
    env = {**os.environ, "PYTHONPATH": str(SRC), "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, env=env, capture_output=True, encoding="utf-8", timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def answer(code: str, expression: str) -> Any:
    """What a fresh interpreter finds `expression` to be after `code`."""
    return json.loads(run_python(f"{code}\nimport json\nprint(json.dumps({expression}))"))


def test_the_public_names_are_exact() -> None:
    seen = "[name for name in dir(comoe) if not isinstance(vars(comoe).get(name), type(sys))]"
    declared, present = answer("import comoe, sys", f"[comoe.__all__, {seen}]")
    assert tuple(declared) == PUBLIC_NAMES
    public = {name for name in present if not name.startswith("_")}
    assert public | {"load"} == {name for name in PUBLIC_NAMES if not name.startswith("_")}


@pytest.mark.parametrize("module", ["comoe", "comoe.cli"])
def test_importing_brings_in_nothing_heavy(module: str) -> None:
    loaded = answer(f"import {module}, sys", "list(sys.modules)")
    assert module in loaded
    assert not HEAVY & set(loaded)


def commands() -> list[str]:
    """The commands that `comoe --help` lists."""
    code = "from comoe.cli import app\nfrom typer.main import get_command\nfound = get_command(app).commands.items()"
    return list(answer(code, "[name for name, command in found if not command.hidden]"))


ONCE = {
    *("prompt", "prompt_file", "stop", "output", "step", "calib", "folder", "text", "keep", "out", "plot"),
    *("version", "help", "decisions", "replay"),
}
"""Options of one call: nobody wants them for every call."""


LEAVES = """
from comoe.cli import app
from typer.main import get_command

def below(command):
    return [leaf for child in getattr(command, "commands", {}).values() for leaf in below(child)] or [command]

commands = below(get_command(app))
"""
"""Every command that does something, those of groups too."""


def test_every_lasting_option_has_its_twin_in_the_environment() -> None:
    options = "{p.name: p.envvar for command in commands for p in command.params if p.param_type_name == 'option'}"
    twins = {name: variable for name, variable in answer(LEAVES, options).items() if name not in ONCE}
    assert {"expert_memory", "profile"} <= twins.keys()
    assert twins == {name: f"COMOE_{name.upper()}" for name in twins}


def test_every_switch_that_may_be_on_by_a_twin_can_be_turned_off_by_a_flag() -> None:
    switches = "p for command in commands for p in command.params if getattr(p, 'is_flag', False) and p.envvar"
    off = answer(LEAVES, f"{{p.name: p.secondary_opts for p in ({switches})}}")
    assert {"json", "exact", "chat", "quick"} <= off.keys()
    assert off == {name: [f"--no-{name.replace('_', '-')}"] for name in off}


def test_every_command_that_computes_says_with_how_many_threads() -> None:
    code = "from comoe.cli import app\nfrom typer.main import get_command\nfound = get_command(app).commands.items()"
    takers = answer(code, "[name for name, command in found if 'threads' in [p.name for p in command.params]]")
    assert takers == ["pack", "plan", "run", "trace", "verify", "edge", "demo", "bench"]


def test_every_command_is_in_the_readme() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    listed = commands()
    assert listed
    assert [name for name in listed if not re.search(rf"\bcomoe {name}\b", readme)] == []


PAGES = {"cli.md": "build_cli.py", "schema.json": "build_schema.py", "modules.md": "build_modules.py"}


@pytest.mark.parametrize("page", PAGES)
def test_a_generated_page_says_what_the_code_says(page: str) -> None:
    code = "import runpy, sys; runpy.run_path(sys.argv[1], run_name='__main__')"
    generated = run_python(code, str(ROOT / "docs" / PAGES[page]))
    assert (ROOT / "docs" / page).read_text(encoding="utf-8") == generated, "make docs writes it again"


SKIPPING = """
import pytest

def test_passes():
    pass

def test_skips():
    pytest.skip({reason!r})
"""


def exit_code_of_skipping(folder: Path, reason: str, ci: str) -> tuple[int, str]:
    (folder / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text(encoding="utf-8"), encoding="utf-8")
    (folder / "test_skips.py").write_text(SKIPPING.format(reason=reason), encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--rootdir", str(folder), str(folder)]
    done = subprocess.run(command, env={**os.environ, "CI": ci}, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout


@pytest.mark.parametrize(
    ("reason", "ci", "code"),
    [
        ("no reason at all", "true", 1),
        ("no reason at all", "", 0),
        ("needs the shared models and data (COMOE_SHARED)", "true", 0),
    ],
)
def test_an_unexpected_skip_fails_ci(tmp_path: Path, reason: str, ci: str, code: int) -> None:
    exit_code, output = exit_code_of_skipping(tmp_path, reason, ci)
    assert "1 passed, 1 skipped" in output
    assert exit_code == code
    assert ("UNEXPECTED SKIP" in output) == (code == 1)
