"""Reads a folder of PEFT's: which tensor belongs to which adapter, and what else was trained."""

from __future__ import annotations

import re
from pathlib import Path

from torch import Tensor

from lightning_lora.checkpoint.files import read
from lightning_lora.checkpoint.format import is_number
from lightning_lora.checkpoint.peft.config import Config
from lightning_lora.errors import LoRAError
from lightning_lora.naming import plain_name

WEIGHTS, OLD_WEIGHTS = "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
"""Buffers that training changes, as those of a BatchNorm."""

_LORA = re.compile(
    r"(?P<module>.+?)(?P<wrappers>(?:\.base_layer)*)\.(?P<kind>lora_(?:embedding_)?[AB]|lora_magnitude_vector)"
    r"(?:\.(?!weight$|bias$)(?P<adapter>[^.]+))?(?:\.weight)?"
)


class Folder:
    """What the two files say, with names as they are in the plain model.

    Args:
        path: Of the folder.

    Raises:
        LoRAError: If they are missing, malformed, or hold what is no product.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = Config.read(path)
        self.lora: dict[str, list[dict[str, Tensor]]] = {}
        """Name of a module -> the tensors of each wrapper round it, from the outermost; by their kinds."""
        self.others: dict[str, Tensor] = {}
        """Key -> what was trained in full, and running statistics."""
        found: dict[tuple[str, int], dict[str, Tensor]] = {}
        names, rest = {"default"}, {}
        for name, value in self._tensors().items():
            key = plain_name(name.removeprefix(PREFIX))
            if (match := _LORA.fullmatch(key)) is None:
                rest[key] = value
                continue
            if not is_number(value):
                raise LoRAError(f"{path} has {key!r} as {value.dtype}, which is not computed with.")
            where = match["module"].replace(".base_layer", ""), match["wrappers"].count(".")
            if match["kind"] in found.setdefault(where, {}):
                raise LoRAError(f"{path}: {where[0]!r} has several adapters. Save the one that is meant by itself.")
            found[where][match["kind"]] = value
            names |= {match["adapter"]} - {None}
        saved = re.compile(rf"\.modules_to_save\.(?:(?:{'|'.join(map(re.escape, names))})\.)?")
        for key, value in rest.items():
            if ".original_module." in key:
                continue
            if any(part in key for part in (".lora_", "token_adapter", "trainable_tokens")):
                raise LoRAError(f"{path} has {key!r}, which is no part of a product that this library knows.")
            self.others[saved.sub(".", key).replace(".base_layer", "")] = value
        for name, depth in sorted(found):
            if len(wrappers := self.lora.setdefault(name, [])) != depth:
                raise LoRAError(f"{path}: of the adapters of {name!r}, one is missing.")
            wrappers.append(found[name, depth])
        if not self.lora:
            raise LoRAError(f"{path} holds no adapters of LoRA.")

    def _tensors(self) -> dict[str, Tensor]:
        file = next((self.path / name for name in (WEIGHTS, OLD_WEIGHTS) if (self.path / name).is_file()), None)
        if file is None:
            raise LoRAError(f"{str(self.path)!r} has neither {WEIGHTS} nor {OLD_WEIGHTS}.")
        return read(file).weights
