"""NeuronPruning: a resumed training equals one that never stopped; checkpoints in fresh processes, damaged ones."""

from __future__ import annotations

import copy
import functools
import io
import os
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import neuron_cases
import pytest
import torch
from families import FAMILIES, Alike, Gan, Groups, ResNet, insisting, lstm, outputs
from lightning.pytorch import callbacks
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from lightning_modules import (
    ADAMW,
    CLASSES,
    IMAGE,
    LAW_WARNINGS,
    Task,
    assert_same,
    fit,
    left_hooks,
    load_plain,
    measured_again,
    mlp,
    neurons,
    optimizer_states,
    seeded,
    snapshot,
    trainer_of,
    weights,
)
from neuron_cases import CASES, DIFFERENT, AlikeGan, AlikeLSTM, asked_for
from torch import optim

from lightning_prune import PruningError

pytestmark = LAW_WARNINGS

progressive = functools.partial(neurons, 0.6, schedule="linear", end=1.0)


# -- killed and resumed --------------------------------------------------------------------------------------------


KILLS = int(os.environ.get("LIGHTNING_PRUNE_KILLS", "2"))
"""How many times each training is killed."""


def run_cases(folder: Path, kills: int) -> subprocess.CompletedProcess[str]:
    tests = Path(neuron_cases.__file__).parent
    path = os.pathsep.join([str(tests.parent), str(tests), os.environ.get("PYTHONPATH", "")])
    # Sets and dictionaries of another order in every process: nothing may depend on it.
    environment = os.environ | {"PYTHONPATH": path, "PYTHONHASHSEED": str(kills + 2), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, neuron_cases.__file__, str(folder), str(kills)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120 + 60 * KILLS)


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], list[Any]]:
    """What a case ended with on a rank: without an interruption, and killed again and again."""
    folders = []
    for kills in (0, KILLS):
        folders.append(tmp_path_factory.mktemp(f"kills{kills}"))
        done = run_cases(folders[-1], kills)
        assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]

    def results(name: str, rank: int) -> list[Any]:
        for folder in folders:
            failed = folder / name / "failed"
            assert not failed.exists(), failed.read_text()
        return [torch.load(folder / name / f"done-{rank}.pt", weights_only=True) for folder in folders]

    return results


@pytest.mark.parametrize("name", asked_for())
def test_killed_and_resumed_equals_never_stopping(name: str, killed: Any) -> None:
    for rank in range(CASES[name].ranks):
        whole, part = killed(name, rank)
        assert part["step"] == whole["step"]
        assert whole["callbacks"][-1]["plan"]["kept"]
        for key in whole:
            if rank == 0 or key != "weights":  # batch statistics are each rank's own
                assert_same(part[key], whole[key])


@pytest.mark.parametrize("name", [name for name, case in asked_for().items() if case.ranks > 1])
def test_ranks_agree_after_kills(name: str, killed: Any) -> None:
    first, second = killed(name, 0)[1], killed(name, 1)[1]
    for key in [key for key in first["weights"] if "running" in key]:
        assert first["weights"].pop(key).shape == second["weights"].pop(key).shape
    assert_same(second, first)


# -- resumed in this process, from every checkpoint -----------------------------------------------------------------


