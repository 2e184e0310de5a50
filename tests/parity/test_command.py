"""`qwenedit parity`: it passes where both sides are the same, and names what is not."""

import json
import shutil
import sys

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F

from qwenedit import mini
from qwenedit.cli import options as cli
from qwenedit.networks import mmdit, mmdit_layers, vision_language
from qwenedit.parity import compare as parity
from qwenedit.parity import reference as parity_reference
from qwenedit.parity import taps as parity_taps
from qwenedit.parity.stages import stages
from qwenedit.taps import tap_names
from qwenedit.weights import loading
from qwenedit.weights.checkpoints import COMPONENTS
from qwenedit.weights.configs import network_config
from qwenedit.weights.report import compare
from tests.tiny import checkpoint, picture

VARIANTS = {
    "text-to-image": ("generate", {}),
    "edit": ("edit", {}),
    "edit plus": ("plus", {}),
    "2511": ("plus", {"zero_cond_t": True}),
    "layered": ("layered", {}),
}
DTYPES = ["float32", "bfloat16"]


def tiny(name):
    kind, options = VARIANTS[name]
    return checkpoint(kind, **options)


@pytest.fixture
def run(tmp_path, capsys):
    """Run the command: its status, what it printed, and its rows by module and dtype."""

    def command(*arguments):
        output = tmp_path / "parity.json"
        options = ["-o", output, "--device", "cpu", "--quiet"]
        status = cli.main([str(one) for one in ["parity", *arguments, *options]])
        printed = capsys.readouterr()
        rows = {}
        if status != 2:
            rows = {(row["module"], row["dtype"]): row for row in json.loads(output.read_text())["rows"]}
            assert not output.with_suffix(".streams.safetensors").exists()
        return status, printed, rows

    return command


def differing(rows):
    return [key for key, row in rows.items() if not row["ok"]]


def modules_of(folder):
    """What a whole report must have a row of."""
    text, transformer = (network_config(folder, name) for name in ("text_encoder", "transformer"))
    names = ["text_encoder.embeddings", "text_encoder.language.rope", "text_encoder.language.norm"]
    names += [f"text_encoder.language.blocks.{i}" for i in range(text.text_config.num_hidden_layers)]
    names += ["vae.encoder", "vae.decoder", "text_encoder end to end", "transformer end to end"]
    names += [f"transformer.{x}" for x in ("img_in", "txt_in", "time_embed", "rope", "norm_out", "proj_out")]
    names += [f"transformer.blocks.{i}" for i in range(transformer.num_layers)]
    tower = [f"text_encoder.vision.{x}" for x in ("patch_embed", "rope", "merger")]
    tower += [f"text_encoder.vision.blocks.{i}" for i in range(text.vision_config.depth)]
    return set(names), set(tower)


@pytest.mark.parametrize("name", ["embedded", *VARIANTS])
def test_no_difference_in_a_full_table(run, name):
    folder = mini.CHECKPOINT if name == "embedded" else tiny(name)
    status, printed, rows = run(*([] if name == "embedded" else [folder]))
    assert status == 0, printed.out + printed.err
    names, tower = modules_of(folder)
    if name in ("text-to-image", "layered"):
        assert not any(module in tower for module, _ in rows)
    else:
        names |= tower
    exact = {module for module, dtype in rows if dtype == "exact"}
    assert {key for key in rows if key[1] != "exact"} == {(x, dtype) for x in names for dtype in DTYPES}
    assert {f"input.{x}" for x in ("pixels", "tokens", "positions", "sigmas", "noise")} <= exact
    lines = printed.out.splitlines()
    assert all(any(line.startswith(module) for line in lines) for module in names | exact)
    assert lines[-2].startswith(f"no difference from the reference in {len(rows)} comparisons")
    for (module, dtype), row in rows.items():
        if dtype == "bfloat16" and "rope" not in module:
            assert row["reference"] > 1e-4, module  # bfloat16 is really run


def all_stages(folder):
    variant = parity.read_variant(folder)
    areas, cpu = parity.read_areas(folder, variant), torch.device("cpu")
    return list(stages(folder, parity.prepare(folder, variant, areas, picture(96, 64), "x", cpu)[0]))


def test_every_weight_is_in_one_stage():
    folder = tiny("2511")
    todo = all_stages(folder)
    for component in COMPONENTS:
        _, found, _ = compare(folder, component)
        paths = [path for stage in todo if stage.component == component for path in stage.paths]
        for name in found:
            assert sum(name.startswith(f"{path}.") for path in paths) == 1, name


def test_every_place_of_a_tap_exists_on_both_sides():
    folder = tiny("2511")
    networks = {name: parity._Pair.of(folder, name, torch.device("cpu")) for name in COMPONENTS}
    for stage in all_stages(folder):
        both = networks[stage.component]
        places = dict(parity_taps._places(stage, both.ours))
        assert places.keys() <= set(tap_names(both.ours))
        for path, _, _ in places.values():
            both.reference.get_submodule(path)
        if "blocks." in stage.name:
            wanted = {name for name in tap_names(both.ours) if name.startswith(f"{stage.name}.")}
            by_hand = {name.rpartition(".")[2] for name in wanted - places.keys()}
            assert by_hand <= {
                "in", "out", "img_out", "txt_out", "scores", "probs",
                "img_attn_add", "txt_attn_add", "img_mlp_add", "txt_mlp_add", "control_add",
            }, by_hand  # fmt: skip


