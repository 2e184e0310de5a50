"""Runs that are looked at: the pictures are the plain run's, and the page has the run's numbers."""

import base64
import io
import json
import math
import re
import warnings
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from PIL import Image

import qwenedit
from qwenedit import mini
from qwenedit.ablation.first_block_cache import first_block_cache
from qwenedit.ablation.intervening import state_of
from qwenedit.exploration import explore as exploring
from qwenedit.exploration.page import MOST, write_page
from qwenedit.exploration.plan import SIDE, evenly, plan_of
from qwenedit.exploration.watching import WRITES, Looked, Shown, Watched
from qwenedit.exploration.words import Word
from qwenedit.inputs.pictures import to_pil
from qwenedit.taps import swapped
from tests.tiny import checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:the output's token grid")
PROMPT = "make the circle 红色"


@pytest.fixture(scope="module")
def picture():
    return Image.open(mini.EXAMPLE).convert("RGB")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def data_of(page):
    text = Path(page).read_text(encoding="utf-8")
    return json.loads(
        re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1]
    )


def numbers(text, dtype, shape):
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=dtype).view(shape)


def picture_of(uri):
    assert uri.startswith("data:image/png;base64,")
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))


def cells_of(run, branch):
    """The cell of each token of the joint sequence, from what the page says about patches and words."""
    words = run["words"][branch]
    target, *references = run["pictures"]

    def of_picture(one, start):
        (rows, columns), pool = one["grid"], one["pool"]
        return [start + r // pool * one["cells"][1] + c // pool for r in range(rows) for c in range(columns)]

    start = math.prod(target["cells"])
    cells = [start + k for k, word in enumerate(words) for _ in range(word["start"], word["stop"])]
    cells += of_picture(target, 0)
    start += len(words)
    for one in references:
        cells += of_picture(one, start)
        start += math.prod(one["cells"])
    return torch.tensor(cells), math.prod(target["cells"]) + len(words), start


@contextmanager
def recorded(pipe):
    """Whole attention maps, the writes' tensors, and the steps."""
    maps = qwenedit.AttentionMaps("all", "all")
    writes = qwenedit.Recorder()
    with maps.attached(pipe.mmdit), qwenedit.taps(pipe.mmdit, {f"blocks.*.{w}": writes for w in WRITES}):
        yield maps, writes


@pytest.mark.parametrize("budget", [None, 60_000], ids=["whole", "pooled"])
def test_the_page_has_the_runs_numbers(edit, picture, tmp_path, monkeypatch, budget):
    """Against AttentionMaps, Recorder and Step in a run of its own; 8 bits lose what `quantised` says."""
    size = {"height": 96, "width": 112} if budget else {}
    if budget:
        monkeypatch.setattr(exploring, "MAPS", budget)
    options = {"num_inference_steps": 4, "true_cfg_scale": 3.0, "negative_prompt": "blue", **size}
    qwenedit.explore(edit, picture, PROMPT, tmp_path / "a.html", generator=seeded(), **options)
    (run,) = data_of(tmp_path / "a.html")["runs"]
    observed = run["observed"]
    assert (run["pictures"][0]["pool"] == 1) == (budget is None) and run["predictions"] == 4
    assert observed["heads"] == (1 if budget else 4)

    encoding = {name: options.pop(name) for name in ("negative_prompt", *size)}
    conditioning = edit.condition(picture, PROMPT, **encoding)
    with torch.no_grad(), recorded(edit) as (maps, writes):
        steps = list(edit.steps(conditioning, generator=seeded(), **options))

    for branch in ("cond", "uncond"):
        cells, rows, columns = cells_of(run, branch)
        for i, step in enumerate(observed["steps"]):
            for block in range(6):
                wanted = [writes[f"blocks.{block}.{w}", step, branch].square().mean().sqrt() for w in WRITES]
                assert run["writes"][branch][i][block] == pytest.approx([x.item() for x in wanted], rel=1e-5)
            for j, block in enumerate(observed["blocks"]):
                stored = run["maps"][branch][i][j]
                shape = observed["heads"], rows, columns
                codes = numbers(stored["codes"], torch.uint8, shape).double()
                tops = numbers(stored["tops"], torch.float32, shape[:2]).double()[..., None]
                probs = maps[f"blocks.{block}.attn", step, branch][0].double()
                if observed["heads"] == 1:
                    probs = probs.mean(0, keepdim=True)
                place = torch.nn.functional.one_hot(cells, columns).double()
                summed = probs @ place
                exact = (place.T @ summed / place.sum(0)[:, None])[:, :rows]
                bound = tops * ((exact / tops).sqrt() / 255 + 510.0**-2) + 1e-5 * tops
                assert ((tops * (codes / 255) ** 2 - exact).abs() <= bound).all()
                assert exact.sum(-1).allclose(torch.ones((), dtype=torch.float64))

    for shown, step in zip(run["steps"], steps, strict=True):
        assert shown["index"] == step.index and shown["sigma"] == step.sigma
        ratio = shown["ratio"]
        codes = numbers(ratio["codes"], torch.uint8, -1).double()
        low, high = ratio["low"], ratio["high"]
        got = low + (high - low) * codes / 255
        assert (got - step.norm_ratio[0]).abs().max() <= (high - low) / 510 + 1e-6
        latents = {
            "latents": step.latents, "x0": step.x0, "cond": step.latents - step.sigma * step.cond,
            "uncond": step.latents - step.sigma * step.uncond,
        }  # fmt: skip
        assert shown["pictures"].keys() == latents.keys()
        for name, x in latents.items():
            assert picture_of(shown["pictures"][name]).tobytes() == decoded(edit, x, conditioning).tobytes()
    (reference,), (grid,) = conditioning.reference_latents[0], conditioning.reference_grids[0]
    shown = picture_of(run["pictures"][1]["picture"])
    assert shown.tobytes() == decoded(edit, reference[None], conditioning, grid).tobytes()


def decoded(pipe, latents, conditioning, grid=None):
    return to_pil(pipe.decode(latents, grid or conditioning.target_grid))[0]


MASK = Image.new("L", (64, 64))
MASK.paste(255, (16, 16, 48, 64))
RUNS = {
    "guided": {},
    "unguided": {"true_cfg_scale": 1.0},
    "mask": {"mask_image": MASK},
    "crop": {"mask_image": MASK, "padding_mask_crop": 4, "strength": 0.7},
    "odd size": {"height": 80, "width": 48},
    "heun": {"sampler": "heun"},
    "stochastic": {"sampler": "stochastic"},
    "references for a while": {"switches": qwenedit.Switches(references=qwenedit.References(steps=(1, 3)))},
    "references in some blocks": {
        "switches": qwenedit.Switches(references=qwenedit.References(blocks=(1, 4)))
    },
    "guided for a while": {"switches": qwenedit.Switches(guidance=qwenedit.Guidance(steps=(1, 2)))},
    "unseen": {"switches": qwenedit.Switches(seen=qwenedit.Seen(picture="unseen", negative=False))},
    "noise": {"latents": torch.randn(1, 16, 64, generator=torch.Generator().manual_seed(3))},
}


@pytest.mark.parametrize("name", RUNS)
def test_the_picture_is_that_of_edit(edit, picture, tmp_path, name):
    options = {"num_inference_steps": 3, **RUNS[name]}
    wanted = edit.edit(picture, PROMPT, generator=seeded(), **options).images[0]
    before = state_of(edit)
    result = qwenedit.explore(edit, picture, PROMPT, tmp_path / "a.html", generator=seeded(), **options)
    assert [one.tobytes() for one in result.images] == [wanted.tobytes()] and state_of(edit) == before
    (run,) = data_of(tmp_path / "a.html")["runs"]
    assert picture_of(run["result"]).tobytes() == wanted.tobytes()
    guided = name != "unguided"
    assert run["maps"].keys() == run["words"].keys() == ({"cond", "uncond"} if guided else {"cond"})
    assert all(one for maps in run["maps"]["cond"] for one in maps)
    if name == "guided for a while":
        assert [bool(maps[0]) for maps in run["maps"]["uncond"]] == [False, True, False]
        assert [step["ratio"] is not None for step in run["steps"]] == [False, True, False]
    if name == "references for a while":
        _, rows, columns = cells_of(run, "cond")
        shares = [
            numbers(maps[2]["codes"], torch.uint8, (4, rows, columns))[..., rows:].any()
            for maps in run["maps"]["cond"]
        ]
        assert shares == [False, True, True]
    if name == "unseen":
        assert not any(word["picture"] for words in run["words"].values() for word in words)


def test_a_run_that_nothing_observes_stays_so(edit, picture, tmp_path, monkeypatch):
    """The run goes on with the unobserved predictions, whose last block computes the target alone."""
    options = {"num_inference_steps": 2, "true_cfg_scale": 1.0}
    wanted = edit.edit(picture, PROMPT, generator=seeded(), **options).images[0]
    seen = []
    forward = type(edit.mmdit).forward

    def noted(self, *args, **options):
        seen.append(options["target_only"])
        return forward(self, *args, **options) + (0 if options["target_only"] else 1)

    monkeypatch.setattr(type(edit.mmdit), "forward", noted)
    noted.__module__ = forward.__module__
    result = qwenedit.explore(edit, picture, PROMPT, tmp_path / "a.html", generator=seeded(), **options)
    assert seen == [True, False] * 2 and result.images[0].tobytes() == wanted.tobytes()


def test_text_to_image(edit, tmp_path):
    options = {"num_inference_steps": 2, "height": 48, "width": 80}
    wanted = edit.generate("a red circle", generator=seeded(), **options).images[0]
    result = qwenedit.explore(edit, None, "a red circle", tmp_path / "a.html", generator=seeded(), **options)
    assert result.images[0].tobytes() == wanted.tobytes()
    (run,) = data_of(tmp_path / "a.html")["runs"]
    assert len(run["pictures"]) == 1 and run["grid"] == [3, 5]
    assert [word["text"] for word in run["words"]["cond"]][:3] == ["a", " red", " circle"]


def test_several_pictures(plus, picture, tmp_path):
    pictures, options = (
        [picture, picture.resize((96, 48))],
        {"num_inference_steps": 2, "height": 64, "width": 64},
    )
    wanted = plus.edit(pictures, PROMPT, generator=seeded(), **options).images[0]
    result = qwenedit.explore(plus, pictures, PROMPT, tmp_path / "a.html", generator=seeded(), **options)
    assert result.images[0].tobytes() == wanted.tobytes()
    (run,) = data_of(tmp_path / "a.html")["runs"]
    grids = [one["grid"] for one in run["pictures"]]
    assert len(grids) == 3 and grids[2][1] > grids[2][0]
    assert [word["picture"] for word in run["words"]["cond"] if word["picture"]] == [1, 2]


@pytest.mark.parametrize("residency", ["stage", "stream"])
def test_weights_that_come_and_go(picture, tmp_path, residency):
    pipe = qwenedit.load(device="cpu", progress=False, residency=residency, modulation="precomputed")
    options = {"num_inference_steps": 2}
    wanted = pipe.edit(picture, PROMPT, generator=seeded(), **options).images[0]
    result = qwenedit.explore(pipe, picture, PROMPT, tmp_path / "a.html", generator=seeded(), **options)
    assert result.images[0].tobytes() == wanted.tobytes()


def test_bfloat16(picture, tmp_path):
    pipe = qwenedit.load(device="cpu", progress=False, dtype="bfloat16")
    options = {"num_inference_steps": 2}
    wanted = pipe.edit(picture, PROMPT, generator=seeded(), **options).images[0]
    result = qwenedit.explore(pipe, picture, PROMPT, tmp_path / "a.html", generator=seeded(), **options)
    assert result.images[0].tobytes() == wanted.tobytes()


# ---- a second run


def without_attention(pipe):
    return qwenedit.taps(pipe.mmdit, {"blocks.2.img_attn_add": qwenedit.zero})


@pytest.mark.parametrize("generator", [None, "one", "list"])
def test_a_second_run_has_the_first_ones_noise(edit, picture, tmp_path, generator):
    def arguments():
        torch.manual_seed(7)
        torch.randn(3)  # a state in the middle
        made = {"one": seeded(2), "list": [seeded(2)], None: None}[generator]
        if generator == "one":
            torch.randn(5, generator=made)
        return {"num_inference_steps": 2, "generator": made}

    wanted = [
        edit.edit(picture, PROMPT, **{**arguments(), **more}).images[0].tobytes()
        for more in ({}, {"true_cfg_scale": 2.0}, {"generator": seeded(9)})
    ]
    for second, other in (({"true_cfg_scale": 2.0}, wanted[1]), ({"generator": seeded(9)}, wanted[2])):
        result = qwenedit.explore(edit, picture, PROMPT, tmp_path / "a.html", second=second, **arguments())
        assert [one.tobytes() for one in result.images] == [wanted[0], other]
    first, second = data_of(tmp_path / "a.html")["runs"]
    assert dict(second["facts"])["seed"] == "9"
    assert dict(first["facts"]).get("seed") == (None if generator is None else "2")


def test_a_second_run_under_an_intervention(edit, picture, tmp_path):
    """Its taps are on the run itself, inside of the intervention's: what is shown is what it computes."""
    options = {"num_inference_steps": 2}
    before = state_of(edit)
    result = qwenedit.explore(
        edit, picture, PROMPT, tmp_path / "a.html", generator=seeded(), **options,
        second={"intervention": without_attention, "prompt": "绿"},
    )  # fmt: skip
    assert state_of(edit) == before
    with without_attention(edit):
        wanted = edit.edit(picture, "绿", generator=seeded(), **options).images[0]
    assert result.images[1].tobytes() == wanted.tobytes() != result.images[0].tobytes()
    first, second = data_of(tmp_path / "a.html")["runs"]
    assert [run["writes"]["cond"][1][2][0] == 0 for run in (first, second)] == [False, True]
    assert dict(second["facts"])["intervention"] == "without_attention"
    assert "绿" in [word["text"] for word in second["words"]["cond"]]


def test_an_intervention_that_counts_is_not_disturbed(edit, picture, tmp_path):
    """One that depends on how often the transformer has run: nothing runs twice under it."""

    @contextmanager
    def counting(pipe):
        calls = []

        def fade(x, site):
            calls.append(site)
            return x / len(calls)

        with qwenedit.taps(pipe.mmdit, {"blocks.1.img_mlp_add": fade}):
            yield

    with counting(edit):
        wanted = edit.edit(picture, PROMPT, generator=seeded(), num_inference_steps=3).images[0]
    result = qwenedit.explore(
        edit, picture, PROMPT, tmp_path / "a.html", second={"intervention": counting},
        generator=seeded(), num_inference_steps=3,
    )  # fmt: skip
    assert result.images[1].tobytes() == wanted.tobytes()


def test_blocks_that_an_intervention_leaves_out(edit, picture, tmp_path):
    """In the steps in which the cache skips them, they have no map and no sizes."""

    def cached(pipe):
        return first_block_cache(pipe.mmdit, threshold=10.0)

    options = {"num_inference_steps": 2, "true_cfg_scale": 1.0}
    with cached(edit) as cache:
        wanted = edit.edit(picture, PROMPT, generator=seeded(), **options).images[0]
    assert cache.skipped
    result = qwenedit.explore(
        edit, picture, PROMPT, tmp_path / "a.html", second={"intervention": cached},
        generator=seeded(), **options,
    )  # fmt: skip
    assert result.images[1].tobytes() == wanted.tobytes()
    _, second = data_of(tmp_path / "a.html")["runs"]
    assert [[bool(one) for one in maps] for maps in second["maps"]["cond"]] == [
        [True] * 6,
        [True] + [False] * 5,
    ]
    assert [sizes is None for sizes in second["writes"]["cond"][1]] == [False] + [True] * 5


def test_tokens_that_an_intervention_adds_have_no_map(edit, picture, tmp_path):
    def longer(pipe):
        return swapped(pipe.mmdit, "txt_in", lambda old: Longer(old))

    class Longer(torch.nn.Module):
        def __init__(self, old):
            super().__init__()
            self.old = old

        def forward(self, x):
            return self.old(torch.cat([x, x[:, :1]], dim=1))

    qwenedit.explore(
        edit, picture, PROMPT, tmp_path / "a.html", second={"intervention": longer}, num_inference_steps=1
    )
    first, second = data_of(tmp_path / "a.html")["runs"]
    assert [one is None for one in (first["maps"]["cond"][0][0], second["maps"]["cond"][0][0])] == [
        False,
        True,
    ]
    assert second["writes"]["cond"][0][0]


# ---- what is refused


@pytest.mark.parametrize("given, message", [
    ({"prompt": ["a", "b"]}, "prompt is list"),
    ({"output": "edit.png"}, r"wanted \.html"),
    ({"output": "nowhere/edit.html"}, "no folder"),
    ({"true_cfg_scale": math.nan}, "true_cfg_scale"),
    ({"height": 33}, "height"),
    ({"second": 3}, "second is int"),
    ({"second": {"prompt": None}}, "prompt is NoneType"),
    ({"second": {"intervention": 3}}, "intervention is int"),
    ({"second": {"mask_image": Image.new("L", (64, 64))}}, "mask is black|changes nothing"),
    ({"second": {"switches": qwenedit.Switches(guidance=qwenedit.Guidance(steps=(0, 9)))}}, "there are 2"),
    ({"second": {"intervention": lambda pipe: None}}, "wanted a context manager"),
    ({"generator": 5, "second": {}}, "a generator is int"),
])  # fmt: skip
def test_bad_input(edit, picture, tmp_path, monkeypatch, given, message):
    monkeypatch.chdir(tmp_path)
    ran = []
    arguments = {"prompt": PROMPT, "num_inference_steps": 2, **given}
    with (
        qwenedit.taps(edit.mmdit, {"velocity": lambda x, site: ran.append(1)}, strict=False),
        pytest.raises(ValueError, match=message),
    ):
        qwenedit.explore(edit, picture, arguments.pop("prompt"), **arguments)
    assert not ran
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["output_type", "num_images_per_prompt", "image", "steps"])
def test_unknown_arguments(edit, picture, tmp_path, name):
    for given in ({name: 2}, {"second": {name: 2}}):
        with pytest.raises(TypeError, match=rf"explore\(\) got an unexpected keyword argument '{name}'"):
            qwenedit.explore(edit, picture, PROMPT, tmp_path / "a.html", **given)


