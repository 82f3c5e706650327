"use strict";
// Draws the report from the numbers in #data. `runs` share nothing but perhaps tasks; a curve is [points][lines].
const data = JSON.parse(document.getElementById("data").textContent);
const runs = data.runs;
const tasks = [...new Set(runs.flatMap((run) => run.tasks))];
const many = runs.length > 1;
const at = (id) => document.getElementById(id);
const RUN_COLOURS = ["#2b6cb0", "#c05621", "#2f855a", "#805ad5", "#b83280", "#b7791f", "#0987a0", "#718096"];
const TASK_COLOURS = ["#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#17becf", "#bcbd22", "#7f7f7f"];
const runColour = (r) => RUN_COLOURS[r % RUN_COLOURS.length];
const taskColour = (task) => {
  const k = tasks.indexOf(task);
  return tasks.length <= 10 ? TASK_COLOURS[k] : `hsl(${(k * 137.5) % 360}, 65%, ${45 + 12 * (k % 2)}%)`;
};
// Lines of a dozen tasks can be told apart; beyond that, and of several runs, means come first.
const chosen = new Set(many || tasks.length > 12 ? [] : tasks);
let along = "steps";
let smoothing = 0;

function element(name, text, attributes = {}) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

function css(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

function layout(title, more = {}) {
  const axis = { gridcolor: css("--rule"), zerolinecolor: css("--rule"), automargin: true };
  const { xaxis = {}, yaxis = {}, ...rest } = more;
  return {
    title: { text: title, font: { size: 14 }, x: 0.02, xanchor: "left", y: 1, yref: "container", yanchor: "top", pad: { t: 9 } },
    font: { color: css("--ink"), size: 12, family: "system-ui, sans-serif" },
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    margin: { l: 50, r: 12, t: 34, b: 40 }, height: 320, hovermode: "closest", showlegend: false,
    hoverlabel: { namelength: -1 },
    xaxis: { ...axis, ...xaxis }, yaxis: { ...axis, ...yaxis }, ...rest,
  };
}

function draw(where, traces, its) {
  Plotly.react(where, traces, its, { responsive: true, displaylogo: false, modeBarButtonsToRemove: ["select2d", "lasso2d"] });
}

// A grid's columns change with the window, and once more when a scroll bar appears.
const resized = new ResizeObserver((entries) => entries.forEach(({ target }) => target.data && Plotly.Plots.resize(target)));

/** A place for a plot in a grid, made once. */
function place(grid, id) {
  if (!at(id)) {
    const figure = element("figure");
    figure.append(element("div", undefined, { id, class: "plot" }));
    at(grid).append(figure);
    resized.observe(at(id));
  }
  return at(id);
}

/** Exponential moving average without its bias towards the beginning; gaps stay gaps. */
function smooth(values) {
  let sum = 0, weight = 0;
  return values.map((value) => {
    if (value === null || smoothing === 0) return value;
    sum = smoothing * sum + (1 - smoothing) * value;
    weight = smoothing * weight + (1 - smoothing);
    return sum / weight;
  });
}

const column = (points, k) => points.map((point) => (point === null ? null : point[k]));
const mean = (points) => points.map((point) => (point === null ? null : point.reduce((a, b) => a + b, 0) / point.length));
const AXIS = { steps: "environment steps a task", hours: "hours", updates: "updates" };

function line(x, y, name, colour, width, more = {}) {
  return { x, y: smooth(y), name, type: "scatter", mode: "lines", connectgaps: true, line: { color: colour, width },
    hovertemplate: `%{y:.4g} at %{x:,}<extra>${name}</extra>`, ...more };
}

/** The lines of one quantity in one run: the chosen tasks and their mean, or a line for each network. */
function lines(r, x, points, name) {
  const run = runs[r], count = Math.max(...points.map((point) => (point ? point.length : 0)));
  const prefix = many ? `${run.name}: ` : "";
  if (count === run.tasks.length && !name.startsWith("grad_norm/") && !/^(time|rate)\//.test(name)) {
    const shown = run.tasks.flatMap((task, k) => (chosen.has(task) ? [line(x, column(points, k), prefix + task,
      many ? runColour(r) : taskColour(task), 1.2, many ? { opacity: 0.55 } : {})] : []));
    return [...shown, line(x, mean(points), `${prefix}mean`, many ? runColour(r) : css("--ink"), 2.6)];
  }
  return Array.from({ length: count }, (_, k) => line(x, column(points, k), prefix + (count > 1 ? `${name} ${k}` : name),
    many ? runColour(r) : TASK_COLOURS[k], 1.6, k ? { line: { dash: "dot", width: 1.6, color: many ? runColour(r) : TASK_COLOURS[k] } } : {}));
}

function rgba(colour, alpha) {
  const hex = colour.replace("#", "");
  const [red, green, blue] = [0, 2, 4].map((i) => parseInt(hex.slice(i, i + 2), 16));
  return `rgba(${red},${green},${blue},${alpha})`;
}

function successCurve() {
  const traces = [];
  runs.forEach((run, r) => {
    const e = run.evals, x = e[along], colour = many ? runColour(r) : css("--ink");
    if (!x.length) return;
    traces.push({ x: [...x, ...[...x].reverse()], y: [...smooth(e.high), ...smooth(e.low).reverse()], fill: "toself",
      type: "scatter", mode: "lines", line: { width: 0 }, fillcolor: rgba(colour, 0.15), hoverinfo: "skip" });
    traces.push(...lines(r, x, e.success, "success").map((trace) => ({ ...trace, mode: "lines+markers", marker: { size: 4 } })));
  });
  draw(place("learning-plots", "evaluated-success"), traces, layout("Success, greedy (band: 95% of the mean)",
    { xaxis: { title: { text: AXIS[along] } }, yaxis: { range: [-0.03, 1.03] } }));
}

function evaluationCurve(grid, field, title) {
  const traces = runs.flatMap((run, r) => (run.evals.steps.length ? lines(r, run.evals[along], run.evals[field], field) : []));
  draw(place(grid, `evaluated-${field}`), traces, layout(title, { xaxis: { title: { text: AXIS[along] } } }));
}

const CURVES = [
  ["learning-plots", "success", "Success while collecting (sampled routes)"],
  ["learning-plots", "scaled_return", "Return while collecting (scaled rewards)"],
  ["update-plots", "loss/critic", "Critics' loss", { type: "log" }],
  ["update-plots", "loss/actor", "Actor's loss"],
  ["update-plots", "loss/alpha", "Loss of log alpha"],
  ["update-plots", "policy/alpha", "Entropy coefficient alpha", { type: "log" }],
  ["update-plots", "policy/entropy", "Policy's entropy"],
  ["update-plots", "loss/left_out", "Share of updates that left the task out", { range: [-0.02, 1.02] }],
  ["update-plots", "grad_norm/actor", "Gradient norm of the actor", { type: "log" }],
  ["update-plots", "grad_norm/critic", "Gradient norm of the critics", { type: "log" }],
  ["update-plots", "grad_norm/alpha", "Gradient norm of log alpha", { type: "log" }],
  ["routing-plots", "policy/route_temp", "Route temperature"],
  ["routing-plots", "active_modules", "Active modules while collecting (sampled routes)"],
  ["machine-plots", "rate/updates", "Updates a second, evaluations and saving apart", { rangemode: "tozero" }],
  ["machine-plots", "rate/steps", "Environment steps a second, all tasks", { rangemode: "tozero" }],
  ["machine-plots", "time/learner_idle", "Learner idle (share of the time)", { range: [-0.02, 1.02] }],
  ["machine-plots", "time/collector_idle", "Collector idle (share of the time)", { range: [-0.02, 1.02] }],
  ["machine-plots", "time/rss_mib", "Memory of the process (MiB)", { rangemode: "tozero" }],
  ["machine-plots", "time/workers_rss_mib", "Memory of the simulations' processes (MiB)", { rangemode: "tozero" }],
];

function curve([grid, name, title, yaxis = {}]) {
  const traces = runs.flatMap((run, r) => {
    const points = run.train.curves[name];
    const told = points && points.some((point) => point !== null && (name !== "time/workers_rss_mib" || point[0] > 0));
    return told ? lines(r, run.train[along], points, name) : [];
  });
  if (!traces.length) return;
  draw(place(grid, `curve-${name.replace("/", "-")}`), traces, layout(title, { xaxis: { title: { text: AXIS[along] } }, yaxis }));
}

function drawCurves() {
  successCurve();
  evaluationCurve("learning-plots", "return", "Return, greedy (unscaled rewards)");
  if (runs.some((run) => run.evals.active.some((row) => row.some((n) => n > 0)))) {
    evaluationCurve("routing-plots", "active", "Active modules of greedy evaluations");
  }
  CURVES.forEach(curve);
}

const share = (value) => value.toFixed(2);
const time = (hours) => (hours < 1 ? `${(60 * hours).toFixed(1)} minutes` : `${hours.toFixed(2)} hours`);

function tiles() {
  runs.forEach((run, r) => {
    const tile = element("div", undefined, { class: "tile", "data-run": run.name });
    const head = element("h3", run.name);
    if (many) head.prepend(element("span", "", { class: "swatch", style: `background:${runColour(r)}` }));
    tile.append(head);
    const e = run.evals, last = e.mean.length - 1;
    if (last >= 0) {
      const line = element("div");
      line.append(element("b", share(e.mean[last]), { class: "mean-success" }),
        ` mean success (${share(e.low[last])} to ${share(e.high[last])})`);
      tile.append(line);
    } else tile.append(element("div", "no evaluation so far"));
    const list = element("dl");
    const rows = [["network", run.network], ["seed", run.seed], ["steps a task", run.steps.toLocaleString("en")],
      ["updates", run.updates.toLocaleString("en")], ["time", time(run.hours) + (run.finished ? "" : ", not finished")]];
    if (run.updates) rows.push(["updates a second", (run.updates / run.hours / 3600).toFixed(1)]);
    const memory = (run.train.curves["time/rss_mib"] || []).filter((v) => v !== null).map((v) => v[0]);
    if (memory.length) rows.push(["memory", `${Math.round(Math.max(...memory)).toLocaleString("en")} MiB at the peak`]);
    if (last >= 0) {
      const worst = e.success[last].indexOf(Math.min(...e.success[last]));
      rows.push(["worst task", `${run.tasks[worst]} ${share(e.success[last][worst])}`]);
    }
    for (const [name, value] of rows) list.append(element("dt", name), element("dd", value));
    tile.append(list);
    at("tiles").append(tile);
  });
}

function successTable() {
  const table = at("success"), head = element("tr"), evaluated = runs.filter((run) => run.evals.mean.length);
  if (!evaluated.length) return;
  if (many) {
    const names = element("tr");
    names.append(element("th"), ...evaluated.map((run) =>
      element("th", run.name, { class: "run", colspan: run.evals.module_use[0].length ? 4 : 3 })));
    table.append(names);
  }
  head.append(element("th", "task"));
  for (const run of evaluated) {
    head.append(...["success", "95%", "return", ...(run.evals.module_use[0].length ? ["modules a step"] : [])].map((name) => element("th", name)));
  }
  table.append(head);
  for (const task of [...tasks, "mean"]) {
    const row = element("tr", undefined, task === "mean" ? { class: "mean", "data-task": task } : { "data-task": task });
    row.append(element("td", task));
    for (const run of evaluated) {
      const e = run.evals, last = e.mean.length - 1, k = run.tasks.indexOf(task);
      const average = (list) => list.reduce((a, b) => a + b, 0) / list.length;
      const pick = (list) => (task === "mean" ? average(list) : list[k]);
      const known = task === "mean" || k >= 0;
      const [low, high] = task === "mean" ? [e.low[last], e.high[last]] : known ? e.last_intervals[k] : [0, 0];
      row.append(element("td", known ? share(pick(e.success[last])) : "", { class: "success" }),
        element("td", known ? `${share(low)} to ${share(high)}` : ""),
        element("td", known ? pick(e.return[last]).toFixed(0) : ""));
      if (e.module_use[0].length) row.append(element("td", known ? pick(e.active[last]).toFixed(2) : ""));
    }
    table.append(row);
  }
  const counts = [...new Set(evaluated.map((run) => run.evals.episodes))].join(", ");
  at("intervals").textContent = `The last greedy evaluation, ${counts} episodes a task; success at any step of an episode. ` +
    "Intervals: Wilson's of a task; of the mean, with the tasks given and the episodes drawn. They do not cover the spread between seeds.";
}

function lastSuccess() {
  const evaluated = runs.flatMap((run, r) => (run.evals.mean.length ? [[run, r]] : []));
  if (!evaluated.length) return;
  const traces = evaluated.map(([run, r], i) => {
    const last = run.evals.success[run.evals.success.length - 1], ends = run.evals.last_intervals;
    const shift = many ? 0.5 * (i / (evaluated.length - 1) - 0.5) : 0;
    return { type: "scatter", mode: "markers", name: run.name, x: last, y: run.tasks.map((task) => tasks.indexOf(task) + shift),
      marker: { size: 8, color: runColour(r) }, customdata: run.tasks.map((task, k) => [task, ...ends[k]]),
      error_x: { type: "data", symmetric: false, array: ends.map((end, k) => end[1] - last[k]),
        arrayminus: ends.map((end, k) => last[k] - end[0]), color: runColour(r), thickness: 1.4, width: 3 },
      hovertemplate: "%{customdata[0]}: %{x:.2f} (%{customdata[1]:.2f} to %{customdata[2]:.2f})<extra>" + run.name + "</extra>" };
  });
  draw("last", traces, layout("Success by task, with 95% intervals", {
    height: 90 + Math.max(18, 9 * evaluated.length) * tasks.length, xaxis: { range: [-0.02, 1.02] },
    yaxis: { tickvals: tasks.map((_, k) => k), ticktext: tasks, range: [tasks.length - 0.4, -0.6], zeroline: false } }));
}

/** A task's graph; the arcs of a route's weight, with hover on both arcs and modules. */
function routeGraph(where, routes, task) {
  const k = routes.tasks.indexOf(task), n = routes.n_modules, weight = routes.weight[k], use = routes.module_use[k];
  const blue = css("--accent"), orange = css("--head"), traces = [];
  const reads = (i) => weight[i - 1].map((w, j) => [w, j]).filter(([w]) => w > 0.005).sort((a, b) => b[0] - a[0])
    .map(([w, j]) => `module ${j}: ${w.toFixed(2)}`).join("<br>");
  weight.forEach((sources, slot) => sources.forEach((w, j) => {
    if (w < 0.01) return;
    const i = slot + 1, bend = i === n ? -1 : i === j + 1 ? 0 : 1, x = [], y = [];
    for (let a = 0; a <= 24; a++) {
      x.push((i + j) / 2 - ((i - j) / 2) * Math.cos((Math.PI * a) / 24));
      y.push(bend * ((i - j) / 2) * Math.sin((Math.PI * a) / 24));
    }
    const to = i === n ? "the head" : `module ${i}`;
    traces.push({ x, y, type: "scatter", mode: "lines", opacity: 0.3 + 0.6 * Math.min(1, w),
      line: { color: i === n ? orange : blue, width: 0.7 + 6 * w },
      hovertemplate: `module ${j} into ${to}: weight ${w.toFixed(3)} of a step<extra></extra>` });
  }));
  traces.push({ x: use.map((_, j) => j), y: use.map(() => 0), type: "scatter", mode: "markers+text", text: use.map((_, j) => j),
    textposition: "bottom center", textfont: { size: 10, color: css("--ink") },
    marker: { size: use.map((u) => 6 + 16 * u), color: use.map((u) => (u > 0 ? blue : css("--paper"))), opacity: 1,
      line: { color: use.map((u) => (u > 0 ? css("--paper") : css("--quiet"))), width: 1 } },
    hovertemplate: use.map((u, j) => `module ${j}: runs in ${(100 * u).toFixed(1)}% of steps<br>reads ${j ? reads(j) || "nothing" : "the base"}<extra></extra>`) });
  traces.push({ x: [n], y: [0], type: "scatter", mode: "markers", marker: { symbol: "square", size: 13, color: orange },
    hovertemplate: `head<br>reads ${reads(n)}<extra></extra>` });
  const bare = { showgrid: false, zeroline: false, showticklabels: false };
  draw(where, traces, layout(`${task}: ${routes.active_modules[k].toFixed(2)} modules a step, ${routes.depth[k].toFixed(2)} deep`,
    { height: 280, margin: { l: 8, r: 8, t: 34, b: 8 }, xaxis: { ...bare, range: [-0.7, n + 0.7] },
      yaxis: { ...bare, range: [-n / 2 - 0.4, n / 2 + 0.3] } }));
}

function heatmap(where, z, x, y, title, what, more = {}) {
  draw(where, [{ type: "heatmap", z, x, y, zmin: 0, zmax: 1, colorscale: "Viridis", colorbar: { thickness: 12 },
    hovertemplate: what, xgap: 1, ygap: 1 }], layout(title, { height: 110 + 17 * y.length, ...more,
    xaxis: { type: "category", showgrid: false, ...more.xaxis }, yaxis: { type: "category", autorange: "reversed", showgrid: false } }));
}

const routed = runs.filter((run) => run.routes);

function drawRoutes() {
  if (!routed.length) return;
  const run = routed[Number(at("route-run").value)], routes = run.routes;
  const shown = ["route-first", "route-second"].slice(0, Math.min(2, routes.tasks.length));
  shown.forEach((id, i) => {
    if (!at(id)) {
      const figure = element("figure"), select = element("select", undefined, { id, "aria-label": "task" });
      figure.append(select, element("div", undefined, { id: `${id}-graph`, class: "plot" }));
      at("graphs").append(figure);
      resized.observe(at(`${id}-graph`));
      select.addEventListener("change", drawRoutes);
    }
    const select = at(id), before = select.value;
    select.replaceChildren(...routes.tasks.map((task) => element("option", task)));
    select.value = routes.tasks.includes(before) ? before : routes.tasks[i];
    routeGraph(`${id}-graph`, routes, select.value);
  });
  const modules = routes.module_use[0].map((_, j) => `${j}`), order = routes.order, names = order.map((k) => routes.tasks[k]);
  heatmap(place("shared", "plot-module-use"), routes.module_use, modules, routes.tasks, "Share of steps that run a module",
    "%{y}: module %{x} in %{z:.0%} of steps<extra></extra>");
  if (order.length > 1) {
    heatmap(place("shared", "plot-similarity"), order.map((a) => order.map((b) => 1 - routes.difference[a][b])), names, names,
      "Weight of routes that tasks have in common", "%{y} and %{x}: %{z:.2f}<extra></extra>",
      { height: 190 + 17 * names.length, xaxis: { tickangle: -90 } });
  }
  const saved = routes.multiply_adds.share_saved, entropy = routes.entropy_bits;
  const bars = (x, name, colour) => ({ type: "bar", orientation: "h", x, y: routes.tasks, name, marker: { color: colour },
    hovertemplate: `%{y}: %{x:.3f}<extra>${name}</extra>` });
  const its = { height: 130 + 17 * routes.tasks.length, barmode: "stack", showlegend: true,
    legend: { orientation: "h", y: 1.0, yanchor: "bottom", x: 0 }, margin: { l: 50, r: 12, t: 62, b: 40 },
    yaxis: { type: "category", autorange: "reversed" } };
  draw(place("shared", "plot-entropy"), [bars(entropy.within_a_step, "within a step", css("--accent")),
    bars(entropy.of_the_task.map((bits, k) => bits - entropy.within_a_step[k]), "by change from step to step", css("--head"))],
    layout("Entropy of a route's sources (bits)", its));
  draw(place("shared", "plot-saved"), [bars(saved, "saved", css("--accent"))], layout("Share of the actor's multiply-adds saved",
    { ...its, showlegend: false, xaxis: { range: [0, 1], tickformat: ".0%" } }));
}

/** Settings by dotted name. */
function flat(settings, prefix = "") {
  return Object.entries(settings).flatMap(([name, value]) =>
    value !== null && typeof value === "object" && !Array.isArray(value) ? flat(value, `${prefix}${name}.`) : [[prefix + name, JSON.stringify(value)]]);
}

/** What a run was trained with, a line for each stretch of steps that one session made. */
function trainedWith(run) {
  if (!run.sessions.length) return ["versions and machine: not recorded"];
  return run.sessions.map((session) => {
    const versions = Object.entries(session.versions).map(([name, version]) => `${name} ${version}`).join(", ");
    const from = session.steps ? `from ${session.steps.toLocaleString("en")} steps a task on, ` : "";
    const ranks = session.ranks > 1 ? `${session.ranks} ranks, ` : "";
    return `${from}${session.at}: ${ranks}${session.machine}; ${versions}`;
  });
}

function settings() {
  at("commands").textContent = [...runs.flatMap((run) => [`d2r train ${run.path}/config.json`, `d2r eval ${run.path}`]),
    `d2r report ${runs.map((run) => run.path).join(" ")}`].join("\n");
  for (const run of runs) for (const line of trainedWith(run)) at("trained").append(element("li", many ? `${run.name}: ${line}` : line));
  at("written").textContent = "A run repeats with equal numbers where it is --deterministic, with the same versions on the same kind "
    + `of machine. This page was written ${data.written}.`;
  if (many) {
    const all = runs.map((run) => new Map(flat(run.config))), names = [...new Set(all.flatMap((map) => [...map.keys()]))];
    const differing = names.filter((name) => new Set(all.map((map) => map.get(name))).size > 1);
    const head = element("tr");
    head.append(element("th", "settings that differ"), ...runs.map((run) => element("th", run.name)));
    if (differing.length) at("differences").append(head);
    for (const name of differing) {
      const row = element("tr");
      row.append(element("td", name), ...all.map((map) => element("td", map.get(name) ?? "")));
      at("differences").append(row);
    }
  }
  for (const run of runs) {
    const box = element("details");
    box.append(element("summary", `config.json of ${run.name}`), element("pre", JSON.stringify(run.config, null, 2)));
    at("configs").append(box);
  }
}

function showChosen() {
  const named = many ? runs.map((run, r) => [run.name, runColour(r)]) : [...tasks.filter((task) => chosen.has(task)).map((task) =>
    [task, taskColour(task)]), ["mean", "var(--ink)"]];
  at("legend").replaceChildren(...(named.length > 14 ? [] : named.map(([name, colour]) => {
    const label = element("span", name);
    label.prepend(element("span", "", { class: "swatch", style: `background:${colour}` }));
    return label;
  })));
  at("chosen").textContent = chosen.size === tasks.length ? "all" : chosen.size ? `${chosen.size} of ${tasks.length}` : "means only";
  for (const box of at("tasks").querySelectorAll("input")) box.checked = chosen.has(box.value);
}

function begin() {
  at("title").textContent = many ? `${runs.length} runs` : runs[0].name;
  at("subtitle").textContent = `${tasks.length} task${tasks.length > 1 ? "s" : ""}: ${tasks.slice(0, 12).join(", ")}${tasks.length > 12 ? ", …" : ""}`;
  for (const task of tasks) {
    const label = element("label"), box = element("input", undefined, { type: "checkbox", value: task });
    box.addEventListener("change", () => { chosen[box.checked ? "add" : "delete"](task); showChosen(); drawCurves(); });
    label.append(box, element("span", "", { class: "swatch", style: `background:${many ? "transparent" : taskColour(task)}` }), task);
    at("tasks").append(label);
  }
  at("all").addEventListener("click", () => { tasks.forEach((task) => chosen.add(task)); showChosen(); drawCurves(); });
  at("none").addEventListener("click", () => { chosen.clear(); showChosen(); drawCurves(); });
  at("along").addEventListener("change", (event) => { along = event.target.value; drawCurves(); });
  at("smoothing").addEventListener("input", (event) => {
    smoothing = Number(event.target.value);
    at("smoothed").textContent = `${smoothing}`;
    drawCurves();
  });
  const grouped = runs.map((run) => run.train.records_a_point), most = Math.max(...grouped);
  at("lines").textContent = (many ? "A colour a run; thick: the mean over tasks, thin: the chosen tasks." :
    "Thick: the mean over tasks, thin: the chosen tasks.") + (most > 1 ? ` A point of what training logged is the mean of up to ${most} records.` : "");
  routed.forEach((run, i) => at("route-run").append(element("option", run.name, { value: i })));
  at("of-run").hidden = routed.length < 2;
  at("routes").hidden = !routed.length;
  const lacking = runs.filter((run) => !run.routes);
  at("no-routes").textContent = lacking.map((run) => run.network === "d2r" ?
    `${run.name}: no routes of its newest checkpoint here; d2r routes ${run.path} records them.` :
    `${run.name}: network ${run.network} has no routes.`).join(" ");
  showChosen();
  tiles();
  successTable();
  settings();
  drawAll();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
  document.body.dataset.drawn = "yes";
}

function drawAll() {
  lastSuccess();
  drawCurves();
  drawRoutes();
}

begin();
