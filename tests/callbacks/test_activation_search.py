"""ActivationSearch: the right function is found, stays in a plain module, and survives whatever happens."""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import ddp_search
import pytest
import torch
from ddp_cases import run_script
from lightning.pytorch import callbacks as lightning_callbacks
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_modules import (
    ADAMW,
    IMAGE,
    LIGHTNING_WARNINGS,
    EncoderDecoder,
    LateLayers,
    Manual,
    Residual,
    SmallLiteralView,
    Spy,
    Task,
    assert_refused,
    assert_same,
    compiled,
    conv_net,
    examples,
    fit,
    left_hooks,
    neurons,
    optimizer_states,
    quiet,
    seeded,
    snapshot,
    trainer_of,
    weights,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune import ActivationSearch, NoEffectWarning, Plan, PruningError, register_activation
from lightning_prune.activations.candidates import CANDIDATES, Choice
from lightning_prune.activations.sites import find_activations
from lightning_prune.callbacks.activation_search import ActivationReport

pytestmark = [
    *LIGHTNING_WARNINGS,
    *map(
        pytest.mark.filterwarnings,
        ("ignore:.*resuming from a checkpoint that ended before the epoch.*", "ignore:.*mid-epoch.*"),
    ),
]


def search(*args: Any, **kwargs: Any) -> Any:
    return quiet(ActivationSearch, *args, **{"trial_steps": 2, "held_out": 2} | kwargs)


class Planted(Task):
    """Learns what a network with a sine in its first and ReLU in its second layer says, from near its weights."""

    SIZES = (4, 16, 16, 1)

    def __init__(self, net: Any = None, **kwargs: Any) -> None:
        super().__init__(self.network() if net is None else net, shape=(4,), **{"batches": 16} | kwargs)
        with torch.random.fork_rng():
            torch.manual_seed(3)
            teacher = self.network()
            with torch.no_grad():
                teacher[0].weight.mul_(4)
        self.load(teacher)
        self.data, self.val_data = (self.labelled(teacher, seed, count) for seed, count in ((0, 128), (1, 64)))

    @staticmethod
    def network() -> Any:
        return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 1))

    def load(self, teacher: Any) -> None:
        noise = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for own, its in zip(self.net.parameters(), teacher.parameters(), strict=True):
                own.copy_(its + 0.02 * torch.randn(its.shape, generator=noise))

    @staticmethod
    def labelled(teacher: Any, seed: int, count: int) -> TensorDataset:
        x = torch.randn(count, 4, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            y = teacher[4](F.relu(teacher[2](torch.sin(teacher[0](x)))))
        return TensorDataset(x, y)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.mse_loss(self.logits(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.mse_loss(self.logits(batch[0]), batch[1]))

    test_step = validation_step


class PlantedFunctions(Planted):
    """The same with functions."""

    def __init__(self) -> None:
        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.b, self.c = nn.Linear(4, 16), nn.Linear(16, 16), nn.Linear(16, 1)

            def forward(self, x: Tensor) -> Tensor:
                return self.c(torch.relu(self.b(F.relu(self.a(x), inplace=True))))

        super().__init__(Net())


CHOICES = ("sine", "gelu", "identity")


@pytest.mark.parametrize("held_out", [2, 0])
def test_the_planted_function_is_found_where_it_is(held_out: int) -> None:
    module, callback = Planted(), search(CHOICES, held_out=held_out)
    fit(module, callback, max_epochs=10)
    found = {name: str(change.after) for name, change in callback.plan_.activations.items()}
    assert found["net.1"] == "sine"
    assert "net.3" not in found or not held_out  # only held-out batches tell GELU from ReLU
    assert str(module.net[1]) == "ActivationModule(sine)"
    assert type(module.net[3]) is (nn.ReLU if held_out else nn.GELU)


def test_a_planted_function_is_found_at_a_call() -> None:
    module, callback = PlantedFunctions(), search(CHOICES)
    fit(module, callback, max_epochs=10)
    assert {name: str(change.after) for name, change in callback.plan_.activations.items()} == {"net.relu#0": "sine"}
    net, x = module.net, torch.randn(3, 4)
    assert torch.equal(net(x), net.c(torch.relu(net.b(torch.sin(net.a(x))))))


def test_trials_find_it_too() -> None:
    for make, name in ((Planted, "net.1"), (PlantedFunctions, "net.relu#0")):
        module, callback = make(), search(CHOICES, mode="trial")
        before = snapshot(module)
        trainer = trainer_of(callback, max_epochs=1, limit_train_batches=1)
        seen: list[Any] = []
        look = functools.partial(lambda seen, t, m: seen.append((snapshot(m), optimizer_states(t))), seen)
        trainer.callbacks.append(Spy(on_train_start=look))
        trainer.fit(module)
        assert {name: str(change.after) for name, change in callback.plan_.activations.items()} == {name: "sine"}
        assert_same(seen, [(before, [{}])])  # trials leave weights and optimizer as they were
        assert left_hooks(trainer, module) == []
        assert len(callback.history_) == 1 + 2 * 3 + 3  # its own, each at each place, each throughout


@pytest.mark.parametrize("cost", [None, 0.5])
def test_trials_cost_what_they_may(cost: float | None) -> None:
    for make, name in ((Planted, "net.1"), (PlantedFunctions, "net.relu#0")):
        module, callback = make(), quiet(ActivationSearch, CHOICES, mode="trial", trial_cost=cost)
        trainer = fit(module, callback, max_epochs=20)
        assert {name: str(change.after) for name, change in callback.plan_.activations.items()} == {name: "sine"}
        assert 0.5 < callback.report_.steps / (trainer.global_step * (cost or 1.0)) <= 1.0
        assert callback.report_.steps >= sum(run["steps"] for run in callback.report_.history)
        assert callback.report_.loss < 0.5 * callback.report_.loss_without
        assert f"short runs: {callback.report_.steps:,} steps" in str(callback.report_)


def test_trials_are_made_at_the_rates_that_are_to_come() -> None:
    """A warm-up starts at a rate of zero, at which nothing would be learned."""

    class Warming(Planted):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.01)
            rise = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(step / 100, 1.0))
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": rise, "interval": "step"}}

    callbacks = [quiet(ActivationSearch, CHOICES, mode="trial", trial_steps=steps) for steps in (0, None)]
    for callback in callbacks:
        fit(Warming(), callback, max_epochs=20)
    untrained, trained = (min(run["loss"] for run in each.history_ if not run["choices"]) for each in callbacks)
    assert trained < 0.9 * untrained


