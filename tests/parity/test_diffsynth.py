"""The transformer and the VAE against DiffSynth-Studio's modules, with the same random weights.

Its GELU is another than diffusers'. With `transformer.gelu = "sigmoid"`, an entry of `dialect="diffsynth"`,
nothing else differs.
"""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenedit.encoding.conditioning import Conditioning, Prompt
from qwenedit.networks.mmdit import KEY_TABLE as MMDIT_KEYS
from qwenedit.networks.mmdit import MMDiT, MMDiTConfig
from qwenedit.networks.vae import KEY_TABLE as VAE_KEYS
from qwenedit.networks.vae import VAE, VAEConfig
from qwenedit.parity.oracle_networks import diffsynth_transformer, diffsynth_vae
from qwenedit.parity.report import END_TO_END
from qwenedit.sampling.guidance import TrueCFG
from qwenedit.sampling.sampler import euler
from qwenedit.sampling.scheduler import FlowMatchScheduler, diffsynth_sigmas
from qwenedit.sampling.switched import switched_predictor
from qwenedit.sampling.transformer_switches import switched_transformer
from qwenedit.switches import Switches
from tests import oracles
from tests.parity.test_mmdit import configs, inputs
from tests.support import FP32, assert_close, copy_weights, randomise_, relative_error

oracles.diffsynth("models.qwen_image_dit")  # or skip

forty = settings(max_examples=40)
several = st.lists(
    st.tuples(st.just(1), st.integers(1, 7), st.integers(1, 7)), min_size=2, max_size=4
)  # a target and one to three pictures


def with_values(module):
    """The module, made on the meta device, with room for values; its own tables are real already."""
    for name, value in list(module.named_parameters()):
        parent, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(parent), leaf, torch.nn.Parameter(torch.empty(value.shape)))
    return module


def transformers(config, seed):
    reference = randomise_(with_values(diffsynth_transformer(config)), seed).eval()
    with torch.device("meta"):
        ours = MMDiT(config).eval()
    copy_weights(ours, reference, MMDIT_KEYS)
    return ours, reference


@torch.no_grad()
def theirs(dit, grids, img, txt, timestep):
    """`model_fn_qwen_image`, whose module imports every pipeline: one row, tokens instead of latents."""
    img, target = dit.img_in(img), grids[0][1] * grids[0][2]
    index = None
    if dit.config.zero_cond_t:
        timestep = torch.cat([timestep, timestep * 0])
        index = (torch.arange(img.shape[1]) >= target).int()[None]
    temb = dit.time_text_embed(timestep, img)
    txt = dit.txt_in(dit.txt_norm(txt))
    rope = dit.pos_embed([grids], device=img.device, max_txt_seq_len=txt.shape[1])
    for block in dit.transformer_blocks:
        txt, img = block(
            img, txt, encoder_hidden_states_mask=None, temb=temb, image_rotary_emb=rope, modulate_index=index
        )
    return dit.proj_out(dit.norm_out(img, temb[:1]))


def small_config():
    return MMDiTConfig(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=32,
        num_attention_heads=2, joint_attention_dim=24, guidance_embeds=False, axes_dims_rope=(8, 12, 12),
    )  # fmt: skip


CASES = dict(config=configs(), grids=several, length=st.integers(1, 9), seed=st.integers(0, 1000))


@forty
@given(**CASES)
def test_the_transformer_is_diffsynth_s_but_for_the_gelu(config, grids, length, seed):
    ours, reference = transformers(config, seed)
    img, txt, timestep, _ = inputs(config, grids, 1, length, False, seed)
    wanted = theirs(reference, grids, img, txt, timestep)
    with torch.no_grad():
        assert relative_error(ours(img, txt, timestep, grids), wanted) > 10 * FP32
        switches = Switches(transformer=Switches(dialect="diffsynth").transformer)
        with switched_transformer(ours, switches):
            assert_close(ours(img, txt, timestep, grids), wanted, FP32)


def test_layered_is_diffsynth_s_too():
    config = dataclasses.replace(small_config(), use_layer3d_rope=True, use_additional_t_cond=True)
    ours, reference = transformers(config, 3)
    frames, size, picture = 3, (3, 5), (1, 3, 5)
    img, txt, timestep, _ = inputs(config, [(1, 3 * frames, 5), picture], 1, 6, False, 3)
    target = [(1, *size)] * frames
    zero = torch.zeros(1, dtype=torch.int64)
    with torch.no_grad():
        x, temb = reference.img_in(img), reference.time_text_embed(timestep, img, zero)
        text = reference.txt_in(reference.txt_norm(txt))
        rope = reference.pos_embed([[*target, picture]], device=img.device, max_txt_seq_len=6)
        for block in reference.transformer_blocks:
            text, x = block(x, text, encoder_hidden_states_mask=None, temb=temb, image_rotary_emb=rope)
        wanted = reference.proj_out(reference.norm_out(x, temb))
        with switched_transformer(ours, Switches(dialect="diffsynth")):
            got = ours(img, txt, timestep, [(frames, *size), picture], None, zero)
    assert_close(got, wanted, FP32)


