import torch
from diffusers import QwenImageEditPipeline
from PIL import Image

pipeline = QwenImageEditPipeline.from_pretrained(
    "Qwen/Qwen-Image-Edit",
    torch_dtype=torch.float32,
    revision=None,
    variant=None,
    use_safetensors=True,
    low_cpu_mem_usage=True,
    local_files_only=True,
    cache_dir=None,
    token=None,
)
pipeline.to(torch.float32)
pipeline.to("cpu")
pipeline.set_progress_bar_config(disable=True)
image = Image.open("input.png").convert("RGB")
inputs = {
    "image": image,
    "prompt": "make the circle red",
    "generator": torch.manual_seed(0),
    "true_cfg_scale": 4.0,
    "num_inference_steps": 3,
}
with torch.inference_mode():
    output = pipeline(**inputs)
    output_image = output.images[0]
    output_image.save("output_image_edit.png")
result = [output.images]
