"""Scripts as people write them for diffusers, with nothing but their import changed; and what goes with them:
defaults, names of arguments, copies, and types.
"""

import copy
import dataclasses
import inspect
import pickle
import re
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import qwenedit
from qwenedit.call import EditOptions, GenerateOptions, SampleOptions
from qwenedit.family import VARIANTS
from qwenedit.layered import LayerOptions
from qwenedit.memory.streaming import Streamed
from qwenedit.reference_call import ReferenceCall
from qwenedit.sampling.scheduler import load_scheduler
from tests.faults import typed
from tests.support import assert_close
from tests.tiny import PIPELINES, checkpoint, picture, reference_pipeline, tiny_areas

ROOT = Path(__file__).parents[2]

SCRIPTS = sorted(Path(__file__).with_name("scripts").glob("*.py"))
PICTURES = 1e-4  # on pixels in [0, 1], as in tests/parity/test_pipeline.py; on latents, of the largest value
KINDS = {"": "generate", "-Edit": "edit", "-Edit-2509": "plus", "-Layered": "layered"}
LAYERS = ("attn.to_q", "attn.to_out.0", "img_mlp.net.2")


@pytest.fixture(autouse=True)
def _folder(monkeypatch, tmp_path):
    """A folder with what the scripts open, and the reference's pipelines as tests/tiny.py makes them."""
    monkeypatch.chdir(tmp_path)
    tiny_areas(monkeypatch)
    picture(60, 60).save("input.png")
    picture(50, 80, seed=1).save("other.png")
    for seed, name in enumerate(("style", "light")):
        save_file(lora(seed), f"{name}.safetensors")

    def from_pretrained(cls, source, scheduler=None, text_encoder="the checkpoint's", **_options):
        pipe = reference_pipeline(Path(source))
        assert type(pipe) is cls
        pipe.scheduler = scheduler or pipe.scheduler
        pipe.text_encoder = text_encoder and pipe.text_encoder
        return pipe

    for name in ("Image", "ImageEdit", "ImageEditPlus", "ImageLayered"):
        cls = getattr(diffusers, f"Qwen{name}Pipeline")
        monkeypatch.setattr(cls, "from_pretrained", classmethod(from_pretrained))
        # these need an accelerator there
        monkeypatch.setattr(cls, "enable_model_cpu_offload", lambda self: None)


def lora(seed):
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in LAYERS:
        out, wide = (128, 32) if layer == "img_mlp.net.0" else (32, 128 if layer == "img_mlp.net.2" else 32)
        for part, shape in (("A", (4, wide)), ("B", (out, 4))):
            key = f"transformer.transformer_blocks.0.{layer}.lora_{part}.weight"
            tensors[key] = 0.2 * torch.randn(shape, generator=generator)
    return tensors


def run(script, *, ours):
    """Execute a script; returns what it calls `result`."""
    text = script.read_text(encoding="utf-8")
    for name in sorted(KINDS, key=len, reverse=True):
        text = text.replace(f'"Qwen/Qwen-Image{name}"', repr(str(checkpoint(KINDS[name], seed=3))))
    if ours:
        text, count = re.subn(
            r"from diffusers import (FlowMatch\w+, )?(Qwen\w+)",
            lambda found: (
                (f"from diffusers import {found[1][:-2]}\n" if found[1] else "")
                + f"from qwenedit import QwenImageEdit as {found[2]}"
            ),
            text,
        )
        assert count == 1
        text = text.replace(
            '"resolution": 640', '"resolution": 64'
        )  # `tiny_areas` makes 640 of the reference 64
    space = {}
    exec(compile(text, script.name, "exec"), space)
    return space["result"]


def compare(got, wanted, what):
    assert type(got) is type(wanted), what
    if isinstance(got, list):
        assert [one.size for one in got] == [one.size for one in wanted]
        for one, other in zip(got, wanted, strict=True):
            levels = np.abs(np.asarray(one, dtype=int) - np.asarray(other, dtype=int))
            assert one.mode == other.mode and levels.max() <= 1, what  # on the edge of two levels
    else:
        got, wanted = torch.as_tensor(got), torch.as_tensor(wanted)
        assert got.dtype == wanted.dtype, what
        assert_close(got, wanted, PICTURES, what)


