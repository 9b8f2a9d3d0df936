"""Which weights are adapted, and which parameters are trained besides: names in, modules out, nothing changed."""

from __future__ import annotations

import collections
import dataclasses
import re
import sys
from collections.abc import Iterable

from torch import Tensor, nn

from lightning_lora.adapters import DECOMPOSITIONS
from lightning_lora.errors import LoRAError
from lightning_lora.hosts import is_linear_like, is_transposed
from lightning_lora.injection.layers import (
    SUPPORTED,
    Target,
    is_bare,
    joined,
    obstacle_of,
    output_heads,
    outside_metrics,
    own_weights,
)
from lightning_lora.injection.options import KINDS, Options, Rule, matches, matches_pattern, matches_suffix, nearest
from lightning_lora.naming import plain_name
from lightning_lora.weights import storage_of


@dataclasses.dataclass(frozen=True)
class Targets:
    """What the options come to for one module."""

    adapted: list[Target]
    """In the order of the module; a tied weight has an entry for each place, under one name."""
    trained: list[str]
    """Names of the parameters of the base that are trained in full."""
    left_out: list[tuple[str, str]]
    """Layers that could have an adapter and get none: name, and why in a word or two."""
    warnings: list[str]


def resolve(root: nn.Module, options: Options) -> Targets:
    """Find what ``options`` name in ``root``.

    Raises:
        LoRAError: If a name or pattern matches nothing, or what is named cannot carry an adapter: a module that is no
            supported layer, a weight that is adapted already, not materialised, sharded, quantised, or computed by a
            parametrization, or that cannot have the rank that ``rank_pattern`` gives to it.
    """
    return _Resolution(root, options).targets()


def _inside(name: str, rule: Rule) -> bool:
    """Return whether ``rule`` names the module called ``name`` or one that holds it."""
    parts = name.split(".")
    return any(matches(".".join(parts[:end]), rule) for end in range(1, len(parts) + 1))


def is_kind(rule: Rule) -> bool:
    """Return whether ``rule``, for ``target_modules``, means kinds of layers and no names."""
    return isinstance(rule, str) and rule.lower() in KINDS


# ---------------------------------------------------------------------------------------------------- one resolution


