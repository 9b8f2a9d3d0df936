"""Writes adapters as files of PEFT."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_lora.adapters import Adapter, full_adapters
from lightning_lora.checkpoint.files import File, read, safetensors
from lightning_lora.checkpoint.format import SavedRun, weight_key
from lightning_lora.checkpoint.peft import layouts
from lightning_lora.checkpoint.peft.config import Config, rule_for, usual_and_pattern
from lightning_lora.checkpoint.peft.folder import PREFIX, STATISTICS, WEIGHTS
from lightning_lora.errors import LoRAError, listed, warn
from lightning_lora.hosts import layer_of
from lightning_lora.injection.inject import injections, places, trained_besides
from lightning_lora.naming import plain_name, state_key, unwrapped
from lightning_lora.weights import full_states
from lightning_lora.weights.sharded import reshard


def save_peft(
    module_or_checkpoint_file: nn.Module | str | os.PathLike[str], folder: str | os.PathLike[str], root: str = ""
) -> None:
    """Write the adapters of a module, or of a checkpoint file, as files that PEFT reads.

    ``PeftModel.from_pretrained(base, folder)`` computes what the adapted module does. What is no product of rank r in
    the module becomes the equal product: the additive decomposition, and starts whose product is taken away, have rank
    2r in the files. What is trained besides is in them too: whole modules as ``modules_to_save``, other parameters and
    the running statistics of BatchNorms by their names.

    Args:
        module_or_checkpoint_file: A module with adapters, or the path of a checkpoint that a run with LoRA has written,
            in either form; no model is built then. Where the module is sharded, all ranks call this together.
        folder: Is made if it does not exist. ``adapter_model.safetensors`` and ``adapter_config.json`` in it are
            replaced.
        root: The name of the submodule that PEFT is to wrap, such as ``"model"`` for a LightningModule that keeps a
            Hugging Face model there.

    Raises:
        LoRAError: If there are no adapters, or PEFT has no form for one of them.
    """
    if isinstance(module_or_checkpoint_file, nn.Module):
        source = _of_module(module_or_checkpoint_file)
    else:
        source = _of_file(module_or_checkpoint_file)
    export = _Export(source, root)
    if dist.is_available() and dist.is_initialized() and dist.get_rank() != 0:
        return
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # safetensors takes no two tensors that share memory
    tensors = {
        f"{PREFIX}{key}": value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for key, value in export.tensors.items()
    }
    safetensors().torch.save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    export.write_config(folder)


class _Increment(NamedTuple):
    """An adapter, and the layer in which it stands, by :func:`~lightning_lora.hosts.layer_of`."""

    adapter: Adapter
    layer: str


@dataclasses.dataclass
class _Source:
    """What is to be written, by keys of the plain module's state dict."""

    increments: dict[str, _Increment]
    """Key of the weight -> its adapter."""
    trained: list[str]
    tensors: Mapping[str, Tensor]
    """Values, as far as they are known."""
    keys: list[str]
    """All parameters and buffers, in the module's order."""
    options: Mapping[str, Any]
    base: str | None = None
    """The name or path of the pretrained model."""


def _of_module(module: nn.Module) -> _Source:
    module = unwrapped(module)
    reshard(module)
    found = list(places(module))
    if not found:
        raise LoRAError(
            f"{type(module).__name__} has no adapters. After `fit` they are merged into the weights: give"
            " `save_peft` the checkpoint file of the run, which has them."
        )
    full = full_adapters([place.adapter for place in found])
    factors = {tensor for place in found for tensor in (*place.adapter.parameters(), *place.adapter.buffers())}
    named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    known = {plain_name(state_key(name)): tensor for name, tensor in named if tensor not in factors}
    trained = [plain_name(name) for name in trained_besides(module)]
    return _Source(
        {
            plain_name(place.key): _Increment(adapter, layer_of(place.host, place.key.rpartition(".")[2]))
            for place, adapter in zip(found, full, strict=True)
        },
        trained,
        full_states([{key: known[key] for key in known if key in trained or _is_statistic(key)}])[0],
        list(known),
        next(injections(module)).options.to_primitives(),
        next((name for child in module.modules() if (name := _pretrained_name(child))), None),
    )


