"""Adapt an LSTM that has read prose, character by character, to source code: recurrent weights get adapters too.

    python examples/lstm.py [--trainer.callbacks.rank 16] [--pretraining_steps 250] [--config my.yaml]

The prose is Python's own documentation, the code is that of its standard library. The defaults are in ``lstm.yaml``;
LoRA is one entry there.
"""

import math
import warnings
from pathlib import Path
from pydoc_data.topics import topics

import torch
from docstrings import sources
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lora import adapter_table, plot_adapters

warnings.filterwarnings("ignore", message=".*does not have many workers which may be a bottleneck")


class CharacterLSTM(LightningModule):
    """An LSTM that predicts the next of 128 characters.

    Args:
        width: Of the hidden state.
        learning_rate: Of Adam.
    """

    def __init__(self, width: int = 192, learning_rate: float = 4e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.learning_rate = learning_rate
        self.embed = nn.Embedding(128, 64)
        self.lstm = nn.LSTM(64, width, batch_first=True)
        self.head = nn.Linear(width, 128)

    def bits(self, characters: Tensor) -> Tensor:
        """Return the mean number of bits for each of ``characters``, (b, t), after the first."""
        hidden, _ = self.lstm(self.embed(characters[:, :-1]))
        return nn.functional.cross_entropy(self.head(hidden).mT, characters[:, 1:]) / math.log(2)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = self.bits(batch[0])
        self.log("train/bits", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val/bits", self.bits(batch[0]), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.learning_rate)

    @torch.no_grad()
    def continuation(self, start: str, length: int = 120) -> str:
        """Return ``start`` and what the model writes after it, drawn from its probabilities by a seed of its own."""
        given, state, text = torch.tensor([list(start.encode())]), None, start
        draws = torch.Generator().manual_seed(0)
        for _ in range(length):
            hidden, state = self.lstm(self.embed(given), state)
            given = torch.multinomial(self.head(hidden[:, -1]).softmax(-1), 1, generator=draws)
            text += chr(given.item())
        return text


class Text(LightningDataModule):
    """A text in windows of characters, shuffled once; 64 are held out.

    Args:
        kind: ``"prose"`` or ``"code"``.
        window: Characters in a window.
        batch_size: Windows in a batch.
    """

    def __init__(self, kind: str, window: int = 65, batch_size: int = 64) -> None:
        super().__init__()
        self.batch_size = batch_size
        if kind == "prose":
            text = "\n\n".join(topics[name] for name in sorted(topics))
        else:
            text = "\n\n".join(source for _, source in sources("asyncio", "email", "http", "json", "unittest"))
        characters = torch.tensor(list(text.encode("ascii", "ignore")))
        windows = characters[: len(characters) // window * window].view(-1, window)
        self.windows = windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))]

    def train_dataloader(self) -> DataLoader:
        return DataLoader(TensorDataset(self.windows[64:]), self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(TensorDataset(self.windows[:64]), self.batch_size)


class CLI(LightningCLI):
    """Lightning's command line with the length of the pretraining."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--pretraining_steps", type=int, help="On prose, without LoRA.")


def main() -> None:
    """Pretrain on prose, fine-tune on code, and say what the adapters of the LSTM have learned."""
    defaults = [str(Path(__file__).with_suffix(".yaml"))]
    cli = CLI(CharacterLSTM, Text, run=False, parser_kwargs={"default_config_files": defaults})
    model, code = cli.model, cli.datamodule
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "limit_val_batches": 0}
    Trainer(max_steps=cli.config.pretraining_steps, **quiet).fit(model, Text("prose"))

    def report(name: str, model: CharacterLSTM) -> None:
        (found,) = cli.trainer.validate(model, code, verbose=False)
        print(f"\n{name}: {found['val/bits']:.2f} bits for a character of code; it writes\n")
        print(model.continuation("    def get_"))

    report("pretrained", model)
    cli.trainer.fit(model, code)  # with LoRA
    file = cli.trainer.checkpoint_callback.best_model_path
    report("adapted", CharacterLSTM.load_from_checkpoint(file))
    print()
    for row in adapter_table(file):
        print(f"{row.name:20} moved by {row.relative_norm:.0%} of its norm, rank {row.effective_rank:.1f} in effect")
    plot_adapters(file).savefig(Path(file).with_name("adapters.png"), dpi=80)
    print(f"merged checkpoint, and a picture of the adapters beside it: {file}")


if __name__ == "__main__":
    main()
