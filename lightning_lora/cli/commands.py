"""What each command of ``lightning-lora`` does; each returns its exit code."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import math
import reprlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

from lightning_lora.adapters import Adapter, AdapterState, draws, initial
from lightning_lora.adapters.spectrum import core, effective_rank, rank_holding, singular_values
from lightning_lora.checkpoint.files import WeightFile, read
from lightning_lora.checkpoint.format import KEY, NUMBERS, SavedRun, cast_as, weight_key
from lightning_lora.checkpoint.read import base_of
from lightning_lora.cli import printable
from lightning_lora.cli.files import Planned, release, write
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
    run = learned.run()
    prefix, lightning = f"{root}." if root else "", out.endswith(".ckpt")
    planned = _merged(weights, learned, run, prefix, force, ties=not out.endswith((".safetensors", ".json")))
    if not lightning:  # the names that BASE has
        inside = [each for each in planned if each.key.startswith(prefix)]
        if len(inside) < len(planned):
            _say(f"{len(planned) - len(inside)} weights outside of {root!r} are left out; a .ckpt has them")
        planned = [dataclasses.replace(each, key=each.key.removeprefix(prefix)) for each in inside]
    around = {key: value for key, value in learned.rest.items() if key not in TRAINING} if lightning else None
    extras = weights.extras if root and not lightning else learned.extras
    with _progress("merging", planned) as shown:
        files = write(out, shown, around, extras, weights.shards)
    _say(f"{files[-1]}: {len(planned)} weights, with the increments of {len(run.adapters)} adapters, {_on_disk(files)}")
    return 0


def _merged(
    weights: WeightFile, learned: WeightFile, run: SavedRun, prefix: str, force: bool, ties: bool
) -> list[Planned]:
    """Plan the weights of the merged module, by its own names; those that BASE leaves out as tied only if ``ties``."""
    known = run.base
    spelled = {plain_name(key): key for key in (*known, *learned.weights)}
    held = {spelled.get(prefix + plain_name(key), prefix + key): value for key, value in weights.weights.items()}
    run.check_weights(learned.weights, held, {})
    adapters = run.by_key(known)
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
            planned.append(_folded(key, source, known[key], adapters.get(key), weights.path, force))
        else:
            planned.append(Planned.of(key, learned.weights[key] if key in learned.weights else held[key]))
    if absent:
        hint = "" if held.keys() & spelled.values() else " If BASE is a part of the module, name that by --root."
        raise LoRAError(f"{weights.path} has no weight {absent[0]!r}, and {len(absent) - 1} more are missing.{hint}")
    return planned


def _folded(key: str, weight: Tensor, expected: str, state: AdapterState | None, path: Any, force: bool) -> Planned:
    """Plan ``weight`` of BASE, in the dtype that the run had, with the increment of ``state``."""

    def make() -> Tensor:
        start = cast_as(weight, expected) if force else base_of(weight, expected)
        if start is None and not force:
            raise LoRAError(
                f"{key!r} in {path} is not the weight that the adapters were trained on. Give the same"
                " pretrained weights, or --force to add the increments to these."
            )
        start = weight if start is None else start
        return start if state is None else Adapter.from_state(state).folded_into(start)

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
    adapters: dict[str, AdapterState] = {}
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
                adapters[key.removesuffix(".weight")], missed[key] = _truncated(key, after, start, rank)
            if key in before:
                release(before[key])
    run = SavedRun(
        form="adapter",
        options=Options(rank=rank, alpha=rank, target_modules=list(adapters) or "all").to_primitives(),
        adapters=adapters,
        trained=[e.key for e in whole if e.dtype in NUMBERS and e.key.rpartition(".")[2] not in STATISTICS],
        base=known,
    )
    around = {"epoch": 0, "global_step": 0, "pytorch-lightning_version": importlib.metadata.version("lightning")}
    around |= {key: value for key, value in tuned.rest.items() if key not in TRAINING} | {KEY: run.to_mapping()}
    files = write(out, whole, around, tuned.extras, {})
    if missed:
        ranks = [*(2**power for power in range(rank.bit_length()) if 2**power < rank), rank]
        table = _table("relative error of", "shape", *(f"rank {each}" for each in ranks))
        for key, squares in missed.items():
            table.add_row(key, shape_and_dtype(tuned.weights[key]), *_roots(squares, ranks))
        table.add_row("all of them", "", *_roots(torch.stack([*missed.values()]).sum(0), ranks))
        _console().print(table)
    if left := [key for key in before if key not in tuned.weights]:
        _say(f"{left[0]!r} and {len(left) - 1} more of BASE are not in FINETUNED, and stay as they are")
    _say(f"{files[-1]}: {len(adapters)} adapters, {len(whole)} weights kept whole, {_on_disk(files)}")
    return 0


def _is_smaller(weight: Tensor, rank: int) -> bool:
    m, n = weight.flatten(1).shape
    return rank * (m + n) < m * n


def _truncated(key: str, after: Tensor, start: Tensor, rank: int) -> tuple[AdapterState, Tensor]:
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
    return adapter.state(start), squares


def _roots(squares: Tensor, ranks: Sequence[int]) -> list[str]:
    return [f"{math.sqrt(squares[rank] / squares[0]):.2e}" for rank in ranks]


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
    _say(", ".join([f"{found.path}: {found.kind}", _size(found.size or 0), *held]))
    _say(f"{len(found.weights)} weights of {count:,} numbers, {', '.join(dtypes) or 'none'}")
    if KEY in found.rest:
        _print_adapters(found.run())
    if weights:
        table = _table("weight", "shape", "norm", "fingerprint")
        for key, value in found.weights.items():
            norm = f"{_norm(value):.4g}" if value.dtype in NUMBERS else ""
            table.add_row(key, shape_and_dtype(value), norm, fingerprint(value).rpartition(":")[2][:12])
            release(value)
        _console().print(table)
    return 0


def _print_adapters(run: SavedRun) -> None:
    described = {"merged": "its weights are merged", "adapter": "what was frozen is not in it"}[run.form]
    _say(f"adapters in format {run.version}, form {run.form!r}: {described}")
    shown = ((key, value) for key, value in run.options.items() if value is not None)
    _say(f"options: {', '.join(f'{key}={reprlib.repr(value)}' for key, value in shown)}")
    table = _table(
        "adapter", "weight", "rank", "scale", "norm", "effective rank", "rank for 99 %", "size", "fingerprint"
    )
    for name, state in run.adapters.items():
        kind = "" if state.decomposition == Adapter.decomposition else f" {state.decomposition}"
        table.add_row(
            name,
            f"{' x '.join(map(str, state.shape))}{' transposed' if state.transposed else ''}{kind}",
            str(state.rank),
            f"{state.scale:g}",
            *_measures(state),
            _size(sum(tensor.nbytes for tensor in state.tensors.values())),
            run.base.get(weight_key(name, run.base), "").rpartition(":")[2][:12] or "holds the increment",
        )
    _console().print(table)
    for what, names in (("trained", run.trained), ("idle", run.idle)):
        if names:
            _say(f"{what}: {reprlib.repr(names)}, {len(names)} in all")
    _say(f"fingerprints of {len(run.base)} frozen weights")


def _measures(state: AdapterState) -> tuple[str, str, str]:
    """Return the norm, the effective rank and the rank for 99 %; of a stack of matrices, the mean and the largest."""
    if "A" not in state.tensors:
        return "drawn anew", "", ""
    if not all(tensor.isfinite().all() for tensor in state.tensors.values()):
        return "not finite", "", ""
    (values,) = singular_values([core(Adapter.from_state(state), torch.float64)])
    effective, needed = effective_rank(values).mean().item(), rank_holding(values, 0.99).max().item()
    return f"{_norm(values):.4g}", f"{effective:.2f}", str(int(needed))


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
        for name, state in found.run().adapters.items():
            held |= {f"{name} ({what})": tensor for what, tensor in state.tensors.items()}
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

    save_peft(file, folder, root=root)
    _say(f"{folder}: {len(read(file).run().adapters)} adapters")
    return 0


# ------------------------------------------------------------------------------------------------------------ printing


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


def shape_and_dtype(tensor: Tensor) -> str:
    """Return ``"64 x 32 float32"``."""
    sides: Any = " x ".join(map(str, tensor.shape)) or "scalar"
    return f"{sides} {str(tensor.dtype).removeprefix('torch.')}"


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
