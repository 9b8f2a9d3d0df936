"""What each command of ``lightning-lora`` does; each returns its exit code."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import math
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

from lightning_lora.adapters import Adapter, draws, initial
from lightning_lora.adapters.spectrum import core, effective_rank, rank_holding, singular_values
from lightning_lora.checkpoint.format import KEY, NUMBERS, VERSION, State, check_format, check_weights, weight_key
from lightning_lora.checkpoint.read import cast_as, cast_to_match
from lightning_lora.cli.files import Planned, WeightFile, read, release, shape_and_dtype, write
from lightning_lora.errors import LoRAError
from lightning_lora.injection.options import Options
from lightning_lora.naming import plain_name
from lightning_lora.weights.digest import digest, fingerprint

TRAINING = ("optimizer_states", "lr_schedulers", "loops", "callbacks", "MixedPrecision", KEY)
"""What a Lightning checkpoint holds to resume, which a merged one cannot."""
STATISTICS = ("running_mean", "running_var")
"""Of normalisations: buffers, which no optimizer trains."""
EXACT = 1024
"""The smallest side up to which all singular values are computed, instead of the largest by iterations."""


def merge(base: str, adapter: str, out: str, root: str = "", force: bool = False) -> int:
    """Write the weights of BASE with the increments in ADAPTER.

    The result is, bit for bit, what the run that wrote ADAPTER had when it wrote it. BASE must be what the run started
    from: each weight is compared with the fingerprint in ADAPTER. OUT is written as its name says: .ckpt is a Lightning
    checkpoint for load_from_checkpoint, .pt, .pth and .bin are a state dict, .safetensors is what it says, and
    .safetensors.index.json has shards as BASE has.

    Args:
        base: Pretrained weights: .ckpt, .pt, .bin, .safetensors, an index.json, or a folder of Hugging Face's.
        adapter: A checkpoint of a run with LoRA.
        out: The file to write; what was there stays until the new one is whole.
        root: The submodule that BASE holds, if ADAPTER's names begin with it: "model" if ADAPTER has model.layers.0
            where BASE has layers.0.
        force: Take BASE though it is not what ADAPTER was trained on.
    """
    weights, learned = read(base), read(adapter)
    payload = learned.adapters()
    prefix, lightning = f"{root}." if root else "", out.endswith(".ckpt")
    planned = _merged(weights, learned, payload, prefix, force, ties=not out.endswith((".safetensors", ".json")))
    if not lightning:  # the names that BASE has
        inside = [each for each in planned if each.key.startswith(prefix)]
        if len(inside) < len(planned):
            _say(f"{len(planned) - len(inside)} weights outside of {root!r} are left out; a .ckpt has them")
        planned = [dataclasses.replace(each, key=each.key.removeprefix(prefix)) for each in inside]
    around = {key: value for key, value in learned.rest.items() if key not in TRAINING} if lightning else None
    extras = weights.extras if root and not lightning else learned.extras
    with _progress("merging", planned) as shown:
        files = write(out, shown, around, extras, weights.shards)
    count = len(payload["adapters"])
    _say(f"{files[-1]}: {len(planned)} weights, with the increments of {count} adapters, {_on_disk(files)}")
    return 0


def _merged(
    weights: WeightFile, learned: WeightFile, payload: State, prefix: str, force: bool, ties: bool
) -> list[Planned]:
    """Plan the weights of the merged module, by its own names; those that BASE leaves out as tied only if ``ties``."""
    known: dict[str, str] = payload["base"]
    spelled = {plain_name(key): key for key in (*known, *learned.weights)}
    held = {spelled.get(prefix + plain_name(key), prefix + key): value for key, value in weights.weights.items()}
    check_weights(payload, learned.weights, held, {})
    entries = {weight_key(name, known): entry for name, entry in payload["adapters"].items()}
    twins = {known[key]: key for key in held if key in known}
    planned, absent = [], []
    for key in dict.fromkeys((*held, *known, *learned.weights)):
        source = held.get(key)
        if key in known and source is None and key not in learned.weights:
            if known[key] not in twins:
                absent.append(key)
            if known[key] not in twins or not ties:
                continue
            source = held[twins[known[key]]]
        if key in known and source is not None:
            planned.append(_folded(key, source, known[key], entries.get(key), weights, force))
        else:
            planned.append(Planned.of(key, learned.weights[key] if key in learned.weights else held[key]))
    if absent:
        hint = "" if held.keys() & spelled.values() else " If BASE is a part of the module, name that by --root."
        raise LoRAError(f"{weights.path} has no weight {absent[0]!r}, and {len(absent) - 1} more are missing.{hint}")
    return planned


def _folded(key: str, weight: Tensor, expected: str, entry: State | None, source: WeightFile, force: bool) -> Planned:
    """Plan ``weight`` of BASE, in the dtype that the run had, with the increment of ``entry``."""

    def make() -> Tensor:
        cast = cast_as(weight, expected) if force else cast_to_match(weight, expected)
        if not force and cast is None:
            raise LoRAError(
                f"{key!r} in {source.path} is not the weight that the adapters were trained on. Give the same"
                " pretrained weights, or --force to add the increments to these."
            )
        start = weight if cast is None else cast
        return start if entry is None else Adapter.from_state(entry).folded_into(start)

    like = cast_as(torch.empty_like(weight, device="meta"), expected)
    return Planned(key, weight.shape, weight.dtype if like is None else like.dtype, make, weight)


def extract(finetuned: str, base: str, out: str, rank: int = 8, root: str = "") -> int:
    """Write an adapter of rank r for what FINETUNED differs in from BASE.

    Of the difference of each matrix the r largest singular values are kept, which no other matrix of that rank is
    nearer to. The table says by how much that misses: |difference - its first k singular values| / |difference|. What
    has one dimension, or is no smaller as an adapter, is kept whole. OUT is a checkpoint in the form "adapter".

    Args:
        finetuned: The weights after training, of the same kinds of files as BASE.
        base: The weights before.
        out: The file to write, .ckpt; what was there stays until the new one is whole.
        rank: Of each adapter, at the most.
        root: The submodule that BASE holds, if FINETUNED's names begin with it.
    """
    if rank < 1:
        raise LoRAError(f"--rank must be at least 1, got {rank}.")
    if out.endswith((".safetensors", ".json")):
        raise LoRAError(f"An adapter file is one of torch.save, which {out} is not called as: give it .ckpt.")
    tuned, origin = read(finetuned), read(base)
    prefix = f"{root}." if root else ""
    before = {prefix + key: value for key, value in origin.weights.items()}
    if not before.keys() & tuned.weights.keys():
        raise LoRAError("No weight of FINETUNED is called as one of BASE; if one is a part of the other, give --root.")
    known: dict[str, str] = {}
    entries: State = {}
    whole: list[Planned] = []
    missed: dict[str, Tensor] = {}
    with _progress("extracting", [Planned.of(key, value) for key, value in tuned.weights.items()]) as shown:
        for each in shown:
            key, after, start = each.key, each.make(), before.get(each.key)
            if start is not None and {start.dtype, after.dtype} <= set(NUMBERS):
                start = start.to(after.dtype)
            if start is None or start.dtype != after.dtype or start.shape != after.shape:
                whole.append(Planned.of(key, after))
            elif torch.equal(start, after):
                known[key] = fingerprint(start)
            elif after.dtype not in NUMBERS or after.dim() < 2 or not _is_smaller(after, rank):
                whole.append(Planned.of(key, after))
            else:
                known[key] = fingerprint(start)
                entries[key.removesuffix(".weight")], missed[key] = _truncated(key, after, start, rank)
            if key in before:
                release(before[key])
    names = list(entries)
    payload = {
        "version": VERSION,
        "form": "adapter",
        "options": Options(rank=rank, alpha=rank, target_modules=names or "all").to_primitives(),
        "adapters": entries,
        "trained": [
            each.key for each in whole if each.dtype in NUMBERS and each.key.rpartition(".")[2] not in STATISTICS
        ],
        "idle": [],
        "base": known,
    }
    check_format(payload)
    around = {"epoch": 0, "global_step": 0, "pytorch-lightning_version": importlib.metadata.version("lightning")}
    around |= {key: value for key, value in tuned.rest.items() if key not in TRAINING} | {KEY: payload}
    files = write(out, whole, around, tuned.extras, {})
    if missed:
        ranks = [*(2**power for power in range(rank.bit_length()) if 2**power < rank), rank]
        table = _table("relative error of", "shape", *(f"rank {each}" for each in ranks))
        for key, squares in missed.items():
            table.add_row(key, shape_and_dtype(tuned.weights[key]), *_roots(squares, ranks))
        table.add_row("all of them", "", *_roots(_sum(missed.values()), ranks))
        _console().print(table)
    if left := [key for key in before if key not in tuned.weights]:
        _say(f"{left[0]!r} and {len(left) - 1} more of BASE are not in FINETUNED, and stay as they are")
    _say(f"{files[-1]}: {len(entries)} adapters, {len(whole)} weights kept whole, {_on_disk(files)}")
    return 0


def _is_smaller(weight: Tensor, rank: int) -> bool:
    m, n = weight.flatten(1).shape
    return rank * (m + n) < m * n


def _truncated(key: str, after: Tensor, start: Tensor, rank: int) -> tuple[State, Tensor]:
    """Return the state of the adapter, and the squares that ranks 0 to ``rank`` miss of the difference, (rank + 1,)."""
    dtype = torch.promote_types(after.dtype, torch.float32)
    difference = after.to(dtype).sub_(start) if after.dtype != dtype else after - start
    matrix = difference.flatten(1)
    if not matrix.isfinite().all():
        raise LoRAError(f"{key!r} has entries that are not finite.")
    smallest = min(matrix.shape)
    method, taken = ("pissa", rank) if smallest <= EXACT else ("pissa_niter_4", min(rank + 16, smallest))
    A, B = initial.start(method, matrix, taken, 1.0, (), draws.generator(key))
    adapter = Adapter(A[:rank].clone(), B[:rank].clone(), after.shape)
    (values,) = singular_values([core(adapter, torch.float64)])
    missed = torch.linalg.vector_norm(difference.sub_(adapter.delta_weight(dtype)), dtype=torch.float64).square()
    squares = missed + torch.cat([values.square().flip(0).cumsum(0).flip(0), values.new_zeros(1)])
    entry = adapter.state(start)
    return {name: value.detach() if isinstance(value, Tensor) else value for name, value in entry.items()}, squares


def _sum(rows: Iterable[Tensor]) -> Tensor:
    """Add rows, of which the shorter ones go on with their last entry."""
    rows = list(rows)
    longest = max(map(len, rows))
    return torch.stack([torch.cat([row, row[-1:].expand(longest - len(row))]) for row in rows]).sum(0)


def _roots(squares: Tensor, ranks: Sequence[int]) -> list[str]:
    return [f"{math.sqrt(squares[min(rank, len(squares) - 1)] / squares[0]):.2e}" for rank in ranks]


def inspect(file: str, weights: bool = False) -> int:
    """Print what FILE holds: its form, options and adapters; nothing in it is executed.

    For each adapter: the norm of its increment; the effective rank, exp(entropy of the singular values); the rank that
    would hold 99 % of the squares; and the beginning of its weight's fingerprint, which is the SHA-256 of its bytes.

    Args:
        file: A checkpoint of a run with LoRA, or any other file of weights.
        weights: List the weights too, with their norms and fingerprints, for which all of the file is read.
    """
    found = read(file)
    count = sum(value.numel() for value in found.weights.values())
    dtypes = sorted({str(value.dtype).removeprefix("torch.") for value in found.weights.values()})
    held = [f"{key} {found.rest[key]}" for key in ("epoch", "global_step") if isinstance(found.rest.get(key), int)]
    _say(", ".join([f"{found.path}: {found.kind}", _size(found.size), *held]))
    _say(f"{len(found.weights)} weights of {count:,} numbers, {', '.join(dtypes) or 'none'}")
    if KEY in found.rest:
        _print_adapters(found)
    if weights:
        table = _table("weight", "shape", "norm", "fingerprint")
        for key, value in found.weights.items():
            norm = f"{_norm(value):.4g}" if value.dtype in NUMBERS else ""
            table.add_row(key, shape_and_dtype(value), norm, fingerprint(value).rpartition(":")[2][:12])
            release(value)
        _console().print(table)
    return 0


def _print_adapters(found: WeightFile) -> None:
    payload = found.adapters()
    known, options = payload["base"], payload.get("options")
    described = {"merged": "its weights are merged", "adapter": "what was frozen is not in it"}[payload["form"]]
    _say(f"adapters in format {payload['version']}, form {payload['form']!r}: {described}")
    if isinstance(options, Mapping):
        shown = ((key, value) for key, value in options.items() if value is not None)
        _say(f"options: {', '.join(f'{key}={reprlib.repr(value)}' for key, value in shown)}")
    table = _table(
        "adapter", "weight", "rank", "scale", "norm", "effective rank", "rank for 99 %", "size", "fingerprint"
    )
    for name, entry in payload["adapters"].items():
        tensors = [value for value in entry.values() if isinstance(value, Tensor)]
        measures = ["drawn anew", "", ""]
        if "A" in entry:
            measures = ["not finite", "", ""]
            if all(value.isfinite().all() for value in tensors):
                (values,) = singular_values([core(Adapter.from_state(entry), torch.float64)])
                # of a stack of matrices, the mean and the largest
                effective, needed = effective_rank(values).mean().item(), rank_holding(values, 0.99).max().item()
                measures = [f"{_norm(values):.4g}", f"{effective:.2f}", str(int(needed))]
        kind = "" if entry["decomposition"] == Adapter.decomposition else f" {entry['decomposition']}"
        table.add_row(
            name,
            f"{' x '.join(map(str, entry['shape']))}{' transposed' if entry['transposed'] else ''}{kind}",
            str(entry["B"].shape[-2]),
            f"{entry['scale']:g}",
            *measures,
            _size(sum(value.nbytes for value in tensors)),
            known.get(weight_key(name, known), "").rpartition(":")[2][:12] or "holds the increment",
        )
    _console().print(table)
    for what in ("trained", "idle"):
        if names := payload.get(what):
            _say(f"{what}: {reprlib.repr([str(name) for name in names])}, {len(names)} in all")
    _say(f"fingerprints of {len(known)} frozen weights")


def diff(a: str, b: str, tolerance: float = 0.0) -> int:
    """Print which weights of A and B differ, and by how much; exit with 1 if any does.

    Adapters are compared too, tensor by tensor. The relative difference is |A - B| / |A|.

    Args:
        a: A file of weights.
        b: Another one.
        tolerance: A relative difference up to which weights count as equal.
    """
    first, second = (_with_adapters(read(path)) for path in (a, b))
    table, differing = _table("weight", "in A", "in B", "relative difference", "largest"), 0
    with _progress("comparing", [Planned.of(key, value) for key, value in {**second, **first}.items()]) as shown:
        for each in shown:
            each.make()
            one, other = first.get(each.key), second.get(each.key)
            how = _difference(one, other, tolerance)
            if how is not None:
                differing += 1
                shapes = ("" if held is None else shape_and_dtype(held) for held in (one, other))
                table.add_row(each.key, *shapes, *how)
            if other is not None:
                release(other)
    if differing:
        _console().print(table)
    _say(f"{differing} of {len(first.keys() | second.keys())} weights differ")
    return int(differing > 0)


def _with_adapters(found: WeightFile) -> dict[str, Tensor]:
    held = dict(found.weights)
    if KEY in found.rest:
        for name, entry in found.adapters()["adapters"].items():
            held |= {f"{name} ({what})": value for what, value in entry.items() if isinstance(value, Tensor)}
    return held


def _difference(one: Tensor | None, other: Tensor | None, tolerance: float) -> tuple[str, str] | None:
    """Return by how much two weights differ; None if they do not."""
    if one is None or other is None:
        return "missing", ""
    if one.shape != other.shape:
        return "another shape", ""
    if one.dtype == other.dtype and (torch.equal(one, other) or digest(one) == digest(other)):  # NaN is not NaN
        return None
    if not {one.dtype, other.dtype} <= set(NUMBERS):
        return ("another dtype" if one.dtype != other.dtype else "other entries"), ""
    dtype = torch.promote_types(torch.promote_types(one.dtype, other.dtype), torch.float32)
    gap = one.to(dtype) - other.to(dtype)
    size, relative = _norm(one), _norm(gap)
    relative = 0.0 if relative == 0 else relative / size if size else math.inf
    if relative <= tolerance and (one.dtype == other.dtype or tolerance > 0):
        return None
    return f"{relative:.3g}", f"{gap.abs().max().item():.3g}"


def export_peft(file: str, folder: str, root: str = "") -> int:
    """Write the adapters in FILE as PEFT's adapter_model.safetensors and adapter_config.json.

    Args:
        file: A checkpoint of a run with LoRA.
        folder: Where the two files go; PeftModel.from_pretrained takes it.
        root: The submodule that the pretrained model is, if FILE's names begin with it.
    """
    from lightning_lora.checkpoint.peft import save_peft

    count = len(read(file).adapters()["adapters"])
    save_peft(file, folder, root=root)
    _say(f"{folder}: {count} adapters")
    return 0


# ------------------------------------------------------------------------------------------------------------ printing


def printable(text: Any) -> str:
    """Return ``text`` without what would move the cursor, colour the terminal or begin a line."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in str(text))


