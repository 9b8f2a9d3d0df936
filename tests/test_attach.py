"""`attach`: which steps are followed, how often, and what is refused."""

import copy

import pytest
import torch
from lightning.pytorch import Callback
from models import Net, data, trainer
from torch import nn

from lightning_lora import LoRA, adapters, attach, inject, merge
from lightning_lora.errors import LoRAError

GRADIENTS = ["merged", "projected"]


def adapted(**options):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    W0 = {name: module.get_submodule(name).weight.detach().clone() for name in ("0", "2")}
    inject(module, **{"rank": 2, "adapter_dtype": "float64", "init": "orthogonal", **options})
    return module, W0


def trained(module):
    return [p for p in module.parameters() if p.requires_grad]


def step(module, optimizer):
    optimizer.zero_grad()
    module(torch.linspace(-1, 1, 18, dtype=torch.float64).view(3, 6)).square().sum().backward()
    optimizer.step()


def check_weights(module, W0):
    """The start is of float32, and so is what is left of B^T A there."""
    for name, adapter in adapters(module).items():
        weight = module.get_submodule(name)._parameters["weight"]
        assert adapter.delta_weight().abs().max() > 1e-3
        torch.testing.assert_close(
            weight, W0[name] + adapter.delta_weight(), rtol=0, atol=1e-8
        )  # its start is of float32


class Nested(torch.optim.SGD):
    """Its own step and its parent's both call the hooks of steps."""

    def step(self, closure=None):
        return super().step(closure)


