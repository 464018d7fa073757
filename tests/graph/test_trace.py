import gc
import weakref
from typing import Any

import pytest
import torch
from networks import IMAGE, Auxiliary, Net, Snapshot, build, build_case, cases, dropouts, inputs, resnet, sequential
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_prune import PruningError, TraceError, find_groups, prune_neurons
from lightning_prune.graph.trace import Tracer


@pytest.mark.parametrize("training", [True, False])
@cases(["article", "resnet", "views", "nested", "buffers", "unused", "batch_norm_average", "batch_norm_no_statistics"])
def test_finding_groups_leaves_the_model_as_it_was(name: str, training: bool) -> None:
    model, x = build_case(name)
    model.train(training)
    next(model.children()).train(not training)
    next(model.parameters()).requires_grad_(False)
    snapshot = Snapshot(model)
    find_groups(model, x)
    snapshot.assert_unchanged()


class Restless(nn.Module):
    """Everything that a forward may change on the side."""

    def __init__(self, error: Exception | None = None) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)
        self.aux = nn.Linear(8, 2)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("average", torch.zeros(8))
        self.error = error

    def forward(self, x: Tensor) -> Any:
        self.calls += 1
        h = F.dropout(self.norm(self.a(x)), 0.5) + torch.rand(()).to(x)
        self.average = 0.9 * self.average + 0.1 * h.detach().mean(0)
        if self.error is not None:
            raise self.error
        return (self.b(h), self.aux(h)) if self.training else self.b(h)


@pytest.mark.parametrize("training", [True, False])
def test_buffers_and_random_state_come_back_whatever_the_forward_does(training: bool) -> None:
    model, x = build(Restless).train(training), inputs((3,))
    snapshot = Snapshot(model)
    find_groups(model, x)
    snapshot.assert_unchanged()


@pytest.mark.parametrize("training", [True, False])
def test_a_forward_that_fails_leaves_the_model_as_it_was(training: bool) -> None:
    model = build(lambda: Restless(RuntimeError("no such luck"))).train(training)
    x = inputs((3,))
    snapshot = Snapshot(model)
    with pytest.raises(TraceError, match=r"Restless in evaluation mode .* \[\(2, 3\)\]: no such luck"):
        find_groups(model, x)
    snapshot.assert_unchanged()


@pytest.mark.parametrize("shape", [(2, 4, 5, 5), (2, 3), (2, 3, 1, 1), (3,)])
def test_inputs_of_the_wrong_shape_leave_the_model_as_it_was(shape: tuple[int, ...]) -> None:
    model = build(sequential(nn.Conv2d(3, 8, 3), nn.Dropout(), nn.BatchNorm2d(8), nn.Conv2d(8, 2, 1))).train()
    optimizer = torch.optim.SGD(model.parameters())
    x = torch.rand(shape, dtype=torch.float64)
    snapshot = Snapshot(model, optimizer)
    with pytest.raises(TraceError, match="Give example_inputs that the model accepts") as error:
        prune_neurons(model, x, 0.5, optimizer=optimizer)
    assert str([shape]) in str(error.value)
    assert isinstance(error.value, PruningError)
    snapshot.assert_unchanged()


def test_a_failure_in_training_mode_says_so() -> None:
    class Sulks(Auxiliary):
        def forward(self, x: Tensor) -> Any:
            if self.training:
                raise ValueError("not today")
            return super().forward(x)

    model = build(Sulks)
    x, snapshot = inputs(IMAGE), Snapshot(model)
    with pytest.raises(TraceError, match=r"Sulks in training mode raised ValueError .* not today"):
        find_groups(model, x)
    snapshot.assert_unchanged()


def test_the_users_hooks_run_and_stay() -> None:
    model, x = build_case("mlp")
    heard: list[str] = []
    model[0].register_forward_pre_hook(lambda module, args: heard.append("before"))
    model[0].register_forward_hook(lambda module, args, output: heard.append("after"))
    snapshot = Snapshot(model)
    find_groups(model, x)
    assert heard == ["before", "after"]
    snapshot.assert_unchanged()


def test_a_hook_that_fails_is_reported_as_itself() -> None:
    model, x = build_case("mlp")

    def fail(module: nn.Module, args: Any) -> None:
        raise RuntimeError("hooked")

    model[2].register_forward_pre_hook(fail)
    snapshot = Snapshot(model)
    with pytest.raises(TraceError, match="hooked"):
        find_groups(model, x)
    snapshot.assert_unchanged()


def test_no_activation_stays_alive() -> None:
    seen: list[weakref.ref[Tensor]] = []

    def run(net: Any, x: Tensor) -> Tensor:
        h = net.a(x)
        seen.append(weakref.ref(h))
        out = net.b(h.relu())
        seen.append(weakref.ref(out))
        return out

    model = build(lambda: Net(run, a=nn.Linear(3, 8), b=nn.Linear(8, 2)))
    groups = find_groups(model, inputs((3,)))
    gc.collect()
    assert groups.prunable
    assert len(seen) == 2
    assert all(ref() is None for ref in seen)


def test_no_model_stays_alive() -> None:
    model = build(resnet)
    held = weakref.ref(model)
    groups = find_groups(model, inputs((3, 8, 8)))
    del model
    gc.collect()
    assert held() is None
    assert groups.prunable


def test_parameters_that_run_in_training_only_are_read_too() -> None:
    groups = find_groups(build(Auxiliary).eval(), inputs(IMAGE))
    assert "aux.weight[1] x9" in {str(part) for part in groups.prunable[0].slices}
    assert "aux.weight[0]" in {str(part) for group in groups.frozen for part in group.slices}


def test_dropout_runs_in_training_are_followed() -> None:
    """A parameter that nothing reads makes a second trace in training mode, through every kind of dropout."""
    model = build(dropouts)
    plain = [group.size for group in find_groups(model, inputs(IMAGE)).prunable]
    model.never = nn.Linear(2, 2)
    model.forward = lambda x: nn.Sequential.forward(model[:-1], x)
    assert [group.size for group in find_groups(model, inputs(IMAGE)).prunable] == plain == [8, 6]


def test_a_tracer_can_watch_several_runs() -> None:
    """Labels of two runs are united: what only one of them reads is known afterwards."""
    model = build(lambda: Net(lambda n, x, head: getattr(n, head)(n.body(x)), body=nn.Linear(3, 6),
                              first=nn.Linear(6, 2), second=nn.Linear(6, 4)))  # fmt: skip
    tracer = Tracer(model)
    with torch.no_grad():
        for head in ("first", "second"):
            with tracer.watch():
                model(inputs((3,)), head)
    from lightning_prune.graph.groups import draw_groups

    group = draw_groups(tracer.trace).prunable[0]
    assert [str(s) for s in group.slices] == [
        "body.weight[0]", "body.bias[0]", "first.weight[1]", "second.weight[1]",
    ]  # fmt: skip
