"""Projections drawn anew in real runs: once for each step, and in a run that resumes as in one that was not stopped."""

import dataclasses
import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from models import (
    Digest,
    Net,
    ResumableLoader,
    TwoOptimizersNet,
    data,
    digest,
    trainer,
)
from pairs import pairs
from test_bad_input import refused
from test_checkpoint import printed_by_a_new_process, read
from zoo import TIED, ZOO, TiedNet, Zoo

from lightning_lora import LoRA, adapters

HERE = Path(__file__).parent
FORMS = ["both", "A"]
HOLDING = ["merged", "projected"]
PRECISIONS = ["32-true", "bf16-true", "bf16-mixed"]

OPTIMIZERS = {
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "fused": lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.02),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.005),
    "LBFGS": lambda p: torch.optim.LBFGS(p, max_iter=3),
}
TARGETS = {Zoo: ZOO, TiedNet: TIED}


def with_optimizer(model: type[Net], optimizer: str, **kwargs) -> Net:
    """A model with an optimizer that does not shrink what it has not trained."""
    made = model(**kwargs)
    made.configure_optimizers = lambda: OPTIMIZERS[optimizer](made.parameters())  # type: ignore[method-assign]
    return made


class TwoNet(TwoOptimizersNet):
    """Without decay."""

    def configure_optimizers(self):
        optimizers = super().configure_optimizers()
        optimizers[0].param_groups[0]["weight_decay"] = 0.0
        return optimizers


def lora(model=Net, k=1, resample="both", gradient="merged", **options):
    return LoRA(
        **{
            "rank": 2,
            "alpha": 3,
            "gradient": gradient,
            "resample_every_n_steps": k,
            "resample": resample,
            **TARGETS.get(model, {}),
            **options,
        }
    )


