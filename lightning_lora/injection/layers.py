"""Layers that multiply their input by a weight: which there are, where the weight is, what keeps it from an adapter."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torchmetrics import Metric

from lightning_lora.hosts import Host, is_linear_like, stacks
from lightning_lora.weights import Storage, storage_of

SUPPORTED = (
    "torch.nn.Linear and what is linear like it, nn.Embedding, Bilinear, Conv1d to 3d, ConvTranspose1d to 3d,"
    " MultiheadAttention, RNN, LSTM and GRU, transformers' Conv1D, and stacks of experts; into any other parameter by"
    " `target_parameters`"
)

LAYERS = (
    nn.Linear,
    nn.Bilinear,
    nn.Embedding,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
"""Whose ``weight`` is adapted."""


@dataclasses.dataclass(frozen=True)
class Target:
    """One weight that gets an adapter, or could."""

    name: str
    """Of the module, where its ``weight`` is meant, else of the parameter."""
    owner: str
    module: nn.Module
    parameter: str
    layer: nn.Module
    """Which multiplies by the weight: ``module``, or the one that has it as a parametrization."""
    aliases: tuple[str, ...] = ()
    """All names of the module; it has several where it stands in several places."""
    layer_aliases: tuple[str, ...] = ()
    asked: int = 0
    """The rank that the options give to it."""
    rank: int = 0
    """The rank that it can have."""

    @property
    def weight(self) -> Tensor:
        """Return the parameter as it stands in its module."""
        weight = self.module._parameters[self.parameter]
        assert weight is not None
        return weight

    @property
    def stored(self) -> Storage:
        """Return how the weight is stored."""
        return storage_of(self.module, self.parameter)

    @property
    def kind(self) -> str:
        """Return the name of the layer's class."""
        return type(self.layer).__name__

    @property
    def names(self) -> tuple[str, ...]:
        """Return every name by which a pattern may mean it: the parameter's, and the layer's."""
        return *(joined(alias, self.parameter) for alias in self.aliases), *self.layer_aliases

    @property
    def sides(self) -> tuple[int, int]:
        """Return (m, n) of the matrix, as it is stored."""
        shape = self.stored.shape
        return shape[-2:] if stacks(self.layer, self.weight) else (shape[0], math.prod(shape[1:]))  # type: ignore[return-value]

    @property
    def numel(self) -> int:
        """Return how many entries the weight has; 0 where that is not known."""
        weight = self.module._parameters.get(self.parameter)
        return 0 if weight is None or isinstance(weight, UninitializedParameter) else math.prod(self.stored.shape)


def joined(owner: str, parameter: str) -> str:
    """Return the name of an adapter: the module's for its ``weight``, else the parameter's."""
    return owner if parameter == "weight" and owner else f"{owner}.{parameter}".lstrip(".")


def own_weights(layer: nn.Module) -> list[tuple[nn.Module, str]]:
    """Find the parameters by which ``layer`` itself multiplies its input, each with the module that holds it.

    Of a weight that is computed from another parameter, as by ``spectral_norm``, the latter is meant; by
    ``weight_norm``, the directions.
    There is none where ``layer`` is a layer of no kind.
    """
    if isinstance(layer, LAYERS) or is_linear_like(layer) or _is_linear_by_shape(layer):
        return [_source(layer, "weight")]
    if by_sides := _matrices_by_sides(layer):
        return [(layer, name) for name in by_sides]
    if isinstance(layer, nn.MultiheadAttention | nn.RNNBase | nn.RNNCellBase):
        present = [name for name, p in layer._parameters.items() if p is not None]
        present += getattr(layer, "parametrizations", {})
        names = dict.fromkeys(re.sub("_(g|v|orig)$", "", name) for name in present if "weight" in name)
        return [_source(layer, name) for name in names]
    return [(layer, name) for name in _expert_stacks(layer)]


