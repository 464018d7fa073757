"""Fine-tune a timm model and prune it: the learning rate is found first, layers that matter keep more.

    python examples/finetune_timm.py                                     # random weights: trains from scratch
    python examples/finetune_timm.py --pretrained --model mobilenetv3_small_100 --image-size 96
    python examples/finetune_timm.py --lr 0.01 --amount 0.3

Lightning's learning-rate finder runs with the pruning callback in the same Trainer; it prunes nothing. ``--pretrained``
downloads ImageNet's weights. CIFAR-10 is used when it lies in ``--data-dir`` or can be downloaded there, else
scikit-learn's digits. Needs the package timm (extra ``examples``).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from cifar_lenet import Data
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.tuner import Tuner
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy

from lightning_prune import NeuronPruning, save_pruned, sensitivity
from lightning_prune.models import ImageClassifier

try:
    import timm
except ImportError:
    sys.exit('this example needs timm: pip install "lightning-prune[examples]"')


class Fitted(Data):
    """Images of the size, the mean and the spread that the model was trained with."""

    def __init__(self, folder: Path, batch_size: int, size: int, mean: Any, std: Any) -> None:
        super().__init__(folder, batch_size)
        self.size = size
        self.mean, self.std = torch.tensor(mean).view(-1, 1, 1), torch.tensor(std).view(-1, 1, 1)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        images, labels = batch
        if images.size(-1) != self.size:
            images = F.interpolate(images, size=self.size, mode="bilinear", antialias=True)
        return ((images + 1) / 2 - self.mean.to(images)) / self.std.to(images), labels


def main() -> None:
    """Parse the command line, find the learning rate, train, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet10t", help="name of a timm model (default: resnet10t)")
    parser.add_argument("--pretrained", action="store_true", help="start from ImageNet's weights (a download)")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--amount", type=float, default=0.5, help="fraction of the MACs that goes (default: 0.5)")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, help="default: what the finder suggests")
    parser.add_argument("--lr-steps", type=int, default=60, help="steps of the finder")
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--out", type=Path, default=Path("timm_pruned.safetensors"))
    arguments = parser.parse_args()
    if not timm.is_model(arguments.model):
        close = ", ".join(timm.list_models(f"*{arguments.model[:6]}*")[:5])
        parser.error(f"timm has no model {arguments.model!r}; among others it has {close or 'resnet10t'}")

    seed_everything(0, verbose=False)
    network = timm.create_model(arguments.model, pretrained=arguments.pretrained, num_classes=10)
    config = timm.data.resolve_model_data_config(network)
    data = Fitted(arguments.data_dir, arguments.batch_size, arguments.image_size, config["mean"], config["std"])
    start = "ImageNet's weights" if arguments.pretrained else "random weights"
    print(f"{arguments.model} from {start}, on {data.name}")
    model = ImageClassifier(network, optimizer="adamw", lr=arguments.lr or 1e-3, lr_scheduler="cosine")
    pruning = NeuronPruning(arguments.amount, of="macs", scope="sensitivity", start=0.3, end=0.7)
    trainer = Trainer(
        max_epochs=arguments.epochs,
        accelerator=arguments.accelerator,
        devices=1,
        callbacks=[pruning],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=sys.stdout.isatty(),
    )
    if arguments.lr is None:
        found = Tuner(trainer).lr_find(model, datamodule=data, min_lr=1e-5, max_lr=0.1, num_training=arguments.lr_steps)
        if found is None or found.suggestion() is None:
            sys.exit("the learning-rate finder has no suggestion: give it more --lr-steps, or give --lr")
        print(f"learning rate: {model.lr:.2g}, found in {len(found.results['lr'])} steps")
    trainer.fit(model, data)
    (result,) = trainer.test(model, data, verbose=False)
    print(f"{data.name} test accuracy {result['test_acc']:.4f}")

    # What would more cost? Accuracy on some validation images with a part of one layer masked, layer by layer.
    batch = data.on_after_batch_transfer(data.val[:128], 0)
    print(sensitivity(network.cpu(), [batch], MulticlassAccuracy(10, average="micro"), ratios=(0.25, 0.5, 0.75)))
    save_pruned(network, arguments.out)
    print(f"saved to {arguments.out}")


if __name__ == "__main__":
    main()
