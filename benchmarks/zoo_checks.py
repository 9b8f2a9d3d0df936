"""Runs one row of the zoo and checks it; ``zoo.py`` starts this in a process of the library's own environment."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import importlib
import importlib.metadata
import json
import pickle
import random
import re
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from zoo_rows import ROWS, Row

EPOCHS = 2


def seed_all(seed: int) -> None:
    """Seed every generator that a library may draw from."""
    random.seed(seed)
    numpy.random.seed(seed)  # noqa: NPY002
    torch.manual_seed(seed)


def tensors(output: Any) -> Iterator[Tensor]:
    """Yield the floating-point tensors in what a model returns."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output.detach().clone()
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from tensors(value)
    elif isinstance(output, (list, tuple)):
        for value in output:
            yield from tensors(value)
    elif dataclasses.is_dataclass(output):
        yield from tensors([getattr(output, field.name) for field in dataclasses.fields(output)])


@torch.no_grad()
def output_of(module: nn.Module, inputs: tuple[tuple[Any, ...], dict[str, Any]]) -> list[Tensor]:
    """Return what ``module`` computes in evaluation mode."""
    modes = {child: child.training for child in module.modules()}
    module.eval()
    seed_all(0)
    args, kwargs = copy.deepcopy(inputs)
    try:
        return list(tensors(module(*args, **kwargs)))
    finally:
        for child, mode in modes.items():
            child.training = mode


def distance(one: list[Tensor], other: list[Tensor]) -> float:
    """Return the largest difference of two entries."""
    assert len(one) == len(other) > 0, f"{len(one)} outputs and {len(other)}"
    return max((a - b).abs().max().item() for a, b in zip(one, other, strict=True))


class Probe:
    """A callback that records a run. It draws no random numbers but seeds all generators before every batch.

    Args:
        folder: Where the checkpoints go: ``half.ckpt`` after the first epoch, ``end.ckpt`` at the end of training.
        at_start: Called with the module when training starts.
        at_end: Called with the module, still adapted, and its last inputs, before training ends.
        first_epoch: The epoch with which training starts.
    """

    def __init__(
        self,
        folder: Path | None = None,
        at_start: Callable[[nn.Module], None] = lambda module: None,
        at_end: Callable[[nn.Module, Any], None] = lambda module, inputs: None,
        first_epoch: int = 0,
    ) -> None:
        self.folder, self.at_start, self.at_end, self.first_epoch = folder, at_start, at_end, first_epoch
        self.losses: list[float] = []
        self.global_step = 0
        self.module: Any = None
        self.inputs: Any = None

    def __deepcopy__(self, _: Any) -> Probe:
        """Stay the same object where a library copies its Trainer's arguments."""
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Leave everything out where a library writes its Trainer's arguments to a file."""
        return {}

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        seed_all(1000 + self.first_epoch)  # of what is drawn when the first epoch's batches are made

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.module = pl_module
        self.at_start(pl_module)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        seed_all(trainer.global_step)
        hook = pl_module.register_forward_pre_hook(self._record, with_kwargs=True)
        self._hook = hook

    def _record(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.inputs = copy.deepcopy((args, kwargs))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
        self._hook.remove()
        del self._hook
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor):
            self.losses.append(loss.item())

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        seed_all(1001 + trainer.current_epoch)  # and the next epoch's
        if self.folder is not None and trainer.current_epoch == 0:
            trainer.save_checkpoint(self.folder / "half.ckpt")

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.global_step = trainer.global_step
        if self.folder is not None:
            trainer.save_checkpoint(self.folder / "end.ckpt")
        self.at_end(pl_module, self.inputs)


def run(row: Row, probe: Probe, *callbacks: Any, file: Path | None = None, **arguments: Any) -> Probe:
    """Fit a row once."""
    kind: Any = importlib.import_module(row.namespace).Callback
    probe.__class__ = type("Probe", (Probe, kind), {"__module__": __name__})
    seed_all(0)
    given = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": EPOCHS,
        "callbacks": [probe, *callbacks],
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "num_sanity_val_steps": 0,
        **arguments,
    }
    row.fit(given, None if file is None else str(file))
    return probe


