"""A grid of settings over pictures and seeds: `qwenedit ablate SPEC.toml`, `qwenedit.ablate(spec, folder)`.

spec.py describes the spec. The results folder has

    results.jsonl      a line for every run: settings, environment, timings, metrics, curves
    pictures/KEY.png   its picture
    results.csv, summary.csv, summary.tex, pictures.tex, figures/, grid.png, report.html

KEY is a hash of everything that a picture depends on, including the model's weights, an intervention's code
and this package's version. A run whose line and picture exist is not run again: a sweep that was stopped, or
whose spec has grown, resumes. (After changing this package's code, take another folder.)
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from qwenedit.ablation.attention import target_attention
from qwenedit.ablation.cases import Case
from qwenedit.ablation.figures import FIGURES, write_figures
from qwenedit.ablation.functions import code_of
from qwenedit.ablation.intervening import acting, state_of
from qwenedit.ablation.measures import Record
from qwenedit.ablation.measuring import add_floor, mask_hash, measure
from qwenedit.ablation.metrics import curves
from qwenedit.ablation.model import Model, pipe_fingerprint
from qwenedit.ablation.report import write_report
from qwenedit.ablation.results import PICTURES, Sweep, picture_of, read_results
from qwenedit.ablation.sheet import picture_grid
from qwenedit.ablation.spec import NONE, Cell, Spec, read_spec, with_sampler
from qwenedit.ablation.tables import write_csv, write_picture_tex, write_summary_csv, write_summary_tex
from qwenedit.checks import device_of, dtype_of, progress_bar
from qwenedit.encoding.conditioning import Conditioning
from qwenedit.files import append_line, is_leftover, replacing_file, write_lines
from qwenedit.foreign import shown
from qwenedit.inputs.pictures import open_picture, to_pil
from qwenedit.instruments.determinism import deterministic, environment
from qwenedit.mini.oracle import judge
from qwenedit.pipeline import QwenImageEdit, load
from qwenedit.taps import require_finite
from qwenedit.version import __version__
from qwenedit.weights.checkpoints import fingerprint, resolve

__all__ = ["MOST_EDITS", "ablate"]

MOST_EDITS = 200  # a larger sweep must be confirmed
RESULTS = "results.jsonl"
WRITTEN = {  # from all runs
    "results.csv": write_csv,
    "summary.csv": write_summary_csv,
    "summary.tex": write_summary_tex,
    "pictures.tex": write_picture_tex,
    "grid.png": lambda sweep, path: picture_grid(sweep).save(path),
    "report.html": write_report,
}


@dataclass(frozen=True, eq=False)
class Run:
    """One edit of a sweep: its place in the spec (case, seed, cell) and its key."""

    index: tuple[int, int, int]
    case: Case
    seed: int
    cell: Cell
    key: str

    @property
    def file(self) -> str:
        return picture_of(self.key)


def ablate(
    spec: str | os.PathLike[str] | Mapping[str, Any],
    folder: str | os.PathLike[str],
    *,
    pipe: QwenImageEdit | None = None,
    interventions: Mapping[str, Callable[[QwenImageEdit], AbstractContextManager[Any]]] | None = None,
    metrics: Mapping[str, Callable[..., float]] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
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
        yes: confirm more than `MOST_EDITS` edits.
        progress: progress bars on stderr, if that is a terminal.

    Raises:
        ValueError: a bad spec, one that does not fit the model, or a folder that cannot be written; before
            any weight is read. An intervention that leaves the model changed; edits that are done are kept.
    """
    plan, home = read_spec(spec, interventions, metrics), Path(folder)
    _require_writable(home)
    _require_meant(plan.edits - len(read_results(home / RESULTS)), yes)
    if pipe is None:
        checkpoint = resolve(plan.model, progress=progress)
        where = device_of(device)
        wanted = dtype_of(dtype, where)
        parts = Model.of_folder(checkpoint)
        parts.require_fitting(plan)
        model = fingerprint(checkpoint)
    else:
        given = [name for name, x in (("model", plan.model), ("device", device), ("dtype", dtype)) if x]
        if given:
            raise ValueError(f"there are a pipe and {' and '.join(given)}, wanted the pipe's own")
        parts = Model.of_pipe(pipe)
        parts.require_fitting(plan)
        where, wanted, model = pipe.device, pipe.dtype, pipe_fingerprint(pipe)
    plan = with_sampler(plan, parts.sampler)
    name = (plan.model or "the embedded model") if pipe is None else "the given pipeline"

    home.mkdir(parents=True, exist_ok=True)
    with _only_one(home):
        known = read_results(home / RESULTS)
        runs = list(_runs(plan, model, where, wanted))
        done = {key: x for key, x in known.items() if x["status"] == "done" and _is_whole(home / x["file"])}
        todo = [
            run
            for run in runs
            if run.key not in done or (_has_maps(plan, run) and "attention" not in done[run.key])
        ]
        _require_meant(len({run.key for run in todo}), yes)
        (home / PICTURES).mkdir(parents=True, exist_ok=True)
        # Drop a line that was cut off, and those of failed runs that are tried again.
        again = {run.key for run in todo} - done.keys()
        write_lines(home / RESULTS, [record for key, record in known.items() if key not in again])
        plain = {run.index[:2]: run.key for run in runs if run.index[2] == 0}
        functions = {name: (function, code_of(function)) for name, function in plan.metrics.items()}
        if todo:
            pipe = pipe or load(checkpoint, device=where, dtype=wanted, progress=progress)
            bar = progress_bar(todo, progress=progress, desc="ablating", unit="edit")
            with deterministic(pipe) if plan.deterministic else nullcontext() as pinned:
                made_with = {
                    "model": name,
                    "fingerprint": model,
                    **_environment(pipe),
                    "deterministic": pinned,
                }
                for run, record in _run(pipe, plan, bar, home, made_with):
                    done[run.key] = record
                    measure(home, run.case, record, done[plain[run.index[:2]]], functions)
                    append_line(home / RESULTS, record)
        for run in runs:  # an earlier sweep may have compared with other runs, and had other metrics
            measure(home, run.case, done[run.key], done[plain[run.index[:2]]], functions)
        for edit in range(len(plan.cases)):
            add_floor(home, [done[plain[edit, seed]] for seed in range(len(plan.seeds))])
        return _finish(plan, home, runs, done)


