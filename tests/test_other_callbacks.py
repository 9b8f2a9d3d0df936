"""Every callback that Lightning has, beside ours and in both orders: it does what it does without us, or is refused.

``WORKS`` and ``REFUSED`` name all of them, so that a new one shows up here.
"""

import dataclasses
import gc
import shutil
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.utilities.spike import TrainingSpikeException
from lightning.pytorch import Callback, LightningModule, callbacks
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    Checkpoint,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    SpikeDetection,
    Timer,
)
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning.pytorch.tuner import Tuner
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from models import Digest, Net, ResumableLoader, ScheduledNet, data, digest, layers, structure, trainer
from torch import nn
from torch.utils.data import DataLoader

from lightning_lora import LoRA, adapters, attach, inject

WORKS: dict[str, str] = {
    "BasePredictionWriter": "is given the predictions of the merged module",
    "BatchSizeFinder": "finds the same size, and leaves weights, adapters and optimizers as they were",
    "Callback": "your own is called in the same order, and its state is saved beside ours",
    "Checkpoint": "your own writes plain files that resume bitwise, from any hook",
    "DeviceStatsMonitor": "logs the same",
    "EarlyStopping": "stops at the same step",
    "GradientAccumulationScheduler": "accumulates the same; weights follow, and are drawn anew, once a real step",
    "LambdaCallback": "is called in the same order",
    "LearningRateFinder": "suggests the same rate, and leaves weights, adapters and optimizers as they were",
    "LearningRateMonitor": "logs the optimizer's rates; with `lr_ratio`, that of A",
    "ModelCheckpoint": "writes plain files that resume bitwise, with every option",
    "ModelSummary": "counts the adapted module; a table of adapters follows",
    "OnExceptionCheckpoint": "writes plain files that resume bitwise",
    "ProgressBar": "shows the same",
    "RichModelSummary": "counts the adapted module; a table of adapters follows",
    "RichProgressBar": "shows the same",
    "SpikeDetection": "stops at the same batch",
    "TQDMProgressBar": "shows the same",
    "ThroughputMonitor": "logs the same",
    "Timer": "stops, and resumes with the time that was left",
}
"""Name of the callback -> what it does beside LoRA."""

REFUSED: dict[str, str] = {
    "BackboneFinetuning": "it freezes and unfreezes the parameters that LoRA has frozen",
    "BaseFinetuning": "it freezes and unfreezes the parameters that LoRA has frozen",
    "EMAWeightAveraging": "the average of products is not the product of averages",
    "ModelPruning": "it rewrites the frozen weights while adapters are trained on them",
    "StochasticWeightAveraging": "the average of products is not the product of averages",
    "WeightAveraging": "the average of products is not the product of averages",
}
"""Name of the callback -> why not, a part of the sentence that says so."""


def test_every_public_callback_of_lightning_is_in_one_of_the_tables():
    public = {name for name in callbacks.__all__ if issubclass(getattr(callbacks, name), Callback)}
    assert WORKS.keys() | REFUSED.keys() == public
    assert not WORKS.keys() & REFUSED.keys()


# -------------------------------------------------------------------------------------------------- what runs are made of


class Model(Net):
    """Brings its own data, in batches of a size that can be tuned; has adapters of its own if ``lora`` is given."""

    flops_per_batch = 1000

    def __init__(self, lora: dict | None = None) -> None:
        super().__init__()
        self.batch_size = 4
        self.lora = lora
        if lora is not None:
            inject(self, **lora)

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=self.hparams["lr"])
        if self.lora is not None:
            attach(self, optimizer)
        return optimizer

    def train_dataloader(self):
        return DataLoader(data().dataset, batch_size=self.batch_size)

    def val_dataloader(self):
        return DataLoader(data(1).dataset, batch_size=self.batch_size)

    test_dataloader = predict_dataloader = val_dataloader


