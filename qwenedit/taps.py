"""Named taps: read or replace any tensor of a network while it runs.

The networks call `self.tap("name", x, "B S D")` on every tensor of interest. The third argument is the shape
comment (letters as in CONTRIBUTING.md). A tap with nothing attached costs one attribute look-up. `taps`
attaches functions by name and detaches them on exit:

    def dim(x, site):                       # None keeps the tensor, a tensor replaces it
        return x * 0.5 if site.labels.get("branch") == "cond" else None

    with taps(pipe.mmdit, {"blocks.*.img_attn_add": dim}):
        pipe.edit(picture, "make the circle red")
"""

from __future__ import annotations

import difflib
import fnmatch
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._pytree import tree_leaves

__all__ = [
    "Fingerprint", "NonFiniteError", "Shards", "Site", "TapFunction", "Tapped",
    "cache_context", "current_labels", "fingerprint", "has_compiled_part", "modified", "named_modules",
    "observed", "require_finite", "require_module", "scope", "swapped", "tap_names", "taps", "tensors_in",
]  # fmt: skip

NewModule = TypeVar("NewModule", bound=nn.Module)

# The torch layers that the networks use as they are. Every other torch class is foreign (`modified`).
_PLAIN_LAYERS = (nn.Conv2d, nn.Conv3d, nn.Embedding, nn.Identity, nn.LayerNorm, nn.Linear, nn.ModuleList)


class _Labels(threading.local):
    """The labels of this thread's innermost `scope`. They are descriptive: the networks never read them."""

    def __init__(self) -> None:
        self.now: dict[str, Any] = {}


_labels = _Labels()


@contextmanager
def scope(**labels: Any) -> Iterator[None]:
    """Label what is being computed (step, sigma, branch, layout). Tap functions read it as `site.labels`.

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


def cache_context(name: str) -> AbstractContextManager[None]:
    """Label the forwards in a `with` block with the name of their CFG branch. The sampler does this itself.

    Source: diffusers' `CacheMixin.cache_context`.
    """
    return scope(branch=name)


@dataclass(frozen=True, slots=True)
class Site:
    """Where a tap function is being called.

    `module` is the module instance, `name` the tap's name in its class, `full` its dotted name in the model
    that was given to `taps` (`blocks.12.attn.img_q_rot`).
    """

    module: nn.Module
    name: str
    full: str

    @property
    def optional(self) -> bool:
        """True if the tap fires in some forwards only."""
        return isinstance(self.module, Tapped) and self.name in self.module.OPTIONAL_TAPS

    @property
    def labels(self) -> dict[str, Any]:
        """The labels in force: step, sigma, branch, layout, rows, text_lengths (without padding), ...

        Where two processes share the branches, `elsewhere` is the branch that is not run here.
        """
        return current_labels()


TapFunction = Callable[[Tensor, Site], "Tensor | None"]


class Shards(Protocol):
    """What this process holds of a network's tensors, of which other processes hold the rest.

    `qwenedit.parallel` sets one on each module of a network that processes share. Tokens are those of the
    text, of the target and of the references. A network calls `begin` in each pass, then the others.
    """

    @property
    def splits_tokens(self) -> bool:
        """False if each process has all tokens, and shares other dimensions."""
        ...

    def begin(self, img: Tensor, txt: Tensor, target: int) -> tuple[Tensor, Tensor, int]:
        """This process's tokens of both streams (B, S, D) and (B, T, D), and how many are the target's."""
        ...

    def end(self, img: Tensor, *, target_only: bool) -> Tensor:
        """The image tokens (B, S, C) of all processes; with `target_only` they are the target's alone."""
        ...

    def own_target(self, x: Tensor) -> Tensor:
        """This process's part of the target's tokens (B, S, D)."""
        ...

    def join(
        self, q: Tensor, k: Tensor, v: Tensor, *, target_only: bool
    ) -> tuple[Tensor, Tensor, Tensor, list[int]]:
        """Own tokens of all heads (B, N, D) -> all tokens of own heads (B, J, ...), and their T and S.

        The tokens are in the order [text, image]; with `target_only` the queries are the target's alone.
        """
        ...

    def part(self, *streams: Tensor) -> list[Tensor]:
        """All tokens of own heads -> own tokens of all heads: of text and image, or of the target."""
        ...

    def applied(self, function: Callable[[Tensor], Tensor], x: Tensor, shape: str) -> Tensor:
        """This process's part of what the function makes of the whole tensor, whose shape comment this is."""
        ...


