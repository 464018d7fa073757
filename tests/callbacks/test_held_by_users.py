"""What users keep of a module in training: its parameters, handles of hooks, state dicts."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_modules import LIGHTNING_WARNINGS, Task, fit, left_hooks, mlp, seeded
from torch import Tensor

from lightning_prune import NeuronPruning, Prunable, PruningError, WeightPruning

pytestmark = [*LIGHTNING_WARNINGS]


def net(**options: Any) -> Task:
    return Task(mlp(6, 16, 12, 4), batches=4, **options)


class PrunableTask(Prunable, Task):
    """Gives itself the architecture of a state dict."""


class Pair(NamedTuple):
    name: str
    weight: Tensor


HOLD: dict[str, Callable[[Tensor], Any]] = {
    "list": lambda p: [p],
    "tuple": lambda p: (p, 1),
    "named tuple": lambda p: Pair("first", p),
    "dictionary": lambda p: {"first": p},
    "keys": lambda p: {p: "first"},
    "set": lambda p: {p},
    "nested": lambda p: {"deep": [(0, {"er": [p]})]},
}


def tensors_in(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [t for pair in value.items() for part in pair for t in tensors_in(part)]
    return [t for part in value for t in tensors_in(part)] if isinstance(value, (list, tuple, set)) else []


@pytest.mark.parametrize("how", HOLD)
def test_parameters_that_a_module_holds_elsewhere_follow(how: str) -> None:
    module = seeded(net)
    module.held = HOLD[how](module.net[0].weight)
    alias = module.held
    fit(module, NeuronPruning(0.5, report=False), max_epochs=3)
    assert module.net[0].out_features < 16
    (held,) = tensors_in(module.held)
    assert held is module.net[0].weight
    assert module.held is alias or isinstance(alias, tuple)


@pytest.mark.parametrize("how", [*HOLD, "itself"])
@pytest.mark.parametrize("ours_first", [True, False])
def test_parameters_that_a_callback_holds_follow(how: str, ours_first: bool) -> None:
    class Holder(Callback):
        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            weight = pl_module.net[0].weight
            self.held = weight if how == "itself" else HOLD[how](weight)

    holder, pruning = Holder(), NeuronPruning(0.5, report=False)
    module = seeded(net)
    fit(module, *((pruning, holder) if ours_first else (holder, pruning)), max_epochs=3)
    assert module.net[0].out_features < 16
    assert tensors_in(holder.held)[0] is module.net[0].weight


@pytest.mark.parametrize("kind", ["register_hook", "register_post_accumulate_grad_hook"])
def test_a_handle_still_removes_its_hook(kind: str) -> None:
    heard: list[int] = []
    module = seeded(net)
    handle = getattr(module.net[0].weight, kind)(lambda _: heard.append(1))
    fit(module, NeuronPruning(0.5, report=False), max_epochs=3)
    assert len(heard) == 3 * 4
    handle.remove()
    module.net(torch.randn(2, 6)).sum().backward()
    assert len(heard) == 3 * 4


def test_a_checkpoint_of_a_batch_that_is_watched_loads(tmp_path: Path) -> None:
    """Sizes that are read while the first batch is observed are no plain numbers."""

    class Saver(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step == 0:
                trainer.save_checkpoint(tmp_path / "first.ckpt")

    class Saving(Task):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if self.global_step == 0:
                torch.save(self.net(batch[0]).detach(), tmp_path / "outputs.pt")
            loss: Tensor = super().training_step(batch, batch_idx)
            return loss

    fit(seeded(lambda: Saving(mlp(6, 16, 12, 4), batches=4)), NeuronPruning(0.5, report=False), Saver(), max_epochs=2)
    assert torch.load(tmp_path / "first.ckpt", weights_only=True)["global_step"] == 0
    assert torch.load(tmp_path / "outputs.pt", weights_only=True).size(1) == 4


class Partial(Task):
    """Its frozen layer is in no checkpoint, as with adapters."""

    def __init__(self) -> None:
        super().__init__(mlp(6, 16, 12, 4), batches=4)
        self.strict_loading = False
        self.net[0].requires_grad_(False)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["state_dict"]
        for name in [name for name in state if name.startswith("net.0.")]:
            del state[name]


def test_a_checkpoint_without_frozen_layers_resumes(tmp_path: Path) -> None:
    def pruning() -> NeuronPruning:
        return NeuronPruning(0.5, end=1.0, report=False)

    whole = seeded(Partial)
    fit(whole, pruning(), ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1), max_epochs=4)
    for epoch in range(3):
        resumed = seeded(Partial)
        fit(resumed, pruning(), ckpt_path=tmp_path / f"epoch={epoch}.ckpt", max_epochs=4)
        for name, tensor in whole.state_dict().items():
            assert torch.equal(resumed.state_dict()[name], tensor), name


class Rewind(Callback):
    """Goes back to the weights of an earlier epoch."""

    def __init__(self, taken: int, back: int, copier: Callable[[Any], Any] = copy.deepcopy) -> None:
        self.taken, self.back, self.copier = taken, back, copier
        self.sizes: list[int] = []

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.sizes.append(sum(p.numel() for p in pl_module.parameters()))
        if trainer.current_epoch == self.taken:
            self.state = self.copier(pl_module.state_dict())
            self.optimizer = copy.deepcopy(trainer.optimizers[0].state_dict())
        if trainer.current_epoch == self.back:
            pl_module.load_state_dict(self.state)
            held = [p for group in trainer.optimizers[0].param_groups for p in group["params"]]
            assert all(a is b for a, b in zip(held, pl_module.parameters(), strict=True))
            trainer.optimizers[0].load_state_dict(self.optimizer)
            self.sizes[-1] = sum(p.numel() for p in pl_module.parameters())


@pytest.mark.filterwarnings("ignore:a state dict of another architecture was loaded while training")
@pytest.mark.parametrize("ours_first", [True, False])
@pytest.mark.parametrize("cls", [Task, PrunableTask])
@pytest.mark.parametrize(
    "options",
    [{}, {"remove": "end"}, {"criterion": "taylor"}, {"criterion": "activation"}, {"recalibrate": 2}, {"every": 3}],
    ids=str,
)
def test_going_back_to_a_larger_network_in_training(options: dict[str, Any], cls: Any, ours_first: bool) -> None:
    rewind, pruning = Rewind(0, 2), NeuronPruning(0.5, end=1.0, report=False, **options)
    module = seeded(lambda: cls(mlp(6, 16, 12, 4), batches=4))
    trainer = fit(module, *((pruning, rewind) if ours_first else (rewind, pruning)), max_epochs=5)
    assert rewind.sizes[2] == rewind.sizes[0]
    assert 12 < sum(layer.out_features for layer in (module.net[0], module.net[2])) <= 14
    held = [p for group in trainer.optimizers[0].param_groups for p in group["params"]]
    assert all(a is b for a, b in zip(held, module.parameters(), strict=True))
    assert not left_hooks(trainer, module)


@pytest.mark.filterwarnings("ignore:a state dict of another architecture was loaded while training")
def test_training_goes_on_from_where_it_went_back_to() -> None:
    """The epoch after going back equals that which came after the state was taken."""
    states: dict[int, dict[str, Tensor]] = {}

    class Noting(Rewind):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 3:  # before the next removal
                states[trainer.current_epoch] = copy.deepcopy(pl_module.state_dict())

    fit(seeded(net), NeuronPruning(0.5, end=1.0, report=False), Noting(1, 4), max_epochs=6)
    assert states[4]["net.2.weight"].numel() < states[2]["net.2.weight"].numel()
    for name, tensor in states[2].items():
        assert torch.equal(states[5][name], tensor), name


def test_a_state_dict_that_cannot_be_followed_is_refused_as_a_whole() -> None:
    module = seeded(net)
    with pytest.raises(PruningError, match="deepcopy"):
        fit(module, NeuronPruning(0.5, end=1.0, report=False), Rewind(0, 2, dict), max_epochs=5)
    module.net(torch.randn(2, 6))
    module = seeded(net)
    ours = [NeuronPruning(0.5, end=1.0, report=False), WeightPruning(0.3, report=False)]
    with pytest.raises(PruningError, match="masks of WeightPruning"):
        fit(module, *ours, Rewind(0, 2), max_epochs=5)
    module.net(torch.randn(2, 6))
    assert not left_hooks(module.trainer, module)
