"""Every callback that Lightning has, beside ours and in both orders: it does what it does without us, or is refused.

``WORKS`` and ``REFUSED`` name all of them, so that a new one shows up here.
"""

import dataclasses
import gc
import itertools
import shutil
import signal
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
from lightning_utilities.core.imports import RequirementCache
from models import Digest, Net, ResumableLoader, ScheduledNet, data, digest, layers, structure, trained_state, trainer
from pairs import pairs
from torch import nn
from torch.utils.data import DataLoader

from lightning_lora import LoRA, adapters, attach, inject
from lightning_lora.errors import LoRAError

if not RequirementCache("lightning>=2.6.0"):
    pytest.skip("the tables are those of Lightning 2.6", allow_module_level=True)

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
    "ModelPruning": "it rewrites the frozen weights while adapters are trained on them",
    "StochasticWeightAveraging": "keeps no average in files",
}
"""Name of the callback -> why not, a part of the sentence that says so."""

AVERAGES: dict[str, str] = {
    "EMAWeightAveraging": "averages A and B in factored mode",
    "WeightAveraging": "averages A and B in factored mode",
}


def test_every_public_callback_of_lightning_is_in_one_of_the_tables():
    public = {name for name in callbacks.__all__ if issubclass(getattr(callbacks, name), Callback)}
    assert WORKS.keys() | REFUSED.keys() | AVERAGES.keys() == public
    assert not WORKS.keys() & REFUSED.keys()


# ------------------------------------------------------------------------------------------------ what runs are made of


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
        if self.lora is None:
            return torch.optim.Adam(self.parameters(), lr=self.hparams["lr"])
        factors = [p for adapter in adapters(self).values() for p in adapter.trained.values()]
        optimizer = torch.optim.Adam(factors, lr=self.hparams["lr"])
        attach(self, optimizer)
        return optimizer

    def on_save_checkpoint(self, checkpoint):
        if self.lora is not None:  # weights below float32 are rounded by random bits of the step
            checkpoint["steps"] = [adapter.steps for adapter in adapters(self).values()]

    def on_load_checkpoint(self, checkpoint):
        for adapter, steps in zip(adapters(self).values(), checkpoint.get("steps", ()), strict=False):
            adapter.steps = steps

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


def read(file: Path) -> dict:
    return torch.load(file, weights_only=True)


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
    file = read(folder / "saved.ckpt")
    file.pop("steps", None)
    again = module()
    again.batch_size = model.batch_size
    try:
        resumed = fit(again, -1, folder / "saved.ckpt")[0]
    except AttributeError as error:
        resumed = type(error)
    return Outcome(end, did, file, was_plain, run.callbacks, resumed)


@pytest.fixture(autouse=True)
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


STEP = ("LearningRateFinder", "GradientAccumulationScheduler")
CASES_OF_ALL = [
    *(
        (name, mode, order)
        for name in WORKS
        for mode, order in zip(("factored", "merged-bf16-true"), ORDERS, strict=True)
    ),
    *((name, "merged", order) for name in STEP for order in ORDERS),
]
"""Those that step are seen in all modes."""


RESUMED_OTHERWISE = {
    "BatchSizeFinder": "its trial steps end in a restore, which leaves nothing of the file that the run was given",
    "LearningRateFinder": "its trial steps end in a restore, which leaves nothing of the file that the run was given",
    "SpikeDetection": "it reads an attribute that it does not have",
}
"""Those that Lightning itself does not let resume where the run was."""


@pytest.mark.parametrize(("name", "mode", "order"), CASES_OF_ALL)
def test_it_does_saves_and_resumes_as_with_the_same_adapters_and_no_callback_of_ours(name, mode, order, outcomes):
    expected, found = outcomes(name, mode, "no LoRA"), outcomes(name, mode, order)
    assert found.did == expected.did
    assert found.end == expected.end
    assert found.was_plain
    assert len(set(map(id, found.callbacks))) == len(found.callbacks) == len(expected.callbacks) + 1
    assert (found.resumed != found.end) == (name in RESUMED_OTHERWISE)
    assert found.resumed == expected.resumed

    expected, found = expected.file, found.file
    for entry in ("callbacks", "loops", "optimizer_states", "lr_schedulers", "epoch", "global_step"):
        if (name, entry) != ("Timer", "callbacks"):
            assert digest(found[entry]) == digest(expected[entry]), entry
    assert list(found["callbacks"]) == list(expected["callbacks"])
    assert found.keys() - expected.keys() == {"lightning_lora"}
    assert expected.keys() <= found.keys()
    Net().load_state_dict(found["state_dict"])


