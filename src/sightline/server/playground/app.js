// The page: start-up, key, settings, and the conversation.

import { call, events, getKey, ServerError, setKey, startup } from "./api.js";
import * as composer from "./composer.js";
import { $, announce, button, complain, make } from "./dom.js";
import { render } from "./markdown.js";
import { WRITERS } from "./snippets.js";

const SAMPLES = [
  ["shapes.png", "What is in this image?", "coloured shapes"],
  ["counting.png", "How many stars are there?", "stars to count"],
  ["positions.png", "Where is the heart?", "shapes in corners"],
  ["word.png", "What does it say?", "a short word"],
  ["number.png", "What number is shown?", "a number"],
  ["photo.jpg", "Describe this image.", "a larger picture"],
];

let turns = []; // {role, parts} of the user, {role, text} of the model
let running = null;
let isReady = false;

const wait = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));
const toEnd = () => scrollTo(0, document.body.scrollHeight);

// -- start ---------------------------------------------------------------------------------------------------------------

async function start() {
  for (;;) {
    const now = await startup();
    if (now && now.state !== "loading") {
      $("loading").hidden = true;
      if (now.state !== "ready") complain("The server cannot serve now: its log says why.");
      if (now.state === "ready") return connect();
    } else {
      showLoading(now);
    }
    await wait(500);
  }
}

function showLoading(now) {
  $("loading").hidden = false;
  const phase = now ? [now.phase, now.detail].filter(Boolean).join(": ") : "waiting for the server";
  if ($("phase").textContent !== phase) $("phase").textContent = phase;
  if (now?.progress == null) $("progress").removeAttribute("value");
  else $("progress").value = now.progress;
  $("loading-note").textContent = now ? `${Math.round(now.elapsed_seconds)} s so far. You can write your message meanwhile.` : "";
}

async function connect() {
  try {
    const { data } = await (await call("v1/models")).json();
    $("model").replaceChildren(...data.map(({ id }) => make("option", { textContent: id })));
    $("model-name").textContent = data[0].id;
    $("notice").textContent = data[0].description ?? "";
  } catch (error) {
    if (error.status === 401) return askKey();
    complain(error.message);
    await wait(2000);
    return start();
  }
  isReady = true;
  $("key-form").hidden = true;
  $("welcome").hidden = turns.length > 0;
  composer.enable();
  state();
  announce("Ready");
  composer.focus();
}

function askKey() {
  $("key-problem").textContent = getKey() ? "The server does not accept this key." : "";
  $("key-problem").hidden = !getKey();
  $("key-form").hidden = false;
  $("key").focus();
}

$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  complain("");
  setKey($("key").value.trim());
  connect();
});

// -- theme and settings --------------------------------------------------------------------------------------------------

const system = matchMedia("(prefers-color-scheme: dark)");

function paint() {
  const chosen = localStorage.getItem("sightline-theme");
  const dark = chosen ? chosen === "dark" : system.matches;
  document.documentElement.dataset.theme = dark ? "dark" : "light";
  $("theme").textContent = dark ? "Light" : "Dark";
  $("theme").setAttribute("aria-label", `Use ${dark ? "light" : "dark"} colours`);
}
system.addEventListener("change", paint);
$("theme").addEventListener("click", () => {
  localStorage.setItem("sightline-theme", document.documentElement.dataset.theme === "dark" ? "light" : "dark");
  paint();
});

$("open-settings").addEventListener("click", () => {
  const panel = $("settings");
  panel.hidden = !panel.hidden;
  $("open-settings").setAttribute("aria-expanded", String(!panel.hidden));
  if (!panel.hidden) {
    panel.scrollIntoView({ block: "nearest" });
    $("model").focus();
  }
});

function settings() {
  const chosen = { model: $("model").value };
  const numbers = { temperature: "temperature", top_p: "top-p", max_tokens: "max-tokens", seed: "seed" };
  for (const [name, id] of Object.entries(numbers)) if ($(id).value !== "") chosen[name] = Number($(id).value);
  return chosen;
}

// -- conversation --------------------------------------------------------------------------------------------------------

function request() {
  const instructions = $("system").value.trim();
  const messages = turns.map(({ role, parts, text }) =>
    role === "assistant" ? { role, content: text } : { role, content: composer.content(parts) });
  if (instructions) messages.unshift({ role: "system", content: instructions });
  return { ...settings(), messages, stream: true, stream_options: { include_usage: true } };
}

const numPictures = () => turns.flatMap((turn) => composer.pictures(turn.parts ?? [])).length;

function state() {
  const label = running ? "Stop" : "Send";
  if ($("send").textContent !== label) $("send").textContent = label;
  $("send").disabled = !isReady;
  $("clear").hidden = !turns.length || Boolean(running);
}

function submit() {
  if (running) return running.abort();
  if (!isReady) return complain("The model is not ready yet. Your message stays here.");
  const parts = composer.written();
  if (!parts.length) return composer.focus();
  send(parts);
}