@pytest.mark.filterwarnings("ignore:.*has no effect", "ignore:true_cfg_scale is", "ignore:a negative_prompt")
@pytest.mark.filterwarnings("ignore:.*multiple of", "ignore:the output's token grid")
@pytest.mark.parametrize("script", SCRIPTS[:-1], ids=lambda script: script.stem)
def test_c8_a_script_runs_with_its_import_changed(script):
    wanted = run(script, ours=False)
    got = run(script, ours=True)
    assert len(got) == len(wanted) > 0
    for number, (one, other) in enumerate(zip(got, wanted, strict=True)):
        compare(one, other, f"{script.stem}, result {number}")


def test_c8_a_script_with_loras_runs_with_its_import_changed():
    """The reference needs peft for LoRAs, so the changes are added to its weights by hand."""
    got = run(SCRIPTS[-1], ours=True)
    for latents, scale in zip(got, (1.0, 0.5, 0.0), strict=True):
        pipe = reference_pipeline(checkpoint("edit", seed=3))
        for seed, weight in ((0, 0.5), (1, 0.8)):
            tensors = lora(seed)
            for layer in LAYERS:
                key = f"transformer_blocks.0.{layer}"
                down, up = (tensors[f"transformer.{key}.lora_{part}.weight"] for part in "AB")
                change = scale * weight * up @ down
                pipe.transformer.get_submodule(key).weight.data += change
        wanted = pipe(
            Image.open("input.png"), "make the circle red", num_inference_steps=2, true_cfg_scale=1.0,
            output_type="latent", generator=torch.manual_seed(0),
        )  # fmt: skip
        compare(latents, wanted.images, f"scale {scale}")
    assert (got[0] - got[1]).abs().max() > 1e-3 and (got[1] - got[2]).abs().max() > 1e-3


@pytest.fixture(scope="module")
def edit():
    return qwenedit.load(checkpoint("edit"), device="cpu", progress=False)


@pytest.fixture(scope="module")
def generate():
    return qwenedit.load(checkpoint("generate"), device="cpu", progress=False)


@pytest.fixture
def image():
    return picture(60, 60)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


QUICK = {"num_inference_steps": 2, "output_type": "latent"}


def test_a6_a_call_has_the_references_defaults_and_edit_its_own(edit, image):
    with pytest.warns(UserWarning, match="without a negative_prompt the run is unguided"):
        called = edit(image=image, prompt="x", generator=seeded(), **QUICK).images
    unguided = edit.edit(image, "x", true_cfg_scale=1.0, generator=seeded(), **QUICK).images
    guided = edit.edit(image, "x", generator=seeded(), **QUICK).images
    assert torch.equal(called, unguided) and not torch.equal(called, guided)
    again = edit(image, "x", " ", generator=seeded(), **QUICK).images
    assert torch.equal(again, guided)


@pytest.mark.parametrize("kind", KINDS.values())
def test_a6_every_default_is_that_of_the_reference(kind):
    """By the signatures: a default that changes there, or that we get wrong, shows here."""
    wanted = inspect.signature(PIPELINES[kind].__call__).parameters
    ours = {field.name: field.default for field in dataclasses.fields(ReferenceCall)}
    names = [name for name in wanted if name not in ("self", "use_en_prompt")]
    assert set(names) <= set(ours)
    for name in names:
        default = wanted[name].default
        assert ours[name] == (tuple(default) if isinstance(default, list) else default), name
    variant = next(one for key, one in VARIANTS.items() if key == PIPELINES[kind].__name__)
    values = ["x" if name in ("image", "prompt") else wanted[name].default for name in names]
    call = ReferenceCall.of(variant, values, {})  # the order of places is theirs too
    assert (call.prompt, call.image) == ("x", "x" if "image" in names else None)
    for name, value in zip(names, values, strict=True):
        assert getattr(call, name) == value, name


def test_c9_a_text_in_the_first_place_is_the_prompt_of_a_text_to_image_checkpoint(generate, edit):
    size = {"height": 32, "width": 48}
    placed = generate("a cat", " ", 3.0, 32, 48, 2, generator=seeded(), output_type="latent").images
    named = generate.generate("a cat", true_cfg_scale=3.0, generator=seeded(), **size, **QUICK).images
    assert torch.equal(placed, named)
    with pytest.raises(TypeError, match="prompt is given twice, by its place and by its name"):
        generate("a cat", prompt="a dog")
    with pytest.raises(TypeError, match="got 40 arguments, wanted at most"):
        generate(*["a cat"] * 40)
    with pytest.raises(ValueError, match=r"prompt is None, .*: the picture comes first, then the prompt"):
        edit("a cat")


