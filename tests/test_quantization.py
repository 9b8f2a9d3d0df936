"""Quantised W0: real kernels of bitsandbytes and torchao on the CPU."""

import copy
import io
import logging
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.tuner import Tuner
from models import Digest, Net, ResumableLoader, data, trainer
from pairs import pairs
from quantized import KINDS, PlainNet, QuantizedNet, dequantized
from resume import SaveByHand
from torch import Tensor, nn

from lightning_lora import LoRA, adapters, inject, merge, merging_errors
from lightning_lora.errors import LoRAError
from lightning_lora.trainer.tables import print_summary
from lightning_lora.weights import read_only_weights
from lightning_lora.weights.quantized import REWRITES

every_kind = pytest.mark.parametrize("kind", KINDS)

pytest.importorskip("bitsandbytes")
pytest.importorskip("torchao")


def lora(**options) -> LoRA:
    """The head is quantised and not adapted."""
    return LoRA(**{"rank": 2, "alpha": 3, "exclude_modules": ["layers.5"], **options})


def randomise(module: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    for adapter in adapters(module).values():
        for factor in (adapter.A, adapter.B):
            nn.init.normal_(factor, std=0.3, generator=generator)


def evaluable(model: Net) -> Net:
    """In an evaluation on CPUs with AVX512-BF16, bitsandbytes asks for multiples of 32 outputs; the head has 4."""
    if hasattr(model.layers[5], REWRITES):
        setattr(model.layers[5], REWRITES, False)
    return model


def stored(module: nn.Module) -> dict[str, str]:
    return {key: storage.fingerprint() for key, storage in read_only_weights(module).items()}


class Watch(Callback):
    """What is stored of every quantised weight when the run begins and when it ends."""

    def on_train_start(self, trainer, pl_module) -> None:
        self.before = stored(pl_module)

    def on_train_end(self, trainer, pl_module) -> None:
        self.after = stored(pl_module)


def file_of(folder: Path, model: Net, route: str = "epoch", callback: LoRA | None = None, **options) -> Path:
    """A checkpoint from the middle of two epochs."""
    writer = [SaveByHand(folder / "saved.ckpt")] if route == "epoch" else []
    run = trainer(folder, callback or lora(), *writer, max_epochs=1, **options)
    run.fit(model, ResumableLoader(), data(1))
    if route == "after_fit":
        run.save_checkpoint(folder / "saved.ckpt")
    return folder / "saved.ckpt"


def two_epochs(folder: Path, model: Net, file: Path | None = None, callback: LoRA | None = None, **options) -> tuple:
    made = Digest()
    run = trainer(folder, callback or lora(), made, max_epochs=2, **options)
    run.fit(model, ResumableLoader(), data(1), ckpt_path=file)
    return made.names, made.module, made.optimizers, made.steps


# ---------------------------------------------------------------------------------------------------- one layer, alone


@every_kind
@pytest.mark.parametrize("bias", [True, False])
def test_output_and_gradients_are_those_of_the_dequantised_weight(kind: str, bias: bool) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(KINDS[kind](nn.Linear(64, 96, bias)))
    before = stored(module)
    inject(module, rank=4, alpha=6)
    randomise(module)
    adapter = adapters(module)["0"]
    x, dy = torch.randn(3, 5, 64, requires_grad=True), torch.randn(3, 5, 96)
    y = module(x)
    y.backward(dy)

    W0, b = dequantized(module[0]), module[0].bias
    exact = [t.detach().double().requires_grad_() for t in (x, adapter.A, adapter.B)]
    weight = W0 + 1.5 * exact[2].T @ exact[1]
    expected = nn.functional.linear(exact[0], weight, None if b is None else b.double())
    expected.backward(dy.double())

    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    for given, wanted in zip((x, adapter.A, adapter.B), exact, strict=True):
        torch.testing.assert_close(given.grad.double(), wanted.grad, rtol=1e-5, atol=2e-5)
    assert [name for name, p in module.named_parameters() if p.grad is not None] == ["0.lora.A", "0.lora.B"]
    assert stored(module) == before


@every_kind
def test_the_increment_in_evaluation_is_the_same_whatever_the_kernel_does_to_w0(kind: str) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(KINDS[kind](nn.Linear(64, 96))).eval()
    x = torch.randn(5, 64)
    inject(module, rank=4)
    adapter = adapters(module)["0"]
    with torch.no_grad():
        plain = module(x)
        randomise(module)
        increment = module(x) - plain
        torch.testing.assert_close(increment, x @ adapter.A.T @ adapter.B, rtol=1e-4, atol=1e-4)


@every_kind
def test_merge_leaves_a_plain_linear_that_computes_the_same(kind: str) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(KINDS[kind](nn.Linear(64, 96)), nn.LayerNorm(96))
    inject(module, rank=4)
    randomise(module)
    x, layer = torch.randn(5, 64), module[0]
    expected = module(x)
    weight = dequantized(layer) + adapters(module)["0"].delta_weight().double()
    merge(module)
    assert module[0] is layer
    assert type(layer) is nn.Linear
    assert vars(layer).keys() == vars(nn.Linear(64, 96)).keys()
    assert list(layer.state_dict()) == ["weight", "bias"]
    torch.testing.assert_close(layer.weight.double(), weight, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-4)
    copy.deepcopy(module), pickle.dumps(module)


@every_kind
def test_merging_rounds_once_to_the_dtype_of_the_rest_of_the_model(kind: str) -> None:
    module = nn.Sequential(KINDS[kind](nn.Linear(64, 96)), nn.LayerNorm(96, dtype=torch.bfloat16))
    inject(module, rank=4)
    randomise(module)
    weight = dequantized(module[0]) + adapters(module)["0"].delta_weight().double()
    [(most, mean)] = merging_errors(module).values()
    merge(module)
    assert module[0].weight.dtype == module[0].bias.dtype == torch.bfloat16
    error = (module[0].weight.double() - weight).abs()
    assert most == pytest.approx(error.max().item(), rel=1e-3)
    assert mean == pytest.approx(error.mean().item(), rel=1e-3)
    assert (error <= 2**-8 * weight.abs() + 1e-7).all()


@every_kind
def test_a_layer_without_an_increment_stays_quantised(kind: str) -> None:
    module = quantized_pair(kind)
    before, attributes = stored(module), [set(vars(layer)) for layer in module]
    inject(module, rank=2)
    nn.init.ones_(adapters(module)["0"].B)
    assert list(merging_errors(module)) == ["0"]
    merge(module)
    assert stored(module) == {"1.weight": before["1.weight"]}
    assert set(vars(module[1])) == attributes[1]


def test_merging_in_float32_rounds_nothing_off() -> None:
    module = nn.Sequential(KINDS["nf4"](nn.Linear(64, 96)))
    inject(module, rank=4)
    randomise(module)
    assert merging_errors(module) == {"0": (0.0, 0.0)}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.startswith("torchao")])  # torchao's own is missing
