"""Where Lightning's own order of things breaks a callback that does not know it; each by a run that would fail."""

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import SingleDeviceStrategy
from models import Digest, Net, ResumableLoader, data, digest, layers, structure, trained_state, trainer
from resume import RESUMED, Run, SaveByHand

from lightning_lora import LoRA, adapters, inject


class State(Callback):
    """The module's state when training starts and when it ends."""

    def on_train_start(self, trainer, pl_module) -> None:
        self.start = {key: value.clone() for key, value in trained_state(pl_module).items()}

    def on_train_end(self, trainer, pl_module) -> None:
        self.end = {key: value.clone() for key, value in trained_state(pl_module).items()}
        self.dtypes = {name: {p.dtype for p in a.parameters()} for name, a in adapters(pl_module).items()}
        self.state_dtypes = {
            value.dtype
            for optimizer in trainer.optimizers
            for state in optimizer.state.values()
            for key, value in state.items()
            if key != "step"
        }


@pytest.mark.parametrize("made_in", ["setup", "configure_model"])
def test_1_layers_that_do_not_exist_in_the_callbacks_setup_are_adapted(made_in, tmp_path):
    model, state = Net(made_in=made_in), State()
    assert not hasattr(model, "layers")
    trainer(tmp_path, LoRA(rank=2), state).fit(model, data())
    assert "layers.0.lora.A" in state.end


def test_2_weights_only_for_which_lightning_calls_no_callback_are_merged_and_merged_once(tmp_path):
    state = State()
    only = ModelCheckpoint(tmp_path, filename="only", save_weights_only=True)
    trainer(tmp_path, LoRA(rank=2), state, SaveByHand(tmp_path / "full.ckpt"), only).fit(Net(), data())
    only, full = (torch.load(tmp_path / f"{name}.ckpt", weights_only=True) for name in ("only", "full"))
    assert "callbacks" not in only
    assert digest(only["state_dict"]) == digest(full["state_dict"])
    assert not any("lora" in key for key in only["state_dict"])
    A, B = (state.end[f"layers.0.lora.{factor}"] for factor in "AB")
    torch.testing.assert_close(only["state_dict"]["layers.0.weight"], layers()[0].weight + B.T @ A)


def test_3_a_file_without_callbacks_restores_the_adapters_of_an_injected_module(tmp_path):
    state = State()
    writer = ModelCheckpoint(tmp_path, filename="saved", save_weights_only=True)
    trainer(tmp_path, LoRA(rank=2), state, writer).fit(Net(), data())
    model = Net()
    inject(model, rank=2)
    trainer(tmp_path, LoRA(rank=2)).validate(model, data(), ckpt_path=tmp_path / "saved.ckpt", verbose=False)
    assert digest(dict(sorted(trained_state(model).items()))) == digest(dict(sorted(state.end.items())))


class RestoresLate(SingleDeviceStrategy):
    """Loads checkpoints when the module is on its device, as strategies that shard do."""

    restore_checkpoint_after_setup = True


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
@pytest.mark.parametrize("form", ["merged", "adapter"])
def test_4_a_strategy_that_restores_after_setup_resumes_to_the_same_bits(form, precision, tmp_path):
    run = Run("by_hand", {"checkpoint": form}, {"precision": precision})
    file, late = run.saved(tmp_path), Digest()
    strategy = RestoresLate(accelerator=None, device=torch.device("cpu"))
    resumed = trainer(tmp_path, run.callback(), late, max_epochs=2, strategy=strategy, **run.options)
    resumed.fit(Net(), ResumableLoader(), ckpt_path=file)
    expected = run.uninterrupted(tmp_path)
    assert (late.module, late.optimizers) == (expected.module, expected.optimizers)


