"""Forgetting and backward transfer over a sequence of tasks: two functions, and two metrics on them.

Both read a matrix R whose entry R[i, j] is the accuracy on task j after training on tasks 0 to i. With k = T - 1, the
last task of T:

    backward transfer = mean over j < k of R[k, j] - R[j, j]                  Lopez-Paz and Ranzato (2017), eq. 3
    forgetting        = mean over j < k of max over i < k of R[i, j] - R[k, j]   Chaudhry et al. (2018), eq. 3

"Gradient Episodic Memory for Continual Learning" (2017); "Riemannian Walk for Incremental Learning" (2018).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_lora.errors import LoRAError


def forgetting(accuracies: Tensor) -> Tensor:
    """Return by how much the accuracy on earlier tasks fell from its best, on average over these tasks.

    Args:
        accuracies: R (T, T), of any floating dtype. NaN where nothing was measured: the best is then taken over the
            rest. The last row must be there, and for each earlier task one entry above it.

    Returns:
        A scalar of the dtype of ``accuracies``. At most 1; below zero if later tasks helped.

    Raises:
        LoRAError: If ``accuracies`` is not such a matrix, or has fewer than two tasks.

    Example::

        >>> import torch
        >>> from lightning_lora.metrics import forgetting
        >>> forgetting(torch.tensor([[0.9, 0.1], [0.6, 0.8]]))
        tensor(0.3000)
    """
    final, earlier = _final_and_earlier(accuracies)
    best = earlier.nan_to_num(nan=-torch.inf).amax(0)
    if (best == -torch.inf).any():
        raise LoRAError("Forgetting needs the accuracy on each earlier task before the last task, not NaN.")
    return (best - final).mean()


def backward_transfer(accuracies: Tensor) -> Tensor:
    """Return how the accuracy on earlier tasks changed since each was learnt, on average over these tasks.

    Args:
        accuracies: R (T, T), of any floating dtype. The last row and the diagonal must be there; the rest is not read.

    Returns:
        A scalar of the dtype of ``accuracies``, from -1 to 1; below zero if the model forgot.

    Raises:
        LoRAError: If ``accuracies`` is not such a matrix, or has fewer than two tasks.

    Example::

        >>> import torch
        >>> from lightning_lora.metrics import backward_transfer
        >>> backward_transfer(torch.tensor([[0.9, 0.1], [0.6, 0.8]]))
        tensor(-0.3000)
    """
    final, earlier = _final_and_earlier(accuracies)
    learnt = earlier.diagonal()
    if learnt.isnan().any():
        raise LoRAError("Backward transfer needs the accuracy on each task right after training on it, not NaN.")
    return (final - learnt).mean()


def _final_and_earlier(accuracies: Tensor) -> tuple[Tensor, Tensor]:
    """Return R[k, :k] and R[:k, :k]."""
    if not accuracies.is_floating_point() or accuracies.dim() != 2 or accuracies.shape[0] != accuracies.shape[1]:
        raise LoRAError(
            "`accuracies` must be a square matrix of floats, its entry (i, j) the accuracy on task j after training on"
            f" task i; got {accuracies.dtype} of shape {tuple(accuracies.shape)}."
        )
    if len(accuracies) < 2:
        raise LoRAError("`accuracies` has one task. There is nothing to forget before the second.")
    if accuracies[-1, :-1].isnan().any():
        raise LoRAError("The last row of `accuracies` must have the accuracy on every earlier task, not NaN.")
    return accuracies[-1, :-1], accuracies[:-1, :-1]


class _OverTasks(Metric):
    """Counts right answers for each pair (trained, task), over batches and processes."""

    is_differentiable = False
    full_state_update = False
    correct: Tensor
    total: Tensor

    def __init__(self, num_tasks: int, **kwargs: Any) -> None:
        if not isinstance(num_tasks, int) or num_tasks < 2:
            raise LoRAError(f"`num_tasks` must be a number of at least 2, got {num_tasks!r}.")
        super().__init__(**kwargs)
        self.num_tasks = num_tasks
        for name in ("correct", "total"):
            counts = torch.zeros(num_tasks, num_tasks, dtype=torch.long)
            self.add_state(name, default=counts, dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor, trained: int, task: int) -> None:
        """Count a batch.

        Args:
            preds: Classes (N,), or scores of classes (N, C), of which the largest counts.
            target: The right classes (N,).
            trained: The last task that was trained, from 0: the row of R.
            task: The task of which this batch is, from 0: the column of R.

        Raises:
            LoRAError: If shapes do not match, or there is no such task.
        """
        if preds.dim() == 2:
            preds = preds.argmax(1)
        if preds.shape != target.shape or target.dim() != 1:
            raise LoRAError(
                f"`preds` must be (N,) or (N, C) and `target` (N,), got {tuple(preds.shape)} and {tuple(target.shape)}."
            )
        for name, index in (("trained", trained), ("task", task)):
            if not 0 <= index < self.num_tasks:
                raise LoRAError(f"`{name}` must be from 0 to {self.num_tasks - 1}, got {index}.")
        self.correct[trained, task] += (preds == target).sum()
        self.total[trained, task] += len(target)

    def accuracies(self) -> Tensor:
        """Return R as far as it was measured, (k + 1, k + 1) with k the last trained task; NaN elsewhere."""
        rows = int(self.total.any(1).nonzero().max()) + 1 if self.total.any() else 0
        return (self.correct / self.total)[:rows, :rows]


class Forgetting(_OverTasks):
    """Measures by how much the accuracy on earlier tasks fell from its best (Chaudhry et al., 2018).

    Args:
        num_tasks: T, at least 2.
        **kwargs: Those of :class:`torchmetrics.Metric`.

    Raises:
        LoRAError: If ``num_tasks`` is below 2; in ``compute``, if the last trained task is the first, or an accuracy is
            missing.

    Example::

        >>> import torch
        >>> from lightning_lora.metrics import Forgetting
        >>> metric = Forgetting(num_tasks=2)
        >>> right = torch.tensor([0, 1, 0, 1])
        >>> metric.update(right, right, trained=0, task=0)
        >>> metric.update(torch.tensor([0, 1, 1, 0]), right, trained=1, task=0)
        >>> metric.compute()
        tensor(0.5000)
    """

    higher_is_better = False

    def compute(self) -> Tensor:
        """Return the forgetting after the last task that was trained, a scalar."""
        return forgetting(self.accuracies())


class BackwardTransfer(_OverTasks):
    """Measures how the accuracy on earlier tasks changed since each was learnt (Lopez-Paz and Ranzato, 2017).

    Args:
        num_tasks: T, at least 2.
        **kwargs: Those of :class:`torchmetrics.Metric`.

    Raises:
        LoRAError: As in :class:`Forgetting`.

    Example::

        >>> import torch
        >>> from lightning_lora.metrics import BackwardTransfer
        >>> metric = BackwardTransfer(num_tasks=2)
        >>> right = torch.tensor([0, 1, 0, 1])
        >>> metric.update(right, right, trained=0, task=0)
        >>> metric.update(torch.tensor([0, 1, 1, 0]), right, trained=1, task=0)
        >>> metric.compute()
        tensor(-0.5000)
    """

    higher_is_better = True

    def compute(self) -> Tensor:
        """Return the backward transfer after the last task that was trained, a scalar."""
        return backward_transfer(self.accuracies())
