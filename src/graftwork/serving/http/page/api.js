// The server's API: the key, plain requests, and streams of server-sent events.

const STORE = "graftwork-key";

export const getKey = () => sessionStorage.getItem(STORE) ?? "";
export const setKey = (key) => (key ? sessionStorage.setItem(STORE, key) : sessionStorage.removeItem(STORE));

/** What went wrong, in words for people; status 0: no answer. */
export class Failure extends Error {
  constructor(message, status = 0, code = null) {
    super(message);
    this.status = status;
    this.code = code;
    this.key = null; // with which it was asked
  }

  /** Whether the server wants a key, or another one than the one that is used now. */
  get needsKey() {
    return this.status === 401 && this.key === getKey();
  }
}

/** An error in OpenAI's shape, or whatever else came. */
function failure(status, content, wait = null) {
  const error = content?.error ?? {};
  const message = typeof error.message === "string" ? error.message : `The server answered with status ${status} and no reason.`;
  const again = wait ? ` Try again in ${wait} s.` : "";
  return new Failure(message.charAt(0).toUpperCase() + message.slice(1) + again, status, error.code ?? error.type ?? null);
}

/** The response to GET, or to POST where there is a body. Throws Failure, and AbortError. */
async function ask(path, { body, signal } = {}) {
  const key = getKey();
  const headers = { ...(body ? { "content-type": "application/json" } : {}), ...(key ? { authorization: `Bearer ${key}` } : {}) };
  let response;
  try {
    response = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Failure("The server does not answer. Is it still running?");
  }
  if (response.ok) return response;
  const found = failure(response.status, await response.json().catch(() => null), response.headers.get("retry-after"));
  throw Object.assign(found, { key });
}

export async function get(path) {
  return (await ask(path)).json();
}

/** The events of a stream, one object each. Throws Failure, also for an error on the way. */
export async function* stream(path, body, signal) {
  const response = await ask(path, { body, signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    let read;
    try {
      read = await reader.read();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Failure("The connection broke off before the answer had ended.");
    }
    if (read.done) throw new Failure("The answer broke off before its end.");
    const parts = (rest + read.value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw failure(response.status, event);
      yield event;
    }
  }
}
