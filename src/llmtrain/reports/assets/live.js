"use strict";
// What a server adds to the pages: runs are followed while they train, and models asked to write.

const REDRAW_EVERY_MS = 1000;
const MOST_POINTS = 4000;

class LivePage {
  constructor(root) {
    this.root = root;
    this.ids = new URLSearchParams(location.search).getAll("run");
    this.waiting = false;
    // A browser has few connections to one server: a tab that nobody looks at keeps none.
    document.addEventListener("visibilitychange", () => (document.hidden ? this.source?.close() : this.load()));
    this.load();
  }

  address(path, extra = []) {
    return `${path}?${new URLSearchParams([...this.ids.map((id) => ["run", id]), ...extra])}`;
  }

  async load() {
    this.source?.close();
    try {
      const answer = await fetch(this.address("/api/page"));
      const document_ = await answer.json();
      if (!answer.ok) throw new Error(document_.error);
      this.show(document_);
    } catch (error) {
      this.root.replaceChildren(
        element("h1", {}, "This page cannot be shown"),
        element("p", {}, error.message),
        element("p", {}, element("a", { href: "/" }, "All runs")),
      );
    }
  }

  show(document_) {
    const [top, opened] = [scrollY, openedDetails(this.root)];
    this.connection = element("span", { class: "connection", role: "status" });
    const back = element("a", { class: "button", href: "/" }, "← All runs");
    this.page = new Page(this.root, document_, { extras: [this.connection, back], keepView: Boolean(this.page) });
    this.runs = new Map(document_.runs.map((run) => [run.id, run]));
    if (document_.runs.length === 1 && document_.runs[0].can_write) this.offerChat(document_.runs[0]);
    for (const [name, details] of namedDetails(this.root)) details.open = opened.get(name) ?? details.open;
    scrollTo(0, top);
    this.follow(document_.runs);
  }

  offerChat(run) {
    this.chat ??= new ChatBox(run.id);
    this.page.happenings.before(this.chat.section);
  }

  follow(runs) {
    this.source = new EventSource(this.address("/api/follow", runs.map((run) => ["from", run.followed_from])));
    const hear = (kind, act) =>
      this.source.addEventListener(kind, (event) => {
        const { run, ...content } = JSON.parse(event.data);
        act(this.runs.get(run), content);
      });
    this.source.addEventListener("open", () => (this.connection.textContent = ""));
    // A connection that was lost would begin at an old place of the file: the page is loaded anew instead.
    this.source.addEventListener("error", () => {
      this.source.close();
      this.connection.textContent = "not connected";
      setTimeout(() => this.reconnect(), 2000);
    });
    hear("lines", (run, { lines }) => this.append(run, lines));
    hear("events", (run, { events }) => {
      run.events = [...run.events.filter((event) => event.event === "non-finite"), ...events].sort((a, b) => a.step - b.step);
      if (this.runs.size === 1 && !this.chat && events.some((event) => event.event === "saved")) this.offerChat(run);
      this.redrawSoon();
    });
    hear("samples", (run, { samples }) => {
      run.samples = samples;
      this.page.refreshSamples();
    });
    hear("reset", () => this.load());
  }

  async reconnect() {
    try {
      if ((await fetch("/api/runs")).ok) {
        this.load();
        return;
      }
    } catch {
      // The server is not there; the page stays as it is.
    }
    setTimeout(() => this.reconnect(), 2000);
  }

  append(run, lines) {
    let isNew = false;
    for (const { step, time, non_finite: wrong, ...metrics } of lines) {
      const seconds = time - run.clock_began;
      for (const [name, value] of Object.entries(metrics)) {
        const curve = run.curves[name];
        if (typeof value !== "number") continue;
        if (!curve) {
          isNew = true;
          continue;
        }
        for (const points of [curve, curve.means].filter(Boolean)) {
          points.step.push(step);
          points.seconds.push(seconds);
          points.value.push(value);
        }
        curve.count += 1;
      }
      for (const [name, what] of Object.entries(wrong ?? {})) {
        run.events.push({ step, event: "non-finite", details: `${name} was ${what}` });
      }
      if (typeof metrics["train/tokens_total"] === "number") {
        run.tokens = metrics["train/tokens_total"];
        run.tokens_by_step.step.push(step);
        run.tokens_by_step.tokens.push(run.tokens);
      }
      run.steps = Math.max(run.steps ?? 0, step);
      run.seconds = seconds;
      run.loss = metrics["train/loss"] ?? run.loss;
      run.val_loss = metrics["val/loss"] ?? run.val_loss;
      run.bits_per_byte = metrics["val/bits_per_byte"] ?? run.bits_per_byte;
      if (typeof metrics["val/loss"] === "number") run.best_val_loss = Math.min(run.best_val_loss ?? Infinity, metrics["val/loss"]);
    }
    const tooMany = Object.values(run.curves).some((curve) => curve.value.length > MOST_POINTS);
    if (isNew || tooMany) this.load();
    else this.redrawSoon();
  }

  redrawSoon() {
    if (this.waiting) return;
    this.waiting = true;
    setTimeout(() => {
      this.waiting = false;
      this.page.refreshTables();
      this.page.charts.redraw();
    }, REDRAW_EVERY_MS);
  }
}

// By their section and their words; those whose words have changed are as new.
function namedDetails(root) {
  return [...root.querySelectorAll("details")].map((details) => [
    `${details.closest("section")?.id} ${details.querySelector("summary").textContent}`,
    details,
  ]);
}

function openedDetails(root) {
  return new Map(namedDetails(root).map(([name, details]) => [name, details.open]));
}

// -- which page this is ------------------------------------------------------------------------------------------------

const pageRoot = document.getElementById("page");
if (document.body.dataset.kind === "list") new RunsList(pageRoot);
else new LivePage(pageRoot);
