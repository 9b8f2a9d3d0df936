"""Bad values are refused by name, good ones come to a rank and a scale for each layer."""

import dataclasses
import inspect
import json
import math
import re
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_lora import LoRA, inject
from lightning_lora.errors import LoRAError
from lightning_lora.injection.options import Options, differences, matches, matches_pattern, nearest

BAD = [
    ("rank", 0),
    ("rank", -3),
    ("rank", 2.0),
    ("rank", "8"),
    ("rank", None),
    ("rank", True),
    ("alpha", 0),
    ("alpha", -1.5),
    ("alpha", float("nan")),
    ("alpha", float("inf")),
    ("alpha", "16"),
    ("alpha", True),
    ("target_modules", 3),
    ("target_modules", ["0", 1]),
    ("target_modules", "(unclosed"),
    ("exclude_modules", 3),
    ("exclude_modules", "*"),
    ("modules_to_save", {"0": 1}),
    ("modules_to_save", "["),
    ("rank_pattern", ["0"]),
    ("rank_pattern", {0: 4}),
    ("rank_pattern", {"0": 0}),
    ("rank_pattern", {"0": 1.5}),
    ("rank_pattern", {"(": 4}),
    ("rank_pattern", {"(?i)LIN": 4}),
    ("alpha_pattern", "0"),
    ("alpha_pattern", {"0": -1}),
    ("alpha_pattern", {"0": None}),
    ("alpha_pattern", {"*": 1}),
    ("use_rslora", 1),
    ("use_rslora", "yes"),
    ("bias", "lora-only"),
    ("bias", True),
    ("bias", None),
    ("dropout", -0.1),
    ("dropout", 1),
    ("dropout", 1.5),
    ("dropout", float("nan")),
    ("dropout", "0.1"),
    ("adapter_dtype", "float23"),
    ("adapter_dtype", "int8"),
    ("adapter_dtype", torch.float32),
    ("seed", 0.5),
    ("seed", None),
    ("seed", True),
    *(("resample_every_n_steps", k) for k in (0, -1, 1.0, 2.5, "1", True, [1])),
    ("resample", "B"),
    ("resample", None),
    ("resample_moments", "transfers"),
]


@pytest.mark.parametrize(("option", "value"), BAD, ids=repr)
def test_a_bad_value_is_refused_with_its_option_and_what_was_given(option, value):
    given = next(iter(value.values())) if isinstance(value, dict) and all(isinstance(k, str) for k in value) else value
    regex = isinstance(value, dict) and next(iter(value)) in ("(", "*", "(?i)LIN")
    with pytest.raises(ValueError, match=f"`{option}") as error:
        Options(**{option: value})
    assert repr(next(iter(value)) if regex else given) in str(error.value)
    for take in (LoRA, lambda **options: inject(nn.Sequential(nn.Linear(8, 8)), **options)):
        with pytest.raises(ValueError, match=re.escape(str(error.value))):
            take(**{option: value})


@pytest.mark.parametrize(
    ("option", "value", "meant"),
    [
        ("bias", "lora-only", "'lora_only'"),
        ("bias", "non", "'none'"),
        ("adapter_dtype", "bfloat", "'bfloat16'"),
        ("adapter_dtype", "float23", "'float32'"),
    ],
)
def test_a_misspelt_choice_is_answered_with_all_choices_and_the_nearest(option, value, meant):
    with pytest.raises(ValueError, match=rf"must be one of .*, got '{value}'. Did you mean .*{meant}"):
        Options(**{option: value})


@pytest.mark.parametrize("value", ["merge", None, True])
def test_an_unknown_form_of_checkpoint_is_refused(value):
    with pytest.raises(ValueError, match=r"`checkpoint` must be one of 'merged', 'adapter'"):
        LoRA(checkpoint=value)


def test_an_option_that_does_not_exist_is_a_type_error():
    with pytest.raises(TypeError, match="ranks"):
        inject(nn.Sequential(nn.Linear(8, 8)), ranks=4)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"r": 8, "lora_alpha": 16}, r"`r`: it is `rank`\. `lora_alpha`: it is `alpha`"),
        ({"lora_dropout": 0.1}, "it is `dropout`"),
        ({"init_lora_weights": "pissa"}, "it is `init`"),
        ({"use_dora": True}, r"it is `decomposition='dora'`"),
        ({"layers_to_transform": [2]}, "name the layers in `target_modules`"),
        ({"task_type": "CAUSAL_LM"}, "leave it out"),
        ({"drop_out": 0.1}, "Did you mean 'dropout'"),
    ],
    ids=repr,
)
@pytest.mark.parametrize("take", [LoRA, Options, lambda **o: inject(nn.Sequential(nn.Linear(8, 8)), **o)])
def test_options_of_peft_are_answered_with_ours(take, options, match):
    for error in (TypeError, LoRAError):
        with pytest.raises(error, match=match):
            take(**options)


