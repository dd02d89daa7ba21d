"use strict";
// Draws the report embedded in the page.  Text only ever enters the document as text nodes, never as markup.

const report = JSON.parse(document.getElementById("report").textContent);
const { positions, loops: R } = report;
const targetName = report.task === "hops" ? "the task's target" : "the true next token";
const byId = (id) => document.getElementById(id);

function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children.filter((child) => child !== null));
  return node;
}

const percent = (share, digits = 0) => (Number.isFinite(share) ? `${(100 * share).toFixed(digits)} %` : "–");
const number = (value, digits) => (Number.isFinite(value) ? value.toFixed(digits) : "–");
const mean = (values) => (values.length ? values.reduce((sum, value) => sum + value, 0) / values.length : null);

// float32 probabilities summed in float64, as the engine does it, so that page and command agree to the last bit.
function exitLoop(position, q) {
  if (report.q === null) return position.exit_loop; // another rule than the gate's: nothing to slide
  if (q >= 1) return R;
  let sum = 0;
  const first = position.loops.findIndex((loop) => (sum += Math.fround(loop.exit_prob ?? NaN)) >= q);
  return first < 0 ? R : first + 1;
}

// ---- the cells: made once, moved when the width changes ----

let mouse = ""; // where it last moved to

const cells = positions.map((position, s) =>
  position.loops.map((loop, r) => {
    const known = loop.target_prob !== null;
    const shade = known ? Math.sqrt(loop.target_prob) : 0; // differences among small probabilities stay visible
    const right = known && loop.top[0].id === position.target_id;
    const cell = make(
      "td",
      { role: "gridcell", tabindex: -1, "data-position": s + 1, "data-loop": r + 1, style: `--shade: ${shade.toFixed(4)}` },
      make("span", { class: "token" }, loop.top[0].token),
      make("small", {}, percent(loop.target_prob)),
    );
    const kinds = { unknown: !known, right, half: shade > 0.49, strong: shade > 0.84 };
    cell.className = ["cell", ...Object.keys(kinds).filter((kind) => kinds[kind])].join(" ");
    cell.addEventListener("mousemove", (event) => {
      // Scrolling by keyboard moves cells under a mouse at rest; that is no wish to see them.
      const place = `${event.screenX},${event.screenY}`;
      if (place !== mouse && !(shown.s === s && shown.r === r)) show(s, r);
      mouse = place;
    });
    cell.addEventListener("mouseleave", () => show(current.s, current.r));
    cell.addEventListener("focus", () => moveTo(s, r, false));
    cell.addEventListener("click", () => moveTo(s, r, true));
    return cell;
  }),
);

const LABEL = 66; // pixels
const COLUMN = 78;
const GAP = 2;

function band(from, to) {
  const head = make("tr", {}, make("td", {}, "token"));
  const foot = make("tr", {}, make("td", {}, report.task === "hops" ? "target" : "true next"));
  for (const position of positions.slice(from, to)) {
    head.append(
      make("th", { scope: "col", title: position.token },
        make("span", { class: "place" }, String(position.position)), make("span", { class: "token" }, position.token)),
    );
    foot.append(make("td", {}, make("span", { class: "token" }, position.target ?? "–")));
  }
  const body = make("tbody");
  for (let r = 0; r < R; r++) {
    body.append(make("tr", {}, make("th", { scope: "row" }, `loop ${r + 1}`), ...cells.slice(from, to).map((c) => c[r])));
  }
  const label = `tokens ${from + 1} to ${to}`;
  const widths = make("colgroup", {}, make("col", { style: `width: ${LABEL}px` }), ...positions.slice(from, to).map(() => make("col")));
  const style = `width: ${LABEL + GAP + (to - from) * (COLUMN + GAP)}px`;
  return make("table", { role: "grid", "aria-label": label, style }, widths, make("thead", {}, head), body, make("tfoot", {}, foot));
}

let columns = 0;