class _Resolution:
    """One call of :func:`resolve`, with what it has to know about the module."""

    def __init__(self, root: nn.Module, options: Options) -> None:
        self.root, self.options = root, options
        _refuse_peft(root)
        # of a wrapper and what it wraps, the latter: it comes later
        self.modules = {plain_name(path): module for path, module in root.named_modules(remove_duplicate=False)}
        self.aliases: dict[nn.Module, list[str]] = {}
        for name, module in self.modules.items():
            self.aliases.setdefault(module, []).append(name)
        self.parameters: dict[Tensor, list[str]] = {}
        for path, parameter in root.named_parameters(remove_duplicate=False):
            self.parameters.setdefault(parameter, []).append(plain_name(path))
        self.candidates = [
            self._target(module, parameter, layer)
            for layer, names in self.aliases.items()
            if names[0]
            for module, parameter in own_weights(layer)
        ]
        self.heads = output_heads(root)
        self.judges = set(root.modules()) - (judged := outside_metrics(root))
        self.all_frozen = not any(
            p.requires_grad for module in judged for p in module._parameters.values() if p is not None
        )
        held = {target.module._parameters.get(target.parameter) for target in self.candidates}
        self.bare = {
            parameter: names
            for parameter, names in self.parameters.items()
            if parameter not in held and is_bare(parameter) and (parameter.requires_grad or self.all_frozen)
        }
        """Parameters of no layer that could be matrices; ``target_parameters`` can name them."""
        self.saved = {
            p for p, names in self.parameters.items() if any(_inside(name, options.modules_to_save) for name in names)
        }
        self.left_out: dict[str, tuple[str, str]] = {}
        """Name of a target -> why it is left out, in a word or two and in a sentence."""

    def _target(self, module: nn.Module, parameter: str, layer: nn.Module) -> Target:
        names = tuple(self.aliases[module])
        layer_names = tuple(self.aliases[layer])
        return Target(
            joined(names[0], parameter), names[0], module, parameter, layer, aliases=names, layer_aliases=layer_names
        )

    def targets(self) -> Targets:
        options = self.options
        modules = [name for name in self.modules if name]
        parameters = [name for names in self.parameters.values() for name in names]
        if not is_kind(options.target_modules):
            _check_that_all_match("target_modules", options.target_modules, "module", modules)
        _check_that_all_match("exclude_modules", options.exclude_modules, "module", modules)
        _check_that_all_match(
            "modules_to_save", options.modules_to_save, "module or parameter", [*modules, *parameters]
        )
        _check_that_all_match("target_parameters", options.target_parameters, "parameter", parameters)

        found = self._chosen()
        dropped = [target for target in found if self._is_dropped(target)]
        found = [target for target in found if target not in dropped]
        for option in ("rank_pattern", "alpha_pattern"):
            for key in getattr(options, option) or {}:
                if found and not any(matches_pattern(name, key) for target in found for name in target.names):
                    hint = nearest(key, (target.name for target in found))
                    raise LoRAError(f"`{option}` has {key!r}, which matches no adapted module.{hint}")
        for target in found:
            _check_storage(target, options)
        found = self._ranked(found)
        if not found:
            raise LoRAError(self._nothing_left(dropped))
        adapted = self._with_ties(found)
        for candidate in self.candidates:
            if self._is_dropped(candidate):  # as the user asked
                self.left_out.pop(candidate.name, None)
            else:
                self.left_out.setdefault(candidate.name, (candidate.kind, ""))
        for parameter, names in self.bare.items():
            if not (parameter in self.saved or any(_inside(name, options.exclude_modules) for name in names)):
                self.left_out[names[0]] = "bare parameter", ""
        for target in adapted:
            self.left_out.pop(joined(target.owner, target.parameter), None)
            self.left_out.pop(target.name, None)
        return Targets(adapted, self._trained_besides(adapted), self._left_out_modules(), self._warnings(adapted))

    def _is_dropped(self, target: Target) -> bool:
        rule = self.options.exclude_modules
        weight = target.module._parameters.get(target.parameter)
        return weight in self.saved or any(
            _inside(alias, rule) or _inside(alias, self.options.modules_to_save) for alias in target.aliases
        )

    def _nothing_left(self, dropped: list[Target]) -> str:
        options = self.options
        rule = f"`target_modules={options.target_modules!r}`"
        frozen = any(reason == "frozen" for reason, _ in self.left_out.values())
        reasons = list(dict.fromkeys(sentence for _, sentence in self.left_out.values() if sentence))
        hint = " What is frozen is adapted where it is named in `target_modules`, or unfrozen before." if frozen else ""
        hint = " ".join(["", *reasons[:2]]) + hint
        hint += f" {self._name_bare()}" if self.bare else ""
        if dropped:
            return (
                "`exclude_modules` and `modules_to_save` leave no module to adapt: they take"
                f" {', '.join(target.name for target in dropped)}, all that {rule} and"
                f" `target_parameters={options.target_parameters!r}` match.{hint}"
            )
        kinds = sorted({type(module).__name__ for name, module in self.modules.items() if name})
        left_out = f" Left out: {summary(self._left_out_modules())}." if self.left_out else ""
        return (
            f"{rule} leaves no module to adapt in {type(self.root).__name__}, which holds"
            f" {', '.join(kinds) or 'no modules'}.{left_out}{hint} Adapters go into {SUPPORTED}."
        )

    # ------------------------------------------------------------------------------------------------------- choice

    def _chosen(self) -> list[Target]:
        """Return what ``target_modules`` and ``target_parameters`` name; the former's kinds leave the latter alone."""
        rule, named = self.options.target_modules, self._parameters()
        taken = {(target.module, target.parameter) for target in named}
        layers = self._by_kind(rule.lower()) if is_kind(rule) else self._by_name(rule)  # type: ignore[union-attr]
        twice = [target.name for target in layers if (target.module, target.parameter) in taken]
        if twice and not is_kind(rule):
            raise LoRAError(
                f"The parameter {twice[0]!r} is targeted twice, by `target_modules` and by `target_parameters`. Leave"
                " it to one of them."
            )
        return [*(target for target in layers if target.name not in twice), *named]

    def _by_kind(self, kind: str) -> list[Target]:
        chosen = []
        for target in self.candidates:
            if (reason := self._no_kind(target, kind)) is not None:
                self.left_out[target.name] = reason, ""
            elif self._is_able(target):
                chosen.append(target)
        return chosen

    def _no_kind(self, target: Target, kind: str) -> str | None:
        """Say why ``target`` is not of the ``kind`` that was asked for; None if it is."""
        if isinstance(target.layer, nn.Embedding) or (kind == "all-linear" and not is_linear_like(target.layer)):
            return target.kind
        if target.layer in self.heads:
            return "output head"
        if target.layer in self.judges:
            return "in a metric"
        return "frozen" if self._is_frozen(target) else None

    def _is_frozen(self, target: Target) -> bool:
        """Return whether the module's author froze it; a quantised weight never requires a gradient."""
        weight = target.module._parameters.get(target.parameter)
        return (
            not self.all_frozen
            and not target.stored.read_only
            and (weight is not None and weight.is_floating_point() and not weight.requires_grad)
        )

    def _is_able(self, target: Target, strict: bool = False) -> bool:
        """Return whether the weight can carry an adapter; if not, leave it out, or raise where ``strict``."""
        if (obstacle := obstacle_of(target, self.options.gradient)) is None:
            return True
        if strict:
            raise LoRAError(obstacle[1])
        self.left_out[target.name] = obstacle
        return False

    def _by_name(self, rule: Rule) -> list[Target]:
        """Return the layers that are named, and those inside a module that is named and is no layer itself.

        What such a module holds is not asked for by its own name, though a regular expression may match it besides:
        where it cannot be adapted it is left out.
        """
        named = [module for module, names in self.aliases.items() if any(matches(name, rule) for name in names if name)]
        layers = {target.layer for target in self.candidates}
        wrapped = {
            child for module in named if module not in layers for child in module.modules() if child is not module
        }
        chosen: set[str] = set()
        for module in named:
            below = set(module.modules())
            inside = [target for target in self.candidates if target.layer in below]
            meant = inside
            if module not in layers:
                meant = [target for target in inside if not isinstance(target.layer, nn.Embedding)] or inside
            strict = module in layers and module not in wrapped
            able = {target.name for target in meant if self._is_able(target, strict)}
            if not able and module not in wrapped:
                raise LoRAError(self._no_layer(module, inside))
            chosen |= able
        return [target for target in self.candidates if target.name in chosen]

    def _no_layer(self, module: nn.Module, inside: list[Target]) -> str:
        hint = f" Inside it there is {', '.join(target.name for target in inside[:8])}." if inside else ""
        name, kind = self.aliases[module][0], type(module).__name__
        reason = next((f" {self.left_out[t.name][1]}" for t in inside if t.name in self.left_out), "")
        return f"`target_modules` names {name!r}, a {kind}. Adapters go into {SUPPORTED}.{hint}{reason}"

    def _parameters(self) -> list[Target]:
        """Return the parameters that ``target_parameters`` names."""
        found = []
        for parameter, names in self.parameters.items():
            if not any(matches(name, self.options.target_parameters) for name in names):
                continue
            if parameter.dim() < 2:
                raise LoRAError(
                    f"`target_parameters` names {names[0]!r} of the shape {tuple(parameter.shape)}: a low-rank"
                    " increment needs two dimensions or more. To train it in full, use `bias` or `modules_to_save`."
                )
            owner, _, key = names[0].rpartition(".")
            module = self.modules[owner]
            target = self._target(module, key, module)
            self._is_able(target, strict=True)
            found.append(target)
        return found

    # -------------------------------------------------------------------------------------------------------- ranks

    def _ranked(self, found: list[Target]) -> list[Target]:
        """Give each of ``found`` its rank: the one asked for, or the next lower one that its weight can have."""
        options = self.options
        ranked, wrong = [], []
        for target in found:
            by_name = options.rank_by_name(*target.names)
            asked = by_name or options.rank
            rank = next((r for r in range(min(asked, *target.sides), 0, -1) if _can_have(target, r, options)), 0)
            if by_name is not None and rank != asked:
                wrong.append(dataclasses.replace(target, asked=asked, rank=rank))
            elif rank:
                ranked.append(dataclasses.replace(target, asked=asked, rank=rank))
            elif is_kind(options.target_modules):
                self.left_out[target.name] = f"too small for init={options.init!r}", ""
            else:
                _check_shape(target, asked, options)
        if wrong:
            raise LoRAError(_wrong_ranks(wrong, found, options))
        return ranked

    # --------------------------------------------------------------------------------------------------------- ties

    def _with_ties(self, found: list[Target]) -> list[Target]:
        """Return ``found`` with every place in which the weight of a target stands."""
        places: dict[Tensor, list[tuple[str, nn.Module, str]]] = {}
        for module, names in self.aliases.items():
            for key, parameter in module._parameters.items():
                if parameter is not None:
                    places.setdefault(parameter, []).append((names[0], module, key))
        distinct = {target.weight: target for target in reversed(found)}
        return [
            dataclasses.replace(target, owner=owner, module=module, parameter=key)
            for target in found
            if distinct[target.weight] is target
            for owner, module, key in places[target.weight]
        ]

    # ------------------------------------------------------------------------------------------ trained in full

    def _trained_besides(self, adapted: list[Target]) -> list[str]:
        owners = {alias for target in adapted for m in (target.module, target.layer) for alias in self.aliases[m]}
        weights = {target.weight for target in adapted}

        def is_trained(parameter: Tensor, names: list[str]) -> bool:
            if parameter in self.saved:
                return True
            owner, _, key = names[0].rpartition(".")
            if not (key == "bias" or key.startswith("bias_") or key.endswith("_bias")) or self.options.bias == "none":
                return False
            may = self.all_frozen or parameter.requires_grad  # what its author froze stays frozen
            return owner in owners or (self.options.bias == "all" and may)

        trained = []
        for path, parameter in self.root.named_parameters():
            if not is_trained(parameter, self.parameters[parameter]):
                continue
            trained.append(path)
            owner, _, key = path.rpartition(".")
            if key == "weight" and (stored := storage_of(self.root.get_submodule(owner))).read_only:
                raise LoRAError(
                    f"{path!r} is quantised ({stored.name}) and cannot be trained in full, as `modules_to_save` asks."
                    " Keep that module out of the quantisation, or let it have an adapter."
                )
            if not parameter.is_floating_point():
                raise LoRAError(f"{path!r} is {parameter.dtype} and cannot be trained.")
            if parameter in weights:
                raise LoRAError(
                    f"{path!r} is to be trained in full by `modules_to_save`, and is tied to a weight that gets an"
                    " adapter."
                )
        return trained

    # ----------------------------------------------------------------------------------------------- what is left out

    def _left_out_modules(self) -> list[tuple[str, str]]:
        """Return one entry for each module and reason."""
        owners = {target.name: target.owner for target in self.candidates}
        return list(dict.fromkeys((owners.get(name, name), reason) for name, (reason, _) in self.left_out.items()))

    def _warnings(self, adapted: list[Target]) -> list[str]:
        return [*self._without_dropout(adapted), *self._if_little_is_adapted(adapted)]

    def _name_bare(self) -> str:
        name = next(iter(self.bare.values()))[0]
        return f"`target_parameters` can name parameters of no layer, such as {name!r}."

    def _without_dropout(self, adapted: list[Target]) -> Iterable[str]:
        names = sorted({target.name for target in adapted if not _has_thin_path(target)})
        if self.options.dropout and names:
            message = (
                f"`dropout={self.options.dropout}` cannot be applied to {', '.join(map(repr, names))}, adapted through"
                " the weight"
            )
            if not is_kind(self.options.target_modules):
                raise LoRAError(f"{message}. Exclude what has no dropout, or use none.")
            yield f"{message}: they are trained without."

    def _if_little_is_adapted(self, adapted: list[Target]) -> Iterable[str]:
        """Warn if adapters reach less than half of the entries of all weights that could have one.

        Of a block that is repeated, part of the weights is often all that is named; that reaches the whole block.
        """
        weights = {target.weight for target in adapted}
        blocks = set() if is_kind(self.options.target_modules) else {_block(target.owner) for target in adapted}
        spared = self.heads | self.judges
        sizes: dict[bool, dict[Tensor | str, int]] = {True: {}, False: {}}
        for target in self.candidates:
            weight = target.module._parameters.get(target.parameter)
            is_adapted = weight in weights
            counts = target.layer not in spared and not isinstance(target.layer, nn.Embedding)
            if is_adapted or (target.name in self.left_out and counts):
                reached = is_adapted or _block(target.owner) in blocks
                sizes[reached][target.name if weight is None else weight] = target.numel
        for parameter, names in self.bare.items():
            if names[0] in self.left_out:
                sizes[False][parameter] = parameter.numel()
        there, missing = (sum(sizes[reached].values()) for reached in (True, False))
        left_out = self._left_out_modules()
        reasons = {reason for _, reason in left_out}
        if there >= missing and "lazy" not in reasons:
            return
        advice = [f"Left out: {summary(left_out)}."]
        if "frozen" in reasons:
            advice.append(
                "What was frozen before stays as it is: to adapt it, name it in `target_modules`, or unfreeze it before"
                " `fit`; a new head belongs in `modules_to_save`."
            )
        if "lazy" in reasons:
            advice.append("Run one batch through the module before `fit`, so that lazy layers have weights.")
        if "bare parameter" in reasons:
            advice.append(self._name_bare())
        if reasons - {"frozen", "lazy", "bare parameter"} and self.options.target_modules != "all":
            advice.append("`target_modules='all'` adapts layers of every kind.")
        share = f"{there / (there + missing):.0%}" if there + missing else "none"
        yield (
            f"Adapters reach {share} of the weights that could have one. {' '.join(advice)} If that is meant, name what"
            " is to stay as it is in `exclude_modules`."
        )


