"""Sensitivity: a metric with parts of each group masked, against masking by hand."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from networks import Net, Residual, Snapshot, build, inputs, sequential
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchmetrics import Accuracy, MeanMetric, MeanSquaredError, Metric

from lightning_prune import PruningError, Sensitivity, sensitivity
from lightning_prune.pruning.sensitivity import RATIOS

CLASSES = 3


def net() -> nn.Module:
    """Two groups: 0 (8 neurons) and 3 (6 neurons), with a norm and a dropout between."""
    layers = [nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 6), nn.Tanh(), nn.Dropout(0.5)]
    return nn.Sequential(*layers, nn.Linear(6, CLASSES))


def pairs(*sizes: int) -> list[tuple[Tensor, Tensor]]:
    """Batches of these sizes, with labels."""
    generator = torch.Generator().manual_seed(3)
    return [
        (inputs((4,), size, seed), torch.randint(CLASSES, (size,), generator=generator))
        for seed, size in enumerate(sizes)
    ]


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits.argmax(1) == labels).double().mean()


SLICES = {
    "0": [("0.weight", 0), ("0.bias", 0), ("1.weight", 0), ("1.bias", 0), ("3.weight", 1)],
    "3": [("3.weight", 0), ("3.bias", 0), ("6.weight", 1)],
}


@torch.no_grad()
def masked(model: nn.Module, key: str, count: int) -> nn.Module:
    """A copy in evaluation mode, in which the ``count`` neurons of the smallest L1 norm are zero."""
    twin = copy.deepcopy(model).eval()
    tensors = dict(twin.named_parameters())
    size = tensors[f"{key[0]}.weight"].size(0)
    norms = [sum(float(tensors[n].select(d, i).abs().sum()) for n, d in SLICES[key]) for i in range(size)]
    for i in sorted(range(size), key=norms.__getitem__)[:count]:
        for name, dim in SLICES[key]:
            tensors[name].select(dim, i).zero_()
    return twin


def by_hand(
    model: nn.Module, batches: list[Any], ratios: tuple[float, ...], metric: Any
) -> dict[str, dict[float, float]]:
    def value(twin: nn.Module) -> float:
        with torch.no_grad():
            outputs = torch.cat([twin(x) for x, _ in batches])
        return float(metric(outputs, torch.cat([y for _, y in batches])))

    sizes = {"0": 8, "3": 6}
    return {k: {r: value(masked(model, k, round(r * size))) for r in ratios} for k, size in sizes.items()}


def assert_values(found: Sensitivity, expected: dict[str, dict[float, float]]) -> None:
    assert found.values.keys() == expected.keys()
    for key, row in expected.items():
        assert found.values[key] == pytest.approx(row, rel=1e-9)


RATIO = (0.125, 0.5, 0.9)


@pytest.mark.parametrize("metric", [F.cross_entropy, accuracy], ids=["cross_entropy", "accuracy"])
def test_values_are_those_of_masking_by_hand(metric: Any) -> None:
    """The mean over batches counts each by its number of targets."""
    model, given = build(net), [x for x, _ in pairs(5, 9, 2)]
    with torch.no_grad():  # every class has its share, and the model as it is is right
        model[6].bias -= copy.deepcopy(model).eval()(torch.cat(given)).mean(0)
        batches = [(x, copy.deepcopy(model).eval()(x).argmax(1)) for x in given]
    found = sensitivity(model, batches, metric, ratios=RATIO)
    assert_values(found, by_hand(model, batches, RATIO, metric))
    whole = torch.cat([copy.deepcopy(model).eval()(x) for x, _ in batches]).detach()
    assert found.base == pytest.approx(float(metric(whole, torch.cat([y for _, y in batches]))), rel=1e-9)
    assert found.metric == metric.__name__
    assert len({value for row in found.values.values() for value in row.values()}) > 1


def test_ratios_are_nine_unless_given() -> None:
    found = sensitivity(build(net), pairs(4), accuracy)
    assert all(tuple(row) == RATIOS == (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9) for row in found.values.values())


def test_a_torchmetrics_metric_is_computed_over_all_batches() -> None:
    """Not a mean of batches: an accuracy per class is not linear in them."""
    model, batches = build(net), pairs(5, 9, 2)
    metric = Accuracy("multiclass", num_classes=CLASSES, average="macro")
    oracle = Accuracy("multiclass", num_classes=CLASSES, average="macro")
    found = sensitivity(model, batches, metric, ratios=RATIO)
    assert_values(found, by_hand(model, batches, RATIO, oracle))
    assert found.metric == "MulticlassAccuracy"
    assert metric._update_count == 0  # left as it was
    again = sensitivity(model, batches, metric, ratios=RATIO)
    assert again == found


def test_what_a_metric_has_seen_before_does_not_count() -> None:
    model, batches = build(net), [(x, F.one_hot(y, CLASSES).double()) for x, y in pairs(5, 3)]
    used = MeanSquaredError()
    used.update(torch.full((4, 3), 100.0), torch.zeros(4, 3))
    assert sensitivity(model, batches, used, ratios=[0.5]) == sensitivity(
        model, batches, MeanSquaredError(), ratios=[0.5]
    )


@pytest.mark.parametrize(
    ("criterion", "kept"),
    [("l2", None), ("activation", None), ("bn_scale", {"0"}), ("random", None), (lambda rows: rows.sum(1), None)],
)
def test_criteria_decide_what_goes_first(criterion: Any, kept: set[str] | None) -> None:
    model, batches = build(net), pairs(6)
    found = sensitivity(model, batches, accuracy, criterion=criterion, ratios=[0.5])
    assert set(found.values) == (kept or {"0", "3"})


def test_a_planted_neuron_goes_first() -> None:
    """One that says nothing may go at no cost, by a criterion that sees it."""
    model, batches = build(net), pairs(16)
    with torch.no_grad():
        model[3].weight[4] *= 100
        model[3].bias[4] = 50
        model[6].weight[:, 4] = 0

    def outgoing(rows: Tensor) -> Tensor:
        return rows.abs().sum(1) if rows.size(1) == CLASSES else torch.zeros(len(rows), dtype=torch.float64)

    found = sensitivity(model, batches, F.cross_entropy, criterion=outgoing, include="3", ratios=[1 / 6, 2 / 6])
    assert found.values["3"][1 / 6] == pytest.approx(found.base, rel=1e-12)
    assert found.values["3"][2 / 6] != pytest.approx(found.base, rel=1e-6)


def test_taylor_takes_the_gradients_that_are_there() -> None:
    model, batches = build(net), pairs(6)
    snapshot = Snapshot(model)
    with pytest.raises(PruningError, match="criterion 'taylor' needs gradients"):
        sensitivity(model, batches, accuracy, criterion="taylor")
    snapshot.assert_unchanged()
    F.cross_entropy(model.eval()(batches[0][0]), batches[0][1]).backward()
    assert set(sensitivity(model, batches, accuracy, criterion="taylor").values) == {"0", "3"}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("criterion", ["l1", "activation", "geometric_median"])
def test_the_model_is_what_it_was(training: bool, criterion: str) -> None:
    model = build(net).train(training)
    model[1].train(not training)
    modes = [module.training for module in model.modules()]
    F.cross_entropy(model(pairs(5)[0][0]), pairs(5)[0][1]).backward()
    optimizer = torch.optim.Adam(model.parameters())
    optimizer.step()
    snapshot = Snapshot(model, optimizer)
    sensitivity(model, pairs(5, 4), F.cross_entropy, criterion=criterion)
    snapshot.assert_unchanged()
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_metric_that_raises_leaves_the_model_too() -> None:
    model = build(net).train()
    seen: list[int] = []

    def bad(output: Tensor, target: Tensor) -> float:
        seen.append(len(output))
        return 1.0 if len(seen) < 3 else 1 / 0

    snapshot = Snapshot(model)
    with pytest.raises(ZeroDivisionError):
        sensitivity(model, pairs(5), bad)
    snapshot.assert_unchanged()


def test_no_gradient_is_kept() -> None:
    grads: list[bool] = []

    def note(output: Tensor, target: Tensor) -> float:
        grads.append(output.requires_grad)
        return 0.0

    sensitivity(build(net), pairs(3), note, ratios=[0.5])
    assert grads == [False] * 3


# Batches


def test_a_data_loader_will_do() -> None:
    model = build(net)
    (x, y), *_ = pairs(14)
    loader = DataLoader(TensorDataset(x, y), batch_size=4)
    assert_values(sensitivity(model, loader, accuracy, ratios=RATIO), by_hand(model, [(x, y)], RATIO, accuracy))


def test_a_generator_will_do() -> None:
    model, batches = build(net), pairs(4, 6)
    found = sensitivity(model, (batch for batch in batches), accuracy, ratios=RATIO)
    assert found == sensitivity(model, batches, accuracy, ratios=RATIO)


class Dicts(Dataset[Any]):
    """Examples of two named inputs."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Any:
        return {"image": self.x[index], "scale": self.x[index, :1]}, self.y[index]


