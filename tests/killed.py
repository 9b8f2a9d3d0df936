"""Runs that are killed while they save, or interrupted; then what is left is loaded, and resumed.

As a program it prints JSON: ``killed.py kill FOLDER TRIALS SEED``, ``killed.py interrupt FOLDER``. Each run is a fork
of a process that has imported everything, and that runs no backward itself: that would not survive the fork.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from models import N_BATCHES, Digest, Net, ResumableLoader, batches, digest, structure, trainer
from torch.utils.data import DataLoader, TensorDataset

from lightning_lora import LoRA, adapters

CONFIGS = {
    "merged, factored, the best one": ({}, {"save_top_k": 1}),
    "adapter, factored, the last of three": ({"checkpoint": "adapter"}, {"save_top_k": 3, "monitor": "loss"}),
    "merged, merged, all and a link": ({"gradient": "merged"}, {"save_top_k": -1, "save_last": "link"}),
    "merged, factored, one file": ({}, {"save_top_k": 0}),
}
MAX_EPOCHS = 2


class Saves(ModelCheckpoint):
    """Saves after every step, and dies there: at the event of the interpreter that is given, or when it is killed."""

    def __init__(self, folder: Path, kill_at: int = 0, tell: int | None = None, **options) -> None:
        super().__init__(folder, every_n_train_steps=1, **{"save_last": True, **options})
        self.kill_at, self.tell, self.events = kill_at, tell, 0

    def on_train_batch_end(self, *args, **kwargs) -> None:
        if self.tell is not None:
            os.write(self.tell, b".")
        if self.kill_at:
            sys.setprofile(self.event)
        super().on_train_batch_end(*args, **kwargs)
        sys.setprofile(None)

    def event(self, *_) -> None:
        self.events += 1
        if self.events == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    @property
    def state_key(self) -> str:
        return "saves"


def fit(name: str, folder: Path, *callbacks: Callback, ckpt_path: Path | None = None) -> str:
    """A hash of what the run comes to."""
    ended = Digest()
    lora = LoRA(rank=2, log_memory=False, **CONFIGS[name][0])
    run = trainer(folder, lora, ended, *callbacks, max_epochs=MAX_EPOCHS)
    run.fit(Net(), ResumableLoader(), ckpt_path=ckpt_path)
    return digest([ended.module, ended.optimizers, ended.steps])


def forked(work: Callable[[], object]) -> tuple[int, int]:
    """The process that does ``work`` and where it writes, as JSON, what it returns."""
    out, into = os.pipe()
    process = os.fork()
    if process:
        os.close(into)
        return process, out
    status = 1
    try:
        with open(into, "w") as file, open(os.devnull, "w") as null, contextlib.redirect_stderr(null):
            json.dump(work(), file)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def result(work: Callable[[], object]) -> object:
    process, out = forked(work)
    with open(out) as file:
        value = file.read()
    assert os.waitpid(process, 0)[1] == 0
    return json.loads(value)


def kill(name: str, folder: Path, draws: random.Random, events: int, duration: float, by_event: bool) -> None:
    """Trains in a fork of this process until it dies in a save."""
    told, tell = os.pipe()
    kill_at = draws.randrange(events // 8, events // 2) if by_event else 0
    saves = draws.randrange(2, 8)
    process = os.fork()
    if not process:
        os.close(told)
        try:
            fit(name, folder, Saves(folder, kill_at, tell, **CONFIGS[name][1]))
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    os.close(tell)
    if not by_event:
        for _ in range(saves):
            os.read(told, 1)
        time.sleep(draws.uniform(0, 1.2 * duration))
        os.kill(process, signal.SIGKILL)
    _, status = os.waitpid(process, 0)
    os.close(told)
    assert os.WIFSIGNALED(status), name
    assert os.WTERMSIG(status) == signal.SIGKILL, name


def loads(name: str, file: Path) -> dict | None:
    """What is in ``file`` if it is whole: with weights only, and strictly into the plain model."""
    try:
        checkpoint = torch.load(file, weights_only=True)
    except Exception:
        return None
    if CONFIGS[name][0].get("checkpoint") != "adapter":
        Net().load_state_dict(checkpoint["state_dict"])
    return checkpoint


def refusal(name: str, file: Path) -> str:
    """What the callback says of ``file``."""
    try:
        fit(name, file.parent, ckpt_path=file)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def main(folder: Path, trials: int, seed: int) -> None:
    draws = random.Random(seed)
    expected, events, duration = {}, {}, {}
    for name in CONFIGS:
        expected[name] = result(lambda name=name: fit(name, folder / "whole"))

        def counted(name: str = name) -> list[float]:
            saves = Saves(folder / "counted", 10**9, **CONFIGS[name][1])
            begin = time.perf_counter()
            fit(name, folder / "counted", saves)
            return [saves.events, (time.perf_counter() - begin) / 60]

        events[name], duration[name] = result(counted)
    left, resumed, broken = [], {}, []
    for trial in range(trials):
        name = list(CONFIGS)[trial % len(CONFIGS)]
        place = folder / str(trial)
        place.mkdir()
        kill(name, place, draws, events[name], duration[name], by_event=trial % 8 < 4)
        files = sorted(place.rglob("*.ckpt"))
        whole = {file: checkpoint for file in files if (checkpoint := loads(name, file)) is not None}
        broken += [refusal_of(name, file) for file in files if file not in whole and file.exists()]
        left.append([name, len(whole), max((c["global_step"] for c in whole.values()), default=0)])
        for file, checkpoint in whole.items():
            state = name, digest([checkpoint["state_dict"], checkpoint["optimizer_states"], checkpoint["global_step"]])
            if state not in resumed and len(resumed) < 18:
                resumed[state] = result(lambda name=name, file=file: fit(name, file.parent, ckpt_path=file))
        shutil.rmtree(place)
    same = [value == expected[name] for (name, _), value in resumed.items()]
    print(json.dumps({"left": left, "resumed": same, "broken": broken}))


def refusal_of(name: str, file: Path) -> str:
    return str(result(lambda: refusal(name, file)))


class Waits(Net):
    """Tells where it is at its fifth step, and waits there for a signal."""

    tell, where = -1, ""

    def wait(self, where: str) -> None:
        if where == self.where and self.trainer.global_step >= 5:
            self.where = ""
            os.write(self.tell, b".")
            deadline = time.monotonic() + 60
            while not self.trainer.received_sigterm and time.monotonic() < deadline:
                time.sleep(0.01)

    def training_step(self, batch, batch_idx):
        self.wait("training")
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.wait("validation")
        return super().validation_step(batch, batch_idx)

    def on_save_checkpoint(self, checkpoint):
        self.wait("saving")


def same_batches() -> DataLoader:
    """One batch again and again: Lightning goes on after the one that it was interrupted in."""
    return DataLoader(TensorDataset(*(part.repeat(N_BATCHES, 1) for part in batches()[0])), batch_size=4)


def interrupted(name: str, folder: Path, number: int, where: str) -> list[object]:
    """What was raised, whether the module is plain then, merged, and its file resumes to the same bits."""
    told, tell = os.pipe()

    def work() -> list[object]:
        model, merged = Waits(), Merged()
        before = structure(model)
        model.tell, model.where = tell, where
        lora = LoRA(rank=2, log_memory=False, **CONFIGS[name][0])
        writer = ModelCheckpoint(folder, filename="regular", every_n_train_steps=6)
        run = trainer(folder, merged, lora, OnExceptionCheckpoint(folder), writer, max_steps=16, max_epochs=9, **EVERY)
        try:
            run.fit(model, same_batches(), same_batches())
        except BaseException as error:
            after = structure(model)
            for found in (before, after):
                found["attributes"][""] = []
            return [type(error).__name__, after == before, digest(model.state_dict()) == merged.weights]
        return []

    process, out = forked(work)
    os.close(tell)
    os.read(told, 1)
    os.close(told)
    os.kill(process, number)
    with open(out) as file:
        outcome = json.loads(file.read())
    os.waitpid(process, 0)
    return outcome


EVERY = {"val_check_interval": 3, "limit_val_batches": 1}


def steps(name: str, folder: Path, ckpt_path: Path | None = None) -> str:
    ended = Digest()
    run = trainer(folder, LoRA(rank=2, **CONFIGS[name][0]), ended, max_steps=16, max_epochs=9, **EVERY)
    run.fit(Net(), same_batches(), same_batches(), ckpt_path=ckpt_path)
    return digest([ended.module, ended.optimizers, ended.steps])


class Merged(Callback):
    """What the weights come to when an exception is raised, if adapters are folded in."""

    weights = ""

    def on_exception(self, trainer, pl_module, exception) -> None:
        state = {key: value.clone() for key, value in pl_module.state_dict().items() if ".lora." not in key}
        frozen = dict(pl_module.named_parameters())
        for name, adapter in adapters(pl_module).items():
            if not adapter.holds:
                state[f"{name}.weight"] = adapter.folded_into(frozen[f"{name}.weight"])
        self.weights = digest(state)


def interrupt(folder: Path) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background is started without
    report = {}
    for name in list(CONFIGS)[:3]:
        expected = result(lambda name=name: steps(name, folder / "whole"))
        for number in (signal.SIGINT, signal.SIGTERM):
            for where in ("training", "validation", "saving"):
                place = folder / f"{len(report)}"
                outcome = interrupted(name, place, number, where)
                file = place / "on_exception.ckpt"
                resumed = result(lambda name=name, place=place, file=file: steps(name, place, file))
                report[f"{name}: {number.name} while {where}"] = [*outcome, resumed == expected]
    print(json.dumps(report))


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if sys.argv[1] == "kill":
        main(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
    else:
        interrupt(Path(sys.argv[2]))
