"""A list of every operation that a module runs, with its line of source, whether there is a tap or not."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import einops
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from qwenedit.taps import require_module, tensors_in

__all__ = ["Op", "trace_ops"]


@dataclass(frozen=True)
class Op:
    """One tensor that an operation made: its module, and the line of source that called the operation."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    module: str
    line: str


_LIBRARIES = tuple(
    str(Path(package.__file__).parent) + os.sep for package in (torch, einops) if package.__file__
)


class _Trace(TorchFunctionMode):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.paths = {id(module): path for path, module in model.named_modules()}
        self.ops: list[Op] = []

    def __torch_function__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = tensors_in(result)
        if made and (place := self.place()) is not None:
            name = func.__name__.strip("_") if func.__name__ != "__get__" else func.__self__.__name__
            self.ops += [Op(name, tuple(x.shape), x.dtype, *place) for x in made]
        return result

    def place(self) -> tuple[str, str] | None:
        """The innermost module of the model on the stack, and the innermost line outside the libraries."""
        path, line, frame = None, None, sys._getframe(2)
        while frame is not None and (path is None or line is None):
            if path is None:
                path = self.paths.get(id(frame.f_locals.get("self")))
            if line is None and not frame.f_code.co_filename.startswith(_LIBRARIES):
                line = f"{frame.f_code.co_filename}:{frame.f_lineno}"
            frame = frame.f_back  # type: ignore[assignment]
        return None if path is None or line is None else (path, line)


@contextmanager
def trace_ops(model: nn.Module) -> Iterator[list[Op]]:
    """List every tensor that an operation inside the model makes, views included, in order.

    Compiled modules run eagerly meanwhile.

        with torch.no_grad(), trace_ops(pipe.mmdit) as ops:
            pipe.edit(picture, "make the circle red", num_inference_steps=1)
    """
    require_module(model)
    with torch.compiler.set_stance("force_eager"), _Trace(model) as trace:
        yield trace.ops