def _pretrained_name(module: nn.Module) -> str | None:
    name = getattr(getattr(module, "config", None), "_name_or_path", None)
    return name if isinstance(name, str) and name else None


def _of_file(file: File) -> _Source:
    opened = read(file)
    run, tensors = opened.run(), opened.plain_weights()
    keys = list(dict.fromkeys([*tensors, *map(plain_name, run.base)]))
    increments = {}
    for name, state in run.adapters.items():
        if state.resample is not None:
            raise LoRAError(_drawn_anew(name))
        key = weight_key(name, dict.fromkeys(keys))
        increments[key] = _Increment(Adapter.from_state(state), run.layers.get(name) or _guessed(name, key, run, keys))
    return _Source(increments, [plain_name(key) for key in run.trained], tensors, keys, run.options)


def _guessed(name: str, key: str, run: SavedRun, keys: Sequence[str]) -> str:
    """Return the layer of an adapter in a file that does not say it, told by what its module's parameters are."""
    state = run.adapters[name]
    tied = sum(other.key == state.key for other in run.adapters.values()) > 1
    projection = f"{name.rpartition('.')[0]}.in_proj_weight".lstrip(".")
    if key != f"{name}.weight" or tied or state.B.dim() == 3:
        raise LoRAError(
            f"The file was written by an earlier version and does not say what layer {name!r} is in. Resume its run,"
            " which writes a new file, or give `save_peft` the adapted module."
        )
    if key.endswith("out_proj.weight") and projection in keys:
        return layouts.ATTENTION
    if not state.transposed:
        return "Linear" if len(state.shape) == 2 else f"Conv{len(state.shape) - 2}d"
    return "Conv1D" if f"{name}.bias" in keys else "Embedding"


def _drawn_anew(name: str) -> str:
    return (
        f"The weight of {name!r} holds increments of earlier draws, whose sum is no product of a low rank, so PEFT"
        " cannot express it. Use the merged weights: `state_dict` of a checkpoint file, or `merged_state_dict`."
    )


