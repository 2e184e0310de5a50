"""The pages of a sweep: report.html, a self-contained page, and grid.png, a contact sheet.

The page's frame, style and script are in report.html beside this file; its parts are made here. Text from a
spec or a result is escaped where it enters the page.
"""

from __future__ import annotations

import base64
import io
import itertools
import json
import re
import textwrap
from html import escape
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from qwenedit.ablation.charts import Line, chart, nice_range
from qwenedit.ablation.metrics import CHANGED
from qwenedit.ablation.results import Record, Sweep, quoted
from qwenedit.ablation.spec import CALL, Cell
from qwenedit.files import replacing_file
from qwenedit.foreign import shown
from qwenedit.inputs.pictures import open_picture, to_pil

__all__ = ["picture_grid", "write_report"]

THUMBNAIL = 256  # pixels: larger pictures are embedded at this size
SMALL = 128  # pixels: up to this size pixels are shown as squares
BAND = 4.0  # the norm ratio's axis is cut off at this multiple of the largest mean

# The summary's columns: measure, heading, unit, factor, decimals, meaning. Empty columns are left out.
COLUMNS = (
    ("psnr", "PSNR", "dB", 1, 1, "peak signal-to-noise ratio to the unablated picture; 100 dB: identical"),
    ("ssim", "SSIM", "", 1, 3, "structural similarity to it, with a Gaussian window of 11 pixels, sigma 1.5"),
    ("changed", "changed", "% of pixels", 100, 1,
     f"pixels with a channel that differs from it by more than {CHANGED:g} of its range"),
    ("norm_ratio", "norm ratio", "", 1, 3,
     "the norm of a token's conditional velocity over the norm of its guided velocity, mean over tokens and "
     "steps: the factor that the reference's guidance applies"),
    ("success", "success", "%", 100, 1, "by the oracle: the request is fulfilled and the rest is unchanged"),
    ("strict", "strict", "%", 100, 1, "success, with at least 22 dB where nothing should change"),
    ("preserved", "preserved", "dB", 1, 1, "PSNR to the source where the edit should change nothing"),
    ("sample", "sampling", "s", 1, 2, "seconds of an edit's steps"),
)  # fmt: skip


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
        ),
        "FACTS": _facts(sweep),
        "FAILURES": _failures(sweep),
        "SUMMARY": _summary(sweep),
        "JUDGED": ", and the oracle's verdict" if judged else "",
        "PICTURES": _pictures(sweep),
        "CURVES": _curves(sweep),
        "ATTENTION": _attention(sweep),
        "TERMS": "".join(
            f"<dt>{escape(heading)}</dt><dd>{escape(text)}</dd>" for _, heading, _, _, _, text in COLUMNS
        ),
    }
    frame = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    page = re.sub(r"<!--([A-Z]+)-->", lambda match: parts[match[1]], frame)
    with replacing_file(path) as temporary:
        temporary.write_text(page, encoding="utf-8", errors="replace")


