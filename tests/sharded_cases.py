"""What test_sharded.py runs in one process and in two: ``sharded_cases.py KIND FOLDER`` (one, ddp or sharded)."""

import sys
import warnings
from pathlib import Path
from typing import Any

import lightning_modules  # noqa: F401  (it leaves the process group at the end)
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_prune import WeightPruning

CASES: dict[str, dict[str, Any]] = {
    "l1": {},
    "random": {"criterion": "random"},
    "taylor": {"criterion": "taylor", "scope": "layer"},
    "movement": {"criterion": "movement"},
    "wanda": {"criterion": "wanda", "scope": "lamp"},
    "wanda late": {"criterion": "wanda", "start": 2, "end": 4},  # a checkpoint has sums that wait for a pruning
    "wanda often": {"criterion": "wanda", "every": 1},
    "taylor often": {"criterion": "taylor", "every": 1},
    "synflow": {"criterion": "synflow"},
    "rigl": {"regrow": "rigl", "schedule": "one_shot", "scope": "erk"},
    "set": {"regrow": "set", "schedule": "one_shot"},
    "rewind": {"rewind_to": 1, "start": 1},
    "pattern": {"pattern": "2:4", "exclude": "net.0"},
}
RESUMED = ("taylor", "movement", "rewind", "wanda late", "wanda often", "taylor often")


def data() -> TensorDataset:
    x = torch.randn(64, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x[::2, :5] *= 4  # what one process sees differs from what the other does
    return TensorDataset(x, x[:, :3].argmax(1))


class Sharded(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net: Any = None

    def configure_model(self) -> None:
        if self.net is not None:
            return
        torch.manual_seed(0)
        layers = [nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 3)]
        self.net = nn.Sequential(*layers).double()
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            assert self.device_mesh is not None
            mesh = self.device_mesh["data_parallel"]
            for layer in self.net:
                if isinstance(layer, nn.Linear):
                    fully_shard(layer, mesh=mesh)
            fully_shard(self.net, mesh=mesh)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def train_dataloader(self) -> Any:
        # in order, so that two processes' batches make up one process's; Lightning's own sampler shuffles
        size = self.trainer.world_size
        sampler = DistributedSampler(data(), shuffle=False) if size > 1 else None
        return DataLoader(data(), batch_size=32 // size, sampler=sampler)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def whole(tensor: Any) -> Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def main(kind: str, folder: Path) -> None:
    devices = 1 if kind == "one" else 2

    def fit(options: dict[str, Any], save: Path | None = None, ckpt_path: Path | None = None) -> dict[str, Any]:
        callback = WeightPruning(0.5, **{"end": 1.0, "report": False, **options})
        strategy: Any = {
            "one": "auto",
            "ddp": "ddp",
            "sharded": ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1),
        }[kind]
        savers = [ModelCheckpoint(save, filename="{epoch}", save_top_k=-1)] if save else []
        run = Trainer(
            max_epochs=4,
            callbacks=[callback, *savers],
            accelerator="cpu",
            devices=devices,
            strategy=strategy,
            logger=False,
            enable_checkpointing=bool(savers),
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        module = Sharded()
        run.fit(module, ckpt_path=ckpt_path)
        weights = {name: whole(parameter) for name, parameter in module.named_parameters()}
        state = [whole(v) for s in run.optimizers[0].state.values() for v in s.values() if isinstance(v, Tensor)]
        return {"masks": callback.masks_, "weights": weights, "state": state}

    results: dict[str, Any] = {name: fit(options) for name, options in CASES.items()}
    for name in RESUMED:
        whole_run = fit(CASES[name], folder / kind / name)
        resumed = fit(CASES[name], folder / kind / f"{name}-resumed", folder / kind / name / "epoch=1.ckpt")
        results[f"{name} resumed"] = (whole_run, resumed)
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    torch.save(results, folder / f"{kind}-{rank}.pt")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(sys.argv[1], Path(sys.argv[2]))
