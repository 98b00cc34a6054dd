"""Holds the coverage page: its markup, style and script, which turn embedded JSON into a heat map and a table."""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>pa_ops instance coverage</title>
<style>
:root { color-scheme: light; --line: #d5d9e0; --text: #1d2330; --muted: #5b6475; }
body { font: 15px/1.45 system-ui, sans-serif; color: var(--text); margin: 0 auto; max-width: 1240px; padding: 24px; }
h1 { font-size: 24px; margin: 0 0 4px; }
h2 { font-size: 18px; margin: 28px 0 8px; }
p { margin: 4px 0 12px; color: var(--muted); }
form { display: flex; flex-wrap: wrap; gap: 12px 16px; padding: 12px; border: 1px solid var(--line);
  border-radius: 6px; background: #f7f8fa; }
label { display: flex; flex-direction: column; font-size: 12px; color: var(--muted); gap: 2px; }
select, input { font: inherit; font-size: 14px; padding: 3px 6px; border: 1px solid #b4bac6; border-radius: 4px;
  color: var(--text); background: #fff; }
#legend { display: flex; flex-wrap: wrap; gap: 6px 16px; margin: 14px 0; font-size: 13px; }
#legend span { display: inline-flex; align-items: center; gap: 6px; }
#legend i { width: 14px; height: 14px; border-radius: 3px; border: 1px solid #0002; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; }
th, td { padding: 4px 8px; border: 1px solid var(--line); text-align: left; white-space: nowrap; }
thead th { background: #eef0f4; position: sticky; top: 0; }
#rows thead th { cursor: pointer; }
#map td.s { text-align: center; padding: 3px; }
#map td.s b { display: inline-block; min-width: 38px; margin: 0 1px; padding: 1px 4px; border-radius: 3px;
  font-size: 11px; font-weight: 500; }
td.n { text-align: right; font-variant-numeric: tabular-nums; }
td.name { font-family: ui-monospace, monospace; font-size: 12px; }
.pill { padding: 1px 6px; border-radius: 3px; }
.refused { background: #e6e8ec; color: #4a5262; } .declared { background: #fff; color: #4a5262; }
.generated { background: #dbeafe; color: #163a70; } .compiled { background: #9cc4f5; color: #0c2b57; }
.stale { background: #fbd38d; color: #5c3506; } .tested { background: #8fd6a4; color: #0d3b1c; }
.benchmarked { background: #2f8f52; color: #fff; } .bad { color: #a11; }
</style>
</head>
<body>
<h1>pa_ops instance coverage</h1>
<p id="counts"></p>
<form id="filters"></form>
<div id="legend"></div>
<h2>Kernels by target</h2>
<p>A box for each dtype: &#10003; a GPU test compared it, ! that was other code. Point at one for all that is known.</p>
<div class="scroll"><table id="map"></table></div>
<section id="problems"></section>
<h2>Instances</h2>
<p id="shown"></p>
<div class="scroll"><table id="rows"></table></div>
<script type="application/json" id="data">/*DATA*/</script>
<script>
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const cells = data.cells;
const byId = id => document.getElementById(id);
const make = (tag, text, name) => {
  const node = document.createElement(tag);
  if (text !== undefined) node.textContent = text;
  if (name) node.className = name;
  return node;
};
const number = target => parseInt(target.slice(3), 10);
const distinct = (list, key) => [...new Set(list.map(c => c[key]))].sort((a, b) =>
  key === "target" ? number(a) - number(b) : typeof a === "number" ? a - b : a < b ? -1 : 1);
const AXES = ["target", "state", "fit", "why", "reach", "family", "dtype", "kv_dtype", "head_dim", "layout", "mask"];
const TITLES = {fit: "evidence of", why: "why not"};
for (const c of cells) {
  const best = c.times.filter(t => t.ratio !== null).sort((a, b) => b.ratio - a.ratio)[0];
  c.us = c.times.length ? c.times[0].microseconds : 0;
  c.ratio = best ? best.ratio : 0;
  c.asked = c.requested.join(" ");
  c.ran = c.used.join(" ");
}
const chosen = {};
for (const axis of AXES) {
  const label = make("label", TITLES[axis] || axis.replace("_", " "));
  const select = make("select");
  select.append(new Option("all", ""));
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
  data.states.map(s => s[0]).map(s => `${count(s)} ${s}`).join(", ") +
  `. ${data.holes.length} undeclared holes, ${data.unreachable.length} unreachable kernels.`;
const known = c => [c.name, c.target, c.state + (c.reason ? ": " + c.reason : ""),
  c.registers ? `${c.registers} registers, ${c.spill_bytes} B spilled, ${c.smem_bytes} B shared` : "",
  c.tests ? `${c.tests} comparisons, worst error ${c.worst_error}, on ${c.card}, commit ${c.commit}: ${c.fit}` : "",
  c.worst_test ? `worst in ${c.worst_test}` : "", ...c.by,
  ...c.times.map(t => `${t.case}: ${t.microseconds.toFixed(1)} us, ${t.tflops.toFixed(0)} TFLOP/s` +
    (t.ratio === null ? "" : `, best peer takes ${t.ratio.toFixed(2)} times as long`)),
  c.stale_times ? `${c.stale_times} times of other code` : "",
  c.asked ? `presets: ${c.asked}` : "", c.ran ? `run by ${c.ran}` : ""].filter(Boolean).join("\\n");
function drawMap(list) {
  const targets = distinct(list, "target");
  const rows = new Map();
  for (const c of list.filter(c => c.dtype === c.kv_dtype)) {
    const key = JSON.stringify([c.family, c.head_dim, c.layout, c.mask]);
    if (!rows.has(key)) rows.set(key, []);
    rows.get(key).push(c);
  }
  const table = byId("map");
  table.replaceChildren();
  const head = table.createTHead().insertRow();
  for (const title of ["family", "head size", "layout", "mask", ...targets]) head.append(make("th", title));
  const body = table.createTBody();
  const byAxes = ([a], [b]) => {
    const [x, y] = [JSON.parse(a), JSON.parse(b)];
    const at = x.findIndex((value, i) => value !== y[i]);
    return at < 0 ? 0 : x[at] < y[at] ? -1 : 1;
  };
  for (const [key, members] of [...rows].sort(byAxes)) {
    const line = body.insertRow();
    const [family, headDim, layout, mask] = JSON.parse(key);
    for (const value of [family, headDim || "any", layout, mask]) line.append(make("td", value));
    for (const target of targets) {
      const box = make("td", undefined, "s");
      for (const c of members.filter(c => c.target === target)) {
        const mark = make("b", c.dtype + (c.tests ? (c.fit === "stale" ? " !" : " \\u2713") : ""), c.state);
        mark.title = known(c);
        box.append(mark);
      }
      line.append(box);
    }
  }
}
const COLUMNS = [["name", "name"], ["target", ""], ["state", ""], ["registers", "n"], ["spill_bytes", "n"],
  ["smem_bytes", "n"], ["object_bytes", "n"], ["compile_seconds", "n"], ["tests", "n"], ["worst_error", "n"],
  ["fit", ""], ["us", "n"], ["ratio", "n"], ["reach", ""], ["ran", ""], ["asked", ""], ["why", ""], ["reason", ""]];
let order = ["name", 1];
function drawRows(list) {
  const [key, way] = order;
  const rows = [...list].sort((a, b) => way * (a[key] === b[key] ? 0 : a[key] > b[key] ? 1 : -1));
  const table = byId("rows");
  table.replaceChildren();
  const head = table.createTHead().insertRow();
  for (const [column] of COLUMNS) {
    const title = make("th", column.replace("_", " ") + (column === key ? (way > 0 ? " \\u2191" : " \\u2193") : ""));
    title.onclick = () => { order = [column, column === key ? -way : 1]; drawRows(list); };
    head.append(title);
  }
  const body = table.createTBody();
  for (const c of rows) {
    const line = body.insertRow();
    for (const [column, kind] of COLUMNS) {
      const box = make("td", undefined, kind);
      if (column === "state") box.append(make("span", c.state, "pill " + c.state));
      else if (column === "ratio") box.textContent = c.ratio ? c.ratio.toFixed(2) : "";
      else box.textContent = c[column] === null || c[column] === 0 ? "" : c[column];
      line.append(box);
    }
  }
  byId("shown").textContent = `${rows.length} of ${cells.length} shown; a click on a column's head sorts by it.`;
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
function draw() {
  const list = cells.filter(c => AXES.every(a => !chosen[a] || String(c[a]) === chosen[a]) &&
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
