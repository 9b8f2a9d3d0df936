"""W = magnitude * V / ||V|| with V = W0 + s B^T A. Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation" (2024)."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_lora.adapters.adapter import Adapter, AdapterState, _bound
from lightning_lora.gradients.transforms import is_transformed
from lightning_lora.weights.full_precision import full_precision


class DoRA(Adapter, decomposition="dora"):
    """A product, and a trained magnitude for each output: the rows of V = W0 + s B^T A get these as their norms.

    ``magnitude`` (m,) or (k, m), float32 at least, starts as the norms of W0. As in the paper (section 4.3) and in
    PEFT, the norms of V are taken as constants by the gradient. ``held_gain``, of the same shape, is the
    magnitude / ||V|| that a weight has in it, where it holds the increment and in files.
    """

    has_projections: ClassVar[bool] = False
    rescales: ClassVar[bool] = True
    per_output: ClassVar[tuple[str, ...]] = ("magnitude", "held_gain")

    magnitude: nn.Parameter
    held_gain: Tensor

    _base: tuple[Any, Tensor] | None = None
    """What W0 was when the squares of its rows' norms were computed, and these."""

    @full_precision()
    def start(self, weight: Tensor, init: str) -> None:
        super().start(weight, init)
        norms = self._norms(weight)
        self.magnitude = nn.Parameter(norms)
        self.register_buffer("held_gain", torch.ones_like(norms) if self.holds else None)

    def gain(self, weight: Tensor) -> Tensor:
        """magnitude / ||V||, where V is given by the weight as it stands: W0, or what holds the increment."""
        if self.holds:  # ||V|| = magnitude / held_gain
            return self._over(self.magnitude.detach() / self.held_gain)
        return self._over(self._norms(weight))

    def _over(self, norms: Tensor) -> Tensor:
        """magnitude / ``norms``; 1, and not trained, for outputs whose weights were all zero and have no direction."""
        zero = self.magnitude == 0
        return torch.where(zero, 1, self.magnitude / torch.where(zero, 1, norms))

    @torch.no_grad()
    def _norms(self, weight: Tensor) -> Tensor:
        """Return ||V||, (m,), of squares ||W0||^2 + 2 s <W0 A^T, B^T> + s^2 <B^T A A^T, B^T>, row by row."""
        A, B = self.increment()
        dtype = torch.promote_types(torch.promote_types(weight.dtype, A.dtype), torch.float32)
        W0, A, B = self.as_matrix(weight).to(dtype), A.to(dtype), B.to(dtype)
        with torch.autocast(W0.device.type, enabled=False):
            cross = self.scale * (2 * (A @ W0.mT) + self.scale * (A @ A.mT) @ B)
            return (self._squares_of_base(weight, W0) + (cross * B).sum(-2)).clamp_min(0).sqrt()

    def _squares_of_base(self, weight: Tensor, W0: Tensor) -> Tensor:
        """Return ||W0||^2 of each row, computed once, and again when ``weight`` was written to; W0 is its matrix."""
        if (
            torch.compiler.is_compiling()
            or is_transformed()
            or type(weight) not in (Tensor, nn.Parameter)
            or weight.is_inference()
        ):
            return torch.linalg.vector_norm(W0, dim=-1).square()
        seen = id(weight), weight.data_ptr(), weight._version, W0.dtype
        if self._base is None or self._base[0] != seen:
            self._base = seen, torch.linalg.vector_norm(W0, dim=-1).square()
        return self._base[1]

    @torch.no_grad()
    @full_precision()
    def folded_into(self, weight: Tensor) -> Tensor:
        """W = gain (W0 + delta) in the dtype of W0, rounded once; W0 itself where that is what it comes to."""
        gain = self._over(self._norms(weight))
        if self._is_zero() and (gain == 1).all():
            return weight.detach().clone()
        factors = self.by_rows(gain).expand(weight.shape)
        return self._rounded_once(weight, lambda W0, delta, rows: (W0 + delta) * factors[rows])

    @torch.no_grad()
    def hold(self, weight: Tensor) -> None:
        """Do the same, and take note of the gain that the weight has in it then."""
        self.held_gain.copy_(self._over(self._norms(weight)))
        super().hold(weight)

    @torch.no_grad()
    @full_precision()
    def folded_out_of(self, weight: Tensor) -> tuple[Tensor, float]:
        """W0 = W / gain - delta, with the bound of a sum, over the smallest gain."""
        factors = self.by_rows(self.held_gain).expand(weight.shape)
        base = self._rounded_once(weight, lambda W, delta, rows: W / factors[rows] - delta)
        smallest = min(1.0, self.held_gain.abs().min().item())
        return base, 2 * _bound(weight, base, self.sum_dtype(weight)) / smallest

    @torch.no_grad()
    @full_precision()
    def take_step(self, weight: Tensor, A: Tensor, B: Tensor, rows: slice | None = None) -> None:
        """V is the weight over the gain that it holds; with V' a step on, the weight is V' times the new gain."""
        dtype = torch.promote_types(self.held_gain.dtype, weight.dtype)
        V = (weight.to(dtype) / self.by_rows(self.held_gain)).contiguous()
        matrix = self.as_matrix(V)
        with torch.autocast(weight.device.type, enabled=False):
            self.add_step(matrix, A.to(dtype), B.to(dtype))
        self.held_gain.copy_(self._over(torch.linalg.vector_norm(matrix, dim=-1)))
        self._write(weight, V * self.by_rows(self.held_gain))

    def without_increment(self, weight: Tensor) -> dict[str, Tensor]:
        norms = torch.linalg.vector_norm(self.as_matrix(weight).to(self.magnitude.dtype), dim=-1)
        state = {**super().without_increment(weight), "magnitude": norms}
        return {**state, "held_gain": torch.ones_like(self.held_gain)} if self.holds else state

    @full_precision()
    def state(self, weight: Tensor) -> AdapterState:
        state = super().state(weight)
        if self.holds:
            return state
        return dataclasses.replace(state, tensors={**state.tensors, "held_gain": self.gain(weight).detach()})
