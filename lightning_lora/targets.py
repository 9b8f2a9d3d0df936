"""Which modules are adapted, and which parameters are trained besides: names in, modules out, nothing changed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parameter import UninitializedParameter

from lightning_lora.hosts import LinearHost, is_linear_like
from lightning_lora.options import Options, Rule, matches, matches_pattern, matches_suffix, nearest

SUPPORTED = "torch.nn.Linear and its subclasses, and transformers' Conv1D"


@dataclasses.dataclass(frozen=True)
class Targets:
    """What the options come to for one module."""

    modules: dict[str, nn.Module]
    """Name -> module that gets an adapter, in the order of the module."""
    trained: list[str]
    """Names of the parameters of the base that are trained in full."""


def resolve(root: nn.Module, options: Options) -> Targets:
    """Finds what ``options`` name in ``root``.

    Raises:
        ValueError: If a name or pattern matches nothing, a target is no supported layer, or a rank exceeds a layer.
        MisconfigurationException: If a target cannot carry an adapter as it is: adapted already, tied, not
            materialised, sharded, quantised, parametrized.
    """
    names = {name: module for name, module in root.named_modules() if name}
    for option in ("target_modules", "exclude_modules", "modules_to_save"):
        _check_that_all_match(option, getattr(options, option), names)

    found = _candidates(root, options.target_modules, names)
    dropped = [
        name for name in found if matches(name, options.exclude_modules) or _inside(name, options.modules_to_save)
    ]
    modules = {name: module for name, module in found.items() if name not in dropped}
    if not modules:
        raise ValueError(_nothing_left(root, options, dropped, names))

    for option in ("rank_pattern", "alpha_pattern"):
        for key in getattr(options, option) or {}:
            if not any(matches_pattern(name, key) for name in modules):
                raise ValueError(f"`{option}` has {key!r}, which matches no adapted module.{nearest(key, modules)}")
    for name, module in modules.items():
        _check_layer(name, module)
        _check_rank(name, module, options.rank_of(name))
    _check_tied(root, modules)
    return Targets(modules, _trained_besides(root, options, modules))


def _candidates(root: nn.Module, rule: Rule, names: dict[str, nn.Module]) -> dict[str, nn.Module]:
    if isinstance(rule, str) and rule.lower() == "all-linear":
        heads = _output_heads(root)
        return {name: module for name, module in names.items() if is_linear_like(module) and module not in heads}
    return {name: module for name, module in names.items() if matches(name, rule)}


def _output_heads(root: nn.Module) -> list[nn.Module]:
    """The output embeddings of every Hugging Face model in ``root``."""
    getters = (getattr(module, "get_output_embeddings", None) for module in root.modules())
    return [getter() for getter in getters if callable(getter)]


def _inside(name: str, rule: Rule) -> bool:
    """Whether ``rule`` names the module called ``name`` or one that holds it."""
    parts = name.split(".")
    return any(matches(".".join(parts[:end]), rule) for end in range(1, len(parts) + 1))


def _check_that_all_match(option: str, rule: Rule, names: Iterable[str]) -> None:
    if rule is None or (isinstance(rule, str) and option == "target_modules" and rule.lower() == "all-linear"):
        return
    if isinstance(rule, str):
        if not any(matches(name, rule) for name in names):
            raise ValueError(
                f"`{option}` has the regular expression {rule!r}, which matches no module's whole name."
                f"{nearest(rule, names)}"
            )
        return
    for item in rule:
        if not any(matches_suffix(name, item) for name in names):
            raise ValueError(f"`{option}` has {item!r}, which matches no module.{nearest(item, names)}")


def _nothing_left(root: nn.Module, options: Options, dropped: list[str], names: dict[str, nn.Module]) -> str:
    if dropped:
        return (
            f"`exclude_modules` and `modules_to_save` leave no module to adapt: they take {', '.join(dropped)} of what"
            f" `target_modules={options.target_modules!r}` matches."
        )
    kinds = sorted({type(module).__name__ for module in names.values()})
    return (
        f"`target_modules={options.target_modules!r}` leaves no module to adapt in {type(root).__name__}, which holds"
        f" {', '.join(kinds) or 'no modules'}. Adapters go into {SUPPORTED}."
    )


def _check_layer(name: str, module: nn.Module) -> None:
    kind = type(module).__name__
    if isinstance(module, LinearHost):
        raise MisconfigurationException(f"{name!r} has an adapter already. `merge` the module before injecting again.")
    if isinstance(module, nn.Linear) and not is_linear_like(module):
        raise ValueError(
            f"`target_modules` names {name!r}, the output projection of a MultiheadAttention: it is never called, its"
            " parent reads its weight, so an adapter there would do nothing. Leave it out."
        )
    if not is_linear_like(module):
        below = [inner for inner, child in module.named_modules(prefix=name) if is_linear_like(child)]
        hint = f" Inside it there is {', '.join(below[:8])}." if below else ""
        raise ValueError(f"`target_modules` names {name!r}, a {kind}. Adapters go into {SUPPORTED}.{hint}")
    if hasattr(module, "lora"):
        raise MisconfigurationException(
            f"{name!r} ({kind}) has an attribute `lora`, the name an adapter is kept under."
        )
    weight = module._parameters.get("weight")
    if weight is None:
        raise MisconfigurationException(
            f"The weight of {name!r} ({kind}) is computed by a parametrization or a hook, so no adapter can be merged"
            " into it. Remove the parametrization, or name the module in `exclude_modules`."
        )
    if isinstance(weight, UninitializedParameter):
        raise MisconfigurationException(
            f"{name!r} ({kind}) is lazy and its shape is not known yet. Run one batch through the module before `fit`."
        )
    if weight.is_meta:
        raise MisconfigurationException(
            f"The weight of {name!r} ({kind}) is on the meta device: it has no values to adapt. Load or materialise the"
            " model in `__init__`, `setup` or `configure_model`."
        )
    if isinstance(weight, DTensor):
        raise MisconfigurationException(
            f"The weight of {name!r} ({kind}) is sharded already. Sharded modules are not supported."
        )
    if weight.dim() != 2 or not weight.is_floating_point():
        raise MisconfigurationException(
            f"The weight of {name!r} ({kind}) is stored as {weight.dtype} in the shape {tuple(weight.shape)}."
            " Quantised weights are not supported."
        )


def _check_rank(name: str, module: nn.Module, rank: int) -> None:
    m, n = module.weight.shape  # type: ignore[misc]
    if rank > min(m, n):
        raise ValueError(
            f"The rank {rank} exceeds the smallest side of {name!r}, whose weight is {m} x {n}. Give a rank of at most"
            f" {min(m, n)}, for this layer alone by `rank_pattern={{{name!r}: {min(m, n)}}}`, or exclude it."
        )


def _check_tied(root: nn.Module, modules: dict[str, nn.Module]) -> None:
    """A weight that another module uses too would change there when it is merged here."""
    owners: dict[Tensor, list[str]] = {}
    for prefix, module in root.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(parameter, []).append(f"{prefix}.{key}".lstrip("."))
    for name, module in modules.items():
        shared = owners[module._parameters["weight"]]  # type: ignore[index]
        if len(shared) > 1:
            raise MisconfigurationException(
                f"The weight of {name!r} is tied: {' and '.join(map(repr, shared))} are one parameter, and an adapter"
                f" in one place would change the other when merged. Add {name!r} to `exclude_modules`."
            )


def _trained_besides(root: nn.Module, options: Options, modules: dict[str, nn.Module]) -> list[str]:
    def is_trained(name: str) -> bool:
        owner, _, key = name.rpartition(".")
        if _inside(owner, options.modules_to_save):
            return True
        return key == "bias" and (options.bias == "all" or (options.bias == "lora_only" and owner in modules))

    trained = [name for name, _ in root.named_parameters() if is_trained(name)]
    for name in trained:
        if not root.get_parameter(name).dtype.is_floating_point:
            raise MisconfigurationException(f"{name!r} is {root.get_parameter(name).dtype} and cannot be trained.")
    return trained