def test_a_training_without_a_length_is_told_what_trials_need() -> None:
    endless = functools.partial(Task, endless=True)
    assert_refused(endless, [quiet(ActivationSearch, mode="trial")], {"max_epochs": 2}, "give trial_steps")
    given = quiet(ActivationSearch, ("tanh", "relu"), mode="trial", trial_steps=1)
    fit(seeded(endless), given, max_epochs=1)
    assert given._done


@pytest.mark.parametrize("options", [{"max_epochs": 1000}, {"max_epochs": -1}, {"max_epochs": -1, "max_steps": 4000}])
def test_a_training_that_early_stopping_ends_is_not_taken_for_as_long_as_it_may_be(options: dict[str, Any]) -> None:
    halt = Spy(on_train_epoch_end=lambda t, _: setattr(t, "should_stop", True))
    callback = quiet(ActivationSearch, ("tanh", "relu"), mode="trial")
    trainer = fit(seeded(lambda: Task(batches=2)), callback, halt, **options)
    assert trainer.global_step == 2
    assert 30 < callback.report_.steps <= 30 * 2
    mixed = quiet(ActivationSearch, ("tanh", "relu"), search_until=10)
    with pytest.warns(NoEffectWarning, match="training ended before the search did"):
        fit(seeded(lambda: Task(batches=8)), mixed, halt, **options)
    assert mixed.report_.steps <= 8


