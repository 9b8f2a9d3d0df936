"""Tables and pictures of what was learned: which layers moved, and how much of their rank they use."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from lightning_lora.adapters import Adapter, full_adapters
from lightning_lora.adapters.spectrum import change, core, effective_rank, rank_holding, singular_values
from lightning_lora.checkpoint.files import File, read
from lightning_lora.checkpoint.format import weight_key
from lightning_lora.errors import LoRAError
from lightning_lora.injection.inject import distinct_places
from lightning_lora.naming import NUMBER

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHARE = 0.99
"""Of the squared norm of an increment, that ``AdapterRow.rank_99`` holds."""


class AdapterRow(NamedTuple):
    """What one adapter has learned.

    For the increment D = s B^T A of a product, W - W0 is D. Of ``"additive"`` and of starts that are taken away it is D
    as a product, of a rank up to 2r. Where DoRA's magnitudes rescale the weight, W - W0 has full rank: the norms are
    those of all of it, and the ranks those of its low-rank part D.
    """

    name: str
    """As by :func:`~lightning_lora.adapters`."""
    decomposition: str
    rank: int
    """r, the number of rows of A and B; of a stack, for each matrix."""
    norm: float | None
    """|W - W0|, the Frobenius norm; None for DoRA, and the like, where the weight is not known."""
    relative_norm: float | None
    """|W - W0| / |W0|; None where the weight is not known, as for a file of ``checkpoint="adapter"``."""
    effective_rank: float
    """exp of the entropy of D's singular values over their sum, between 1 and its rank; 0 for D = 0. Of a stack, the
    mean over its matrices."""
    rank_99: int
    """The smallest rank that can hold 99 % of |D|^2; 0 for D = 0. Of a stack, the largest of its matrices."""


class Measured(NamedTuple):
    """The numbers of all adapters, (number of adapters,) each, on their device."""

    names: list[str]
    norm: Tensor
    relative_norm: Tensor
    effective_rank: Tensor
    rank_99: Tensor


def adapter_table(module_or_file: nn.Module | File) -> list[AdapterRow]:
    """Return what each adapter has learned, from the factors alone: no matrix of a weight's size is formed.

    Where projections are drawn anew while training, that is what was learned since the last draw.

    Args:
        module_or_file: A module with adapters, or a checkpoint of a run with ``LoRA``; its path, or what ``torch.load``
            has made of it. The model of a checkpoint is not needed.

    Returns:
        A row for each adapter, in the module's order. Sums are in float64, or float32 where a device has no other.

    Raises:
        LoRAError: If there are no adapters, or the file is damaged or malformed.
    """
    found = of_module(module_or_file) if isinstance(module_or_file, nn.Module) else _of_file(module_or_file)
    if not found:
        raise LoRAError("There are no adapters.")
    measured = measure(found, torch.float32 if found[0][1].A.device.type == "mps" else torch.float64)
    return [
        AdapterRow(
            name,
            adapter.decomposition,
            adapter.rank,
            None if math.isnan(norm) else norm,
            None if math.isnan(relative) else relative,
            effective,
            int(held),
        )
        for (name, adapter, _), norm, relative, effective, held in zip(
            found, *(column.tolist() for column in measured[1:]), strict=True
        )
    ]


def plot_adapters(module_or_file: nn.Module | File) -> Figure:
    """Draw two maps of layers x modules: |W - W0| / |W0|, and the effective rank of the increments.

    The first number in an adapter's name is its layer, a row; the rest of the name is a column. Where W0 is not known,
    the first map is of |W - W0|. Needs ``pip install "lightning-lora[plot]"``.

    Args:
        module_or_file: As for :func:`adapter_table`.

    Returns:
        A figure, to be shown in a notebook or saved by ``figure.savefig("adapters.png")``.

    Raises:
        LoRAError: If matplotlib is not installed, or as by :func:`adapter_table`.

    Example::

        >>> plot_adapters("run.ckpt").savefig("adapters.png")  # doctest: +SKIP
    """
    rows = adapter_table(module_or_file)
    known = all(row.relative_norm is not None for row in rows)
    norms = [row.relative_norm if known else row.norm for row in rows]
    moved = [float("nan") if norm is None else norm for norm in norms]
    return draw([row.name for row in rows], moved, [row.effective_rank for row in rows], relative=known)


def draw(names: Sequence[str], moved: Sequence[float], ranks: Sequence[float], relative: bool = True) -> Figure:
    """Draw the figure of :func:`plot_adapters` from its numbers.

    It belongs to no window and is kept by nobody else.

    Args:
        names: Of the adapters.
        moved: A norm for each; "not a number" stays blank.
        ranks: An effective rank for each.
        relative: Whether the norms are relative to those of W0.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise LoRAError('Drawing needs matplotlib: `pip install "lightning-lora[plot]"`.') from error
    cells = [_cell(name) for name in names]
    layers = sorted({layer for layer, _ in cells})
    columns = list(dict.fromkeys(column for _, column in cells))
    maps = torch.full((2, len(layers), len(columns)), float("nan"), dtype=torch.float64)
    for (layer, column), norm, rank in zip(cells, moved, ranks, strict=True):
        maps[:, layers.index(layer), columns.index(column)] = torch.tensor([norm, rank], dtype=torch.float64)
    labels = ["" if layer < 0 else str(layer) for layer in layers]
    longest = 0.07 * max(map(len, columns))
    size = (2 * max(2.6, 1.6 + 0.45 * len(columns)), 1.2 + longest + max(1.2, 0.28 * len(layers)))
    figure = Figure(figsize=size, layout="constrained")
    titles = "|ΔW| / |W₀|" if relative else "|ΔW|", "effective rank"
    for axes, values, title in zip(figure.subplots(1, 2), maps, titles, strict=True):
        _draw_map(axes, values, labels, columns, title)
    return figure


