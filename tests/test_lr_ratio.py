"""`lr_ratio` (LoRA+): what a parameter group of its own for B would do, with the groups left as they are."""

import copy
import math

import pytest
import torch
from lightning.pytorch import Callback
from models import Digest, Net, ResumableLoader, ScheduledNet, TwoOptimizersNet, trainer
from pairs import pairs
from resume import SaveFirst
from torch import nn
from zoo import ZOO, Zoo

from lightning_lora import LoRA, adapters, attach, inject, merge

GRADIENTS = ["factored", "merged", "projected"]
STEPS, RATIO = 20, 8.0
OPTIMIZERS = {
    "SGD": (torch.optim.SGD, {}),
    "SGD with momentum": (torch.optim.SGD, {"momentum": 0.9}),
    "SGD with Nesterov's momentum and decay": (
        torch.optim.SGD,
        {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    ),
    "Adam": (torch.optim.Adam, {}),
    "AMSGrad with decay": (torch.optim.Adam, {"amsgrad": True, "weight_decay": 0.1}),
    "AdamW with decay": (torch.optim.AdamW, {"weight_decay": 0.1}),
    "AdamW, one tensor at a time": (torch.optim.AdamW, {"weight_decay": 0.1, "foreach": False}),
}


def net(dtype):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 6), nn.Tanh(), nn.Linear(6, 4)).to(dtype)


def problem(dtype):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(16, side, generator=generator, dtype=torch.float64).to(dtype) for side in (8, 4)]


def train(module, optimizer, dtype):
    """Losses, with a rate that falls with every step."""
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.95**step)
    (x, y), losses = problem(dtype), []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(module(x), y)
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    return losses


def adapted(dtype, gradient="factored", **options):
    module = net(dtype)
    inject(module, rank=2, alpha=3, gradient=gradient, adapter_dtype=str(dtype).removeprefix("torch."), **options)
    return module, adapters(module)


@pytest.mark.parametrize(("name", "gradient", "dtype"), pairs(OPTIMIZERS, GRADIENTS, [torch.float32, torch.float64]))
def test_it_equals_groups_of_their_own_for_b(name, gradient, dtype):
    """20 steps, two groups with rates of their own, a scheduler: to 1e-12 in float64, 1e-6 in float32."""
    kind, options = OPTIMIZERS[name]
    lrs = {"0": 2e-3, "2": 1e-3, "4": 1e-3}
    ours, known = adapted(dtype, gradient, lr_ratio=RATIO)
    groups = [
        {"params": [p for n, a in known.items() if lrs[n] == lr for p in a.trained.values()], "lr": lr}
        for lr in (2e-3, 1e-3)
    ]
    optimizer = kind(groups, lr=1.0, **options)
    attach(ours, optimizer)

    theirs, twins = adapted(dtype)
    separate = [
        {"params": [getattr(a, factor)], "lr": lrs[n] * ratio}
        for n, a in twins.items()
        for factor, ratio in (("A", 1.0), ("B", RATIO))
    ]
    expected = train(theirs, kind(separate, lr=1.0, **options), dtype)
    actual = train(ours, optimizer, dtype)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    assert actual == pytest.approx(expected, rel=tolerance)
    for n, a in known.items():
        for factor in ("A", "B"):
            p, q = getattr(a, factor), getattr(twins[n], factor)
            torch.testing.assert_close(p, q, rtol=100 * tolerance, atol=10 * tolerance)
        assert twins[n].B.any()
    assert abs(expected[-1] - expected[0]) > 1e-3


