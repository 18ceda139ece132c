// The page's program: what is shown, what the buttons do, and answers as they come.

import { ApiFailure, chat, health, keepApiKey, servedModel } from "./api.js";
import { ExpertView } from "./experts.js";
import { button, MessageList } from "./messages.js";
import { showPlacement } from "./placement.js";
import { keepSetting, setting, Store } from "./store.js";
import { addMessage, asSent, choose, exported, imported, newConversation, shownPath } from "./tree.js";

const SAVE_MS = 2000;
const RETRY_MS = 1500;
const SAMPLING = [
  // name in a request, label, step, least, most
  ["temperature", "Temperature", 0.05, 0, 5],
  ["top_p", "Top p", 0.01, 0, 1],
  ["top_k", "Top k", 1, 0, 1000],
  ["min_p", "Min p", 0.01, 0, 1],
  ["repeat_penalty", "Repeat penalty", 0.01, 0, 3],
  ["max_tokens", "Most tokens", 1, 1, 1000000],
  ["seed", "Seed", 1, 0, 4294967295],
];

const $ = (id) => document.getElementById(id);

class App {
  constructor(store) {
    this.store = store;
    this.model = null;
    this.conversations = [];
    this.current = newConversation(setting("defaults", {}));
    this.running = new Map(); // by conversation id: {message, abort}
    this.list = new MessageList($("messages"), {
      edit: (conversation, message, text) => this.ask(conversation, message.parent, text),
      regenerate: (conversation, message) => this.answer(conversation, conversation.messages.get(message.parent)),
      choose: (conversation, message) => this.#choose(conversation, message),
      routing: (message) => this.experts.routing(message),
      paint: (message, elements) => this.experts.paintMessage(message, elements),
    });
    this.experts = new ExpertView(this.list);
  }

  async start() {
    applyTheme(setting("theme", "system"));
    $("theme").value = setting("theme", "system");
    if (!this.store.isKept) $("kept-note").textContent = "This browser keeps nothing: export what you want to have again.";
    this.#listen();
    this.conversations = await this.store.conversations();
    const last = this.conversations.find((one) => one.id === setting("last", ""));
    this.open(last ?? this.current);
    if (matchMedia("(hover: hover)").matches) $("question").focus(); // elsewhere it would bring up a keyboard
    await this.connect();
  }

  // ---- the server

  /** Learn what the server serves; asks for a key where one is needed, and waits while the model is loaded. */
  async connect() {
    if (this.isConnecting) return;
    this.isConnecting = true;
    this.#setModel(null);
    while (!this.model?.meta) {
      try {
        const found = await servedModel();
        if (found.meta) {
          this.#setModel(found);
          break;
        }
        const { reason, progress } = await health();
        this.status(progress ? `${reason}, ${Math.round(100 * progress)} %` : (reason ?? ""));
      } catch (error) {
        if (!(error instanceof ApiFailure)) throw error;
        if (error.status === 401) {
          await askForKey(error);
          continue;
        }
        this.status(error.message);
      }
      await new Promise((resolve) => { setTimeout(resolve, RETRY_MS); });
    }
    this.isConnecting = false;
  }

