// The server, the signing in, and making elements. Text enters the page as textContent alone.

/** A server's refusal: its status and words, and what it sent along. */
export class Refused extends Error {
  constructor(status, said, after) {
    super(typeof said.detail === "string" ? said.detail : `the server answered ${status}`);
    Object.assign(this, { status, said, after });
  }
}

/** Ask the server. Raises Refused for a refusal, another Error where there is no answer within 15 seconds. */
export async function ask(method, path, body, keepalive = false) {
  const headers = { "X-Rayward": "1" };
  if (body !== undefined) headers["Content-Type"] = "application/json";
  const answer = await fetch(path, {
    method, headers, keepalive, body: body === undefined ? undefined : JSON.stringify(body),
    credentials: "same-origin", cache: "no-store", redirect: "error", signal: AbortSignal.timeout(15000),
  });
  const said = answer.status === 204 ? {} : await answer.json().catch(() => ({}));
  if (!answer.ok) throw new Refused(answer.status, said, Number(answer.headers.get("Retry-After")) || 0);
  return said;
}

/** An element with attributes and children, which are nodes or text. */
export function make(tag, attributes = {}, ...children) {
  const one = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) one.addEventListener(name.slice(2), value);
    else if (value === true) one.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) one.setAttribute(name, value);
  }
  one.append(...children.filter(child => child !== null && child !== undefined));
  return one;
}

/** A button with words or nodes on it. */
export function button(words, onclick, attributes = {}) {
  return make("button", { type: "button", onclick, ...attributes }, ...[words].flat());
}

export const find = selector => document.querySelector(selector);

/** Say something for a moment at the foot of the page. */
export function tell(text) {
  const told = find("#told");
  told.textContent = text;
  told.hidden = false;
  clearTimeout(tell.timer);
  tell.timer = setTimeout(() => { told.hidden = true; }, 6000);
}

/** Trade the token of an invitation, after the # of the address, for a cookie; it leaves the address at once. */
async function redeem() {
  const token = location.hash.slice(1);
  if (!token) return null;
  history.replaceState(null, "", location.pathname);
  return enter(token).catch(() => "The server cannot be reached. Open your link once more.");
}

async function enter(token) {
  try {
    await ask("POST", "/api/session", { token });
    return null;
  } catch (error) {
    if (error instanceof Refused) return error.message;
    throw error;
  }
}

/** Who is signed in. Where nobody is, a form asks for the token until somebody is. */
export async function signedIn() {
  let why = await redeem();
  for (;;) {
    try {
      if (!why) return await ask("GET", "/api/me");
    } catch (error) {
      if (!(error instanceof Refused) || error.status !== 401) throw error;
    }
    const token = await asked(why);
    why = await enter(token).catch(() => "The server cannot be reached. Try again.");
  }
}

/** Ask for a token, saying why the last one was refused. */
function asked(why) {
  return new Promise(done => {
    const token = make("input", { type: "password", id: "token", autocomplete: "off", spellcheck: "false" });
    const go = () => token.value.trim() && done(token.value.trim().replace(/^.*#/, ""));
    token.addEventListener("keydown", event => event.key === "Enter" && go());
    find("#main").replaceChildren(make("section", { class: "card alone" },
      make("h1", {}, "Sign in"),
      make("p", {}, "Open the link of your invitation, or paste it here. A link is one person’s: do not share it."),
      make("label", { for: "token" }, "Link or token"), token,
      make("p", { class: "wrong", role: "alert" }, why ?? ""),
      button("Sign in", go, { class: "go" })));
    token.focus();
  });
}

/** Sign out, and show that. */
export async function signOut() {
  await ask("DELETE", "/api/session");
  location.reload();
}
