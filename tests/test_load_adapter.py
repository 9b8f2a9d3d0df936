"""Adapters of files in a module outside of a Trainer: which weights they need, switching between them, their sums."""

import copy
import functools

import pytest
import torch
from models import Net, data, trainer
from torch import nn

import lightning_lora
from lightning_lora import LoRA, adapters, combine_adapters, disabled, inject, load_adapter, merge, set_adapter
from lightning_lora.errors import LoRAError

X = torch.randn(5, 8, generator=torch.Generator().manual_seed(3))
RUNS: dict[str, dict] = {
    "adapter": {"checkpoint": "adapter"},
    "merged": {},
    "second": {"checkpoint": "adapter", "seed": 1, "rank": 3, "alpha": 5},
    "head": {"checkpoint": "adapter", "modules_to_save": ["layers.5"], "bias": "all"},
    "additive": {"decomposition": "additive", "checkpoint": "adapter"},
    "symmetric": {"init": "symmetric", "checkpoint": "adapter"},
    "dora": {"decomposition": "dora", "checkpoint": "adapter"},
    "dora, merged": {"decomposition": "dora"},
    "merged mode": {"gradient": "merged"},
    "drawn": {"gradient": "merged", "resample_every_n_steps": 2},
}


class Quiet(Net):
    """Without the buffers of a BatchNorm."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.layers[1] = nn.Identity()


class Lookup(Net):
    """An embedding with padding, whose adapter must not move the padding."""

    def __init__(self) -> None:
        super().__init__(made_in="nowhere")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.table, self.head = nn.Embedding(8, 4, padding_idx=0), nn.Linear(4, 4)

    def forward(self, x):
        return self.head(self.table(x.argsort(-1))).mean(1)


class Encoder(Net):
    """A TransformerEncoder, whose fast path in an evaluation passes by modules."""

    def __init__(self) -> None:
        super().__init__(made_in="nowhere")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), 2)
            self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.encoder(x[:, None].expand(-1, 3, -1))).mean(1)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Returns the file of a run, what its module computes after ``fit``, and that module."""

    @functools.cache
    def run(name, kind=Net):
        folder = tmp_path_factory.mktemp("run")
        model = kind()
        options = {"rank": 2, **RUNS[name]}
        made = trainer(folder, LoRA(**options), max_steps=6)
        made.fit(model, data())
        made.save_checkpoint(folder / "saved.ckpt")
        return folder / "saved.ckpt", output(model), model

    return run


def output(model):
    with torch.no_grad():
        return model.eval()(X)


def bits(model):
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


