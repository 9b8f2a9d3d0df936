"""Options and a module in, hosts with adapters out, and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.adapters import DECOMPOSITIONS, Adapter, full_adapters
from lightning_lora.adapters.named import NamedAdapters
from lightning_lora.errors import LoRAError, warn
from lightning_lora.hosts import (
    Host,
    adopt,
    exact_forward,
    is_transposed,
    release,
    stacks,
    zero_factor,
)
from lightning_lora.injection import targets
from lightning_lora.injection.layers import Target
from lightning_lora.injection.options import Options, differences
from lightning_lora.naming import plain_name, state_key, unwrapped
from lightning_lora.weights import Storage, read_only_weights, storage_of
from lightning_lora.weights.quantized import REWRITES, without_extras
from lightning_lora.weights.sharded import reshard


@dataclasses.dataclass(frozen=True)
class Injection:
    """What was done to a module, kept on it as ``lora_injection`` until it is undone."""

    options: Options
    adapted: list[str] = dataclasses.field(default_factory=list)
    trained: list[str] = dataclasses.field(default_factory=list)
    """Parameters of the base that are trained in full."""
    frozen: list[str] = dataclasses.field(default_factory=list)
    """Parameters that were trainable and are not now."""
    thawed: list[str] = dataclasses.field(default_factory=list)
    """Parameters that were not trainable and are now."""
    unnested: list[str] = dataclasses.field(default_factory=list)
    """``nn.TransformerEncoder``s whose use of nested tensors, a fast path round the adapters, was turned off."""
    kept: list[str] = dataclasses.field(default_factory=list)
    """Quantised layers that are not to be rewritten in an evaluation."""
    left_out: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    """Layers that could have an adapter and have none: name, and why in a word or two."""
    asked: dict[str, int] = dataclasses.field(default_factory=dict)
    """Name of an adapter -> the rank that the options give to it; its own is lower where its weight is too small."""


@dataclasses.dataclass(frozen=True)
class Place:
    """Where an adapter stands in a module."""

    name: str
    """Of the host, where its ``weight`` is adapted, else of the parameter; without those of wrappers round it."""
    key: str
    """Of the weight in the module's state."""
    factors: str
    """Before the keys of A and B in the module's state."""
    host: Host
    adapter: Adapter
    weight: Tensor
    root: nn.Module
    """The module that the adapter was looked for in."""

    @property
    def stored(self) -> Storage:
        """Return how the weight is stored."""
        return storage_of(self.host, self.key.rpartition(".")[2], self.root)

    def named_factors(self) -> dict[str, nn.Parameter]:
        """Return the trained tensors of the adapter by their names in the module."""
        return {f"{self.factors}{name}": p for name, p in self.adapter.trained.items()}


LOADED = "lora_loaded"
"""The attribute of a module that keeps the named adapters which were loaded into it."""

INJECTED_BY_CALLBACK: ContextVar[Options | None] = ContextVar("INJECTED_BY_CALLBACK", default=None)
"""Options that the callback has injected before the module's ``configure_model``, while that runs."""


def inject(module: nn.Module, **options: Any) -> list[str]:
    """Freeze ``module`` and put an adapter into every layer that ``options`` target.

    For Fabric and plain torch; with a Trainer, :class:`~lightning_lora.LoRA` does it. The module computes what it did
    before, bit for bit, until the adapters are trained.

    Args:
        module: Any module whose weights exist.
        **options: Those of :class:`~lightning_lora.LoRA`, but for what concerns checkpoints.

    Returns:
        The names of what is adapted: of modules, where their ``weight`` is, else of parameters.

    Raises:
        TypeError: If there is no such option.
        ValueError: If an option has a bad value, or matches nothing in ``module``.
        LoRAError: If ``module`` has adapters already, or a target cannot carry one. In each case ``module`` is as it
            was.
    """
    if options.get("init") == "gradient":
        raise ValueError(
            "`init='gradient'` needs batches to compute gradients of, which `inject` has not. Use the `LoRA` callback,"
            " or another `init`."
        )
    given = Options(**options)
    if (present := INJECTED_BY_CALLBACK.get()) is not None and adapters(module):
        if difference := differences(given, present):
            raise LoRAError(f"The callback has injected other options already: {difference}. Give both the same.")
        return list(adapters(module))
    return inject_options(module, given).adapted


