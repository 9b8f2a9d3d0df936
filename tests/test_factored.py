"""Y = X W0 + s Z B and its gradients, held to the seed's formulas, to autograd, and to what may be saved."""

import copy
import itertools
import math
from types import SimpleNamespace

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

from lightning_lora import Adapter, adapters, inject
from lightning_lora.gradients import factored

FORMS = ["linear", "add"]
UNIT_ROUNDOFF = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}


class OwnForward(nn.Linear):
    """A Linear whose forward is its own, so that only its output can be added to."""

    def forward(self, x):
        return 2 * F.linear(x, self.weight) if self.bias is None else F.linear(x, self.weight).add(self.bias, alpha=2)


def linear(x, weight, bias, adapter, training):
    dropout = adapter.dropout if training else 0.0
    return factored.linear(x, weight, bias, *adapter.increment(), adapter.scale, dropout)


def add(y, x, adapter, training):
    return factored.add(y, x, *adapter.increment(), adapter.scale, adapter.dropout if training else 0.0)


def apply(form, x, weight, bias, adapter, training=False):
    """The adapted product by either of the two functions."""
    if form == "linear":
        return linear(x, weight, bias, adapter, training)
    return add(F.linear(x, weight, bias), x, adapter, training)


@st.composite
def problems(draw, dtypes=(torch.float64,)):
    """An input of any rank and memory layout, a weight, a bias or none, an adapter with B other than zero."""
    dtype = draw(st.sampled_from(dtypes))
    n, m = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    rank = draw(st.integers(1, min(n, m)))
    lead = draw(st.lists(st.integers(0, 4), max_size=3))
    layout = draw(st.sampled_from(["contiguous", "transposed", "strided", "expanded"]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    x = {
        "contiguous": lambda: randn(*lead, n),
        "transposed": lambda: randn(n, *lead).movedim(0, -1),
        "strided": lambda: randn(*lead, 2 * n)[..., ::2],
        "expanded": lambda: randn(n).expand(*lead, n),
    }[layout]()
    bias = randn(m) if draw(st.booleans()) else None
    adapter = Adapter(randn(rank, n), randn(rank, m), scale=draw(st.sampled_from([1.0, 0.25, 3.0])))
    return x.requires_grad_(draw(st.booleans())), randn(m, n), bias, adapter, randn(*lead, m)


def outcome(y, x, adapter, dy):
    """Y, dX (None if X needs none), dA, dB."""
    wanted = [adapter.A, adapter.B, *([x] if x.requires_grad else [])]
    dA, dB, *dx = torch.autograd.grad(y, wanted, dy)
    return y.detach(), dx[0] if dx else None, dA, dB


def assert_all_close(actual, expected, tolerance):
    for a, e in zip(actual, expected, strict=True):
        assert (a is None) == (e is None)
        if a is not None:
            torch.testing.assert_close(a, e, rtol=tolerance, atol=tolerance)


# ------------------------------------------------------------------------------------------------------- the formulas


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=150, deadline=None)
@given(problem=problems())
def test_it_equals_autograd_through_the_whole_weight(form, problem):
    x, weight, bias, adapter, dy = problem
    whole = weight + adapter.scale * adapter.B.T @ adapter.A
    expected = outcome(F.linear(x, whole, bias), x, adapter, dy)
    assert_all_close(outcome(apply(form, x, weight, bias, adapter), x, adapter, dy), expected, 1e-12)


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=100, deadline=None)
@given(problem=problems())
def test_it_equals_the_formulas_of_the_seed(form, problem):
    x, weight, _, adapter, dy = problem
    actual = outcome(apply(form, x, weight, None, adapter), x, adapter, dy)

    # the seed has no scale: it belongs to B there, and dL/d(sB) = dL/dB / s
    X, dY, W0 = x.detach().reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1]), weight.T
    A, B = adapter.A.detach().T, adapter.scale * adapter.B.detach()
    dX = reference.gradient_of_input(dY, W0, A, B).view(x.shape) if x.requires_grad else None
    for forward in (reference.forward_merged, reference.forward_factored):
        for gradients in (reference.gradients_projected, reference.gradients_factored):
            dA, dB = gradients(X, dY, A, B)
            Y = forward(X, W0, A, B).view(dy.shape)
            assert_all_close(actual, (Y, dX, dA.T, adapter.scale * dB), 1e-12)


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=100, deadline=None)
@given(problem=problems(dtypes=(torch.float32, torch.bfloat16)))
def test_its_error_in_low_precision_is_that_of_rounding_each_product_once(form, problem):
    """|error| <= k u |...||...||...| with k the longest chain of sums plus the intermediate roundings (Higham, 3.5)."""
    x, weight, bias, adapter, dy = problem
    actual = outcome(apply(form, x, weight, bias, adapter), x, adapter, dy)

    def double(absolute):
        def of(t):
            t = t.detach().double().reshape(-1, t.shape[-1])
            return t.abs() if absolute else t

        X, W, A, B, dY = (of(t) for t in (x, weight, adapter.A, adapter.B, dy))
        s, b = adapter.scale, 0 if bias is None else of(bias)
        dZ = s * dY @ B.T
        return X @ W.T + s * (X @ A.T) @ B + b, dY @ W + dZ @ A, dZ.T @ X, s * (X @ A.T).T @ dY

    length = sum(weight.shape) + math.prod(x.shape[:-1]) + adapter.rank + 8
    for a, exact, magnitude in zip(actual, double(False), double(True), strict=True):
        if a is not None:
            error = (a.double().reshape(exact.shape) - exact).abs()
            assert (error <= length * UNIT_ROUNDOFF[x.dtype] * magnitude + 1e-30).all()


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", [nn.Linear, OwnForward, Conv1D])
def test_first_and_second_derivatives_are_those_of_finite_differences(kind, bias, dropout):
    torch.manual_seed(0)
    layer = Conv1D(3, 4) if kind is Conv1D else kind(4, 3, bias=bias)
    net = nn.Sequential(layer.double())
    inject(net, rank=2, alpha=3, dropout=dropout, adapter_dtype="float64", bias="all" if bias else "none")
    torch.nn.init.normal_(net[0].lora.B)
    values = {name: p.detach().clone().requires_grad_() for name, p in net.named_parameters() if p.requires_grad}

    def function(x, *parameters):
        torch.manual_seed(1)  # one mask for all evaluations
        return functional_call(net, dict(zip(values, parameters, strict=True)), (x,)).tanh()

    x = torch.randn(2, 2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, (x, *values.values()))
    assert torch.autograd.gradgradcheck(function, (x, *values.values()))


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=50, deadline=None)
@given(problem=problems())
def test_torch_func_gives_the_same_output_and_gradients(form, dropout, problem):
    x, weight, bias, adapter, dy = problem

    def function(x, factors):
        torch.manual_seed(1)  # one mask for both
        like = SimpleNamespace(increment=lambda: (factors["A"], factors["B"]), scale=adapter.scale, dropout=dropout)
        return apply(form, x, weight, bias, like, training=True)

    factors = {name: p.detach() for name, p in adapter.named_parameters()}
    y, pull_back = torch.func.vjp(function, x.detach(), factors)
    dx, gradients = pull_back(dy)
    x.requires_grad_()
    expected = outcome(function(x, dict(adapter.named_parameters())), x, adapter, dy)
    assert_all_close((y, dx, gradients["A"], gradients["B"]), expected, 1e-12)


