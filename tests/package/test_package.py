"""What is built is what should be installed, and it works without any extra."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from email.message import Message
from itertools import chain
from pathlib import Path

import pytest

import lightning_prune

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CORE = {"torch", "lightning", "torchmetrics", "safetensors"}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The sdist, and the wheel that is built from it; with the build tools that are here, so no network is needed."""
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)],
        check=True,
        capture_output=True,
    )
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return {"wheel": wheel, "sdist": sdist}


@pytest.fixture(scope="module")
def metadata(built: dict[str, Path]) -> Message:
    with zipfile.ZipFile(built["wheel"]) as wheel:
        (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
        return message_from_bytes(wheel.read(name))


def test_the_wheel_holds_the_package_and_nothing_else(built: dict[str, Path]) -> None:
    with zipfile.ZipFile(built["wheel"]) as wheel:
        names = wheel.namelist()
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "lightning_prune").rglob("*.py")}
    assert sources <= set(names)
    assert "lightning_prune/py.typed" in names
    assert [name for name in names if name.endswith("licenses/LICENSE")]
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"lightning_prune"}
    assert not [name for name in names if "__pycache__" in name or "/test" in name]


def test_the_sdist_holds_what_its_tests_need(built: dict[str, Path]) -> None:
    with tarfile.open(built["sdist"]) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    for name in (
        "LICENSE",
        "README.md",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "SECURITY.md",
        "mkdocs.yml",
        "noxfile.py",
        "pyproject.toml",
        "lightning_prune/py.typed",
        "tests/conftest.py",
        "docs/start.md",
        "examples/cifar_lenet.py",
    ):
        assert name in names, name
    assert not [name for name in names if name.startswith(("data/", ".venv", "site/"))]


def test_the_metadata_says_what_the_package_is(metadata: Message) -> None:
    assert metadata["Version"] == lightning_prune.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["License-File"] == "LICENSE"
    assert metadata["Requires-Python"] == ">=3.10"
    assert set(metadata.get_all("Provides-Extra", [])) == set(PROJECT["optional-dependencies"])
    needed = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert {re.match(r"[\w-]+", line)[0] for line in needed} == CORE  # type: ignore[index]


def test_everything_works_without_extras() -> None:
    """And what needs one says which."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("core_only.py")), "--hide"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "lightning-prune[plots]" in done.stdout


def test_the_lowest_versions_are_those_that_pyproject_allows() -> None:
    floors: dict[str, set[str]] = {}
    for line in chain(PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()):
        match = re.fullmatch(r"([\w-]+)(?:\[[\w,]+\])?>=([\d.]+)", line)
        if match:
            floors.setdefault(match[1], set()).add(match[2])
    text = Path(__file__).with_name("lowest.txt").read_text()
    assert not [line for line in text.splitlines() if "[" in line and line[0] != "#"], (
        "pip's constraints have no extras"
    )
    lowest = re.findall(r"^([\w-]+)==([\d.]+)$", text, re.MULTILINE)
    assert {name for name, _ in lowest} >= CORE
    for name, version in lowest:
        assert any(f"{version}.".startswith(f"{floor}.") for floor in floors[name]), (name, version, floors[name])
