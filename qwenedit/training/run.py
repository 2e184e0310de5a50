"""A training run from its spec: everything is checked, then encoded, then trained, then written.

    qwenedit.train("train.toml")   # again: goes on, or does nothing if it is done

In the output folder: `lora.safetensors`, or `model` for whole weights, and with `ema` their average as
`lora_ema.safetensors` or `model_ema`; `log.jsonl`; `sheets`; `spec.json`, what was trained; `state.pt`, from
which a run goes on; `cache`.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import torch
from torch import Generator

from qwenedit.checks import hinting
from qwenedit.files import remove_leftovers, replacing_file, require_folder
from qwenedit.foreign import read_json, shown
from qwenedit.instruments.determinism import deterministic
from qwenedit.layered import require_flat
from qwenedit.memory.residency import require_staying
from qwenedit.parallel.spec import processes_started
from qwenedit.pipeline import QwenImageEdit, load
from qwenedit.shards import only_one
from qwenedit.training.cache import Cache, Wanted, encoders_of, joined, weights_of
from qwenedit.training.data import Entry, Row, digest_of, edits_of, looked_at, read_entries, rows_of_step
from qwenedit.training.loop import Run, Weights, adamw
from qwenedit.training.loss import TrainingBatch, flow_matching_loss, freeze_unreached
from qwenedit.training.spec import Spec, read_spec
from qwenedit.training.validation import held_out_losses, sheet_of, wanted_by
from qwenedit.version import __version__
from qwenedit.weights.lora_targets import target_layers

if TYPE_CHECKING:
    from qwenedit.training.together import Together

__all__ = ["batches_of_step", "train"]

DROPPED = " "  # in place of a caption, as the default negative prompt of edits
SHEETS = "sheets"


@hinting
def train(
    spec: str | os.PathLike[str] | Mapping[str, Any],
    pipe: QwenImageEdit | None = None,
    *,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> Path:
    """Train a LoRA or all weights of the transformer, or go on; returns the LoRA's file, or the folder.

    Args:
        spec: a TOML file, or a dict of the same content (see spec.py); `data` may then be a list of a table's
            rows, with PIL's pictures in place of files.
        pipe: a pipeline in place of the spec's model, whose transformer is trained where it is. It keeps the
            LoRA, in float32, or the weights.
        device: as for `qwenedit.load`.
        progress: progress bars on stderr, if that is a terminal.

    Raises:
        ValueError: a bad spec; data that is missing or does not fit the model; weights that cannot be trained
            where they are; a folder that has another run. All of this before anything is encoded.
        NonFiniteError: the loss, naming the step. The last saved state stays.
    """
    plan, together = read_spec(spec), None
    if processes_started() > 1:
        together = _together(plan, device, given=pipe is not None)
        device, progress = together.device, progress and together.first
    first = together is None or together.first
    learned, held = _split(plan, read_entries(plan.data, plan.base))
    if pipe is None:
        encoding = load(plan.model, device=device, dtype=plan.dtype, residency="stage", progress=progress)
    else:
        given = [name for name, x in (("model", plan.model), ("dtype", plan.dtype), ("device", device)) if x]
        if given:
            raise ValueError(f"there are a pipe and {' and '.join(given)}, wanted the pipe's own")
        encoding = pipe
    _require_trainable(plan, encoding, given=pipe is not None)
    areas = encoding.areas
    if plan.area is not None:
        areas = dataclasses.replace(areas, vae=plan.area, text_only=plan.area)
    rows, others = (looked_at(part, encoding.variant, areas, progress=progress) for part in (learned, held))
    require_folder(plan.output)
    plan.output.mkdir(parents=True, exist_ok=True)
    with only_one(plan.output, "training") if first else nullcontext(False) as alone:
        if alone:
            remove_leftovers(plan.output, plan.output / SHEETS)
        identity = {"model": weights_of(encoding.mmdit), "encoders": encoders_of(encoding)}
        with nullcontext(True) if together is None else together.first_alone() as writes:
            contents = {**identity, "data": digest_of([*rows, *others])}
            _require_same_run(plan, contents, write=writes)
        cache = Cache(plan.cache, identity["encoders"])
        wanted = [_wanted(plan, row) for row in rows]
        if plan.validation is not None:
            wanted += wanted_by(plan.validation, others)
        with nullcontext(True) if together is None else together.first_alone() as encodes:
            if encodes:
                cache.encode(encoding, wanted, progress=progress)
        cache.require_sound(wanted, progress=progress)
        if pipe is None:
            device = encoding.device
            del encoding
            pipe = (
                load(
                    plan.model, device=device, dtype=plan.dtype, residency="resident", text_encoder=False,
                    progress=progress,
                )
                if together is None
                else together.load(plan.model, plan.dtype, progress=progress)
            )  # fmt: skip
        return _Training(plan, pipe, cache, rows, others, progress, together).run()


def _together(plan: Spec, device: torch.device | str | None, *, given: bool) -> Together:
    """Meet the processes that torchrun started.

    Raises:
        ValueError: a given pipeline, whose weights each process has whole; a step without a micro-batch for
            each process.
    """
    count = processes_started()
    if given:
        raise ValueError(f"there are a pipe and {count} processes, wanted the spec's model: it is split")
    if plan.accumulate < count:
        raise ValueError(
            f"accumulate is {plan.accumulate}, wanted at least {count}, the number of processes, which share "
            "out a step's micro-batches: a smaller batch leaves the step the same"
        )
    from qwenedit.training.together import Together  # not in every torch

    return Together(device)


def batches_of_step(
    spec: Spec, cache: Cache, rows: Sequence[Row], step: int, generator: Generator
) -> Iterator[tuple[TrainingBatch, float]]:
    """The micro-batches of a step, and each one's share of the step's weights.

    All that is random is drawn for the whole step, so that the same rows in more micro-batches are the same
    step. The draws are: which captions are dropped; the posterior's noise; noise levels; noise.
    """
    numbers = rows_of_step(rows, spec.batch * spec.accumulate, spec.options.seed, step)
    chosen = [rows[number] for number in numbers]
    dropped = torch.rand(len(chosen), generator=generator) < spec.caption_dropout
    prompts = [DROPPED if drop else row.entry.caption for row, drop in zip(chosen, dropped, strict=True)]
    conditioning = joined([cache.conditioning(row, one) for row, one in zip(chosen, prompts, strict=True)])
    means, deviations = zip(*(cache.latents(row) for row in chosen), strict=True)
    latents = torch.stack(means)
    if spec.convention.posterior == "sample":
        noise = torch.randn(latents.shape, generator=generator).to(latents.dtype)
        latents = latents + torch.stack(deviations) * noise
    weight = None
    if any(row.weight is not None for row in chosen):
        ones = torch.ones(latents.shape[1])
        weight = torch.stack([ones if row.weight is None else row.weight for row in chosen])
    whole = TrainingBatch.draw(conditioning, latents, generator, spec.convention.levels, weight)
    for start in range(0, len(chosen), spec.batch):
        part = slice(start, min(start + spec.batch, len(chosen)))
        share = (
            (part.stop - start) / len(chosen) if weight is None else float(weight[part].sum() / weight.sum())
        )
        yield (
            TrainingBatch(
                conditioning=whole.conditioning.rows(range(part.start, part.stop)),
                latents=whole.latents[part],
                sigma=whole.sigma[part],
                noise=whole.noise[part],
                weight=None if weight is None else weight[part],
            ),
            share,
        )


def _split(plan: Spec, entries: list[Entry]) -> tuple[list[Entry], list[Entry]]:
    """The rows that are learned, and those of the validation."""
    if plan.validation is None:
        return entries, []
    count = plan.validation.rows
    if count >= len(entries):
        raise ValueError(f"validation.rows is {count}, wanted fewer than the {len(entries)} rows of the data")
    held = sorted(Random(f"{plan.options.seed} held out").sample(range(len(entries)), count))
    edits = edits_of(plan.validation.edits, plan.base)
    learned = [entry for number, entry in enumerate(entries) if number not in held]
    return learned, [*(entries[number] for number in held), *edits]


def _require_trainable(plan: Spec, pipe: QwenImageEdit, *, given: bool) -> None:
    """Raise a ValueError unless the model's transformer can be trained as the spec says."""
    require_flat(pipe.variant)
    if plan.lora is not None:
        target_layers(pipe.mmdit, plan.lora.targets)
    elif pipe.loras:
        raise ValueError(
            f"the pipeline has LoRAs ({', '.join(pipe.loras)}), and all weights are to be trained: wanted "
            "them fused or unloaded, or a table [lora]"
        )
    elif pipe.folder is None:
        raise ValueError("the pipeline was not made by load, so all its weights cannot be saved")
    elif there := [one for one in (plan.output / "model", plan.output / "model_ema") if os.path.lexists(one)]:
        before = read_json(plan.output / "spec.json", optional=True).get("settings", {}).get("steps")
        if before != plan.options.steps:
            raise ValueError(f"{shown(there[0])} is there already: move it away, or take another output")
    if given:
        require_staying(pipe.mmdit, list(pipe.mmdit.parameters()), "training changes weights")
    if pipe.dtype == torch.float16:
        raise ValueError("the model is in float16, which loses small gradients: wanted bfloat16")


