"""Compiling the transformer's blocks."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from qwenedit.networks.mmdit import MMDiT
from qwenedit.taps import modified

__all__ = ["compile_blocks", "eager_if_modified", "require_compiler"]


def require_compiler() -> None:
    """Raise a ValueError where there is no C++ compiler: torch's own compiler needs one."""
    from torch._inductor import cpp_builder

    try:
        cpp_builder.get_cpp_compiler()
    except Exception as error:  # of a kind that depends on the platform
        raise ValueError(
            f"compile=True needs a C++ compiler, such as g++ or clang++, and none was found: {error}"
        ) from error


def compile_blocks(mmdit: MMDiT) -> None:
    """Compile the transformer's blocks: one block, on its first run, and with that all the others.

    Last bits differ from those of the uncompiled blocks. The numbers of tokens may change without another
    compilation. Taps, hooks and foreign modules work: the blocks run uncompiled meanwhile.

    Raises:
        ValueError: there is no C++ compiler.
    """
    require_compiler()
    for block in mmdit.blocks:
        block.compile(fullgraph=True, dynamic=True)


def eager_if_modified(mmdit: nn.Module) -> AbstractContextManager[None]:
    """Run uncompiled in the `with` block if a block is compiled and there are hooks or foreign modules.

    What was compiled before they came would run without them.
    """
    compiled = any(
        module._compiled_call_impl is not None for module in mmdit.modules() if module is not mmdit
    )
    return torch.compiler.set_stance("force_eager") if compiled and modified(mmdit) else nullcontext()
