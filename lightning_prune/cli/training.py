"""PruningCLI: Lightning's command line, with errors in one line that name what was meant."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import lightning

from lightning_prune.cli.completion import completion_script, wanted_shell
from lightning_prune.cli.parser import OneLineErrors, line_of, one_line_errors, short
from lightning_prune.errors import PruningError

try:
    from jsonargparse import ActionConfigFile  # type: ignore[attr-defined]
    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
except ImportError as error:
    raise ImportError('PruningCLI needs jsonargparse: pip install "lightning-prune[cli]"') from error

__all__ = ["PruningCLI"]


class _Parser(OneLineErrors, LightningArgumentParser):
    pass


class PruningCLI(LightningCLI):
    """LightningCLI that says in one line what is wrong with a configuration, and leaves with exit code 2.

    A misspelt argument is answered with the nearest one: ``lightning_prune.NeuronPruning takes no 'amuont'; did you
    mean amount?``. Everything else is as in ``LightningCLI``.
    """

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Make the parser, and those of the subcommands."""
        kwargs.setdefault("dump_header", [f"lightning.pytorch=={lightning.__version__}"])
        made = _Parser(**kwargs)
        made.add_argument(
            "-c", "--config", action=ActionConfigFile, help="Path to a configuration file in json or yaml format."
        )
        return made

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, or print a script for shell completion: ``--print_shtab=bash``."""
        shell = wanted_shell(sys.argv[1:] if args is None else args) if not isinstance(args, dict) else None
        if shell is not None:
            with one_line_errors(parser.prog):
                print(completion_script(parser, shell))
            raise SystemExit(0)
        try:
            super().parse_arguments(parser, args)
        except UnicodeDecodeError as error:
            parser.error(f"a configuration is no text but holds the byte {error.object[error.start]:#04x}")
        except RecursionError:
            parser.error("a configuration refers to itself, or is nested too deeply")

    def instantiate_classes(self) -> None:
        """Make the objects; a value that one of ours refuses is told in one line."""
        try:
            super().instantiate_classes()
        except Exception as error:
            refused = next((each for each in _causes(error) if isinstance(each, PruningError)), None)
            if refused is None and not str(error).startswith("Does not validate against"):
                raise
            line = short(str(error)) if refused is None else line_of(refused)
            print(f"{self.parser.prog}: error: {line}", file=sys.stderr)
            raise SystemExit(2) from error


def _causes(error: BaseException) -> Iterator[BaseException]:
    while True:
        yield error
        following = error.__cause__ or error.__context__
        if following is None:
            return
        error = following
