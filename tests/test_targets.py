"""Which modules are adapted: as in PEFT where PEFT says; and what is refused, by name, with nothing changed."""

import ast
import copy
import warnings

import pytest
import torch
from lightning.fabric import Fabric
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torchmetrics import Metric
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers import LlamaModel as Llama

from lightning_lora import adapters, attach, inject
from lightning_lora.errors import LoRAError
from lightning_lora.injection.inject import merge
from lightning_lora.injection.options import Options
from lightning_lora.injection.targets import resolve
from lightning_lora.naming import plain_name, state_key

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
            trained.add(name.replace(".modules_to_save.default", "").replace(".base_layer", ""))
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
    found = resolve(Net(), Options(rank=2, target_modules="All-Linear"))
    assert names_of(found) == ["encoder.0", "encoder.2", "q_proj", "head"]


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
    assert names_of(found) == ["encoder.0", "encoder.2", "q_proj", "conv"]
    assert found.trained == ["encoder.1.weight", "encoder.1.bias", "head.weight", "head.bias"]


def test_modules_to_save_may_hold_what_is_targeted():
    found = resolve(Net(), Options(rank=2, modules_to_save=["encoder"]))
    assert names_of(found) == ["q_proj", "conv", "head"]
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
        ({"target_modules": "2"}, r"which matches no module's whole name. As a name .* give it in a list: \['2'\]"),
        ({"exclude_modules": ["heat"]}, r"`exclude_modules` has 'heat'.*Did you mean .*'head'"),
        ({"modules_to_save": ["heads"]}, r"`modules_to_save` has 'heads'.*Did you mean .*'head'"),
        ({"rank_pattern": {"q_prj": 2}}, r"`rank_pattern` has 'q_prj', which matches no adapted module.*'q_proj'"),
        ({"alpha_pattern": {"convs": 2}}, r"`alpha_pattern` has 'convs', which matches no adapted module"),
        ({"target_modules": ["q_proj"], "rank_pattern": {"head": 2}}, r"'head', which matches no adapted module"),
        ({"target_modules": []}, r"leaves no module to adapt in Net.*torch.nn.Linear.*Conv1D"),
        ({"modules_to_save": ["cls"]}, r"`modules_to_save` has 'cls', which matches no module or parameter"),
        ({"target_modules": None}, r"`target_modules=None` leaves no module"),
        ({"target_modules": ["head"], "exclude_modules": ["head"]}, r"leave no module to adapt: they take head"),
        ({"target_modules": ["head"], "modules_to_save": ["head"]}, r"leave no module to adapt: they take head"),
        ({"target_modules": ["encoder.1"]}, r"names 'encoder.1', a LayerNorm. Adapters go into torch.nn.Linear"),
        ({"target_modules": r"encoder\.1"}, r"names 'encoder.1', a LayerNorm"),
        (
            {"rank": 2, "rank_pattern": {"head": 5, "q_proj": 9, "encoder.0": 3}},
            r"rank 9 of 'q_proj', whose weight is 8 x 8: at most 8; the rank 5 of 'head', whose weight is 3 x 8: at"
            r" most 3\. This one would do: \{'head': 3, 'q_proj': 8, 'encoder.0': 3\}",
        ),
    ],
    ids=repr,
)
def test_what_matches_nothing_or_does_not_fit_is_refused_by_name(options, match):
    assert_refuses(Net(), ValueError, match, **{"rank": 2, **options})


def test_a_module_without_layers_of_the_kind_is_refused_with_what_it_holds():
    convolution = nn.Sequential(nn.Conv1d(4, 4, 1), nn.ReLU())
    assert_refuses(convolution, ValueError, "which holds Conv1d, ReLU", rank=2, target_modules="all-linear")
    assert_refuses(nn.Sequential(nn.LayerNorm(4)), ValueError, "which holds LayerNorm", rank=2)
    assert_refuses(nn.Linear(4, 4), ValueError, "which holds no modules", rank=2)


