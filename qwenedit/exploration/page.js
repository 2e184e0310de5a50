"use strict";
// The page's data is described in page.py. `state` is all that can be chosen; `draw` shows it.
const data = JSON.parse(document.getElementById("data").textContent);
const runs = data.runs, $ = id => document.getElementById(id);
const BRANCHES = {cond: "with the prompt", uncond: "negative prompt"};
const NAMES = {latents: "latents", x0: "x₀, guided", cond: "x₀ with the prompt", uncond: "x₀, negative prompt"};
const state = {step: 0, branch: "cond", block: 0, head: "mean", direction: "to", same: false, bare: false,
               chosen: {kind: "target", row: .5, column: .5}};

function make(tag, attributes = {}, ...inside) {
  const space = /^(svg|g|path|line|rect|text|circle)$/.test(tag) ? "http://www.w3.org/2000/svg" : null;
  const node = space ? document.createElementNS(space, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...inside);
  return node;
}
const nearest = (numbers, wanted) =>
  numbers.reduce((best, x, k) => Math.abs(x - wanted) < Math.abs(numbers[best] - wanted) ? k : best, 0);
const percent = x => x >= .0995 ? `${(100 * x).toFixed(0)} %` : `${(100 * x).toPrecision(2)} %`;
const number = x => x === null || x === undefined ? "none" : Number(x.toPrecision(3)).toString();
const bytes = text => Uint8Array.from(atob(text), c => c.charCodeAt(0));

// Dark blue to green to yellow: lightness rises evenly.
const HEAT = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]];
function heat(x) {
  const place = Math.min(Math.max(x, 0), 1) * (HEAT.length - 1), k = Math.min(Math.floor(place), HEAT.length - 2);
  return HEAT[k].map((c, i) => Math.round(c + (HEAT[k + 1][i] - c) * (place - k)));
}

// What a run shows now. A second run shows the step whose sigma is nearest to the first's.
function now(run) {
  const sigma = runs[0].steps[state.step].sigma;
  const step = run === runs[0] ? state.step : nearest(run.steps.map(one => one.sigma), sigma);
  const shown = run.steps[step], {steps, blocks} = run.observed;
  const observed = nearest(steps, shown.index), block = nearest(blocks, state.block);
  const branch = run.maps[state.branch] ? state.branch : null;
  return {shown, observed, block, branch, words: branch ? run.words[branch] : []};
}

// A map as a function of row and column. The mean of heads is taken here if they are kept apart.
const decoded = new Map();
function mapOf(run) {
  const {observed, block, branch, words} = now(run);
  const stored = branch && run.maps[branch][observed][block];
  if (!stored) return null;
  if (!decoded.has(stored)) {
    if (decoded.size > 24) decoded.clear();
    decoded.set(stored, {codes: bytes(stored.codes), tops: new Float32Array(bytes(stored.tops).buffer)});
  }
  const {codes, tops} = decoded.get(stored), heads = run.observed.heads;
  const cells = run.pictures.map(one => one.cells[0] * one.cells[1]);
  const rows = cells[0] + words.length, columns = cells.reduce((a, b) => a + b) + words.length;
  const one = state.head === "mean" ? null : Math.min(Number(state.head), heads - 1);
  const at = (head, r, c) => tops[head * rows + r] * (codes[(head * rows + r) * columns + c] / 255) ** 2;
  const value = (r, c) => {
    if (one !== null) return at(one, r, c);
    let sum = 0;
    for (let head = 0; head < heads; head++) sum += at(head, r, c);
    return sum / heads;
  };
  const starts = [0];  // of each picture's columns
  for (let k = 1, next = cells[0] + words.length; k < cells.length; next += cells[k++]) starts.push(next);
  return {value, rows, columns, cells, starts, words};
}

