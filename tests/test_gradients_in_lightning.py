"""Merged and projected beside factored in real runs: the same losses, and files that resume to the same bits."""

import copy
import itertools
import re
import sys
import warnings
from pathlib import Path

import pytest
import torch
from lightning.fabric import Fabric
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from models import (
    Net,
    ResumableLoader,
    ScheduledNet,
    TwoOptimizersNet,
    batches,
    data,
    digest,
    structure,
    trainer,
)
from resume import SaveByHand
from test_bad_input import refused
from test_checkpoint import read
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from zoo import ZOO, EncoderNet, TiedNet, Zoo

import lightning_lora
from lightning_lora import LoRA, adapters, attach, inject, merge
from lightning_lora.injection.inject import places

HERE = Path(__file__).parent
GRADIENTS = ["factored", "merged", "projected"]
HOLDING = ["merged", "projected"]
DOUBLE = {"adapter_dtype": "float64"}
TARGETS = {Zoo: ZOO, TiedNet: {"target_modules": ["layers.embed", "body"]}}


WAYS = {
    **{gradient: {"gradient": gradient} for gradient in GRADIENTS},
    "drawn": {"gradient": "merged", "resample_every_n_steps": 3},
    "A drawn": {"gradient": "projected", "resample_every_n_steps": 1, "resample": "A"},
}
"""Options that differ in what follows a step."""


class Undecayed(Zoo):
    """Without decay, which factors that are drawn anew cannot have."""

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.02)


