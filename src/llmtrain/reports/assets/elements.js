"use strict";
// Elements, and how values are written. Everything that comes from a run becomes a text node; there is no innerHTML.

// Control characters written out, as screen.py does: marks of the writing direction would move the text beside them.
const CONTROL = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]/g;

function visible(text) {
  return text.replace(CONTROL, (found) => {
    const code = found.codePointAt(0).toString(16);
    return found < "\u0100" ? `\\x${code.padStart(2, "0")}` : `\\u${code.padStart(4, "0")}`;
  });
}

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value === true) made.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) made.setAttribute(name, value);
  }
  const shown = children.flat().filter((child) => child !== null && child !== undefined);
  made.append(...shown.map((child) => (child instanceof Node ? child : visible(String(child)))));
  return made;
}

function shortCount(number) {
  for (const [unit, size] of [["T", 1e12], ["G", 1e9], ["M", 1e6], ["k", 1e3]]) {
    if (Math.abs(number) >= 0.9995 * size) {
      const scaled = number / size;
      return scaled.toFixed(Math.abs(scaled) < 99.95 ? 1 : 0) + unit;
    }
  }
  return Number.isInteger(number) || Math.abs(number) >= 10 ? number.toFixed(0) : number.toFixed(1);
}

function shortBytes(bytes) {
  for (const [unit, size] of [["TiB", 2 ** 40], ["GiB", 2 ** 30], ["MiB", 2 ** 20], ["KiB", 2 ** 10]]) {
    if (bytes >= 0.9995 * size) return (bytes / size).toFixed(bytes / size < 99.95 ? 1 : 0) + " " + unit;
  }
  return bytes + " B";
}

function shortDuration(seconds) {
  const whole = Math.max(0, Math.round(seconds));
  const two = (number) => String(number).padStart(2, "0");
  if (seconds < 9.95) return `${Number(seconds.toFixed(1))}s`;
  if (whole < 60) return `${whole}s`;
  if (whole < 3600) return `${Math.floor(whole / 60)}m${two(whole % 60)}s`;
  if (whole < 86400) return `${Math.floor(whole / 3600)}h${two(Math.floor((whole % 3600) / 60))}m`;
  return `${Math.floor(whole / 86400)}d${two(Math.floor((whole % 86400) / 3600))}h`;
}

function formatted(value, digits = 4) {
  if (value === null || value === undefined) return "–";
  if (typeof value === "number") {
    if (Number.isInteger(value)) return value.toLocaleString("en-US");
    const size = Math.abs(value);
    if (size >= 1e5) return Math.round(value).toLocaleString("en-US");
    return size !== 0 && size < 1e-3 ? value.toExponential(2).replace(/\.?0+e/, "e") : String(Number(value.toPrecision(digits + 1)));
  }
  if (typeof value === "boolean") return value ? "yes" : "no";
  return typeof value === "string" ? value : JSON.stringify(value);
}

// Numbers of one column, all with as many decimals as the one that needs most.
function aligned(values) {
  const written = values.map((value) => (typeof value === "number" ? formatted(value) : ""));
  if (written.some((text) => /[e,]/.test(text))) return values;
  const decimals = Math.max(0, ...written.map((text) => text.split(".")[1]?.length ?? 0));
  return values.map((value) => (typeof value === "number" ? value.toFixed(decimals) : value));
}

function percent(share) {
  return (100 * share).toFixed(share < 0.0995 ? 1 : 0) + " %";
}

function when(value) {
  const date = typeof value === "number" ? new Date(1000 * value) : new Date(value);
  return Number.isNaN(date.getTime()) ? formatted(value) : date.toISOString().slice(0, 19).replace("T", " ") + " UTC";
}

// {a: {b: 1}} → [["a.b", 1]]; lists are values.
function flatten(values, prefix = "") {
  return Object.entries(values).flatMap(([key, value]) =>
    value !== null && typeof value === "object" && !Array.isArray(value) && Object.keys(value).length
      ? flatten(value, `${prefix}${key}.`)
      : [[prefix + key, value]],
  );
}

function stateBadge(state) {
  return element("span", { class: "badge", "data-state": state }, state);
}

// A section of the page, left out when there is nothing in it.
function section(id, title, ...content) {
  const shown = content.flat().filter(Boolean);
  return shown.length ? element("section", { id, class: "section" }, element("h2", {}, title), ...shown) : null;
}

// Rows are [label, value…]; `head` is the same. A wide table scrolls in its own box, so that the page does not.
function table(head, rows, { numeric = true, marked = () => false } = {}) {
  const cell = (tag, value, column, row) =>
    element(
      tag,
      {
        class: [numeric && column > 0 ? "number" : "", row !== undefined && marked(row, column) ? "marked" : ""]
          .join(" ")
          .trim(),
      },
      value instanceof Node ? value : formatted(value),
    );
  return element(
    "div",
    { class: "scrolls", tabindex: "0" },
    element(
      "table",
      {},
      head && element("thead", {}, element("tr", {}, head.map((value, column) => cell("th", value, column)))),
      element(
        "tbody",
        {},
        rows.map((row, number) => element("tr", {}, row.map((value, column) => cell("td", value, column, number)))),
      ),
    ),
  );
}

// -- dark and light: as the system has it, unless the reader chose one -------------------------------------------------

function readTheme() {
  try {
    return localStorage.getItem("llmtrain-theme");
  } catch {
    return null;
  }
}

function isDark() {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

function themeButton(changed) {
  const label = () => (isDark() ? "☀ Light" : "☾ Dark");
  const button = element("button", {
    class: "quiet",
    id: "theme",
    title: "Dark or light",
    onclick: () => {
      const theme = isDark() ? "light" : "dark";
      document.documentElement.dataset.theme = theme;
      try {
        localStorage.setItem("llmtrain-theme", theme);
      } catch {
        // A page from the disk may have no storage; the choice then lasts as long as the page is open.
      }
      button.textContent = label();
      changed();
    },
  });
  if (readTheme()) document.documentElement.dataset.theme = readTheme();
  button.textContent = label();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    button.textContent = label();
    changed();
  });
  return button;
}
