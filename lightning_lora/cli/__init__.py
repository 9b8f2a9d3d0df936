"""The command ``lightning-lora``: merges, extracts, inspects, exports and compares files without building a model."""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from collections.abc import Sequence
from typing import Any

from lightning_lora.cli.files import give_memory_back

EXAMPLES = {
    "merge": ("merge pretrained.safetensors last.ckpt merged.safetensors --root model",),
    "extract": ("extract finetuned.safetensors pretrained.safetensors adapter.ckpt --rank 16",),
    "inspect": ("inspect last.ckpt", "inspect model.safetensors.index.json --weights"),
    "export-peft": ("export-peft last.ckpt adapter/ --root model",),
    "diff": ("diff merged.safetensors finetuned.safetensors --tolerance 1e-3",),
}
DESCRIPTION = "Work with the files of LoRA runs, without building a model or loading one into memory."
CODES = "Exit codes: 0 done; 1 the files of diff differ; 2 wrong arguments, or a file that cannot be used."
CTRL_C = 130


def main(args: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code.

    Args:
        args: Those of the command line by default.
    """
    try:
        command, options = _parse(args)
        give_memory_back()
        return int(command(**options))
    except ModuleNotFoundError as error:
        _fail(f'{error.name} is missing: pip install "lightning-lora[cli]"')
    except (ValueError, OSError) as error:
        _fail(str(error) or type(error).__name__)
    except (RuntimeError, MemoryError) as error:  # torch's, whose further lines say where in its C++ they come from
        _fail((str(error).splitlines() or [type(error).__name__])[0])
    except KeyboardInterrupt:
        _fail("interrupted")
        return CTRL_C
    return 2


def _fail(message: str) -> None:
    print(f"lightning-lora: error: {printable(message)}", file=sys.stderr)


def printable(text: Any) -> str:
    """Return ``text`` without what would move the cursor, colour the terminal or begin a line."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in str(text))


def _parse(args: Sequence[str] | None) -> tuple[Any, dict[str, Any]]:
    """Return the function that the arguments ask for, and its own arguments, as its signature and docstring say."""
    from lightning_lora import __version__
    from lightning_lora.cli import commands

    raw = argparse.RawDescriptionHelpFormatter
    lines = "\n".join(f"  lightning-lora {each[0]}" for each in EXAMPLES.values())
    description = f"{DESCRIPTION}\n\nExamples:\n{lines}\n\n{CODES}"
    parser = argparse.ArgumentParser(prog="lightning-lora", description=description, formatter_class=raw)
    parser.add_argument("--version", action="version", version=__version__)
    subparsers = parser.add_subparsers(dest="command", required=True)
    for name, examples in EXAMPLES.items():
        function = getattr(commands, name.replace("-", "_"))
        text, _, arguments = inspect.cleandoc(function.__doc__).partition("\n\nArgs:\n")
        shown = "\n".join(f"  lightning-lora {example}" for example in examples)
        description = f"{text}\n\nExample:\n{shown}"
        own = subparsers.add_parser(name, help=text.partition("\n")[0], description=description, formatter_class=raw)
        documented = dict(re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", arguments, re.MULTILINE))
        for each in inspect.signature(function, eval_str=True).parameters.values():
            words = " ".join(documented[each.name].split()).replace("%", "%%")
            if each.default is each.empty:
                own.add_argument(each.name, help=words)
            elif each.annotation is bool:
                own.add_argument(f"--{each.name}", action="store_true", help=words)
            else:
                own.add_argument(f"--{each.name}", type=each.annotation, default=each.default, help=words)
    options = vars(parser.parse_args(args))
    return getattr(commands, options.pop("command").replace("-", "_")), options
