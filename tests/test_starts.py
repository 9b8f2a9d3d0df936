"""Where A and B start: what each start is, that it changes nothing, and that finding it leaves no trace."""

import copy
import itertools
import math
import random
import re
import threading
import warnings

import numpy as np
import pytest
import torch
import torchmetrics
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from models import Digest, Net, ResumableLoader, TwoOptimizersNet, data, digest, trainer
from pairs import pairs
from resume import SaveFirst
from torch import nn
from torch.utils.data import DataLoader
from zoo import ZOO, TiedNet, Zoo

from lightning_lora import Adapter, LoRA, adapters, inject
from lightning_lora.adapters import INITS
from lightning_lora.errors import LoRAError
from lightning_lora.injection.gradient_start import GAMMA, PASSES, start_from_gradients
from lightning_lora.injection.inject import inject_options, places
from lightning_lora.injection.options import Options

GRADIENTS = ["factored", "merged", "projected"]
HOLDING = ["merged", "projected"]


def initial(weight, init, rank=2, dtype=torch.float64, **kwargs):
    return Adapter.initial(weight, rank, 0, "layer", dtype, init=init, **kwargs)


def seed_numpy(seed):
    np.random.seed(seed)  # noqa: NPY002


def numpy_state():
    return np.random.get_state()[1].tolist()  # noqa: NPY002


