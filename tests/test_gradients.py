"""Factored, merged and projected: one gradient, on every layer, held to autograd through W0 + delta."""

import copy
import itertools
import weakref

import pytest
import reference
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.pytorch_utils import Conv1D

from lightning_lora import Adapter, adapters, attach, inject, merge
from lightning_lora.adapters.draws import generator
from lightning_lora.errors import LoRAError
from lightning_lora.injection.inject import places

GRADIENTS = ["factored", "merged", "projected"]


class Experts(nn.Module):
    """Three matrices in one parameter, used by index; and one that is used transposed."""

    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 10, 6) / 3)
        self.down = nn.Parameter(torch.randn(10, 6) / 3)

    def forward(self, x):
        return sum(torch.tanh(F.linear(x, up)) @ self.down for up in self.up)


class Tied(nn.Module):
    """A language model whose output head is its embedding."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(12, 6)
        self.body = nn.Linear(6, 6)
        self.head = nn.Linear(6, 12, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(torch.tanh(self.body(self.embed(tokens))))


class Attention(nn.Module):
    """Self attention, or cross attention with keys and values of sizes of their own."""

    def __init__(self, **kwargs):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **kwargs)

    def forward(self, query, key=None, value=None):
        return self.attention(query, query if key is None else key, query if value is None else value)[0]


def x(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def tokens(*shape):
    return torch.randint(12, shape, generator=torch.Generator().manual_seed(1))


# name -> (module, inputs, options)
CASES = {
    "linear": (lambda: nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 4)), (x(3, 5, 8),), {}),
    "conv1d of transformers": (lambda: nn.Sequential(Conv1D(12, 8), nn.Tanh(), Conv1D(4, 12)), (x(3, 5, 8),), {}),
    "embedding": (
        lambda: nn.Sequential(nn.Embedding(12, 8, padding_idx=0), nn.Linear(8, 4)),
        (tokens(4, 5),),
        {"target_modules": ["0", "1"]},
    ),
    "convolution in 1 dimension": (
        lambda: nn.Sequential(nn.Conv1d(4, 6, 3, stride=2, padding="valid"), nn.Conv1d(6, 8, 2, groups=2)),
        (x(2, 4, 15),),
        {"target_modules": ["0", "1"]},
    ),
    "convolution in 2 dimensions": (
        lambda: nn.Sequential(
            nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=2), nn.Conv2d(8, 6, 3, padding=1, padding_mode="circular")
        ),
        (x(2, 4, 9, 8),),
        {"target_modules": ["0", "1"]},
    ),
    "convolution in 3 dimensions": (
        lambda: nn.Conv3d(4, 6, (1, 2, 3), dilation=(1, 2, 1), padding="same"),
        (x(2, 4, 4, 5, 5),),
        {"target_parameters": ["weight"], "target_modules": None},
    ),
    "LSTM": (
        lambda: nn.LSTM(8, 6, num_layers=2, bidirectional=True, proj_size=3),
        (x(3, 5, 8),),
        {"target_modules": None, "target_parameters": r"weight_.*"},
    ),
    "GRU": (
        lambda: nn.Sequential(nn.GRU(8, 6, batch_first=True)),
        (x(3, 5, 8),),
        {"target_modules": ["0"]},
    ),
    "self attention": (lambda: Attention(), (x(3, 5, 8),), {"target_modules": ["attention"]}),
    "cross attention": (
        lambda: Attention(kdim=6, vdim=4),
        (x(3, 5, 8), x(3, 7, 6), x(3, 7, 4)),
        {"target_modules": ["attention"]},
    ),
    "transformer encoder": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True), 2),
        (x(3, 5, 8),),
        {"target_modules": ["self_attn", "linear1", "linear2"]},
    ),
    "stack of experts": (
        Experts,
        (x(3, 5, 6),),
        {"target_modules": None, "target_parameters": ["up", "down"]},
    ),
}


def build(case):
    make, inputs, options = CASES[case]
    torch.manual_seed(0)
    module = make().double()
    return module, inputs, options


def loss_of(output):
    output = output[0] if isinstance(output, tuple) else output
    return (output**2).mean() + output.sum() / 100


def adapted(case, gradient, **options):
    module, inputs, own = build(case)
    names = inject(module, rank=2, alpha=3, adapter_dtype="float64", gradient=gradient, **{**own, **options})
    return module, inputs, names


def nudge(module, scale=0.3):
    """Moves every factor as a real step would: both become non-zero, and weights that hold the increment follow."""
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=1.0)
    handle = attach(module, optimizer)
    for name, adapter in adapters(module).items():
        for factor in adapter.parameters():
            factor.grad = scale * torch.randn(factor.shape, generator=generator("nudge", name), dtype=factor.dtype)
    for place in places(module):
        if getattr(place.host, "padding_idx", None) is not None:
            place.adapter.A.grad[:, place.host.padding_idx] = 0  # as in a real step: a padding row has no gradient
    optimizer.step()
    optimizer.zero_grad()
    handle.remove()


def through_autograd(case, module):
    """Loss and gradients of the factors by autograd through W0 + s B^T A, formed, in the plain module."""
    plain, inputs, _ = build(case)
    plain.requires_grad_(False)
    factors, weights = {}, {}
    for place in places(module):
        adapter = place.adapter
        A, B = factors.setdefault(id(adapter), [p.detach().clone().requires_grad_() for p in adapter.parameters()])
        delta = adapter.scale * (A.mT @ B if adapter.transposed else B.mT @ A)
        weights[place.key] = plain.get_parameter(place.key) + delta.view(adapter.shape)
    loss = loss_of(functional_call(plain, weights, inputs))
    loss.backward()
    return loss, [factor.grad for pair in factors.values() for factor in pair]


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_are_those_of_autograd_through_the_formed_weight(case, gradient):
    module, inputs, names = adapted(case, gradient)
    assert names
    nudge(module)
    loss = loss_of(module(*inputs))
    loss.backward()
    expected_loss, expected = through_autograd(case, module)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-12, atol=1e-14)
    actual = [factor.grad for adapter in adapters(module).values() for factor in adapter.parameters()]
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("case", CASES)
def test_all_three_train_to_the_same_losses_and_merge_to_the_same_weights(case):
    losses, states = {}, {}
    for gradient in GRADIENTS:
        module, inputs, _ = adapted(case, gradient)
        before = loss_of(module(*inputs)).item()
        assert before == loss_of(build(case)[0](*inputs)).item()  # injection changes no bit
        optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-2)
        attach(module, optimizer)
        losses[gradient] = []
        for _ in range(6):
            loss = loss_of(module(*inputs))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[gradient].append(loss.item())
        after = loss_of(module(*inputs)).item()
        merge(module)
        assert loss_of(module(*inputs)).item() == pytest.approx(after, rel=1e-13)
        states[gradient] = module.state_dict()
        plain = build(case)[0]
        assert list(states[gradient]) == list(plain.state_dict())
        assert [type(m) for m in module.modules()] == [type(m) for m in plain.modules()]
    assert losses["factored"][-1] != losses["factored"][0]
    for gradient in GRADIENTS[1:]:
        assert losses[gradient] == pytest.approx(losses["factored"], rel=1e-11)
        for entry, value in states["factored"].items():  # AdamW divides a gradient by its size, and rounding with it
            torch.testing.assert_close(states[gradient][entry], value, rtol=1e-8, atol=1e-10)


@st.composite
def convolutions(draw):
    dimensions = draw(st.integers(1, 3))
    groups = draw(st.sampled_from([1, 2, 3]))
    side = st.integers(1, 3)
    sides = lambda: tuple(draw(side) for _ in range(dimensions))  # noqa: E731
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]
    layer = kind(
        groups * draw(st.integers(1, 2)),
        groups * draw(st.integers(1, 2)),
        sides(),
        stride=sides(),
        padding=sides(),
        dilation=sides(),
        groups=groups,
        bias=draw(st.booleans()),
        padding_mode=draw(st.sampled_from(["zeros", "replicate", "circular"])),
    ).double()
    image = torch.randn(
        draw(st.integers(1, 2)), layer.in_channels, *(7 for _ in range(dimensions)), dtype=torch.float64
    )
    return layer, image


@settings(max_examples=40, deadline=None)
@given(problem=convolutions(), gradient=st.sampled_from(GRADIENTS))
def test_any_convolution_equals_the_one_with_the_formed_weight(problem, gradient):
    layer, image = problem
    module = nn.Sequential(copy.deepcopy(layer))
    inject(module, rank=1, target_modules=["0"], gradient=gradient, adapter_dtype="float64")
    nudge(module)
    (adapter,) = adapters(module).values()
    image = image.requires_grad_()
    y = module(image)
    dy = torch.ones_like(y)
    A, B = (p.detach().clone().requires_grad_() for p in adapter.parameters())
    expected = functional_call(layer, {"weight": layer.weight.detach() + (B.T @ A).view(adapter.shape)}, image)
    torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-12)
    actual = torch.autograd.grad(y, [image, adapter.A, adapter.B], dy)
    for a, e in zip(actual, torch.autograd.grad(expected, [image, A, B], dy), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-11)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), n=st.integers(2, 9), m=st.integers(2, 9), lr=st.sampled_from([1e-3, 0.1]))
@pytest.mark.parametrize("gradient", ["merged", "projected"])
def test_a_step_takes_the_weight_where_the_seed_says(gradient, seed, n, m, lr):
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(n, m, bias=False)).double()
    inject(module, rank=2, gradient=gradient, adapter_dtype="float64")
    nudge(module)
    (adapter,) = adapters(module).values()
    X, dY = torch.randn(5, n, dtype=torch.float64), torch.randn(5, m, dtype=torch.float64)
    optimizer = torch.optim.SGD(adapter.parameters(), lr=lr)
    attach(module, optimizer)
    W, A, B = module[0]._parameters["weight"].T.clone(), adapter.A.detach().T.clone(), adapter.B.detach().clone()
    (module(X) * dY).sum().backward()
    optimizer.step()
    W_next, A_next, B_next = reference.sgd_step(W, X.T @ dY, A, B, lr)
    torch.testing.assert_close(module[0]._parameters["weight"].T, W_next, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(adapter.A.T, A_next, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(adapter.B, B_next, rtol=1e-11, atol=1e-12)


def test_a_tied_weight_gets_one_adapter_and_the_gradient_of_both_places():
    torch.manual_seed(0)
    base = Tied().double()
    module = copy.deepcopy(base)
    names = inject(module, rank=2, target_modules=["embed"], gradient="projected", adapter_dtype="float64")
    assert names == ["embed"]
    assert module.embed._parameters["weight"] is module.head._parameters["weight"]
    nudge(module)
    loss_of(module(tokens(3, 4))).backward()
    (adapter,) = adapters(module).values()
    A, B = (p.detach().clone().requires_grad_() for p in adapter.parameters())
    weight = base.embed.weight.detach() + A.T @ B
    loss_of(functional_call(base, {"embed.weight": weight, "head.weight": weight}, tokens(3, 4))).backward()
    torch.testing.assert_close(adapter.A.grad, A.grad)
    torch.testing.assert_close(adapter.B.grad, B.grad)
    merge(module)
    assert module.embed.weight is module.head.weight
    torch.testing.assert_close(module.head.weight, weight)


# ------------------------------------------------------------------------------------------------ what it costs


class Operations(TorchDispatchMode):
    """The names of the operations that run, and how many matrices of given shapes are alive besides the parameters."""

    def __init__(self, module=None, shapes=()):
        super().__init__()
        self.parameters = {p.data_ptr() for p in module.parameters()} if module is not None else set()
        self.names, self.shapes, self.alive, self.peak = [], shapes, weakref.WeakSet(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.names.append(str(func))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and not tensor.is_nested and tuple(tensor.shape) in self.shapes:
                self.alive.add(tensor)
        self.peak = max(self.peak, len({tensor.data_ptr() for tensor in self.alive} - self.parameters))
        return result


@pytest.mark.parametrize("gradient", ["merged", "projected"])
@pytest.mark.parametrize("case", CASES)
def test_without_gradients_the_operations_are_those_of_the_base_model(case, gradient):
    module, inputs, _ = adapted(case, gradient)
    module.eval()
    plain = build(case)[0].eval().requires_grad_(False)
    with torch.no_grad():
        with Operations() as ours:
            module(*inputs)
        with Operations() as theirs:
            plain(*inputs)
    assert ours.names == theirs.names


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
@pytest.mark.parametrize(
    "targets", [["self_attn", "linear1"], ["linear1"], ["layers.1.linear1"], ["layers.1.self_attn"]]
)
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_an_encoder_of_padded_input_is_as_fast_as_the_base_or_else_right(gradient, targets):
    """Nested tensors are a fast path that only the first layer is asked for."""
    module, (inputs,), _ = adapted("transformer encoder", gradient, target_modules=targets)
    padding = torch.arange(5) > torch.tensor([[4], [2], [3]])
    loss, gradients = [], []
    nudge(module)
    for _ in range(2):
        output = module(inputs, src_key_padding_mask=padding)
        loss.append((output[~padding] ** 2).sum())
        loss[-1].backward()
        gradients.append([p.grad.clone() for p in module.parameters() if p.requires_grad])
        module.zero_grad()
        module.eval()
    torch.testing.assert_close(loss[0], loss[1], rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-11, atol=1e-13)
    with torch.no_grad(), Operations() as operations:
        output = module(inputs, src_key_padding_mask=padding)
    torch.testing.assert_close((output[~padding] ** 2).sum(), loss[0].detach(), rtol=1e-11, atol=1e-13)
    fast = operations.names.count("aten._transformer_encoder_layer_fwd.default")
    in_weight = gradient != "factored"
    assert fast == (2 if in_weight else 1 if "layers" in targets[0] else 0)
    assert any("nested" in name for name in operations.names) == (in_weight and "layers" not in targets[0])


def test_projected_holds_the_full_gradient_of_one_weight_at_a_time():
    module = nn.Sequential(*(layer for _ in range(6) for layer in (nn.Linear(31, 31, bias=False), nn.Tanh())))
    inject(module, rank=2, gradient="projected")
    loss = module(torch.randn(5, 31)).sum()
    with Operations(module, shapes=[(31, 31)]) as operations:
        loss.backward()
    assert operations.peak == 1


@pytest.mark.parametrize("gradient", ["factored", "merged"])
def test_factored_and_merged_never_form_the_full_gradient(gradient):
    module = nn.Sequential(nn.Linear(31, 29, bias=False), nn.Tanh(), nn.Linear(29, 31, bias=False))
    inject(module, rank=2, gradient=gradient)
    loss = module(torch.randn(5, 31, requires_grad=True)).sum()
    with Operations(module, shapes=[(29, 31), (31, 29)]) as operations:
        loss.backward()
    assert operations.peak == 0


# ------------------------------------------------------------------------------------------------ torch.func


def as_function(module):
    """The module's loss as a function of its factors and its inputs, and the factors."""
    factors = {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}
    return lambda factors, *inputs: loss_of(functional_call(module, factors, inputs)), factors


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("case", CASES)
def test_torch_func_gives_the_same_loss_and_gradients(case, gradient):
    module, inputs, _ = adapted(case, gradient)
    nudge(module)
    function, factors = as_function(module)
    gradients, loss = torch.func.grad_and_value(function)(factors, *inputs)
    expected = loss_of(module(*inputs))
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-14)
    for name in factors:
        torch.testing.assert_close(gradients[name], module.get_parameter(name).grad, rtol=1e-11, atol=1e-13)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of torch's own attention