// The chosen cell's number in a run; null where the run does not have it, as a word of another prompt.
function chosenIn(run, map) {
  const {kind, row, column, picture = 0, text, index} = state.chosen;
  if (kind === "word") {
    const same = map.words[index] && map.words[index].text === text ? index : map.words.findIndex(w => w.text === text);
    return same < 0 ? null : map.cells[0] + same;
  }
  if (!run.pictures[picture]) return null;
  const [r, c] = cellAt(run.pictures[picture], row, column);
  return map.starts[picture] + r * run.pictures[picture].cells[1] + c;
}
// A cell is `pool` patches a side; the last of a row or a column may be smaller.
const cellAt = ({cells, grid, pool}, row, column) =>
  [row, column].map((place, k) => Math.min(cells[k] - 1, Math.max(0, Math.floor(place * grid[k] / pool))));
const middleOf = ({grid, pool}, cell) =>
  cell.map((place, k) => (place * pool + Math.min((place + 1) * pool, grid[k])) / 2 / grid[k]);

// The numbers that are shown: for each picture, or null, and for the words.
function attentionOf(run) {
  const map = mapOf(run);
  const cell = map && chosenIn(run, map);
  if (map === null || cell === null) return null;
  const by = state.direction === "by";
  const of = (start, count) => Float32Array.from({length: count}, (_, k) => by ? map.value(start + k, cell) : map.value(cell, start + k));
  return {
    by, words: of(map.cells[0], map.words.length),
    pictures: map.cells.map((count, k) => by && k ? null : of(map.starts[k], count)),
  };
}

// ---- panels, made once
const panels = runs.map((run, k) => ({run, k}));
function panel(where, {k}) {
  const node = make("div", {class: k ? "run other" : "run"});
  if (runs.length > 1 && where !== "facts") node.append(make("h3", {}, k ? "second run" : "first run"));
  $(where).append(node);
  return node;
}
function figure(inside, caption = "") {
  const text = make("figcaption");
  text.textContent = caption;
  return [make("figure", {}, inside, text), text];
}
function picture(uri, alt) {
  const node = make("img", {src: uri, alt, loading: "eager"});
  node.addEventListener("load", () => node.classList.toggle("small", Math.max(node.naturalWidth, node.naturalHeight) <= 128));
  return node;
}

function makeFacts(at) {
  const {run, k} = at, list = make("dl", {class: "facts"}), before = new Map(runs[0].facts);
  for (const [name, text] of run.facts) {
    if (name === "prompt" && runs.length === 1) continue;  // it is the title
    const changed = k && before.get(name) !== text;
    list.append(make("div", changed ? {class: "changed"} : {}, make("dt", {}, name), make("dd", {}, text.trim() ? text : `"${text}"`)));
  }
  const node = panel("facts", at);
  if (runs.length > 1) node.append(make("h3", {}, k ? "second run: what differs is bold" : "first run"));
  node.append(list);
}

function makeSteps(at) {
  const node = panel("steps", at), grid = make("div", {class: "pictures"});
  at.pictures = {};
  for (const name of Object.keys(NAMES)) {
    if (!at.run.steps.some(step => step.pictures[name])) continue;
    const image = picture("data:,", NAMES[name]), [one] = figure(image, NAMES[name]);
    grid.append(one);
    at.pictures[name] = image;
  }
  const [result] = figure(picture(at.run.result, "the result"), "the result");
  grid.append(result);
  node.append(grid);
}

