"""The functions of a sweep, its interventions and metrics: by name from a file, and a hash of their code."""

from __future__ import annotations

import functools
import hashlib
import importlib
import inspect
import os
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from qwenedit.foreign import printable_name, shown
from qwenedit.system import System

__all__ = ["code_of", "functions_of", "tensor_bytes"]


def functions_of(table: str, given: Any, base: Path, arguments: tuple[str, ...]) -> dict[str, Any]:
    """The functions of a spec's table by name; texts are "module:function", modules beside the spec included.

    `arguments` are those that each function will be called with: the positional ones, then names after "*".

    Raises:
        ValueError: no table of names, no such module or function, or one that does not take the arguments.
    """
    if not isinstance(given, Mapping):
        raise ValueError(f"{table} is {shown(repr(given))}, wanted a table of names")
    found = {}
    for name, value in given.items():
        printable_name(name, f"a name in {table}")
        function = _imported(f"{table}: {name}", value, base) if isinstance(value, str) else value
        if not callable(function):
            raise ValueError(
                f"{table}: {shown(name)} is {type(function).__name__}, wanted a function, or its name as "
                '"module:function"'
            )
        _require_taking(f"{table}: {shown(name)}", function, arguments)
        found[name] = function
    return found


def _imported(what: str, name: str, base: Path) -> Any:
    module, _, function = name.partition(":")
    if not module or not function:
        raise ValueError(f'{what} is {shown(repr(name))}, wanted "module:function"')
    sys.path.insert(0, os.path.abspath(base))
    try:
        found: Any = importlib.import_module(module)
        for part in function.split("."):
            found = getattr(found, part)
    except Exception as error:  # whatever the module raises
        reason = shown(f"{type(error).__name__}: {error}")
        raise ValueError(f"{what}: {shown(name)} cannot be imported: {reason}") from error
    finally:
        sys.path.pop(0)
    return found


def _require_taking(what: str, function: Callable[..., Any], arguments: tuple[str, ...]) -> None:
    star = arguments.index("*") if "*" in arguments else len(arguments)
    try:
        inspect.signature(function).bind(*arguments[:star], **dict.fromkeys(arguments[star + 1 :]))
    except TypeError as error:
        wanted = ", ".join((*arguments[:star], *(["**rest"] if star < len(arguments) else [])))
        raise ValueError(f"{what} cannot be called as function({wanted}): {error}") from None
    except ValueError:  # a builtin without a signature
        pass


def code_of(function: Callable[..., Any]) -> str:
    """A hash that changes with what a function does: its source, and what it uses of its own module.

    That means functions, classes, numbers, texts, tensors and pictures that it names, closes over, has as
    defaults, or was given by `functools.partial`, and what those use in turn. Other modules count by their
    name, networks by their class.

    >>> code_of(lambda pipe: 1) == code_of(lambda pipe: 2)
    False
    """
    digest = hashlib.sha256()
    for part in _parts(function, getattr(_plain(function), "__module__", None), set()):
        digest.update(f"{len(part)} ".encode() + part.encode(errors="backslashreplace"))
    return digest.hexdigest()[:20]


def _plain(function: Any) -> Any:
    while isinstance(function, functools.partial):
        function = function.func
    return inspect.unwrap(function)


def _parts(value: Any, module: str | None, seen: set[int]) -> Iterator[str]:
    """Texts that say what a value is, down to values of other modules."""
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes, os.PathLike)):
        yield f"{type(value).__name__} {value!r}"
    elif id(value) in seen:
        yield "again"
    elif isinstance(value, types.ModuleType):
        yield f"module {value.__name__}"
    elif isinstance(value, Tensor):
        yield f"tensor {hashlib.sha256(tensor_bytes(value)).hexdigest()}"
    elif callable(getattr(value, "tobytes", None)):  # a picture, an array
        size = getattr(value, "shape", None) or getattr(value, "size", None)
        yield f"{type(value).__name__} {size} {hashlib.sha256(value.tobytes()).hexdigest()}"
    else:
        seen.add(id(value))
        yield from _parts_of_object(value, module, seen)


def _parts_of_object(value: Any, module: str | None, seen: set[int]) -> Iterator[str]:
    kind = type(value)
    if isinstance(value, functools.partial):
        inside: Any = (value.func, value.args, value.keywords)
    elif isinstance(value, (list, tuple)):
        inside = value
    elif isinstance(value, (set, frozenset)):
        inside = sorted(value, key=repr)
    elif isinstance(value, Mapping):
        inside = [part for pair in value.items() for part in pair]
    elif isinstance(value, types.MethodType):
        inside = (value.__func__, value.__self__)
    elif isinstance(value, (types.FunctionType, type)) and value.__module__ == module:
        yield _source(value)
        inside = _used(value) if isinstance(value, types.FunctionType) else ()
    elif hasattr(value, "__wrapped__") and value.__module__ == module:  # as of `functools.cache`
        inside = (value.__wrapped__,)
    elif callable(value) and hasattr(value, "__qualname__"):
        yield f"{value.__module__}.{value.__qualname__}"
        inside = ()
    else:
        held = not isinstance(value, (nn.Module, System)) and getattr(value, "__dict__", None)
        inside = (kind, held) if held else (kind,)
    yield f"{kind.__name__} of"
    for part in inside:
        yield from _parts(part, module, seen)


def _used(function: types.FunctionType) -> list[Any]:
    """What a function has as defaults, closes over and names among its module's globals."""
    names = {name for code in _codes(function.__code__) for name in code.co_names}
    found: list[Any] = [function.__defaults__, function.__kwdefaults__]
    for cell in function.__closure__ or ():
        try:
            found.append(cell.cell_contents)
        except ValueError:  # not yet assigned
            continue
    wrapped = getattr(function, "__wrapped__", None)  # of a decorator, as `contextmanager`
    found += [] if wrapped is None else [wrapped]
    return [*found, *(function.__globals__[name] for name in sorted(names & function.__globals__.keys()))]


def tensor_bytes(x: Tensor) -> bytes:
    """The values of a tensor, with its dtype and shape; those of one on the meta device are not known."""
    if x.is_meta:
        return f"{x.dtype} {tuple(x.shape)}".encode()
    real = torch.view_as_real(x) if x.is_complex() else x
    return safetensors.torch.save({"x": real.detach().cpu().contiguous()})


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """The code, and that of the functions written inside of it."""
    yield code
    for one in code.co_consts:
        if isinstance(one, types.CodeType):
            yield from _codes(one)


def _source(value: Any) -> str:
    """Its source; of a lambda, which may share its line with others, what tells it from them, too."""
    try:
        source = inspect.getsource(value)
    except (OSError, TypeError):  # typed into a shell that keeps no source
        source = ""
    code = getattr(value, "__code__", None)
    if code is None or (source and value.__name__ != "<lambda>"):
        return source or value.__qualname__
    parts = [
        (one.co_names, one.co_varnames, [x for x in one.co_consts if not isinstance(x, types.CodeType)])
        for one in _codes(code)
    ]
    return f"{source} {parts} {'' if source else [one.co_code for one in _codes(code)]}"
