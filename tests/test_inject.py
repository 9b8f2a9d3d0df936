"""Injection changes no output, training no frozen weight, and merging leaves the plain module with the same outputs."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

from lightning_lora import Adapter, adapters, inject, merge


class Swish(nn.Linear):
    """A subclass with a forward of its own, which takes an argument more."""

    def forward(self, x, gate=1.0):
        return F.silu(F.linear(x, self.weight, self.bias)) * gate


class Float32Linear(nn.Linear):
    """A subclass that keeps float32 under autocast."""

    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            return F.linear(x.float(), self.weight, self.bias)


class Tower(nn.Module):
    """Layers of several kinds, one of them in eval mode from the start, one frozen, one a buffer's owner."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.norm = nn.BatchNorm1d(8)
        self.second = Swish(8, 8)
        self.third = Conv1D(8, 8)
        self.last = nn.Linear(8, 3, bias=False)
        self.norm.weight.requires_grad_(False)

    def forward(self, x):
        return self.last(self.third(self.second(self.norm(self.first(x)))))


def bits(tensor):
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def same_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def trained(module, steps=3, lr=0.1):
    """``module`` a few steps of SGD on."""
    module.train()
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        module(torch.randn(5, 6)).square().mean().backward()
        optimizer.step()
    return module


# ------------------------------------------------------------------------------------------- injection changes nothing

KINDS = {
    "Linear": lambda n, m: nn.Linear(n, m),
    "Linear without bias": lambda n, m: nn.Linear(n, m, bias=False),
    "Conv1D": lambda n, m: Conv1D(m, n),
    "a subclass": lambda n, m: Swish(n, m),
    "a subclass that keeps float32": lambda n, m: Float32Linear(n, m),
}


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_the_outputs_are_the_same_bit_for_bit_until_b_is_trained(kind, data):
    n, m = data.draw(st.integers(1, 40), "n"), data.draw(st.integers(1, 40), "m")
    lead = data.draw(st.lists(st.integers(0, 7), max_size=3), "leading dimensions")
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.float16]), "dtype")
    autocast = data.draw(st.booleans(), "autocast")
    torch.manual_seed(data.draw(st.integers(0, 1000), "seed"))
    if kind == "a subclass that keeps float32":
        dtype = torch.float32
    net = nn.Sequential(KINDS[kind](n, m)).to(dtype)
    for parameter in net.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(*lead, n).to(dtype)
    x.requires_grad_(data.draw(st.booleans(), "the input needs a gradient"))

    outputs, gradients = [], []
    for adapted in (False, True):
        if adapted:
            inject(net, rank=1)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = net(x)
        outputs.append(y)
        if x.requires_grad:
            gradients.append(torch.autograd.grad(y.sum(), x)[0])
    assert same_bits(*(output + 0.0 for output in outputs))  # the sum turns -0.0 into 0.0, as adding an increment does
    if gradients:
        torch.testing.assert_close(*gradients)
    with torch.no_grad():
        assert same_bits(net(x) + 0.0, copy_without_adapters(net)(x) + 0.0)


def copy_without_adapters(module):
    module = copy.deepcopy(module)
    merge(module)
    return module


def test_a_layer_is_called_as_before_by_keyword_and_with_further_arguments():
    torch.manual_seed(0)
    net = nn.ModuleDict({"linear": nn.Linear(6, 4), "conv1d": Conv1D(4, 6), "swish": Swish(6, 4)})
    x = torch.randn(2, 6)

    def outputs():
        return net["linear"](input=x), net["conv1d"](x=x), net["swish"](x, gate=0.5), net["swish"](x=x, gate=2.0)

    before = outputs()
    inject(net, rank=2)
    for old, new in zip(before, outputs(), strict=True):
        assert same_bits(old, new)


def test_the_modules_keep_what_they_are():
    tower = Tower()
    kinds = {name: type(module) for name, module in tower.named_modules()}
    shown, keys, states = repr(tower), list(tower.state_dict()), tower.state_dict()
    names = inject(tower, rank=2)
    assert names == ["first", "second", "third", "last"]
    for name, kind in kinds.items():
        assert isinstance(tower.get_submodule(name), kind)
        assert type(tower.get_submodule(name)).__name__ == kind.__name__
    assert [key for key in tower.state_dict() if ".lora." not in key] == keys
    assert all(same_bits(tower.state_dict()[key], states[key]) for key in keys)
    assert shown != repr(tower)


