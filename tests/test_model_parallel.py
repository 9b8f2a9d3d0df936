"""FSDP2 by Lightning's ModelParallelStrategy, in two real processes on the CPU."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.fabric.utilities.load import _load_distributed_checkpoint
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from lightning_utilities.core.imports import RequirementCache
from model_parallel import ELSEWHERE, FREE, PEFT, ROUNDED, RUNS, Net, Watch, fit, net, train
from models import digest
from safetensors.torch import load_file
from test_checkpoint import printed_by_a_new_process
from torch import nn

from lightning_lora import save_peft
from lightning_lora.adapters import Adapter
from lightning_lora.hosts import adopt, release
from lightning_lora.trainer.support import refuse_unsupported

pytestmark = pytest.mark.skipif(not RequirementCache("torch>=2.7"), reason="torch 2.6 has no FSDP2 on the CPU")

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


def close(actual, expected, name=""):
    rtol, atol = (2e-2, 3e-2) if name in ROUNDED else (0, 1e-6)
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


def test_two_processes_that_share_the_parameters_have_the_losses_of_one(run):
    name, seen, watch, *_ = run
    means = torch.tensor([process["losses"] for process in seen], dtype=torch.float64).mean(0)
    close(means, torch.tensor(watch.losses, dtype=torch.float64), name)
    assert len(set(watch.losses)) == len(watch.losses) == 6
    assert seen[0]["val_loss"] == seen[1]["val_loss"]


def test_only_what_is_trained_has_gradients_and_optimizer_state(run, processes):
    name, seen, watch, *_ = run
    for process in seen:
        assert process["with_gradients"] == sorted(process["trained"])
        assert process["trained"] == watch.trained
    assert all(process[f"resumed-{name}-whole"]["with_state"] == sorted(watch.trained) for process in processes)
    assert all(".lora." in key or key.startswith(("lora.", "head.")) for key in watch.trained)


def padded(shapes):
    """Elements of parameters of these shapes, as two processes divide them by rows."""
    return sum((shape[0] + 1) // 2 * 2 * math.prod(shape[1:]) for shape in shapes)


def test_only_the_gradients_of_what_is_trained_are_reduced(run):
    _, seen, watch, *_ = run
    assert [process["reduced"] for process in seen] == [padded(watch.trained.values())] * 2


def test_a_step_gathers_the_factors_and_no_weight(processes):
    for process in processes:
        assert process["zero"]["gathered"] == 0
        for name in ("merged", "projected"):
            trained = process[name]["trained"]
            factors = [shape for key, shape in trained.items() if not key.startswith("head.")]
            assert process[name]["gathered"] == 2 * padded(factors) / 2  # before the step and after it


@pytest.mark.parametrize("name", FREE)
def test_the_frozen_weights_keep_every_bit(name, processes):
    fresh = {layer: digest(Net().get_submodule(layer).weight.detach()) for layer in ADAPTED}
    for process in processes:
        assert process[name]["W0"] == fresh


@pytest.mark.parametrize("suffix", ["", "-weights"])
def test_the_file_is_that_of_the_plain_model_and_equals_the_one_process_file(suffix, run, folder):
    name, _, _, model, _ = run
    state = torch.load(folder / f"{name}{suffix}.ckpt", weights_only=True)["state_dict"]
    assert list(state) == list(Net().state_dict())
    Net().load_state_dict(state)
    for key, weight in model.state_dict().items():
        assert state[key].dtype == weight.dtype
        close(state[key], weight, name)


OUTSIDER = """
import sys
sys.modules["lightning_lora"] = None
import torch
from torch import nn
state = torch.load(sys.argv[1], weights_only=True)["state_dict"]
layers = {"embed": nn.Embedding(11, 7), "conv": nn.Conv1d(7, 9, 3), "norm": nn.GroupNorm(3, 9)}
layers |= {"attention": nn.MultiheadAttention(9, 3), "rnn": nn.LSTM(9, 9)}
layers |= {"linear": nn.Linear(9, 5), "head": nn.Linear(5, 3)}
plain = nn.ModuleDict(layers)
plain.register_parameter("experts", nn.Parameter(torch.empty(3, 5, 9)))
print(plain.load_state_dict(state))
"""


def test_a_process_without_the_library_loads_the_file_strictly(folder):
    assert printed_by_a_new_process("-c", OUTSIDER, str(folder / "dora.ckpt")) == ["<All keys matched successfully>"]


@pytest.mark.parametrize("name", PEFT)
def test_the_files_for_peft_of_a_sharded_module_are_those_of_its_checkpoint(name, folder, tmp_path):
    """They are written after an evaluation, which leaves the root's parameters gathered, in the policy's dtype."""
    save_peft(folder / f"{name}.ckpt", tmp_path)
    sharded = folder / f"peft {name}"
    assert (sharded / "adapter_config.json").read_text() == (tmp_path / "adapter_config.json").read_text()
    tensors, expected = (load_file(path / "adapter_model.safetensors") for path in (sharded, tmp_path))
    assert tensors.keys() == expected.keys()
    assert any("head" in key for key in tensors)
    for key, value in expected.items():
        assert value.dtype == tensors[key].dtype
        assert torch.equal(value, tensors[key]), key


def test_merge_makes_the_sharded_module_plain_with_the_weights_of_the_file(folder, processes):
    for name in RUNS:
        state = torch.load(folder / f"{name}.ckpt", weights_only=True)["state_dict"]
        for seen in (process[name] for process in processes if "merged" in process[name]):
            assert seen["merged"] == {key: value.tolist() for key, value in state.items()}
            assert seen["hosts"] == []
            assert seen["kinds"] == [True] * 4
            assert {seen["classes"][key] for key in ("", "conv", "linear")} == {"FSDPNet", "FSDPConv1d", "FSDPLinear"}
            assert seen["classes"]["embed"] == "Embedding"
    assert "merged" in processes[1]["dora"]


def test_the_callback_alone_injects_before_the_module_shards(processes):
    for process in processes:
        assert process["by the callback alone"] == {key: process["zero"][key] for key in ("losses", "trained")}


def test_the_module_stays_adapted_after_fit_until_merge(processes):
    assert processes[0]["adapted after fit"] == ADAPTED


@pytest.mark.parametrize("name", ["zero", "merged", "A"])
def test_a_second_fit_goes_on_where_the_first_ended(name, processes, tmp_path):
    """In one process, adapters are new then; the function is the same, and the first loss."""
    _, model, _ = train(tmp_path, name, devices=1)
    again = Watch()
    fit(tmp_path, model, RUNS[name], again, devices=1)
    seen = torch.tensor([process[f"{name}, second fit"] for process in processes])
    close(seen.mean(0)[0], torch.tensor(again.losses[0]))
    assert seen.mean(0)[-3:].mean() < torch.tensor(processes[0][name]["losses"][:3]).mean()


@pytest.mark.parametrize("kind", ["whole", "sharded"])
@pytest.mark.parametrize("name", RUNS)
def test_a_run_that_resumes_has_the_bits_of_the_uninterrupted_one(name, kind, processes):
    for process in processes:
        seen = process[f"resumed-{name}-{kind}"]
        assert seen["bits"][0] == seen["bits"][1]
        assert seen["losses"][0] == seen["losses"][1]
        assert seen["warned"] == []


def test_both_kinds_of_checkpoint_are_evaluated_by_the_plain_module_without_the_callback(processes):
    for name in ("zero", "projected"):
        whole, sharded = (processes[0][f"validated-{name}-{kind}"] for kind in ("whole", "sharded"))
        assert whole == sharded


def test_on_other_weights_w0_is_recovered_with_a_warning_or_refused(processes):
    expected = processes[0]["resumed-zero-whole"]["losses"][0]
    assert processes[0]["other weights"]["losses"] == pytest.approx(expected, abs=1e-3)
    assert len(processes[0]["other weights"]["warned"]) == 1
    assert "exact_resume=True" in processes[0]["refused"]["exact"]


@pytest.mark.parametrize("name", RUNS)
def test_a_folder_holds_the_plain_model_with_merged_weights(name, folder):
    consolidated = _load_distributed_checkpoint(folder / f"{name}-AdamW-sharded.ckpt")
    whole = torch.load(folder / f"{name}-AdamW-whole.ckpt", weights_only=True)
    assert sorted(consolidated["state_dict"]) == sorted(whole["state_dict"])
    for key in ("state_dict", "lightning_lora"):
        assert digest(dict(sorted(consolidated[key].items()))) == digest(dict(sorted(whole[key].items())))


def test_lightning_consolidates_a_folder_to_a_file_that_needs_nothing_more(folder, tmp_path):
    file = tmp_path / "consolidated.ckpt"
    tool = ["lightning.fabric.utilities.consolidate_checkpoint", str(folder / "dora-AdamW-sharded.ckpt")]
    subprocess.run([sys.executable, "-m", *tool, "--output_file", str(file)], check=True, timeout=120)
    assert printed_by_a_new_process("-c", OUTSIDER, str(file)) == ["<All keys matched successfully>"]
    assert isinstance(Net.load_from_checkpoint(file), Net)


@pytest.fixture(scope="module", params=[1, 4])
def elsewhere(request, folder):
    """What another number of processes makes of the folders that two have saved."""
    devices = request.param
    printed_by_a_new_process("-W", "ignore", str(HERE / "model_parallel.py"), str(folder), str(devices))
    return [json.loads((folder / f"elsewhere-{devices}-{rank}.json").read_text()) for rank in range(devices)]


@pytest.mark.parametrize("name", ELSEWHERE)
def test_another_number_of_processes_resumes_a_folder(name, elsewhere, processes):
    through = torch.tensor([process[name]["losses"] for process in processes]).mean(0)
    resumed = torch.tensor([process[name]["losses"] for process in elsewhere]).mean(0)
    close(resumed, through[3:])
    assert all(process[name]["merged"] == elsewhere[0][name]["merged"] for process in elsewhere)


@pytest.mark.parametrize("name", ["zero", "merged", "projected", "A"])
def test_the_memory_of_a_process_is_that_of_its_parts(name, processes, tmp_path):
    """Against one process on the batches of one of two: the same activations, about half of all else."""
    watch = Watch()
    fit(tmp_path, net(name), RUNS[name], watch, devices=1, batch=2)
    for process in processes:
        for side, alone in (("lora", watch.memory["lora"]), ("full", watch.memory["full"])):
            seen = process[name]["memory"][side]
            assert all(alone[part] / 3 <= seen[part] <= alone[part] * 0.8 for part in ("parameters", "gradients"))
            assert alone["optimizer"] / 3 <= seen["optimizer"] <= alone["optimizer"] * 0.8
        expected = watch.memory["lora"]["activations"]  # projected, FSDP2 hands on views that are saved by themselves
        assert process[name]["memory"]["lora"]["activations"] == pytest.approx(
            expected, rel=0.06 if name == "projected" else 0
        )
        assert process[name]["memory"]["full"]["activations"] is None
        trained = sum(map(math.prod, watch.trained.values()))
        assert process[name]["memory"]["lora"]["communicated"] == 4 * trained
        assert "FSDP2 exchanges the parameters" in process[name]["memory"]["notes"][0]


def test_a_step_by_which_torch_makes_states_is_none(processes):
    for process in processes:
        without, saved = process["saved at the start"]
        assert without == saved


def test_what_nearest_rounding_would_have_lost_is_logged(processes):
    logged = [process["merged, bf16-true"]["logged"] for process in processes]
    assert logged[0] == logged[1] != []
    assert all(0 < share < 1 for share in logged[0])


@pytest.mark.parametrize("name", ["zero, policy", "merged, bf16-true"])
def test_adapters_keep_their_dtype_in_mixed_and_in_half_precision(name, processes):
    dtypes = processes[0][name]["dtypes"]
    assert dtypes["linear.lora.A"] == "torch.float32"
    assert dtypes["linear.weight"] == ("torch.float32" if "policy" in name else "torch.bfloat16")


@pytest.mark.parametrize(
    ("case", "says"),
    {
        "sharded first": "is sharded already",
        "forgotten": "is not sharded, so each process would train one of its own",
        "other options": "Give both the same",
        "gradient": "Use another `init`",
        "adapter": "Use `checkpoint='merged'`",
        "tensor parallel": "`tensor_parallel_size=1` only",
    }.items(),
)
def test_what_cannot_be_sharded_is_refused_by_name(case, says, processes):
    for process in processes:
        assert process["refused"][case].startswith("LoRAError")
        assert says in process["refused"][case]


@pytest.mark.parametrize("strategy", [FSDPStrategy, DeepSpeedStrategy])
def test_strategies_that_own_the_parameters_are_refused_with_what_to_use(strategy):
    class Run:
        pass

    run = Run()
    run.strategy = object.__new__(strategy)  # these need an accelerator
    with pytest.raises(Exception, match=rf"does not support {strategy.__name__}.*`ModelParallelStrategy`"):
        refuse_unsupported(run)


def test_a_class_on_top_of_a_hosts_loses_the_host_alone():
    layer = nn.Linear(2, 2)
    adopt(layer, {"weight": Adapter(torch.zeros(1, 2), torch.zeros(1, 2))})
    layer.__class__ = type("OnTop", (type(layer),), {"extra": 1})
    release(layer)
    assert type(layer).__mro__[1:] == nn.Linear.__mro__
    assert (type(layer).__name__, layer.extra, hasattr(layer, "lora")) == ("OnTop", 1, False)
