// One prompt and the answer to it, in one column.

const ENDS = { stop: "complete", length: "cut at the limit of tokens", stopped: "stopped", failed: "" };

class Turn {
  /** `history`: the turns before it; `column` gives the seed and the connection. */
  constructor(column, prompt) {
    this.column = column;
    this.prompt = prompt;
    this.isText = settings.isText;
    this.answer = new Answer(!this.isText);
    this.finish = null; // null while it runs: stop | length | stopped | failed
    this.pending = "";
    this.frame = 0;
    this.make();
  }

  make() {
    this.thoughts = document.createTextNode("");
    this.thinking = element("details", { className: "thoughts", hidden: true },
      element("summary", {}, "Reasoning"), element("div", {}, this.thoughts));
    this.problem = element("p", { className: "error", hidden: true });
    this.figures = element("span");
    this.again = button("Retry", "link", () => this.column.retry(this));
    this.further = button("Go on", "link", () => this.run({ goOn: true }));
    this.copy = button("Copy", "link", () => this.copyAnswer());
    this.footer = element("footer", {}, this.figures, this.further, this.again, this.copy);
    this.node = element("article", { className: this.isText ? "turn text" : "turn" },
      element("div", { className: "asked" }, element("span", { className: "hidden" }, "You: "), this.prompt),
      this.thinking,
      this.answer.node,
      this.problem,
      this.footer);
  }

  get isRunning() {
    return this.finish === null;
  }

  /** What a later turn of the conversation knows of this one. */
  messages() {
    const asked = { role: "user", content: this.prompt };
    const { text } = this.answer;
    return text ? [asked, { role: "assistant", content: text }] : [];
  }

  request(goOn) {
    const shared = {
      ...settings.params(),
      seed: this.seed,
      stream: true,
      stream_options: { include_usage: true, continuous_usage_stats: true },
    };
    if (this.isText) {
      return ["/v1/completions", { prompt: this.prompt + (goOn ? this.answer.text : ""), ...shared }];
    }
    const messages = settings.system ? [{ role: "system", content: settings.system }] : [];
    messages.push(...this.column.messagesBefore(this));
    messages.push(...(goOn ? this.messages() : [{ role: "user", content: this.prompt }]));
    if (goOn) shared.continue_final_message = true;
    return ["/v1/chat/completions", { messages, ...shared }];
  }

  /** Writes the answer, or goes on with the one that is there; never throws. */
  async run({ goOn = false } = {}) {
    this.begin(goOn);
    const [path, body] = this.request(goOn);
    try {
      const options = { body, signal: this.abort.signal, pool: poolOf(this.column.place),
        requestId: this.column.requestId() };
      for await (const { data } of server.events(path, options)) this.take(data);
      this.finish ??= "stop";
    } catch (error) {
      this.finish = error.name === "AbortError" ? "stopped" : "failed";
      if (this.finish === "failed") this.fail(error);
    }
    this.end();
  }

  begin(goOn) {
    this.seed = this.column.seed;
    this.abort = new AbortController();
    this.finish = null;
    this.tokens = 0;
    this.sent = performance.now();
    this.first = this.last = 0;
    if (!goOn) {
      this.answer.clear();
      this.thoughts.data = "";
      this.thinking.hidden = true;
    }
    this.problem.hidden = true;
    this.node.classList.add("running");
    if (this.footer.contains(document.activeElement)) this.column.body.focus();
    this.further.hidden = this.again.hidden = this.copy.hidden = true;
    say(this.figures, "waits for its first token");
    this.column.changed();
  }

  /** One chunk of either API. */
  take(chunk) {
    if (chunk.error) throw new ServerError(asSentence(chunk.error.message), 200);
    const choice = chunk.choices[0];
    if (chunk.usage) this.tokens = chunk.usage.completion_tokens;
    if (!choice) return;
    const text = choice.text ?? choice.delta.content ?? "";
    const thought = choice.delta?.reasoning_content ?? "";
    if (text || thought) {
      this.last = performance.now();
      this.first ||= this.last;
    }
    if (thought) {
      this.thinking.hidden = false;
      this.thoughts.appendData(thought);
    }
    this.pending += text;
    if (choice.finish_reason) this.finish = choice.finish_reason;
    this.frame ||= requestAnimationFrame(() => this.show());
  }

  /** At most once a picture of the screen, however fast tokens come. */
  show() {
    cancelAnimationFrame(this.frame);
    this.frame = 0;
    const follow = this.column.isAtEnd;
    this.answer.append(this.pending);
    this.pending = "";
    if (this.first) say(this.figures, this.speed());
    if (follow) this.column.toEnd();
  }

  speed() {
    const rate = (1e3 * (this.tokens - 1)) / (this.last - this.first);
    const parts = [plural(this.tokens, "token")];
    if (this.tokens > 4 && Number.isFinite(rate)) parts.push(`${digits(rate)} a second`);
    parts.push(`first after ${seconds((this.first - this.sent) / 1e3)}`);
    return parts.join(" · ");
  }

  fail(error) {
    say(this.problem, error.message);
    this.problem.hidden = false;
  }

  end() {
    this.show();
    this.answer.end();
    this.node.classList.remove("running");
    this.further.hidden = this.finish !== "length" || !this.answer.text;
    this.copy.hidden = !this.answer.text || !navigator.clipboard; // only where it is secure
    const ended = ENDS[this.finish] ?? this.finish;
    const parts = [this.first ? this.speed() : this.finish === "stop" ? "nothing to add" : "", ended, `seed ${this.seed}`];
    say(this.figures, parts.filter(Boolean).join(" · "));
    this.column.changed();
    announce(this.finish === "failed" ? this.problem.textContent
      : `Stream ${this.column.name}: ${plural(this.tokens, "token")}, ${ended}.`);
  }

  stop() {
    this.abort.abort();
  }

  async copyAnswer() {
    await navigator.clipboard.writeText(this.answer.text);
    announce("Copied.");
  }
}

function button(text, className, onclick) {
  return element("button", { type: "button", className, onclick }, text);
}
