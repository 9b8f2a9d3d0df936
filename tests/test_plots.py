"""What adapters have learned: tables against the full matrices, the numbers in pictures, and logs of a run."""

import math
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from models import Net, data, trainer
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_lora import LoRA, adapter_table, adapters, attach, inject, merged_state_dict, plot_adapters
from lightning_lora.adapters.spectrum import effective_rank, jacobi, rank_holding, singular_values
from lightning_lora.errors import LoRAError
from lightning_lora.injection.inject import places
from lightning_lora.plots import draw, measure, of_module


def moved(module, seed=0, **options):
    """Adapters that have been trained, in float64."""
    inject(module.double(), adapter_dtype="float64", **options)
    generator = torch.Generator().manual_seed(seed)
    for adapter in adapters(module).values():
        if not adapter.holds:
            for p in adapter.trained.values():
                p.data += torch.randn(p.shape, generator=generator, dtype=p.dtype).mul_(0.1)
    return module


def expected(changed, base, increment):
    """norm, relative norm, effective rank, rank of 99 % by the full matrices."""
    sigma = torch.linalg.svdvals(increment.flatten(1))
    p = sigma / sigma.sum()
    p = p[p > 1e-13]
    squares = sigma.square().cumsum(0) / sigma.square().sum()
    held = next(k for k in range(1, len(sigma) + 1) if squares[k - 1] >= 0.99)
    norm = (changed - base).norm().item()
    return norm, norm / base.norm().item(), math.exp(-(p * p.log()).sum().item()), held


def check(row, changed, base, increment):
    norm, relative, effective, held = expected(changed, base, increment)
    assert row.norm == pytest.approx(norm, rel=1e-9)
    assert row.relative_norm == pytest.approx(relative, rel=1e-9)
    assert row.effective_rank == pytest.approx(effective, rel=1e-9)
    assert row.rank_99 == held


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 12),
    st.integers(2, 30),
    st.integers(2, 30),
    st.sampled_from(["product", "additive", "dora"]),
    st.sampled_from(["zero", "symmetric", "pissa"]),
    st.integers(0, 99),
)
def test_a_row_is_what_the_full_matrices_say(rank, m, n, decomposition, init, seed):
    init = "zero" if decomposition == "additive" else init
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(n, m)).double()
    base = module[0].weight.detach().clone()
    moved(module, seed, rank=rank, decomposition=decomposition, init=init)
    (adapter,) = adapters(module).values()
    (row,) = adapter_table(module)
    assert (row.name, row.decomposition, row.rank) == ("0", decomposition, adapter.rank)
    check(row, merged_state_dict(module)["0.weight"], base, adapter.delta_weight())


@pytest.mark.parametrize("gradient", ["merged", "projected"])
@pytest.mark.parametrize("decomposition", ["product", "additive", "dora"])
def test_weights_that_hold_their_increments_give_the_same(decomposition, gradient):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4)).double()
    before = {key: tensor.clone() for key, tensor in module.state_dict().items()}
    moved(module, rank=2, decomposition=decomposition, gradient=gradient)
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.01)
    attach(module, optimizer)
    for _ in range(4):
        optimizer.zero_grad()
        (module(torch.randn(3, 6, dtype=torch.float64)) - 1).square().sum().backward()
        optimizer.step()
    for row, place in zip(adapter_table(module), places(module), strict=True):
        check(row, place.weight.detach(), before[place.key], place.adapter.delta_weight())


@pytest.mark.parametrize(
    ("layer", "options"),
    [
        (nn.Conv2d(3, 5, 3), {}),
        (nn.ConvTranspose1d(4, 6, 3), {}),
        (nn.Embedding(9, 5, padding_idx=2), {"target_modules": ["0"]}),
        (nn.Embedding(8, 4, padding_idx=2), {"target_modules": ["0"], "decomposition": "additive"}),
        (nn.LSTM(4, 4), {"decomposition": "dora"}),
    ],
    ids=["convolution", "transposed convolution", "embedding", "additive embedding", "LSTM"],
)
def test_layers_of_all_layouts(layer, options):
    module = nn.Sequential(layer).double()
    before = {key: tensor.clone() for key, tensor in module.state_dict().items()}
    moved(module, rank=2, **options)
    if "padding_idx" in vars(layer):
        for adapter in adapters(module).values():
            adapter.A.data[..., 2] = 0
    after = merged_state_dict(module)
    for row, place in zip(adapter_table(module), places(module), strict=True):
        check(row, after[place.key], before[place.key], place.adapter.as_matrix(place.adapter.delta_weight()))


