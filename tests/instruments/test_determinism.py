"""The same run twice, everything restored afterwards; a row of a batch that is its single run, bit by bit."""

import dataclasses
import json
import os

import pytest
import torch
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import pad_sequence

import qwenedit
from qwenedit import mini
from qwenedit.encoding.conditioning import Conditioning, Prompt
from qwenedit.instruments.determinism import deterministic
from qwenedit.networks.mmdit import MMDiT, MMDiTConfig
from qwenedit.sampling.guidance import TrueCFG
from qwenedit.sampling.predictor import predictor
from qwenedit.sampling.sampler import euler
from qwenedit.switches import Guidance
from qwenedit.taps import taps
from tests.support import FP32, assert_close, randomise_


@pytest.fixture(scope="module")
def pipe():
    return qwenedit.load(device="cpu", progress=False)


def settings():
    cudnn, cuda = torch.backends.cudnn, torch.backends.cuda
    return {
        "algorithms": torch.are_deterministic_algorithms_enabled(),
        "warn_only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "cudnn": (cudnn.deterministic, cudnn.benchmark),
        "attention": (
            cuda.math_sdp_enabled(), cuda.flash_sdp_enabled(),
            cuda.mem_efficient_sdp_enabled(), cuda.cudnn_sdp_enabled(),
        ),
        "cublas": os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
    }  # fmt: skip


BACKENDS = (
    SDPBackend.MATH, SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION,
)  # fmt: skip
PINNED = {
    "algorithms": True,
    "warn_only": False,
    "cudnn": (True, False),
    "attention": (True, False, False, False),
    "cublas": None,
}


def test_the_same_run_twice_is_equal_and_the_manifest_says_what_it_was(pipe):
    picture, results = Image.open(mini.EXAMPLE), []
    for _ in range(2):
        with deterministic(pipe) as manifest:
            assert settings() == PINNED
            results.append(
                pipe.edit(
                    picture,
                    "make the circle red",
                    num_inference_steps=2,
                    generator=torch.Generator().manual_seed(0),
                    output_type="pt",
                ).images
            )
    assert torch.equal(*results)
    assert json.loads(json.dumps(manifest)) == manifest
    wanted = {
        "qwenedit": qwenedit.__version__,
        "torch": torch.__version__,
        "device": "cpu",
        "dtype": "float32",
        "threads": torch.get_num_threads(),
        "attention": "MATH",
        "deterministic_algorithms": True,
        "cudnn_deterministic": True,
        "cudnn_benchmark": False,
    }
    assert {key: manifest[key] for key in wanted} == wanted
    with deterministic() as without:
        assert without["device"] is None and without["dtype"] is None


@pytest.mark.parametrize("raising", [False, True])
@pytest.mark.parametrize("unusual", [False, True])
def test_everything_is_restored(raising, unusual, monkeypatch):
    """Also where it was not the default, and after an exception."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    if unusual:
        torch.use_deterministic_algorithms(True, warn_only=True)
        monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    try:
        with sdpa_kernel(list(BACKENDS[-1:] if unusual else BACKENDS)):
            before = settings()
            try:
                with deterministic() as manifest:
                    assert settings() == {**PINNED, "cublas": ":4096:8"}
                    assert manifest["cublas_workspace"] == ":4096:8"
                    with deterministic():  # they nest
                        pass
                    assert settings() == {**PINNED, "cublas": ":4096:8"}
                    if raising:
                        raise KeyError("stop")
            except KeyError:
                pass
            assert settings() == before
    finally:
        torch.use_deterministic_algorithms(False)


def test_an_operation_without_a_deterministic_algorithm_is_an_error():
    x = torch.zeros(3)
    x.put_(torch.tensor([0, 0]), torch.tensor([1.0, 2.0]))
    with deterministic(), pytest.raises(RuntimeError, match="does not have a deterministic implementation"):
        x.put_(torch.tensor([0, 0]), torch.tensor([1.0, 2.0]))


CONFIG = MMDiTConfig(
    patch_size=2, in_channels=8, out_channels=2, num_layers=2, attention_head_dim=12, num_attention_heads=2,
    joint_attention_dim=10, guidance_embeds=False, axes_dims_rope=(4, 4, 4), zero_cond_t=True,
)  # fmt: skip
GRID = (1, 2, 3)
ONE, TWO = ((1, 2, 2),), ((1, 3, 2), (1, 1, 4))


def joined(rows):
    """Conditionings of one row each as one: prompts padded to the longest."""

    def prompts(parts):
        embeds = [part.embeds[0] for part in parts]
        padded = pad_sequence(embeds, batch_first=True)
        mask = torch.arange(padded.shape[1]) < torch.tensor([[len(x)] for x in embeds])
        return Prompt(padded, None if mask.all() else mask)

    return dataclasses.replace(
        rows[0],
        prompt=prompts([row.prompt for row in rows]),
        negative=prompts([row.negative for row in rows]),
        reference_latents=tuple(row.reference_latents[0] for row in rows),
        reference_grids=tuple(row.reference_grids[0] for row in rows),
    )


def ragged():
    """Five rows that differ in the lengths of their texts and in number and sizes of their references."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    rows = []
    for length, negative, grids in ((5, 4, ONE), (9, 2, TWO), (3, 6, ONE), (7, 3, ()), (8, 5, ONE)):
        rows.append(
            Conditioning(
                prompt=Prompt(draw(1, length, 10)),
                negative=Prompt(draw(1, negative, 10)),
                target_grid=GRID,
                reference_latents=(tuple(draw(g[1] * g[2], 8) for g in grids),),
                reference_grids=(grids,),
            )
        )
    return rows, draw(5, 6, 8)


