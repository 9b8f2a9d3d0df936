"""What follows an optimizer's step, whoever runs the training loop."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from lightning_lora._compat import copy_each
from lightning_lora.adapters import Adapter
from lightning_lora.adapters.adapter import steps
from lightning_lora.errors import LoRAError
from lightning_lora.injection.inject import Injection, Place, adapters, places
from lightning_lora.injection.options import Options
from lightning_lora.steps.resample import check_moments, draw_anew, forget, warn_of_decay
from lightning_lora.weights import full_states
from lightning_lora.weights.sharded import is_shard, makes_states, reshard

TOGETHER = 2**23
"""How many entries of A and B take part in one computation of steps."""
_FOLLOWED: weakref.WeakKeyDictionary[Adapter, weakref.WeakSet[Optimizer]] = weakref.WeakKeyDictionary()
"""Adapter -> the optimizers whose steps it follows."""


class Handle:
    """Undoes :func:`attach`."""

    def __init__(self, attached: _Attached, hooks: list[Any]) -> None:
        self._attached = attached
        self._hooks = hooks

    def remove(self) -> None:
        """Take the hooks off the optimizer."""
        for hook in self._hooks:
            hook.remove()
        self._attached.release()
        self._hooks = []


def attach(module: nn.Module, optimizer: Optimizer) -> Handle:
    """Do what the adapters of ``module`` ask for after each real step of ``optimizer``.

    For Fabric and plain torch; with a Trainer, :class:`~lightning_lora.LoRA` does it. Three options need it:

    - ``gradient="merged"`` and ``"projected"``, where W = W0 + increment at all times: a step that takes A and B to A'
      and B' takes W to W + increment' - increment (article, "Optimization Perspective").
    - ``lr_ratio``: B goes that many times as far as the optimizer took it, which is what a larger learning rate does
      for every optimizer whose steps are proportional to it; parameter groups and schedulers are left alone.
    - ``resample_every_n_steps``: after every so many steps the projections are drawn anew.

    A step that a GradScaler skips is no step.

    Args:
        module: One that has been through :func:`~lightning_lora.inject`.
        optimizer: One that has the factors of ``module``, or some of them; Fabric's wrapper will do.

    Returns:
        A handle whose ``remove()`` undoes this.

    Raises:
        ValueError: If ``optimizer`` has no factor of any adapter of ``module``.
        LoRAError: If ``optimizer`` calls its closure more than once for a step, as LBFGS does: it
            would see weights that are out of step with the factors. If factors that are drawn together are in two
            optimizers, or their moments cannot be treated as ``resample_moments`` says. If it is attached already.
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)
    reshard(module)
    owned = {p for group in optimizer.param_groups for p in group["params"]}
    if not any(p in owned for adapter in adapters(module).values() for p in adapter.trained.values()):
        raise ValueError(
            f"{type(optimizer).__name__} has no adapter of {type(module).__name__}. Call `inject` first, and give the"
            " optimizer the parameters that require gradients."
        )
    attached = _Attached(module, optimizer)
    if not any(_has_consequences(place, options) for place, options in _places_with_options(module)):
        return Handle(attached, [])
    hooks = [optimizer.register_step_pre_hook(attached.before), optimizer.register_step_post_hook(attached.after)]
    return Handle(attached, hooks)


