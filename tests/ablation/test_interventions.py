"""Interventions, LoRAs, masks, metrics and a given pipeline in sweeps."""

import contextlib
import dataclasses
import functools
import json
import re
import shutil
import sys
import types
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageChops
from safetensors.torch import save_file

import qwenedit
from qwenedit import mini
from qwenedit.ablation import sweep as module
from qwenedit.ablation.functions import code_of
from qwenedit.ablation.intervening import state_of
from qwenedit.ablation.metrics import pixels, source_distances
from qwenedit.ablation.model import pipe_fingerprint
from qwenedit.ablation.spec import read_spec
from qwenedit.ablation.sweep import ablate
from qwenedit.instruments.patching import zero
from qwenedit.networks.low_rank import Change
from qwenedit.pipeline import QwenImageEdit
from qwenedit.sampling.samplers import flow_sde, heun
from qwenedit.taps import taps
from tests.ablation.test_sweep import edits_counted, lines, same

PROMPT = "make the circle red"
SMALL = {"pictures": [str(mini.EXAMPLE)], "prompts": [PROMPT], "steps": 2}
HALVE = {**SMALL, "grid": {"intervention": ["none", "halve"]}}


def halve(pipe):
    return taps(pipe.mmdit, {"blocks.3.img_mlp_add": lambda x, site: x * 0.5})


def save_lora(path, seed=0):
    generator, width = torch.Generator().manual_seed(seed), qwenedit.load(progress=False).mmdit.config.width
    name = "transformer.transformer_blocks.2.attn.to_q.lora_{}.weight"
    down, up = (0.3 * torch.randn(shape, generator=generator) for shape in ((4, width), (width, 4)))
    save_file({name.format("A"): down, name.format("B"): up}, path)


def run(spec, folder, **options):
    return ablate(spec, folder, **{"device": "cpu", "progress": False, **options})


@pytest.fixture
def pipe():
    return qwenedit.load(device="cpu", progress=False)


def edit(pipe, **options):
    generator = torch.Generator().manual_seed(0)
    return pipe.edit(Image.open(mini.EXAMPLE), PROMPT, num_inference_steps=2, generator=generator, **options)


def pictures(swept):
    return [Image.open(swept.folder / record["file"]) for record in swept.records.values()]


def test_a_row_is_the_edit_made_inside_of_the_intervention(tmp_path, pipe):
    swept = run(HALVE, tmp_path, interventions={"halve": halve})
    plain, halved = pictures(swept)
    assert same(plain, edit(pipe).images[0])
    with halve(pipe):
        assert same(halved, edit(pipe).images[0])
    assert not same(plain, halved)
    assert swept.records[0, 0, 1]["intervention"] == "halve"
    assert "intervention halve" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("name, tap", [("vision_language", "out"), ("vae", "decoder.*.in")])
def test_it_acts_on_the_encoders_and_the_decoder_as_well(tmp_path, pipe, name, tap):
    """The next run must not have what was encoded under it."""

    def rolled(pipe):
        return taps(getattr(pipe, name), {tap: lambda x, site: x.roll(1, -1)})

    spec = {**SMALL, "grid": {"intervention": ["rolled", "none"], "true_cfg_scale": [2, 4]}}
    swept = run(spec, tmp_path, interventions={"rolled": rolled}, pipe=pipe, device=None)
    for (_, _, k), record in swept.records.items():
        cell = swept.spec.cells[k]
        acting = rolled(pipe) if cell.intervention == "rolled" else contextlib.nullcontext()
        with acting:
            wanted = edit(pipe, true_cfg_scale=cell.true_cfg_scale).images[0]
        assert same(Image.open(tmp_path / record["file"]), wanted)
    assert len({picture.tobytes() for picture in pictures(swept)}) == 4


def raises(_pipe):
    raise ZeroDivisionError("before")


@contextlib.contextmanager
def raises_after(_pipe):
    yield
    raise ZeroDivisionError("after")


@contextlib.contextmanager
def swallows(pipe):
    with contextlib.suppress(Exception):
        with taps(pipe.mmdit, {"blocks.0.img_out": lambda *_: 1 / 0}):
            yield


def test_a_row_that_fails_is_recorded_and_the_others_go_on(tmp_path):
    names = {"before": raises, "after": raises_after, "swallows": swallows, "no context": lambda _: 3}
    spec = {**SMALL, "grid": {"intervention": ["none", *names, "halve"]}}
    swept = run(spec, tmp_path, interventions={**names, "halve": halve})
    errors = [record.get("error") for record in swept.records.values()]
    assert errors == [
        None, "ZeroDivisionError: before", "ZeroDivisionError: after",
        "RuntimeError: the intervention's context manager swallowed an exception",
        "ValueError: the intervention returned int, wanted a context manager: put "
        "@contextlib.contextmanager above a function with one yield", None,
    ]  # fmt: skip


