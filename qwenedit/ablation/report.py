"""report.html, the self-contained page of a sweep.

The page's frame, style and script are in report.html beside this file; its parts are made here. Text from a
spec or a result is escaped where it enters the page.
"""

from __future__ import annotations

import base64
import io
import itertools
import re
from collections.abc import Iterable
from html import escape
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from qwenedit.ablation.drawing import Drawing
from qwenedit.ablation.figures import effects, step_charts
from qwenedit.ablation.labels import axis_text, bands, label, text_of
from qwenedit.ablation.measures import Measure
from qwenedit.ablation.results import Sweep
from qwenedit.ablation.sheet import MOST, SMALL, distance
from qwenedit.ablation.spec import CALL
from qwenedit.ablation.statistics import Estimate, compared, differences, estimates, noise_floor
from qwenedit.ablation.tables import TERMS, quoted
from qwenedit.foreign import shown
from qwenedit.inputs.pictures import open_picture, to_pil

__all__ = ["write_report"]

_ALWAYS = (
    "true_cfg_scale",
    "steps",
    "negative_prompt",
)  # arguments that the page names also at their defaults
THUMBNAIL = 256  # pixels: larger pictures are embedded at this size


def write_report(sweep: Sweep, path: Path) -> None:
    """Write the page, with attention maps where the sweep has them."""
    case_names = ", ".join(dict.fromkeys(case.name for case in sweep.spec.cases))
    title = f"Ablation: {' × '.join(sweep.spec.axes) or 'the unablated run'}"
    judged = any(case.request for case in sweep.spec.cases)
    parts = {
        "TITLE": escape(title),
        "LEAD": escape(
            f"{len(sweep.spec.cells)} settings of {len(sweep.spec.cases)} edit(s) from "
            f"{len(sweep.spec.seeds)} seed(s): {case_names}"
            + (f"; {n} contradictory combinations were left out" if (n := sweep.spec.impossible) else "")
            + (f"; {n} that come to the same as another are shown with it" if (n := _merged(sweep)) else "")
        ),
        "FACTS": _facts(sweep),
        "FAILURES": _failures(sweep),
        "SUMMARY": _summary(sweep),
        "JUDGED": ", and the oracle's verdict" if judged else "",
        "PICTURES": _pictures(sweep),
        "EFFECTS": _effects(sweep),
        "CURVES": "".join(_card(caption, _svgs(charts)) for caption, charts in step_charts(sweep))
        or "<p>No run is done.</p>",
        "ATTENTION": _attention(sweep),
        "TERMS": _terms(sweep),
    }
    frame = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    page = re.sub(r"<!--([A-Z]+)-->", lambda match: parts[match[1]], frame)
    path.write_text(page, encoding="utf-8", errors="replace")


def _merged(sweep: Sweep) -> int:
    return sum(len(cell.combinations) - 1 for cell in sweep.spec.cells if cell.combinations)


def _terms(sweep: Sweep) -> str:
    found = {one.heading: one.meaning for one in sweep.measures if not one.minor}
    terms = (f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in found.items())
    return "".join([*terms, f"<dt>intervals and differences</dt><dd>{escape(TERMS)}</dd>"])


def _facts(sweep: Sweep) -> str:
    """The environment of the runs; where they differ, all values."""
    spec, records = sweep.spec, list(sweep.records.values())
    plain = spec.cells[0]
    facts = {
        "model": f"{records[0]['model']} ({records[0]['fingerprint']})",
        "unablated": ", ".join(
            f"{name} {text_of(getattr(plain, name))}"
            for name, usual in CALL.items()
            if name in _ALWAYS or getattr(plain, name) != usual
        ),
        "seeds": ", ".join(map(str, spec.seeds)),
        **{
            name: ", ".join(sorted({str(record[name] or "none") for record in records}))
            for name in ("device", "dtype", "threads", "qwenedit", "commit", "torch", "python")
        },
        "last run": max(record["at"] for record in records),
    }
    return "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts.items()
    )


def _failures(sweep: Sweep) -> str:
    """Runs that failed, and metrics that did."""
    rows = []
    for (_, _, k), record in sweep.records.items():
        run = f"{escape(record['picture'])}, seed {record['seed']}, {escape(label(sweep.spec, k))}"
        errors = {f"metric {name}, ": x for name, x in record.get("own_errors", {}).items()}
        if record["status"] == "failed":
            errors = {"": record["error"]}
        rows += [
            f"<li>{escape(what)}{run}: <code>{escape(shown(error))}</code></li>"
            for what, error in errors.items()
        ]
    return f'<section id="failures"><h2>Failed</h2><ul>{"".join(rows)}</ul></section>' if rows else ""


