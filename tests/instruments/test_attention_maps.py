"""Attention maps from queries and keys against the probabilities of explicit attention, and in parts."""

import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

import qwenedit
import qwenedit.instruments.attention_maps
from qwenedit import mini
from qwenedit.instruments.attention_maps import AttentionMaps, attention_map, token_groups
from qwenedit.instruments.records import Recorder
from qwenedit.latents import Layout
from qwenedit.networks import mmdit_layers
from qwenedit.networks.mmdit_layers import joint_key_mask
from qwenedit.taps import scope, taps
from tests.properties import test_mmdit as mmdit
from tests.support import EPS, FP32, assert_as_close_as, assert_close, relative_error
from tests.tiny import checkpoint, picture

LAYOUT = Layout(5, tuple(mmdit.GRIDS))  # text 5, target 15, reference 8
MASK = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
KEYS = joint_key_mask(MASK, 23)  # padded text is hidden from all
HIDDEN = KEYS.expand(2, 1, 28, 28).clone()  # and the reference from all but itself
HIDDEN[:, :, :20, 20:] = False
TARGET, REFERENCE = slice(5, 20), slice(20, 28)


def queries_and_keys(batch=2, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, batch, 28, 3, 8, generator=generator, dtype=torch.float64).to(dtype).unbind()


def straightforward(q, k, mask=None):
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1)


def held(got, q, k, mask=None, part=lambda whole: whole):
    """As close to the map in float64, or to `part` of it, as the straightforward one is in float32."""
    plain, exact = (
        part(straightforward(q.to(wide), k.to(wide), mask)) for wide in (torch.float32, torch.float64)
    )
    assert_as_close_as(got, plain, exact)


def run(ours, mask=None, **labels):
    with scope(layout=LAYOUT, **labels):
        return ours(*mmdit.inputs(), mask)


# ---- the function


@pytest.mark.parametrize("mask", [None, KEYS, HIDDEN, HIDDEN[:1]], ids=["plain", "keys", "hidden", "one"])
@pytest.mark.parametrize("chunk", [1, 7 * 2 * 3 * 28, 2**26], ids=["1 row", "7 rows", "all rows"])
def test_every_part_has_the_denominators_of_the_whole(mask, chunk, monkeypatch):
    monkeypatch.setattr(qwenedit.instruments.attention_maps, "CHUNK", chunk)
    q, k = queries_and_keys()
    held(attention_map(q, k, key_mask=mask), q, k, mask)
    part = attention_map(q, k, TARGET, REFERENCE, key_mask=mask)
    held(part, q, k, mask, lambda whole: whole[:, :, TARGET, REFERENCE])
    part = attention_map(q, k, TARGET, slice(0, 5), key_mask=mask, mean_heads=True)
    held(part, q, k, mask, lambda whole: whole[:, :, TARGET, :5].mean(1))
    groups = list(token_groups(LAYOUT).values())

    def shares_of(whole, rows=TARGET):
        return torch.stack([whole[:, :, rows, g].sum(-1) for g in groups], -1)

    shares = attention_map(q, k, TARGET, groups, key_mask=mask)
    held(shares, q, k, mask, shares_of)
    assert_close(shares.sum(-1), torch.ones(2, 3, 15), 28 * EPS)  # as many are added up
    means = attention_map(q, k, [TARGET, REFERENCE], groups, key_mask=mask, mean_heads=True)
    held(
        means, q, k, mask,
        lambda whole: torch.stack([shares_of(whole, x).mean(dim=(1, 2)) for x in (TARGET, REFERENCE)], 1),
    )  # fmt: skip
    if mask is HIDDEN:
        assert not shares[..., 2].any()


def test_padded_text_counts_in_no_mean():
    q, k = queries_and_keys()
    got = attention_map(q, k, [slice(0, 5)], REFERENCE, key_mask=KEYS)
    for row, real in enumerate((5, 3)):

        def part(whole, row=row, real=real):
            return whole[row, :, :real, REFERENCE].mean(-2, keepdim=True)

        held(got[row], q, k, KEYS, part)


class Largest(TorchDispatchMode):
    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.size = max(self.size, result.numel())
        return result


