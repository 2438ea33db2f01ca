// The page on which a person writes the answer to a prompt.
import { button, make } from "./api.js";
import { conversation } from "./text.js";

export class Demonstration {
  /** `on` has changed(), done(), say(text, loud) and cannot(). */
  constructor(assignment, settings, on) {
    this.on = on;
    this.longest = settings.longest_text;
    this.answer = { ratings: [], ranks: [], cannot: null, text: null };
    this.size = make("p", { class: "hint" });
    this.field = make("textarea", { id: "demonstration", rows: "12", maxlength: this.longest, dir: "auto",
      placeholder: "Write the answer that a good assistant would give." });
    this.field.addEventListener("input", () => {
      this.answer = { ...this.answer, cannot: null, text: this.field.value };
      this.render();
      on.changed();
    });
    this.go = button(["Save and go on ", make("kbd", {}, "Ctrl ↵")], () => this.forward(), { class: "go" });
    this.element = make("article", { class: "demonstration" },
      make("section", { class: "card prompt", "aria-label": "Prompt" }, ...conversation(assignment.prompt)),
      make("label", { for: "demonstration" }, "Your answer"), this.field,
      make("section", { class: "dock plain" }, make("div", { class: "acts" }, this.size,
        button("Cannot be answered", on.cannot, { class: "plain" }), this.go)));
  }

  restore(answer) {
    if (answer) this.answer = { ...this.answer, ...answer };
    this.field.value = this.answer.text ?? "";
  }

  focus() {
    this.render();
    this.field.focus();
  }

  render() {
    const words = this.field.value.trim().split(/\s+/).filter(Boolean).length;
    const characters = `${this.field.value.length} of ${this.longest} characters`;
    this.size.textContent = `${words} ${words === 1 ? "word" : "words"}, ${characters}`;
    this.go.classList.toggle("ready", words > 0);
  }

  forward() {
    if (this.field.value.trim()) this.on.done();
    else this.on.say("there is no answer yet", true);
  }

  undo() { return document.activeElement === this.field; } // the field has an undo of its own

  key() { return false; }
}
