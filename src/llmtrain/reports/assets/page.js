"use strict";
// The page about one run or several: from the document that Python made (reports/document.py) to elements.

const MANY_POINTS = 60;

function startReport() {
  const data = JSON.parse(document.getElementById("document").textContent);
  new Page(document.getElementById("page"), data);
}

class Page {
  // For the live pages, `extras` are elements for the head, and `keepView` leaves the reader's choices as they are.
  constructor(root, data, { extras = [], keepView = false } = {}) {
    this.root = root;
    this.data = data;
    data.runs.forEach((run, number) => {
      run.number = number;
      run.label = run.id;
    });
    const longest = Math.max(0, ...data.runs.flatMap((run) => Object.values(run.curves).map((curve) => curve.count)));
    if (!keepView) view.smoothing = longest > MANY_POINTS ? 0.8 : 0;
    this.charts = new Charts(data.runs);
    this.results = element("div", { id: "run-results" });
    this.evaluations = element("div");
    this.samples = element("div");
    this.happenings = element("div");
    const parts = [
      this.head(extras),
      this.problems(),
      this.results,
      data.runs.length > 1 ? configSection(data) : null,
      element("div", {}, this.toolbar(), ...this.charts.sections().filter(Boolean)),
      this.evaluations,
      this.samples,
      data.runs.length > 1 ? null : configSection(data),
      environmentSection(data.runs),
      dataSection(data.runs),
      this.happenings,
      element("footer", {}, `llmtrain ${data.version}, made ${when(data.made)}`),
    ];
    root.replaceChildren(...parts.filter(Boolean));
    this.refreshTables();
    this.refreshSamples();
  }

  refreshSamples() {
    this.samples.replaceChildren(...[samplesSection(this.data.runs)].filter(Boolean));
  }

  // What changes while a run goes on.
  refreshTables() {
    this.results.replaceChildren(...(this.data.runs.length === 1 ? oneRun(this.data.runs[0]) : severalRuns(this.data.runs)));
    this.evaluations.replaceChildren(...[evaluationsSection(this.data.runs)].filter(Boolean));
    this.happenings.replaceChildren(...[eventsSection(this.data.runs)].filter(Boolean));
  }

  head(extras) {
    const { runs } = this.data;
    const [run] = runs;
    const alone = runs.length === 1;
    return element(
      "header",
      { class: "head" },
      element(
        "div",
        {},
        element("h1", {}, alone ? run.name || run.id : `${runs.length} runs`),
        alone
          ? element(
              "p",
              { class: "under" },
              stateBadge(run.state),
              element("code", {}, run.id),
              run.time ? element("span", {}, when(run.time)) : null,
              ...(Array.isArray(run.tags) ? run.tags : []).map((tag) => element("span", { class: "tag" }, formatted(tag))),
            )
          : element("p", { class: "under" }, runs.map((one) => one.name || one.id).join(" · ")),
        alone && run.notes ? element("p", { class: "notes" }, formatted(run.notes)) : null,
      ),
      element("div", { class: "buttons" }, extras, themeButton(() => this.recolor())),
    );
  }

  recolor() {
    themeColors.clear();
    for (const dot of this.root.querySelectorAll("i[data-color]")) dot.style.background = lineColor(Number(dot.dataset.color));
    this.charts.redraw();
  }

  chips() {
    return element(
      "div",
      { class: "chips flat", id: "chips" },
      this.data.runs.map((run) => {
        const chip = element(
          "button",
          {
            class: "chip",
            "aria-pressed": "true",
            title: "Show or hide its curves",
            onclick: () => {
              if (!view.hidden.delete(run.id)) view.hidden.add(run.id);
              chip.setAttribute("aria-pressed", String(!view.hidden.has(run.id)));
              this.charts.redraw();
            },
          },
          dot(run.number),
          run.label,
        );
        return chip;
      }),
    );
  }

  problems() {
    const lines = this.data.runs.flatMap((run) => run.problems.map((problem) => `${run.label}: ${problem}`));
    return element("div", { class: "problems" }, lines.map((line) => element("p", {}, line)));
  }

