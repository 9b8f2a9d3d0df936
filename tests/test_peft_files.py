"""Files that are written here compute the same in PEFT, and those that PEFT writes compute the same here."""

import copy
import itertools
import json
import math
import re
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import LightningModule
from models import trainer
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_peft_parity import gpt2, llama
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

from lightning_lora import LoRA, adapters, inject, load_peft, merge, save_peft
from lightning_lora.errors import LoRAError

TOLERANCE = 1e-5
TOKENS = torch.randint(1, 64, (2, 9), generator=torch.Generator().manual_seed(3))
TOKENS[0, :2] = 0  # the padding of embeddings


class Mixed(nn.Module):
    """An embedding, convolutions, a BatchNorm, an attention, a head."""

    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleDict(
            {
                "embedding": nn.Embedding(64, 8, padding_idx=0),
                "wide": nn.Conv1d(8, 12, 3, padding=1),
                "norm": nn.BatchNorm1d(12),
                "plane": nn.Conv2d(1, 4, 3, stride=2, padding=1),
                "mix": nn.Linear(4 * 6 * 5, 12),
            }
        )
        self.attention = nn.MultiheadAttention(12, 2, batch_first=True)
        self.head = nn.Linear(12, 5)
        self.shift = nn.Parameter(torch.zeros(12))

    def forward(self, input_ids):
        x = self.parts["norm"](torch.tanh(self.parts["wide"](self.parts["embedding"](input_ids).mT)))
        x = self.parts["mix"](torch.tanh(self.parts["plane"](x[:, None])).flatten(1))[:, None] + x.mT + self.shift
        return self.head(self.attention(x, x, x, need_weights=False)[0])


class Experts(nn.Module):
    """Stacks of matrices, as transformers has them: two in one module."""

    def __init__(self, is_transposed):
        super().__init__()
        self.is_transposed = is_transposed
        self.num_experts = 3
        shapes = [(3, 6, 8), (3, 10, 6)] if not is_transposed else [(3, 8, 6), (3, 6, 10)]
        self.up, self.down = (nn.Parameter(torch.randn(shape) / 3) for shape in shapes)

    def forward(self, x):
        for expert in range(3):
            for stack in (self.up, self.down):
                x = x @ stack[expert] if self.is_transposed else nn.functional.linear(x, stack[expert])
            x = nn.functional.pad(torch.tanh(x), (0, -2))
        return x


class Mixture(nn.Module):
    def __init__(self, is_transposed=False):
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.experts = Experts(is_transposed)
        self.cell = nn.GRUCell(8, 8)

    def forward(self, input_ids):
        x = self.first(torch.nn.functional.one_hot(input_ids % 8, 8).float())
        return self.cell(self.experts(x).flatten(0, 1))


def mixtral():
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=3,
        initializer_range=0.3,
        pad_token_id=0,
    )
    return MixtralForCausalLM(config)


def tied_llama():
    model = llama()
    model.config.tie_word_embeddings = True
    model.lm_head.weight = model.model.embed_tokens.weight
    return model


MAKERS = {f.__name__: f for f in (llama, gpt2, Mixed, Mixture, mixtral, tied_llama)}


def made(name, **options):
    torch.manual_seed(0)
    return MAKERS[name](**options).eval()


def output(model):
    with torch.no_grad():
        result = model(input_ids=TOKENS)
    return getattr(result, "logits", result)


def train(model, steps=3):
    """A few large steps on everything that requires a gradient, so that no tensor keeps the value it started at."""
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        result = model(input_ids=TOKENS)
        getattr(result, "logits", result).square().mean().backward()
        optimizer.step()
    return model.eval()


