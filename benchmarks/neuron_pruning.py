"""What removing neurons buys: time saved against MACs saved beside torch-pruning's, and epochs that get shorter.

    python benchmarks/neuron_pruning.py                                 # all: some fifteen minutes per network
    python benchmarks/neuron_pruning.py latency --models resnet18 resnet50 --batches 32 --round-to 1 8
    python benchmarks/neuron_pruning.py epochs                          # training time per epoch as pruning goes on
    python benchmarks/neuron_pruning.py --quick                         # does it run?

``latency``: half of the MACs go, by `prune_neurons` (``of="macs"``) and by torch-pruning as its README says: the same
part of each layer, all but the one that makes the output, in steps until as many MACs are gone. Weights are random:
time depends on shapes only. Images are 224x224, the GPT reads 128 tokens. Each time is the median of forward passes in
evaluation mode, all sides in turns. *Realised* is (dense time / time) / (dense MACs / MACs): 1 where time falls as MACs
do. On CPUs with the numbers of threads that are asked for, and on the GPU where there is one.

``epochs``: ResNet-18 in a Trainer with `NeuronPruning`, epoch for epoch, beside the median epoch of two trainings
without it, one before and one after.
"""

from __future__ import annotations

import argparse
import csv
import logging
import math
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune import NeuronPruning, count_cost, prune_neurons

TP_STEPS = 100
"""In how many steps torch-pruning would remove all channels; it stops where the budget is met."""
TOKENS = 128

# -------------------------------------------------------------------------------------------------------------- models