LEFT = []


def leaves_a_tap(pipe):
    LEFT.append(taps(pipe.mmdit, {"blocks.0.img_out": zero}))
    LEFT[-1].__enter__()
    return contextlib.nullcontext()


def leaves_a_hook(pipe):
    pipe.vae.register_forward_hook(lambda *_: None)
    return contextlib.nullcontext()


def writes_a_weight(pipe):
    with torch.no_grad():
        pipe.mmdit.blocks[0].attn.img_q.weight.mul_(2)
    return contextlib.nullcontext()


def replaces_a_part(pipe):
    pipe.mmdit = qwenedit.load(device="cpu", progress=False).mmdit
    return contextlib.nullcontext()


def sets_a_config(pipe):
    pipe.vae.config = dataclasses.replace(pipe.vae.config, latents_mean=(0.0,) * 16)
    return contextlib.nullcontext()


def sets_the_processors_config(pipe):
    pipe.processor.config = dataclasses.replace(pipe.processor.config, image_mean=(0.0,) * 3)
    return contextlib.nullcontext()


def sets_a_sampler(pipe):
    pipe.sampler = "heun"
    return contextlib.nullcontext()


def sets_a_schedule(pipe):
    pipe.scheduler = dataclasses.replace(pipe.scheduler, use_dynamic_shifting=False, shift=2.0)
    return contextlib.nullcontext()


def adds_a_controlnet(pipe):
    pipe.controlnets.append(torch.nn.Linear(1, 1))
    return contextlib.nullcontext()


def lets_a_weight_train(pipe):
    pipe.mmdit.blocks[0].attn.img_q.weight.requires_grad_(True)
    return contextlib.nullcontext()


@pytest.mark.parametrize(
    "leaves",
    [
        leaves_a_tap, leaves_a_hook, writes_a_weight, replaces_a_part, sets_a_config,
        sets_the_processors_config, sets_a_sampler, sets_a_schedule, adds_a_controlnet, lets_a_weight_train,
    ],
)  # fmt: skip
def test_an_intervention_that_leaves_something_behind_stops_the_sweep(tmp_path, leaves):
    """Every later edit would be another than its row says; the next sweep goes on."""
    spec = {**SMALL, "seeds": [0, 1], "grid": {"intervention": ["none", "leaves", "halve"]}}
    with pytest.raises(ValueError, match="the intervention leaves left the model changed, or taps or hooks"):
        run(spec, tmp_path, interventions={"leaves": leaves, "halve": halve})
    assert [record["intervention"] for record in lines(tmp_path)] == ["none", "none", "leaves"]
    again = run(
        {**spec, "grid": {"intervention": ["none", "halve"]}}, tmp_path, interventions={"halve": halve}
    )
    fresh = run(
        {**spec, "grid": {"intervention": ["none", "halve"]}}, tmp_path / "x", interventions={"halve": halve}
    )
    assert all(map(same, pictures(again), pictures(fresh)))
    LEFT.clear()


def test_a_second_tap_or_hook_that_is_left_is_noticed(pipe):
    with taps(pipe.mmdit, {"blocks.0.img_out": zero}, strict=False):
        pipe.vae.register_forward_hook(lambda *_: None)
        found = [state_of(pipe)]
        assert found == [state_of(pipe)]
        pipe.vae.register_forward_hook(lambda *_: None)
        found.append(state_of(pipe))
        with taps(pipe.mmdit, {"blocks.1.img_out": zero}, strict=False):
            found.append(state_of(pipe))
        assert found[0] != found[1] == state_of(pipe) != found[2]


@pytest.mark.parametrize("residency", ["stage", "stream"])
def test_weights_that_come_and_go_are_no_change(tmp_path, residency):
    lazy = qwenedit.load(device="cpu", progress=False, residency=residency)
    before = pipe_fingerprint(lazy)
    swept = run(HALVE, tmp_path, interventions={"halve": halve}, pipe=lazy, device=None)
    assert pipe_fingerprint(lazy) == before
    again = qwenedit.load(device="cpu", progress=False, residency=residency)
    assert pipe_fingerprint(again) == before
    wanted = run(HALVE, tmp_path / "resident", interventions={"halve": halve})
    assert not swept.failed and all(map(same, pictures(swept), pictures(wanted)))


