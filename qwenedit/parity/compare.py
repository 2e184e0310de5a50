"""`qwenedit parity`: a checkpoint's modules beside the reference's, one by one, on the user's machine.

Only one stage of a network (in the large networks, a block) is in memory at a time on each side, read from
the files when it is needed: the checkpoint itself runs, even on a machine that could not hold it. Every stage
is given the reference's float32 streams, so that errors do not accumulate. At the end of the transformer and
of the text encoder, the error that accumulates along our own streams is compared too. report.py defines what
counts as equal.

The reference is diffusers with transformers, or for some networks another tool (`oracles.COMPARED`); input is
what diffusers makes of it. A network that the tool does not have runs on our side alone, to feed the others.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from safetensors import safe_open
from torch import Tensor, nn

from qwenedit.checks import device_of, progress_bar
from qwenedit.family import Variant
from qwenedit.files import replacing_file
from qwenedit.foreign import shown
from qwenedit.inputs.pictures import as_picture
from qwenedit.inputs.processor import check_prompt
from qwenedit.latents import Layout
from qwenedit.networks.mmdit import MMDiTConfig
from qwenedit.parity.entries import Trial, removing
from qwenedit.parity.oracle_networks import oracle_network
from qwenedit.parity.oracles import COMPARED, ORACLES, require_oracle
from qwenedit.parity.reference import (
    VERSIONS,
    Case,
    Streams,
    prepare,
    reference_controlnet,
    reference_network,
    reference_path,
    require_reference,
)
from qwenedit.parity.report import DTYPES, END_TO_END, FLOAT32, Parity, Progress, Row, compared
from qwenedit.parity.stages import Stage, controlnet_stages, stages
from qwenedit.parity.taps import first_difference
from qwenedit.version import __version__
from qwenedit.weights import loading
from qwenedit.weights.checkpoints import COMPONENTS, find_local, fingerprint, read_areas, read_variant
from qwenedit.weights.configs import network_config
from qwenedit.weights.controlnets import Source, compare_controlnet, find_controlnet, sources_of
from qwenedit.weights.keys import CONTROLNET, NETWORKS
from qwenedit.weights.loading import require_fitting
from qwenedit.weights.report import compare

__all__ = ["Parity", "Row", "parity"]

PROMPT = "Make the circle red and keep everything else. 把圆形变成红色，其他保持不变。"
AREA = 256 * 256  # the most pixels of a picture: only the run's time depends on it
BFLOAT16_STEP = 2**-7  # two roundings: the difference from which a tap in bfloat16 is named


def parity(
    source: str | os.PathLike[str] | None = None,
    output: Path = Path("parity.json"),
    *,
    revision: str | None = None,
    picture: Image.Image | None = None,
    prompt: str = PROMPT,
    dtypes: Sequence[str] = DTYPES,
    device: torch.device | str | None = None,
    controlnets: Sequence[Source] = (),
    progress: bool = True,
    against: str = "diffusers",
) -> Parity:
    """Compare a checkpoint's modules with the reference's; None is the embedded model.

    Finished rows are appended to a .jsonl file beside `output`, and the streams after the last stage are kept
    in a .safetensors file there. A run that was stopped resumes from them, given the same arguments.

    Args:
        output: the .json with all rows.
        picture: the picture to edit, reduced to at most 256 x 256 pixels in area; None: a drawn one.
        dtypes: "float32", "bfloat16" or both.
        controlnets: ControlNets of the transformer, which are compared, too, with the same picture; against
            diffusers only.
        against: one of `oracles.COMPARED`.

    Raises:
        ValueError: the references are not installed; bad arguments; no checkpoint on this machine (nothing is
            downloaded), or files that do not fit their modules.
    """
    require_reference()  # for any: it makes the input
    if against not in COMPARED:
        raise ValueError(f"against is {shown(repr(against))}, wanted one of {', '.join(COMPARED)}")
    if against in ORACLES:
        require_oracle(against)
    if isinstance(dtypes, str) or not dtypes or set(dtypes) - set(DTYPES):
        raise ValueError(f"dtypes are {dtypes!r}, wanted one or both of {', '.join(DTYPES)}")
    dtypes = [dtype for dtype in DTYPES if dtype in dtypes]
    where = device_of(device)
    _check_output(output)
    folder = find_local(source, revision)
    variant = read_variant(folder)
    if picture is not None and not variant.takes_pictures:
        raise ValueError(f"{variant.name} makes pictures from text only: it takes no picture")
    check_prompt(prompt, illustrated=variant.takes_pictures)
    areas = read_areas(folder, variant)
    areas = replace(areas, vae=min(areas.vae, AREA), vl=None if areas.vl is None else min(areas.vl, AREA))
    picture = _drawn() if picture is None else as_picture(picture, "picture")
    picture = picture.convert("RGBA" if variant.layered else "RGB")
    about = {
        "checkpoint": str(source or "the embedded model"),
        "variant": variant.name,
        "prompt": prompt,
        "device": str(where),
        "dtypes": dtypes,
        "against": against,
        "versions": {"qwenedit": __version__, "torch": torch.__version__, **VERSIONS, **ORACLES},
    }
    nets = _controlnets(folder, variant, controlnets, where, against)
    if nets:
        about["controlnets"] = [str(source) for source in controlnets]
    files = [stored.path for net in nets.values() for stored in net.found.values()]
    mark = _fingerprint(folder, {**about, "size": picture.size}, picture, files)
    pairs = {component: _Pair.of(folder, component, where, against) for component in COMPONENTS} | nets
    with torch.no_grad(), _without_tf32():
        case, exact = prepare(folder, variant, areas, picture, prompt, where)
        todo = list(stages(folder, case, heads_first=against == "diffsynth"))
        last = max(k for k, stage in enumerate(todo) if stage.component in COMPARED[against])
        todo = todo[: last + 1]
        for name, net in nets.items():
            own: Any = net.ours.config
            todo += controlnet_stages(name, own, case)
        run = _Run(pairs, todo, dtypes, case.streams, Progress(output, mark), _trial(case))
        for what, got, wanted in exact if against == "diffusers" else ():
            run.exact(f"input.{what}", _equal(got, wanted))
        result = Parity(folder, about, run.finish(progress))
    report = {**about, "fingerprint": mark, "ok": result.ok, "verdict": result.verdict()}
    report["rows"] = [asdict(row) for row in result.rows]
    with replacing_file(output) as temporary:
        temporary.write_text(json.dumps(report, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    return result


def _controlnets(
    folder: Path, variant: Variant, sources: Sequence[Source], device: torch.device, against: str
) -> dict[str, _Pair]:
    """Both sides of the ControlNets, by the names of their components."""
    if sources and variant.layered:
        raise ValueError(f"{variant.name} takes no control pictures: it has no ControlNets to compare")
    if sources and against != "diffusers":
        raise ValueError(f"ControlNets are compared against diffusers only, not against {against}")
    config: MMDiTConfig = network_config(folder, "transformer")
    pairs = {}
    for number, source in enumerate(sources_of(list(sources)), 1):
        if (path := find_controlnet(source)) is None:
            raise ValueError(f"{source} is not on this machine: load it once, or run `hf download {source}`")
        name = "controlnet" if len(sources) == 1 else f"controlnet {number}"
        pairs[name] = _Pair.of_controlnet(name, path, config, device)
    return pairs


def _trial(case: Case) -> Trial:
    """The labels that a run's predictor would set, for entries of dialects that are tried."""
    layout = Layout(case.ids.shape[1] - case.drop_index, case.grids)
    return Trial(layout=layout, sigma=float(case.streams["timestep"]), rows=(0,))


