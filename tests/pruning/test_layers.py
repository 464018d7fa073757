"""Layer removal: a model without a layer is the model in which that layer's input is its output."""

from __future__ import annotations

import copy
import json
import pickle
import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_prune import (
    NoEffectWarning,
    Plan,
    PruningError,
    count_cost,
    load_pruned,
    prune_neurons,
    remove_layers,
    save_pruned,
    shrink_kernels,
)
from lightning_prune.graph.run import as_calls
from lightning_prune.pruning.layers import drop_layers
from lightning_prune.pruning.passing import Form, PassThrough


@pytest.fixture(autouse=True)
def _precise() -> Any:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Block(nn.Module):
    """A residual block of convolutions."""

    def __init__(self, channels: int, strength: float = 1.0) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.norm2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        with torch.no_grad():
            self.norm2.weight.fill_(strength)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))))


class ResNet(nn.Module):
    """A stem, stages of blocks, a head."""

    def __init__(self, *strengths: float) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.stage = nn.Sequential(*[Block(8, strength) for strength in strengths or (1.0, 0.01, 1.0, 1.0)])
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stage(F.relu(self.stem(x))).mean((2, 3)))


class Encoder(nn.Module):
    """Transformer layers that are called with a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(5, 8), nn.Linear(8, 3)
        self.layers = nn.ModuleList(
            [nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True, norm_first=True) for _ in range(4)]
        )

    def forward(self, x: Tensor) -> Tensor:
        x, mask = self.embed(x), torch.zeros(x.size(1), x.size(1)).fill_diagonal_(float("-inf"))
        for layer in self.layers:
            x = layer(x, src_mask=mask)
        return self.head(x)


class TupleBlock(nn.Module):
    """A residual block whose input comes by name, and that gives a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 12), nn.Linear(12, 6)

    def forward(self, hidden: Tensor, scale: float = 1.0, cache: Any = None) -> tuple[Tensor, None, None]:
        return hidden + scale * self.down(torch.tanh(self.up(hidden))), None, cache


class Tuples(nn.Module):
    """Calls its blocks by keyword and by place."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.head = nn.ModuleList([TupleBlock() for _ in range(4)]), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        for number, block in enumerate(self.blocks):
            x, *_ = block(hidden=x, scale=0.5) if number % 2 else block(x, 0.5, cache=None)
        return self.head(x)


class Plain(nn.Sequential):
    """Layers of equal width without residuals."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 2))


MODELS = {
    "resnet": (ResNet, (2, 3, 8, 8)),
    "encoder": (Encoder, (2, 7, 5)),
    "tuples": (Tuples, (3, 6)),
    "plain": (Plain, (4, 5)),
}


def model_of(name: str) -> tuple[nn.Module, Tensor]:
    make, shape = MODELS[name]
    return make().eval(), torch.randn(shape)


class Skips:
    """The oracle: forwards of some modules replaced by plain functions that give the input back."""

    def __init__(self, model: nn.Module, paths: list[str]) -> None:
        self.model = copy.deepcopy(model)
        for path in paths:
            module = self.model.get_submodule(path)
            tuples = isinstance(module, TupleBlock)

            def skip(*args: Any, tuples: bool = tuples, **kwargs: Any) -> Any:
                given = args[0] if args else kwargs["hidden"]
                return (given, None, None) if tuples else given

            module.forward = skip  # type: ignore[method-assign]

    def __call__(self, x: Tensor) -> Tensor:
        return self.model(x)  # type: ignore[no-any-return]


