import torch
from diffusers import QwenImageEditPlusPipeline
from PIL import Image

pipe = QwenImageEditPlusPipeline.from_pretrained("Qwen/Qwen-Image-Edit-2509", torch_dtype=torch.float32)
pipe.set_progress_bar_config(disable=None)
images = [Image.open("input.png"), Image.open("other.png")]
(pictures,) = pipe(
    image=images,
    prompt="the circle of picture 1 in the colour of picture 2",
    negative_prompt=" ",
    num_inference_steps=2,
    guidance_scale=1.0,
    num_images_per_prompt=2,
    generator=[torch.Generator("cpu").manual_seed(seed) for seed in (5, 6)],
    output_type="np",
    return_dict=False,
)
result = [pictures]
