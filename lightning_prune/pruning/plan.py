"""Plan: the frozen record of what was kept, what is gone and what was chosen; plain data, replayable."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from lightning_prune.activations.apply import Change, apply_changes, merge_changes, take_back_changes
from lightning_prune.errors import PruningError
from lightning_prune.graph.callsites import SizePatch, install_patches, installed_patches, remove_patches
from lightning_prune.graph.tree import named_tensors
from lightning_prune.pruning.passing import Form, inside, passes, put_back, remove_modules, skeletons_of
from lightning_prune.pruning.surgery import Attributes, Value, enlarge, shrink

__all__ = ["Plan"]


@dataclass(frozen=True)
class Plan:
    """What a removal keeps, and what it could not touch.

    Attributes:
        kept: For every parameter and buffer that shrinks: dimension -> kept indices, ascending.
        shapes: Shape before the removal of each of them.
        attributes: Module -> size attribute (``in_features``, ``groups``, …) -> its value before and after.
        patches: Sizes written in a forward that are rewritten at the call.
        counts: Buffers that hold indices -> the indices kept of what they count along.
        approximate: Pruned layers whose neurons an operation reads together -> those operations.
        frozen: Parameter dimensions, kernels and layers that had to stay -> why.
        removed: Layers that are gone -> how they were called; what passes their input on stands in their place.
        skeletons: What the outermost of these were, without values; not part of the record, known only where a removal
            was made in this process. `take_back` needs them.
        activations: Activation site -> what was chosen there, and what it was.
    """

    kept: dict[str, dict[int, list[int]]]
    shapes: dict[str, list[int]]
    attributes: Attributes = field(default_factory=dict)
    patches: tuple[SizePatch, ...] = ()
    counts: dict[str, list[int]] = field(default_factory=dict)
    approximate: dict[str, str] = field(default_factory=dict)
    frozen: dict[str, str] = field(default_factory=dict)
    removed: dict[str, Form] = field(default_factory=dict)
    skeletons: dict[str, nn.Module] = field(default_factory=dict, compare=False, repr=False)
    activations: dict[str, Change] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.kept or self.removed or self.activations)

    @property
    def live_patches(self) -> tuple[SizePatch, ...]:
        """The patches whose module is still there."""
        return tuple(patch for patch in self.patches if not inside(patch.site.module, self.removed))

    def made(self, model: nn.Module) -> bool:
        """Whether a model has the architecture that this plan leads to."""
        tensors = named_tensors(model)
        live = {name: dims for name, dims in self.kept.items() if not inside(name, self.removed)}
        return (
            bool(self.kept or self.removed)
            and all(
                name in tensors
                and list(tensors[name].shape)
                == [len(dims.get(dim, range(size))) for dim, size in enumerate(self.shapes[name])]
                for name, dims in live.items()
            )
            and all(passes(model, path) for path in self.removed if not inside(path, self.removed, proper=True))
        )

    def dense_shapes(self, model: nn.Module) -> dict[str, list[int]]:
        """Shapes of the parameters and buffers of the model that this plan was made of, given what it is now."""
        shapes = {name: list(tensor.shape) for name, tensor in named_tensors(model).items()}
        for path, skeleton in self.skeletons.items():
            shapes |= {f"{path}.{name}": list(tensor.shape) for name, tensor in named_tensors(skeleton).items()}
        return shapes | self.shapes

    def to_dict(self) -> dict[str, Any]:
        """As plain data: dict, list, str and int only, so JSON and ``weights_only=True`` take it."""
        return {
            "kept": {name: {str(dim): list(index) for dim, index in dims.items()} for name, dims in self.kept.items()},
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            "attributes": {
                path: {name: [_plain(value) for value in values] for name, values in named.items()}
                for path, named in self.attributes.items()
            },
            "patches": [patch.to_dict() for patch in self.patches],
            "counts": {name: list(index) for name, index in self.counts.items()},
            "approximate": dict(self.approximate),
            "frozen": dict(self.frozen),
            "removed": {path: form.to_dict() for path, form in self.removed.items()},
            "activations": {name: change.to_dict() for name, change in self.activations.items()},
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        """From what `to_dict` gave.

        Raises:
            PruningError: The data is not a plan.
        """
        try:
            return cls(
                kept={
                    name: {int(dim): [int(i) for i in index] for dim, index in dims.items()}
                    for name, dims in data["kept"].items()
                },
                shapes={name: [int(size) for size in shape] for name, shape in data["shapes"].items()},
                attributes={
                    path: {name: (_value(before), _value(after)) for name, (before, after) in named.items()}
                    for path, named in data["attributes"].items()
                },
                patches=tuple(SizePatch.from_dict(patch) for patch in data["patches"]),
                counts={name: [int(i) for i in index] for name, index in data.get("counts", {}).items()},
                approximate=dict(data["approximate"]),
                frozen=dict(data["frozen"]),
                removed={path: Form.from_dict(form) for path, form in data.get("removed", {}).items()},
                activations={name: Change.from_dict(each) for name, each in data.get("activations", {}).items()},
            )
        except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
            raise PruningError(f"not a plan: {type(error).__name__}: {error}") from error

    def apply(self, model: nn.Module) -> None:
        """Give a full-size model the pruned architecture; its kept weights stay, in place.

        Raises:
            PruningError: A tensor of the plan is missing or has another shape; the model is untouched.
        """
        tensors = named_tensors(model)
        for name, shape in self.shapes.items():
            if name not in tensors:
                raise PruningError(f"the plan keeps part of {name!r}, which {type(model).__name__} doesn't have")
            if list(tensors[name].shape) != shape:
                raise PruningError(
                    f"the plan expects {name!r} of shape {tuple(shape)}, got {tuple(tensors[name].shape)}"
                )
        after = {path: {name: value for name, (_, value) in named.items()} for path, named in self.attributes.items()}
        outermost = {path: form for path, form in self.removed.items() if not inside(path, self.removed, proper=True)}
        change = shrink(model, self.kept, counts=self.counts, numbers=after)
        before = installed_patches(model)
        try:
            install_patches(model, self.patches)
            apply_changes(model, self.activations)
            if outermost:
                skeletons = skeletons_of(model, outermost)
                remove_modules(model, outermost)
                self.skeletons.clear()
                self.skeletons.update(skeletons)
        except BaseException:
            change.undo()
            remove_patches(model)
            install_patches(model, before)
            raise

    def take_back(self, model: nn.Module) -> None:
        """Give a pruned model its old architecture back; the values of what was removed are lost.

        For measuring what it was, and before another state is loaded into it.

        Raises:
            PruningError: A layer was removed in another process: nothing tells what it was. The model is untouched.
        """
        put_back(model, self.removed, self.skeletons)
        take_back_changes(model, self.activations)
        enlarge(model, self.shapes, self.attributes)
        ours = {(patch.site, patch.dim): patch.before for patch in self.patches}
        before = [ours.get((patch.site, patch.dim), patch) for patch in installed_patches(model)]
        remove_patches(model)
        install_patches(model, [patch for patch in before if patch is not None])

    def then(self, later: Plan) -> Plan:
        """The one plan that does what this and then ``later`` do."""
        kept = {name: dict(dims) for name, dims in self.kept.items()}
        for name, dims in later.kept.items():
            for dim, index in dims.items():
                known = kept.setdefault(name, {}).get(dim)
                kept[name][dim] = index if known is None else [known[i] for i in index]
        counts = {name: list(index) for name, index in self.counts.items()}
        for name, index in later.counts.items():
            counts[name] = [counts[name][i] for i in index] if name in counts else list(index)
        patches = {(patch.site, patch.dim): patch for patch in self.patches}
        for patch in later.patches:
            earlier = patches.get((patch.site, patch.dim), patch)
            patches[patch.site, patch.dim] = replace(patch, before=earlier.before)
        attributes = {path: dict(named) for path, named in self.attributes.items()}
        for path, named in later.attributes.items():
            for name, (before, after) in named.items():
                first = attributes.setdefault(path, {}).get(name, (before, after))[0]
                attributes[path][name] = (first, after)
        return Plan(
            kept=kept,
            shapes={**later.shapes, **self.shapes},
            attributes=attributes,
            patches=tuple(patches.values()),
            counts=counts,
            approximate={**self.approximate, **later.approximate},
            frozen=later.frozen,
            removed={**self.removed, **later.removed},
            skeletons={**later.skeletons, **self.skeletons},
            activations=merge_changes(self.activations, later.activations),
        )


def _plain(value: Value) -> int | str | list[int]:
    return value if isinstance(value, int | str) else list(value)


def _value(data: Any) -> Value:
    if isinstance(data, (list, tuple)):
        return tuple(int(item) for item in data)
    return data if isinstance(data, str) else int(data)
