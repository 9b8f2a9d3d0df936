"""Additive, symmetric and DoRA: what the increment is, and its gradients, held to the formulas as they are written."""

import copy
import math
import re
from pathlib import Path

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import Callback
from models import Digest, Net, ResumableLoader, trainer
from pairs import pairs
from resume import SaveFirst
from test_gradients import CASES as GRADIENT_CASES
from test_gradients import Operations, build, loss_of, tokens, x
from torch import nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from zoo import ZOO, Zoo

from lightning_lora import Adapter, LoRA, adapters, attach, inject, merge
from lightning_lora.adapters import DECOMPOSITIONS as DECOMPOSED
from lightning_lora.adapters import Additive, DoRA
from lightning_lora.adapters.draws import generator
from lightning_lora.injection.inject import places

GRADIENTS = ["factored", "merged", "projected"]
HOLDING = ["merged", "projected"]


class OwnLinear(nn.Linear):
    """A Linear whose forward is its own, so that nothing is fused."""

    def forward(self, input):
        return super().forward(input) + 1


CASES = {
    **GRADIENT_CASES,
    "one row": (lambda: nn.Sequential(nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 6, bias=False)), (x(8),), {}),
    "subclass of linear": (lambda: nn.Sequential(OwnLinear(8, 4), nn.Tanh(), OwnLinear(4, 6)), (x(3, 8),), {}),
    "embedding": (
        lambda: nn.Sequential(nn.Embedding(12, 8), nn.Linear(8, 4)),
        (tokens(4, 5),),
        {"target_modules": ["0", "1"]},
    ),
    # of sides that 2 divides
    "LSTM": (
        lambda: nn.LSTM(8, 6, num_layers=2, bidirectional=True, proj_size=4),
        (x(3, 5, 8),),
        {"target_modules": None, "target_parameters": r"weight_.*"},
    ),
}
DECOMPOSITIONS = ["additive", "dora"]
INCREMENTS = [
    ("additive", "zero"),
    ("dora", "zero"),
    ("dora", "symmetric"),
    ("product", "symmetric"),
    ("product", "pissa"),
    ("product", "zero"),
]
"""Decompositions, and where they start."""


@pytest.fixture(autouse=True)
def cases(monkeypatch):
    monkeypatch.setattr("test_gradients.CASES", CASES)


def adapted(case, gradient, **options):
    module, inputs, own = build(case)
    inject(module, **{"rank": 2, "alpha": 3, "adapter_dtype": "float64", "gradient": gradient, **own, **options})
    return module, inputs


def nudge(module, scale=0.3):
    """Moves everything that is trained as a real step would; weights that hold the increment follow."""
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=1.0)
    handle = attach(module, optimizer)
    for name, adapter in adapters(module).items():
        for own, p in adapter.trained.items():
            p.grad = scale * torch.randn(p.shape, generator=generator(name, own), dtype=torch.float64).to(p.dtype)
    optimizer.step()
    optimizer.zero_grad()
    handle.remove()


def formed(adapter, W0, p):
    """The weight of ``adapter`` by the formula of its decomposition, written with matrices, in torch's layout.

    Args:
        adapter: Of what decomposition, scale and layout.
        W0: The pretrained weight.
        p: The adapter's tensors by name.
    """
    W0 = adapter.as_matrix(W0)
    stacked = W0.dim() == 3
    matrices = []
    for i in range(len(W0) if stacked else 1):
        base, own = (W0[i], {k: v[i] for k, v in p.items()}) if stacked else (W0, p)
        base, A, B = base.T, own["A"].T, own["B"]  # the seed's layout
        if isinstance(adapter, Additive):
            W = base + adapter.scale * reference.additive(A, B)
        elif isinstance(adapter, DoRA):
            W = reference.dora(base, adapter.scale * A, B, own["magnitude"])
        elif "A0" in p:
            s = adapter.scale
            W = reference.symmetric(base, s * own["A0"].T, own["B0"], s * A, B)
        else:
            W = base + adapter.scale * A @ B
        matrices.append(W.T)
    W = torch.stack(matrices) if stacked else matrices[0]
    return (W.mT if adapter.transposed else W).reshape(adapter.shape)


def through_autograd(case, module):
    """Loss, and gradients of all that the adapters train, through the formed weights in the plain module."""
    plain, inputs, _ = build(case)
    plain.requires_grad_(False)
    values, weights = {}, {}
    for place in places(module):
        p = values.setdefault(
            place.name, {name: t.detach().clone().requires_grad_() for name, t in place.adapter.named_parameters()}
        )
        weights[place.key] = formed(place.adapter, plain.get_parameter(place.key), p)
    loss = loss_of(functional_call(plain, weights, inputs))
    loss.backward()
    return loss, {name: {own: t.grad for own, t in p.items()} for name, p in values.items()}