def run(mmdit, conditioning, latents, micro_batch=None, rule=None):
    predict = predictor(mmdit, conditioning, guided=True, micro_batch=micro_batch)
    *_, last = euler(predict, latents, [1.0, 0.6, 0.2, 0.0], TrueCFG(3.0, rule or Guidance()))
    return last.after


@pytest.mark.parametrize(
    "rule", [Guidance(), Guidance(norm="global"), Guidance(norm="comfy_x0", eta=0.0, momentum=-0.5)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_micro_batches_of_one_each_row_is_its_single_run(rule, dtype):
    mmdit = randomise_(MMDiT(CONFIG)).requires_grad_(False).to(dtype)
    rows, latents = ragged()
    rows, latents = [row.to(dtype=dtype) for row in rows], latents.to(dtype)
    together = run(mmdit, joined(rows), latents, 1, rule)
    for i, row in enumerate(rows):
        assert torch.equal(together[i : i + 1], run(mmdit, row, latents[i : i + 1], None, rule))


def test_micro_batches_hold_rows_alike_and_no_padding_that_all_have():
    mmdit, seen = randomise_(MMDiT(CONFIG)).requires_grad_(False), []
    rows, latents = ragged()
    whole = run(mmdit, joined(rows), latents)
    for size, wanted in (
        (1, [([0], 5), ([2], 3), ([4], 8), ([1], 9), ([3], 7)]),
        (2, [([0, 2], 5), ([4], 8), ([1], 9), ([3], 7)]),
        (3, [([0, 2, 4], 8), ([1], 9), ([3], 7)]),
        (None, [([0, 2, 4], 9), ([1], 9), ([3], 9)]),
    ):
        seen.clear()
        with taps(mmdit, {"txt_in": lambda x, site: seen.append((site.labels, x))}):
            result = run(mmdit, joined(rows), latents, size)
        first = [(labels, x) for labels, x in seen if labels["step"] == 0 and labels["branch"] == "cond"]
        assert [(labels["rows"], x.shape[1]) for labels, x in first] == wanted
        assert all(
            labels["layout"].text == x.shape[1] and len(x) == len(labels["rows"]) for labels, x in seen
        )
        assert_close(result, whole, FP32)


def test_a_row_that_was_taken_out_of_a_padded_batch_loses_its_padding():
    mmdit = randomise_(MMDiT(CONFIG)).requires_grad_(False)
    rows, latents = ragged()
    whole = joined(rows)
    index = torch.tensor([2])
    row = dataclasses.replace(rows[2], prompt=whole.prompt.rows(index), negative=whole.negative.rows(index))
    assert row.prompt.mask is not None
    alone = run(mmdit, rows[2], latents[2:3])
    assert torch.equal(run(mmdit, row, latents[2:3], 1), alone)


@pytest.mark.parametrize("share_prefix", [False, True])
def test_in_micro_batches_of_one_each_row_of_an_edit_is_its_single_run(pipe, share_prefix):
    """Encoders, transformer and decoder: pictures and texts of different sizes, a generator a row."""
    gradient = Image.linear_gradient("L").convert("RGB")
    pictures = [gradient.resize(size) for size in ((64, 64), (70, 66), (60, 64))]
    options = {"height": 64, "width": 64, "num_inference_steps": 2, "output_type": "pt"}
    prompts, negatives = ["make the circle red", "把左边的蓝色圆形变成红色 🔴", ""], ["a dog", " ", "x"]
    generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
    pipe.micro_batch, pipe.share_prefix = 1, share_prefix
    together = pipe.edit(pictures, prompts, negative_prompt=negatives, generator=generators, **options).images
    pipe.micro_batch = None
    for row in range(3):
        generator = torch.Generator().manual_seed(row)
        alone = pipe.edit(
            pictures[row], prompts[row], negative_prompt=negatives[row], generator=generator, **options
        ).images
        assert torch.equal(together[row], alone[0])
    pipe.share_prefix = False


@pytest.mark.parametrize("size", [0, -1, 1.0, True, "1"])
def test_a_micro_batch_is_a_whole_number(size):
    rows, _ = ragged()
    with pytest.raises(
        ValueError, match=f"micro_batch is {size!r}, wanted a whole number of at least 1, or None"
    ):
        predictor(MMDiT(CONFIG), rows[0], guided=False, micro_batch=size)
    pipe = qwenedit.load(device="cpu", progress=False)
    pipe.micro_batch = size
    with pytest.raises(ValueError, match="micro_batch is"):
        pipe.generate("x")
