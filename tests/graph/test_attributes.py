"""Integers that a forward reads from its modules and its tensors: as sizes they follow, as numbers they stay."""

import copy
import math
import operator
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from networks import IMAGE, Net, Wide, assert_same_outputs, build, inputs, masked_twin
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_prune import Plan, PruningError, find_groups, prune_neurons
from lightning_prune.graph.callsites import Attribute, Number, installed_patches, marked_attributes, watched_size
from lightning_prune.pruning.neurons import remove_neurons

AS_A_NUMBER: dict[str, Callable[[Any], Any]] = {
    "float": float,
    "sqrt": math.sqrt,
    "divided": lambda n: n / 4,
    "divides": lambda n: 3 / n,
    "power": lambda n: n**2,
    "root": lambda n: n**-0.5,
    "exponent": lambda n: 2**n,
    "times_float": lambda n: n * 0.5,
    "root_of_quotient": lambda n: (n // 2) ** -0.5,
    "root_of_divided": lambda n: math.sqrt(20 // n),
}

AS_A_SIZE: dict[str, Callable[[Any], Any]] = {
    "plus": lambda n: n + 2,
    "plus_behind": lambda n: 2 + n,
    "minus": lambda n: n - 2,
    "minus_behind": lambda n: 20 - n,
    "times": lambda n: n * 3,
    "times_behind": lambda n: 3 * n,
    "times_itself": lambda n: n * n,
    "quotient": lambda n: n // 2,
    "rest": lambda n: n % 4,
    "both": lambda n: divmod(n, 4),
    "negative": operator.neg,
    "compared": lambda n: (n == 6, n < 7, n >= 8, n != 6, bool(n)),
    "as_key": lambda n: {6: "six"}[n],
    "as_index": lambda n: list(range(9))[n],
    "range": lambda n: list(range(n)),
    "text": lambda n: f"{n} {n!r}",
    "integer": int,
    "repeated": lambda n: [0] * n,
    "as_shape": lambda n: torch.zeros(n, 2).tolist(),
}


def marked(value: int, numeric: set[tuple[str, str]]) -> Attribute:
    """The attribute of a module."""
    module = nn.Module()
    module.width = value
    with marked_attributes(nn.ModuleDict({"layer": module}), numeric):
        found = module.width
    assert isinstance(found, Attribute)
    return found


@contextmanager
def numbers() -> Iterator[list[tuple[Any, Callable[[], bool]]]]:
    """Six, read from a module and from a tensor, and whether it was calculated with."""
    numeric: set[tuple[str, str]] = set()
    told: list[int] = []
    yield [
        (marked(6, numeric), lambda: numeric == {("layer", "width")}),
        (watched_size(6, lambda: told.append(1)), lambda: bool(told)),
    ]


@pytest.mark.parametrize("name", AS_A_NUMBER)
def test_what_is_calculated_with_tells(name: str) -> None:
    with numbers() as found:
        for number, told in found:
            assert not told()
            result = AS_A_NUMBER[name](number)
            assert told()
            assert (result, type(result)) == (AS_A_NUMBER[name](6), type(AS_A_NUMBER[name](6)))


@pytest.mark.parametrize("name", AS_A_SIZE)
def test_sums_and_products_of_integers_tell_nothing(name: str) -> None:
    with numbers() as found:
        for number, told in found:
            assert AS_A_SIZE[name](number) == AS_A_SIZE[name](6)
            assert not told()


@pytest.mark.parametrize("name", ["plus", "minus", "minus_behind", "rest", "integer"])
def test_arithmetic_forgets_where_an_integer_came_from(name: str) -> None:
    with numbers() as found:
        assert {type(AS_A_SIZE[name](number)) for number, _ in found} == {int}


def test_a_quotient_tells_of_all_that_it_was_made_of() -> None:
    numeric: set[tuple[str, str]] = set()
    told: list[str] = []
    attribute, size = marked(6, numeric), watched_size(13, lambda: told.append("size"))
    assert (type(size // attribute), type(attribute // size), told, numeric) == (Number, Number, [], set())
    assert (size // attribute / 1, told, numeric) == (2.0, ["size"], {("layer", "width")})
    assert (size // 2.0, 13.0 // size, divmod(size, 2)) == (6.0, 1.0, (6, 1))
    with pytest.raises(ZeroDivisionError):
        size // 0
    with pytest.raises(TypeError):
        size // "a"  # type: ignore[operator]


def test_a_size_tells_by_which_attribute_it_was_divided_for_a_number() -> None:
    numeric: set[tuple[str, str]] = set()
    told: list[Any] = []
    attribute = marked(3, numeric)
    size = watched_size(13, lambda: told.append("size"), divided_by=told.append)
    assert [0] * (size // attribute) == [0] * 4
    assert told == []
    assert float(size // attribute) == 4
    assert (told, numeric) == ([attribute], set())
    assert told[0] is attribute


def test_a_multiple_of_an_attribute_remembers_it_and_its_factor() -> None:
    number = marked(6, set())
    for product, factor in ((number, 1), (number * 2, 2), (5 * number, 5), (2 * number * 3, 6)):
        assert isinstance(product, Attribute)
        assert (product, product.module, product.name, product.place, product.factor) == (
            6 * factor,
            "layer",
            "width",
            None,
            factor,
        )
    assert type(watched_size(6, print) * 2) is int


def test_copies_are_plain_integers() -> None:
    with numbers() as found:
        for number, _ in found:
            for other in (copy.copy(number), copy.deepcopy(number), pickle.loads(pickle.dumps(number)), int(number)):
                assert (other, type(other)) == (6, int)
            assert type(copy.deepcopy({"n": [number]})["n"][0]) is int


# While a model is watched


class Holder(nn.Module):
    """Attributes of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.width, self.flag, self.ratio, self.text, self.none = 8, True, 0.5, "8", None
        self.pair, self.sizes, self.mixed, self.empty = (8, 3), [2, 3], (8, "a"), ()
        self.inner = nn.Linear(8, 3)


def test_integers_are_marked_inside_and_the_same_objects_again_outside() -> None:
    model = Holder()
    before = {path: dict(module.__dict__) for path, module in model.named_modules()}
    with marked_attributes(model, set()):
        assert isinstance(model.width, Attribute)
        assert [type(item) for item in (*model.pair, *model.sizes)] == [Attribute] * 4
        assert [(item.name, item.place) for item in model.pair] == [("pair", 0), ("pair", 1)]
        assert isinstance(model.inner.in_features, Attribute)
        assert (model.inner.in_features.module, model.inner.in_features.name) == ("inner", "in_features")
        assert {type(value) for value in (model.flag, model.ratio, model.text, model.none)} == {
            bool,
            float,
            str,
            type(None),
        }
        assert not any(isinstance(item, Attribute) for item in (*model.mixed, *model.empty))
        assert (model.width, model.pair, model.sizes) == (8, (8, 3), [2, 3])
    after = {path: module.__dict__ for path, module in model.named_modules()}
    for path, held in before.items():
        assert list(after[path]) == list(held)
        assert all(after[path][name] is value for name, value in held.items())


def test_they_come_back_when_the_forward_fails() -> None:
    model = Holder()
    pair = model.pair
    with pytest.raises(ValueError, match="no"), marked_attributes(model, set()):
        raise ValueError("no")
    assert type(model.width) is int
    assert model.pair is pair


def test_what_the_forward_assigns_stays_assigned_as_plain_integers() -> None:
    model = Holder()
    with marked_attributes(model, set()):
        model.width += 1
        model.flag = 3
        model.pair = (1, 2)
        model.sizes = [9]
        model.inner.in_features = model.inner.out_features
        del model.text
    assert (model.width, model.flag, model.pair, model.sizes) == (9, 3, (1, 2), [9])
    assert (model.inner.in_features, type(model.inner.in_features)) == (3, int)
    assert (type(model.width), type(model.inner.out_features)) == (int, int)
    assert not hasattr(model, "text")


class Noting(nn.Module):
    """Keeps what it has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.width, self.calls = nn.Linear(3, 8), nn.Linear(8, 2), 8, 0
        self.last: Any = None
        self.seen: dict[str, Any] = {}

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        self.calls += 1
        self.last, self.shape = self.width, h.shape
        self.seen["width"] = h.size(1)
        self.pair = (self.width, h.size(0))
        return self.b(h)


def test_a_forward_that_keeps_integers_keeps_plain_ones() -> None:
    model = Noting()
    find_groups(model, torch.rand(2, 3))
    assert (model.calls, model.last, model.shape, model.seen, model.pair) == (1, 8, (2, 8), {"width": 8}, (8, 2))
    assert {type(n) for n in (model.calls, model.last, *model.shape, *model.seen.values(), *model.pair)} == {int}


SIZE_READS: dict[str, Callable[[Tensor], Tensor]] = {
    "size": lambda x: x.view(x.size(0), x.size(1)),
    "size_by_name": lambda x: x.view(x.size(dim=0), x.size(dim=1)),
    "size_negative": lambda x: x.view(x.size(-2), x.size(-1)),
    "whole_size": lambda x: x.view(x.size()),
    "shape": lambda x: x.view(*x.shape),
    "shape_index": lambda x: x.view(-1, x.shape[-1]),
    "product": lambda x: x.view(x.shape[0] * x.shape[1]).view(len(x), -1),
    "numel": lambda x: x.view(x.numel()).view(x.shape),
    "compared": lambda x: x if x.shape[1] > 0 and x.shape == x.shape[:1] + x.shape[1:] else -x,
    "fresh": lambda x: x + torch.zeros(x.shape, dtype=x.dtype) + x.new_zeros(x.size(1)),
    "expanded": lambda x: x.sum(1, keepdim=True).mul(0).expand(-1, x.size(1)) + x,
    "elements": lambda x: x.view(-1, x.numel() // len(x)),
    "sliced": lambda x: torch.cat([x[:, x.size(1) // 2 :], x[:, : x.size(1) // 2]], 1),
}

CALCULATED: dict[str, Callable[[Tensor], Tensor]] = {
    "root": lambda x: x / x.size(-1) ** 0.5,
    "sqrt": lambda x: x / math.sqrt(x.shape[1]),
    "factor": lambda x: x * x.size(1),
    "behind": lambda x: x.size(1) * x,
    "sum": lambda x: x + x.size(dim=1),
    "filled": lambda x: x * torch.full_like(x, x.shape[-1]),
    "keyword": lambda x: torch.add(x, x, alpha=x.size(1)),
    "tensor": lambda x: x / torch.tensor(float(x.size(1))).to(x),
    "mean": lambda x: x - x.sum().div(x.numel()) * 0.1,
    "elements": lambda x: x * (torch.numel(x) / len(x)),
    "half": lambda x: x * (x.size(1) // 2) ** -0.5,
    "divisor": lambda x: x * float(17 // x.size(1)),
}


def between(function: Callable[[Tensor], Tensor]) -> nn.Module:
    return build(lambda: Net(lambda n, x: n.b(function(n.a(x).tanh())), a=nn.Linear(3, 8), b=nn.Linear(8, 2)))


@pytest.mark.parametrize("name", SIZE_READS)
def test_a_size_that_is_read_from_a_tensor_may_shrink(name: str) -> None:
    model, x = between(SIZE_READS[name]), inputs((3,))
    assert [(g.size, g.exact) for g in find_groups(model, x).prunable] == [(8, True)]
    dense = copy.deepcopy(model)
    plan = prune_neurons(model, x, 0.5)
    assert model.a.out_features == 4
    assert_same_outputs(model, masked_twin(dense, plan.kept), x, inputs((3,), 5), modes=("train",))


@pytest.mark.parametrize("name", CALCULATED)
def test_a_size_that_is_calculated_with_makes_the_removal_approximate(name: str) -> None:
    model, x = between(CALCULATED[name]), inputs((3,))
    assert [(g.size, g.exact) for g in find_groups(model, x).prunable] == [(8, False)]
    plan = prune_neurons(model, x, 0.5)
    assert plan.approximate == {"a": "calculates with its size in the model itself"}
    assert model(x).shape == (2, 2)


HIDDEN: dict[str, Callable[[Tensor], Tensor]] = {
    "float_first": lambda x: x * (1.0 / x.size(1)),
    "float_to_the_power": lambda x: x * 0.9 ** x.size(1),
    "log": lambda x: x * math.log(x.size(1)),
    "numpy": lambda x: x / np.log2(x.size(1)),
    "length": lambda x: x / len(x.transpose(0, 1)),
    "integer": lambda x: x / int(x.size(1)),
    "one_more": lambda x: x * (x.size(1) + 1),
    "product": lambda x: x / math.prod(x.shape),
    "filled": lambda x: x / x.new_full((1,), x.size(1)),
    "fill": lambda x: x / torch.empty(1).fill_(x.size(1)),
    "tensor": lambda x: x / torch.tensor(int(x.size(1))),
    "compared": lambda x: x * (x.size(1) == 8),
    "at_most": lambda x: x / min(x.size(1), 6),
}


@pytest.mark.parametrize("name", HIDDEN)
def test_a_calculation_that_python_hides_is_found_by_comparing(name: str) -> None:
    """A float asks an integer for its value past `Number`, and so does `math.log`; sums of integers tell nothing."""
    model = between(HIDDEN[name])
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(PruningError, match=r"approximate: calculates with its size in the model itself"):
        prune_neurons(model, inputs((3,)), 0.5, exact_only=True)
    assert all(map(torch.equal, model.state_dict().values(), before.values()))
    plan = prune_neurons(model, inputs((3,)), 0.5)
    assert plan.approximate == {"a": "calculates with its size in the model itself"}
    assert model.a.out_features == 4


UNSEEN: dict[str, Callable[[Tensor], Tensor]] = {
    "before_a_norm": lambda x: F.layer_norm(x.sum(1, True) * (1.0 / x.size(1)) * torch.arange(1.0, 9).to(x), (8,)),
    "at_most": lambda x: x.clamp(max=10.0 * int(x.size(1))),
    "threshold": lambda x: F.threshold(x, -float(len(x.T)), 0.0),
    "times_nothing": lambda x: x + 0 * x / int(x.size(1)),
    "whole": lambda x: x.clamp(max=torch.tensor(10 * int(x.size(1)))),
    "filled": lambda x: x.clamp(max=torch.full((1,), 10.0 * int(x.size(1)))),
    "list": lambda x: x.clamp(max=torch.tensor([10 * int(x.size(1))])),
    "converted": lambda x: x.clamp(max=torch.tensor(10 * int(x.size(1))).to(x)),
    "doubled": lambda x: torch.min(x, torch.tensor(10 * int(x.size(1))).double().sqrt()),
    "typed": lambda x: x.clamp(max=torch.tensor(10 * int(x.size(1)), dtype=x.dtype)),
    "array": lambda x: x.clamp(max=torch.tensor(np.array([10.0 * x.size(1)]))),
    "scalar": lambda x: x.clamp(max=torch.scalar_tensor(10 * int(x.size(1)))),
    "hardtanh": lambda x: F.hardtanh(x, -10 * int(x.size(1)), 10 * int(x.size(1))),
    "slope": lambda x: F.leaky_relu(x.abs(), int(x.size(1))),
    "upcast_before": lambda x: x.float().to(x).clamp(max=10.0 * int(x.size(1))),
    "complex": lambda x: x + 0 * (x * complex(0, 1 / int(x.size(1)))).imag,
}


@pytest.mark.parametrize("name", UNSEEN)
def test_a_calculation_that_the_example_inputs_do_not_show_is_found_as_well(name: str) -> None:
    model = between(UNSEEN[name])
    with pytest.raises(PruningError, match=r"approximate: calculates with its size in the model itself"):
        prune_neurons(model, inputs((3,)), 0.5, exact_only=True)
    assert prune_neurons(model, inputs((3,)), 0.5).approximate == {"a": "calculates with its size in the model itself"}


@pytest.mark.parametrize(
    "same",
    [
        lambda x: x[:, torch.arange(x.size(1)).flip(0) + 0 * x.size(1)],
        lambda x: x.clamp(max=x.abs().sum().item()) / (1.0 + float(x.abs().sum())),
        lambda x: x * x.new_full((x.size(1),), 0.5),
        lambda x: x.clamp(max=float(x.detach().numpy().sum() ** 2) + 10),
        lambda x: x.clamp(max=10 + np.asarray(x.detach()).sum() ** 2),
    ],
    ids=["places", "of_values", "of_its_size", "by_numpy", "as_array"],
)
def test_numbers_that_may_differ_are_not_taken_for_sizes(same: Callable[[Tensor], Tensor]) -> None:
    plan = prune_neurons(between(same), inputs((3,)), 0.5, exact_only=True)
    assert plan.kept["a.weight"]


class Hidden(nn.Module):
    """Calculates with a size past `Number`."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (2.0 / x.size(1))


def test_only_the_group_that_is_calculated_with_becomes_approximate() -> None:
    layers = [nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 8), Hidden(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2)]
    model, x = build(lambda: nn.Sequential(*layers)), inputs((3,))
    plan = prune_neurons(copy.deepcopy(model), x, 0.5, scope="layer")
    assert plan.approximate == {"2": "calculates with its size in 3"}
    dense = copy.deepcopy(model)
    plan = prune_neurons(model, x, 0.5, scope="layer", exact_only=True)
    assert [layer.out_features for layer in model if isinstance(layer, nn.Linear)] == [4, 8, 4, 2]
    assert_same_outputs(model, masked_twin(dense, plan.kept), x, inputs((3,), 5), modes=("train",))


def test_it_is_found_beside_a_group_that_can_not_be_compared() -> None:
    layers = [nn.Linear(3, 8), nn.Softmax(1), nn.Linear(8, 8), Hidden(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2)]
    plan = prune_neurons(build(lambda: nn.Sequential(*layers)), inputs((3,)), 0.5, scope="layer")
    assert plan.approximate == {"0": "_softmax in 1", "2": "calculates with its size in 3"}


def test_a_run_that_takes_another_way_is_left_alone() -> None:
    model = between(lambda x: x * 2 if x.size(1) > 6 else x)
    with pytest.raises(PruningError, match="its removal fails: output 0 differs"):
        prune_neurons(model, inputs((3,)), 0.5)


def test_an_attribute_that_a_size_is_compared_with_follows() -> None:
    """Two layers of the same size: no name could tell which of them it is about."""

    def run(net: Any, x: Tensor) -> Tensor:
        h = net.a(x).tanh()
        if h.size(1) != net.n or net.sizes[1] != h.shape[1]:
            raise ValueError(f"expected {net.n} features")
        return net.c(net.b(h).tanh())

    def make() -> nn.Module:
        net = Net(run, a=nn.Linear(3, 8), b=nn.Linear(8, 8), c=nn.Linear(8, 2))
        net.n, net.sizes = 8, (3, 8)
        return net

    model, x = build(make), inputs((3,))
    dense = copy.deepcopy(model)
    plan = prune_neurons(model, x, 0.5, scope="layer")
    assert (model.n, model.sizes) == (4, (3, 4))
    assert plan.attributes[""] == {"n": (8, 4), "sizes": ((3, 8), (3, 4))}
    assert_same_outputs(model, masked_twin(dense, plan.kept), x, inputs((3,), 5), modes=("train",))


# Integers that modules hold, in a removal


def attribute_net(run: Callable[[Any, Tensor], Tensor], **held: Any) -> nn.Module:
    def make() -> nn.Module:
        net = Net(run, a=nn.Conv2d(3, 8, 3), b=nn.Linear(72, 6), c=nn.Linear(6, 2))
        for name, value in held.items():
            setattr(net, name, value)
        return net

    return build(make)


def check(model: nn.Module, x: Tensor, amounts: tuple[float, ...] = (0.3, 0.3)) -> Plan:
    """Steps equal masking, the plan replays on the dense model, and is taken back."""
    dense, plan = copy.deepcopy(model), Plan({}, {})
    for amount in amounts:
        plan = plan.then(prune_neurons(model, x, amount, scope="layer"))
    assert_same_outputs(model, masked_twin(dense, plan.kept), x, inputs(IMAGE, 5), modes=("train",))
    fresh = copy.deepcopy(dense)
    plan.apply(fresh)
    fresh.load_state_dict(model.state_dict())
    assert_same_outputs(fresh, model, x)
    assert as_held(fresh) == as_held(model)
    plan.take_back(fresh)
    assert as_held(fresh) == as_held(dense)
    return plan


def as_held(model: nn.Module) -> dict[str, Any]:
    return {
        f"{path}.{name}": value
        for path, module in model.named_modules()
        for name, value in module.__dict__.items()
        if isinstance(value, (int, tuple, list)) and not name.startswith("_")
    }


def test_an_attribute_that_is_a_size_is_changed_and_no_call_is_patched() -> None:
    run = lambda n, x: n.c(n.b(n.a(x).view(-1, n.width, 9).flatten(1)).tanh())  # noqa: E731
    model = attribute_net(run, width=8)
    plan = check(model, inputs(IMAGE))
    assert model.width == model.a.out_channels < 8
    assert plan.attributes[""] == {"width": (8, model.width)}
    assert (plan.patches, installed_patches(model)) == ((), [])


@pytest.mark.parametrize("kind", [tuple, list])
def test_an_element_of_a_tuple_or_list_is_changed_alone(kind: Any) -> None:
    run = lambda n, x: n.c(n.b(n.a(x).view(-1, *n.shape).flatten(1)).tanh())  # noqa: E731
    model = attribute_net(run, shape=kind((8, 9)))
    plan = check(model, inputs(IMAGE))
    assert model.shape == kind((model.a.out_channels, 9))
    assert plan.patches == ()


class Attention(nn.Module):
    """Self-attention that calculates its scale from a width and the number of heads, as in torchvision's Swin."""

    def __init__(self, scale_of: Callable[[Tensor, Tensor], int], heads: int = 4) -> None:
        super().__init__()
        self.n_head, self.scale_of = heads, scale_of
        self.q, self.k, self.v = (nn.Linear(16, 24 if n < 2 else 12) for n in range(3))
        self.out = nn.Linear(12, 16)
        self.bias = nn.Parameter(torch.randn(self.n_head, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        heads = [f(x).unflatten(2, (self.n_head, -1)).transpose(1, 2) for f in (self.q, self.k, self.v)]
        q = heads[0] * (self.scale_of(x, self.q(x)) // self.n_head) ** -0.5
        scores = q @ heads[1].transpose(-2, -1) + self.bias
        return x + self.out((scores.softmax(-1) @ heads[2]).transpose(1, 2).flatten(2))


@pytest.mark.parametrize(
    ("scale_of", "heads"), [(lambda x, q: x.size(-1), 4), (lambda x, q: q.size(-1), 2), (lambda x, q: 24, 4)]
)
def test_a_divisor_changes_only_where_the_quotient_stays(scale_of: Any, heads: int) -> None:
    """Heads go with their number where what it divides shrinks alike; otherwise calls are rewritten."""
    model, x = build(lambda: nn.Sequential(Attention(scale_of), nn.Linear(16, 2))), inputs((5, 16))
    assert [(g.size, g.exact) for g in find_groups(model, x).prunable] == [(4, True)]
    dense, plan = copy.deepcopy(model), Plan({}, {})
    for _ in range(2):
        plan = plan.then(prune_neurons(model, x, 0.25, exact_only=True))
    assert (len(plan.kept["0.bias"][0]), model[0].n_head, bool(plan.patches)) == (2, heads, heads == 4)
    assert_same_outputs(model, masked_twin(dense, plan.kept), x, inputs((5, 16), 3), modes=("train",))
    fresh = copy.deepcopy(dense)
    plan.apply(fresh)
    fresh.load_state_dict(model.state_dict())
    assert_same_outputs(fresh, model, x)


def test_a_divisor_that_stayed_stays_when_something_else_is_removed() -> None:
    attention = lambda: Attention(lambda x, q: x.size(-1))  # noqa: E731
    model = build(lambda: nn.Sequential(nn.Linear(5, 16), attention(), nn.Linear(16, 8), nn.Linear(8, 2)))
    x, dense, plan = inputs((5, 5)), copy.deepcopy(model), Plan({}, {})
    groups = find_groups(model, x)
    for name in ("1.q + 1.k + 1.v", "2"):
        alive = torch.ones(groups.neurons, dtype=torch.bool)
        (first,) = (r.start for g, r in zip(groups.prunable, groups.ranges, strict=True) if g.name == name)
        alive[first] = False
        plan = plan.then(remove_neurons(model, groups, alive))
        groups = groups.without(alive)
    plan = plan.then(prune_neurons(model, x, 0.3, include="2", exact_only=True))
    assert (model[1].n_head, model[2].out_features) == (4, 5)
    assert_same_outputs(model, masked_twin(dense, plan.kept), x, inputs((5, 5), 3), modes=("train",))


@pytest.mark.parametrize(
    ("scale_of", "heads", "exact"),
    [
        (lambda x, q: x.size(-1), 4, {"0 + 1.out": False, "1.q + 1.k + 1.v": True}),
        (lambda x, q: q.size(-1), 4, {"0 + 1.out": True, "1.q + 1.k + 1.v": True}),
        (lambda x, q: q.size(-1), 1, {"0 + 1.out": True, "1.q + 1.k": False, "1.v": True}),
    ],
    ids=["width", "heads", "one head"],
)
def test_what_is_divided_is_calculated_with_unless_it_shrinks_with_its_divisor(
    scale_of: Any, heads: int, exact: dict[str, bool]
) -> None:
    layers = lambda: nn.Sequential(nn.Linear(5, 16), Attention(scale_of, heads), nn.Linear(16, 2))  # noqa: E731
    model, x = build(layers), inputs((5, 5))
    groups = find_groups(model, x)
    assert {group.name: group.exact for group in groups.prunable} == exact
    reasons = {reason for group in groups.prunable for reason in group.mixing}
    assert reasons <= {"calculates with its size in 1"}
    dense = copy.deepcopy(model)
    plan = prune_neurons(model, x, 0.4, scope="layer", exact_only=True)
    assert plan.approximate == {}
    assert_same_outputs(model, masked_twin(dense, plan.kept), x, inputs((5, 5), 3), modes=("train",))
    assert set(prune_neurons(dense, x, 0.4, scope="layer").approximate) == {n for n, same in exact.items() if not same}


def test_a_multiple_of_an_attribute_follows() -> None:
    run = lambda n, x: n.c(n.b(n.a(x).view(-1, n.width * 9)).tanh())  # noqa: E731
    model = attribute_net(run, width=8)
    plan = check(model, inputs(IMAGE))
    assert model.width == model.a.out_channels < 8
    assert plan.patches == ()


def test_an_attribute_that_is_calculated_with_stays_and_the_call_is_patched() -> None:
    model, x = build(Wide), inputs(IMAGE)
    plan = check(model, x)
    assert model.width == model.conv.out_channels < 8
    assert model.fc.out_features < model.rank == 6
    assert set(plan.attributes[""]) == {"width"}
    assert {(patch.site.function, patch.size) for patch in plan.patches} == {("view", model.fc.out_features)}


def test_an_attribute_that_counts_two_things_is_left_alone_where_they_differ() -> None:
    def run(net: Any, x: Tensor) -> Tensor:
        h = net.a(x).view(-1, net.width, 9)
        return net.c(net.b(h.flatten(1)).view(-1, net.width, 1).flatten(1).tanh())

    def make() -> nn.Module:
        net = Net(run, a=nn.Conv2d(3, 8, 3), b=nn.Linear(72, 8), c=nn.Linear(8, 2))
        net.width = 8
        return net

    model, x = build(make), inputs(IMAGE)
    dense = copy.deepcopy(model)
    plan = prune_neurons(model, x, 0.5, include="b")
    assert (model.width, model.a.out_channels, model.b.out_features) == (8, 8, 4)
    assert {patch.size for patch in plan.patches} == {4}
    assert_same_outputs(model, masked_twin(dense, plan.kept), x)
    model = copy.deepcopy(dense)
    plan = prune_neurons(model, x, 0.5, scope="layer")  # both shrink alike
    assert (model.width, plan.patches) == (4, ())
    assert_same_outputs(model, masked_twin(dense, plan.kept), x)


def test_an_attribute_that_tells_a_width_tells_the_truth_though_the_forward_does_not_use_it() -> None:
    run = lambda n, x: n.c(n.b(n.a(x).flatten(1)).tanh())  # noqa: E731
    model = attribute_net(run, width=8, hidden_dim=6, magic=8, out_features=2, in_channels=3, channels=5)
    plan = check(model, inputs(IMAGE))
    assert (model.width, model.hidden_dim) == (model.a.out_channels, model.b.out_features)
    assert (model.magic, model.out_features, model.in_channels, model.channels) == (8, 2, 3, 5)
    assert set(plan.attributes[""]) == {"width", "hidden_dim"}


def test_a_width_that_could_be_one_of_two_is_left_alone() -> None:
    def make() -> nn.Module:
        net = Net(
            lambda n, x: n.c(n.b(n.a(x).flatten(1)).tanh()), a=nn.Conv2d(3, 8, 3), b=nn.Linear(72, 8), c=nn.Linear(8, 2)
        )
        net.width = 8
        return net

    model = build(make)
    prune_neurons(model, inputs(IMAGE), 0.5, include="b")
    assert (model.width, model.b.out_features) == (8, 4)


def test_numbers_are_integers() -> None:
    assert issubclass(Attribute, Number)
    assert issubclass(Number, int)