def test_a_second_injection_is_refused_and_leaves_the_first():
    module = Net()
    inject(module, rank=2)
    assert_refuses(module, LoRAError, "has adapters already, in 'encoder.0' and 4 more", rank=2)
    assert_refuses(nn.Sequential(module), LoRAError, "has adapters already", rank=2)
    merge(module)
    assert inject(module, rank=2)


def tied():
    module = Net()
    module.head = nn.Linear(8, 10)
    module.head.weight = module.embed.weight
    return module


def test_a_head_that_is_tied_to_an_embedding_is_left_out_and_adapted_in_both_places_when_it_is_named():
    found = resolve(tied(), Options(rank=2))
    assert "head" not in names_of(found)
    assert ("head", "output head") in found.left_out
    found = resolve(tied(), Options(rank=2, target_modules=["head"]))
    assert [(target.name, target.owner) for target in found.adapted] == [("head", "embed"), ("head", "head")]


@pytest.mark.parametrize("gradient", ["factored", "merged", "projected"])
def test_two_layers_that_share_a_weight_share_an_adapter(gradient):
    module = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    module[2].weight = module[0].weight
    x = torch.randn(3, 8)
    expected = module(x)
    assert inject(module, rank=2, gradient=gradient) == ["0"]
    assert torch.equal(module(x), expected)


def test_the_tied_head_of_a_language_model_is_left_out():
    config = copy.deepcopy(TINY)
    config.tie_word_embeddings = True
    assert "lm_head" not in inject(LlamaForCausalLM(config), rank=2)


def meta():
    module = Net()
    module.head = nn.Linear(8, 3, device="meta")
    return module


def lazy():
    return nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(4))


def computed(make_computed, kind=nn.Linear):
    module = nn.Sequential(nn.Linear(4, 4), kind(4, 4))
    make_computed(module[1])
    return module


def integer():
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    module[1].weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    return module


def with_attribute():
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    module[1].lora = nn.Identity()
    return module


def sparse():
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    module[1].weight = nn.Parameter(module[1].weight.detach().to_sparse())
    return module


class OfTwo(nn.Module):
    """A weight that is the sum of two parameters."""

    def forward(self, a, b):
        return a + b

    def right_inverse(self, weight):
        return weight / 2, weight / 2


class UnitRows(nn.Module):
    def forward(self, weight):
        return nn.functional.normalize(weight, dim=-1)


def parametrized(layer, *parts):
    for part in parts:
        parametrize.register_parametrization(layer, "weight", part)
    return layer


CANNOT = {
    "meta": (meta, "head", "meta device", r"'head' .Linear. is on the meta device"),
    "lazy": (lazy, "1", "lazy", r"'1' \(LazyLinear\) is lazy"),
    "computed of two": (
        lambda: computed(lambda layer: parametrize.register_parametrization(layer, "weight", OfTwo())),
        "1",
        "of two",
        "'1' .* is computed by a parametrization",
    ),
    "integer": (integer, "1", "quantised", r"'1' \(Linear\) is stored as torch.int8"),
    "sparse": (sparse, "1", "sparse", r"'1' \(Linear\) is sparse"),
    "attribute": (with_attribute, "1", "attribute `lora`", r"'1' \(Linear\) has an attribute `lora`"),
}


@pytest.mark.parametrize("case", CANNOT)
@pytest.mark.parametrize("kind", ["all", "all-linear"])
def test_what_cannot_carry_an_adapter_is_left_out_unless_it_is_named(case, kind):
    make, name, reason, message = CANNOT[case]
    found = resolve(make(), Options(rank=2, target_modules=kind))
    assert name not in names_of(found)
    assert (name, reason) in found.left_out
    module = make()
    before = structure(module)
    with pytest.raises(LoRAError, match=message):
        inject(module, rank=2, target_modules=[name])
    assert structure(module) == before


