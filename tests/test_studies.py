"""The studies do what their pages say: tuning, statistics, methods, closed forms, and results that survive a kill."""

import json
import math
from pathlib import Path

import pytest
import torch

from lightning_lora import adapters
from studies import additive, cost, forgetting, projections, report, symmetry
from studies.__main__ import STUDIES, main
from studies.cells import Cell, Results
from studies.digits import OLD, batches, pretrained, task
from studies.methods import LOW, METHODS, Plan, rate, run_cell, runs, search, tuned
from studies.statistics import at_level, band, dummies, explained, holm, paired, sign_flips, spearman
from studies.training import Adaptation, Method, effective_rank, evaluate, norm, run

ROOT = Path(__file__).parents[1]
TINY = Plan(seeds=(0, 1), steps=2, tuning_seeds=(100,), widest=3, only=("full", LOW, "LoRA r=1", "SGD full"))


@pytest.fixture
def quiet(tmp_path):
    return Results(tmp_path, report=lambda line: None)


def fails():
    raise KeyboardInterrupt


# -------------------------------------------------------------------------------------------------------------- cells


def test_a_cell_that_has_a_file_is_not_computed_again(tmp_path):
    said = []
    results = Results(tmp_path, report=said.append)
    assert results.get([Cell("a/b", math.sqrt, (2.0,))]) == [1.4142]
    assert results.get([Cell("a/b", fails)]) == [1.4142]
    assert said == ["a/b"]


def test_a_run_that_is_killed_keeps_the_cells_before_and_leaves_none_half_written(tmp_path):
    results = Results(tmp_path, report=lambda line: None)
    cells = [Cell("a/one", math.sqrt, (1.0,)), Cell("a/two", fails), Cell("a/three", math.sqrt, (9.0,))]
    with pytest.raises(KeyboardInterrupt):
        results.get(cells)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["one.json"]
    (tmp_path / "a/two.unfinished").write_text("{")
    cells[1] = Cell("a/two", math.sqrt, (4.0,))
    assert results.get(cells) == [1.0, 2.0, 3.0]


def test_processes_give_the_same_cells(tmp_path):
    cells = [Cell(f"a/{i}", math.sqrt, (float(i),)) for i in range(3)]
    assert Results(tmp_path, workers=2, report=lambda line: None).get(cells) == [0.0, 1.0, 1.4142]


def test_what_is_not_finite_becomes_none_and_what_is_read_is_what_was_computed(quiet):
    cells = [Cell("a", dict, ((("x", math.nan), ("y", [1.2345678, (1, "z", True)])),))]
    assert quiet.get(cells) == quiet.get(cells) == [{"x": None, "y": [1.2346, [1, "z", True]]}]


# ------------------------------------------------------------------------------------------------------------- tuning


def test_rates_are_half_decades():
    assert [rate(k) for k in (-6, -5, -3, 0)] == [0.001, 0.0032, 0.032, 1.0]


@pytest.mark.parametrize(("best", "tried"), [(-4, 3), (-1, 6), (-7, 6)])
def test_a_search_goes_on_until_its_best_is_at_no_edge(best, tried):
    found = search(lambda lr: abs(2 * math.log10(lr) - best), -4, 9)
    assert found["best"] == rate(best)
    assert not found["at_edge"]
    assert len(found["rates"]) == tried
    assert found["rates"] == sorted(found["rates"])
    i = found["rates"].index(found["best"])
    assert found["losses"][i] < min(found["losses"][i - 1], found["losses"][i + 1])


def test_a_search_turns_away_from_rates_that_diverge_and_says_where_it_ran_out():
    assert search(lambda lr: math.inf if lr > 0.002 else -lr, -4, 9)["best"] == rate(-6)
    endless = search(lambda lr: lr, -4, 5)
    assert len(endless["rates"]) == 5
    assert endless["at_edge"]


def test_the_seeds_of_tuning_are_not_those_that_are_reported():
    plan = Plan()
    assert not set(plan.seeds) & set(plan.tuning_seeds)
    assert len(plan.seeds) >= 5


# --------------------------------------------------------------------------------------------------------- statistics


