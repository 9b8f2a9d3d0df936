"""stub"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


def hide_adapters(module: nn.Module) -> None: ...
def show_adapters(module: nn.Module) -> None: ...
@contextmanager
def reading_plain(module: nn.Module) -> Iterator[None]:
    yield


def present_merged(module: nn.Module, on: bool) -> None: ...