function makeAttention(at) {
  const node = panel("attention", at), maps = make("div", {class: "maps"});
  at.canvases = at.run.pictures.map((one, k) => {
    const name = k ? `reference ${at.run.pictures.length > 2 ? k : ""}`.trim() : "target";
    const canvas = make("canvas", {tabindex: 0, role: "application", "data-picture": k,
      "aria-label": `patches of the ${name}${at.k ? ", second run" : ""}; arrow keys choose one`});
    const [shown, caption] = figure(canvas);
    const image = new Image();
    image.addEventListener("load", () => drawAttention(at));
    image.src = one.picture;
    canvas.addEventListener("click", event => {
      const box = canvas.getBoundingClientRect();
      choosePatch(k, (event.clientY - box.top) / box.height, (event.clientX - box.left) / box.width);
    });
    canvas.addEventListener("keydown", event => {
      const move = {ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1]}[event.key];
      if (!move) return;
      event.preventDefault();
      event.stopPropagation();
      const own = state.chosen.kind !== "word" && (state.chosen.picture || 0) === k;
      const before = own ? cellAt(one, state.chosen.row, state.chosen.column) : [-move[0], -move[1]];
      const cell = before.map((place, axis) => Math.min(Math.max(place + move[axis], 0), one.cells[axis] - 1));
      choosePatch(k, ...middleOf(one, cell));
    });
    maps.append(shown);
    return {canvas, caption, image, name};
  });
  at.words = make("div", {class: "words", role: "group", "aria-label": `words of the prompt${at.k ? ", second run" : ""}`});
  at.readout = make("p", {class: "readout"});
  node.append(maps, at.words, at.readout);
}

function choosePatch(picture, row, column) {
  state.chosen = {kind: picture ? "reference" : "target", picture, row, column};
  if (picture) state.direction = $("direction").value = "by";  // what references look at is not kept
  draw();
}

function shownWord(text) {
  if (/^<\|.*\|>$/.test(text)) return [text.slice(2, -2), true];
  const visible = text.replaceAll("\n", "⏎").replaceAll("\t", "⇥");
  return [visible.trim() ? visible : visible.replaceAll(" ", "␣") || "∅", !text.trim()];
}

function makeWords(at, words) {
  if (at.wordsOf === words) return;
  at.wordsOf = words;
  at.buttons = words.map((word, index) => {
    const [text, mark] = word.picture ? [`${word.text} as the text encoder sees it`, true] : shownWord(word.text);
    const button = make("button", {type: "button", class: mark ? "mark" : "", "aria-pressed": false}, text);
    button.addEventListener("click", () => {
      state.chosen = {kind: "word", text: word.text, index};
      draw();
    });
    return button;
  });
  at.words.replaceChildren(...at.buttons);
}

function makeWrites(at) {
  const node = panel("writes", at), charts = make("div", {class: "charts"});
  at.charts = ["img", "txt"].map(stream => {
    const svg = make("svg", {viewBox: "0 0 400 190", role: "img"});
    svg.addEventListener("click", event => {
      const box = svg.getBoundingClientRect(), blocks = blockCount(at.run);
      const x = (event.clientX - box.left) / box.width * 400;
      setBlock(Math.round((x - 40) / 350 * (blocks - 1 || 1)));
    });
    charts.append(svg);
    return {svg, stream};
  });
  at.sizes = make("p", {class: "readout"});
  node.append(charts, at.sizes);
}
const blockCount = run => Math.max(1, ...Object.values(run.writes).flat().map(one => one.length));

function makeRatio(at) {
  if (!at.run.steps.some(step => step.ratio)) {
    panel("ratio", at).append(make("p", {class: "soft"}, "This run is unguided."));
    return;
  }
  const canvas = make("canvas", {class: "still", role: "img"}), [shown, caption] = figure(canvas);
  shown.className = "single";
  panel("ratio", at).append(shown);
  Object.assign(at, {ratio: canvas, ratioCaption: caption});
}

