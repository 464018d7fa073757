"""Putting chosen activations in a model: plain modules where one is a site of its own, call patches elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from lightning_prune.activations.candidates import Choice, choice_of
from lightning_prune.activations.sites import Site, Sites
from lightning_prune.errors import PruningError
from lightning_prune.graph.callsites import replace_calls, replaced_calls
from lightning_prune.graph.replaced import ALL_CALLS, Replacement

__all__ = ["Change", "apply_changes", "changes_for", "merge_changes", "present_activations", "take_back_changes"]


@dataclass(frozen=True)
class Change:
    """One activation that stands in another's place; plain data.

    Attributes:
        after: What it is now.
        before: What it was; None: a call whose arguments no choice has (taking back restores it all the same).
        owner: Path of the module whose forward makes the call; None: a module was replaced as a whole.
        function: What the call counts as.
        call: Its number, once all modules are replaced; -1: all calls.
        in_place: What the forward goes on to use is the input; for a module: it worked in place.
        shields: Modules that the owner's forward runs and that count their calls themselves.
    """

    after: Choice
    before: Choice | None
    owner: str | None = None
    function: str = ""
    call: int = 0
    in_place: bool = False
    shields: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "after": self.after.to_dict(),
            "before": None if self.before is None else self.before.to_dict(),
            "owner": self.owner,
            "function": self.function,
            "call": self.call,
            "in_place": self.in_place,
            "shields": list(self.shields),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Change:
        """From what `to_dict` gave."""
        before = None if data["before"] is None else Choice.from_dict(data["before"])
        owner, function, in_place = data["owner"], str(data["function"]), bool(data["in_place"])
        shields = tuple(map(str, data["shields"]))
        return cls(Choice.from_dict(data["after"]), before, owner, function, int(data["call"]), in_place, shields)


def _gone(model: nn.Module, path: str, *, whole: bool) -> bool:
    """Whether a layer was removed that held a module (or, with ``whole``, was it): its input is passed on there now."""
    module = model
    for name in path.split(".") if path else ():
        child = module._modules.get(name)
        if child is None:
            return _passes(module)
        module = child
    return whole and _passes(module)


def _passes(module: nn.Module) -> bool:
    return isinstance(module, nn.Identity)


def _present(model: nn.Module, changes: Mapping[str, Change]) -> dict[str, Change]:
    """The changes of what is still there; layers may have been removed since."""
    return {
        name: change
        for name, change in changes.items()
        if not _gone(model, name if change.owner is None else change.owner, whole=change.owner is not None)
    }


def changes_for(model: nn.Module, sites: Sites, choices: Mapping[str, Choice]) -> dict[str, Change]:
    """What it takes to have these choices, by the sites' names.

    A call's number is that in the changed model: a replaced module calls another function than before, or none.

    Raises:
        PruningError: There is no such site.
    """
    known = {site.name: site for site in sites.sites}
    for name in choices:
        if name not in known:
            raise PruningError(f"no activation site {name!r}; there are: {', '.join(known)}")
    choices = {
        name: choice
        for name, choice in choices.items()
        if not _gone(model, known[name].module or known[name].owner, whole=known[name].module is None)
    }
    modules = {site.module: choices[site.name] for site in sites.sites if site.module and site.name in choices}
    changes = {}
    for name, choice in choices.items():
        site = known[name]
        if site.module is not None:
            in_place = bool(getattr(model.get_submodule(site.module), "inplace", False))
            changes[name] = Change(choice, site.own, in_place=in_place)
        else:
            call = site.call if site.call == ALL_CALLS else _number_after(sites, site, modules)
            shields = sites.nested.get(site.owner, ())
            changes[name] = Change(choice, site.own, site.owner, site.function, call, site.in_place, shields)
    return changes


def _number_after(sites: Sites, site: Site, modules: Mapping[str, Choice]) -> int:
    """The number of a call once these modules are replaced."""
    before = after = 0
    for function, module in sites.calls[site.owner]:
        if function == site.function:
            if before == site.call:
                return after
            before += 1
        now = modules[module].emits if module is not None and module in modules else function
        after += now == site.function
    return after


def apply_changes(model: nn.Module, changes: Mapping[str, Change]) -> None:
    """Make the changes; calls that were replaced before stay so.

    Raises:
        PruningError: The model doesn't have one of the places; nothing was changed.
    """
    changes = _present(model, changes)
    modules = {path: change for path, change in changes.items() if change.owner is None}
    names = {path for path, _ in model.named_modules(remove_duplicate=False)}
    for path in modules:
        if path not in names or choice_of(model.get_submodule(path)) is None:
            raise PruningError(f"{type(model).__name__} has no activation module {path!r} to replace")
    for change in changes.values():
        for path in () if change.owner is None else (change.owner, *change.shields):
            if path not in names:
                raise PruningError(f"{type(model).__name__} has no module {path!r}, whose activations are replaced")
    replacements, shields = replaced_calls(model)
    for change in changes.values():
        if change.owner is not None:
            place = (change.function, change.call)
            replacements.setdefault(change.owner, {})[place] = Replacement(change.after, change.in_place)
            shields += change.shields
    for path, change in modules.items():
        _set_module(model, path, change.after, change.in_place)
    replace_calls(model, replacements, shields)


def take_back_changes(model: nn.Module, changes: Mapping[str, Change]) -> None:
    """Undo the changes; other activations that were replaced stay so."""
    changes = _present(model, changes)
    replacements, shields = replaced_calls(model)
    for name, change in changes.items():
        if change.owner is not None:
            replacements.get(change.owner, {}).pop((change.function, change.call), None)
        elif change.before is not None:
            _set_module(model, name, change.before, change.in_place)
    remaining = {path: calls for path, calls in replacements.items() if calls}
    inside = tuple(f"{path}." if path else "" for path in remaining)
    replace_calls(model, remaining, [path for path in shields if path.startswith(inside)] if remaining else ())


def _set_module(model: nn.Module, path: str, choice: Choice, in_place: bool) -> None:
    """Put an activation in a module's place, under all its names."""
    old = model.get_submodule(path)
    new = choice.module(inplace=in_place)
    new.train(old.training)
    for holder in list(model.modules()):
        for name, child in holder._modules.items():
            if child is old:
                holder._modules[name] = new


def present_activations(model: nn.Module) -> dict[str, Change]:
    """The activation modules and replaced calls of a model: `apply_changes` gives a fresh one the same."""
    found = {path: Change(c, c, in_place=bool(getattr(m, "inplace", False))) for path, m, c in _modules(model)}
    replacements, shields = replaced_calls(model)
    for owner, calls in replacements.items():
        inside = f"{owner}." if owner else ""
        for (function, call), replacement in calls.items():
            if isinstance(replacement.function, Choice):
                under = tuple(path for path in shields if path.startswith(inside))
                found[f"{inside}{function}#{call}"] = Change(
                    replacement.function, None, owner, function, call, replacement.in_place, under
                )
    return found


def _modules(model: nn.Module) -> Iterable[tuple[str, nn.Module, Choice]]:
    for path, module in model.named_modules():
        choice = choice_of(module)
        if choice is not None and path:
            yield path, module, choice


def merge_changes(earlier: Mapping[str, Change], later: Mapping[str, Change]) -> dict[str, Change]:
    """The changes that ``earlier`` and then ``later`` make to the model as it was before both."""
    merged = dict(earlier)
    for name, change in later.items():
        merged[name] = replace(change, before=earlier[name].before) if name in earlier else change
    return merged
