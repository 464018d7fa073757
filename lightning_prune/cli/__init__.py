"""The command line: thin commands over functions that work without it."""

from __future__ import annotations

import sys
from collections.abc import Sequence

__all__ = ["main"]

INTERRUPTED = 130
"""Exit code of what Ctrl-C has ended, as shells have it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``lightning-prune``.

    Args:
        arguments: What stands behind the command's name; None: `sys.argv`.

    Returns:
        The exit code: 0, or 2 after one line on stderr that says what was wrong, or 130 after Ctrl-C.
    """
    try:
        import jsonargparse  # noqa: F401
        import rich  # noqa: F401
    except ImportError as error:
        print(
            f'lightning-prune: error: the command line needs {error.name}: pip install "lightning-prune[cli]"',
            file=sys.stderr,
        )
        return 2
    try:
        from lightning_prune.cli.commands import run

        return run(sys.argv[1:] if arguments is None else list(arguments))
    except KeyboardInterrupt:
        print("lightning-prune: interrupted; files are as they were", file=sys.stderr)
        return INTERRUPTED