def assert_gradients_are_those_of_the_formula(case, module, inputs):
    loss = loss_of(module(*inputs))
    loss.backward()
    expected_loss, expected = through_autograd(case, module)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-11, atol=1e-13)
    for name, adapter in adapters(module).items():
        for own, p in adapter.trained.items():
            message = lambda text, where=(name, own): f"{where}: {text}"  # noqa: E731
            torch.testing.assert_close(p.grad, expected[name][own], rtol=1e-10, atol=1e-12, msg=message)


# --------------------------------------------------------------------------------------------- all, on every layer


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
def test_loss_and_gradients_are_those_of_autograd_through_the_formula(decomposition, case, gradient):
    module, inputs = adapted(case, gradient, decomposition=decomposition)
    nudge(module)
    assert_gradients_are_those_of_the_formula(case, module, inputs)


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("decomposition", ["product", "dora"])
def test_the_same_with_a0_b0_taken_away(decomposition, case, gradient):
    """DoRA's V is W0 - s B0^T A0 + s B^T A then, which W0' = W0 - s B0^T A0 makes the formula that it was."""
    module, inputs = adapted(case, gradient, decomposition=decomposition, init="symmetric")
    nudge(module)
    if decomposition == "product":
        assert_gradients_are_those_of_the_formula(case, module, inputs)
        return
    loss = loss_of(module(*inputs))
    loss.backward()
    plain, inputs, _ = build(case)
    plain.requires_grad_(False)
    values, weights = {}, {}
    for place in places(module):
        a = place.adapter
        p = values.setdefault(place.name, {k: t.detach().clone().requires_grad_() for k, t in a.trained.items()})
        W0 = plain.get_parameter(place.key)
        start = a.scale * (a.A0.mT @ a.B0 if a.transposed else a.B0.mT @ a.A0).detach()
        weights[place.key] = formed(a, W0 - start.view(W0.shape), p)
    expected = loss_of(functional_call(plain, weights, inputs))
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-11, atol=1e-13)
    for name, adapter in adapters(module).items():
        for own, p in adapter.trained.items():
            torch.testing.assert_close(p.grad, values[name][own].grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("increment", "case", "gradient"), pairs(INCREMENTS[:3], CASES, GRADIENTS))
def test_all_three_train_to_one_function_and_merge_to_it(increment, case, gradient):
    """Held to plain autograd through the formula, stepped by the same optimizer; ``merge`` leaves the plain module."""
    decomposition, init = increment
    module, inputs = adapted(case, gradient, decomposition=decomposition, init=init)
    twin, _ = adapted(case, "factored", decomposition=decomposition, init=init)
    losses = []
    for trained in (module, twin):
        optimizer = torch.optim.AdamW([p for p in trained.parameters() if p.requires_grad], lr=1e-2)
        attach(trained, optimizer)
        losses.append([])
        for _ in range(5):
            loss = loss_of(trained(*inputs))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-10)
    assert losses[0][0] == loss_of(build(case)[0](*inputs)).item()
    after = loss_of(module(*inputs)).item()
    assert after != losses[0][0]
    merge(module)
    plain = build(case)[0]
    assert [type(m) for m in module.modules()] == [type(m) for m in plain.modules()]
    assert list(module.state_dict()) == list(plain.state_dict())
    assert loss_of(module(*inputs)).item() == pytest.approx(after, rel=1e-12)


@pytest.mark.parametrize(
    ("increment", "case", "gradient", "dtype"),
    pairs(
        INCREMENTS[:4],
        [case for case in CASES if "LSTM" not in case and "GRU" not in case],
        GRADIENTS,
        [torch.float32, torch.bfloat16],
    ),
)
def test_at_the_start_the_function_keeps_every_bit(increment, case, gradient, dtype):
    (decomposition, init), (module, inputs, own) = increment, build(case)
    module.to(dtype)
    inputs = [i.to(dtype) if i.is_floating_point() else i for i in inputs]
    plain = copy.deepcopy(module)
    inject(module, rank=2, alpha=3, decomposition=decomposition, init=init, gradient=gradient, **own)
    assert torch.equal(module(*inputs), plain(*inputs))
    plain.requires_grad_(False)  # on which the products that torch chooses depend
    with torch.no_grad():
        assert torch.equal(module(*inputs), plain(*inputs))
    weights = [place.weight.detach().clone() for place in places(module)]
    keys = [place.key for place in places(module)]
    merge(module)
    assert all(torch.equal(module.get_parameter(k), W) for k, W in zip(keys, weights, strict=True))


# ------------------------------------------------------------------------------------------------------------ additive


def random_additive(r, n_blocks, m_blocks, seed, **kwargs):
    g = torch.Generator().manual_seed(seed)
    A, B = (torch.randn(r, r * k, generator=g, dtype=torch.float64) for k in (n_blocks, m_blocks))
    return Additive(A, B, **kwargs), g


