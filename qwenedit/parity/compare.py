"""The proof on the user's own machine: a checkpoint through our modules and the reference's, one by one.

Of each network there is one stage of each side in memory at a time (a block, in the large networks), read
from the files as it is needed: what runs is the checkpoint itself, on a machine that could not hold it. Every
stage is given the reference's float32 streams, so that errors do not add up; at the end of the transformer
and of the text encoder, what adds up along our own streams is compared, too. What counts as equal is in
report.py.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from safetensors import safe_open
from torch import Tensor, nn
from tqdm import tqdm

from qwenedit.checks import device_of
from qwenedit.files import replacing_file
from qwenedit.inputs.geometry import Areas
from qwenedit.inputs.processor import check_prompt
from qwenedit.parity.reference import (
    VERSIONS,
    Streams,
    prepare,
    reference_network,
    reference_path,
    require_reference,
)
from qwenedit.parity.report import DTYPES, END_TO_END, FLOAT32, Files, Parity, Row, compared
from qwenedit.parity.stages import Stage, stages
from qwenedit.parity.taps import first_difference
from qwenedit.version import __version__
from qwenedit.weights import loading
from qwenedit.weights.checkpoints import COMPONENTS, find_local, fingerprint, read_areas, read_variant
from qwenedit.weights.keys import NETWORKS
from qwenedit.weights.report import compare

__all__ = ["Parity", "Row", "parity"]

PROMPT = "Make the circle red and keep everything else. 把圆形变成红色，其他保持不变。"
AREA = 256 * 256  # of pictures, at most: the modules do not depend on it, the time does
BFLOAT16_STEP = 2**-7  # two roundings: from here on two tensors in bfloat16 are said to differ


def parity(
    source: str | os.PathLike[str] | None = None,
    output: Path = Path("parity.json"),
    *,
    revision: str | None = None,
    picture: Image.Image | None = None,
    prompt: str = PROMPT,
    dtypes: Sequence[str] = DTYPES,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> Parity:
    """Compare a checkpoint's modules with the reference's; None is the embedded model.

    Rows are added to a .jsonl beside `output` as they are done, and the streams are kept in a .safetensors
    there meanwhile: a run that was stopped goes on, given the same output and everything else the same.

    Args:
        output: the .json with all rows.
        picture: what to edit, made small first (256 x 256 pixels in area); None is a drawn one.
        dtypes: of "float32" and "bfloat16".

    Raises:
        ValueError: the references are not installed; bad arguments; no checkpoint on this machine (nothing is
            downloaded), or files that do not fit their modules.
    """
    require_reference()
    dtypes = [dtype for dtype in DTYPES if dtype in _checked(dtypes)]
    where = device_of(device)
    _check_output(output)
    folder = find_local(source, revision)
    variant = read_variant(folder)
    if picture is not None and variant.max_pictures == 0:
        raise ValueError(f"{variant.name} makes pictures from text only: there is none to give")
    check_prompt(prompt, illustrated=variant.max_pictures > 0)
    areas = read_areas(folder, variant)
    areas = Areas(vae=min(areas.vae, AREA), vl=None if areas.vl is None else min(areas.vl, AREA))
    shown = (picture or _drawn()).convert("RGBA" if variant.layered else "RGB")
    about = {
        "checkpoint": str(source or "the embedded model"),
        "variant": variant.name,
        "prompt": prompt,
        "device": str(where),
        "dtypes": dtypes,
        "versions": {"qwenedit": __version__, "torch": torch.__version__, **VERSIONS},
    }
    mark = _fingerprint(folder, {**about, "size": shown.size}, shown)
    networks = {component: _Networks.of(folder, component, where) for component in COMPONENTS}
    with torch.no_grad(), _without_tf32():
        case, exact = prepare(folder, variant, areas, shown, prompt, where)
        run = _Run(networks, list(stages(folder, case)), dtypes, case.streams, Files(output, mark))
        for what, got, wanted in exact:
            run.exact(f"input.{what}", _equal(got, wanted))
        result = Parity(folder, about, run.finish(progress))
    report = {**about, "fingerprint": mark, "ok": result.ok, "verdict": result.verdict()}
    report["rows"] = [asdict(row) for row in result.rows]
    with replacing_file(output) as temporary:
        temporary.write_text(json.dumps(report, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    return result


def _checked(dtypes: Sequence[str]) -> Sequence[str]:
    if isinstance(dtypes, str) or not dtypes or set(dtypes) - set(DTYPES):
        raise ValueError(f"dtypes are {dtypes!r}, wanted one or both of {', '.join(DTYPES)}")
    return dtypes


def _check_output(output: Path) -> None:
    if output.suffix != ".json" or output.is_dir():
        raise ValueError(f"cannot write {output}: wanted a file name like parity.json")
    if not output.parent.is_dir() or not os.access(output.parent, os.W_OK):
        raise ValueError(f"cannot write {output}: {output.parent} is no folder that can be written to")


def _drawn() -> Image.Image:
    """A picture with flat and smooth parts, edges, and no symmetry; for Layered it fades out to one side."""
    size = (320, 192)
    gradient = Image.linear_gradient("L").resize(size)
    picture = Image.merge("RGB", (gradient, gradient.transpose(Image.Transpose.ROTATE_180), gradient))
    draw = ImageDraw.Draw(picture)
    draw.ellipse((30, 25, 130, 125), fill=(40, 90, 220))
    draw.rectangle((180, 90, 290, 170), fill=(250, 220, 30))
    draw.polygon([(210, 15), (270, 75), (160, 70)], fill=(20, 160, 60))
    picture.putalpha(gradient)
    return picture


def _fingerprint(folder: Path, about: dict[str, Any], picture: Image.Image) -> str:
    """A hash of everything that a row depends on: checkpoint, input, versions, and our code."""
    digest = hashlib.sha256(json.dumps({"files": fingerprint(folder), **about}).encode())
    digest.update(picture.tobytes())
    for path in sorted(folder.rglob("*.safetensors")):  # of a large file only pieces are read
        digest.update(f"{path.relative_to(folder).as_posix()} {path.stat().st_mtime_ns}".encode())
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


@contextmanager
def _without_tf32() -> Iterator[None]:
    """On NVIDIA's devices torch convolves float32 in TF32 unless told otherwise."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def _equal(got: Any, wanted: Any) -> bool:
    if not isinstance(got, Tensor):
        return bool(got == wanted)
    return got.dtype == wanted.dtype and got.shape == wanted.shape and torch.equal(got, wanted)