class Tapped(nn.Module):
    """A module whose named intermediates can be read or replaced with `taps`.

    `TAPS` lists every tap that fires in every forward, `OPTIONAL_TAPS` those that fire in some. `taps`
    matches patterns against both, so that a wrong pattern fails before anything runs.
    """

    TAPS: tuple[str, ...] = ()
    OPTIONAL_TAPS: tuple[str, ...] = ()
    shards: Shards | None = None  # set on instances, by `qwenedit.parallel` alone
    _taps: dict[str, list[tuple[TapFunction, Site]]] | None = None  # set on instances, by `taps` alone

    def tap(self, name: str, x: Tensor, shape: str = "") -> Tensor:
        """Pass `x` to the functions attached under `name`; return it or its replacement.

        `shape` is the shape comment. Tests compare it with the tensor. Of a tensor that processes share the
        functions see the whole, in each of them.
        """
        if self._taps is None or name not in self._taps:
            return x
        attached = self._taps[name]

        def applied(x: Tensor) -> Tensor:
            for fn, site in attached:
                y = fn(x, site)
                x = x if y is None else _checked(y, x, site)
            return x

        return applied(x) if self.shards is None else self.shards.applied(applied, x, shape)

    def tapped(self, *names: str) -> bool:
        """True if a function is attached to one of these. Some tensors cost extra, such as attention maps."""
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
    require_module(model)
    sites = {}
    for path, module in named_modules(model):
        if isinstance(module, Tapped):
            for name in (*module.TAPS, *module.OPTIONAL_TAPS):
                full = f"{path}.{name}" if path else name
                sites[full] = Site(module, name, full)
    return sites