class Draws(Callback):
    """After each batch: the steps that were counted, and that of the last draw."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.at: list[int] = []
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        counts = {(adapter.steps, adapter.drawn_at) for adapter in adapters(pl_module).values()}
        ((steps, drawn_at),) = counts
        self.steps.append(steps)
        self.at.append(drawn_at)
        self.losses.append(outputs["loss"].item() if outputs else math.nan)


# ------------------------------------------------------------------------------------------------ saved and resumed


class Saves(Callback):
    """Writes a file after each of some steps."""

    def __init__(self, folder: Path, steps: tuple[int, ...]) -> None:
        self.folder, self.steps = folder, steps

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if trainer.global_step in self.steps and (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")


class Ends(Digest):
    """And the counts of every adapter, as they stand when the run ends."""

    def on_train_end(self, trainer, pl_module) -> None:
        super().on_train_end(trainer, pl_module)
        self.counts = [[adapter.steps, adapter.drawn_at] for adapter in adapters(pl_module).values()]


@dataclasses.dataclass(frozen=True)
class Run:
    """12 steps, saved after some of them."""

    model: type[LightningModule] = Net
    lora: dict = dataclasses.field(default_factory=dict)
    options: dict = dataclasses.field(default_factory=dict)
    optimizer: str | None = "Adam"
    steps: tuple[int, ...] = (3, 4)

    def module(self) -> LightningModule:
        return self.model() if self.optimizer is None else with_optimizer(self.model, self.optimizer)

    def fit(self, folder: Path, *callbacks: Callback, file: Path | None = None) -> list:
        """What the run ends with."""
        ends = Ends()
        run = trainer(
            folder, lora(self.model, **self.lora), ends, *callbacks, **{"max_steps": 12, "max_epochs": 9} | self.options
        )
        run.fit(self.module(), ResumableLoader(), ckpt_path=file)
        return [ends.module, ends.optimizers, ends.steps, ends.counts]


RESUMED = {
    # after step 3 there was a draw, after step 4 none, or one if there is one after each
    **{
        "-".join(map(str, (resample, k, gradient, precision, optimizer))): Run(
            lora={"k": k, "resample": resample, "gradient": gradient},
            options={"precision": precision},
            optimizer=optimizer,
            steps=(3,) if k == 1 else (3, 4),
        )
        for resample, k, gradient, precision, optimizer in pairs(
            FORMS, (1, 3), HOLDING, PRECISIONS, ("Adam", "momentum", "fused")
        )
    },
    **{
        f"zoo-{resample}-{gradient}-{precision}": Run(
            Zoo,
            {"k": 3, "resample": resample, "gradient": gradient},
            {"precision": precision, "max_steps": 7},
            steps=(3 + (precision == "bf16-true"),),
        )
        for resample, gradient, precision in pairs(FORMS, HOLDING, PRECISIONS)
    },
    **{
        f"tied-{resample}-{precision}": Run(
            TiedNet, {"k": 3, "resample": resample, "gradient": "projected"}, {"precision": precision}
        )
        for resample, precision in zip(FORMS, PRECISIONS, strict=False)
    },
    **{
        f"{resample}-{moments}-{optimizer}": Run(
            lora={"k": 3, "resample": resample, "resample_moments": moments}, optimizer=optimizer
        )
        for resample, moments, optimizer in (
            ("both", "keep", "Adam"),
            ("A", "keep", "momentum"),
            ("both", "reset", "Adagrad"),
            ("A", "reset", "RMSprop"),
        )
    },
    **{
        f"{resample}-accumulated-clipped": Run(
            lora={"k": 3, "resample": resample, "modules_to_save": ["layers.1"], "bias": "all"},
            options={"accumulate_grad_batches": 2, "gradient_clip_val": 0.1},
        )
        for resample in FORMS
    },
    **{
        f"{resample}-two-optimizers": Run(
            TwoNet, {"k": 3, "resample": resample}, {"max_steps": 24}, None, steps=(6, 8, 16)
        )
        for resample in FORMS
    },
    "A-bfloat16-adapters": Run(lora={"k": 3, "resample": "A", "adapter_dtype": "bfloat16"}),
}
IN_A_NEW_PROCESS = list(RESUMED)[::5]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def uninterrupted(folder):
    """What a run ends with, and where its files lie; each runs once."""
    done: dict[str, list] = {}

    def run(name: str):
        if name not in done:
            (folder / name).mkdir()
            done[name] = RESUMED[name].fit(folder, Saves(folder / name, RESUMED[name].steps))
        return done[name], [folder / name / f"{step}.ckpt" for step in RESUMED[name].steps]

    return run


@pytest.mark.parametrize("name", RESUMED)
def test_a_run_resumes_to_the_same_bits_at_a_draw_and_between_draws(name, uninterrupted, folder):
    expected, files = uninterrupted(name)
    assert all(steps > 0 and drawn_at > 0 for steps, drawn_at in expected[-1])
    for file in files:
        assert RESUMED[name].fit(folder, file=file) == expected


def resume_all(folder: Path) -> None:
    """Prints, as JSON, what the runs end with."""
    results = {
        name: [RESUMED[name].fit(folder, file=folder / name / f"{step}.ckpt") for step in RESUMED[name].steps]
        for name in IN_A_NEW_PROCESS
    }
    print(json.dumps(results))


def test_a_new_process_resumes_to_the_same_bits(uninterrupted, folder):
    expected = {name: uninterrupted(name)[0] for name in IN_A_NEW_PROCESS}
    code = "import pathlib, sys, test_resample_in_lightning as t; t.resume_all(pathlib.Path(sys.argv[1]))"
    results = json.loads(printed_by_a_new_process("-W", "ignore", "-c", code, str(folder))[-1])
    for name in IN_A_NEW_PROCESS:
        assert results[name] == [expected[name]] * len(RESUMED[name].steps)


def leaves(value):
    if isinstance(value, dict):
        return [leaf for item in value.values() for leaf in leaves(item)]
    return [leaf for item in value for leaf in leaves(item)] if isinstance(value, list) else [value]


@pytest.mark.parametrize("name", RESUMED)
def test_a_file_is_that_of_the_plain_model_and_has_no_a_that_can_be_drawn_again(name, uninterrupted):
    run = RESUMED[name]
    plain = run.module()
    plain.to({"bf16-true": torch.bfloat16}.get(run.options.get("precision"), torch.float32))
    for file in uninterrupted(name)[1]:
        checkpoint = read(file)  # with `weights_only=True`
        state, payload = checkpoint["state_dict"], checkpoint["lightning_lora"]
        plain.load_state_dict(state, strict=True)
        expected = [(key, value.shape, value.dtype) for key, value in plain.state_dict().items()]
        assert [(key, value.shape, value.dtype) for key, value in state.items()] == expected
        assert all(isinstance(leaf, torch.Tensor | int | float | str | None) for leaf in leaves(payload))
        assert payload["base"] == {}
        resample = run.lora["resample"]
        for entry in payload["adapters"].values():
            assert entry["resample"] == resample
            assert ("A" in entry) == (resample == "both")
            assert {key for key, value in entry.items() if isinstance(value, torch.Tensor)} <= {"A", "B"}
            assert entry["steps"] > 0


@pytest.mark.parametrize("resample", FORMS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_file_saved_after_fit_goes_on_with_the_same_bits(precision, resample, tmp_path):
    run = Run(lora={"k": 3, "resample": resample}, options={"precision": precision})
    expected = run.fit(tmp_path)
    first = trainer(tmp_path, lora(k=3, resample=resample), precision=precision)
    first.fit(run.module(), ResumableLoader())
    first.save_checkpoint(tmp_path / "after.ckpt")
    assert run.fit(tmp_path, file=tmp_path / "after.ckpt") == expected


# ------------------------------------------------------------------------------------------------ one count a step


class ByHand(Net):
    """Manual optimization, with a step after every second batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.manual_backward(loss / 2)
        if batch_idx % 2 == 1:
            self.optimizers().step()
            self.optimizers().zero_grad()
        return loss


