"""The checks of CI one by one, and the matrix of versions: ``nox -l`` lists them, ``nox -s lowest`` runs one.

Each session makes an environment of its own, several GB with torch; ``-R`` uses it again.
"""

from __future__ import annotations

import nox

nox.options.sessions = ["lint", "docs", "package", "tests"]
nox.options.error_on_missing_interpreters = True


@nox.session
def lint(session: nox.Session) -> None:
    """Format, lint, types."""
    session.install("-e", ".[dev]")
    session.run("ruff", "format", "--check", ".")
    session.run("ruff", "check", ".")
    session.run("mypy")


@nox.session
def docs(session: nox.Session) -> None:
    """The documentation, without warnings, and its code blocks."""
    session.install("-e", ".[dev]")
    session.run("mkdocs", "build", "--strict", "--site-dir", session.create_tmp(), env={"NO_MKDOCS_2_WARNING": "1"})
    session.run("pytest", "tests/docs", *session.posargs)


@nox.session
def package(session: nox.Session) -> None:
    """Wheel and sdist; the wheel in an environment with nothing but the core dependencies."""
    session.install("build")
    folder = session.create_tmp()
    session.run("python", "-m", "build", "--outdir", folder)
    session.install("--find-links", folder, "--no-index", "--no-deps", "lightning-prune")
    session.install("lightning-prune", "--find-links", folder)
    session.run("python", "tests/package/core_only.py")


@nox.session
def tests(session: nox.Session) -> None:
    """The suite with the newest versions, on the Python that runs nox."""
    session.install("-U", "-e", ".[dev]")
    session.run("pytest", *session.posargs)


@nox.session(python="3.10")
def lowest(session: nox.Session) -> None:
    """The suite with the lowest versions that pyproject.toml allows, on the lowest Python."""
    session.install("-e", ".[dev]", "-c", "tests/package/lowest.txt")
    session.install("-r", "tests/package/lowest.txt")
    session.run("pytest", *(session.posargs or ["--ignore", "tests/docs"]))