def summary(left_out: list[tuple[str, str]]) -> str:
    """Count what is left out by its reason: ``"2 Embedding, 3 frozen, 1 weight norm"``."""
    counts = collections.Counter(reason for _, reason in left_out)
    return ", ".join(f"{count} {reason}" for reason, count in counts.most_common())


def _block(name: str) -> str:
    """Return the numbered module round the module called ``name``, such as ``"layers.3"``, or else its parent."""
    numbered = re.match(r"(?:.*\.)?\d+(?=\.|$)", name)
    return numbered.group() if numbered else name.rpartition(".")[0] or name


# ------------------------------------------------------------------------------------------------------------ errors


def _has_thin_path(target: Target) -> bool:
    """Return whether the layer is of a kind that meets its weight in one product, to whose input dropout applies."""
    kinds = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return target.parameter == "weight" and (isinstance(target.module, kinds) or is_linear_like(target.module))


def _refuse_peft(root: nn.Module) -> None:
    peft, tuners = (sys.modules.get(name) for name in ("peft", "peft.tuners.tuners_utils"))
    kinds = (getattr(peft, "PeftModel", None), getattr(tuners, "BaseTunerLayer", None))
    for path, module in root.named_modules():
        if isinstance(module, tuple(kind for kind in kinds if kind is not None)):
            raise LoRAError(
                f"{plain_name(path) or type(root).__name__!r} is PEFT's {type(module).__name__} and has adapters of its"
                " own. Call `merge_and_unload()` of the PeftModel first and keep what it returns, or leave LoRA of"
                " lightning_lora out."
            )


