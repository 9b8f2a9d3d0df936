"""Linear, its subclasses, and Hugging Face's Conv1D."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lightning_lora.gradients import factored, merged
from lightning_lora.gradients.presents import presents
from lightning_lora.gradients.transforms import is_watched
from lightning_lora.hosts.host import LayerHost


class LinearHost(LayerHost):
    """A Linear-like module. Whatever its own forward is, the increment is added to what it gives."""

    holds_increment = False

    @presents(lambda host, *args, **kwargs: host.forward(*args, **kwargs))
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        y = factored.add(super().forward(*args, **kwargs), _first(args, kwargs), self.lora, self.training)
        return self.rescaled(y)


class FusedLinearHost(LinearHost):
    """Exactly :class:`torch.nn.Linear`: one function computes its product and the increment."""

    weight: Tensor
    bias: Tensor | None

    @presents(nn.Linear.forward)
    def forward(self, input: Tensor) -> Tensor:
        return self.rescaled(factored.linear(input, self.weight, self.bias, self.lora, self.training))


class FusedConv1DHost(LinearHost):
    """Exactly ``transformers.pytorch_utils.Conv1D``: a Linear whose weight is stored (n, m)."""

    weight: Tensor
    bias: Tensor

    @presents(lambda host, x: host.forward(x))
    def forward(self, x: Tensor) -> Tensor:
        return self.rescaled(factored.linear(x, self.weight.T, self.bias, self.lora, self.training))


class MergedLinearHost(LayerHost):
    """A Linear-like module whose weight holds the increment: its own forward, with a tap for the gradient."""

    holds_increment = True

    @presents(lambda host, *args, **kwargs: host.forward(*args, **kwargs))
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        y = super().forward(*args, **kwargs)
        return merged.tap_linear(y, _first(args, kwargs), self.lora) if is_watched() else y


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The input of a layer, which its caller may name as it likes."""
    return args[0] if args else next(iter(kwargs.values()))
