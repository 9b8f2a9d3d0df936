"""Quantised modules, each built from plain pretrained layers. A process without the libraries uses the plain one."""

from collections.abc import Callable

import torch
from models import Net
from torch import Tensor, nn


def int8(linear: nn.Linear) -> nn.Module:
    import bitsandbytes as bnb

    layer = bnb.nn.Linear8bitLt(linear.in_features, linear.out_features, linear.bias is not None, False)
    layer.load_state_dict(linear.state_dict())
    return layer.to(linear.weight.device)


def four_bit(**options) -> Callable[[nn.Linear], nn.Module]:
    def make(linear: nn.Linear) -> nn.Module:
        import bitsandbytes as bnb

        layer = bnb.nn.Linear4bit(linear.in_features, linear.out_features, linear.bias is not None, **options)
        layer.load_state_dict(linear.state_dict())
        return layer.to(linear.weight.device)

    return make


def torchao(config: str, **options) -> Callable[[nn.Linear], nn.Module]:
    def make(linear: nn.Linear) -> nn.Module:
        import torchao.quantization

        box = nn.Sequential(linear)
        torchao.quantization.quantize_(box, getattr(torchao.quantization, config)(**options))
        return box[0]

    return make


KINDS: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "int8": int8,
    "nf4": four_bit(quant_type="nf4", compress_statistics=False),
    "nf4-double": four_bit(quant_type="nf4"),
    "fp4": four_bit(quant_type="fp4"),
    "torchao-int8": torchao("Int8WeightOnlyConfig"),
    "torchao-int4": torchao("IntxWeightOnlyConfig", weight_dtype=torch.int4),
}


def dequantized(layer: nn.Module) -> Tensor:
    """The weight in float64, by the library's own functions where it has one."""
    weight = layer._parameters["weight"]
    if type(weight).__module__.startswith("torchao"):
        return weight.dequantize().double()
    import bitsandbytes as bnb

    if hasattr(layer, "compute_dtype"):
        return bnb.functional.dequantize_4bit(weight.data, weight.quant_state).double()
    scales = layer.state.SCB if weight.SCB is None else weight.SCB
    return bnb.functional.int8_vectorwise_dequant(weight.data, scales).double()


class PlainNet(Net):
    """Pretrained layers of which three are Linears: with a bias, without, and a head."""

    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.layers = nn.Sequential(
                nn.Linear(8, 64),
                nn.BatchNorm1d(64),
                nn.Tanh(),
                nn.Linear(64, 32, bias=False),
                nn.Tanh(),
                nn.Linear(32, 4),
            ).to(dtype)


class QuantizedNet(PlainNet):
    """The same, quantised as ``kind`` says."""

    def __init__(self, kind: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(seed, dtype)
        for name, child in list(self.layers.named_children()):
            if isinstance(child, nn.Linear):
                self.layers[int(name)] = KINDS[kind](child)
