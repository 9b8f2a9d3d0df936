"""Every precision of the Trainer, every gradient, every decomposition; and the plugins that are refused."""

import itertools
import math
from collections.abc import Callable

import lightning.pytorch.plugins.precision as plugins
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.plugins.precision import (
    BitsandbytesPrecision,
    DeepSpeedPrecision,
    DoublePrecision,
    FSDPPrecision,
    HalfPrecision,
    MixedPrecision,
    Precision,
    TransformerEnginePrecision,
    XLAPrecision,
)
from models import Digest, Net, ResumableLoader, batches, data, layers, structure, trainer
from pairs import pairs
from resume import SaveByHand
from torch import nn
from transformers.pytorch_utils import Conv1D

from lightning_lora import LoRA, adapters, inject
from lightning_lora.errors import LoRAError
from lightning_lora.trainer.support import REFUSED_PRECISIONS

GRADIENTS = ("factored", "merged", "projected")
DECOMPOSITIONS = ("product", "additive", "dora")
EVERY = list(itertools.product(GRADIENTS, DECOMPOSITIONS))

WORKS: dict[str, type[Precision]] = {
    "32-true": Precision,
    "64-true": DoublePrecision,
    "bf16-true": HalfPrecision,
    "16-true": HalfPrecision,
    "bf16-mixed": MixedPrecision,
    "16-mixed": MixedPrecision,
}
"""The Trainer's ``precision`` -> its plugin; with every gradient and decomposition."""

WORKS_WHEN_QUANTIZED: dict[str, type[Precision]] = {"nf4": BitsandbytesPrecision, "int8": BitsandbytesPrecision}
"""``mode`` of a plugin that works with ``gradient="factored"`` and no DoRA; its tests are those of quantisation."""

REFUSED: dict[str, type[Precision]] = {
    "transformer-engine": TransformerEnginePrecision,
    "transformer-engine-float16": TransformerEnginePrecision,
    "FSDPPrecision": FSDPPrecision,
    "DeepSpeedPrecision": DeepSpeedPrecision,
    "XLAPrecision": XLAPrecision,
}
"""What is refused by name, whatever else is asked for."""

STORED = {"64-true": torch.float64, "bf16-true": torch.bfloat16, "16-true": torch.float16}
"""The dtype of the base's weights, where it is not float32."""


def test_every_plugin_of_lightning_is_in_a_table():
    known = {*WORKS.values(), *WORKS_WHEN_QUANTIZED.values(), *REFUSED.values()}
    assert {getattr(plugins, name) for name in plugins.__all__} == known
    assert set(REFUSED.values()) == set(REFUSED_PRECISIONS)


# --------------------------------------------------------------------------------------------------------------- works


class Watch(Callback):
    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_start(self, trainer, pl_module) -> None:
        self.base = {name: p.detach().clone() for name, p in pl_module.named_parameters() if not p.requires_grad}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.losses.append(outputs["loss"].item())

    def on_train_end(self, trainer, pl_module) -> None:
        now = dict(pl_module.named_parameters())
        self.changed = {name for name, p in self.base.items() if not torch.equal(p, now[name])}
        self.factors = {p.dtype for a in adapters(pl_module).values() for p in (a.A, a.B)}
        self.others = {p.dtype for a in adapters(pl_module).values() for p in a.trained.values()} - self.factors
        self.buffers = {b.dtype for b in pl_module.buffers() if b.is_floating_point()}
        states = [state for optimizer in trainer.optimizers for state in optimizer.state.values()]
        self.states = {value.dtype for state in states for key, value in state.items() if key != "step"}


def plugin_of(precision: str) -> list[Precision]:
    """A plugin for the CPU; a scale that does not overflow, as the default does in the first steps."""
    if precision == "16-mixed":
        return [MixedPrecision(precision, "cpu", torch.amp.GradScaler("cpu", init_scale=256.0))]
    return []


def fit(folder, precision, lora, *callbacks, epochs=2, file=None, model=Net):
    plugin = plugin_of(precision)
    own = {"plugins": plugin} if plugin else {"precision": precision}
    run = trainer(folder, lora, *callbacks, max_epochs=epochs, **own)
    module = model()
    run.fit(module, ResumableLoader(), ckpt_path=file)
    assert type(run.precision_plugin) is WORKS[precision]
    return module


