"""What is learned: final loss and loss curves of the variants of LoRA, and of projections drawn anew.

    python -m studies.learning --study variants --task lm --json docs/benchmarks/learning_variants_lm.json
    python -m studies.learning --study resampling --task lm --json docs/benchmarks/learning_resampling_lm.json

``variants``: every decomposition and start, AdamW, as many trained parameters as a product of rank 8 has, or the
nearest number below. ``resampling``: plain SGD for full fine-tuning, fixed LoRA, and both ways to draw anew. The
learning rate of each is the best of a grid, by the held-out loss after the first ``--pilot`` steps. Every run sees the
same batches in the same order.

Tasks: ``lm`` is the model and the text of ``examples/finetune_lm.py`` in batches of 2 x 64 tokens; ``digits`` is a
multilayer perceptron that was trained on the digits 0 to 4 and now gets all ten (scikit-learn's ``load_digits``).
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import math
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lora import LoRA

RANK = 8
VARIANTS: dict[str, dict[str, Any] | None] = {
    "full": None,
    "product": {},
    "additive": {"decomposition": "additive"},
    "dora": {"decomposition": "dora", "rank": RANK - 1},  # and m magnitudes in the place of one row of A and of B
    "symmetric": {"init": "symmetric"},
    "orthogonal": {"init": "orthogonal"},
    "pissa": {"init": "pissa"},
    "gradient": {"init": "gradient"},
    "rslora, alpha 8": {"use_rslora": True, "alpha": 8},
    "lr_ratio 4": {"lr_ratio": 4.0},
}
RESAMPLING: dict[str, dict[str, Any] | None] = {
    "full": None,
    "fixed": {},
    **{
        f"{form}, k = {k}": {"gradient": "merged", "resample": form, "resample_every_n_steps": k}
        for form in ("both", "A")
        for k in (1, 10, 100)
    },
}


class Task(LightningModule):
    """A model with an optimizer of one's choice; the loss on held-out data at the end."""

    def __init__(self, model: nn.Module, loss: Callable[[nn.Module, Any], Tensor], optimizer: type, lr: float) -> None:
        super().__init__()
        self.model, self.loss, self.optimizer, self.lr = model, loss, optimizer, lr

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(self.model, batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(self.model, batch))

    def configure_optimizers(self) -> Any:
        options = {"weight_decay": 0.0} if self.optimizer is torch.optim.AdamW else {}
        return self.optimizer([p for p in self.parameters() if p.requires_grad], lr=self.lr, **options)


class Watch(Callback):
    """Losses, and the number of trained parameters."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.losses: list[float] = []
        self.trained = sum(p.numel() for p in pl_module.parameters() if p.requires_grad)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.losses.append(outputs["loss"].item())


class LM:
    """SmolLM2-135M on the topics of Python's documentation."""

    lrs: ClassVar = {
        torch.optim.AdamW: {"full": (3e-5, 1e-4), None: (5e-4, 2e-3)},
        torch.optim.SGD: {"full": (0.003, 0.01, 0.03), "fixed": (0.1, 0.3, 1.0), None: (0.001, 0.003, 0.01)},
    }
    batch_size = 2

    def __init__(self) -> None:
        sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
        from finetune_lm import CausalLM, TextBlocks

        data = TextBlocks(block_size=64, batch_size=self.batch_size, val_blocks=32)
        self.pretrained = CausalLM().model
        blocks = data.blocks
        self.held_out, self.train = TensorDataset(blocks[:32]), TensorDataset(blocks[32:])

    @staticmethod
    def loss(model: nn.Module, batch: list[Tensor]) -> Tensor:
        return model(batch[0], labels=batch[0], use_cache=False).loss


class Digits:
    """All ten digits, from a network that knows five."""

    lrs: ClassVar = {
        torch.optim.AdamW: {None: (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)},
        torch.optim.SGD: {None: (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)},
    }
    batch_size = 32

    def __init__(self) -> None:
        from sklearn.datasets import load_digits

        images, labels = load_digits(return_X_y=True)
        x, y = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
        x, y = x[order], y[order]
        self.held_out, self.train = TensorDataset(x[:360], y[:360]), TensorDataset(x[360:], y[360:])
        torch.manual_seed(0)
        self.pretrained = nn.Sequential(
            nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 16)
        )
        known = y[360:] < 5
        optimizer = torch.optim.AdamW(self.pretrained.parameters(), lr=1e-3)
        for _ in range(100):
            optimizer.zero_grad()
            self.loss(self.pretrained, [x[360:][known], y[360:][known]]).backward()
            optimizer.step()

    @staticmethod
    def loss(model: nn.Module, batch: list[Tensor]) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])


def run(task: Any, options: dict[str, Any] | None, optimizer: type, lr: float, steps: int) -> dict[str, Any]:
    """Trains a copy of the pretrained model."""
    gc.collect()  # Trainers and modules refer to each other, and the last run's are large
    seed_everything(0, verbose=False)
    watch = Watch()
    callbacks = [watch] if options is None else [LoRA(**{"rank": RANK, **options}), watch]
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
    )
    module = Task(copy.deepcopy(task.pretrained), task.loss, optimizer, lr)
    shuffled = DataLoader(task.train, task.batch_size, shuffle=True, generator=torch.Generator().manual_seed(0))
    trainer.fit(module, shuffled)
    (metrics,) = trainer.validate(module, DataLoader(task.held_out, task.batch_size), verbose=False)
    return {"lr": lr, "trained": watch.trained, "losses": watch.losses, "val_loss": metrics["val_loss"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", choices=("variants", "resampling"), default="variants")
    parser.add_argument("--task", choices=("lm", "digits"), default="lm")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--pilot", type=int, help="by default as many as --steps")
    parser.add_argument("--only", nargs="+", help="some of the methods; the others are kept as they are in the JSON")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*does not have many workers")

    task = {"lm": LM, "digits": Digits}[arguments.task]()
    optimizer = torch.optim.AdamW if arguments.study == "variants" else torch.optim.SGD
    methods = VARIANTS if arguments.study == "variants" else RESAMPLING
    pilot = arguments.pilot or arguments.steps
    start = Task(task.pretrained, task.loss, optimizer, 0.0)
    with torch.no_grad():
        batches = list(DataLoader(task.held_out, task.batch_size))
        before = sum(task.loss(start.model.eval(), batch).item() for batch in batches) / len(batches)
    task.pretrained.train()
    print(f"held-out loss before: {before:.4f}", flush=True)
    result: dict[str, Any] = {
        "steps": arguments.steps,
        "before": before,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "methods": {},
    }
    if arguments.only and arguments.json and arguments.json.exists():
        result["methods"] = json.loads(arguments.json.read_text())["methods"]
    for name, options in methods.items():
        if arguments.only and name not in arguments.only:
            continue
        grid = task.lrs[optimizer].get(name, task.lrs[optimizer][None])
        pilots = {lr: run(task, options, optimizer, lr, pilot)["val_loss"] for lr in grid}
        lr = min(pilots, key=lambda lr: pilots[lr] if math.isfinite(pilots[lr]) else math.inf)
        best = {**run(task, options, optimizer, lr, arguments.steps), "pilots": {str(lr): pilots[lr] for lr in pilots}}
        result["methods"][name] = best
        trained, loss = best["trained"], best["val_loss"]
        print(f"{name:16s} {trained:>11,d} trained  lr {lr:<6g} held-out loss {loss:.4f}", flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
