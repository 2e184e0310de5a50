"""What is kept is what would be made again: bit by bit, and never of other pictures, prompts or weights."""

import dataclasses

import pytest
import torch
from PIL import Image
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

import qwenedit
from qwenedit import mini
from qwenedit.encoding.cache import ConditioningCache
from qwenedit.inputs.rows import rows_of
from qwenedit.memory.residency import present
from qwenedit.networks.vae import VAE
from qwenedit.networks.vision_language import VisionLanguage
from qwenedit.switches import References, Seen, Switches, VAEPath
from qwenedit.taps import swapped, taps
from tests.tiny import embedded_plus

PROMPT = "make the circle red"


@pytest.fixture
def pipe():
    pipe = qwenedit.load(device="cpu", progress=False)
    pipe.conditioning_cache = ConditioningCache()
    return pipe


@pytest.fixture
def runs(monkeypatch):
    """What ran of the encoders, in order."""
    ran = []
    for kind, method in ((VisionLanguage, "forward"), (VAE, "encode")):
        plain = getattr(kind, method)

        def counted(*args, plain=plain, kind=kind, **options):
            ran.append(kind)
            return plain(*args, **options)

        monkeypatch.setattr(kind, method, counted)
    return ran


ONCE = [VisionLanguage, VisionLanguage, VAE]  # both prompts and the picture


def drawn(shift=0):
    return Image.open(mini.EXAMPLE).convert("RGB").rotate(90 * shift)


def edited(pipe, seed=0, picture=None, prompt=PROMPT, **options):
    options = {"num_inference_steps": 2, "output_type": "latent", **options}
    generator = torch.Generator().manual_seed(seed)
    return pipe.edit(picture or drawn(), prompt, generator=generator, **options).images


def same(one, other):
    pairs = [(one.prompt.embeds, other.prompt.embeds), (one.negative.embeds, other.negative.embeds)]
    pairs += [
        pair
        for rows in zip(one.reference_latents, other.reference_latents, strict=True)
        for pair in zip(*rows, strict=True)
    ]
    return all(torch.equal(*pair) for pair in pairs)


def test_another_seed_runs_no_encoder_and_changes_no_bit(pipe, runs):
    wanted = [edited(qwenedit.load(device="cpu", progress=False), seed) for seed in (0, 1)]
    del runs[:]
    assert torch.equal(edited(pipe, 0), wanted[0])
    assert runs == ONCE
    assert torch.equal(edited(pipe, 1), wanted[1])  # of another object with the same pixels
    assert runs == ONCE and len(pipe.conditioning_cache) == 1


def test_without_a_cache_every_run_encodes(runs):
    pipe = qwenedit.load(device="cpu", progress=False)
    assert pipe.conditioning_cache is None
    edited(pipe)
    edited(pipe)
    assert runs == ONCE * 2


def test_what_is_not_of_the_encoders_does_not_matter(pipe, runs):
    edited(pipe)
    edited(pipe, true_cfg_scale=2.0, num_inference_steps=3, num_images_per_prompt=2)
    edited(pipe, switches=Switches(references=References(latents="zeroed")))
    with torch.no_grad():
        next(pipe.mmdit.parameters()).add_(1)
    pipe.condition(drawn(), PROMPT)
    assert runs == ONCE


OTHERS = {
    "picture": {"picture": drawn(1)},
    "one pixel": {"picture": (lambda x: (x.putpixel((3, 5), (1, 2, 3)), x)[1])(drawn())},
    "mode": {"picture": drawn().convert("RGBA")},
    "prompt": {"prompt": "make the circle blue"},
    "negative prompt": {"negative_prompt": "blurry"},
    "unguided": {"negative_prompt": None, "true_cfg_scale": 1.0},
    "size": {"height": 64, "width": 80},
    "seen": {"switches": Switches(seen=Seen(picture="blank"))},
    "seen size": {"switches": Switches(seen=Seen(size=(56, 84)))},
    "negative unseen": {"switches": Switches(seen=Seen(negative=False))},
    "sample": {"switches": Switches(vae=VAEPath(posterior="sample"))},
    "another sample": {"switches": Switches(vae=VAEPath(posterior="sample", seed=1))},
    "other reference": {"switches": Switches(references=References(latents="other", picture=drawn(2)))},
}


@pytest.mark.filterwarnings("ignore:the output's token grid")
def test_every_setting_of_encoding_is_told_apart(pipe):
    for count, options in enumerate(OTHERS.values(), start=1):
        edited(pipe, **options)
        edited(pipe, **options)
        assert len(pipe.conditioning_cache) == count
    pipe.share_prefix = True
    edited(pipe)
    pipe.micro_batch = 1
    edited(pipe)
    assert len(pipe.conditioning_cache) == len(OTHERS) + 2


def test_prompts_of_text_alone(pipe, runs):
    def generated(most):
        return pipe(None, "a fox", num_inference_steps=1, output_type="pt", max_sequence_length=most)

    generated(512)
    generated(512)
    assert runs == ONCE[:2]
    generated(1)
    assert runs == ONCE[:2] * 2