def test_a_lazy_layer_is_left_out_with_a_warning_and_adapted_once_it_has_a_shape():
    module = lazy()
    with pytest.warns(UserWarning, match="1 lazy. Run one batch"):
        inject(module, rank=2)
    merge(module)
    module = lazy()
    module(torch.randn(1, 4))
    assert inject(module, rank=2) == ["0", "1"]


def test_an_integer_parameter_is_not_trained_in_full():
    module = Net()
    module.conv.register_parameter("table", nn.Parameter(torch.zeros(2, dtype=torch.int64), requires_grad=False))
    assert_refuses(module, LoRAError, "'conv.table' is torch.int64", rank=2, modules_to_save=["conv"])


# ------------------------------------------------------------------------------------------------------------ all kinds


class GraphLinear(nn.Module):
    """As torch_geometric's own Linear, which is none of torch's."""

    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels))

    def forward(self, x):
        return x @ self.weight.T


class Relations(nn.Module):
    """As the layers of torch_geometric for graphs whose edges are of several kinds."""

    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.weight = nn.Parameter(torch.randn(3, in_channels, out_channels))
        self.root = nn.Parameter(torch.randn(in_channels, out_channels))
        self.bias = nn.Parameter(torch.zeros(out_channels))

    def forward(self, x):
        return sum((x @ self.weight[k] for k in range(3)), x @ self.root) + self.bias


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(4, 12, 8))
        self.gate_up_proj_bias = nn.Parameter(torch.randn(4, 12))

    def forward(self, x):
        return sum(x @ w.T + b for w, b in zip(self.gate_up_proj, self.gate_up_proj_bias, strict=True))


class Mixture(Experts):
    def __init__(self):
        super().__init__()
        self.num_experts = 4


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.bilinear = nn.Bilinear(8, 8, 5)

    def forward(self, x):
        return self.bilinear(x, x)


def normed(norm, layer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the first weight_norm is deprecated, and common
        return norm(layer)


IMAGE, ROW, SEQUENCE = (2, 3, 8, 8), (5, 8), (4, 2, 8)
KINDS = {
    "convolutions": (lambda: nn.Sequential(nn.Conv2d(3, 9, 3), nn.ConvTranspose2d(9, 4, 3)), IMAGE, ["0", "1"]),
    "grouped": (lambda: nn.Sequential(nn.ConvTranspose1d(2, 4, 3, groups=2)), SEQUENCE, ["0"]),
    "lstm": (
        lambda: nn.Sequential(nn.LSTM(8, 6, proj_size=3)),
        SEQUENCE,
        [f"0.weight_{part}_l0" for part in ("ih", "hh", "hr")],
    ),
    "gru cell": (lambda: nn.Sequential(nn.GRUCell(8, 6)), ROW, ["0.weight_ih", "0.weight_hh"]),
    "encoder": (
        lambda: nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16)),
        SEQUENCE,
        [f"0.{part}" for part in ("self_attn.in_proj_weight", "self_attn.out_proj", "linear1", "linear2")],
    ),
    "duck": (lambda: nn.Sequential(nn.LayerNorm(8), GraphLinear(8, 6)), ROW, ["1"]),
    "a matrix for each relation": (lambda: nn.Sequential(Relations(8, 6)), ROW, ["0", "0.root"]),
    "bilinear": (lambda: nn.Sequential(Pair()), ROW, ["0.bilinear"]),
    "experts": (lambda: nn.Sequential(Experts()), ROW, ["0.gate_up_proj"]),
    "experts by number": (lambda: nn.Sequential(Mixture()), ROW, ["0.gate_up_proj"]),
    "weight_norm": (lambda: nn.Sequential(normed(nn.utils.weight_norm, nn.Conv1d(2, 4, 3))), SEQUENCE, ["0.weight_v"]),
    "spectral_norm": (
        lambda: nn.Sequential(normed(nn.utils.spectral_norm, nn.Linear(8, 4))),
        ROW,
        ["0.weight_orig"],
    ),
    "parametrizations.weight_norm": (
        lambda: nn.Sequential(parametrizations.weight_norm(nn.Conv1d(2, 4, 3))),
        SEQUENCE,
        ["0.parametrizations.weight.original1"],
    ),
    "parametrizations.spectral_norm": (
        lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(8, 4))),
        ROW,
        ["0.parametrizations.weight.original"],
    ),
    "parametrizations.orthogonal": (
        lambda: nn.Sequential(parametrizations.orthogonal(nn.Linear(8, 4))),
        ROW,
        ["0.parametrizations.weight.original"],
    ),
    "parametrizations of one's own": (
        lambda: nn.Sequential(parametrized(nn.Linear(8, 4), nn.Identity(), UnitRows())),
        ROW,
        ["0.parametrizations.weight.original"],
    ),
}


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("gradient", ["factored", "merged", "projected"])
@pytest.mark.parametrize("case", KINDS)
def test_every_layer_that_multiplies_by_a_weight_is_adapted_and_merged(case, gradient):
    make, shape, expected = KINDS[case]
    module, x = make().eval(), torch.randn(shape)

    def output():
        y = module(x)
        return y[0] if isinstance(y, tuple) else y

    before, keys = output().detach(), list(module.state_dict())
    assert inject(module, rank=2, gradient=gradient) == expected
    assert torch.equal(output(), before)
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.1)
    attach(module, optimizer)
    for _ in range(2):
        optimizer.zero_grad()
        output().pow(2).mean().backward()
        assert all(p.grad is not None for adapter in adapters(module).values() for p in adapter.trained.values())
        optimizer.step()
    stacked = {"experts", "experts by number", "a matrix for each relation"}
    assert (case in stacked) == any(adapter.A.dim() == 3 for adapter in adapters(module).values())
    adapted = output().detach()
    assert not torch.equal(adapted, before)
    merge(module)
    torch.testing.assert_close(output(), adapted, rtol=1e-4, atol=1e-5)
    assert list(module.state_dict()) == keys