def assert_equal(actual: Tensor, expected: Tensor) -> None:
    actual, expected = actual.detach(), expected.detach()
    assert actual.shape == expected.shape
    assert float((actual - expected).abs().max()) <= 1e-10 * float(expected.abs().max())


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_removal_equals_passing_the_input_on(name: str, verify: bool) -> None:
    model, x = model_of(name)
    dense = copy.deepcopy(model)
    plan = remove_layers(model, x, 0.3, verify=verify)
    assert plan.removed
    assert_equal(model(x), Skips(dense, list(plan.removed))(x))
    assert float((model(x) - dense(x)).detach().abs().max()) > 0
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("name", MODELS)
def test_the_plan_makes_a_fresh_model_and_takes_it_back(name: str) -> None:
    model, x = model_of(name)
    dense = copy.deepcopy(model)
    plan = Plan.from_dict(json.loads(json.dumps(remove_layers(model, x, 0.3).to_dict())))
    fresh = model_of(name)[0]
    assert not plan.made(fresh)
    plan.apply(fresh)
    assert plan.made(fresh)
    fresh.load_state_dict(model.state_dict())
    assert_equal(fresh(x), model(x))
    plan.take_back(fresh)
    fresh.load_state_dict(dense.state_dict())
    assert_equal(fresh.eval()(x), dense(x))


def test_a_plan_of_another_process_cannot_take_back() -> None:
    model, x = model_of("resnet")
    plan = Plan.from_dict(remove_layers(model, x, 0.2).to_dict())
    names = list(model.state_dict())
    with pytest.raises(PruningError, match="not known in this process"):
        plan.take_back(model)
    assert list(model.state_dict()) == names


COPIES = {
    "deepcopy": lambda model, x: copy.deepcopy(model),
    "pickle": lambda model, x: pickle.loads(pickle.dumps(model)),
    "export": lambda model, x: torch.export.export(model, (x,), strict=False).module(),
    "strict export": lambda model, x: torch.export.export(model, (x,), strict=True).module(),
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("name", MODELS)
def test_it_stays_a_plain_module(name: str, how: str) -> None:
    model, x = model_of(name)
    plan = remove_layers(model, x, 0.3)
    layers = [type(model.get_submodule(path)) for path in plan.removed]
    assert set(layers) == {nn.Identity if name in ("resnet", "plain") else PassThrough}
    assert_equal(COPIES[how](model, x)(x), model(x))


@pytest.mark.parametrize("name", MODELS)
def test_it_is_saved_and_loaded(name: str, tmp_path: Any) -> None:
    model, x = model_of(name)
    remove_layers(model, x, 0.3)
    save_pruned(model, tmp_path / "model.safetensors")
    fresh = load_pruned(tmp_path / "model.safetensors", model_of(name)[0])
    assert_equal(fresh(x), model(x))
    other = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(PruningError):
        load_pruned(tmp_path / "model.safetensors", other)
    assert type(other[0]) is nn.Linear


# -- choice and amounts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weak", range(4))
def test_the_block_that_changes_its_input_least_goes(weak: int) -> None:
    model = ResNet(*[0.01 if number == weak else 1.0 for number in range(4)]).eval()
    plan = remove_layers(model, torch.randn(2, 3, 8, 8), 0.2)
    assert list(plan.removed) == [f"stage.{weak}"]


def test_the_score_is_the_l1_norm_of_the_difference() -> None:
    model, x = Plain(), torch.randn(4, 5)
    plan = remove_layers(copy.deepcopy(model), x, 0.01)
    with torch.no_grad():
        hidden = [x]
        for layer in model:
            hidden.append(layer(hidden[-1]))
        changes = {str(i): float((hidden[i + 1] - hidden[i]).abs().sum() / hidden[i].abs().sum()) for i in (2, 4)}
    assert list(plan.removed) == [min(changes, key=lambda path: changes[path])]


@pytest.mark.parametrize("of", ["params", "macs"])
@pytest.mark.parametrize("amount", [0.05, 0.2, 0.45, 0.7, 0.9])
def test_a_budget_is_met_at_or_just_past_it(of: str, amount: float) -> None:
    model, x = model_of("resnet")
    dense = count_cost(model, x)
    before = copy.deepcopy(model)
    plan = remove_layers(model, x, amount, of=of)
    gone = 1 - getattr(count_cost(model, x), of) / getattr(dense, of)
    assert gone >= amount - 1e-9
    for path in plan.removed:  # without any one of them it would not be met
        less = copy.deepcopy(before)
        drop_layers(less, None, {other: form for other, form in plan.removed.items() if other != path})
        assert 1 - getattr(count_cost(less, x), of) / getattr(dense, of) < amount


def test_what_a_large_layer_makes_superfluous_stays() -> None:
    small, large = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 32), nn.Linear(32, 4))
    model, x = nn.Sequential(small, large, nn.Linear(4, 2)), torch.randn(5, 4)
    with torch.no_grad():
        small.weight.copy_(torch.eye(4))  # the first to go, and not enough
        small.bias.zero_()
    assert list(remove_layers(model, x, 0.5).removed) == ["1"]


