"""What others make of an adapted module: compiled, recomputed, traced, exported, copied, pickled."""

import contextlib
import copy
import functools
import importlib
import io
import itertools
import pickle

import pytest
import torch
import torch.multiprocessing
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelSummary
from lightning.pytorch.loggers import TensorBoardLogger
from lightning_utilities.core.imports import RequirementCache
from models import Digest, Net, ResumableLoader, batches, data, digest, layers, structure, trainer
from pairs import pairs
from resume import Run, SaveByHand
from torch import nn
from torch._dynamo.utils import counters
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D
from zoo import TIED, ZOO, Experts, TiedNet, Zoo

from lightning_lora import LoRA, adapters, attach, inject, merge
from lightning_lora.errors import LoRAError

GRADIENTS = ("factored", "merged", "projected")
DECOMPOSITIONS = ("product", "additive", "dora")
IN_EVERY_WAY = pairs(GRADIENTS, DECOMPOSITIONS, (True, False))

pytestmark = [
    # Dynamo instantiates any autograd Function to trace its backward, of which torch itself warns.
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning"),
]


@pytest.fixture(autouse=True)
def no_graphs_of_other_tests():
    torch._dynamo.reset()
    counters.clear()


# ------------------------------------------------------------------------------------------------------------ compiled


class Doubled(nn.Linear):
    """A Linear with a forward of its own."""

    def forward(self, input):
        return 2 * super().forward(input)


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 4, batch_first=True)

    def forward(self, x):
        return self.lstm(x)[0]


HOSTS = {
    "linear": (lambda: nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 4)), (2, 3, 6), {}),
    "own-forward": (lambda: nn.Sequential(Doubled(6, 4)), (2, 3, 6), {}),
    "Conv1D": (lambda: nn.Sequential(Conv1D(4, 6)), (2, 3, 6), {}),
    "embedding": (lambda: nn.Sequential(nn.Embedding(8, 4, padding_idx=0)), None, {"target_modules": ["0"]}),
    "conv": (lambda: nn.Sequential(nn.Conv2d(4, 4, 3, padding=1)), (2, 4, 5, 5), {"target_modules": ["0"]}),
    "attention": (SelfAttention, (2, 3, 4), {"target_modules": ["attention"]}),
    "lstm": (Recurrent, (2, 3, 4), {"target_modules": ["lstm"]}),
    "parameter": (Experts, (2, 6), {"target_modules": None, "target_parameters": ["up"]}),
}
BY_PARAMETER = ("attention", "lstm", "parameter")
"""Adapted through their weights, whatever `gradient` says."""
UNTRACEABLE = ("lstm",)
"""What dynamo does not trace without adapters either."""


def is_whole(host, gradient, decomposition="product"):
    """Whether it is one graph. torch 2.6 does not trace the backward of a tap that is no Linear's, and splits there."""
    taps = gradient == "merged" and decomposition != "dora" and host in ("conv", "embedding")
    return host not in UNTRACEABLE and (torch.__version__ >= (2, 13) or not taps)


def nudged(module):
    """Moves all that is trained away from where it starts; weights that hold their increments follow."""
    trained = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1.0)
    handle = attach(module, optimizer)
    generator = torch.Generator().manual_seed(1)
    for p in trained:
        p.grad = 0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    optimizer.step()
    optimizer.zero_grad()
    handle.remove()
    return module


def made(host, **options):
    """A module in float64, its input, and what injects it."""
    make, shape, own = HOSTS[host]
    torch.manual_seed(0)
    module = make().double()
    x = torch.arange(6).view(2, 3) if shape is None else torch.randn(shape).double()
    return module, x, functools.partial(inject, module, **{"rank": 2, "adapter_dtype": "float64", **own, **options})


def steps(module, function, x, n=3):
    """Losses and gradients of ``n`` steps, and what is trained to."""
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.1)
    handle = attach(module, optimizer)
    seen = []
    for _ in range(n):
        optimizer.zero_grad()
        loss = function(x).square().mean()
        loss.backward()
        seen += [loss.detach(), *(p.grad.clone() for p in module.parameters() if p.requires_grad)]
        optimizer.step()
    handle.remove()
    return [*seen, *(value.clone() for value in module.state_dict().values())]


EXACT = [host for host in HOSTS if host not in BY_PARAMETER]


