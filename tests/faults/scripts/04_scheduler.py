import torch
from diffusers import FlowMatchEulerDiscreteScheduler, QwenImageEditPipeline
from PIL import Image

pipe = QwenImageEditPipeline.from_pretrained("Qwen/Qwen-Image-Edit", torch_dtype=torch.float32)
image = Image.open("input.png")
options = {"num_inference_steps": 3, "true_cfg_scale": 1.0, "output_type": "latent"}
result = []
scheduler = FlowMatchEulerDiscreteScheduler.from_config(
    pipe.scheduler.config, use_dynamic_shifting=False, shift=3.0
)
for shift in (None, 1.5):
    if shift is not None:
        scheduler.set_shift(shift)
    pipe.scheduler = scheduler
    output = pipe(image, "make the circle red", generator=torch.manual_seed(2), **options)
    result.append(output.images)
