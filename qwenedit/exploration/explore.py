"""`qwenedit.explore`: an edit, or two beside each other, run and opened as one page."""

from __future__ import annotations

import inspect
import os
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Generator

from qwenedit.ablation.intervening import intervened
from qwenedit.ablation.labels import text_of
from qwenedit.checks import require_known
from qwenedit.exploration.page import write_page
from qwenedit.exploration.plan import MAPS
from qwenedit.exploration.watching import Checked, Looked, Watched
from qwenedit.files import replacing_file
from qwenedit.foreign import shown
from qwenedit.instruments.determinism import environment
from qwenedit.layered import require_flat
from qwenedit.parts import Pictures
from qwenedit.pipeline import QwenImageEdit
from qwenedit.sampling.samplers import name_of
from qwenedit.switches import switches_of
from qwenedit.system import Result

__all__ = ["explore", "require_page"]

Intervention = Callable[[QwenImageEdit], AbstractContextManager[Any]]
_FIXED = ("self", "prompt", "output_type", "num_images_per_prompt")  # arguments of a run that are not taken
_SECOND = ("picture", "prompt", "intervention")  # what a second run takes besides


@dataclass(frozen=True, eq=False)
class Request:
    """A run that is to be looked at; `noise` is a generator in place of that of the options."""

    picture: Pictures | None
    prompt: str
    options: dict[str, Any]
    intervention: Intervention | None = None
    noise: Generator | list[Generator] | None = None

    def run(self, pipe: QwenImageEdit) -> Image.Image:
        options = self.options if self.noise is None else {**self.options, "generator": self.noise}
        run = pipe.generate if self.picture is None else partial(pipe.edit, self.picture)
        (made,) = run(self.prompt, **options).images
        return made


