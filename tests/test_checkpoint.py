"""Checkpoints of real runs: what is in the files, who can read them, and that a run resumes bit for bit."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.strategies import SingleDeviceStrategy
from models import Digest, Net, ResumableLoader, batches, data, digest, layers, structure, trainer
from resume import RESUMED, WEIGHTS_ONLY, SaveByHand
from zoo import TiedNet

import lightning_lora
from lightning_lora import Adapter, LoRA, adapters, inject, merge, merged_state_dict
from lightning_lora.checkpoint import read as reading
from lightning_lora.checkpoint import write
from lightning_lora.checkpoint.fingerprints import Fingerprints
from lightning_lora.checkpoint.format import NOTICE, weight_key
from lightning_lora.injection.options import Options
from lightning_lora.weights.digest import fingerprint

HERE = Path(__file__).parent
OUTSIDER = """
import json, sys
sys.modules["lightning_lora"] = None
import torch
import models, zoo
outputs = {}
for name, model in json.loads(sys.argv[2]).items():
    file = f"{sys.argv[1]}/{name}/saved.ckpt"
    state = torch.load(file, weights_only=True)["state_dict"]
    model = getattr(zoo, model, None) or getattr(models, model)
    module = model()
    module.load_state_dict(state, strict=True)
    assert all(torch.equal(value, state[key].to(value.dtype)) for key, value in module.state_dict().items())
    if "two" not in name and "setup" not in name:
        loaded = model.load_from_checkpoint(file, weights_only=True).state_dict()
        assert all(torch.equal(loaded[key], value) for key, value in module.state_dict().items())
    outputs[name] = module.eval()(models.batches()[0][0]).tolist()
print(json.dumps(outputs))

del sys.modules["lightning_lora"]
import pathlib, resume
resume.main(pathlib.Path(sys.argv[1]))
"""


def printed_by_a_new_process(*command: str) -> list[str]:
    path = os.pathsep.join([str(Path(lightning_lora.__file__).parents[1]), str(HERE)])
    done = subprocess.run(
        [sys.executable, *command], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


ALL = {**RESUMED, **WEIGHTS_ONLY}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One checkpoint of every kind, each in the folder of its name."""
    folder = tmp_path_factory.mktemp("runs")
    for name, run in ALL.items():
        (folder / name).mkdir()
        run.saved(folder / name).rename(folder / name / "saved.ckpt")
    return folder


@pytest.fixture(scope="module")
def new_process(folder):
    """What the models compute in a process without the library, and what the runs that it resumes with it end with."""
    models = {name: type(ALL[name].model()).__name__ for name in MERGED}
    *_, outputs, results = printed_by_a_new_process("-c", OUTSIDER, str(folder), json.dumps(models))
    return json.loads(outputs), json.loads(results)


MERGED = [name for name, run in ALL.items() if run.lora.get("checkpoint") != "adapter"]
ADAPTER = [name for name in ALL if name not in MERGED]


def read(file):
    return torch.load(file, weights_only=True)


def fitted(folder, *callbacks, model=None, loader=None, **options):
    """A Trainer and the module it has trained, with LoRA of rank 2 unless ``callbacks`` have another."""
    model = Net() if model is None else model
    if not any(isinstance(callback, LoRA) for callback in callbacks):
        callbacks = (LoRA(rank=2), *callbacks)
    run = trainer(folder, *callbacks, **options)
    run.fit(model, data() if loader is None else loader)
    return run, model


# ------------------------------------------------------------------------------------------------- resuming, bitwise


@pytest.mark.parametrize("name", RESUMED)
def test_a_new_process_resumes_to_the_same_bits_as_the_uninterrupted_run(name, new_process, tmp_path):
    expected = RESUMED[name].uninterrupted(tmp_path)
    assert new_process[1][name] == [expected.module, expected.optimizers, expected.steps, []]
    assert any("lora" in key for key in expected.names)


class AtException(Callback):
    """The state of the module and its optimizers when a batch fails, or when training starts."""

    def digest(self, trainer, pl_module) -> str:
        return digest([pl_module.state_dict(), [optimizer.state_dict() for optimizer in trainer.optimizers]])

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.state = self.digest(trainer, pl_module)


