"""A grid of settings over pictures and seeds: `qwenedit ablate SPEC.toml`, `qwenedit.ablate(spec, folder)`.

spec.py describes the spec. The results folder has

    results.jsonl      a line for every run: settings, environment, timings, metrics, curves
                       (results-0-of-4.jsonl and so on of shards, until a run without a shard merges them)
    pictures/KEY.png   its picture
    results.csv, summary.csv, summary.tex, pictures.tex, figures/, grid.png, report.html

KEY is a hash of everything that a picture depends on, including the model's weights, an intervention's code
and this package's version. A run whose line and picture exist is not run again: a sweep that was stopped, or
whose spec has grown, resumes. (After changing this package's code, take another folder.)
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypeAlias

import torch
from PIL import Image

from qwenedit.ablation.attention import target_attention
from qwenedit.ablation.cases import Case
from qwenedit.ablation.figures import FIGURES, write_figures
from qwenedit.ablation.functions import code_of
from qwenedit.ablation.intervening import acting, state_of
from qwenedit.ablation.measures import Record
from qwenedit.ablation.measuring import add_floor, measure
from qwenedit.ablation.metrics import curves
from qwenedit.ablation.model import Model, pipe_fingerprint, require_single
from qwenedit.ablation.report import write_report
from qwenedit.ablation.results import PICTURES, RESULTS, Sweep, known_results, read_results
from qwenedit.ablation.runs import Run, encoding_of, has_maps, runs_of
from qwenedit.ablation.sheet import picture_grid
from qwenedit.ablation.spec import NONE, Spec, read_spec, with_sampler
from qwenedit.ablation.tables import write_csv, write_picture_tex, write_summary_csv, write_summary_tex
from qwenedit.checks import device_of, dtype_of, progress_bar
from qwenedit.encoding.conditioning import Conditioning
from qwenedit.files import append_line, remove_leftovers, replacing_file, require_folder, write_lines
from qwenedit.foreign import shown
from qwenedit.inputs.pictures import open_picture, to_pil
from qwenedit.instruments.determinism import deterministic
from qwenedit.instruments.provenance import made_by
from qwenedit.instruments.provenance import seconds as clock
from qwenedit.mini.oracle import judge
from qwenedit.pipeline import QwenImageEdit, load
from qwenedit.shards import only_one, record_file, shard_files, shard_of
from qwenedit.taps import require_finite
from qwenedit.weights.checkpoints import fingerprint, resolve

__all__ = ["MOST_EDITS", "ablate", "edits_left"]

MOST_EDITS = 200  # a larger sweep must be confirmed
Encoded: TypeAlias = tuple[Conditioning, float] | Exception  # the seconds it took; or why there is none
WRITTEN = {  # from all runs
    "results.csv": write_csv,
    "summary.csv": write_summary_csv,
    "summary.tex": write_summary_tex,
    "pictures.tex": write_picture_tex,
    "grid.png": lambda sweep, path: picture_grid(sweep).save(path),
    "report.html": write_report,
}


@dataclass(frozen=True, eq=False)
class _Job:
    """A sweep that is checked: what it runs, into which folder, and the model that makes it."""

    plan: Spec
    folder: Path
    runs: list[Run]
    model: str
    fingerprint: str
    load: Callable[[], QwenImageEdit]

    def left(self, keys: set[str], records: dict[str, Record]) -> tuple[list[Run], dict[str, Record]]:
        """The runs of these keys that are not done, and the records of those that are."""
        done = {
            key: x
            for key, x in records.items()
            if key in keys and x["status"] == "done" and _is_whole(self.folder / x["file"])
        }
        todo = [
            run
            for run in self.runs
            if run.key in keys
            and (run.key not in done or (has_maps(self.plan, run) and "attention" not in done[run.key]))
        ]
        return todo, done

    @property
    def keys(self) -> set[str]:
        return {run.key for run in self.runs}


def ablate(
    spec: str | os.PathLike[str] | Mapping[str, Any],
    folder: str | os.PathLike[str],
    *,
    pipe: QwenImageEdit | None = None,
    interventions: Mapping[str, Callable[[QwenImageEdit], AbstractContextManager[Any]]] | None = None,
    metrics: Mapping[str, Callable[..., float]] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    shard: str | None = None,
    yes: bool = False,
    progress: bool = True,
) -> Sweep:
    """Run the edits of a spec that are not yet in the folder, and write tables, pictures and the report.

    An edit that fails is recorded as failed, with its message, and the sweep goes on; the next sweep in the
    folder tries it again, and so a metric that fails.

    Args:
        spec: a TOML file, or a dict of the same content (see spec.py).
        folder: for the results; it may have some already.
        pipe: a pipeline in place of the spec's model, as it is: with its LoRAs, in its memory mode.
        interventions: functions of the pipeline by name; each returns a context manager, inside of which the
            edit runs, from its prompt to its pixels. `intervention = ["none", "name"]` in the grid uses them.
            A function that is edited has its runs run again (`functions.code_of`).
        metrics: functions (result, source, **rest) of PIL pictures that return a number, by name; `rest` has
            `prompt`, `pictures` (all that the edit was given), `mask` (or None) and `unablated` (the result
            of the unablated run, or None).
        device, dtype: as for `qwenedit.load`.
        shard: "i/n", i from 0 to n - 1: run that part of the edits only, and write no report. Shards may run
            side by side, on any machines with the same kind of device; a run without a shard then makes what
            is missing, compares and reports.
        yes: confirm more than `MOST_EDITS` edits.
        progress: progress bars on stderr, if that is a terminal.

    Returns:
        The sweep, of a shard with its own edits alone.

    Raises:
        ValueError: a bad spec, one that does not fit the model, or a folder that cannot be written; before
            any weight is read. An intervention that leaves the model changed; edits that are done are kept.
    """
    part = None if shard is None else shard_of(shard)
    job = _checked(spec, folder, pipe, interventions, metrics, device, dtype, yes, progress)
    home, runs = job.folder, job.runs
    mine = job.keys if part is None else set(part.part_of(sorted(job.keys)))  # hashes: any mix of settings
    home.mkdir(parents=True, exist_ok=True)
    with only_one(home, "sweep", part) as alone:
        known = known_results(home)
        todo, done = job.left(mine, known)
        _require_meant(len({run.key for run in todo}), yes)
        (home / PICTURES).mkdir(parents=True, exist_ok=True)
        results = record_file(home, RESULTS, part)
        # Drop a line that was cut off, and those of failed runs that are tried again.
        again = {run.key for run in todo} - done.keys()
        kept = known if part is None else read_results(results)
        write_lines(results, [record for key, record in kept.items() if key not in again])
        if alone:
            _tidy(home)
        plain = {run.index[:2]: run.key for run in runs if run.index[2] == 0}
        functions = {name: (function, code_of(function)) for name, function in job.plan.metrics.items()}
        for run, record in _run(job, todo, progress):
            done[run.key] = record
            if part is None:
                measure(home, run.case, record, done[plain[run.index[:2]]], functions)
            append_line(results, record)
        if part is not None:
            return Sweep(home, job.plan, {run.index: done[run.key] for run in runs if run.key in mine})
        for run in runs:  # an earlier sweep may have compared with other runs, and had other metrics
            measure(home, run.case, done[run.key], done[plain[run.index[:2]]], functions)
        for edit in range(len(job.plan.cases)):
            add_floor(home, [done[plain[edit, seed]] for seed in range(len(job.plan.seeds))])
        return _finish(job.plan, home, runs, done)


def edits_left(
    spec: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    yes: bool = False,
    progress: bool = True,
) -> int:
    """How many edits `ablate` would run, after its checks.

    Raises:
        ValueError: as `ablate`.
    """
    job = _checked(spec, folder, None, None, None, device, dtype, yes, progress)
    todo, _ = job.left(job.keys, known_results(job.folder))
    return len({run.key for run in todo})


def _checked(
    spec: str | os.PathLike[str] | Mapping[str, Any],
    folder: str | os.PathLike[str],
    pipe: QwenImageEdit | None,
    interventions: Mapping[str, Callable[[QwenImageEdit], AbstractContextManager[Any]]] | None,
    metrics: Mapping[str, Callable[..., float]] | None,
    device: torch.device | str | None,
    dtype: torch.dtype | str | None,
    yes: bool,
    progress: bool,
) -> _Job:
    plan, home = read_spec(spec, interventions, metrics), Path(folder)
    _require_writable(home)
    _require_meant(plan.edits - len(known_results(home)), yes)
    if pipe is None:
        checkpoint = resolve(plan.model, progress=progress)
        where = device_of(device)
        wanted = dtype_of(dtype, where)
        parts = Model.of_folder(checkpoint)
        parts.require_fitting(plan)
        model, name = fingerprint(checkpoint), plan.model or "the embedded model"
    else:
        given = [name for name, x in (("model", plan.model), ("device", device), ("dtype", dtype)) if x]
        if given:
            raise ValueError(f"there are a pipe and {' and '.join(given)}, wanted the pipe's own")
        require_single(pipe, "ablate")
        parts = Model.of_pipe(pipe)
        parts.require_fitting(plan)
        where, wanted, model, name = pipe.device, pipe.dtype, pipe_fingerprint(pipe), "the given pipeline"
    plan = with_sampler(plan, parts.sampler)
    runs = list(runs_of(plan, model, where, wanted))
    return _Job(
        plan, home, runs, name, model,
        lambda: pipe or load(checkpoint, device=where, dtype=wanted, progress=progress),
    )  # fmt: skip


def _finish(spec: Spec, folder: Path, runs: list[Run], records: dict[str, Record]) -> Sweep:
    """Write everything that is made from all runs."""
    in_order = sorted(runs, key=lambda run: run.index)
    sweep = Sweep(folder, spec, {run.index: records[run.key] for run in in_order})
    ours = {run.key: records[run.key] for run in in_order}
    others = {key: x for key, x in known_results(folder).items() if key not in ours}
    write_lines(record_file(folder, RESULTS), [*others.values(), *ours.values()])
    write_figures(sweep, folder / FIGURES)
    for name, write in WRITTEN.items():
        with replacing_file(folder / name) as temporary:
            write(sweep, temporary)
    return sweep


def _tidy(folder: Path) -> None:
    """Remove what merged shards and killed processes have left, now that none runs."""
    for path in shard_files(folder, RESULTS):
        path.unlink()
    remove_leftovers(folder, folder / PICTURES, folder / FIGURES)


def _is_whole(picture: Path) -> bool:
    if picture.is_symlink():
        return False
    try:
        open_picture(picture)
    except ValueError:
        return False
    return True


def _run(job: _Job, todo: list[Run], progress: bool) -> Iterator[tuple[Run, Record]]:
    """Run one edit after another; write its picture and yield its record."""
    if not todo:
        return
    pipe, spec = job.load(), job.plan
    made_already = set()
    bar = progress_bar(todo, progress=progress, desc="ablating", unit="edit")
    with deterministic(pipe) if spec.deterministic else nullcontext() as pinned:
        made_with = {
            "model": job.model, "fingerprint": job.fingerprint, **made_by(pipe), "deterministic": pinned
        }  # fmt: skip
        for _, alike in itertools.groupby(bar, key=lambda run: (run.case, encoding_of(run.cell))):
            encoded = None  # shared by these runs, and freed before the next one is made
            for run in alike:
                if run.key in made_already:  # another cell has the same settings
                    continue
                made_already.add(run.key)
                intervened = run.cell.intervention != NONE  # which may act on the encoders as well
                encoded = None if intervened else encoded or _encode(pipe, spec, run)
                before = state_of(pipe) if intervened else None
                yield run, _attempt(pipe, spec, run, encoded, job.folder, made_with)
                if intervened and state_of(pipe) != before:
                    raise ValueError(
                        f"the intervention {shown(run.cell.intervention)} left the model changed, or taps or "
                        "hooks attached: wanted a context manager that restores it; edits that are done are "
                        "kept"
                    )


def _attempt(
    pipe: QwenImageEdit, spec: Spec, run: Run, encoded: Encoded | None, folder: Path, made_with: Record
) -> Record:
    """The record of a run, done or failed; its picture is written."""
    record = _record(spec, run, made_with)
    try:
        picture, made = _made(pipe, spec, run, encoded)
        json.dumps(made, allow_nan=False)  # a measure that is no number fails its edit alone
    except Exception as error:
        return record | {"status": "failed", "error": f"{type(error).__name__}: {error}", "file": None}
    with replacing_file(folder / run.file) as temporary:
        picture.save(temporary)
    return record | {"status": "done", "file": run.file, **made}


def _made(pipe: QwenImageEdit, spec: Spec, run: Run, encoded: Encoded | None) -> tuple[Image.Image, Record]:
    """A run's picture and its part of the record, with its LoRA and intervention; `encoded` may be shared."""
    with acting(pipe, spec, run.cell):
        encoded = encoded or _encode(pipe, spec, run)
        if isinstance(encoded, Exception):
            raise encoded
        mapped = target_attention(pipe.mmdit, encoded[0]) if has_maps(spec, run) else nullcontext()
        with mapped as maps:
            picture, made = _edit(pipe, spec, run, *encoded)
        return picture, made | ({"attention": maps} if maps else {})
    raise RuntimeError("the intervention's context manager swallowed an exception")