@pytest.mark.parametrize(
    ("host", "gradient", "decomposition"),
    [*pairs(EXACT, GRADIENTS, DECOMPOSITIONS), *pairs(BY_PARAMETER, GRADIENTS[-1:], DECOMPOSITIONS)],
)
def test_compiled_it_is_one_graph_that_is_compiled_once_and_takes_the_same_steps(host, gradient, decomposition):
    runs = []
    for compiled in (False, True):
        module, x, adapt = made(host, gradient=gradient, decomposition=decomposition)
        adapt()
        nudged(module)
        whole = is_whole(host, gradient, decomposition)
        function = torch.compile(module, backend="aot_eager", fullgraph=whole) if compiled else module
        with torch._dynamo.config.patch(error_on_recompile=True):
            runs.append(steps(module, function, x))
    assert counters["stats"]["unique_graphs"] == 1 or not whole
    for eager, fast in zip(*runs, strict=True):
        torch.testing.assert_close(fast, eager, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("host", "gradient"),
    [("linear", "factored"), ("Conv1D", "projected"), ("conv", "merged"), ("attention", "projected")],
)
def test_compiled_for_any_batch_size_it_is_one_graph_for_all_of_them(host, gradient):
    module, x, adapt = made(host, gradient=gradient, alpha=3)
    adapt()
    nudged(module)
    whole = is_whole(host, gradient)
    function = torch.compile(module, backend="aot_eager", fullgraph=whole, dynamic=True)
    for size in (2, 3, 5):
        inputs = x[:1].expand(size, *x.shape[1:]).contiguous()
        results = []
        for forward in (module, function):
            module.zero_grad()
            forward(inputs).square().sum().backward()
            results.append([p.grad for p in module.parameters() if p.requires_grad])
        for eager, fast in zip(*results, strict=True):
            torch.testing.assert_close(fast, eager, rtol=1e-12, atol=1e-12)
    assert counters["stats"]["unique_graphs"] == 1 or not whole


@pytest.mark.parametrize("host", UNTRACEABLE)
def test_where_the_compiler_breaks_it_breaks_as_often_without_adapters(host):
    breaks = []
    for adapted in (False, True):
        torch._dynamo.reset()
        module, x, adapt = made(host, gradient="projected")
        if adapted:
            adapt()
        breaks.append(torch._dynamo.explain(module)(x).graph_break_count)
    assert breaks[1] <= max(breaks[0], 0)