class Log(Logger):
    """Keeps what it is given."""

    name, version = "log", "0"

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int | None, dict[str, float]]] = []

    def log_metrics(self, metrics, step=None) -> None:
        self.rows.append((step, dict(metrics)))

    def log_hyperparams(self, *_) -> None: ...

    def of(self, *names: str) -> list:
        """The rows, with the metrics that begin with one of ``names`` alone."""
        found = [(step, {key: value for key, value in row.items() if key.startswith(names)}) for step, row in self.rows]
        return [row for row in found if row[1]]


class SaveAfterEpoch(Checkpoint):  # which Lightning calls last
    def __init__(self, file: Path, epoch: int = 0) -> None:
        self.file, self.epoch = file, epoch

    def on_train_epoch_end(self, trainer, pl_module) -> None:
        if trainer.current_epoch == self.epoch:
            trainer.save_checkpoint(self.file)


class Own(Callback):
    """Keeps a list of the hooks that were called, and saves it."""

    def __init__(self) -> None:
        self.called: list[str] = []

    def on_train_batch_start(self, *_) -> None:
        self.called.append("batch")

    def on_validation_end(self, *_) -> None:
        self.called.append("validation")

    def state_dict(self) -> dict[str, Any]:
        return {"called": self.called}

    def load_state_dict(self, state_dict) -> None:
        self.called = state_dict["called"]


