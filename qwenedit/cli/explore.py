"""`qwenedit explore`: an edit, or two beside each other, as a page to look inside."""

from __future__ import annotations

import argparse
import os
from typing import Any

from qwenedit.call import Call
from qwenedit.cli.commands import _checked, _masks, _prepare
from qwenedit.cli.process import say
from qwenedit.foreign import shown
from qwenedit.inputs.pictures import open_picture

__all__ = ["explore"]

_CHANGES = ("second_seed", "second_prompt", "second_switch")


def explore(options: argparse.Namespace) -> None:
    from qwenedit.exploration.explore import explore, require_page

    page = require_page(options.output)
    if options.parallel is not None:
        raise ValueError("--parallel does not go with explore, which looks inside one process's run")
    if options.num_images != 1:
        raise ValueError(f"--num-images is {options.num_images}, wanted 1: a page shows one picture of a run")
    if not options.pictures and os.path.isfile(options.prompt):
        raise ValueError(f"the prompt is {shown(options.prompt)}, a file: wanted PICTURE and then PROMPT")
    pictures = [open_picture(path) for path in options.pictures] or None
    masks = _masks(options)
    if masks and pictures is None:
        raise ValueError("a mask or a strength is given without a picture to edit, wanted both")
    call = Call(image=pictures, **masks)
    second = _second(options, call)
    pipe, settings = _prepare(options, call)
    explore(pipe, pictures, options.prompt, page, second=second, **masks, **_taken(settings))
    say(page)


def _second(options: argparse.Namespace, call: Call) -> dict[str, Any] | None:
    """What the second run changes, checked as the first run is; None for one run alone."""
    if all(getattr(options, name) in (None, {}) for name in _CHANGES):
        return None
    given = {"prompt": options.second_prompt, "seed": options.second_seed}
    changed = {name: value for name, value in given.items() if value is not None}
    switch = {**options.switch, **options.second_switch}
    other = argparse.Namespace(**{**vars(options), **changed, "switch": switch})
    _, settings = _checked(other, call)
    second = {"prompt": other.prompt, **_taken(settings)}
    if options.second_seed is None:
        del second["generator"]  # the noise of the first run
    return second


def _taken(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name != "num_images_per_prompt"}