@pytest.mark.parametrize("sigmas", [[1.0, 0.5], np.linspace(1, 0.2, 3), torch.tensor([0.9, 0.4]), [1.0, 0.0]])
def test_c11_sigmas_need_no_number_of_steps(edit, image, sigmas):
    wanted = edit.edit(
        image, "x", sigmas=sigmas, num_inference_steps=len(sigmas), generator=seeded(), output_type="latent"
    ).images
    options = {"sigmas": sigmas, "generator": seeded()}
    assert torch.equal(edit.edit(image, "x", output_type="latent", **options).images, wanted)
    conditioning, options["generator"] = edit.condition(image, "x"), seeded()
    assert torch.equal(edit.sample(conditioning, output_type="latent", **options).images, wanted)
    options["generator"] = seeded()
    assert len(list(edit.steps(conditioning, **options))) == len(sigmas)
    # the reference lets given sigmas win over a number of steps; here only in a call
    called = edit(
        image, "x", " ", num_inference_steps=7, sigmas=sigmas, generator=seeded(), output_type="latent"
    )
    assert torch.equal(called.images, wanted)
    with pytest.raises(ValueError, match=f"got {len(sigmas)} sigmas for 7 steps"):
        edit.edit(image, "x", num_inference_steps=7, sigmas=sigmas)


@pytest.mark.parametrize("kind", ["edit", "generate", "layered"])
@pytest.mark.parametrize("custom", [[1.0, 0.6, 0.0], [0.7, 0.0], np.linspace(1, 0, 6)])
def test_c11_sigmas_that_end_in_0_equal_the_references(kind, custom):
    folder = checkpoint(kind)
    ours = load_scheduler(folder)
    reference = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler")
    with np.errstate(divide="ignore"):
        reference.set_timesteps(sigmas=custom, mu=ours.mu(64))
    assert torch.equal(torch.tensor(ours.sigmas(len(custom), 64, custom)), reference.sigmas)


def test_c11_given_sigmas_of_the_switches_count_too(edit, image):
    switches = qwenedit.Switches(time=qwenedit.Time(sigmas=(1.0, 0.7, 0.2)))
    conditioning = edit.condition(image, "x")
    assert next(step.sigma for step in edit.steps(conditioning, switches=switches)) == 1.0
    assert len(list(edit.steps(conditioning, switches=switches))) == 3


@pytest.mark.parametrize("bad", [[], 5, [0.5, 0.7], [0.0, 0.0], [1.0, -0.1], ["a"]])
def test_c11_other_sigmas_are_still_refused(edit, image, bad):
    with pytest.raises(ValueError, match="sigmas"):
        edit.edit(image, "x", sigmas=bad)


def test_c11_arrays_everywhere(edit, generate, image):
    size, options = {"height": 32, "width": 48}, {"num_inference_steps": 1}
    layered = qwenedit.load(checkpoint("layered"), device="cpu", progress=False)
    for run, shape in (
        (lambda form: edit.edit(image, "x", generator=seeded(), output_type=form, **options), (1, 64, 64, 3)),
        (lambda form: edit.sample(edit.condition(image, "x"), generator=seeded(), output_type=form,
                                  **options), (1, 64, 64, 3)),
        (lambda form: generate.generate("x", generator=seeded(), output_type=form, **size, **options),
         (1, 32, 48, 3)),
        (lambda form: layered.decompose(image, "x", layers=2, resolution=64, generator=seeded(),
                                        output_type=form, **options), (1, 2, 64, 64, 4)),
    ):  # fmt: skip
        array, pixels = run("np").images, run("pt").images
        assert array.dtype == np.float32 and array.shape == shape
        assert np.array_equal(array, pixels.movedim(-3, -1).numpy())
    with pytest.raises(ValueError, match="output_type is 'jpg', wanted one of pil, pt, np, latent"):
        edit.edit(image, "x", output_type="jpg")