def test_the_signature_of_the_callback_names_every_option_and_no_other():
    names = set(inspect.signature(LoRA).parameters)
    fields = {field.name for field in dataclasses.fields(Options)}
    assert names == fields | {"checkpoint", "adapter", "exact_resume", "log_memory", "log_adapters_every_n_steps"}
    defaults = {name: p.default for name, p in inspect.signature(LoRA).parameters.items()}
    assert all(defaults[name] == getattr(Options(), name) for name in fields)


def test_the_callback_shows_what_was_set():
    assert repr(LoRA()) == "LoRA()"
    assert repr(LoRA(rank=4, target_modules=["a"], checkpoint="adapter", log_memory=False)) == (
        "LoRA(rank=4, target_modules=['a'], checkpoint='adapter', log_memory=False)"
    )


def test_differences_are_those_of_two_options():
    assert differences(Options(rank=2), Options(alpha=3.0)) == "rank=2 against rank=8, alpha=None against alpha=3.0"
    assert differences(Options(), Options()) == ""


@given(st.lists(st.sampled_from(["a.qkv", "b.qkv", "c.proj"])))
def test_a_hint_names_nothing_twice_and_not_what_was_given(allowed):
    hint = nearest("qkv", allowed)
    assert "'qkv'" not in hint
    assert len(set(hint.split(" or "))) == len(hint.split(" or "))


def test_options_cannot_be_changed():
    with pytest.raises(AttributeError):
        Options().rank = 4


# --------------------------------------------------------------------------------------------------- rank and scale


@given(rank=st.integers(1, 64), alpha=st.floats(0.01, 100), rslora=st.booleans())
def test_the_scale_is_alpha_over_r_or_over_its_root(rank, alpha, rslora):
    scale = Options(rank=rank, alpha=alpha, use_rslora=rslora).scale_of("any")
    expected = alpha / math.sqrt(rank) if rslora else float(Fraction(alpha) / rank)
    assert scale == pytest.approx(expected, rel=1e-15)


@given(rank=st.integers(1, 64), rslora=st.booleans())
def test_without_alpha_the_scale_is_one_whatever_the_rank(rank, rslora):
    options = Options(rank=rank, rank_pattern={"b": 3}, use_rslora=rslora)
    assert options.scale_of("a") == options.scale_of("b") == 1


def test_the_first_pattern_that_matches_decides():
    options = Options(rank=8, alpha=16, rank_pattern={r"x\.\d": 2, "x.1": 4}, alpha_pattern={"1": 6, r".*": 1})
    assert [options.rank_of(name) for name in ("x.0", "a.x.1", "x.10", "y")] == [2, 2, 8, 8]
    assert [options.scale_of(name) for name in ("x.0", "a.x.1", "y.1")] == [1 / 2, 6 / 2, 6 / 8]


# --------------------------------------------------------------------------------------------------------- the rules

names = st.lists(st.sampled_from(["a", "b", "ab"]), min_size=1, max_size=3).map(".".join)


@given(name=names, suffix=names)
def test_a_list_matches_names_and_their_suffixes_at_a_dot(name, suffix):
    parts, tail = name.split("."), suffix.split(".")
    assert matches(name, [suffix]) == (parts[-len(tail) :] == tail)


@given(name=names, pattern=names)
def test_a_string_matches_the_whole_name_only(name, pattern):
    assert matches(name, pattern.replace(".", r"\.")) == (name == pattern)


@given(name=names, key=names)
def test_a_key_of_a_pattern_matches_a_suffix_at_a_dot(name, key):
    assert matches_pattern(name, key.replace(".", r"\.")) == matches(name, [key])


def test_an_alternative_in_a_key_is_bounded_as_a_whole():
    assert matches_pattern("x.a", "a|b")
    assert matches_pattern("x.b", "a|b")
    assert not matches_pattern("x.ab", "a|b")
    assert not matches_pattern("xb", "a|b")


def test_none_and_an_empty_list_match_nothing():
    assert not matches("a", None)
    assert not matches("a", [])


def test_the_options_of_a_checkpoint_are_primitives_and_make_the_same_options():
    options = Options(
        rank=4,
        alpha=2.5,
        target_modules=("a", "b"),
        exclude_modules="a.*",
        rank_pattern={"a": 2},
        alpha_pattern={"b": 3.0},
        bias="all",
        dropout=0.1,
    )
    plain = json.loads(json.dumps(options.to_primitives()))
    assert plain["target_modules"] == ["a", "b"]
    assert Options(**plain).to_primitives() == options.to_primitives()
