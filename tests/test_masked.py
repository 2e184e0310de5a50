"""Masked runs: what is kept, what a plain run is, batches, switches, and what is refused."""

import itertools
import warnings

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

import qwenedit
from qwenedit import mini
from qwenedit.encoding.conditioning import Conditioning
from qwenedit.inputs.pictures import vae_pixels
from qwenedit.latents import normalise, pack
from qwenedit.sampling.preserve import Kept, noised
from qwenedit.sampling.switched import schedule
from qwenedit.switches import Mask, References, Seen, Switches, Time, VAEPath
from qwenedit.taps import taps
from tests.support import EPS, relative_error

PROMPT = "make the circle red"
WHITE = Image.new("L", (64, 64), 255)
MODE = Switches(mask=Mask(posterior="mode"))


@pytest.fixture(scope="module")
def scene():
    return Image.open(mini.EXAMPLE).convert("RGB")


@pytest.fixture(scope="module")
def other():
    image = Image.new("RGB", (64, 64), (30, 160, 60))
    image.paste((220, 40, 40), (10, 12, 30, 36))
    return image


def boxed(box, size=(64, 64), grey=255):
    mask = Image.new("L", size)
    ImageDraw.Draw(mask).rectangle(box, fill=grey)
    return mask


LEFT = boxed((0, 0, 31, 63))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def latents(pipe, image, mask=None, **options):
    options = {"num_inference_steps": 3, "generator": generator(), **options}
    return pipe.edit(image, PROMPT, mask_image=mask, output_type="latent", **options).images


def tokens_of(mask):
    """(S, 64), True where the mask's white is; for masks whose edges are those of latent pixels."""
    levels = torch.tensor(list(mask.tobytes())).view(mask.height, mask.width)[::8, ::8] > 127
    return pack(levels[None, None, None].expand(1, 16, 1, -1, -1))[0]


@torch.no_grad()
def mode_of(pipe, image, size=(64, 64)):
    config = pipe.vae.config
    raw = pipe.vae.encode(vae_pixels(image, *size)[:, :, None]).mode()
    return pack(normalise(raw, config.latents_mean, config.latents_std))


@pytest.mark.parametrize("strength", ["reference", "lightx2v", "diffsynth"])
def test_a_white_mask_at_full_strength_is_the_plain_edit(edit, plus, scene, other, strength):
    switches = Switches(mask=Mask(posterior="mode", strength=strength))
    given = torch.randn(1, 16, 64, generator=generator(5))
    for pipe, image in ((edit, scene), (plus, scene), (plus, [other, scene])):
        for options in ({"latents": given}, {}, {"num_images_per_prompt": 2}):
            masked = latents(pipe, image, WHITE, switches=switches, **options)
            assert torch.equal(masked, latents(pipe, image, **options))
    walked = edit.generate(PROMPT, height=64, width=64, latents=given, num_inference_steps=2).images
    started = edit.generate(
        PROMPT, image=scene, mask_image=WHITE, strength=1.0, switches=switches, height=64, width=64,
        latents=given, num_inference_steps=2,
    ).images  # fmt: skip
    assert walked[0].tobytes() == started[0].tobytes()


@pytest.mark.parametrize("preserve", ["latent", "velocity", "x0"])
def test_a_black_mask_gives_back_the_reconstruction(edit, scene, preserve):
    """All but one latent pixel is black: the others are the picture's own, to the bit or to rounding."""
    mask = boxed((0, 0, 0, 0))
    switches = Switches(mask=Mask(preserve=preserve, posterior="mode"))
    kept = latents(edit, scene, mask, switches=switches, num_inference_steps=5)
    own = mode_of(edit, scene)
    outside = ~tokens_of(mask)[None]
    assert (~outside).sum() == 16
    if preserve == "latent":
        assert torch.equal(kept[outside], own[outside])
    else:  # five steps, each of which rounds a few times
        assert relative_error(kept[outside], own[outside]) <= 5 * 8 * EPS
    assert relative_error(kept[~outside], own[~outside]) > 0.01


