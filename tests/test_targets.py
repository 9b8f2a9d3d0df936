"""Which modules are adapted: as in PEFT where PEFT says; and what is refused, by name, with nothing changed."""

import copy
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification
from transformers import LlamaModel as Llama

from lightning_lora import adapters, inject
from lightning_lora.errors import LoRAError
from lightning_lora.injection.inject import merge
from lightning_lora.injection.options import Options
from lightning_lora.injection.targets import resolve

TINY = LlamaConfig(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    attention_bias=True,
    pad_token_id=0,
)
TINY_GPT2 = GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)


def structure(module):
    """Everything about a module that an injection touches, to be compared."""
    return {
        "modules": [(name, id(child), type(child), list(child.__dict__)) for name, child in module.named_modules()],
        "parameters": [(name, id(p), p.requires_grad) for name, p in module.named_parameters(remove_duplicate=False)],
        "nested": [c.use_nested_tensor for c in module.modules() if isinstance(c, nn.TransformerEncoder)],
    }


def bits(module):
    return {
        key: t.detach().clone().contiguous().view(-1).view(torch.uint8)
        for key, t in module.state_dict().items()
        if not t.is_meta
    }


def assert_refuses(module, error, match, **options):
    """Refused with a message that matches, and the module as it was, bit for bit."""
    before, values, generator = structure(module), bits(module), torch.get_rng_state()
    with pytest.raises(error, match=match):
        inject(module, **options)
    assert structure(module) == before
    after = bits(module)
    assert list(after) == list(values)
    assert all(torch.equal(after[key], values[key]) for key in values)
    assert torch.equal(torch.get_rng_state(), generator)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.encoder = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 8))
        self.q_proj = nn.Linear(8, 8)
        self.conv = nn.Conv1d(8, 4, 3)
        self.head = nn.Linear(8, 3)


# --------------------------------------------------------------------------------------------------------- as in PEFT


