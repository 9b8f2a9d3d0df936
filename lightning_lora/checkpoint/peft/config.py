"""PEFT's ``adapter_config.json``, and its rules for names."""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lightning_lora.errors import LoRAError
from lightning_lora.injection.options import Bias, matches

CONFIG = "adapter_config.json"
Version = tuple[int, int]
WRITTEN_AS = (0, 20)
"""The first version of PEFT whose layout of stacks is the one that is written."""

KEPT_BASE = ("gaussian", "eva", "orthogonal", "pissa")
"""Starts of PEFT, besides True and False, that leave the base weight alone, or whose change to it can be made again."""

OTHER_FUNCTIONS = (
    *("trainable_token_indices", "layer_replication", "lora_bias", "alora_invocation_tokens", "use_qalora"),
    *("use_bdlora", "arrow_config", "kasa_config", "monteclora_config"),
)
"""Settings of PEFT's with which an adapter is more than a product, or reaches only a part of the inputs."""

NUMBERS, FLAGS = ("r", "lora_alpha", "lora_dropout"), ("use_rslora", "use_dora", "ensure_weight_tying")
PATTERNS, NAMES = ("rank_pattern", "alpha_pattern"), ("target_parameters", "modules_to_save")


@dataclasses.dataclass(frozen=True)
class Config:
    """The settings in a file that matter here, by PEFT's names; those that PEFT only needs are added in writing."""

    r: float = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    rank_pattern: dict[str, float] = dataclasses.field(default_factory=dict)
    alpha_pattern: dict[str, float] = dataclasses.field(default_factory=dict)
    target_parameters: list[str] = dataclasses.field(default_factory=list)
    modules_to_save: list[str] = dataclasses.field(default_factory=list)
    bias: Bias = "none"
    use_rslora: bool = False
    use_dora: bool = False
    ensure_weight_tying: bool = False
    init_lora_weights: bool | str = True
    version: Version | None = WRITTEN_AS
    """That of PEFT, which it writes from 0.18 on."""

    @classmethod
    def read(cls, folder: Path) -> Config:
        """Return what the file in ``folder`` says.

        Raises:
            LoRAError: If it is missing, malformed, of another method, or of what is no increment of weights.
        """
        path = folder / CONFIG
        if not path.is_file():
            raise LoRAError(f"{str(folder)!r} has no {CONFIG}, as a folder of PEFT's has.")
        try:
            found = json.loads(path.read_text())
        except (ValueError, RecursionError) as error:
            raise LoRAError(f"{str(path)!r} cannot be read: {error}.") from error
        if not isinstance(found, dict) or str(found.get("peft_type")).upper() != "LORA":
            raise LoRAError(f"{str(path)!r} is of no LoRA adapter: its `peft_type` is not 'LORA'.")
        if others := [name for name in OTHER_FUNCTIONS if found.get(name)]:
            raise LoRAError(
                f"{str(path)!r} has `{others[0]}={found[others[0]]!r}`, with which the adapter is more than an"
                " increment of weights, as this library has it. Merge it by PEFT (`merge_and_unload`), and start from"
                " that."
            )
        start = found.get("init_lora_weights", True)
        if isinstance(start, str) and start not in KEPT_BASE:
            raise LoRAError(
                f"{str(path)!r} has `init_lora_weights={start!r}`, by which PEFT changes the base weights, and they are"
                " not in the files. Save it by PEFT with `path_initial_model_for_weight_conversion`, which makes it a"
                " plain adapter."
            )
        version = re.match(r"(\d{1,6})\.(\d{1,6})", str(found.get("peft_version")))
        given: dict[str, Any] = {
            "bias": found.get("bias") if found.get("bias") in ("all", "lora_only") else "none",
            "init_lora_weights": start,
            "version": None if version is None else (int(version[1]), int(version[2])),
            **{name: bool(found.get(name)) for name in FLAGS},
            **{name: found.get(name) or [] for name in NAMES},
            **{name: found.get(name) or {} for name in PATTERNS},
            **{name: found[name] for name in NUMBERS if found.get(name) is not None},
        }
        if trouble := _trouble(given):
            raise LoRAError(f"{str(path)!r}: {trouble}.")
        return cls(**given)

    def write(self, folder: Path, **besides: Any) -> None:
        """Write the file, with what ``besides`` says."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        for name in ("version", "ensure_weight_tying", *([] if self.target_parameters else ["target_parameters"])):
            del fields[name]  # the last two are not known to all versions
        fields |= {
            "modules_to_save": self.modules_to_save or None,
            "peft_version": f"{WRITTEN_AS[0]}.{WRITTEN_AS[1]}.0",
        }
        fields |= {"peft_type": "LORA", "task_type": None, "inference_mode": True, **besides}
        (folder / CONFIG).write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")

    def alpha(self, target: str) -> float:
        """Return alpha of ``target``, by PEFT's rule for patterns."""
        found = (alpha for key, alpha in self.alpha_pattern.items() if re.match(rf"(.*\.)?({key})$", target))
        return float(next(found, self.lora_alpha))

    def divisor(self, rank: int) -> float:
        """Return what alpha is divided by: the scale is alpha / r, or alpha / sqrt(r) for rsLoRA."""
        return math.sqrt(rank) if self.use_rslora else rank


def _trouble(given: Mapping[str, Any]) -> str | None:
    """Return what is wrong with settings that were read, if anything is."""
    numbers = {name: given[name] for name in NUMBERS if name in given}
    for name in PATTERNS:
        if not isinstance(given[name], dict):
            return f"`{name}` is no dictionary"
        for pattern, value in given[name].items():
            numbers[f"{name}[{pattern!r}]"] = value
            try:
                re.compile(pattern)
            except re.error as error:
                return f"{pattern!r} in `{name}` is no pattern: {error}"
    for name in NAMES:
        if not isinstance(given[name], list) or not all(isinstance(each, str) for each in given[name]):
            return f"`{name}` is no list of names"
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 2**63:
            return f"`{name}` is {value!r}, and should be a positive number"
    return None


# --------------------------------------------------------------------------------------------------------------- names


def rule_for(names: Iterable[str], universe: Iterable[str]) -> list[str] | str:
    """Return the shortest rule, as options have it, that names ``names`` and nothing else of ``universe``."""
    names, universe = set(names), {name for name in universe if name}
    suffixes = sorted({name.rpartition(".")[2] for name in names})
    for rule in (suffixes, sorted(names)):
        if not any(name.isdigit() for name in rule) and {name for name in universe if matches(name, rule)} == names:
            return rule
    return "|".join(map(re.escape, sorted(names)))


def usual_and_pattern(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return the most frequent value, and patterns for the names that have another."""
    usual = collections.Counter(values.values()).most_common(1)[0][0]
    return usual, {f"^{re.escape(name)}": value for name, value in values.items() if value != usual}
