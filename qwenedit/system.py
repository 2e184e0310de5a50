"""The components of a checkpoint as one object, and the parts that all kinds of run share."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Generator, Tensor, nn

from qwenedit.call import Call
from qwenedit.checks import progress_bar, warn_of_float16, whole_number
from qwenedit.encoding.conditioning import Conditioning
from qwenedit.encoding.encode import Encoder
from qwenedit.encoding.sources import source_latents, with_source
from qwenedit.family import Variant
from qwenedit.inputs.controls import AnyControlNet, ControlInput, controls_of
from qwenedit.inputs.geometry import Areas
from qwenedit.inputs.masks import Sources, laid_back
from qwenedit.inputs.pictures import denormalise_pixels, output_text, pictures_in, side_by_side, to_pil
from qwenedit.inputs.processor import Processor
from qwenedit.inputs.rows import BatchRow
from qwenedit.latents import Grid, denormalise, generators_of, initial_noise, unpack
from qwenedit.memory.residency import home, move, present, while_present
from qwenedit.networks.mmdit import MMDiT
from qwenedit.networks.vae import VAE
from qwenedit.networks.vision_language import VisionLanguage
from qwenedit.parallel.processes import Processes
from qwenedit.parallel.runs import agree, shared
from qwenedit.sampling.controls import RunControl, drawn
from qwenedit.sampling.guidance import TrueCFG
from qwenedit.sampling.preserve import noised, preserving
from qwenedit.sampling.sampler import Predict, Preserve, Step, checked
from qwenedit.sampling.samplers import Sampler, count_predictions, require_sampler, sampler_of
from qwenedit.sampling.scheduler import FlowMatchScheduler
from qwenedit.sampling.switched import (
    require_controls,
    require_fitting,
    require_pictures,
    schedule,
    switched_predictor,
)
from qwenedit.switches import Switches, VAEPath
from qwenedit.taps import require_finite

__all__ = ["Result", "Run", "Start", "System", "as_array"]

Own = TypeVar("Own", bound="System")
Images = TypeVar("Images")


@dataclass(frozen=True, eq=False, repr=False)
class Result(Generic[Images]):
    """A run's output, in the form of its `output_type`.

    "pil" is a list of PIL pictures, "pt" (B, 3, H, W) pixels in [0, 1], "np" an array (B, H, W, 3) of them,
    "latent" packed latents (B, S, 64). `decompose` describes its own forms of these. Notebooks show pictures.
    """

    images: Images

    def __repr__(self) -> str:
        return f"Result of {output_text(self.images)}"

    def _repr_png_(self) -> bytes | None:
        """All pictures beside each other, for notebooks; nothing for latents."""
        return side_by_side(pictures_in(self.images))


@dataclass(frozen=True, eq=False, kw_only=True)
class Run:
    """A sampling run whose arguments are checked; nothing is drawn or computed yet.

    Attributes:
        grid: (frames, rows, columns) of the target's tokens.
        batch: number of rows.
        sigmas: those that the sampler visits, noise first, with the final 0.
        generator: one for the batch, or a list with one for each row.
        latents: given noise (B, S, C), or None.
        sampler: the name of the way from noise to latents, or a function (`qwenedit.sampling.samplers`).
        guidance: how the two predictions of a step become one; None for an unguided run.
        switches: changes to the system.
        sources: pictures to start from, with their masks; None for noise alone.
        controls: control pictures, each with the ControlNet that reads it.
    """

    grid: Grid
    batch: int
    sigmas: list[float]
    generator: Generator | Sequence[Generator] | None
    latents: Tensor | None
    sampler: str | Sampler
    guidance: TrueCFG | None
    switches: Switches
    sources: Sources | None = None
    controls: tuple[ControlInput, ...] = ()

    @property
    def predictions(self) -> int:
        """How many steps the sampler takes, with one prediction each."""
        return count_predictions(self.sampler, self.sigmas)


@dataclass(frozen=True, eq=False, kw_only=True)
class Start:
    """What a run starts from.

    Attributes:
        latents: (B, S, C) at the run's first sigma.
        preserve: what keeps a part of a picture in every step, or None.
        source: (B, S, C) clean latents of the pictures to start from, or None.
        controls: the control pictures' latents, each with its ControlNet.
    """

    latents: Tensor
    preserve: Preserve | None = None
    source: Tensor | None = None
    controls: tuple[RunControl, ...] = ()


@dataclass(eq=False, repr=False, kw_only=True)
class System:
    """A checkpoint's components as plain attributes; each works without the others.

    Attributes:
        vision_language: prompt and pictures to embeddings; None if it was left out on loading.
        vae: pixels to raw latents and back.
        mmdit: noisy latents to velocity.
        scheduler: number of steps to sigmas.
        processor: prompts and pictures to token ids and patches.
        variant: the member of the family, from its model_index.json.
        areas: the areas in pixels that pictures are resized to.
        progress: show progress bars, on a terminal.
        share_prefix: run the text encoder once over the common prefix of a prompt and its negative prompt,
            pictures included: about half the time, and the last bits differ. False, as in the reference.
        micro_batch: the most rows of a batch that run through a network at a time; None for all. At 1 and
            with one generator per row, each row equals its single run bit by bit; but rows that start from
            one picture share a sample of it.
        controlnets: the nets that read a run's control pictures, one for each picture; a single one reads
            all of them.
        sampler: that of runs which name none; None for the checkpoint's, "euler" in all that are released.
        check_finite: check the predictions of every step, the final latents and the decoded picture for NaN
            and infinity. On an accelerator each check waits for it, one a step; with False no step waits.
        folder: the checkpoint that `load` read, whose tokenizer and configs `save_pretrained` copies.
        processes: those that share each run (`load(parallel=...)`); None for this one alone.
    """

    vision_language: VisionLanguage | None
    vae: VAE
    mmdit: MMDiT
    scheduler: FlowMatchScheduler
    processor: Processor
    variant: Variant
    areas: Areas
    progress: bool = True
    share_prefix: bool = False
    micro_batch: int | None = None
    controlnets: list[AnyControlNet] = field(default_factory=list)
    sampler: str | Sampler | None = None
    check_finite: bool = True
    folder: Path | None = None
    processes: Processes | None = None

    def __repr__(self) -> str:
        """The kind of system, and a line for each network: its weights, and how many blocks it has."""
        lines = [f"{type(self).__name__}: {self.variant.name}, {self.dtype}, on {self.device}"]
        named = {"text encoder": self.vision_language, "transformer": self.mmdit, "VAE": self.vae}
        for name, network in (*named.items(), *(("ControlNet", one) for one in self.controlnets)):
            count = 0 if network is None else sum(x.numel() for x in network.parameters())
            blocks = getattr(getattr(network, "language", network), "blocks", ())
            text = f"{count / 1e6:,.1f} million weights" + (f" in {len(blocks)} blocks" if blocks else "")
            lines.append(f"  {name}: {'none' if network is None else text}")
        return "\n".join(lines)

    @property
    def device(self) -> torch.device:
        return home(self.mmdit)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.mmdit.parameters()).dtype

    def to(self: Own, *args: Any, **kwargs: Any) -> Own:
        """Move the networks, with the arguments of `torch.nn.Module.to`."""
        networks = (self.vision_language, self.vae, self.mmdit, *self.controlnets)
        move([network for network in networks if network is not None], *args, **kwargs)
        warn_of_float16(self.dtype)
        return self

    @torch.no_grad()
    def decode(self, latents: Tensor, grid: Grid) -> Tensor:
        """Packed normalised latents (B, S, 64) of a token grid -> pixels (B, 3, H, W) in [0, 1]."""
        if grid[0] != 1:
            raise ValueError(f"the grid {grid} has {grid[0]} frames, wanted 1: decode_layers takes several")
        raw = unpack(latents, grid).to(next(self.vae.parameters()).dtype)
        config = self.vae.config
        at_once = int(self.micro_batch or len(raw))
        parts = denormalise(raw, config.latents_mean, config.latents_std).split(at_once)
        with present(self.vae):
            pixels = torch.cat([self.vae.decode(part)[:, :, 0] for part in parts])
        if self.check_finite:
            require_finite(pixels, "VAE decoder: the picture")
        return denormalise_pixels(pixels)

    def prepare(
        self,
        grid: Grid,
        pictures: list[int],
        call: Call,
        switches: Switches,
        guidance: TrueCFG | None,
        sources: Sources | None = None,
    ) -> Run:
        """The checked run of a call for a batch whose rows have so many `pictures`.

        It is cheap and comes before any network, so that bad input is found early.

        Raises:
            ValueError: bad input, or switches that cannot act on this run.
        """
        frames, rows, columns = grid
        batch, tokens = len(pictures), rows * columns
        if self.micro_batch is not None:
            self.micro_batch = whole_number("micro_batch", self.micro_batch)
        require_pictures(switches, any(pictures))
        named = (call.sampler, self.sampler, self.scheduler.sampler)
        sampler = next(one for one in named if one is not None)
        strength = 1.0 if sources is None else sources.strength
        visited = schedule(
            self.scheduler, switches.time, call.num_inference_steps, tokens, call.sigmas,
            strength, switches.mask.strength,
        )  # fmt: skip
        require_sampler(sampler, len(visited) - 1)
        config = self.mmdit.config
        require_fitting(
            switches, pictures=pictures, blocks=config.num_layers, steps=len(visited) - 1, sources=sources
        )
        generators_of(call.generator, batch, self.device)
        latents, wanted = call.latents, (batch, frames * tokens, config.in_channels)
        is_tensor = isinstance(latents, Tensor)
        if latents is not None and (not is_tensor or tuple(latents.shape) != wanted):
            got = f"shape {tuple(latents.shape)}" if is_tensor else type(latents).__name__
            raise ValueError(f"latents are {got}, wanted a tensor of shape {wanted}")
        controls = controls_of(
            self.controlnets, call.control_image, call.control_mask, call.controlnet_conditioning_scale,
            call.control_guidance_start, call.control_guidance_end, config=config, batch=batch,
            prompts=batch // int(call.num_images_per_prompt), steps=len(visited) - 1,
            size=(columns * self.areas.token, rows * self.areas.token),
        )  # fmt: skip
        require_controls(switches, bool(controls))
        for k, control in enumerate(controls):
            if (own := next(control.net.parameters()).dtype) != self.dtype:
                raise ValueError(f"the net of control {k} is {own}, wanted {self.dtype}, as the transformer")
        run = Run(
            grid=grid, batch=batch, sigmas=visited, generator=call.generator, latents=latents,
            sampler=sampler, guidance=guidance, switches=switches, sources=sources, controls=controls,
        )  # fmt: skip
        nets = (control.net for control in controls)
        agree(self.processes, call, run, [self.mmdit, *nets], self.micro_batch)
        return run

    def begin(self, run: Run) -> Start:
        """What the run starts from. The order of draws from its generator is the reference's."""
        controls = drawn(run.controls, self.vae, run.generator, self.device, self.dtype)
        source, how = None, run.switches.mask
        if run.sources is not None:
            source = source_latents(run.sources, self.vae, run.generator, run.batch, posterior=how.posterior)
            source = source.to(self.device, self.dtype)
        if run.latents is not None:
            noise = run.latents.to(self.device, self.dtype)
        else:
            noise = initial_noise(
                run.batch, self.mmdit.config.out_channels, run.grid, generator=run.generator,
                device=self.device, dtype=self.dtype,
            )  # fmt: skip
        if run.sources is None or source is None:
            return Start(latents=noise, controls=controls)
        preserve = preserving(run.sources, source, noise, run.sigmas, how, self.vae, run.generator)
        latents = noised(source, noise, run.sigmas[0])
        return Start(latents=latents, preserve=preserve, source=source, controls=controls)

    def _encode(
        self, rows: list[BatchRow], switches: Switches, *, guided: bool, max_tokens: int, frames: int = 1
    ) -> Conditioning:
        encoder = self._encoder(switches.prompt.max_tokens or max_tokens)
        return encoder(rows, switches, guided=guided, frames=frames).to(self.device, self.dtype)

    def _encoder(self, max_tokens: int) -> Encoder:
        if self.vision_language is None:
            raise ValueError("this pipeline was loaded without its text encoder: it can only sample")
        return Encoder(
            variant=self.variant,
            processor=self.processor,
            vision_language=self.vision_language,
            vae=self.vae,
            max_tokens=max_tokens,
            share_prefix=self.share_prefix,
            micro_batch=self.micro_batch,
        )

    def _steps(self, conditioning: Conditioning, run: Run) -> Iterator[Step]:
        """The steps of the run under a conditioning."""
        start = self.begin(run)
        predict = self._predictor(self._started(conditioning, run, start), run, start)
        return while_present(self._sampling_networks(start), self._sampled(predict, run, start))

    def _started(self, conditioning: Conditioning, run: Run, start: Start) -> Conditioning:
        """The conditioning of a run that starts so; switches for the references' own encoding come first."""
        other = run.switches.references.latents == "other" or run.switches.vae != VAEPath()
        return conditioning if start.source is None or other else with_source(conditioning, start.source)

    def _sampling_networks(self, start: Start) -> list[nn.Module]:
        return [self.mmdit, *dict.fromkeys(control.net for control in start.controls)]

    def _predictor(self, conditioning: Conditioning, run: Run, start: Start) -> Predict:
        conditioning, branches = shared(self.processes, conditioning.to(self.device, self.dtype))
        return switched_predictor(
            self.mmdit, conditioning, run.switches, guided=run.guidance is not None,
            micro_batch=self.micro_batch, sigmas=run.sigmas[:-1], controls=start.controls, branches=branches,
        )  # fmt: skip

    def _sampled(self, predict: Predict, run: Run, start: Start) -> Iterator[Step]:
        sampler = sampler_of(run.sampler, run.generator)
        steps = sampler(predict, start.latents, run.sigmas, run.guidance, start.preserve)
        return checked(steps) if self.check_finite else steps

    def _finish(self, steps: Iterator[Step], run: Run, output_type: str) -> Result[Any]:
        """Take all steps, under a progress bar, and make the result."""
        bar = progress_bar(steps, progress=self.progress, total=run.predictions, desc="sampling")
        (last,) = deque(bar, maxlen=1)
        if self.check_finite:
            require_finite(last.after, "sampler: the final latents")
        if output_type == "latent":
            return Result(last.after)
        images = self._images(last.after, run.grid, output_type)
        if run.sources is not None and output_type == "pil":
            images = laid_back(run.sources, images)
        return Result(images)

    def _images(self, latents: Tensor, grid: Grid, output_type: str) -> Any:
        """Decoded latents, as "pil", "pt" or "np"."""
        pixels = self.decode(latents, grid)
        return to_pil(pixels) if output_type == "pil" else as_array(pixels, output_type)


def as_array(pixels: Tensor, output_type: str) -> Any:
    """Pixels (..., C, H, W) as they are for "pt", and for "np" as an array (..., H, W, C) of float32.

    Source: `VaeImageProcessor.pt_to_numpy`.
    """
    return pixels.movedim(-3, -1).float().cpu().numpy() if output_type == "np" else pixels