def test_without_it_the_result_is_another():
    losses = []
    for ratio in (None, 1.0, RATIO):
        module, known = adapted(torch.float64, lr_ratio=ratio)
        optimizer = torch.optim.AdamW([p for a in known.values() for p in a.trained.values()], lr=1e-3)
        attach(module, optimizer)
        losses.append(train(module, optimizer, torch.float64)[-1])
    assert losses[1] == pytest.approx(losses[0], rel=1e-12)
    assert abs(losses[2] - losses[0]) > 1e-3


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize(("decomposition", "init"), [("additive", "zero"), ("dora", "zero"), ("product", "symmetric")])
def test_of_every_decomposition_it_moves_b_alone_faster(decomposition, init, gradient):
    """One step of SGD: A, and DoRA's magnitude, go as far as the optimizer takes them, B 8 times as far."""
    moved = []
    for ratio in (None, RATIO):
        options = {"decomposition": decomposition, "init": init, "lr_ratio": ratio}
        module, known = adapted(torch.float64, gradient, **options)
        before = {n: copy.deepcopy(a.state_dict()) for n, a in known.items()}
        optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.1)
        attach(module, optimizer)
        x, y = problem(torch.float64)
        nn.functional.mse_loss(module(x), y).backward()
        optimizer.step()
        moved.append({(n, k): p - before[n][k] for n, a in known.items() for k, p in a.named_parameters()})
        after = module(x)
        merge(module)
        torch.testing.assert_close(module(x), after, rtol=1e-12, atol=1e-13)
    for (n, k), step in moved[0].items():
        expected = RATIO * step if k == "B" else step
        torch.testing.assert_close(moved[1][n, k], expected, rtol=1e-9, atol=1e-15)
        assert k in ("A", "A0", "B0") or step.any()


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_groups_and_their_rates_are_left_alone(gradient):
    module, known = adapted(torch.float32, gradient, lr_ratio=RATIO)
    optimizer = torch.optim.AdamW([p for a in known.values() for p in a.trained.values()], lr=0.01, weight_decay=0.1)
    groups = [{**group, "params": list(map(id, group["params"]))} for group in optimizer.param_groups]
    handle = attach(module, optimizer)
    x, y = problem(torch.float32)
    nn.functional.mse_loss(module(x), y).backward()
    optimizer.step()
    assert [{**group, "params": list(map(id, group["params"]))} for group in optimizer.param_groups] == groups
    handle.remove()


def test_a_removed_handle_ends_it():
    module, known = adapted(torch.float64, lr_ratio=RATIO)
    a = known["0"]
    optimizer = torch.optim.SGD([a.A, a.B], lr=0.1)
    attach(module, optimizer).remove()
    a.B.grad = torch.ones_like(a.B)
    optimizer.step()
    torch.testing.assert_close(a.B, torch.full_like(a.B, -0.1))


# ------------------------------------------------------------------------------------------------------- with a Trainer


class Groups(Callback):
    """The rates and other settings of all groups after every batch."""

    def __init__(self) -> None:
        self.seen: list = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        for optimizer in trainer.optimizers:
            self.seen += [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]


MODELS = {ScheduledNet: {}, Zoo: ZOO, TwoOptimizersNet: {}}


@pytest.mark.parametrize(("model", "gradient", "precision"), pairs(MODELS, GRADIENTS, ["32-true", "bf16-true"]))
def test_a_run_resumes_to_the_same_bits_and_its_groups_are_those_of_a_run_without(model, gradient, precision, tmp_path):
    file = tmp_path / "saved.ckpt"

    def fit(ratio, path=None, *callbacks):
        lora = LoRA(rank=2, gradient=gradient, lr_ratio=ratio, **MODELS[model])
        seen, groups = Digest(), Groups()
        run = trainer(tmp_path, lora, seen, groups, *callbacks, max_epochs=2, precision=precision)
        loader = ResumableLoader()
        loader.batches = loader.batches[:3]
        run.fit(model(), loader, ckpt_path=path)
        return seen, groups.seen

    plain, groups = fit(None)
    whole, with_ratio = fit(RATIO, None, SaveFirst(file))
    again, _ = fit(RATIO, file)
    assert (again.module, again.optimizers, again.steps) == (whole.module, whole.optimizers, whole.steps)
    assert with_ratio == groups
    assert whole.module != plain.module


def test_with_a_and_b_in_two_optimizers_each_step_moves_its_own(tmp_path):
    class Apart(Net):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            for optimizer in self.optimizers():
                optimizer.zero_grad()
                self.manual_backward(self.loss(batch))
                optimizer.step()

        def configure_optimizers(self):
            known = adapters(self).values()
            rate = 0.1 if self.trainer.callbacks[0].options.lr_ratio else 0.1 * RATIO
            return torch.optim.SGD([a.A for a in known], lr=0.1), torch.optim.SGD([a.B for a in known], lr=rate)

    outputs = []
    for ratio in (None, RATIO):
        model = Apart()
        run = trainer(tmp_path, LoRA(rank=2, lr_ratio=ratio))
        assert isinstance(run.callbacks[0], LoRA)
        run.fit(model, ResumableLoader())
        outputs.append(model.eval()(ResumableLoader().batches[0][0]).detach())
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ratio", [0, -1, -2.5, math.inf, math.nan, "8", True, [8]])
@pytest.mark.parametrize("make", [LoRA, lambda **options: inject(nn.Sequential(nn.Linear(4, 4)), rank=1, **options)])
def test_a_ratio_that_is_no_positive_number_is_refused(make, ratio):
    with pytest.raises(ValueError, match="`lr_ratio` must be a positive, finite number"):
        make(lr_ratio=ratio)
