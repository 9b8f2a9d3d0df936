"""The report of a run before it is run, from a copy of the module whose tensors have no data."""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader, Dataset
from torchmetrics import Metric

from lightning_lora import _compat
from lightning_lora.injection.inject import inject_options
from lightning_lora.injection.options import Options
from lightning_lora.memory.meter import standing_gradient
from lightning_lora.memory.optimizer_states import derived_nbytes, owners
from lightning_lora.memory.report import PARTS, Memory, MemoryReport
from lightning_lora.memory.saved import Saved, leaves, nbytes, tensors_in


def estimate_memory(
    module: nn.Module,
    batch: Any = None,
    optimizer: Callable[[list[nn.Parameter]], Optimizer] | None = None,
    **options: Any,
) -> MemoryReport:
    """Estimate the memory of a run before its model has memory: ``module`` may be on the meta device.

    ``training_step`` runs on copies of the module without data, which have no Trainer, log nothing, and are dropped.

    Args:
        module: Without adapters. It is left as it is, and no tensor of its size is made. Call this under the
            ``torch.autocast`` under which it will train, if any.
        batch: What ``training_step`` will get; for a module that has none, what its forward takes. By default
            ``module.example_input_array``, for the forward.
        optimizer: Makes an optimizer of a list of parameters. By default what ``configure_optimizers`` returns, if
            there is one that can be called without a Trainer, else :class:`torch.optim.AdamW`.
        **options: Those of :func:`~lightning_lora.inject`.

    Returns:
        A report of which all is derived.

    Raises:
        ValueError: If there is neither ``batch`` nor ``example_input_array``, or an option has a bad value.
        Exception: Whatever the module raises where it needs the values of its activations.
    """
    step = "training_step" if batch is not None and hasattr(module, "training_step") else "forward"
    batch = getattr(module, "example_input_array", None) if batch is None else batch
    if batch is None:
        raise ValueError(f"{type(module).__name__} has no `example_input_array`: give `estimate_memory` a batch.")
    mode = _compat.fake_tensors().FakeTensorMode(allow_non_fake_inputs=True)  # batches, masks, positions keep values
    full, lora = _without_data(module, mode), _without_data(module, mode)
    with mode:
        inject_options(lora, Options(**options))
    made = [_optimizers(side, optimizer) for side in (lora, full)]
    with_lora, without = (_memory(side, own, step, batch) for side, own in zip((lora, full), made, strict=True))
    return MemoryReport(with_lora, without, notes=() if all(made) else ("no optimizer could be configured: AdamW",))


def _memory(module: nn.Module, optimizers: list[Optimizer], step: str, batch: Any) -> Memory:
    optimizers = optimizers or [AdamW([p for p in module.parameters() if p.requires_grad])]
    activations, trained = _dry_run(module, len(optimizers), step, batch)
    known = owners(optimizers)
    return Memory(
        parameters=nbytes(module.parameters()),
        gradients=nbytes(trained) + standing_gradient(module),
        optimizer=derived_nbytes((p, known[p]) for p in trained if p in known),
        activations=activations,
        derived=frozenset(PARTS),
    )


def _without_data(module: nn.Module, mode: Any) -> Any:
    """Return a copy whose tensors have no data, and that reaches nothing of the original's."""
    memo: dict[int, Any] = {}
    with mode:
        for tensor in (*module.parameters(), *module.buffers()):
            device = torch.device("cpu") if tensor.is_meta else tensor.device
            empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
            is_parameter = isinstance(tensor, nn.Parameter)
            memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
    for child in module.modules():
        memo[id(child)] = object.__new__(type(child))
    with _compat.fake_tensors().FakeCopyMode(mode):
        for child in module.modules():
            for name, value in vars(child).items():
                try:
                    mute = isinstance(value, Dataset | DataLoader) or hasattr(value, "trainer")
                    mute = mute and not isinstance(value, nn.Module)
                    twin = None if name in ("_trainer", "_fabric") else Mute() if mute else copy.deepcopy(value, memo)
                except Exception:  # files, locks, connections
                    twin = Mute()
                vars(memo[id(child)])[name] = twin
    return memo[id(module)]


