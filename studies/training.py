"""Methods of adaptation, one loop for all of them, and what is read along the way."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_lora import attach, inject, merged_state_dict
from studies.digits import OLD, Task, batches, pretrained, task

BATCH = 32
STEPS = 160
CHECKPOINTS = (0, 1, 2, 4, 6, 8, 10, 13, 16, 20, 25, 30, 40, 50, 65, 80, 100, 130, 160)
DESCRIBED = (0, 4, 10, 20, 40, 80, 130)
"""Checkpoints at which the step that follows is described."""
OPTIMIZERS = {"AdamW": torch.optim.AdamW, "SGD": torch.optim.SGD}


@dataclass(frozen=True)
class Method:
    """A way to adapt a model.

    Args:
        optimizer: ``"SGD"``, without momentum, or ``"AdamW"``, without weight decay.
        lora: The options of :func:`~lightning_lora.inject`; None trains the weights themselves.
        everything: Without ``lora``: train biases, norms and positions too, not only the weights that LoRA adapts.
    """

    optimizer: str
    lora: dict[str, Any] | None = None
    everything: bool = False


def weight_names(model: nn.Module) -> list[str]:
    """Name the weights that adapters would go into: those of all Linears."""
    return [f"{name}.weight" for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]


def norm(tensors: Sequence[Tensor]) -> float:
    """Return the Frobenius norm of all of ``tensors`` together."""
    return math.sqrt(sum(tensor.square().sum().item() for tensor in tensors))


def inner(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    """Return the inner product of all of ``left`` with all of ``right``."""
    return sum((a * b).sum().item() for a, b in zip(left, right, strict=True))


def effective_rank(matrix: Tensor) -> float:
    """Return exp of the entropy of the shares of the squared singular values: 1 for rank one, r for r equal ones."""
    squares = torch.linalg.svdvals(matrix).square()
    if not squares.sum() > 0:
        return 0.0
    shares = squares / squares.sum()
    return shares.clamp_min(1e-30).log().mul(shares).sum().neg().exp().item()


class Adaptation:
    """A copy of a pretrained model, made ready for a method.

    Args:
        base: The pretrained model; it stays as it is.
        method: What is trained, and how.
        lr: The learning rate.
        seed: Of the adapters' draws.
    """

    def __init__(self, base: nn.Module, method: Method, lr: float, seed: int) -> None:
        self.model, self._plain = copy.deepcopy(base), copy.deepcopy(base)
        self.names = weight_names(base)
        self.start = self._weights(base.state_dict())
        if method.lora is not None:
            with warnings.catch_warnings():  # of ranks that the patches and the head cannot have
                warnings.simplefilter("ignore")
                inject(self.model, seed=seed, **method.lora)
        elif not method.everything:
            for name, parameter in self.model.named_parameters():
                parameter.requires_grad = name in self.names
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.trained = sum(p.numel() for p in trained)
        options = {"weight_decay": 0.0} if method.optimizer == "AdamW" else {}
        self.optimizer = OPTIMIZERS[method.optimizer](trained, lr=lr, **options)
        if method.lora is not None:
            attach(self.model, self.optimizer)

    def backward(self, x: Tensor, y: Tensor) -> Tensor:
        """Compute the loss of a batch and the gradients of what is trained."""
        self.optimizer.zero_grad()
        loss = functional.cross_entropy(self.model(x), y)
        loss.backward()
        return loss.detach()

    def plain(self) -> nn.Module:
        """Return a plain model with the weights of now; the next call overwrites it."""
        self._plain.load_state_dict(merged_state_dict(self.model))
        return self._plain

    def weights(self) -> list[Tensor]:
        """Return W (m, n) of each Linear, as it is now."""
        return self._weights(merged_state_dict(self.model))

    def moved(self) -> list[Tensor]:
        """Return W - W0 (m, n) of each Linear."""
        return [now - start for now, start in zip(self.weights(), self.start, strict=True)]

    def _weights(self, state: dict[str, Tensor]) -> list[Tensor]:
        return [state[name].detach().clone() for name in self.names]


@torch.no_grad()
def evaluate(model: nn.Module, digits: Task) -> dict[str, float]:
    """Return accuracies and losses on both held-out parts.

    ``old`` is the accuracy on 0 to 4 among all ten classes, ``old_of_five`` that among 0 to 4 alone, for which the
    model is told that the digit is an old one.
    """
    new, old = model(digits.new_test.x), model(digits.old_test.x)
    return {
        "new": (new.argmax(1) == digits.new_test.y).float().mean().item(),
        "new_loss": functional.cross_entropy(new, digits.new_test.y).item(),
        "old": (old.argmax(1) == digits.old_test.y).float().mean().item(),
        "old_of_five": (old[:, :OLD].argmax(1) == digits.old_test.y).float().mean().item(),
        "old_loss": functional.cross_entropy(old, digits.old_test.y).item(),
        "old_of_five_loss": functional.cross_entropy(old[:, :OLD], digits.old_test.y).item(),
    }


def old_gradient(model: nn.Module, digits: Task, names: Sequence[str]) -> list[Tensor]:
    """Return the gradient of the old task's loss on 128 training images, for each of the weights ``names``."""
    model.requires_grad_(True)
    loss = functional.cross_entropy(model(digits.old_train.x[:128]), digits.old_train.y[:128])
    parameters = dict(model.named_parameters())
    return list(torch.autograd.grad(loss, [parameters[name] for name in names]))


