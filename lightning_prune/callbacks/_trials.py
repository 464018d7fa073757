"""Running a module's own training step on a batch aside from training, without leaving a trace."""

from __future__ import annotations

import copy
import math
import random
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Any, cast

import torch
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from torchmetrics import Metric

from lightning_prune.graph.run import cuda_devices, same_buffers, undisturbed

__all__ = ["Rates", "ShortRuns", "aside", "fetch", "loss_on", "to_device", "validation_batches"]

PLACES = 1000
"""At how many moments of a training its learning rates are noted."""


def fetch(loader: Any, count: int, model: nn.Module) -> list[Any]:
    """The first batches of a loader, the same each time, as the loader gives them."""
    devices = [device.index or 0 for device in cuda_devices(model)]
    with torch.random.fork_rng(devices=devices), _drawn_alike(loader):
        return list(islice(iter(_own_copy(loader)), count))


def _own_copy(loader: Any) -> Any:
    """A loader with an iterator of its own: workers that stay, or a place that a checkpoint gave, are training's."""
    if not isinstance(loader, DataLoader):
        return loader
    other = copy.copy(loader)
    other.__dict__ |= {name: None for name in ("_iterator", "next_iter_state") if name in loader.__dict__}
    return other


@contextmanager
def _drawn_alike(loader: Any) -> Iterator[None]:
    """Inside, what a loader draws is the same each time; what isn't torch's own random state is put back afterwards."""
    batches = getattr(loader, "batch_sampler", None)
    holders = (loader, getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None))
    found = [getattr(holder, "generator", None) for holder in holders]
    generators = [(each, each.get_state()) for each in found if isinstance(each, torch.Generator)]
    numpy = sys.modules.get("numpy")
    states = random.getstate(), numpy and numpy.random.get_state()
    torch.manual_seed(0)  # a loader that shuffles draws from this
    try:
        yield
    finally:
        random.setstate(states[0])
        if numpy is not None:
            numpy.random.set_state(states[1])
        for generator, state in generators:
            generator.set_state(state)


def validation_batches(trainer: Any, count: int, model: nn.Module) -> list[Any]:
    """The first validation batches; none where there is no validation."""
    if not trainer.enable_validation:
        return []
    loop = trainer.fit_loop.epoch_loop.val_loop
    if trainer.val_dataloaders is None:  # the first validation is yet to come
        trainer.validating = True
        loop.setup_data()
        trainer.training = True
    loaders = loop._combined_loader
    if loaders is None or not loaders.flattened:
        return []
    return fetch(loaders.flattened[0], int(min(count, loop.max_batches[0])), model)


