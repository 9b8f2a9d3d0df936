"""The state of one run of a Trainer on one module: made in the callback's ``setup``, dropped in its ``teardown``."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_info  # type: ignore[attr-defined]
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn

from lightning_lora import _compat
from lightning_lora.checkpoint import peft, read, write
from lightning_lora.checkpoint.fingerprints import Fingerprints
from lightning_lora.checkpoint.format import KEY, SavedRun
from lightning_lora.errors import LoRAError, listed, warn
from lightning_lora.hosts.view import hide_adapters, merging_for_file, present_merged, show_adapters
from lightning_lora.injection.gradient_start import PASSES, start_from_gradients
from lightning_lora.injection.inject import (
    INJECTED_BY_CALLBACK,
    adapters,
    inject_options,
    injections,
    merge,
    merging_errors,
    places,
    take_out_adapters,
)
from lightning_lora.injection.options import differences
from lightning_lora.memory.meter import MemoryMeter
from lightning_lora.steps.attach import Handle, attach
from lightning_lora.trainer import quantization, support
from lightning_lora.trainer.author_view import author_view, frozen_weights
from lightning_lora.trainer.averages import Averages
from lightning_lora.trainer.first_batches import first_losses
from lightning_lora.trainer.instance_hooks import InstanceHooks
from lightning_lora.trainer.namespaces import is_a
from lightning_lora.trainer.optimizers import Substitution, find_optimizers, old_order, refuse_hooked
from lightning_lora.trainer.watch import Watch
from lightning_lora.weights import read_only_weights
from lightning_lora.weights.quantized import torch_linear
from lightning_lora.weights.sharded import is_sharded

if TYPE_CHECKING:
    import lightning.pytorch as pl

    from lightning_lora.callback import LoRA
    from lightning_lora.trainer.adapter_log import AdapterLog

RUNS: weakref.WeakKeyDictionary[nn.Module, Run] = weakref.WeakKeyDictionary()
"""Module -> the run that it is in."""


class Run:
    """What a run knows of its module, and what it does in the module's own hooks.

    Callback hooks come too late or not at all for some of this. ``Callback.setup`` is called before the module's
    ``setup`` and ``configure_model``, where layers may be made. ``Callback.on_load_checkpoint`` is called after the
    state dict has been loaded. Weights-only files are written, and tuners train, without callbacks. So the module's own
    hooks are wrapped on the instance; :meth:`check_hooks` raises if one was replaced so that it never reached the run.

    Args:
        callback: The callback; its options are read.
        trainer: Held weakly, like ``module``.
        module: The LightningModule.
    """

    def __init__(self, callback: LoRA, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.callback = callback
        self._trainer = weakref.ref(trainer)
        self._module = weakref.ref(module)
        self.options = callback.options
        self.fits = trainer.state.fn == "fit"
        self.trains = False
        """Whether the adapters in the module are this run's, to be merged at its end."""
        self.hooks = InstanceHooks(module)
        self._strategy_hooks = InstanceHooks(trainer.strategy)
        self._callbacks = trainer.callbacks  # type: ignore[attr-defined]
        """The Trainer's own list; in a tuner's trial steps it has another."""
        self.fingerprints = Fingerprints()
        self.is_sharded = is_a(trainer.strategy, ModelParallelStrategy)
        self.hides = self.options.gradient != "factored"
        """Whether A and B leave ``parameters()`` while training: there, weights are W and whoever goes through
        them finds what he would find without adapters. In factored mode they are W0, and code that writes A and B by
        way of ``parameters()``, as averages and perturbations do, is right only if it finds them."""
        self.waits_for_file = False
        """Whether Lightning may be reading a checkpoint: what it raises then may be damage of the file."""
        self.saved: SavedRun | None = None
        """``checkpoint["lightning_lora"]`` of the file that is being loaded; its adapters follow the weights."""
        self.before: dict[str, Tensor] = {}
        """This rank's shards of W0, kept while a strategy loads a file over them."""
        self.idle: frozenset[str] = frozenset()
        """Names of adapters that no optimizer trains."""
        self.substitutions: list[Substitution] = []
        self._old_optimizer_states: list[Any] = []
        """Optimizer states of a file of format 1, which are to be put in today's order."""
        self.handles: list[Handle] = []
        self.meter: MemoryMeter | None = None
        self.adapter_log: AdapterLog | None = None
        self.averages = Averages(trainer)
        self.watch: Watch | None = None
        """What is looked for while the module trains."""
        self._told_incomplete = False
        RUNS[module] = self
        self.hooks.wrap("setup", self.on_setup)
        self._strategy_hooks.wrap("on_exception", self.on_strategy_exception)
        self._strategy_hooks.wrap("load_checkpoint", self.on_strategy_load)
        if not self.is_sharded:
            self._strategy_hooks.wrap("lightning_module_state_dict", self.on_strategy_state_dict)

    @property
    def trainer(self) -> pl.Trainer:
        """Return the Trainer, which is held weakly."""
        trainer = self._trainer()
        assert trainer is not None
        return trainer

    @property
    def module(self) -> pl.LightningModule:
        """Return the LightningModule, which is held weakly."""
        module = self._module()
        assert module is not None
        return module

    @property
    def watching(self) -> Watch:
        """Return what is looked for while the module trains; there is something from ``on_train_start`` on."""
        assert self.watch is not None, "a hook of training was called before `on_train_start`"
        return self.watch

    @property
    def is_own_run(self) -> bool:
        """Whether the Trainer calls its own callbacks, and not those of a tuner's trial steps."""
        return self.trainer.callbacks is self._callbacks  # type: ignore[attr-defined]

    @property
    def optimizers(self) -> list[Any]:
        """Return the Trainer's optimizers; none where it is gone or had not made them."""
        trainer = self._trainer()
        return [] if trainer is None else list(trainer.optimizers)

    # ------------------------------------------------------------------ the module's hooks, in the order of their calls

    def on_setup(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Wrap the module's other hooks after its own ``setup``, which may set some of them."""
        original(*args, **kwargs)
        self.wrap_hooks()
        self.hooks.wrap("configure_model", self.on_configure_model)

    def wrap_hooks(self) -> None:
        """Wrap the hooks that the run needs, those anew that have been replaced since."""
        hooks: dict[str, Callable[..., Any]] = {
            "on_load_checkpoint": self.on_load_checkpoint,
            "load_state_dict": self.on_load_state_dict,
            "on_save_checkpoint": self.on_save_checkpoint,
        }
        if self.is_sharded:
            hooks["state_dict"] = self.on_state_dict
        if self.fits:
            hooks |= {
                "configure_optimizers": self.on_configure_optimizers,
                "on_fit_start": self.on_fit_start,
                "on_train_start": self.on_train_start,
            }
            if self.hides:
                hooks["zero_grad"] = self.on_zero_grad
                hooks["configure_gradient_clipping"] = self.on_gradients
                own = type(self.module).on_before_optimizer_step.__module__
                if not own.startswith(("lightning.", "pytorch_lightning.")):  # where norms of gradients are logged
                    hooks["on_before_optimizer_step"] = self.on_gradients
        for name, method in hooks.items():
            self.hooks.wrap(name, method)

    def check_hooks(self, *names: str) -> None:
        """Raise if a wrapped hook has not been called though Lightning is past it.

        Raises:
            LoRAError: If one of ``names`` has not reached the run.
        """
        for name in names:
            if name not in self.hooks.ran:
                raise LoRAError(
                    f"LoRA did not hear of `{type(self.module).__name__}.{name}`: it was replaced on the instance after"
                    " the callback's `setup`, by code that does not call what it replaced. Set it before `fit`, or in"
                    " the module's `setup`."
                )

    def on_configure_model(self, original: Callable[[], Any]) -> None:
        """Inject when all layers exist, unless the module's own code has injected the same adapters."""
        if self.fits and self.is_sharded:
            self._inject_before_sharding()
            injected = INJECTED_BY_CALLBACK.set(self.options if adapters(self.module) else None)
            try:
                original()
            finally:
                INJECTED_BY_CALLBACK.reset(injected)
        else:
            original()
        self.hooks.unwrap("configure_model")  # `is_overridden` is to be the user's answer from here on
        self.waits_for_file = True
        if self.fits:
            with torch_linear():
                self._inject()
            present_merged(self.module, not self.is_sharded)
            self.trains = True
        self.averages.start(self.trainer, self.module, self.options)

    def _inject_before_sharding(self) -> None:
        """Inject before the module's ``configure_model``, where the layers that it shards exist by then."""
        if not adapters(self.module):
            try:
                self._start()
            except LoRAError:
                if any(p.dim() > 1 for p in self.module.parameters()):
                    raise  # else the layers are made in `configure_model`

    def _start(self) -> None:
        """Inject what the options say, or what the files that the run starts from do."""
        if self.callback.adapter is None:
            inject_options(self.module, self.options)
        else:
            self.options = peft.load(self.module, self.callback.adapter, self.options).options

    def _inject(self) -> None:
        module, trainer = self.module, self.trainer
        quantization.quantize_now(trainer, module)
        present = list(injections(module))
        if not present and self.is_sharded:
            raise LoRAError(
                f"{type(module).__name__} was sharded without adapters, and they have to be sharded with it. Make the"
                " layers in `__init__` or `setup`, or call `lightning_lora.inject(self, ...)` in `configure_model`,"
                " with the options of the callback, before `fully_shard`."
            )
        if not present:
            self._start()
        elif self.callback.adapter is not None:  # the module's own code has read files
            said = {name: getattr(present[0].options, name) for name in ("dropout", *peft.FROM_FILES)}
            self.options = dataclasses.replace(self.options, **said)
        for injection in present:
            if difference := differences(injection.options, self.options):
                raise LoRAError(
                    f"{type(module).__name__} has adapters from an earlier `inject` with other options than the"
                    f" callback: {difference}. Give both the same."
                )

    def on_load_checkpoint(self, original: Callable[..., Any], checkpoint: dict[str, Any]) -> None:
        """Give the module, which loads its weights next, W0 in the place of merged weights.

        Raises:
            LoRAError: If the file is not a LoRA run's and this run would read its optimizer states.
        """
        original(checkpoint)
        if self.fits and KEY not in checkpoint:
            raise LoRAError(
                f"{self.trainer.ckpt_path} was not written by a run with LoRA: the states of its optimizers are those"
                " of all weights, and here adapters are trained. To start from its weights, load them into the module"
                " (`Model.load_from_checkpoint(file)`, or `load_state_dict` in `__init__`), and call `fit` without"
                " `ckpt_path`."
            )
        if is_sharded(self.module):
            if self.before:
                support.check_complete(self.trainer, self.module)
            read.restore_shards(checkpoint, self.module, self.callback.exact_resume, self.before)
            self.forget_loading()
            return
        after_fit = self.callback.finished_run(self.module)
        self.saved = self.averages.prepare_for_loading(checkpoint, self.module, self.callback.exact_resume, after_fit)
        if self.saved is not None and self.saved.version == 1:
            self._old_optimizer_states = checkpoint.get("optimizer_states", [])
        self.callback.keep_finished(self.module, None if adapters(self.module) else self.saved)

    def on_load_state_dict(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Put the adapters back after the weights, whatever the module's own ``load_state_dict`` does with keys."""
        result = original(*args, **kwargs)
        if self.saved is not None:
            read.restore_adapters(self.module, self.saved.adapters)
        return result

    def on_configure_optimizers(self, original: Callable[[], Any]) -> Any:
        """Call the hook on the module as its author wrote it; then adapters take the places of their weights."""
        module = self.module
        support.check_there(self.trainer, module)
        if self.is_sharded:  # whose parameters are not the author's any more
            configured = original()
        else:
            with author_view(module) as frozen_meanwhile:
                configured = original()
                refuse_hooked({place.weight: place.key for place in places(module)})
            owned = {p for o in find_optimizers(configured) for group in o.param_groups for p in group["params"]}
            for place in places(module):
                if place.weight in frozen_meanwhile & owned:
                    raise LoRAError(support.frozen_adapter(place.name))
        optimizers = find_optimizers(configured)
        self.undo_substitutions()
        frozen = self._frozen()
        shown = self.is_sharded  # A and B were among the parameters that the author's code saw
        hidden = [place for place in places(module) if not shown and not place.stored.read_only]
        trained = {place.weight: place.named_factors() for place in hidden}
        for optimizer in optimizers:
            self.substitutions.append(Substitution(optimizer, trained, frozen))
        self._set_idle_aside(optimizers)
        if self._old_optimizer_states:
            old_order(optimizers, self._old_optimizer_states, module)
        return configured

    def _frozen(self) -> dict[Tensor, str]:
        """Return the frozen weights that leave the optimizers: not those that the resumed run has unfrozen."""
        unfrozen = self._unfrozen_before()
        frozen = frozen_weights(self.module)
        for key, stored in read_only_weights(self.module).items():  # which nothing can train
            frozen[stored.weight] = key
        return {p: name for p, name in frozen.items() if p not in unfrozen}

    def _unfrozen_before(self) -> set[Tensor]:
        """Return the weights without an adapter that the module's own code had unfrozen in the run that is resumed."""
        trained = set(self.saved.trained) if self.saved is not None else set()
        adapted = {place.weight for place in places(self.module)}
        return {p for p, name in frozen_weights(self.module).items() if name in trained and p not in adapted}

    def _set_idle_aside(self, optimizers: list[Any]) -> None:
        """Take out the adapters whose weights no optimizer had: full fine-tuning would not have trained them.

        A process group has counted on their gradients by now; there they stay, at zero.
        """
        module = self.module
        owned = {p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
        idle = {n for n, a in adapters(module).items() if not any(p in owned for p in a.trained.values())}
        if not idle or not optimizers:
            return
        by_name = not isinstance(self.options.target_modules, str) or self.options.target_parameters is not None
        if by_name or len(idle) == len(adapters(module)):
            raise LoRAError(support.no_optimizer(sorted(idle), module))
        self.idle = frozenset(idle)
        if self.trainer.world_size == 1:
            take_out_adapters(module, idle)
        rank_zero_info(
            f"No optimizer has the weights of {listed(sorted(idle))}, as those of target networks: they stay as"
            " they are, without adapters."
        )

    def on_fit_start(self, original: Callable[[], Any]) -> None:
        """Show the user's code the plain model from here on; what was trained in the file's run is trained again."""
        self.averages.restore()
        for p in self._unfrozen_before():
            p.requires_grad_(True)
        self.hide()
        original()

    def hide(self) -> None:
        """Have A and B leave ``parameters()`` where weights are W.

        Sharded modules stay as they are: FSDP2 saves the states of optimizers by names in the module.
        """
        if self.hides and not self.is_sharded:
            hide_adapters(self.module)
            _compat.find_buffers_again(self.trainer.strategy.model)

    def on_train_start(self, original: Callable[[], Any]) -> None:
        """Have weights that hold their increments follow the optimizers.

        A tuner trains before ``on_fit_start`` and calls no callbacks; the module's own hook is called in any case.
        """
        module, trainer = self.module, self.trainer
        self.check_hooks("configure_optimizers")
        self.wrap_hooks()
        self.hide()
        if self.options.init == "gradient" and trainer.global_step == 0:
            self.hooks.wrap("log", lambda *_, **__: None)  # what is logged now is of no batch of the run
            try:
                start_from_gradients(module, first_losses(trainer, module, PASSES), trainer.strategy.reduce)
            finally:
                self.hooks.unwrap("log")
        if _compat.is_compiled(module):  # torch's compiler breaks in `log` in any case, and may fail in it
            self.hooks.wrap("log", torch.compiler.disable(lambda original, *args, **kwargs: original(*args, **kwargs)))
        if not self.handles:
            factors = {p for adapter in adapters(module).values() for p in adapter.trained.values()}
            self.handles = [
                attach(module, optimizer)
                for optimizer in trainer.optimizers
                if any(p in factors for group in optimizer.param_groups for p in group["params"])
            ]
        if self.callback.log_memory and self.is_own_run:
            full = {p: owner for substitution in self.substitutions for p, owner in substitution.owners.items()}
            self.meter = MemoryMeter(module, trainer.optimizers, trainer.world_size, full)
        reads_frozen = not self.hides and not self.is_sharded
        self.watch = Watch(module, trainer.optimizers, self.substitutions, self.idle, reads_frozen)
        original()

    def on_zero_grad(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Reach the gradients of A and B, which are not among the module's parameters now."""
        original(*args, **kwargs)
        for adapter in adapters(self.module).values():
            adapter.zero_grad(*args, **kwargs)

    def on_gradients(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Show A and B to the module's own code that clips or logs gradients, which may go through ``parameters()``."""
        show_adapters(self.module)
        try:
            original(*args, **kwargs)
        finally:
            self.hide()

    def on_state_dict(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Leave the adapters out while a strategy reads a folder: it asks the file for all keys that it finds here."""
        state = original(*args, **kwargs)
        if self.before:
            for place in places(self.module):
                for name in place.adapter.state_dict():
                    state.pop(f"{kwargs.get('prefix', '')}{place.factors}{name}", None)
        return state

    def on_save_checkpoint(self, original: Callable[..., Any], checkpoint: dict[str, Any]) -> None:
        """Add the adapters to what is about to be written; full and weights-only files both come through here.

        The module's own hook comes last and sees what it would see without adapters.
        """
        module, saved = self.module, self.callback.finished_run(self.module)
        if adapters(module):
            for place in places(module):
                place.adapter.check_followed()
            saved = write.describe(module, self.options, self.callback.checkpoint, self.fingerprints, self.idle)
            if is_sharded(module):
                checkpoint["state_dict"] = write.merged_shards(checkpoint["state_dict"], module, saved)
            else:
                saved = self.averages.save(checkpoint, saved, module)
            checkpoint[KEY] = saved.to_mapping()
            self._tell_rewritten()
        original(checkpoint)
        if saved is not None and KEY in checkpoint and not is_sharded(module):
            self._tell_incomplete(write.missing_weights(checkpoint.get("state_dict", {}), saved))

    def _tell_incomplete(self, missing: list[str]) -> None:
        if missing and not self._told_incomplete:
            self._told_incomplete = True
            warn(
                f"`state_dict()` of {type(self.module).__name__}, or a callback, leaves out the weights of"
                f" {listed(missing)}, so the file is no whole model. It resumes this run, on the same"
                f" pretrained weights{', up to rounding' if self.hides else ''}."
            )

    def _tell_rewritten(self) -> None:
        if self.fingerprints.rewritten:
            names = listed(sorted(self.fingerprints.rewritten))
            self.fingerprints.rewritten.clear()
            warn(
                f"The frozen weights of {names} were written to while training, by other code than an optimizer. Files"
                " hold what they are now. If parameters are clipped or averaged by the module's own code, use"
                " `gradient='merged'`, in which `parameters()` are the whole weights."
            )

    # -------------------------------------------------------------------------------------- called by the callback

    def on_strategy_load(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Keep this rank's shards of W0, which a strategy that shards is about to load a file over."""
        if self.is_sharded and adapters(self.module):
            frozen = (p for p in places(self.module) if not p.adapter.holds and not p.weight.is_meta)
            self.before = {place.key: place.weight.detach().clone() for place in frozen}
            self.before.setdefault("", torch.empty(0))  # reading has begun, also where nothing is frozen
            self._strict: bool | None = vars(self.module).get("_strict_loading")
            self.module.strict_loading = False
        return original(*args, **kwargs)

    def on_strategy_state_dict(self, original: Callable[[], Any]) -> Any:
        """Merge for a file on the rank that writes it, one weight after another, to the CPU.

        The other ranks' dictionaries are dropped: there weights stay as they are, and no host holds a model for each.
        """
        with merging_for_file(self.module, self.trainer.is_global_zero):
            return original()

    def forget_loading(self) -> None:
        """Drop what was kept for a file that has been loaded."""
        if self.before:
            self.before = {}
            vars(self.module)["_strict_loading"] = self._strict

    @property
    def is_early(self) -> bool:
        """Whether training has begun and not got beyond its first batches."""
        return self.watch is not None and self.watch.batches < 2

    def stop_meter(self) -> None:
        """Take the memory meter off the module and the optimizers."""
        if self.meter is not None:
            self.meter.remove()
            self.meter = None

    def undo_substitutions(self) -> None:
        """Put the weights back into the optimizers."""
        for substitution in self.substitutions:
            substitution.undo()
        self.substitutions = []

    def on_strategy_exception(self, original: Callable[..., Any], exception: BaseException) -> None:
        """Leave a plain module behind where a tuner has put other callbacks in the place of the Trainer's."""
        original(exception)
        self.finish()

    def finish(self) -> LoRAError | None:
        """Leave a plain module behind, with merged weights, and nothing of the run on it, whatever happened.

        Returns:
            The error of weights that are left without what other code has written to A and B.
        """
        module = self._module()
        if module is None or RUNS.get(module) is not self:
            return None
        error = None if self.watch is None else self.watch.give_up_followed()
        for handle in self.handles:
            handle.remove()
        self.handles = []
        self.stop_meter()
        self.forget_loading()
        self._strategy_hooks.remove()
        if adapters(module) and is_sharded(module):
            # the optimizer's state is saved by names in the module: adapters stay until `merge`, and files are merged
            self.hooks.remove(but="on_save_checkpoint")
            return error
        del RUNS[module]
        self.hooks.remove()
        if self.trains and adapters(module):
            show_adapters(module)
            present_merged(module, False)
            saved = write.describe(module, self.options, self.callback.checkpoint, self.fingerprints, self.idle)
            self._tell_rewritten()
            if errors := merging_errors(module).values():
                rank_zero_info(
                    f"{len(errors)} quantised layers are plain now, with merged weights: rounded by"
                    f" {max(most for most, _ in errors):.1e} in any entry at most, by"
                    f" {sum(mean for _, mean in errors) / len(errors):.1e} on average."
                )
            states = [optimizer.state_dict() for optimizer in self.optimizers]
            merge(module)
            self.callback.keep_finished(module, saved, states)
        self.undo_substitutions()
        return error
