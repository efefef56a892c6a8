// One model's answer: its text as it comes, what it cost, and the same request to take away.

import { Failure, getKey, stream } from "./api.js";
import { copy, count, make, seconds, speed } from "./dom.js";
import { curl, python } from "./snippets.js";

/** What stands in place of an answer without text. */
const HINTS = { idle: "No answer yet.", running: "", done: "The answer is empty.", stopped: "Stopped before the first token.", failed: "" };
const FIGURES = { first: "First token", tokens: "Tokens", speed: "Tokens/s", finish: "Finish" };

export class Column {
  /** request(): the path and body that would be sent now, for those who copy before they send. */
  constructor(name, slot, isBase, request) {
    this.name = name;
    this.request = request;
    this.sent = null;
    this.text = document.createTextNode("");
    this.answer = make("p", { className: "answer", tabIndex: 0, aria: { label: `Answer of ${name}` } }, this.text);
    this.complaint = make("p", { className: "complaint", role: "alert", hidden: true });
    this.figures = Object.fromEntries(Object.keys(FIGURES).map((key) => [key, make("dd", { textContent: "–", data: { figure: key } })]));
    const figures = make("dl", { className: "figures" },
      ...Object.entries(FIGURES).map(([key, label]) => make("div", {}, make("dt", { textContent: label }), this.figures[key])));
    const heading = make("header", {}, make("span", { className: "swatch" }), make("h3", { textContent: name, title: name }));
    if (isBase) heading.append(make("span", { className: "tag", textContent: "base" }));
    this.element = make("article", { className: `column slot-${slot}`, data: { name }, aria: { label: name } },
      heading, this.answer, this.complaint, figures, this.buttons());
    this.state = "idle";
  }

  buttons() {
    const button = (label, title, text) => {
      const made = make("button", { type: "button", className: "quiet", textContent: label, title });
      made.setAttribute("aria-label", `${title}: ${this.name}`);
      made.addEventListener("click", () => copy(text(this.sent ?? this.request(this.name)), made));
      return made;
    };
    return make("footer", {},
      button("Copy text", "Copy the answer", () => this.text.data),
      button("curl", "Copy as a curl command", ({ path, body }) => curl(path, body, getKey() !== "")),
      button("Python", "Copy as Python with the openai client", ({ path, body }) => python(path, body, getKey() !== "")));
  }

  get state() {
    return this.element.dataset.state;
  }

  set state(value) {
    this.element.dataset.state = value;
    this.answer.dataset.hint = HINTS[value];
    this.element.setAttribute("aria-busy", String(value === "running"));
  }

  /** Sends the request and shows what comes; never throws. */
  async run(controller) {
    this.controller = controller;
    this.sent = this.request(this.name);
    this.text.data = "";
    this.complaint.hidden = true;
    for (const figure of Object.values(this.figures)) figure.textContent = "–";
    this.state = "running";
    const clock = { sent: performance.now(), first: null, last: null, pieces: 0, tokens: null, finish: null };
    try {
      const body = { ...this.sent.body, stream: true, stream_options: { include_usage: true } };
      for await (const event of stream(this.sent.path, body, controller.signal)) this.take(event, clock);
      this.state = "done";
    } catch (error) {
      this.failed(error, clock);
    }
    this.measure(clock);
    this.controller = null;
  }

  take(event, clock) {
    if (event.usage) clock.tokens = event.usage.completion_tokens;
    for (const choice of event.choices) {
      const text = choice.text ?? choice.delta?.content ?? "";
      clock.finish = choice.finish_reason ?? clock.finish;
      if (!text) continue;
      clock.last = performance.now();
      clock.first ??= clock.last;
      clock.pieces += 1;
      this.show(text);
    }
    this.measure(clock);
  }

  show(text) {
    const { answer } = this;
    const following = answer.scrollHeight - answer.scrollTop - answer.clientHeight < 30;
    this.text.appendData(text);
    if (following) answer.scrollTop = answer.scrollHeight;
  }

  /** Until the server has counted them, a piece counts as a token. */
  measure(clock) {
    const tokens = clock.tokens ?? clock.pieces;
    const writing = clock.first === null ? 0 : (clock.last - clock.first) / 1000;
    if (clock.first !== null) this.figures.first.textContent = seconds((clock.first - clock.sent) / 1000);
    if (clock.first !== null || clock.tokens !== null) this.figures.tokens.textContent = count(tokens);
    if (tokens > 1 && writing > 0) this.figures.speed.textContent = speed((tokens - 1) / writing);
    if (clock.finish) this.figures.finish.textContent = clock.finish;
  }

  failed(error, clock) {
    if (error.name === "AbortError") {
      this.state = clock.finish = "stopped";
      return;
    }
    const known = error instanceof Failure;
    this.state = "failed";
    clock.finish = "error";
    this.error = error;
    const detail = [error.status || null, error.code].filter(Boolean).join(" ");
    this.complaint.replaceChildren(known ? error.message : "This page made a mistake: " + error.message);
    if (known && detail) this.complaint.append(make("small", { textContent: detail }));
    this.complaint.hidden = false;
  }

  /** One sentence for those who listen. */
  summary() {
    const finish = this.figures.finish.textContent;
    return this.state === "failed" ? `${this.name} failed` : `${this.name}: ${this.figures.tokens.textContent} tokens, ${finish}`;
  }
}