def test_layered_is_refused(picture, tmp_path):
    pipe = qwenedit.load(checkpoint("layered"), device="cpu", progress=False)
    with pytest.raises(ValueError, match="use decompose"):
        qwenedit.explore(pipe, picture, PROMPT, tmp_path / "a.html")


def test_a_run_that_processes_share_is_refused(edit, picture, tmp_path, monkeypatch):
    monkeypatch.setattr(edit, "processes", object())
    with pytest.raises(ValueError, match="load it without parallel"):
        qwenedit.explore(edit, picture, PROMPT, tmp_path / "a.html")


def test_a_page_is_written_whole_or_not_at_all(edit, picture, tmp_path, monkeypatch):
    page = tmp_path / "edit.html"
    page.write_text("before")

    def broken(_runs, path):
        path.write_text("half")
        raise OSError("disk full")

    monkeypatch.setattr(exploring, "write_page", broken)
    with pytest.raises(OSError, match="disk full"):
        qwenedit.explore(edit, picture, PROMPT, page, num_inference_steps=1)
    assert page.read_text() == "before" and list(tmp_path.iterdir()) == [page]


def test_texts_cannot_become_markup(edit, picture, tmp_path):
    hostile = "</script><script>alert(1)</script><!-- \u2028 &amp;"
    qwenedit.explore(edit, picture, hostile, tmp_path / "a.html", num_inference_steps=1)
    text = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert "<script>alert" not in text and text.count("</script>") == 2
    assert dict(data_of(tmp_path / "a.html")["runs"][0]["facts"])["prompt"] == hostile


