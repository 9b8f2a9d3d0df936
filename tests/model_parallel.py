"""Runs by ``Trainer(strategy=ModelParallelStrategy(...))``; each process writes what it has seen.

As a program: Lightning starts it again for each further process.
"""

import copy
import json
import os
import sys
import warnings
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from models import digest
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_lora import LoRA, adapters, inject, merge, save_peft
from lightning_lora.hosts import Host
from lightning_lora.injection.inject import places
from lightning_lora.memory.report import PARTS

LAYERS = ["embed", "conv", "linear"]
OPTIONS = {"rank": 3, "target_modules": LAYERS, "modules_to_save": ["head"]}
EVERYTHING = {
    "gradient": "projected",
    "target_modules": [*LAYERS, "attention", "rnn"],
    "target_parameters": ["experts"],
}
RUNS = {
    "zero": {},
    "pissa": {"init": "pissa"},
    "dora": {"decomposition": "dora"},
    "lr_ratio": {"lr_ratio": 4.0},
    "merged": {"gradient": "merged"},
    "projected": EVERYTHING,
    "merged dora": {"gradient": "merged", "decomposition": "dora"},
    "merged additive": {"gradient": "merged", "decomposition": "additive", "rank": 1},
    "merged symmetric": {"gradient": "merged", "init": "symmetric"},
    "both": {"gradient": "merged", "resample_every_n_steps": 1},
    "both, projected, every 3, kept": {**EVERYTHING, "resample_every_n_steps": 3, "resample_moments": "keep"},
    "A": {"gradient": "merged", "resample_every_n_steps": 1, "resample": "A"},
    "A, every 3, reset": {
        "gradient": "merged",
        "resample_every_n_steps": 3,
        "resample": "A",
        "resample_moments": "reset",
    },
    "merged, accumulated, clipped": {"gradient": "merged"},
    "merged, bf16-true": {"gradient": "merged", "resample_every_n_steps": 2},
    "zero, policy": {},
    "projected, policy": EVERYTHING,
}
TRAINERS = {
    "merged, accumulated, clipped": {"accumulate_grad_batches": 2, "gradient_clip_val": 0.05},
    "merged, bf16-true": {"precision": "bf16-true"},
}
FREE = ["zero", "pissa", "dora", "lr_ratio", "zero, policy"]
"""Those whose weights stay W0."""
ROUNDED = ["merged, bf16-true", "zero, policy", "projected, policy"]
"""Those that compute in bfloat16, so that half a batch and the whole give different bits."""
ELSEWHERE = ["zero", "both, projected, every 3, kept"]
"""Those that other numbers of processes resume."""
PEFT = ["zero", "pissa", "dora", "merged additive", "zero, policy"]
"""Those whose adapters are written for PEFT too."""
BATCHES = 3


class Net(LightningModule):
    """Layers of every kind that an adapter goes into, a norm that stays frozen, and a head that is trained in full.

    The sides are odd, so that the processes hold parts of different sizes.
    """

    def __init__(
        self,
        optimizer: str = "SGD",
        options: dict | None = None,
        seed: int = 0,
        shard: str = "after",
        policy: bool = False,
    ) -> None:
        super().__init__()
        self.optimizer, self.options, self.shard, self.policy = optimizer, options, shard, policy
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embed = nn.Embedding(11, 7)
            self.conv = nn.Conv1d(7, 9, 3, padding=1)
            self.norm = nn.GroupNorm(3, 9)
            self.attention = nn.MultiheadAttention(9, 3, batch_first=True)
            self.rnn = nn.LSTM(9, 9, batch_first=True)
            self.experts = nn.Parameter(torch.randn(3, 5, 9) / 3)
            self.linear = nn.Linear(9, 5)
            self.head = nn.Linear(5, 3)

    def configure_model(self) -> None:
        strategy = None if self._trainer is None else self.trainer.strategy
        if not isinstance(strategy, ModelParallelStrategy) or isinstance(self, FSDPModule):
            return
        mesh = self.device_mesh["data_parallel"]
        if self.shard == "before":
            fully_shard(self.linear, mesh=mesh)
        if self.options is not None and self.shard != "plain":
            inject(self, **self.options)
        if self.shard == "forgotten":
            fully_shard(self.head, mesh=mesh)
            return
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if self.policy else MixedPrecisionPolicy()
        for layer in (self.conv, self.attention, self.linear, self.head, self):
            fully_shard(layer, mesh=mesh, mp_policy=policy)

    def forward(self, x):
        h = self.norm(torch.tanh(self.conv(self.embed(x).mT))).mT
        h = h + self.attention(h, h, h, need_weights=False)[0]
        h = self.rnn(h)[0]
        h = torch.tanh(self.linear(h)) + torch.einsum("bld,eod->blo", h, self.experts)
        return self.head(h.mean(1))

    def training_step(self, batch, batch_idx):
        return nn.functional.mse_loss(self(batch[0]), batch[1].to(self.head.weight.dtype))

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.training_step(batch, batch_idx), sync_dist=True)

    def configure_optimizers(self):
        if self.optimizer == "SGD":
            return torch.optim.SGD(self.parameters(), lr=0.2, momentum=0.5)
        return torch.optim.AdamW(self.parameters(), lr=0.02, weight_decay=0.1)