def test_a_palette_is_part_of_a_picture(pipe, runs):
    picture = drawn().quantize(8)
    before = edited(pipe, picture=picture)
    picture.putpalette([255 - x for x in picture.getpalette()])
    assert not torch.equal(edited(pipe, picture=picture), before) and runs == ONCE * 2


def test_a_picture_that_was_changed_in_place(pipe, runs):
    picture = drawn()
    edited(pipe, picture=picture)
    picture.paste((9, 9, 9), (0, 0, 20, 20))
    edited(pipe, picture=picture)
    assert runs == ONCE * 2


def test_a_file_that_a_switch_names_counts_by_its_pixels(pipe, runs, tmp_path):
    file = tmp_path / "其他.png"
    switches = Switches(references=References(latents="other", picture=str(file)))
    drawn(1).save(file)
    edited(pipe, switches=switches)
    edited(pipe, switches=switches)
    assert runs == ONCE
    drawn(2).save(file)
    edited(pipe, switches=switches)
    assert runs == ONCE * 2


def scaled(pipe):
    with torch.no_grad():
        pipe.vae.encoder.conv_in.weight.mul_(1.5)


def replaced(pipe):
    old = pipe.vision_language.language.blocks[0].mlp.down
    old.weight = nn.Parameter(2 * old.weight, requires_grad=False)


def assigned(pipe):
    state = {name: 1.5 * x for name, x in pipe.vae.state_dict().items()}
    pipe.vae.load_state_dict(state, assign=True)


def copied_into(pipe):
    pipe.vae.load_state_dict({name: 1.5 * x for name, x in pipe.vae.state_dict().items()})


def recast(pipe):
    pipe.vision_language.to(torch.bfloat16)


def other_data(pipe):
    weight = pipe.vae.encoder.conv_in.weight
    weight.data = 1.5 * weight.data


def epsilon(pipe):
    pipe.vision_language.vision.merger.norm.eps = 0.5


def other_vae(pipe):
    pipe.vae = qwenedit.load(device="cpu", progress=False).vae
    with torch.no_grad():
        pipe.vae.encoder.conv_in.weight.mul_(1.5)


CHANGES = [scaled, replaced, assigned, copied_into, recast, other_data, epsilon, other_vae]


@pytest.mark.parametrize("change", CHANGES)
def test_other_weights_are_encoded_with(pipe, change):
    before = pipe.condition(drawn(), PROMPT)
    change(pipe)
    got = pipe.condition(drawn(), PROMPT)
    pipe.conditioning_cache = None
    assert not same(got, before) and same(got, pipe.condition(drawn(), PROMPT))


def test_weights_that_come_back_to_the_address_of_others(pipe):
    weight = pipe.vae.encoder.conv_in.weight
    cache, addresses = pipe.conditioning_cache, []
    for _ in range(4):
        weight.data = -1.5 * weight.data  # which torch's counter does not see
        addresses.append(weight.data_ptr())
        got = pipe.condition(drawn(), PROMPT)
        pipe.conditioning_cache = None
        assert same(got, pipe.condition(drawn(), PROMPT))
        pipe.conditioning_cache = cache
    assert len(cache) == 1  # what was made of the weights before cannot be asked for any more


def test_weights_that_are_gone_are_of_nobody(pipe):
    """Ids and addresses may come again once a tensor is gone."""
    cache = pipe.conditioning_cache
    edited(pipe)
    (entry,) = cache._entries.values()
    assert entry.valid
    for name in ("vision_language", "vae"):
        setattr(pipe, name, None)
    assert not entry.valid
    other = qwenedit.load(device="cpu", progress=False)
    other.conditioning_cache = cache
    edited(other)
    assert len(cache) == 1 and entry not in cache._entries.values()


@pytest.mark.parametrize(
    "modes",
    [
        {"residency": "stage"},
        {"residency": "stream"},
        {"residency": "stage", "storage": "float8"},
        {"residency": "resident", "storage": "float8"},
    ],
    ids=lambda modes: "-".join(modes.values()),
)
def test_weights_that_come_and_go(modes, runs):
    plain, pipe = (qwenedit.load(device="cpu", progress=False, **modes) for _ in range(2))
    wanted = [edited(plain, seed) for seed in (0, 1)]
    pipe.conditioning_cache = ConditioningCache()
    del runs[:]
    assert torch.equal(edited(pipe, 0), wanted[0]) and torch.equal(edited(pipe, 1), wanted[1])
    assert runs == ONCE
    before = pipe.condition(drawn(), PROMPT)
    with present(pipe.vision_language), torch.no_grad():
        pipe.vision_language.language.norm.weight.mul_(1.5)
        assert not same(pipe.condition(drawn(), PROMPT), before)
    if modes["residency"] != "resident":  # they come from the files again
        assert same(pipe.condition(drawn(), PROMPT), before)
    del runs[:]
    edited(pipe)
    edited(pipe.to("cpu:0"))
    assert runs == ONCE


def test_pipelines_that_share_a_cache_and_nothing_else(pipe, runs):
    other = qwenedit.load(embedded_plus(), device="cpu", progress=False)
    other.conditioning_cache = pipe.conditioning_cache
    edited(pipe)
    edited(other)
    assert runs == ONCE * 2 and len(pipe.conditioning_cache) == 2