@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("case", [case for case in CASES if case not in ("LSTM", "GRU")])  # torch cannot batch these
def test_gradients_of_each_sample_are_those_of_one_at_a_time(case, gradient):
    module, inputs, _ = adapted(case, gradient)
    nudge(module)
    function, factors = as_function(module)
    one = torch.func.grad(lambda factors, *sample: function(factors, *(part[None] for part in sample)))
    together = torch.func.vmap(one, in_dims=(None, *(0 for _ in inputs)))(factors, *inputs)
    for i in range(len(inputs[0])):
        alone = one(factors, *(part[i] for part in inputs))
        for name in factors:
            torch.testing.assert_close(together[name][i], alone[name], rtol=1e-11, atol=1e-13)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # of torch's own, in jacfwd
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), n=st.integers(1, 5), m=st.integers(1, 5), scale=st.sampled_from([1.0, 0.5]))
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_torch_func_differentiates_twice(gradient, seed, n, m, scale):
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(n, m), nn.Tanh(), Conv1D(2, m)).double()
    plain = copy.deepcopy(module)
    inject(module, rank=1, alpha=scale, gradient=gradient, adapter_dtype="float64")
    nudge(module)
    function, factors = as_function(module)

    def formed(factors, inputs):
        weights = {}
        for place in places(module):
            A, B = (factors[f"{place.factors}{factor}"] for factor in "AB")
            delta = scale * (A.T @ B if place.adapter.transposed else B.T @ A)
            weights[place.key] = plain.get_parameter(place.key).detach() + delta
        return loss_of(functional_call(plain, weights, inputs))

    inputs = torch.randn(3, n, dtype=torch.float64)
    expected = torch.func.hessian(formed)(factors, inputs)
    for outer in (torch.func.jacrev, torch.func.jacfwd):
        actual = outer(torch.func.jacrev(function))(factors, inputs)
        for row, column in itertools.product(factors, repeat=2):
            torch.testing.assert_close(actual[row][column], expected[row][column], rtol=1e-9, atol=1e-11)


