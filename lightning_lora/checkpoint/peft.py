"""Adapters in the files of PEFT, ``adapter_model.safetensors`` and ``adapter_config.json``: written, and read back.

With R (r, rows) and C (r, columns), such that the increment of a weight as it is stored is ``scale * R.T @ C``, the
layouts of PEFT are

===============================  =====================================  =====================================
the weight, as it is stored      ``lora_A``                             ``lora_B``
===============================  =====================================  =====================================
Linear (out, in), any matrix     C (r, in)                              R^T (out, r)
Conv1D of transformers (in, out) R (r, in)                              C^T (out, r)
Embedding (number, size)         R (r, number), ``lora_embedding_A``    C^T (size, r), ``lora_embedding_B``
Conv (out, in, ...)              C (r, in, ...)                         R^T (out, r, 1, ...)
stack (k, out, in)               C (k r, in)                            (out, r k): R[j, i] in column i k + j
stack (k, in, out)               R (k r, in)                            (out, r k): C[j, i] in column i k + j
===============================  =====================================  =====================================

A module whose parameters are adapted by ``target_parameters`` is wrapped once for each, from the first to the last;
what is inside a wrapper has ``base_layer`` in its name. A MultiheadAttention has two adapters of one rank: that of
``in_proj_weight``, and that of ``out_proj`` inside. Which of the two layouts a stack has depends on PEFT's version and
on the module's ``is_transposed``; files are written as by :data:`WRITTEN_AS`.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_lora.adapters import Adapter, full_adapters
from lightning_lora.checkpoint.format import KEY, State, _is_number, check_format, damage, weight_key
from lightning_lora.errors import LoRAError, listed, warn
from lightning_lora.hosts import layer_of, stacks
from lightning_lora.injection.inject import Injection, adapters, inject_options, injections, places, trained_besides
from lightning_lora.injection.layers import output_heads
from lightning_lora.injection.options import Options, matches
from lightning_lora.naming import plain_name, state_key, unwrapped
from lightning_lora.weights import full_states, storage_of

WEIGHTS, OLD_WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_model.bin", "adapter_config.json"
PREFIX = "base_model.model."
WRITTEN_AS = "0.20.0"
"""The first version of PEFT whose layout of stacks is the one that is written."""

CONVOLUTIONS = ("Conv1d", "Conv2d", "Conv3d")
MODULES = ("Linear", "Conv1D", "Embedding", *CONVOLUTIONS)
"""Layers for which PEFT has a wrapper of their own, by the names of :func:`~lightning_lora.hosts.layer_of`."""
ATTENTION = "MultiheadAttention"
PARAMETERS = ("parameter", "transposed parameter")
TWICE_UNTIL = (0, 21)
"""The last version of PEFT that is known to add the increment of a MultiheadAttention's ``out_proj`` twice, in each
forward and in each merge. Files are written and read so that the function is the same."""

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
"""Buffers that training changes, as those of a BatchNorm."""

FROM_FILES = (
    "rank",
    "alpha",
    "target_modules",
    "exclude_modules",
    "target_parameters",
    "modules_to_save",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "bias",
    "decomposition",
    "init",
    "resample_every_n_steps",
)
"""Options that cannot be given beside files, which say it."""

KEPT_BASE = ("gaussian", "eva", "orthogonal", "pissa")
"""Starts of PEFT, besides True and False, that leave the base weight alone, or whose change to it can be made again."""

OTHER_FUNCTIONS = (
    "trainable_token_indices",
    "layer_replication",
    "lora_bias",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
)
"""Settings of PEFT's with which an adapter is more than a product, or reaches only a part of the inputs."""


# ------------------------------------------------------------------------------------------------------------ writing


def save_peft(module_or_checkpoint_file: nn.Module | str | os.PathLike[str], folder: Any, root: str = "") -> None:
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
        source = _of_file(Path(module_or_checkpoint_file))
    tensors, config = _Export(source, root).files()
    if dist.is_available() and dist.is_initialized() and dist.get_rank() != 0:
        return
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _safetensors().save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


class _Increment(NamedTuple):
    """An adapter, and where it stands."""

    adapter: Adapter
    layer: str
    """That of :func:`~lightning_lora.hosts.layer_of`."""

    def stored(self) -> tuple[Tensor, Tensor]:
        """R and C, such that the increment of the weight as it is stored is ``scale * R.T @ C``, float32 at least."""
        A, B = (factor.to(torch.promote_types(factor.dtype, torch.float32)) for factor in self.adapter.increment())
        return (A, B) if self.adapter.transposed else (B, A)


@dataclasses.dataclass
class _Source:
    """What is to be written, by keys of the plain module's state dict."""

    increments: dict[str, _Increment]
    """Key of the weight -> its adapter."""
    trained: list[str]
    tensors: Mapping[str, Any]
    """Values, as far as they are known."""
    keys: list[str]
    """All parameters and buffers, in the module's order."""
    options: Mapping[str, Any]
    base: str | None
    """The name or path of the pretrained model."""


