"""Which host a module needs."""

from __future__ import annotations

import sys

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lightning_lora.hosts.conv import FactoredConvHost, MergedConvHost
from lightning_lora.hosts.embedding import FactoredEmbeddingHost, MergedEmbeddingHost
from lightning_lora.hosts.host import LayerHost
from lightning_lora.hosts.linear import FusedConv1DHost, FusedLinearHost, LinearHost, MergedLinearHost
from lightning_lora.hosts.quantized import QuantizedLinearHost
from lightning_lora.weights.quantized import storage_of

SUPPORTED = (
    "torch.nn.Linear and its subclasses, nn.Embedding, Conv1d, Conv2d, Conv3d, MultiheadAttention, RNN, LSTM and GRU,"
    " and transformers' Conv1D; into any other parameter by `target_parameters`"
)

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def _conv1d() -> type[nn.Module] | None:
    """The class ``Conv1D``, if transformers has been imported; where it has not, no module can be one."""
    return getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)


def _is_conv1d(module: nn.Module) -> bool:
    conv1d = _conv1d()
    return conv1d is not None and isinstance(module, conv1d)


def is_linear_like(module: nn.Module) -> bool:
    """Whether ``module`` computes X W."""
    return isinstance(module, nn.Linear) or _is_conv1d(module)


def is_transposed(module: nn.Module) -> bool:
    """Whether the weight of ``module`` is stored (n, m)."""
    return isinstance(module, nn.Embedding) or _is_conv1d(module)


def _has_own_forward(module: nn.Module) -> bool:
    """Whether ``module`` is of a subclass that does something else than its supported base."""
    bases = (nn.Linear, *CONVOLUTIONS, nn.Embedding, _conv1d())
    return not any(base is not None and type(module).forward is base.forward for base in bases)


def zero_factor(module: nn.Module) -> tuple[str]:
    """Which factor starts at zero, as in PEFT: A for embeddings, B elsewhere."""
    return ("A",) if isinstance(module, nn.Embedding) else ("B",)


def own_matrices(module: nn.Module) -> list[str]:
    """The weights of a MultiheadAttention, RNN, LSTM or GRU that are its own and not those of a child."""
    if not isinstance(module, nn.MultiheadAttention | nn.RNNBase):
        return []
    return [name for name, p in module._parameters.items() if p is not None and "weight" in name and p.dim() == 2]


def stacks(module: nn.Module, weight: Tensor) -> bool:
    """Whether ``weight`` (k, m, n) is a stack of k matrices, such as one for each expert, and no filter."""
    return weight.dim() == 3 and not isinstance(module, (*CONVOLUTIONS, nn.ConvTranspose1d, nn.Bilinear))


def is_supported(module: nn.Module) -> bool:
    """Whether ``module`` can be named in ``target_modules``."""
    layers = (nn.Embedding, *CONVOLUTIONS, nn.MultiheadAttention, nn.RNNBase)
    return is_linear_like(module) or isinstance(module, layers)


def layer_host(module: nn.Module, gradient: str, rescales: bool = False) -> type[LayerHost] | None:
    """The mixin that carries an adapter for the weight of ``module``; None where only its parameters can be adapted.

    The output projection of a MultiheadAttention is a Linear that is never called: its parent reads its weight. Where
    the increment ``rescales`` the weight, thin products of X and dY do not give the gradient of the gain, and what a
    forward of the module's own adds to the layer's output is not to be rescaled.
    """
    if gradient == "projected" or isinstance(module, NonDynamicallyQuantizableLinear):
        return None
    if rescales and (gradient == "merged" or _has_own_forward(module)):
        return None
    factored = gradient == "factored"
    if factored and storage_of(module) is not None:
        return QuantizedLinearHost
    if is_linear_like(module):
        if not factored:
            return MergedLinearHost
        fused = {nn.Linear: FusedLinearHost, _conv1d(): FusedConv1DHost}
        return fused.get(type(module), LinearHost)
    if isinstance(module, CONVOLUTIONS):
        return FactoredConvHost if factored else MergedConvHost
    if isinstance(module, nn.Embedding):
        return FactoredEmbeddingHost if factored else MergedEmbeddingHost
    return None
