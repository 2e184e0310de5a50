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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._pytree import tree_leaves

__all__ = [
    "BranchState", "Fingerprint", "NonFiniteError", "Site", "TapFunction", "Tapped", "by_heads",
    "cache_context", "current_labels", "fingerprint", "modified", "named_modules", "observed",
    "require_finite", "scope", "swapped", "tap_names", "taps", "tensors_in",
]  # fmt: skip

State = TypeVar("State")
NewModule = TypeVar("NewModule", bound=nn.Module)

_PLAIN_LAYERS = (
    nn.Conv2d, nn.Conv3d, nn.Embedding, nn.Identity, nn.LayerNorm, nn.Linear, nn.ModuleList
)  # fmt: skip

MAX_MAP = 2**28  # elements of an attention map: a larger one is made some heads at a time


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

    >>> with scope(step=3, branch="cond"), scope(branch="uncond"):
    ...     current_labels()
    {'step': 3, 'branch': 'uncond'}
    >>> current_labels()
    {}
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


class BranchState(Generic[State]):
    """State that is kept from step to step, apart for each CFG branch and for rows that do not run together.

    `new` makes a fresh one. Nothing tells a second run from a first: use a fresh `BranchState` for each.

    >>> seen = BranchState(list)
    >>> for step in range(2):
    ...     for branch in ("cond", "uncond"):
    ...         with cache_context(branch):
    ...             seen.current().append((branch, step))
    >>> with cache_context("uncond"):
    ...     seen.current()
    [('uncond', 0), ('uncond', 1)]
    """

    def __init__(self, new: Callable[[], State]) -> None:
        self._new = new
        self._states: dict[tuple[str, tuple[int, ...] | None], State] = {}

    def current(self) -> State:
        """The state of the branch in force.

        Raises:
            ValueError: no label `branch` is in force.
        """
        labels = current_labels()
        if "branch" not in labels:
            raise ValueError("no label branch is in force, wanted cache_context(name) around the forward")
        rows = labels.get("rows")
        key = (labels["branch"], None if rows is None else tuple(rows))
        if key not in self._states:
            self._states[key] = self._new()
        return self._states[key]


def cache_context(name: str) -> AbstractContextManager[None]:
    """Name the branch of the forwards in a `with` block, by hand; the sampler does so by itself.

    Source: diffusers' `CacheMixin.cache_context`.
    """
    return scope(branch=name)


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
        """What the sampler declared with `scope`: step, sigma, branch, layout, rows, ..."""
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