@pytest.mark.parametrize("rows", [slice(0, 400), [slice(0, 100), slice(100, 400)]], ids=["map", "means"])
def test_the_whole_matrix_never_exists_even_with_gradients(rows, monkeypatch):
    monkeypatch.setattr(qwenedit.instruments.attention_maps, "CHUNK", 20_000)
    x = torch.randn(1, 400, 2, 4, requires_grad=True)
    kept = {}

    def keep(saved):
        kept[saved.untyped_storage().data_ptr()] = saved.untyped_storage().nbytes() // 4
        return saved

    with Largest() as largest:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
            total = attention_map(x, x, rows, [slice(0, 399), slice(399, 400)])[..., 0].sum()
        total.backward()
    assert largest.size <= 20_000 < 2 * 400 * 400
    assert sum(kept.values()) < 30_000
    wanted = []
    for wide in (torch.float32, torch.float64):
        y = x.detach().to(wide).requires_grad_()
        whole = straightforward(y, y)[..., :399].sum(-1)
        (
            whole.sum() if isinstance(rows, slice) else sum(whole[..., r].mean(-1).sum() for r in rows)
        ).backward()
        wanted.append(y.grad)
    assert_as_close_as(x.grad, *wanted)


def test_low_precision_is_computed_in_float32():
    q, k = queries_and_keys(dtype=torch.bfloat16)
    got = attention_map(q, k, TARGET)
    assert got.dtype == torch.float32
    held(got, q, k, part=lambda whole: whole[:, :, TARGET])
    q, k = queries_and_keys(dtype=torch.float64)
    held(attention_map(q, k), q, k)


def test_groups_are_the_joint_sequence_in_order():
    layout = Layout(4, ((1, 2, 3), (1, 1, 5), (1, 2, 2)))
    assert token_groups(layout) == {
        "text": slice(0, 4),
        "target": slice(4, 10),
        "reference 1": slice(10, 15),
        "reference 2": slice(15, 19),
    }
    assert list(token_groups(Layout(4, ((1, 2, 3),)))) == ["text", "target"]


# ---- the collector


@pytest.mark.parametrize("zero_cond_t, mask", [(False, None), (True, MASK)], ids=["plain", "masked"])
@pytest.mark.parametrize(
    "rows, columns", [("target", "reference 1"), ("all", "all"), ("text", ["text", "target"])]
)
def test_collected_maps_are_the_probabilities_of_explicit_attention(zero_cond_t, mask, rows, columns):
    ours = mmdit.network(zero_cond_t=zero_cond_t)
    plain = run(ours, mask)
    maps, probs = AttentionMaps(rows, columns), Recorder()
    with maps.attached(ours):
        assert torch.equal(run(ours, mask), plain)  # beside the fused attention, not in its place
    with taps(ours, {"*.probs": probs}):
        run(ours, mask)
    groups = {**token_groups(LAYOUT), "all": slice(None)}
    for block in range(2):
        wanted = probs[f"blocks.{block}.attn.probs"][:, :, groups[rows]]
        if isinstance(columns, str):
            wanted = wanted[..., groups[columns]]
        else:
            wanted = torch.stack([wanted[..., groups[name]].sum(-1) for name in columns], dim=-1)
        assert_close(maps[f"blocks.{block}.attn"], wanted, FP32)
    assert len(maps) == 2


@pytest.mark.filterwarnings("ignore:the output's token grid")
def test_a_whole_edit_with_guidance_and_a_batch_padded_and_of_two_layouts():
    """Three rows: the first two run together, with padded text; the third has one picture less."""
    pipe = qwenedit.load(checkpoint("plus"), device="cpu", progress=False)
    pictures = [picture(64, 64), picture(48, 96)]
    images, prompts = [pictures, pictures, pictures[:1]], ["red", "make it all blue, please", "no"]
    groups = ["text", "target", "reference 1", "reference 2"]
    maps = AttentionMaps("target", "reference 1", steps=[1], blocks=[1])
    shares = AttentionMaps(["target"], groups[:3], branch="uncond", mean_heads=True)
    probs = Recorder(steps=[1])

    def edit():
        return pipe.edit(
            images, prompts, num_inference_steps=2, generator=torch.Generator().manual_seed(0),
            height=64, width=64, output_type="latent",
        ).images  # fmt: skip

    plain = edit()
    seen = {}

    def note(_x, site):
        seen[site.labels["branch"], tuple(site.labels["rows"])] = site.labels

    with maps.attached(pipe.mmdit), shares.attached(pipe.mmdit), taps(pipe.mmdit, {"img_in": note}):
        assert torch.equal(edit(), plain)
    with taps(pipe.mmdit, {"*.probs": probs}):
        edit()

    together = {("cond", (0, 1)), ("cond", (2,)), ("uncond", (0, 1)), ("uncond", (2,))}
    assert set(seen) == together
    assert {key[:4] for key in maps} == {("blocks.1.attn", 1, *key) for key in together}
    assert {key[1:4] for key in shares} == {
        (step, "uncond", rows) for step in range(2) for rows in [(0, 1), (2,)]
    }
    for branch, rows in together:
        wanted = probs["blocks.1.attn.probs", 1, branch, rows]
        at = token_groups(seen[branch, rows]["layout"])
        part = wanted[:, :, at["target"], at["reference 1"]]
        assert_close(maps["blocks.1.attn", 1, branch, rows], part, FP32)
        if branch == "uncond":
            of_target = wanted[:, :, at["target"]]
            sums = torch.stack([of_target[..., at[name]].sum(-1).mean(dim=(1, 2)) for name in groups[:3]], -1)
            assert_close(shares["blocks.1.attn", 1, branch, rows], sums[:, None], FP32)