def _finish(spec: Spec, folder: Path, runs: list[Run], records: dict[str, Record]) -> Sweep:
    """Write everything that is made from all runs."""
    in_order = sorted(runs, key=lambda run: run.index)
    sweep = Sweep(folder, spec, {run.index: records[run.key] for run in in_order})
    ours = {run.key: records[run.key] for run in in_order}
    others = {key: x for key, x in read_results(folder / RESULTS).items() if key not in ours}
    write_lines(folder / RESULTS, [*others.values(), *ours.values()])
    write_figures(sweep, folder / FIGURES)
    for name, write in WRITTEN.items():
        with replacing_file(folder / name) as temporary:
            write(sweep, temporary)
    return sweep


@contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """Lock the folder, on systems with `fcntl`; the lock ends with the process.

    Raises:
        ValueError: another sweep runs in it.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    held = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise ValueError(
            f"another sweep runs in {shown(folder)}: wait for it, or take another folder"
        ) from None
    else:
        for part in (folder, folder / PICTURES, folder / FIGURES):
            for path in filter(is_leftover, part.iterdir() if part.is_dir() else ()):
                path.unlink()  # of a sweep that was killed: the lock says that none runs
        yield
    finally:
        os.close(held)


def _is_whole(picture: Path) -> bool:
    if picture.is_symlink():
        return False
    try:
        open_picture(picture)
    except ValueError:
        return False
    return True


def _has_maps(spec: Spec, run: Run) -> bool:
    """Attention maps are recorded for the first picture and seed, in every cell."""
    return spec.attention and run.index[:2] == (0, 0)


def _runs(spec: Spec, model: str, device: torch.device, dtype: torch.dtype | None) -> Iterator[Run]:
    """All runs; those with the same conditioning follow one another, the unablated runs first."""
    for i, case in enumerate(spec.cases):
        digest = hashlib.sha256()
        for picture in case.pictures:
            digest.update(f"{picture.mode} {picture.size}".encode() + picture.tobytes())
        source = digest.hexdigest()
        alike: dict[str, list[tuple[int, Cell]]] = {}
        for k, cell in enumerate(spec.cells):
            alike.setdefault(_encoding(cell), []).append((k, cell))
        for cells in alike.values():
            for k, cell in cells:
                for j, seed in enumerate(spec.seeds):
                    settings = [
                        __version__, model, device.type, str(dtype), source, case.prompt,
                        case.name if case.request else None, spec.height, spec.width, seed, cell.settings,
                        *(["deterministic"] if spec.deterministic else []),
                        *([mask_hash(case)] if cell.masked else []),
                    ]  # fmt: skip
                    text = json.dumps(settings, sort_keys=True)
                    key = hashlib.sha256(text.encode()).hexdigest()[:20]
                    yield Run((i, j, k), case, seed, cell, key)


def _encoding(cell: Cell) -> str:
    """The settings that a conditioning depends on, beside pictures and prompt."""
    return json.dumps(
        [cell.negative_prompt, cell.switches.encoding.flat(), cell.intervention], sort_keys=True
    )


def _run(
    pipe: QwenImageEdit, spec: Spec, todo: Iterable[Run], folder: Path, made_with: Record
) -> Iterator[tuple[Run, Record]]:
    """Run one edit after another; write its picture and yield its record."""
    made_already = set()
    for _, alike in itertools.groupby(todo, key=lambda run: (run.case, _encoding(run.cell))):
        encoded = None  # shared by these runs, and freed before the next one is made
        for run in alike:
            if run.key in made_already:  # another cell has the same settings
                continue
            made_already.add(run.key)
            intervened = run.cell.intervention != NONE  # which may act on the encoders as well
            encoded = None if intervened else encoded or _encode(pipe, spec, run)
            before = state_of(pipe) if intervened else None
            record = _record(spec, run, made_with)
            try:
                picture, made = _made(pipe, spec, run, encoded)
                json.dumps(made, allow_nan=False)  # a measure that is no number fails its edit alone
            except Exception as error:
                record |= {"status": "failed", "error": f"{type(error).__name__}: {error}", "file": None}
            else:
                with replacing_file(folder / run.file) as temporary:
                    picture.save(temporary)
                record |= {"status": "done", "file": run.file, **made}
            yield run, record
            if intervened and state_of(pipe) != before:
                raise ValueError(
                    f"the intervention {shown(run.cell.intervention)} left the model changed, or taps or "
                    "hooks attached: wanted a context manager that restores it; edits that are done are kept"
                )


def _made(
    pipe: QwenImageEdit, spec: Spec, run: Run, encoded: tuple[Conditioning, float] | Exception | None
) -> tuple[Image.Image, Record]:
    """A run's picture and its part of the record, with its LoRA and intervention; `encoded` may be shared."""
    with acting(pipe, spec, run.cell):
        encoded = encoded or _encode(pipe, spec, run)
        if isinstance(encoded, Exception):
            raise encoded
        mapped = target_attention(pipe.mmdit, encoded[0]) if _has_maps(spec, run) else nullcontext()
        with mapped as maps:
            picture, made = _edit(pipe, spec, run, *encoded)
        return picture, made | ({"attention": maps} if maps else {})
    raise RuntimeError("the intervention's context manager swallowed an exception")


