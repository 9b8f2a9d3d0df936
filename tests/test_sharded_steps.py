"""What a step sends where weights that hold their increments are sharded, and that it gives the bits of one process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import sharded_steps
import torch
from lightning_utilities.core.imports import RequirementCache
from sharded_steps import CASES, DTYPES, LAYERS, STEPS

import lightning_lora

pytestmark = pytest.mark.skipif(not RequirementCache("torch>=2.7"), reason="torch 2.6 has no FSDP2 on the CPU")

HERE = Path(__file__).parent
RUNS = [f"{case}, {dtype}" for case in CASES for dtype in DTYPES]


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """What two processes have at the end of each run."""
    folder = tmp_path_factory.mktemp("processes")
    path = os.pathsep.join([str(Path(lightning_lora.__file__).parents[1]), str(HERE)])
    launched = [
        subprocess.Popen(
            [sys.executable, str(HERE / "sharded_steps.py"), str(folder), str(rank), "2"],
            env={**os.environ, "PYTHONPATH": path},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    for process in launched:
        _, errors = process.communicate(timeout=280)
        assert process.returncode == 0, errors
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("run", RUNS)
def test_two_processes_with_the_batches_of_one_have_its_weights_bit_for_bit(run, processes):
    one = sharded_steps.train(*run.split(", "), sharded=False)["tensors"]
    for process in processes:
        assert process[run]["tensors"].keys() == one.keys()
        for name, tensor in one.items():
            assert torch.equal(process[run]["tensors"][name], tensor), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ["merged", "symmetric", "lr_ratio"])
def test_a_step_gathers_the_factors_of_all_adapters_by_one_collective(case, dtype, processes):
    assert [calls for calls, _ in processes[0][f"{case}, {dtype}"]["sent"]] == [1] * STEPS


def test_a_step_sends_the_factors_before_and_after_it_and_no_weight(processes):
    sides = [(7, 9), (9, 5), (5, 3)]
    half = 2 * sum(n + m for n, m in sides)  # two of the three rows of each factor: 2 + 1, filled up
    assert [elements for _, elements in processes[0]["merged, float32"]["sent"]] == [2 * half] * STEPS


@pytest.mark.parametrize("case", ["both", "A"])
def test_a_draw_gathers_the_moments_of_all_adapters_by_one_more(case, processes):
    assert [calls for calls, _ in processes[0][f"{case}, float32"]["sent"]] == [1, 2] * (STEPS // 2)


@pytest.mark.parametrize("case", ["additive", "dora"])
def test_where_a_row_needs_the_others_each_weight_is_gathered_besides(case, processes):
    assert [calls for calls, _ in processes[0][f"{case}, float32"]["sent"]] == [1 + LAYERS] * STEPS
