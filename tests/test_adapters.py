"""What an increment is, where it starts, which dtype it keeps, and how it goes into a weight and out again."""

import copy
import itertools
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_lora import Adapter, adapters, inject

LOW = [torch.float32, torch.bfloat16, torch.float16]


def random_adapter(n=6, m=5, rank=2, dtype=torch.float32, **kwargs):
    return Adapter(torch.randn(rank, n).to(dtype), torch.randn(rank, m).to(dtype), **kwargs)


def assert_same_bits(a, b):
    assert a.dtype == b.dtype
    assert torch.equal(a.detach().contiguous().view(torch.uint8), b.detach().contiguous().view(torch.uint8))


# ----------------------------------------------------------------------------------------------------------- the start


def initial(seed=0, name="layer", dtype=torch.float32, shape=(5, 6), **kwargs):
    return Adapter.initial(torch.zeros(shape), 2, seed, name, dtype, **kwargs)


def test_it_starts_at_zero_with_a_random_a():
    adapter = initial()
    assert not adapter.B.any()
    assert not adapter.delta_weight().any()
    assert adapter.A.all()


def test_a_depends_on_the_seed_and_the_name_only():
    torch.manual_seed(1)
    first = initial()
    torch.manual_seed(2)
    torch.rand(3)
    before = torch.get_rng_state()
    assert_same_bits(initial().A, first.A)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(initial(seed=1).A, first.A)
    assert not torch.equal(initial(name="other").A, first.A)


def test_a_in_the_whole_module_does_not_depend_on_the_global_generator_or_on_other_layers():
    drawn = []
    for seed, widths in ((1, (4, 8, 4)), (2, (4, 8, 4, 9))):
        torch.manual_seed(seed)
        net = nn.Sequential(*(nn.Linear(n, m) for n, m in itertools.pairwise(widths)))
        inject(net, rank=2, seed=7)
        drawn.append(adapters(net))
    for name in ("0", "1"):
        assert_same_bits(drawn[0][name].A, drawn[1][name].A)


def test_a_is_uniform_within_one_over_the_root_of_its_inputs():
    """As in PEFT. A Kolmogorov-Smirnov test of 20000 values at a confidence of 99.9%."""
    n, count = 100, 20000
    A = Adapter.initial(torch.zeros(300, n), count // n, 0, "layer", torch.float32).A.detach()
    uniform = (A * math.sqrt(n) + 1).flatten().sort().values / 2
    assert uniform.min() >= 0
    assert uniform.max() <= 1
    distance = (uniform - torch.arange(count) / count).abs().max()
    assert distance < 1.95 / math.sqrt(count)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_in_another_dtype_a_is_the_rounded_draw(dtype):
    assert_same_bits(initial(dtype=dtype).A, initial().A.detach().to(dtype))


def test_of_a_transposed_weight_the_sides_are_exchanged():
    adapter = initial(shape=(6, 5), transposed=True)
    assert adapter.A.shape == (2, 6)
    assert adapter.B.shape == (2, 5)
    assert adapter.delta_weight().shape == (6, 5)
    assert_same_bits(adapter.A, initial(shape=(5, 6)).A)


# ------------------------------------------------------------------------------------------------------- the increment


@pytest.mark.parametrize("transposed", [False, True])
def test_the_increment_is_scale_times_b_transposed_a(transposed):
    adapter = random_adapter(dtype=torch.float64, scale=0.3, transposed=transposed)
    expected = 0.3 * torch.einsum("rm,rn->mn", adapter.B, adapter.A)
    torch.testing.assert_close(adapter.delta_weight(), expected.T if transposed else expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_increment_of_low_precision_factors_is_formed_in_float32(dtype):
    adapter = random_adapter(dtype=dtype)
    assert_same_bits(adapter.delta_weight(), adapter.B.detach().float().T @ adapter.A.detach().float())


def test_an_adapter_is_not_called():
    with pytest.raises(RuntimeError, match="not a layer"):
        random_adapter()(torch.randn(6))


# --------------------------------------------------------------------------------------------------------------- dtype


@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(
    "cast",
    [
        nn.Module.half,
        nn.Module.bfloat16,
        nn.Module.float,
        nn.Module.double,
        lambda module: module.to(torch.bfloat16),
        lambda module: module.to("cpu", torch.float16),
        lambda module: module.type(torch.float64),
    ],
)
def test_the_adapters_keep_their_bits_when_the_module_is_cast(kept, cast):
    net = nn.Sequential(nn.Linear(6, 5))
    inject(net, rank=2, adapter_dtype=str(kept).removeprefix("torch."))
    adapter = net[0].lora
    nn.init.normal_(adapter.B)
    adapter.A.grad = torch.randn_like(adapter.A)
    A, B, gradient = adapter.A.detach().clone(), adapter.B.detach().clone(), adapter.A.grad.clone()
    cast(net)
    assert_same_bits(adapter.A, A)
    assert_same_bits(adapter.B, B)
    assert_same_bits(adapter.A.grad, gradient)
    assert isinstance(adapter.A, nn.Parameter)


def test_the_adapters_follow_the_module_to_another_device():
    net = nn.Sequential(nn.Linear(6, 5))
    inject(net, rank=2)
    net.to("meta", torch.bfloat16)
    assert net[0].lora.A.is_meta
    assert net[0].lora.A.dtype == torch.float32
    assert net[0].weight.dtype == torch.bfloat16


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda a: pickle.loads(pickle.dumps(a))])
def test_a_copy_is_equal_and_apart(copied):
    adapter = random_adapter(scale=0.5, dropout=0.1, transposed=True)
    twin = copied(adapter)
    assert_same_bits(twin.A, adapter.A)
    assert_same_bits(twin.B, adapter.B)
    assert (twin.scale, twin.dropout, twin.transposed) == (0.5, 0.1, True)
    nn.init.zeros_(twin.B)
    assert adapter.B.any()


