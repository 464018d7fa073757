"""Parsers whose errors are one line that names what was probably meant."""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from lightning_prune.errors import PruningError

try:
    from jsonargparse import ArgumentParser
except ImportError as error:
    raise ImportError('the command line needs jsonargparse: pip install "lightning-prune[cli]"') from error

__all__ = ["OneLineErrors", "Parser", "line_of", "near", "one_line_errors", "reason_of", "short", "theirs"]

_UNKNOWN = (
    re.compile(r"Option '(?P<key>[^']+)' is not accepted"),
    re.compile(r"Group '(?P<group>[^']+)' does not accept option '(?P<key>[^']+)'"),
    re.compile(r"does not accept option '(?P<key>[^']+)'"),
    re.compile(r"does not accept nested key '(?P<key>[^']+)'"),
    re.compile(r"Key '(?P<key>[^']+)' is not expected"),
)
_CLASS = re.compile(r"Problem with given class_path '([^']+)':")
_KEY = re.compile(r"Parser key \"([^\"]+)\":")
_EXPECTED = re.compile(r"Expected an? (?P<kind>[^\n]+?)\.? *Got value: (?P<value>[^\n]*)")
_SUBTYPES = re.compile(r"Subtypes: [\[(](?P<kinds>.*?)[\])]\n.*?Given value: (?P<value>[^\n]*)", re.DOTALL)
_NO_ATTRIBUTE = re.compile(r"module '(?P<module>[^']+)' has no attribute '(?P<name>[^']+)'")
_UNRECOGNIZED = re.compile(r"unrecognized arguments: (?P<all>.*)", re.DOTALL | re.IGNORECASE)


def near(word: str, known: Iterable[str]) -> str:
    """``"; did you mean …?"``, or nothing where no known word is like it."""
    found = difflib.get_close_matches(word, list(dict.fromkeys(known)), n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(found)}?" if found else ""


class OneLineErrors:
    """Mixin for jsonargparse's parsers, stands before them: no usage, one line, the nearest name."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Leave with exit code 2; a parser inside another one leaves the telling to that."""
        if not getattr(self, "exit_on_error", True):
            super().error(message, ex)  # type: ignore[misc]
        print(
            f"{getattr(self, 'prog', 'error').replace(' [options]', '')}: error: {short(message, self)}",
            file=sys.stderr,
        )
        raise SystemExit(2)


