"""FSDP2 by Lightning's ModelParallelStrategy, in two real processes on the CPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from model_parallel import RUNS, Net, train
from models import digest
from test_checkpoint import printed_by_a_new_process
from torch import nn

from lightning_lora.callback import _refuse_unsupported
from lightning_lora.checkpoint import as_merged
from lightning_lora.hosts import Host, swap, unswap

HERE = Path(__file__).parent
ADAPTED = ["conv", "embed", "linear"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What two processes have written; all cases in one launch."""
    folder = tmp_path_factory.mktemp("processes")
    printed_by_a_new_process("-W", "ignore", str(HERE / "model_parallel.py"), str(folder))
    return folder


@pytest.fixture(scope="module")
def processes(folder):
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


@pytest.fixture(scope="module", params=RUNS)
def run(request, processes, tmp_path_factory):
    """The name of a run, what two processes saw of it, and what one process makes of the same batches."""
    watch, model, trainer = train(tmp_path_factory.mktemp("one"), request.param, devices=1)
    return request.param, [process[request.param] for process in processes], watch, model, trainer


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)


def test_two_processes_that_share_the_parameters_have_the_losses_of_one(run):
    _, seen, watch, *_ = run
    means = torch.tensor([process["losses"] for process in seen], dtype=torch.float64).mean(0)
    close(means, torch.tensor(watch.losses, dtype=torch.float64))
    assert len(set(watch.losses)) == len(watch.losses) == 6
    assert seen[0]["val_loss"] == seen[1]["val_loss"]


def test_only_what_is_trained_has_gradients_and_optimizer_state(run, processes):
    name, seen, watch, *_ = run
    for process in seen:
        assert process["with_gradients"] == process["trained"] == watch.trained
    assert all(process[f"resumed-{name}-full"]["with_state"] == watch.trained for process in processes)
    assert all(".lora." in name or name.startswith("head.") for name in watch.trained)


def test_the_frozen_weights_keep_every_bit(run):
    _, seen, *_ = run
    fresh = {name: digest(Net().get_submodule(name).weight.detach()) for name in ADAPTED}
    assert seen[0]["W0"] == seen[1]["W0"] == {name: fresh[name] for name in seen[0]["W0"]}


@pytest.mark.parametrize("suffix", ["", "-weights"])
def test_the_file_is_that_of_the_plain_model_and_equals_the_one_process_file(suffix, run, folder, tmp_path):
    name, _, _, model, _ = run
    state = torch.load(folder / f"{name}{suffix}.ckpt", weights_only=True)["state_dict"]
    assert list(state) == list(Net().state_dict())
    Net().load_state_dict(state)
    for key, weight in model.state_dict().items():
        close(state[key], weight)


OUTSIDER = """
import sys
sys.modules["lightning_lora"] = None
import torch
from torch import nn
state = torch.load(sys.argv[1], weights_only=True)["state_dict"]
layers = {"embed": nn.Embedding(11, 7), "conv": nn.Conv1d(7, 9, 3), "norm": nn.GroupNorm(3, 9)}
print(nn.ModuleDict({**layers, "linear": nn.Linear(9, 5), "head": nn.Linear(5, 3)}).load_state_dict(state))
"""


def test_a_process_without_the_library_loads_the_file_strictly(folder):
    assert printed_by_a_new_process("-c", OUTSIDER, str(folder / "dora.ckpt")) == ["<All keys matched successfully>"]


def test_merge_makes_the_sharded_module_plain_with_the_weights_of_the_file(run, folder):
    name, seen, *_ = run
    state = torch.load(folder / f"{name}.ckpt", weights_only=True)["state_dict"]
    for process in seen:
        assert {key: torch.tensor(value).tolist() for key, value in process["merged"].items()} == {
            key: value.tolist() for key, value in state.items()
        }
        assert process["hosts"] == []
        assert process["kinds"] == [True] * 4
        assert {process["classes"][name] for name in ("", "conv", "linear")} == {"FSDPNet", "FSDPConv1d", "FSDPLinear"}
        assert process["classes"]["embed"] == "Embedding"


