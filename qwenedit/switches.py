"""Changes to a run, as values: `pipe.edit(picture, prompt, switches=Switches(...))`.

    Switches(references=References(latents="left_out"))          # the appearance path is cut
    Switches(seen=Seen(picture="blank"))                         # the semantic path is cut
    Switches.from_flat({"guidance.norm": "none", "references.steps": [0, 10]})
    Switches(dialect="diffsynth")                                # as DiffSynth-Studio computes

With the default values a run is bitwise the plain one. Intervals are (start, stop) with `stop` excluded.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image
from torch import Generator

from qwenedit.annotated import accepted
from qwenedit.dialects import DIALECTS, Dialect, PromptRule, TransformerRule
from qwenedit.foreign import shown
from qwenedit.switch_groups import (
    NORMS,
    Controls,
    Guidance,
    Interval,
    Mask,
    References,
    Resize,
    Seen,
    Time,
    VAEPath,
)

__all__ = [
    "NORMS", "Controls", "Guidance", "Interval", "Mask", "PromptRule", "References", "Resize", "Seen",
    "Switches", "Time", "TransformerRule", "VAEPath", "own_generator", "switch_lines", "switches_of",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Switches:
    """All changes to a run; the default changes nothing.

    Attributes:
        dialect: "reference", or the tool whose arithmetic is wanted: it sets the switches of all its entries
            (`qwenedit.dialects.DIALECTS`) that are not given themselves. `flat` then has the dialect, and
            what differs from it.
        references: the reference latents, the path of appearance.
        seen: the picture that the language model sees, the path of meaning.
        vae: how the VAE's posterior becomes reference latents.
        guidance: how the two predictions become one; the scale is the call's `true_cfg_scale`.
        time: the transformer's timesteps, and the sigmas.
        mask: how a run starts from a picture and keeps a part of it.
        control: how ControlNets run.
        transformer: its arithmetic, as other tools have it.
        prompt: how long a prompt may be.

    Raises:
        ValueError: a value without meaning; the message has the switch's dotted name.

    >>> switches = Switches(references=References(steps=(0, 10)), guidance=Guidance(norm="none"))
    >>> switches.flat()
    {'references.steps': [0, 10], 'guidance.norm': 'none'}
    >>> Switches.from_flat(switches.flat()) == switches
    True
    >>> Switches(dialect="diffsynth", guidance=Guidance(norm="reference")).flat()
    {'guidance.norm': 'reference', 'dialect': 'diffsynth'}
    """

    dialect: Dialect = "reference"
    references: References = field(default_factory=References)
    seen: Seen = field(default_factory=Seen)
    vae: VAEPath = field(default_factory=VAEPath)
    guidance: Guidance = field(default_factory=Guidance)
    time: Time = field(default_factory=Time)
    mask: Mask = field(default_factory=Mask)
    control: Controls = field(default_factory=Controls)
    transformer: TransformerRule = field(default_factory=TransformerRule)
    prompt: PromptRule = field(default_factory=PromptRule)

    def __post_init__(self) -> None:
        of_dialect = _by_group(_entries(self.dialect))
        for name, kind in GROUPS.items():
            value = getattr(self, name)
            if not isinstance(value, kind):
                raise ValueError(f"switches.{name} is {value!r}, wanted a {kind.__name__}")
            options = of_dialect.get(name, {})
            if missing := {option: options[option] for option in options.keys() - value.given}:
                object.__setattr__(self, name, dataclasses.replace(value, **missing))

    @classmethod
    def from_flat(cls, values: Mapping[str, Any]) -> Switches:
        """From dotted names, the form of spec files and the command line; lists count as tuples.

        Raises:
            ValueError: an unknown name (close ones are listed) or a value without meaning.
        """
        for name in values:
            if name not in NAMES:
                close = difflib.get_close_matches(name, NAMES, n=3, cutoff=0.5)
                hint = f"did you mean {' or '.join(close)}?" if close else f"wanted one of {', '.join(NAMES)}"
                raise ValueError(f"no switch is called {name!r}; {hint}")
        flat = dict(values)
        dialect = flat.pop("dialect", "reference")
        groups = _by_group({**_entries(dialect), **flat})
        return cls(dialect=dialect, **{group: GROUPS[group](**options) for group, options in groups.items()})

    @property
    def usual(self) -> Switches:
        """What the dialect alone sets."""
        return Switches(dialect=self.dialect)

    def own(self, group: str) -> list[str]:
        """The options of a group that have neither their default nor the dialect's value."""
        value, others = getattr(self, group), [getattr(one, group) for one in (Switches(), self.usual)]
        names = [one.name for one in dataclasses.fields(value)]
        return [name for name in names if getattr(value, name) not in [getattr(x, name) for x in others]]

    def flat(self) -> dict[str, Any]:
        """The dialect, if it is another than the reference, and the values that differ from what it sets, by
        dotted name, in JSON's types; a PIL picture becomes a hash of its pixels.
        """
        usual, values = self.usual, {}
        for group, kind in GROUPS.items():
            for one in dataclasses.fields(kind):
                value = getattr(getattr(self, group), one.name)
                if value != getattr(getattr(usual, group), one.name):
                    values[f"{group}.{one.name}"] = _as_json(value)
        if self.dialect != "reference":
            values["dialect"] = self.dialect
        return values

    @property
    def encoding(self) -> Switches:
        """The switches that `condition` depends on; the others have their defaults."""
        references = References()
        if self.references.latents == "other":
            references = References(latents="other", picture=self.references.picture)
        return Switches(references=references, seen=self.seen, vae=self.vae, prompt=self.prompt)


