"""From the same A and B, PEFT and this library train to the same losses and merge to the same weights."""

import copy
import math
import warnings

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from lightning_lora import adapters, attach, inject, merge
from lightning_lora.injection.gradient_start import start_from_gradients
from lightning_lora.injection.inject import inject_options, places
from lightning_lora.injection.options import Options

STEPS, VOCABULARY = 30, 64


def llama():
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=True,
        initializer_range=0.2,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def gpt2():
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=16,
        n_embd=32,
        n_layer=2,
        n_head=4,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=0,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    return GPT2LMHeadModel(config)


def in_peft(model, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what PEFT and transformers have to settle between them
        return get_peft_model(model, LoraConfig(**options))


def copy_factors(ours, theirs):
    """A as PEFT drew it and a random B into both; PEFT stores B as (m, r)."""
    layers = {name: module for name, module in theirs.named_modules() if hasattr(module, "lora_A")}
    known = adapters(ours)
    assert list(layers) == list(known)
    with torch.no_grad():
        for name, layer in layers.items():
            A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            B.normal_(std=0.05)
            known[name].A.copy_(A)
            known[name].B.copy_(B.T)


def batches():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, VOCABULARY, (4, 12), generator=generator) for _ in range(STEPS)]


def train(model):
    """The loss before each step of AdamW."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3, weight_decay=0.01)
    losses = []
    for tokens in batches():
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses)


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (llama, {"target_modules": "all-linear"}),
        (gpt2, {"target_modules": "all-linear"}),
        (llama, {"target_modules": "all-linear", "use_rslora": True, "rank_pattern": {"mlp.*": 2}}),
        # not the biases of keys, on which no loss depends: Adam makes whole steps of the rounding in their gradients
        (llama, {"target_modules": ["v_proj", "o_proj"], "bias": "lora_only"}),
        (gpt2, {"target_modules": ["c_fc", "c_proj"], "bias": "lora_only"}),
    ],
)
def test_thirty_steps_of_adamw_give_the_losses_and_the_merged_weights_of_peft(make, options):
    """Losses to 1e-5 and merged weights to 1e-6, both the largest absolute difference of an entry, in float32."""
    torch.manual_seed(0)
    base = make()
    our_model, their_model = copy.deepcopy(base), in_peft(copy.deepcopy(base), r=4, lora_alpha=8, **options)
    inject(our_model, rank=4, alpha=8, **options)
    copy_factors(our_model, their_model.base_model.model)

    our_losses, their_losses = train(our_model), train(their_model)
    assert (our_losses - their_losses).abs().max() <= 1e-5
    assert their_losses.std() > 0.01

    merge(our_model)
    merged = their_model.merge_and_unload().state_dict()
    assert list(our_model.state_dict()) == list(merged)
    for key, weight in our_model.state_dict().items():
        assert (weight - merged[key]).abs().max() <= 1e-6, key
    assert any(not torch.equal(weight, base.state_dict()[key]) for key, weight in merged.items())


@pytest.mark.parametrize("make", [llama, gpt2])
def test_in_float64_outputs_and_gradients_are_those_of_peft(make):
    torch.manual_seed(0)
    base = make().double()
    ours, theirs = copy.deepcopy(base), in_peft(base, r=4, lora_alpha=6, target_modules="all-linear").double()
    inject(ours, rank=4, alpha=6, adapter_dtype="float64")
    copy_factors(ours, theirs.base_model.model)
    tokens = batches()[0]
    results = []
    for model in (ours, theirs):
        output = model(input_ids=tokens, labels=tokens, use_cache=False)
        output.loss.backward()
        results.append(output.logits)
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)
    for name, adapter in adapters(ours).items():
        layer = theirs.base_model.model.get_submodule(name)
        dA, dB = layer.lora_A["default"].weight.grad, layer.lora_B["default"].weight.grad
        torch.testing.assert_close(adapter.A.grad, dA, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(adapter.B.grad, dB.T, rtol=1e-12, atol=1e-12)


def test_both_draw_a_from_the_same_distribution_and_start_b_at_zero():
    """The bound of the uniform distribution, which 20 layers of 4 x 32 and more values come near from below."""
    torch.manual_seed(0)
    ours, theirs = llama(), in_peft(llama(), r=4, target_modules="all-linear")
    inject(ours, rank=4)
    for name, adapter in adapters(ours).items():
        layer = theirs.base_model.model.get_submodule(name)
        A, bound = layer.lora_A["default"].weight, 1 / math.sqrt(adapter.A.shape[1])
        for factor in (A, adapter.A):
            assert 0.9 * bound < factor.abs().max() <= bound
        assert not adapter.B.any()
        assert not layer.lora_B["default"].weight.any()


# --------------------------------------------------------------------------------- DoRA, PiSSA, LoRA-GA and LoRA+

GRADIENTS = ["factored", "merged", "projected"]


def train_from_here(model, optimizer, inputs=None):
    """The loss before each of 20 steps; ``inputs`` are pairs for the squared error, or the tokens of ``batches``."""
    model.train()
    losses = []
    for batch in (inputs or batches())[:20]:
        if isinstance(batch, tuple):
            loss = torch.nn.functional.mse_loss(model(batch[0]), batch[1])
        else:
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses)


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


def both_train(ours, theirs, inputs=None, lr=5e-3):
    """Losses of both, by AdamW, and the merged weights of ours beside those of PEFT."""
    optimizer = torch.optim.AdamW(trainable(ours), lr=lr, weight_decay=0.01)
    attach(ours, optimizer)
    our_losses = train_from_here(ours, optimizer, inputs)
    their_losses = train_from_here(theirs, torch.optim.AdamW(trainable(theirs), lr=lr, weight_decay=0.01), inputs)
    assert their_losses.std() > 0.01
    merge(ours)
    merged = theirs.merge_and_unload().state_dict()
    assert list(ours.state_dict()) == list(merged)
    distance = max((weight - merged[key]).abs().max() for key, weight in ours.state_dict().items())
    return (our_losses - their_losses).abs().max(), distance


class ConvNet(torch.nn.Sequential):
    def __init__(self):
        super().__init__(
            torch.nn.Conv2d(3, 8, 3, padding=1),
            torch.nn.Tanh(),
            torch.nn.Conv2d(8, 6, 3, stride=2, bias=False),
            torch.nn.Flatten(),
            torch.nn.Linear(54, 4),
        )


def images():
    generator = torch.Generator().manual_seed(1)
    draws = [torch.randn(8, 3, 8, 8, generator=generator) for _ in range(STEPS)]
    return [(x, torch.randn(8, 4, generator=generator)) for x in draws]


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("options", [{"use_dora": True}, {"use_rslora": True}, {"use_dora": True, "use_rslora": True}])
def test_dora_and_rslora_give_the_losses_of_peft(options, gradient):
    torch.manual_seed(0)
    base = llama()
    theirs = in_peft(copy.deepcopy(base), r=4, lora_alpha=8, target_modules="all-linear", **options)
    decomposition = "dora" if "use_dora" in options else "product"
    rslora = options.get("use_rslora", False)
    inject(base, rank=4, alpha=8, decomposition=decomposition, use_rslora=rslora, gradient=gradient)
    copy_factors(base, theirs.base_model.model)
    followed(base)
    losses, weights = both_train(base, theirs)
    assert losses <= 1e-4
    assert weights <= 1e-4


def followed(model):
    """Weights that hold their increment take in that of the factors as they have been set."""
    for place in places(model):
        if place.host.holds_increment:
            adapter = place.adapter
            adapter.follow(place.weight, adapter.A.detach().clone(), torch.zeros_like(adapter.B))


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_dora_of_convolutions_gives_the_losses_of_peft(gradient):
    torch.manual_seed(0)
    base = ConvNet()
    targets = ["0", "2", "4"]
    theirs = in_peft(copy.deepcopy(base), r=2, lora_alpha=4, target_modules=targets, use_dora=True)
    inject(base, rank=2, alpha=4, target_modules=targets, decomposition="dora", gradient=gradient)
    with torch.no_grad():
        for name, adapter in adapters(base).items():
            layer = theirs.base_model.model.get_submodule(name)
            B = layer.lora_B["default"].weight.normal_(std=0.05)
            adapter.A.copy_(layer.lora_A["default"].weight.flatten(1))
            adapter.B.copy_(B.flatten(1).T)
    followed(base)
    losses, weights = both_train(base, theirs, images())
    assert losses <= 1e-4
    assert weights <= 1e-4


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_pissa_from_its_own_start_gives_the_losses_of_peft(gradient):
    """Singular vectors may differ in sign, on which Adam's steps do not depend.

    PEFT stores W0 - s B0 A0 in the place of W0, and gets back what is merged to the rounding of that; ours keeps W0.
    """
    torch.manual_seed(0)
    base = llama()
    theirs = in_peft(copy.deepcopy(base), r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights="pissa")
    inject(base, rank=4, alpha=8, init="pissa", gradient=gradient)
    for name, adapter in adapters(base).items():
        layer = theirs.base_model.model.get_submodule(name)
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        torch.testing.assert_close(adapter.B0.T @ adapter.A0, B @ A, rtol=1e-3, atol=1e-4)
    losses, weights = both_train(base, theirs, lr=1e-3)
    assert losses <= 1e-4
    assert weights <= 1e-3


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_lora_ga_from_the_start_of_peft_gives_its_losses(gradient):
    """PEFT takes the same singular vectors of the gradient as we do.

    Then it multiplies B by the singular values and leaves A at unit length; the paper (eq. 8) has neither, and both
    factors scaled by m^(1/4) / sqrt(gamma). So its start is taken over for the losses, and the directions alone are
    compared with those of ours.
    """
    loraga = pytest.importorskip("peft.tuners.lora.loraga", reason="from PEFT 0.19")
    torch.manual_seed(0)
    base = llama()
    twin, drafted = copy.deepcopy(base), copy.deepcopy(base)
    config = LoraConfig(
        r=4, lora_alpha=4, target_modules="all-linear", init_lora_weights="lora_ga", lora_ga_config=peft.LoraGAConfig()
    )
    config.target_modules = [name for name, m in twin.named_modules() if isinstance(m, torch.nn.Linear)]
    config.target_modules.remove("lm_head")

    def losses(model):
        for tokens in batches()[:4]:
            yield model(input_ids=tokens, labels=tokens, use_cache=False).loss

    def train_step():
        for loss in losses(twin):
            loss.backward()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loraga.preprocess_loraga(twin, config, train_step)
        exact = {name: twin.get_submodule(name)._peft_loraga_grad for name in config.target_modules}
        theirs = get_peft_model(twin, config)

    inject_options(drafted, Options(rank=4, init="gradient"))
    start_from_gradients(drafted.train(), lambda: losses(drafted), lambda tensor: tensor)
    known = adapters(drafted)
    for name, adapter in known.items():
        S = torch.linalg.svdvals(exact[name])
        if S[4] < 0.8 * S[3]:  # a space of singular vectors is as well known as the gap behind it is wide
            A = theirs.base_model.model.get_submodule(name).lora_A["default"].weight.detach()
            cosines = torch.linalg.svdvals(torch.linalg.qr(A.T)[0].T @ torch.linalg.qr(adapter.A0.T)[0])
            assert cosines.min() > 0.95, name

    inject(base, rank=4, gradient=gradient)
    with torch.no_grad():
        for name, adapter in adapters(base).items():
            layer = theirs.base_model.model.get_submodule(name)
            adapter.start_from(layer.lora_A["default"].weight, layer.lora_B["default"].weight.T)
    our_losses, weights = both_train(base, theirs, lr=1e-3)
    assert our_losses <= 1e-4
    assert weights <= 1e-3


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("ratio", [4.0, 16.0])
def test_lora_plus_gives_the_losses_of_pefts_optimizer(ratio, gradient):
    """PEFT also gives the higher rate to every vector that is trained, such as biases and DoRA's magnitudes.

    The paper has it for B alone, and so has `lr_ratio`. No such vector is trained here.
    """
    torch.manual_seed(0)
    base = llama()
    theirs = in_peft(copy.deepcopy(base), r=4, lora_alpha=8, target_modules="all-linear")
    inject(base, rank=4, alpha=8, lr_ratio=ratio, gradient=gradient)
    copy_factors(base, theirs.base_model.model)
    followed(base)
    optimizer = torch.optim.AdamW(trainable(base), lr=5e-4, weight_decay=0.01)
    attach(base, optimizer)
    groups = create_loraplus_optimizer(
        theirs, torch.optim.AdamW, lr=5e-4, loraplus_lr_ratio=ratio, loraplus_weight_decay=0.01
    )
    ours, expected = train_from_here(base, optimizer), train_from_here(theirs, groups)
    assert (ours - expected).abs().max() <= 1e-4
    assert expected.std() > 0.01
