"""One frozen, validated set of options, and what they come to for a single layer."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, ParamSpec, get_args

import torch

from lightning_lora.adapters import DECOMPOSITIONS, INITS, is_init
from lightning_lora.errors import LoRAError

Bias = Literal["none", "all", "lora_only"]
Decomposition = Literal["product", "additive", "dora"]
Init = Literal["zero", "symmetric", "orthogonal", "pissa", "pissa_niter_4", "gradient"]
Gradient = Literal["factored", "merged", "projected"]
Resample = Literal["both", "A"]
ResampleMoments = Literal["transfer", "reset", "keep"]
AdapterDtype = Literal["float32", "bfloat16", "float16", "float64"]
Checkpoint = Literal["merged", "adapter"]

RESAMPLES = get_args(Resample)
CHECKPOINTS = get_args(Checkpoint)
ADAPTER_DTYPES = get_args(AdapterDtype)

KINDS = ("all", "all-linear")
"""Values of ``target_modules`` that mean kinds of layers, not names."""

Rule = str | Sequence[str] | None
"""How modules are named, as in PEFT: None is no module, a string is a regular expression that must match the whole
name, a sequence holds names or their dotted suffixes (``"q_proj"`` matches ``"layers.0.q_proj"``)."""


def matches(name: str, rule: Rule) -> bool:
    """Return whether ``rule`` names the module called ``name``."""
    if rule is None:
        return False
    if isinstance(rule, str):
        return re.fullmatch(rule, name) is not None
    return any(matches_suffix(name, item) for item in rule)


def matches_suffix(name: str, suffix: str) -> bool:
    """Return whether ``suffix`` is ``name`` or ends it at a dot."""
    return name == suffix or name.endswith(f".{suffix}")


def matches_pattern(name: str, key: str) -> bool:
    """Return whether ``key``, a regular expression for a name or a dotted suffix as in PEFT, means ``name``."""
    return re.fullmatch(_suffix(key), name) is not None


def _any_matches(names: Iterable[str], key: str) -> bool:
    return any(matches_pattern(name, key) for name in names)


def _suffix(key: str) -> str:
    return rf"(?:.*\.)?(?:{key})"


def nearest(given: str, allowed: Iterable[str]) -> str:
    """Return a sentence that names what ``given`` may have been meant for; empty where nothing is near."""
    names = dict.fromkeys(allowed)
    suffixes = dict.fromkeys(name.rpartition(".")[2] for name in names)
    words = [word for word in {**suffixes, **names} if word != given and not word.isdigit()]
    found = difflib.get_close_matches(given, words, n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(map(repr, found))}?" if found else ""


PEFT = {
    "r": "it is `rank`",
    "lora_alpha": "it is `alpha`, whose default makes the scale alpha / r one",
    "lora_dropout": "it is `dropout`",
    "init_lora_weights": "it is `init`: 'zero' for True, 'pissa', 'orthogonal', or 'gradient' for LoRA-GA",
    "use_dora": "it is `decomposition='dora'`",
    "layers_to_transform": "name the layers in `target_modules`, such as ['layers.2', 'layers.3'], or by a regular"
    r" expression, such as r'.*layers\.[23]\..*_proj'",
    "layers_pattern": "name the layers in `target_modules`, by a list or a regular expression",
    "task_type": "leave it out: a module needs no wrapper; a new head belongs in `modules_to_save`",
    "fan_in_fan_out": "leave it out: each layer's layout is known",
    "lora_bias": "an adapter has no bias; those of the layers are trained by `bias='lora_only'`",
    "trainable_token_indices": "name the embedding in `target_modules`, or in `modules_to_save` to train all of it",
    "inference_mode": "leave it out: `merge` makes a module plain for inference",
    "lora_ga_config": "it is `init='gradient'`",
}
"""PEFT's names of options -> what to give instead."""

P = ParamSpec("P")


class UnknownOption(LoRAError, TypeError):
    """An option that does not exist; like Python's own error for an argument that does not, a ``TypeError``."""


def known_options_only(init: Callable[P, None]) -> Callable[P, None]:
    """Make ``init`` answer an argument that it does not have with the name of the one that was meant."""
    known = [name for name in init.__annotations__ if name != "return"]

    @functools.wraps(init)
    def checked(*args: P.args, **kwargs: P.kwargs) -> None:
        if unknown := [name for name in kwargs if name not in known]:
            hints = (
                f"`{name}`: {PEFT[name]}." if name in PEFT else f"`{name}`.{nearest(name, known)}" for name in unknown
            )
            raise UnknownOption(f"There is no such option. {' '.join(hints)}")
        init(*args, **kwargs)

    return checked


