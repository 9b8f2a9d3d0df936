"""What the increment of a weight is: the product B^T A, how it is folded into a weight and out again, its gradients."""

from __future__ import annotations

import collections
import copy
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_lora.adapters import draws, initial
from lightning_lora.adapters.products import cast, scaled
from lightning_lora.errors import LoRAError
from lightning_lora.weights import assign, counter, full_states
from lightning_lora.weights.full_precision import full_precision
from lightning_lora.weights.rounding import round_stochastically

_PART_ON_CPU, _PART = 2**17, 2**26
"""How many entries of a weight are rounded at a time, on the CPU and elsewhere."""

DECOMPOSITIONS: dict[str, type[Adapter]] = {}
"""Name of a decomposition -> its class."""


class Snapshot(NamedTuple):
    """What an adapter was when its module's state dict was taken."""

    tensors: dict[str, Tensor]
    steps: int
    drawn_at: int
    weight: str
    """What tells the weight, where that holds the increment."""


@dataclasses.dataclass(frozen=True)
class AdapterState:
    """An adapter as checkpoints hold it; what its fields say is said of :class:`Adapter`."""

    decomposition: str
    tensors: dict[str, Tensor]
    """B (r, m) or (k, r, m); A, unless it is drawn and not trained; further tensors of the decomposition."""
    shape: list[int]
    scale: float
    transposed: bool
    resample: str | None
    key: str
    steps: int
    drawn_at: int
    padding_idx: int | None = None

    @property
    def B(self) -> Tensor:
        """Projection of the outputs."""
        return self.tensors["B"]

    @property
    def rank(self) -> int:
        """r, the number of rows of A and B."""
        return self.B.shape[-2]

    def sides(self) -> tuple[list[int], int, int]:
        """Return the sizes of the stack, [k] or [], and m and n of each matrix."""
        depth = self.B.dim() - 2
        rows, columns = self.shape[depth], math.prod(self.shape[depth + 1 :])
        return (self.shape[:depth], columns, rows) if self.transposed else (self.shape[:depth], rows, columns)

    def detached(self) -> AdapterState:
        """Return it with tensors that no later step can change."""
        return dataclasses.replace(self, tensors={name: t.detach().clone() for name, t in self.tensors.items()})


