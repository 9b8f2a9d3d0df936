"""Reads files of weights without loading them, and writes such files one weight at a time.

Weights are mapped from disk: only those that are used are in memory, and :func:`release` lets them go. What is written
gets its name when all of it is on disk, so that a file of that name is the old one or the whole new one.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import pickle
import re
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_lora._compat import save_as_made
from lightning_lora.checkpoint.format import KEY, NOTICE, State, check_format, damage
from lightning_lora.errors import LoRAError

INDEX = ".index.json"
IN_FOLDERS = ("model.safetensors.index.json", "model.safetensors", "pytorch_model.bin.index.json", "pytorch_model.bin")
"""What a folder of Hugging Face's holds; the first that exists is read."""
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""torch's dtypes -> what safetensors calls them."""


@dataclass
class WeightFile:
    """The weights of one file, or of the shards that an index names."""

    path: Path
    kind: str
    weights: dict[str, Tensor]
    """Key -> tensor, mapped from disk."""
    rest: State = field(default_factory=dict)
    """What else a Lightning checkpoint holds."""
    extras: State = field(default_factory=dict)
    """What a state dict holds besides tensors: the extra states of modules."""
    shards: dict[str, str] = field(default_factory=dict)
    """Key -> name of the shard that has it, where there is an index."""
    size: int = 0
    """Bytes on disk, of all shards together."""

    def adapters(self) -> State:
        """Return the checked ``checkpoint["lightning_lora"]``.

        Raises:
            LoRAError: If the file has none.
            ValueError: If it is malformed.
        """
        if KEY not in self.rest:
            raise LoRAError(f"{self.path} holds no adapters of lightning-lora.")
        payload: State = self.rest[KEY]
        check_format(payload)
        for name, entry in payload["adapters"].items():
            self.check({f"{name}: {what}": value for what, value in entry.items() if isinstance(value, Tensor)})
        return payload

    def check(self, tensors: Mapping[str, Tensor]) -> None:
        """Raise ``LoRAError`` where a tensor has no data in the file, or claims to have more than there is."""
        for key, tensor in tensors.items():
            if tensor.layout is not torch.strided or tensor.is_nested or tensor.device.type != "cpu":
                raise LoRAError(f"{self.path}: {key!r} is no plain tensor.")
            if tensor.numel() * tensor.element_size() > max(self.size, 2**20):
                raise LoRAError(f"{self.path}: {key!r} claims to be larger than the file.")


def read(path: str) -> WeightFile:
    """Return what the file at ``path`` holds, without executing anything that it says.

    Args:
        path: A Lightning checkpoint or a state dict that ``torch.save`` wrote, a safetensors file, the index of several
            of either, or a folder with one of Hugging Face's names in it.

    Raises:
        LoRAError: If there is no such file, or it is damaged, or none of these.
    """
    file = Path(path)
    if file.is_dir():
        file = next((file / name for name in IN_FOLDERS if (file / name).is_file()), file)
    if not file.exists():
        raise LoRAError(f"{path}: there is no such file.")
    if file.is_dir():
        advice = "; make one file of it by `python -m lightning.pytorch.utilities.consolidate_checkpoint`"
        sharded = advice if (file / ".metadata").exists() else ""
        raise LoRAError(f"{path} is a folder, without any of {', '.join(IN_FOLDERS)}{sharded}.")
    try:
        found = _of_index(file) if file.name.endswith(".json") else _of_one(file)
    except (LoRAError, ModuleNotFoundError):
        raise
    except Exception as error:  # whatever torch, safetensors and json raise for what makes no sense to them
        raise LoRAError(f"{file} cannot be read: {_reason(file, error)}.") from error
    found.check(found.weights)
    return found