def test_a_stack_has_one_row_with_the_mean_effective_rank_and_the_largest_rank():
    module = nn.Module()
    module.experts = nn.Parameter(torch.randn(3, 6, 5, dtype=torch.float64))
    base = module.experts.detach().clone()
    moved(module, rank=3, target_modules=None, target_parameters=["experts"])
    (adapter,) = adapters(module).values()
    adapter.B.data[1, 1:] = 0  # of rank 1
    delta = adapter.delta_weight()
    (row,) = adapter_table(module)
    each = [expected(base[i] + delta[i], base[i], delta[i]) for i in range(3)]
    assert row.norm == pytest.approx(delta.norm().item())
    assert row.relative_norm == pytest.approx((delta.norm() / base.norm()).item())
    assert row.effective_rank == pytest.approx(sum(one[2] for one in each) / 3)
    assert row.rank_99 == max(one[3] for one in each) > each[1][3] == 1


def test_an_adapter_that_has_not_moved_has_rank_zero():
    module = nn.Sequential(nn.Linear(6, 4))
    inject(module, rank=3)
    assert adapter_table(module) == [("0", "product", 3, 0.0, 0.0, 0.0, 0)]


def test_ranks_of_known_spectra():
    sigma = torch.tensor([[1.0, 1, 1, 1], [1, 0, 0, 0], [10, 1, 0, 0], [9, 3, 1, 0], [0, 0, 0, 0]], dtype=torch.float64)
    two = math.exp(-(10 / 11 * math.log(10 / 11) + 1 / 11 * math.log(1 / 11)))
    assert effective_rank(sigma)[[0, 1, 2, 4]].tolist() == pytest.approx([4, 1, two, 0])
    assert rank_holding(sigma, 0.99)[[0, 1, 2, 4]].tolist() == [4, 1, 1, 0]
    assert rank_holding(sigma, 90 / 91 + 1e-9)[3] == 3
    assert rank_holding(sigma, 90 / 91 - 1e-9)[3] == 2


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 24), st.integers(0, 24), st.floats(0, 14), st.integers(0, 99))
def test_the_values_that_no_device_is_waited_for_are_the_singular_values(size, rank, decades, seed):
    generator = torch.Generator().manual_seed(seed)
    left, right = torch.randn(2, 3, size, size, generator=generator, dtype=torch.float64)
    matrix = left * 10.0 ** -torch.linspace(0, decades, size, dtype=torch.float64)
    matrix = matrix @ torch.linalg.qr(right)[0]
    matrix[..., min(rank, size - 1) :] *= 0.0 if rank % 2 else 1.0
    values = torch.linalg.svdvals(matrix)
    torch.testing.assert_close(jacobi(matrix), values, rtol=0, atol=1e-13 * max(values.max().item(), 1e-300))


def test_values_of_different_shapes_come_in_the_order_in_which_they_were_given():
    cores = [torch.full((size, size), float(size)) for size in (2, 3, 2, 1)]
    assert [values[0].item() for values in singular_values(cores)] == pytest.approx([4, 9, 4, 1])


# --------------------------------------------------------------------------------------------------------------- files


@pytest.mark.filterwarnings("ignore:AdamW has `weight_decay:UserWarning")
@pytest.mark.parametrize("form", ["merged", "adapter"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"decomposition": "additive"},
        {"decomposition": "dora"},
        {"init": "symmetric"},
        {"gradient": "merged"},
        {"decomposition": "dora", "gradient": "projected"},
        {"gradient": "merged", "resample_every_n_steps": 3, "resample": "A"},
    ],
    ids=lambda options: ", ".join(map(str, options.values())) or "product",
)
def test_a_file_says_what_its_module_says(options, form, tmp_path):
    if form == "adapter" and "gradient" in options:
        pytest.skip("which is refused")
    rows = []

    class Looks(LoRA):
        def on_train_end(self, trainer, pl_module):
            rows.extend(adapter_table(pl_module))
            trainer.save_checkpoint(tmp_path / "saved.ckpt")

    made = trainer(tmp_path, Looks(rank=2, checkpoint=form, **options), max_steps=5)
    made.fit(Net(), data())
    assert len(rows) == 3
    assert all(row.norm > 0 for row in rows)
    for row, there in zip(rows, adapter_table(tmp_path / "saved.ckpt"), strict=True):
        assert there[:3] == row[:3]
        assert there.effective_rank == pytest.approx(row.effective_rank, rel=1e-5)
        assert there.rank_99 == row.rank_99
        if form == "merged":
            assert there.norm == pytest.approx(row.norm, rel=1e-3 if row.decomposition == "dora" else 1e-6)
            assert there.relative_norm == pytest.approx(row.relative_norm, rel=1e-3)
        else:
            assert there.relative_norm is None
            assert there.norm == (None if row.decomposition == "dora" else pytest.approx(row.norm))
    assert adapter_table(torch.load(tmp_path / "saved.ckpt", weights_only=True)) == adapter_table(
        str(tmp_path / "saved.ckpt")
    )