@pytest.mark.parametrize(
    "function, name, meant",
    [
        ("edit", "seed", r"generator=torch\.Generator\(\)\.manual_seed\(SEED\)"),
        ("edit", "steps", "num_inference_steps"),
        ("edit", "guidance_scale", "true_cfg_scale"),
        ("edit", "negativ_prompt", "negative_prompt"),
        ("edit", "output", "output_type"),
        ("generate", "cfg", "true_cfg_scale"),
        ("generate", "size", "height and width"),
        ("condition", "neg_prompt", "negative_prompt"),
        ("steps", "steps", "num_inference_steps"),
        ("sample", "seed", "generator"),
        ("decompose", "layer", "layers"),
        ("decompose", "num_images", "num_images_per_prompt"),
        ("__call__", "seed", "generator"),
        ("__call__", "callback", "callback_on_step_end"),
    ],
)
def test_c8_an_unknown_argument_names_the_one_that_is_meant(edit, function, name, meant):
    pattern = rf"^{function}\(\) got an unexpected keyword argument '{name}': did you mean {meant}"
    with pytest.raises(TypeError, match=pattern):
        getattr(edit, function)("a picture", "x", **{name: 3})


def test_c8_load_names_the_argument_that_is_meant():
    with pytest.raises(TypeError, match=r"load\(\) got .* 'torch_dtype': did you mean dtype\?"):
        qwenedit.load(torch_dtype=torch.float32)
    with pytest.raises(TypeError, match=r"'revison': did you mean revision\?"):
        qwenedit.QwenImageEdit.from_pretrained("nobody/nothing", revison="main")
    with pytest.raises(TypeError, match=r"'zzz'; it takes source, device, dtype"):
        qwenedit.load(zzz=1)


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"quantization_config": object()},
            r"quantization_config is object, wanted None: pass storage='float8'",
        ),
        (
            {"cache_dir": "/tmp"},
            "cache_dir is '/tmp', wanted None: set the environment variable HF_HUB_CACHE",
        ),
        ({"token": "hf_secret"}, "token is str, wanted None or True: run `hf auth login`"),
        ({"transformer": object()}, "transformer is object, wanted None: pass mmdit=FILE"),
        ({"tokenizer": object()}, "they are read from the checkpoint's folder"),
        ({"scheduler": object()}, "the scheduler is a object, wanted a FlowMatchEulerDiscreteScheduler"),
        ({"max_memory": {0: "10GB"}}, "pass residency='stage' or 'stream'"),
        ({"device_map": "nowhere"}, "device is 'nowhere', which cannot be used here"),
        ({"text_encoder": torch.nn.Linear(1, 1)}, "text_encoder is Linear, wanted a file, True or False"),
    ],
)
def test_c8_what_from_pretrained_cannot_take_says_what_to_write(options, message):
    with pytest.raises(ValueError, match=message) as error:
        qwenedit.QwenImageEdit.from_pretrained(checkpoint("edit"), **options)
    assert "hf_secret" not in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name, remedy",
    [
        ("components", "pipe.mmdit"),
        ("enable_xformers_memory_efficient_attention", "leave the line out"),
        ("enable_group_offload", r"load\(residency='stream'\)"),
        ("enable_vae_slicing", r"pipe\.micro_batch = 1"),
    ],
)
def test_c8_what_the_pipeline_does_not_have_says_what_to_write(edit, name, remedy):
    with pytest.raises(AttributeError, match=f"no attribute '{name}': .*{remedy}"):
        getattr(edit, name)
    assert not hasattr(edit, "nothing_of_the_kind")


def test_c8_other_names_of_the_parts(edit):
    assert edit.transformer is edit.mmdit and edit.text_encoder is edit.vision_language
    assert edit.tokenizer.encode("a cat").ids == edit.processor.tokenizer.encode("a cat").ids
    pipe = copy.copy(edit)
    pipe.text_encoder = None
    assert pipe.vision_language is None and edit.vision_language is not None
    with pytest.raises(ValueError, match=r"transformer is Linear, .* load\(mmdit=FILE\) reads other weights"):
        pipe.transformer = torch.nn.Linear(1, 1)
    with pytest.warns(UserWarning, match="enable_slicing has no effect: set micro_batch = 1"):
        edit.vae.enable_slicing()
    with pytest.warns(UserWarning, match="enable_tiling has no effect"):
        edit.vae.enable_tiling(tile_sample_min_height=128)


