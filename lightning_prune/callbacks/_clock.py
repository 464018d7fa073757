"""When a callback acts: how far training is, from the schedule's start to its end."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from lightning_prune.errors import PruningError

__all__ = ["Clock", "Point", "check_every", "check_window"]

Point = int | float
"""An epoch or a fraction of training. int first: LightningCLI takes the first type that a value fits."""


def check_window(start: Any, end: Any) -> None:
    """Check what can be checked of a schedule's window before the training length is known.

    Raises:
        PruningError: ``start`` or ``end`` is no fraction in [0, 1] and no epoch, or start is not before end.
    """
    for name, point in (("start", start), ("end", end)):
        if isinstance(point, bool) or not isinstance(point, int | float):
            raise PruningError(f"{name} must be a fraction of training (float) or an epoch (int), got {point!r}")
        if not point >= 0 or (isinstance(point, float) and point > 1):
            raise PruningError(f"{name} must be a fraction in [0.0, 1.0] or an epoch (int), got {point!r}")
    comparable = isinstance(start, int) == isinstance(end, int) or start == 0
    if (comparable and start >= end) or end == 0:
        raise PruningError(f"start must be before end, got start={start!r}, end={end!r}")


def check_every(every: Any) -> None:
    """Raise a PruningError unless ``every`` is ``"epoch"`` or a number of optimizer steps."""
    if every != "epoch" and (isinstance(every, bool) or not isinstance(every, int) or every < 1):
        raise PruningError(f"every must be 'epoch' or a number of optimizer steps of at least 1, got {every!r}")


@dataclass(frozen=True)
class Clock:
    """Maps a moment of training to the progress of a schedule.

    Training is measured as a fraction of its whole length (of whichever of ``max_epochs`` and ``max_steps`` ends
    it first); where it has no end, in epochs.
    """

    start: Point
    end: Point
    max_epochs: int | None
    max_steps: int | None
    steps_per_epoch: float

    @classmethod
    def of(cls, trainer: Any, start: Point, end: Point, *, check: bool = True) -> Clock:
        """The clock of a Trainer whose loaders are set up; without ``check`` for its length alone.

        Raises:
            PruningError: The window can't be placed in this training, or lies outside it.
        """
        batches: float = trainer.num_training_batches
        clock = cls(
            start,
            end,
            max_epochs=trainer.max_epochs if trainer.max_epochs not in (None, -1) else None,
            max_steps=trainer.max_steps if trainer.max_steps != -1 else None,
            steps_per_epoch=math.ceil(batches / trainer.accumulate_grad_batches) if batches < math.inf else batches,
        )
        if check:
            clock.check()
        return clock

    def check(self) -> None:
        """Raise a PruningError if the window can't be placed in this training, or lies outside it."""
        for name, point in (("start", self.start), ("end", self.end)):
            if isinstance(point, float) and point and self.max_epochs is None and self.max_steps is None:
                raise PruningError(
                    f"{name}={point!r} is a fraction of training, but this training has no end (max_epochs=-1, "
                    f"max_steps=-1); give start and end as epochs, or the Trainer a max_epochs"
                )
            by_steps_alone = self.max_epochs is None and self.max_steps is not None
            if isinstance(point, int) and point and by_steps_alone and math.isinf(self.steps_per_epoch):
                raise PruningError(
                    f"{name}={point!r} is an epoch, but the Trainer has max_steps only and the data loader no "
                    "length; give start and end as fractions"
                )
        start, end = self._position(self.start), self._position(self.end)
        if start >= end:
            raise PruningError(f"start must be before end, got start={self.start!r}, end={self.end!r} in {self}")
        if end > 1 and (self.max_epochs is not None or self.max_steps is not None):
            raise PruningError(
                f"end={self.end!r} is after the end of training ({self}): the amount would never be reached"
            )

    def __str__(self) -> str:
        return f"max_epochs={self.max_epochs or -1}, max_steps={self.max_steps or -1}"

    @property
    def steps(self) -> float:
        """Optimizer steps of the whole training; infinite: it has no end, or no known one."""
        by_epochs = math.inf if self.max_epochs is None else self.max_epochs * self.steps_per_epoch
        return min(by_epochs, math.inf if self.max_steps is None else self.max_steps)

    def steps_until(self, point: Point) -> float:
        """Optimizer steps before a moment of training; infinite: that isn't known."""
        if math.isinf(self.steps):
            return point * self.steps_per_epoch if isinstance(point, int) else math.inf
        return self._position(point) * self.steps

    def _fraction(self, epochs: float, steps: float) -> float:
        if self.max_epochs is None and self.max_steps is None:
            return epochs
        by_epochs = epochs / self.max_epochs if self.max_epochs is not None else 0.0
        by_steps = steps / self.max_steps if self.max_steps is not None else 0.0
        return max(by_epochs, by_steps)

    def _position(self, point: Point) -> float:
        if isinstance(point, float) or point == 0:
            return float(point)
        steps = point * self.steps_per_epoch if self.max_steps is not None else 0.0
        return self._fraction(point, 0.0 if math.isinf(steps) else steps)

    def progress(self, epochs: float, steps: int) -> float:
        """Progress of the schedule, 0 at its start and 1 at its end.

        Args:
            epochs: Epochs trained so far; 1.5 is the middle of the second.
            steps: Optimizer steps made so far.
        """
        start, end = self._position(self.start), self._position(self.end)
        return min(max((self._fraction(epochs, steps) - start) / (end - start), 0.0), 1.0)
