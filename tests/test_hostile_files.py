"""Checkpoints that are truncated, altered or made to do harm: refused or harmless; nothing is executed."""

import ast
import contextlib
import inspect
import pickle
import random
import re
import resource
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from lightning.pytorch import Trainer
from models import Net, data, digest, structure, trainer
from resume import SaveByHand
from torch import nn

import lightning_lora
from lightning_lora import LoRA, adapters, inject, merged_state_dict
from lightning_lora.checkpoint import read, write
from lightning_lora.checkpoint.fingerprints import Fingerprints
from lightning_lora.errors import LoRAError
from lightning_lora.injection.inject import injections

REFUSED = (ValueError, LoRAError)

# ------------------------------------------------------------------------------------------------ in the dictionary

KINDS = {
    "product": ({}, "merged"),
    "holds": ({"gradient": "merged"}, "merged"),
    "adapter": ({"modules_to_save": ["2"]}, "adapter"),
    "start": ({"init": "symmetric"}, "adapter"),
    "dora": ({"decomposition": "dora"}, "adapter"),
    "additive": ({"decomposition": "additive"}, "adapter"),
    "drawn": ({"gradient": "merged", "resample_every_n_steps": 2, "resample": "A"}, "merged"),
}


def pretrained():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 4), nn.Embedding(6, 4), nn.BatchNorm1d(4))


def adapted(options):
    module = pretrained()
    inject(module, rank=2, alpha=3, target_modules=["0", "1"], **options)
    return module


def saved(kind):
    """The two entries of a checkpoint of a module whose adapters are not zero."""
    options, form = KINDS[kind]
    module = adapted(options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for adapter in adapters(module).values():
            for p in adapter.trained.values():
                p.add_(torch.randn(p.shape, generator=generator))
            if adapter.resample:
                adapter.steps = 5
                adapter.drawn_at = 4
    run = write.describe(module, next(injections(module)).options, form, Fingerprints())
    state = merged_state_dict(module)
    write.make_plain(state, run, module)
    return {"state_dict": {key: value.clone() for key, value in state.items()}, "lightning_lora": run.to_mapping()}


FILES = {kind: saved(kind) for kind in KINDS}
MODULES = {
    (kind, plain): pretrained() if plain else adapted(options)
    for kind, (options, _) in KINDS.items()
    for plain in (False, True)
}


def counts(module):
    return [(adapter.steps, adapter.drawn_at) for adapter in adapters(module).values()]


def taken_in(kind, plain, file):
    """What ``module`` would load from ``file``; the module itself is put back as it was."""
    module = MODULES[kind, plain]
    before, steps = [value.clone() for value in module.state_dict().values()], counts(module)
    try:
        read.prepare_for_loading(file, module, exact=True)
        return dict(file["state_dict"])
    except BaseException:
        assert counts(module) == steps
        assert digest(list(module.state_dict().values())) == digest(before)
        raise
    finally:
        for adapter in adapters(module).values():
            adapter.steps = adapter.drawn_at = 0
        with torch.no_grad():
            for value, old in zip(module.state_dict().values(), before, strict=True):
                value.copy_(old)


def copied(value):
    """Containers anew, tensors shared."""
    if isinstance(value, dict):
        return {key: copied(item) for key, item in value.items()}
    return [copied(item) for item in value] if isinstance(value, list) else value


EXPECTED = {
    (kind, plain): digest(taken_in(kind, plain, copied(file)))
    for kind, file in FILES.items()
    for plain in (False, True)
}


def cyclic_list():
    value = []
    value.append(value)
    return value


def cyclic_dict():
    value = {}
    value["adapters"] = value["base"] = value["0"] = value
    return value


def deep_list():
    value = []
    for _ in range(100_000):
        value = [value]
    return value


def deep_tuple():
    value = ()
    for _ in range(100_000):
        value = (value,)
    return value


def strange_tensors():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they are deprecated, or not yet stable
        yield torch.ones(2, 4).to_sparse()
        yield torch.ones(2, 4).to_sparse_csr()
        yield torch.quantize_per_tensor(torch.ones(2, 4), 0.1, 0, torch.qint8)
        yield torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])


