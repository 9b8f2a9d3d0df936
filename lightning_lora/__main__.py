"""``python -m lightning_lora`` is the command ``lightning-lora``."""

import sys

from lightning_lora.cli import main

sys.exit(main())
