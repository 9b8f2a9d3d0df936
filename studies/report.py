"""Tables in Markdown and figures in SVG, from the summaries: what the pages in ``docs/`` show."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

try:
    import matplotlib
except ImportError as error:
    raise ImportError('The studies draw with matplotlib: pip install "lightning-lora[studies]".') from error

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

# Colours of Okabe and Ito, which colour-blind readers tell apart; lines and markers do so in print.
COLOURS = ("#000000", "#E69F00", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9")
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (3, 1)), (0, (1, 1)))
MARKERS = "osD^vPX"
CURVES = {
    "AdamW": ("full", "full, a third", "full, low rate", "LoRA r=8", "anew both k=1", "anew both k=1, a third"),
    "SGD": ("SGD full", "SGD full, a third", "SGD LoRA r=8", "SGD anew both k=1", "SGD anew both k=1, a third"),
}


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def number(value: float | None, digits: int = 3) -> str:
    """Return ``value`` with so many digits after the point."""
    return "-" if value is None else f"{value:.{digits}f}"


def interval(entry: dict[str, Any] | None, digits: int = 3) -> str:
    """Return a mean with its 95 % interval."""
    if entry is None:
        return "-"
    return f"{number(entry['mean'], digits)} [{number(entry['low'], digits)}, {number(entry['high'], digits)}]"


def p_value(p: float | None) -> str:
    """Return a p value with two digits, and never as zero."""
    return "-" if p is None else "< 0.001" if p < 0.001 else f"{p:.2g}"


def paired(rows: Sequence[dict[str, Any]], what: str, difference: Callable[[dict[str, Any]], Any]) -> str:
    """Return a table of paired tests."""
    head = ("method", "against", f"difference of {what}", "seeds", "p", "p, Holm", "p, signs", "d")
    lines = []
    for row in rows:
        entry = difference(row)
        ps = [p_value(entry[name]) for name in ("p", "p_holm", "p_signs")]
        lines.append((row["ours"], row["theirs"], interval(entry), str(entry["n"]), *ps, number(entry["effect"], 1)))
    return table(head, lines)


def _itself(row: dict[str, Any]) -> dict[str, Any]:
    return row


# --------------------------------------------------------------------------------------------------- the questions


def _forgetting(summary: dict[str, Any]) -> dict[str, str]:
    methods = summary["methods"]
    levels = ("0.5", "0.8", "0.9")
    kept = table(
        ("method", "rate", *(f"kept at {level}" for level in levels), "of ten, at 0.8", "steps to 0.8", "moved at 0.8"),
        [
            (
                name,
                f"{m['lr']:g}",
                *(interval(m["kept"].get(level)) for level in levels),
                interval(m["kept_of_ten"].get("0.8")),
                interval(m["steps"].get("0.8"), 0),
                interval(m["distance"].get("0.8"), 1),
            )
            for name, m in methods.items()
        ],
    )
    ends = table(
        ("method", "trained", "new, end", "old, end", "old of ten, end", "forgetting, end"),
        [
            (
                name,
                f"{m['trained']:,d}",
                *(interval(m["last"][value]) for value in ("new", "old_of_five", "old")),
                interval(m["forgetting"]),
            )
            for name, m in methods.items()
        ],
    )
    distance = table(
        ("the log of the old loss at all checkpoints", "R^2"),
        [
            (f"explained by {name}", number(summary["distance"][f"explained_by_{key}"], 2))
            for name, key in (("the log of the distance", "distance"), ("the method", "method"), ("both", "both"))
        ],
    )
    grids = table(
        ("method", "rates tried, with the held-out loss of the new task", "taken"),
        [
            (
                name,
                ", ".join(f"{r:g}: {number(x)}" for r, x in zip(s["rates"], s["losses"], strict=True)),
                f"{s['best']:g}" + (" (edge)" if s["at_edge"] else ""),
            )
            for name, s in summary["searches"].items()
        ],
    )
    compared = paired(summary["tests"], "what is kept at 0.8", _itself)
    return {"kept": kept, "tests": compared, "ends": ends, "distance": distance, "grids": grids}


def _projections(summary: dict[str, Any]) -> dict[str, str]:
    variance = table(
        ("projection", "variance, measured", "variance, formula", "effective rank of the step"),
        [
            (name, number(v["variance"], 2), number(v["expected"], 2), number(v["step_rank"], 1))
            for name, v in summary["variance"]["kinds"].items()
        ],
    )
    one_step = table(
        ("step", "norm over the full step's", "change of the new loss", "change of the old loss"),
        [(name, number(s["norm"], 2), number(s["new"]), number(s["old"])) for name, s in summary["one_step"].items()],
    )
    steps = table(
        ("method", "effective rank of one step", "of the whole increment", "cosine with descent on the old task"),
        [
            (
                name,
                *(interval(s[value], digits) for value, digits in (("step_rank", 1), ("rank", 1), ("old_cosine", 3))),
            )
            for name, s in summary["steps"].items()
        ],
    )
    return {"variance": variance, "one_step": one_step, "steps": steps}


def _additive(summary: dict[str, Any]) -> dict[str, str]:
    rows = []
    for entry in summary["random"]:
        name = "normal, {} x {}".format(*entry["shape"])
        rows.append((f"{name}: product", *(number(x) for x in entry["random"]["product"])))
        rows.append((f"{name}: additive", *(number(x) for x in entry["random"]["additive"])))
        rows.append((f"{name}: additive, formula", *(number(x) for x in entry["random"]["additive_expected"])))
        rows.append(
            ("share of a_i + b_j from which additive leaves less", *(number(x, 2) for x in entry["wins"].values()))
        )
    for name, entry in summary["real"].items():
        rows += [
            (f"increments by {name}: {kind}", *(interval(x) for x in entry[kind])) for kind in ("product", "additive")
        ]
    fits = table(("target", *(f"r = {r}" for r in summary["ranks"])), rows)
    losses = table(
        (
            "additive",
            "product",
            "trained",
            "loss, additive",
            "loss, product",
            "accuracy, additive",
            "accuracy, product",
        ),
        [
            (
                row["ours"],
                row["theirs"],
                " and ".join(f"{p:,d}" for p in row["parameters"]),
                *(interval(x) for x in (*row["losses"], *row["new"])),
            )
            for row in summary["trained"]
        ],
    )
    trained = paired(summary["trained"], "the new task's loss", lambda row: row["difference"])
    return {"fits": fits, "losses": losses, "tests": trained}


def _symmetry(summary: dict[str, Any]) -> dict[str, str]:
    orders = table(
        ("optimizer", "start", "rank", "rate", "at the first step", "mean", "largest"),
        [
            (
                o["optimizer"],
                o["init"],
                str(o["rank"]),
                f"{o['lr']:g}",
                *("-" if o[name] is None else f"{o[name]:.2g}" for name in ("first", "mean", "largest")),
            )
            for o in summary["orders"]
        ],
    )
    starts = table(
        ("start", "rate", "loss, new task", "accuracy, new task", "accuracy, old of five"),
        [
            (name, f"{s['lr']:g}", *(interval(s[value]) for value in ("new_loss", "new", "old_of_five")))
            for name, s in summary["starts"].items()
        ],
    )
    return {"orders": orders, "starts": starts, "tests": paired(summary["tests"], "the new task's loss", _itself)}


def _cost(summary: dict[str, Any]) -> dict[str, str]:
    rows, turns = [], []
    for entry in summary["shapes"]:
        shape = f"{entry['b']}, {entry['n']}, {entry['m']}"
        full = entry["counts"]["full"][str(entry["ranks"][0])]["pass"]
        for way, counted in entry["counts"].items():
            cells = [counted[str(r)] for r in entry["ranks"]]
            rows.append((shape, way, *(number((c["pass"] + c["step"]) / full) for c in cells)))
        turn = entry["turn"]
        turns.append((shape, number(turn["full"], 0), number(turn["formed"], 0)))
    ranks = summary["shapes"][0]["ranks"]
    return {
        "flops": table(("b, n, m", "way", *(f"r = {r}" for r in ranks)), rows),
        "turns": table(("b, n, m", "lora-2 above full from r =", "lora-2 above lora-1 from r ="), turns),
    }


TABLES = {
    "forgetting": _forgetting,
    "projections": _projections,
    "additive": _additive,
    "symmetry": _symmetry,
    "cost": _cost,
}


# ------------------------------------------------------------------------------------------------------- the figures


def curves(summary: dict[str, Any]) -> Figure:
    """Draw what is kept of the old task against what is gained on the new one."""
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.8), sharey=True)
    for axes, (optimizer, names) in zip(panels, CURVES.items(), strict=True):
        for i, name in enumerate(names):
            if name in summary["methods"]:
                curve = summary["methods"][name]["curve"]
                x = [float(level) for level in curve]
                axes.plot(x, [b["mean"] for b in curve.values()], color=COLOURS[i], linestyle=LINES[i], label=name)
                low, high = ([b[side] for b in curve.values()] for side in ("low", "high"))
                if None not in low:
                    axes.fill_between(x, low, high, color=COLOURS[i], alpha=0.12, linewidth=0)
        axes.set_title(optimizer)
        axes.set_xlabel("accuracy on the new digits, 5 to 9")
        axes.legend(fontsize=7, loc="lower left")
    panels[0].set_ylabel("accuracy on the old digits, 0 to 4")
    return figure


def distances(summary: dict[str, Any]) -> Figure:
    """Draw what is kept at equal performance against the distance moved, a point for each method."""
    figure, axes = plt.subplots(figsize=(6.5, 4.5))
    for name, method in summary["methods"].items():
        if "0.8" in method["kept"] and "0.8" in method["distance"]:
            x, y = method["distance"]["0.8"], method["kept"]["0.8"]
            colour = COLOURS[3] if name.startswith("SGD") else COLOURS[2]
            marker = MARKERS[0] if "anew" in name else MARKERS[1] if "full" in name else MARKERS[3]
            bars = [[max(y["mean"] - y["low"], 0)], [max(y["high"] - y["mean"], 0)]] if y["low"] is not None else None
            axes.errorbar(x["mean"], y["mean"], yerr=bars, color=colour, marker=marker, elinewidth=0.5, alpha=0.8)
            axes.annotate(
                name.removeprefix("SGD "), (x["mean"], y["mean"]), fontsize=6, xytext=(3, 3), textcoords="offset points"
            )
    axes.set_xscale("log")
    axes.set_xlabel("|W - W0| when the new accuracy reaches 0.8 (red: SGD, blue: AdamW)")
    axes.set_ylabel("accuracy on the old digits then")
    return figure


def leftovers(summary: dict[str, Any]) -> Figure:
    """Draw what the two decompositions leave of random targets and of real increments."""
    figure, axes = plt.subplots(figsize=(6, 3.8))
    ranks = summary["ranks"]
    lines = {f"normal {e['shape'][0]} x {e['shape'][1]}": e["random"] for e in summary["random"][:1]}
    for i, (name, entry) in enumerate({**lines, **summary["real"]}.items()):
        label = name if name in lines else f"increments by {name}"
        for kind, line in (("product", "-"), ("additive", "--")):
            values = [x["mean"] if isinstance(x, dict) else x for x in entry[kind]]
            axes.plot(ranks, values, line, marker=MARKERS[i], color=COLOURS[i + 1], label=f"{label}: {kind}")
    axes.set_xscale("log", base=2)
    axes.set_xticks(ranks, [str(r) for r in ranks])
    axes.set_xlabel("r, at r (m + n) parameters")
    axes.set_ylabel("share of the squared norm left")
    axes.legend(fontsize=7)
    return figure


def second_order(summary: dict[str, Any]) -> Figure:
    """Draw the part of second order over the part of first order against the learning rate."""
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    for axes, optimizer in zip(panels, ("SGD", "AdamW"), strict=True):
        orders = [o for o in summary["orders"] if o["optimizer"] == optimizer]
        for i, init in enumerate(dict.fromkeys(o["init"] for o in orders)):
            mine = [o for o in orders if o["init"] == init and o["rank"] == 8 and o["mean"]]
            axes.plot(
                [o["lr"] for o in mine],
                [o["mean"] for o in mine],
                color=COLOURS[i],
                linestyle=LINES[i],
                marker=MARKERS[i],
                label=init,
            )
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.axhline(0.1, color="lightgrey", zorder=0)
        axes.set_title(f"{optimizer}, r = 8")
        axes.set_xlabel("learning rate")
        axes.legend(fontsize=7)
    panels[0].set_ylabel("second order over first order")
    return figure


FIGURES: dict[str, dict[str, Callable[[dict[str, Any]], Figure]]] = {
    "forgetting": {"forgetting_curves": curves, "forgetting_distance": distances},
    "additive": {"additive": leftovers},
    "symmetry": {"second_order": second_order},
}


def tables(name: str, summary: dict[str, Any]) -> dict[str, str]:
    """Return the tables of the study ``name`` in Markdown, by their own names."""
    return TABLES[name](summary)


def write(name: str, summary: dict[str, Any], folder: Path) -> None:
    """Write the tables of the study ``name`` and its figures into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = [f"## {title}\n\n{text}" for title, text in tables(name, summary).items()]
    (folder / f"{name}_tables.md").write_text("\n".join([f"# Tables of the study of {name}\n", *parts]))
    with plt.rc_context({"svg.hashsalt": "studies", "svg.fonttype": "none"}):
        for title, draw in FIGURES.get(name, {}).items():
            figure = draw(summary)
            figure.savefig(folder / f"{title}.svg", bbox_inches="tight", metadata={"Date": None})
            plt.close(figure)