class FailsAtBatch5(Net):
    def training_step(self, batch, batch_idx):
        if batch_idx == 5:
            raise RuntimeError("batch 5 is bad")
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("form", ["merged", "adapter"])
def test_a_file_written_on_exception_resumes_with_the_bits_the_exception_found(form, tmp_path):
    before, model = AtException(), FailsAtBatch5()
    writer = OnExceptionCheckpoint(tmp_path)
    with pytest.raises(RuntimeError, match="batch 5 is bad"):
        fitted(tmp_path, LoRA(rank=2, checkpoint=form), before, writer, model=model, loader=ResumableLoader())

    after = AtStart()
    run = trainer(tmp_path, LoRA(rank=2, checkpoint=form), after, max_epochs=2)
    run.fit(Net(), ResumableLoader(), ckpt_path=writer.ckpt_path)
    assert after.state == before.state


class AtStart(AtException):
    def on_train_start(self, trainer, pl_module) -> None:
        self.state = self.digest(trainer, pl_module)

    def on_train_batch_start(self, *_) -> None:
        pass


# --------------------------------------------------------------------------------------------------- what is in files


def base_of(run):
    """The plain model of ``run`` in the dtype that its Trainer gives it; with 64-true some are made in it."""
    dtype = {"bf16-true": torch.bfloat16, "64-true": torch.float64}.get(run.options.get("precision"), torch.float32)
    torch.set_default_dtype(torch.float64 if dtype == torch.float64 else torch.float32)
    try:
        model = run.model()
        model.setup("fit")
        model.configure_model()
    finally:
        torch.set_default_dtype(torch.float32)
    return model.to(dtype)


def is_factored(run):
    return run.lora.get("gradient", "factored") == "factored"


@pytest.mark.parametrize("name", MERGED)
def test_a_merged_file_has_the_plain_models_keys_in_its_order_with_its_shapes_and_dtypes(name, folder):
    file, plain = read(folder / name / "saved.ckpt"), base_of(ALL[name])
    expected = [(key, value.shape, value.dtype) for key, value in plain.state_dict().items()]
    assert [(key, value.shape, value.dtype) for key, value in file["state_dict"].items()] == expected
    assert all("lora" not in key for key in file["state_dict"]._metadata)
    adapted = {weight_key(adapter, file["state_dict"]) for adapter in file["lightning_lora"]["adapters"]}
    assert set(file["lightning_lora"]["base"]) == (adapted if is_factored(ALL[name]) else set())
    for entry in file["lightning_lora"]["adapters"].values():
        assert {key: type(value) for key, value in entry.items() if key != "padding_idx"} == {
            "decomposition": str,
            "A": torch.Tensor,
            "B": torch.Tensor,
            "shape": list,
            "scale": float,
            "transposed": bool,
            "resample": type(None),
            "key": str,
            "steps": int,
            "drawn_at": int,
        }


@pytest.mark.parametrize("name", [name for name in MERGED if "zoo" not in name and "tied" not in name])
def test_merged_weights_are_w0_plus_the_increment_folded_in_once(name, folder):
    """Weights that hold their increments have been rounded in every step."""
    file, plain = read(folder / name / "saved.ckpt"), base_of(ALL[name]).state_dict()
    assert len(file["lightning_lora"]["adapters"]) == 3
    for host, entry in file["lightning_lora"]["adapters"].items():
        W, W0 = file["state_dict"][f"{host}.weight"], plain[f"{host}.weight"].double()
        delta = entry["scale"] * entry["B"].double().T @ entry["A"].double()
        assert delta.abs().max() > 0.01
        eps = torch.finfo(W.dtype).eps
        tolerance = 1e-6 if is_factored(ALL[name]) else 1e-6 + 2 * eps
        torch.testing.assert_close(W.double(), W0 + delta, rtol=eps, atol=tolerance)


@pytest.mark.parametrize("name", ADAPTER)
def test_an_adapter_file_holds_what_was_trained_and_buffers_and_nothing_frozen(name, folder):
    file = read(folder / name / "saved.ckpt")
    buffers = {f"layers.1.{key}" for key in ("running_mean", "running_var", "num_batches_tracked")}
    trained = {"layers.0.bias", "layers.1.weight", "layers.1.bias", "layers.5.bias"} if "besides" in name else set()
    assert set(file["state_dict"]) == buffers | trained | {NOTICE}
    assert set(file["lightning_lora"]["trained"]) == trained
    assert set(file["lightning_lora"]["adapters"]) == {"layers.0", "layers.3", "layers.5"}


@pytest.mark.parametrize("name", ALL)
def test_the_entry_in_the_file_is_tensors_and_primitives(name, folder):
    def check(value):
        if isinstance(value, dict):
            assert all(type(key) is str for key in value)
            value = list(value.values())
        if isinstance(value, list):
            for item in value:
                check(item)
        else:
            assert type(value) in (torch.Tensor, str, int, float, bool, type(None))

    check(read(folder / name / "saved.ckpt")["lightning_lora"])


