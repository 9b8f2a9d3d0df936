"""The callback: Lightning's hooks in the order in which a run calls them. It composes and computes nothing."""

from __future__ import annotations

import weakref
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import (
    Callback,
    ModelSummary,
)
from lightning.pytorch.plugins import BitsandbytesPrecision
from lightning.pytorch.strategies import (
    DDPStrategy,
    ModelParallelStrategy,
)
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.optim import Optimizer

from lightning_lora.adapters import Adapter
from lightning_lora.checkpoint import states as ckpt
from lightning_lora.checkpoint.format import KEY, damage
from lightning_lora.errors import LoRAError, warn
from lightning_lora.hosts import Swapped, swap, unswap
from lightning_lora.injection.gradient_start import PASSES, start_from_gradients
from lightning_lora.injection.inject import adapters, inject_options, injections, merge, merging_errors, places
from lightning_lora.injection.options import (
    CHECKPOINTS,
    AdapterDtype,
    Bias,
    Checkpoint,
    Decomposition,
    Gradient,
    Init,
    Options,
    Resample,
    ResampleMoments,
    check_choice,
    known_options_only,
)
from lightning_lora.memory.report import MemoryMeter, MemoryReport
from lightning_lora.steps.attach import Handle, attach
from lightning_lora.trainer import support as checks
from lightning_lora.trainer.first_batches import first_losses
from lightning_lora.trainer.tables import print_summary
from lightning_lora.weights import sharded as shards
from lightning_lora.weights.quantized import TorchAO, quantize, storages, torch_linear


