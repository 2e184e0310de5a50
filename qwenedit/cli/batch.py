"""`qwenedit batch`: a list of edits, or a public benchmark."""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path
from typing import Any

from qwenedit.checks import device_of, dtype_of
from qwenedit.cli.commands import _files, _folder, _load, _loras
from qwenedit.cli.process import say
from qwenedit.cli.workers import require_alone, work
from qwenedit.family import PRESETS, preset_of
from qwenedit.foreign import shown
from qwenedit.inputs.pictures import open_picture
from qwenedit.weights.checkpoints import pieces_of

__all__ = ["LANGUAGES", "LAYOUTS", "batch"]

LAYOUTS = ("gedit", "imgedit", "redbench")
LANGUAGES = ("en", "cn")


def batch(options: argparse.Namespace) -> int:
    from qwenedit.ablation.model import Model
    from qwenedit.batches.layouts import layout_lines
    from qwenedit.batches.lines import lines_of, raw_lines
    from qwenedit.batches.run import RECORDS, Maker, edits_left, make

    require_alone(options)
    if options.layout is not None:
        raw, base = layout_lines(options.layout, options.edits, options.language), options.edits
    elif options.language is not None:
        raise ValueError("--language is given without --layout, wanted both, or neither")
    else:
        raw, base = raw_lines(options.edits), options.edits.parent
    checkpoint = _folder(options)
    preset = preset_of(checkpoint) if options.preset is None else PRESETS[options.preset]
    maker = Maker(
        name=options.model or "the embedded model",
        parts=Model.of_folder(checkpoint),
        preset=preset,
        identity=_identity(options, checkpoint),
        load=lambda: _load(options, checkpoint),
    )
    edits, folder, progress = lines_of(raw, base, _usual(options), preset), options.output, not options.quiet
    if options.workers > 1:
        work(options, edits_left(edits, folder, maker, progress=progress), folder, RECORDS)
    made = make(edits, folder, maker, shard=options.shard, progress=progress)
    say(folder)
    if not made.failed:
        return 0
    first = made.failed[0]
    say(
        f"qwenedit: {len(made.failed)} of {len(made.records)} edits failed, the first ({first['place']}) "
        f"with {shown(first['error'])}: see the records in {shown(folder)}",
        error=True,
    )
    return 1


def _usual(options: argparse.Namespace) -> dict[str, Any]:
    """What lines have that do not say it themselves."""
    names = ("seed", "steps", "true_cfg_scale", "negative_prompt", "sampler", "height", "width")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    switches = dict(options.switch)
    for name in switches.keys() & {"references.picture", "seen.other"}:
        switches[name] = open_picture(switches[name])  # relative to this folder, not to the list's
    return {**given, "switches": switches}


def _identity(options: argparse.Namespace, checkpoint: Path) -> str:
    """What changes with whatever the options make the model compute."""
    from qwenedit.batches.run import identity_of

    where = device_of(options.device)
    replaced = {name: _hash(path) for name, path in _files(options).items()}
    loras = [(_hash(path), scale) for path, scale in _loras(options, checkpoint)]
    compiled = "compiled" if options.compile else None  # last bits differ
    return identity_of(
        checkpoint, where, dtype_of(options.dtype, where), replaced, loras, options.storage, compiled
    )


def _hash(path: Path) -> str:
    files = [path] if path.is_file() else sorted(one for one in path.rglob("*") if one.is_file())
    return hashlib.sha256(b"".join(piece for one in files for piece in pieces_of(one))).hexdigest()[:20]