def to_device(trainer: Any, module: Any, batch: Any) -> Any:
    """A batch as training gets it."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


@contextmanager
def aside(module: Any) -> Iterator[None]:
    """Inside, the module logs nothing; its buffers, metrics, mode and the random state are put back afterwards."""
    metrics = [each for each in module.modules() if isinstance(each, Metric)]
    states = [{name: copy.copy(value) for name, value in each.__dict__.items()} for each in metrics]
    values = [{name: copy.deepcopy(getattr(each, name)) for name in each._defaults} for each in metrics]
    module.__dict__.update(dict.fromkeys(("log", "log_dict"), _nothing))
    try:
        # Compiled modules would be compiled anew for each choice.
        with torch.compiler.set_stance("force_eager"), undisturbed(module), same_buffers(module):
            yield
    finally:
        for name in ("log", "log_dict"):
            module.__dict__.pop(name, None)
        for metric, state, value in zip(metrics, states, values, strict=True):
            metric.__dict__.update(state)
            for name, each in value.items():
                setattr(metric, name, each)


def _nothing(*args: Any, **kwargs: Any) -> None:
    """In the place of ``self.log``."""


def loss_on(trainer: Any, module: Any, batch: Any, number: int = 0) -> Tensor | None:
    """The loss that the module's training step gives for a batch (scalar); None: it gives none.

    To be called inside `aside`.
    """
    numbered = is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2)  # as Lightning does
    with trainer.precision_plugin.forward_context():
        output = module.training_step(to_device(trainer, module, batch), *([number] if numbered else []))
    loss = output.get("loss") if isinstance(output, dict) else output
    return loss if isinstance(loss, Tensor) else None


class Rates:
    """The learning rates (and what else schedulers move) of a whole training, foretold before its first step.

    A short run is then the training in small, warm-up and decay included: at the first rate of a warm-up nothing would
    be learned, and what learns fastest at the highest rate is not what ends best.

    Args:
        trainer: Its schedulers are copied; what watches a metric stays at its first rate.
        module: The module; nothing of it is copied.
        steps: Optimizer steps of the training.
        per_epoch: Those of one epoch; infinite: epochs have no end.
    """

    def __init__(self, trainer: Any, module: Any, steps: float, per_epoch: float) -> None:
        self.settings: list[list[dict[str, Any]]] = []
        configs = [each for each in trainer.lr_scheduler_configs if not each.reduce_on_plateau]
        if not configs or not 0 < steps < math.inf:
            return
        optimizer: Optimizer = trainer.optimizers[0]
        # A stand-in: the schedulers read and write groups only, and a copy of the optimizer would hold its state.
        stand_in = torch.optim.SGD([nn.Parameter(torch.zeros(0))], lr=0.0)
        stand_in.param_groups = [{**_settings(group), "params": []} for group in optimizer.param_groups]
        memo = {id(each): each for each in (trainer, module)} | {id(optimizer): stand_in}
        try:
            schedulers = copy.deepcopy([each.scheduler for each in configs], memo)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the stand-in makes no steps
                for step in range(int(steps)):
                    for config, scheduler in zip(configs, schedulers, strict=True):
                        done = step if config.interval == "step" else step / per_epoch
                        if done and done % config.frequency == 0:
                            scheduler.step()
                    if len(self.settings) <= step * PLACES // steps:
                        self.settings.append([_settings(group) for group in stand_in.param_groups])
        except Exception as error:  # schedulers of the user's own may do anything
            self.settings = []
            rank_zero_warn(
                f"the learning rates of this training can't be foretold ({type(error).__name__}: {error}); short runs "
                "are made at the first one"
            )

    def set(self, optimizer: Optimizer, done: float) -> None:
        """Give an optimizer the rates of the moment when the part ``done`` of the training (0 to 1) is over."""
        if self.settings:
            _set(optimizer, self.settings[min(int(done * len(self.settings)), len(self.settings) - 1)])


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    return {name: copy.deepcopy(value) for name, value in group.items() if name != "params"}


def _set(optimizer: Optimizer, settings: Sequence[dict[str, Any]]) -> None:
    for group, each in zip(optimizer.param_groups, settings, strict=True):
        for name, value in each.items():
            if isinstance(group.get(name), Tensor):
                group[name].copy_(value)  # captured graphs read this very tensor
            else:
                group[name] = value


class ShortRuns:
    """What the loss would be after a few steps from here, by what the model is made to be.

    Steps are as in training: with its accumulation of gradients, its clipping and, in small, its learning rates.
    Weights, optimizer state, buffers, metrics and the random state are put back after each.

    Attributes:
        steps: Optimizer steps made so far.
    """

    def __init__(
        self, trainer: Any, module: Any, training: Iterable[Any], held_out: Sequence[Any], rates: Rates | None = None
    ) -> None:
        """``training``, a loader or batches, is gone through anew for each run; without ``rates`` those are kept."""
        self.trainer, self.module, self.rates = trainer, module, rates
        self.training, self.held_out = training, held_out
        self.steps = 0
        self._span = 0.0, 1.0

    def loss(self, changed: Callable[[], Any], steps: int) -> float:
        """Mean loss on the held-out batches, over all processes; infinite where it is not finite.

        Args:
            changed: Gives a context in which the model is what is to be tried.
            steps: Optimizer steps on the training batches before.
        """
        with self._from_here(), changed(), aside(self.module):
            self._train(steps)
            self.module.eval()
            with torch.no_grad():
                losses = [loss_on(self.trainer, self.module, batch, i) for i, batch in enumerate(self.held_out)]
        found = [loss.detach().float() for loss in losses if loss is not None]
        mean = torch.stack(found).mean() if found else torch.tensor(torch.inf, device=self.module.device)
        mean = self.trainer.strategy.reduce(mean, reduce_op="mean")
        return float(mean) if bool(mean.isfinite()) else float("inf")

    @contextmanager
    def after(self, changed: Callable[[], Any], steps: int) -> Iterator[None]:
        """Inside, runs start from where one of ``steps`` steps has come to; it and they are half of a training each."""
        span = self._span
        with self._from_here(), aside(self.module):
            try:
                self._span = 0.0, 0.5
                with changed():
                    self._train(steps)
                self._span = 0.5, 1.0
                yield
            finally:
                self._span = span

    def _train(self, steps: int) -> None:
        optimizer: Optimizer = self.trainer.optimizers[0]
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        start, end = self._span
        self.module.train()
        with _drawn_alike(self.training):
            for number, batches in enumerate(self._steps(steps)):
                if self.rates is not None:
                    self.rates.set(optimizer, start + (end - start) * number / steps)
                optimizer.step(cast(Any, partial(self._gradients, parameters, batches, number)))
                self.steps += 1

    @contextmanager
    def _from_here(self) -> Iterator[None]:
        """Weights, gradients and the optimizer are put back; hooks of other callbacks are kept out."""
        optimizer: Optimizer = self.trainer.optimizers[0]
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        weights = [p.detach().clone() for p in parameters]
        grads = [p.grad for p in parameters]
        state = {p: copy.deepcopy(each) for p, each in optimizer.state.items()}
        settings = [_settings(group) for group in optimizer.param_groups]
        # Masks, or gradients that are summed up, are for real steps only.
        registries: list[Any] = [optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks]
        hooks = [dict(registry) for registry in registries]
        for registry in registries:
            registry.clear()
        try:
            yield
        finally:
            for registry, each in zip(registries, hooks, strict=True):
                registry.update(each)
            with torch.no_grad():
                for parameter, weight, grad in zip(parameters, weights, grads, strict=True):
                    parameter.copy_(weight)
                    parameter.grad = grad
            optimizer.state.clear()
            optimizer.state.update(state)
            _set(optimizer, settings)

    def _steps(self, count: int) -> Iterator[list[Any]]:
        """The batches of each optimizer step, from the first again where there are too few."""
        made, before = 0, -1
        while before < made < count:
            before = made
            batches = iter(_own_copy(self.training))
            while made < count and (taken := list(islice(batches, self.trainer.accumulate_grad_batches))):
                yield taken
                made += 1

    def _gradients(self, parameters: list[Tensor], batches: Sequence[Any], number: int) -> Tensor | None:
        """Set gradients without those hooks that wait for a whole backward, DDP's for one."""
        sums: list[Tensor | None] = [None] * len(parameters)
        losses = []
        for batch in batches:
            with torch.enable_grad():
                loss = loss_on(self.trainer, self.module, batch, number)
                if loss is None:
                    continue
                found = torch.autograd.grad(loss / len(batches), parameters, allow_unused=True)
            sums = [b if a is None else a if b is None else a + b for a, b in zip(sums, found, strict=True)]
            losses.append(loss.detach())
        if not losses:
            return None
        for parameter, grad in zip(parameters, sums, strict=True):
            parameter.grad = None if grad is None else self.trainer.strategy.reduce(grad, reduce_op="mean")
        if self.trainer.gradient_clip_val is not None:
            self.module.configure_gradient_clipping(
                self.trainer.optimizers[0], self.trainer.gradient_clip_val, self.trainer.gradient_clip_algorithm
            )
        return torch.stack(losses).mean()