def require_module(model: object) -> None:
    """Raise a ValueError unless it is a module; for a pipeline the message names its networks."""
    if not isinstance(model, nn.Module):
        held = [
            name for name, value in getattr(model, "__dict__", {}).items() if isinstance(value, nn.Module)
        ]
        instead = f", like its {', '.join(held)}" if held else ""
        raise ValueError(f"the model is {type(model).__name__}, wanted a torch module{instead}")


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules by path. Wrappers of torch.compile and of `swapped` do not add a level to it."""
    shown: dict[str, str] = {}  # real path -> shown path of a wrapped module
    for path, module in model.named_modules():
        above = max((real for real in shown if f"{path}.".startswith(f"{real}.")), key=len, default=None)
        name = path if above is None else (shown[above] + path[len(above) :]).strip(".")
        name = name.replace("_orig_mod.", "").removesuffix("_orig_mod").removesuffix(".")
        if (inner := module.__dict__.get("_wraps")) is not None:
            shown[f"{path}.{inner}"] = name
        yield name, module


def observed(model: nn.Module) -> bool:
    """True if anything besides the model's own code can read or change what its modules compute.

    That means gradients, autocast, a torch function mode, taps, hooks, and foreign modules or forwards (see
    `modified`). A model compiled as a whole counts too, because its graph has no room for a cache. Callers
    then cache nothing between steps and skip nothing, so that every tap and hook fires at every step.
    """
    modules = _modules(model)
    return (
        torch.is_grad_enabled()
        or torch._C._is_any_autocast_enabled()
        or any(not isinstance(mode, DeviceContext) for mode in _get_current_function_mode_stack())
        or model._compiled_call_impl is not None
        or any("_taps" in module.__dict__ for module in modules)
        or _modified(modules)
    )


def modified(model: nn.Module) -> bool:
    """True if a module of the model has a torch hook, a foreign class or a foreign forward.

    Classes are foreign unless they come from the folder of the model's class, are in `_PLAIN_LAYERS`, or
    declare `transparent = True`. That promises that a forward depends on its arguments and weights alone.
    """
    return _modified(_modules(model))


def _modified(modules: list[nn.Module]) -> bool:
    package = type(modules[0]).__module__.rpartition(".")[0]
    return (
        _has_any_global_hook()
        or any(_hooked(x) or "forward" in x.__dict__ for x in modules)
        or not all(_own(kind, package) for kind in set(map(type, modules)))
    )


def _hooked(module: nn.Module) -> bool:
    """True if the module has a hook; those of `parallel.split`, which bring its weights, do not count."""
    if not (module._forward_hooks or module._forward_pre_hooks):
        return False
    hooks = {*module._forward_hooks, *module._forward_pre_hooks}
    return not hooks <= module.__dict__.get("_transparent_hooks", frozenset())


def has_compiled_part(model: nn.Module) -> bool:
    """True if a module inside the model was compiled by itself (`module.compile()`)."""
    return any(module._compiled_call_impl is not None for module in _modules(model)[1:])


def _modules(model: nn.Module) -> list[nn.Module]:
    """All modules of a model. Five times as fast as `model.modules()`; the sampler calls it at every step."""
    modules = [model]
    for module in modules:
        if children := module._modules:
            modules += [child for child in children.values() if child is not None]
    return modules


def _own(kind: type[nn.Module], package: str) -> bool:
    """True for a class of the package, a transparent class or a plain layer, if its forward is its own."""
    if kind in _PLAIN_LAYERS:
        return kind.forward.__module__.startswith("torch.nn.")
    known = kind.__module__.rpartition(".")[0] == package or kind.__dict__.get("transparent", False)
    return known and kind.forward.__module__ in (kind.__module__, "torch.nn.modules.module")


def fingerprint(modules: Sequence[nn.Module], tensors: Sequence[Tensor | None] = ()) -> Fingerprint | None:
    """A value that changes when a weight of the modules or one of the tensors is replaced or written to.

    It includes numbers that a module holds, such as a LoRA's scale. Returns None if a tensor does not count
    the writes to it, as in inference mode. (In-place writes through `.data` are never counted.)
    """
    parts = [part for module in modules for part in module.modules()]
    own = [x for part in parts for x in (*part._parameters.values(), *part._buffers.values())]
    held = [x for x in (*tensors, *own) if x is not None]
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
    """Raise NonFiniteError if `x` holds NaN or infinity. The message says what `x` is and where to look."""
    if not torch.isfinite(x).all():
        raise NonFiniteError(f"{what} has NaN or infinity; {where}")


@dataclass(frozen=True)
class Fingerprint:
    """A value to compare. It keeps its tensors alive, so that no new tensor can get one of their ids."""

    value: tuple[Any, ...]
    tensors: list[Tensor] = field(compare=False, repr=False)


def tap_names(model: nn.Module) -> list[str]:
    """Every tap of a model by its full name, in the order of its modules.

    >>> import qwenedit
    >>> tap_names(qwenedit.load(progress=False).mmdit)[:4]
    ['img_in', 'txt_in', 'temb', 'velocity']
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
        functions: pattern over full tap names -> `fn(x, site) -> None | Tensor`. In a pattern `*` matches any
            text, dots too; `{3,7}` and `{20..30}` stand for names and numbers, each of which must be there.
            Several functions on one tap run in the order of this mapping, after those of outer contexts.
        eager: run compiled modules eagerly meanwhile, so that functions may do anything. With `eager=False`
            the functions are compiled in: they must be pure and read no labels.
        strict: on a clean exit, raise if an attached tap never fired. An optional tap, which fires in some
            forwards only, is missed where no other has fired either.
        first: run before the functions of outer contexts, which then see the replacements.

    Raises:
        KeyError: a pattern matches no tap; close names are listed. Nothing has run yet.
        ValueError: the model is no module, a function cannot be called, or a pattern has a class of
            characters that is meant for numbers (`[20-30]`), before anything runs; while running, a function
            writes into its tensor in place, or returns one of another shape, dtype or device.
        RuntimeError: with `strict`, taps that matched but never fired.

    On exit, also after an exception, every module is exactly as it was before.

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
    if not isinstance(functions, Mapping):
        raise ValueError(f"the functions are {type(functions).__name__}, wanted a dict of pattern: function")
    for pattern, fn in functions.items():
        if not isinstance(pattern, str) or not callable(fn):
            got = f"{type(pattern).__name__}: {type(fn).__name__}"
            raise ValueError(f"the functions have {got}, wanted pattern: function of a tensor and a Site")
        for full in _matched(pattern, list(sites)):
            if (check := getattr(fn, "check", None)) is not None:  # of `patch_from`
                check(sites[full])
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
            del module.__dict__["_taps"]
            if old_taps is not None:
                module.__dict__["_taps"] = old_taps
    silent = [full for full in added if full not in fired and not (fired and sites[full].optional)]
    if strict and silent:
        raise RuntimeError(
            f"{len(silent)} of {len(added)} attached taps never fired: {', '.join(silent[:10])}"
            f"{', ...' if len(silent) > 10 else ''}; pass strict=False if that is expected"
        )


