// The machine, live: what `/live` tells four times a second.

const HISTORY = 240; // pictures: a minute
const RATE_PICTURES = 4; // over which the rate is taken: a second
const RETRY_MS = 1500;
const STATES = {
  connecting: "connecting",
  loading: "loading the model",
  ready: "ready",
  restarting: "starting the engine again",
  draining: "shutting down",
  down: "the engine is down",
  closed: "shutting down",
  lost: "server not reached",
};

const machine = {
  card: null, // what the model is
  history: Array(HISTORY).fill(0), // tokens a second
  totals: [], // of the last pictures: [seconds, tokens]
  abort: null,

  /** Watches while the page is seen; comes back by itself when the server does. */
  async watch() {
    document.addEventListener("visibilitychange", () => {
      if (document.hidden) this.abort?.abort();
    });
    for (;;) {
      if (document.hidden) await new Promise((seen) =>
        document.addEventListener("visibilitychange", seen, { once: true }));
      this.abort = new AbortController();
      try {
        for await (const event of server.events("/live", { signal: this.abort.signal })) {
          if (event.name === "model") this.introduce(event.data);
          else this.show(event.data);
        }
        this.state("lost");
      } catch (error) {
        if (error.name !== "AbortError") this.state("lost");
      }
      if (!document.hidden) await new Promise((over) => setTimeout(over, RETRY_MS));
    }
  },

  introduce(card) {
    this.card = card;
    say(byId("model"), card.model_id);
    say(byId("format"), `${card.format} on ${card.device}`);
    byId("model").parentNode.title = `${card.machine}; ${bytes(card.image_bytes)} of weights, `
      + `up to ${plural(card.context, "token")} a sequence`;
    settings.use(card);
    columns.welcome();
  },

  state(name) {
    byId("state").dataset.state = name;
    say(byId("state-text"), STATES[name] ?? name);
  },

  show(picture) {
    this.state(picture.state);
    if (!this.card) return;
    this.showSpeed(picture);
    this.showBandwidth(picture);
    this.showWaterfall(picture.stages);
    this.showSlots(picture);
    this.showPages(picture);
    const parts = [plural(picture.total_tokens, "token"), plural(picture.total_requests, "request")];
    if (picture.engine_restarts) parts.push(plural(picture.engine_restarts, "engine restart"));
    say(byId("totals"), `${parts.join(" and ")} in ${duration(picture.uptime)}.`);
  },

  showSpeed(picture) {
    const rate = this.rate(picture);
    this.history.push(rate);
    this.history.shift();
    say(byId("rate"), digits(rate));
    say(byId("step"), picture.step_seconds === null ? "–" : seconds(picture.step_seconds));
    say(byId("prompt-rate"), `${digits(picture.prompt_tokens_per_second)} tokens a second`);
    const top = Math.max(1, ...this.history);
    const points = this.history.map((value, i) => `${i} ${(42 - (40 * value) / top).toFixed(1)}`);
    const [area, line] = byId("history").children;
    line.setAttribute("d", `M${points.join("L")}`);
    area.setAttribute("d", `M0 44L${points.join("L")}L${HISTORY - 1} 44Z`);
  },

  /** Tokens of the last second; the server's own mean is over five. */
  rate({ uptime, total_tokens: tokens }) {
    this.totals.push([uptime, tokens]);
    if (this.totals.length > RATE_PICTURES + 1) this.totals.shift();
    const [began, before] = this.totals[0];
    if (uptime < began || tokens < before) this.totals = []; // another server
    return uptime > began ? Math.max(0, (tokens - before) / (uptime - began)) : 0;
  },

  showBandwidth({ gb_per_second: rate, read_gb_s: limit, share }) {
    setPart(byId("share-bar").firstChild, Math.min(1, share ?? 0));
    byId("share-bar").hidden = limit === null;
    say(byId("share"), share === null ? "" : `${Math.round(100 * share)} %`);
    byId("share-bar").setAttribute("aria-label", share === null
      ? "Share of the read bandwidth: nothing runs" : `${Math.round(100 * share)} % of the read bandwidth`);
    const read = rate === null ? "nothing is read now" : `${digits(rate)} GB/s`;
    say(byId("bandwidth"), limit === null || rate === null ? read : `${read} of ${digits(limit)} GB/s`);
    say(byId("bandwidth-note"), limit === null
      ? "Bytes that a step must read, by the plan, over its measured time. No share: weights of "
        + `${bytes(this.card.image_bytes)} may come from the processor's caches.`
      : "Bytes that a step must read, by the plan, over its measured time; the limit was measured when the model was loaded.");
  },

  showWaterfall(stages) {
    const isMeasured = stages.every((stage) => stage.seconds !== null);
    const size = (stage) => (isMeasured ? stage.seconds : stage.nbytes);
    const total = stages.reduce((sum, stage) => sum + size(stage), 0) || 1;
    const list = byId("waterfall");
    while (list.children.length < stages.length) list.append(waterfallRow());
    let from = 0;
    stages.forEach((stage, i) => {
      const [name, track, time, read] = list.children[i].children;
      list.children[i].className = stage.name;
      say(name, stage.name);
      setPart(track.firstChild, from / total, "--from");
      setPart(track.firstChild, size(stage) / total);
      say(time, isMeasured ? seconds(stage.seconds) : "");
      say(read, stage.nbytes ? bytes(stage.nbytes) : "");
      from += size(stage);
    });
    say(byId("waterfall-note"), isMeasured
      ? `Times are measured inside the kernel: medians of the last steps, ${seconds(total)} in all, each stage with its layers together. Bytes are the plan's.`
      : this.unmeasured());
  },

  unmeasured() {
    return this.card.device === "cpu"
      ? "Lengths are the plan's bytes; measured times come with the first answer."
      : `Lengths are the bytes that each stage reads, by the plan; on ${this.card.device} no times are measured here.`;
  },

  showSlots(picture) {
    const list = byId("slots");
    while (list.children.length < picture.max_batch) list.append(slotBox());
    [...list.children].forEach((box, i) => {
      const slot = picture.slots[i];
      const [fill, name, size] = box.children;
      const own = slot?.request_id.startsWith(PAGE_ID) ? slot.request_id.split("-")[2] : null;
      box.className = slot ? (own ? "taken mine" : "taken") : "";
      setPart(fill, slot ? Math.min(1, slot.tokens / this.card.context) : 0);
      say(name, slot ? (own ?? "other") : "");
      say(size, slot ? slot.tokens.toLocaleString("en") : "free");
      box.title = slot ? `${slot.tokens} of ${this.card.context} tokens, ${slot.prompt_tokens} of the prompt` : "";
    });
    const waiting = picture.num_waiting ? `, ${picture.num_waiting} waiting` : "";
    say(byId("queue"), `${picture.num_running} of ${picture.max_batch} slots taken${waiting}. Numbers are tokens; the fill is of ${this.card.context.toLocaleString("en")}.`);
  },

  showPages({ pages_used: used, pages_cached: cached, num_pages: all }) {
    const bar = byId("pages-bar");
    setPart(bar.children[0], used / all);
    setPart(bar.children[1], cached / all);
    const text = `${used} of ${plural(all, "page")} in use, ${cached} kept for prompts that begin the same. A page has ${this.card.page_tokens} tokens; all are ${bytes(this.card.kv_bytes)}.`;
    bar.setAttribute("aria-label", text);
    say(byId("pages"), text);
  },
};

const waterfallRow = () =>
  element("li", {}, element("span"), element("div", { className: "track" }, element("i")),
    element("span"), element("span"));

const slotBox = () => element("li", {}, element("i"), element("b"), element("span"));
