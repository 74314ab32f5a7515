// The message that is being written: texts and pictures in order.

import { call } from "./api.js";
import { $, announce, button, complain, grow, make } from "./dom.js";
import { show } from "./seen.js";

let parts = [{ text: "" }];
let active = 0; // the text that had the focus last
let caret = 0;
let ready = false;
let elsewhere = () => 0; // pictures of the conversation so far

export const pictures = (list) => list.filter((part) => part.url);
export const content = (list) =>
  list.map((part) => (part.url ? { type: "image_url", image_url: { url: part.url } } : { type: "text", text: part.text }));

/** What has been written, without empty texts. */
export const written = () => parts.filter((part) => part.url || part.text.trim());

export function clear() {
  parts = [{ text: "" }];
  draw();
}

/** Puts parts before what is there. */
export function restore(list) {
  parts = [...list, ...parts];
  draw();
  focus();
}

export function setup(onsend, numPictures) {
  elsewhere = numPictures;
  const form = $("composer");
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    onsend();
  });
  $("add").addEventListener("click", () => $("file").click());
  $("file").addEventListener("change", async () => {
    await add([...$("file").files]);
    $("file").value = "";
  });
  document.addEventListener("paste", (event) => {
    const files = [...event.clipboardData.files];
    if (!files.length) return;
    event.preventDefault();
    add(files);
  });
  const hint = $("hint").textContent;
  const dropping = (isOver) => {
    document.body.classList.toggle("dropping", isOver);
    $("hint").textContent = isOver ? "Drop to add to the message" : hint;
  };
  let depth = 0;
  const isFiles = (event) => event.dataTransfer?.types.includes("Files");
  const over = (change) => (event) => {
    if (!isFiles(event)) return;
    event.preventDefault();
    depth = Math.max(0, depth + change);
    dropping(depth > 0);
  };
  document.addEventListener("dragenter", over(1));
  document.addEventListener("dragleave", over(-1));
  document.addEventListener("dragover", over(0));
  document.addEventListener("drop", (event) => {
    if (!isFiles(event)) return;
    event.preventDefault();
    depth = 0;
    dropping(false);
    add([...event.dataTransfer.files]);
  });
  draw();
}

/** From now on pictures can be looked at by the server. */
export function enable() {
  ready = true;
  draw();
}

const read = (file) =>
  new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });

/** Puts pictures where the caret is; the text around it stays before and after. */
export async function add(files) {
  const added = [];
  for (const file of files) {
    try {
      added.push({ url: await read(file), name: file.name || "pasted picture" });
    } catch {
      complain(`${file.name} could not be read.`);
    }
  }
  if (!added.length) return;
  const at = parts[active]?.url === undefined && parts[active] ? active : parts.length - 1;
  const { text } = parts[at];
  parts.splice(at, 1, { text: text.slice(0, caret) }, ...added, { text: text.slice(caret) });
  draw();
  announce(`Added ${added.map((part) => part.name).join(", ")}`);
  const index = parts.indexOf(added.at(-1)) + 1;
  focus(index, 0);
}

export function focus(index = parts.length - 1, position) {
  const area = $("parts").children[index];
  area?.focus();
  if (position !== undefined) area?.setSelectionRange(position, position);
}

export function setText(text) {
  parts = [...parts.filter((part) => part.url), { text }];
  draw();
}

/** Neighbouring texts become one, empty ones go, and a text is last. */
function tidy() {
  const tidied = [];
  for (const part of parts) {
    const before = tidied.at(-1);
    if (!part.url && before && !before.url) before.text = [before.text, part.text].filter(Boolean).join("\n");
    else tidied.push(part.url ? part : { ...part });
  }
  parts = tidied.filter((part, i) => part.url || part.text || i === tidied.length - 1);
  if (!parts.length || parts.at(-1).url) parts.push({ text: "" });
}

