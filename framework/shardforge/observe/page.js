"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const runs = data.runs.map((run, i) => ({ ...run, color: `var(--run${i % 8})`, shown: true, drawn: {} }));
const view = { axis: "steps", span: 1, log: false, cursor: null };
const SVG = "http://www.w3.org/2000/svg";

// ---- elements: every string goes in as text, never as markup

function make(name, attributes = {}, ...children) {
  const inside = ["svg", "path", "line", "circle", "text", "g", "rect", "clipPath"].includes(name);
  const node = inside ? document.createElementNS(SVG, name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

function swatch(run) {
  return make("i", { class: "swatch", style: `background:${run.color}` });
}

function table(head, rows) {
  const cells = (row, kind) => make("tr", {}, ...row.map((cell, i) => make(i ? kind : "th", {}, ...[cell ?? ""].flat())));
  return make("table", {}, cells(head, "th"), ...rows.map((row) => cells(row, "td")));
}

// ---- numbers for people

function count(value) {
  if (value === 0) return "0";
  const names = ["", "K", "M", "G", "T", "P", "E"];
  const power = Math.max(0, Math.min(names.length - 1, Math.floor(Math.log10(Math.abs(value)) / 3 + 1e-9)));
  return Number((value / 1000 ** power).toPrecision(3)) + names[power];
}

function bytes(value) {
  const names = ["B", "KiB", "MiB", "GiB", "TiB"];
  const power = value > 0 ? Math.min(names.length - 1, Math.floor(Math.log2(value) / 10)) : 0;
  return `${Number((value / 1024 ** power).toPrecision(3))} ${names[power]}`;
}

function seconds(value) {
  if (value < 60) return `${Number(value.toPrecision(3))} s`;
  const pad = (part) => String(part).padStart(2, "0");
  const all = Math.round(value / 60);
  if (all < 60) return `${Math.floor(Math.round(value) / 60)}m${pad(Math.round(value) % 60)}s`;
  if (all < 1440) return `${Math.floor(all / 60)}h${pad(all % 60)}m`;
  return `${Math.floor(all / 1440)}d${pad(Math.floor((all % 1440) / 60))}h`;
}

const plain = (value) => String(Number(value.toPrecision(5)));
const small = (value) => (value === 0 ? "0" : value.toExponential(2).replace(".00", ""));
const percent = (value) => `${Number((100 * value).toPrecision(3))}%`;
const along = { steps: (x) => count(x), tokens: (x) => count(x), time: (x) => seconds(x) };
const exactly = { steps: (x) => `step ${x}`, tokens: (x) => `${count(x)} tokens`, time: (x) => seconds(x) };

// ---- charts

const known = (key) => runs.some((run) => (run.y[key] ?? []).some((value) => value !== null));
const terms = [...new Set(runs.flatMap((run) => Object.keys(run.y)))].filter((key) => key.startsWith("term: "));
const CHARTS = [
  { key: "loss", title: "Loss", unit: "nats per token; dots or dashes are held out", print: plain, wide: true },
  { key: "grad_norm", title: "Gradient norm", unit: "before clipping", print: plain },
  { key: "lr", title: "Learning rate", unit: "", print: small, exact: true, zero: true },
  { key: "tokens_per_s", title: "Speed", unit: "tokens per second, all ranks", print: count, zero: true },
  { key: "share", title: "Model FLOP/s", unit: "share of the devices' peak", print: percent, zero: true },
  { key: "flops_per_s", title: "Model FLOP/s", unit: "all ranks", print: count, zero: true },
  { key: "memory", title: "Memory", unit: "first rank", print: bytes, zero: true },
  { key: "data_share", title: "Data wait", unit: "share of the step", print: percent, zero: true },
  { key: "max_vio", title: "MaxVio", unit: "fullest expert over the even load, less 1; worst layer", print: plain, zero: true },
  { key: "dead", title: "Dead experts", unit: "without a token in the step, all layers", print: plain, zero: true },
  { key: "entropy_share", title: "Router entropy", unit: "of the largest; mean of layers", print: percent },
  { key: "drop_rate", title: "Dropped", unit: "share of the choices; mean of layers", print: percent, zero: true },
  { key: "bias_high", title: "Largest selection bias", unit: "of all layers", print: small },
  { key: "bias_low", title: "Least selection bias", unit: "of all layers", print: small },
  ...terms.map((key) => ({ key, title: key.slice(6), unit: "part of the objective", print: small })),
].filter((chart) => known(chart.key) && !(chart.key === "flops_per_s" && known("share")));

function decaying(values, span) {
  const keep = 1 - 1 / span;
  let total = 0, weight = 0;
  return values.map((value) => {
    if (value !== null) [total, weight] = [keep * total + value, keep * weight + 1];
    return [total, weight];
  });
}

const averaged = (run, chart) => !chart.exact && (view.span > 1 || chart.key in run.means);

// both sides count, or the mean of a falling loss would lie above it
function mean(run, chart) {
  const span = chart.exact ? 1 : view.span;
  const cached = run.drawn[chart.key];
  if (cached && cached.span === span) return cached.values;
  const raw = (!chart.exact && run.means[chart.key]) || run.y[chart.key];
  const before = decaying(raw, span), after = decaying(raw.toReversed(), span).toReversed();
  const both = (value, i) => (before[i][0] + after[i][0] - value) / (before[i][1] + after[i][1] - 1);
  const values = raw.map((value, i) => (value === null ? null : both(value, i)));
  run.drawn[chart.key] = { span, values };
  return values;
}

function ticks(low, high, wanted, log, unit = 1) {
  if (unit !== 1) return ticks(low / unit, high / unit, wanted, log).map((value) => value * unit);
  if (log) {
    const all = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++)
      for (const digit of high / low < 5 ? [1, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9] : [1, 2, 5]) all.push(digit * 10 ** power);
    return all.filter((value) => value >= low && value <= high);
  }
  const raw = (high - low) / wanted || 1;
  const base = 10 ** Math.floor(Math.log10(raw));
  const step = base * [1, 2, 5, 10].find((factor) => factor * base >= raw);
  const out = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) out.push(i * step);
  return out;
}

