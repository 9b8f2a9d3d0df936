"""Whoever reads a weight gets W: layers with forwards and classes of their own, and other readers, in every mode."""

from __future__ import annotations

import copy
import pickle
from abc import ABC
from typing import ClassVar, Generic, TypeVar

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_lora import adapters, attach, disabled, inject, merge, merged, merged_state_dict
from lightning_lora.errors import LoRAError
from lightning_lora.hosts.view import hide_adapters, present_merged, reading_plain, show_adapters
from lightning_lora.injection.inject import places

GRADIENTS = ["factored", "merged", "projected"]
T = TypeVar("T")


class WeightStandardised(nn.Conv2d):
    def forward(self, x):
        variance, mean = torch.var_mean(self.weight, dim=[1, 2, 3], keepdim=True, unbiased=False)
        return F.conv2d(x, (self.weight - mean) / torch.sqrt(variance + 1e-5), self.bias, self.stride, self.padding)


class Masked(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight * torch.tril(torch.ones_like(self.weight)), self.bias)


class ScaledEmbedding(nn.Embedding):
    def forward(self, x):
        return super().forward(x) * 4.0


class EqualisedRate(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight * 0.1, self.bias)


class Normalised(nn.Linear):
    def forward(self, x):
        return F.linear(F.normalize(x, dim=-1), F.normalize(self.weight, dim=-1))


class FakeQuantised(nn.Linear):
    def forward(self, x):
        scale = self.weight.abs().mean().detach()
        return F.linear(x, self.weight + ((self.weight / scale).round() * scale - self.weight).detach(), self.bias)


class PreNorm(nn.Linear):
    def forward(self, x):
        return super().forward(F.layer_norm(x, x.shape[-1:]))


class CausalPadding(nn.Conv1d):
    def forward(self, x):
        return super().forward(F.pad(x, (2, 0)))


class Same(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(F.pad(x, (1, 1, 1, 1)), weight, bias)


class Tuple(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight), self.bias


class Positions(nn.Embedding):
    def forward(self, batch, offset=1):
        return super().forward(torch.arange(batch.shape[0]) % 4 + offset)


class Products(nn.Linear):
    def forward(self, x):
        products = x @ self.weight.t() + torch.matmul(x, self.weight.T) + torch.addmm(self.bias, x, self.weight.mT)
        return products + torch.addmm(self.bias, x, self.weight.mT, beta=2) + self.bias.addmm(x, self.weight.T, alpha=2)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight.t()

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        return dy @ weight, dy.t() @ x


class CustomFunction(nn.Linear):
    def forward(self, x):
        return _Product.apply(x, self.weight)


class Chunked(nn.Linear):
    def forward(self, x):
        return sum(F.linear(x, part) for part in self.weight.chunk(2)) + self.weight.square().sum()


class AbstractFirst(ABC, nn.LSTM):
    pass


class GenericFirst(Generic[T], nn.Linear):
    pass


class Slots(nn.Linear):
    __slots__ = ("more",)


class Registered(nn.Linear):
    heard: ClassVar[list[type]] = []

    def __init_subclass__(cls, wanted, **kwargs):
        Registered.heard.append(cls)


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 8, 8))

    def forward(self, x):
        return sum(F.linear(x, self.w[e]) for e in range(3)) + x @ self.w[torch.tensor(1)] + x @ next(iter(self.w))