def test_a_step_of_sgd_moves_the_weight_as_the_seed_says():
    torch.manual_seed(0)
    lr, scale = 0.1, 1.0
    adapter = Adapter(*(torch.randn(3, k, dtype=torch.float64) for k in (6, 5)), scale=scale)
    weight, x = torch.randn(5, 6, dtype=torch.float64), torch.randn(7, 6, dtype=torch.float64)
    A, B = adapter.A.detach().T.clone(), adapter.B.detach().clone()
    optimizer = torch.optim.SGD(adapter.parameters(), lr=lr)
    W = weight.T + A @ B
    for _ in range(4):
        Y = reference.forward_factored(x, weight.T, A, B)
        W, A, B = reference.sgd_step(W, x.T @ (1 - Y.tanh() ** 2), A, B, lr)
        optimizer.zero_grad()
        linear(x, weight, None, adapter, True).tanh().sum().backward()
        optimizer.step()
    torch.testing.assert_close(adapter.folded_into(weight), W.T, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("frozen", ["A", "B"])
def test_a_frozen_factor_gets_no_gradient_and_the_other_its_own(frozen):
    adapter = Adapter(torch.randn(2, 5), torch.randn(2, 4))
    x, weight = torch.randn(3, 5), torch.randn(4, 5)
    linear(x, weight, None, adapter, True).sum().backward()
    expected = {name: p.grad.clone() for name, p in adapter.named_parameters()}
    adapter.zero_grad()
    getattr(adapter, frozen).requires_grad_(False)
    linear(x, weight, None, adapter, True).sum().backward()
    for name, p in adapter.named_parameters():
        assert p.grad is None if name == frozen else torch.equal(p.grad, expected[name])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5), (0, 3, 5)])
