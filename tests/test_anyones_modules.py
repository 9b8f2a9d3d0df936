"""Modules as other people write them: classes, hooks and state dicts of their own, weights that appear or thaw late."""

import copy
import pickle
import warnings
from abc import ABC
from pathlib import Path
from typing import ClassVar, Generic, TypeVar

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import LearningRateFinder, ModelCheckpoint
from lightning.pytorch.tuner import Tuner
from lightning.pytorch.utilities import grad_norm
from models import Digest, Net, ResumableLoader, batches, data, digest, structure, trainer
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.serialization import safe_globals

from lightning_lora import LoRA, adapters, inject, merged_state_dict
from lightning_lora.errors import LoRAError

GRADIENTS = ("factored", "merged", "projected")
X = torch.cat([x for x, _ in batches()])


class Saves(Callback):
    """Saves after a step, and keeps what the adapted module computes when training ends, and its merged weights."""

    def __init__(self, file: Path | None = None, step: int = 4) -> None:
        self.file, self.step = file, step

    def on_train_batch_end(self, trainer, *_) -> None:
        if self.file is not None and trainer.global_step == self.step:
            trainer.save_checkpoint(self.file)

    def on_train_end(self, trainer, pl_module) -> None:
        self.names = list(adapters(pl_module))
        pl_module.eval()
        with torch.no_grad():
            self.output = pl_module(X)
        pl_module.train()


def read(file: Path) -> dict:
    return torch.load(file, weights_only=True)


def assert_trains_saves_and_resumes(make, folder: Path, bitwise: bool = True, **options) -> None:
    """What ``make()`` is trained to is what is left, and a file of the middle resumes to the same bits, or nearly."""
    file, model, saves, first = folder / "middle.ckpt", make(), Saves(folder / "middle.ckpt"), Digest()
    before = structure(model)
    trainer(folder, LoRA(rank=2, **options), saves, first).fit(model, ResumableLoader())
    assert saves.names
    assert structure(model) == before
    torch.testing.assert_close(model.eval()(X), saves.output)
    second, again = Digest(), Saves()
    trainer(folder, LoRA(rank=2, **options), second, again).fit(make(), ResumableLoader(), ckpt_path=file)
    assert second.steps == first.steps
    if bitwise:
        assert (second.module, second.optimizers) == (first.module, first.optimizers)
    torch.testing.assert_close(again.output, saves.output)


# ------------------------------------------------------------------------------------------------------- lazy layers


class Lazy(Net):
    """A lazy layer, which gets its weight in the first batch, or never."""

    def __init__(self, used: bool = True) -> None:
        super().__init__()
        self.late = nn.LazyLinear(4)
        self.used = used

    def forward(self, x: Tensor) -> Tensor:
        output = super().forward(x)
        return output + self.late(x) if self.used else output


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("used", [True, False])
def test_a_lazy_layer_that_is_not_targeted_is_left_out_and_all_else_works(used, gradient, tmp_path):
    model, lora, saves = Lazy(used), LoRA(rank=2, gradient=gradient), Saves(tmp_path / "middle.ckpt")
    trainer(tmp_path, lora, saves).fit(model, ResumableLoader())
    assert saves.names == ["layers.0", "layers.3", "layers.5"]
    assert lora.memory is not None
    assert lora.memory.lora.parameters > 0
    torch.testing.assert_close(model.eval()(X), saves.output)
    assert model.late.weight.requires_grad
    resumed = trainer(tmp_path, LoRA(rank=2, gradient=gradient))
    with safe_globals([UninitializedParameter]):
        resumed.fit(Lazy(used), ResumableLoader(), ckpt_path=tmp_path / "middle.ckpt")
    assert resumed.global_step == 8


@pytest.mark.filterwarnings("ignore:The total number of parameters detected may be inaccurate")
def test_a_file_of_adapters_leaves_out_a_lazy_layer_that_was_never_used(tmp_path):
    saves = Saves(tmp_path / "middle.ckpt")
    trainer(tmp_path, LoRA(rank=2, checkpoint="adapter"), saves, enable_model_summary=True).fit(
        Lazy(False), ResumableLoader()
    )
    resumed = trainer(tmp_path, LoRA(rank=2, checkpoint="adapter"))
    with safe_globals([UninitializedParameter]):
        resumed.fit(Lazy(False), ResumableLoader(), ckpt_path=tmp_path / "middle.ckpt")
    assert resumed.global_step == 8