X = torch.randn(6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
INDICES = torch.tensor([0, 3, 4, 8, 3, 1])
LAYERS = {
    "weight standardisation": (lambda: WeightStandardised(1, 4, 3), X.view(1, 1, 6, 8)),
    "mask": (lambda: Masked(8, 8), X),
    "scaled embedding": (lambda: ScaledEmbedding(9, 4, padding_idx=3), INDICES),
    "equalised rate": (lambda: EqualisedRate(8, 5), X),
    "normalised weight": (lambda: Normalised(8, 5), X),
    "fake quantisation": (lambda: FakeQuantised(8, 5), X),
    "pre-norm": (lambda: PreNorm(8, 5), X),
    "causal padding": (lambda: CausalPadding(6, 4, 3), X.view(1, 6, 8)),
    "same padding": (lambda: Same(1, 4, 3), X.view(1, 1, 6, 8)),
    "tuple output": (lambda: Tuple(8, 5), X),
    "other signature": (lambda: Positions(9, 4), X),
    "products": (lambda: Products(8, 8), X),
    "custom function": (lambda: CustomFunction(8, 5), X),
    "chunks and a penalty": (lambda: Chunked(8, 6), X),
    "ABC first": (lambda: AbstractFirst(8, 5), X),
    "Generic first": (lambda: GenericFirst(8, 5), X),
    "slots": (lambda: Slots(8, 5), X),
    "init_subclass": (lambda: Registered(8, 5), X),
    "experts": (Experts, X),
    "attention": (lambda: Attention(), X),
    "linear": (lambda: nn.Linear(8, 5), X),
    "convolution in groups": (lambda: nn.Conv1d(6, 4, 3, groups=2), X.view(1, 6, 8)),
}


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.MultiheadAttention(8, 2)

    def forward(self, x):
        return self.inner(x, x, x)


def first(output):
    return output[0] if isinstance(output, tuple) else output


def adapted(name, gradient, **options):
    """The layer with an increment that is not zero, its input, and its output."""
    torch.manual_seed(0)
    make, x = LAYERS[name]
    module = nn.Sequential(make().double())
    which = {"target_parameters": ["0.w"], "target_modules": None} if name == "experts" else {"target_modules": None}
    if name != "experts":
        which["target_modules"] = ["0.inner" if name == "attention" else "0"]
    inject(module, rank=2, gradient=gradient, adapter_dtype="float64", **which, **options)
    for place in places(module):
        adapter, held = place.adapter, place.adapter.held()
        with torch.no_grad():
            for factor in (adapter.A, adapter.B):
                factor.copy_(torch.randn_like(factor))
            if adapter.padding_idx is not None:
                adapter.A[..., adapter.padding_idx] = 0
            if gradient != "factored":
                adapter.follow(place.weight, *held)
                adapter.set_followed()
    return module, x


def by_autograd(name):
    """The gradients of A and B, by key of the weight, through the formula on a plain module."""
    module, x = adapted(name, "factored")
    found = list(places(module))
    leaves = {p.key: [f.detach().clone().requires_grad_() for f in (p.adapter.A, p.adapter.B)] for p in found}
    weights = {p.key: p.weight.detach() + p.adapter.delta(*leaves[p.key], torch.float64) for p in found}
    merge(module)
    output = first(torch.func.functional_call(module, weights, (x,)))
    output.sin().sum().backward()
    return output.detach(), {key: [leaf.grad for leaf in both] for key, both in leaves.items()}


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("name", LAYERS)
def test_output_and_gradients_are_those_of_the_merged_weight(name, gradient):
    expected, gradients = by_autograd(name)
    module, x = adapted(name, gradient)
    output = first(module(x))
    output.sin().sum().backward()
    torch.testing.assert_close(output.detach(), expected, rtol=1e-10, atol=1e-10)
    for place in places(module):
        for factor, value in zip((place.adapter.A, place.adapter.B), gradients[place.key], strict=True):
            torch.testing.assert_close(factor.grad, value, rtol=1e-10, atol=1e-10)
    merge(module)
    torch.testing.assert_close(first(module(x)).detach(), expected, rtol=1e-10, atol=1e-10)
    assert type(module[0]) is type(LAYERS[name][0]())


@pytest.mark.parametrize("name", LAYERS)
def test_factored_leaves_every_bit_of_the_pretrained_weight(name):
    module, x = adapted(name, "factored")
    before = {place.key: place.weight.detach().clone() for place in places(module)}
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], 0.1)
    for _ in range(3):
        first(module(x)).sin().sum().backward()
        optimizer.step()
    assert all(torch.equal(place.weight, before[place.key]) for place in places(module))


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("name", LAYERS)
def test_views_and_contexts_leave_every_bit(name, gradient):
    module, x = adapted(name, gradient)
    with torch.no_grad():
        output = first(module(x))
    before = {key: value.clone() for key, value in module.state_dict().items()}
    plain = merged_state_dict(module)
    with merged(module):
        assert list(module.state_dict()) == list(plain)
        torch.testing.assert_close(first(module(x)).detach(), output, rtol=1e-10, atol=1e-10)
    with disabled(module):
        module(x)
    present_merged(module, True)
    hide_adapters(module)
    assert not any("lora" in key for key, _ in module.named_parameters())
    copies = pickle.loads(pickle.dumps(module)) if not isinstance(module[0], Registered) else copy.deepcopy(module)
    assert len(adapters(copies)) == len(adapters(module))
    state = module.state_dict()
    assert list(state) == list(plain)
    module.load_state_dict(state)
    show_adapters(module)
    assert list(module.state_dict()) == list(plain)
    module.load_state_dict(state)
    present_merged(module, False)
    after = module.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_a_class_that_registers_its_subclasses_hears_of_none():
    adapted("init_subclass", "factored")
    assert Registered.heard == []
    with pytest.raises(TypeError):
        type("Without", (Registered,), {})


