"""Each adapter takes the place of its weight in the user's optimizers, and the weights come back when the run ends."""

import pytest
import torch
from lightning.pytorch import Callback
from models import Net, data, trainer
from torch import nn

from lightning_lora import LoRA, adapters
from lightning_lora.errors import LoRAError

GRADIENTS = ["factored", "merged", "projected"]


class Named(Net):
    """Splits its parameters as minGPT does: by names and kinds of modules, with an assertion that none is left."""

    def configure_optimizers(self):
        decay, rest = set(), set()
        for module_name, module in self.named_modules():
            for name, _ in module.named_parameters(recurse=False):
                full = f"{module_name}.{name}" if module_name else name
                (decay if name == "weight" and isinstance(module, nn.Linear) else rest).add(full)
        parameters = dict(self.named_parameters())
        assert decay | rest == set(parameters)
        assert all(p.requires_grad for p in parameters.values())
        groups = [
            {"params": [parameters[name] for name in sorted(decay)], "weight_decay": 0.1, "lr": 3e-3},
            {"params": [parameters[name] for name in sorted(rest)], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=1e-2)


class ByIdentity(Net):
    def configure_optimizers(self):
        first = {id(p) for p in next(self.layers.children()).parameters()}
        groups = [
            {"params": [p for p in self.parameters() if id(p) in first], "lr": 1e-3},
            {"params": [p for p in self.parameters() if id(p) not in first], "lr": 1e-2},
        ]
        return torch.optim.SGD(groups, lr=1.0, momentum=0.9)


class ByDimension(Net):
    def configure_optimizers(self):
        trained = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.AdamW(
            [{"params": [p for p in trained if p.ndim >= 2]}, {"params": [p for p in trained if p.ndim < 2]}], lr=1e-2
        )


class MadeInInit(Net):
    """An optimizer that is older than the adapters, as ``LightningCLI --optimizer`` makes one."""

    def __init__(self, kind: type[torch.optim.Optimizer] = torch.optim.AdamW) -> None:
        super().__init__()
        self.optimizer = kind(self.parameters(), lr=1e-2)

    def configure_optimizers(self):
        return self.optimizer


class Groups(Callback):
    """What stands in the optimizers when training starts."""

    def on_train_start(self, trainer, pl_module) -> None:
        factors = {p: f"{name}.{f}" for name, a in adapters(pl_module).items() for f, p in a.trained.items()}
        (optimizer,) = trainer.optimizers
        self.names = [[factors.get(p, "?") for p in group["params"]] for group in optimizer.param_groups]
        self.rates = [group["lr"] for group in optimizer.param_groups]


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.filterwarnings("ignore:A parameter group")
@pytest.mark.parametrize("kind", [Named, ByIdentity, ByDimension, MadeInInit])
def test_groups_come_out_as_in_full_fine_tuning_with_each_adapter_in_the_place_of_its_weight(kind, gradient, tmp_path):
    model, groups = kind(), Groups()
    plain = model.configure_optimizers()
    names = {p: name for name, p in model.named_parameters()}
    expected = [
        [f"{names[p].removesuffix('.weight')}.{f}" for p in g["params"] if p.ndim == 2 for f in "AB"]
        for g in plain.param_groups
    ]
    before = {name: p.clone() for name, p in model.named_parameters()}
    trainer(tmp_path, LoRA(rank=2, gradient=gradient), groups).fit(model, data())
    assert groups.names == expected
    assert groups.rates == [group["lr"] for group in plain.param_groups]
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name, p in before.items() if p.ndim == 2}


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.Adagrad])
def test_an_optimizer_made_in_init_has_its_weights_and_states_back_after_fit_and_trains_in_a_second_run(
    optimizer, tmp_path
):
    model = MadeInInit(optimizer)
    params = list(model.optimizer.param_groups[0]["params"])
    states = dict(model.optimizer.state)
    for _ in range(2):
        before = [p.clone() for p in params]
        trainer(tmp_path, LoRA(rank=2)).fit(model, data())
        assert model.optimizer.param_groups[0]["params"] == params
        assert model.optimizer.state.keys() == states.keys()
        assert all(model.optimizer.state[p] is states[p] for p in states)
        assert any(not torch.equal(p, b) for p, b in zip(params, before, strict=True))


