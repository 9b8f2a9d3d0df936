"""Projections drawn anew (seed, "Random Projection"): what an update is, what it is on average, what moments become.

Statistical tests compute everything from fixed seeds, so they give one answer; the confidence that each states is the
probability that another seed would pass too, were the library right.
"""

import copy
import math
import pickle
import statistics

import pytest
import torch
import torch.nn.functional as F
from lightning_utilities.core.imports import RequirementCache
from models import digest
from pairs import pairs
from test_gradients import CASES, build, loss_of
from torch import nn

from lightning_lora import Adapter, adapters, attach, inject, merge
from lightning_lora.errors import LoRAError
from lightning_lora.injection.inject import places
from lightning_lora.steps.resample import draw_anew, forget

N, M = 24, 20  # inputs and outputs of the layer that is looked at
FORMS = {"both": 2, "A": 1}
"""``resample`` -> c, the multiple of the full gradient that an update is on average."""
HOLDING = ["merged", "projected"]
SMALL = 1e-6
"""A learning rate whose square is far below every statistical error here."""


def network():
    """A classifier whose second layer is the one that is looked at."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(9, N), nn.Tanh(), nn.Linear(N, M), nn.Tanh(), nn.Linear(M, 5)).double()


def data():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(64, 9, dtype=torch.float64, generator=generator), torch.randint(5, (64,), generator=generator)


def loss(module):
    x, y = data()
    return F.cross_entropy(module(x), y)


def full_gradient():
    module = network()
    loss(module).backward()
    return module[2].weight.grad


def resampled(k=1, resample="both", gradient="merged", rank=4, module=None, **options):
    """The network with an adapter in its second layer, which is drawn anew every ``k`` steps; and that adapter."""
    module = network() if module is None else module
    options = {"target_modules": ["2"], "adapter_dtype": "float64", **options}
    inject(module, rank=rank, gradient=gradient, resample_every_n_steps=k, resample=resample, **options)
    return module, adapters(module)["2"]


def weight_of(module, layer=2):
    return module[layer]._parameters["weight"]


def trained(module):
    return [p for p in module.parameters() if p.requires_grad]


def step(module, optimizer):
    optimizer.zero_grad()
    loss(module).backward()
    optimizer.step()


# ------------------------------------------------------------------------------------------------ statistics


def normal_quantile(p):
    return statistics.NormalDist().inv_cdf(p)


def chi_square_quantile(p, dof):
    """By Wilson and Hilferty."""
    return dof * (1 - 2 / (9 * dof) + normal_quantile(p) * math.sqrt(2 / (9 * dof))) ** 3


CONFIDENCE = 0.999


def check_mean(samples, expected):
    """That the mean of the rows of ``samples`` is ``expected``, by two tests with 99.9 % confidence each.

    The mean square of z over the entries is a chi-square over its degrees of freedom, p^2 / tr(R^2) of them for p
    entries with the correlations R (Satterthwaite). And T^2 (Hotelling) for eight directions, that of the expected mean
    first, is a chi-square with eight degrees.
    """
    count, p = samples.shape
    error, deviation = samples.mean(0) - expected, samples.std(0)
    R = ((samples - samples.mean(0)) / deviation).T @ ((samples - samples.mean(0)) / deviation) / (count - 1)
    dof = p**2 / (R.square().sum().item() - p**2 / count)
    statistic = (error / deviation * math.sqrt(count)).square().mean().item()
    low, high = (chi_square_quantile(q, dof) / dof for q in ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2))
    assert low < statistic < high, (low, statistic, high)

    directions = torch.randn(p, 8, dtype=samples.dtype, generator=torch.Generator().manual_seed(2))
    if expected.norm() > 0:
        directions[:, 0] = expected
    seen = (samples - expected) @ torch.linalg.qr(directions)[0]
    T2 = count * seen.mean(0) @ torch.linalg.solve(seen.T.cov(), seen.mean(0))
    assert T2.item() < chi_square_quantile(CONFIDENCE, 8)


def check_mean_of_one(samples, expected):
    """That the mean of ``samples`` is ``expected``, with 99.9 % confidence."""
    error = abs(samples.mean().item() - expected)
    assert error < normal_quantile((1 + CONFIDENCE) / 2) * samples.std().item() / math.sqrt(len(samples))


# ------------------------------------------------------------------------------------------------ one step's update


@pytest.mark.parametrize(("scaled", "gradient", "lr"), pairs([(1, None), (4, 3.0)], HOLDING, [1e-3, 0.1, 3.0]))
def test_a_step_of_sgd_is_the_seeds_formula_with_its_term_of_second_order(scaled, gradient, lr):
    """In the seed's layout: -eta s^2 (G B'B + A A'G) + eta^2 s^3 G B' A' G, several draws running."""
    rank, alpha = scaled
    module, adapter = resampled(rank=rank, alpha=alpha, gradient=gradient)
    optimizer = torch.optim.SGD(trained(module), lr=lr)
    attach(module, optimizer)
    s = 1.0 if alpha is None else alpha / rank
    for _ in range(4):
        W, A, B = weight_of(module).T.clone(), adapter.A.detach().T.clone(), adapter.B.detach().clone()
        plain = network()
        plain[2].weight.data.copy_(W.T)
        loss(plain).backward()
        G = plain[2].weight.grad.T
        step(module, optimizer)
        first, second = G @ B.T @ B + A @ A.T @ G, G @ B.T @ A.T @ G
        expected = W - lr * s**2 * first + lr**2 * s**3 * second
        torch.testing.assert_close(weight_of(module).T, expected, rtol=1e-11, atol=1e-12)
        assert second.abs().max() > 1e-6
        assert not torch.equal(adapter.A.T, A)