function draw() {
  tidy();
  active = parts.length - 1;
  caret = parts[active].text.length;
  const number = pictures(parts).length;
  let count = 0;
  $("parts").replaceChildren(
    ...parts.map((part, i) => (part.url ? chip(part, ++count, number) : area(part, i, number))),
  );
  $("parts").querySelectorAll("textarea").forEach(grow);
  showMoves();
}

const moves = (element) => [...element.querySelectorAll(":scope > .quiet")].slice(0, 2);

/** Arrows where there is something to move past. */
function showMoves() {
  parts.forEach((part, i) => {
    if (!part.url) return;
    const [earlier, later] = moves($("parts").children[i]);
    earlier.disabled = i === 0;
    later.disabled = !parts.slice(i + 1).some((other) => other.url || other.text);
    earlier.hidden = later.hidden = earlier.disabled && later.disabled;
  });
}

function area(part, i, number) {
  const last = i === parts.length - 1;
  const remember = (event) => {
    active = i;
    caret = event.target.selectionStart;
  };
  return make("textarea", {
    value: part.text,
    rows: 1,
    "aria-label": number ? (last ? "Text after the pictures" : `Text, part ${i + 1}`) : "Message",
    placeholder: last ? (number ? "Ask about what is above" : "Write a message") : "",
    oninput: (event) => {
      part.text = event.target.value;
      grow(event.target);
      remember(event);
      showMoves();
    },
    onfocus: remember,
    onkeyup: remember,
    onclick: remember,
    onkeydown: (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      $("composer").requestSubmit();
    },
  });
}

function chip(part, nth, number) {
  const what = `picture ${nth} of ${number}, ${part.name}`;
  const tokens = make("span", { className: "muted" });
  const element = make(
    "div",
    { className: "chip", role: "group", "aria-label": what },
    make("button", { type: "button", className: "thumb", "aria-label": `What the model sees of ${what}`, onclick: () => look(part) },
      make("img", { src: part.url, alt: "", onerror: (event) => event.target.replaceWith("!") })),
    make("div", {}, make("span", { className: "name", textContent: part.name }), tokens),
    button("←", () => move(part, -1), `Move ${what} towards the start`),
    button("→", () => move(part, 1), `Move ${what} towards the end`),
    button("×", () => remove(part), `Remove ${what}`),
  );
  if (ready) count(part, tokens, element);
  return element;
}

async function count(part, tokens, element) {
  try {
    const found = await preview(part, elsewhere() + pictures(parts).length);
    tokens.textContent = `${found.image_tokens} ${found.image_tokens === 1 ? "token" : "tokens"}`;
  } catch (error) {
    element.classList.add("broken");
    tokens.textContent = "cannot be used";
    element.isConnected && complain(`${part.name}: ${error.message}`);
  }
}

/** What the server says of a picture in a prompt of several; asked once, since only "more than one" changes the answer. */
export function preview(part, numPictures) {
  const company = Math.min(Math.max(numPictures, 1), 2);
  part.previews ??= {};
  part.previews[company] ??= ask(part, company).catch((error) => {
    delete part.previews[company];
    throw error;
  });
  return part.previews[company];
}

async function ask(part, company) {
  const response = await call("v1/images/preview", { images: content([part]), num_images: company });
  return (await response.json()).data[0];
}

export async function look(part, numPictures = elsewhere() + pictures(parts).length) {
  try {
    show(part, await preview(part, numPictures));
  } catch (error) {
    complain(`${part.name}: ${error.message}`);
  }
}

function move(part, step) {
  const i = parts.indexOf(part);
  parts.splice(i, 1);
  parts.splice(i + step, 0, part);
  draw();
  const [earlier, later] = moves($("parts").children[parts.indexOf(part)]);
  const wanted = step < 0 ? earlier : later;
  (wanted.disabled ? (step < 0 ? later : earlier) : wanted).focus();
  announce(`${part.name} is now part ${parts.indexOf(part) + 1} of ${written().length}`);
}

function remove(part) {
  parts.splice(parts.indexOf(part), 1);
  complain("");
  draw();
  focus();
  announce(`Removed ${part.name}`);
}