@pytest.mark.parametrize("mode", ["factored", "merged-bf16-true"])
def test_early_stopping_stops_before_the_last_epoch(mode, outcomes):
    assert outcomes("EarlyStopping", mode, "LoRA first").end[-1] == 16 < 9 * 8


def state(trainer, pl_module) -> str:
    return digest([trained_state(pl_module), [optimizer.state_dict() for optimizer in trainer.optimizers]])


class AtStart(Callback):
    """All that a run starts from."""

    def on_train_start(self, trainer, pl_module) -> None:
        self.state = state(trainer, pl_module)
        self.steps = [adapter.steps for adapter in adapters(pl_module).values()]


# ---------------------------------------------------------------------------------------------------------- the finders


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


@pytest.mark.parametrize(("mode", "kind", "order"), pairs(FOUND_IN, ["rate", "size"], ORDERS))
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


class Unused(Model):
    """One layer takes no part in the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(8, 8)


@pytest.mark.parametrize("name", ["LearningRateFinder", "BatchSizeFinder"])
@pytest.mark.parametrize("order", ORDERS)
def test_an_adapter_that_no_gradient_reached_is_named_once_though_a_finder_trains_first(order, name, tmp_path):
    with pytest.warns(UserWarning, match="No gradient reached the adapters of 'spare'") as caught:
        trainer(tmp_path, *in_order(order, LoRA(rank=2), CASES[name].make(tmp_path)), max_epochs=2).fit(Unused())
    assert len([warning for warning in caught if "No gradient" in str(warning.message)]) == 1


class OutOfMemory(Model):
    """Batches above 8 fail after the backward pass, when gradients are there already."""

    def on_after_backward(self) -> None:
        if self.batch_size > 8:
            raise RuntimeError("CUDA out of memory.")


@pytest.mark.parametrize(
    ("order", "mode", "search"), pairs(ORDERS, ["factored", "merged-bf16-true"], ["power", "binsearch"])
)
def test_a_size_that_does_not_fit_into_memory_is_taken_back(order, mode, search, tmp_path):
    lora, options = MODES[mode]
    made, ends = BatchSizeFinder(search, init_val=2, max_trials=4, steps_per_trial=2, margin=0.0), [Digest(), Digest()]
    model, given = OutOfMemory(), OutOfMemory()
    trainer(tmp_path, *in_order(order, LoRA(**lora), made), ends[0], **options).fit(model)
    given.batch_size = model.batch_size
    trainer(tmp_path, LoRA(**lora), ends[1], **options).fit(given)
    assert made.optimal_batch_size == model.batch_size == 8
    assert (ends[0].module, ends[0].optimizers) == (ends[1].module, ends[1].optimizers)


@pytest.mark.parametrize(
    ("function", "order", "form"), pairs(["validate", "test", "predict"], ORDERS, ["merged", "adapter"])
)
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


# -------------------------------------------------------------------------------- files, whichever callback writes them


def fit_in_epochs(folder, mode, *others, epochs, ckpt_path=None, model=Net):
    """Batches from a loader that goes on in mid-epoch, and validation; what training ended with."""
    lora, options = WRITTEN_IN[mode]
    ends = Digest()
    run = trainer(folder, LoRA(**lora), *others, ends, max_epochs=epochs, **options)
    run.fit(model(), ResumableLoader(), data(1), ckpt_path=ckpt_path)
    return ends.module, ends.optimizers, ends.steps


class Adam(Net):
    """Without decay, which moments that are drawn anew cannot have."""

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.02)


class FailsAt11(Adam):
    def training_step(self, batch, batch_idx):
        if self.trainer.global_step == 11:
            raise RuntimeError("step 11 fails")
        return super().training_step(batch, batch_idx)


WRITTEN_IN = {**MODES, "resampled-bf16-true": RESAMPLED["resampled-bf16-true"]}


@pytest.fixture(scope="module")
def three_epochs(tmp_path_factory):
    """What each mode ends with after three epochs without any other callback."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    return {mode: fit_in_epochs(folder, mode, epochs=3, model=Adam) for mode in WRITTEN_IN}


