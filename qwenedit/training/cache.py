"""What the encoders make of the rows, kept on disk: it is encoded once, whatever is trained with it.

A file's name is a hash of all that it depends on: pixels, caption, sizes, the encoders' weights and dtypes.
A folder may therefore be moved, and shared by several runs. Each file is whole or absent, and holds a hash of
its own content.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from qwenedit.call import MAX_TOKENS
from qwenedit.checks import progress_bar
from qwenedit.encoding.conditioning import Conditioning, Prompt
from qwenedit.encoding.encode import Encoder
from qwenedit.files import read_tensors, remove_leftovers, replacing_file, require_folder
from qwenedit.foreign import shown
from qwenedit.inputs.pictures import vae_pixels
from qwenedit.inputs.rows import BatchRow
from qwenedit.latents import normalise, pack
from qwenedit.memory.residency import as_loaded, files_of, present
from qwenedit.networks.vae import VAE
from qwenedit.pipeline import QwenImageEdit
from qwenedit.shards import only_one
from qwenedit.switches import Switches
from qwenedit.taps import require_finite
from qwenedit.training.data import Row, picture_of
from qwenedit.weights.checkpoints import pieces_of

__all__ = ["Cache", "Wanted", "encoders_of", "joined", "weights_of"]

_FORMAT = "qwenedit training 1"  # changes when what is encoded changes


@dataclass(frozen=True, eq=False)
class Wanted:
    """What a row needs: its captions with their negative prompts, and whether its image."""

    row: Row
    prompts: tuple[tuple[str, str | None], ...]
    image: bool = True


@dataclass(frozen=True, eq=False)
class Cache:
    """The files of a folder, for encoders that `encoders_of` identifies."""

    folder: Path
    encoders: str

    def missing(self, wanted: Sequence[Wanted]) -> list[Wanted]:
        """Those of which a file is not there."""
        return [one for one in wanted if not all(path.is_file() for path in self._files(one))]

    def _files(self, wanted: Wanted) -> list[Path]:
        files = [self._conditioning(wanted.row, *prompts) for prompts in wanted.prompts]
        return [*files, *([self._latents(wanted.row)] if wanted.image else [])]

    def require_sound(self, wanted: Sequence[Wanted], *, progress: bool = True) -> None:
        """Read every file once.

        Raises:
            ValueError: a file is not what was written.
        """
        for one in progress_bar(wanted, progress=progress, desc="reading what is encoded", unit="row"):
            for prompts in one.prompts:
                self.conditioning(one.row, *prompts)
            if one.image:
                self.latents(one.row)

    @torch.no_grad()
    def encode(self, pipe: QwenImageEdit, wanted: Sequence[Wanted], *, progress: bool = True) -> None:
        """Encode what is missing.

        Raises:
            ValueError: a pipeline without its text encoder; another process that encodes into the folder.
            NonFiniteError: NaN or infinity, naming the encoder.
        """
        todo = self.missing(wanted)
        if not todo:
            return
        if pipe.vision_language is None:
            raise ValueError("the pipeline has no text encoder, wanted one: not all rows are encoded yet")
        encoder = Encoder(
            variant=pipe.variant, processor=pipe.processor, vision_language=pipe.vision_language,
            vae=pipe.vae, max_tokens=MAX_TOKENS,
        )  # fmt: skip
        require_folder(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        with only_one(self.folder, "encoding") as alone, present(pipe.vision_language, pipe.vae):
            if alone:
                remove_leftovers(self.folder)
            for one in progress_bar(todo, progress=progress, desc="encoding", unit="row"):
                for prompt, negative in one.prompts:
                    self._encode_prompt(encoder, one.row, prompt, negative)
                if one.image:
                    self._encode_image(pipe.vae, one.row)

    def conditioning(self, row: Row, prompt: str, negative: str | None = None) -> Conditioning:
        """The conditioning of one row, with a prompt that need not be its caption.

        Raises:
            ValueError: the file is not there, or not what was written.
        """
        path = self._conditioning(row, prompt, negative)
        conditioning = Conditioning.load(path)
        _require_same(path, conditioning.provenance.get("content"), _tensors(conditioning))
        return conditioning

    def latents(self, row: Row) -> tuple[Tensor, Tensor]:
        """The VAE's posterior of a row's image as mean and deviation, (S, 64) each, normalised and packed.

        Raises:
            ValueError: the file is not there, or not what was written.
        """
        path = self._latents(row)
        tensors, metadata = read_tensors(path, "latents")
        _require_same(path, metadata.get("content"), tensors)
        return tensors["mean"], tensors["std"]

    def _encode_prompt(self, encoder: Encoder, row: Row, prompt: str, negative: str | None) -> None:
        path = self._conditioning(row, prompt, negative)
        if path.is_file():
            return
        pictures = [picture_of(one) for one in row.entry.controls]
        conditioning = encoder(
            [BatchRow(prompt, negative, pictures, row.geometry)], Switches(), guided=negative is not None
        )
        content = {"content": _hash(_tensors(conditioning))}
        provenance = {**conditioning.provenance, **content}
        dataclasses.replace(conditioning, provenance=provenance).save(path)

    def _encode_image(self, vae: VAE, row: Row) -> None:
        path = self._latents(row)
        if path.is_file() or row.entry.image is None:
            return
        like = next(vae.parameters())
        pixels = vae_pixels(picture_of(row.entry.image), *row.geometry.size)
        posterior = vae.encode(pixels[:, :, None].to(like.device, like.dtype))
        mean = normalise(posterior.mode(), vae.config.latents_mean, vae.config.latents_std)
        # The deviation is scaled as the mean is, but not moved.
        std = normalise(torch.exp(0.5 * posterior.logvar), [0.0] * vae.config.z_dim, vae.config.latents_std)
        require_finite(torch.stack([mean, std]), "VAE encoder: the latents of an image")
        tensors = {name: pack(x)[0].cpu().contiguous() for name, x in (("mean", mean), ("std", std))}
        with replacing_file(path) as temporary:
            safetensors.torch.save_file(tensors, temporary, {"content": _hash(tensors)})

    def _conditioning(self, row: Row, prompt: str, negative: str | None) -> Path:
        return self._file("conditioning", [prompt, negative, row.controls, repr(row.geometry)])

    def _latents(self, row: Row) -> Path:
        return self._file("latents", [row.image, row.geometry.size])

    def _file(self, kind: str, content: object) -> Path:
        key = hashlib.sha256(json.dumps([_FORMAT, self.encoders, kind, content]).encode())
        return self.folder / f"{kind}-{key.hexdigest()[:32]}.safetensors"


def encoders_of(pipe: QwenImageEdit) -> str:
    """A hash of what a pipeline encodes with: text encoder, VAE, their dtypes, template and tokens."""
    digest = hashlib.sha256()
    processor = {**vars(pipe.processor), "tokenizer": pipe.processor.tokenizer.to_str()}
    digest.update(repr((pipe.variant, processor, pipe.vae.config)).encode())
    for network in (pipe.vision_language, pipe.vae):
        digest.update(("none" if network is None else weights_of(network)).encode())
    return digest.hexdigest()


def weights_of(network: nn.Module) -> str:
    """A hash of a network's weights: of the files that they were read from, or of all values if they changed.

    Of large files it covers evenly spread pieces. LoRAs beside the weights do not count.
    """
    weights = {
        name.replace(".base.", "."): x for name, x in network.named_parameters() if ".held." not in name
    }
    digest = hashlib.sha256(repr({name: (x.dtype, tuple(x.shape)) for name, x in weights.items()}).encode())
    if as_loaded(network):
        for path in files_of(network):
            for piece in pieces_of(path):
                digest.update(piece)
    else:
        for x in weights.values():
            digest.update(safetensors.torch.save({"x": x.detach().cpu().contiguous()}))
    return digest.hexdigest()[:20]


def joined(parts: Sequence[Conditioning]) -> Conditioning:
    """Conditionings of one row each, of one target grid, as one batch; negative prompts are left out.

    >>> one = Conditioning(
    ...     prompt=Prompt(torch.ones(1, 2, 8)),
    ...     negative=None,
    ...     target_grid=(1, 2, 3),
    ...     reference_latents=((),),
    ...     reference_grids=((),),
    ... )
    >>> longer = dataclasses.replace(one, prompt=Prompt(torch.ones(1, 3, 8)))
    >>> joined([one, longer]).prompt.mask
    tensor([[ True,  True, False],
            [ True,  True,  True]])
    """
    embeds = pad_sequence([part.prompt.embeds[0] for part in parts], batch_first=True)
    lengths = torch.tensor([part.prompt.embeds.shape[1] for part in parts])
    real = torch.arange(embeds.shape[1]) < lengths[:, None]
    return Conditioning(
        prompt=Prompt(embeds, None if bool(real.all()) else real),
        negative=None,
        target_grid=parts[0].target_grid,
        reference_latents=tuple(row for part in parts for row in part.reference_latents),
        reference_grids=tuple(row for part in parts for row in part.reference_grids),
    )


def _tensors(conditioning: Conditioning) -> dict[str, Tensor]:
    """All that is computed from a conditioning, by name."""
    tensors = {"prompt": conditioning.prompt.embeds}
    if conditioning.negative is not None:
        tensors["negative"] = conditioning.negative.embeds
    for k, x in enumerate(conditioning.reference_latents[0]):
        tensors[f"reference {k}"] = x
    grids = [conditioning.target_grid, *conditioning.reference_grids[0]]
    return {**tensors, "grids": torch.tensor(grids)}


def _hash(tensors: dict[str, Tensor]) -> str:
    plain = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
    return hashlib.sha256(safetensors.torch.save(plain)).hexdigest()


def _require_same(path: Path, written: str | None, tensors: dict[str, Tensor]) -> None:
    if _hash(tensors) != written:
        raise ValueError(
            f"{shown(path)} was changed after it was written: remove it, and it is encoded again"
        )
