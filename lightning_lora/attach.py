"""Keeps weights that hold their increment in step with the factors, whoever runs the training loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from lightning_lora.inject import Place, adapters, places


class Handle:
    """Undoes :func:`attach`."""

    def __init__(self, removables: list[Any]) -> None:
        self._removables = removables

    def remove(self) -> None:
        """Takes the hooks off the optimizer."""
        for removable in self._removables:
            removable.remove()
        self._removables = []


def attach(module: nn.Module, optimizer: Optimizer) -> Handle:
    """Applies the increments of ``module`` after each real step of ``optimizer``.

    For Fabric and plain torch; with a Trainer, :class:`~lightning_lora.LoRA` does it. Only ``gradient="merged"`` and
    ``"projected"`` need it: there W = W0 + increment at all times, so a step that takes A and B to A' and B' takes W to
    W + increment' - increment (seed, "Optimization Perspective"). A step that a GradScaler skips is no step.

    Args:
        module: One that has been through :func:`~lightning_lora.inject`.
        optimizer: One that has the factors of ``module``, or some of them; Fabric's wrapper will do.

    Returns:
        A handle whose ``remove()`` undoes this.

    Raises:
        ValueError: If ``optimizer`` has no factor of any adapter of ``module``.
        MisconfigurationException: If ``optimizer`` calls its closure more than once for a step, as LBFGS does: it
            would see weights that are out of step with the factors.
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)
    owned = {p for group in optimizer.param_groups for p in group["params"]}
    if not any(p in owned for adapter in adapters(module).values() for p in adapter.parameters()):
        raise ValueError(
            f"{type(optimizer).__name__} has no adapter of {type(module).__name__}. Call `inject` first, and give the"
            " optimizer the parameters that require gradients."
        )
    unique = {id(place.adapter): place for place in places(module) if place.host.holds_increment}.values()
    held = [place for place in unique if place.adapter.A in owned or place.adapter.B in owned]
    if not held:
        return Handle([])
    if isinstance(optimizer, LBFGS):
        raise MisconfigurationException(
            "LBFGS computes the loss several times for a step, and the weight of"
            f" {held[0].name!r} follows its adapter only between steps. Use `gradient='factored'` with LBFGS."
        )
    before: list[tuple[Place, Tensor, Tensor]] = []

    def remember(_: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        before[:] = [(p, p.adapter.A.detach().clone(), p.adapter.B.detach().clone()) for p in held]
        if len(args) > 1 and args[1] is not None:  # the first is the optimizer itself
            return (args[0], _once(args[1]), *args[2:]), kwargs
        if kwargs.get("closure") is not None:
            return args, {**kwargs, "closure": _once(kwargs["closure"])}
        return None

    def follow(*_: Any) -> None:
        for place, A, B in before:
            place.adapter.follow(place.weight, A, B)
        before.clear()

    return Handle([optimizer.register_step_pre_hook(remember), optimizer.register_step_post_hook(follow)])


def _once(closure: Callable[[], Any]) -> Callable[[], Any]:
    called = False

    def wrapped() -> Any:
        nonlocal called
        if called:
            raise MisconfigurationException(
                "The optimizer called its closure twice in one step, and weights follow their adapters only between"
                " steps. Use `gradient='factored'` with this optimizer."
            )
        called = True
        return closure()

    return wrapped
