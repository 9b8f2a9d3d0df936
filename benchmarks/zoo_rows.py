"""Models of other people's libraries, each with a short run through its own trainer arguments, on generated data.

Nothing here imports this library: a row is run with its callback, and as a plain model in a process without it.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib.util
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader


def stand_in_for_torchvision() -> None:
    """Let torchvision be imported where its wheel was built for CUDA and torch was not.

    Its operators cannot be loaded then, and no row needs them; but the import asks for the names of two.
    """
    if (found := importlib.util.find_spec("torchvision")) is not None and found.origin is not None:
        try:
            torch.ops.load_library(str(Path(found.origin).with_name("_C.so")))
        except OSError:
            for name in ("nms", "qnms"):
                signature = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
                torch.library.define(f"torchvision::{name}", signature)


stand_in_for_torchvision()  # Lightning imports torchvision

from lightning.pytorch import LightningModule, Trainer  # noqa: E402

Fit = Callable[[dict[str, Any], str | None], None]
"""Builds the model, always the same one, and trains it by the Trainer's arguments, from a checkpoint if given one."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One model of a library.

    Args:
        library: What pip installs.
        model: What the table calls the model.
        fit: One run.
        namespace: The package whose Trainer the library uses.
    """

    library: str
    model: str
    fit: Fit
    namespace: str = "lightning.pytorch"


ROWS: dict[str, Row] = {}


def row(library: str, model: str, namespace: str = "lightning.pytorch") -> Callable[[Fit], Fit]:
    """Add a function to the rows under its own name."""

    def add(fit: Fit) -> Fit:
        ROWS[fit.__name__] = Row(library, model, fit, namespace)
        return fit

    return add


class Task(LightningModule):
    """Trains a network as its users do, who write the LightningModule themselves."""

    def __init__(self, net: nn.Module, loss: Callable[[Any, Any], Tensor]) -> None:
        super().__init__()
        self.net = net
        self.loss = loss

    def forward(self, batch: Any) -> Any:
        return self.net(**batch) if isinstance(batch, dict) else self.net(batch[0])

    def training_step(self, batch: Any, _: int) -> Tensor:
        return self.loss(self(batch), batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-2)


def train(module: LightningModule, batches: Iterable[Any], arguments: dict[str, Any], file: str | None) -> None:
    """Fit ``module`` on ``batches``, the same in every epoch."""
    Trainer(**arguments).fit(module, DataLoader(list(batches), batch_size=None), ckpt_path=file)  # type: ignore[arg-type]


# ----------------------------------------------------------------------------------------------------- transformers


def of_transformers(net: nn.Module, arguments: dict[str, Any], file: str | None, **labels: Tensor) -> None:
    """Train a model of transformers, which computes its loss itself, on random tokens."""
    tokens = torch.randint(1, 64, (3, 4, 12))
    batches = [{"input_ids": ids, "labels": labels.get("labels", ids)} for ids in tokens]
    train(Task(net, lambda output, _: output.loss), batches, arguments, file)


SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


@row("transformers", "LlamaForCausalLM")
def llama(arguments: dict[str, Any], file: str | None) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    of_transformers(LlamaForCausalLM(LlamaConfig(**SMALL, num_key_value_heads=2)), arguments, file)


@row("transformers", "BertForSequenceClassification, 2 labels")
def bert(arguments: dict[str, Any], file: str | None) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    net = BertForSequenceClassification(BertConfig(**SMALL, num_labels=2))
    of_transformers(net, arguments, file, labels=torch.tensor([0, 1, 1, 0]))


@row("transformers", "T5ForConditionalGeneration")
def t5(arguments: dict[str, Any], file: str | None) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=64,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
        feed_forward_proj="gated-gelu",
    )
    of_transformers(T5ForConditionalGeneration(config), arguments, file)


@row("transformers", "Qwen3MoeForCausalLM")
def qwen3_moe(arguments: dict[str, Any], file: str | None) -> None:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        **SMALL, num_key_value_heads=2, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24
    )
    of_transformers(Qwen3MoeForCausalLM(config), arguments, file)


# ------------------------------------------------------------------------------------------------------------ timm


def images(size: int = 32, count: int = 4) -> list[tuple[Tensor, Tensor]]:
    """Three batches of random images with labels of four classes."""
    return [(torch.randn(count, 3, size, size), torch.randint(4, (count,))) for _ in range(3)]


def cross_entropy(output: Tensor, batch: Any) -> Tensor:
    """Compare logits with the second part of a batch."""
    return nn.functional.cross_entropy(output, batch[1])


def of_timm(arguments: dict[str, Any], file: str | None, name: str, **options: Any) -> None:
    import timm

    net = timm.create_model(name, pretrained=False, num_classes=4, **options)
    train(Task(net, cross_entropy), images(), arguments, file)


TRANSFORMER = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}


@row("timm", "vit_tiny_patch16_224")
def vit(arguments: dict[str, Any], file: str | None) -> None:
    of_timm(arguments, file, "vit_tiny_patch16_224", **TRANSFORMER)


@row("timm", "beit_base_patch16_224 (reads `qkv.weight`)")
def beit(arguments: dict[str, Any], file: str | None) -> None:
    of_timm(arguments, file, "beit_base_patch16_224", **TRANSFORMER)


@row("timm", "ResNetV2 of StdConv2d")
def resnetv2(arguments: dict[str, Any], file: str | None) -> None:
    from timm.layers import StdConv2d
    from timm.models.resnetv2 import ResNetV2

    net = ResNetV2(layers=(1, 1), channels=(128, 128), num_classes=4, stem_chs=32, conv_layer=StdConv2d)
    train(Task(net, cross_entropy), images(), arguments, file)


@row("timm", "tf_mobilenetv3_small_minimal_100 (Conv2dSame)")
def mobilenet(arguments: dict[str, Any], file: str | None) -> None:
    # in float32, BatchNorm of few pixels turns roundings into other losses
    of_timm({**arguments, "precision": "64-true"}, file, "tf_mobilenetv3_small_minimal_100")


# --------------------------------------------------------------------------------------- segmentation_models_pytorch


@row("segmentation-models-pytorch", "Unet, resnet18")
def unet(arguments: dict[str, Any], file: str | None) -> None:
    import segmentation_models_pytorch as smp

    net = smp.Unet("resnet18", encoder_weights=None, classes=2, encoder_depth=3, decoder_channels=(32, 16, 8))
    masks = [(x, torch.randint(2, (4, 1, 32, 32))) for x, _ in images()]
    loss = smp.losses.DiceLoss("multiclass")
    train(Task(net, lambda output, batch: loss(output, batch[1])), masks, arguments, file)


# ---------------------------------------------------------------------------------------------------------- lightly


@row("lightly", "BYOL")
def byol(arguments: dict[str, Any], file: str | None) -> None:
    from lightly.loss import NegativeCosineSimilarity
    from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead
    from lightly.models.utils import deactivate_requires_grad, update_momentum

    class BYOL(LightningModule):
        """As in lightly's examples, with a small backbone."""

        def __init__(self) -> None:
            super().__init__()
            convolutions = [nn.Conv2d(3, 16, 3, 2), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, 2)]
            self.backbone = nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten())
            self.projection_head = BYOLProjectionHead(32, 64, 16)
            self.prediction_head = BYOLPredictionHead(16, 64, 16)
            self.backbone_momentum = copy.deepcopy(self.backbone)
            self.projection_head_momentum = copy.deepcopy(self.projection_head)
            deactivate_requires_grad(self.backbone_momentum)
            deactivate_requires_grad(self.projection_head_momentum)
            self.criterion = NegativeCosineSimilarity()

        def forward(self, x: Tensor) -> Tensor:
            return self.prediction_head(self.projection_head(self.backbone(x)))

        def forward_momentum(self, x: Tensor) -> Tensor:
            return self.projection_head_momentum(self.backbone_momentum(x)).detach()

        def training_step(self, batch: Any, _: int) -> Tensor:
            update_momentum(self.backbone, self.backbone_momentum, m=0.9)
            update_momentum(self.projection_head, self.projection_head_momentum, m=0.9)
            one, other = batch
            return 0.5 * (
                self.criterion(self(one), self.forward_momentum(other))
                + self.criterion(self(other), self.forward_momentum(one))
            )

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.06)

    views = [(x, x + 0.1 * torch.randn_like(x)) for x, _ in images(count=8)]
    train(BYOL(), views, arguments, file)