def switches_of(value: object) -> Switches:
    """The switches of a call; None stands for the default ones.

    Raises:
        ValueError: something else.
    """
    if value is None:
        return Switches()
    if not isinstance(value, Switches):
        got = type(value).__name__
        raise ValueError(f"switches are {got}, wanted Switches (Switches.from_flat makes them of a dict)")
    return value


def own_generator(seed: int, *use: object) -> Generator:
    """The generator of one use of a seed: different numbers from any other use of the same seed.

    >>> own_generator(0, "vae").initial_seed() == own_generator(0, "references").initial_seed()
    False
    """
    digest = hashlib.sha256(repr((seed, *use)).encode()).digest()
    return Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


GROUPS: dict[str, Any] = {
    one.name: one.default_factory for one in dataclasses.fields(Switches) if one.name != "dialect"
}
NAMES = [f"{group}.{one.name}" for group, kind in GROUPS.items() for one in dataclasses.fields(kind)]
NAMES.append("dialect")


def switch_lines() -> list[str]:
    """A line for each switch: its dotted name, what it takes, and its default.

    >>> print(next(line for line in switch_lines() if line.startswith("guidance.rescale")))
    guidance.rescale: a number (default: 0.0)
    """
    lines = []
    for group, kind in GROUPS.items():
        for option, words in accepted(kind).items():
            default = getattr(kind(), option)
            lines.append(f"{group}.{option}: {words} (default: {'nothing' if default is None else default})")
    return [*lines, f"dialect: {' or '.join(map(repr, DIALECTS))} (default: reference)"]


def _entries(dialect: object) -> dict[str, Any]:
    """The switches that a dialect sets, by dotted name.

    Raises:
        ValueError: there is no such dialect.
    """
    if not isinstance(dialect, str) or dialect not in DIALECTS:
        close = difflib.get_close_matches(str(dialect), DIALECTS, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise ValueError(
            f"dialect is {shown(repr(dialect))}, wanted {' or '.join(map(repr, DIALECTS))}{hint}"
        )
    return {entry.switch: entry.value for entry in DIALECTS[dialect]}


def _by_group(flat: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    groups: dict[str, dict[str, Any]] = {}
    for name, value in flat.items():
        group, _, option = name.partition(".")
        groups.setdefault(group, {})[option] = value
    return groups


def _as_json(value: Any) -> Any:
    if isinstance(value, Image.Image):
        deep = value.mode[0] in "IF"  # levels that RGBA would clip
        digest = hashlib.sha256((value if deep else value.convert("RGBA")).tobytes())
        turned = value.getexif().get(ExifTags.Base.Orientation, 1)
        if deep or turned != 1:
            digest.update(f"{value.mode} {turned}".encode())
        return f"sha256 of {value.size}: {digest.hexdigest()[:16]}"
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value
