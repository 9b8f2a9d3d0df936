"""Two processes on the CPU train what one trains on the same batches, and send each other nothing else."""

import json
import math

import pytest
import torch
from distributed import RUNS, Images, file_of, launched, train
from test_checkpoint import HERE, printed_by_a_new_process, read

EXACT = [name for name in RUNS if "bf16" not in name]
"""Where weights are rounded stochastically, what the processes' mean is rounded to differs."""
RESUMED = {name: run["resumes"] for name, run in RUNS.items() if "resumes" in run}
N_STEPS = 6
"""In an epoch."""


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """What each of two processes has seen in every run, what both have printed, and where the files are."""
    folder = tmp_path_factory.mktemp("ddp")
    program = str(HERE / "distributed.py")
    printed = printed_by_a_new_process("-W", "ignore", program, str(folder), "is-started-again")
    printed += printed_by_a_new_process("-W", "ignore", program, str(folder), "makes-processes")
    seen = {name: [json.loads((folder / f"{name}-{rank}.json").read_text()) for rank in (0, 1)] for name in RUNS}
    return seen, printed, folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The same run in one process; each runs once."""
    done: dict[str, tuple] = {}

    def run(name: str):
        same = {key: RUNS[name].get(key) for key in ("lora", "trainer", "branches")}
        if (key := json.dumps(same)) not in done:
            done[key] = train(tmp_path_factory.mktemp("alone"), name, devices=1)
        return done[key]

    return run


@pytest.mark.parametrize("name", EXACT)
def test_two_processes_equal_one_on_the_same_batches(name, processes, alone):
    seen, _, folder = processes
    watch, model = alone(name)
    both = [sum(pair) / 2 for pair in zip(*(process["losses"] for process in seen[name]), strict=True)]
    n_steps = N_STEPS if name in RESUMED else 2 * N_STEPS
    assert len(both) == n_steps
    assert seen[name][0]["losses"] != seen[name][1]["losses"]
    assert both == pytest.approx(watch.losses[-n_steps:], rel=1e-6)
    weights = read(folder / f"{name}.pt")
    for key, value in model.state_dict().items():
        torch.testing.assert_close(weights[key], value, rtol=0, atol=1e-6)
    assert (model.linear.weight - Images().linear.weight).abs().max() > 1e-3


@pytest.mark.parametrize("name", RUNS)
def test_all_processes_end_with_the_same_bits(name, processes):
    first, second = processes[0][name]
    assert first["adapted"] == second["adapted"]
    assert first["weights"] == second["weights"]


@pytest.mark.parametrize("name", RESUMED)
def test_two_processes_resume_to_the_same_bits(name, processes):
    for resumed, uninterrupted in zip(processes[0][name], processes[0][RESUMED[name]], strict=True):
        assert resumed["losses"] == uninterrupted["losses"][-len(resumed["losses"]) :]
        assert resumed["adapted"] == uninterrupted["adapted"]
        assert resumed["weights"] == uninterrupted["weights"]


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize("name", [name for name in RESUMED.values() if name in EXACT])
def test_one_process_resumes_what_two_have_saved(name, processes, tmp_path):
    seen, _, folder = processes
    watch, model = train(tmp_path, name, 1, file_of(folder, name))
    both = [sum(pair) / 2 for pair in zip(*(process["losses"] for process in seen[name]), strict=True)]
    assert watch.losses == pytest.approx(both[N_STEPS:], rel=1e-6)
    weights = read(folder / f"{name}.pt")
    for key, value in model.state_dict().items():
        torch.testing.assert_close(weights[key], value, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", RUNS)
def test_a_file_is_that_of_the_plain_model(name, processes):
    state = read(file_of(processes[2], RESUMED.get(name, name)))["state_dict"]
    plain = Images()
    plain.to(torch.bfloat16 if "bf16" in name else torch.float32).load_state_dict(state)
    assert {key: value.dtype for key, value in state.items()} == {
        key: value.dtype for key, value in plain.state_dict().items()
    }


@pytest.mark.parametrize("name", RUNS)
def test_only_what_is_trained_crosses_the_wire(name, processes):
    for process in processes[0][name]:
        trained = process["trained"]
        factors = {key for key in trained if ".lora." in key}
        assert set(trained) - factors == {"head.weight", "head.bias"}
        one_sided = RUNS[name]["lora"].get("resample") == "A"
        assert {key.rpartition(".")[2] for key in factors} == ({"B"} if one_sided else {"A", "B"})
        assert len(factors) == 4 if one_sided else 8
        n_steps = math.ceil(len(process["losses"]) / RUNS[name].get("trainer", {}).get("accumulate_grad_batches", 1))
        assert sum(size for size, _ in process["reduced"]) == n_steps * sum(trained.values())
        assert sorted(key for _, keys in process["reduced"] for key in keys) == sorted(n_steps * list(trained))
        assert process["communicated"] == [sum(trained.values()), process["in_full"]]


def test_only_the_first_of_the_processes_prints_the_table(processes):
    _, printed, _ = processes
    printed = "".join(printed)  # the lines of two processes may be mixed
    assert printed.count("start of") == sum(1 if launched(name) else 2 for name in RUNS)
    assert printed.count("Adapted modules") == printed.count("Full fine-tuning") == len(RUNS)


@pytest.mark.parametrize("name", [name for name in RUNS if launched(name) and name.partition(",")[0] in RUNS])
def test_processes_made_in_another_way_give_the_same_bits(name, processes):
    assert processes[0][name] == processes[0][name.partition(",")[0]]


@pytest.mark.parametrize("name", [name for name in RUNS if launched(name)])
def test_the_process_that_called_fit_has_the_merged_weights(name, processes):
    seen, _, folder = processes
    assert json.loads((folder / f"{name}-caller.json").read_text()) == seen[name][0]["weights"]