def gaussian(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


SHAPES = {"n": st.integers(4, 10), "m": st.integers(4, 10), "seed": st.integers(0, 2**31)}

# ---------------------------------------------------------------------------------------------------------- orthogonal


@settings(max_examples=40, deadline=None)
@given(**SHAPES, rank=st.sampled_from([2, 4]), scale=st.floats(0.1, 3))
def test_an_orthogonal_start_has_no_product_though_neither_factor_is_zero(n, m, seed, rank, scale):
    adapter = Adapter.initial(torch.ones(m, n), rank, seed, "layer", torch.float64, init="orthogonal", scale=scale)
    A, B = adapter.A.detach(), adapter.B.detach()
    assert A.any()
    assert B.any()
    assert (B.T @ A).abs().max() <= 1e-6 * B.norm() * A.norm()
    assert adapter.A0 is None


def test_its_factors_have_half_the_rank_and_span_together_all_rows():
    adapter = initial(torch.zeros(20, 30), "orthogonal", rank=6)
    for factor in (adapter.A, adapter.B):
        singular = torch.linalg.svdvals(factor.detach())
        assert singular[2] > 1e-2
        assert singular[3] < 1e-6
    sides = torch.cat([torch.linalg.svd(f.detach())[0][:, :3] for f in (adapter.A, adapter.B)], dim=1)
    torch.testing.assert_close(sides.T @ sides, torch.eye(6, dtype=torch.float64), rtol=0, atol=1e-5)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_an_odd_rank_is_lowered_unless_it_was_given_by_name(gradient):
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    options = {"init": "orthogonal", "gradient": gradient}
    with pytest.raises(ValueError, match=r"init='orthogonal'`: the rank 3 of '1', .*: 2 would do.*\{'1': 2\}"):
        inject(net, rank=2, rank_pattern={"1": 3}, **options)
    assert [type(m) for m in net] == [nn.Linear, nn.Linear]
    assert inject(net, rank=3, **options) == ["0", "1"]
    assert [adapter.rank for adapter in adapters(net).values()] == [2, 2]


# --------------------------------------------------------------------------------------------------------------- PiSSA


def best(weight, rank):
    """The matrix of rank r that is nearest to ``weight`` (Eckart and Young)."""
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    return U[..., :rank] * S[..., None, :rank] @ Vh[..., :rank, :]


@settings(max_examples=40, deadline=None)
@given(**SHAPES, rank=st.integers(1, 4), scale=st.floats(0.1, 3), transposed=st.booleans())
def test_the_product_of_pissa_is_the_best_approximation_of_the_weight(n, m, seed, rank, scale, transposed):
    W0 = gaussian(m, n, seed=seed)
    weight = W0.T.contiguous() if transposed else W0
    adapter = initial(weight, "pissa", rank, scale=scale, transposed=transposed)
    A0, B0 = adapter.A0.detach(), adapter.B0.detach()
    torch.testing.assert_close(scale * B0.T @ A0, best(W0, rank), rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(A0.norm(dim=1), B0.norm(dim=1), rtol=1e-9, atol=0)  # the root on each side
    assert torch.equal(adapter.A, A0)
    assert torch.equal(adapter.B, B0)
    assert not adapter.delta_weight(torch.float64).any()


@pytest.mark.parametrize(
    ("layer", "options"),
    [
        (lambda: nn.Conv2d(4, 6, 3), {"target_modules": ["0"]}),
        (lambda: nn.Embedding(12, 8), {"target_modules": ["0"]}),
    ],
)
def test_of_a_convolution_and_an_embedding_it_is_that_of_the_matrix(layer, options):
    module = nn.Sequential(layer()).double()
    W0 = module[0].weight.detach().flatten(1).clone()
    inject(module, rank=3, alpha=6, init="pissa", adapter_dtype="float64", **options)
    (a,) = adapters(module).values()
    product = a.scale * a.B0.T @ a.A0
    torch.testing.assert_close(product.T if a.transposed else product, best(W0, 3), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4"])
def test_a_stack_has_the_best_approximation_of_each_of_its_matrices(init):
    weight = gaussian(3, 7, 6) @ torch.diag(2.0 ** -torch.arange(6, dtype=torch.float64))
    a = initial(weight, init, stacked=True)
    torch.testing.assert_close(a.B0.mT @ a.A0, best(weight, 2).clone(), rtol=0, atol=0.02)


@pytest.mark.parametrize("shape", [(40, 60), (60, 40)])
def test_the_randomised_one_is_close_and_closer_with_more_iterations(shape):
    """Singular values that halve every 4: what an iteration leaves of the neighbours falls by (1/2)^(1/4) or more."""
    U, V = (torch.linalg.qr(gaussian(side, 40, seed=side))[0] for side in shape)
    weight = U * 2.0 ** (-torch.arange(40, dtype=torch.float64) / 4) @ V.T
    errors = []
    for init in ("pissa_niter_0", "pissa_niter_4", "pissa_niter_16"):
        a = initial(weight, init, rank=4)
        errors.append(((a.B0.T @ a.A0 - best(weight, 4)).norm() / best(weight, 4).norm()).item())
        residual = (weight - a.B0.T @ a.A0).norm() / (weight - best(weight, 4)).norm()
        assert residual < (2 if init == "pissa_niter_0" else 1.05)
    assert errors[0] > errors[1] > errors[2]
    assert errors[1] < 0.2


@pytest.mark.parametrize("init", [*(i for i in INITS if i != "gradient"), "pissa_niter_2"])
def test_a_start_depends_on_the_seed_and_the_name_and_leaves_all_generators_alone(init):
    weight, starts = gaussian(8, 6), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        random.seed(seed)
        seed_numpy(seed)
        before = torch.get_rng_state(), random.getstate(), numpy_state()
        a = initial(weight, init)
        assert torch.equal(torch.get_rng_state(), before[0])
        assert (random.getstate(), numpy_state()) == before[1:]
        starts.append(digest([a.A, a.B]))
    assert starts[0] == starts[1]
    other = Adapter.initial(weight, 2, 1, "layer", torch.float64, init=init)
    assert (digest([other.A, other.B]) == starts[0]) == (init == "pissa")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("init", [i for i in INITS if i != "gradient"])
def test_a_start_in_low_precision_is_finite_and_changes_no_bit_of_the_weight(init, dtype):
    weight = gaussian(8, 6).to(dtype)
    a = initial(weight, init, dtype=torch.float32)
    assert a.A.dtype == torch.float32
    assert a.A.isfinite().all()
    assert a.B.isfinite().all()
    if init == "orthogonal":
        assert a.delta_weight().abs().max() < 1e-6
    else:
        assert torch.equal(a.folded_into(weight), weight)


# ------------------------------------------------------------------------------- the gradient at the start, by LoRA-GA


class Start(Callback):
    """The adapters as training finds them, and what they stand on. Not `on_train_start`, which is the module's last."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if not hasattr(self, "adapters"):
            self.take(trainer, pl_module)

    def take(self, trainer, pl_module) -> None:
        self.adapters = copy.deepcopy(adapters(pl_module))
        self.flags = {name: p.requires_grad for name, p in pl_module.named_parameters()}
        self.grads = [name for name, p in pl_module.named_parameters() if p.grad is not None]
        self.module = digest({k: v for k, v in pl_module.state_dict().items() if "lora" not in k})
        self.rng = torch.get_rng_state(), random.getstate(), numpy_state()


class ZooNoPad(Zoo):
    """Without a padding row, whose gradient is zero."""

    def _make(self, where):
        super()._make(where)
        if hasattr(self, "layers"):
            self.layers["embed"].padding_idx = None


TARGETS = {Net: {}, Zoo: ZOO, ZooNoPad: ZOO, TiedNet: {"target_modules": ["layers.embed", "body"]}}
DOUBLE = {"precision": "64-true"}


def start(folder, model, gradient="factored", loader=None, callbacks=(), steps=1, lora=None, **options):
    seen = Start()
    options = {"max_steps": steps, **options}
    callback = LoRA(
        **{"rank": 2, "init": "gradient", "gradient": gradient, **TARGETS.get(type(model), {}), **(lora or {})}
    )
    run = trainer(folder, callback, seen, *callbacks, **options)
    run.fit(model, ResumableLoader() if loader is None else loader)
    return seen, run


def mean_gradients(model, names, count=4):
    """Of the first batches, by autograd in the plain module."""
    model = model.double()
    model.train()
    model.log = lambda *args, **kwargs: None
    for batch in ResumableLoader().batches[:count]:
        (model.training_step([t.double() for t in batch], 0) / count).backward()
    return {name: model.get_parameter(name).grad for name in names}


def subspace_distance(rows, others):
    """The sine of the largest angle between two row spaces."""
    P, Q = (torch.linalg.qr(r.double().mT)[0] for r in (rows, others))
    return torch.linalg.matrix_norm(P @ P.mT - Q @ Q.mT, ord=2).max().item()


@pytest.mark.parametrize(
    ("model", "gradient"),
    [*((m, g) for m in (Net, ZooNoPad) for g in GRADIENTS), (TiedNet, "projected")],
)
@pytest.mark.parametrize("decomposition", ["product", "dora"])
def test_where_4r_reach_the_smaller_side_the_start_is_that_of_the_exact_decomposition(
    decomposition, model, gradient, tmp_path
):
    """A0 = c V_r^T and B0 = c U_{r:2r}^T with c = (m / gamma^2)^(1/4), up to the signs of singular vectors."""
    lora = {"decomposition": decomposition, "adapter_dtype": "float64"}
    seen, _ = start(tmp_path, model(), gradient, lora=lora, **DOUBLE)
    plain = model()
    keys = {name: name if name in dict(plain.named_parameters()) else f"{name}.weight" for name in seen.adapters}
    gradients = mean_gradients(plain, keys.values())
    exact_ones = []
    for name, a in seen.adapters.items():
        G = a.as_matrix(gradients[keys[name]])
        (*_, m, n), r = G.shape, a.rank
        U, S, Vh = torch.linalg.svd(G, full_matrices=False)
        c = m**0.25 / math.sqrt(GAMMA)
        kept = S[..., : 2 * r] / S[..., :1]
        gaps = (S[..., :-1] - S[..., 1:])[..., : 2 * r] / S[..., :1]
        assert torch.equal(a.A, a.A0)
        assert torch.equal(a.B, a.B0)
        for factor in (a.A0, a.B0):
            torch.testing.assert_close(
                factor @ factor.mT, (c**2 * torch.eye(r, dtype=torch.float64)).expand(*factor.shape[:-2], r, r)
            )
        if min(m, n) <= 4 * r and kept.min() > 1e-6 and gaps.min() > 1e-6:  # vectors of different values are unique
            exact_ones.append(name)
            for own, exact in ((a.A0, Vh[..., :r, :]), (a.B0, U[..., r : 2 * r].mT)):
                along = (own * exact).sum(-1).abs()
                torch.testing.assert_close(along, torch.full_like(along, c), rtol=1e-6, atol=1e-6)
    assert len(exact_ones) >= len(seen.adapters) / 2


def test_elsewhere_the_subspaces_are_close(tmp_path):
    """Rank 1 of sides 8 to 16: 4 columns and one power iteration."""
    seen, _ = start(tmp_path, Net(), lora={"rank": 1, "adapter_dtype": "float64"}, **DOUBLE)
    gradients = mean_gradients(Net(), [f"{name}.weight" for name in seen.adapters])
    for name, a in seen.adapters.items():
        U, _, Vh = torch.linalg.svd(gradients[f"{name}.weight"])
        assert subspace_distance(a.A0, Vh[:1]) < 0.05, name
        assert subspace_distance(a.B0, U[:, 1:2].T) < 0.25, name


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("gradient", HOLDING)
@pytest.mark.parametrize("model", [Net, ZooNoPad])
def test_every_gradient_finds_the_same_start(model, gradient, precision, tmp_path):
    """To the rounding of the backward passes, which differ in where bfloat16 rounds."""
    runs = [start(tmp_path, model(), kind, precision=precision)[0] for kind in ("factored", gradient)]
    for name, a in runs[0].adapters.items():
        b = runs[1].adapters[name]
        if precision == "32-true":
            torch.testing.assert_close(b.B0.mT @ b.A0, a.B0.mT @ a.A0, rtol=1e-3, atol=1e-3)
        assert a.A0.isfinite().all()
        assert b.A0.any()


def test_a_step_that_accumulates_more_batches_is_seen_whole(tmp_path):
    lora = {"adapter_dtype": "float64"}
    options = {"accumulate_grad_batches": 6, "lora": lora, **DOUBLE}
    seen, _ = start(tmp_path, Net(), **options)
    gradients = mean_gradients(Net(), [f"{name}.weight" for name in seen.adapters], count=6)
    a = seen.adapters["layers.0"]
    _, _, Vh = torch.linalg.svd(gradients["layers.0.weight"])
    assert subspace_distance(a.A0, Vh[:2]) < 1e-6


# ------------------------------------------------------------------------------------------------------------ no trace


class Traceable(Net):
    """Draws, counts, logs, and notes the batches that it trains on."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.5)
        self.error = torchmetrics.MeanSquaredError()
        self.mean = torchmetrics.MeanMetric()
        self.seen: list[float] = []

    def training_step(self, batch, batch_idx):
        x, y = batch
        random.random()
        np.random.rand()  # noqa: NPY002
        out = self(self.dropout(x))
        self.error.update(out, y)
        self.mean.update(7.0)
        self.log("error", self.error, on_step=False, on_epoch=True)
        self.log_dict({"one": 1.0, "drawn": torch.rand(())})
        return {"loss": nn.functional.mse_loss(out, y)}

    def on_train_batch_start(self, batch, batch_idx) -> None:
        self.seen.append(batch[0].sum().item())


class Watch(Start):
    """What a run makes of its first batches, whatever the adapters are."""

    def take(self, trainer, pl_module) -> None:
        super().take(trainer, pl_module)
        self.state = {
            "buffers": digest(dict(pl_module.named_buffers())),
            "error": (pl_module.error.update_count, digest(pl_module.error.metric_state)),
            "mean": (pl_module.mean.update_count, digest(pl_module.mean.metric_state)),
            "logged": {**trainer.logged_metrics, **trainer.callback_metrics, **trainer.progress_bar_metrics},
            "results": [] if trainer._results is None else list(trainer._results),
            "step": trainer.global_step,
            "training": [m.training for m in pl_module.modules()],
        }


def shuffled(seed=None, **options):
    loader = data()
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return DataLoader(loader.dataset, batch_size=4, shuffle=True, generator=generator, **options)


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize(
    "loader",
    [
        pytest.param(ResumableLoader, id="resumable"),
        pytest.param(data, id="in order"),
        pytest.param(shuffled, id="shuffled"),
        pytest.param(lambda: shuffled(3), id="shuffled by a generator"),
    ],
)
def test_the_first_batches_leave_no_trace(loader, gradient, tmp_path):
    runs = []
    for init in ("zero", "gradient"):
        torch.manual_seed(0)
        random.seed(0)
        seed_numpy(0)
        watch, model = Watch(), Traceable()
        feed = loader()
        trainer(tmp_path, LoRA(rank=2, init=init, gradient=gradient), watch, max_steps=5).fit(model, feed)
        runs.append((watch, model, feed))
    (zero, plain, _), (ours, model, feed) = runs
    assert ours.state == zero.state
    assert not ours.grads
    factors = {k: v for k, v in ours.flags.items() if k.endswith(("A0", "B0"))}
    assert {k: v for k, v in ours.flags.items() if k not in factors} == zero.flags
    assert not any(factors.values())
    assert torch.equal(ours.rng[0], zero.rng[0])
    assert ours.rng[1:] == zero.rng[1:]
    assert ours.module == zero.module
    assert model.seen == plain.seen
    assert len(set(model.seen)) == 5
    if isinstance(feed, ResumableLoader):
        assert feed.position == 5


def test_a_metric_that_held_something_before_holds_it_still(tmp_path):
    class Warm(Traceable):
        def on_fit_start(self) -> None:
            self.mean.update(5.0)

    watch = Watch()
    trainer(tmp_path, LoRA(rank=2, init="gradient"), watch, max_steps=1).fit(model := Warm(), ResumableLoader())
    assert watch.state["mean"][0] == 1
    assert model.mean.compute() == 6.0


def test_it_is_the_same_whatever_the_state_of_the_global_generator(tmp_path):
    """With a dropout in the module and a loader that keeps its order."""
    starts = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = Traceable()
        seen, _ = start(tmp_path, model, loader=data())
        starts.append(digest([[a.A0, a.B0] for a in seen.adapters.values()]))
    assert starts[0] == starts[1]


def test_nothing_of_it_reaches_a_logger(tmp_path):
    rows = []
    for init in ("zero", "gradient"):
        logger = CSVLogger(tmp_path, name=init)
        options = {"logger": logger, "max_steps": 2}
        trainer(tmp_path, LoRA(rank=2, init=init), **options).fit(Traceable(), ResumableLoader())
        rows.append([row["step"] for row in logger.experiment.metrics])
    assert rows[0] == rows[1]


def test_no_two_full_gradients_stand_together(tmp_path):
    """Counted whenever one has been accumulated, before and after the library takes it."""
    counts: list[int] = []

    class Counted(Zoo):
        def on_fit_start(self):
            weights = [place.weight for place in places(self)]

            def count(_):
                counts.append(sum(w.grad is not None for w in weights))

            for weight in weights:
                weight.requires_grad_(True)
                weight.register_post_accumulate_grad_hook(count)
                weight.requires_grad_(False)

    start(tmp_path, Counted(), lora=ZOO)
    assert max(counts) == 1
    assert len(counts) >= 4 * 4 * 5


def test_a_resumed_run_does_not_look_for_its_start_again(tmp_path):
    first, run = start(tmp_path, Net(), steps=-1)
    run.save_checkpoint(tmp_path / "saved.ckpt")
    calls = []

    class Watched(Net):
        def training_step(self, batch, batch_idx):
            calls.append(batch_idx)
            return super().training_step(batch, batch_idx)

    seen = Start()
    again = trainer(tmp_path, LoRA(rank=2, init="gradient"), seen, max_epochs=2)
    again.fit(Watched(), ResumableLoader(), ckpt_path=tmp_path / "saved.ckpt")
    assert len(calls) < 8 + PASSES  # of the epoch, and at most one that something else takes a look at
    for name, a in seen.adapters.items():
        assert torch.equal(a.A0, first.adapters[name].A0)
        assert torch.equal(a.B0, first.adapters[name].B0)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_several_loaders_at_once_give_batches_as_the_run_gets_them(gradient, tmp_path):
    class Two(Net):
        def training_step(self, batch, batch_idx):
            return self.loss(batch["a"]) + self.loss(batch["b"])

    start(tmp_path, Two(), gradient, loader={"a": data(), "b": data(1)})


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_a_layer_that_the_first_batches_do_not_use_starts_at_zero_with_a_warning(gradient, tmp_path):
    class Idle(Net):
        def _make(self, where):
            super()._make(where)
            self.idle = nn.Linear(8, 8)

    with pytest.warns(UserWarning, match="'?idle'?"):
        seen, _ = start(tmp_path, Idle(), gradient)
    assert not seen.adapters["idle"].delta_weight().any()
    assert seen.adapters["layers.0"].A0 is not None


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_two_processes_find_one_start_that_of_all_their_batches(gradient):
    """Two threads in the place of processes, each with every other batch, and a mean that waits for both."""
    barrier, held = threading.Barrier(2, timeout=30), [None, None]

    def module():
        net = Zoo().layers["conv"].double()
        outer = nn.Sequential(net, nn.Tanh(), nn.Linear(6, 4, bias=False).double())
        with torch.no_grad():
            outer[2].weight.copy_(gaussian(4, 6, seed=9))
        inject_options(outer, Options(rank=1, target_modules=["0", "2"], init="gradient", gradient=gradient))
        return outer

    def losses(net, start, step):
        for i in range(start, 4, step):
            yield net(gaussian(3, 6, 6, seed=i)).square().mean()

    def run(rank):
        def mean(tensor):
            held[rank] = tensor
            barrier.wait()
            result = (held[0] + held[1]) / 2
            barrier.wait()
            return result

        start_from_gradients(nets[rank], lambda: losses(nets[rank], rank, 2), mean)

    alone, *nets = (module() for _ in range(3))
    start_from_gradients(alone, lambda: losses(alone, 0, 1), lambda tensor: tensor)
    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name, a in adapters(alone).items():
        first, second = (adapters(net)[name] for net in nets)
        assert torch.equal(first.A0, second.A0)
        assert torch.equal(first.B0, second.B0)
        torch.testing.assert_close(first.B0.T @ first.A0, a.B0.T @ a.A0, rtol=1e-5, atol=1e-6)


def test_manual_optimization_is_refused(tmp_path):
    with pytest.raises(LoRAError, match=r"init='gradient'.*manual optimization"):
        start(tmp_path, TwoOptimizersNet())


def test_inject_has_no_batches_and_refuses_it():
    net = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(ValueError, match=r"init='gradient'.*`inject`.*`LoRA` callback"):
        inject(net, rank=2, init="gradient")
    assert type(net[0]) is nn.Linear


def test_a_layer_too_small_for_2r_vectors_is_refused_where_its_rank_was_given_by_name(tmp_path):
    with pytest.raises(
        ValueError, match=r"init='gradient'`: the rank 3 of 'layers.5', whose weight is 4 x 12: 2 would"
    ):
        start(tmp_path, Net(), lora={"rank": 3, "rank_pattern": {"layers.5": 3}})


# ------------------------------------------------------------------------------------------- all of them in every run

PRECISIONS = {"32-true": "float32", "bf16-true": "bfloat16", "bf16-mixed": "float32", "64-true": "float64"}
"""And the dtype of the adapters."""
STARTS = ["zero", "symmetric", "orthogonal", "pissa", "gradient"]
DECOMPOSED = [("additive", "zero"), *itertools.product(["product", "dora"], STARTS)]


class Output(Callback):
    """What the adapted module computes when training ends."""

    def on_train_end(self, trainer, pl_module) -> None:
        pl_module.eval()
        x = ResumableLoader().batches[0][0].to(pl_module.layers["head"].weight.dtype)
        with torch.no_grad(), trainer.precision_plugin.forward_context():
            self.y = pl_module(x).double()
        self.moved = [a.delta_weight().abs().max().item() for a in adapters(pl_module).values()]
        pl_module.train()


def few():
    loader = ResumableLoader()
    loader.batches = loader.batches[:2]
    return loader


@pytest.mark.parametrize(("decomposed", "gradient", "precision"), pairs(DECOMPOSED, GRADIENTS, PRECISIONS))
def test_fit_save_resume_and_merge(decomposed, gradient, precision, tmp_path):
    options = {"gradient": gradient, "adapter_dtype": PRECISIONS[precision], "rank": 2, "alpha": 3, **ZOO}
    options["decomposition"], options["init"] = decomposed

    def fit(file=None, *callbacks):
        model, seen, output = Zoo(made_in="configure_model"), Digest(), Output()
        run = trainer(
            tmp_path, LoRA(**options, log_memory=False), seen, output, *callbacks, max_epochs=2, precision=precision
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*`isinstance.treespec, LeafSpec.` is deprecated.*")
            run.fit(model, few(), ckpt_path=file)
        return model, seen, output, run

    model, seen, output, run = fit(None, SaveFirst(tmp_path / "saved.ckpt"))
    assert all(moved > 0 for moved in output.moved)

    _, again, *_ = fit(tmp_path / "saved.ckpt")  # a warning, such as that of a recovered W0, would be an error
    assert (again.module, again.optimizers, again.steps) == (seen.module, seen.optimizers, seen.steps)

    x = few().batches[0][0].to(model.layers["head"].weight.dtype)
    with torch.no_grad(), run.precision_plugin.forward_context():
        merged = model.eval()(x).double()
    tolerance = {"32-true": 1e-5, "64-true": 1e-12}.get(precision, 0.05)
    torch.testing.assert_close(merged, output.y, rtol=tolerance, atol=tolerance)

    run.save_checkpoint(tmp_path / "end.ckpt")
    plain = Zoo(made_in="configure_model")
    plain.configure_model()
    for name in ("saved", "end"):
        state = torch.load(tmp_path / f"{name}.ckpt", weights_only=True)["state_dict"]
        assert list(state) == list(plain.state_dict())
        plain.to(state["layers.head.weight"].dtype).load_state_dict(state, strict=True)
    assert digest(state) == digest(model.state_dict())


SENSELESS = [
    *(({"decomposition": "additive", "init": i}, ["additive", i]) for i in STARTS[1:]),
    *(({"dropout": 0.1, "gradient": g}, ["dropout", g]) for g in HOLDING),
    ({"resample_every_n_steps": 1}, ["resample_every_n_steps", "factored", "`gradient='merged'`", "'projected'"]),
    *(
        ({"resample_every_n_steps": 1, "gradient": "merged", "decomposition": d}, ["resample_every_n_steps", d])
        for d in ("additive", "dora")
    ),
    *(
        ({"resample_every_n_steps": 1, "gradient": "merged", "init": i}, ["resample_every_n_steps", i])
        for i in STARTS[1:]
    ),
    (
        {"resample_every_n_steps": 1, "gradient": "merged", "resample": "A", "lr_ratio": 2.0},
        ["lr_ratio", "resample='A'"],
    ),
    ({"resample": "A"}, ["resample='A'", "resample_every_n_steps"]),
    ({"resample_moments": "reset"}, ["resample_moments='reset'", "resample_every_n_steps"]),
]


@pytest.mark.parametrize(("options", "named"), SENSELESS)
@pytest.mark.parametrize("make", [LoRA, Options, lambda **options: inject(nn.Sequential(nn.Linear(4, 4)), **options)])
def test_what_makes_no_sense_together_is_refused_and_both_are_named(make, options, named):
    if make not in (LoRA, Options) and options.get("init") == "gradient":
        pytest.skip("`inject` refuses it alone")
    with pytest.raises(ValueError, match=re.escape(named[0])) as caught:
        make(**options)
    assert all(name in str(caught.value) for name in named), str(caught.value)


@pytest.mark.parametrize("init", ["pisa", "pissa_niter_", "pissa_niter_x", "gradients", 3, None])
def test_an_unknown_start_is_refused_with_those_that_there_are(init):
    with pytest.raises(ValueError, match=r"`init` must be one of 'zero', 'symmetric', 'orthogonal', 'pissa'"):
        LoRA(init=init)
