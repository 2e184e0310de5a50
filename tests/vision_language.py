"""Random configs, models and batches of Qwen2.5-VL, for its parity and property tests."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from qwenedit.networks.vision_language import TextConfig, VisionLanguage, VisionLanguageConfig
from qwenedit.networks.vision_tower import Grid, VisionConfig
from tests.support import randomise_

VOCAB = 24
PAD, VISION_START, VISION_END, IMAGE = VOCAB - 1, VOCAB - 2, VOCAB - 3, VOCAB - 4


@st.composite
def configs(draw) -> VisionLanguageConfig:
    groups, pairs = draw(st.integers(1, 2)), draw(st.integers(3, 6))
    heads = groups * draw(st.integers(1, 3))
    first, second = draw(st.integers(1, pairs - 2)), 1
    merge, patch = draw(st.integers(1, 3)), draw(st.integers(2, 5))
    depth = draw(st.integers(1, 3))
    text = TextConfig(
        vocab_size=VOCAB,
        hidden_size=2 * pairs * heads,
        intermediate_size=draw(st.integers(5, 40)),
        num_hidden_layers=draw(st.integers(1, 3)),
        num_attention_heads=heads,
        num_key_value_heads=groups,
        rms_norm_eps=1e-6,
        rope_theta=draw(st.sampled_from([10000.0, 1000000.0])),
        mrope_section=(first, second, pairs - first - second),
    )
    vision_heads = draw(st.integers(1, 3))
    vision = VisionConfig(
        depth=depth,
        hidden_size=4 * draw(st.integers(1, 3)) * vision_heads,
        intermediate_size=draw(st.integers(5, 30)),
        num_heads=vision_heads,
        patch_size=patch,
        temporal_patch_size=draw(st.integers(1, 2)),
        spatial_merge_size=merge,
        window_size=patch * merge * draw(st.integers(1, 4)),
        fullatt_block_indexes=tuple(sorted(draw(st.sets(st.integers(0, depth - 1))))),
        out_hidden_size=text.hidden_size,
    )
    return VisionLanguageConfig(vision_config=vision, text_config=text, image_token_id=IMAGE)


@dataclass(frozen=True)
class Batch:
    """What the network takes; `rows` are the unpadded ids, and `counts` the number of pictures in each."""

    input_ids: Tensor
    attention_mask: Tensor | None
    pixel_values: Tensor | None
    image_grid_thw: list[Grid]
    rows: list[list[int]]
    counts: list[int]

    def to(self, dtype: torch.dtype) -> Batch:
        pixels = None if self.pixel_values is None else self.pixel_values.to(dtype)
        return dataclasses.replace(self, pixel_values=pixels)

    def single(self, row: int) -> Batch:
        """One row alone, without its padding."""
        first = sum(self.counts[:row])
        grids = self.image_grid_thw[first : first + self.counts[row]]
        pixels = None
        if grids:
            sizes = [rows * columns for _, rows, columns in self.image_grid_thw]
            assert self.pixel_values is not None
            pixels = torch.cat(self.pixel_values.split(sizes)[first : first + len(grids)])
        ids = torch.tensor([self.rows[row]])
        return Batch(ids, None, pixels, grids, [self.rows[row]], [len(grids)])


# Of each row: the tokens of text before each picture, that picture's size in tokens, and the text at the end.
layouts = st.lists(
    st.tuples(
        st.lists(st.tuples(st.integers(0, 4), st.integers(1, 6), st.integers(1, 6)), max_size=3),
        st.integers(1, 5),
    ),
    min_size=1,
    max_size=3,
)


def batch_of(config: VisionLanguageConfig, layout, seed: int, padding_side: str = "right") -> Batch:
    """A batch with random text and pictures in the places that the layout says."""
    generator = torch.Generator().manual_seed(seed)
    merge = config.vision_config.spatial_merge_size
    rows: list[list[int]] = []
    grids: list[Grid] = []

    def text(length: int) -> list[int]:
        return torch.randint(0, IMAGE, (length,), generator=generator).tolist()

    for pictures, tail in layout:
        row: list[int] = []
        for before, height, width in pictures:
            row += [*text(before), VISION_START, *[IMAGE] * (height * width), VISION_END]
            grids.append((1, height * merge, width * merge))
        rows.append(row + text(tail))
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), PAD)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        place = slice(0, len(row)) if padding_side == "right" else slice(longest - len(row), longest)
        ids[i, place], mask[i, place] = torch.tensor(row), 1
    vision = config.vision_config
    size = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    patches = sum(height * width for _, height, width in grids)
    pixels = torch.randn(patches, size, generator=generator) if grids else None
    return Batch(ids, mask, pixels, grids, rows, [len(pictures) for pictures, _ in layout])


def network(config: VisionLanguageConfig, seed: int = 0) -> VisionLanguage:
    module = VisionLanguage(config).eval().requires_grad_(False)
    randomise_(module, seed)
    return module


def encode(module: VisionLanguage, batch: Batch) -> Tensor:
    return module(batch.input_ids, batch.attention_mask, batch.pixel_values, batch.image_grid_thw)
