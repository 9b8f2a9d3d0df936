"""Random numbers from a key and a counter: equal everywhere, and random enough for what they are used for.

Each statistical assertion is wrong for truly random numbers with a probability below 1e-6; what is drawn is fixed.
"""

import dataclasses
import math
import statistics
import sys

import pytest
import torch
from torch import nn

from lightning_lora import adapters, attach, inject
from lightning_lora.adapters import draws
from lightning_lora.adapters.adapter import Adapter
from lightning_lora.checkpoint.format import SavedRun
from lightning_lora.weights import counter
from lightning_lora.weights.rounding import round_stochastically

CPU = torch.device("cpu")
N = 2**18
Z = statistics.NormalDist().inv_cdf(1 - 1e-6 / 2)  # 4.9


def correlation(x, y):
    """Times the root of their number: ~ N(0, 1) if they are independent."""
    x, y = x.double(), y.double()
    x, y = x - x.mean(), y - y.mean()
    return (x @ y / (x.norm() * y.norm())).item() * math.sqrt(len(x))


def numbers(*parts, count=N, first=0):
    return counter.halves(counter.key(*parts), first, count, CPU)


def reference(key, n):
    """The same word in Python's whole numbers."""
    x = (n + key[0]) % 2**32
    x ^= x >> 16
    x = x * 0x7FEB352D % 2**32
    x ^= x >> 15
    x = (x + key[1]) * 0x846CA68B % 2**32
    return x ^ x >> 16


@pytest.mark.parametrize("key", [(0, 0), (-1, 5), (2**31 - 1, -(2**31)), counter.key("seed", 3)])
@pytest.mark.parametrize("first", [0, 12345, 2**31 - 3, 2**32 - 3])
def test_the_words_are_those_of_a_reference_also_where_they_overflow(key, first):
    found = counter.words(key, first, 7, CPU)
    assert [word % 2**32 for word in found.tolist()] == [reference(key, (first + i) % 2**32) for i in range(7)]


def test_the_words_of_a_key_never_change():
    """A run that is resumed by a later version draws the same; other numbers need another number of the format."""
    key = counter.key("0/layer", "round", 1)
    assert key == (-2144596481, -1172306427)
    assert counter.words(key, 0, 4, CPU).tolist() == [-236981918, -1192631246, 681701565, 489009013]


def test_any_part_can_be_had_alone():
    whole = numbers("a", count=101)
    for first in (0, 1, 2, 37, 100):
        for count in (0, 1, 2, 7):
            assert torch.equal(numbers("a", count=min(count, 101 - first), first=first), whole[first : first + count])


def test_every_bit_is_one_half_of_the_time_and_no_two_bits_go_together():
    words = counter.words(counter.key("bits"), 0, N, CPU)
    bits = torch.stack([(words >> i) & 1 for i in range(32)]).double()
    assert ((bits.mean(1) - 0.5) * 2 * math.sqrt(N)).abs().max() < 6  # of 32
    R = (bits - 0.5) @ (bits - 0.5).T * 4 / math.sqrt(N)
    assert (R - R.diag().diag()).abs().max() < 6  # of 496


def test_the_halves_are_uniform():
    """Chi-square over 1024 classes, of the upper and of the lower bits."""
    for x in (numbers("uniform") >> 6, numbers("uniform") & 1023):
        expected = N / 1024
        chi2 = (torch.bincount(x, minlength=1024) - expected).square().sum().item() / expected
        assert abs(chi2 - 1023) < Z * math.sqrt(2 * 1023)


@pytest.mark.parametrize("lag", [1, 2, 3, 64, 512, 4096])
def test_neighbours_are_not_correlated(lag):
    x = numbers("neighbours", count=N + lag)
    assert abs(correlation(x[:-lag], x[lag:])) < Z
    low = x & 255
    assert abs(correlation(low[:-lag], low[lag:])) < Z


def test_steps_names_and_seeds_are_not_correlated_at_any_small_shift():
    keys = [("0/a", "round", step) for step in range(6)] + [
        ("0/b", "round", 0),
        ("1/a", "round", 0),
        ("0/a", "draw", 0),
    ]
    found = [numbers(*key) for key in keys]
    for i, x in enumerate(found):
        for y in found[:i]:
            for shift in (0, 1, 2):
                assert abs(correlation(x[shift:], y[: N - shift])) < Z


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_takes_the_upper_neighbour_as_often_as_it_should(dtype):
    """Every fraction of an ulp above 1.5, N times each, and of both signs: z of each count."""
    ulp = torch.finfo(dtype).eps
    for sign in (1, -1):
        for i, fraction in enumerate((2**-12, 0.125, 0.5, 0.75, 1 - 2**-12)):
            x = torch.full((N,), sign * (1.5 + fraction * ulp))
            rounded = round_stochastically(x, dtype, counter.key("fraction", sign, i)).float()
            up = (rounded - sign * 1.5).abs() / ulp
            assert set(up.unique().tolist()) <= {0.0, 1.0}
            assert abs(up.double().mean().item() - fraction) < Z * math.sqrt(fraction * (1 - fraction) / N)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_a_dtype_has_stays_as_it_is(dtype):
    x = torch.randn(4096, generator=torch.Generator().manual_seed(0)).to(dtype)
    x = torch.cat([x, x.new_tensor([0.0, -0.0, torch.inf, -torch.inf]), torch.finfo(dtype).smallest_normal * x / 4])
    rounded = round_stochastically(x.float(), dtype, (1, 2))
    assert torch.equal(rounded.view(torch.int16), x.view(torch.int16))


