"""What the Trainer's loggers get besides the metrics of epochs: scalars at each pruning, figures at the end."""

from __future__ import annotations

import io
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from lightning_prune.report.figures import draw_figures
from lightning_prune.report.report import Report

__all__ = ["log_figures", "log_scalars"]

FOLDER = "pruning"
"""Figures are logged under this name and their own."""


def log_scalars(trainer: Any, values: Mapping[str, float]) -> None:
    """Log values at once, at the step that Lightning logs the current batch's own metrics at."""
    for logger in trainer.loggers:
        logger.log_metrics(dict(values), step=trainer.fit_loop.epoch_loop._batches_that_stepped)


def log_figures(trainer: Any, report: Report) -> None:
    """Log a report's plots where a logger takes any and matplotlib is installed; to be called on rank 0."""
    takers = [taker for logger in trainer.loggers if (taker := _taker(logger, trainer.global_step)) is not None]
    if not takers or find_spec("matplotlib") is None:
        return
    for name, figure in draw_figures(report).items():
        for take in takers:
            try:
                take(f"{FOLDER}/{name}", figure)
            except Exception as error:  # a trained model is worth more than a picture of it
                rank_zero_warn(f"the plot {FOLDER}/{name} was not logged: {type(error).__name__}: {error}")


def _taker(logger: Any, step: int) -> Any:
    """What logs a figure under a name: TensorBoard's way, or that of loggers with ``log_image`` (W&B and others)."""
    if hasattr(type(logger), "log_image"):
        return lambda name, figure: logger.log_image(name, [_image(figure)])
    writer = getattr(logger, "experiment", None)
    if writer is not None and callable(getattr(writer, "add_figure", None)):
        return lambda name, figure: writer.add_figure(name, figure, global_step=step)
    return None


def _image(figure: Any) -> Any:
    from PIL import Image  # matplotlib needs it, so it is there

    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=100, facecolor="white")
    return Image.open(file)
