"""Benchmarks that no GPU has run in a test are run on the CPU, on tiny models, so that they go on working."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
MEASURED = {"start_seconds", "first_step_seconds", "launches", "save_seconds", "file_bytes"}


@pytest.mark.slow
def test_the_benchmark_of_a_gpu_measures_every_method_on_every_model(tmp_path):
    file = tmp_path / "gpu.json"
    command = [sys.executable, BENCHMARKS / "gpu.py", "--device", "cpu", "--quick", "--json", file]
    subprocess.run(command, check=True, capture_output=True, text=True)
    found = json.loads(file.read_text())
    assert found["quick"]
    assert len(found["cases"]) == 6
    for case in found["cases"].values():
        assert len(case["alone"]) == len(case["median_seconds"]) == 7
        assert all(own.keys() >= MEASURED for own in case["alone"].values())
        launches = {method: own["launches"] for method, own in case["alone"].items()}
        assert launches["floor"] < launches["factored"] < launches["peft"]
        assert case["alone"]["factored"]["file_bytes"] > case["alone"]["peft"]["file_bytes"]