def _of_module(module: nn.Module) -> _Source:
    module = unwrapped(module)
    found = list(places(module))
    if not found:
        raise LoRAError(
            f"{type(module).__name__} has no adapters. After `fit` they are merged into the weights: give"
            " `save_peft` the checkpoint file of the run, which has them."
        )
    increments = {}
    for place, adapter in zip(found, full_adapters([place.adapter for place in found]), strict=True):
        parameter = place.key.rpartition(".")[2]
        increments[plain_name(place.key)] = _Increment(adapter, layer_of(place.host, parameter))
    factors = {tensor for place in found for tensor in (*place.adapter.parameters(), *place.adapter.buffers())}
    named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    known = {plain_name(state_key(name)): tensor for name, tensor in named if tensor not in factors}
    trained = [plain_name(name) for name in trained_besides(module)]
    statistics = [key for key in known if _is_statistic(key)]
    return _Source(
        increments,
        trained,
        known | full_states([{key: known[key] for key in (*trained, *statistics)}])[0],
        list(known),
        next(injections(module)).options.to_primitives(),
        next((name for child in module.modules() if (name := _pretrained_name(child))), None),
    )


def _pretrained_name(module: nn.Module) -> str | None:
    name = getattr(getattr(module, "config", None), "_name_or_path", None)
    return name if isinstance(name, str) and name else None


def _of_file(path: Path) -> _Source:
    if not path.is_file():
        raise LoRAError(
            f"{str(path)!r} is no file. Give `save_peft` a module with adapters, or one checkpoint file; a folder of"
            " shards becomes one file by `python -m lightning.pytorch.utilities.consolidate_checkpoint`."
        )
    if (what := damage(path)) is not None:
        raise LoRAError(f"The checkpoint {str(path)!r} is {what}.")
    checkpoint = _load_pickled(path)
    if not isinstance(checkpoint, Mapping) or not isinstance(state := checkpoint.get("state_dict"), Mapping):
        raise LoRAError(f"{str(path)!r} is no checkpoint of Lightning.")
    if (payload := checkpoint.get(KEY)) is None:
        raise LoRAError(f"{str(path)!r} was not written by a run with LoRA: it holds no adapters.")
    check_format(payload)
    keys = list(dict.fromkeys(plain_name(key) for key in (*state, *payload["base"]) if isinstance(key, str)))
    layers, options = payload.get("layers"), payload.get("options")
    increments: dict[str, _Increment] = {}
    for name, entry in payload["adapters"].items():
        if entry["resample"] is not None:
            raise LoRAError(_drawn_anew(name))
        key = weight_key(name, dict.fromkeys(keys))
        known = isinstance(layers, Mapping) and isinstance(layers.get(name), str)
        layer = layers[name] if known else _guessed(name, key, payload, keys)
        increments[key] = _Increment(Adapter.from_state(entry), layer)
    return _Source(
        increments,
        [plain_name(key) for key in payload["trained"]],
        {plain_name(key): value for key, value in state.items() if isinstance(key, str)},
        keys,
        options if isinstance(options, Mapping) else {},
        None,
    )


def _guessed(name: str, key: str, payload: State, keys: Sequence[str]) -> str:
    """The layer of an adapter in a file that does not say it, told by what its module's parameters are."""
    entry = payload["adapters"][name]
    shape, stacked = entry["shape"], entry["B"].dim() == 3
    tied = sum(other["key"] == entry["key"] for other in payload["adapters"].values()) > 1
    projection = f"{name.rpartition('.')[0]}.in_proj_weight".lstrip(".")
    if key != f"{name}.weight" or tied or stacked:
        raise LoRAError(
            f"The file was written by an earlier version and does not say what layer {name!r} is in. Resume its run,"
            " which writes a new file, or give `save_peft` the adapted module."
        )
    if key.endswith("out_proj.weight") and projection in keys:
        return ATTENTION
    if not entry["transposed"]:
        return "Linear" if len(shape) == 2 else f"Conv{len(shape) - 2}d"
    return "Conv1D" if f"{name}.bias" in keys else "Embedding"


def _drawn_anew(name: str) -> str:
    return (
        f"The weight of {name!r} holds increments of earlier draws, whose sum is no product of a low rank, so PEFT"
        " cannot express it. Use the merged weights: `state_dict` of a checkpoint file, or `merged_state_dict`."
    )


