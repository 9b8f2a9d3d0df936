"""Modules whose own code goes through parameters while training, in the style of well-known projects.

With ``gradient="merged"`` they do to the weights what they do in full fine-tuning, to the bit; in factored mode they
work or the run says what to use.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule
from models import trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lora import LoRA, adapters
from lightning_lora.errors import LoRAError

X = torch.randn(32, 6, generator=torch.Generator().manual_seed(0))
DATA = DataLoader(TensorDataset(X, X.sin()), batch_size=8)


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 6))


class Byol(LightningModule):
    """A momentum network that follows the online one by zipping their parameters, as lightly's helpers do."""

    decay = 0.9

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.online = mlp()
        self.predictor = nn.Linear(6, 6)
        self.target = copy.deepcopy(self.online).requires_grad_(False)
        self.expected: list[torch.Tensor] | None = None

    def forward(self, x):
        return self.online(x)

    def training_step(self, batch, index):
        with torch.no_grad():
            target = self.target(batch[0])
        return F.mse_loss(self.predictor(self.online(batch[0] + 0.1)), target) + F.mse_loss(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.AdamW([*self.online.parameters(), *self.predictor.parameters()], lr=1e-2)

    @torch.no_grad()
    def follow(self) -> None:
        for online, target in zip(self.online.parameters(), self.target.parameters(), strict=True):
            target.data = target.data * self.decay + online.data * (1 - self.decay)

    def on_train_batch_end(self, *_) -> None:
        self.follow()


class Dino(Byol):
    """A teacher that follows by names, in place."""

    @torch.no_grad()
    def follow(self) -> None:
        online = dict(self.online.named_parameters())
        for name, target in self.target.named_parameters():
            target.mul_(self.decay).add_(online[name], alpha=1 - self.decay)


class Lightly(Byol):
    """A momentum network that is moved by operations on lists, as lightly's own."""

    @torch.no_grad()
    def follow(self) -> None:
        target = list(self.target.parameters())
        torch._foreach_mul_(target, self.decay)
        torch._foreach_add_(target, list(self.online.parameters()), alpha=1 - self.decay)


class Sac(Byol):
    """A target network whose weights look trainable and are in no optimizer."""

    def __init__(self) -> None:
        super().__init__()
        self.target.requires_grad_(True)


class Follows(Callback):
    """Keeps the mean of the online weights W, as full fine-tuning's target would be, beside the module's own."""

    def on_train_start(self, trainer, pl_module) -> None:
        self.target = [p.clone() for p in copy.deepcopy(pl_module.target).parameters()]
        self.names = [(name, p.shape) for name, p in pl_module.named_parameters()]

    @torch.no_grad()
    def on_train_batch_start(self, trainer, pl_module, batch, index) -> None:
        if index or trainer.current_epoch:
            weights = list(pl_module.online.state_dict().values())
            self.target = [
                t * pl_module.decay + w * (1 - pl_module.decay) for t, w in zip(self.target, weights, strict=True)
            ]


@pytest.mark.parametrize("kind", [Byol, Dino])
def test_in_merged_mode_a_momentum_network_follows_the_whole_weights(kind, tmp_path):
    model, follows = kind(), Follows()
    names = [(name, p.shape) for name, p in model.named_parameters()]
    trainer(tmp_path, LoRA(rank=2, gradient="merged"), follows, max_epochs=2).fit(model, DATA)
    assert follows.names == names
    weights = [p * (1 - model.decay) for p in model.online.parameters()]
    follows.target = [t * model.decay + w for t, w in zip(follows.target, weights, strict=True)]
    for mine, expected in zip(model.target.parameters(), follows.target, strict=True):
        torch.testing.assert_close(mine, expected, rtol=0, atol=1e-7)
    assert not torch.equal(model.target[0].weight, Byol().target[0].weight)


def test_in_merged_mode_a_target_network_that_looks_trainable_follows_too(tmp_path):
    model, follows = Sac(), Follows()
    trainer(tmp_path, LoRA(rank=2, gradient="merged"), follows).fit(model, DATA)
    assert not torch.equal(model.target[0].weight, Sac().target[0].weight)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("kind", [Byol, Lightly, Dino])
def test_in_factored_mode_the_run_says_what_to_use(kind, tmp_path):
    if kind is Dino:
        with pytest.warns(UserWarning, match="gradient='merged'"):
            trainer(tmp_path, LoRA(rank=2), max_epochs=1).fit(kind(), DATA)
    else:
        with pytest.raises((LoRAError, ValueError), match="gradient='merged'"):
            trainer(tmp_path, LoRA(rank=2), max_epochs=1).fit(kind(), DATA)


class Wgan(LightningModule):
    """A critic whose weights are clipped after each step."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.critic = mlp()

    def forward(self, x):
        return self.critic(x)

    def training_step(self, batch, index):
        return -self.critic(batch[0]).mean() + self.critic(batch[1]).mean()

    def on_train_batch_end(self, *_) -> None:
        for p in self.critic.parameters():
            p.data.clamp_(-0.2, 0.2)

    def configure_optimizers(self):
        return torch.optim.RMSprop(self.critic.parameters(), lr=5e-2)


def test_in_merged_mode_a_clipped_critic_is_clipped_and_what_ran_is_what_is_left(tmp_path):
    class Output(Callback):
        def on_train_end(self, trainer, pl_module) -> None:
            self.output = pl_module(X).detach()

    model, seen = Wgan(), Output()
    trainer(tmp_path, LoRA(rank=2, gradient="merged"), seen, max_epochs=2).fit(model, DATA)
    assert all(p.abs().max() <= 0.2 for p in model.parameters())
    torch.testing.assert_close(model(X), seen.output)


def test_in_factored_mode_clipped_weights_are_told_with_what_to_use(tmp_path):
    with pytest.warns(UserWarning, match="gradient='merged'"):
        trainer(tmp_path, LoRA(rank=2), max_epochs=2).fit(Wgan(), DATA)


class GradientPenalty(Wgan):
    """The norm of the gradient with respect to the input is part of the loss."""

    def training_step(self, batch, index):
        x = batch[0].clone().requires_grad_()
        (gradient,) = torch.autograd.grad(self(x).sum(), x, create_graph=True)
        return (gradient.norm(dim=1) - 1).square().mean()

    def on_train_batch_end(self, *_) -> None: ...


def test_a_gradient_penalty_trains_to_the_same_weights_in_every_mode(tmp_path):
    found = []
    for gradient in ("factored", "merged", "projected"):
        model = GradientPenalty()
        trainer(tmp_path, LoRA(rank=2, gradient=gradient)).fit(model, DATA)
        found.append(model.critic[0].weight.detach())
    assert not torch.equal(found[0], Wgan().critic[0].weight)
    for other in found[1:]:
        torch.testing.assert_close(found[0], other, rtol=1e-4, atol=1e-5)


class LitEma(nn.Module):
    """The shadow of latent-diffusion: made of the names of what requires a gradient, asserting that it still does."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.names = {name: name.replace(".", "") for name, p in model.named_parameters() if p.requires_grad}
        for name, p in model.named_parameters():
            if p.requires_grad:
                self.register_buffer(self.names[name], p.clone().detach())

    @torch.no_grad()
    def forward(self, model: nn.Module) -> None:
        shadow, parameters = dict(self.named_buffers()), dict(model.named_parameters())
        for name, p in parameters.items():
            if p.requires_grad:
                shadow[self.names[name]].sub_(0.1 * (shadow[self.names[name]] - p))
            else:
                assert name not in self.names


class WithLitEma(Wgan):
    def __init__(self) -> None:
        super().__init__()
        self.ema = LitEma(self.critic)

    def on_train_batch_end(self, *_) -> None:
        self.ema(self.critic)


def test_a_shadow_keyed_by_requires_grad_is_refused_with_what_to_use(tmp_path):
    for gradient in ("factored", "merged"):
        with pytest.raises(LoRAError, match="EMAWeightAveraging"):
            trainer(tmp_path, LoRA(rank=2, gradient=gradient)).fit(WithLitEma(), DATA)


class HandMadeCheckpoint(torch.autograd.Function):
    """The activation checkpoint of latent-diffusion, which asks autograd for the gradients of all parameters."""

    @staticmethod
    def forward(ctx, run, length, *args):
        ctx.run, ctx.inputs, ctx.params = run, list(args[:length]), list(args[length:])
        with torch.no_grad():
            return ctx.run(*ctx.inputs)

    @staticmethod
    def backward(ctx, *gradients):
        inputs = [x.detach().requires_grad_(True) for x in ctx.inputs]
        with torch.enable_grad():
            outputs = ctx.run(*[x.view_as(x) for x in inputs])
        found = torch.autograd.grad(outputs, inputs + ctx.params, gradients, allow_unused=True)
        return (None, None, *found)


class Checkpointed(Wgan):
    def training_step(self, batch, index):
        return HandMadeCheckpoint.apply(self.critic, 1, batch[0], *self.critic.parameters()).square().mean()


def test_a_hand_made_activation_checkpoint_is_refused_with_what_to_use(tmp_path):
    with pytest.raises(LoRAError, match="use_reentrant=False"):
        trainer(tmp_path, LoRA(rank=2)).fit(Checkpointed(), DATA)


class Sam(Wgan):
    """Sharpness-aware minimisation by hand over ``parameters()``, which in factored mode are A and B."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.losses: list[tuple[float, float]] = []

    def training_step(self, batch, index) -> None:
        optimizer = self.optimizers()
        trained = [p for p in self.parameters() if p.requires_grad]
        assert trained
        loss = F.mse_loss(self(batch[0]), batch[1])
        optimizer.zero_grad()
        self.manual_backward(loss)
        norm = torch.stack([p.grad.norm() for p in trained]).norm()
        steps = [0.5 * p.grad / norm for p in trained]
        with torch.no_grad():
            for p, step in zip(trained, steps, strict=True):
                p.add_(step)
        perturbed = F.mse_loss(self(batch[0]), batch[1])
        optimizer.zero_grad()
        self.manual_backward(perturbed)
        with torch.no_grad():
            for p, step in zip(trained, steps, strict=True):
                p.sub_(step)
        optimizer.step()
        self.losses.append((loss.item(), perturbed.item()))

    def on_train_batch_end(self, *_) -> None: ...


def test_perturbing_parameters_by_hand_works_in_factored_mode(tmp_path):
    model = Sam()
    trainer(tmp_path, LoRA(rank=2), max_epochs=2).fit(model, DATA)
    assert all(perturbed > loss for loss, perturbed in model.losses)


@pytest.mark.parametrize("gradient", ["factored", "merged", "projected"])
def test_zero_grad_of_the_module_reaches_the_adapters(gradient, tmp_path):
    class ByHand(Wgan):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, index) -> None:
            self.zero_grad()
            assert all(p.grad is None for a in adapters(self).values() for p in a.trained.values())
            self.manual_backward(F.mse_loss(self(batch[0]), batch[1]))
            assert any(p.grad is not None for a in adapters(self).values() for p in a.trained.values())
            self.optimizers().step()

        def on_train_batch_end(self, *_) -> None: ...

    trainer(tmp_path, LoRA(rank=2, gradient=gradient)).fit(ByHand(), DATA)