def _check_that_all_match(option: str, rule: Rule, kind: str, names: list[str]) -> None:
    if isinstance(rule, str):
        if not any(matches(name, rule) for name in names):
            listed = any(matches_suffix(name, rule) for name in names)
            hint = f" As a name or the end of names, give it in a list: [{rule!r}]." if listed else nearest(rule, names)
            raise LoRAError(
                f"`{option}` has the regular expression {rule!r}, which matches no {kind}'s whole name.{hint}"
            )
        return
    for item in rule or ():
        if not any(matches_suffix(name, item) for name in names):
            raise LoRAError(f"`{option}` has {item!r}, which matches no {kind}.{nearest(item, names)}")


def _can_have(target: Target, rank: int, options: Options) -> bool:
    try:
        _check_shape(target, rank, options)
    except ValueError:
        return False
    return True


def _check_shape(target: Target, rank: int, options: Options) -> None:
    m, n = reversed(target.sides) if is_transposed(target.layer) else target.sides
    DECOMPOSITIONS[options.decomposition].check_shape(target.name, m, n, rank, options.init)


def _wrong_ranks(wrong: list[Target], found: list[Target], options: Options) -> str:
    """Name all ``wrong`` targets, whose rank is the one that would do, with one pattern for all of them."""
    said, pattern = [], dict(options.rank_pattern or {})
    for target in wrong:
        m, n = target.sides
        asked = target.asked
        most = f"at most {target.rank}" if asked > min(m, n) else f"{target.rank} would do"
        said.append(f"the rank {asked} of {target.name!r}, whose weight is {m} x {n}: {most}")
        others = (name for other in found if other.name != target.name for name in other.names)
        alone = not any(matches_pattern(name, target.name) for name in others)
        key = target.name if alone else f"^{re.escape(target.name)}"
        pattern = {key: target.rank, **{name: rank for name, rank in pattern.items() if name != key}}
    kind = "" if options.decomposition == "product" else f" with `decomposition={options.decomposition!r}`"
    kind += "" if options.init == "zero" else f" with `init={options.init!r}`"
    return (
        f"`rank_pattern` gives ranks that weights cannot have{kind}: {'; '.join(said)}. This one would do: {pattern}."
    )


def _check_storage(target: Target, options: Options) -> None:
    """Refuse what needs a weight that can be written to, or have a gradient, if it is quantised."""
    stored, what = target.stored, f"The weight of {target.name!r} ({target.kind})"
    if (trouble := stored.trouble()) is not None:
        raise LoRAError(f"{what} {trouble}.")
    if not stored.read_only:
        return
    what += f" is quantised ({stored.name})"
    if DECOMPOSITIONS[options.decomposition].rescales:
        raise LoRAError(
            f"{what}, and `decomposition={options.decomposition!r}` would dequantise it in every step for the norms of"
            " its rows. Use `decomposition='product'` or 'additive'."
        )
    if options.gradient != "factored":
        raise LoRAError(
            f"{what} and cannot hold an increment, as `gradient={options.gradient!r}` asks. Use `gradient='factored'`."
        )
    if options.init == "gradient":
        raise LoRAError(
            f"{what} and has no gradient, which `init='gradient'` starts from. Use `init='pissa'`, or another."
        )