class Attention(nn.Module):
    """Causal attention with a projection each for queries, keys and values."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.queries, self.keys, self.values = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        batch, tokens, _ = x.shape
        queries, keys, values = (
            layer(x).view(batch, tokens, self.heads, -1).transpose(1, 2)
            for layer in (self.queries, self.keys, self.values)
        )
        mixed = F.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        made: Tensor = self.out(mixed.transpose(1, 2).reshape(batch, tokens, -1))
        return made


class Layer(nn.Module):
    """Attention and a multilayer perceptron, each on normalised input and added to what was there."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        x = x + self.attention(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class GPT(nn.Module):
    """A decoder of GPT-2's kind with 6 layers of 8 heads and width 512."""

    def __init__(self, vocabulary: int = 4096, width: int = 512, heads: int = 8, layers: int = 6) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(TOKENS, width)
        self.layers = nn.Sequential(*(Layer(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:  # noqa: D102
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.size(1), device=tokens.device))
        out: Tensor = self.head(self.norm(self.layers(x)))
        return out


def torchvisions(name: str) -> nn.Module:
    import torchvision

    model: nn.Module = torchvision.models.get_model(name, weights=None)
    return model


def images(batch: int) -> Tensor:
    return torch.randn(batch, 3, 224, 224)


@dataclass(frozen=True)
class Entry:
    """A model of the table.

    Attributes:
        build: Makes it.
        inputs: Batch size -> what it takes.
        output: Name of the layer that makes the output.
        heads: What torch-pruning has to be told of attention: model -> heads by layer.
        multiple: torch-pruning's widths must be multiples of it: MultiheadAttention keeps its number of heads.
        mend: Tells the model sizes that torch-pruning leaves as they were.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[int], Tensor]
    output: str
    heads: Callable[[nn.Module], dict[nn.Module, int]] = lambda model: {}
    multiple: int = 1
    mend: Callable[[Any], None] = lambda model: None


def heads_of_gpt(model: nn.Module) -> dict[nn.Module, int]:
    found = [module for module in model.modules() if isinstance(module, Attention)]
    return {layer: each.heads for each in found for layer in (each.queries, each.keys, each.values)}


def mend_vit(model: Any) -> None:
    model.hidden_dim = model.conv_proj.out_channels


MODELS = {
    "resnet18": Entry(partial(torchvisions, "resnet18"), images, "fc"),
    "resnet50": Entry(partial(torchvisions, "resnet50"), images, "fc"),
    "mobilenet_v2": Entry(partial(torchvisions, "mobilenet_v2"), images, "classifier.1"),
    "vit_b_16": Entry(partial(torchvisions, "vit_b_16"), images, "heads.head", multiple=12, mend=mend_vit),
    "gpt": Entry(GPT, lambda batch: torch.randint(4096, (batch, TOKENS)), "head", heads_of_gpt),
}


def by_torch_pruning(entry: Entry, model: nn.Module, amount: float, round_to: int) -> None:
    """Remove part of the MACs as torch-pruning's README does."""
    import torch_pruning as tp

    inputs = entry.inputs(1)
    goal = count_cost(model, inputs).macs * (1 - amount)
    pruner = tp.pruner.BasePruner(
        model,
        inputs,
        tp.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=1.0,
        iterative_steps=TP_STEPS,
        ignored_layers=[model.get_submodule(entry.output)],
        num_heads=entry.heads(model),
        round_to=math.lcm(round_to, entry.multiple),
    )
    while count_cost(model, inputs).macs > goal:
        if pruner.current_step == TP_STEPS:
            raise RuntimeError("torch-pruning can't reach the budget")
        pruner.step()
        entry.mend(model)


# ------------------------------------------------------------------------------------------------------------- latency


@dataclass(frozen=True)
class Side:
    """A model whose time is taken."""

    name: str
    round_to: int
    model: nn.Module
    macs: int
    seconds: float  # that pruning took


def sides(entry: Entry, amount: float, roundings: Sequence[int]) -> list[Side]:
    """The dense model, and what each tool makes of it."""
    torch.manual_seed(0)
    dense = entry.build().eval()
    inputs = entry.inputs(1)
    made = [Side("dense", 1, dense, count_cost(dense, inputs).macs, 0.0)]
    for round_to in roundings:
        for name in ("ours", "torch-pruning"):
            model, began = deepcopy(dense), time.perf_counter()
            if name == "ours":
                prune_neurons(model, inputs, amount, of="macs", round_to=round_to)
            else:
                by_torch_pruning(entry, model, amount, round_to)
            seconds = time.perf_counter() - began
            made.append(Side(name, round_to, model.eval(), count_cost(model, inputs).macs, seconds))
    return made


@torch.inference_mode()
def times(models: Sequence[nn.Module], inputs: Tensor, seconds: float, clock: Callable[[], float]) -> list[float]:
    """Median time of one forward pass of each model, in turns, so that drift hits all alike."""
    taken: list[list[float]] = [[] for _ in models]

    def once(model: nn.Module) -> float:
        began = clock()
        model(inputs)
        if inputs.device.type == "cuda":
            torch.cuda.synchronize()
        return clock() - began

    for model in models:
        once(model)  # warm-up
        once(model)
    order = list(zip(models, taken, strict=True))
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(taken[0]) < 5:
        for model, mine in order:
            mine.append(once(model))
        order.reverse()  # neither is always the one that runs on warm caches
    return [median(mine) for mine in taken]


CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
Row = dict[str, Any]


def latency(args: argparse.Namespace) -> list[Row]:
    """A row for each network, side, device, number of threads and batch."""
    rows: list[Row] = []
    for name in args.models:
        entry = MODELS[name]
        made = sides(entry, args.amount, args.round_to)
        places = [("cpu", threads) for threads in args.threads] if "cpu" in args.devices else []
        places += [("cuda", 0)] if "cuda" in args.devices else []
        for device, threads in places:
            torch.set_num_threads(threads or 1)
            models = [side.model.to(device) for side in made]
            for batch in args.batches:
                spent = times(models, entry.inputs(batch).to(device), args.seconds, CLOCKS[args.clock])
                for side, each in zip(made, spent, strict=True):
                    fewer, faster = made[0].macs / side.macs, spent[0] / each
                    rows.append(
                        {
                            "network": name,
                            "device": device if device == "cuda" else f"{threads} thread{'s' * (threads > 1)}",
                            "batch": batch,
                            "side": side.name,
                            "round_to": side.round_to if side.name != "dense" else "",
                            "ms": each * 1e3,
                            "fewer MACs": fewer,
                            "faster": faster,
                            "realised": faster / fewer,
                            "pruning s": side.seconds,
                        }
                    )
                    print(line(rows[-1]), file=sys.stderr, flush=True)
                if args.csv:
                    write_csv(args.csv, rows)
    return rows


# -------------------------------------------------------------------------------------------------------------- epochs


class Task(LightningModule):
    """ResNet-18 on random images of 64x64, batches of 32."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.net = torchvisions("resnet18")
        self.steps = steps

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Cross entropy."""
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        """SGD with momentum, as these networks are trained."""
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)

    def train_dataloader(self) -> Any:
        """Random images."""
        count = 32 * self.steps
        return DataLoader(TensorDataset(torch.randn(count, 3, 64, 64), torch.randint(1000, (count,))), 32)


