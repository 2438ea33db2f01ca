// What people and models wrote, as text: code and lists look like it, nothing of it runs, and nothing reorders the
// page.
import { button, make } from "./api.js";

// Controls, what changes the direction of writing, and what has no width; not the joiners of emoji and of Persian.
const HIDDEN = new RegExp(
  "[\\u0000-\\u0008\\u000b-\\u001f\\u007f-\\u009f\\u00ad\\u061c\\u115f\\u1160\\u180e\\u200b\\u200e\\u200f" +
  "\\u2028-\\u202e\\u2060-\\u206f\\u3164\\ufeff\\uffa0\\ufff9-\\ufffb\\u{e0000}-\\u{e007f}\\p{Cs}]+", "gu");
const ITEM = /^(\s{0,12})(?:[-*•]|(\d{1,4})[.)])\s+(\S.*)$/;
const FENCE = /^\s{0,3}(`{3,}|~{3,})\s*([\w+#.-]{0,24})\s*$/;
const NAMED = 3; // hidden characters of a run that are named

/** A chip in place of characters that cannot be seen. */
function chip(run) {
  const names = [...run].map(one => `U+${one.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}`);
  const more = names.length > NAMED ? ` and ${names.length - NAMED} more` : "";
  return make("span", { class: "chip", title: "characters that cannot be seen" },
    names.slice(0, NAMED).join(" ") + more);
}

/** Put text into an element, with a chip for what cannot be seen. */
export function put(element, text) {
  let from = 0;
  for (const found of text.matchAll(HIDDEN)) {
    element.append(text.slice(from, found.index), chip(found[0]));
    from = found.index + found[0].length;
  }
  element.append(text.slice(from));
  return element;
}

/** Paragraph text with `code` in it. */
function inline(element, text) {
  text.split(/(`[^`\n]+`)/).forEach((part, place) => {
    if (place % 2) element.append(put(make("code"), part.slice(1, -1)));
    else put(element, part);
  });
  return element;
}

/** The blocks of a text: {kind: "text" | "code" | "ol" | "ul", lines, ..}. An open fence reaches to the end. */
function blocks(text) {
  const found = [];
  let fence = null;
  const last = kind => (found.at(-1)?.kind === kind ? found.at(-1) : found[found.push({ kind, lines: [] }) - 1]);
  for (const line of text.replace(/\r\n/g, "\n").split("\n")) {
    const mark = line.match(FENCE);
    if (fence) {
      if (mark && !mark[2] && mark[1].startsWith(fence)) fence = null;
      else found.at(-1).lines.push(line);
    } else if (mark) {
      fence = mark[1];
      found.push({ kind: "code", lines: [], language: mark[2] });
    } else if (ITEM.test(line)) last(ITEM.exec(line)[2] ? "ol" : "ul").lines.push(line);
    else if (/^[ou]l$/.test(found.at(-1)?.kind) && /^\s{2,}\S/.test(line)) found.at(-1).lines.push(line);
    else last("text").lines.push(line);
  }
  return found;
}

/** A list whose items keep their own numbers and depth. */
function list(kind, lines) {
  const items = [];
  for (const line of lines) {
    const [, depth, number, words] = line.match(ITEM) ?? [];
    if (words === undefined) items.at(-1).words += `\n${line.trim()}`;
    else items.push({ depth: Math.min(3, depth.length >> 1), number, words });
  }
  return make(kind, {}, ...items.map(item =>
    inline(make("li", { class: `depth-${item.depth}`, value: item.number, dir: "auto" }), item.words)));
}

function shown(text) {
  return blocks(text).map(({ kind, lines, language }) => {
    if (kind === "ol" || kind === "ul") return list(kind, lines);
    if (kind === "code") {
      return make("pre", { title: language || null, tabindex: "0" }, put(make("code"), lines.join("\n")));
    }
    const words = lines.join("\n").replace(/^\n+/, "");
    let end = words.length; // not a pattern, which would take quadratic time on a long run of spaces
    while (end && " \t\n".includes(words[end - 1])) end -= 1;
    return end ? inline(make("p"), words.slice(0, end)) : null;
  }).filter(Boolean);
}

/** A text; one longer than `most` characters or `rows` lines is folded, and a button shows all.
 *
 * What is returned has `unfold(is)`, which does as the button does; for a text that is not folded it does nothing.
 */
export function written(text, most, rows) {
  const body = Object.assign(make("div", { class: "text" }), { unfold: () => {} });
  if (!text.trim()) {
    body.append(make("p", { class: "quiet" }, text ? "(nothing but spaces)" : "(empty)"));
    return body;
  }
  let short = text.slice(0, most).split("\n").slice(0, rows).join("\n");
  if (short.length >= text.length - 80 && text.split("\n").length < rows + 4) short = text;
  else short = short.replace(/\s+\S{0,40}$/, "");
  if (short.length === text.length) {
    body.append(...shown(text));
    return body;
  }
  const size = `${text.length.toLocaleString("en")} characters`;
  const more = button([], () => body.unfold(body.classList.contains("folded")), { class: "more" });
  body.unfold = open => {
    body.replaceChildren(...shown(open ? text : short), more);
    body.classList.toggle("folded", !open);
    more.textContent = open ? "Show less" : `Show all · ${size}`;
    more.setAttribute("aria-expanded", String(open));
  };
  body.unfold(false);
  return body;
}

/** The turns of a conversation; what is asked last stands out. */
export function conversation(messages) {
  const names = { system: "System", user: "User", assistant: "Assistant" };
  return messages.map((message, place) => make("div",
    { class: `turn ${message.role}${place === messages.length - 1 ? " last" : ""}` },
    make("small", {}, names[message.role] ?? ""), written(message.content, 1600, 20)));
}