def _encode(pipe: QwenImageEdit, spec: Spec, run: Run) -> Encoded:
    """The conditioning of a picture and a prompt and the seconds it took, or the exception that it raised."""
    start = clock(pipe.device)
    try:
        conditioning = pipe.condition(
            run.case.image,
            run.case.prompt,
            negative_prompt=run.cell.negative_prompt,
            height=spec.height,
            width=spec.width,
            switches=run.cell.switches.encoding,
        )
    except Exception as error:
        return error
    return conditioning, clock(pipe.device) - start


@torch.no_grad()
def _edit(
    pipe: QwenImageEdit, spec: Spec, run: Run, conditioning: Conditioning, encode: float
) -> tuple[Image.Image, Record]:
    """One edit: its picture, and its part of the record. Runs may share the `encode` seconds."""
    start = clock(pipe.device)
    latents, steps = curves(
        pipe.steps(
            conditioning,
            true_cfg_scale=run.cell.true_cfg_scale,
            num_inference_steps=run.cell.steps,
            sampler=None if run.cell.sampler == spec.sampler else run.cell.sampler,
            generator=torch.Generator().manual_seed(run.seed),
            switches=run.cell.switches,
            **_start(run),
        )
    )
    require_finite(latents, "sampler: the final latents")
    sampled = clock(pipe.device)
    (picture,) = to_pil(pipe.decode(latents, conditioning.target_grid).cpu())
    seconds = {"encode": encode, "sample": sampled - start, "decode": clock(pipe.device) - sampled}
    made: Record = {
        "seconds": {name: round(value, 4) for name, value in seconds.items()},
        "metrics": _judge(run.case, picture),
        "curves": steps,
    }
    return picture, made