def test_the_users_own_picture_and_prompt_in_one_dtype(run, tmp_path):
    picture(700, 300).convert("RGBA").save(tmp_path / "own.png")
    options = ["--picture", tmp_path / "own.png", "--prompt", "把它变成蓝色 {x}", "--dtype", "bfloat16"]
    status, _, rows = run(tiny("edit"), *options)
    assert status == 0 and {dtype for _, dtype in rows} == {"exact", "bfloat16"}


def test_layered_is_compared_with_alpha(run, tmp_path, monkeypatch):
    shown, prepare = [], parity.prepare

    def watched(folder, variant, areas, picture, *rest):
        shown.append(picture)
        return prepare(folder, variant, areas, picture, *rest)

    monkeypatch.setattr(parity, "prepare", watched)
    image = picture(90, 60).convert("RGBA")
    image.putalpha(picture(90, 60, 1).getchannel(0))
    image.save(tmp_path / "own.png")
    for options in ([], ["--picture", tmp_path / "own.png"]):
        assert run(tiny("layered"), "--dtype", "float32", *options)[0] == 0
    for one in shown:
        least, most = one.getchannel("A").getextrema()
        assert least < most
    assert shown[1].tobytes() == image.tobytes()


def damage(monkeypatch, wanted, change):
    """Our side reads something else for one tensor."""
    original = loading._read

    def read(module, found, *rest):
        original(module, found, *rest)
        if wanted in found:
            with torch.no_grad():
                change(module.get_parameter(wanted))

    monkeypatch.setattr(loading, "_read", read)


@pytest.mark.parametrize(
    ("weight", "module", "first"),
    [
        ("blocks.1.attn.txt_k.weight", "transformer.blocks.1", "blocks.1.attn.txt_k"),
        ("blocks.0.img_mlp.up.bias", "transformer.blocks.0", "blocks.0.img_mlp.mlp_hidden"),
        ("blocks.1.txt_mod.linear.weight", "transformer.blocks.1", "blocks.1.txt_mod"),
        ("language.blocks.0.norm2.weight", "text_encoder.language.blocks.0", "language.blocks.0.mlp_in"),
        ("vision.blocks.1.attn.qkv.bias", "text_encoder.vision.blocks.1", "vision.blocks.1.attn.q"),
        ("encoder.down.1.conv.weight", "vae.encoder", "encoder.down.1.mid"),
        ("time_embed.linear_2.bias", "transformer.time_embed", "temb"),
    ],
)  # fmt: skip
def test_one_weight_that_differs_is_named(run, monkeypatch, weight, module, first):
    damage(monkeypatch, weight, lambda x: x.view(-1)[0].add_(0.05))
    status, printed, rows = run(tiny("2511"))
    part = module.partition(".")[0]
    ends = {(f"{part} end to end", dtype) for dtype in DTYPES} & rows.keys()
    assert status == 1 and "Traceback" not in printed.err
    assert (module, "float32") in differing(rows)
    assert {key[0] for key in differing(rows)} <= {module} | {key[0] for key in ends}  # errors do not spread
    assert rows[module, "float32"]["first"] == first
    assert f"the first in {module} (float32): {first}" in printed.out


def test_another_gelu_is_named(run, monkeypatch):
    def erf(self, x):
        return self.down(self.tap("mlp_hidden", F.gelu(self.up(x)), "B * E"))

    monkeypatch.setattr(mmdit.MLP, "forward", erf)
    status, printed, rows = run(tiny("edit"), "--dtype", "float32")
    assert status == 1
    blocks = {"transformer.blocks.0", "transformer.blocks.1"}
    assert blocks <= {key[0] for key in differing(rows)} <= blocks | {"transformer end to end"}
    for i in range(2):
        assert rows[f"transformer.blocks.{i}", "float32"]["first"] == f"blocks.{i}.img_mlp.mlp_hidden"
    assert "DIFFERS blocks.0.img_mlp.mlp_hidden" in printed.out


def halves(x, rope):
    cos, sin = rope[0][..., ::2], rope[1][..., 1::2]
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).to(x.dtype)


def pairs(x, rope):
    cos, sin = rope[..., None, :, 0], rope[..., None, :, 1]
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)


def test_another_rotation_is_named(run, monkeypatch):
    monkeypatch.setattr(mmdit_layers, "rotate", halves)
    monkeypatch.setattr(vision_language, "rotate", pairs)
    status, _, rows = run(tiny("edit"), "--dtype", "float32")
    assert status == 1
    assert rows["transformer.blocks.0", "float32"]["first"] == "blocks.0.attn.img_q_rot"
    assert rows["text_encoder.language.blocks.0", "float32"]["first"] == "language.blocks.0.attn.q_rot"
    assert rows["text_encoder.vision.blocks.0", "float32"]["ok"]


