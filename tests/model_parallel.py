"""Runs by ``Trainer(strategy=ModelParallelStrategy(...), devices=2)``; each process writes what it has seen.

As a program: Lightning starts it a second time for the second process.
"""

import copy
import json
import os
import sys
import warnings
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from models import digest
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_lora import LoRA, adapters, inject, merge
from lightning_lora.hosts import Host

OPTIONS = {"rank": 3, "target_modules": ["embed", "conv", "linear"], "modules_to_save": ["head"]}
RUNS = {
    "zero": {},
    "pissa": {"init": "pissa"},
    "dora": {"decomposition": "dora"},
    "lr_ratio": {"lr_ratio": 4.0},
}
BATCHES = 3


class Net(LightningModule):
    """An embedding, a convolution, a Linear, a norm that stays frozen, and a head that is trained in full.

    The sides are odd, so that the two processes hold parts of different sizes.
    """

    def __init__(
        self, optimizer: str = "SGD", options: dict | None = None, seed: int = 0, shard: str = "after"
    ) -> None:
        super().__init__()
        self.optimizer, self.options, self.shard = optimizer, options, shard
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embed = nn.Embedding(11, 7)
            self.conv = nn.Conv1d(7, 9, 3, padding=1)
            self.norm = nn.GroupNorm(3, 9)
            self.linear = nn.Linear(9, 5)
            self.head = nn.Linear(5, 3)

    def configure_model(self) -> None:
        if not isinstance(self.trainer.strategy, ModelParallelStrategy) or isinstance(self, FSDPModule):
            return
        mesh = self.device_mesh["data_parallel"]
        if self.shard == "before":
            fully_shard(self.linear, mesh=mesh)
        if self.options is not None:
            inject(self, **self.options)
        if self.shard == "forgotten":
            fully_shard(self.head, mesh=mesh)
            return
        for layer in (self.conv, self.linear, self):
            fully_shard(layer, mesh=mesh)

    def forward(self, x):
        h = self.norm(torch.tanh(self.conv(self.embed(x).mT))).mT
        return self.head(torch.tanh(self.linear(h)).mean(1))

    def training_step(self, batch, batch_idx):
        return nn.functional.mse_loss(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.training_step(batch, batch_idx), sync_dist=True)

    def configure_optimizers(self):
        if self.optimizer == "SGD":
            return torch.optim.SGD(self.parameters(), lr=0.3)
        return torch.optim.AdamW(self.parameters(), lr=0.02, weight_decay=0.1)


class Watch(Callback):
    """The loss of every batch, and what the module and the optimizer hold at the end."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.losses.append(outputs["loss"].item())

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        self.with_gradients = sorted(name for name, p in pl_module.named_parameters() if p.grad is not None)

    def on_train_end(self, trainer, pl_module) -> None:
        if isinstance(pl_module, FSDPModule):
            pl_module.reshard()  # validation has left the outermost parameters whole
        names = {p: name for name, p in pl_module.named_parameters()}
        (optimizer,) = trainer.optimizers
        self.with_state = sorted(names[p] for p in optimizer.state)
        self.trained = sorted(name for name, p in pl_module.named_parameters() if p.requires_grad)
        self.module = digest({name: local(p) for name, p in pl_module.named_parameters()})
        self.optimizers = digest([[local(v) for v in state.values()] for state in optimizer.state.values()])
        self.W0 = {name: digest(whole(pl_module.get_submodule(name).weight)) for name in ("embed", "conv", "linear")}


def local(value):
    return value.detach().to_local() if isinstance(value, DTensor) else value


def whole(value):
    return value.detach().full_tensor() if isinstance(value, DTensor) else value.detach()


def net(options: dict, **arguments) -> Net:
    return Net(options={**OPTIONS, **options}, **arguments)


def fit(folder, model, options, *callbacks, devices=2, file=None, distributed=False) -> Trainer:
    """Two epochs of 3 batches of 4: in one process, or in halves of 2 by two."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(11, (4 * BATCHES, 6), generator=generator)
    dataset = TensorDataset(x, torch.randn(4 * BATCHES, 3, generator=generator))
    rank = int(os.environ.get("LOCAL_RANK", 0)) if devices > 1 else 0
    sampler = DistributedSampler(dataset, num_replicas=devices, rank=rank, shuffle=False)
    strategy = ModelParallelStrategy(devices, 1, save_distributed_checkpoint=distributed) if devices > 1 else "auto"
    loader = DataLoader(dataset, batch_size=4 // devices, sampler=sampler)
    trainer = Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        strategy=strategy,
        devices=devices,
        use_distributed_sampler=False,
        max_epochs=2,
        logger=False,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[LoRA(**{**OPTIONS, **options}), *callbacks],
    )
    trainer.fit(model, loader, loader, ckpt_path=file)
    return trainer