def test_checking_runs_nothing_and_warns_once(edit, picture, tmp_path):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        qwenedit.explore(
            edit, picture, PROMPT, tmp_path / "a.html", num_inference_steps=1, true_cfg_scale=2.0,
            negative_prompt=None,
        )  # fmt: skip
    assert len([one for one in told if "unguided" in str(one.message)]) == 1


# ---- the size of the page


def noise(width, height, generator):
    pixels = torch.randint(0, 256, (width * height * 3,), dtype=torch.uint8, generator=generator)
    return Image.frombytes("RGB", (width, height), bytes(pixels.tolist()))


def looked(grids, *, words, steps, blocks, heads, budget, picture):
    """What was seen of a run of these sizes, all of it noise, which no format makes smaller."""
    generator = seeded()
    of = {branch: [Word("圆" * 3, k, k + 1) for k in range(count)] for branch, count in words.items()}
    shown = evenly(steps, 20)
    plan = plan_of(grids, list(words.values()), steps=shown, blocks=blocks, heads=heads, budget=budget)
    maps = {}
    for branch, count in words.items():
        rows, columns = plan.size(count)
        codes = torch.randint(0, 256, (plan.heads, rows, columns), dtype=torch.uint8, generator=generator)
        for step in plan.steps:
            for block in plan.blocks:
                maps[branch, step, block] = codes, torch.rand(plan.heads, rows)
    sizes = dict.fromkeys(WRITES, 123.456789)
    places = [(branch, step, block) for branch in words for step in plan.steps for block in range(blocks)]
    names = ("latents", "x0", "cond", "uncond")
    ratio = torch.rand(math.prod(grids[0]), generator=generator)
    return Looked(
        {"prompt": "圆" * 500}, grids[0], steps, plan, of, [picture for _ in grids[1:]], picture,
        [Shown(index, 0.5, {name: picture.copy() for name in names}, ratio) for index in shown],
        dict.fromkeys(places, sizes), maps,
    )  # fmt: skip


