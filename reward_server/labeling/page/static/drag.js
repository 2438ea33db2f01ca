// Dragging by mouse, pen or finger into an element with data-drop.
import { make } from "./api.js";

const START_PX = 6;

/** Let a handle be dragged; `drop` is called with the element with data-drop on which it was let go. */
export function draggable(handle, label, drop) {
  handle.addEventListener("pointerdown", down => {
    if (down.button !== 0) return;
    let ghost = null, over = null;
    const under = event => document.elementFromPoint(event.clientX, event.clientY)?.closest("[data-drop]") ?? null;
    const mark = target => {
      over?.classList.remove("over");
      over = target;
      over?.classList.add("over");
    };
    const move = event => {
      if (event.pointerId !== down.pointerId) return;
      if (!ghost && Math.hypot(event.clientX - down.clientX, event.clientY - down.clientY) < START_PX) return;
      ghost ??= document.body.appendChild(make("span", { class: "letter ghost", "aria-hidden": "true" }, label));
      ghost.style.transform = `translate(${event.clientX}px, ${event.clientY}px) translate(-50%, -50%)`;
      mark(under(event));
    };
    const end = event => {
      if (event.type === "keydown" ? event.key !== "Escape" : event.pointerId !== down.pointerId) return;
      const target = over, dragged = ghost !== null;
      mark(null);
      ghost?.remove();
      listening.abort();
      if (event.type === "pointerup" && target) drop(target);
      if (dragged) addEventListener("click", click => click.stopPropagation(),
        { capture: true, once: true, signal: AbortSignal.timeout(50) });
    };
    const listening = new AbortController();
    const { signal } = listening;
    addEventListener("pointermove", move, { signal });
    for (const type of ["pointerup", "pointercancel", "keydown"]) addEventListener(type, end, { signal });
  });
}
