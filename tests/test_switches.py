"""Every switch does what its docstring says, and the defaults change no bit."""

import dataclasses
import json
import math
from pathlib import Path

import diffusers
import pytest
import torch
from PIL import Image

import qwenedit
from qwenedit import mini
from qwenedit.encoding.conditioning import Conditioning, Prompt
from qwenedit.inputs.pictures import resize_rgb, vae_pixels
from qwenedit.inputs.rows import rows_of
from qwenedit.latents import denormalise, initial_noise, normalise, pack, unpack
from qwenedit.networks.mmdit_layers import picture_positions, rope_table
from qwenedit.sampling.guidance import TrueCFG
from qwenedit.sampling.predictor import predictor
from qwenedit.sampling.sampler import euler
from qwenedit.sampling.switched import changed, schedule
from qwenedit.switches import Guidance, References, Seen, Switches, Time, VAEPath, own_generator
from qwenedit.taps import taps
from tests.support import FP32, assert_close

PROMPT = "make the circle red"
STEPS = 3


@pytest.fixture(scope="module")
def scene():
    return Image.open(mini.EXAMPLE).convert("RGB")


@pytest.fixture(scope="module")
def other():
    image = Image.new("RGB", (64, 64), (30, 160, 60))
    image.paste((220, 40, 40), (10, 12, 30, 36))
    return image


def latents(pipe, image, switches=None, **options):
    options = {"num_inference_steps": STEPS, "generator": torch.Generator().manual_seed(0), **options}
    return pipe.edit(image, PROMPT, output_type="latent", switches=switches, **options).images


@torch.no_grad()
def walk(pipe, image, switches=None, conditioning=None, **options):
    """All steps of an edit; `conditioning` in place of the picture's own."""
    conditioning = conditioning or pipe.condition(image, PROMPT, switches=switches)
    options = {"num_inference_steps": STEPS, "generator": torch.Generator().manual_seed(0), **options}
    return list(pipe.steps(conditioning, switches=switches, **options))


def same_steps(a, b):
    return all(
        torch.equal(x.cond, y.cond) and torch.equal(x.uncond, y.uncond) for x, y in zip(a, b, strict=True)
    )


# --- defaults


def bare_loop(pipe, conditioning, generator):
    """The run without any code of the switches."""
    noise = initial_noise(
        1, 16, conditioning.target_grid, generator=generator, device=pipe.device, dtype=pipe.dtype
    )
    with torch.no_grad():
        predict = predictor(pipe.mmdit, conditioning, guided=True)
        *_, last = euler(predict, noise, pipe.scheduler.sigmas(STEPS, 16), TrueCFG(4.0))
    return last.after


def test_defaults_change_no_bit(edit, plus, scene, other):
    """Against encoders, predictor, guidance and loop called by hand."""
    plain = Switches()
    assert plain.flat() == {} and plain.encoding == plain
    for pipe, image in ((edit, scene), (plus, [scene, other])):
        rows = rows_of(PROMPT, " ", image, pipe.variant, pipe.areas, None, None)
        pictures = [[resize_rgb(x, *plan.vl) for x, plan in row.planned] for row in rows]
        made = []
        for text in (PROMPT, " "):
            tokens = pipe.processor([text], pictures, pipe.variant.template)
            with torch.no_grad():
                hidden = pipe.vision_language(
                    tokens.input_ids, tokens.attention_mask, tokens.pixel_values, tokens.image_grid_thw
                )
            made.append(Prompt(hidden[:, tokens.drop_index :]))
        config = pipe.vae.config
        with torch.no_grad():
            raw = [pipe.vae.encode(vae_pixels(x, *p.vae)[:, :, None]).mode() for x, p in rows[0].planned]
        references = [pack(normalise(x, config.latents_mean, config.latents_std))[0] for x in raw]
        conditioning = Conditioning(
            prompt=made[0], negative=made[1], target_grid=(1, 4, 4),
            reference_latents=(tuple(references),), reference_grids=(((1, 4, 4),) * len(references),),
        )  # fmt: skip
        wanted = bare_loop(pipe, conditioning, torch.Generator().manual_seed(0))
        assert torch.equal(latents(pipe, image, plain), wanted)
        assert torch.equal(latents(pipe, image), wanted)


def test_full_intervals_and_the_model_s_own_settings_change_no_bit(edit, scene):
    switches = Switches(
        references=References(steps=(0, STEPS), blocks=(0, 6), order=(0,)), time=Time(zero_cond_t=False)
    )
    assert torch.equal(latents(edit, scene), latents(edit, scene, switches))


