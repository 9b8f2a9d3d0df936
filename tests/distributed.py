"""Runs by two processes of ``Trainer(devices=2)``; each process writes what it has seen.

As a program: Lightning starts it a second time for the second process, or forks or spawns both.
"""

import json
import sys
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from models import digest
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import lightning_lora
from lightning_lora import LoRA

GRADIENTS = ("factored", "merged", "projected")
EVERY_STEP = {"gradient": "merged", "resample_every_n_steps": 1}
HALVES = {"precision": "bf16-true", "accumulate_grad_batches": 2}

RUNS = {
    **{gradient: {"lora": {"gradient": gradient}} for gradient in GRADIENTS},
    "bf16-true, accumulated": {"lora": {"gradient": "merged"}, "trainer": HALVES},
    **{
        f"{gradient}, a branch unused": {
            "lora": {"gradient": gradient},
            "strategy": "ddp_find_unused_parameters_true",
            "branches": True,
        }
        for gradient in GRADIENTS
    },
    **{
        f"{gradient}, static graph": {
            "lora": {"gradient": gradient},
            "strategy": DDPStrategy(static_graph=True, gradient_as_bucket_view=True),
        }
        for gradient in GRADIENTS
    },
    **{f"{gradient}, forked": {"lora": {"gradient": gradient}, "strategy": "ddp_fork"} for gradient in GRADIENTS},
    "merged, spawned": {"lora": {"gradient": "merged"}, "strategy": "ddp_spawn"},
    "both": {"lora": EVERY_STEP},
    "A": {"lora": {**EVERY_STEP, "resample": "A"}},
    "both, projected, every 2": {"lora": {"gradient": "projected", "resample_every_n_steps": 2}},
    "A, bf16-true, accumulated": {"lora": {**EVERY_STEP, "resample": "A"}, "trainer": HALVES},
    "A, forked": {"lora": {**EVERY_STEP, "resample": "A"}, "strategy": "ddp_fork"},
}
RUNS |= {
    f"{name}, resumed": {**RUNS[name], "resumes": name} for name in (*GRADIENTS, "bf16-true, accumulated", "both", "A")
}
"""By name: options of the callback and of the Trainer; the strategy; whether a layer is left out of each other batch;
the run whose file after the first epoch is resumed."""


class Images(LightningModule):
    """Convolutions, attention, a Linear, and a head that is trained in full; plain SGD."""

    def __init__(self, branches: bool = False) -> None:
        super().__init__()
        self.branches = branches
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.conv = nn.Conv1d(1, 8, 3, padding=1)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.linear = nn.Linear(8, 8)
            self.head = nn.Linear(8, 4)

    def training_step(self, batch, batch_idx):
        x, y = batch
        h = torch.tanh(self.conv(x[:, None])).mT
        h = h + self.attention(h, h, h, need_weights=False)[0]
        if not (self.branches and batch_idx % 2):
            h = torch.tanh(self.linear(h))
        return nn.functional.mse_loss(self.head(h.mean(1)), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.5)


class Batches(LightningDataModule):
    """6 batches of 4: whole for one process, in halves for two."""

    def train_dataloader(self):
        generator = torch.Generator().manual_seed(0)
        dataset = TensorDataset(torch.randn(24, 8, generator=generator), torch.randn(24, 4, generator=generator))
        n = self.trainer.world_size
        sampler = DistributedSampler(dataset, num_replicas=n, rank=self.trainer.global_rank, shuffle=False)
        return DataLoader(dataset, batch_size=4 // n, sampler=sampler)


def names_of(module: nn.Module) -> dict[nn.Parameter, str]:
    """The parameters of ``module``, and those of its adapters, wherever they stand."""
    names = {p: name for name, p in module.named_parameters()}
    for name, adapter in lightning_lora.adapters(module).items():
        names |= {p: f"{name}.lora.{factor}" for factor, p in adapter.trained.items()}
    return names


class Watch(Callback):
    """The losses, the bytes that are reduced after each batch and whose they are, and what is trained at the end.

    Each process writes that to a file of its own when the run is over, if it has a folder.
    """

    def __init__(self, folder: Path | None = None, name: str = "") -> None:
        self.folder, self.name = folder, name

    def on_train_start(self, trainer, pl_module) -> None:
        self.losses: list[float] = []
        self.reduced: list[tuple[int, list[str]]] = []
        if trainer.world_size > 1:
            names = names_of(pl_module)

            def hook(group, bucket):
                tensor = bucket.buffer()
                self.reduced.append((tensor.nbytes, [names[p] for p in bucket.parameters()]))
                return allreduce_hook(group, bucket)

            trainer.strategy.model.register_comm_hook(None, hook)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.losses.append(outputs["loss"].item())

    def on_train_end(self, trainer, pl_module) -> None:
        self.trained = {name: p.numel() * p.itemsize for p, name in names_of(pl_module).items() if p.requires_grad}
        self.adapted = digest([pl_module.state_dict(), [o.state_dict() for o in trainer.optimizers]])
        (lora,) = (callback for callback in trainer.callbacks if isinstance(callback, LoRA))
        self.communicated = [lora.memory.lora.communicated, lora.memory.full.communicated]
        self.in_full = lora.memory.full.parameters

    def teardown(self, trainer, pl_module, stage) -> None:
        """The module is plain again."""
        if self.folder is None:
            return
        keys = ("losses", "reduced", "trained", "adapted", "communicated", "in_full")
        seen = {key: vars(self)[key] for key in keys} | {"weights": digest(pl_module.state_dict())}
        (self.folder / f"{self.name}-{trainer.global_rank}.json").write_text(json.dumps(seen))
        if trainer.is_global_zero:
            torch.save(pl_module.state_dict(), self.folder / f"{self.name}.pt")


def train(folder: Path, name: str, devices: int, file: Path | None = None) -> tuple[Watch, Images]:
    """Two epochs, or the second alone from a file of the first."""
    run = RUNS[name]
    watch, model = Watch(folder if devices > 1 else None, name), Images(run.get("branches", False))
    lora = LoRA(rank=2, target_modules=["conv", "attention", "linear"], modules_to_save=["head"], **run["lora"])
    Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        strategy=run.get("strategy", "ddp") if devices > 1 else "auto",
        devices=devices,
        use_distributed_sampler=False,
        max_epochs=2,
        logger=False,
        enable_progress_bar=False,
        callbacks=[lora, watch, ModelCheckpoint(folder, filename=name + " {epoch}", save_top_k=-1)],
        **run.get("trainer", {}),
    ).fit(model, Batches(), ckpt_path=file)
    return watch, model


def file_of(folder: Path, name: str) -> Path:
    """Written after the first epoch."""
    return folder / f"{name} epoch=0.ckpt"


def launched(name: str) -> bool:
    """Whether the run's processes are made by the one that calls ``fit``, and no program is started again."""
    return RUNS[name].get("strategy") in ("ddp_spawn", "ddp_fork")


def main(folder: Path, makes_processes: bool, names: list[str]) -> None:
    for name in names:
        if launched(name) == makes_processes:
            print(f"start of {name!r}", flush=True)
            resumes = RUNS[name].get("resumes")
            _, model = train(folder, name, 2, file_of(folder, resumes) if resumes else None)
            if makes_processes:
                (folder / f"{name}-caller.json").write_text(json.dumps(digest(model.state_dict())))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] == "makes-processes", sys.argv[3:])
