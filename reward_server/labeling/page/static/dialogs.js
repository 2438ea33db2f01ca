// The dialogs: the keys, and why something cannot be ranked.
import { button, find, make } from "./api.js";

const KEYS = [
  ["1 to 9", "Give the output in the frame its rank, or its quality (1 to 7), and go on to the next"],
  ["same number", "A tie"],
  ["A to I, arrows", "Move to an output"],
  ["0, Backspace", "Take the rank or the quality of the output away"],
  ["letters on flags", "Set or clear a flag"],
  ["Enter", "Go on: from rating to ranking, then save"],
  ["U", "Undo the last change; without one, back to the answer before"],
  ["M", "Show all of a long output, or less of it"],
  ["N", "Say that it cannot be ranked, and why"],
  ["R", "Guidelines"],
  ["Ctrl Enter", "Save a text that you wrote"],
  ["Esc", "Close what is open"],
];
const REASONS = [
  "The prompt makes no sense",
  "I do not know enough about it",
  "I do not read this language",
  "I would rather not read this",
];

/** Show which keys there are. */
export function showKeys() {
  const dialog = find("#keys");
  dialog.replaceChildren(make("h2", { id: "keys-title" }, "Keys"),
    make("dl", {}, ...KEYS.flatMap(([key, words]) => [make("dt", {}, make("kbd", {}, key)), make("dd", {}, words)])),
    make("p", { class: "quiet" }, "By mouse or finger: press the numbers, or drag a letter into a rank."),
    make("div", { class: "acts" }, button("Close", () => dialog.close(), { class: "go ready" })));
  dialog.showModal();
}

/** Ask why; resolves with the reason, or null. Keys 1 to 4 choose, Enter confirms. */
export function askReason() {
  return new Promise(done => {
    const dialog = find("#cannot");
    const other = make("input", { type: "text", maxlength: "300", "aria-label": "Another reason",
      placeholder: "Another reason" });
    const choose = reason => { dialog.close(); done(reason); };
    const confirm = () => (other.value.trim() ? choose(other.value.trim()) : other.focus());
    other.addEventListener("keydown", event => event.key === "Enter" && (event.preventDefault(), confirm()));
    dialog.onkeydown = event => {
      const chosen = event.target === other ? undefined : REASONS[Number(event.key) - 1];
      if (chosen) { event.preventDefault(); choose(chosen); }
    };
    dialog.oncancel = () => done(null);
    dialog.replaceChildren(make("h2", { id: "cannot-title" }, "Why can it not be done?"),
      make("div", { class: "reasons" }, ...REASONS.map((reason, place) =>
        button([make("kbd", {}, String(place + 1)), ` ${reason}`], () => choose(reason))), other),
      make("div", { class: "acts" },
        button("Back", () => choose(null), { class: "plain" }),
        button("Save and go on", confirm, { class: "go ready" })));
    dialog.showModal();
  });
}