class OwnCheckpoint(Checkpoint):
    """Saves the second batch of each epoch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if batch_idx == 1:
            trainer.save_checkpoint(self.folder / f"own{trainer.global_step}.ckpt")


class OwnBar(callbacks.ProgressBar):
    """Keeps what it would show."""

    def __init__(self) -> None:
        super().__init__()
        self.shown: list[dict] = []

    def disable(self) -> None: ...

    def enable(self) -> None: ...

    def on_train_batch_end(self, trainer, pl_module, *_) -> None:
        self.shown.append(self.get_metrics(trainer, pl_module))


def recording(summary: type) -> type:
    """``summary`` that keeps what it prints."""

    class Recording(summary):
        printed: list[Any]

        def on_fit_start(self, trainer, pl_module) -> None:
            self.printed = []
            super().on_fit_start(trainer, pl_module)

        def summarize(self, summary_data, *counts, **options) -> None:
            self.printed.append((summary_data, *counts, options))
            summary.summarize(summary_data, *counts, **options)

    return Recording


class Predictions(callbacks.BasePredictionWriter):
    def __init__(self) -> None:
        super().__init__("batch_and_epoch")
        self.batches: list[Any] = []
        self.epoch: Any = None

    def write_on_batch_end(self, trainer, pl_module, prediction, batch_indices, *_) -> None:
        self.batches.append([prediction, batch_indices])

    def write_on_epoch_end(self, trainer, pl_module, predictions, batch_indices) -> None:
        self.epoch = [predictions, batch_indices]


def calls_of_lambda(folder: Path) -> Callback:
    calls: list[str] = []
    made = callbacks.LambdaCallback(
        on_fit_start=lambda *_: calls.append("fit"),
        on_train_batch_end=lambda *_: calls.append("batch"),
        on_save_checkpoint=lambda *_: calls.append("save"),
        on_load_checkpoint=lambda *_: calls.append("load"),
        teardown=lambda *_, **__: calls.append("teardown"),
    )
    made.calls = calls
    return made


def finder(**options) -> LearningRateFinder:
    return LearningRateFinder(**{"num_training_steps": 16, "min_lr": 1e-3, "early_stop_threshold": None, **options})


@dataclasses.dataclass(frozen=True)
class Case:
    """How to make a callback for a run in a folder, and what it has done there."""

    make: Callable[[Path], Callback]
    did: Callable[[Any, Log], Any] = lambda callback, log: None
    options: dict = dataclasses.field(default_factory=dict)


CASES: dict[str, Case] = {
    "BasePredictionWriter": Case(lambda folder: Predictions(), lambda made, log: made.batches),
    "BatchSizeFinder": Case(
        lambda folder: BatchSizeFinder(max_trials=2, init_val=4, steps_per_trial=2),
        lambda made, log: made.optimal_batch_size,
    ),
    "Callback": Case(lambda folder: Own(), lambda made, log: made.called),
    "Checkpoint": Case(OwnCheckpoint, lambda made, log: sorted(file.name for file in made.folder.glob("own*"))),
    "DeviceStatsMonitor": Case(
        lambda folder: callbacks.DeviceStatsMonitor(cpu_stats=True),
        lambda made, log: [(step, sorted(row)) for step, row in log.of("DeviceStatsMonitor")],
    ),
    "EarlyStopping": Case(
        lambda folder: EarlyStopping("val_loss", patience=0, min_delta=1.0),
        lambda made, log: (made.stopped_epoch, made.best_score.item()),
        {"max_epochs": 9},
    ),
    "GradientAccumulationScheduler": Case(lambda folder: GradientAccumulationScheduler({0: 2, 1: 4})),
    "LambdaCallback": Case(calls_of_lambda, lambda made, log: made.calls),
    "LearningRateFinder": Case(
        lambda folder: finder(), lambda made, log: (made.optimal_lr.results, made.optimal_lr.suggestion())
    ),
    "LearningRateMonitor": Case(
        lambda folder: LearningRateMonitor("step"), lambda made, log: (made.lrs, log.of("lr-Adam"))
    ),
    "ModelCheckpoint": Case(
        lambda folder: ModelCheckpoint(folder / "best", monitor="val_loss", save_top_k=-1),
        lambda made, log: (made.best_k_models, sorted(Path(made.dirpath).iterdir())),
    ),
    "ModelSummary": Case(
        lambda folder: recording(callbacks.ModelSummary)(max_depth=-1),
        lambda made, log: made.printed,
        {"enable_model_summary": True},
    ),
    "OnExceptionCheckpoint": Case(callbacks.OnExceptionCheckpoint),
    "ProgressBar": Case(lambda folder: OwnBar(), lambda made, log: made.shown, {"enable_progress_bar": True}),
    "RichModelSummary": Case(
        lambda folder: recording(callbacks.RichModelSummary)(max_depth=-1),
        lambda made, log: made.printed,
        {"enable_model_summary": True},
    ),
    "RichProgressBar": Case(
        lambda folder: callbacks.RichProgressBar(),
        lambda made, log: made.get_metrics(made.trainer, None),
        {"enable_progress_bar": True},
    ),
    "SpikeDetection": Case(
        lambda folder: SpikeDetection(exclude_batches_path=str(folder / "skipped.json")),
        lambda made, log: (made.last_val.item(), made.running_mean.compute().item()),
    ),
    "TQDMProgressBar": Case(
        lambda folder: callbacks.TQDMProgressBar(),
        lambda made, log: (made.train_progress_bar.n, made.get_metrics(made.trainer, None)),
        {"enable_progress_bar": True},
    ),
    "ThroughputMonitor": Case(
        lambda folder: callbacks.ThroughputMonitor(lambda batch: len(batch[0]), window_size=2),
        lambda made, log: [
            (step, row.get("train|samples"), sorted(row)) for step, row in log.of("train|", "validate|")
        ],
    ),
    "Timer": Case(lambda folder: Timer(timedelta(hours=1)), lambda made, log: made.end_time() > made.start_time()),
}

MODES: dict[str, tuple[dict, dict]] = {
    "factored": ({"rank": 2}, {}),
    "merged": ({"rank": 2, "gradient": "merged"}, {}),
    "merged-bf16-true": ({"rank": 2, "gradient": "merged"}, {"precision": "bf16-true"}),
}
"""Name -> options of LoRA, and of the Trainer."""

RESAMPLED = {
    "resampled": ({"rank": 2, "gradient": "merged", "resample_every_n_steps": 3}, {}),
    "resampled-bf16-true": (
        {"rank": 2, "gradient": "projected", "resample_every_n_steps": 3},
        {"precision": "bf16-true"},
    ),
}

ORDERS = ("LoRA first", "LoRA last")


def in_order(order: str, lora: LoRA, *others: Callback) -> list[Callback]:
    return [lora, *others] if order == "LoRA first" else [*others, lora]


@dataclasses.dataclass
class Outcome:
    """Of one run, and of one that resumes after its first epoch."""

    end: tuple
    """Everything that was trained, the optimizers, and the steps."""
    did: str
    file: dict
    was_plain: bool
    callbacks: list[Callback]
    resumed: tuple | type[Exception]


def outcome(name: str, mode: str, order: str, folder: Path) -> Outcome:
    """``order`` may also be ``"no LoRA"``: the same adapters, but injected by the module itself."""
    case, (lora, options) = CASES[name], MODES[mode]
    options = {"max_epochs": 3, **options, **case.options}
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()

    def fit(model, save_after, ckpt_path=None):
        made, ends, log = case.make(folder), Digest(), Log()
        both = [made] if order == "no LoRA" else in_order(order, LoRA(**lora), made)
        run = trainer(folder, *both, SaveAfterEpoch(folder / "saved.ckpt", save_after), ends, logger=log, **options)
        run.fit(model, ckpt_path=ckpt_path)
        return (ends.module, ends.optimizers, ends.steps), digest(case.did(made, log)), run

    def module():
        return Model(lora if order == "no LoRA" else None)

    model = module()
    before = structure(model)
    end, did, run = fit(model, 0)
    was_plain = structure(model) == before
    file = torch.load(folder / "saved.ckpt", weights_only=True)
    again = module()
    again.batch_size = model.batch_size
    try:
        resumed = fit(again, -1, folder / "saved.ckpt")[0]
    except AttributeError as error:
        resumed = type(error)
    return Outcome(end, did, file, was_plain, run.callbacks, resumed)


@pytest.fixture(scope="module", autouse=True)
def nothing_old_to_collect():
    """Finders of batch sizes collect garbage at every trial, which is slow among all that a test session holds."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Each is made once, all in one folder, as paths are part of what some callbacks save."""
    folder, known = tmp_path_factory.mktemp("runs"), {}

    def get(*key: str) -> Outcome:
        if key not in known:
            known[key] = outcome(*key, folder / "run")
        return known[key]

    return get


