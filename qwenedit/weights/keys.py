"""Official tensor names to ours and back, by the key tables in the networks' files."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

from torch import nn

from qwenedit.networks import blockwise_controlnet, controlnet, mmdit, vae, vision_language
from qwenedit.networks.blockwise_controlnet import BlockwiseControlNet
from qwenedit.networks.controlnet import ControlNet
from qwenedit.networks.mmdit import MMDiT
from qwenedit.networks.vae import VAE
from qwenedit.networks.vision_language import VisionLanguage

__all__ = [
    "BLOCKWISE_CONTROLNET", "CONTROLNET", "NETWORKS", "Component", "KeyTable", "official_to_ours",
    "ours_to_official",
]  # fmt: skip

KeyTable = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Component:
    """The module of a network, and how its official tensor names become the module's.

    Attributes:
        skipped: official keys that are known and not loaded.
        prefixes: prefixes of other naming schemes, each with the hub's.
    """

    module: type[nn.Module]
    table: KeyTable
    skipped: tuple[str, ...] = ()
    prefixes: tuple[tuple[str, str], ...] = ()

    def hub_key(self, key: str) -> str:
        for prefix, official in self.prefixes:
            if key.startswith(prefix):
                return official + key.removeprefix(prefix)
        return key


NETWORKS = {
    "text_encoder": Component(
        VisionLanguage, vision_language.KEY_TABLE, vision_language.SKIPPED_KEYS, vision_language.KEY_PREFIXES
    ),
    "transformer": Component(MMDiT, mmdit.KEY_TABLE),
    "vae": Component(VAE, vae.KEY_TABLE),
}
CONTROLNET = Component(ControlNet, controlnet.KEY_TABLE)
BLOCKWISE_CONTROLNET = Component(BlockwiseControlNet, blockwise_controlnet.KEY_TABLE)


def official_to_ours(table: KeyTable, key: str) -> str | None:
    """Our name of an official tensor; None if no rule of the table matches."""
    return _renamed(_compiled(table), key)


def ours_to_official(table: KeyTable, name: str) -> str:
    """The official name of one of our parameters.

    Raises:
        KeyError: no rule of the table matches.
    """
    official = _renamed(_compiled(tuple((ours, official) for official, ours in table)), name)
    if official is None:
        raise KeyError(name)
    return official


@functools.cache
def _compiled(table: KeyTable) -> tuple[tuple[re.Pattern[str], str], ...]:
    """The rules as regular expressions: {n}, {m}, ... match a number, {p} matches weight or bias."""

    def pattern(template: str) -> re.Pattern[str]:
        text = re.escape(template).replace(r"\{p\}", "(?P<p>weight|bias)")
        return re.compile(re.sub(r"\\\{([a-z])\\\}", r"(?P<\1>[0-9]+)", text))

    return tuple((pattern(source), target) for source, target in table)


def _renamed(rules: tuple[tuple[re.Pattern[str], str], ...], key: str) -> str | None:
    hits = [target.format(**match.groupdict()) for rule, target in rules if (match := rule.fullmatch(key))]
    assert len(hits) <= 1, f"{key} matches several rules: {hits}"
    return hits[0] if hits else None