@pytest.mark.parametrize("several", [1, 2])
def test_the_mixtures_weights_take_the_whole_search(several: int) -> None:
    """Where they can move fast, what learns fast has won before the rest has begun to learn."""
    module, callback = seeded(lambda: Task(conv_net(), shape=IMAGE, batches=50)), quiet(ActivationSearch)
    updates: list[float] = []

    def look(trainer: Any, module: Any) -> None:
        if callback._fitting is not None:
            updates.append(callback._fitting.adam.param_groups[0]["lr"])

    options = {"max_steps": 300 // several, "accumulate_grad_batches": several, "limit_val_batches": 2}
    fit(module, Spy(on_train_batch_start=look), callback, max_epochs=8, **options)
    assert sum(updates) == pytest.approx(4, rel=0.02)
    assert len(updates) == 149  # from the second batch to the middle of training
    fixed = quiet(ActivationSearch, lr=0.3)
    fit(seeded(Task), fixed, Spy(on_train_batch_start=lambda t, m: updates.append(fixed._rate)), max_epochs=2)
    assert updates[-1] == 0.3


def test_a_network_that_is_right_is_left_as_it_is() -> None:
    class Right(Planted):
        @staticmethod
        def labelled(teacher: Any, seed: int, count: int) -> TensorDataset:
            x = torch.randn(count, 4, generator=torch.Generator().manual_seed(seed))
            with torch.no_grad():
                return TensorDataset(x, teacher(x))

    for mode in ("mixture", "trial"):
        module, callback = Right(), search(CHOICES, mode=mode)
        fit(module, callback, max_epochs=8)
        assert callback.plan_.activations == {}
        assert not any("forward" in part.__dict__ for part in module.modules())


def test_the_report_says_what_where_and_what_it_brought(capsys: pytest.CaptureFixture[str]) -> None:
    module = Planted()
    callback = ActivationSearch(CHOICES, trial_steps=2)
    fit(module, callback, max_epochs=10)
    report = callback.report_
    assert isinstance(report, ActivationReport)
    assert report is not None
    rows = {row.site: row for row in report.sites}
    assert (rows["net.1"].before, rows["net.1"].after, rows["net.3"].after) == ("relu", "sine", "relu")
    assert rows["net.1"].loss < 0.5 * rows["net.1"].loss_without
    assert report.loss < 0.5 * report.loss_without
    assert [round(sum(w.values()), 5) for each in report.history for w in each["weights"].values()] == [1.0] * 10
    own = [each["weights"]["net.1"]["own"] for each in report.history]
    assert own == sorted(own, reverse=True)
    assert own[-1] < 0.05 < own[0]
    assert str(report) in capsys.readouterr().out
    assert [line.split()[:3] for line in str(report).splitlines()[2:4]] == [
        ["net.1", "relu", "sine"], ["net.3", "relu", "relu"]
    ]  # fmt: skip


def test_what_does_worse_than_the_own_function_goes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_prune.activations.mixture import Mixture

    monkeypatch.setattr(Mixture, "best", lambda self: {"net.1": Choice("sine"), "net.3": Choice("identity")})
    module, callback = Planted(), search(CHOICES)
    fit(module, callback, max_epochs=4)
    assert set(callback.plan_.activations) == {"net.1"}
    assert {row.site: row.note for row in callback.report_.sites}["net.3"] == "identity did worse, went back"


class OwnForward(Task):
    """Calls functions in its own forward, and one in its step."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 12))
        self.out = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(self.net(x)))

    def logits(self, x: Tensor) -> Tensor:
        return torch.tanh(self(x))


MODULES: dict[str, Any] = {
    "own forward": OwnForward,
    "modules": lambda: Task(conv_net(), shape=IMAGE),
    "functions": lambda: Task(SmallLiteralView(), shape=IMAGE, optimizer=ADAMW),
    "batch norm": lambda: Task(Residual(), shape=IMAGE),
    "two parts": EncoderDecoder,
    "manual": Manual,
    "late layers": LateLayers,
}
ALWAYS = ("gelu", "sigmoid", "relu")


@pytest.mark.parametrize("name", MODULES)
def test_modules_of_every_make_end_plain(name: str) -> None:
    module = seeded(MODULES[name])
    names = [key for key, _ in module.named_parameters()]
    identities = [id(p) for p in module.parameters()]
    callback = search(ALWAYS, lr=0.5, search_until=0.5)
    during: list[Any] = []
    spy = Spy(on_validation_start=lambda t, m: during.append([key for key, _ in m.named_parameters()]))
    trainer = fit(module, callback, spy, max_epochs=4)
    assert callback._done
    if name == "late layers":
        assert [key for key, _ in module.named_parameters()] == during[-1]
    else:
        assert [key for key, _ in module.named_parameters()] == names == during[0]
        assert [id(p) for p in module.parameters()] == identities
    assert left_hooks(trainer, module) == []
    assert len(trainer.optimizers[0].param_groups) == 1
    changed = {change.owner for change in callback.plan_.activations.values()}
    patched = {path for path, part in module.named_modules() if part.__dict__.get("replacements") or "forward" in part.__dict__}  # fmt: skip
    assert patched == {owner for owner in changed if owner is not None}
    x = module.val_data.tensors[0]
    expected = None if name == "late layers" else module.net(x)
    for other in (copy.deepcopy(module.net), pickle.loads(pickle.dumps(module.net))):
        if not isinstance(other, nn.Identity):
            torch.testing.assert_close(other(x), expected)
    fit(module, callback, max_epochs=1)  # a second fit searches no more
    assert left_hooks(trainer, module) == []


@pytest.mark.parametrize("name", ["own forward", "modules", "functions", "batch norm", "two parts", "manual"])
@pytest.mark.parametrize(
    "options", [{}, {"held_out": 0}, {"threshold": True}, {"per": "model"}, {"trial_steps": None}], ids=str
)
def test_resume_equals_never_stopping(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    def callback() -> Any:
        return search(ALWAYS, lr=0.5, search_until=0.5, **options)

    saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    module, whole = seeded(MODULES[name]), callback()
    trainer = fit(module, whole, saver, max_epochs=4)
    paths = sorted(tmp_path.glob("*.ckpt"))
    assert len(paths) == 4
    for path in paths[:3]:
        other, again = seeded(MODULES[name], 7), callback()
        resumed = fit(other, again, ckpt_path=path, max_epochs=4)
        assert_same(snapshot(other), snapshot(module))
        assert_same(optimizer_states(resumed), optimizer_states(trainer))
        assert_same(again.state_dict(), whole.state_dict())
        assert left_hooks(resumed, other) == []
        assert repr(other) == repr(module)


def test_resume_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    class Alike(Task):
        def __init__(self) -> None:
            super().__init__(conv_net(), shape=IMAGE)
            self.data = TensorDataset(*(t[:8].repeat(4, *[1] * (t.dim() - 1)) for t in self.data.tensors))

    saver = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=3)
    module, whole = seeded(Alike), search(ALWAYS, lr=0.5, search_until=0.6)
    fit(module, whole, saver, max_epochs=4)
    paths = sorted(tmp_path.glob("*.ckpt"))
    assert len(paths) == 5
    for path in paths:
        other, again = seeded(Alike, 7), search(ALWAYS, lr=0.5, search_until=0.6)
        fit(other, again, ckpt_path=path, max_epochs=4)
        assert_same(snapshot(other), snapshot(module))
        assert_same(again.plan_.to_dict(), whole.plan_.to_dict())


@pytest.mark.parametrize("name", ["modules", "functions"])
def test_a_checkpoints_metric_is_its_own(name: str, tmp_path: Path) -> None:
    measured: list[float] = []
    saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    spy = Spy(on_validation_end=lambda t, m: measured.append(float(t.callback_metrics["val_loss"])))
    fit(seeded(MODULES[name]), search(ALWAYS, lr=0.5), saver, spy, max_epochs=4)
    for path, value in zip(sorted(tmp_path.glob("*.ckpt")), measured, strict=True):
        other, callback = seeded(MODULES[name], 7), search(ALWAYS, lr=0.5)
        trainer = trainer_of(callback)
        assert trainer.validate(other, ckpt_path=path, verbose=False)[0]["val_loss"] == value
        assert left_hooks(trainer, other) == []
        data = torch.load(path, weights_only=True)["callbacks"][callback.state_key]
        plain = seeded(MODULES[name], 7)
        Plan.from_dict(json.loads(json.dumps(data["plan"]))).apply(plain)
        if data["done"]:
            plain.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
            x = plain.val_data.tensors[0]
            assert torch.equal(plain.eval().logits(x), other.eval().logits(x))


def test_searching_changes_neither_logs_nor_random_numbers() -> None:
    """With one candidate that is what the user has but for its name, a search changes nothing at all."""
    register_activation("same_relu", F.relu)
    try:
        ends = []
        for callbacks in ([search(["same_relu"], search_until=1.0)], []):
            module = seeded(lambda: Task(Residual(0.25), shape=IMAGE))
            trainer = fit(module, *callbacks, max_epochs=3)
            ends.append((snapshot(module), float(trainer.callback_metrics["train_loss"])))
        torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-6)
    finally:
        del CANDIDATES["same_relu"]


def _infinite(x: Tensor) -> Tensor:
    return x / torch.zeros_like(x)


@pytest.mark.parametrize("mode", ["mixture", "trial"])
def test_a_candidate_that_gives_nan_is_dropped(mode: str) -> None:
    register_activation("broken", _infinite)
    try:
        module, callback = Planted(), search(("broken", "sine"), mode=mode)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fit(module, callback, max_epochs=10)
        told = [str(each.message) for each in caught if "broken gave" in str(each.message)]
        assert len(told) == 2
        assert ["not finite at net.1 and is dropped" in text for text in told] == [True, False]
        assert {name: str(change.after) for name, change in callback.plan_.activations.items()} == {"net.1": "sine"}
        assert all(bool(p.isfinite().all()) for p in module.parameters())
    finally:
        del CANDIDATES["broken"]


class Loops(nn.Module):
    """Calls its function a number of times that the input decides."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out = nn.Linear(6, 6), nn.Linear(6, 4)
        self.turns = 0

    def forward(self, x: Tensor) -> Tensor:
        self.turns += 1
        for _ in range(1 + self.turns % 3):
            x = F.relu(self.fc(x))
        return self.out(x)


def test_calls_that_vary_share_one_choice_and_are_told() -> None:
    module, callback = Task(Loops()), search(("identity",), lr=0.5)
    with pytest.warns(UserWarning, match="activation calls in net differ from run to run"):
        fit(module, callback, max_epochs=4)
    assert [site.name for site in callback.sites_.sites] == ["net.relu#all"]
    assert set(callback.plan_.activations) <= {"net.relu#all"}


BAD: list[tuple[dict[str, Any], str]] = [
    ({"choices": ("relu", "rleu")}, "unknown activation 'rleu'; allowed: relu, leaky_relu, elu"),
    ({"choices": ()}, "choices must be names"),
    ({"mode": "both"}, "mode must be one of 'mixture', 'trial'"),
    ({"search_until": 1.5}, r"end must be a fraction in \[0.0, 1.0\]"),
    ({"search_until": 0.0}, "start must be before end"),
    ({"per": "channel"}, "per must be one of 'site', 'layer', 'model'"),
    ({"threshold": "all"}, "threshold must be one of False, True, 'site', 'channel'"),
    ({"budget": 0}, "budget must be a whole number of at least 1"),
    ({"trial_steps": -1}, "trial_steps must be a whole number of at least 0"),
    ({"lr": 0}, "lr must be a positive number"),
    ({"drop_below": 1.0}, r"drop_below must be a number in \[0, 1\)"),
    ({"include": [3]}, "include must be glob patterns"),
    ({"strategy": "random"}, "strategy must be one of 'greedy', 'optuna'"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=str)
def test_bad_arguments_are_refused_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PruningError, match=message):
        ActivationSearch(**options)


REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "no site": (lambda: Task(nn.Linear(6, 4)), {}, "no activation site to search; there are: none at all"),
    "only an output": (
        lambda: Task(nn.Sequential(nn.Linear(6, 4), nn.Sigmoid())), {}, "there are: net.1: gives the model's output"
    ),
    "past the end": (Task, {"search_until": 5}, "search_until=5 is after the end of training"),
    "no such site": (Task, {"include": "nothing"}, "'nothing' matches no activation site; there are: net.1, net.3"),
    "no other choice": (Task, {"choices": "tanh"}, "every site has tanh already"),
    "manual trials": (Manual, {"mode": "trial"}, "needs automatic optimization"),
    "no site for trials": (lambda: Task(nn.Linear(6, 4)), {"mode": "trial"}, "no activation site to search"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cant_be_is_refused_before_anything_changes(name: str) -> None:
    make, options, message = REFUSED[name]
    assert_refused(make, [search(**options)], {}, message)


def test_two_searches_are_refused() -> None:
    assert_refused(Task, [search(include="net.1"), search(include="net.3")], {}, "only one ActivationSearch")


def test_optuna_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "optuna", None)
    with pytest.raises(PruningError, match=r"lightning-prune\[search\]"):
        ActivationSearch(mode="trial", strategy="optuna")


def test_optuna_finds_it_too() -> None:
    pytest.importorskip("optuna")
    module, callback = Planted(), search(CHOICES, mode="trial", strategy="optuna", trials=20)
    fit(module, callback, max_epochs=1, limit_train_batches=1)
    assert str(callback.plan_.activations["net.1"].after) == "sine"


@pytest.mark.parametrize("mode", ["mixture", "trial"])
def test_no_more_units_change_than_the_budget_allows(mode: str) -> None:
    for per, sites in (("site", 1), ("model", 3)):
        module = seeded(lambda: Task(conv_net(), shape=IMAGE))
        callback = search(("gelu", "identity", "tanh"), mode=mode, budget=1, per=per, lr=0.5)
        fit(module, callback, max_epochs=2)
        assert len(callback.plan_.activations) in (0, sites)


def test_a_failure_leaves_the_model_as_the_user_wrote_it() -> None:
    def fail(trainer: Any, module: Any) -> None:
        if trainer.global_step == 2:
            raise RuntimeError("stop")

    for make in (MODULES["modules"], MODULES["functions"]):
        module, plain = seeded(make), seeded(make)
        with pytest.raises(RuntimeError, match="stop"):
            fit(module, search(ALWAYS), Spy(on_train_batch_start=fail))
        assert repr(module) == repr(plain)
        assert not any("forward" in part.__dict__ for part in module.modules())
        plain.load_state_dict(module.state_dict())
        x = module.val_data.tensors[0]
        assert torch.equal(module.logits(x), plain.logits(x))


def test_training_that_ends_early_keeps_the_best_so_far_and_says_so() -> None:
    halt = Spy(on_train_epoch_end=lambda t, _: setattr(t, "should_stop", True))
    module, callback = seeded(MODULES["modules"]), search(ALWAYS)
    with pytest.warns(NoEffectWarning, match="training ended before the search did"):
        fit(module, callback, halt, max_epochs=8)
    assert callback._done
    assert not any("forward" in part.__dict__ for part in module.modules())


@pytest.mark.parametrize("name", ["own forward", "modules", "functions"])
def test_looking_for_thresholds_freezes_no_neurons(name: str, tmp_path: Path) -> None:
    def ours() -> list[Any]:
        return [search(("relu", "tanh"), threshold=True), neurons(0.5)]

    module, (searching, callback), alone = seeded(MODULES[name]), ours(), neurons(0.5)
    fit(module, searching, callback, ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1), max_epochs=4)
    fit(seeded(MODULES[name]), alone, max_epochs=4)
    assert [group.frozen for group in callback.groups_.frozen] == [group.frozen for group in alone.groups_.frozen]
    assert callback.groups_.neurons == alone.groups_.neurons
    for epoch in range(3):
        resumed = seeded(MODULES[name], 5)
        fit(resumed, *ours(), max_epochs=4, ckpt_path=tmp_path / f"epoch={epoch}.ckpt")
        assert_same(snapshot(resumed), snapshot(module))


