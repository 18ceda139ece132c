// Markdown as elements. marked reads the text; what it finds becomes elements here, one kind at a time.
//
// HTML in a message is text like any other, links lead to web pages and mail only, and pictures are links: nothing of a
// message can run, or fetch anything. Every piece of text knows where in the source it stands, so that it can be parted
// into the tokens that the model wrote.

import { lexer } from "./marked.js";

/** Shows a text that grows: only blocks that have changed are made anew. */
export class MarkdownView {
  constructor(root) {
    this.root = root;
    this.shown = []; // {key, element} of each block
  }

  /**
   * Show `source`; `tokens` are `{start, end, index}` of the tokens that it is parted into, in their order. Gives the
   * elements that were made.
   */
  show(source, tokens = []) {
    let at = 0;
    const blocks = blocksOf(source).map((block) => {
      const begin = source.indexOf(block.raw, at);
      const start = begin < 0 ? at : begin;
      at = start + block.raw.length;
      return { block, start, tokens: tokens.filter((token) => token.end > start && token.start < at) };
    });
    const keys = blocks.map(({ block, start, tokens: own }) => `${start} ${own.map((t) => `${t.index}:${t.start}`)} ${block.raw}`);
    let same = 0;
    while (same < this.shown.length && same < keys.length && this.shown[same].key === keys[same]) same += 1;
    for (const { element } of this.shown.splice(same)) element?.remove();
    const made = [];
    for (let i = same; i < blocks.length; i += 1) {
      const { block, start, tokens: own } = blocks[i];
      const element = blockElement(block, new Writer(source, start, own));
      if (element) made.push(element);
      this.shown.push({ key: keys[i], element });
    }
    this.root.append(...made);
    return made;
  }
}

function blocksOf(source) {
  try {
    return lexer(source, { gfm: true, breaks: true });
  } catch {
    return [{ type: "html", raw: source, text: source }]; // too deep for marked: shown as it is
  }
}

/** Writes text in the order of the source, and parts it into tokens. */
class Writer {
  constructor(source, start, tokens) {
    this.source = source;
    this.at = start;
    this.tokens = tokens;
    this.next = 0;
  }

  /** Move past what is no text of its own, such as the first line of a code block. */
  skip(raw) {
    const found = this.source.indexOf(raw, this.at);
    if (found >= 0) this.at = found + raw.length;
  }

  /** Append `text` to `parent`; in the source it is `raw`. */
  write(parent, text, raw = text) {
    if (!this.tokens.length) {
      parent.append(text);
      return;
    }
    if (text !== raw) {
      this.#piece(parent, text, raw);
      return;
    }
    // quotations and lists begin each line with marks of their own
    text.split(/(?<=\n)/).forEach((line) => this.#piece(parent, line, line));
  }

  #piece(parent, text, raw) {
    const start = this.source.indexOf(raw, this.at);
    if (start < 0) {
      parent.append(text);
      return;
    }
    this.at = start + raw.length;
    if (text !== raw) {
      const token = this.tokens.find((one) => one.end > start);
      parent.append(token && token.start < this.at ? tokenElement(text, token.index) : text);
      return;
    }
    let from = start;
    while (from < this.at) {
      while (this.next < this.tokens.length && this.tokens[this.next].end <= from) this.next += 1;
      const token = this.tokens[this.next];
      const isInside = token !== undefined && token.start <= from;
      const to = Math.min(this.at, isInside ? token.end : (token?.start ?? this.at));
      const part = text.slice(from - start, to - start);
      parent.append(isInside ? tokenElement(part, token.index) : part);
      from = to;
    }
  }
}

function tokenElement(text, index) {
  const element = make("span", "t");
  element.dataset.i = index;
  element.textContent = text;
  return element;
}

function make(name, className = "") {
  const element = document.createElement(name);
  if (className) element.className = className;
  return element;
}

// ---- blocks

function blockElement(block, writer) {
  switch (block.type) {
    case "space":
    case "def":
      return null;
    case "hr":
      return make("hr");
    case "heading":
      return filled(make(`h${Math.min(6, block.depth + 2)}`), block.tokens, writer);
    case "code":
      return codeElement(block, writer);
    case "blockquote":
      return filledWithBlocks(make("blockquote"), block.tokens, writer);
    case "list":
      return listElement(block, writer);
    case "table":
      return tableElement(block, writer);
    case "paragraph":
      return filled(make("p"), block.tokens, writer);
    case "text":
      return filled(make("span"), block.tokens ?? [block], writer);
    default: {
      const element = make("p", "asis");
      writer.write(element, block.text ?? block.raw);
      return element;
    }
  }
}

function filledWithBlocks(parent, blocks, writer) {
  for (const block of blocks) {
    const element = block.type === "checkbox" ? checkbox(block) : blockElement(block, writer);
    if (element) parent.append(element);
  }
  return parent;
}

