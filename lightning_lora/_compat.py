"""Private names of torch and Lightning that this package uses, in one place, each with a fallback or a clear error."""

from __future__ import annotations

import logging
import pickle
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_lora.errors import LoRAError


def fake_tensors() -> Any:
    """Return torch's module of tensors that have shape, dtype and device, and no data."""
    import torch._subclasses.fake_tensor as fake

    return fake


def _no_functorch() -> bool:
    """Return False: this torch tells of no transforms, and inside one a ``torch.autograd.Function`` is an error."""
    return False


#: Tells whether the call is inside ``torch.func.grad``, ``vmap`` or their like. Called for each layer and step, so it
#: is torch's own function, without a frame of Python around it.
is_functorch_active: Callable[[], bool] = getattr(torch._C, "_are_functorch_transforms_active", _no_functorch)


no_function_of_subclasses: Any = getattr(torch._C, "DisableTorchFunctionSubclass", torch._C.DisableTorchFunction)
"""A context in which no ``__torch_function__`` of a subclass is called; modes are, where torch can tell them apart."""


def tree_map_only(kind: type, function: Callable[[Any], Any], tree: Any) -> Any:
    """Return ``tree``, of lists, tuples and dictionaries, with ``function`` of each leaf that is of ``kind``."""
    from torch.utils._pytree import tree_map_only

    return tree_map_only(kind, function, tree)


def convolution_of(layer: Any) -> Any:
    """Return how ``layer``, a convolution or its class, convolves an input with filters and a bias; None if unknown."""
    return getattr(layer, "_conv_forward", None)


def weight_names(rnn: Any) -> list[str]:
    """Return the names of the weights of an ``nn.RNNBase``, in the order in which it hands them to its operation."""
    names: list[str] | None = getattr(rnn, "_flat_weights_names", None)
    return [name for name, _ in rnn.named_parameters(recurse=False)] if names is None else names


#: Copies each tensor of a list into that of another, whatever their dtypes, by one launch on an accelerator.
copy_each: Callable[..., None] = torch._foreach_copy_


def top_pack_hook() -> Any:
    """Return the pack hook of the innermost ``saved_tensors_hooks``, or None."""
    top = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return top and top[0]


def saved_tensors_hooks() -> Any:
    """Return the pack and unpack hooks of the innermost ``saved_tensors_hooks``, or None."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


def remove_saved_tensors_hooks(pack: Any) -> None:
    """Take the ``saved_tensors_hooks`` with this pack hook off the stack, whatever stands on them."""
    autograd, above = torch._C._autograd, []
    while (top := autograd._top_saved_tensors_default_hooks(True)) is not None:
        autograd._pop_saved_tensors_default_hooks()
        if top[0] == pack:
            break
        above.append(top)
    for hooks in reversed(above):
        autograd._push_saved_tensors_default_hooks(*hooks)


def remove_function_mode(mode: TorchFunctionMode) -> None:
    """Take ``mode`` off the stack of torch function modes, whatever stands on it."""
    overrides: Any = torch.overrides
    if mode in overrides._get_current_function_mode_stack():
        above = []
        while (top := overrides._pop_mode()) is not mode:
            above.append(top)
        for other in reversed(above):
            overrides._push_mode(other)


def is_compiled(module: nn.Module) -> bool:
    """Tell whether ``module``, or a module in it, was compiled by torch or is a ScriptModule."""
    compiled = getattr(sys.modules.get("torch._dynamo"), "OptimizedModule", ())
    return vars(module).get("_compiler_ctx") is not None or any(
        isinstance(child, compiled) or child._compiled_call_impl is not None for child in module.modules()
    )


def before_compiled_calls(hook: Callable[[], None]) -> tuple[Any, str, Any] | None:
    """Return what to replace, and by what, so that ``hook`` runs before each call of a compiled function.

    None if nothing can have been compiled yet.
    """
    frames: Any = sys.modules.get("torch._dynamo.eval_frame")
    if frames is None:
        return None
    original = frames._callback_from_stance

    def callback(*args: Any) -> Any:
        if callable(args[0]):  # not what takes the compiler off, as optimizers do
            hook()
        return original(*args)

    return frames, "_callback_from_stance", callback


@contextmanager
def quiet_fake_tensors() -> Iterator[None]:
    """Keep torch from logging what an operation on tensors without data raises."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


def is_fake(tensor: Any) -> bool:
    """Tell whether ``tensor`` has no data."""
    return isinstance(tensor, fake_tensors().FakeTensor)


def no_torch_function() -> Any:
    """Return a context in which no torch function mode and no ``__torch_function__`` is called."""
    return torch._C.DisableTorchFunction()


def logs_hyperparameters(module: Any) -> bool:
    """Return whether a LightningModule lets its hyperparameters be logged: ``save_hyperparameters(logger=False)``."""
    return getattr(module, "_log_hyperparams", True) is not False


def logged_step(trainer: Any) -> int:
    """Return the step under which Lightning logs the batch that is running."""
    return getattr(getattr(trainer.fit_loop, "epoch_loop", None), "_batches_that_stepped", trainer.global_step)


def average_model(callback: Any) -> Any:
    """Return the ``AveragedModel`` of Lightning's ``WeightAveraging``."""
    model = getattr(callback, "_average_model", None)
    if model is None:
        raise LoRAError(
            f"This version of Lightning keeps the average of {type(callback).__name__} elsewhere. Remove the callback,"
            " or report this with your version of Lightning."
        )
    return model


def combined_loader_mode(trainer: Any) -> Any:
    """Return how the fit loop combines several loaders; Lightning's default where it does not tell."""
    return getattr(getattr(trainer.fit_loop, "_combined_loader", None), "_mode", "max_size_cycle")


def find_buffers_again(module: Any) -> None:
    """Have DistributedDataParallel, which remembers whether there were buffers to synchronise, look for them anew."""
    if isinstance(module, nn.parallel.DistributedDataParallel) and hasattr(module, "_assign_modules_buffers"):
        module._assign_modules_buffers()


def save_as_made(value: Any, path: str, made: Iterable[tuple[Tensor, Callable[[], Tensor]]]) -> None:
    """Write ``value`` as ``torch.save`` does, with weights that are made when their turn comes.

    Args:
        value: What to write; it holds the placeholders of ``made``.
        path: Of the file.
        made: Empty tensors, each with what makes the bytes, (n,), that are written in its place. If torch has no such
            function any more, all are made first.
    """
    writer, save = (getattr(torch.serialization, name, None) for name in ("_open_zipfile_writer", "_save"))
    if writer is None or save is None:
        for tensor, make in made:
            tensor.reshape(-1).view(torch.uint8).copy_(make())
        torch.save(value, path)
        return
    makers = {tensor.data_ptr(): make for tensor, make in made if tensor.numel()}

    class Archive:
        """The archive that torch writes to, which makes each weight before it is written."""

        def __getattr__(self, name: str) -> Any:
            return getattr(archive, name)

        def write_record(self, name: str, data: Any, size: int) -> None:
            if isinstance(data, torch.UntypedStorage) and data.data_ptr() in makers:
                tensor = makers[data.data_ptr()]()
                data = tensor.untyped_storage()
                if data.nbytes() != size:  # it is a part of a file
                    data = tensor.clone().untyped_storage()
            archive.write_record(name, data, size)

    with writer(path) as archive:
        save(value, Archive(), pickle, 2, False)
