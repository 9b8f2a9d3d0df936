"""What works with what: every combination is run, saved and resumed, and a page of the docs is made of what came of it.

As a program without arguments it writes ``docs/support.md``; with a folder and a strategy of many processes it runs all
combinations under that strategy, where Lightning starts it again for each further process.
"""

import itertools
import json
import logging
import os
import subprocess
import sys
import tempfile
import traceback
import warnings
from pathlib import Path

import torch
from lightning.pytorch import Callback
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import ModelParallelStrategy
from models import Net, ResumableLoader, digest, trainer
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

import lightning_lora
from lightning_lora import LoRA, inject
from lightning_lora.errors import LoRAError

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "support.md"

FSDP2 = ("FSDP2, one file", "FSDP2, a folder")
STRATEGIES = ("one device", "DDP", *FSDP2)
PRECISIONS = ("32-true", "16-mixed", "bf16-mixed", "bf16-true", "16-true", "64-true")
GRADIENTS = ("factored", "merged", "projected")
INCREMENTS: dict[str, dict] = {
    "product": {},
    "additive": {"decomposition": "additive"},
    "dora": {"decomposition": "dora"},
    "product, `init='symmetric'`": {"init": "symmetric"},
    "product, `init='pissa'`": {"init": "pissa"},
    "product, `init='gradient'`": {"init": "gradient"},
    "product, both drawn anew": {"resample_every_n_steps": 2},
    "product, A drawn anew": {"resample_every_n_steps": 2, "resample": "A"},
}
FORMS = ("merged", "adapter")
COMBINATIONS = list(itertools.product(PRECISIONS, GRADIENTS, INCREMENTS, FORMS))
WORKS = "works"
FAILURES = ("fails: ", "does not train", "resumes to other bits")


class Tiny(Net):
    """Two Linears; sharded, with its adapters, where the strategy shards."""

    def __init__(self, options: dict) -> None:
        super().__init__(made_in="configure_model")
        self.adapters = options

    def _make(self, where: str) -> None:
        if where == "configure_model" and not hasattr(self, "layers"):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                self.layers = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 4))

    def configure_model(self) -> None:
        super().configure_model()
        if isinstance(self.trainer.strategy, ModelParallelStrategy) and not isinstance(self, FSDPModule):
            inject(self, **self.adapters)
            for layer in (self.layers[0], self):
                fully_shard(layer, mesh=self.device_mesh["data_parallel"])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=self.hparams["lr"])


class Saves(Callback):
    """After the first step."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def on_train_batch_end(self, trainer, *_) -> None:
        if trainer.global_step == 1:
            trainer.save_checkpoint(self.file)


class Ends(Callback):
    """What this process holds when training ends, and whether all adapters have moved."""

    def on_train_end(self, trainer, pl_module) -> None:
        self.held = digest([parts(pl_module.state_dict()), [parts(o.state_dict()) for o in trainer.optimizers]])
        self.moved = all(a.delta_weight().any() for a in lightning_lora.adapters(pl_module).values())


def parts(value):
    """The same with what this process has of every tensor."""
    if isinstance(value, dict):
        return {key: parts(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [parts(item) for item in value]
    return value.to_local() if isinstance(value, DTensor) else value


def settings(strategy: str, precision: str) -> dict:
    """Of a Trainer, whose strategy is its own."""
    made: dict = {"max_steps": 3, "precision": precision}
    if strategy != "one device":
        made |= {"devices": 2, "use_distributed_sampler": False, "strategy": "ddp"}
    if strategy in FSDP2:
        made["strategy"] = ModelParallelStrategy(
            data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=strategy != FSDP2[0]
        )
    elif precision == "16-mixed":  # of which Lightning makes bf16-mixed on the CPU
        del made["precision"]
        made["plugins"] = [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))]
    return made


def outcome(folder: Path, strategy: str, precision: str, gradient: str, increment: str, form: str) -> str:
    """What comes of three steps, and of the last two alone, from a file of the first."""
    options = {"rank": 2, "gradient": gradient, **INCREMENTS[increment]}
    ends = []
    try:
        for file in (None, folder / "saved.ckpt"):
            end, saves = Ends(), Saves(folder / "saved.ckpt")
            callback = LoRA(**options, checkpoint=form, log_memory=False)
            trainer(folder, callback, end, *([] if file else [saves]), **settings(strategy, precision)).fit(
                Tiny(options), ResumableLoader(), ckpt_path=file
            )
            ends.append(end)
    except (LoRAError, ValueError) as refusal:
        frames = traceback.extract_tb(refusal.__traceback__)
        by = "" if Path(frames[-1].filename).is_relative_to(Path(lightning_lora.__file__).parent) else "Lightning: "
        return by + str(refusal)
    except Exception as failure:
        return f"{FAILURES[0]}{type(failure).__name__}: {failure}"
    if not all(end.moved for end in ends):
        return FAILURES[1]
    if strategy != FSDP2[1] and form == "merged":
        state = torch.load(folder / "saved.ckpt", weights_only=True)["state_dict"]
        plain = nn.ModuleDict({"layers": nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 4))})
        plain.load_state_dict(state, strict=True)
    return WORKS if ends[0].held == ends[1].held else FAILURES[2]


def outcomes(strategy: str, folder: Path) -> dict[str, str]:
    """That of every combination under ``strategy``, by a JSON list of the combination."""
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    made = {}
    for index, combination in enumerate(COMBINATIONS):
        (folder / str(index)).mkdir(exist_ok=True)
        made[json.dumps(combination)] = outcome(folder / str(index), strategy, *combination)
    return made


def all_outcomes(folder: Path) -> dict[str, dict[str, str]]:
    """Under every strategy, in new processes, all at once."""
    path = os.pathsep.join([str(Path(lightning_lora.__file__).parents[1]), str(HERE)])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    running = {}
    for strategy in STRATEGIES:
        (folder / strategy).mkdir()
        command = [sys.executable, "-W", "ignore", __file__, str(folder / strategy), strategy]
        with open(folder / strategy / "printed.txt", "w") as printed:
            running[strategy] = subprocess.Popen(command, env=environment, stdout=printed, stderr=printed)
    for strategy, process in running.items():
        assert process.wait(timeout=600) == 0, (folder / strategy / "printed.txt").read_text()
    return {strategy: json.loads((folder / strategy / "outcomes.json").read_text()) for strategy in STRATEGIES}


def page(made: dict[str, dict[str, str]]) -> str:
    """The page of the docs."""
    reasons: list[str] = []

    def mark(result: str) -> str:
        if result == WORKS:
            return "✓"
        if result not in reasons:
            reasons.append(result)
        return f"[{reasons.index(result) + 1}]"

    tables = []
    for strategy, results in made.items():
        by = {tuple(json.loads(key)): result for key, result in results.items()}
        dead: dict[str, str] = {}
        alive: list[str] = []
        for precision in PRECISIONS:
            refusals = [why for key, why in by.items() if key[0] == precision and why.startswith("Lightning: ")]
            if refusals:
                dead[precision] = mark(refusals[0])
            else:
                alive.append(precision)
        title = f"## {strategy}\n\nPrecisions: " + ", ".join(f"`{precision}`" for precision in alive)
        title += "".join(f"; `{precision}`: {why}" for precision, why in dead.items())
        lines = [["gradient", "checkpoint", *INCREMENTS], ["---"] * (2 + len(INCREMENTS))]
        for gradient, form in itertools.product(GRADIENTS, FORMS):
            cells = []
            for increment in INCREMENTS:
                of = {precision: mark(by[precision, gradient, increment, form]) for precision in alive}
                same = len(set(of.values())) == 1
                cells.append(of[alive[0]] if same else ", ".join(f"{key} {value}" for key, value in of.items()))
            lines.append([gradient, form, *cells])
        tables.append(title + ".\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines))
    notes = "\n".join(f"{number}. {reason}" for number, reason in enumerate(reasons, 1))
    return "\n\n".join([HEAD, *tables, "## Why not\n\n" + notes, *others()]) + "\n"


HEAD = """# What works with what