@pytest.mark.parametrize(
    "write",
    [
        lambda w: w.data.clamp_(-1, 1),
        lambda w: w.copy_(torch.zeros(5, 8)),
        lambda w: w.mul_(2),
        lambda w: nn.init.xavier_uniform_(w),
        lambda w: w.__setitem__(0, 0.0),
        lambda w: setattr(w, "data", torch.zeros(5, 8)),
        lambda w: torch.add(w, 1, out=w),
    ],
)
def test_writing_through_what_was_read_is_refused(write):
    module, _ = adapted("linear", "factored")
    with pytest.raises(LoRAError, match=r"merged\(module\)"), torch.no_grad():
        write(module[0].weight)


def test_metadata_form_nothing_and_values_are_those_of_the_merged_weight():
    module, _ = adapted("linear", "factored")
    weight = module[0].weight
    assert (weight.shape, weight.dtype, len(weight), weight.requires_grad) == ((5, 8), torch.float64, 5, True)
    assert "LazyWeight" in repr(weight)
    folded = module[0].lora.folded_into(module[0]._parameters["weight"])
    for values in (weight.data, weight.detach(), weight):
        torch.testing.assert_close(values.clone().detach(), folded)
    with reading_plain(module):
        assert module[0].weight is module[0]._parameters["weight"]


def test_where_the_increment_is_zero_reading_gives_the_pretrained_bits():
    module = nn.Sequential(nn.LSTM(8, 5))
    before = module[0].weight_ih_l0.detach().clone()
    inject(module, rank=2, target_modules=["0"])
    assert torch.equal(module[0].weight_ih_l0.clone(), before)


def test_reentrant_and_other_checkpoints_give_the_same_gradients():
    module, x = adapted("mask", "factored")
    gradients = []
    for reentrant in (None, True, False):
        module.zero_grad()
        inputs = x.clone().requires_grad_()
        output = module(inputs) if reentrant is None else checkpoint(module, inputs, use_reentrant=reentrant)
        output.sin().sum().backward()
        gradients.append(module[0].lora.A.grad.clone())
    assert torch.equal(gradients[0], gradients[1])
    assert torch.equal(gradients[0], gradients[2])


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("name", ["linear", "convolution in groups", "scaled embedding", "normalised weight", "mask"])
def test_second_derivatives_are_those_of_the_formula(name, gradient):
    """That of a gradient penalty on the output's gradients by A and B, and by the input where it has one."""

    def penalty(gradient):
        module, x = adapted(name, gradient)
        x = x.clone().requires_grad_() if x.is_floating_point() else x
        factors = [f for adapter in adapters(module).values() for f in (adapter.A, adapter.B)]
        wanted = [*factors, x] if x.is_floating_point() else factors
        first_order = torch.autograd.grad(first(module(x)).sin().sum(), wanted, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first_order), factors)

    module, x = adapted(name, "factored")
    place = next(iter(places(module)))
    leaves = [f.detach().clone().requires_grad_() for f in (place.adapter.A, place.adapter.B)]
    x = x.clone().requires_grad_() if x.is_floating_point() else x
    weight = place.weight.detach() + place.adapter.delta(*leaves, torch.float64)
    merge(module)
    output = torch.func.functional_call(module, {place.key: weight}, (x,))
    wanted = [*leaves, x] if x.is_floating_point() else leaves
    first_order = torch.autograd.grad(output.sin().sum(), wanted, create_graph=True)
    expected = torch.autograd.grad(sum(g.square().sum() for g in first_order), leaves)
    torch.testing.assert_close(penalty(gradient), expected, rtol=1e-9, atol=1e-9)