def test_what_is_not_a_number_stays_none_whatever_its_bits():
    for bits in (0x7FFFFFFF, 0x7FC00000, 0x7F800001 + 0xFFFF, -0x400000):
        x = torch.full((4096,), bits, dtype=torch.int32).view(torch.float32)
        assert round_stochastically(x, torch.bfloat16, (3, 4)).isnan().all()


def test_errors_of_rounding_are_not_correlated_between_neighbours_steps_and_names():
    x = torch.randn(N, generator=torch.Generator().manual_seed(0))
    keys = [("0/a", "round", 1), ("0/a", "round", 2), ("0/b", "round", 1)]
    errors = [round_stochastically(x, torch.bfloat16, counter.key(*key)).double() - x for key in keys]
    scale = x.abs().double()
    errors = [error / scale for error in errors]
    for error in errors:
        assert abs(error.mean().item()) < Z * error.std().item() / math.sqrt(N)
        assert abs(correlation(error[1:], error[:-1])) < Z
    # what differs between keys is the rounding; the errors of one entry share the two neighbours, not the choice
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert abs(correlation(errors[i], errors[j])) < Z


def test_normal_draws_are_normal():
    x = draws.normal(counter.key("normal"), (N,), CPU).double()
    assert x.abs().max() < 5.4
    assert abs(x.mean().item()) < Z / math.sqrt(N)
    assert abs(x.square().mean().item() - 1) < Z * math.sqrt(2 / N)
    assert abs(x.pow(4).mean().item() - 3) < Z * math.sqrt(96 / N)
    uniform = torch.special.ndtr(x).sort().values
    distance = (uniform - torch.linspace(0.5 / N, 1 - 0.5 / N, N, dtype=torch.float64)).abs().max().item()
    assert distance < math.sqrt(math.log(2 / 1e-6) / 2 / N)  # Kolmogorov and Smirnov, by the bound of Dvoretzky


# ------------------------------------------------------------------------------------------------------ in an adapter


def stepped(weight, step, rows=None, lr=2.0**-10):
    """``weight`` after a step of an adapter that holds it; of small whole numbers, so that products are exact."""
    generator = torch.Generator().manual_seed(0)
    n, m = weight[0].numel(), len(weight)
    A, B = (torch.randint(-2, 3, (4, side), generator=generator).float() for side in (n, m))
    adapter = Adapter(A + lr, B - lr, weight.shape, key="0/layer", holds=True)
    adapter.steps = step
    part = weight.clone() if rows is None else weight[rows].clone()
    adapter.follow(part, A, B, rows=rows)
    return part


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(9, 5), (7, 3, 3, 3), (64, 4096 + 1)])
def test_a_process_that_holds_some_rows_rounds_them_as_one_that_holds_all(dtype, shape, monkeypatch):
    weight = (torch.randint(-256, 257, shape, generator=torch.Generator().manual_seed(1)) / 128).to(dtype)
    whole = stepped(weight, 3)
    for rows in (slice(0, 4), slice(4, 5), slice(5, len(weight)), slice(2, 2)):
        assert torch.equal(stepped(weight, 3, rows), whole[rows])
    monkeypatch.setattr(sys.modules[Adapter.__module__], "_PART_ON_CPU", 10)
    assert torch.equal(stepped(weight, 3), whole)
    assert not torch.equal(stepped(weight, 4), whole)


def test_the_draws_of_rounding_leave_the_global_generator_alone_and_do_not_depend_on_it():
    found = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        found.append(stepped(torch.ones(8, 8, dtype=torch.bfloat16), 1))
        assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(*found)


def test_steps_are_counted_where_weights_follow():
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    inject(module, rank=2, gradient="merged")
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.1)
    attach(module, optimizer)
    for _ in range(3):
        module(torch.ones(1, 4)).sum().backward()
        optimizer.step()
    assert {adapter.steps for adapter in adapters(module).values()} == {3}


@pytest.mark.parametrize("version", [1, 2, 3])
def test_a_drawn_a_that_a_file_leaves_out_is_that_of_the_files_format(version):
    module = nn.Sequential(nn.Linear(6, 5))
    inject(module, rank=2, gradient="merged", resample_every_n_steps=2, resample="A")
    (adapter,) = adapters(module).values()
    state = adapter.state(module[0].weight)
    assert state.tensors.keys() == {"B"}
    state = dataclasses.replace(state, steps=5, drawn_at=4, tensors={"B": torch.ones_like(adapter.B)})
    payload = SavedRun("merged", {"0": state}, trained=[], base={}, version=version).to_mapping()
    adapter.load_tensors(adapter.resume(SavedRun.from_mapping(payload).adapters["0"]))
    if version <= 2:
        generator = draws.generator("0/0", "4")
        expected = torch.zeros(2, 6).normal_(0, 2**-0.5, generator=generator)
    else:
        expected = draws.normal(counter.key("0/0", "draw", 4, "A"), (2, 6), CPU) * 2**-0.5
    assert torch.equal(adapter.A, expected)
    assert torch.equal(adapter.B, torch.ones_like(adapter.B))
    assert (adapter.steps, adapter.drawn_at) == (5, 4)
