"""Files that version 0.1.0 wrote, by ``make_old_files.py``: they load, and resume the runs that wrote them."""

import pytest
import torch
from make_old_files import FILES, OLD
from models import Net, ResumableLoader, batches, trainer

from lightning_lora import LoRA, adapters
from lightning_lora.errors import LoRAError

TODAY = {"default": {"target_modules": "all-linear"}}
"""Options whose default was another."""
NOISE = ("layers.0.bias", "layers.1.running_mean")
"""Before a BatchNorm a bias has no gradient but roundings, which Adam makes whole steps of, other ones on each CPU."""
X = torch.cat([x for x, _ in batches()])


def callback(name: str, **options) -> LoRA:
    return LoRA(**{**OLD[name][1], **TODAY.get(name, {}), **options})


def resume(name: str, folder, lora: LoRA):
    """Go on from the file to the end of the run."""
    model = OLD[name][0]()
    run = trainer(folder, lora, max_epochs=2)
    run.fit(model, ResumableLoader(), ckpt_path=FILES / f"{name}.ckpt")
    return run, model


def read(name: str) -> dict:
    return torch.load(FILES / f"{name}.ckpt", weights_only=True)


@pytest.mark.filterwarnings("ignore:AdamW has `weight_decay")
@pytest.mark.parametrize("name", OLD)
def test_a_run_that_version_0_1_0_began_goes_on_to_the_weights_that_it_came_to(name, tmp_path):
    run, model = resume(name, tmp_path, callback(name, exact_resume=True))
    file = read(name)
    assert file["lightning_lora"]["version"] == 1
    assert run.global_step == (32 if name == "drawn" else 16)
    assert not adapters(model)
    state = model.state_dict()
    assert list(state) == list(file["expected"])
    if name != "drawn":  # after the step of the file, projections are drawn by other random numbers now
        for key, expected in file["expected"].items():
            if key not in NOISE:
                torch.testing.assert_close(state[key], expected, rtol=1e-4, atol=1e-6)
    start = Net().layers[0].weight
    assert (state["layers.0.weight"] - start).abs().max() > 100 * 1e-4 * start.abs().max()


def test_where_todays_default_adapts_more_the_error_names_the_default_of_then(tmp_path):
    with pytest.raises(LoRAError, match=r"adapts 'first', .*`target_modules='all-linear'`"):
        resume("default", tmp_path, LoRA(rank=2))


@pytest.mark.parametrize("name", OLD)
def test_a_file_of_version_0_1_0_is_evaluated_as_the_merged_model(name, tmp_path):
    make, file = OLD[name][0], read(name)
    model, by_hand = make(), make()
    loaded = torch.cat(
        trainer(tmp_path, callback(name)).predict(model, ResumableLoader(), ckpt_path=FILES / f"{name}.ckpt")
    )
    if name == "adapters":
        by_hand.load_state_dict(file["state_dict"], strict=False)
        for place, entry in file["lightning_lora"]["adapters"].items():
            by_hand.get_parameter(f"{place}.weight").data += entry["scale"] * entry["B"].T @ entry["A"]
    else:
        by_hand.load_state_dict(file["state_dict"])
    torch.testing.assert_close(loaded, by_hand.eval()(X))
