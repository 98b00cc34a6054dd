"""Holds the coverage page: its markup, style and script, which turn embedded JSON into a heat map and a table."""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>pa_ops instance coverage</title>
<style>
:root { color-scheme: light dark; --line: #d5d9e0; --text: #1d2330; --muted: #5b6475; --page: #fff; --head: #eef0f4;
  --panel: #f7f8fa; --bad: #a11; }
@media (prefers-color-scheme: dark) {
  :root { --line: #3a4150; --text: #e4e8f0; --muted: #a3acbd; --page: #14171d; --head: #262b36; --panel: #1b1f28;
    --bad: #ff8f8f; }
}
body { font: 15px/1.45 system-ui, sans-serif; color: var(--text); background: var(--page); margin: 0 auto;
  max-width: 1240px; padding: 24px; }
h1 { font-size: 24px; margin: 0 0 4px; }
h2 { font-size: 18px; margin: 28px 0 8px; }
p { margin: 4px 0 12px; color: var(--muted); }
form { display: flex; flex-wrap: wrap; gap: 12px 16px; padding: 12px; border: 1px solid var(--line);
  border-radius: 6px; background: var(--panel); }
label { display: flex; flex-direction: column; font-size: 12px; color: var(--muted); gap: 2px; }
select, input { font: inherit; font-size: 14px; padding: 3px 6px; border: 1px solid #8d95a5; border-radius: 4px;
  color: var(--text); background: var(--page); box-sizing: border-box; height: 30px; }
#legend { display: flex; flex-wrap: wrap; gap: 6px 16px; margin: 14px 0; font-size: 13px; }
#legend span { display: inline-flex; align-items: center; gap: 6px; }
#legend i { width: 14px; height: 14px; border-radius: 3px; border: 1px solid #8886; }
.scroll { overflow: auto; max-height: 80vh; width: fit-content; max-width: 100%; border: 1px solid var(--line);
  border-radius: 6px; }
table { border-collapse: separate; border-spacing: 0; font-size: 13px; }
th, td { padding: 4px 8px; border: 0 solid var(--line); border-width: 0 1px 1px 0; text-align: left;
  white-space: nowrap; }
thead th { background: var(--head); position: sticky; top: 0; z-index: 1; }
#rows thead th { cursor: pointer; }
#map th.s { text-align: center; padding: 4px; font-size: 11px; }
#map td.s { text-align: center; padding: 2px 4px; }
#map b { display: inline-block; width: 18px; height: 17px; line-height: 17px; margin: 0 1px; border-radius: 3px;
  font-size: 11px; font-weight: 600; vertical-align: middle; box-sizing: border-box; }
#map b.declared { border: 1px solid #8d95a566; }
#map b:not(.none) { cursor: pointer; }
#detail { position: sticky; bottom: 0; max-height: 40vh; overflow: auto; margin: 0; padding: 8px 12px;
  font-size: 12px; white-space: pre-wrap; overflow-wrap: anywhere;
  background: var(--panel); border: 1px solid var(--line); border-radius: 6px; z-index: 2; }
