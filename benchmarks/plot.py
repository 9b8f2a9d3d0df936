"""A PNG for each table, from the JSON files in a folder, into the same folder.

    python benchmarks/plot.py docs/benchmarks

Reads ``step_time_<job>.json``, ``growth.json``, ``memory.json`` and ``learning_resampling_<task>.json``, whichever are
there.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

try:
    import matplotlib
except ImportError as error:
    raise SystemExit("plot.py needs matplotlib: python -m pip install 'lightning-lora[benchmarks]'") from error

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

# Colours of Okabe and Ito, which colour-blind readers tell apart; markers do so in print.
STYLES = {
    "full": ("#000000", "o"),
    "peft": ("#E69F00", "s"),
    "formed": ("#CC79A7", "P"),
    "factored": ("#0072B2", "D"),
    "merged": ("#009E73", "^"),
    "projected": ("#D55E00", "v"),
    "floor": ("#7F7F7F", "x"),
}
TITLES = {
    "llama": "Llama-like, d = 512, 4 layers,\n8 x 128 tokens",
    "smollm": "shape of SmolLM2-135M,\n4 x 128 tokens",
    "resnet": "ResNet-18,\n16 images of 32 x 32",
    "mlp": "MLP, 4 layers of 2048,\n512 rows",
}
GROWTH = {"rank": "rank", "tokens": "tokens per step", "layers": "layers"}
MIB = 2**20


def measured(results: dict[str, Any]) -> list[str]:
    """The methods that were measured, in the same order everywhere."""
    return [method for method in STYLES if method in results]


def step_time(results: dict[str, dict[str, Any]]) -> Figure:
    """Median and quartiles of each method's time over that of full fine-tuning, one panel for each job."""
    figure, panels = plt.subplots(1, len(results), figsize=(3 * len(results), 3), sharey=True, squeeze=False)
    for axes, (job, result) in zip(panels.flat, results.items(), strict=True):
        for method in measured(result["over_full"]):
            low, middle, high = result["over_full"][method]
            colour, marker = STYLES[method]
            axes.errorbar(middle, method, xerr=[[middle - low], [high - middle]], color=colour, marker=marker)
        axes.axvline(1, color="lightgrey", zorder=0)
        axes.set_title(TITLES[job], fontsize=10)
        axes.set_xlim(left=0)
    panels.flat[0].invert_yaxis()
    figure.supxlabel("time of one training step over that of full fine-tuning: median, quartiles", fontsize=10)
    return figure


def growth(what: str, results: dict[str, Any], fixed: dict[str, int]) -> Figure:
    """Median and quartiles of each method's time over that of full fine-tuning, as one quantity grows."""
    figure, axes = plt.subplots(figsize=(6.5, 4))
    values = [int(value) for value in results]
    for method in measured(next(iter(results.values()))["over_full"]):
        low, middle, high = zip(*(result["over_full"][method] for result in results.values()), strict=True)
        colour, marker = STYLES[method]
        axes.plot(values, middle, color=colour, marker=marker, label=method)
        axes.fill_between(values, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.set_xscale("log", base=2)
    axes.set_xticks(values, [str(value) for value in values])
    axes.set_ylim(bottom=0)
    axes.minorticks_off()
    others = ", ".join(f"{GROWTH[name]}: {fixed[name]}" for name in GROWTH if name != what)
    axes.set_xlabel(f"{GROWTH[what]} ({others})")
    axes.set_ylabel("time of a step over full fine-tuning's")
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def memory(jobs: dict[str, Any]) -> Figure:
    """What is held between steps, the peak of a step above it, and what is saved for backward, for each job."""
    figure, panels = plt.subplots(len(jobs), 2, figsize=(9, 2.3 * len(jobs)), sharey="row", squeeze=False)
    for (left, right), (job, results) in zip(panels, jobs.items(), strict=True):
        methods = measured(results)
        held, peak, saved = ([results[method][key] / MIB for method in methods] for key in ("held", "peak", "saved"))
        bars = [
            left.barh(methods, held, color="#0072B2", label="held between steps"),
            left.barh(methods, peak, left=held, color="#E69F00", label="peak of a step above that"),
            right.barh(methods, saved, color="#009E73", label="saved for backward"),
        ]
        left.invert_yaxis()
        left.set_title(TITLES[job].replace("\n", " "), fontsize=10, loc="left")
    for axes in panels[-1]:
        axes.set_xlabel("MiB")
    figure.legend(handles=bars, loc="outside upper center", ncols=3, frameon=False)
    return figure


def learning(results: dict[str, Any], width: int = 10) -> Figure:
    """The loss over the steps, each point the mean of ``width`` batches, for each way of training."""
    methods = results["methods"]
    families = list(dict.fromkeys(name.partition(",")[0] for name in methods))
    figure, panels = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    shades = {"": "-", "1": "-", "10": "--", "100": ":"}
    for name, method in methods.items():
        family, _, k = name.partition(", k = ")
        colour, _ = list(STYLES.values())[families.index(family)]
        losses = method["losses"]
        means = [sum(losses[i : i + width]) / width for i in range(0, len(losses) - width + 1, width)]
        steps = [i + width / 2 for i in range(0, len(losses) - width + 1, width)]
        for axes, shown in zip(panels, ("both", "A"), strict=True):
            if family in ("full", "fixed", shown):
                axes.plot(steps, means, color=colour, linestyle=shades[k], label=f"{name} (lr {method['lr']:g})")
    for axes in panels:
        axes.set_xlabel("steps")
        axes.legend(frameon=False, fontsize=8)
    panels[0].set_ylabel(f"loss, mean of {width} batches")
    panels[0].set_ylim(top=1.1 * results["before"])
    return figure


def save(figure: Figure, path: Path) -> None:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    print(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("docs/benchmarks"))
    folder = parser.parse_args().folder

    plt.rcParams["figure.constrained_layout.use"] = True
    read = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    times = {job: read[f"step_time_{job}"] for job in TITLES if f"step_time_{job}" in read}
    if times:
        save(step_time(times), folder / "step_time.png")
    for what in GROWTH:
        if what in read.get("growth", {}):
            save(growth(what, read["growth"][what], read["growth"]["fixed"]), folder / f"growth_{what}.png")
    for task in ("lm", "digits"):
        if f"learning_resampling_{task}" in read:
            save(learning(read[f"learning_resampling_{task}"]), folder / f"learning_resampling_{task}.png")
    if "memory" in read:
        save(memory(read["memory"]["jobs"]), folder / "memory.png")


if __name__ == "__main__":
    main()
