"""Fitting a mixture of activations beside a training: its weights' own optimizer, on held-out batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_prune.activations.candidates import Choice
from lightning_prune.activations.mixture import Mixture, draw_units, installed
from lightning_prune.activations.sites import Sites
from lightning_prune.callbacks._activation_report import Outcome
from lightning_prune.callbacks._trials import aside, loss_on

__all__ = ["Fitting", "MixtureOptions", "check_mixture", "warn_varying"]


@dataclass(frozen=True)
class MixtureOptions:
    """How a mixture is fitted; as the arguments of `ActivationSearch` of these names."""

    choices: tuple[str, ...]
    per: str
    threshold: bool | str
    lr: float
    value_lr: float
    temperature: float
    drop_below: float


class Fitting:
    """A mixture that a model runs while its weights are fitted.

    Attributes:
        sites: The sites that are searched.
        mixture: The weights.
        adam: Their optimizer.
        updates: Its steps so far.
    """

    def __init__(self, pl_module: Any, sites: Sites, mixture: Mixture, options: MixtureOptions) -> None:
        self.options = options
        self.updates = 0
        self._mixing = ExitStack()
        self._varying: set[str] = set()
        self._start(pl_module, sites, mixture)

    def _start(self, pl_module: Any, sites: Sites, mixture: Mixture) -> None:
        """Let the model run the mixture."""
        self.sites, self.mixture = sites, mixture
        groups: list[dict[str, Any]] = [{"params": mixture.alphas, "lr": self.options.lr}]
        if mixture.values:
            groups.append({"params": list(mixture.values.values()), "lr": self.options.value_lr})
        self.adam = torch.optim.Adam(groups, betas=(0.5, 0.999), weight_decay=0.0)
        self._mixing.enter_context(torch.compiler.set_stance("force_eager"))  # compiled modules run the mixture, too
        self._mixing.enter_context(installed(pl_module, sites, mixture, self._count))

    def close(self) -> None:
        """Let the model run what it ran before."""
        self._mixing.close()

    def state_dict(self) -> dict[str, Any]:
        """As plain data and tensors."""
        return {
            "all_sites": self.sites.to_dict(),
            "mixture": self.mixture.state_dict(),
            "adam": self.adam.state_dict(),
            "updates": self.updates,
        }

    @classmethod
    def from_state(cls, pl_module: Any, state: Mapping[str, Any], options: MixtureOptions) -> Fitting:
        """Go on from what gave a `state_dict`."""
        sites = Sites.from_dict(state["all_sites"])
        fitting = cls(pl_module, sites, Mixture.from_state(sites, state["mixture"], pl_module.device), options)
        fitting.adam.load_state_dict(state["adam"])
        fitting.updates = state["updates"]
        return fitting

    def progress(self, done: float) -> None:
        """Sharpen the softmax and let go of the matching; ``done``: the part of the search that is over, 0 to 1."""
        self.mixture.temperature = float(self.options.temperature**done)
        self.mixture.matching = 1.0 - done

    def _count(self, owner: str, training: bool, counts: Mapping[str, int]) -> None:
        """A forward has run: were its calls those that were observed?"""
        expected: dict[str, int] = {}
        for function, _ in self.sites.calls.get(owner, ()):
            if function is not None:
                expected[function] = expected.get(function, 0) + 1
        seen = {name: count for name, count in counts.items() if name and count}
        if owner not in self.sites.varying and seen != expected:
            self._varying.add(owner)

    def step(self, trainer: Any, pl_module: Any, held: list[Any]) -> None:
        """One step of the weights, on the next held-out batch or, without any, with the gradients of training.

        ``held`` is emptied where the training step doesn't take such a batch.
        """
        mixture = self.mixture
        found = self._held_out_gradients(trainer, pl_module, held)
        if found is None:
            found = [leaf.grad for leaf in mixture.leaves]
        self.updates += 1
        grads = [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(mixture.leaves, found, strict=True)]
        owners = list(self.sites.calls)
        places = [(u, o) for u, unit in enumerate(mixture.units) for o in range(len(unit.options))]
        told = [float(place in mixture.failed) for place in places] + [float(o in self._varying) for o in owners]
        flat = torch.cat([*(grad.flatten().float() for grad in grads), torch.tensor(told, device=pl_module.device)])
        flat = trainer.strategy.reduce(flat, reduce_op="mean")  # every process makes the same step
        learned = sum(grad.numel() for grad in grads)
        flags = flat[learned:].tolist()
        if bool(flat[:learned].isfinite().all()):
            for leaf, part in zip(mixture.leaves, flat[:learned].split([g.numel() for g in grads]), strict=True):
                leaf.grad = part.view_as(leaf).to(leaf.dtype)
            self.adam.step()
        for leaf in mixture.leaves:
            leaf.grad = None
        for (unit, option), failed in zip(places, flags, strict=False):
            if failed:
                mixture.fail(unit, option)
                rank_zero_warn(
                    f"ActivationSearch: {mixture.units[unit].labels()[option]} gave values that are not finite at "
                    f"{mixture.units[unit].name} and is dropped there"
                )
        mixture.failed.clear()
        mixture.drop(self.options.drop_below)
        varying = [owner for owner, told in zip(owners, flags[len(places) :], strict=True) if told]
        self._varying.clear()
        if varying:
            self._share(pl_module, varying)

    def _held_out_gradients(self, trainer: Any, pl_module: Any, held: list[Any]) -> Sequence[Tensor | None] | None:
        """Of the loss on the next held-out batch; None: there is none that the training step takes."""
        if not held:
            return None
        leaves = self.mixture.leaves
        number = self.updates % len(held)
        try:
            with aside(pl_module), torch.enable_grad():
                loss = loss_on(trainer, pl_module, held[number], number)
                if loss is None or not loss.requires_grad:
                    return [None] * len(leaves)
                return torch.autograd.grad(loss, leaves, allow_unused=True)
        except Exception as error:  # validation batches may be made otherwise than training batches
            rank_zero_warn(
                f"ActivationSearch: training_step doesn't take a validation batch ({type(error).__name__}: {error}); "
                "the search goes on with training batches, and nothing is checked at its end"
            )
            held.clear()
            return None

    def _share(self, pl_module: Any, owners: Sequence[str]) -> None:
        """Search all calls of a function in these modules together, because their number varies."""
        mixture, sites = self.mixture, self.sites
        for owner in owners:
            before, sites = sites, sites.shared(owner)
            if sites is not before:
                warn_varying(owner)
        old = {name: number for number, unit in enumerate(mixture.units) for name in unit.sites}
        self._mixing.close()
        learn = bool(self.options.threshold)
        units = draw_units(sites, self.options.choices, self.options.per, {} if learn else None)
        merged = Mixture(sites, units, device=pl_module.device, learn=learn)
        merged.temperature, merged.matching = mixture.temperature, mixture.matching
        with torch.no_grad():
            for number, unit in enumerate(units):
                if unit.sites[0] in old and unit.options == mixture.units[old[unit.sites[0]]].options:
                    merged.alphas[number].copy_(mixture.alphas[old[unit.sites[0]]])
                    merged.alive[number] = list(mixture.alive[old[unit.sites[0]]])
        self._start(pl_module, sites, merged)


def check_mixture(
    mixture: Mixture, chosen: Mapping[str, Choice], loss: Callable[[Mapping[str, Choice]], float]
) -> Outcome:
    """Take back, unit by unit, what does worse than what the user had.

    Args:
        mixture: The mixture.
        chosen: Site -> what has the most weight.
        loss: Held-out loss of a short run with these choices.
    """
    whole, without = loss(chosen), loss({})
    rows: dict[str, tuple[float | None, float | None, str]] = {}
    for unit in mixture.units:
        changed = [name for name in unit.sites if name in chosen]
        if not changed:
            continue
        rest = {name: choice for name, choice in chosen.items() if name not in changed}
        back = loss(rest)
        note = "" if whole <= back else f"{chosen[changed[0]]} did worse, went back"
        rows |= dict.fromkeys(changed, (whole, back, note))
        if note:
            chosen, whole = rest, back
    return Outcome(chosen, rows, whole, without)


def warn_varying(owner: str) -> None:
    """Say that a module's calls are searched together."""
    rank_zero_warn(
        f"ActivationSearch: the activation calls in {owner or 'the model itself'} differ from run to run, so all "
        "calls of one function there share one choice"
    )
