// The engine, live: asked once a second while the tab is seen, twice while answers come.

import { get } from "./api.js";
import { bytes, count, find, make, plural, say, speed } from "./dom.js";
import { PoolMap } from "./poolmap.js";

const KEPT = 60; // samples of the curve
const STATES = { live: "live", paused: "paused", key: "needs a key", down: "no answer" };

export class Watcher {
  /** slotOf(name): as PoolMap's. busy(): whether this page's requests run. refused(): the server asks for a key. */
  constructor(slotOf, busy, refused) {
    Object.assign(this, { slotOf, busy, refused });
    this.map = new PoolMap(slotOf);
    this.rates = [];
    this.timer = null;
    this.asking = false;
    document.addEventListener("visibilitychange", () => (document.hidden ? this.pause() : this.now()));
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.drawCurve());
  }

  pause() {
    clearTimeout(this.timer);
    this.health("paused");
  }

  /** Ask at once, and go on from there. */
  async now() {
    clearTimeout(this.timer);
    if (this.asking || document.hidden) return;
    this.asking = true;
    let wait = 1000;
    try {
      const replica = new URLSearchParams(location.search).get("replica"); // of several behind one address, see docs/serving.md
      const status = await get(replica === null ? "v1/status" : `v1/status?replica=${encodeURIComponent(replica)}`);
      this.show(status);
      this.health("live", status.age >= 1 ? `in a step for ${Math.round(status.age)} s` : "");
      if (this.busy()) wait = 500;
    } catch (error) {
      wait = error.needsKey ? null : error.status === 401 ? 0 : 3000; // 0: the key has changed meanwhile
      if (wait !== 0) this.health(error.needsKey ? "key" : "down", error.message);
      if (error.needsKey) this.refused();
    }
    this.asking = false;
    if (document.hidden) this.pause();
    else if (wait !== null) this.timer = setTimeout(() => this.now(), wait);
  }

  health(state, reason = "") {
    find("health").dataset.state = state;
    find("health").title = reason;
    say(find("health-text"), state === "live" && reason ? reason : STATES[state]);
  }

  /** Once more with the colors that are chosen now. */
  recolor() {
    if (this.last) this.draw();
  }

  show(status) {
    this.last = status;
    this.rates = [...this.rates, status.tokens.per_second].slice(-KEPT);
    this.draw();
    this.drawCurve();
  }

  draw() {
    const { pool, adapters, requests, ...status } = this.last;
    for (const name of ["running", "waiting", "steps"]) say(find(name), count(status[name]));
    say(find("resident"), count(adapters.resident));
    say(find("rate"), speed(status.tokens.per_second));
    say(find("pool-use"), `${Math.round((100 * pool.used) / pool.pages)} % of ${bytes(pool.pages * pool.page_bytes)}`);
    say(find("adapters-size"), adapters.resident ? bytes(adapters.bytes) : "");
    this.map.show(pool);
    this.drawRequests(requests, status.running + status.waiting);
    this.drawAdapters(adapters);
  }

  drawRequests(requests, all) {
    say(find("requests-count"), all ? count(all) : "");
    find("requests").replaceChildren(...requests.map((request) => {
      const reading = request.completion_tokens === 0 && request.computed_tokens < request.prompt_tokens;
      const state = request.state === "waiting" ? "waiting" : reading ? "reading" : "writing";
      return this.row(request.model, [request.model], state, `${request.completion_tokens} / ${request.max_tokens}`);
    }));
    const others = all - requests.length;
    say(find("requests-note"), !all ? "None at the moment." : others ? plural(others, "more request") : "");
  }

  drawAdapters(adapters) {
    find("adapters").replaceChildren(...adapters.list.map(({ names, users, bytes: size }) =>
      this.row(names.join(" = ") || "(replaced)", names, users ? `${count(users)} in use` : "idle", bytes(size))));
    const others = adapters.resident - adapters.list.length;
    const none = "None yet: adapters are read when they are first asked for.";
    say(find("adapters-note"), !adapters.resident ? none : others ? plural(others, "more adapter") : "");
  }

  row(label, names, ...cells) {
    const slot = names.map(this.slotOf).find((each) => each !== undefined);
    const head = make("td", { title: label }, make("span", { className: "swatch" }), label);
    if (slot !== undefined) head.className = `slot-${slot}`;
    return make("tr", {}, head, ...cells.map((text) => make("td", { textContent: text })));
  }

  drawCurve() {
    const canvas = find("spark"), scale = devicePixelRatio || 1;
    const width = canvas.clientWidth, height = canvas.clientHeight;
    if (!width) return;
    canvas.width = width * scale;
    canvas.height = height * scale;
    const context = canvas.getContext("2d"), top = Math.max(...this.rates, 1);
    context.scale(scale, scale);
    const x = (i) => width - ((this.rates.length - 1 - i) * width) / (KEPT - 1);
    const points = this.rates.map((rate, i) => [x(i), height - 2 - (rate / top) * (height - 4)]);
    const color = getComputedStyle(document.documentElement).getPropertyValue("--accent").trim();
    context.beginPath();
    for (const point of points) context.lineTo(...point);
    context.strokeStyle = color;
    context.lineWidth = 1.6;
    context.lineJoin = "round";
    context.stroke();
    if (points.length < 2) return;
    context.lineTo(points.at(-1)[0], height);
    context.lineTo(points[0][0], height);
    context.globalAlpha = 0.12;
    context.fillStyle = color;
    context.fill();
  }
}
