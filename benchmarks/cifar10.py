"""Pruning on CIFAR-10: dense, `NeuronPruning`, torch-pruning, the small network from scratch; kernels and layers.

    python ../shared/data/unpack.py data
    python benchmarks/cifar10.py [--nets lenet resnet20] [--factors 2 2.5] [--seeds 0 1 2] [--csv FILE] [--quick]
    python benchmarks/cifar10.py --nets resnet20 --factors 2 --sides dense ours kernels layers
    python benchmarks/cifar10.py --held-out --sides ours --criterion l1 --options scope=layer end=0.3

Every side trains from its first weights for the same number of epochs, with the same images, optimizer and learning
rates: the dense network; ours, which loses MACs by `NeuronPruning` as it trains; torch-pruning, which loses as many at
the ends of the same epochs and then gets a new optimizer, for the old one holds parameters that are gone; and, from
scratch, a network of ours' final shape (or that of ``kernels``) with weights of its own. ``kernels`` and ``layers``
lose their MACs by `KernelShrinking` and `LayerPruning` instead; a budget that they can't reach is left out. Budgets are
MACs of one image; ``--factors 2`` is "at least 2 times fewer". Training images are flipped and moved by up to 4 pixels
at random; the 10 000 test images are used once, for the final weights: no checkpoint is chosen. The constants in `NETS`
were chosen with ``--held-out``: 5 000 of the 50 000 tell the accuracy, the others train, and nothing is known of the
test images.

ResNet-56 and VGG-16-BN are for a GPU; where there is none only the two small networks are in the table, unless asked
for by name.
"""

from __future__ import annotations

import argparse
import ast
import csv
import logging
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_prune import KernelShrinking, LayerPruning, NeuronPruning, PruningError, count_cost
from lightning_prune.models import LeNet

HELD_OUT = 5_000
"""How many training images ``--held-out`` keeps from training."""
SHIFT = 4
"""Pixels that a training image moves at most, in each direction."""
WARMUP = 0.1
"""Fraction of training until the learning rate is at its height; a cosine takes it down to zero from there."""
TP_STEPS = 400
"""In how many steps torch-pruning would remove all channels; it stops where the budget is met."""
SIDES = ("dense", "ours", "torch-pruning", "from scratch", "kernels", "layers", "kernels from scratch")
FROM_SCRATCH = {"from scratch": "ours", "kernels from scratch": "kernels"}
STRUCTURE = {"kernels": KernelShrinking, "layers": LayerPruning}

# ------------------------------------------------------------------------------------------------------------ networks


class Block(nn.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + self.shortcut(x))


