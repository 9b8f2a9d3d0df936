"""What is left when a run fails: a plain module, files that resume, and the error that was raised."""

import contextlib
import errno
import functools
import itertools
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from killed import Merged
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.core.hooks import CheckpointHooks, DataHooks, ModelHooks
from models import Digest, ScheduledNet, data, digest, structure, trainer
from torch import nn

import lightning_lora
from lightning_lora import LoRA
from lightning_lora.weights.rounding import round_stochastically

# ----------------------------------------------------------------------------------------- an exception in any hook


class Own(Exception):
    """The user's."""


class Hooked(ScheduledNet):
    """Has its own data, a scheduler, and nothing that a forward changes."""

    def _make(self, where: str) -> None:
        super()._make(where)
        self.layers[1] = nn.Identity()

    def train_dataloader(self):
        return data()

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader


class Watch(Callback):
    """Changes nothing."""

    def state_dict(self):
        return {"watches": True}


class Fault:
    """Fails once: early, after the first call of a method, or late, before the first call that has steps to lose."""

    def __init__(self, name: str, moment: str) -> None:
        self.name, self.moment, self.error, self.steps = name, moment, None, 0

    def put_into(self, thing, trainer_of):
        fault, cls, method = self, type(thing), getattr(type(thing), self.name)

        def failing(self, *args, **kwargs):
            if fault.moment == "late":
                fault.fail(self is thing and trainer_of(*args), 3)
            result = method(self, *args, **kwargs)
            if fault.moment == "early":
                fault.fail(self is thing and trainer_of(*args), 0)
            return result

        if self.name.endswith("_step"):  # Lightning reads the signature
            functools.update_wrapper(failing, method)
        thing.__class__ = type(cls.__name__, (cls,), {self.name: failing})
        return thing

    def fail(self, run, least: int) -> None:
        if run and self.error is None and run.global_step >= least:
            self.error = Own(f"in {self.name}")
            self.steps = run.global_step + (self.name == "optimizer_step")  # which it has not counted yet
            raise self.error


NO_HOOKS = {
    *(
        "optimizers",
        "lr_schedulers",
        "print",
        "log",
        "log_dict",
        "all_gather",
        "toggle_optimizer",
        "untoggle_optimizer",
    ),
    *("toggled_optimizer", "freeze", "unfreeze", "to_onnx", "to_torchscript", "to_tensorrt", "load_from_checkpoint"),
    *("manual_backward", "clip_gradients"),
}
METHODS = sorted(
    {
        name
        for cls in (ModelHooks, DataHooks, CheckpointHooks, LightningModule)
        for name, value in vars(cls).items()
        if callable(value) and not name.startswith("_")
    }
    - NO_HOOKS
)
CALLBACK_METHODS = sorted(name for name, value in vars(Callback).items() if callable(value) and name[0] != "_")
ELSEWHERE = ("test", "predict", "on_load", "load_state", "configure_sharded_model", "on_exception")
"""Parts of the names of methods that ``fit`` without a file does not call."""
ONCE = {
    *("setup", "prepare_data", "configure_model", "configure_optimizers", "configure_callbacks", "on_fit_start"),
    *("on_train_start", "on_sanity_check_start", "on_sanity_check_end", "train_dataloader", "val_dataloader"),
}
"""Those that it calls before the first step only."""


def run_of(folder, gradient, *callbacks, before=(), **options):
    writer = ModelCheckpoint(folder, every_n_train_steps=1, save_last=True)
    options = {"max_epochs": 2, "limit_train_batches": 3, "limit_val_batches": 1, **options}
    lora = LoRA(rank=2, gradient=gradient)
    return trainer(folder, *before, lora, *callbacks, writer, num_sanity_val_steps=1, gradient_clip_val=1.0, **options)


@pytest.fixture(scope="module")
def unfailing(tmp_path_factory):
    """What a run comes to that does not fail, by gradient."""
    results = {}
    for gradient in ("factored", "merged"):
        ended, model = Digest(), Hooked()
        run_of(tmp_path_factory.mktemp("run"), gradient, ended).fit(model)
        results[gradient] = ended.module, ended.optimizers, digest(model.state_dict())
    return results


def fails_and_recovers(folder, gradient, fault, model, before=(), callbacks=(), expected=None):
    """The run fails by ``fault``, the module is plain and merged, and another run works as if nothing had been."""
    plain, bits, merged = structure(model), digest(model.state_dict()), Merged()
    own = type(model)
    if not (before or callbacks):
        fault.put_into(model, lambda *_: model.trainer)
        plain["classes"][""] = type(model)
    with pytest.raises(Own) as caught:
        run_of(folder, gradient, *callbacks, before=(merged, *before)).fit(model)
    assert caught.value is fault.error
    assert structure(model) == plain
    assert digest(model.state_dict()) == (merged.weights if fault.steps else bits)
    assert (digest(model.state_dict()) == bits) == (fault.steps == 0)

    model.__class__ = own
    model.train()  # where a validation failed, Lightning leaves the module as that had it
    ended = Digest()
    run_of(folder / "again", gradient, ended).fit(model)
    assert ended.steps == 6
    if not fault.steps:
        assert (ended.module, ended.optimizers, digest(model.state_dict())) == expected[gradient]