def in_peft(base, folder):
    """PEFT's model of the files; what it says of keys that it misses or does not know is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message="(?i).*(missing|unexpected|not found)")
        return PeftModel.from_pretrained(base, folder).eval()


def wrapped(base, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(base, LoraConfig(**options)).eval()


def distance(one, other):
    return (output(one) - output(other)).abs().max().item()


EXPERTS = {"target_modules": ["first"], "target_parameters": ["experts.up", "experts.down"]}
MIXED = ["embedding", "wide", "plane", "mix"]
KINDS = {
    "product": ("llama", {"rank": 4, "alpha": 6}),
    "DoRA": ("llama", {"rank": 4, "alpha": 6, "decomposition": "dora"}),
    "rsLoRA": ("llama", {"rank": 4, "alpha": 6, "use_rslora": True, "rank_pattern": {"mlp.*": 2}}),
    "patterns": ("llama", {"rank": 4, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.mlp.*": 9.5}}),
    "additive": ("llama", {"rank": 4, "alpha": 6, "decomposition": "additive"}),
    "PiSSA": ("llama", {"rank": 4, "alpha": 6, "init": "pissa"}),
    "symmetric": ("llama", {"rank": 4, "init": "symmetric"}),
    "orthogonal": ("llama", {"rank": 4, "init": "orthogonal"}),
    "DoRA from PiSSA": ("llama", {"rank": 4, "decomposition": "dora", "init": "pissa"}),
    "embedding": ("llama", {"rank": 4, "alpha": 2, "target_modules": ["embed_tokens", "q_proj"]}),
    "tied embedding": ("tied_llama", {"rank": 4, "target_modules": ["embed_tokens", "q_proj"]}),
    "head in full": ("llama", {"rank": 2, "modules_to_save": ["lm_head", "norm"]}),
    "biases": ("llama", {"rank": 2, "bias": "lora_only"}),
    "all biases": ("gpt2", {"rank": 2, "bias": "all"}),
    "Conv1D": ("gpt2", {"rank": 4, "alpha": 3}),
    "Conv1D, DoRA": ("gpt2", {"rank": 4, "alpha": 3, "decomposition": "dora"}),
    "convolutions": ("Mixed", {"rank": 2, "alpha": 3, "target_modules": MIXED}),
    "convolutions, DoRA": ("Mixed", {"rank": 2, "target_modules": MIXED, "decomposition": "dora"}),
    "convolutions, additive": ("Mixed", {"rank": 2, "target_modules": ["wide", "mix"], "decomposition": "additive"}),
    "embedding with padding, additive": (
        "Mixed",
        {"rank": 2, "target_modules": ["embedding"], "decomposition": "additive"},
    ),
    "attention": ("Mixed", {"rank": 3, "alpha": 2, "rank_pattern": {"out_proj": 2}}),
    "attention, one half": ("Mixed", {"rank": 3, "target_modules": ["out_proj"]}),
    "parameters in full": ("Mixed", {"rank": 3, "modules_to_save": ["head", "shift", "parts.norm"]}),
    "experts": ("Mixture", {"rank": 2, "alpha": 3, **EXPERTS}),
    "a cell": ("Mixture", {"rank": 2}),
    "experts of transformers": ("mixtral", {"rank": 2, "alpha": 3}),
}


def adapted(kind, gradient="factored"):
    name, options = KINDS[kind]
    model, plain = made(name), made(name)
    inject(model, gradient=gradient, **options)
    return train(model) if gradient == "factored" else model, plain


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:PEFT adds the increment of the `out_proj`")
def test_files_compute_the_same_in_peft_and_here_again(kind, tmp_path):
    """Largest difference of a logit, in float32: 1e-5 in each direction, where training moved them by 0.01 or more."""
    model, plain = adapted(kind)
    save_peft(model, tmp_path)
    assert distance(model, plain) > 1e-2
    theirs = in_peft(copy.deepcopy(plain), tmp_path)
    assert distance(theirs, model) <= TOLERANCE
    back = copy.deepcopy(plain)
    load_peft(back, tmp_path)
    assert distance(back, model) <= TOLERANCE
    merge(back)
    assert distance(back, model) <= TOLERANCE

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.save_pretrained(tmp_path / "theirs")
    ours, saved = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path, tmp_path / "theirs"))
    lost = {key.removeprefix("base_model.model.") for key in ours.keys() - saved.keys()}
    assert all("running_" in key or key.endswith(("num_batches_tracked", "shift")) for key in lost), lost
    again = copy.deepcopy(plain)
    again.load_state_dict({key: model.state_dict()[key] for key in lost}, strict=False)  # PEFT keeps none of these
    load_peft(again, tmp_path / "theirs")
    assert distance(again, model) <= TOLERANCE


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_rank_scale_and_shape_goes_to_peft_and_back(tmp_path_factory, data):
    """A matrix of any shape, of any rank from 1 to its smallest side, in float64 where PEFT computes in float64."""
    n, m = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9))
    rank = data.draw(st.integers(1, min(n, m)))
    options = {"rank": rank, "alpha": data.draw(st.floats(0.01, 100)), "use_rslora": data.draw(st.booleans())}
    inits = ["zero", "symmetric", "pissa", *(["orthogonal"] if rank % 2 == 0 else [])]
    options |= {
        "init": data.draw(st.sampled_from(inits)),
        "decomposition": data.draw(st.sampled_from(["product", "dora"])),
    }
    torch.manual_seed(data.draw(st.integers(0, 99)))
    plain = nn.Sequential(nn.Linear(n, m)).double()
    model, x, folder = copy.deepcopy(plain), torch.randn(4, n).double(), tmp_path_factory.mktemp("files")
    (name,) = inject(model, adapter_dtype="float64", **options)
    with torch.no_grad():
        for p in adapters(model)[name].trained.values():
            p.add_(torch.randn_like(p) / 4)
    save_peft(model, folder)
    expected = model(x)
    torch.testing.assert_close(in_peft(copy.deepcopy(plain), folder)(x), expected, rtol=1e-9, atol=1e-9)
    load_peft(plain, folder, adapter_dtype="float64")
    torch.testing.assert_close(plain(x), expected, rtol=1e-9, atol=1e-9)


# -------------------------------------------------------------------------------------------------- checkpoint files


class Lit(LightningModule):
    """A model of these tests in a LightningModule that keeps it as ``model``."""

    def __init__(self, name):
        super().__init__()
        self.model = made(name)
        self.losses = []

    def forward(self, input_ids):
        return self.model(input_ids=input_ids)

    def training_step(self, batch, batch_idx):
        result = self(batch)
        loss = getattr(result, "logits", result).square().mean()
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=3e-2)


def fit(folder, module, *callbacks, steps=3, **options):
    run = trainer(folder, *callbacks, max_epochs=-1, max_steps=steps)
    run.fit(module.train(), torch.utils.data.DataLoader([TOKENS[0], TOKENS[1]], batch_size=2), **options)
    module.eval()
    return run


FILES = ["product", "DoRA", "additive", "PiSSA", "tied embedding", "head in full", "Conv1D", "convolutions"]
FILES += ["embedding with padding, additive", "attention", "parameters in full", "experts", "experts of transformers"]


@pytest.mark.parametrize(("kind", "form"), list(zip(FILES, itertools.cycle(("merged", "adapter")))))
@pytest.mark.filterwarnings("ignore:PEFT adds the increment of the `out_proj`")
def test_a_checkpoint_file_becomes_files_without_the_model(kind, form, tmp_path):
    name, options = KINDS[kind]
    module = Lit(name)
    options = {
        option: [f"model.{item}" if option == "target_parameters" else item for item in value]
        if isinstance(value, list)
        else value
        for option, value in options.items()
    }
    fit(tmp_path, module, LoRA(checkpoint=form, **options)).save_checkpoint(tmp_path / "run.ckpt")
    save_peft(tmp_path / "run.ckpt", tmp_path / "files", root="model")
    plain = made(name)
    assert distance(module.model, plain) > 1e-2
    assert distance(in_peft(copy.deepcopy(plain), tmp_path / "files"), module.model) <= TOLERANCE
    load_peft(plain, tmp_path / "files")
    assert distance(plain, module.model) <= TOLERANCE


def test_a_file_that_does_not_name_its_layers_is_understood_as_far_as_it_can_be(tmp_path):
    """Such as version 0.1.0 has written."""
    for name in ("gpt2", "Mixed"):
        module, path = Lit(name), tmp_path / f"{name}.ckpt"
        targets = ["c_attn", "c_fc", "wte", "wpe"] if name == "gpt2" else [*MIXED]
        module.model.lm_head = nn.Identity() if name == "gpt2" else None  # its weight is tied to the embedding's
        fit(tmp_path, module, LoRA(rank=2, target_modules=targets), steps=1).save_checkpoint(path)
        checkpoint = torch.load(path, weights_only=True)
        del checkpoint["lightning_lora"]["layers"]
        torch.save(checkpoint, tmp_path / "old.ckpt")
        for file, folder in ((path, "new"), (tmp_path / "old.ckpt", "old")):
            save_peft(file, tmp_path / folder, root="model")
        old, new = (load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("old", "new"))
        assert old.keys() == new.keys()
        assert all(torch.equal(old[key], new[key]) for key in old)


def test_a_module_in_a_run_is_saved_as_it_stands(tmp_path):
    class Saves(Lit):
        def on_train_end(self):
            save_peft(self, tmp_path / "files", root="model")

    for gradient in ("factored", "merged", "projected"):
        module, plain = Saves("llama"), made("llama")
        fit(tmp_path, module, LoRA(rank=4, gradient=gradient))
        assert distance(in_peft(plain, tmp_path / "files"), module.model) <= TOLERANCE


# --------------------------------------------------------------------------------------------------- runs from files


def written_by_peft(folder, name="llama", **options):
    """Files of a short training by PEFT, and its model."""
    model = train(wrapped(made(name), **{"target_modules": "all-linear", "r": 4, "lora_alpha": 6, **options}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("gradient", ["factored", "merged", "projected"])
@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True, "modules_to_save": ["lm_head"]}])
def test_a_run_goes_on_from_pefts_files_as_peft_does(options, gradient, tmp_path):
    """The losses of three more steps, to 1e-5."""
    written_by_peft(tmp_path, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = PeftModel.from_pretrained(made("llama"), tmp_path, is_trainable=True)
    reference, module = Lit("llama"), Lit("llama")
    reference.model = theirs
    fit(tmp_path, reference)
    fit(tmp_path, module, LoRA(adapter=str(tmp_path), gradient=gradient))
    assert module.losses == pytest.approx(reference.losses, rel=1e-4)
    assert abs(reference.losses[-1] - reference.losses[0]) > 0.05 * reference.losses[0]
    assert distance(module.model, theirs.eval()) <= 1e-4


def test_a_run_from_files_resumes_bit_for_bit_and_logs_what_they_say(tmp_path):
    written_by_peft(tmp_path, use_dora=True)
    whole, half, rest = Lit("llama"), Lit("llama"), Lit("llama")
    fit(tmp_path, whole, LoRA(adapter=str(tmp_path)), steps=4)
    fit(tmp_path, half, LoRA(adapter=str(tmp_path)), steps=2).save_checkpoint(tmp_path / "half.ckpt")
    saved = torch.load(tmp_path / "half.ckpt", weights_only=True)["lightning_lora"]["options"]
    assert (saved["rank"], saved["alpha"], saved["decomposition"]) == (4, 6.0, "dora")
    fit(tmp_path, rest, LoRA(adapter=str(tmp_path)), steps=4, ckpt_path=tmp_path / "half.ckpt")
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), rest.parameters(), strict=True))


def test_what_files_say_is_not_to_be_given_beside_them(tmp_path):
    with pytest.raises(LoRAError, match="`rank=4`, `init='pissa'` cannot be combined"):
        LoRA(adapter="files", rank=4, init="pissa")
    with pytest.raises(LoRAError, match="resample_every_n_steps"):
        load_peft(nn.Linear(2, 2), tmp_path, gradient="merged", resample_every_n_steps=1)
    assert repr(LoRA(adapter="files", gradient="merged")) == "LoRA(gradient='merged', adapter='files')"


# ------------------------------------------------------------------------------------------- files that PEFT has made

THEIRS = {
    "product": ("llama", {}),
    "a rank above the sides": ("llama", {"r": 50, "lora_alpha": 9, "use_rslora": True}),
    "DoRA of a rank above the sides": ("llama", {"r": 50, "use_dora": True}),
    "patterns": (
        "llama",
        {"rank_pattern": {"q_proj": 2, "^model.layers.1.mlp.up_proj": 3}, "alpha_pattern": {"mlp.*": 5}},
    ),
    "PiSSA": ("llama", {"init_lora_weights": "pissa", "target_modules": ["q_proj", "down_proj"]}),
    "orthogonal": ("llama", {"init_lora_weights": "orthogonal"}),
    "biases": ("llama", {"bias": "all"}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "v_proj"]}),
    "tied, both": ("tied_llama", {"target_modules": ["embed_tokens", "v_proj"], "ensure_weight_tying": True}),
    "layers": ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"}),
    "head": ("llama", {"modules_to_save": ["lm_head", "norm"]}),
    "Conv1D": ("gpt2", {"fan_in_fan_out": True}),
    "convolutions": ("Mixed", {"target_modules": [*MIXED, "attention"], "lora_dropout": 0.0}),
    "convolutions, DoRA": ("Mixed", {"target_modules": MIXED, "use_dora": True}),
    "experts": ("Mixture", EXPERTS),
    "experts of transformers": ("mixtral", {"target_parameters": ["gate_up_proj", "down_proj"]}),
}


@pytest.mark.parametrize("kind", THEIRS)
@pytest.mark.filterwarnings("ignore:PEFT adds the increment of the `out_proj`")
def test_files_that_peft_wrote_by_itself_compute_the_same_here_and_come_back(kind, tmp_path):
    name, options = THEIRS[kind]
    theirs = written_by_peft(tmp_path, name, **options)
    ours, plain = made(name), made(name)
    if name == "Mixed":
        ours.parts["norm"].load_state_dict(theirs.base_model.model.parts["norm"].state_dict())
    load_peft(ours, tmp_path)
    assert distance(theirs, plain) > 1e-2
    assert distance(theirs, ours) <= TOLERANCE
    save_peft(ours, tmp_path / "ours")
    assert distance(in_peft(plain, tmp_path / "ours"), ours) <= TOLERANCE


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"target_modules": ["embed_tokens", "v_proj"]}])
def test_layouts_of_earlier_versions_are_read(options, tmp_path):
    """Pickled tensors, names of adapters within keys, whole wrappers, and configurations with few entries."""
    theirs = written_by_peft(tmp_path, modules_to_save=["lm_head"], **options)
    parts = ("lora_", "modules_to_save")
    state = {k: v for k, v in theirs.state_dict().items() if any(part in k for part in parts)}
    (tmp_path / "adapter_model.safetensors").unlink()
    torch.save(state, tmp_path / "adapter_model.bin")
    assert any(key.endswith("default.weight") for key in state)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    kept = ("peft_type", "r", "lora_alpha", "target_modules", "modules_to_save", "use_dora", "bias")
    (tmp_path / "adapter_config.json").write_text(json.dumps({key: config[key] for key in kept}))
    ours = made("llama")
    load_peft(ours, tmp_path)
    assert distance(theirs, ours) <= TOLERANCE


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("version", [None, "0.17.1", "0.18.0", "0.19.1", "0.20.0", "0.21.2"])
def test_stacks_are_read_as_the_version_that_wrote_them_lays_them_out(version, is_transposed, tmp_path):
    """The formulas of each version, on a square stack, whose shape does not tell."""
    torch.manual_seed(0)
    module = nn.ModuleDict({"experts": Experts(is_transposed)})
    module.experts.up = nn.Parameter(torch.randn(3, 6, 6))
    A, B = torch.randn(3 * 2, 6), torch.randn(6, 2 * 3)
    save_file(
        {"base_model.model.experts.lora_A.weight": A, "base_model.model.experts.lora_B.weight": B},
        tmp_path / "adapter_model.safetensors",
    )
    config = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 2,
        "target_parameters": ["experts.up"],
        "peft_version": version,
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    swaps = {"0.19.1": is_transposed, "0.20.0": not is_transposed, "0.21.2": not is_transposed}.get(version, False)
    A, B = A.reshape(3, -1, 6), B.reshape(6, -1, 3)
    expected = torch.einsum("ore,eri->eoi" if swaps else "ore,eri->eio", B, A)
    load_peft(module, tmp_path)
    torch.testing.assert_close(adapters(module)["experts.up"].delta_weight(), expected)


def test_the_submodule_that_peft_wrapped_is_found_or_given(tmp_path):
    theirs = written_by_peft(tmp_path)
    module = Lit("llama")
    names = load_peft(module, tmp_path)
    assert all(name.startswith("model.model.layers.") for name in names)
    assert distance(module.model, theirs) <= TOLERANCE
    given = Lit("llama")
    assert load_peft(given, tmp_path, root="model") == names
    both = nn.ModuleDict({"first": made("llama"), "second": made("llama")})
    with pytest.raises(LoRAError, match="in several places"):
        load_peft(both, tmp_path)
    load_peft(both, tmp_path, root="second")
    assert distance(both.second, theirs) <= TOLERANCE
    assert not adapters(both.first)


# ------------------------------------------------------------------------------------------------------- names, errors


class Names(nn.Module):
    """Names that end alike."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 6)
        self.block = nn.ModuleDict({"fc": nn.Linear(6, 6), "act": nn.Tanh()})
        self.head, self.old_head = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, input_ids):
        x = nn.functional.one_hot(input_ids % 6, 6).float()
        return self.head(self.old_head(self.fc(self.block["act"](self.block["fc"](x)))))


