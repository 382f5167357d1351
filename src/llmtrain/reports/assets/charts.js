"use strict";
// Charts: which there are, what is on them, and how the reader sees them. Plotly draws.

const COLORS_ON_DARK = ["#7b9bf2", "#f5a742", "#f27d92", "#4cc9ae", "#b59ae0", "#82d173", "#67bdeb", "#c99a70", "#e58fd0", "#a5abb5"];
const COLORS = ["#4269d0", "#e8890c", "#e0526b", "#1fa187", "#9467bd", "#4fae3f", "#2e9fd6", "#a8703e", "#d161b5", "#80868f"];
const HIDDEN_METRICS = new Set(["train/epoch", "train/tokens_total", "perf/compile_sec"]);
const SECTIONS = [
  ["learning", "Learning"],
  ["speed", "Speed"],
  ["machine", "Machine"],
  ["evaluation", "Evaluations while training"],
  ["other", "Other metrics"],
];
// Metrics that share a chart, in this order. Any other metric has one of its own.
const KNOWN_CHARTS = [
  { section: "learning", title: "Loss", unit: "nats a token", keys: ["train/loss", "val/loss"], wide: true, smooth: true },
  { section: "learning", title: "Learning rate", keys: ["train/lr"] },
  { section: "learning", title: "Gradient norm", unit: "before clipping", keys: ["train/grad_norm"], smooth: true },
  { section: "learning", title: "Bits per byte", unit: "validation", keys: ["val/bits_per_byte"] },
  { section: "learning", title: "Perplexity", unit: "validation", keys: ["val/perplexity"] },
  { section: "speed", title: "Throughput", unit: "tokens a second, all ranks", keys: ["train/tokens_per_sec"], smooth: true, zero: true },
  { section: "speed", title: "Model FLOPs utilisation", keys: ["train/mfu"], smooth: true, zero: true, percent: true },
  { section: "speed", title: "Time a step", unit: "seconds", keys: ["train/step_time_sec"], smooth: true, zero: true },
  {
    section: "speed",
    title: "Where the time goes",
    keys: ["perf/goodput", "perf/data_wait", "perf/checkpoint_stall"],
    smooth: true,
    zero: true,
    percent: true,
  },
  { section: "machine", title: "GPU", unit: "% of the time busy", keys: ["system/gpu_percent"], smooth: true, zero: true },
  { section: "machine", title: "GPU memory", unit: "GB", keys: ["system/gpu_memory_gb"], zero: true },
  { section: "machine", title: "GPU power", unit: "W", keys: ["system/gpu_power_watts"], smooth: true, zero: true },
  { section: "machine", title: "GPU temperature", unit: "°C", keys: ["system/gpu_temperature_celsius"], smooth: true },
  { section: "machine", title: "Processor and memory", unit: "% of the machine", keys: ["system/cpu_percent", "system/memory_percent"], smooth: true, zero: true },
  { section: "machine", title: "Processor of this process", unit: "% of one core", keys: ["system/process_cpu_percent"], smooth: true, zero: true },
  { section: "machine", title: "Memory of this process", unit: "GB", keys: ["system/rss_gb", "system/peak_rss_gb"], zero: true },
  { section: "machine", title: "Disk", unit: "MB a second", keys: ["system/disk_read_mb_per_sec", "system/disk_written_mb_per_sec"], smooth: true, zero: true },
  { section: "machine", title: "Disk, free", unit: "GB", keys: ["system/disk_free_gb"] },
  { section: "machine", title: "Network", unit: "MB a second", keys: ["system/net_received_mb_per_sec", "system/net_sent_mb_per_sec"], smooth: true, zero: true },
];
const SECTION_OF_PREFIX = { system: "machine", perf: "speed", eval: "evaluation", train: "learning", val: "learning" };
const EVENT_LOOKS = {
  saved: { symbol: "triangle-up", sign: "▲", color: "muted" },
  not_saved: { symbol: "triangle-down", sign: "▼", color: "bad" },
  resumed: { symbol: "circle", sign: "●", color: "good", line: "dash" },
  stopped: { symbol: "square", sign: "■", color: "muted", line: "dot" },
  skipped: { symbol: "x", sign: "✕", color: "bad", line: "solid" },
  "non-finite": { symbol: "x", sign: "✕", color: "bad" },
};
// Several runs differ by color, as the chips say; the metrics that share a chart then differ by these.
const DASHES = ["solid", "dot", "dash", "dashdot", "longdash"];

