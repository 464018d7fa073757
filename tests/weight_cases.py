"""What the tests of WeightPruning share: criteria, torch's optimizers, and a watch over zeros."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from lightning_modules import ADAMW, SGD, Spy
from torch import Tensor, optim

from lightning_prune import WeightPruning

GRADIENTS = ["taylor", "snip", "movement", "fisher"]
CRITERIA: list[Any] = ["l1", "random", *GRADIENTS, "wanda", "synflow", torch.abs]

OPTIMIZERS: dict[str, Any] = {
    "SGD": partial(optim.SGD, lr=0.05),
    "momentum": SGD,
    "nesterov": partial(optim.SGD, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.1),
    "SGD nesterov foreach": partial(optim.SGD, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.1, foreach=True),
    "SGD foreach": partial(optim.SGD, lr=0.05, momentum=0.9, foreach=True),
    "SGD dampening": partial(optim.SGD, lr=0.05, momentum=0.9, dampening=0.1, weight_decay=0.1, foreach=False),
    "SGD fused": partial(optim.SGD, lr=0.05, momentum=0.9, fused=True),
    "SGD fused decay": partial(optim.SGD, lr=0.05, momentum=0.9, weight_decay=0.1, fused=True),
    "maximize": partial(optim.SGD, lr=0.05, momentum=0.9, maximize=True),
    "Adam": partial(optim.Adam, lr=0.01, weight_decay=0.1),
    "Adam amsgrad": partial(optim.Adam, lr=0.01, amsgrad=True, foreach=True),
    "Adam fused": partial(optim.Adam, lr=0.01, fused=True),
    "Adam amsgrad fused": partial(optim.Adam, lr=0.01, amsgrad=True, weight_decay=0.1, fused=True),
    "AdamW": ADAMW,
    "AdamW foreach": partial(optim.AdamW, lr=0.01, foreach=True),
    "AdamW fused": partial(optim.AdamW, lr=0.01, weight_decay=0.1, fused=True),
    "AdamW maximize": partial(optim.AdamW, lr=0.01, weight_decay=0.1, maximize=True, foreach=True),
    "Adagrad": partial(optim.Adagrad, lr=0.01, initial_accumulator_value=0.1),
    "Adagrad fused": partial(optim.Adagrad, lr=0.01, weight_decay=0.1, fused=True),
    "Adagrad foreach": partial(optim.Adagrad, lr=0.01, lr_decay=0.1, weight_decay=0.1, foreach=True),
    "Adadelta": partial(optim.Adadelta, weight_decay=0.1),
    "Adadelta foreach": partial(optim.Adadelta, weight_decay=0.1, foreach=True),
    "RMSprop": partial(optim.RMSprop, lr=0.01, momentum=0.9, centered=True, weight_decay=0.1),
    "RMSprop foreach": partial(optim.RMSprop, lr=0.01, momentum=0.9, weight_decay=0.1, foreach=True),
    "NAdam": partial(optim.NAdam, weight_decay=0.1),
    "NAdam decoupled foreach": partial(optim.NAdam, weight_decay=0.1, decoupled_weight_decay=True, foreach=True),
    "RAdam": partial(optim.RAdam, weight_decay=0.1),
    "RAdam decoupled foreach": partial(optim.RAdam, weight_decay=0.1, decoupled_weight_decay=True, foreach=True),
    "Adamax": partial(optim.Adamax, weight_decay=0.1),
    "Adamax foreach": partial(optim.Adamax, weight_decay=0.1, foreach=True),
    "Rprop": optim.Rprop,
    "Rprop foreach": partial(optim.Rprop, foreach=True),
    "ASGD": partial(optim.ASGD, weight_decay=0.1),
    "ASGD foreach": partial(optim.ASGD, weight_decay=0.1, foreach=True),
    "ASGD averaging": partial(optim.ASGD, t0=2.0, weight_decay=0.1),
    "LBFGS": partial(optim.LBFGS, lr=0.1, max_iter=2, history_size=3),
    "LBFGS line search": partial(optim.LBFGS, lr=0.1, max_iter=3, history_size=4, line_search_fn="strong_wolfe"),
    "Adafactor": partial(optim.Adafactor, lr=0.01, weight_decay=0.1),
    "Adafactor foreach": partial(optim.Adafactor, lr=0.01, weight_decay=0.1, foreach=True),
    "Adafactor maximize": partial(optim.Adafactor, lr=0.01, maximize=True),
}
if hasattr(optim, "Muon"):
    OPTIMIZERS["Muon"] = lambda params: optim.Muon([p for p in params if p.dim() == 2], lr=0.01, weight_decay=0.1)


class Held:
    """After every optimizer step and batch: masked weights, and state of theirs, that are not exactly zero."""

    def __init__(self, *pruning: WeightPruning) -> None:
        self.pruning, self.alive, self.checks, self.handles = pruning, list[int](), 0, list[Any]()

    def spy(self) -> Spy:
        return Spy(on_train_start=self.listen, on_train_batch_end=self.check)

    def listen(self, trainer: Any, module: Any) -> None:
        for optimizer in trainer.optimizers:  # registered after the callback's own: runs after it
            self.handles.append(optimizer.register_step_post_hook(lambda *_: self.check(trainer, module)))

    def check(self, trainer: Any, module: Any) -> None:
        parameters = dict(module.named_parameters())
        for name, mask in (item for pruning in self.pruning for item in pruning.masks_.items()):
            states = [o.state[parameters[name]] for o in trainer.optimizers if parameters[name] in o.state]
            for value in [parameters[name], *(v for state in states for v in state.values())]:
                if isinstance(value, Tensor) and value.shape == mask.shape and bool(value[~mask].any()):
                    self.alive.append(trainer.global_step)
            self.checks += 1
