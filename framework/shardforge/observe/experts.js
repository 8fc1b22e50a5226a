
// ---- experts: loads of layers by experts, and each layer's numbers over the steps

const mixtures = runs.filter((run) => run.experts);
const EVEN = 128, OCTAVE = 24, REACH = 3;  // a byte is EVEN + OCTAVE * log2(load over the even one), 0 is no token
const BLUE = [37, 99, 235], MIDDLE = [226, 232, 240], RED = [220, 38, 38], NONE = "#000000";
const SEQUENCE = [[241, 245, 249], [125, 168, 232], [49, 76, 168], [30, 20, 80]];
const KINDS = [
  { key: "max_vio", title: "MaxVio", print: plain },
  { key: "dead", title: "dead experts", print: plain },
  { key: "entropy_share", title: "router entropy", print: percent },
  { key: "drop_rate", title: "dropped choices", print: percent },
  { key: "bias_low", title: "least selection bias", print: small },
  { key: "bias_high", title: "largest selection bias", print: small },
  { key: "similarity", title: "similarity of experts", print: plain },
];

const mixed = (a, b, share) => `rgb(${a.map((value, i) => Math.round(value + (b[i] - value) * share)).join(",")})`;

function loadColor(power) {
  const share = Math.min(1, Math.abs(power) / REACH);
  return mixed(MIDDLE, power > 0 ? RED : BLUE, share);
}

function sequential(share) {
  const place = Math.min(0.9999, Math.max(0, share)) * (SEQUENCE.length - 1), i = Math.floor(place);
  return mixed(SEQUENCE[i], SEQUENCE[i + 1], place - i);
}

// a matrix in a canvas: cell(row, column) -> color or null; names(row) beside it; marks: [column, text] below it
function paint(canvas, rows, columns, cell, names, marks) {
  const width = Math.max(260, canvas.parentElement.clientWidth), ratio = devicePixelRatio || 1;
  const high = Math.max(3, Math.min(22, Math.floor(440 / rows))), left = 64, below = 22;
  const height = rows * high + below;
  Object.assign(canvas, { width: width * ratio, height: height * ratio });
  canvas.style.height = `${height}px`;
  const pen = canvas.getContext("2d"), wide = (width - left - 8) / columns, gap = high > 8 && wide > 5 ? 1 : 0;
  const edge = (column) => Math.round((left + column * wide) * ratio) / ratio;
  pen.scale(ratio, ratio);
  pen.font = "11px system-ui, sans-serif";
  for (let row = 0; row < rows; row++)
    for (let column = 0; column < columns; column++) {
      const color = cell(row, column);
      if (color === null) continue;
      pen.fillStyle = color;
      const x = edge(column);  // whole pixels, or seams would show
      pen.fillRect(x, row * high, edge(column + 1) - x - gap, high - gap);
    }
  pen.fillStyle = getComputedStyle(document.body).getPropertyValue("--faint");
  pen.textAlign = "right";
  const every = Math.ceil(14 / high);
  for (let row = 0; row < rows; row += every) pen.fillText(names(row), left - 8, row * high + Math.min(high, 14) / 2 + 4);
  for (const [column, text] of marks) {
    const half = pen.measureText(text).width / 2;
    pen.textAlign = "left";
    pen.fillText(text, Math.max(left, Math.min(width - 8 - 2 * half, left + (column + 0.5) * wide - half)), rows * high + 16);
  }
  canvas.at = (event) => {
    const box = canvas.getBoundingClientRect();
    const column = Math.floor((event.clientX - box.left - left) / wide), row = Math.floor((event.clientY - box.top) / high);
    return row >= 0 && row < rows && column >= 0 && column < columns ? [row, column] : null;
  };
}

function hover(canvas, text) {
  const tip = document.getElementById("tip");
  canvas.addEventListener("pointermove", (event) => {
    const place = canvas.at?.(event), told = place && text(...place);
    tip.hidden = !told;
    if (!told) return;
    tip.replaceChildren(told);
    const right = event.clientX + 16 + tip.offsetWidth > innerWidth;
    tip.style.left = `${right ? Math.max(4, event.clientX - 16 - tip.offsetWidth) : event.clientX + 16}px`;
    tip.style.top = `${Math.min(event.clientY + 14, innerHeight - tip.offsetHeight - 6)}px`;
  });
  canvas.addEventListener("pointerleave", () => { tip.hidden = true; });
}

function scale(colors, low, high) {
  return [low, make("i", { class: "ramp", style: `background:linear-gradient(90deg,${colors.join(",")})` }), high];
}

function chooser(label, entries, changed) {
  const list = make("select", {}, ...entries.map(([value, text]) => make("option", { value }, text)));
  list.addEventListener("change", changed);
  return [make("label", {}, `${label} `, list), list];
}

