"""The house of the packages: imports run down the floors, and modules keep to the limits that make them readable."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.paths import ROOT

FLOORS = {
    **dict.fromkeys(("batch", "config"), 1),
    **dict.fromkeys(("parallel", "data"), 2),
    **dict.fromkeys(("models", "checkpoint", "volumes"), 3),
    **dict.fromkeys(("datasets", "decode", "train"), 4),
    **dict.fromkeys(("convert", "evaluate", "aot", "predict"), 5),
    **dict.fromkeys(("configs", "serve"), 6),
    **dict.fromkeys(("launch", "benchmarks"), 7),
}
NUMPY_ROOMS = ("data", "datasets", "volumes")  # their worker processes have to start fast
MODULES = sorted(
    path.relative_to(ROOT)
    for folder in ("medplib_jax", "convert", "configs", "launch")
    for path in (ROOT / folder).rglob("*.py")
)
LONGEST_FILE, LONGEST_FUNCTION = 500, 60


def room_of(dotted: str) -> str:
    """The part of the house that a module belongs to, "" for one from outside."""
    parts = dotted.split(".")
    room = parts[1] if parts[0] == "medplib_jax" and len(parts) > 1 else parts[0]
    return room if room in FLOORS else ""


def imports_of(path: Path) -> Iterator[str]:
    """Every module that a file imports, inside of functions too."""
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = path.with_suffix("").parts[: -node.level] if node.level else ()
            yield from (".".join((*base, *(node.module or "").split("."), alias.name)) for alias in node.names)


def is_command_line(path: Path) -> bool:
    """What puts the parts together for a user may import any of them."""
    return path.name == "__main__.py"


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_imports_run_down(path):
    own = room_of(".".join(path.with_suffix("").parts))
    if not own or is_command_line(path):
        return
    above = {name for name in imports_of(path) if (room := room_of(name)) != own and FLOORS.get(room, 0) >= FLOORS[own]}
    assert not above, f"{path} (floor {FLOORS[own]}) imports {sorted(above)}"
    assert own == "convert" or not [name for name in imports_of(path) if room_of(name) == "convert"]


def test_benchmarks_take_configs_as_arguments():
    modules = [path for path in MODULES if path.parts[1] == "benchmarks" and not is_command_line(path)]
    assert not [
        (path, name) for path in modules for name in imports_of(path) if room_of(name) in ("configs", "convert")
    ]


def test_models_do_not_know_the_data():
    known = [
        (path, name) for path in MODULES if path.parts[:2] == ("medplib_jax", "models") for name in imports_of(path)
    ]
    assert not [(path, name) for path, name in known if room_of(name) == "data"]


@pytest.mark.parametrize("room", NUMPY_ROOMS)
def test_data_is_read_without_jax(room):
    modules = [path for path in MODULES if path.parts[:2] == ("medplib_jax", room) and not is_command_line(path)]
    names = [".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in modules]
    program = (
        f"import importlib, sys\nfor name in {names!r}:\n    importlib.import_module(name)\nprint('jax' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"


def test_a_question_starts_without_what_few_questions_need():
    """Each of these takes a tenth of a second and more to import."""
    slow = ("scipy", "transformers", "jax.experimental.pallas", "matplotlib", "torch", "nibabel", "pydicom", "grain")
    program = f"import sys, medplib_jax.predict\nprint([name for name in {slow!r} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_modules_are_readable(path):
    text = (ROOT / path).read_text()
    assert text.count("\n") <= LONGEST_FILE
    assert path.stem not in sys.stdlib_module_names or path.parts[0] != "medplib_jax"
    assert "fmt: skip" not in text
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
    long = {node.name for node in functions if node.end_lineno - node.lineno + 1 > LONGEST_FUNCTION}
    assert not long, f"{path}: functions of more than {LONGEST_FUNCTION} lines: {sorted(long)}"