def called(name, moment):
    return not any(part in name for part in ELSEWHERE) and not (moment == "late" and name in ONCE)


MOMENTS = {"early": "factored", "late": "merged"}
"""And the gradient of the run."""


@pytest.mark.parametrize(
    ("name", "moment"), [(name, moment) for name in METHODS for moment in MOMENTS if called(name, moment)]
)
def test_an_exception_in_any_method_of_the_module_is_seen_and_leaves_a_module_to_fit_again(
    name, moment, unfailing, tmp_path
):
    fails_and_recovers(tmp_path, MOMENTS[moment], Fault(name, moment), Hooked(), expected=unfailing)


@pytest.mark.parametrize(
    ("name", "moment", "place"),
    [
        (name, moment, place)
        for index, name in enumerate(CALLBACK_METHODS)
        for moment, place in zip(MOMENTS, ("before", "after")[:: 1 - index % 2 * 2], strict=True)
        if called(name, moment)
    ],
)
def test_an_exception_in_any_hook_of_another_callback_is_seen_and_leaves_a_module_to_fit_again(
    name, moment, place, unfailing, tmp_path
):
    model, fault = Hooked(), Fault(name, moment)
    watch = fault.put_into(Watch(), lambda *_: model.trainer)
    callbacks = {"before" if place == "before" else "callbacks": [watch]}
    fails_and_recovers(tmp_path, MOMENTS[moment], fault, model, expected=unfailing, **callbacks)


def test_no_other_hook_is_called_then(tmp_path):
    model, watch, faults = Hooked(), Watch(), []
    for names, thing in ((METHODS, model), (CALLBACK_METHODS, watch)):
        for name, moment in itertools.product(names, MOMENTS):
            if not called(name, moment) and "sharded" not in name:
                faults.append(Fault(name, moment))
                faults[-1].put_into(thing, lambda *_: model.trainer)
    run_of(tmp_path, "factored", watch).fit(model)
    assert not any(fault.error for fault in faults)


@pytest.mark.parametrize(("name", "function"), list(zip(METHODS, itertools.cycle(("test", "predict")))))
def test_an_exception_in_any_method_while_evaluating_leaves_the_module_as_it_was(name, function, tmp_path):
    if "sharded" in name:
        return
    fault, model = Fault(name, "early"), Hooked()
    fault.put_into(model, lambda *_: model.trainer)
    before, bits = structure(model), digest(model.state_dict())
    try:
        getattr(run_of(tmp_path, "factored"), function)(model)
    except Own as error:
        assert error is fault.error  # noqa: PT017
    else:
        assert fault.error is None
    assert (structure(model), digest(model.state_dict())) == (before, bits)


@pytest.mark.parametrize(
    ("name", "whose"),
    [("on_load_checkpoint", whose) for whose in ("module", "before", "after")]
    + [("load_state_dict", whose) for whose in ("before", "after")],
)
def test_an_exception_while_a_file_is_loaded_is_seen_and_the_file_resumes_a_new_module(
    name, whose, unfailing, tmp_path
):
    run_of(tmp_path, "factored", Watch(), max_epochs=1).fit(Hooked())
    model, fault = Hooked(), Fault(name, "early")
    before, watch = structure(model), Watch()
    fault.put_into(model if whose == "module" else watch, lambda *_: model.trainer)
    callbacks = {"before": [watch]} if whose == "before" else {}
    run = run_of(tmp_path, "factored", *([] if callbacks else [watch]), **callbacks)
    with pytest.raises(Own) as caught:
        run.fit(model, ckpt_path=tmp_path / "last.ckpt")
    assert caught.value is fault.error
    before["classes"][""] = type(model)
    assert structure(model) == before
    ended, model = Digest(), Hooked()
    run_of(tmp_path, "factored", Watch(), ended).fit(model, ckpt_path=tmp_path / "last.ckpt")
    assert (ended.module, ended.optimizers, digest(model.state_dict())) == unfailing["factored"]


def test_an_exception_while_another_is_handled_leaves_adapters_that_the_next_run_takes_out(unfailing, tmp_path):
    """Lightning calls no further callback then."""

    class Fails(Callback):
        def on_train_start(self, trainer, pl_module) -> None:
            raise RuntimeError("the first")

        def on_exception(self, *_) -> None:
            raise Own

    model = Hooked()
    before = structure(model)
    with pytest.raises(Own):
        run_of(tmp_path, "factored", before=[Fails()]).fit(model)
    ended = Digest()
    run_of(tmp_path, "factored", ended).fit(model)
    assert structure(model) == before
    assert (ended.module, ended.optimizers, digest(model.state_dict())) == unfailing["factored"]


