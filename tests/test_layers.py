"""Who may import whom, who may see the options, and who may know that there are several processes."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LEAVES = {"options", "datasets", "models", "memory", "visualization"}
MAY_IMPORT = {leaf: {leaf} for leaf in LEAVES} | {"learning": (LEAVES - {"visualization"}) | {"learning"}}
FILES = [(package, path) for package in MAY_IMPORT for path in sorted((ROOT / package).rglob("*.py"))]


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("package, path", FILES, ids=lambda value: str(value))
def test_layers(package, path):
    for name in imported(path):
        top = name.split(".")[0]
        assert top not in MAY_IMPORT or top in MAY_IMPORT[package], f"{path} imports {name}"
        if path.name not in ("launch.py", "parallel.py"):
            assert not name.startswith("torch.distributed"), f"{path} knows about processes"
        if package == "options":
            assert top not in {"torch", "torchvision", "numpy"}, f"{path} makes --help slow"


def test_methods_and_memories_never_see_options():
    for package, path in FILES:
        if package == "learning" and path.parent.name in {"methods", "evaluations"}:
            assert not any(name.startswith("options") for name in imported(path)), path