def _of_one(file: Path) -> WeightFile:
    size = file.stat().st_size
    if file.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(file, "pt") as opened:
            weights = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118  it is no dict
        return WeightFile(file, "safetensors", weights, size=size)
    zipped = zipfile.is_zipfile(file)
    if zipped:
        with zipfile.ZipFile(file) as archive:
            if any(part.compress_type != zipfile.ZIP_STORED or part.file_size > size for part in archive.infolist()):
                raise LoRAError(f"{file} has compressed parts, which torch.save does not write.")
    loaded = torch.load(file, map_location="cpu", mmap=zipped, weights_only=True)
    if not isinstance(loaded, Mapping):
        raise LoRAError(f"{file} holds no dictionary of weights.")
    lightning = isinstance(loaded.get("state_dict"), Mapping)
    state = loaded["state_dict"] if lightning else loaded
    state = {key: value for key, value in state.items() if key != NOTICE}
    tensors = {k: value.detach() for k, value in state.items() if isinstance(k, str) and isinstance(value, Tensor)}
    extras = {key: value for key, value in state.items() if key not in tensors}
    if not lightning and (not tensors or any(not str(key).endswith("_extra_state") for key in extras)):
        raise LoRAError(f"{file} holds neither a Lightning checkpoint nor a state dict.")
    rest = {key: value for key, value in loaded.items() if key != "state_dict"} if lightning else {}
    return WeightFile(file, "Lightning checkpoint" if lightning else "state dict", tensors, rest, extras, size=size)


def _of_index(file: Path) -> WeightFile:
    shards = json.loads(file.read_text())["weight_map"]
    names = set(shards.values())
    if outside := [name for name in names if Path(name).name != name or name in ("", "..")]:
        raise LoRAError(f"{file} names {outside[0]!r}, which is no file beside it.")
    files = {name: _of_one(file.with_name(name)) for name in sorted(names)}
    if absent := [key for key, name in shards.items() if key not in files[name].weights]:
        raise LoRAError(f"{file}: {absent[0]!r} is not in {shards[absent[0]]}.")
    weights = {key: files[name].weights[key] for key, name in shards.items()}
    size = sum(each.size for each in files.values())
    return WeightFile(file, f"index of {len(files)} files", weights, shards=shards, size=size)


def _reason(file: Path, error: Exception) -> str:
    if isinstance(error, pickle.UnpicklingError):
        named = re.search(r"GLOBAL (\S+)", str(error))
        if named is not None:
            return (
                f"it names {named[1]}, and to load more than tensors, numbers, texts and containers can run any code."
                " If you trust the file, load it with weights_only=False and save its state dict alone"
            )
    if (damaged := damage(file)) is not None:
        return f"it is {damaged}"
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}".rstrip(" .:")


def release(tensor: Tensor) -> None:
    """Let the system take back the memory of ``tensor``, which is mapped from a file and can be read from it again."""
    if sys.platform != "linux":
        return
    page, pageout, begin = mmap.PAGESIZE, 21, tensor.data_ptr()  # MADV_PAGEOUT: whatever is in memory stays as it is
    first, last = -(-begin // page) * page, (begin + tensor.nbytes) // page * page
    if last > first:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), pageout)


def give_memory_back() -> None:
    """Have freed weights return to the system at once: glibc's heap keeps every one, with gaps that fit no other."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(-3, 2**20)  # M_MMAP_THRESHOLD: each larger block is mapped for itself


@dataclass(frozen=True)
class Planned:
    """A weight that is made when its turn to be written comes."""

    key: str
    shape: Sequence[int]
    dtype: torch.dtype
    make: Callable[[], Tensor]
    source: Tensor | None = None
    """The tensor, mapped from a file, that it is made of."""

    @classmethod
    def of(cls, key: str, tensor: Tensor) -> Planned:
        """Return the plan to write ``tensor`` as it is."""
        return cls(key, tensor.shape, tensor.dtype, lambda: tensor, tensor)

    @property
    def size(self) -> int:
        """Bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def made(self) -> Tensor:
        """Return the weight, (n,) bytes.

        Raises:
            LoRAError: If it is not what was planned.
        """
        tensor = self.make()
        if list(tensor.shape) != list(self.shape) or tensor.dtype != self.dtype:
            raise LoRAError(f"{self.key!r} came out as {list(tensor.shape)}, {tensor.dtype}.")
        return tensor.contiguous().reshape(-1).view(torch.uint8)


