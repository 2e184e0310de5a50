"""The embedded model: the exact architecture at laboratory size, in the official folder layout.

`CHECKPOINT` is the folder that `qwenedit.load()` reads, with a model card, and `EXAMPLE` a picture that it
knows how to edit. scenes.py is its world, oracle.py judges its edits, train.py trains it.
"""

from pathlib import Path

from qwenedit.weights.checkpoints import EMBEDDED as CHECKPOINT

__all__ = ["CHECKPOINT", "EXAMPLE"]

EXAMPLE = Path(__file__).parent / "example.png"