class NotFiniteError(ArithmeticError):
    """A weight in a file is NaN or infinity; the message names it."""


@dataclass(frozen=True, eq=False)
class _Networks:
    """A network on both sides, on the meta device but for the stage that runs."""

    component: str
    ours: nn.Module
    reference: nn.Module
    found: dict[str, Any]
    device: torch.device

    @classmethod
    def of(cls, folder: Path, component: str, device: torch.device) -> _Networks:
        ours, found, report = compare(folder, component)
        if not report.ok:
            raise ValueError(f"{folder / component} does not fit the {component}: {report.problems()}")
        return cls(component, ours.eval(), reference_network(folder, component, device), found, device)

    @contextmanager
    def loaded(self, stage: Stage, dtype: torch.dtype) -> Iterator[None]:
        """Both sides with the stage's weights, which each reads from the files by itself.

        Raises:
            NotFiniteError: a weight is NaN or infinity.
            ValueError: a file cannot be read.
        """
        wanted = None if stage.stored else dtype
        part = {
            name: stored
            for name, stored in self.found.items()
            if any(name.startswith(f"{path}.") for path in stage.paths)
        }
        placed: list[tuple[nn.Module, str]] = []
        try:
            placed += [(self.ours, name) for name in part]
            loading._read(self.ours, part, self.device, wanted, tqdm(disable=True))
            for name, stored in part.items():
                smallest, largest = torch.aminmax(self.ours.get_parameter(name))
                if not torch.isfinite(smallest + largest):  # without a map of a large tensor
                    raise NotFiniteError(f"{stored.key} in {stored.path.name} has NaN or infinity")
            for stored in part.values():
                official = NETWORKS[self.component].hub_key(stored.name)
                name = reference_path(self.component, official)
                with safe_open(stored.path, framework="pt") as file:
                    value = stored.read(file)
                _place(self.reference, name, value.to(self.device, wanted or value.dtype))
                placed.append((self.reference, name))
            yield
        finally:
            for module, name in placed:
                _place(module, name, torch.empty_like(module.get_parameter(name), device="meta"))


def _place(module: nn.Module, name: str, value: Tensor) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(parent), leaf, nn.Parameter(value, requires_grad=False))


