"""Runs that are saved in the middle and resumed. As a program it resumes all of them, in a process of its own."""

import dataclasses
import itertools
import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from models import Digest, Net, ResumableLoader, ScheduledNet, TwoOptimizersNet, trainer
from zoo import TIED, ZOO, TiedNet, Zoo

from lightning_lora import LoRA


@dataclasses.dataclass(frozen=True)
class Run:
    """One way to train for two epochs, and one to save before the end."""

    route: str = "epoch"
    lora: dict = dataclasses.field(default_factory=dict)
    options: dict = dataclasses.field(default_factory=dict)
    model: Callable[[], LightningModule] = Net

    def callback(self) -> LoRA:
        return LoRA(**{"rank": 2, "alpha": 3, **self.lora})

    def uninterrupted(self, folder: Path) -> Digest:
        return self._fit(folder, None)

    def resumed(self, folder: Path, file: Path) -> Digest:
        return self._fit(folder, file)

    def _fit(self, folder: Path, file: Path | None) -> Digest:
        digest = Digest()
        run = trainer(folder, self.callback(), digest, max_epochs=2, **self.options)
        run.fit(self.model(), ResumableLoader(), ckpt_path=file)
        return digest

    def saved(self, folder: Path) -> Path:
        """Where the checkpoint lies that was written before the end, by ``route``."""
        file = folder / "saved.ckpt"
        if self.route == "after_fit":
            run = trainer(folder, self.callback(), max_epochs=1, **self.options)
            run.fit(self.model(), ResumableLoader())
            run.save_checkpoint(file)
            return file
        writer: Callback
        if self.route == "by_hand":
            writer = SaveByHand(file)
        else:
            routes = {
                "epoch": {"every_n_epochs": 1},
                "last": {"every_n_epochs": 1, "save_last": True, "save_top_k": 0},
                "steps": {"every_n_train_steps": 3},
                "weights_only": {"every_n_train_steps": 3, "save_weights_only": True},
            }
            writer = ModelCheckpoint(folder, filename="saved", **routes[self.route])
        steps = 3 if self.route in ("steps", "weights_only") else -1
        epochs = 2 if self.route in ("steps", "weights_only") else 1
        run = trainer(folder, self.callback(), writer, max_epochs=epochs, max_steps=steps, **self.options)
        run.fit(self.model(), ResumableLoader())
        return folder / "last.ckpt" if self.route == "last" else file


class SaveByHand(Callback):
    """Saves at the end of every epoch."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def on_train_epoch_end(self, trainer, pl_module) -> None:
        trainer.save_checkpoint(self.file)


class SaveFirst(SaveByHand):
    """Saves at the end of the first epoch."""

    def on_train_epoch_end(self, trainer, pl_module) -> None:
        if trainer.current_epoch == 0:
            super().on_train_epoch_end(trainer, pl_module)


ACCUMULATED = {"accumulate_grad_batches": 2}
DOUBLE = {"adapter_dtype": "float64"}
BESIDES = {"modules_to_save": ["layers.1"], "bias": "all", "use_rslora": True, "rank_pattern": {"layers.0": 4}}

RESUMED = {
    **{
        f"{form}-{route}": Run(route, {"checkpoint": form}, ACCUMULATED if route == "steps" else {})
        for form in ("merged", "adapter")
        for route in ("epoch", "last", "steps", "by_hand", "after_fit")
    },
    **{
        f"{form}-{precision}": Run("steps", {"checkpoint": form}, {"precision": precision})
        for form in ("merged", "adapter")
        for precision in ("bf16-true", "bf16-mixed")
    },
    # Lightning loads a file before it casts what `__init__` made, so only layers made later load in 64 bits.
    "merged-64-true": Run("steps", options={"precision": "64-true"}, model=lambda: Net(made_in="configure_model")),
    "adapter-64-true": Run(
        "steps", {"checkpoint": "adapter"}, {"precision": "64-true"}, lambda: Net(made_in="configure_model")
    ),
    "bf16-true-after_fit": Run("after_fit", options={"precision": "bf16-true"}),
    "bfloat16-adapters": Run("steps", {"adapter_dtype": "bfloat16"}),
    "merged-trained-besides": Run("steps", BESIDES),
    "adapter-trained-besides": Run("steps", {**BESIDES, "checkpoint": "adapter"}),
    "scheduled": Run("steps", model=ScheduledNet),
    "two-optimizers": Run("epoch", model=TwoOptimizersNet),
    "clipped": Run("steps", options={"gradient_clip_val": 0.1}),
    "made-in-setup": Run("steps", model=lambda: Net(made_in="setup")),
    "made-in-configure_model": Run("steps", model=lambda: Net(made_in="configure_model")),
    **{
        f"{gradient}-gradient-{name}": Run(route, {"gradient": gradient, **lora}, options, model)
        for gradient, (name, (route, lora, options, model)) in zip(
            itertools.cycle(("merged", "projected")),
            {
                "accumulated": ("steps", {}, ACCUMULATED, Net),
                "after_fit": ("after_fit", {}, {}, Net),
                "bf16-true-accumulated": ("steps", {}, {"precision": "bf16-true", **ACCUMULATED}, Net),
                "bf16-true-after_fit": ("after_fit", {}, {"precision": "bf16-true"}, Net),
                "bf16-mixed": ("steps", {}, {"precision": "bf16-mixed"}, Net),
                "bfloat16-adapters": ("steps", {"adapter_dtype": "bfloat16"}, {}, Net),
                "64-true": ("steps", DOUBLE, {"precision": "64-true"}, lambda: Net(made_in="configure_model")),
                "trained-besides": ("steps", BESIDES, {"gradient_clip_val": 0.1}, ScheduledNet),
                "two-optimizers-bf16-true": ("epoch", {}, {"precision": "bf16-true"}, TwoOptimizersNet),
            }.items(),
        )
    },
    **{
        f"{gradient}-zoo-{precision}": Run("steps", {"gradient": gradient, **ZOO}, {"precision": precision}, Zoo)
        for gradient, precision in (
            ("factored", "bf16-true"),
            ("factored", "bf16-mixed"),
            ("merged", "32-true"),
            ("merged", "bf16-mixed"),
            ("projected", "32-true"),
            ("projected", "bf16-true"),
        )
    },
    "projected-tied-bf16-true": Run(
        "after_fit", {"gradient": "projected", **TIED}, {"precision": "bf16-true"}, TiedNet
    ),
}
WEIGHTS_ONLY = {f"{form}-weights_only": Run("weights_only", {"checkpoint": form}) for form in ("merged", "adapter")}


def main(folder: Path) -> None:
    """Resumes every run that has a file in ``folder`` and prints, as JSON, what came of it."""
    results = {}
    for name, run in RESUMED.items():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            digest = run.resumed(folder / name, folder / name / "saved.ckpt")
        ours = [str(warning.message) for warning in caught if "W0 was recovered" in str(warning.message)]
        results[name] = [digest.module, digest.optimizers, digest.steps, ours]
    print(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