def close(a, b, tolerance=2e-6):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def assert_same(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("name", [name for name in RUNS if name != "drawn"])
def test_a_file_gives_the_pretrained_module_what_was_trained_and_none_takes_it_away(name, run):
    file, expected, _ = run(name)
    model = Net()
    before, base = bits(model), output(model)
    assert (expected - base).abs().max() > 1e-2
    assert load_adapter(model, file) == ["layers.0", "layers.3", "layers.5"][: 2 if name == "head" else 3]
    close(output(model), expected, 1e-5 if name == "merged mode" else 2e-6)
    set_adapter(model, None)
    assert torch.equal(output(model), base)
    assert_same(bits(model), before)
    assert type(model.layers[0]) is nn.Linear
    set_adapter(model, "default")
    close(output(model), expected, 1e-5 if name == "merged mode" else 2e-6)


@pytest.mark.parametrize("kind", [Lookup, Encoder])
@pytest.mark.parametrize("name", ["adapter", "additive", "dora"])
def test_layers_of_other_kinds(kind, name, run):
    RUNS[f"{kind.__name__}, {name}"] = {**RUNS[name], "target_modules": ["table", "head"] if kind is Lookup else "all"}
    file, expected, _ = run(f"{kind.__name__}, {name}", kind)
    model = kind()
    base = output(model)
    load_adapter(model, file)
    close(output(model), expected)
    set_adapter(model, None)
    assert torch.equal(output(model), base)


def test_several_adapters_share_one_module(run):
    files = {name: run(name) for name in ("adapter", "head", "merged", "dora")}
    model = Net()
    base, before = output(model), bits(model)
    for name, (file, *_) in files.items():
        load_adapter(model, file, name)
    assert sum(p.numel() for p in model.parameters()) < 1.6 * sum(t.numel() for t in before.values())
    for name in ("dora", None, "head", "adapter", "head", "merged", None, "adapter"):
        set_adapter(model, name)
        close(output(model), base if name is None else files[name][1])
    set_adapter(model, None)
    assert_same(bits(model), before)


def test_a_module_with_the_files_own_merged_weights_gets_its_w0_back(run):
    file, expected, _ = run("merged")
    model = Net.load_from_checkpoint(file)
    with pytest.warns(UserWarning, match="W0 was recovered from them, with an error of at most"):
        load_adapter(model, file)
    close(output(model), expected)
    set_adapter(model, None)
    for key in ("layers.0.weight", "layers.3.weight", "layers.5.weight"):
        close(model.state_dict()[key], Net().state_dict()[key], 1e-6)
    other, other_expected, _ = run("dora, merged")  # stands on the same weights, up to rounding
    load_adapter(model, other, "dora")
    close(output(model), other_expected)
    with pytest.raises(LoRAError, match="are not what the adapter stands on"):  # which has fingerprints alone
        load_adapter(model, run("second")[0], "second")
    close(output(model), other_expected)


@pytest.mark.parametrize("name", ["adapter", "merged", "merged mode", "dora, merged"])
def test_other_pretrained_weights_are_refused_and_nothing_changes(name, run):
    model = Net(seed=1)
    before = bits(model)
    with pytest.raises(LoRAError, match=r"'layers.0.weight'.* are not what the adapter stands on"):
        load_adapter(model, run(name)[0])
    assert_same(bits(model), before)
    assert not adapters(model)


def test_a_failed_load_leaves_the_adapter_in_use(run):
    model, (file, *_) = Net(), run("head")
    load_adapter(model, file)
    model.layers[0]._parameters["weight"].data[0, 0] += 1
    changed = output(model)
    with pytest.raises(LoRAError, match=r"'layers.0.weight' of this module"):
        load_adapter(model, run("second")[0], "second")
    assert torch.equal(output(model), changed)


def test_a_dictionary_is_a_file_too_and_is_left_as_it_is(run):
    file, *_ = run("adapter")
    checkpoint = torch.load(file, weights_only=True)
    before = copy.deepcopy(checkpoint["lightning_lora"]["adapters"])
    model = Net()
    load_adapter(model, checkpoint)
    model.double()
    for adapter in adapters(model).values():
        adapter.A.data.zero_()
    for name, entry in before.items():
        assert torch.equal(checkpoint["lightning_lora"]["adapters"][name]["A"], entry["A"])


# ----------------------------------------------------------------------------------------------------------------- sums


def increments(model):
    return {name: adapter.delta_weight(torch.float64) for name, adapter in adapters(model).items()}


def test_a_combination_is_the_weighted_sum_by_stacked_ranks(run):
    model = Quiet()
    expected: dict = {}
    weights = {"adapter": 0.5, "second": -1.25, "symmetric": 2, "additive": 0.3}
    for name, weight in weights.items():
        load_adapter(model, run(name, Quiet)[0], name)
        for key, delta in increments(model).items():
            expected[key] = expected.get(key, 0) + weight * delta
    assert combine_adapters(model, weights, into="sum") == list(expected)
    for key, delta in increments(model).items():
        torch.testing.assert_close(delta, expected[key], rtol=1e-6, atol=1e-6)
        assert adapters(model)[key].rank == 2 + 3 + 4 + 4
    summed = output(model)
    merge(model)
    close(output(model), summed)


def test_one_and_minus_one_is_the_base_and_weight_one_is_the_adapter(run):
    model = Quiet()
    base = output(model)
    load_adapter(model, run("head", Quiet)[0], "head")
    head = output(model)
    combine_adapters(model, {"head": 1.0}, into="same")
    close(output(model), head)
    set_adapter(model, "head")
    load_adapter(model, run("adapter", Quiet)[0], "adapter")
    combine_adapters(model, {"same": -1, "head": 1}, into="none")
    close(output(model), base)
    combine_adapters(model, {"head": 0.5}, into="half")  # a head is summed by its difference
    W, W0 = run("head", Quiet)[2].layers[5].weight, Quiet().layers[5].weight
    close(model.layers[5].weight, (W + W0) / 2)


def test_what_is_no_increment_alone_has_no_sum(run):
    model = Net()
    for name in ("dora", "adapter"):
        load_adapter(model, run(name)[0], name)
    now = output(model)
    with pytest.raises(LoRAError, match=r"'dora' rescales 'layers.0.weight'.*Only products"):
        combine_adapters(model, {"dora": 1, "adapter": 1}, into="sum")
    with pytest.raises(LoRAError, match=r"other buffers than the module, 'layers.1.num_batches_tracked'"):
        combine_adapters(model, {"adapter": 1}, into="sum")
    for weights in ({}, {"adapter": float("nan")}, {"adapter": "1"}):
        with pytest.raises(LoRAError, match="a finite number"):
            combine_adapters(model, weights, into="sum")
    with pytest.raises(LoRAError, match="no adapter called 'other'; it has 'dora', 'adapter'"):
        combine_adapters(model, {"other": 1}, into="sum")
    with pytest.raises(LoRAError, match="`into` is a name that no adapter"):
        combine_adapters(model, {"adapter": 1}, into="dora")
    with pytest.raises(LoRAError, match="is a dictionary"):
        combine_adapters(model, ["adapter"], into="sum")
    assert torch.equal(output(model), now)


# ------------------------------------------------------------------------------------------------ the rest of the house


def test_merging_disabling_copies_and_casts_take_loaded_adapters_too(run):
    file, expected, trained = run("head")
    model = Net()
    load_adapter(model, file)
    twin = copy.deepcopy(model)
    set_adapter(twin, None)
    assert torch.equal(output(twin), output(Net()))
    close(output(model), expected)
    with disabled(model):
        assert not torch.allclose(output(model), expected, atol=1e-3)
    half = copy.deepcopy(model).double()
    assert {a.A.dtype for a in adapters(half).values()} == {torch.float32}
    set_adapter(half, None)
    set_adapter(half, "default")
    close(half.eval()(X.double()).float(), expected)
    merge(model)
    assert_same(bits(model), trained.state_dict())
    with pytest.raises(LoRAError, match="no adapter called 'default'; it has nothing"):
        set_adapter(model, "default")
    assert inject(model, rank=1)


def test_adapters_that_are_being_trained_are_left_alone(run):
    model = Net()
    inject(model, rank=2)
    for call in (lambda: load_adapter(model, run("adapter")[0]), lambda: set_adapter(model, None)):
        with pytest.raises(LoRAError, match="has adapters of its own"):
            call()
    assert len(adapters(model)) == 3


def test_a_run_takes_no_module_with_an_adapter_in_use_and_one_without(run, tmp_path):
    model = Net()
    load_adapter(model, run("adapter")[0])
    with pytest.raises(LoRAError, match="has adapters already"):
        trainer(tmp_path, LoRA(rank=2), max_steps=1).fit(model, data())
    set_adapter(model, None)
    trainer(tmp_path, LoRA(rank=2), max_steps=1).fit(model, data())
    with pytest.raises(LoRAError, match="it has nothing"):  # the weights are others now
        set_adapter(model, "default")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_module_takes_and_changes_adapters(run):
    file, expected, _ = run("adapter")
    model = Net()
    model.layers = torch.compile(model.layers, backend="eager")
    base = output(model)
    load_adapter(model, file)
    close(output(model), expected)
    set_adapter(model, None)
    close(output(model), base)


def test_names_are_texts_and_taken_once(run):
    model, file = Net(), run("adapter")[0]
    load_adapter(model, file)
    with pytest.raises(LoRAError, match="has an adapter called 'default'"):
        load_adapter(model, file)
    for name in (None, "", 3):
        with pytest.raises(LoRAError, match="is a text"):
            load_adapter(model, file, name)


@pytest.mark.filterwarnings("ignore:AdamW has `weight_decay:UserWarning")
def test_files_without_usable_adapters_say_why(run, tmp_path):
    file, *_ = run("adapter")
    model = Net()
    before = bits(model)
    trainer(tmp_path / "plain", max_steps=1).fit(other := Net(), data())
    plain = {"state_dict": other.state_dict()}
    (tmp_path / "cut").write_bytes(file.read_bytes()[:-300])
    (tmp_path / "text").write_text("no file of torch's")
    torch.save([1], tmp_path / "list")
    torch.save({"net": Net}, tmp_path / "objects")
    for given, message in (
        (plain, "has no adapters"),
        (tmp_path / "cut", "truncated"),
        (tmp_path / "text", "cannot be read"),
        (tmp_path / "list", "holds a list"),
        (tmp_path / "objects", "If you trust the file"),
        (run("drawn")[0], "drawn anew while training"),
        ({"state_dict": {}, "lightning_lora": {"version": 99}}, "Upgrade"),
    ):
        with pytest.raises(LoRAError, match=message):
            load_adapter(model, given)
    with pytest.raises(LoRAError, match=r"an adapter for 'layers.0', and Sequential has no such weight"):
        load_adapter(nn.Sequential(nn.Linear(2, 2)), file)
    with pytest.raises(FileNotFoundError):
        load_adapter(model, tmp_path / "nowhere")
    assert_same(bits(model), before)


def test_load_from_checkpoint_of_an_adapter_file_ends_with_what_to_do(run):
    file, *_ = run("adapter")
    with pytest.raises(RuntimeError) as error:
        Net.load_from_checkpoint(file)
    last = str(error.value).strip().splitlines()[-1]
    assert "the file holds LoRA adapters only, so build the module with its pretrained weights" in last
    assert "lightning_lora.load_adapter(module, file)" in last
    assert lightning_lora.load_adapter is load_adapter