# -------------------------------------------------------------------------------------------------- torch_geometric


@row("torch-geometric", "GATConv, two layers")
def gat(arguments: dict[str, Any], file: str | None) -> None:
    from torch_geometric.nn import GATConv

    class GAT(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = GATConv(8, 16, heads=2, dropout=0.2), GATConv(32, 4, heads=1)

        def forward(self, x: Tensor, edge_index: Tensor, y: Tensor) -> Tensor:
            return self.second(nn.functional.elu(self.first(x, edge_index)), edge_index)

    graphs = [
        {"x": torch.randn(20, 8), "edge_index": torch.randint(20, (2, 60)), "y": torch.randint(4, (20,))}
        for _ in range(3)
    ]
    train(Task(GAT(), lambda output, batch: nn.functional.cross_entropy(output, batch["y"])), graphs, arguments, file)


def waves(count: int) -> numpy.ndarray:
    """Return a noisy sine of so many points."""
    return numpy.sin(numpy.arange(count) / 3) + 0.1 * numpy.random.default_rng(0).normal(size=count)


# --------------------------------------------------------------------------------------------- pytorch-forecasting


def of_pytorch_forecasting(arguments: dict[str, Any], file: str | None, name: str, **options: Any) -> None:
    """Train a model that a dataset configures, as in the library's tutorials."""
    import pandas
    import pytorch_forecasting
    from pytorch_forecasting.data import NaNLabelEncoder

    steps, groups = 30, ("a", "b")
    time = numpy.tile(numpy.arange(steps), len(groups))
    value = waves(len(time)) + 2
    frame = pandas.DataFrame({"time": time, "value": value, "group": numpy.repeat(groups, steps)})
    frame["known"] = numpy.cos(frame["time"] / 3)
    data = pytorch_forecasting.TimeSeriesDataSet(
        frame,
        time_idx="time",
        target="value",
        group_ids=["group"],
        max_encoder_length=8,
        max_prediction_length=3,
        static_categoricals=["group"],
        time_varying_known_reals=["known"],
        time_varying_unknown_reals=["value"],
        categorical_encoders={"group": NaNLabelEncoder().fit(frame["group"])},
    )
    options = {"learning_rate": 0.01, "dropout": 0.1, "log_interval": -1, "optimizer": "adam", **options}
    model = getattr(pytorch_forecasting, name).from_dataset(data, **options)
    loader = data.to_dataloader(train=True, batch_size=16, num_workers=0)
    Trainer(gradient_clip_val=0.1, **arguments).fit(model, loader, ckpt_path=file, weights_only=False)


@row("pytorch-forecasting", "TemporalFusionTransformer")
def tft(arguments: dict[str, Any], file: str | None) -> None:
    of_pytorch_forecasting(arguments, file, "TemporalFusionTransformer", hidden_size=8, attention_head_size=2)


@row("pytorch-forecasting", "DeepAR")
def deepar(arguments: dict[str, Any], file: str | None) -> None:
    of_pytorch_forecasting(arguments, file, "DeepAR", hidden_size=16, rnn_layers=2)


# ----------------------------------------------------------------------------------------------------------- darts


def of_darts(arguments: dict[str, Any], file: str | None, name: str, **options: Any) -> None:
    """Train a model on one series, and have it predict after that."""
    from darts import TimeSeries, models

    series = TimeSeries.from_values(waves(60))
    model = getattr(models, name)(
        input_chunk_length=12,
        output_chunk_length=4,
        batch_size=16,
        random_state=0,
        optimizer_kwargs={"lr": 1e-2},
        pl_trainer_kwargs=arguments,
        **options,
    )
    model.load_ckpt_path = file  # as `load_from_checkpoint` leaves it
    model.fit(series, verbose=False)
    model.predict(4, verbose=False)


@row("darts", "TFTModel", "pytorch_lightning")
def darts_tft(arguments: dict[str, Any], file: str | None) -> None:
    of_darts(arguments, file, "TFTModel", hidden_size=8, num_attention_heads=2, add_relative_index=True)


@row("darts", "TCNModel with weight_norm", "pytorch_lightning")
def darts_tcn(arguments: dict[str, Any], file: str | None) -> None:
    of_darts(arguments, file, "TCNModel", num_filters=8, weight_norm=True)


@row("darts", "NBEATSModel", "pytorch_lightning")
def darts_nbeats(arguments: dict[str, Any], file: str | None) -> None:
    of_darts(arguments, file, "NBEATSModel", num_stacks=2, num_blocks=1, num_layers=2, layer_widths=16)


# -------------------------------------------------------------------------------------------------- neuralforecast


def of_neuralforecast(arguments: dict[str, Any], file: str | None, name: str, **options: Any) -> None:
    """Train a model on two series, and have it predict after that. The library has no argument for a checkpoint."""
    import pandas
    import pytorch_lightning
    from neuralforecast import NeuralForecast, models

    steps, names = 60, ("a", "b")
    frame = pandas.DataFrame(
        {
            "unique_id": numpy.repeat(names, steps),
            "ds": numpy.tile(pandas.date_range("2000-01-01", periods=steps), len(names)),
            "y": waves(steps * len(names)),
        }
    )
    arguments = {key: value for key, value in arguments.items() if key != "max_epochs"}  # it counts steps, one an epoch
    model = getattr(models, name)(
        h=4, input_size=12, max_steps=6, learning_rate=1e-2, batch_size=2, windows_batch_size=16, **options, **arguments
    )
    fit = pytorch_lightning.Trainer.fit
    pytorch_lightning.Trainer.fit = functools.partialmethod(fit, ckpt_path=file, weights_only=False)
    try:
        forecast = NeuralForecast(models=[model], freq="D")
        forecast.fit(frame)
    finally:
        pytorch_lightning.Trainer.fit = fit
    forecast.predict()


@row("neuralforecast", "NHITS", "pytorch_lightning")
def nhits(arguments: dict[str, Any], file: str | None) -> None:
    of_neuralforecast(arguments, file, "NHITS", mlp_units=[[16, 16]] * 3)


@row("neuralforecast", "PatchTST", "pytorch_lightning")
def patch_tst(arguments: dict[str, Any], file: str | None) -> None:
    options = {"encoder_layers": 2, "n_heads": 2, "hidden_size": 16, "linear_hidden_size": 32, "patch_len": 4}
    of_neuralforecast(arguments, file, "PatchTST", stride=2, **options)