class _Export:
    """One call of :func:`save_peft`."""

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
        self.tensors: dict[str, Tensor] = {}
        self.ranks: dict[str, tuple[int, float]] = {}
        """What PEFT calls a target -> rank and scale."""
        self.wraps: collections.Counter[str] = collections.Counter()
        """Name of a module -> how many wrappers PEFT puts round it."""
        self.by_module: set[str] = set()
        self.by_parameter: set[str] = set()
        kinds = {increment.adapter.decomposition for increment in self.increments.values()}
        self.is_dora = kinds == {"dora"}
        if "dora" in kinds and not self.is_dora:
            raise LoRAError(
                f"PEFT has DoRA in all of its adapters or in none, and here are {listed(kinds)}. Save each part of the"
                " module by itself, by `root`."
            )

    def _inside(self, key: str) -> str:
        return key.removeprefix(self.root)

    def files(self) -> tuple[dict[str, Tensor], State]:
        """Return what the two files hold."""
        increments = dict(self.increments)
        for key in list(increments):
            if key in increments and increments[key].layer == ATTENTION:
                self._attention(key, increments)
        order = {key: index for index, key in enumerate(self.keys)}
        for key in sorted(increments, key=lambda key: order.get(key, -1), reverse=True):
            self._one(key, increments[key])
        modules_to_save = self._besides()
        tensors = {f"{PREFIX}{key}": value for key, value in self.tensors.items()}
        # safetensors takes no two tensors that share memory
        return {
            key: value.detach().cpu().clone(memory_format=torch.contiguous_format) for key, value in tensors.items()
        }, self._config(modules_to_save)

    # ---------------------------------------------------------------------------------------------------- adapters

    def _one(self, key: str, increment: _Increment) -> None:
        adapter, layer = increment
        owner = key.rpartition(".")[0]
        R, C = self._factors(key, increment)
        if layer in MODULES and owner:
            self.by_module.add(owner)
            name, target = owner, owner
        elif layer in PARAMETERS and owner and not self.is_dora:
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
        for suffix, value in _encoded(layer, R, C, adapter.shape).items():
            self.tensors[f"{name}.{suffix}"] = value
        if self.is_dora:
            if adapter.transposed != (layer in ("Conv1D", "Embedding")):
                raise LoRAError(f"The magnitudes of {key!r} are those of a weight that it is tied to, by its columns.")
            magnitude = _magnitude(key, adapter)
            shape = (1, -1, *(1 for _ in adapter.shape[2:])) if layer in CONVOLUTIONS else (-1,)
            self.tensors[f"{name}.lora_magnitude_vector"] = magnitude.view(shape)

    def _attention(self, key: str, increments: dict[str, _Increment]) -> None:
        """Both adapters of the MultiheadAttention that has the weight ``key``, with one rank and scale."""
        owner = key.rpartition(".")[0]
        owner = owner if key.endswith("in_proj_weight") else owner.rpartition(".")[0]
        projections = {f"{owner}.in_proj_weight": "", f"{owner}.out_proj.weight": ".base_layer.out_proj"}
        found = {k: increments.pop(k) for k in projections if k in increments}
        if self.is_dora or not owner:
            self._one(key, found[key])
        factors = {k: self._factors(k, increment) for k, increment in found.items()}
        warn(
            f"PEFT adds the increment of the `out_proj` of {owner!r} twice, to version"
            f" {'.'.join(map(str, TWICE_UNTIL))} at least; half of it is in the file, so that these"
            " versions compute what the module does.",
            stacklevel=5,
        )
        rank = max(R.shape[-2] for R, _ in factors.values())
        scale = found[key].adapter.scale
        size = factors[key][1].shape[-1]
        for (weight, name), rows in zip(projections.items(), (3 * size, size), strict=True):
            R, C = factors.get(weight, (torch.zeros(0, rows), torch.zeros(0, size)))
            R = R if weight not in found else R * (found[weight].adapter.scale / scale)
            R = R / 2 if name else R
            R, C = (torch.cat([f, f.new_zeros(rank - f.shape[0], f.shape[1])]) for f in (R, C))
            for suffix, value in _encoded("Linear", R, C, (rows, size)).items():
                self.tensors[f"{owner}{name}.{suffix}"] = value
        self.wraps[owner] += 1
        self.wraps[f"{owner}.out_proj"] += 1
        self.by_module.add(owner)
        self.ranks[owner] = rank, scale

    def _factors(self, key: str, increment: _Increment) -> tuple[Tensor, Tensor]:
        adapter = increment.adapter
        if adapter.resample is not None:
            raise LoRAError(_drawn_anew(key))
        if adapter.rescales and adapter.decomposition != "dora":
            raise LoRAError(
                f"PEFT has no form for `decomposition={adapter.decomposition!r}`, which rescales the weight {key!r}."
                " Use the merged weights: `state_dict` of a checkpoint file, or `merged_state_dict`."
            )
        return increment.stored()

    # -------------------------------------------------------------------------------------------------------- besides

    def _besides(self) -> list[str]:
        """Add what is trained in full, and running statistics; return the modules that are saved as a whole."""
        trained, whole = set(self.trained), set()
        inside: dict[str, list[str]] = {}
        for key in self.keys:
            parts = key.split(".")
            for end in range(1, len(parts)):
                inside.setdefault(".".join(parts[:end]), []).append(key)
        for owner in {key.rpartition(".")[0] for key in trained} & inside.keys():
            own = inside[owner]
            named = any(not key.rpartition(".")[2].isdigit() for key in own)  # PEFT refuses lists of parameters
            is_whole = all(key in trained or _is_statistic(key) for key in own)
            if named and is_whole and all(key.rpartition(".")[0] == owner for key in own):
                whole.add(owner)
        while unfit := [name for name in whole if not self._may_save(name, whole, inside)]:
            whole.difference_update(unfit)
        saved = [key for owner in whole for key in inside[owner]]
        for key in dict.fromkeys([*saved, *self.trained, *filter(_is_statistic, self.keys)]):
            value = self.source.tensors.get(f"{self.root}{key}")
            if not isinstance(value, Tensor):
                raise LoRAError(f"{key!r} was trained, and the checkpoint file does not hold it.")
            self.tensors[key if key in saved else self._wrapped(key)] = value
        return sorted(whole)

    def _may_save(self, name: str, whole: set[str], modules: Iterable[str]) -> bool:
        """Whether PEFT, which goes by the ends of names, takes ``name`` for nothing but modules that are saved."""
        wrapped = any(f".{name}." in f".{owner}." for owner in self.wraps)
        return not wrapped and all(module in whole for module in modules if module.endswith(name))

    def _wrapped(self, key: str) -> str:
        """``key`` as it is in the wrapped model."""
        parts = key.split(".")
        names = itertools.accumulate(parts, lambda name, part: f"{name}.{part}")
        return ".".join(p + ".base_layer" * self.wraps.get(n, 0) for p, n in zip(parts, names, strict=True))

    # --------------------------------------------------------------------------------------------------------- config

    def _config(self, modules_to_save: list[str]) -> State:
        options = self.source.options
        rslora = options.get("use_rslora") is True
        dropout, bias = options.get("dropout"), options.get("bias")
        ranks = {name: rank for name, (rank, _) in self.ranks.items()}
        alphas = {n: _as_int(scale * (math.sqrt(rank) if rslora else rank)) for n, (rank, scale) in self.ranks.items()}
        modules = {".".join(parts[:end]) for parts in (k.split(".") for k in self.keys) for end in range(1, len(parts))}
        layers = {increment.layer for increment in self.increments.values()}
        config = {
            "peft_type": "LORA",
            "peft_version": WRITTEN_AS,
            "base_model_name_or_path": self.source.base,
            "task_type": None,
            "inference_mode": True,
            "r": _usual(ranks),
            "lora_alpha": _usual(alphas),
            "rank_pattern": _pattern(ranks),
            "alpha_pattern": _pattern(alphas),
            "target_modules": _rule(self.by_module, modules) if self.by_module else None,
            "modules_to_save": modules_to_save or None,
            "use_rslora": rslora,
            "use_dora": self.is_dora,
            "lora_dropout": dropout if isinstance(dropout, float) and not self.by_parameter else 0.0,
            "bias": bias if bias in ("all", "lora_only") else "none",
            "fan_in_fan_out": "Conv1D" in layers and not self.by_parameter,
            "init_lora_weights": True,
        }
        return config | ({"target_parameters": sorted(self.by_parameter)} if self.by_parameter else {})