function list(numbers, all) {
  return numbers.length === all ? `all ${all}` : `${numbers.length} of ${all} (${numbers.join(", ")})`;
}
function makeKept(at) {
  const {run} = at, {steps, blocks, heads, of_heads} = run.observed, target = run.pictures[0];
  const rows = {
    "pictures": `of ${list(run.steps.map(one => one.index), run.predictions)} steps, decoded at full size`,
    "attention: steps": list(steps, run.predictions), "attention: blocks": list(blocks, blockCount(run)),
    "attention: heads": heads === of_heads ? `all ${heads}` : `the mean of ${of_heads}`,
    "attention: cells": target.pool === 1 ? "single patches" :
      `${target.pool} × ${target.pool} patches: the mean over the patches that look, the sum over those that are looked at`,
    "attention: words": Object.entries(run.words).map(([branch, words]) =>
      `${BRANCHES[branch]}: ${words.length} cells for ${words[words.length - 1].stop} tokens`).join("; "),
    "attention: not kept": run.pictures.length > 1 ? "where patches of references look" : "",
    "sizes of writes": `of ${list(steps, run.predictions)} steps, all blocks`,
  };
  const facts = make("dl", {class: "facts keys"});
  for (const [name, text] of Object.entries(rows)) if (text) facts.append(make("div", {}, make("dt", {}, name), make("dd", {}, text)));
  panel("kept", at).append(facts);
}

// ---- drawing
function drawSteps(at) {
  const {shown} = now(at.run);
  for (const [name, image] of Object.entries(at.pictures)) {
    const uri = shown.pictures[name];
    image.style.visibility = uri ? "" : "hidden";
    if (uri && image.getAttribute("src") !== uri) image.src = uri;
    image.alt = `${NAMES[name]}, step ${shown.index}`;
  }
}

const sum = numbers => numbers.reduce((a, b) => a + b, 0);
const largest = numbers => numbers.reduce((a, b) => Math.max(a, b), 0);

function drawAttention(at) {
  const {run} = at, {shown, observed, branch, words} = now(run), found = attentionOf(run);
  makeWords(at, words);
  const whole = found && largest(found.pictures.map(one => one ? largest(one) : 0));
  at.canvases.forEach((one, k) => {
    const values = found && found.pictures[k], most = values && (state.same ? whole : largest(values));
    drawCells(one.canvas, one.image, run.pictures[k], values, most, chosenCell(run, k));
    const name = make("b", {}, one.name);
    const text = !values ? (found && found.by && k ? ": not kept" : "") :
      found.by ? `: up to ${percent(most)} of a patch's attention` : `: ${percent(sum(values))} in all, up to ${percent(largest(values))}`;
    one.caption.replaceChildren(name, text);
  });
  const most = found ? largest(found.words) : 0;
  at.buttons.forEach((button, k) => {
    const own = state.chosen.kind === "word" && mapOf(run) && chosenIn(run, mapOf(run)) === mapOf(run).cells[0] + k;
    const value = found ? found.words[k] : null;
    button.setAttribute("aria-pressed", own);
    button.style.setProperty("--heat", value && most ? value / most : 0);
    button.title = value === null ? "" : percent(value);
    button.setAttribute("aria-label", `${button.textContent}${value === null ? "" : `, ${percent(value)}`}`);
  });
  at.readout.textContent = readout(at, found, shown, observed, branch);
  if (!at.k) $("said").textContent = at.readout.textContent;
}

function chosenCell(run, k) {
  const {kind, picture = 0, row, column} = state.chosen;
  return kind !== "word" && picture === k ? cellAt(run.pictures[k], row, column) : null;
}

function readout(at, found, shown, observed, branch) {
  const {run} = at, step = run.observed.steps[observed], block = run.observed.blocks[now(run).block];
  if (!branch) return "This run has no prediction of this branch.";
  const where = `block ${block}, ${state.head === "mean" || run.observed.heads === 1 ? "mean of the heads" : `head ${state.head}`}` +
    (step === shown.index ? "" : `, step ${step}, the nearest that is kept`);
  if (!found) {
    return mapOf(run) ? `This run has no ${state.chosen.kind === "word" ? `word “${state.chosen.text}”` : "such picture"}.`
      : `There is no map of this branch in this step (${where}).`;
  }
  const {kind, picture = 0, text} = state.chosen, cell = kind === "word" ? null : chosenCell(run, picture);
  const name = kind === "word" ? `“${text.trim() || text}”` :
    `the ${at.canvases[picture].name}'s cell in row ${cell[0]}, column ${cell[1]}`;
  const order = [...found.words.keys()].sort((a, b) => found.words[b] - found.words[a]).slice(0, 4);
  const words = order.map(k => `${at.buttons[k].textContent.trim()} ${percent(found.words[k])}`).join(", ");
  if (found.by) return `Who looks at ${name} (${where}). Words, most first: ${words}.`;
  const shares = at.canvases.map((one, k) => `${percent(sum(found.pictures[k]))} to the ${one.name}`);
  return `Where ${name} looks (${where}): ${shares.join(", ")}, ${percent(sum(found.words))} to the words, most to ${words}.`;
}

