"""What autograd keeps for the backward pass: counted in a step that runs, or in one that runs without data.

A dry step is the module's own forward on a copy whose parameters have shape, dtype and device but no memory
(``FakeTensorMode``). So what full fine-tuning would keep is found by the operations themselves, in milliseconds, and
not by a rule for each kind of layer.
"""

from __future__ import annotations

import copy
import functools
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, Dataset
from torchmetrics import Metric

from lightning_lora.injection.inject import take_out, trained_without
from lightning_lora.weights import sharded as shards


def plain_tensors(tensor: Tensor) -> Iterator[Tensor]:
    """What ``tensor`` is stored in: itself, the local shard of a DTensor, the packed parts of a quantised tensor."""
    if hasattr(tensor, "__tensor_flatten__"):
        parts = (getattr(tensor, name) for name in tensor.__tensor_flatten__()[0])
        for part in parts:
            if isinstance(part, Tensor):  # a DTensor names its mesh too
                yield from plain_tensors(part)
    else:
        yield tensor


def storages(tensors: Iterable[Tensor]) -> dict[int, torch.UntypedStorage]:
    """Address -> each storage of ``tensors``: shared ones once, packed ones as they are packed."""
    found = (plain.untyped_storage() for tensor in tensors for plain in plain_tensors(tensor))
    return {storage._cdata: storage for storage in found}


def nbytes(tensors: Iterable[Tensor]) -> int:
    """Bytes that ``tensors`` take, each storage counted once."""
    return sum(storage.nbytes() for storage in storages(tensors).values())


class SavedTensors:
    """Counts what is saved for backward by ``module``, but for its parameters and buffers.

    What the user's own hooks save instead (``save_on_cpu``, activation checkpoints) is theirs, and is not seen.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._known = self._own()
        self._found: dict[int, torch.UntypedStorage] = {}
        self._most = 0

    def _own(self) -> dict[int, torch.UntypedStorage]:
        return storages([*self._module.parameters(), *self._module.buffers()])

    @property
    def nbytes(self) -> int:
        """The most that stood for one backward."""
        return self.nbytes_with(self)

    def nbytes_with(self, other: SavedTensors) -> int:
        """Bytes of what either has found."""
        # what FSDP2 gathers of parameters is freed after the forward, and of the outermost module stands in its place
        found, own = self._found | other._found, self._own()
        return max(self._most, sum(storage.nbytes() for key, storage in found.items() if key not in own))

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Counts ``tensors`` as saved."""
        self._found |= {key: storage for key, storage in storages(tensors).items() if key not in self._known}

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Counts while open. What a manual backward releases is not counted with what is saved after it."""
        backward = getattr(self._module, "manual_backward", None)

        def release(*args: Any, **kwargs: Any) -> None:
            self._most, self._found = self.nbytes, {}
            backward(*args, **kwargs)  # type: ignore[misc]

        hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)
        with hooks, replaced(self._module, "manual_backward", release) if backward else nullcontext():
            yield

    def _pack(self, tensor: Tensor) -> Tensor:
        self.add([tensor])
        return tensor


@contextmanager
def replaced(module: nn.Module, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Calls ``function`` in the place of a method of ``module``."""
    own = vars(module).get(name)
    vars(module)[name] = function
    try:
        yield
    finally:
        del vars(module)[name]
        if own is not None:
            vars(module)[name] = own


# ------------------------------------------------------------------------------------------------------ without data


def hollow(module: nn.Module, mode: FakeTensorMode) -> Any:
    """A deep copy of ``module`` whose tensors have no data; parameters on the meta device are on the CPU in it.

    Data sets, and the callback that a module knows in a run, are not copied.
    """
    memo: dict[int, Any] = {}
    for child in module.modules():
        for value in vars(child).values():
            if isinstance(value, Dataset | DataLoader | LightningDataModule | Callback):
                memo[id(value)] = value
    with mode:
        for tensor in (*module.parameters(), *module.buffers()):
            device = torch.device("cpu") if tensor.is_meta else tensor.device
            empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
            is_parameter = isinstance(tensor, nn.Parameter)
            memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
    with FakeCopyMode(mode):
        twin: Any = copy.deepcopy(module, memo)
    if isinstance(module, LightningModule) and module._trainer is not None:
        twin.trainer = module._trainer  # which the copy leaves out
    return twin