def _recording(fn: TapFunction, full: str, fired: set[str]) -> TapFunction:
    def call(x: Tensor, site: Site) -> Tensor | None:
        fired.add(full)
        if torch.compiler.is_compiling():  # then functions are pure, as `taps` says
            return fn(x, site)
        if x.is_inference():  # such tensors do not count the writes to them, but a copy does
            with torch.inference_mode(False):
                x = x.clone()
        before = x._version
        y = fn(x, site)
        if x._version != before:
            raise ValueError(f"tap {full}: the function wrote into its tensor, wanted a new one returned")
        return y

    return call


def _matched(pattern: str, names: list[str]) -> list[str]:
    """The names that a pattern matches, each once."""
    for inside in re.findall(r"\[(!?[^]]+)\]", pattern):
        if re.search(r"\d\d", inside):
            ends = re.findall(r"\d+", inside)
            is_range = "-" in inside and len(ends) > 1
            instead = f"{ends[0]}..{ends[-1]}" if is_range else ",".join(re.findall(r"\d", inside))
            raise ValueError(
                f"in the pattern {pattern!r}, [{inside}] stands for a single character, not for numbers: "
                f"write {{{instead}}}"
            )
    found: dict[str, None] = {}
    for one in _expanded(pattern):
        matched = [name for name in names if fnmatch.fnmatchcase(name, one)]
        if not matched:
            raise KeyError(_no_match(one, names, "tap"))
        found |= dict.fromkeys(matched)
    return list(found)


def _expanded(pattern: str) -> Iterator[str]:
    """The pattern with each of the alternatives in its braces."""
    if (brace := re.search(r"\{([^{}]+)\}", pattern)) is None:
        yield pattern
        return
    for one in brace[1].split(","):
        ends = re.fullmatch(r"\s*(\d+)\.\.(\d+)\s*", one)
        first, last = sorted(map(int, ends.groups())) if ends else (0, 0)
        for text in range(first, last + 1) if ends else [one.strip()]:
            yield from _expanded(f"{pattern[: brace.start()]}{text}{pattern[brace.end() :]}")


def _no_match(pattern: str, names: list[str], what: str) -> str:
    close = difflib.get_close_matches(pattern, names, n=5, cutoff=0.4)
    hint = f"; close names: {', '.join(close)}" if close else f"; the model has {len(names)} {what}s"
    return f"no {what} matches {pattern!r}{hint}"


@contextmanager
def swapped(model: nn.Module, path: str, factory: Callable[[Any], NewModule]) -> Iterator[NewModule]:
    """Replace the submodule `old` at `path` with `factory(old)`, for the length of a `with` block.

    If the new module holds the old one as a submodule, the taps under the old one keep their names. The old
    one is put back on exit, also after an exception.

    Raises:
        KeyError: the model has no such submodule; close names are listed.
        ValueError: the model is no module, or the factory returned none.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    >>> with swapped(model, "1", lambda old: nn.Identity()):
    ...     model[1]
    Identity()
    >>> model[1]
    ReLU()
    """
    require_module(model)
    modules = dict(model.named_modules())
    real: dict[str, str] = {}  # shown path -> real path, of the outermost module that is shown there
    for (shown, _), path_of in zip(named_modules(model), modules, strict=True):
        real.setdefault(shown, path_of)
    real.pop("")
    if not isinstance(path, str) or not callable(factory):
        raise ValueError(f"path and factory are {path!r} and {factory!r}, wanted a text and a function")
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
