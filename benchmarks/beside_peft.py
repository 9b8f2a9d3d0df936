"""Says what a Trainer's run leaves behind with full fine-tuning, with PEFT and with the callback.

A Llama of two layers is trained for two epochs of four steps by AdamW, on the CPU. No time is measured, so the numbers
are the same on any machine, but for the last digits of the differences.

    python benchmarks/beside_peft.py
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

import lightning_lora

RANK = 8


class Model(LightningModule):
    """A language model; ``peft=True`` wraps it, as a user of PEFT does."""

    def __init__(self, peft: bool, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=256, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4
        )
        self.lm: nn.Module = LlamaForCausalLM(config).to(dtype)
        if peft:
            self.lm = get_peft_model(self.lm, LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear"))

    def training_step(self, tokens: Tensor, _: int) -> Tensor:
        return self.lm(input_ids=tokens, labels=tokens).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=1e-2)


def fit(folder: Path, peft: bool, callbacks: list[Any], epochs: int, file: Path | None = None) -> Trainer:
    data = DataLoader(torch.randint(256, (16, 16), generator=torch.Generator().manual_seed(1)), batch_size=4)
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = Trainer(accelerator="cpu", max_epochs=epochs, callbacks=callbacks, default_root_dir=folder, **quiet)
    trainer.fit(Model(peft), data, ckpt_path=file)
    return trainer


def tensors(value: Any) -> list[Tensor]:
    """Return all tensors in a checkpoint: weights, adapters, optimizer states."""
    if isinstance(value, Tensor):
        return [value]
    children = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else []
    return [found for child in children for found in tensors(child)]


def loads(state: dict[str, Tensor]) -> bool:
    try:
        Model(peft=False).load_state_dict(state)
    except RuntimeError:
        return False
    return True


def report(folder: Path, name: str, peft: bool, options: dict[str, Any] | None) -> None:
    def callbacks() -> list[Any]:
        return [] if options is None else [lightning_lora.LoRA(rank=RANK, log_memory=False, **options)]

    files = [folder / f"{name}-{step}.ckpt" for step in ("half", "through", "resumed")]
    fit(folder, peft, callbacks(), 1).save_checkpoint(files[0])
    fit(folder, peft, callbacks(), 2).save_checkpoint(files[1])
    fit(folder, peft, callbacks(), 2, files[0]).save_checkpoint(files[2])
    through, resumed = (torch.load(file, weights_only=True) for file in files[1:])
    state = through["state_dict"]
    same = all(torch.equal(one, other) for one, other in zip(tensors(through), tensors(resumed), strict=True))
    print(f"{name}: file {files[1].stat().st_size / 1e6:.2f} MB, {len(state)} keys, such as")
    print(f"  {next((key for key in state if 'q_proj' in key), None)}")
    print(f"  loads strictly into the plain module: {loads(state)}; resumed bit for bit: {same}")


@contextmanager
def merged_by_peft(model: Model) -> Iterator[None]:
    model.lm.merge_adapter()
    yield
    model.lm.unmerge_adapter()


def drift(name: str, peft: bool, dtype: torch.dtype) -> None:
    """Print how far ten merges, each undone, take the pretrained weights."""
    model = Model(peft, dtype)
    if not peft:
        lightning_lora.inject(model, rank=RANK)
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(len(key)))
    frozen = {key: p.detach().clone() for key, p in model.named_parameters() if not p.requires_grad}
    for _ in range(10):
        with merged_by_peft(model) if peft else lightning_lora.merged(model):
            pass
    moved = max((p - frozen[key]).abs().max().item() for key, p in model.named_parameters() if key in frozen)
    print(f"{name}, {str(dtype).removeprefix('torch.')}: largest change of a frozen weight {moved:.1e}")


def main() -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        report(folder, "full fine-tuning", False, None)
        report(folder, "PEFT", True, None)
        report(folder, "the callback", False, {})
        report(folder, "the callback, checkpoint='adapter'", False, {"checkpoint": "adapter"})
        Model(True).lm.save_pretrained(folder / "peft")
        print(f"PEFT's own save_pretrained: {(folder / 'peft/adapter_model.safetensors').stat().st_size / 1e6:.2f} MB")
    for dtype in (torch.float32, torch.bfloat16):
        drift("PEFT, merge_adapter and unmerge_adapter, 10 times", True, dtype)
        drift("the callback's library, merged(), 10 times", False, dtype)


if __name__ == "__main__":
    main()
