// The labeler's page: which item is open, what was changed, what is saved.
import { ask, button, find, make, Refused, signedIn, signOut, tell } from "./api.js";
import { Clock } from "./clock.js";
import { Demonstration } from "./demonstration.js";
import { askReason, showKeys } from "./dialogs.js";
import { Outbox, uuid } from "./outbox.js";
import { Ranking } from "./rank.js";
import { written } from "./text.js";

const RETRY_MS = 3000;
const NOTHING_MS = 15_000; // between questions whether there is more to do
const clock = new Clock();
let me, outbox;
let now = null; // the assignment on the page
let view = null; // its Ranking or Demonstration
let left = null; // of a tab that is gone: what it had not saved before another one changed the same
let saving = { waiting: 0, why: null }; // of the outbox
let unreachable = null; // why the last question had no answer
let leaving = null;

/** Ask until there is an answer; says so while the server cannot be reached. */
async function insist(method, path, body) {
  for (;;) {
    try {
      const said = await ask(method, path, body);
      unreachable = null;
      showState();
      return said;
    } catch (error) {
      if (error instanceof Refused && error.status === 401) await comeBack();
      if (error instanceof Refused && error.status < 500 && error.status !== 429) throw error;
      unreachable = error instanceof Refused ? error.message : "offline";
      showState();
      await new Promise(done => setTimeout(done, error.after ? error.after * 1000 : RETRY_MS));
    }
  }
}

/** After a sign-out elsewhere: sign in, and begin anew with what waits in this browser. */
function comeBack() {
  leaving ??= signedIn().then(() => location.reload());
  return new Promise(() => {});
}

function showState() {
  const why = saving.why ?? unreachable;
  find("#offline").hidden = why === null;
  find("#offline").textContent = saving.waiting
    ? `Not saved: ${why}, ${saving.waiting} waiting. It is kept in this browser and sent as soon as the server answers.`
    : `The server does not answer (${why}). This goes on by itself.`;
  find("#saving").textContent = saving.why ? "Not saved" : saving.waiting ? "Saving…" : "Saved";
  find("#saving").classList.toggle("bad", saving.why !== null);
}

const heard = {
  state(told) {
    saving = told;
    showState();
  },
  saved(entry, reply) {
    if (entry.assignment !== now?.id) return;
    if (reply.version !== undefined) now.version = reply.version;
    if (entry.path !== "submit") return;
    if (reply.feedback) explain(reply.feedback);
    else next();
  },
  conflict(mine, assignment) {
    if (assignment && !assignment.submitted) left = mine;
    else tell("This item was finished in another tab, or given on.");
    if (now?.id !== mine.assignment) return;
    if (left) show(assignment);
    else next();
  },
  refused(entry, error) {
    tell(`Not accepted: ${error.message}`);
    if (entry.assignment !== now?.id) return;
    if (error.status === 404) next();
    else busy(false);
  },
  signedOut: comeBack,
};

/** What another tab did is shown; what was done here can be put in its place. */
function offerBack(answer) {
  const strip = find("#conflict"), here = now;
  strip.querySelector("span").textContent = "Changed in another tab, which is what you see now.";
  strip.querySelector("button").onclick = () => {
    strip.hidden = true;
    if (now !== here) return;
    view.restore(answer);
    changed();
    view.focus(view.place);
  };
  strip.hidden = false;
}

function busy(is) {
  find("#main").inert = is;
  find("#undo").disabled = is;
}

function changed() {
  outbox.add("draft", now, view.answer, clock.seconds);
  find("#conflict").hidden = true;
}

function submit() {
  if (find("#main").inert) return;
  busy(true);
  outbox.add("submit", now, view.answer, clock.seconds);
}

async function cannot() {
  const reason = await askReason();
  if (reason === null) return;
  view.answer.cannot = reason;
  submit();
}

function say(text, loud = false) {
  find("#said").textContent = text;
  if (loud) tell(text.charAt(0).toUpperCase() + text.slice(1));
}