# ---------------------------------------------------------------------------------- readers that have no such library


# in 64-true, a model that is made in `configure_model` is drawn in float64: it is another one than is injected here
@pytest.mark.filterwarnings("ignore:The checkpoint was trained on other weights.* W0 was recovered:UserWarning")
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create the checkpoint")
@pytest.mark.parametrize("name", MERGED)
def test_a_process_without_the_library_computes_what_the_injected_module_does(name, folder, new_process, tmp_path):
    run = ALL[name]
    model = type(run.model())()
    inject(model, **{"rank": 2, "alpha": 3, **{k: v for k, v in run.lora.items() if k != "checkpoint"}})
    trainer(tmp_path, run.callback()).validate(model, data(), ckpt_path=folder / name / "saved.ckpt", verbose=False)
    assert all(adapter.delta_weight().abs().max() > 1e-3 for adapter in adapters(model).values())
    actual = model.eval()(batches()[0][0]).detach()
    # the weight is the file's, bit for bit, unless it is W0, which stands in the file plus its increment, rounded
    tolerance = 0 if not is_factored(run) else 0.05 if "bf16-true" in name else 1e-5
    torch.testing.assert_close(actual, torch.tensor(new_process[0][name]), rtol=tolerance, atol=tolerance)


# ----------------------------------------------------------------------------------------- validate, test and predict


@pytest.mark.parametrize("form", ["merged", "adapter"])
@pytest.mark.parametrize("injected", [False, True], ids=["plain", "injected"])
def test_a_file_gives_the_same_predictions_to_a_plain_and_to_an_injected_module(form, injected, folder, tmp_path):
    file = folder / f"{form}-after_fit" / "saved.ckpt"

    def make():
        model = Net()
        if injected:
            inject(model, rank=2, alpha=3)
        return model, structure(model)

    model, before = make()
    run = trainer(tmp_path, LoRA(rank=2, alpha=3, checkpoint=form))
    outputs = torch.cat(run.predict(model, data(), ckpt_path=file))
    assert structure(model) == before

    plain = Net()
    plain.load_state_dict(read(folder / "merged-after_fit" / "saved.ckpt")["state_dict"])
    expected = torch.cat(trainer(tmp_path).predict(plain, data()))
    torch.testing.assert_close(outputs, expected, rtol=1e-5, atol=1e-6)
    if not injected:
        assert torch.equal(outputs, expected)
    (expected,) = trainer(tmp_path).test(plain, data(), verbose=False)[0].values()
    for function in ("validate", "test"):
        model, before = make()
        (result,) = getattr(run, function)(model, data(), ckpt_path=file, verbose=False)[0].values()
        assert result == pytest.approx(expected, rel=1e-5)
        assert structure(model) == before


def test_a_merged_file_is_tested_by_a_trainer_without_the_callback(folder, tmp_path):
    file = folder / "merged-after_fit" / "saved.ckpt"
    without = trainer(tmp_path).test(Net(), data(), ckpt_path=file, verbose=False)
    assert without == trainer(tmp_path, LoRA(rank=2)).test(Net(), data(), ckpt_path=file, verbose=False)
    assert without != trainer(tmp_path).test(Net(), data(), verbose=False)


def test_testing_the_best_file_after_fit_gives_the_loss_it_was_chosen_for(tmp_path):
    best = ModelCheckpoint(tmp_path, monitor="val_loss")
    model = Net()
    run = trainer(tmp_path, LoRA(rank=2), best, max_epochs=3)
    run.fit(model, data(), data(1))
    assert run.test(ckpt_path="best", dataloaders=data(1), verbose=False)[0]["test_loss"] == pytest.approx(
        best.best_model_score.item(), rel=1e-5
    )


# ------------------------------------------------------------------------------------------------------- after ``fit``


@pytest.mark.parametrize("form", ["merged", "adapter"])
def test_a_file_saved_after_testing_the_fitted_module_resumes_too(form, tmp_path):
    run, model = fitted(tmp_path, LoRA(rank=2, alpha=3, checkpoint=form), loader=ResumableLoader())
    run.test(model, data(), verbose=False)
    run.save_checkpoint(tmp_path / "saved.ckpt")
    before = RESUMED[f"{form}-after_fit"].uninterrupted(tmp_path)
    after = RESUMED[f"{form}-after_fit"].resumed(tmp_path, tmp_path / "saved.ckpt")
    assert (after.module, after.optimizers) == (before.module, before.optimizers)


