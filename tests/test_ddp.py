"""Two processes on the CPU train what one trains on the same batches, and send each other nothing else."""

import json
import math
from pathlib import Path

import pytest
import torch
from distributed import RUNS, Images, file_of, launched, train
from test_checkpoint import HERE, printed_by_a_new_process, read

FAST = ("factored", "A", "factored, forked", "factored, resumed")
"""One run of each sort; the others are slow."""


def each(names):
    """One case for each name."""
    slow = pytest.mark.slow
    return pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in FAST else slow) for name in names])


EXACT = [name for name in RUNS if "bf16" not in name]
"""Where weights are rounded stochastically, what the processes' mean is rounded to differs."""
RESUMED = {name: run["resumes"] for name, run in RUNS.items() if "resumes" in run}
N_STEPS = 6
"""In an epoch."""


@pytest.fixture(scope="module")
def processes(request, tmp_path_factory):
    """What each of two processes has seen in the runs asked for, what both have printed, and where the files are."""
    folder = tmp_path_factory.mktemp("ddp")
    asked = {item.callspec.params["name"] for item in request.session.items if is_of_a_run(item)} or {*FAST}
    asked |= {RESUMED.get(name, name) for name in asked} | {made_otherwise(name) for name in asked}
    names = [name for name in RUNS if name in asked]  # a run before the one that resumes it
    printed = []
    for how in ("is-started-again", "makes-processes"):
        printed += printed_by_a_new_process("-W", "ignore", str(HERE / "distributed.py"), str(folder), how, *names)
    seen = {name: [json.loads((folder / f"{name}-{rank}.json").read_text()) for rank in (0, 1)] for name in names}
    return seen, printed, folder


def is_of_a_run(item):
    return item.path == Path(__file__) and "name" in getattr(getattr(item, "callspec", None), "params", ())


def made_otherwise(name):
    """The same run, if ``name`` is one whose processes are made in another way."""
    return name.partition(",")[0] if launched(name) else name


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


@each(EXACT)
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


@each(RUNS)
def test_all_processes_end_with_the_same_bits(name, processes):
    first, second = processes[0][name]
    assert first["adapted"] == second["adapted"]
    assert first["weights"] == second["weights"]


@each(RESUMED)
def test_two_processes_resume_to_the_same_bits(name, processes):
    for resumed, uninterrupted in zip(processes[0][name], processes[0][RESUMED[name]], strict=True):
        assert resumed["losses"] == uninterrupted["losses"][-len(resumed["losses"]) :]
        assert resumed["adapted"] == uninterrupted["adapted"]
        assert resumed["weights"] == uninterrupted["weights"]


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@each([name for name in RESUMED.values() if name in EXACT])
def test_one_process_resumes_what_two_have_saved(name, processes, tmp_path):
    seen, _, folder = processes
    watch, model = train(tmp_path, name, 1, file_of(folder, name))
    both = [sum(pair) / 2 for pair in zip(*(process["losses"] for process in seen[name]), strict=True)]
    assert watch.losses == pytest.approx(both[N_STEPS:], rel=1e-6)
    weights = read(folder / f"{name}.pt")
    for key, value in model.state_dict().items():
        torch.testing.assert_close(weights[key], value, rtol=0, atol=1e-6)


@each(RUNS)
def test_a_file_is_that_of_the_plain_model(name, processes):
    state = read(file_of(processes[2], RESUMED.get(name, name)))["state_dict"]
    plain = Images()
    plain.to(torch.bfloat16 if "bf16" in name else torch.float32).load_state_dict(state)
    assert {key: value.dtype for key, value in state.items()} == {
        key: value.dtype for key, value in plain.state_dict().items()
    }


@each(RUNS)
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
    names, printed, _ = processes
    printed = "".join(printed)  # the lines of two processes may be mixed
    assert printed.count("start of") == sum(1 if launched(name) else 2 for name in names)
    assert printed.count("Adapted modules") == printed.count("Full fine-tuning") == len(names)


@each([name for name in RUNS if launched(name)])
def test_processes_made_in_another_way_give_the_same_bits(name, processes):
    assert processes[0][name] == processes[0][made_otherwise(name)]


@each([name for name in RUNS if launched(name)])
def test_the_process_that_called_fit_has_the_merged_weights(name, processes):
    seen, _, folder = processes
    assert json.loads((folder / f"{name}-caller.json").read_text()) == seen[name][0]["weights"]
