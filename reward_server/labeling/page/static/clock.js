// Seconds in which somebody was at work on an item.

const IDLE_MS = 60_000;

/** Counts while the page is visible, and for a minute after the last sign of life. */
export class Clock {
  constructor() {
    this.total = 0;
    this.since = performance.now();
    for (const sign of ["keydown", "pointerdown", "pointermove", "wheel", "scroll"]) {
      addEventListener(sign, () => this.#mark(), { passive: true, capture: true });
    }
    document.addEventListener("visibilitychange", () => {
      if (document.hidden) this.#mark();
      this.hidden = document.hidden;
      this.since = performance.now();
    });
    this.hidden = document.hidden;
  }

  /** Begin an item on which so many seconds were spent before. */
  start(seconds) {
    this.total = seconds * 1000;
    this.since = performance.now();
  }

  #mark() {
    this.total += this.#open();
    this.since = performance.now();
  }

  #open() { return this.hidden ? 0 : Math.min(performance.now() - this.since, IDLE_MS); }

  get seconds() { return Math.round(this.total + this.#open()) / 1000; }
}