def test_a_value_at_a_level_is_on_the_line_between_checkpoints():
    x, y = [0.0, 0.4, 0.8, 0.7, 0.9], [1.0, 0.9, 0.5, 0.6, 0.4]
    assert at_level(x, y, 0.6) == pytest.approx(0.7)
    assert at_level(x, y, 0.8) == pytest.approx(0.5)
    assert at_level(x, y, 0.85) == pytest.approx(0.45)
    assert at_level(x, y, 0.95) is None
    assert at_level(x, y, 0.0) == 1.0


def test_a_band_is_that_of_student():
    found = band([1.0, 2.0, 3.0])
    assert found["mean"] == 2.0
    assert found["high"] - 2.0 == pytest.approx(4.302653 / math.sqrt(3), rel=1e-5)  # t at 0.975, two degrees of freedom
    assert math.isnan(band([1.0])["low"])


def test_paired_tests_by_hand():
    found = paired([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])  # differences 1, 2, 3
    assert found["effect"] == pytest.approx(2.0)
    assert found["p"] == pytest.approx(0.0741799, rel=1e-4)  # t = 2 sqrt 3, two degrees of freedom
    assert found["p_signs"] == 0.25  # +++ and ---
    assert paired([1.0, 1.0], [1.0, 1.0])["p"] is None


def test_flips_of_signs_are_exact():
    assert sign_flips([1.0, 1.0, 1.0, 1.0, 1.0]) == 2 / 32
    assert sign_flips([1.0, -1.0]) == 1.0
    assert sign_flips([0.3, 0.1, -0.2]) == 6 / 8  # |sums|: 0.2 0.6 0 0.4, each twice


def test_holm_by_hand():
    assert holm([0.01, 0.04, None, 0.03]) == [0.03, 0.06, None, pytest.approx(0.06)]
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_what_is_explained():
    x = [1.0, 2.0, 3.0, 4.0]
    assert explained([2 * v + 1 for v in x], x) == pytest.approx(1.0)
    assert explained([1.0, 1.0, 5.0, 5.0], *dummies(["a", "a", "b", "b"])) == pytest.approx(1.0)
    assert explained([1.0, -1.0, 1.0, -1.0], [1.0, 1.0, -1.0, -1.0]) == pytest.approx(0.0)
    assert spearman(x, [1.0, 8.0, 27.0, 64.0]) == pytest.approx(1.0)


# ------------------------------------------------------------------------------------------------- digits and training


def test_the_parts_of_a_split_are_the_digits_once_and_another_seed_splits_them_otherwise():
    digits = task(0)
    parts = [digits.old_train, digits.old_test, digits.new_train, digits.new_test]
    assert sum(len(part.x) for part in parts) == 1797
    assert max(part.y.max() for part in parts[:2]) < OLD <= min(part.y.min() for part in parts[2:])
    assert not torch.equal(digits.new_test.x[:20], task(1).new_test.x[:20])
    (x, y), *_ = batches(digits.new_train, 32, 50, 3)
    (again, _), *_ = batches(digits.new_train, 32, 50, 3)
    assert torch.equal(x, again)
    assert x.shape == (32, 8, 8)
    assert y.min() >= OLD


def test_the_pretrained_model_knows_the_old_digits_alone():
    found = evaluate(pretrained(0), task(0))
    assert found["old"] > 0.95
    assert found["new"] == 0.0


@pytest.mark.parametrize("name", list(METHODS))
def test_every_method_moves_the_weights_that_it_should_and_is_read_as_it_computes(name):
    base = pretrained(0)
    adaptation = Adaptation(base, METHODS[name], 0.01, 0)
    before = {key: value.clone() for key, value in base.state_dict().items()}
    for x, y in batches(task(0).new_train, 8, 2, 0):
        adaptation.backward(x, y)
        adaptation.optimizer.step()
    assert norm(adaptation.moved()) > 0
    x = task(0).old_test.x[:8]
    torch.testing.assert_close(adaptation.plain()(x), adaptation.model(x), rtol=1e-4, atol=1e-4)
    moved = {key for key, value in adaptation.plain().state_dict().items() if not torch.equal(value, before[key])}
    if METHODS[name].everything:
        assert moved > set(adaptation.names)
    else:
        assert moved <= set(adaptation.names)
    assert all(torch.equal(value, before[key]) for key, value in base.state_dict().items())