def _encoded(layer: str, R: Tensor, C: Tensor, shape: Sequence[int]) -> dict[str, Tensor]:
    """The tensors of PEFT for R and C, by what their names end in."""
    if layer == "Embedding":
        return {"lora_embedding_A": R, "lora_embedding_B": C.T}
    if R.dim() == 3:
        A, B = (R, C) if layer == "transposed parameter" else (C, R)
        A, B = A.flatten(0, 1), B.permute(2, 1, 0).flatten(1)
    elif layer == "Conv1D":
        A, B = R, C.T
    elif layer in CONVOLUTIONS:
        A, B = C.view(-1, *shape[1:]), R.T.reshape(shape[0], -1, *(1 for _ in shape[2:]))
    else:
        A, B = C, R.T
    return {"lora_A.weight": A, "lora_B.weight": B}


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


# ------------------------------------------------------------------------------------------------------------ reading


def load_peft(module: nn.Module, folder: str | os.PathLike[str], root: str = "", **options: Any) -> list[str]:
    """Put the adapters that PEFT's files hold into ``module``, to compute with, merge, or train them further.

    Nothing in the files is executed: tensors are read by safetensors, those of ``adapter_model.bin`` with
    ``weights_only``.

    Args:
        module: One without adapters, with the pretrained weights that the files were made for.
        folder: Of PEFT, of any of its versions, or of :func:`save_peft`.
        root: The name of the submodule that PEFT has wrapped. Where the files' names are not there, and in one other
            submodule alone, that is meant.
        **options: Those of :class:`~lightning_lora.LoRA` that files do not have: ``gradient``, ``dropout``,
            ``lr_ratio``, ``adapter_dtype``, ``seed``.

    Returns:
        The names of what is adapted, as :func:`~lightning_lora.inject` does.

    Raises:
        LoRAError: If the files are not adapters of LoRA, damaged, made for another module, or compute what is no
            product; the module is as it was then.
    """
    return load(module, folder, Options(**options), root).adapted


def check_beside_files(options: Options) -> None:
    """Raise if ``options`` say what files of PEFT say themselves."""
    given = [name for name in FROM_FILES if getattr(options, name) != getattr(Options(), name)]
    if given:
        names = ", ".join(f"`{name}={getattr(options, name)!r}`" for name in given)
        raise LoRAError(
            f"{names} cannot be combined with adapters that are read from files, which say what they are. Leave it out."
            " To begin other adapters on top of these, merge them first: `load_peft`, then `merge`."
        )


def load(module: nn.Module, folder: str | os.PathLike[str], options: Options, root: str = "") -> Injection:
    """:func:`load_peft` for options that have been validated; those of the injection say what the files do."""
    check_beside_files(options)
    files = _Files(Path(folder))
    module = unwrapped(module)
    if adapters(module):
        inject_options(module, options)  # which says it
    return _Import(files, module, root).into(options)