@pytest.mark.parametrize(
    "options",
    [
        {"gradient": "factored", "init": "symmetric"},
        {"gradient": "factored", "dropout": 0.5},
        {"gradient": "merged", "init": "symmetric"},
        {"gradient": "merged", "resample_every_n_steps": 1, "resample": "A"},
        {"gradient": "merged", "resample_every_n_steps": 2},
        {"gradient": "projected", "resample_every_n_steps": 1},
        {"gradient": "factored", "lr_ratio": 4.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("host", ["linear", "conv"])
def test_no_option_makes_the_compiler_start_again(host, options):
    if host == "conv" and "dropout" in options:
        options = {**options, "dropout": 0.1}
    runs = []
    for compiled in (False, True):
        module, x, adapt = made(host, **options)
        adapt()
        whole = is_whole(host, options["gradient"])
        function = torch.compile(module, backend="aot_eager", fullgraph=whole) if compiled else module
        with torch._dynamo.config.patch(error_on_recompile=True):
            torch.manual_seed(2)
            runs.append(steps(module, function, x, n=5))
    assert counters["stats"]["unique_graphs"] == 1 or not whole
    for eager, fast in zip(*runs, strict=True):
        torch.testing.assert_close(fast, eager, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "options",
    [
        *({"gradient": gradient} for gradient in GRADIENTS),
        {"gradient": "merged", "resample_every_n_steps": 1, "resample": "A"},
        {"gradient": "projected", "resample_every_n_steps": 1, "resample": "A"},
        {"gradient": "merged", "resample_every_n_steps": 3},
        {"gradient": "factored", "lr_ratio": 4.0},
    ],
    ids=str,
)
def test_over_20_steps_with_a_changing_rate_and_a_resumption_it_breaks_and_recompiles_nowhere(options):
    """Training goes on from a state dict in mid-run, into the same module and optimizer."""
    runs = []
    for compiled in (False, True):
        module, x, adapt = made("linear", **options)
        adapt()
        function = torch.compile(module, backend="aot_eager", fullgraph=True) if compiled else module
        optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
        handle, losses = attach(module, optimizer), []
        with torch._dynamo.config.patch(error_on_recompile=True):
            for step in range(20):
                if step == 10:
                    own, others = copy.deepcopy((module.state_dict(), optimizer.state_dict()))
                    module.load_state_dict(own)
                    optimizer.load_state_dict(others)
                optimizer.zero_grad()
                loss = function(x).square().mean()
                loss.backward()
                optimizer.step()
                scheduler.step()
                losses.append(loss.detach())
        handle.remove()
        runs.append([*losses, *(value.clone() for value in module.state_dict().values())])
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    for eager, fast in zip(*runs, strict=True):
        torch.testing.assert_close(fast, eager, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("gradient", ["merged", *(pytest.param(g, marks=pytest.mark.slow) for g in GRADIENTS[::2])])
def test_by_the_default_backend_it_takes_the_same_steps(gradient):
    """Generated code, for a Linear and a convolution at once."""
    runs = []
    for compiled in (False, True):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Conv1d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(16, 4)).double()
        inject(module, rank=2, gradient=gradient, target_modules=["0", "3"], adapter_dtype="float64")
        x = torch.randn(2, 3, 6).double()
        function = torch.compile(module, fullgraph=is_whole("conv", gradient)) if compiled else module
        runs.append(steps(nudged(module), function, x))
    for eager, fast in zip(*runs, strict=True):
        torch.testing.assert_close(fast, eager, rtol=1e-10, atol=1e-10)


def compiled_whole(module):
    return torch.compile(module, backend="eager")


def compiled_in_place(module):
    module.compile(backend="eager")
    return module


def compiled_by_layers(module):
    for child in module:
        child.compile(backend="eager")
    return module


@pytest.mark.parametrize(
    ("compiled", "gradient"), list(zip((compiled_whole, compiled_in_place, compiled_by_layers), GRADIENTS, strict=True))
)
def test_what_was_compiled_and_run_before_runs_the_adapters_and_then_the_merged_weights(compiled, gradient):
    net, x = layers().double().eval(), torch.randn(4, 8).double()
    function = compiled(net)
    plain = function(x)
    inject(net, rank=2, gradient=gradient, adapter_dtype="float64")
    assert torch.equal(function(x), plain)
    nudged(net)
    adapted = function(x)
    assert (adapted - plain).abs().max() > 0.1
    assert torch.equal(adapted, nn.Sequential.forward(net, x))
    adapted.sum().backward()
    assert all(p.grad is not None for adapter in adapters(net).values() for p in adapter.trained.values())
    with torch.no_grad():
        torch.testing.assert_close(function(x), adapted)
    merge(net)
    torch.testing.assert_close(function(x), adapted, rtol=1e-12, atol=1e-12)
    assert not function(x).grad_fn.next_functions[1][0].name().startswith("_Linear")
    with torch.no_grad():
        for p in net.parameters():
            p.zero_()
    assert not function(x).any()


def test_a_wrapper_that_compiles_can_be_injected_into_and_merged():
    net, x = layers().double().eval(), torch.randn(4, 8).double()
    function = torch.compile(net, backend="eager")
    keys = list(function.state_dict())
    before = structure(net)
    assert inject(function, rank=2, adapter_dtype="float64") == ["0", "3", "5"] == list(adapters(function))
    nudged(function)
    adapted = function(x)
    attach(function, torch.optim.SGD([p for p in function.parameters() if p.requires_grad], lr=0.1)).remove()
    with pytest.raises(LoRAError, match="has adapters already"):
        inject(function, rank=2)
    merge(function)
    torch.testing.assert_close(function(x), adapted, rtol=1e-12, atol=1e-12)
    assert list(function.state_dict()) == keys
    assert structure(net) == before


# -------------------------------------------------------------------------------------------------- compiled, by name


class Parts(nn.Module):
    """Every way to have something compiled inside."""

    def __init__(self, wrap=compiled_whole) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tower = wrap(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)))
        self.single = wrap(nn.Linear(4, 4))
        self.attention = wrap(nn.MultiheadAttention(4, 2, batch_first=True))
        self.head = nn.Sequential(wrap(nn.LayerNorm(4)), nn.Linear(4, 2))


ALL_PARTS = ["tower.0", "tower.2", "single", "attention.in_proj_weight", "attention.out_proj", "head.1"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ALL_PARTS),
        ({"target_modules": r"tower\.[02]"}, ["tower.0", "tower.2"]),
        ({"target_modules": ["tower.0", "single"]}, ["tower.0", "single"]),
        ({"target_modules": ["attention"]}, ["attention.in_proj_weight", "attention.out_proj"]),
        ({"target_modules": None, "target_parameters": ["single.weight"]}, ["single"]),
        ({"exclude_modules": ["tower", "single"]}, ["attention.in_proj_weight", "attention.out_proj", "head.1"]),
        ({"modules_to_save": ["head"]}, ALL_PARTS[:-1]),
        ({"rank_pattern": {"single": 1}, "alpha_pattern": {r"tower\.0": 8}}, ALL_PARTS),
    ],
    ids=str,
)
@pytest.mark.parametrize("wrap", ["compiled", "checkpointed"])
def test_rules_mean_what_they_would_if_nothing_were_wrapped(wrap, options, expected):
    wrapped = Parts() if wrap == "compiled" else Parts(checkpoint_wrapper)
    plain = Parts(lambda module: module)
    for module in (plain, wrapped):
        assert inject(module, rank=2, **options) == expected == list(adapters(module))
    for name, adapter in adapters(plain).items():
        other = adapters(wrapped)[name]
        assert digest([adapter.A, adapter.B, adapter.scale]) == digest([other.A, other.B, other.scale])
    flags = [[p.requires_grad for p in module.parameters()] for module in (plain, wrapped)]
    assert flags[0] == flags[1]


def test_a_name_as_torch_has_it_is_refused_with_the_users():
    with pytest.raises(ValueError, match=r"'tower\._orig_mod\.0', which matches no module. Did you mean .*'tower\.0'"):
        inject(Parts(), rank=2, target_modules=["tower._orig_mod.0"])


# ------------------------------------------------------------------------------------------------ compiled, in a fit


