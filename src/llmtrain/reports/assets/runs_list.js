"use strict";
// The list of all runs: filtered, sorted, chosen for a comparison; it keeps itself up to date.

const LIST_EVERY_MS = 3000;
const STATES = ["running", "finished", "preempted", "failed", "killed"];

function age(run) {
  const began = Date.parse(run.time);
  return Number.isNaN(began) ? null : (Date.now() - began) / 1000;
}

const LIST_COLUMNS = [
  { key: "name", title: "Run", of: (run) => run.id },
  { key: "state", title: "State", of: (run) => STATES.indexOf(run.state), cell: (run) => stateBadge(run.state) },
  { key: "steps", title: "Steps", of: (run) => run.steps, number: true },
  { key: "loss", title: "Loss", of: (run) => run.loss, number: true },
  { key: "best_val_loss", title: "Best validation", of: (run) => run.best_val_loss ?? run.val_loss, number: true },
  { key: "tokens_per_sec", title: "Tokens/s", of: (run) => run.tokens_per_sec, number: true, write: shortCount },
  { key: "tokens", title: "Tokens", of: (run) => run.tokens, number: true, write: shortCount },
  { key: "seconds", title: "Time", of: (run) => run.seconds, number: true, write: shortDuration },
  { key: "age", title: "Age", of: age, number: true, write: shortDuration },
  { key: "bytes", title: "Size", of: (run) => run.bytes, number: true, write: shortBytes },
];

class RunsList {
  constructor(root) {
    this.runs = [];
    this.chosen = new Set();
    this.text = "";
    this.states = new Set(STATES);
    this.sort = { column: LIST_COLUMNS.find((column) => column.key === "age"), down: false };
    this.rows = element("tbody");
    this.note = element("p", { class: "note", role: "status" });
    this.where = element("code");
    this.compare = element("button", { id: "compare", disabled: true, onclick: () => this.open() }, "Compare");
    root.replaceChildren(
      element(
        "header",
        { class: "head" },
        element("div", {}, element("h1", {}, "Runs"), element("p", { class: "under" }, this.where)),
        element("div", { class: "buttons" }, themeButton(() => {})),
      ),
      this.toolbar(),
      element("div", { class: "scrolls", tabindex: "0" }, element("table", { class: "runs" }, element("thead", {}, this.headings()), this.rows)),
      this.note,
    );
    this.refresh();
    setInterval(() => document.hidden || this.refresh(), LIST_EVERY_MS);
  }

  toolbar() {
    const chip = (state) => {
      const button = element(
        "button",
        {
          class: "chip",
          "aria-pressed": "true",
          onclick: () => {
            if (!this.states.delete(state)) this.states.add(state);
            button.setAttribute("aria-pressed", String(this.states.has(state)));
            this.show();
          },
        },
        state,
      );
      return button;
    };
    return element(
      "nav",
      { class: "toolbar", "aria-label": "Which runs are shown" },
      element("input", {
        type: "search",
        id: "filter",
        placeholder: "Find a name, a tag, a note",
        "aria-label": "Find a name, a tag, a note",
        oninput: (event) => {
          this.text = event.target.value.trim().toLowerCase();
          this.show();
        },
      }),
      element("div", { class: "chips flat" }, STATES.map(chip)),
      this.compare,
    );
  }

  headings() {
    return element(
      "tr",
      {},
      element("th", {}),
      LIST_COLUMNS.map((column) =>
        element(
          "th",
          { class: column.number ? "number" : "" },
          element(
            "button",
            {
              class: "heading",
              onclick: () => {
                this.sort = { column, down: this.sort.column === column && !this.sort.down };
                this.show();
              },
            },
            column.title,
          ),
        ),
      ),
    );
  }

  async refresh() {
    try {
      const answer = await fetch("/api/runs");
      if (!answer.ok) throw new Error(`the server says ${answer.status}`);
      const { root, runs } = await answer.json();
      this.runs = runs;
      this.where.textContent = visible(root);
      this.note.textContent = runs.length ? "" : "There are no runs in this folder yet.";
    } catch (error) {
      this.note.textContent = `The list is not up to date: ${error.message}`;
      return;
    }
    this.show();
  }

  shown() {
    const words = (run) => [run.id, run.name, run.notes, ...(Array.isArray(run.tags) ? run.tags : [])].join(" ").toLowerCase();
    const { column, down } = this.sort;
    const found = this.runs.filter((run) => this.states.has(run.state) && words(run).includes(this.text));
    const order = (a, b) => (a < b ? -1 : a > b ? 1 : 0) * (down ? -1 : 1);
    const known = (run) => ![null, undefined].includes(column.of(run));
    return [...found.filter(known).sort((a, b) => order(column.of(a), column.of(b))), ...found.filter((run) => !known(run))];
  }

  show() {
    const runs = this.shown();
    this.chosen = new Set([...this.chosen].filter((id) => this.runs.some((run) => run.id === id)));
    this.compare.disabled = this.chosen.size < 2;
    this.compare.textContent = this.chosen.size > 1 ? `Compare ${this.chosen.size}` : "Compare";
    this.rows.replaceChildren(...runs.map((run) => this.row(run)));
  }

  row(run) {
    const choose = element("input", {
      type: "checkbox",
      "aria-label": `Compare ${run.id}`,
      checked: this.chosen.has(run.id),
      onchange: (event) => {
        if (event.target.checked) this.chosen.add(run.id);
        else this.chosen.delete(run.id);
        this.show();
      },
    });
    const link = element("a", { href: runsAddress([run.id]) }, element("b", {}, run.name || run.id), run.name ? element("small", {}, run.id) : null);
    const cells = LIST_COLUMNS.slice(1).map((column) => {
      const value = column.of(run);
      const shown = column.cell ? column.cell(run) : value === null || value === undefined ? "–" : (column.write ?? formatted)(value);
      return element("td", { class: column.number ? "number" : "" }, shown);
    });
    return element("tr", { "data-run": run.id }, element("td", {}, choose), element("td", {}, link), cells);
  }

  open() {
    location.href = runsAddress(this.shown().map((run) => run.id).filter((id) => this.chosen.has(id)));
  }
}

function runsAddress(ids) {
  return `/runs?${new URLSearchParams(ids.map((id) => ["run", id]))}`;
}