def test_what_is_kept_walks_along_the_noised_picture(edit, scene):
    """Before every step the kept part is the clean latents with the run's noise at that sigma."""
    given, own, inside = torch.randn(1, 16, 64, generator=generator(5)), mode_of(edit, scene), tokens_of(LEFT)
    conditioning = edit.condition(scene, PROMPT)
    for preserve in ("latent", "velocity", "x0"):
        switches = Switches(mask=Mask(preserve=preserve, posterior="mode"))
        options = {"image": scene, "mask_image": LEFT, "latents": given, "num_inference_steps": 4}
        with torch.no_grad():
            steps = list(edit.steps(conditioning, switches=switches, strength=0.8, **options))
        assert len(steps) == 4
        for step in steps:
            wanted = step.sigma * given + (1 - step.sigma) * own
            assert relative_error(step.latents[:, ~inside], wanted[:, ~inside]) <= 4 * 8 * EPS
        assert relative_error(steps[-1].after[:, ~inside], own[:, ~inside]) <= 4 * 8 * EPS


def test_a_strength_below_one_starts_from_the_picture(edit, scene):
    given, own = torch.randn(1, 16, 64, generator=generator(5)), mode_of(edit, scene)
    conditioning = edit.condition(scene, PROMPT)
    with torch.no_grad():
        first = next(edit.steps(
            conditioning, image=scene, strength=0.5, latents=given, num_inference_steps=4, switches=MODE
        ))  # fmt: skip
    assert first.sigma == schedule(edit.scheduler, Time(), 4, 16)[2]
    assert torch.equal(first.latents, noised(own, given, first.sigma))


def test_a_run_under_a_conditioning_is_the_whole_run(edit, plus, scene, other, tmp_path):
    options = {"mask_image": LEFT, "strength": 0.7, "num_inference_steps": 3, "output_type": "pt"}
    for pipe, image in ((edit, scene), (plus, [other, scene])):
        whole = pipe.edit(image, PROMPT, generator=generator(), **options).images
        pipe.condition(image, PROMPT).save(tmp_path / "saved.safetensors")
        loaded = Conditioning.load(tmp_path / "saved.safetensors")
        again = pipe.sample(loaded, image=scene, generator=generator(), **options).images
        assert torch.equal(whole, again)
    crop = {"mask_image": LEFT, "padding_mask_crop": 3, "num_inference_steps": 2}
    (whole,) = edit.edit(scene, PROMPT, generator=generator(), **crop).images
    (again,) = edit.sample(loaded, image=scene, generator=generator(), **crop).images
    assert whole.size == again.size == (64, 64)


def test_rows_of_a_batch_are_their_single_runs(edit, plus, scene, other, monkeypatch):
    masks = [LEFT, boxed((0, 24, 63, 63))]
    options = {"strength": 0.8, "num_inference_steps": 3, "output_type": "latent"}
    for pipe, images in ((edit, [scene, other]), (plus, [[other, scene], [other]])):
        monkeypatch.setattr(pipe, "micro_batch", 1)
        prompts = [PROMPT, "remove the square, 把它去掉"]
        both = pipe.edit(
            images, prompts, mask_image=masks, generator=[generator(1), generator(2)], **options
        ).images
        for k in range(2):
            alone = pipe.edit(
                images[k], prompts[k], mask_image=masks[k], generator=generator(k + 1), **options
            ).images
            assert torch.equal(both[k : k + 1], alone)


def test_several_outputs_of_several_pictures_are_prompt_major(edit, scene, other, monkeypatch):
    """A picture's sample is drawn by the generator of its first output; the noises row by row."""
    monkeypatch.setattr(edit, "micro_batch", 1)
    images, masks, prompts = [scene, other], [LEFT, boxed((0, 24, 63, 63))], [PROMPT, "remove the square"]
    options = {"strength": 0.8, "num_inference_steps": 2, "output_type": "latent", "num_images_per_prompt": 2}
    all_four = edit.edit(
        images, prompts, mask_image=masks, generator=[generator(k) for k in range(4)], **options
    ).images
    for k in range(2):
        two = edit.edit(
            images[k], prompts[k], mask_image=masks[k], generator=[generator(2 * k), generator(2 * k + 1)],
            **options,
        ).images  # fmt: skip
        assert torch.equal(all_four[2 * k : 2 * k + 2], two)