def test_fused_experts_of_transformers_are_adapted_and_the_router_is_not():
    config = Qwen3MoeConfig(**{**TINY.to_dict(), "num_experts": 4, "moe_intermediate_size": 8, "num_hidden_layers": 1})
    names = inject(Qwen3MoeForCausalLM(config), rank=2)
    assert [name for name in names if ".mlp." in name] == [
        f"model.layers.0.mlp.experts.{part}" for part in ("gate_up_proj", "down_proj")
    ]


# ------------------------------------------------------------------------------------------------------ what is frozen


class Score(Metric):
    def __init__(self):
        super().__init__()
        self.network = nn.Linear(8, 8)

    def update(self, x): ...

    def compute(self): ...


def test_frozen_networks_and_those_of_metrics_stay_as_they_are():
    module = nn.ModuleDict({"net": nn.Linear(8, 8), "loss": nn.Linear(8, 8).requires_grad_(False), "score": Score()})
    found = resolve(module, Options(rank=2))
    assert names_of(found) == ["net"]
    assert found.left_out == [("loss", "frozen"), ("score.network", "in a metric")]
    assert found.warnings == []
    assert names_of(resolve(module, Options(rank=2, target_modules=["loss"]))) == ["loss"]


class OwnMatrices(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix, self.position = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(1, 4, 8))
        self.net, self.gain = nn.Linear(8, 2), nn.Parameter(torch.ones(8, 1))


def test_matrices_of_no_layer_are_named_as_left_out_and_a_warning_says_how_to_adapt_them():
    module = OwnMatrices()
    found = resolve(module, Options(rank=2))
    assert names_of(found) == ["net"]
    assert found.left_out == [("mix", "bare parameter"), ("position", "bare parameter")]
    (warning,) = found.warnings
    assert "reach 14% of the weights" in warning
    assert "Left out: 2 bare parameter." in warning
    assert "`target_parameters` can name parameters of no layer, such as 'mix'." in warning
    for options in ({"target_parameters": ["mix"]}, {"modules_to_save": ["mix"]}):
        assert resolve(module, Options(rank=2, **options)).left_out == [("position", "bare parameter")]
    with pytest.raises(LoRAError, match=r"leave no module to adapt.* such as 'mix'"):
        resolve(module, Options(rank=2, exclude_modules=["net"]))