@pytest.mark.parametrize(
    ("precision", "gradient", "decomposition", "adapter_dtype"),
    pairs(WORKS, GRADIENTS, DECOMPOSITIONS, ("float32", "bfloat16", "float64")),
)
def test_it_learns_keeps_its_dtypes_and_freezes_what_it_should(
    precision, gradient, decomposition, adapter_dtype, tmp_path
):
    options = {"gradient": gradient, "decomposition": decomposition, "adapter_dtype": adapter_dtype}
    watch, expected = Watch(), STORED.get(precision, torch.float32)
    module = fit(tmp_path, precision, LoRA(rank=2, **options, log_memory=False), watch)
    assert len(watch.losses) == 16
    assert sum(watch.losses[8:]) < 0.97 * sum(watch.losses[:8])
    assert watch.factors == {getattr(torch, adapter_dtype)}
    assert watch.others <= {torch.promote_types(torch.float32, expected), torch.float64}
    assert watch.states <= watch.factors | watch.others
    weights = {"layers.0.weight", "layers.3.weight", "layers.5.weight"}
    assert watch.changed == (set() if gradient == "factored" else weights)
    for name, p in watch.base.items():
        assert p.dtype == expected
        if name not in weights:
            assert torch.equal(p, dict(layers().to(expected).named_parameters(prefix="layers"))[name])
    assert {p.dtype for p in module.parameters()} == {expected}
    assert structure(module)["classes"] == structure(Net())["classes"]


@pytest.mark.parametrize(("precision", "gradient", "decomposition"), pairs(WORKS, GRADIENTS, DECOMPOSITIONS))
def test_its_file_is_plain_and_resumes_to_the_same_bits(precision, gradient, decomposition, tmp_path):
    options = {"rank": 2, "gradient": gradient, "decomposition": decomposition, "exact_resume": True}
    whole, parts, file = Digest(), Digest(), tmp_path / "saved.ckpt"

    def model():  # Lightning loads a file before it casts what `__init__` made: only layers made later load in 64 bits
        return Net(made_in="configure_model" if precision == "64-true" else "__init__")

    fit(tmp_path, precision, LoRA(**options, log_memory=False), whole, model=model)
    fit(tmp_path, precision, LoRA(**options, log_memory=False), SaveByHand(file), epochs=1, model=model)
    saved = torch.load(file, weights_only=True)
    plain = Net().to(STORED.get(precision, torch.float32)).state_dict()
    assert {k: (v.dtype, v.shape) for k, v in saved["state_dict"].items()} == {
        k: (v.dtype, v.shape) for k, v in plain.items()
    }
    fit(tmp_path, precision, LoRA(**options, log_memory=False), parts, file=file, model=model)
    assert (parts.module, parts.optimizers, parts.steps) == (whole.module, whole.optimizers, whole.steps)


class Doubled(nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], torch.Tensor]]] = {
    "Linear": (lambda: nn.Linear(6, 4), lambda: torch.randn(2, 6)),
    "own forward": (lambda: Doubled(6, 4), lambda: torch.randn(2, 6)),
    "Conv1D": (lambda: Conv1D(4, 6), lambda: torch.randn(2, 6)),
    "Embedding": (lambda: nn.Embedding(8, 4), lambda: torch.arange(6)),
    "Conv2d": (lambda: nn.Conv2d(4, 4, 3), lambda: torch.randn(2, 4, 5, 5)),
    "grouped": (lambda: nn.Conv1d(4, 4, 3, groups=2), lambda: torch.randn(2, 4, 5)),
}


@pytest.mark.parametrize(("kind", "gradient", "decomposition"), pairs(LAYERS, GRADIENTS, DECOMPOSITIONS))
def test_a_layer_gives_the_dtype_that_it_gives_without_an_adapter(kind, gradient, decomposition):
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        for autocast in (None, torch.bfloat16, torch.float16):
            check_dtypes(kind, gradient, decomposition, dtype, autocast)


def check_dtypes(kind, gradient, decomposition, dtype, autocast):
    make, draw = LAYERS[kind]
    torch.manual_seed(0)
    module, x = nn.Sequential(make()).to(dtype), draw()
    x = x.to(dtype) if x.is_floating_point() else x
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        expected = module(x)
        inject(module, rank=2, gradient=gradient, decomposition=decomposition, target_modules=["0"])
        assert torch.equal(module(x), expected)
        for adapter in adapters(module).values():
            for p in adapter.trained.values():
                p.data += 0.1
        actual = module(x)
    assert actual.dtype == expected.dtype
    actual.float().square().sum().backward()
    for adapter in adapters(module).values():
        for p in adapter.trained.values():
            assert p.grad is not None
            assert p.grad.dtype == p.dtype
            assert p.grad.isfinite().all()
            assert p.grad.any()


# -------------------------------------------------------------------------------------------------------- skipped steps


class Overflows(Net):
    """The loss is infinite in batches 1, 2 and 5, so that a GradScaler skips their steps."""

    fused = False

    def training_step(self, batch, batch_idx):
        return self.loss(batch) * (math.inf if batch_idx in (1, 2, 5) else 1)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.02, weight_decay=0.1, fused=self.fused)


class FusedOverflows(Overflows):
    """An optimizer that unscales, and skips, by itself."""

    fused = True


