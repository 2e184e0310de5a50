"""Record what the tests lack: `python -m tests.golden.record_samplers` from the repository's root.

Needs diffusers 0.42.1, which the pinned 0.39.0 excludes, and scipy, for example from a folder of their own:

    pip install --target other diffusers==0.42.1 scipy==1.17.1
    PYTHONPATH=other python -m tests.golden.record_samplers

Record again only for a stated reason.
"""

import diffusers
import numpy as np
import scipy
import torch
from safetensors.torch import save_file

from qwenedit.sampling.scheduler import FlowMatchScheduler
from tests.golden import models


def main():
    golden = {}
    for steps, tokens in models.SAMPLED:
        mu = FlowMatchScheduler(**models.SCHEDULER).mu(tokens)
        even = np.linspace(1.0, 1 / steps, steps)
        flow = {**models.SCHEDULER, "use_flow_sigmas": True, "prediction_type": "flow_prediction"}
        for name, scheduler in {
            "unipc": diffusers.UniPCMultistepScheduler.from_config(flow),
            "stochastic": diffusers.FlowMatchEulerDiscreteScheduler(
                **models.SCHEDULER, stochastic_sampling=True
            ),
            "beta": diffusers.FlowMatchEulerDiscreteScheduler(**models.SCHEDULER, use_beta_sigmas=True),
        }.items():
            scheduler.set_timesteps(sigmas=even, mu=mu)
            scheduler.set_begin_index(0)
            golden[f"{name}.{steps}.{tokens}.sigmas"] = scheduler.sigmas
            draws = {"generator": torch.Generator().manual_seed(steps)} if name == "stochastic" else {}
            latents, after = models.sampled_latents(steps), []
            for sigma, time in zip(scheduler.sigmas, scheduler.timesteps, strict=False):
                velocity = models.sampled_field(latents, sigma.item())
                latents = scheduler.step(velocity, time, latents, **draws, return_dict=False)[0]
                after.append(latents)
            golden[f"{name}.{steps}.{tokens}.latents"] = torch.stack(after)
    p = np.linspace(0, 1, 201)
    golden["beta.quantiles"] = torch.from_numpy(scipy.stats.beta.ppf(p, 0.6, 0.6))
    tiny = np.logspace(-12, -3, 10)
    golden["beta.tail"] = torch.from_numpy(scipy.stats.beta.ppf(tiny, 0.6, 0.6))
    versions = {"diffusers": diffusers.__version__, "scipy": scipy.__version__}
    save_file({name: x.contiguous() for name, x in golden.items()}, models.SAMPLERS, versions)
    print(versions, {name: tuple(x.shape) for name, x in golden.items()})


if __name__ == "__main__":
    main()
