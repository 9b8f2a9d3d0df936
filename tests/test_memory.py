"""What the report says of a run, and of full fine-tuning, is what real runs hold."""

import dataclasses
import functools
import sys
import weakref

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from models import Net, TwoOptimizersNet, batches, data, digest, structure, trainer
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric
from zoo import ZOO, TiedNet, Zoo

from lightning_lora import LoRA, Memory, MemoryReport, adapters, estimate_memory
from lightning_lora.memory.optimizer_states import derived_nbytes, measured_nbytes

GRADIENTS = ("factored", "merged", "projected")


def size(tensors) -> int:
    """Bytes of ``tensors``, each storage once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@dataclasses.dataclass(eq=False)
class Holder:
    """A saved tensor, for as long as autograd holds it."""

    tensor: torch.Tensor


class Memo(DummyLogger):
    """Keeps what the callback logs."""

    def __init__(self):
        super().__init__()
        self.logged = []

    def log_metrics(self, metrics, step=None):
        if any(name.startswith("lora/") for name in metrics):
            self.logged.append(("metrics", metrics))

    def log_hyperparams(self, params, *args):
        if "lora" in params:
            self.logged.append(("hyperparameters", params))


class Sized(LightningDataModule):
    """Data whose batch size can be changed."""

    batch_size = 2

    def train_dataloader(self):
        return DataLoader(data().dataset, self.batch_size)

    val_dataloader = train_dataloader


class Reality(Callback):
    """Reads the four parts off a run by other means than the library's: addresses and hooks of its own."""

    def on_train_start(self, trainer, pl_module) -> None:
        self.own = {*pl_module.parameters(), *(p for a in adapters(pl_module).values() for p in a.parameters())}
        known = {t.untyped_storage().data_ptr() for t in [*self.own, *pl_module.buffers()]}
        self.parameters = size(self.own)
        self.activations = 0
        step, kept = pl_module.training_step, []

        @functools.wraps(step)
        def first_step(*args, **kwargs):
            del pl_module.training_step

            def keep(tensor):
                holder = Holder(tensor.detach())
                kept.append(weakref.ref(holder))
                held = [ref().tensor for ref in kept if ref() is not None]
                now = size(t for t in held if t.untyped_storage().data_ptr() not in known)
                self.activations = max(self.activations, now)
                return holder

            with torch.autograd.graph.saved_tensors_hooks(keep, lambda holder: holder.tensor):
                return step(*args, **kwargs)

        pl_module.training_step = first_step

    def on_train_end(self, trainer, pl_module) -> None:
        self.gradients = size(p.grad for p in self.own if p.grad is not None)
        states = [state for optimizer in trainer.optimizers for state in optimizer.state.values()]
        self.optimizer = size(v for state in states for v in state.values() if isinstance(v, torch.Tensor))


def real(tmp_path, model, *callbacks, **options) -> dict[str, int]:
    """The four parts of a run of 2 batches."""
    reality = Reality()
    trainer(tmp_path, *callbacks, reality, limit_train_batches=2, **options).fit(model, data())
    return vars(reality)


def parts(memory: Memory) -> dict[str, int]:
    return {part: getattr(memory, part) for part in ("parameters", "gradients", "optimizer", "activations")}


def report(tmp_path, model, options=None, **trainer_options) -> MemoryReport:
    lora = LoRA(**{"rank": 2, **(options or {})})
    trainer(tmp_path, lora, limit_train_batches=2, **trainer_options).fit(model, data())
    return lora.memory


class DropoutNet(Net):
    def _make(self, where):
        super()._make(where)
        if where == self.hparams["made_in"]:
            self.layers.insert(3, nn.Dropout(0.3))


def optimized(make, base=Net):
    """A module with another optimizer."""

    class Optimized(base):
        def configure_optimizers(self):
            return make([p for p in self.parameters() if p.requires_grad])

    return Optimized


