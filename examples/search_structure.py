"""Search a structure for the reference network: kernels, layers, widths, activation, learning rate, schedule.

    python examples/search_structure.py                                   # digits, minutes; go on with the same line
    python examples/search_structure.py --data-dir data --epochs 6 --trials 30 --plot best.png
    python examples/search_structure.py --trials 50                       # 50 in all: those of before count

optuna proposes, Lightning trains; a trial that does worse than the median of the others is stopped early. The study is
a file: kill the search at any time and start it again, and another trial takes the place of the one that was cut off.
The test images are used once, on the best network.

Needs the package optuna (extra ``search``); ``--plot`` needs matplotlib (extra ``plots``).
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from cifar_lenet import Data
from lightning.pytorch import Callback, Trainer, seed_everything

from lightning_prune import PruningError, count_cost, load_pruned, save_pruned
from lightning_prune.models import ImageClassifier, LeNet

try:
    import optuna
    from optuna.trial import FrozenTrial, Trial, TrialState
except ImportError:
    sys.exit('this example needs optuna: pip install "lightning-prune[search]"')

FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)
SCHEDULES = {
    "constant": {},
    "cosine": {},
    "exponential": {"gamma": 0.85},
    "one_cycle": {"interval": "step"},
}


def structure(params: dict[str, Any]) -> dict[str, Any]:
    """The arguments of LeNet that a trial's parameters stand for."""
    convolutions, hidden = range(params["convolutions"]), range(params["hidden"])
    return {
        "channels": [params[f"channels{i}"] for i in convolutions],
        "kernel_size": [params[f"kernel{i}"] for i in convolutions],
        "hidden": [params[f"units{i}"] for i in hidden],
        "activation": params["activation"],
    }


def propose(trial: Trial) -> dict[str, Any]:
    """What optuna wants to be tried."""
    for i in range(trial.suggest_int("convolutions", 1, 3)):
        trial.suggest_int(f"channels{i}", 4, 32, log=True)
        trial.suggest_categorical(f"kernel{i}", (3, 5, 7))
    for i in range(trial.suggest_int("hidden", 0, 2)):
        trial.suggest_int(f"units{i}", 16, 128, log=True)
    trial.suggest_categorical("activation", ("relu", "leaky_relu", "elu", "gelu", "silu", "tanh"))
    trial.suggest_float("lr", 1e-3, 0.2, log=True)
    trial.suggest_categorical("schedule", tuple(SCHEDULES))
    return dict(trial.params)


class StopIfBad(Callback):
    """Tells optuna the validation accuracy of each epoch, and ends a training that optuna gives up."""

    def __init__(self, trial: Trial) -> None:
        self.trial, self.given_up = trial, False

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            self.trial.report(float(trainer.callback_metrics["val_acc"]), trainer.current_epoch)
            self.given_up = self.trial.should_prune()
            trainer.should_stop = trainer.should_stop or self.given_up