def test_where_everything_is_frozen_all_is_adapted():
    module = nn.ModuleDict({"net": nn.Linear(8, 8), "score": Score()})
    module["net"].requires_grad_(False)
    module["score"].requires_grad_(False)
    assert inject(module, rank=2) == ["net"]


def test_bias_all_leaves_what_is_frozen_as_it_is():
    module = nn.ModuleDict({"net": nn.Linear(8, 8), "loss": nn.Linear(8, 8).requires_grad_(False)})
    assert resolve(module, Options(rank=2, bias="all")).trained == ["net.bias"]


def test_a_frozen_tower_with_a_trainable_head_is_a_warning_which_can_be_followed():
    tower = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).requires_grad_(False)
    module = nn.ModuleDict({"tower": tower, "head": nn.Linear(8, 2)})
    with pytest.warns(UserWarning, match=r"reach 11% .*Left out: 2 frozen.*in `target_modules`.*`modules_to_save`"):
        inject(module, rank=2)
    merge(module)
    options = Options(rank=2, target_modules=["tower"], modules_to_save=["head"])
    found = resolve(module, options)
    assert (names_of(found), found.trained, found.warnings) == (
        ["tower.0", "tower.1"],
        ["head.weight", "head.bias"],
        [],
    )
    assert resolve(module, Options(rank=2, exclude_modules=["tower"])).warnings == []
    assert_refuses(module, LoRAError, "they take head.*What is frozen is adapted where", modules_to_save=["head"])


def test_a_frozen_copy_of_what_is_trained_is_no_warning():
    student = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    module = nn.ModuleDict({"student": student, "teacher": copy.deepcopy(student).requires_grad_(False)})
    found = resolve(module, Options(rank=2))
    assert names_of(found) == ["student.0", "student.1"]
    assert found.warnings == []


def residual():
    def block():
        return nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))

    return nn.ModuleDict({"stem": nn.Conv2d(3, 8, 7), "layer1": block(), "fc": nn.Linear(8, 4)})


@pytest.mark.parametrize("rule", ["all-linear", ["fc"]], ids=str)
def test_a_residual_network_of_which_only_the_head_is_adapted_is_a_warning(rule):
    with pytest.warns(UserWarning, match=r"Left out: 3 Conv2d\. `target_modules='all'` adapts layers of every kind"):
        assert inject(residual(), rank=2, target_modules=rule) == ["fc"]
    assert resolve(residual(), Options(rank=2)).warnings == []


def test_some_projections_of_every_block_are_no_warning_and_those_of_one_block_are():
    model = LlamaForCausalLM(TINY)
    assert resolve(model, Options(rank=2, target_modules=["q_proj"])).warnings == []
    assert resolve(model, Options(rank=2, target_modules="all-linear")).warnings == []
    model = LlamaForCausalLM(LlamaConfig(**{**TINY.to_dict(), "num_hidden_layers": 3}))
    assert resolve(model, Options(rank=2, target_modules=["layers.0.self_attn.q_proj"])).warnings


# --------------------------------------------------------------------------------------------------------------- ranks


def test_a_rank_that_a_weight_cannot_have_is_the_next_lower_one_that_it_can():
    def ranks(**options):
        module = nn.ModuleDict({"a": nn.Linear(12, 8), "b": nn.Linear(8, 2)})
        return [target.rank for target in resolve(module, Options(**options)).adapted]

    assert ranks(rank=10**6) == [8, 2]
    assert ranks(rank=6, decomposition="additive") == [4, 2]
    assert ranks(rank=7, init="orthogonal") == [6, 2]
    assert ranks(rank=8, init="gradient") == [4, 1]


def test_the_scale_is_that_of_the_rank_which_a_weight_has():
    module = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    inject(module, rank=8, alpha=16)
    assert [adapter.scale for adapter in adapters(module).values()] == [2, 8]


