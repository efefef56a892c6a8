// What is asked of every model: the fields of the form, the link that carries them, and the body of a request.

import { find } from "./dom.js";

const NUMBERS = ["max_tokens", "temperature", "top_p", "seed"];
const LONGEST = 12000; // characters of a link that servers and browsers take

export const mode = () => document.querySelector("input[name=mode]:checked").value;

export const route = () => (mode() === "chat" ? "v1/chat/completions" : "v1/completions");

/** The body of a request, without what only streaming needs. */
export function body(model) {
  const prompt = find("prompt").value;
  const system = find("system").value;
  const text = mode() === "chat"
    ? { messages: [...(system ? [{ role: "system", content: system }] : []), { role: "user", content: prompt }] }
    : { prompt };
  const numbers = {};
  for (const name of NUMBERS) {
    const value = find(name).value;
    if (value !== "" && !(name === "top_p" && Number(value) === 1)) numbers[name] = Number(value);
  }
  return { model, ...text, ...numbers };
}

/** Fills the form from the address; returns the names in it (null: none given) and whether to send at once. */
export function fromLink() {
  const given = new URLSearchParams(location.search);
  for (const name of ["prompt", "system", ...NUMBERS]) if (given.has(name)) find(name).value = given.get(name);
  const chosen = [...document.querySelectorAll("input[name=mode]")].find((input) => input.value === given.get("mode"));
  if (chosen) chosen.checked = true;
  if (given.get("system")) find("system-field").open = true;
  const names = given.get("adapters")?.split(",").filter(Boolean) ?? null;
  return { names: names && [...new Set(names)], run: given.get("run") === "1" };
}

/** The address that shows the same comparison to somebody else, or null where the prompt is too long for one. */
export function link(names) {
  const fields = { adapters: names.join(","), prompt: find("prompt").value, mode: mode() };
  if (mode() === "chat" && find("system").value) fields.system = find("system").value;
  for (const name of NUMBERS) if (find(name).value !== find(name).defaultValue) fields[name] = find(name).value;
  const address = new URL(location.pathname, location.origin);
  address.search = new URLSearchParams({ ...fields, run: "1" });
  return address.href.length > LONGEST ? null : address.href;
}