def test_an_adapted_layer_can_be_copied_and_pickled(kind: str) -> None:
    module = nn.Sequential(KINDS[kind](nn.Linear(64, 96)))
    inject(module, rank=4)
    randomise(module)
    x = torch.randn(5, 64)
    copies = [copy.deepcopy(module), pickle.loads(pickle.dumps(module))]
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    for other in [*copies, torch.load(file, weights_only=False)]:
        assert torch.equal(other(x), module(x))
        assert stored(other) == stored(module)


@every_kind
@pytest.mark.parametrize("options", [{}, {"init": "pissa"}, {"init": "symmetric"}, {"decomposition": "additive"}])
def test_starts_and_decompositions_that_need_no_gradient_of_w0_work(kind: str, options: dict) -> None:
    module = nn.Sequential(KINDS[kind](nn.Linear(64, 96)))
    weight, x = dequantized(module[0]).float(), torch.randn(5, 64)
    before = module(x)
    inject(module, rank=4, **options)
    assert options or torch.equal(module(x), before)
    torch.testing.assert_close(module(x), before, rtol=1e-5, atol=1e-5)
    if options.get("init") == "pissa":
        A, B = adapters(module)["0"].A, adapters(module)["0"].B
        U, S, Vh = torch.linalg.svd(weight)
        torch.testing.assert_close(B.T @ A, (U[:, :4] * S[:4]) @ Vh[:4], rtol=1e-3, atol=1e-4)