class _Attached:
    """The hooks before and after the steps of an optimizer, and the adapters that follow it."""

    def __init__(self, module: nn.Module, optimizer: Optimizer) -> None:
        self.module = module
        self.optimizer = optimizer
        self.followers: list[Follower] = []
        self._sizes: list[int] = []
        """How many parameters each group of the optimizer had when they were last looked through."""
        self._call: FrameType | None = None
        """The call of ``step`` that is followed: one inside it, as of the parent's ``step``, is a part of it."""
        self._look_through_groups()

    def before(self, _: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Keep what it takes to follow the step; let it call its closure once."""
        caller = _caller()
        if _is_running(self._call, caller):
            return None
        self._call = caller
        reshard(self.module)
        self._look_through_groups()
        for follower in self.followers:
            follower.forget(self.optimizer)
        trained = [follower.adapter.trained for follower in self.followers]
        copies = iter(_copies([p.detach() for each in trained for p in each.values()]))
        for follower, each in zip(self.followers, trained, strict=True):
            follower.before = {name: next(copies) for name in each}
        if len(args) > 1 and args[1] is not None:  # the first is the optimizer itself
            return (args[0], _once(args[1]), *args[2:]), kwargs
        if kwargs.get("closure") is not None:
            return args, {**kwargs, "closure": _once(kwargs["closure"])}
        return None

    def after(self, *_: Any) -> None:
        """Follow the step, unless it is a part of another, or was none."""
        if _caller() is not self._call:
            return
        self._call = None
        skipped = getattr(self.optimizer, "found_inf", None)
        # set by a GradScaler for a fused optimizer, which skips on the device: without a look at it, nobody knows
        if (skipped is None or not skipped.item()) and not makes_states(self.optimizer):
            self._follow()
        for follower in self.followers:
            follower.adapter.set_followed()

    def _follow(self) -> None:
        """Have all weights follow the step; sharded factors, before and after it, are gathered by one collective."""
        for follower in self.followers:
            follower.scale_step()
        holding = [follower for follower in self.followers if follower.place.host.holds_increment]
        states = [state for follower in holding for state in (follower.before, follower.adapter.state_dict())]
        full = full_states(states)
        moved = [
            (follower, before, follower.adapter.gathered(own, after))
            for follower, before, own, after in zip(holding, full[::2], states[1::2], full[1::2], strict=True)
        ]
        drawn: dict[str, dict[Adapter, Adapter]] = {}
        for alike in _alike(moved):
            first, *_ = alike
            now, before = [adapter for *_, adapter in alike], [a.factors_with(tensors) for _, tensors, a in alike]
            taken = steps(now, before, now[0].sum_dtype(first[0].place.weight))
            for (follower, _, adapter), step in zip(alike, taken, strict=True):
                follower.adapter.steps += 1
                follower.take(step, adapter)
                if follower.is_drawn():
                    drawn.setdefault(follower.options.resample_moments, {})[follower.adapter] = adapter
        for moments, adapters_drawn in drawn.items():
            draw_anew(adapters_drawn, self.optimizer, moments)
        for follower in self.followers:
            follower.before = {}

    def release(self) -> None:
        """Follow no adapter any more. What a step changed that an exception ended is given up."""
        for follower in self.followers:
            _FOLLOWED[follower.adapter].discard(self.optimizer)
            if self._call is not None:
                follower.adapter.set_followed()
        self.followers, self._call = [], None

    def _look_through_groups(self) -> None:
        """Follow the adapters whose factors the optimizer has, if it has got other ones since."""
        sizes = [len(group["params"]) for group in self.optimizer.param_groups]
        if sizes == self._sizes:
            return
        owned = {p for group in self.optimizer.param_groups for p in group["params"]}
        known = {follower.adapter for follower in self.followers}
        new = [
            Follower(place, options)
            for place, options in _places_with_options(self.module)
            if place.adapter not in known
            and _has_consequences(place, options)
            and any(p in owned for p in place.adapter.trained.values())
        ]
        for follower in new:
            follower.check(self.optimizer, owned)
        for follower in new:
            _FOLLOWED.setdefault(follower.adapter, weakref.WeakSet()).add(self.optimizer)
            follower.adapter.set_followed()
        self.followers += new
        self._sizes = sizes


Moved = tuple["Follower", dict[str, Tensor], Adapter]
"""A follower, the trained tensors before the step, and the adapter after it; all full."""


def _alike(moved: list[Moved]) -> Iterator[list[Moved]]:
    """Divide ``moved`` into adapters of one class and shapes, not too many at a time, for :func:`steps`."""
    groups: dict[Any, list[Moved]] = {}
    for one in moved:
        follower, _, adapter = one
        A, B, weight = adapter.A, adapter.B, follower.place.weight
        kind = type(adapter), A.shape, B.shape, A.dtype, A.device, adapter.sum_dtype(weight)
        groups.setdefault(kind, []).append(one)
    for (_, A, B, *_), group in groups.items():
        most = max(1, TOGETHER // (A.numel() + B.numel()))
        for start in range(0, len(group), most):
            yield group[start : start + most]


@torch.no_grad()
def _copies(tensors: list[Tensor]) -> list[Tensor]:
    """Return copies of ``tensors``, by one launch where they are not sharded."""
    if not tensors or any(map(is_shard, tensors)):
        return [tensor.clone() for tensor in tensors]
    copies = [torch.empty_like(tensor) for tensor in tensors]
    copy_each(copies, tensors)
    return copies


def _has_consequences(place: Place, options: Options) -> bool:
    return place.host.holds_increment or options.lr_ratio is not None


def _caller() -> FrameType | None:
    """Return the frame that called the caller of this: for a hook, the one of the ``step`` that it belongs to."""
    frame = inspect.currentframe()
    assert frame is not None
    assert frame.f_back is not None
    return frame.f_back.f_back


def _is_running(call: FrameType | None, frame: FrameType | None) -> bool:
    """Return whether ``call`` is ``frame`` or one below it on the stack; one that an exception has ended is not."""
    while call is not None and frame is not None:
        if frame is call:
            return True
        frame = frame.f_back
    return False


class Follower:
    """An adapter whose optimizer's steps have consequences."""

    def __init__(self, place: Place, options: Options) -> None:
        self.place = place
        self.adapter = place.adapter
        self.options = options
        self.before: dict[str, Tensor] = {}
        """The trained tensors before the step, in shards where they are sharded."""

    def check(self, optimizer: Optimizer, owned: set[Tensor]) -> None:
        """Raise ``LoRAError`` if ``optimizer`` cannot be followed."""
        if isinstance(optimizer, LBFGS):
            raise LoRAError(
                "LBFGS computes the loss several times for a step, and the weight of"
                f" {self.place.name!r} follows its adapter only between steps. Use `gradient='factored'` with LBFGS,"
                " and no `lr_ratio`."
            )
        if self.options.lr_ratio is not None and "B" in self.adapter.fixed:
            raise LoRAError(
                f"`lr_ratio={self.options.lr_ratio}` is the learning rate of B over that of A, and"
                f" `decomposition={self.options.decomposition!r}` does not train B. Leave it out."
            )
        followed = _FOLLOWED.get(self.adapter, ())
        if optimizer in followed:
            raise LoRAError(
                f"The adapter of {self.place.name!r} is attached to this {type(optimizer).__name__} already, and would"
                " follow each step twice. Call `remove()` on the handle first."
            )
        if self.adapter.resample is not None:
            check_moments(optimizer, self.options.resample_moments)
            if self.adapter.resample == "both":
                warn_of_decay(optimizer, set(self.adapter.trained.values()))
            if followed or not all(p in owned for p in self.adapter.trained.values()):
                raise LoRAError(
                    f"A and B of {self.place.name!r} are in two optimizers, and they are drawn anew together. Give both"
                    " to one."
                )

    def forget(self, optimizer: Optimizer) -> None:
        """Have ``optimizer`` forget the moments of factors that were drawn after its last step, if it is to."""
        if self.adapter.resample is not None and self.options.resample_moments == "reset":
            forget(self.adapter, optimizer)

    @torch.no_grad()
    def scale_step(self) -> None:
        """Take B ``lr_ratio`` times as far as the optimizer took it."""
        if self.options.lr_ratio is not None:
            B = self.before["B"]
            self.adapter.B.copy_(B + self.options.lr_ratio * (self.adapter.B - B))

    def take(self, step: tuple[Tensor, Tensor], now: Adapter) -> None:
        """Add ``step`` to the weight; ``now`` is the adapter with full tensors."""
        now.steps = self.adapter.steps
        self.place.stored.add_step(lambda weight, rows: now.take_step(weight, *step, rows), now.has_rows)
        self.adapter.lost = now.lost

    def is_drawn(self) -> bool:
        """Return whether the factors are drawn anew after this step."""
        every = self.options.resample_every_n_steps
        return every is not None and self.adapter.steps % every == 0


def _places_with_options(module: nn.Module) -> Iterator[tuple[Place, Options]]:
    """One place of every adapter."""
    done: set[Adapter] = set()
    for owner in module.modules():
        if isinstance(injection := owner.__dict__.get("lora_injection"), Injection):
            for place in places(owner):
                if place.adapter not in done:
                    done.add(place.adapter)
                    yield place, injection.options


def _once(closure: Callable[[], Any]) -> Callable[[], Any]:
    called = False

    def wrapped() -> Any:
        nonlocal called
        if called:
            raise LoRAError(
                "The optimizer called its closure twice in one step, and weights follow their adapters only between"
                " steps. Use `gradient='factored'` with this optimizer."
            )
        called = True
        return closure()

    return wrapped