class _Export:
    """What the two files hold."""

    def __init__(self, source: _Source, root: str) -> None:
        self.source = source
        self.root = f"{root}." if root else ""
        outside = [key for key in (*source.increments, *source.trained) if not key.startswith(self.root)]
        self.increments = {self._inside(k): v for k, v in source.increments.items() if k not in outside}
        self.trained = [self._inside(key) for key in source.trained if key not in outside]
        self.keys = [self._inside(key) for key in source.keys if key.startswith(self.root)]
        if not self.increments:
            raise LoRAError(f"There are no adapters in {root!r}, only in {listed(source.increments)}.")
        if outside:
            warn(f"{listed(outside)} are outside of {root!r} and not in the files.", stacklevel=4)
        self.inside: dict[str, list[str]] = {}
        """Name of a module -> keys of what is in it."""
        for key in self.keys:
            for name in itertools.islice(_ends(key), key.count(".")):
                self.inside.setdefault(name, []).append(key)
        self.tensors: dict[str, Tensor] = {}
        """What goes into the file, by names in the wrapped model."""
        self.ranks: dict[str, tuple[int, float]] = {}
        """What PEFT calls a target -> rank and scale."""
        self.wraps: collections.Counter[str] = collections.Counter()
        """Name of a module -> how many wrappers PEFT puts round it."""
        self.by_module: set[str] = set()
        self.by_parameter: set[str] = set()
        decompositions = {increment.adapter.decomposition for increment in self.increments.values()}
        self.is_dora = decompositions == {"dora"}
        if "dora" in decompositions and not self.is_dora:
            raise LoRAError(
                f"PEFT has DoRA in all of its adapters or in none, and here are {listed(decompositions)}. Save each"
                " part of the module by itself, by `root`."
            )
        remaining = dict(self.increments)
        for key in [key for key, increment in remaining.items() if increment.layer == layouts.ATTENTION]:
            if key in remaining:
                self._add_attention(key, remaining)
        order = {key: index for index, key in enumerate(self.keys)}
        for key in sorted(remaining, key=lambda key: order.get(key, -1), reverse=True):
            self._add(key, remaining[key])
        self.modules_to_save = self._add_trained()

    def _inside(self, key: str) -> str:
        return key.removeprefix(self.root)

    # ---------------------------------------------------------------------------------------------------- adapters

    def _add(self, key: str, increment: _Increment) -> None:
        adapter, layer = increment
        owner = key.rpartition(".")[0]
        R, C = self._factors(key, adapter)
        if layer in layouts.MODULES and owner:
            self.by_module.add(owner)
            name, target = owner, owner
        elif layer in layouts.PARAMETERS and owner and not self.is_dora:
            self.by_parameter.add(key)
            name, target = owner + ".base_layer" * self.wraps[owner], key
        else:
            what = f"DoRA of a {layer}" if self.is_dora else f"an adapter of a {layer}"
            what = what if owner else "an adapter of a parameter of the module itself"
            raise LoRAError(
                f"PEFT has no form for {what}, here {key!r}. Name it in `exclude_modules` when training, or use the"
                " merged weights: `state_dict` of a checkpoint file, or `merged_state_dict`."
            )
        self.wraps[owner] += 1
        self.ranks[target] = R.shape[-2], adapter.scale
        self._put(name, layouts.encoded(layer, R, C, adapter.shape))
        if self.is_dora:
            if adapter.transposed != (layer in layouts.TRANSPOSED):
                raise LoRAError(f"The magnitudes of {key!r} are those of a weight that it is tied to, by its columns.")
            shape = (1, -1, *(1 for _ in adapter.shape[2:])) if layer in layouts.CONVOLUTIONS else (-1,)
            self._put(name, {"lora_magnitude_vector": _magnitude(key, adapter).view(shape)})

    def _put(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        self.tensors |= {f"{name}.{what}": tensor for what, tensor in tensors.items()}

    def _add_attention(self, key: str, remaining: dict[str, _Increment]) -> None:
        """Add both adapters of the MultiheadAttention that has the weight ``key``, with one rank and scale."""
        owner = key.rpartition(".")[0]
        owner = owner if key.endswith("in_proj_weight") else owner.rpartition(".")[0]
        projections = {f"{owner}.in_proj_weight": "", f"{owner}.out_proj.weight": ".base_layer.out_proj"}
        found = {k: remaining.pop(k) for k in projections if k in remaining}
        if self.is_dora or not owner:
            self._add(key, found[key])  # which says why it cannot be
        factors = {k: self._factors(k, increment.adapter) for k, increment in found.items()}
        warn(
            f"PEFT adds the increment of the `out_proj` of {owner!r} twice, to version"
            f" {'.'.join(map(str, layouts.TWICE_UNTIL))} at least; half of it is in the file, so that these"
            " versions compute what the module does.",
            stacklevel=5,
        )
        rank, scale = max(R.shape[-2] for R, _ in factors.values()), found[key].adapter.scale
        size = factors[key][1].shape[-1]
        for (weight, name), rows in zip(projections.items(), (3 * size, size), strict=True):
            R, C = factors.get(weight, (torch.zeros(0, rows), torch.zeros(0, size)))
            own = found[weight].adapter.scale if weight in found else scale
            R = R * (own / scale / (2 if name else 1))
            R, C = (torch.cat([f, f.new_zeros(rank - f.shape[0], f.shape[1])]) for f in (R, C))
            self._put(f"{owner}{name}", layouts.encoded("Linear", R, C, (rows, size)))
        self.wraps.update([owner, f"{owner}.out_proj"])
        self.by_module.add(owner)
        self.ranks[owner] = rank, scale

    def _factors(self, key: str, adapter: Adapter) -> tuple[Tensor, Tensor]:
        """Return R and C, float32 at least: the increment of the weight as it is stored is ``scale * R.T @ C``."""
        if adapter.resample is not None:
            raise LoRAError(_drawn_anew(key))
        if adapter.rescales and adapter.decomposition != "dora":
            raise LoRAError(
                f"PEFT has no form for `decomposition={adapter.decomposition!r}`, which rescales the weight {key!r}."
                " Use the merged weights: `state_dict` of a checkpoint file, or `merged_state_dict`."
            )
        A, B = (factor.to(torch.promote_types(factor.dtype, torch.float32)) for factor in adapter.increment())
        return (A, B) if adapter.transposed else (B, A)

    # ------------------------------------------------------------------------------------------ what is trained in full

    def _add_trained(self) -> list[str]:
        """Add what is trained in full, and running statistics; return the modules that are saved as a whole."""
        trained, whole = set(self.trained), set()
        for owner in {key.rpartition(".")[0] for key in trained} & self.inside.keys():
            own = self.inside[owner]
            named = any(not key.rpartition(".")[2].isdigit() for key in own)  # PEFT refuses lists of parameters
            is_whole = all(key in trained or _is_statistic(key) for key in own)
            if named and is_whole and all(key.rpartition(".")[0] == owner for key in own):
                whole.add(owner)
        while unfit := [name for name in whole if not self._may_save(name, whole)]:
            whole.difference_update(unfit)
        saved = [key for owner in whole for key in self.inside[owner]]
        for key in dict.fromkeys([*saved, *self.trained, *filter(_is_statistic, self.keys)]):
            if (value := self.source.tensors.get(f"{self.root}{key}")) is None:
                raise LoRAError(f"{key!r} was trained, and the checkpoint file does not hold it.")
            self.tensors[key if key in saved else self._wrapped(key)] = value
        return sorted(whole)

    def _may_save(self, name: str, whole: Iterable[str]) -> bool:
        """Return whether PEFT, which goes by the ends of names, takes ``name`` only for modules that are saved."""
        wrapped = any(f".{name}." in f".{owner}." for owner in self.wraps)
        return not wrapped and all(module in whole for module in self.inside if module.endswith(name))

    def _wrapped(self, key: str) -> str:
        """Return ``key`` as it is in the wrapped model."""
        parts = zip(key.split("."), _ends(key), strict=True)
        return ".".join(part + ".base_layer" * self.wraps.get(name, 0) for part, name in parts)

    # --------------------------------------------------------------------------------------------------------- config

    def write_config(self, folder: Path) -> None:
        """Write what the tensors do not say."""
        options = self.source.options
        dropout, bias = options.get("dropout"), options.get("bias")
        config = Config(
            modules_to_save=self.modules_to_save,
            target_parameters=sorted(self.by_parameter),
            use_rslora=options.get("use_rslora") is True,
            use_dora=self.is_dora,
            lora_dropout=dropout if isinstance(dropout, float) and not self.by_parameter else 0.0,
            bias=bias if bias in ("all", "lora_only") else "none",
        )
        r, rank_pattern = usual_and_pattern({name: rank for name, (rank, _) in self.ranks.items()})
        alphas = {name: _as_int(scale * config.divisor(rank)) for name, (rank, scale) in self.ranks.items()}
        alpha, alpha_pattern = usual_and_pattern(alphas)
        layers = {increment.layer for increment in self.increments.values()}
        dataclasses.replace(
            config, r=r, rank_pattern=rank_pattern, lora_alpha=alpha, alpha_pattern=alpha_pattern
        ).write(
            folder,
            base_model_name_or_path=self.source.base,
            target_modules=rule_for(self.by_module, self.inside) if self.by_module else None,
            fan_in_fan_out="Conv1D" in layers and not self.by_parameter,
        )


def _magnitude(key: str, adapter: Adapter) -> Tensor:
    """DoRA's magnitudes; where a row of W0 is zero, and stays as it is scaled, the norm of its increment."""
    magnitude: Any = adapter.magnitude
    zero = magnitude == 0
    if zero.any():
        A, B = adapter.increment()
        norms = torch.linalg.vector_norm(adapter.scale * B.mT @ A, dim=-1)
        magnitude = torch.where(zero, norms, magnitude)
        if (magnitude == 0).any():
            raise LoRAError(
                f"Outputs of {key!r} have weights that are all zero, which PEFT's DoRA divides by. Exclude the module"
                " when training, or use the merged weights."
            )
    return magnitude


def _ends(key: str) -> Iterable[str]:
    """Return the names of all that ``key`` is in, from the outermost, and ``key``."""
    return itertools.accumulate(key.split("."), lambda name, part: f"{name}.{part}")


def _as_int(value: float) -> float:
    """Return ``value``; the whole number that it is but for rounding."""
    return round(value) if math.isclose(value, round(value), rel_tol=1e-12) else value


def _is_statistic(key: str) -> bool:
    return key.rpartition(".")[2] in STATISTICS