@pytest.mark.parametrize("mode", ["mixture", "trial"])
def test_a_training_step_may_name_its_arguments_as_it_likes(mode: str) -> None:
    class Named(Task):
        def training_step(self, this: Any, number: int) -> Tensor:
            assert isinstance(number, int)
            return super().training_step(this, number)

    class Unnumbered(Task):
        def training_step(self, this: Any) -> Tensor:
            return super().training_step(this, 0)

    states = []
    for make in (Task, Named, Unnumbered):
        module = seeded(make)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*held.out.*")
            fit(module, search(("relu", "tanh"), mode=mode), max_epochs=4)
        states.append(snapshot(module))
    assert_same(states[1], states[0])
    assert_same(states[2], states[0])


class Compiled(Task):
    """Modules and calls in a network that is compiled, as a wrapper or in place."""

    def __init__(self, how: str) -> None:
        class Calls(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first, self.second = nn.Sequential(nn.Linear(6, 8), nn.ReLU()), nn.Linear(8, 4)

            def forward(self, x: Tensor) -> Tensor:
                return self.second(F.relu(self.first(x) - 0.1))

        super().__init__(compiled(Calls(), how), shape=(6,))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.logits(batch[0]), batch[1])  # Lightning's log takes seconds to compile


@pytest.mark.parametrize("mode", ["mixture", "trial"])
@pytest.mark.parametrize("how", ["wrapper", "in place"])
def test_compiled_modules_are_searched_as_others_are(how: str, mode: str) -> None:
    states = []
    for each in ("not at all", how):
        module = seeded(functools.partial(Compiled, each))
        callback = search(("tanh", "elu"), mode=mode, lr=0.5)
        fit(module, callback, max_epochs=4)
        changes = {name.replace("_orig_mod.", ""): c.after for name, c in callback.plan_.activations.items()}
        assert set(changes) == {"net.first.1", "net.relu#0"}
        x = module.data.tensors[0][:4]
        states.append(
            (changes, {n.replace("_orig_mod.", ""): t for n, t in snapshot(module).items()}, module.logits(x))
        )
    assert states[0][0] == states[1][0]
    assert_same(states[1][1], states[0][1])
    assert_same(states[1][2], states[0][2])