BLOCKS = {
    "r": st.integers(1, 4),
    "n_blocks": st.integers(1, 4),
    "m_blocks": st.integers(1, 4),
    "seed": st.integers(0, 2**31),
}


@settings(max_examples=60, deadline=None)
@given(**BLOCKS, scale=st.floats(0.1, 3), transposed=st.booleans())
def test_the_additive_increment_is_the_seeds_with_block_matrices(r, n_blocks, m_blocks, seed, scale, transposed):
    adapter, _ = random_additive(r, n_blocks, m_blocks, seed, scale=scale, transposed=transposed)
    expected = scale * reference.additive(adapter.A.T, adapter.B)  # (n, m), the seed's layout
    actual = adapter.delta_weight(torch.float64)
    torch.testing.assert_close(actual, expected if transposed else expected.T, rtol=1e-13, atol=1e-13)
    A, B = adapter.as_product(adapter.A, adapter.B)
    assert A.shape[-2] == 2 * r
    torch.testing.assert_close(scale * A.T @ B, expected, rtol=1e-13, atol=1e-13)


def test_of_rank_one_it_is_a_sum_of_a_column_and_a_row():
    adapter, _ = random_additive(1, 5, 7, 0)
    a, b = adapter.A[0], adapter.B[0]
    expected = [[a[i].item() + b[j].item() for i in range(5)] for j in range(7)]
    assert adapter.delta_weight(torch.float64).tolist() == expected


@settings(max_examples=40, deadline=None)
@given(r=st.integers(1, 4), n_blocks=st.integers(2, 5), m_blocks=st.integers(2, 5), seed=st.integers(0, 2**31))
def test_its_rank_is_twice_that_of_a_product_with_as_many_parameters(r, n_blocks, m_blocks, seed):
    """2r is attained where n and m have room for it."""
    adapter, g = random_additive(r, n_blocks, m_blocks, seed)
    product = Adapter(adapter.A.detach().clone(), torch.randn(adapter.B.shape, generator=g, dtype=torch.float64))
    assert sum(p.numel() for p in adapter.parameters()) == sum(p.numel() for p in product.parameters())
    assert torch.linalg.matrix_rank(adapter.delta_weight(torch.float64)) == 2 * r
    assert torch.linalg.matrix_rank(product.delta_weight(torch.float64)) == r


@settings(max_examples=60, deadline=None)
@given(**BLOCKS, rows=st.integers(1, 5), scale=st.floats(0.1, 3))
def test_both_projections_are_the_gradient_of_the_literal_formula(r, n_blocks, m_blocks, seed, rows, scale):
    adapter, g = random_additive(r, n_blocks, m_blocks, seed, scale=scale)
    X = torch.randn(rows, r * n_blocks, generator=g, dtype=torch.float64)
    dY = torch.randn(rows, r * m_blocks, generator=g, dtype=torch.float64)
    A, B = (p.detach().clone().requires_grad_() for p in (adapter.A, adapter.B))
    (X @ (scale * reference.additive(A.T, B)) * dY).sum().backward()
    for dA, dB in (adapter.project(dY.T @ X, adapter.A, adapter.B), adapter.project_thin(X, dY, adapter.A, adapter.B)):
        torch.testing.assert_close(dA, A.grad, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(dB, B.grad, rtol=1e-11, atol=1e-11)


def test_its_gradient_is_the_seeds_sum_of_rows_and_of_columns():
    """For r = 1, dL/dA = G 1 and dL/dB = 1 G."""
    adapter, g = random_additive(1, 4, 6, 0)
    G = torch.randn(6, 4, generator=g, dtype=torch.float64)
    dA, dB = adapter.project(G, adapter.A, adapter.B)
    torch.testing.assert_close(dA[0], G.sum(0))
    torch.testing.assert_close(dB[0], G.sum(1))


@settings(max_examples=40, deadline=None)
@given(**BLOCKS, transposed=st.booleans())
def test_a_step_adds_the_increment_of_the_difference(r, n_blocks, m_blocks, seed, transposed):
    adapter, g = random_additive(r, n_blocks, m_blocks, seed, scale=0.7, transposed=transposed)
    weight = torch.randn(adapter.shape, generator=g, dtype=torch.float64)
    before, (A, B) = adapter.delta_weight(torch.float64), adapter.held()
    expected = weight - before
    with torch.no_grad():
        adapter.A.add_(torch.randn(A.shape, generator=g, dtype=torch.float64))
        adapter.B.mul_(0.5)
    adapter.follow(weight, A, B)
    torch.testing.assert_close(weight, expected + adapter.delta_weight(torch.float64), rtol=1e-12, atol=1e-12)


PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "matmul", "linear", "dot", "mv", "einsum")


