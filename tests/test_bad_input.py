"""What goes wrong is said before the first step, by name, and the module is left as it was, bit for bit."""

import re
import signal

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import BackboneFinetuning, ModelPruning, StochasticWeightAveraging
from lightning.pytorch.strategies import Strategy
from models import Net, data, digest, layers, structure, trainer
from resume import SaveByHand
from torch import nn

from lightning_lora import LoRA, inject
from lightning_lora.errors import LoRAError

BAD = (ValueError, LoRAError)


class Steps(Callback):
    """Counts the batches that were trained on."""

    count = 0

    def on_train_batch_start(self, *_) -> None:
        self.count += 1


def refused(folder, model, *callbacks, match, error=BAD, ckpt_path=None, function="fit", **options):
    """Runs, expects ``error`` with every part of ``match`` before any step, and an untouched ``model``."""
    steps = Steps()
    before, bits = structure(model), digest(model.state_dict())
    run = trainer(folder, *callbacks, steps, **options)
    with pytest.raises(error) as caught:
        getattr(run, function)(model, data(), ckpt_path=ckpt_path)
    for part in match:
        assert part in str(caught.value)
    assert steps.count == 0
    assert structure(model) == before
    assert digest(model.state_dict()) == bits


# ------------------------------------------------------------------------------------------- options against the module


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"rank": 2, "rank_pattern": {"layers.0": 9}}, ["rank 9", "'layers.0'", "16 x 8", "at most 8"]),
        ({"rank": 2, "target_modules": ["layer.0"]}, ["`target_modules`", "'layer.0'", "Did you mean", "'layers.0'"]),
        ({"rank": 2, "target_modules": "lay.*6"}, ["`target_modules`", "'lay.*6'", "matches no module"]),
        ({"rank": 2, "target_modules": ["layers.1"]}, ["'layers.1'", "BatchNorm1d", "torch.nn.Linear"]),
        ({"rank": 2, "exclude_modules": ["layers.9"]}, ["`exclude_modules`", "'layers.9'"]),
        ({"rank": 2, "modules_to_save": ["head"]}, ["`modules_to_save`", "'head'"]),
        ({"rank": 2, "exclude_modules": ["layers.0", "layers.3", "layers.5"]}, ["leave no module to adapt"]),
        ({"rank": 2, "rank_pattern": {"layers.1": 1}}, ["`rank_pattern`", "'layers.1'", "matches no adapted module"]),
        ({"rank": 2, "alpha_pattern": {"layers.6": 1}}, ["`alpha_pattern`", "'layers.6'"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
@pytest.mark.parametrize("made_in", ["__init__", "configure_model"])
def test_options_that_do_not_fit_the_module_are_refused_by_fit(options, match, made_in, tmp_path):
    if made_in == "__init__":
        refused(tmp_path, Net(), LoRA(**options), match=match)
    else:
        with pytest.raises(BAD) as caught:
            trainer(tmp_path, LoRA(**options)).fit(Net(made_in=made_in), data())
        assert all(part in str(caught.value) for part in match)


def test_weights_on_the_meta_device_that_are_named_are_refused(tmp_path):
    model = Net()
    model.layers[3] = nn.Linear(16, 12, device="meta")
    before = structure(model)
    with pytest.raises(NotImplementedError) as caught:  # Lightning's own, when it moves what is left to the CPU
        trainer(tmp_path, LoRA(rank=2, target_modules=["layers.3"])).fit(model, data())
    assert "'layers.3' (Linear) is on the meta device" in str(caught.value.__context__)
    assert structure(model) == before


@pytest.mark.filterwarnings("ignore:Lazy modules")
@pytest.mark.filterwarnings("ignore:The total number of parameters detected")
def test_lazy_layers_that_are_named_are_refused(tmp_path):
    class Lazy(Net):
        def configure_optimizers(self):
            return torch.optim.SGD(self.layers[0].parameters(), lr=0.1)

    model = Lazy()
    model.layers[3] = nn.LazyLinear(12)
    names = [type(child) for child in model.modules()]
    with pytest.raises(LoRAError, match=r"'layers\.3' \(LazyLinear\) is lazy"):
        trainer(tmp_path, LoRA(rank=2, target_modules=["layers.0", "layers.3"])).fit(model, data())
    assert [type(child) for child in model.modules()] == names
    assert not hasattr(model.layers[0], "lora")


# -------------------------------------------------------------------------------------------------- adapters twice


def test_a_module_with_adapters_of_other_options_is_refused_and_those_of_the_same_are_adopted(tmp_path):
    model = Net()
    inject(model, rank=2)
    before, bits = structure(model), digest(model.state_dict())
    with pytest.raises(LoRAError, match=r"earlier `inject`.*rank=2.*rank=3"):
        trainer(tmp_path, LoRA(rank=3)).fit(model, data())
    assert (structure(model), digest(model.state_dict())) == (before, bits)

    merged = Net()
    model = Net()
    inject(model, rank=2)
    trainer(tmp_path, LoRA(rank=2)).fit(model, data())
    assert structure(model)["classes"] == structure(merged)["classes"]
    assert not torch.equal(model.layers[0].weight, merged.layers[0].weight)


# ------------------------------------------------------------------------------------------- what cannot be combined


@pytest.mark.parametrize(
    "make",
    [
        lambda: StochasticWeightAveraging(swa_lrs=0.1),
        lambda: BackboneFinetuning(unfreeze_backbone_at_epoch=1),
        lambda: ModelPruning("l1_unstructured", amount=0.1),
    ],
    ids=["StochasticWeightAveraging", "BackboneFinetuning", "ModelPruning"],
)
def test_callbacks_that_handle_the_same_weights_are_refused_by_name(make, tmp_path):
    callback = make()
    class_name = type(callback).__name__
    refused(tmp_path, Net(), LoRA(rank=2), callback, match=[f"cannot be combined with {class_name}", "Remove one"])


class ShardingStrategy(Strategy):
    """A strategy that is neither for one device nor DDP."""

    root_device = torch.device("cpu")
    is_global_zero = True

    def model_to_device(self) -> None: ...

    def reduce(self, tensor, *args, **kwargs):
        return tensor

    def all_gather(self, tensor, *args, **kwargs):
        return tensor

    def barrier(self, name=None) -> None: ...

    def broadcast(self, obj, src=0):
        return obj


def test_strategies_that_are_not_supported_are_refused_by_name(tmp_path):
    match = ["LoRA does not support ShardingStrategy", "SingleDeviceStrategy, DDPStrategy, ModelParallelStrategy"]
    strategy = ShardingStrategy()
    refused(tmp_path, Net(), LoRA(rank=2), match=match, strategy=strategy, accelerator="auto")


# --------------------------------------------------------------------------------------------------------- optimizers


class FreezesInOptimizers(Net):
    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        self.freeze()
        return optimizer


class FreezesAtStart(Net):
    def on_fit_start(self) -> None:
        self.freeze()


class Unfreezes(Net):
    def on_fit_start(self) -> None:
        self.unfreeze()


@pytest.mark.filterwarnings("ignore:Found .* in eval mode at the start of training")  # `freeze` does that too
@pytest.mark.parametrize(
    ("model", "match"),
    [
        (FreezesInOptimizers, ["The adapter of 'layers.0' is frozen"]),
        (FreezesAtStart, ["The adapter of 'layers.0' is frozen"]),
        (Unfreezes, ["The weight of 'layers.0' was unfrozen", "`modules_to_save`"]),
    ],
)
def test_adapters_that_would_not_be_trained_as_meant_are_refused(model, match, tmp_path):
    model, steps = model(), Steps()
    before, bits = structure(model), digest(model.state_dict())
    with pytest.raises(LoRAError) as caught:
        trainer(tmp_path, LoRA(rank=2), steps).fit(model, data())
    assert all(part in str(caught.value) for part in match)
    assert steps.count == 0
    assert structure(model) == before
    assert digest(model.state_dict()) == bits


@pytest.mark.filterwarnings("ignore:`LightningModule.configure_optimizers` returned `None`")
def test_a_module_without_any_optimizer_is_refused(tmp_path):
    class None_(Net):
        def configure_optimizers(self):
            return None

    model = None_()
    before = structure(model)
    with pytest.raises(LoRAError, match=r"No optimizer has the weights of 'layers\.0'"):
        trainer(tmp_path, LoRA(rank=2)).fit(model, data())
    assert structure(model) == before


# ---------------------------------------------------------------------------------------------------------- exceptions


def failing(hook, error, at=1, after_super=True):
    class Fails(Net):
        calls = 0

        def fail(self):
            self.calls += 1
            if self.calls == at:
                raise error

    def method(self, *args, **kwargs):
        if not after_super:
            self.fail()
        result = getattr(Net, hook)(self, *args, **kwargs)
        if after_super:
            self.fail()
        return result

    setattr(Fails, hook, method)
    return Fails()


@pytest.mark.parametrize("form", ["merged", "adapter"])
@pytest.mark.parametrize(
    "hook", ["setup", "configure_model", "configure_optimizers", "on_fit_start", "on_train_start", "training_step"]
)
def test_an_exception_before_the_first_step_leaves_the_module_as_it_was(hook, form, tmp_path):
    model = failing(hook, RuntimeError("the user's own"))
    before, bits = structure(model), digest({k: v for k, v in model.state_dict().items() if "1." not in k})
    with pytest.raises(RuntimeError, match="the user's own"):
        trainer(tmp_path, LoRA(rank=2, checkpoint=form)).fit(model, data())
    after = structure(model)
    after["attributes"][""] = [name for name in after["attributes"][""] if name != "calls"]
    assert after == before
    assert digest({k: v for k, v in model.state_dict().items() if "1." not in k}) == bits


@pytest.fixture
def interrupt_handler():
    """Lightning ignores further interrupts once there was one."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.mark.usefixtures("interrupt_handler")
@pytest.mark.parametrize("error", [RuntimeError("mid-run"), KeyboardInterrupt()], ids=["exception", "interrupt"])
def test_an_exception_in_mid_run_leaves_a_plain_module_with_what_was_trained_merged(error, tmp_path):
    model = failing("training_step", error, at=5, after_super=False)
    before = structure(model)
    with pytest.raises(SystemExit if isinstance(error, KeyboardInterrupt) else RuntimeError):
        trainer(tmp_path, LoRA(rank=2)).fit(model, data())
    after = structure(model)
    after["attributes"][""] = [name for name in after["attributes"][""] if name != "calls"]
    assert after == before

    expected = Net()
    trainer(tmp_path, LoRA(rank=2), limit_train_batches=4).fit(expected, data())
    assert digest(model.state_dict()) == digest(expected.state_dict())


@pytest.mark.parametrize("function", ["validate", "test", "predict"])
def test_an_exception_while_evaluating_leaves_the_module_as_it_was(function, tmp_path):
    hook = {"validate": "validation_step", "test": "test_step", "predict": "predict_step"}[function]
    model = failing(hook, RuntimeError("the user's own"))
    before, bits = structure(model), digest(model.state_dict())
    with pytest.raises(RuntimeError, match="the user's own"):
        getattr(trainer(tmp_path, LoRA(rank=2)), function)(model, data())
    after = structure(model)
    after["attributes"][""] = [name for name in after["attributes"][""] if name != "calls"]
    assert (after, digest(model.state_dict())) == (before, bits)


# --------------------------------------------------------------------------------------------------------- checkpoints


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A good checkpoint of rank 2 with a bias and a norm trained besides."""
    folder = tmp_path_factory.mktemp("good")
    trainer(folder, LoRA(rank=2), SaveByHand(folder / "saved.ckpt")).fit(Net(), data())
    return folder / "saved.ckpt"


def changed(file, folder, change):
    checkpoint = torch.load(file, weights_only=True)
    change(checkpoint["lightning_lora"])
    torch.save(checkpoint, folder / "changed.ckpt")
    return folder / "changed.ckpt"


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"rank": 3}, ["'layers.0'", "rank 2 in the checkpoint and 3"]),
        ({"rank": 2, "rank_pattern": {"layers.3": 4}}, ["'layers.3'", "rank 2 in the checkpoint and 4"]),
        ({"rank": 2, "alpha": 6}, ["'layers.0'", "scale 1.0 in the checkpoint and 3.0"]),
        ({"rank": 2, "adapter_dtype": "bfloat16"}, ["dtype torch.float32 in the checkpoint and torch.bfloat16"]),
        ({"rank": 2, "target_modules": ["layers.0"]}, ["'layers.3', 'layers.5'", "does not adapt"]),
        ({"rank": 2, "exclude_modules": ["layers.5"]}, ["'layers.5'", "does not adapt"]),
        ({"rank": 2, "bias": "all"}, ["trained nothing", "'layers.0.bias'", "`bias`"]),
        ({"rank": 2, "modules_to_save": ["layers.1"]}, ["'layers.1.weight', 'layers.1.bias'", "`modules_to_save`"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_a_file_of_other_options_is_refused_and_the_difference_named(options, match, file, tmp_path):
    refused(tmp_path, Net(), LoRA(**options), match=match, error=LoRAError, ckpt_path=file)


def test_a_file_with_fewer_targets_is_refused_and_the_new_ones_named(tmp_path):
    lora = LoRA(rank=2, target_modules=["layers.0"])
    trainer(tmp_path, lora, SaveByHand(tmp_path / "saved.ckpt")).fit(Net(), data())
    match = ["This run adapts 'layers.3', 'layers.5'", "has no adapters"]
    refused(tmp_path, Net(), LoRA(rank=2), match=match, ckpt_path=tmp_path / "saved.ckpt")


def test_a_file_of_another_base_is_refused_where_exactness_is_asked_for(file, tmp_path):
    match = ["other weights", "'layers.0.weight'", "`exact_resume=True`"]
    refused(tmp_path, Net(seed=1), LoRA(rank=2, exact_resume=True), match=match, ckpt_path=file)


@pytest.mark.parametrize("function", ["fit", "validate", "test", "predict"])
def test_an_adapter_file_of_another_base_is_refused(function, tmp_path):
    lora = LoRA(rank=2, checkpoint="adapter")
    trainer(tmp_path, lora, SaveByHand(tmp_path / "saved.ckpt")).fit(Net(), data())
    model = Net()
    nn.init.zeros_(model.layers[3].weight)
    match = ["holds adapters only", "'layers.3.weight'", "same pretrained weights"]
    refused(tmp_path, model, LoRA(rank=2), match=match, ckpt_path=tmp_path / "saved.ckpt", function=function)


@pytest.mark.parametrize("part", [0, 1, 100, 0.5, 0.99, -1], ids=str)
def test_a_truncated_file_is_refused_by_its_name(part, file, tmp_path):
    whole = file.read_bytes()
    end = int(len(whole) * part) if isinstance(part, float) else part
    (tmp_path / "half.ckpt").write_bytes(whole[:end])
    for function in ("fit", "validate"):
        match = ["half.ckpt", "truncated"]
        refused(tmp_path, Net(), LoRA(rank=2), match=match, ckpt_path=tmp_path / "half.ckpt", function=function)


def test_a_newer_format_is_refused_with_the_formats_that_can_be_read(file, tmp_path):
    newer = changed(file, tmp_path, lambda entry: entry.update(version=7))
    for function in ("fit", "validate"):
        match = ["format 7", "up to 3", "Upgrade"]
        refused(tmp_path, Net(), LoRA(rank=2), match=match, ckpt_path=newer, function=function)


MALFORMED = {
    "no version": (lambda entry: entry.pop("version"), "no version"),
    "version is text": (lambda entry: entry.update(version="1"), "no version"),
    "version is no number": (lambda entry: entry.update(version=float("nan")), "no version"),
    "version is 0": (lambda entry: entry.update(version=0), "no version"),
    "version is True": (lambda entry: entry.update(version=True), "no version"),
    "no adapters": (lambda entry: entry.pop("adapters"), "`adapters` is missing"),
    "adapters are a list": (lambda entry: entry.update(adapters=[1]), "`adapters` is missing or no Mapping"),
    "no base": (lambda entry: entry.pop("base"), "`base`"),
    "an unknown form": (
        lambda entry: entry.update(form="both"),
        "must be one of 'merged', 'adapter', got 'both'",
    ),
    "trained is text": (lambda entry: entry.update(trained="x"), "`trained`"),
    "trained holds lists": (lambda entry: entry.update(trained=[["x"]]), "`trained`"),
    "no A": (lambda entry: entry["adapters"]["layers.0"].pop("A"), "'layers.0'"),
    "A is text": (lambda entry: entry["adapters"]["layers.0"].update(A="x"), "'layers.0'"),
    "A is a vector": (lambda entry: entry["adapters"]["layers.0"].update(A=torch.ones(3)), "'layers.0'"),
    "A holds integers": (lambda entry: entry["adapters"]["layers.0"].update(A=torch.ones(2, 8).long()), "'layers.0'"),
    "ranks differ": (lambda entry: entry["adapters"]["layers.0"].update(A=torch.ones(3, 8)), "'layers.0'"),
    "A is too wide": (lambda entry: entry["adapters"]["layers.0"].update(A=torch.ones(2, 9)), "'layers.0'"),
    "scale is text": (lambda entry: entry["adapters"]["layers.0"].update(scale="x"), "'layers.0'"),
    "scale is not a number": (lambda entry: entry["adapters"]["layers.0"].update(scale=float("nan")), "'layers.0'"),
    "no transposed": (lambda entry: entry["adapters"]["layers.0"].pop("transposed"), "'layers.0'"),
    "an adapter is None": (lambda entry: entry["adapters"].update({"layers.0": None}), "'layers.0'"),
    "fingerprint is a number": (lambda entry: entry["base"].update({"layers.0.weight": 5}), "'layers.0.weight'"),
    "fingerprint of no dtype": (lambda entry: entry["base"].update({"layers.0.weight": "nn:0"}), "'layers.0.weight'"),
    "base of a layer without adapter": (lambda entry: entry["base"].update({"other": "float32:0"}), "'other'"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_entry_is_refused_and_the_part_named(name, file, tmp_path):
    change, part = MALFORMED[name]
    refused(tmp_path, Net(), LoRA(rank=2), match=[part], ckpt_path=changed(file, tmp_path, change))


@pytest.mark.parametrize("entry", [None, 5, "text", [1], {}], ids=repr)
def test_an_entry_that_is_no_mapping_is_refused_unless_there_is_none(entry, file, tmp_path):
    checkpoint = torch.load(file, weights_only=True)
    checkpoint["lightning_lora"] = entry
    torch.save(checkpoint, tmp_path / "changed.ckpt")
    if entry is None:
        trainer(tmp_path, LoRA(rank=2)).validate(Net(), data(), ckpt_path=tmp_path / "changed.ckpt", verbose=False)
    else:
        refused(tmp_path, Net(), LoRA(rank=2), match=["malformed"], ckpt_path=tmp_path / "changed.ckpt")


def test_resuming_a_file_of_weights_only_fails_as_lightning_does_and_leaves_a_plain_module(file, tmp_path):
    checkpoint = torch.load(file, weights_only=True)
    for key in ("callbacks", "optimizer_states", "lr_schedulers"):
        del checkpoint[key]
    torch.save(checkpoint, tmp_path / "weights.ckpt")
    model = Net()
    before = structure(model)
    with pytest.raises(KeyError, match="checkpoint contains only the model"):
        trainer(tmp_path, LoRA(rank=2)).fit(model, data(), ckpt_path=tmp_path / "weights.ckpt")
    assert structure(model) == before
    assert re.fullmatch("layers.0.weight", next(iter(model.state_dict())))
    assert not torch.equal(model.layers[0].weight, layers()[0].weight)


def test_exact_resume_is_true_or_false():
    with pytest.raises(ValueError, match=r"`exact_resume` must be True or False, got 'no'"):
        LoRA(exact_resume="no")
