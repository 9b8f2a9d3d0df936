"""The callback: Lightning's hooks in the order in which a run calls them. It composes and computes nothing."""

from __future__ import annotations

import os
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, ModelSummary
from lightning.pytorch.strategies import ModelParallelStrategy

from lightning_lora._compat import logged_step, logs_hyperparameters
from lightning_lora.checkpoint.files import damage
from lightning_lora.checkpoint.format import SavedRun
from lightning_lora.checkpoint.peft import check_beside_files
from lightning_lora.errors import LoRAError
from lightning_lora.injection.inject import adapters
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
from lightning_lora.memory.report import MemoryReport
from lightning_lora.trainer import support
from lightning_lora.trainer.adapter_log import AdapterLog
from lightning_lora.trainer.finished import Finished
from lightning_lora.trainer.namespaces import for_both_namespaces, is_a
from lightning_lora.trainer.run import RUNS, Run
from lightning_lora.trainer.tables import print_summary
from lightning_lora.weights.sharded import reshard


@for_both_namespaces
class LoRA(Callback):
    """Trains low-rank increments of the pretrained weights, W = W0 + scale * B^T A, and saves merged weights.

    From "LoRA: Low-Rank Adaptation of Large Language Models" (Hu et al., 2021); "the article" below is "LoRA from a
    gradient perspective" (https://kexue.fm/archives/9590), whose equations the gradients follow. Added to a
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
            article's variant, of a rank up to 2r; the rank divides both sides of the weight. ``"dora"``: the product,
            with a trained magnitude for each output. Or the name of a subclass of :class:`~lightning_lora.Adapter`.
        init: Where A and B start, always with the function unchanged. ``"zero"``: A random, B zero. ``"symmetric"``:
            both random, A0 B0 taken away (article, "Optimization Perspective"). ``"orthogonal"``: both random with
            A0 B0 = 0. ``"pissa"``: the principal singular vectors of the weight, by the exact decomposition, or by a
            randomised one with q iterations as ``"pissa_niter_q"``. ``"gradient"``: singular vectors of the gradient
            over the first batches (LoRA-GA).
        gradient: How the gradients of A and B are computed. ``"factored"``: the weight stays W0 and the increment is
            computed beside it (article, eq. lora-2). ``"merged"``: the weight is W0 + increment at all times, so the
            forward costs what the base model's does; the gradients are the same thin products. ``"projected"``: the
            same, with the full gradient of each weight projected (article, eq. grad-1); for any module. A module that
            cannot be factored is adapted by the last in any case.
        resample_every_n_steps: After how many optimizer steps the increment stays in the weight and the projections are
            drawn anew (article, "Random Projection"); needs ``"merged"`` or ``"projected"``.
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
        adapter: A folder of PEFT's files, or of :func:`~lightning_lora.save_peft`: the run starts from the adapters in
            it. They say what is adapted and how; ``rank`` to ``bias``, ``decomposition`` and ``init`` stay at their
            defaults then. A checkpoint that the run resumes from takes the place of their values.
        seed: The start of A depends on this and on the module's name, not on the global generator.
        exact_resume: Refuse to resume on other weights than those that were frozen when the checkpoint was saved,
            instead of recovering these from the merged weights up to rounding, with a warning.
        log_memory: Read the memory of training at the first optimizer step, for :attr:`memory`, and beside it that of
            full fine-tuning; print both as a table, and give them to the loggers in MiB, with the options.
        log_adapters_every_n_steps: After how many optimizer steps |W - W0| / |W0| and the effective rank of each
            adapter are logged, as ``lora/relative_norm/NAME`` and ``lora/effective_rank/NAME``, and drawn where a
            logger is TensorBoard's. Lightning writes rows at multiples of ``Trainer(log_every_n_steps=...)``. Where
            projections are drawn anew, that is what was learned since the last draw. None: not at all.

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
        adapter: str | None = None,
        seed: int = 0,
        exact_resume: bool = False,
        log_memory: bool = True,
        log_adapters_every_n_steps: int | None = None,
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
        if adapter is not None:
            check_beside_files(self.options)
            adapter = os.fspath(adapter)
        for flag, given in (("exact_resume", exact_resume), ("log_memory", log_memory)):
            if not isinstance(given, bool):
                raise LoRAError(f"`{flag}` must be True or False, got {given!r}.")
        every = log_adapters_every_n_steps
        if every is not None and (isinstance(every, bool) or not isinstance(every, int) or every < 1):
            raise LoRAError(f"`log_adapters_every_n_steps` must be an int of at least 1, or None, got {every!r}.")
        self.checkpoint = checkpoint
        self.adapter = adapter
        self.exact_resume = exact_resume
        self.log_memory = log_memory
        self.log_adapters_every_n_steps = log_adapters_every_n_steps
        self.memory: MemoryReport | None = None
        """What the last ``fit`` held, and what full fine-tuning would have; from the first optimizer step on."""
        self._run: Run | None = None
        self._finished: Finished | None = None

    def __repr__(self) -> str:
        """Name the options that were set."""
        own = {"checkpoint": "merged", "adapter": None, "exact_resume": False, "log_memory": True}
        default = {**vars(Options()), **own, "log_adapters_every_n_steps": None}
        given = {**vars(self), **vars(self.options)}
        shown = (f"{name}={given[name]!r}" for name in default if given[name] != default[name])
        return f"{type(self).__name__}({', '.join(shown)})"

    def __getstate__(self) -> dict[str, Any]:
        """Leave the run out: a copy, or what goes to another process, is the same callback outside of it.

        ``log`` and ``log_dict`` are methods of the module that Lightning lends to callbacks.
        """
        own = {name: value for name, value in vars(self).items() if name not in ("log", "log_dict")}
        return {**own, "_run": None, "_finished": None}

    # ------------------------------------------------------------------------------------------------ before the run

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Begin a run; injection waits for the layers, which the module's own hooks may make."""
        support.refuse_second_callback(trainer, LoRA)
        if (left := RUNS.get(pl_module)) is not None:  # its strategy never reported its exception, or shards
            left.finish()
            left.hooks.remove()
        if stage == "fit":
            support.refuse_unsupported(trainer)
            support.refuse_held_weights(self.options, self.checkpoint)
            strategy: Any = trainer.strategy
            if is_a(strategy, ModelParallelStrategy):
                support.refuse_unsharded(strategy, self.options, self.checkpoint)
            self._finished, self.memory = None, None
        self._run = Run(self, trainer, pl_module)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check that what was injected will be trained, and say what it is."""
        run = self._running()
        run.check_hooks("setup", "configure_model", "configure_optimizers")
        run.wrap_hooks()
        support.check_there(trainer, pl_module)
        support.check_trained(trainer, pl_module, run.idle)
        if run.is_sharded:
            support.check_sharded(pl_module)
        if trainer.is_global_zero and _prints_summary(trainer):
            print_summary(pl_module)
        if trainer.is_global_zero and logs_hyperparameters(pl_module):
            for logger in trainer.loggers:
                logger.log_hyperparams({"lora": run.options.to_primitives()})

    # ---------------------------------------------------------------------------------------------------- in the run

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check again: the module's own ``on_fit_start`` may have frozen everything."""
        run = self._running()
        run.waits_for_file = False
        run.saved = None
        run.forget_loading()
        reshard(pl_module)  # after the sanity check
        support.check_trained(trainer, pl_module, run.idle)
        if (every := self.log_adapters_every_n_steps) is not None:
            run.adapter_log = AdapterLog(every, trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check that weights have followed their adapters; whatever was to be read from a file has been read."""
        if self._run is not None:
            self._run.waits_for_file = False
            if self._run.watch is not None:
                self._run.watch.check_followed()

    on_test_start = on_predict_start = on_validation_start

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, _: int) -> None:
        """Follow what the module's own code has unfrozen, and see that its hooks still reach the run."""
        run = self._running()
        run.check_hooks("on_train_start")
        run.wrap_hooks()
        run.watching.begin_batch(pl_module)
        if run.meter is not None:
            run.meter.begin_batch(batch)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """End the reading of memory where the module's ``on_train_batch_start`` skipped the batch."""
        if (meter := self._running().meter) is not None:
            meter.end_batch()

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Strike out, until the first batch is over, the adapters that a gradient reached."""
        self._running().watching.gradients_arrived()

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Look again, for a module that calls ``loss.backward()`` itself."""
        self.on_after_backward(trainer, pl_module)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Name the adapters that no gradient reached in the first batch; report memory; log what rounding has lost."""
        run = self._running()
        run.watching.end_batch()
        if (lost := run.watching.lost_to_rounding()) is not None:  # of the rows of each process
            pl_module.log("lora/lost_to_nearest_rounding", lost, sync_dist=run.is_sharded)
        if run.adapter_log is not None:
            run.adapter_log.log(trainer, pl_module)
        if run.meter is not None:
            run.meter.end_batch()
        if run.meter is not None and (report := run.meter.report) is not None:
            self.memory = report
            run.stop_meter()
            if trainer.is_global_zero:
                if _prints_summary(trainer):
                    report.table().print()
                for logger in trainer.loggers:
                    logger.log_metrics(report.metrics(), logged_step(trainer))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw what was logged last."""
        if (log := self._running().adapter_log) is not None:
            log.draw(trainer)

    # ------------------------------------------------------------------------------------------------- after the run

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave a plain module behind; Lightning calls no ``teardown`` after an exception.

        Raises:
            LoRAError: If the checkpoint that was being read is damaged, or code of the module's own stumbled over
                adapters among its parameters; the exception does not tell.
        """
        run, self._run = self._run, None
        if run is None:
            return
        hint = support.explain(exception, run.hides) if run.is_early else None
        run.finish()
        if run.waits_for_file and isinstance(exception, Exception) and (what := damage(trainer.ckpt_path)):
            raise LoRAError(f"The checkpoint {str(trainer.ckpt_path)!r} is {what}.") from exception
        if hint is not None:
            raise LoRAError(hint) from exception

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave a plain module behind, with merged weights."""
        run, self._run = self._run, None
        if run is not None and (error := run.finish()) is not None:
            raise error

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """After ``fit`` the module is plain; what it takes to resume is added to its files."""
        if self._finished is not None and self._finished.belongs_to(pl_module) and not adapters(pl_module):
            self._finished.add_to(checkpoint, pl_module)
        elif self._run is not None:
            self._run.wrap_hooks()  # the module's own hook comes next

    def finished_run(self, pl_module: pl.LightningModule) -> SavedRun | None:
        """Return the adapters that are folded into the weights of ``pl_module``, as they stand in a checkpoint."""
        return self._finished.run if self._finished is not None and self._finished.belongs_to(pl_module) else None

    def keep_finished(
        self, pl_module: pl.LightningModule, run: SavedRun | None, optimizer_states: list[Any] | None = None
    ) -> None:
        """Keep what it takes to resume a run whose module is plain and merged."""
        self._finished = None if run is None else Finished(pl_module, run, optimizer_states)

    def _running(self) -> Run:
        assert self._run is not None, "a hook of training was called before `setup`"
        return self._run


def _prints_summary(trainer: pl.Trainer) -> bool:
    return any(is_a(callback, ModelSummary) for callback in trainer.callbacks)  # type: ignore[attr-defined]