# --- the reference latents


def test_left_out_is_the_same_run_from_a_conditioning_without_reference_latents(edit, scene):
    conditioning = edit.condition(scene, PROMPT)
    bare = dataclasses.replace(conditioning, reference_latents=((),), reference_grids=((),))
    switches = Switches(references=References(latents="left_out"))
    assert same_steps(walk(edit, scene, switches), walk(edit, scene, conditioning=bare))


@pytest.mark.parametrize("kind", ["zeroed", "noise", "noised", "other"])
def test_replaced_latents_are_the_same_run_from_a_conditioning_that_holds_them(edit, scene, other, kind):
    conditioning = edit.condition(scene, PROMPT)
    ((own,),) = conditioning.reference_latents
    noise = torch.randn(own.shape, generator=own_generator(5, "references", 0))
    ((others,),) = edit.condition(other, PROMPT).reference_latents
    wanted, references = {
        "zeroed": (torch.zeros_like(own), References(latents="zeroed")),
        "noise": (noise, References(latents="noise", seed=5)),
        "noised": (0.75 * own + 0.25 * noise, References(sigma=0.25, seed=5)),
        "other": (others, References(latents="other", picture=other)),
    }[kind]
    changed = dataclasses.replace(conditioning, reference_latents=((wanted,),))
    steps = walk(edit, scene, Switches(references=references))
    assert same_steps(steps, walk(edit, scene, conditioning=changed))
    assert not torch.equal(steps[-1].after, walk(edit, scene)[-1].after)


def test_several_pictures_get_noise_of_their_own_and_rows_the_same(plus, scene, other):
    conditioning = plus.condition([scene, other], [PROMPT, "remove the square"])
    (first, second), again = changed(conditioning, References(latents="noise")).reference_latents
    assert not torch.equal(first, second)
    assert torch.equal(first, again[0]) and torch.equal(second, again[1])


def test_another_picture_is_brought_to_the_size_of_the_one_that_it_replaces(edit, scene, other, tmp_path):
    other.resize((200, 30)).save(tmp_path / "wide.png")
    switches = Switches(references=References(latents="other", picture=str(tmp_path / "wide.png")))
    assert edit.condition(scene, PROMPT, switches=switches).reference_grids == (((1, 4, 4),),)
    gone = Switches(references=References(latents="other", picture=str(tmp_path / "gone.png")))
    with pytest.raises(ValueError, match=r"no such picture: .*gone\.png"):
        latents(edit, scene, gone)


def test_steps_outside_the_interval_run_without_references(edit, scene):
    steps = walk(edit, scene, Switches(references=References(steps=(1, 2))))
    conditioning = edit.condition(scene, PROMPT)
    for present in (True, False):
        switches = Switches(references=References(latents="concatenated" if present else "left_out"))
        for step in steps:
            (alone,) = walk(
                edit, scene, dataclasses.replace(switches, time=Time(sigmas=(step.sigma,))), conditioning,
                num_inference_steps=1, latents=step.latents,
            )  # fmt: skip
            assert torch.equal(alone.cond, step.cond) == (present == (step.index == 1))


def test_blocks_outside_the_interval_hide_the_references(edit, scene):
    """Recomputed with explicit attention whose scores for reference keys are set to minus infinity."""

    def hide(scores, site):
        layout = site.labels["layout"]
        (reference,) = map(layout.in_joint, layout.references)
        scores = scores.clone()
        scores[:, :, : reference.start, reference] = float("-inf")
        return scores

    hidden = {f"blocks.{i}.attn.scores": hide for i in (0, 1, 4, 5)}
    with taps(edit.mmdit, hidden):
        wanted = walk(edit, scene)
    steps = walk(edit, scene, Switches(references=References(blocks=(2, 4))))
    plain = walk(edit, scene)
    assert_close(steps[0].cond, wanted[0].cond, FP32)
    assert (steps[0].cond - plain[0].cond).abs().max() > 0.01
    assert not any(block._forward_pre_hooks for block in edit.mmdit.blocks)


def test_hidden_in_all_blocks_is_as_good_as_left_out_and_keeps_padding_masked(edit, scene):
    """A batch of prompts of different lengths has a mask of its own."""
    prompts = [PROMPT, "make the background of this picture a green one"]
    made = [
        edit.edit(
            scene, prompts, num_inference_steps=2, output_type="latent", switches=Switches(references=one),
            generator=[torch.Generator().manual_seed(seed) for seed in (1, 2)],
        ).images
        for one in (References(blocks=(0, 0)), References(latents="left_out"))
    ]  # fmt: skip
    assert (made[0] - made[1]).abs().max() < 1e-4