class Losses(Callback):
    """The losses, and how many graphs there were after each batch."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.graphs: list[int] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.losses.append(outputs["loss"].item())
        self.graphs.append(counters["stats"]["unique_graphs"])


class CompiledInInit(Net):
    def __init__(self) -> None:
        super().__init__()
        self.layers.compile(backend="eager")


class CompiledInConfigureModel(Net):
    def __init__(self) -> None:
        super().__init__(made_in="configure_model")

    def configure_model(self) -> None:
        super().configure_model()
        self.layers.compile(backend="eager")


class WrappedInInit(Net):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.compile(self.layers, backend="eager")


class WrappedInConfigureModel(Net):
    def configure_model(self) -> None:
        if not hasattr(self.layers, "_orig_mod"):
            self.layers = torch.compile(self.layers, backend="eager")


def given_to_fit():
    return torch.compile(Net(), backend="eager")


COMPILED = (given_to_fit, CompiledInInit, CompiledInConfigureModel, WrappedInInit, WrappedInConfigureModel)


def fitted(folder, model, lora, *callbacks, **options):
    losses = Losses()
    trainer(folder, lora, losses, *callbacks, max_epochs=2, **options).fit(model, ResumableLoader())
    return losses


FITTED = [*({"gradient": gradient} for gradient in GRADIENTS), {"init": "gradient", "decomposition": "dora"}]


@pytest.mark.parametrize(("model", "options"), list(zip(COMPILED, itertools.cycle(FITTED))))
def test_a_compiled_module_is_fitted_to_the_same_bits_and_not_compiled_in_every_step(model, options, tmp_path):
    plain, compiled = Net(), model()
    expected = fitted(tmp_path, plain, LoRA(rank=2, **options))
    assert expected.graphs[-1] == 0
    actual = fitted(tmp_path, compiled, LoRA(rank=2, **options))
    assert actual.graphs[-1] == actual.graphs[0] > 0
    assert actual.losses == expected.losses
    assert digest(list(compiled.state_dict().values())) == digest(list(plain.state_dict().values()))
    with torch.no_grad():  # the graphs of the run are not those of the merged weights
        assert torch.equal(compiled.eval()(batches()[0][0]), plain.eval()(batches()[0][0]))


@pytest.mark.parametrize(("model", "gradient"), list(zip(COMPILED, itertools.cycle(("merged", "factored")))))
def test_files_of_a_compiled_run_have_the_keys_of_the_compiled_module_and_resume_to_the_same_bits(
    model, gradient, tmp_path
):
    options = {"rank": 2, "gradient": gradient, "modules_to_save": ["layers.1"], "bias": "all"}
    whole, parts, file = Digest(), Digest(), tmp_path / "saved.ckpt"
    fitted(tmp_path, model(), LoRA(**options), whole)
    trainer(tmp_path, LoRA(**options), SaveByHand(file)).fit(model(), ResumableLoader())
    saved = torch.load(file, weights_only=True)
    fresh = model()
    fresh = getattr(fresh, "_orig_mod", fresh)
    fresh.configure_model()
    assert list(saved["state_dict"]) == list(fresh.state_dict())
    assert list(saved["lightning_lora"]["adapters"]) == ["layers.0", "layers.3", "layers.5"]
    fresh.load_state_dict(saved["state_dict"], strict=True)
    run = trainer(tmp_path, LoRA(**options, exact_resume=True), parts, max_epochs=2)
    run.fit(model(), ResumableLoader(), ckpt_path=file)
    assert (parts.module, parts.optimizers, parts.steps) == (whole.module, whole.optimizers, whole.steps)


@pytest.mark.parametrize("form", ["merged", "adapter"])
@pytest.mark.parametrize("before", [WrappedInInit, WrappedInConfigureModel])
def test_files_of_a_compiled_run_saved_after_fit_or_of_adapters_only_resume_too(before, form, tmp_path):
    run = Run("after_fit", {"checkpoint": form}, model=before)
    expected, actual = run.uninterrupted(tmp_path), run.resumed(tmp_path, run.saved(tmp_path))
    assert (actual.module, actual.optimizers) == (expected.module, expected.optimizers)


def test_a_compiled_run_validates_what_it_trains(tmp_path):
    model = WrappedInInit()
    run = trainer(tmp_path, LoRA(rank=2, lr_ratio=4.0), max_epochs=2)
    run.fit(model, data(), data())
    (result,) = trainer(tmp_path).validate(model, data(), verbose=False)
    assert result["val_loss"] == pytest.approx(run.callback_metrics["val_loss"].item(), rel=1e-5)
    assert type(model) is WrappedInInit
    assert not any(key.endswith(("A", "B")) for key in model.state_dict())


# ---------------------------------------------------------------------------------------------- activation checkpoints


class Recomputed(nn.Module):
    """Runs a module inside an activation checkpoint, reentrant or not, or outside of one."""

    def __init__(self, module: nn.Module, reentrant: bool | None) -> None:
        super().__init__()
        self.module, self.reentrant = module, reentrant
        self.calls = 0

    def forward(self, x):
        if self.reentrant is None:
            return self.counted(x)
        return checkpoint(self.counted, x, use_reentrant=self.reentrant)

    def counted(self, x):
        self.calls += 1
        return self.module(x)


@pytest.mark.parametrize(
    "options",
    [
        *({"gradient": gradient, "decomposition": kind} for gradient in GRADIENTS for kind in DECOMPOSITIONS),
        {"gradient": "factored", "dropout": 0.4},
        {"gradient": "factored", "decomposition": "dora", "dropout": 0.4},
        *(
            {"gradient": gradient, "resample_every_n_steps": 1, "resample": resample}
            for gradient in ("merged", "projected")
            for resample in ("both", "A")
        ),
    ],
    ids=str,
)
def test_inside_an_activation_checkpoint_gradients_are_the_same_bits(options):
    runs = []
    for reentrant in (None, True, False):
        torch.manual_seed(0)
        inner = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Unflatten(1, (4, 4)), nn.Conv1d(4, 4, 1), nn.Flatten())
        module = Recomputed(inner, reentrant)
        inject(module, rank=2, target_modules=["0", "3"], **options)
        nudged(module)
        x = torch.randn(4, 8, requires_grad=True)
        torch.manual_seed(1)
        module(x).square().sum().backward()
        assert module.calls == (1 if reentrant is None else 2)
        runs.append([x.grad, *(p.grad for p in module.parameters() if p.requires_grad)])
    assert digest(runs[0]) == digest(runs[1]) == digest(runs[2])


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_inside_an_activation_checkpoint_it_is_compiled_as_one_graph(gradient):
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Unflatten(1, (4, 4)), nn.Conv1d(4, 4, 1), nn.Flatten())
    module, x = Recomputed(inner.double(), reentrant=False), torch.randn(4, 8).double()
    inject(module, rank=2, target_modules=["0", "3"], gradient=gradient, adapter_dtype="float64")
    nudged(module)
    whole = is_whole("conv", gradient)
    function = torch.compile(lambda x: checkpoint(inner, x, use_reentrant=False), backend="aot_eager", fullgraph=whole)
    results = []
    for forward in (module, function):
        module.zero_grad()
        forward(x).square().sum().backward()
        results.append([p.grad for p in module.parameters() if p.requires_grad])
    for eager, fast in zip(*results, strict=True):
        torch.testing.assert_close(fast, eager, rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_a_hugging_face_model_with_gradient_checkpointing_has_the_same_gradients(gradient, reentrant):
    runs = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            use_cache=False,
        )
        model = LlamaForCausalLM(config).train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            if reentrant:
                model.enable_input_require_grads()
        inject(model, rank=2, gradient=gradient, dropout=0.2 if gradient == "factored" else 0.0)
        nudged(model)
        calls = []
        model.model.layers[0].mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        ids = torch.arange(12).view(2, 6)
        torch.manual_seed(1)
        model(input_ids=ids, labels=ids).loss.backward()
        assert len(calls) == 1 + checkpointed
        runs.append([p.grad for p in model.parameters() if p.requires_grad])
    assert digest(runs[0]) == digest(runs[1])


class ReentrantNet(Net):
    def forward(self, x):
        return self.layers[3:](checkpoint(self.layers[:3], x, use_reentrant=True))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("options", [*({"gradient": gradient} for gradient in GRADIENTS), {"decomposition": "dora"}])
def test_adapters_that_a_reentrant_checkpoint_cuts_off_are_named_in_every_mode(options, tmp_path):
    with pytest.warns(UserWarning, match=r"adapters of 'layers\.0' in .*`use_reentrant=False`"):
        trainer(tmp_path, LoRA(rank=2, **options)).fit(ReentrantNet(), data())


class WrappedInCheckpoints(Net):
    """As FSDP's users have them: torch's wrapper, whose name is in the module's names and not in its keys."""

    def _make(self, where: str) -> None:
        if where == "__init__":
            super()._make(where)
            for i in (0, 3, 5):
                self.layers[i] = checkpoint_wrapper(self.layers[i])


