"""What a sweep must know of its model: whether every edit fits it, and what identifies its weights."""

from __future__ import annotations

import hashlib
import math
import re
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from qwenedit.ablation.cases import Case
from qwenedit.ablation.functions import code_of, tensor_bytes
from qwenedit.ablation.spec import Cell, Spec
from qwenedit.call import Call, sources_for
from qwenedit.family import Variant
from qwenedit.foreign import shown
from qwenedit.inputs.geometry import Areas
from qwenedit.inputs.rows import rows_of
from qwenedit.layered import require_flat
from qwenedit.memory.residency import files_of
from qwenedit.networks.mmdit import MMDiT, MMDiTConfig
from qwenedit.pipeline import QwenImageEdit
from qwenedit.sampling.guidance import guidance_of
from qwenedit.sampling.samplers import name_of, require_sampler
from qwenedit.sampling.scheduler import FlowMatchScheduler, load_scheduler
from qwenedit.sampling.switched import require_controls, require_fitting, schedule
from qwenedit.switches import switches_of
from qwenedit.weights.checkpoints import pieces_of, read_areas, read_variant
from qwenedit.weights.configs import network_config
from qwenedit.weights.lora_files import read_lora

__all__ = ["Model", "pipe_fingerprint", "require_single", "settings_of"]

_PIECE = 2**22  # values of a weight that are hashed at a time


@dataclass(frozen=True, eq=False)
class Model:
    """The parts of a checkpoint, or of a pipeline, that an edit's input must fit."""

    variant: Variant
    areas: Areas
    scheduler: FlowMatchScheduler
    config: MMDiTConfig
    sampler: str  # of edits that name none

    @classmethod
    def of_folder(cls, checkpoint: Path) -> Model:
        """Read without the weights, which may be many gigabytes."""
        variant = read_variant(checkpoint)
        areas, scheduler = read_areas(checkpoint, variant), load_scheduler(checkpoint)
        return cls(variant, areas, scheduler, network_config(checkpoint, "transformer"), scheduler.sampler)

    @classmethod
    def of_pipe(cls, pipe: QwenImageEdit) -> Model:
        own = pipe.scheduler.sampler if pipe.sampler is None else pipe.sampler
        require_sampler(own)
        return cls(pipe.variant, pipe.areas, pipe.scheduler, pipe.mmdit.config, name_of(own))

    def require_fitting(self, spec: Spec) -> None:
        """Check that the model can run every edit of a sweep.

        Raises:
            ValueError: it cannot; the message names the edit, the setting or the LoRA.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the runs themselves warn
            for case in spec.cases:
                for cell in spec.cells:
                    self._require_fitting(case, cell, spec.height, spec.width)
        files = dict.fromkeys(cell.lora_file for cell in spec.cells if cell.lora_file is not None)
        if files:
            with torch.device("meta"):
                transformer = MMDiT(self.config)
            for file in files:
                read_lora(file, transformer)

    def _require_fitting(self, case: Case, cell: Cell, height: int | None, width: int | None) -> None:
        call = Call(
            image=case.image, mask_image=case.mask if cell.masked else None, strength=cell.strength,
            prompt=case.prompt, negative_prompt=cell.negative_prompt, height=height, width=width,
            true_cfg_scale=cell.true_cfg_scale, num_inference_steps=cell.steps, switches=cell.switches,
        )  # fmt: skip
        try:
            self.require_call(call)
        except ValueError as error:
            raise ValueError(f"{shown(case.name)}: {error}") from error

    def require_call(self, call: Call) -> None:
        """Check that the model can run a call of one prompt.

        Raises:
            ValueError: it cannot.
        """
        require_flat(self.variant)
        switches, texts = switches_of(call.switches), (call.prompt, call.negative_prompt)
        (row,) = rows = rows_of(
            *texts, call.image, self.variant, self.areas, call.height, call.width, starts=call.starts
        )
        sources = sources_for(call, rows, self.variant, self.areas)
        guidance_of(call.true_cfg_scale, call.negative_prompt, switches)
        strength = 1.0 if sources is None else sources.strength
        sigmas = schedule(
            self.scheduler, switches.time, call.num_inference_steps, math.prod(row.geometry.grid), None,
            strength, switches.mask.strength,
        )  # fmt: skip
        require_fitting(
            switches, pictures=[len(row.pictures)], blocks=self.config.num_layers, steps=len(sigmas) - 1,
            sources=sources,
        )  # fmt: skip
        require_controls(switches, bool(call.control_image))


def require_single(pipe: QwenImageEdit, what: str) -> None:
    """Raise a ValueError for a pipeline whose runs several processes share: each would write the results."""
    if pipe.processes is not None:
        raise ValueError(
            f"{what} makes edits in one process, but processes share this pipeline's: load it without "
            "parallel, and give each process a shard"
        )


def settings_of(network: nn.Module) -> str:
    """What a network's modules hold beside tensors and modules: its config, scales of LoRAs and the like."""
    public = {
        name: {key: value for key, value in vars(module).items() if not key.startswith("_")}
        for name, module in network.named_modules()
    }
    return re.sub(r" at 0x[0-9a-f]+", "", repr(public))  # addresses differ from process to process


def pipe_fingerprint(pipe: QwenImageEdit) -> str:
    """A hash of what a pipeline computes with: every weight, its LoRAs, configs and settings.

    Weights that are not in memory count by the files that they are read from.
    """
    digest = hashlib.sha256()
    processor = {**vars(pipe.processor), "tokenizer": pipe.processor.tokenizer.to_str()}
    settings = (
        pipe.variant, pipe.areas, pipe.scheduler, pipe.share_prefix, pipe.micro_batch, pipe.loras, processor,
        code_of(pipe.sampler) if callable(pipe.sampler) else pipe.sampler,
    )  # fmt: skip
    digest.update(repr(settings).encode())
    for network in (pipe.vision_language, pipe.vae, pipe.mmdit):
        if network is None:
            digest.update(b"none")
            continue
        digest.update(settings_of(network).encode())
        state = {**dict(network.named_parameters()), **dict(network.named_buffers())}
        for name, x in state.items():
            digest.update(f"{name} {x.dtype} {tuple(x.shape)}".encode())
            for piece in () if x.is_meta else x.detach().flatten().split(_PIECE):
                digest.update(tensor_bytes(piece))
        if any(x.is_meta for x in state.values()):
            for path in files_of(network):
                for part in pieces_of(path):
                    digest.update(part)
    return digest.hexdigest()[:20]