def products(operations):
    return [name for name in operations.names if name.split(".")[1] in PRODUCTS]


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_is_multiplied_by_its_factors(stacked, dtype):
    """Additions and sums only: no matrix product in the increment, in a step, or in the projection of a gradient."""
    stack = (3,) if stacked else ()
    weight = torch.randn(*stack, 12, 8).to(dtype)
    adapter = Additive(torch.randn(*stack, 4, 8), torch.randn(*stack, 4, 12), weight.shape, scale=0.5)
    before = adapter.held()
    with torch.no_grad():
        adapter.A.add_(1)
    G = torch.randn(*stack, 12, 8)
    with Operations() as operations, torch.no_grad():
        adapter.delta_weight()
        adapter.project(G, adapter.A, adapter.B)
        adapter.add_step(G, *adapter.step(*before, adapter.A, adapter.B))
        adapter.follow(weight, *before)
        adapter.folded_into(weight)
        adapter.folded_out_of(weight)
    assert operations.names
    assert not products(operations)
    with Operations() as product:
        Adapter(torch.ones(4, 8), torch.ones(4, 12)).delta_weight()
    assert products(product)  # which would be seen


@pytest.mark.parametrize("gradient", HOLDING)
def test_a_layer_costs_no_product_more_in_forward_than_its_base(gradient):
    """Merged: and in backward the two with X and dY, of r columns; projected: the one that gives G."""
    module, plain = nn.Linear(12, 8), nn.Linear(12, 8)
    outer = nn.Sequential(module)
    inject(outer, rank=4, decomposition="additive", gradient=gradient)
    data, counts = torch.randn(6, 12), []
    for layer in (plain.requires_grad_(False), module):
        with Operations() as forward:
            y = layer(data)
        counts.append(len(products(forward)))
    assert counts[0] == counts[1]
    with Operations() as backward:
        y.sum().backward()
    assert len(products(backward)) == (2 if gradient == "merged" else 1)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_a_rank_that_divides_no_side_is_lowered_unless_it_was_given_by_name(gradient):
    module = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 18))
    kinds = [type(m) for m in module.modules()]
    options = {"decomposition": "additive", "gradient": gradient}
    with pytest.raises(ValueError, match=r"'additive'`: the rank 4 of '1', whose weight is 18 x 12: 3 would do"):
        inject(module, rank=4, rank_pattern={"1": 4}, **options)
    assert [type(m) for m in module.modules()] == kinds
    inject(module, rank=4, **options)
    assert [a.rank for a in adapters(module).values()] == [4, 3]


def test_the_ranks_that_work_are_those_of_the_matrix_of_a_convolution():
    module = nn.Sequential(nn.Conv2d(2, 6, 3))
    inject(module, rank=4, target_modules=["0"], decomposition="additive")
    assert adapters(module)["0"].rank == 3


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
def test_rank_pattern_and_alpha_pattern_count_for_every_decomposition(decomposition, gradient):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 4)).double()
    plain = copy.deepcopy(module)
    options = {"rank_pattern": {"2": 4}, "alpha_pattern": {"0": 6.0}, "adapter_dtype": "float64"}
    inject(module, rank=2, alpha=2, decomposition=decomposition, gradient=gradient, **options)
    known = adapters(module)
    assert [(a.rank, a.scale) for a in known.values()] == [(2, 3.0), (4, 0.5)]
    nudge(module)
    weights = {
        f"{name}.weight": formed(a, plain[int(name)].weight.detach(), dict(a.named_parameters()))
        for name, a in known.items()
    }
    torch.testing.assert_close(module(x(5, 8)), functional_call(plain, weights, x(5, 8)), rtol=1e-12, atol=1e-13)