class _Files:
    """What the two files say, with names as they are in the plain model."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = self._read_config()
        self.lora: dict[str, list[dict[str, Tensor]]] = {}
        """Name of a module -> the tensors of each wrapper round it, from the outermost; by their kinds."""
        self.others: dict[str, Tensor] = {}
        found: dict[tuple[str, int], dict[str, Tensor]] = {}
        names: set[str] = {"default"}
        tensors = self._read_tensors()
        for name, value in tensors.items():
            key = plain_name(name.removeprefix(PREFIX))
            if (match := _LORA.fullmatch(key)) is None:
                continue
            inner = match["module"]
            depth = len(inner) - len(inner := inner.removesuffix(".base_layer" * _trailing(inner)))
            where = inner.replace(".base_layer", ""), depth // len(".base_layer")
            if match["kind"] in found.setdefault(where, {}):
                raise LoRAError(f"{folder}: {where[0]!r} has several adapters. Save the one that is meant by itself.")
            found[where][match["kind"]] = value
            names |= {match["adapter"]} - {None}
        saved = re.compile(rf"\.modules_to_save\.(?:(?:{'|'.join(map(re.escape, names))})\.)?")
        for name, value in tensors.items():
            key = plain_name(name.removeprefix(PREFIX))
            if _LORA.fullmatch(key) is not None or ".original_module." in key:
                continue
            if any(part in key for part in (".lora_", "token_adapter", "trainable_tokens")):
                raise LoRAError(f"{folder} has {key!r}, which is no part of a product that {_HERE} knows.")
            self.others[saved.sub(".", key).replace(".base_layer", "")] = value
        for name, depth in sorted(found):
            if len(wrappers := self.lora.setdefault(name, [])) != depth:
                raise LoRAError(f"{folder}: of the adapters of {name!r}, one is missing.")
            wrappers.append(found[name, depth])
        if not self.lora:
            raise LoRAError(f"{folder} holds no adapters of LoRA.")

    def _read_config(self) -> State:
        path = self.folder / CONFIG
        if not path.is_file():
            raise LoRAError(f"{str(self.folder)!r} has no {CONFIG}, as a folder of PEFT's has.")
        try:
            config = json.loads(path.read_text())
        except (ValueError, RecursionError) as error:
            raise LoRAError(f"{str(path)!r} cannot be read: {error}.") from error
        if not isinstance(config, dict) or str(config.get("peft_type")).upper() != "LORA":
            raise LoRAError(f"{str(path)!r} is of no LoRA adapter: its `peft_type` is not 'LORA'.")
        if others := [name for name in OTHER_FUNCTIONS if config.get(name)]:
            raise LoRAError(
                f"{str(path)!r} has `{others[0]}={config[others[0]]!r}`, with which the adapter is more than an"
                f" increment of weights, as {_HERE} has it. Merge it by PEFT (`merge_and_unload`), and start from that."
            )
        start = config.get("init_lora_weights", True)
        if isinstance(start, str) and start not in KEPT_BASE:
            raise LoRAError(
                f"{str(path)!r} has `init_lora_weights={start!r}`, by which PEFT changes the base weights, and they are"
                " not in the files. Save it by PEFT with `path_initial_model_for_weight_conversion`, which makes it a"
                " plain adapter."
            )
        for name, default in (("r", 8), ("lora_alpha", 8), ("lora_dropout", 0.0)):
            self._check_number(name, config.setdefault(name, default))
        for name in ("rank_pattern", "alpha_pattern"):
            if not isinstance(pattern := config.get(name) or {}, dict):
                raise LoRAError(f"{str(path)!r}: `{name}` is no dictionary.")
            for key, value in pattern.items():
                self._check_number(f"{name}[{key!r}]", value)
        for name in ("target_parameters", "modules_to_save"):
            if not isinstance(names := config.get(name) or [], list) or not all(isinstance(n, str) for n in names):
                raise LoRAError(f"{str(path)!r}: `{name}` is no list of names.")
        return config

    def _check_number(self, name: str, value: Any) -> None:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 2**63:
            raise LoRAError(f"{str(self.folder / CONFIG)!r}: `{name}` is {value!r}, and should be a positive number.")

    def _read_tensors(self) -> dict[str, Tensor]:
        if (path := self.folder / WEIGHTS).is_file():
            safetensors = _safetensors()
            try:
                tensors = safetensors.load_file(path)
            except Exception as error:  # of the library's own class
                raise LoRAError(f"{str(path)!r} cannot be read: {error}.") from error
        elif (path := self.folder / OLD_WEIGHTS).is_file():
            if (what := damage(path)) is not None:
                raise LoRAError(f"{str(path)!r} is {what}.")
            tensors = _load_pickled(path)
        else:
            raise LoRAError(f"{str(self.folder)!r} has neither {WEIGHTS} nor {OLD_WEIGHTS}.")
        if not isinstance(tensors, Mapping) or not all(isinstance(key, str) for key in tensors):
            raise LoRAError(f"{str(path)!r} holds no tensors by names.")
        for key, value in tensors.items():
            if not isinstance(value, Tensor) or value.layout is not torch.strided or value.is_meta or value.is_nested:
                raise LoRAError(f"{str(path)!r} has under {key!r} what is no plain tensor.")
            if _LORA.fullmatch(key) and not _is_number(value):
                raise LoRAError(f"{str(path)!r} has {key!r} as {value.dtype}, which is not computed with.")
        return dict(tensors)

    def alpha(self, target: str) -> float:
        """Return alpha of ``target``, by PEFT's rule for patterns."""
        pattern: Mapping[str, float] = self.config.get("alpha_pattern") or {}
        try:
            found = (alpha for key, alpha in pattern.items() if re.match(rf"(.*\.)?({key})$", target))
            return float(next(found, self.config["lora_alpha"]))
        except re.error as error:
            raise LoRAError(f"{str(self.folder / CONFIG)!r}: `alpha_pattern` is no pattern: {error}.") from error

    def is_swapped(self, transposed: bool) -> bool | None:
        """Whether ``lora_A`` of a stack (k, a, b) is the factor of b; None if the file does not say."""
        if self.version is None:
            return None
        return not transposed if self.version >= (0, 20) else transposed and self.version >= (0, 19)

    @property
    def version(self) -> tuple[int, int] | None:
        """That of PEFT, which it writes from 0.18 on."""
        version = self.config.get("peft_version")
        match = re.match(r"(\d{1,6})\.(\d{1,6})", version) if isinstance(version, str) else None
        return None if match is None else (int(match[1]), int(match[2]))


