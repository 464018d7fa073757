"""What the commands print and write: tables, JSON, whole files or none."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lightning_prune.errors import PruningError
from lightning_prune.report.figures import check_plots
from lightning_prune.report.report import check_ending

__all__ = ["check_figure", "check_report", "check_writable", "note", "show", "show_json", "table", "whole_file"]


def note(text: str) -> None:
    """A line on stderr: what was assumed."""
    print(text, file=sys.stderr)


def show(*things: Any) -> None:
    """Print: rich tables on a terminal as wide as it is, elsewhere whole lines."""
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 160, soft_wrap=False, highlight=False)
    for thing in things:
        console.print(thing, markup=False)


def show_json(data: Any) -> None:
    """Print plain data as JSON."""
    print(json.dumps(data, indent=2))


def table(head: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> Any:
    """A rich table: first column to the left, numbers to the right."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    made = Table(title=Text(title) if title else None, title_justify="left", box=box.SIMPLE_HEAD)
    for column, name in enumerate(head):
        numbers = bool(rows) and all(row[column][:1].isdigit() or row[column] in ("", "–") for row in rows)
        made.add_column(name, justify="right" if numbers and column else "left", overflow="fold")
    for row in rows:
        made.add_row(*map(Text, row))
    return made


def check_writable(path: Path) -> None:
    """Raise a PruningError where a file can't be written, before work is done for it."""
    folder = path.parent
    if path.is_dir():
        raise PruningError(f"{path} is a folder")
    if not folder.is_dir():
        raise PruningError(f"there is no folder {folder}")
    with whole_file(path) as temporary:
        temporary.unlink()


def check_report(path: Path) -> None:
    """Raise a PruningError where a report can't be written, before work is done for it."""
    check_writable(path)
    check_ending(path)
    if path.suffix.lower() == ".html":
        check_plots()


def check_figure(path: Path) -> None:
    """Raise a PruningError where a figure can't be written, before work is done for it."""
    check_writable(path)
    check_plots()
    from matplotlib.backend_bases import FigureCanvasBase

    known = FigureCanvasBase.get_supported_filetypes()
    if path.suffix.lower().removeprefix(".") not in known:
        raise PruningError(f"a figure is saved as one of {', '.join(f'.{each}' for each in known)}, got {path.name!r}")


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that takes its place if all goes well, and else leaves no trace.

    Raises:
        PruningError: The folder can't be written to.
    """
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        temporary.touch(exist_ok=False)
        yield temporary
        if temporary.exists():
            os.replace(temporary, path)
    except OSError as error:
        raise PruningError(f"{path} can't be written: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            temporary.unlink()