def resnet(depth: int) -> nn.Sequential:
    """He et al.'s network for CIFAR of 6n+2 layers, with 1x1 convolutions where a shortcut changes width."""
    blocks: list[nn.Module] = []
    inputs = 16
    for width in (16, 32, 64):
        for number in range((depth - 2) // 6):
            blocks.append(Block(inputs, width, 2 if width > 16 and not number else 1))
            inputs = width
    stem = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def vgg16_bn() -> nn.Sequential:
    """VGG-16 with batch norm as it is used on 32x32: one linear layer behind the convolutions."""
    layers: list[nn.Module] = []
    inputs = 3
    for width in (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0):
        if width:
            layers += [nn.Conv2d(inputs, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            inputs = width
        else:
            layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, 10))


@dataclass(frozen=True)
class Recipe:
    """How a network is trained, and how both sides prune it."""

    title: str
    build: Callable[[], nn.Sequential]
    epochs: int
    seeds: int
    batch: int
    lr: float  # of SGD with Nesterov momentum 0.9
    weight_decay: float
    ours: dict[str, Any] = field(default_factory=dict)  # arguments of NeuronPruning
    structure: dict[str, Any] = field(default_factory=dict)  # of KernelShrinking and LayerPruning
    theirs: dict[str, Any] = field(default_factory=dict)  # of torch-pruning, see TorchPruning
    precision: Any = "32-true"  # of training, as Lightning calls it; accuracies are those of the network in float32


# ---------------------------------------------------------------------------------------------------------------- data


@dataclass
class Data:
    """What trains and what tells the accuracy, each as two tensors."""

    images: Tensor
    labels: Tensor
    others: Tensor
    others_labels: Tensor


def load(folder: Path, held_out: bool) -> Data:
    """CIFAR-10 as bytes; ``held_out`` leaves the test set alone and divides the training set."""
    if not (folder / "cifar-10-batches-py").is_dir():
        sys.exit(
            f"cifar10: CIFAR-10 is not in {folder}/cifar-10-batches-py.\n"
            f"Unpack it there: python ../shared/data/unpack.py {folder}\n"
            f"or download it: python -c 'import torchvision; torchvision.datasets.CIFAR10(\"{folder}\", download=True)'"
        )
    train = read(folder, train=True)
    if not held_out:
        return Data(*train, *read(folder, train=False))
    order = torch.randperm(len(train[0]), generator=torch.Generator().manual_seed(123))
    images, labels = train[0][order], train[1][order]
    return Data(images[HELD_OUT:], labels[HELD_OUT:], images[:HELD_OUT], labels[:HELD_OUT])


def read(folder: Path, train: bool) -> tuple[Tensor, Tensor]:
    from torchvision.datasets import CIFAR10

    data = CIFAR10(str(folder), train=train)
    return torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(data.targets)


def pixels(images: Tensor) -> Tensor:
    """Bytes as numbers of about mean 0 and variance 1."""
    return (images.float() - 121) / 63


class Batches:
    """Shuffled batches of images that are flipped and moved; what a DataLoader does, without its cost for each."""

    def __init__(self, images: Tensor, labels: Tensor, batch: int) -> None:
        padded = F.pad(images, (SHIFT,) * 4, value=121)
        self.views = padded.unfold(2, 32, 1).unfold(3, 32, 1)  # image, colour, down, right, then its rows and columns
        self.labels = labels
        self.batch = batch

    def __len__(self) -> int:
        return len(self.labels) // self.batch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.labels), device=self.labels.device)
        for chosen in order[: len(self) * self.batch].split(self.batch):
            down, right = torch.randint(2 * SHIFT + 1, (2, len(chosen)), device=chosen.device)
            images = pixels(self.views[chosen, :, down, right])
            flip = torch.rand(len(chosen), 1, 1, 1, device=chosen.device) < 0.5
            yield torch.where(flip, images.flip(3), images), self.labels[chosen]


# ------------------------------------------------------------------------------------------------------------ training


class Classifier(L.LightningModule):
    """The network, its loss and its optimizer."""

    def __init__(self, net: nn.Module, recipe: Recipe, steps: int) -> None:
        super().__init__()
        self.net = net
        self.recipe = recipe
        self.steps = steps

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:  # noqa: D102
        images, labels = batch
        return F.cross_entropy(self.net(images), labels)

    def rate(self, step: int) -> float:
        """The learning rate of a step, as a part of its height."""
        progress = min(step / self.steps, 1.0)
        if progress < WARMUP:
            return progress / WARMUP
        return 0.5 + 0.5 * math.cos(math.pi * (progress - WARMUP) / (1 - WARMUP))

    def new_optimizer(self) -> torch.optim.Optimizer:
        """An optimizer of the parameters that there are."""
        weight_decay = self.recipe.weight_decay
        return torch.optim.SGD(self.parameters(), self.recipe.lr, 0.9, weight_decay=weight_decay, nesterov=True)

    def configure_optimizers(self) -> Any:  # noqa: D102
        optimizer = self.new_optimizer()
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Seconds(L.Callback):
    """Seconds of each epoch."""

    def __init__(self) -> None:
        self.epochs: list[float] = []

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:  # noqa: D102
        self.began = time.perf_counter()

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:  # noqa: D102
        self.epochs.append(time.perf_counter() - self.began)


class TorchPruning(L.Callback):
    """torch-pruning at the ends of epochs, as its README says: steps of a pruner, then training goes on.

    Args:
        amounts: Fraction of the dense MACs that is to be gone at the end of each epoch.
        options: Arguments of BasePruner; ``importance`` and ``p`` name its importance, ``ignore`` (a glob) the layers
            that it leaves alone beside the last one.
    """

    def __init__(self, amounts: Sequence[float], options: dict[str, Any]) -> None:
        self.amounts = amounts
        self.options = dict(options)
        self.pruner: Any = None

    def _build(self, net: Any, images: Tensor) -> Any:
        import torch_pruning as tp

        options = dict(self.options)
        named = {"p": options.pop("p")} if "p" in options else {}
        importance = getattr(tp.importance, options.pop("importance", "GroupMagnitudeImportance"))(**named)
        pattern = options.pop("ignore", "")
        ignored = [net[-1], *(module for name, module in net.named_modules() if name and fnmatchcase(name, pattern))]
        defaults = {"pruning_ratio": 1.0, "iterative_steps": TP_STEPS, "ignored_layers": ignored}
        return tp.pruner.BasePruner(net, images, importance, **(defaults | options))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Prune after an epoch's last batch."""
        amount = self.amounts[trainer.current_epoch]
        if not trainer.is_last_batch or not amount:
            return
        net, images = pl_module.net, batch[0][:1]
        if self.pruner is None:
            self.dense = count_cost(net, images).macs
            self.pruner = self._build(net, images)
        before = macs = count_cost(net, images).macs
        while macs > self.dense * (1 - amount):
            if self.pruner.current_step == self.pruner.iterative_steps:
                raise RuntimeError(f"torch-pruning stops at {macs} MACs of {self.dense}")
            self.pruner.step()
            macs = count_cost(net, images).macs
        net.train()  # building the graph leaves it in evaluation mode
        if macs < before:
            optimizer = pl_module.new_optimizer()
            for old, new in zip(trainer.optimizers[0].param_groups, optimizer.param_groups, strict=True):
                new["lr"], new["initial_lr"] = old["lr"], old["initial_lr"]
            trainer.strategy.optimizers = [optimizer]
            trainer.lr_scheduler_configs[0].scheduler.optimizer = optimizer


@torch.no_grad()
def accuracy(net: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The percentage of images whose class the network tells."""
    net.eval()
    answers = torch.cat([net(pixels(part)).argmax(1) for part in images.split(500)])
    return 100 * float((answers == labels).double().mean())


def train(net: nn.Module, recipe: Recipe, data: Data, seed: int, callbacks: list[L.Callback]) -> Classifier:
    """One training of a new network."""
    L.seed_everything(seed, verbose=False)
    batches = Batches(data.images, data.labels, recipe.batch)
    model = Classifier(net, recipe, len(batches) * recipe.epochs)
    L.Trainer(
        max_epochs=recipe.epochs,
        accelerator=data.images.device.type,
        devices=1,
        precision=recipe.precision,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(model, batches)
    return model.to(data.images.device)


def new(recipe: Recipe, seed: int) -> nn.Sequential:
    L.seed_everything(seed, verbose=False)
    return recipe.build().to(memory_format=torch.channels_last)  # the same numbers, sooner


# --------------------------------------------------------------------------------------------------------------- table


Row = dict[str, Any]


@dataclass
class Bench:
    """One network's rows, and the plans whose shapes the networks from scratch take over."""

    name: str
    recipe: Recipe
    data: Data
    plans: dict[tuple[str, float, int], Any] = field(default_factory=dict)

    def measure(self, side: str, factor: float, seed: int) -> Row:
        """Train one side."""
        recipe, watch = self.recipe, Seconds()
        callbacks: list[L.Callback] = [watch]
        net = new(recipe, seed)
        dense = self.macs(net)
        options: dict[str, Any] = {"of": "macs", "report": False, **recipe.ours}
        pruning: Any = NeuronPruning(1 - 1 / factor, **options)
        if side == "ours":
            callbacks.append(pruning)
        elif side == "torch-pruning":
            callbacks.append(TorchPruning(pruning.preview(recipe.epochs), recipe.theirs))
        elif side in FROM_SCRATCH:
            self.plans[FROM_SCRATCH[side], factor, seed].apply(Classifier(net, recipe, 1))
            reset(net, seed)
        elif side in STRUCTURE:
            pruning = STRUCTURE[side](1 - 1 / factor, of="macs", report=False, **recipe.structure)
            callbacks.append(pruning)
        model = train(net, recipe, self.data, seed, callbacks)
        self.plans[side, factor, seed] = pruning.plan_
        macs = self.macs(model.net)
        return {
            "net": self.name,
            "side": side,
            "factor": factor,
            "seed": seed,
            "epochs": recipe.epochs,
            "accuracy": accuracy(model.net, self.data.others, self.data.others_labels),
            "macs": macs,
            "times": dense / macs,
            "parameters": sum(parameter.numel() for parameter in model.net.parameters()),
            "widths": widths(model.net),
            "seconds": sum(watch.epochs),
            "last_epoch": watch.epochs[-1],
        }

    def macs(self, net: nn.Module) -> int:
        """MACs of one image."""
        device = next(net.parameters()).device
        return count_cost(net, torch.zeros(1, 3, 32, 32, device=device)).macs

    def run(self, sides: Sequence[str], factors: Sequence[float], seeds: Sequence[int]) -> Iterator[Row]:
        """All rows, seed after seed, so that what there is so far is a table."""
        for seed in seeds:
            if "dense" in sides:
                yield self.measure("dense", 1.0, seed)
            for factor in factors:
                for side in SIDES[1:]:
                    missing = side in FROM_SCRATCH and (FROM_SCRATCH[side], factor, seed) not in self.plans
                    if side not in sides or missing:  # the budget could not be reached
                        continue
                    try:
                        yield self.measure(side, factor, seed)
                    except PruningError as error:
                        if side not in STRUCTURE:
                            raise
                        print(f"{side}: {str(error).splitlines()[0]}", flush=True)


def reset(net: nn.Module, seed: int) -> None:
    """New weights for the shapes that there are."""
    L.seed_everything(seed, verbose=False)
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear | nn.BatchNorm2d):
            module.reset_parameters()


def widths(net: nn.Module) -> str:
    """Output widths of convolutions and linear layers."""
    made = [module.weight.size(0) for module in net.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    return "/".join(map(str, made[:-1]))


def summary(rows: Sequence[Row]) -> list[list[str]]:
    """A line for each network, side and budget: means over the seeds."""
    lines = []
    for net, side, factor in dict.fromkeys((row["net"], row["side"], row["factor"]) for row in rows):
        mine = [row for row in rows if (row["net"], row["side"], row["factor"]) == (net, side, factor)]
        accuracies = {row["seed"]: row["accuracy"] for row in mine}
        dense = {row["seed"]: row["accuracy"] for row in rows if row["net"] == net and row["side"] == "dense"}
        shared = accuracies.keys() & dense.keys()
        lost = f"{mean(accuracies[seed] - dense[seed] for seed in shared):+.2f}" if shared else ""
        spread = f"{stdev(accuracies.values()):.2f}" if len(mine) > 1 else ""
        lines.append(
            [
                f"{NETS[net].title}, {mine[0]['epochs']} epochs",
                side,
                f"{mean(row['times'] for row in mine):.2f}x",
                f"{mean(row['parameters'] for row in mine):.0f}",
                f"{mean(accuracies.values()):.2f}",
                spread,
                lost,
                str(len(mine)),
                f"{mean(row['seconds'] for row in mine):.0f}",
                f"{mean(row['last_epoch'] for row in mine):.1f}",
            ]
        )
    return lines


HEAD = [
    "network",
    "side",
    "fewer MACs",
    "parameters",
    "accuracy %",
    "std",
    "to dense",
    "seeds",
    "seconds",
    "last epoch",
]


def print_table(body: Sequence[Sequence[str]]) -> None:
    print()
    wide = [max(map(len, column)) for column in zip(HEAD, *body, strict=True)]
    for number, line in enumerate((HEAD, *body)):
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, wide, strict=True)) + " |")
        if not number:
            print("|" + "|".join("-" * (width + 2) for width in wide) + "|")
    print(
        "\nMeans over the seeds; std: of one seed's accuracy. seconds: of all epochs, and of the last one.", flush=True
    )


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