def test_an_edited_intervention_is_run_again_and_no_other(tmp_path, monkeypatch):
    def scale(factor):
        return lambda pipe: taps(pipe.mmdit, {"blocks.3.img_mlp_add": lambda x, site: x * factor})

    spec = {**SMALL, "grid": {"intervention": ["none", "a", "b"]}}
    first = run(spec, tmp_path, interventions={"a": scale(0.5), "b": scale(0.25)})
    with edits_counted(monkeypatch) as calls:
        run(spec, tmp_path, interventions={"a": scale(0.5), "b": scale(0.25)})
        assert not calls
        second = run(spec, tmp_path, interventions={"a": scale(0.5), "b": scale(0.75)})
    assert len(calls) == 1
    pairs = zip(first.records.values(), second.records.values(), strict=True)
    assert [a["key"] == b["key"] for a, b in pairs] == [True, True, False]


FACTOR = 0.5
TENSOR = torch.ones(3)


def helper(x):
    return x * FACTOR


def uses_a_helper(pipe):
    return [helper(x) for x in (pipe, TENSOR)]


class Holder:
    def __init__(self, value):
        self.value = value

    def __call__(self, _pipe):
        return self.value

    def method(self, _pipe):
        return self.value


def test_the_hash_of_a_function_is_that_of_what_it_uses(monkeypatch):
    plain = code_of(uses_a_helper)
    assert plain == code_of(uses_a_helper) and len(plain) == 20
    for name, value in (
        ("FACTOR", 0.25), ("TENSOR", torch.tensor([1.0, 1.0, 2.0])), ("helper", lambda x: x * FACTOR * 2)
    ):  # fmt: skip
        with monkeypatch.context() as patch:
            patch.setitem(globals(), name, value)
            assert code_of(uses_a_helper) != plain, name
    assert code_of(uses_a_helper) == plain


def test_what_a_function_holds_counts():
    def closing(value):
        return lambda pipe: value

    def defaulting(_pipe, value=1, *, other=2):
        return value, other

    alike, different = [], []
    for make in (
        closing,
        Holder,
        lambda value: Holder(value).method,
        lambda value: functools.partial(helper, value),
    ):
        alike.append(code_of(make(1)) == code_of(make(1)))
        picture = Image.new("RGB", (2, 2), "red")
        for value in (
            2,
            1.0,
            "1",
            [1],
            {"a": 1},
            {1, 2},
            torch.ones(2),
            torch.ones(3),
            picture,
            None,
            Path("1"),
        ):
            different.append(code_of(make(1)) != code_of(make(value)))
        different.append(code_of(make(torch.ones(2))) != code_of(make(torch.zeros(2))))
        different.append(code_of(make({"a": [1, (2, 3)]})) != code_of(make({"a": [1, (2, 4)]})))
        different.append(code_of(make(picture)) != code_of(make(Image.new("RGB", (2, 2), "blue"))))
    assert all(alike) and all(different)
    before = code_of(defaulting)
    defaulting.__kwdefaults__["other"] = 3
    assert code_of(defaulting) != before
    loop: list = [1]
    loop.append(loop)
    assert code_of(closing(loop)) == code_of(closing(loop))
    assert code_of(contextlib.contextmanager(uses_a_helper)) != code_of(contextlib.contextmanager(helper))


def test_a_function_without_source_counts_by_its_code():
    for text in ("lambda pipe: pipe * {}", "lambda pipe: lambda x: x + {}"):
        made = [eval(text.format(k)) for k in (1, 2, 1)]
        assert code_of(made[0]) == code_of(made[2]) != code_of(made[1])


def test_functions_on_one_line_are_different():
    first, second = (lambda _: 1), (lambda _: 2)
    assert code_of(first) != code_of(second)


# metrics


def difference(result, source, **_rest):
    return ImageChops.difference(result, source.convert("RGB")).getextrema()[0][1]


def of_rest(result, source, *, prompt, pictures, mask, unablated):
    assert prompt == PROMPT and len(pictures) == 1 and pictures[0] is source and mask is None
    return 0 if unablated is None else ImageChops.difference(result, unablated).getextrema()[0][1] + 1


def test_metrics_are_computed_from_the_files_and_shown(tmp_path):
    swept = run(
        HALVE, tmp_path, interventions={"halve": halve}, metrics={"worst": difference, "rest": of_rest}
    )
    for record in swept.records.values():
        result, source = Image.open(tmp_path / record["file"]), Image.open(mini.EXAMPLE)
        assert record["own"]["worst"] == difference(result, source) and not record["own_errors"]
    assert swept.records[0, 0, 0]["own"]["rest"] == 1
    assert swept.records[0, 0, 1]["own"]["rest"] > 1
    assert "worst" in (tmp_path / "report.html").read_text() and (tmp_path / "figures" / "worst.pdf").exists()
    assert "worst" in (tmp_path / "results.csv").read_text().splitlines()[0]
    assert (
        "worst" in (tmp_path / "summary.csv").read_text()
        and "worst" in (tmp_path / "summary.tex").read_text()
    )