function layOut(width) {
  const most = Math.max(1, Math.floor((width - LABEL - GAP) / (COLUMN + GAP)));
  const wanted = Math.ceil(positions.length / Math.ceil(positions.length / most)); // bands of nearly one length
  if (wanted === columns) return;
  columns = wanted;
  const focused = document.activeElement;
  const tables = [];
  for (let from = 0; from < positions.length; from += columns) {
    tables.push(band(from, Math.min(from + columns, positions.length)));
  }
  byId("bands").replaceChildren(...tables);
  if (focused && focused.classList.contains("cell")) focused.focus({ preventScroll: true });
}

// ---- one cell in detail ----

const current = { s: 0, r: R - 1 };
const shown = { s: 0, r: R - 1 };

function moveTo(s, r, focus) {
  cells[current.s][current.r].tabIndex = -1;
  Object.assign(current, { s, r });
  cells[s][r].tabIndex = 0;
  if (focus) cells[s][r].focus();
  show(s, r);
}

function show(s, r) {
  cells[shown.s][shown.r].classList.remove("shown");
  Object.assign(shown, { s, r });
  cells[s][r].classList.add("shown");
  const position = positions[s];
  const loop = position.loops[r];
  const facts = [
    ["token", position.token],
    [report.task === "hops" ? "target" : "true next", position.target ?? "none"],
    ["its probability", percent(loop.target_prob, 1)],
    ["its rank", loop.rank === null ? "–" : `${loop.rank}`],
    ["loss", loop.loss === null ? "–" : `${number(loop.loss, 3)} nats`],
    ["gate λ", number(loop.hazard, 3)],
    ["exit probability", number(loop.exit_prob, 3)],
    ["exit CDF", number(loop.exit_cdf, 3)],
    ["state change", percent(loop.change)],
    ["KL to last loop", loop.kl_to_last === null ? "–" : `${number(loop.kl_to_last, 3)} nats`],
  ];
  const list = make("dl", { class: "facts" });
  for (const [name, value] of facts) list.append(make("div", {}, make("dt", {}, name), make("dd", {}, value)));
  const ranking = make("ol", { class: "ranking" });
  for (const guess of loop.top) {
    ranking.append(
      make("li", { class: guess.id === position.target_id ? "right" : "" },
        make("span", { class: "token", title: guess.token }, guess.token),
        make("span", { class: "bar", style: `width: ${100 * (guess.prob ?? 0)}%` }),
        make("span", {}, percent(guess.prob, 1))),
    );
  }
  byId("details").replaceChildren(
    make("div", {}, make("h3", {}, `Position ${position.position}, loop ${r + 1} of ${R}`), list),
    make("div", {}, make("h3", {}, "Top predictions"), ranking),
    make("div", {}, make("h3", {}, "When it stops"), exitLaw(position)),
  );
}

function exitLaw(position) {
  const q = Number(slider.value);
  const stop = exitLoop(position, q);
  const law = make("div", { class: "law", role: "img", "aria-label": `stops after loop ${stop} at q = ${q.toFixed(2)}` });
  for (const loop of position.loops) {
    const own = 100 * (loop.exit_prob ?? 0);
    const sum = 100 * Math.min(1, loop.exit_cdf ?? 0);
    law.append(
      make("div", { class: loop.loop === stop ? "column stop" : "column" },
        make("div", { class: "sum", style: `height: ${sum}%` }),
        make("div", { class: "own", style: `height: ${own}%; bottom: ${sum - own}%` }),
        make("div", { class: "name" }, String(loop.loop))),
    );
  }
  if (report.q !== null) law.append(make("div", { class: "line", style: `top: ${96 * (1 - q)}px` }, "q"));
  return law;
}

// ---- the threshold ----

const slider = byId("q");

