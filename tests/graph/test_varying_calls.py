"""A forward that does not make the same calls each time: a patch finds its call, and no other, nonetheless."""

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from networks import assert_same_outputs, build, masked_twin
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_prune import Plan, PruningError, prune_neurons
from lightning_prune.graph.callsites import CallSite, SizePatch, SizeRewriter, installed_patches


class AnotherInput(nn.Module):
    """A second input, when there is one, is viewed like the first, before it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv1d(3, 8, 1), nn.Linear(32, 2)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        extra = 0.0 if y is None else y.view(-1, 32).pow(2).sum(-1).mean()
        return self.b(torch.flatten(F.relu(self.a(x)), 1).view(-1, 32)) + extra


class Turns(nn.Module):
    """A loop of as many turns as asked for; each views two tensors, of which one is pruned."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.free = nn.Conv1d(3, 8, 1), nn.Linear(32, 2), nn.Parameter(torch.ones(64))

    def forward(self, x: Tensor, turns: int = 1) -> Tensor:
        out = torch.zeros((), dtype=x.dtype)
        for _ in range(turns):
            h = F.relu(self.a(x)).reshape(-1, 32)
            out = out + self.b(h) * self.free.reshape(-1, 32).norm(dim=-1).sum()
        return out


class Steps(nn.Module):
    """A recurrent step over an input of any length."""

    def __init__(self) -> None:
        super().__init__()
        self.step, self.out = nn.Linear(3 + 12, 12), nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        state = torch.zeros(len(x), 12, dtype=x.dtype)
        for each in x.unbind(-1):
            state = torch.tanh(self.step(torch.cat([each, state], 1))).view(-1, 3, 4).reshape(-1, 12)
        return self.out(state)


class MicroBatches(nn.Module):
    """Works on two examples at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv1d(3, 8, 1), nn.Linear(32, 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.b(F.relu(self.a(part)).view(part.size(0), 32)) for part in x.split(2)])


class TwiceInTraining(nn.Module):
    """Attention heads written as numbers, and a second pass in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(3, 3 * 16), nn.Linear(16, 2)

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(len(x), -1, 3, 4, 4).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(len(x), -1, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(1, 2)
        if self.training:
            return self.out(self.attend(x) + self.attend(2 * x))
        return self.out(self.attend(x))


class NoiseInTraining(nn.Module):
    """Training mode slices and views its input before anything else."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(12, 12), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        if self.training:
            x = torch.cat([x[:, :6].view(-1, 3, 2).flip(2).view(-1, 6), x[:, 6:]], 1)
        h = F.relu(self.a(x))
        return self.b(h[:, :6] * h[:, 6:])


def lengths(*sizes: tuple[int, int]) -> list[tuple[Tensor, ...]]:
    return [(torch.randn(batch, 3, length, dtype=torch.float64),) for batch, length in sizes]


CASES: dict[str, tuple[Callable[[], nn.Module], list[tuple[Any, ...]]]] = {
    "another_input": (AnotherInput, [(*lengths((4, 4))[0], torch.randn(4, 64, dtype=torch.float64))]),
    "turns": (Turns, [(*lengths((4, 4))[0], turns) for turns in (2, 3, 5)]),
    "steps": (Steps, lengths((4, 4), (4, 1), (3, 6), (2, 9))),
    "micro_batches": (MicroBatches, lengths((2, 4), (4, 4), (7, 4))),
    "twice_in_training": (TwiceInTraining, lengths((4, 4), (2, 6))),
    "noise_in_training": (NoiseInTraining, lengths((4, 4), (3, 4))),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_other_calls_than_the_traced_ones(name: str, training: bool) -> None:
    make, others = CASES[name]
    model = build(make).eval()
    (traced,) = lengths((4, 4))
    dense = copy.deepcopy(model)
    whole = Plan({}, {})
    for _ in range(2):
        plan = prune_neurons(model, traced, 0.4)
        assert plan.kept
        whole = whole.then(plan)
    twin = masked_twin(dense, whole.kept)
    fresh = copy.deepcopy(dense)
    Plan.from_dict(json.loads(json.dumps(whole.to_dict()))).apply(fresh)
    for module in (model, twin, fresh):
        module.train(training)
    for inputs in (traced, *others):
        assert_same_outputs(model, twin, inputs)
        assert_same_outputs(fresh, twin, inputs)
    whole.take_back(model)
    assert installed_patches(model) == []


def test_a_call_that_may_be_any_of_several_is_an_error() -> None:
    patches = [
        SizePatch(CallSite("part", "view", call), 1, size, asked=6, of=((1, 4),), calls=3)
        for call, size in ((0, 3), (1, 2))
    ]
    x = torch.arange(12.0).view(3, 4)
    with SizeRewriter({"view": patches}):
        assert x.view(-1, 6).shape == (4, 3)
        assert x.view(-1, 6).shape == (6, 2)
        assert x.view(-1, 12).shape == (1, 12)
        assert x.view(-1, 6).shape == (4, 3)
        assert x.view(-1, 6).shape == (6, 2)
        with pytest.raises(PruningError, match=r"call 5 of view in part was not there .* any of \[0, 1\]"):
            x.view(-1, 6)