class LoRA(Callback):
    """Trains low-rank increments of the pretrained weights, W = W0 + scale * B^T A, and saves merged weights.

    From "LoRA: Low-Rank Adaptation of Large Language Models" (Hu et al., 2021). Added to a
    :class:`~lightning.pytorch.Trainer`, it puts adapters into the LightningModule when ``fit`` starts, freezes all
    else, and makes the module plain again, with merged weights, when ``fit`` ends. Every checkpoint holds the
    ``state_dict`` of the plain model and resumes the LoRA run. Weights that bitsandbytes or torchao have quantised stay
    as they are in the run; after it, and in checkpoints, they are merged and plain.

    Args:
        rank: r, the rank of the increments. Where a weight cannot have it (it exceeds the smallest side, or does not
            divide both for ``decomposition="additive"``), the weight gets the next lower one that it can have.
        alpha: The increments are scaled by alpha / r, with the r that a weight has. The default makes the scale 1.
        target_modules: Which modules get an adapter. ``"all"`` is every layer that multiplies its input by a weight:
            Linear and what is like it, convolutions and transposed ones, Bilinear, attention, RNN, LSTM and GRU, stacks
            of experts; no embeddings, and no output head of a Hugging Face model or tied to an embedding. By PEFT's
            rules, ``"all-linear"`` is every Linear and ``Conv1D`` but such a head; any other string is a regular
            expression that must match the module's whole name; a list holds names or their dotted suffixes; None is no
            module. Of a module that is a layer of no kind, the layers inside are meant. ``"all"`` and ``"all-linear"``
            take what requires a gradient, unless nothing does, and leave out what cannot carry an adapter; the table
            says what. What is named has to be possible.
        exclude_modules: Which of these do not, by the same rules.
        target_parameters: Which other parameters get one, by the same rules for their names: any of two dimensions or
            more, in any module, adapted as by ``gradient="projected"``. A stack (k, m, n) gets k adapters.
        modules_to_save: Modules or parameters that are trained in full, such as a new head or ``"cls_token"``, by the
            same rules.
        rank_pattern: Names, or regular expressions for names or their dotted suffixes, with a rank of their own, which
            these weights have to be able to have.
        alpha_pattern: The same for alpha.
        use_rslora: Scale by alpha / sqrt(r) instead.
        bias: Which biases are trained: ``"none"``, ``"all"``, or ``"lora_only"``, those of the adapted modules.
        dropout: Probability that an input of an increment is zeroed while training. Drawn, as by ``nn.Dropout``, from
            torch's global generator.
        decomposition: What the increment is. ``"product"``: B^T A. ``"additive"``: A and B repeated and added, the
            seed's variant, of a rank up to 2r; the rank divides both sides of the weight. ``"dora"``: the product,
            with a trained magnitude for each output. Or the name of a subclass of :class:`~lightning_lora.Adapter`.
        init: Where A and B start, always with the function unchanged. ``"zero"``: A random, B zero. ``"symmetric"``:
            both random, A0 B0 taken away (seed, "Optimization Perspective"). ``"orthogonal"``: both random with
            A0 B0 = 0. ``"pissa"``: the principal singular vectors of the weight, by the exact decomposition, or by a
            randomised one with q iterations as ``"pissa_niter_q"``. ``"gradient"``: singular vectors of the gradient
            over the first batches (LoRA-GA).
        gradient: How the gradients of A and B are computed. ``"factored"``: the weight stays W0 and the increment is
            computed beside it (seed, eq. lora-2). ``"merged"``: the weight is W0 + increment at all times, so the
            forward costs what the base model's does; the gradients are the same thin products. ``"projected"``: the
            same, with the full gradient of each weight projected (seed, eq. grad-1); for any module. A module that
            cannot be factored is adapted by the last in any case.
        resample_every_n_steps: After how many optimizer steps the increment stays in the weight and the projections are
            drawn anew (seed, "Random Projection"); needs ``"merged"`` or ``"projected"``.
        resample: Which: ``"both"``, A and B, or ``"A"`` alone, which is then not trained, so that B starts at zero
            again and the backward keeps Z instead of X.
        resample_moments: What becomes of the optimizer's moments at a draw: ``"transfer"`` projects them anew, for SGD,
            Adam and AdamW; ``"reset"`` forgets them; ``"keep"`` leaves them.
        lr_ratio: The learning rate of B over that of A. Hayou et al., "LoRA+" (2024).
        adapter_dtype: ``"float32"``, ``"bfloat16"``, ``"float16"`` or ``"float64"``, whatever the precision of the
            Trainer. Products are computed in the dtype of the activations.
        checkpoint: ``"merged"``: the ``state_dict`` in a checkpoint is that of the plain model, with merged weights.
            ``"adapter"``: it holds only what was trained, and buffers; it loads where the pretrained weights are the
            same, through this callback.
        seed: The start of A depends on this and on the module's name, not on the global generator.
        exact_resume: Refuse to resume on other weights than those that were frozen when the checkpoint was saved,
            instead of recovering these from the merged weights up to rounding, with a warning.
        log_memory: Read the memory of training at the first optimizer step, for :attr:`memory`, and beside it that of
            full fine-tuning; print both as a table, and give them to the loggers in MiB, with the options.

    Raises:
        ValueError: If an option has a bad value; in ``fit``, if it matches nothing in the module.
        LoRAError: In ``fit``, if the module or the Trainer cannot be used with adapters.

    Example::

        >>> from lightning.pytorch import Trainer
        >>> from lightning_lora import LoRA
        >>> trainer = Trainer(callbacks=[LoRA(rank=8, target_modules=["q_proj", "v_proj"])], logger=False)
    """

    @known_options_only
    def __init__(
        self,
        rank: int = 8,
        alpha: float | None = None,
        target_modules: str | list[str] | None = "all",
        exclude_modules: str | list[str] | None = None,
        target_parameters: str | list[str] | None = None,
        modules_to_save: str | list[str] | None = None,
        rank_pattern: dict[str, int] | None = None,
        alpha_pattern: dict[str, float] | None = None,
        use_rslora: bool = False,
        bias: Bias = "none",
        dropout: float = 0.0,
        decomposition: Decomposition | str = "product",
        init: Init | str = "zero",
        gradient: Gradient = "factored",
        resample_every_n_steps: int | None = None,
        resample: Resample = "both",
        resample_moments: ResampleMoments = "transfer",
        lr_ratio: float | None = None,
        adapter_dtype: AdapterDtype = "float32",
        checkpoint: Checkpoint = "merged",
        seed: int = 0,
        exact_resume: bool = False,
        log_memory: bool = True,
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
            decomposition=decomposition,
            init=init,
            gradient=gradient,
            resample_every_n_steps=resample_every_n_steps,
            resample=resample,
            resample_moments=resample_moments,
            lr_ratio=lr_ratio,
            adapter_dtype=adapter_dtype,
            seed=seed,
        )
        check_choice("checkpoint", checkpoint, CHECKPOINTS)
        for flag, given in (("exact_resume", exact_resume), ("log_memory", log_memory)):
            if not isinstance(given, bool):
                raise LoRAError(f"`{flag}` must be True or False, got {given!r}.")
        self.checkpoint = checkpoint
        self.exact_resume = exact_resume
        self.log_memory = log_memory
        self.memory: MemoryReport | None = None
        """What the last ``fit`` held, and what full fine-tuning would have; from the first optimizer step on."""
        self._meter: MemoryMeter | None = None
        self._own_callbacks: list[Callback] | None = None
        self._fingerprints = ckpt.Fingerprints()
        self._idle: set[str] = set()
        self._handles: list[Handle] = []
        self._held: tuple[weakref.ref[pl.LightningModule], dict[str, Any]] | None = None
        self._waits_for_file = False
        self._before: dict[str, torch.Tensor] = {}
        """What this process held of sharded weights before a file was loaded into them."""
        self._loads_late = False
        """Whether a strategy may yet do that, before anything can hear of it."""
        self._reads = False
        """Whether it has begun."""
        self._trains = False
        self._rounded: list[Adapter] = []
        """Those whose weights are rounded at each draw."""
        self._silent = False
        """Whether what the module logs is of no batch of the run."""

    def __repr__(self) -> str:
        """Name the options that were set."""
        default = {**vars(Options()), "checkpoint": "merged", "exact_resume": False, "log_memory": True}
        given = {**vars(self), **vars(self.options)}
        shown = (f"{name}={given[name]!r}" for name in default if given[name] != default[name])
        return f"{type(self).__name__}({', '.join(shown)})"

    def __getstate__(self) -> dict[str, Any]:
        """A copy, or what goes to another process, is the same callback without the run it is in."""
        return {**vars(self), **{name: value for name, value in vars(LoRA()).items() if name.startswith("_")}}

    # ------------------------------------------------------------------------------------------------ before the run

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Takes part in three hooks of the module.

        The layers may not exist yet: ``LightningModule.setup`` and ``configure_model`` come after this. And the
        module's own hooks are the only ones that Lightning calls before it loads a checkpoint, and the only ones it
        calls when it saves weights only.
        """
        if sum(isinstance(callback, LoRA) for callback in _callbacks(trainer)) > 1:
            raise LoRAError(
                "The Trainer has two LoRA callbacks, and each would freeze what the other trains. Use one:"
                " `target_modules` may name modules anywhere, with `rank_pattern` and `alpha_pattern` for those that"
                " differ."
            )
        if isinstance(pl_module, _Run):
            pl_module.lora_callback._make_plain(pl_module)  # a tuner failed before any callback could hear of it
            if isinstance(pl_module, _Run):  # it is sharded, and adapted until `merge`
                unswap(pl_module, _Run)
        if stage == "fit":
            checks.refuse_unsupported(trainer)
            if isinstance(trainer.strategy, ModelParallelStrategy):
                checks.refuse_unsharded(trainer.strategy, self.options, self.checkpoint)
            self._held = None
            self._fingerprints = ckpt.Fingerprints()
            self.memory = None
            self._own_callbacks = _callbacks(trainer)
        self._trains = self._waits_for_file = False
        pl_module.lora_callback = self  # type: ignore[assignment]
        swap(pl_module, _Run)

    def configured(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Injects when all layers exist, unless the module's own code has injected the same adapters.

        What Lightning does next is to read the checkpoint, if it was given one; only then does it tell which.
        """
        self._waits_for_file = True
        self._loads_late = shards.is_sharded(pl_module) and bool(adapters(pl_module))
        if trainer.state.fn != "fit":
            return
        _quantize(trainer, pl_module)
        present = list(injections(pl_module))
        if not present and isinstance(trainer.strategy, ModelParallelStrategy):
            raise LoRAError(
                f"{type(pl_module).__name__} was sharded without adapters, and they have to be sharded with it. Call"
                " `lightning_lora.inject(self, ...)` in `configure_model`, with the options of the callback, before"
                " `fully_shard`."
            )
        if not present:
            inject_options(pl_module, self.options)
        elif any(injection.options != self.options for injection in present):
            raise LoRAError(
                f"{type(pl_module).__name__} has adapters from an earlier `inject` with the options"
                f" {present[0].options}, and the callback has {self.options}. Give both the same."
            )
        self._trains = True
        held = [place.name for place in places(pl_module) if place.host.holds_increment]
        if held and self.checkpoint == "adapter":
            raise LoRAError(
                f"`checkpoint='adapter'` needs frozen weights, and that of {held[0]!r} holds its increment and is not"
                " W0 any more. Use `checkpoint='merged'`, or `gradient='factored'` and only layers that it supports."
            )

    def loaded(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Gives the module, which loads its weights next, W0 and adapters in the place of merged weights."""
        self._reads = False
        if shards.is_sharded(pl_module):
            if self._loads_late and super(_Run, pl_module).strict_loading:  # type: ignore[misc]
                checks.check_complete(trainer, pl_module)
            ckpt.take_in_shards(checkpoint, pl_module, self.exact_resume, self._before)
            self._forget_loading()
            return
        ckpt.take_in(checkpoint, pl_module, self.exact_resume, self._held_by(pl_module))
        payload = checkpoint.get(KEY)
        self._held = None if payload is None or adapters(pl_module) else (weakref.ref(pl_module), payload)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Checks that what was injected will be trained, and says what it is."""
        checks.check_there(trainer, pl_module)
        checks.check_trained(trainer, pl_module)
        if isinstance(trainer.strategy, ModelParallelStrategy):
            checks.check_sharded(pl_module)
        self._idle = set(adapters(pl_module))
        if trainer.is_global_zero and _prints_summary(trainer):
            print_summary(pl_module)

    # ---------------------------------------------------------------------------------------------------- in the run

    def starts(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Has weights that hold their increment follow the optimizers, if they do not yet.

        A tuner trains before ``on_fit_start`` and calls no callbacks; the module's own hook is called in any case. What
        the tuner calls in their place gets this one too, to hear of an exception.
        """
        if self not in _callbacks(trainer):
            _callbacks(trainer).append(self)
        if self.options.init == "gradient" and trainer.global_step == 0:
            self._silent = True
            try:
                start_from_gradients(pl_module, first_losses(trainer, pl_module, PASSES), trainer.strategy.reduce)
            finally:
                self._silent = False
        self._rounded = [adapter for adapter in adapters(pl_module).values() if adapter.resample is not None]
        if not self._handles:
            self._handles = [
                attach(pl_module, optimizer) for optimizer in _optimizers_with_adapters(trainer, pl_module)
            ]
        own_run = _callbacks(trainer) is self._own_callbacks  # a tuner's trial steps have others
        if self.log_memory and own_run:
            self._meter = MemoryMeter(pl_module, trainer.optimizers, trainer.world_size)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Checks again: the module's own ``on_fit_start`` may have frozen everything."""
        self._waits_for_file = False
        self._forget_loading()
        shards.reshard(pl_module)  # after the sanity check
        checks.check_trained(trainer, pl_module)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Whatever was to be read from a file has been read."""
        self._waits_for_file = False

    on_test_start = on_predict_start = on_validation_start

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Strikes out, until the first batch is over, the adapters that a gradient reached."""
        if self._idle:
            known = adapters(pl_module)
            self._idle = {name for name in self._idle if all(p.grad is None for p in known[name].trained.values())}

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Looks again, for a module that calls ``loss.backward()`` itself."""
        self.on_after_backward(trainer, pl_module)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Names the adapters that no gradient reached in the first batch; logs what stochastic rounding has kept."""
        if lost := [adapter.lost for adapter in self._rounded if adapter.lost is not None]:
            share, sharded = torch.stack(lost).mean(), shards.is_sharded(pl_module)
            pl_module.log("lora/lost_to_nearest_rounding", share, sync_dist=sharded)  # of the rows of each process
        if self._idle:
            warn(
                f"No gradient reached the adapters of {', '.join(sorted(self._idle))} in the first batch. They stay at"
                " zero unless later batches use these modules. If a reentrant activation checkpoint is round them,"
                " use `use_reentrant=False`: a frozen input gives it no gradient to pass on."
            )
            self._idle = set()
        if self._meter is not None and (report := self._meter.report) is not None:
            self.memory = report
            self._forget_meter()
            if trainer.is_global_zero:
                if _prints_summary(trainer):
                    self.memory.table().print()
                for logger in trainer.loggers:
                    logger.log_metrics(self.memory.metrics(), trainer.global_step)
                    logger.log_hyperparams({"lora": self.options.to_primitives()})

    def saved(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Merges what is about to be written; full checkpoints and those with weights only come through here."""
        if not adapters(pl_module):
            return
        state = checkpoint["state_dict"]
        if any(shards.is_part(tensor) for tensor in state.values()):
            parts = ckpt.merged_parts(state, pl_module, self.options, self._fingerprints)
            checkpoint["state_dict"], checkpoint[KEY] = parts
            return
        payload = ckpt.take_apart(state, pl_module, self.options, self.checkpoint, self._fingerprints)
        ckpt.put_out(state, payload, storages(pl_module))
        checkpoint[KEY] = payload

    # ------------------------------------------------------------------------------------------------- after the run

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leaves a plain module behind; Lightning calls no ``teardown`` after an exception.

        Raises:
            ValueError: If the checkpoint that was being read is damaged, which the exception does not tell.
        """
        self._make_plain(pl_module)
        if self._waits_for_file and isinstance(exception, Exception) and (what := damage(trainer.ckpt_path)):
            raise ValueError(f"The checkpoint {str(trainer.ckpt_path)!r} is {what}.") from exception

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leaves a plain module behind, with merged weights."""
        self._make_plain(pl_module)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """After ``fit`` the module is plain, and what it takes to resume is no longer in it."""
        if (payload := self._held_by(pl_module)) is not None and not adapters(pl_module):
            ckpt.put_out(checkpoint["state_dict"], payload, storages(pl_module), merged=True)
            checkpoint[KEY] = payload

    def _held_by(self, pl_module: pl.LightningModule) -> dict[str, Any] | None:
        """The adapters that are folded into the weights of ``pl_module``, as they stand in a checkpoint."""
        return self._held[1] if self._held is not None and self._held[0]() is pl_module else None

    def _forget_meter(self) -> None:
        if self._meter is not None:
            self._meter.remove()
            self._meter = None

    def keep_w0(self, pl_module: pl.LightningModule) -> None:
        """Keeps what this process has of W0, which a strategy is about to overwrite by what is in a file."""
        if not self._reads:
            frozen = (place for place in places(pl_module) if not place.host.holds_increment)
            self._reads, self._before = True, {place.key: place.weight.detach().clone() for place in frozen}

    def _forget_loading(self) -> None:
        self._loads_late, self._reads, self._before = False, False, {}

    def _make_plain(self, pl_module: pl.LightningModule) -> None:
        if not isinstance(pl_module, _Run) or pl_module.lora_callback is not self:
            return
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._forget_meter()
        self._forget_loading()
        if adapters(pl_module) and shards.is_sharded(pl_module):
            return  # the optimizer's state is saved by names in the module: adapters stay until `merge`
        unswap(pl_module, _Run)
        if self._trains and adapters(pl_module):
            state = pl_module.state_dict()
            payload = ckpt.take_apart(state, pl_module, self.options, self.checkpoint, self._fingerprints)
            self._held = weakref.ref(pl_module), payload
            if errors := merging_errors(pl_module).values():
                rank_zero_info(
                    f"{len(errors)} quantised layers are plain now, with merged weights: rounded by"
                    f" {max(most for most, _ in errors):.1e} in any entry at most, by"
                    f" {sum(mean for _, mean in errors) / len(errors):.1e} on average."
                )
            merge(pl_module)


class _Run(Swapped, pl.LightningModule):
    """What a LightningModule is besides itself from ``setup`` to ``teardown``: one that tells the callback."""

    attribute = "lora_callback"
    in_copies = False
    lora_callback: LoRA

    def _is_strict(self) -> bool:
        """Asked for by a strategy that is about to read a file into a sharded module, the last one to be heard of it.

        It would look for the adapters in a merged file.
        """
        if self.lora_callback._loads_late:
            self.lora_callback.keep_w0(self)
            return False
        return super().strict_loading

    strict_loading = property(_is_strict, pl.LightningModule.strict_loading.fset)  # type: ignore[attr-defined]

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """What a strategy looks for in a folder of parts, while it reads one, are the keys of the plain model."""
        state = super().state_dict(*args, **kwargs)
        if self.lora_callback._reads:
            for place in places(self):
                for name in place.adapter.state_dict():
                    state.pop(f"{kwargs.get('prefix', '')}{place.factors}{name}", None)
        return state

    def __getstate__(self) -> Any:
        """A copy is a module with adapters, of no run."""
        state = super().__getstate__()
        if (meter := self.lora_callback._meter) is not None:
            meter.restore_step(state)
        return state

    def configure_model(self) -> None:
        super().configure_model()
        with torch_linear():
            self.lora_callback.configured(self.trainer, self)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.lora_callback.loaded(self.trainer, self, checkpoint)

    def on_train_start(self) -> None:
        self.lora_callback.starts(self.trainer, self)
        super().on_train_start()

    @torch.compiler.disable  # a compiled `training_step` breaks here in any case, and some versions of torch fail in it
    def log(self, *args: Any, **kwargs: Any) -> None:
        if not self.lora_callback._silent:
            super().log(*args, **kwargs)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The user's hook comes last and sees what it would see without adapters."""
        self.lora_callback.saved(self.trainer, self, checkpoint)
        super().on_save_checkpoint(checkpoint)


def _quantize(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Does now what Lightning and bitsandbytes do a moment later, so that adapters go into layers that stay.

    The precision plugin puts other modules in the place of Linears, and what is moved to its device for the first time
    is quantised there; a checkpoint is read in between, and its W0 is recognised by what is stored of it.
    """
    plugin = trainer.precision_plugin
    if isinstance(plugin, BitsandbytesPrecision):
        if not storages(pl_module) and (present := adapters(pl_module)):
            raise LoRAError(
                f"{next(iter(present))!r} has an adapter already, and BitsandbytesPrecision would put a layer without"
                " one in its place. Leave the injection to the callback, or make the layers in `configure_model`, where"
                " they are quantised as they are made."
            )
        plugin.convert_module(pl_module)
    if isinstance(trainer.strategy, DDPStrategy):
        for key, stored in storages(pl_module).items():
            if isinstance(stored, TorchAO):
                raise LoRAError(
                    f"{key!r} is a {stored.name} of torchao, which torch's DistributedDataParallel cannot send to other"
                    " processes. Use one device, or quantise by bitsandbytes."
                )
    quantize(pl_module, trainer.strategy.root_device)


def _callbacks(trainer: pl.Trainer) -> list[Callback]:
    return trainer.callbacks  # type: ignore[attr-defined]


def _prints_summary(trainer: pl.Trainer) -> bool:
    return any(isinstance(callback, ModelSummary) for callback in _callbacks(trainer))


def _optimizers_with_adapters(trainer: pl.Trainer, pl_module: pl.LightningModule) -> list[Optimizer]:
    factors = {p for adapter in adapters(pl_module).values() for p in adapter.trained.values()}
    return [
        optimizer
        for optimizer in trainer.optimizers
        if any(p in factors for group in optimizer.param_groups for p in group["params"])
    ]
