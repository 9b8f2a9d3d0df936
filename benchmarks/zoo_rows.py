"""Models of other people's libraries, each with a short run through its own trainer arguments, on generated data.

Nothing here imports this library: a row is run with its callback, and as a plain model in a process without it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

Fit = Callable[[dict[str, Any], str | None], None]
"""Builds the model, always the same one, and trains it by the Trainer's arguments, from a checkpoint if one is given."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One model of a library.

    Args:
        library: What pip installs.
        model: What the table calls the model.
        fit: One run.
        namespace: The package whose Trainer the library uses.
    """

    library: str
    model: str
    fit: Fit
    namespace: str = "lightning.pytorch"


ROWS: dict[str, Row] = {}


def row(library: str, model: str, namespace: str = "lightning.pytorch") -> Callable[[Fit], Fit]:
    """Add a function to the rows under its own name."""

    def add(fit: Fit) -> Fit:
        ROWS[fit.__name__] = Row(library, model, fit, namespace)
        return fit

    return add


class Task(LightningModule):
    """Trains a network as its users do, who write the LightningModule themselves."""

    def __init__(self, net: nn.Module, loss: Callable[[Any, Any], Tensor]) -> None:
        super().__init__()
        self.net = net
        self.loss = loss

    def forward(self, batch: Any) -> Any:
        return self.net(**batch) if isinstance(batch, dict) else self.net(batch[0])

    def training_step(self, batch: Any, _: int) -> Tensor:
        return self.loss(self(batch), batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-2)


def train(module: LightningModule, batches: Iterable[Any], arguments: dict[str, Any], file: str | None) -> None:
    """Fit ``module`` on ``batches``, the same in every epoch."""
    Trainer(**arguments).fit(module, DataLoader(list(batches), batch_size=None), ckpt_path=file)  # type: ignore[arg-type]


# ----------------------------------------------------------------------------------------------------- transformers


def of_transformers(net: nn.Module, arguments: dict[str, Any], file: str | None, **labels: Tensor) -> None:
    """Train a model of transformers, which computes its loss itself, on random tokens."""
    tokens = torch.randint(1, 64, (3, 4, 12))
    batches = [{"input_ids": ids, "labels": labels.get("labels", ids)} for ids in tokens]
    train(Task(net, lambda output, _: output.loss), batches, arguments, file)


SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


@row("transformers", "LlamaForCausalLM")
def llama(arguments: dict[str, Any], file: str | None) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    of_transformers(LlamaForCausalLM(LlamaConfig(**SMALL, num_key_value_heads=2)), arguments, file)


@row("transformers", "BertForSequenceClassification, 2 labels")
def bert(arguments: dict[str, Any], file: str | None) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    net = BertForSequenceClassification(BertConfig(**SMALL, num_labels=2))
    of_transformers(net, arguments, file, labels=torch.tensor([0, 1, 1, 0]))


@row("transformers", "T5ForConditionalGeneration")
def t5(arguments: dict[str, Any], file: str | None) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=64,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
        feed_forward_proj="gated-gelu",
    )
    of_transformers(T5ForConditionalGeneration(config), arguments, file)


@row("transformers", "Qwen3MoeForCausalLM")
def qwen3_moe(arguments: dict[str, Any], file: str | None) -> None:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        **SMALL, num_key_value_heads=2, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24
    )
    of_transformers(Qwen3MoeForCausalLM(config), arguments, file)