# ------------------------------------------------------------------------------------------- hooks set on the instance


def with_hook(name: str, heard: list) -> Net:
    """A module that has a hook of its own on the instance."""
    model = Net(made_in="configure_model" if name == "configure_model" else "__init__")

    def configure_model() -> None:
        heard.append(name)
        Net.configure_model(model)

    def on_save_checkpoint(checkpoint: dict) -> None:
        heard.append(sorted(checkpoint["state_dict"]))

    def configure_optimizers():
        heard.append([n for n, p in model.named_parameters() if p.requires_grad])
        return torch.optim.SGD(model.parameters(), lr=0.1)

    def on_train_start() -> None:
        heard.append(name)

    hooks = (configure_model, on_save_checkpoint, configure_optimizers, on_train_start)
    vars(model)[name] = next(hook for hook in hooks if hook.__name__ == name)
    return model


HOOKS = ("configure_model", "on_save_checkpoint", "configure_optimizers", "on_train_start")


@pytest.mark.parametrize("gradient", ["factored", "merged"])
@pytest.mark.parametrize("name", HOOKS)
def test_a_hook_set_on_the_instance_is_called_and_stays_and_lora_trains_and_saves(name, gradient, tmp_path):
    heard: list = []
    model, saves = with_hook(name, heard), Saves(tmp_path / "middle.ckpt", step=8)
    hook = vars(model)[name]
    trainer(tmp_path, LoRA(rank=2, gradient=gradient), saves).fit(model, data())
    assert saves.names == ["layers.0", "layers.3", "layers.5"]
    plain = Net()
    expected = {
        "on_save_checkpoint": sorted(plain.state_dict()),
        "configure_optimizers": [n for n, _ in plain.named_parameters()],
    }
    assert heard == [expected.get(name, name)]
    assert vars(model)[name] is hook
    plain.load_state_dict(read(tmp_path / "middle.ckpt")["state_dict"])
    torch.testing.assert_close(plain.eval()(X), saves.output)
    assert digest(plain.state_dict()) == digest(model.state_dict())


class SetsHooks(Net):
    """Sets a hook on itself, where ``at`` says."""

    def __init__(self, at: str = "setup") -> None:
        super().__init__()
        self.at, self.saved = at, 0

    def _set(self, at: str) -> None:
        if at == self.at:
            self.on_save_checkpoint = self._saves

    def _saves(self, checkpoint: dict) -> None:
        self.saved += 1

    def setup(self, stage: str) -> None:
        self._set("setup")

    def on_fit_start(self) -> None:
        self._set("on_fit_start")

    def on_train_start(self) -> None:
        self._set("on_train_start")

    def on_train_batch_start(self, *_) -> None:
        self._set("on_train_batch_start")


@pytest.mark.parametrize("at", ["setup", "on_fit_start", "on_train_start", "on_train_batch_start"])
def test_a_hook_that_the_module_sets_in_the_run_is_wrapped_too(at, tmp_path):
    model, saves = SetsHooks(at), Saves(tmp_path / "middle.ckpt", step=8)
    trainer(tmp_path, LoRA(rank=2), saves).fit(model, data())
    file = read(tmp_path / "middle.ckpt")
    assert model.saved == 1
    assert list(file["lightning_lora"]["adapters"]) == saves.names
    assert digest(file["state_dict"]) == digest(model.state_dict())


class Replaces(Callback):
    """Takes the place of a hook of the module's, after the callback has wrapped it."""

    def __init__(self, name: str) -> None:
        self.name = name

    def setup(self, trainer, pl_module, stage) -> None:
        vars(pl_module)[self.name] = lambda **_: None


def test_a_hook_that_no_longer_reaches_the_run_is_an_error_and_no_silent_full_fine_tuning(tmp_path):
    model = Net()
    with pytest.raises(LoRAError, match=r"did not hear of `Net\.setup`: it was replaced on the instance"):
        trainer(tmp_path, LoRA(rank=2), Replaces("setup")).fit(model, data())
    assert digest(model.state_dict()) == digest(Net().state_dict())


# -------------------------------------------------------------------------- the module's own class, while it is adapted