def test_the_embedded_models_maps():
    pipe = qwenedit.load(device="cpu", progress=False)
    maps, shares, probs = (
        AttentionMaps("all"),
        AttentionMaps(["target"], ["text", "target", "reference 1"]),
        Recorder(),
    )
    with maps.attached(pipe.mmdit), shares.attached(pipe.mmdit), taps(pipe.mmdit, {"*.probs": probs}):
        seed = torch.Generator().manual_seed(0)
        pipe.edit(Image.open(mini.EXAMPLE), "make the circle red", num_inference_steps=2, generator=seed)
    assert len(maps) == len(shares) == len(probs) == 6 * 2 * 2
    for key in maps:
        assert_close(maps[key], probs[key._replace(name=f"{key.name}.probs")], FP32)
        assert_close(shares[key].sum(-1), torch.ones(1, 4, 1), FP32)


def test_it_sees_what_outer_functions_have_replaced():
    ours = mmdit.network()
    maps, probs = AttentionMaps("all"), Recorder()
    with taps(ours, {"blocks.1.attn.img_q_rot": lambda x, site: -x}):
        with maps.attached(ours):
            run(ours)
        with taps(ours, {"*.probs": probs}):
            run(ours)
    for block in range(2):
        assert_close(maps[f"blocks.{block}.attn"], probs[f"blocks.{block}.attn.probs"], FP32)


def test_gradients_flow_through_collected_maps():
    ours = mmdit.network()
    img, txt, t, grids = mmdit.inputs()
    gradients = []
    for explicit in (False, True):
        x = img.clone().requires_grad_()
        maps = AttentionMaps("target", "reference 1", blocks=[1], detach=False)
        recorder = Recorder(detach=False)
        with scope(layout=LAYOUT):
            with taps(ours, {"blocks.1.attn.probs": recorder}) if explicit else maps.attached(ours):
                ours(x, txt, t, grids)
        part = recorder["blocks.1.attn.probs"][:, :, TARGET, REFERENCE] if explicit else maps["blocks.1.attn"]
        part.square().sum().backward()
        gradients.append(x.grad)
    assert_close(*gradients, FP32)
    assert gradients[0].abs().max() > 1e-3
    with AttentionMaps().attached(ours) as maps:
        run(ours)
        assert not maps["blocks.0.attn"].requires_grad


@pytest.mark.parametrize("in_place", [False, True])
def test_compiled_blocks(in_place):
    torch.compiler.reset()
    ours = mmdit.network()
    wanted = AttentionMaps()
    with wanted.attached(ours):
        plain = run(ours)
    if in_place:
        for block in ours.blocks:
            block.compile(backend="eager", fullgraph=True)
    else:
        ours.blocks[1] = torch.compile(ours.blocks[1], backend="eager", fullgraph=True)
        ours = torch.compile(ours, backend="eager", fullgraph=True)
    for _ in range(2):  # attached before and after the first compilation
        maps = AttentionMaps()
        with maps.attached(ours):
            assert torch.equal(run(ours), plain)
        assert list(maps) == list(wanted)
        assert all(torch.equal(maps[key], wanted[key]) for key in wanted)
        assert torch.equal(run(ours), plain)


def test_after_an_exception_nothing_is_attached_or_kept():
    ours = mmdit.network()
    maps = AttentionMaps()

    with (
        pytest.raises(ZeroDivisionError),
        maps.attached(ours),
        taps(ours, {"blocks.1.attn.txt_q_rot": lambda x, site: 1 / 0}),
    ):
        run(ours)
    assert all("_taps" not in module.__dict__ for module in ours.modules())
    assert not any(module._forward_pre_hooks for module in ours.modules())
    assert [key.name for key in maps] == ["blocks.0.attn"]
    run(ours)
    assert len(maps) == 1


