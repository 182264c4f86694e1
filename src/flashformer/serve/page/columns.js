// Streams side by side: every column has its own conversation and its own seed.

const MAX_COLUMNS = 8;
const MAX_SEED = 2 ** 32;
const NEAR_END = 48; // pixels from the end of a column at which it still follows its text
const PAGE_ID = `page-${crypto.getRandomValues(new Uint32Array(1))[0].toString(36)}`;
const EXAMPLES = {
  chat: ["What are you?", "Write a function that reverses a string.", "What is a list comprehension?"],
  text: ["def fibonacci(n):\n", "import json\n\n\ndef read_config(path):\n", "class Stack:\n"],
};

class Column {
  constructor(place) {
    this.place = place;
    this.name = String.fromCharCode(65 + place);
    this.turns = [];
    this.num_requests = 0;
    this.body = element("div", {
      className: "turns", role: "log", tabIndex: 0, "aria-label": `Stream ${this.name}`,
    });
    this.seedField = element("input", {
      type: "number", min: 0, step: 1, placeholder: "random", inputMode: "numeric",
      ariaLabel: `Seed of stream ${this.name}`,
    });
    this.stopButton = button("Stop", "plain", () => this.stop());
    this.stopButton.setAttribute("aria-label", `Stop stream ${this.name}`);
    this.node = element("section", { className: "column", "aria-label": `Stream ${this.name}` },
      element("header", {}, element("b", {}, this.name),
        element("label", {}, "Seed ", this.seedField), this.stopButton),
      this.body);
    this.changed();
  }

  get seed() {
    const given = this.seedField.value;
    return given === "" ? Math.floor(Math.random() * MAX_SEED) : Number(given);
  }

  get isRunning() {
    return this.turns.some((turn) => turn.isRunning);
  }

  get isAtEnd() {
    const { scrollHeight, scrollTop, clientHeight } = this.body;
    return scrollHeight - scrollTop - clientHeight < NEAR_END;
  }

  toEnd() {
    this.body.scrollTop = this.body.scrollHeight;
  }

  /** How the machine's picture finds this column among the slots. */
  requestId() {
    this.num_requests += 1;
    return `${PAGE_ID}-${this.name}-${this.num_requests}`;
  }

  messagesBefore(turn) {
    const place = this.turns.indexOf(turn);
    return this.turns.slice(0, place).filter((one) => !one.isText).flatMap((one) => one.messages());
  }

  ask(prompt) {
    if (!this.turns.length) this.body.replaceChildren();
    const turn = new Turn(this, prompt);
    this.turns.push(turn);
    this.body.append(turn.node);
    this.toEnd();
    return turn.run();
  }

  retry(turn) {
    turn.run();
  }

  stop() {
    for (const turn of this.turns) if (turn.isRunning) turn.stop();
  }

  clear() {
    this.stop();
    this.turns = [];
    this.body.replaceChildren();
    this.changed();
  }

  /** Only the last answer can be had again or gone on with: later ones stand on the others. */
  changed() {
    if (!this.isRunning && document.activeElement === this.stopButton) this.body.focus();
    this.body.setAttribute("aria-busy", String(this.isRunning));
    this.stopButton.hidden = !this.isRunning;
    this.turns.forEach((turn, place) => {
      const isLast = place === this.turns.length - 1;
      turn.again.hidden = !isLast || turn.isRunning;
      if (!isLast) turn.further.hidden = true;
    });
    columns.changed();
  }
}

const columns = {
  all: [],

  get isRunning() {
    return this.all.some((column) => column.isRunning);
  },

  /** Show `count` columns; those that go take their conversations along. */
  resize(count) {
    while (this.all.length > count) {
      const column = this.all.pop();
      column.stop();
      column.node.remove();
    }
    while (this.all.length < count) {
      const column = new Column(this.all.length);
      this.all.push(column);
      byId("columns").append(column.node);
    }
    this.welcome();
    this.changed();
  },

  send(prompt) {
    return Promise.all(this.all.map((column) => column.ask(prompt)));
  },

  stop() {
    for (const column of this.all) column.stop();
  },

  clear() {
    for (const column of this.all) column.clear();
    this.welcome();
  },

  /** An empty first column says what can be done. */
  welcome() {
    const [first] = this.all;
    if (first.turns.length) return;
    const texts = EXAMPLES[settings.isText ? "text" : "chat"];
    const examples = texts.map((text) =>
      element("li", {}, button(text.trim().split("\n").at(-1), "", () => use(text))));
    first.body.replaceChildren(element("div", { className: "welcome" },
      element("h2", {}, settings.isText ? "Begin a text" : "Ask something"),
      ...this.advice().map((text) => element("p", {}, text)),
      element("ul", { "aria-label": "Examples" }, ...examples)));
  },

  advice() {
    const { model, isText } = settings;
    const advice = isText ? ["The model goes on where your text ends."] : [];
    if (model?.is_embedded) {
      advice.push("This is the small model that comes with FlashFormer. It writes plausible Python and knows few facts.");
    }
    if (model && !model.has_chat_template) {
      advice.push("This model has no chat template, so it cannot chat.");
    }
    if (this.all.length > 1) advice.push("Your prompt goes to every stream; each has its own seed.");
    return advice;
  },

  changed() {
    const count = this.all.length;
    byId("columns").className = count > 1 ? "several" : "alone";
    say(byId("count"), plural(count, "stream"));
    byId("fewer").disabled = count <= 1;
    byId("more").disabled = count >= MAX_COLUMNS;
    this.showButton();
  },

  /** Send or Stop, in one place: the focus stays there. */
  showButton() {
    const names = this.isRunning ? ["stop", "send"] : ["send", "stop"];
    const [shown, hidden] = names.map(byId);
    const wasFocused = document.activeElement === hidden;
    shown.hidden = false;
    hidden.hidden = true;
    if (wasFocused) shown.focus();
  },
};

function use(text) {
  byId("prompt").value = text;
  byId("prompt").focus();
}
