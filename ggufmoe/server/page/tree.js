// A conversation: a tree of messages, of which one path from the first message on is shown.
//
// Messages that were asked or answered again have several versions below one parent. No network, no document.

/** An identifier; also where `crypto.randomUUID` is missing, as on pages that come without TLS from another machine. */
export function newId() {
  return Array.from(crypto.getRandomValues(new Uint8Array(12)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

export function newConversation(settings = {}) {
  const now = Date.now();
  return {
    id: newId(),
    title: "",
    created: now,
    updated: now,
    settings: { system: "", sampling: {}, ...structuredClone(settings) },
    messages: new Map(), // by id, in the order in which they were written
    chosen: new Map(), // the version that is shown below each parent, by the parent's id; "" is above the first message
  };
}

/** Add a message below `parent` (an id, or "") and show it; the message. */
export function addMessage(conversation, parent, fields) {
  const message = { id: newId(), parent, content: "", created: Date.now(), ...fields };
  conversation.messages.set(message.id, message);
  conversation.chosen.set(parent, message.id);
  conversation.updated = Date.now();
  if (!conversation.title && message.role === "user") conversation.title = titleOf(message.content);
  return message;
}

export function titleOf(text) {
  const line = text.trim().replace(/\s+/g, " ");
  return line.length > 60 ? `${line.slice(0, 59).trimEnd()}…` : line;
}

/** All versions of a message, the oldest first. */
export function versions(conversation, message) {
  return [...conversation.messages.values()].filter((other) => other.parent === message.parent);
}

/** Show a message, and below it what was shown there last. */
export function choose(conversation, message) {
  conversation.chosen.set(message.parent, message.id);
}

/** The messages that are shown, the first one first. */
export function shownPath(conversation) {
  const path = [];
  let id = conversation.chosen.get("");
  while (id !== undefined) {
    path.push(conversation.messages.get(id));
    id = conversation.chosen.get(id);
  }
  return path;
}

/** What the model is sent so that it answers `message`: the system prompt, and all messages from the first one to it. */
export function asSent(conversation, message) {
  const path = [];
  for (let one = message; one; one = conversation.messages.get(one.parent)) {
    const sent = { role: one.role, content: one.content };
    if (one.role === "assistant" && one.reasoning) sent.reasoning_content = one.reasoning;
    path.unshift(sent);
  }
  const system = conversation.settings.system.trim();
  return system ? [{ role: "system", content: system }, ...path] : path;
}

// ---- as JSON

const FORMAT = "ggufmoe-conversations";
const MAX_TEXT = 1 << 22;
const SAMPLING = ["temperature", "top_p", "top_k", "min_p", "repeat_penalty", "max_tokens", "seed"];

/** Conversations as an object for JSON. */
export function exported(conversations) {
  return {
    format: FORMAT,
    version: 1,
    conversations: conversations.map((one) => ({
      ...one,
      messages: [...one.messages.values()],
      chosen: Object.fromEntries(one.chosen),
    })),
  };
}

/** The conversations of such an object, with identifiers of their own. Throws an Error that says what is wrong. */
export function imported(object) {
  if (object?.format !== FORMAT || !Array.isArray(object.conversations)) {
    throw new Error("This file holds no conversations that were exported here.");
  }
  if (object.version !== 1) throw new Error(`This file has version ${Number(object.version)}, and 1 can be read.`);
  return object.conversations.map(importedConversation);
}

function importedConversation(found) {
  if (!Array.isArray(found?.messages)) throw new Error("A conversation in this file has no messages.");
  const conversation = newConversation({
    system: text(found.settings?.system ?? ""),
    sampling: importedSampling(found.settings?.sampling ?? {}),
  });
  conversation.title = titleOf(text(found.title ?? ""));
  conversation.created = Number(found.created) || conversation.created;
  const ids = new Map([["", ""]]);
  for (const one of found.messages) {
    const message = importedMessage(one, ids);
    conversation.messages.set(message.id, message);
    ids.set(one.id, message.id);
    conversation.chosen.set(message.parent, message.id);
  }
  for (const [parent, id] of Object.entries(found.chosen ?? {})) {
    const message = conversation.messages.get(ids.get(id));
    if (message && message.parent === ids.get(parent)) choose(conversation, message);
  }
  return conversation;
}

function importedMessage(found, ids) {
  if (!["user", "assistant"].includes(found?.role) || !ids.has(found.parent) || ids.has(found.id)) {
    throw new Error("The messages in this file do not belong together.");
  }
  const message = {
    id: newId(),
    parent: ids.get(found.parent),
    role: found.role,
    content: text(found.content),
    created: Number(found.created) || 0,
  };
  for (const name of ["reasoning", "model", "finish", "error"]) {
    if (found[name] !== undefined) message[name] = text(found[name]);
  }
  const stats = Object.entries(found.stats ?? {}).filter(([, value]) => Number.isFinite(value));
  if (stats.length) message.stats = Object.fromEntries(stats);
  return message;
}

function importedSampling(found) {
  return Object.fromEntries(SAMPLING.filter((name) => Number.isFinite(found[name])).map((name) => [name, found[name]]));
}

function text(value) {
  if (typeof value !== "string" || value.length > MAX_TEXT) throw new Error("A text in this file is none, or too long.");
  return value;
}
