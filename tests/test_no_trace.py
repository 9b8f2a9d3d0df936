"""What the callback leaves behind and what it does besides: nothing is kept alive, drawn, called or logged more."""

import copy
import gc
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers.logger import DummyLogger
from models import Net, data, digest, trainer
from torch import nn

import lightning_lora
from lightning_lora import LoRA

GRADIENTS = ("factored", "merged", "projected")


# -------------------------------------------------------------------------------------------- nothing is kept alive


class Fails(Net):
    """Fails in its third batch."""

    def training_step(self, batch, batch_idx):
        if batch_idx == 2:
            raise RuntimeError("on purpose")
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("kind", [Net, Fails])
def test_module_trainer_and_callback_of_twenty_fits_are_gone(kind, gradient, tmp_path):
    alive = []
    for _ in range(20 if kind is Net else 3):
        model, lora = kind(), LoRA(rank=2, gradient=gradient)
        run = trainer(tmp_path, lora, limit_train_batches=4)
        if kind is Fails:
            with pytest.raises(RuntimeError, match="on purpose"):
                run.fit(model, data())
        else:
            run.fit(model, data())
        alive += [weakref.ref(thing) for thing in (model, run, run.strategy, lora, model.layers[0].weight)]
        del model, run, lora
    gc.collect()
    assert [ref() for ref in alive if ref() is not None] == []


def fitted(lora: LoRA, folder) -> list[weakref.ref]:
    """References to a module and a Trainer of which ``lora`` was the callback."""
    model = Net()
    run = trainer(folder, lora, limit_train_batches=2)
    run.fit(model, data())
    return [weakref.ref(model), weakref.ref(run)]


def test_a_callback_that_is_used_again_keeps_no_earlier_module(tmp_path):
    lora = LoRA(rank=2)
    earlier = fitted(lora, tmp_path) + fitted(lora, tmp_path)
    fitted(lora, tmp_path)  # Lightning lends a callback the methods `log` and `log_dict` of its last module
    gc.collect()
    assert [ref() is None for ref in earlier] == [True] * 4


def test_a_copy_of_the_callback_is_outside_of_its_run(tmp_path):
    lora = LoRA(rank=2)
    module, _ = fitted(lora, tmp_path)
    copied = copy.deepcopy(lora)
    assert lora.log.__self__ is module()
    assert not {"log", "log_dict"} & vars(copied).keys()
    assert copied.options == lora.options
    assert copied.memory is not None


GROWS = """
import gc, logging, sys, tempfile, warnings
import lightning.pytorch as pl
import torch
from models import Net, data, trainer
from torch import nn
from lightning_lora import LoRA

warnings.simplefilter("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 / 2**20

class Wide(Net):
    def _make(self, where):
        if not hasattr(self, "layers"):
            self.layers = nn.Sequential(nn.Linear(8, 2048), nn.Linear(2048, 1024), nn.Linear(1024, 4))

folder, sizes = tempfile.mkdtemp(), []
for _ in range(20):
    trainer(folder, LoRA(rank=2, gradient=sys.argv[1]), limit_train_batches=2).fit(Wide(), data())
    gc.collect()
    sizes.append(resident())
print(sizes[4], sizes[-1])
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_memory_of_the_process_does_not_grow_over_twenty_fits_of_8_mib():
    path = os.pathsep.join([str(Path(lightning_lora.__file__).parents[1]), str(Path(__file__).parent)])
    done = subprocess.run(
        [sys.executable, "-c", GROWS, "merged"],
        env={**os.environ, "PYTHONPATH": path, "MALLOC_ARENA_MAX": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    early, late = map(float, done.stdout.split())
    assert late - early < 16  # two modules; fifteen fits that are kept would be 120


# ------------------------------------------------------------------------------- with and without the memory report


class Log(DummyLogger):
    """Keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple] = []
        self.hyperparameters: list[dict] = []

    def log_metrics(self, metrics, step=None) -> None:
        self.rows.append((step, dict(metrics)))

    def log_hyperparams(self, params, *args, **kwargs) -> None:
        self.hyperparameters.append(dict(params))


