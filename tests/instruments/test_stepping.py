"""A run's sampler for the length of a `with` block, and the picture that it edits."""

import pytest
import torch
from PIL import Image

from qwenedit import Recorder, References, Switches, taps
from qwenedit.instruments.stepping import sampled_by, source_latents
from qwenedit.mini import EXAMPLE
from qwenedit.sampling.sampler import euler
from qwenedit.sampling.samplers import heun


def run(pipe, steps=2, **options):
    generator = torch.Generator().manual_seed(0)
    return pipe.edit(
        Image.open(EXAMPLE), "make the circle red", num_inference_steps=steps, generator=generator,
        output_type="latent", **options,
    ).images  # fmt: skip


def test_runs_that_name_no_sampler_take_it(edit):
    plain, wanted = run(edit), run(edit, sampler="heun")
    before = edit.sampler
    with sampled_by(edit, euler):
        assert torch.equal(run(edit), plain)
        with sampled_by(edit, heun):
            assert torch.equal(run(edit), wanted)
        assert torch.equal(run(edit, sampler="heun"), wanted)
        assert torch.equal(run(edit), plain)
    assert edit.sampler is before
    with pytest.raises(ZeroDivisionError), sampled_by(edit, heun):
        raise ZeroDivisionError
    assert edit.sampler is before


def test_one_that_no_run_takes_is_an_error(edit):
    with pytest.raises(RuntimeError, match="no run has taken the sampler"), sampled_by(edit, heun):
        run(edit, 1, sampler="euler")
    assert edit.sampler is None
    for bad, message in (
        ("heun", "sampler is 'heun', wanted a function"),
        (3, "sampler is 3, wanted one of"),
    ):
        with pytest.raises(ValueError, match=message), sampled_by(edit, bad):
            pytest.fail("nothing may run")


@pytest.mark.parametrize("check_finite", [True, False])
def test_what_a_sampler_writes_into_its_steps_is_used(edit, monkeypatch, check_finite):
    """Also where the steps are checked after the sampler made them."""
    monkeypatch.setattr(edit, "check_finite", check_finite)

    def still(predict, latents, sigmas, guidance, preserve):
        for step in euler(predict, latents, sigmas, guidance, preserve):
            step.velocity = torch.zeros_like(step.latents)
            yield step

    noise = torch.randn(1, 16, 64, generator=torch.Generator().manual_seed(0))
    with sampled_by(edit, still):
        assert torch.equal(run(edit, latents=noise), noise)


@pytest.mark.parametrize("micro_batch", [None, 1])
def test_the_source_is_that_of_each_row(edit, monkeypatch, micro_batch):
    monkeypatch.setattr(edit, "micro_batch", micro_batch)
    pictures = [Image.open(EXAMPLE), Image.new("RGB", (64, 64), "red"), Image.new("RGB", (64, 64), "blue")]
    conditioning = edit.condition(pictures, ["red"] * 3)
    found = []

    def looking(predict, latents, sigmas, guidance, preserve):
        found.append(source_latents(edit, predict, latents, sigmas[0]))
        yield from euler(predict, latents, sigmas, guidance, preserve)

    with torch.no_grad(), sampled_by(edit, looking):
        plain = list(edit.steps(conditioning, num_inference_steps=1))
    assert torch.equal(found[0], torch.stack([row[0] for row in conditioning.reference_latents]))
    assert len(plain) == 1
    with pytest.raises(ValueError, match="the picture that is edited is missing"), sampled_by(edit, looking):
        run(edit, 1, switches=Switches(references=References(latents="left_out")))


def test_the_transformers_input_can_be_read_and_replaced(edit):
    """The tap `latents`: target and references as they come in, in both branches."""
    seen, plain = Recorder(), run(edit, 1)
    with taps(edit.mmdit, {"latents": seen}):
        assert torch.equal(run(edit, 1), plain)
    assert [(key.step, key.branch) for key in seen] == [(0, "cond"), (0, "uncond")]
    (x, y) = seen.values()
    conditioning = edit.condition(Image.open(EXAMPLE), "make the circle red")
    assert torch.equal(x, y) and torch.equal(x[:, 16:], conditioning.reference_latents[0][0][None])
    with taps(edit.mmdit, {"latents": lambda x, site: torch.cat([x[:, :16], 0 * x[:, 16:]], dim=1)}):
        wanted = run(edit, 1)
    zeroed = run(edit, 1, switches=Switches(references=References(latents="zeroed")))
    torch.testing.assert_close(wanted, zeroed)
