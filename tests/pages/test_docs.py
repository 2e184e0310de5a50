"""What is said about the code: every public name explains itself, examples run, and the citation parses."""

import doctest
import importlib
import inspect
import pkgutil
import pydoc
import re
import sys
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import nbformat
import pytest
import yaml
from PIL import Image

import qwenedit
from qwenedit.mini import EXAMPLE

ROOT = Path(__file__).parents[2]
MODULES = sorted(
    one.name
    for one in pkgutil.walk_packages(qwenedit.__path__, "qwenedit.")
    if not one.name.endswith("__main__")
)
# Modules that researchers import from.
PUBLIC = (
    "qwenedit", "qwenedit.dialects", "qwenedit.encoding.conditioning", "qwenedit.family",
    "qwenedit.inputs.geometry", "qwenedit.inputs.pictures", "qwenedit.inputs.processor",
    "qwenedit.instruments.activations", "qwenedit.instruments.alignment", "qwenedit.instruments.stepping",
    "qwenedit.instruments.attention_maps", "qwenedit.instruments.determinism",
    "qwenedit.instruments.inversion", "qwenedit.instruments.patching", "qwenedit.instruments.records",
    "qwenedit.instruments.trace", "qwenedit.latents", "qwenedit.layered", "qwenedit.lora",
    "qwenedit.memory.plan", "qwenedit.memory.residency", "qwenedit.mini.oracle", "qwenedit.networks.mmdit",
    "qwenedit.networks.mmdit_layers", "qwenedit.networks.vae", "qwenedit.networks.vae_layers",
    "qwenedit.networks.vision_language", "qwenedit.networks.vision_tower", "qwenedit.parity.compare",
    "qwenedit.pipeline", "qwenedit.sampling.guidance", "qwenedit.sampling.predictor",
    "qwenedit.sampling.sampler", "qwenedit.sampling.samplers", "qwenedit.sampling.scheduler",
    "qwenedit.switches", "qwenedit.system", "qwenedit.taps", "qwenedit.training.conventions",
    "qwenedit.training.loss", "qwenedit.training.noise_levels", "qwenedit.verify",
)  # fmt: skip
PAGES = [
    page
    for pattern in ("*.md", "docs/*.md", "examples/*.md", "notebooks/*.md", "notebooks/*.ipynb")
    for page in sorted(ROOT.glob(pattern))
]
PAGES.append(ROOT / "qwenedit" / "mini" / "checkpoint" / "README.md")
EXAMPLES = 20  # names with doctests, at least: a search that finds none must fail


def explained(thing: object) -> bool:
    """True if it has a docstring of its own, not the signature that dataclasses and named tuples get."""
    doc = vars(thing).get("__doc__") if inspect.isclass(thing) else inspect.getdoc(thing)
    return bool(doc) and not doc.startswith(f"{thing.__name__}(")


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0


def test_there_are_examples():
    finder = doctest.DocTestFinder(exclude_empty=True)
    found = [test for name in MODULES for test in finder.find(importlib.import_module(name)) if test.examples]
    assert len(found) >= EXAMPLES


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_explains_itself(name):
    module = importlib.import_module(name)
    assert inspect.getdoc(module)
    things = {one: getattr(module, one) for one in module.__all__}
    named = {one: x for one, x in things.items() if inspect.isfunction(x) or inspect.isclass(x)}
    assert [one for one, x in named.items() if not explained(x)] == []


@dataclass
class Bare:
    x: int


class Heir(Path):
    pass


@dataclass
class Said:
    """What it is."""

    x: int


def test_the_check_sees_what_is_missing():
    assert [explained(one) for one in (Bare, Heir, Said)] == [False, False, True]


def test_pydoc_knows_all_names():
    page = pydoc.plain(pydoc.render_doc("qwenedit"))
    assert "error" not in page.splitlines()[0].lower()
    assert [name for name in qwenedit.__all__ if not re.search(rf"\b{name}\b", page)] == []
    for name in qwenedit.__all__:
        assert pydoc.render_doc(getattr(qwenedit, name))


def test_citation():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert citation["title"] == "qwenedit" and citation["type"] == "software"
    assert citation["message"] and citation["license"] == "Apache-2.0"
    assert citation["version"] == qwenedit.__version__
    assert all("name" in author or "family-names" in author for author in citation["authors"])
    (paper,) = citation["references"]
    assert paper["title"] == "Qwen-Image Technical Report" and paper["authors"]
    assert {"type": "other", "value": "arXiv:2508.02324"} in [
        {key: one[key] for key in ("type", "value")} for one in paper["identifiers"]
    ]


def test_changelog_has_this_version():
    text = (ROOT / "CHANGELOG.md").read_text()
    versions = re.findall(r"^## \[(.+?)\](?: - (\S+))?$", text, re.MULTILINE)
    assert qwenedit.__version__ in [version for version, _ in versions]
    for _, day in versions:
        assert day in ("", "unreleased") or date.fromisoformat(day)
    sections = re.findall(r"^### (.+)$", text, re.MULTILINE)
    assert set(sections) <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def prose(page):
    """The text of a page, without a notebook's code and outputs."""
    if page.suffix == ".md":
        return page.read_text()
    cells = nbformat.read(page, as_version=4).cells
    return "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_paths_and_links_lead_somewhere(page):
    text = prose(page)
    named = re.findall(r"`((?:qwenedit|tests|docs|benchmarks|notebooks|examples)/[\w./-]+)`", text)
    assert [path for path in named if not (ROOT / path).exists()] == []
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", text):
        file, _, heading = target.partition("#")
        assert (page.parent / file).exists(), target
        if heading:
            headings = re.findall(r"^#+ (.+)$", (page.parent / file).read_text(), re.MULTILINE)
            assert heading in [one.lower().replace(" ", "-") for one in headings], target


def test_an_edit_passes_through_the_reading_list():
    """Every file on the list is entered, and every file of a network that is entered is named beside it."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    section = text[text.index("### The reading list") : text.index("## House style")]
    listed = re.findall(r"^[0-9]+\. `(.+?)`", section, re.MULTILINE)
    entered = set()
    pipe = qwenedit.load(device="cpu", progress=False)
    before = sys.getprofile()
    sys.setprofile(lambda frame, event, _: entered.add(frame.f_code.co_filename) if event == "call" else None)
    try:
        pipe.edit(Image.open(EXAMPLE), "make the circle red", num_inference_steps=1)
    finally:
        sys.setprofile(before)
    package = Path(qwenedit.__file__).parents[1]
    files = {Path(name).relative_to(package).as_posix() for name in entered if name.startswith(f"{package}/")}
    assert listed and set(listed) <= files
    networks = [file for file in files if file.startswith("qwenedit/networks/")]
    assert [file for file in networks if f"`{file}`" not in section] == []
