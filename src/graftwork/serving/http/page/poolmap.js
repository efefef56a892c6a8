// The pool as a grid: every cell a page (or several, where there are many), colored by who has it.

import { count, find, make, plural, say } from "./dom.js";

const TALLEST = 190; // pixels
const SIZES = [15, 12, 10, 8, 7, 6, 5, 4, 3];

export class PoolMap {
  /** slotOf(name): the number of the color of a chosen model, or undefined. */
  constructor(slotOf) {
    this.slotOf = slotOf;
    this.canvas = find("map");
    this.pool = null;
    this.width = 0;
    new ResizeObserver(() => { if (this.canvas.clientWidth !== this.width) this.draw(); }).observe(this.canvas);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
    this.canvas.addEventListener("pointermove", (event) => this.point(event));
    this.canvas.addEventListener("pointerleave", () => this.note());
  }

  show(pool) {
    this.pool = pool;
    this.owner = new Int32Array(pool.pages); // page -> number of its owner
    let page = 0;
    for (const [owner, length] of pool.map) this.owner.fill(owner, page, page += length);
    this.draw();
    this.drawLegend();
    if (!this.canvas.matches(":hover")) this.note();
  }

  note() {
    const cell = this.per > 1 ? `${this.per} pages` : "a page";
    if (this.pool) say(find("map-note"), `a cell is ${cell} of ${this.pool.page_tokens} tokens`);
  }

  /** As large cells as fit; cells of several pages where even the smallest do not. */
  layout() {
    const width = this.canvas.clientWidth, pages = this.pool.pages;
    this.per = 1;
    this.size = SIZES.find((size) => Math.ceil(pages / Math.floor(width / size)) * size <= TALLEST);
    if (this.size === undefined) {
      this.size = SIZES.at(-1);
      this.per = Math.ceil(pages / (Math.floor(width / this.size) * Math.floor(TALLEST / this.size)));
    }
    this.across = Math.max(1, Math.floor(width / this.size));
    this.step = width / this.across; // cells are as wide as fills the line
    this.cells = Math.ceil(pages / this.per);
    this.width = width;
  }

  draw() {
    if (!this.pool || !this.canvas.clientWidth) return;
    this.layout();
    const scale = devicePixelRatio || 1, { canvas, size } = this;
    const height = Math.ceil(this.cells / this.across) * size;
    canvas.style.height = `${height}px`;
    canvas.width = Math.round(this.width * scale);
    canvas.height = Math.round(height * scale);
    const context = canvas.getContext("2d");
    context.scale(scale, scale);
    const paints = this.pool.owners.map((owner) => this.paint(owner));
    const gap = size > 4 ? 1 : size === 4 ? 0.5 : 0;
    const left = (column) => Math.round(column * this.step * scale) / scale;
    for (let cell = 0; cell < this.cells; cell += 1) {
      const column = cell % this.across;
      [context.fillStyle, context.globalAlpha] = paints[this.most(cell)];
      context.fillRect(left(column), Math.floor(cell / this.across) * size, left(column + 1) - left(column) - gap, size - gap);
    }
  }

  /** The owner of most of a cell's pages. */
  most(cell) {
    if (this.per === 1) return this.owner[cell];
    const had = new Map();
    let best = this.owner[cell * this.per];
    for (const owner of this.owner.subarray(cell * this.per, (cell + 1) * this.per)) {
      had.set(owner, (had.get(owner) ?? 0) + 1);
      if (had.get(owner) > had.get(best)) best = owner;
    }
    return best;
  }

  slot(owner) {
    return [owner.model, ...(owner.names ?? [])].map(this.slotOf).find((slot) => slot !== undefined);
  }

  /** [color, opacity]: keys and values of a chosen model have its color, lighter than its weights. */
  paint(owner) {
    const slot = this.slot(owner);
    const name = slot === undefined ? `--map-${owner.kind}` : `--slot-${slot}`;
    const color = getComputedStyle(document.documentElement).getPropertyValue(name).trim();
    return [color, slot !== undefined && owner.kind === "request" ? 0.48 : 1];
  }

  label(owner) {
    const name = owner.names?.join(" = ") || owner.model || "an adapter that was replaced";
    return { free: "free", prefix: "prefix cache", shared: "shared by requests that begin alike", other: "of other keys",
      adapter: `weights of ${name}`, request: `request of ${name}` }[owner.kind];
  }

  point(event) {
    if (!this.pool) return;
    const column = Math.floor(event.offsetX / this.step), row = Math.floor(event.offsetY / this.size);
    const cell = row * this.across + column;
    if (column >= this.across || cell >= this.cells) return this.note();
    const first = cell * this.per, last = Math.min(first + this.per, this.pool.pages) - 1;
    const where = this.per > 1 ? `pages ${count(first)}–${count(last)}, mostly` : `page ${count(first)}:`;
    say(find("map-note"), `${where} ${this.label(this.pool.owners[this.most(cell)])}`);
  }

  drawLegend() {
    const lines = new Map(); // text -> [swatch class, slot, pages]
    for (const owner of this.pool.owners) {
      if (!owner.pages) continue;
      const slot = this.slot(owner), named = owner.kind === "adapter" || owner.kind === "request";
      const name = slot === undefined ? "" : owner.names?.find((each) => this.slotOf(each) !== undefined) ?? owner.model;
      const text = !named ? this.label(owner) : slot === undefined ? { adapter: "other adapters", request: "other requests" }[owner.kind]
        : `${name} ${owner.kind === "adapter" ? "weights" : "keys and values"}`;
      const line = lines.get(text) ?? [owner.kind, slot, 0];
      lines.set(text, [line[0], line[1], line[2] + owner.pages]);
    }
    const order = ["adapter", "request", "shared", "prefix", "other", "free"];
    const sorted = [...lines].sort((a, b) => order.indexOf(a[1][0]) - order.indexOf(b[1][0]) || (a[1][1] ?? 9) - (b[1][1] ?? 9));
    find("legend").replaceChildren(...sorted.map(([text, [kind, slot, pages]]) =>
      make("li", { className: slot === undefined ? "" : `slot-${slot}` }, make("span", { className: `swatch key-${kind}` }),
        make("span", { className: "text", textContent: text }), make("b", { textContent: count(pages) }))));
    const shares = sorted.map(([text, line]) => `${text} ${line[2]}`).join(", ");
    this.canvas.setAttribute("aria-label", `Pool of ${plural(this.pool.pages, "page")}: ${shares}`);
  }
}