def test_order_swaps_what_the_transformer_sees_and_not_what_the_language_model_sees(plus, scene, other):
    swapped = Switches(references=References(order=(1, 0)))
    conditioning = plus.condition([scene, other], PROMPT)
    ((first, second),) = conditioning.reference_latents
    changed = dataclasses.replace(conditioning, reference_latents=((second, first),))
    steps = walk(plus, [scene, other], swapped)
    assert same_steps(steps, walk(plus, None, conditioning=changed))
    assert not torch.equal(steps[0].cond, walk(plus, [scene, other])[0].cond)


def test_frame_gives_reference_tokens_the_positions_of_the_target(edit, scene):
    def of_target(_table, site):
        position = picture_positions(0, (1, 4, 4), torch.device("cpu"))
        return rope_table(torch.cat([position, position]), site.module.axes)

    with taps(edit.mmdit, {"rope.img": of_target}):
        wanted = walk(edit, scene)
    steps = walk(edit, scene, Switches(references=References(frame="target")))
    assert same_steps(steps, wanted)
    assert not torch.equal(steps[0].cond, walk(edit, scene)[0].cond)


# --- the picture that the language model sees


def same_prompt(a, b):
    return torch.equal(a.embeds, b.embeds)


def test_unseen_is_the_text_to_image_prompt(edit, scene):
    made = edit.condition(scene, PROMPT, switches=Switches(seen=Seen(picture="unseen")))
    text = edit.condition(None, PROMPT)
    assert same_prompt(made.prompt, text.prompt) and same_prompt(made.negative, text.negative)
    assert torch.equal(made.reference_latents[0][0], edit.condition(scene, PROMPT).reference_latents[0][0])


@pytest.mark.parametrize("kind", ["blank", "other"])
def test_the_language_model_sees_another_picture(edit, scene, other, kind):
    shown = Image.new("RGB", scene.size, (128, 128, 128)) if kind == "blank" else other
    seen = Seen(picture="blank") if kind == "blank" else Seen(picture="other", other=other)
    made, wanted = edit.condition(scene, PROMPT, switches=Switches(seen=seen)), edit.condition(shown, PROMPT)
    assert same_prompt(made.prompt, wanted.prompt) and same_prompt(made.negative, wanted.negative)
    assert torch.equal(made.reference_latents[0][0], edit.condition(scene, PROMPT).reference_latents[0][0])


def test_the_negative_prompt_without_the_picture(edit, scene):
    made = edit.condition(scene, PROMPT, switches=Switches(seen=Seen(negative=False)))
    assert same_prompt(made.prompt, edit.condition(scene, PROMPT).prompt)
    assert same_prompt(made.negative, edit.condition(None, PROMPT).negative)


def test_the_picture_at_a_different_size(edit, scene):
    made = edit.condition(scene, PROMPT, switches=Switches(seen=Seen(size=(32, 48))))
    plain = edit.condition(scene, PROMPT)
    assert (
        plain.prompt.embeds.shape[1] - made.prompt.embeds.shape[1] == 4 * 4 - 2 * 3
    )  # a token: 16x16 pixels
    assert made.reference_grids == plain.reference_grids


# --- the VAE


def test_posterior_sample_and_raw_latents(edit, scene):
    ((mode,),) = edit.condition(scene, PROMPT).reference_latents
    config = edit.vae.config
    raw = denormalise(unpack(mode[None], (1, 4, 4)), config.latents_mean, config.latents_std)
    ((made,),) = edit.condition(
        scene, PROMPT, switches=Switches(vae=VAEPath(normalised=False))
    ).reference_latents
    assert_close(made, pack(raw)[0], FP32)

    draws = []
    for seed in (3, 3, 4):
        switches = Switches(vae=VAEPath(posterior="sample", seed=seed, normalised=False))
        draws.append(edit.condition(scene, PROMPT, switches=switches).reference_latents[0][0])
    with torch.no_grad():
        posterior = edit.vae.encode(vae_pixels(scene, 64, 64)[:, :, None])
    noise = torch.randn(posterior.mean.shape, generator=own_generator(3, "vae", 0))
    wanted = pack(posterior.mean + (posterior.logvar / 2).exp() * noise)[0]
    assert_close(draws[0], wanted, FP32)
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


