// Elements and numbers. Everything that a server or a model says becomes a text node, never markup.

const byId = (id) => document.getElementById(id);

/** A new element: properties are set, `data-*`, `aria-*` and `role` become attributes. */
function element(name, properties = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (/^(data-|aria-|role$)/.test(key)) made.setAttribute(key, value);
    else made[key] = value;
  }
  made.append(...children);
  return made;
}

/** Change a text only if it differs, so that nothing is laid out or read aloud for nothing. */
function say(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

/** What the browser keeps for this page: `local` for good, `session` for this tab. A person may
 * have forbidden it to keep anything; then the page forgets. */
const kept = {
  get(kind, place) {
    try {
      return window[`${kind}Storage`].getItem(place);
    } catch {
      return null;
    }
  },
  set(kind, place, text) {
    try {
      window[`${kind}Storage`].setItem(place, text);
    } catch {
      // Forbidden, or full: nothing here is worth a word about it.
    }
  },
};

/** Tell a screen reader what the eye sees by itself. */
const announce = (text) => say(byId("announcer"), text);

const setPart = (node, part, name = "--part") => node.style.setProperty(name, String(part));

/** Three significant digits, without an exponent. */
function digits(value) {
  if (!Number.isFinite(value)) return "–";
  const places = value === 0 || value >= 100 ? 0 : Math.max(0, 2 - Math.floor(Math.log10(value)));
  return value.toLocaleString("en", { maximumFractionDigits: Math.min(places, 3) });
}

function seconds(value) {
  if (value >= 1) return `${digits(value)} s`;
  if (value >= 1e-3) return `${digits(value * 1e3)} ms`;
  return value >= 1e-6 ? `${Math.round(value * 1e6)} µs` : "< 1 µs";
}

function bytes(value) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let place = 0;
  while (value >= 1000 && place < units.length - 1) {
    value /= 1000;
    place += 1;
  }
  return `${digits(value)} ${units[place]}`;
}

const plural = (count, one, many = `${one}s`) => `${count.toLocaleString("en")} ${count === 1 ? one : many}`;

function duration(value) {
  const minutes = Math.floor(value / 60);
  if (minutes < 1) return `${Math.floor(value)} s`;
  return minutes < 60 ? `${minutes} min` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}
