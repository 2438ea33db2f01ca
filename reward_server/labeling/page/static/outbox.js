// What was changed and is not yet on the server's disk: kept in memory and in localStorage, sent in order, each under a
// key of its own, so that what is sent twice counts once.
import { ask, Refused } from "./api.js";

const DEBOUNCE_MS = 250;
const LATEST_RETRY_MS = 8000;
const DRAIN_MS = 1500;

/** A random UUID; crypto.randomUUID is missing on pages served without TLS. */
export function uuid() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  bytes[6] = (bytes[6] & 0x0f) | 0x40;
  bytes[8] = (bytes[8] & 0x3f) | 0x80;
  const hex = [...bytes].map(byte => byte.toString(16).padStart(2, "0")).join("");
  return [hex.slice(0, 8), hex.slice(8, 12), hex.slice(12, 16), hex.slice(16, 20), hex.slice(20)].join("-");
}

/** The changes of one labeler that wait to be saved.
 *
 * An entry is {path, assignment, version, answer, seconds, key, changes, sent}. `version` is what it was made from: the
 * reply to the entry before it moves it on, and once an entry was sent it stays, as it may have arrived. A change
 * replaces the last entry as long as that was not sent.
 */
export class Outbox {
  /** `heard` has a function for each end: saved(entry, reply), conflict(entry, assignment), refused(entry, error),
   * signedOut(), and state({waiting, why}): the changes that wait, and why they do not go through, else null. */
  constructor(labeler, heard) {
    this.prefix = `rayward.outbox.${labeler}.`;
    this.own = this.prefix + uuid();
    this.heard = heard;
    this.entries = this.#adopted();
    this.stuck = null;
    this.busy = null;
    this.failures = 0;
    addEventListener("online", () => this.flush());
    addEventListener("pagehide", () => this.#last());
    document.addEventListener("visibilitychange", () => document.hidden && this.#last());
    this.#keep();
  }

  /** What tabs that are gone have left. One that is still there may send the same, under the same keys. */
  #adopted() {
    try {
      const names = Object.keys(localStorage).filter(name => name.startsWith(this.prefix));
      const found = names.flatMap(name => JSON.parse(localStorage.getItem(name)));
      names.forEach(name => localStorage.removeItem(name));
      return found.sort((one, other) => one.at - other.at);
    } catch { return []; /* the browser keeps nothing */ }
  }

  /** Write down what waits, before anything else, and say how much that is. */
  #keep() {
    try {
      if (this.entries.length) localStorage.setItem(this.own, JSON.stringify(this.entries));
      else localStorage.removeItem(this.own);
    } catch { /* full or forbidden: what waits is still in memory */ }
    const waiting = this.entries.reduce((sum, entry) => sum + entry.changes, 0);
    this.heard.state({ waiting, why: this.stuck });
  }

  /** Add a change: path is "draft" or "submit". */
  add(path, assignment, answer, seconds) {
    const last = this.entries.at(-1);
    const replaced = last && !last.sent && last.path === "draft" && last.assignment === assignment.id;
    if (replaced) this.entries.pop();
    this.entries.push({
      path, assignment: assignment.id, version: replaced ? last.version : assignment.version,
      answer: structuredClone(answer), seconds, key: uuid(), at: Date.now(),
      changes: replaced ? last.changes + (path === "draft") : 1, sent: false,
    });
    this.#keep();
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.flush(), path === "submit" ? 0 : DEBOUNCE_MS);
  }

  /** Send all that waits, in order; resolves when nothing is left or nothing goes through. */
  flush() {
    clearTimeout(this.timer);
    this.busy ??= this.#send().finally(() => { this.busy = null; });
    return this.busy;
  }

  /** Resolves when nothing waits any more. */
  async drained() {
    while (this.entries.length) {
      await this.flush();
      if (this.entries.length) await new Promise(done => setTimeout(done, DRAIN_MS));
    }
  }

  async #send() {
    while (this.entries.length) {
      const entry = this.entries[0];
      entry.sent = true;
      this.#keep();
      try {
        this.#done(entry, await ask("POST", `/api/${entry.path}`, this.#body(entry)));
      } catch (error) {
        if (!(error instanceof Refused) || error.status === 429 || error.status >= 500) return this.#later(error);
        if (error.status === 401) return this.heard.signedOut();
        this.#dropped(entry, error);
      }
    }
  }

  #body({ assignment, version, answer, seconds, key }) {
    return { assignment, version, answer, seconds, key };
  }

  #done(entry, reply) {
    this.#works();
    this.entries.shift();
    for (const next of this.entries) {
      if (next.assignment === entry.assignment && reply.version !== undefined) next.version = reply.version;
    }
    this.#keep();
    this.heard.saved(entry, reply);
  }

  /** The server refuses an entry for good, and with it what was built on it. */
  #dropped(entry, error) {
    this.#works();
    const mine = this.entries.filter(one => one.assignment === entry.assignment).at(-1);
    this.entries = this.entries.filter(one => one.assignment !== entry.assignment);
    this.#keep();
    if (error.status === 409) this.heard.conflict(mine, error.said.assignment);
    else this.heard.refused(mine, error);
  }

  #works() {
    this.stuck = null;
    this.failures = 0;
  }

  #later(error) {
    this.failures += 1;
    this.stuck = error instanceof Refused ? error.message : "offline";
    this.#keep();
    const pause = Math.min(LATEST_RETRY_MS, 400 * 2 ** Math.min(this.failures, 5)) * (0.75 + Math.random() / 2);
    this.timer = setTimeout(() => this.flush(), error.after ? error.after * 1000 : pause);
  }

  /** The page may be gone in a moment: send what was not sent. What does not go through is in localStorage. */
  #last() {
    if (this.busy || this.entries.length !== 1 || this.stuck !== null) return;
    const [entry] = this.entries;
    const body = this.#body(entry);
    entry.sent = true;
    this.#keep();
    clearTimeout(this.timer);
    this.busy = ask("POST", `/api/${entry.path}`, body, JSON.stringify(body).length < 60000)
      .then(reply => this.#done(entry, reply), () => {})
      .finally(() => { this.busy = null; this.flush(); });
  }
}
