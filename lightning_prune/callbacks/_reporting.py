"""``report_``: what a callback tells of its run, and one clear error where there was none."""

from __future__ import annotations

from typing import Generic, TypeVar

from lightning_prune.errors import PruningError

__all__ = ["NoReportError", "Reporting"]

Told = TypeVar("Told")


class NoReportError(PruningError, AttributeError):
    """The report of a run that has not been; so ``hasattr`` is false."""


class Reporting(Generic[Told]):
    """Mixin for callbacks that make a report while they run."""

    _report: Told | None = None
    _has_run = False

    @property
    def report_(self) -> Told | None:
        """What came of the last ``fit``; None while there is nothing to tell, and on other ranks than 0.

        Raises:
            NoReportError: There was no ``fit`` yet, or none in this process.
        """
        if not self._has_run:
            raise NoReportError(
                f"this {type(self).__name__} has no report yet: Trainer.fit makes it, and in spawned or forked "
                "processes it stays there"
            )
        return self._report

    @report_.setter
    def report_(self, report: Told | None) -> None:
        self._report, self._has_run = report, True
