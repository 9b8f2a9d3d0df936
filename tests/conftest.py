"""What all tests share: one thread, so that sums are formed in one order on every machine, and no trace of a launch."""

import os

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # so that products on a GPU are the same, bit for bit
os.environ["OMP_NUM_THREADS"] = "1"  # or Lightning's launchers choose a number, for this process and its children

import pytest
import torch
import torch.distributed as dist

torch.set_num_threads(1)

GRID, EACH = 9, 3
"""Of a test with at least so many cases, each third case is fast, and the others are slow."""
LAUNCHED = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE", "RANK", "GROUP_RANK")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="where tests marked `accelerator` run: cpu, cuda, cuda:1")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where to compute. Only tests marked `accelerator` ask for it."""
    device = torch.device(request.config.getoption("--device"))
    if device.type == "cuda" and not torch.cuda.is_available():
        pytest.exit("`--device cuda`, and torch finds no GPU", returncode=pytest.ExitCode.USAGE_ERROR)
    return device


@pytest.fixture
def cuda(device: torch.device) -> torch.device:
    """The device of a test that only a GPU can run."""
    if device.type != "cuda":
        pytest.skip("of CUDA alone: streams, graphs, synchronisation")
    return device


@pytest.fixture(autouse=True)
def no_trace_of_a_launch():
    """Lightning's launchers leave their variables in the environment, and a later launch takes itself for launched."""
    for name in LAUNCHED:
        os.environ.pop(name, None)
    yield
    for name in LAUNCHED:
        os.environ.pop(name, None)
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark all but a sample of each grid of cases as slow, before ``-m`` selects."""
    grids: dict[str, list[pytest.Item]] = {}
    for item in items:
        grids.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for cases in grids.values():
        for index, item in enumerate(cases):
            if len(cases) >= GRID and index % EACH:
                item.add_marker(pytest.mark.slow)
