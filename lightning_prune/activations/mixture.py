"""A weighted mean of candidate activations at each site, while the weights are learned."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.activations.candidates import CANDIDATES, LEARNED, Choice, Value, spread
from lightning_prune.activations.sites import Site, Sites
from lightning_prune.graph.callsites import replace_calls, replaced_calls
from lightning_prune.graph.replaced import Replacement, outer_replacers

__all__ = ["UNITS", "Mixture", "Unit", "draw_units", "installed"]

UNITS = ("site", "layer", "model")
"""What shares one choice."""

OWN = "own"
"""How the weight of what the user has is called."""


@dataclass(frozen=True)
class Unit:
    """Sites that are searched together.

    Attributes:
        name: Of the one site, of their layer, or ``"model"``.
        sites: Their names.
        options: Candidates; None stands for what each of the sites has.
    """

    name: str
    sites: tuple[str, ...]
    options: tuple[Choice | None, ...]

    def labels(self) -> list[str]:
        """What the options are called."""
        return [OWN if option is None else str(option) for option in self.options]


def draw_units(
    sites: Sites, choices: Sequence[str], per: str, thresholds: Mapping[str, Sequence[Value]] | None = None
) -> list[Unit]:
    """The units of a search.

    Args:
        sites: Those that are searched.
        choices: Names of candidates.
        per: One of `UNITS`.
        thresholds: Site -> thresholds to try at a ReLU; None: parameters are not searched.
    """
    grouped: dict[str, list[Site]] = {}
    for site in sites.sites:
        key = {"site": site.name, "layer": site.owner or "(model)", "model": "(model)"}[per]
        grouped.setdefault(key, []).append(site)
    units = []
    for name, members in grouped.items():
        own = [site.own for site in members]
        options = [Choice(each) for each in choices]
        if thresholds is not None:
            options += _parametrised(members, choices, thresholds)
        different = [option for option in options if any(option != each for each in own)]
        units.append(Unit(name, tuple(s.name for s in members), (None, *dict.fromkeys(different))))
    return units


def _parametrised(
    members: Sequence[Site], choices: Sequence[str], thresholds: Mapping[str, Sequence[Value]]
) -> list[Choice]:
    options = []
    rectified = [site for site in members if site.own == Choice("relu")]
    if rectified and len(rectified) == len(members):
        options.append(Choice("shifted_relu"))
        # Sites that share a choice share its threshold: only one that is alone has its own quantiles.
        if len(members) == 1:
            found = thresholds.get(members[0].name, ())
            options += [Choice("thresholded_relu", (("threshold", value),)) for value in found]
    if "silu" in choices or any(site.own is not None and site.own.name == "silu" for site in members):
        options.append(Choice("swish"))
    return options


class Mixture:
    """The weights of all units' options; what a site runs while they are learned.

    Attributes:
        alphas: One tensor per unit, of shape (options,), from 0.
        start: The part of the weight that is the user's own function's while alpha is 0.
        values: (unit, option) -> the parameter that is learned there, of shape () or (channels, 1, …).
        alive: Which options have not been dropped.
        temperature: Of the softmax.
        matching: 1: candidates are scaled to the spread of what the user has; 0: they are as they will be.
        failed: (unit, option) that gave values that are not finite, since this was last emptied.
    """

    def __init__(
        self, sites: Sites, units: Sequence[Unit], *, device: torch.device | str = "cpu", per_channel: bool = False,
        learn: bool = False, start: float = 0.5,
    ) -> None:  # fmt: skip
        """Start where the user's own functions have the part ``start`` of the weight."""
        self.sites = {site.name: site for site in sites.sites}
        self.units = list(units)
        self.start = start
        self.temperature = 1.0
        self.matching = 1.0
        self.alphas = []
        self.values: dict[tuple[int, int], Tensor] = {}
        for number, unit in enumerate(self.units):
            self.alphas.append(torch.zeros(len(unit.options), device=device).requires_grad_())
            for place, option in enumerate(unit.options if learn else ()):
                if option is not None and option.name in LEARNED:
                    self.values[number, place] = self._first_value(unit, option, per_channel).to(device)
                    self.values[number, place].requires_grad_()
        self.alive = [[True] * len(unit.options) for unit in self.units]
        self.failed: set[tuple[int, int]] = set()

    def _first_value(self, unit: Unit, option: Choice, per_channel: bool) -> Tensor:
        first = CANDIDATES[option.name].parameters[LEARNED[option.name]]
        assert isinstance(first, float)
        shapes = [self.sites[name].shape for name in unit.sites]
        kinds = {(len(shape), shape[1]) for shape in shapes if len(shape) in (2, 4, 5)}
        if per_channel and len(kinds) == 1 and all(len(shape) in (2, 4, 5) for shape in shapes):
            dims, channels = kinds.pop()
            # Of its final shape: a view would count as one of the forward's own where sizes are rewritten.
            return torch.full((channels, *[1] * (dims - 2)), first)
        return torch.tensor(first)

    @property
    def leaves(self) -> list[Tensor]:
        """All that is learned."""
        return [*self.alphas, *self.values.values()]

    def weights(self, unit: int) -> Tensor:
        """Softmax over what is alive, 0 elsewhere; shape: (options,)."""
        alpha = self.alphas[unit]
        alive = torch.tensor(self.alive[unit], device=alpha.device)
        logits = alpha / self.temperature
        if len(alpha) > 1:
            # Beside alpha, not in it: a falling temperature would let the start win before anything is learned.
            first = math.log(self.start * (len(alpha) - 1) / (1 - self.start))
            logits = torch.cat([logits[:1] + first, logits[1:]])
        return torch.softmax(logits.masked_fill(~alive, -torch.inf), 0)

    def run(self, unit: int, site: Site, x: Tensor, own: Callable[[Tensor], Tensor]) -> Tensor:
        """The mixture at a site; shape: that of ``x``."""
        weights = self.weights(unit).to(x.dtype)
        total: Tensor | None = None
        used: Tensor | None = None
        for place, option in enumerate(self.units[unit].options):
            if not self.alive[unit][place] or (unit, place) in self.failed:
                continue
            y = own(x) if option is None else self._scaled(unit, place, option, site, x)
            if option is not None and not bool(y.isfinite().all()) and bool(x.isfinite().all()):
                self.failed.add((unit, place))  # for every process to know; left out at once
                continue
            total = weights[place] * y if total is None else total + weights[place] * y
            used = weights[place] if used is None else used + weights[place]
        if total is None or used is None:
            return own(x)
        return total / used if self.failed else total

    def _scaled(self, unit: int, place: int, option: Choice, site: Site, x: Tensor) -> Tensor:
        value = self.values.get((unit, place))
        if value is None:
            y = option(x)
        else:
            y = CANDIDATES[option.name].function(x, **{LEARNED[option.name]: value.to(x.dtype)})
        if self.matching and site.own is not None and min(spread(option), spread(site.own)) > 0:
            y = y * (spread(site.own) / spread(option)) ** self.matching
        return y

    def drop(self, below: float) -> None:
        """Give up options with less weight than ``below`` of an equal share; the heaviest stays."""
        for number, unit in enumerate(self.units):
            weights = self.weights(number).tolist()
            best = max(weights)
            limit = below / sum(self.alive[number])
            for place in range(len(unit.options)):
                if self.alive[number][place] and weights[place] < min(limit, best):
                    self.alive[number][place] = False

    def fail(self, unit: int, place: int) -> None:
        """Give up an option whatever its weight; what the user has never is."""
        if place:
            self.alive[unit][place] = False
            self.alive[unit][0] = True

    def best(self) -> dict[str, Choice]:
        """Site -> the option with the most weight; sites that keep what they have are not in it."""
        return self.choices([int(self.weights(number).argmax()) for number in range(len(self.units))])

    def choices(self, picks: Sequence[int]) -> dict[str, Choice]:
        """Site -> what these options of the units mean there, parameters as learned; without sites that keep theirs."""
        chosen: dict[str, Choice] = {}
        for number, (unit, place) in enumerate(zip(self.units, picks, strict=True)):
            option = unit.options[place]
            if option is None:
                continue
            value = self.values.get((number, place))
            if value is not None:
                plain: Value = tuple(value.flatten().tolist()) if value.dim() else float(value.detach())
                option = Choice(option.name, ((LEARNED[option.name], plain),))
            chosen |= {name: option for name in unit.sites if option != self.sites[name].own}
        return chosen

    def table(self) -> dict[str, dict[str, float]]:
        """Unit -> option -> weight."""
        return {
            unit.name: dict(zip(unit.labels(), self.weights(number).tolist(), strict=True))
            for number, unit in enumerate(self.units)
        }

    def state_dict(self) -> dict[str, Any]:
        """As plain data and tensors."""
        return {
            "sites": [site.to_dict() for site in self.sites.values()],
            "units": [
                {"name": u.name, "sites": list(u.sites), "options": [o and o.to_dict() for o in u.options]}
                for u in self.units
            ],
            "alphas": [alpha.detach().clone() for alpha in self.alphas],
            "values": [[*place, value.detach().clone()] for place, value in self.values.items()],
            "alive": [list(alive) for alive in self.alive],
            "temperature": self.temperature,
            "matching": self.matching,
        }

    @classmethod
    def from_state(cls, sites: Sites, state: Mapping[str, Any], device: torch.device | str = "cpu") -> Mixture:
        """What gave a `state_dict`, for the same sites."""
        units = [
            Unit(u["name"], tuple(u["sites"]), tuple(o and Choice.from_dict(o) for o in u["options"]))
            for u in state["units"]
        ]
        mixture = cls(sites, units, device=device)
        mixture.alphas = [alpha.detach().clone().to(device).requires_grad_() for alpha in state["alphas"]]
        mixture.values = {(u, o): v.detach().clone().to(device).requires_grad_() for u, o, v in state["values"]}
        mixture.alive = [list(alive) for alive in state["alive"]]
        mixture.temperature, mixture.matching = state["temperature"], state["matching"]
        return mixture


