"""Out of the door: train and prune, load the checkpoint without the callback, export, compare the numbers.

    python examples/export_onnx.py                      # digits, about a minute
    python examples/export_onnx.py --epochs 2 --out small.onnx

Needs the extra ``export`` (onnx, onnxscript, onnxruntime).
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import torch
from cifar_lenet import Data
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lightning_prune import NeuronPruning, load_from_checkpoint
from lightning_prune.models import ImageClassifier, LeNet


def outputs_of_file(path: Path, images: Tensor) -> Tensor:
    """What onnxruntime computes."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path))
    (scores,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    return torch.from_numpy(scores)


def export(network: nn.Module, images: Tensor, path: Path) -> None:
    """Write an ONNX file that takes any number of images."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    batch = {0: torch.export.Dim("batch")}
    program = torch.onnx.export(network, (images,), dynamo=True, dynamic_shapes=(batch,), verbose=False)
    assert program is not None
    program.save(str(path))


def main() -> None:
    """Parse the command line and do it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--amount", type=float, default=0.5, help="fraction of the MACs that goes (default: 0.5)")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--out", type=Path, default=Path("lenet_pruned.onnx"))
    arguments = parser.parse_args()

    seed_everything(0, verbose=False)
    data = Data(arguments.data_dir, batch_size=32)
    saver = ModelCheckpoint(arguments.out.parent, arguments.out.stem + "-{epoch}", monitor="val_acc", mode="max")
    trainer = Trainer(
        max_epochs=arguments.epochs,
        accelerator="cpu",
        callbacks=[NeuronPruning(arguments.amount, of="macs"), saver],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(ImageClassifier(LeNet(), lr=0.01), data)

    # No callback, no Trainer: the checkpoint tells what the network has become.
    small = load_from_checkpoint(ImageClassifier, saver.best_model_path, network=LeNet()).network.eval()
    images = torch.stack([data.test[i][0] for i in range(8)])
    with torch.no_grad():
        expected = small(images)
        exported = torch.export.export(small, (images,)).module()(images)
        compiled = torch.compile(small, backend="eager")(images)
    export(small, images, arguments.out)
    print(small)
    print(f"torch.export differs by {float((exported - expected).abs().max()):.1e}")
    print(f"torch.compile differs by {float((compiled - expected).abs().max()):.1e}")
    print(f"onnxruntime differs by {float((outputs_of_file(arguments.out, images) - expected).abs().max()):.1e}")
    print(f"{saver.best_model_path} -> {arguments.out}")


if __name__ == "__main__":
    main()
