"""Every architecture of transformers, made small, with adapters in all three gradient modes.

    python benchmarks/zoo_transformers.py            # all; 25 minutes on two cores
    python benchmarks/zoo_transformers.py bert t5    # some

For each model type of the installed transformers whose configuration can be made small, a model with random weights is
built, once, and for each mode: adapters are injected with the default options, two steps of SGD are taken, and the
adapters are merged. Compared are the output before and after injection, the gradients of B between the modes, the
output with adapters and that of the merged model, and the latter with that of a plain model that loads its state dict.
Writes ``docs/architectures.json`` and ``docs/architectures.md``.
"""

from __future__ import annotations

import copy
import json
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
import transformers
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_MAPPING

from lightning_lora import adapters, attach, inject, merge

DOCS = Path(__file__).parent.parent / "docs"
SECONDS = 120
LARGEST = 60_000_000
BOUNDS = {"injected": 1e-5, "gradients": 2e-3, "merged": 1e-4, "loaded": 0.0}
"""The largest differences, over the largest entry, in single precision."""

# fmt: off
SMALL: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embed_dim", "dim", "hidden_dim", "embedding_size"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers",
                     "num_decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads",
                     "decoder_attention_heads"), 4),
    **dict.fromkeys(("intermediate_size", "d_ff", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "n_inner"), 64),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 64),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout",
                     "activation_dropout"), 0.0),
    **dict.fromkeys(("d_kv", "head_dim", "q_lora_rank", "kv_lora_rank", "v_head_dim", "patch_size"), 8),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim"), 4), **dict.fromkeys(("n_group", "topk_group"), 1),
    "num_key_value_heads": 2, "vocab_size": 99, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "decoder_start_token_id": 1, "use_cache": False, "num_mel_bins": 16, "max_source_positions": 32, "image_size": 32,
}
# fmt: on


class NotSmall(Exception):
    """A model type that this program does not know how to make small, or to call."""


def shrink(config: PretrainedConfig, depth: int = 2) -> PretrainedConfig:
    """Make ``config`` small, in place, with the configurations inside it."""
    for name, value in SMALL.items():
        if not isinstance(getattr(config, name, None), list | tuple | dict | None):
            setattr(config, name, value)
    if isinstance(kinds := getattr(config, "layer_types", None), list):
        config.layer_types = kinds[:2]
    inner = [value for value in vars(config).values() if isinstance(value, PretrainedConfig)]
    for one in inner if depth else ():
        shrink(one, depth - 1)
    return config


def inputs_of(model: Any) -> dict[str, Tensor]:
    """Return a batch of two for ``model``."""
    ids, name = torch.randint(3, 90, (2, 7)), model.main_input_name
    if name == "pixel_values":
        side = getattr(model.config, "image_size", 32)
        side = side if isinstance(side, int) else 32
        return {name: torch.randn(2, getattr(model.config, "num_channels", 3) or 3, side, side)}
    if name == "input_values":
        return {name: torch.randn(2, 4000)}
    if name == "input_features":
        return {name: torch.randn(2, 16, 64)}
    decoder = {"decoder_input_ids": ids[:, :5]} if getattr(model.config, "is_encoder_decoder", False) else {}
    return {name: ids, **decoder}