def test_only_the_adapters_need_gradients():
    tower = Tower()
    inject(tower, rank=2)
    needing = {name for name, p in tower.named_parameters() if p.requires_grad}
    assert needing == {f"{name}.lora.{factor}" for name in adapters(tower) for factor in "AB"}


def test_injection_leaves_the_global_generator_and_the_mode_alone():
    tower = Tower().eval()
    before = torch.get_rng_state()
    inject(tower, rank=2, dropout=0.5)
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(module.training for name, module in tower.named_modules() if ".lora" not in name)
    x = torch.randn(2, 6)
    assert same_bits(tower(x), tower(x))


# ------------------------------------------------------------------------------------------------------------ training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_frozen_weights_keep_every_bit_and_get_no_gradient(dtype):
    torch.manual_seed(0)
    tower = Tower().to(dtype)
    before = {name: p.detach().clone() for name, p in tower.named_parameters()}
    inject(tower, rank=2, dropout=0.1, modules_to_save=["norm"])
    optimizer = torch.optim.AdamW(tower.parameters(), lr=0.1, weight_decay=0.5)
    for _ in range(5):
        optimizer.zero_grad()
        tower(torch.randn(5, 6).to(dtype)).square().mean().backward()
        optimizer.step()
    for name, old in before.items():
        parameter = dict(tower.named_parameters())[name]
        if name.startswith("norm"):
            assert not torch.equal(parameter, old)
        else:
            assert same_bits(parameter, old)
            assert parameter.grad is None
            assert parameter not in optimizer.state
    assert all(adapter.B.any() for adapter in adapters(tower).values())