def test_packed_bytes_can_be_counted() -> None:
    bytes_of = {
        kind: sum(t.nbytes for t in read_only_weights(nn.Sequential(make(nn.Linear(256, 256))))["0.weight"].tensors())
        for kind, make in KINDS.items()
    }
    n = 256 * 256
    assert bytes_of["int8"] == n + 4 * 256
    assert bytes_of["nf4"] == n // 2 + 4 * n // 64 + 4 * 16
    assert bytes_of["nf4-double"] < bytes_of["nf4"]
    assert n < bytes_of["torchao-int8"] < 1.05 * n


# ------------------------------------------------------------------------------------------------------------ refused


def quantized_pair(kind: str = "nf4") -> nn.Sequential:
    return nn.Sequential(KINDS[kind](nn.Linear(64, 64)), KINDS[kind](nn.Linear(64, 64)))


@every_kind
@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"gradient": "merged"}, "cannot hold an increment, as `gradient='merged'` asks. Use `gradient='factored'`"),
        ({"gradient": "projected"}, "as `gradient='projected'` asks. Use `gradient='factored'`"),
        ({"gradient": "merged", "resample_every_n_steps": 1}, "cannot hold an increment"),
        ({"decomposition": "dora"}, "`decomposition='dora'` would dequantise it in every step"),
        ({"target_modules": ["0"], "modules_to_save": ["1"]}, "cannot be trained in full, as `modules_to_save` asks"),
    ],
)
def test_what_needs_a_weight_that_can_be_written_to_is_refused(kind: str, options: dict, match: str) -> None:
    module = quantized_pair(kind)
    with pytest.raises(LoRAError, match=match):
        inject(module, rank=2, **options)
    assert not adapters(module)
    assert stored(module)


def test_a_start_from_gradients_is_refused(tmp_path: Path) -> None:
    run = trainer(tmp_path, lora(init="gradient"), max_epochs=1)
    with pytest.raises(LoRAError, match="has no gradient, which `init='gradient'` starts from"):
        run.fit(QuantizedNet("nf4"), data())


def test_quantised_activations_are_refused() -> None:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    module = nn.Sequential(nn.Linear(64, 96))
    quantize_(module, Int8DynamicActivationInt8WeightConfig())
    with pytest.raises(LoRAError, match=r"quantises the activations too.*Int8WeightOnlyConfig"):
        inject(module, rank=2)


def test_torchao_under_ddp_is_refused(tmp_path: Path) -> None:
    run = trainer(tmp_path, lora(), max_epochs=1, strategy="ddp")
    try:
        with pytest.raises(LoRAError, match="which torch's DistributedDataParallel cannot send"):
            run.fit(QuantizedNet("torchao-int8"), data())
    finally:
        torch.distributed.destroy_process_group()


def test_a_weight_that_an_evaluation_has_rewritten_is_refused() -> None:
    module = nn.Sequential(KINDS["nf4"](nn.Linear(64, 96))).eval()
    if not vars(module[0]).get(REWRITES):
        pytest.skip("bitsandbytes rewrites weights on CPUs with AVX512-BF16 only")
    with torch.no_grad():
        module(torch.randn(5, 64))
    with pytest.raises(LoRAError, match="was rewritten by bitsandbytes in an evaluation"):
        inject(module, rank=2)


@every_kind
def test_a_plain_weight_is_not_loaded_into_what_is_stored(kind: str) -> None:
    module = nn.Sequential(KINDS[kind](nn.Linear(64, 96)))
    inject(module, rank=2)
    before = stored(module)
    with pytest.raises(RuntimeError, match="the module stores it quantised"):
        module.load_state_dict(nn.Sequential(nn.Linear(64, 96)).state_dict())
    assert stored(module) == before


