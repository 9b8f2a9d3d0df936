"""Adapt a vision transformer that knows the digits 0 to 4 to 5 to 9, and turn the adapters on and off.

    python examples/digits.py [--trainer.callbacks.rank 2] [--pretraining_epochs 20] [--config my.yaml]

Needs scikit-learn, whose digits are 1797 images of 8 x 8 pixels. The defaults are in ``digits.yaml``; LoRA is one entry
there.
"""

import copy
import warnings
from pathlib import Path

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset, random_split
from torchmetrics.classification import MulticlassAccuracy

from lightning_lora import load_adapter, plot_adapters, set_adapter

warnings.filterwarnings("ignore", message=".*does not have many workers which may be a bottleneck")


class ViT(LightningModule):
    """A vision transformer on 16 patches of 2 x 2 pixels.

    Args:
        width: Of a token.
        depth: The number of blocks.
        learning_rate: Of AdamW.
    """

    def __init__(self, width: int = 64, depth: int = 2, learning_rate: float = 2e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.learning_rate = learning_rate
        self.patches = nn.Conv2d(1, width, kernel_size=2, stride=2)
        self.positions = nn.Parameter(0.02 * torch.randn(16, width))
        block = nn.TransformerEncoderLayer(
            width, 4, 2 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(block, depth, norm=nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)
        self.accuracy = MulticlassAccuracy(10, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        """Map images (b, 1, 8, 8) to scores (b, 10)."""
        tokens = self.patches(images).flatten(2).mT + self.positions
        return self.head(self.blocks(tokens).mean(1))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, digits = batch
        loss = nn.functional.cross_entropy(self(images), digits)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        images, digits = batch
        self.accuracy(self(images), digits)
        self.log("val/accuracy", self.accuracy, prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.learning_rate)


class Digits(LightningDataModule):
    """Images of some digits; 40 % are held out.

    Args:
        digits: Which.
        batch_size: Images in a batch.
    """

    def __init__(self, digits: list[int], batch_size: int = 32) -> None:
        super().__init__()
        self.batch_size = batch_size
        images, labels = load_digits(return_X_y=True)
        x, y = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1, torch.tensor(labels)
        chosen = Subset(TensorDataset(x, y), torch.isin(y, torch.tensor(digits)).nonzero()[:, 0].tolist())
        self.train, self.val = random_split(chosen, [0.6, 0.4], torch.Generator().manual_seed(0))

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, self.batch_size)


class CLI(LightningCLI):
    """Lightning's command line with the length of the pretraining."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--pretraining_epochs", type=int, help="On the digits 0 to 4, without LoRA.")


def main() -> None:
    """Pretrain, fine-tune, and use the file as adapters of the pretrained model."""
    defaults = [str(Path(__file__).with_suffix(".yaml"))]
    cli = CLI(ViT, Digits, run=False, parser_kwargs={"default_config_files": defaults})
    old, new = Digits([0, 1, 2, 3, 4]), cli.datamodule
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    Trainer(max_epochs=cli.config.pretraining_epochs, **quiet).fit(cli.model, old)
    pretrained = copy.deepcopy(cli.model)

    cli.trainer.fit(cli.model, new)  # with LoRA

    def accuracies(model: ViT) -> str:
        found = [cli.trainer.validate(model, data, verbose=False)[0]["val/accuracy"] for data in (old, new)]
        return "{:.1%} of 0 to 4, {:.1%} of 5 to 9".format(*found)

    file = cli.trainer.checkpoint_callback.best_model_path
    print("pretrained:        ", accuracies(pretrained))
    print("merged checkpoint: ", accuracies(ViT.load_from_checkpoint(file)))
    load_adapter(pretrained, file, "5 to 9")
    print("adapters on:       ", accuracies(pretrained))
    set_adapter(pretrained, None)
    print("adapters off again:", accuracies(pretrained))
    plot_adapters(file).savefig(Path(file).with_name("adapters.png"), dpi=80)
    print(f"merged checkpoint, and a picture of the adapters beside it: {file}")


if __name__ == "__main__":
    main()
