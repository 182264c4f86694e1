// What requests ask for: sampling, mode, number of streams. Kept by the browser, except prompts.

const SETTINGS_PLACE = "flashformer-settings";
const THEME_PLACE = "flashformer-theme";
const THEMES = ["auto", "light", "dark"];
const NUMBERS = ["temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_tokens"];
const MAX_STOPS = 16;

const settings = {
  model: null, // the model's card, once the server has told it
  hasChosen: false, // a mode, now or earlier

  form: () => byId("composer").elements,

  /** Whether prompts are continued as text: chosen, or because the model cannot chat. */
  get isText() {
    return this.form().mode.value === "text";
  },

  /** The sampling fields of a request; an empty field is left out: the model's default. */
  params() {
    const form = this.form();
    const params = {};
    for (const name of NUMBERS) {
      if (form[name].value !== "") params[name] = Number(form[name].value);
    }
    const stops = form.stop.value.split("\n").filter((line) => line !== "");
    if (stops.length) params.stop = stops.slice(0, MAX_STOPS);
    return params;
  },

  get system() {
    return this.form().system.value.trim();
  },

  /** Whether every stream would write the same, whatever its seed. */
  get isGreedy() {
    const { temperature } = this.form();
    const given = temperature.value === "" ? this.model?.defaults.temperature : Number(temperature.value);
    return given === 0;
  },

  /** The first field with a value that no request may have, or null. */
  firstWrong() {
    return NUMBERS.map((name) => this.form()[name]).find((field) => !field.validity.valid) ?? null;
  },

  use(model) {
    this.model = model;
    for (const name of NUMBERS) this.form()[name].placeholder = shownDefault(name, model.defaults[name]);
    const [chat, text] = this.form().mode;
    chat.disabled = !model.has_chat_template;
    if (chat.disabled || (model.is_embedded && !this.hasChosen)) text.checked = true;
    this.changed();
  },

  /** Called after every change: keeps it, and shows what depends on it. */
  changed() {
    byId("system-field").hidden = this.isText;
    byId("prompt").placeholder = this.isText ? "A text to go on with" : "A message";
    const values = this.hasChosen ? { mode: this.form().mode.value } : {};
    for (const name of NUMBERS) values[name] = this.form()[name].value;
    kept.set("local", SETTINGS_PLACE, JSON.stringify(values));
  },

  restore() {
    const values = JSON.parse(kept.get("local", SETTINGS_PLACE)) ?? {};
    for (const name of NUMBERS) this.form()[name].value = values[name] ?? "";
    this.hasChosen = Boolean(values.mode);
    if (this.hasChosen) this.form().mode.value = values.mode;
    this.changed();
  },

  reset() {
    for (const name of [...NUMBERS, "stop", "system"]) this.form()[name].value = "";
    this.changed();
  },
};

function shownDefault(name, value) {
  if (name === "max_tokens" && value === null) return "no limit";
  if (name === "top_k" && value <= 0) return "all";
  return value === undefined || value === null ? "" : String(value);
}

const theme = {
  chosen: kept.get("local", THEME_PLACE) ?? "auto",

  show() {
    if (this.chosen === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = this.chosen;
    const names = { auto: "as the system", light: "light", dark: "dark" };
    const button = byId("theme");
    say(button, { auto: "◐ Auto", light: "○ Light", dark: "● Dark" }[this.chosen]);
    button.setAttribute("aria-label", `Colours: ${names[this.chosen]}. Change`);
  },

  next() {
    this.chosen = THEMES[(THEMES.indexOf(this.chosen) + 1) % THEMES.length];
    kept.set("local", THEME_PLACE, this.chosen);
    this.show();
  },
};