def _summary(sweep: Sweep) -> str:
    """The content of the table: a row for each cell, and the noise floor below."""
    spec, cells = sweep.spec, range(len(sweep.spec.cells))
    means = [estimates(sweep, k) for k in cells]
    columns = [one for one in sweep.measures if not one.minor and any(row[one.name].n for row in means)]
    axes = spec.axes or ("settings",)
    head = [_heading(axis, axis, "", "") for axis in axes]
    head += [_heading(one.name, one.heading, one.unit, one.meaning) for one in columns]
    head.append(_heading("runs", "runs", "done", "the number of runs that are done"))
    head.append(_heading("compared", "compared", "", ""))
    rows = []
    for k in cells:
        paired = differences(sweep, k)
        fields = []
        for axis in axes:
            value = quoted(axis_text(spec, k, axis))  # the table can be copied
            fields.append(f'<td data-v="{escape(value)}">{escape(value)}</td>')
        done, wanted = len(sweep.of_cell(k)), len(spec.cases) * len(spec.seeds)
        for one in columns:
            mean, difference = means[k][one.name], paired.get(one.name)
            text = one.shown(mean.value)
            if mean.n and mean.n != done:  # as where an oracle judges some edits only
                text += f" <small>of {mean.n}</small>"
            below = mean if one.to_unablated else difference
            if below is not None and below.n:
                sign = not one.to_unablated
                value = f"{one.shown(below.value, sign=True)} " if sign else ""
                text += f'<small class="below">{value}{_interval(one, below, sign=sign)}</small>'
            number = "" if mean.value is None else repr(mean.value)
            fields.append(f'<td class="number" data-v="{number}">{text}</td>')
        count = str(done) if done == wanted else f"{done} of {wanted}"
        fields.append(f'<td class="number" data-v="{done}">{count}</td>')
        sentence = escape(quoted(compared(sweep, k)))
        fields.append(f'<td class="sentence" data-v="{k}">{sentence}</td>')
        rows.append(_tag("tr", "".join(fields), "plain" if k == 0 else ""))
    floor = noise_floor(sweep)
    floors = [f'<th scope="row" colspan="{len(axes)}">noise floor</th>']
    floors += [f'<td class="number">{one.shown(floor[one.name].value)}</td>' for one in columns]
    pairs = max((one.n for one in floor.values()), default=0)
    floors.append(f'<td class="number">{pairs} <small>pairs</small></td><td></td>')
    foot = f"<tfoot><tr>{''.join(floors)}</tr></tfoot>" if pairs else ""
    return f"<thead><tr>{''.join(head)}</tr></thead><tbody>{''.join(rows)}</tbody>{foot}"


def _interval(measure: Measure, estimate: Estimate, *, sign: bool) -> str:
    if estimate.low is None:
        return ""
    low, high = (measure.shown(x, sign=sign) for x in (estimate.low, estimate.high))
    return f"[{low}, {high}]"


def _tag(name: str, inside: str, kind: str) -> str:
    return f"<{name} class={kind!r}>{inside}</{name}>" if kind else f"<{name}>{inside}</{name}>"


def _heading(name: str, text: str, unit: str, what: str) -> str:
    """A heading with a button that sorts by its column."""
    number = ' class="number"' if what else ""
    title = f' title="{escape(what)}"' if what else ""
    below = f"<small>{escape(unit)}</small>" if unit else ""
    return (
        f'<th scope="col" data-name="{escape(name)}" aria-sort="none"{number}>'
        f"<button{title}>{escape(text)}{below}</button></th>"
    )


def _pictures(sweep: Sweep) -> str:
    """Tables: settings across, as many as fit, pictures and seeds down, sources on the left."""
    tables = []
    for cells in bands(len(sweep.spec.cells), MOST):
        rows = []
        for i, case in enumerate(sweep.spec.cases):
            for j, seed in enumerate(sweep.spec.seeds):
                fields = []
                if j == 0:
                    span = f' rowspan="{len(sweep.spec.seeds)}"' if len(sweep.spec.seeds) > 1 else ""
                    fields.append(
                        f'<th class="fixed" scope="row"{span}>{escape(quoted(case.name))}<br>'
                        f"<small>{escape(case.prompt)}</small></th>"
                        f"<td{span}>{_figure(_data_uri(case.shown), case.shown, 'source', 'source')}</td>"
                    )
                fields.append(f"<td>{seed}</td>")
                for k in cells:
                    fields.append(_tag("td", _result(sweep, (i, j, k)), "plain" if k == 0 else ""))
                rows.append(_tag("tr", "".join(fields), "first" if j == 0 else ""))
        content = f"<thead>{_picture_heads(sweep, cells)}</thead><tbody>{''.join(rows)}</tbody>"
        tables.append(f'<div class="scroll"><table class="pictures">{content}</table></div>')
    return "".join(tables)