OPTIONS_OF_MODEL_CHECKPOINT: dict[str, tuple[dict, int]] = {
    "best two": ({"monitor": "val_loss", "save_top_k": 2}, 2),
    "best and last": ({"monitor": "val_loss", "mode": "max", "save_last": True}, 2),
    "last is a link": ({"save_top_k": -1, "save_last": "link"}, 3),
    "every five steps": ({"every_n_train_steps": 5, "save_top_k": -1}, 3),
    "every five steps, best": ({"every_n_train_steps": 5, "monitor": "loss", "save_top_k": 2}, 2),
    "every eight steps, when validated": (
        {"every_n_train_steps": 8, "monitor": "val_loss", "save_top_k": -1, "save_on_train_epoch_end": False},
        2,
    ),
    "after every interval": ({"train_time_interval": timedelta(0), "save_top_k": -1}, 16),
    "before validation is over": ({"save_on_train_epoch_end": True, "save_top_k": -1}, 2),
    "after validation": ({"save_on_train_epoch_end": False, "save_top_k": -1}, 2),
}
"""Name -> options, and how many files two epochs leave."""


@pytest.mark.parametrize(
    ("name", "mode"), list(zip(OPTIONS_OF_MODEL_CHECKPOINT, itertools.cycle(("factored", "merged-bf16-true"))))
)
def test_every_file_of_model_checkpoint_is_plain_and_resumes_bitwise(name, mode, three_epochs, tmp_path):
    options, n_files = OPTIONS_OF_MODEL_CHECKPOINT[name]

    def writer(folder: str) -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path / folder, **options)

    fit_in_epochs(tmp_path, mode, writer("written"), epochs=2, model=Adam)
    files = sorted((tmp_path / "written").iterdir())
    assert len(files) == n_files
    for file in files[:: max(1, len(files) // 2)]:
        Net().load_state_dict(read(file)["state_dict"])
        with pytest.warns(UserWarning, match="The dirpath has changed"):
            ends = fit_in_epochs(tmp_path, mode, writer("more"), epochs=3, ckpt_path=file, model=Adam)
        assert ends == three_epochs[mode], file.name


@pytest.mark.parametrize("mode", MODES)
def test_files_of_weights_only_hold_the_weights_of_full_ones(mode, tmp_path):
    full = ModelCheckpoint(tmp_path / "full", every_n_train_steps=5, save_top_k=-1)
    only = ModelCheckpoint(tmp_path / "only", every_n_train_steps=5, save_top_k=-1, mode="max", save_weights_only=True)
    fit_in_epochs(tmp_path, mode, full, only, epochs=2, model=Adam)
    files = sorted((tmp_path / "full").iterdir())
    assert len(files) == 3
    for file in files:
        weights = read(tmp_path / "only" / file.name)
        assert "optimizer_states" not in weights
        assert digest(weights["state_dict"]) == digest(read(file)["state_dict"])
        Net().load_state_dict(weights["state_dict"])


class At(Callback):
    """Calls ``save_checkpoint`` in the hook of a name, the first time in the second epoch or at its end."""

    def __init__(self, hook: str, file: Path) -> None:
        self.file = file
        self.state: str | None = None
        setattr(self, hook, self._save)

    def _save(self, trainer, pl_module, *_, **__) -> None:
        if self.state is None and trainer.global_step > 8:
            self.state = state(trainer, pl_module)
            trainer.save_checkpoint(self.file)


BETWEEN_STEPS = (
    "on_train_batch_end",
    "on_validation_end",
    "on_train_epoch_end",
    "on_train_end",
    "on_fit_end",
    "teardown",
)
WITHIN_A_STEP = ("on_train_batch_start", "on_after_backward", "on_before_optimizer_step", "on_before_zero_grad")


@pytest.mark.parametrize(("order", "hook", "mode"), pairs(ORDERS, BETWEEN_STEPS, ["factored", "resampled-bf16-true"]))
def test_a_file_that_a_users_callback_saves_in_any_hook_resumes_bitwise(order, hook, mode, three_epochs, tmp_path):
    lora, options = WRITTEN_IN[mode]
    writer, model = At(hook, tmp_path / "saved.ckpt"), Adam()
    before = structure(model)
    run = trainer(tmp_path, *in_order(order, LoRA(**lora), writer), max_epochs=2, **options)
    run.fit(model, ResumableLoader(), data(1))
    assert structure(model) == before
    Net().load_state_dict(read(writer.file)["state_dict"])
    start = AtStart()
    ends = fit_in_epochs(tmp_path, mode, start, epochs=3, ckpt_path=writer.file, model=Adam)
    assert ends == three_epochs[mode]
    if hook != "teardown":  # where the module may be plain already
        assert start.state == writer.state


@pytest.mark.parametrize("mode", ["factored", "resampled-bf16-true"])
@pytest.mark.parametrize("hook", WITHIN_A_STEP)
def test_a_file_saved_within_a_step_has_what_stood_there(hook, mode, tmp_path):
    writer, start = At(hook, tmp_path / "saved.ckpt"), AtStart()
    fit_in_epochs(tmp_path, mode, writer, epochs=2, model=Adam)
    Net().load_state_dict(read(writer.file)["state_dict"])
    fit_in_epochs(tmp_path, mode, start, epochs=3, ckpt_path=writer.file, model=Adam)
    assert start.state == writer.state


def writers_on_exception(folder: Path) -> dict[str, Callback]:
    by_hand = Callback()
    by_hand.on_exception = lambda trainer, *_: trainer.save_checkpoint(folder / "file.ckpt")
    return {
        "by hand": by_hand,
        "OnExceptionCheckpoint": callbacks.OnExceptionCheckpoint(folder, "file"),
        "ModelCheckpoint": ModelCheckpoint(folder, "file", every_n_train_steps=1000, save_on_exception=True),
    }


class BeforeEachStep(Callback):
    def on_train_batch_start(self, trainer, pl_module, *_) -> None:
        self.state = state(trainer, pl_module)


@pytest.mark.parametrize("mode", ["factored", "merged-bf16-true", "resampled-bf16-true"])
@pytest.mark.parametrize("name", writers_on_exception(Path()))
@pytest.mark.parametrize("order", ORDERS)
def test_a_file_written_on_an_exception_has_what_the_exception_found(order, name, mode, tmp_path):
    lora, options = WRITTEN_IN[mode]
    before, model = BeforeEachStep(), FailsAt11()
    plain = structure(model)
    writer = writers_on_exception(tmp_path)[name]
    run = trainer(tmp_path, *in_order(order, LoRA(**lora), writer), before, max_epochs=2, **options)
    with pytest.raises(RuntimeError, match="step 11 fails"):
        run.fit(model, ResumableLoader(), data(1))
    assert structure(model) == plain
    (file,) = tmp_path.rglob("*.ckpt")
    assert digest(read(file)["state_dict"]) == digest(model.state_dict())
    Net().load_state_dict(read(file)["state_dict"])
    start, writer = AtStart(), writers_on_exception(tmp_path)[name]
    fit_in_epochs(tmp_path, mode, start, writer, epochs=2, ckpt_path=file, model=Adam)
    assert start.state == before.state


class Interrupted(Adam):
    def on_train_batch_end(self, *_) -> None:
        if self.trainer.global_step == 11:
            raise KeyboardInterrupt


@pytest.mark.parametrize("mode", ["factored", "resampled-bf16-true"])
@pytest.mark.parametrize("order", ORDERS)
def test_a_run_that_is_interrupted_by_hand_leaves_a_plain_module_and_a_file_to_go_on_from(order, mode, tmp_path):
    class AtEnd(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_) -> None:
            self.state = state(trainer, pl_module)

    lora, options = WRITTEN_IN[mode]
    end, start, model = AtEnd(), AtStart(), Interrupted()
    plain, handler = structure(model), signal.getsignal(signal.SIGINT)
    writer = writers_on_exception(tmp_path)["by hand"]
    try:
        with pytest.raises(SystemExit):
            trainer(tmp_path, *in_order(order, LoRA(**lora), writer), end, max_epochs=2, **options).fit(
                model, ResumableLoader(), data(1)
            )
    finally:
        signal.signal(signal.SIGINT, handler)  # Lightning ignores further ones
    assert structure(model) == plain
    Net().load_state_dict(read(tmp_path / "file.ckpt")["state_dict"])
    fit_in_epochs(tmp_path, mode, start, epochs=2, ckpt_path=tmp_path / "file.ckpt", model=Adam)
    assert start.state == end.state


class WithoutFrozen(Callback):
    """Takes out of files what is not trained, as is often done."""

    def on_save_checkpoint(self, trainer, pl_module, checkpoint) -> None:
        for name, parameter in pl_module.named_parameters():
            if not parameter.requires_grad:
                del checkpoint["state_dict"][name]


@pytest.mark.parametrize("gradient", ["factored", "merged", "projected"])
@pytest.mark.parametrize("order", ORDERS)
def test_a_file_without_weights_is_told_to_be_no_whole_model_and_resumes_on_the_same_ones(order, gradient, tmp_path):
    lora = {"rank": 2, "gradient": gradient}
    ends = [Digest(), Digest()]
    writers = WithoutFrozen(), SaveAfterEpoch(tmp_path / "saved.ckpt", 0)
    with pytest.warns(UserWarning, match="the file is no whole model"):
        trainer(tmp_path, *in_order(order, LoRA(**lora), *writers), ends[0], max_epochs=2).fit(Net(), ResumableLoader())
    model, whole = Net(), Net()
    model.strict_loading = False
    run = trainer(tmp_path, LoRA(**lora), ends[1], max_epochs=2)
    run.fit(model, ResumableLoader(), ckpt_path=tmp_path / "saved.ckpt")
    trainer(tmp_path, LoRA(**lora), max_epochs=2).fit(whole, ResumableLoader())
    torch.testing.assert_close(model.state_dict(), whole.state_dict())
    assert gradient != "factored" or (ends[0].module, ends[0].optimizers) == (ends[1].module, ends[1].optimizers)


class KeepsStates(LightningModule):
    """Manual optimization that keeps the weights before each step, as ModelCheckpoint asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = layers()
        self.automatic_optimization = False
        self.saved_models: dict[int, dict] = {}

    def training_step(self, batch, batch_idx) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(nn.functional.mse_loss(self.layer(batch[0]), batch[1]))
        self.saved_models = {batch_idx: {key: value.clone() for key, value in self.layer.state_dict().items()}}
        optimizer.step()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.02)


@pytest.mark.parametrize("gradient", ["factored", "merged", "projected"])
def test_model_checkpoint_may_put_back_the_weights_before_a_step_while_it_saves(gradient, tmp_path):
    ends, model = [Digest(), Digest()], KeepsStates()
    writer = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=3, save_top_k=-1)
    trainer(tmp_path, LoRA(rank=2, gradient=gradient), writer, ends[0]).fit(model, data())
    trainer(tmp_path, LoRA(rank=2, gradient=gradient), ends[1]).fit(KeepsStates(), data())
    assert (ends[0].module, ends[0].optimizers) == (ends[1].module, ends[1].optimizers)
    for step in (3, 6):
        stopped = KeepsStates()
        trainer(tmp_path, LoRA(rank=2, gradient=gradient), max_steps=step - 1).fit(stopped, data())
        state = read(tmp_path / f"step={step}.ckpt")["state_dict"]
        parameters = dict(stopped.named_parameters())
        assert digest([state[name] for name in parameters]) == digest(list(parameters.values()))


class SavesWhenTrainingHasEnded(TorchCheckpointIO):
    """A slow disk: nothing is written before ``ended`` is set."""

    def __init__(self, ended: threading.Event) -> None:
        self.ended = ended

    def save_checkpoint(self, checkpoint, path, storage_options=None) -> None:
        if not self.ended.wait(60):
            raise TimeoutError("training does not end")
        super().save_checkpoint(checkpoint, path, storage_options)


@pytest.mark.parametrize("mode", [*WRITTEN_IN, "adapter files"])
def test_a_file_that_is_written_while_training_goes_on_has_the_weights_of_its_own_step(mode, tmp_path):
    lora, options = {**WRITTEN_IN, **FOUND_IN}[mode]
    ended = threading.Event()
    signal = callbacks.LambdaCallback(on_train_end=lambda *_: ended.set())
    for folder, plugins in (("at once", []), ("late", [AsyncCheckpointIO(SavesWhenTrainingHasEnded(ended))])):
        writer = ModelCheckpoint(tmp_path / folder, every_n_train_steps=3, save_top_k=-1)
        run = trainer(tmp_path, LoRA(**lora), writer, signal, plugins=plugins, max_epochs=2, **options)
        run.fit(Adam(), ResumableLoader())
        ended.clear()
    files = sorted((tmp_path / "late").iterdir())
    assert len(files) == 5
    for file in files:
        late, at_once = read(file), read(tmp_path / "at once" / file.name)
        for entry in ("state_dict", "lightning_lora", "optimizer_states"):
            assert digest(late[entry]) == digest(at_once[entry])
    assert len({digest(read(file)["lightning_lora"]["adapters"]) for file in files}) == 5


# ----------------------------------------------------------------------------------------------- what each of them does


@pytest.mark.parametrize("mode", ["merged", *RESAMPLED])
@pytest.mark.parametrize("order", ORDERS)
def test_weights_follow_and_are_drawn_anew_once_a_real_step_under_a_schedule_of_accumulation(order, mode, tmp_path):
    class Count(Callback):
        def __init__(self) -> None:
            self.seen: list[tuple[int, int, str]] = []

        def on_train_batch_end(self, trainer, pl_module, *_) -> None:
            adapter = adapters(pl_module)["layers.0"]
            self.seen.append((adapter.steps, adapter.drawn_at, digest(pl_module.layers[0].weight)))

    lora, options = {**MODES, **RESAMPLED}[mode]
    count, scheduler = Count(), GradientAccumulationScheduler({0: 2, 1: 4})
    run = trainer(tmp_path, *in_order(order, LoRA(**lora), scheduler), count, max_epochs=2, **options)
    run.fit(Model())
    real = [(batch + 1) // 2 for batch in range(8)] + [4 + (batch + 1) // 4 for batch in range(8)]
    assert run.global_step == real[-1] == 6
    weights = [weight for _, _, weight in count.seen]
    moved, stepped = ([a != b for a, b in itertools.pairwise(values)] for values in (weights, real))
    assert moved == stepped
    if mode != "merged":
        assert [(steps, drawn_at) for steps, drawn_at, _ in count.seen] == [(n, n // 3 * 3) for n in real]


@pytest.mark.parametrize("order", ORDERS)
def test_the_monitor_of_learning_rates_logs_those_of_the_optimizer_and_lr_ratio_leaves_them_alone(order, tmp_path):
    rows = []
    for lr_ratio in (None, 16.0):
        log, monitor = Log(), LearningRateMonitor("step", log_weight_decay=True)
        run = trainer(tmp_path, *in_order(order, LoRA(rank=2, lr_ratio=lr_ratio), monitor), logger=log)
        run.fit(ScheduledNet(), data())
        rows.append(log.of("lr-AdamW"))
    assert rows[0] == rows[1]
    rates = [row["lr-AdamW"] for _, row in rows[0]]
    assert rates == pytest.approx([0.02 * 0.9**step for step in range(8)])


@pytest.mark.parametrize(("mode", "interval"), [("factored", "step"), ("merged-bf16-true", "epoch")])
@pytest.mark.parametrize("order", ORDERS)
def test_a_timer_stops_the_run_which_resumes_with_the_time_that_was_left(order, mode, interval, tmp_path):
    lora, options = MODES[mode]
    times = []

    def fit(added, duration, ckpt_path=None):
        timer, ends, model = Timer(duration, interval), Digest(), Model(None if added else lora)
        before = structure(model)
        in_its_order = in_order(order, *added, timer) if added else [timer]
        run = trainer(tmp_path, *in_its_order, ends, max_epochs=3, **options)
        run.fit(model, ckpt_path=ckpt_path)
        times.append(timer.time_elapsed())
        assert structure(model) == before
        return run, model, getattr(ends, "module", None), getattr(ends, "optimizers", None)

    def stopped_and_resumed(file, *added):
        """Twice with a microsecond, which is over after the first look, and once with an hour."""
        run, first, *ends = fit(added, timedelta(microseconds=1))
        run.save_checkpoint(file)
        used_up, second, *nothing = fit(added, timedelta(microseconds=1), file)
        assert used_up.global_step == run.global_step == (1 if interval == "step" else 8)
        assert nothing == [None, None]  # no training
        assert digest(second.state_dict()) == digest(first.state_dict())
        resumed, _, *last = fit(added, timedelta(hours=1), file)
        return resumed.global_step, ends, last

    found = stopped_and_resumed(tmp_path / "ours.ckpt", LoRA(**lora))
    assert 0 < times[0] <= times[1] < times[2]
    assert found == stopped_and_resumed(tmp_path / "other.ckpt")
    uninterrupted = fit([LoRA(**lora)], None)
    assert (found[2] == list(uninterrupted[2:])) == (interval == "epoch")  # a stop in mid-epoch ends the epoch


class Spikes(Model):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * (1000 if batch_idx == 5 else 1)


@pytest.mark.parametrize("order", ["no LoRA", *ORDERS])
def test_a_spike_stops_the_run_at_its_batch_and_leaves_a_plain_module(order, tmp_path):
    model, made = Spikes(), SpikeDetection(exclude_batches_path=str(tmp_path / "skipped.json"))
    before = structure(model)
    added = [made] if order == "no LoRA" else in_order(order, LoRA(rank=2, gradient="merged"), made)
    with pytest.raises(TrainingSpikeException, match="batch 5"):
        trainer(tmp_path, *added).fit(model)
    assert made.bad_batches == [4, 5]
    assert structure(model) == before


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("form", ["merged", "adapter"])
def test_predictions_that_are_written_are_those_of_the_plain_merged_module(form, order, tmp_path):
    model, writers = Model(), [Predictions(), Predictions(), Predictions()]
    run = trainer(tmp_path, *in_order(order, LoRA(rank=2, checkpoint=form), writers[0]))
    run.fit(model)
    run.save_checkpoint(tmp_path / "saved.ckpt")
    run.predict(model)
    fresh = trainer(tmp_path, *in_order(order, LoRA(rank=2, checkpoint=form), writers[1]))
    fresh.predict(Model(), ckpt_path=tmp_path / "saved.ckpt")
    plain = Model()
    plain.load_state_dict(model.state_dict())
    trainer(tmp_path, writers[2]).predict(plain)
    written = [digest([writer.batches, writer.epoch]) for writer in writers]
    assert written[0] == written[1] == written[2]
    assert len(writers[0].batches) == 8


# ------------------------------------------------------------------------------------------------------ what is refused


class WithBackbone(Net):
    """BackboneFinetuning asks for a backbone."""

    @property
    def backbone(self):
        return self.layers[:3]


class OwnFinetuning(callbacks.BaseFinetuning):
    def freeze_before_training(self, pl_module) -> None: ...

    def finetune_function(self, pl_module, epoch, optimizer) -> None: ...


MAKE_REFUSED: dict[str, Callable[[], Callback]] = {
    "BackboneFinetuning": lambda: callbacks.BackboneFinetuning(unfreeze_backbone_at_epoch=1),
    "BaseFinetuning": OwnFinetuning,
    "EMAWeightAveraging": lambda: callbacks.EMAWeightAveraging(decay=0.9),
    "ModelPruning": lambda: callbacks.ModelPruning("l1_unstructured", amount=0.1),
    "StochasticWeightAveraging": lambda: callbacks.StochasticWeightAveraging(swa_lrs=0.1),
    "WeightAveraging": callbacks.WeightAveraging,
}


class Steps(Callback):
    count = 0

    def on_train_batch_start(self, *_) -> None:
        self.count += 1


@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback with a model that overrides")
@pytest.mark.parametrize(("order", "name", "gradient"), pairs(ORDERS, REFUSED, ["factored", "merged"]))
def test_it_is_refused_by_name_with_the_reason_before_any_step(order, name, gradient, tmp_path):
    made, steps, model = MAKE_REFUSED[name](), Steps(), WithBackbone()
    names, bits = {name: type(child) for name, child in model.named_modules()}, digest(model.state_dict())
    run = trainer(tmp_path, *in_order(order, LoRA(rank=2, gradient=gradient), made), steps)
    with pytest.raises(LoRAError) as caught:
        run.fit(model, data())
    assert f"cannot be combined with {type(made).__name__}" in str(caught.value)
    assert REFUSED[name] in str(caught.value)
    assert steps.count == 0
    assert {name: type(child) for name, child in model.named_modules()} == names
    assert digest(model.state_dict()) == bits


@pytest.mark.parametrize("function", ["validate", "test", "predict"])
@pytest.mark.parametrize("name", ["EMAWeightAveraging", "ModelPruning", "WeightAveraging"])
def test_what_is_refused_in_fit_is_no_obstacle_to_evaluation(name, function, tmp_path):
    results = []
    for added in ([], [LoRA(rank=2)]):
        run = trainer(tmp_path, *added, MAKE_REFUSED[name]())
        results.append(digest(getattr(run, function)(Model(), **({} if function == "predict" else {"verbose": False}))))
    assert results[0] == results[1]


def test_merged_files_can_be_averaged_in_the_place_of_a_run_that_averages(tmp_path):
    """What the refusal advises: the average of merged weights is that of the products, and plain."""
    writer = ModelCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=-1)
    trainer(tmp_path, LoRA(rank=2), writer).fit(Net(), data())
    files = [read(file) for file in tmp_path.glob("*.ckpt")]
    average = {key: sum(file["state_dict"][key] for file in files) / len(files) for key in Net().state_dict()}
    model = Net()
    model.load_state_dict(average)
    entries = [file["lightning_lora"]["adapters"]["layers.0"] for file in files]
    products = sum(entry["B"].T @ entry["A"] for entry in entries) / len(files)
    factors = [sum(entry[name] for entry in entries) / len(files) for name in "BA"]
    torch.testing.assert_close(model.layers[0].weight.detach(), layers()[0].weight.detach() + products)
    assert (products - factors[0].T @ factors[1]).norm() > 0.01 * products.norm()


@pytest.mark.parametrize(
    "pair",
    [
        lambda: (LoRA(rank=2, target_modules=["layers.0"]), LoRA(rank=1, target_modules=["layers.5"])),
        lambda: (LoRA(rank=1, target_modules=["layers.5"]), LoRA(rank=2, target_modules=["layers.0"])),
        lambda: (LoRA(rank=2),) * 2,
        lambda: (LoRA(rank=2), type("Mine", (LoRA,), {})(rank=2)),
    ],
    ids=["first and last layer", "last and first layer", "the same twice", "a subclass"],
)
def test_two_lora_callbacks_are_refused_with_what_to_do_instead(pair, tmp_path):
    model = Model()
    before, bits = structure(model), digest(model.state_dict())
    for function in ("fit", "validate", "test", "predict"):
        with pytest.raises(LoRAError, match=r"two LoRA callbacks.*Use one.*`rank_pattern`"):
            getattr(trainer(tmp_path, *pair()), function)(model)
    assert structure(model) == before
    assert digest(model.state_dict()) == bits


@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback with a model that overrides")
@pytest.mark.parametrize("order", ORDERS)
def test_the_reason_of_a_refusal_reaches_the_user_though_a_file_is_written_on_the_exception(order, tmp_path):
    writer, model = callbacks.OnExceptionCheckpoint(tmp_path), Net()
    averaging = callbacks.StochasticWeightAveraging(swa_lrs=0.1)
    with pytest.raises(LoRAError, match="cannot be combined with StochasticWeightAveraging"):
        trainer(tmp_path, *in_order(order, LoRA(rank=2), averaging, writer)).fit(model, data())
    assert digest(read(writer.ckpt_path)["state_dict"]) == digest(model.state_dict()) == digest(Net().state_dict())


@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback with a model that overrides")
def test_what_the_module_itself_brings_is_refused_too(tmp_path):
    class BringsAveraging(Net):
        def configure_callbacks(self):
            return callbacks.StochasticWeightAveraging(swa_lrs=0.1)

    with pytest.raises(LoRAError, match="cannot be combined with StochasticWeightAveraging"):
        trainer(tmp_path, LoRA(rank=2)).fit(BringsAveraging(), data())


def test_a_lora_callback_of_the_modules_own_takes_the_place_of_the_trainers(tmp_path):
    class BringsItsOwn(Model):
        def configure_callbacks(self):
            return [LoRA(rank=1)]

    ranks = []
    look = callbacks.LambdaCallback(
        on_train_start=lambda trainer, module: ranks.extend(adapter.rank for adapter in adapters(module).values())
    )
    trainer(tmp_path, LoRA(rank=2), look).fit(BringsItsOwn())
    assert ranks == [1, 1, 1]