def test_an_amount_out_of_reach_is_refused_with_what_can_be_reached() -> None:
    model, x = model_of("plain")
    before = list(model)
    with pytest.raises(PruningError, match=r"every layer gone that can go 0\.\d+ is gone.*\n  0: gives shape"):
        remove_layers(model, x, 0.9)
    assert list(model) == before


def test_patterns_choose_the_layers() -> None:
    model, x = model_of("resnet")
    plan = remove_layers(model, x, 0.2, include="stage.*", exclude=["stage.1", "stage.0"])
    assert {path.split(".")[1] for path in plan.removed} <= {"2", "3"}
    with pytest.raises(PruningError, match="matches no module"):
        remove_layers(model, x, 0.2, include="layer9")


def test_asking_for_nothing_warns() -> None:
    with pytest.warns(NoEffectWarning, match="asks for no layer"):
        assert not remove_layers(*model_of("resnet"), 0)


def test_random_removal_is_seeded() -> None:
    found = []
    for seed in (0, 0, 1, 2, 3, 4):
        model, x = model_of("resnet")
        torch.manual_seed(seed)
        random.seed(7)
        found.append(tuple(remove_layers(model, x, 0.2, criterion="random").removed))
    assert found[0] == found[1]
    assert len(set(found)) > 1


@pytest.mark.parametrize(
    ("options", "words"), [({"amount": 1.0}, "amount"), ({"of": "neurons"}, "'params'"), ({"criterion": "l2"}, "'l1'")]
)
def test_bad_arguments_are_refused(options: dict[str, Any], words: str) -> None:
    model, x = model_of("resnet")
    with pytest.raises(PruningError, match=words):
        remove_layers(model, x, **{"amount": 0.1} | options)


# -- what is left alone, with a reason --------------------------------------------------------------------------------


class Asks(nn.Module):
    """Reads an attribute of its first block."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.head = nn.Sequential(*[TanhBlock() for _ in range(3)]), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x) * self.blocks[0].scale)


class TanhBlock(nn.Module):
    """A residual block of one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.linear = 0.5, nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * torch.tanh(self.linear(x))


class InPlace(nn.Module):
    """Writes into what the first block gives, and uses what that took once more."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = TanhBlock(), TanhBlock(), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1.0
        y = self.one(x)
        y += 1.0
        return self.head(self.two(y) + x)


class Shares(nn.Module):
    """A block's weight is used elsewhere too."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = TanhBlock(), TanhBlock(), nn.Linear(6, 6)
        self.head.weight = self.one.linear.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.two(self.one(x)))


class TwiceNamed(nn.Module):
    """One block has two names."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = TanhBlock(), TanhBlock(), nn.Linear(6, 2)
        self.again = self.one

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.two(self.again(self.one(x))))


class Overwrites(nn.Module):
    """A block writes into its input."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Sequential(nn.ReLU(inplace=True), TanhBlock()), TanhBlock(), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.two(self.one(x * 1.0)))


class Pairs(nn.Module):
    """A block gives two tensors, a container holds one by a plain list."""

    class Two(TanhBlock):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x), x.sum()

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = self.Two(), TanhBlock(), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        y, total = self.one(x)
        return self.head(self.two(y) * total)