  #setModel(model) {
    this.model = model;
    if (model) {
      this.status(model.id);
      this.experts.setModel(model.meta.routing);
    }
    this.#showWelcome();
    this.#showPlacement();
    this.#showButtons();
  }

  status(text) {
    $("status").textContent = text;
  }

  // ---- what is shown

  /** Show a conversation. */
  open(conversation) {
    this.current = conversation;
    keepSetting("last", conversation.id);
    this.#showAll();
    $("scroller").scrollTop = $("scroller").scrollHeight;
    this.#showExperts(conversation);
  }

  /** Show the experts of the last answer that has some; fetches those of the answers that are shown. */
  async #showExperts(conversation) {
    const answers = shownPath(conversation).filter((message) => message.role === "assistant");
    const isNew = answers.filter((message) => message.routed && !this.experts.routing(message));
    for (const message of isNew) {
      const packed = await this.store.routing(message.id);
      if (packed) this.experts.restore(message, packed);
    }
    if (conversation !== this.current) return;
    if (isNew.length) this.list.show(conversation, this.running.get(conversation.id)?.message);
    this.experts.show(answers.filter((message) => this.experts.routing(message)).at(-1) ?? null);
  }

  #showPlacement() {
    const last = shownPath(this.current).findLast((message) => message.stats?.n_tokens);
    showPlacement($("model-facts"), this.model?.meta, last?.stats);
  }

  #showAll() {
    const { title, id } = this.current;
    $("title").textContent = title || "New conversation";
    document.title = title ? `${title} – ggufmoe` : "ggufmoe";
    this.list.show(this.current, this.running.get(id)?.message);
    this.#showWelcome();
    this.#showConversations();
    this.#showButtons();
    this.#showPlacement();
  }

  #showWelcome() {
    $("welcome").hidden = this.current.messages.size > 0;
    $("welcome-name").textContent = this.model?.id ?? "";
    $("welcome-text").textContent = this.model ? "Runs on this server; nothing that you write leaves it." : "";
    this.experts.showWelcome($("welcome-experts"));
  }

  #showButtons() {
    const isRunning = this.running.has(this.current.id);
    const hadFocus = [$("send"), $("stop")].includes(document.activeElement);
    $("send").hidden = isRunning;
    $("stop").hidden = !isRunning;
    $("send").disabled = this.model === null || !$("question").value.trim();
    if (hadFocus) $(isRunning ? "stop" : "question").focus();
  }

  #showConversations() {
    const shown = [this.current.id, ...this.conversations.map((one) => `${one.id} ${one.title}`)].join("\n");
    if (this.shownConversations === shown) return; // what has the focus would lose it
    this.shownConversations = shown;
    const items = this.conversations.map((one) => {
      const item = document.createElement("li");
      const open = document.createElement("button");
      open.type = "button";
      open.className = "conversation";
      open.textContent = one.title || "Untitled";
      if (one.id === this.current.id) open.setAttribute("aria-current", "true");
      open.addEventListener("click", () => {
        this.open(one);
        closeDrawers();
        $("question").focus();
      });
      const name = one.title || "Untitled";
      item.append(
        open,
        button(`Export “${name}”`, "export", () => save([one])),
        button(`Delete “${name}”`, "delete", () => this.#delete(one)),
      );
      return item;
    });
    $("conversations").replaceChildren(...items);
  }

  #choose(conversation, message) {
    choose(conversation, message);
    this.#showAll();
    this.#showExperts(conversation);
    this.#keep(conversation);
    const view = this.list.views.get(message.id);
    view.element.querySelector(".versions button:not(:disabled)")?.focus();
  }

  // ---- asking and answering

  /** Add a message of the user below `parent` (an id or "") and answer it. */
  async ask(conversation, parent, text) {
    if (this.running.has(conversation.id)) return;
    if (!this.conversations.includes(conversation)) this.conversations.unshift(conversation);
    await this.answer(conversation, addMessage(conversation, parent, { role: "user", content: text.trim() }));
  }

  /** Add an answer to `question`, and fill it as it comes. */
  async answer(conversation, question) {
    if (this.running.has(conversation.id)) return;
    const asked = { messages: asSent(conversation, question), ...conversation.settings.sampling };
    const message = addMessage(conversation, question.id, { role: "assistant", reasoning: "", model: this.model?.id ?? "" });
    if (this.experts.isWanted) {
      asked.routing = "layers";
      message.routed = true;
      this.experts.begin(message);
    }
    const abort = new AbortController();
    this.running.set(conversation.id, { message, abort });
    if (conversation === this.current) this.open(conversation);
    const keeping = setInterval(() => this.#keep(conversation), SAVE_MS);
    try {
      await this.#read(conversation, message, chat(asked, abort.signal));
    } catch (error) {
      this.#fail(message, error);
    } finally {
      clearInterval(keeping);
      await this.#keepAnswer(conversation, message); // what is shown as complete is there again after a reload
      this.running.delete(conversation.id);
    }
    this.#grow(conversation, message);
    if (conversation === this.current) this.#showAll();
    announce(message.error ?? `${sentenceRest(message)} End of the answer.`);
  }

  async #read(conversation, message, chunks) {
    const began = performance.now();
    const seconds = () => (performance.now() - began) / 1000;
    message.stats = {};
    for await (const chunk of chunks) {
      const choice = chunk.choices[0];
      const { content, reasoning_content: reasoning } = choice?.delta ?? {};
      if (reasoning) message.reasoning += reasoning;
      if (content) message.content += content;
      if ((content || reasoning) && message.stats.first_s === undefined) {
        message.stats.first_s = seconds();
        this.#keep(conversation);
      }
      if (choice?.routing) this.experts.push(message, choice.routing);
      if (content || reasoning) {
        // until the server tells: a chunk has a token, or as many as it has routings, or as it says
        message.stats.n_tokens = (message.stats.n_tokens ?? 0) + (choice.routing?.length ?? chunk.n_tokens ?? 1);
        message.stats.tokens_per_s = message.stats.n_tokens / Math.max(seconds(), 0.001);
      }
      if (choice?.finish_reason) message.finish = choice.finish_reason;
      if (chunk.timings) {
        message.stats.n_tokens = chunk.timings.predicted_n;
        message.stats.tokens_per_s = chunk.timings.predicted_per_second;
      }
      if (chunk.usage) message.stats.n_context = chunk.usage.total_tokens;
      this.#growSoon(conversation, message);
    }
  }

  #fail(message, error) {
    if (error.name === "AbortError") {
      message.finish = "stopped";
      return;
    }
    message.finish = "error";
    message.error = error.message;
    if (!(error instanceof ApiFailure)) console.error(error);
    else if ([0, 401, 503].includes(error.status)) this.connect();
  }

  #growSoon(conversation, message) {
    if (this.drawing) return;
    this.drawing = requestAnimationFrame(() => {
      this.drawing = 0;
      this.#grow(conversation, message);
    });
  }

  #grow(conversation, message) {
    if (conversation !== this.current) return;
    const scroller = $("scroller");
    const isAtEnd = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 48;
    this.experts.place(message, false);
    this.list.grow(message);
    this.experts.grow();
    this.#showPlacement();
    if (isAtEnd) scroller.scrollTop = scroller.scrollHeight;
    announceSentences(message);
  }

  stop() {
    this.running.get(this.current.id)?.abort.abort();
  }

  // ---- keeping

  async #keepAnswer(conversation, message) {
    this.experts.place(message, true);
    await this.#keep(conversation);
    const routing = this.experts.routing(message);
    if (routing && this.conversations.includes(conversation)) await this.store.keepRouting(message.id, routing.packed());
  }

  async #keep(conversation) {
    conversation.updated = Date.now();
    if (this.conversations.includes(conversation)) await this.store.keep(conversation);
  }

  async #delete(conversation) {
    if (!window.confirm(`Delete “${conversation.title}”? There is no way back.`)) return;
    this.running.get(conversation.id)?.abort.abort();
    this.conversations = this.conversations.filter((one) => one !== conversation);
    await this.store.remove(conversation);
    if (conversation === this.current) this.open(newConversation(setting("defaults", {})));
    else this.#showConversations();
    $("new").focus();
  }

  async #import(file) {
    try {
      const found = imported(JSON.parse(await file.text()));
      for (const conversation of found) {
        this.conversations.unshift(conversation);
        await this.store.keep(conversation);
      }
      if (found.length) this.open(found[0]);
      announce(`${found.length} conversations were imported.`);
    } catch (error) {
      this.status(`Not imported: ${error instanceof SyntaxError ? "the file is no JSON." : error.message}`);
    }
  }

  // ---- what the user does

  #listen() {
    const question = $("question");
    const grow = () => {
      question.style.height = "auto";
      question.style.height = `${question.scrollHeight}px`;
      this.#showButtons();
    };
    question.addEventListener("input", grow);
    question.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      $("composer").requestSubmit();
    });
    $("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      if (!question.value.trim() || !this.model || this.running.has(this.current.id)) return;
      const text = question.value;
      question.value = "";
      grow();
      this.ask(this.current, shownPath(this.current).at(-1)?.id ?? "", text);
    });
    $("stop").addEventListener("click", () => this.stop());
    $("new").addEventListener("click", () => {
      this.open(newConversation(setting("defaults", {})));
      closeDrawers();
      question.focus();
    });
    $("export-all").addEventListener("click", () => save(this.conversations));
    $("import").addEventListener("click", () => $("import-file").click());
    $("import-file").addEventListener("change", async (event) => {
      const [file] = event.target.files;
      if (file) await this.#import(file);
      event.target.value = "";
    });
    $("theme").addEventListener("change", (event) => {
      keepSetting("theme", event.target.value);
      applyTheme(event.target.value);
    });
    $("show-settings").addEventListener("click", () => this.#editSettings());
    for (const name of ["sidebar", "panel"]) {
      $(`show-${name}`).addEventListener("click", () => toggleDrawer(name));
    }
    for (const close of document.querySelectorAll("[data-closes]")) {
      close.addEventListener("click", () => closeDrawers());
    }
    document.addEventListener("keydown", (event) => {
      if (event.key !== "Escape" || document.querySelector("dialog[open]")) return;
      if (!closeDrawers()) this.stop();
    });
    addEventListener("pagehide", () => {
      for (const id of this.running.keys()) this.#keep(this.conversations.find((one) => one.id === id));
    });
  }

  #editSettings() {
    const { settings } = this.current;
    const dialog = $("settings");
    $("system").value = settings.system;
    $("sampling").replaceChildren(...SAMPLING.flatMap((field) => samplingField(field, settings.sampling)));
    dialog.querySelector("[data-dismiss]").onclick = () => dialog.close();
    dialog.querySelector("form").onsubmit = (event) => {
      event.preventDefault();
      settings.system = $("system").value;
      settings.sampling = Object.fromEntries(
        SAMPLING.map(([name]) => [name, $(`sampling-${name}`).value])
          .filter(([, value]) => value !== "")
          .map(([name, value]) => [name, Number(value)]),
      );
      keepSetting("defaults", settings);
      this.#keep(this.current);
      dialog.close();
    };
    dialog.showModal();
  }
}

