"""Tells whether a weight is the one that was frozen when a file was written, and whether it has been written to."""

from __future__ import annotations

from typing import Any

from lightning_lora.weights import Storage


class Fingerprints:
    """Fingerprints of frozen weights, each computed once for as long as its weight is not written to."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[tuple[Any, ...], str]] = {}
        self.rewritten: set[str] = set()
        """Keys of weights that were written to between two readings."""

    def of(self, key: str, stored: Storage) -> str:
        """Return the fingerprint of the weight ``stored``, whose key in the state dict is ``key``."""
        now, known = stored.seen(), self._known.get(key)
        if known is None or known[0] != now:
            value = stored.fingerprint()
            if known is not None and known[1] != value:
                self.rewritten.add(key)
            self._known[key] = now, value
        return self._known[key][1]
