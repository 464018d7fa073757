"""What a search of activations found, as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lightning_prune.activations.candidates import Choice
from lightning_prune.activations.sites import Sites

__all__ = ["ActivationReport", "Outcome", "SiteReport", "tabulate"]


@dataclass(frozen=True)
class SiteReport:
    """What was found for one site.

    Attributes:
        site: Its name.
        before: What the user had there.
        after: What is there now.
        loss: Held-out loss with the choice, after the short run that it was checked with; None: not checked.
        loss_without: The same with what the user had at this site.
        note: Why it is as it is.
    """

    site: str
    before: str
    after: str
    loss: float | None = None
    loss_without: float | None = None
    note: str = ""


@dataclass(frozen=True)
class ActivationReport:
    """The outcome of a search; printable.

    Attributes:
        sites: One row per site.
        history: Mixture: at each epoch's end the weight of every option, by unit; trial: every short run, with its
            choices, optimizer steps and loss.
        loss: Held-out loss with all choices; None: not measured.
        loss_without: With what the user had everywhere, after as many steps.
        steps: Optimizer steps of all short runs together.
    """

    sites: tuple[SiteReport, ...]
    history: tuple[dict[str, Any], ...] = ()
    loss: float | None = None
    loss_without: float | None = None
    steps: int = 0

    def __str__(self) -> str:
        head = ("site", "before", "after", "loss", "without", "")
        rows = [(r.site, r.before, r.after, _number(r.loss), _number(r.loss_without), r.note) for r in self.sites]
        cost = f"short runs: {self.steps:,} steps" if self.steps else ""
        rows.append(("all", "", "", _number(self.loss), _number(self.loss_without), cost))
        widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
        lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in (head, *rows)]
        return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


@dataclass(frozen=True)
class Outcome:
    """What a search ends with.

    Attributes:
        chosen: Site -> what it gets.
        rows: Site -> loss with it, loss with what the user had, and why it is as it is.
        loss: With all choices.
        without: With what the user had everywhere.
        steps: Optimizer steps of all short runs together.
    """

    chosen: Mapping[str, Choice]
    rows: Mapping[str, tuple[float | None, float | None, str]] = field(default_factory=dict)
    loss: float | None = None
    without: float | None = None
    steps: int = 0


def tabulate(sites: Sites, outcome: Outcome, history: Sequence[dict[str, Any]]) -> ActivationReport:
    """The report of an outcome."""
    rows = []
    for site in sites.sites:
        loss, without, note = outcome.rows.get(site.name, (None, None, ""))
        before = site.function if site.own is None else str(site.own)
        after = str(outcome.chosen.get(site.name, before))
        rows.append(SiteReport(site.name, before, after, loss, without, note))
    return ActivationReport(tuple(rows), tuple(history), outcome.loss, outcome.without, outcome.steps)
