"""Writes files of weights, one weight at a time.

Weights are mapped from disk: only those that are used are in memory, and :func:`release` lets them go. What is written
gets its name when all of it is on disk, so that a file of that name is the old one or the whole new one.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lightning_lora._compat import save_as_made
from lightning_lora.checkpoint.format import State
from lightning_lora.errors import LoRAError

INDEX = ".index.json"
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
