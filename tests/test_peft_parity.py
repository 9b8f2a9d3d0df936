"""From the same A and B, PEFT and this library train to the same losses and merge to the same weights."""

import copy
import math
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from lightning_lora import adapters, inject, merge

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
