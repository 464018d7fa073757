from typing import Any

import pytest
import torch
from networks import build_case, cases, forward, masked_twin

from lightning_prune import SurgeryError, find_groups
from lightning_prune.graph.verify import TOLERANCE, compare_outputs, masked_outputs, masked_tensors
from lightning_prune.pruning.surgery import named_tensors

ONE = torch.tensor([1.0, -2.0], dtype=torch.float64)
NAN, INF = float("nan"), float("inf")


@cases(["article", "resnet", "tied_square", "batch_norm_plain", "buffers", "dense"])
def test_masked_outputs_are_those_of_the_twin_made_by_hand(name: str) -> None:
    model, x = build_case(name)
    groups = find_groups(model, x)
    alive = torch.arange(groups.neurons) % 3 > 0
    kept = groups.kept(alive)
    before = {key: tensor.clone() for key, tensor in named_tensors(model).items()}
    model.eval()
    outputs = masked_outputs(model, masked_tensors(named_tensors(model), kept), groups.calls)
    assert torch.equal(outputs[0], forward(masked_twin(model, kept).eval(), x)[0])
    assert all(torch.equal(tensor, before[key]) for key, tensor in named_tensors(model).items())


@pytest.mark.parametrize(
    ("expected", "actual"),
    [
        (ONE, ONE * (1 + 1e-12)),
        ({"a": ONE, "b": [ONE, 3, None]}, {"a": ONE.clone(), "b": [ONE, 4, None]}),
        (torch.tensor([NAN, INF, 1.0]), torch.tensor([INF, NAN, 1.0])),
        (torch.tensor([1, 2]), torch.tensor([1, 3])),
        (torch.zeros(0), torch.zeros(0)),
        (ONE.float(), ONE.float() + 1e-4),
    ],
)
def test_outputs_that_agree(expected: Any, actual: Any) -> None:
    """Up to rounding; integers jump where rounding differs."""
    compare_outputs(expected, actual)


@pytest.mark.parametrize(
    ("expected", "actual", "message"),
    [
        (ONE, ONE + 1e-9, "output 0 differs from the masked model's by 1e-09"),
        ((ONE, ONE), (ONE, -ONE), "output 1 differs"),
        (ONE, ONE[:1], r"output 0 has shape \(1,\) after, \(2,\) before"),
        (ONE, ONE[None], r"has shape \(1, 2\) after"),
        ((ONE, ONE), (ONE,), "1 outputs after the removal, 2 before"),
        (ONE, torch.tensor([1.0, NAN], dtype=torch.float64), "output 0 differs"),
        (torch.tensor([INF, 1.0]), torch.tensor([1.0, 1.0]), "output 0 differs"),
        (torch.zeros(2), torch.full((2,), 1e-9), "output 0 differs"),
    ],
)
def test_outputs_that_differ(expected: Any, actual: Any, message: str) -> None:
    with pytest.raises(SurgeryError, match=message):
        compare_outputs(expected, actual)


def test_tolerances_grow_with_the_rounding_of_the_dtype() -> None:
    assert TOLERANCE[torch.float64] == 1e-10 < TOLERANCE[torch.float32] < TOLERANCE[torch.bfloat16]
