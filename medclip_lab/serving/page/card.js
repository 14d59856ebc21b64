// A model card: the little of Markdown that cards use, as nodes whose text is text. Addresses are shown, not followed.

import { made } from "/page/view.js";

const INLINE = /(`[^`]+`|\*\*[^*]+\*\*|\[[^\]]+\]\([^)\s]+\))/;

function inline(node, text) {
  for (const part of text.split(INLINE)) {
    if (/^`[^`]+`$/.test(part)) node.append(made("code", "", part.slice(1, -1)));
    else if (/^\*\*[^*]+\*\*$/.test(part)) node.append(made("strong", "", part.slice(2, -2)));
    else node.append(part.replace(/^\[([^\]]+)\]\(([^)\s]+)\)$/, "$1 ($2)"));
  }
  return node;
}

const cells = (line) => line.trim().replace(/^\||\|$/g, "").split("|").map((cell) => cell.trim());

function table(lines) {
  const [head, , ...rows] = lines.map(cells);
  const node = made("table");
  if (head.some(Boolean)) {
    const row = node.createTHead().insertRow();
    for (const cell of head) {
      const th = inline(made("th"), cell);
      th.scope = "col";
      row.append(th);
    }
  }
  const body = node.createTBody();
  for (const row of rows) {
    const line = body.insertRow();
    for (const cell of row) inline(line.insertCell(), cell);
  }
  const frame = made("div", "table");
  frame.append(node);
  return frame;
}

// The metadata above a card, as far as it is one value a line.
function facts(lines) {
  const list = made("dl", "facts");
  for (const line of lines) {
    const found = /^(\w[\w -]*):\s*(\S.*)$/.exec(line);
    if (found) list.append(made("dt", "", found[1].replaceAll("_", " ")), made("dd", "", found[2].replace(/^\[(.*)\]$/, "$1")));
  }
  return list;
}

export function rendered(text) {
  const lines = text.replaceAll("\r", "").split("\n");
  const root = document.createDocumentFragment();
  let at = 0;
  const take = (test) => {
    const start = at;
    while (at < lines.length && test(lines[at])) at += 1;
    return lines.slice(start, at);
  };
  if (lines[0] === "---") {
    at = 1;
    root.append(facts(take((line) => line !== "---")));
    at += 1;
  }
  const special = (line) => /^(#{1,6} |```|\||\s*[-*] |\s*$)/.test(line);
  while (at < lines.length) {
    const line = lines[at];
    const heading = /^(#{1,6}) (.*)$/.exec(line);
    if (!line.trim()) at += 1;
    else if (heading) {
      root.append(inline(made(heading[1].length === 1 ? "h3" : "h4"), heading[2]));
      at += 1;
    } else if (line.startsWith("```")) {
      at += 1;
      root.append(made("pre", "", take((one) => !one.startsWith("```")).join("\n")));
      at += 1;
    } else if (line.startsWith("|")) {
      const found = take((one) => one.startsWith("|"));
      root.append(found.length > 1 ? table(found) : inline(made("p"), found[0]));
    } else if (/^\s*[-*] /.test(line)) {
      const list = made("ul");
      while (at < lines.length && /^\s*[-*] /.test(lines[at])) {
        const first = lines[at].replace(/^\s*[-*] /, "");
        at += 1;
        list.append(inline(made("li"), [first, ...take((one) => !special(one))].join(" ")));
      }
      root.append(list);
    } else {
      const first = at;
      const found = take((one) => !special(one));
      if (at === first) at += 1; // never stand still
      root.append(inline(made("p"), found.join(" ") || line));
    }
  }
  return root;
}