def inject_options(module: nn.Module, options: Options) -> Injection:
    """Do what :func:`inject` does, for options that have been validated."""
    module = unwrapped(module)
    if present := adapters(module):
        raise LoRAError(
            f"{type(module).__name__} has adapters already, in {next(iter(present))!r} and {len(present) - 1} more."
            " `merge` it before injecting again."
        )
    found = targets.resolve(module, options)
    owners: dict[str, list[Target]] = {}
    for target in found.adapted:
        owners.setdefault(target.owner, []).append(target)
    made: dict[str, Adapter] = {}
    holds = options.gradient != "factored"
    for target in found.adapted:
        if target.name not in made:
            tied = sum(other.name == target.name for other in found.adapted) > 1  # an output head trains the padding
            padding_idx = None if tied else getattr(target.module, "padding_idx", None)
            made[target.name] = _make(target, options, holds, padding_idx)
    flags = {name: parameter.requires_grad for name, parameter in module.named_parameters()}
    try:
        for own in owners.values():
            carry(own[0].module, {target.parameter: made[target.name] for target in own}, options.gradient)
        injection = _finish(module, options, found, made, flags)
    except BaseException:
        take_out(module)
        for name, parameter in module.named_parameters():
            parameter.requires_grad = flags[name]
        raise
    for message in found.warnings:
        warn(message)
    return injection


def carry(host: nn.Module, adapters: Mapping[str, Adapter], gradient: str) -> None:
    """Make ``host`` carry ``adapters``, named by its parameters, with the best forward that is right."""
    # a weight that is tied to an embedding's is stored the other way round than its own layer takes it
    is_own = list(adapters) == ["weight"] and adapters["weight"].transposed == is_transposed(host)
    forward = exact_forward(host, gradient, adapters["weight"].rescales) if is_own else None
    adopt(host, adapters, forward, read=not any(storage_of(host, name).read_only for name in adapters))


def _finish(
    module: nn.Module, options: Options, found: targets.Targets, made: dict[str, Adapter], flags: dict[str, bool]
) -> Injection:
    """Freeze what is not trained, and keep on ``module`` what was done to it."""
    injection = Injection(
        options=options,
        adapted=list(made),
        trained=found.trained,
        frozen=[name for name, flag in flags.items() if flag and name not in found.trained],
        thawed=[name for name in found.trained if not flags[name]],
        unnested=unnested(module),
        kept=kept(module),
        left_out=found.left_out,
        asked={target.name: target.asked for target in found.adapted},
    )
    set_flags(module, injection, adapted=True)
    module.lora_injection = injection  # type: ignore[assignment]
    return injection


def unnested(module: nn.Module) -> list[str]:
    """Return the names of the ``nn.TransformerEncoder``s that must not use nested tensors while there are adapters."""
    return [
        name
        for name, child in module.named_modules()
        if isinstance(child, nn.TransformerEncoder) and child.use_nested_tensor and not _may_nest(child)
    ]


def kept(module: nn.Module) -> list[str]:
    """Return the names of quantised layers that would rewrite their weight in an evaluation."""
    return [name for name, child in module.named_modules() if child.__dict__.get(REWRITES)]


def _may_nest(encoder: nn.TransformerEncoder) -> bool:
    """Return whether ``encoder`` may use nested tensors, which only the fast path of its layers understands.

    It asks the weights of its first layer alone whether all layers will take that path.
    """
    hosts = [child for child in encoder.modules() if isinstance(child, Host)]
    first = any(isinstance(child, Host) for child in encoder.layers[0].modules())
    return not hosts or (first and all(host.holds_increment for host in hosts))


