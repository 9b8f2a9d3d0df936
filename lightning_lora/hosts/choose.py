"""What kind of layer a module is, and which forward its adapter gives it."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils.parametrize import ParametrizationList

from lightning_lora._compat import convolution_of
from lightning_lora.hosts import forwards
from lightning_lora.hosts.host import Forward, Host
from lightning_lora.weights import storage_of

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def _conv1d() -> type[nn.Module] | None:
    """Return the class ``Conv1D``, if transformers has been imported; where it has not, no module can be one."""
    return getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)


def _is_conv1d(module: nn.Module) -> bool:
    conv1d = _conv1d()
    return conv1d is not None and isinstance(module, conv1d)


def is_linear_like(module: nn.Module) -> bool:
    """Return whether ``module`` computes X W."""
    return isinstance(module, nn.Linear) or _is_conv1d(module)


def is_transposed(module: nn.Module) -> bool:
    """Return whether the weight of ``module`` is stored (n, m)."""
    return isinstance(module, nn.Embedding) or _is_conv1d(module)


def zero_factor(module: nn.Module) -> tuple[str]:
    """Return which factor starts at zero, as in PEFT: A for embeddings, B elsewhere."""
    return ("A",) if isinstance(module, nn.Embedding) else ("B",)


def stacks(module: nn.Module, weight: Tensor) -> bool:
    """Return whether ``weight`` (k, m, n) is a stack of k matrices, such as one for each expert, and no filter."""
    return weight.dim() == 3 and not isinstance(module, (*CONVOLUTIONS, nn.ConvTranspose1d, nn.Bilinear))


def exact_forward(module: nn.Module, gradient: str, rescales: bool = False) -> Forward | None:
    """Return a forward that takes the adapter of ``module.weight`` into account by thin products, or None.

    It must be known exactly what the module does: its own forward is the one of a layer of torch's, or of transformers'
    ``Conv1D``. Any other may scale, mask, normalise or quantise the weight; it reads W. The output projection of a
    MultiheadAttention is never called: its parent reads its weight. Where the increment ``rescales`` the weight, thin
    products of X and dY do not give the gradient of the gain in merged mode.
    """
    if gradient == "projected" or (rescales and gradient == "merged"):
        return None
    factored = gradient == "factored"
    if storage_of(module).read_only:
        return forwards.quantized_linear if factored else None
    if "forward" in vars(module) or isinstance(module, NonDynamicallyQuantizableLinear):
        return None
    kind: Any = type(module)
    own = kind.forward
    if own is nn.Linear.forward:
        return forwards.linear if factored else forwards.merged_linear
    if own is nn.Embedding.forward:
        return forwards.embedding if factored else forwards.merged_embedding
    if any(own is convolution.forward for convolution in CONVOLUTIONS) and _convolves_as_torch(kind):
        return forwards.convolution if factored else forwards.merged_convolution
    if own is getattr(_conv1d(), "forward", None):
        return forwards.conv1d_of_transformers if factored else forwards.merged_conv1d_of_transformers
    return None


def _convolves_as_torch(kind: Any) -> bool:
    """Return whether the class ``kind`` convolves as one of torch's layers does."""
    own = convolution_of(kind)
    return own is not None and any(own is convolution_of(convolution) for convolution in CONVOLUTIONS)


def layer_of(module: nn.Module, parameter: str) -> str:
    """Name the layer that multiplies by ``parameter`` of ``module``, for formats that have a layout for each kind.

    Returns:
        ``"Linear"``, ``"Conv1D"``, ``"Embedding"``, ``"Conv1d"`` to ``"Conv3d"``: that layer, with its own forward and
        neither groups nor dilation. ``"MultiheadAttention"``: ``in_proj_weight``, or the weight of ``out_proj``.
        ``"parameter"``: a matrix or a stack of matrices that the module reads by its name;
        ``"transposed parameter"``: the same, and the module says that it stores inputs before outputs. Else the name of
        the class.
    """
    kind: Any = module.base_class if isinstance(module, Host) else type(module)
    weight = module._parameters[parameter]
    attends = isinstance(module, nn.MultiheadAttention) and parameter == "in_proj_weight"
    if attends or isinstance(module, NonDynamicallyQuantizableLinear):
        return nn.MultiheadAttention.__name__
    if storage_of(module).read_only:
        return nn.Linear.__name__
    if isinstance(module, CONVOLUTIONS) and parameter == "weight":
        plain = module.groups == 1 and set(module.dilation) == {1} and module.padding_mode == "zeros"
        if not plain or not _convolves_as_torch(kind):
            return f"{kind.__name__} with groups, dilation, padding or a forward of its own"
    if parameter == "weight" and "forward" not in vars(module):
        for layer in (nn.Linear, nn.Embedding, *CONVOLUTIONS, _conv1d()):
            if layer is not None and kind.forward is layer.forward and isinstance(module, layer):
                return layer.__name__
    others = isinstance(module, nn.RNNBase | nn.MultiheadAttention | ParametrizationList)
    if weight is None or others or not (weight.dim() == 2 or stacks(module, weight)):
        return kind.__name__
    return "transposed parameter" if getattr(module, "is_transposed", False) is True else "parameter"
