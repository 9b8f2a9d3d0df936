"""The command ``lightning-lora``: what it writes is what the run had, and bad files do no harm."""

import json
import os
import pickle
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import pytest
import torch
from models import Net, data, trainer
from safetensors.torch import load_file, save_file
from torch import nn

import lightning_lora
from lightning_lora import Adapter, LoRA, _compat, adapters, inject, merged_state_dict
from lightning_lora.checkpoint import read, write
from lightning_lora.checkpoint.fingerprints import Fingerprints
from lightning_lora.cli import main
from lightning_lora.injection.inject import injections


def trained(folder, **options):
    """The file that a run wrote, and the module after it."""
    net = Net()
    run = trainer(folder, LoRA(rank=2, **{"checkpoint": "adapter", **options}))
    run.fit(net, data())
    run.save_checkpoint(folder / "run.ckpt")
    return net


def written(module, folder, name="run.ckpt", form="adapter"):
    """The file of a run that has ``module``, with adapters that are not zero; returns what it has merged."""
    with torch.no_grad():
        for index, adapter in enumerate(adapters(module).values()):
            for p in adapter.trained.values():
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(index)))
    run = write.describe(module, next(injections(module)).options, form, Fingerprints())
    merged = {key: value.clone() for key, value in merged_state_dict(module).items()}
    state = dict(merged)
    write.make_plain(state, run, module)
    torch.save({"state_dict": state, "lightning_lora": run.to_mapping()}, folder / name)
    return merged


def same(one, other):
    assert one.keys() == other.keys()
    for key in one:
        assert one[key].dtype == other[key].dtype
        assert torch.equal(one[key], other[key]), key


def error(capsys):
    """What the command said of the error: one line, and no traceback."""
    line = capsys.readouterr().err
    assert line.startswith("lightning-lora: error: ")
    assert line.count("\n") == 1
    assert "Traceback" not in line
    return line


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


# --------------------------------------------------------------------------------------------------------------- merge


@pytest.mark.parametrize("form", ["adapter", "merged"])
def test_merging_gives_the_bits_that_the_run_had(folder, form):
    torch.save(Net().state_dict(), "base.pt")
    after = trained(folder, checkpoint=form, bias="lora_only")
    for out in ("out.pt", "out.safetensors", "out.ckpt"):
        assert main(["merge", "base.pt", "run.ckpt", out]) == 0
    same(torch.load("out.pt", weights_only=True), after.state_dict())
    same(load_file("out.safetensors"), after.state_dict())
    loaded = Net.load_from_checkpoint("out.ckpt")
    same(loaded.state_dict(), after.state_dict())
    assert loaded.hparams == after.hparams
    assert set(os.listdir()) == {"base.pt", "run.ckpt", "out.pt", "out.safetensors", "out.ckpt"}


@pytest.mark.parametrize(
    "options",
    [{"decomposition": "dora"}, {"decomposition": "additive"}, {"init": "pissa"}, {"use_rslora": True, "alpha": 3}],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_increment_is_merged_in_the_dtype_of_the_run(folder, options, dtype):
    def layers():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return nn.ModuleDict({"a": nn.Linear(8, 6), "e": nn.Embedding(10, 8), "c": nn.Conv2d(4, 6, 3)})

    save_file(layers().state_dict(), "base.safetensors")
    module = layers().to(dtype)
    inject(module, rank=2, target_modules=["a", "e", "c"], **options)
    merged = written(module, folder)
    assert main(["merge", "base.safetensors", "run.ckpt", "out.safetensors"]) == 0
    same(load_file("out.safetensors"), merged)


def test_a_stack_of_experts_is_merged(folder):
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(3, 6, 4, generator=torch.Generator().manual_seed(0)))

    torch.save(Experts().state_dict(), "base.pt")
    module = Experts()
    inject(module, rank=2, target_modules=None, target_parameters=["w"])
    merged = written(module, folder)
    assert main(["merge", "base.pt", "run.ckpt", "out.pt"]) == 0
    same(torch.load("out.pt", weights_only=True), merged)
    assert main(["inspect", "run.ckpt"]) == 0