def two_inputs() -> nn.Module:
    layers = {"a": nn.Linear(4, 8), "b": nn.Linear(8, CLASSES)}
    return Net(lambda n, image, scale: n.b((n.a(image) * scale).tanh()), **layers)


@pytest.mark.parametrize("kind", ["dict", "tuple", "list", "loader"])
def test_several_inputs_by_name_or_place(kind: str) -> None:
    model = build(two_inputs)
    (x, y), *_ = pairs(12)
    given: Any = {
        "dict": [({"image": x, "scale": x[:, :1]}, y)],
        "tuple": [((x, x[:, :1]), y)],
        "list": [[[x, x[:, :1]], y]],
        "loader": DataLoader(Dicts(x, y), batch_size=5),
    }[kind]
    found = sensitivity(model, given, F.cross_entropy, ratios=[0.5])
    with torch.no_grad():
        norms = model.a.weight.abs().sum(1) + model.a.bias.abs() + model.b.weight.abs().sum(0)
        twin = copy.deepcopy(model)
        twin.b.weight[:, torch.argsort(norms)[:4]] = 0
        expected = [float(F.cross_entropy(m(x, x[:, :1]), y)) for m in (model, twin)]
    assert [found.base, found.values["a"][0.5]] == pytest.approx(expected, rel=1e-9)