@pytest.mark.parametrize(("threshold", "shape"), [(True, ()), ("channel", (6,))], ids=str)
def test_parameters_are_searched_per_site_or_channel(threshold: Any, shape: tuple[int, ...]) -> None:
    seen: list[Any] = []

    def look(trainer: Any, module: Any) -> None:
        mixture = callback._mixture
        if mixture is not None:
            seen.append((mixture.units[0], {k: v.detach().clone() for k, v in mixture.values.items()}))

    module = seeded(MODULES["modules"])
    callback = search(("leaky_relu", "silu"), threshold=threshold, value_lr=0.1)
    fit(module, callback, Spy(on_train_batch_start=look), max_epochs=4)
    unit, first = seen[0]
    names = [option.name for option in unit.options if option is not None]
    assert names == ["leaky_relu", "silu", "shifted_relu", *["thresholded_relu"] * 3, "swish"]
    values = [dict(option.parameters)["threshold"] for option in unit.options if option and option.name == "thresholded_relu"]  # fmt: skip
    # The oracle: quantiles of what is positive before the first ReLU in the first batch.
    x = seeded(MODULES["modules"]).net[0](module.data.tensors[0][:8])
    parts = list(x.transpose(0, 1).flatten(1)) if shape else [x.flatten()]
    for value, q in zip(values, (0.1, 0.25, 0.5), strict=True):
        for each, part in zip(value if shape else [value], parts, strict=True):
            positive = part[part > 0]
            assert abs(float((positive < each).float().mean()) - q) <= 1.5 / len(positive)
    last = seen[-1][1]
    assert {place: value.numel() for place, value in last.items() if place[0] == 0} == dict.fromkeys(
        [(0, 1), (0, 3), (0, 7)], 6 if shape else 1
    )
    assert all(bool((last[place] != first[place]).any()) for place in ((0, 1), (0, 3), (0, 7)))