`python tests/support.py` makes this page from real runs on the CPU, and a test compares it with new runs. The marks:

- **✓**, in every precision named above the table: three optimizer steps move every adapter. A file is saved after the
  first. If it is one file with merged weights, it loads strictly into the plain model. The run that resumes from it
  ends with the same bits in all parameters and optimizer states.
- **A number**: it is refused, with the sentence of that number below.

Runs by several processes had two (gloo)."""


def others() -> list[str]:
    """What is in the tables of other tests: each line of them is a test."""
    from quantized import KINDS
    from test_other_callbacks import REFUSED as REFUSED_CALLBACKS
    from test_other_callbacks import WORKS as WORKING_CALLBACKS
    from test_precision import REFUSED as REFUSED_PRECISIONS

    from lightning_lora.trainer import support as checks

    strategies = [f"| `{kind.__name__}` | refused: {why} |" for kind, why in checks.REFUSED_STRATEGIES.items()]
    plugins = {
        f"| `{name}` | refused: {checks.REFUSED_PRECISIONS[plugin]} |" for name, plugin in REFUSED_PRECISIONS.items()
    }
    callbacks = {name: f"works: {what}" for name, what in WORKING_CALLBACKS.items()}
    callbacks |= {name: f"refused: {why}" for name, why in REFUSED_CALLBACKS.items()}
    kinds = ", ".join(f"`{kind}`" for kind in KINDS)
    return [
        "## Other strategies and precisions\n\n| | LoRA |\n| --- | --- |\n" + "\n".join(strategies + sorted(plugins)),
        "## Lightning's callbacks\n\nIn both orders in the list.\n\n| callback | beside LoRA |\n| --- | --- |\n"
        + "\n".join(f"| `{name}` | {callbacks[name]} |" for name in sorted(callbacks)),
        f'## Quantised weights\n\nThe kinds {kinds} work on one device with `gradient="factored"`, both forms of'
        " checkpoint and no DoRA: see [quantization.md](quantization.md). torchao's are refused under DDP.",
        UNTESTED,
    ]


UNTESTED = """## Untested

GPUs and other accelerators; more than one machine; more than four processes; FSDP1, DeepSpeed and XLA, which are
refused because nothing here could run them; hybrid sharding and CPU offload; quantised weights by more than one
process; `torch.compile` under DDP and FSDP2; Lightning's callbacks, but for `ModelCheckpoint`, by more than one
process."""


if __name__ == "__main__":
    if len(sys.argv) == 1:
        with tempfile.TemporaryDirectory() as folder:
            PAGE.write_text(page(all_outcomes(Path(folder))))
    else:
        made = outcomes(sys.argv[2], Path(sys.argv[1]))
        if os.environ.get("LOCAL_RANK", "0") == "0":
            (Path(sys.argv[1]) / "outcomes.json").write_text(json.dumps(made))