def test_base_may_be_a_submodule_and_leave_tied_weights_out(folder):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.model, self.new = nn.Module(), nn.Linear(8, 3)
            self.model.embed, self.model.head = nn.Embedding(16, 8), nn.Linear(8, 16, bias=False)
            self.model.head.weight = self.model.embed.weight

    torch.manual_seed(0)
    module = Tied()
    save_file({"embed.weight": module.model.embed.weight.detach().clone()}, "base.safetensors")
    inject(module, rank=2, target_modules=["embed", "head"], modules_to_save=["new"])
    merged = written(module, folder)
    arguments = ["merge", "base.safetensors", "run.ckpt"]
    assert main([*arguments, "out.safetensors"]) == 2  # without --root nothing is called as in the run
    assert main([*arguments, "out.safetensors", "--root", "model"]) == 0
    same(load_file("out.safetensors"), {"embed.weight": merged["model.embed.weight"]})
    assert main([*arguments, "out.ckpt", "--root", "model"]) == 0
    same(torch.load("out.ckpt", weights_only=True)["state_dict"], merged)


def test_an_index_is_read_and_written_in_the_same_shards(folder):
    state = Net().state_dict()
    names = {key: f"model-0000{1 + index % 3}-of-00003.safetensors" for index, key in enumerate(state)}
    (folder / "base").mkdir()
    (folder / "out").mkdir()
    for name in set(names.values()):
        save_file({key: value for key, value in state.items() if names[key] == name}, f"base/{name}")
    (folder / "base/model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    after = trained(folder).state_dict()
    assert main(["merge", "base", "run.ckpt", "out/model.safetensors.index.json"]) == 0
    assert json.loads(Path("out/model.safetensors.index.json").read_text())["weight_map"] == names
    assert sorted(os.listdir("out")) == sorted({*names.values(), "model.safetensors.index.json"})
    shards = [load_file(f"out/{name}") for name in set(names.values())]
    same({key: shard[key] for key in after for shard in shards if key in shard}, dict(after))
    torch.save(after, "after.pt")
    assert main(["diff", "out", "after.pt"]) == 0


def test_another_base_is_refused_and_the_old_file_stays(folder, capsys):
    net = trained(folder)
    other = Net().state_dict()
    other["layers.5.weight"] = other["layers.5.weight"] + 1  # the last but one
    torch.save(other, "base.pt")
    for name in ("old.safetensors", "old.ckpt"):
        Path(name).write_text("old")
        assert main(["merge", "base.pt", "run.ckpt", name]) == 2
        assert "'layers.5.weight' in base.pt is not the weight" in error(capsys)
        assert Path(name).read_text() == "old"
    assert sorted(os.listdir()) == ["base.pt", "old.ckpt", "old.safetensors", "run.ckpt"]
    assert main(["merge", "base.pt", "run.ckpt", "new.pt", "--force"]) == 0
    forced = torch.load("new.pt", weights_only=True)
    torch.testing.assert_close(forced["layers.5.weight"], net.state_dict()["layers.5.weight"] + 1)


@pytest.mark.parametrize("out", ["old.safetensors", "old.ckpt"])
def test_an_interrupt_leaves_the_old_file(folder, capsys, monkeypatch, out):
    torch.save(Net().state_dict(), "base.pt")
    trained(folder)
    Path(out).write_text("old")
    calls = []

    def interrupted(adapter, weight):
        calls.append(weight)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return weight

    monkeypatch.setattr(Adapter, "folded_into", interrupted)
    assert main(["merge", "base.pt", "run.ckpt", out]) == 130
    assert "interrupted" in error(capsys)
    assert Path(out).read_text() == "old"
    assert sorted(os.listdir()) == sorted(["base.pt", out, "run.ckpt"])


def test_what_is_made_in_its_turn_is_a_whole_file_of_torch(folder, monkeypatch):
    torch.save(Net().state_dict(), "base.pt")
    after = trained(folder).state_dict()
    assert main(["merge", "base.pt", "run.ckpt", "lazy.pt"]) == 0
    with zipfile.ZipFile("lazy.pt") as archive:
        assert archive.testzip() is None
    # what it calls is private: a torch without it writes the same
    old = types.SimpleNamespace(serialization=types.SimpleNamespace(), save=torch.save, uint8=torch.uint8)
    monkeypatch.setattr(_compat, "torch", old)
    assert main(["merge", "base.pt", "run.ckpt", "whole.pt"]) == 0
    same(torch.load("whole.pt", weights_only=True), after)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, and gives memory back by Linux's calls")
def test_only_one_weight_is_in_memory(folder):
    width, count = 1024, 24  # of 4 MB each
    module = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(count)))
    for layer in module:
        nn.init.ones_(layer.weight)
    torch.save(module.state_dict(), "base.pt")
    inject(module, rank=1, target_modules="all-linear")
    written(module, folder)
    program = """
from lightning_lora.cli import commands, main
def held():
    return int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmRSS"))) / 1000
made = commands.Planned.made
def watched(planned):
    peak.append(held())
    return made(planned)
commands.Planned.made = watched
for out in ("warm.ckpt", "out.safetensors", "out.ckpt"):
    peak = []
    assert main(["merge", "base.pt", "run.ckpt", out]) == 0
    print("more:", max(peak) - peak[0])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    more = [float(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("more:")]
    assert len(more) == 3
    assert max(more) < 30  # of the 100 MB that a file has


# ------------------------------------------------------------------------------------------------------------- extract


def test_extracting_and_merging_misses_what_the_singular_values_say(folder, capsys):
    generator = torch.Generator().manual_seed(0)
    before = {
        "a.weight": torch.randn(24, 16, generator=generator),
        "c.weight": torch.randn(12, 4, 3, generator=generator),
    }
    before |= {"a.bias": torch.randn(24, generator=generator), "same.weight": torch.randn(5, 4, generator=generator)}
    before = {key: value.double() for key, value in before.items()}
    after = {key: value + torch.randn(value.shape, generator=generator) for key, value in before.items()}
    after["same.weight"] = before["same.weight"]
    after["head.weight"] = torch.randn(2, 16, generator=generator)
    torch.save(before, "before.pt")
    torch.save(after, "after.pt")
    assert main(["extract", "after.pt", "before.pt", "adapter.ckpt", "--rank", "3"]) == 0
    printed = {line.split()[0]: line.split()[-3:] for line in capsys.readouterr().out.splitlines()}
    assert main(["merge", "before.pt", "adapter.ckpt", "merged.pt"]) == 0
    merged = torch.load("merged.pt", weights_only=True)
    for key in ("a.weight", "c.weight"):
        values = torch.linalg.svdvals((after[key] - before[key]).flatten(1))
        missed = (merged[key] - after[key]).norm()
        torch.testing.assert_close(missed, values[3:].norm())
        expected = [values[rank:].norm() / values.norm() for rank in (1, 2, 3)]
        assert printed[key] == [f"{value:.2e}" for value in expected]
    for key in ("a.bias", "same.weight", "head.weight"):
        assert torch.equal(merged[key], after[key])


def test_large_weights_are_as_good_as_exact(folder, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(96, 80, generator=generator)
    change = torch.randn(96, 4, generator=generator) @ torch.randn(4, 80, generator=generator) + 0.1 * noise
    before = torch.randn(96, 80, generator=generator)
    torch.save({"weight": before}, "before.pt")
    torch.save({"weight": before + change}, "after.pt")
    monkeypatch.setattr("lightning_lora.cli.commands.EXACT", 10)
    assert main(["extract", "after.pt", "before.pt", "adapter.ckpt", "--rank", "6"]) == 0
    assert main(["merge", "before.pt", "adapter.ckpt", "merged.pt"]) == 0
    missed = (torch.load("merged.pt", weights_only=True)["weight"] - before - change).norm()
    best = torch.linalg.svdvals(change)[6:].norm()
    assert best * 0.999 < missed < best * 1.01


def test_a_run_goes_on_from_an_extracted_file(folder):
    torch.save(Net().state_dict(), "before.pt")
    after = trained(folder).state_dict()
    torch.save(after, "after.pt")
    assert main(["extract", "after.pt", "before.pt", "adapter.ckpt", "--rank", "2"]) == 0
    checkpoint = torch.load("adapter.ckpt", weights_only=True)
    payload = checkpoint["lightning_lora"]
    net = Net()
    inject(net, rank=2, alpha=2, target_modules=payload["options"]["target_modules"])
    run = read.prepare_for_loading(checkpoint, net, exact=True)
    net.load_state_dict(checkpoint["state_dict"], strict=False)
    read.restore_adapters(net, run.adapters)
    for key, value in merged_state_dict(net).items():
        torch.testing.assert_close(value, after[key])


# ------------------------------------------------------------------------------------------------ inspect, diff, export


def test_inspect_says_what_was_learned(folder, capsys):
    module = nn.ModuleDict({"layer": nn.Linear(12, 10)})
    inject(module, rank=4, target_modules=["layer"], alpha=8)
    written(module, folder)
    ((name, adapter),) = adapters(module).items()
    assert main(["inspect", "run.ckpt", "--weights"]) == 0
    printed = capsys.readouterr().out
    row = next(line for line in printed.splitlines() if line.startswith(f"{name} ") and " x " in line)
    values = torch.linalg.svdvals(adapter.delta_weight(torch.float64))
    shares = values[:4] / values.sum()
    run = write.describe(module, next(injections(module)).options, "adapter", Fingerprints())
    fingerprint = run.base["layer.weight"]
    assert f"{values.norm():.4g}" in row
    assert f"{torch.exp(-(shares * shares.log()).sum()):.2f}" in row
    assert fingerprint.split(":")[2][:12] in row
    assert "form 'adapter'" in printed
    assert "alpha=8" in printed


def test_diff_names_what_differs(folder, capsys):
    one = {"a": torch.ones(3, 2), "b": torch.tensor([1.0, torch.nan]), "c": torch.zeros(2), "d": torch.arange(3)}
    torch.save(one, "one.pt")
    save_file(one, "same.safetensors")
    assert main(["diff", "one.pt", "same.safetensors"]) == 0
    torch.save({**one, "a": torch.ones(3, 2) + 1e-3, "c": torch.zeros(3), "e": torch.ones(1)}, "other.pt")
    capsys.readouterr()
    assert main(["diff", "one.pt", "other.pt"]) == 1
    rows = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines()}
    assert rows.keys() == {"weight", "a", "c", "e", "3"}
    assert float(rows["a"][-1]) == pytest.approx(1e-3, rel=1e-2)
    assert main(["diff", "one.pt", "one.pt", "--tolerance", "0.1"]) == 0


def test_export_writes_the_files_of_peft(folder):
    trained(folder)
    assert main(["export-peft", "run.ckpt", "out", "--root", "layers"]) == 0
    tensors = load_file("out/adapter_model.safetensors")
    entries = torch.load("run.ckpt", weights_only=True)["lightning_lora"]["adapters"]
    assert entries
    for name, entry in entries.items():
        prefix = f"base_model.model.{name.removeprefix('layers.')}"
        assert torch.equal(tensors[f"{prefix}.lora_A.weight"], entry["A"])
        assert torch.equal(tensors[f"{prefix}.lora_B.weight"], entry["B"].T)


# ----------------------------------------------------------------------------------------------------------- bad files


class Payload:
    """Pickled, it makes a file when it is loaded."""

    def __reduce__(self):
        return open, ("harmed", "w")


def bad(name):
    """The path of a file that is no good."""
    path = Path(name)
    state = {"weight": torch.randn(64, 64)}
    if name == "pickle.ckpt":
        torch.save({"state_dict": state, "more": Payload()}, path)
    elif name == "raw.pkl":
        path.write_bytes(pickle.dumps(Payload()))
    elif name == "objects.ckpt":
        torch.save({"state_dict": state, "hyper_parameters": {"path": Path("x")}}, path)
    elif name.startswith("truncated"):
        torch.save(state, path) if path.suffix == ".pt" else save_file(state, path)
        path.write_bytes(path.read_bytes()[:9000])
    elif name == "claims.pt":
        torch.save({"weight": torch.zeros(1).expand(2**40)}, path)
    elif name == "compressed.pt":
        torch.save(state, "plain.pt")
        with zipfile.ZipFile("plain.pt") as plain, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for part in plain.namelist():
                archive.writestr(part, plain.read(part))
    elif name == "outside.index.json":
        path.write_text(json.dumps({"weight_map": {"weight": "../../etc/passwd"}}))
    elif name == "list.index.json":
        path.write_text(json.dumps({"weight_map": ["weight"]}))
    elif name == "broken.index.json":
        path.write_text('{"weight_map": {')
    elif name == "deep.index.json":
        path.write_text("[" * 100_000)
    elif name == "header.safetensors":
        path.write_bytes((2**62).to_bytes(8, "little") + b"{}")
    elif name == "malformed.ckpt":
        torch.save({"state_dict": state, "lightning_lora": {"version": 2, "form": "adapter"}}, path)
    elif name == "escape.ckpt":
        payload = {"version": 2, "form": "adapter", "adapters": {"\x1b[31m\nred": {}}, "trained": [], "base": {}}
        torch.save({"state_dict": state, "lightning_lora": payload}, path)
    elif name == "folder":
        path.mkdir()
    elif name == "empty.pt":
        path.touch()
    elif name == "tensor.pt":
        torch.save(torch.ones(2), path)
    return str(path)


BAD = [
    *("pickle.ckpt", "raw.pkl", "objects.ckpt", "malformed.ckpt", "escape.ckpt"),
    *("truncated.pt", "claims.pt", "compressed.pt", "empty.pt", "tensor.pt", "absent.pt", "folder"),
    *("truncated.safetensors", "header.safetensors"),
    *("outside.index.json", "list.index.json", "broken.index.json", "deep.index.json"),
]


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_one_line_and_does_no_harm(folder, capsys, name):
    path = bad(name)
    assert main(["inspect", path]) == 2
    line = error(capsys)
    assert "\x1b" not in line
    assert Path(name).stem.split(".")[0] in line or "lightning_lora" in line
    torch.save({"weight": torch.ones(2, 2)}, "good.pt")
    for arguments in (["merge", "good.pt", path, "out.pt"], ["extract", "good.pt", path, "out.pt"]):
        if name not in ("malformed.ckpt", "escape.ckpt") or arguments[0] == "merge":
            assert main(arguments) == 2
            error(capsys)
    assert not Path("harmed").exists()
    assert not Path("out.pt").exists()


def test_names_cannot_write_to_the_terminal(folder, capsys):
    torch.save({"\x1b[31m[bold]a\nb": torch.ones(2)}, "names.pt")
    assert main(["inspect", "names.pt", "--weights"]) == 0
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    assert r"\x1b[31m[bold]a\nb" in printed


@pytest.mark.parametrize(
    "arguments",
    [
        ["merge", "good.pt", "good.pt", "out.pt"],
        ["extract", "good.pt", "good.pt", "out.ckpt", "--rank", "0"],
        ["extract", "good.pt", "good.pt", "out.safetensors"],
        ["extract", "good.pt", "other.pt", "out.ckpt"],
        ["extract", "good.pt", "good.pt", "nowhere/out.ckpt"],
    ],
)
def test_wrong_arguments_are_one_line(folder, capsys, arguments):
    torch.save({"weight": torch.ones(2, 2)}, "good.pt")
    torch.save({"model.weight": torch.ones(2, 2)}, "other.pt")
    assert main(arguments) == 2
    error(capsys)
    assert sorted(os.listdir()) == ["good.pt", "other.pt"]


# ------------------------------------------------------------------------------------------------- in its own process


def environment():
    return {**os.environ, "PYTHONPATH": str(Path(lightning_lora.__file__).parents[1])}


def test_the_command_in_its_own_process(folder):
    def run(*arguments):
        command = [sys.executable, "-m", "lightning_lora", *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)

    torch.save({"weight": torch.ones(2, 2)}, "one.pt")
    torch.save({"weight": torch.zeros(2, 2)}, "other.pt")
    assert run("diff", "one.pt", "other.pt").returncode == 1
    usage = run("diff", "one.pt")
    assert usage.returncode == 2
    assert "Traceback" not in usage.stderr


@pytest.mark.parametrize("command", [[], ["merge"], ["extract"], ["inspect"], ["export-peft"], ["diff"]])
def test_help_has_an_example(capsys, command):
    with pytest.raises(SystemExit) as exit:
        main([*command, "--help"])
    assert exit.value.code == 0
    printed = capsys.readouterr().out
    assert f"lightning-lora {(command or ['merge'])[0]} " in printed
    assert "xample" in printed


def test_the_version_is_the_package_s(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["--version"])
    assert exit.value.code == 0
    assert lightning_lora.__version__ in capsys.readouterr().out


def test_without_the_extra_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "lightning_lora.cli.commands", raising=False)
    monkeypatch.delattr(lightning_lora.cli, "commands", raising=False)
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert main(["inspect", "x"]) == 2
    assert 'pip install "lightning-lora[cli]"' in error(capsys)
