// Both pages of a comparison over the same cards: each output alone, then all of them ranked.
import { button, make } from "./api.js";
import { draggable } from "./drag.js";
import { conversation, written } from "./text.js";

const FLAG_KEYS = "qwtyopsjklzxv"; // no letter of an output, and none of U, N, M, R
const LETTERS = "ABCDEFGHI";

/** Ranks as a chain of letters, best first: "A > C = D > B". */
export function chain(ranks) {
  const steps = [...new Set(ranks)].sort((one, other) => one - other);
  const letters = step => ranks.flatMap((rank, place) => (rank === step ? [LETTERS[place]] : []));
  return steps.map(step => letters(step).join(" = ")).join(" > ");
}

/** An answer in which nothing was said yet. */
function blank(count) {
  const ratings = Array.from({ length: count }, () => ({ quality: null, flags: [] }));
  return { ratings, ranks: Array(count).fill(null), cannot: null, text: null };
}

export class Ranking {
  /** `on` has changed(), done() and say(text). */
  constructor(assignment, settings, on) {
    this.count = assignment.responses.length;
    this.settings = settings;
    this.on = on;
    this.past = [];
    this.answer = blank(this.count);
    this.rates = settings.quality || settings.flags.length > 0;
    this.step = this.rates ? "rate" : "rank";
    this.place = 0;
    this.cards = assignment.responses.map((text, place) => this.#card(text, place));
    this.columns = Array.from({ length: this.count + 1 }, (_, rank) => this.#column(rank));
    this.go = button([], () => this.forward(), { class: "go" });
    this.hint = make("p", { class: "hint" });
    this.pills = this.cards.map((_, place) => button([], () => this.focus(place), { class: "pill" }));
    this.tabs = this.rates ? [this.#tab("rate", "1 · Each output alone"), this.#tab("rank", "2 · All ranked")] : [];
    this.dock = make("section", { class: "dock", "aria-label": "Your answer" },
      make("div", { class: "pills" }, ...this.pills),
      make("div", { class: "board" }, ...this.columns),
      make("div", { class: "acts" }, this.hint,
        button(["Cannot be ranked ", make("kbd", {}, "N")], on.cannot, { class: "plain" }),
        this.go));
    this.outputs = make("section", { class: "outputs", "aria-label": "Outputs" },
      ...this.cards.map(card => card.element));
    this.element = make("article", { class: "ranking" },
      make("section", { class: "card prompt", "aria-label": "Prompt" },
        assignment.use === "training" ? make("small", { class: "badge" }, "Training: explained afterwards") : null,
        ...conversation(assignment.prompt)),
      this.tabs.length ? make("div", { class: "tabs", role: "group", "aria-label": "Steps" }, ...this.tabs) : null,
      this.outputs, this.dock);
    this.element.addEventListener("mousedown", event => {
      if (event.target.closest("button, .letter")) event.preventDefault(); // Enter goes on, whatever was clicked
    });
  }

  /** Take an answer that was given before, as a draft or before an undo. */
  restore(answer) {
    if (!answer) return;
    this.answer = { ...blank(this.count), ...structuredClone(answer) };
    const { ratings, ranks } = this.answer;
    if (ratings.length !== this.count) this.answer.ratings = blank(this.count).ratings;
    if (ranks.length !== this.count) this.answer.ranks = blank(this.count).ranks;
    this.step = this.rates && this.#unrated() >= 0 && !this.answer.ranks.some(Boolean) ? "rate" : "rank";
    this.place = Math.max(0, this.step === "rate" ? this.#unrated() : this.#unranked());
  }

  #tab(step, words) {
    return button(words, () => this.turn(step));
  }

  #card(text, place) {
    const letter = LETTERS[place];
    const { quality, flags } = this.settings;
    const scale = [1, 2, 3, 4, 5, 6, 7].map(value =>
      button(String(value), () => this.rate(place, value), { "aria-label": `Quality ${value} of 7` }));
    const chips = flags.map(({ words }, number) => button(
      [make("kbd", {}, (FLAG_KEYS[number] ?? "").toUpperCase()), make("span", {}, words)],
      () => this.flag(place, number), { class: "flag" }));
    const ranks = Array.from({ length: this.count }, (_, index) => index + 1).map(rank =>
      button(String(rank), () => this.rank(place, rank), { "aria-label": `Rank ${rank} for ${letter}` }));
    const handle = make("span", { class: "letter", title: "Drag into a rank below" }, letter);
    const badge = make("span", { class: "given" });
    const body = written(text, 6000, 120);
    const more = button("Show all", () => this.#unfold(place), { class: "more all" });
    const element = make("article", { class: "card output", tabindex: "0", role: "group" },
      make("header", {}, handle, badge),
      body, more,
      make("div", { class: "rating" },
        ...(quality ? [make("h3", {}, "Overall quality"),
          make("div", { class: "scale", role: "group", "aria-label": `Overall quality of ${letter}` }, ...scale),
          make("div", { class: "ends" }, make("small", {}, "poor"), make("small", {}, "excellent"))] : []),
        flags.length ? make("h3", {}, "What applies") : null,
        make("div", { class: "flags", role: "group", "aria-label": `Flags of ${letter}` }, ...chips)),
      make("div", { class: "ranks", role: "group", "aria-label": `Rank of ${letter}` }, ...ranks));
    element.addEventListener("focusin", () => place !== this.place && this.#at(place));
    draggable(handle, letter, column => this.#dropped(place, column));
    return { element, badge, body, more, scale, chips, ranks };
  }

  #column(rank) {
    const names = { 0: "no rank", 1: "1 · best", [this.count]: `${this.count} · worst` };
    const said = rank ? `Rank ${rank}` : "No rank yet";
    return make("div", { class: "column", "data-drop": String(rank), role: "group", "aria-label": said },
      make("small", {}, names[rank] ?? String(rank)), make("div", { class: "chips" }));
  }

  #dropped(place, column) {
    this.rank(place, Number(column.dataset.drop) || null);
  }

  #unrated() { return this.settings.quality ? this.answer.ratings.findIndex(rating => rating.quality === null) : -1; }

  #unranked() { return this.answer.ranks.indexOf(null); }

  /** The next place at which something is missing, going round; `from` where nothing is. */
  #missing(from, isMissing) {
    for (let ahead = 1; ahead <= this.count; ahead += 1) {
      if (isMissing((from + ahead) % this.count)) return (from + ahead) % this.count;
    }
    return from;
  }

  #changing() {
    this.past.push({ answer: structuredClone(this.answer), step: this.step, place: this.place });
    this.answer.cannot = null;
  }

  /** Give an output a rank, or with null none, and go on to the next that has none. */
  rank(place, rank) {
    if (this.answer.ranks[place] !== rank) {
      this.#changing();
      this.answer.ranks[place] = rank;
      this.on.changed();
    }
    this.on.say(rank ? `${LETTERS[place]}: rank ${rank}` : `${LETTERS[place]}: no rank`);
    this.focus(rank ? this.#missing(place, other => this.answer.ranks[other] === null) : place);
  }

  /** Say how good an output is, from 1 to 7, and go on to the next of which that was not said. */
  rate(place, quality) {
    if (this.answer.ratings[place].quality !== quality) {
      this.#changing();
      this.answer.ratings[place].quality = quality;
      this.on.changed();
    }
    this.on.say(quality ? `${LETTERS[place]}: quality ${quality}` : `${LETTERS[place]}: no quality`);
    this.focus(quality ? this.#missing(place, other => this.answer.ratings[other].quality === null) : place);
  }

  flag(place, number) {
    const { name, words } = this.settings.flags[number];
    this.#changing();
    const rating = this.answer.ratings[place];
    const set = !rating.flags.includes(name);
    rating.flags = set ? [...rating.flags, name] : rating.flags.filter(other => other !== name);
    this.on.changed();
    this.on.say(`${LETTERS[place]}: ${set ? "" : "not "}${words}`);
    this.focus(place);
  }

  /** Take the last change back; false where there is none. */
  undo() {
    const last = this.past.pop();
    if (!last) return false;
    Object.assign(this, last);
    this.on.changed();
    this.focus(last.place);
    return true;
  }

  turn(step) {
    this.step = step;
    scrollTo(0, 0);
    this.focus(Math.max(0, step === "rate" ? this.#unrated() : this.#unranked()));
  }

  /** From rating to ranking, and from that to what comes next; where something is missing, to that. */
  forward() {
    const unrated = this.#unrated();
    if (unrated >= 0) {
      this.step = "rate";
      this.focus(unrated);
      this.on.say(`${LETTERS[unrated]} has no quality yet`, true);
    } else if (this.step === "rate") this.turn("rank");
    else if (this.#unranked() >= 0) {
      this.focus(this.#unranked());
      this.on.say(`${LETTERS[this.#unranked()]} has no rank yet`, true);
    } else this.on.done();
  }

  /** Move to an output, and show everything as it is. */
  focus(place) {
    this.#at(place);
    const { element } = this.cards[place];
    element.focus({ preventScroll: true });
    element.scrollIntoView({ block: "nearest", inline: "nearest" });
  }

  #at(place) {
    this.place = place;
    this.render();
  }

  render() {
    const { ranks, ratings } = this.answer;
    this.element.dataset.step = this.step;
    const steps = ["rate", "rank"];
    this.tabs.forEach((tab, index) => tab.setAttribute("aria-pressed", String(steps[index] === this.step)));
    this.cards.forEach((card, place) => this.#show(card, place));
    this.columns.forEach((column, rank) => column.lastChild.replaceChildren(...ranks.flatMap((given, place) =>
      ((given ?? 0) === rank ? [this.#chip(place)] : []))));
    this.pills.forEach((pill, place) => {
      pill.replaceChildren(LETTERS[place], make("small", {}, String(ratings[place].quality ?? "")));
      pill.setAttribute("aria-label", `Output ${LETTERS[place]}, quality ${ratings[place].quality ?? "not given"}`);
      pill.setAttribute("aria-current", String(place === this.place));
    });
    this.#sayWhatNext();
  }

  /** Show all of an output, or less of it. */
  #unfold(place) {
    const { element, body, more } = this.cards[place];
    const open = this.step === "rank" ? element.classList.toggle("open") : body.classList.contains("folded");
    body.unfold(open);
    more.textContent = open ? "Show less" : "Show all";
    more.setAttribute("aria-expanded", String(open));
    this.focus(place);
  }

  #show(card, place) {
    const rank = this.answer.ranks[place], { quality, flags } = this.answer.ratings[place];
    const marked = flags.length && `${flags.length} flag${flags.length > 1 ? "s" : ""}`;
    const said = [quality && `quality ${quality}`, marked];
    card.element.classList.toggle("now", place === this.place);
    card.element.setAttribute("aria-label", `Output ${LETTERS[place]}, ${rank ? `rank ${rank}` : "no rank yet"}`);
    if (!card.element.classList.contains("open")) {
      card.element.classList.toggle("tall", card.body.scrollHeight > card.body.clientHeight + 20);
    }
    card.badge.textContent = said.filter(Boolean).join(" · ");
    card.scale.forEach((button, index) => button.setAttribute("aria-pressed", String(quality === index + 1)));
    card.chips.forEach((button, index) =>
      button.setAttribute("aria-pressed", String(flags.includes(this.settings.flags[index].name))));
    card.ranks.forEach((button, index) => button.setAttribute("aria-pressed", String(rank === index + 1)));
  }

  #chip(place) {
    const chip = button(LETTERS[place], () => this.focus(place),
      { class: `letter${place === this.place ? " now" : ""}`, "aria-label": `Output ${LETTERS[place]}` });
    draggable(chip, LETTERS[place], column => this.#dropped(place, column));
    return chip;
  }

  #sayWhatNext() {
    const rating = this.step === "rate";
    const complete = this.#unrated() < 0 && (rating || this.#unranked() < 0);
    this.go.replaceChildren(rating ? "Rank them " : "Save and go on ", make("kbd", {}, "↵"));
    this.go.classList.toggle("ready", complete);
    const rates = this.settings.quality ? "1 to 7 for quality, letters for flags" : "letters for flags, Enter goes on";
    const keys = rating ? rates : `1 (best) to ${this.count} for ${LETTERS[this.place]}; the same number is a tie`;
    this.hint.textContent = complete ? (rating ? "Enter goes on" : `${chain(this.answer.ranks)} · Enter saves`) : keys;
  }

  /** A key that was pressed; true when it meant something. */
  key(key) {
    const digit = /^[0-9]$/.test(key) ? Number(key) : null;
    const letter = LETTERS.slice(0, this.count).indexOf(key.toUpperCase());
    const flag = FLAG_KEYS.indexOf(key.toLowerCase());
    const steps = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 };
    if (key === "Enter") this.forward();
    else if (key === "Backspace" || digit === 0) this[this.step](this.place, null);
    else if (digit) this.#pressed(digit);
    else if (key in steps) this.focus((this.place + steps[key] + this.count) % this.count);
    else if (key.length === 1 && letter >= 0) this.focus(letter);
    else if (key.length === 1 && this.step === "rate" && this.settings.flags[flag]) this.flag(this.place, flag);
    else if (key === "m" || key === "M") this.#unfold(this.place);
    else return false;
    return true;
  }

  #pressed(digit) {
    if (this.step === "rate" && this.settings.quality && digit <= 7) this.rate(this.place, digit);
    else if (this.step === "rank" && digit <= this.count) this.rank(this.place, digit);
    else this.on.say(this.step === "rank" ? `${this.count} is the last rank here` : "quality goes from 1 to 7", true);
  }

  /** After a training item: what is right, beside what was given. */
  explain({ ranks, explanation, correct }, goOn) {
    this.step = "rank";
    this.render();
    this.outputs.inert = true;
    this.go.replaceChildren("Go on ", make("kbd", {}, "↵"));
    this.forward = goOn;
    this.key = key => key === "Enter" && (goOn(), true);
    this.dock.replaceChildren(make("div", { class: `feedback ${correct ? "right" : "other"}`, role: "status" },
      make("strong", {}, correct ? "As the guide ranks them" : "The guide ranks them otherwise"),
      make("p", {}, "You: ", make("b", {}, chain(this.answer.ranks)), " · the guide: ", make("b", {}, chain(ranks))),
      explanation ? written(explanation, 1200, 12) : null), make("div", { class: "acts" }, this.go));
    this.dock.scrollIntoView({ block: "nearest" });
  }
}
