"""Without the private names of torch and Lightning: the package is as right, or says what is missing."""

import copy
import importlib.util
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from models import Net, data, trainer
from torch import nn

from lightning_lora import LoRA, _compat, adapters, inject, merge
from lightning_lora.errors import LoRAError


class Without(ModuleType):
    """A module that has no longer the attributes called ``names``."""

    def __init__(self, module, *names):
        super().__init__(module.__name__)
        vars(self).update(_module=module, _names=names)

    def __getattr__(self, name):
        if name in self._names:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        return getattr(self._module, name)


def compat_without(*names):
    """The file of private names, as it is imported where torch has none called ``names``."""
    stripped = Without(torch)
    vars(stripped)["_C"] = Without(torch._C, *names)
    spec = importlib.util.find_spec("lightning_lora._compat")
    fresh = importlib.util.module_from_spec(spec)
    before, sys.modules["torch"] = torch, stripped
    try:
        spec.loader.exec_module(fresh)
    finally:
        sys.modules["torch"] = before
    return fresh


def gradients(module, x, gradient):
    module = copy.deepcopy(module)
    inject(module, rank=2, gradient=gradient, adapter_dtype="float64")
    y = module(x)
    (y[0] if isinstance(y, tuple) else y).square().sum().backward()
    found = {f"{n}.{k}": p.grad for n, a in adapters(module).items() for k, p in a.trained.items()}
    merge(module)
    return found


def test_without_a_word_on_transforms_the_names_at_import_have_their_fallbacks():
    fresh = compat_without("_are_functorch_transforms_active", "DisableTorchFunctionSubclass")
    assert fresh.is_functorch_active() is False
    assert fresh.no_function_of_subclasses is torch._C.DisableTorchFunction


@pytest.mark.parametrize("gradient", ["factored", "merged"])
def test_a_convolution_that_is_not_known_exactly_is_adapted_through_its_weight(gradient, monkeypatch):
    module = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1)).double()
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    expected = gradients(module, x, gradient)
    for place in ("lightning_lora._compat", "lightning_lora.hosts.choose", "lightning_lora.hosts.forwards"):
        monkeypatch.setattr(f"{place}.convolution_of", lambda layer: None)
    for name, actual in gradients(module, x, gradient).items():
        torch.testing.assert_close(actual, expected[name], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_the_weights_of_an_rnn_are_found_in_its_own_order(bias, bidirectional):
    rnn = nn.LSTM(3, 4, 2, bias=bias, bidirectional=bidirectional)
    known = _compat.weight_names(rnn)
    unknown = SimpleNamespace(named_parameters=rnn.named_parameters)
    assert known == _compat.weight_names(unknown) == list(rnn._parameters)


def test_a_run_is_the_same_where_lightning_tells_nothing(tmp_path, monkeypatch):
    states = []
    for told in (True, False):
        if not told:
            monkeypatch.setattr("lightning_lora.callback.logged_step", lambda trainer: trainer.global_step)
            monkeypatch.setattr("lightning_lora.trainer.first_batches.combined_loader_mode", lambda _: "max_size_cycle")
        module = Net()
        trainer(tmp_path, LoRA(rank=2, init="gradient"), limit_train_batches=2).fit(module, data())
        states.append(module.state_dict())
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


def test_an_average_that_is_kept_elsewhere_is_an_error_that_names_the_callback():
    with pytest.raises(LoRAError, match=r"keeps the average of SimpleNamespace elsewhere\. Remove the callback"):
        _compat.average_model(SimpleNamespace())
