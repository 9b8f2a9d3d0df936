"""Small LightningModules, data and Trainers. Nothing here imports the library: a process without it uses them too."""

import hashlib
import sys
from collections.abc import Iterator, Mapping

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning_utilities.core.imports import RequirementCache
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

torch.set_num_threads(1)

N_BATCHES = 8

needs_a_whole_finder = pytest.mark.skipif(
    not RequirementCache("lightning>=2.6.0"),
    reason="Before Lightning 2.6 its finder shortens the run, and restores nothing after an exception",
)


def layers(seed: int = 0) -> nn.Sequential:
    """Pretrained layers: the same for one seed in every process."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 12, bias=False), nn.Tanh(), nn.Linear(12, 4)
        )


class Net(LightningModule):
    """Layers made where ``made_in`` says; AdamW with decay over all parameters, frozen ones too."""

    def __init__(self, seed: int = 0, made_in: str = "__init__", lr: float = 0.02) -> None:
        super().__init__()
        self.save_hyperparameters()
        self._make("__init__")

    def _make(self, where: str) -> None:
        if where == self.hparams["made_in"] and not hasattr(self, "layers"):
            self.layers = layers(self.hparams["seed"])

    def setup(self, stage: str) -> None:
        self._make("setup")

    def configure_model(self) -> None:
        self._make("configure_model")

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)

    def loss(self, batch: list[Tensor]) -> Tensor:
        x, y = batch
        return nn.functional.mse_loss(self(x), y)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("test_loss", self.loss(batch))

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.hparams["lr"], weight_decay=0.1)


class ScheduledNet(Net):
    """The learning rate falls with every step."""

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class TwoOptimizersNet(Net):
    """Manual optimization: in every batch the first layer takes a step, then the others, each toggled."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        for optimizer in self.optimizers():
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()
            self.untoggle_optimizer(optimizer)

    def configure_optimizers(self):
        first, *others = self.layers.children()
        return (
            torch.optim.AdamW(first.parameters(), lr=self.hparams["lr"]),
            torch.optim.SGD([p for layer in others for p in layer.parameters()], lr=0.1, momentum=0.9),
        )


def batches(seed: int = 0) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(4, 8, generator=generator), torch.randn(4, 4, generator=generator)] for _ in range(N_BATCHES)]


def data(seed: int = 0) -> DataLoader:
    x, y = (torch.cat(parts) for parts in zip(*batches(seed), strict=True))
    return DataLoader(TensorDataset(x, y), batch_size=4)


class ResumableLoader:
    """The same batches from a loader that goes on in mid-epoch, where it was when its state was saved."""

    def __init__(self, seed: int = 0) -> None:
        self.batches = batches(seed)
        self.position = 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[Tensor]]:
        self.position %= len(self.batches)
        while self.position < len(self.batches):
            self.position += 1
            yield self.batches[self.position - 1]

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


def trainer(folder, *callbacks: Callback, **options) -> Trainer:
    """A quiet Trainer for one epoch on the CPU."""
    quiet = {
        "default_root_dir": folder,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": any(isinstance(callback, Checkpoint) for callback in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
        "max_epochs": 1,
    }
    return Trainer(**{**quiet, **options}, callbacks=list(callbacks))


class Digest(Callback):
    """Hashes of everything that training has made, as it stands when it ends: parameters, buffers, optimizers."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.names = list(trained_state(pl_module))
        self.module = digest(trained_state(pl_module))
        self.optimizers = digest([optimizer.state_dict() for optimizer in trainer.optimizers])
        self.steps = trainer.global_step


def trained_state(module: nn.Module) -> dict[str, Tensor]:
    """What training has made of ``module``: every parameter as it stands, buffers, and the adapters' tensors."""
    library = sys.modules.get("lightning_lora")
    known = library.adapters(module) if library is not None else {}
    factors = {p for adapter in known.values() for p in (*adapter.parameters(), *adapter.buffers())}
    named = (*module.named_parameters(), *module.named_buffers())
    own = {n.replace("_checkpoint_wrapped_module.", ""): p for n, p in named if p not in factors}
    return own | {f"{n}.lora.{k}": p for n, a in known.items() for k, p in a.state_dict().items()}


def digest(value) -> str:
    """A hash of every bit of the tensors and of every other leaf in ``value``."""
    sha = hashlib.sha256()

    def update(value) -> None:
        if hasattr(value, "__tensor_flatten__"):
            update([getattr(value, name) for name in value.__tensor_flatten__()[0]])
        elif isinstance(value, Tensor):
            sha.update(f"{value.dtype}{tuple(value.shape)}".encode())
            sha.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(value, Mapping):
            for key, item in value.items():
                sha.update(repr(key).encode())
                update(item)
        elif isinstance(value, list | tuple):
            for item in value:
                update(item)
        else:
            sha.update(repr(value).encode())

    update(value)
    return sha.hexdigest()


def structure(module: nn.Module) -> dict:
    """What must be as before when a run has failed or ended: classes, attributes, parameters, flags."""
    return {
        "classes": {name: type(child) for name, child in module.named_modules()},
        "attributes": {
            name: sorted(set(vars(child)) - {"_trainer", "_current_fx_name", "prepare_data_per_node"})
            for name, child in module.named_modules()
        },
        "hooks": {
            name: (len(child._forward_hooks), len(child._forward_pre_hooks), len(child._backward_hooks))
            for name, child in module.named_modules()
        },
        "parameters": [(name, id(parameter), parameter.requires_grad) for name, parameter in module.named_parameters()],
        "keys": list(module.state_dict()),
    }