def test_training_in_float64_is_training_of_the_whole_weight_in_a_and_b():
    """Three steps of SGD on W0 + scale B^T A by autograd through the whole weight, and by the adapters."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    inject(net, rank=2, alpha=3, adapter_dtype="float64")
    for adapter in adapters(net).values():
        nn.init.normal_(adapter.B)
    factors = [[f.detach().clone().requires_grad_() for f in (a.A, a.B)] for a in adapters(net).values()]
    ours = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
    theirs = torch.optim.SGD([f for pair in factors for f in pair], lr=0.1)
    for _ in range(3):
        x = torch.randn(7, 6, dtype=torch.float64)
        layers = (net[0], net[2])
        weights = (layer._parameters["weight"] for layer in layers)
        first, second = (weight + 1.5 * B.T @ A for weight, (A, B) in zip(weights, factors, strict=True))
        expected = F.linear(F.linear(x, first, net[0].bias).tanh(), second, net[2].bias).square().mean()
        loss = net(x).square().mean()
        torch.testing.assert_close(loss, expected, rtol=1e-13, atol=0)
        for optimizer, value in ((ours, loss), (theirs, expected)):
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
    for adapter, (A, B) in zip(adapters(net).values(), factors, strict=True):
        torch.testing.assert_close(adapter.A, A, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(adapter.B, B, rtol=1e-12, atol=1e-12)


def test_a_layer_used_twice_gets_the_sum_of_both_gradients():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4)).double()
    inject(net, rank=2, adapter_dtype="float64")
    layer, x = net[0], torch.randn(3, 4, dtype=torch.float64)
    nn.init.normal_(layer.lora.B)
    layer(layer(x)).sum().backward()
    A, B = (f.detach().clone().requires_grad_() for f in (layer.lora.A, layer.lora.B))
    whole = layer._parameters["weight"] + B.T @ A
    F.linear(F.linear(x, whole, layer.bias), whole, layer.bias).sum().backward()
    torch.testing.assert_close(layer.lora.A.grad, A.grad)
    torch.testing.assert_close(layer.lora.B.grad, B.grad)


# ------------------------------------------------------------------------------------------------------------- merging


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_the_merged_module_gives_the_adapted_outputs(dtype, tolerance):
    torch.manual_seed(0)
    tower = Tower()
    linears = nn.Sequential(tower.first, nn.Tanh(), tower.third, tower.last)
    inject(linears, rank=2, alpha=3, dropout=0.3)
    trained(linears)
    linears.to(dtype).eval()
    x = torch.randn(2, 3, 6, dtype=dtype)
    adapted = linears(x)
    merge(linears)
    torch.testing.assert_close(linears(x), adapted, rtol=tolerance, atol=tolerance)
    assert not torch.equal(adapted, torch.zeros_like(adapted))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_merging_writes_what_folding_in_gives_into_the_weight_that_is_there(dtype):
    torch.manual_seed(0)
    tower = Tower().to(dtype)
    inject(tower, rank=2, alpha=3)
    for adapter in adapters(tower).values():
        nn.init.normal_(adapter.B)
    weights = {name: tower.get_submodule(name)._parameters["weight"] for name in adapters(tower)}
    expected = {name: adapter.folded_into(weights[name]) for name, adapter in adapters(tower).items()}
    merge(tower)
    for name, weight in weights.items():
        assert tower.get_submodule(name).weight is weight
        assert same_bits(weight, expected[name])


def test_merging_an_untrained_module_changes_no_bit():
    tower = Tower()
    nn.init.zeros_(tower.last.weight)
    with torch.no_grad():
        tower.last.weight.neg_()  # -0.0
    before = {key: bits(value) for key, value in tower.state_dict().items()}
    inject(tower, rank=2)
    merge(tower)
    assert all(torch.equal(bits(value), before[key]) for key, value in tower.state_dict().items())
    assert list(tower.state_dict()) == list(before)


def test_merging_restores_classes_keys_their_order_and_what_needs_gradients():
    tower = Tower()

    def structure():
        return (
            [
                (name, type(module), list(module.__dict__), list(module._modules))
                for name, module in tower.named_modules()
            ],
            list(tower.state_dict()),
            [(name, id(p), p.requires_grad) for name, p in tower.named_parameters()],
        )

    before = structure()
    inject(tower, rank=2, bias="all", modules_to_save=["norm"])
    assert tower.norm.weight.requires_grad
    trained(tower)
    merge(tower)
    assert structure() == before
    assert not tower.norm.weight.requires_grad
    assert adapters(tower) == {}


def test_the_merged_state_loads_strictly_into_a_plain_module():
    tower = Tower()
    inject(tower, rank=2)
    trained(tower)
    merge(tower)
    plain = Tower()
    plain.load_state_dict(tower.state_dict(), strict=True)
    x = torch.randn(4, 6)
    assert same_bits(plain.eval()(x), tower.eval()(x))


def test_adapters_injected_into_a_part_are_merged_through_the_whole():
    net = nn.ModuleDict({"a": nn.Sequential(nn.Linear(6, 6)), "b": nn.Sequential(nn.Linear(6, 6))})
    inject(net["a"], rank=2)
    assert list(adapters(net)) == ["a.0"]
    assert net["b"][0].weight.requires_grad
    merge(net)
    assert net["a"][0].weight.requires_grad
    assert type(net["a"][0]) is nn.Linear


def test_merging_what_has_no_adapters_is_an_error():
    with pytest.raises(ValueError, match="Tower has no adapters to merge"):
        merge(Tower())


def test_injecting_and_merging_over_and_over_without_training_drifts_by_no_bit():
    tower = Tower().to(torch.bfloat16)
    before = {key: bits(value) for key, value in tower.state_dict().items()}
    for _ in range(100):
        inject(tower, rank=2)
        merge(tower)
    assert all(torch.equal(bits(value), before[key]) for key, value in tower.state_dict().items())


# ------------------------------------------------------------------------------------------------- copies and loading


def pickled(module):
    return pickle.loads(pickle.dumps(module))


def saved(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_an_adapted_state_loads_into_another_adapted_module():
    first, second = Tower(), Tower()
    for module in (first, second):
        inject(module, rank=2)
    trained(first)
    second.load_state_dict(first.state_dict())
    x = torch.randn(4, 6)
    assert same_bits(first.eval()(x), second.eval()(x))


def test_a_state_without_the_weight_of_an_adapted_layer_leaves_its_increment():
    tower = Tower()
    inject(tower, rank=2)
    trained(tower)
    B = tower.first.lora.B.detach().clone()
    report = tower.load_state_dict({"norm.bias": torch.ones(8)}, strict=False)
    assert same_bits(tower.first.lora.B, B)
    assert {"first.weight", "first.lora.A", "first.lora.B"} <= set(report.missing_keys)


def test_half_an_adapter_does_not_load():
    tower = Tower()
    inject(tower, rank=2)
    state = tower.state_dict()
    del state["first.lora.B"]
    with pytest.raises(RuntimeError, match=r'Missing key.*"first.lora.B"'):
        tower.load_state_dict(state)


# ------------------------------------------------------------------------------------------------------ shared modules


class Shared(nn.Module):
    """One Linear under two names."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = self.first

    def forward(self, x):
        return self.second(self.first(x))


