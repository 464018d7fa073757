import copy
import io
import re
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_prune.errors import PruningError
from lightning_prune.models import LeNet
from lightning_prune.models.lenet import ACTIVATIONS


class Article(nn.Module):
    """The network of the source article, as it is written there."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 5)
        self.pool = nn.MaxPool2d(2, 2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(F.relu(self.conv1(x)))
        x = self.pool(F.relu(self.conv2(x)))
        x = x.view(-1, 16 * 5 * 5)
        x = F.relu(self.fc1(x))
        x = F.relu(self.fc2(x))
        return self.fc3(x)


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_default_is_the_articles_network() -> None:
    torch.manual_seed(0)
    article, ours = Article(), LeNet()
    ours.load_state_dict(article.state_dict())
    images = torch.randn(4, 3, 32, 32)
    assert count(ours) == 62_006
    assert torch.equal(ours(images), article(images))


def test_same_seed_gives_the_articles_weights() -> None:
    torch.manual_seed(0)
    article = Article()
    torch.manual_seed(0)
    for name, parameter in LeNet().named_parameters():
        assert torch.equal(parameter, article.get_parameter(name))


@pytest.mark.parametrize(
    ("options", "parameters"),
    [
        # Convolutions channel * (kernel * kernel * before + 1), linear layers width * (before + 1).
        ({"hidden": ()}, 6 * 76 + 16 * 151 + 10 * 401),
        ({"channels": ()}, 120 * 3073 + 84 * 121 + 10 * 85),
        ({"channels": (), "hidden": (), "num_classes": 2}, 2 * 3073),
        ({"channels": [4], "kernel_size": 3, "hidden": [7]}, 4 * 28 + 7 * (4 * 15 * 15 + 1) + 10 * 8),
        (
            {"channels": (4, 5, 6), "kernel_size": (5, 3, 1), "hidden": (7, 8, 9), "in_shape": (1, 28, 20)},
            # 28 x 20 -> 24 x 16 -> 12 x 8 -> 10 x 6 -> 5 x 3 -> 5 x 3 -> 2 x 1
            4 * 26 + 5 * 37 + 6 * 6 + 7 * (6 * 2 * 1 + 1) + 8 * 8 + 9 * 9 + 10 * 10,
        ),
    ],
)
def test_any_number_of_layers(options: dict[str, Any], parameters: int) -> None:
    model = LeNet(**options)
    images = torch.zeros(2, *options.get("in_shape", (3, 32, 32)))
    assert count(model) == parameters
    assert model(images).shape == (2, options.get("num_classes", 10))
    assert model.num_classes == options.get("num_classes", 10)


def test_the_smallest_image_that_fits() -> None:
    # 16 - 5 + 1 = 12, 12 // 2 = 6, 6 - 5 + 1 = 2, 2 // 2 = 1
    assert LeNet(in_shape=(3, 16, 32))(torch.zeros(1, 3, 16, 32)).shape == (1, 10)
    with pytest.raises(PruningError):
        LeNet(in_shape=(3, 15, 32))


def test_names_are_readable() -> None:
    assert list(dict(LeNet().named_children())) == [
        *("conv1", "act1", "pool1", "conv2", "act2", "pool2"),
        *("flatten", "fc1", "act3", "fc2", "act4", "fc3"),
    ]


@pytest.mark.parametrize(
    ("options", "sums"),
    [
        ({"kernel_size": (5, 21)}, "conv 1: 32 - 5 + 1 = 28, pool: 28 // 2 = 14, conv 2: 14 - 21 + 1 = -6."),
        ({"in_shape": (1, 40, 8)}, "conv 1: 8 - 5 + 1 = 4, pool: 4 // 2 = 2, conv 2: 2 - 5 + 1 = -2."),
        ({"in_shape": (1, 5, 5)}, "conv 1: 5 - 5 + 1 = 1, pool: 1 // 2 = 0."),
        ({"kernel_size": 33}, "conv 1: 32 - 33 + 1 = 0."),
    ],
)
def test_impossible_size_shows_the_arithmetic(options: dict[str, Any], sums: str) -> None:
    with pytest.raises(PruningError, match=re.escape(sums)):
        LeNet(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": 6}, "channels must be positive whole numbers, got 6"),
        ({"channels": (6, 0)}, "channels must be positive whole numbers, got (6, 0)"),
        ({"channels": (6, 1.5)}, "channels must be positive whole numbers"),
        ({"channels": "66"}, "channels must be positive whole numbers"),
        ({"hidden": (True,)}, "hidden must be positive whole numbers"),
        ({"kernel_size": 0}, "kernel_size must be 2 positive whole number(s), got [0, 0]"),
        ({"kernel_size": (5, 5, 5)}, "kernel_size must be 2 positive whole number(s), got 3: (5, 5, 5)"),
        ({"kernel_size": 2.5}, "kernel_size must be 2 positive whole number(s), got 2.5"),
        ({"in_shape": (32, 32)}, "in_shape must be 3 positive whole number(s), got 2"),
        ({"num_classes": 0}, "num_classes must be a positive whole number, got 0"),
        ({"num_classes": float("nan")}, "num_classes must be a positive whole number, got nan"),
        ({"activation": "rely"}, "unknown activation 'rely'. Allowed: " + ", ".join(ACTIVATIONS)),
        ({"activation": nn.ReLU()}, "(nn.ReLU, not nn.ReLU()), got ReLU()"),
        ({"activation": None}, "activation must be a name or a callable"),
        ({"activation": dict}, "activation made a dict, not an nn.Module"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PruningError, match=re.escape(message)):
        LeNet(**options)


@pytest.mark.parametrize("activation", [*ACTIVATIONS, lambda: nn.LeakyReLU(0.3)])
def test_activation_is_used_everywhere(activation: Any) -> None:
    model = LeNet(activation=activation)
    wanted = type(ACTIVATIONS[activation]() if isinstance(activation, str) else activation())
    acts = [module for name, module in model.named_children() if name.startswith("act")]
    assert [type(act) for act in acts] == [wanted] * 4
    assert len(set(map(id, acts))) == 4


def copy_by_state(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    twin = LeNet()
    twin.load_state_dict(torch.load(file, weights_only=True))
    return twin


EXAMPLE = torch.ones(2, 3, 32, 32)
WAYS = {
    "deepcopy": copy.deepcopy,
    "state_dict": copy_by_state,
    "double": lambda model: copy.deepcopy(model).double().float(),
    "script": torch.jit.script,
    "trace": lambda model: torch.jit.trace(model, EXAMPLE),
    "fx": torch.fx.symbolic_trace,
    "export": lambda model: torch.export.export(model, (EXAMPLE,)).module(),
}


@pytest.mark.filterwarnings("ignore:`torch.jit.* is deprecated")  # and still used
@pytest.mark.parametrize("way", sorted(WAYS))
def test_every_copy_computes_the_same(way: str) -> None:
    torch.manual_seed(0)
    model = LeNet().eval()
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(WAYS[way](model)(images), model(images))
