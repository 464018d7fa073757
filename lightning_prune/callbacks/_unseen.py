"""Parts of a model that no watched batch has run: heads of other tasks, layers that were dropped at random."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

__all__ = ["Unseen"]


class Unseen:
    """Waits for training batches that run such parts: modules none of whose own parameters was read.

    Attributes:
        known: Paths of the others.
    """

    def __init__(self, model: nn.Module, unread: Collection[str], told: Callable[[str], None]) -> None:
        """Call ``told`` with the path of a part when it first runs in training; ``unread``: names of parameters."""
        self._model, self._told = model, told
        self.known: set[str] = set()
        self._came: set[str] = set()
        self._parts: dict[str, list[str]] = {}
        self._handles: dict[str, RemovableHandle] = {}
        for path, module in model.named_modules():
            own = [f"{path}.{name}" for name, parameter in module._parameters.items() if parameter is not None]
            if path and own and not set(own).issubset(unread):
                self.known.add(path)
            elif path and own:
                self._parts[path] = own
                self._handles[path] = module.register_forward_pre_hook(self._before(path))

    @property
    def came(self) -> bool:
        """Whether one of them has run since, and is not known yet."""
        return bool(self._came)

    def _before(self, path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            if self._model.training and path not in self._came:
                self._came.add(path)
                self._told(path)

        return hook

    @property
    def paths(self) -> set[str]:
        """The parts that it waits for."""
        return set(self._parts)

    @property
    def parameters(self) -> set[int]:
        """Ids of their parameters."""
        return {id(self._model.get_parameter(name)) for own in self._parts.values() for name in own}

    def know(self, unread: Collection[str]) -> None:
        """A batch was watched: wait no longer for those of which it has read a parameter."""
        for path in [path for path, own in self._parts.items() if not set(own).issubset(unread)]:
            del self._parts[path]
            self._handles.pop(path).remove()
            self._came.discard(path)
            self.known.add(path)

    def close(self) -> None:
        """Wait no longer."""
        for handle in self._handles.values():
            handle.remove()
        self._handles, self._parts, self._came = {}, {}, set()