class MakesItself(Net):
    """Makes others of its own class in the run."""

    def on_validation_end(self) -> None:
        self.plain = [type(self)()]  # in a list: no modules of this one
        self.copies = [copy.deepcopy(self.layers), pickle.loads(pickle.dumps(self.layers))]
        self.computed = self(X)

    def on_train_end(self) -> None:
        if self.trainer.checkpoint_callback is not None:
            self.best = [type(self).load_from_checkpoint(self.trainer.checkpoint_callback.best_model_path)]


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_a_module_may_make_and_load_others_of_its_class_in_the_run(gradient, tmp_path):
    model = MakesItself()
    saves = ModelCheckpoint(tmp_path, filename="best", monitor="val_loss")
    trainer(tmp_path, LoRA(rank=2, gradient=gradient), saves).fit(model, data(), data())
    (plain,), (best,) = model.plain, model.best
    assert type(model) is type(plain) is type(best) is MakesItself
    assert structure(plain) == {**structure(MakesItself()), "parameters": structure(plain)["parameters"]}
    assert not adapters(best)
    for other in (best, *model.copies):
        torch.testing.assert_close(other.eval()(X), model.computed)
    trainer(tmp_path, LoRA(rank=2)).fit(best.train(), data())
    assert not torch.equal(best.layers[0].weight, model.layers[0].weight)


T = TypeVar("T")
HEARD: list[str] = []


class AbstractFirst(ABC, Net):
    """``ABC`` first, as in pytorch-forecasting."""


class GenericFirst(Generic[T], Net):
    """``Generic`` first."""


class Parametrised(GenericFirst[int]):
    """With its parameter given."""


class Slots(Net):
    """Slots beside the dictionary."""

    __slots__ = ("more",)

    def __init__(self) -> None:
        super().__init__()
        self.more = 1


class Registry(Net):
    """Hears of its subclasses, which give it arguments."""

    names: ClassVar[list[str]] = []

    def __init_subclass__(cls, key: str, **kwargs) -> None:
        super().__init_subclass__(**kwargs)
        Registry.names.append(key)


class Registered(Registry, key="registered"):
    """In the registry."""


class Meta(type(Net)):
    """A metaclass that counts classes."""

    made: ClassVar[int] = 0

    def __init__(cls, *args) -> None:
        super().__init__(*args)
        Meta.made += 1


class OfMeta(Net, metaclass=Meta):
    """Of another metaclass."""


@pytest.mark.parametrize("kind", [AbstractFirst, GenericFirst, Parametrised, Slots, Registered, OfMeta])
def test_a_class_of_any_make_is_trained_saved_and_resumed_and_stays_the_users(kind, tmp_path):
    assert_trains_saves_and_resumes(kind, tmp_path)
    assert Registry.names == ["registered"]
    assert Meta.made == 1


# ------------------------------------------------------------------------------------ state dicts that leave keys out


class WithEncoder(LightningModule):
    """An encoder, and a head on it."""

    def __init__(self) -> None:
        super().__init__()
        self.save_hyperparameters()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.encoder = nn.Sequential(nn.Linear(8, 16), nn.Tanh())
            self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x))

    def training_step(self, batch, batch_idx):
        return nn.functional.mse_loss(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.05)


class LeavesOutFrozen(WithEncoder):
    """Gives what requires a gradient, as Lightning's documentation shows."""

    def __init__(self) -> None:
        super().__init__()
        self.strict_loading = False

    def state_dict(self, *args, **kwargs):
        kept = {name for name, p in self.named_parameters() if p.requires_grad}
        return {name: value for name, value in super().state_dict(*args, **kwargs).items() if name in kept}