def test_a_module_under_two_names_gets_one_adapter_and_stays_one_module():
    torch.manual_seed(0)
    net = Shared()
    x = torch.randn(2, 6)
    keys, before = list(net.state_dict()), net(x)
    assert inject(net, rank=2) == ["first"]
    assert same_bits(net(x), before)
    trained(net)
    adapted = net(x)
    assert not torch.equal(adapted, before)
    merge(net)
    torch.testing.assert_close(net(x), adapted)
    assert net.first is net.second
    assert list(net.state_dict()) == keys


# ---------------------------------------------------------------------------------------------- the Transformer's path

nested = pytest.mark.filterwarnings("ignore:.*nested tensors.*:UserWarning")


def randomised(module):
    inject(module, rank=2)
    for adapter in adapters(module).values():
        nn.init.normal_(adapter.B)
    return module.eval()


@pytest.mark.parametrize("targets", [["linear1"], ["linear2"], "all-linear"])
def test_the_fast_path_of_a_transformer_layer_does_not_pass_the_adapters_by(targets):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        before = layer(x)
        inject(layer, rank=2, target_modules=targets)
        torch.testing.assert_close(layer(x), before)
        for adapter in adapters(layer).values():
            nn.init.normal_(adapter.B)
        adapted = layer(x)
    torch.testing.assert_close(adapted, layer(x).detach())  # with gradients there is no fast path
    assert (adapted - before).abs().max() > 0.1
    merge(layer)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), adapted, rtol=1e-4, atol=1e-5)


@nested
@pytest.mark.parametrize("masked", [False, True])
def test_nested_tensors_of_a_transformer_do_not_pass_the_adapters_by(masked):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    encoder = randomised(nn.TransformerEncoder(layer, 2, enable_nested_tensor=True))
    x = torch.randn(3, 5, 8)
    kept = torch.arange(5) < torch.tensor([5, 3, 2])[:, None]
    mask = ~kept if masked else None
    rows = kept if masked else torch.ones_like(kept)
    with torch.no_grad():
        adapted = encoder(x, src_key_padding_mask=mask)
    torch.testing.assert_close(adapted[rows], encoder(x, src_key_padding_mask=mask).detach()[rows])
    merge(encoder)
    with torch.no_grad():
        merged = encoder(x, src_key_padding_mask=mask)
    torch.testing.assert_close(merged[rows], adapted[rows], rtol=1e-4, atol=1e-5)
    assert encoder.use_nested_tensor


@nested
def test_an_encoder_without_adapters_keeps_its_nested_tensors():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1)
    net = nn.ModuleDict({"encoder": encoder, "head": nn.Linear(8, 4)})
    inject(net, rank=2, target_modules=["head"])
    assert encoder.use_nested_tensor
    merge(net)
    assert encoder.use_nested_tensor


def test_an_adapter_has_what_the_interface_says():
    tower = Tower()
    inject(tower, rank=2, alpha=3)
    for name, adapter in adapters(tower).items():
        assert isinstance(adapter, Adapter)
        assert adapter.scale == 1.5
        assert adapter.rank == 2
        assert adapter.delta_weight().shape == tower.get_submodule(name).weight.shape