def test_an_empty_batch_gives_zero_gradients(form, shape):
    adapter = Adapter(torch.randn(2, 5), torch.randn(2, 4), dropout=0.5)
    x = torch.randn(*shape, requires_grad=True)
    y = apply(form, x, torch.randn(4, 5), torch.randn(4), adapter, training=True)
    y.sum().backward()
    assert y.shape == (*shape[:-1], 4)
    assert x.grad.shape == x.shape
    assert all(p.grad.shape == p.shape and not p.grad.any() for p in adapter.parameters())


def test_the_output_that_is_added_to_is_left_as_it_is():
    y, x = torch.randn(3, 4), torch.randn(3, 5)
    before, version = y.clone(), y._version
    add(y, x, Adapter(torch.randn(2, 5), torch.randn(2, 4)), True)
    assert torch.equal(y, before)
    assert y._version == version


# ------------------------------------------------------------------------------------------------------------ autocast


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_it_computes_in_the_low_dtype_and_its_gradients_are_in_that_of_the_adapter(form, dtype):
    torch.manual_seed(0)
    adapter = Adapter(torch.randn(2, 6), torch.randn(2, 4), scale=0.5)
    x, weight, bias = torch.randn(3, 6, requires_grad=True), torch.randn(4, 6), torch.randn(4)
    with torch.autocast("cpu", dtype):
        y = apply(form, x, weight, bias, adapter)
    dy = torch.randn(3, 4).to(dtype)
    actual = outcome(y, x, adapter, dy)
    assert y.dtype == dtype
    assert {t.dtype for t in actual[1:]} == {torch.float32}

    low = copy.deepcopy(adapter)
    low.A.data, low.B.data = adapter.A.data.to(dtype), adapter.B.data.to(dtype)
    x_low = x.detach().to(dtype).requires_grad_()
    expected = outcome(apply(form, x_low, weight.to(dtype), bias.to(dtype), low), x_low, low, dy)
    for name, a, e in zip(("y", "dx", "dA", "dB"), actual, expected, strict=True):
        if (form, name) != ("add", "dx"):  # a sum of two gradients, which only autocast adds in float32
            assert torch.equal(a, e.to(a.dtype)), name


@pytest.mark.parametrize("form", FORMS)
def test_float64_stays_float64_under_autocast(form):
    adapter = Adapter(torch.randn(2, 6), torch.randn(2, 4))
    with torch.autocast("cpu", torch.bfloat16):
        y = apply(form, *(torch.randn(k, 6, dtype=torch.float64) for k in (3, 4)), None, adapter)
    assert y.dtype == torch.float64