def test_the_full_methods_train_what_adapters_adapt():
    names = [name.removesuffix(".weight") for name in Adaptation(pretrained(0), METHODS["full"], 0.1, 0).names]
    adapted = adapters(Adaptation(pretrained(0), METHODS["LoRA r=8"], 0.1, 0).model)
    assert sorted(adapted) == sorted(names)


def test_a_run_begins_where_the_model_is_and_one_that_diverges_says_so():
    found = run(METHODS["LoRA r=1"], 0.01, 0, steps=2)
    curve = found["curve"]
    assert curve["step"] == [0, 1, 2]
    assert curve["distance"][0] == 0.0 < curve["distance"][1] < curve["distance"][2]
    assert all(five >= ten for five, ten in zip(curve["old_of_five"], curve["old"], strict=True))
    assert curve["step_rank"][0] == pytest.approx(1.0, abs=1e-3)  # B starts at zero, so B alone moves
    assert len(curve["step_rank"]) == 1
    assert found["trained"] == sum(sum(layer.weight.shape) for layer in linears(pretrained(0)))
    assert run(Method("SGD"), 1e12, 0, steps=4)["diverged"]


def linears(model):
    return [layer for layer in model.modules() if isinstance(layer, torch.nn.Linear)]


def test_runs_are_the_same_again():
    assert run_cell("SGD anew both k=1", 0.01, 0, TINY) == run_cell("SGD anew both k=1", 0.01, 0, TINY)


def test_the_low_rate_is_a_tenth_of_the_tuned_one(quiet):
    data = runs(quiet, ["full", LOW], TINY)
    assert data[LOW][0]["lr"] == pytest.approx(data["full"][0]["lr"] / 10)
    assert data["full"][0]["lr"] == tuned(quiet, ["full"], TINY)["full"]["best"]


def test_the_effective_rank_by_hand():
    assert effective_rank(torch.outer(torch.arange(3.0), torch.arange(4.0))) == pytest.approx(1.0)
    assert effective_rank(torch.diag(torch.tensor([2.0, 2.0, 2.0, 0.0]))) == pytest.approx(3.0)
    assert effective_rank(torch.zeros(2, 2)) == 0.0


# --------------------------------------------------------------------------------------------------------- forgetting


def curve_of(new, old):
    return {"curve": {"new": new, "old_of_five": old, "distance": [0.0, 1.0, 2.0], "old_of_five_loss": [0.1, 0.2, 0.4]}}


def test_methods_are_compared_where_their_new_accuracy_is_the_same():
    slow = [curve_of([0.0, 0.4, 0.8 + s / 10], [1.0, 0.9, 0.8]) for s in (0, 1)]
    fast = [curve_of([0.0, 0.9, 0.95], [1.0, 0.5, 0.4]) for _ in range(2)]
    data = {"full": fast, "LoRA r=8": slow}
    (test,) = forgetting.compare(data, 0.8)
    expected = [0.8 - (1 - 0.5 * 8 / 9), 0.9 - 0.1 * 0.4 / 0.5 - (1 - 0.5 * 8 / 9)]
    assert (test["ours"], test["theirs"], test["n"]) == ("LoRA r=8", "full", 2)
    assert test["mean"] == pytest.approx(sum(expected) / 2)
    assert forgetting.lost(slow[0]) == pytest.approx(0.2)
    assert forgetting.kept({"diverged": True}, 0.8) is None
    assert forgetting.bands(slow, "old_of_five", (0.85,)) == {}  # which one of them never reaches


def test_distance_explains_all_where_the_loss_is_a_function_of_it():
    data = {}
    for i, name in enumerate(("full", "LoRA r=8", "SGD full"), 1):
        one = curve_of([0.0, 0.5, 0.9], [1.0, 0.9 - i / 10, 0.8 - i / 10])
        one["curve"]["distance"] = [i * d for d in one["curve"]["distance"]]
        one["curve"]["old_of_five_loss"] = [0.0, *[d**2 / 7 for d in one["curve"]["distance"][1:]]]
        data[name] = [one, one]
    found = forgetting.by_distance(data)
    assert found["points"] == 12
    assert found["explained_by_distance"] == pytest.approx(1.0)
    assert found["explained_by_method"] < 0.9
    assert found["spearman"] == pytest.approx(1.0)
    assert found["spearman_at_level"] == pytest.approx(-1.0)  # who moved further has kept less


