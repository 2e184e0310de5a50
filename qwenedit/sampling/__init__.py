"""From a `Conditioning` and noise to latents: the noise schedule, guidance, and the Euler loop."""
