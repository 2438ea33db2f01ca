// The page of whoever runs the labeling: progress, pace, agreement, who is left out and why.
import { ask, button, find, make, Refused, signedIn, signOut, tell } from "./api.js";

const EVERY_MS = 10_000;
const COLUMNS = [
  "labeler", "done", "open", "seconds", "an hour", "agreement", "alpha", "gold", "repeats", "too fast", "",
];
const PAPER = 0.73; // labelers of the paper agreed on so many pairs

const percent = value => (value === null || value === undefined ? "–" : `${Math.round(value * 100)} %`);
const number = (value, digits = 0) => (value === null || value === undefined ? "–" : value.toFixed(digits));

/** A figure with a caption, and a bar with a mark where there is a share. */
function figure(name, value, caption, share, mark) {
  const one = make("div", { class: "card figure" }, make("small", {}, name), make("b", {}, value));
  if (share !== undefined && share !== null) {
    const bar = make("div", { class: "meter", "aria-hidden": "true" }, make("i", {}));
    bar.firstChild.style.width = `${Math.max(0, Math.min(1, share)) * 100}%`;
    if (mark) {
      bar.append(make("em", {}));
      bar.lastChild.style.left = `${mark * 100}%`;
    }
    one.append(bar);
  }
  one.append(make("small", {}, caption));
  return one;
}

function table(head, rows, empty) {
  if (!rows.length) return make("p", { class: "quiet" }, empty);
  const line = (cells, tag) => make("tr", {}, ...cells.map(cell =>
    make(tag, { class: typeof cell === "string" && /^[–\d]/.test(cell) ? "number" : null }, cell)));
  return make("div", { class: "table", tabindex: "0" }, make("table", {},
    make("thead", {}, line(head, "th")), make("tbody", {}, ...rows.map(cells => line(cells, "td")))));
}

/** Who is left out and why, and a button to do or undo it. */
function place({ labeler, left_out: why }, name) {
  if (why === null) return button("Leave out", () => askWhy(labeler, name), { "aria-label": `Leave out ${name}` });
  return make("span", { class: "place" }, make("span", { class: "badge bad" }, `left out: ${why}`),
    button("Take back", () => change(labeler, null), { "aria-label": `Take back ${name}` }));
}

/** Leave a labeler out for a reason, or with null take that back. */
async function change(labeler, reason) {
  try {
    await ask("POST", "/api/admin/leave_out", { labeler, reason });
    const { labelers } = await refresh();
    const still = labelers.find(one => one.labeler === labeler)?.left_out;
    if (reason === null && still) tell(`Still left out: ${still}`);
  } catch (error) {
    tell(`Not done: ${error.message}`);
  }
}

function askWhy(labeler, name) {
  const dialog = find("#why");
  const reason = make("input", { type: "text", id: "reason", maxlength: "300" });
  const go = () => {
    if (!reason.value.trim()) return reason.focus();
    dialog.close();
    change(labeler, reason.value.trim());
  };
  reason.addEventListener("keydown", event => {
    if (event.key !== "Enter") return;
    event.preventDefault(); // else it also presses the button that has the focus next
    go();
  });
  dialog.replaceChildren(make("h2", { id: "why-title" }, `Leave ${name} out of the export?`),
    make("p", {}, "The answers stay in the log; the reason is recorded, and you can take this back."),
    make("label", { for: "reason" }, "Reason"), reason,
    make("div", { class: "acts" }, button("Back", () => dialog.close(), { class: "plain" }),
      button("Leave out", go, { class: "go ready" })));
  dialog.showModal();
}

function figures({ given, wanted, items, unranked, per_hour, agreement: { pairs, alpha } }) {
  return make("div", { class: "figures" },
    figure("Answers", `${given} of ${wanted}`, `${items} items · ${unranked} could not be ranked`,
      given / Math.max(1, wanted)),
    figure("Pace", `${number(per_hour)} an hour`, "all labelers, the last hour"),
    figure("Agreement", percent(pairs.value), `${pairs.count} pairs · the mark is the paper’s 73 %`,
      pairs.value ?? 0, PAPER),
    figure("Krippendorff’s alpha", number(alpha, 2), "of ranks: 1 is perfect, 0 is chance", alpha ?? 0));
}

function row(one, name) {
  const { pairs, alpha } = one.agreement;
  return [name, String(one.done), String(one.open), number(one.seconds), number(one.per_hour), percent(pairs.value),
    number(alpha, 2), `${percent(one.gold.value)}${one.golds ? ` of ${one.golds}` : ""}`, percent(one.repeats.value),
    String(one.too_fast), place(one, name)];
}

function shown(progress) {
  const { names, labelers, use_cases: cases, adjudication } = progress;
  const begun = labelers.map(one => one.labeler);
  const waiting = Object.keys(names).filter(id => !begun.includes(id));
  const named = id => `${names[id] ?? "?"} (${id})`;
  return [
    figures(progress),
    make("h2", {}, "Labelers"),
    table(COLUMNS, labelers.map(one => row(one, named(one.labeler))), "Nobody has begun."),
    waiting.length ? make("p", { class: "quiet" }, `Invited, and not begun: ${waiting.map(named).join(", ")}`) : null,
    make("h2", {}, "By use case"),
    table(["use case", "agreement", "pairs", "alpha"], Object.entries(cases).map(([name, { pairs, alpha }]) =>
      [name, percent(pairs.value), String(pairs.count), number(alpha, 2)]), "The prompts have no use cases."),
    make("h2", {}, `Adjudication · ${adjudication.length}`),
    make("p", { class: "quiet" }, adjudication.length
      ? "Labelers disagree on these. One more labeler, who has not seen it, ranks each."
      : "No item is below the bound."),
    make("ul", { class: "items" }, ...adjudication.map(id => make("li", {}, make("code", {}, id)))),
  ].filter(Boolean);
}

async function refresh() {
  try {
    const progress = await ask("GET", "/api/admin");
    const at = document.activeElement?.getAttribute("aria-label"); // a button that is made anew keeps the focus
    find("#main").replaceChildren(make("h1", {}, "Labeling"), ...shown(progress));
    if (at) find(`main [aria-label=${CSS.escape(at)}]`)?.focus();
    find("#offline").hidden = true;
    find("#saving").textContent = `as of ${new Date().toLocaleTimeString()}`;
    return progress;
  } catch (error) {
    if (error instanceof Refused && error.status === 401) location.reload();
    const why = error instanceof Refused ? error.message : "offline";
    find("#offline").textContent = `The server does not answer (${why}). The figures are old.`;
    find("#offline").hidden = false;
    return { labelers: [] };
  }
}

async function start() {
  const me = await signedIn();
  find("#leave").hidden = false;
  find("#leave").addEventListener("click", signOut);
  if (!me.admin) {
    find("#main").replaceChildren(make("section", { class: "card alone" },
      make("h1", {}, "This page needs an admin’s link"),
      make("p", {}, `${me.name} is a labeler. `, make("a", { href: "/" }, "Go to the labeling page"), ".")));
    return;
  }
  await refresh();
  setInterval(refresh, EVERY_MS);
}

start().catch(error => tell(error.message));
