"""Each entry of the table of sized calls: what it reads, and that writing does what one would write by hand."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from networks import inputs
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lightning_prune.graph.callsites import CallSite, SizePatch, SizeRewriter
from lightning_prune.graph.sized import COUNTED_AS, SIZED_FUNCTIONS, kind_of


class Seen(Exception):
    """A call, caught before it ran."""


class Catch(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if kind_of(func) is not None:
            raise Seen(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


def caught(spelling: Callable[[Tensor], Any], x: Tensor) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """The sized call that a piece of code makes, as a mode sees it."""
    with pytest.raises(Seen) as seen, Catch():
        spelling(x)
    func, args, kwargs = seen.value.args
    return func, args, kwargs


@dataclass(frozen=True)
class Case:
    """Spellings of one call.

    Attributes:
        sizes: What each reads.
        change: Other sizes.
        by_hand: The call with those.
        shape: Of the tensor that the spellings take.
        smaller: Of the tensor that the other sizes fit.
        spellings: The code.
        values: Whether results can be compared by value.
    """

    sizes: list[Any]
    change: dict[int, Any]
    by_hand: Callable[[Tensor], Any]
    spellings: list[Callable[[Tensor], Any]]
    shape: tuple[int, ...] = (2, 8, 3)
    smaller: tuple[int, ...] = (2, 5, 3)
    values: bool = True


def mask_then_number() -> bool:
    """Whether torch can index with a boolean mask of two dimensions and a number behind it; 2.6 can't."""
    try:
        torch.rand(2, 2, 8)[torch.tensor([[True, False]] * 2), 2]
    except IndexError:
        return False
    return True


W, V = inputs((2, 1), 8), inputs((2, 1), 4)  # weights of two groups; of two groups, transposed
EVERYWHERE = torch.tensor([6, 1, 0]).view(-1, 1).expand(2, -1, 3)  # the same indices wherever in the other dimensions
FIRST = EVERYWHERE[:1, :, :1]
W2, V2 = W.unsqueeze(3), V.unsqueeze(3)
W3, V3 = W2.unsqueeze(4), V2.unsqueeze(4)

