"""The figure of docs/inversion.md."""

from xml.etree import ElementTree

from benchmarks import inversion


def test_the_figure_has_a_line_for_each_number_of_iterations():
    names = ("the prompt alone", "with <it>")
    falling = [0.5, 0.1, 0.01, 1e-7]  # the last is below the axis
    text = inversion.figure({name: dict.fromkeys(inversion.ITERATIONS, falling) for name in names})
    page = ElementTree.fromstring(text)
    lines = [one.attrib for one in page if one.get("class", "").startswith("i")]
    assert [one["class"] for one in lines] == [f"i{k}" for k in range(4)] * 2
    first, second = ([tuple(map(float, p.split(","))) for p in lines[k]["points"].split()] for k in (0, 4))
    assert [round(x - y, 1) for (x, _), (y, _) in zip(second, first, strict=True)] == [250.0] * 4
    assert [y for _, y in first] == sorted(y for _, y in first) and len(first) == len(inversion.STEPS)
    assert any("with <it>" in (one.text or "") for one in page)