def _make(target: Target, options: Options, holds: bool, padding_idx: int | None) -> Adapter:
    return DECOMPOSITIONS[options.decomposition].initial(
        target.stored.full(),
        target.rank,
        options.seed,
        target.name,
        options.dtype,
        stacked=stacks(target.layer, target.weight),
        init=options.init,
        scale=options.scale_of(*target.names, rank=target.rank),
        dropout=options.dropout,
        transposed=is_transposed(target.layer),
        zero=zero_factor(target.layer),
        holds=holds,
        padding_idx=padding_idx,
        resample=None if options.resample_every_n_steps is None else options.resample,
    )


def merge(module: nn.Module) -> None:
    """Fold every increment into its weight and make ``module`` plain again: classes, keys, ``requires_grad``.

    A quantised weight cannot hold its increment. Its layer becomes a :class:`torch.nn.Linear`, with the merged weight
    in the dtype of the rest of the model; it stays quantised where the increment is zero.

    Args:
        module: One that has adapters, injected into it or into modules inside it. Where it is sharded, all processes
            call this together.

    Raises:
        ValueError: If ``module`` has no adapters.
        LoRAError: If a weight that holds its increment did not follow A and B, as after a forgotten
            :func:`~lightning_lora.attach`.
    """
    if not adapters(module):
        raise ValueError(f"{type(module).__name__} has no adapters to merge.")
    for adapter in adapters(module).values():
        adapter.check_followed()
    reshard(module)
    found = [place for place in distinct_places(module) if not place.adapter.holds]
    take_out(module)
    for place, adapter in zip(found, full_adapters([place.adapter for place in found]), strict=True):
        if not place.stored.read_only or adapter.delta_weight().any():
            place.stored.assign(adapter.folded_into(place.stored.full()))


@contextmanager
def disabled(module: nn.Module) -> Iterator[None]:
    """Have ``module`` compute the pretrained function for a while, as the reference model of DPO.

    In factored mode A and B are left aside and nothing is copied. Where the weights hold their increments, these are
    taken out, and the exact bits are put back on leaving, which takes a copy of the adapted weights.

    Args:
        module: One that has adapters.

    Example::

        >>> import torch
        >>> from lightning_lora import adapters, disabled, inject
        >>> module = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> x, names = torch.ones(1, 4), inject(module, rank=2)
        >>> before = module(x)
        >>> _ = torch.nn.init.ones_(adapters(module)["0"].B)
        >>> with disabled(module):
        ...     torch.equal(module(x), before)
        True
    """
    found = distinct_places(module)
    held = [(place.weight, place.weight.detach().clone(), place.adapter) for place in found if place.adapter.holds]
    with torch.no_grad():
        for weight, _, adapter in held:
            weight.copy_(adapter.folded_out_of(weight)[0])
    for place in found:
        place.adapter.enabled = False
    try:
        yield
    finally:
        for place in found:
            place.adapter.enabled = True
        with torch.no_grad():
            for weight, before, _ in held:
                weight.copy_(before)


