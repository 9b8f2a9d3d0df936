"""The life of a run under the other name of Lightning, in a process of its own: importing both has side effects."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from lightning_utilities.core.imports import RequirementCache

import lightning_lora

pytestmark = pytest.mark.skipif(not RequirementCache("pytorch-lightning"), reason="needs pytorch-lightning")

MODULE = """
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
import pytorch_lightning as L

generator = torch.Generator().manual_seed(0)
X, Y = torch.randn(16, 8, generator=generator), torch.randn(16, 4, generator=generator)

def data():
    return DataLoader(TensorDataset(X, Y), batch_size=4)

class Net(L.LightningModule):
    def __init__(self, lr: float = 0.05):
        super().__init__()
        self.save_hyperparameters()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.layers = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))

    def forward(self, x):
        return self.layers(x)

    def training_step(self, batch, batch_idx):
        loss = nn.functional.mse_loss(self(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", nn.functional.mse_loss(self(batch[0]), batch[1]))

    def test_step(self, batch, batch_idx):
        self.log("test_loss", nn.functional.mse_loss(self(batch[0]), batch[1]))

    def predict_step(self, batch, batch_idx):
        return self(batch[0])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.hparams.lr)

class Data(L.LightningDataModule):
    def train_dataloader(self):
        return data()

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader
"""

PROGRAM = """
import json, logging, tempfile, warnings
from contextlib import redirect_stdout
from importlib import import_module
from io import StringIO
warnings.filterwarnings("error", message=".*LoRA.*|.*adapter.*|.*lightning_lora.*")
from pathlib import Path
from net import L, Data, Net, X, Y, data
import torch
from torch import nn
from lightning_lora import LoRA, adapters
from lightning_lora.errors import LoRAError

callbacks = L.callbacks

def trainer(*given, folder=None, **options):
    quiet = dict(
        accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
        num_sanity_val_steps=0, log_every_n_steps=1, max_epochs=2,
        enable_checkpointing=any(isinstance(c, callbacks.Checkpoint) for c in given),
    )
    return L.Trainer(**{**quiet, **options}, default_root_dir=folder or tempfile.mkdtemp(), callbacks=list(given))

class Watch(L.Callback):
    def on_train_end(self, trainer, pl_module):
        found = adapters(pl_module)
        self.adapted = list(found)
        self.moved = all(bool(a.B.any()) for a in found.values())
        self.bits = [p.detach().clone() for a in found.values() for p in a.parameters()]
        self.bits += [v for o in trainer.optimizers for s in o.state_dict()["state"].values() for v in s.values()]
        self.W = {k: v.clone() for k, v in pl_module.state_dict().items()}
        with torch.no_grad():
            self.output = pl_module(X)

def same(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b))

def states(module):
    return list(module.state_dict().values())

def refusal(f):
    try:
        f()
    except LoRAError as error:
        return str(error)
    return "nothing was refused"

class Freezing(callbacks.BaseFinetuning):
    def freeze_before_training(self, pl_module): ...
    def finetune_function(self, *args): ...

