"""The command `train`."""

from __future__ import annotations

import argparse

from qwenedit.cli.process import say

__all__ = ["train"]


def train(options: argparse.Namespace) -> None:
    from qwenedit.training.run import train
    from qwenedit.weights.slices import is_first

    written = train(options.spec, device=options.device, progress=not options.quiet)
    if is_first():  # of several processes
        say(written)
