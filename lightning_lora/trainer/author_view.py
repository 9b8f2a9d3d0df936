"""Shows a module as its author wrote it, for as long as the author's own code looks at its parameters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from lightning_lora.hosts.view import hide_adapters, hosts, reading_plain, show_adapters
from lightning_lora.injection.inject import injections_with_owners, places
from lightning_lora.weights import storage_of


def frozen_weights(module: nn.Module) -> dict[Tensor, str]:
    """Return the parameters that injection has frozen in ``module``, adapted ones among them, with their names."""
    frozen: dict[Tensor, str] = {place.weight: place.key for place in places(module)}
    for owner, injection in injections_with_owners(module):
        parameters = dict(owner.named_parameters(remove_duplicate=False))
        frozen |= {parameters[name]: name for name in injection.frozen if name in parameters}
    return frozen


@contextmanager
def author_view(module: nn.Module) -> Iterator[set[Tensor]]:
    """Show ``module`` without adapters, with its author's parameters, names and ``requires_grad``.

    What is to get an adapter requires a gradient here even where the author had frozen it, as a frozen tower whose
    layers were asked for by name: a filter by ``requires_grad`` is to find it.

    Yields:
        A set that has, on leaving, what the author's code has frozen meanwhile.
    """
    frozen_meanwhile: set[Tensor] = set()
    shown: list[Tensor] = []
    frozen = frozen_weights(module)
    for host in hosts(module):
        if not storage_of(host).read_only:  # such a weight cannot require a gradient; there A and B stand for it
            hide_adapters(host)
    for weight in frozen:
        if isinstance(weight, UninitializedParameter) or weight.is_floating_point():
            weight.requires_grad = True
            shown.append(weight)
    try:
        with reading_plain(module):
            yield frozen_meanwhile
    finally:
        frozen_meanwhile |= {weight for weight in shown if not weight.requires_grad}
        for weight in frozen:
            weight.requires_grad = False
        show_adapters(module)