def test_a_metric_comes_later_without_an_edit_and_again_when_it_changes(tmp_path, monkeypatch):
    run(SMALL, tmp_path)
    monkeypatch.setattr(module, "load", lambda *_, **__: pytest.fail("weights were read"))
    calls = tmp_path / "calls"  # a list would be part of the function, and change it

    def count(_result, _source, weight=1, **_rest):
        with calls.open("a") as file:
            file.write(f"{weight} ")
        return weight

    assert run(SMALL, tmp_path, metrics={"m": count}).records[0, 0, 0]["own"] == {"m": 1.0}
    run(SMALL, tmp_path, metrics={"m": count})
    assert calls.read_text() == "1 "  # it was not measured twice
    heavy = functools.partial(count, weight=7)
    assert run(SMALL, tmp_path, metrics={"m": heavy}).records[0, 0, 0]["own"] == {"m": 7.0}
    assert lines(tmp_path)[0]["own"] == {"m": 7.0}


@pytest.mark.parametrize(
    "value, error",
    [
        (float("nan"), "ValueError: its result is nan, wanted a finite number"),
        ("good", "ValueError: its result is 'good', wanted a finite number"),
        (None, "ValueError: its result is None, wanted a finite number"),
        (ZeroDivisionError("no"), "ZeroDivisionError: no"),
    ],
)
def test_a_metric_that_fails_is_noted_and_its_edit_stays_done(tmp_path, monkeypatch, value, error):
    state = [value]

    def fragile(*_pictures, **_rest):
        if isinstance(state[0], Exception):
            raise state[0]
        return state[0]

    metrics = {"fragile": lambda *a, **k: fragile(*a, **k), "worst": difference}
    swept = run(SMALL, tmp_path, metrics=metrics)
    (record,) = swept.records.values()
    assert record["status"] == "done" and record["own_errors"] == {"fragile": error}
    assert record["own"]["fragile"] is None and record["own"]["worst"] > 0
    assert "the metric fragile for 1 of 1 runs, the first with" in (tmp_path / "report.html").read_text()
    monkeypatch.setattr(module, "load", lambda *_, **__: pytest.fail("weights were read"))
    state[0] = torch.tensor(0.5)
    (record,) = run(SMALL, tmp_path, metrics=metrics).records.values()
    assert record["own"]["fragile"] == 0.5 and not record["own_errors"]


def test_true_and_false_are_numbers_of_a_metric(tmp_path):
    swept = run(SMALL, tmp_path, metrics={"yes": lambda result, source, **rest: result.size == source.size})
    assert swept.records[0, 0, 0]["own"] == {"yes": 1.0}


# masks


def test_distances_inside_and_outside_of_a_mask(tmp_path, monkeypatch):
    mask = Image.new("L", (32, 32))
    mask.paste(255, (0, 0, 16, 32))
    mask.save(tmp_path / "mask.png")
    spec = {**SMALL, "masks": [str(tmp_path / "mask.png")]}
    seen = []

    def look(_result, _source, mask, **_rest):
        seen.append(mask)
        return 1

    plain = run(SMALL, tmp_path / "out")
    monkeypatch.setattr(module, "load", lambda *_, **__: pytest.fail("weights were read"))
    swept = run(spec, tmp_path / "out", metrics={"look": look})
    record = swept.records[0, 0, 0]
    picture = Image.open(swept.folder / record["file"])
    wanted = source_distances(picture, Image.open(mini.EXAMPLE), mask)
    assert len(wanted) == 9 and {name: record["metrics"][name] for name in wanted} == wanted
    assert seen[0].size == (32, 32)
    assert "outside_changed" in (tmp_path / "out" / "results.csv").read_text()
    assert "PSNR, outside" in (tmp_path / "out" / "report.html").read_text()
    again = run(SMALL, tmp_path / "out").records[0, 0, 0]
    assert again["metrics"] == plain.records[0, 0, 0]["metrics"]  # without the mask's


@pytest.fixture
def half(tmp_path):
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 32, 64))
    mask.save(tmp_path / "half.png")
    return tmp_path / "half.png"