function drawCells(canvas, image, {cells, grid, pool}, values, most, chosen, bare = state.bare || !image.naturalWidth) {
  const [rows, columns] = cells;
  const ratio = image.naturalHeight ? image.naturalHeight / image.naturalWidth : grid[0] / grid[1];
  const width = 512, height = Math.round(width * ratio), context = canvas.getContext("2d");
  canvas.width = width;
  canvas.height = height;
  if (bare) context.fillStyle = "#808080", context.fillRect(0, 0, width, height);
  else {
    context.imageSmoothingEnabled = Math.max(image.naturalWidth, image.naturalHeight) > 128;
    context.drawImage(image, 0, 0, width, height);
  }
  const edge = (k, axis, size) => Math.round(Math.min(k * pool, grid[axis]) * size / grid[axis]);
  const box = (r, c) => [edge(c, 1, width), edge(r, 0, height), edge(c + 1, 1, width) - edge(c, 1, width),
                         edge(r + 1, 0, height) - edge(r, 0, height)];
  if (values) {
    for (let r = 0; r < rows; r++) for (let c = 0; c < columns; c++) {
      const share = most ? values[r * columns + c] / most : 0;
      context.fillStyle = `rgb(${heat(share).join(" ")} / ${bare ? 1 : .2 + .65 * share})`;
      context.fillRect(...box(r, c));
    }
  }
  if (chosen) {
    const [x, y, w, h] = box(...chosen);
    for (const [colour, thick] of [["#000", 7], ["#fff", 3]]) {
      context.strokeStyle = colour;
      context.lineWidth = thick;
      context.strokeRect(x + 2, y + 2, w - 4, h - 4);
    }
  }
}

// The least and the most of all sizes of a stream, so that steps and runs can be compared.
function rangeOf(stream) {
  const place = stream === "img" ? [0, 1] : [2, 3];
  const all = runs.flatMap(run => Object.values(run.writes).flat(2)).filter(Boolean)
    .flatMap(sizes => place.map(k => sizes[k])).filter(x => x > 0);
  return all.length ? [Math.log10(Math.min(...all)), Math.log10(Math.max(...all))] : [0, 1];
}
const ranges = {};

// Round numbers from 10^low to 10^high, not more than fit.
function ticks(low, high) {
  for (const steps of [[1, 2, 5], [1, 3], [1]]) {
    const found = [];
    for (let power = Math.floor(low); power <= high; power++)
      for (const step of steps) if (Math.log10(step) + power >= low && Math.log10(step) + power <= high) found.push(step * 10 ** power);
    if (found.length <= 7 || steps.length === 1) return found;
  }
}