class LeavesOutTheEncoder(WithEncoder):
    """Gives all but the encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.strict_loading = False

    def state_dict(self, *args, **kwargs):
        return {k: v for k, v in super().state_dict(*args, **kwargs).items() if not k.startswith("encoder.")}


class KeepsAdaptersOnly(WithEncoder):
    """Keeps what is called `lora` alone, and loads without asking, as fish-speech does."""

    def on_save_checkpoint(self, checkpoint) -> None:
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if "lora" in k}

    def load_state_dict(self, state, strict=True, **kwargs):
        return super().load_state_dict(state, strict=False, **kwargs)


@pytest.mark.filterwarnings("ignore:Found keys that are in the model state dict but not in the checkpoint")
@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("kind", [LeavesOutFrozen, LeavesOutTheEncoder, KeepsAdaptersOnly])
def test_a_module_whose_file_lacks_weights_trains_saves_resumes_and_is_merged_and_the_warning_names_them(
    kind, gradient, tmp_path
):
    with pytest.warns(UserWarning, match=r"leaves out the weights of 'encoder\.0'.*so the file is no whole model"):
        # W is W0 and the increment, formed anew, where the file has no W
        assert_trains_saves_and_resumes(kind, tmp_path, gradient == "factored", gradient=gradient)
    assert "encoder.0.weight" not in read(tmp_path / "middle.ckpt")["state_dict"]


@pytest.mark.filterwarnings("ignore:Found keys that are in the model state dict but not in the checkpoint")
@pytest.mark.parametrize("kind", [LeavesOutFrozen, LeavesOutTheEncoder])
def test_a_file_of_adapters_is_not_missed_what_it_leaves_out_in_any_case(kind, tmp_path):
    assert_trains_saves_and_resumes(kind, tmp_path, checkpoint="adapter")


def test_a_trained_head_that_a_hook_leaves_out_is_named_in_the_warning(tmp_path):
    with pytest.warns(UserWarning, match=r"leaves out the weights of .*'head\.weight'"):
        trainer(tmp_path, LoRA(rank=2, modules_to_save=["head"], checkpoint="adapter"), Saves(tmp_path / "a.ckpt")).fit(
            KeepsAdaptersOnly(), data()
        )


# ------------------------------------------------------------------------------------------ weights unfrozen in mid-run


class Unfreezes(WithEncoder):
    """Unfreezes a part of itself, when its second epoch starts."""

    part = "encoder"

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(super().forward(x))

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            self.get_submodule(self.part).requires_grad_(True)


class UnfreezesItsNorm(Unfreezes):
    """What it unfreezes has no adapter."""

    part = "norm"


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_an_adapted_weight_that_is_unfrozen_is_an_error_at_that_moment_and_the_module_is_merged(gradient, tmp_path):
    model = Unfreezes()
    run = trainer(tmp_path, LoRA(rank=2, gradient=gradient), max_epochs=3)
    with pytest.raises(LoRAError, match=r"The weight of 'encoder\.0' was unfrozen.*`modules_to_save`"):
        run.fit(model, data())
    assert run.global_step == 8
    assert not adapters(model)
    assert digest(merged_state_dict(model)) == digest(model.state_dict())
    assert not torch.equal(model.head.weight, WithEncoder().head.weight)


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("step", [11, 16])
def test_another_weight_that_is_unfrozen_is_trained_saved_and_resumed(step, gradient, tmp_path):
    saves, first, second = Saves(tmp_path / "middle.ckpt", step), Digest(), Digest()
    model = UnfreezesItsNorm()
    trainer(tmp_path, LoRA(rank=2, gradient=gradient), saves, first, max_epochs=3).fit(model, ResumableLoader())
    assert not torch.equal(model.norm.weight, torch.ones(4))
    file = read(tmp_path / "middle.ckpt")
    assert file["lightning_lora"]["trained"] == ["norm.weight", "norm.bias"]
    torch.testing.assert_close(model.eval()(X), saves.output)
    trainer(tmp_path, LoRA(rank=2, gradient=gradient), second, max_epochs=3).fit(
        UnfreezesItsNorm(), ResumableLoader(), ckpt_path=tmp_path / "middle.ckpt"
    )
    assert (second.steps, second.module, second.optimizers) == (first.steps, first.module, first.optimizers)


# --------------------------------------------------------------------------------------------- an error inside a tuner


class TwoOptimizers(Net):
    """No tuner takes two."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self):
        return [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in (self.layers[0], self.layers[3])]


@pytest.mark.parametrize("way", ["tuner", "callback"])
def test_an_error_in_the_search_for_a_rate_leaves_the_module_plain(way, tmp_path):
    model = TwoOptimizers()
    before, bits = structure(model), digest(model.state_dict())
    callbacks = [LoRA(rank=2, exclude_modules=["layers.5"]), *([LearningRateFinder()] if way == "callback" else [])]
    run = trainer(tmp_path, *callbacks)
    search = run.fit if way == "callback" else Tuner(run).lr_find
    with pytest.raises(Exception, match="optimizer"):
        search(model, data())
    assert (structure(model), digest(model.state_dict())) == (before, bits)


