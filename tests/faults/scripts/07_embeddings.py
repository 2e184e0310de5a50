import torch
from diffusers import QwenImageEditPipeline
from PIL import Image

image = Image.open("input.png").resize((64, 64))
pipe = QwenImageEditPipeline.from_pretrained("Qwen/Qwen-Image-Edit", torch_dtype=torch.float32)
with torch.no_grad():
    prompt_embeds, prompt_embeds_mask = pipe.encode_prompt(
        image=[image], prompt=["make the circle red"], device="cpu", num_images_per_prompt=1
    )
    negative_prompt_embeds, negative_prompt_embeds_mask = pipe.encode_prompt(image=[image], prompt=[" "])
torch.save({"prompt_embeds": prompt_embeds, "negative_prompt_embeds": negative_prompt_embeds}, "embeds.pt")
del pipe

pipe = QwenImageEditPipeline.from_pretrained(
    "Qwen/Qwen-Image-Edit", text_encoder=None, torch_dtype=torch.float32
)
images = pipe(
    image=image,
    num_images_per_prompt=2,
    prompt_embeds_mask=prompt_embeds_mask,
    negative_prompt_embeds_mask=negative_prompt_embeds_mask,
    num_inference_steps=2,
    generator=torch.Generator().manual_seed(4),
    output_type="pt",
    **torch.load("embeds.pt"),
).images
result = [prompt_embeds, negative_prompt_embeds, images]