class _SiteMixture:
    """The mixture at one site, as what runs in the place of a call."""

    def __init__(self, mixture: Mixture, unit: int, site: Site) -> None:
        self.mixture, self.unit, self.site = mixture, unit, site

    def __call__(self, x: Tensor, own: Callable[[Tensor], Tensor]) -> Tensor:
        return self.mixture.run(self.unit, self.site, x, own)


class _MixedForward:
    """In the place of an activation module's forward, which counts as one call of its function all the same."""

    def __init__(self, module: nn.Module, run: _SiteMixture) -> None:
        self.module, self.mixed = module, run
        self.inplace = bool(getattr(module, "inplace", False))

    def __call__(self, x: Tensor) -> Tensor:
        outer = outer_replacers()
        name = self.mixed.site.function
        for mode in outer:
            if mode.counts[""] == 0:
                mode.counts[name] = mode.counts.get(name, 0) + 1
            mode.counts[""] += 1
        try:
            return self.mixed(x.clone() if self.inplace else x, lambda x: type(self.module).forward(self.module, x))
        finally:
            for mode in outer:
                mode.counts[""] -= 1


@contextmanager
def installed(
    model: nn.Module,
    sites: Sites,
    mixture: Mixture,
    on_counts: Callable[[str, bool, Mapping[str, int]], None] | None = None,
) -> Iterator[None]:
    """Inside, the sites of ``model`` run the mixture; parameters and modules stay what they are."""
    before, shields = replaced_calls(model)
    calls = {owner: dict(each) for owner, each in before.items()}
    planted = []
    for number, unit in enumerate(mixture.units):
        for name in unit.sites:
            site = mixture.sites[name]
            run = _SiteMixture(mixture, number, site)
            if site.module is None:
                calls.setdefault(site.owner, {})[site.function, site.call] = Replacement(
                    run, site.in_place, with_own=True
                )
            else:
                planted.append((model.get_submodule(site.module), run))
    nested = [path for owner in calls for path in sites.nested.get(owner, ())]
    replace_calls(model, calls, {*shields, *nested}, on_counts)
    for module, run in planted:
        module.forward = _MixedForward(module, run)
    try:
        yield
    finally:
        for module, _ in planted:
            module.__dict__.pop("forward", None)
        replace_calls(model, before, shields)