def explore(
    pipe: QwenImageEdit,
    picture: Pictures | None,
    prompt: str,
    output: str | os.PathLike[str] = "edit.html",
    *,
    second: Mapping[str, Any] | None = None,
    **edit_arguments: Any,
) -> Result[list[Image.Image]]:
    """Run an edit and write a page to look inside it, with a browser and without a network.

    The page has the pictures of the steps, attention between patches and words, the size of what each block
    writes, and guidance's norm ratios (docs/explore.md). It is written whole or not at all, and has at most
    20 MB: how much of the run is kept depends on the size of the edit, and the page says so.

    Args:
        picture: as in `edit`; None to look at `generate`.
        prompt: one text.
        output: the page, a file whose name ends in .html.
        second: what another run does otherwise, which is shown beside this one: arguments of the run, also
            `picture` and `prompt`, and an `intervention`, a function of the pipe that returns a context
            manager, inside of which that run goes. All else is the same, and so is the noise unless it has a
            `generator` or `latents` of its own.
        edit_arguments: those of `edit` (or `generate`), but for `output_type` and `num_images_per_prompt`.

    Returns the pictures, one for each run. The first is that of `edit` with these arguments, bit by bit.

    Raises:
        ValueError: bad input, of either run, before any network runs; a page that cannot be written; a
            checkpoint that makes layers; a pipe whose runs several processes share.
    """
    require_flat(pipe.variant)
    page = require_page(output)
    if pipe.processes is not None:
        raise ValueError(
            "explore looks inside one process's run, but processes share this pipeline's: load it "
            "without parallel"
        )
    requests = _requests(pipe, picture, prompt, edit_arguments, second)
    for request in requests:
        _check(pipe, request)
    inside = [_context(pipe, request) for request in requests]
    looked = [_looked(pipe, *one, MAPS // len(requests)) for one in zip(requests, inside, strict=True)]
    with replacing_file(page) as temporary:
        write_page(looked, temporary)
    return Result([one.result for one in looked])


def require_page(output: str | os.PathLike[str]) -> Path:
    """The page's path, if it can be written.

    Raises:
        ValueError: it cannot, or its name does not end in .html.
    """
    page = Path(output)
    if page.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"cannot write {shown(page)}: its name ends in {page.suffix!r}, wanted .html")
    if not page.parent.is_dir():
        raise ValueError(f"cannot write {shown(page)}: there is no folder {shown(page.parent)}")
    try:
        if page.is_dir():
            raise ValueError(f"cannot write {shown(page)}: it is a folder, wanted a file name like edit.html")
        with tempfile.TemporaryFile(dir=page.parent):
            pass
    except OSError as error:
        raise ValueError(f"cannot write {shown(page)}: {error}") from error
    return page


def _requests(
    pipe: QwenImageEdit,
    picture: Pictures | None,
    prompt: str,
    options: dict[str, Any],
    second: Mapping[str, Any] | None,
) -> list[Request]:
    first = Request(picture, prompt, options)
    _require_one(first)
    if second is None:
        return [first]
    if not isinstance(second, Mapping):
        raise ValueError(f"second is {type(second).__name__}, wanted a dict of what the other run changes")
    other = dict(second)
    own = {name: other.pop(name) for name in _SECOND if name in other}
    twin = replace(first, **own, options={**options, **other})
    if (function := twin.intervention) is not None and not callable(function):
        raise ValueError(f"intervention is {type(function).__name__}, wanted a function of the pipe")
    _require_one(twin)
    if "generator" not in other:
        twin = replace(twin, noise=_copied(options.get("generator"), pipe.device))
    return [first, twin]


def _require_one(request: Request) -> None:
    """Check that it is a run of one prompt, with arguments that there are."""
    if not isinstance(request.prompt, str):
        raise ValueError(f"prompt is {type(request.prompt).__name__}, wanted one text")
    run = QwenImageEdit.generate if request.picture is None else QwenImageEdit.edit
    left_out = _FIXED if request.picture is None else (*_FIXED, "image")
    known = [name for name in inspect.signature(run).parameters if name not in left_out]
    require_known("explore", request.options, known)


def _copied(
    generator: Generator | Sequence[Generator] | None, device: torch.device
) -> Generator | list[Generator]:
    """A generator in the same state; None is torch's own, on the device of the run."""
    if isinstance(generator, Sequence):
        return [_clone(one) for one in generator]
    if generator is not None:
        return _clone(generator)
    of_device: Any = torch if device.type == "cpu" else torch.get_device_module(device)
    made = Generator(device)
    made.set_state(of_device.get_rng_state())
    return made


def _clone(generator: Generator) -> Generator:
    made = Generator(generator.device)
    made.set_state(generator.get_state())
    return made


def _check(pipe: QwenImageEdit, request: Request) -> None:
    """Raise what a run would raise before any network runs. Its warnings come with the run itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            request.run(Watched.of(pipe, checking=True))
        except Checked:
            pass


def _context(pipe: QwenImageEdit, request: Request) -> AbstractContextManager[Any]:
    """What the intervention returns, or nothing."""
    return nullcontext() if request.intervention is None else intervened(pipe, request.intervention)


def _looked(
    pipe: QwenImageEdit, request: Request, inside: AbstractContextManager[Any], budget: int
) -> Looked:
    """What was seen of a request, run inside of its intervention."""
    with inside:
        watched = Watched.of(pipe, budget=budget)
        facts = _facts(pipe, request)
        return watched.looked(facts, request.run(watched))
    raise RuntimeError("the intervention's context manager swallowed an exception")


def _facts(pipe: QwenImageEdit, request: Request) -> dict[str, str]:
    """The run's settings as texts, those that are not the default."""
    found, facts = environment(pipe), {"prompt": request.prompt}
    for name, value in request.options.items():
        if value is None or name == "num_inference_steps":  # which the page counts
            continue
        if name == "generator":
            of = value if isinstance(value, Sequence) else [value]
            facts["seed"] = ", ".join(str(one.initial_seed()) for one in of)
        elif name == "switches":
            facts.update({key: text_of(one) for key, one in switches_of(value).flat().items()})
        elif name == "sampler":
            facts["sampler"] = name_of(value)
        elif isinstance(value, (str, bool, int, float)):
            facts[name] = text_of(value)
        else:
            facts[name] = "given"
    if request.intervention is not None:
        facts["intervention"] = getattr(request.intervention, "__name__", "given")
    versions = f"qwenedit {found['qwenedit']}, torch {found['torch']}"
    return {**facts, "model": pipe.variant.name, "run": f"{found['dtype']} on {found['device']}, {versions}"}