def lifecycle(gradient, form):
    folder, model, watch = tempfile.mkdtemp(), Net(), Watch()
    lora = LoRA(rank=2, gradient=gradient, checkpoint=form)
    saves = callbacks.ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, every_n_epochs=1)
    run = trainer(lora, watch, saves)
    run.fit(model, data(), data())
    model.eval()
    output = model(X).detach()
    result = dict(
        callback=isinstance(lora, L.Callback),
        adapted=watch.adapted,
        moved=watch.moved,
        plain=not adapters(model) and type(model) is Net and list(model.state_dict()) == list(Net().state_dict()),
        merged=torch.allclose(output, watch.output, atol=1e-6),
        report=lora.memory is not None,
    )
    loss = nn.functional.mse_loss(output, Y).item()
    validated = run.validate(model, data(), verbose=False)[0]["val_loss"]
    tested = run.test(model, data(), verbose=False)[0]["test_loss"]
    predicted = torch.cat(run.predict(model, data()))
    result["evaluated"] = abs(validated - loss) < 1e-6 and abs(tested - loss) < 1e-6
    result["predicted"] = torch.allclose(predicted, output, atol=1e-6)

    again, resumed = Watch(), Net()
    trainer(LoRA(rank=2, gradient=gradient, checkpoint=form), again, callbacks.ModelCheckpoint(folder)).fit(
        resumed, data(), data(), ckpt_path=folder + "/epoch=0.ckpt"
    )
    result["resumed"] = same(again.bits, watch.bits) and same(states(resumed), states(model))

    # the best file, in evaluation, and after fit
    file = folder + "/epoch=1.ckpt"
    (from_file,) = trainer(LoRA(rank=2)).test(Net(), data(), ckpt_path=file, verbose=False)
    result["from a file"] = abs(from_file["test_loss"] - loss) < 1e-6
    if form == "merged":
        other = Net.load_from_checkpoint(file)
        result["loaded"] = same(states(other), list(watch.W.values()))
    run.save_checkpoint(folder + "/after.ckpt")
    on = trainer(LoRA(rank=2, gradient=gradient, checkpoint=form), max_epochs=3)
    on.fit(Net(), data(), ckpt_path=folder + "/after.ckpt")
    result["goes on"] = on.global_step
    return result

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message=".*callbacks used to create the checkpoint.*")
    results = {
        "lifecycle": {
            f"{g} {f}": lifecycle(g, f)
            for g, f in [("factored", "merged"), ("factored", "adapter"), ("merged", "merged"), ("projected", "merged")]
        },
    }
results["refused"] = {
    "two": refusal(lambda: trainer(LoRA(rank=2), LoRA(rank=2)).fit(Net(), data())),
    "finetuning": refusal(lambda: trainer(LoRA(rank=2), Freezing()).fit(Net(), data())),
    "pruning": refusal(
        lambda: trainer(LoRA(rank=2), callbacks.ModelPruning("l1_unstructured", amount=0.5)).fit(Net(), data())
    ),
    "swa": refusal(lambda: trainer(LoRA(rank=2), callbacks.StochasticWeightAveraging(0.1)).fit(Net(), data())),
}
class Own(import_module(L.__name__ + ".strategies").SingleDeviceStrategy):
    pass

own = trainer(LoRA(rank=2), strategy=Own(accelerator=None, device=torch.device("cpu")))
own.fit(Net(), data())
results["own strategy"] = own.global_step
precision = trainer(LoRA(rank=2), precision="bf16-true")
precision.fit(Net(), data())
results["bf16-true"] = precision.global_step

if hasattr(callbacks, "EMAWeightAveraging"):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*WeightAveraging.*configure_model.*")
        watch, model = Watch(), Net()
        trainer(LoRA(rank=2), callbacks.EMAWeightAveraging(decay=0.5), watch).fit(model, data(), data())
        results["averages"] = [watch.adapted, refusal(
            lambda: trainer(LoRA(rank=2, gradient="merged"), callbacks.WeightAveraging()).fit(Net(), data())
        )]

tuned = Net()
finder = trainer(LoRA(rank=2), max_epochs=1)
import_module(L.__name__ + ".tuner").Tuner(finder).lr_find(tuned, data(), num_training=4)
results["tuned"] = same(states(tuned), states(Net())) and not adapters(tuned)

rows = []
class Log(import_module(L.__name__ + ".loggers.logger").DummyLogger):
    def log_metrics(self, metrics, step=None):
        rows.append(["metrics", sorted(metrics), step])
    def log_hyperparams(self, params, *args, **kwargs):
        rows.append(["hyperparameters", sorted(dict(params))])
trainer(LoRA(rank=2), logger=Log(), max_epochs=1).fit(Net(), data())
results["hyperparameters"] = [row[1] for row in rows if row[0] == "hyperparameters"]
results["memory rows"] = sum("memory" in " ".join(row[1]) for row in rows if row[0] == "metrics")

printed, handler = StringIO(), logging.StreamHandler(text := StringIO())
logging.getLogger("lightning_lora").addHandler(handler)
with redirect_stdout(printed):
    trainer(LoRA(rank=2), enable_model_summary=True, max_epochs=1).fit(Net(), data())