async function send(parts) {
  complain("");
  $("welcome").hidden = true;
  const question = { role: "user", parts };
  turns.push(question);
  const asked = bubble(question);
  composer.clear();
  const body = request();
  const answer = make("div", { className: "text" });
  const facts = make("p", { className: "facts" });
  const article = make("article", { className: "assistant", "aria-label": "Answer", "aria-busy": "true" }, answer, facts);
  $("conversation").append(article);
  toEnd();
  running = new AbortController();
  state();
  const outcome = await receive(body, answer, running.signal);
  running = null;
  article.setAttribute("aria-busy", "false");
  if (outcome.error && !outcome.text) {
    turns.splice(turns.indexOf(question), 1);
    asked.remove();
    article.remove();
    composer.restore(parts);
    $("welcome").hidden = turns.length > 0;
  } else {
    turns.push({ role: "assistant", text: outcome.text });
    facts.replaceChildren(...figures(outcome), copies(body, outcome.text));
    announce(outcome.text || "Stopped");
  }
  if (outcome.error) complain(outcome.error.message);
  // Last: what is said of an error takes room too.
  toEnd();
  if (outcome.error?.status === 401) askKey();
  state();
}

/** Streams the answer into `element`: {text, usage, first, total (ms), finish, stopped, error}. */
async function receive(body, element, signal) {
  const outcome = { text: "", usage: null, numTokens: 0 };
  let isDrawn = true;
  const draw = () => {
    const atEnd = innerHeight + scrollY > document.body.scrollHeight - 80;
    element.replaceChildren(...render(outcome.text));
    isDrawn = true;
    if (atEnd) toEnd();
  };
  const began = performance.now();
  try {
    for await (const event of events(await call("v1/chat/completions", body, signal))) {
      outcome.usage = event.usage ?? outcome.usage;
      const choice = event.choices[0];
      if (choice?.delta.content) {
        outcome.first ??= performance.now() - began;
        outcome.text += choice.delta.content;
        // Once for what comes within a frame: the whole text is read again each time.
        if (isDrawn) requestAnimationFrame(draw);
        isDrawn = false;
      }
      outcome.finish = choice?.finish_reason ?? outcome.finish;
    }
  } catch (error) {
    if (error.name === "AbortError") outcome.stopped = true;
    else outcome.error = error instanceof ServerError ? error : new ServerError("The connection was lost.", 0);
  }
  outcome.total = performance.now() - began;
  draw();
  return outcome;
}

function figures({ usage, first, total, finish, stopped, error }) {
  const said = [];
  if (usage) {
    const details = usage.prompt_tokens_details;
    const of = [];
    if (details.image_tokens) of.push(`${details.image_tokens} for pictures`);
    if (details.cached_tokens) of.push(`${details.cached_tokens} cached`);
    said.push(`${usage.prompt_tokens} tokens in${of.length ? ` (${of.join(", ")})` : ""}`, `${usage.completion_tokens} out`);
  }
  if (first !== undefined) said.push(`first after ${first < 1000 ? `${Math.round(first)} ms` : `${(first / 1000).toFixed(1)} s`}`);
  if (usage?.completion_tokens > 1 && total > first) {
    said.push(`${(((usage.completion_tokens - 1) * 1000) / (total - first)).toFixed(1)} tokens/s`);
  }
  if (stopped) said.push("stopped");
  if (finish === "length") said.push("ended by the limit of tokens");
  if (error) said.push("broken off");
  return said.map((text) => make("span", { textContent: text }));
}

function copies(body, text) {
  const group = make("span", { className: "copies", role: "group", "aria-label": "Copy" }, "Copy ",
    button("answer", (event) => copy(text, event.target), "Copy the answer as it was written", "link"), " or the request as ");
  for (const [name, write] of Object.entries(WRITERS)) {
    group.append(button(name, (event) => copy(write(base(), body, Boolean(getKey())), event.target), `Copy the request as ${name}`, "link"));
  }
  return group;
}

const base = () => new URL(".", location.href).href.replace(/\/$/, "");

async function copy(text, target) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // Pages that do not come over https, nor from this machine, have no clipboard: the older way.
    const area = make("textarea", { value: text, className: "hidden" });
    document.body.append(area);
    area.select();
    const copied = document.execCommand("copy");
    area.remove();
    target.focus();
    if (!copied) return complain("The browser does not let the page copy.");
  }
  const name = target.textContent;
  target.textContent = "copied";
  announce("Copied");
  await wait(1200);
  target.textContent = name;
}

function bubble({ parts }) {
  const article = make("article", { className: "user", "aria-label": "You" });
  for (const part of parts) {
    if (!part.url) article.append(make("p", { className: "text", textContent: part.text }));
    else {
      if (article.lastElementChild?.className !== "pictures") article.append(make("div", { className: "pictures" }));
      article.lastElementChild.append(make("button", {
        type: "button", className: "thumb", "aria-label": `What the model sees of ${part.name}`, title: "What the model sees",
        onclick: () => composer.look(part, numPictures()),
      }, make("img", { src: part.url, alt: "" })));
    }
  }
  $("conversation").append(article);
  return article;
}

$("clear").addEventListener("click", () => {
  turns = [];
  $("conversation").replaceChildren();
  $("welcome").hidden = false;
  complain("");
  state();
  composer.focus();
});

$("problem").lastElementChild.addEventListener("click", () => complain(""));

function samples() {
  $("samples").append(...SAMPLES.map(([name, question, what]) => {
    const url = `playground/samples/${name}`;
    const use = async () => {
      const data = await (await fetch(url)).blob();
      await composer.add([new File([data], name, { type: data.type })]);
      composer.setText(question);
      composer.focus();
    };
    return make("li", {}, make("button", { type: "button", onclick: use },
      make("img", { src: url, alt: what, width: 320, height: 160 }), make("span", { textContent: question })));
  }));
}

paint();
samples();
composer.setup(submit, numPictures);
state();
start();