# -------------------------------------------------------------------------------------------------------- projections


@pytest.mark.parametrize("kind", projections.KINDS)
@pytest.mark.parametrize("rank", [1, 4])
def test_projections_have_the_unit_matrix_as_mean_and_the_variance_of_the_formula(kind, rank):
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([projections.draw(kind, rank, 8, generator) for _ in range(4000)])
    squares = draws.mT @ draws
    torch.testing.assert_close(squares.mean(0), torch.eye(8), rtol=0, atol=0.15)
    g = torch.randn(1, 8, generator=generator)
    errors = (g @ squares - g).square().sum((1, 2)) / g.square().sum()
    assert errors.mean().item() == pytest.approx(projections.variance(kind, rank, 8), rel=0.1)


def test_one_full_step_lowers_the_new_loss_and_drawn_ones_are_longer():
    found = projections.one_step(0, 2)
    assert found["full, lr=0.003"]["norm"] == pytest.approx(1.0, rel=1e-5)
    assert found["full, lr=0.003"]["new"] < 0
    assert found["A r=1, lr=0.003"]["norm"] > found["A r=8, lr=0.003"]["norm"] > 1


# ------------------------------------------------------------------------------------------------ additive and product


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_the_nearest_additive_increment_is_that_of_least_squares(rank):
    m, n = 8, 12
    target = torch.randn(m, n, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))
    basis = []
    for p in range(rank):
        for j in range(n):
            basis.append(torch.zeros(m, n, dtype=torch.float64))
            basis[-1][p::rank, j] = 1  # A[p, j] stands in the rows i with i mod r = p
        for i in range(m):
            basis.append(torch.zeros(m, n, dtype=torch.float64))
            basis[-1][i, p::rank] = 1
    design = torch.stack([matrix.flatten() for matrix in basis], 1)
    assert torch.linalg.matrix_rank(design) == rank * (m + n) - rank**2
    nearest = design @ torch.linalg.pinv(design) @ target.flatten()
    torch.testing.assert_close(additive.nearest_additive(target, rank).flatten(), nearest)


def test_what_the_forms_can_be_they_leave_nothing_of():
    adaptation = Adaptation(pretrained(0), METHODS["additive r=8"], 0.01, 0)
    for x, y in batches(task(0).new_train, 8, 3, 0):
        adaptation.backward(x, y)
        adaptation.optimizer.step()
    delta = adaptation.moved()[adaptation.names.index("blocks.0.qkv.weight")].double()
    assert additive.left_by_additive(delta, 8) < 1e-9
    assert additive.left_by_additive(delta, 2) > 1e-3
    assert additive.left_by_product(delta, 16) < 1e-9  # of rank up to 2r
    assert additive.left_by_product(delta, 4) > 1e-3
    assert additive.left_by_product(torch.diag(torch.tensor([2.0, 1.0, 1.0])), 1) == pytest.approx(1 / 3)


def test_of_random_targets_the_additive_form_takes_its_share_of_dimensions():
    found = additive.fit_random(32, 48, 20)["random"]
    assert found["additive"] == pytest.approx(found["additive_expected"], rel=0.02)
    assert all(p < a for p, a in zip(found["product"], found["additive"], strict=True))


def test_pairs_of_forms_have_equal_numbers_of_parameters():
    for pair in additive.PAIRS[:2]:
        counts = [Adaptation(pretrained(0), METHODS[name], 0.1, 0).trained for name in pair]
        assert counts[0] == counts[1]


# ----------------------------------------------------------------------------------------------------------- symmetry


@pytest.mark.parametrize("init", symmetry.STARTS)
def test_the_parts_of_a_step_are_the_step(init):
    method = Method("SGD", {"rank": 4, "init": init, "target_modules": ["up", "down"]})
    adaptation = Adaptation(pretrained(0), method, 0.1, 0)
    (x, y), *_ = batches(task(0).new_train, 8, 1, 0)
    known = adapters(adaptation.model)
    before = [(a.A.detach().clone(), a.B.detach().clone()) for a in known.values()]
    weights = dict(zip(adaptation.names, adaptation.weights(), strict=True))
    adaptation.backward(x, y)
    adaptation.optimizer.step()
    after = dict(zip(adaptation.names, adaptation.weights(), strict=True))
    first, second = symmetry.parts(adaptation, before)
    for name, one, two in zip(known, first, second, strict=True):
        step = after[f"{name}.weight"] - weights[f"{name}.weight"]
        torch.testing.assert_close(one + two, step, rtol=1e-3, atol=1e-6)
    assert (norm(second) > 0) == (init in ("symmetric", "pissa", "orthogonal"))


