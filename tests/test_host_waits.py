"""Nothing in a step of training waits for the device, or is made on the host, that the base module's step does not.

On an accelerator each of these costs a step of all that is queued. They can be counted on the CPU too: what is
dispatched (a number read from a tensor, a comparison of tensors, indices of what is not zero), and what Python calls
(``cpu``, ``numpy``, ``tolist``, a tensor on ``"cpu"``, a generator of the host): a copy from the CPU to itself is none.
"""

import collections

import pytest
import torch
from lightning.pytorch import Callback
from models import Net, ResumableLoader, trainer
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_lora import LoRA

DISPATCHED = ("_local_scalar_dense", "item", "equal", "is_nonzero", "nonzero", "masked_select", "unique")
CALLED = {
    Tensor.item: "item",
    Tensor.tolist: "tolist",
    Tensor.numpy: "numpy",
    Tensor.cpu: "cpu",
    Tensor.__bool__: "bool",
    Tensor.__float__: "float",
    Tensor.__int__: "int",
    torch.equal: "equal",
    torch.allclose: "allclose",
}
STEPS = 10


class FusedNet(Net):
    """With an optimizer that reads no number, as those that are not fused do for each parameter on the CPU."""

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.02, weight_decay=0.0, fused=True)


class Waits(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.counted = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in DISPATCHED:
            self.counted[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


class Calls(TorchFunctionMode):
    def __init__(self, counted):
        super().__init__()
        self.counted = counted

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in CALLED:
            self.counted[f"Tensor.{CALLED[func]}"] += 1
        # who means the weights' device gives that of a tensor; who means the host says so
        if kwargs.get("generator") is not None or "cpu" in (kwargs.get("device"), *(a for a in args if type(a) is str)):
            self.counted[f"{getattr(func, '__name__', func)} on the host"] += 1
        return func(*args, **kwargs)


class Counted(Callback):
    """Counts from the third batch on, when what is done once a run is done."""

    def __init__(self):
        self.waits = Waits()
        self.calls = Calls(self.waits.counted)
        self.batches = 0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if self.batches == 2:
            self.waits.__enter__()
            self.calls.__enter__()
        self.batches += 1

    def on_train_batch_end(self, trainer, pl_module, *_):
        if self.batches == 2 + STEPS:
            self.calls.__exit__(None, None, None)
            self.waits.__exit__(None, None, None)


def counted(folder, *callbacks, precision="32-true"):
    counter = Counted()
    run = trainer(folder, *callbacks, counter, max_epochs=2, max_steps=2 + STEPS, precision=precision)
    run.fit(FusedNet(), ResumableLoader())
    assert counter.batches == 2 + STEPS
    return counter.waits.counted


CASES = {
    f"{gradient}, {decomposition}": {"gradient": gradient, "decomposition": decomposition}
    for gradient in ("factored", "merged", "projected")
    for decomposition in ("product", "additive", "dora")
}
CASES |= {
    f"{gradient}, {resample} drawn anew, {moments}": {
        "gradient": gradient,
        "resample": resample,
        "resample_every_n_steps": 2,
        "resample_moments": moments,
    }
    for gradient, resample, moments in (
        ("merged", "both", "transfer"),
        ("merged", "A", "transfer"),
        ("projected", "both", "reset"),
        ("projected", "A", "keep"),
    )
}
CASES["merged, lr_ratio"] = {"gradient": "merged", "lr_ratio": 4.0}
CASES["factored, dropout"] = {"dropout": 0.1}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return {p: counted(tmp_path_factory.mktemp("base"), precision=p) for p in ("32-true", "bf16-true")}


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
@pytest.mark.parametrize("case", CASES)
def test_a_step_waits_no_more_than_the_base_modules(case, precision, base, tmp_path):
    found = counted(tmp_path, LoRA(**{"rank": 1, **CASES[case]}), precision=precision)
    assert found - base[precision] == {}


def test_what_would_wait_is_counted():
    waits = Waits()
    with waits, Calls(waits.counted):
        x = torch.ones(2)
        x.sum().item()
        torch.equal(x, x)
        bool(x[0])
        x.cpu()
        x.nonzero()
        x.to("cpu")
        torch.rand(2, generator=torch.Generator())
    assert sum(waits.counted.values()) >= 7
    assert {"_local_scalar_dense", "equal", "nonzero", "Tensor.cpu", "to on the host"} <= waits.counted.keys()