def _check_output(output: Path) -> None:
    if output.suffix != ".json" or output.is_dir():
        raise ValueError(f"cannot write {output}: wanted a file name like parity.json")
    try:
        with tempfile.TemporaryFile(dir=output.parent):
            pass
    except OSError as error:
        raise ValueError(f"cannot write {output}: {output.parent} is not a writable folder") from error


def _drawn() -> Image.Image:
    """A picture with flat and smooth areas, edges and no symmetry; its alpha, for Layered, is a gradient."""
    size = (320, 192)
    gradient = Image.linear_gradient("L").resize(size)
    picture = Image.merge("RGB", (gradient, gradient.transpose(Image.Transpose.ROTATE_180), gradient))
    draw = ImageDraw.Draw(picture)
    draw.ellipse((30, 25, 130, 125), fill=(40, 90, 220))
    draw.rectangle((180, 90, 290, 170), fill=(250, 220, 30))
    draw.polygon([(210, 15), (270, 75), (160, 70)], fill=(20, 160, 60))
    picture.putalpha(gradient)
    return picture


def _fingerprint(folder: Path, about: dict[str, Any], picture: Image.Image, files: Sequence[Path]) -> str:
    """A hash of everything that a row depends on: checkpoint, input, versions and the package's source."""
    digest = hashlib.sha256(json.dumps({"files": fingerprint(folder), **about}).encode())
    digest.update(picture.tobytes())
    for path in sorted(folder.rglob("*.safetensors")):  # `fingerprint` reads only parts of a large file
        digest.update(f"{path.relative_to(folder).as_posix()} {path.stat().st_mtime_ns}".encode())
    for path in sorted(set(files)):  # of ControlNets
        digest.update(f"{path} {path.stat().st_size} {path.stat().st_mtime_ns}".encode())
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