# --- time


def test_zero_cond_t_is_forced_and_the_model_left_as_it_was(edit, scene):
    before = edit.mmdit.config
    steps = walk(edit, scene, Switches(time=Time(zero_cond_t=True)))
    assert edit.mmdit.config is before
    edit.mmdit.config = dataclasses.replace(before, zero_cond_t=True)
    try:
        wanted = walk(edit, scene)
        off = walk(edit, scene, Switches(time=Time(zero_cond_t=False)))
    finally:
        edit.mmdit.config = before
    assert same_steps(steps, wanted) and same_steps(off, walk(edit, scene))
    assert not torch.equal(steps[0].cond, off[0].cond)


@pytest.mark.parametrize("zero_cond_t", [False, True])
def test_exact_time_embeds_the_sigma_that_bfloat16_rounds(scene, zero_cond_t):
    pipe = qwenedit.load(device="cpu", dtype="bfloat16", progress=False)
    frequencies = torch.exp(-math.log(10000) * torch.arange(128) / 128)
    seen = []
    hook = pipe.mmdit.time_embed.linear_1.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    for rounding in ("reference", "exact"):
        seen.clear()
        steps = walk(pipe, scene, Switches(time=Time(rounding=rounding, zero_cond_t=zero_cond_t)))
        errors = []
        for step, waves in zip(steps, seen[::2], strict=True):  # each once a branch
            angles = 1000 * step.sigma * frequencies
            errors.append(float((waves[0] - torch.cat([angles.cos(), angles.sin()])).abs().max()))
            if zero_cond_t:
                assert torch.equal(waves[1].float(), torch.tensor([1.0] * 128 + [0.0] * 128))
        assert (max(errors) < 0.005) == (rounding == "exact")  # half a unit of bfloat16 is 0.002
    hook.remove()


def test_lightning_sigmas_are_those_of_the_reference_scheduler(edit):
    reference = diffusers.FlowMatchEulerDiscreteScheduler(
        base_shift=math.log(3), max_shift=math.log(3), shift_terminal=None, use_dynamic_shifting=True,
        time_shift_type="exponential", base_image_seq_len=256, max_image_seq_len=8192,
    )  # fmt: skip
    for steps in (4, 8):
        for tokens in (16, 4096, 6000):
            reference.set_timesteps(sigmas=[1 - i / steps for i in range(steps)], mu=math.log(3))
            made = schedule(edit.scheduler, Time(sigmas="lightning"), steps, tokens)
            assert made == pytest.approx(reference.sigmas.tolist(), abs=1e-6)


def test_given_sigmas_are_visited_as_they_are(edit, scene):
    steps = walk(edit, scene, Switches(time=Time(sigmas=(1.0, 0.6, 0.25))))
    assert [step.sigma for step in steps] == pytest.approx([1.0, 0.6, 0.25])
    assert steps[-1].sigma_next == 0
    for wrong in ((1.0, 0.5), (0.5, 1.0, 0.2), (1.0, 0.5, 0.0)):
        with pytest.raises(ValueError, match="sigmas"):
            latents(edit, scene, Switches(time=Time(sigmas=wrong)))
    with pytest.raises(ValueError, match="both given"):
        latents(edit, scene, Switches(time=Time(sigmas=(1.0, 0.6, 0.25))), sigmas=[1.0, 0.5, 0.1])


# --- guidance


def test_guidance_is_the_given_rule_at_the_scale_of_the_call(edit, scene):
    """And, outside of its interval and of the references' steps together, the plain conditional run."""
    rule = Guidance(norm="none", steps=(1, 2))
    switches = Switches(guidance=rule, references=References(steps=(0, 2), frame="target"))
    steps = walk(edit, scene, switches, true_cfg_scale=3.0)
    assert [step.uncond is not None for step in steps] == [False, True, False]
    guided = steps[1].uncond + 3.0 * (steps[1].cond - steps[1].uncond)
    assert torch.equal(steps[1].velocity, guided) and torch.equal(steps[2].velocity, steps[2].cond)
    made = latents(edit, scene, switches, true_cfg_scale=3.0)
    assert torch.equal(made, steps[-1].after)


# --- values


def test_flat_names_make_the_same_switches_there_and_back():
    values = {
        "references.latents": "noise", "references.steps": [0, 2], "references.order": [1, 0],
        "seen.size": [32, 32], "seen.negative": False, "guidance.norm": "none", "time.sigmas": [1.0, 0.5],
    }  # fmt: skip
    switches = Switches.from_flat(values)
    assert switches.flat() == values
    assert Switches.from_flat(switches.flat()) == switches
    assert json.loads(json.dumps(switches.flat())) == switches.flat()
    assert switches.encoding.flat() == {"seen.size": [32, 32], "seen.negative": False}