def _facts(sweep: Sweep) -> str:
    """The environment of the runs; where they differ, all values."""
    spec, records = sweep.spec, list(sweep.records.values())
    plain = spec.cells[0]
    facts = {
        "model": f"{records[0]['model']} ({records[0]['fingerprint']})",
        "unablated": ", ".join(f"{name} {_text(getattr(plain, name))}" for name in CALL),
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
    if not sweep.failed:
        return ""
    rows = "".join(
        f"<li>{escape(record['picture'])}, seed {record['seed']}, "
        f"{escape(_label(sweep, sweep.spec.cells[cell]))}: <code>{escape(shown(record['error']))}</code></li>"
        for (_, _, cell), record in sweep.records.items()
        if record["status"] == "failed"
    )
    return f'<section id="failures"><h2>Failed</h2><ul>{rows}</ul></section>'


def _summary(sweep: Sweep) -> str:
    """The content of the table: a row for each cell."""
    means = sweep.means()
    columns = [column for column in COLUMNS if any(row[column[0]].edits for row in means)]
    head = [_heading(axis, axis, "", "") for axis in sweep.spec.axes or ["settings"]]
    head += [_heading(name, text, unit, what) for name, text, unit, _, _, what in columns]
    head.append(_heading("runs", "runs", "done", "the number of runs that are done"))
    rows = []
    for k, (cell, of_cell) in enumerate(zip(sweep.spec.cells, means, strict=True)):
        values = [quoted(_text(value)) for value in cell.values.values()]  # the table can be copied
        values = values or ["unablated"] * max(1, len(sweep.spec.axes))
        fields = [f'<td data-v="{escape(value)}">{escape(value)}</td>' for value in values]
        done, wanted = len(sweep.of_cell(k)), len(sweep.spec.cases) * len(sweep.spec.seeds)
        for name, _, _, factor, decimals, _ in columns:
            value, edits = of_cell[name]
            text = "–" if value is None else f"{factor * value:.{decimals}f}"
            if value is not None and edits != done:  # as where an oracle judges some edits only
                text += f" <small>of {edits}</small>"
            number = "" if value is None else repr(value)
            fields.append(f'<td class="number" data-v="{number}">{text}</td>')
        count = str(done) if done == wanted else f"{done} of {wanted}"
        fields.append(f'<td class="number" data-v="{done}">{count}</td>')
        rows.append(_tag("tr", "".join(fields), "plain" if k == 0 else ""))
    return f"<thead><tr>{''.join(head)}</tr></thead><tbody>{''.join(rows)}</tbody>"


def _tag(name: str, inside: str, kind: str) -> str:
    return f'<{name} class="{kind}">{inside}</{name}>' if kind else f"<{name}>{inside}</{name}>"


def _heading(name: str, text: str, unit: str, what: str) -> str:
    number = ' class="number"' if what else ""
    title = f' title="{escape(what)}"' if what else ""
    below = f"<small>{escape(unit)}</small>" if unit else ""
    return (
        f'<th scope="col" data-name="{escape(name)}" aria-sort="none"{number}>'
        f"<button{title}>{escape(text)}{below}</button></th>"
    )


def _pictures(sweep: Sweep) -> str:
    """The content of the table: settings across, pictures and seeds down, sources on the left."""
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
            for k in range(len(sweep.spec.cells)):
                fields.append(_tag("td", _result(sweep, (i, j, k)), "plain" if k == 0 else ""))
            rows.append(_tag("tr", "".join(fields), "first" if j == 0 else ""))
    return f"<thead>{_picture_heads(sweep)}</thead><tbody>{''.join(rows)}</tbody>"


def _picture_heads(sweep: Sweep) -> str:
    """A row for each axis; neighbours that agree in it and in the axes above share a heading."""
    axes, rows = sweep.spec.axes, []
    for depth, axis in enumerate(axes):
        fields = [f'<th class="axis fixed" scope="row">{escape(axis)}</th>']
        if depth == 0:
            fields.append(f'<th rowspan="{len(axes)}"></th><th rowspan="{len(axes)}">seed</th>')
        plain = sweep.spec.cells[0].values
        fields.append(_tag("th", escape(quoted(_text(plain[axis]))) if plain else "unablated", "plain"))
        outer = [
            tuple(_text(cell.values[name]) for name in axes[: depth + 1]) for cell in sweep.spec.cells[1:]
        ]
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
    figure = _figure(_data_uri(picture), picture, prompt, _distance(record, index[2]), verdict)
    whole = f'<a href="{escape(record["file"])}">{figure}</a>'
    return whole if max(picture.size) > THUMBNAIL else figure


def _distance(record: Record, cell: int) -> str:
    """The PSNR to the unablated picture."""
    measured = record["metrics"]["psnr"]
    return "unablated" if cell == 0 else "–" if measured is None else f"{measured:.1f} dB"


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


def _curves(sweep: Sweep) -> str:
    """The schedules of sigmas, then a card with the charts of each cell, on common axes."""
    of_cells = [_mean_curves(sweep.of_cell(k)) for k in range(len(sweep.spec.cells))]
    known = [one for one in of_cells if one is not None]
    if not known:
        return "<p>No run is done.</p>"
    velocity = nice_range(value for one in known for value in one["velocity"])
    means = [value for one in known for value in one["mean"] if value is not None]
    lows = [value for one in known for value in one["min"] if value is not None]
    highest = BAND * max(means, default=0.0)
    highs = [min(value, highest) for one in known for value in one["max"] if value is not None]
    ratio = nice_range([*lows, *highs])
    cards = []
    for schedule in dict.fromkeys(tuple(one["sigma"]) for one in known):
        points = Line([*range(1, len(schedule) + 1)], schedule)
        svg = chart("σ", [points], x=(1, max(2, len(schedule))), y=(0, 1), along="step")
        cards.append(_card(f"schedule of {len(schedule)} steps", [svg]))
    for cell, one in zip(sweep.spec.cells, of_cells, strict=True):
        if one is None:
            continue
        plain = of_cells[0] if of_cells[0] is not one else None

        def lines(name: str, line: Line, plain: dict[str, list[Any]] | None = plain) -> list[Line]:
            return [line] if plain is None else [Line(plain["sigma"], plain[name], "ghost"), line]

        speed = lines("velocity", Line(one["sigma"], one["velocity"]))
        charts = [chart("|velocity|", speed, x=(1, 0), y=velocity, along="σ")]
        if any(value is not None for value in one["mean"]):
            band = lines("mean", Line(one["sigma"], one["mean"], band=(one["min"], one["max"])))
            charts.append(chart("norm ratio", band, x=(1, 0), y=ratio, along="σ"))
        cards.append(_card(_label(sweep, cell), charts))
    return "".join(cards)


def _card(caption: str, inside: list[str], kind: str = "charts") -> str:
    return (
        f'<figure class="card"><figcaption>{escape(caption)}</figcaption>'
        f'<div class="{kind}">{"".join(inside)}</div></figure>'
    )


def _mean_curves(records: list[Record]) -> dict[str, list[Any]] | None:
    """Step by step over the runs of a cell: means, and the least and greatest norm ratio."""
    if not records:
        return None
    curves = [{**record["curves"], **record["curves"]["norm_ratio"]} for record in records]

    def over(name: str, fold: Any) -> list[float | None]:
        at_steps = zip(*(one[name] for one in curves), strict=True)
        known = [[x for x in values if x is not None] for values in at_steps]
        return [fold(values) if values else None for values in known]

    folds = {"sigma": fmean, "velocity": fmean, "mean": fmean, "min": min, "max": max}
    return {name: over(name, fold) for name, fold in folds.items()}


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
        cards.append(_card(_label(sweep, sweep.spec.cells[cell]), figures, "maps"))
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


def _label(sweep: Sweep, cell: Cell) -> str:
    """A cell's settings in one line."""
    values = ", ".join(f"{name} {_text(value)}" for name, value in cell.values.items())
    if cell is sweep.spec.cells[0]:
        return f"unablated ({values})" if values else "unablated"
    return values


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, str):
        return shown(value) if value.strip() else f'"{shown(value)}"'
    return json.dumps(value, ensure_ascii=False)


