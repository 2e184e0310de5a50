"""Groups of tokens by name, in the joint sequence and in a stream: text, target, reference 1, ..."""

from __future__ import annotations

import re
from collections.abc import Sequence

from qwenedit.checks import require_numbers
from qwenedit.latents import Layout
from qwenedit.taps import Site

__all__ = ["in_group", "require_tokens", "stream_groups", "stream_of", "token_groups"]


def token_groups(layout: Layout) -> dict[str, slice]:
    """The groups of the joint sequence by name, in order: text, target, reference 1, reference 2, ...

    >>> token_groups(Layout(5, ((1, 2, 2), (1, 2, 3))))
    {'text': slice(0, 5, None), 'target': slice(5, 9, None), 'reference 1': slice(9, 15, None)}
    """
    groups = {"text": slice(0, layout.text), "target": layout.in_joint(layout.target)}
    for number, tokens in enumerate(layout.references, 1):
        groups[f"reference {number}"] = layout.in_joint(tokens)
    return groups


def stream_of(full: str) -> str | None:
    """The stream that a tap's name says it is of, "img" or "txt", or None."""
    streams = [part[:3] for part in full.split(".") if part.startswith(("img_", "txt_"))]
    return streams[0] if streams else None


def stream_groups(site: Site) -> dict[str, slice]:
    """The groups of tokens in a tensor of the image or the text stream, which its name says.

    Raises:
        ValueError: no label `layout` is in force.
    """
    layout = site.labels.get("layout")
    if layout is None:
        raise ValueError(f"tap {site.full}: no label layout is in force, wanted scope(layout=Layout(...))")
    every = token_groups(layout)
    text = every.pop("text")
    image = {name: slice(one.start - text.stop, one.stop - text.stop) for name, one in every.items()}
    return {"txt": {"text": text}, "img": image}.get(stream_of(site.full) or "", {})


def in_group(name: str, wanted: str) -> bool:
    """True if the group is the wanted one; "reference" stands for all references.

    >>> in_group("reference 2", "reference"), in_group("reference 2", "reference 1")
    (True, False)
    """
    return f"{name} ".startswith(f"{wanted} ")


def require_tokens(tokens: str | Sequence[int] | None) -> None:
    """Raise a ValueError unless it is None, the name of a group of tokens, or a list of places."""
    if not isinstance(tokens, str):
        require_numbers("tokens", tokens)
    elif not re.fullmatch(r"text|target|reference( [1-9]\d*)?", tokens):
        raise ValueError(
            f"tokens is {tokens!r}, wanted 'text', 'target', 'reference', 'reference 2' or a list of places"
        )
