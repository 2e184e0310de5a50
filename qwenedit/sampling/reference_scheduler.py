"""Schedulers of the reference as a schedule and a sampler of ours; its package is not needed for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qwenedit.foreign import shown
from qwenedit.sampling.scheduler import CURVES, FlowMatchScheduler

__all__ = ["from_reference"]

_FLOW = {
    "use_flow_sigmas": True, "prediction_type": "flow_prediction", "solver_order": 2, "thresholding": False,
    "final_sigmas_type": "zero", **{f"use_{name}_sigmas": False for name in CURVES},
}  # fmt: skip
# The sampler of a class, and the values that its config must have for that.
_CLASSES: dict[str, tuple[str | None, dict[str, Any]]] = {
    "FlowMatchEulerDiscreteScheduler": (None, {}),  # or the stochastic sampler: its config says which
    "FlowMatchHeunDiscreteScheduler": ("heun", {}),
    "DPMSolverMultistepScheduler": (
        "dpmpp_2m",
        {**_FLOW, "algorithm_type": "dpmsolver++", "solver_type": "midpoint", "use_lu_lambdas": False},
    ),
    "UniPCMultistepScheduler": (
        "unipc",
        {
            **_FLOW, "solver_type": "bh2", "predict_x0": True, "lower_order_final": True,
            "disable_corrector": [], "solver_p": None,
        },
    ),
}  # fmt: skip
# What the pipelines take for keys that the config of another class than Euler's lacks.
_ABSENT = {
    "shift": 1.0, "use_dynamic_shifting": False, "time_shift_type": "exponential", "shift_terminal": None,
    "base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15,
    "stochastic_sampling": False, **{f"use_{name}_sigmas": False for name in CURVES},
}  # fmt: skip


def from_reference(scheduler: Any) -> tuple[dict[str, Any], str | None]:
    """The keys of the schedule's config, and the sampler's name; None is the one that the config says.

    Of `FlowMatchEulerDiscreteScheduler` all options count. `UniPCMultistepScheduler` is ours in its flow
    form, the schedule that of its `flow_shift`, or of dynamic shifting as the pipelines pass it on. They
    refuse `DPMSolverMultistepScheduler` and `FlowMatchHeunDiscreteScheduler`, which take no sigmas; here
    those have the same schedule, by the keys that `from_config` copies from the checkpoint's.

    Raises:
        ValueError: another scheduler, or a config that no sampler of ours equals.
    """
    if isinstance(scheduler, FlowMatchScheduler):
        return scheduler.config, None
    config, name = getattr(scheduler, "config", None), type(scheduler).__name__
    if not isinstance(config, Mapping) or name not in _CLASSES:
        raise ValueError(
            f"the scheduler is a {name}, wanted a FlowMatchEulerDiscreteScheduler or one of "
            f"{', '.join(list(_CLASSES)[1:])}: for other steps loop over pipe.steps(conditioning), which "
            "takes changes"
        )
    sampler, needed = _CLASSES[name]
    for key, wanted in needed.items():
        if (got := config.get(key, wanted)) != wanted:
            raise ValueError(f"the scheduler: {key} is {shown(repr(got))}, wanted {wanted!r} in a {name}")
    if sampler is None:
        return {**config, "shift": getattr(scheduler, "shift", config.get("shift"))}, None  # `set_shift`
    known = {key: config.get(key, absent) for key, absent in _ABSENT.items()}
    return {**known, "shift": config.get("flow_shift", known["shift"])}, sampler