@pytest.mark.parametrize("form", ["merged", "adapter"])
def test_weights_only_saved_after_fit_are_those_of_the_plain_merged_module(form, tmp_path):
    run, model = fitted(tmp_path, LoRA(rank=2, checkpoint=form))
    run.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    assert digest(read(tmp_path / "weights.ckpt")["state_dict"]) == digest(model.state_dict())
    Net().load_state_dict(read(tmp_path / "weights.ckpt")["state_dict"])


def test_a_callback_used_for_a_second_module_writes_the_second_modules_fingerprints(tmp_path):
    lora = LoRA(rank=2)
    for seed in (0, 1):
        model = Net(seed)
        file = tmp_path / f"{seed}.ckpt"
        trainer(tmp_path, lora, SaveByHand(file)).fit(model, data())
        expected = {f"layers.{i}.weight": fingerprint(layers(seed)[i].weight) for i in (0, 3, 5)}
        assert read(file)["lightning_lora"]["base"] == expected
        del model


def test_a_second_run_takes_fingerprints_anew_though_a_weight_stands_where_another_stood(tmp_path):
    place = np.empty((16, 8), dtype=np.float32)  # an allocator may give the second module's weight this address too
    lora = LoRA(rank=2)
    for seed in (0, 1):
        place[:] = layers(seed)[0].weight.detach().numpy()
        model, expected = Net(), fingerprint(layers(seed)[0].weight)
        model.layers[0].weight = torch.nn.Parameter(torch.from_numpy(place))
        trainer(tmp_path, lora, SaveByHand(tmp_path / "saved.ckpt")).fit(model, data())
        assert read(tmp_path / "saved.ckpt")["lightning_lora"]["base"]["layers.0.weight"] == expected


# --------------------------------------------------------------------------------------- again and again, without drift


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_hundred_times_saved_and_resumed_changes_no_bit_of_w0_or_the_adapters(dtype):
    options = Options(rank=2)

    def pretrained():
        module = layers().to(dtype)
        inject(module, rank=2)
        return module

    module = pretrained()
    for adapter in adapters(module).values():
        torch.nn.init.normal_(adapter.B, generator=torch.Generator().manual_seed(1))
    before = digest(module.state_dict())
    for _ in range(100):
        run = write.describe(module, options, "merged", Fingerprints())
        state = merged_state_dict(module)
        assert not torch.equal(state["0.weight"], dict(module.named_parameters())["0.weight"])
        file = {"state_dict": {key: value.clone() for key, value in state.items()}, "lightning_lora": run.to_mapping()}
        module = pretrained()
        reading.prepare_for_loading(file, module, exact=True)
        module.load_state_dict(file["state_dict"])
        reading.restore_adapters(module, run.adapters)
        assert digest(module.state_dict()) == before


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_twelve_runs_each_resumed_from_the_last_keep_w0_and_equal_one_run(precision, tmp_path):
    one = Digest()
    trainer(tmp_path, LoRA(rank=2), one, max_epochs=12, precision=precision).fit(Net(), ResumableLoader())
    file = None
    for epochs in range(1, 13):
        parts = Digest()
        run = trainer(tmp_path, LoRA(rank=2, exact_resume=True), parts, max_epochs=epochs, precision=precision)
        run.fit(Net(), ResumableLoader(), ckpt_path=file)
        file = tmp_path / f"{epochs}.ckpt"
        run.save_checkpoint(file)
    assert (parts.module, parts.optimizers) == (one.module, one.optimizers)


# ------------------------------------------------------------------------------------------------------ another base


class Weights(Callback):
    """What stands in the module when training starts."""

    def on_train_start(self, trainer, pl_module) -> None:
        self.state = {name: p.detach().clone() for name, p in pl_module.named_parameters()}


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_on_another_base_w0_is_recovered_and_the_warned_bound_holds_in_every_entry(precision, tmp_path):
    fitted(tmp_path, SaveByHand(tmp_path / "saved.ckpt"), precision=precision)
    weights = Weights()
    run = trainer(tmp_path, LoRA(rank=2), weights, max_epochs=2, precision=precision)
    with pytest.warns(UserWarning, match=r"'layers\.0\.weight', 'layers\.3\.weight', 'layers\.5\.weight'") as caught:
        run.fit(Net(seed=1), data(), ckpt_path=tmp_path / "saved.ckpt")
    (message,) = (str(warning.message) for warning in caught if "W0 was recovered" in str(warning.message))
    bound = float(re.search(r"at most (\S+) in any", message)[1])
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
    W0 = {f"layers.{i}.weight": layers()[i].weight.to(dtype) for i in (0, 3, 5)}
    errors = [(weights.state[key].double() - W0[key].double()).abs().max().item() for key in W0]
    assert 0 < max(errors) <= bound
    assert bound < 0.02
    assert not any(torch.equal(weights.state[key], layers(1).state_dict()[key[7:]].to(dtype)) for key in W0)


