"""The text encoder's input: token ids and picture patches.

Sources: diffusers 0.39.0, pipelines/qwenimage/pipeline_qwenimage{,_edit,_edit_plus}.py, image_processor.py;
transformers 4.57.6, models/qwen2_vl/{processing,image_processing}_qwen2_vl.py (the slow processor, with PIL;
the fast one's pixels differ by up to 2 of 255 levels). Ids and pixels are bitwise equal to theirs, but every
picture is converted to RGB first, and pictures of 1 or 3 pixels in height are accepted (the reference takes
their rows for channels).

Pictures are turned upright and brought to 8 bits (`as_picture`), which the reference leaves to its callers.
Alpha is dropped, not composited.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import torch
from einops import repeat
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor

from qwenedit.checks import real_number, whole_number
from qwenedit.family import EDIT, EDIT_PLUS, IMAGE_PAD, TEXT_TO_IMAGE, Template
from qwenedit.foreign import read_json, shown
from qwenedit.inputs.geometry import smart_resize
from qwenedit.inputs.pictures import as_picture, byte_tensor
from qwenedit.inputs.tokenizer import has_tokenizer, load_tokenizer, token_ids
from qwenedit.latents import Grid

__all__ = [
    "QWEN2_5_VL", "ImageProcessorConfig", "Processor", "ProcessorOutput", "check_prompt", "picture_patches",
]  # fmt: skip

_PAD, _VIDEO = "<|endoftext|>", "<|video_pad|>"
_NEEDED = (_PAD, "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", IMAGE_PAD, _VIDEO)


@dataclass(frozen=True, kw_only=True)
class ImageProcessorConfig:
    """The processor's preprocessor_config.json: how a picture becomes patches for the vision tower.

    Raises:
        ValueError: values without meaning.
    """

    min_pixels: int
    max_pixels: int
    patch_size: int
    merge_size: int
    temporal_patch_size: int
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]
    rescale_factor: float

    # Other keys that the file may have: with the only supported value, and without effect.
    FIXED: ClassVar[dict[str, Any]] = {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "resample": 3,  # bicubic
    }
    IGNORED: ClassVar[frozenset[str]] = frozenset(
        {"auto_map", "data_format", "default_to_square", "feature_extractor_type", "image_processor_type"}
        | {"processor_class", "size"}
    )

    def __post_init__(self) -> None:
        for name, most in (("patch_size", 1000), ("merge_size", 100), ("temporal_patch_size", 100)):
            whole_number(name, getattr(self, name), most=most)
        whole_number("min_pixels", self.min_pixels, most=10**12)
        whole_number("max_pixels", self.max_pixels, least=self.min_pixels, most=10**12)
        for name in ("image_mean", "image_std"):
            for value in getattr(self, name):
                real_number(name, value)
        real_number("rescale_factor", self.rescale_factor)
        if len(self.image_mean) != 3 or len(self.image_std) != 3 or not all(self.image_std):
            raise ValueError(
                f"image_mean is {self.image_mean} and image_std {self.image_std}, wanted three numbers each, "
                "no deviation of 0"
            )

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> ImageProcessorConfig:
        """From the content of the file.

        The limits may also be given as `size: {shortest_edge, longest_edge}`, both in pixels of area. (The
        reference ignores that form and takes its class defaults, which would shrink Edit's pictures.) Where
        both are given, min_pixels and max_pixels count, as in the reference.

        Raises:
            ValueError: a key is missing or unknown, or has a value that is not supported.
        """
        values = {key: value for key, value in raw.items() if value is not None}
        if isinstance(size := values.get("size"), dict):
            for name, edge in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
                if edge in size:
                    values.setdefault(name, size[edge])
        for key, wanted in cls.FIXED.items():
            if values.get(key, wanted) != wanted:
                raise ValueError(
                    f"{key} is {shown(repr(values[key]))}, wanted {wanted!r}: nothing else is supported"
                )
        names = [field.name for field in fields(cls)]
        if missing := [name for name in names if name not in values]:
            raise ValueError(f"preprocessor_config.json lacks {', '.join(missing)}")
        known = {*names, *cls.FIXED, *cls.IGNORED}
        if unknown := [
            key for key, value in values.items() if value and key not in known and not key.startswith("_")
        ]:
            raise ValueError(f"preprocessor_config.json has unknown keys: {shown(', '.join(unknown))}")
        for name in ("image_mean", "image_std"):
            if not isinstance(values[name], list):
                raise ValueError(f"{name} is {shown(repr(values[name]))}, wanted three numbers")
            values[name] = tuple(values[name])
        return cls(**{name: values[name] for name in names})


# The config of the whole family; text-to-image checkpoints have no processor/.
QWEN2_5_VL = ImageProcessorConfig(
    min_pixels=56 * 56,
    max_pixels=128 * 128 * 28 * 28,  # the reference's class default, 28 * 28 * 1280, shrinks Edit's pictures
    patch_size=14,
    merge_size=2,
    temporal_patch_size=2,
    image_mean=(0.48145466, 0.4578275, 0.40821073),
    image_std=(0.26862954, 0.26130258, 0.27577711),
    rescale_factor=1 / 255,
)


@dataclass(frozen=True, eq=False)
class ProcessorOutput:
    """The text encoder's input, and the number of tokens to drop from the start of each row of its output.

    Shapes: `input_ids`, `attention_mask` (B, T) long, padded on the right; `pixel_values` (N, C * frames * P
        * P) float32, the patches of all pictures, those of row 0 first; `image_grid_thw` one grid of patches
        a picture, in the same order. Both are None without pictures.
    """

    input_ids: Tensor
    attention_mask: Tensor
    pixel_values: Tensor | None
    image_grid_thw: list[Grid] | None
    drop_index: int


class Processor:
    """Prompts and pictures -> token ids and patches.

    Args:
        tokenizer: this family's (see `load_tokenizer`).
        config: how pictures become patches.

    Raises:
        ValueError: the tokenizer lacks a special token, or is another family's: a template's prefix does not
            have the official number of tokens.
    """

    def __init__(self, tokenizer: Tokenizer, config: ImageProcessorConfig = QWEN2_5_VL) -> None:
        if missing := [token for token in _NEEDED if tokenizer.token_to_id(token) is None]:
            raise ValueError(f"the tokenizer lacks {', '.join(missing)}: it is not this model family's")
        self.tokenizer = tokenizer
        self.config = config
        self.pad_token_id: int = tokenizer.token_to_id(_PAD)
        self.image_token_id: int = tokenizer.token_to_id(IMAGE_PAD)
        for template in (TEXT_TO_IMAGE, EDIT, EDIT_PLUS):
            self.drop_index(template)

    @classmethod
    def from_folder(cls, folder: str | os.PathLike[str]) -> Processor:
        """From a checkpoint's root, which holds tokenizer/ and, in editing variants, processor/.

        The tokenizer is tokenizer/'s, or processor/'s if tokenizer/ has none.

        Raises:
            ValueError: files are missing, broken, or not of this family.
        """
        holders = [Path(folder, "tokenizer"), Path(folder, "processor")]
        holder = next((one for one in holders if has_tokenizer(one)), holders[0])
        config = QWEN2_5_VL
        if holders[1].is_dir():
            config = ImageProcessorConfig.from_json(read_json(holders[1] / "preprocessor_config.json"))
        tokenizer = load_tokenizer(holder)
        try:
            return cls(tokenizer, config)
        except ValueError as error:
            raise ValueError(f"{holder}: {error}") from error

    def drop_index(self, template: Template) -> int:
        """The number of tokens of the template's prefix, compared with the official number.

        Raises:
            ValueError: the numbers differ.
        """
        got = len(token_ids(self.tokenizer, template.prefix))
        if got != template.drop_index:
            raise ValueError(
                f"the template's prefix has {got} tokens, wanted {template.drop_index}: the tokenizer is not "
                "this model family's"
            )
        return got

    def __call__(
        self,
        prompts: Sequence[str],
        pictures: Sequence[Sequence[Image.Image]] | None,
        template: Template,
    ) -> ProcessorOutput:
        """Tokens and patches of a batch.

        Args:
            prompts: any text. The spelling of a special token becomes that token, as in the reference; only
                <|image_pad|> and <|video_pad|> are refused beside pictures (the reference takes them, and
                <|placeholder|>, which is plain text here, for pictures).
            pictures: those of each prompt, at the size planned for the language model (`resize_rgb`).
            template: of all prompts. Text-to-image cuts prompts to 1024 tokens here; the pipeline then cuts
                their embeddings (max_sequence_length).

        Raises:
            ValueError: no prompts, a prompt that is no text, a picture that is no PIL picture, or more or
                fewer pictures than the template takes.
        Source: `_get_qwen_prompt_embeds` of the pipelines with `Qwen2VLProcessor.__call__`. A prompt that
            starts with a line break may share a token with the end of the prefix and lose it, as there.
        """
        rows = _paired(prompts, pictures)
        drop_index = self.drop_index(template)
        patches: list[Tensor] = []
        grids: list[Grid] = []
        ids: list[list[int]] = []
        for prompt, of_prompt in rows:
            made = [picture_patches(picture, self.config) for picture in of_prompt]
            patches += [values for values, _ in made]
            grids += [grid for _, grid in made]
            pads = [height * width // self.config.merge_size**2 for _, (_, height, width) in made]
            ids.append(self._ids(template.render(prompt, pads), template))

        length = max(map(len, ids))
        return ProcessorOutput(
            input_ids=torch.tensor([row + [self.pad_token_id] * (length - len(row)) for row in ids]),
            attention_mask=torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in ids]),
            pixel_values=torch.cat(patches) if patches else None,
            image_grid_thw=grids or None,
            drop_index=drop_index,
        )

    def _ids(self, text: str, template: Template) -> list[int]:
        ids = token_ids(self.tokenizer, text)
        return ids if template.max_tokens is None else ids[: template.drop_index + template.max_tokens]


def check_prompt(prompt: object, *, illustrated: bool) -> None:
    """Check a prompt; `illustrated` if it comes with pictures.

    Raises:
        ValueError: no text, not valid Unicode, or a picture's placeholder beside pictures.
    """
    if not isinstance(prompt, str):
        raise ValueError(f"a prompt is {type(prompt).__name__}, wanted a string")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"a prompt is not valid Unicode: {error}") from error
    if illustrated and (IMAGE_PAD in prompt or _VIDEO in prompt):
        raise ValueError(f"a prompt contains {IMAGE_PAD} or {_VIDEO}, wanted neither beside pictures")


def picture_patches(picture: Image.Image, config: ImageProcessorConfig) -> tuple[Tensor, Grid]:
    """A picture of any size, in any mode of 8 bits, as the vision tower's patches, with their grid.

    Shapes: (rows * columns, C * frames * P * P) float32 and (1, rows, columns). Patches are in merging order:
        the merge_size squared patches of one token of the language model are neighbours.
    Units: normalised by the config's mean and deviation.
    Raises: ValueError for a ratio of sides over 200.
    Source: `Qwen2VLImageProcessor._preprocess`: scaled in float64, normalised in float32, a still picture
        repeated to `temporal_patch_size` frames.
    """
    rgb = picture.convert("RGB")
    patch, merge = config.patch_size, config.merge_size
    height, width = smart_resize(rgb.height, rgb.width, patch * merge, config.min_pixels, config.max_pixels)
    pixels = byte_tensor(rgb.resize((width, height), Image.Resampling.BICUBIC))
    x = (pixels.double() * config.rescale_factor).float()
    x = (x - x.new_tensor(config.image_mean)) / x.new_tensor(config.image_std)
    patches = repeat(
        x,
        "(rows i p) (columns j q) c -> (rows columns i j) (c frames p q)",
        i=merge, j=merge, p=patch, q=patch, frames=config.temporal_patch_size,
    )  # fmt: skip
    return patches, (1, height // patch, width // patch)


def _paired(
    prompts: Sequence[str], pictures: Sequence[Sequence[Image.Image]] | None
) -> list[tuple[str, list[Image.Image]]]:
    if isinstance(prompts, str) or not prompts:
        raise ValueError(f"prompts are {prompts!r}, wanted a list of at least one text")
    if pictures is None:
        pictures = [[]] * len(prompts)
    for prompt in prompts:
        check_prompt(prompt, illustrated=any(pictures))
    if len(pictures) != len(prompts):
        raise ValueError(f"got pictures for {len(pictures)} prompts, wanted {len(prompts)}, a list for each")
    checked = []
    for row, of_prompt in enumerate(pictures):
        if not isinstance(of_prompt, Sequence):
            raise ValueError(
                f"prompt {row} has a {type(of_prompt).__name__} for pictures, wanted a list of PIL pictures"
            )
        checked.append([as_picture(one, f"pictures[{row}][{k}]") for k, one in enumerate(of_prompt)])
    return list(zip(prompts, checked, strict=True))