@pytest.mark.parametrize(
    "options", [{"target_modules": "fc", "modules_to_save": "head"}, {"target_modules": ["block"]}]
)
def test_names_that_end_alike_are_told_apart(options, tmp_path):
    MAKERS["Names"] = Names
    model, plain = made("Names"), made("Names")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inject(model, rank=2, **options)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    train(model)
    save_peft(model, tmp_path)
    theirs = in_peft(copy.deepcopy(plain), tmp_path)
    wraps = [name for name, child in theirs.base_model.model.named_modules() if hasattr(child, "lora_A")]
    assert wraps == list(adapters(model))
    assert distance(theirs, model) <= TOLERANCE
    load_peft(plain, tmp_path)
    assert distance(plain, model) <= TOLERANCE
    assert {name for name, p in plain.named_parameters() if p.requires_grad} == trained


def test_what_stands_outside_of_the_root_is_named(tmp_path):
    module = nn.ModuleDict({"model": made("llama"), "head": nn.Linear(64, 3)})
    inject(module, rank=2, modules_to_save=["head"], target_modules=["q_proj"])
    with pytest.warns(UserWarning, match=r"'head.weight', 'head.bias' are outside of 'model'"):
        save_peft(module, tmp_path, root="model")
    with pytest.raises(LoRAError, match="no adapters in 'head'"):
        save_peft(module, tmp_path, root="head")