def _require_same_run(plan: Spec, contents: dict[str, str], *, write: bool) -> None:
    """Compare what is trained with what the folder has, and `write` it down.

    Without a fall of the learning rate a run may be made longer.

    Raises:
        ValueError: the folder has another run; the message names what differs.
    """
    now: dict[str, Any] = json.loads(json.dumps({**contents, "settings": plan.settings}))
    file = plan.output / "spec.json"
    before = read_json(file, optional=True)
    if before:
        one, other = ({**x, **x.get("settings", {}), "settings": None} for x in (before, now))
        names = {*one, *other} - {"qwenedit", *(["steps"] if plan.options.schedule == "constant" else [])}
        if different := sorted(name for name in names if one.get(name) != other.get(name)):
            listed = ", ".join(
                f"{name} {shown(repr(one.get(name)), 60)} there and {shown(repr(other.get(name)), 60)} here"
                for name in different
            )
            raise ValueError(f"{shown(plan.output)} has another run: {listed}; wanted another output folder")
    if not write:
        return
    with replacing_file(file) as temporary:
        text = json.dumps({"qwenedit": __version__, **now}, indent=1, ensure_ascii=False)
        temporary.write_text(text + "\n", encoding="utf-8")


def _wanted(plan: Spec, row: Row) -> Wanted:
    captions = {row.entry.caption: None, **({DROPPED: None} if plan.caption_dropout else {})}
    return Wanted(row, tuple((caption, None) for caption in captions))


