import torch
from diffusers import QwenImageEditPipeline
from PIL import Image

pipe = QwenImageEditPipeline.from_pretrained(
    "Qwen/Qwen-Image-Edit", torch_dtype=torch.float32, device_map="cpu"
)
pipe.enable_model_cpu_offload()
pipe.vae.enable_tiling()
pipe.vae.enable_slicing()
image = Image.open("input.png")
output = pipe(
    image,
    "make the circle red",
    " ",
    num_inference_steps=2,
    height=70,
    width=50,
    generator=torch.Generator(device="cpu").manual_seed(1),
    output_type="pt",
)
result = [output.images]
