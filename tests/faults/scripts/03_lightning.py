import math

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline

# From https://github.com/ModelTC/Qwen-Image-Lightning
scheduler_config = {
    "base_image_seq_len": 256,
    "base_shift": math.log(3),
    "invert_sigmas": False,
    "max_image_seq_len": 8192,
    "max_shift": math.log(3),
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "shift_terminal": None,
    "stochastic_sampling": False,
    "time_shift_type": "exponential",
    "use_beta_sigmas": False,
    "use_dynamic_shifting": True,
    "use_exponential_sigmas": False,
    "use_karras_sigmas": False,
}
scheduler = FlowMatchEulerDiscreteScheduler.from_config(scheduler_config)
pipe = QwenImagePipeline.from_pretrained("Qwen/Qwen-Image", scheduler=scheduler, torch_dtype=torch.float32)
pipe = pipe.to("cpu")
images = pipe(
    "a red circle",
    negative_prompt=" ",
    width=64,
    height=48,
    num_inference_steps=4,
    true_cfg_scale=1.0,
    generator=torch.manual_seed(0),
    output_type="np",
).images
result = [images]