class Checks:
    """What was found of one row: name of a check -> what the table says."""

    def __init__(self) -> None:
        self.found: dict[str, dict[str, Any]] = {}

    @contextmanager
    def check(self, name: str) -> Iterator[dict[str, Any]]:
        """Note what is put into the dictionary, and the error if one is raised."""
        entry = self.found[name] = {"ok": True}
        try:
            yield entry
        except Exception as error:
            lines = re.sub(r"\x1b\[\d*m", "", str(error)).strip().splitlines() or [""]
            entry |= {"ok": False, "error": f"{type(error).__name__}: {lines[0]}"}
            entry["traceback"] = traceback.format_exc()


class Watch:
    """Looks at an adapted module when training starts and before it ends."""

    def __init__(self, checks: Checks, name: str) -> None:
        self.checks, self.name = checks, name
        self.outputs: list[Tensor] = []

    def at_start(self, module: nn.Module) -> None:
        from lightning_lora import adapters
        from lightning_lora.injection.inject import injections, places
        from lightning_lora.injection.targets import summary

        self.before = {place.key: (place.weight, place.weight.detach().clone()) for place in places(module)}
        if self.name == "factored":
            left_out = [layer for injection in injections(module) for layer in injection.left_out]
            self.checks.found["adapters"] = {
                "ok": bool(self.before),
                "text": str(len(adapters(module))),
                "left_out": summary(left_out),
                "names": list(adapters(module)),
            }

    def at_end(self, module: nn.Module, inputs: Any) -> None:
        from lightning_lora import disabled, merged

        if self.name == "factored":
            with self.checks.check("W0"):
                moved = [name for name, (weight, bits) in self.before.items() if not torch.equal(weight, bits)]
                assert not moved, f"{len(moved)} of {len(self.before)} moved: {', '.join(moved[:3])}"
        with self.checks.check(f"{self.name} output") as entry:
            self.outputs = output_of(module, inputs)
            with merged(module):
                difference = distance(self.outputs, output_of(module, inputs))
            with disabled(module):
                change = distance(self.outputs, output_of(module, inputs))
            entry["text"] = f"{difference:.0e} of {change:.0e}"
            assert difference <= 0.01 * change, f"differs by {difference:.1e} where training changed {change:.1e}"


