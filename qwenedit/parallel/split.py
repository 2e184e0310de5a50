"""Split the weights of networks over the processes of a run, on the meta device, before they are read.

    split_weights   each process keeps a part of every weight; a block's are gathered while it runs
    split_heads     each process keeps some heads and a part of the MLP, and computes with them alone

`weights.loading` then reads each process's own part. The modules stay the same, and so do their forwards:
torch adds hooks to them, which are noted as transparent (`taps.modified`), so that what is computed once a
run or once a step stays so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)

from qwenedit.foreign import shown
from qwenedit.memory.residency import BLOCK_LISTS
from qwenedit.memory.sharing import SPLIT_LAYERS, SPLIT_NETWORKS
from qwenedit.networks.mmdit import Block, MMDiT
from qwenedit.parallel.processes import Processes
from qwenedit.weights.formats import Stored
from qwenedit.weights.report import Compared

__all__ = ["require_plain", "split", "split_heads", "split_weights"]


def split(compared: Sequence[Compared], processes: Processes, *, weights: bool) -> None:
    """Split networks that are to be read: with `weights` by `split_weights`, else by `split_heads`.

    Raises:
        ValueError: fp8 or GGUF weights, of which no parts can be read.
    """
    names = SPLIT_NETWORKS if weights else ("transformer",)
    # With `weights` over all processes, whatever their axes: each holds the same share.
    mesh = (
        init_device_mesh(processes.device.type, (processes.count,)) if weights else processes.mesh["tensor"]
    )
    for module, found, report in compared:
        if report.component not in names:
            continue
        require_plain(found)
        if weights:
            split_weights(module, report.component, mesh)
        else:
            split_heads(cast(MMDiT, module), mesh)


def require_plain(found: Mapping[str, Stored]) -> None:
    """Raise a ValueError unless parts of these weights can be read."""
    if (strange := next((stored for stored in found.values() if not stored.plain), None)) is not None:
        raise ValueError(
            f"split weights are read in parts, but {shown(strange.key)} of {strange.path} is stored as "
            f"{strange.dtype}: wanted bfloat16, float16 or float32, or weights that are not split"
        )


def split_weights(network: nn.Module, component: str, mesh: DeviceMesh, *, keep_rest: bool = True) -> None:
    """Split every weight of the blocks by its first dimension over the processes of a mesh with one axis.

    A block's weights are gathered when it is called, and dropped after it. The adaLN layers of a transformer
    block are gathered apart, so only once a step. The rest of the transformer is gathered in the first
    forward, and stays, unless `keep_rest` is False, as in training, where it changes; that of the text
    encoder is not split.

    Source: `torch.distributed.fsdp.fully_shard`; the arithmetic is that of one process.
    """
    for path in BLOCK_LISTS[component]:
        for block in network.get_submodule(path).children():
            apart = [block.img_mod, block.txt_mod] if isinstance(block, Block) else []
            for module in (*apart, block):
                _shard(module, mesh, drop=True)
    if component == "transformer":
        _shard(network, mesh, drop=not keep_rest)
    _note_hooks(network)


def _shard(module: nn.Module, mesh: DeviceMesh, *, drop: bool) -> None:
    own = type(module).__module__
    fully_shard(module, mesh=mesh, reshard_after_forward=drop)
    type(module).__module__ = own  # of the class that torch derives; `taps.modified` looks at it


def split_heads(mmdit: MMDiT, mesh: DeviceMesh) -> None:
    """Split heads, MLPs and adaLN layers of the blocks over the processes of a mesh with one axis.

    The streams are whole in every process. Attention and MLP sum their outputs over the processes, so last
    digits differ from those of one process. adaLN vectors are computed in parts and gathered. What is in no
    block is not split.

    Source: Megatron-LM (arXiv 1909.08053), with `torch.distributed.tensor.parallel`.
    """
    plan: dict[str, ParallelStyle] = {
        layer: ColwiseParallel() if dim == 0 else RowwiseParallel() for layer, dim in SPLIT_LAYERS.items()
    }
    for modulation in ("img_mod.linear", "txt_mod.linear"):
        plan[modulation] = ColwiseParallel(output_layouts=Replicate())
    for block in mmdit.blocks:
        parallelize_module(block, mesh, plan)
    _note_hooks(mmdit)


def _note_hooks(network: nn.Module) -> None:
    for module in network.modules():
        if hooks := {*module._forward_hooks, *module._forward_pre_hooks}:
            module.__dict__["_transparent_hooks"] = frozenset(hooks)
