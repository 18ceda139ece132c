// What the browser keeps: conversations in IndexedDB, small settings in localStorage.
//
// Where a browser allows neither (some private windows), everything lives as long as the page.

const DATABASE = "ggufmoe";
const VERSION = 1;

/** Settings of the page by name; `fallback` where none was kept. */
export function setting(name, fallback) {
  try {
    const kept = localStorage.getItem(`ggufmoe-${name}`);
    return kept === null ? fallback : JSON.parse(kept);
  } catch {
    return fallback;
  }
}

export function keepSetting(name, value) {
  try {
    localStorage.setItem(`ggufmoe-${name}`, JSON.stringify(value));
  } catch {
    // not kept
  }
}

/** Conversations, and the routing of their answers, by id. */
export class Store {
  /** `database` is null where there is none. */
  constructor(database) {
    this.database = database;
    this.memory = { conversations: new Map(), routing: new Map() };
  }

  static async open() {
    try {
      const opening = indexedDB.open(DATABASE, VERSION);
      opening.onupgradeneeded = () => {
        opening.result.createObjectStore("conversations", { keyPath: "id" });
        opening.result.createObjectStore("routing", { keyPath: "id" });
      };
      return new Store(await result(opening));
    } catch {
      return new Store(null);
    }
  }

  get isKept() {
    return this.database !== null;
  }

  /** All conversations, that changed last first. */
  async conversations() {
    const all = await this.#do("conversations", "readonly", (store) => store.getAll(), (kept) => [...kept.values()]);
    return all.sort((a, b) => b.updated - a.updated);
  }

  async keep(conversation) {
    await this.#put("conversations", conversation);
  }

  async keepRouting(messageId, content) {
    await this.#put("routing", { id: messageId, content });
  }

  /** What was kept for a message, or null. */
  async routing(messageId) {
    const found = await this.#do("routing", "readonly", (store) => store.get(messageId), (kept) => kept.get(messageId));
    return found?.content ?? null;
  }

  async remove(conversation) {
    for (const id of conversation.messages.keys()) {
      await this.#do("routing", "readwrite", (store) => store.delete(id), (kept) => kept.delete(id));
    }
    await this.#do("conversations", "readwrite", (store) => store.delete(conversation.id), (kept) => kept.delete(conversation.id));
  }

  async #put(name, object) {
    await this.#do(name, "readwrite", (store) => store.put(object), (kept) => kept.set(object.id, object));
  }

  async #do(name, mode, withStore, withMemory) {
    if (this.database === null) return withMemory(this.memory[name]);
    return result(withStore(this.database.transaction(name, mode).objectStore(name)));
  }
}

function result(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}
