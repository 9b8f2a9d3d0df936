"""Writes ``files/*.ckpt`` with version 0.1.0 of the package: files of runs that today's has to resume.

Run with that version alone on the path: ``PYTHONPATH=<a checkout of 0.1.0>:tests python tests/make_old_files.py``. Each
file is one of a run's middle, and holds under ``"expected"`` the merged weights at the end of the run that wrote it.
"""

import sys
from pathlib import Path

import torch
from lightning.pytorch import Callback
from models import Net, ResumableLoader, ScheduledNet, TwoOptimizersNet, trainer
from torch import Tensor, nn


class ConvNet(Net):
    """A convolution before the layers, which the default of that version left out."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.first = nn.Conv1d(1, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.first(x.unsqueeze(1)).squeeze(1))


class GroupsNet(Net):
    """Groups by dimension, of what requires a gradient."""

    def configure_optimizers(self):
        trained = [p for p in self.parameters() if p.requires_grad]
        groups = [[p for p in trained if (p.dim() > 1) is matrices] for matrices in (True, False)]
        return torch.optim.AdamW([{"params": groups[0]}, {"params": groups[1], "weight_decay": 0.0}], lr=0.02)


FILES = Path(__file__).parent / "files"
STEP = 11
OLD: dict[str, tuple[type[Net], dict]] = {
    "default": (ConvNet, {"rank": 2}),
    "adapters": (
        ScheduledNet,
        {"rank": 2, "checkpoint": "adapter", "modules_to_save": ["layers.1"], "bias": "lora_only", "use_rslora": True},
    ),
    "groups": (GroupsNet, {"rank": 2, "bias": "all", "gradient": "projected"}),
    "drawn": (TwoOptimizersNet, {"rank": 2, "gradient": "merged", "resample_every_n_steps": 3, "lr_ratio": 2.0}),
}
"""Name of a file -> the module and the options of its run."""


class SavesInTheMiddle(Callback):
    def __init__(self, file: Path) -> None:
        self.file = file

    def on_train_batch_end(self, trainer, *_) -> None:
        if trainer.fit_loop.epoch_loop.total_batch_idx + 1 == STEP:
            trainer.save_checkpoint(self.file)


def main() -> None:
    from lightning_lora import LoRA

    FILES.mkdir(exist_ok=True)
    for name, (make, options) in OLD.items():
        file, model = FILES / f"{name}.ckpt", make()
        trainer(FILES, LoRA(**options), SavesInTheMiddle(file), max_epochs=2).fit(model, ResumableLoader())
        checkpoint = torch.load(file, weights_only=True)
        torch.save({**checkpoint, "expected": model.state_dict()}, file)
        print(f"{file}: {file.stat().st_size} bytes, format {checkpoint['lightning_lora']['version']}", file=sys.stderr)


if __name__ == "__main__":
    main()
