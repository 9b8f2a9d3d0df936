"""What a step takes where weights are large and of 16 bits, and what a save takes over the plain model's.

    python benchmarks/scale.py --json docs/benchmarks/scale.json            # one layer of 4096 x 4096
    python benchmarks/scale.py --model small --json docs/benchmarks/scale_small.json     # a Llama of 100M parameters
    python benchmarks/scale.py --model large                                             # of 1.1B; takes 16 GiB

``layer``: seconds for what follows the optimizer's step of one bfloat16 weight, and for ``torch.rand`` of its size; and
for a whole step on 32 rows, in each mode. ``step``: the same of a Llama of random weights in bfloat16 on 32 tokens,
beside the frozen model's forward and backward. Quartiles. ``save``: seconds of ``Trainer.save_checkpoint``, and the
peak of the memory that the process holds meanwhile above what it held before, in MiB; the first save and the median of
the next; and the ratios, in quartiles, to a file of the same weights without adapters, written right after in the same
process. Each mode of a model has a process of its own. ``--cpu`` counts the seconds of the process and not of the
clock, with one thread, where other work disturbs.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lightning_lora

CPU = "--cpu" in sys.argv
CLOCK = time.process_time if CPU else time.perf_counter
MODES: dict[str, dict[str, Any]] = {
    "factored": {"gradient": "factored"},
    "merged": {"gradient": "merged"},
    "projected": {"gradient": "projected"},
    "merged, both drawn anew": {"gradient": "merged", "resample_every_n_steps": 1},
    "merged, A drawn anew": {"gradient": "merged", "resample_every_n_steps": 1, "resample": "A"},
    "factored, dora": {"gradient": "factored", "decomposition": "dora"},
}
SIZES = {
    "small": {"width": 768, "inner": 2048, "layers": 12, "vocabulary": 16384},
    "large": {"width": 2048, "inner": 5632, "layers": 22, "vocabulary": 32000},
}


def timed(function: Callable[[], Any], rounds: int) -> list[float]:
    """Quartiles of the seconds that ``function`` takes, after a first call that is not counted."""
    seconds = []
    for _ in range(rounds + 1):
        start = CLOCK()
        function()
        seconds.append(CLOCK() - start)
    return statistics.quantiles(seconds[1:], n=4)


def adapted_step(module: nn.Module, loss: Callable[[], torch.Tensor], options: dict[str, Any]) -> Callable[[], None]:
    """A step of AdamW on the adapters that ``options`` ask for; without options, forward and backward alone."""
    if options:
        lightning_lora.inject(module, rank=8, **options)
        optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-4, weight_decay=0.0)
        lightning_lora.attach(module, optimizer)

    def step() -> None:
        loss().backward()
        if options:
            optimizer.step()
            optimizer.zero_grad()

    return step


def layer(side: int, rounds: int) -> dict[str, Any]:
    """One Linear of bfloat16, and what follows a step of its adapter."""
    x = torch.randn(32, side, dtype=torch.bfloat16, requires_grad=True)
    found: dict[str, Any] = {"torch.rand": timed(lambda: torch.rand(side, side), rounds)}
    for mode, options in {"frozen": {}, **MODES}.items():
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(side, side, bias=False)).to(torch.bfloat16).requires_grad_(False)
        if options:
            module.requires_grad_(True)
        step = adapted_step(module, lambda module=module: module(x).square().mean(), options)
        found[f"step, {mode}"] = timed(step, rounds)
        if mode == "factored":
            (adapter,) = lightning_lora.adapters(module).values()
            fold = functools.partial(adapter.folded_into, module[0]._parameters["weight"])
            found["W is formed for a file"] = timed(fold, rounds)
        if mode == "merged":
            (adapter,) = lightning_lora.adapters(module).values()
            weight, before = module[0]._parameters["weight"], adapter.held()
            found["the weight follows"] = timed(functools.partial(adapter.follow, weight, *before), rounds)
    return found


def llama(size: str) -> nn.Module:
    """A Llama with random weights in bfloat16."""
    from common import llama_like

    shape = SIZES[size]
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        job = llama_like(shape["width"], shape["inner"], shape["layers"], shape["vocabulary"], 1, key_value_heads=4)
    finally:
        torch.set_default_dtype(default)
    return job.model


def model_step(size: str, mode: str, rounds: int) -> dict[str, Any]:
    """The step of a Llama in one mode."""
    model = llama(size)
    tokens = torch.randint(SIZES[size]["vocabulary"], (1, 32), generator=torch.Generator().manual_seed(0))
    if mode == "frozen":
        model.requires_grad_(False)
        embedded = model.get_input_embeddings()(tokens).requires_grad_()

        def loss() -> torch.Tensor:
            return model(inputs_embeds=embedded, labels=tokens, use_cache=False).loss
    else:

        def loss() -> torch.Tensor:
            return model(input_ids=tokens, labels=tokens, use_cache=False).loss

    parameters = sum(p.numel() for p in model.parameters())
    step = adapted_step(model, loss, {} if mode == "frozen" else {**MODES[mode], "target_modules": "all-linear"})
    return {"parameters": parameters, "seconds": timed(step, rounds)}


def save(size: str, mode: str, rounds: int) -> dict[str, Any]:
    """Saves in a run, with the callback or, for "plain", without."""
    import lightning.pytorch as pl

    tokens = torch.randint(SIZES[size]["vocabulary"], (1, 32), generator=torch.Generator().manual_seed(0))
    seconds, peaks, ratios = [], [], []

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = llama(size)
            if mode == "plain":  # a run without states of optimizers, which LoRA's has for A and B alone
                self.model.requires_grad_(False)
                self.model.get_input_embeddings().weight[:1].requires_grad_()

        def training_step(self, batch: Any, index: int) -> Any:
            return self.model(input_ids=tokens, labels=tokens, use_cache=False).loss if mode != "plain" else None

        def configure_optimizers(self) -> Any:
            if mode == "plain":
                return None
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=1e-4)

        def on_train_batch_end(self, *_: Any) -> None:
            plain = {"state_dict": {name: p.detach() for name, p in self.named_parameters() if ".lora" not in name}}
            with tempfile.TemporaryDirectory() as folder:
                self.trainer.strategy.save_checkpoint(plain, Path(folder) / "plain.ckpt")
                for _ in range(rounds + 1):
                    with Peak() as peak:
                        start = CLOCK()
                        self.trainer.save_checkpoint(Path(folder) / "saved.ckpt")
                        seconds.append(CLOCK() - start)
                    peaks.append(peak.mebibytes)
                    start = CLOCK()
                    self.trainer.strategy.save_checkpoint(plain, Path(folder) / "plain.ckpt")
                    ratios.append(seconds[-1] / (CLOCK() - start))

    callbacks = [] if mode == "plain" else [lightning_lora.LoRA(**MODES[mode], log_memory=False)]
    trainer = pl.Trainer(
        accelerator="cpu",
        precision="bf16-true",
        max_steps=1,
        limit_train_batches=1,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
    )
    trainer.fit(Module(), torch.utils.data.DataLoader([0]))
    return {
        "first": {"seconds": seconds[0], "peak": peaks[0], "over plain": ratios[0]},
        "next": {
            "seconds": statistics.median(seconds[1:]),
            "peak": statistics.median(peaks[1:]),
            "over plain": statistics.quantiles(ratios[1:], n=4),
        },
    }


class Peak:
    """The most that the process holds above what it held at the start, looked at every two milliseconds."""

    def __enter__(self) -> Peak:
        self._before, self.mebibytes, self._ends = self._held(), 0.0, threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._ends.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._ends.wait(0.002):
            self.mebibytes = max(self.mebibytes, self._held() - self._before)

    @staticmethod
    def _held() -> float:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def in_a_process(*arguments: str) -> Any:
    """What this program prints last when it is called with ``arguments``."""
    command = [sys.executable, "-W", "ignore", __file__, *arguments]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=4096)
    parser.add_argument("--model", choices=SIZES)
    parser.add_argument("--only", choices=["step", "save"])
    parser.add_argument("--mode", help="one alone; its figures are printed")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.manual_seed(0)
    if given.cpu:
        torch.set_num_threads(1)
    if given.mode is not None:
        function = model_step if given.only == "step" else save
        print(json.dumps(function(given.model, given.mode, given.rounds)))
        return
    found: dict[str, Any] = {"torch": torch.__version__, "threads": torch.get_num_threads(), "clock": CLOCK.__name__}
    if given.model is None:
        found["layer"] = layer(given.side, given.rounds)
    else:
        for part, modes in (("step", ["frozen", *MODES]), ("save", ["plain", "factored", "merged"])):
            if given.only in (None, part):
                shared = ["--model", given.model, "--rounds", str(given.rounds), "--only", part]
                shared += ["--cpu"] if given.cpu else []
                found[part] = {mode: in_a_process(*shared, "--mode", mode) for mode in modes}
    print(json.dumps(found, indent=1))
    if given.json is not None:
        given.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