@pytest.mark.parametrize(("gradient", "form"), [("factored", "merged"), ("factored", "adapter"), ("merged", "merged")])
@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_a_file_does_not_tell_whether_layers_were_inside_activation_checkpoints(gradient, form, precision, tmp_path):
    options = {"rank": 2, "gradient": gradient, "bias": "all", "modules_to_save": ["layers.5"], "checkpoint": form}
    files, ends = [], []
    for model in (Net, WrappedInCheckpoints):
        end, file = Digest(), tmp_path / f"{model.__name__}.ckpt"
        run = trainer(tmp_path, LoRA(**options), SaveByHand(file), end, precision=precision)
        run.fit(model(), ResumableLoader())
        files.append(torch.load(file, weights_only=True))
        ends.append(end.module)
    assert list(files[0]["state_dict"]) == list(files[1]["state_dict"])
    assert digest(files[0]["state_dict"]) == digest(files[1]["state_dict"])
    assert digest(files[0]["lightning_lora"]) == digest(files[1]["lightning_lora"])
    assert not any("lora" in name for name in files[1]["state_dict"]._metadata)
    assert ends[0] == ends[1]
    resumed, whole = Digest(), Digest()
    for digested, path in ((whole, None), (resumed, tmp_path / "Net.ckpt")):
        run = trainer(tmp_path, LoRA(**options, exact_resume=True), digested, max_epochs=2, precision=precision)
        run.fit(WrappedInCheckpoints(), ResumableLoader(), ckpt_path=path)
    assert (resumed.module, resumed.optimizers) == (whole.module, whole.optimizers)