def test_masked_edits_and_strengths_are_axes(tmp_path, pipe, half):
    grid = {"masked": [False, True], "strength": [0.5, 1.0], "mask.preserve": ["latent", "velocity"]}
    spec = {**SMALL, "steps": 4, "masks": [str(half)], "grid": grid}
    swept = run(spec, tmp_path / "out", pipe=pipe, device=None)
    # Without a mask nothing is kept, in whatever way.
    assert [len(cell.combinations) for cell in swept.spec.cells] == [2, 2, 1, 1, 1, 1]
    mask, found = Image.open(half), {}
    for (_, _, k), record in swept.records.items():
        cell = swept.spec.cells[k]
        assert record["status"] == "done", record
        generator = torch.Generator().manual_seed(0)
        wanted = pipe.edit(
            Image.open(mini.EXAMPLE), PROMPT, num_inference_steps=4, generator=generator,
            strength=cell.strength, mask_image=mask if cell.masked else None, switches=cell.switches,
        ).images[0]  # fmt: skip
        assert same(Image.open(swept.folder / record["file"]), wanted)
        found[cell.masked, cell.strength, cell.switches.mask.preserve] = record["metrics"]
    assert (
        len({metrics["outside_psnr"] for metrics in found.values()}) >= 4
    )  # each strength, with and without


def test_another_mask_is_another_masked_run_and_the_same_plain_one(tmp_path, half, monkeypatch):
    spec = {**SMALL, "masks": [str(half)], "grid": {"masked": [False, True]}}
    run(spec, tmp_path / "out")
    Image.open(half).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(half)
    with edits_counted(monkeypatch) as calls:
        run(spec, tmp_path / "out")
    assert len(calls) == 1


# LoRAs and a given pipeline


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    path = tmp_path_factory.mktemp("lora") / "style.safetensors"
    save_lora(path)
    return path


def test_a_lora_and_its_scale_are_axes(tmp_path, pipe, lora):
    spec = {**SMALL, "grid": {"lora": ["none", str(lora)], "lora_scale": [0.5, 1.0]}}
    swept = run(spec, tmp_path, pipe=pipe, device=None)
    assert [len(cell.combinations) for cell in swept.spec.cells] == [2, 1, 1]  # without one its scale is idle
    found = pictures(swept)
    assert same(found[0], edit(pipe).images[0]) and pipe.loras == {}
    for picture, scale in zip(found[1:], (0.5, 1.0), strict=True):
        pipe.load_lora_weights(lora, "it", scale=scale)
        assert same(picture, edit(pipe).images[0])
        pipe.unload_lora_weights()
    assert len({picture.tobytes() for picture in found}) == 3


def test_a_lora_of_the_pipeline_stays_beside_the_sweeps(tmp_path, pipe, lora):
    pipe.load_lora_weights(lora, "own", scale=0.3)
    spec = {**SMALL, "grid": {"lora": ["none", str(lora)]}}
    found = pictures(run(spec, tmp_path, pipe=pipe, device=None))
    assert pipe.loras == {"own": 0.3} and same(found[0], edit(pipe).images[0])
    pipe.disable_lora()
    disabled = pictures(run(spec, tmp_path / "disabled", pipe=pipe, device=None))
    assert same(disabled[0], edit(pipe).images[0]) and not same(disabled[1], found[1])
    pipe.enable_lora()
    assert pipe.loras == {"own": 0.3}
    pipe.load_lora_weights(lora, "second", scale=1.0)
    pipe.set_adapters(["own", "second"], [0.3, 1.0])
    assert same(found[1], edit(pipe).images[0])


def test_another_file_under_the_same_name_is_another_run(tmp_path, lora, monkeypatch):
    path = tmp_path / "style.safetensors"
    path.write_bytes(lora.read_bytes())
    spec = {**SMALL, "grid": {"lora": ["none", str(path)]}}
    run(spec, tmp_path / "out")
    save_lora(path, seed=5)
    with edits_counted(monkeypatch) as calls:
        run(spec, tmp_path / "out")
    assert len(calls) == 1


def test_a_given_pipeline_is_used_and_known_by_its_weights(tmp_path, pipe, monkeypatch):
    monkeypatch.setattr(module, "load", lambda *_, **__: pytest.fail("weights were read"))
    first = run(SMALL, tmp_path, pipe=pipe, device=None)
    assert first.records[0, 0, 0]["model"] == "the given pipeline"
    with edits_counted(monkeypatch) as calls:
        run(SMALL, tmp_path, pipe=pipe, device=None)
        run(SMALL, tmp_path, pipe=qwenedit.load(device="cpu", progress=False), device=None)
        assert not calls
        with torch.no_grad():
            pipe.mmdit.blocks[2].img_mlp.up.weight.mul_(1.01)
        run(SMALL, tmp_path, pipe=pipe, device=None)
    assert len(calls) == 1


def test_what_counts_for_a_pipelines_hash(pipe, lora):
    found = [pipe_fingerprint(pipe)]
    assert found[0] == pipe_fingerprint(qwenedit.load(device="cpu", progress=False))
    pipe.load_lora_weights(lora, "it", scale=0.5)
    found.append(pipe_fingerprint(pipe))
    pipe.set_adapters(["it"], [1.0])
    found.append(pipe_fingerprint(pipe))
    pipe.unload_lora_weights()
    assert pipe_fingerprint(pipe) == found[0]
    pipe.micro_batch = 1
    found.append(pipe_fingerprint(pipe))
    found.append(pipe_fingerprint(qwenedit.load(device="cpu", progress=False, residency="stream")))
    assert len(set(found)) == 5