def _encode(pipe: QwenImageEdit, spec: Spec, run: Run) -> tuple[Conditioning, float] | Exception:
    """The conditioning of a picture and a prompt and the seconds it took, or the exception that it raised."""
    start = _seconds(pipe.device)
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
    return conditioning, _seconds(pipe.device) - start


@torch.no_grad()
def _edit(
    pipe: QwenImageEdit, spec: Spec, run: Run, conditioning: Conditioning, encode: float
) -> tuple[Image.Image, Record]:
    """One edit: its picture, and its part of the record. Runs may share the `encode` seconds."""
    start = _seconds(pipe.device)
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
    sampled = _seconds(pipe.device)
    (picture,) = to_pil(pipe.decode(latents, conditioning.target_grid).cpu())
    seconds = {"encode": encode, "sample": sampled - start, "decode": _seconds(pipe.device) - sampled}
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


def _environment(pipe: QwenImageEdit) -> Record:
    found = environment(pipe)
    device = f"{found['device']} ({found['device_name']})" if found["device_name"] else found["device"]
    names = ("qwenedit", "torch", "python", "dtype", "threads")
    return {**{name: found[name] for name in names}, "commit": _commit(), "device": device}


def _commit() -> str | None:
    """The commit of this package's code, "-dirty" where files differ; None outside of a repository."""
    folder = Path(__file__).parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # fails in another project's repository
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        return None


def _seconds(device: torch.device) -> float:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def _require_writable(folder: Path) -> None:
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise ValueError(f"cannot write into {shown(folder)}: {shown(existing)} is no folder")
    for name in (RESULTS, *WRITTEN):
        if (folder / name).is_dir():
            raise ValueError(f"cannot write {folder / name}: it is a folder")
    for name in (PICTURES, FIGURES):
        if (folder / name).exists() and not (folder / name).is_dir():
            raise ValueError(f"cannot write into {folder / name}: it is no folder")
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise ValueError(f"cannot write into {shown(folder)}: {error}") from error


def _require_meant(edits: int, yes: bool) -> None:
    if edits > MOST_EDITS and not yes:
        raise ValueError(
            f"this spec asks for {edits} edits, more than {MOST_EDITS}: pass --yes (yes=True) to confirm"
        )