def outputs_of(model: nn.Module, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """Return all tensors of real numbers that ``model`` gives, with the same random numbers at each call."""
    torch.manual_seed(7)
    found: list[Tensor] = []

    def collect(value: Any) -> None:
        if isinstance(value, Tensor):
            found.extend([value] if value.is_floating_point() else [])
        elif isinstance(value, Mapping | list | tuple):
            for item in value.values() if isinstance(value, Mapping) else value:
                collect(item)

    collect(model(**inputs))
    return found


def loss_of(outputs: list[Tensor]) -> Tensor:
    return sum(  # type: ignore[return-value]
        (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum() for y in outputs if y.requires_grad
    )


def apart(first: list[Tensor], second: list[Tensor]) -> float:
    """Return the largest difference, over the largest entry of its tensor."""
    pairs = [(a.detach(), b.detach()) for a, b in zip(first, second, strict=True) if a.numel()]
    if any(a.shape != b.shape for a, b in pairs):  # of a length that the model predicts
        return float("inf")
    return max(((a - b).abs().max() / a.abs().max().clamp_min(1e-6)).item() for a, b in pairs)


def build(kind: str) -> tuple[nn.Module, dict[str, Tensor], list[Tensor]]:
    """Return a small model, a batch for it, and its output; it has been backpropagated through.

    Raises:
        NotSmall: With the reason.
    """
    try:
        config = shrink(CONFIG_MAPPING[kind]())
        classes = MODEL_MAPPING[type(config)]
        torch.manual_seed(0)
        model = (classes[0] if isinstance(classes, tuple) else classes)(config).float().eval()
        assert sum(p.numel() for p in model.parameters()) <= LARGEST, "it has too many weights"
        inputs = inputs_of(model)
        outputs = outputs_of(model, inputs)
        assert max(y.abs().max().item() for y in outputs if y.numel()) > 1e-30, "its output underflows"
        loss_of(outputs).backward()
        model.zero_grad()
    except Exception as error:  # whatever a configuration of random sizes raises
        raise NotSmall(f"{type(error).__name__}: {error}".splitlines()[0][:120]) from error
    return model, inputs, outputs


def train(model: nn.Module, inputs: Mapping[str, Tensor], gradient: Any) -> dict[str, Tensor]:
    """Take two steps, the first of which moves the largest entry by a given amount; return its gradients of B."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.0)
    attach(model, optimizer)
    loss_of(outputs_of(model, inputs)).backward()
    first = {name: a.B.grad.clone() for name, a in adapters(model).items() if a.B.grad is not None}
    optimizer.param_groups[0]["lr"] = 0.05 / max(gradient.abs().max().item() for gradient in first.values())
    optimizer.step()
    optimizer.zero_grad()
    loss_of(outputs_of(model, inputs)).backward()
    optimizer.step()
    return first


def check(kind: str) -> dict[str, float]:
    """Return what is compared for the model type ``kind``, the largest of the three modes."""
    plain, inputs, before = build(kind)
    noise = apart(before, outputs_of(plain, inputs))  # some models are not deterministic
    found = dict.fromkeys(BOUNDS, noise) | {"moved": float("inf")}
    gradients: dict[str, dict[str, Tensor]] = {}
    for gradient in ("factored", "merged", "projected"):
        model = copy.deepcopy(plain)
        inject(model, rank=2, gradient=gradient)
        found["injected"] = max(found["injected"], apart(before, outputs_of(model, inputs)))
        gradients[gradient] = train(model, inputs, gradient)
        adapted = outputs_of(model, inputs)
        found["moved"] = min(found["moved"], apart(before, adapted))
        merge(model)
        merged = outputs_of(model, inputs)
        found["merged"] = max(found["merged"], apart(adapted, merged))
        fresh = copy.deepcopy(plain)
        fresh.load_state_dict(model.state_dict())
        found["loaded"] = max(found["loaded"], apart(merged, outputs_of(fresh, inputs)))
    expected = gradients.pop("projected")
    largest = max(value.abs().max().item() for value in expected.values())
    for others in gradients.values():
        assert others.keys() == expected.keys(), "a gradient reaches other adapters in another mode"
        for name, value in expected.items():
            size = value.abs().max().item() + 1e-3 * largest
            found["gradients"] = max(found["gradients"], (others[name] - value).abs().max().item() / size)
    found["noise"] = noise
    return found


def passes(found: dict[str, float]) -> bool:
    return found["moved"] > 0 and all(found[name] <= bound + 4 * found["noise"] for name, bound in BOUNDS.items())


def page(results: Mapping[str, Any]) -> str:
    """Return the page of the documentation."""
    measured = {kind: found for kind, found in results.items() if isinstance(found, dict)}
    failed = {kind: found for kind, found in measured.items() if not passes(found)}
    errors = {kind: found for kind, found in results.items() if isinstance(found, str) and found.startswith("error")}
    worst = {name: max(found[name] for found in measured.values()) for name in BOUNDS}
    passed = len(measured) - len(failed)
    rest = len(results) - len(measured) - len(errors)
    lines = [
        "# Architectures",
        "",
        "`python benchmarks/zoo_transformers.py` makes this page. It builds a small model with random weights of every",
        f"model type of transformers {transformers.__version__}, injects adapters with the default options in each of",
        "the three gradient modes, takes two steps, and merges.",
        "",
        f"- **{passed} of {len(measured) + len(errors)} types pass every check.** {rest}",
        "  others have no model of their own, or are too large or too particular for the program to make them small.",
        f"- Output after injection against before: {worst['injected']:.0e} of the largest entry at most. It is not",
        "  zero where torch chooses another kernel for a frozen weight.",
        f"- Gradients of B between the three modes: {worst['gradients']:.0e} at most, in single precision.",
        f"- Output with adapters against the merged model's: {worst['merged']:.0e} at most.",
        f"- The merged model's output against a plain model's with its state dict: {worst['loaded']:.0e} at most.",
        "",
    ]
    for kind, found in failed.items():
        beyond = (f"{name} {found[name]:.1e} > {bound:.0e}" for name, bound in BOUNDS.items() if found[name] > bound)
        lines.append(f"- `{kind}` fails: {', '.join(beyond)}")
    lines += [f"- `{kind}` fails: {why}" for kind, why in errors.items()]
    lines += ["", ", ".join(f"`{kind}`" for kind in measured if kind not in failed) + ".", ""]
    return "\n".join(lines)


def main(kinds: list[str]) -> None:
    def too_slow(*_: Any) -> None:
        raise NotSmall(f"it takes more than {SECONDS} s")

    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, too_slow)
    results: dict[str, Any] = {}
    for kind in kinds or list(CONFIG_MAPPING.keys()):
        signal.alarm(SECONDS)
        try:
            results[kind] = check(kind)
        except NotSmall as reason:
            results[kind] = f"not made small: {reason}"
        except Exception as error:  # it is a result
            results[kind] = f"error: {type(error).__name__}: {error}"[:300]
        finally:
            signal.alarm(0)
        print(kind, results[kind], flush=True)
    if not kinds:
        (DOCS / "architectures.json").write_text(json.dumps(results, indent=1) + "\n")
        (DOCS / "architectures.md").write_text(page(results))


if __name__ == "__main__":
    main(sys.argv[1:])
