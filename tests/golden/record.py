"""Record the golden file with the references: `python -m tests.golden.record` from the repository's root.

Needs diffusers 0.39.0 and transformers 4.57.6. Record again only for a stated reason.
"""

import json
from pathlib import Path

import diffusers
import numpy as np
import torch
import transformers
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift
from safetensors.torch import save_file
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

from tests.golden import models

FILE = Path(__file__).parent / "reference.safetensors"


def fill(module):
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if isinstance(module, Qwen2_5_VLForConditionalGeneration):  # the hub's naming
                name = name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")
            parameter.copy_(models.weight(name, tuple(parameter.shape)))
    return module.eval()


@torch.no_grad()
def main():
    golden = {}
    transformer = fill(diffusers.QwenImageTransformer2DModel(**models.TRANSFORMER))
    img, txt, timestep, mask = models.transformer_inputs()
    golden["transformer.velocity"] = transformer(
        hidden_states=img,
        encoder_hidden_states=txt,
        encoder_hidden_states_mask=mask,
        timestep=timestep,
        img_shapes=[models.GRIDS] * 2,
        return_dict=False,
    )[0]

    autoencoder = {k: list(v) if isinstance(v, tuple) else v for k, v in models.AUTOENCODER.items()}
    vae = fill(diffusers.AutoencoderKLQwenImage(**autoencoder))
    vae.decoder.conv_out.weight.mul_(0.2)
    posterior = vae.encode(models.video()).latent_dist
    golden["vae.mean"], golden["vae.logvar"] = posterior.mean, posterior.logvar
    golden["vae.pixels"] = vae.decode(posterior.mode()).sample

    text_encoder = fill(Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**models.TEXT_ENCODER)))
    ids, attention_mask = models.token_ids()
    grids = torch.tensor(models.PATCH_GRIDS)
    patches = models.seeded("patches", int(grids.prod(-1).sum()), 3 * 2 * 8 * 8)
    golden["text_encoder.position_ids"] = text_encoder.model.get_rope_index(
        ids, grids, attention_mask=attention_mask
    )[0]
    golden["text_encoder.embeds"] = text_encoder(
        input_ids=ids,
        attention_mask=attention_mask,
        pixel_values=patches,
        image_grid_thw=grids,
        output_hidden_states=True,
    ).hidden_states[-1]

    processor = Qwen2VLImageProcessor(patch_size=8, min_pixels=256, max_pixels=65536)
    patches = processor(models.picture(), return_tensors="pt")
    golden["processor.pixel_values"] = patches["pixel_values"]
    golden["processor.grid"] = patches["image_grid_thw"]
    golden["processor.vae_pixels"] = VaeImageProcessor(vae_scale_factor=16).preprocess(
        models.picture(), height=32, width=64
    )
    schedules = []
    for steps, tokens in models.SCHEDULES:
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**models.SCHEDULER)
        scheduler.set_timesteps(
            sigmas=np.linspace(1.0, 1 / steps, steps), mu=calculate_shift(tokens, 256, 8192, 0.5, 0.9)
        )
        schedules.append({"steps": steps, "tokens": tokens, "sigmas": scheduler.sigmas.tolist()})
    (FILE.parent / "sigmas.json").write_text(json.dumps(schedules) + "\n")

    versions = {"diffusers": diffusers.__version__, "transformers": transformers.__version__}
    save_file({name: x.contiguous() for name, x in golden.items()}, FILE, versions)
    print({name: tuple(x.shape) for name, x in golden.items()})


if __name__ == "__main__":
    main()