def test_crops_of_a_batch_are_laid_back_each_into_its_picture(edit, scene, other):
    masks = [boxed((8, 8, 23, 23)), boxed((32, 40, 55, 55))]
    options = {"padding_mask_crop": 2, "num_inference_steps": 2, "generator": generator()}
    made = edit.edit([scene, other], [PROMPT, PROMPT], mask_image=masks, **options).images
    assert len(made) == 2
    for one, source, mask in zip(made, (scene, other), masks, strict=True):
        outside = ~(torch.tensor(list(mask.tobytes())) > 0)
        levels = (
            torch.tensor(list(one.tobytes())).view(-1, 3),
            torch.tensor(list(source.tobytes())).view(-1, 3),
        )
        assert torch.equal(levels[0][outside], levels[1][outside])
        assert not torch.equal(levels[0], levels[1])


def test_a_crop_is_made_at_the_whole_size(edit, scene):
    """A small region of a large picture: generate lays it back at the picture's own size."""
    large = scene.resize((320, 256))
    mask = boxed((100, 100, 139, 139), large.size)
    (made,) = edit.generate(
        PROMPT, image=large, mask_image=mask, padding_mask_crop=4, num_inference_steps=2, height=64, width=64,
        generator=generator(),
    ).images  # fmt: skip
    assert made.size == large.size
    left = large.crop((0, 0, 90, 256))
    assert made.crop((0, 0, 90, 256)).tobytes() == left.tobytes()
    assert made.tobytes() != large.tobytes()


def test_the_mask_belongs_to_the_last_picture(plus, scene, other):
    """The others stay plain references: with two, only the last is what is kept."""
    kept = latents(plus, [other, scene], boxed((0, 0, 0, 0)), switches=MODE)
    assert torch.equal(kept[0, 1:], mode_of(plus, scene)[0, 1:])


def test_a_picture_that_rows_share_has_one_sample(edit, plus, scene, other):
    """One picture, or one list of references, for two prompts; a picture each has a sample each."""
    prompts = [PROMPT, "remove the square"]
    options = {"mask_image": boxed((0, 0, 0, 0)), "num_inference_steps": 1, "output_type": "latent"}
    for pipe, image, shared in (
        (edit, scene, True), (edit, [scene], True), (edit, [scene, scene], False),
        (plus, [other, scene], True), (plus, [[scene], [scene]], False),
    ):  # fmt: skip
        kept = pipe.edit(image, prompts, generator=generator(), **options).images[:, 1:]
        assert torch.equal(kept[0], kept[1]) == shared


def test_a_size_of_its_own(edit, scene):
    """The output's size is also the picture's for the VAE, so grids agree and nothing is shifted."""
    options = {"height": 48, "width": 80, "num_inference_steps": 2, "switches": MODE}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kept = latents(edit, scene, boxed((0, 0, 0, 0), (80, 48)), **options)
    assert torch.equal(kept[0, 1:], mode_of(edit, scene, (80, 48))[0, 1:])


SWITCHES = [
    {"mask.preserve": "velocity"}, {"mask.preserve": "x0"}, {"mask.posterior": "mode"},
    {"mask.strength": "lightx2v"}, {"mask.strength": "diffsynth"},
    {"mask.grey": "steps"}, {"mask.grey": "blended"},
    {"mask.preserve": "velocity", "mask.grey": "blended"}, {"mask.preserve": "x0", "mask.grey": "steps"},
]  # fmt: skip


def test_every_switch_changes_something_and_the_defaults_nothing(edit, scene):
    grey = Image.linear_gradient("L").resize((64, 64))
    options = {"strength": 0.5, "num_inference_steps": 5}
    runs = [latents(edit, scene, grey, switches=Switches.from_flat(flat), **options) for flat in SWITCHES]
    plain = latents(edit, scene, grey, **options)
    assert torch.equal(plain, latents(edit, scene, grey, switches=Switches(), **options))
    for one, two in itertools.combinations([plain, *runs], 2):
        assert not torch.equal(one, two)