class Compared:
    """One training that keeps every checkpoint; trainings resumed from each end as it did."""

    def __init__(
        self, make: Callable[[], Any], pruning: Callable[[], list[Any]], folder: Path, steps: int | None, **options: Any
    ) -> None:
        when: dict[str, Any] = {"every_n_epochs": 1} if steps is None else {"every_n_train_steps": steps}
        saver = ModelCheckpoint(folder, filename="{epoch}-{step}", save_top_k=-1, **when)
        self.make, self.pruning, self.options = make, pruning, options
        self.module, self.callbacks = seeded(make), pruning()
        self.trainer = self.fit(self.module, *self.callbacks, saver)
        self.paths = sorted(folder.glob("*.ckpt"), key=lambda path: int(path.stem.partition("step=")[2]))

    def fit(self, module: Any, *others: Any, ckpt_path: Path | None = None) -> Any:
        made = {key: value() if callable(value) else value for key, value in self.options.items()}
        return fit(module, *others, ckpt_path=ckpt_path, **{"max_epochs": 4} | made)

    def check(self, number: int) -> None:
        """Resume from each checkpoint but the last, which is after everything."""
        assert len(self.paths) == number
        for path in self.paths[:-1]:
            load_plain(path)
            module, ours = seeded(self.make, 7), self.pruning()
            trainer = self.fit(module, *ours, ckpt_path=path)
            assert trainer.global_step == self.trainer.global_step, path.stem
            assert_same(snapshot(module), snapshot(self.module))
            assert_same(optimizer_states(trainer), optimizer_states(self.trainer))
            for one, other in zip(ours, self.callbacks, strict=True):
                if hasattr(one, "amount_"):
                    first, second = measured_again(one.state_dict(), other.state_dict()), other.state_dict()
                    for state in (first, second):  # reasons are told in other words once a group is down to one
                        state.get("plan", {}).pop("frozen", None)
                    assert_same(first, second)
            assert left_hooks(trainer, module) == []


class AlikeGroups(Alike, Groups):
    """Several parameter groups, batches that are alike."""