# Chosen with --held-out, seed 0 alone, lenet, batches of 128, 10 epochs; accuracies there in %, of 5000 images, so that
# a point is within chance:
# dense: lr 0.02 63.96, 0.05 66.72, 0.1 63.54; the others at 0.05 and 2 times fewer MACs:
# ours: end 0.2 59.94, 0.5 59.88, 0.8 59.72; one_shot at the second epoch 58.44, scope layer 56.40,
#     exclude *conv2 59.92.
# from scratch, by widths: 3/13/120/84 59.58, 3/16/59/84 61.48, 3/15/78/84 62.14, 4/8/30/84 56.72.
# torch-pruning: as it is 56.66, p 1 56.36, global 57.02, global with ignore fc* 59.90.
# The epochs are what there was time for. Nothing was chosen for the other networks.
NETS = {
    "lenet": Recipe(
        title="LeNet",
        build=LeNet,
        epochs=15,
        seeds=3,
        batch=128,
        lr=0.05,
        weight_decay=5e-4,
        structure={"end": 0.3},
        theirs={"global_pruning": True, "ignore": "fc*"},
    ),
    "resnet20": Recipe("ResNet-20", lambda: resnet(20), epochs=10, seeds=1, batch=128, lr=0.1, weight_decay=5e-4),
    "resnet56": Recipe("ResNet-56", lambda: resnet(56), epochs=100, seeds=1, batch=128, lr=0.1, weight_decay=5e-4),
    "vgg16_bn": Recipe("VGG-16-BN", vgg16_bn, epochs=100, seeds=1, batch=128, lr=0.05, weight_decay=5e-4),
}
SMALL = ("lenet", "resnet20")