def test_a_picture_as_a_value_is_told_by_its_pixels(scene, other):
    def flat(image):
        return Switches(seen=Seen(picture="other", other=image)).flat()["seen.other"]

    assert flat(scene) == flat(scene.copy()) != flat(other)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"references.latent": "zeroed"}, "did you mean references.latents"),
        ({"guidence.norm": "none"}, "did you mean guidance.norm"),
        ({"x": 1}, "wanted one of references.latents"),
        ({"references.latents": "zero"}, "did you mean 'zeroed'"),
        ({"references.latents": 3}, "wanted 'concatenated' or"),
        ({"references.sigma": 1.5}, r"wanted a number in \[0, 1\]"),
        ({"references.sigma": True}, "wanted a number"),
        ({"references.sigma": math.nan}, "wanted a number"),
        ({"references.steps": [3, 1]}, "0 <= start <= stop"),
        ({"references.steps": [1]}, r"\(a whole number, a whole number\)"),
        ({"references.order": [0, 2]}, "in another order"),
        ({"references.latents": "other"}, "references.picture is not given"),
        ({"references.picture": "a.png"}, "references.latents is 'concatenated'"),
        ({"seen.picture": "other"}, "seen.other is not given"),
        ({"seen.size": [0, 4]}, "at least 1 pixel"),
        ({"seen.negative": "no"}, "wanted true or false"),
        ({"time.sigmas": "lightening"}, "did you mean 'lightning'"),
        ({"time.sigmas": []}, "a list of numbers"),
        ({"time.zero_cond_t": 1}, "wanted true or false or nothing"),
        ({"guidance.norm": "nonne"}, "guidance.norm is 'nonne', .*did you mean 'none'"),
        ({"seen.size": [1, 5000]}, "at most 200 times the other"),
        ({"references.latents": "left_out", "references.sigma": 0.5}, "references.sigma has no effect where"),
        ({"references.latents": "left_out", "references.steps": [0, 1]}, "references.steps has no effect"),
        ({"references.latents": "noise", "references.sigma": 0.5}, "references.sigma has no effect where"),
        ({"seen.picture": "unseen", "seen.size": [32, 32]}, "seen.size has no effect where seen.picture"),
    ],
)
def test_values_without_meaning_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Switches.from_flat(values)


def test_switches_that_cannot_act_are_refused_before_any_network_runs(edit, plus, scene, other, monkeypatch):
    for network in (edit.vision_language, edit.vae, edit.mmdit, plus.vision_language):
        monkeypatch.setattr(network, "forward", None)
    for switches, message in (
        (Switches(references=References(blocks=(0, 7))), "there are 6"),
        (Switches(references=References(steps=(0, 9))), "there are 3"),
        (Switches(references=References(order=(1, 0))), r"rows have \[1\] pictures"),
    ):
        with pytest.raises(ValueError, match=message):
            latents(edit, scene, switches)
    with pytest.raises(ValueError, match=r"rows have \[2\] pictures"):
        latents(plus, [scene, other], Switches(references=References(order=(0,))))
    for group in (
        {"references": References(latents="zeroed")},
        {"seen": Seen(picture="blank")},
        {"vae": VAEPath(seed=1)},
    ):
        with pytest.raises(ValueError, match="this run has none"):
            edit.generate(PROMPT, switches=Switches(**group))
        with pytest.raises(ValueError, match="this run has none"):
            edit.condition(None, PROMPT, switches=Switches(**group))
    gone = Switches(seen=Seen(picture="other", other=Path("gone.png")))
    for switches, message in (
        (gone, "no such picture: gone.png"),
        ({"guidance.norm": "none"}, "switches are dict, wanted Switches"),
    ):
        with pytest.raises(ValueError, match=message):
            latents(edit, scene, switches)
    with pytest.raises(ValueError, match=r"switches\.time is 'exact', wanted a Time"):
        Switches(time="exact")