def differences(a: Any, b: Any) -> str:
    """Say in which options ``a`` and ``b`` differ: ``"rank=2 against rank=3"``, separated by commas."""
    pairs = ((field.name, getattr(a, field.name), getattr(b, field.name)) for field in dataclasses.fields(a))
    return ", ".join(f"{name}={one!r} against {name}={other!r}" for name, one, other in pairs if one != other)


def _known_fields_only(cls: type[Options]) -> type[Options]:
    cls.__init__ = known_options_only(cls.__init__)  # type: ignore[method-assign]
    return cls


@_known_fields_only
@dataclasses.dataclass(frozen=True)
class Options:
    """What :class:`~lightning_lora.LoRA` and :func:`~lightning_lora.inject` take; the former explains each.

    Raises:
        ValueError: If an option has a value that it cannot have.
    """

    rank: int = 8
    alpha: float | None = None
    target_modules: Rule = "all"
    exclude_modules: Rule = None
    target_parameters: Rule = None
    modules_to_save: Rule = None
    rank_pattern: Mapping[str, int] | None = None
    alpha_pattern: Mapping[str, float] | None = None
    use_rslora: bool = False
    bias: Bias = "none"
    dropout: float = 0.0
    decomposition: Decomposition | str = "product"
    init: Init | str = "zero"
    gradient: Gradient = "factored"
    resample_every_n_steps: int | None = None
    resample: Resample = "both"
    resample_moments: ResampleMoments = "transfer"
    lr_ratio: float | None = None
    adapter_dtype: AdapterDtype = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        check_count("rank", self.rank)
        if self.alpha is not None:
            _check_positive("alpha", self.alpha)
        for option in ("target_modules", "exclude_modules", "target_parameters", "modules_to_save"):
            _check_rule(option, getattr(self, option))
        for key, rank in _pattern("rank_pattern", self.rank_pattern).items():
            check_count(f"rank_pattern[{key!r}]", rank)
        for key, alpha in _pattern("alpha_pattern", self.alpha_pattern).items():
            _check_positive(f"alpha_pattern[{key!r}]", alpha)
        check_choice("bias", self.bias, get_args(Bias))
        check_choice("gradient", self.gradient, get_args(Gradient))
        check_choice("adapter_dtype", self.adapter_dtype, ADAPTER_DTYPES)
        if not isinstance(self.use_rslora, bool):
            raise LoRAError(f"`use_rslora` must be True or False, got {self.use_rslora!r}.")
        if not _is_number(self.dropout) or not 0 <= self.dropout < 1:
            raise LoRAError(f"`dropout` must be a probability in [0, 1), got {self.dropout!r}.")
        if self.dropout and self.gradient != "factored":
            raise LoRAError(
                f"`dropout={self.dropout}` needs `gradient='factored'`, got {self.gradient!r}: where the weight holds"
                " the increment, the increment has no input of its own."
            )
        if self.lr_ratio is not None:
            _check_positive("lr_ratio", self.lr_ratio)
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise LoRAError(f"`seed` must be an int, got {self.seed!r}.")
        self._check_decomposition()
        self._check_resampling()

    def _check_decomposition(self) -> None:
        check_choice("decomposition", self.decomposition, tuple(DECOMPOSITIONS))
        if not is_init(self.init):
            check_choice("init", self.init, INITS)
        if self.init != "zero" and not DECOMPOSITIONS[self.decomposition].has_inits:
            raise LoRAError(
                f"`init={self.init!r}` cannot be combined with `decomposition={self.decomposition!r}`: its gradients do"
                " not depend on where it starts. Leave `init` at 'zero', or use `decomposition='product'`."
            )

    def _check_resampling(self) -> None:
        check_choice("resample", self.resample, RESAMPLES)
        check_choice("resample_moments", self.resample_moments, get_args(ResampleMoments))
        k = self.resample_every_n_steps
        if k is None:
            for option, default in (("resample", "both"), ("resample_moments", "transfer")):
                if getattr(self, option) != default:
                    raise LoRAError(
                        f"`{option}={getattr(self, option)!r}` has no effect without `resample_every_n_steps`. Give the"
                        " number of steps after which the projections are drawn anew, such as 1."
                    )
            return
        check_count("resample_every_n_steps", k)
        if self.gradient == "factored":
            raise LoRAError(
                "`resample_every_n_steps` needs `gradient='merged'` or 'projected', got 'factored': at each draw the"
                " increment is folded into the weight, which 'factored' keeps as it was pretrained."
            )
        if not DECOMPOSITIONS[self.decomposition].has_projections:
            raise LoRAError(
                f"`resample_every_n_steps` needs random projections, and `decomposition={self.decomposition!r}` has"
                " none that can be drawn anew. Use `decomposition='product'`."
            )
        if self.init != "zero":
            raise LoRAError(
                f"`init={self.init!r}` cannot be combined with `resample_every_n_steps`, whose first draw is the start."
                " Leave `init` at 'zero'."
            )
        if self.resample == "both" and self.dtype.itemsize < 4:
            raise LoRAError(
                f"`adapter_dtype={self.adapter_dtype!r}` cannot be combined with `resample='both'`: next to drawn"
                " numbers most steps are lost to rounding. Use 'float32', or `resample='A'`."
            )
        if self.resample == "A" and self.lr_ratio is not None:
            raise LoRAError(
                f"`lr_ratio={self.lr_ratio}` is the learning rate of B over that of A, and with `resample='A'` A is not"
                " trained. Leave it out."
            )

    @property
    def dtype(self) -> torch.dtype:
        """Return ``adapter_dtype`` as a :class:`torch.dtype`."""
        return getattr(torch, self.adapter_dtype)

    def rank_by_name(self, *names: str) -> int | None:
        """Return the value of the first key of ``rank_pattern`` that matches one of the layer's ``names``, or None."""
        return next((r for key, r in (self.rank_pattern or {}).items() if _any_matches(names, key)), None)

    def rank_of(self, *names: str) -> int:
        """Return the rank that was asked for the layer called ``names``, by ``rank_pattern`` or by ``rank``."""
        return self.rank_by_name(*names) or self.rank

    def scale_of(self, *names: str, rank: int | None = None) -> float:
        """Return the scale of the layer called ``names``: alpha / r, or alpha / sqrt(r) with ``use_rslora``.

        r is ``rank``, which the layer has, or by default the one that was asked for.

        alpha defaults to whatever makes the scale 1, so that W = W0 + AB (article, eq. 1). rsLoRA's root is from
        Kalajdzievski, "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA" (2023).
        """
        alphas = (alpha for key, alpha in (self.alpha_pattern or {}).items() if _any_matches(names, key))
        alpha = next(alphas, self.alpha)
        if alpha is None:
            return 1.0
        rank = self.rank_of(*names) if rank is None else rank
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def to_primitives(self) -> dict[str, Any]:
        """Return the options as strings, numbers, lists and dictionaries, for a checkpoint."""

        def plain(value: Any) -> Any:
            if isinstance(value, Mapping):
                return dict(value)
            return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value

        return {field.name: plain(getattr(self, field.name)) for field in dataclasses.fields(self)}