@contextmanager
def _without_tf32() -> Iterator[None]:
    """Full float32 on NVIDIA's devices, where torch's convolutions use TF32 by default."""
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
class _Pair:
    """A network on both sides. Only the stage that runs has weights; the rest is on the meta device.

    `reference` is None if the network is not compared.
    """

    component: str
    ours: nn.Module
    reference: nn.Module | None
    found: dict[str, Any]
    device: torch.device

    @classmethod
    def of(cls, folder: Path, component: str, device: torch.device, against: str = "diffusers") -> _Pair:
        ours, found, report = compare(folder, component)
        if not report.ok:
            raise ValueError(f"{folder / component} does not fit the {component}: {report.problems()}")
        reference = None
        if component in COMPARED[against]:
            other = against in ORACLES
            reference = (
                oracle_network(folder, component) if other else reference_network(folder, component, device)
            )
        return cls(component, ours.eval(), reference, found, device)

    @classmethod
    def of_controlnet(cls, name: str, path: Path, transformer: MMDiTConfig, device: torch.device) -> _Pair:
        one = compare_controlnet(path, transformer)
        require_fitting(one.report, path)
        ours: Any = one.module
        return cls(name, ours.eval(), reference_controlnet(ours.config), one.found, device)

    @contextmanager
    def loaded(self, stage: Stage, dtype: torch.dtype) -> Iterator[None]:
        """Give both sides the stage's weights; each side reads them from the files by itself.

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
            loading._read(self.ours, part, self.device, wanted, progress_bar(progress=False))
            for name, stored in part.items():
                smallest, largest = torch.aminmax(self.ours.get_parameter(name))
                if not torch.isfinite(smallest + largest):  # isfinite of all would make a mask as large
                    raise NotFiniteError(
                        f"{shown(stored.key)} in {shown(stored.path.name)} has NaN or infinity"
                    )
            for stored in part.values():
                if self.reference is None:
                    break
                network = NETWORKS.get(self.component, CONTROLNET)
                name = reference_path(self.component, network.hub_key(stored.name))
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
    """The stages one after another, and the streams between them; those that are not compared have no rows.

    Streams have lanes. "reference" is the reference's float32, which every stage is given. The others show
    what accumulates: our own streams in each dtype, and the reference's in bfloat16.
    """

    def __init__(
        self, pairs: dict[str, _Pair], todo: list[Stage], dtypes: list[str], streams: Streams,
        files: Progress, trial: Trial,
    ) -> None:  # fmt: skip
        self.pairs, self.stages, self.dtypes, self.files, self.trial = pairs, todo, dtypes, files, trial
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
        """Run the remaining stages; all rows in order. A network with NaN or infinity ends the run."""
        for stage in (one for one in self.stages if self.pairs[one.component].reference is not None):
            modules = [stage.full, *([_whole(stage)] if stage.ends else [])]
            self.keys += [(module, dtype) for module in modules for dtype in self.dtypes]
        done, lanes = self.files.read_streams(self.pairs["vae"].device)
        if lanes:
            self.lanes = lanes
        elif all(key in self.rows for key in self.keys):
            done = len(self.stages)
        count = len(self.stages)
        with progress_bar(
            progress=progress, total=count, initial=done, desc="comparing", unit="module"
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
        """Start every lane from the reference's streams: no error has accumulated before a network."""
        given = self.lanes["reference"]
        self.lanes = {"reference": given, **{f"ours {name}": _cast(given, name) for name in self.dtypes}}
        if "bfloat16" in self.dtypes:
            self.lanes["reference bfloat16"] = _cast(given, "bfloat16")

    def step(self, stage: Stage) -> list[Row]:
        """Run one stage in every dtype and every lane; its rows."""
        pair, given = self.pairs[stage.component], self.lanes["reference"]
        if pair.reference is None:
            with pair.loaded(stage, torch.float32):
                made_here = stage.ours(pair.ours, given) if stage.paths else {}
            self.lanes["reference"] = {**given, **made_here}
            return []
        rows: list[Row] = []
        made: dict[str, Streams] = {}
        for name in DTYPES if "bfloat16" in self.dtypes else ("float32",):
            streams = _cast(given, name)
            with pair.loaded(stage, getattr(torch, name)):
                wanted = stage.reference(pair.reference, streams)
                made.setdefault("reference", wanted)  # float32 is the first
                if name not in self.dtypes:  # float32 alone, to measure the errors of bfloat16
                    continue
                got = stage.ours(pair.ours, streams)
                row = compared(stage.full, name, got, wanted, made["reference"], FLOAT32)
                if not row.ok:
                    sides = pair.ours, pair.reference
                    tolerance = FLOAT32 if name == "float32" else BFLOAT16_STEP
                    row = replace(row, first=first_difference(stage, *sides, streams, tolerance) or row.first)
                    if name == "float32":
                        row = replace(row, removed_by=removing(stage, *sides, streams, self.trial))
                rows.append(row)
                for lane, side, network, outputs in (
                    (f"ours {name}", stage.ours, pair.ours, got),
                    (f"reference {name}", stage.reference, pair.reference, wanted),
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
        if stage.paths:  # the output of a table is no stream
            self.lanes = {lane: {**old, **made[lane]} for lane, old in self.lanes.items()}
        return rows


def _whole(stage: Stage) -> str:
    return f"{stage.component} end to end"


def _cast(streams: Streams, name: str) -> Streams:
    return {key: x.to(getattr(torch, name)) for key, x in streams.items()}


def _same(own: Streams, given: Streams) -> bool:
    return all(torch.equal(own[key], x) for key, x in given.items())
