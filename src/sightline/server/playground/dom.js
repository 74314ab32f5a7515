// Elements, and words for a screen reader.

export const $ = (id) => document.getElementById(id);

export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name in element) element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

export const button = (text, onclick, label, className = "quiet") =>
  make("button", { type: "button", textContent: text, onclick, className, ...(label ? { "aria-label": label, title: label } : {}) });

export function announce(text) {
  $("announcer").textContent = text;
}

/** Shows an error until it is dismissed or another takes its place; an empty text hides it. */
export function complain(text) {
  $("problem").hidden = !text;
  $("problem").firstElementChild.textContent = text;
}

export function grow(area) {
  area.style.height = "auto";
  area.style.height = `${area.scrollHeight}px`;
}
