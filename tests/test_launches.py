"""How many operations an adapted layer launches beside the frozen layer's. On an accelerator each has a price."""

import pytest
import torch
from torch import nn

from benchmarks.launches import PRECISIONS, Launches, count
from lightning_lora import attach, inject

CASES = [(precision, bias, alpha) for precision in PRECISIONS for bias in (True, False) for alpha in (8, 16)]
MOST = {"factored": (2, 4), "merged": (0, 4), "projected": (0, 3)}
"""Beside the frozen layer's, in the forward and in the backward."""
CASTS = {"factored": (1, 1), "merged": (0, 2), "projected": (0, 2)}
"""Besides these, of A and B, and back of their gradients, where the product has another dtype than they have."""


def casts(method, precision):
    """Under autocast the backward casts once more what the forward cast, so that no cast need be kept: W0, or X."""
    forward, backward = (0, 0) if precision == "fp32" else CASTS[method]
    return forward, backward + (precision == "bf16-mixed" and method in ("factored", "merged"))


@pytest.mark.parametrize("method", MOST)
@pytest.mark.parametrize(("precision", "bias", "alpha"), CASES)
def test_a_linear_launches_few_operations_beside_the_frozen_layers(method, precision, bias, alpha):
    base, ours = count("base", precision, bias, alpha), count(method, precision, bias, alpha)
    for own, frozen, most, extra in zip(ours, base, MOST[method], casts(method, precision), strict=True):
        assert len(own) <= len(frozen) + most + extra


@pytest.mark.parametrize(("precision", "bias", "alpha"), CASES)
def test_it_launches_fewer_than_pefts(precision, bias, alpha):
    pytest.importorskip("peft")
    theirs, ours = count("peft", precision, bias, alpha), count("factored", precision, bias, alpha)
    assert all(len(own) < len(other) for own, other in zip(ours, theirs, strict=True))


def test_views_allocations_and_questions_are_no_launches_and_reading_a_number_is_one():
    x = torch.ones(4, 4)
    with Launches() as launches:
        x.view(2, 8).T.unsqueeze(0).detach()
        torch.empty_like(x)
        torch.promote_types(torch.float16, torch.float32)
        torch._foreach_copy_([torch.empty(2)], [x[0, :2]])
        x.mul_(2).add(1) @ x
        x[0, 0].item()
    assert launches.names == ["_foreach_copy_", "mul_", "add", "mm", "_local_scalar_dense"]


@pytest.mark.parametrize("decomposition", ["product", "additive"])
def test_the_steps_of_adapters_of_one_shape_are_computed_together(decomposition):
    """Each further layer launches one product, or the additions of its increment, and nothing else."""

    def launched(layers):
        module = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(layers)))
        inject(module, rank=2, gradient="merged", decomposition=decomposition)
        trained = [p for p in module.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=0.1, foreach=True)
        attach(module, optimizer)
        for p in trained:
            p.grad = torch.ones_like(p)
        with Launches() as launches:
            optimizer.step()
        return len(launches.names)

    of_each = {"product": 1, "additive": 3}[decomposition]
    assert launched(30) - launched(10) == 20 * of_each
    assert launched(10) <= 10 * of_each + 10
