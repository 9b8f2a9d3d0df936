"""LightningModules of other layers than Linear, for the data of ``models``. Nothing here imports the library."""

import torch
import torch.nn.functional as F
from models import Net
from torch import Tensor, nn


class Experts(nn.Module):
    """Three matrices in one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 6, 6) / 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.up[0].T) + torch.tanh(x @ self.up[1].T) * (x @ self.up[2].T)


def zoo(seed: int = 0) -> nn.ModuleDict:
    """One layer of every kind: the same for one seed in every process."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.ModuleDict(
            {
                "embed": nn.Embedding(12, 8, padding_idx=0),
                "attention": nn.MultiheadAttention(8, 2, batch_first=True),
                "lstm": nn.LSTM(8, 6, batch_first=True),
                "conv": nn.Conv1d(6, 6, 3, padding=1),
                "experts": Experts(),
                "head": nn.Linear(6, 4),
            }
        )


ZOO = {
    "target_modules": ["embed", "attention", "lstm", "conv", "head"],
    "target_parameters": ["experts.up"],
}
"""The options that adapt every layer of :class:`Zoo`."""


class Zoo(Net):
    """All of them one after the other."""

    def _make(self, where: str) -> None:
        if where == self.hparams["made_in"] and not hasattr(self, "layers"):
            self.layers = zoo(self.hparams["seed"])

    def forward(self, x: Tensor) -> Tensor:
        h = self.layers["embed"]((4 * x.abs()).long().clamp(max=11))
        h = h + self.layers["attention"](h, h, h, need_weights=False)[0]
        with torch.autocast("cpu", enabled=False):  # not every CPU has an LSTM in bfloat16
            h, _ = self.layers["lstm"](h.to(self.layers["lstm"].weight_ih_l0.dtype))
        h = self.layers["conv"](h.mT).mT
        return self.layers["head"](self.layers["experts"](h).mean(1))


class TiedNet(Net):
    """A language model of a kind, whose output head is its embedding."""

    def _make(self, where: str) -> None:
        if where == self.hparams["made_in"] and not hasattr(self, "layers"):
            self.layers = zoo(self.hparams["seed"])
            self.body = nn.Linear(8, 8)
            nn.init.eye_(self.body.weight)
            nn.init.zeros_(self.body.bias)
            for name in ("attention", "lstm", "conv", "experts", "head"):
                del self.layers[name]
            self.out = nn.Linear(8, 12, bias=False)
            self.out.weight = self.layers["embed"].weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.layers["embed"]((4 * x.abs()).long().clamp(max=11)).mean(1)
        return self.out(torch.tanh(self.body(h)))[:, :4]


TIED = {"target_modules": ["layers.embed", "body"]}


class EncoderNet(Net):
    """A ``nn.TransformerEncoder``, which has a fast path for inference that calls none of its layers."""

    def _make(self, where: str) -> None:
        if where == self.hparams["made_in"] and not hasattr(self, "layers"):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.hparams["seed"])
                layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
                self.layers = nn.TransformerEncoder(layer, 2)
                self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        padding = torch.zeros(len(x), 5, dtype=torch.bool)
        padding[:, 4] = True  # nested tensors, another fast path, are used where something is padded
        h = self.layers(torch.stack([F.tanh(k * x) for k in range(1, 6)], dim=1), src_key_padding_mask=padding)
        return self.head(h[:, :4].mean(1))