function range(chart, visible) {
  const drawn = visible.flatMap((run) => mean(run, chart).filter((value) => value !== null));
  const raw = visible.flatMap((run) => run.y[chart.key].filter((value) => value !== null)).sort((a, b) => a - b);
  const at = (share) => raw[Math.min(raw.length - 1, Math.floor(share * raw.length))];
  const extra = chart.key === "loss"
    ? visible.flatMap((run) => [...run.evals.map((point) => point.loss), run.entropy]).filter((value) => value !== null) : [];
  const values = [...drawn, ...extra, at(0.005), at(0.995)];  // single outliers do not set the scale
  let low = values.reduce((a, b) => Math.min(a, b)), high = values.reduce((a, b) => Math.max(a, b));
  if (chart.zero) low = Math.min(0, low);
  if (low === high) [low, high] = [low - (Math.abs(low) * 0.1 || 1), high + (Math.abs(high) * 0.1 || 1)];
  if (chart.key === "loss" && view.log && low > 0) return [low / 1.03, high * 1.03, true];
  const margin = (high - low) * 0.05;
  return [chart.zero && low === 0 ? 0 : low - margin, high + margin, false];
}

function line(xs, ys, x, y) {
  let text = "", pen = "M";
  for (let i = 0; i < xs.length; i++) {
    if (ys[i] === null) { pen = "M"; continue; }
    text += `${pen}${x(xs[i]).toFixed(1)} ${y(ys[i]).toFixed(1)}`;
    pen = "L";
  }
  return text;
}

function draw(chart) {
  const visible = runs.filter((run) => run.shown && run.y[chart.key]?.some((value) => value !== null));
  const width = Math.max(280, chart.box.clientWidth - 36), height = chart.wide ? 380 : 210;
  const edge = { left: 64, right: width - 14, top: 10, bottom: height - 24 };
  const svg = make("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": chart.title });
  chart.svg.replaceWith(svg);
  chart.svg = svg;
  chart.scale = null;
  if (!visible.length) return;
  const ends = visible.flatMap((run) => [run.x[view.axis][0], run.x[view.axis].at(-1)]);
  const first = Math.min(...ends), right = Math.max(...ends, first + 1e-9), left = first < right / 20 ? 0 : first;
  const [low, high, log] = range(chart, visible);
  const map = log ? Math.log : (value) => value;
  const x = (value) => edge.left + ((value - left) / (right - left)) * (edge.right - edge.left);
  const y = (value) => edge.bottom - ((map(value) - map(low)) / (map(high) - map(low))) * (edge.bottom - edge.top);
  const unit = chart.print === bytes ? 1024 ** Math.floor(Math.log2(high) / 10) : 1;
  for (const value of ticks(low, high, chart.wide ? 7 : 4, log, unit)) {
    svg.append(make("line", { class: "grid", x1: edge.left, x2: edge.right, y1: y(value), y2: y(value) }));
    svg.append(make("text", { x: edge.left - 8, y: y(value) + 4, "text-anchor": "end" }, chart.print(value)));
  }
  const lap = view.axis !== "time" || right < 120 ? 1 : right < 7200 ? 60 : right < 172800 ? 3600 : 86400;
  for (const value of ticks(left, right, width / 130, false, lap))
    svg.append(make("text", { x: x(value), y: height - 6, "text-anchor": "middle" }, along[view.axis](value)));
  const clip = `clip-${CHARTS.indexOf(chart)}`;
  const frame = { x: edge.left, y: edge.top - 6, width: edge.right - edge.left + 6, height: edge.bottom - edge.top + 8 };
  const plot = make("g", { "clip-path": `url(#${clip})` });
  svg.append(make("clipPath", { id: clip }, make("rect", frame)), plot);
  for (const run of visible) marks(chart, run, plot, x, y, edge);
  chart.cursor = make("g");
  svg.append(chart.cursor);
  chart.scale = { x, y, left, right, edge };
}

