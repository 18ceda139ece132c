// The messages of a conversation as elements: shown, grown while an answer comes, edited, copied.
//
// Owns the elements. What a button means is decided by `actions`, which the page's program gives.

import { MarkdownView } from "./markdown.js";
import { shownPath, versions } from "./tree.js";

/** An icon of the page's sprite. */
export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", `#i-${name}`);
  svg.setAttribute("aria-hidden", "true");
  svg.append(use);
  return svg;
}

export function button(label, iconName, onClick) {
  const made = element("button", "icon");
  made.type = "button";
  made.title = label;
  made.setAttribute("aria-label", label);
  made.append(icon(iconName));
  made.addEventListener("click", onClick);
  return made;
}

function element(name, className = "", text = "") {
  const made = document.createElement(name);
  if (className) made.className = className;
  made.textContent = text;
  return made;
}

/** Copy text, also on pages without TLS from another machine, where browsers have no `navigator.clipboard`. */
export async function copyText(text) {
  if (navigator.clipboard) {
    await navigator.clipboard.writeText(text);
    return;
  }
  const box = element("textarea", "hidden");
  box.value = text;
  document.body.append(box);
  box.select();
  document.execCommand("copy");
  box.remove();
}

/** The list of messages within `root`; `actions` has `edit`, `regenerate`, `choose`, `routing` and `paint`. */
export class MessageList {
  constructor(root, actions) {
    this.root = root;
    this.actions = actions;
    this.views = new Map(); // by message id
    root.addEventListener("click", (event) => this.#copyCode(event));
  }

  /** Show the path of `conversation` that is chosen; `running` is the message that is being written, if one is. */
  show(conversation, running) {
    const path = shownPath(conversation);
    const known = this.views;
    this.views = new Map();
    for (const message of path) {
      const view = known.get(message.id) ?? new MessageView(message, conversation, this.actions);
      this.views.set(message.id, view);
      view.update({ running: message === running, versions: versions(conversation, message) });
    }
    const elements = [...this.views.values()].map((view) => view.element);
    const isSame = elements.length === this.root.children.length && elements.every((one, i) => one === this.root.children[i]);
    if (!isSame) this.root.replaceChildren(...elements); // what has the focus would lose it
  }

  /** Show what has come to the message that is being written. */
  grow(message) {
    this.views.get(message.id)?.showText(true);
  }

  async #copyCode(event) {
    const pressed = event.target.closest?.("button.copy");
    if (!pressed) return;
    await copyText(pressed.closest("figure").querySelector("code").textContent);
    pressed.textContent = "Copied";
    setTimeout(() => { pressed.textContent = "Copy"; }, 2000);
  }
}

/** One message. */
class MessageView {
  constructor(message, conversation, actions) {
    this.message = message;
    this.conversation = conversation;
    this.actions = actions;
    const isUser = message.role === "user";
    this.element = element("article", `message ${message.role}`);
    this.element.dataset.id = message.id;
    const who = element("h2", "who", isUser ? "You" : message.model || "Answer");
    who.id = `who-${message.id}`;
    this.element.setAttribute("aria-labelledby", who.id);
    this.content = element("div", "content");
    this.foot = element("div", "foot");
    this.stats = element("span", "stats");
    this.element.append(who, this.content, this.foot);
    if (isUser) this.content.textContent = message.content;
    else this.#addAnswer(who);
  }

