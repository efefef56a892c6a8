// Choosing models: a search field over any number of names (a combobox with a list), and a chip for each that is chosen.

import { count, find, make, say } from "./dom.js";

export const MOST = 5; // a browser keeps six connections to one server: these, and the one that watches the engine
const SHOWN = 60;

export class Picker {
  /** changed(): called after names were added or taken away. refresh(): called when the list is about to be looked at. */
  constructor(changed, refresh) {
    this.changed = changed;
    this.names = [];
    this.base = null;
    this.chosen = new Map(); // name -> number of its color
    this.active = 0;
    this.search = find("search");
    this.options = find("options");
    this.search.addEventListener("input", () => this.open());
    this.search.addEventListener("focus", () => { refresh(); this.open(); });
    this.search.addEventListener("click", () => this.open());
    this.search.addEventListener("blur", () => this.close());
    this.search.addEventListener("keydown", (event) => this.pressed(event));
    find("picker").addEventListener("click", (event) => { if (event.target === event.currentTarget) this.search.focus(); });
  }

  /** names: all that there are, the base first where the key may use it. */
  offer(names, base) {
    this.names = names;
    this.base = names.includes(base) ? base : null;
    this.search.placeholder = names.length > 1 ? `Find one of ${count(names.length)}` : "Find an adapter";
    this.drawChips();
    if (!find("drop").hidden) this.drawOptions();
  }

  add(name) {
    if (this.chosen.has(name) || this.chosen.size >= MOST) return;
    const taken = new Set(this.chosen.values());
    this.chosen.set(name, [...Array(MOST).keys()].find((slot) => !taken.has(slot)));
    this.update();
  }

  remove(name) {
    if (this.chosen.delete(name)) this.update();
  }

  update() {
    this.drawChips();
    if (!find("drop").hidden) this.drawOptions();
    this.changed();
  }

  /** Names in which every word of the search occurs; those that begin with it come first. */
  matches() {
    const text = this.search.value.trim().toLowerCase();
    if (!text) return this.names;
    const words = text.split(/\s+/);
    const fitting = this.names.filter((name) => words.every((word) => name.toLowerCase().includes(word)));
    const rank = (name) => (name.toLowerCase() === text ? 0 : name.toLowerCase().startsWith(text) ? 1 : 2);
    return fitting.map((name) => [rank(name), name]).sort((a, b) => a[0] - b[0]).map(([, name]) => name);
  }

  open() {
    this.active = 0;
    find("drop").hidden = false;
    this.search.setAttribute("aria-expanded", "true");
    this.drawOptions();
  }

  close() {
    find("drop").hidden = true;
    this.search.setAttribute("aria-expanded", "false");
    this.search.removeAttribute("aria-activedescendant");
  }

  pressed(event) {
    const shown = this.options.children;
    const opened = !find("drop").hidden;
    if (event.key === "ArrowDown" || event.key === "ArrowUp") {
      event.preventDefault();
      if (!opened) return this.open();
      const step = event.key === "ArrowDown" ? 1 : -1;
      this.activate((this.active + step + shown.length) % Math.max(shown.length, 1));
    } else if (event.key === "Enter" && !event.ctrlKey && !event.metaKey) {
      event.preventDefault();
      if (opened && shown[this.active]) this.toggle(shown[this.active].dataset.name);
    } else if (event.key === "Escape" && opened) {
      event.preventDefault();
      this.close();
    } else if (event.key === "Backspace" && !this.search.value && this.chosen.size) {
      this.remove([...this.chosen.keys()].pop());
    }
  }

  toggle(name) {
    if (this.chosen.has(name)) return this.remove(name);
    const searched = this.search.value !== "";
    this.search.value = "";
    if (searched) this.active = 0;
    this.add(name);
  }

  activate(index) {
    this.options.children[this.active]?.classList.remove("active");
    this.active = index;
    const option = this.options.children[index];
    if (!option) return this.search.removeAttribute("aria-activedescendant");
    option.classList.add("active");
    option.scrollIntoView({ block: "nearest" });
    this.search.setAttribute("aria-activedescendant", option.id);
  }

  drawOptions() {
    const found = this.matches();
    const full = this.chosen.size >= MOST;
    this.options.replaceChildren(...found.slice(0, SHOWN).map((name, index) => {
      const chosen = this.chosen.has(name);
      const option = make("li", { id: `option-${index}`, role: "option", className: "option", data: { name },
        aria: { selected: chosen, ...(full && !chosen ? { disabled: true } : {}) } },
      make("span", { className: "tick", textContent: chosen ? "✓" : "" }), make("span", { className: "text", textContent: name }));
      if (name === this.base) option.append(make("span", { className: "tag", textContent: "base" }));
      option.addEventListener("mousedown", (event) => { event.preventDefault(); this.toggle(name); });
      return option;
    }));
    say(find("drop-note"), this.note(found.length, full));
    this.activate(Math.min(this.active, Math.max(0, this.options.children.length - 1)));
  }

  note(found, full) {
    if (full) return `${MOST} are chosen, which is all that a browser streams at once. Take one away to choose another.`;
    if (!this.names.length) return "No models are known yet.";
    if (!found) return "No name has this in it.";
    if (found > SHOWN) return `${SHOWN} of ${count(found)} shown; type to narrow them down.`;
    return `${count(found)} of ${count(this.names.length)}`;
  }

  drawChips() {
    find("chips").replaceChildren(...[...this.chosen].map(([name, slot]) => {
      const button = make("button", { type: "button", textContent: "×", aria: { label: `Remove ${name}` } });
      button.addEventListener("click", () => { this.remove(name); this.search.focus(); });
      const chip = make("li", { className: `chip slot-${slot}`, title: name }, make("span", { className: "swatch" }),
        make("span", { className: "text", textContent: name }));
      if (name === this.base) chip.append(make("span", { className: "tag", textContent: "base" }));
      chip.append(button);
      return chip;
    }));
  }
}