def test_pruning_goes_on_beside_it(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)

    def callbacks() -> list[Any]:
        return [search(ALWAYS, lr=0.5), neurons(0.4, end=1.0), weights(0.3, end=1.0)]

    for name in ("modules", "functions"):
        module, ours = seeded(MODULES[name]), callbacks()
        fit(module, *ours, saver, max_epochs=4)
        assert ours[1].plan_.kept
        for path in sorted(tmp_path.glob("*.ckpt")):
            other, again = seeded(MODULES[name], 7), callbacks()
            fit(other, *again, ckpt_path=path, max_epochs=4)
            assert_same(snapshot(other), snapshot(module))
            path.unlink()


def test_committed_training_is_that_of_a_module_written_so() -> None:
    """After the commit nothing of the search runs: the rest of training is that of the plain model."""
    module, callback = seeded(MODULES["modules"]), search(ALWAYS, search_until=1, lr=0.5)
    states: list[Any] = []
    fit(module, callback, Spy(on_train_epoch_end=lambda t, m: states.append(copy.deepcopy(t.optimizers[0].state_dict()))), max_epochs=1)  # fmt: skip
    plain = copy.deepcopy(module)
    plain.trainer = None  # type: ignore[assignment]
    ends = []
    for each, callbacks in ((module, [callback]), (plain, [])):
        fit(each, *callbacks, max_epochs=2)
        ends.append(snapshot(each))
    assert_same(*ends)