function drawWrites(at) {
  const {run} = at, {observed, branch} = now(run), sizes = branch ? run.writes[branch][observed] : [];
  const blocks = blockCount(run), chosen = Math.min(state.block, blocks - 1);
  for (const {svg, stream} of at.charts) {
    const [low, high] = ranges[stream] ||= rangeOf(stream), span = Math.max(high - low, .1);
    const x = block => 40 + 350 * (blocks > 1 ? block / (blocks - 1) : .5);
    const y = size => 160 - 130 * (Math.log10(size) - low) / span;
    const title = stream === "img" ? "image stream" : "text stream";
    svg.setAttribute("aria-label", `${title}: sizes by block; block ${chosen} is chosen`);
    svg.replaceChildren(make("rect", {class: "now", x: x(chosen) - 5, y: 24, width: 10, height: 142}));
    for (const size of ticks(low, low + span)) {
      svg.append(make("line", {class: "grid", x1: 40, x2: 390, y1: y(size), y2: y(size)}),
                 make("text", {x: 34, y: y(size) + 3, "text-anchor": "end"}, number(size)));
    }
    ["attn", "mlp"].forEach((what, k) => {
      const place = (stream === "txt" ? 2 : 0) + k;
      const points = sizes.map((one, block) => [block, one && one[place]]).filter(([, size]) => size > 0);
      const line = points.map(([block, size], n) => `${n ? "L" : "M"}${x(block).toFixed(1)} ${y(size).toFixed(1)}`).join("");
      svg.append(make("path", {class: `line ${what}`, d: line}));
      for (const [block, size] of points) if (blocks <= 16 || block === chosen)
        svg.append(make("circle", {class: `dot-${what}`, cx: x(block), cy: y(size), r: block === chosen ? 4 : 2.2}));
      svg.append(make("line", {class: `line ${what}`, x1: 240 + 80 * k, x2: 262 + 80 * k, y1: 10, y2: 10}),
                 make("text", {x: 267 + 80 * k, y: 14}, k ? "MLP" : "attention"));
    });
    svg.append(make("text", {class: "name", x: 40, y: 14}, title));
    const every = Math.ceil(blocks / 12);
    for (let block = 0; block < blocks; block += every) svg.append(make("text", {x: x(block), y: 180, "text-anchor": "middle"}, `${block}`));
  }
  const own = sizes[chosen];
  at.sizes.textContent = !own ? "No sizes of this branch in this step." :
    `Step ${run.observed.steps[observed]}, block ${chosen}: image stream ${number(own[0])} by attention, ${number(own[1])} by the MLP; ` +
    `text stream ${number(own[2])} and ${number(own[3])}.`;
}

function drawRatio(at) {
  if (!at.ratio) return;
  const {shown} = now(at.run), ratio = shown.ratio, all = runs.flatMap(run => run.steps).map(step => step.ratio).filter(Boolean);
  const low = Math.min(...all.map(one => one.low)), high = Math.max(...all.map(one => one.high));
  if (!ratio) {
    at.ratioCaption.textContent = "No guidance in this step.";
    drawCells(at.ratio, new Image(), {cells: [1, 1], grid: at.run.grid, pool: 1}, null, 1, null);
    return;
  }
  const values = Array.from(bytes(ratio.codes), code => ratio.low + (ratio.high - ratio.low) * code / 255);
  const shares = values.map(x => high > low ? (x - low) / (high - low) : 1);
  const chosen = state.chosen.kind === "target" ? cellAt(ratio, state.chosen.row, state.chosen.column) : null;
  drawCells(at.ratio, new Image(), ratio, shares, 1, chosen);
  const mean = sum(values) / values.length;
  let text = `${number(ratio.low)} to ${number(ratio.high)}, mean ${number(mean)}`;
  if (chosen) text += `; at the chosen patch ${number(values[chosen[0] * ratio.cells[1] + chosen[1]])}`;
  at.ratio.setAttribute("aria-label", `norm ratios: ${text}`);
  const bar = make("span", {class: "scale"});
  bar.style.background = $("heat").style.background;
  at.ratioCaption.replaceChildren(text, bar, `colours: ${number(low)} to ${number(high)}, over all steps`);
}

function draw() {
  const {shown} = now(runs[0]);
  $("step").value = state.step;
  const said = `${shown.index} of 0 to ${runs[0].predictions - 1}, σ ${shown.sigma.toFixed(3)}`;
  $("sigma").textContent = said;
  $("step").setAttribute("aria-valuetext", `step ${said}`);
  $("branch").value = state.branch;
  $("block").value = runs[0].observed.blocks[nearest(runs[0].observed.blocks, state.block)];
  $("head").value = state.head;
  for (const at of panels) {
    drawSteps(at);
    drawAttention(at);
    drawWrites(at);
    drawRatio(at);
  }
}

