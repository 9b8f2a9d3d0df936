"""Reads files of weights: tensors and primitives alone, mapped from disk; nothing in them is executed."""

from __future__ import annotations

import json
import os
import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_lora.checkpoint.format import NOTICE, SavedRun, State
from lightning_lora.errors import LoRAError
from lightning_lora.naming import plain_name

IN_FOLDERS = ("model.safetensors.index.json", "model.safetensors", "pytorch_model.bin.index.json", "pytorch_model.bin")
"""What a folder of Hugging Face's holds; the first that exists is read."""

File = str | os.PathLike[str] | Mapping[str, Any]


@dataclass
class WeightFile:
    """The weights of one file, or of the shards that an index names."""

    path: Any
    kind: str
    weights: dict[str, Tensor]
    """Key -> tensor, mapped from disk."""
    rest: State = field(default_factory=dict)
    """What else a Lightning checkpoint holds."""
    extras: State = field(default_factory=dict)
    """What a state dict holds besides tensors: the extra states of modules."""
    shards: dict[str, str] = field(default_factory=dict)
    """Key -> name of the shard that has it, where there is an index."""
    size: int | None = None
    """Bytes on disk, of all shards together; None for what is no file."""

    def run(self) -> SavedRun:
        """Return the run that wrote the weights, with the adapters that belong to them.

        Raises:
            LoRAError: If no run with LoRA did, or what it says is malformed.
        """
        run = SavedRun.of(self.rest)
        if run is None:
            raise LoRAError(f"{self.path} was not written by a run with LoRA and has no adapters.")
        run = run.of_weights
        for name, state in run.adapters.items():
            self.check({f"{name}: {what}": tensor for what, tensor in state.tensors.items()})
        return run

    def plain_weights(self) -> dict[str, Tensor]:
        """Return the weights as they are named in a module that is not compiled."""
        return {plain_name(key): tensor for key, tensor in self.weights.items()}

    def check(self, tensors: Mapping[str, Tensor]) -> None:
        """Raise ``LoRAError`` where a tensor has no data in the file, or claims to have more than there is."""
        if self.size is None:
            return
        for key, tensor in tensors.items():
            if tensor.layout is not torch.strided or tensor.is_nested or tensor.device.type != "cpu":
                raise LoRAError(f"{self.path}: {key!r} is no plain tensor.")
            if tensor.numel() * tensor.element_size() > max(self.size, 2**20):
                raise LoRAError(f"{self.path}: {key!r} claims to be larger than the file.")