def test_an_ensemble_of_adapters_is_one_batched_call():
    module, (inputs,), _ = adapted("linear", "factored")
    factors = {}
    for i in range(3):
        nudge(module, 0.1 + i)
        for name, p in module.named_parameters():
            if p.requires_grad:
                factors.setdefault(name, []).append(p.detach().clone())
    stacked = {name: torch.stack(values) for name, values in factors.items()}
    outputs = torch.func.vmap(lambda factors: functional_call(module, factors, inputs))(stacked)
    for i in range(3):
        alone = functional_call(module, {name: values[i] for name, values in factors.items()}, inputs)
        torch.testing.assert_close(outputs[i], alone, rtol=1e-12, atol=1e-13)


# Dynamo instantiates any autograd Function to trace its backward, of which torch itself warns.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_gradients_by_torch_func_can_be_compiled(gradient):
    module, inputs, _ = adapted("linear", gradient)
    nudge(module)
    function, factors = as_function(module)
    expected = torch.func.grad(function)(factors, *inputs)
    actual = torch.compile(torch.func.grad(function), backend="aot_eager", fullgraph=True)(factors, *inputs)
    for name in factors:
        torch.testing.assert_close(actual[name], expected[name])


# ------------------------------------------------------------------------------------- when the weight follows


def trained_once(gradient, optimizer_class=torch.optim.SGD, dtype=torch.float32, **kwargs):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(8, 8)).to(dtype)
    inject(module, rank=2, gradient=gradient)
    nudge(module)
    optimizer = optimizer_class([p for p in module.parameters() if p.requires_grad], **kwargs)
    return module, optimizer


