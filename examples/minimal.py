"""LoRA in a Lightning program is one callback. Every checkpoint loads into the class as it stands, without it."""

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lora import LoRA


class Net(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 16))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return nn.functional.mse_loss(self.layers(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=1e-2)


def task(shift: float) -> DataLoader:
    x = torch.randn(4096, 16)
    return DataLoader(TensorDataset(x, torch.sin(x + shift)), batch_size=64, shuffle=True)


if __name__ == "__main__":
    pretraining = Trainer(max_epochs=3, enable_progress_bar=False)
    pretraining.fit(Net(), task(shift=0.0))
    net = Net.load_from_checkpoint(pretraining.checkpoint_callback.best_model_path)
    x, y = next(iter(task(shift=1.0)))
    before = nn.functional.mse_loss(net.layers(x), y)

    finetuning = Trainer(max_epochs=3, enable_progress_bar=False, callbacks=[LoRA(rank=4)])
    finetuning.fit(net, task(shift=1.0))
    net = Net.load_from_checkpoint(finetuning.checkpoint_callback.best_model_path)
    print(f"loss on the new task: {before:.3f} before, {nn.functional.mse_loss(net.layers(x), y):.3f} after")
