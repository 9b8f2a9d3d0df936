"""temporary"""
from collections.abc import Iterator
from contextlib import contextmanager
import torch
from torch import nn
from lightning_lora.hosts.host import Host
def _hosts(module):
    return [m for m in module.modules() if isinstance(m, Host)]
def hide_adapters(module: nn.Module) -> None:
    for h in _hosts(module):
        if "lora" in h._modules:
            h.__dict__["lora"] = h._modules.pop("lora")
def show_adapters(module: nn.Module) -> None:
    for h in _hosts(module):
        if "lora" in h.__dict__:
            h._modules["lora"] = h.__dict__.pop("lora")
@contextmanager
def reading_plain(module: nn.Module) -> Iterator[None]:
    yield
def present_merged(module: nn.Module, on: bool) -> None:
    for h in _hosts(module):
        if on: h.__dict__["_merged_state"] = on
        else: h.__dict__.pop("_merged_state", None)