class Listed(nn.Module):
    """Calls its blocks through a plain list."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = TanhBlock(), TanhBlock(), nn.Linear(6, 2)
        self.plain = [self.one]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.two(self.plain[0](x)))


REFUSED = {
    "asks": (Asks, "blocks.0", "no attribute 'scale'"),
    "in place": (InPlace, "one", "differs"),
    "shares": (Shares, "one", "used elsewhere"),
    "two names": (TwiceNamed, "one", "several names"),
    "overwrites": (Overwrites, "one", "writes into its input"),
    "two tensors": (Pairs, "one", "gives a tuple"),
    "plain list": (Listed, "one", "differs"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_needed_is_left_alone(case: str) -> None:
    make, path, reason = REFUSED[case]
    model, x = make().eval(), torch.randn(3, 6)
    dense = copy.deepcopy(model)
    with torch.no_grad():  # it would be the first to go
        for each in (model, dense):
            next(m for m in each.get_submodule(path).modules() if isinstance(m, nn.Linear)).weight.mul_(1e-3)
            next(m for m in each.get_submodule(path).modules() if isinstance(m, nn.Linear)).bias.zero_()
    plan = remove_layers(model, x, 0.05)
    assert reason in plan.frozen[path]
    assert path not in plan.removed
    assert plan.removed
    assert_equal(model(x), Skips(dense, list(plan.removed))(x))


def test_a_failing_removal_leaves_everything_as_it_was() -> None:
    model, x = Asks(), torch.randn(3, 6)
    optimizer = torch.optim.Adam(model.parameters())
    model(x).sum().backward()
    optimizer.step()
    parameters, held, output = list(model.parameters()), list(optimizer.param_groups[0]["params"]), model(x)
    with pytest.raises(PruningError, match=r"Can't remove blocks\.0"):
        drop_layers(model, as_calls(x), {"blocks.0": Form()}, [optimizer])
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert all(a is b for a, b in zip(optimizer.param_groups[0]["params"], held, strict=True))
    assert set(map(id, optimizer.state)) == set(map(id, held))
    assert torch.equal(model(x), output)
    assert model.training


# -- optimizers and other surgery -------------------------------------------------------------------------------------


def test_optimizers_forget_what_is_gone() -> None:
    model, x = model_of("resnet")
    weights = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW([{"params": weights, "weight_decay": 0.1}, {"params": others}], lr=0.01)
    model(x).sum().backward()
    optimizer.step()
    before = {id(p): optimizer.state[p]["exp_avg"] for p in weights + others}
    remove_layers(model, x, 0.4, optimizer=optimizer)
    live = list(model.parameters())
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert sorted(map(id, held)) == sorted(map(id, live))
    assert sorted(map(id, optimizer.state)) == sorted(map(id, live))
    assert all(optimizer.state[p]["exp_avg"] is before[id(p)] for p in live)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.01]
    model(x).sum().backward()
    optimizer.step()


def test_an_optimizer_is_not_left_with_nothing() -> None:
    model, x = ResNet(0.01, 1.0).eval(), torch.randn(2, 3, 8, 8)
    optimizers = [torch.optim.SGD(block.parameters(), 0.1) for block in model.stage]
    optimizers.append(torch.optim.SGD([*model.stem.parameters(), *model.head.parameters()], 0.1))
    plan = remove_layers(model, x, 0.2, optimizer=optimizers)
    assert "parameters of removed layers only" in plan.frozen["stage.0"]
    assert isinstance(model.stage[0], Block)
    assert all(optimizer.param_groups[0]["params"] for optimizer in optimizers)


def test_all_kinds_of_surgery_are_one_plan() -> None:
    model, x = model_of("resnet")
    dense = copy.deepcopy(model)
    plan = prune_neurons(model, x, 0.3)
    plan = plan.then(shrink_kernels(model, x, 0.3))
    plan = plan.then(remove_layers(model, x, 0.2))
    plan = plan.then(prune_neurons(model, x, 0.3))
    fresh = model_of("resnet")[0]
    plan.apply(fresh)
    fresh.load_state_dict(model.state_dict())
    assert_equal(fresh(x), model(x))
    for each in (fresh, model):
        plan.take_back(each)
        each.load_state_dict(dense.state_dict())
        assert_equal(each(x), dense(x))
