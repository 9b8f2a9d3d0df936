"""Runs that are killed while they save, each a fork of this process; then what is left is loaded, and resumed.

As a program: ``killed.py FOLDER TRIALS SEED``, which prints JSON. Everything is imported once; nothing here may run a
backward before the forks, which would not survive it.
"""

import contextlib
import json
import os
import random
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from models import Digest, Net, ResumableLoader, digest, trainer

from lightning_lora import LoRA

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
            if state not in resumed:
                resumed[state] = result(lambda name=name, file=file: fit(name, file.parent, ckpt_path=file))
        shutil.rmtree(place)
    same = [value == expected[name] for (name, _), value in resumed.items()]
    print(json.dumps({"left": left, "resumed": same, "broken": broken}))


def refusal_of(name: str, file: Path) -> str:
    return str(result(lambda: refusal(name, file)))


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