class Watch(Callback):
    """Seconds of each epoch, its pruning included, the median of its steps, and what is left after it."""

    def __init__(self) -> None:
        self.epochs: list[float] = []
        self.steps: list[float] = []
        self.macs: list[int] = []
        self._starts: list[float] = []

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """An epoch begins."""
        self.macs.append(count_cost(pl_module.net, torch.zeros(1, 3, 64, 64, device=pl_module.device)).macs)
        self._began, self._starts = time.perf_counter(), []

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        """A step begins, and ends where the next one does."""
        self._starts.append(time.perf_counter())

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """An epoch ends."""
        self.epochs.append(time.perf_counter() - self._began)
        self.steps.append(median(b - a for a, b in zip(self._starts, self._starts[1:], strict=False)))


def watched(args: argparse.Namespace, callbacks: list[Callback]) -> Watch:
    """A training."""
    watch = Watch()
    torch.manual_seed(0)
    Trainer(
        max_epochs=args.epochs,
        accelerator="gpu" if args.devices[-1] == "cuda" else "cpu",
        devices=1,
        callbacks=[*callbacks, watch],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(Task(args.steps))
    return watch


def epochs(args: argparse.Namespace) -> list[Row]:
    """A row for each epoch: with the callback, and without."""
    torch.set_num_threads(args.threads[0])
    end = args.epochs - 2 if args.epochs > 2 else 1  # the last epochs are all of the small network
    pruning = NeuronPruning(args.amount, of="macs", end=end, round_to=args.round_to[-1], report=False)
    before, ours, after = watched(args, []), watched(args, [pruning]), watched(args, [])
    dense_steps, dense_epochs = median(before.steps + after.steps), median(before.epochs + after.epochs)
    return [
        {
            "epoch": number,
            "MACs": macs / ours.macs[0],
            "step ms": step * 1e3,
            "step of dense": step / dense_steps,
            "epoch s": whole,
            "epoch of dense": whole / dense_epochs,
        }
        for number, (macs, step, whole) in enumerate(zip(ours.macs, ours.steps, ours.epochs, strict=True), start=1)
    ]


# --------------------------------------------------------------------------------------------------------------- table


def text(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.2f}" if value < 100 else f"{value:.0f}"


def line(row: Row) -> str:
    return "  ".join(f"{key} {text(value)}" for key, value in row.items())


def show(rows: Sequence[Row]) -> None:
    """Print a table in Markdown."""
    cells = [list(rows[0]), *([text(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    print()
    for number, row in enumerate(cells):
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |")
        if not number:
            print("|" + "|".join("-" * (width + 2) for width in widths) + "|")
    sys.stdout.flush()


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


TABLES: dict[str, Callable[[argparse.Namespace], list[Row]]] = {"latency": latency, "epochs": epochs}


def main() -> None:
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", default="all", choices=["all", *TABLES])
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--amount", type=float, default=0.5, help="fraction of the MACs that goes")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2], help="of the CPU; epochs takes the first")
    parser.add_argument("--round-to", nargs="+", type=int, default=[8], help="of both tools; epochs takes the last")
    parser.add_argument("--devices", nargs="+", choices=["cpu", "cuda"], default=devices)
    parser.add_argument("--seconds", type=float, default=20.0, help="per row of latency; five rounds at least")
    parser.add_argument(
        "--clock", choices=list(CLOCKS), default="wall", help="of latency; cpu, with one thread, where others work too"
    )
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20, help="per epoch")
    parser.add_argument("--quick", action="store_true", help="two small networks, short times: does it run at all?")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write latency's numbers there")
    args = parser.parse_args()
    if args.quick:
        args.models, args.batches, args.seconds, args.steps, args.epochs = ["resnet18", "gpt"], [1, 2], 1.0, 3, 4
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    for name in TABLES if args.what == "all" else [args.what]:
        show(TABLES[name](args))


if __name__ == "__main__":
    main()