def new_mode() -> FakeTensorMode:
    """One that lets tensors with data in: batches, masks and positions keep their values, so code that reads them runs.

    It is not to be active in the dry step. There an operation has no data if one of its arguments has none.
    """
    return FakeTensorMode(allow_non_fake_inputs=True)


def dry_run(
    module: nn.Module, optimizers: int, run: Callable[..., Any], *args: Any, **kwargs: Any
) -> tuple[int, set[str]]:
    """Bytes that ``run`` saves for backward, and the names of the parameters that it would give gradients to.

    Args:
        module: From :func:`hollow`. It cannot be used for anything else after this.
        optimizers: How many its code will ask for.
        run: A method of ``module``, or itself.
        *args, **kwargs: For ``run``.

    Raises:
        Exception: Whatever the module raises if it needs values that are not there.
    """
    saved = SavedTensors(module)
    _quieten(module, optimizers)
    with isolate_rng(), _Unread(), _uncompiled(), torch.enable_grad():
        with saved.counting():
            output = run(*args, **kwargs)
        roots = [tensor for tensor in _tensors(output) if tensor.requires_grad]
        leaves = _leaves(roots)
        trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        if not leaves.issuperset(map(id, trained.values())):  # the graph does not show what a reentrant checkpoint has
            torch.autograd.backward(roots, [torch.ones_like(root) for root in roots])
    return saved.nbytes, {name for name, p in trained.items() if id(p) in leaves or p.grad is not None}


def _leaves(roots: list[Tensor]) -> set[int]:
    """Identities of the leaves in the graph of ``roots``."""
    nodes = [root.grad_fn for root in roots if root.grad_fn is not None]
    seen, leaves = set(nodes), set()
    while nodes:
        node = nodes.pop()
        leaves.add(id(getattr(node, "variable", None)))
        new = {child for child, _ in node.next_functions if child is not None} - seen
        seen |= new
        nodes.extend(new)
    return leaves


class _Unread(TorchDispatchMode):
    """Gives 0 or False where Python reads a number from a tensor without data, as ``loss.item()`` for a log does."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return torch.zeros((), dtype=args[0].dtype).item()
        return func(*args, **(kwargs or {}))


def _uncompiled() -> AbstractContextManager[Any]:
    """Compiled modules run as they were written; where nothing was compiled, the compiler is not imported for this."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


class _Nothing:
    """Takes the place of an optimizer: whatever is called does nothing."""

    def __getattr__(self, name: str) -> Any:
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self

    def __enter__(self) -> _Nothing:
        return self

    def __exit__(self, *exception: Any) -> None:
        return None


def _quieten(module: nn.Module, optimizers: int) -> None:
    """Takes from the hollow ``module`` what would reach the real run: logs, metrics, optimizers."""
    nothing = _Nothing()
    stand_ins = nothing if optimizers == 1 else [nothing] * optimizers
    silent = ("log", "log_dict", "print", "toggle_optimizer", "untoggle_optimizer", "clip_gradients")
    for child in module.modules():
        if isinstance(child, Metric):
            vars(child).update({name: lambda *_, **__: torch.zeros(()) for name in ("forward", "update", "compute")})
        if isinstance(child, LightningModule):
            vars(child).update(dict.fromkeys(silent, nothing))
            vars(child).update(dict.fromkeys(("optimizers", "lr_schedulers"), lambda *_, **__: stand_ins))
            vars(child)["manual_backward"] = lambda loss, *_, **__: loss.backward()


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