HUGE = 10**12
GARBAGE = [
    *(None, True, False, 0, 1, -1, 2, 3, 2**31, 2**63, HUGE, -HUGE, 10**5000),
    *(float("nan"), float("inf"), -float("inf"), -1.0, 0.0, 1e308, 1 + 2j),
    *("", "0", "1", "A", "B", "both", "merged", "adapter", "sharded", "dora", "additive", "product", "mine", "\ud800"),
    *("0.weight", "float32:", "qint8:4x4:0", "complex64:4x4:0", "float4_e2m1fn_x2:4x4:0", "bits8:4x4:0", "nn:0"),
    *("has_mps:0", "float32:4x4:int8:0", "qint8:4x4:int8:0", "torch.float32", "float32:4x4:" + "0" * 64),
    *(b"", b"A", (), (4, 4), [], [4], [4, 4], [4, 4, 4], [HUGE, HUGE], [4, HUGE], [0, 4], [-4, 4], [True, 4], [4.0, 4]),
    *([10**5000, 4], ["4", "4"], [None], {}, {"A": 1}, {1: 2}, {None: None}, OrderedDict(), OrderedDict(a=1), {1, 2}),
    *(cyclic_list(), cyclic_dict(), deep_list(), deep_tuple(), torch.float32, torch.qint8, torch.Size([4, 4])),
    *(torch.tensor(1.0), torch.ones(0), torch.ones(2), torch.ones(4), torch.ones(2, 0), torch.ones(0, 4)),
    *(torch.ones(2, 6), torch.ones(3, 4), torch.ones(4, 2), torch.ones(2, 2, 4), torch.ones(1, 2, 4, 1)),
    *(torch.ones(2, 4, dtype=dtype) for dtype in (torch.float64, torch.bfloat16, torch.float16, torch.int64)),
    *(torch.ones(2, 4, dtype=dtype) for dtype in (torch.bool, torch.complex64, torch.uint8)),
    *(torch.ones(2, 4).to(dtype) for dtype in (torch.float8_e4m3fn, torch.float8_e5m2)),
    *strange_tensors(),
    *(torch.empty(2, 4, device="meta"), torch.empty(HUGE, HUGE // 10**6, device="meta")),
    *(torch.ones(1).expand(HUGE, 4), torch.ones(1, 1).expand(2, HUGE), torch.ones(1).expand(HUGE)),
    *(torch.ones(1, 1).expand(HUGE, HUGE // 10**6), torch.ones(1).expand(2, 4), torch.ones(4, 4)[::2]),
    *(nn.Parameter(torch.ones(2, 4)), torch.ones(2, 4, requires_grad=True), torch.full((2, 4), torch.nan)),
]
CONTENT = {"A", "B", "A0", "B0", "magnitude", "held_gain", "scale"}
"""What another value can be put for, so that the file is a good one of another run."""


def places(value, path=()):
    """The path of every item in ``value``."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in list(items):
        yield (*path, key)
        yield from places(item, (*path, key))


PLACES = {kind: list(places(file)) for kind, file in FILES.items()}


def altered(kind, change, at, garbage):
    """A copy of the file with one item replaced, taken out, put in, or renamed; and the place."""
    file, path = copied(FILES[kind]), PLACES[kind][at % len(PLACES[kind])]
    holder = file
    for key in path[:-1]:
        holder = holder[key]
    last, value = path[-1], GARBAGE[garbage % len(GARBAGE)]
    if change == "replace":
        holder[last] = value
    elif change == "remove":
        del holder[last]
    elif isinstance(holder, list):
        holder.insert(last, value)
    else:
        try:
            hash(value)
        except (TypeError, RecursionError):
            value = f"{last}."
        holder[value] = holder.pop(last) if change == "rename" else holder[last]
    return file, path


@pytest.fixture
def little_memory():
    """An allocation of more than 4 GiB fails."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**32, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize("plain", [False, True], ids=["adapted", "plain"])
@pytest.mark.parametrize("kind", KINDS)
@settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(
    change=st.sampled_from(["replace", "replace", "replace", "remove", "insert", "rename"]),
    at=st.integers(0, 999),
    garbage=st.integers(0, len(GARBAGE) - 1),
)
@example(change="none", at=0, garbage=0)
def test_an_altered_entry_is_refused_or_harmless(kind, plain, change, at, garbage):
    file, path = altered(kind, change, at, garbage) if change != "none" else (copied(FILES[kind]), ())
    try:
        result = taken_in(kind, plain, file)
    except REFUSED as error:
        assert len(str(error)) > 20  # noqa: PT017
        assert "digit" not in str(error)  # Python's own, for a number that is too long to print  # noqa: PT017
        return
    absent = path == ("lightning_lora",) and file.get("lightning_lora") is None
    content = "state_dict" in path or CONTENT & set(path) or absent
    edited = (
        path[1:2] == ("adapters",)
        and (len(path) < 4 or path[-1] in ("decomposition", "transposed"))
        and change != "insert"
    )
    incomplete = len(path) == 3 and path[1] == "base" and change in ("remove", "rename")  # for torch to complain of
    assert content or incomplete or (plain and edited) or digest(result) == EXPECTED[kind, plain]


def doubled(file):
    file["lightning_lora"]["adapters"]["0.weight"] = file["lightning_lora"]["adapters"]["0"]


def of_rank(r):
    def change(file):
        entry = file["lightning_lora"]["adapters"]["0"]
        entry["A"], entry["B"] = torch.ones(1, 4).expand(r, 4), torch.ones(1, 4).expand(r, 4)

    return change


def of_shape(*shape):
    def change(file):
        entry = file["lightning_lora"]["adapters"]["0"]
        m, n = shape
        entry.update(shape=[m, n], A=torch.ones(1, 1).expand(2, n), B=torch.ones(1, 1).expand(2, m))

    return change


def drawn_and_frozen(file):
    key, print_ = next(iter(FILES["adapter"]["lightning_lora"]["base"].items()))
    file["lightning_lora"]["base"][key] = print_


ALTERED = {
    "two adapters for one weight": ("adapter", doubled, "a weight has two adapters"),
    "a rank above the sides": ("adapter", of_rank(5), "of '0' do not fit"),
    "an absurd rank": ("adapter", of_rank(HUGE), "of '0' do not fit"),
    "another shape": ("adapter", of_shape(4, 8), "'0'"),
    "an absurd shape": ("adapter", of_shape(HUGE, HUGE), "'0'"),
    "sharded in name": ("product", lambda file: file["lightning_lora"].update(form="sharded"), "merged"),
    "drawn and frozen": ("drawn", drawn_and_frozen, "'0' is drawn anew and its weight in `base`"),
    "no state": ("product", lambda file: file.pop("state_dict"), "`state_dict` is missing"),
    "a state that is a list": ("product", lambda file: file.update(state_dict=[1]), "`state_dict` is missing or no"),
    "a weight of another shape": (
        "product",
        lambda file: file["state_dict"].update({"0.weight": torch.ones(4, 5)}),
        "'0' in the checkpoint is not one for the weight '0.weight'",
    ),
}


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize("plain", [False, True], ids=["adapted", "plain"])
@pytest.mark.parametrize("name", ALTERED)
def test_an_entry_that_does_not_fit_is_refused_and_the_part_named(name, plain):
    kind, change, part = ALTERED[name]
    file = copied(FILES[kind])
    change(file)
    with pytest.raises(REFUSED, match=re.escape(part)):
        taken_in(kind, plain, file)


def test_a_file_of_adapters_that_start_elsewhere_is_refused(tmp_path):
    """A and B alone are not the increment of a run that takes A0 and B0 away."""
    run = trainer(tmp_path, LoRA(rank=2, init="symmetric"), SaveByHand(tmp_path / "saved.ckpt"))
    run.fit(TrainedOnly(), data())
    with pytest.raises(LoRAError, match=r"'layers\.0' has start A0 B0 in the checkpoint and zero in"):
        trainer(tmp_path, LoRA(rank=2), max_epochs=2).fit(TrainedOnly(), data(), ckpt_path=tmp_path / "saved.ckpt")


class TrainedOnly(Net):
    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad])


# --------------------------------------------------------------------------------------------------------- in the file


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A good checkpoint of either form, and what the module is after it was loaded into a plain one."""
    folder = tmp_path_factory.mktemp("good")
    for form in ("merged", "adapter"):
        run = trainer(folder, LoRA(rank=2, checkpoint=form), SaveByHand(folder / f"{form}.ckpt"))
        run.fit(Net(), data())
    return folder


def validated(model, file, folder):
    """A hash of ``model`` after it has been validated with ``file``; it is a plain module whatever happens."""
    before = structure(model)
    try:
        trainer(folder, LoRA(rank=2), limit_val_batches=1).validate(model, data(), ckpt_path=file, verbose=False)
    finally:
        assert structure(model) == before
    return digest(model.state_dict())


@pytest.mark.parametrize("form", ["merged", "adapter"])
def test_a_file_truncated_anywhere_is_refused_as_such(form, files, tmp_path):
    whole = (files / f"{form}.ckpt").read_bytes()
    with zipfile.ZipFile(files / f"{form}.ckpt") as archive:
        starts = [info.header_offset for info in archive.infolist()]
    ends = {start + beside for start in starts for beside in (-1, 0, 1, 40)} | set(range(len(whole) - 30, len(whole)))
    model, file = Net(), tmp_path / "part.ckpt"
    bits = digest(model.state_dict())
    for end in sorted(random.Random(0).sample(sorted(end for end in ends if 0 <= end < len(whole)), 60)):
        file.write_bytes(whole[:end])
        with pytest.raises(ValueError, match=r"part\.ckpt' is truncated"):
            validated(model, file, tmp_path)
        assert digest(model.state_dict()) == bits


@pytest.mark.parametrize("form", ["merged", "adapter"])
def test_a_file_with_a_flipped_bit_is_refused_as_damaged_or_read_as_torch_reads_it(form, files, tmp_path):
    whole, file = (files / f"{form}.ckpt").read_bytes(), tmp_path / "flipped.ckpt"
    expected, draws, refused = validated(Net(), files / f"{form}.ckpt", tmp_path), random.Random(0), 0
    pickled = whole.index(b"data.pkl")
    for _ in range(100):
        flipped = bytearray(whole)
        at = draws.choice(
            [draws.randrange(len(whole)), pickled + draws.randrange(4000), len(whole) - draws.randrange(1, 2000)]
        )
        flipped[at] ^= 1 << draws.randrange(8)
        file.write_bytes(flipped)
        try:
            result = validated(Net(), file, tmp_path)
        except (ValueError, RuntimeError) as error:  # the last is torch's own
            assert any(word in str(error) for word in ("damaged", "truncated", "corrupted", "zip archive"))  # noqa: PT017
            refused += 1
        else:
            assert result == expected or found_by_zip(file)
    assert refused > 20


def found_by_zip(file):
    """Whether ``python -m zipfile -t`` tells; torch does not look at the checksums of an archive."""
    try:
        with zipfile.ZipFile(file) as archive:
            return archive.testzip() is not None
    except Exception:  # its headers make no sense
        return True


# -------------------------------------------------------------------------------------------------- files that do harm


class Harm:
    """Creates a file where it is unpickled."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


HIDDEN = {
    "beside": lambda file, harm: file.update(harm=harm),
    "for the state": lambda file, harm: file.update(state_dict=harm),
    "for the entry": lambda file, harm: file.update(lightning_lora=harm),
    "in the options": lambda file, harm: file["lightning_lora"]["options"].update(rank=harm),
    "for A": lambda file, harm: file["lightning_lora"]["adapters"]["layers.0"].update(A=harm),
    "in the optimizer": lambda file, harm: file["optimizer_states"].append(harm),
}
WRITTEN = {
    "zip": torch.save,
    "legacy": lambda value, file: torch.save(value, file, _use_new_zipfile_serialization=False),
    "pickle": lambda value, file: file.write_bytes(pickle.dumps(value, protocol=2)),
}


@pytest.mark.skipif("weights_only" not in inspect.signature(Trainer.fit).parameters, reason="Lightning before 2.6")
@pytest.mark.parametrize("way", WRITTEN)
@pytest.mark.parametrize("place", HIDDEN)
def test_a_file_that_would_execute_something_is_refused_and_does_not(place, way, files, tmp_path):
    checkpoint, trace, file = (
        torch.load(files / "merged.ckpt", weights_only=True),
        tmp_path / "trace",
        tmp_path / "harm",
    )
    HIDDEN[place](checkpoint, Harm(trace))
    WRITTEN[way](checkpoint, file)
    model = Net()
    before, bits = structure(model), digest(model.state_dict())
    for function in ("fit", "validate", "test", "predict"):
        with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
            getattr(trainer(tmp_path, LoRA(rank=2)), function)(model, data(), ckpt_path=file)
        assert (structure(model), digest(model.state_dict())) == (before, bits)
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        Net.load_from_checkpoint(file)
    assert not trace.exists()
    with contextlib.suppress(RuntimeError):  # what was executed makes no checkpoint
        torch.load(file, weights_only=False)
    assert trace.exists()


def test_all_that_the_library_reads_itself_it_reads_with_weights_only():
    calls = [
        node
        for source in Path(lightning_lora.__file__).parent.rglob("*.py")
        for node in ast.walk(ast.parse(source.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("torch.load", "pickle.load", "pickle.loads"))
    ]
    assert calls
    assert all("weights_only=True" in ast.unparse(call) for call in calls)