def run(method: Method, lr: float, seed: int, steps: int = STEPS) -> dict[str, Any]:
    """Adapt the model of ``seed`` to the new task, and read it along the way.

    Args:
        method: How.
        lr: The learning rate.
        seed: Of the split, the pretrained model, the order of batches and the adapters.
        steps: How many.

    Returns:
        ``curve``: a list for each of :func:`evaluate`'s values, of ``step``, of ``distance``, the norm of W - W0 over
        all Linears; shorter ones of :func:`describe_step`'s values at :data:`DESCRIBED`. ``rank``: the effective rank
        of W - W0 at the end. ``trained``: the number of parameters. ``diverged``, and no curve, if a loss was not
        finite.
    """
    digits = task(seed)
    adaptation = Adaptation(pretrained(seed), method, lr, seed)
    order = batches(digits.new_train, BATCH, steps, seed)
    curve: dict[str, list[float]] = {}
    for step in range(steps + 1):
        read = step in CHECKPOINTS or step == steps
        if read:
            moved = adaptation.moved()
            values = {"step": step, **evaluate(adaptation.plain(), digits), "distance": norm(moved)}
            if not math.isfinite(values["new_loss"]):
                return {"lr": lr, "diverged": True, "trained": adaptation.trained}
        if step < steps:
            if step in DESCRIBED:
                before, gradient = adaptation.weights(), old_gradient(adaptation.plain(), digits, adaptation.names)
            adaptation.backward(*order[step])
            adaptation.optimizer.step()
            if step in DESCRIBED:
                taken = [after - b for after, b in zip(adaptation.weights(), before, strict=True)]
                values |= describe_step(taken, gradient)
        if read:
            for name, value in values.items():
                curve.setdefault(name, []).append(value)
    return {"lr": lr, "curve": curve, "rank": mean_rank(moved), "trained": adaptation.trained}


def final_loss(method: Method, lr: float, seed: int, steps: int = STEPS) -> float:
    """Adapt the model of ``seed`` to the new task, and return the loss on its held-out part at the end."""
    digits = task(seed)
    adaptation = Adaptation(pretrained(seed), method, lr, seed)
    for x, y in batches(digits.new_train, BATCH, steps, seed):
        adaptation.backward(x, y)
        adaptation.optimizer.step()
    loss = evaluate(adaptation.plain(), digits)["new_loss"]
    return loss if math.isfinite(loss) else math.inf


def mean_rank(matrices: Sequence[Tensor]) -> float:
    """Return the mean effective rank of ``matrices``, weighted by their part of the squared norm."""
    squares = [matrix.square().sum().item() for matrix in matrices]
    total = sum(squares) or 1.0
    return sum(square / total * effective_rank(matrix) for square, matrix in zip(squares, matrices, strict=True))


def describe_step(taken: Sequence[Tensor], gradient: Sequence[Tensor]) -> dict[str, float]:
    """Return norm, rank and direction of a step; the cosine is positive if the step lowers the old task's loss."""
    size = norm(taken)
    cosine = -inner(taken, gradient) / (size * norm(gradient)) if size and norm(gradient) else 0.0
    return {"step_norm": size, "step_rank": mean_rank(taken), "old_cosine": cosine}