def test_an_injection_that_fails_leaves_nothing(monkeypatch):
    module = nn.Sequential(nn.Linear(8, 8), nn.LazyLinear(4))
    keys, classes = list(module.state_dict()), [type(child) for child in module]
    monkeypatch.setattr("lightning_lora.injection.inject._finish", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        inject(module, rank=2, target_modules=["0"])
    assert list(module.state_dict()) == keys
    assert [type(child) for child in module] == classes
    assert all(p.requires_grad for p in module.parameters())


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_an_edit_of_a_merged_weight_is_the_whole_weight_after(gradient):
    module, x = adapted("linear", gradient)
    with merged(module), torch.no_grad():
        module[0].weight.fill_(0.5)
    expected = F.linear(x, torch.full((5, 8), 0.5, dtype=torch.float64), module[0].bias)
    torch.testing.assert_close(module(x), expected)


# ------------------------------------------------------------------------------------------------ irregular inputs


def _sequences(dtype=torch.float64):
    torch.manual_seed(3)
    return [torch.randn(length, 6, dtype=dtype) for length in (3, 1, 4)]


INPUTS = {
    "jagged": lambda: torch.nested.nested_tensor(_sequences(), layout=torch.jagged),
    "nested": lambda: torch.nested.nested_tensor(_sequences(), layout=torch.strided),
    "sparse": lambda: torch.cat(_sequences()).relu().to_sparse(),
    "rows of a sparse matrix": lambda: torch.cat(_sequences()).relu().to_sparse_csr(),
    "jagged ids": lambda: torch.nested.nested_tensor([torch.tensor([1, 2, 0]), torch.tensor([4])], layout=torch.jagged),
}


def _squares(y):
    return sum(part.square().sum() for part in y.unbind()) if y.is_nested else y.square().sum()


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("decomposition", ["product", "dora"])
@pytest.mark.parametrize("kind", INPUTS)
def test_inputs_that_are_nested_or_sparse_give_the_gradients_of_dense_ones_in_every_mode(kind, decomposition):
    x = INPUTS[kind]()
    first = nn.Embedding(9, 6, padding_idx=0) if kind == "jagged ids" else nn.Linear(6, 6)
    plain = nn.Sequential(first, nn.Linear(6, 5), nn.Linear(5, 4, bias=False)).double()
    dense = [x.to_dense()] if x.layout in (torch.sparse_coo, torch.sparse_csr) else x.unbind()
    for gradient in GRADIENTS:
        module = copy.deepcopy(plain)
        inject(
            module,
            rank=2,
            gradient=gradient,
            decomposition=decomposition,
            adapter_dtype="float64",
            target_modules=["0", "1", "2"],
        )
        found = adapters(module).values()
        optimizer = torch.optim.SGD([p for a in found for p in a.trained.values()], lr=1e-2)
        attach(module, optimizer)
        for _ in range(2):
            optimizer.zero_grad()
            _squares(module(x)).backward()
            optimizer.step()
        optimizer.zero_grad()
        y = module(x)
        _squares(y).backward()
        given = [p.grad.clone() for a in found for p in a.trained.values()]
        optimizer.zero_grad()
        sum(_squares(module(part)) for part in dense).backward()
        for actual, p in zip(given, [p for a in found for p in a.trained.values()], strict=True):
            torch.testing.assert_close(actual, p.grad, rtol=1e-11, atol=1e-13)
        merge(module)
        torch.testing.assert_close(_squares(module(x)), _squares(y), rtol=1e-12, atol=0)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_dropout_masks_a_nested_input_of_the_increment_alone():
    module = nn.Linear(6, 6).double()
    holder = nn.Sequential(module)
    inject(holder, rank=2, dropout=0.5)
    x = INPUTS["jagged"]()
    before = holder(x).values()
    nn.init.ones_(adapters(holder)["0"].B)
    draws = torch.stack([holder(x).values() - before for _ in range(400)])
    holder.eval()
    assert draws.std(0).min() > 0
    # the mean of 400 draws is within 5 standard errors of what it is without dropout, for each of 48 entries
    error = draws.std(0) / 400**0.5
    assert ((draws.mean(0) - (holder(x).values() - before)).abs() < 5 * error).all()