def test_what_only_bfloat16_does_is_named(run, monkeypatch):
    def rotate(x, rope):
        y = original(x, rope)
        return y if x.dtype == torch.float32 else (2 * y).round() / 2

    original = mmdit_layers.rotate
    monkeypatch.setattr(mmdit_layers, "rotate", rotate)
    status, _, rows = run(tiny("edit"))
    assert status == 1 and {dtype for _, dtype in differing(rows)} == {"bfloat16"}
    assert rows["transformer.blocks.0", "bfloat16"]["first"] == "blocks.0.attn.img_q_rot"


def test_what_must_be_equal_is_not(run, monkeypatch):
    original = parity_reference.mrope_positions
    monkeypatch.setattr(
        parity_reference, "mrope_positions", lambda *given, **options: original(*given, **options) + 1
    )
    status, printed, rows = run(tiny("edit"), "--dtype", "float32")
    assert status == 1 and differing(rows) == [("input.positions", "exact")]
    assert "the first in input.positions (exact)" in printed.out


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_weight_that_is_not_finite_is_a_finding(run, tmp_path, dtype):
    folder = shutil.copytree(tiny("edit"), tmp_path / "checkpoint")
    (file,) = (folder / "transformer").glob("*.safetensors")
    tensors = safetensors.torch.load_file(file)
    name = "transformer_blocks.1.attn.add_q_proj.weight"
    tensors[name][3, 2] = float("nan")
    safetensors.torch.save_file(tensors, file)
    status, printed, rows = run(folder, "--dtype", dtype)
    assert status == 1 and differing(rows) == [("transformer.blocks.1", dtype)]
    assert f"{name} in {file.name} has NaN or infinity" in printed.out


class Killed(BaseException):
    pass


@pytest.mark.parametrize("at", ["transformer.blocks.1", "transformer.img_in"])
def test_a_killed_run_goes_on_where_it_stopped(run, tmp_path, monkeypatch, at):
    folder = tiny("2511")
    whole = run(folder)
    (tmp_path / "parity.jsonl").unlink()
    step, ran = parity._Run.step, []

    def until(self, stage):
        if stage.full == at:
            raise Killed
        return step(self, stage)

    def counted(self, stage):
        ran.append(stage.full)
        return step(self, stage)

    monkeypatch.setattr(parity._Run, "step", until)
    with pytest.raises(Killed):
        run(folder)
    lines = tmp_path / "parity.jsonl"
    lines.write_bytes(lines.read_bytes() + b'{"fingerprint": "cut o')
    monkeypatch.setattr(parity._Run, "step", counted)
    again = run(folder)
    assert again[0] == 0 and again[1].out == whole[1].out and again[2] == whole[2]
    order = [module for module, dtype in whole[2] if dtype == "float32" and "end to end" not in module]
    assert ran == order[order.index(at) :]

    ran.clear()
    assert run(folder) == whole and ran == []  # all is done
    assert len(lines.read_bytes().splitlines()) == len(whole[2])
    assert run(folder, "--prompt", "another one")[0] == 0 and len(ran) == len(order)


def test_an_interrupted_run_says_that_it_goes_on(tmp_path, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(parity._Run, "step", interrupted)
    status = cli.main(["parity", str(tiny("edit")), "-o", str(tmp_path / "x.json"), "--device", "cpu"])
    assert status == 130 and "run it again to go on" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"x.jsonl"}


def one_line(run, *arguments):
    status, printed, _ = run(*arguments)
    assert status == 2 and printed.out == ""
    (line,) = printed.err.splitlines()
    return line


@pytest.mark.parametrize("name", ["diffusers", "transformers"])
def test_without_the_references_one_line_says_how_to_get_them(run, monkeypatch, name):
    command = "pip install diffusers==0.39.0 transformers==4.57.6"
    module = sys.modules[name]
    monkeypatch.setitem(sys.modules, name, None)
    assert f"found {name} none, wanted" in (line := one_line(run)) and command in line
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(module, "__version__", "9.9")
    assert f"found {name} 9.9, wanted" in (line := one_line(run)) and command in line


def test_bad_input_is_one_line(run, tmp_path):
    assert "no checkpoint at" in one_line(run, tmp_path / "nothing")
    assert "is not on this machine" in one_line(run, "Qwen/Qwen-Image-Edit")
    assert "no such picture" in one_line(run, "--picture", tmp_path / "none.png")
    picture(64, 64).save(tmp_path / "one.png")
    assert "from text only" in one_line(run, tiny("text-to-image"), "--picture", tmp_path / "one.png")
    assert "image_pad" in one_line(run, "--prompt", "<|image_pad|>")
    with pytest.raises(ValueError, match="dtypes are"):
        parity.parity(dtypes=["float16"], device="cpu")
    for output in (tmp_path, tmp_path / "out.csv", tmp_path / "no" / "folder.json"):
        with pytest.raises(ValueError, match="cannot write"):
            parity.parity(output=output, device="cpu")