def test_dora_of_weights_that_are_zero_has_the_gain_that_it_has_here(tmp_path):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(5, 4))
    nn.init.zeros_(plain[0].weight[1:3])
    model, x = copy.deepcopy(plain), torch.randn(3, 5)
    inject(model, rank=2, decomposition="dora")
    with pytest.raises(LoRAError, match="divides by"):
        save_peft(model, tmp_path)
    nn.init.normal_(adapters(model)["0"].B)
    save_peft(model, tmp_path)
    torch.testing.assert_close(in_peft(plain, tmp_path)(x), model(x))


class Linear2(nn.Linear):
    """A layer that scales its weight."""

    def forward(self, x):
        return nn.functional.linear(x, 2 * self.weight, self.bias)


def test_a_layer_with_a_forward_of_its_own_is_saved_as_a_parameter(tmp_path):
    torch.manual_seed(0)
    plain = nn.Sequential(Linear2(5, 4), nn.Linear(4, 4))
    model, x = copy.deepcopy(plain), torch.randn(3, 5)
    inject(model, rank=2)
    for adapter in adapters(model).values():
        nn.init.normal_(adapter.B)
    save_peft(model, tmp_path)
    torch.testing.assert_close(in_peft(copy.deepcopy(plain), tmp_path)(x), model(x))
    load_peft(plain, tmp_path)
    torch.testing.assert_close(plain(x), model(x))


