"""Training in which not every batch runs all of the model."""

import itertools
import re
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_modules import LIGHTNING_WARNINGS, Spy, Task, fit, left_hooks, mlp, seeded
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_prune import LayerPruning, NeuronPruning, NoEffectWarning

pytestmark = [*LIGHTNING_WARNINGS]


class Routes(Task):
    """Batches take turns with the heads."""

    def __init__(self, heads: int = 3, late: int = 0, net: Any = ()) -> None:
        trunk = nn.Sequential(*net, nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU())
        super().__init__(trunk, batches=8)
        self.heads = nn.ModuleList(
            nn.Sequential(nn.Linear(12, 8 + 2 * n), nn.ReLU(), nn.Linear(8 + 2 * n, 4)) for n in range(heads)
        )
        self.late = late

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        epoch_is_late = self.current_epoch >= self.late
        return F.cross_entropy(
            self.heads[batch_idx % len(self.heads) if epoch_is_late else 0](self.net(batch[0])), batch[1]
        )

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        for head in self.heads:
            self.log("val_loss", F.cross_entropy(head(self.net(batch[0])), batch[1]))


@pytest.mark.parametrize(
    "options", [{}, {"criterion": "taylor"}, {"of": "macs"}, {"recalibrate": 2}, {"remove": "end"}]
)
def test_heads_that_run_later_follow(options: Any) -> None:
    module = seeded(Routes)
    pruning = NeuronPruning(0.5, report=False, **options)
    fit(module, pruning, max_epochs=4)
    assert pruning.groups_ is not None
    width = module.net[2].out_features
    assert width < 12
    for number, head in enumerate(module.heads):
        assert head[0].in_features == width
        assert head[2].in_features == head[0].out_features
        assert f"heads.{number}.0.weight" in pruning.plan_.kept
        assert module.heads[number](module.net(torch.randn(2, 6))).shape == (2, 4)
    assert not left_hooks(module.trainer, module)


def test_the_whole_is_that_of_all_parts() -> None:
    """Half of all neurons, those of the heads that came later too."""
    module = seeded(Routes)
    fit(module, NeuronPruning(0.5, report=False), max_epochs=4)
    left = sum(layer.out_features for layer in (module.net[0], module.net[2], *(head[0] for head in module.heads)))
    assert left == (16 + 12 + 8 + 10 + 12) // 2


def test_parts_are_watched_again_when_another_callback_has_changed_the_model() -> None:
    """Neurons go at every step; those that read them run every third one."""
    module = seeded(lambda: Routes(net=[Repeats(6), Repeats(6)]))
    callbacks = LayerPruning(0.08, include="net.*", start=0.2, end=0.3, report=False)
    fit(module, NeuronPruning(0.5, every=1, start=0.15, report=False), callbacks, max_epochs=6)
    assert len([m for m in module.net if isinstance(m, Repeats) and next(m.parameters(), None) is not None]) < 2
    width = module.net[-2].out_features
    assert width < 12
    assert all(head[0].in_features == width for head in module.heads)


def test_a_resumed_run_waits_for_parts_that_are_known_to_come(tmp_path: Any) -> None:
    """Otherwise neurons would go at the first step after the resume, before the other heads have run."""

    def run(**options: Any) -> Any:
        module = seeded(Routes)
        save = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
        fit(module, NeuronPruning(0.5, every=1, start=1, end=4, report=False), save, max_epochs=6, **options)
        return module

    run()
    resumed = run(ckpt_path=tmp_path / "epoch=1.ckpt")
    assert all(head[0].in_features == resumed.net[2].out_features < 12 for head in resumed.heads)


def test_a_part_that_comes_after_the_first_removal_is_named() -> None:
    module = seeded(lambda: Routes(late=2))
    pruning = NeuronPruning(0.5, report=False)
    with pytest.warns(UserWarning, match="'heads.1.0' runs for the first time"), pytest.raises(RuntimeError):
        fit(module, pruning, max_epochs=4, limit_val_batches=0)


