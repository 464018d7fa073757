"""Every code block of the documentation and of the README runs, each page from top to bottom."""

from __future__ import annotations

import doctest
import importlib
import io
import re
import shlex
import shutil
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune.cli import main
from lightning_prune.models import ImageClassifier, LeNet

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^(?P<indent> *)```(?P<info>[^`\n]*)\n(?P<code>.*?)^(?P=indent)```$", re.MULTILINE | re.DOTALL)
LANGUAGES = ("python", "pycon", "bash", "yaml", "text")
NOT_RUN = ".not-run"
"""In a block's braces: it is shown, not run; a reason must stand there too, ```python {.not-run reason="…"}."""


@dataclass(frozen=True)
class Block:
    """One fenced block.

    Attributes:
        page: The file.
        line: Number of the line of its first line of code.
        language: What stands behind the fence.
        options: What follows the language.
        code: Without the fence's indentation.
    """

    page: Path
    line: int
    language: str
    options: str
    code: str

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks_of(page: Path, text: str) -> list[Block]:
    found = []
    for match in FENCE.finditer(text):
        language, _, options = match["info"].strip().partition(" ")
        code = "\n".join(line.removeprefix(match["indent"]) for line in match["code"].split("\n"))
        found.append(Block(page, text.count("\n", 0, match.start("code")) + 1, language, options, code))
    return found


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


BLOCKS = {page: blocks_of(page, page.read_text()) for page in PAGES}


# -- running -----------------------------------------------------------------------------------------------------------


def run_python(block: Block, names: dict[str, Any]) -> None:
    """With the page's own line numbers in tracebacks."""
    exec(compile("\n" * (block.line - 1) + block.code, str(block.page), "exec"), names)


def run_session(block: Block, names: dict[str, Any]) -> None:
    """What it prints must be what stands there, ``...`` for anything."""
    session = doctest.DocTestParser().get_doctest(block.code, names, block.place, str(block.page), block.line - 1)
    session.globs = names  # the parser takes a copy; what a session defines is there for the next block
    said: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    runner.run(session, out=said.append, clear_globs=False)
    assert not runner.failures, "".join(said)
    assert runner.tries, f"{block.place} has no >>> in it"


def commands(code: str) -> list[list[str]]:
    """The commands of a shell block as words, without the environment variables in front of them."""
    found: list[list[str]] = []
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.shlex(line, posix=True, punctuation_chars="&|;")
        words.whitespace_split = True
        command: list[str] = []
        for word in [*words, "&&"]:
            if set(word) <= set("&|;"):
                found += [command] if command else []
                command = []
            elif command or not re.match(r"^[A-Z_]+=", word):
                command.append(word)
    return found


def options_in(text: str) -> set[str]:
    return {word.partition("=")[0] for word in re.findall(r"--[\w-]+", text)}


def check_command(words: list[str], place: str) -> None:
    """It would run: the program is there, and so are the files and options that it names."""
    program, *rest = words
    if program in ("python", sys.executable):
        program = "python"
        if rest[0] == "-m":
            assert shutil.which(rest[1]) or rest[1] in sys.stdlib_module_names or rest[1] == "build", (place, words)
            return
        script = ROOT / rest[0]
        assert script.is_file(), f"{place}: no {rest[0]}"
        text = script.read_text()
        missing = {option for option in options_in(" ".join(rest[1:])) if f'"{option}"' not in text}
        assert not missing, f"{place}: {rest[0]} has no {', '.join(sorted(missing))}"
    elif program == "pip":
        extras = re.findall(r"\[([\w,-]+)\]", " ".join(rest))
        known = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
        assert set(",".join(extras).split(",")) - {""} <= set(known), (place, words)
    elif program == "bash":
        assert (ROOT / rest[0]).is_file(), (place, words)
    elif program in ("source", "cd", "eval"):
        return
    else:
        assert shutil.which(program), f"{place}: no program {program!r}"
        for word in rest:
            assert not word.startswith(("tests/", "examples/", "benchmarks/")) or (ROOT / word).exists(), (place, word)


def check_config(config: Any, place: str) -> None:
    """Each class that a YAML block names can be made with the arguments that stand there."""
    if isinstance(config, list):
        for each in config:
            check_config(each, place)
    elif isinstance(config, dict):
        if "class_path" in config:
            module, _, name = config["class_path"].rpartition(".")
            getattr(importlib.import_module(module), name)(**config.get("init_args", {}))
        for each in config.values():
            check_config(each, place)