function setBlock(block) {
  state.block = Math.min(Math.max(block, 0), blockCount(runs[0]) - 1);
  draw();
}

// ---- controls
function options(select, values) {
  select.replaceChildren(...values.map(([value, text]) => make("option", {value}, text)));
  select.disabled = values.length < 2;
}
const {blocks, heads, of_heads} = runs[0].observed;
$("prompt").textContent = new Map(runs[0].facts).get("prompt");
$("prompt").classList.toggle("long", $("prompt").textContent.length > 150);
$("heat").style.background = `linear-gradient(to right, ${HEAT.map(c => `rgb(${c})`).join(", ")})`;
$("step").max = runs[0].steps.length - 1;
options($("branch"), Object.keys(BRANCHES).filter(name => runs.some(run => run.maps[name])).map(name => [name, BRANCHES[name]]));
options($("block"), blocks.map(block => [block, `${block}`]));
options($("head"), [["mean", `mean of ${of_heads}`], ...Array.from({length: heads > 1 ? heads : 0}, (_, k) => [k, `${k}`])]);
state.block = blocks[Math.floor(blocks.length / 2)];
state.step = Math.floor((runs[0].steps.length - 1) / 2);
document.body.classList.toggle("two", runs.length > 1);
document.body.style.setProperty("--columns", Math.min(3, Math.max(...runs.map(run => run.pictures.length))));
if (!runs.some(run => run.steps.some(step => step.ratio))) $("guidance").remove();
for (const at of panels) {
  makeFacts(at);
  makeSteps(at);
  makeAttention(at);
  makeWrites(at);
  if ($("guidance")) makeRatio(at);
  makeKept(at);
}

const chooses = {
  step: value => { state.step = Number(value); }, branch: value => { state.branch = value; },
  block: value => { state.block = Number(value); }, head: value => { state.head = value; },
  direction: value => {
    state.direction = value;
    if (value === "to" && state.chosen.kind === "reference") state.chosen = {kind: "target", row: .5, column: .5};
  },
};
for (const [id, choose] of Object.entries(chooses)) $(id).addEventListener("input", event => { choose(event.target.value); draw(); });
for (const id of ["same", "bare"]) $(id).addEventListener("input", event => { state[id] = event.target.checked; draw(); });

function theme(dark) {
  document.documentElement.dataset.theme = dark ? "dark" : "light";
  $("theme").setAttribute("aria-pressed", dark);
  $("theme").textContent = dark ? "light" : "dark";
  $("theme").setAttribute("aria-label", `show ${dark ? "light" : "dark"}`);
}
const system = matchMedia("(prefers-color-scheme: dark)");
theme(system.matches);
system.addEventListener("change", event => theme(event.matches));
const turn = () => theme(document.documentElement.dataset.theme !== "dark");
$("theme").addEventListener("click", turn);

function another(id, by) {
  const values = [...$(id).options].map(option => option.value), place = values.indexOf($(id).value);
  chooses[id](values[Math.min(Math.max(place + by, 0), values.length - 1)]);
  draw();
}
const cycle = id => another(id, $(id).selectedIndex === $(id).options.length - 1 ? -Infinity : 1);
const KEYS = {
  ArrowLeft: () => { state.step = Math.max(0, state.step - 1); draw(); },
  ArrowRight: () => { state.step = Math.min(runs[0].steps.length - 1, state.step + 1); draw(); },
  "[": () => another("block", -1), "]": () => another("block", 1), b: () => cycle("branch"), h: () => cycle("head"),
  d: () => { $("direction").value = state.direction === "to" ? "by" : "to"; chooses.direction($("direction").value); draw(); },
  t: turn,
};
document.addEventListener("keydown", event => {
  if (event.ctrlKey || event.metaKey || event.altKey || /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) return;
  if (!KEYS[event.key]) return;
  event.preventDefault();
  KEYS[event.key]();
});
draw();
