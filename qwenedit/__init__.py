"""Qwen-Image-Edit from scratch in plain PyTorch: exact, readable, hookable.

import qwenedit

pipe = qwenedit.load()                              # the embedded model; or a hub id, or a folder
result = pipe.edit(picture, "make the circle red")
result.images[0].save("out.png")
"""

__version__ = "0.1.0"

import warnings

with warnings.catch_warnings():
    # torch says so where numpy is not installed, and nothing here needs numpy
    warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
    from qwenedit.ablation import Switches
    from qwenedit.ablation.sweep import ablate
    from qwenedit.assembly import load
    from qwenedit.conditioning import Conditioning
    from qwenedit.pipeline import QwenImageEdit, Result
    from qwenedit.taps import scope, tap_names, taps

__all__ = [
    "Conditioning",
    "QwenImageEdit",
    "Result",
    "Switches",
    "ablate",
    "load",
    "scope",
    "tap_names",
    "taps",
]