@pytest.mark.parametrize("grids, words, runs", [
    ([(1, 64, 64)] * 2, (20, 14), 1),
    ([(1, 64, 64)] * 2, (20, 14), 2),
    ([(1, 104, 58), *[(1, 64, 64)] * 3], (160, 160), 2),
    ([(1, 128, 128)], (160, 6), 1),
], ids=["edit", "two", "three pictures", "large"])  # fmt: skip
def test_the_page_holds_its_size(tmp_path, grids, words, runs):
    picture = noise(SIDE, SIDE, seeded())
    run = looked(
        grids, words=dict(zip(("cond", "uncond"), words, strict=True)), steps=50, blocks=60, heads=24,
        budget=exploring.MAPS // runs, picture=picture,
    )  # fmt: skip
    write_page([run] * runs, tmp_path / "a.html")
    size = (tmp_path / "a.html").stat().st_size
    assert 8_000_000 < size <= MOST == 20_000_000
    assert len(data_of(tmp_path / "a.html")["runs"]) == runs


def test_a_page_that_would_be_too_large_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("qwenedit.exploration.page.MOST", 1000)
    run = looked(
        [(1, 2, 2)], words={"cond": 3}, steps=2, blocks=2, heads=1, budget=1000, picture=noise(8, 8, seeded())
    )
    with pytest.raises(ValueError, match="wanted at most 1,000"):
        write_page([run], tmp_path / "a.html")