_HERE = "this library"
_LORA = re.compile(
    r"(?P<module>.+)\.(?P<kind>lora_(?:embedding_)?[AB]|lora_magnitude_vector)"
    r"(?:\.(?!weight$|bias$)(?P<adapter>[^.]+))?(?:\.weight)?"
)


def _trailing(name: str) -> int:
    """How many wrappers ``name`` is inside of, at its end."""
    return len(re.search(r"(?:\.base_layer)*$", name).group()) // len(".base_layer")  # type: ignore[union-attr]


class _Start(NamedTuple):
    """What the files say of one weight."""

    R: Tensor
    C: Tensor
    rank: int
    alpha: float
    magnitude: Tensor | None


class _Import:
    """One call of :func:`load`."""

    def __init__(self, files: _Files, module: nn.Module, root: str) -> None:
        self.files, self.module = files, module
        self.modules = {plain_name(path): child for path, child in module.named_modules(remove_duplicate=False)}
        self.weights = {plain_name(n): p for n, p in module.named_parameters(remove_duplicate=False)}
        self.buffers = {plain_name(n): b for n, b in module.named_buffers(remove_duplicate=False)}
        self.root = self._find_root(root)
        self.starts: dict[str, _Start] = {}
        """Key of a weight -> what the files say of it."""
        self.by_module: set[str] = set()
        self.by_parameter: set[str] = set()
        self.all_have_inputs = True
        """Whether each increment has an input of its own, to which dropout can be applied."""
        rule = [f".{name}" for name in files.config.get("target_parameters") or []]
        for name, wrappers in files.lora.items():
            child = self.modules[f"{self.root}{name}"]
            parameters = [p for p, _ in child.named_parameters(recurse=False) if f".{name}.{p}".endswith(tuple(rule))]
            if parameters:
                self._add_parameters(name, child, parameters, wrappers)
            elif len(wrappers) == 1:
                self._add_module(name, child, wrappers[0])
            else:
                raise self._unfit(name, f"it has {len(wrappers)} adapters, and no parameter is named for them")
        self.values = {f"{self.root}{name}": value for name, value in files.others.items()}
        for key, value in self.values.items():
            own = self.weights.get(key, self.buffers.get(key))
            if own is None or own.shape != value.shape or own.is_floating_point() != value.is_floating_point():
                what = "nothing" if own is None else f"{own.dtype} {tuple(own.shape)}"
                raise LoRAError(
                    f"{files.folder} has {key!r} as {value.dtype} {tuple(value.shape)}, and the module has {what}."
                    " Build it as the one that was trained, for example with as many rows of its embeddings."
                )
        self._check_tied()

    def _find_root(self, root: str) -> str:
        """What stands before the files' names in the module."""
        names = list(self.files.lora)
        first = f".{names[0]}"
        wanted = f"{root}.{names[0]}" if root else names[0]
        places = (
            [wanted] if wanted in self.modules else [n for n in self.modules if f".{n}".endswith(first) and not root]
        )
        found = [
            place.removesuffix(names[0])
            for place in places
            if all(f"{place.removesuffix(names[0])}{name}" in self.modules for name in names)
        ]
        if len(found) != 1:
            of = f"{root!r} of {type(self.module).__name__}" if root else f"the {type(self.module).__name__}"
            missing = [name for name in names if f"{root}.{name}".lstrip(".") not in self.modules]
            where = f"stand in several places in {of}" if found else f"are not in {of}"
            raise LoRAError(
                f"{self.files.folder} has adapters for {listed(missing or names)}, which {where}. Give the module that"
                " they were trained for, and by `root` the name of the submodule in it."
            )
        return found[0]

    def _unfit(self, name: str, why: str) -> LoRAError:
        return LoRAError(f"The adapter of {name!r} in {self.files.folder} does not fit the module: {why}.")

    # ---------------------------------------------------------------------------------------------------- adapters

    def _add_module(self, name: str, child: nn.Module, tensors: dict[str, Tensor]) -> None:
        if isinstance(child, nn.MultiheadAttention):
            self.by_module.add(name)
            self.all_have_inputs = False
            self._add(name, f"{name}.in_proj_weight", "Linear", child, tensors)
            return
        layer = self._layer(name, child)
        attention = name.rpartition(".")[0]
        if layer == ATTENTION:
            if attention not in self.files.lora:
                return  # PEFT never calls it
            self._add(attention, f"{name}.weight", "Linear", child, tensors)
            if self.files.version is None or self.files.version <= TWICE_UNTIL:
                start = self.starts[key := f"{self.root}{name}.weight"]
                self.starts[key] = start._replace(R=2 * start.R)
            return
        self.by_module.add(name)
        self._add(name, f"{name}.weight", layer, child, tensors)

    def _layer(self, name: str, child: nn.Module) -> str:
        """That whose layout the files have; PEFT goes by the class."""
        if child._parameters.get("weight") is None:
            raise self._unfit(name, f"it is a {type(child).__name__}, which has no weight")
        layer = layer_of(child, "weight")
        if layer in (*MODULES, ATTENTION):
            return layer
        classes = (nn.Embedding, nn.Linear)
        found = next((kind.__name__ for kind in classes if isinstance(child, kind)), None)
        if found is None:
            raise self._unfit(name, f"it is a {layer}, in which PEFT computes another function than {_HERE}")
        if not hasattr(child, "embed_scale"):
            warn(
                f"{name!r} is a {type(child).__name__} with a forward of its own. PEFT adds the product to its output;"
                " here it is part of the weight. Where the forward does more than multiply, that is another function."
            )
        return found

    def _add_parameters(
        self, name: str, child: nn.Module, parameters: list[str], wrappers: list[dict[str, Tensor]]
    ) -> None:
        if len(parameters) != len(wrappers):
            raise self._unfit(name, f"{len(wrappers)} of its parameters are adapted, and {parameters} are named")
        for parameter, tensors in zip(reversed(parameters), wrappers, strict=True):
            weight = child._parameters[parameter]
            if weight is None or not (weight.dim() == 2 or stacks(child, weight)):
                raise self._unfit(name, f"{parameter!r} is neither a matrix nor a stack of matrices")
            layer = "transposed parameter" if getattr(child, "is_transposed", False) is True else "parameter"
            self.by_parameter.add(f"{name}.{parameter}")
            self._add(f"{name}.{parameter}", f"{name}.{parameter}", layer, child, tensors)

    def _add(self, target: str, key: str, layer: str, child: nn.Module, tensors: dict[str, Tensor]) -> None:
        shape = storage_of(child, key.rpartition(".")[2]).shape
        kinds = ("lora_embedding_A", "lora_embedding_B") if layer == "Embedding" else ("lora_A", "lora_B")
        wanted = {*kinds, *(("lora_magnitude_vector",) if self.files.config.get("use_dora") else ())}
        if tensors.keys() != wanted:
            raise self._unfit(target, f"it has {listed(tensors)}, and a {layer} {listed(sorted(wanted))}")
        A, B = (tensors[kind].to(torch.promote_types(tensors[kind].dtype, torch.float32)) for kind in kinds)
        factors = self._decoded(layer, A, B, shape)
        if factors is None:
            shapes = f"{tuple(A.shape)} and {tuple(B.shape)}"
            raise self._unfit(target, f"its factors are {shapes}, and the weight is {tuple(shape)}")
        R, C = factors
        rank, alpha = R.shape[-2], self.files.alpha(target)
        least = min(R.shape[-1], C.shape[-1])
        if rank > least:
            R, C = _lowered(R, C)
            alpha *= math.sqrt(least / rank) if self._rslora else least / rank
        magnitude = tensors.get("lora_magnitude_vector")
        outputs = C.shape[-1] if layer in ("Conv1D", "Embedding") else R.shape[-1]
        if magnitude is not None and magnitude.numel() != outputs:
            raise self._unfit(target, f"it has {magnitude.numel()} magnitudes for {outputs} outputs")
        self.starts[f"{self.root}{key}"] = _Start(R, C, min(rank, least), alpha, magnitude)

    def _decoded(self, layer: str, A: Tensor, B: Tensor, shape: Sequence[int]) -> tuple[Tensor, Tensor] | None:
        """R and C of PEFT's tensors; None if they do not fit a weight of ``shape``."""
        if layer.endswith("parameter") and len(shape) == 3:
            k, rows, columns = shape
            if A.dim() != 2 or B.dim() != 2 or len(A) % k or B.shape[1] != len(A) or not len(A):
                return None
            A, B = A.unflatten(0, (k, -1)), B.unflatten(1, (-1, k)).permute(2, 1, 0)
            fits = [(A.shape[-1], B.shape[-1]) == (columns, rows), (A.shape[-1], B.shape[-1]) == (rows, columns)]
            swapped = self.files.is_swapped(layer == "transposed parameter")
            if not any(fits):
                return None
            return (B, A) if (fits[0] if not all(fits) else bool(swapped)) else (A, B)
        if layer in CONVOLUTIONS:
            if A.dim() != len(shape) or B.dim() != len(shape) or B.flatten(2).shape[2:].numel() != 1:
                return None
            R, C = B.flatten(1).T, A.flatten(1)
            if A.shape[1:] != torch.Size(shape[1:]):
                return None
        elif A.dim() != 2 or B.dim() != 2:
            return None
        else:
            R, C = (A, B.T) if layer in ("Embedding", "Conv1D") else (B.T, A)
        fits_weight = len(R) == len(C) > 0 and (R.shape[1], C.shape[1]) == (shape[0], math.prod(shape[1:]))
        return (R, C) if fits_weight else None

    def _check_tied(self) -> None:
        """That every place of a weight has the same increment in the files: in the module it has one."""
        names: dict[Tensor, list[str]] = {}
        for name, weight in self.weights.items():
            names.setdefault(weight, []).append(name)
        for key, start in self.starts.items():
            for other in names[self.weights[key]]:
                there = self.starts.get(other)
                if there is not None and torch.equal(start.R, there.R) and torch.equal(start.C, there.C):
                    continue
                if there is None and self.files.config.get("ensure_weight_tying"):
                    continue
                raise LoRAError(
                    f"The weight {key!r} is also {other!r}, and in {self.files.folder} the adapter reaches the one and"
                    " not the other. Untie them first, by a copy of the weight (`tie_word_embeddings=False`)."
                )

    # ---------------------------------------------------------------------------------------------------------- into

    @property
    def _rslora(self) -> bool:
        return bool(self.files.config.get("use_rslora"))

    @torch.no_grad()
    def into(self, options: Options) -> Injection:
        """Inject, and set what the files hold."""
        options = self._options(options)
        injection = inject_options(self.module, options)
        for key, value in self.values.items():
            own = self.weights.get(key, self.buffers.get(key))
            assert own is not None
            own.copy_(value)
        for place in {id(place.adapter): place for place in places(self.module)}.values():
            start, adapter = self.starts[plain_name(place.key)], place.adapter
            A, B = (start.R, start.C) if adapter.transposed else (start.C, start.R)
            magnitude = {} if start.magnitude is None else {"magnitude": start.magnitude.flatten()}
            adapter.load_tensors({"A": A, "B": B, **magnitude})
            if adapter.holds:
                adapter.hold(place.weight)
        return injection

    def _options(self, given: Options) -> Options:
        """``given``, with what the files say."""
        config, names = self.files.config, {}
        for key, start in self.starts.items():
            owner, _, parameter = key.rpartition(".")
            names[owner if parameter == "weight" else key] = start
        ranks = {name: start.rank for name, start in names.items()}
        alphas = {name: start.alpha for name, start in names.items()}
        trained = self._trained()
        bias = config.get("bias", "none")
        return dataclasses.replace(
            given,
            rank=_usual(ranks),
            alpha=_usual(alphas),
            rank_pattern=_pattern(ranks) or None,
            alpha_pattern=_pattern(alphas) or None,
            target_modules=self._named(self.by_module, self.modules),
            target_parameters=self._named(self.by_parameter, self.weights),
            modules_to_save=_rule(trained, [*self.modules, *self.weights]) if trained else None,
            use_rslora=self._rslora,
            bias=bias if bias in ("all", "lora_only") else "none",
            dropout=given.dropout or self._dropout(given),
            decomposition="dora" if config.get("use_dora") else "product",
            init="pissa" if config.get("init_lora_weights") == "pissa" else "zero",
        )

    def _dropout(self, given: Options) -> float:
        """That of the files, where the increments have an input of their own to drop."""
        dropout = float(self.files.config["lora_dropout"])
        if dropout and (given.gradient != "factored" or not self.all_have_inputs):
            warn(f"`lora_dropout={dropout}` of {self.files.folder} is left out: here weights hold increments.")
            return 0.0
        return dropout

    def _named(self, names: set[str], universe: Iterable[str]) -> list[str] | str | None:
        return _rule({f"{self.root}{name}" for name in names}, universe) if names else None

    def _trained(self) -> set[str]:
        """Names of parameters in the files that were trained: not embeddings and heads that PEFT adds by itself."""
        saved = self.files.config.get("modules_to_save") or []
        biases = self.files.config.get("bias", "none") != "none"
        heads = output_heads(self.module)
        trained = set()
        for key in self.values.keys() & self.weights.keys():
            owner, _, parameter = key.rpartition(".")
            child = self.modules[owner]
            asked = any(f".{owner}".endswith(f".{name}") or f".{name}." in f".{owner}." for name in saved)
            added = isinstance(child, nn.Embedding) or child in heads or key in self.starts
            if asked or not (added or (biases and "bias" in parameter)):
                trained.add(key)
        return trained