class Losses(Callback):
    """The loss of every batch."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.values.append(outputs["loss"].item())


class Follows(Callback):
    """Asserts after every batch that W = W0 + increment; notes the batches in which the increments moved."""

    def __init__(self, tolerance: float) -> None:
        self.tolerance = tolerance
        self.moved: list[int] = []

    def on_train_start(self, trainer, pl_module) -> None:
        self.W0 = {place.key: place.weight.detach().clone() for place in places(pl_module)}
        self.before = {key: torch.zeros_like(weight, dtype=torch.float64) for key, weight in self.W0.items()}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        found = list(places(pl_module))
        after = {place.key: place.adapter.delta_weight(torch.float64) for place in found}
        for place in found:
            W0 = self.W0[place.key].double()
            expected = W0 + after[place.key] if place.host.holds_increment else W0
            torch.testing.assert_close(place.weight.detach().double(), expected, rtol=0, atol=self.tolerance)
        if any(not torch.equal(after[key], self.before[key]) for key in after):
            self.moved.append(batch_idx)
        self.before = after

    def on_train_end(self, trainer, pl_module) -> None:
        assert all(delta.abs().max() > 1e-3 for delta in self.before.values())


def lora(model, gradient, **options):
    """The callback that adapts all of ``model``."""
    return LoRA(**{"rank": 2, "alpha": 3, "gradient": gradient, **TARGETS.get(model, {}), **options})


def losses(folder, model, gradient, *callbacks, options=None, file=None, made_in="__init__", **trainer_options):
    """Those of a run."""
    seen = Losses()
    run = trainer(folder, lora(model, gradient, **(options or {})), seen, *callbacks, **trainer_options)
    run.fit(model(made_in=made_in), ResumableLoader(), ckpt_path=file)
    return seen.values


# ---------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
@pytest.mark.parametrize("way", [*WAYS, "tied"])
def test_the_last_file_of_fit_and_the_module_after_it_have_the_same_weights(way, precision, tmp_path):
    model, options = (TiedNet, {"gradient": "projected"}) if way == "tied" else (Undecayed, WAYS[way])
    module = model()
    before = structure(module)
    file = ModelCheckpoint(tmp_path, filename="end")
    trainer(tmp_path, lora(model, **options), file, precision=precision).fit(module, data())
    assert digest(read(tmp_path / "end.ckpt")["state_dict"]) == digest(module.state_dict())
    assert structure(module) == before


# ------------------------------------------------------------------------------------------------------ the same losses


@pytest.mark.parametrize(
    ("model", "options"),
    [
        (ScheduledNet, {"accumulate_grad_batches": 3, "gradient_clip_val": 0.05}),
        (Zoo, {}),
        (EncoderNet, {"gradient_clip_val": 0.5}),
    ],
)
@pytest.mark.parametrize("precision", ["32-true", "64-true"])
def test_all_three_gradients_give_the_same_losses(model, precision, options, tmp_path):
    adapter_dtype = "float64" if precision == "64-true" else "float32"
    runs = [
        losses(
            tmp_path,
            model,
            gradient,
            options={"adapter_dtype": adapter_dtype},
            precision=precision,
            max_epochs=2,
            **options,
        )
        for gradient in GRADIENTS
    ]
    assert len(runs[0]) == 16
    assert abs(runs[0][8] - runs[0][0]) > 1e-3
    for run in runs[1:]:
        assert run == pytest.approx(runs[0], rel=1e-10 if precision == "64-true" else 1e-5)


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
@pytest.mark.parametrize("model", [Net, Zoo])
def test_in_bfloat16_the_losses_stay_within_its_rounding(model, precision, tmp_path):
    runs = [losses(tmp_path, model, gradient, precision=precision) for gradient in GRADIENTS]
    for run in runs[1:]:
        assert run == pytest.approx(runs[0], rel=0.05)


# --------------------------------------------------------------------------------- saved in one way, resumed in another


def recovered(caught):
    return [str(warning.message) for warning in caught if "W0 was recovered" in str(warning.message)]


@pytest.mark.parametrize(("model", "precision"), [(Net, "32-true"), (Zoo, "64-true")])
@pytest.mark.parametrize(("before", "after"), list(itertools.permutations(GRADIENTS, 2)))
def test_a_file_saved_in_one_mode_goes_on_in_another(before, after, model, precision, tmp_path):
    options = {
        "options": {"adapter_dtype": "float64" if precision == "64-true" else "float32"},
        "made_in": "configure_model",
        "precision": precision,
    }
    expected = losses(tmp_path, model, before, max_epochs=2, **options)
    first = losses(tmp_path, model, before, SaveByHand(tmp_path / "saved.ckpt"), **options)
    assert first == expected[:8]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        second = losses(tmp_path, model, after, file=tmp_path / "saved.ckpt", max_epochs=2, **options)
    assert second == pytest.approx(expected[8:], rel=1e-10 if precision == "64-true" else 1e-5)
    messages = recovered(caught)
    assert len(messages) == (after == "factored")
    if messages:
        assert "use the `gradient` of the run that was saved" in messages[0]


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_w0_recovered_from_a_merged_run_gives_its_function_within_the_warned_bound(precision, tmp_path):
    """The weight that was trained is W; the warning bounds W0 + increment - W."""

    class Start(Callback):
        def on_train_start(self, trainer, pl_module) -> None:
            self.W = {
                place.key: place.weight.double() + place.adapter.delta_weight(torch.float64)
                for place in places(pl_module)
            }

    start = Start()
    losses(tmp_path, Net, "merged", SaveByHand(tmp_path / "saved.ckpt"), precision=precision)
    with pytest.warns(UserWarning, match="W0 was recovered") as caught:
        losses(tmp_path, Net, "factored", start, file=tmp_path / "saved.ckpt", precision=precision, max_epochs=2)
    bound = float(re.search(r"at most (\S+) in any", recovered(caught)[0])[1])
    state = read(tmp_path / "saved.ckpt")["state_dict"]
    errors = [(start.W[key] - state[key].double()).abs().max().item() for key in start.W]
    assert len(errors) == 3
    assert 0 < max(errors) <= bound < 0.02


@pytest.mark.parametrize("gradient", HOLDING)
def test_exactness_can_be_had_in_the_same_mode_and_is_refused_in_factored(gradient, tmp_path):
    file = tmp_path / "saved.ckpt"
    losses(tmp_path, Net, gradient, SaveByHand(file))
    assert len(losses(tmp_path, Net, gradient, options={"exact_resume": True}, file=file, max_epochs=2)) == 8
    refused(
        tmp_path, Net(), lora(Net, "factored", exact_resume=True), match=["exact_resume", "'layers.0"], ckpt_path=file
    )


# --------------------------------------------------------------------------------- one increment for each real step


class ZooByHand(Undecayed):
    """Manual optimization, in which the step is taken inside ``training_step``."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.manual_backward(loss / 2)
        if batch_idx % 2 == 1:
            self.optimizers().step()
            self.optimizers().zero_grad()
        return loss


class NoLoss(Net):
    """Gives no loss in batches 2 and 5, so that Lightning skips them."""

    def training_step(self, batch, batch_idx):
        return None if batch_idx in (2, 5) else super().training_step(batch, batch_idx)


