"""What the increment of a weight is: the product B^T A, its start, and how it is folded into a weight and out again."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora import draws
from lightning_lora.rounding import round_stochastically


class Adapter(nn.Module):
    """The low-rank increment ``scale * B.T @ A`` of one weight (seed, eq. 1, with torch's transposed layout).

    The weight is taken as a matrix (m, n) that maps n inputs to m outputs; that of a convolution as (out, in * kernel),
    a stack of matrices (k, m, n) as k matrices. Factors are stored rank-major. Both keep their dtype when the module
    around them is cast (``.half()``, ``.to(torch.bfloat16)``, the ``*-true`` precisions of Lightning); only the device
    follows.

    Args:
        A: Projection of the inputs, (r, n) or (k, r, n).
        B: Projection of the outputs, (r, m) or (k, r, m), same dtype as ``A``.
        shape: That of the weight; by default the matrix's, as it is stored.
        scale: alpha / r, or alpha / sqrt(r) for rsLoRA.
        dropout: Probability that an input of the increment is zeroed while training.
        transposed: Whether the weight is stored (n, m), as those of ``nn.Embedding`` and Hugging Face's ``Conv1D``.
        zero: Which factor is zero where the increment is: ``"A"`` or ``"B"``.
        key: What its draws depend on, with its factors.
    """

    def __init__(
        self,
        A: Tensor,
        B: Tensor,
        shape: Sequence[int] | None = None,
        scale: float = 1.0,
        dropout: float = 0.0,
        transposed: bool = False,
        zero: str = "B",
        key: str = "",
    ) -> None:
        super().__init__()
        self.A = nn.Parameter(A)
        self.B = nn.Parameter(B)
        sides = (A.shape[-1], B.shape[-1]) if transposed else (B.shape[-1], A.shape[-1])
        self.shape = (*A.shape[:-2], *sides) if shape is None else tuple(shape)
        self.scale = scale
        self.dropout = dropout
        self.transposed = transposed
        self.zero = zero
        self.key = key
        # `nn.TransformerEncoderLayer` has a fast path for inference which reads its Linears' weights and never calls
        # them. A hook anywhere below it turns that path off; this module itself is never called.
        self.register_forward_pre_hook(_never_called)

    @classmethod
    def initial(
        cls, weight: Tensor, rank: int, seed: int, name: str, dtype: torch.dtype, stacked: bool = False, **kwargs: Any
    ) -> Adapter:
        """An adapter for ``weight`` whose increment is zero, drawn on the CPU from ``(seed, name)`` alone, as in PEFT.

        Where ``stacked``, the first dimension of ``weight`` counts matrices.

        A ~ U(-1/sqrt(n), 1/sqrt(n)), which is ``kaiming_uniform_(a=sqrt(5))``, and B = 0. With ``zero="A"``, for
        embeddings, whose n is the size of the vocabulary, A = 0 and B ~ N(0, 1).
        """
        *stack, m, n = weight.shape if stacked else weight.flatten(1).shape
        m, n = (n, m) if kwargs.get("transposed") else (m, n)
        # Lightning injects under contexts that set the default dtype and device
        A, B = (torch.zeros(*stack, rank, side, dtype=torch.float32, device="cpu") for side in (n, m))
        key = f"{seed}/{name}"
        generator = draws.generator(key)
        if kwargs.get("zero") == "A":
            B.normal_(generator=generator)
        else:
            A.uniform_(-1 / math.sqrt(n), 1 / math.sqrt(n), generator=generator)
        return cls(A.to(weight.device, dtype), B.to(weight.device, dtype), weight.shape, key=key, **kwargs)

    @property
    def rank(self) -> int:
        """r, the number of rows of A and B."""
        return self.A.shape[-2]

    @torch.no_grad()
    def delta_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """``scale * B.T @ A`` in the weight's layout and shape, at least in ``dtype``."""
        dtype = torch.promote_types(self.A.dtype, dtype)
        A, B = self.A.to(dtype), self.B.to(dtype)
        with torch.autocast(A.device.type, enabled=False):
            delta = self.scale * (A.mT @ B if self.transposed else B.mT @ A)
        return delta.view(self.shape)

    def project(self, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """dA = s B G and dB = s A G^T from the full gradient G = dL/dW (seed, eq. grad-1), in the dtype of G."""
        gradient = gradient.flatten(self.A.dim() - 1)
        gradient = gradient.mT if self.transposed else gradient
        A, B = self.A.to(gradient.dtype), self.B.to(gradient.dtype)
        return self.scale * (B @ gradient), self.scale * (A @ gradient.mT)

    @torch.no_grad()
    def folded_into(self, weight: Tensor) -> Tensor:
        """W = W0 + delta in the dtype of W0, rounded once from at least float32; W0 itself where delta is zero."""
        if self._is_zero():
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
        if self._is_zero():
            return weight.detach().clone(), 0.0
        delta = self.delta_weight(torch.promote_types(weight.dtype, torch.float32))
        base = (weight.to(delta.dtype) - delta).to(weight.dtype)
        roundoff = (torch.finfo(delta.dtype).eps + torch.finfo(weight.dtype).eps) / 2
        largest = weight.abs().max().item() + base.abs().max().item()
        subnormal = torch.finfo(weight.dtype).smallest_normal * torch.finfo(weight.dtype).eps
        return base, roundoff * (1 + roundoff) * largest + subnormal

    @torch.no_grad()
    def follow(self, weight: Tensor, A: Tensor, B: Tensor) -> None:
        """Takes ``weight``, which holds the increment of ``A`` and ``B``, to that of the factors as they are now.

        With the new factors A', B' it adds s ((B' - B)^T A' + B^T (A' - A)), one product of rank 2r, and never forms a
        difference of two large products. A weight below float32 would lose every update smaller than half an ulp: it
        is rounded stochastically, by draws that depend on ``key`` and the new factors alone.
        """
        dtype = torch.promote_types(torch.promote_types(A.dtype, weight.dtype), torch.float32)
        A, B, A_next, B_next = (factor.to(dtype) for factor in (A, B, self.A, self.B))
        left = torch.cat([B_next - B, B], dim=-2)
        right = torch.cat([A_next, A_next - A], dim=-2)
        if not (left[..., : self.rank, :].any() or right[..., self.rank :, :].any()):
            return
        if self.transposed:
            left, right = right, left
        with torch.autocast(weight.device.type, enabled=False):  # which is on in a manual optimization's step
            if weight.dtype.itemsize < 4:
                step = self.scale * (left.mT @ right).view(self.shape)
                generator = draws.generator(self.key, *(draws.digest(factor) for factor in (self.A, self.B)))
                weight.copy_(round_stochastically(weight.float() + step, weight.dtype, generator))
            elif left.dim() == 2 and weight.is_contiguous():
                weight.view(weight.shape[0], -1).addmm_(
                    left.to(weight.dtype).mT, right.to(weight.dtype), alpha=self.scale
                )
            else:
                weight.add_((left.mT @ right).view(self.shape), alpha=self.scale)

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs to make this adapter again; tensors and primitives only."""
        return {
            "A": self.A.detach(),
            "B": self.B.detach(),
            "shape": list(self.shape),
            "scale": self.scale,
            "transposed": self.transposed,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Adapter:
        """The adapter that ``state`` was taken of."""
        return cls(**state)

    def extra_repr(self) -> str:
        stack = f"{self.A.shape[0]} x " if self.A.dim() == 3 else ""
        n, m = self.A.shape[-1], self.B.shape[-1]
        return f"{stack}{n} -> {m}, rank={self.rank}, scale={self.scale:g}, dtype={self.A.dtype}"

    def _is_zero(self) -> bool:
        return not (self.A.any() and self.B.any())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Adapter:
        def keep_dtype(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            return result if result.dtype == tensor.dtype else tensor.to(result.device)

        return super()._apply(keep_dtype, recurse)


def _never_called(*_: Any) -> None:
    raise RuntimeError("An adapter is not a layer: call the module that carries it.")