# ------------------------------------------------------------------------------------------- killed while it saves

HERE = Path(__file__).parent


def reported(*command, temporary):
    """What ``killed.py`` prints."""
    temporary.mkdir(exist_ok=True)
    path = os.pathsep.join([str(Path(lightning_lora.__file__).parents[1]), str(HERE)])
    environment = {**os.environ, "PYTHONPATH": path, "TMPDIR": str(temporary)}
    command = [sys.executable, str(HERE / "killed.py"), *map(str, command)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_a_run_killed_140_times_while_it_saves_always_leaves_a_file_and_every_file_resumes_to_the_same_bits(tmp_path):
    report = reported("kill", tmp_path, 140, 0, temporary=tmp_path / "temporary")
    assert len(report["left"]) == 140
    assert min(files for _, files, _ in report["left"]) >= 1
    assert len({tuple(left) for left in report["left"]}) > 20  # they died in many places
    assert report["broken"] == []
    assert len(report["resumed"]) > 15
    assert all(report["resumed"])


@pytest.mark.slow
def test_where_the_folder_for_temporary_files_is_on_another_disk_a_broken_file_is_named_and_others_resume(tmp_path):
    """What is moved to another disk is copied."""
    other = Path("/dev/shm")
    if not other.is_dir() or other.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("There is no second file system.")
    with tempfile.TemporaryDirectory(dir=other) as temporary:
        report = reported("kill", tmp_path, 60, 1, temporary=Path(temporary))
    assert all(files for name, files, _ in report["left"] if "one file" not in name)
    assert all(report["resumed"])
    assert all(re.fullmatch(r"LoRAError: The checkpoint '.*' is truncated\.", text) for text in report["broken"])


# ----------------------------------------------------------------------------------------------------- interrupted


@pytest.mark.slow
def test_a_run_that_is_interrupted_or_terminated_leaves_a_plain_module_and_a_file_that_resumes(tmp_path):
    report = reported("interrupt", tmp_path, temporary=tmp_path / "temporary")
    assert len(report) == 18
    for case, (raised, plain, merged, resumed) in report.items():
        assert raised == ("SystemExit" if "SIGINT" in case else "SIGTERMException"), case
        assert (plain, merged, resumed) == (True, True, True), case


# -------------------------------------------------------------------------------------------------------- full disk


@pytest.fixture(params=["disk", "limit"])
def small(request, tmp_path):
    """A folder, what fills it, what frees it again, and the error: a file system of 1 MB, or a limit to every file."""
    folder = tmp_path / "small"
    folder.mkdir()
    if request.param == "limit":
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        limit = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE)  # of pytest's own output, too
        yield folder, lambda: limit((4096, limits[1])), lambda: limit(limits), errno.EFBIG
        return
    mounting = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mounting, capture_output=True).returncode:
        pytest.skip("A file system can be mounted by root alone.")
    yield folder, lambda: fill(folder / "ballast"), lambda: None, errno.ENOSPC
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(file):
    with contextlib.suppress(OSError), open(file, "wb", buffering=0) as ballast:
        while True:
            ballast.write(bytes(4096))


class Fills(Callback):
    def __init__(self, fill) -> None:
        self.fill = fill

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if trainer.global_step == 3:
            self.fill()


OTHER_CALLBACKS = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")


@OTHER_CALLBACKS
@pytest.mark.parametrize("gradient", ["factored", "merged"])
@pytest.mark.parametrize("temporary", ["same", "other"])
def test_on_a_full_disk_the_run_fails_and_earlier_files_resume(
    temporary, gradient, small, unfailing, tmp_path, monkeypatch
):
    folder, fill_it, free_it, number = small
    (folder / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder / "temporary" if temporary == "same" else tmp_path))
    model, merged = Hooked(), Merged()
    plain = structure(model)
    writer = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    run = trainer(folder, merged, LoRA(rank=2, gradient=gradient), Fills(fill_it), writer, **SIX_STEPS)
    try:
        with pytest.raises(OSError, match=r"No space left|File too large") as caught:
            run.fit(model)
    finally:
        free_it()
    assert caught.value.errno == number
    assert structure(model) == plain
    assert digest(model.state_dict()) == merged.weights
    assert list((folder / "temporary").iterdir()) == []

    whole, broken = [], []
    for file in sorted(folder.glob("*.ckpt")):
        try:
            torch.load(file, weights_only=True)
            whole.append(file)
        except (RuntimeError, EOFError):
            broken.append(file)
    assert [file.stem for file in whole] == ["step=1", "step=2", "step=3"]
    assert len(broken) == (
        temporary == "other" and number == errno.ENOSPC
    )  # what is moved from another disk is copied to its final name
    for file in broken:
        with pytest.raises(ValueError, match="is truncated"):
            trainer(tmp_path, LoRA(rank=2, gradient=gradient), **SIX_STEPS).fit(Hooked(), ckpt_path=file)
    ended, model = Digest(), Hooked()
    trainer(tmp_path, LoRA(rank=2, gradient=gradient), ended, **SIX_STEPS).fit(model, ckpt_path=whole[-1])
    assert (ended.module, ended.optimizers, digest(model.state_dict())) == unfailing[gradient]


