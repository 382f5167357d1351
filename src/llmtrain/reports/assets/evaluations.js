"use strict";
// Evaluations: those that training made on its way, and those of `llmtrain eval`, with the comparison to a baseline.

const BETTER_WHEN_LOW = /loss|perplexity|bits_per_byte|seconds|duration|peak_memory/;
const MAX_EVALUATIONS_SHOWN = 30;

function evaluationsSection(runs) {
  const parts = runs.map((run) => [duringTraining(run), ...run.evaluations.map(evaluationOf)].filter(Boolean));
  return section(
    "evaluations",
    "Evaluations",
    scoresSideBySide(runs.filter((run) => run.evaluations.some((one) => one.scores))),
    ...runs.flatMap((run, index) =>
      parts[index].length && runs.length > 1 ? [element("h3", {}, runHead(run)), ...parts[index]] : parts[index],
    ),
  );
}

// The metrics of the loss first, as on the charts.
function duringTraining(run) {
  const place = (name) => ["val/loss", "val/perplexity", "val/bits_per_byte"].indexOf(name);
  const names = Object.keys(run.curves)
    .filter((name) => /^(val|eval)\//.test(name))
    .sort((a, b) => (place(a) + 1 || 9) - (place(b) + 1 || 9));
  const steps = [...new Set(names.flatMap((name) => run.curves[name].step))].sort((a, b) => a - b).slice(-MAX_EVALUATIONS_SHOWN);
  if (!steps.length) return null;
  const columns = names.map((name) => new Map(run.curves[name].step.map((step, index) => [step, run.curves[name].value[index]])));
  const values = columns.map((column) => steps.map((step) => column.get(step)));
  const best = names.map((name, index) => (BETTER_WHEN_LOW.test(name) ? Math.min(...columns[index].values()) : NaN));
  const shown = values.map(aligned);
  return table(
    ["step", ...names],
    steps.map((step, row) => [step, ...shown.map((column) => column[row])]),
    { marked: (row, column) => column > 0 && values[column - 1][row] === best[column - 1] },
  );
}

// One evaluation of `llmtrain eval`; one of another's making is shown as it is.
function evaluationOf(evaluation) {
  if (!evaluation.scores) {
    return element("details", { open: true }, element("summary", {}, evaluation.name), table(null, flatten(evaluation.metrics)));
  }
  const parts = Object.entries(evaluation.files);
  const files = parts.length > 1 ? [...parts, ["all", evaluation]] : parts.length ? parts : [["all", evaluation]];
  const names = Object.keys(evaluation.scores);
  const columns = names.map((key) => aligned(files.map(([, part]) => part.scores[key])));
  const title = ["Scores", evaluation.time ? when(evaluation.time) : evaluation.name];
  return element(
    "details",
    { open: true },
    element("summary", {}, title.join(", ")),
    table(["", "rows", ...names], files.map(([name, part], row) => [name, part.rows, ...columns.map((column) => column[row])])),
    comparisonOf(evaluation),
    contaminationOf(evaluation.contamination),
  );
}

function comparisonOf(evaluation) {
  const rows = Object.entries(evaluation.comparison ?? {});
  if (!rows.length) return null;
  const signed = (value) => (value > 0 ? "+" : "") + formatted(value);
  const verdict = (text) => element("b", { class: "verdict", "data-verdict": text }, text);
  return element(
    "div",
    {},
    element("p", { class: "note" }, "Against the baseline ", element("code", {}, evaluation.baseline ?? "")),
    table(
      ["", "baseline", "model", "difference", "95 % interval", "better", "worse", "same", ""],
      rows.map(([name, one]) => [
        name,
        one.base,
        one.tuned,
        signed(one.difference),
        `${signed(one.low)} … ${signed(one.high)}`,
        one.wins,
        one.losses,
        one.ties,
        verdict(one.verdict),
      ]),
    ),
  );
}

function contaminationOf(found) {
  if (!found?.checked || !found.rows) return null;
  return element(
    "p",
    { class: "warning" },
    `${formatted(found.rows)} rows stand among the training rows, ${formatted(found.exact)} of them word for word.`,
  );
}

// The newest scores of each run, where several have some.
function scoresSideBySide(runs) {
  if (runs.length < 2) return null;
  const columns = runs.map((run) => {
    const newest = run.evaluations.filter((one) => one.scores).at(-1);
    const parts = Object.entries(newest.files).length > 1 ? [...Object.entries(newest.files), ["all", newest]] : [[newest.data ?? "all", newest]];
    return new Map(parts.flatMap(([file, part]) => Object.entries(part.scores).map(([name, value]) => [`${file}: ${name}`, value])));
  });
  const keys = [...new Set(columns.flatMap((column) => [...column.keys()]))];
  const best = keys.map((key) => {
    const values = columns.map((column) => column.get(key)).filter((value) => typeof value === "number");
    if (new Set(values).size < 2) return NaN;
    return BETTER_WHEN_LOW.test(key.split(": ").at(-1)) ? Math.min(...values) : Math.max(...values);
  });
  return table(
    ["newest scores", ...runs.map(runHead)],
    keys.map((key) => [key, ...columns.map((column) => column.get(key))]),
    { marked: (row, column) => column > 0 && columns[column - 1].get(keys[row]) === best[row] },
  );
}