class Wire(TorchDispatchMode):
    """Counts the elements that this process gives to be reduced, and to be gathered into one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.reduced = self.gathered = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "c10d" in (name := func.name()):
            if "reduce" in name:
                self.reduced += args[1].numel() if name == "c10d::_reduce_scatter_base_" else 2**40
            if name == "_c10d_functional::all_gather_into_tensor":
                self.gathered += args[0].numel()
        return func(*args, **(kwargs or {}))


class Watch(Callback):
    """The loss of every batch, what went over the wire, and what the module and the optimizer hold at the end."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.logged: list[float] = []

    def on_before_backward(self, *_) -> None:
        self.backward = Wire()
        self.backward.__enter__()

    def on_after_backward(self, *_) -> None:
        self.backward.__exit__(None, None, None)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        self.with_gradients = sorted(name for name, p in pl_module.named_parameters() if p.grad is not None)
        self.step = Wire()
        self.step.__enter__()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if vars(self).get("step") is not None:
            self.step.__exit__(None, None, None)
            self.reduced, self.gathered, self.step = self.backward.reduced, self.step.gathered, None
        self.losses.append(outputs["loss"].item())
        if "lora/lost_to_nearest_rounding" in trainer.callback_metrics:
            self.logged.append(trainer.callback_metrics["lora/lost_to_nearest_rounding"].item())

    def on_train_end(self, trainer, pl_module) -> None:
        if isinstance(pl_module, FSDPModule):
            pl_module.reshard()  # validation has left the outermost parameters whole
        named = named_parameters(pl_module)
        names = {p: name for name, p in named.items()}
        (optimizer,) = trainer.optimizers
        self.with_state = sorted(names[p] for p in optimizer.state)
        self.trained = {name: list(p.shape) for name, p in named.items() if p.requires_grad}
        self.dtypes = {name: str(p.dtype) for name, p in named.items()}
        self.module = digest({name: local(p) for name, p in pl_module.state_dict().items()})
        self.optimizers = digest([[local(v) for v in state.values()] for state in optimizer.state.values()])
        (report,) = (callback.memory for callback in trainer.callbacks if isinstance(callback, LoRA))
        self.memory = {
            side: {part: getattr(getattr(report, side), part) for part in (*PARTS, "communicated")}
            for side in ("lora", "full")
        }
        self.memory["notes"] = report.notes
        self.W0 = {name: digest(whole(pl_module.get_submodule(name).weight)) for name in LAYERS}


def named_parameters(module) -> dict[str, torch.Tensor]:
    """Those of the module and of its adapters, which may be hidden."""
    hidden = {f"{at.factors}{key}": p for at in places(module) for key, p in at.adapter.named_parameters()}
    return dict(module.named_parameters()) | hidden