class Adapter(nn.Module):
    """The low-rank increment of one weight, ``scale * B.T @ A`` (article, eq. 1, with torch's transposed layout).

    The weight is taken as a matrix (m, n) that maps n inputs to m outputs; that of a convolution as (out, in * kernel),
    a stack of matrices (k, m, n) as k matrices. Factors are stored rank-major. They keep their dtype when the module
    around them is cast (``.half()``, ``.to(torch.bfloat16)``, the ``*-true`` precisions of Lightning); only the device
    follows.

    Where it starts from A0 and B0 whose product is not zero, the increment is B^T A - B0^T A0 (article, "Optimization
    Perspective"). That is B^T (A - A0) + (B - B0)^T A0, exactly zero at the start, and no difference of large products.

    A subclass is another decomposition: ``class Mine(Adapter, decomposition="mine")`` can be asked for by that name.

    Args:
        A: Projection of the inputs, (r, n) or (k, r, n).
        B: Projection of the outputs, (r, m) or (k, r, m), same dtype as ``A``.
        shape: That of the weight; by default the matrix's, as it is stored.
        scale: alpha / r, or alpha / sqrt(r) for rsLoRA.
        dropout: Probability that an input of the increment is zeroed while training.
        transposed: Whether the weight is stored (n, m), as those of ``nn.Embedding`` and Hugging Face's ``Conv1D``.
        zero: Names of the tensors that are zero where the increment is.
        key: What its draws depend on, with its factors.
        holds: Whether the weight holds the increment, so that whoever reads it alone reads all of it.
        resample: Which factors are drawn anew while training: None, ``"both"``, or ``"A"``, which is not trained then.
        padding_idx: An input for which the increment stays zero, as that of an ``nn.Embedding``.
    """

    decomposition: ClassVar[str] = "product"
    has_inits: ClassVar[bool] = True
    """Whether it matters where A and B start."""
    has_projections: ClassVar[bool] = True
    """Whether A and B project, so that they can be drawn anew."""
    rescales: ClassVar[bool] = False
    """Whether :meth:`gain` gives a factor for each output."""
    enabled: bool = True
    """Whether the module computes with the increment; else, for a while, with W0 alone."""
    reads_plain: bool = False
    """Whether reading the weight gives the parameter itself, for a while."""
    presents_merged: bool = False
    """Whether the state dict of the module has the merged weight, and nothing of this adapter."""
    saving: dict[Adapter, Tensor] | None = None
    """While a Trainer writes a checkpoint, the merged weights that are in it, on the CPU; else None."""
    per_output: ClassVar[tuple[str, ...]] = ()
    """Names of further tensors that every checkpoint has, with one entry for each output: (m,) or (k, m)."""

    def __init_subclass__(cls, decomposition: str, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.decomposition = decomposition
        DECOMPOSITIONS[decomposition] = cls

    def __init__(
        self,
        A: Tensor,
        B: Tensor,
        shape: Sequence[int] | None = None,
        scale: float = 1.0,
        dropout: float = 0.0,
        transposed: bool = False,
        zero: Sequence[str] = ("B",),
        key: str = "",
        holds: bool = False,
        resample: str | None = None,
        padding_idx: int | None = None,
    ) -> None:
        super().__init__()
        self.A0: nn.Parameter | None
        self.B0: nn.Parameter | None
        self.A = nn.Parameter(A)
        self.B = nn.Parameter(B)
        self.register_parameter("A0", None)
        self.register_parameter("B0", None)
        sides = (A.shape[-1], B.shape[-1]) if transposed else (B.shape[-1], A.shape[-1])
        self.shape = (*A.shape[:-2], *sides) if shape is None else tuple(shape)
        self._scale = repr(float(scale))
        self.dropout = dropout
        self.transposed = transposed
        self.zero = tuple(zero)
        self.key = key
        self.holds = holds
        self.resample = resample
        self.padding_idx = padding_idx
        self.steps = 0
        """How often the weight, where it holds the increment, has followed a step."""
        self.drawn_at = 0
        """How many there were at the last draw."""
        self.lost: Tensor | None = None
        """Share of the entries moved by the last step that rounding to the nearest would have left where they were;
        known for weights below float32 whose factors are drawn anew."""
        self.fixed: tuple[str, ...] = ()
        self._followed: dict[int, int] = {}
        """Versions of the trained tensors, by their ids, of which the weight holds the increment; a copy's are others,
        and nothing is known of them."""
        self.remembered: collections.deque[Snapshot] = collections.deque(maxlen=4)
        """The last states that were given to others merged, for when they are loaded back."""
        self._given: tuple[Tensor, int] | None = None
        """A tensor without entries that counts the writes to the merged weight given last, and how many there were."""

    @classmethod
    def check_shape(cls, name: str, m: int, n: int, rank: int, init: str) -> None:
        """Raise ``ValueError`` if the layer ``name``, whose weight is m x n, cannot have this rank and start."""
        initial.check_start(name, init, m, n, rank)

    @classmethod
    def initial(
        cls,
        weight: Tensor,
        rank: int,
        seed: int,
        name: str,
        dtype: torch.dtype,
        stacked: bool = False,
        init: str = "zero",
        **kwargs: Any,
    ) -> Adapter:
        """Return an adapter for ``weight`` whose increment is zero, drawn on the CPU from ``(seed, name)`` alone.

        Where ``stacked``, the first dimension of ``weight`` counts matrices. What each ``init`` is, is said in
        ``initial.py``; a start whose product is not zero is kept as A0 and B0.
        """
        *stack, m, n = weight.shape if stacked else weight.flatten(1).shape
        m, n = (n, m) if kwargs.get("transposed") else (m, n)
        # Lightning injects under contexts that set the default dtype and device
        A, B = (torch.zeros(*stack, rank, side, dtype=dtype, device=weight.device) for side in (n, m))
        adapter = cls(A, B, weight.shape, key=f"{seed}/{name}", **kwargs)
        with torch.no_grad():
            adapter.start(weight, init)
        adapter.set_followed()
        return adapter

    @full_precision()
    def start(self, weight: Tensor, init: str) -> None:
        """Set the factors, which are zero, for the pretrained ``weight``; further parameters can be made here."""
        if self.resample is not None:
            self.draw()
            return
        A, B = initial.start(init, self.as_matrix(weight), self.rank, self.scale, self.zero, draws.generator(self.key))
        if initial.is_offset(init):
            self.start_from(A, B)
        else:
            self.A.copy_(A)
            self.B.copy_(B)
            self._clear_padding(self.A)

    @torch.no_grad()
    def start_from(self, A: Tensor, B: Tensor) -> None:
        """Start at factors whose product is not zero, and keep them as A0 and B0."""
        for name, value in (("A", A), ("B", B)):
            factor = getattr(self, name)
            factor.copy_(value)
            if name == "A":
                self._clear_padding(factor)
            setattr(self, f"{name}0", nn.Parameter(factor.detach().clone()))
        self.fix("A0", "B0")
        self.set_followed()

    @torch.no_grad()
    def draw(self) -> None:
        """Draw the factors that belong to step ``drawn_at``, from the seed, the layer's name and that number alone.

        Entries ~ N(0, 1/r), so that E[A^T A] = I and E[B^T B] = I at any rank (article, "Random Projection"). If only A
        is drawn, B is zero.
        """
        self.draw_A()
        if self.resample == "both":
            assign(self.B, self._drawn("B"))
        else:
            self.B.zero_()
        if self.resample == "A":
            self.fix("A")
        self.set_followed()

    @torch.no_grad()
    def draw_A(self) -> None:
        """Draw A alone."""
        A = self._drawn("A")
        self._clear_padding(A)
        assign(self.A, A)

    def _drawn(self, name: str) -> Tensor:
        factor = getattr(self, name)
        key = counter.key(self.key, "draw", self.drawn_at, name)
        return draws.normal(key, factor.shape, factor.device).mul_(self.rank**-0.5)

    def _clear_padding(self, A: Tensor) -> None:
        if self.padding_idx is not None:
            A[..., self.padding_idx] = 0

    def fix(self, *names: str) -> None:
        """Mark parameters as not trained."""
        self.fixed = (*self.fixed, *(name for name in names if name not in self.fixed))
        for name in names:
            getattr(self, name).requires_grad_(False)

    @property
    def is_aside(self) -> bool:
        """Whether the module computes with its parameter as it is, for a while."""
        return self.reads_plain or not self.enabled

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that are trained, by name."""
        return {name: p for name, p in self.named_parameters() if name not in self.fixed}

    @property
    def scale(self) -> float:
        """What the product is multiplied with.

        Kept as text: with ``dynamic=True`` the compiler takes a float for what may change, and fails where a weight is
        read twice, as that of an attention is.
        """
        return float(self._scale)

    @property
    def rank(self) -> int:
        """r, the number of rows of A and B."""
        return self.A.shape[-2]

    # -------------------------------------------------------------------------- what a decomposition of one's own has

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return A (r, n) and B (r, m), or what stands for them: the increment is ``scale * B.T @ A``."""
        return self.A, self.B

    def gain(self, weight: Tensor) -> Tensor | None:
        """g, (m,) or (k, m), where the weight is g (W0 + increment); differentiable. ``weight`` is the module's."""
        return None

    # ------------------------------------------------------------------------------------ the algebra of the product

    def increment(self) -> tuple[Tensor, Tensor]:
        """Return A' and B', differentiable, with as many rows as it takes: the increment is ``scale * B'.T @ A'``."""
        A, B = self.factors()
        if self.A0 is not None and self.B0 is not None:
            A, B = torch.cat([A - self.A0, self.A0], -2), torch.cat([B, B - self.B0], -2)
        return self.as_product(A, B)

    def as_product(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """Return the increment of the factors A and B as a product: A and B themselves."""
        return A, B

    def project(self, gradient: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """Return dA = s B G, dB = s A G^T from the full gradient G = dL/dW, (m, n) (article, eq. grad-1)."""
        A, B = cast((A, B), gradient.dtype)
        return scaled(self.scale, B, gradient), scaled(self.scale, A, gradient.mT)

    def project_thin(self, x: Tensor, dy: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """Return dA = s (B dY^T) X, dB = s (A X^T) dY from X (b, n) and dY (b, m), without G (article, eq. grad-2)."""
        A, B = cast((A, B), dy.dtype)
        return scaled(self.scale, B, dy.T) @ x, scaled(self.scale, A, x.T) @ dy

    def step(self, A: Tensor, B: Tensor, A_next: Tensor, B_next: Tensor) -> tuple[Tensor, Tensor]:
        """Return the step from A and B to A' and B' as factors of its own, for :meth:`add_step`; of stacks too.

        B'^T A' - B^T A = (B' - B)^T A' + B^T (A' - A): one product of rank 2r, and no difference of two large ones.
        """
        return torch.cat([A_next, A_next - A], -2), torch.cat([B_next - B, B], -2)

    def add_step(self, matrix: Tensor, A: Tensor, B: Tensor) -> None:
        """Add the increment of a step, whose factors A and B :meth:`step` gave, to ``matrix`` (m, n) in place."""
        (matrix.baddbmm_ if matrix.dim() == 3 else matrix.addmm_)(B.mT, A, alpha=self.scale)

    # ------------------------------------------------------------------------------------------- weights, in and out

    def as_matrix(self, weight: Tensor) -> Tensor:
        """Return ``weight``, or a tensor of its shape, as (m, n) or (k, m, n); a view wherever there can be one."""
        matrix = weight.flatten(self.A.dim() - 1)
        return matrix.mT if self.transposed else matrix

    @torch.no_grad()
    @full_precision()
    def delta_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the increment in the weight's layout and shape, at least in ``dtype``.

        It is a full tensor also where factors are sharded: all processes call this together.
        """
        return full_adapters([self])[0].formed(dtype)

    def formed(self, dtype: torch.dtype) -> Tensor:
        """Return :meth:`delta_weight` of full factors."""
        return self.delta(*self.increment(), dtype)

    def delta(self, A: Tensor, B: Tensor, dtype: torch.dtype) -> Tensor:
        """Return ``scale * B.T @ A``, differentiable, in the weight's layout, all rows or some; ``dtype`` or more."""
        dtype = torch.promote_types(A.dtype, dtype)
        A, B = A.to(dtype), B.to(dtype)
        with torch.autocast(A.device.type, enabled=False):
            delta = self.scale * (A.mT @ B if self.transposed else B.mT @ A)
        return delta.view(-1, *self.shape[1:])

    def by_rows(self, gain: Tensor) -> Tensor:
        """Shape ``gain``, (m,) or (k, m), to be multiplied with a tensor of the weight's shape."""
        return gain.unsqueeze(-2) if self.transposed else gain.view(*gain.shape, *(1 for _ in self.shape[gain.dim() :]))

    @torch.no_grad()
    @full_precision()
    def folded_into(self, weight: Tensor) -> Tensor:
        """Return W = W0 + delta in the dtype of W0, rounded once from float32 or more; W0 where delta is zero."""
        if self._is_zero():
            return weight.detach().clone()  # not W0 + 0, which would turn -0.0 into 0.0
        return self._rounded_once(weight, lambda W0, delta, _: W0 + delta)

    def _rounded_once(self, weight: Tensor, formula: Callable[[Tensor, Tensor, slice], Tensor]) -> Tensor:
        """Return ``formula(weight, delta, rows)``, of at least float32, in the dtype and shape of ``weight``.

        A product is formed some rows at a time: on the CPU these stay in its cache, and no device holds all of delta.
        """
        full, dtype, result = full_adapters([self])[0], self.sum_dtype(weight), torch.empty_like(weight)
        in_parts = type(self).formed is Adapter.formed
        each = _rows_at_a_time(weight) if in_parts else max(1, len(weight))
        factors = full.increment() if in_parts else ()
        for start in range(0, len(weight), each):
            rows = slice(start, start + each)
            delta = full.delta(*full.of_rows(rows, *factors), dtype) if in_parts else full.formed(dtype)
            result[rows] = formula(weight[rows].to(dtype), delta, rows)
        return result

    def sum_dtype(self, weight: Tensor) -> torch.dtype:
        """Return the dtype in which the increment, or a step, is added to ``weight``."""
        return torch.promote_types(torch.promote_types(self.A.dtype, weight.dtype), torch.float32)

    @torch.no_grad()
    def hold(self, weight: Tensor) -> None:
        """Fold the increment into ``weight``, which is W0 and is to hold it from here on."""
        weight.copy_(self.folded_into(weight))

    @torch.no_grad()
    @full_precision()
    def folded_out_of(self, weight: Tensor) -> tuple[Tensor, float]:
        """Return W0 = W - delta in W's dtype, and a bound of every entry's error if W is what ``folded_into`` gave.

        Both sums are rounded once to the dtype in which they are formed and once to the dtype of W, each time by half
        an ulp at the most: the bound is (u + u') (max|W| + max|W0|), with u, u' the two units of roundoff, plus the
        smallest subnormal for what underflows.
        """
        if self._is_zero():
            return weight.detach().clone(), 0.0
        base = self._rounded_once(weight, lambda W, delta, _: W - delta)
        return base, _bound(weight, base, self.sum_dtype(weight))

    @torch.no_grad()
    def held(self) -> tuple[Tensor, Tensor]:
        """Return the factors as they are, which :meth:`follow` must know when they have changed."""
        A, B = self.factors()
        return A.detach().clone(), B.detach().clone()

    def factors_with(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return what :meth:`factors` gives where ``tensors`` stand for the parameters of their names."""
        own = self._parameters
        vars(self)["_parameters"] = {**own, **tensors}
        try:
            return self.factors()
        finally:
            vars(self)["_parameters"] = own

    def follow(self, weight: Tensor, A: Tensor, B: Tensor, rows: slice | None = None) -> None:
        """Take ``weight``, which holds the increment of ``A`` and ``B``, to that of the factors as they are now.

        ``rows``, if given, are those of the whole weight that ``weight`` is.
        """
        self.take_step(weight, *steps([self], [(A, B)], self.sum_dtype(weight))[0], rows)

    @torch.no_grad()
    @full_precision()
    def take_step(self, weight: Tensor, A: Tensor, B: Tensor, rows: slice | None = None) -> None:
        """Add a step, whose factors are A and B, to ``weight``, which holds the increment.

        A weight below float32 would lose every update smaller than half an ulp: it is rounded stochastically, by random
        bits that depend on ``key``, the number of the step and the place of the entry alone.
        """
        dtype = self.sum_dtype(weight)
        counts = []
        with torch.autocast(weight.device.type, enabled=False):  # which is on in a manual optimization's step
            for part, own in self._parts(weight, rows):
                work = part if part.dtype == dtype and part.is_contiguous() else part.to(dtype).contiguous()
                self.add_step(self.as_matrix(work), *self.of_rows(own, A, B))
                if work is not part:
                    counts += self._write(part, work, own)
        if counts:
            kept, moved = torch.stack(counts).sum(0)
            self.lost = kept / moved.clamp_min(1)

    def _parts(self, weight: Tensor, rows: slice | None) -> Iterator[tuple[Tensor, slice | None]]:
        """Yield ``weight`` in parts where it is rounded: what they take besides is small and stays in a cache."""
        each = _rows_at_a_time(weight)
        if not self.has_rows or weight.dtype.itemsize >= 4 or each >= len(weight):
            yield weight, rows
            return
        first = 0 if rows is None else rows.start
        for start in range(0, len(weight), each):
            part = weight[start : start + each]
            yield part, slice(first + start, first + start + len(part))

    def versions(self) -> tuple[int, ...]:
        """Return how often each trained tensor has been written to."""
        return tuple(p._version for p in self.trained.values())

    def set_followed(self) -> None:
        """Take the weight, where it holds the increment, to hold that of the trained tensors as they are now."""
        self._followed = {id(p): p._version for p in self.trained.values()} if self.holds else {}

    def check_followed(self) -> None:
        """Raise ``LoRAError`` if the weight is to hold the increment and A or B were written since it last did.

        Processes of a group may write to each other's tensors, so there nothing can be told.
        """
        stale = any(self._followed.get(id(p), p._version) != p._version for p in self.trained.values())
        if stale and not (dist.is_available() and dist.is_initialized()):
            raise LoRAError(
                f"The adapter of {self.key.partition('/')[2]!r} was changed, and its weight, which holds the increment,"
                " did not follow. Call `lightning_lora.attach(module, optimizer)` before the first step and let that"
                " optimizer alone change A and B; or use `gradient='factored'`, in which nothing has to follow."
            )

    @property
    def has_rows(self) -> bool:
        """Whether :meth:`take_step` can take some rows of a weight, for which it takes these rows' factors alone."""
        kind = type(self)
        return kind.take_step is Adapter.take_step and kind.add_step is Adapter.add_step

    def of_rows(self, rows: slice | None, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """Return the factors of ``rows`` of the weight, as it is stored: of outputs, inputs, or matrices of a stack."""
        if rows is None:
            return A, B
        if A.dim() == 3:
            return A[rows], B[rows]
        return (A[:, rows], B) if self.transposed else (A, B[:, rows])

    def _write(self, weight: Tensor, value: Tensor, rows: slice | None = None) -> list[Tensor]:
        """Write ``value``, rounded, into ``weight``, which is ``rows`` of the whole one.

        Returns:
            Where factors are drawn anew, (2,): how many entries rounding to the nearest would have left where they
            were, of how many that moved.
        """
        if weight.dtype.itemsize >= 4:
            weight.copy_(value)
            return []
        key = counter.key(self.key, "round", self.steps)
        first = 0 if rows is None else rows.start * math.prod(weight.shape[1:])
        each, counts = _rows_at_a_time(weight), []
        for part, new in zip(weight.split(each), value.split(each), strict=True):
            rounded = round_stochastically(new, part.dtype, key, first)
            if self.resample is not None:
                moved = new != part
                kept = moved & (new.to(part.dtype) == part)
                counts.append(torch.stack([kept.sum(), moved.sum()]))
            part.copy_(rounded)
            first += part.numel()
        return counts

    # ------------------------------------------------------------------------------------------------------- states

    def without_increment(self, weight: Tensor) -> dict[str, Tensor]:
        """Return the state in which the increment of ``weight``, a full tensor, is zero.

        Where factors are drawn anew, what they are is no part of a weight's increment: only their steps are added.
        """
        state = {name: tensor.detach() for name, tensor in self.state_dict().items()}
        if self.resample is not None:
            return state
        if self.A0 is not None:
            return {**state, "A": state["A0"], "B": state["B0"]}
        return {**state, **{name: torch.zeros_like(state[name]) for name in self.zero}}

    def saved(self) -> dict[str, Tensor]:
        """Return the tensors that a checkpoint needs: not a factor that the seed and the number of steps give."""
        left_out = ("A",) if self.resample == "A" else ()
        return {name: tensor.detach() for name, tensor in self.state_dict().items() if name not in left_out}

    def gathered(self, own: Mapping[str, Tensor], full: Mapping[str, Tensor]) -> Adapter:
        """Return this adapter, whose state is ``own``; where its ``full`` tensors are others, a copy with these."""
        return self if all(full[name] is tensor for name, tensor in own.items()) else self.with_tensors(full)

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Adapter:
        """Return a copy with ``tensors`` in the place of its own."""
        other = copy.copy(self)
        other._parameters = {
            name: None if p is None else nn.Parameter(tensors[name], requires_grad=False)
            for name, p in self._parameters.items()
        }
        other._buffers = {name: None if b is None else tensors[name] for name, b in self._buffers.items()}
        return other

    def state(self, weight: Tensor) -> AdapterState:
        """Return what a checkpoint needs to make this adapter again. ``weight`` is the module's."""
        return AdapterState(
            decomposition=self.decomposition,
            tensors=self.saved(),
            shape=list(self.shape),
            scale=self.scale,
            transposed=self.transposed,
            resample=self.resample,
            key=self.key,
            steps=self.steps,
            drawn_at=self.drawn_at,
            padding_idx=self.padding_idx,
        )

    @torch.no_grad()
    def resume(self, state: AdapterState) -> dict[str, Tensor]:
        """Count steps from where ``state``, of an adapter like this, was taken; return its tensors."""
        self.steps, self.drawn_at = state.steps, state.drawn_at
        if self.resample == "A":
            self.draw()
        tensors = {name: state.tensors.get(name, tensor) for name, tensor in self.state_dict().items()}
        if self.resample == "A" and "A" in state.tensors:
            self._clear_padding(tensors["A"])  # in a file it is all drawn
        return tensors

    def remember(self, weight: str) -> None:
        """Keep the tensors as they are, if they are not the last ones that were kept."""
        now = {name: tensor.detach().clone() for name, tensor in self.state_dict().items()}
        last = self.remembered[-1] if self.remembered else None
        if last is None or last.weight != weight or any(not torch.equal(now[n], t) for n, t in last.tensors.items()):
            self.remembered.append(Snapshot(now, self.steps, self.drawn_at, weight))

    def watch_given(self, merged: Tensor) -> None:
        """Have :meth:`given_was_written` tell of ``merged``, which is not kept for it."""
        if not merged.is_inference():
            counts = merged.detach()  # shares the version counter, also without the data
            counts.data = merged.new_empty(0)
            self._given = counts, counts._version

    def given_was_written(self) -> bool:
        """Return whether the merged weight that a state dict gave last was written to, and forget it."""
        given, self._given = self._given, None
        return given is not None and given[0]._version > given[1]

    def recall(self, snapshot: Snapshot) -> None:
        """Become what ``snapshot`` says again."""
        self.load_tensors(snapshot.tensors)
        self.steps, self.drawn_at = snapshot.steps, snapshot.drawn_at

    @torch.no_grad()
    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy ``tensors``, by their names in the adapter's own state dict, into it."""
        own = self.state_dict()
        for name, value in tensors.items():
            assign(own[name], value)
        self.set_followed()

    @classmethod
    def from_state(cls, state: AdapterState) -> Adapter:
        """Return the adapter that ``state`` was taken of, to fold it into a weight or out."""
        tensors, drawn = dict(state.tensors), "A" not in state.tensors
        kind, B = DECOMPOSITIONS[state.decomposition], tensors.pop("B")
        _, _, n = state.sides()
        A = B.new_zeros(*B.shape[:-1], n) if drawn else tensors.pop("A")
        adapter = kind(A, B, state.shape, state.scale, 0.0, state.transposed, key=state.key)
        adapter.padding_idx = state.padding_idx
        for name, value in tensors.items():
            adapter.register_parameter(name, nn.Parameter(value, requires_grad=False))
        if drawn:
            adapter.resample, adapter.drawn_at = state.resample, state.drawn_at
            adapter.draw_A()
        return adapter

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return A, B and what else there is; leave them out of a module's state dict that has merged weights."""
        destination = kwargs.get("destination", args[0] if args else None)
        if self.presents_merged and destination is not None:
            return destination
        return super().state_dict(*args, **kwargs)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if not self.presents_merged or any(key.startswith(prefix) for key in state_dict):
            super()._load_from_state_dict(state_dict, prefix, *args)
            self.set_followed()

    def forward(self, *_: Any, **__: Any) -> Any:
        """Refuse to be called."""
        raise RuntimeError("An adapter is not a layer: call the module that carries it.")

    def extra_repr(self) -> str:
        stack = f"{self.A.shape[0]} x " if self.A.dim() == 3 else ""
        n, m = self.A.shape[-1], self.B.shape[-1]
        return f"{stack}{n} -> {m}, rank={self.rank}, scale={self.scale:g}, dtype={self.A.dtype}"

    def _is_zero(self) -> bool:
        A, B = self.increment()
        return not (A.any() and B.any())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Adapter:
        def keep_dtype(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            return result if result.dtype == tensor.dtype else tensor.to(result.device)

        return super()._apply(keep_dtype, recurse)


DECOMPOSITIONS[Adapter.decomposition] = Adapter


def full_adapters(adapters: Sequence[Adapter]) -> list[Adapter]:
    """Return ``adapters``; of those whose tensors are sharded, copies with full tensors, which are gathered together.

    All processes call this together. A copy counts its steps from where it was made.
    """
    states = [adapter.state_dict() for adapter in adapters]
    return [a.gathered(own, full) for a, own, full in zip(adapters, states, full_states(states), strict=True)]


@torch.no_grad()
def steps(
    adapters: Sequence[Adapter], before: Sequence[tuple[Tensor, Tensor]], dtype: torch.dtype
) -> list[tuple[Tensor, Tensor]]:
    """Return what :meth:`Adapter.step` gives for each of ``adapters``, alike in class and shapes, computed together.

    Args:
        adapters: With full tensors, after the step.
        before: The factors that each had before it.
        dtype: Of the sums.
    """
    each = [(*factors, *adapter.factors()) for adapter, factors in zip(adapters, before, strict=True)]
    stacked = [torch.stack(factors).to(dtype) for factors in zip(*each, strict=True)]
    return list(zip(*(factor.unbind() for factor in adapters[0].step(*stacked)), strict=True))


def _rows_at_a_time(weight: Tensor) -> int:
    """Return how many rows of ``weight`` are rounded at a time."""
    return max(1, (_PART_ON_CPU if weight.device.type == "cpu" else _PART) // max(1, math.prod(weight.shape[1:])))


def _bound(weight: Tensor, base: Tensor, dtype: torch.dtype) -> float:
    roundoff = (torch.finfo(dtype).eps + torch.finfo(weight.dtype).eps) / 2
    largest = weight.abs().max().item() + base.abs().max().item()
    subnormal = torch.finfo(weight.dtype).smallest_normal * torch.finfo(weight.dtype).eps
    return roundoff * (1 + roundoff) * largest + subnormal