MODELS = {
    "linears": (Net, {}),
    "dropout": (DropoutNet, {}),
    "other targets": (Net, {"target_modules": ["layers.5"], "modules_to_save": ["layers.1"], "bias": "all"}),
    "zoo": (Zoo, ZOO),
    "tied": (TiedNet, {"target_modules": ["body"]}),
    "SGD": (optimized(functools.partial(torch.optim.SGD, lr=0.1)), {}),
    "momentum": (optimized(functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9)), {}),
    "Adafactor": (optimized(torch.optim.Adafactor), {}),
    "fused": (optimized(functools.partial(torch.optim.AdamW, fused=True)), {}),
    "Adagrad": (optimized(torch.optim.Adagrad), {}),
}


@pytest.mark.parametrize("name", MODELS)
def test_full_fine_tuning_holds_what_is_derived(name, tmp_path):
    model, options = MODELS[name]
    derived = report(tmp_path, model(), options).full
    expected = real(tmp_path, model())
    assert parts(derived) == {part: expected[part] for part in parts(derived)}
    assert [derived.source(part) for part in parts(derived)] == ["measured", "derived", "derived", "derived"]


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed", "64-true"])
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_both_columns_are_those_of_real_runs_in_every_mode_and_precision(gradient, precision, tmp_path):
    options = {"rank": 2, "gradient": gradient}
    found = report(tmp_path, Net(), options, precision=precision)
    adapted = real(tmp_path, Net(), LoRA(**options, log_memory=False), precision=precision)
    if gradient == "projected":  # with the largest of the full gradients that stand one at a time
        adapted["gradients"] += {"bf16-true": 2, "64-true": 8}.get(precision, 4) * 16 * 12
    expected = real(tmp_path, Net(), precision=precision)
    assert parts(found.lora) == {part: adapted[part] for part in parts(found.lora)}
    assert parts(found.full) == {part: expected[part] for part in parts(found.full)}
    assert found.lora.derived == ({"gradients"} if gradient == "projected" else set())


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("model", [Net, TwoOptimizersNet])
def test_an_estimate_is_what_the_run_will_report(gradient, model, tmp_path):
    module = model()
    before, bits = structure(module), digest(module.state_dict())
    estimate = estimate_memory(module, batches()[0], rank=2, gradient=gradient)
    assert structure(module) == before
    assert digest(module.state_dict()) == bits
    measured = report(tmp_path, module, {"gradient": gradient})
    assert parts(estimate.lora) == parts(measured.lora)
    assert parts(estimate.full) == parts(measured.full)


# ------------------------------------------------------------------------------------- activations that are hard to see


class Checkpointed(Net):
    """An activation checkpoint round the first layers."""

    reentrant = False

    def forward(self, x):
        x = x.clone().requires_grad_(self.reentrant)
        return self.layers[3:](checkpoint(self.layers[:3], x, use_reentrant=self.reentrant))


class Reentrant(Checkpointed):
    reentrant = True


class Offloaded(Net):
    """With hooks of its own."""

    def forward(self, x):
        with torch.autograd.graph.save_on_cpu():
            return self.layers(x)


class Reads(Net):
    """Code that reads numbers, and keeps metrics."""

    def __init__(self):
        super().__init__()
        self.seen, self.metric = [], MeanMetric()

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.metric(loss.detach())
        self.seen.append(loss.item())
        return None if loss.isnan() else {"loss": loss}


@pytest.mark.parametrize("model", [Checkpointed, Reentrant, Offloaded, Reads])
def test_activations_are_right_under_checkpoints_hooks_and_code_that_reads_values(model, tmp_path):
    options = {"target_modules": ["layers.3", "layers.5"]}
    module = model()
    found, expected = report(tmp_path, module, options), real(tmp_path, model())
    assert parts(found.full) == {part: expected[part] for part in parts(found.full)}
    adapted = real(tmp_path, model(), LoRA(rank=2, log_memory=False, **options))
    assert found.lora.activations == adapted["activations"]
    assert found.notes == ()
    assert len(getattr(module, "seen", [1, 2])) == 2