@torch.no_grad()
def test_every_value_of_a_weight_counts_for_the_hash(pipe):
    """Also those of one column alone, and a change that keeps the sum."""
    found = [pipe_fingerprint(pipe)]
    weight = pipe.mmdit.blocks[2].img_mlp.up.weight
    for column in (1, weight.shape[1] - 1):
        weight[:, column] += 0.1
        found.append(pipe_fingerprint(pipe))
    weight[:] = weight.roll(1, 0)
    found.append(pipe_fingerprint(pipe))
    pipe.vision_language.embed_tokens.weight[-1, -1] += 1e-3
    found.append(pipe_fingerprint(pipe))
    assert len(set(found)) == len(found)


def test_configs_alphas_and_samplers_count_for_the_hash(pipe, lora):
    found = [pipe_fingerprint(pipe)]
    pipe.mmdit.config = dataclasses.replace(pipe.mmdit.config, zero_cond_t=True)
    found.append(pipe_fingerprint(pipe))
    pipe.vae.config = dataclasses.replace(pipe.vae.config, latents_mean=(0.0,) * 16)
    found.append(pipe_fingerprint(pipe))
    pipe.processor.config = dataclasses.replace(pipe.processor.config, image_mean=(0.0,) * 3)
    found.append(pipe_fingerprint(pipe))
    samplers = ("heun", functools.partial(flow_sde, eta=0.5), functools.partial(flow_sde, eta=0.6))
    for pipe.sampler in samplers:
        found.append(pipe_fingerprint(pipe))
    pipe.load_lora_weights(lora, "it")
    found.append(pipe_fingerprint(pipe))
    for one in (one for one in pipe.mmdit.modules() if isinstance(one, Change)):
        one.factor *= 2
    found.append(pipe_fingerprint(pipe))
    assert len(set(found)) == len(found)


# a dialect


def test_a_dialect_is_an_axis(tmp_path, pipe):
    swept = run(
        {**SMALL, "grid": {"dialect": ["reference", "diffsynth"], "true_cfg_scale": [1, 4]}}, tmp_path
    )
    assert [cell.switches.flat() for cell in swept.spec.cells] == 2 * [{}] + 2 * [{"dialect": "diffsynth"}]
    for cell, picture in zip(swept.spec.cells, pictures(swept), strict=True):
        dialect = qwenedit.Switches(dialect=cell.values.get("dialect", "reference"))
        assert same(picture, edit(pipe, true_cfg_scale=cell.true_cfg_scale, switches=dialect).images[0])
    assert len({picture.tobytes() for picture in pictures(swept)}) == 4


# the sampler


@contextlib.contextmanager
def under_heun(pipe):
    before, pipe.sampler = pipe.sampler, "heun"
    yield
    pipe.sampler = before


def backwards(*arguments, **options):
    """A sampler of the caller's, of another number of steps than the schedule's."""
    return heun(*arguments, **options)


def test_the_pipelines_sampler_is_that_of_runs_that_name_none(tmp_path, pipe):
    pipe.sampler = "heun"
    spec = {**SMALL, "grid": {"sampler": ["euler", "heun"]}}
    swept = run(spec, tmp_path, pipe=pipe, device=None)
    assert [record["sampler"] for record in swept.records.values()] == ["heun", "euler"]
    assert swept.spec.cells[0].values == {"sampler": "heun"}
    found = pictures(swept)
    assert same(found[0], edit(pipe).images[0])
    assert same(found[1], edit(pipe, sampler="euler").images[0]) and not same(*found)
    (record,) = run(SMALL, tmp_path / "alone", pipe=pipe, device=None).records.values()
    assert record["sampler"] == "heun"
    assert same(Image.open(tmp_path / "alone" / record["file"]), found[0])


def test_a_checkpoints_scheduler_says_the_sampler(tmp_path, pipe):
    folder = shutil.copytree(mini.CHECKPOINT, tmp_path / "model")
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "stochastic_sampling": True}))
    swept = run({**SMALL, "model": str(folder)}, tmp_path / "out")
    assert swept.records[0, 0, 0]["sampler"] == "stochastic"
    assert same(pictures(swept)[0], edit(pipe, sampler="stochastic").images[0])


