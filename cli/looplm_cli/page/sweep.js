"use strict";
// Draws the contest embedded in the page.  Text only ever enters the document as text nodes, never as markup.

const report = JSON.parse(document.getElementById("report").textContent);
const byId = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";
const WIDTH = 960, HEIGHT = 460, LEFT = 62, RIGHT = 16, TOP = 14, BOTTOM = 40;

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}
const make = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);
const draw = (tag, attributes = {}, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);
const number = (value, digits) => (Number.isFinite(value) ? value.toFixed(digits) : "–");
const percent = (share) => (Number.isFinite(share) ? `${(100 * share).toFixed(1)} %` : "–");

const DASHES = ["", "7 3", "2 3"];
const entries = report.entries.map((entry, index) => ({
  ...entry,
  hue: Math.round((index * 360) / report.entries.length),
  dash: DASHES[index % DASHES.length], // hues of neighbours are close: the line tells them apart too
  visible: true,
}));
const current = { entry: 0, point: 0 };
let dots = new Map();

const axes = {
  mean_loops: (value) => number(value, 2),
  ms_per_token: (value) => number(value, 2),
  loss: (value) => number(value, 3),
  accuracy: percent,
  agreement: percent,
};

function scale(values, from, to) {
  const low = Math.min(...values), high = Math.max(...values), room = (high - low || 1) * 0.04;
  const at = (value) => from + ((value - low + room) / (high - low + 2 * room)) * (to - from);
  const ticks = Array.from({ length: 6 }, (_, i) => low + ((high - low) * i) / 5);
  return { at, ticks };
}

function plot() {
  const cost = byId("cost").value, worth = byId("worth").value;
  const shown = entries.filter((entry) => entry.visible);
  const points = shown.flatMap((entry) => entry.points).filter((p) => p[cost] !== null && p[worth] !== null);
  const svg = byId("plot");
  svg.setAttribute("viewBox", `0 0 ${WIDTH} ${HEIGHT}`);
  dots = new Map();
  if (!points.length) return svg.replaceChildren();
  const x = scale(points.map((p) => p[cost]), LEFT, WIDTH - RIGHT);
  const y = scale(points.map((p) => p[worth]), HEIGHT - BOTTOM, TOP);
  const frame = [];
  for (const tick of x.ticks) {
    frame.push(draw("line", { class: "grid", x1: x.at(tick), x2: x.at(tick), y1: TOP, y2: HEIGHT - BOTTOM }));
    frame.push(draw("text", { x: x.at(tick), y: HEIGHT - BOTTOM + 18, "text-anchor": "middle" }, axes[cost](tick)));
  }
  for (const tick of y.ticks) {
    frame.push(draw("line", { class: "grid", x1: LEFT, x2: WIDTH - RIGHT, y1: y.at(tick), y2: y.at(tick) }));
    frame.push(draw("text", { x: LEFT - 8, y: y.at(tick) + 4, "text-anchor": "end" }, axes[worth](tick)));
  }
  const name = byId("cost").selectedOptions[0].textContent;
  frame.push(draw("text", { x: (LEFT + WIDTH) / 2, y: HEIGHT - 4, "text-anchor": "middle" }, name));
  const curves = entries.map((entry, e) => (entry.visible ? curve(entry, e, x, y, cost, worth) : null));
  svg.replaceChildren(...frame, ...curves.filter(Boolean));
  mark();
}

function curve(entry, e, x, y, cost, worth) {
  const group = draw("g", { "data-series": e, style: `--hue: ${entry.hue}` });
  const order = entry.points.map((p, i) => i).filter((i) => entry.points[i][cost] !== null);
  order.sort((a, b) => entry.points[a][cost] - entry.points[b][cost]);
  const place = (i) => [x.at(entry.points[i][cost]), y.at(entry.points[i][worth])];
  group.append(draw("polyline", { class: "curve", "stroke-dasharray": entry.dash, points: order.map((i) => place(i).join(",")).join(" ") }));
  for (const i of order) {
    const p = entry.points[i], [cx, cy] = place(i), half = p.intervals[worth];
    const bottom = y.at(p[worth] - half), top = y.at(p[worth] + half);
    if (half && bottom - top < HEIGHT - BOTTOM - TOP) {
      const ends = { y1: Math.min(bottom, HEIGHT - BOTTOM), y2: Math.max(top, TOP) };
      group.append(draw("line", { class: "spread", x1: cx, x2: cx, ...ends }));
    }
    const best = cost === "mean_loops" ? p.best_by_loops : p.best_by_time;
    const label = `${entry.entry}, ${p.exit}: ${number(p.mean_loops, 2)} loops, loss ${number(p.loss, 4)}`;
    const dot = draw("circle", { class: best ? "dot best" : "dot", cx, cy, r: 5, tabindex: -1, role: "img", "aria-label": label });
    dot.addEventListener("mouseenter", () => show(e, i));
    dot.addEventListener("mouseleave", () => show(current.entry, current.point));
    dot.addEventListener("focus", () => moveTo(e, i, false));
    dot.addEventListener("click", () => moveTo(e, i, true));
    dots.set(`${e},${i}`, dot);
    group.append(dot);
  }
  return group;
}

function mark() {
  for (const dot of dots.values()) dot.setAttribute("tabindex", -1);
  const chosen = dots.get(`${current.entry},${current.point}`) ?? dots.values().next().value;
  if (chosen) chosen.setAttribute("tabindex", 0);
}

function moveTo(e, i, focus) {
  Object.assign(current, { entry: e, point: i });
  mark();
  if (focus) dots.get(`${e},${i}`)?.focus();
  show(e, i);
}