  toolbar() {
    const redraw = () => this.charts.redraw();
    const choice = (value, label) =>
      element(
        "label",
        {},
        element("input", {
          type: "radio",
          name: "x",
          value,
          checked: view.x === value,
          onchange: () => {
            view.x = value;
            redraw();
          },
        }),
        element("span", {}, label),
      );
    const toggle = (key, label) =>
      element(
        "label",
        { class: "toggle" },
        element("input", {
          type: "checkbox",
          id: `toggle-${key}`,
          checked: view[key],
          onchange: (event) => {
            view[key] = event.target.checked;
            redraw();
          },
        }),
        element("span", {}, label),
      );
    return element(
      "nav",
      { class: "toolbar", "aria-label": "How curves are drawn" },
      element("fieldset", { class: "choice" }, choice("step", "Steps"), choice("tokens", "Tokens"), choice("time", "Time")),
      element(
        "label",
        { class: "slider" },
        "Smoothing",
        element("input", {
          type: "range",
          id: "smoothing",
          min: 0,
          max: 0.99,
          step: 0.01,
          value: view.smoothing,
          oninput: (event) => {
            view.smoothing = Number(event.target.value);
            redraw();
          },
        }),
      ),
      toggle("raw", "Raw"),
      toggle("logY", "Log y"),
      toggle("logX", "Log x"),
      toggle("events", "Events"),
      this.data.runs.length > 1 ? this.chips() : null,
    );
  }
}

// A spot of a curve's color, which changes with the theme.
function dot(number, attributes = { style: `background:${lineColor(number)}` }) {
  return element("i", { "data-color": number, ...attributes });
}

// -- what a run came to ------------------------------------------------------------------------------------------------

function lastOf(run, name) {
  return run.curves[name]?.value.at(-1) ?? null;
}

const RESULTS = [
  ["loss", "Loss", (run) => run.loss],
  ["val_loss", "Val loss", (run) => run.val_loss],
  ["best_val_loss", "Best val loss", (run) => run.best_val_loss],
  ["bits_per_byte", "Bits per byte", (run) => run.bits_per_byte],
  ["steps", "Steps", (run) => run.steps],
  ["tokens", "Tokens", (run) => run.tokens, shortCount],
  ["tokens_per_sec", "Tokens/s", (run) => run.summary.tokens_per_sec ?? lastOf(run, "train/tokens_per_sec"), shortCount],
  ["mfu", "MFU", (run) => lastOf(run, "train/mfu"), percent],
  ["seconds", "Time", (run) => run.seconds, shortDuration],
  ["goodput", "Goodput", (run) => run.summary.goodput, percent],
  ["parameters", "Parameters", (run) => run.summary.parameters?.total, shortCount],
  ["trainable", "Trainable", trainableShare, shortCount],
  ["peak_memory", "Peak memory", (run) => run.summary.peak_memory_bytes, shortBytes],
  ["skipped", "Skipped steps", (run) => run.summary.skipped_steps || null],
  ["processes", "Processes", (run) => (run.summary.world_size > 1 ? run.summary.world_size : null)],
];

// Where only a part of the parameters is trained.
function trainableShare(run) {
  const { total, trainable } = run.summary.parameters ?? {};
  return trainable === total ? null : trainable;
}

function oneRun(run) {
  const tiles = RESULTS.filter(([, , value]) => ![null, undefined].includes(value(run))).map(([key, label, value, write]) =>
    element("div", { class: "tile", "data-metric": key }, element("b", {}, (write ?? formatted)(value(run))), element("span", {}, label)),
  );
  return [element("div", { class: "tiles" }, tiles), timeBar(run)].filter(Boolean);
}

function severalRuns(runs) {
  const rows = RESULTS.map(([key, label, value, write]) => ({ key, label, values: runs.map(value), write: write ?? formatted })).filter(
    (row) => row.values.some((value) => value !== null && value !== undefined),
  );
  const best = rows.map((row) => {
    const known = row.values.filter((value) => typeof value === "number");
    const better = BETTER_WHEN_LOW.test(row.key) ? Math.min : BETTER_WHEN_HIGH.has(row.key) ? Math.max : null;
    return better && new Set(known).size > 1 ? 1 + row.values.indexOf(better(...known)) : -1;
  });
  return [
    section(
      "results",
      "Results",
      table(
        ["", ...runs.map(runHead)],
        [
          ["State", ...runs.map((run) => stateBadge(run.state))],
          ...rows.map((row) => [row.label, ...row.values.map((value) => (value === null || value === undefined ? "–" : row.write(value)))]),
        ],
        { marked: (row, column) => row > 0 && best[row - 1] === column },
      ),
    ),
  ];
}