@pytest.mark.parametrize("gradient", ["merged", "projected"])
def test_each_optimizer_moves_the_weights_of_its_own_adapters(gradient):
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    inject(module, rank=1, gradient=gradient)
    optimizers = [torch.optim.SGD(adapter.parameters(), lr=0.1) for adapter in adapters(module).values()]
    for optimizer in optimizers:
        attach(module, optimizer)
    module(torch.ones(2, 4)).sum().backward()
    before = copy.deepcopy(module.state_dict())
    optimizers[1].step()
    after = module.state_dict()
    assert torch.equal(before["0.weight"], after["0.weight"])
    assert not torch.equal(before["1.weight"], after["1.weight"])


@pytest.mark.parametrize("gradient", ["merged", "projected"])
def test_lbfgs_is_refused(gradient):
    module, optimizer = trained_once(gradient, torch.optim.LBFGS)
    with pytest.raises(LoRAError, match=r"LBFGS.*'0'.*factored"):
        attach(module, optimizer)


def test_a_closure_called_twice_in_a_step_is_refused():
    class Twice(torch.optim.SGD):
        def step(self, closure=None):
            closure()
            return super().step(closure)

    module, optimizer = trained_once("merged", Twice, lr=0.1)
    attach(module, optimizer)
    with pytest.raises(LoRAError, match="closure twice"):
        optimizer.step(lambda: module(torch.ones(2, 8)).sum())