@pytest.mark.parametrize(
    ("model", "options", "steps"),
    [
        (Net, {}, [1, 2, 3, 4, 5, 6, 7, 8]),
        (Net, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}, [0, 1, 1, 2, 2, 3, 3, 4]),
        (Net, {"accumulate_grad_batches": 3}, [0, 0, 1, 1, 1, 2, 2, 3]),
        (Zoo, {"accumulate_grad_batches": 2}, [0, 1, 1, 2, 2, 3, 3, 4]),
        (ByHand, {}, [0, 1, 1, 2, 2, 3, 3, 4]),
    ],
)
@pytest.mark.parametrize(("k", "resample"), [(1, "both"), (2, "A")])
def test_draws_follow_the_steps_of_the_optimizer(k, resample, model, options, steps, tmp_path):
    draws = Draws()
    trainer(tmp_path, lora(model, k, resample), draws, **options).fit(with_optimizer(model, "SGD"), data())
    assert draws.steps == steps
    assert draws.at == [step - step % k for step in steps]


@pytest.mark.parametrize("resample", FORMS)
def test_a_second_fit_goes_on_from_the_merged_weights_and_draws_from_the_beginning(resample, tmp_path):
    """A second ``fit`` that is not given a file is a run of its own: its draws are those of its own steps."""
    callback, model, ends = lora(k=3, resample=resample), with_optimizer(Net, "Adam"), Ends()
    trainer(tmp_path, callback).fit(model, data())
    middle = digest(model.state_dict())
    trainer(tmp_path, callback, ends).fit(model, data(1))
    again, ends_again = with_optimizer(Net, "Adam"), Ends()
    trainer(tmp_path, lora(k=3, resample=resample)).fit(again, data())
    assert digest(again.state_dict()) == middle
    trainer(tmp_path, lora(k=3, resample=resample), ends_again).fit(again, data(1))
    assert (ends.module, ends.optimizers, ends.counts) == (ends_again.module, ends_again.optimizers, ends_again.counts)
    assert {tuple(count) for count in ends.counts} == {(8, 6)}


# ------------------------------------------------------------------------------------------------ the same in any loop


@pytest.mark.parametrize("resample", FORMS)
@pytest.mark.parametrize(
    "model",
    [
        Net,
        Zoo,
    ],
)
def test_merged_and_projected_give_the_same_losses_through_draws(model, resample, tmp_path):
    runs = []
    for gradient in HOLDING:
        draws = Draws()
        callback = lora(model, 3, resample, gradient, adapter_dtype="float64")
        options = {"precision": "64-true", "gradient_clip_val": 0.05, "max_epochs": 2}
        trainer(tmp_path, callback, draws, **options).fit(with_optimizer(model, "momentum"), data())
        runs.append(draws.losses)
    assert len(runs[0]) == 16
    assert runs[0] == pytest.approx(runs[1], rel=1e-9)


# ------------------------------------------------------------------------------------------------ refused by name


def test_files_of_adapters_only_are_refused(tmp_path):
    refused(tmp_path, Net(), lora(checkpoint="adapter"), match=["checkpoint='adapter'", "gradient='factored'"])


OTHERS = {
    "both": {"resample_every_n_steps": 1, "resample": "both"},
    "A": {"resample_every_n_steps": 1, "resample": "A"},
    "None": {"resample_every_n_steps": None, "resample": "both"},
}


@pytest.mark.parametrize(("saved", "resumed"), list(itertools.permutations(OTHERS, 2)))
def test_a_file_of_another_form_is_refused(saved, resumed, tmp_path):
    run = trainer(tmp_path, lora(**OTHERS[saved]), Saves(tmp_path, (3,)))
    run.fit(with_optimizer(Net, "SGD"), ResumableLoader())
    refused(
        tmp_path,
        with_optimizer(Net, "SGD"),
        lora(**OTHERS[resumed]),
        match=["'layers.0'", f"resample {saved} in the checkpoint and {resumed} in this run"],
        ckpt_path=tmp_path / "3.ckpt",
    )


def test_a_file_without_draws_is_refused_in_factored_mode_too(tmp_path):
    trainer(tmp_path, lora(), Saves(tmp_path, (3,))).fit(with_optimizer(Net, "SGD"), ResumableLoader())
    refused(tmp_path, Net(), LoRA(rank=2, alpha=3), match=["'layers.0'", "resample"], ckpt_path=tmp_path / "3.ckpt")


def test_another_seed_is_refused_where_the_file_has_no_a(tmp_path):
    run = trainer(tmp_path, lora(k=3, resample="A"), Saves(tmp_path, (4,)))
    run.fit(with_optimizer(Net, "Adam"), ResumableLoader())
    callback = lora(k=3, resample="A", seed=1)
    refused(tmp_path, with_optimizer(Net, "Adam"), callback, match=["seed"], ckpt_path=tmp_path / "4.ckpt")