def test_grey_is_kept_for_so_many_steps():
    """Of 4 steps: black always, a quarter until the last, ..., white never."""
    greys = torch.tensor([0.0, 0.2, 0.25, 0.5, 0.74, 0.75, 1.0])
    sigmas = [1.0, 0.8, 0.5, 0.2, 0.0]
    ones = torch.ones(7)
    for preserve in ("latent", "velocity", "x0"):
        how = Mask(preserve=preserve, grey="steps")
        kept = Kept(x0=0 * ones, noise=0 * ones, mask=greys, intervals=4, how=how)
        changing = torch.zeros(7)
        for interval, (sigma, after) in enumerate(itertools.pairwise(sigmas)):
            if preserve == "latent":
                changing += kept.after(ones, after, interval)
            else:
                changing += kept.velocity(ones, 0 * ones, sigma, interval)
        assert changing.tolist() == [0, 0, 1, 2, 2, 3, 4]


def test_both_predictions_of_an_interval_of_heuns_keep_the_same(edit, scene):
    """A grey that one way to keep it frees in an interval is freed there by all ways."""
    grey = Image.new("L", (64, 64), 102)  # 0.4: kept until the last of 4 steps
    runs = []
    for preserve in ("latent", "velocity", "x0"):
        switches = Switches(mask=Mask(preserve=preserve, grey="steps", posterior="mode"))
        runs.append(latents(edit, scene, grey, switches=switches, num_inference_steps=4, sampler="heun"))
    assert relative_error(runs[1], runs[0]) < 64 * EPS and relative_error(runs[2], runs[0]) < 64 * EPS


@pytest.mark.parametrize("preserve", ["latent", "velocity", "x0"])
def test_a_mask_holds_what_the_caller_writes(edit, scene, preserve):
    switches = Switches(mask=Mask(preserve=preserve, posterior="mode"))
    mask, ends = LEFT, []
    for noise in (None, generator(5)):
        with torch.no_grad():
            for step in edit.steps(
                edit.condition(scene, "make the circle red"), image=scene, mask_image=mask,
                generator=generator(), num_inference_steps=3, switches=switches,
            ):  # fmt: skip
                if noise is not None:
                    step.x0 = torch.randn(step.x0.shape, generator=noise)
        ends.append(step.after)
    made = tokens_of(mask)
    one, two = (end[0] for end in ends)
    assert relative_error(two[~made], one[~made]) < 64 * EPS and (two - one)[made].abs().max() > 0.1


def test_blended_grey_mixes(edit, scene):
    half = Image.new("L", (64, 64), 128)
    switches = Switches(mask=Mask(grey="blended", posterior="mode"))
    mixed = latents(edit, scene, half, switches=switches, num_inference_steps=1)
    made, own = latents(edit, scene, num_inference_steps=1), mode_of(edit, scene)
    wanted = (1 - 128 / 255) * own + 128 / 255 * made
    assert relative_error(mixed, wanted) <= 8 * EPS


def test_the_ways_to_keep_part_where_noise_is_new(edit, scene):
    """Under the stochastic sampler the velocity leaves the sampler's noise on the kept part, the others put
    the run's own there; all end at the picture."""
    given, own, inside = torch.randn(1, 16, 64, generator=generator(5)), mode_of(edit, scene), tokens_of(LEFT)
    conditioning, seen = edit.condition(scene, PROMPT), {}
    for preserve in ("latent", "velocity", "x0"):
        switches = Switches(mask=Mask(preserve=preserve, posterior="mode"))
        options = {"image": scene, "mask_image": LEFT, "latents": given, "num_inference_steps": 3}
        with torch.no_grad():
            steps = list(edit.steps(
                conditioning, switches=switches, sampler="stochastic", generator=generator(1), **options
            ))  # fmt: skip
        seen[preserve] = steps[1].latents[:, ~inside]
        assert relative_error(steps[-1].after[:, ~inside], own[:, ~inside]) <= 3 * 8 * EPS
    wanted = noised(own, given, steps[1].sigma)[:, ~inside]
    assert relative_error(seen["latent"], wanted) <= 8 * EPS and relative_error(seen["x0"], wanted) <= 8 * EPS
    assert relative_error(seen["velocity"], wanted) > 0.1