def test_find_activations_is_public() -> None:
    assert [site.name for site in find_activations(conv_net(), torch.randn(2, *IMAGE)).sites] == ["1", "3", "6"]


def test_state_keys_tell_searches_apart() -> None:
    assert ActivationSearch(include="a*").state_key != ActivationSearch(include="b*").state_key
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pickle.loads(pickle.dumps(ActivationSearch())).choices == ActivationSearch().choices


def test_loaders_that_shuffle_are_read_alike() -> None:
    from lightning_prune.callbacks._trials import fetch

    loader = DataLoader(examples(32, (3,)), batch_size=4, shuffle=True)
    state = torch.get_rng_state()
    first, second = (fetch(loader, 3, nn.ReLU()) for _ in range(2))
    assert_same(first, second)
    assert torch.equal(torch.get_rng_state(), state)


def test_processes_agree_to_the_bit(tmp_path: Path) -> None:
    done = run_script(Path(ddp_search.__file__), tmp_path)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    for name in ddp_search.CASES:
        first, second = (torch.load(tmp_path / f"{name}-{rank}.pt", weights_only=True) for rank in (0, 1))
        assert_same(first, second)
        assert first["state"]["done"]
        assert bool(first["middle"]) != name.startswith("trial")
        if first["middle"]:  # by then each weight has moved
            assert all(bool((leaf != 0).any()) for leaf in first["middle"][-1])


def test_an_exported_module_is_the_committed_one() -> None:
    for make in (MODULES["modules"], MODULES["functions"]):
        module = seeded(make)
        fit(module, search(("tanh",), lr=0.5, held_out=0), max_epochs=2)
        net, x = module.net.eval(), module.val_data.tensors[0]
        assert torch.equal(torch.export.export(net, (x,), strict=False).module()(x), net(x))


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
def test_it_runs_in_other_precisions(precision: str) -> None:
    module, callback = seeded(MODULES["functions"]), search(ALWAYS, lr=0.5, threshold=True)
    fit(module, callback, precision=precision, accumulate_grad_batches=2, gradient_clip_val=1.0, max_epochs=4)
    assert callback._done