@pytest.mark.parametrize("transposed", [False, True])
def test_its_state_makes_the_same_increment_again(transposed):
    adapter = random_adapter(scale=0.5, transposed=transposed, dtype=torch.bfloat16)
    again = Adapter.from_state(copy.deepcopy(adapter.state(torch.empty(0))))
    assert_same_bits(again.delta_weight(), adapter.delta_weight())


# ------------------------------------------------------------------------------------------ into a weight, out of it


@st.composite
def foldings(draw):
    """An adapter and a weight of any low dtype and of any size, down to what underflows."""
    dtype = draw(st.sampled_from(LOW))
    n, m = draw(st.integers(1, 8)), draw(st.integers(1, 8))
    rank = draw(st.integers(1, min(n, m)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    sizes = st.integers(-9, 2)

    def randn(*shape):
        return torch.randn(*shape, generator=generator) * 10.0 ** draw(sizes)

    adapter_dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    adapter = Adapter(randn(rank, n).to(adapter_dtype), torch.randn(rank, m, generator=generator).to(adapter_dtype))
    weight = randn(m, n) if draw(st.integers(0, 5)) else torch.zeros(m, n)
    return adapter, weight.to(dtype)


@settings(max_examples=400, deadline=None)
@given(foldings())
def test_folding_out_what_was_folded_in_errs_by_no_more_than_its_bound(folding):
    adapter, weight = folding
    base, bound = adapter.folded_out_of(adapter.folded_into(weight))
    assert base.dtype == weight.dtype
    assert (base.double() - weight.double()).abs().max().item() <= bound


def test_the_bound_holds_where_both_sums_are_ties_between_subnormals():
    weight = torch.tensor([[2.0**-24]], dtype=torch.float16)  # the smallest there is
    adapter = Adapter(torch.tensor([[2.0**-25]]), torch.ones(1, 1))
    base, bound = adapter.folded_out_of(adapter.folded_into(weight))
    assert 0 < abs(base.item() - weight.item()) <= bound


@pytest.mark.parametrize("dtype", LOW)
def test_the_bound_is_not_idle(dtype):
    torch.manual_seed(0)
    adapter, weight = random_adapter(64, 64), torch.randn(64, 64).to(dtype)
    base, bound = adapter.folded_out_of(adapter.folded_into(weight))
    assert (base.double() - weight.double()).abs().max().item() > bound / 10


@settings(max_examples=200, deadline=None)
@given(foldings())
def test_folding_in_rounds_the_sum_once(folding):
    adapter, weight = folding
    folded = adapter.folded_into(weight)
    exact = weight.double() + adapter.delta_weight().double()
    info = torch.finfo(weight.dtype)
    half_an_ulp = info.eps / 2 * exact.abs() + info.smallest_normal * info.eps
    in_float32 = torch.finfo(torch.float32).eps * exact.abs()
    assert folded.dtype == weight.dtype
    assert ((folded.double() - exact).abs() <= half_an_ulp + in_float32).all()


def test_folding_in_does_not_round_the_increment_by_itself():
    torch.manual_seed(0)
    adapter, weight = random_adapter(64, 64), torch.randn(64, 64, dtype=torch.bfloat16)
    exact = weight.double() + adapter.delta_weight().double()
    rounded_twice = weight + adapter.delta_weight().to(torch.bfloat16)
    assert (adapter.folded_into(weight).double() - exact).norm() < 0.95 * (rounded_twice.double() - exact).norm()


@pytest.mark.parametrize("dtype", [*LOW, torch.float64])
def test_with_b_zero_the_weight_keeps_every_bit_also_the_sign_of_zero(dtype):
    weight = torch.tensor([[-0.0, 0.0, 1.0], [float("nan"), float("-inf"), 1e-7]], dtype=dtype)
    adapter = Adapter(torch.randn(1, 3), torch.zeros(1, 2))
    folded = adapter.folded_into(weight)
    base, bound = adapter.folded_out_of(weight)
    assert_same_bits(folded, weight)
    assert_same_bits(base, weight)
    assert bound == 0
    assert folded.data_ptr() != weight.data_ptr()


@pytest.mark.parametrize("dtype", LOW)
def test_folding_leaves_the_weight_and_the_factors_as_they_are(dtype):
    adapter, weight = random_adapter(), torch.randn(5, 6).to(dtype)
    before = weight.clone(), adapter.A.detach().clone(), adapter.B.detach().clone()
    merged = [adapter.folded_into(weight) for _ in range(100)]
    adapter.folded_out_of(merged[0])
    for tensor, kept in zip((weight, adapter.A, adapter.B), before, strict=True):
        assert_same_bits(tensor, kept)
    assert all(torch.equal(again, merged[0]) for again in merged)


def test_a_float64_weight_is_merged_in_float64():
    adapter, weight = random_adapter(), torch.randn(5, 6, dtype=torch.float64)
    delta = adapter.B.detach().double().T @ adapter.A.detach().double()
    torch.testing.assert_close(adapter.folded_into(weight), weight + delta, rtol=1e-15, atol=1e-15)


# ------------------------------------------------------------------------------------------------- rows of a weight

SHAPES = {"a matrix": (5, 6), "a filter": (5, 2, 3), "a stack": (5, 4, 6), "a transposed one": (6, 5)}


def moved(kind):
    """An adapter whose factors have taken a step, the factors before, and a weight that holds their increment."""
    torch.manual_seed(0)
    shape, stack = SHAPES[kind], (5,) if kind == "a stack" else ()
    A, B, A_next, B_next = (torch.randn(*stack, 2, side) for side in (6, 4 if stack else 5) * 2)
    adapter = Adapter(A_next, B_next, shape, 1.5, transposed=kind == "a transposed one", key="0/layer", holds=True)
    return adapter, A, B, torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize("kind", SHAPES)
def test_rows_of_a_weight_follow_by_themselves_as_they_do_in_the_whole(kind):
    adapter, A, B, weight = moved(kind)
    parts = [weight[rows].clone() for rows in (slice(0, 3), slice(3, None), slice(len(weight), len(weight)))]
    adapter.follow(weight, A, B)
    for part, rows in zip(parts, (slice(0, 3), slice(3, len(weight)), slice(len(weight), len(weight))), strict=True):
        adapter.follow(part, A, B, rows)
    torch.testing.assert_close(torch.cat(parts), weight, rtol=1e-12, atol=1e-12)


def test_rows_are_rounded_by_draws_of_their_own():
    A, B = torch.randn(2, 6), torch.randn(2, 1).repeat(1, 800)  # all rows move alike
    adapter = Adapter(A + 0.01, B + 0.01, key="0/layer", holds=True)
    first, again, other = (torch.ones(400, 6, dtype=torch.bfloat16) for _ in range(3))
    for part, rows in ((first, slice(0, 400)), (again, slice(0, 400)), (other, slice(400, 800))):
        adapter.follow(part, A, B, rows)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