def check_choice(option: str, given: Any, allowed: Sequence[str]) -> None:
    """Raise :class:`LoRAError` unless ``given`` is one of ``allowed``."""
    if given not in allowed:
        hint = nearest(given, allowed) if isinstance(given, str) else ""
        raise LoRAError(f"`{option}` must be one of {', '.join(map(repr, allowed))}, got {given!r}.{hint}")


def check_count(option: str, count: Any) -> None:
    """Raise :class:`LoRAError` unless ``count`` is an int of at least 1."""
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise LoRAError(f"`{option}` must be an int of at least 1, got {count!r}.")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_positive(option: str, given: Any) -> None:
    if not _is_number(given) or not 0 < given < math.inf:
        raise LoRAError(f"`{option}` must be a positive, finite number, got {given!r}.")


def _check_rule(option: str, rule: Any) -> None:
    if isinstance(rule, str):
        _check_regex(option, rule)
    elif rule is not None and not (isinstance(rule, Sequence) and all(isinstance(item, str) for item in rule)):
        raise LoRAError(f"`{option}` must be None, a regular expression or a list of names, got {rule!r}.")


def _check_regex(option: str, given: str, compiled: str | None = None) -> None:
    try:
        re.compile(given if compiled is None else compiled)
    except re.error as error:
        raise LoRAError(f"`{option}` has {given!r}, which is not a regular expression: {error}.") from error


def _pattern(option: str, pattern: Any) -> Mapping[str, Any]:
    if pattern is None:
        return {}
    if not isinstance(pattern, Mapping) or not all(isinstance(key, str) for key in pattern):
        raise LoRAError(f"`{option}` must map names or regular expressions to numbers, got {pattern!r}.")
    for key in pattern:
        _check_regex(option, key)
        _check_regex(option, key, _suffix(key))  # which refuses flags for the whole expression: they must stand first
    return pattern