function marks(chart, run, plot, x, y, edge) {
  const xs = run.x[view.axis], style = `stroke:${run.color}`;
  if (averaged(run, chart)) plot.append(make("path", { class: "raw", style, d: line(xs, run.y[chart.key], x, y) }));
  plot.append(make("path", { class: "mean", style, d: line(xs, mean(run, chart), x, y) }));
  for (const point of run.resumes) {
    const at = x(point[axisName()]);
    const title = make("text", { x: at + 4, y: edge.top + 8 }, chart.wide && run.resumes.length < 6 ? `resumed at step ${point.step}` : "");
    plot.append(make("line", { class: "resume", style, x1: at, x2: at, y1: edge.top, y2: edge.bottom }), title);
  }
  if (chart.key !== "loss") return;
  if (run.entropy !== null) {
    const at = y(run.entropy);
    plot.append(make("line", { class: "entropy", x1: edge.left, x2: edge.right, y1: at, y2: at }));
    plot.append(make("text", { x: edge.right - 6, y: at - 5, "text-anchor": "end" }, `unigram entropy ${plain(run.entropy)}`));
  }
  if (run.evals.length > 60) {  // as a line: so many dots would hide the loss
    const d = line(run.evals.map((point) => point[axisName()]), run.evals.map((point) => point.loss), x, y);
    plot.append(make("path", { class: "held", style, d }));
    return;
  }
  for (const point of run.evals) {
    if (point.loss === null) continue;
    const place = { cx: x(point[axisName()]), cy: y(point.loss), r: 4.5, class: "dot", style: `fill:${run.color}` };
    plot.append(make("circle", place));
  }
}

const axisName = () => (view.axis === "steps" ? "step" : view.axis);

// ---- pointer

function nearest(xs, value) {
  let low = 0, high = xs.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (xs[middle] < value) low = middle + 1; else high = middle;
  }
  return low > 0 && value - xs[low - 1] < xs[low] - value ? low - 1 : low;
}

function follow(chart, event) {
  const scale = chart.scale;
  if (!scale) return;
  const share = (event.clientX - chart.svg.getBoundingClientRect().left - scale.edge.left) / (scale.edge.right - scale.edge.left);
  view.cursor = scale.left + Math.min(1, Math.max(0, share)) * (scale.right - scale.left);
  CHARTS.forEach(cursor);
  const rows = runs.filter((run) => run.shown && run.y[chart.key]).map((run) => {
    const i = nearest(run.x[view.axis], view.cursor), value = run.y[chart.key][i], average = mean(run, chart)[i];
    const text = value === null ? "not a number" : chart.print(value);
    const smoothed = averaged(run, chart) && average !== null ? ` (mean ${chart.print(average)})` : "";
    return make("div", {}, swatch(run), `${run.name}: ${text}${smoothed} at ${exactly[view.axis](run.x[view.axis][i])}`);
  });
  const tip = document.getElementById("tip");
  tip.replaceChildren(...rows);
  tip.hidden = false;
  const right = event.clientX + 16 + tip.offsetWidth > innerWidth;
  tip.style.left = `${right ? Math.max(4, event.clientX - 16 - tip.offsetWidth) : event.clientX + 16}px`;
  tip.style.top = `${Math.min(event.clientY + 14, innerHeight - tip.offsetHeight - 6)}px`;
}

function leave() {
  view.cursor = null;
  document.getElementById("tip").hidden = true;
  CHARTS.forEach(cursor);
}