def test_attach_refuses_an_optimizer_without_adapters():
    module, _ = trained_once("merged", lr=0.1)
    with pytest.raises(ValueError, match="SGD has no adapter of Sequential"):
        attach(module, torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1))


def test_a_removed_handle_leaves_the_weight_alone():
    module, optimizer = trained_once("merged", lr=0.1)
    attach(module, optimizer).remove()
    before = module[0].weight.clone()
    module(torch.ones(2, 8)).sum().backward()
    optimizer.step()
    assert torch.equal(module[0].weight, before)


# ------------------------------------------------------------------------------------------ stochastic rounding


@pytest.mark.parametrize("gradient", ["merged", "projected"])
def test_small_updates_of_a_bfloat16_weight_are_not_lost(gradient):
    """2000 steps, each far below half an ulp: plain rounding loses all of them, ours none on average."""
    module = nn.Sequential(nn.Linear(16, 16, bias=False)).to(torch.bfloat16)
    module[0].weight.data.fill_(1.0)
    inject(module, rank=1, gradient=gradient)
    (adapter,) = adapters(module).values()
    with torch.no_grad():
        adapter.A.fill_(1.0)
    optimizer = torch.optim.SGD([adapter.B], lr=1e-4)
    attach(module, optimizer)
    plain = torch.ones(16, 16, dtype=torch.bfloat16)
    for _ in range(2000):
        adapter.B.grad = torch.full_like(adapter.B, -1.0)
        optimizer.step()
        plain += 1e-4
    assert torch.equal(plain, torch.ones_like(plain))
    # The sum is 0.2. An ulp above 1 is 2^-7; each step adds a Bernoulli of variance below 1e-4 * 2^-7, and the mean of
    # 256 independent entries deviates by sqrt(2000 * 1e-4 * 2^-7 / 256) = 0.0025; five times that is allowed.
    assert module[0]._parameters["weight"].float().mean().item() == pytest.approx(1.2, abs=0.0125)


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("module", "options", "error", "message"),
    [
        (
            nn.Sequential(nn.Embedding(4, 4, sparse=True)),
            {"target_modules": ["0"]},
            LoRAError,
            "sparse",
        ),
        (
            nn.Sequential(nn.Embedding(4, 4, max_norm=1.0)),
            {"target_modules": ["0"]},
            LoRAError,
            "max_norm",
        ),
        (
            nn.Sequential(nn.Linear(4, 4)),
            {"target_parameters": ["0.bias"]},
            ValueError,
            r"'0.bias' of the shape \(4,\)",
        ),
        (
            nn.Sequential(nn.Linear(4, 4)),
            {"target_modules": ["0"], "target_parameters": ["0.weight"]},
            ValueError,
            "'0' is targeted twice",
        ),
        (nn.Sequential(nn.Linear(4, 4)), {"target_parameters": ["0.wait"]}, ValueError, "'0.wait'.*Did you mean"),
        (nn.Sequential(nn.Linear(4, 4)), {"gradient": "merge"}, ValueError, "'merge'.*Did you mean 'merged'"),
        (nn.Sequential(nn.Linear(4, 4)), {"gradient": "merged", "dropout": 0.1}, ValueError, "dropout.*factored"),
        (nn.Sequential(nn.LayerNorm(4)), {"target_modules": ["0"]}, ValueError, "'0', a LayerNorm"),
        (
            nn.Sequential(nn.MultiheadAttention(4, 2)),
            {"target_modules": ["0"], "dropout": 0.1},
            ValueError,
            "dropout.*'0.in_proj_weight'",
        ),
    ],
)
def test_what_cannot_be_adapted_is_refused_by_name_and_left_as_it_was(module, options, error, message):
    before, kinds = copy.deepcopy(module.state_dict()), [type(m) for m in module.modules()]
    with pytest.raises(error, match=message):
        inject(module, rank=1, **options)
    assert [type(m) for m in module.modules()] == kinds
    assert all(p.requires_grad for p in module.parameters())
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())


