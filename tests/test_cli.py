"""The callback in a LightningCLI's configuration, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from models import layers

import lightning_lora

PROGRAM = """
import contextlib, io, sys
from lightning.pytorch.cli import LightningCLI
from models import Net, ResumableLoader, data
from lightning.pytorch import LightningDataModule

class Data(LightningDataModule):
    def train_dataloader(self):
        return data()

cli = LightningCLI(Net, Data)
assert type(cli.model) is Net

printed = io.StringIO()
with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
    LightningCLI(Net, Data, args=["fit", "--config", sys.argv[-1], "--print_config"])
with open("printed.yaml", "w") as file:
    file.write(printed.getvalue())
again = LightningCLI(
    Net, Data, args=["fit", "--config", "printed.yaml", "--trainer.default_root_dir=again"],
    save_config_kwargs={"overwrite": True},
)
(first,), (second,) = ([c for c in run.trainer.callbacks if type(c).__name__ == "LoRA"] for run in (cli, again))
assert first.options == second.options
assert (first.checkpoint, first.exact_resume) == (second.checkpoint, second.exact_resume) == ("adapter", True)
with open("help.txt", "w") as file, contextlib.redirect_stdout(file), contextlib.suppress(SystemExit):
    LightningCLI(Net, Data, args=["fit", "--trainer.callbacks.help=lightning_lora.LoRA"])
cli.trainer.save_checkpoint("first.ckpt")
again.trainer.save_checkpoint("second.ckpt")
"""

CONFIG = {
    "seed_everything": 1,
    "trainer": {
        "accelerator": "cpu",
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "callbacks": [
            {
                "class_path": "lightning_lora.LoRA",
                "init_args": {
                    "rank": 2,
                    "alpha": 3,
                    "target_modules": ["layers.0", "layers.3"],
                    "rank_pattern": {"layers.0": 4},
                    "bias": "lora_only",
                    "checkpoint": "adapter",
                    "exact_resume": True,
                },
            }
        ],
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the program has run."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "program.py").write_text(PROGRAM)
    (folder / "run.yaml").write_text(yaml.safe_dump(CONFIG))
    path = os.pathsep.join([str(Path(lightning_lora.__file__).parents[1]), str(Path(__file__).parent)])
    done = subprocess.run(
        [sys.executable, "program.py", "fit", "--config", "run.yaml"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    (folder / "output.txt").write_text(done.stdout + done.stderr)
    return folder


def test_a_yaml_that_names_the_callback_trains_with_its_options(folder):
    file = torch.load(folder / "first.ckpt", weights_only=True)
    entry = file["lightning_lora"]
    assert {name: adapter["A"].shape[0] for name, adapter in entry["adapters"].items()} == {
        "layers.0": 4,
        "layers.3": 2,
    }
    assert [adapter["scale"] for adapter in entry["adapters"].values()] == [3 / 4, 3 / 2]
    assert entry["trained"] == ["layers.0.bias"]
    assert entry["adapters"]["layers.0"]["B"].any()
    assert not torch.equal(file["state_dict"]["layers.0.bias"], layers()[0].bias)


def test_the_table_is_printed(folder):
    assert "Adapted modules" in (folder / "output.txt").read_text()


def test_the_printed_configuration_names_every_option_and_trains_the_same_run(folder):
    printed = yaml.safe_load((folder / "printed.yaml").read_text())
    (callback,) = printed["trainer"]["callbacks"]
    given = CONFIG["trainer"]["callbacks"][0]
    assert callback["class_path"] == given["class_path"]
    assert given["init_args"].items() <= callback["init_args"].items()
    assert callback["init_args"]["dropout"] == 0.0
    first, second = (torch.load(folder / f"{name}.ckpt", weights_only=True) for name in ("first", "second"))
    for name, adapter in first["lightning_lora"]["adapters"].items():
        assert torch.equal(adapter["B"], second["lightning_lora"]["adapters"][name]["B"])


def test_the_help_shows_the_choices_and_no_option_that_does_not_exist(folder):
    text = (folder / "help.txt").read_text()
    assert "gradient {factored,merged,projected}" in text
    assert "bias {none,all,lora_only}" in text
    assert "checkpoint {merged,adapter}" in text
    assert "kwargs" not in text
    assert "lora_alpha" not in text