class HasUnused(Net):
    """With a layer that its forward does not call."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Linear(30, 30)


def test_parameters_that_no_gradient_would_reach_count_as_parameters_alone(tmp_path):
    found, expected = report(tmp_path, HasUnused(), {"target_modules": ["layers.5"]}), real(tmp_path, HasUnused())
    assert parts(found.full) == {part: expected[part] for part in parts(found.full)}


class ChangesBatch(Net):
    """A step that can be taken once with a batch, with lists of its own and another model hidden in one."""

    def __init__(self):
        super().__init__()
        self.hidden, self.losses = [Net()], []
        self.register_module("inner", Net())

    def training_step(self, batch, batch_idx):
        y = batch.pop()
        x = batch.pop().mul_(2)
        loss = self.loss([x, y + self.hidden[0](x).detach() + self.inner(x)])
        self.losses.append(loss)
        return loss


def test_the_step_without_data_is_taken_on_a_copy_of_everything(tmp_path):
    runs = []
    for log_memory in (True, False):
        model = ChangesBatch()
        torch.manual_seed(0)
        trainer(tmp_path, LoRA(rank=2, target_modules=["layers.0"], log_memory=log_memory)).fit(model, data())
        runs.append(model)
    assert [loss.item() for loss in runs[0].losses] == [loss.item() for loss in runs[1].losses]
    assert digest(runs[0].state_dict()) == digest(runs[1].state_dict())


class Asserts(Net):
    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        assert loss.detach().isfinite()
        return loss


class TakesIterator(Net):
    def training_step(self, dataloader_iter):
        batch, _, _ = next(dataloader_iter)
        return self.loss(batch)


@pytest.mark.filterwarnings("ignore:.*`dataloader_iter`")
@pytest.mark.parametrize("model", [Asserts, TakesIterator])
def test_steps_that_read_values_or_take_an_iterator_are_measured_as_they_run(model, tmp_path):
    found, expected = report(tmp_path, model()), real(tmp_path, model())
    assert found.lora.activations == real(tmp_path, model(), LoRA(rank=2, log_memory=False))["activations"]
    assert parts(found.full) == {part: expected[part] for part in parts(found.full)}
    assert found.notes == ()


class ForbidsHooks(Net):
    def loss(self, batch):
        direction = torch.func.grad(lambda w: (batch[0] @ w).sum())(torch.ones(8))
        return super().loss(batch) + 0 * direction.sum()


class Compiled(Net):
    """One that a hook would make the compiler compile twice; here by a backend that compiles nothing."""

    def configure_model(self):
        self.layers.compile(backend=lambda graph, _: graph.forward)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated", "ignore:The .grad attribute")  # the compiler's own
@pytest.mark.parametrize("model", [ForbidsHooks, Compiled])
def test_code_in_which_no_hooks_may_stand_runs_and_the_activations_are_unknown(model, tmp_path):
    found = report(tmp_path, model())
    assert len(found.notes) == 1
    assert (found.lora.activations, found.full.activations) == (None, None)
    assert found.lora.source("activations") == "unknown"
    assert "unknown" in str(found)
    assert found.saved.activations is None
    assert found.full.total == found.full.parameters + found.full.gradients + found.full.optimizer
    found.plot()


# ----------------------------------------------------------------------------------------------------- optimizer states


@pytest.mark.parametrize("shape", [(7,), (70_000,), (5, 3), (300, 500), (8, 40, 60), (64, 32, 3, 3), (2, 8, 40, 3, 7)])
@pytest.mark.parametrize(
    "make",
    [
        torch.optim.AdamW,
        functools.partial(torch.optim.AdamW, amsgrad=True, foreach=True),
        torch.optim.Adafactor,
        torch.optim.RMSprop,
        torch.optim.NAdam,
        torch.optim.SGD,
    ],
)
def test_the_state_of_a_parameter_is_known_before_it_has_one(make, shape):
    optimizer = make([nn.Parameter(torch.ones(2, 2))])
    parameter = nn.Parameter(torch.ones(shape, dtype=torch.bfloat16))
    expected = make([parameter])
    parameter.grad = torch.ones_like(parameter)
    expected.step()
    derived = derived_nbytes([(parameter, (optimizer, optimizer.param_groups[0]))] * 2)
    assert derived == 2 * measured_nbytes([expected])


class Packed(torch.optim.Optimizer):
    """Moments in 8 bits, with a scale for each block of 256; small parameters' in 32, as 8-bit optimizers keep them."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})

    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            packed = p.numel() > 4096
            self.state[p]["moment"] = torch.zeros_like(p, dtype=torch.uint8 if packed else torch.float32)
            if packed:
                self.state[p]["scale"] = torch.zeros(-(-p.numel() // 256))


@pytest.mark.parametrize(("shape", "expected"), [((16, 8), 4 * 128), ((512, 512), 2**18 + 4 * 2**10)])
def test_packed_states_are_counted_as_they_are_packed(shape, expected):
    optimizer = Packed([nn.Parameter(torch.ones(2))])
    parameter = nn.Parameter(torch.empty(shape, device="cpu"))
    assert derived_nbytes([(parameter, (optimizer, optimizer.param_groups[0]))]) == expected


def test_the_state_of_an_optimizer_that_cannot_be_made_again_is_unknown(tmp_path):
    class NeedsMore(torch.optim.SGD):
        def __init__(self, params, secret):
            super().__init__(params, lr=0.1, momentum=secret)

    found = report(tmp_path, optimized(functools.partial(NeedsMore, secret=0.9))())
    assert found.full.optimizer is None
    assert found.lora.optimizer == found.lora.gradients


# ------------------------------------------------------------------------------------------------------ when it is read


class Infinite(Net):
    """The loss of the first two batches is infinite, so a GradScaler skips their steps."""

    calls = 0

    def loss(self, batch):
        self.calls += 1
        return super().loss(batch) * (float("inf") if self.calls <= 2 else 1)


class Seen(Callback):
    """After which batches there was a report, and what then hung on module and optimizers."""

    def __init__(self):
        self.reports, self.hooks = [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        hooks = sum(len(optimizer._optimizer_step_post_hooks) for optimizer in trainer.optimizers)
        self.hooks.append(hooks + ("training_step" in vars(pl_module)))

    def on_train_batch_end(self, trainer, pl_module, *_):
        (lora,) = (callback for callback in trainer.callbacks if isinstance(callback, LoRA))
        self.reports.append(lora.memory)


@pytest.mark.parametrize(
    ("model", "options", "first"),
    [
        (Net, {}, 0),
        (Net, {"accumulate_grad_batches": 3}, 2),
        (Infinite, {"plugins": True}, 2),
        (TwoOptimizersNet, {}, 0),
    ],
)
def test_it_is_read_once_at_the_first_real_step(model, options, first, tmp_path):
    if "plugins" in options:
        options = {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0))]}
    seen = Seen()
    trainer(tmp_path, LoRA(rank=2), seen, **options).fit(model(), data())
    assert [report is None for report in seen.reports] == [i < first for i in range(8)]
    assert len({id(report) for report in seen.reports[first:]}) == 1
    assert seen.hooks[0] > 0
    assert set(seen.hooks[first + 1 :]) == {0}
    assert seen.reports[-1].lora.optimizer > 0