# --------------------------------------------------------------------------------------------------- a step of a run


class Activations(NamedTuple):
    """What one training step saves for backward, in bytes; None stands for what could not be told."""

    lora: int | None = None
    full: int | None = None
    """If the same were trained in full."""
    reached: set[str] | None = None
    """Names of the parameters that would then get gradients."""
    note: str = ""
    """Why something could not be told."""


def watch_step(
    module: LightningModule, optimizers: int, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Activations, Any]:
    """Takes the ``training_step`` of ``module``, which has adapters, and returns what was seen besides its output.

    Where the step cannot be taken without data, full fine-tuning is said to save what this step saves and the inputs of
    all layers whose parameters it would train.
    """
    step = functools.partial(module.training_step, *args, **kwargs)
    if _is_compiled(module):  # which would compile it once with the hooks and once without
        return Activations(note="activations of compiled modules are not measured"), step()
    saved, inputs = SavedTensors(module), SavedTensors(module)
    try:
        full, reached, unseen = _dry_full_step(module, optimizers, args, kwargs)
    except Exception as error:  # whatever code raises that needs the values of activations
        reason = f"{type(error).__name__}: {error}".strip().partition("\n")[0]
        note = f"no step could be taken without data: {reason}"
        if _forbids_hooks(error):
            return Activations(note=note), step()
        with _counting_inputs(inputs, module), saved.counting():
            output = step()
        return Activations(saved.nbytes, saved.nbytes_with(inputs), None, note), output
    with saved.counting():
        output = step()
    return Activations(saved.nbytes, full if unseen is None else full + saved.nbytes - unseen, reached), output


def _dry_full_step(
    module: LightningModule, optimizers: int, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[int, set[str], int | None]:
    """What :func:`dry_run` returns for full fine-tuning.

    And the bytes for LoRA where there is an RNN, whose workspace is not seen without data: by these and those of the
    real step it is known how much that is, and it is the same in both.
    """
    if shards.is_sharded(module):
        raise TypeError("FSDP2 does not let its modules be copied")
    if any(isinstance(arg, Iterator) for arg in (*args, *kwargs.values())):
        raise TypeError("training_step takes an iterator, and a batch can be taken from it once")

    def dry(side: LightningModule) -> tuple[int, set[str]]:
        own_args, own_kwargs = copy.deepcopy((args, kwargs))  # a step may change its batch
        return dry_run(side, optimizers, type(side).training_step.__get__(side), *own_args, **own_kwargs)

    plain = hollow(module, new_mode())
    take_out(plain)
    has_rnn = any(isinstance(child, nn.RNNBase) for child in module.modules())
    return *dry(plain), dry(hollow(module, new_mode()))[0] if has_rnn else None


def _is_compiled(module: nn.Module) -> bool:
    compiled = getattr(sys.modules.get("torch._dynamo"), "OptimizedModule", ())
    return vars(module).get("_compiler_ctx") is not None or any(
        isinstance(child, compiled) or child._compiled_call_impl is not None for child in module.modules()
    )


def _forbids_hooks(error: Exception) -> bool:
    """Whether ``error`` is that of code, such as ``torch.func.grad``, in which no hooks for saved tensors may stand."""
    return any(frame.name == "disable_saved_tensors_hooks" for frame in traceback.extract_tb(error.__traceback__))


@contextmanager
def _counting_inputs(saved: SavedTensors, module: nn.Module) -> Iterator[None]:
    """Counts as saved what is given to the layers in ``module`` that full fine-tuning would train, while open."""
    trained = set(trained_without(module).values())

    def add(_: nn.Module, args: Any, kwargs: Any) -> None:
        saved.add(_tensors([args, kwargs]))

    layers = [child for child in module.modules() if not trained.isdisjoint(child._parameters.values())]
    hooks = [layer.register_forward_pre_hook(add, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