class StepsWithTheBareOptimizer(WithEncoder):
    """Calls the optimizer that Lightning has not wrapped, and clears the gradients last."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers(use_pl_optimizer=False)
        super().training_step(batch, batch_idx).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_a_module_that_steps_by_itself_is_not_told_that_no_gradient_came(gradient, tmp_path):
    model, saves = StepsWithTheBareOptimizer(), Saves()
    before = model(X)
    trainer(tmp_path, LoRA(rank=2, gradient=gradient), saves).fit(model, data())
    assert not torch.allclose(before, saves.output)


# ------------------------------------------------------------------------- code that goes through what is trained


class PerturbsByHand(WithEncoder):
    """Takes the norm of all gradients, as SAM by hand does."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        self.manual_backward(super().training_step(batch, batch_idx))
        self.norm = torch.stack([p.grad.norm() for p in self.parameters() if p.requires_grad]).norm()
        self.optimizers().step()


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_code_that_finds_no_trained_parameter_is_told_of_the_mode_in_which_it_does(gradient, tmp_path):
    model = PerturbsByHand()
    run = trainer(tmp_path, LoRA(rank=2, gradient=gradient))
    if gradient == "factored":
        run.fit(model, data())
        assert model.norm > 0
        return
    with pytest.raises(LoRAError, match=r"perturbations by hand .*`gradient='factored'`, in which they are"):
        run.fit(model, data())
    assert not adapters(model)


class AveragesStateDicts(Callback):
    """Moves the state dict of a copy, made when training starts, towards the module's."""

    def on_train_start(self, trainer, pl_module) -> None:
        self.copy = copy.deepcopy(pl_module)

    def on_train_batch_end(self, trainer, pl_module, *_) -> None:
        for mine, value in zip(self.copy.state_dict().values(), pl_module.state_dict().values(), strict=True):
            mine.lerp_(value, 0.5)


class LoadsWhatItAverages(AveragesStateDicts):
    def on_train_batch_end(self, trainer, pl_module, *_) -> None:
        state = self.copy.state_dict()
        for key, value in pl_module.state_dict().items():
            state[key].lerp_(value, 0.5)
        self.copy.load_state_dict(state)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_an_average_that_is_written_to_a_state_dict_is_right_or_a_warning_says_that_it_is_lost(gradient, tmp_path):
    outputs = {}
    for kind in (AveragesStateDicts, LoadsWhatItAverages):
        model, average = WithEncoder(), kind()
        before = model(X)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer(tmp_path, LoRA(rank=2, gradient=gradient), average).fit(model, data())
        told = any("`state_dict()` of a module with adapters gave was written to" in str(w.message) for w in caught)
        outputs[kind] = average.copy(X)
        assert told == (gradient == "factored" and kind is AveragesStateDicts)
        assert torch.allclose(outputs[kind], before) == told
    if gradient != "factored":
        torch.testing.assert_close(*outputs.values())


def test_a_complex_weight_is_refused_as_what_it_is():
    model = nn.Sequential(nn.Linear(8, 4, dtype=torch.complex64), nn.Linear(4, 4))
    with pytest.raises(LoRAError, match=r"The weight of '0' \(Linear\) is torch.complex64"):
        inject(model, target_modules=["0"])
    inject(model)
    assert list(adapters(model)) == ["1"]


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_a_module_that_logs_the_norms_of_its_gradients_finds_those_of_a_and_b(gradient, tmp_path):
    class LogsNorms(Net):
        def on_before_optimizer_step(self, optimizer):
            self.norms = grad_norm(self, 2)
            self.seen = [name for name, _ in self.named_parameters() if "lora" in name]

        def on_train_batch_end(self, *_):
            self.later = [name for name, _ in self.named_parameters() if "lora" in name]

    model = LogsNorms()
    trainer(tmp_path, LoRA(rank=2, gradient=gradient), limit_train_batches=2).fit(model, data())
    assert len(model.seen) == 6
    assert all(any(name in key for key in model.norms) for name in model.seen)
    assert model.norms["grad_2.0_norm_total"] > 0
    assert bool(model.later) is (gradient == "factored")