STEPPING = ("LearningRateFinder", "GradientAccumulationScheduler")
PAIRS = [(name, mode) for name in WORKS for mode in MODES if mode != "merged" or name in STEPPING]


@pytest.mark.parametrize(("name", "mode"), PAIRS)
@pytest.mark.parametrize("order", ORDERS)
def test_it_does_and_training_ends_as_with_the_same_adapters_and_no_callback_of_ours(name, mode, order, outcomes):
    expected, found = outcomes(name, mode, "no LoRA"), outcomes(name, mode, order)
    assert found.did == expected.did
    assert found.end == expected.end
    assert found.was_plain
    assert len(set(map(id, found.callbacks))) == len(found.callbacks) == len(expected.callbacks) + 1


@pytest.mark.parametrize(("name", "mode"), PAIRS)
@pytest.mark.parametrize("order", ORDERS)
def test_its_state_and_all_else_is_in_the_file_as_without_us_and_the_weights_are_plain(name, mode, order, outcomes):
    expected, found = outcomes(name, mode, "no LoRA").file, outcomes(name, mode, order).file
    for entry in ("callbacks", "loops", "optimizer_states", "lr_schedulers", "epoch", "global_step"):
        if (name, entry) != ("Timer", "callbacks"):
            assert digest(found[entry]) == digest(expected[entry]), entry
    assert list(found["callbacks"]) == list(expected["callbacks"])
    assert found.keys() - expected.keys() == {"lightning_lora"}
    assert expected.keys() <= found.keys()
    Net().load_state_dict(found["state_dict"])


