"""Forwards of layers that are known exactly: they take the increment into account by thin products.

They stand in the generated class of a host and read its parameters as they are stored.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lora._compat import convolution_of
from lightning_lora.gradients import factored, merged
from lightning_lora.gradients.paths import ConvolutionPath, LookupPath
from lightning_lora.gradients.presents import presents
from lightning_lora.gradients.transforms import is_watched


def _stored(host: Any) -> Tensor:
    """Return the parameter ``weight``, without a path to it unless reading it gives the parameter itself."""
    weight = host._parameters["weight"]
    return weight.detach() if weight.requires_grad and not host.lora.reads_plain else weight


def _is_tapped(host: Any) -> bool:
    return is_watched() and not host.lora.is_aside


def _dropout(host: Any) -> float:
    return host.lora.dropout if host.training else 0.0


def _product(host: Any, x: Tensor, weight: Tensor) -> Tensor:
    adapter = host.lora
    if adapter.is_aside:
        return F.linear(x, weight, host.bias)
    A, B = adapter.increment()
    y = factored.linear(x, weight, host.bias, A, B, adapter.scale, _dropout(host))
    return factored.rescaled(y, adapter.gain(host._parameters["weight"]), host.bias)


@presents(nn.Linear.forward)
def linear(self: Any, input: Tensor) -> Tensor:
    """Compute X W0 + Z B, beside which W0 stays as it is."""
    return _product(self, input, _stored(self))


@presents(lambda host, x: F.linear(x, host.weight.T, host.bias))
def conv1d_of_transformers(self: Any, x: Tensor) -> Tensor:
    """Compute the same for a weight that is stored (n, m)."""
    return _product(self, x, _stored(self).T)


@presents(lambda host, input: convolution_of(host)(input, host.weight, host.bias))
def convolution(self: Any, input: Tensor) -> Tensor:
    """Compute the layer's own convolution and, beside it, those with the filters A and B."""
    adapter, weight = self.lora, _stored(self)
    y = convolution_of(self)(input, weight, self.bias)
    if adapter.is_aside:
        return y
    x = F.dropout(input, adapter.dropout, self.training)
    A, B = (factor.to(x.dtype) for factor in adapter.increment())
    y = _convolution_path(self).add(y, x, A, B, adapter.scale)
    return factored.rescaled(y, adapter.gain(self._parameters["weight"]), self.bias, 1 - weight.dim())


@presents(nn.Embedding.forward)
def embedding(self: Any, input: Tensor) -> Tensor:
    """Look up rows of W0 and of A."""
    adapter, y = self.lora, _lookup(self, input)
    if adapter.is_aside:
        return y
    A, B = (factor.to(y.dtype) for factor in adapter.increment())
    y = LookupPath(self.padding_idx).add(y, input, A, B, adapter.scale)
    return factored.rescaled(y, adapter.gain(self._parameters["weight"]), None)


@presents(nn.Linear.forward)
def merged_linear(self: Any, input: Tensor) -> Tensor:
    """Compute X W with the weight that holds the increment, and tap the output for the gradients."""
    y = F.linear(input, _stored(self), self.bias)
    return merged.tap_linear(y, input, self.lora) if _is_tapped(self) else y


@presents(lambda host, x: F.linear(x, host.weight.T, host.bias))
def merged_conv1d_of_transformers(self: Any, x: Tensor) -> Tensor:
    """Compute the same for a weight that is stored (n, m), by the operation of the layer itself."""
    y = torch.addmm(self.bias, x.view(-1, x.size(-1)), _stored(self)).view(*x.size()[:-1], self.nf)
    return merged.tap_linear(y, x, self.lora) if _is_tapped(self) else y


@presents(lambda host, input: convolution_of(host)(input, host.weight, host.bias))
def merged_convolution(self: Any, input: Tensor) -> Tensor:
    """Compute the layer's own convolution, and tap its output."""
    y = convolution_of(self)(input, _stored(self), self.bias)
    return merged.tap(y, input, self.lora, _convolution_path(self)) if _is_tapped(self) else y


@presents(nn.Embedding.forward)
def merged_embedding(self: Any, input: Tensor) -> Tensor:
    """Look up rows of the weight, and tap the output."""
    y = _lookup(self, input)
    return merged.tap(y, input, self.lora, LookupPath(self.padding_idx)) if _is_tapped(self) else y


def _convolution_path(host: Any) -> ConvolutionPath:
    return ConvolutionPath(lambda x, filters: convolution_of(host)(x, filters, None), host.lora.shape, host.groups)


def _lookup(host: Any, input: Tensor) -> Tensor:
    return F.embedding(
        input,
        _stored(host),
        host.padding_idx,
        host.max_norm,
        host.norm_type,
        host.scale_grad_by_freq,
        host.sparse,
    )


@presents(lambda host, *args, **kwargs: host.base_class.forward(host, *args, **kwargs))
def quantized_linear(self: Any, *args: Any, **kwargs: Any) -> Tensor:
    """Compute the layer's own product with its stored weight, and the increment beside it."""
    y = self.base_class.forward(self, *args, **kwargs)
    adapter = self.lora
    if adapter.is_aside:
        return y
    x = args[0] if args else next(iter(kwargs.values()))
    A, B = adapter.increment()
    return factored.add(y, x, A, B, adapter.scale, _dropout(self))
