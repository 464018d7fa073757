"""Training steps that work on gradients and parameters by hand: that is no part of the model's function."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning_modules import LIGHTNING_WARNINGS, Task, fit, mlp, seeded
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_prune import NeuronPruning

pytestmark = [*LIGHTNING_WARNINGS]


class ByHand(Task):
    """Manual optimization; ``step`` does what lies between the backward and the next batch."""

    def __init__(self, step: Callable[["ByHand", Any, Callable[[], Tensor]], None], slow: bool = False) -> None:
        super().__init__(mlp())
        self.automatic_optimization = False
        self.step = step
        if slow:
            self.slow = mlp().requires_grad_(False)

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        def loss() -> Tensor:
            optimizer.zero_grad()
            value = F.cross_entropy(self.net(batch[0]), batch[1])
            self.manual_backward(value)
            return value

        optimizer: Any = self.optimizers()
        loss()
        self.step(self, optimizer, loss)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.net.parameters(), 0.05, momentum=0.9)


def sharpness_aware(module: ByHand, optimizer: Any, loss: Callable[[], Tensor]) -> None:
    """SAM, arXiv:2010.01412."""
    with torch.no_grad():
        norm = torch.stack([p.grad.norm() for p in module.net.parameters() if p.grad is not None]).norm()
        moves = [0.05 * p.grad / (norm + 1e-12) for p in module.net.parameters() if p.grad is not None]
        for parameter, move in zip(module.net.parameters(), moves, strict=True):
            parameter.add_(move)
    loss()
    with torch.no_grad():
        for parameter, move in zip(module.net.parameters(), moves, strict=True):
            parameter.sub_(move)
    optimizer.step()


def clipped(module: ByHand, optimizer: Any, loss: Any) -> None:
    module.clip_gradients(optimizer, 0.1, "norm")
    optimizer.step()


def clipped_by_torch(module: ByHand, optimizer: Any, loss: Any) -> None:
    nn.utils.clip_grad_norm_(module.net.parameters(), 0.1)
    nn.utils.clip_grad_value_(module.net.parameters(), 0.01)
    optimizer.step()


def without_an_optimizer(module: ByHand, optimizer: Any, loss: Any) -> None:
    with torch.no_grad():
        for parameter in module.net.parameters():
            parameter -= 0.05 * parameter.grad
    optimizer.step(lambda: None)


def lists(module: ByHand, optimizer: Any, loss: Any) -> None:
    with torch.no_grad():
        gradients = [p.grad for p in module.net.parameters()]
        torch._foreach_add_(list(module.net.parameters()), gradients, alpha=-0.05)
    optimizer.step()


def centralised(module: ByHand, optimizer: Any, loss: Any) -> None:
    """Gradient centralisation, arXiv:2004.01461."""
    with torch.no_grad():
        for parameter in module.net.parameters():
            if parameter.dim() > 1 and parameter.grad is not None:
                parameter.grad.sub_(parameter.grad.mean(1, keepdim=True))
    optimizer.step()


@pytest.mark.parametrize("step", [sharpness_aware, clipped, clipped_by_torch, without_an_optimizer, lists, centralised])
def test_what_is_done_with_gradients_neither_freezes_nor_mixes(step: Any) -> None:
    pruning = NeuronPruning(0.5, exact_only=True, report=False)
    module = seeded(lambda: ByHand(step))
    plain = seeded(lambda: ByHand(lambda module, optimizer, loss: optimizer.step()))
    other = NeuronPruning(0.5, exact_only=True, report=False)
    fit(module, pruning, max_epochs=3)
    fit(plain, other, max_epochs=3)
    assert pruning.groups_ is not None
    assert other.groups_ is not None
    alike = [(group.name, group.exact) for group in other.groups_.prunable]
    assert [(group.name, group.exact) for group in pruning.groups_.prunable] == alike
    assert sum(p.numel() for p in module.net.parameters()) < sum(p.numel() for p in mlp().parameters())


def average_in_lists(module: ByHand, optimizer: Any, loss: Any) -> None:
    torch._foreach_lerp_(list(module.slow.parameters()), [p.detach() for p in module.net.parameters()], 0.1)
    optimizer.step()


def averaged_gradients(module: ByHand, optimizer: Any, loss: Any) -> None:
    with torch.no_grad():
        for slow, fast in zip(module.slow.parameters(), module.net.parameters(), strict=True):
            slow.add_(fast.grad, alpha=0.1)
    optimizer.step()


@pytest.mark.parametrize("step", [average_in_lists, averaged_gradients])
def test_networks_that_are_added_up_in_the_step_lose_the_same_neurons(step: Any) -> None:
    """The other network is no copy: only what is done with its weights tells."""
    pruning = NeuronPruning(0.5, report=False)
    module = seeded(lambda: ByHand(step, slow=True))
    fit(module, pruning, max_epochs=3)
    kept = pruning.plan_.kept
    assert kept["net.0.weight"] == kept["slow.0.weight"]
    assert [p.shape for p in module.net.parameters()] == [p.shape for p in module.slow.parameters()]


class FastWeights(Task):
    """One inner step on fast weights made by hand, first-order, then the loss with these."""

    def __init__(self) -> None:
        super().__init__(mlp())
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(F.cross_entropy(self.net(batch[0]), batch[1]))
        fast = {name: p - 0.1 * p.grad for name, p in self.net.named_parameters()}
        self.manual_backward(F.cross_entropy(torch.func.functional_call(self.net, fast, (batch[0],)), batch[1]))
        optimizer.step()


def test_weights_made_of_gradients_are_weights() -> None:
    pruning = NeuronPruning(0.5, report=False)
    module = seeded(FastWeights)
    fit(module, pruning, max_epochs=3)
    assert pruning.plan_.kept
    assert module.net(torch.randn(2, 6)).shape == mlp()(torch.randn(2, 6)).shape