def option(text: str) -> tuple[str, Any]:
    """``key=value``; a value that is no Python literal is a string."""
    key, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form key=value")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="+", choices=list(NETS), help="only these networks")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES[:4]), help="from scratch needs ours")
    parser.add_argument("--factors", nargs="+", type=float, default=[2.0, 2.5], help="how many times fewer MACs")
    parser.add_argument("--seeds", nargs="+", type=int, help="of the trainings of each side, instead of the recipe's")
    parser.add_argument("--criterion", help="of NeuronPruning, instead of the recipe's")
    parser.add_argument("--options", nargs="+", type=option, default=[], metavar="KEY=VALUE", help="of NeuronPruning")
    parser.add_argument(
        "--structure-options", nargs="+", type=option, default=[], metavar="KEY=VALUE", help="of kernels and layers"
    )
    parser.add_argument(
        "--tp-options",
        nargs="+",
        type=option,
        default=[],
        metavar="KEY=VALUE",
        help="of torch-pruning's BasePruner; importance and p: class and argument of its importance; ignore: a glob",
    )
    for name in ("epochs", "batch", "lr", "weight-decay"):
        parser.add_argument(
            f"--{name}", type=int if name in ("epochs", "batch") else float, help="instead of the recipe's"
        )
    parser.add_argument("--precision", help="of training, as Lightning calls it, instead of the recipe's")
    parser.add_argument("--quick", action="store_true", help="one seed, two epochs of 3 200 images: does it run?")
    parser.add_argument("--held-out", action="store_true", help="accuracy on held-out training images, not the test's")
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="where CIFAR-10 is")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write all numbers there, after each training")
    args = parser.parse_args()
    for small, pruned in FROM_SCRATCH.items():
        if small in args.sides and pruned not in args.sides:
            parser.error(f"{small!r} takes over what {pruned!r} leads to: add it to --sides")
    return args