@pytest.mark.parametrize("gradient", HOLDING)
def test_a_step_of_the_one_sided_form_has_no_term_of_second_order(gradient):
    module, adapter = resampled(rank=4, alpha=3.0, resample="A", gradient=gradient)
    optimizer = torch.optim.SGD(trained(module), lr=3.0)
    attach(module, optimizer)
    assert set(adapter.trained) == {"B"}
    assert trained(module) == [adapter.B]
    for _ in range(4):
        W, A = weight_of(module).clone(), adapter.A.detach().clone()
        assert not adapter.B.any()
        plain = network()
        plain[2].weight.data.copy_(W)
        loss(plain).backward()
        step(module, optimizer)
        expected = W - 3.0 * 0.75**2 * plain[2].weight.grad @ A.T @ A
        torch.testing.assert_close(weight_of(module), expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(("case", "gradient", "resample"), pairs(CASES, HOLDING, FORMS))
def test_every_layer_moves_by_its_full_gradient_projected(case, gradient, resample):
    """To first order, for every weight of every kind of layer, against autograd in the plain module."""
    module, inputs, options = build(case)
    for embedding in (m for m in module.modules() if isinstance(m, nn.Embedding)):
        embedding.padding_idx = None  # which has tests of its own
    plain = copy.deepcopy(module)
    inject(
        module,
        **{"rank": 2, "alpha": 3, "gradient": gradient, "adapter_dtype": "float64", **options},
        resample_every_n_steps=1,
        resample=resample,
    )
    loss_of(plain(*inputs)).backward()
    expected = {}
    for place in places(module):
        adapter = place.adapter
        A, B = adapter.A.detach(), adapter.B.detach()
        G = adapter.as_matrix(plain.get_parameter(place.key).grad)
        assert G.abs().max() > 0
        expected[place.key] = 1.5**2 * (B.mT @ (B @ G) + (G @ A.mT) @ A)
        assert bool(B.any()) == (resample == "both")
    optimizer = torch.optim.SGD(trained(module), lr=SMALL)
    attach(module, optimizer)
    loss_of(module(*inputs)).backward()
    optimizer.step()
    assert expected
    for place in places(module):
        moved = (plain.get_parameter(place.key) - place.weight).detach() / SMALL
        torch.testing.assert_close(place.adapter.as_matrix(moved), expected[place.key], rtol=1e-4, atol=1e-5)


def test_a_draw_leaves_the_function_and_the_weight_as_they_are():
    for resample in FORMS:
        module, adapter = resampled(k=1000, resample=resample)
        optimizer = torch.optim.SGD(trained(module), lr=0.5)
        attach(module, optimizer)
        step(module, optimizer)
        before, A = copy.deepcopy(weight_of(module)), adapter.A.detach().clone()
        draw_anew({adapter: adapter}, optimizer, "transfer")
        assert torch.equal(weight_of(module), before)
        assert not torch.equal(adapter.A, A)
        assert bool(adapter.B.any()) == (resample == "both")
        merge(module)
        assert torch.equal(module[2].weight, before)
        assert list(module.state_dict()) == list(network().state_dict())


@pytest.mark.parametrize("resample", FORMS)
def test_injection_changes_no_bit_though_both_factors_are_random(resample):
    plain = network()
    for gradient in HOLDING:
        module, adapter = resampled(resample=resample, gradient=gradient)
        assert adapter.A.abs().min() > 0
        assert torch.equal(module(data()[0]), plain(data()[0]))
        assert torch.equal(weight_of(module), plain[2].weight)


# ------------------------------------------------------------------------------------------------ on average


def updates(count, k=1, resample="both", rank=4, alpha=None, gradient="merged", optimizer=None, lr=SMALL, **options):
    """What each of ``count`` intervals between draws, all from W0, takes from the weight, over the learning rate."""
    module, adapter = resampled(k=k, resample=resample, rank=rank, alpha=alpha, gradient=gradient, **options)
    x, y = data()
    with torch.no_grad():
        x = module[1](module[0](x))  # the layer and what comes after it: the gradient is the same
    optimizer = (optimizer or torch.optim.SGD)(trained(module), lr=lr)
    attach(module, optimizer)
    W0, seen = weight_of(module).detach().clone(), []
    for _ in range(count):
        for _ in range(k):
            optimizer.zero_grad()
            F.cross_entropy(module[4](module[3](module[2](x))), y).backward()
            optimizer.step()
        with torch.no_grad():
            seen.append(((W0 - weight_of(module)) / lr).flatten())
            weight_of(module).copy_(W0)
    assert adapter.steps == adapter.drawn_at == count * k
    return torch.stack(seen)


@pytest.mark.parametrize(("resample", "rank"), [("both", 1), ("A", 4), ("both", 16)])
def test_the_mean_update_is_c_times_the_full_gradient(resample, rank):
    check_mean(updates(1200, resample=resample, rank=rank), FORMS[resample] * full_gradient().flatten())


@pytest.mark.parametrize("resample", FORMS)
def test_the_mean_update_scales_with_the_square_of_alpha_over_rank(resample):
    expected = FORMS[resample] * (3 / 4) ** 2 * full_gradient().flatten()
    check_mean(updates(1000, resample=resample, alpha=3.0, gradient="projected"), expected)


def test_k_steps_between_draws_move_k_times_as_far_on_average():
    check_mean(updates(800, k=3), 3 * FORMS["both"] * full_gradient().flatten())


def test_the_term_of_second_order_is_zero_on_average():
    """At a learning rate at which it is as large as the others."""
    check_mean(updates(1000, lr=5.0), 2 * full_gradient().flatten())


@pytest.mark.parametrize("rank", [1, 4])
def test_the_noise_of_a_one_sided_update_is_what_the_docs_say(rank):
    """(|g_i|^2 + g_ij^2) / r for the entry ij: that of the sum of all, with 99.9 % confidence."""
    G = full_gradient()
    noise = (updates(1000, resample="A", rank=rank) - G.flatten()).square().sum(1)
    check_mean_of_one(noise, (N + 1) / rank * G.square().sum().item())


def test_these_tests_would_see_another_c():
    seen, G = updates(2500, resample="both", rank=4), full_gradient().flatten()
    for wrong in (1.0, 1.9, 2.1):
        with pytest.raises(AssertionError):
            check_mean(seen, wrong * G)


@pytest.mark.parametrize(("resample", "rank"), [("both", 1), ("A", 16)])
def test_the_error_of_the_mean_falls_as_one_over_the_root_of_the_number_of_draws(resample, rank):
    """The slope of log error against log N, fitted to each of 16 independent runs; its mean with 99.9 % confidence."""
    G = FORMS[resample] * full_gradient().flatten()
    runs = updates(2048, resample=resample, rank=rank).view(16, 128, -1)
    numbers = [8, 16, 32, 64, 128]
    errors = torch.stack([(runs[:, :number].mean(1) - G).norm(dim=1) for number in numbers], 1).log()
    x = torch.tensor(numbers, dtype=torch.float64).log()
    slopes = ((errors - errors.mean(1, keepdim=True)) @ (x - x.mean())) / (x - x.mean()).square().sum()
    half_width = 4.07 * slopes.std().item() / math.sqrt(16)  # Student's t with 15 degrees of freedom
    assert half_width < 0.2
    assert abs(slopes.mean().item() + 0.5) < half_width


@pytest.mark.parametrize("resample", FORMS)
def test_increments_reach_full_rank_while_those_of_fixed_projections_keep_theirs(resample):
    ranks = {}
    for k in (1, 4, None):
        module = network()
        if k is None:
            inject(module, rank=2, target_modules=["2"], gradient="merged", adapter_dtype="float64")
        else:
            resampled(k=k, resample=resample, rank=2, module=module)
        optimizer = torch.optim.SGD(trained(module), lr=0.3)
        attach(module, optimizer)
        for _ in range(48):
            step(module, optimizer)
        ranks[k] = torch.linalg.matrix_rank(weight_of(module) - network()[2].weight, rtol=1e-9).item()
    assert ranks == {1: M, 4: M, None: 2}


@pytest.mark.parametrize("resample", FORMS)
def test_training_with_draws_follows_full_training_by_sgd(resample):
    """With c times the learning rate and many tiny steps the noise averages out."""
    rank, steps, lr = 8, 400, 0.05
    module, _ = resampled(resample=resample, rank=rank)
    plain = network().requires_grad_(False)
    plain[2].weight.requires_grad_()
    ours = torch.optim.SGD(trained(module), lr=lr / FORMS[resample])
    attach(module, ours)
    theirs = torch.optim.SGD([plain[2].weight], lr=lr)
    start = loss(plain).item()
    for _ in range(steps):
        step(module, ours)
        step(plain, theirs)
    assert loss(plain).item() < start - 0.1
    assert loss(module).item() == pytest.approx(loss(plain).item(), abs=0.1 * (start - loss(plain).item()))


# ------------------------------------------------------------------------------------------------ draws


def drawn(seed=0, name="2", at=0, rank=4, resample="both", shape=(M, N), stacked=False):
    """A and B of one draw."""
    weight = torch.zeros(shape)
    adapter = Adapter.initial(weight, rank, seed, name, torch.float32, stacked, resample=resample, holds=True)
    adapter.drawn_at = at
    adapter.draw()
    return adapter.A.detach(), adapter.B.detach()


@pytest.mark.parametrize("resample", FORMS)
def test_draws_depend_on_the_seed_the_name_and_the_step_alone(resample):
    """Not on the global generator, the other layers, the gradients, or how the step was reached."""
    seen = []
    for noise, targets in ((0, ["2"]), (1, ["0", "2", "4"])):
        torch.manual_seed(noise)
        module, adapter = resampled(resample=resample, target_modules=targets)
        optimizer = torch.optim.SGD(trained(module), lr=0.1 + noise)
        attach(module, optimizer)
        for _ in range(5):
            torch.rand(noise)
            step(module, optimizer)
        seen.append((adapter.A.float(), adapter.B.float()))
    expected = drawn(at=5, resample=resample)
    for pair in seen:
        assert all(torch.equal(a, b) for a, b in zip(pair, expected, strict=True))


def test_draws_leave_the_global_generator_alone():
    before = torch.get_rng_state()
    drawn(at=7)
    assert torch.equal(torch.get_rng_state(), before)


def test_draws_of_other_steps_layers_and_seeds_are_others():
    pairs = [
        drawn(**key) for key in ({}, {"at": 1}, {"at": 2}, {"name": "3"}, {"name": "0.2"}, {"seed": 1}, {"seed": 10})
    ]
    tensors = [A for A, _ in pairs] + [B for _, B in pairs]
    for i, a in enumerate(tensors):
        for b in tensors[:i]:
            size = min(a.numel(), b.numel())
            a_, b_ = a.flatten()[:size], b.flatten()[:size]
            correlation = (a_ @ b_ / a_.norm() / b_.norm()).item()
            assert abs(correlation) < 4.9 / math.sqrt(size)  # one in a million each


@pytest.mark.parametrize("rank", [1, 4, 16])
def test_entries_are_normal_with_the_variance_one_over_r(rank):
    """Kolmogorov and Smirnov with 99.9 % confidence; mean and variance with 99.9 % each."""
    entries = torch.cat([f.flatten() for at in range(200) for f in drawn(at=at, rank=rank)]).double() * math.sqrt(rank)
    count = len(entries)
    cdf = torch.special.ndtr(entries.sort()[0])
    ranks = torch.arange(count + 1, dtype=torch.float64) / count
    distance = torch.maximum((ranks[1:] - cdf).max(), (cdf - ranks[:-1]).max()).item()
    assert distance < 1.95 / math.sqrt(count)
    z = normal_quantile((1 + CONFIDENCE) / 2)
    assert abs(entries.mean().item()) < z / math.sqrt(count)
    assert abs(entries.var().item() - 1) < z * math.sqrt(2 / count)


@pytest.mark.parametrize(("resample", "rank"), [("both", 1), ("A", 4), ("both", 16)])
def test_a_transposed_times_a_is_the_identity_on_average(resample, rank):
    """Of every entry, with 99.9 % confidence for all of them."""
    draws = [drawn(at=at, rank=rank, resample=resample) for at in range(3000)]
    for factor in (0, 1) if resample == "both" else (0,):
        stacked = torch.stack([pair[factor] for pair in draws]).double()
        products = torch.einsum("tri,trj->tij", stacked, stacked).flatten(1)
        z = (products.mean(0) - torch.eye(stacked.shape[-1]).flatten()) / products.std(0) * math.sqrt(len(draws))
        assert z.abs().max().item() < normal_quantile(1 - (1 - CONFIDENCE) / 2 / products.shape[1]) + 0.5
        assert 0.7 < z.square().mean().item() < 1.4


def test_each_matrix_of_a_stack_has_draws_of_its_own():
    A, B = drawn(shape=(3, M, N), stacked=True)
    assert A.shape == (3, 4, N)
    assert B.shape == (3, 4, M)
    assert not any(torch.equal(A[i], A[j]) or torch.equal(B[i], B[j]) for i in range(3) for j in range(i))


# ------------------------------------------------------------------------------------------------ moments


OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.01),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
    "Nesterov": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, nesterov=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.0),
    "amsgrad": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.0, amsgrad=True),
    "fused": lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
}