def test_c8_schedulers_that_take_other_steps_are_refused(edit):
    pipe = copy.copy(edit)
    before = pipe.scheduler
    for other in (torch.zeros(1), diffusers.EulerDiscreteScheduler(), diffusers.DDIMScheduler()):
        with pytest.raises(ValueError, match=r"the scheduler is a \w+, wanted a FlowMatchEulerDiscreteSched"):
            pipe.scheduler = other
    with pytest.raises(ValueError, match="the scheduler: invert_sigmas is True, wanted False"):
        pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    assert pipe.scheduler is before
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(before.config)
    assert pipe.scheduler == before


@pytest.mark.parametrize("offload", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_c8_offload_calls_set_the_residency(image, offload):
    pipe = qwenedit.load(checkpoint("edit"), device="cpu", residency="resident", progress=False)
    wanted = pipe.edit(image, "x", generator=seeded(), **QUICK).images
    getattr(pipe, offload)()
    weights = dict(pipe.mmdit.named_parameters())  # the LoRA's, which is in no file of the checkpoint, stay
    assert all(weight.is_meta == (".held." not in name) for name, weight in weights.items())
    blocks = pipe.mmdit.blocks
    assert isinstance(blocks, Streamed) == (offload == "enable_sequential_cpu_offload")
    getattr(pipe, offload)()  # nothing is left to do
    assert pipe.mmdit.blocks is blocks
    assert torch.equal(pipe.edit(image, "x", generator=seeded(), **QUICK).images, wanted)


@pytest.mark.parametrize("offload", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_c8_offload_calls_work_with_loras(image, offload):
    pipe = qwenedit.load(checkpoint("edit"), device="cpu", residency="resident", progress=False)
    pipe.load_lora_weights("style.safetensors")
    wanted = pipe.edit(image, "x", generator=seeded(), **QUICK).images
    getattr(pipe, offload)()
    weights = dict(pipe.mmdit.named_parameters())  # the LoRA's, which is in no file of the checkpoint, stay
    assert all(weight.is_meta == (".held." not in name) for name, weight in weights.items())
    assert torch.equal(pipe.edit(image, "x", generator=seeded(), **QUICK).images, wanted)
    pipe.unload_lora_weights()
    assert not torch.equal(pipe.edit(image, "x", generator=seeded(), **QUICK).images, wanted)


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"attention_kwargs": {"scale": "much"}},
            r"attention_kwargs\['scale'\] is 'much', wanted a finite num",
        ),
        ({"attention_kwargs": {"gligen": {}}}, "attention_kwargs has gligen, .* attach `taps` instead"),
        ({"negative_prompt": " ", "negative_prompt_embeds": torch.zeros(1, 3, 24)}, "are both given"),
        (
            {"prompt": None, "prompt_embeds": torch.zeros(3, 24)},
            r"have shape \(3, 24\) .*, wanted \(B, T, D\)",
        ),
        ({"prompt": None, "prompt_embeds": [0.0]}, "wanted as tensors, as encode_prompt gives them"),
        ({"callback_on_step_end_tensor_inputs": ["sigmas"]}, "has sigmas, wanted latents or prompt_embeds"),
        ({"height": 8}, "height is 8, wanted a whole number of at least 16"),
    ],
)
def test_c8_what_a_call_cannot_take_says_what_to_write(edit, image, options, message):
    with pytest.raises(ValueError, match=message):
        edit(image, **{"prompt": "x", **options})


@pytest.mark.parametrize("modes", [{}, {"residency": "stage"}, {"residency": "stream"}], ids=str)
def test_c8_callbacks_in_every_residency(image, modes):
    pipe = qwenedit.load(checkpoint("edit"), device="cpu", progress=False, **modes)
    seen = []

    def note(_pipe, step, time, tensors):
        seen.append((step, time.item()))
        return {"latents": tensors["latents"] * 1.0} if step else {}

    called = edit_of(pipe, image, callback_on_step_end=note)
    assert torch.equal(called, edit_of(pipe, image))
    sigmas = [step.sigma for step in pipe.steps(pipe.condition(image, "x"), num_inference_steps=2)]
    assert seen == [(step, torch.tensor(sigma).mul(1000).item()) for step, sigma in enumerate(sigmas)]
    edit_of(pipe, image, callback_on_step_end=lambda *_: {}, callback_on_step_end_tensor_inputs=None)
    with pytest.raises(ValueError, match="returned latents of another shape, wanted"):
        edit_of(pipe, image, callback_on_step_end=lambda *_: {"latents": torch.zeros(1, 3, 64)})
    assert pipe.num_timesteps == 2


