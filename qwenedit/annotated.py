"""Options held to their annotations: a value of another type is refused, with what was wanted."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import sys
import types
import typing
from contextlib import suppress
from typing import Any, Literal, Union, get_args, get_origin

from qwenedit.checks import real_number, whole_number
from qwenedit.foreign import shown

__all__ = ["accepted", "check_types"]


def check_types(options: object, group: str) -> None:
    """Every field holds what its annotation says; a wrong word is answered with the right ones.

    A list, from JSON or TOML, becomes a tuple, and a number of NumPy or torch one of Python.
    """
    kind: Any = type(options)
    for name, annotation in _annotations(kind).items():
        value = getattr(options, name)
        alternatives = _alternatives(annotation)
        for one in alternatives:
            with suppress(ValueError):
                object.__setattr__(options, name, _converted(value, one))
                break
        else:
            words = [word for one in alternatives if get_origin(one) is Literal for word in get_args(one)]
            close = difflib.get_close_matches(value, words, n=1) if isinstance(value, str) else []
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            got, wanted = shown(repr(value)), _in_words(annotation)
            raise ValueError(f"{group}.{name} is {got}, wanted {wanted}{hint}")


def accepted(kind: type) -> dict[str, str]:
    """What every field of a class takes, in words."""
    return {name: _in_words(annotation) for name, annotation in _annotations(kind).items()}


@functools.cache  # every run makes switches, and reading annotations takes milliseconds
def _annotations(kind: type) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    return {one.name: hints[one.name] for one in dataclasses.fields(kind)}


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)


def _converted(value: Any, wanted: Any) -> Any:
    """The value as the type `wanted`.

    Raises:
        ValueError: it is of another.
    """
    origin, kinds = get_origin(wanted), get_args(wanted)
    if wanted is float:
        return real_number("", value)
    if wanted is int:
        return whole_number("", value, least=-sys.maxsize)
    if origin is tuple and isinstance(value, (list, tuple)):
        if kinds[-1] is Ellipsis:
            kinds = (kinds[0],) * max(1, len(value))
        return tuple(_converted(one, kind) for one, kind in zip(value, kinds, strict=True))
    if (isinstance(value, str) and value in kinds) if origin else isinstance(value, wanted):
        return value
    raise ValueError(f"{value!r} is no {wanted}")


def _in_words(annotation: Any) -> str:
    return " or ".join(dict.fromkeys(map(_named, _alternatives(annotation))))


def _named(wanted: Any) -> str:
    """One alternative of an annotation in words."""
    kinds = get_args(wanted)
    if get_origin(wanted) is Literal:
        return " or ".join(map(repr, kinds))
    if get_origin(wanted) is tuple:
        names = [_named(one) for one in kinds if one is not Ellipsis]
        return f"a list of {names[0].removeprefix('a ')}s" if len(names) == 1 else f"({', '.join(names)})"
    named = {int: "a whole number", float: "a number", bool: "true or false", str: "a file's name"}
    return "nothing" if wanted is type(None) else named.get(wanted, "a picture")
