"""What the increment of a weight is: the product B^T A, its start, and how it is folded into a weight and out again."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora import draws


class Adapter(nn.Module):
    """The low-rank increment ``scale * B.T @ A`` of one weight (seed, eq. 1, with torch's transposed layout).

    Stored rank-major: ``A`` is (r, n) and ``B`` is (r, m), where the weight maps n inputs to m outputs. Both keep their
    dtype when the module around them is cast (``.half()``, ``.to(torch.bfloat16)``, the ``*-true`` precisions of
    Lightning); only the device follows.

    Args:
        A: Projection of the inputs, (r, n).
        B: Projection of the outputs, (r, m), same dtype as ``A``.
        scale: alpha / r, or alpha / sqrt(r) for rsLoRA.
        dropout: Probability that an input of the increment is zeroed while training.
        transposed: Whether the weight is stored (n, m), as Hugging Face's ``Conv1D`` does, and not (m, n).
    """

    def __init__(self, A: Tensor, B: Tensor, scale: float = 1.0, dropout: float = 0.0, transposed: bool = False):
        super().__init__()
        self.A = nn.Parameter(A)
        self.B = nn.Parameter(B)
        self.scale = scale
        self.dropout = dropout
        self.transposed = transposed
        # `nn.TransformerEncoderLayer` has a fast path for inference which reads its Linears' weights and never calls
        # them. A hook anywhere below it turns that path off; this module itself is never called.
        self.register_forward_pre_hook(_never_called)

    @classmethod
    def initial(cls, weight: Tensor, rank: int, seed: int, name: str, dtype: torch.dtype, **kwargs: Any) -> Adapter:
        """An adapter for ``weight`` that starts at zero: A ~ U(-1/sqrt(n), 1/sqrt(n)), B = 0, as in PEFT.

        That is ``kaiming_uniform_(a=sqrt(5))``, drawn in float32 on the CPU from ``(seed, name)`` alone.
        """
        n, m = weight.shape if kwargs.get("transposed") else reversed(weight.shape)
        A = torch.empty(rank, n, dtype=torch.float32)
        A.uniform_(-1 / math.sqrt(n), 1 / math.sqrt(n), generator=draws.generator(seed, name))
        return cls(A.to(weight.device, dtype), torch.zeros(rank, m, dtype=dtype, device=weight.device), **kwargs)

    @property
    def rank(self) -> int:
        """r, the number of rows of A and B."""
        return self.A.shape[0]

    @torch.no_grad()
    def delta_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """``scale * B.T @ A`` in the weight's layout, (m, n), or (n, m) if ``transposed``; at least in ``dtype``."""
        dtype = torch.promote_types(self.A.dtype, dtype)
        A, B = self.A.to(dtype), self.B.to(dtype)
        return self.scale * (A.T @ B if self.transposed else B.T @ A)

    @torch.no_grad()
    def folded_into(self, weight: Tensor) -> Tensor:
        """W = W0 + delta in the dtype of W0, rounded once from at least float32; W0 itself where B is zero."""
        if not self.B.any():
            return weight.detach().clone()  # not W0 + 0, which would turn -0.0 into 0.0
        delta = self.delta_weight(torch.promote_types(weight.dtype, torch.float32))
        return (weight.to(delta.dtype) + delta).to(weight.dtype)

    @torch.no_grad()
    def folded_out_of(self, weight: Tensor) -> tuple[Tensor, float]:
        """W0 = W - delta in the dtype of W, and a bound of every entry's error if W is what ``folded_into`` gave.

        Both sums are rounded once to the dtype in which they are formed and once to the dtype of W, each time by half
        an ulp at the most: the bound is (u + u') (max|W| + max|W0|), with u, u' the two units of roundoff, plus the
        smallest subnormal for what underflows.
        """
        if not self.B.any():
            return weight.detach().clone(), 0.0
        delta = self.delta_weight(torch.promote_types(weight.dtype, torch.float32))
        base = (weight.to(delta.dtype) - delta).to(weight.dtype)
        roundoff = (torch.finfo(delta.dtype).eps + torch.finfo(weight.dtype).eps) / 2
        largest = weight.abs().max().item() + base.abs().max().item()
        subnormal = torch.finfo(weight.dtype).smallest_normal * torch.finfo(weight.dtype).eps
        return base, roundoff * (1 + roundoff) * largest + subnormal

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs to make this adapter again; tensors and primitives only."""
        return {"A": self.A.detach(), "B": self.B.detach(), "scale": self.scale, "transposed": self.transposed}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Adapter:
        """The adapter that ``state`` was taken of."""
        return cls(state["A"], state["B"], scale=state["scale"], transposed=state["transposed"])

    def extra_repr(self) -> str:
        (rank, n), (_, m) = self.A.shape, self.B.shape
        return f"{n} -> {m}, rank={rank}, scale={self.scale:g}, dtype={self.A.dtype}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Adapter:
        def keep_dtype(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            return result if result.dtype == tensor.dtype else tensor.to(result.device)

        return super()._apply(keep_dtype, recurse)


def _never_called(*_: Any) -> None:
    raise RuntimeError("An adapter is not a layer: call the module that carries it.")