def test_outputs_and_targets_of_any_kind() -> None:
    """A dict of outputs; targets that are no tensor count as one."""
    layers = {"a": nn.Linear(4, 8), "b": nn.Linear(8, 2)}
    model = build(lambda: Net(lambda n, x: {"out": n.b(n.a(x).tanh())}, **layers))

    def metric(output: Any, target: Any) -> float:
        return float(output["out"].abs().mean()) * target["weight"]

    batches = [(inputs((4,), 3, seed), {"weight": weight}) for seed, weight in enumerate((1.0, 3.0))]
    with torch.no_grad():
        expected = sum(float(model(x)["out"].abs().mean()) * y["weight"] for x, y in batches) / 2
    assert sensitivity(model, batches, metric, ratios=[0.5]).base == pytest.approx(expected, rel=1e-12)


def test_groups_can_be_picked() -> None:
    layers = [nn.Linear(4, 6), Residual(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6)), nn.Linear(6, CLASSES)]
    model, batches = build(sequential(*layers)), pairs(5)
    keys = {"0 + 1.body.2", "1.body.0"}
    assert set(sensitivity(model, batches, accuracy, ratios=[0.5]).values) == keys
    assert set(sensitivity(model, batches, accuracy, ratios=[0.5], include="*.body.0").values) == {"1.body.0"}
    assert set(sensitivity(model, batches, accuracy, ratios=[0.5], exclude=["1.body.0"]).values) == {"0 + 1.body.2"}


# What it looks like


def example() -> Sensitivity:
    return sensitivity(build(net), pairs(9), accuracy, ratios=[0.25, 0.5])