def train(folder: Path, name: str, devices: int) -> tuple[Watch, Net, Trainer]:
    watch, model = Watch(), net(RUNS[name])
    return watch, model, fit(folder, model, RUNS[name], watch, devices=devices)


def refusal(folder: Path, model: Net, options: dict | None = None, **arguments) -> str:
    try:
        fit(folder, model, options or {}, **arguments)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def main(folder: Path) -> None:
    rank = os.environ.get("LOCAL_RANK", "0")
    seen: dict = {}
    for name in RUNS:
        watch, model, trainer = train(folder, name, devices=2)
        seen[name] = {key: value for key, value in vars(watch).items() if not callable(value)}
        trainer.save_checkpoint(folder / f"{name}.ckpt")
        trainer.save_checkpoint(folder / f"{name}-weights.ckpt", weights_only=True)
        trainer.validate(model, trainer.val_dataloaders, verbose=False)
        seen[name]["val_loss"] = trainer.callback_metrics["val_loss"].item()
        if name == "zero":
            try:
                copy.deepcopy(model.linear)
            except AssertionError as error:
                seen["deepcopy"] = str(error)
            seen["adapted after fit"] = sorted(adapters(model))
        merge(model)
        seen[name]["merged"] = {key: whole(value).tolist() for key, value in model.state_dict().items()}
        seen[name]["classes"] = {key: type(child).__name__ for key, child in model.named_modules()}
        seen[name]["hosts"] = [key for key, child in model.named_modules() if isinstance(child, Host)]
        kinds = [(model, Net), (model, FSDPModule), (model.linear, nn.Linear), (model.linear, FSDPModule)]
        seen[name]["kinds"] = [isinstance(child, kind) for child, kind in kinds]
    for distributed in (False, True):
        for name, options in RUNS.items():
            key = f"{name}-{'sharded' if distributed else 'full'}"
            through, again = Watch(), Watch()
            file = ModelCheckpoint(folder, filename=f"{key}-{{epoch}}", save_top_k=-1)
            fit(folder, net(options, optimizer="AdamW"), options, through, file, distributed=distributed)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                model, saved = net(options, optimizer="AdamW"), folder / f"{key}-epoch=0.ckpt"
                fit(folder, model, options, again, file=saved, distributed=distributed)
            seen[f"resumed-{key}"] = {
                "bits": [[watch.module, watch.optimizers, watch.W0] for watch in (through, again)],
                "losses": [through.losses[3:], again.losses],
                "with_state": again.with_state,
                "warned": [str(warning.message) for warning in caught if "W0 was recovered" in str(warning.message)],
            }
    others = Watch()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(folder, net({}, optimizer="AdamW", seed=1), {}, others, file=folder / "zero-full-epoch=0.ckpt")
    seen["other weights"] = {
        "losses": others.losses,
        "warned": [str(warning.message) for warning in caught if "W0 was recovered" in str(warning.message)],
    }
    full = {"file": folder / "zero-full-epoch=0.ckpt"}
    seen["refused"] = {
        "exact": refusal(folder, net({}, optimizer="AdamW", seed=1), {"exact_resume": True}, **full),
        "not injected": refusal(folder, Net()),
        "sharded first": refusal(folder, net({}, shard="before")),
        "forgotten": refusal(folder, net({}, shard="forgotten")),
        "other options": refusal(folder, net({}), {"rank": 2}),
        "merged": refusal(folder, net({}), {"gradient": "merged"}),
        "gradient": refusal(folder, net({}), {"init": "gradient"}),
        "adapter": refusal(folder, net({}), {"checkpoint": "adapter"}),
        "parameters": refusal(
            folder,
            net({"target_parameters": ["head.weight"], "modules_to_save": None}),
            {"target_parameters": ["head.weight"], "modules_to_save": None},
        ),
    }
    (folder / f"{rank}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