def train(trial: Trial, data: Data, arguments: argparse.Namespace) -> float:
    """Validation accuracy after the last epoch; the weights are kept for the best."""
    params = propose(trial)
    seed_everything(arguments.seed, verbose=False)
    try:
        network = LeNet(**structure(params))
    except PruningError:  # 7x7, 7x7, then nothing is left of the image
        trial.set_user_attr("why", f"32x32 images are too small for kernels {structure(params)['kernel_size']}")
        raise optuna.TrialPruned from None
    cost = count_cost(network, torch.zeros(1, 3, 32, 32))
    trial.set_user_attr("params", cost.params)
    trial.set_user_attr("macs", cost.macs)
    schedule = params["schedule"]
    model = ImageClassifier(
        network, lr=params["lr"], lr_scheduler=schedule, lr_scheduler_options=dict(SCHEDULES[schedule])
    )
    judge = StopIfBad(trial)
    trainer = Trainer(
        max_epochs=arguments.epochs,
        accelerator=arguments.accelerator,
        devices=1,
        callbacks=[judge],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(model, data)
    if judge.given_up:
        raise optuna.TrialPruned
    save_pruned(network.cpu(), weights_of(trial, arguments))
    return float(trainer.callback_metrics["val_acc"])


def weights_of(trial: Trial | FrozenTrial, arguments: argparse.Namespace) -> Path:
    """Where a trial's weights are."""
    path: Path = arguments.out / f"trial-{trial.number}.safetensors"
    return path


def describe(trial: FrozenTrial) -> tuple[str, ...]:
    """One row of the table."""
    shape = structure(trial.params)
    sizes = zip(shape["channels"], shape["kernel_size"], strict=True)
    convolutions = " ".join(f"{channels}@{kernel}x{kernel}" for channels, kernel in sizes)
    hidden = " ".join(map(str, shape["hidden"])) or "–"
    costs = (f"{trial.user_attrs['params']:,}", f"{trial.user_attrs['macs']:,}")
    learning = (f"{trial.params['lr']:.4f}", trial.params["schedule"])
    return (str(trial.number), f"{trial.value:.4f}", convolutions, hidden, shape["activation"], *learning, *costs)


def table(trials: Sequence[FrozenTrial]) -> str:
    """The trials, the best first."""
    head = ("trial", "val_acc", "convolutions", "hidden", "activation", "lr", "schedule", "parameters", "MACs")
    rows = [head, *map(describe, trials)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    words = ("convolutions", "activation", "schedule")

    def line(row: Sequence[str]) -> str:
        cells = zip(head, row, widths, strict=True)
        return "  ".join(c.ljust(w) if name in words else c.rjust(w) for name, c, w in cells).rstrip()

    return "\n".join([line(head), "-" * (sum(widths) + 2 * len(widths) - 2), *map(line, rows[1:])])


def draw(study: optuna.Study, path: Path) -> None:
    """The search as a whole, and the course of the best among the others."""
    from matplotlib.figure import Figure

    complete = [trial for trial in study.trials if trial.state is TrialState.COMPLETE]
    stopped = [t for t in study.trials if t.state is TrialState.PRUNED and t.intermediate_values]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    numbers, values = [t.number for t in complete], [t.value for t in complete]
    left.plot(numbers, values, "o", color="#0072B2", label="trained to the end")
    last = [t.intermediate_values[max(t.intermediate_values)] for t in stopped]
    left.plot([t.number for t in stopped], last, "x", color="#D55E00", label="stopped early, last value")
    left.step(numbers, list(accumulate(values, max)), where="post", color="black", label="best so far")
    left.set(xlabel="trial", ylabel="validation accuracy", title="The search")
    for trial in (*stopped, *complete):
        course = sorted(trial.intermediate_values.items())
        style = {"color": "0.75", "lw": 0.7}
        if trial.number == study.best_trial.number:
            style = {"color": "black", "lw": 2, "zorder": 3, "label": f"best: trial {trial.number}"}
        right.plot([epoch + 1 for epoch, _ in course], [value for _, value in course], **style)
    right.set(xlabel="epoch", ylabel="validation accuracy", title="The course of every trial")
    for axes in (left, right):
        axes.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(loc="outside lower center", ncols=4)
    part = path.with_name(f".{path.name}")
    figure.savefig(part, format=path.suffix[1:])
    os.replace(part, path)


def main() -> None:
    """Parse the command line, search, tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=20, help="in all, with those that the study has (default: 20)")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--top", type=int, default=5, help="rows of the table")
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--out", type=Path, default=Path("runs/search"), help="folder of the study and of weights")
    parser.add_argument("--plot", type=Path, help="draw the search into this file (.png, .pdf, .svg)")
    arguments = parser.parse_args()
    if arguments.plot:
        if arguments.plot.suffix not in (".png", ".pdf", ".svg") or not arguments.plot.parent.is_dir():
            parser.error(f"--plot needs a .png, .pdf or .svg file in a folder that is there, got {arguments.plot}")
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            parser.error('--plot needs matplotlib: pip install "lightning-prune[plots]"')

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    data = Data(arguments.data_dir, arguments.batch_size)
    arguments.out.mkdir(parents=True, exist_ok=True)
    study = optuna.create_study(
        storage=f"sqlite:///{arguments.out / 'study.db'}",
        study_name="structure",
        load_if_exists=True,
        direction="maximize",
        pruner=optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=max(arguments.epochs // 4, 1)),
    )
    # Trials are comparable only where the data and the length of the training are the same.
    settings = {"data": data.name, "epochs": arguments.epochs, "batch_size": arguments.batch_size}
    known = study.user_attrs.get("settings", settings)
    if known != settings:
        parser.error(f"{arguments.out} holds a study of {known}, not of {settings}: give another --out")
    study.set_user_attr("settings", settings)
    # The same seed as before would propose the same trials as before.
    study.sampler = optuna.samplers.TPESampler(seed=arguments.seed + len(study.trials), n_startup_trials=8)
    done = len(study.get_trials(states=FINISHED))
    print(f"{arguments.out / 'study.db'}, {data.name}: {f'going on after {done} trials' if done else 'a new study'}")
    started = time.monotonic()

    def tell(study: optuna.Study, trial: FrozenTrial) -> None:
        why = trial.user_attrs.get("why", "stopped early")
        print(f"trial {trial.number}: {why if trial.value is None else f'{trial.value:.4f}'}", flush=True)

    if done < arguments.trials:
        limit = optuna.study.MaxTrialsCallback(arguments.trials, states=FINISHED)
        study.optimize(lambda trial: train(trial, data, arguments), callbacks=[tell, limit])
    finished = study.get_trials(states=FINISHED)
    complete = sorted((t for t in finished if t.state is TrialState.COMPLETE), key=lambda t: -(t.value or 0.0))
    if not complete:
        sys.exit("no trial came to its end: give it more --trials")

    print(f"\n{len(finished)} trials, {len(finished) - len(complete)} of them given up early, ", end="")
    print(f"{len(finished) - done} now in {time.monotonic() - started:.0f} s\n\n{table(complete[: arguments.top])}\n")
    best = complete[0]
    network = load_pruned(weights_of(best, arguments), LeNet(**structure(best.params)))
    tester = Trainer(accelerator=arguments.accelerator, devices=1, logger=False, enable_progress_bar=False)
    (result,) = tester.test(ImageClassifier(network), data, verbose=False)
    print(f"trial {best.number}: {data.name} test accuracy {result['test_acc']:.4f}, {weights_of(best, arguments)}")
    shape = ", ".join(f"{key}={value!r}" for key, value in structure(best.params).items())
    print(f"LeNet({shape})")
    if arguments.plot:
        draw(study, arguments.plot)
        print(f"plot: {arguments.plot}")


if __name__ == "__main__":
    main()