class Halves(nn.Module):
    """Two layers read a half each of what one makes."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.left, self.right = nn.Linear(6, 8), nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.both(x).chunk(2, dim=-1)
        return self.left(left.relu()) + self.right(right.tanh())


def test_several_groups_of_one_layer_have_numbers() -> None:
    torch.manual_seed(0)
    batches = [(torch.randn(16, 6), torch.randint(3, (16,)))]
    assert list(sensitivity(Halves(), batches, accuracy, ratios=[0.5]).values) == ["both#0", "both#1"]


def test_as_plain_data() -> None:
    found = example()
    data = found.to_dict()
    assert data == {"metric": "accuracy", "base": found.base, "values": found.values}
    assert Sensitivity(**data) == found
    data["values"]["0"][0.25] = -1.0
    assert found.values["0"][0.25] != -1.0


def test_as_text() -> None:
    found = Sensitivity("accuracy", 0.75, {"0": {0.25: 0.5, 0.5: 0.125}, "layer.conv": {0.5: 1e-05}})
    first, ratios, *rows = str(found).splitlines()
    assert first == "accuracy 0.75 as it is; with a part of one group masked:"
    assert ratios.split() == ["0.25", "0.5"]
    assert [row.split() for row in rows] == [["0", "0.5", "0.125"], ["layer.conv", "1e-05"]]
    assert len({len(line) for line in (ratios, *rows)}) == 1  # columns add up
    assert str(example()).startswith("accuracy 0.")


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_as_a_plot(ending: str, tmp_path: Path) -> None:
    found, path = example(), tmp_path / f"plot.{ending}"
    figure = found.plot(path)
    assert isinstance(figure, Figure)
    assert path.stat().st_size > 1000
    (axes,) = figure.axes
    curves = {line.get_label(): line for line in axes.get_lines()}
    assert list(curves) == ["0", "3", "nothing masked"]
    for key, row in found.values.items():
        assert dict(zip(*curves[key].get_data(), strict=True)) == row
    assert set(curves["nothing masked"].get_ydata()) == {found.base}
    assert axes.get_ylabel() == "accuracy"


def test_a_plot_is_written_only_where_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert isinstance(example().plot(), Figure)
    example().plot(str(tmp_path / "text.png"))
    assert [path.name for path in tmp_path.iterdir()] == ["text.png"]


def test_a_plot_without_matplotlib_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(PruningError, match=r"a plot needs matplotlib: pip install \"lightning-prune\[plots\]\""):
        example().plot()


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batches": []}, "batches is empty"),
        ({"batches": [inputs((4,), 3)]}, "each batch must be a pair: what the model takes, and the target"),
        ({"batches": [(inputs((4,), 3),)]}, "each batch must be a pair"),
        ({"batches": [{"x": inputs((4,), 3), "y": 1}]}, "each batch must be a pair"),
        ({"batches": [(3, 4)]}, "example_inputs must be a tensor"),
        ({"batches": [(inputs((4,), 0), torch.zeros(0))]}, "a batch of no example"),
        ({"batches": [(inputs((5,), 3), torch.zeros(3))]}, "raised RuntimeError on inputs of shapes"),
        ({"metric": "accuracy"}, "metric must be a torchmetrics metric or a function .* got 'accuracy'"),
        ({"metric": None}, "metric must be"),
        ({"ratios": []}, r"ratios must be fractions in \(0, 1\), got \[\]"),
        ({"ratios": [0.5, 1.0]}, "ratios must be fractions"),
        ({"ratios": [0.0]}, "ratios must be fractions"),
        ({"ratios": [50]}, "ratios must be fractions"),
        ({"ratios": ["half"]}, "ratios must be fractions"),
        ({"ratios": [float("nan")]}, "ratios must be fractions"),
        ({"criterion": "accuracy"}, "unknown criterion 'accuracy'; choose from activation, bn_scale"),
        ({"include": "nothing"}, "the pattern 'nothing' matches no module"),
        ({"exclude": ["6"]}, "the pattern '6' matches no module"),
        ({"exclude": "*"}, "no neuron of this model can be pruned"),
        ({"criterion": "bn_scale", "include": "3"}, "no neuron of this model can be pruned"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict[str, Any], message: str) -> None:
    model = build(net)
    snapshot = Snapshot(model)
    batches = options.pop("batches", pairs(4))
    with pytest.raises(PruningError, match=message):
        sensitivity(model, batches, options.pop("metric", accuracy), **options)
    snapshot.assert_unchanged()


def test_a_class_of_metrics_is_no_metric() -> None:
    """An easy slip: the class, not an object of it."""
    model = build(net)
    with pytest.raises((PruningError, TypeError)):
        sensitivity(model, pairs(4), MeanMetric)
    assert isinstance(MeanMetric(), Metric)