@pytest.mark.parametrize("steps, strength, left", [(4, 0.3, 1), (4, 0.6, 2), (50, 0.6, 30), (3, 1.0, 3)])
def test_lightx2v_rounds_the_number_of_steps(edit, steps, strength, left):
    whole = schedule(edit.scheduler, Time(), steps, 16)
    assert schedule(edit.scheduler, Time(), steps, 16, None, strength, "lightx2v") == whole[-left - 1 :]


def test_diffsynth_takes_all_steps_from_a_lower_sigma(edit):
    """linspace(s, 0, N + 1) without its end, then shift and stretch."""
    got = schedule(edit.scheduler, Time(), 4, 16, None, 0.5, "diffsynth")
    assert got == edit.scheduler.sigmas(4, 16, [0.5, 0.375, 0.25, 0.125])
    assert len(got) == 5 and got[0] < 1 and got[-2] == pytest.approx(edit.scheduler.shift_terminal or got[-2])
    whole = schedule(edit.scheduler, Time(), 4, 16)
    assert schedule(edit.scheduler, Time(), 4, 16, None, 1.0, "diffsynth") == whole
    lightning = schedule(edit.scheduler, Time(sigmas="lightning"), 4, 16, None, 0.5, "diffsynth")
    assert lightning[0] == pytest.approx(3 * 0.5 / (1 + 2 * 0.5))


def test_switches_for_the_references_come_before_the_source(edit, scene, other):
    """A reference that a switch replaces or encodes otherwise is not the picture to start from."""

    @torch.no_grad()
    def references(switches, **options):
        seen = []
        conditioning = edit.condition(scene, PROMPT, switches=switches)
        with taps(edit.mmdit, {"img_in": lambda x, _site: seen.append(x[:, 16:])}):
            next(edit.steps(conditioning, switches=switches, num_inference_steps=2, **options))
        return seen[0]

    masked = {"image": scene, "mask_image": LEFT}
    for switches in (
        Switches(references=References(latents="other", picture=other)),
        Switches(vae=VAEPath(posterior="sample")),
    ):
        assert torch.equal(references(switches, **masked), references(switches))
    assert not torch.equal(references(Switches(), **masked), references(Switches()))  # a sample, not the mode


def test_an_identity_tap_changes_no_bit(edit, scene):
    with taps(edit.mmdit, {"blocks.*.img_out": lambda x, _site: x.clone()}):
        tapped = latents(edit, scene, LEFT)
    assert relative_error(tapped, latents(edit, scene, LEFT)) <= 64 * EPS