class TwoHalves(torch.optim.SGD):
    """Calls its parent's step twice, and writes A and B before, between and after."""

    def step(self, closure=None):
        self._shrink()
        super().step(closure)
        self._shrink()
        super().step()
        self._shrink()

    @torch.no_grad()
    def _shrink(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.mul_(0.99)


@pytest.fixture(autouse=True)
def patched_parent():
    torch.optim.SGD([nn.Parameter(torch.zeros(1))])  # torch gives a class its hooks with its first instance


@pytest.mark.parametrize("ratio", [None, 4.0])
@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("kind", [Nested, TwoHalves])
def test_a_step_that_calls_its_parents_step_counts_once(kind, gradient, ratio):
    module, W0 = adapted(gradient=gradient, lr_ratio=ratio)
    optimizer = kind(trained(module), lr=0.1)
    attach(module, optimizer)
    for _ in range(3):
        before = {name: adapter.B.detach().clone() for name, adapter in adapters(module).items()}
        plain = {name: nn.Parameter(B.clone()) for name, B in before.items()}
        step(module, optimizer)
        for name, p in plain.items():
            p.grad = adapters(module)[name].B.grad
        kind(plain.values(), lr=0.1).step()
        for name, adapter in adapters(module).items():
            expected = before[name] + (ratio or 1.0) * (plain[name].detach() - before[name])
            torch.testing.assert_close(adapter.B.detach(), expected, rtol=0, atol=1e-12)
    check_weights(module, W0)


def test_a_step_that_an_exception_has_ended_is_no_part_of_the_next():
    module, W0 = adapted(gradient="merged")
    optimizer = Nested(trained(module), lr=0.1)
    attach(module, optimizer)

    def fails():
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step(fails)
    step(module, optimizer)
    check_weights(module, W0)


def test_draws_count_a_step_in_a_step_once():
    module, _ = adapted(gradient="merged", init="zero", resample_every_n_steps=2)
    optimizer = Nested(trained(module), lr=0.1)
    attach(module, optimizer)
    for _ in range(3):
        step(module, optimizer)
    assert {(adapter.steps, adapter.drawn_at) for adapter in adapters(module).values()} == {(3, 2)}


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_a_group_that_is_added_after_attach_is_followed(gradient):
    module, W0 = adapted(gradient=gradient)
    first, second = adapters(module).values()
    optimizer = torch.optim.SGD(first.trained.values(), lr=0.1)
    handle = attach(module, optimizer)
    step(module, optimizer)
    optimizer.add_param_group({"params": list(second.trained.values())})
    step(module, optimizer)
    check_weights(module, W0)
    handle.remove()
    attach(module, optimizer)  # nothing is left attached


def test_a_group_that_is_added_and_cannot_be_followed_is_refused_before_anything_moves():
    module, _ = adapted(gradient="merged", init="zero", resample_every_n_steps=2)
    first, second = adapters(module).values()
    optimizer = torch.optim.SGD(first.trained.values(), lr=0.1)
    attach(module, optimizer)
    optimizer.add_param_group({"params": [second.A]})
    before = [p.detach().clone() for p in module.parameters()]
    with pytest.raises(LoRAError, match="two optimizers"):
        step(module, optimizer)
    assert all(torch.equal(p, q) for p, q in zip(module.parameters(), before, strict=True))


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_merging_after_a_forgotten_attach_is_an_error(gradient):
    module, _ = adapted(gradient=gradient)
    step(module, torch.optim.SGD(trained(module), lr=0.1))
    with pytest.raises(LoRAError, match="attach"):
        merge(module)


def test_merging_asks_for_no_attach_where_nothing_has_to_follow():
    module, W0 = adapted(gradient="factored")
    step(module, torch.optim.SGD(trained(module), lr=0.1))
    deltas = {name: adapter.delta_weight() for name, adapter in adapters(module).items()}
    merge(module)
    for name, delta in deltas.items():
        torch.testing.assert_close(module.get_submodule(name).weight.detach(), W0[name] + delta, rtol=0, atol=1e-12)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_what_was_followed_loaded_or_copied_can_be_merged(gradient):
    module, _ = adapted(gradient=gradient)
    optimizer = torch.optim.SGD(trained(module), lr=0.1)
    handle = attach(module, optimizer)
    step(module, optimizer)
    state = copy.deepcopy(module.state_dict())
    handle.remove()
    merge(copy.deepcopy(module))
    merge(module)
    other, _ = adapted(gradient=gradient)
    other.load_state_dict(state)
    merge(other)
    for name in ("0", "2"):
        assert torch.equal(other.get_submodule(name).weight, module.get_submodule(name).weight)


def test_after_a_step_that_an_exception_ended_the_module_can_be_merged():
    module, W0 = adapted(gradient="merged")

    class Fails(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            raise KeyboardInterrupt

    optimizer = Fails(trained(module), lr=0.1)
    handle = attach(module, optimizer)
    with pytest.raises(KeyboardInterrupt):
        step(module, optimizer)
    handle.remove()
    merge(module)
    assert all(torch.equal(module.get_submodule(name).weight, W0[name]) for name in W0)


@pytest.mark.parametrize("gradient", ["merged", "projected"])
@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_train_epoch_start", "on_train_end"])
def test_a_run_notices_what_other_code_than_an_optimizer_writes(hook, gradient, tmp_path):
    class Writes(Callback):
        pass

    def write(self, trainer, pl_module, *_):
        with torch.no_grad():
            for adapter in adapters(pl_module).values():
                adapter.B += 1

    setattr(Writes, hook, write)
    model = Net()
    with pytest.raises(LoRAError, match="its weight, which holds the increment, did not follow"):
        trainer(tmp_path, LoRA(rank=2, gradient=gradient), Writes(), limit_train_batches=3).fit(model, data(), data())
    assert not adapters(model)


def test_in_factored_mode_other_code_may_write(tmp_path):
    class Writes(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            with torch.no_grad():
                for adapter in adapters(pl_module).values():
                    adapter.B *= 0.5

    model = Net()
    trainer(tmp_path, LoRA(rank=2), Writes(), limit_train_batches=3).fit(model, data(), data())
    assert not torch.equal(model.layers[0].weight, Net().layers[0].weight)
