"""Faults of the bench: taps, instruments, sweeps, training, threads, progress bars."""

import csv
import json
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import nn

import qwenedit
from qwenedit import AttentionMaps, Recorder, checks, mini, patch_from
from qwenedit.ablation import metrics
from qwenedit.ablation.report import write_report
from qwenedit.ablation.statistics import estimates
from qwenedit.ablation.sweep import ablate
from qwenedit.ablation.tables import quoted, write_csv
from qwenedit.instruments.inversion import inverse_euler
from qwenedit.mini.train_vae import loss_of
from qwenedit.sampling.sampler import Step
from qwenedit.taps import Tapped, scope, swapped, tap_names, taps
from qwenedit.training.loss import freeze_unreached
from tests.ablation.test_report import made_up, page
from tests.faults.test_doors import RECORD
from tests.properties import test_mmdit as mmdit

OUT = "blocks.1.img_out"


class Many(Tapped):
    """Sixty layers, each with a tap."""

    TAPS = ()

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([One() for _ in range(60)])

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class One(Tapped):
    TAPS = ("img", "txt")

    def forward(self, x):
        return self.tap("txt", self.tap("img", x + 1))


@pytest.fixture(scope="module")
def pipe():
    return qwenedit.load(progress=False, device="cpu")


def fired(model, pattern):
    seen = set()
    with taps(model, {pattern: lambda x, site: seen.add(site.full)}):
        model(torch.zeros(2))
    return seen


def edit(pipe, prompts="make the circle red", steps=2, **options):
    pictures = Image.open(mini.EXAMPLE)
    images = pictures if isinstance(prompts, str) else [pictures] * len(prompts)
    options = {"true_cfg_scale": 1.0, "output_type": "latent", **options}
    generator = torch.Generator().manual_seed(0)
    return pipe.edit(images, prompts, num_inference_steps=steps, generator=generator, **options).images


@pytest.mark.parametrize(
    "pattern, numbers",
    [
        ("blocks.{20..30}.img", range(20, 31)), ("blocks.{3,7}.img", (3, 7)),
        ("blocks.{1,20..22}.img", (1, 20, 21, 22)),
        ("blocks.{30..28}.img", (28, 29, 30)), ("blocks.[3-5].img", (3, 4, 5)), ("blocks.5[89].img", ()),
    ],
)  # fmt: skip
def test_a10_braces_mean_numbers(pattern, numbers):
    if not numbers:
        with pytest.raises(ValueError, match=r"\[89\] stands for a single character.*write \{8,9\}"):
            fired(Many(), pattern)
        return
    assert fired(Many(), pattern) == {f"blocks.{n}.img" for n in numbers}


def test_a10_braces_hold_names_too_and_each_must_be_there():
    assert fired(Many(), "blocks.{3,4}.{img,txt}") == {
        f"blocks.{n}.{t}" for n in (3, 4) for t in ("img", "txt")
    }
    with pytest.raises(KeyError, match=r"no tap matches 'blocks\.60\.img'"):
        fired(Many(), "blocks.{58..1000000000}.img")


@pytest.mark.parametrize(
    "inside, instead", [("20-30", "20..30"), ("1-30", "1..30"), ("10", "1,0"), ("23", "2,3"), ("10-", "1,0")]
)
def test_a10_a_class_that_is_meant_for_numbers_is_refused(inside, instead):
    with pytest.raises(ValueError) as error:
        fired(Many(), f"blocks.[{inside}].img")
    assert f"write {{{instead}}}" in str(error.value)