# ------------------------------------------------------------------------------------------------- graphs and exports


class WithExample(Net):
    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.example_input_array = batches(seed)[0][0]


@pytest.mark.filterwarnings("ignore:.torch.jit.trace", "ignore:.*torch.jit.trace_method:DeprecationWarning")
@pytest.mark.parametrize("options", [*({"gradient": gradient} for gradient in GRADIENTS), {"decomposition": "dora"}])
def test_a_model_summary_and_a_graph_of_the_adapted_module_are_drawn(options, tmp_path):
    logger = TensorBoardLogger(tmp_path, log_graph=True)
    run = trainer(tmp_path, LoRA(rank=2, **options), ModelSummary(max_depth=2), logger=logger)
    run.fit(WithExample(), data())
    (written,) = tmp_path.rglob("events.out*")
    assert b"Linear[0]" in written.read_bytes()


def forward_of(model):
    """What is exported of a LightningModule: its forward."""
    return model.eval()


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("options", [{"gradient": gradient} for gradient in GRADIENTS])
def test_after_fit_the_exported_program_has_no_adapter_and_computes_with_the_merged_weights(options, strict, tmp_path):
    model, x = Net(), batches()[1][0]
    trainer(tmp_path, LoRA(rank=2, **options)).fit(model, data())
    program = torch.export.export(forward_of(model), (x,), strict=strict)
    assert program.state_dict.keys() == Net().state_dict().keys()
    assert torch.equal(program.module()(x), model(x))
    assert not torch.allclose(program.module()(x), Net().eval()(x), atol=1e-3)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    assert torch.equal(torch.export.load(file).module()(x), model(x))


@pytest.mark.filterwarnings("ignore:The tensor attributes? .*_flat_weights")  # of a plain LSTM, by torch
@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node", "ignore:Node .* does not reference")  # by 2.6
@pytest.mark.parametrize(("gradient", "decomposition", "with_gradients"), IN_EVERY_WAY)
def test_an_adapted_module_can_be_exported_as_it_is(gradient, decomposition, with_gradients):
    model, x = Zoo(), batches()[1][0]
    inject(model, rank=2, gradient=gradient, decomposition=decomposition, **ZOO)
    nudged(model).eval()
    with contextlib.nullcontext() if with_gradients else torch.no_grad():
        program = torch.export.export(model, (x,), strict=False)
        expected = model(x)
        torch.testing.assert_close(program.module()(x), expected)
    merge(model)
    plain = torch.export.export(model, (x,), strict=False)
    assert plain.state_dict.keys() == Zoo().state_dict().keys()
    torch.testing.assert_close(plain.module()(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_an_adapted_module_can_be_exported_for_any_batch_size(gradient, decomposition):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.Unflatten(1, (4, 1)), nn.Conv1d(4, 4, 1), nn.Flatten(), Doubled(4, 4))
    inject(model, rank=2, gradient=gradient, decomposition=decomposition, target_modules=["0", "2", "4"])
    nudged(model).eval()
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(model, (torch.randn(3, 6),), dynamic_shapes=({0: batch},), strict=False)
    x = torch.randn(7, 6)
    torch.testing.assert_close(program.module()(x), model(x))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:.*to_torchscript.*deprecated")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize(("gradient", "decomposition", "with_gradients"), IN_EVERY_WAY)
def test_an_adapted_module_can_be_traced_and_the_trace_saved(gradient, decomposition, with_gradients):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.Unflatten(1, (4, 1)), nn.Conv1d(4, 4, 1), nn.Flatten(), Doubled(4, 4))
    x = torch.randn(3, 6)
    options = {"gradient": gradient, "decomposition": decomposition, "target_modules": ["0", "2", "4"]}
    inject(model, rank=2, **options)
    nudged(model).eval()
    with contextlib.nullcontext() if with_gradients else torch.no_grad():
        traced = torch.jit.trace(model, (x,))
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    x = torch.randn(5, 6)
    torch.testing.assert_close(torch.jit.load(file)(x), model(x))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:.*to_torchscript.*deprecated")