def _dry_run(module: nn.Module, optimizers: int, step: str, batch: Any) -> tuple[int, list[nn.Parameter]]:
    """Return the bytes that a step saves for the backward, and the parameters that it would give gradients to."""
    saved = Saved(lambda: (*module.parameters(), *module.buffers()))
    hooks = torch.autograd.graph.saved_tensors_hooks(saved.hold, saved.give)
    device = next(module.parameters()).device
    args = tree_map(lambda leaf: leaf.to(device) if hasattr(leaf, "to") else leaf, copy.deepcopy(batch))
    stand_ins = Mute() if optimizers == 1 else [Mute()] * optimizers
    for child in module.modules():
        if isinstance(child, Metric):
            vars(child).update({name: lambda *_, **__: torch.zeros(()) for name in ("forward", "update", "compute")})
        elif hasattr(child, "training_step"):
            silent = ("log", "log_dict", "print", "toggle_optimizer", "untoggle_optimizer", "clip_gradients")
            vars(child).update(dict.fromkeys(silent, Mute()))
            vars(child).update(dict.fromkeys(("optimizers", "lr_schedulers"), lambda *_, **__: stand_ins))
            vars(child)["manual_backward"] = lambda loss, *_, **__: loss.backward()
    # compiled modules run as they were written; where nothing was compiled, the compiler is not imported for this
    eager = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
    with _same_random_numbers(), _Unread(), eager, torch.enable_grad(), hooks:
        if step == "training_step":
            output = cast(Any, module).training_step(args, 0)
        elif isinstance(args, dict):
            output = module(**args)
        else:
            output = module(*args) if isinstance(args, list | tuple) else module(args)
    saved.measure()
    roots = [tensor for tensor in tensors_in(output) if tensor.requires_grad]
    trained, reached = [p for p in module.parameters() if p.requires_grad], leaves(roots)
    if not reached.issuperset(map(id, trained)):  # the graph does not show what a reentrant checkpoint has
        torch.autograd.backward(roots, [torch.ones_like(root) for root in roots])
    return saved.most, [p for p in trained if id(p) in reached or p.grad is not None]


def _optimizers(module: nn.Module, make: Callable[[list[nn.Parameter]], Optimizer] | None) -> list[Optimizer]:
    """Those that train ``module``; none if that cannot be told."""
    if make is not None:
        return [make([p for p in module.parameters() if p.requires_grad])]
    try:
        return list(_found(module.configure_optimizers()))  # type: ignore[operator]
    except Exception:  # there is no such method, or it needs a Trainer
        return []


def _found(configured: Any) -> Iterator[Optimizer]:
    """Return the optimizers in any of the forms in which ``configure_optimizers`` returns them."""
    if isinstance(configured, Optimizer):
        yield configured
    elif isinstance(configured, dict):
        yield from _found(configured.get("optimizer"))
    elif isinstance(configured, list | tuple):
        for item in configured:
            yield from _found(item)


@contextmanager
def _same_random_numbers() -> Iterator[None]:
    with ExitStack() as kept:
        kept.enter_context(torch.random.fork_rng(devices=range(torch.cuda.device_count())))
        kept.callback(random.setstate, random.getstate())
        if (numpy := sys.modules.get("numpy.random")) is not None:
            kept.callback(numpy.set_state, numpy.get_state())
        yield


class _Unread(TorchDispatchMode):
    """Gives 0 or False where Python reads a number from a tensor without data, as ``loss.item()`` for a log does."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and _compat.is_fake(args[0]):
            return torch.zeros((), dtype=args[0].dtype).item()
        return func(*args, **(kwargs or {}))


class Mute:
    """Takes the place of an optimizer, or of what cannot be copied: whatever is called does nothing."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Do nothing."""
        return self

    def __enter__(self) -> Mute:
        return self

    def __exit__(self, *exception: Any) -> None:
        return None
