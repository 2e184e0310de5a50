import torch
from diffusers import QwenImageEditPipeline
from PIL import Image

pipe = QwenImageEditPipeline.from_pretrained("Qwen/Qwen-Image-Edit", torch_dtype=torch.float32)
seen, times = [], []


def dim_and_stop(pipe, step, timestep, callback_kwargs):
    latents = callback_kwargs["latents"]
    seen.append(latents)
    times.append(timestep)
    if step == 0:
        callback_kwargs["latents"] = 0.9 * latents
    if step == 1:
        callback_kwargs["prompt_embeds"] = 0.5 * callback_kwargs["prompt_embeds"]
    if step == pipe.num_timesteps - 2:
        pipe._interrupt = True
    return callback_kwargs


images = pipe(
    image=Image.open("input.png"),
    prompt="make the circle red",
    negative_prompt="blurry",
    num_inference_steps=5,
    generator=torch.Generator().manual_seed(3),
    callback_on_step_end=dim_and_stop,
    callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"],
    output_type="pt",
).images
result = [images, torch.stack(seen), torch.stack(times)]