class Moved(Callback):
    """In which batches anything moved: weights or what is trained; and that nothing was ever not a number."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.before = {name: p.detach().clone() for name, p in pl_module.named_parameters()}
        self.steps = [adapter.steps for adapter in adapters(pl_module).values()]

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        now = dict(pl_module.named_parameters())
        assert all(p.isfinite().all() for p in now.values())
        moved = any(not torch.equal(p, now[name]) for name, p in self.before.items())
        assert (self.steps != [adapter.steps for adapter in adapters(pl_module).values()]) in (False, moved)
        if moved:
            self.batches.append(batch_idx)


@pytest.mark.parametrize("model", [Overflows, FusedOverflows])
@pytest.mark.parametrize(
    "options",
    [
        *({"gradient": gradient, "decomposition": decomposition} for gradient, decomposition in EVERY),
        {"lr_ratio": 4.0},
        {"gradient": "merged", "resample_every_n_steps": 1, "resample": "A"},
        {"gradient": "projected", "resample_every_n_steps": 2, "resample": "A", "resample_moments": "reset"},
        {"gradient": "merged", "init": "symmetric"},
    ],
    ids=str,
)
def test_a_step_that_the_scaler_skips_moves_nothing_and_draws_nothing(options, model, tmp_path):
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    moved, plugin = Moved(), MixedPrecision("16-mixed", "cpu", scaler)
    trainer(tmp_path, LoRA(rank=2, **options, log_memory=False), moved, plugins=[plugin]).fit(model(), data())
    assert moved.batches == [0, 3, 4, 6, 7]
    assert scaler.get_scale() == 256.0 / 8


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_a_resumed_run_goes_on_with_the_scale_that_skipped_steps_have_lowered(gradient, tmp_path):
    ends, scales = [], []
    for epochs, file in ((2, None), (1, None), (2, tmp_path / "saved.ckpt")):
        scaler, end = torch.amp.GradScaler("cpu", init_scale=256.0), Digest()
        plugin = MixedPrecision("16-mixed", "cpu", scaler)
        lora = LoRA(rank=2, gradient=gradient, exact_resume=True, log_memory=False)
        writers = [SaveByHand(tmp_path / "saved.ckpt")] if epochs == 1 else []
        run = trainer(tmp_path, lora, *writers, end, plugins=[plugin], max_epochs=epochs)
        run.fit(Overflows(), ResumableLoader(), ckpt_path=file)
        ends.append((end.module, end.optimizers))
        scales.append(scaler.get_scale())
    assert ends[2] == ends[0] != ends[1]
    assert scales == [256.0 / 64, 256.0 / 8, 256.0 / 64]


# ------------------------------------------------------------------------------------------------------------- refused


def refused(name: str) -> Precision:
    """The plugin; without its constructor where that asks for a package that may not be there."""
    kind = REFUSED[name]
    if kind in (TransformerEnginePrecision, XLAPrecision):
        plugin = kind.__new__(kind)
        plugin.weights_dtype = torch.float16 if "16" in name else torch.bfloat16
        return plugin
    return kind("bf16-true")


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("name", REFUSED)
def test_a_plugin_that_would_take_adapters_away_or_needs_another_strategy_is_refused_by_name(name, gradient, tmp_path):
    model, plugin = Net(), refused(name)
    before = structure(model)
    with pytest.raises(LoRAError, match=f"LoRA does not support {type(plugin).__name__}: it .*[.]"):
        trainer(tmp_path, LoRA(rank=2, gradient=gradient), plugins=[plugin]).fit(model, data())
    assert structure(model) == before


class Replaces(Precision):
    """Does after ``configure_model`` what Transformer Engine's plugin does: other layers take the place of Linears."""

    def __init__(self, *names: str) -> None:
        self.names = names

    def convert_module(self, module):
        for name in self.names:
            old = module.layers[int(name)]
            module.layers[int(name)] = nn.Linear(old.in_features, old.out_features, old.bias is not None)
        return module


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("names", [("3",), ("0", "3", "5")])
def test_a_plugin_of_the_users_own_that_replaces_adapted_layers_is_named(names, gradient, tmp_path):
    plugin = Replaces(*names)
    match = rf"The adapter of 'layers\.{names[0]}' and {len(names) - 1} more are gone: .* by Replaces or"
    with pytest.raises(LoRAError, match=match):
        trainer(tmp_path, LoRA(rank=2, gradient=gradient), plugins=[plugin]).fit(Net(), data())


class Rounds(Precision):
    """A plugin of the user's own that leaves layers where they are."""

    def convert_input(self, data):
        return [tensor.bfloat16().float() for tensor in data]


def test_a_plugin_of_the_users_own_that_replaces_nothing_works(tmp_path):
    watch, model = Watch(), Net()
    trainer(tmp_path, LoRA(rank=2), watch, plugins=[Rounds()]).fit(model, data())
    assert not torch.equal(model(batches()[0][0]), Net()(batches()[0][0]))
    assert watch.changed == set()