RESUMED_OTHERWISE = {
    "BatchSizeFinder": "its trial steps end in a restore, which leaves nothing of the file that the run was given",
    "LearningRateFinder": "its trial steps end in a restore, which leaves nothing of the file that the run was given",
    "SpikeDetection": "it reads an attribute that it does not have",
}
"""Those that Lightning itself does not let resume where the run was."""


@pytest.mark.parametrize(("name", "mode"), PAIRS)
@pytest.mark.parametrize("order", ORDERS)
def test_a_run_with_it_resumes_bitwise_or_as_it_does_without_us(name, mode, order, outcomes):
    found = outcomes(name, mode, order)
    assert (found.resumed != found.end) == (name in RESUMED_OTHERWISE)
    assert found.resumed == outcomes(name, mode, "no LoRA").resumed


def read(file):
    return torch.load(file, weights_only=True)


def state(trainer, pl_module) -> str:
    return digest([pl_module.state_dict(), [optimizer.state_dict() for optimizer in trainer.optimizers]])


class AtStart(Callback):
    """All that a run starts from."""

    def on_train_start(self, trainer, pl_module) -> None:
        self.state = state(trainer, pl_module)
        self.steps = [adapter.steps for adapter in adapters(pl_module).values()]


# --------------------------------------------------------------------------------------------------------- the finders


FOUND_IN = {
    **MODES,
    **RESAMPLED,
    "adapter files": ({"rank": 2, "checkpoint": "adapter"}, {}),
    "lr_ratio": ({"rank": 2, "gradient": "merged", "lr_ratio": 8.0}, {}),
    "from gradients": ({"rank": 2, "init": "gradient"}, {}),
    "from pissa": ({"rank": 2, "gradient": "merged", "init": "pissa"}, {"precision": "bf16-true"}),
    "dora": ({"rank": 2, "decomposition": "dora"}, {}),
}


class RateFinder(LearningRateFinder):
    def lr_find(self, trainer, pl_module) -> None:
        before = state(trainer, pl_module)
        super().lr_find(trainer, pl_module)
        self.unchanged = state(trainer, pl_module) == before


class SizeFinder(BatchSizeFinder):
    """Goes back to the size that was, so that all else can be compared."""

    def scale_batch_size(self, trainer, pl_module) -> None:
        size, before = pl_module.batch_size, state(trainer, pl_module)
        super().scale_batch_size(trainer, pl_module)
        self.unchanged = state(trainer, pl_module) == before
        self.tried, pl_module.batch_size = pl_module.batch_size, size
        trainer.fit_loop.setup_data()


@pytest.mark.parametrize("mode", FOUND_IN)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", ["rate", "size"])
def test_after_a_finder_everything_is_as_it_was_and_the_run_as_without_it(kind, order, mode, tmp_path):
    lora, options = FOUND_IN[mode]
    options = {**options, "max_epochs": 2}
    ends, start = [Digest(), Digest()], [AtStart(), AtStart()]
    if kind == "rate":
        found = RateFinder(num_training_steps=12, min_lr=1e-3, early_stop_threshold=None, update_attr=False)
    else:
        found = SizeFinder(max_trials=2, init_val=2, steps_per_trial=3)
    run = trainer(tmp_path, *in_order(order, LoRA(**lora), found), start[0], ends[0], **options)
    run.fit(Model())
    trainer(tmp_path, LoRA(**lora), start[1], ends[1], **options).fit(Model())
    assert found.unchanged
    assert found.tried > 2 if kind == "size" else len(found.optimal_lr.results["loss"]) == 12
    assert (start[0].state, start[0].steps) == (start[1].state, start[1].steps)
    assert (ends[0].module, ends[0].optimizers, ends[0].steps) == (ends[1].module, ends[1].optimizers, ends[1].steps)
    assert sum(isinstance(callback, LoRA) for callback in run.callbacks) == 1