def _start(run: Run) -> dict[str, Any]:
    """The arguments of a run that starts from its source; none for one from noise alone."""
    case, cell = run.case, run.cell
    if not cell.starts:
        return {}
    mask = case.mask if cell.masked else None
    return {"image": case.source, "mask_image": mask, "strength": cell.strength}


def _judge(case: Case, picture: Image.Image) -> Record:
    """The oracle's verdict on an edit of its world; empty for other edits."""
    if case.scene is None or case.request is None:
        return {}
    verdict = judge(case.scene, case.request, picture)
    preserved = verdict.preserved if math.isfinite(verdict.preserved) else None  # nothing to preserve
    return {
        "success": verdict.success, "strict": verdict.strict, "preserved": preserved, "reason": verdict.reason
    }  # fmt: skip


def _record(spec: Spec, run: Run, made_with: Record) -> Record:
    """A run's settings and its environment."""
    return {
        "key": run.key,
        "picture": run.case.name,
        "prompt": run.case.prompt,
        "seed": run.seed,
        "height": spec.height,
        "width": spec.width,
        **run.cell.settings,
        **made_with,
        "at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _require_writable(folder: Path) -> None:
    require_folder(folder)
    for name in (f"{RESULTS}.jsonl", *WRITTEN):
        if (folder / name).is_dir():
            raise ValueError(f"cannot write {folder / name}: it is a folder")
    for name in (PICTURES, FIGURES):
        if (folder / name).exists() and not (folder / name).is_dir():
            raise ValueError(f"cannot write into {folder / name}: it is no folder")


def _require_meant(edits: int, yes: bool) -> None:
    if edits > MOST_EDITS and not yes:
        raise ValueError(
            f"this spec asks for {edits} edits, more than {MOST_EDITS}: pass --yes (yes=True) to confirm"
        )