CASES: dict[str, list[Case]] = {
    "view": [
        Case([2, 24], {1: 15}, lambda x: x.view(2, 15), [
            lambda x: x.view(2, 24),
            lambda x: x.view((2, 24)),
            lambda x: x.view([2, 24]),
            lambda x: x.view(torch.Size([2, 24])),
            lambda x: x.view(size=(2, 24)),
            lambda x: Tensor.view(x, 2, 24),
        ]),
        Case([-1, 24], {1: 15}, lambda x: x.view(-1, 15), [lambda x: x.view(-1, 24)]),
        Case([48], {0: 30}, lambda x: x.view(30), [
            lambda x: x.view(48), lambda x: x.view((48,)), lambda x: x.view(size=(48,)),
        ]),
    ],
    "reshape": [
        Case([2, 24], {1: 15}, lambda x: x.reshape(2, 15), [
            lambda x: x.reshape(2, 24),
            lambda x: x.reshape((2, 24)),
            lambda x: x.reshape(shape=(2, 24)),
            lambda x: torch.reshape(x, (2, 24)),
            lambda x: torch.reshape(x, shape=[2, 24]),
            lambda x: torch.reshape(input=x, shape=[2, 24]),
        ]),
    ],
    "expand": [
        Case([2, 8, 3], {1: 5}, lambda x: x.expand(2, 5, 3), [
            lambda x: x.expand(2, 8, 3),
            lambda x: x.expand((2, 8, 3)),
            lambda x: x.expand(size=(2, 8, 3)),
            lambda x: torch.broadcast_to(x, (2, 8, 3)),
            lambda x: torch.broadcast_to(input=x, size=(2, 8, 3)),
            lambda x: x.broadcast_to((2, 8, 3)),
        ], (2, 1, 3), (2, 1, 3)),
        Case([-1, 8, -1], {1: 5}, lambda x: x.expand(-1, 5, -1), [lambda x: x.expand(-1, 8, -1)], (2, 1, 3), (2, 1, 3)),
    ],
    "repeat": [
        Case([1, 8, 1], {1: 5}, lambda x: x.repeat(1, 5, 1), [
            lambda x: x.repeat(1, 8, 1),
            lambda x: x.repeat((1, 8, 1)),
            lambda x: x.repeat(repeats=(1, 8, 1)),
            lambda x: x.tile(1, 8, 1),
            lambda x: x.tile((1, 8, 1)),
            lambda x: torch.tile(x, (1, 8, 1)),
            lambda x: torch.tile(x, dims=(1, 8, 1)),
            lambda x: torch.tile(input=x, dims=(1, 8, 1)),
        ], (2, 1, 3), (2, 1, 3)),
        Case([8, 1], {0: 5}, lambda x: x.tile(5, 1), [lambda x: x.tile(8, 1)], (2, 1, 3), (2, 1, 3)),
        Case([8, 1, 1, 1], {0: 5}, lambda x: x.repeat(5, 1, 1, 1), [lambda x: x.repeat(8, 1, 1, 1)]),
    ],
    "unflatten": [
        Case([4, 2], {0: 3}, lambda x: x.unflatten(1, (3, 2)), [
            lambda x: x.unflatten(1, (4, 2)),
            lambda x: x.unflatten(-2, [4, 2]),
            lambda x: x.unflatten(1, sizes=(4, 2)),
            lambda x: x.unflatten(dim=1, sizes=(4, 2)),
            lambda x: torch.unflatten(x, 1, (4, 2)),
            lambda x: torch.unflatten(x, dim=1, sizes=(4, 2)),
            lambda x: torch.unflatten(input=x, dim=1, sizes=(4, 2)),
        ], smaller=(2, 6, 3)),
        Case([4, -1], {0: 3}, lambda x: x.unflatten(1, (3, -1)), [lambda x: x.unflatten(1, (4, -1))], smaller=(2, 6, 3)),
    ],
    "zeros": [
        Case([2, 8], {1: 5}, lambda x: torch.zeros(2, 5, dtype=x.dtype), [
            lambda x: torch.zeros(2, 8, dtype=x.dtype),
            lambda x: torch.zeros((2, 8), dtype=x.dtype),
            lambda x: torch.zeros([2, 8], dtype=x.dtype, device=x.device),
            lambda x: torch.zeros(size=(2, 8), dtype=x.dtype),
            lambda x: torch.zeros(x.size(0), 8, dtype=x.dtype),
        ]),
        Case([8], {0: 5}, lambda x: torch.ones(5), [lambda x: torch.ones(8), lambda x: torch.ones((8,))]),
        Case([2, 8], {1: 5}, lambda x: torch.full((2, 5), 3.0), [
            lambda x: torch.full((2, 8), 3.0),
            lambda x: torch.full((2, 8), fill_value=3.0),
            lambda x: torch.full(size=(2, 8), fill_value=3.0),
        ]),
        Case([2, 8], {1: 5}, lambda x: torch.empty(2, 5), [
            lambda x: torch.empty(2, 8), lambda x: torch.rand(2, 8), lambda x: torch.randn((2, 8)),
        ], values=False),
    ],
    "new_zeros": [
        Case([2, 8], {1: 5}, lambda x: x.new_zeros(2, 5), [
            lambda x: x.new_zeros(2, 8), lambda x: x.new_zeros((2, 8)), lambda x: x.new_zeros(size=(2, 8)),
        ]),
        Case([2, 8], {1: 5}, lambda x: x.new_ones(2, 5), [lambda x: x.new_ones(2, 8), lambda x: x.new_ones([2, 8])]),
        Case([2, 8], {1: 5}, lambda x: x.new_full((2, 5), 3.0), [
            lambda x: x.new_full((2, 8), 3.0),
            lambda x: x.new_full((2, 8), fill_value=3.0),
            lambda x: x.new_full(size=(2, 8), fill_value=3.0),
        ]),
        Case([2, 8], {1: 5}, lambda x: x.new_empty(2, 5), [
            lambda x: x.new_empty(2, 8), lambda x: x.new_empty((2, 8), dtype=torch.float64),
        ], values=False),
    ],
    "split": [
        Case([3, 3, 2], {0: 2, 1: 2, 2: 1}, lambda x: x.split([2, 2, 1], 1), [
            lambda x: x.split(3, 1),
            lambda x: x.split(3, dim=1),
            lambda x: x.split(split_size=3, dim=-2),
            lambda x: torch.split(x, 3, 1),
            lambda x: torch.split(x, 3, dim=1),
            lambda x: torch.split(x, split_size_or_sections=3, dim=1),
            lambda x: torch.split(tensor=x, split_size_or_sections=3, dim=1),
            lambda x: torch.unsafe_split(x, 3, 1),
        ]),
        Case([3, 5], {0: 1, 1: 4}, lambda x: x.split([1, 4], 1), [
            lambda x: x.split([3, 5], 1),
            lambda x: x.split((3, 5), dim=1),
            lambda x: torch.split(x, [3, 5], 1),
            lambda x: torch.split_with_sizes(x, [3, 5], 1),
            lambda x: x.split_with_sizes([3, 5], 1),
            lambda x: x.split_with_sizes(split_sizes=[3, 5], dim=1),
        ]),
        Case([1, 1], {0: 1, 1: 1}, lambda x: x.split([1, 1]), [lambda x: x.split(1), lambda x: torch.split(x, 1)]),
        Case([8], {0: 5}, lambda x: x.split([5], 1), [lambda x: x.split(99, 1)]),
    ],
    "chunk": [
        Case([4, 4], {0: 3, 1: 2}, lambda x: x.split([3, 2], 1), [
            lambda x: x.chunk(2, 1),
            lambda x: x.chunk(2, dim=1),
            lambda x: x.chunk(chunks=2, dim=-2),
            lambda x: torch.chunk(x, 2, 1),
            lambda x: torch.chunk(input=x, chunks=2, dim=1),
            lambda x: torch.unsafe_chunk(x, 2, 1),
        ]),
        Case([3, 3, 2], {0: 1, 1: 2, 2: 2}, lambda x: x.split([1, 2, 2], 1), [lambda x: x.chunk(3, 1)]),
        Case([2, 2, 2, 2], {0: 1, 1: 2, 2: 1, 3: 1}, lambda x: x.split([1, 2, 1, 1], 1), [lambda x: x.chunk(5, 1)]),
    ],
    "tensor_split": [
        Case([3, 3, 2], {0: 1, 1: 2, 2: 2}, lambda x: x.split([1, 2, 2], 1), [
            lambda x: x.tensor_split(3, 1),
            lambda x: x.tensor_split(3, dim=1),
            lambda x: x.tensor_split(sections=3, dim=1),
            lambda x: torch.tensor_split(x, 3, 1),
            lambda x: torch.tensor_split(input=x, sections=3, dim=1),
        ]),
        Case([2, 3, 3], {0: 1, 1: 3, 2: 1}, lambda x: x.split([1, 3, 1], 1), [
            lambda x: x.tensor_split((2, 5), 1),
            lambda x: x.tensor_split([2, -3], dim=1),
            lambda x: torch.tensor_split(x, indices=(2, 5), dim=1),
        ]),
    ],
    "hsplit": [
        Case([4, 4], {0: 3, 1: 2}, lambda x: x.split([3, 2], 1), [
            lambda x: x.hsplit(2), lambda x: torch.hsplit(x, 2), lambda x: x.hsplit([4]), lambda x: torch.hsplit(x, [4]),
        ]),
    ],
    "vsplit": [
        Case([4, 4], {0: 3, 1: 2}, lambda x: x.split([3, 2], 0), [
            lambda x: x.vsplit(2), lambda x: torch.vsplit(x, (4,)),
        ], (8, 3), (5, 3)),
    ],
    "dsplit": [
        Case([4, 4], {0: 3, 1: 2}, lambda x: x.split([3, 2], 2), [
            lambda x: x.dsplit(2), lambda x: torch.dsplit(x, [4]),
        ], (2, 3, 8), (2, 3, 5)),
    ],
    "getitem": [
        Case([None, None, 2, 6], {2: 1, 3: 4}, lambda x: x[:, 1:4], [
            lambda x: x[:, 2:6],
            lambda x: x[:, 2:6:1],
            lambda x: x[:, 2:-2],
            lambda x: x[:, -6:-2],
        ]),
        Case([2, 6], {0: 1, 1: 4}, lambda x: x[1:4], [lambda x: x[2:6]], (8, 3), (5, 3)),
        Case([2, 6, None, None], {0: 1, 1: 4}, lambda x: x[..., 1:4, :], [lambda x: x[..., 2:6, :]]),
        Case([None, 3], {1: 2}, lambda x: x[..., :2], [lambda x: x[..., :3], lambda x: x[..., :-5]], (2, 3, 8), (2, 3, 5)),
        Case([None, None, 5, None], {2: 3}, lambda x: x[:, 3:], [lambda x: x[:, 5:], lambda x: x[:, -3:]]),
        Case([None, None, 2, None], {2: 1}, lambda x: x[:, 1], [lambda x: x[:, 2], lambda x: x[:, -6]]),
        Case([None, None, 2, 6], {2: 1, 3: 4}, lambda x: x[:, None, 1:4], [lambda x: x[:, None, 2:6]]),
        Case([None, None, None, None], {}, lambda x: x[:, ::2], [lambda x: x[:, ::2], lambda x: x[:, 0:8:2]],
             smaller=(2, 8, 3)),
        Case([2, None, (0, 2)], {0: 1}, lambda x: x[1, torch.tensor([0, 2])],
             [lambda x: x[2, torch.tensor([0, 2])]], (8, 3), (5, 3)),
        *([Case([2, None], {0: 1}, lambda x: x[torch.tensor([[True, False]] * 2), 1],
                [lambda x: x[torch.tensor([[True, False]] * 2), 2]], (2, 2, 8), (2, 2, 5))]
          if mask_then_number() else []),
        Case([(0, 1)], {}, lambda x: x[[0, 1]], [lambda x: x[[0, 1]], lambda x: x[range(2)]], smaller=(2, 8, 3)),
        Case([None, None, (6, 1, 0)], {2: (3, 0)}, lambda x: x[:, [3, 0]], [
            lambda x: x[:, [6, 1, 0]],
            lambda x: x[:, torch.tensor([6, 1, 0])],
            lambda x: x[:, torch.tensor([-2, -7, 0])],
        ]),
        Case([None, None, 0, None, (1, 6)], {4: (3,)}, lambda x: x[:, 0, ..., [3]], [lambda x: x[:, 0, ..., [1, 6]]],
             (2, 3, 8), (2, 3, 5)),
        Case([None, None, (1, 6)], {2: (0, 4)}, lambda x: x[:, [0, 4]], [
            lambda x: x[:, torch.tensor([False, True, False, False, False, False, True, False])],
        ]),
    ],
    "index_select": [
        Case([(6, 1, 0)], {0: (3, 0)}, lambda x: x[:, [3, 0]], [
            lambda x: x.index_select(1, torch.tensor([6, 1, 0])),
            lambda x: x.index_select(dim=-2, index=torch.tensor([6, 1, 0])),
            lambda x: torch.index_select(x, 1, torch.tensor([6, 1, 0])),
            lambda x: torch.index_select(input=x, dim=1, index=torch.tensor([6, 1, 0])),
        ]),
    ],
    "gather": [
        Case([(6, 1, 0)], {0: (3, 0)}, lambda x: x[:, [3, 0]], [
            lambda x: x.gather(1, EVERYWHERE),
            lambda x: torch.gather(x, 1, index=EVERYWHERE),
            lambda x: torch.gather(input=x, dim=-2, index=EVERYWHERE.clone()),
        ]),
        Case([(6, 1)], {0: (3,)}, lambda x: x[[3]], [lambda x: x.gather(0, torch.tensor([6, 1]))], (8,), (5,)),
        Case([None], {}, lambda x: x.gather(0, torch.tensor([[6, 1]])),
             [lambda x: x.gather(0, torch.tensor([[6, 1], [5, 5]]))], (8, 2), (8, 2)),
    ],
    "take_along_dim": [
        Case([(6, 1, 0)], {0: (3, 0)}, lambda x: x[:, [3, 0]], [
            lambda x: x.take_along_dim(FIRST, 1),
            lambda x: torch.take_along_dim(x, FIRST, dim=1),
            lambda x: torch.take_along_dim(x, indices=FIRST, dim=-2),
        ]),
        Case([None], {}, lambda x: x[:2], [lambda x: x.take_along_dim(torch.tensor([6, 1]))], (8,), (8,)),
    ],
    "repeat_interleave": [
        Case([(0, 1, 1, 2, 3, 3, 4, 5, 5, 6, 7, 7)], {0: (3, 3, 0)}, lambda x: x[:, [3, 3, 0]], [
            lambda x: x.repeat_interleave(torch.tensor([1, 2] * 4), 1),
            lambda x: torch.repeat_interleave(x, torch.tensor([1, 2] * 4), dim=1),
            lambda x: torch.repeat_interleave(x, repeats=torch.tensor([1, 2] * 4), dim=-2),
        ]),
        Case([None], {}, lambda x: x, [lambda x: x.repeat_interleave(2, 1)], smaller=(2, 8, 3)),
    ],
    "eye": [
        Case([8], {0: 5}, lambda x: torch.eye(5), [lambda x: torch.eye(8), lambda x: torch.eye(n=8)]),
        Case([8, 8], {0: 5, 1: 5}, lambda x: torch.eye(5), [lambda x: torch.eye(8, 8), lambda x: torch.eye(8, m=8)]),
    ],
    "narrow": [
        Case([2, 4], {0: 1, 1: 3}, lambda x: x[:, 1:4], [
            lambda x: x.narrow(1, 2, 4),
            lambda x: x.narrow(1, -6, 4),
            lambda x: x.narrow(dim=1, start=2, length=4),
            lambda x: torch.narrow(x, 1, 2, 4),
            lambda x: torch.narrow(x, dim=-2, start=2, length=4),
            lambda x: torch.narrow(input=x, dim=1, start=2, length=4),
        ]),
    ],
    "select": [
        Case([2], {0: 1}, lambda x: x[:, 1], [
            lambda x: x.select(1, 2),
            lambda x: x.select(1, -6),
            lambda x: x.select(dim=1, index=2),
            lambda x: torch.select(x, 1, 2),
            lambda x: torch.select(input=x, dim=-2, index=2),
        ]),
    ],
    "roll": [
        Case([3], {0: 2}, lambda x: x.roll(2, 1), [
            lambda x: x.roll(3, 1),
            lambda x: x.roll(-5, 1),
            lambda x: x.roll((3,), (1,)),
            lambda x: x.roll(shifts=3, dims=1),
            lambda x: torch.roll(x, 3, 1),
            lambda x: torch.roll(x, shifts=3, dims=1),
            lambda x: torch.roll(input=x, shifts=(3,), dims=(1,)),
        ]),
        Case([1, 3], {1: 2}, lambda x: x.roll((1, 2), (2, 1)), [
            lambda x: x.roll((1, 3), (2, 1)), lambda x: torch.roll(x, [1, -5], [2, 1]),
        ]),
        Case([], {}, lambda x: x.roll(3), [lambda x: x.roll(3)]),
    ],
    "pad": [
        Case([0, 0, 1, 8], {2: 0, 3: 5}, lambda x: F.pad(x, (0, 0, 0, 5)), [
            lambda x: F.pad(x, (0, 0, 1, 8)),
            lambda x: F.pad(x, [0, 0, 1, 8], "constant", 0.0),
            lambda x: F.pad(x, pad=(0, 0, 1, 8)),
            lambda x: F.pad(input=x, pad=(0, 0, 1, 8)),
        ]),
        Case([2, 1], {0: 1}, lambda x: F.pad(x, (1, 1), value=3.0), [lambda x: F.pad(x, (2, 1), value=3.0)]),
    ],
    "layer_norm": [
        Case([8], {0: 5}, lambda x: F.layer_norm(x, (5,)), [
            lambda x: F.layer_norm(x, (8,)),
            lambda x: F.layer_norm(x, [8]),
            lambda x: F.layer_norm(x, normalized_shape=(8,)),
            lambda x: F.layer_norm(input=x, normalized_shape=(8,)),
            lambda x: torch.layer_norm(x, (8,)),
        ], (2, 3, 8), (2, 3, 5)),
        Case([3, 8], {1: 5}, lambda x: F.layer_norm(x, (3, 5), eps=0.1), [lambda x: F.layer_norm(x, (3, 8), eps=0.1)],
             (2, 3, 8), (2, 3, 5)),
        Case([8], {0: 5}, lambda x: F.rms_norm(x, (5,)), [
            lambda x: F.rms_norm(x, (8,)),
            lambda x: F.rms_norm(x, normalized_shape=(8,)),
            lambda x: torch.rms_norm(x, (8,)),
        ], (2, 3, 8), (2, 3, 5)),
    ],
    "group_norm": [
        Case([4], {0: 3}, lambda x: F.group_norm(x, 3), [
            lambda x: F.group_norm(x, 4),
            lambda x: F.group_norm(x, num_groups=4),
            lambda x: F.group_norm(input=x, num_groups=4),
            lambda x: torch.group_norm(x, 4),
        ], smaller=(2, 6, 3)),
    ],
    "conv": [
        Case([2], {0: 1}, lambda x: F.conv1d(x, W[:, :2]), [
            lambda x: F.conv1d(x, W, None, 1, 0, 1, 2),
            lambda x: F.conv1d(x, W, groups=2),
            lambda x: F.conv1d(input=x, weight=W, groups=2),
        ], (2, 4, 3), (2, 2, 3)),
        Case([2], {0: 1}, lambda x: F.conv2d(x, W2), [lambda x: F.conv2d(x, W2, groups=2)],
             (2, 4, 3, 3), (2, 2, 3, 3)),
        Case([2], {0: 1}, lambda x: F.conv3d(x, W3),
             [lambda x: F.conv3d(x, W3, groups=2)], (2, 4, 3, 3, 3), (2, 2, 3, 3, 3)),
        Case([], {}, lambda x: F.conv1d(x, W), [lambda x: F.conv1d(x, W)], (2, 2, 3), (2, 2, 3)),
    ],
    "conv_transpose": [
        Case([2], {0: 1}, lambda x: F.conv_transpose1d(x, V), [
            lambda x: F.conv_transpose1d(x, V, None, 1, 0, 0, 2),
            lambda x: F.conv_transpose1d(x, V, groups=2),
        ], (2, 4, 3), (2, 4, 3)),
        Case([2], {0: 1}, lambda x: F.conv_transpose2d(x, V2),
             [lambda x: F.conv_transpose2d(x, V2, groups=2)], (2, 4, 3, 3), (2, 4, 3, 3)),
        Case([2], {0: 1}, lambda x: F.conv_transpose3d(x, V3),
             [lambda x: F.conv_transpose3d(x, V3, groups=2)], (2, 4, 3, 3, 3), (2, 4, 3, 3, 3)),
    ],
    "channel_shuffle": [
        Case([4], {0: 3}, lambda x: F.channel_shuffle(x, 3), [
            lambda x: F.channel_shuffle(x, 4), lambda x: F.native_channel_shuffle(x, 4),
        ], (2, 8, 3, 3), (2, 6, 3, 3)),
    ],
    "attention": [],
}  # fmt: skip