function loads(run, shown) {
  const canvas = make("canvas", { role: "img", "aria-label": "load of each expert" });
  const slider = make("input", { type: "range", min: 0, max: run.experts.pictures.length - 1, value: run.experts.pictures.length - 1 });
  const said = make("output", {});
  const legend = make("p", { class: "note legend" }, ...scale([-1, -0.5, 0, 0.5, 1].map((x) => loadColor(x * REACH)),
    "1/8 of the even load ", " 8 times "), make("i", { class: "ramp dead" }), " no token");
  const pictures = run.experts.pictures.map((picture) => ({
    step: picture.step, rows: picture.rows.map((row) => Uint8Array.from(atob(row), (sign) => sign.charCodeAt(0))),
  }));
  const draw = () => {
    const picture = pictures[slider.value], columns = Math.max(...picture.rows.map((row) => row.length));
    const marks = [0, 0.25, 0.5, 0.75, 1].map((share) => Math.round(share * (columns - 1)));
    said.value = `step ${picture.step} of ${run.steps}`;
    paint(canvas, picture.rows.length, columns,
      (row, column) => (column >= picture.rows[row].length ? null : picture.rows[row][column] ? loadColor((picture.rows[row][column] - EVEN) / OCTAVE) : NONE),
      (row) => `layer ${run.experts.layers[row]}`, [...new Set(marks)].map((column) => [column, `expert ${column}`]));
  };
  hover(canvas, (row, column) => {
    const level = pictures[slider.value].rows[row][column];
    if (level === undefined) return null;
    const load = level === 0 ? "no token" : `${Number((2 ** ((level - EVEN) / OCTAVE)).toPrecision(2))} times the even load`;
    return `layer ${run.experts.layers[row]}, expert ${column}: ${load}`;
  });
  slider.addEventListener("input", draw);
  shown.append(make("h3", {}, "Load ", make("small", {}, "of each layer's experts over the even one")),
    make("label", { class: "time" }, "time ", slider, said), make("div", {}, canvas), legend);
  return draw;
}

function layers(run, shown) {
  const told = (key) => (key === "similarity" ? run.experts.similarity : run.experts.rows[key] && { steps: run.experts.steps, rows: run.experts.rows[key] });
  const kinds = KINDS.filter((kind) => told(kind.key));
  const canvas = make("canvas", { role: "img", "aria-label": "each layer over the steps" }), legend = make("p", { class: "note legend" });
  const [label, list] = chooser("show", kinds.map((kind) => [kind.key, kind.title]), () => draw());
  const chosen = () => kinds.find((kind) => kind.key === list.value);
  const draw = () => {
    const kind = chosen(), { steps, rows } = told(kind.key);
    const values = rows.flat().filter((value) => value !== null);
    const low = values.reduce((a, b) => Math.min(a, b), Infinity), high = values.reduce((a, b) => Math.max(a, b), -Infinity);
    const bend = kind.key === "max_vio" ? (value) => Math.log1p(value) : (value) => value;  // a collapse would hide the rest
    const share = (value) => (bend(value) - bend(low)) / (bend(high) - bend(low) || 1);
    paint(canvas, rows.length, steps.length, (row, column) => (rows[row][column] === null ? null : sequential(share(rows[row][column]))),
      (row) => `layer ${run.experts.layers[row]}`, [0, 0.25, 0.5, 0.75, 1].map((place) => Math.round(place * (steps.length - 1)))
        .filter((column, i, all) => all.indexOf(column) === i).map((column) => [column, `step ${steps[column]}`]));
    legend.replaceChildren(...scale([0, 0.25, 0.5, 0.75, 1].map(sequential), `${kind.print(low)} `, ` ${kind.print(high)}`));
  };
  hover(canvas, (row, column) => {
    const kind = chosen(), { steps, rows } = told(kind.key), value = rows[row][column];
    return `layer ${run.experts.layers[row]}, step ${steps[column]}: ${kind.title} ${value === null ? "not told" : kind.print(value)}`;
  });
  shown.append(make("h3", {}, "Layers ", make("small", {}, "over the steps, the worst of each stretch")), make("div", { class: "time" }, label), make("div", {}, canvas), legend);
  return draw;
}

function mixture() {
  const section = make("section", { id: "experts" }, make("h2", {}, "Experts"));
  document.getElementById("charts").after(section);
  const shown = make("div", { class: "mixture" });
  let draws = [];
  const show = (run) => {
    shown.replaceChildren();
    draws = [loads, layers].map((part) => part(run, shown.appendChild(make("div"))));
    draws.forEach((draw) => draw());
  };
  const [label, list] = chooser("run", mixtures.map((run, i) => [i, run.name]), () => show(mixtures[list.value]));
  if (mixtures.length > 1) section.append(label);
  section.append(shown);
  show(mixtures[0]);
  addEventListener("resize", () => draws.forEach((draw) => draw()));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => draws.forEach((draw) => draw()));
}

mixture();
