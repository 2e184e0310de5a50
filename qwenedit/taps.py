"""Named taps: read or replace any tensor of a network while it runs.

The networks call `self.tap("name", x, "B S D")` on every tensor worth having; the third argument is the shape
comment (letters as in the README's table). With nothing attached that is one attribute look-up. `taps`
attaches functions by name and detaches them on exit:

    def dim(x, site):                       # None keeps the tensor, a tensor replaces it
        return x * 0.5 if site.labels.get("branch") == "cond" else None

    with taps(pipe.mmdit, {"blocks.*.img_attn_add": dim}):
        pipe.edit(picture, "make the circle red")
"""

from __future__ import annotations

import difflib
import fnmatch
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Site", "TapFunction", "Tapped", "current_labels", "is_tapped", "scope", "tap_names", "taps"]


class _Labels(threading.local):
    """The labels of the innermost `scope` of this thread. They describe; no code of the networks reads
    them."""

    def __init__(self) -> None:
        self.now: dict[str, Any] = {}


_labels = _Labels()


@contextmanager
def scope(**labels: Any) -> Iterator[None]:
    """Declare what is being computed (step, sigma, branch, layout), for tap functions to read as
    `site.labels`.

    Scopes nest: an inner label hides an outer one of the same name until the inner scope ends.
    """
    before = _labels.now
    _labels.now = {**before, **labels}
    try:
        yield
    finally:
        _labels.now = before


def current_labels() -> dict[str, Any]:
    """The labels in force in this thread, as a copy."""
    return dict(_labels.now)


@dataclass(frozen=True, slots=True)
class Site:
    """Where a tap function is being called.

    `module` is the module instance, `name` the tap's name in its class, `full` the dotted name from the
    model that was given to `taps` (`blocks.12.attn.img_q_rot`).
    """

    module: nn.Module
    name: str
    full: str

    @property
    def labels(self) -> dict[str, Any]:
        """What the sampler declared with `scope`: step, sigma, branch, layout, ..."""
        return current_labels()


TapFunction = Callable[[Tensor, Site], "Tensor | None"]


class Tapped(nn.Module):
    """A module whose named intermediates can be read or replaced with `taps`.

    `TAPS` declares every name that the class taps; `taps` matches patterns against these names, so that a
    wrong pattern fails before anything runs.
    """

    TAPS: tuple[str, ...] = ()
    _taps: dict[str, list[tuple[TapFunction, Site]]] | None = None  # set on instances, by `taps` alone

    def tap(self, name: str, x: Tensor, shape: str = "") -> Tensor:  # noqa: ARG002
        """Hand `x` to whatever is attached under `name`; return it or its replacement.

        `shape` is the shape comment, written where tests can hold it to the tensor.
        """
        if self._taps is None:
            return x
        for fn, site in self._taps.get(name, ()):
            y = fn(x, site)
            x = x if y is None else _checked(y, x, site)
        return x

    def tapped(self, *names: str) -> bool:
        """Does anybody want one of these? For tensors that cost extra to have (attention probabilities)."""
        return self._taps is not None and any(name in self._taps for name in names)


def _checked(y: Tensor, x: Tensor, site: Site) -> Tensor:
    if not isinstance(y, Tensor):
        raise ValueError(
            f"tap {site.full}: the function returned {type(y).__name__}, wanted a Tensor or None"
        )
    got, wanted = (tuple(y.shape), y.dtype, y.device), (tuple(x.shape), x.dtype, x.device)
    if got != wanted:
        raise ValueError(f"tap {site.full}: the replacement has shape, dtype, device {got}, wanted {wanted}")
    return y


def _sites(model: nn.Module) -> dict[str, Site]:
    sites = {}
    for path, module in model.named_modules():
        if not isinstance(module, Tapped):
            continue
        path = path.replace("_orig_mod.", "").removesuffix("_orig_mod")  # torch.compile's wrapper is no level
        for name in module.TAPS:
            full = f"{path}.{name}" if path else name
            sites[full] = Site(module, name, full)
    return sites


def is_tapped(model: nn.Module) -> bool:
    """Does anybody look inside: a tap, or a hook of torch's own, on any module of the model?

    For who can compute the model's output in a shorter way, which would pass them by.
    """
    return any(
        module.__dict__.get("_taps") is not None or module._forward_hooks or module._forward_pre_hooks
        for module in model.modules()
    )


def tap_names(model: nn.Module) -> list[str]:
    """Every tap of a model by its full name, in the order of its modules."""
    return list(_sites(model))


@contextmanager
def taps(
    model: nn.Module, functions: Mapping[str, TapFunction], *, eager: bool = True, strict: bool = True
) -> Iterator[None]:
    """Attach functions to the taps that match the patterns, for the length of a `with` block.

    Args:
        model: any module that holds `Tapped` modules.
        functions: glob pattern over full tap names (`*` also matches dots) -> `fn(x, site) -> None | Tensor`.
            Several functions on one tap run in the order of this mapping, after those of outer contexts.
        eager: run compiled modules eagerly meanwhile, so that functions may do anything. `eager=False` is
            for pure functions that read no labels: they are compiled in.
        strict: on a clean exit, raise if an attached tap never fired.

    Raises:
        KeyError: a pattern matches no tap; names that come close are listed. Nothing has run yet.
        ValueError: a replacement differs from its tensor in shape, dtype or device.
        RuntimeError: with `strict`, taps that matched but never fired.

    On exit, by exception too, every module is exactly as it was before.
    """
    sites = _sites(model)
    fired: set[str] = set()
    added: dict[str, list[tuple[TapFunction, Site]]] = {}
    for pattern, fn in functions.items():
        matched = [full for full in sites if fnmatch.fnmatchcase(full, pattern)]
        if not matched:
            raise KeyError(_no_match(pattern, list(sites)))
        for full in matched:
            added.setdefault(full, []).append((_recording(fn, full, fired), sites[full]))

    by_module: dict[nn.Module, dict[str, list[tuple[TapFunction, Site]]]] = {}
    for full, pairs in added.items():
        by_module.setdefault(sites[full].module, {})[sites[full].name] = pairs
    before = {module: module.__dict__.get("_taps") for module in by_module}
    for module, new in by_module.items():
        old = before[module] or {}
        module.__dict__["_taps"] = {name: old.get(name, []) + new.get(name, []) for name in {**old, **new}}
    try:
        with torch.compiler.set_stance("force_eager") if eager else nullcontext():
            yield
    finally:
        for module, old_taps in before.items():
            if old_taps is None:
                del module.__dict__["_taps"]
            else:
                module.__dict__["_taps"] = old_taps
    silent = [full for full in added if full not in fired]
    if strict and silent:
        raise RuntimeError(
            f"{len(silent)} of {len(added)} attached taps never fired: {', '.join(silent[:10])}"
            f"{', ...' if len(silent) > 10 else ''}; pass strict=False if that is expected"
        )


def _recording(fn: TapFunction, full: str, fired: set[str]) -> TapFunction:
    def call(x: Tensor, site: Site) -> Tensor | None:
        fired.add(full)
        return fn(x, site)

    return call


def _no_match(pattern: str, names: list[str]) -> str:
    close = difflib.get_close_matches(pattern, names, n=5, cutoff=0.4)
    hint = f"; close names: {', '.join(close)}" if close else f"; the model has {len(names)} taps"
    return f"no tap matches {pattern!r}{hint}"
