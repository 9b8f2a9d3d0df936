"""What a run with the callback does: it starts at the base, trains adapters alone, and leaves a plain module behind."""

import logging

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import LearningRateFinder, ModelSummary
from lightning.pytorch.strategies import SingleDeviceStrategy
from models import (
    Net,
    ResumableLoader,
    TwoOptimizersNet,
    batches,
    data,
    digest,
    layers,
    structure,
    trainer,
)
from torch import nn

from lightning_lora import LoRA, adapters, inject


class Watch(Callback):
    """What a user could see of the module while it is trained."""

    def on_train_start(self, trainer, pl_module) -> None:
        pl_module.eval()
        self.first_output = pl_module(batches()[0][0].to(pl_module.layers[0].weight.dtype)).detach()
        pl_module.train()
        self.initial = {name: (a.A.detach().clone(), a.B.detach().clone()) for name, a in adapters(pl_module).items()}
        self.trainable = {name for name, p in pl_module.named_parameters() if p.requires_grad}

    def on_train_end(self, trainer, pl_module) -> None:
        named = dict(pl_module.named_parameters())
        self.W0 = {f"{name}.weight": named[f"{name}.weight"].clone() for name in adapters(pl_module)}
        self.frozen = {name: p.clone() for name, p in pl_module.named_parameters() if not p.requires_grad}
        self.factors = {name: (a.A.detach().clone(), a.B.detach().clone()) for name, a in adapters(pl_module).items()}
        self.dtypes = {p.dtype for a in adapters(pl_module).values() for p in a.parameters()}
        names = {p: name for name, p in pl_module.named_parameters()}
        self.in_optimizers = {names[p] for optimizer in trainer.optimizers for p in optimizer.state}
        self.gradients = {name for name, p in pl_module.named_parameters() if p.grad is not None}
        training, _ = pl_module.training, pl_module.eval()
        self.last_output = pl_module(batches()[0][0].to(pl_module.layers[0].weight.dtype)).detach()
        pl_module.train(training)


def output(module):
    return module.eval()(batches()[0][0].to(module.layers[0].weight.dtype)).detach()


FACTORS = {f"layers.{i}.lora.{factor}" for i in (0, 3, 5) for factor in "AB"}


# ------------------------------------------------------------------------------------------------ before and in the run


@pytest.mark.parametrize("made_in", ["__init__", "setup", "configure_model"])
def test_layers_are_adapted_wherever_the_module_makes_them(made_in, tmp_path):
    watch, model = Watch(), Net(made_in=made_in)
    trainer(tmp_path, LoRA(rank=2), watch).fit(model, data())
    assert set(watch.factors) == {"layers.0", "layers.3", "layers.5"}
    assert all(B.any() for _, B in watch.factors.values())
    assert not torch.equal(model.layers[0].weight, layers()[0].weight)
    assert structure(model)["classes"] == structure(Net(made_in="__init__"))["classes"]


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "64-true"])
def test_training_starts_at_the_base_models_function_bit_for_bit(precision, tmp_path):
    watch, model = Watch(), Net()
    expected = output(Net().to({"bf16-true": torch.bfloat16, "64-true": torch.float64}.get(precision)))
    trainer(tmp_path, LoRA(rank=2), watch, precision=precision).fit(model, data())
    assert torch.equal(watch.first_output, expected)


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed", "64-true"])
def test_no_bit_of_a_frozen_parameter_changes_though_the_optimizer_has_them_all_and_decays(precision, tmp_path):
    watch = Watch()
    trainer(tmp_path, LoRA(rank=2), watch, precision=precision, max_epochs=3).fit(Net(), data())
    expected = dict(Net().named_parameters())
    assert set(watch.frozen) == set(expected)
    for name, parameter in watch.frozen.items():
        assert torch.equal(parameter, expected[name].to(parameter.dtype)), name


def test_only_what_is_trained_has_gradients_and_optimizer_state(tmp_path):
    watch = Watch()
    lora = LoRA(rank=2, modules_to_save=["layers.1"], bias="lora_only")
    trainer(tmp_path, lora, watch).fit(Net(), data())
    besides = {"layers.1.weight", "layers.1.bias", "layers.0.bias", "layers.5.bias"}
    assert watch.trainable == watch.in_optimizers == watch.gradients == FACTORS | besides


