"""Which weights are adapted, and which parameters are trained besides: names in, modules out, nothing changed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parameter import UninitializedParameter

from lightning_lora.adapters import DECOMPOSITIONS
from lightning_lora.errors import LoRAError
from lightning_lora.hosts import (
    SUPPORTED,
    Host,
    is_linear_like,
    is_supported,
    is_transposed,
    own_matrices,
    stacks,
    storage_of,
)
from lightning_lora.injection.naming import plain_name
from lightning_lora.injection.options import Options, Rule, matches, matches_pattern, matches_suffix, nearest


@dataclasses.dataclass(frozen=True)
class Target:
    """One weight that gets an adapter."""

    name: str
    """Of the module, where its ``weight`` is meant, else of the parameter."""
    owner: str
    module: nn.Module
    parameter: str

    @property
    def weight(self) -> Tensor:
        weight = self.module._parameters[self.parameter]
        assert weight is not None
        return weight

    @property
    def sides(self) -> tuple[int, int]:
        """(m, n) of the matrix, as it is stored."""
        if (stored := storage_of(self.module)) is not None:
            return stored.shape
        return tuple((self.weight if stacks(self.module, self.weight) else self.weight.flatten(1)).shape[-2:])  # type: ignore[return-value]


@dataclasses.dataclass(frozen=True)
class Targets:
    """What the options come to for one module."""

    adapted: list[Target]
    """In the order of the module; a tied weight has an entry for each place, under one name."""
    trained: list[str]
    """Names of the parameters of the base that are trained in full."""


def resolve(root: nn.Module, options: Options) -> Targets:
    """Finds what ``options`` name in ``root``.

    Raises:
        ValueError: If a name or pattern matches nothing, a target is no supported layer, or a rank exceeds a layer.
        LoRAError: If a target cannot carry an adapter as it is: adapted already, tied, not
            materialised, sharded, quantised, parametrized.
    """
    # of a wrapper and what it wraps, the latter: it comes later
    modules = {name: module for path, module in root.named_modules() if (name := plain_name(path))}
    parameters = [plain_name(path) for path, _ in root.named_parameters()]
    for option in ("target_modules", "exclude_modules", "modules_to_save"):
        _check_that_all_match(option, getattr(options, option), "module", modules)
    _check_that_all_match("target_parameters", options.target_parameters, "parameter", parameters)

    found = [*_layers(root, options, modules), *_parameters(root, options)]
    dropped = [
        target.name
        for target in found
        if _inside(target.owner, options.exclude_modules) or _inside(target.owner, options.modules_to_save)
    ]
    found = [target for target in found if target.name not in dropped]
    if not found:
        raise ValueError(_nothing_left(root, options, dropped, modules))

    for option in ("rank_pattern", "alpha_pattern"):
        for key in getattr(options, option) or {}:
            if not any(matches_pattern(target.name, key) for target in found):
                names = [target.name for target in found]
                raise ValueError(f"`{option}` has {key!r}, which matches no adapted module.{nearest(key, names)}")
    _check_twice(found)
    for target in found:
        _check_weight(target)
        _check_quantized(target, options)
        _check_rank(target, options.rank_of(target.name))
        m, n = reversed(target.sides) if is_transposed(target.module) else target.sides
        DECOMPOSITIONS[options.decomposition].check_shape(target.name, m, n, options.rank_of(target.name), options.init)
    return Targets(_with_ties(root, found), _trained_besides(root, options, found))


def _layers(root: nn.Module, options: Options, modules: dict[str, nn.Module]) -> Iterable[Target]:
    """What ``target_modules`` names."""
    rule = options.target_modules
    if isinstance(rule, str) and rule.lower() == "all-linear":
        heads = _output_heads(root)
        chosen = {name: module for name, module in modules.items() if is_linear_like(module) and module not in heads}
    else:
        chosen = {name: module for name, module in modules.items() if matches(name, rule)}
    for name, module in chosen.items():
        _check_layer(name, module, options.gradient)
        for parameter in own_matrices(module):
            yield Target(f"{name}.{parameter}", name, module, parameter)
        if isinstance(module, nn.MultiheadAttention):
            if f"{name}.out_proj" not in chosen:
                yield Target(f"{name}.out_proj", f"{name}.out_proj", module.out_proj, "weight")
        elif not own_matrices(module):
            yield Target(name, name, module, "weight")


def _parameters(root: nn.Module, options: Options) -> Iterable[Target]:
    """What ``target_parameters`` names."""
    for path, parameter in root.named_parameters():
        if matches(name := plain_name(path), options.target_parameters):
            owner, _, key = name.rpartition(".")
            module = root.get_submodule(path.rpartition(".")[0])
            if parameter.dim() < 2:
                raise ValueError(
                    f"`target_parameters` names {name!r} of the shape {tuple(parameter.shape)}: a low-rank increment"
                    " needs two dimensions or more. To train it in full, use `bias` or `modules_to_save`."
                )
            yield Target(owner if key == "weight" and owner else name, owner, module, key)


def _output_heads(root: nn.Module) -> list[nn.Module]:
    """The output embeddings of every Hugging Face model in ``root``."""
    getters = (getattr(module, "get_output_embeddings", None) for module in root.modules())
    return [getter() for getter in getters if callable(getter)]


def _inside(name: str, rule: Rule) -> bool:
    """Whether ``rule`` names the module called ``name`` or one that holds it."""
    parts = name.split(".")
    return any(matches(".".join(parts[:end]), rule) for end in range(1, len(parts) + 1))


def _check_that_all_match(option: str, rule: Rule, kind: str, names: Iterable[str]) -> None:
    if rule is None or (isinstance(rule, str) and option == "target_modules" and rule.lower() == "all-linear"):
        return
    if isinstance(rule, str):
        if not any(matches(name, rule) for name in names):
            raise ValueError(
                f"`{option}` has the regular expression {rule!r}, which matches no {kind}'s whole name."
                f"{nearest(rule, names)}"
            )
        return
    for item in rule:
        if not any(matches_suffix(name, item) for name in names):
            raise ValueError(f"`{option}` has {item!r}, which matches no {kind}.{nearest(item, names)}")


def _nothing_left(root: nn.Module, options: Options, dropped: list[str], modules: dict[str, nn.Module]) -> str:
    if dropped:
        return (
            f"`exclude_modules` and `modules_to_save` leave no module to adapt: they take {', '.join(dropped)}, all"
            f" that `target_modules={options.target_modules!r}` and"
            f" `target_parameters={options.target_parameters!r}` match."
        )
    kinds = sorted({type(module).__name__ for module in modules.values()})
    return (
        f"`target_modules={options.target_modules!r}` leaves no module to adapt in {type(root).__name__}, which holds"
        f" {', '.join(kinds) or 'no modules'}. Adapters go into {SUPPORTED}."
    )


def _check_layer(name: str, module: nn.Module, gradient: str) -> None:
    kind = type(module).__name__
    if isinstance(module, Host):
        raise LoRAError(f"{name!r} has an adapter already. `merge` the module before injecting again.")
    if not is_supported(module):
        below = [plain_name(path) for path, child in module.named_modules(prefix=name) if is_supported(child)]
        hint = f" Inside it there is {', '.join(below[:8])}." if below else ""
        raise ValueError(f"`target_modules` names {name!r}, a {kind}. Adapters go into {SUPPORTED}.{hint}")
    if not isinstance(module, nn.Embedding):
        return
    if module.sparse:
        raise LoRAError(
            f"{name!r} is an Embedding with `sparse=True`. The gradients of its adapter are dense; use `sparse=False`."
        )
    if module.max_norm is not None:
        raise LoRAError(
            f"{name!r} is an Embedding with `max_norm={module.max_norm}`, which rewrites the frozen weight in forward."
        )
    if module.scale_grad_by_freq and gradient != "projected":
        raise LoRAError(
            f"{name!r} is an Embedding with `scale_grad_by_freq=True`, which only `gradient='projected'` supports."
        )


def _check_twice(found: list[Target]) -> None:
    seen: set[str] = set()
    for target in found:
        if target.name in seen:
            raise ValueError(
                f"The parameter {target.name!r} is targeted twice, by `target_modules` and by `target_parameters`."
                " Leave it to one of them."
            )
        seen.add(target.name)


def _check_weight(target: Target) -> None:
    name, kind = target.name, type(target.module).__name__
    if hasattr(target.module, "lora") and not isinstance(target.module, Host):
        raise LoRAError(f"{name!r} ({kind}) has an attribute `lora`, the name an adapter is kept under.")
    weight = target.module._parameters.get(target.parameter)
    if weight is None:
        raise LoRAError(
            f"The weight of {name!r} ({kind}) is computed by a parametrization or a hook, so no adapter can be merged"
            " into it. Remove the parametrization, or name the module in `exclude_modules`."
        )
    if isinstance(weight, UninitializedParameter):
        raise LoRAError(
            f"{name!r} ({kind}) is lazy and its shape is not known yet. Run one batch through the module before `fit`."
        )
    if weight.is_meta:
        raise LoRAError(
            f"The weight of {name!r} ({kind}) is on the meta device: it has no values to adapt. Load or materialise the"
            " model in `__init__`, `setup` or `configure_model`."
        )
    if isinstance(weight, DTensor):
        raise LoRAError(f"The weight of {name!r} ({kind}) is sharded already. Sharded modules are not supported.")
    if (weight.dim() < 2 or not weight.is_floating_point()) and storage_of(target.module) is None:
        raise LoRAError(
            f"The weight of {name!r} ({kind}) is stored as {weight.dtype} in the shape {tuple(weight.shape)}."
            " Of quantised weights, those of bitsandbytes' `Linear8bitLt` and `Linear4bit` are supported, and torchao's"
            " in a Linear."
        )


def _check_quantized(target: Target, options: Options) -> None:
    """What needs a weight that can be written to, or have a gradient, cannot be had of a quantised one."""
    if (stored := storage_of(target.module)) is None:
        return
    what = f"The weight of {target.name!r} ({type(target.module).__name__}) is quantised ({stored.name})"
    if (trouble := stored.trouble()) is not None:
        raise LoRAError(f"The weight of {target.name!r} ({type(target.module).__name__}) {trouble}.")
    if DECOMPOSITIONS[options.decomposition].rescales:
        raise LoRAError(
            f"{what}, and `decomposition={options.decomposition!r}` would dequantise it in every step for the norms of"
            " its rows. Use `decomposition='product'` or 'additive'."
        )
    if options.gradient != "factored":
        given = f"`gradient={options.gradient!r}`"
        raise LoRAError(
            f"{what} and cannot hold an increment, as {given} asks. Use `gradient='factored'` and name it in"
            " `target_modules`."
        )
    if options.init == "gradient":
        raise LoRAError(
            f"{what} and has no gradient, which `init='gradient'` starts from. Use `init='pissa'`, or another."
        )


def _check_rank(target: Target, rank: int) -> None:
    m, n = target.sides
    if rank > min(m, n):
        raise ValueError(
            f"The rank {rank} exceeds the smallest side of {target.name!r}, whose weight is {m} x {n}. Give a rank of"
            f" at most {min(m, n)}, for this one alone by `rank_pattern={{{target.name!r}: {min(m, n)}}}`, or exclude"
            " it."
        )


def _owners(root: nn.Module) -> dict[Tensor, list[tuple[str, nn.Module, str]]]:
    """Every parameter, with all places where it stands."""
    owners: dict[Tensor, list[tuple[str, nn.Module, str]]] = {}
    for prefix, module in root.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(parameter, []).append((plain_name(prefix), module, key))
    return owners


def _with_ties(root: nn.Module, found: list[Target]) -> list[Target]:
    """Return ``found`` with every place in which an adapted weight stands: whoever reads it reads W."""
    owners = _owners(root)
    targets: list[Target] = []
    done: set[Tensor] = set()
    for target in found:
        places = owners[target.weight]
        if target.weight not in done:
            done.add(target.weight)
            targets += [Target(target.name, prefix, module, key) for prefix, module, key in places]
    return targets


def _trained_besides(root: nn.Module, options: Options, found: list[Target]) -> list[str]:
    owners = {target.owner for target in found}
    adapted = {target.weight for target in found}

    def is_trained(path: str) -> bool:
        owner, _, key = plain_name(path).rpartition(".")
        if _inside(owner, options.modules_to_save):
            return True
        is_bias = key == "bias" or key.startswith("bias_") or key.endswith("_bias")
        return is_bias and (options.bias == "all" or (options.bias == "lora_only" and owner in owners))

    trained = [name for name, _ in root.named_parameters() if is_trained(name)]
    for name in trained:
        parameter = root.get_parameter(name)
        owner, _, key = name.rpartition(".")
        if key == "weight" and (stored := storage_of(root.get_submodule(owner))) is not None:
            raise LoRAError(
                f"{name!r} is quantised ({stored.name}) and cannot be trained in full, as `modules_to_save` asks. Keep"
                " that module out of the quantisation, or let it have an adapter."
            )
        if not parameter.is_floating_point():
            raise LoRAError(f"{name!r} is {parameter.dtype} and cannot be trained.")
        if parameter in adapted:
            raise ValueError(
                f"{name!r} is to be trained in full by `modules_to_save`, and is tied to a weight that gets an adapter."
            )
    return trained