INEXPRESSIBLE = {
    "resampled": (nn.Linear(4, 4), {"gradient": "merged", "resample_every_n_steps": 1}, "earlier draws"),
    "recurrent": (nn.LSTM(4, 4), {}, "an adapter of a LSTM"),
    "grouped": (nn.Conv1d(4, 4, 3, groups=2), {}, "Conv1d with groups"),
    "bilinear": (nn.Bilinear(4, 4, 4), {}, "an adapter of a Bilinear"),
    "transposed": (nn.ConvTranspose1d(4, 4, 3), {}, "an adapter of a ConvTranspose1d"),
    "experts by DoRA": (Experts(False), {"decomposition": "dora"}, "DoRA of a parameter"),
    "weight norm": (nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), {}, "an adapter of a ParametrizationList"),
}


@pytest.mark.parametrize("kind", INEXPRESSIBLE)
def test_what_peft_cannot_express_is_an_error_that_says_what_to_do(kind, tmp_path):
    layer, options, message = INEXPRESSIBLE[kind]
    module = nn.ModuleDict({"layer": copy.deepcopy(layer)})
    inject(module, rank=2, **options)
    with pytest.raises(LoRAError, match=f"{message}.*merged_state_dict"):
        save_peft(module, tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_has_no_adapters_is_named(tmp_path):
    with pytest.raises(LoRAError, match="After `fit` they are merged"):
        save_peft(nn.Linear(2, 2), tmp_path)
    with pytest.raises(LoRAError, match="is a folder, without"):
        save_peft(tmp_path, tmp_path)
    torch.save({"state_dict": {}}, tmp_path / "plain.ckpt")
    with pytest.raises(LoRAError, match="not written by a run with LoRA"):
        save_peft(tmp_path / "plain.ckpt", tmp_path)
    content = (tmp_path / "plain.ckpt").read_bytes()
    (tmp_path / "plain.ckpt").write_bytes(content[: len(content) // 2])
    with pytest.raises(LoRAError, match="truncated"):
        save_peft(tmp_path / "plain.ckpt", tmp_path)


class Runs:
    """What is called when it is unpickled."""

    def __reduce__(self):
        return (pytest.fail, ("the file was executed",))


def edit(folder, **entries):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


def rewrite(folder, change):
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


def pickled(folder, value):
    (folder / "adapter_model.safetensors").unlink()
    torch.save(value, folder / "adapter_model.bin")


A0, B0 = (f"base_model.model.model.layers.0.self_attn.q_proj.lora_{x}.weight" for x in "AB")
BAD = {
    "no configuration": (lambda f: (f / "adapter_config.json").unlink(), "has no adapter_config.json"),
    "no JSON": (lambda f: (f / "adapter_config.json").write_text("[" * 100_000), "cannot be read"),
    "a list": (lambda f: (f / "adapter_config.json").write_text("[]"), "is of no LoRA adapter"),
    "another method": (lambda f: edit(f, peft_type="IA3"), "is of no LoRA adapter"),
    "no number": (lambda f: edit(f, lora_alpha="8"), "`lora_alpha` is '8'"),
    "infinity": (lambda f: edit(f, lora_alpha=math.inf), "`lora_alpha` is inf"),
    "a pattern": (lambda f: edit(f, alpha_pattern={"(": 2}), "is no pattern"),
    "a pattern that is a list": (lambda f: edit(f, rank_pattern=[1]), "`rank_pattern` is no dictionary"),
    "names": (lambda f: edit(f, modules_to_save=[[]]), "`modules_to_save` is no list"),
    "a bias": (lambda f: edit(f, lora_bias=True), "`lora_bias=True`"),
    "tokens": (lambda f: edit(f, trainable_token_indices=[1]), "trainable_token_indices"),
    "another start": (lambda f: edit(f, init_lora_weights="olora"), "path_initial_model_for_weight_conversion"),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), "has neither"),
    "no safetensors": (lambda f: (f / "adapter_model.safetensors").write_bytes(b"\xff" * 64), "cannot be read"),
    "code": (lambda f: pickled(f, {A0: Runs()}), "can run any code"),
    "no dictionary": (lambda f: pickled(f, [torch.zeros(2)]), "no dictionary of weights"),
    "no tensor": (lambda f: pickled(f, {A0: 1}), "nor a state dict"),
    "integers": (lambda f: rewrite(f, lambda t: t.update({A0: t[A0].int()})), "not computed with"),
    "half": (lambda f: rewrite(f, lambda t: t.pop(A0)), "it has 'lora_B', and a Linear"),
    "nothing": (lambda f: rewrite(f, dict.clear), "holds no adapters"),
    "a shape": (lambda f: rewrite(f, lambda t: t.update({A0: t[A0][:, 1:].contiguous()})), "its factors are"),
    "a rank": (lambda f: rewrite(f, lambda t: t.update({A0: t[A0][1:].contiguous()})), "its factors are"),
    "no rank": (
        lambda f: rewrite(f, lambda t: t.update({A0: t[A0][:0], B0: t[B0][:, :0].contiguous()})),
        "its factors are",
    ),
    "dimensions": (lambda f: rewrite(f, lambda t: t.update({B0: t[B0][0]})), "its factors are"),
    "another module": (
        lambda f: rewrite(f, lambda t: t.update({f"x.lora_{x}.weight": t[A0] + 0 for x in "AB"})),
        "are not in the",
    ),
    "no layer": (
        lambda f: rewrite(f, lambda t: t.update({f"model.norm.lora_{x}.weight": t[A0] + 0 for x in "AB"})),
        "it is a LlamaRMSNorm",
    ),
    "something new": (
        lambda f: rewrite(f, lambda t: t.update({"model.norm.lora_C.weight": t[A0] + 0})),
        "no part of a product",
    ),
    "two adapters": (
        lambda f: rewrite(f, lambda t: t.update({A0.replace(".weight", ".b.weight"): t[A0] + 0})),
        "has several adapters",
    ),
    "a wrapper less": (
        lambda f: rewrite(f, lambda t: t.update({A0.replace(".lora", ".base_layer.base_layer.lora"): t[A0] + 0})),
        "one is missing",
    ),
    "another vocabulary": (
        lambda f: rewrite(f, lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(65, 32)})),
        "as many rows",
    ),
    "DoRA without magnitudes": (lambda f: edit(f, use_dora=True), "lora_magnitude_vector"),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    written_by_peft(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("kind", BAD)
def test_bad_files_are_errors_that_leave_the_module_as_it_was(kind, files, tmp_path):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    change, message = BAD[kind]
    change(tmp_path)
    model, plain = made("llama"), made("llama")
    with pytest.raises(LoRAError, match=re.escape(message)):
        load_peft(model, tmp_path)
    assert [type(child) for child in model.modules()] == [type(child) for child in plain.modules()]
    assert all(
        torch.equal(p, q) and p.requires_grad for p, q in zip(model.parameters(), plain.parameters(), strict=True)
    )


def test_an_adapter_of_one_place_of_a_tied_weight_is_refused(tmp_path):
    written_by_peft(tmp_path, target_modules=["embed_tokens"])
    with pytest.raises(LoRAError, match=r"is also 'lm_head\.weight'"):
        load_peft(made("tied_llama"), tmp_path)


def test_a_module_with_adapters_takes_no_others(tmp_path):
    written_by_peft(tmp_path)
    model = made("llama")
    load_peft(model, tmp_path)
    with pytest.raises(LoRAError, match="has adapters already"):
        load_peft(model, tmp_path)


def test_what_files_train_is_trained_here(tmp_path):
    """Modules to save and biases are; an embedding that PEFT adds to the file by itself is not."""
    theirs = written_by_peft(
        tmp_path, modules_to_save=["model.norm"], bias="lora_only", target_modules=["embed_tokens", "q_proj"]
    )
    assert "base_model.model.model.embed_tokens.base_layer.weight" in load_file(tmp_path / "adapter_model.safetensors")
    model = made("llama")
    names = load_peft(model, tmp_path)
    factors = {p for adapter in adapters(model).values() for p in adapter.parameters()}
    trained = {name for name, p in model.named_parameters() if p.requires_grad and p not in factors}
    assert trained == {"model.norm.weight", *(f"{name}.bias" for name in names if "proj" in name)}
    assert distance(theirs, model) <= TOLERANCE


@pytest.mark.parametrize(("name", "targets"), [("llama", "all-linear"), ("Mixed", ["mix", "attention"])])
def test_dropout_of_the_files_is_kept_where_increments_have_inputs(name, targets, tmp_path):
    written_by_peft(tmp_path, name, target_modules=targets, lora_dropout=0.25)
    model = made(name)
    if name == "llama":
        load_peft(model, tmp_path)
    else:
        with pytest.warns(UserWarning, match=r"`lora_dropout=0.25`"):
            load_peft(model, tmp_path)
    assert {adapter.dropout for adapter in adapters(model).values()} == {0.25 if name == "llama" else 0.0}
    model = made(name)
    with pytest.warns(UserWarning, match=r"`lora_dropout=0.25`"):
        load_peft(model, tmp_path, gradient="merged")
