"""What a device has to get right. ``pytest -m accelerator --device cuda`` runs all of it on one GPU.

On the CPU the same tests run, but for those of streams, graphs and synchronisation, which are skipped.
"""

import contextlib
import copy
import itertools

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.plugins.precision import MixedPrecision
from models import Digest, Net, ResumableLoader, batches, layers, trainer
from quantized import KINDS, dequantized
from resume import SaveByHand
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D
from zoo import Experts

from lightning_lora import LoRA, adapters, attach, inject, merge
from lightning_lora.adapters import draws
from lightning_lora.weights import counter
from lightning_lora.weights.rounding import round_stochastically

pytestmark = [
    pytest.mark.accelerator,
    # of cuDNN, where the weights of a recurrent layer are formed anew
    pytest.mark.filterwarnings("ignore:RNN module weights are not part of single contiguous chunk"),
    # of dynamo, which instantiates any autograd Function to trace its backward
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning"),
    pytest.mark.filterwarnings("ignore:AdamW has `weight_decay"),
]

GRADIENTS = ("factored", "merged", "projected")
CPU = torch.device("cpu")

LAYERS = {
    "linear": (lambda: nn.Sequential(nn.Linear(24, 16), nn.Tanh(), nn.Linear(16, 8, bias=False)), (2, 5, 24), {}),
    "Conv1D": (lambda: nn.Sequential(Conv1D(16, 24)), (2, 5, 24), {}),
    "embedding": (lambda: nn.Sequential(nn.Embedding(12, 16, padding_idx=0)), None, {"target_modules": ["0"]}),
    "conv": (lambda: nn.Sequential(nn.Conv2d(8, 12, 3, padding=1)), (2, 8, 6, 6), {}),
    "grouped conv": (lambda: nn.Sequential(nn.Conv2d(8, 12, 3, stride=2, groups=2)), (2, 8, 7, 7), {}),
    "attention": (lambda: Attention(), (2, 5, 16), {}),
    "lstm": (lambda: Recurrent(), (2, 5, 16), {}),
    "experts": (Experts, (5, 6), {"target_modules": None, "target_parameters": ["up"]}),
}
PRECISIONS = {  # dtypes of the module and of autocast, and by how much results may differ, over their norm
    "64-true": (torch.float64, None, 1e-10),
    "32-true": (torch.float32, None, 1e-5),
    "bf16-mixed": (torch.float32, torch.bfloat16, 3e-2),
    "16-mixed": (torch.float32, torch.float16, 4e-3),
    "bf16-true": (torch.bfloat16, None, 3e-2),
    "16-true": (torch.float16, None, 4e-3),
}


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(16, 8, batch_first=True)

    def forward(self, x):
        return self.lstm(x)[0]


