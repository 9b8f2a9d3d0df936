"""Draws the projections anew while training, and carries the optimizer's moments over."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer

from lightning_lora.adapters import Adapter
from lightning_lora.errors import LoRAError, warn
from lightning_lora.weights import assign, full_states
from lightning_lora.weights.full_precision import full_precision

FIRST_MOMENTS = ("momentum_buffer", "exp_avg")
SECOND_MOMENTS = ("exp_avg_sq", "max_exp_avg_sq")
DOUBLINGS = 12
"""Of the number of terms of the series in :func:`_inverse`."""


def check_moments(optimizer: Optimizer, moments: str) -> None:
    """Raise ``LoRAError`` if what ``optimizer`` keeps is not known, so that only a reset is safe."""
    if moments != "reset" and not isinstance(optimizer, SGD | Adam | AdamW):
        raise LoRAError(
            f"`resample_moments={moments!r}` supports SGD, Adam and AdamW, and what {type(optimizer).__name__} keeps"
            " for each parameter is not known. Use `resample_moments='reset'`."
        )


def warn_of_decay(optimizer: Optimizer, factors: set[nn.Parameter]) -> None:
    """Warn if ``optimizer`` shrinks ``factors``, both of them drawn."""
    for group in optimizer.param_groups:
        if group.get("weight_decay") and not factors.isdisjoint(group["params"]):
            warn(
                f"{type(optimizer).__name__} has `weight_decay={group['weight_decay']}`, which shrinks A and B. They"
                " are random with `resample='both'`, so what it adds to the weights is noise. Use `weight_decay=0`."
            )


@torch.no_grad()
def draw_anew(drawn: Mapping[Adapter, Adapter], optimizer: Optimizer, moments: str) -> None:
    """Draws the factors of adapters anew, whose increments their weights have kept, and treats the moments of these.

    ``"transfer"``: the gradient of B is s A G^T. With A_new in the place of A, a mean M of such gradients becomes

        M_new = A_new A^+ M,  A^+ = A^T (A A^T)^-1

    which is A_new times the smallest G^T that A takes to M, and likewise for A with B. Flora (Hao et al., 2024) has
    A_new A^T M, which is n/r times as large. Second moments are replaced by their mean over the r rows: the rows are
    drawn alike, so they have one expectation. Step counts go on. ``"reset"``: all state is forgotten (:func:`forget`).

    Args:
        drawn: Adapter -> the same with full tensors; itself where it is not sharded.
        optimizer: The one that has their factors.
        moments: What becomes of its moments; those that are sharded are gathered by one collective.
    """
    transfers: list[tuple[dict[str, Tensor], Tensor, Tensor]] = []
    for adapter, full in drawn.items():
        A, B = full.A.detach().clone(), full.B.detach().clone()
        adapter.drawn_at = full.drawn_at = adapter.steps
        full.draw()
        if full is not adapter:
            adapter.load_tensors(full.state_dict())
        for factor, old, new in ((adapter.A, B, full.B.detach()), (adapter.B, A, full.A.detach())):
            state = optimizer.state.get(factor, {}) if moments == "transfer" else {}
            known = {name: state[name] for name in (*FIRST_MOMENTS, *SECOND_MOMENTS) if state.get(name) is not None}
            transfers.append((known, old, new))
    for (state, old, new), full_moments in zip(transfers, full_states([state for state, *_ in transfers]), strict=True):
        with torch.autocast(old.device.type, enabled=False):  # which is on in a manual optimization's step
            _transfer(state, full_moments, old, new)


def forget(adapter: Adapter, optimizer: Optimizer) -> None:
    """Before the first step after a draw: forgets what the ``optimizer`` keeps for the factors that were drawn.

    Not at the draw itself: a folder of parts that is saved in between needs the states of all that is trained. What is
    left is what a new optimizer has: nothing, but for Adagrad, which fills its state at once.
    """
    if adapter.steps == adapter.drawn_at:
        for factor in adapter.trained.values():
            optimizer.state.pop(factor, None)
            if isinstance(optimizer, Adagrad):
                optimizer.state.update(Adagrad([factor], **optimizer.defaults).state)


def _inverse(gram: Tensor) -> Tensor:
    """Return the inverse of ``gram`` (r, r), symmetric and not negative; small eigenvalues are hardly inverted.

    A square projection, of a rank as large as its side, can be nearly singular. With a bound b of the eigenvalues, the
    series (1 + E + E^2 + ...) / b of E = 1 - gram / b has 2^12 terms here, taken by twelve doublings. An eigenvalue l
    becomes (1 - (1 - l/b)^4096) / l: that is 1/l to 1e-12 for those above b/150, and never more than 4096/b. Products
    alone, and no decomposition, for whose success the host would wait.
    """
    bound = gram.abs().sum(-1, keepdim=True).amax(-2, keepdim=True)
    one = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    rest, series = one - gram / bound, one / bound
    for _ in range(DOUBLINGS):
        series = series + rest @ series
        rest = rest @ rest
    return series


@full_precision()
def _transfer(state: dict[str, Tensor], full: dict[str, Tensor], old: Tensor, new: Tensor) -> None:
    """Carry the moments in ``state``, whose full tensors are ``full``, from the projection ``old`` to ``new``."""
    dtype, old, new = torch.promote_types(old.dtype, torch.float32), old.double(), new.double()
    for name, moment in full.items():
        if name in FIRST_MOMENTS:
            assign(state[name], (new @ old.mT @ _inverse(old @ old.mT)).to(dtype) @ moment.to(dtype))
        else:
            assign(state[name], moment.mean(-2, keepdim=True).expand(moment.shape))