class Parser(OneLineErrors, ArgumentParser):
    """The parser of ``lightning-prune``; no abbreviations: they would change with the next option."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=False, **kwargs)


def short(message: str, parser: Any = None) -> str:
    """What jsonargparse says, in one line, with the nearest known name where a name is unknown.

    Its messages list every type that a value was tried as; the one about the class that the user named is picked out.
    """
    outer = _KEY.search(message)
    where = f"{outer[1]}: " if outer else ""
    part = _telling(message)
    classes = _CLASS.findall(part)
    owner = classes[-1] if classes else None
    if owner:
        part = part.rpartition(f"Problem with given class_path '{owner}':")[2]
    for pattern in _UNKNOWN:
        match = pattern.search(part)
        if match and owner:
            return f"{where}{owner} takes no {match['key']!r}{near(match['key'], _parameters(owner))}"
        if match:
            group = match.groupdict().get("group")
            return _unknown_key(f"{group}.{match['key']}" if group else match["key"], parser)
    match = _NO_ATTRIBUTE.search(part)
    if match:
        module = sys.modules.get(match["module"])
        return f"{where}{match['module']} has no {match['name']!r}{near(match['name'], vars(module) if module else ())}"
    match = _UNRECOGNIZED.search(part)
    if match:
        options = list(_option_strings(parser))
        found = next((each for each in match["all"].split() if each.startswith("-")), match["all"].split()[0])
        return f"unknown option {found}{near(found.partition('=')[0], options)}"
    match = _SUBTYPES.search(part)
    if match:
        keys = [outer[1]] if outer else []
        keys += [owner, *_KEY.findall(part[: match.start()])[-1:]] if owner else []
        return f"{' of '.join(reversed(keys))}: expected one of {_kinds(match['kinds'])}; got {_cut(match['value'])}"
    match = _EXPECTED.search(part)
    if match:
        keys = [outer[1]] if outer else []
        keys += [owner, *_KEY.findall(part[: match.start()])[-1:]] if owner else []
        kind = _kinds(match["kind"])
        return f"{' of '.join(reversed(keys))}: expected {_article(kind)}, got {_cut(match['value'])}"
    return _cut(where + part.removeprefix(outer[0] if outer else ""), 300)


def _telling(message: str) -> str:
    """Of the errors that a value of several types gives, one per type, that of the type that the user meant."""
    _head, errors, rest = message.partition("Errors:\n")
    if not errors:
        return message
    indent = len(rest) - len(rest.lstrip(" "))
    bullets: list[str] = []
    for line in rest.splitlines():
        if line.startswith(" " * indent + "- "):
            bullets.append(line[indent + 2 :])
        elif len(line) - len(line.lstrip(" ")) > indent and bullets:
            bullets[-1] += f"\n{line}"
        else:
            break
    general = ("Expected a", "Not a valid subclass", "Not of type")
    return next((each for each in bullets if not each.startswith(general)), message)


def _unknown_key(key: str, parser: Any) -> str:
    """Which part of a dotted key of a configuration is unknown, and what is like it."""
    parts = key.split(".")
    for place, part in enumerate(parts):
        known = _options(parser, ".".join(parts[:place]))
        if part not in known:
            return f"{'.'.join(parts[:place]) or 'the configuration'} takes no {part!r}{near(part, known)}"
    return f"the configuration takes no {key!r}"


def _kinds(text: str) -> str:
    """Types as a user writes them."""
    text = re.sub(r"<class '([^']+)'>", r"\1", text).replace("NoneType", "null")
    return re.sub(r"\b(typing|collections\.abc)\.", "", text)


def _cut(text: str, most: int = 120) -> str:
    """In one line, and not longer than helps."""
    text = re.sub(r"\s+", " ", text).strip()
    return text if len(text) <= most else f"{text[:most]} …"


def _article(kind: str) -> str:
    return f"{'an' if kind[:1] in 'aeiou' else 'a'} {kind}"


def _parameters(path: str) -> list[str]:
    """Names of the arguments of a class, those that it passes on to its bases included."""
    module, _, name = path.rpartition(".")
    try:
        thing = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        return []
    parser = ArgumentParser()
    try:
        return list(parser.add_class_arguments(thing, fail_untyped=False))
    except Exception:  # a signature that jsonargparse can't follow: the plain one tells nearly as much
        return list(inspect.signature(thing).parameters)


def _option_strings(parser: Any) -> Iterator[str]:
    """All options of a parser and of its commands."""
    for action in getattr(parser, "_actions", ()):
        yield from action.option_strings
        for each in (getattr(action, "choices", None) or {}) if _is_commands(action) else ():
            yield from _option_strings(action.choices[each])


def _is_commands(action: Any) -> bool:
    return not action.option_strings and isinstance(getattr(action, "choices", None), dict)


def _options(parser: Any, group: str) -> list[str]:
    """Names of what may stand in a group of a configuration, or at its top."""
    start = f"--{group}." if group else "--"
    found: Iterable[str] = (each for each in _option_strings(parser) if each.startswith(start))
    return list(dict.fromkeys(each.removeprefix(start).partition(".")[0] for each in found))


@contextmanager
def theirs(what: str) -> Iterator[None]:
    """Code of the user's runs: whatever it raises, an exit included, is a PruningError in one line."""
    try:
        yield
    except (PruningError, OSError):
        raise
    except (Exception, SystemExit) as error:
        raise PruningError(f"{what} raised {type(error).__name__}: {reason_of(error)}") from error


def reason_of(error: BaseException) -> str:
    """The first line of what an error says, and what follows a colon at its end; without colours."""
    lines = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip().splitlines()
    last = next((place for place, line in enumerate(lines) if not line.endswith(":")), len(lines) - 1)
    return _cut(" ".join(lines[: last + 1]), 500) if lines else type(error).__name__


@contextmanager
def one_line_errors(prog: str) -> Iterator[None]:
    """What a user got wrong leaves with exit code 2 and one line on stderr; other errors pass through."""
    try:
        yield
    except (PruningError, OSError) as error:
        print(f"{prog}: error: {line_of(error)}", file=sys.stderr)
        raise SystemExit(2) from error


def line_of(error: BaseException) -> str:
    """An error in one line."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror is not None:
        return f"{error.filename}: {error.strerror}"
    return reason_of(error)