def test_torchscript_takes_the_module_after_fit_and_refuses_adapters_by_name(tmp_path):
    model, x = Net(), batches()[1][0]
    trainer(tmp_path, LoRA(rank=2)).fit(model, data())
    scripted = torch.jit.script(model.layers.eval())
    assert torch.equal(scripted(x), model.eval()(x))
    traced = model.to_torchscript(method="trace", example_inputs=x)
    assert torch.equal(traced(x), model(x))
    for gradient in GRADIENTS:
        net = layers()
        inject(net, rank=2, gradient=gradient)
        with pytest.raises(LoRAError, match="TorchScript cannot compile a Linear with an adapter"):
            torch.jit.script(net)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.skipif(not RequirementCache("torch>=2.7"), reason="torch 2.6 exports by another exporter")
def test_after_fit_the_module_is_exported_to_onnx(tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    model, x = Net(), batches()[1][0]
    trainer(tmp_path, LoRA(rank=2)).fit(model, data())
    model.eval().to_onnx(tmp_path / "model.onnx", x)
    exported = onnx.load(tmp_path / "model.onnx")
    assert not any("lora" in tensor.name for tensor in exported.graph.initializer)
    evaluator = importlib.import_module("onnx.reference").ReferenceEvaluator(exported)
    (y,) = evaluator.run(None, {exported.graph.input[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), model(x).detach(), rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------------------------------- copies


def pickled(value):
    return pickle.loads(pickle.dumps(value))


def saved(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIED = (copy.deepcopy, pickled, saved)


@pytest.mark.parametrize(
    ("copied", "gradient", "decomposition", "model"),
    [*pairs(COPIED, GRADIENTS, DECOMPOSITIONS, [Zoo]), *pairs(COPIED, ["projected"], ["dora"], [TiedNet])],
)
def test_a_copy_computes_trains_and_merges_by_itself(copied, model, gradient, decomposition):
    module, x, options = model(), batches()[0][0], TIED if model is TiedNet else ZOO
    before = structure(module)
    inject(module, rank=2, gradient=gradient, decomposition=decomposition, **options)
    nudged(module).eval()
    twin = copied(module)
    assert twin(x).equal(module(x))
    assert list(adapters(twin)) == list(adapters(module))
    assert all(type(a) is type(b) for a, b in zip(module.modules(), twin.modules(), strict=True))
    assert twin.lora_injection == module.lora_injection
    if model is TiedNet:
        assert twin.out._parameters["weight"] is twin.layers["embed"]._parameters["weight"]
        assert twin.out.lora is twin.layers["embed"].lora
        assert len(adapters(twin)) == 2
    states = {key: value.clone() for key, value in module.state_dict().items()}
    twins = steps(twin, lambda x: twin(x), x)
    assert digest(module.state_dict()) == digest(states)
    assert digest(steps(module, lambda x: module(x), x)) == digest(twins)
    states = {key: value.clone() for key, value in module.state_dict().items()}
    merge(twin)
    assert structure(twin)["classes"] == before["classes"]
    assert structure(twin)["keys"] == before["keys"]
    assert digest(module.state_dict()) == digest(states)
    torch.testing.assert_close(twin(x), module(x), rtol=1e-4, atol=1e-5)


class RootParameter(Net):
    """A parameter of the LightningModule's own, so that the module itself is a host."""

    def __init__(self) -> None:
        super().__init__()
        self.mixed = nn.Parameter(torch.eye(8))

    def forward(self, x):
        return self.layers(x @ self.mixed)


class Copies(Callback):
    """Copies of the module when training starts, and after some steps, with what they stand for."""

    def __init__(self, copied) -> None:
        self.copied = copied

    def on_train_start(self, trainer, pl_module) -> None:
        self.start = self.copied(pl_module)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if batch_idx == 0:
            self.first = self.copied(pl_module)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if batch_idx == 3:
            self.middle = self.copied(pl_module)
            self.lora = self.copied(trainer.callbacks[0])
            with torch.no_grad():
                self.output = pl_module.eval()(batches()[0][0])
                pl_module.train()


@pytest.mark.parametrize(
    ("copied", "model", "options"),
    [
        (copy.deepcopy, Zoo, {**ZOO}),
        (pickled, Zoo, {"gradient": "merged", **ZOO}),
        (saved, Zoo, {"gradient": "projected", **ZOO}),
        (copy.deepcopy, TiedNet, {"gradient": "projected", **TIED}),
        (pickled, RootParameter, {"target_parameters": ["mixed"]}),
        (saved, Net, {"gradient": "merged", "resample_every_n_steps": 2, "resample": "A"}),
        (copy.deepcopy, Net, {"decomposition": "dora", "modules_to_save": ["layers.1"]}),
    ],
)
def test_a_copy_made_in_a_run_is_an_adapted_module_of_no_run(copied, model, options, tmp_path):
    module, x, copies = model(), batches()[0][0], Copies(copied)
    before = structure(model())
    lora = LoRA(rank=2, **options)
    trainer(tmp_path, lora, copies).fit(module, data())
    for twin in (copies.start, copies.first, copies.middle):
        assert sorted(adapters(twin)) == sorted(twin.lora_injection.adapted)
        assert not any(name in vars(twin) for name in ("configure_optimizers", "on_save_checkpoint"))
        assert not {"training_step", "forward"} & vars(twin).keys()
        assert structure(twin)["hooks"].keys() >= before["hooks"].keys()
        assert all(counts == (0, 0, 0) for name, counts in structure(twin)["hooks"].items() if "lora" not in name)
    assert copies.start.lora_injection is not module.__dict__.get("lora_injection")
    middle = copies.middle
    with torch.no_grad():
        assert middle.eval()(x).equal(copies.output)
    trainer(tmp_path).validate(middle, data(), verbose=False)
    with torch.no_grad():
        torch.testing.assert_close(middle(x), copies.output)
    end = digest(module.state_dict())
    merge(middle)
    with torch.no_grad():
        torch.testing.assert_close(middle.eval()(x), copies.output, rtol=1e-4, atol=1e-5)
    assert type(middle) is model
    assert {k: v for k, v in structure(middle).items() if k in ("classes", "keys")} == {
        k: v for k, v in before.items() if k in ("classes", "keys")
    }
    for twin in (copies.start, middle):  # with its adapters, and without
        trainer(tmp_path, LoRA(rank=2, **options)).fit(twin.train(), data())
        assert type(twin) is model
    assert digest(copies.start.state_dict()) == end  # the same run, begun on the copy
    assert digest(module.state_dict()) == end


def test_an_average_kept_in_a_copy_is_merged_by_itself(tmp_path):
    class Average(Callback):
        def on_train_start(self, trainer, pl_module) -> None:
            self.module = copy.deepcopy(pl_module)

        def on_train_batch_end(self, trainer, pl_module, *_) -> None:
            for mean, p in zip(self.module.parameters(), pl_module.parameters(), strict=True):
                mean.data.lerp_(p.data, 0.5)

    average, model = Average(), Net()
    trainer(tmp_path, LoRA(rank=2), average).fit(model, data())
    B, A = (getattr(adapters(average.module)["layers.0"], factor).detach().clone() for factor in "BA")
    merge(average.module)
    torch.testing.assert_close(average.module.layers[0].weight, layers()[0].weight + B.T @ A)
    assert not torch.equal(average.module.layers[0].weight, model.layers[0].weight)
    assert type(average.module) is Net


@pytest.mark.parametrize("copied", COPIED)
def test_the_callback_can_be_copied_before_in_and_after_a_run_and_the_copy_is_in_none(copied, tmp_path):
    lora, copies = LoRA(rank=2, gradient="merged", exact_resume=True), Copies(copied)
    twins = [copied(lora)]
    model = Net()
    trainer(tmp_path, lora, copies).fit(model, data())
    twins += [copies.lora, copied(lora)]
    assert twins[2].memory.lora == lora.memory.lora
    for twin in twins:
        assert (twin.options, twin.checkpoint, twin.exact_resume) == (lora.options, "merged", True)
        other = Net()
        trainer(tmp_path, twin).fit(other, data())
        assert digest(other.state_dict()) == digest(model.state_dict())
        assert type(other) is Net
    trainer_, file = trainer(tmp_path, lora), tmp_path / "end.ckpt"
    trainer_.fit(fresh := Net(), data())
    copied(lora)
    trainer_.save_checkpoint(file)  # the original still has what it takes to resume
    assert "lightning_lora" in torch.load(file, weights_only=True)
    assert type(fresh) is Net


def test_a_run_on_a_module_whose_own_parameter_is_adapted_resumes_from_a_file_saved_after_fit(tmp_path):
    lora = {"target_parameters": ["mixed"]}
    for gradient in GRADIENTS:
        run = Run("after_fit", {**lora, "gradient": gradient}, model=RootParameter)
        expected, actual = run.uninterrupted(tmp_path), run.resumed(tmp_path, run.saved(tmp_path))
        assert (actual.module, actual.optimizers) == (expected.module, expected.optimizers)


def _in_another_process(queue, module, lora, x):
    trained = steps(module, module, x)
    results = digest(trained), list(adapters(module)), lora.options.to_primitives()
    merge(module)
    queue.put((*results, digest(module.state_dict()), type(module[0]).__qualname__))


def test_a_process_that_starts_later_gets_a_module_that_trains_and_merges_to_the_same_bits(tmp_path):
    torch.manual_seed(0)
    module, lora, x = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 4)), LoRA(rank=2), torch.randn(3, 6)
    trainer(tmp_path, lora).fit(Net(), data())
    inject(module, rank=2, target_modules=["0"], target_parameters=["2.weight"])
    nudged(module)
    context = torch.multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    process = context.Process(target=_in_another_process, args=(queue, copy.deepcopy(module), lora, x))
    process.start()
    theirs = queue.get()
    process.join()
    names = list(adapters(module))
    ours = digest(steps(module, module, x))
    merge(module)
    assert theirs == (ours, names, lora.options.to_primitives(), digest(module.state_dict()), "Linear")