def recipe_of(name: str, args: argparse.Namespace) -> Recipe:
    """The recipe with what the command line changes."""
    recipe = NETS[name]
    fields = {f: getattr(recipe, f) for f in recipe.__dataclass_fields__}
    fields |= {f: value for f in ("epochs", "batch", "lr", "weight_decay") if (value := getattr(args, f)) is not None}
    fields |= {"precision": args.precision} if args.precision else {}
    fields["structure"] = recipe.structure | dict(args.structure_options)
    fields["ours"] = recipe.ours | ({"criterion": args.criterion} if args.criterion else {}) | dict(args.options)
    fields["theirs"] = recipe.theirs | dict(args.tp_options)
    return Recipe(**(fields | ({"epochs": 2} if args.quick else {})))


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    quiet()
    data = load(args.data_dir, args.held_out)
    if args.quick:
        data = Data(*(tensor[:3200] for tensor in vars(data).values()))
    data = Data(*(tensor.to(args.device) for tensor in vars(data).values()))
    rows: list[Row] = []
    for name in args.nets or (NETS if args.device == "cuda" else SMALL):
        recipe = recipe_of(name, args)
        for row in Bench(name, recipe, data).run(
            args.sides, args.factors, [0] if args.quick else args.seeds or range(recipe.seeds)
        ):
            rows.append(row)
            print("  ".join(f"{key} {show(value)}" for key, value in row.items()), flush=True)
            if args.csv:
                write_csv(args.csv, rows)
    print_table(summary(rows))


def show(value: Any) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def quiet() -> None:
    """Lightning's hints are about nothing here: no loader workers, no logger."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")


if __name__ == "__main__":
    main()