function samplingField([name, label, step, min, max], values) {
  const caption = document.createElement("label");
  caption.htmlFor = `sampling-${name}`;
  caption.textContent = label;
  const input = document.createElement("input");
  Object.assign(input, { type: "number", id: `sampling-${name}`, step: step === 1 ? 1 : "any", min, max });
  input.placeholder = "suggested";
  input.value = values[name] ?? "";
  return [caption, input];
}

function askForKey(failure) {
  const dialog = $("key-dialog");
  if (failure.message) $("key-problem").textContent = `${failure.message}. It is kept until this tab is closed.`;
  $("key").value = "";
  if (!dialog.open) dialog.showModal();
  return new Promise((resolve) => {
    dialog.oncancel = (event) => event.preventDefault(); // nothing works without a key
    dialog.querySelector("form").onsubmit = (event) => {
      event.preventDefault();
      keepApiKey($("key").value);
      dialog.close();
      resolve();
    };
  });
}

/** Offer conversations as a file. */
function save(conversations) {
  const content = JSON.stringify(exported(conversations), null, 1);
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([content], { type: "application/json" }));
  link.download = `conversations-${new Date().toISOString().slice(0, 10)}.json`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

function applyTheme(theme) {
  document.documentElement.dataset.theme = theme;
}

// ---- the drawers beside the conversation