class Repeats(nn.Module):
    """A residual block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.layer(x))


class Dropped(Task):
    """Layers are left out at random, as by LayerDrop, arXiv:1909.11556."""

    def __init__(self) -> None:
        super().__init__(mlp(6, 12, 12), batches=8)
        self.blocks = nn.ModuleList(mlp(12, 10, 12) for _ in range(4))
        self.out = nn.Linear(12, 4)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = self.net(batch[0])
        for number, block in enumerate(self.blocks):
            if not self.training or (batch_idx + number) % 3:
                x = x + block(x)
        return F.cross_entropy(self.out(x), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx))


def test_layers_that_are_dropped_in_the_first_batch_follow() -> None:
    module = seeded(Dropped)
    pruning = NeuronPruning(0.5, report=False)
    fit(module, pruning, max_epochs=4)
    width = module.out.in_features
    assert width < 12
    assert all(block[0].in_features == block[-1].out_features == width for block in module.blocks)


class Boxes(Task):
    """As many rows as there are boxes, more of them in evaluation mode, viewed with their number written."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 16))
        self.out = nn.Linear(16, 4)

    def logits(self, x: Tensor) -> Tensor:
        boxes = x.repeat(1 if self.training else 3, 1)
        return self.out(F.relu(self.net(boxes)).view(len(boxes), -1, 4).reshape(len(boxes), -1))[: len(x)]


def test_a_number_of_rows_that_no_removal_changes_is_left_to_the_forward() -> None:
    module = seeded(Boxes)
    pruning = NeuronPruning(0.5, report=False)
    fit(module, pruning, max_epochs=4)
    assert pruning.plan_.kept


class Insisting(nn.Module):
    """Wants its size, wherever it comes from."""

    def forward(self, x: Tensor) -> Tensor:
        if x.size(1) != 16:
            raise ValueError(f"expected 16 features, got {x.size(1)}")
        return x


def test_a_run_in_which_no_removal_works_goes_on_and_says_why() -> None:
    module = seeded(lambda: Task(nn.Sequential(nn.Linear(6, 16), Insisting(), nn.Linear(16, 4))))
    with pytest.warns(NoEffectWarning, match=re.escape("expected 16 features")):
        fit(module, NeuronPruning(0.5, report=False), max_epochs=5)
    assert module.net[0].out_features == 16


class TakingTurns(Task):
    """Two networks with an optimizer each, one batch (or epoch) for the one, the next for the other."""

    def __init__(self, by_epoch: bool = False) -> None:
        self.by_epoch = by_epoch
        super().__init__(mlp(6, 12, 4), batches=8)
        self.other = mlp(6, 12, 4)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        turn = self.current_epoch if self.by_epoch else batch_idx
        net, optimizer = list(zip((self.net, self.other), self.optimizers(), strict=True))[turn % 2]
        optimizer.zero_grad()
        self.manual_backward(F.cross_entropy(net(batch[0]), batch[1]))
        optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(net.parameters(), 1e-2) for net in (self.net, self.other)]


@pytest.mark.parametrize("criterion", ["taylor", "activation"])
@pytest.mark.parametrize("every", [1, 3, "epoch"])
def test_what_has_not_been_judged_yet_does_not_go(criterion: str, every: Any) -> None:
    """A network without a gradient so far would have scores of zero, and lose all neurons."""
    module = seeded(TakingTurns)
    spy = Spy(on_train_batch_end=lambda *_: widths.append((module.net[0].out_features, module.other[0].out_features)))
    widths: list[tuple[int, int]] = []
    fit(module, NeuronPruning(0.5, criterion=criterion, every=every, start=0.0, report=False), spy, max_epochs=4)
    assert sum(widths[-1]) == 12
    assert min(widths[-1]) > 1
    gone = [(a != c, b != d) for (a, b), (c, d) in itertools.pairwise(widths)]
    assert any(one for one, _ in gone)
    assert any(other for _, other in gone)


def test_a_budget_that_needs_what_is_not_judged_yet_waits_for_it() -> None:
    """More than all of one network must go, and only one of them has run in an epoch."""
    module = seeded(lambda: TakingTurns(by_epoch=True))
    whole = sum(p.numel() for p in module.parameters())
    sizes: list[int] = []
    spy = Spy(on_train_epoch_end=lambda *_: sizes.append(sum(p.numel() for p in module.parameters())))
    pruning = NeuronPruning(0.7, of="params", criterion="taylor", schedule="one_shot", end=0.2, report=False)
    fit(module, pruning, spy, max_epochs=6)
    assert sizes[0] == whole, "the other network has had no gradient"
    assert sizes[-1] <= 0.3 * whole
    assert sizes[2] == sizes[-1], "as soon as both have had one"