def same_state(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    """Raise unless both hold the same bits."""
    assert list(one) == list(other), f"keys differ: {sorted(set(one) ^ set(other))[:3]}"
    differ = [key for key in one if isinstance(one[key], Tensor) and not torch.equal(one[key], other[key])]
    gap = max((distance([one[key].double()], [other[key].double()]) for key in differ), default=0.0)
    assert not differ, f"{len(differ)} of {len(one)} weights differ, by up to {gap:.1e}: {', '.join(differ[:2])}"


def close_losses(one: list[float], other: list[float], bound: float) -> None:
    """Raise unless two runs had the same losses to ``bound``, relative to the largest."""
    assert len(one) == len(other) > 0, f"{len(one)} losses and {len(other)}"
    gap = max(abs(a - b) for a, b in zip(one, other, strict=True)) / max(map(abs, one))
    assert gap <= bound, f"losses differ by {gap:.1e}"


def resumes_without_us(row: Row, folder: Path) -> bool:
    """Return whether a run of the library alone, resumed like this one, ends with the bits of an uninterrupted one."""
    ends = []
    for name, first_epoch, file in (("alone", 0, None), ("alone-resumed", 1, folder / "alone" / "half.ckpt")):
        (folder / name).mkdir()
        run(row, Probe(folder / name, first_epoch=first_epoch), file=file)
        ends.append(torch.load(folder / name / "end.ckpt", weights_only=False)["state_dict"])
    try:
        same_state(*ends)
    except AssertionError:
        return False
    return True


def check_row(name: str, folder: Path) -> dict[str, Any]:
    """Run all checks of one row."""
    from lightning_lora import LoRA

    row, checks = ROWS[name], Checks()
    state = {"version": "", "checks": checks.found}

    def trained(gradient: str, into: Path | None = None) -> tuple[Probe, list[Tensor]]:
        watch = Watch(checks, gradient)
        options = {} if gradient == "factored" else {"gradient": gradient}
        return run(row, Probe(into, watch.at_start, watch.at_end), LoRA(**options)), watch.outputs

    whole, outputs, gradient = None, [], "factored"
    with checks.check("fit") as entry:
        whole, outputs = trained(gradient, folder)
        entry |= {"text": f"{whole.global_step} steps", "losses": whole.losses}
    if whole is None and "gradient='merged'" in checks.found["fit"]["error"]:  # the run says what to use
        with checks.check("fit with merged"):
            gradient = "merged"
            whole, outputs = trained(gradient, folder)
    if whole is None:
        return state
    with checks.check("file"):
        state_dict = torch.load(folder / "end.ckpt", weights_only=False)["state_dict"]
        same_state(whole.module.state_dict(), state_dict)
        torch.save({"inputs": whole.inputs, "outputs": outputs, "losses": whole.losses}, folder / "run.pt")
        plain = [sys.executable, __file__, name, "--folder", str(folder), "--plain"]
        result = subprocess.run(plain, capture_output=True, text=True, check=False)
        assert result.returncode == 0, (result.stderr.strip().splitlines() or ["killed"])[-1]
        checks.found["file"] |= json.loads((folder / "plain.json").read_text())
    with checks.check("resume"):
        (folder / "resumed").mkdir()
        resumed = run(row, Probe(folder / "resumed", first_epoch=1), LoRA(gradient=gradient), file=folder / "half.ckpt")
        assert resumed.global_step == whole.global_step, f"ended at step {resumed.global_step} of {whole.global_step}"
        assert len(resumed.losses) < len(whole.losses), "it began anew"
        try:
            same_state(state_dict, torch.load(folder / "resumed" / "end.ckpt", weights_only=False)["state_dict"])
        except AssertionError:
            if resumes_without_us(row, folder):
                raise
            checks.found["resume"]["text"] = "as without LoRA, to other bits"
    for gradient in ("merged", "projected"):
        with checks.check(gradient):
            again, _ = trained(gradient)
            output = checks.found.pop(f"{gradient} output")
            assert output["ok"], output["error"]
            checks.found[gradient]["text"] = output["text"]
            close_losses(whole.losses, again.losses, 1e-3)
    return state


def loads_safely(file: Path) -> bool:
    """Return whether ``weights_only=True`` loads ``file``."""
    try:
        torch.load(file, weights_only=True)
    except pickle.UnpicklingError:
        return False
    return True


def check_plain(name: str, folder: Path) -> None:
    """Load the file of a run into the plain model, in a process that knows nothing of this library."""
    row = ROWS[name]
    seen = torch.load(folder / "run.pt", weights_only=False)
    (folder / "plain").mkdir()
    probe = run(row, Probe(folder / "plain"))
    pickled = not loads_safely(folder / "plain" / "end.ckpt")  # the library's own objects, in files of plain runs too
    state = torch.load(folder / "end.ckpt", weights_only=not pickled)["state_dict"]
    close_losses(probe.losses[:1], seen["losses"][:1], 1e-5)
    module = probe.module
    module.load_state_dict(state, strict=True)
    scale = max(out.abs().max().item() for out in seen["outputs"])
    gap = distance(output_of(module, seen["inputs"]), seen["outputs"])
    assert gap <= 1e-4 * scale, f"the plain model's output differs by {gap:.1e} of {scale:.1e}"
    assert not any(key.partition(".")[0] == "lightning_lora" for key in sys.modules), "lightning_lora was imported"
    (folder / "plain.json").write_text(json.dumps({"pickled": pickled}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("row", choices=ROWS)
    parser.add_argument("--folder", type=Path, required=True, help="an empty folder for this row's files")
    parser.add_argument("--plain", action="store_true", help="only load the file that is there, without this library")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if args.plain:
        check_plain(args.row, args.folder)
        return
    state = check_row(args.row, args.folder)
    requirement = re.split(r"[^\w.-]", ROWS[args.row].library)[0]
    state["version"] = importlib.metadata.version(requirement)
    (args.folder / "row.json").write_text(json.dumps(state, indent=1))


if __name__ == "__main__":
    main()