results["table"] = "Adapted modules" in printed.getvalue() + text.getvalue()
CLI = import_module(L.__name__ + ".cli").LightningCLI
with warnings.catch_warnings(), redirect_stdout(printed):
    warnings.filterwarnings("ignore", message=".*configure_optimizers. will be overridden.*")
    common = ["--config", "run.yaml"]
    def cli(*args):
        return CLI(Net, Data, args=[*args], save_config_callback=None)
    first = cli("fit", *common, "--optimizer", "AdamW")
    first.trainer.save_checkpoint("cli.ckpt")
    loss = nn.functional.mse_loss(first.model(X), Y).item()
    second = cli("fit", *common, "--optimizer", "AdamW", "--trainer.max_epochs", "2", "--ckpt_path", "cli.ckpt")
    tested = cli("test", *common, "--ckpt_path", "cli.ckpt").trainer.callback_metrics["test_loss"].item()
results["cli"] = {
    "adapted": list(torch.load("cli.ckpt", weights_only=True)["lightning_lora"]["adapters"]),
    "class": type(first.model) is Net,
    "steps": [first.trainer.global_step, second.trainer.global_step],
    "tested": abs(tested - loss) < 1e-6,
}
print(json.dumps(results))
"""

CONFIG = {
    "seed_everything": 1,
    "trainer": {
        "accelerator": "cpu",
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "callbacks": [{"class_path": "lightning_lora.LoRA", "init_args": {"rank": 2, "target_modules": ["layers.0"]}}],
    },
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What the program found."""
    folder = tmp_path_factory.mktemp("namespace")
    (folder / "net.py").write_text(MODULE)
    (folder / "program.py").write_text(PROGRAM)
    (folder / "run.yaml").write_text(yaml.safe_dump(CONFIG))
    path = os.pathsep.join([str(Path(lightning_lora.__file__).parents[1]), str(folder)])
    done = subprocess.run(
        [sys.executable, "program.py"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_fit_evaluation_files_and_resuming_work_and_resuming_is_bitwise(results):
    for name, found in results["lifecycle"].items():
        expected = {
            "callback": True,
            "adapted": ["layers.0", "layers.2"],
            **dict.fromkeys(("moved", "plain", "merged", "report", "evaluated", "predicted"), True),
            **dict.fromkeys(("resumed", "from a file"), True),
            **({} if "adapter" in name else {"loaded": True}),
            "goes on": 12,
        }
        assert found == expected, name


def test_what_is_refused_is_refused_by_its_name(results):
    assert "two LoRA callbacks" in results["refused"]["two"]
    assert "cannot be combined with Freezing" in results["refused"]["finetuning"]
    assert "cannot be combined with ModelPruning" in results["refused"]["pruning"]
    assert "cannot be combined with StochasticWeightAveraging" in results["refused"]["swa"]


def test_strategies_precisions_averages_and_tuners_are_known(results):
    assert results["own strategy"] == results["bf16-true"] == 8
    assert results["tuned"]
    if "averages" in results:
        adapted, refusal = results["averages"]
        assert adapted == ["layers.0", "layers.2"]
        assert "`gradient='factored'`" in refusal


def test_loggers_and_the_table(results):
    assert ["lora"] in results["hyperparameters"]
    assert results["memory rows"] == 1
    assert results["table"]


def test_the_command_line_of_lightning_trains_saves_resumes_and_tests(results):
    assert results["cli"] == {"adapted": ["layers.0"], "class": True, "steps": [4, 8], "tested": True}


def test_no_code_asks_for_instances_of_one_namespace_alone():
    package = Path(lightning_lora.__file__).parent
    classes = "Trainer|LightningModule|LightningDataModule|Callback|ModelSummary|Strategy|Precision|Logger|Checkpoint"
    pattern = re.compile(rf"(isinstance|issubclass)\([^)]*\b\w*({classes})\b")
    found = [(file.name, m.group()) for file in package.rglob("*.py") for m in pattern.finditer(file.read_text())]
    assert found == []