# ----------------------------------------------------------------------------------------------------------- symmetric


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(2, 8), m=st.integers(2, 8), r=st.integers(1, 2), scale=st.floats(0.1, 3), seed=st.integers(0, 2**31)
)
def test_a_symmetric_start_is_random_on_both_sides_and_the_increment_is_the_difference(n, m, r, scale, seed):
    weight = torch.randn(m, n, dtype=torch.float64)
    adapter = Adapter.initial(weight, r, seed, "layer", torch.float64, init="symmetric", scale=scale)
    for factor, start, side in ((adapter.A, adapter.A0, n), (adapter.B, adapter.B0, m)):
        assert torch.equal(factor, start)
        assert start.all()
        assert start.abs().max() <= 1 / math.sqrt(side)
    assert not adapter.delta_weight(torch.float64).any()
    assert torch.equal(adapter.folded_into(weight), weight)
    with torch.no_grad():
        adapter.A.add_(torch.randn_like(adapter.A))
        adapter.B.add_(torch.randn_like(adapter.B))
    s, W0 = scale, weight.T
    W = reference.symmetric(W0, s * adapter.A0.T, adapter.B0, s * adapter.A.T, adapter.B)
    torch.testing.assert_close(adapter.delta_weight(torch.float64), (W - W0).T, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(adapter.folded_into(weight), W.T, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_its_first_step_of_sgd_is_that_of_the_seed(gradient):
    """W_1 = W_0 + (A_1 B_1 - A_0 B_0) with both gradients different from zero at once."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 5, bias=False)).double()
    W0 = module[0].weight.detach().T.clone()
    inject(module, rank=2, init="symmetric", gradient=gradient, adapter_dtype="float64")
    (adapter,) = adapters(module).values()
    A, B = adapter.A.detach().T.clone(), adapter.B.detach().clone()
    X, dY = x(4, 6), x(4, 5)
    optimizer = torch.optim.SGD(adapter.trained.values(), lr=0.1)
    attach(module, optimizer)
    (module(X) * dY).sum().backward()
    optimizer.step()
    W, A1, B1 = reference.sgd_step(W0, X.T @ dY, A, B, 0.1)
    torch.testing.assert_close(adapter.A.T, A1, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(adapter.B, B1, rtol=1e-12, atol=1e-13)
    assert not torch.equal(A1, A)
    assert not torch.equal(B1, B)
    torch.testing.assert_close(module(X), X @ W, rtol=1e-12, atol=1e-13)
    merge(module)
    torch.testing.assert_close(module[0].weight.T, W, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_factors_far_larger_than_the_weight_cost_no_precision_where_the_naive_formula_loses_it_all(dtype, gradient):
    """A0 B0 is a million times the weight. Errors are of the output after a small step, relative to its size.

    Ours stays at the rounding of the dtype; W0 - A0 B0 + A B, formed in the dtype of the weight, has no digit left.
    """
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(64, 64, bias=False)).to(dtype)
    W0 = module[0].weight.detach().double()
    data = torch.randn(8, 64).to(dtype)
    inject(module, rank=4, init="symmetric", gradient=gradient)
    (adapter,) = adapters(module).values()
    adapter.start_from(1e3 * W0.norm() / 8 * torch.randn(4, 64), 1e3 * W0.norm() / 8 * torch.randn(4, 64))
    optimizer = torch.optim.SGD(adapter.trained.values(), lr=1.0)
    attach(module, optimizer)
    for p in adapter.trained.values():
        p.grad = (2.0**-10 * torch.randn(p.shape)).bfloat16().float()
    optimizer.step()
    A0, B0, A, B = (p.detach().double() for p in (adapter.A0, adapter.B0, adapter.A, adapter.B))
    exact = data.double() @ reference.symmetric(W0.T, A0.T, B0, A.T, B)
    assert exact.abs().max() > 10 * (data.double() @ W0.T).abs().max()  # the step matters
    low = [p.to(dtype) for p in (W0.T, A0.T, B0, A.T, B)]
    naive = data @ reference.symmetric(*low)

    def error(y):
        return ((y.double() - exact).norm() / exact.norm()).item()

    with torch.no_grad():
        ours, theirs = error(module(data)), error(naive)
    eps = torch.finfo(dtype).eps
    assert ours < 2 * eps
    assert theirs > (100 * eps if dtype == torch.float32 else 0.5)
    merge(module)
    assert error(module(data)) < 2 * eps


# ---------------------------------------------------------------------------------------------------------------- DoRA


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(2, 8),
    m=st.integers(2, 8),
    r=st.integers(1, 2),
    scale=st.floats(0.1, 3),
    seed=st.integers(0, 2**31),
    transposed=st.booleans(),
    init=st.sampled_from(["zero", "symmetric", "pissa"]),
)
def test_dora_is_the_magnitude_times_the_direction(n, m, r, scale, seed, transposed, init):
    g = torch.Generator().manual_seed(seed)
    W0 = torch.randn(m, n, generator=g, dtype=torch.float64)
    weight = W0.T.contiguous() if transposed else W0
    kwargs = {"init": init, "scale": scale, "transposed": transposed}
    adapter = DoRA.initial(weight, r, seed, "layer", torch.float64, **kwargs)
    torch.testing.assert_close(adapter.magnitude, W0.norm(dim=1), rtol=1e-12, atol=0)
    with torch.no_grad():
        for p in adapter.trained.values():
            p.add_(torch.randn(p.shape, generator=g, dtype=torch.float64))
    V = W0 + scale * adapter.B.T @ adapter.A
    if init != "zero":
        V = V - scale * adapter.B0.T @ adapter.A0
    expected = adapter.magnitude[:, None] * V / V.norm(dim=1, keepdim=True)
    W = adapter.folded_into(weight)
    W = W.T if transposed else W
    torch.testing.assert_close(W, expected, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(W.norm(dim=1), adapter.magnitude.abs(), rtol=1e-8, atol=1e-8)


def test_the_norm_of_dora_gets_no_gradient():
    """Section 4.3 of the paper: with the norm in the graph the gradient of V would have no part along V."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 4, bias=False)).double()
    W0 = module[0].weight.detach().clone()
    inject(module, rank=2, decomposition="dora", adapter_dtype="float64")
    nudge(module)
    (a,) = adapters(module).values()
    (module(x(5, 6)) ** 2).sum().backward()
    p = {k: t.detach().clone().requires_grad_() for k, t in a.named_parameters()}
    V = W0 + p["B"].T @ p["A"]
    ((x(5, 6) @ (p["magnitude"][:, None] * V / V.norm(dim=1, keepdim=True)).T) ** 2).sum().backward()
    torch.testing.assert_close(a.magnitude.grad, p["magnitude"].grad)
    assert not torch.allclose(a.A.grad, p["A"].grad, rtol=1e-2)


@pytest.mark.parametrize("gradient", HOLDING)
@pytest.mark.parametrize("case", CASES)
def test_where_the_weight_holds_dora_it_is_projected_and_needs_no_gain_in_forward(case, gradient):
    module, inputs = adapted(case, gradient, decomposition="dora")
    nudge(module)
    assert all(place.host.holds_increment for place in places(module))
    base = build(case)[0].eval().requires_grad_(False)
    with torch.no_grad(), Operations() as ours:
        module.eval()(*inputs)
    with torch.no_grad(), Operations() as theirs:
        base(*inputs)
    assert ours.names == theirs.names


@pytest.mark.parametrize("gradient", HOLDING)
def test_over_50_steps_in_float32_the_weight_follows_within_rounding(gradient):
    """50 steps of an ulp or two each, of a weight of the size 1: 1e-5 is ten times what they may add up to."""
    torch.manual_seed(0)
    base, data, target = nn.Sequential(nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 8)), x(32, 16), x(32, 8)
    functions, modules = [], []
    for kind in ("factored", gradient):
        module = copy.deepcopy(base)
        inject(module, rank=2, decomposition="dora", gradient=kind)
        optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.5, momentum=0.5)
        attach(module, optimizer)
        for _ in range(50):
            optimizer.zero_grad()
            nn.functional.mse_loss(module(data.float()), target.float()).backward()
            optimizer.step()
        functions.append(module(data.float()))
        modules.append(module)
    assert (functions[0] - base(data.float())).abs().max() > 0.1
    torch.testing.assert_close(*functions, rtol=1e-5, atol=1e-5)
    for place in places(modules[1]):
        a, W0 = place.adapter, base.get_parameter(place.key).detach().double()
        expected = formed(a, W0, {k: p.detach().double() for k, p in a.named_parameters()})
        torch.testing.assert_close(place.weight.detach().double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_in_bfloat16_a_magnitude_that_moved_by_less_than_an_ulp_is_seen_on_average(gradient, bias):
    """A gain of 1.003, of which bfloat16 makes 1: the outputs, 4096 of them, follow it as rounding allows."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(64, 64, bias=bias)).to(torch.bfloat16)
    data = torch.randn(64, 64).to(torch.bfloat16)
    module = copy.deepcopy(base)
    inject(module, rank=2, decomposition="dora", gradient=gradient)
    (adapter,) = adapters(module).values()
    optimizer = torch.optim.SGD([adapter.magnitude], lr=1.0)
    attach(module, optimizer)
    adapter.magnitude.grad = -0.003 * adapter.magnitude.detach()
    optimizer.step()
    with torch.no_grad():
        b = 0 if base[0].bias is None else base[0].bias.double()
        before, after = base(data).double() - b, module(data).double() - b
    slope = (before * after).sum() / before.square().sum()
    assert slope.item() == pytest.approx(1.003, abs=1e-3)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(2, 16),
    m=st.integers(2, 16),
    size=st.integers(-3, 2),
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_w0_recovered_from_a_merged_dora_is_within_the_bound(n, m, size, seed, dtype):
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(m, n, generator=g).to(dtype)
    adapter = DoRA.initial(weight, 1, seed, "layer", torch.float32)
    with torch.no_grad():
        adapter.B.add_(10.0**size * torch.randn(adapter.B.shape, generator=g))
        adapter.magnitude.mul_(1 + 0.5 * torch.rand(adapter.magnitude.shape, generator=g))
    merged = adapter.folded_into(weight)
    again = Adapter.from_state(adapter.state(weight))
    base, bound = again.folded_out_of(merged)
    assert base.dtype == dtype
    assert (base.double() - weight.double()).abs().max().item() <= bound


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_an_output_whose_weights_are_zero_stays_finite_under_dora(gradient):
    """Its norm is zero, as after a zero initialisation: 0 / 0 must not reach the output or a gradient."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 4)).double()
    module[0].weight.data[1] = 0
    before = module(x(5, 6)).detach()
    inject(module, rank=2, decomposition="dora", gradient=gradient, adapter_dtype="float64")
    assert torch.equal(module(x(5, 6)), before)
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.1)
    attach(module, optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(module(x(5, 6))).backward()
        optimizer.step()
    (adapter,) = adapters(module).values()
    assert all(p.isfinite().all() for p in adapter.parameters())
    assert module(x(5, 6)).isfinite().all()
    merge(module)
    assert module[0].weight.isfinite().all()


@pytest.mark.parametrize(("increment", "case", "gradient"), pairs(INCREMENTS, CASES, GRADIENTS))
def test_a_plain_state_loaded_into_a_trained_module_gives_the_plain_function(increment, case, gradient):
    decomposition, init = increment
    module, inputs = adapted(case, gradient, decomposition=decomposition, init=init)
    nudge(module)
    plain = build(case)[0]
    with torch.no_grad():
        for p in plain.parameters():
            p.mul_(1.25)
    module.load_state_dict(plain.state_dict())
    output = lambda net: tree_leaves(net(*inputs))[0].detach()  # noqa: E731
    torch.testing.assert_close(output(module), output(plain), rtol=1e-11, atol=1e-12)
    nudge(module)
    after = output(module)
    assert (after - output(plain)).abs().max() > 1e-3
    merge(module)
    torch.testing.assert_close(output(module), after, rtol=1e-10, atol=1e-12)


# ------------------------------------------------------------------------------------------- the row of the padding


@pytest.mark.parametrize(
    ("decomposition", "init"),
    [
        ("product", "zero"),
        ("product", "symmetric"),
        ("product", "orthogonal"),
        ("product", "pissa"),
        ("additive", "zero"),
        ("dora", "zero"),
        ("dora", "symmetric"),
    ],
)
def test_the_row_of_the_padding_is_not_trained_and_all_three_gradients_agree(decomposition, init):
    """As in ``nn.Embedding`` itself: `padding_idx` contributes to no gradient, and its vector is never updated."""
    padded = nn.Embedding(12, 8, padding_idx=0)
    rows, others = [], []
    for gradient in GRADIENTS:
        module = nn.Sequential(copy.deepcopy(padded)).double()
        options = {"decomposition": decomposition, "init": init, "adapter_dtype": "float64"}
        inject(module, rank=2, target_modules=["0"], gradient=gradient, **options)
        optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.1)
        attach(module, optimizer)
        for _ in range(3):
            optimizer.zero_grad()
            ((module(torch.tensor([[0, 1, 2], [3, 0, 0]])) - 1) ** 2).sum().backward()
            optimizer.step()
        rows.append(module(torch.tensor([0])).abs().max().item())
        others.append(module(torch.arange(1, 12)).detach())
    assert rows == pytest.approx([0, 0, 0], abs=1e-14)
    torch.testing.assert_close(others[1], others[0])
    torch.testing.assert_close(others[2], others[0])


