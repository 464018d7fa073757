"""ImageClassifier: trains any network on labelled images. It knows Lightning, and nothing of pruning."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torchmetrics.classification import MulticlassAccuracy

from lightning_prune._lightning import accept_both_lightnings, follow_trainer
from lightning_prune.errors import PruningError
from lightning_prune.schedulers import LENGTH_OPTIONS, create_lr_scheduler

__all__ = ["OPTIMIZERS", "ImageClassifier"]

OPTIMIZERS: dict[str, type[Optimizer]] = {
    name: cls
    for name, cls in vars(torch.optim).items()
    if isinstance(cls, type) and issubclass(cls, Optimizer) and cls is not Optimizer
}
"""The torch optimizers that can be asked for by name."""


class ImageClassifier(LightningModule):
    """Cross-entropy training of a network that maps images to logits.

    Batches are ``(images, labels)``: whatever the network takes, and class indices of shape ``(batch,)``.
    Logs ``train_loss``, ``train_acc``, ``val_loss``, ``val_acc``, ``test_loss`` and ``test_acc``, all of them
    means over the epoch's images and over all processes (accuracy is the fraction of images that are right,
    0-1); the progress bar also shows the running ``loss``. Where the Trainer is ``pytorch_lightning``'s,
    import that package before making the object (before importing this module for its LightningCLI).

    Args:
        network: The network to train.
        num_classes: Number of classes; None reads ``network.num_classes``, or else the width of the network's
            last ``nn.Linear``.
        optimizer: A torch optimizer by name (``"SGD"``, ``"adamw"``, ...) or class, or a factory
            ``parameters -> Optimizer``.
        lr: Learning rate; a factory sets its own.
        optimizer_options: Further options of the torch class. SGD has momentum 0.9 unless they say otherwise.
        lr_scheduler: Name for ``create_lr_scheduler``; None keeps the learning rate.
        lr_scheduler_options: Further arguments of ``create_lr_scheduler``: ``warmup``, ``interval``,
            ``monitor`` ("val_loss" for ``plateau``) and the schedule's own options. An option that holds
            the length of the training (``LENGTH_OPTIONS``) follows from the Trainer unless it is given.

    Raises:
        PruningError: Unknown optimizer or option (the message lists the allowed ones), or a number of classes
            that can't be found out. The schedule's errors come when ``fit`` starts.

    Example:
        >>> from lightning_prune.models import LeNet
        >>> model = ImageClassifier(LeNet(), optimizer="adam", lr=1e-3, lr_scheduler="cosine")
        >>> model(torch.zeros(8, 3, 32, 32)).shape
        torch.Size([8, 10])
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        num_classes: int | None = None,
        optimizer: str | Callable[[Iterable[nn.Parameter]], Optimizer] = "SGD",
        lr: float = 0.01,
        optimizer_options: dict[str, Any] | None = None,
        lr_scheduler: str | None = None,
        lr_scheduler_options: dict[str, Any] | None = None,
    ) -> None:
        accept_both_lightnings(ImageClassifier, "LightningModule")
        super().__init__()
        # Objects would need pickled classes in the checkpoint; whoever loads it has them anyway.
        objects = ["network"] if isinstance(optimizer, str) else ["network", "optimizer"]
        self.save_hyperparameters(ignore=objects)
        if not isinstance(network, nn.Module):
            raise PruningError(f"ImageClassifier: network must be an nn.Module, got {network!r}.")
        self.network = network
        self.num_classes = _count_classes(network) if num_classes is None else num_classes
        if type(self.num_classes) is not int or self.num_classes < 2:
            raise PruningError(f"ImageClassifier: num_classes must be 2 or more, got {self.num_classes!r}.")
        self.optimizer = _find_optimizer(optimizer)
        self.optimizer_options = dict(optimizer_options or {})
        _check_optimizer_options(self.optimizer, self.optimizer_options)
        self.lr = lr
        self.lr_scheduler = lr_scheduler
        self.lr_scheduler_options = dict(lr_scheduler_options or {})
        # Micro: torchmetrics' default is a mean over classes, which is not the fraction that is right.
        self.train_acc = MulticlassAccuracy(self.num_classes, average="micro")
        self.val_acc = MulticlassAccuracy(self.num_classes, average="micro")
        self.test_acc = MulticlassAccuracy(self.num_classes, average="micro")

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Unpickling, e.g. in a process that ddp_spawn started, makes the object without __init__.
        accept_both_lightnings(ImageClassifier, "LightningModule")
        super().__setstate__(state)  # type: ignore[no-untyped-call]

    @property
    def trainer(self) -> Any:
        """The Trainer that the module is attached to, of either Lightning."""
        return super().trainer

    @trainer.setter
    def trainer(self, trainer: Any) -> None:
        follow_trainer(ImageClassifier, trainer)
        # super() can't set a property; this is the setter of the Trainer's own LightningModule.
        super(ImageClassifier, type(self)).trainer.fset(self, trainer)  # type: ignore[attr-defined]

    def forward(self, images: Tensor) -> Tensor:  # shape: (batch, num_classes)
        """Return the network's logits."""
        logits: Tensor = self.network(images)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss of one batch."""
        loss = self._evaluate(batch, "train")
        self.log("loss", loss, prog_bar=True, logger=False, batch_size=len(batch[1]))
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Add one batch to ``val_loss`` and ``val_acc``."""
        self._evaluate(batch, "val")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Add one batch to ``test_loss`` and ``test_acc``."""
        self._evaluate(batch, "test")

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:  # shape: (batch, num_classes)
        """Return the logits of ``images`` or of ``(images, ...)``."""
        logits: Tensor = self(batch[0] if isinstance(batch, (tuple, list)) else batch)
        return logits

    def configure_optimizers(self) -> Any:
        """Build the optimizer, and the schedule where there is one."""
        optimizer = self._make_optimizer()
        if self.lr_scheduler is None:
            return optimizer
        options = self._complete(self.lr_scheduler, self.lr_scheduler_options)
        return {
            "optimizer": optimizer,
            "lr_scheduler": create_lr_scheduler(optimizer, self.lr_scheduler, **options),
        }

    def _evaluate(self, batch: tuple[Tensor, Tensor], stage: str) -> Tensor:
        images, labels = batch
        logits = self(images)
        loss = F.cross_entropy(logits, labels)
        accuracy: MulticlassAccuracy = getattr(self, f"{stage}_acc")
        accuracy.update(logits, labels)
        log = partial(self.log, on_step=False, on_epoch=True, batch_size=len(labels))
        log(f"{stage}_loss", loss, prog_bar=stage != "train", sync_dist=True)
        log(f"{stage}_acc", accuracy, prog_bar=True)
        return loss

    def _make_optimizer(self) -> Optimizer:
        if not isinstance(self.optimizer, type):
            return self.optimizer(self.parameters())
        defaults = {"momentum": 0.9} if self.optimizer is torch.optim.SGD else {}
        options = defaults | self.optimizer_options
        built: Optimizer = self.optimizer(self.parameters(), lr=self.lr, **options)
        return built

    def _complete(self, name: str, options: dict[str, Any]) -> dict[str, Any]:
        """Add the options that follow from our metrics and from the Trainer."""
        if name == "plateau":
            options = {"monitor": "val_loss"} | options
            mode = "max" if options["monitor"] in ("train_acc", "val_acc") else "min"
            return {"mode": mode} | options
        length = LENGTH_OPTIONS.get(name)
        if length is None or length in options or {"epochs", "steps_per_epoch"} & options.keys():
            return options
        per_step = options.get("interval") == "step"
        total = self.trainer.estimated_stepping_batches if per_step else self.trainer.max_epochs
        if not 0 <= total < float("inf"):
            raise PruningError(
                f"lr scheduler {name!r} needs {length}: the Trainer does not know how long it will train "
                f"(max_epochs={self.trainer.max_epochs}, max_steps={self.trainer.max_steps}). "
                f"Give lr_scheduler_options={{{length!r}: ...}} or Trainer(max_epochs=...)."
            )
        warmup = options.get("warmup", 0)
        left = int(total) - warmup if isinstance(warmup, int) else int(total)
        # At least 1, because fast_dev_run must run though it ends within the warm-up.
        return options | {length: max(left, 1)}


# LightningCLI looks at the class before there is an object.
accept_both_lightnings(ImageClassifier, "LightningModule")


def _count_classes(network: nn.Module) -> int:
    if hasattr(network, "num_classes"):
        return network.num_classes  # type: ignore[return-value]
    linears = [module for module in network.modules() if isinstance(module, nn.Linear)]
    if not linears:
        raise PruningError(
            f"ImageClassifier: {type(network).__name__} has neither num_classes nor an nn.Linear to tell the "
            "number of classes. Pass num_classes."
        )
    return linears[-1].out_features


def _find_optimizer(
    optimizer: str | Callable[[Iterable[nn.Parameter]], Optimizer],
) -> type[Optimizer] | Callable[[Iterable[nn.Parameter]], Optimizer]:
    if isinstance(optimizer, str):
        by_name = {name.lower(): cls for name, cls in OPTIMIZERS.items()}
        if optimizer.lower() not in by_name:
            raise PruningError(f"Unknown optimizer {optimizer!r}. Allowed: {', '.join(sorted(OPTIMIZERS))}.")
        return by_name[optimizer.lower()]
    if not callable(optimizer):
        raise PruningError(
            f"ImageClassifier: optimizer must be a name or a factory (parameters -> Optimizer), got {optimizer!r}."
        )
    return optimizer


def _check_optimizer_options(optimizer: Callable[..., Optimizer], options: dict[str, Any]) -> None:
    if not isinstance(optimizer, type):
        if options:
            raise PruningError("ImageClassifier: an optimizer factory sets its own options; drop optimizer_options.")
        return
    parameters = inspect.signature(optimizer).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    allowed = [name for name in parameters if name not in ("params", "lr")]
    for option in options:
        if option not in allowed:
            raise PruningError(
                f"Unknown option {option!r} of optimizer {optimizer.__name__}. Allowed: {', '.join(allowed)}."
            )