// The metrics of several ranks or devices share a chart: system/rss_gb/rank_3 → system/rss_gb, a/gpu_0/b → a/gpu/b.
function chartKey(name) {
  return name.replace(/\/(rank_\d+|min|max)$/, "").replace(/(rank|gpu|device|node)[_-]?\d+/g, "$1");
}

function chartsOf(runs) {
  const names = [...new Set(runs.flatMap((run) => Object.keys(run.curves)))].filter((name) => !HIDDEN_METRICS.has(name));
  const byKey = new Map();
  for (const name of names) byKey.set(chartKey(name), [...(byKey.get(chartKey(name)) ?? []), name]);
  const charts = KNOWN_CHARTS.map((chart) => ({ ...chart, names: chart.keys.flatMap((key) => byKey.get(key) ?? []) }));
  const known = new Set(KNOWN_CHARTS.flatMap((chart) => chart.keys));
  for (const [key, members] of byKey) {
    if (!known.has(key)) charts.push(chartOfUnknown(key, members));
  }
  return charts.filter((chart) => chart.names.length);
}

function chartOfUnknown(key, names) {
  const [prefix, ...rest] = key.split("/");
  return {
    section: SECTION_OF_PREFIX[prefix] ?? "other",
    title: rest.length ? rest.join(" ").replaceAll("_", " ") : key,
    unit: rest.length && !SECTION_OF_PREFIX[prefix] ? prefix : "",
    names,
    smooth: true,
  };
}

// -- the reader's choices ----------------------------------------------------------------------------------------------

const view = { x: "step", smoothing: 0, raw: true, logX: false, logY: false, events: true, hidden: new Set() };

// To read a style, the browser computes those of the whole page: so each color is read once, until the theme changes.
const themeColors = new Map();

function color(name) {
  if (!themeColors.has(name)) themeColors.set(name, getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim());
  return themeColors.get(name);
}

function lineColor(number) {
  return (isDark() ? COLORS_ON_DARK : COLORS)[number % COLORS.length];
}

function runColor(run) {
  return lineColor(run.number);
}

// -- points ------------------------------------------------------------------------------------------------------------

function interpolate(at, xs, ys) {
  if (!xs.length) return null;
  let low = 0;
  let high = xs.length - 1;
  if (at <= xs[low]) return ys[low];
  if (at >= xs[high]) return ys[high];
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (xs[middle] <= at) low = middle;
    else high = middle;
  }
  return ys[low] + ((ys[high] - ys[low]) * (at - xs[low])) / (xs[high] - xs[low]);
}

const TIME_UNITS = [["days", 86400, 3 * 86400], ["hours", 3600, 2 * 3600], ["minutes", 60, 180], ["seconds", 1, 0]];

function timeUnit(runs) {
  const longest = Math.max(0, ...runs.flatMap((run) => Object.values(run.curves).map((curve) => curve.seconds.at(-1) ?? 0)));
  return TIME_UNITS.find(([, , atLeast]) => longest >= atLeast);
}

function xValues(run, points, unit) {
  if (view.x === "time") return points.seconds.map((seconds) => seconds / unit[1]);
  if (view.x === "tokens") return points.step.map((step) => interpolate(step, run.tokens_by_step.step, run.tokens_by_step.tokens));
  return points.step;
}

// Exponential moving average whose weights add up to 1 from the first point on.
function smoothed(values, smoothing) {
  let sum = 0;
  let weight = 0;
  return values.map((value) => {
    sum = smoothing * sum + (1 - smoothing) * value;
    weight = smoothing * weight + (1 - smoothing);
    return sum / weight;
  });
}

// -- traces ------------------------------------------------------------------------------------------------------------

// Plotly reads a few tags in names.
function plain(text) {
  return visible(String(text)).replaceAll("&", "&amp;").replaceAll("<", "&lt;");
}