function show(e, i) {
  for (const [key, dot] of dots) dot.classList.toggle("shown", key === `${e},${i}`);
  document.querySelectorAll("#plot g").forEach((g) => g.classList.toggle("faded", Number(g.dataset.series) !== e));
  const p = entries[e].points[i];
  const facts = [
    ["mean loops", `${number(p.mean_loops, 3)} (10/50/90 %: ${p.loops_quantiles.join("/")})`],
    ["loss", `${number(p.loss, 4)} ±${number(p.intervals.loss, 4)}`],
    ["accuracy", percent(p.accuracy)],
    ["as all loops", percent(p.agreement)],
    ["ms per token", p.ms_range ? `${number(p.ms_per_token, 3)} (${p.ms_range.map((ms) => number(ms, 3)).join(" to ")})` : "–"],
    ["loops in that decode", number(p.decode_loops, 2)],
    ["its loss", number(p.decode_loss, 4)],
    ...(p.hops ?? []).map((hop) => [`${hop.hops} hop${hop.hops > 1 ? "s" : ""}`, `${number(hop.mean_loops, 2)} loops, ${percent(hop.accuracy)}`]),
  ];
  byId("details").replaceChildren(
    make("h3", {}, `${entries[e].entry}: ${p.exit}`),
    make("dl", {}, ...facts.map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, value)))),
  );
}

// ---- keyboard: along a curve, and from curve to curve at the nearest point

byId("plot").addEventListener("keydown", (event) => {
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key], jump = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  if (!step && !jump) return;
  event.preventDefault();
  const cost = byId("cost").value;
  const along = (e) => entries[e].points.map((p, i) => i).filter((i) => dots.has(`${e},${i}`))
    .sort((a, b) => entries[e].points[a][cost] - entries[e].points[b][cost]);
  if (step) {
    const order = along(current.entry), next = order[order.indexOf(current.point) + step];
    if (next !== undefined) moveTo(current.entry, next, true);
    return;
  }
  const wanted = entries[current.entry].points[current.point][cost];
  for (let e = current.entry + jump; e >= 0 && e < entries.length; e += jump) {
    const order = along(e);
    if (!order.length) continue;
    const gap = (i) => Math.abs(entries[e].points[i][cost] - wanted);
    return moveTo(e, order.reduce((a, b) => (gap(b) < gap(a) ? b : a)), true);
  }
});

// ---- tables

function rows(id, heads, body) {
  const head = make("tr", {}, ...heads.map((name) => make("th", { scope: "col" }, name)));
  byId(id).replaceChildren(make("thead", {}, head), make("tbody", {}, ...body));
}
const cells = (values, bold = []) =>
  make("tr", {}, ...values.map((value, i) => make("td", bold.includes(i) ? { class: "best" } : {}, String(value))));

rows("budgets", ["budget", "winner", "loss", "next", "its loss", "lead", "sure"], report.budgets.map((b) => {
  const [first, second] = b.ranking;
  const unit = b.cost === "loops" ? "mean loops" : "ms per token";
  const lead = b.advantage === null ? "–" : `${number(b.advantage, 4)} ±${number(b.interval, 4)}`;
  return cells([`${number(b.amount, 2)} ${unit}`, first?.entry ?? "–", number(first?.loss, 4), second?.entry ?? "–",
    number(second?.loss, 4), lead, b.sure ? "yes" : "no"], [1]);
}));
byId("claims").append(...report.figure5.claims.map((c) => make("li", {},
  make("b", {}, c.holds ? "holds" : "does not hold"),
  `: ${c.says} (${number(100 * c.lead, 2)} ±${number(100 * c.interval, 2)} points of accuracy at ${report.figure5.mean_loops} mean loops)`)));
rows("points", ["rule", "exit", "mean loops", "loss", "accuracy", "as all loops", "ms/token"], entries.flatMap((entry) =>
  entry.points.map((p) => cells([entry.entry, p.exit, number(p.mean_loops, 2), number(p.loss, 4), percent(p.accuracy),
    percent(p.agreement), number(p.ms_per_token, 3)], p.best_by_loops ? [3] : []))));

// ---- start

byId("entries").append(...entries.map((entry, e) => {
  const box = make("input", { type: "checkbox", checked: "" });
  box.addEventListener("change", () => { entry.visible = box.checked; plot(); });
  return make("li", { "data-series": e, style: `--hue: ${entry.hue}` }, make("label", {}, box, draw("svg", { class: "swatch", viewBox: "0 0 26 4" },
    draw("line", { class: "curve", x1: 0, x2: 26, y1: 2, y2: 2, "stroke-dasharray": entry.dash })), entry.entry));
}));
byId("subtitle").textContent =
  `${report.model} · ${report.data} · ${report.tokens} positions in ${report.chunks} chunks · loss after all ${report.loops} loops ${number(report.full.loss, 4)}`;
byId("notes").textContent =
  "Bold: no other point has as few loops and loses less. Loss, accuracy and agreement are those of undisturbed keys and values; " +
  `times are medians over ${report.turns} turns of a real decode of the given text, bars 95 % intervals over chunks, ` +
  "left out where they are taller than the plot.";
for (const id of ["cost", "worth"]) byId(id).addEventListener("change", plot);
plot();
show(0, 0);
document.querySelectorAll("#plot g").forEach((g) => g.classList.remove("faded"));
byId("plot").addEventListener("mouseleave", () => document.querySelectorAll("#plot g").forEach((g) => g.classList.remove("faded")));
