"""A pipeline whose run is looked at while it goes: pictures of its steps, attention maps, sizes of writes.

What runs is `edit` or `generate` itself. Where nothing else looks at the transformer, a step that has maps is
predicted a second time under taps, and the run goes on with the first prediction: it is the plain run, bit by
bit. Where something does, as an intervention, the taps are on the run's own prediction.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from qwenedit.checks import progress_bar
from qwenedit.encoding.conditioning import Conditioning
from qwenedit.encoding.encode import Encoder
from qwenedit.exploration.plan import MAPS, SHOWN, SIDE, Plan, evenly, plan_of
from qwenedit.exploration.words import Word, words_of
from qwenedit.inputs.pictures import to_pil
from qwenedit.inputs.processor import Processor, ProcessorOutput
from qwenedit.instruments.attention_maps import CHUNK, attention_map, queries_and_keys
from qwenedit.latents import Grid
from qwenedit.pipeline import QwenImageEdit
from qwenedit.sampling.sampler import Predict, Step
from qwenedit.sampling.switched import changed
from qwenedit.system import Run, Start
from qwenedit.taps import Site, current_labels, observed, taps

__all__ = ["WRITES", "Looked", "Shown", "Watched", "pooled_attention", "quantised"]

WRITES = ("img_attn_add", "img_mlp_add", "txt_attn_add", "txt_mlp_add")  # taps whose sizes are shown

Place = tuple[str, int, int]  # branch, step, block


@dataclass(frozen=True, eq=False)
class Shown:
    """A step that is shown: its pictures by name, and the (S,) norm ratios of guidance, or None."""

    index: int
    sigma: float
    pictures: dict[str, Image.Image]
    ratio: Tensor | None


@dataclass(frozen=True, eq=False)
class Looked:
    """All that was seen of a run.

    Attributes:
        facts: the run's settings, by name, as texts.
        grid: of the target's tokens.
        predictions: how many steps there were.
        plan: what is kept of them.
        words: for each branch, the cells of its text.
        references: as the VAE decodes them. All pictures have at most `SIDE` pixels a side, but `result`.
        result: the picture that was made.
        steps: those that are shown.
        writes: for each branch, step and block the root mean square of each of `WRITES`.
        maps: likewise the quantised map: codes (heads, rows, columns) uint8, and tops (heads, rows) float32.
    """

    facts: dict[str, str]
    grid: Grid
    predictions: int
    plan: Plan
    words: dict[str, list[Word]]
    references: list[Image.Image]
    result: Image.Image
    steps: list[Shown]
    writes: dict[Place, dict[str, float]]
    maps: dict[Place, tuple[Tensor, Tensor]]


class Checked(Exception):
    """The arguments of a run are good: raised in place of running it."""


@dataclass(eq=False, repr=False, kw_only=True)
class Watched(QwenImageEdit):
    """A pipeline of the same components, each of whose runs of one picture is looked at.

    Attributes:
        budget: bytes of the attention maps that are kept.
        checking: raise `Checked` where a run would start, once its arguments are checked.
    """

    budget: int = MAPS
    checking: bool = False
    _ids: list[ProcessorOutput] = field(init=False, default_factory=list)
    _kept: list[tuple[int, float, dict[str, Tensor], Tensor | None]] = field(init=False, default_factory=list)
    _writes: dict[Place, dict[str, float]] = field(init=False, default_factory=dict)
    _maps: dict[Place, tuple[Tensor, Tensor]] = field(init=False, default_factory=dict)

    @classmethod
    def of(cls, pipe: QwenImageEdit, **options: Any) -> Watched:
        own = {one.name: getattr(pipe, one.name) for one in dataclasses.fields(QwenImageEdit)}
        return cls(**own, **options)

    def looked(self, facts: dict[str, str], result: Image.Image) -> Looked:
        """What was seen of the run, which is over; the VAE decodes it here, one picture at a time."""
        self.check_finite = False  # an estimate that overflows in the VAE is black on the page
        (references,), (grids,) = self._references.reference_latents, self._references.reference_grids
        decoding = progress_bar(self._kept, progress=self.progress, desc="decoding")
        steps = [
            Shown(
                index, sigma, {name: self._picture(x, self._ran.grid) for name, x in latents.items()}, ratio
            )
            for index, sigma, latents, ratio in decoding
        ]
        return Looked(
            facts, self._ran.grid, self._ran.predictions, self._plan, self._words,
            [self._picture(x[None], grid) for x, grid in zip(references, grids, strict=True)],
            result, steps, self._writes, self._maps,
        )  # fmt: skip

    def _picture(self, latents: Tensor, grid: Grid) -> Image.Image:
        pixels = self.decode(latents.to(self.device, self.dtype), grid)
        (picture,) = to_pil(pixels.nan_to_num(0.0).cpu())
        picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        return picture

    def _encode(self, *args: Any, **options: Any) -> Conditioning:
        if self.checking:
            raise Checked
        return super()._encode(*args, **options)

    def _encoder(self, max_tokens: int) -> Encoder:
        encoder = super()._encoder(max_tokens)
        return dataclasses.replace(encoder, processor=_Noting(self.processor, self._ids))

    def _predictor(self, conditioning: Conditioning, run: Run, start: Start) -> Predict:
        predict = super()._predictor(conditioning, run, start)
        self._ran, self._references = run, changed(conditioning, run.switches.references)
        self._shown = evenly(run.predictions, SHOWN)
        prompts = {"cond": conditioning.prompt}
        if run.guidance is not None and conditioning.negative is not None:
            prompts["uncond"] = conditioning.negative
        self._words = {}
        for (branch, prompt), noted in zip(prompts.items(), self._ids, strict=True):
            ids = noted.input_ids[0, noted.drop_index :].tolist()[: prompt.lengths[0]]
            self._words[branch] = words_of(ids, self.processor)
        config = self.mmdit.config
        self._plan = plan_of(
            [run.grid, *self._references.reference_grids[0]],
            [len(words) for words in self._words.values()],
            steps=self._shown, blocks=config.num_layers, heads=config.num_attention_heads, budget=self.budget,
        )  # fmt: skip

        networks = self._sampling_networks(start)

        def looking(latents: Tensor, sigma: float, **only: bool) -> tuple[Tensor, Tensor | None]:
            if current_labels()["step"] not in self._plan.steps:
                return predict(latents, sigma, **only)
            if any(map(observed, networks)):
                with self._attached():
                    return predict(latents, sigma, **only)
            predicted = predict(latents, sigma, **only)
            with self._attached():
                predict(latents, sigma, **only)
            return predicted

        return looking

    def _sampled(self, predict: Predict, run: Run, start: Start) -> Iterator[Step]:
        for step in super()._sampled(predict, run, start):
            if step.index in self._shown:
                pictures = {"latents": step.latents, "x0": step.x0}
                if step.uncond is not None:
                    pictures["cond"] = step.latents - step.sigma * step.cond
                    pictures["uncond"] = step.latents - step.sigma * step.uncond
                ratio = step.norm_ratio
                self._kept.append(
                    (
                        step.index,
                        step.sigma,
                        {name: x.cpu() for name, x in pictures.items()},
                        None if ratio is None else ratio[0].float().cpu(),
                    )
                )
            yield step

    @contextmanager
    def _attached(self) -> Iterator[None]:
        writes = {f"blocks.*.{name}": self._see_write for name in WRITES}
        with (
            queries_and_keys(self.mmdit, self._see_attention, wanted=self._maps_of, strict=False),
            taps(self.mmdit, writes, strict=False),
        ):
            yield

    def _maps_of(self, site: Site) -> bool:
        return _place(site)[2] in self._plan.blocks

    def _see_write(self, x: Tensor, site: Site) -> None:
        size = x.float().square().mean().sqrt().item()
        self._writes.setdefault(_place(site), {})[site.name] = size

    def _see_attention(self, q: Tensor, k: Tensor, key_mask: Tensor | None, site: Site) -> None:
        place, plan, layout = _place(site), self._plan, site.labels["layout"]
        words = self._words[place[0]]
        cells = plan.places(layout, words).to(q.device)
        if layout.text != words[-1].stop or len(cells) != k.shape[1]:
            return  # tokens that an intervention has added: nobody knows what they are
        pooled = pooled_attention(q, k, cells, *plan.size(len(words)), key_mask, mean_heads=plan.heads == 1)
        self._maps[place] = quantised(pooled)


class _Noting(Processor):
    """The processor, which notes what it makes."""

    def __init__(self, processor: Processor, noted: list[ProcessorOutput]) -> None:
        vars(self).update(vars(processor))
        self.noted = noted

    def __call__(self, *args: Any, **options: Any) -> ProcessorOutput:
        made = super().__call__(*args, **options)
        self.noted.append(made)
        return made


def _place(site: Site) -> Place:
    number = re.match(r"blocks\.(\d+)\.", site.full)
    assert number is not None
    return site.labels["branch"], site.labels["step"], int(number[1])


def pooled_attention(
    q: Tensor,
    k: Tensor,
    cells: Tensor,
    rows: int,
    columns: int,
    key_mask: Tensor | None = None,
    *,
    mean_heads: bool = False,
) -> Tensor:
    """The attention of one picture's run between cells of tokens: from each of the first `rows` cells, the
    mean over its tokens, to each of `columns` cells, the sum over its tokens.

    Shapes: `q`, `k` (1, J, H, K) as for `attention_map`; `cells` (J,) int64, the number of each token's cell.
        Returns (H, rows, columns) in at least float32; under `mean_heads` H is 1.
    Not more than `CHUNK` probabilities exist at once. Without tokens a cell gets zeros.
    """
    heads = q.shape[2]
    wide = torch.promote_types(q.dtype, torch.float32)
    total = q.new_zeros((1 if mean_heads else heads, rows, columns), dtype=wide)
    at_once = max(1, CHUNK // (heads * k.shape[1]))
    asked = (cells < rows).nonzero()[:, 0]
    for tokens in asked.split(at_once):
        mask = key_mask if key_mask is None or key_mask.shape[2] == 1 else key_mask[:, :, tokens]
        probs = attention_map(q[:, tokens], k, key_mask=mask, mean_heads=mean_heads)
        summed = probs.new_zeros((*probs.shape[:-1], columns)).index_add_(-1, cells, probs)
        total.index_add_(-2, cells[tokens], summed.view(-1, len(tokens), columns))
    counts = torch.bincount(cells, minlength=columns)[:rows].clamp(min=1)
    return total / counts[:, None]


def quantised(x: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers of at least 0 in 8 bits: codes (..., C) uint8, and tops (...,) float32, each row's largest.

    A number is top * (code / 255)^2. Roots are rounded, so that small numbers keep some of their precision:
    with s = sqrt(x / top) the error is at most top * (s / 255 + 1 / 510^2).

    >>> codes, tops = quantised(torch.tensor([[0.0, 0.01, 1.0]]))
    >>> codes.tolist(), tops.tolist()
    ([[0, 26, 255]], [1.0])
    """
    tops = x.amax(dim=-1)
    shares = x / tops.clamp(min=torch.finfo(x.dtype).tiny)[..., None]
    return (shares.sqrt() * 255).round().to(torch.uint8).cpu(), tops.float().cpu()