def test_the_variant_of_shared_networks(pipe, runs):
    edited(pipe)
    template = dataclasses.replace(pipe.variant.template, system=pipe.variant.template.system + " Now.")
    pipe.variant = dataclasses.replace(pipe.variant, template=template)
    with pytest.raises(ValueError, match="prefix has"):  # another template was really asked for
        edited(pipe)
    assert runs == ONCE


class Nothing(TorchFunctionMode):
    def __torch_function__(self, func, _types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Twice(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args):
        return 2 * self.inner(*args)


WATCHED = {
    "a tap": lambda pipe: taps(pipe.vision_language, {"*": lambda x, site: None}, strict=False),
    "a tap of the VAE": lambda pipe: taps(pipe.vae, {"*": lambda x, site: None}, strict=False),
    "another module": lambda pipe: swapped(pipe.vae, "encoder.conv_in", Twice),
    "autocast": lambda pipe: torch.autocast("cpu", torch.bfloat16),
    "a trace": lambda pipe: Nothing(),
    "operations counted": lambda pipe: FlopCounterMode(display=False),
}


@pytest.mark.parametrize("what", WATCHED)
def test_who_looks_inside_sees_the_encoders_run(pipe, runs, what):
    edited(pipe)
    (entry,) = pipe.conditioning_cache._entries.values()
    with WATCHED[what](pipe):
        edited(pipe)
        edited(pipe)
    assert runs == ONCE * 3
    edited(pipe)
    assert runs == ONCE * 3 and list(pipe.conditioning_cache._entries.values()) == [entry]


def test_hooks_and_methods_of_ones_own(pipe, runs):
    edited(pipe)
    handle = pipe.vae.encoder.conv_in.register_forward_hook(lambda *_: None)
    edited(pipe)
    assert runs == ONCE * 2
    handle.remove()
    encode = pipe.vae.encode
    pipe.vae.encode = lambda x: encode(-x)
    edited(pipe)
    assert runs == ONCE * 3
    del pipe.vae.encode
    edited(pipe)
    assert runs == ONCE * 3


def test_gradients_reach_through_the_encoders(pipe, runs):
    edited(pipe)
    rows = rows_of(PROMPT, " ", drawn(), pipe.variant, pipe.areas, None, None)
    pipe.vae.requires_grad_(True)
    made = pipe._condition(rows, Switches(), guided=True)
    assert runs == ONCE * 2 and made.reference_latents[0][0].requires_grad


def test_torchs_settings_of_precision_count(pipe, runs):
    edited(pipe)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        edited(pipe)
    finally:
        torch.set_float32_matmul_precision(before)
    with qwenedit.deterministic(pipe):
        edited(pipe)
    assert runs == ONCE * 3


def test_what_is_handed_out_is_the_callers_own(pipe):
    for _ in range(3):  # the first is what the encoders made, the others are kept ones
        got = pipe.condition(drawn(), PROMPT)
        pipe.conditioning_cache, cache = None, pipe.conditioning_cache
        assert same(got, pipe.condition(drawn(), PROMPT))
        pipe.conditioning_cache = cache
        for x in (got.prompt.embeds, got.negative.embeds, got.reference_latents[0][0]):
            x.fill_(float("nan"))
        got.provenance.clear()
    assert pipe.condition(drawn(), PROMPT).provenance["prompt"] == f'["{PROMPT}"]'


def test_what_was_not_used_for_longest_goes_first(pipe, runs):
    cache = pipe.conditioning_cache
    edited(pipe, prompt="one")
    cache.max_bytes = int(2.5 * cache.bytes)
    edited(pipe, prompt="two")
    edited(pipe, prompt="one")
    edited(pipe, prompt="six")  # "two" goes
    assert len(cache) == 2 and cache.bytes <= cache.max_bytes
    del runs[:]
    edited(pipe, prompt="one")
    edited(pipe, prompt="six")
    assert runs == []
    edited(pipe, prompt="two")
    assert runs == ONCE
    cache.clear()
    assert len(cache) == cache.bytes == 0


def test_the_bytes_are_those_of_the_tensors(pipe):
    made = pipe.condition([drawn()], [PROMPT, "a longer prompt than the first"])
    tensors = [made.prompt.embeds, made.prompt.mask, made.negative.embeds, made.reference_latents[0][0]]
    assert made.negative.mask is None and made.reference_latents[0][0] is made.reference_latents[1][0]
    assert pipe.conditioning_cache.bytes == sum(x.nbytes for x in tensors)


def test_too_large_for_the_cache_is_not_kept(pipe, runs):
    pipe.conditioning_cache = ConditioningCache(max_bytes=100)
    edited(pipe)
    edited(pipe)
    assert runs == ONCE * 2 and len(pipe.conditioning_cache) == 0


@pytest.mark.parametrize("most", [0, -1, 1.5, True, "1"])
def test_a_size_without_meaning_is_refused(most):
    with pytest.raises(ValueError, match=r"max_bytes is .* wanted a whole number"):
        ConditioningCache(most)
