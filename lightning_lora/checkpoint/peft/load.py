"""Loads adapters from files of PEFT into a module."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_lora.checkpoint.peft import layouts
from lightning_lora.checkpoint.peft.config import rule_for, usual_and_pattern
from lightning_lora.checkpoint.peft.folder import Folder
from lightning_lora.errors import LoRAError, listed, warn
from lightning_lora.hosts import layer_of, stacks
from lightning_lora.injection.inject import Injection, adapters, distinct_places, inject_options
from lightning_lora.injection.layers import output_heads
from lightning_lora.injection.options import Options
from lightning_lora.naming import plain_name, unwrapped
from lightning_lora.weights import storage_of

OF_RUN = ("dropout", "gradient", "resample", "resample_moments", "lr_ratio", "adapter_dtype", "seed")
FROM_FILES = tuple(field.name for field in dataclasses.fields(Options) if field.name not in OF_RUN)
"""Options that cannot be given beside files, which say it."""


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
    """Do what :func:`load_peft` does, for validated options; those of the injection say what the files do."""
    check_beside_files(options)
    files = Folder(Path(folder))
    module = unwrapped(module)
    if adapters(module):
        inject_options(module, options)  # which says it
    return _Import(files, module, root).into(options)


class _Start(NamedTuple):
    """What the files say of one weight."""

    R: Tensor
    C: Tensor
    alpha: float
    magnitude: Tensor | None

    @property
    def rank(self) -> int:
        return self.R.shape[-2]


class _Import:
    """One call of :func:`load`: what the files say, by the names of ``module``, all of it checked."""

    def __init__(self, folder: Folder, module: nn.Module, root: str) -> None:
        self.folder, self.config, self.module = folder, folder.config, module
        self.modules = {plain_name(path): child for path, child in module.named_modules(remove_duplicate=False)}
        self.weights = {plain_name(n): p for n, p in module.named_parameters(remove_duplicate=False)}
        buffers = {plain_name(n): b for n, b in module.named_buffers(remove_duplicate=False)}
        self.tensors: dict[str, Tensor] = {**buffers, **self.weights}
        self.root = self._find_root(root)
        self.starts: dict[str, _Start] = {}
        """Key of a weight -> what the files say of it."""
        self.by_module: set[str] = set()
        self.by_parameter: set[str] = set()
        self.all_have_inputs = True
        """Whether each increment has an input of its own, to which dropout can be applied."""
        rule = tuple(f".{name}" for name in self.config.target_parameters)
        for name, wrappers in folder.lora.items():
            child = self.modules[f"{self.root}{name}"]
            parameters = [p for p, _ in child.named_parameters(recurse=False) if f".{name}.{p}".endswith(rule)]
            if parameters:
                self._add_parameters(name, child, parameters, wrappers)
            elif len(wrappers) == 1:
                self._add_module(name, child, wrappers[0])
            else:
                raise self._unfit(name, f"it has {len(wrappers)} adapters, and no parameter is named for them")
        self.values = {f"{self.root}{name}": value for name, value in folder.others.items()}
        for key, value in self.values.items():
            own = self.tensors.get(key)
            if own is None or own.shape != value.shape or own.is_floating_point() != value.is_floating_point():
                what = "nothing" if own is None else f"{own.dtype} {tuple(own.shape)}"
                raise LoRAError(
                    f"{folder.path} has {key!r} as {value.dtype} {tuple(value.shape)}, and the module has {what}."
                    " Build it as the one that was trained, for example with as many rows of its embeddings."
                )
        self._check_tied()

    def _find_root(self, root: str) -> str:
        """Return what stands before the files' names in the module."""
        names = list(self.folder.lora)

        def fitting(prefixes: Iterable[str]) -> list[str]:
            return [prefix for prefix in prefixes if all(f"{prefix}{name}" in self.modules for name in names)]

        found = fitting([f"{root}." if root else ""]) or ([] if root else fitting(f"{name}." for name in self.modules))
        if len(found) != 1:
            of = f"{root!r} of {type(self.module).__name__}" if root else f"the {type(self.module).__name__}"
            missing = [name for name in names if f"{root}.{name}".lstrip(".") not in self.modules]
            where = f"stand in several places in {of}" if found else f"are not in {of}"
            raise LoRAError(
                f"{self.folder.path} has adapters for {listed(missing or names)}, which {where}. Give the module that"
                " they were trained for, and by `root` the name of the submodule in it."
            )
        return found[0]

    def _unfit(self, name: str, why: str) -> LoRAError:
        return LoRAError(f"The adapter of {name!r} in {self.folder.path} does not fit the module: {why}.")

    # ---------------------------------------------------------------------------------------------------- adapters

    def _add_module(self, name: str, child: nn.Module, tensors: dict[str, Tensor]) -> None:
        if isinstance(child, nn.MultiheadAttention):
            self.by_module.add(name)
            self.all_have_inputs = False
            self._add(name, f"{name}.in_proj_weight", "Linear", child, tensors)
            return
        layer = self._layer(name, child)
        attention = name.rpartition(".")[0]
        if layer != layouts.ATTENTION:
            self.by_module.add(name)
            self._add(name, f"{name}.weight", layer, child, tensors)
        elif attention in self.folder.lora:  # else PEFT never calls it
            twice = self.config.version is None or self.config.version <= layouts.TWICE_UNTIL
            self._add(attention, f"{name}.weight", "Linear", child, tensors, times=2 if twice else 1)

    def _layer(self, name: str, child: nn.Module) -> str:
        """Return the layer whose layout the files have; PEFT goes by the class."""
        if child._parameters.get("weight") is None:
            raise self._unfit(name, f"it is a {type(child).__name__}, which has no weight")
        layer = layer_of(child, "weight")
        if layer in (*layouts.MODULES, layouts.ATTENTION):
            return layer
        found = next((kind.__name__ for kind in (nn.Embedding, nn.Linear) if isinstance(child, kind)), None)
        if found is None:
            raise self._unfit(name, f"it is a {layer}, in which PEFT computes another function than this library")
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
        layer = "transposed parameter" if getattr(child, "is_transposed", False) is True else "parameter"
        for parameter, tensors in zip(reversed(parameters), wrappers, strict=True):
            weight, key = child._parameters[parameter], f"{name}.{parameter}"
            if weight is None or not (weight.dim() == 2 or stacks(child, weight)):
                raise self._unfit(name, f"{parameter!r} is neither a matrix nor a stack of matrices")
            self.by_parameter.add(key)
            self._add(key, key, layer, child, tensors)

    def _add(
        self, target: str, key: str, layer: str, child: nn.Module, tensors: dict[str, Tensor], times: int = 1
    ) -> None:
        """Take ``tensors``, which PEFT calls ``target``, for the weight ``key``, ``times`` the product."""
        shape = storage_of(child, key.rpartition(".")[2]).shape
        wanted = {*layouts.kinds(layer), *(("lora_magnitude_vector",) if self.config.use_dora else ())}
        if tensors.keys() != wanted:
            raise self._unfit(target, f"it has {listed(tensors)}, and a {layer} {listed(sorted(wanted))}")
        A, B = (
            tensors[kind].to(torch.promote_types(tensors[kind].dtype, torch.float32)) for kind in layouts.kinds(layer)
        )
        factors = layouts.decoded(layer, A, B, shape, self.config.version)
        if factors is None:
            shapes = f"{tuple(A.shape)} and {tuple(B.shape)}"
            raise self._unfit(target, f"its factors are {shapes}, and the weight is {tuple(shape)}")
        R, C = factors
        rank, least, alpha = R.shape[-2], min(R.shape[-1], C.shape[-1]), self.config.alpha(target)
        if rank > least:
            R, C = layouts.of_lower_rank(R, C)
            alpha *= self.config.divisor(least) / self.config.divisor(rank)
        magnitude, outputs = tensors.get("lora_magnitude_vector"), (C if layer in layouts.TRANSPOSED else R).shape[-1]
        if magnitude is not None and magnitude.numel() != outputs:
            raise self._unfit(target, f"it has {magnitude.numel()} magnitudes for {outputs} outputs")
        self.starts[f"{self.root}{key}"] = _Start(times * R, C, alpha, magnitude)

    def _check_tied(self) -> None:
        """Check that every place of a weight has the same increment in the files: in the module it has one."""
        names: dict[Tensor, list[str]] = {}
        for name, weight in self.weights.items():
            names.setdefault(weight, []).append(name)
        for key, start in self.starts.items():
            for other in names[self.weights[key]]:
                there = self.starts.get(other)
                if there is not None and torch.equal(start.R, there.R) and torch.equal(start.C, there.C):
                    continue
                if there is None and self.config.ensure_weight_tying:
                    continue
                raise LoRAError(
                    f"The weight {key!r} is also {other!r}, and in {self.folder.path} the adapter reaches the one and"
                    " not the other. Untie them first, by a copy of the weight (`tie_word_embeddings=False`)."
                )

    # ---------------------------------------------------------------------------------------------------------- into

    @torch.no_grad()
    def into(self, options: Options) -> Injection:
        """Inject, and set what the files hold."""
        injection = inject_options(self.module, self._options(options))
        for key, value in self.values.items():
            self.tensors[key].copy_(value)
        for place in distinct_places(self.module):
            start, adapter = self.starts[plain_name(place.key)], place.adapter
            A, B = (start.R, start.C) if adapter.transposed else (start.C, start.R)
            magnitude = {} if start.magnitude is None else {"magnitude": start.magnitude.flatten()}
            adapter.load_tensors({"A": A, "B": B, **magnitude})
            if adapter.holds:
                adapter.hold(place.weight)
        return injection

    def _options(self, given: Options) -> Options:
        """Return ``given``, with what the files say."""
        names = {key.removesuffix(".weight"): start for key, start in self.starts.items()}
        rank, rank_pattern = usual_and_pattern({name: start.rank for name, start in names.items()})
        alpha, alpha_pattern = usual_and_pattern({name: start.alpha for name, start in names.items()})
        trained = self._trained()
        return dataclasses.replace(
            given,
            rank=rank,
            alpha=alpha,
            rank_pattern=rank_pattern or None,
            alpha_pattern=alpha_pattern or None,
            target_modules=self._named(self.by_module, self.modules),
            target_parameters=self._named(self.by_parameter, self.weights),
            modules_to_save=rule_for(trained, [*self.modules, *self.weights]) if trained else None,
            use_rslora=self.config.use_rslora,
            bias=self.config.bias,
            dropout=given.dropout or self._dropout(given),
            decomposition="dora" if self.config.use_dora else "product",
            init="pissa" if self.config.init_lora_weights == "pissa" else "zero",
        )

    def _dropout(self, given: Options) -> float:
        """Return that of the files, where the increments have an input of their own to drop."""
        dropout = float(self.config.lora_dropout)
        if dropout and (given.gradient != "factored" or not self.all_have_inputs):
            warn(f"`lora_dropout={dropout}` of {self.folder.path} is left out: here weights hold increments.")
            return 0.0
        return dropout

    def _named(self, names: set[str], universe: Iterable[str]) -> list[str] | str | None:
        return rule_for({f"{self.root}{name}" for name in names}, universe) if names else None

    def _trained(self) -> set[str]:
        """Return the parameters in the files that were trained: not embeddings and heads that PEFT adds by itself."""
        saved = self.config.modules_to_save
        heads = output_heads(self.module)
        trained = set()
        for key in self.values.keys() & self.weights.keys():
            owner, _, parameter = key.rpartition(".")
            child = self.modules[owner]
            asked = any(f".{owner}".endswith(f".{name}") or f".{name}." in f".{owner}." for name in saved)
            added = isinstance(child, nn.Embedding) or child in heads or key in self.starts
            if asked or not (added or (self.config.bias != "none" and "bias" in parameter)):
                trained.add(key)
        return trained