# --------------------------------------------------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> dict[str, tuple]:
    return {kind: two_epochs(tmp_path_factory.mktemp(kind), QuantizedNet(kind)) for kind in KINDS}


@pytest.mark.parametrize(("kind", "form", "route"), pairs(KINDS, ["merged", "adapter"], ["epoch", "after_fit"]))
def test_a_run_resumes_bit_for_bit(kind: str, form: str, route: str, uninterrupted, tmp_path: Path) -> None:
    file = file_of(tmp_path, QuantizedNet(kind), route, lora(checkpoint=form))
    resumed = two_epochs(tmp_path, QuantizedNet(kind), file, lora(checkpoint=form))
    assert resumed == uninterrupted[kind]


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
@pytest.mark.parametrize("kind", ["int8", "nf4", "torchao-int4"])
def test_a_run_in_low_precision_resumes_bit_for_bit(kind: str, precision: str, tmp_path: Path) -> None:
    whole = two_epochs(tmp_path, QuantizedNet(kind), precision=precision)
    file = file_of(tmp_path, QuantizedNet(kind), precision=precision)
    state, dtype = torch.load(file)["state_dict"], torch.bfloat16 if precision == "bf16-true" else torch.float32
    assert {value.dtype for value in state.values() if value.is_floating_point()} == {dtype}
    model = QuantizedNet(kind)
    assert two_epochs(tmp_path, model, file, precision=precision) == whole
    trainer(tmp_path, precision=precision).test(evaluable(model), data(1), verbose=False)


@every_kind
def test_a_tuner_that_saves_and_restores_leaves_the_run_as_it_would_be(
    kind: str, uninterrupted, tmp_path: Path
) -> None:
    class Tuned(QuantizedNet):
        lr = 0.02

    made, model = Digest(), Tuned(kind)
    run = trainer(tmp_path, lora(), made, max_epochs=2)
    Tuner(run).lr_find(model, ResumableLoader(), data(1), num_training=4, update_attr=False)
    run.fit(model, ResumableLoader(), data(1))
    assert (made.names, made.module, made.optimizers, made.steps) == uninterrupted[kind]


@every_kind
def test_what_is_stored_stays_as_it_is_in_steps_validation_and_saving(kind: str, tmp_path: Path) -> None:
    watch, writer = Watch(), ModelCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=-1)
    model = QuantizedNet(kind)
    fresh = stored(model)
    trainer(tmp_path, lora(), watch, writer, max_epochs=2, val_check_interval=3).fit(model, data(), data(1))
    assert watch.before == watch.after == fresh


@every_kind
def test_after_fit_adapted_layers_are_plain_and_others_as_they_were(kind: str, tmp_path: Path, caplog) -> None:
    model = QuantizedNet(kind)
    kinds, fresh = [type(layer) for layer in model.layers], stored(model)
    attributes = set(vars(model.layers[5]))
    with caplog.at_level(logging.INFO):
        trainer(tmp_path, lora(), max_epochs=1).fit(model, data(), data(1))
    assert "2 quantised layers are plain now, with merged weights: rounded by 0.0e+00" in caplog.text
    assert [type(layer) for layer in model.layers] == [nn.Linear, *kinds[1:3], nn.Linear, *kinds[4:]]
    assert stored(model) == {"layers.5.weight": fresh["layers.5.weight"]}
    assert set(vars(model.layers[5])) == attributes


PLAIN_PROCESS = """
import sys
from pathlib import Path
import torch
from quantized import PlainNet
libraries = {"bitsandbytes", "torchao"} & sys.modules.keys()  # some versions of Lightning import one
for file in sorted(Path(sys.argv[1]).glob("*.ckpt")):
    checkpoint = torch.load(file, weights_only=True)
    model = PlainNet()
    model.load_state_dict(checkpoint["state_dict"], strict=True)
    assert [(k, v.dtype, v.shape) for k, v in checkpoint["state_dict"].items()] == [
        (k, v.dtype, v.shape) for k, v in PlainNet().state_dict().items()], file
    torch.save(model.eval()(torch.linspace(-1, 1, 16).view(2, 8)), file.with_suffix(".out"))
assert {"bitsandbytes", "torchao", "lightning_lora"} & sys.modules.keys() == libraries
"""