@pytest.fixture(autouse=True)
def full_precision_and_one_order(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    torch._dynamo.reset()


def autocast(device, dtype):
    return contextlib.nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def trained(module):
    return [p for p in module.parameters() if p.requires_grad]


def numbers(shape, seed, device=CPU, dtype=torch.float64):
    """The same on every device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device, dtype)


def nudged(module):
    """Moves A and B away from where they start, by a step of an optimizer; weights that hold them follow."""
    optimizer = torch.optim.SGD(trained(module), lr=1.0)
    handle = attach(module, optimizer)
    for index, p in enumerate(trained(module)):
        p.grad = numbers(p.shape, 10 + index, p.device, p.dtype) / 4
    for adapter in adapters(module).values():
        if adapter.padding_idx is not None:  # which never gets a gradient
            adapter.A.grad[:, adapter.padding_idx] = 0
    optimizer.step()
    optimizer.zero_grad()
    handle.remove()
    return module


def made(name, device, dtype, **options):
    """A module with adapters, what it was before in float64 on the CPU, and an input."""
    make, shape, own = LAYERS[name]
    torch.manual_seed(0)
    plain = make().to(dtype)
    module = copy.deepcopy(plain).to(device)
    x = torch.tensor([[1, 0, 3, 3], [2, 11, 3, 0]]) if shape is None else numbers(shape, 1)
    kept = "float64" if dtype == torch.float64 else "float32"
    inject(module, **{"rank": 2, "alpha": 3, "adapter_dtype": kept, **own, **options})
    return nudged(module), plain.double(), x


def by_the_formula(plain, module, x):
    """Output and gradients by autograd through W0 + s B^T A, in float64 on the CPU."""
    parameters, factors = dict(plain.named_parameters()), {}
    for name, adapter in adapters(module).items():
        A, B = factors[name] = [f.detach().cpu().double().requires_grad_() for f in (adapter.A, adapter.B)]
        delta = adapter.scale * B.mT @ A
        key = name if name in parameters else f"{name}.weight"
        parameters[key] = parameters[key].detach() + (delta.mT if adapter.transposed else delta).reshape(adapter.shape)
    y = functional_call(plain, parameters, (x,))
    y.backward(numbers(y.shape, 2))
    return [y, *(factor.grad for pair in factors.values() for factor in pair)]


def differ(found, wanted):
    return ((found.detach().cpu().double() - wanted.detach()).norm() / wanted.norm()).item()


def results(module, x, dtype):
    """Output and gradients of A and B."""
    y = module(x)
    y.backward(numbers(y.shape, 2, y.device, y.dtype))
    return [y, *(factor.grad for adapter in adapters(module).values() for factor in (adapter.A, adapter.B))]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("name", LAYERS)
def test_outputs_and_gradients_are_those_of_the_formula_in_float64(name, gradient, precision, device):
    dtype, mixed, tolerance = PRECISIONS[precision]
    if name == "lstm" and device.type == "cpu" and tolerance > 1e-4:
        pytest.skip("not every CPU has an LSTM of 16 bits")
    module, plain, x = made(name, device, dtype, gradient=gradient)
    there = x.to(device, dtype if x.is_floating_point() else None)
    with autocast(device, mixed):
        found = results(module, there, dtype)
    for own, wanted in zip(found, by_the_formula(plain, module, x), strict=True):
        assert own.device.type == device.type
        assert differ(own, wanted) < tolerance


# --------------------------------------------------------------------------------------------------------------- a run


OPTIONS = {
    **{gradient: {"gradient": gradient} for gradient in GRADIENTS},
    "dropout": {"dropout": 0.2},
    "dora": {"decomposition": "dora"},
    "drawn anew": {"gradient": "merged", "resample_every_n_steps": 2},
    "one-sided": {"gradient": "merged", "resample_every_n_steps": 1, "resample": "A"},
}


def fitted(folder, device, precision, options, *callbacks, epochs, file=None):
    own = {"accelerator": "gpu", "devices": [device.index or 0]} if device.type == "cuda" else {}
    if precision == "16-mixed":  # with a scale that does not overflow, as the default does in the first steps
        scaler = torch.amp.GradScaler(device.type, init_scale=256.0)
        own["plugins"] = [MixedPrecision(precision, device.type, scaler)]
    else:
        own["precision"] = precision
    digest, lora = Digest(), LoRA(rank=2, alpha=3, **options)
    trainer(folder, lora, digest, *callbacks, max_epochs=epochs, **own).fit(Net(), ResumableLoader(), ckpt_path=file)
    return digest.module, digest.optimizers, digest.steps


@pytest.mark.parametrize(
    ("precision", "options"),
    [*itertools.product(["32-true"], OPTIONS), *itertools.product([*PRECISIONS][2:], [*GRADIENTS, "one-sided"])],
)
def test_a_run_resumes_to_the_same_bits(precision, options, device, tmp_path):
    options, file = OPTIONS[options], tmp_path / "saved.ckpt"
    whole = fitted(tmp_path, device, precision, options, Seeded(), epochs=2)
    fitted(tmp_path, device, precision, options, Seeded(), SaveByHand(file), epochs=1)
    assert fitted(tmp_path, device, precision, options, Seeded(), epochs=2, file=file) == whole


class Seeded(Callback):
    """Seeds the masks of dropout in each epoch: the state of the generator is no part of a file."""

    def on_train_epoch_start(self, trainer, pl_module):
        torch.manual_seed(trainer.current_epoch)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_a_step_that_a_gradscaler_skips_moves_nothing_and_the_next_one_does(gradient, device):
    torch.manual_seed(0)
    drawn = {} if gradient == "factored" else {"resample_every_n_steps": 1}
    module = nn.Sequential(nn.Linear(16, 16)).to(device)
    inject(module, rank=2, gradient=gradient, **drawn)
    (adapter,), weight = adapters(module).values(), module[0]._parameters["weight"]
    optimizer = torch.optim.AdamW(trained(module), lr=0.1, weight_decay=0.0)
    attach(module, optimizer)
    scaler = torch.amp.GradScaler(device.type, init_scale=256.0)
    x, seen = numbers((4, 16), 1, device, torch.float32), []
    for step in range(4):
        with torch.autocast(device.type, torch.float16):
            loss = module(x).float().square().mean()
        scaler.scale(loss).backward()
        if step == 1:
            adapter.B.grad.fill_(torch.inf)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        seen.append([t.detach().clone() for t in (adapter.A, adapter.B, weight)])
    assert scaler.get_scale() == 128
    assert all(torch.equal(a, b) for a, b in zip(seen[0], seen[1], strict=True))
    assert not torch.equal(seen[1][1], seen[2][1])
    assert torch.equal(seen[1][2], seen[2][2]) == (gradient == "factored")


# -------------------------------------------------------------------------------------------------------------- draws


@pytest.mark.parametrize("first", [0, 12345, 2**31 - 3, 2**32 - 3])
def test_random_bits_are_the_cpus(first, device):
    key = counter.key("seed", first)
    for draw in (counter.words, counter.halves):
        assert torch.equal(draw(key, first, 1001, device).cpu(), draw(key, first, 1001, CPU))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stochastic_rounding_is_the_cpus(dtype, device):
    x, key = numbers((40, 33), 3, dtype=torch.float32), counter.key("round", 1)
    found = round_stochastically(x.to(device), dtype, key, 7)
    assert torch.equal(found.cpu(), round_stochastically(x, dtype, key, 7))
    assert not torch.equal(found.cpu(), x.to(dtype))


def test_normal_draws_are_the_cpus_but_for_the_last_bits(device):
    key = counter.key("normal")
    torch.testing.assert_close(draws.normal(key, (64, 33), device).cpu(), draws.normal(key, (64, 33), CPU))


@pytest.mark.parametrize("options", [{}, {"init": "symmetric"}, {"init": "orthogonal"}], ids=str)
def test_adapters_start_as_on_the_cpu_bit_for_bit(options, device):
    here, there = layers(), layers().to(device)
    for module in (here, there):
        inject(module, rank=2, **options)
    for own, other in zip(adapters(here).values(), adapters(there).values(), strict=True):
        assert all(torch.equal(p, q.cpu()) for p, q in zip(own.parameters(), other.parameters(), strict=True))


# --------------------------------------------------------------------------------------------- what others make of it


@pytest.mark.parametrize("kind", ["int8", "nf4", "nf4-double", "fp4"])
def test_beside_quantised_weights_gradients_are_those_of_the_dequantised_ones(kind, device):
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    module = nn.Sequential(KINDS[kind](nn.Linear(64, 96).to(device)))
    inject(module, rank=4, alpha=6)
    nudged(module)
    (adapter,) = adapters(module).values()
    x, dy = (numbers((15, size), seed, device, torch.float32) for size, seed in ((64, 1), (96, 2)))
    y = module(x)
    y.backward(dy)
    A, B = (factor.detach().double().requires_grad_() for factor in (adapter.A, adapter.B))
    weight = dequantized(module[0]).to(device) + adapter.scale * B.T @ A
    wanted = nn.functional.linear(x.double(), weight, module[0].bias.double())
    wanted.backward(dy.double())
    # on a GPU, int8 rounds the input as well, and the product of the layer is one of 16 bits
    assert differ(y, wanted.cpu()) < (2e-2 if device.type == "cuda" else 1e-5)
    assert differ(adapter.A.grad, A.grad.cpu()) < 1e-5
    assert differ(adapter.B.grad, B.grad.cpu()) < 1e-5


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("name", ["linear", "conv"])
def test_compiled_it_gives_the_same_and_is_compiled_once(name, gradient, device):
    module, plain, x = made(name, device, torch.float64, gradient=gradient)
    # generated code needs a compiler, which takes its time on the CPU
    fast = torch.compile(module, backend="inductor" if device.type == "cuda" else "aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            module.zero_grad()
            y = fast(x.to(device))
            y.backward(numbers(y.shape, 2, device))
    found = [y, *(factor.grad for adapter in adapters(module).values() for factor in (adapter.A, adapter.B))]
    assert all(differ(own, wanted) < 1e-10 for own, wanted in zip(found, by_the_formula(plain, module, x), strict=True))


def gradients(module, x, forward=None):
    module.zero_grad()
    torch.manual_seed(3)  # for dropout
    (forward or module)(x).square().mean().backward()
    return [p.grad.clone() for p in trained(module)]


EVERY = [{"gradient": gradient} for gradient in GRADIENTS] + [{"dropout": 0.4}, {"decomposition": "dora"}]


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("options", EVERY, ids=str)
def test_inside_an_activation_checkpoint_gradients_are_the_same_bits(options, reentrant, device):
    module, _, x = made("linear", device, torch.float32, **options)
    x = x.to(device, torch.float32).requires_grad_()
    plain = gradients(module, x)
    recomputed = gradients(module, x, lambda x: checkpoint(module, x, use_reentrant=reentrant))
    assert all(torch.equal(a, b) for a, b in zip(plain, recomputed, strict=True))


@pytest.mark.parametrize("options", EVERY, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_saved_on_the_cpu_gives_the_same_bits(options, dtype, device):
    module, _, x = made("linear", device, dtype, **options)
    x = x.to(device, dtype).requires_grad_()
    plain = gradients(module, x)
    with save_on_cpu(pin_memory=device.type == "cuda"):
        moved = gradients(module, x)
    assert all(torch.equal(a, b) for a, b in zip(plain, moved, strict=True))


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("name", ["conv", "grouped conv"])
def test_channels_last_gives_the_same_and_stays_so(name, gradient, device):
    module, plain, x = made(name, device, torch.float64, gradient=gradient)
    base = copy.deepcopy(plain).to(device, memory_format=torch.channels_last)
    module.to(memory_format=torch.channels_last)
    there = x.to(device).to(memory_format=torch.channels_last)
    found = results(module, there, torch.float64)
    for own, wanted in zip(found, by_the_formula(plain, module, x), strict=True):
        assert differ(own, wanted) < 1e-10
    kept = base(there).is_contiguous(memory_format=torch.channels_last)
    assert found[0].is_contiguous(memory_format=torch.channels_last) == kept


@pytest.mark.parametrize("options", OPTIONS)
def test_merged_it_computes_what_it_computed_adapted(options, device):
    module = layers().to(device).eval()
    inject(module, rank=2, alpha=3, **OPTIONS[options])
    nudged(module)
    x = batches()[0][0].to(device)
    with torch.no_grad():
        adapted = module(x)
        merge(module)
        torch.testing.assert_close(module(x), adapted, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------------ of CUDA alone


def steps(module, x, n, optimizer):
    for _ in range(n):
        optimizer.zero_grad()
        module(x).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("options", OPTIONS)
def test_another_stream_computes_the_same_bits(options, cuda):
    runs = []
    for stream in (torch.cuda.current_stream(cuda), torch.cuda.Stream(cuda)):
        stream.wait_stream(torch.cuda.current_stream(cuda))
        with torch.cuda.stream(stream):
            module = layers().to(cuda)
            inject(module, rank=2, **OPTIONS[options])
            optimizer = torch.optim.AdamW(trained(module), lr=0.01)
            attach(module, optimizer)
            torch.manual_seed(0)
            steps(module, batches()[0][0].to(cuda), 5, optimizer)
        torch.cuda.current_stream(cuda).wait_stream(stream)
        runs.append([p.detach().clone() for p in module.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_factored_step_can_be_recorded_as_a_graph(dtype, cuda):
    runs = []
    for recorded in (False, True):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 8)).to(cuda, dtype)
        inject(module, rank=2)
        optimizer = torch.optim.AdamW(trained(module), lr=0.01, capturable=True)
        attach(module, optimizer)
        x = numbers((4, 16), 1, cuda, dtype)
        side = torch.cuda.Stream(cuda)
        side.wait_stream(torch.cuda.current_stream(cuda))
        with torch.cuda.stream(side):
            steps(module, x, 3, optimizer)  # warm-up
        torch.cuda.current_stream(cuda).wait_stream(side)
        step = lambda: steps(module, x, 1, optimizer)  # noqa: B023, E731
        if recorded:
            optimizer.zero_grad()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step()
            step = graph.replay
        for seed in range(5):
            x.copy_(numbers((4, 16), seed, cuda, dtype))
            step()
        runs.append([p.detach().clone() for p in trained(module)])
    for eager, replayed in zip(*runs, strict=True):
        torch.testing.assert_close(replayed, eager)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS)
def test_no_step_waits_for_the_device(options, dtype, cuda):
    module = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 8)).to(cuda, dtype)
    inject(module, rank=2, **OPTIONS[options])
    optimizer = torch.optim.AdamW(trained(module), lr=0.01, fused=True)
    attach(module, optimizer)
    x = numbers((4, 16), 1, cuda, dtype)
    steps(module, x, 3, optimizer)
    torch.cuda.set_sync_debug_mode("error")
    try:
        steps(module, x, 4, optimizer)
    finally:
        torch.cuda.set_sync_debug_mode("default")
