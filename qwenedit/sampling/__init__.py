"""`Conditioning` and noise -> latents: the noise schedule, guidance, and the Euler loop."""
