"""What the encoders made of pictures and prompts, kept for the next run that asks for the same.

    pipe.conditioning_cache = ConditioningCache()
    for seed in range(100):                     # the text encoder and the VAE's encoder run once
        pipe.edit(picture, "make the circle red", generator=torch.Generator().manual_seed(seed))

Entries are found by content, never by name: by the pixels, the prompts, every setting of encoding, and by the
state of both networks, which is another one when a weight has changed. The encoders run as ever whenever
somebody could tell the difference (taps, hooks, gradients, ...), or where it cannot be told whether something
has changed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import weakref
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules.module import _has_any_global_hook
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from qwenedit.checks import check_count
from qwenedit.encoding.conditioning import Conditioning, Prompt
from qwenedit.encoding.encode import encode_rows
from qwenedit.encoding.switched import reference_rows, seen_rows
from qwenedit.inputs.processor import Processor
from qwenedit.inputs.rows import Row
from qwenedit.memory.residency import home
from qwenedit.memory.streaming import Absent, Streamed
from qwenedit.networks.vae import VAE
from qwenedit.networks.vision_language import VisionLanguage
from qwenedit.switches import Switches
from qwenedit.taps import is_tapped

__all__ = ["ConditioningCache"]

# What a module has of torch, or of where its weights come from: these come back as they were.
_NOT_OURS = frozenset(vars(Streamed())) | {"_comes_and_goes"}
_STATED = (Tensor, nn.Parameter, Absent)  # what tells when it changes, or cannot


@dataclass(frozen=True, eq=False)
class _Entry:
    """One conditioning; with what the ids and addresses in its key are of: they mean nothing once these are
    gone.
    """

    conditioning: Conditioning
    bytes: int
    processor: tuple[Processor, object]
    weights: list[tuple[weakref.ref[Tensor], StorageWeakRef]]  # weak: gigabytes, not to be kept alive

    @property
    def valid(self) -> bool:
        return not any(weight() is None or storage.expired() for weight, storage in self.weights)


class ConditioningCache:
    """Conditionings of the runs before, on the encoders' device, up to `max_bytes` in all.

    Beyond that, what was not used for longest goes. One cache may serve several pipelines. Weights that were
    moved count as changed. A change of weights goes unseen only where it passes torch's own counter by:
    what is written in place through `.data`, or the inside of the tokenizer. After that, `clear`.
    Weights that come and go (memory/residency.py) are those that `load` found.
    """

    def __init__(self, max_bytes: int = 2**28) -> None:
        check_count("max_bytes", max_bytes)
        self.max_bytes = max_bytes
        self._entries: dict[Hashable, _Entry] = {}  # what was used last is last

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def bytes(self) -> int:
        """Of all the tensors that are kept."""
        return sum(entry.bytes for entry in self._entries.values())

    def clear(self) -> None:
        """Forget everything."""
        self._entries.clear()

    def encode_rows(
        self,
        rows: Sequence[Row],
        *,
        guided: bool,
        processor: Processor,
        vision_language: VisionLanguage,
        vae: VAE,
        switches: Switches,
        **settings: Any,
    ) -> Conditioning:
        """As `encode.encode_rows`; the tensors are the caller's own, to change as he likes."""

        def encode() -> Conditioning:
            return encode_rows(
                rows,
                guided=guided,
                processor=processor,
                vision_language=vision_language,
                vae=vae,
                switches=switches,
                **settings,
            )

        def key() -> Hashable:
            asked = _asked(rows, guided, switches), tuple(sorted(settings.items()))
            made_by = id(processor), id(processor.tokenizer), processor.config
            return asked, made_by, _state(vision_language), _state(vae), _numerics()

        if _numerics() is None or not (_unwatched(vision_language) and _unwatched(vae)):
            return encode()
        wanted = key()
        entry = self._entries.pop(wanted, None)
        if entry is not None and entry.valid:
            self._entries[wanted] = entry
            return _copied(entry.conditioning)
        conditioning = encode()
        if key() == wanted:  # a picture's file, say, may have changed meanwhile
            weights = [
                (weakref.ref(x), StorageWeakRef(x.untyped_storage()))
                for network in (vision_language, vae)
                for x in _tensors(network)
            ]
            kept, size = _copied(conditioning), _bytes(conditioning)
            self._entries[wanted] = _Entry(kept, size, (processor, processor.tokenizer), weights)
            self._evict()
        return conditioning

    def _evict(self) -> None:
        for key in [key for key, entry in self._entries.items() if not entry.valid]:
            del self._entries[key]
        for key in list(self._entries):  # the oldest first
            if self.bytes <= self.max_bytes:
                break
            del self._entries[key]


