"""Measures time and peak memory of `lightning-lora merge` and `extract` on files of a given size.

Each command runs in a process of its own. What the process holds is read from /proc while it runs: all of it (RSS), and
what is its own and not a page of a file (anonymous). A process that imports the package and does nothing is subtracted.

    python benchmarks/command_memory.py --gigabytes 2
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

import lightning_lora
from lightning_lora.checkpoint import write
from lightning_lora.checkpoint.fingerprints import Fingerprints
from lightning_lora.injection.inject import injections


def make_files(folder: Path, gigabytes: float, width: int, rank: int) -> None:
    """Write pretrained weights, as torch's file and as safetensors, and the adapters of a run that started there."""
    count = max(1, round(gigabytes * 1e9 / (4 * width * width)))
    module = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(count)))
    torch.save(module.state_dict(), folder / "base.pt")
    save_file(module.state_dict(), folder / "base.safetensors")
    lightning_lora.inject(module, rank=rank, target_modules="all-linear")
    with torch.no_grad():
        for adapter in lightning_lora.adapters(module).values():
            nn.init.normal_(adapter.B, std=0.02)
    run = write.describe(module, next(injections(module)).options, "adapter", Fingerprints())
    torch.save({"state_dict": {}, "lightning_lora": run.to_mapping()}, folder / "adapter.ckpt")


def measure(folder: Path, *command: str) -> tuple[float, float, float]:
    """Return seconds, peak RSS and peak anonymous memory in MB of a process."""
    begun = time.perf_counter()
    process = subprocess.Popen([sys.executable, *command], cwd=folder, stdout=subprocess.DEVNULL)
    peak = {"VmRSS": 0, "RssAnon": 0}
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:
            break
        for line in status.splitlines():
            name, _, value = line.partition(":")
            if name in peak:
                peak[name] = max(peak[name], int(value.split()[0]))
        time.sleep(0.005)
    if process.wait():
        raise SystemExit(f"{command} failed")
    return time.perf_counter() - begun, peak["VmRSS"] * 1024 / 1e6, peak["RssAnon"] * 1024 / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=0.5)
    parser.add_argument("--width", type=int, default=2048, help="of each square weight")
    parser.add_argument("--rank", type=int, default=8)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # in a process of its own: what it held must not be here when the others are started
        sizes = f"{given.gigabytes}, {given.width}, {given.rank}"
        made = f"import command_memory as m; m.make_files(m.Path({name!r}), {sizes})"
        subprocess.run([sys.executable, "-c", made], cwd=Path(__file__).parent, check=True)
        size, weight = (folder / "base.pt").stat().st_size / 1e6, 4 * given.width**2 / 1e6
        seconds, *nothing = measure(folder, "-c", "import lightning_lora.cli.commands, jsonargparse")
        print(f"file {size:.0f} MB, one weight {weight:.0f} MB, nothing: {seconds:.1f} s, RSS {nothing[0]:.0f} MB")
        for command in (
            "merge base.safetensors adapter.ckpt merged.safetensors",
            "merge base.pt adapter.ckpt merged.ckpt",
            "extract merged.safetensors base.safetensors extracted.ckpt",
            "diff merged.ckpt merged.safetensors",
        ):
            seconds, rss, own = measure(folder, "-m", "lightning_lora", *command.split())
            more = f"RSS {rss - nothing[0]:.0f} MB, of which {own - nothing[1]:.0f} MB its own"
            print(f"{command}: {seconds:.1f} s, more than nothing: {more}", flush=True)


if __name__ == "__main__":
    main()