function codeElement(block, writer) {
  const figure = make("figure", "code");
  const caption = make("figcaption");
  const language = make("span");
  language.textContent = block.lang?.trim().split(/\s/)[0] || "code";
  const copy = make("button", "copy");
  copy.type = "button";
  copy.textContent = "Copy";
  copy.setAttribute("aria-label", "Copy the code");
  caption.append(language, copy);
  const pre = make("pre");
  pre.tabIndex = 0;
  pre.setAttribute("role", "region");
  pre.setAttribute("aria-label", `${language.textContent}, code`);
  const code = make("code");
  if (/^\s*(`{3,}|~{3,})/.test(block.raw)) writer.skip(block.raw.split("\n", 1)[0]);
  writer.write(code, block.text);
  pre.append(code);
  figure.append(caption, pre);
  return figure;
}

function listElement(block, writer) {
  const list = make(block.ordered ? "ol" : "ul");
  if (block.ordered && block.start !== 1) list.start = Number(block.start);
  for (const item of block.items) list.append(filledWithBlocks(make("li", item.task ? "task" : ""), item.tokens, writer));
  return list;
}

function checkbox(token) {
  const box = make("input");
  box.type = "checkbox";
  box.disabled = true;
  box.checked = Boolean(token.checked);
  box.setAttribute("aria-label", token.checked ? "done" : "to do");
  return box;
}

function tableElement(block, writer) {
  const table = make("table");
  const head = table.createTHead().insertRow();
  for (const cell of block.header) {
    const element = make("th");
    element.scope = "col";
    head.append(filled(element, cell.tokens, writer));
  }
  const body = table.createTBody();
  for (const row of block.rows) {
    const line = body.insertRow();
    for (const cell of row) filled(line.insertCell(), cell.tokens, writer);
  }
  for (const row of table.rows) {
    [...row.cells].forEach((cell, i) => {
      if (block.align[i]) cell.style.textAlign = block.align[i];
    });
  }
  const box = make("div", "scroll");
  box.tabIndex = 0;
  box.setAttribute("role", "region");
  box.setAttribute("aria-label", "Table");
  box.append(table);
  return box;
}

// ---- text

function filled(parent, tokens, writer) {
  for (const token of tokens) writeInline(parent, token, writer);
  return parent;
}

const INLINE = { strong: "strong", em: "em", del: "del" };

function writeInline(parent, token, writer) {
  if (token.type in INLINE) {
    parent.append(filled(make(INLINE[token.type]), token.tokens, writer));
  } else if (token.type === "br") {
    parent.append(make("br"));
  } else if (token.type === "checkbox") {
    parent.append(checkbox(token));
  } else if (token.type === "codespan") {
    const code = make("code");
    writer.write(code, token.text);
    parent.append(code);
  } else if (token.type === "link" || token.type === "image") {
    writeLink(parent, token, writer);
  } else if (token.type === "text" && token.tokens) {
    filled(parent, token.tokens, writer);
  } else if (token.type === "text") {
    const shown = token.escaped ? token.text : withoutEntities(token.text);
    writer.write(parent, shown, token.text);
  } else {
    writer.write(parent, token.type === "escape" ? token.text : token.raw, token.raw);
  }
}

function writeLink(parent, token, writer) {
  const address = safeAddress(token.href);
  const element = address === null ? make("span") : make("a");
  if (address !== null) {
    element.href = address;
    element.target = "_blank";
    element.rel = "noopener noreferrer nofollow";
  }
  if (token.type === "image") {
    writer.write(element, token.text || "picture", token.text);
    element.classList.add("picture");
  } else {
    filled(element, token.tokens, writer);
  }
  parent.append(element);
}

/** An address that a link may have, or null: web pages and mail, and nothing that runs or reads files. */
export function safeAddress(href) {
  try {
    const address = new URL(href);
    return ["http:", "https:", "mailto:"].includes(address.protocol) ? address.href : null;
  } catch {
    return null; // relative addresses would lead into this server
  }
}

const ENTITIES = {
  amp: "&", lt: "<", gt: ">", quot: '"', apos: "'", nbsp: "\u00a0", copy: "©", reg: "®", deg: "°", plusmn: "±",
  times: "×", divide: "÷", ndash: "–", mdash: "—", hellip: "…", larr: "←", rarr: "→", le: "≤", ge: "≥", ne: "≠",
  laquo: "«", raquo: "»", middot: "·", bull: "•", euro: "€", pound: "£", sect: "§", para: "¶", micro: "µ",
};

/** Text with the entities of HTML that models write as the characters that they mean. */
export function withoutEntities(text) {
  return text.replace(/&(?:#(\d{1,7})|#x([\da-f]{1,6})|([a-z]{2,6}));/gi, (whole, decimal, hex, name) => {
    if (name) return ENTITIES[name] ?? whole;
    const code = decimal ? Number(decimal) : Number.parseInt(hex, 16);
    return code > 0 && code <= 0x10ffff ? String.fromCodePoint(code) : whole;
  });
}