/** Put an assignment on the page. */
function show(assignment) {
  now = assignment;
  const Page = assignment.task === "demonstration" ? Demonstration : Ranking;
  view = new Page(assignment, me.settings, { changed, done: submit, say, cannot });
  view.restore(assignment.answer);
  clock.start(assignment.seconds);
  find("#conflict").hidden = true;
  find("#main").replaceChildren(view.element);
  busy(false);
  scrollTo(0, 0);
  view.focus(view.place);
  if (!view.place) scrollTo(0, 0);
  if (left?.assignment === assignment.id) offerBack(left.answer);
  left = null;
}

function explain(feedback) {
  busy(false);
  find("#undo").disabled = true;
  view.explain(feedback, () => next());
}

async function next() {
  busy(true);
  await outbox.drained();
  const { assignment } = await insist("POST", "/api/next", {});
  if (assignment) show(assignment);
  else rest();
  progress();
}

/** Nothing to do: look again now and then. */
function rest() {
  now = view = null;
  busy(false);
  find("#main").replaceChildren(make("section", { class: "card alone" }, make("h1", {}, "Nothing waits for you"),
    make("p", {}, "Thank you. All that you did is saved. More to do appears here by itself."),
    make("p", {}, "You can also close this page.")));
  setTimeout(() => now === null && next(), NOTHING_MS);
}

async function progress() {
  me = await insist("GET", "/api/me");
  find("#progress").max = Math.max(1, me.wanted);
  find("#progress").value = Math.min(me.done, me.wanted);
  find("#pace").textContent = `${me.done} of ${me.wanted}`;
  find("#rate").textContent = me.per_hour ? `${Math.round(me.per_hour)} an hour` : "";
}

/** Take back the last change, or without one the last answer. */
async function undo() {
  if (find("#undo").disabled || view?.undo()) return;
  busy(true);
  await outbox.drained();
  const { assignment } = await insist("POST", "/api/undo", { key: uuid() });
  if (assignment) show(assignment);
  else {
    busy(false);
    tell("There is nothing to undo.");
  }
  progress();
}

function rules() {
  const panel = find("#panel");
  if (!me.settings.guidelines) return;
  panel.hidden = !panel.hidden;
  if (!panel.hidden) {
    panel.replaceChildren(button("×", rules, { class: "close", "aria-label": "Close" }),
      make("h2", {}, "Guidelines"), written(me.settings.guidelines, Infinity, Infinity));
  }
}

function pressed(event) {
  const { target, key } = event;
  if (event.isComposing || find("dialog[open]") || !me) return;
  if (key === "Enter" && (event.ctrlKey || event.metaKey) && view) view.forward();
  else if (event.ctrlKey || event.metaKey || event.altKey) return;
  else if (key === "Escape") find("#panel").hidden = true;
  else if (target.matches("input, textarea, select")) return;
  else if (target.matches("button, a") && (key === "Enter" || key === " ")) return; // presses what has the focus
  else if (key === "?") showKeys();
  else if (find("#main").inert || event.repeat && key === "Enter") return;
  else if (key === "u" || key === "U") undo();
  else if (key === "r" || key === "R") rules();
  else if (!view || !(view.key(key) || ((key === "n" || key === "N") && (cannot(), true)))) return;
  event.preventDefault();
}

async function start() {
  find("#undo").addEventListener("click", undo);
  find("#rules").addEventListener("click", rules);
  find("#help").addEventListener("click", showKeys);
  find("#leave").addEventListener("click", signOut);
  addEventListener("keydown", pressed);
  me = await signedIn();
  if (me.admin) return location.replace("/admin");
  for (const hidden of document.querySelectorAll(".bar [hidden]")) hidden.hidden = false;
  find("#rules").hidden = !me.settings.guidelines;
  find("#leave").title = `Signed in as ${me.name}`;
  outbox = new Outbox(me.id, heard);
  await next();
}

addEventListener("unhandledrejection", ({ reason: error }) => {
  find("#main").replaceChildren(make("section", { class: "card alone" }, make("h1", {}, "This did not work"),
    make("p", {}, error.message), button("Try again", () => location.reload(), { class: "go ready" })));
});
start();