TARGETS |= dict.fromkeys((Undecayed, ZooByHand), ZOO)
EVERY, ODD = list(range(8)), [1, 3, 5, 7]


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
@pytest.mark.parametrize(
    ("model", "options", "moved"),
    [
        (Net, {}, EVERY),
        (Net, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}, ODD),
        (Net, {"accumulate_grad_batches": 3}, [2, 5, 7]),
        (ScheduledNet, {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"}, EVERY),
        (TwoOptimizersNet, {}, EVERY),
        (NoLoss, {}, [0, 1, 3, 4, 6, 7]),
        (Zoo, {"accumulate_grad_batches": 2}, ODD),
        (ZooByHand, {}, ODD),
    ],
)
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_the_weight_follows_once_for_each_step(gradient, model, options, moved, tmp_path):
    follows = Follows(1e-13)
    run = trainer(tmp_path, lora(model, gradient, **DOUBLE), follows, precision="64-true", **options)
    run.fit(model(), data())
    assert follows.moved == moved


@pytest.mark.parametrize(
    ("model", "precision", "adapter_dtype"),
    [
        (Zoo, "32-true", "float32"),
        (Zoo, "32-true", "bfloat16"),
        (Zoo, "bf16-mixed", "float32"),
        (ZooByHand, "bf16-mixed", "float32"),
    ],
)
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_a_float32_weight_follows_to_its_own_rounding(gradient, model, precision, adapter_dtype, tmp_path):
    """Whatever the adapter's precision, and that in which the step is taken."""
    follows = Follows(2e-6)
    trainer(tmp_path, lora(model, gradient, adapter_dtype=adapter_dtype), follows, precision=precision).fit(
        model(), data()
    )
    assert len(follows.moved) >= 4


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
@pytest.mark.parametrize("way", WAYS)
def test_steps_taken_by_hand_give_the_bits_of_automatic_ones(way, precision, tmp_path):
    """Though backward, step and draw are then under the precision's contexts: autocast, and another default dtype."""
    states = []
    for model, options in ((Undecayed(), {"accumulate_grad_batches": 2}), (ZooByHand(), {})):
        trainer(tmp_path, lora(Zoo, **WAYS[way]), precision=precision, **options).fit(model, data())
        states.append(model.state_dict())
    assert digest(states[0]) == digest(states[1])


@pytest.mark.parametrize(
    ("layer", "gradient"),
    [
        # the others' gradients come through torch's own functions, which compute in autocast's dtype there
        (nn.Linear(8, 4), "factored"),
        (nn.Linear(8, 4), "merged"),
        (nn.Conv1d(8, 4, 1), "merged"),
        (nn.Conv1d(8, 4, 1), "projected"),
    ],
)
def test_a_backward_under_autocast_computes_in_the_dtypes_of_its_forward(layer, gradient):
    module = nn.Sequential(copy.deepcopy(layer))
    inject(module, rank=2, target_modules=["0"], gradient=gradient)
    (adapter,) = adapters(module).values()
    nn.init.normal_(adapter.B, generator=torch.Generator().manual_seed(0))
    x, gradients = batches()[0][0], []
    x = x if isinstance(layer, nn.Linear) else x[:, :, None]
    for enabled in (False, True):
        loss = (module(x) ** 2).sum()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            gradients.append(torch.autograd.grad(loss, list(adapter.parameters())))
    assert digest(gradients[0]) == digest(gradients[1])


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "64-true"])
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_adapters_start_the_same_whatever_the_precision_of_the_trainer(gradient, precision, tmp_path):
    class Start(Callback):
        def on_train_start(self, trainer, pl_module) -> None:
            self.factors = {name: copy.deepcopy(a.state_dict()) for name, a in adapters(pl_module).items()}

    start, plain = Start(), Net()
    trainer(tmp_path, lora(Net, gradient), start, precision=precision).fit(Net(), data())
    with torch.device("meta"):
        inject(plain, rank=2, alpha=3, gradient=gradient)
    assert digest(start.factors) == digest({key: a.state_dict() for key, a in adapters(plain).items()})


# ------------------------------------------------------------------------------------------- what cannot be, by name