function tracesOf(chart, runs, unit) {
  const shown = runs.filter((run) => !view.hidden.has(run.id));
  const several = runs.length > 1;
  const traces = several && chart.names.length > 1 ? dashLegend(chart) : [];
  for (const run of shown) {
    const names = chart.names.filter((name) => run.curves[name]?.value.length);
    names.forEach((name, index) => {
      const curve = run.curves[name];
      const line = several ? runColor(run) : lineColor(index);
      const short = shortName(name);
      const label = plain(several ? (chart.names.length > 1 ? `${run.label} ${short}` : run.label) : short);
      const few = curve.value.length <= 40;
      const format = chart.percent ? ".1%" : ".5~g";
      const base = { type: "scatter", x: xValues(run, curve, unit), y: curve.value, name: label, showlegend: !several };
      const dash = several ? DASHES[chart.names.indexOf(name) % DASHES.length] : "solid";
      // A value of an evaluation is measured on all of its data: a smooth curve would end where none was.
      const isMeasured = /^(val|eval)\//.test(name);
      if (!chart.smooth || isMeasured || few || view.smoothing === 0) {
        traces.push({
          ...base,
          mode: few ? "lines+markers" : "lines",
          line: { color: line, width: 1.8, dash },
          marker: { size: 6 },
          hovertemplate: `%{y:${format}}`,
        });
        return;
      }
      if (view.raw) {
        traces.push({
          ...base,
          mode: "lines",
          line: { color: line, width: 1 },
          opacity: 0.35,
          showlegend: false,
          hovertemplate: `%{y:${format}}`,
        });
      }
      const points = curve.means ?? curve;
      traces.push({
        ...base,
        x: xValues(run, points, unit),
        y: smoothed(points.value, view.smoothing),
        mode: "lines",
        line: { color: line, width: 2.2, dash },
        name: `${label} (smooth)`,
        hovertemplate: `%{y:${format}}`,
      });
    });
  }
  return traces;
}

function shortName(name) {
  return name.replace(/^(system|perf)\//, "");
}

// Entries of the legend alone: which dash is which metric, in no run's color.
function dashLegend(chart) {
  return chart.names.map((name, index) => ({
    type: "scatter",
    mode: "lines",
    x: [null],
    y: [null],
    name: plain(shortName(name)),
    line: { color: color("muted"), width: 1.8, dash: DASHES[index % DASHES.length] },
    hoverinfo: "skip",
    showlegend: true,
  }));
}

function eventTraces(chart, runs, unit) {
  const traces = [];
  const shapes = [];
  if (!view.events) return { traces, shapes };
  for (const run of runs.filter((one) => !view.hidden.has(one.id))) {
    const clock = run.curves["train/loss"] ?? Object.values(run.curves)[0];
    if (!clock) continue;
    for (const [kind, look] of Object.entries(EVENT_LOOKS)) {
      const events = run.events.filter((event) => event.event === kind);
      if (!events.length || (!chart.wide && !look.line)) continue;
      const points = {
        step: events.map((event) => event.step),
        seconds: events.map((event) => interpolate(event.step, clock.step, clock.seconds)),
      };
      const xs = xValues(run, points, unit);
      const shade = runs.length > 1 ? runColor(run) : color(look.color);
      traces.push({
        type: "scatter",
        mode: "markers",
        x: xs,
        y: xs.map(() => 0.015),
        yaxis: "y2",
        marker: { symbol: look.symbol, size: chart.wide ? 9 : 7, color: shade },
        name: plain(runs.length > 1 ? `${run.label} ${kind}` : kind),
        text: events.map((event) => plain([kind, event.details].filter(Boolean).join(": "))),
        hovertemplate: "%{text}<extra></extra>",
        showlegend: false,
      });
      if (look.line) {
        for (const x of xs) {
          shapes.push({ type: "line", x0: x, x1: x, y0: 0, y1: 1, yref: "paper", line: { color: shade, width: 1, dash: look.line } });
        }
      }
    }
  }
  return { traces, shapes };
}

function layoutOf(chart, unit, shapes, numTraces) {
  const axis = {
    gridcolor: color("grid"),
    zeroline: false,
    linecolor: color("line"),
    tickfont: { size: 11 },
    automargin: true,
  };
  const title = { step: "step", tokens: "tokens", time: unit[0] }[view.x];
  return {
    font: { family: "inherit", color: color("muted"), size: 12 },
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    margin: { l: 46, r: 12, t: numTraces > 1 ? 30 : 8, b: 36 },
    height: chart.wide ? 380 : 230,
    hovermode: "x unified",
    hoverlabel: { bgcolor: color("panel"), bordercolor: color("line"), font: { color: color("ink"), size: 12 }, namelength: 40 },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: color("line"), activecolor: color("accent") },
    dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom",
    showlegend: numTraces > 1,
    legend: { orientation: "h", x: 0, xanchor: "left", y: 1.02, yanchor: "bottom", font: { size: 11.5 } },
    xaxis: {
      ...axis,
      type: view.logX ? "log" : "linear",
      title: { text: title, font: { size: 11 }, standoff: 6 },
      unifiedhovertitle: { text: `${title} %{x:${view.x === "time" ? ".2f" : view.x === "tokens" ? ".4~s" : ",.0f"}}` },
      tickformat: view.x === "tokens" ? "~s" : "",
      showspikes: true,
      spikemode: "across",
      spikethickness: 1,
      spikedash: "solid",
      spikecolor: color("line"),
    },
    yaxis: {
      ...axis,
      type: view.logY ? "log" : "linear",
      rangemode: chart.zero && !view.logY ? "tozero" : "normal",
      tickformat: chart.percent ? ".0%" : "",
      exponentformat: "SI",
    },
    yaxis2: { overlaying: "y", range: [0, 1], fixedrange: true, visible: false },
    shapes,
  };
}