class Adapted(Callback):
    """How many adapters the module has in each loop."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}

    def on_train_start(self, trainer, pl_module) -> None:
        self.counts["fit"] = len(adapters(pl_module))

    def on_validation_start(self, trainer, pl_module) -> None:
        self.counts.setdefault("validate", len(adapters(pl_module)))

    def on_test_start(self, trainer, pl_module) -> None:
        self.counts["test"] = len(adapters(pl_module))

    def on_predict_start(self, trainer, pl_module) -> None:
        self.counts["predict"] = len(adapters(pl_module))


def test_5_setup_is_called_for_every_stage_and_again_for_a_second_fit_and_injects_for_fit_alone(tmp_path):
    model, lora, adapted = Net(), LoRA(rank=2), Adapted()
    before = structure(model)
    for function in ("validate", "fit", "test", "fit", "predict"):
        run = getattr(trainer(tmp_path, lora, adapted), function)
        run(model, data(), **({"verbose": False} if function in ("validate", "test") else {}))
        assert structure(model) == before
    assert adapted.counts == {"validate": 0, "fit": 3, "test": 0, "predict": 0}


class TogglesAndSaves(Net):
    """Two optimizers, toggled in automatic turns, and a checkpoint after every batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx) -> None:
        for optimizer in self.optimizers():
            self.toggle_optimizer(optimizer)
            assert not self.layers[0]._parameters["weight"].requires_grad
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()
            self.untoggle_optimizer(optimizer)
            assert not self.layers[0]._parameters["weight"].requires_grad

    def configure_optimizers(self):
        first, *others = self.layers.children()
        rest = [p for layer in others for p in layer.parameters()]
        return torch.optim.AdamW(first.parameters()), torch.optim.AdamW(rest)


def test_9_toggling_optimizers_never_thaws_a_frozen_weight(tmp_path):
    state = State()
    trainer(tmp_path, LoRA(rank=2), state).fit(TogglesAndSaves(), data())
    assert torch.equal(state.end["layers.0.weight"], layers()[0].weight)
    assert all(state.end[f"layers.{i}.lora.B"].any() for i in (0, 3, 5))


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_10_a_step_that_is_skipped_changes_nothing_and_accumulated_batches_make_one_step(tmp_path):
    class Skips(Net):
        """Gives no loss in the second half, so that Lightning skips the steps."""

        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) if batch_idx < 4 else None

    halves, accumulated = State(), State()
    run = trainer(tmp_path, LoRA(rank=2), halves, limit_train_batches=4)
    run.fit(Net(), data())
    skipped = State()
    trainer(tmp_path, LoRA(rank=2), skipped).fit(Skips(), data())
    factors = [key for key in halves.end if "lora" in key]
    assert digest([skipped.end[key] for key in factors]) == digest([halves.end[key] for key in factors])
    run = trainer(tmp_path, LoRA(rank=2), accumulated, accumulate_grad_batches=4)
    run.fit(Net(), data())
    assert run.global_step == 2


def test_12_a_run_without_logger_bar_summary_or_checkpoints_works_and_says_nothing(tmp_path, capsys, caplog):
    trainer(tmp_path, LoRA(rank=2), barebones=True, logger=None, log_every_n_steps=0).fit(Silent(), data())
    assert "Adapted modules" not in capsys.readouterr().out + caplog.text


class Silent(Net):
    """Logs nothing, which a barebones Trainer asks for."""

    def training_step(self, batch, batch_idx):
        return self.loss(batch)


def test_17_adapters_start_the_same_whatever_was_drawn_before_and_draw_nothing_themselves(tmp_path):
    class LastDraw(State):
        def on_train_start(self, trainer, pl_module) -> None:
            super().on_train_start(trainer, pl_module)
            self.drawn = torch.rand(1).item()

    runs, plain = [LastDraw(), LastDraw()], LastDraw()
    for state, seed in zip(runs, (1, 2), strict=True):
        torch.manual_seed(seed)
        trainer(tmp_path, LoRA(rank=2), state).fit(Net(), data())
    assert digest(runs[0].start) == digest(runs[1].start)
    assert not torch.equal(runs[0].start["layers.0.lora.A"][:, :8], runs[0].start["layers.3.lora.A"][:, :8])
    torch.manual_seed(1)
    trainer(tmp_path, plain).fit(Net(), data())
    assert plain.drawn == runs[0].drawn
    other = State()
    trainer(tmp_path, LoRA(rank=2, seed=1), other).fit(Net(), data())
    assert not torch.equal(other.start["layers.0.lora.A"], runs[0].start["layers.0.lora.A"])


def test_17_the_file_of_a_run_resumes_after_other_draws_from_the_global_generator(tmp_path):
    run = RESUMED["merged-epoch"]
    expected = run.uninterrupted(tmp_path)
    trainer(tmp_path, run.callback(), SaveByHand(tmp_path / "a.ckpt")).fit(Net(), ResumableLoader())
    torch.manual_seed(99)
    assert run.resumed(tmp_path, tmp_path / "a.ckpt").module == expected.module