def write(
    path: str, planned: Sequence[Planned], around: State | None, extras: State, shards: Mapping[str, str]
) -> list[Path]:
    """Write weights, each made in its turn, and return the files.

    Args:
        path: ``.safetensors`` or ``.safetensors.index.json``; any other name is a file of ``torch.save``.
        planned: The weights.
        around: What a Lightning checkpoint holds besides ``state_dict``; None for a plain state dict.
        extras: What the state dict holds besides tensors; safetensors cannot have it.
        shards: Key -> name of a shard, for an index; keys that are not in it go to the last one.

    Raises:
        LoRAError: If the form cannot hold this.
    """
    out = Path(path)
    if not out.name.endswith((".safetensors", ".json")):
        with _replacing([out]) as (part,):
            held = [(torch.empty(tuple(each.shape), dtype=each.dtype), each.made) for each in planned]
            state = {**{each.key: tensor for each, (tensor, _) in zip(planned, held, strict=True)}, **extras}
            save_as_made(state if around is None else {"state_dict": state, **around}, str(part), held)
        return [out]
    if unknown := [each for each in planned if each.dtype not in DTYPES]:
        raise LoRAError(f"safetensors files hold no {unknown[0].dtype}, which {unknown[0].key!r} is.")
    if out.suffix == ".safetensors":
        with _replacing([out]) as (part,):
            _write_safetensors(part, planned)
        return [out]
    if not out.name.endswith(f".safetensors{INDEX}") or not all(n.endswith(".safetensors") for n in shards.values()):
        raise LoRAError(f"The name {out.name} is not one of a file to write: give it .safetensors, .ckpt or .pt.")
    if not shards:
        raise LoRAError("BASE has no index, so there is nothing to divide by: give OUT a name with .safetensors.")
    names = sorted(set(shards.values()))
    placed = {each.key: shards.get(each.key, names[-1]) for each in planned}
    files = [*(out.with_name(name) for name in names), out]
    with _replacing(files) as parts:
        for name, part in zip(names, parts, strict=False):
            _write_safetensors(part, [each for each in planned if placed[each.key] == name])
        index = {"metadata": {"total_size": sum(each.size for each in planned)}, "weight_map": placed}
        parts[-1].write_text(json.dumps(index, indent=2) + "\n")
    return files


def _write_safetensors(path: Path, planned: Iterable[Planned]) -> None:
    """Write the length of the header, the header, and the bytes of each tensor, the widest numbers first."""
    planned = sorted(planned, key=lambda each: -each.dtype.itemsize)  # so that each begins at a multiple of its width
    header: State = {"__metadata__": {"format": "pt"}}
    end = 0
    for each in planned:
        begin, end = end, end + each.size
        header[each.key] = {"dtype": DTYPES[each.dtype], "shape": list(each.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for each in planned:
            file.write(each.made().numpy().data)


@contextmanager
def _replacing(files: Sequence[Path]) -> Iterator[list[Path]]:
    """Give temporary names beside ``files``; if nothing is raised, what they name takes the files' places."""
    parts = [file.with_name(f".{file.name}.{os.getpid()}.part") for file in files]
    try:
        yield parts
        for part in parts:
            with open(part, "rb+") as written:
                os.fsync(written.fileno())
        for part, file in zip(parts, files, strict=True):
            os.replace(part, file)
    finally:
        for part in parts:
            part.unlink(missing_ok=True)


def shape_and_dtype(tensor: Tensor) -> str:
    """Return ``"64 x 32 float32"``."""
    sides: Any = " x ".join(map(str, tensor.shape)) or "scalar"
    return f"{sides} {str(tensor.dtype).removeprefix('torch.')}"
