"""What is folded, followed, bounded and carried over is computed in full precision, and the user's settings stay."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_lora import adapters, attach, inject, merge, merged_state_dict
from lightning_lora.weights.full_precision import full_precision

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")


def settings():
    return torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision


@pytest.fixture(autouse=True)
def restored():
    yield
    if hasattr(torch.backends, "fp32_precision"):
        torch.backends.cuda.matmul.fp32_precision = "none"
        torch.backends.mkldnn.matmul.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")


class Products(TorchDispatchMode):
    """The precision that each product of float32 matrices is computed in."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__.rstrip("_") in PRODUCTS and args[0].dtype == torch.float32:
            self.seen.append(torch.get_float32_matmul_precision())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_the_settings_are_put_back(precision):
    torch.set_float32_matmul_precision(precision)
    with full_precision(), full_precision():
        assert torch.get_float32_matmul_precision() == "highest"
    assert torch.get_float32_matmul_precision() == precision
    with pytest.raises(KeyError), full_precision():
        raise KeyError
    assert torch.get_float32_matmul_precision() == precision


@pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="torch has one setting for all backends")
def test_the_settings_of_one_backend_are_put_back():
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    before = settings()
    with full_precision():
        assert settings() == ("ieee", "ieee")
    assert settings() == before


@pytest.mark.parametrize("options", [{}, {"decomposition": "dora"}, {"resample_every_n_steps": 1}, {"init": "pissa"}])
@pytest.mark.parametrize("gradient", ["factored", "merged", "projected"])
def test_steps_draws_folds_and_bounds_are_in_full_precision(gradient, options):
    if "resample_every_n_steps" in options and gradient == "factored":
        options = {"init": "symmetric"}
    module = nn.Sequential(nn.Linear(8, 8))
    torch.set_float32_matmul_precision("medium")
    with Products() as products:
        inject(module, rank=2, gradient=gradient, **options)
        optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
        handle = attach(module, optimizer)
    module(torch.ones(3, 8)).square().sum().backward()
    with products:
        optimizer.step()
        optimizer.step()
        (adapter,) = adapters(module).values()
        merged = adapter.folded_into(module[0]._parameters["weight"])
        if options.get("decomposition") != "dora" or adapter.holds:  # else there is no gain to take out
            adapter.folded_out_of(merged)
        merged_state_dict(module)
        handle.remove()
        merge(module)
    assert products.seen
    assert set(products.seen) == {"highest"}
    assert torch.get_float32_matmul_precision() == "medium"


@pytest.mark.parametrize("gradient", ["merged", "projected"])
def test_a_weight_holds_its_increment_to_full_precision_whatever_the_models_products(gradient):
    """Where the CPU has units for bfloat16, those of "medium" are off by 1e-2."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(256, 256))
    W0 = module[0].weight.detach().clone()
    inject(module, rank=64, gradient=gradient, init="symmetric")
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=1.0)
    attach(module, optimizer)
    torch.set_float32_matmul_precision("medium")
    (adapter,) = adapters(module).values()
    for _ in range(3):
        for p in adapter.trained.values():
            p.grad = torch.randn_like(p)
        optimizer.step()
    expected = W0.double() + adapter.delta_weight(torch.float64)
    assert (module[0]._parameters["weight"] - expected).abs().max() < 1e-4


class NormalizedRows(nn.Linear):
    """Reads its weight, so that in factored mode W is formed."""

    def forward(self, x):
        return x + (self.weight / self.weight.norm(dim=1, keepdim=True)).sum(0)


@pytest.mark.parametrize("decomposition", ["product", "additive", "dora"])
@pytest.mark.parametrize("precision", ["high", "medium"])
def test_a_weight_formed_where_it_is_read_is_the_merged_one_whatever_the_models_products(decomposition, precision):
    torch.manual_seed(0)
    module = nn.Sequential(NormalizedRows(64, 64))
    inject(module, rank=16, decomposition=decomposition, target_modules=["0"])
    (adapter,) = adapters(module).values()
    for p in adapter.trained.values():
        nn.init.uniform_(p, 0.5, 1.5)
    x = torch.randn(3, 64)
    torch.set_float32_matmul_precision(precision)
    with Products() as products:
        y = module(x)
        y.square().sum().backward()  # forms W again
        W = module[0].weight * 1
    assert "highest" in products.seen
    assert torch.get_float32_matmul_precision() == precision
    merge(module)
    torch.testing.assert_close(W.detach(), module[0].weight, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(y.detach(), module(x).detach(), rtol=1e-5, atol=1e-5)