def test_only_the_weights_that_differ_are_named_and_recovered(tmp_path):
    fitted(tmp_path, SaveByHand(tmp_path / "saved.ckpt"))
    model, weights = Net(), Weights()
    torch.nn.init.zeros_(model.layers[3].weight)
    with pytest.warns(UserWarning, match=r"in 'layers\.3\.weight'\. W0 was recovered"):
        trainer(tmp_path, LoRA(rank=2), weights, max_epochs=2).fit(model, data(), ckpt_path=tmp_path / "saved.ckpt")
    assert torch.equal(weights.state["layers.0.weight"], layers()[0].weight)
    torch.testing.assert_close(weights.state["layers.3.weight"], layers()[3].weight, rtol=0, atol=1e-6)


# ------------------------------------------------------------------------------------------------- what was trained


class ToggledAtException(Net):
    """Fails where an optimizer is toggled, that is, where the parameters of the other are marked as frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()
            if batch_idx == 2:
                raise RuntimeError("toggled")
            self.untoggle_optimizer(optimizer)

    def configure_optimizers(self):
        first, second, *others = self.layers.children()
        rest = [p for layer in (first, *others) for p in layer.parameters()]
        return torch.optim.SGD(rest, lr=0.1), torch.optim.SGD(second.parameters(), lr=0.1)


@pytest.mark.parametrize("form", ["merged", "adapter"])
def test_a_file_written_while_an_optimizer_is_toggled_has_all_that_was_trained(form, tmp_path):
    model, lora = ToggledAtException(), LoRA(rank=2, modules_to_save=["layers.1"], checkpoint=form)
    writer = OnExceptionCheckpoint(tmp_path)
    with pytest.raises(RuntimeError, match="toggled"):
        fitted(tmp_path, lora, writer, model=model)
    file = read(writer.ckpt_path)
    assert set(file["lightning_lora"]["trained"]) == {"layers.1.weight", "layers.1.bias"}
    assert torch.equal(file["state_dict"]["layers.1.weight"], model.layers[1].weight)
    fresh = Net()
    trainer(tmp_path, LoRA(rank=2)).validate(fresh, data(), ckpt_path=writer.ckpt_path, verbose=False)
    assert digest(fresh.state_dict()) == digest(model.state_dict())


def test_merging_a_model_loaded_from_its_file_gives_the_weights_in_the_file(folder, tmp_path):
    file = folder / "merged-after_fit" / "saved.ckpt"
    model = Net()
    inject(model, rank=2, alpha=3)
    trainer(tmp_path, LoRA(rank=2, alpha=3)).validate(model, data(), ckpt_path=file, verbose=False)
    merge(model)
    assert digest(model.state_dict()) == digest(read(file)["state_dict"])


class OnARankThatDoesNotWrite(SingleDeviceStrategy):
    @property
    def is_global_zero(self) -> bool:
        return False


@pytest.mark.parametrize("strategy", [SingleDeviceStrategy, OnARankThatDoesNotWrite])
def test_a_save_merges_each_weight_once_on_the_rank_that_writes(strategy, tmp_path, monkeypatch):
    folded = []
    fold = Adapter.folded_into
    monkeypatch.setattr(Adapter, "folded_into", lambda adapter, weight: folded.append(adapter) or fold(adapter, weight))

    class Saves(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            before = digest(pl_module.state_dict())
            folded.clear()
            trainer.save_checkpoint(tmp_path / "saved.ckpt")
            self.times = len(folded), len(set(folded)), len(adapters(pl_module))
            assert digest(pl_module.state_dict()) == before  # which is merged in the file alone

    saves, model = Saves(), TiedNet()
    lora = LoRA(rank=2, target_modules=["out", "body"])
    trainer(tmp_path, lora, saves, limit_train_batches=1, strategy=strategy("cpu")).fit(model, data())
    writes = strategy is SingleDeviceStrategy
    assert saves.times == (2, 2, 2) if writes else (0, 0, 2)
    if writes:  # the tied weight stands in the file once
        state = torch.load(tmp_path / "saved.ckpt", weights_only=True)["state_dict"]
        assert state["out.weight"].data_ptr() == state["layers.embed.weight"].data_ptr()
