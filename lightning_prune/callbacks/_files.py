"""Checkpoints that a Trainer reads while a callback of ours is in it: damaged ones are refused before they do harm."""

from __future__ import annotations

from typing import Any

from lightning_prune.pruning.prunable import check_whole

__all__ = ["check_files", "check_no_files"]


def check_files(trainer: Any) -> None:
    """From now on, until `check_no_files`, the strategy reads no checkpoint that was cut off or altered."""
    strategy = trainer.strategy
    if "load_checkpoint" in vars(strategy):
        return
    read = strategy.load_checkpoint

    def load_checkpoint(checkpoint_path: Any, *args: Any, **kwargs: Any) -> Any:
        check_whole(checkpoint_path)
        checkpoint = read(checkpoint_path, *args, **kwargs)
        states, tensors = (checkpoint.get(key) for key in ("callbacks", "state_dict"))
        for callback in trainer.callbacks if isinstance(states, dict) and isinstance(tensors, dict) else ():
            check, state = getattr(callback, "_check_checkpoint", None), states.get(callback.state_key)
            if check is not None and isinstance(state, dict):
                check(state, tensors)
        return checkpoint

    strategy.load_checkpoint = load_checkpoint


def check_no_files(trainer: Any) -> None:
    """Leave the strategy as it was."""
    if getattr(vars(trainer.strategy).get("load_checkpoint"), "__module__", None) == __name__:
        del trainer.strategy.load_checkpoint