SPELLINGS = [
    (name, case, spelling, f"{name}-{i}-{j}")
    for name, cases in CASES.items()
    for i, case in enumerate(cases)
    for j, spelling in enumerate(case.spellings)
]


def spellings(those: Callable[[str, Case], bool] = lambda name, case: True) -> pytest.MarkDecorator:
    chosen = [each for each in SPELLINGS if those(*each[:2])]
    return pytest.mark.parametrize(
        ("name", "case", "spelling"), [each[:3] for each in chosen], ids=[each[3] for each in chosen]
    )


every_spelling = spellings()


def make(shape: tuple[int, ...]) -> Tensor:
    return inputs(shape[1:], shape[0])


def as_list(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def assert_equal(ours: Any, theirs: Any, *, values: bool = True) -> None:
    ours, theirs = as_list(ours), as_list(theirs)
    assert [each.shape for each in ours] == [each.shape for each in theirs]
    assert [each.dtype for each in ours] == [each.dtype for each in theirs]
    assert not values or all(map(torch.equal, ours, theirs))


def sizes_of(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """What a call asks for; a tensor of indices as a tuple of those from the front, None where they vary."""
    kind = SIZED_FUNCTIONS[name]
    read, picked = kind.read(args, kwargs), kind.picked(args, kwargs) if kind.picked else {}
    found = {at: tuple(index.tolist()) for at, (_, index) in picked.items()}
    assert all(found[at] == size for at, size in enumerate(read) if isinstance(size, tuple))
    return [found.get(at) if isinstance(size, Tensor) else size for at, size in enumerate(read)]


@every_spelling
def test_reading_gives_the_sizes_of_every_spelling(name: str, case: Case, spelling: Any) -> None:
    func, args, kwargs = caught(spelling, make(case.shape))
    assert kind_of(func) == name
    assert sizes_of(name, args, kwargs) == case.sizes


@every_spelling
def test_writing_what_was_read_changes_nothing(name: str, case: Case, spelling: Any) -> None:
    x = make(case.shape)
    func, args, kwargs = caught(spelling, x)
    kind = SIZED_FUNCTIONS[name]
    read = {at: size for at, size in enumerate(sizes_of(name, args, kwargs)) if size is not None}
    func, args, kwargs = kind.write(func, args, kwargs, read)
    assert_equal(func(*args, **kwargs), spelling(x), values=case.values)


@spellings(lambda name, case: bool(case.change))
def test_writing_other_sizes_does_what_one_would_write_by_hand(name: str, case: Case, spelling: Any) -> None:
    """The call still asks for the sizes that it had when the tensor was larger."""
    x = make(case.smaller)
    func, args, kwargs = caught(spelling, x)
    func, args, kwargs = SIZED_FUNCTIONS[name].write(func, args, kwargs, case.change)
    assert_equal(func(*args, **kwargs), case.by_hand(x), values=case.values)


@spellings(lambda name, case: bool(case.change) and case.values)
def test_a_call_that_is_rewritten_where_it_is_made_does_the_same(name: str, case: Case, spelling: Any) -> None:
    """Of splits and paddings the second has the patch: calls are counted."""
    x = make(case.smaller)
    first = {"pad": lambda x: F.pad(x, (0, 0)), "split": lambda x: x.split(1, -1)}.get(COUNTED_AS[name])
    number = 0 if first is None else 1
    site = CallSite("", COUNTED_AS[name], number)
    with SizeRewriter({site.function: [SizePatch(site, dim, size) for dim, size in case.change.items()]}):
        if first is not None:
            first(x)
        ours = spelling(x)
    assert_equal(ours, case.by_hand(x))


def test_every_function_of_the_table_is_spelled_out_here() -> None:
    spelled = {caught(spelling, make(case.shape))[0] for _, case, spelling, _ in SPELLINGS}
    listed = {function for kind in SIZED_FUNCTIONS.values() for function in kind.functions}
    assert listed - spelled == {F.multi_head_attention_forward, Tensor.__setitem__}
    assert set(CASES) == set(SIZED_FUNCTIONS)
    assert len(listed) == sum(len(kind.functions) for kind in SIZED_FUNCTIONS.values())


@spellings(lambda name, case: SIZED_FUNCTIONS[name].extents is not None)
def test_a_size_counts_as_many_labels_as_it_says(name: str, case: Case, spelling: Any) -> None:
    x = make(case.shape)
    kind = SIZED_FUNCTIONS[name]
    assert kind.extents is not None
    _func, args, kwargs = caught(spelling, x)
    result = spelling(x)
    read = kind.read(args, kwargs)
    found = kind.extents(lambda tensor: tuple(map(torch.arange, tensor.shape)), args, kwargs, result)
    assert {at: len(labels) for at, labels in found.items()} == {at: read[at] for at in found}
    assert kind.extents(lambda tensor: (None,) * tensor.dim(), args, kwargs, result) == {}
    assert {at for at, size in case.change.items() if isinstance(size, int)} <= set(found)


def test_assigning_to_a_part_is_a_sized_call() -> None:
    x, value = make((2, 5, 3)), torch.tensor(7.0)

    def assign(x: Tensor) -> None:
        x[:, 2:6] = value

    func, args, kwargs = caught(assign, x)
    kind = SIZED_FUNCTIONS["getitem"]
    assert (kind_of(func), kind.read(args, kwargs)) == ("getitem", [None, None, 2, 6])
    assert kind.read(*caught(assign, make((2, 8, 3)))[1:]) == [None, None, 2, 6]
    func, args, kwargs = kind.write(func, args, kwargs, {2: 1, 3: 3})
    func(*args, **kwargs)
    expected = make((2, 5, 3))
    expected[:, 1:3] = value
    assert torch.equal(x, expected)


def test_a_view_of_another_type_asks_for_no_size() -> None:
    func, args, kwargs = caught(lambda x: x.view(torch.int64), make((2, 3)))
    assert (kind_of(func), SIZED_FUNCTIONS["view"].read(args, kwargs)) == ("view", [])


def test_points_that_are_data_are_no_sizes() -> None:
    for spelling in (
        lambda x: x.tensor_split(torch.tensor([2, 5]), 1),
        lambda x: torch.tensor_split(x, torch.tensor(3), 1),
    ):
        func, args, kwargs = caught(spelling, make((2, 8, 3)))
        assert (kind_of(func), SIZED_FUNCTIONS["tensor_split"].read(args, kwargs)) == ("tensor_split", [])


def test_attention_is_written_by_nobody() -> None:
    kind = SIZED_FUNCTIONS["attention"]
    args, kwargs = (make((4, 2, 6)), 3), {"num_heads": 2}
    assert kind.read(args, kwargs) == []
    assert kind.write(F.multi_head_attention_forward, args, kwargs, {}) == (
        F.multi_head_attention_forward,
        args,
        kwargs,
    )


def test_what_is_in_no_table_has_no_kind() -> None:
    assert kind_of(torch.add) is None
    assert kind_of([]) is None  # type: ignore[arg-type]
    assert {COUNTED_AS[name] for name in ("split", "chunk", "tensor_split", "hsplit")} == {"split"}
    others = {name: as_name for name, as_name in COUNTED_AS.items() if as_name not in (name, "split")}
    assert others == {"repeat_interleave": "index_select"}