def test_a_sampler_that_is_a_function_runs_and_is_recorded_by_name(tmp_path, pipe, monkeypatch):
    pipe.sampler = functools.partial(backwards)
    swept = run(SMALL, tmp_path, pipe=pipe, device=None)
    assert swept.records[0, 0, 0]["sampler"] == f"{__name__}.backwards"
    assert same(pictures(swept)[0], edit(pipe).images[0])
    with edits_counted(monkeypatch) as calls:
        run(SMALL, tmp_path, pipe=pipe, device=None)
    assert not calls


def test_an_intervention_may_set_the_sampler(tmp_path, pipe, monkeypatch):
    spec = {**SMALL, "grid": {"intervention": ["none", "heun"]}}
    swept = run(spec, tmp_path, interventions={"heun": under_heun})
    plain, other = pictures(swept)
    assert same(plain, edit(pipe).images[0]) and same(other, edit(pipe, sampler="heun").images[0])
    with edits_counted(monkeypatch) as calls:
        run(spec, tmp_path, interventions={"heun": under_heun})
    assert not calls


# from a file, and what is refused


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A spec with a module of its own beside it, used from elsewhere."""
    name = f"methods_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(
        "from qwenedit import taps\n\ndef halve(pipe):\n"
        "    return taps(pipe.mmdit, {'blocks.3.img_mlp_add': lambda x, site: x * 0.5})\n\n"
        "def area(result, source, **rest):\n    return result.width * result.height\n\n"
        "def bad(result):\n    return 1\n\n"
        "class Inner:\n    @staticmethod\n    def halve(pipe):\n        return halve(pipe)\n"
    )
    monkeypatch.chdir("/")
    return tmp_path, name


def write(folder, *, interventions=None, metrics=None, rest=""):
    text = 'pictures = ["mini:0"]\nsteps = 1\n' + rest
    for table, content in (("interventions", interventions), ("metrics", metrics)):
        if content:
            text += f"[{table}]\n" + "".join(
                f"{json.dumps(key)} = {json.dumps(value)}\n" for key, value in content.items()
            )
    path = folder / "spec.toml"
    path.write_text(text)
    return path


def test_functions_by_name_from_a_module_beside_the_spec(folder):
    home, name = folder
    path = write(
        home, rest='[grid]\nintervention = ["none", "a", "b"]\n',
        interventions={"a": f"{name}:halve", "b": f"{name}:Inner.halve"}, metrics={"area": f"{name}:area"},
    )  # fmt: skip
    swept = run(path, home / "out")
    plain, a, b = pictures(swept)
    assert same(a, b) and not same(plain, a)
    assert {record["own"]["area"] for record in swept.records.values()} == {64 * 64}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"interventions": {"a": "{}"}}, r'interventions: a is .*, wanted "module:function"'),
        ({"interventions": {"a": "no_such_module_:x"}}, "cannot be imported: ModuleNotFoundError"),
        ({"interventions": {"a": "{}:nothing"}}, "cannot be imported: AttributeError"),
        (
            {"metrics": {"a": "{}:bad"}},
            r"metrics: a cannot be called as function\(result, source, \*\*rest\)",
        ),
        ({"metrics": {"psnr": "{}:area"}}, "metrics: psnr is what something else is called"),
        ({"metrics": {"a/b": "{}:area"}}, r"metrics: 'a/b' is no name"),
        ({"interventions": {"a": 3}}, "interventions: a is int, wanted a function"),
        (
            {"interventions": {"a": "{}:halve"}},
            r'there are interventions, but none is used: wanted .*\["none", "a"\]',
        ),
        (
            {"rest": 'intervention = "b"\n', "interventions": {"a": "{}:halve"}},
            "intervention is 'b', wanted 'none'",
        ),
        ({"rest": 'lora = "x.safetensors"\n'}, "no such LoRA: .*x.safetensors"),
        ({"rest": "lora_scale = 0.5\n"}, "lora_scale is given, but lora is never another than 'none'"),
        ({"rest": 'masks = ["x.png"]\n'}, "there are 1 masks, wanted 0"),
        ({"rest": 'masks = "x.png"\n'}, "masks is 'x.png', wanted a list of"),
        ({"rest": "masked = true\n"}, "masked is true, but mini:0 has no mask"),
        (
            {"rest": '[switches]\n"mask.posterior" = "mode"\n'},
            "mask.posterior is given, but masked is never true, and strength never below 1",
        ),
        (
            {"rest": 'strength = 0.5\n[grid]\n"mask.preserve" = ["x0", "velocity"]\n'},
            "mask.preserve is given, but masked is never true",
        ),
        ({"rest": "masked = 1\n"}, "masked is 1, wanted true or false"),
        ({"rest": "strength = 0\n"}, "strength is 0, wanted a number above 0, at most 1"),
    ],
)
def test_what_is_refused_before_anything_runs(folder, monkeypatch, changes, message):
    home, name = folder
    monkeypatch.setattr(module, "load", lambda *_, **__: pytest.fail("weights were read"))
    changes = json.loads(json.dumps(changes).replace("{}", name))
    with pytest.raises(ValueError, match=message):
        run(write(home, **changes), home / "out")
    assert not (home / "out").exists()


def test_a_mask_that_changes_nothing_is_named_by_its_picture(tmp_path):
    mask = tmp_path / "black.png"
    Image.new("L", (64, 64)).save(mask)
    spec = {**SMALL, "masks": [str(mask)], "masked": True}
    with pytest.raises(ValueError, match=rf"{mini.EXAMPLE.name}: the mask changes nothing"):
        run(spec, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_python_callers_are_refused(tmp_path, pipe, lora):
    with pytest.raises(ValueError, match=r"there are a pipe and device, wanted the pipe's own"):
        run(SMALL, tmp_path, pipe=pipe)
    with pytest.raises(ValueError, match=r"there are a pipe and model"):
        ablate({**SMALL, "model": str(mini.CHECKPOINT)}, tmp_path, pipe=pipe)
    with pytest.raises(ValueError, match="interventions: a is int, wanted a function"):
        run(HALVE, tmp_path, interventions={"a": 3})
    with pytest.raises(ValueError, match=r"interventions: a cannot be called as function\(pipe\)"):
        run(HALVE, tmp_path, interventions={"a": lambda: 0})
    (tmp_path / "x.safetensors").write_bytes(b"no LoRA")
    with pytest.raises(ValueError, match=r"x\.safetensors"):
        run({**SMALL, "lora": str(tmp_path / "x.safetensors")}, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert read_spec({**SMALL, "lora": str(lora)}).cells[0].lora == str(lora)


def test_the_command_says_that_a_metric_failed(folder, capsys):
    from qwenedit.cli import options as cli

    home, name = folder
    (home / f"{name}.py").write_text("def broken(result, source, **rest):\n    return 1 / 0\n")
    path = write(home, metrics={"broken": f"{name}:broken"})
    assert cli.main(["ablate", str(path), "-o", str(home / "out"), "--device", "cpu", "--quiet"]) == 2
    printed = capsys.readouterr()
    assert printed.out == f"{home / 'out' / 'report.html'}\n"
    assert printed.err == (
        "qwenedit: the metric broken failed for 1 of 1 edits, the first with ZeroDivisionError: division by "
        "zero: see the report\n"
    )


def test_shared_encodings_are_not_shared_with_interventions(tmp_path, monkeypatch):
    encoded, condition = [], QwenImageEdit.condition

    def counted(self, *arguments, **options):
        encoded.append(1)
        return condition(self, *arguments, **options)

    monkeypatch.setattr(QwenImageEdit, "condition", counted)
    run({**HALVE, "seeds": [0, 1]}, tmp_path, interventions={"halve": halve})
    assert len(encoded) == 1 + 2


def test_the_pages_intervention_and_metric_work(tmp_path, monkeypatch):
    """Those of docs/ablation.md, with a network in LPIPS' place."""
    page = (Path(__file__).parents[2] / "docs" / "ablation.md").read_text(encoding="utf-8")
    functions = [part for part in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "def " in part]
    tables = [part for part in re.findall(r"```toml\n(.*?)```", page, re.DOTALL) if "methods:" in part]
    assert len(functions) == len(tables) == 2

    class Lpips:
        LPIPS = staticmethod(lambda net: lambda x, y: (x - y).abs().mean())

    transforms = types.ModuleType("torchvision.transforms.functional")
    transforms.to_tensor = lambda picture: pixels(picture).float()
    for name, made in (
        ("lpips", Lpips), ("torchvision", types.ModuleType("torchvision")),
        ("torchvision.transforms", types.ModuleType("torchvision.transforms")),
        ("torchvision.transforms.functional", transforms),
    ):  # fmt: skip
        monkeypatch.setitem(sys.modules, name, made)
    monkeypatch.setitem(sys.modules, "methods", None)
    monkeypatch.delitem(sys.modules, "methods")
    (tmp_path / "methods.py").write_text("import qwenedit\n" + "\n".join(functions))
    head = 'pictures = ["mini:0"]\nsteps = 1\n'
    (tmp_path / "spec.toml").write_text(head + "\n".join(tables))
    swept = run(tmp_path / "spec.toml", tmp_path / "out")
    plain, quiet = swept.records.values()
    assert not swept.failed and not swept.failed_metrics and quiet["intervention"] == "quiet"
    source = swept.spec.cases[0].source
    for record, picture in zip((plain, quiet), pictures(swept), strict=True):
        wanted = 2 * (pixels(picture) - pixels(source)).abs().mean()
        assert record["own"]["lpips"] == pytest.approx(float(wanted), rel=1e-5)
