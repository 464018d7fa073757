import copy
import io
import json
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import Literal, Snapshot, assert_same_outputs, build, build_case, cases, inputs
from torch import nn

from lightning_prune import Plan, PruningError, prune_neurons
from lightning_prune.graph.callsites import CallSite, SizePatch, installed_patches
from lightning_prune.pruning.surgery import named_tensors

NAMES = ["article", "resnet", "views", "nested", "concat_input", "tied_square", "depthwise2d", "buffers", "batch_norm"]
NAMES += [
    "attributes",
    "heads",
    "attention",
    "grouped",
    "grouped_transposed",
    "group_norm",
    "cut",
    "shuffle",
    "picked",
    "lstm",
]


def pruned(name: str) -> tuple[nn.Module, nn.Module, torch.Tensor, Plan]:
    model, x = build_case(name)
    dense = copy.deepcopy(model)
    return dense, model, x, prune_neurons(model, x, 0.2).then(prune_neurons(model, x, 0.3))


@cases(NAMES)
def test_a_plan_gives_a_fresh_model_the_same_architecture_and_weights(name: str) -> None:
    dense, model, x, plan = pruned(name)
    fresh = build_case(name)[0]
    plan.apply(fresh)
    assert repr(fresh) == repr(model)
    assert installed_patches(fresh) == installed_patches(model)
    assert_same_outputs(fresh, model, x)
    other = copy.deepcopy(dense)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.normal_()
    plan.apply(other)
    other.load_state_dict(model.state_dict())
    assert_same_outputs(other, model, x)


@cases(NAMES)
def test_a_plan_that_is_taken_back_gives_the_dense_architecture(name: str) -> None:
    dense, model, x, plan = pruned(name)
    plan.take_back(model)
    assert repr(model) == repr(dense)
    assert installed_patches(model) == []
    assert sizes(model) == sizes(dense)
    with torch.no_grad():
        for name, tensor in named_tensors(model).items():  # also those that are in no state dict
            tensor.copy_(named_tensors(dense)[name])
    assert_same_outputs(model, dense, x)


def sizes(model: nn.Module) -> dict[str, Any]:
    """Shapes of tensors, and all integers that modules hold."""
    shapes: dict[str, Any] = {name: tensor.shape for name, tensor in named_tensors(model).items()}
    for path, module in model.named_modules():
        held = {key: value for key, value in module.__dict__.items() if isinstance(value, (int, tuple, list))}
        shapes |= {f"{path}.{key}": value for key, value in held.items() if "_flat_weight" not in key}
    return shapes


def test_buffers_of_indices_count_anew() -> None:
    """What they point at, and the ones that pointed at what is gone."""
    dense, model, _, plan = pruned("picked")
    order, left = dense.order.tolist(), plan.kept["a.weight"][0]
    assert plan.counts == {"order": left}
    assert model.order.tolist() == [left.index(i) for i in order if i in left]
    assert plan.kept["order"] == {0: [at for at, i in enumerate(order) if i in left]}
    assert model.order.dtype is torch.int64


@cases(NAMES)
def test_json_pickle_and_torch_load_bring_a_plan_back(name: str) -> None:
    plan = pruned(name)[3]
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    assert pickle.loads(pickle.dumps(plan)) == plan
    file = io.BytesIO()
    torch.save(plan.to_dict(), file)
    file.seek(0)
    assert Plan.from_dict(torch.load(file, weights_only=True)) == plan


def test_a_plan_is_plain_data() -> None:
    def check(value: Any) -> None:
        assert type(value) in (dict, list, str, int)
        if isinstance(value, dict):
            assert all(type(key) is str for key in value)
            value = list(value.values())
        for item in value if isinstance(value, list) else ():
            check(item)

    check(pruned("article")[3].to_dict())


def test_a_plan_says_what_happened() -> None:
    model, x = build_case("article")
    plan = prune_neurons(model, x, 0.5)
    assert plan.shapes["conv1.weight"] == [6, 3, 5, 5]
    assert list(model.conv2.weight.shape[:2]) == [len(plan.kept["conv2.weight"][dim]) for dim in (0, 1)]
    channels = plan.kept["conv2.weight"][0]
    assert plan.kept["fc1.weight"][1] == [25 * c + i for c in channels for i in range(25)]
    assert plan.kept["conv2.bias"] == {0: channels}
    assert plan.patches == (SizePatch(CallSite("", "view", 0), 1, 25 * len(channels)),)
    assert plan.attributes["conv1"] == {"out_channels": (6, model.conv1.out_channels)}
    assert plan.frozen["fc3.weight[0]"] == "reaches the model's output"
    assert plan.approximate == {}


