"""The embedded model: the exact architecture at laboratory size, in the official folder layout.

`CHECKPOINT` is the folder that `qwenedit.load()` reads; `build.py` writes it.
"""

from pathlib import Path

CHECKPOINT = Path(__file__).parent / "checkpoint"
EXAMPLE = Path(__file__).parent / "example.png"