@dataclass(frozen=True, eq=False)
class _Training:
    """The run of a plan whose rows are encoded."""

    plan: Spec
    pipe: QwenImageEdit
    cache: Cache
    rows: list[Row]
    others: list[Row]
    progress: bool
    together: Together | None

    def run(self) -> Path:
        """Train what is left, and write the result."""
        plan, mmdit = self.plan, self.pipe.mmdit
        name = None
        if plan.lora is not None:
            name = self.pipe.add_lora(
                rank=plan.lora.rank, alpha=plan.lora.alpha, targets=plan.lora.targets,
                dropout=plan.lora.dropout, generator=Generator().manual_seed(plan.options.seed),
            )  # fmt: skip
        else:
            mmdit.requires_grad_(True)
        freeze_unreached(mmdit)
        live = dict(mmdit.named_parameters()) if name is None else self.pipe.lora_parameters(name)
        live = {key: x for key, x in live.items() if x.requires_grad}
        optimisers = adamw(plan.rate, betas=plan.betas, eps=plan.eps, weight_decay=plan.weight_decay)
        try:
            made = Run if self.together is None else self.together.run
            run = made(plan.output, live, plan.options, optimisers, progress=self.progress)
            if run.step > plan.options.steps:
                raise ValueError(
                    f"steps is {plan.options.steps}, but {run.step} are done, wanted at least those"
                )
            pinned = deterministic(self.pipe) if plan.deterministic else nullcontext()
            with pinned, _in_training(self.pipe, checkpointing=plan.checkpointing):
                self._steps(run)
        except BaseException:
            if name is not None:
                self.pipe.unload_lora_weights(name)
            raise
        return self._write(run.weights, name)

    def _steps(self, run: Run) -> None:
        plan = self.plan
        if run.step == 0:
            self._validate(run)
        for step, generator in run:
            batches = batches_of_step(plan, self.cache, self.rows, step, generator)
            for batch, share in batches if self.together is None else self.together.own(list(batches)):
                run.add(flow_matching_loss(self.pipe, batch, plan.convention), share)
            run.update()
            if plan.validation is not None and run.due(plan.validation.every):
                self._validate(run)

    def _validate(self, run: Run) -> None:
        """With the average, if there is one."""
        validation, mmdit = self.plan.validation, self.pipe.mmdit
        if validation is None:
            return
        (run.folder / SHEETS).mkdir(exist_ok=True)
        first = self.together is None or self.together.first
        file = run.folder / SHEETS / f"{run.step:06d}.png" if first else None
        mmdit.eval()
        with run.weights.averaged():
            losses = held_out_losses(self.pipe, validation, self.cache, self.others, self.plan.convention)
            sheet_of(self.pipe, validation, self.cache, self.others, file)
        mmdit.train()
        if losses:
            run.log(**losses)

    def _write(self, weights: Weights, name: str | None) -> Path:
        """Write the weights and, if there is one, their average; returns where the weights are."""
        kind = "model" if name is None else "lora"
        end = "" if name is None else ".safetensors"
        file = self.plan.output / f"{kind}{end}"
        self._save(name, file)
        if weights.average is not None:
            with weights.averaged():
                self._save(name, self.plan.output / f"{kind}_ema{end}")
        return file

    def _save(self, name: str | None, file: Path) -> None:
        if name is not None:
            assert self.plan.lora is not None
            if self.together is not None and not self.together.first:
                return
            self.pipe.save_lora_weights(file, name, layout=self.plan.lora.layout)
            return
        if file.is_dir():  # of these steps, else `_require_trainable` had refused it
            return
        whole = self.pipe
        if whole.vision_language is None:
            whole = load(
                self.plan.model, device=self.pipe.device, dtype=self.plan.dtype, residency="stage",
                progress=False,
            )  # fmt: skip
            whole.mmdit = self.pipe.mmdit
        whole.save_pretrained(file)


@contextmanager
def _in_training(pipe: QwenImageEdit, *, checkpointing: bool) -> Iterator[None]:
    """The transformer trains within this block, and runs without bars of its own."""
    mmdit = pipe.mmdit
    before = mmdit.checkpointing, pipe.progress
    mmdit.checkpointing, pipe.progress = checkpointing, False
    mmdit.train()
    try:
        yield
    finally:
        mmdit.checkpointing, pipe.progress = before
        mmdit.eval().requires_grad_(False)