def picture_grid(sweep: Sweep) -> Image.Image:
    """The contact sheet: a row for each picture and seed, a column for each cell, the sources on the left."""
    spec, font = sweep.spec, ImageFont.load_default(13)
    small = ImageFont.load_default(12)
    side, gap, line, margin = 144, 6, 17, 210
    heads = len(spec.axes) + 1
    top = heads * line + 2 * gap
    lines = [(i, j) for i in range(len(spec.cases)) for j in range(len(spec.seeds))]
    width = margin + (len(spec.cells) + 1) * (side + gap) + gap
    page = Image.new("RGB", (width, top + len(lines) * (side + line + gap)), "white")
    ink = ImageDraw.Draw(page)

    def write(x: float, y: float, text: str, *, room: int, font: Any = font, **options: Any) -> None:
        text = re.sub(r"[^\x00-\xff]+", "…", text)  # Pillow's own font has Latin letters only
        while ink.textlength(text, font) > room and len(text) > 1:
            text = text[:-2] + "…"
        ink.text((x, y), text, font=font, **{"fill": "black", **options})

    def show(x: int, y: int, picture: Image.Image) -> None:
        ratio = side / max(picture.size)
        size = (max(1, round(picture.width * ratio)), max(1, round(picture.height * ratio)))
        how = Image.Resampling.NEAREST if max(picture.size) <= SMALL else Image.Resampling.LANCZOS
        page.paste(picture.convert("RGB").resize(size, how), (x, y))
        ink.rectangle((x - 1, y - 1, x + size[0], y + size[1]), outline="#ddd")

    for depth, axis in enumerate(spec.axes):
        write(gap, gap + depth * line, axis, room=margin - 2 * gap, fill="#666")
    write(margin, gap, "source", room=side)
    for k, cell in enumerate(spec.cells):
        x = margin + (k + 1) * (side + gap)
        for depth, axis in enumerate(spec.axes):
            if axis in cell.values:
                write(x, gap + depth * line, _text(cell.values[axis]), room=side)
        if k == 0:
            write(x, gap + (heads - 1) * line, "unablated", room=side, fill="#0b62a8")
    for row, (i, j) in enumerate(lines):
        case, y = spec.cases[i], top + row * (side + line + gap)
        write(gap, y, f"{Path(case.name).name}, seed {spec.seeds[j]}", room=margin - 2 * gap)
        for at, text in enumerate(textwrap.wrap(case.prompt, 28)[:6]):
            write(gap, y + (at + 1) * line, text, room=margin - 2 * gap, font=small, fill="#666")
        show(margin, y, case.shown)
        for k in range(len(spec.cells)):
            x, record = margin + (k + 1) * (side + gap), sweep.records[i, j, k]
            if record["status"] == "failed":
                write(x, y, "failed", room=side, fill="#b3261e")
                continue
            show(x, y, open_picture(sweep.folder / record["file"]))
            text = _distance(record, k)
            if "success" in record["metrics"]:
                text += ", success" if record["metrics"]["success"] else ", fails"
            write(x, y + side, text, room=side, font=small, fill="#666")
    return page
