// Puts the page together: models are chosen, one prompt goes to all of them at once, and the engine is watched.

import { get, getKey, setKey } from "./api.js";
import { Column } from "./column.js";
import { copy, find, say } from "./dom.js";
import { MOST, Picker } from "./picker.js";
import { body, fromLink, link, mode, route } from "./settings.js";
import { Watcher } from "./status.js";

const FRESH = 10000; // milliseconds that the list of models is good for
let listed = -Infinity, listing = null, running = null;
const columns = new Map(); // name -> Column

const picker = new Picker(arrange, () => models());
const slotOf = (name) => picker.chosen.get(name);
const watcher = new Watcher(slotOf, () => running !== null, askForKey);

// -- models ---------------------------------------------------------------------------------------------------------------------------
/** The names that may be used, asked for again when they are old. */
function models(old = FRESH) {
  if (performance.now() - listed < old) return listing;
  listed = performance.now();
  listing = get("v1/models").then(({ data }) => {
    const base = data.find((model) => model.parent === null)?.id ?? data[0]?.parent ?? "";
    say(find("base-name"), base);
    picker.offer(data.map((model) => model.id), base);
  }).catch((error) => {
    listed = -Infinity;
    if (error.needsKey) askForKey();
    else if (error.status !== 401) complain(error.message);
  });
  return listing;
}

/** What would be sent to a model now. */
const request = (model) => ({ path: route(), body: body(model) });

/** A column for each chosen name, in their order; answers that are there stay. */
function arrange() {
  for (const [name, column] of columns) {
    if (picker.chosen.has(name)) continue;
    column.controller?.abort();
    columns.delete(name);
  }
  for (const [name, slot] of picker.chosen) {
    if (!columns.has(name)) columns.set(name, new Column(name, slot, name === picker.base, request));
  }
  find("columns").replaceChildren(...[...picker.chosen.keys()].map((name) => columns.get(name).element));
  find("columns").dataset.count = picker.chosen.size;
  watcher.recolor();
}

// -- sending ----------------------------------------------------------------------------------------------------------------------------
async function send() {
  if (running) return;
  if (!picker.chosen.size) return complain("Choose an adapter, or several.", "search");
  if (!find("prompt").value) return complain("Write a prompt first.", "prompt");
  complain("");
  picker.close();
  running = new AbortController();
  const asked = [...columns.values()];
  // a controller each, so that a column that is taken away ends alone
  const ends = asked.map((column) => {
    const own = new AbortController();
    running.signal.addEventListener("abort", () => own.abort());
    return column.run(own).then(() => column);
  });
  busy(true);
  const done = await Promise.all(ends);
  running = null;
  busy(false);
  if (done.some((column) => column.state === "failed" && column.error.needsKey)) askForKey();
  say(find("announce"), done.map((column) => column.summary()).join("; "));
  watcher.now();
}

function busy(now) {
  document.body.dataset.state = now ? "running" : "done";
  find("send").disabled = now;
  find("stop").disabled = !now;
  if (now) {
    say(find("announce"), "Sent");
    watcher.now();
  }
}

function complain(text, field = null) {
  say(find("complaint"), text);
  find("complaint").hidden = !text;
  if (field) find(field).focus();
}

// -- the key ----------------------------------------------------------------------------------------------------------------------------
function askForKey() {
  showKey(true);
  complain(getKey() ? "This server does not know the API key." : "This server needs an API key.");
  find("key").focus();
}

function showKey(shown) {
  find("key-panel").hidden = !shown;
  find("key-toggle").setAttribute("aria-expanded", String(shown));
  find("key").value = getKey();
}

async function useKey(key) {
  setKey(key.trim());
  complain("");
  showKey(false);
  await models(0);
  if (!picker.chosen.size) preset();
  watcher.now();
}

// -- the beginning ----------------------------------------------------------------------------------------------------------------------
/** The base and the first adapter, so that there is something to compare. */
function preset() {
  for (const name of picker.names.slice(0, 2)) picker.add(name);
}

function fitMode() {
  find("system-field").hidden = mode() !== "chat";
}

async function begin() {
  find("composer").addEventListener("submit", (event) => { event.preventDefault(); send(); });
  find("stop").addEventListener("click", () => running?.abort());
  find("share").addEventListener("click", (event) => {
    const address = link([...picker.chosen.keys()]);
    if (address) copy(address, event.currentTarget);
    else complain("The prompt is too long for a link.");
  });
  find("key-toggle").addEventListener("click", () => { showKey(find("key-panel").hidden); find("key").focus(); });
  find("key-panel").addEventListener("submit", (event) => { event.preventDefault(); useKey(find("key").value); });
  find("key-forget").addEventListener("click", () => useKey(""));
  find("composer").addEventListener("change", fitMode);
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey) || find("key-panel").contains(event.target)) return;
    event.preventDefault();
    find("composer").requestSubmit();
  });
  const { names, run } = fromLink();
  fitMode();
  await models();
  if (names) names.slice(0, MOST).forEach((name) => picker.add(name));
  else preset();
  watcher.now();
  if (run) find("composer").requestSubmit();
}

begin();
