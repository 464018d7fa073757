"""Imports only ever point down, and only the top floor knows Lightning."""

import ast
from pathlib import Path

import pytest

import lightning_prune

ROOT = Path(lightning_prune.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

FLOORS = [("errors",), ("graph",), ("activations",), ("pruning",), ("report", "export"), ("callbacks",), ("cli",)]
"""From the ground up; what stands beside the floors (models, schedulers) may use errors and each other."""
BESIDE = ("models", "schedulers", "sparse", "_lightning")
LIGHTNING = ("lightning", "lightning_fabric", "pytorch_lightning", "torchmetrics")


def part_of(module: str) -> str:
    """``lightning_prune.graph.rules.table`` -> ``graph``."""
    return [*module.split("."), ""][1]


def imports(file: Path) -> list[str]:
    """Absolute names of all modules that a file imports, wherever in it the statement stands."""
    package = ["lightning_prune", *file.relative_to(ROOT).with_suffix("").parts][:-1]
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{module}.{alias.name}" for alias in node.names] if module == "lightning_prune" else [module]
            found += names
    return found


def floor(part: str) -> int:
    return next(number for number, parts in enumerate(FLOORS) if part in parts)


def name_of(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def test_every_file_stands_on_a_floor() -> None:
    known = {part for parts in FLOORS for part in parts} | set(BESIDE) | {"__init__", "__main__"}
    assert {file.relative_to(ROOT).parts[0].removesuffix(".py") for file in FILES} <= known


@pytest.mark.parametrize(
    "file", [f for f in FILES if f.parent != ROOT or f.name not in ("__init__.py", "__main__.py")], ids=name_of
)
def test_imports_point_down(file: Path) -> None:
    own = file.relative_to(ROOT).parts[0].removesuffix(".py")
    used = {part_of(module) for module in imports(file) if module.split(".")[0] == "lightning_prune"} - {own}
    assert "" not in used, "imports the whole package"
    if own in BESIDE:
        assert used <= {"errors", *BESIDE}
    else:
        top = {*BESIDE} if own in ("callbacks", "cli") else set()
        assert all(part in top or floor(part) <= floor(own) for part in used), used
        beside = [part for part in used if part not in top and floor(part) == floor(own)]
        assert not beside or own in ("report", "export"), beside


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_only_the_top_knows_lightning(file: Path) -> None:
    used = {module.split(".")[0] for module in imports(file)} & set(LIGHTNING)
    path = name_of(file)
    assert not used or path.startswith(("callbacks/", "cli/")) or path in ("models/classifier.py", "_lightning.py"), (
        used
    )


def test_the_walk_sees_imports() -> None:
    """Known ones, so that the tests above can fail."""
    assert "lightning_prune.graph.groups" in imports(ROOT / "pruning" / "select.py")
    assert "lightning_prune.errors" in imports(ROOT / "graph" / "callsites.py")
    assert any(module.startswith("lightning.pytorch") for module in imports(ROOT / "callbacks" / "_base.py"))
    assert {part_of(m) for m in imports(ROOT / "callbacks" / "neuron_pruning.py")} >= {"graph", "pruning"}
