"""A small GPT that writes like Shakespeare, letter by letter; then heads, MLPs and the embedding get smaller.

    python examples/gpt_shakespeare.py                          # the snippet beside this file, about a minute
    python examples/gpt_shakespeare.py --data-dir data          # data/tinyshakespeare.txt, where it is there
    python examples/gpt_shakespeare.py --text my.txt --amount 0.7

The last tenth of the text is held out: bits per character are those of text that was not trained on.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from lightning_prune import NeuronPruning, create_lr_scheduler, save_pruned

SNIPPET = Path(__file__).parent / "shakespeare.txt"


class Attention(nn.Module):
    """Causal self-attention; ``heads`` and ``size`` tell the truth also after heads are gone."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.size = heads, width // heads
        self.queries, self.keys, self.values = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:  # shape: (batch, length, width), likewise the result
        def split(y: Tensor) -> Tensor:
            return y.unflatten(2, (self.heads, self.size)).transpose(1, 2)

        q, k, v = split(self.queries(x)), split(self.keys(x)), split(self.values(x))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and an MLP, each added to what it reads."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.norm2, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """Radford et al., 2019, on letters."""

    def __init__(self, letters: int, context: int, width: int, heads: int, depth: int) -> None:
        super().__init__()
        self.letter, self.place = nn.Embedding(letters, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, letters)

    def forward(self, codes: Tensor) -> Tensor:  # shape: (batch, length) to (batch, length, letters)
        x = self.letter(codes) + self.place(torch.arange(codes.size(1), device=codes.device))
        logits: Tensor = self.head(self.norm(self.blocks(x)))
        return logits


class Passages(Dataset[Tensor]):
    """Stretches of a text, one letter longer than the model reads, so that every letter has its next one."""

    def __init__(self, codes: Tensor, context: int, step: int) -> None:
        self.stretches = codes.unfold(0, context + 1, step)

    def __len__(self) -> int:
        return len(self.stretches)

    def __getitem__(self, index: int) -> Tensor:
        return self.stretches[index]


class Writer(LightningModule):
    """Learns to say the next letter."""

    def __init__(self, network: GPT, lr: float) -> None:
        super().__init__()
        self.network, self.lr = network, lr

    def loss(self, passages: Tensor) -> Tensor:
        return F.cross_entropy(self.network(passages[:, :-1]).flatten(0, 1), passages[:, 1:].flatten())

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("bits", self.loss(batch) / math.log(2), prog_bar=True)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), self.lr, weight_decay=0.1)
        epochs = int(self.trainer.max_epochs or 1)
        schedule = create_lr_scheduler(optimizer, "cosine", warmup=1, T_max=max(epochs - 1, 1))
        return {"optimizer": optimizer, "lr_scheduler": schedule}


@torch.no_grad()
def write(network: GPT, codes: Tensor, count: int, context: int) -> Tensor:
    """Go on with a text, letter by letter."""
    network.eval()
    draw = torch.Generator().manual_seed(0)
    for _ in range(count):
        logits = network(codes[None, -context:])[0, -1]
        following = torch.multinomial((logits / 0.8).softmax(0).cpu(), 1, generator=draw)
        codes = torch.cat([codes, following.to(codes.device)])
    return codes


def sizes(network: GPT) -> str:
    """What is left of the parts that can go."""
    blocks: list[Any] = list(network.blocks)
    heads = ", ".join(str(block.attention.heads) for block in blocks)
    hidden = ", ".join(str(block.up.out_features) for block in blocks)
    width = network.letter.weight.size(1)
    total = sum(parameter.numel() for parameter in network.parameters())
    return f"heads {heads}; MLPs {hidden}; embedding {width}; {total:,} parameters"


def main() -> None:
    """Parse the command line, train, prune, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--amount", type=float, default=0.5, help="fraction of the parameters that goes (default: 0.5)")
    parser.add_argument("--scope", choices=["layer", "global", "sensitivity"], default="layer", help="default: layer")
    parser.add_argument("--epochs", type=int, default=10, help="of training the whole GPT, and as many while pruning")
    parser.add_argument("--width", type=int, default=96, help="of the embedding")
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--depth", type=int, default=3, help="number of blocks")
    parser.add_argument("--context", type=int, default=96, help="letters that the model sees")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--letters", type=int, default=300, help="length of the sample that is written")
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--text", type=Path, help="any text file")
    parser.add_argument("--out", type=Path, default=Path("gpt_pruned.safetensors"))
    arguments = parser.parse_args()
    if arguments.width % arguments.heads:
        parser.error(f"--width {arguments.width} is no multiple of --heads {arguments.heads}")

    found = arguments.data_dir / "tinyshakespeare.txt"
    path = arguments.text or (found if found.is_file() else SNIPPET)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        parser.error(f"--text: {error}")
    alphabet = sorted(set(text))
    if len(text) < 20 * arguments.context:
        parser.error(f"{path} has {len(text)} letters; --context {arguments.context} needs {20 * arguments.context}")
    print(f"{path.name}: {len(text):,} letters, {len(alphabet)} different ones")

    seed_everything(0, verbose=False)
    code = {letter: number for number, letter in enumerate(alphabet)}
    codes, context = torch.tensor([code[letter] for letter in text]), arguments.context
    held_out = len(codes) // 10
    train = DataLoader(Passages(codes[:-held_out], context, max(context // 3, 1)), arguments.batch_size, shuffle=True)
    val = DataLoader(Passages(codes[-held_out:], context, context), arguments.batch_size)
    model = Writer(GPT(len(alphabet), context, arguments.width, arguments.heads, arguments.depth), arguments.lr)

    def train_on(epochs: int, *callbacks: Callback) -> float:
        """Bits per character of the held-out text after training."""
        trainer = Trainer(
            max_epochs=epochs,
            accelerator=arguments.accelerator,
            devices=1,
            callbacks=list(callbacks),
            gradient_clip_val=1.0,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=sys.stdout.isatty(),
        )
        trainer.fit(model, train, val)
        return float(trainer.callback_metrics["bits"])

    before, whole = train_on(arguments.epochs), sizes(model.network)
    print(f"whole:  {before:.3f} bits per character; {whole}")
    # "layer" takes the same part of heads, MLPs and embedding; "global" would take nearly all from the embedding.
    pruning = NeuronPruning(arguments.amount, of="params", scope=arguments.scope, monitor="bits")
    after = train_on(arguments.epochs, pruning)
    print(f"pruned: {after:.3f} bits per character; {sizes(model.network)}")
    save_pruned(model.network, arguments.out)
    print(f"saved to {arguments.out}\n")
    written = write(model.network.cpu(), codes[:1], arguments.letters, context)
    print("".join(alphabet[number] for number in written.tolist()))


if __name__ == "__main__":
    main()