def test_where_there_are_no_adapters_that_is_said():
    with pytest.raises(LoRAError, match="no adapters"):
        adapter_table(nn.Linear(2, 2))
    with pytest.raises(LoRAError, match="was not written by a run"):
        adapter_table({"state_dict": {}})


# ------------------------------------------------------------------------------------------------------------- pictures


class Block(nn.Module):
    def __init__(self, gate=True) -> None:
        super().__init__()
        self.q, self.v = nn.Linear(6, 6), nn.Linear(6, 6)
        if gate:
            self.gate = nn.Linear(6, 6)


def stack():
    module = nn.Module()
    module.layers = nn.ModuleList([Block(), Block(gate=False), Block()])
    module.out = nn.Linear(6, 4)
    return moved(module, rank=3)


def maps(figure):
    axes = [axes for axes in figure.axes if axes.images]
    return axes, [torch.tensor(one.images[0].get_array().filled(math.nan)) for one in axes]


def test_the_picture_holds_the_tables_numbers_by_layers_and_modules():
    module = stack()
    figure = plot_adapters(module)
    axes, (moves, ranks) = maps(figure)
    columns = ["layers.*.q", "layers.*.v", "layers.*.gate", "out"]
    for one, title in zip(axes, ("|ΔW| / |W₀|", "effective rank"), strict=True):
        assert one.get_title() == title
        assert [label.get_text() for label in one.get_xticklabels()] == columns
        assert [label.get_text() for label in one.get_yticklabels()] == ["", "0", "1", "2"]
    rows = adapter_table(module)
    for row in rows:
        layer, column = (
            (0, 3) if row.name == "out" else (1 + int(row.name[7]), columns.index("layers.*." + row.name[9:]))
        )
        assert moves[layer, column].item() == row.relative_norm
        assert ranks[layer, column].item() == row.effective_rank
    assert len(rows) == 9 == (~moves.isnan()).sum() == (~ranks.isnan()).sum()
    figure.savefig("/dev/null", format="png")


def test_a_file_without_weights_is_drawn_by_absolute_norms(tmp_path):
    made = trainer(tmp_path, LoRA(rank=2, checkpoint="adapter"), max_steps=3)
    made.fit(Net(), data())
    made.save_checkpoint(tmp_path / "saved.ckpt")
    axes, (moves, _) = maps(plot_adapters(tmp_path / "saved.ckpt"))
    assert axes[0].get_title() == "|ΔW|"
    assert moves[:, 0].tolist() == [row.norm for row in adapter_table(tmp_path / "saved.ckpt")]


def test_without_matplotlib_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(LoRAError, match=r'pip install "lightning-lora\[plot\]"'):
        draw(["0"], [1.0], [1.0])


# ----------------------------------------------------------------------------------------------------------------- logs


class Rows(Logger):
    """Keeps what it is given."""

    name, version = "rows", 0

    def __init__(self) -> None:
        super().__init__()
        self.rows: dict[int, dict] = {}

    def log_metrics(self, metrics, step=None):
        self.rows.setdefault(step, {}).update(metrics)

    def log_hyperparams(self, *_, **__):
        pass


@pytest.mark.parametrize("gradient", ["factored", "merged"])
@pytest.mark.parametrize("decomposition", ["product", "dora"])
def test_a_run_logs_what_the_table_says_at_these_steps(decomposition, gradient, tmp_path):
    tables, rows = {}, Rows()

    class Looks(LoRA):
        def on_train_batch_end(self, trainer, pl_module, *args):
            super().on_train_batch_end(trainer, pl_module, *args)
            tables[trainer.global_step] = adapter_table(pl_module)

    options = {
        "gradient": gradient,
        "decomposition": decomposition,
        "log_adapters_every_n_steps": 2,
        "log_memory": False,
    }
    trainer(tmp_path, Looks(rank=2, **options), logger=rows, log_every_n_steps=2, max_steps=5).fit(Net(), data())
    seen = {step: {k: v for k, v in row.items() if k.startswith("lora/")} for step, row in rows.rows.items()}
    seen = {step: row for step, row in seen.items() if row}
    assert list(seen) == [1, 3]  # Lightning counts from zero
    for step, row in seen.items():
        assert len(row) == 6
        for learned in tables[step + 1]:
            rel = 1e-3 if gradient == "merged" or decomposition == "dora" else 1e-5
            assert row[f"lora/relative_norm/{learned.name}"] == pytest.approx(learned.relative_norm, rel=rel)
            assert row[f"lora/effective_rank/{learned.name}"] == pytest.approx(learned.effective_rank, rel=1e-4)