def _console() -> Console:
    console = Console(markup=False, highlight=False, emoji=False, soft_wrap=True)
    return console if console.is_terminal else Console(markup=False, highlight=False, emoji=False, width=200)


def _say(line: str) -> None:
    _console().print(printable(line), soft_wrap=True)


class _Rows(Table):
    def add_row(self, *cells: Any, **options: Any) -> None:
        super().add_row(*map(printable, cells), **options)


def _table(*columns: str) -> Table:
    table = _Rows(box=None, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < 2 else "right", overflow="fold")
    return table


def _size(count: float) -> str:
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def _on_disk(files: Iterable[Any]) -> str:
    return _size(sum(file.stat().st_size for file in files))


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32)))


@contextmanager
def _progress(what: str, planned: Sequence[Planned]) -> Iterator[list[Planned]]:
    """Give ``planned``, of which each that is made moves a bar on stderr, if that is a terminal.

    When one is made, the memory of the one before is released.
    """
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task(what, total=sum(each.size for each in planned))
        before: list[Tensor] = []

        def shown(each: Planned) -> Planned:
            def make() -> Tensor:
                while before:
                    release(before.pop())
                made = each.make()
                before.extend([] if each.source is None else [each.source])
                bar.advance(task, each.size)
                return made

            return dataclasses.replace(each, make=make)

        yield [shown(each) for each in planned]