def test_turned_off_it_leaves_nothing_and_changes_nothing(tmp_path):
    models, runs = [DropoutNet(), DropoutNet()], []
    for model, log_memory in zip(models, (True, False), strict=True):
        lora, seen = LoRA(rank=2, dropout=0.1, log_memory=log_memory), Seen()
        torch.manual_seed(0)
        trainer(tmp_path, lora, seen).fit(model, data())
        runs.append(seen)
    assert set(runs[1].reports) == {None}
    assert set(runs[1].hooks) == {0}
    assert digest(models[0].state_dict()) == digest(models[1].state_dict())


@pytest.mark.parametrize("tuner", [LearningRateFinder(num_training_steps=3), BatchSizeFinder(max_trials=1)])
def test_the_trials_of_a_tuner_are_not_the_run(tuner, tmp_path):
    seen = Seen()
    logger = Memo()
    datamodule = data() if isinstance(tuner, LearningRateFinder) else Sized()
    trainer(tmp_path, LoRA(rank=2), tuner, seen, logger=logger).fit(Net(), datamodule)
    assert len([name for name, *_ in logger.logged if name == "metrics"]) == 1
    assert seen.reports[0] is not None


# ---------------------------------------------------------------------------------------------------- where it is shown


def test_loggers_get_mebibytes_and_the_options_once(tmp_path):
    loggers, lora = [Memo(), Memo()], LoRA(rank=2)
    trainer(tmp_path, lora, logger=loggers, max_epochs=2).fit(Net(), data())
    for logger in loggers:
        metrics, options = (
            [what for kind, what in logger.logged if kind == wanted] for wanted in ("metrics", "hyperparameters")
        )
        assert len(metrics) == len(options) == 1
        assert metrics[0]["lora/memory/optimizer"] == lora.memory.lora.optimizer / 2**20
        assert metrics[0]["lora/memory_full/total"] == lora.memory.full.total / 2**20
        assert options[0]["lora"]["rank"] == 2


