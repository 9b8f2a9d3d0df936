"""Steps of adapters in merged weights, on one process or on two that share the parameters by FSDP2.

As a program, one process: the folder, its rank, and how many there are. All of them see the same batches, so that
averaged gradients are those of one process, bit for bit.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_lora import attach, inject

CASES = {
    "merged": {},
    "symmetric": {"init": "symmetric"},
    "lr_ratio": {"lr_ratio": 4.0},
    "both": {"resample_every_n_steps": 2},
    "A": {"resample_every_n_steps": 2, "resample": "A"},
    "additive": {"decomposition": "additive", "rank": 1},
    "dora": {"decomposition": "dora"},
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
STEPS = 4
LAYERS = 3


class Collectives(TorchDispatchMode):
    """Counts the collectives of this process, and the elements that it gives to them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name().startswith("_c10d_functional::all_"):
            self.calls += 1
            self.elements += args[0].numel()
        return func(*args, **(kwargs or {}))


def net(dtype: torch.dtype) -> nn.Module:
    """Layers with odd sides, of which the processes hold parts of different sizes."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 9), nn.Linear(9, 5, bias=False), nn.Linear(5, 3)).to(dtype)


def full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach().clone()


def train(case: str, dtype: str, sharded: bool) -> dict:
    """Return the tensors at the end, and what was sent in each step."""
    module = net(DTYPES[dtype])
    inject(module, **{"rank": 3, "gradient": "merged", **CASES[case]})
    if sharded:
        for layer in module:
            fully_shard(layer)
        fully_shard(module)
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.25, momentum=0.5)
    attach(module, optimizer)
    sent = []
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        x = torch.randn(4, 7, generator=generator).to(DTYPES[dtype])
        module(x).square().mean().backward()
        with Collectives() as collectives:
            optimizer.step()
        optimizer.zero_grad()
        sent.append((collectives.calls, collectives.elements))
    if sharded:
        for child in module.modules():
            if hasattr(child, "reshard"):
                child.reshard()
    tensors = {name: full(p) for name, p in module.named_parameters()}
    return {"tensors": tensors, "sent": sent}


def main(folder: Path, rank: int, processes: int) -> None:
    store = dist.FileStore(str(folder / "store"), processes)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=processes)
    torch.save(
        {f"{case}, {dtype}": train(case, dtype, True) for case in CASES for dtype in DTYPES}, folder / f"{rank}.pt"
    )
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
