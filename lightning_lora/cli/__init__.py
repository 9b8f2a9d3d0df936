"""The command ``lightning-lora``: merges, extracts, inspects, exports and compares files without building a model."""

from __future__ import annotations

import argparse
import inspect
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
    line = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in message)
    print(f"lightning-lora: error: {line}", file=sys.stderr)


def _parse(args: Sequence[str] | None) -> tuple[Any, dict[str, Any]]:
    """Return the function that the arguments ask for, and its own arguments."""
    import docstring_parser
    from jsonargparse import ArgumentParser, DefaultHelpFormatter

    from lightning_lora import __version__
    from lightning_lora.cli import commands

    class Formatter(DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
        """jsonargparse's, with examples as they stand."""

    functions = {name: getattr(commands, name.replace("-", "_")) for name in EXAMPLES}
    lines = "\n".join(f"  lightning-lora {each[0]}" for each in EXAMPLES.values())
    parser = ArgumentParser(
        prog="lightning-lora",
        description=f"{DESCRIPTION}\n\nExamples:\n{lines}\n\n{CODES}",
        formatter_class=Formatter,
        version=__version__,
    )
    subcommands = parser.add_subcommands()
    for name, function in functions.items():
        first, _, more = (function.__doc__ or "").partition("Args:")[0].strip().partition("\n")
        shown = "\n".join(f"  lightning-lora {example}" for example in EXAMPLES[name])
        body = "\n".join(line.strip() for line in more.strip().splitlines())
        own = ArgumentParser(description=f"{first}\n\n{body}\n\nExample:\n{shown}", formatter_class=Formatter)
        flags: set[str | int] = {
            name for name, kind in inspect.get_annotations(function, eval_str=True).items() if kind is bool
        }
        own.add_function_arguments(function, as_positional=True, skip=flags)
        for documented in docstring_parser.parse(function.__doc__ or "").params:
            if documented.arg_name in flags:
                own.add_argument(f"--{documented.arg_name}", action="store_true", help=documented.description)
        subcommands.add_subcommand(name, own, help=first)
    parsed = parser.parse_args(args)
    return functions[parsed.subcommand], vars(parsed[parsed.subcommand])