function runHead(run) {
  return element("span", { class: "runhead" }, dot(run.number), run.label);
}

const BETTER_WHEN_HIGH = new Set(["tokens_per_sec", "mfu", "goodput"]);
const ACTIVITIES = ["step", "compile", "data", "evaluation", "saving", "other"];

function timeBar(run) {
  const { time_spent: spent, resumed_from_step: resumed } = run.summary;
  if (!spent) return null;
  const names = [...new Set([...ACTIVITIES, ...Object.keys(spent)])].filter((name) => spent[name] > 0);
  const total = names.reduce((sum, name) => sum + spent[name], 0);
  if (!(total > 0)) return null;
  return element(
    "div",
    { class: "spent" },
    element(
      "div",
      { class: "bar" },
      names.map((name, index) =>
        dot(index, { style: `flex-grow:${spent[name] / total};background:${lineColor(index)}`, title: name }),
      ),
    ),
    element(
      "p",
      { class: "key" },
      // The process that ended: of those before it nothing is told.
      Number.isInteger(resumed) ? element("span", {}, `since step ${formatted(resumed)}:`) : null,
      names.map((name, index) =>
        element(
          "span",
          {},
          dot(index),
          `${name} ${shortDuration(spent[name])} (${percent(spent[name] / total)})`,
        ),
      ),
    ),
  );
}

// -- samples -----------------------------------------------------------------------------------------------------------

function samplesSection(runs) {
  return section("samples", "Samples", ...runs.filter((run) => run.samples.length).map((run) => samplesOf(run, runs.length > 1)));
}

function samplesOf(run, named) {
  const steps = [...new Set(run.samples.map((sample) => sample.step))];
  const shown = element("div", { class: "samples" });
  const label = element("output");
  const show = (index) => {
    label.textContent = `after step ${formatted(steps[index])}`;
    shown.replaceChildren(
      ...run.samples
        .filter((sample) => sample.step === steps[index])
        .map((sample) => element("pre", {}, element("span", { class: "prompt" }, sample.prompt), sample.turn ? "\n\n" : null, sample.completion)),
    );
  };
  const slider = element("input", {
    type: "range",
    min: 0,
    max: steps.length - 1,
    value: steps.length - 1,
    "aria-label": "Step",
    oninput: (event) => show(Number(event.target.value)),
  });
  show(steps.length - 1);
  return element("div", {}, named ? element("h3", {}, runHead(run)) : null, element("p", { class: "slider" }, slider, label), shown);
}

// -- config, environment, data -----------------------------------------------------------------------------------------

function configSection(data) {
  const { runs } = data;
  const keys = [...new Set(runs.flatMap((run) => Object.keys(run.config)))];
  if (!keys.length) return null;
  const head = runs.length > 1 ? ["", ...runs.map(runHead)] : null;
  const list = element("div");
  const filter = (text) => {
    const wanted = text.trim().toLowerCase();
    const found = keys.filter(
      (key) => !wanted || key.toLowerCase().includes(wanted) || runs.some((run) => formatted(run.config[key]).toLowerCase().includes(wanted)),
    );
    list.replaceChildren(
      table(head && ["", ...runs.map(runHead)], found.map((key) => [element("code", {}, key), ...runs.map((run) => configValue(run, key))]), { numeric: false }),
    );
  };
  filter("");
  const all = element(
    "details",
    {},
    element("summary", {}, runs.length > 1 ? "All keys" : `All ${keys.length} keys`),
    element("input", { type: "search", placeholder: "Find a key or a value", "aria-label": "Find a key or a value", oninput: (event) => filter(event.target.value) }),
    list,
  );
  const differences =
    runs.length < 2
      ? null
      : data.differences.length
        ? table(head, data.differences.map((row) => [element("code", {}, row.key), ...row.values.map((value) => (value === null ? "–" : formatted(value)))]), { numeric: false })
        : element("p", {}, "The configs are the same.");
  const written = runs.length === 1 && runs[0].config_as_written;
  return section(
    "config",
    runs.length > 1 ? "Config: where the runs differ" : "Config",
    written ? element("pre", { class: "written" }, written.trim()) : null,
    differences,
    all,
  );
}