@pytest.mark.parametrize("printed", [True, False])
def test_a_table_is_printed_where_the_summary_is(printed, tmp_path, capsys):
    lora = LoRA(rank=2)
    trainer(tmp_path, lora, enable_model_summary=printed).fit(Net(), data())
    assert capsys.readouterr().out.count("Full fine-tuning") == printed
    assert "Activations" in str(lora.memory)
    assert "derived" in str(lora.memory)


def test_the_plot_stacks_the_parts_of_both(tmp_path):
    import matplotlib.pyplot as plt

    found = report(tmp_path, Net())
    figure, axes = found.plot()
    heights = [bar.get_height() for bar in axes.patches]
    assert sum(heights[::2]) == pytest.approx(found.full.total / 2**20)
    assert sum(heights[1::2]) == pytest.approx(found.lora.total / 2**20)
    assert found.plot(axes) == (figure, axes)
    plt.close("all")


def test_without_matplotlib_the_error_names_the_extra(tmp_path, monkeypatch):
    found = report(tmp_path, Net())
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ModuleNotFoundError, match=r"lightning-lora\[plot\]"):
        found.plot()


# ------------------------------------------------------------------------------------------------------ before training


def test_an_estimate_needs_no_memory_for_the_model(tmp_path):
    with torch.device("meta"):
        module = Net()
    found = estimate_memory(module, batches()[0], rank=2)
    assert all(parameter.is_meta for parameter in module.parameters())
    measured = report(tmp_path, Net())
    assert parts(found.lora) == parts(measured.lora)
    assert parts(found.full) == parts(measured.full)
    assert found.lora.source("parameters") == found.full.source("optimizer") == "derived"
    assert found.peak is None


def test_an_estimate_takes_example_input_and_optimizer():
    module = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    with pytest.raises(ValueError, match="example_input_array"):
        estimate_memory(module, rank=2)
    module.example_input_array = torch.randn(3, 64)
    found = estimate_memory(module, rank=2, optimizer=functools.partial(torch.optim.SGD, momentum=0.9))
    assert found.full.optimizer == found.full.gradients == found.full.parameters == 2 * 4 * 65 * 64
    assert found.full.activations == 2 * 4 * 3 * 64
    assert "AdamW" in estimate_memory(module, rank=2).notes[0]
    with pytest.raises(ValueError, match="nothing"):
        estimate_memory(module, rank=2, target_modules=["nothing"])


def test_log_memory_is_true_or_false():
    with pytest.raises(ValueError, match="log_memory"):
        LoRA(log_memory="no")
