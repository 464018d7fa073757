"""The last training batches, as the calls of the model's parts that they came to."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from lightning_prune.graph.callsites import ModuleCall

__all__ = ["RecentCalls"]


class RecentCalls:
    """Keeps the inputs of the parts of a model that training calls from outside, of the last few batches."""

    def __init__(self, model: nn.Module, calls: Sequence[ModuleCall], count: int) -> None:
        """Listen to the parts that ``calls`` name; keep ``count`` batches."""
        self.batches: deque[list[ModuleCall]] = deque(maxlen=count)
        self._depth = 0
        modules = dict(model.named_modules())
        self._handles: list[RemovableHandle] = []
        for path in dict.fromkeys(call.path for call in calls):
            module = modules[path]
            self._handles.append(module.register_forward_pre_hook(self._before(path), with_kwargs=True))
            self._handles.append(module.register_forward_hook(self._after, always_call=True))

    def _before(self, path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._depth += 1
            if self._depth == 1 and module.training and self.batches:
                given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
                # What another part has computed will have another shape after a removal.
                outside = not any(tensor.requires_grad for tensor in given)
                call = ModuleCall(path, args, kwargs) if outside else ModuleCall(path, (), {}, repeatable=False)
                self.batches[-1].append(call)

        return hook

    def _after(self, *_: Any) -> None:
        self._depth = max(self._depth - 1, 0)

    def next_batch(self) -> None:
        """What comes now belongs to another batch."""
        self._depth = 0
        self.batches.append([])

    def close(self) -> None:
        """Listen no longer, and let the batches go."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.batches.clear()
