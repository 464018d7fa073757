"""The errors and warnings of the package; the ground floor, imports nothing of ours."""

from __future__ import annotations

__all__ = ["NoEffectWarning", "PruningError", "SurgeryError", "TraceError"]


class PruningError(ValueError):
    """Something asked for can't be done; raised before anything was changed."""


class TraceError(PruningError):
    """The model could not be run on the example inputs, so nothing is known about its structure."""


class SurgeryError(PruningError):
    """A removal failed or changed the output where it must not; the model was put back as it was."""


class NoEffectWarning(UserWarning):
    """A pruning step ran and changed nothing; the message says why."""
