"""The callback: Lightning's hooks in the order in which a run calls them. It composes and computes nothing."""

from __future__ import annotations

import os
import weakref
import zipfile
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    Callback,
    ModelPruning,
    ModelSummary,
    StochasticWeightAveraging,
)
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.optim import Optimizer

from lightning_lora import checkpoint as ckpt
from lightning_lora.attach import Handle, attach
from lightning_lora.hosts import Swapped, swap, unswap
from lightning_lora.inject import adapters, inject_options, injections, merge, places
from lightning_lora.options import CHECKPOINTS, Options, check_choice
from lightning_lora.summary import print_summary

try:  # from Lightning 2.6
    from lightning.pytorch.callbacks import WeightAveraging
except ImportError:  # pragma: no cover
    WeightAveraging = StochasticWeightAveraging  # type: ignore[assignment, misc]


class LoRA(Callback):
    """Trains low-rank increments of the pretrained weights, W = W0 + scale * B^T A, and saves merged weights.

    From "LoRA: Low-Rank Adaptation of Large Language Models" (Hu et al., 2021). Added to a
    :class:`~lightning.pytorch.Trainer`, it puts adapters into the LightningModule when ``fit`` starts, freezes all
    else, and makes the module plain again, with merged weights, when ``fit`` ends. Every checkpoint holds the
    ``state_dict`` of the plain model and resumes the LoRA run.

    Args:
        rank: r, the rank of the increments; at most the smallest side of any target.
        alpha: The increments are scaled by alpha / r. The default makes the scale 1.
        target_modules: Which modules get an adapter, by PEFT's rules: ``"all-linear"`` is every Linear and ``Conv1D``
            but the output head of a Hugging Face model; any other string is a regular expression that must match the
            module's whole name; a list holds names or their dotted suffixes; None is no module.
        exclude_modules: Which of these do not, by the same rules.
        target_parameters: Which other parameters get one, by the same rules for their names: any of two dimensions or
            more, in any module, adapted as by ``gradient="projected"``. A stack (k, m, n) gets k adapters.
        modules_to_save: Modules that are trained in full, such as a new head, by the same rules.
        rank_pattern: Names, or regular expressions for names or their dotted suffixes, with a rank of their own.
        alpha_pattern: The same for alpha.
        use_rslora: Scale by alpha / sqrt(r) instead.
        bias: Which biases are trained: ``"none"``, ``"all"``, or ``"lora_only"``, those of the adapted modules.
        dropout: Probability that an input of an increment is zeroed while training. Drawn, as by ``nn.Dropout``, from
            torch's global generator.
        gradient: How the gradients of A and B are computed. ``"factored"``: the weight stays W0 and the increment is
            computed beside it (seed, eq. lora-2). ``"merged"``: the weight is W0 + increment at all times, so the
            forward costs what the base model's does; the gradients are the same thin products. ``"projected"``: the
            same, with the full gradient of each weight projected (seed, eq. grad-1); for any module. A module that
            cannot be factored is adapted by the last in any case.
        adapter_dtype: ``"float32"``, ``"bfloat16"``, ``"float16"`` or ``"float64"``, whatever the precision of the
            Trainer. Products are computed in the dtype of the activations.
        checkpoint: ``"merged"``: the ``state_dict`` in a checkpoint is that of the plain model, with merged weights.
            ``"adapter"``: it holds only what was trained, and buffers; it loads where the pretrained weights are the
            same, through this callback.
        seed: The start of A depends on this and on the module's name, not on the global generator.
        exact_resume: Refuse to resume on other weights than those that were frozen when the checkpoint was saved,
            instead of recovering these from the merged weights up to rounding, with a warning.

    Raises:
        ValueError: If an option has a bad value; in ``fit``, if it matches nothing in the module.
        MisconfigurationException: In ``fit``, if the module or the Trainer cannot be used with adapters.

    Example::

        >>> from lightning.pytorch import Trainer
        >>> from lightning_lora import LoRA
        >>> trainer = Trainer(callbacks=[LoRA(rank=8, target_modules=["q_proj", "v_proj"])], logger=False)
    """

    def __init__(
        self,
        rank: int = 8,
        alpha: float | None = None,
        target_modules: str | list[str] | None = "all-linear",
        exclude_modules: str | list[str] | None = None,
        target_parameters: str | list[str] | None = None,
        modules_to_save: str | list[str] | None = None,
        rank_pattern: dict[str, int] | None = None,
        alpha_pattern: dict[str, float] | None = None,
        use_rslora: bool = False,
        bias: str = "none",
        dropout: float = 0.0,
        gradient: str = "factored",
        adapter_dtype: str = "float32",
        checkpoint: str = "merged",
        seed: int = 0,
        exact_resume: bool = False,
    ) -> None:
        self.options = Options(
            rank=rank,
            alpha=alpha,
            target_modules=target_modules,
            exclude_modules=exclude_modules,
            target_parameters=target_parameters,
            modules_to_save=modules_to_save,
            rank_pattern=rank_pattern,
            alpha_pattern=alpha_pattern,
            use_rslora=use_rslora,
            bias=bias,
            dropout=dropout,
            gradient=gradient,
            adapter_dtype=adapter_dtype,
            seed=seed,
        )
        check_choice("checkpoint", checkpoint, CHECKPOINTS)
        if not isinstance(exact_resume, bool):
            raise ValueError(f"`exact_resume` must be True or False, got {exact_resume!r}.")
        self.checkpoint = checkpoint
        self.exact_resume = exact_resume
        self._fingerprints = ckpt.Fingerprints()
        self._idle: set[str] = set()
        self._handles: list[Handle] = []
        self._held: tuple[weakref.ref[pl.LightningModule], dict[str, Any]] | None = None
        self._waits_for_file = False
        self._trains = False

    # ------------------------------------------------------------------------------------------------ before the run

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Takes part in three hooks of the module.

        The layers may not exist yet: ``LightningModule.setup`` and ``configure_model`` come after this. And the
        module's own hooks are the only ones that Lightning calls before it loads a checkpoint, and the only ones it
        calls when it saves weights only.
        """
        if isinstance(pl_module, _Run):
            earlier = pl_module.lora_callback
            if earlier is not self and earlier in _callbacks(trainer):
                raise MisconfigurationException(
                    "The Trainer has two LoRA callbacks. Use one: `target_modules` may name modules anywhere, with"
                    " `rank_pattern` and `alpha_pattern` for those that differ."
                )
            earlier._make_plain(pl_module)  # a tuner failed before any callback could hear of it
        if stage == "fit":
            _refuse_unsupported(trainer)
            self._held = None
            self._fingerprints = ckpt.Fingerprints()
        self._trains = False
        pl_module.lora_callback = self  # type: ignore[assignment]
        swap(pl_module, _Run)

    def configured(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Injects when all layers exist, unless the module's own code has injected the same adapters.

        What Lightning does next is to read the checkpoint, if it was given one; only then does it tell which.
        """
        self._waits_for_file = True
        if trainer.state.fn != "fit":
            return
        present = list(injections(pl_module))
        if not present:
            inject_options(pl_module, self.options)
        elif any(injection.options != self.options for injection in present):
            raise MisconfigurationException(
                f"{type(pl_module).__name__} has adapters from an earlier `inject` with the options"
                f" {present[0].options}, and the callback has {self.options}. Give both the same."
            )
        self._trains = True
        held = [place.name for place in places(pl_module) if place.host.holds_increment]
        if held and self.checkpoint == "adapter":
            raise MisconfigurationException(
                f"`checkpoint='adapter'` needs frozen weights, and that of {held[0]!r} holds its increment and is not"
                " W0 any more. Use `checkpoint='merged'`, or `gradient='factored'` and only layers that it supports."
            )

    def loaded(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Gives the module, which loads its weights next, W0 and adapters in the place of merged weights."""
        self._waits_for_file = False
        ckpt.take_in(checkpoint, pl_module, self.exact_resume, self._held_by(pl_module))
        payload = checkpoint.get(ckpt.KEY)
        self._held = None if payload is None or adapters(pl_module) else (weakref.ref(pl_module), payload)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Checks that what was injected will be trained, and says what it is."""
        _check_trained(trainer, pl_module)
        self._idle = set(adapters(pl_module))
        if trainer.is_global_zero and any(isinstance(callback, ModelSummary) for callback in _callbacks(trainer)):
            print_summary(pl_module)

    # ---------------------------------------------------------------------------------------------------- in the run

    def starts(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Has weights that hold their increment follow the optimizers, if they do not yet.

        A tuner trains before ``on_fit_start`` and calls no callbacks; the module's own hook is called in any case. What
        the tuner calls in their place gets this one too, to hear of an exception.
        """
        if self not in _callbacks(trainer):
            _callbacks(trainer).append(self)
        if not self._handles and any(place.host.holds_increment for place in places(pl_module)):
            self._handles = [
                attach(pl_module, optimizer) for optimizer in _optimizers_with_adapters(trainer, pl_module)
            ]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Checks again: the module's own ``on_fit_start`` may have frozen everything."""
        _check_trained(trainer, pl_module)

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Strikes out, until the first batch is over, the adapters that a gradient reached."""
        if self._idle:
            known = adapters(pl_module)
            self._idle = {name for name in self._idle if known[name].B.grad is None and known[name].A.grad is None}

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Looks again, for a module that calls ``loss.backward()`` itself."""
        self.on_after_backward(trainer, pl_module)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Names the adapters that no gradient reached in the first batch."""
        if self._idle:
            rank_zero_warn(
                f"No gradient reached the adapters of {', '.join(sorted(self._idle))} in the first batch. They stay at"
                " zero unless later batches use these modules. If a reentrant activation checkpoint is round them,"
                " use `use_reentrant=False`: a frozen input gives it no gradient to pass on."
            )
            self._idle = set()

    def saved(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Merges what is about to be written; full checkpoints and those with weights only come through here."""
        if adapters(pl_module):
            state = checkpoint["state_dict"]
            payload = ckpt.take_apart(state, pl_module, self.options, self.checkpoint, self._fingerprints)
            ckpt.put_out(state, payload)
            checkpoint[ckpt.KEY] = payload

    # ------------------------------------------------------------------------------------------------- after the run

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leaves a plain module behind; Lightning calls no ``teardown`` after an exception.

        Raises:
            ValueError: If the reason was that the checkpoint is truncated, which the exception does not tell.
        """
        self._make_plain(pl_module)
        if self._waits_for_file and isinstance(exception, Exception) and _is_truncated(trainer.ckpt_path):
            raise ValueError(f"The checkpoint {str(trainer.ckpt_path)!r} is truncated.") from exception

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leaves a plain module behind, with merged weights."""
        self._make_plain(pl_module)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """After ``fit`` the module is plain, and what it takes to resume is no longer in it."""
        if (payload := self._held_by(pl_module)) is not None and not adapters(pl_module):
            if payload["form"] == "adapter":
                ckpt.put_out(checkpoint["state_dict"], payload)
            checkpoint[ckpt.KEY] = payload

    def _held_by(self, pl_module: pl.LightningModule) -> dict[str, Any] | None:
        """The adapters that are folded into the weights of ``pl_module``, as they stand in a checkpoint."""
        return self._held[1] if self._held is not None and self._held[0]() is pl_module else None

    def _make_plain(self, pl_module: pl.LightningModule) -> None:
        if not isinstance(pl_module, _Run) or pl_module.lora_callback is not self:
            return
        for handle in self._handles:
            handle.remove()
        self._handles = []
        unswap(pl_module)
        del pl_module.lora_callback
        if self._trains and adapters(pl_module):
            state = pl_module.state_dict()
            payload = ckpt.take_apart(state, pl_module, self.options, self.checkpoint, self._fingerprints)
            self._held = weakref.ref(pl_module), payload
            merge(pl_module)


class _Run(Swapped, pl.LightningModule):
    """What a LightningModule is besides itself from ``setup`` to ``teardown``: one that tells the callback."""

    lora_callback: LoRA

    def configure_model(self) -> None:
        super().configure_model()
        self.lora_callback.configured(self.trainer, self)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.lora_callback.loaded(self.trainer, self, checkpoint)

    def on_train_start(self) -> None:
        self.lora_callback.starts(self.trainer, self)
        super().on_train_start()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The user's hook comes last and sees what it would see without adapters."""
        self.lora_callback.saved(self.trainer, self, checkpoint)
        super().on_save_checkpoint(checkpoint)


REFUSED: Mapping[type[Callback], str] = {
    BaseFinetuning: "it freezes and unfreezes the parameters that LoRA has frozen; LoRA replaces it",
    ModelPruning: "it rewrites the frozen weights while adapters are trained on them",
    StochasticWeightAveraging: "it averages A and B, and the average of products is not the product of averages",
    WeightAveraging: "it averages A and B, and the average of products is not the product of averages",
}


def _refuse_unsupported(trainer: pl.Trainer) -> None:
    supported: tuple[type[Strategy], ...] = (SingleDeviceStrategy, DDPStrategy)
    if not isinstance(trainer.strategy, supported):
        raise MisconfigurationException(
            f"LoRA does not support {type(trainer.strategy).__name__}, which shards or wraps the module. It supports"
            f" {' and '.join(strategy.__name__ for strategy in supported)}."
        )
    for callback in _callbacks(trainer):
        for kind, reason in REFUSED.items():
            if isinstance(callback, kind):
                raise MisconfigurationException(
                    f"LoRA cannot be combined with {type(callback).__name__}: {reason}. Remove one of them."
                )


def _check_trained(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Every adapter needs an optimizer, and no adapted weight may be trained besides."""
    optimized = {p for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]}
    for place in places(pl_module):
        name, adapter = place.name, place.adapter
        if place.weight.requires_grad:
            raise MisconfigurationException(
                f"The weight of {name!r} was unfrozen after its adapter was put in. An adapted weight stays frozen; to"
                " train a module in full, name it in `modules_to_save`."
            )
        if not all(p.requires_grad for p in adapter.parameters()):
            raise MisconfigurationException(
                f"The adapter of {name!r} is frozen, so it would not be trained. Do not freeze the module after `setup`"
                " and `configure_model`: LoRA freezes the pretrained weights by itself."
            )
        if not all(p in optimized for p in adapter.parameters()):
            raise MisconfigurationException(
                f"No optimizer has the adapter of {name!r}. Make the optimizer in `configure_optimizers`, of"
                " `self.parameters()` or those of them that require gradients: it is called after the adapters are put"
                " in. A list made in `__init__` is older than they are, and so is what LightningCLI's `--optimizer`"
                " makes; there, let the module take an `OptimizerCallable`."
            )


def _callbacks(trainer: pl.Trainer) -> list[Callback]:
    return trainer.callbacks  # type: ignore[attr-defined]


def _optimizers_with_adapters(trainer: pl.Trainer, pl_module: pl.LightningModule) -> list[Optimizer]:
    factors = {p for adapter in adapters(pl_module).values() for p in adapter.parameters()}
    return [
        optimizer
        for optimizer in trainer.optimizers
        if any(p in factors for group in optimizer.param_groups for p in group["params"])
    ]


def _is_truncated(path: Any) -> bool:
    """Whether the file begins as a zip archive, as ``torch.save`` writes, and ends before its table of contents."""
    if path is None or not os.path.isfile(path):
        return False
    with open(path, "rb") as file:
        begins = b"PK\x03\x04".startswith(file.read(4))
    return begins and not zipfile.is_zipfile(path)