def test_a_dropout_that_is_drawn_trains_other_factors_than_none(tmp_path):
    runs = [Watch(), Watch()]
    for watch, dropout in zip(runs, (0.0, 0.5), strict=True):
        trainer(tmp_path, LoRA(rank=2, dropout=dropout), watch).fit(Net(), data())
    assert not torch.equal(runs[0].factors["layers.0"][0], runs[1].factors["layers.0"][0])


# -------------------------------------------------------------------------------------------------------- after the run


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed", "64-true"])
def test_after_fit_the_module_is_plain_and_computes_what_the_adapted_one_did(precision, tmp_path):
    model = Net()
    before, bits = structure(model), digest(model.state_dict())
    watch = Watch()
    trainer(tmp_path, LoRA(rank=2), watch, precision=precision, max_epochs=2).fit(model, data())
    assert structure(model) == before
    assert digest(model.state_dict()) != bits
    tolerance = 0.05 if "true" in precision and "bf16" in precision else 1e-5
    torch.testing.assert_close(output(model), watch.last_output, rtol=tolerance, atol=tolerance)
    assert not torch.allclose(output(model), watch.first_output, rtol=0.1, atol=0.1)


def test_parameters_that_the_user_had_frozen_or_not_are_so_again(tmp_path):
    model = Net()
    model.layers[0].bias.requires_grad_(False)
    model.layers[1].requires_grad_(False)
    before = structure(model)
    trainer(tmp_path, LoRA(rank=2, modules_to_save=["layers.1"])).fit(model, data())
    assert structure(model) == before
    assert not torch.equal(model.layers[1].weight, layers()[1].weight)


def test_a_second_fit_adapts_the_merged_weights_anew(tmp_path):
    model, watches = Net(), [Watch(), Watch()]
    before = structure(model)
    lora = LoRA(rank=2)
    for watch in watches:
        start = model.layers[0].weight.detach().clone()
        trainer(tmp_path, lora, watch).fit(model, data())
        assert torch.equal(watch.W0["layers.0.weight"], start)
        assert structure(model) == before
    assert not torch.equal(watches[0].W0["layers.0.weight"], watches[1].W0["layers.0.weight"])
    assert torch.equal(watches[1].initial["layers.0"][0], watches[0].initial["layers.0"][0])
    assert not any(B.any() for _, B in watches[1].initial.values())


def test_one_trainer_fits_tests_and_fits_on(tmp_path):
    model = Net()
    run = trainer(tmp_path, LoRA(rank=2))
    run.fit(model, data())
    first = run.test(model, data(), verbose=False)[0]["test_loss"]
    run.fit_loop.max_epochs = 4
    run.fit(model, data())
    assert run.test(model, data(), verbose=False)[0]["test_loss"] < first


def test_fast_dev_run_takes_one_step_and_leaves_a_plain_module(tmp_path):
    model = Net()
    before = structure(model)
    run = trainer(tmp_path, LoRA(rank=2), fast_dev_run=True)
    run.fit(model, data(), data())
    assert run.global_step == 1
    assert structure(model) == before
    assert not torch.equal(model.layers[0].weight, layers()[0].weight)


@pytest.mark.parametrize("function", ["validate", "test", "predict"])
def test_evaluation_leaves_a_plain_module_and_an_injected_one_as_they_are(function, tmp_path):
    for model in (Net(), Net()):
        before, bits = structure(model), digest(model.state_dict())
        run = trainer(tmp_path, LoRA(rank=2))
        result = getattr(run, function)(model, data(), **({} if function == "predict" else {"verbose": False}))
        assert (structure(model), digest(model.state_dict())) == (before, bits)
        expected = getattr(trainer(tmp_path), function)(
            Net(), data(), **({} if function == "predict" else {"verbose": False})
        )
        assert digest(result) == digest(expected)
        inject(model, rank=2)  # for the second round, which is that of an injected module


# ------------------------------------------------------------------------------------------ the same as a loop by hand


