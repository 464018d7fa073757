"""Copies of trained networks: known by what they are, tied to what they copy."""

import copy
from collections.abc import Callable

import pytest
import torch
from networks import build, inputs
from torch import nn

from lightning_prune import prune_neurons
from lightning_prune.graph.copies import copies_of_trained


def encoder() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(72, 6))


class Student(nn.Module):
    """A network, and another one built alike that the forward may or may not run."""

    def __init__(self, second: Callable[[nn.Module], nn.Module], runs: bool = False) -> None:
        super().__init__()
        self.student, self.runs = encoder(), runs
        self.head = nn.Linear(6, 2)
        self.teacher = second(self.student)
        self.teacher.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.head(self.student(x))
        return torch.cat([y, self.teacher(x)], 1) if self.runs else y


def lagging(network: nn.Module) -> nn.Module:
    """A copy that lags behind."""
    twin = copy.deepcopy(network)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter += 0.8 * parameter.std() * torch.randn_like(parameter) if parameter.dim() > 1 else 0.1
    return twin


def found(model: nn.Module) -> dict[str, str]:
    return copies_of_trained(model, {id(p) for p in model.parameters() if p.requires_grad})


@pytest.mark.parametrize("second", [copy.deepcopy, lagging])
def test_a_copy_is_found(second: Callable[[nn.Module], nn.Module]) -> None:
    torch.manual_seed(0)
    assert found(Student(second)) == {"teacher": "student"}


def test_another_network_of_the_same_kind_is_no_copy() -> None:
    torch.manual_seed(0)
    assert found(Student(lambda network: encoder())) == {}
    blocks = nn.Sequential(*(nn.TransformerEncoderLayer(8, 2, 16) for _ in range(4)))
    blocks[:2].requires_grad_(False)
    for block in blocks:  # as any two trained networks, they share what is not random
        nn.init.xavier_uniform_(block.linear1.weight)
    assert found(blocks) == {}


def test_a_network_that_is_trained_is_no_copy_and_of_two_the_nearest_counts() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": encoder(), "b": encoder()})
    model["slow"] = lagging(model["b"])
    model["slow"].requires_grad_(False)
    assert found(model) == {"slow": "b"}
    model["slow"].requires_grad_(True)
    assert found(model) == {}


@pytest.mark.parametrize("runs", [False, True])
def test_a_copy_loses_the_same_neurons_also_where_the_forward_does_not_run_it(runs: bool) -> None:
    torch.manual_seed(0)
    model = build(lambda: Student(lambda network: encoder(), runs))
    model.teacher.load_state_dict(model.student.state_dict())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    plan = prune_neurons(model, inputs((3, 5, 5)), 0.5, optimizer=optimizer)
    kept = {name: dims for name, dims in plan.kept.items() if name.startswith("student.")}
    assert kept["student.0.weight"]
    assert {name.replace("student", "teacher"): dims for name, dims in kept.items()} == {
        name: dims for name, dims in plan.kept.items() if name.startswith("teacher.")
    }
    for a, b in zip(model.student.state_dict().values(), model.teacher.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_the_copy_follows_and_makes_nothing_so_patterns_name_the_network_itself() -> None:
    model = build(lambda: Student(lambda network: encoder(), True))
    model.teacher.load_state_dict(model.student.state_dict())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    plan = prune_neurons(model, inputs((3, 5, 5)), 0.5, include="student.0", optimizer=optimizer)
    assert len(plan.kept["teacher.0.weight"][0]) == len(plan.kept["student.0.weight"][0]) == 4


def test_an_excluded_copy_stays_whole() -> None:
    model = build(lambda: Student(lambda network: encoder(), True))
    model.teacher.load_state_dict(model.student.state_dict())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    plan = prune_neurons(model, inputs((3, 5, 5)), 0.5, exclude="teacher", optimizer=optimizer)
    assert plan.kept["student.0.weight"]
    assert not any(name.startswith("teacher") for name in plan.kept)