def run_ours(words: list[str], place: str) -> None:
    """``lightning-prune``; of a command for the reader's own files only the options are looked at."""
    inputs = [word for word, before in zip(words[1:], words, strict=False) if not before.startswith("--")]
    files = [word.partition(":")[0] for word in inputs]
    theirs = any(name.endswith((".ckpt", ".safetensors", ".py")) and not Path(name).exists() for name in files)
    said = io.StringIO()
    with redirect_stdout(said), redirect_stderr(said):  # in this process: loading torch anew takes longer than most
        code = main([words[0], "--help"] if theirs else words)
    assert code == 0, f"{place}: {' '.join(words)}\n{said.getvalue()}"
    if theirs:
        known = {option.replace("_", "-") for option in options_in(said.getvalue())}
        missing = {option.replace("_", "-") for option in options_in(" ".join(words))} - known
        assert not missing, f"{place}: {words[0]} has no {', '.join(sorted(missing))}"


def check_shell(block: Block) -> None:
    """Our own command runs, in the folder of the test; other commands are only looked at."""
    done = subprocess.run(["bash", "-n"], input=block.code, text=True, capture_output=True, check=False)
    assert done.returncode == 0, f"{block.place}: {done.stderr}"
    for words in commands(block.code):
        if words[0] == "lightning-prune":
            run_ours(words[1:], block.place)
        else:
            check_command(words, block.place)


class Images(LightningDataModule):
    """What the README's reader brings along."""

    def __init__(self) -> None:
        super().__init__()
        self.data = TensorDataset(torch.rand(16, 3, 32, 32), torch.arange(16) % 10)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.data, batch_size=8)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.data, batch_size=8)


def first_names(page: Path) -> dict[str, Any]:
    """What a page's blocks find: nothing, but for the README, whose first block is for the reader's own model."""
    names: dict[str, Any] = {"__name__": "__main__", "__file__": str(page)}
    if page.name == "README.md":
        names |= {"model": ImageClassifier(LeNet()), "datamodule": Images()}
    return names


@pytest.mark.filterwarnings(
    "ignore:Starting from v1.9.0:UserWarning",  # Lightning on its default logger
    "ignore:.*smaller than the logging interval.*",  # small data, here
    "ignore:Checkpoint directory .* exists and is not empty",  # of the run that is resumed
)
@pytest.mark.parametrize("page", [page for page in PAGES if BLOCKS[page]], ids=name_of)
def test_every_block_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = first_names(page)
    for block in BLOCKS[page]:
        if NOT_RUN in block.options:
            continue
        if block.language == "python":
            run_python(block, names)
        elif block.language == "pycon":
            run_session(block, names)
        elif block.language == "bash":
            check_shell(block)
        elif block.language == "yaml":
            check_config(yaml.safe_load(block.code), block.place)


# -- completeness ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_block_has_a_known_language(page: Path) -> None:
    assert all(block.language in LANGUAGES for block in BLOCKS[page]), [b.place for b in BLOCKS[page]]
    fences = re.findall(r"^ *```", page.read_text(), re.MULTILINE)
    assert len(fences) == 2 * len(BLOCKS[page]), "a fence that this test doesn't see"


def test_blocks_that_do_not_run_say_why() -> None:
    left = [block for blocks in BLOCKS.values() for block in blocks if NOT_RUN in block.options]
    assert all(re.search(r'reason="[^"]{10,}"', block.options) for block in left)
    assert len(left) <= 1, [block.place for block in left]


def test_the_reader_finds_blocks_that_are_wrong() -> None:
    """So that the tests above can fail."""
    page = ROOT / "x.md"
    wrong, session = blocks_of(page, "a\n\n```python\n1 / 0\n```\n\n  ```pycon\n  >>> 1 + 1\n  3\n  ```\n")
    assert (wrong.line, session.language, session.code) == (4, "pycon", ">>> 1 + 1\n3\n")
    with pytest.raises(ZeroDivisionError) as caught:
        run_python(wrong, {})
    assert caught.traceback[-1].lineno == 3  # counted from 0
    with pytest.raises(AssertionError, match="Expected"):
        run_session(session, {})
    for code in (
        "python examples/none.py",
        "python examples/cifar_lenet.py --no-such 1",
        "no-such-program x",
        'pip install "lightning-prune[none]"',
        "echo 'unclosed",
    ):
        with pytest.raises(AssertionError):
            check_shell(Block(page, 1, "bash", "", code))
    check_shell(Block(page, 1, "bash", "", 'pip install -e ".[examples]" && python examples/cifar_lenet.py --epochs 2'))