def _lowered(R: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of the same product with no more rows than the smallest side, for ranks above it."""
    U, S, Vh = torch.linalg.svd(R.mT @ C, full_matrices=False)
    root = S.sqrt().unsqueeze(-1)
    return root * U.mT, root * Vh


# -------------------------------------------------------------------------------------------------------- names, files


def _rule(names: Iterable[str], universe: Iterable[str]) -> list[str] | str:
    """The shortest rule, as options have it, that names ``names`` and nothing else of ``universe``."""
    names, universe = set(names), {name for name in universe if name}
    suffixes = sorted({name.rpartition(".")[2] for name in names})
    for rule in (suffixes, sorted(names)):
        if not any(name.isdigit() for name in rule) and {name for name in universe if matches(name, rule)} == names:
            return rule
    return "|".join(map(re.escape, sorted(names)))


def _usual(values: Mapping[str, Any]) -> Any:
    return collections.Counter(values.values()).most_common(1)[0][0]


def _pattern(values: Mapping[str, Any]) -> dict[str, Any]:
    """Patterns for the names whose value is not the usual one."""
    usual = _usual(values)
    return {f"^{re.escape(name)}": value for name, value in values.items() if value != usual}


def _as_int(value: float) -> float:
    """``value``; the whole number that it is but for rounding."""
    return round(value) if math.isclose(value, round(value), rel_tol=1e-12) else value


def _is_statistic(key: str) -> bool:
    return key.rpartition(".")[2] in STATISTICS


def _load_pickled(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever pickle raises for bytes that make no sense
        raise LoRAError(
            f"{str(path)!r} cannot be read as tensors and plain values, and nothing else is read from a file: {error}"
        ) from error


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise LoRAError('Files of PEFT need safetensors: `pip install "lightning-lora[safetensors]"`.') from error
    return safetensors.torch