function cursor(chart) {
  if (!chart.scale) return;
  chart.cursor.replaceChildren();
  if (view.cursor === null) return;
  const { x, y, edge } = chart.scale, at = x(view.cursor);
  chart.cursor.append(make("line", { class: "cursor", x1: at, x2: at, y1: edge.top, y2: edge.bottom }));
  for (const run of runs.filter((each) => each.shown && each.y[chart.key])) {
    const i = nearest(run.x[view.axis], view.cursor), value = mean(run, chart)[i];
    const place = { cx: x(run.x[view.axis][i]), cy: y(value ?? 0), r: 3.5, class: "dot", style: `fill:${run.color}` };
    if (value !== null) chart.cursor.append(make("circle", place));
  }
}

// ---- tables and text

function summary() {
  const last = (run, key) => (run.y[key] ?? []).findLast((value) => value !== null) ?? null;
  const layouts = (run) => run.segments.map((part) => `${part.from + 1} to ${part.to}: ${part.layout} on ${part.ranks}`);
  const rows = [
    ["state", (run) => `${run.verdict} at step ${run.x.steps.at(-1) ?? 0} of ${run.steps}`],
    ["final loss", (run) => (last(run, "loss") === null ? "" : `${plain(last(run, "loss"))} nats per token`)],
    ["held-out loss", (run) => (run.evals.length ? `${plain(run.evals.at(-1).loss ?? NaN)} nats per token after step ${run.evals.at(-1).step}` : "not evaluated")],
    ["unigram entropy", (run) => (run.entropy === null ? "" : `${plain(run.entropy)} nats per token`)],
    ["tokens", (run) => count(run.x.tokens.at(-1) ?? 0)],
    ["weights", (run) => count(run.weights)],
    ["wall time", (run) => `${seconds(run.wall)}, of it ${seconds(run.trained)} in steps that were kept`],
    ["steps by layout", (run) => layouts(run).flatMap((text) => [text, make("br")]).slice(0, -1)],
    ["run directory", (run) => run.path],
  ].map(([name, cell]) => [name, ...runs.map(cell)]).filter(([, ...cells]) => cells.some((cell) => cell.length));
  const head = ["", ...runs.map((run) => [swatch(run), run.name])];
  document.querySelector("#summary .scroll").replaceChildren(table(head, rows));
}

function recipes() {
  const section = document.getElementById("differences");
  const head = () => ["field", ...runs.map((run) => [swatch(run), run.name])];
  const scroll = (rows) => make("div", { class: "scroll" }, table(head(), rows.map((row) => [row.field, ...row.values])));
  const differing = data.recipe.filter((row) => row.values.some((value) => value !== row.values[0]));
  if (runs.length > 1)
    section.append(differing.length ? scroll(differing) : make("p", { class: "note" }, "The recipes are the same."));
  if (!data.recipe.length) section.append(make("p", { class: "note" }, "No resolved recipe in the run directory."));
  else section.append(make("details", {}, make("summary", {}, `all ${data.recipe.length} fields`), scroll(data.recipe)));
}

function texts(id, text, missing) {
  const section = document.getElementById(id);
  for (const run of runs) {
    const body = text(run);
    section.append(make("h3", {}, swatch(run), run.name));
    section.append(body ? make("pre", {}, body) : make("p", { class: "note" }, missing));
  }
}

// ---- start

function redraw() {
  document.getElementById("span").value = view.span > 1 ? `${view.span} points` : "off";
  CHARTS.forEach(draw);
}

function controls() {
  for (const run of runs) {
    const box = make("input", { type: "checkbox", checked: "" });
    box.addEventListener("change", () => { run.shown = box.checked; redraw(); });
    document.getElementById("legend").append(make("label", {}, box, make("i", { style: `background:${run.color}` }), run.name));
  }
  const smoothing = document.getElementById("smoothing"), log = document.getElementById("log");
  const apply = () => {
    view.axis = document.querySelector("input[name=axis]:checked").value;
    view.span = Math.round(1000 ** (smoothing.value / 100));
    view.log = log.checked;
    redraw();
  };
  document.getElementById("controls").addEventListener("input", apply);
  for (const chart of CHARTS) {
    chart.svg = make("svg");
    chart.box = make("div", { class: chart.wide ? "chart wide" : "chart" },
      make("h3", {}, `${chart.title} `, make("small", {}, chart.unit)), chart.svg);
    chart.box.addEventListener("pointermove", (event) => follow(chart, event));
    chart.box.addEventListener("pointerleave", leave);
    document.getElementById("charts").append(chart.box);
  }
  addEventListener("resize", redraw);
  apply();
}

summary();
recipes();
texts("provenance", (run) => run.provenance && JSON.stringify(run.provenance, null, 2), "No provenance in the run directory.");
texts("samples", (run) => run.samples, "No samples in the run directory.");
controls();