function toggleDrawer(name) {
  const shows = !$(name).classList.contains("open");
  closeDrawers();
  $(name).classList.toggle("open", shows);
  $(`show-${name}`).setAttribute("aria-expanded", String(shows));
  if (shows) $(name).querySelector("button:not([hidden])").focus();
}

/** Close what lies over the conversation; whether something did. */
function closeDrawers() {
  let was = false;
  for (const name of ["sidebar", "panel"]) {
    if (!$(name).classList.contains("open")) continue;
    was = true;
    $(name).classList.remove("open");
    $(`show-${name}`).setAttribute("aria-expanded", "false");
    $(`show-${name}`).focus();
  }
  return was;
}

// ---- for screen readers: an answer is read out sentence by sentence

const said = new WeakMap(); // characters of each message that were announced

function announce(text) {
  $("announcer").textContent = text;
}

function announceSentences(message) {
  const from = said.get(message) ?? 0;
  const end = message.content.slice(from).search(/[.!?:\n]\s[^]*$|\n/);
  if (end < 0) return;
  const rest = message.content.slice(from);
  const last = Math.max(...[". ", "! ", "? ", ": ", "\n"].map((mark) => rest.lastIndexOf(mark)));
  announce(rest.slice(0, last + 1));
  said.set(message, from + last + 1);
}

function sentenceRest(message) {
  const rest = message.content.slice(said.get(message) ?? 0);
  said.set(message, message.content.length);
  return rest;
}

await new App(await Store.open()).start();
