"""A run in every gradient by ``Trainer(strategy="ddp", devices=2)``; each process writes what it has seen.

As a program: Lightning starts it a second time for the second process.
"""

import json
import os
import sys
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from models import digest
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_lora import LoRA

RUNS = {
    **{gradient: {"lora": {"gradient": gradient}, "trainer": {}} for gradient in ("factored", "merged", "projected")},
    "bf16-true, accumulated": {
        "lora": {"gradient": "merged"},
        "trainer": {"precision": "bf16-true", "accumulate_grad_batches": 2},
    },
}


class Images(LightningModule):
    """Convolutions, attention, a Linear, and a head that is trained in full; plain SGD."""

    def __init__(self) -> None:
        super().__init__()
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
        return nn.functional.mse_loss(self.head(torch.tanh(self.linear(h)).mean(1)), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.5)


class Watch(Callback):
    """The losses, the bytes that are reduced after each batch and whose they are, and what is trained at the end."""

    def on_train_start(self, trainer, pl_module) -> None:
        self.losses: list[float] = []
        self.reduced: list[tuple[int, list[str]]] = []
        if trainer.world_size > 1:
            names = {p: name for name, p in pl_module.named_parameters()}

            def hook(group, bucket):
                tensor = bucket.buffer()
                self.reduced.append((tensor.nbytes, [names[p] for p in bucket.parameters()]))
                return allreduce_hook(group, bucket)

            trainer.strategy.model.register_comm_hook(None, hook)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.losses.append(outputs["loss"].item())

    def on_train_end(self, trainer, pl_module) -> None:
        self.trained = {name: p.numel() * p.itemsize for name, p in pl_module.named_parameters() if p.requires_grad}
        self.adapted = digest(pl_module.state_dict())
        (lora,) = (callback for callback in trainer.callbacks if isinstance(callback, LoRA))
        self.communicated = [lora.memory.lora.communicated, lora.memory.full.communicated]
        self.in_full = lora.memory.full.parameters


def train(folder: Path, name: str, devices: int) -> tuple[Watch, Images]:
    """One epoch of 6 batches of 4: in one process, or in halves of 2 by two."""
    generator = torch.Generator().manual_seed(0)
    dataset = TensorDataset(torch.randn(24, 8, generator=generator), torch.randn(24, 4, generator=generator))
    rank = int(os.environ.get("LOCAL_RANK", 0)) if devices > 1 else 0
    sampler = DistributedSampler(dataset, num_replicas=devices, rank=rank, shuffle=False)
    watch, model = Watch(), Images()
    lora = LoRA(rank=2, target_modules=["conv", "attention", "linear"], modules_to_save=["head"], **RUNS[name]["lora"])
    Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        strategy="ddp" if devices > 1 else "auto",
        devices=devices,
        use_distributed_sampler=False,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        callbacks=[lora, watch],
        **RUNS[name]["trainer"],
    ).fit(model, DataLoader(dataset, batch_size=4 // devices, sampler=sampler))
    return watch, model


def main(folder: Path) -> None:
    for name in RUNS:
        print(f"start of {name!r}", flush=True)
        watch, model = train(folder, name, devices=2)
        seen = {key: vars(watch)[key] for key in ("losses", "reduced", "trained", "adapted", "communicated", "in_full")}
        seen["weights"] = digest(model.state_dict())
        (folder / f"{name}-{os.environ['LOCAL_RANK']}.json").write_text(json.dumps(seen))
        if os.environ["LOCAL_RANK"] == "0":
            torch.save(model.state_dict(), folder / f"{name}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