SIX_STEPS = {"max_epochs": 2, "limit_train_batches": 3, "limit_val_batches": 1, "gradient_clip_val": 1.0}

# ------------------------------------------------------------------------------------------------- not a number


class Bad(Hooked):
    """The gradient of its fifth loss is not a number, which the loss is."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss + (loss - loss.detach()).abs().sqrt() if self.trainer.global_step == 4 else loss


GRADIENTS = pytest.mark.parametrize("gradient", ["factored", "merged", "projected"])


@GRADIENTS
@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
@pytest.mark.filterwarnings("ignore:Error detected in")
def test_detect_anomaly_names_the_place_and_what_was_trained_until_then_is_kept(gradient, tmp_path):
    model, merged = Bad(), Merged()
    plain = structure(model)
    with pytest.raises(RuntimeError, match="'AbsBackward0' returned nan values"):
        trainer(tmp_path, merged, LoRA(rank=2, gradient=gradient), detect_anomaly=True, **SIX_STEPS).fit(model)
    assert structure(model) == plain
    assert digest(model.state_dict()) == merged.weights
    assert all(p.isfinite().all() for p in model.parameters())


@GRADIENTS
def test_clipping_that_asks_for_finite_gradients_fails_before_the_step(gradient, tmp_path):
    class Clips(Bad):
        def configure_gradient_clipping(self, *_, **__):
            nn.utils.clip_grad_norm_(self.parameters(), 1.0, error_if_nonfinite=True)

    model, merged = Clips(), Merged()
    run = trainer(tmp_path, merged, LoRA(rank=2, gradient=gradient), **SIX_STEPS)
    with pytest.raises(RuntimeError, match="non-finite"):
        run.fit(model)
    assert run.global_step == 4
    assert digest(model.state_dict()) == merged.weights
    assert all(p.isfinite().all() for p in model.parameters())


@OTHER_CALLBACKS
@GRADIENTS
def test_without_either_weights_become_nan_as_in_full_fine_tuning_and_earlier_files_resume(gradient, tmp_path):
    model, writer = Bad(), ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    trainer(tmp_path, LoRA(rank=2, gradient=gradient), writer, **SIX_STEPS).fit(model)
    full = Bad()
    trainer(tmp_path, **SIX_STEPS).fit(full)
    for i in (0, 3, 5):
        assert full.layers[i].weight.isnan().any()
        assert model.layers[i].weight.isnan().any()

    last = torch.load(tmp_path / "step=4.ckpt", weights_only=True)
    assert all(value.isfinite().all() for value in last["state_dict"].values())
    good, resumed = Digest(), Digest()
    trainer(tmp_path, LoRA(rank=2, gradient=gradient), good, **SIX_STEPS).fit(Hooked())
    run = trainer(tmp_path, LoRA(rank=2, gradient=gradient), resumed, **SIX_STEPS)
    run.fit(Hooked(), ckpt_path=tmp_path / "step=3.ckpt")
    assert (resumed.module, resumed.optimizers) == (good.module, good.optimizers)


@GRADIENTS
def test_early_stopping_with_check_finite_stops_at_a_loss_that_is_not_a_number(gradient, tmp_path):
    class Diverges(Hooked):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.log("watched", loss * float("nan") if self.trainer.global_step == 5 else loss)
            return loss

    model = Diverges()
    stop = EarlyStopping("watched", check_finite=True, check_on_train_epoch_end=True, patience=9)
    run = trainer(tmp_path, LoRA(rank=2, gradient=gradient), stop, **{**SIX_STEPS, "max_epochs": 5})
    run.fit(model)
    assert run.global_step == 6
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stochastic_rounding_makes_no_number_of_what_is_none_and_nothing_infinite_that_is_not(dtype):
    largest = torch.finfo(dtype).max
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), largest, -largest, 0.0]).repeat(2000)
    rounded = round_stochastically(x, dtype, (0, 0)).float()
    assert torch.equal(rounded.isnan(), x.isnan())
    assert torch.equal(rounded[~x.isnan()], x[~x.isnan()])
