"""What others see of a module with adapters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from lightning_lora.adapters import Adapter
from lightning_lora.hosts.host import Host


def hosts(module: nn.Module) -> list[Host]:
    """Return the modules in ``module`` that carry adapters."""
    return [child for child in module.modules() if isinstance(child, Host)]


def adapters_of(module: nn.Module) -> list[Adapter]:
    """Return the adapters in ``module``, hidden ones too."""
    return [adapter for host in hosts(module) for adapter in host.adapted().values()]


def hide_adapters(module: nn.Module) -> None:
    """Take A and B out of ``parameters()`` and ``modules()``; the hosts still have them, and take them along."""
    for host in hosts(module):
        if "lora" in host._modules:
            vars(host)["lora"] = host._modules.pop("lora")


def show_adapters(module: nn.Module) -> None:
    """Put A and B back into ``parameters()`` and ``modules()``."""
    for host in hosts(module):
        if "lora" in vars(host):
            host._modules["lora"] = vars(host).pop("lora")


@contextmanager
def reading_plain(module: nn.Module) -> Iterator[None]:
    """Have reading an adapted weight give the parameter itself."""
    found = adapters_of(module)
    for adapter in found:
        adapter.reads_plain = True
    try:
        yield
    finally:
        for adapter in found:
            adapter.reads_plain = False


def present_merged(module: nn.Module, on: bool) -> None:
    """Have ``state_dict()`` give the plain model's, with merged weights, and take such a one back; or not any more."""
    for adapter in adapters_of(module):
        adapter.presents_merged = on


@contextmanager
def merging_for_file(module: nn.Module, writes: bool) -> Iterator[None]:
    """Have ``state_dict()`` give merged weights on the CPU, formed one at a time: no device holds a second model.

    Args:
        module: With adapters.
        writes: Whether this rank writes the file; else the weights stay as they are, and nothing is formed.
    """
    merged: dict[Adapter, Tensor] = {}
    for host in hosts(module):
        for name, adapter in host.adapted().items():
            adapter.saving = merged
            weight = host._parameters[name]
            if not writes and weight is not None:
                merged[adapter] = weight.detach()
    try:
        yield
    finally:
        for adapter in adapters_of(module):
            adapter.saving = None
