"""Lightning's weight averaging beside LoRA: in factored mode A and B are averaged, and files have it merged average."""

from collections.abc import Callable

import pytest
import torch
from lightning.pytorch import Callback
from lightning_utilities.core.imports import RequirementCache
from models import Digest, Net, ResumableLoader, batches, data, digest, layers, structure, trainer

from lightning_lora import LoRA, adapters, load_adapter, load_peft, merged_state_dict, save_peft
from lightning_lora.cli import main
from lightning_lora.errors import LoRAError

if not RequirementCache("lightning>=2.6.0"):
    pytest.skip("Lightning averages weights from 2.6 on", allow_module_level=True)

from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, WeightAveraging

pytestmark = pytest.mark.filterwarnings(
    "ignore:You're using the WeightAveraging callback with a model that overrides the configure_model",
    "ignore:The dirpath has changed from",
    "ignore:Be aware that when using `ckpt_path`, callbacks used to create the checkpoint need to be provided",
)

DECAY, X = 0.9, batches()[0][0]
NAMES = ("layers.0", "layers.3", "layers.5")
KINDS: dict[str, Callable[[], Callback]] = {
    "mean": WeightAveraging,
    "moving": lambda: EMAWeightAveraging(decay=DECAY),
    "moving, every other step": lambda: EMAWeightAveraging(decay=DECAY, update_every_n_steps=2),
}


class Watch(Callback):
    """A and B after each step, and what is validated with."""

    def __init__(self) -> None:
        self.steps: list[dict[str, dict[str, torch.Tensor]]] = []
        self.validated: list[torch.Tensor] = []

    def on_train_batch_end(self, trainer, pl_module, *_) -> None:
        found = adapters(pl_module)
        self.steps.append({name: {k: getattr(found[name], k).detach().clone() for k in "AB"} for name in NAMES})

    def on_validation_batch_end(self, trainer, pl_module, *_) -> None:
        with torch.no_grad():
            self.validated.append(pl_module(X.to(pl_module.dtype)))


def by_hand(kind: str, steps: list, name: str, factor: str) -> torch.Tensor:
    """The average of a factor over ``steps``."""
    values = [step[name][factor].double() for step in steps]
    if kind == "mean":
        return torch.stack(values).mean(0)
    values = values[::2] if "other" in kind else values
    average = values[0]
    for value in values[1:]:
        average = DECAY * average + (1 - DECAY) * value
    return average


def merged_by_hand(kind: str, steps: list, name: str) -> torch.Tensor:
    """W0 + s B^T A of the averages of A and B; alpha is 3, of rank 2."""
    A, B = (by_hand(kind, steps, name, factor) for factor in "AB")
    return layers().get_submodule(name.removeprefix("layers.")).weight.detach().double() + 1.5 * B.T @ A


def run(kind: str, is_first: bool, folder, file=None, model=None, **options):
    """Two epochs with an average; the callback of averages stands first in the list, or last."""
    watch, end, lora = Watch(), Digest(), LoRA(rank=2, alpha=3, **options)
    pair = [KINDS[kind](), lora] if is_first else [lora, KINDS[kind]()]
    saves = ModelCheckpoint(folder, filename="{epoch}", every_n_epochs=1, save_top_k=-1)
    model = Net() if model is None else model
    trainer(folder, *pair, watch, end, saves, max_epochs=2).fit(
        model, ResumableLoader(), data(), ckpt_path=None if file is None else file
    )
    return watch, end, model


def read(file) -> dict:
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("is_first", [True, False], ids=["first", "last"])
@pytest.mark.parametrize("kind", KINDS)
def test_A_and_B_are_averaged_merged_in_files_and_after_fit_and_a_run_resumes_bitwise(kind, is_first, tmp_path):
    watch, end, model = run(kind, is_first, tmp_path)
    plain = structure(model)
    file = read(tmp_path / "epoch=0.ckpt")
    for name in NAMES:
        averaged = merged_by_hand(kind, watch.steps[:8], name)
        torch.testing.assert_close(file["state_dict"][f"{name}.weight"].double(), averaged, rtol=1e-6, atol=1e-7)
        current = watch.steps[7][name]["B"].T @ watch.steps[7][name]["A"] * 1.5
        W0 = layers().get_submodule(name.removeprefix("layers.")).weight
        torch.testing.assert_close(file["current_model_state"][f"{name}.weight"], W0 + current)
        assert not torch.allclose(averaged.float(), W0 + current, atol=1e-4)
        after = merged_by_hand(kind, watch.steps, name)
        torch.testing.assert_close(model.get_parameter(f"{name}.weight").double(), after, rtol=1e-6, atol=1e-7)
    loaded = Net()
    loaded.load_state_dict(file["state_dict"])
    torch.testing.assert_close(loaded.eval()(X), watch.validated[0])

    resumed, again, other = run(kind, is_first, tmp_path / "again", tmp_path / "epoch=0.ckpt")
    assert (again.steps, again.module, again.optimizers) == (end.steps, end.module, end.optimizers)
    assert digest(resumed.steps) == digest(watch.steps[8:])
    assert digest(other.state_dict()) == digest(model.state_dict())
    assert structure(other)["keys"] == plain["keys"] == structure(Net())["keys"]