def test_a11_labels_have_the_texts_lengths_and_records_can_leave_padding_out(pipe):
    prompts = ["make the circle red", "move the large blue square on the left to the right"]
    lengths, whole, cut = set(), Recorder(), Recorder(padding=False)
    names = ("txt_in", "blocks.0.txt_mlp.mlp_hidden", "blocks.0.attn.txt_q", "blocks.0.attn.probs", "img_in")

    def look(x, site):
        lengths.add((site.labels["text_lengths"], x.shape[1]))

    functions = {name: fn for name in names for fn in [whole]}
    with (
        taps(pipe.mmdit, {"txt_in": look}),
        taps(pipe.mmdit, functions),
        taps(pipe.mmdit, dict.fromkeys(names, cut)),
    ):
        edit(pipe, prompts, steps=1)
    ((of_rows, padded),) = lengths
    assert of_rows[0] < of_rows[1] == padded
    for name in names[:3]:
        for row, length in enumerate(of_rows):
            assert torch.equal(cut[name, 0, "cond", (row,)][0], whole[name][row, :length])
    image = whole["img_in"].shape[1]
    assert cut["blocks.0.attn.probs", 0, "cond", (0,)].shape[-2:] == (of_rows[0] + image,) * 2
    assert torch.equal(cut["img_in"], whole["img_in"])


def test_a11_the_text_encoder_has_them_too(pipe):
    cut = Recorder(padding=False)
    with taps(pipe.vision_language, {"out": cut}):
        edit(pipe, ["make the circle red", "move the large blue square on the left to the right"], steps=1)
    lengths = [cut[key].shape[1] for key in cut if key.branch == "cond"]
    assert len(lengths) == 2 and lengths[0] < lengths[1]


@pytest.mark.parametrize(
    "write",
    [lambda x: x.zero_(), lambda x: x[:, :2].mul_(2), lambda x: x.detach().add_(1),
     ],
    ids=["whole", "view", "detached"],
)  # fmt: skip
@pytest.mark.parametrize("returned", [False, True])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_a12_a_function_that_writes_in_place_is_an_error(mode, write, returned):
    model = mmdit.network()

    def bad(x, _site):
        out = write(x)
        return out if out is x and returned else None

    with (
        mode(),
        pytest.raises(ValueError, match=r"tap blocks\.1\.img_mid: the function wrote into its tensor"),
    ):
        with taps(model, {"blocks.1.img_mid": bad}):
            model(*mmdit.inputs())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a12_reading_and_replacing_are_fine(mode):
    model, sums = mmdit.network(), []
    with mode():
        plain = model(*mmdit.inputs())
        with (
            taps(model, {OUT: lambda x, site: sums.append(x.float().sum())}),
            taps(model, {OUT: lambda x, _: x * 1}),
        ):
            assert torch.equal(model(*mmdit.inputs()), plain)
    assert len(sums) == 1


def test_a16_means_say_of_how_many_edits_they_are(tmp_path):
    sweep = made_up(tmp_path, failed=[(0, 0, 1)])
    plain, other = (estimates(sweep, cell) for cell in range(2))
    assert (plain["source_psnr"].n, plain["success"].n, plain["norm_ratio"].n) == (4, 2, 4)
    assert other["psnr"].n == 3 and other["norm_ratio"].n == 0
    texts = [text for _, text in page(sweep).rows("sortable")[1]]
    assert "50.0 of 2" in texts and "20.5" in texts and texts[-2] == "4"


def test_a17_every_weight_that_is_trained_gets_a_gradient():
    model = mmdit.network().requires_grad_(True)
    freeze_unreached(model)
    model(*mmdit.inputs()).sum().backward()
    weights = dict(model.named_parameters())
    assert {name for name, p in weights.items() if p.grad is None} == {
        name for name, p in weights.items() if not p.requires_grad
    }
    assert sum(not p.requires_grad for p in weights.values()) == 6


def test_a17_in_the_vae_too():
    vae = qwenedit.load(progress=False, device="cpu").vae.requires_grad_(True)
    freeze_unreached(vae)
    loss_of(vae, torch.rand(1, 3, 64, 64), torch.randn(1, vae.config.z_dim, 1, 8, 8))[0].backward()
    assert all((p.grad is None) == (not p.requires_grad) for p in vae.parameters())