@pytest.mark.parametrize("decomposition", ["product", "additive", "dora"])
def test_what_a_file_says_of_an_embedding_leaves_the_row_of_the_padding_alone(decomposition):
    module = nn.Sequential(nn.Embedding(12, 8, padding_idx=4))
    inject(module, rank=2, target_modules=["0"], decomposition=decomposition)
    (place,) = places(module)
    with torch.no_grad():
        place.adapter.B.normal_()
        place.adapter.A.normal_()[..., 4] = 0
        saved = Adapter.from_state(place.adapter.state(place.weight))
        merged = saved.folded_into(place.weight)
    torch.testing.assert_close(merged, module(torch.arange(12)))
    assert (merged[4] == 0).all()
    assert (merged[:4] != place.weight[:4]).any()


# ------------------------------------------------------------------------------------------------ one of a user's own


DOCS = (Path(__file__).parents[1] / "docs" / "decompositions.md").read_text()
exec(re.search(r"```python\n(.*?)```", DOCS, re.DOTALL).group(1))  # the class VeRA


@pytest.fixture(autouse=True, scope="module")
def forgotten():
    yield
    DECOMPOSED.pop("vera")


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("case", CASES)
def test_a_decomposition_of_ones_own_has_the_gradients_of_its_formula(case, gradient):
    module, inputs = adapted(case, gradient, decomposition="vera")
    nudge(module)
    loss = loss_of(module(*inputs))
    loss.backward()
    plain, inputs, _ = build(case)
    plain.requires_grad_(False)
    values, weights = {}, {}
    for place in places(module):
        a = place.adapter
        p = values.setdefault(place.name, {k: t.detach().clone().requires_grad_() for k, t in a.trained.items()})
        assert list(p) == ["d", "b"]
        delta = a.scale * torch.diag_embed(p["b"]) @ a.B.detach().mT @ torch.diag_embed(p["d"]) @ a.A.detach()
        W0 = plain.get_parameter(place.key)
        weights[place.key] = W0 + (delta.mT if a.transposed else delta).reshape(W0.shape)
    expected = loss_of(functional_call(plain, weights, inputs))
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-11, atol=1e-13)
    for name, a in adapters(module).items():
        for own, p in a.trained.items():
            torch.testing.assert_close(p.grad, values[name][own].grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("checkpoint", ["merged", "adapter"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_a_decomposition_of_ones_own_trains_resumes_bitwise_and_merges(gradient, precision, checkpoint, tmp_path):
    model_class, own = (Net, {}) if checkpoint == "adapter" else (Zoo, ZOO)
    if checkpoint == "adapter" and gradient != "factored":
        pytest.skip("which is refused")
    options = {"rank": 2, "decomposition": "vera", "gradient": gradient, "checkpoint": checkpoint, **own}
    outputs, x = [], ResumableLoader().batches[0][0]
    x = x.bfloat16() if precision == "bf16-true" else x

    class Output(Callback):
        def on_train_end(self, trainer, pl_module):
            assert all(a.delta_weight().any() for a in adapters(pl_module).values())
            with torch.no_grad(), trainer.precision_plugin.forward_context():
                outputs.append(pl_module.eval()(x))
            pl_module.train()

    def fit(file=None, *callbacks):
        model, seen = model_class(), Digest()
        run = trainer(tmp_path, LoRA(**options), seen, Output(), *callbacks, max_epochs=2, precision=precision)
        run.fit(model, ResumableLoader(), ckpt_path=file)
        with torch.no_grad(), run.precision_plugin.forward_context():
            outputs.append(model.eval()(x))
        return model, seen

    model, seen = fit(None, SaveFirst(tmp_path / "saved.ckpt"))
    tolerance = 1e-5 if precision == "32-true" else 0.05
    torch.testing.assert_close(*outputs, rtol=tolerance, atol=tolerance)
    _, again = fit(tmp_path / "saved.ckpt")
    assert (again.module, again.optimizers, again.steps) == (seen.module, seen.optimizers, seen.steps)
    if checkpoint == "merged":
        state = torch.load(tmp_path / "saved.ckpt", weights_only=True)["state_dict"]
        assert list(state) == list(model.state_dict())
        model.load_state_dict(state, strict=True)


@pytest.mark.parametrize("gradient", HOLDING)
@pytest.mark.parametrize("decomposition", ["product", "dora", "vera"])
def test_the_roundings_of_different_steps_are_drawn_apart(decomposition, gradient):
    """200 steps of 1/100 of an ulp: each entry moves by 2 ulps, give or take 1.4.

    Were the draws of all steps the same, one entry in 100 would move by 200 ulps and the others not at all.
    """
    module = nn.Sequential(nn.Linear(32, 32, bias=False)).to(torch.bfloat16)
    module[0].weight.data.fill_(1.0)
    inject(module, rank=1, gradient=gradient, decomposition=decomposition)
    (a,) = adapters(module).values()
    with torch.no_grad():
        a.A.fill_(1.0)
        if decomposition == "vera":
            a.B.fill_(1.0)
            a.d.fill_(1.0)
    moved = {"product": a.B, "dora": getattr(a, "magnitude", None), "vera": getattr(a, "b", None)}[decomposition]
    by = {"product": 1.0, "vera": 1.0, "dora": 32**0.5}[decomposition]
    optimizer = torch.optim.SGD([moved], lr=1.0)
    attach(module, optimizer)
    ulp = 2.0**-7
    for _ in range(200):
        moved.grad = torch.full_like(moved, -ulp / 100 * by)
        optimizer.step()
    ulps = (module[0]._parameters["weight"].float() - 1) / ulp
    assert ulps.mean().item() == pytest.approx(2, abs=0.25)
    assert ulps.std().item() < 2
    assert ulps.max() < 12


class Norms(TorchDispatchMode):
    """How many times norms of vectors were taken."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket is torch.ops.aten.linalg_vector_norm
        return func(*args, **(kwargs or {}))


def test_the_norms_of_w0_are_taken_once_and_again_when_it_is_written_to():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 5)).double()
    inject(module, rank=2, decomposition="dora", adapter_dtype="float64")
    (adapter,) = adapters(module).values()
    weight, x = module[0]._parameters["weight"], torch.randn(3, 6, dtype=torch.float64)
    with torch.no_grad():
        adapter.B.normal_()

    def check(norms):
        with Norms() as taken:
            for _ in range(3):
                out = module(x)
        assert taken.count == norms
        V = weight + adapter.B.T @ adapter.A
        W = adapter.magnitude[:, None] * V / V.norm(dim=1, keepdim=True)
        torch.testing.assert_close(out, x @ W.T + module[0].bias, rtol=1e-12, atol=1e-12)

    check(0)  # taken when it was injected
    with torch.no_grad():
        weight.mul_(2)
    check(1)
    copied = copy.deepcopy(module)
    assert torch.equal(copied(x), module(x))
    with torch.inference_mode():
        weight.add_(1)
        module(x)
    module(x).sum().backward()
    check(0)
    weight.data = weight.detach() * 3
    check(1)