def _draw_map(axes: Axes, values: Tensor, layers: list[str], columns: list[str], title: str) -> None:
    image = axes.imshow(values.numpy(), aspect="auto", cmap="viridis", vmin=0, interpolation="nearest")
    axes.set_title(title)
    axes.set_xticks(range(len(columns)), columns, rotation=90)
    step = max(1, len(layers) // 24)
    axes.set_yticks(range(0, len(layers), step), layers[::step])
    axes.set_ylabel("layer")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.figure.colorbar(image, ax=axes)


def _cell(name: str) -> tuple[int, str]:
    """Return the layer of an adapter, -1 where its name has no number, and its name within a layer."""
    number = NUMBER.search(name)
    return (-1, name) if number is None else (int(number[0]), NUMBER.sub("*", name, count=1))


# ------------------------------------------------------------------------------------------------------------- numbers


Found = tuple[str, Adapter, Callable[[], Tensor | None]]
"""The name of an adapter, itself with full tensors, and what gives its weight: W or W0, as ``adapter.holds`` says."""


def of_module(module: nn.Module) -> list[Found]:
    """Return the adapters in ``module``; their weights are gathered, or dequantised, one at a time."""
    found = distinct_places(module)
    full = full_adapters([place.adapter for place in found])
    return [(place.name, adapter, place.stored.full) for place, adapter in zip(found, full, strict=True)]


@torch.no_grad()
def measure(
    found: Sequence[Found], dtype: torch.dtype = torch.float32, frozen: dict[str, Tensor] | None = None
) -> Measured:
    """Return the numbers of ``found`` without waiting for their device; what is not known is "not a number".

    Where adapters are sharded, all processes call this together.

    Args:
        found: One adapter at least.
        dtype: Of the sums, at least.
        frozen: The norms of W0 that are known, by name; those that are computed and do not change are added.
    """
    frozen = {} if frozen is None else frozen
    values = singular_values([core(adapter, dtype) for _, adapter, _ in found])
    norms, bases = [], []
    for (name, adapter, whole), sigma in zip(found, values, strict=True):
        unknown = torch.full_like(sigma[..., 0].flatten()[0], float("nan"))
        if not adapter.holds and not adapter.rescales:
            if name not in frozen:
                frozen[name] = unknown if (weight := whole()) is None else torch.linalg.vector_norm(weight, dtype=dtype)
            norm, base = torch.linalg.vector_norm(sigma), frozen[name]
        elif (weight := whole()) is not None:
            norm, base = change(adapter, weight, dtype)
        else:
            norm, base = unknown if adapter.rescales else torch.linalg.vector_norm(sigma), unknown
        norms.append(norm)
        bases.append(base)

    def column(numbers: Iterable[Tensor]) -> Tensor:
        return torch.stack([number.to(values[0].device, dtype) for number in numbers])

    norm = column(norms)
    return Measured(
        [name for name, *_ in found],
        norm,
        norm / column(bases),
        column(effective_rank(sigma).mean() for sigma in values),
        column(rank_holding(sigma, SHARE).amax() for sigma in values),
    )


def _of_file(file: File) -> list[Found]:
    opened = read(file)
    run, weights = opened.run(), opened.plain_weights()
    found: list[Found] = []
    for name, state in run.adapters.items():
        weight = weights.get(weight_key(name, weights))
        if "A" not in state.tensors if weight is None else list(weight.shape) != state.shape:
            raise LoRAError(f"The adapter of {name!r} is not one for a weight in the file.")
        adapter = Adapter.from_state(state)
        adapter.holds = True  # as a weight in a file does
        found.append((name, adapter, functools.partial(lambda weight: weight, weight)))
    return found
