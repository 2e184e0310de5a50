"""The networks and the sampling loop work when copied out of the package, without its other files."""

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "qwenedit"

# Run in the new folder. The script declares the package itself, so that an installed one is not found.
SCRIPT = textwrap.dedent("""
    import importlib
    import sys
    import types
    from pathlib import Path

    import torch

    folder = Path.cwd() / "qwenedit"
    package = sys.modules["qwenedit"] = types.ModuleType("qwenedit")
    package.__path__ = [str(folder)]
    for file in sorted(folder.rglob("*.py")):
        importlib.import_module(".".join(file.relative_to(folder.parent).with_suffix("").parts))

    from qwenedit.networks.mmdit import MMDiT, MMDiTConfig
    from qwenedit.networks.vae import VAE, VAEConfig
    from qwenedit.sampling.sampler import euler

    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    mmdit = MMDiT(MMDiTConfig(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=24, guidance_embeds=False, axes_dims_rope=(4, 6, 6),
    ))
    grids = [(1, 2, 3), (1, 3, 2)]
    noise, reference, txt = torch.randn(1, 6, 16), torch.randn(1, 6, 16), torch.randn(1, 5, 24)

    def velocity(latents, sigma):
        img = torch.cat([latents, reference], dim=1)
        return mmdit(img, txt, torch.tensor([sigma]), grids)[:, : latents.shape[1]]

    steps = list(euler(lambda latents, sigma: (velocity(latents, sigma), None), noise, [1.0, 0.5, 0.0]))
    wanted = noise
    for sigma in (1.0, 0.5):
        wanted = wanted - 0.5 * velocity(wanted, sigma)
    assert len(steps) == 2 and not torch.equal(wanted, noise)
    torch.testing.assert_close(steps[-1].after, wanted)

    vae = VAE(VAEConfig(
        base_dim=4, z_dim=4, dim_mult=(1, 2, 3, 3), num_res_blocks=1, attn_scales=(), dropout=0.0,
        temperal_downsample=(False, True, True), latents_mean=(0.0,) * 4, latents_std=(1.0,) * 4,
    ))
    for frames in (1, 5):
        pixels = torch.rand(1, 3, frames, 16, 24) * 2 - 1
        latents = vae.encode(pixels).mode()
        assert latents.shape == (1, 4, 1 + frames // 4, 2, 3)
        decoded = vae.decode(latents)
        assert decoded.shape == pixels.shape and decoded.isfinite().all()

    for name, module in sys.modules.items():
        if name.startswith("qwenedit.") and (file := module.__file__) is not None:
            assert folder in Path(file).parents, f"{name} is {file}"
    print("works")
""")


def test_networks_and_sampler_work_alone(tmp_path):
    for name in ("taps.py", "sampling/sampler.py"):
        (tmp_path / "qwenedit" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(PACKAGE / name, tmp_path / "qwenedit" / name)
    caches = shutil.ignore_patterns("__pycache__")
    shutil.copytree(PACKAGE / "networks", tmp_path / "qwenedit" / "networks", ignore=caches)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert (run.returncode, run.stdout) == (0, "works\n"), run.stderr