def read(file: File) -> WeightFile:
    """Return what ``file`` holds, without executing anything that it says.

    Args:
        file: The path of a Lightning checkpoint or of a state dict that ``torch.save`` wrote, of a safetensors file, of
            the index of several of either, or of a folder with one of Hugging Face's names in it; or what
            ``torch.load`` has made of a file, which is taken as it is.

    Raises:
        FileNotFoundError: If there is no such file.
        LoRAError: If it is damaged, or none of these.
    """
    if isinstance(file, Mapping):
        return _of_mapping("The dictionary", file)
    path = Path(file)
    if path.is_dir():
        path = next((path / name for name in IN_FOLDERS if (path / name).is_file()), path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such file.")
    if path.is_dir():
        advice = "; make one file of it by `python -m lightning.pytorch.utilities.consolidate_checkpoint`"
        sharded = advice if (path / ".metadata").exists() else ""
        raise LoRAError(f"{path} is a folder, without any of {', '.join(IN_FOLDERS)}{sharded}.")
    try:
        found = _of_index(path) if path.name.endswith(".json") else _of_one(path)
    except LoRAError:
        raise
    except Exception as error:  # whatever torch, safetensors and json raise for what makes no sense to them
        raise LoRAError(f"{path} cannot be read: {_reason(path, error)}.") from error
    found.check(found.weights)
    return found


def safetensors() -> Any:
    """Return the library.

    Raises:
        LoRAError: If it is not installed.
    """
    try:
        import safetensors.torch
    except ImportError as error:
        raise LoRAError('This needs safetensors: `pip install "lightning-lora[safetensors]"`.') from error
    return safetensors


def _of_one(path: Path) -> WeightFile:
    size = path.stat().st_size
    if path.suffix == ".safetensors":
        with safetensors().safe_open(path, "pt") as opened:
            weights = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118  it is no dict
        return WeightFile(path, "safetensors", weights, size=size)
    zipped = zipfile.is_zipfile(path)
    if zipped:
        with zipfile.ZipFile(path) as archive:
            if any(part.compress_type != zipfile.ZIP_STORED or part.file_size > size for part in archive.infolist()):
                raise LoRAError(f"{path} has compressed parts, which torch.save does not write.")
    return _of_mapping(path, torch.load(path, map_location="cpu", mmap=zipped, weights_only=True), size)


def _of_mapping(path: Any, loaded: Any, size: int | None = None) -> WeightFile:
    """Return what ``loaded``, a Lightning checkpoint or a state dict, holds."""
    if not isinstance(loaded, Mapping):
        raise LoRAError(f"{path} holds a {type(loaded).__name__}, no dictionary of weights.")
    lightning = isinstance(loaded.get("state_dict"), Mapping)
    state = loaded["state_dict"] if lightning else loaded
    state = {key: value for key, value in state.items() if key != NOTICE}
    tensors = {k: value.detach() for k, value in state.items() if isinstance(k, str) and isinstance(value, Tensor)}
    extras = {key: value for key, value in state.items() if key not in tensors}
    if not lightning and (not tensors or any(not str(key).endswith("_extra_state") for key in extras)):
        raise LoRAError(f"{path} holds neither a Lightning checkpoint nor a state dict.")
    rest = {key: value for key, value in loaded.items() if key != "state_dict"} if lightning else {}
    return WeightFile(path, "Lightning checkpoint" if lightning else "state dict", tensors, rest, extras, size=size)


def _of_index(path: Path) -> WeightFile:
    shards = json.loads(path.read_text())["weight_map"]
    names = set(shards.values())
    if outside := [name for name in names if Path(name).name != name or name in ("", "..")]:
        raise LoRAError(f"{path} names {outside[0]!r}, which is no file beside it.")
    files = {name: _of_one(path.with_name(name)) for name in sorted(names)}
    if absent := [key for key, name in shards.items() if key not in files[name].weights]:
        raise LoRAError(f"{path}: {absent[0]!r} is not in {shards[absent[0]]}.")
    weights = {key: files[name].weights[key] for key, name in shards.items()}
    size = sum(each.size or 0 for each in files.values())
    return WeightFile(path, f"index of {len(files)} files", weights, shards=shards, size=size)


def _reason(path: Path, error: Exception) -> str:
    if isinstance(error, pickle.UnpicklingError):
        named = re.search(r"GLOBAL (\S+)", str(error))
        if named is not None:
            return (
                f"it names {named[1]}, and to load more than tensors, numbers, texts and containers can run any code."
                " If you trust the file, load it by torch.load(file, weights_only=False) and save its state dict alone"
            )
    if (damaged := damage(path)) is not None:
        return f"it is {damaged}"
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}".rstrip(" .:")


def damage(path: Any) -> str | None:
    """Say what is wrong with the zip archive that ``torch.save`` has written to ``path``."""
    if path is None or not os.path.isfile(path):
        return None
    with open(path, "rb") as file:
        begins = b"PK\x03\x04".startswith(file.read(4))
    if not zipfile.is_zipfile(path):
        return "truncated" if begins else None
    try:
        with zipfile.ZipFile(path) as archive:
            part = archive.testzip()
    except Exception:  # whatever is raised for headers that make no sense
        return "damaged: its table of contents cannot be read"
    return None if part is None else f"damaged: the checksum of its part {part!r} is wrong"