def test_switches_of_encoding_are_refused_where_it_is_too_late(edit, scene):
    plain = edit.condition(scene, PROMPT)
    blank = Switches(seen=Seen(picture="blank"))
    with pytest.raises(ValueError, match=r"act while encoding, .* was encoded with none"):
        edit.sample(plain, switches=blank)
    with pytest.raises(ValueError, match="act while encoding"):
        next(qwenedit.invert(edit, plain, torch.zeros(1, 16, 64), switches=blank))
    shown = edit.condition(scene, PROMPT, switches=blank)
    assert same_steps(walk(edit, scene, None, shown), walk(edit, scene, blank, shown))


def test_guidance_without_effect_is_said(edit, scene):
    with pytest.warns(UserWarning, match="has no effect: the run is unguided"):
        latents(
            edit, scene, Switches(guidance=Guidance(norm="none")), true_cfg_scale=1.0, negative_prompt=None
        )


def test_noise_of_a_seed_is_not_the_targets_noise_of_that_seed(plus, scene):
    target = initial_noise(
        1, 16, (1, 4, 4), generator=torch.Generator().manual_seed(0), device=plus.device, dtype=torch.float32
    )[0]
    drawn = []
    for switches in (
        Switches(vae=VAEPath(posterior="sample", normalised=False)),
        Switches(references=References(latents="noise")),
    ):
        conditioning = plus.condition([scene, scene], PROMPT, switches=switches)
        drawn.append(changed(conditioning, switches.references).reference_latents[0])
    with torch.no_grad():
        posterior = plus.vae.encode(vae_pixels(scene, 64, 64)[:, :, None])
    mean, std = pack(posterior.mean)[0], pack((posterior.logvar / 2).exp())[0]
    noises = [(x - mean) / std for x in drawn[0]] + list(drawn[1])
    for i, noise in enumerate(noises):
        for another in [target, *noises[:i]]:
            pair = torch.stack([noise.flatten().sort().values, another.flatten().sort().values])
            assert (pair[0] - pair[1]).abs().max() > 1e-3  # not even in another order
            assert torch.corrcoef(torch.stack([noise.flatten(), another.flatten()]))[0, 1].abs() < 0.15


# --- beside other things that act on the transformer


@pytest.mark.parametrize(
    "values",
    [
        {"references.blocks": [2, 4]},
        {"references.frame": "target", "time.rounding": "exact"},
        {"time.zero_cond_t": True, "references.steps": [0, 1]},
    ],
    ids=str,
)
def test_switches_act_on_compiled_blocks_too(scene, values):
    """Hooks that are added after compilation never fire in compiled code: the switches run blocks eagerly."""
    pipe = qwenedit.load(device="cpu", progress=False)
    switches = Switches.from_flat(values)
    wanted = walk(pipe, scene, switches)
    torch.compiler.reset()
    for block in pipe.mmdit.blocks:
        block.compile(backend="eager")
    plain = walk(pipe, scene)
    assert same_steps(walk(pipe, scene, switches), wanted)
    assert same_steps(walk(pipe, scene), plain)
    torch.compiler.reset()


def test_taps_see_what_the_switches_do(edit, scene):
    """Attached around the run: the same names, and after an exception nothing is left of the switches."""
    lengths = []

    def stop(img, site):
        lengths.append(img.shape[1])
        if site.labels["step"] == 2:
            raise KeyboardInterrupt

    switches = Switches(references=References(steps=(1, 3), blocks=(0, 1), frame="target"))
    tables = []
    note = {"rope.img": lambda table, site: tables.append(table)}
    with taps(edit.mmdit, note):  # outer functions see what the switch has put there
        walk(edit, scene, Switches(references=References(frame="target")))
    assert all(torch.equal(table[:16], table[16:]) for table in tables)
    with pytest.raises(KeyboardInterrupt), taps(edit.mmdit, {"blocks.5.img_out": stop}):
        walk(edit, scene, switches)
    assert lengths == [16, 16, 32, 32, 32]
    assert not any(block._forward_pre_hooks for block in edit.mmdit.blocks)
    assert not any("_taps" in module.__dict__ for module in edit.mmdit.modules())


def test_gradients_reach_the_references_through_the_switches(edit, scene):
    conditioning = edit.condition(scene, PROMPT)
    ((latents,),) = conditioning.reference_latents
    latents = latents.clone().requires_grad_()
    conditioning = dataclasses.replace(conditioning, reference_latents=((latents,),))
    switches = Switches(references=References(sigma=0.5, blocks=(0, 3), frame="target"))
    (step,) = edit.steps(
        conditioning, num_inference_steps=1, generator=torch.Generator().manual_seed(0), switches=switches
    )
    step.velocity.sum().backward()
    assert latents.grad.abs().sum() > 0