@pytest.mark.parametrize("options", [{}, {"log_adapters_every_n_steps": 3}], ids=["no log", "log"])
def test_nothing_else_of_a_run_changes(options, tmp_path):
    def fit(**options):
        model, rows = Net(), Rows()
        trainer(tmp_path, LoRA(rank=2, log_memory=False, **options), logger=rows, log_every_n_steps=1, max_steps=6).fit(
            model, data()
        )
        return model.state_dict(), rows.rows, torch.rand(1)

    torch.manual_seed(0)
    weights, rows, drawn = fit(**options)
    torch.manual_seed(0)
    expected_weights, expected_rows, expected_drawn = fit()
    assert all(torch.equal(weights[key], expected_weights[key]) for key in expected_weights)
    others = {step: {k: v for k, v in row.items() if not k.startswith("lora/")} for step, row in rows.items()}
    assert others == expected_rows
    assert any(k.startswith("lora/") for row in rows.values() for k in row) == bool(options)
    assert torch.equal(drawn, expected_drawn)


@pytest.mark.parametrize("gradient", ["factored", "merged"])
@pytest.mark.parametrize("decomposition", ["product", "additive", "dora"])
def test_measuring_waits_for_no_device(decomposition, gradient, monkeypatch):
    module = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4))
    inject(module, rank=2, decomposition=decomposition, gradient=gradient)
    monkeypatch.setattr(torch.linalg, "svdvals", lambda matrix: jacobi(matrix))  # as on an accelerator
    waits = []

    class Counts(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = func.name()
            if any(word in name for word in ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "svd", "eig")):
                waits.append(name)
            return func(*args, **(kwargs or {}))

    with Counts():
        found = measure(of_module(module))
    assert found.norm.shape == (2,)
    assert waits == []
    with Counts():
        found.norm[0].item()
    assert waits == ["aten::_local_scalar_dense"]


def test_tensorboard_gets_a_picture_of_each_time(tmp_path, monkeypatch):
    logger, tables, figures = TensorBoardLogger(tmp_path), {}, {}

    class Looks(LoRA):
        def on_train_batch_end(self, trainer, pl_module, *args):
            super().on_train_batch_end(trainer, pl_module, *args)
            tables[trainer.global_step] = adapter_table(pl_module)

    monkeypatch.setattr(
        type(logger.experiment), "add_figure", lambda _, tag, figure, step: figures.update({(tag, step): figure})
    )
    loggers = [logger, CSVLogger(tmp_path)]
    made = trainer(
        tmp_path, Looks(rank=2, log_adapters_every_n_steps=2), logger=loggers, log_every_n_steps=1, max_steps=5
    )
    made.fit(Net(), data())
    assert list(figures) == [("lora/adapters", 2), ("lora/adapters", 4)]
    for (_, step), figure in figures.items():
        _, (moves, ranks) = maps(figure)
        torch.testing.assert_close(
            moves[:, 0], torch.tensor([row.relative_norm for row in tables[step]]).double(), rtol=1e-5, atol=0
        )
        torch.testing.assert_close(
            ranks[:, 0], torch.tensor([row.effective_rank for row in tables[step]]).double(), rtol=1e-4, atol=0
        )


def test_tensorboard_without_matplotlib_has_the_scalars_and_a_warning(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    logger = TensorBoardLogger(tmp_path)
    made = trainer(
        tmp_path, LoRA(rank=2, log_adapters_every_n_steps=1), logger=logger, log_every_n_steps=1, max_steps=1
    )
    with pytest.warns(UserWarning, match=r"no picture of the adapters.*lightning-lora\[plot\]"):
        made.fit(Net(), data())
    assert "lora/relative_norm/layers.0" in made.callback_metrics


def test_steps_that_lightning_writes_no_rows_at_are_named(tmp_path):
    made = trainer(
        tmp_path, LoRA(rank=2, log_adapters_every_n_steps=3), logger=Rows(), log_every_n_steps=2, max_steps=1
    )
    with pytest.warns(UserWarning, match="multiples of `log_every_n_steps=2` alone"):
        made.fit(Net(), data())


@pytest.mark.parametrize("value", [0, -1, 2.0, True, "10"])
def test_the_option_is_a_number_of_steps(value):
    with pytest.raises(LoRAError, match="`log_adapters_every_n_steps` must be an int of at least 1"):
        LoRA(log_adapters_every_n_steps=value)
    assert repr(LoRA(log_adapters_every_n_steps=5)) == "LoRA(log_adapters_every_n_steps=5)"