function mark() {
  const q = Number(slider.value);
  const exits = positions.map((position) => exitLoop(position, q));
  positions.forEach((position, s) =>
    position.loops.forEach((loop, r) => {
      const stops = exits[s] === r + 1;
      const unused = exits[s] < r + 1;
      cells[s][r].classList.toggle("exit", stops);
      cells[s][r].classList.toggle("unused", unused);
      const truth = position.target === null ? "" : `, true ${position.target} at ${percent(loop.target_prob)}`;
      const state = stops ? ", stops here" : unused ? ", not needed" : "";
      cells[s][r].setAttribute("aria-label", `${position.token}, loop ${r + 1}: ${loop.top[0].token}${truth}${state}`);
    }),
  );
  const meanLoops = mean(exits);
  const counted = positions.map((position, s) => [position, exits[s]]).filter(([position]) => position.target !== null);
  const loss = (pick) => mean(counted.map(([position, exit]) => position.loops[pick(exit) - 1].loss ?? NaN));
  const isRight = (position, loop) => Number(position.loops[loop - 1].top[0].id === position.target_id);
  byId("q-value").value = q.toFixed(2);
  slider.setAttribute("aria-valuetext", `${q.toFixed(2)}, ${meanLoops.toFixed(2)} of ${R} loops on average`);
  byId("mean-loops").value = meanLoops.toFixed(2);
  byId("saved").textContent = percent(1 - meanLoops / R);
  byId("loss-at-exit").textContent = number(loss((exit) => exit), 3);
  byId("loss-all").textContent = counted.length ? `all loops ${number(loss(() => R), 3)}` : "";
  byId("right-at-exit").textContent = percent(mean(counted.map(([position, exit]) => isRight(position, exit))));
  byId("right-all").textContent = counted.length
    ? `all loops ${percent(mean(counted.map(([position]) => isRight(position, R))))}`
    : "";
  drawSummary(exits);
  show(shown.s, shown.r);
}

function drawSummary(exits) {
  const names = ["loop", "loss, nats", "right", "gate λ", "exit probability", "stop at q", "state change", "KL to last"];
  const rows = report.by_loop.map((loop) => {
    const share = exits.filter((exit) => exit === loop.loop).length / exits.length;
    return make("tr", {},
      make("th", { scope: "row" }, `loop ${loop.loop}`),
      make("td", {}, number(loop.loss, 3)),
      make("td", {}, percent(loop.accuracy)),
      make("td", {}, number(loop.hazard, 3)),
      make("td", {}, number(loop.exit_prob, 3)),
      make("td", {}, make("span", { class: "bar", style: `width: ${90 * share}px` }), percent(share)),
      make("td", {}, percent(loop.change)),
      make("td", {}, number(loop.kl_to_last, 3)));
  });
  const head = make("tr", {}, ...names.map((name) => make("th", { scope: "col" }, name)));
  byId("summary").replaceChildren(make("thead", {}, head), make("tbody", {}, ...rows));
}

// ---- start ----

const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

byId("bands").addEventListener("keydown", (event) => {
  let target = null;
  if (event.key in steps) target = [current.s + steps[event.key][0], current.r + steps[event.key][1]];
  if (event.key === "Home") target = [0, current.r];
  if (event.key === "End") target = [positions.length - 1, current.r];
  if (!target) return;
  event.preventDefault();
  if (cells[target[0]]?.[target[1]]) moveTo(target[0], target[1], true);
});

document.querySelectorAll(".target-name").forEach((node) => node.append(targetName));
byId("subtitle").textContent = `${report.model} · ${R} loops · ${positions.length} tokens` + (report.q === null ? ` · stops by ${report.exit}` : "");
byId("of-loops").textContent = `of ${R}`;
byId("notes").textContent =
  "Means over the tokens above. The gate's λ is the chance to stop after a loop if not stopped before; the last loop takes " +
  "whatever probability is left. Shades grow with the square root of the probability." +
  (report.trained_loops !== null && R > report.trained_loops ? ` The model was trained with ${report.trained_loops} loops.` : "");
slider.value = report.q ?? 1;
document.querySelector(".slider").hidden = report.q === null;
slider.addEventListener("input", mark);
layOut(byId("bands").clientWidth);
moveTo(0, R - 1, false);
mark();
new ResizeObserver(() => layOut(byId("bands").clientWidth)).observe(byId("bands"));
matchMedia("print").addEventListener("change", () => layOut(byId("bands").clientWidth));
addEventListener("beforeprint", () => layOut(690)); // the width of a portrait A4 page
