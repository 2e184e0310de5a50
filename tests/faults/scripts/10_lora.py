import torch
from diffusers import QwenImageEditPipeline
from PIL import Image

pipe = QwenImageEditPipeline.from_pretrained("Qwen/Qwen-Image-Edit", torch_dtype=torch.float32).to("cpu")
pipe.load_lora_weights(".", weight_name="style.safetensors", adapter_name="style")
pipe.load_lora_weights("light.safetensors", adapter_name="light")
pipe.set_adapters(["style", "light"], adapter_weights=[0.5, 0.8])
assert pipe.transformer.config.in_channels == 64 and pipe.text_encoder is not None
assert pipe.tokenizer is not None and pipe.processor is not None
options = {
    "image": Image.open("input.png"),
    "prompt": "make the circle red",
    "num_inference_steps": 2,
    "true_cfg_scale": 1.0,
    "output_type": "latent",
}
changed = pipe(generator=torch.manual_seed(0), **options).images
half = pipe(generator=torch.manual_seed(0), attention_kwargs={"scale": 0.5}, **options).images
pipe.unload_lora_weights()
result = [changed, half, pipe(generator=torch.manual_seed(0), **options).images]