def test_a17_distributed_training_works(tmp_path):
    from torch import distributed
    from torch.nn.parallel import DistributedDataParallel

    model = mmdit.network().requires_grad_(True)
    freeze_unreached(model)
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(model)
        for _ in range(2):  # the second forward would find weights that were never ready
            wrapped(*mmdit.inputs()).sum().backward()
    finally:
        distributed.destroy_process_group()


def results_folder(folder, file):
    folder.mkdir()
    line = {**RECORD, "key": "0" * 20, "file": file}
    (folder / "results.jsonl").write_text(json.dumps(line) + "\n")
    return folder


@pytest.mark.parametrize(
    "file", ["javascript:alert(1)", "../x.png", "/etc/passwd", "pictures/\x1b[31m.png", "pictures/1.png"]
)
def test_b7_a_file_that_is_no_picture_of_the_sweep_is_refused(tmp_path, file):
    folder = results_folder(tmp_path / "results", file)
    spec = {"pictures": ["mini:1"], "steps": 1}
    with pytest.raises(ValueError, match=r"file is .*, wanted pictures/0{20}\.png") as error:
        ablate(spec, folder, device="cpu", progress=False)
    assert "\x1b" not in str(error.value)  # and so for B6
    assert not (folder / "report.html").exists()


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "\n=1", "＝1"])
def test_b7_no_formula_in_tables(tmp_path, text):
    assert quoted(text) == f"'{text}" and quoted("a" + text) == "a" + text
    sweep = made_up(tmp_path)
    for record in sweep.records.values():
        record["prompt"] = record["picture"] = text
        record["metrics"]["psnr"] = -1.0
    write_csv(sweep, tmp_path / "x.csv")
    with (tmp_path / "x.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["prompt"] for row in rows} == {row["picture"] for row in rows} == {f"'{text}"}
    assert {row["psnr"] for row in rows} == {"-1.0"}  # a number stays one


def step(norm):
    cond = torch.full((1, 4, 2), norm)
    made = Step(0, 1.0, 0.5, torch.zeros(1, 4, 2), cond, None, None)
    return SimpleNamespace(
        index=0, sigma=1.0, velocity=made.velocity, after=made.after, norm_ratio=torch.tensor([[1.0, norm]])
    )


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_c2_a_ratio_that_is_not_finite_is_null_with_its_step(bad, tmp_path):
    first = step(1.0)
    second = SimpleNamespace(**{**vars(step(1.0)), "index": 1, "norm_ratio": torch.tensor([[0.5, bad]])})
    _, made = metrics.curves([first, second])
    assert made["norm_ratio"] == {"mean": [1.0, None], "min": [1.0, None], "max": [1.0, None]}
    assert made["not_finite"] == [1]
    json.dumps(made, allow_nan=False)
    sweep = made_up(tmp_path)
    for record in sweep.records.values():
        record["curves"]["norm_ratio"] = {"mean": [None, None], "min": [None, None], "max": [None, None]}
    write_report(sweep, tmp_path / "report.html")


@pytest.mark.parametrize("where", ["curves", "metrics"])
def test_c2_a_sweep_goes_on_after_a_measure_that_is_no_number(tmp_path, monkeypatch, where):
    from qwenedit.ablation import sweep as module

    calls, judge, curves = [], module._judge, module.curves

    def unknown(*arguments):
        calls.append(1)
        wrong = {"preserved": float("nan")} if where == "metrics" and len(calls) == 1 else {}
        return {**judge(*arguments), **wrong}

    monkeypatch.setattr(module, "_judge", unknown)

    def infinite(steps):
        latents, made = curves(steps)
        return latents, {**made, "velocity": [float("inf")]} if where == "curves" and not calls else made

    monkeypatch.setattr(module, "curves", infinite)
    spec = {"pictures": ["mini:1"], "steps": 1, "seeds": [0, 1]}
    swept = ablate(spec, tmp_path / "x", device="cpu", progress=False)
    assert [record["status"] for record in swept.records.values()] == ["failed", "done"]
    assert "JSON compliant" in swept.failed[0]["error"]


@pytest.mark.parametrize("modes", [{"residency": "stream"}, {"storage": "float8"},
                                   {"residency": "stage", "modulation": "precomputed"}])  # fmt: skip
def test_c1_threads_share_a_pipe(modes):
    pipe = qwenedit.load(progress=False, device="cpu", **modes)
    wanted, made = edit(pipe), []

    def work():
        for _ in range(3):
            try:
                made.append(edit(pipe))
            except ValueError as error:
                made.append(error)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    threads = [threading.Thread(target=work) for _ in range(3)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert len(made) == 9 and all(isinstance(x, torch.Tensor) and torch.equal(x, wanted) for x in made)
    assert all(
        part.depth == 0
        for own in getattr(pipe.mmdit.blocks, "parts", ())
        for part in (own.rest, own.modulation)
    )


def test_c1_loops_of_two_threads_interleave():
    """Both begin without the adaLN weights, the first ends first: the flag of the second stays its own."""
    from qwenedit.memory.streaming import Streamed

    blocks, inside, leave = Streamed(), threading.Event(), threading.Event()

    def other():
        with blocks.without_modulation():
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    with blocks.without_modulation():
        thread.start()
        assert inside.wait(10)
    leave.set()
    thread.join()
    assert not blocks._without_modulation


def test_c14_a_partial_recording_is_replayed(pipe):
    recorder = Recorder(steps=[0])
    with taps(pipe.mmdit, {OUT: recorder}):
        plain = edit(pipe)
    with pytest.raises(KeyError, match="missing='keep'"), taps(pipe.mmdit, {OUT: patch_from(recorder)}):
        edit(pipe)
    with taps(pipe.mmdit, {OUT: patch_from(recorder, missing="keep")}):
        assert torch.equal(edit(pipe), plain)


def test_c14_some_rows_and_other_groups():
    model = mmdit.network()
    img, txt, t, grids = mmdit.inputs(batch=2)
    recorder, seen = Recorder(), []
    with scope(rows=[1]), taps(model, {OUT: recorder}):
        model(img[:1] * 0.5, txt[:1], t[:1], grids)
    with scope(rows=[0, 1]), taps(model, {OUT: lambda x, site: seen.append(x)}):
        model(img, txt, t, grids)
        with taps(model, {OUT: patch_from(recorder, missing="keep")}, first=True):
            model(img, txt, t, grids)
        with pytest.raises(KeyError, match="missing='keep'"), taps(model, {OUT: patch_from(recorder)}):
            model(img, txt, t, grids)
    assert torch.equal(seen[1][0], seen[0][0]) and torch.equal(seen[1][1], recorder[OUT][0])


def test_c14_the_last_call_of_an_iterated_inversion_counts():
    from qwenedit.taps import Site

    recorder, site = Recorder(), Site(nn.Identity(), "x", "x")

    def predict(latents, _sigma):
        recorder(latents, site)
        return 0.5 * latents, None

    list(inverse_euler(predict, torch.ones(1, 1, 1), [1.0, 0.5, 0.0], iterations=3))
    with scope(step=0):
        replayed = patch_from(recorder)(torch.zeros(1, 1, 1), site)
    assert torch.equal(replayed, recorder["x", 0, None, None, None, 3])


def test_c14_a_tap_without_records_is_an_error_before_the_run(pipe):
    with pytest.raises(KeyError, match="was not recorded"):
        with taps(pipe.mmdit, {OUT: patch_from(Recorder())}):
            pytest.fail("it ran")
    for records, options in (({}, {}), (Recorder(), {"missing": "zero"})):
        with pytest.raises(ValueError, match=r"^(records are|missing is)"):
            patch_from(records, **options)


@pytest.mark.parametrize(
    "use",
    [
        tap_names, lambda pipe: taps(pipe, {"*": print}).__enter__(),
        lambda pipe: swapped(pipe, "mmdit", lambda old: old).__enter__(),
        lambda pipe: qwenedit.trace_ops(pipe).__enter__(),
        lambda pipe: AttentionMaps().attached(pipe).__enter__(),
    ],
)  # fmt: skip
def test_c15_a_pipe_is_no_module(pipe, use):
    with pytest.raises(
        ValueError, match=r"the model is QwenImageEdit, wanted a torch module, like its .*mmdit"
    ):
        use(pipe)


@pytest.mark.parametrize(
    "use, message",
    [
        (lambda m: AttentionMaps(rows="ref"), "no group of tokens is 'ref'"),
        (lambda m: AttentionMaps(columns=["text", "reference0"]), "no group of tokens is 'reference0'"),
        (lambda m: AttentionMaps(blocks=3), "blocks are 3"),
        (lambda m: AttentionMaps(blocks="all"), "blocks are 'all'"),
        (lambda m: Recorder(steps="0"), "steps are '0'"),
        (lambda m: Recorder(steps=[0.5]), "one of steps is 0.5"),
        (lambda m: Recorder(where="blocks.0"), "where is str"),
        (lambda m: taps({"*": print}, m).__enter__(), "the model is dict"),
        (lambda m: taps(m, print).__enter__(), "the functions are builtin"),
        (lambda m: taps(m, {"*": "zero"}).__enter__(), "the functions have str: str"),
        (lambda m: taps(m, {print: "*"}).__enter__(), "the functions have builtin"),
        (lambda m: swapped(m, nn.Identity, "blocks.0").__enter__(), "path and factory are"),
    ],
)  # fmt: skip
def test_c15_wrong_arguments_fail_at_once(use, message):
    with pytest.raises(ValueError, match=message):
        use(mmdit.network())


def test_c20_bars_show_in_jupyter_and_nowhere_else_but_on_a_terminal(monkeypatch, capsys):
    assert list(checks.progress_bar([1, 2], desc="x")) == [1, 2]
    assert capsys.readouterr() == ("", "")  # stderr is no terminal
    shell = SimpleNamespace(config={"IPKernelApp": {}})
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    assert list(checks.progress_bar([1, 2], desc="x")) == [1, 2]
    assert "x" in "".join(capsys.readouterr())
    assert list(checks.progress_bar([1, 2], progress=False, desc="x")) == [1, 2]
    assert capsys.readouterr() == ("", "")
    shell.config = {"TerminalIPythonApp": {}}
    list(checks.progress_bar([1], desc="x"))
    assert capsys.readouterr() == ("", "")


def test_c20_every_bar_is_made_in_one_place():
    from pathlib import Path

    root = Path(qwenedit.__file__).parent
    users = [
        path.name
        for path in root.rglob("*.py")
        if "tqdm(" in path.read_text() or "import tqdm" in path.read_text()
    ]
    assert users == ["checks.py"]


def test_b6_escape_sequences_do_not_reach_the_terminal(tmp_path):
    from qwenedit.parity.report import Parity, Row

    evil = "a\x1b[31m\u202eb"
    rows = [Row(module=evil, dtype="float32", ok=False, first=evil)]
    text = str(Parity(tmp_path / evil, {"variant": evil}, rows))
    assert "a\\x1b[31m\\u202eb" in text and text.replace("\n", "").isprintable()
    sweep = made_up(tmp_path, failed=[(0, 0, 1)])
    sweep.records[0, 0, 1]["error"] = evil
    write_report(sweep, tmp_path / "report.html")
    assert "\x1b" not in (tmp_path / "report.html").read_text()


def test_b6_the_command_line_shows_a_failed_edits_error_escaped(tmp_path, monkeypatch, capsys):
    from qwenedit.ablation import sweep as module
    from qwenedit.cli import options as cli

    def fail(*_):
        raise RuntimeError("bad \x1b]0;title\x07")

    monkeypatch.setattr(module, "_edit", fail)
    spec = tmp_path / "x.toml"
    spec.write_text('pictures = ["mini:1"]\nsteps = 1\n')
    assert cli.main(["ablate", str(spec), "-o", str(tmp_path / "out"), "--device", "cpu"]) == 2
    assert "\x1b" not in "".join(capsys.readouterr())