@pytest.mark.parametrize("residency", ["stage", "stream"])
def test_memory_modes_give_the_same_bits(edit, scene, residency):
    pipe = qwenedit.load(device="cpu", residency=residency, progress=False)
    options = {"strength": 0.6, "num_inference_steps": 3}
    assert torch.equal(latents(pipe, scene, LEFT, **options), latents(edit, scene, LEFT, **options))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"mask_image": Image.new("L", (64, 64))}, "the mask changes nothing"),
        ({"mask_image": [WHITE, WHITE]}, r"mask_image has 2 pictures for 1 prompt\(s\)"),
        ({"mask_image": "mask.png"}, "mask_image is str 'mask.png', wanted a PIL picture"),
        ({"mask_image": torch.ones(64, 64)}, "mask_image is Tensor of shape"),
        ({"mask_image": WHITE, "strength": 1.5}, r"strength is 1.5, wanted a number in \[0, 1\]"),
        ({"mask_image": WHITE, "strength": -0.1}, r"strength is -0.1, wanted a number in \[0, 1\]"),
        ({"mask_image": WHITE, "strength": "0.5"}, "strength is '0.5', wanted a finite number"),
        ({"strength": float("nan")}, "strength is nan, wanted a finite number"),
        ({"strength": True}, "strength is True, wanted a finite number"),
        ({"strength": np.array([0.5, 0.6])}, r"strength is array\(\[0\.5, 0\.6\]\), wanted a finite number"),
        ({"strength": torch.tensor([1.0, 1.0])}, "strength is tensor.*, wanted a finite number"),
        ({"mask_image": WHITE, "strength": 0.0}, "strength is 0.0, which leaves none of 50 steps"),
        ({"padding_mask_crop": 4}, "padding_mask_crop is given without a mask_image"),
        ({"mask_image": WHITE, "padding_mask_crop": -1}, "padding_mask_crop is -1, wanted a whole number"),
        ({"mask_image": WHITE, "padding_mask_crop": 4, "output_type": "pt"}, "output_type must be 'pil'"),
        ({"mask_image": WHITE, "latents": torch.zeros(2, 16, 64)}, "latents are shape"),
        ({"mask_image": WHITE, "generator": [generator()] * 2}, "got 2 generators"),
        ({"switches": Switches(mask=Mask(preserve="x0"))}, "mask.preserve acts on a mask"),
        ({"switches": Switches(mask=Mask(grey="steps")), "strength": 0.5}, "mask.grey acts on a mask"),
        ({"switches": MODE}, "mask.posterior acts on a picture to start from"),
        ({"switches": Switches(mask=Mask(strength="lightx2v"))}, "mask.strength acts on a picture"),
        (
            {
                "switches": Switches(mask=Mask(strength="lightx2v")), "mask_image": WHITE,
                "strength": 0.1, "num_inference_steps": 4,
            },
            "strength is 0.1, which leaves none of 4 steps",
        ),
        (
            {
                "switches": Switches(mask=Mask(strength="diffsynth")), "mask_image": WHITE,
                "strength": 0.5, "sigmas": [1.0, 0.5],
            },
            "mask.strength is 'diffsynth', which makes the sigmas",
        ),
    ],
)  # fmt: skip
def test_bad_input_is_found_before_any_network_runs(edit, scene, monkeypatch, options, message):
    def runs(*_arguments, **_options):
        raise AssertionError("a network runs")

    for network in (edit.vision_language, edit.vae, edit.mmdit):
        monkeypatch.setattr(type(network), "forward", runs, raising=False)
    monkeypatch.setattr(type(edit.vae), "encode", runs)
    with pytest.raises(ValueError, match=message):
        edit.edit(scene, PROMPT, **options)
    if "mask_image" in options or "switches" not in options:
        with pytest.raises(ValueError, match=message):
            edit.generate(PROMPT, image=scene, height=64, width=64, **options)


def test_bad_input_of_other_calls(edit, scene):
    for name, value in (("mask_image", WHITE), ("strength", 0.5), ("padding_mask_crop", 4)):
        with pytest.raises(ValueError, match=f"{name} is given without an image"):
            edit.generate(PROMPT, **{name: value})
    conditioning = edit.condition(scene, PROMPT)
    with pytest.raises(ValueError, match="mask_image is given without an image"):
        edit.sample(conditioning, mask_image=WHITE)
    with pytest.raises(ValueError, match="image has no effect without a mask_image"):
        edit.sample(conditioning, image=scene)
    with pytest.raises(ValueError, match=r"image has 2 pictures for 1 prompt\(s\)"):
        edit.generate(PROMPT, image=[scene, scene])
    with pytest.raises(ValueError, match="masked_image_latents is Tensor, wanted None"):
        edit(scene, PROMPT, mask_image=WHITE, masked_image_latents=torch.zeros(1))
    with pytest.raises(TypeError, match="did you mean mask_image"):
        edit(scene, PROMPT, mask=WHITE)
    with pytest.raises(TypeError, match="did you mean strength"):
        edit.edit(scene, PROMPT, mask_image=WHITE, denoise=0.5)
    with pytest.warns(UserWarning, match="height and width have no effect with a mask"):
        made = edit(scene, PROMPT, " ", mask_image=WHITE, height=32, width=32, num_inference_steps=2).images
    assert made[0].size == (64, 64)


def test_seen_pictures_are_whole(edit, scene):
    """The language model sees the picture, not its crop or its mask."""
    plain = edit.condition(scene, PROMPT)
    seen = []
    with taps(edit.mmdit, {"txt_in": lambda x, _site: seen.append(x)}):
        latents(edit, scene, LEFT, num_inference_steps=1, true_cfg_scale=1.0, negative_prompt=None)
        with torch.no_grad():
            next(edit.steps(plain, num_inference_steps=1, true_cfg_scale=1.0))
    assert len(seen) == 2 and torch.equal(seen[0], seen[1])
    blank = Switches(seen=Seen(picture="blank"))
    assert not torch.equal(latents(edit, scene, LEFT), latents(edit, scene, LEFT, switches=blank))