def test_a_reference_that_a_step_has_not_gets_no_share():
    ours = mmdit.network()
    maps = AttentionMaps(["target"], ["text", "reference 2"])
    with maps.attached(ours):
        run(ours)
    assert not maps["blocks.0.attn"][..., 1].any() and maps["blocks.0.attn"][..., 0].all()


@pytest.mark.parametrize("texts", [["red"], ["red", "make the circle blue, please"]], ids=["one", "padded"])
def test_references_that_a_switch_hides_get_no_share(texts):
    pipe = qwenedit.load(device="cpu", progress=False)
    switches = qwenedit.Switches(references=qwenedit.References(blocks=(0, 2)))
    conditioning = pipe.condition(Image.open(mini.EXAMPLE), texts)
    maps, probs = AttentionMaps("all", branch="cond"), Recorder(branch="cond")
    with torch.no_grad():
        for attached in (maps.attached(pipe.mmdit), taps(pipe.mmdit, {"*.probs": probs})):
            noise = torch.Generator().manual_seed(0)
            with attached:
                list(pipe.steps(conditioning, num_inference_steps=1, generator=noise, switches=switches))
    for block in range(6):
        wanted = probs[f"blocks.{block}.attn.probs"]
        assert_close(maps[f"blocks.{block}.attn"], wanted, FP32)
        assert bool(wanted[:, :, :-16, -16:].any()) == (block < 2)


def test_errors_say_what_is_missing():
    ours = mmdit.network()
    with pytest.raises(ValueError, match=r"no label layout is in force, wanted scope\(layout="):
        with AttentionMaps().attached(ours):
            ours(*mmdit.inputs())
    for rows, columns in (("target", "reference 0"), ("target", "txt")):
        with pytest.raises(ValueError, match=r"no group of tokens is '.*', wanted all, text, target, ref"):
            AttentionMaps(rows, columns)
    with pytest.raises(ValueError, match=r"no group of tokens is '.*', wanted one of text, target, ref"):
        with AttentionMaps("reference 2", "target").attached(ours):
            run(ours)
    with pytest.raises(RuntimeError, match="no attention map was collected"):
        with AttentionMaps(steps=[3]).attached(ours):
            run(ours, step=2)
    for options, message in (
        ({"steps": 1}, "steps are 1, wanted a coll"),
        ({"branch": "x"}, "branch is 'x'"),
    ):
        for instrument in (AttentionMaps, Recorder):
            with pytest.raises(ValueError, match=message):
                instrument(**options)
    with pytest.raises(ValueError, match="a step is wanted, but no label 'step' is in force"):
        with AttentionMaps(steps=[0]).attached(ours):
            run(ours)
    with pytest.raises(KeyError, match=r"no tap matches 'blocks\.7\.attn\.img_q_rot'"):
        with AttentionMaps(blocks=[7]).attached(ours):
            pytest.fail("the block must not run")


# ---- explicit attention by heads


@pytest.mark.parametrize("limit", [1, 2 * 28 * 28, 2 * 2 * 28 * 28 - 1])
def test_large_maps_are_made_by_heads_with_the_same_numbers(limit, monkeypatch):
    ours = mmdit.network()

    def observe():
        scores, probs = Recorder(), Recorder()
        with taps(ours, {"*.scores": scores, "*.probs": probs}):
            return run(ours, MASK), scores, probs

    whole, scores, probs = observe()
    assert {key.heads for key in probs} == {None}
    monkeypatch.setattr(mmdit_layers, "MAX_MAP", limit)
    parts, part_scores, part_probs = observe()
    assert_close(parts, whole, FP32)  # products of fewer matrices at once
    for of_whole, of_parts in ((scores, part_scores), (probs, part_probs)):
        assert [key.heads for key in of_parts] == [(0, 1), (1, 2)] * 2
        for key in of_parts:
            part = slice(*key.heads)
            one, other = (
                x.masked_fill(x == -torch.inf, 0) for x in (of_parts[key], of_whole[key.name][:, part])
            )
            assert_close(one, other, FP32)


def test_a_part_of_the_heads_can_be_replaced_and_the_label_says_which(monkeypatch):
    ours = mmdit.network()

    def uniform_in_head_1(x, site):
        first = site.labels.get("heads", slice(0, None)).start
        y = x.clone()
        if first <= 1:
            y[:, 1 - first :][:, :1] = 1 / x.shape[-1]
        return y

    with taps(ours, {"blocks.0.attn.probs": uniform_in_head_1}):
        wanted = run(ours)
        monkeypatch.setattr(mmdit_layers, "MAX_MAP", 1)
        assert_close(run(ours), wanted, FP32)
    assert relative_error(run(ours), wanted) > 100 * FP32
