// The Markdown that models write, as elements. Text stays text: no HTML, no links, no pictures. What is not known stays as written.

import { make } from "./dom.js";

const FENCE = /^\s*```/;
const HEADING = /^#{1,6}\s+(.*)$/;
const RULE = /^\s*([-*_])(\s*\1){2,}\s*$/;
const ITEM = /^(\s*)(?:[-*+]|(\d{1,9})[.)])\s+(.*)$/;
const QUOTE = /^>\s?(.*)$/;
const COLUMNS = /^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$/;
const INLINE = /`([^`\n]+)`|\*\*(?=\S)(.+?)(?<=\S)\*\*|\*(?=[^\s*])([^*\n]+?)(?<=\S)\*/g;

/** Elements of a whole text or of the beginning of one. */
export function render(text) {
  const lines = text.split("\n");
  const found = [];
  let i = 0;
  const take = (pattern) => {
    const taken = [];
    for (; i < lines.length && pattern.test(lines[i]); i++) taken.push(lines[i].match(pattern));
    return taken;
  };
  while (i < lines.length) {
    const line = lines[i];
    if (!line.trim()) i++;
    else if (FENCE.test(line)) found.push(code());
    else if (HEADING.test(line)) found.push(make("h3", {}, ...inline(lines[i++].match(HEADING)[1])));
    else if (RULE.test(line)) found.push(lines[i++] && make("hr"));
    else if (ITEM.test(line)) found.push(list(take(ITEM)));
    else if (QUOTE.test(line)) found.push(make("blockquote", {}, ...inline(take(QUOTE).map((m) => m[1]).join("\n"))));
    else if (isTable()) found.push(table());
    else found.push(paragraph());
  }
  return found;

  function code() {
    const from = ++i;
    while (i < lines.length && !FENCE.test(lines[i])) i++;
    return make("pre", { tabIndex: 0 }, make("code", { textContent: lines.slice(from, i++).join("\n") }));
  }

  function isTable() {
    return lines[i].includes("|") && i + 1 < lines.length && lines[i + 1].includes("-") && COLUMNS.test(lines[i + 1]);
  }

  function table() {
    const row = (tag) => make("tr", {}, ...cells(lines[i++]).map((cell) => make(tag, {}, ...inline(cell))));
    const head = row("th");
    i++;
    const rows = [];
    while (i < lines.length && lines[i].includes("|")) rows.push(row("td"));
    return make("div", { className: "table", tabIndex: 0 }, make("table", {}, make("thead", {}, head), make("tbody", {}, ...rows)));
  }

  function paragraph() {
    const from = i++;
    while (i < lines.length && lines[i].trim() && ![FENCE, HEADING, RULE, ITEM, QUOTE].some((p) => p.test(lines[i])) && !isTable()) i++;
    return make("p", {}, ...inline(lines.slice(from, i).join("\n")));
  }
}

/** One list; what is indented more than the first item belongs to the item before. */
function list(items) {
  const indent = items[0][1].length;
  const first = items[0][2];
  const element = make(first ? "ol" : "ul", first ? { start: Number(first) } : {});
  for (let i = 0; i < items.length; ) {
    const item = make("li", {}, ...inline(items[i++][3]));
    const from = i;
    while (i < items.length && items[i][1].length > indent) i++;
    if (i > from) item.append(list(items.slice(from, i)));
    element.append(item);
  }
  return element;
}

const cells = (line) => line.trim().replace(/^\||\|$/g, "").split("|").map((cell) => cell.trim());

/** Texts and elements of a line or several. */
function inline(text) {
  const found = [];
  let end = 0;
  for (const match of text.matchAll(INLINE)) {
    const [all, code, strong, emphasis] = match;
    if (match.index > end) found.push(text.slice(end, match.index));
    if (code) found.push(make("code", { textContent: code }));
    else found.push(make(strong ? "strong" : "em", {}, ...inline(strong ?? emphasis)));
    end = match.index + all.length;
  }
  if (end < text.length) found.push(text.slice(end));
  return found;
}
