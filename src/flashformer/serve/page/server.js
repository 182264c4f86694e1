// The server's API. The key is kept for this tab alone.

const KEY_PLACE = "flashformer-key";

/** A browser opens six connections to a server, and counts those without credentials apart: with
 * both, eight streams and the machine's picture go at the same time. No route knows a cookie. */
const POOLS = ["same-origin", "omit"];
const FIRST_POOL = 6;
const poolOf = (column) => POOLS[column < FIRST_POOL ? 0 : 1];

/** What the server said is wrong, in its own sentence. */
class ServerError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

const server = {
  key: kept.get("session", KEY_PLACE),
  asking: null, // a promise while the dialog is open

  /** A response that is good; a wrong or missing key is asked for. */
  async call(path, { body, signal, requestId, pool = "omit" } = {}) {
    for (;;) {
      const key = this.key;
      const headers = {};
      if (key) headers.Authorization = `Bearer ${key}`;
      if (requestId) headers["X-Request-Id"] = requestId;
      if (body) headers["Content-Type"] = "application/json";
      const response = await this.fetch(path, {
        method: body ? "POST" : "GET",
        body: body && JSON.stringify(body),
        headers,
        signal,
        credentials: pool,
        cache: "no-store",
      });
      if (response.ok) return response;
      if (response.status !== 401) throw await sentenceOf(response);
      if (key === this.key) await this.askForKey();
      signal?.throwIfAborted();
    }
  },

  async fetch(path, options) {
    try {
      return await fetch(path, options);
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ServerError("The server cannot be reached. Is it still running?", 0);
    }
  },

  /** The server-sent events of a route, as {name, data}; ends with the stream. */
  async *events(path, options) {
    const response = await this.call(path, options);
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    try {
      for (;;) {
        const { done, value } = await reader.read();
        if (done) return;
        const parts = (rest + value).split("\n\n");
        rest = parts.pop();
        for (const part of parts) {
          const event = parseEvent(part);
          if (event.data === "[DONE]") return;
          if (event.data) yield { name: event.name, data: JSON.parse(event.data) };
        }
      }
    } catch (error) {
      if (error.name === "AbortError" || error instanceof ServerError) throw error;
      throw new ServerError("The connection to the server broke off.", 0);
    } finally {
      reader.cancel().catch(() => {});
    }
  },

  /** Resolves once there is another key; all that need one wait together. */
  askForKey() {
    this.asking ??= new Promise((resolve) => {
      const dialog = byId("key-dialog");
      const problem = byId("key-error");
      problem.hidden = this.key === null;
      say(problem, "The server does not take that key.");
      dialog.addEventListener("cancel", (event) => event.preventDefault());
      byId("key-form").onsubmit = (event) => {
        event.preventDefault();
        this.key = byId("key").value.trim();
        kept.set("session", KEY_PLACE, this.key);
        byId("key").value = "";
        dialog.close();
        this.asking = null;
        resolve();
      };
      dialog.showModal();
    });
    return this.asking;
  },
};

function parseEvent(text) {
  const event = { name: "message", data: "" };
  for (const line of text.split("\n")) {
    if (line.startsWith("data: ")) event.data += line.slice(6);
    else if (line.startsWith("event: ")) event.name = line.slice(7);
  }
  return event;
}

/** An answer that is no success, as the sentence that the server wrote. */
async function sentenceOf(response) {
  try {
    const { error } = await response.json();
    return new ServerError(asSentence(error.message), response.status);
  } catch {
    return new ServerError(`The server answered ${response.status} without a reason.`, response.status);
  }
}

const asSentence = (text) => text.charAt(0).toUpperCase() + text.slice(1);