def test_a_merged_file_loads_into_the_plain_model_in_a_process_without_the_libraries(tmp_path: Path) -> None:
    expected: dict[str, Tensor] = {}
    for kind in KINDS:
        for route in ("epoch", "after_fit"):
            folder = tmp_path / f"{kind}-{route}"
            model = QuantizedNet(kind)
            file_of(folder, model, route).rename(tmp_path / f"{folder.name}.ckpt")
            plain = PlainNet()
            state = {key: value for key, value in model.state_dict().items() if ".5." not in key}
            plain.load_state_dict(state, strict=False)
            plain.layers[5].weight.data = dequantized(model.layers[5]).float()
            plain.layers[5].bias.data = model.layers[5].bias.data
            with torch.no_grad():
                expected[folder.name] = plain.eval()(torch.linspace(-1, 1, 16).view(2, 8))
    path = f"{Path(__file__).parent}"
    command = [sys.executable, "-W", "ignore", "-c", PLAIN_PROCESS, str(tmp_path)]
    done = subprocess.run(command, env={"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name, value in expected.items():
        torch.testing.assert_close(torch.load(tmp_path / f"{name}.out"), value, rtol=1e-5, atol=1e-6)


def test_the_merged_weight_is_the_dequantised_one_plus_the_increment(tmp_path: Path) -> None:
    for kind in KINDS:
        file = torch.load(file_of(tmp_path / kind, QuantizedNet(kind)))
        model = QuantizedNet(kind)
        for name, entry in file["lightning_lora"]["adapters"].items():
            W0 = dequantized(model.get_submodule(name))
            expected = W0 + entry["scale"] * entry["B"].double().T @ entry["A"].double()
            merged = file["state_dict"][f"{name}.weight"]
            torch.testing.assert_close(merged.double(), expected, rtol=1e-6, atol=1e-7)
        head = file["state_dict"]["layers.5.weight"].double()
        torch.testing.assert_close(head, dequantized(model.layers[5]), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("form", ["merged", "adapter"])
@pytest.mark.parametrize(
    ("other", "match"),
    [
        (lambda: QuantizedNet("nf4", seed=1), "both are nf4, of other values|not the weights they were trained on"),
        (lambda: QuantizedNet("int8"), "that was nf4, this is int8|not the weights they were trained on"),
    ],
)
def test_resuming_on_what_was_quantised_otherwise_is_refused(form: str, other, match: str, tmp_path: Path) -> None:
    file = file_of(tmp_path, QuantizedNet("nf4"), callback=lora(checkpoint=form))
    with pytest.raises(LoRAError, match=match):
        two_epochs(tmp_path, other(), file, lora(checkpoint=form))


@every_kind
@pytest.mark.parametrize(
    ("gradient", "match"), [("factored", "that was plain, this is"), ("merged", "with the increment in the weight")]
)
def test_a_file_of_a_plain_run_is_not_resumed_on_a_quantised_module(
    kind: str, gradient: str, match: str, tmp_path: Path
) -> None:
    file = file_of(tmp_path, PlainNet(), callback=lora(gradient=gradient))
    with pytest.raises(LoRAError, match=match):
        two_epochs(tmp_path, QuantizedNet(kind), file)


def test_a_file_of_a_quantised_run_resumes_on_the_plain_module_with_a_warning(tmp_path: Path) -> None:
    file = file_of(tmp_path, QuantizedNet("nf4"))
    with pytest.warns(UserWarning, match=r"quantised as they were \(nf4; .*lightning-lora.quantization"):
        two_epochs(tmp_path, PlainNet(), file)


@every_kind
def test_a_merged_file_is_tested_in_the_plain_module_and_not_in_a_quantised_one(kind: str, tmp_path: Path) -> None:
    model = QuantizedNet(kind)
    file = tmp_path / "saved.ckpt"
    run = trainer(tmp_path, lora(), SaveByHand(file), max_epochs=1)
    run.fit(model, data(), data(1))
    [here] = run.test(evaluable(model), data(1), ckpt_path=file, verbose=False)
    [plain] = trainer(tmp_path).test(PlainNet(), data(1), ckpt_path=file, verbose=False)
    assert here["test_loss"] == pytest.approx(plain["test_loss"], rel=2e-2)  # the head is quantised in one of them
    with pytest.raises(LoRAError, match="are quantised, and cannot hold the increments"):
        trainer(tmp_path, lora()).test(QuantizedNet(kind), data(1), ckpt_path=file, verbose=False)


# ------------------------------------------------------------------------ layers that are quantised when they move


class LateNet(PlainNet):
    """Layers of bitsandbytes that hold a plain weight until they are moved to their device."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        import bitsandbytes as bnb

        makers = {"int8": lambda *a: bnb.nn.Linear8bitLt(*a, has_fp16_weights=False), "nf4": bnb.nn.LinearNF4}
        for name, child in list(self.layers.named_children()):
            if isinstance(child, nn.Linear):
                layer = makers[kind](child.in_features, child.out_features, child.bias is not None)
                layer.load_state_dict(child.state_dict())
                self.layers[int(name)] = layer


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_layers_that_are_not_quantised_yet_are_when_the_run_starts(kind: str, tmp_path: Path) -> None:
    assert not any(storage.packed for storage in read_only_weights(LateNet(kind)).values())
    whole = two_epochs(tmp_path, LateNet(kind))
    early = two_epochs(tmp_path, QuantizedNet("int8" if kind == "int8" else "nf4-double"))
    assert whole == early
    assert two_epochs(tmp_path, LateNet(kind), file_of(tmp_path, LateNet(kind))) == whole


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_adapters_put_in_before_the_move_survive_it(kind: str) -> None:
    module = LateNet(kind)
    names = inject(module, rank=2)
    module.to("cpu")
    assert list(adapters(module)) == names
    assert all(storage.packed for storage in read_only_weights(module).values())
    module(torch.randn(4, 8)).sum().backward()
    assert all(adapter.B.grad is not None for adapter in adapters(module).values())


def with_plugin(run, mode: str):
    """Lightning allows the plugin on CUDA only; what it does to a module runs anywhere."""
    from lightning.pytorch.plugins import BitsandbytesPrecision

    plugin = BitsandbytesPrecision("nf4", dtype=torch.float32)
    if mode == "int8":
        plugin._linear_cls = __import__(
            "lightning.fabric.plugins.precision.bitsandbytes", fromlist=["_"]
        )._Int8LinearInference
    run.strategy.precision_plugin = plugin
    return run


@pytest.mark.parametrize("mode", ["nf4", "int8"])
def test_the_precision_plugin_of_lightning_converts_before_adapters_are_put_in(mode: str, tmp_path: Path) -> None:
    watch, made = Watch(), Digest()
    model = PlainNet()
    run = with_plugin(trainer(tmp_path, lora(), watch, made, max_epochs=1), mode)
    run.fit(model, ResumableLoader())
    assert watch.before == watch.after
    assert {value.split(":")[2] for value in watch.after.values()} == {mode}
    assert sum(name.endswith("lora.B") for name in made.names) == 2
    assert [type(layer) for layer in model.layers if isinstance(layer, nn.Linear)][:2] == [nn.Linear, nn.Linear]


def test_adapters_that_the_precision_plugin_would_drop_are_refused(tmp_path: Path) -> None:
    model = PlainNet()
    inject(model, rank=2)
    with pytest.raises(LoRAError, match="BitsandbytesPrecision would put a layer without one"):
        with_plugin(trainer(tmp_path, LoRA(rank=2), max_epochs=1), "nf4").fit(model, data())


def test_the_summary_counts_the_entries_of_the_weight_and_not_what_stores_them(capsys, monkeypatch) -> None:
    monkeypatch.setattr("lightning_lora.table.has_rich", lambda: False)
    module = quantized_pair("nf4")
    inject(module, rank=2)
    print_summary(module)
    printed = capsys.readouterr().out
    assert "64 x 64" in printed
    assert "8.3 K" in printed  # 2 * (64 * 64 + 64)
