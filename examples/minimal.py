"""LoRA is one callback: take it away and the same program trains every weight and writes the same kind of file."""

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lora import LoRA


class Net(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = nn.functional.mse_loss(self.layers(x), y)
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam((p for p in self.parameters() if p.requires_grad), lr=3e-3)


def task(shift: float) -> DataLoader:
    x = torch.randn(2048, 16)
    return DataLoader(TensorDataset(x, torch.sin(x + shift).mean(1, keepdim=True)), batch_size=64, shuffle=True)


if __name__ == "__main__":
    base = Trainer(max_epochs=5)
    base.fit(Net(), task(shift=0.0))

    lora = Trainer(max_epochs=5, callbacks=[LoRA(rank=4)])
    lora.fit(Net.load_from_checkpoint(base.checkpoint_callback.best_model_path), task(shift=0.5))

    net = Net.load_from_checkpoint(lora.checkpoint_callback.best_model_path)  # a plain module with merged weights
    x, y = next(iter(task(shift=0.5)))
    print(f"{nn.functional.mse_loss(net.layers(x), y):.4f}")
