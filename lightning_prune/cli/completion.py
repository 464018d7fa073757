"""Shell completion: a script for bash, zsh or tcsh, made once, so that a key press doesn't import torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lightning_prune.errors import PruningError

__all__ = ["COMPLETION", "completion_script", "wanted_shell"]

COMPLETION = "--print_shtab"
"""The option; jsonargparse has had one of that name in some versions and none in others."""

FILES = ("model", "dense", "pruned", "config")
"""Arguments that may be files without being typed as such."""


def wanted_shell(arguments: Sequence[str]) -> str | None:
    """The shell that a user asks a script for, ``""`` where none is named, or None."""
    for place, word in enumerate(arguments):
        name, equals, value = word.partition("=")
        if name.replace("-", "_") == COMPLETION.replace("-", "_"):
            return value if equals else next(iter(arguments[place + 1 :]), "")
    return None


def completion_script(parser: Any, shell: str) -> str:
    """What a shell has to source to complete the commands, options and files of a parser.

    Raises:
        PruningError: shtab is not installed, or knows no such shell.
    """
    try:
        import shtab
    except ImportError as error:
        raise PruningError('shell completion needs shtab: pip install "lightning-prune[cli]"') from error
    if shell not in shtab.SUPPORTED_SHELLS:
        raise PruningError(f"{COMPLETION} is one of {', '.join(shtab.SUPPORTED_SHELLS)}, got {shell!r}")
    for action in _actions(parser):
        if action.dest in FILES or getattr(action, "_typehint", None) is Path:
            action.complete = shtab.FILE
    script: str = shtab.complete(parser, shell=shell)
    return script


def _actions(parser: Any) -> Iterator[Any]:
    for action in parser._actions:
        yield action
        if isinstance(action.choices, dict) and not action.option_strings:
            for command in action.choices.values():
                yield from _actions(command)