def _asked(rows: Sequence[Row], guided: bool, switches: Switches) -> Hashable:
    """What is to be encoded, with the pixels as one hash."""
    digest = hashlib.sha256()
    hashed: dict[int, bytes] = {}  # by id: a batch often shows one picture many times
    seen, pictured = seen_rows(rows, switches.seen), reference_rows(rows, switches.references)
    for of_network in (seen, pictured):
        for row in of_network:
            for picture in row.pictures:
                if id(picture) not in hashed:
                    hashed[id(picture)] = _picture_hash(picture)
                digest.update(hashed[id(picture)])
    prompts = tuple((row.prompt, row.negative if guided else None) for row in rows)
    plans = tuple(row.geometry for of_network in (seen, pictured) for row in of_network)
    return digest.digest(), prompts, plans, json.dumps(switches.encoding.flat(), ensure_ascii=False)


def _picture_hash(picture: Image.Image) -> bytes:
    """Of the pixels as the processor reads them, in RGB, and of the picture's own mode and size."""
    digest = hashlib.sha256(f"{picture.mode} {picture.size} ".encode())
    digest.update(picture.convert("RGB").tobytes())
    return digest.digest()


def _unwatched(network: nn.Module) -> bool:
    """Would nobody notice if the network did not run, and is all that its output depends on in `_state`?"""
    return (
        not torch.is_grad_enabled()
        and not torch.is_autocast_enabled(home(network).type)
        and all(isinstance(mode, DeviceContext) for mode in _get_current_function_mode_stack())
        and not _get_current_dispatch_mode_stack()
        and not _has_any_global_hook()
        and not is_tapped(network)
        and all(_known(module) for module in network.modules())
        and all(type(x) in _STATED and not x.is_inference() for x in _tensors(network))
    )


def _known(module: nn.Module) -> bool:
    """Ours or torch's, as it was made: no method of it replaced on the instance, nothing compiled."""
    ours = type(module).__module__.startswith(("qwenedit.", "torch.nn."))
    return ours and module._compiled_call_impl is None and all(map(_is_plain, _attributes(module).values()))


def _attributes(module: nn.Module) -> dict[str, Any]:
    """What a module holds besides weights and modules: its config, an epsilon."""
    return {name: value for name, value in vars(module).items() if name not in _NOT_OURS}


def _is_plain(value: object) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_is_plain, value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return all(_is_plain(getattr(value, one.name)) for one in dataclasses.fields(value))
    return value is None or isinstance(value, (bool, int, float, str))


def _tensors(network: nn.Module) -> list[Tensor]:
    """Every weight and buffer, of each module its own."""
    return [
        x
        for module in network.modules()
        for x in (*module._parameters.values(), *module._buffers.values())
        if x is not None
    ]


def _state(network: nn.Module) -> Hashable:
    """Another value when a weight, a module or a setting of one is another or has changed."""
    weights = tuple(
        (id(x), x._version, x.data_ptr(), x.shape, x.stride(), x.dtype, x.device) for x in _tensors(network)
    )
    modules = tuple(
        (path, type(module), type(module).forward, module.training, repr(_attributes(module)))
        for path, module in network.named_modules()
    )
    return weights, modules, home(network)


def _numerics() -> Hashable | None:
    """What of torch's settings decides about last bits; None where it refuses to say."""
    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
    try:
        precision = torch.get_float32_matmul_precision(), cudnn.allow_tf32
    except RuntimeError:  # its old and its new way of setting these were mixed
        return None
    attention = (
        cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled(),
        cuda.cudnn_sdp_enabled(),
    )  # fmt: skip
    return (
        precision,
        attention,
        (cudnn.enabled, cudnn.benchmark, cudnn.deterministic),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_default_dtype(),
        torch.get_num_threads(),
    )


def _copied(conditioning: Conditioning) -> Conditioning:
    """With tensors of its own; pictures that rows shared stay shared."""
    clones: dict[int, Tensor] = {}

    def clone(x: Tensor) -> Tensor:
        if id(x) not in clones:
            clones[id(x)] = x.clone()
        return clones[id(x)]

    def prompt(one: Prompt) -> Prompt:
        return Prompt(clone(one.embeds), None if one.mask is None else clone(one.mask))

    return dataclasses.replace(
        conditioning,
        prompt=prompt(conditioning.prompt),
        negative=None if conditioning.negative is None else prompt(conditioning.negative),
        reference_latents=tuple(tuple(map(clone, row)) for row in conditioning.reference_latents),
        provenance=dict(conditioning.provenance),
    )


def _bytes(conditioning: Conditioning) -> int:
    """Of the tensors, each counted once."""
    prompts = [one for one in (conditioning.prompt, conditioning.negative) if one is not None]
    tensors = [x for one in prompts for x in (one.embeds, one.mask) if x is not None]
    tensors += [x for row in conditioning.reference_latents for x in row]
    return sum({id(x): x.nbytes for x in tensors}.values())
