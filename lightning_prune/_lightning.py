"""Makes our Lightning classes acceptable to the Trainers of ``lightning.pytorch`` and ``pytorch_lightning``.

The two packages hold the same code under two names, and each Trainer insists on its own base classes.
"""

from __future__ import annotations

import sys
from typing import Any

__all__ = ["accept_both_lightnings", "follow_trainer"]


def accept_both_lightnings(cls: type, name: str) -> None:
    """Add ``pytorch_lightning``'s twin of a base class to ``cls`` once the user has imported that package.

    Called when an object is made: by then the user has imported the Lightning that the Trainer comes from.
    Importing ``pytorch_lightning`` ourselves would cost every user of ``lightning`` its import time, and
    deciding at our own import would depend on the order of the user's import lines.

    Args:
        cls: The class of ours that inherits directly from ``lightning.pytorch``'s ``name``.
        name: Name of the base class in both packages, e.g. ``"Callback"``.
    """
    other: Any = sys.modules.get("pytorch_lightning")
    twin = getattr(other, name, None)
    if twin is not None and not issubclass(cls, twin):
        cls.__bases__ = (*cls.__bases__, twin)


def follow_trainer(cls: type, trainer: object) -> None:
    """Put the base class from the Trainer's own package first.

    A Trainer tells overridden hooks by comparing code with its own LightningModule, so methods inherited
    from the other package look overridden, and it refuses the module.

    Args:
        cls: A class of ours after ``accept_both_lightnings``.
        trainer: The Trainer that is about to run, or a weak proxy of it.
    """
    packages = {base.__module__.partition(".")[0] for base in trainer.__class__.__mro__}
    bases = sorted(cls.__bases__, key=lambda base: base.__module__.partition(".")[0] not in packages)
    if cls.__bases__ != tuple(bases):
        cls.__bases__ = tuple(bases)
