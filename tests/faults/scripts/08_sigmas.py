import numpy as np
import torch
from diffusers import QwenImagePipeline

pipe = QwenImagePipeline.from_pretrained("Qwen/Qwen-Image", torch_dtype=torch.float32)
options = {"height": 48, "width": 64, "output_type": "latent"}
result = []
for sigmas in (np.linspace(1.0, 1 / 4, 4), [1.0, 0.6, 0.0], np.linspace(1, 0, 4, dtype=np.float32)):
    latents = pipe("a red circle", " ", 2.5, sigmas=sigmas, generator=torch.manual_seed(7), **options).images
    result.append(latents)
prompts = ["a red circle", "一个蓝色的正方形 in the dark"]
embeds, mask = pipe.encode_prompt(prompts, max_sequence_length=14)
result.append(
    pipe(
        prompt_embeds=embeds,
        prompt_embeds_mask=mask,
        generator=torch.manual_seed(8),
        num_inference_steps=2,
        **options,
    ).images
)
result += [embeds, mask]