def _source(layer: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Return the module and the name of the parameter from which the weight ``name`` is computed, or itself."""
    for key in (name, f"{name}_v", f"{name}_orig"):
        if layer._parameters.get(key) is not None:
            return layer, key
    parts: Any = dict(getattr(layer, "parametrizations", {})).get(name)
    if parts is not None and not isinstance(layer, nn.Embedding):
        if "original" in parts._parameters:
            return parts, "original"
        if [type(part).__name__ for part in parts] == ["_WeightNorm"]:
            return parts, "original1"
    return layer, name


def _is_linear_by_shape(layer: nn.Module) -> bool:
    """Return whether ``layer`` has the attributes of a Linear, as torch_geometric's own: its ``weight`` is a matrix."""
    if not any(hasattr(layer, f"in_{x}") and hasattr(layer, f"out_{x}") for x in ("features", "channels")):
        return False
    owner, key = _source(layer, "weight")
    weight = owner._parameters.get(key)
    return isinstance(weight, UninitializedParameter) or (
        weight is not None and weight.dim() == 2 and weight.is_floating_point()
    )


def _matrices_by_sides(layer: nn.Module) -> list[str]:
    """Return the parameters whose last two sides are the inputs and the outputs that ``layer`` says it has.

    So the layers of torch_geometric hold a matrix for each relation, or for each step.
    """
    sides = [
        {getattr(layer, f"in_{x}"), getattr(layer, f"out_{x}")}
        for x in ("features", "channels")
        if all(type(getattr(layer, f"{way}_{x}", None)) is int for way in ("in", "out"))
    ]
    return [
        name
        for name, p in layer._parameters.items()
        if p is not None
        and not isinstance(p, UninitializedParameter)
        and (p.dim() in (2, 3) and p.is_floating_point() and min(p.shape[-2:]) > 1 and set(p.shape[-2:]) in sides)
    ]


def is_bare(parameter: Tensor) -> bool:
    """Return whether ``parameter``, of no layer, could be a matrix by which a module multiplies."""
    known = not isinstance(parameter, UninitializedParameter) and parameter.layout is torch.strided
    return known and parameter.is_floating_point() and parameter.dim() > 1 and min(parameter.shape[-2:]) > 1


def _expert_stacks(module: nn.Module) -> list[str]:
    """Return the parameters (k, m, n) of a module of experts, known by its class's name or by their number k in it."""
    counts = {value for name, value in vars(module).items() if "expert" in name and type(value) is int}
    by_name = "expert" in type(module).__name__.lower()
    if not by_name and not counts:
        return []
    return [
        name
        for name, p in module._parameters.items()
        if p is not None
        and not isinstance(p, UninitializedParameter)
        and (p.dim() == 3 and p.is_floating_point() and min(p.shape[1:]) > 1)
        and (by_name or p.shape[0] in counts)
    ]


def output_heads(root: nn.Module) -> set[nn.Module]:
    """Return the output embeddings of every Hugging Face model in ``root``, and every layer tied to an embedding."""
    getters = (getattr(module, "get_output_embeddings", None) for module in root.modules())
    heads = [getter() for getter in getters if callable(getter)]
    embedded = {module._parameters.get("weight") for module in root.modules() if isinstance(module, nn.Embedding)}
    tied = {module for module in root.modules() if module._parameters.get("weight") in embedded - {None}}
    return tied | {module for head in heads if isinstance(head, nn.Module) for module in head.modules()}


def outside_metrics(module: nn.Module) -> set[nn.Module]:
    """Return ``module`` and all inside it but what is in a torchmetrics metric, whose networks judge."""
    reached: set[nn.Module] = set()
    waiting = [module]
    while waiting:
        if (module := waiting.pop()) not in reached and not isinstance(module, Metric):
            reached.add(module)
            waiting += module.children()
    return reached


def obstacle_of(target: Target, gradient: str) -> tuple[str, str] | None:
    """Say why the weight of ``target`` cannot carry an adapter, in a word or two and in a sentence; None if it can."""
    name, module = f"{target.name!r} ({target.kind})", target.module
    if hasattr(module, "lora") and not isinstance(module, Host):
        return "attribute `lora`", f"{name} has an attribute `lora`, the name an adapter is kept under."
    weight = module._parameters.get(target.parameter)
    if weight is None:
        parts = dict(getattr(module, "parametrizations", {})).get(target.parameter, ())
        kinds = [type(part).__name__.lstrip("_") for part in parts]
        words = " and ".join(re.sub("(?<=[a-z])(?=[A-Z])", " ", kind).lower() for kind in kinds)
        return words or "computed weight", (
            f"The weight of {name} is computed by a parametrization or a hook, so no adapter can be merged into it."
            " Remove the parametrization, or name the module in `exclude_modules`."
        )
    if isinstance(weight, UninitializedParameter):
        return "lazy", f"{name} is lazy and its shape is not known yet. Run one batch through the module before `fit`."
    if weight.is_meta:
        return "meta device", (
            f"The weight of {name} is on the meta device: it has no values to adapt. Load or materialise the model in"
            " `__init__`, `setup` or `configure_model`."
        )
    if weight.layout != torch.strided:
        return "sparse", f"{name} is sparse ({weight.layout}), and its increment is dense."
    if weight.is_complex():
        return "complex", f"The weight of {name} is {weight.dtype}, and adapters are of real numbers."
    is_real = weight.dim() >= 2 and weight.is_floating_point() and weight.dtype.itemsize >= 2
    if not is_real and not target.stored.read_only:
        return "quantised", (
            f"The weight of {name} is stored as {weight.dtype} in the shape {tuple(weight.shape)}. Of quantised"
            " weights, those of bitsandbytes' `Linear8bitLt` and `Linear4bit` are supported, and torchao's in a Linear."
        )
    if not isinstance(module, nn.Embedding):
        return None
    if module.sparse:
        return "sparse", (
            f"{name} is an Embedding with `sparse=True`. The gradients of its adapter are dense; use `sparse=False`."
        )
    if module.max_norm is not None:
        return "max_norm", (
            f"{name} is an Embedding with `max_norm={module.max_norm}`, which rewrites the frozen weight in forward."
        )
    if module.scale_grad_by_freq and gradient != "projected":
        return "scale_grad_by_freq", (
            f"{name} is an Embedding with `scale_grad_by_freq=True`, which only `gradient='projected'` supports."
        )
    return None