@contextmanager
def merged(module: nn.Module) -> Iterator[None]:
    """Make ``module`` plain for a while: its own classes and keys, its author's ``requires_grad``, merged weights.

    On leaving it is what it was, bit for bit. A weight that was written to meanwhile becomes the new W0, and its
    increment zero: what it was set to is what the module goes on with.

    Args:
        module: One that has adapters. It must not be sharded.

    Raises:
        LoRAError: If ``module`` has no adapters.
    """
    found = distinct_places(module)
    if not found:
        raise LoRAError(f"{type(module).__name__} has no adapters to merge.")
    before = [(place.weight, place.weight.detach().clone(), place.adapter) for place in found]
    with torch.no_grad():
        for place in found:
            if not place.adapter.holds:
                place.weight.copy_(place.adapter.folded_into(place.weight))
    merged_bits = [weight.detach().clone() for weight, _, _ in before]
    owners = list(injections_with_owners(module))
    hosts = [(host, type(host), host.lora, "lora" in vars(host)) for host in module.modules() if isinstance(host, Host)]
    for host, *_ in hosts:
        release(host)
    for owner, injection in owners:
        set_flags(owner, injection, adapted=False)
    try:
        yield
    finally:
        for host, kind, lora, hidden in hosts:
            (vars(host) if hidden else host._modules)["lora"] = lora
            host.__class__ = kind
        for owner, injection in owners:
            set_flags(owner, injection, adapted=True)
        with torch.no_grad():
            for (weight, bits, adapter), was in zip(before, merged_bits, strict=True):
                if torch.equal(weight, was):
                    weight.copy_(bits)
                else:
                    adapter.load_tensors(adapter.without_increment(weight))


def merged_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """Return the state dict of the plain model with merged weights, on the CPU, formed one weight at a time.

    Args:
        module: One that has adapters, or a plain one.

    Returns:
        Key -> tensor, of the plain model's keys, shapes and dtypes.
    """
    by_key = {place.key: place for place in places(module)}
    factors = tuple(place.factors for place in by_key.values())
    known: dict[int, Tensor] = {}
    state: dict[str, Tensor] = {}
    for key, value in module.state_dict().items():
        if key.startswith(factors) or not isinstance(value, Tensor):
            continue
        place = by_key.get(key)
        if place is None or place.adapter.holds or place.adapter.presents_merged:
            state[key] = value.detach().cpu()
        else:
            if id(place.adapter) not in known:
                weight = place.adapter.folded_into(place.stored.full())
                known[id(place.adapter)] = weight.to(place.stored.dtype).cpu()
            state[key] = known[id(place.adapter)]
    without_extras(state, read_only_weights(module))
    return state


def distinct_places(module: nn.Module) -> list[Place]:
    """Return one place of each adapter."""
    return list({id(place.adapter): place for place in places(module)}.values())


def take_out(module: nn.Module) -> None:
    """Make ``module`` plain again with its weights as they stand: classes, keys, ``requires_grad``."""
    for child in list(module.modules()):
        if isinstance(child, Host):
            release(child)
    for owner in module.modules():
        if (injection := owner.__dict__.pop("lora_injection", None)) is not None:
            set_flags(owner, injection, adapted=False)
        if (loaded := owner.__dict__.pop(LOADED, None)) is not None:
            set_flags(owner, loaded.injection, adapted=False)


def adapters(module: nn.Module) -> dict[str, Adapter]:
    """Return the adapters in ``module``: name -> adapter with ``A``, ``B``, ``scale`` and ``delta_weight()``.

    They are printed, and shown by notebooks, as a table.

    The name is that of the module whose ``weight`` is adapted, or of any other parameter. What is compiled, or inside
    an activation checkpoint, has the name that it would have without.
    """
    found: dict[int, tuple[str, Adapter]] = {}
    for place in places(module, remove_duplicate=True):
        found.setdefault(id(place.adapter), (place.name, place.adapter))
    return NamedAdapters(found.values())


def places(module: nn.Module, remove_duplicate: bool = False) -> Iterator[Place]:
    """Yield every place of an adapter in ``module``; two where its module or weight stands in two places."""
    for path, host in module.named_modules(remove_duplicate=remove_duplicate):
        if isinstance(host, Host):
            name, dot = plain_name(path), f"{state_key(path)}." if path else ""
            for parameter, adapter in host.adapted().items():
                weight = host._parameters[parameter]
                assert weight is not None
                yield Place(
                    name=name if parameter == "weight" and name else f"{name}.{parameter}".lstrip("."),
                    key=f"{dot}{parameter}",
                    factors=f"{dot}{host.factors(parameter)}",
                    host=host,
                    adapter=adapter,
                    weight=weight,
                    root=module,
                )


