"""Rewinding: weights and optimizer state of an earlier moment of training, as an independent copy."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_prune.graph.tree import named_tensors
from lightning_prune.pruning.masks import local, share_of, whole
from lightning_prune.pruning.passing import inside
from lightning_prune.pruning.plan import Plan
from lightning_prune.pruning.surgery import take

__all__ = ["Rewind"]


@dataclass
class Rewind:
    """A moment of training.

    Attributes:
        tensors: Parameters and buffers by name, on the CPU.
        states: State of each optimizer's parameters, by parameter name; what is no tensor as it is.
    """

    tensors: dict[str, Tensor]
    states: list[dict[str, dict[str, Any]]]

    @classmethod
    def of(cls, model: nn.Module, optimizers: Sequence[Optimizer]) -> Rewind:
        """This moment."""
        names = {id(tensor): name for name, tensor in named_tensors(model).items()}
        states = [
            {
                names[id(parameter)]: {key: _copy(value) for key, value in optimizer.state[parameter].items()}
                for group in optimizer.param_groups
                for parameter in group["params"]
                if id(parameter) in names and parameter in optimizer.state
            }
            for optimizer in optimizers
        ]
        return cls({name: _copy(tensor) for name, tensor in named_tensors(model).items()}, states)

    @torch.no_grad()
    def restore(self, model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        """Go back to it; parameters and buffers stay the same objects."""
        tensors = named_tensors(model)
        for name, value in self.tensors.items():
            if name in tensors:
                _put(tensors[name], value)
        names = {id(tensor): name for name, tensor in tensors.items()}
        for optimizer, states in zip(optimizers, self.states, strict=False):
            for parameter in [p for group in optimizer.param_groups for p in group["params"]]:
                state = states.get(names.get(id(parameter), ""))
                if state is None:
                    optimizer.state.pop(parameter, None)
                    continue
                now = optimizer.state[parameter]
                for key, value in state.items():
                    old = now.get(key)
                    if isinstance(value, Tensor) and isinstance(old, Tensor):
                        _put(old, value)
                    else:
                        now[key] = (
                            value.to(parameter.device, copy=True) if isinstance(value, Tensor) else copy.deepcopy(value)
                        )

    def follow(self, plan: Plan) -> None:
        """Something was removed."""

        def taken(name: str, value: Any) -> Any:
            fits = isinstance(value, Tensor) and name in plan.kept and list(value.shape) == plan.shapes[name]
            return take(value, plan.kept[name]) if fits else value

        self.tensors = {
            name: taken(name, value) for name, value in self.tensors.items() if not inside(name, plan.removed)
        }
        self.states = [
            {
                name: {key: taken(name, value) for key, value in state.items()}
                for name, state in states.items()
                if not inside(name, plan.removed)
            }
            for states in self.states
        ]

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {"tensors": dict(self.tensors), "states": list(self.states)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Rewind:
        """From what `to_dict` gave."""
        return cls(dict(data["tensors"]), list(data["states"]))


def _copy(value: Any, device: torch.device | str = "cpu") -> Any:
    return whole(value.detach()).to(device, copy=True) if isinstance(value, Tensor) else copy.deepcopy(value)


def _put(tensor: Tensor, value: Tensor) -> None:
    local(tensor).copy_(share_of(value, tensor))