class _Run:
    """The stages one after another, and the streams between them.

    Streams have lanes: "reference", which is float32 and which every stage is given, and, to see what adds
    up, those of ours in each dtype and of the reference in bfloat16.
    """

    def __init__(
        self,
        networks: dict[str, _Networks],
        todo: list[Stage],
        dtypes: list[str],
        streams: Streams,
        files: Files,
    ) -> None:
        self.networks, self.stages, self.dtypes, self.files = networks, todo, dtypes, files
        self.lanes: dict[str, Streams] = {"reference": dict(streams)}
        self.rows = files.read_rows()
        self.keys: list[tuple[str, str]] = []  # of all rows, in the order of the report

    def add(self, row: Row) -> None:
        key = row.module, row.dtype
        if self.rows.get(key) != row:
            self.rows[key] = row
            self.files.add_row(row)

    def exact(self, module: str, equal: bool) -> None:
        self.keys.append((module, "exact"))
        self.add(Row(module=module, dtype="exact", ok=equal))

    def finish(self, progress: bool) -> list[Row]:
        """Run the stages that are not done; all rows in order. A network that is not finite is the end."""
        for stage in self.stages:
            modules = [stage.full, *([_whole(stage)] if stage.ends else [])]
            self.keys += [(module, dtype) for module in modules for dtype in self.dtypes]
        done, lanes = self.files.read_streams(self.networks["vae"].device)
        if lanes:
            self.lanes = lanes
        elif all(key in self.rows for key in self.keys):
            done = len(self.stages)
        with tqdm(
            total=len(self.stages),
            initial=done,
            desc="comparing",
            unit="module",
            disable=None if progress else True,
        ) as bar:
            for number, stage in enumerate(self.stages[done:], start=done):
                if number == 0 or self.stages[number - 1].component != stage.component:
                    self.start()
                try:
                    rows = self.step(stage)
                except NotFiniteError as error:
                    rows = [Row(module=stage.full, dtype=self.dtypes[0], ok=False, first=str(error))]
                for row in rows:
                    self.add(row)
                bar.update()
                if any(row.relative is None for row in rows):
                    break
                self.files.write_streams(number + 1, self.lanes)
        self.files.streams.unlink(missing_ok=True)
        return [self.rows[key] for key in self.keys if key in self.rows]

    def start(self) -> None:
        """At the start of a network nothing has added up."""
        given = self.lanes["reference"]
        self.lanes = {"reference": given}
        for name in self.dtypes:
            sides = ("ours",) if name == "float32" else ("ours", "reference")
            self.lanes |= {f"{side} {name}": _cast(given, name) for side in sides}

    def step(self, stage: Stage) -> list[Row]:
        """One stage in every dtype: its rows, and its streams in every lane."""
        networks, given = self.networks[stage.component], self.lanes["reference"]
        rows: list[Row] = []
        made: dict[str, Streams] = {}
        for name in DTYPES if "bfloat16" in self.dtypes else ("float32",):
            streams = _cast(given, name)
            with networks.loaded(stage, getattr(torch, name)):
                wanted = stage.reference(networks.reference, streams)
                if name == "float32":
                    made["reference"] = wanted
                if name not in self.dtypes:  # float32, to measure the errors of bfloat16
                    continue
                got = stage.ours(networks.ours, streams)
                row = compared(stage.full, name, got, wanted, made["reference"], FLOAT32)
                if not row.ok:
                    sides = networks.ours, networks.reference
                    tolerance = FLOAT32 if name == "float32" else BFLOAT16_STEP
                    row = replace(row, first=first_difference(stage, *sides, streams, tolerance) or row.first)
                rows.append(row)
                for lane, side, network, outputs in (
                    (f"ours {name}", stage.ours, networks.ours, got),
                    (f"reference {name}", stage.reference, networks.reference, wanted),
                ):
                    if lane in self.lanes:
                        own = self.lanes[lane]
                        made[lane] = outputs if _same(own, streams) else side(network, own)
        if stage.ends:
            for name in self.dtypes:
                wanted = made.get(f"reference {name}", made["reference"])
                rows.append(
                    compared(_whole(stage), name, made[f"ours {name}"], wanted, made["reference"], END_TO_END)
                )
        if stage.keeps:
            self.lanes = {lane: {**old, **made[lane]} for lane, old in self.lanes.items()}
        return rows


def _whole(stage: Stage) -> str:
    return f"{stage.component} end to end"


def _cast(streams: Streams, name: str) -> Streams:
    return {key: x.to(getattr(torch, name)) for key, x in streams.items()}


def _same(own: Streams, given: Streams) -> bool:
    return all(torch.equal(own[key], x) for key, x in given.items())