const PLOT_OPTIONS = {
  responsive: true,
  displaylogo: false,
  scrollZoom: false,
  // Named one by one: among Plotly's own choice is one that sends the chart to its makers.
  modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]],
};

// -- drawing -----------------------------------------------------------------------------------------------------------

// Safari has no requestIdleCallback.
const whenIdle = window.requestIdleCallback?.bind(window) ?? ((act) => setTimeout(act, 30));

// All charts of a page. A chart is drawn at once when it comes into the window, and one that is near it when the
// browser has nothing else to do, so that the first view waits for no other chart. Every change redraws drawn charts.
class Charts {
  constructor(runs) {
    this.runs = runs;
    this.unit = timeUnit(runs);
    this.boxes = new Map();
    this.drawn = new Set();
    this.near = new Set();
    this.watchers = [
      this.watch("0px", (box) => this.draw(box)),
      this.watch("600px", (box) => {
        if (!this.near.size) whenIdle(() => this.drawNear());
        this.near.add(box);
      }),
    ];
  }

  // Calls `act` with each chart that comes within `rootMargin` of the window, until it is drawn.
  watch(rootMargin, act) {
    return new IntersectionObserver(
      (entries) => {
        for (const entry of entries) if (entry.isIntersecting && !this.drawn.has(entry.target)) act(entry.target);
      },
      { rootMargin },
    );
  }

  // One chart at a time, so that the page answers in between.
  drawNear() {
    const [box] = this.near;
    this.near.delete(box);
    if (!this.drawn.has(box)) this.draw(box);
    if (this.near.size) whenIdle(() => this.drawNear());
  }

  sections() {
    const charts = chartsOf(this.runs);
    return SECTIONS.map(([id, title]) => {
      const cards = charts.filter((chart) => chart.section === id).map((chart) => this.card(chart));
      return cards.length ? section(id, title, element("div", { class: "charts" }, cards)) : null;
    });
  }

  card(chart) {
    const box = element("div", { class: "plot" });
    if (chart.wide) chart.marks = element("span", { class: "marks" });
    this.boxes.set(box, chart);
    for (const watcher of this.watchers) watcher.observe(box);
    return element(
      "figure",
      { class: chart.wide ? "card wide" : "card" },
      element("figcaption", {}, chart.title, chart.unit ? element("small", {}, chart.unit) : null, chart.marks),
      box,
    );
  }

  draw(box) {
    const chart = this.boxes.get(box);
    const traces = tracesOf(chart, this.runs, this.unit);
    const events = eventTraces(chart, this.runs, this.unit);
    const numNamed = traces.filter((trace) => trace.showlegend !== false).length;
    this.drawn.add(box);
    for (const watcher of this.watchers) watcher.unobserve(box);
    chart.marks?.replaceChildren(...this.marks());
    const layout = layoutOf(chart, this.unit, events.shapes, numNamed);
    // The reader's own zoom stays as long as the axes mean the same.
    layout.uirevision = [view.x, view.logX, view.logY].join();
    return Plotly.react(box, [...traces, ...events.traces], layout, PLOT_OPTIONS);
  }

  // What the signs on the curves mean, of those that are there.
  marks() {
    const seen = new Set(view.events ? this.runs.flatMap((run) => run.events.map((event) => event.event)) : []);
    return Object.entries(EVENT_LOOKS)
      .filter(([kind]) => seen.has(kind))
      .map(([kind, look]) => element("span", {}, element("span", { style: `color:${color(look.color)}` }, look.sign), ` ${kind}`));
  }

  redraw() {
    this.unit = timeUnit(this.runs);
    for (const box of this.drawn) this.draw(box);
  }
}
