"""Example inputs from text, from the model, guessed."""

import pytest
import torch
from torch import nn

from lightning_prune import PruningError
from lightning_prune.cli.inputs import describe, find_inputs, make_inputs
from lightning_prune.models import LeNet


@pytest.mark.parametrize(
    ("spec", "shape", "dtype", "low", "high"),
    [
        ("1,3,8,8", (1, 3, 8, 8), torch.float32, -9, 9),
        ("4", (4,), torch.float32, -9, 9),
        ("2, 500:float64:-1-3.5", (2, 500), torch.float64, -1, 3.5),
        ("2,500:float16:1e-2-1", (2, 500), torch.float16, 0.009, 1),
        ("2,500:int64:0-7", (2, 500), torch.int64, 0, 6),
        ("2,500:int32:-3-0", (2, 500), torch.int32, -3, -1),
        ("2,500:uint8:250-256", (2, 500), torch.uint8, 250, 255),
        ("2,500:int64", (2, 500), torch.int64, 0, 1),
        ("2,500:bool", (2, 500), torch.bool, 0, 1),
    ],
)
def test_an_input_is_as_described(
    spec: str, shape: tuple[int, ...], dtype: torch.dtype, low: float, high: float
) -> None:
    made = make_inputs([spec])
    assert made.shape == shape
    assert made.dtype == dtype
    assert low <= made.double().min()
    assert made.double().max() <= high
    assert torch.equal(made, make_inputs([spec]))
    if made.numel() > 100 and not dtype.is_floating_point:
        assert {int(made.min()), int(made.max())} == {low, high}


def test_several_inputs_are_a_tuple_or_a_dict() -> None:
    first, second = make_inputs(["1,3", "2,4:int64:0-5"])
    assert first.shape == (1, 3)
    assert second.dtype == torch.int64
    named = make_inputs(["ids=1,3:int64:0-5", "mask=1,3"])
    assert list(named) == ["ids", "mask"]
    assert torch.equal(named["ids"], make_inputs(["1,3:int64:0-5"]))
    assert describe(named) == "ids=1×3 int64, mask=1×3 float32"


@pytest.mark.parametrize(
    ("specs", "said"),
    [
        (["1,3,x"], "whole numbers above 0"),
        (["1,0"], "whole numbers above 0"),
        ([""], "name=]shape"),
        (["1,3:float12"], "dtype of an input is one of float32"),
        (["1,3:int64:9"], "low-high"),
        (["1,3:int64:9-3"], "low-high"),
        (["1,3:int64:0-2.5"], "two such numbers"),
        (["1,3:uint8:0-300"], "two such numbers"),
        (["1,3:bool:0-1"], "no range"),
        (["a=1,3", "1,4"], "either all"),
        (["a=1,3", "a=1,4"], "one name"),
    ],
)
def test_a_wrong_description_is_refused(specs: list[str], said: str) -> None:
    with pytest.raises(PruningError, match=said) as caught:
        make_inputs(specs)
    assert "\n" not in str(caught.value)


class Told(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)
        self.example_input_array = torch.zeros(3, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def test_the_model_says_what_it_takes() -> None:
    model = Told()
    assert find_inputs(model, ()) == (model.example_input_array, "example_input_array")
    assert find_inputs(model, ["5,4"])[0].shape == (5, 4)
    known = torch.zeros(7, 4)
    assert find_inputs(nn.Linear(4, 2), (), known)[0] is known


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (LeNet(), (1, 3, 32, 32)),
        (LeNet(in_shape=(1, 28, 28)), (1, 1, 28, 28)),
        (nn.Sequential(nn.Conv2d(5, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)), (1, 5, 224, 224)),
        (nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)), (1, 6)),
        (nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 2)), (1, 16)),
    ],
)
def test_a_guess_is_one_that_the_model_takes(model: nn.Module, shape: tuple[int, ...]) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    inputs, origin = find_inputs(model, ())
    assert (inputs.shape, origin) == (shape, "guessed")
    model(inputs)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_no_guess_is_an_error_that_names_the_option() -> None:
    with pytest.raises(PruningError, match="--input"):
        find_inputs(nn.Bilinear(2, 3, 4), ())