  #addAnswer(who) {
    this.markdown = new MarkdownView(this.content);
    this.reasoning = element("details", "reasoning");
    this.reasoning.hidden = true;
    this.reasoningTitle = element("summary");
    const inside = element("div", "content");
    this.reasoning.append(this.reasoningTitle, inside);
    this.reasoningText = new MarkdownView(inside);
    this.problem = element("p", "problem");
    this.problem.setAttribute("role", "alert");
    who.after(this.reasoning);
    this.content.after(this.problem);
  }

  /** Show everything of the message; `versions` are those that it can be exchanged for. */
  update({ running, versions: all }) {
    this.element.classList.toggle("running", running);
    this.element.setAttribute("aria-busy", String(running));
    if (this.markdown) {
      this.showText(running);
      this.problem.textContent = this.message.error ?? "";
      this.problem.hidden = !this.message.error;
    }
    const shown = `${running} ${all.indexOf(this.message)} ${all.length}`;
    if (this.shownFoot !== shown) {
      this.foot.replaceChildren(...this.#switches(all, running), ...(running ? [] : this.#buttons()), this.stats);
      this.shownFoot = shown;
    }
    this.#showStats();
  }

  /** Show the text as far as it has come. */
  showText(running) {
    const { content, reasoning = "" } = this.message;
    const routing = this.actions.routing(this.message);
    const made = this.markdown.show(content, routing?.within(reasoning.length, Infinity));
    this.reasoning.hidden = !reasoning;
    if (reasoning) {
      this.reasoningTitle.textContent = running && !content ? "Thinking …" : "Thoughts";
      made.push(...this.reasoningText.show(reasoning, routing?.within(0, reasoning.length)));
    }
    if (routing) this.actions.paint(this.message, made);
    this.#showStats();
  }

  #switches(all, running) {
    if (all.length < 2) return [];
    const at = all.indexOf(this.message);
    const turn = (step) => this.actions.choose(this.conversation, all[at + step]);
    const back = button("Previous version", "left", () => turn(-1));
    const on = button("Next version", "right", () => turn(1));
    back.disabled = running || at === 0;
    on.disabled = running || at === all.length - 1;
    const group = element("span", "versions");
    group.setAttribute("role", "group");
    group.setAttribute("aria-label", `Version ${at + 1} of ${all.length}`);
    group.append(back, element("span", "", `${at + 1}/${all.length}`), on);
    return [group];
  }

  #buttons() {
    const copy = button("Copy", "copy", () => copyText(this.message.content));
    if (this.message.role === "user") return [copy, button("Edit", "edit", () => this.#edit())];
    return [copy, button("Answer again", "again", () => this.actions.regenerate(this.conversation, this.message))];
  }

  #showStats() {
    const { stats, finish } = this.message;
    const parts = [];
    if (finish === "stopped") parts.push("stopped");
    if (finish === "length") parts.push("stopped at the limit of tokens");
    if (stats?.n_tokens) parts.push(`${stats.n_tokens} token${stats.n_tokens === 1 ? "" : "s"}`);
    if (stats?.tokens_per_s) parts.push(`${stats.tokens_per_s.toFixed(1)} tokens/s`);
    if (stats?.first_s !== undefined) parts.push(`first after ${stats.first_s.toFixed(2)} s`);
    this.stats.textContent = parts.join(" · ");
  }

  #edit() {
    const form = element("form", "edit");
    const box = element("textarea");
    box.value = this.message.content;
    box.rows = Math.min(12, box.value.split("\n").length + 1);
    box.setAttribute("aria-label", "Edit the message");
    const send = element("button", "primary", "Send");
    send.type = "submit";
    const cancel = element("button", "", "Cancel");
    cancel.type = "button";
    const row = element("div", "row end");
    row.append(cancel, send);
    form.append(box, row);
    const end = () => {
      form.replaceWith(this.content);
      this.foot.hidden = false;
      this.foot.querySelector("[aria-label=Edit]")?.focus();
    };
    cancel.addEventListener("click", end);
    form.addEventListener("keydown", (event) => {
      if (event.key === "Escape") end();
      else if (event.key === "Enter" && !event.shiftKey && !event.isComposing && event.target === box) form.requestSubmit();
      else return;
      event.preventDefault();
      event.stopPropagation();
    });
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      if (!box.value.trim()) return;
      end();
      this.actions.edit(this.conversation, this.message, box.value);
    });
    this.foot.hidden = true;
    this.content.replaceWith(form);
    box.focus();
  }
}