@pytest.mark.parametrize(
    ("model", "gradient"),
    [(Net, "merged"), (Zoo, "projected")],
)
@pytest.mark.parametrize("made_in", ["__init__", "configure_model"])
def test_files_of_adapters_only_are_refused_where_a_weight_holds_its_increment(model, gradient, made_in, tmp_path):
    module = model(made_in=made_in)
    callback = lora(model, gradient, checkpoint="adapter")
    refused(tmp_path, module, callback, match=["checkpoint='adapter'", "gradient='factored'", "checkpoint='merged'"])


class WithLBFGS(Net):
    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_lbfgs_is_refused_where_the_weight_would_lag_behind_and_trains_where_it_would_not(gradient, tmp_path):
    model = WithLBFGS()
    if gradient == "factored":
        trainer(tmp_path, lora(Net, gradient)).fit(model, data())
        assert digest(model.state_dict()) != digest(Net().state_dict())
        return
    refused(tmp_path, model, lora(Net, gradient), match=["LBFGS", "'layers.0'", "gradient='factored'"])


# ------------------------------------------------------------------------------------------- layers that are not called


NESTED = "ignore:The PyTorch API of nested tensors is in prototype stage"


@pytest.mark.filterwarnings(NESTED)
@pytest.mark.filterwarnings(r"ignore:Found 22 module\(s\) in eval mode at the start of training")
@pytest.mark.parametrize("targets", [["self_attn"], ["linear1"]])
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_an_encoder_that_trains_in_eval_mode_does_not_take_the_fast_path_round_its_adapters(
    gradient, targets, tmp_path
):
    """Lightning leaves a module that is in eval mode before ``fit`` in eval mode."""

    def run(evaluates):
        seen, model = Losses(), EncoderNet()
        model.layers.train(not evaluates)
        trainer(tmp_path, lora(EncoderNet, gradient, target_modules=targets), seen).fit(model, data())
        assert model.layers.training is not evaluates
        return seen.values

    assert run(True) == pytest.approx(run(False), rel=1e-5)


# ------------------------------------------------------------------------------------------ other loops, many processes


def by_hand(way, loop):
    """Two epochs of :class:`Zoo` by plain torch or by Fabric, and the losses."""
    model = Undecayed()
    inject(model, rank=2, alpha=3, **WAYS[way], **ZOO)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    net, backward, seen = model, torch.Tensor.backward, []
    if loop == "torch":
        attach(model, optimizer)
    else:
        fabric = Fabric(accelerator="cpu", devices=1)
        net, optimizer = fabric.setup(model, optimizer)
        attach(net if loop == "fabric's module" else model, optimizer)
        backward = fabric.backward
    for batch in [*batches(), *batches()]:
        loss = nn.functional.mse_loss(net(batch[0]), batch[1])
        backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        seen.append(loss.item())
    merge(model)
    return seen, digest(model.state_dict())


@pytest.mark.parametrize("loop", ["torch", "fabric", "fabric's module"])
@pytest.mark.parametrize("way", WAYS)
def test_a_loop_by_torch_or_fabric_gives_the_trainers_bits(way, loop, tmp_path):
    seen, model = Losses(), Undecayed()
    trainer(tmp_path, lora(Zoo, **WAYS[way]), seen, max_epochs=2).fit(model, data())
    assert by_hand(way, loop) == (seen.values, digest(model.state_dict()))


# ---------------------------------------------------------------------------------------------- the callback's own work


class Deep(Net):
    """Two hundred layers."""

    def _make(self, where: str) -> None:
        if where == "__init__":
            self.layers = nn.Sequential(*(nn.Linear(8, 8) for _ in range(199)), nn.Linear(8, 4))
            for layer in self.layers[:-1]:
                nn.init.eye_(layer.weight)


class Calls(Callback):
    """Every function of the library that runs while a batch is trained on, by file and name."""

    def __init__(self) -> None:
        self.counts: list[dict[tuple[str, str], int]] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        counts: dict[tuple[str, str], int] = {}
        home = str(Path(lightning_lora.__file__).parent)

        def count(frame, event, _):
            file = frame.f_code.co_filename
            if event == "call" and file.startswith(home):
                key = file[len(home) + 1 :], frame.f_code.co_name
                counts[key] = counts.get(key, 0) + 1

        self.counts.append(counts)
        sys.setprofile(count)


class Stops(Callback):
    def on_train_batch_end(self, *_) -> None:
        sys.setprofile(None)


