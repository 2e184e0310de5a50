import torch
from diffusers import QwenImageLayeredPipeline
from PIL import Image

pipeline = QwenImageLayeredPipeline.from_pretrained("Qwen/Qwen-Image-Layered", torch_dtype=torch.float32)
pipeline.set_progress_bar_config(disable=True)
image = Image.open("input.png").convert("RGBA")
inputs = {
    "image": image,
    "prompt": "a red circle",
    "generator": torch.Generator(device="cpu").manual_seed(777),
    "true_cfg_scale": 4.0,
    "negative_prompt": " ",
    "num_inference_steps": 2,
    "num_images_per_prompt": 1,
    "layers": 2,
    "resolution": 640,
    "cfg_normalize": True,
    "use_en_prompt": True,
}
with torch.inference_mode():
    output = pipeline(**inputs)
    output_image = output.images[0]
for i, layer in enumerate(output_image):
    layer.save(f"{i}.png")
result = [output_image]
