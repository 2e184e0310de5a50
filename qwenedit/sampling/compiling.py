"""Compiling the transformer's blocks."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from qwenedit.networks.mmdit import MMDiT
from qwenedit.taps import has_compiled_part, modified

__all__ = ["compile_blocks", "eager_if_modified", "require_compiler"]


def require_compiler() -> None:
    """Raise a ValueError if there is no C++ compiler: torch's own compiler needs one."""
    from torch._inductor import cpp_builder

    try:
        cpp_builder.get_cpp_compiler()
    except Exception as error:  # its class depends on the platform
        raise ValueError(
            f"compile=True needs a C++ compiler, such as g++ or clang++, and none was found: {error}"
        ) from error


def compile_blocks(mmdit: MMDiT) -> None:
    """Compile the transformer's blocks. The first block to run is compiled; the others share its code.

    Last bits differ from those of uncompiled blocks. Other numbers of tokens need no new compilation. Taps,
    hooks and foreign modules work: the blocks run uncompiled meanwhile.

    Raises:
        ValueError: there is no C++ compiler.
    """
    require_compiler()
    for block in mmdit.blocks:
        block.compile(fullgraph=True, dynamic=True)


def eager_if_modified(mmdit: nn.Module) -> AbstractContextManager[None]:
    """In the `with` block, run compiled blocks uncompiled if the model has hooks or foreign modules.

    Code that was compiled before they were added would run without them.
    """
    compiled = has_compiled_part(mmdit) and modified(mmdit)
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()