def test_numbers_that_are_none(tmp_path):
    """Where networks run over, the page says that there is no number."""
    run = looked(
        [(1, 2, 2)], words={"cond": 3}, steps=1, blocks=1, heads=1, budget=1000, picture=noise(8, 8, seeded())
    )
    run.steps[0].ratio[:2] = torch.tensor([math.nan, math.inf])
    run.writes["cond", 0, 0] = dict(zip(WRITES, (math.inf, math.nan, 0.0, 2.0), strict=True))
    write_page([run], tmp_path / "a.html")
    (shown,) = data_of(tmp_path / "a.html")["runs"]
    assert shown["writes"]["cond"] == [[[None, None, 0.0, 2.0]]]
    ratio = run.steps[0].ratio
    assert (
        shown["steps"][0]["ratio"]["low"] == ratio[2:].min()
        and shown["steps"][0]["ratio"]["high"] == ratio[2:].max()
    )


def test_an_estimate_that_the_vae_cannot_decode_is_black(edit, picture, tmp_path, monkeypatch):
    """The picture was made by then: nothing of the run is lost."""
    decode = Watched.decode

    def overflowing(self, latents, grid):
        pixels = decode(self, latents, grid)
        return pixels if self.check_finite else pixels * math.nan

    monkeypatch.setattr(Watched, "decode", overflowing)
    (made,) = qwenedit.explore(edit, picture, PROMPT, tmp_path / "a.html", num_inference_steps=1).images
    (run,) = data_of(tmp_path / "a.html")["runs"]
    assert picture_of(run["result"]).tobytes() == made.tobytes() and edit.check_finite
    assert not any(picture_of(run["steps"][0]["pictures"]["x0"]).tobytes())


def test_the_page_s_files_are_in_the_package():
    content = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    files = [path.name for path in (Path(exploring.__file__).parent).glob("page.*") if path.suffix != ".py"]
    assert len(files) == 3 and all(f'"{name}"' in content for name in files)


def test_the_watched_pipeline_is_the_given_one(edit):
    watched = Watched.of(edit)
    assert watched.mmdit is edit.mmdit and watched.vae is edit.vae and watched.sampler is edit.sampler