def edit_of(pipe, image, **options):
    return pipe(image, "x", " ", generator=seeded(), **QUICK, **options).images


def test_c8_offload_keeps_changed_weights():
    pipe = qwenedit.load(checkpoint("edit"), device="cpu", residency="resident", progress=False)
    with torch.no_grad():
        next(pipe.mmdit.parameters()).mul_(2)
    with pytest.raises(ValueError, match=r"weights that were changed, .* pass residency='stage' to load"):
        pipe.enable_model_cpu_offload()
    assert not any(weight.is_meta for network in (pipe.vae, pipe.mmdit) for weight in network.parameters())
    with pytest.raises(ValueError, match="device is 'nowhere', which cannot be used here"):
        pipe.enable_model_cpu_offload(device="nowhere")
    small = qwenedit.load(checkpoint("edit"), device="cpu", storage="float8", progress=False)
    with pytest.raises(ValueError, match=r"another memory mode .* pass residency='stream' to load"):
        small.enable_sequential_cpu_offload()


MODES = [
    {}, {"residency": "stage"}, {"residency": "stream"}, {"modulation": "precomputed"}, {"storage": "float8"},
    {"residency": "stage", "modulation": "precomputed"},
]  # fmt: skip


@pytest.mark.parametrize("modes", MODES, ids=str)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pipe: pickle.loads(pickle.dumps(pipe))])
def test_b3_a_pipeline_is_copied_in_every_memory_mode(modes, copied, image):
    pipe = qwenedit.load(checkpoint("edit"), device="cpu", progress=False, **modes)
    wanted = pipe.edit(image, "x", generator=seeded(), **QUICK).images
    other = copied(pipe)
    assert torch.equal(other.edit(image, "x", generator=seeded(), **QUICK).images, wanted)
    for mine, theirs in zip(pipe.mmdit.parameters(), other.mmdit.parameters(), strict=True):
        assert mine is not theirs and type(mine) is type(theirs)
        assert getattr(mine, "component", None) == getattr(theirs, "component", None)
    del pipe
    assert torch.equal(other.edit(image, "x", generator=seeded(), **QUICK).images, wanted)


@pytest.mark.parametrize("modes", [{"residency": "stage"}, {"residency": "stream"}], ids=str)
def test_b3_what_is_in_use_says_that_it_cannot_be_copied(modes, image):
    pipe = qwenedit.load(checkpoint("edit"), device="cpu", progress=False, **modes)
    steps = pipe.steps(pipe.condition(image, "x"), num_inference_steps=2)
    next(steps)
    with pytest.raises(ValueError, match=r"the transformer is in use, .* before or after the run"):
        copy.deepcopy(pipe)
    steps.close()
    copy.deepcopy(pipe)


def test_c21_results_have_types():
    """mypy holds typed.py, with `make check`; here it runs."""
    assert re.search(
        r'^files = .*"tests/faults/typed.py"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE
    )
    typed.use(qwenedit.load(device="cpu", progress=False), picture(64, 64))
    for function in (typed.QwenImageEdit.edit, typed.QwenImageEdit.generate, typed.QwenImageEdit.decompose):
        named = inspect.signature(function).parameters
        assert named["output_type"].default == "pil"


def test_c21_the_typed_options_are_those_of_the_functions():
    for function, options, besides in (
        ("edit", EditOptions, {"image", "prompt"}),
        ("generate", GenerateOptions, {"prompt"}),
        ("sample", SampleOptions, {"conditioning"}),
        ("decompose", LayerOptions, {"image", "prompt"}),
    ):
        names = set(inspect.signature(getattr(qwenedit.QwenImageEdit, function)).parameters)
        assert names == {"self", "output_type"} | besides | set(options.__annotations__), function


def test_a_step_takes_a_result(edit, image):
    conditioning = edit.condition(image, "x")
    wanted = torch.randn(1, 16, 64, generator=seeded())
    for step in edit.steps(conditioning, num_inference_steps=2, generator=seeded()):
        if step.index == 0:
            step.after = wanted
        else:
            assert torch.equal(step.latents, wanted)