def by_hand(net, lora, n_epochs=1, accumulate=1, clip=None, decay=1.0):
    """SGD on A and B through autograd and W0 + scale B^T A, in float64; nothing of the library but where A starts."""
    module = layers().double()
    factors = {
        name.removeprefix("layers."): tuple(p.clone().requires_grad_() for p in pair) for name, pair in net.items()
    }
    leaves = [p for pair in factors.values() for p in pair]
    optimizer, step = torch.optim.SGD(leaves, lr=0.3), 0
    for _ in range(n_epochs):
        for i, (x, y) in enumerate(batches()):
            weights = {
                f"{name}.weight": module.get_parameter(f"{name}.weight").detach() + lora * B.T @ A
                for name, (A, B) in factors.items()
            }
            loss = nn.functional.mse_loss(torch.func.functional_call(module, weights, (x.double(),)), y.double())
            (loss / accumulate).backward()
            if (i + 1) % accumulate == 0:
                if clip is not None:
                    nn.utils.clip_grad_norm_(leaves, clip)
                optimizer.step()
                optimizer.zero_grad()
                step += 1
                optimizer.param_groups[0]["lr"] = 0.3 * decay**step
    return {f"layers.{name}": (A.detach(), B.detach()) for name, (A, B) in factors.items()}


class SGDNet(Net):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.3)


class ScheduledSGDNet(Net):
    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.3)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.8**step)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