def test_a_stack_of_matrices_has_one_adapter_for_each():
    adapter = Adapter.initial(torch.zeros(3, 10, 6), 2, 0, "up", torch.float32, stacked=True)
    assert adapter.A.shape == (3, 2, 6)
    assert adapter.B.shape == (3, 2, 10)
    assert adapter.delta_weight().shape == (3, 10, 6)


IN_PLACE = {
    "a Linear of rows": (lambda: nn.Linear(4, 4), torch.randn(3, 4, dtype=torch.float64)),
    "a Linear of sequences": (lambda: nn.Linear(4, 4), torch.randn(2, 3, 4, dtype=torch.float64)),
    "a convolution": (lambda: nn.Conv1d(4, 4, 1), torch.randn(2, 4, 5, dtype=torch.float64)),
    "an Embedding": (lambda: nn.Embedding(5, 4), torch.tensor([[1, 2], [0, 1]])),
}


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("layer", IN_PLACE)
def test_what_follows_an_adapted_layer_may_work_in_place(layer, gradient):
    def gradients(inplace):
        torch.manual_seed(0)
        make, x = IN_PLACE[layer]
        module = nn.Sequential(make(), nn.ReLU(inplace)).double()
        inject(module, rank=2, target_modules=["0"], init="symmetric", gradient=gradient, adapter_dtype="float64")
        module(x).square().sum().backward()
        return [p.grad for p in adapters(module)["0"].trained.values()]

    assert all(map(torch.equal, gradients(True), gradients(False)))