def test_a_layer_that_can_have_no_rank_for_its_start_is_left_out():
    module = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 1))
    found = resolve(module, Options(rank=4, init="orthogonal"))
    assert (names_of(found), found.left_out) == (["0"], [("1", "too small for init='orthogonal'")])


def test_a_pattern_knows_the_weights_of_a_layer_by_the_layers_name_and_the_advice_can_be_followed():
    module = nn.ModuleDict({"rnn": nn.LSTM(8, 6), "head": nn.Linear(6, 2)})
    found = resolve(module, Options(rank_pattern={"rnn": 3}))
    assert [target.rank for target in found.adapted] == [3, 3, 2]
    with pytest.raises(LoRAError, match="This one would do") as error:
        resolve(module, Options(rank_pattern={"rnn": 99, "head": 2}))
    advice = ast.literal_eval(str(error.value).partition("would do: ")[2].rstrip("."))
    assert [target.rank for target in resolve(module, Options(rank_pattern=advice)).adapted] == [8, 6, 2]


def test_dropout_where_there_is_no_input_of_an_increment_is_a_warning_unless_the_layer_is_named():
    module = nn.ModuleDict({"rnn": nn.LSTM(8, 6), "head": nn.Linear(6, 2)})
    assert ["'rnn.weight_hh_l0', 'rnn.weight_ih_l0'" in text for text in resolve(module, Options(dropout=0.1)).warnings]
    assert_refuses(module, LoRAError, "`dropout=0.1` cannot be applied", dropout=0.1, target_modules=["rnn"])


# --------------------------------------------------------------------------------------------------------------- names


class Wrapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 8))
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.embed = nn.Sequential(nn.Embedding(4, 8), nn.LayerNorm(8))
        self.head = nn.Linear(8, 4)
        self.alias = self.head


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (["stem"], ["stem.0"]),
        ("st.*", ["stem.0"]),
        (["embed"], ["embed.0"]),
        (["alias"], ["head"]),
        (["stem", "alias"], ["stem.0", "head"]),
    ],
    ids=str,
)
def test_a_name_may_be_that_of_a_wrapper_or_the_second_one_of_a_module(rule, expected):
    assert names_of(resolve(Wrapped(), Options(rank=2, target_modules=rule))) == expected


def test_the_second_name_of_a_module_excludes_it_and_has_its_rank():
    assert names_of(resolve(Wrapped(), Options(rank=2, exclude_modules=["alias"]))) == ["stem.0"]
    found = resolve(Wrapped(), Options(rank=2, rank_pattern={"alias": 3}))
    assert [(target.name, target.rank) for target in found.adapted] == [("stem.0", 2), ("head", 3)]


def test_modules_to_save_takes_parameters_and_every_name_of_a_shared_weight():
    found = resolve(Wrapped(), Options(rank=2, modules_to_save=["cls_token", "alias"]))
    assert (names_of(found), found.trained) == (["stem.0"], ["cls_token", "head.weight", "head.bias"])
    for name in ("embed", "head"):
        found = resolve(tied(), Options(rank=2, modules_to_save=[name]))
        assert "embed.weight" in found.trained
        assert "head" not in names_of(found)


def test_the_name_of_fabrics_wrapper_is_no_part_of_a_name():
    module = Fabric(accelerator="cpu", devices=1).setup(nn.Sequential(nn.Linear(8, 8)))
    assert inject(module, rank=2) == list(adapters(module)) == ["0"]
    assert plain_name("_forward_module.encoder.0.weight") == "encoder.0.weight"
    assert state_key("_forward_module.encoder.0.weight") == "encoder.0.weight"


def test_a_model_with_adapters_of_peft_is_refused_by_name():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.ModuleDict({"net": get_peft_model(Llama(TINY), LoraConfig(target_modules=["q_proj"]))})
    with pytest.raises(LoRAError, match=r"'net' is PEFT's PeftModel.*`merge_and_unload"):
        inject(model, rank=2)
