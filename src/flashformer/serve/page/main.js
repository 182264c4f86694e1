// Joins the parts: keys, buttons, and the first look at the server.

const wide = matchMedia("(min-width: 901px)");
const HINTS = {
  running: "The streams are still writing; Esc stops them.",
  greedy: "At temperature 0 every stream writes the same; set a temperature under Sampling to see them differ.",
};

function notice(text, isHint = false) {
  const place = byId("notice");
  place.className = isHint ? "hint" : "";
  place.hidden = !text;
  say(place, text);
}

function send() {
  const prompt = byId("prompt").value;
  if (!prompt.trim()) return;
  if (columns.isRunning) {
    notice(HINTS.running, true);
    return;
  }
  const wrong = settings.firstWrong();
  if (wrong) {
    showSettings(true);
    notice(`${wrong.labels[0].textContent.trim()}: ${wrong.validationMessage}`);
    wrong.focus();
    return;
  }
  notice(columns.all.length > 1 && settings.isGreedy ? HINTS.greedy : "", true);
  byId("prompt").value = "";
  columns.send(prompt);
}

// A narrow window has room for one of the two beside the conversation.
function showSettings(open) {
  if (open && !wide.matches) showMachine(false);
  byId("settings").hidden = !open;
  byId("settings-toggle").setAttribute("aria-expanded", String(open));
}

function showMachine(open) {
  if (open && !wide.matches) showSettings(false);
  byId("machine").classList.toggle("open", open);
  byId("machine").classList.toggle("closed", !open);
  byId("machine-toggle").setAttribute("aria-expanded", String(open));
}

function resize(step) {
  columns.resize(columns.all.length + step);
  byId("columns").scrollLeft = byId("columns").scrollWidth;
}

function onKey(event) {
  if (event.key === "Escape" && columns.isRunning && !byId("key-dialog").open) {
    columns.stop();
    byId("prompt").focus();
  } else if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    send();
  }
}

byId("composer").noValidate = true;
byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
byId("composer").addEventListener("input", (event) => {
  if (event.target === byId("prompt")) return;
  if (event.target.name === "mode") settings.hasChosen = true;
  settings.changed();
  notice("");
  if (event.target.name === "mode") columns.welcome();
});
document.addEventListener("keydown", onKey);
byId("stop").onclick = () => columns.stop();
byId("fewer").onclick = () => resize(-1);
byId("more").onclick = () => resize(1);
byId("clear").onclick = () => {
  columns.clear();
  byId("prompt").focus();
};
byId("reset").onclick = () => settings.reset();
byId("theme").onclick = () => theme.next();
byId("settings-toggle").onclick = () => showSettings(byId("settings").hidden);
byId("machine-toggle").onclick = () =>
  showMachine(byId("machine-toggle").getAttribute("aria-expanded") !== "true");
wide.addEventListener("change", () => showMachine(wide.matches));

theme.show();
settings.restore();
columns.resize(1);
showMachine(wide.matches);
if (wide.matches) byId("prompt").focus();
machine.watch();