@pytest.mark.parametrize(
    ("model", "options", "expected"),
    [
        (SGDNet, {}, {}),
        (SGDNet, {"max_epochs": 3}, {"n_epochs": 3}),
        (SGDNet, {"accumulate_grad_batches": 2}, {"accumulate": 2}),
        (SGDNet, {"gradient_clip_val": 0.05}, {"clip": 0.05}),
        (SGDNet, {"accumulate_grad_batches": 4, "gradient_clip_val": 0.05}, {"accumulate": 4, "clip": 0.05}),
        (ScheduledSGDNet, {}, {"decay": 0.8}),
    ],
    ids=["plain", "epochs", "accumulated", "clipped", "accumulated and clipped", "scheduled"],
)
def test_lightnings_loop_trains_the_factors_that_a_loop_by_hand_does(model, options, expected, tmp_path):
    watch = Watch()
    lora = LoRA(rank=2, alpha=3, adapter_dtype="float64")
    trainer(tmp_path, lora, watch, precision="64-true", **options).fit(model(), data())
    for name, (A, B) in by_hand(watch.initial, 1.5, **expected).items():
        torch.testing.assert_close(watch.factors[name][0], A, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(watch.factors[name][1], B, rtol=1e-9, atol=1e-11)
        assert B.abs().max() > 1e-3


def test_manual_optimization_with_two_toggled_optimizers_trains_each_ones_adapters(tmp_path):
    watch, model = Watch(), TwoOptimizersNet()
    before = structure(model)
    trainer(tmp_path, LoRA(rank=2), watch).fit(model, data())
    assert watch.in_optimizers == FACTORS
    assert set(watch.frozen) == set(dict(Net().named_parameters()))
    assert all(B.any() for _, B in watch.factors.values())
    assert structure(model) == before


# ------------------------------------------------------------------------------------------------------------ the table


class NotRankZero(SingleDeviceStrategy):
    @property
    def is_global_zero(self) -> bool:
        return False


def summarised(tmp_path, capsys, caplog, **options):
    caplog.set_level(logging.INFO)
    lora = LoRA(rank=2, modules_to_save=["layers.1"], rank_pattern={"layers.5": 1})
    trainer(tmp_path, lora, **{"enable_model_summary": True, **options}).fit(Net(), data())
    return capsys.readouterr().out + caplog.text


@pytest.mark.parametrize("rich", [True, False])
def test_the_table_names_what_is_adapted_and_what_is_trained_besides(rich, tmp_path, capsys, caplog, monkeypatch):
    monkeypatch.setattr("lightning_lora.table.has_rich", lambda: rich)
    text = summarised(tmp_path, capsys, caplog)
    table = text[text.index("Adapted modules") :]
    words = table.replace("│", " ").replace("┃", " ").replace("|", " ").split()
    for row in ("layers.0 1 Linear 16 x 8 2 48", "layers.3 1 Linear 12 x 16 2 56", "layers.5 1 Linear 4 x 12 1 16"):
        assert row in " ".join(words)
    n = sum(p.numel() for p in Net().parameters())
    line = " ".join(words)
    assert f"152 ({152 / n:.2%} of the model's)" in line
    assert "in adapters 120" in line
    assert "besides 32 (layers.*.weight, layers.*.bias)" in line
    assert f"Params of the model {n}" in line
    assert ("┃ Adapted modules" in text) is rich


def test_layers_that_differ_in_number_only_share_a_row(tmp_path, capsys, caplog):
    class Stack(Net):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(*[nn.Linear(8, 8) for _ in range(11)], nn.Linear(8, 4))

    caplog.set_level(logging.INFO)
    trainer(tmp_path, LoRA(rank=2), enable_model_summary=True).fit(Stack(), data())
    text = capsys.readouterr().out + caplog.text
    line = " ".join(text[text.index("Adapted modules") :].replace("│", " ").replace("|", " ").split())
    assert "layers.* 11 Linear 8 x 8 2 352" in line
    assert "layers.11 1 Linear 4 x 8 2 24" in line


def test_the_table_says_which_ranks_were_lowered_what_is_large_and_what_is_left_out(tmp_path, capsys, caplog):
    class Mixed(Net):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(4, 4)
            self.judge = nn.Linear(4, 4).requires_grad_(False)

    caplog.set_level(logging.INFO)
    trainer(tmp_path, LoRA(rank=5), enable_model_summary=True).fit(Mixed(), data())
    text = capsys.readouterr().out + caplog.text
    line = " ".join(text[text.index("Adapted modules") :].replace("│", " ").replace("|", " ").split())
    assert "layers.0 1 Linear 16 x 8 5 120" in line
    assert "layers.5 1 Linear 4 x 12 4 (full) 64" in line
    assert "No smaller than their weights 1 adapter (layers.*)" in line
    assert "Left out 1 Embedding, 1 frozen" in line


@pytest.mark.parametrize("silence", ["summary is disabled", "rank is not 0"])
def test_the_table_is_not_printed_when(silence, tmp_path, capsys, caplog):
    options = {"enable_model_summary": False}
    if silence == "rank is not 0":
        options = {"strategy": NotRankZero(accelerator=None, device=torch.device("cpu"))}
    assert "Adapted modules" not in summarised(tmp_path, capsys, caplog, **options)


def test_a_model_summary_of_the_users_own_counts_as_one(tmp_path, capsys, caplog):
    caplog.set_level(logging.INFO)
    trainer(tmp_path, LoRA(rank=2), ModelSummary(max_depth=-1), enable_model_summary=True).fit(Net(), data())
    assert "Adapted modules" in capsys.readouterr().out + caplog.text


# ------------------------------------------------------------------------------------------- adapters that do not learn


class Unused(Net):
    """One layer takes no part in the loss."""

    def __init__(self, automatic: bool = True) -> None:
        super().__init__()
        self.spare = nn.Linear(8, 8)
        self.automatic_optimization = automatic

    def training_step(self, batch, batch_idx):
        if self.automatic_optimization:
            return super().training_step(batch, batch_idx)
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()
        return None


@pytest.mark.parametrize("automatic", [True, False], ids=["automatic", "manual"])
def test_an_adapter_that_no_gradient_reached_is_named_once_and_the_others_are_not(automatic, tmp_path):
    with pytest.warns(UserWarning, match="No gradient reached the adapters of 'spare' in the first batch") as caught:
        trainer(tmp_path, LoRA(rank=2), max_epochs=2).fit(Unused(automatic), data())
    assert len([w for w in caught if "No gradient" in str(w.message)]) == 1


class BackwardByHand(Net):
    """Manual optimization that calls ``loss.backward()``, so that Lightning does not hear of it."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        self.loss(batch).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_a_backward_by_hand_that_reaches_all_adapters_warns_of_none(tmp_path):
    watch = Watch()
    trainer(tmp_path, LoRA(rank=2), watch).fit(BackwardByHand(), ResumableLoader())
    assert all(B.any() for _, B in watch.factors.values())


class Checkpointed(Net):
    """A reentrant activation checkpoint round the first layers, whose input requires no gradient."""

    def forward(self, x):
        return self.layers[3:](torch.utils.checkpoint.checkpoint(self.layers[:3], x, use_reentrant=True))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_adapters_inside_a_reentrant_checkpoint_are_named_with_what_to_do(tmp_path):
    with pytest.warns(UserWarning, match=r"adapters of 'layers\.0' in .*`use_reentrant=False`"):
        trainer(tmp_path, LoRA(rank=2)).fit(Checkpointed(), data())


class NoData(Net):
    def train_dataloader(self):
        raise RuntimeError("there is no data")


def test_a_run_that_failed_where_no_callback_heard_of_it_does_not_stop_the_next(tmp_path):
    model = NoData()
    with pytest.raises(RuntimeError, match="there is no data"):
        trainer(tmp_path, LearningRateFinder(num_training_steps=4), LoRA(rank=2)).fit(model)
    trainer(tmp_path, LoRA(rank=2), max_epochs=1).fit(model, data())
    assert type(model) is NoData
    assert not adapters(model)
