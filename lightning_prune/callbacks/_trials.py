"""Running a module's own training step on a batch aside from training, without leaving a trace."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics import Metric

from lightning_prune.graph.run import cuda_devices, same_buffers, undisturbed

__all__ = ["ShortRuns", "aside", "fetch", "loss_on", "to_device", "validation_batches"]


def fetch(loader: Any, count: int, model: nn.Module) -> list[Any]:
    """The first batches of a loader, the same each time, as the loader gives them."""
    devices = [device.index or 0 for device in cuda_devices(model)]
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(0)  # a loader that shuffles draws from this
        return list(islice(iter(loader), count))


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
        with undisturbed(module), same_buffers(module):
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
    given = {"batch": to_device(trainer, module, batch), "batch_idx": number, "dataloader_idx": 0}
    names = inspect.signature(module.training_step).parameters
    others = list(names)[1:]
    with trainer.precision_plugin.forward_context():
        output = module.training_step(given["batch"], **{n: given[n] for n in others if n in given})
    loss = output.get("loss") if isinstance(output, dict) else output
    return loss if isinstance(loss, Tensor) else None


class ShortRuns:
    """What the loss would be after a few steps from here, by what the model is made to be.

    Weights, optimizer state, buffers, metrics and the random state are put back after each.
    """

    def __init__(self, trainer: Any, module: Any, training: Sequence[Any], held_out: Sequence[Any]) -> None:
        self.trainer, self.module = trainer, module
        self.training, self.held_out = list(training), list(held_out)

    def loss(self, changed: Callable[[], Any], steps: int) -> float:
        """Mean loss on the held-out batches, over all processes; infinite where it is not finite.

        Args:
            changed: Gives a context in which the model is what is to be tried.
            steps: Optimizer steps on the training batches before.
        """
        optimizer: Optimizer = self.trainer.optimizers[0]
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        weights = [p.detach().clone() for p in parameters]
        grads = [p.grad for p in parameters]
        state = {p: copy.deepcopy(each) for p, each in optimizer.state.items()}
        # Hooks of other callbacks (masks, gradients that are summed up) are for real steps only.
        registries: list[Any] = [optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks]
        hooks = [dict(registry) for registry in registries]
        for registry in registries:
            registry.clear()
        try:
            with changed(), aside(self.module):
                self.module.train()
                for number in range(steps if self.training else 0):
                    batch = self.training[number % len(self.training)]
                    optimizer.step(cast(Any, partial(self._gradients, parameters, batch, number)))
                self.module.eval()
                with torch.no_grad():
                    losses = [loss_on(self.trainer, self.module, batch, i) for i, batch in enumerate(self.held_out)]
        finally:
            for registry, each in zip(registries, hooks, strict=True):
                registry.update(each)
            with torch.no_grad():
                for parameter, weight, grad in zip(parameters, weights, grads, strict=True):
                    parameter.copy_(weight)
                    parameter.grad = grad
            optimizer.state.clear()
            optimizer.state.update(state)
        found = [loss.detach().float() for loss in losses if loss is not None]
        mean = torch.stack(found).mean() if found else torch.tensor(torch.inf, device=self.module.device)
        mean = self.trainer.strategy.reduce(mean, reduce_op="mean")
        return float(mean) if bool(mean.isfinite()) else float("inf")

    def _gradients(self, parameters: list[Tensor], batch: Any, number: int) -> Tensor | None:
        """Set gradients without those hooks that wait for a whole backward, DDP's for one."""
        with torch.enable_grad():
            loss = loss_on(self.trainer, self.module, batch, number)
            if loss is None:
                return None
            found = torch.autograd.grad(loss, parameters, allow_unused=True)
        for parameter, grad in zip(parameters, found, strict=True):
            parameter.grad = None if grad is None else self.trainer.strategy.reduce(grad, reduce_op="mean")
        return loss.detach()
