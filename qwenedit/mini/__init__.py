"""The embedded model: the exact architecture at laboratory size, in the official folder layout.

`CHECKPOINT` is the folder that `qwenedit.load()` reads, with a model card; `EXAMPLE` is a picture that the
model can edit. scenes.py is the model's world, oracle.py judges its edits, train.py trains it.
"""

from pathlib import Path

from qwenedit.weights.checkpoints import EMBEDDED as CHECKPOINT

__all__ = ["CHECKPOINT", "EXAMPLE"]

EXAMPLE = Path(__file__).parent / "example.png"