def of_peft(model, **options):
    """Name -> (rank, scale) of PEFT's adapters, and the names of what else it trains."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what PEFT and transformers have to settle between them
        peft = get_peft_model(copy.deepcopy(model), LoraConfig(**{"r": 8, "lora_alpha": 8, **options}))
    layers, trained = {}, set()
    for name, module in peft.base_model.model.named_modules():
        if hasattr(module, "lora_A"):
            layers[name] = module.r["default"], module.scaling["default"]
    for name, p in peft.base_model.model.named_parameters():
        if p.requires_grad and "lora_" not in name:
            name = name.replace(".modules_to_save.default", "").replace(".base_layer", "")
            trained.add(name)
    return layers, trained


def of_ours(model, **options):
    model = copy.deepcopy(model)
    inject(model, **{"rank": 8, "alpha": 8, **options})
    trained = {name for name, p in model.named_parameters() if p.requires_grad and ".lora." not in name}
    return {name: (a.rank, a.scale) for name, a in adapters(model).items()}, trained


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": ["layers.1.mlp.up_proj", "o_proj"]},
        {"target_modules": ["model.layers.0.self_attn.q_proj"]},
        {"target_modules": r".*\.[qkv]_proj"},
        {"target_modules": r"model\.layers\.1\.mlp\.(up|down)_proj"},
        {"target_modules": ["lm_head", "q_proj"]},
        {"target_modules": ["q_proj", "k_proj"], "exclude_modules": ["layers.0.self_attn.k_proj"]},
        {"target_modules": "all-linear", "exclude_modules": r".*layers\.0\..*"},
        {"target_modules": "all-linear", "exclude_modules": ["down_proj", "up_proj"]},
        {"target_modules": "all-linear", "modules_to_save": ["lm_head"]},
        {"target_modules": "all-linear", "modules_to_save": ["mlp"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["model.norm", "embed_tokens"]},
        {"target_modules": "all-linear", "rank_pattern": {"q_proj": 2, "layers.1.self_attn.v_proj": 3}},
        {"target_modules": "all-linear", "rank_pattern": {r"mlp\..*": 2, "down_proj": 4}},
        {"target_modules": "all-linear", "rank_pattern": {r"layers\.[01]\.self_attn\.(q|k)_proj": 1, "up_proj": 5}},
        {"target_modules": "all-linear", "rank_pattern": {"^model.layers.0.self_attn.q_proj": 1}},
        {"target_modules": ["q_proj", "k_proj"], "alpha_pattern": {"q_proj": 32, r"1\.self_attn\.k_proj": 3}},
        {"target_modules": ["q_proj"], "rank_pattern": {"q_proj": 4}, "alpha_pattern": {"q_proj": 2}},
        {"target_modules": ["q_proj", "k_proj"], "rank_pattern": {"q_proj": 4}, "use_rslora": True},
        {"target_modules": ["q_proj", "k_proj"], "alpha_pattern": {"k_proj": 5}, "use_rslora": True},
        {"target_modules": ["q_proj", "up_proj"], "bias": "all"},
        {"target_modules": ["q_proj", "up_proj"], "bias": "lora_only"},
        {"target_modules": ["q_proj", "up_proj"], "bias": "none"},
    ],
    ids=repr,
)
def test_targets_ranks_scales_and_what_is_trained_besides_are_those_of_peft(options):
    model = LlamaForCausalLM(TINY)
    theirs = {{"rank": "r"}.get(key, key): value for key, value in options.items()}
    layers, trained = of_ours(model, **options)
    assert (layers, trained) == of_peft(model, **theirs)
    assert layers


@pytest.mark.parametrize(
    "model",
    [lambda: Llama(TINY), lambda: LlamaForSequenceClassification(TINY), lambda: GPT2LMHeadModel(TINY_GPT2)],
    ids=["Llama without a head", "a classifier", "GPT-2"],
)
def test_all_linear_is_that_of_peft(model):
    model = model()
    ours = of_ours(model, rank=2, alpha=2)
    assert ours == of_peft(model, r=2, lora_alpha=2, target_modules="all-linear")
    assert ours[0]


def test_all_linear_spares_the_output_head_of_a_model_inside_the_module():
    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = LlamaForCausalLM(TINY)
            self.extra = nn.Linear(4, 4)

    wrapper = Wrapper()
    names = inject(wrapper, rank=2)
    assert "extra" in names
    assert "model.lm_head" not in names
    assert len(names) == 1 + 7 * TINY.num_hidden_layers


def test_all_linear_is_written_in_any_case():
    assert names_of(resolve(Net(), Options(rank=2, target_modules="All-Linear"))) == [
        "encoder.0",
        "encoder.2",
        "q_proj",
        "head",
    ]


def names_of(targets):
    return [target.name for target in targets.adapted]


# ------------------------------------------------------------------------------------------------- where PEFT is silent


def test_resolving_changes_nothing():
    module = Net()
    before = structure(module)
    resolve(module, Options(rank=2, modules_to_save=["head"]))
    assert structure(module) == before


def test_modules_to_save_may_be_a_regular_expression():
    found = resolve(Net(), Options(rank=2, modules_to_save=r"head|encoder\.1"))
    assert names_of(found) == ["encoder.0", "encoder.2", "q_proj"]
    assert found.trained == ["encoder.1.weight", "encoder.1.bias", "head.weight", "head.bias"]


def test_modules_to_save_may_hold_what_is_targeted():
    found = resolve(Net(), Options(rank=2, modules_to_save=["encoder"]))
    assert names_of(found) == ["q_proj", "head"]
    assert found.trained == [f"encoder.{i}.{key}" for i in range(3) for key in ("weight", "bias")]


@pytest.mark.parametrize(
    ("bias", "expected"),
    [
        ("none", []),
        ("lora_only", ["q_proj.bias"]),
        ("all", ["encoder.0.bias", "encoder.1.bias", "encoder.2.bias", "q_proj.bias", "conv.bias", "head.bias"]),
    ],
)
def test_bias_chooses_the_biases_that_are_trained(bias, expected):
    assert resolve(Net(), Options(rank=2, target_modules=["q_proj"], bias=bias)).trained == expected


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"target_modules": ["q_prj"]}, r"`target_modules` has 'q_prj'.*Did you mean .*'q_proj'"),
        (
            {"target_modules": ["q_proj", "encoder.00"]},
            r"`target_modules` has 'encoder.00'.*Did you mean .*'encoder.0'",
        ),
        ({"target_modules": "encodr"}, r"regular expression 'encodr'.*Did you mean .*'encoder"),
        ({"target_modules": "proj"}, r"regular expression 'proj', which matches no module's whole name"),
        ({"exclude_modules": ["heat"]}, r"`exclude_modules` has 'heat'.*Did you mean .*'head'"),
        ({"modules_to_save": ["heads"]}, r"`modules_to_save` has 'heads'.*Did you mean .*'head'"),
        ({"rank_pattern": {"q_prj": 2}}, r"`rank_pattern` has 'q_prj', which matches no adapted module.*'q_proj'"),
        ({"alpha_pattern": {"convs": 2}}, r"`alpha_pattern` has 'convs', which matches no adapted module"),
        ({"target_modules": ["q_proj"], "rank_pattern": {"head": 2}}, r"'head', which matches no adapted module"),
        ({"target_modules": []}, r"leaves no module to adapt in Net.*torch.nn.Linear.*Conv1D"),
        ({"target_modules": None}, r"`target_modules=None` leaves no module"),
        ({"target_modules": ["head"], "exclude_modules": ["head"]}, r"leave no module to adapt: they take head"),
        ({"target_modules": ["head"], "modules_to_save": ["head"]}, r"leave no module to adapt: they take head"),
        ({"target_modules": ["encoder.1"]}, r"names 'encoder.1', a LayerNorm. Adapters go into torch.nn.Linear"),
        ({"target_modules": ["encoder"]}, r"names 'encoder', a Sequential.*Inside it there is encoder.0, encoder.2"),
        ({"target_modules": r"encoder.*"}, r"names 'encoder', a Sequential"),
        ({"rank": 4}, r"The rank 4 exceeds the smallest side of 'head', whose weight is 3 x 8.*at most 3"),
        ({"rank": 2, "rank_pattern": {"head": 5}}, r"The rank 5 exceeds the smallest side of 'head'"),
        ({"rank": 10**6}, r"The rank 1000000 exceeds the smallest side of 'encoder.0'"),
    ],
    ids=repr,
)
def test_what_matches_nothing_or_does_not_fit_is_refused_by_name(options, match):
    assert_refuses(Net(), ValueError, match, **{"rank": 2, **options})


def test_the_advice_for_a_rank_that_is_too_large_can_be_followed():
    assert "head" in inject(Net(), rank=4, rank_pattern={"head": 3})


def test_a_module_without_linears_is_refused_with_what_it_holds():
    assert_refuses(nn.Sequential(nn.Conv1d(4, 4, 1), nn.ReLU()), ValueError, "which holds Conv1d, ReLU", rank=2)
    assert_refuses(nn.Linear(4, 4), ValueError, "which holds no modules", rank=2)


def test_a_second_injection_is_refused_and_leaves_the_first():
    module = Net()
    inject(module, rank=2)
    assert_refuses(module, LoRAError, "has adapters already, in 'encoder.0' and 3 more", rank=2)
    assert_refuses(nn.Sequential(module), LoRAError, "has adapters already", rank=2)
    merge(module)
    assert inject(module, rank=2)


def tied():
    module = Net()
    module.head = nn.Linear(8, 10)
    module.head.weight = module.embed.weight
    return module


def test_a_tied_weight_is_refused_with_both_names():
    assert_refuses(tied(), LoRAError, "'head' is tied: 'embed.weight' and 'head.weight'", rank=2)
    assert "head" not in inject(tied(), rank=2, exclude_modules=["head"])


def test_the_tied_head_of_a_language_model_is_refused_when_it_is_named():
    config = copy.deepcopy(TINY)
    config.tie_word_embeddings = True
    model = LlamaForCausalLM(config)
    assert_refuses(model, LoRAError, "'lm_head' is tied", rank=2, target_modules=["lm_head"])
    assert "lm_head" not in inject(model, rank=2)


def test_a_layer_on_the_meta_device_is_refused():
    module = Net()
    module.head = nn.Linear(8, 3, device="meta")
    assert_refuses(module, LoRAError, "'head' .Linear. is on the meta device", rank=2)


def test_a_lazy_layer_is_refused():
    module = nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(4))
    assert_refuses_lazy(module)
    module(torch.randn(1, 4))
    assert inject(module, rank=2) == ["0", "1"]


def assert_refuses_lazy(module):
    before = structure(module)
    with pytest.raises(LoRAError, match=r"'1' \(LazyLinear\) is lazy"):
        inject(module, rank=2)
    assert structure(module) == before


@pytest.mark.parametrize(
    "make_computed",
    [
        parametrizations.weight_norm,
        parametrizations.orthogonal,
        lambda layer: parametrize.register_parametrization(layer, "weight", nn.Identity()),
    ],
)
def test_a_computed_weight_is_refused(make_computed):
    module = nn.Sequential(nn.Linear(4, 4))
    make_computed(module[0])
    assert_refuses(module, LoRAError, "'0' .* is computed by a parametrization", rank=2)


def test_an_integer_weight_is_refused():
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    module[1].weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    assert_refuses(module, LoRAError, r"'1' \(Linear\) is stored as torch.int8", rank=2)


def test_the_output_projection_of_multihead_attention_which_is_never_called_is_projected():
    module = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "head": nn.Linear(8, 4)})
    assert inject(module, rank=2) == ["attention.out_proj", "head"]
    x = torch.randn(3, 1, 8)
    module["attention"](x, x, x)[0].sum().backward()
    assert adapters(module)["attention.out_proj"].B.grad.any()


def test_a_layer_with_an_attribute_of_the_adapters_name_is_refused():
    module = nn.Sequential(nn.Linear(4, 4))
    module[0].lora = nn.Identity()
    assert_refuses(module, LoRAError, r"'0' \(Linear\) has an attribute `lora`", rank=2)


def test_an_integer_parameter_is_not_trained_in_full():
    module = Net()
    module.conv.register_parameter("table", nn.Parameter(torch.zeros(2, dtype=torch.int64), requires_grad=False))
    assert_refuses(module, LoRAError, "'conv.table' is torch.int64", rank=2, modules_to_save=["conv"])
