"use strict";
// The chat box of a run: its model goes on from a text; one that was tuned on conversations answers, turn by turn.

class ChatBox {
  constructor(run) {
    this.run = run;
    this.turns = [];
    this.log = element("div", { class: "samples", id: "answers", "aria-live": "polite" });
    this.prompt = element("textarea", {
      id: "prompt",
      rows: 3,
      placeholder: "A text to go on from, or a question",
      "aria-label": "Prompt",
      onkeydown: (event) => {
        if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) this.ask();
      },
    });
    this.button = element("button", { id: "write", class: "primary", onclick: () => (this.stopper ? this.stopper.abort() : this.ask()) }, "Write");
    this.anew = element("button", { id: "anew", hidden: true, onclick: () => this.forget() }, "New conversation");
    this.settings = [
      ["max_new_tokens", "Tokens", { value: 200, min: 1, max: 4096, step: 1 }],
      ["temperature", "Temperature", { value: 0.8, min: 0, max: 10, step: 0.1 }],
      ["top_p", "Top p", { value: 0.95, min: 0.01, max: 1, step: 0.01 }],
      ["seed", "Seed", { min: 0, step: 1, placeholder: "any" }],
    ].map(([name, label, limits]) => {
      const input = element("input", { type: "number", name, ...limits });
      return { name, input, label: element("label", {}, label, input) };
    });
    this.section = section(
      "chat",
      "Try the model",
      this.prompt,
      element("div", { class: "settings" }, this.settings.map(({ label }) => label), element("span", {}, this.anew, this.button)),
      this.log,
    );
  }

  forget() {
    this.stopper?.abort();
    this.turns = [];
    this.log.replaceChildren();
    this.anew.hidden = true;
    this.prompt.focus();
  }

  async ask() {
    const prompt = this.prompt.value;
    if (!prompt || this.stopper) return;
    const asked = { run: this.run, messages: [...this.turns, { role: "user", content: prompt }], seed: Math.floor(Math.random() * 2 ** 31) };
    for (const { name, input } of this.settings) if (input.value !== "") asked[name] = Number(input.value);
    const answer = { text: document.createTextNode(""), note: element("small", {}, "…") };
    this.log.prepend(element("pre", {}, element("span", { class: "prompt" }, prompt), answer.text, answer.note));
    this.stopper = new AbortController();
    this.button.textContent = "Stop";
    try {
      await this.read(asked, answer);
    } catch (error) {
      answer.note.textContent = error.name === "AbortError" ? "stopped" : visible(error.message);
    } finally {
      this.stopper = null;
      this.button.textContent = "Write";
    }
  }

  async read(asked, { text, note }) {
    const response = await fetch("/api/generate", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(asked),
      signal: this.stopper.signal,
    });
    if (!response.ok) throw new Error((await response.json()).error);
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    let written = "";
    let chats = false;
    for (let part = await reader.read(); !part.done; part = await reader.read()) {
      const lines = (rest + part.value).split("\n");
      rest = lines.pop();
      for (const line of lines) {
        const message = JSON.parse(line);
        if (message.chats) {
          chats = true;
          text.before("\n\n");
        }
        if (message.text) text.data = visible((written += message.text));
        if (message.error) note.textContent = visible(message.error);
        if (message.done) {
          note.textContent = `${message.done.tokens} tokens, seed ${asked.seed}, ended by ${message.done.ended_by}`;
          if (chats) this.remember(asked.messages, written);
        }
      }
    }
  }

  remember(messages, answer) {
    this.turns = [...messages, { role: "assistant", content: answer }];
    this.prompt.value = "";
    this.anew.hidden = false;
  }
}