@pytest.mark.parametrize("form", FORMS)
def test_a_backward_inside_autocast_equals_one_outside_for_a_float32_island(form):
    """As in manual optimization, where ``manual_backward`` is called inside the training step."""
    torch.manual_seed(0)
    adapter = Adapter(torch.randn(2, 6), torch.randn(2, 4))
    x, weight, dy = torch.randn(3, 6, requires_grad=True), torch.randn(4, 6), torch.randn(3, 4)
    expected = outcome(linear(x, weight, None, adapter, False), x, adapter, dy)
    plain = F.linear(x, weight).detach()
    with torch.autocast("cpu", torch.bfloat16):
        with torch.autocast("cpu", enabled=False):
            y = add(plain, x, adapter, False) if form == "add" else apply(form, x, weight, None, adapter)
        actual = outcome(y, x, adapter, dy)
    _, dx, dA, dB = actual
    assert torch.equal(dA, expected[2])
    assert torch.equal(dB, expected[3])
    if form == "linear":
        assert torch.equal(dx, expected[1])


def test_adding_to_a_float32_output_under_autocast_keeps_it_float32():
    adapter = Adapter(torch.randn(2, 6), torch.zeros(2, 4))
    y = torch.randn(3, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(add(y, torch.randn(3, 6), adapter, False), y)


# ------------------------------------------------------------------------------------------------------------- dropout


@pytest.mark.parametrize("form", FORMS)
def test_the_mean_over_masks_is_the_undropped_increment(form):
    """Every entry's mean over N = 4000 masks lies within z standard errors, z for a confidence of 99.9% for all 24.

    With Bonferroni's correction a false alarm has a probability of 0.001; the seed is fixed.
    """
    torch.manual_seed(0)
    N, p, alpha = 4000, 0.3, 1e-3
    adapter = Adapter(*(torch.randn(2, k, dtype=torch.float64) for k in (6, 4)), scale=0.7, dropout=p)
    x, weight = torch.randn(6, 6, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    with torch.no_grad():
        plain = F.linear(x, weight)
        batch = x.expand(N, 6, 6)
        increments = apply(form, batch, weight, None, adapter, training=True) - plain
        expected = apply(form, x, weight, None, adapter, training=False) - plain
    z = ((increments.mean(0) - expected) / (increments.std(0) / math.sqrt(N))).abs().max()
    assert z < torch.special.ndtri(torch.tensor(1 - alpha / 2 / expected.numel()))
    assert increments.std(0).min() > 0


@pytest.mark.parametrize("form", FORMS)
def test_the_mask_of_the_backward_is_that_of_the_forward_and_drops_the_increment_only(form):
    torch.manual_seed(0)
    p, s, k = 0.5, 0.8, 6
    unit = torch.eye(k, dtype=torch.float64)
    adapter = Adapter(unit.clone(), unit.clone(), scale=s, dropout=p)
    x, dy = (torch.randn(9, k, dtype=torch.float64) for _ in range(2))
    x.requires_grad_()
    weight = torch.randn(k, k, dtype=torch.float64)
    y, dx, dA, dB = outcome(apply(form, x, weight, None, adapter, training=True), x, adapter, dy)

    # A = B = 1, so what the increment adds is the masked input itself
    increment = y - x.detach() @ weight.T
    mask = increment.abs() > 1e-9
    assert 0 < mask.double().mean() < 1
    factor = s / (1 - p)
    dropped = x.detach() * mask
    torch.testing.assert_close(increment, factor * dropped)
    torch.testing.assert_close(dx, dy @ weight + factor * dy * mask)
    torch.testing.assert_close(dA, factor * dy.T @ dropped)
    torch.testing.assert_close(dB, factor * dropped.T @ dy)


def test_there_is_no_dropout_in_eval_mode():
    net = nn.Sequential(nn.Linear(6, 4))
    inject(net, rank=2, dropout=0.5)
    nn.init.normal_(net[0].lora.B)
    net.eval()
    x = torch.randn(3, 6)
    assert torch.equal(net(x), net(x))
    torch.testing.assert_close(net(x), F.linear(x, net[0].lora.folded_into(net[0]._parameters["weight"]), net[0].bias))


# ---------------------------------------------------------------------------------------------- what is kept, allocated

b, n, m, r = 17, 11, 13, 2


def tensors(dropout=0.0):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(b, n, requires_grad=True), torch.randn(m, n), torch.randn(m)
    return x, weight, bias, Adapter(torch.randn(r, n), torch.randn(r, m), dropout=dropout)


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("form", FORMS)
def test_saved_for_backward_are_the_input_the_weights_z_and_a_boolean_mask(form, dropout):
    x, weight, bias, adapter = tensors(dropout)
    plain = F.linear(x, weight, bias).detach()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        if form == "linear":
            linear(x, weight, bias, adapter, True)
        else:
            add(plain, x, adapter, True)
    given = {t.data_ptr() for t in (x, weight, adapter.A, adapter.B)}
    fresh = [(tuple(t.shape), t.dtype) for t in saved if t.data_ptr() not in given]
    mask = [((b, n), torch.bool)] if dropout else []
    assert sorted(fresh, key=str) == sorted([((r, b), torch.float32), *mask], key=str)


class Allocations(TorchDispatchMode):
    """The number of elements of every storage that an operation makes."""

    def __init__(self, *known):
        super().__init__()
        self.kept = list(known)  # kept alive, so that no address is used twice
        self.seen = {t.untyped_storage().data_ptr() for t in known}
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in self.seen:
                self.kept.append(t)
                self.seen.add(t.untyped_storage().data_ptr())
                self.sizes.append(t.untyped_storage().nbytes() // t.element_size())
        return out


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("form", FORMS)
def test_the_backward_allocates_nothing_of_the_size_of_the_weight(form, dropout):
    x, weight, bias, adapter = tensors(dropout)
    y = apply(form, x, weight, bias, adapter, training=True)
    dy = torch.randn_like(y)
    with Allocations(x, weight, bias, adapter.A, adapter.B, dy) as made:
        y.backward(dy)
    assert r * n in made.sizes
    assert r * m in made.sizes
    assert m * n not in made.sizes


def test_the_forward_allocates_y_and_z_and_the_backward_the_thin_products_and_dx():
    x, weight, bias, adapter = tensors()
    with Allocations(x, weight, bias, adapter.A, adapter.B) as forward:
        y = linear(x, weight, bias, adapter, True)
    assert sorted(forward.sizes) == sorted([b * m, b * r])
    dy = torch.randn_like(y)
    with Allocations(x, weight, bias, adapter.A, adapter.B, dy, *forward.kept) as backward:
        y.backward(dy)
    large = [size for size in backward.sizes if size > max(b * r, r * n, r * m)]
    assert large == [b * n]


def test_an_input_that_needs_no_gradient_costs_none():
    x, weight, bias, adapter = tensors()
    y = linear(x.detach(), weight, bias, adapter, True)
    dy = torch.randn_like(y)
    with Allocations(x, weight, bias, adapter.A, adapter.B, dy) as made:
        y.backward(dy)
    assert max(made.sizes) <= max(b * r, r * n, r * m)


# ------------------------------------------------------------------------------------------------------------- compile

# Dynamo instantiates any autograd Function to trace its backward, of which torch itself warns.
tracing = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


@tracing
@pytest.mark.parametrize("autocast", [False, True])
def test_compiled_it_has_no_graph_break_and_the_same_gradients(autocast):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), OwnForward(5, 4), Conv1D(3, 4))
    inject(net, rank=2)
    for adapter in adapters(net).values():
        nn.init.normal_(adapter.B)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 3, 6)
    results = []
    for function in (net, compiled):
        net.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = function(x)
        y.sum().backward()
        results.append([y.detach(), *(p.grad.clone() for p in net.parameters() if p.requires_grad)])
    tolerance = 0.05 if autocast else 1e-5
    for eager, fast in itertools.zip_longest(*results):
        torch.testing.assert_close(fast, eager, rtol=tolerance, atol=tolerance)


@tracing
def test_compiled_dropout_has_no_graph_break():
    net = nn.Sequential(nn.Linear(6, 4))
    inject(net, rank=2, dropout=0.5)
    nn.init.normal_(net[0].lora.B)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    x = torch.randn(3, 6)
    assert not torch.equal(compiled(x), compiled(x))
    compiled(x).sum().backward()
    assert net[0].lora.A.grad.any()