def merging_errors(module: nn.Module) -> dict[str, tuple[float, float]]:
    """Return what :func:`merge` rounds off quantised layers: name -> the largest error of an entry, and the mean.

    An error is the difference between the weight that the layer runs with, dequantised W0 + increment in float32, and
    the merged weight in the dtype of the rest of the model; it is zero where that is float32. Nothing is quantised
    again. Layers whose increment is zero stay as they are, and are left out.
    """
    errors: dict[str, tuple[float, float]] = {}
    for place in places(module):
        if place.stored.read_only and place.adapter.delta_weight().any():
            weight = place.adapter.folded_into(place.stored.full())
            error = (weight - weight.to(place.stored.dtype).to(weight.dtype)).abs()
            errors[place.name] = error.max().item(), error.mean().item()
    return errors


def injections_with_owners(module: nn.Module) -> Iterator[tuple[nn.Module, Injection]]:
    """Yield the modules in ``module`` that were injected, each with what was done to it."""
    for owner in module.modules():
        if isinstance(injection := owner.__dict__.get("lora_injection"), Injection):
            yield owner, injection


def take_out_adapters(module: nn.Module, names: Collection[str]) -> None:
    """Take the adapters called ``names`` out of ``module``; their weights stay frozen, as they stand."""
    for place in [place for place in places(module) if place.name in names]:
        host = place.host
        rest = {name: adapter for name, adapter in host.adapted().items() if adapter is not place.adapter}
        release(host)
        if rest:
            adopt(host, rest)
    for _, injection in injections_with_owners(module):
        injection.adapted[:] = [name for name in injection.adapted if name not in names]


def injections(module: nn.Module) -> Iterator[Injection]:
    """Yield what :func:`inject` did to ``module`` and to modules inside it."""
    for _, injection in injections_with_owners(module):
        yield injection


def trained_besides(module: nn.Module) -> list[str]:
    """Return the keys of the base's parameters that are trained in full, under every name that a shared one has.

    ``requires_grad`` alone does not tell: ``toggle_optimizer`` clears it for the parameters of the other optimizers.
    """
    chosen = {
        owner.get_parameter(name)
        for owner in module.modules()
        if isinstance(injection := owner.__dict__.get("lora_injection"), Injection)
        for name in injection.trained
    }
    factors = {p for adapter in adapters(module).values() for p in adapter.parameters()}
    named = module.named_parameters(remove_duplicate=False)
    return [state_key(name) for name, p in named if p in chosen or (p.requires_grad and p not in factors)]


def trained_without(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of the base that would be trained if there were no adapters, by name."""
    frozen, thawed = set(), set()
    for owner in module.modules():
        if isinstance(injection := owner.__dict__.get("lora_injection"), Injection):
            frozen |= {_parameter(owner, name) for name in injection.frozen}
            thawed |= {_parameter(owner, name) for name in injection.thawed}
    factors = {p for adapter in adapters(module).values() for p in adapter.parameters()}
    named = module.named_parameters()
    return {name: p for name, p in named if p in frozen or (p.requires_grad and p not in thawed and p not in factors)}


def _parameter(module: nn.Module, name: str) -> nn.Parameter:
    owner, _, key = name.rpartition(".")
    parameter = module.get_submodule(owner)._parameters[key]  # the attribute may be a property
    assert parameter is not None
    return parameter


def set_flags(module: nn.Module, injection: Injection, adapted: bool) -> None:
    """Set what ``injection`` changes in ``module`` besides classes, or put it back."""
    for names, flag in ((injection.frozen, not adapted), (injection.thawed, adapted)):
        for name in names:
            _parameter(module, name).requires_grad = flag  # the method is not to be had of a lazy one
    for name in injection.unnested:
        setattr(module.get_submodule(name), "use_nested_tensor", not adapted)  # noqa: B010
    for name in injection.kept:
        if REWRITES in (layer := module.get_submodule(name)).__dict__:
            setattr(layer, REWRITES, not adapted)