@pytest.mark.parametrize("mode", ["factored", "merged"])
@pytest.mark.parametrize("order", ORDERS)
def test_the_run_goes_on_with_the_rate_that_was_suggested(order, mode, tmp_path):
    made, ends = finder(), [Digest(), Digest()]
    model = Model()
    trainer(tmp_path, *in_order(order, LoRA(**MODES[mode][0]), made), ends[0], max_epochs=2).fit(model)
    given = Model()
    given.hparams["lr"] = made.optimal_lr.suggestion()
    trainer(tmp_path, LoRA(**MODES[mode][0]), ends[1], max_epochs=2).fit(given)
    assert model.hparams["lr"] == given.hparams["lr"] not in (None, 0.02)
    assert (ends[0].module, ends[0].optimizers) == (ends[1].module, ends[1].optimizers)


@pytest.mark.parametrize("mode", MODES)
def test_a_tuner_finds_what_it_finds_without_us_and_leaves_a_plain_module_as_it_was(mode, tmp_path):
    lora, options = MODES[mode]
    expected, model = Model(lora), Model()
    before, bits = structure(model), digest(model.state_dict())
    found = []
    for module, added in ((expected, []), (model, [LoRA(**lora)])):
        tuner = Tuner(trainer(tmp_path, *added, **options))
        rates = tuner.lr_find(module, num_training=16, min_lr=1e-3, early_stop_threshold=None, update_attr=False)
        size = tuner.scale_batch_size(module, init_val=4, max_trials=2, steps_per_trial=2)
        found.append((rates.results, rates.suggestion(), size))
    assert found[0] == found[1]
    assert structure(model) == before
    dtype = torch.bfloat16 if "bf16" in mode else torch.float32
    assert bits != digest(model.state_dict()) if dtype == torch.bfloat16 else bits == digest(model.state_dict())
    assert digest(model.to(dtype).state_dict()) == digest(Net().to(dtype).state_dict())


class OutOfMemory(Model):
    """Batches above 8 fail after the backward pass, when gradients are there already."""

    def on_after_backward(self) -> None:
        if self.batch_size > 8:
            raise RuntimeError("CUDA out of memory.")


@pytest.mark.parametrize("search", ["power", "binsearch"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("order", ORDERS)
def test_a_size_that_does_not_fit_into_memory_is_taken_back(order, mode, search, tmp_path):
    lora, options = MODES[mode]
    made, ends = BatchSizeFinder(search, init_val=2, max_trials=4, steps_per_trial=2, margin=0.0), [Digest(), Digest()]
    model, given = OutOfMemory(), OutOfMemory()
    trainer(tmp_path, *in_order(order, LoRA(**lora), made), ends[0], **options).fit(model)
    given.batch_size = model.batch_size
    trainer(tmp_path, LoRA(**lora), ends[1], **options).fit(given)
    assert made.optimal_batch_size == model.batch_size == 8
    assert (ends[0].module, ends[0].optimizers) == (ends[1].module, ends[1].optimizers)


@pytest.mark.parametrize("form", ["merged", "adapter"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("function", ["validate", "test", "predict"])
def test_a_size_is_found_in_evaluation_and_the_weights_stay_those_of_the_file(function, order, form, tmp_path):
    file = tmp_path / "saved.ckpt"
    trainer(tmp_path, LoRA(rank=2, checkpoint=form), SaveAfterEpoch(file)).fit(Model())
    model, expected = Model(), Model()
    before = structure(model)
    made = BatchSizeFinder(max_trials=2, init_val=2, steps_per_trial=2)
    run = trainer(tmp_path, *in_order(order, LoRA(rank=2, checkpoint=form), made))
    getattr(run, function)(model, ckpt_path=file)
    getattr(trainer(tmp_path, LoRA(rank=2, checkpoint=form)), function)(expected, ckpt_path=file)
    assert model.batch_size == made.optimal_batch_size > 2
    assert digest(model.state_dict()) == digest(expected.state_dict())
    assert structure(model) == before
