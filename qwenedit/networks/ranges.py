"""The ranges of sizes in configs, far above those of any checkpoint, checked before a network is built."""

from __future__ import annotations

import reprlib
from typing import SupportsIndex

__all__ = ["CHANNELS", "LAYERS", "VOCABULARY", "require_ranges"]

LAYERS = 1000  # at most
CHANNELS = 1_000_000  # at most, of any tensor
VOCABULARY = 100_000_000  # tokens at most


def require_ranges(config: object, **most: int) -> None:
    """Check that the fields named hold whole numbers, or tuples of them, from 1 to the number given for each.

    Raises:
        ValueError: one does not.
    """
    for name, limit in most.items():
        value = getattr(config, name)
        parts = value if isinstance(value, tuple) else (value,)
        whole = (isinstance(one, SupportsIndex) and not isinstance(one, bool) for one in parts)
        if not parts or not all(whole) or not all(1 <= one <= limit for one in parts):
            raise ValueError(f"{name} is {reprlib.repr(value)}, wanted whole numbers from 1 to {limit:,}")