@st.composite
def vae_configs(draw):
    z_dim = draw(st.integers(1, 5))
    return VAEConfig(
        base_dim=draw(st.integers(1, 3)) * 4,
        z_dim=z_dim,
        dim_mult=(1, 2, 4),
        num_res_blocks=draw(st.integers(1, 2)),
        attn_scales=(),
        temperal_downsample=draw(st.sampled_from([(False, True), (True, True)])),
        dropout=0.0,
        latents_mean=(0.3,) * z_dim,
        latents_std=(1.7,) * z_dim,
        input_channels=draw(st.sampled_from([3, 4])),
    )


@settings(max_examples=20)
@given(config=vae_configs(), rows=st.integers(1, 6), columns=st.integers(1, 6), seed=st.integers(0, 1000))
def test_the_vae_is_diffsynth_s(config, rows, columns, seed):
    reference = randomise_(with_values(diffsynth_vae(config)), seed).eval()
    with torch.device("meta"):
        ours = VAE(config).eval()
    copy_weights(ours, reference, VAE_KEYS)
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(1, config.input_channels, 1, 4 * rows, 4 * columns, generator=generator)
    with torch.no_grad():
        got, wanted = ours.encode(pixels), reference.encode(pixels).latent_dist
        assert_close(got.mode(), wanted.mode(), FP32)
        assert_close(got.logvar, wanted.logvar, FP32)
        scale = 0.5 / float(reference.decode(wanted.mode(), return_dict=False)[0].abs().mean() + 1)
        for network in (ours.decoder, reference.decoder):  # within the clamp, where differences show
            network.conv_out.weight.mul_(scale)
            network.conv_out.bias.mul_(scale)
        decoded = reference.decode(wanted.mode(), return_dict=False)[0]
        assert_close(ours.decode(wanted.mode()), decoded, FP32)


@pytest.mark.parametrize("steps", [2, 3, 8, 30, 50])
@pytest.mark.parametrize("tokens", [1, 16, 4096, 7921])
def test_the_schedule_is_diffsynth_s_to_the_bit(steps, tokens):
    official = oracles.diffsynth("diffusion.flow_match").FlowMatchScheduler
    wanted, _ = official.set_timesteps_qwen_image(steps, dynamic_shift_len=tokens)
    assert diffsynth_sigmas(steps, tokens) == [*wanted.tolist(), 0.0]


def test_with_the_official_constants_the_two_schedules_differ_in_last_bits_only():
    constants = SimpleNamespace(
        num_train_timesteps=1000, shift=1.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9,
        base_image_seq_len=256, max_image_seq_len=8192, shift_terminal=0.02, time_shift_type="exponential",
    )  # fmt: skip
    ours = FlowMatchScheduler(**vars(constants)).sigmas(50, 4096)
    assert_close(torch.tensor(diffsynth_sigmas(50, 4096)), torch.tensor(ours), 1e-6)


@pytest.mark.parametrize(("steps", "zero_cond_t"), [(2, False), (5, True)])
@torch.no_grad()
def test_a_run_is_diffsynth_s(steps, zero_cond_t):
    """Its network, `cfg_guided_model_fn` and its scheduler's schedule and step, two pictures, odd grids."""
    config = dataclasses.replace(small_config(), zero_cond_t=zero_cond_t)
    ours, reference = transformers(config, 5)
    grids = [(1, 5, 3), (1, 4, 7), (1, 3, 3)]
    img, prompt, _, _ = inputs(config, grids, 1, 6, False, 5)
    start, *references = img.split([15, 28, 9], dim=1)
    negative = torch.randn(1, 4, 24, generator=torch.Generator().manual_seed(1))
    scheduler = oracles.diffsynth("diffusion.flow_match").FlowMatchScheduler("Qwen-Image")
    scheduler.set_timesteps(steps, dynamic_shift_len=15)
    x = start
    for timestep in scheduler.timesteps:
        at = torch.cat([x, *references], dim=1)
        cond, uncond = (
            theirs(reference, grids, at, txt, timestep[None] / 1000)[:, :15] for txt in (prompt, negative)
        )
        x = scheduler.step(uncond + 4.0 * (cond - uncond), timestep, x)

    switches = Switches(dialect="diffsynth")
    conditioning = Conditioning(
        prompt=Prompt(prompt), negative=Prompt(negative), target_grid=grids[0],
        reference_latents=(tuple(x[0] for x in references),), reference_grids=(tuple(grids[1:]),),
    )  # fmt: skip
    predict = switched_predictor(ours, conditioning, switches, guided=True)
    sigmas = diffsynth_sigmas(steps, 15)
    *_, last = euler(predict, start, sigmas, TrueCFG(4.0, switches.guidance))
    assert_close(last.after, x, END_TO_END)