KINDS: dict[str, tuple[Any, Callable[[], list[Any]], dict[str, Any]]] = {
    **{name: (functools.partial(make, optimizer=ADAMW), lambda: [progressive()], {}) for name, make in FAMILIES.items()},
    "param groups": (lambda: Groups(ResNet(), shape=IMAGE), lambda: [progressive(of="macs")], {}),
    "accumulation": (functools.partial(lstm, batches=7), lambda: [progressive()], {"accumulate_grad_batches": 3}),
    "bf16-mixed": (FAMILIES["resnet"], lambda: [progressive()], {"precision": "bf16-mixed"}),
    "bf16-true": (FAMILIES["lstm"], lambda: [progressive()], {"precision": "bf16-true"}),
    "16-mixed": (
        FAMILIES["resnet"],
        lambda: [progressive()],
        {"plugins": lambda: [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", growth_interval=5))]},
    ),
    "clipping": (FAMILIES["unet"], lambda: [progressive(scope="layer")], {"gradient_clip_val": 0.1}),
    "steps": (FAMILIES["resnet"], lambda: [progressive()], {"max_epochs": None, "max_steps": 15}),
    "weights too": (FAMILIES["transformer"], lambda: [weights(0.4, end=1.0), progressive(exact_only=True)], {}),
    "rate": (
        functools.partial(Gan, scheduler=lambda o: optim.lr_scheduler.StepLR(o, 1, 0.5)), lambda: [progressive()], {}
    ),
    "round to": (FAMILIES["unet"], lambda: [progressive(round_to=2)], {}),
    "by layer": (FAMILIES["unet"], lambda: [neurons(0.0, scope={"*": 0.4}, schedule="linear", end=1.0)], {}),
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_resumed_from_every_epoch(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    make, pruning, options = KINDS[name]
    Compared(make, pruning, tmp_path, None, **options).check(4)


STEPS: dict[str, tuple[Any, Callable[[], list[Any]]]] = {
    "lstm": (AlikeLSTM, lambda: [progressive()]),
    "every": (AlikeLSTM, lambda: [progressive(every=2)]),
    "gan": (AlikeGan, lambda: [progressive()]),
    "gan, every": (AlikeGan, lambda: [progressive(every=3)]),
    "resnet": (lambda: AlikeGroups(ResNet(), shape=IMAGE), lambda: [progressive(of="params")]),
}


@pytest.mark.parametrize("name", STEPS)
def test_resumed_from_the_middle_of_epochs(name: str, tmp_path: Path) -> None:
    make, pruning = STEPS[name]
    Compared(make, pruning, tmp_path, 3).check(5)


@pytest.mark.parametrize("place", [pytest.param(0, id="first"), pytest.param(1, id="second")])
def test_resumed_where_a_group_was_refused(place: int, tmp_path: Path) -> None:
    Compared(lambda: insisting(place), lambda: [progressive()], tmp_path, None).check(4)


@pytest.mark.parametrize(
    "swap",
    [
        False,
        True,
    ],
)
@pytest.mark.parametrize("family", ["lstm", "resnet"])
@pytest.mark.parametrize("name", ["ema", "swa"])
def test_averages_across_a_resume(name: str, family: str, swap: bool, tmp_path: Path) -> None:
    if name == "ema" and not hasattr(callbacks, "EMAWeightAveraging"):
        pytest.skip("newer lightning")
    if name == "swa" and family == "resnet":
        pytest.skip("Lightning then adds an epoch for the norms' statistics")

    def pruning() -> list[Any]:
        averaging: Any = (
            callbacks.EMAWeightAveraging(decay=0.8)
            if name == "ema"
            else callbacks.StochasticWeightAveraging(0.05, swa_epoch_start=1, annealing_epochs=1)
        )
        both = [progressive(end=3), averaging]
        return both[::-1] if swap else both

    Compared(FAMILIES[family], pruning, tmp_path, None, max_epochs=5).check(5)


# -- evaluated in a fresh process ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Checkpoints of every family, what they gave here, and what a fresh process makes of them."""
    folder, here = tmp_path_factory.mktemp("elsewhere"), dict[str, Any]()
    for name, make in FAMILIES.items():
        savers = [
            ModelCheckpoint(folder / name, "{epoch}", monitor="val_loss", save_top_k=-1),
            ModelCheckpoint(folder / name, "light-{epoch}", monitor="val_acc", save_top_k=-1, save_weights_only=True),
        ]
        module = seeded(make)
        trainer = trainer_of(progressive(), *savers, max_epochs=2)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.fit(module)
            scores = {Path(path).name: float(score) for path, score in savers[0].best_k_models.items()}
            scores |= {f"light-{path}": score for path, score in scores.items()}
            here[name] = (scores, [] if name == "gan" else trainer.predict(module), snapshot(module))
    done = run_cases(folder, -1)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return folder, here


@pytest.mark.parametrize("family", FAMILIES)
def test_validate_test_and_predict_in_a_fresh_process(family: str, elsewhere: Any) -> None:
    folder, here = elsewhere
    scores, predicted, state = here[family]
    found = torch.load(folder / f"{family}.pt", weights_only=True)
    assert found.keys() == scores.keys()
    assert len(scores) == 4
    for name, score in scores.items():
        assert found[name]["validate"]["val_loss"] == score
        assert found[name]["test"] == found[name]["validate"]
        assert_same(found[name]["weights"], dict(torch.load(folder / family / name, weights_only=True)["state_dict"]))
    for name in ("epoch=1.ckpt", "light-epoch=1.ckpt"):
        assert_same(found[name]["weights"], state)
        if family != "gan":
            assert_same(found[name]["predict"], predicted)


@pytest.mark.parametrize("name", DIFFERENT)
def test_processes_with_different_models_end_with_an_error(name: str, elsewhere: Any) -> None:
    logs = [(elsewhere[0] / f"different-{name}-{rank}").read_text() for rank in (0, 1)]
    assert all("Traceback" in log for log in logs), "both end"
    assert not any("max_epochs=2` reached" in log for log in logs)
    if name == "widths":
        assert "appears not to match sizes of the same param in process 0" in logs[1]


def test_processes_with_different_models_are_told_so(elsewhere: Any) -> None:
    log = (elsewhere[0] / "different-forwards-1").read_text()
    assert "the processes have different models" in log
    assert "IndexError" not in log


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_alone_start_another_training(family: str, elsewhere: Any) -> None:
    """A file without optimizer state starts a fit of the small network."""
    path = elsewhere[0] / family / "light-epoch=1.ckpt"
    module = seeded(FAMILIES[family], 5)
    trainer_of(neurons(0.6)).validate(module, ckpt_path=path, verbose=False)
    shapes = {name: p.shape for name, p in module.named_parameters()}
    assert shapes == {name: elsewhere[1][family][2][name].shape for name in shapes}
    module.train()
    trainer = fit(module)
    assert {name: p.shape for name, p in module.named_parameters()} == shapes
    assert all(bool(value.isfinite().all()) for value in outputs(module))
    assert left_hooks(trainer, module) == []


# -- damaged checkpoints --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = seeded(lambda: Task(mlp(6, 12, 10, CLASSES), optimizer=ADAMW))
        fit(module, neurons(0.5, schedule="one_shot"), ModelCheckpoint(folder, "good"))
    return folder / "good.ckpt"


def plans(checkpoint: dict[str, Any]) -> list[dict[str, Any]]:
    """Every copy of the plan that a checkpoint holds: in the metadata and in the callback's state."""
    found = [checkpoint["state_dict"]._metadata[""]["lightning_prune"]["plan"]]
    return [*found, *(state["plan"] for state in checkpoint["callbacks"].values() if "plan" in state)]


def out_of_range(plan: dict[str, Any]) -> None:
    plan["kept"]["net.0.weight"]["0"][-1] = 99


def too_few(plan: dict[str, Any]) -> None:
    plan["kept"]["net.0.weight"]["0"].pop()


def no_list(plan: dict[str, Any]) -> None:
    plan["kept"] = 3


def no_shapes(plan: dict[str, Any]) -> None:
    del plan["shapes"]


def negative(plan: dict[str, Any]) -> None:
    plan["kept"]["net.0.weight"]["0"][0] = -1


def other_name(plan: dict[str, Any]) -> None:
    plan["kept"]["net.7.weight"] = plan["kept"].pop("net.0.weight")
    plan["shapes"]["net.7.weight"] = plan["shapes"].pop("net.0.weight")


def words(plan: dict[str, Any]) -> None:
    plan["kept"]["net.0.weight"]["0"] = ["a", "b"]


ALTERED = [
    out_of_range,
    too_few,
    no_list,
    no_shapes,
    negative,
    other_name,
    words,
]


def half(data: bytes) -> bytes:
    return data[: len(data) // 2]


def nothing(data: bytes) -> bytes:
    return b""


def no_file_of_torch(data: bytes) -> bytes:
    return b"hello " * 100


def one_byte(data: bytes) -> bytes:
    """In the middle of a weight, where torch sees nothing wrong."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        largest = max(archive.infolist(), key=lambda info: info.file_size if "/data/" in info.filename else 0)
        content = archive.read(largest)
    place = data.index(content) + len(content) // 2
    return data[:place] + bytes([data[place] ^ 0x55]) + data[place + 1 :]


@pytest.mark.parametrize("run", ["fit", "validate"])
@pytest.mark.parametrize(
    ("damage", "said"),
    [(half, "was cut off"), (nothing, "was cut off"), (no_file_of_torch, "no checkpoint"), (one_byte, "was altered")],
)
def test_a_file_that_is_not_whole_is_refused(damage: Any, said: str, run: str, good: Path, tmp_path: Path) -> None:
    path = tmp_path / "bad.ckpt"
    path.write_bytes(damage(good.read_bytes()))
    message = refused(path, lambda: Task(mlp(6, 12, 10, CLASSES), optimizer=ADAMW), run, good, PruningError)
    assert said in message
    assert str(path) in message


@pytest.mark.parametrize("form", ["without sums", "old format"])
def test_a_file_without_checksums_is_read(form: str, good: Path, tmp_path: Path) -> None:
    checkpoint, path = torch.load(good, weights_only=True), tmp_path / "other.ckpt"
    sums = torch.serialization.get_crc32_options()
    try:
        torch.serialization.set_crc32_options(form != "without sums")
        torch.save(checkpoint, path, _use_new_zipfile_serialization=form != "old format")
    finally:
        torch.serialization.set_crc32_options(sums)
    module = seeded(lambda: Task(mlp(6, 12, 10, CLASSES), optimizer=ADAMW))
    trainer = trainer_of(neurons(0.5))
    trainer.validate(module, ckpt_path=path, verbose=False)
    assert_same(dict(module.state_dict()), dict(checkpoint["state_dict"]))
    assert "load_checkpoint" not in vars(trainer.strategy)


@pytest.mark.parametrize("run", ["fit", "validate"])
@pytest.mark.parametrize("damage", ALTERED, ids=lambda damage: damage.__name__)
def test_an_altered_plan_is_refused(damage: Any, run: str, good: Path, tmp_path: Path) -> None:
    checkpoint = torch.load(good, weights_only=True)
    for plan in plans(checkpoint):
        damage(plan)
    torch.save(checkpoint, tmp_path / "bad.ckpt")
    refused(tmp_path / "bad.ckpt", lambda: Task(mlp(6, 12, 10, CLASSES), optimizer=ADAMW), run, good)


def refused(
    path: Path, make: Callable[[], Any], run: str, good: Path | None, kinds: Any = (PruningError, RuntimeError)
) -> str:
    """An error; the file, and the model with the good one, are as they were."""
    module, bytes_before = seeded(make, 3), path.read_bytes()
    before, ids = snapshot(module), [id(p) for p in module.parameters()]
    callback = neurons(0.5)
    trainer = trainer_of(callback)
    with pytest.raises(kinds) as caught:
        getattr(trainer, run)(module, ckpt_path=path)
    assert path.read_bytes() == bytes_before
    assert {name: t.shape for name, t in module.state_dict().items()} == {name: t.shape for name, t in before.items()}
    assert_same(snapshot(module), before)
    assert [id(p) for p in module.parameters()] == ids
    assert left_hooks(trainer, module) == []
    assert not callback.plan_
    copy.deepcopy(module)
    if good is not None:
        trainer_of(callback).validate(module, ckpt_path=good, verbose=False)
        assert_same(dict(module.state_dict()), dict(torch.load(good, weights_only=True)["state_dict"]))
    return str(caught.value)


@pytest.mark.parametrize("run", ["fit", "validate"])
@pytest.mark.parametrize(
    "sizes",
    [
        (6, 12, 8, CLASSES),
        (6, 14, 10, CLASSES),
        (6, 4, 10, CLASSES),
        (6, 12, CLASSES),
    ],
)
def test_a_plan_of_another_class_is_refused(sizes: Any, run: str, good: Path) -> None:
    message = refused(good, lambda: Task(mlp(*sizes), optimizer=ADAMW), run, None)
    assert "net." in message


@pytest.mark.parametrize("part", [0.0, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("run", ["fit", "validate"])
def test_a_file_that_was_cut_off_is_refused(run: str, part: float, good: Path, tmp_path: Path) -> None:
    content = good.read_bytes()
    (tmp_path / "cut.ckpt").write_bytes(content[: int(part * len(content))])
    make = functools.partial(Task, mlp(6, 12, 10, CLASSES), optimizer=ADAMW)
    refused(tmp_path / "cut.ckpt", make, run, good, (PruningError, RuntimeError, EOFError, OSError))


@pytest.mark.parametrize("run", ["fit", "validate"])
@pytest.mark.parametrize(
    "kind",
    [
        "a weight is missing",
        "a weight is larger",
        "no plan in the metadata",
    ],
)
def test_weights_that_the_plan_does_not_lead_to_are_refused(kind: str, run: str, good: Path, tmp_path: Path) -> None:
    checkpoint = torch.load(good, weights_only=True)
    state: Any = checkpoint["state_dict"]
    if kind == "a weight is missing":
        del state["net.2.weight"]
    elif kind == "a weight is larger":
        state["net.2.weight"] = torch.zeros(11, 13)
    else:
        del state._metadata[""]["lightning_prune"]["plan"]
    torch.save(checkpoint, tmp_path / "bad.ckpt")
    refused(
        tmp_path / "bad.ckpt", lambda: Task(mlp(6, 12, 10, CLASSES), optimizer=ADAMW), run, good,
        (PruningError, RuntimeError, KeyError) if kind.startswith("no") else (PruningError, RuntimeError),
    )  # fmt: skip