def test_the_second_part_of_a_step_of_sgd_is_of_second_order():
    read = [symmetry.second_order("SGD", "symmetric", 4, lr, 0, 1) for lr in (0.02, 0.01)]
    assert read[0]["first"][0] / read[1]["first"][0] == pytest.approx(2, rel=1e-3)
    assert read[0]["second"][0] / read[1]["second"][0] == pytest.approx(4, rel=1e-3)
    assert symmetry.ratios(read[0])["first"] == pytest.approx(2 * symmetry.ratios(read[1])["first"], rel=1e-3)


# --------------------------------------------------------------------------------------------------------------- cost


@pytest.mark.parametrize("way", ["full", "lora-1", "lora-2"])
def test_operations_are_those_of_the_formula(way):
    assert cost.count(way, 48, 32, 64, 4)["pass"] == cost.formula(way, 48, 32, 64, 4)


def test_the_library_takes_no_more_than_the_article_s_second_form():
    b, n, m, r = 48, 32, 64, 4
    thin = cost.formula("lora-2", b, n, m, r)
    assert cost.count("factored", b, n, m, r) == {"pass": thin, "step": 0}
    merged = cost.count("merged", b, n, m, r)
    assert merged == {"pass": thin - 2 * b * r * (n + m), "step": 4 * r * n * m}  # no increment beside the weight


def test_the_orders_of_cost_turn_where_it_is_said():
    b, n, m = 96, 32, 64
    turns = cost.turn(b, n, m)
    assert cost.formula("lora-2", b, n, m, turns["full"]) == pytest.approx(cost.formula("full", b, n, m, 0))
    thin, formed = (cost.formula(way, b, n, m, turns["formed"]) for way in ("lora-2", "lora-1"))
    assert thin == pytest.approx(formed)
    assert cost.turn(8, 64, 64)["formed"] is None


# ---------------------------------------------------------------------------------------------------------- the command


def test_the_command_writes_results_summaries_tables_and_does_it_once(tmp_path, capsys):
    arguments = ["run", "cost", "--quick", "--results", str(tmp_path / "results"), "--docs", str(tmp_path / "docs")]
    main(arguments)
    assert "cost/b64_n64_m64\n" in capsys.readouterr().out
    written = (tmp_path / "docs/cost_tables.md").read_text()
    main(arguments)
    assert "cost/b64_n64_m64\n" not in capsys.readouterr().out
    assert (tmp_path / "docs/cost_tables.md").read_text() == written
    with pytest.raises(SystemExit):
        main(["run", "costs"])


def test_a_whole_study_gives_tables_and_figures(quiet, tmp_path):
    summary = json.loads(json.dumps(forgetting.study(quiet, TINY)))
    report.write("forgetting", summary, tmp_path / "docs")
    assert set(summary["methods"]) == set(TINY.only)
    assert {path.name for path in (tmp_path / "docs").iterdir()} == {
        "forgetting_tables.md",
        "forgetting_curves.svg",
        "forgetting_distance.svg",
    }


WITH_RESULTS = [name for name in STUDIES if (ROOT / f"studies/results/summaries/{name}.json").exists()]


@pytest.mark.parametrize("name", WITH_RESULTS)
def test_the_tables_in_the_docs_are_those_of_the_committed_results(name):
    summary = json.loads((ROOT / f"studies/results/summaries/{name}.json").read_text())
    lines = "".join(report.tables(name, summary).values()).splitlines()
    generated = (ROOT / f"docs/studies/{name}_tables.md").read_text().splitlines()
    assert [line for line in generated if line.startswith("|")] == lines
    shown = [line for line in (ROOT / f"docs/studies/{name}.md").read_text().splitlines() if line.startswith("| ")]
    assert shown
    assert set(shown) <= set(lines)
