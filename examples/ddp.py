"""Two processes: neurons and weights are pruned under DDP, and all processes hold the same network to the last bit.

    python examples/ddp.py                       # 2 processes on the CPU (gloo)
    python examples/ddp.py --accelerator gpu     # one process per GPU (nccl)

Every process starts from other random numbers than its neighbours, ranks neurons at random with ``--criterion random``
and still does what the others do. Ends with 1 if they differ.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from pathlib import Path

import torch
from cifar_lenet import Data
from lightning.pytorch import Trainer
from torch import Tensor, distributed
from torch.utils import _pytree as pytree

from lightning_prune import NeuronPruning, WeightPruning
from lightning_prune.models import ImageClassifier, LeNet


def fingerprint(tree: object) -> str:
    """A checksum of all tensors and numbers in nested lists and dicts, to the last bit."""
    leaves, spec = pytree.tree_flatten(tree)
    total = hashlib.sha256(str(spec).encode())
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            total.update(f"{leaf.dtype} {tuple(leaf.shape)}".encode())
            total.update(leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        else:
            total.update(repr(leaf).encode())
    return total.hexdigest()[:16]


def main() -> None:
    """Parse the command line, train, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--amount", type=float, default=0.5, help="fraction of MACs and of weights (default: 0.5)")
    parser.add_argument("--criterion", default="l1", help="of neurons: l1, taylor, random, ...")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    arguments = parser.parse_args()

    # No seed on purpose: DDP gives all processes rank 0's weights, the callbacks its decisions.
    data = Data(arguments.data_dir, batch_size=16)
    model = ImageClassifier(LeNet(), lr=0.01, lr_scheduler="cosine")
    neurons = NeuronPruning(arguments.amount, of="macs", criterion=arguments.criterion)
    weights = WeightPruning(arguments.amount)
    trainer = Trainer(
        max_epochs=arguments.epochs,
        accelerator=arguments.accelerator,
        devices=arguments.devices,
        strategy="ddp",
        callbacks=[neurons, weights],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(model, data)

    mine = {
        "plan of removed neurons": fingerprint(neurons.plan_.to_dict()),
        "masks": fingerprint(weights.masks_),
        "parameters": fingerprint(dict(model.network.state_dict())),
        "optimizer state": fingerprint(trainer.optimizers[0].state_dict()["state"]),
    }
    if trainer.world_size == 1:
        sys.exit("one process has nobody to agree with: give --devices 2 or more")
    every: list[dict[str, str]] = [{}] * trainer.world_size
    distributed.all_gather_object(every, mine)
    if trainer.is_global_zero:
        for what, own in mine.items():
            same = all(other[what] == own for other in every)
            print(f"{what:<24} {own}  {'the same' if same else 'NOT the same'} on {trainer.world_size} processes")
    distributed.barrier()
    distributed.destroy_process_group()
    if any(other != mine for other in every):
        sys.exit(1)


if __name__ == "__main__":
    main()