def by_heads(
    attention: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
) -> Tensor:
    """`attention(q, k, v, key_mask)`, some heads at a time where the maps of all would exceed `MAX_MAP`.

    Taps inside then fire once for each part, with that part's heads in place of all, under the label `heads`,
    a slice; without parts there is no such label.

    Shapes: `q`, `k`, `v` and the result (B, H, J, K); the mask broadcasts over H.
    """
    batch, heads, rows, _ = q.shape
    at_once = max(1, MAX_MAP // (batch * rows * k.shape[2]))
    if at_once >= heads:
        return attention(q, k, v, key_mask)
    parts = []
    for start in range(0, heads, at_once):
        part = slice(start, min(start + at_once, heads))
        with scope(heads=part):
            parts.append(attention(q[:, part], k[:, part], v[:, part], key_mask))
    return torch.cat(parts, dim=1)


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
    for path, module in named_modules(model):
        if isinstance(module, Tapped):
            for name in module.TAPS:
                full = f"{path}.{name}" if path else name
                sites[full] = Site(module, name, full)
    return sites


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules by path, where neither torch.compile's wrapper nor one put in by `swapped` is a level."""
    shown: dict[str, str] = {}  # real path -> shown path, of what a wrapper wraps
    for path, module in model.named_modules():
        above = max((real for real in shown if f"{path}.".startswith(f"{real}.")), key=len, default=None)
        name = path if above is None else (shown[above] + path[len(above) :]).strip(".")
        name = name.replace("_orig_mod.", "").removesuffix("_orig_mod").removesuffix(".")
        if (inner := module.__dict__.get("_wraps")) is not None:
            shown[f"{path}.{inner}"] = name
        yield name, module


def observed(model: nn.Module) -> bool:
    """True if anything beside the model's own code sees or changes what its modules compute.

    That is gradients, autocast, a torch function mode, taps, hooks, and foreign modules or forwards (see
    `modified`). What is otherwise cached between steps, or skipped because nobody reads it, must then be
    computed. A model that was compiled as a whole counts too: its graph has no room for a cache.
    """
    return (
        torch.is_grad_enabled()
        or model._compiled_call_impl is not None
        or torch._C._is_any_autocast_enabled()
        or any(not isinstance(mode, DeviceContext) for mode in _get_current_function_mode_stack())
        or modified(model, also="_taps")
    )


def modified(model: nn.Module, also: str = "forward") -> bool:
    """True if a module of the model has a hook of torch's, or a class or forward that is not the model's own.

    The model's own classes are those of its folder, torch's plain layers, and classes that declare
    `transparent = True`: what their forward returns depends on its arguments and weights alone. `also` is one
    more attribute that none of the modules may have of its own.
    """
    kinds, modules = set(), [model]
    while modules:  # the sampler asks at every step: `model.modules()` would take five times as long
        module = modules.pop()
        own = module.__dict__
        if own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own or also in own:
            return True
        kinds.add(type(module))
        modules += [child for child in own["_modules"].values() if child is not None]
    package = type(model).__module__.rpartition(".")[0]
    return _has_any_global_hook() or not all(_own(kind, package) for kind in kinds)


def _own(kind: type[nn.Module], package: str) -> bool:
    """Is it a class of the package, a transparent one or a plain layer of torch's, with its own forward?"""
    if kind in _PLAIN_LAYERS:
        return kind.forward.__module__.startswith("torch.nn.")
    known = kind.__module__.rpartition(".")[0] == package or kind.__dict__.get("transparent", False)
    return known and kind.forward.__module__ in (kind.__module__, "torch.nn.modules.module")


def fingerprint(modules: Sequence[nn.Module], tensors: Sequence[Tensor | None] = ()) -> Fingerprint | None:
    """What changes when a weight of the modules or one of the tensors is replaced or written to.

    Numbers that a module holds, such as a LoRA's scale, are part of it. None if a tensor does not count its
    changes, as in inference mode. (Writing through `.data` in place is not counted by torch.)
    """
    parts = [part for module in modules for part in module.modules()]
    held = [x for x in tensors if x is not None]
    for part in parts:
        held += [x for x in (*part._parameters.values(), *part._buffers.values()) if x is not None]
    if any(type(x) not in (Tensor, nn.Parameter) or x.is_inference() for x in held):
        return None
    numbers = tuple(tuple(x for x in vars(part).values() if type(x) in (int, float, bool)) for part in parts)
    versions = tuple((id(x), x._version, x.data_ptr(), x.shape, x.dtype, x.device) for x in held)
    return Fingerprint((versions, numbers), held)


def tensors_in(values: Any) -> list[Tensor]:
    """All tensors in nested tuples, lists and dicts, in order."""
    return [x for x in tree_leaves(values) if isinstance(x, Tensor)]


class NonFiniteError(ArithmeticError):
    """A tensor of the run holds NaN or infinity; the message names the component and the step."""


def require_finite(x: Tensor, what: str, where: str = "look for it in the component's weights") -> None:
    """Raise NonFiniteError where `x` holds NaN or infinity, saying what it is and where to look."""
    if not torch.isfinite(x).all():
        raise NonFiniteError(f"{what} has NaN or infinity; {where}")


@dataclass(frozen=True)
class Fingerprint:
    """A value to compare. It keeps its tensors alive, so that no other tensor can take over their ids."""

    value: tuple[Any, ...]
    tensors: list[Tensor] = field(compare=False, repr=False)


def tap_names(model: nn.Module) -> list[str]:
    """Every tap of a model by its full name, in the order of its modules.

    >>> import qwenedit
    >>> tap_names(qwenedit.load(progress=False).mmdit)[:5]
    ['img_in', 'txt_in', 'temb', 'velocity', 'time_embed.sinusoids']
    """
    return list(_sites(model))


@contextmanager
def taps(
    model: nn.Module,
    functions: Mapping[str, TapFunction],
    *,
    eager: bool = True,
    strict: bool = True,
    first: bool = False,
) -> Iterator[None]:
    """Attach functions to the taps that match the patterns, for the length of a `with` block.

    Args:
        model: any module that holds `Tapped` modules.
        functions: glob pattern over full tap names (`*` also matches dots) -> `fn(x, site) -> None | Tensor`.
            Several functions on one tap run in the order of this mapping, after those of outer contexts.
        eager: run compiled modules eagerly meanwhile, so that functions may do anything. `eager=False` is
            for pure functions that read no labels: they are compiled in.
        strict: on a clean exit, raise if an attached tap never fired.
        first: run before the functions of outer contexts, which then see what these have put there.

    Raises:
        KeyError: a pattern matches no tap; names that come close are listed. Nothing has run yet.
        ValueError: a replacement differs from its tensor in shape, dtype or device.
        RuntimeError: with `strict`, taps that matched but never fired.

    On exit, by exception too, every module is exactly as it was before.

    >>> import qwenedit
    >>> from qwenedit.networks.mmdit_layers import MLP
    >>> mlp, x = MLP(4), torch.ones(1, 3, 4)
    >>> with taps(mlp, {"mlp_hidden": lambda hidden, site: print(site.full, tuple(hidden.shape))}):
    ...     before = mlp(x)
    mlp_hidden (1, 3, 16)
    >>> with taps(mlp, {"mlp_hidden": qwenedit.zero}):
    ...     torch.equal(mlp(x), mlp.down.bias.expand(1, 3, 4))
    True
    >>> torch.equal(mlp(x), before)
    True
    """
    sites = _sites(model)
    fired: set[str] = set()
    added: dict[str, list[tuple[TapFunction, Site]]] = {}
    for pattern, fn in functions.items():
        matched = [full for full in sites if fnmatch.fnmatchcase(full, pattern)]
        if not matched:
            raise KeyError(_no_match(pattern, list(sites), "tap"))
        for full in matched:
            added.setdefault(full, []).append((_recording(fn, full, fired), sites[full]))

    by_module: dict[nn.Module, dict[str, list[tuple[TapFunction, Site]]]] = {}
    for full, pairs in added.items():
        by_module.setdefault(sites[full].module, {})[sites[full].name] = pairs
    before = {module: module.__dict__.get("_taps") for module in by_module}
    for module, new in by_module.items():
        old = before[module] or {}
        earlier, later = (new, old) if first else (old, new)
        module.__dict__["_taps"] = {
            name: earlier.get(name, []) + later.get(name, []) for name in {**old, **new}
        }
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


def _no_match(pattern: str, names: list[str], what: str) -> str:
    close = difflib.get_close_matches(pattern, names, n=5, cutoff=0.4)
    hint = f"; close names: {', '.join(close)}" if close else f"; the model has {len(names)} {what}s"
    return f"no {what} matches {pattern!r}{hint}"


@contextmanager
def swapped(model: nn.Module, path: str, factory: Callable[[Any], NewModule]) -> Iterator[NewModule]:
    """Put `factory(old)` in the place of the submodule `old` at `path`, for the length of a `with` block.

    Where the new module holds the old one as a submodule, the taps under the old one keep their names. The
    old one is back on exit, by exception too.

    Raises:
        KeyError: the model has no such submodule; names that come close are listed.
        ValueError: the factory made something else than a module.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    >>> with swapped(model, "1", lambda old: nn.Identity()):
    ...     model[1]
    Identity()
    >>> model[1]
    ReLU()
    """
    modules = dict(model.named_modules())
    real: dict[str, str] = {}  # of several that show one path, the outermost
    for (shown, _), path_of in zip(named_modules(model), modules, strict=True):
        real.setdefault(shown, path_of)
    real.pop("")
    if path not in real:
        raise KeyError(_no_match(path, list(real), "module"))
    parent_path, _, name = real[path].rpartition(".")
    parent, old = modules[parent_path], modules[real[path]]
    new = factory(old)
    if not isinstance(new, nn.Module):
        raise ValueError(f"the factory for {path} made {type(new).__name__}, wanted a Module")
    inner = next((inner for inner, module in new.named_modules() if module is old and inner), None)
    if inner is not None:
        new.__dict__["_wraps"] = inner
    setattr(parent, name, new)
    try:
        yield new
    finally:
        setattr(parent, name, old)
        new.__dict__.pop("_wraps", None)