class Save(Callback):
    """Writes both kinds of checkpoint after the first epoch."""

    def __init__(self, folder: Path, name: str) -> None:
        self.files = {kind: folder / f"{name}-{kind}.ckpt" for kind in ("whole", "sharded")}

    def on_train_epoch_end(self, trainer, pl_module) -> None:
        if trainer.current_epoch == 0:
            for kind, file in self.files.items():
                trainer.strategy._save_distributed_checkpoint = kind == "sharded"
                trainer.save_checkpoint(file)


class SaveAtTheStart(Callback):
    """For which torch makes the optimizer's states by a step with nothing to learn."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if trainer.global_step == 0:
            trainer.save_checkpoint(self.file)


def local(value):
    return value.detach().to_local() if isinstance(value, DTensor) else value


def whole(value):
    return value.detach().full_tensor() if isinstance(value, DTensor) else value.detach()


def net(name: str, **arguments) -> Net:
    return Net(options={**OPTIONS, **RUNS[name]}, policy=name.endswith("policy"), **arguments)


def fit(
    folder, model, options, *callbacks, devices=2, split=1, file=None, distributed=False, batch=4, **trainer_options
) -> Trainer:
    """Two epochs of 3 batches of 4, divided among the processes."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(11, (4 * BATCHES, 6), generator=generator)
    dataset = TensorDataset(x, torch.randn(4 * BATCHES, 3, generator=generator))
    sharded = devices > 1 or (isinstance(model.options, dict) and model.shard == "alone")
    rank = int(os.environ.get("LOCAL_RANK", "0")) if devices > 1 else 0
    sampler = DistributedSampler(dataset, num_replicas=devices, rank=rank, shuffle=False)
    strategy = ModelParallelStrategy(devices // split, split, distributed) if sharded else "auto"
    loader = DataLoader(dataset, batch_size=batch // devices, sampler=sampler)
    lora = [] if options is None else [LoRA(**{**OPTIONS, **options})]
    trainer = Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        strategy=strategy,
        devices=devices,
        use_distributed_sampler=False,
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[*lora, *callbacks],
        **trainer_options,
    )
    if options is None:
        trainer.validate(model, loader, ckpt_path=file, verbose=False)
    else:
        trainer.fit(model, loader, loader, ckpt_path=file)
    return trainer


def train(folder: Path, name: str, devices: int, *callbacks: Callback) -> tuple[Watch, Net, Trainer]:
    watch, model = Watch(), net(name)
    options = TRAINERS.get(name, {})
    return watch, model, fit(folder, model, RUNS[name], watch, *callbacks, devices=devices, **options)


def resume(folder: Path, name: str, kind: str) -> tuple[Watch, list[str]]:
    watch = Watch()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model, file = net(name, optimizer="AdamW"), folder / f"{name}-AdamW-{kind}.ckpt"
        fit(folder, model, RUNS[name], watch, file=file, distributed=kind == "sharded", **TRAINERS.get(name, {}))
    return watch, [str(warning.message) for warning in caught if "W0 was recovered" in str(warning.message)]


def refusal(folder: Path, model: Net, options: dict | None, **arguments) -> str:
    try:
        fit(folder, model, options, **arguments)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def main(folder: Path) -> None:
    rank = os.environ.get("LOCAL_RANK", "0")
    seen: dict = {}
    for name in RUNS:
        saves = [Save(folder, name)] if name in ELSEWHERE else []
        watch, model, trainer = train(folder, name, 2, *saves)
        seen[name] = jsonable(watch)
        trainer.strategy._save_distributed_checkpoint = False
        trainer.save_checkpoint(folder / f"{name}.ckpt")
        trainer.save_checkpoint(folder / f"{name}-weights.ckpt", weights_only=True)
        trainer.validate(model, trainer.val_dataloaders, verbose=False)
        seen[name]["val_loss"] = trainer.callback_metrics["val_loss"].item()
        if name in PEFT:
            save_peft(model, folder / f"peft {name}")
        if name == "zero":
            try:
                copy.deepcopy(model.linear)
            except AssertionError as error:
                seen["deepcopy"] = str(error)
            seen["adapted after fit"] = sorted(adapters(model))
        if name == "both":
            early = train(folder, name, 2, SaveAtTheStart(folder / "start.ckpt"))[0]
            seen["saved at the start"] = [[one.module, one.optimizers] for one in (watch, early)]
        if name in ("zero", "merged", "A"):
            again = Watch()
            fit(folder, model, RUNS[name], again)
            seen[f"{name}, second fit"] = again.losses
            continue
        merge(model)
        seen[name]["merged"] = {key: whole(value).tolist() for key, value in model.state_dict().items()}
        seen[name]["classes"] = {key: type(child).__name__ for key, child in model.named_modules()}
        seen[name]["hosts"] = [key for key, child in model.named_modules() if isinstance(child, Host)]
        kinds = [(model, Net), (model, FSDPModule), (model.linear, nn.Linear), (model.linear, FSDPModule)]
        seen[name]["kinds"] = [isinstance(child, kind) for child, kind in kinds]
    for name in RUNS:
        through, save = Watch(), Save(folder, f"{name}-AdamW")
        trainer = fit(folder, net(name, optimizer="AdamW"), RUNS[name], through, save, **TRAINERS.get(name, {}))
        for kind in ("whole", "sharded"):
            again, warned = resume(folder, name, kind)
            seen[f"resumed-{name}-{kind}"] = {
                "bits": [[watch.module, watch.optimizers, watch.W0] for watch in (through, again)],
                "losses": [through.losses[3:], again.losses],
                "with_state": again.with_state,
                "warned": warned,
            }
    for name in ("zero", "projected"):
        for kind in ("whole", "sharded"):
            file = folder / f"{name}-AdamW-{kind}.ckpt"
            trainer = fit(folder, Net(options={}, shard="plain"), None, file=file)
            seen[f"validated-{name}-{kind}"] = trainer.callback_metrics["val_loss"].item()
    others = Watch()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        file = folder / "zero-AdamW-whole.ckpt"
        fit(folder, net("zero", optimizer="AdamW", seed=1), {}, others, file=file)
    seen["other weights"] = {
        "losses": others.losses,
        "warned": [str(warning.message) for warning in caught if "W0 was recovered" in str(warning.message)],
    }
    alone = Watch()
    fit(folder, Net(), RUNS["zero"], alone)
    seen["by the callback alone"] = {"losses": alone.losses, "trained": alone.trained}
    sharded = {"file": folder / "zero-AdamW-sharded.ckpt"}
    seen["refused"] = {
        "exact": refusal(folder, net("zero", optimizer="AdamW", seed=1), {"exact_resume": True}, **sharded),
        "sharded first": refusal(folder, net("zero", shard="before"), None),
        "forgotten": refusal(folder, net("zero", shard="forgotten"), {}),
        "other options": refusal(folder, net("zero"), {"rank": 2}),
        "gradient": refusal(folder, net("zero"), {"init": "gradient"}),
        "adapter": refusal(folder, net("zero"), {"checkpoint": "adapter"}),
        "tensor parallel": refusal(folder, net("zero"), {}, split=2),
    }
    (folder / f"{rank}.json").write_text(json.dumps(seen))


def jsonable(watch: Watch) -> dict:
    return {key: value for key, value in vars(watch).items() if key not in ("backward", "step") and not callable(value)}


def elsewhere(folder: Path, devices: int) -> None:
    """Other numbers of processes resume what two have saved."""
    seen = {}
    for name in ELSEWHERE:
        watch, model = Watch(), net(name)
        if devices == 1:
            model.shard = "alone"
        file = folder / f"{name}-sharded.ckpt"
        fit(folder, model, RUNS[name], watch, devices=devices, file=file)
        merge(model)
        seen[name] = {
            "losses": watch.losses,
            "merged": {key: whole(value).tolist() for key, value in model.state_dict().items()},
        }
    (folder / f"elsewhere-{devices}-{os.environ.get('LOCAL_RANK', '0')}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    if len(sys.argv) > 2:
        elsewhere(Path(sys.argv[1]), int(sys.argv[2]))
    else:
        main(Path(sys.argv[1]))
