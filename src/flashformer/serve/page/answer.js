// What a model writes, as it comes: text, and between fences of three backticks code.

const FENCE = /^ {0,3}```/;
const MAYBE_FENCE = /^ {0,3}`{0,3}$/; // as far as it has come

class Answer {
  /** Without `fences` all of it is one text. */
  constructor(fences) {
    this.fences = fences;
    this.node = element("div", { className: "answer" }, element("span", { className: "hidden" }, "Model: "));
    this.clear();
  }

  clear() {
    this.text = ""; // all of it
    this.held = ""; // the start of a line that may become a fence
    this.midLine = false;
    this.inCode = false;
    while (this.node.childNodes.length > 1) this.node.lastChild.remove();
    this.open();
  }

  /** A new block; the newest text node is where text goes. */
  open() {
    this.place = document.createTextNode("");
    const block = this.inCode ? element("pre", {}, this.place) : this.place;
    this.node.append(block);
  }

  append(text) {
    this.text += text;
    if (!this.fences) {
      this.place.appendData(text);
      return;
    }
    const lines = (this.held + text).split("\n");
    this.held = "";
    lines.forEach((line, i) => this.take(line, i < lines.length - 1));
  }

  take(line, isWhole) {
    const isFence = !this.midLine && FENCE.test(line);
    if (!isWhole && (isFence || (!this.midLine && line && MAYBE_FENCE.test(line)))) {
      this.held = line;
      return;
    }
    if (isFence) {
      this.inCode = !this.inCode;
      this.trim();
      this.open();
    } else {
      this.place.appendData(isWhole ? `${line}\n` : line);
    }
    this.midLine = !isWhole && (this.midLine || line !== "");
  }

  /** A block needs no line's end before its edge. */
  trim() {
    this.place.data = this.place.data.replace(/\n$/, "");
  }

  /** Nothing more comes: what was held is what it looks like. */
  end() {
    const { held } = this;
    this.held = "";
    if (FENCE.test(held)) {
      this.take(held, true);
    } else if (held) {
      this.place.appendData(held);
      this.midLine = true;
    }
  }
}