def before_a_draw(name, resample, steps=5, **options):
    """After some steps without a draw: the adapter, its optimizer, and copies of the factors and their state."""
    module, adapter = resampled(k=1000, resample=resample, **options)
    optimizer = OPTIMIZERS[name](trained(module))
    attach(module, optimizer)
    for _ in range(steps):
        step(module, optimizer)
    factors = {name: p.detach().clone() for name, p in adapter.named_parameters()}
    return adapter, optimizer, factors, {name: copied(optimizer, p) for name, p in adapter.trained.items()}


def copied(optimizer, p):
    return {
        key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in optimizer.state[p].items()
    }


@pytest.mark.parametrize("resample", FORMS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_transferred_moments_are_the_new_projection_of_the_smallest_gradient(name, resample):
    adapter, optimizer, old, states = before_a_draw(name, resample)
    draw_anew({adapter: adapter}, optimizer, "transfer")
    for factor, other in (("A", "B"), ("B", "A")):
        if factor not in states:
            assert getattr(adapter, factor) not in optimizer.state
            continue
        P, P_new = old[other], getattr(adapter, other).detach()
        after = optimizer.state[getattr(adapter, factor)]
        assert set(after) == set(states[factor])
        for key, moment in states[factor].items():
            if key in ("momentum_buffer", "exp_avg") and moment is not None:
                smallest = torch.linalg.lstsq(P, moment, driver="gelsd").solution
                torch.testing.assert_close(after[key], P_new @ smallest, rtol=1e-9, atol=1e-12)
            elif key in ("exp_avg_sq", "max_exp_avg_sq"):
                torch.testing.assert_close(after[key], moment.mean(0).expand_as(moment))
                assert not torch.equal(after[key], moment)
            else:
                assert key in ("step", "momentum_buffer")
                assert after[key] == moment
        assert after["step"] == 5 if "step" in after else True


@pytest.mark.parametrize("gradient", HOLDING)
def test_moments_of_a_stack_and_of_a_convolution_are_transferred_matrix_by_matrix(gradient):
    for case in ("stack of experts", "convolution in 2 dimensions"):
        module, inputs, options = build(case)
        options = {"rank": 2, "adapter_dtype": "float64", **options}
        inject(module, gradient=gradient, resample_every_n_steps=1000, **options)
        optimizer = torch.optim.Adam(trained(module), lr=0.01)
        attach(module, optimizer)
        loss_of(module(*inputs)).backward()
        optimizer.step()
        for adapter in adapters(module).values():
            A, before = adapter.A.detach().clone(), copied(optimizer, adapter.B)
            draw_anew({adapter: adapter}, optimizer, "transfer")
            after = optimizer.state[adapter.B]
            for i in range(A.shape[0]) if A.dim() == 3 else [...]:
                smallest = torch.linalg.lstsq(A[i], before["exp_avg"][i], driver="gelsd").solution
                torch.testing.assert_close(after["exp_avg"][i], adapter.A[i] @ smallest, rtol=1e-9, atol=1e-12)
                mean = before["exp_avg_sq"][i].mean(0).expand_as(after["exp_avg_sq"][i])
                torch.testing.assert_close(after["exp_avg_sq"][i], mean)


@pytest.mark.parametrize("name", ["momentum", "Adam"])
def test_drawing_the_same_projection_again_changes_no_first_moment(name):
    adapter, optimizer, _, states = before_a_draw(name, "A")
    A = adapter.A.detach().clone()
    adapter.steps = 0
    draw_anew({adapter: adapter}, optimizer, "transfer")
    assert torch.equal(adapter.A, A)
    key = "exp_avg" if name == "Adam" else "momentum_buffer"
    torch.testing.assert_close(optimizer.state[adapter.B][key], states["B"][key], rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("resample", FORMS)
@pytest.mark.parametrize("name", ["momentum", "amsgrad"])
def test_kept_moments_keep_every_bit_and_those_that_are_reset_are_gone(name, resample):
    adapter, optimizer, _, states = before_a_draw(name, resample)
    draw_anew({adapter: adapter}, optimizer, "keep")
    for factor, state in states.items():
        after = optimizer.state[getattr(adapter, factor)]
        assert set(after) == set(state)
        assert all(torch.equal(value, state[key]) for key, value in after.items())
    draw_anew({adapter: adapter}, optimizer, "reset")
    forget(adapter, optimizer)
    assert all(getattr(adapter, factor) not in optimizer.state for factor in states)


def test_a_draw_touches_the_moments_of_no_other_parameter():
    module, adapter = resampled(k=1000, target_modules=["0", "2"], modules_to_save=["4"])
    optimizer = torch.optim.Adam(trained(module))
    attach(module, optimizer)
    step(module, optimizer)
    others = {p: copied(optimizer, p) for p in optimizer.state if p is not adapter.A and p is not adapter.B}
    assert len(others) == 4
    draw_anew({adapter: adapter}, optimizer, "transfer")
    for p, state in others.items():
        assert all(torch.equal(value, state[key]) for key, value in optimizer.state[p].items())


def transfer(A, A_new, moment):
    """By the library."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros_like(moment))], lr=0.1)
    adapter = Adapter(A.clone(), torch.zeros_like(moment), key="0/2", holds=True, resample="A")
    adapter.fix("A")
    adapter.draw = lambda: adapter.A.copy_(A_new)
    optimizer.state[adapter.B]["momentum_buffer"] = moment.clone()
    draw_anew({adapter: adapter}, optimizer, "transfer")
    return optimizer.state[adapter.B]["momentum_buffer"]


@pytest.mark.parametrize("rank", [1, 4, 16])
def test_a_transfer_shrinks_moments_by_the_root_of_r_over_n_where_floras_lets_them_grow(rank):
    """The moment M = A G^T of one gradient, over 400 pairs of draws: mean squares with 99.9 % confidence.

    Ours keeps what is left of G in the span of the old rows, r/n of it. Flora's A_new A^T M has (n + r + 1)/r of it.
    """
    G = full_gradient()
    ours, floras = [], []
    for at in range(400):
        A, A_new = (drawn(at=2 * at + i, rank=rank)[0].double() for i in range(2))
        moment = A @ G.T
        ours.append((transfer(A, A_new, moment).square().sum() / G.square().sum()).item())
        floras.append(((A_new @ A.T @ moment).square().sum() / G.square().sum()).item())
    for seen, expected in ((ours, rank / N), (floras, (N + rank + 1) / rank)):
        check_mean_of_one(torch.tensor(seen), expected)
    assert statistics.mean(ours) < 1 < statistics.mean(floras)


def test_with_a_draw_at_each_step_floras_momentum_diverges_and_ours_does_not():
    """n/r = 6: each draw multiplies Flora's by about 2.4, of which the decay of 0.9 leaves more than 1."""
    G = full_gradient()
    A = drawn(at=0)[0].double()
    ours = floras = torch.zeros(4, M, dtype=torch.float64)
    largest = 0.0
    for at in range(1, 101):
        ours, floras = 0.9 * ours + A @ G.T, 0.9 * floras + A @ G.T
        largest = max(largest, (ours.norm() / (A @ G.T).norm()).item())
        A_new = drawn(at=at)[0].double()
        ours, floras, A = transfer(A, A_new, ours), A_new @ A.T @ floras, A_new
    assert largest < 3
    assert floras.norm() > 1e20 * G.norm()


@pytest.mark.parametrize("rank", [4, 16])
def test_momentum_at_a_draw_for_each_step_keeps_r_over_n_of_what_it_was(rank):
    """So on average the steps are 1/(1 - beta r/n) times the gradient, where full training has 1/(1 - beta)."""

    def optimizer(parameters, lr):
        return torch.optim.SGD(parameters, lr=lr, momentum=0.9)

    seen = updates(1240, resample="A", rank=rank, optimizer=optimizer)[40:]
    G = full_gradient().flatten()
    # steps are not independent: means over 20 of them nearly are
    check_mean_of_one((seen @ G / (G @ G)).view(-1, 20).mean(1), 1 / (1 - 0.9 * rank / N))


@pytest.mark.parametrize(("name", "moments", "resample"), pairs(OPTIMIZERS, ["transfer", "keep", "reset"], FORMS))
def test_every_optimizer_trains_with_draws(name, moments, resample):
    module, _ = resampled(k=2, resample=resample, rank=8, resample_moments=moments)
    optimizer = OPTIMIZERS[name](trained(module))
    optimizer.param_groups[0]["lr"] = 0.02 if name in ("Adam", "AdamW", "amsgrad", "fused") else 0.5
    attach(module, optimizer)
    start = loss(module).item()
    for _ in range(40):
        step(module, optimizer)
    assert loss(module).item() < start - 0.02


@pytest.mark.parametrize(
    "rank",
    [2, 4, 5],
)
def test_transferred_moments_stay_bounded_up_to_the_rank_of_the_whole_side(rank):
    """The factor of the smaller side is then square and now and then nearly singular.

    What it has projected is not quite in its range: it has been trained since. W stays where it is, so that the
    gradient is the same throughout.
    """
    plain, (x, y) = network().float(), data()
    with torch.no_grad():
        x = plain[:4](x.float())
    module = nn.Sequential(plain[4])
    inject(module, rank=rank, gradient="merged", resample_every_n_steps=5)
    (adapter,) = adapters(module).values()
    optimizer = torch.optim.SGD(trained(module), lr=0.05, momentum=0.9)
    attach(module, optimizer)
    W0, norms = weight_of(module, 0).detach().clone(), []
    for _ in range(600):
        optimizer.zero_grad()
        F.cross_entropy(module(x), y).backward()
        optimizer.step()
        norms += [max(optimizer.state[p]["momentum_buffer"].norm().item() for p in adapter.parameters())]
        with torch.no_grad():
            weight_of(module, 0).copy_(W0)
    assert max(norms) < 5 * statistics.median(norms)


class Own(torch.optim.Optimizer):
    """A user's, with a state of its own kind."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["velocity"] = p.grad.clone()
                p.data.add_(p.grad, alpha=-group["lr"])


class OwnAdam(torch.optim.Adam):
    """A user's, with the state of a known one."""


UNKNOWN = [torch.optim.Adagrad, torch.optim.RMSprop, torch.optim.NAdam, torch.optim.Adadelta, Own]


@pytest.mark.parametrize("moments", ["transfer", "keep"])
@pytest.mark.parametrize("optimizer", UNKNOWN, ids=lambda kind: kind.__name__)
def test_an_optimizer_whose_state_is_not_known_is_refused_unless_it_is_reset(optimizer, moments):
    module, _ = resampled(resample_moments=moments)
    with pytest.raises(LoRAError, match=f"'{moments}'.*{optimizer.__name__}.*'reset'"):
        attach(module, optimizer(trained(module), lr=0.01))


@pytest.mark.parametrize("optimizer", UNKNOWN, ids=lambda kind: kind.__name__)
def test_the_state_of_any_optimizer_can_be_reset(optimizer):
    module, adapter = resampled(k=2, resample_moments="reset")
    optimizer = optimizer(trained(module), lr=0.01)
    attach(module, optimizer)
    new = type(optimizer)([adapter.A], lr=0.01)
    is_new = []

    def compare(*_) -> None:
        is_new.append(digest(optimizer.state.get(adapter.A, {})) == digest(new.state.get(adapter.A, {})))

    optimizer.register_step_pre_hook(compare)
    for _ in range(5):
        step(module, optimizer)
        assert optimizer.state[adapter.A]
    assert is_new == [True, False, True, False, True]


def test_a_subclass_of_a_known_optimizer_is_known():
    module, _ = resampled()
    attach(module, OwnAdam(trained(module))).remove()


# ------------------------------------------------------------------------------------------------ real steps


class Counted:
    """The numbers of steps after which an adapter was drawn."""

    def __init__(self, adapter):
        self.at, draw = [], adapter.draw

        def counted():
            self.at.append(adapter.drawn_at)
            draw()

        adapter.draw = counted


@pytest.mark.parametrize(("k", "expected"), [(1, [1, 2, 3, 4, 5, 6, 7]), (3, [3, 6]), (7, [7]), (8, [])])
def test_draws_are_made_after_every_k_steps(k, expected):
    module, adapter = resampled(k=k)
    optimizer = torch.optim.SGD(trained(module), lr=0.1)
    attach(module, optimizer)
    counted = Counted(adapter)
    for _ in range(7):
        step(module, optimizer)
    assert counted.at == expected
    assert adapter.steps == 7


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("resample", FORMS)
def test_a_step_that_the_scaler_skips_is_none_whether_the_optimizer_or_the_scaler_skips_it(resample, fused):
    module, adapter = resampled(k=2, resample=resample)
    optimizer = torch.optim.Adam(trained(module), lr=0.01, fused=fused)
    attach(module, optimizer)
    counted, scaler, steps = Counted(adapter), torch.amp.GradScaler("cpu", init_scale=2.0), []
    for overflows in (False, True, True, False, True, False, False):
        before, A = weight_of(module).clone(), adapter.A.detach().clone()
        optimizer.zero_grad()
        scaler.scale(loss(module) * (math.inf if overflows else 1)).backward()
        scaler.step(optimizer)
        scaler.update()
        steps.append(adapter.steps)
        assert torch.equal(weight_of(module), before) == overflows
        if overflows:
            assert torch.equal(adapter.A, A)
    assert steps == [1, 1, 1, 2, 2, 3, 4]
    assert counted.at == [2, 4]
    assert optimizer.state[adapter.B]["step"] == 4


def test_each_optimizer_counts_the_steps_of_its_own_adapters():
    module, _ = resampled(k=2, target_modules=["0", "2"])
    first, second = adapters(module).values()
    optimizers = [torch.optim.SGD(adapter.parameters(), lr=0.1) for adapter in (first, second)]
    for optimizer in optimizers:
        attach(module, optimizer)
    for optimizer, times in zip(optimizers, (2, 5), strict=True):
        for _ in range(times):
            step(module, optimizer)
    assert (first.steps, first.drawn_at, second.steps, second.drawn_at) == (2, 2, 5, 4)


def test_attaching_twice_is_refused_until_the_first_is_removed():
    module, adapter = resampled(k=1000, resample="A")
    optimizer, W0 = torch.optim.SGD(trained(module), lr=0.1), weight_of(module).clone()
    handle = attach(module, optimizer)
    with pytest.raises(LoRAError, match="attached to this SGD already"):
        attach(module, optimizer)
    handle.remove()
    attach(module, optimizer)
    step(module, optimizer)
    assert adapter.steps == 1
    torch.testing.assert_close(weight_of(module), W0 + adapter.delta_weight(torch.float64))


def test_a_second_optimizer_of_the_same_factors_is_refused_by_name():
    module, _ = resampled()
    first = torch.optim.SGD(trained(module), lr=0.1)  # which nothing else keeps
    attach(module, first)
    with pytest.raises(LoRAError, match="A and B of '2' are in two optimizers"):
        attach(module, torch.optim.SGD(trained(module), lr=0.1))


def test_factors_in_two_optimizers_are_refused_by_name():
    module, adapter = resampled()
    with pytest.raises(LoRAError, match="A and B of '2' are in two optimizers"):
        attach(module, torch.optim.SGD([adapter.A], lr=0.1))


def test_an_optimizer_of_b_alone_is_enough_where_only_a_is_drawn():
    module, adapter = resampled(resample="A")
    optimizer = torch.optim.SGD([adapter.B], lr=0.1)
    attach(module, optimizer)
    step(module, optimizer)
    assert adapter.drawn_at == 1


@pytest.mark.parametrize("resample", FORMS)
def test_lora_plus_moves_b_further_between_draws_and_is_refused_where_a_is_not_trained(resample):
    if resample == "A":
        with pytest.raises(ValueError, match=r"lr_ratio=16.*resample='A'"):
            resampled(resample="A", lr_ratio=16)
        return
    module, adapter = resampled(lr_ratio=16)
    optimizer = torch.optim.SGD(trained(module), lr=SMALL)
    attach(module, optimizer)
    G, A, B = full_gradient(), adapter.A.detach().clone(), adapter.B.detach().clone()
    step(module, optimizer)
    moved = (network()[2].weight - weight_of(module)).detach() / SMALL
    torch.testing.assert_close(moved, B.T @ B @ G + 16 * G @ A.T @ A, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------ copies


def run(module, optimizer, count):
    attach(module, optimizer)
    for _ in range(count):
        step(module, optimizer)
    return weight_of(module).detach().clone()


@pytest.mark.parametrize("resample", FORMS)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_a_copy_draws_what_the_original_would_have_drawn(copied, resample):
    module, _ = resampled(k=2, resample=resample)
    run(module, torch.optim.SGD(trained(module), lr=0.1), 3)
    other = copied(module)
    assert adapters(other)["2"].trained.keys() == adapters(module)["2"].trained.keys()
    assert adapters(other)["2"].steps == 3
    weights = [run(m, torch.optim.SGD(trained(m), lr=0.1), 4) for m in (copy.deepcopy(module), other)]
    assert torch.equal(*weights)
    assert adapters(other)["2"].drawn_at == 6
    merge(other)
    assert torch.equal(other[2].weight, weights[1])


@pytest.mark.parametrize("resample", FORMS)
def test_plain_weights_can_be_loaded_between_draws(resample):
    """A weight that holds its increments is the whole weight: projections and moments stay what they are."""
    for case in ("linear", "embedding"):
        module, _, options = build(case)
        plain = {key: torch.randn_like(value) for key, value in module.state_dict().items()}
        inject(module, rank=2, gradient="merged", resample_every_n_steps=3, resample=resample, **options)
        before = {name: copy.deepcopy(adapter.state_dict()) for name, adapter in adapters(module).items()}
        module.load_state_dict(plain, strict=True)
        for place in places(module):
            assert torch.equal(place.weight, plain[place.key])
            for key, value in place.adapter.state_dict().items():
                assert torch.equal(value, before[place.name][key]), (case, place.name, key)


# ------------------------------------------------------------------------------------------------ padding


@pytest.mark.parametrize("resample", FORMS)
@pytest.mark.parametrize("gradient", HOLDING)
def test_the_row_of_a_padding_token_stays_as_it_is_and_gives_no_gradient(gradient, resample):
    """As in full training. The gradients are those of autograd, which masks that row."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Embedding(12, 8, padding_idx=3), nn.Linear(8, 4)).double()
    plain = copy.deepcopy(module)
    tokens = torch.randint(12, (6, 5), generator=torch.Generator().manual_seed(1))
    assert (tokens == 3).any()
    inject(
        module,
        rank=2,
        gradient=gradient,
        target_modules=["0"],
        adapter_dtype="float64",
        resample_every_n_steps=1,
        resample=resample,
    )
    (adapter,) = adapters(module).values()
    A, B = adapter.A.detach().clone(), adapter.B.detach().clone()
    optimizer = torch.optim.SGD(trained(module), lr=SMALL)
    attach(module, optimizer)
    for m in (module, plain):
        loss_of(m(tokens)).backward()
    G = plain[0].weight.grad  # (vocabulary, width): the seed's own layout
    torch.testing.assert_close(adapter.B.grad, A @ G)
    optimizer.step()
    moved = (plain[0].weight - weight_of(module, 0)).detach() / SMALL
    assert not moved[3].any()
    torch.testing.assert_close(moved, G @ B.T @ B + A.T @ A @ G, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------ what is kept


def saved_for_backward(module, *inputs):
    """The bytes of each storage that the graph keeps and that is no parameter."""
    known = {tensor.untyped_storage().data_ptr() for tensor in module.parameters()}
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = module(*inputs)
    assert output.requires_grad
    return sorted(storage.nbytes() for address, storage in kept.items() if address not in known)


def test_the_one_sided_form_keeps_z_of_a_linear_layer_and_not_x():
    """Three layers with nothing between them that keeps a thing of its own: X is (b, n), Z (b, r)."""
    b, n, r = 50, 64, 4
    kept = {}
    for name, options in {
        "fixed": {},
        "both": {"resample_every_n_steps": 1},
        "A": {"resample_every_n_steps": 1, "resample": "A"},
    }.items():
        module = nn.Sequential(*(nn.Linear(n, n) for _ in range(3)))
        inject(module, rank=r, gradient="merged", **options)
        kept[name] = saved_for_backward(module, torch.randn(b, n))
    assert kept["fixed"] == kept["both"] == 3 * [4 * b * n]
    assert kept["A"] == 3 * [4 * b * r]


@pytest.mark.parametrize("groups", [1, 4])
def test_of_a_convolution_x_is_kept_as_its_own_autograd_does_and_nothing_else(groups):
    kept = {}
    for name, options in {"fixed": {}, "A": {"resample_every_n_steps": 1, "resample": "A"}}.items():
        module = nn.Sequential(*(nn.Conv2d(8, 8, 3, padding=1, groups=groups) for _ in range(3)))
        inject(module, rank=4, target_modules=["0", "1", "2"], gradient="merged", **options)
        kept[name] = saved_for_backward(module, torch.randn(3, 8, 10, 10))
    assert kept["A"] == kept["fixed"] == 3 * [4 * 3 * 8 * 10**2]


@pytest.mark.skipif(not RequirementCache("transformers>=5"), reason="transformers 4 keeps other tensors than 5")
def test_of_a_transformer_the_one_sided_form_keeps_two_thirds_of_what_full_training_does():
    """Llama-like, d = 768, 6 layers, 4 x 128 tokens. Fixed projections in merged mode: 172.2 MiB."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=6,
        num_attention_heads=12,
        num_key_value_heads=12,
        vocab_size=2048,
        max_position_embeddings=256,
    )
    model = LlamaForCausalLM(config)
    tokens = torch.randint(2048, (4, 128), generator=torch.Generator().manual_seed(0))

    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self):
            return self.model(input_ids=tokens, labels=tokens, use_cache=False).loss

    module = Loss()
    full = sum(saved_for_backward(module)) / 2**20
    inject(model, rank=8, gradient="merged", resample_every_n_steps=1, resample="A")
    assert full == pytest.approx(194.7, abs=0.5)
    assert sum(saved_for_backward(module)) / 2**20 <= 131


# ------------------------------------------------------------------------------------------------ low precision


def bfloat16_drift(resample, lr, count=300):
    """The movement of a bfloat16 weight over its expectation, and over that by plain rounding; its standard error."""
    torch.manual_seed(0)
    n, m, r = 32, 32, 4
    module = nn.Sequential(nn.Linear(n, m, bias=False)).to(torch.bfloat16)
    W0 = torch.randn(m, n).clamp(-2, 2).add(torch.where(torch.rand(m, n) < 0.5, -3.0, 3.0)).to(torch.bfloat16)
    module[0].weight.data.copy_(W0)
    G = torch.randn(m, n)
    inject(module, rank=r, gradient="merged", resample_every_n_steps=1, resample=resample)
    (adapter,) = adapters(module).values()
    optimizer = torch.optim.SGD(trained(module), lr=lr)
    attach(module, optimizer)
    nearest, exact = W0.clone(), W0.double()
    for _ in range(count):
        A, B = adapter.A.detach().clone(), adapter.B.detach().clone()
        adapter.A.grad = B @ G if resample == "both" else None
        adapter.B.grad = A @ G.T
        update = lr * (B.T @ (B @ G) + (G @ A.T) @ A)
        nearest = (nearest.float() - update).to(torch.bfloat16)
        exact -= update.double()
        optimizer.step()
    return [(w.double() - W0.double()).flatten() for w in (weight_of(module, 0).detach(), nearest, exact)]


@pytest.mark.parametrize("resample", FORMS)
def test_updates_of_a_bfloat16_weight_are_unbiased_where_plain_rounding_loses_them(resample):
    """Each is far below half an ulp, which is 2^-7 for these weights.

    The regression of what happened on what should have has the slope 1, with 99.9 % confidence; that of plain rounding
    has less than half of it.
    """
    ours, nearest, exact = bfloat16_drift(resample, lr=1e-4)
    slope = (ours @ exact / (exact @ exact)).item()
    error = ((ours - slope * exact).std() / exact.norm()).item()
    assert abs(slope - 1) < normal_quantile((1 + CONFIDENCE) / 2) * error
    assert error < 0.2
    assert (nearest @ exact / (exact @ exact)).item() < 0.5


def test_one_sided_factors_in_bfloat16_lose_no_updates():
    """A factor that is drawn and trained would: beside entries of 1/sqrt(r) a small step is less than half an ulp."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(32, 32, bias=False))
    W0, G, lr = module[0].weight.detach().clone(), torch.randn(32, 32), 1e-4
    inject(module, rank=4, gradient="merged", resample_every_n_steps=1, resample="A", adapter_dtype="bfloat16")
    (adapter,) = adapters(module).values()
    optimizer = torch.optim.SGD(trained(module), lr=lr)
    attach(module, optimizer)
    expected = torch.zeros_like(G)
    for _ in range(200):
        A, B = adapter.A.detach().float(), adapter.B.detach().float()
        adapter.B.grad = (A @ G.T).bfloat16()
        expected += lr * (B.T @ (B @ G) + (G @ A.T) @ A)
        optimizer.step()
    moved = W0 - weight_of(module, 0).detach()
    assert ((moved * expected).sum() / expected.square().sum()).item() == pytest.approx(1, abs=0.1)


# ------------------------------------------------------------------------------------------------ bad input


def test_weight_decay_on_random_factors_is_warned_of_and_on_b_alone_is_not():
    """Decay shrinks A and B, so the weight moves by -lr (2 decay) s B^T A, which is noise."""
    module, adapter = resampled()
    optimizer = torch.optim.AdamW(trained(module), lr=0.1, weight_decay=0.1)
    with pytest.warns(UserWarning, match="weight_decay=0.1.*'both'"):
        attach(module, optimizer)
    before, A, B = weight_of(module).clone(), adapter.A.detach().clone(), adapter.B.detach().clone()
    for factor in adapter.parameters():
        factor.grad = torch.zeros_like(factor)
    optimizer.step()
    torch.testing.assert_close(weight_of(module), before + ((1 - 0.01) ** 2 - 1) * B.T @ A)

    module, _ = resampled(resample="A")
    optimizer = torch.optim.AdamW(trained(module), lr=0.1, weight_decay=0.1)
    attach(module, optimizer)