def test_a_file_of_adapters_has_both_and_resumes_bitwise(tmp_path):
    watch, end, model = run("moving", False, tmp_path, checkpoint="adapter")
    file = read(tmp_path / "epoch=0.ckpt")
    for state in (file["state_dict"], file["current_model_state"]):
        assert not any(f"{name}.weight" in state for name in NAMES)
    average = file["lightning_lora"]["average"]
    for name in NAMES:
        for factor in "AB":
            expected = by_hand("moving", watch.steps[:8], name, factor)
            torch.testing.assert_close(average[name][factor].double(), expected, rtol=1e-6, atol=1e-7)
    _, again, other = run("moving", False, tmp_path / "again", tmp_path / "epoch=0.ckpt", checkpoint="adapter")
    assert (again.module, again.optimizers) == (end.module, end.optimizers)
    assert digest(other.state_dict()) == digest(model.state_dict())


def test_what_is_trained_in_full_is_averaged_too(tmp_path):
    watch, _, model = run("mean", False, tmp_path, modules_to_save=["layers.1"])
    file = read(tmp_path / "epoch=1.ckpt")
    assert digest(file["state_dict"]) == digest(model.state_dict())
    assert not torch.equal(file["state_dict"]["layers.1.weight"], file["current_model_state"]["layers.1.weight"])
    torch.testing.assert_close(model.eval()(X), watch.validated[-1])


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_frozen_weights_are_their_own_average_to_the_bit_in_any_precision(precision, tmp_path):
    class Frozen(Watch):
        def on_train_end(self, trainer, pl_module) -> None:
            self.frozen = {name: pl_module._modules["layers"][int(name[-1])]._parameters["weight"] for name in NAMES}
            self.frozen = {name: p.detach().clone() for name, p in self.frozen.items()}

    watch = Frozen()
    trainer(tmp_path, LoRA(rank=2), EMAWeightAveraging(decay=DECAY), watch, precision=precision).fit(
        Net(), data(), data()
    )
    for name, weight in watch.frozen.items():
        W0 = layers().get_submodule(name.removeprefix("layers.")).weight
        assert torch.equal(weight, W0.detach().to(weight.dtype)), name


@pytest.mark.parametrize("is_first", [True, False], ids=["first", "last"])
@pytest.mark.parametrize("gradient", ["merged", "projected"])
@pytest.mark.parametrize("kind", ["mean", "moving"])
def test_where_weights_hold_their_increments_averages_are_refused_with_the_remedy(kind, gradient, is_first, tmp_path):
    model = Net()
    before, bits = structure(model), digest(model.state_dict())
    with pytest.raises(LoRAError, match=r"WeightAveraging averages .*`gradient='factored'`, in which A and B alone"):
        run(kind, is_first, tmp_path, model=model, gradient=gradient)
    assert (structure(model), digest(model.state_dict())) == (before, bits)


def test_the_average_in_a_file_is_tested_without_the_callbacks(tmp_path):
    run("moving", False, tmp_path)
    (with_lora,) = trainer(tmp_path, LoRA(rank=2, alpha=3)).test(
        Net(), data(), ckpt_path=tmp_path / "epoch=1.ckpt", verbose=False
    )
    (without,) = trainer(tmp_path).test(Net(), data(), ckpt_path=tmp_path / "epoch=1.ckpt", verbose=False)
    assert with_lora == without


def test_whoever_reads_a_file_of_adapters_gets_the_average_that_a_merged_file_has(tmp_path):
    options = {"modules_to_save": ["layers.1"]}
    run("moving", False, tmp_path / "merged", **options)
    run("moving", False, tmp_path / "adapter", checkpoint="adapter", **options)
    expected = read(tmp_path / "merged" / "epoch=1.ckpt")["state_dict"]
    file, base = tmp_path / "adapter" / "epoch=1.ckpt", tmp_path / "base.pt"
    torch.save(Net().state_dict(), base)
    assert main(["merge", str(base), str(file), str(tmp_path / "out.pt")]) == 0
    assert digest(read(tmp_path / "out.pt")) == digest(expected)
    tested = Net()
    trainer(tmp_path, LoRA(rank=2, alpha=3)).test(tested, data(), ckpt_path=file, verbose=False)
    assert digest(tested.state_dict()) == digest(expected)
    loaded, peft = Net(), Net()
    load_adapter(loaded, file)
    save_peft(file, tmp_path / "peft")
    load_peft(peft, tmp_path / "peft")
    for model in (loaded, peft):
        for key, value in merged_state_dict(model).items():
            torch.testing.assert_close(value, expected[key])


BAD = {
    "no Mapping": lambda average: [average],
    "an adapter of another shape": lambda average: {**average, "layers.0": average["layers.3"]},
    "an adapter that is none": lambda average: {**average, "layers.0": {"A": 1}},
    "one adapter less": lambda average: {name: average[name] for name in NAMES[1:]},
    "names that are none": lambda average: {1: average["layers.0"], **average},
}


@pytest.mark.parametrize("what", BAD)
def test_a_malformed_average_is_refused_as_malformed_adapters_are(what, tmp_path):
    run("mean", False, tmp_path)
    file = read(tmp_path / "epoch=0.ckpt")
    file["lightning_lora"]["average"] = BAD[what](file["lightning_lora"]["average"])
    torch.save(file, tmp_path / "bad.ckpt")
    with pytest.raises(ValueError, match=r"The checkpoint's `lightning_lora` entry is malformed: .*average"):
        run("mean", False, tmp_path / "again", tmp_path / "bad.ckpt")