class OtherValidation(Task):
    """Its validation batches are made otherwise."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step([batch["x"], batch["y"]], batch_idx)

    def val_dataloader(self) -> Any:
        return DataLoader([{"x": x, "y": y} for x, y in self.val_data], batch_size=8)


def test_validation_batches_of_another_make_are_told_and_left(tmp_path: Path) -> None:
    module, callback = seeded(OtherValidation), search(ALWAYS, lr=0.5)
    with pytest.warns(UserWarning, match=r"training_step doesn't take a validation batch \(KeyError"):
        fit(module, callback, max_epochs=2)
    assert callback._done


class TwoLoaders(Task):
    """Trains on two loaders at once."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch["a"], batch_idx) + super().training_step(batch["b"], batch_idx)

    def train_dataloader(self) -> Any:
        return {"a": super().train_dataloader(), "b": super().train_dataloader()}


def test_several_loaders_are_searched_on_training_batches() -> None:
    callback = search(ALWAYS, lr=0.5)
    fit(seeded(TwoLoaders), callback, max_epochs=2)
    assert callback._done
    assert_refused(TwoLoaders, [search(mode="trial")], {}, "works with one training loader")


def test_short_runs_leave_everything_as_it_was() -> None:
    from lightning_prune.callbacks._trials import ShortRuns

    seen: list[Any] = []

    def look(trainer: Any, module: Any) -> None:
        if trainer.current_epoch == 1:
            hooks = dict(trainer.optimizers[0]._optimizer_step_post_hooks)

            def state() -> Any:
                grads = [p.grad for p in module.parameters()]
                return copy.deepcopy((snapshot(module), optimizer_states(trainer), grads, torch.get_rng_state()))

            batches = list(module.train_dataloader())
            before = state()
            runs = ShortRuns(trainer, module, batches, [batches[0]])
            first, second = (runs.loss(lambda: contextlib.nullcontext(), 3) for _ in range(2))
            none = runs.loss(lambda: contextlib.nullcontext(), 0)
            assert first == second != none
            assert_same(state(), before)
            assert dict(trainer.optimizers[0]._optimizer_step_post_hooks) == hooks
            assert len(hooks) == 1
            seen.append(none)

    for optimizer in (ADAMW, torch.optim.LBFGS):
        module = seeded(lambda optimizer=optimizer: Task(Residual(0.3), shape=IMAGE, optimizer=optimizer))
        fit(module, weights(0.5), Spy(on_train_epoch_start=look))
    assert len(seen) == 2


@pytest.mark.skipif(not hasattr(lightning_callbacks, "EMAWeightAveraging"), reason="newer lightning")
def test_averaged_copies_follow() -> None:
    module, callback = seeded(MODULES["functions"]), search(("tanh",), lr=0.5, held_out=0)
    average = lightning_callbacks.EMAWeightAveraging(decay=0.5)
    copies: list[Any] = []
    spy = Spy(on_train_end=lambda t, m: copies.append(average._average_model.module.net))
    fit(module, spy, callback, average, max_epochs=4)
    assert callback.plan_.activations
    x = module.val_data.tensors[0]
    copies[0].load_state_dict(module.net.state_dict())
    assert torch.equal(copies[0](x), module.net(x))


def test_a_checkpoint_of_the_middle_of_a_search_loads_without_the_callback(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, save_weights_only=True)
    fit(seeded(MODULES["functions"]), search(ALWAYS, search_until=1.0), saver, max_epochs=2)
    plain = seeded(MODULES["functions"], 7)
    state = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)["state_dict"]
    assert list(state) == list(plain.state_dict())
    plain.load_state_dict(state)
    trainer = trainer_of(callback := search(ALWAYS, search_until=1.0))  # and brings its mixture where there is one
    trainer.validate(seeded(MODULES["functions"]), ckpt_path=tmp_path / "epoch=0.ckpt", verbose=False)
    assert callback._search is not None


def test_both_lightnings_take_it() -> None:
    pl = pytest.importorskip("pytorch_lightning")

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = conv_net()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.01)

        def train_dataloader(self) -> Any:
            return DataLoader(examples(32, IMAGE), batch_size=8)

    callback = search(ALWAYS, lr=0.5)
    options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    pl.Trainer(callbacks=[callback], max_epochs=2, enable_model_summary=False, **options).fit(Module())
    assert callback._done