@cases(["article", "views", "resnet"])
def test_applying_a_plan_to_another_model_is_an_error_and_changes_nothing(name: str) -> None:
    dense, model, _, plan = pruned(name)
    for wrong in (nn.Linear(2, 3), build_case("mlp")[0], model):
        snapshot = Snapshot(wrong)
        with pytest.raises(PruningError, match=r"the plan (expects|keeps part of)"):
            plan.apply(wrong)
        snapshot.assert_unchanged()
    snapshot = Snapshot(dense)
    patch = SizePatch(CallSite("no.such", "view", 0), 0, 1)
    with pytest.raises(PruningError, match=r"no module 'no\.such'"):
        Plan(plan.kept, plan.shapes, patches=(patch,)).apply(dense)
    with pytest.raises(PruningError):
        Plan({**plan.kept, "other": {0: [1]}}, plan.shapes).apply(dense)
    with pytest.raises(PruningError):
        Plan({next(iter(plan.kept)): {7: [0]}}, plan.shapes).apply(dense)
    snapshot.assert_unchanged()


def test_then_is_associative_and_the_empty_plan_is_neutral() -> None:
    model, x = build_case("article")
    a, b, c = (prune_neurons(model, x, 0.2) for _ in range(3))
    assert a.then(b).then(c) == a.then(b.then(c))
    empty = Plan({}, {})
    assert empty.then(a) == a
    assert a.then(Plan({}, {}, frozen=a.frozen)) == a
    assert not empty
    assert a


def test_a_plan_of_an_untouched_dimension_names_nothing_twice() -> None:
    model = build(Literal)
    plan = prune_neurons(model, inputs((3, 8, 8)), 0.5)
    assert set(plan.kept) == {"conv.weight", "conv.bias", "fc.weight"} == set(plan.shapes)
    assert {name: list(dims) for name, dims in plan.kept.items()} == {
        "conv.weight": [0],
        "conv.bias": [0],
        "fc.weight": [1],
    }


WHOLE = {"kept": {}, "shapes": {}, "attributes": {}, "patches": [], "approximate": {}, "frozen": {}}


@pytest.mark.parametrize(
    "data",
    [
        None,
        3,
        "text",
        [],
        {},
        {key: value for key, value in WHOLE.items() if key != "shapes"},
        WHOLE | {"kept": []},
        WHOLE | {"kept": {"w": [1]}},
        WHOLE | {"kept": {"w": {"zero": [1]}}},
        WHOLE | {"kept": {"w": {"0": ["x"]}}},
        WHOLE | {"kept": {"w": {"0": [float("inf")]}}},
        WHOLE | {"shapes": {"w": 3}},
        WHOLE | {"shapes": None},
        WHOLE | {"attributes": {"w": {"in_features": [3]}}},
        WHOLE | {"attributes": 3},
        WHOLE | {"patches": [3]},
        WHOLE | {"patches": [{"module": "", "function": "view"}]},
        WHOLE | {"patches": [{"module": "", "function": "exec", "call": 0, "dim": 0, "size": 1}]},
        WHOLE | {"patches": [{"module": "", "function": ["view"], "call": 0, "dim": 0, "size": 1}]},
        WHOLE | {"patches": [{"module": "", "function": "view", "call": "x", "dim": 0, "size": 1}]},
        WHOLE | {"patches": [{"module": "", "function": "view", "call": 0, "dim": None, "size": 1}]},
        WHOLE | {"approximate": 3},
        WHOLE | {"counts": 3},
        WHOLE | {"counts": {"order": 3}},
        WHOLE | {"counts": {"order": ["x"]}},
        WHOLE | {"patches": [{"module": "", "function": "view", "call": 0, "dim": 0, "size": 1, "before": "x"}]},
        WHOLE | {"attributes": {"w": {"shape": [["x"], [1]]}}},
        WHOLE | {"frozen": "text"},
    ],
    ids=str,
)
def test_what_is_no_plan_is_refused(data: Any) -> None:
    assert Plan.from_dict(WHOLE) == Plan({}, {})
    with pytest.raises(PruningError, match="not a plan"):
        Plan.from_dict(data)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@given(st.fixed_dictionaries({}, optional=dict.fromkeys(WHOLE, json_values)))
def test_any_json_is_a_plan_or_refused(data: Any) -> None:
    try:
        plan = Plan.from_dict(WHOLE | data)
    except PruningError:
        return
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