#detail:empty { display: none; }
td.n { text-align: right; font-variant-numeric: tabular-nums; }
#rows td:first-child { font-family: ui-monospace, monospace; font-size: 12px; }
.pill { padding: 1px 6px; border-radius: 3px; }
.refused { background: #c6cad2; color: #3c4350; } .declared { background: transparent; color: var(--muted); }
.generated { background: #dbeafe; color: #163a70; } .compiled { background: #9cc4f5; color: #0c2b57; }
.stale { background: #fbd38d; color: #5c3506; } .tested { background: #8fd6a4; color: #0d3b1c; }
.benchmarked { background: #2f8f52; color: #fff; } .bad { color: var(--bad); }
@media (max-width: 600px) { body { padding: 12px; } h1 { font-size: 20px; } }
</style>
</head>
<body>
<h1>pa_ops instance coverage</h1>
<p id="counts"></p>
<form id="filters"></form>
<div id="legend"></div>
<h2>Kernels by target</h2>
<p id="boxes"></p>
<div class="scroll"><table id="map"></table></div>
<pre id="detail"></pre>
<section id="problems"></section>
<h2>Instances</h2>
<p><span id="shown"></span> <button id="more" type="button">show all</button></p>
<div class="scroll"><table id="rows"></table></div>
<script type="application/json" id="data">/*DATA*/</script>
<script>
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const cells = data.cells.map(cell => ({...data.defaults, ...cell}));
const byId = id => document.getElementById(id);
const make = (tag, text, name) => {
  const node = document.createElement(tag);
  if (text !== undefined) node.textContent = text;
  if (name) node.className = name;
  return node;
};
const number = target => parseInt(target.match(/[0-9]+/), 10);
const distinct = (list, key) => [...new Set(list.map(c => c[key]))].sort((a, b) =>
  key === "target" ? number(a) - number(b) : typeof a === "number" ? a - b : a < b ? -1 : 1);
const AXES = ["target", "state", "fit", "why", "reach", "family", "dtype", "kv_dtype", "head_dim", "head_dim_v",
  "layout", "mask"];
const TITLES = {fit: "evidence of", why: "why not", head_dim: "head size", head_dim_v: "of V",
  ran: "run by", asked: "presets", spill_bytes: "spill B", smem_bytes: "shared B", object_bytes: "object B",
  compile_seconds: "compile s", ratio: "best peer / ours"};
const titleOf = key => TITLES[key] || key.replace("_", " ");
const THERE = "all but refused", MOST_ROWS = 400;
for (const c of cells) {
  const best = c.times.filter(t => t.ratio !== null).sort((a, b) => b.ratio - a.ratio)[0];
  c.us = c.times.length ? c.times[0].microseconds : 0;
  c.ratio = best ? best.ratio : 0;
  c.asked = c.requested.join(" ");
  c.ran = c.used.join(" ");
}
const chosen = {state: THERE};
for (const axis of AXES) {
  const label = make("label", titleOf(axis));
  const select = make("select");
  select.append(new Option("all", ""));
  if (axis === "state") select.append(new Option(THERE, THERE, true, true));
  const values = axis === "state" ? data.states.map(s => s[0]) : distinct(cells, axis);
  for (const value of values.filter(v => v !== "")) select.append(new Option(value === 0 ? "any" : value, value));
  select.onchange = () => { chosen[axis] = select.value; draw(); };
  label.append(select);
  byId("filters").append(label);
}
const words = make("label", "name contains");
const input = make("input");
input.oninput = () => { chosen.text = input.value; draw(); };
words.append(input);
byId("filters").append(words);
byId("filters").onsubmit = event => event.preventDefault();
for (const [state, meaning] of data.states) {
  const item = make("span");
  item.append(make("i", "", state), `${state}: ${meaning}`);
  byId("legend").append(item);
}
const count = state => cells.filter(c => c.state === state).length;
byId("counts").textContent = `${cells.length} cells: ` +
  data.states.map(s => s[0]).filter(count).map(s => `${count(s)} ${s}`).join(", ") +
  `. ${data.holes.length} undeclared holes, ${data.unreachable.length} unreachable kernels.`;
const errorOf = c => c.worst_error === null ? "" : c.worst_error.toExponential(1);
const known = c => [c.name, c.target, c.state + (c.reason ? ": " + c.reason : ""),
  c.registers ? `${c.registers} registers, ${c.spill_bytes} B spilled, ${c.smem_bytes} B shared` : "",
  c.tests ? `${c.tests} comparisons, worst error ${errorOf(c)}, on ${c.card}, commit ${c.commit}: ${c.fit}` : "",
  c.worst_test ? `worst in ${c.worst_test}` : "", ...c.by,
  ...c.times.map(t => `${t.case}: ${t.microseconds.toFixed(1)} us, ${t.tflops.toFixed(0)} TFLOP/s` +
    (t.ratio === null ? "" : `, best peer takes ${t.ratio.toFixed(2)} times as long`)),
  c.stale_times ? `${c.stale_times} times of other code` : "",
  c.asked ? `presets: ${c.asked}` : "", c.ran ? `run by ${c.ran}` : ""].filter(Boolean).join("\\n");
// Of the tiles that a family has for several targets, each target refuses all but one.
const shownOf = twins => twins.find(c => c.state !== "refused") || twins[0];
function drawMap(list) {
  const same = list.filter(c => c.dtype === c.kv_dtype);
  const targets = distinct(same, "target"), dtypes = distinct(same, "dtype");
  const rows = new Map();
  for (const c of same) {
    const key = JSON.stringify([c.family, c.head_dim, c.head_dim_v, c.layout, c.mask]);
    if (!rows.has(key)) rows.set(key, []);
    rows.get(key).push(c);
  }
  byId("boxes").textContent = `A column is a target; its boxes are ${dtypes.join(", ")}. \\u2713 a GPU test compared ` +
    "it, ! that was other code. Point at one, or click, for all that is known. No box: refused, or filtered out.";
  byId("detail").textContent = "";
  const table = byId("map");
  table.replaceChildren();
  const head = table.createTHead().insertRow();
  for (const title of ["family", "head size", "layout", "mask"]) head.append(make("th", title));
  for (const target of targets) head.append(make("th", target.replace("compute_", "PTX ").replace("sm_", ""), "s"));
  const body = table.createTBody();
  const byAxes = ([a], [b]) => {
    const [x, y] = [JSON.parse(a), JSON.parse(b)];
    const at = x.findIndex((value, i) => value !== y[i]);
    return at < 0 ? 0 : x[at] < y[at] ? -1 : 1;
  };
  for (const [key, members] of [...rows].sort(byAxes)) {
    const line = body.insertRow();
    const [family, headDim, headDimV, layout, mask] = JSON.parse(key);
    const headSize = headDim === headDimV ? headDim || "any" : `${headDim}/${headDimV}`;
    for (const value of [family, headSize, layout, mask]) line.append(make("td", value));
    for (const target of targets) {
      const box = make("td", undefined, "s");
      for (const dtype of dtypes) {
        const c = shownOf(members.filter(c => c.target === target && c.dtype === dtype));
        const mark = make("b", c && c.tests ? (c.fit === "stale" ? "!" : "\\u2713") : "", c ? c.state : "none");
        if (c) {
          mark.title = known(c);
          mark.onclick = () => { byId("detail").textContent = known(c); };
        }
        box.append(mark);
      }
      line.append(box);
    }
  }
}
const COLUMNS = [["name", "name"], ["target", ""], ["state", ""], ["registers", "n"], ["spill_bytes", "n"],
  ["smem_bytes", "n"], ["object_bytes", "n"], ["compile_seconds", "n"], ["tests", "n"], ["worst_error", "n"],
  ["fit", ""], ["us", "n"], ["ratio", "n"], ["reach", ""], ["ran", ""], ["asked", ""], ["why", ""], ["reason", ""]];
let order = ["name", 1], most = MOST_ROWS;
function drawRows(list) {
  const [key, way] = order;
  const rows = [...list].sort((a, b) => way * (a[key] === b[key] ? 0 : a[key] > b[key] ? 1 : -1));
  const table = byId("rows");
  table.replaceChildren();
  const head = table.createTHead().insertRow();
  for (const [column] of COLUMNS) {
    const title = make("th", titleOf(column) + (column === key ? (way > 0 ? " \\u2191" : " \\u2193") : ""));
    title.onclick = () => { order = [column, column === key ? -way : 1]; drawRows(list); };
    head.append(title);
  }
  const body = table.createTBody();
  for (const c of rows.slice(0, most)) {
    const line = body.insertRow();
    for (const [column, kind] of COLUMNS) {
      const box = make("td", undefined, kind);
      if (column === "state") box.append(make("span", c.state, "pill " + c.state));
      else if (column === "worst_error") box.textContent = errorOf(c);
      else if (column === "ratio") box.textContent = c.ratio ? c.ratio.toFixed(2) : "";
      else box.textContent = c[column] === null || c[column] === 0 ? "" : c[column];
      line.append(box);
    }
  }
  const shown = Math.min(most, rows.length);
  byId("shown").textContent = `${shown} of ${rows.length} chosen, ${cells.length} in all; a column's head sorts by it.`;
  byId("more").hidden = shown === rows.length;
  byId("more").onclick = () => { most = Infinity; drawRows(list); };
}
function drawProblems() {
  const place = byId("problems");
  const add = (title, lines) => {
    if (!lines.length) return;
    place.append(make("h2", title, "bad"));
    const list = make("ul");
    for (const line of lines) list.append(make("li", line));
    place.append(list);
  };
  add("Undeclared holes", data.holes.map(h => `sm ${h.sm}: ${h.problem}`));
  add("Unreachable kernels", data.unreachable.map(u => `${u.name} (${u.target})`));
}
const fits = (c, axis) => !chosen[axis] || String(c[axis]) === chosen[axis] ||
  (chosen[axis] === THERE && c.state !== "refused");
function draw() {
  most = MOST_ROWS;
  const list = cells.filter(c => AXES.every(axis => fits(c, axis)) &&
    (!chosen.text || c.name.includes(chosen.text)));
  drawMap(list);
  drawRows(list);
}
drawProblems();
draw();
</script>
</body>
</html>
"""