def test_the_weights_are_back_in_the_optimizer_after_an_exception(tmp_path):
    class Fails(MadeInInit):
        def on_train_batch_end(self, *_) -> None:
            raise OSError("disk")

    model = Fails()
    params = list(model.optimizer.param_groups[0]["params"])
    with pytest.raises(OSError, match="disk"):
        trainer(tmp_path, LoRA(rank=2)).fit(model, data())
    assert model.optimizer.param_groups[0]["params"] == params
    assert not any(p in model.optimizer.state for p in params)


def test_names_in_groups_follow(tmp_path):
    class WithNames(Net):
        def configure_optimizers(self):
            return torch.optim.AdamW(self.named_parameters(), lr=1e-2)

    class Names(Callback):
        def on_train_start(self, trainer, pl_module) -> None:
            self.names = trainer.optimizers[0].param_groups[0]["param_names"]

    names = Names()
    trainer(tmp_path, LoRA(rank=2), names).fit(WithNames(), data())
    assert names.names[:2] == ["layers.0.lora.A", "layers.0.lora.B"]
    assert not any(name.endswith("bias") for name in names.names)


def test_an_optimizer_left_with_nothing_to_train_is_an_error_that_says_so(tmp_path):
    class TwoNets(Net):
        def __init__(self) -> None:
            super().__init__()
            self.other = nn.Linear(8, 8)
            self.automatic_optimization = False

        def training_step(self, batch, index) -> None: ...

        def configure_optimizers(self):
            return torch.optim.SGD(self.layers.parameters(), lr=1.0), torch.optim.Adam(self.other.parameters())

    model = TwoNets()
    with pytest.raises(LoRAError, match=r"Adam has nothing left to train.*'other.weight'"):
        trainer(tmp_path, LoRA(rank=2, exclude_modules=["other"])).fit(model, data())
    assert not adapters(model)
    assert all(p.requires_grad for p in model.parameters())


class WithTarget(Net):
    """As soft actor-critic's target networks: they look trainable, and no optimizer has them."""

    def __init__(self) -> None:
        super().__init__()
        self.target = nn.Linear(8, 8)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.layers.parameters(), lr=1e-2)


def test_a_trainable_looking_weight_in_no_optimizer_stays_as_it_is_and_is_named(tmp_path, caplog):
    model, groups = WithTarget(), Groups()
    before = model.target.weight.clone()
    with caplog.at_level("INFO"):
        trainer(tmp_path, LoRA(rank=2), groups).fit(model, data())
    assert "No optimizer has the weights of 'target'" in caplog.text
    assert not any("target" in name for group in groups.names for name in group)
    assert torch.equal(model.target.weight, before)


def test_one_that_was_asked_for_by_name_is_an_error_with_the_remedy(tmp_path):
    with pytest.raises(LoRAError, match=r"exclude_modules=\['target'\]"):
        trainer(tmp_path, LoRA(rank=2, target_modules=["0", "target"])).fit(WithTarget(), data())


def test_a_list_of_the_optimizers_own_is_refused_by_its_name(tmp_path):
    class Lookahead(torch.optim.SGD):
        def __init__(self, params, **kwargs) -> None:
            super().__init__(params, **kwargs)
            self.fast = [p for group in self.param_groups for p in group["params"]]

    class WithLookahead(Net):
        def configure_optimizers(self):
            return Lookahead(self.parameters(), lr=0.1)

    with pytest.raises(LoRAError, match="Lookahead keeps the weights in a list of its own, `fast`"):
        trainer(tmp_path, LoRA(rank=2)).fit(WithLookahead(), data())


def test_hooks_that_wait_for_the_gradient_of_a_weight_are_refused_by_its_name(tmp_path):
    class StepsInBackward(Net):
        def configure_optimizers(self):
            for p in self.parameters():
                p.register_post_accumulate_grad_hook(lambda p: None)
            return torch.optim.SGD(self.parameters(), lr=0.1)

    with pytest.raises(LoRAError, match=r"'layers.0.weight' has a hook that waits for its gradient"):
        trainer(tmp_path, LoRA(rank=2)).fit(StepsInBackward(), data())