def test_the_module_stays_adapted_after_fit_until_merge(processes):
    assert processes[0]["adapted after fit"] == ADAPTED


@pytest.mark.parametrize("kind", ["full", "sharded"])
@pytest.mark.parametrize("name", RUNS)
def test_a_run_that_resumes_has_the_bits_of_the_uninterrupted_one(name, kind, processes):
    for process in processes:
        seen = process[f"resumed-{name}-{kind}"]
        assert seen["bits"][0] == seen["bits"][1]
        assert seen["losses"][0] == seen["losses"][1]
        assert seen["warned"] == []


def test_on_other_weights_w0_is_recovered_with_a_warning_or_refused(processes):
    expected = processes[0]["resumed-zero-full"]["losses"][0]
    close(torch.tensor(processes[0]["other weights"]["losses"]), torch.tensor(expected))
    assert len(processes[0]["other weights"]["warned"]) == 1
    assert "exact_resume=True" in processes[0]["refused"]["exact"]


@pytest.mark.parametrize("name", ["pissa", "dora"])
def test_a_sharded_file_is_consolidated_and_then_merged(name, folder, tmp_path):
    sharded, consolidated = folder / f"{name}-sharded-epoch=0.ckpt", tmp_path / "consolidated.ckpt"
    tool = [sys.executable, "-m", "lightning.fabric.utilities.consolidate_checkpoint", str(sharded)]
    subprocess.run([*tool, "--output_file", str(consolidated)], check=True, timeout=120)
    checkpoint = torch.load(consolidated, weights_only=True)
    assert "linear.lora.A" in checkpoint["state_dict"]
    merged = as_merged(checkpoint)
    whole = torch.load(folder / f"{name}-full-epoch=0.ckpt", weights_only=True)
    assert sorted(merged["state_dict"]) == sorted(whole["state_dict"])
    assert digest(dict(sorted(merged["state_dict"].items()))) == digest(dict(sorted(whole["state_dict"].items())))
    assert merged["lightning_lora"]["base"] == whole["lightning_lora"]["base"]
    with pytest.raises(ValueError, match="not sharded"):
        as_merged(merged)


@pytest.mark.parametrize(
    ("case", "says"),
    {
        "not injected": "before `fully_shard`",
        "sharded first": "is sharded already",
        "forgotten": "is not sharded, so each process would train one of its own",
        "other options": "Give both the same",
        "merged": "use `gradient='factored'`",
        "gradient": "Use another `init`",
        "adapter": "Use `checkpoint='merged'`",
        "parameters": "'head' would hold its increment",
    }.items(),
)
def test_what_cannot_be_sharded_is_refused_by_name(case, says, processes):
    for process in processes:
        assert process["refused"][case].startswith("MisconfigurationException")
        assert says in process["refused"][case]


@pytest.mark.parametrize("strategy", [FSDPStrategy, DeepSpeedStrategy])
def test_strategies_that_own_the_parameters_are_refused_with_what_to_use(strategy):
    class Run:
        pass

    run = Run()
    run.strategy = object.__new__(strategy)  # these need an accelerator
    with pytest.raises(Exception, match=rf"does not support {strategy.__name__}.*`ModelParallelStrategy`"):
        _refuse_unsupported(run)


def test_a_class_made_of_a_swapped_class_loses_the_mixin_alone():
    class Mixin(Host):
        pass

    layer = nn.Linear(2, 2)
    layer.lora = nn.Module()
    swap(layer, Mixin)
    layer.__class__ = type("OnTop", (type(layer),), {"extra": 1})
    unswap(layer)
    assert type(layer).__mro__[1:] == nn.Linear.__mro__
    assert (type(layer).__name__, layer.extra, hasattr(layer, "lora")) == ("OnTop", 1, False)