function configValue(run, key) {
  const value = run.config[key];
  if (value === undefined) return "–";
  return element("code", { class: value === null ? "null" : "" }, value === null ? "null" : formatted(value, 9));
}

function environmentSection(runs) {
  const titles = [...new Set(runs.flatMap((run) => Object.keys(run.environment)))];
  const parts = titles.map((title) => {
    const columns = runs.map((run) => new Map(flatten(run.environment[title] ?? {})));
    const keys = [...new Set(columns.flatMap((column) => [...column.keys()]))].filter((key) =>
      columns.some((column) => ![null, undefined].includes(column.get(key))),
    );
    return element(
      "details",
      { open: title === "Start" },
      element("summary", {}, title),
      table(
        runs.length > 1 ? ["", ...runs.map(runHead)] : null,
        keys.map((key) => [key, ...columns.map((column) => environmentValue(key, column.get(key)))]),
        { numeric: false },
      ),
    );
  });
  return section("environment", "Environment", ...parts);
}

function environmentValue(key, value) {
  if (/bytes$/.test(key) && typeof value === "number") return shortBytes(value);
  if (key === "started") return when(value);
  if (Array.isArray(value)) return value.length ? value.map((one) => (one && one.name ? one.name : formatted(one))).join(", ") : "none";
  return value;
}

function dataSection(runs) {
  const shared = runs.every((run) => JSON.stringify(run.data) === JSON.stringify(runs[0].data));
  const parts = (shared ? runs.slice(0, 1) : runs).flatMap((run) => [
    shared ? null : element("h3", {}, runHead(run)),
    ...run.data.map(dataSource),
  ]);
  return section("data", "Data", ...parts);
}

function dataSource(source) {
  if (!source.splits) return element("p", {}, `${source.split}: `, element("code", {}, source.source));
  const rejected = Object.entries(source.counts).filter(([name, count]) => count && !["read", "train", "val"].includes(name));
  return element(
    "div",
    {},
    element(
      "p",
      {},
      element("code", {}, source.source),
      `, made by ${source.made_by}. Tokenizer: ${source.tokenizer.kind} of ${formatted(source.tokenizer.vocab_size)} tokens, `,
      element("code", { title: source.tokenizer.sha256 }, `sha256 ${source.tokenizer.sha256.slice(0, 12)}…`),
    ),
    table(
      ["split", "documents", "tokens", "text", "shards"],
      Object.entries(source.splits).map(([name, split]) => [name, split.documents, split.tokens, shortBytes(split.bytes), split.shards]),
    ),
    rejected.length ? element("p", {}, `Left out: ${rejected.map(([name, count]) => `${formatted(count)} ${name.replace("_", " ")}`).join(", ")}.`) : null,
    element(
      "details",
      {},
      element("summary", {}, "Inputs and options"),
      table(
        ["input", "files", "size", "sha256"],
        source.inputs.map((input) => [input.path, input.files, shortBytes(input.bytes), `${input.sha256.slice(0, 12)}…`]),
        { numeric: false },
      ),
      table(null, flatten(source.options).filter(([, value]) => value !== null), { numeric: false }),
    ),
  );
}

// -- events ------------------------------------------------------------------------------------------------------------

function eventsSection(runs) {
  const rows = runs.flatMap((run) =>
    run.events.map((event) => [
      event.event,
      event.step,
      event.time ? when(event.time) : "–",
      event.details || "",
      ...(runs.length > 1 ? [run.label] : []),
    ]),
  );
  if (!rows.length) return null;
  const head = ["event", "step", "time", "", ...(runs.length > 1 ? ["run"] : [])];
  const counts = new Map();
  for (const [event] of rows) counts.set(event, (counts.get(event) ?? 0) + 1);
  const short = [...counts].map(([event, count]) => `${count} ${event}`).join(", ");
  return section("events", "Events", element("details", {}, element("summary", {}, short), table(head, rows, { numeric: false })));
}
