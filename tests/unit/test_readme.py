"""The README's Python runs, block after block in one namespace; what needs a download is only compiled."""

import re
from pathlib import Path

from qwenedit.taps import tap_names

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def test_snippets(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run = {}
    for block in BLOCKS:
        code = compile(block, "README.md", "exec")
        if "Qwen/" not in block:
            exec(code, run)
    printed = capsys.readouterr().out
    assert printed.startswith("Verdict(success=True")
    assert str(tap_names(run["pipe"].mmdit)[:4]) in printed
    assert "blocks.2.img_attn_add 0 cond (1, 32, 128)" in printed
    assert (tmp_path / "edit.safetensors").is_file()
    assert run["pixels"].shape == (1, 3, 64, 64)


def test_every_letter_of_a_shape_comment_is_in_the_table():
    source = "".join(path.read_text() for path in (ROOT / "qwenedit").glob("*.py"))
    shapes = re.findall(r'"((?:[A-Z0-9*]+ )+[A-Z0-9*]+)"', source)
    letters = {letter for shape in shapes for letter in shape.split() if re.fullmatch("[A-Z]", letter)}
    table = README[README.index("## The letters") : README.index("## How equal")]
    explained = {letter for cell in re.findall(r"`([A-Z ]+)`", table) for letter in cell.split()}
    assert letters - explained == set()