class Heard(Net):
    """Draws random numbers, logs, and writes down each call of its methods."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list = []
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        self.calls.append(("forward", digest(x)))
        return self.layers(self.dropout(x))

    def training_step(self, batch, batch_idx):
        self.calls.append(("training_step", batch_idx))
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.calls.append(("validation_step", batch_idx))
        super().validation_step(batch, batch_idx)

    def configure_optimizers(self):
        self.calls.append("configure_optimizers")
        return super().configure_optimizers()

    def on_train_batch_end(self, *_):
        self.calls.append(("on_train_batch_end", torch.get_rng_state().sum().item()))

    def state_dict(self, *args, **kwargs):
        self.calls.append("state_dict")
        return super().state_dict(*args, **kwargs)


class Steps(Callback):
    """The optimizer's steps and the generator's state after each batch."""

    def __init__(self) -> None:
        self.seen: list = []

    def on_train_batch_end(self, trainer, *_) -> None:
        self.seen.append((trainer.global_step, digest(torch.get_rng_state())))


def run(folder, log_memory: bool, **options):
    """Two epochs; what was heard, logged, drawn and left."""
    torch.manual_seed(3)
    logger, model, steps, lora = Log(), Heard(), Steps(), LoRA(rank=2, log_memory=log_memory, **options)
    trainer(folder, lora, steps, logger=logger, max_epochs=2).fit(model, data(), data())
    rows = [row for row in logger.rows if not any("memory" in name for name in row[1])]
    return {
        "calls": model.calls,
        "rows": rows,
        "steps": steps.seen,
        "weights": digest(model.state_dict()),
        "drawn": digest(torch.get_rng_state()),
        "hyperparameters": logger.hyperparameters,
    }, [row for row in logger.rows if row not in rows]


@pytest.mark.parametrize(
    "options",
    [{"gradient": gradient} for gradient in GRADIENTS] + [{"dropout": 0.3}, {"init": "pissa_niter_2"}],
    ids=str,
)
def test_rows_calls_random_numbers_and_weights_are_the_same_with_and_without_the_memory_report(options, tmp_path):
    without, nothing = run(tmp_path, False, **options)
    with_report, memory = run(tmp_path, True, **options)
    assert with_report == without
    assert nothing == []
    assert len(memory) == 1


@pytest.mark.parametrize("accumulate", [1, 2])
def test_memory_is_logged_once_at_the_step_at_which_lightning_logs_that_batch(accumulate, tmp_path):
    logger = Log()
    trainer(tmp_path, LoRA(rank=2), logger=logger, max_epochs=2, accumulate_grad_batches=accumulate).fit(Net(), data())
    memory = [index for index, (_, row) in enumerate(logger.rows) if any("memory" in name for name in row)]
    assert len(memory) == 1
    following = next(step for step, row in logger.rows[memory[0] :] if "loss" in row)
    assert logger.rows[memory[0]][0] == following == 0


@pytest.mark.parametrize("log_memory", [True, False])
def test_hyperparameters_are_logged_once_and_not_where_the_module_says_not(log_memory, tmp_path):
    logger = Log()
    trainer(tmp_path, LoRA(rank=2, log_memory=log_memory), logger=logger, max_epochs=2).fit(Net(), data())
    assert [given["lora"]["rank"] for given in logger.hyperparameters if "lora" in given] == [2]

    class Quiet(Net):
        def __init__(self) -> None:
            super().__init__()
            self.save_hyperparameters(logger=False)

    logger = Log()
    trainer(tmp_path, LoRA(rank=2, log_memory=log_memory), logger=logger).fit(Quiet(), data())
    assert logger.hyperparameters == []
