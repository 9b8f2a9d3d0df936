"""One GPU, one process: step time, peak memory, launches, saving and start-up of each method, on large models.

    python benchmarks/gpu.py --json docs/benchmarks/gpu.json
    python benchmarks/gpu.py --device cpu --quick        # tiny models, to see that it runs

A step is forward, backward and AdamW. Each round runs one step of every method, in an order drawn anew; CUDA's events
stand around each, and the device is waited for between rounds only. Before that each method is alone on the device, for
its peak memory, its launches and the seconds of saving and starting. The models of all methods of a case are on the
device at once while they are timed: where they do not fit, the case says so, and ``--methods`` takes fewer.

On the CPU, seconds are the clock's, launches are dispatched operations, and the peak is not measured.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import (
    METHODS,
    CausalLMJob,
    ImageJob,
    Step,
    environment,
    llama_like,
    make_model,
    make_step,
    summarize,
    target_names,
)
from launches import Launches
from torch import Tensor, nn

import lightning_lora

COMPARED = ("full", "peft", "floor", "factored", "merged", "projected", "resample_A")


def llama(quick: bool) -> CausalLMJob:
    """The shape of TinyLlama-1.1B, random weights, 4 x 2048 tokens."""
    if quick:
        return llama_like(64, 96, 2, 128, batch=2, key_value_heads=1, length=16)
    return llama_like(2048, 5632, 22, 32000, batch=4, key_value_heads=4, length=2048)


def vit(quick: bool) -> ImageJob:
    """ViT-L/16, random weights, 32 images of 224 x 224."""
    from transformers import ViTConfig, ViTForImageClassification

    shape = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    if quick:
        shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    size = 32 if quick else 224
    model = ViTForImageClassification(ViTConfig(**shape, image_size=size, patch_size=16, num_labels=10))
    return ImageJob(model.train(), images=2 if quick else 32, size=size)


def resnet(quick: bool) -> ImageJob:
    """ResNet-50, random weights, 64 images of 224 x 224, all convolutions adapted."""
    from transformers import ResNetConfig, ResNetForImageClassification

    shape = {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [1, 1]} if quick else {}
    model = ResNetForImageClassification(ResNetConfig(**shape, num_labels=10))
    return ImageJob(model.train(), images=2 if quick else 64, size=32 if quick else 224)


CASES: dict[str, tuple[Callable[[bool], Any], str, bool]] = {
    "llama, bf16-mixed": (llama, "bf16-mixed", False),
    "llama, bf16-mixed, activation checkpoints": (llama, "bf16-mixed", True),
    "llama, bf16-true": (llama, "bf16-true", False),
    "llama, bf16-true, activation checkpoints": (llama, "bf16-true", True),
    "vit, bf16-mixed": (vit, "bf16-mixed", False),
    "resnet, bf16-mixed": (resnet, "bf16-mixed", False),
}
"""Name -> job, precision as a Trainer names it, and whether activations are recomputed."""


class DeviceJob:
    """A job on a device, in a precision, with activation checkpoints or without."""

    def __init__(self, job: Any, device: torch.device, precision: str, recomputed: bool) -> None:
        dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
        self.model: nn.Module = job.model.to(dtype)
        self.model.benchmark_targets = target_names(self.model)
        if recomputed:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.model.to(device)
        for name, value in vars(job).items():
            if isinstance(value, dict):
                setattr(job, name, {key: tensor.to(device) for key, tensor in value.items()})
            elif isinstance(value, Tensor):
                setattr(job, name, value.to(device, dtype if value.is_floating_point() else None))
        self._job, self._device, self._precision = job, device, precision

    def loss(self, model: nn.Module) -> Tensor:
        mixed = self._precision == "bf16-mixed"
        with torch.autocast(self._device.type, torch.bfloat16) if mixed else contextlib.nullcontext():
            return self._job.loss(model)


class Clock:
    """Seconds of steps: by events of CUDA, which are read when the device has been waited for, or by the clock."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: dict[str, list[Any]] = {}

    def mark(self, name: str) -> None:
        mark: Any = time.perf_counter()
        if self._device.type == "cuda":
            mark = torch.cuda.Event(enable_timing=True)
            mark.record()
        self._marks.setdefault(name, []).append(mark)

    def read(self) -> dict[str, float]:
        """Wait for the device; return the seconds between the two marks of each name, and forget these."""
        synchronize(self._device)
        if self._device.type == "cuda":
            seconds = {name: start.elapsed_time(end) / 1e3 for name, (start, end) in self._marks.items()}
        else:
            seconds = {name: end - start for name, (start, end) in self._marks.items()}
        self._marks = {}
        return seconds


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(function: Callable[[], Any], device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - start


def launches_of(step: Step, device: torch.device) -> int:
    """Kernels, copies and fills that one step launches."""
    if device.type != "cuda":
        with Launches() as launches:
            step()
        return len(launches.names)
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        step()
        torch.cuda.synchronize(device)
    wanted = ("cudaLaunch", "cuLaunch", "cudaMemcpyAsync", "cudaMemsetAsync")
    return sum(event.count for event in profile.key_averages() if event.key.startswith(wanted))


def save(method: str, model: nn.Module) -> int:
    """Write the file that is kept of ``model``; return its bytes. PEFT's has its adapters alone, all others W."""
    state = model.state_dict()
    if method == "peft":
        state = {name: value for name, value in state.items() if "lora_" in name}
    elif lightning_lora.adapters(model):
        state = lightning_lora.merged_state_dict(model)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.pt"
        torch.save(state, file)
        return file.stat().st_size


def alone(job: DeviceJob, method: str, rank: int, device: torch.device) -> dict[str, Any]:
    """What is measured of a method while no other is on the device; the job's own model is."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    made: dict[str, Any] = {}

    def start() -> None:
        made["model"] = make_model(job, method, rank)
        made["step"] = make_step(job, made["model"])

    found: dict[str, Any] = {"start_seconds": seconds_of(start, device)}
    step: Step = made["step"]
    found["first_step_seconds"] = seconds_of(step, device)
    step()  # has the optimizer's states from its start
    synchronize(device)
    if device.type == "cuda":
        own = sum(tensor.nbytes for tensor in (*job.model.parameters(), *job.model.buffers()))
        found["peak_bytes"] = torch.cuda.max_memory_allocated(device) - own
    found["launches"] = launches_of(step, device)
    written: list[int] = []
    found["save_seconds"] = seconds_of(lambda: written.append(save(method, made["model"])), device)
    found["file_bytes"] = written[0]
    return found


def interleaved(steps: dict[str, Step], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each step in each round; three rounds before these are not counted."""
    clock, order = Clock(device), list(steps)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for done in range(rounds + 3):
        random.shuffle(order)
        for name in order:
            clock.mark(name)
            steps[name]()
            clock.mark(name)
        for name, seconds in clock.read().items():
            if done >= 3:
                times[name].append(seconds)
    return times


def forget(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def run_case(name: str, arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    make, precision, recomputed = CASES[name]
    job = DeviceJob(make(arguments.quick), device, precision, recomputed)
    title = "Tiny, for a trial: no figure of it means anything." if arguments.quick else make.__doc__
    found: dict[str, Any] = {"job": title, "parameters": sum(p.numel() for p in job.model.parameters())}
    found["alone"] = {}
    for method in arguments.methods:
        try:
            found["alone"][method] = alone(job, method, arguments.rank, device)
        except torch.OutOfMemoryError:
            found["alone"][method] = {"out_of_memory": True}
        forget(device)
    try:
        fit = [method for method in arguments.methods if "out_of_memory" not in found["alone"][method]]
        steps = {method: make_step(job, make_model(job, method, arguments.rank)) for method in fit}
        found.update(summarize(interleaved(steps, arguments.rounds, device)))
    except torch.OutOfMemoryError:
        found["out_of_memory"] = "all methods at once; fewer by `--methods`"
    return found


def print_case(name: str, found: dict[str, Any]) -> None:
    print(f"\n{name}: {found['job']} {found['parameters'] / 1e6:.1f}M parameters. {found.get('out_of_memory', '')}")
    print("| method | ms a step | over full | peak, MiB | launches | save, s | file, MiB | start, s | first step, s |")
    print("|---" * 9 + "|")
    for method, own in found["alone"].items():
        low, middle, high = found.get("over_full", {}).get(method, [float("nan")] * 3)
        cells = [
            f"{1e3 * found.get('median_seconds', {}).get(method, float('nan')):.1f}",
            f"{middle:.2f} [{low:.2f}, {high:.2f}]",
            f"{own['peak_bytes'] / 2**20:.0f}" if "peak_bytes" in own else "",
            str(own.get("launches", "out of memory")),
            f"{own.get('save_seconds', float('nan')):.2f}",
            f"{own.get('file_bytes', float('nan')) / 2**20:.1f}",
            f"{own.get('start_seconds', float('nan')):.2f}",
            f"{own.get('first_step_seconds', float('nan')):.2f}",
        ]
        print(f"| {method} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(COMPARED))
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="tiny models and few rounds")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if arguments.quick:
        torch.set_num_threads(1)
        arguments.rounds = min(arguments.rounds, 3)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    result: dict[str, Any] = {"device": name, "quick": arguments.quick, "rank": arguments.rank, **environment()}
    result["cases"] = {}
    for case in arguments.cases:
        random.seed(0)
        torch.manual_seed(0)
        result["cases"][case] = run_case(case, arguments, device)
        print_case(case, result["cases"][case])
        forget(device)
        if arguments.json:  # after each case, for those that come after may take long
            arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