class Operations(TorchDispatchMode):
    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.names = names

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class Dispatched(LoRA):
    """Notes the operations on tensors that the callback's hooks do during the run."""

    def __init__(self, **options) -> None:
        super().__init__(**options)
        self.operations: list[str] = []
        self.hooks: set[str] = set()


def _noted(name):
    def hook(self, *args):
        self.hooks.add(name)
        with Operations(self.operations):
            return getattr(LoRA, name)(self, *args)

    return hook


HOOKS = ("on_after_backward", "on_before_optimizer_step", "on_train_batch_end")
for name in HOOKS:
    setattr(Dispatched, name, _noted(name))


def test_with_two_hundred_factored_layers_nothing_of_the_callback_runs_but_its_hooks(tmp_path):
    calls, callback = Calls(), Dispatched(rank=2, log_memory=False)
    trainer(tmp_path, calls, callback, Stops()).fit(Deep(), data())
    assert callback.hooks == set(HOOKS)
    assert callback.operations == []
    _, _, *later = calls.counts  # the second batch looks whether the first wrote frozen weights
    assert len(later) == 6
    for counts in later:
        layers = {key: n for key, n in counts.items() if key[0].startswith(("adapters/", "gradients/", "hosts/"))}
        assert layers[("hosts/forwards.py", "linear")] == 200
        rest = {key: n for key, n in counts.items() if key not in layers}
        own = {key for key in rest if key[0] == "callback.py" or key[0].startswith("trainer/")}
        assert set(rest) == own
        assert sum(rest.values()) <= 60  # wrappers of hooks, each looked at once, whatever the number of layers


# ------------------------------------------------------------------------------------------------ tested after ``fit``


def test_after_fit_files_of_adapters_are_tested_on_the_fitted_module_one_after_another(tmp_path):
    """Each takes the place of what was folded into the weights before."""
    best = ModelCheckpoint(tmp_path / "best", monitor="val_loss", save_top_k=3)
    options = {"rank": 2, "checkpoint": "adapter"}
    model, loader = Net(), data(1)
    run = trainer(tmp_path, LoRA(**options), best, max_epochs=3)
    run.fit(model, data(), loader)
    assert len(best.best_k_models) == 3

    def tested(file):
        return run.test(model, loader, ckpt_path=file, verbose=False)[0]["test_loss"]

    losses = {file: loss.item() for file, loss in best.best_k_models.items()}
    assert len(set(losses.values())) == 3
    assert tested("best") == pytest.approx(min(losses.values()), rel=1e-5)
    for file in [*losses, *reversed(losses)]:
        assert tested(file) == pytest.approx(losses[file], rel=1e-5)


@pytest.mark.parametrize("form", ["merged", "adapter"])
def test_what_one_module_was_trained_to_is_not_saved_with_another(form, tmp_path):
    first, second = Net(), Net(seed=1)
    run = trainer(tmp_path, LoRA(rank=2, checkpoint=form))
    run.fit(first, data())
    run.validate(second, data(), verbose=False)
    run.save_checkpoint(tmp_path / "second.ckpt")
    file = read(tmp_path / "second.ckpt")
    assert "lightning_lora" not in file
    assert digest(file["state_dict"]) == digest(second.state_dict())
    run.validate(first, data(), verbose=False)
    run.save_checkpoint(tmp_path / "first.ckpt")
    assert "lightning_lora" in read(tmp_path / "first.ckpt")


class OwnParameter(Net):
    """A parameter of the LightningModule itself."""

    def __init__(self):
        super().__init__()
        self.first = nn.Parameter(torch.randn(8, 8))

    def forward(self, x):
        return super().forward(x @ self.first)


def test_a_parameter_of_the_lightning_module_itself_is_adapted_and_the_module_is_itself_after(tmp_path):
    model = OwnParameter()
    before, first = structure(model), model.first.detach().clone()
    lora = LoRA(rank=2, target_modules=["layers.0"], target_parameters=["first"])
    run = trainer(tmp_path, lora)
    run.fit(model, data())
    assert structure(model) == before
    assert not torch.equal(model.first, first)
    run.save_checkpoint(tmp_path / "after.ckpt")
    assert torch.load(tmp_path / "after.ckpt", weights_only=True)["lightning_lora"]["adapters"].keys() == {
        "first",
        "layers.0",
    }