def _picture_heads(sweep: Sweep, cells: list[int]) -> str:
    """A row for each axis; neighbours that agree in it and in the axes above share a heading."""
    spec, rows = sweep.spec, []
    for depth, axis in enumerate(spec.axes):
        fields = [f'<th class="axis fixed" scope="row">{escape(axis)}</th>']
        if depth == 0:
            fields.append(f'<th rowspan="{len(spec.axes)}"></th><th rowspan="{len(spec.axes)}">seed</th>')
        fields.append(_tag("th", escape(quoted(axis_text(spec, 0, axis))), "plain"))
        outer = [tuple(axis_text(spec, k, name) for name in spec.axes[: depth + 1]) for k in cells[1:]]
        for values, group in itertools.groupby(outer):
            span = len(list(group))
            fields.append(f'<th scope="colgroup" colspan="{span}">{escape(quoted(values[-1]))}</th>')
        rows.append(f"<tr>{''.join(fields)}</tr>")
    return "".join(rows) or '<tr><th></th><th></th><th>seed</th><th class="plain">unablated</th></tr>'


def _result(sweep: Sweep, index: tuple[int, int, int]) -> str:
    """The picture of a run with its metrics, or a note that it failed."""
    record, prompt = sweep.records[index], sweep.spec.cases[index[0]].prompt
    if record["status"] == "failed":
        return f'<div class="failed" title="{escape(shown(record["error"]))}">failed</div>'
    picture = open_picture(sweep.folder / record["file"])
    measured, verdict = record["metrics"], ""
    if "success" in measured:
        reason = escape(measured["reason"] or "as asked")
        kind, sign = ("good", "✓") if measured["success"] else ("bad", "✗")
        verdict = f' <span class="{kind}" title="{reason}">{sign}</span>'
    figure = _figure(_data_uri(picture), picture, prompt, distance(record, index[2]), verdict)
    whole = f'<a href="{escape(record["file"])}">{figure}</a>'
    return whole if max(picture.size) > THUMBNAIL else figure


def _figure(uri: str, picture: Image.Image, alt: str, caption: str, verdict: str = "") -> str:
    small = ' class="small"' if max(picture.size) <= SMALL else ""
    return (
        f'<figure><img{small} src="{uri}" alt="{escape(alt)}">'
        f"<figcaption>{escape(caption)}{verdict}</figcaption></figure>"
    )


def _data_uri(picture: Image.Image) -> str:
    """A picture to embed in the page: PNG, of at most `THUMBNAIL` pixels a side."""
    rgb = picture.convert("RGB")
    rgb.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    rgb.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _effects(sweep: Sweep) -> str:
    """A section with a figure for each measure; nothing where there is nothing to compare."""
    figures = effects(sweep)
    if not figures:
        return ""
    return (
        '<section id="effects"><h2>Effects</h2><p class="soft">Means with 95 % intervals. Shaded, or dashed: '
        "the noise floor, which is how far the unablated run is from itself at another seed. The figures are "
        'in <code>figures/</code>, as SVG and PDF.</p><div class="wide">'
        f"{''.join(_svgs(figures.values()))}</div></section>"
    )


def _svgs(drawings: Iterable[Drawing]) -> list[str]:
    return [one.svg() for one in drawings]


def _card(caption: str, inside: list[str], kind: str = "charts") -> str:
    return (
        f'<figure class="card"><figcaption>{escape(caption)}</figcaption>'
        f'<div class="{kind}">{"".join(inside)}</div></figure>'
    )


def _attention(sweep: Sweep) -> str:
    """A card for every setting that has maps, with a heatmap for each group of tokens."""
    cards = []
    for (_, _, cell), record in sweep.records.items():
        if "attention" not in record:
            continue
        figures = [
            f'<figure><img class="small" src="{_data_uri(_heatmap(torch.tensor(shares)))}" '
            f'alt="from the target to {group}"><figcaption>to {group}<br><span class="soft">'
            f"{_range(shares)}</span></figcaption></figure>"
            for group, shares in record["attention"].items()
        ]
        cards.append(_card(label(sweep.spec, cell), figures, "maps"))
    if not cards:
        return ""
    case, seed = sweep.spec.cases[0], sweep.spec.seeds[0]
    return (
        '<section id="attention"><h2>Attention</h2><p class="soft">The shares of the attention of the target '
        f"tokens of {escape(case.name)}, seed {seed}, under the prompt. Rows are blocks, the first on top; "
        "columns are steps, noise on the left. Dark is 0, bright is 1; below, the least and the greatest."
        f'</p><div class="cards">{"".join(cards)}</div></section>'
    )


def _range(shares: list[list[float]]) -> str:
    values = [x for row in shares for x in row]
    return f"{min(values):.2f} to {max(values):.2f}"


# Dark blue to green to yellow: lightness rises evenly, so that the order can be seen in grey too.
_HEAT = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))


def _heatmap(shares: Tensor) -> Image.Image:
    """A matrix of numbers in [0, 1] as a picture, one pixel per value."""
    x = shares.double().clamp(0, 1)
    colours = torch.tensor(_HEAT, dtype=torch.float64) / 255
    place = x * (len(_HEAT) - 1)
    below = place.floor().clamp_max(len(_HEAT) - 2)
    share = (place - below)[..., None]
    rgb = colours[below.long()] * (1 - share) + colours[below.long() + 1] * share
    return to_pil(rgb.permute(2, 0, 1)[None].clamp(0, 1))[0]
