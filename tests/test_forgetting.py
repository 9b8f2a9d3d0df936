"""Forgetting and backward transfer against values by hand."""

import doctest
import math

import pytest
import torch

import lightning_lora.metrics.continual as module
from lightning_lora.errors import LoRAError
from lightning_lora.metrics import BackwardTransfer, Forgetting, backward_transfer, forgetting

NAN = math.nan
# task 0: best 0.9 (after task 0), ends at 0.5; task 1: best 0.75 (after task 1), ends at 0.7
THREE = [[0.9, 0.2, 0.1], [0.6, 0.75, 0.3], [0.5, 0.7, 0.8]]


def exact(rows):
    return torch.tensor(rows, dtype=torch.float64)


def test_forgetting_is_the_mean_fall_from_the_best():
    assert forgetting(exact(THREE)).item() == pytest.approx((0.4 + 0.05) / 2)


def test_backward_transfer_is_the_mean_change_since_a_task_was_learnt():
    assert backward_transfer(exact(THREE)).item() == pytest.approx((-0.4 - 0.05) / 2)


def test_the_two_differ_where_the_best_is_not_right_after_training():
    later = exact([[0.5, 0.0, 0.0], [0.9, 0.8, 0.0], [0.7, 0.8, 0.9]])
    assert forgetting(later).item() == pytest.approx((0.2 + 0.0) / 2)
    assert backward_transfer(later).item() == pytest.approx((0.2 + 0.0) / 2)  # a gain, with the same number


def test_the_best_of_a_task_may_be_before_it_was_trained_as_in_the_paper():
    before = exact([[0.9, 0.95, 0.0], [0.9, 0.8, 0.0], [0.9, 0.8, 0.9]])
    assert forgetting(before).item() == pytest.approx((0.0 + 0.15) / 2)
    assert backward_transfer(before).item() == pytest.approx(0.0)


def test_what_was_not_measured_is_left_out():
    lower = exact([[0.9, NAN, NAN], [0.6, 0.75, NAN], [0.5, 0.7, NAN]])
    assert forgetting(lower).item() == pytest.approx(0.225)
    assert backward_transfer(lower).item() == pytest.approx(-0.225)
    gap = exact([[NAN, NAN, NAN], [0.6, 0.75, NAN], [0.5, 0.7, 0.8]])
    assert forgetting(gap).item() == pytest.approx((0.1 + 0.05) / 2)
    with pytest.raises(LoRAError, match="right after training"):
        backward_transfer(gap)


def test_later_tasks_that_help_make_forgetting_negative():
    assert forgetting(exact([[0.5, 0.0], [0.75, 1.0]])).item() == pytest.approx(-0.25)


@pytest.mark.parametrize("function", [forgetting, backward_transfer])
@pytest.mark.parametrize(
    ("accuracies", "message"),
    [
        (torch.zeros(2, 3), "square matrix"),
        (torch.zeros(2, 2, dtype=torch.long), "square matrix"),
        (torch.zeros(1, 1), "one task"),
        (torch.tensor([[0.5, 0.5], [NAN, 0.5]]), "last row"),
    ],
)
def test_what_is_no_matrix_of_accuracies_is_refused(function, accuracies, message):
    with pytest.raises(LoRAError, match=message):
        function(accuracies)


def test_a_task_without_any_accuracy_before_the_last_is_refused():
    with pytest.raises(LoRAError, match="each earlier task"):
        forgetting(exact([[NAN, 0.5], [0.5, 0.5]]))


def counted(metric, rows, size=20):
    """Feeds ``metric`` answers that have the accuracies ``rows``, in two batches for each."""
    for trained, row in enumerate(rows):
        for task, accuracy in enumerate(row):
            preds = (torch.arange(size) >= round(accuracy * size)).long()
            for half in preds.chunk(2):
                metric.update(half, torch.zeros_like(half), trained=trained, task=task)
    return metric


@pytest.mark.parametrize(("kind", "expected"), [(Forgetting, 0.225), (BackwardTransfer, -0.225)])
def test_the_metrics_count_over_batches(kind, expected):
    metric = counted(kind(num_tasks=3), THREE)
    assert metric.compute().item() == pytest.approx(expected)
    metric.reset()
    assert metric.total.sum() == 0


def test_the_metrics_are_ready_from_the_second_task_on():
    metric = counted(Forgetting(num_tasks=3), THREE[:1])
    with pytest.raises(LoRAError, match="one task"):
        metric.compute()
    counted(metric, [[], THREE[1]])
    assert metric.compute().item() == pytest.approx(0.3)


def test_scores_count_by_their_largest():
    metric = Forgetting(num_tasks=2)
    scores = torch.tensor([[0.1, 0.9], [0.8, 0.2]])
    metric.update(scores, torch.tensor([1, 0]), trained=0, task=0)
    metric.update(scores, torch.tensor([1, 1]), trained=1, task=0)
    assert metric.compute().item() == pytest.approx(0.5)


def test_processes_add_their_counts():
    few, many = (
        counted(Forgetting(num_tasks=2), [[1.0], [0.5]], 20),
        counted(Forgetting(num_tasks=2), [[0.7], [0.2]], 40),
    )
    together = Forgetting(num_tasks=2)
    for name, reduce in together._reductions.items():
        setattr(together, name, reduce(torch.stack([getattr(part, name) for part in (few, many)])))
    assert together.accuracies()[:, 0].tolist() == pytest.approx([0.8, 0.3])  # of 20 and 40 examples
    assert forgetting(together.accuracies()).item() == pytest.approx(0.5)


def test_bad_updates_are_refused():
    metric = Forgetting(num_tasks=2)
    with pytest.raises(LoRAError, match="must be from 0 to 1"):
        metric.update(torch.zeros(2), torch.zeros(2), trained=2, task=0)
    with pytest.raises(LoRAError, match="`preds` must be"):
        metric.update(torch.zeros(2), torch.zeros(3), trained=0, task=0)
    with pytest.raises(LoRAError, match="at least 2"):
        Forgetting(num_tasks=1)


def test_the_examples_run():
    results = doctest.testmod(module)
    assert results.attempted > 10
    assert results.failed == 0
