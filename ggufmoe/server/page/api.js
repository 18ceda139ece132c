// The server's interface: what it serves, and answers as streams of objects.
//
// Addresses are relative to the page's own, so that the page also works below a path of a proxy.

const KEY = "ggufmoe-key";

/** An answer of the server that is an error, or no answer at all (status 0). */
export class ApiFailure extends Error {
  constructor(status, message, code = null) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

/** The API key for as long as this tab is open; empty where there is none. */
export function apiKey() {
  return sessionStorage.getItem(KEY) ?? "";
}

export function keepApiKey(key) {
  sessionStorage.setItem(KEY, key.trim());
}

async function request(path, options = {}) {
  const headers = { ...(options.body ? { "Content-Type": "application/json" } : {}) };
  if (apiKey()) headers.Authorization = `Bearer ${apiKey()}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers, cache: "no-store", credentials: "omit" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiFailure(0, "The server cannot be reached. Is it still running?");
  }
  if (!response.ok) throw await failureOf(response);
  return response;
}

async function failureOf(response) {
  let told = null;
  try {
    told = (await response.json()).error;
  } catch {
    // a proxy's error page is no JSON
  }
  const message = typeof told?.message === "string" ? told.message : `The server answered with status ${response.status}.`;
  return new ApiFailure(response.status, message, told?.code ?? null);
}

/** The model: `{id, meta}`; `meta` is absent while the model is being loaded. */
export async function servedModel() {
  return (await (await request("v1/models")).json()).data[0];
}

/** `{status, reason, progress}` of the server, also while it cannot answer. */
export async function health() {
  try {
    return await (await fetch("health", { cache: "no-store" })).json();
  } catch {
    return { status: "unreachable", reason: "The server cannot be reached. Is it still running?" };
  }
}

/** The objects of a streamed answer, as they come. Throws ApiFailure, and AbortError when `signal` ends it. */
export async function* chat(body, signal) {
  const asked = { ...body, stream: true, stream_options: { include_usage: true } };
  const response = await request("v1/chat/completions", { method: "POST", body: JSON.stringify(asked), signal });
  let isComplete = false;
  try {
    for await (const data of eventsOf(response.body)) {
      if (data === "[DONE]") {
        isComplete = true;
        continue;
      }
      const object = JSON.parse(data);
      if (object.error) throw new ApiFailure(response.status, object.error.message, object.error.code ?? null);
      yield object;
    }
  } catch (error) {
    if (error instanceof ApiFailure || error.name === "AbortError") throw error;
    throw new ApiFailure(0, "The connection broke off before the answer was complete.");
  }
  if (!isComplete) throw new ApiFailure(0, "The connection ended before the answer was complete.");
}

/** The data of each server-sent event of a body. */
export async function* eventsOf(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const events = (rest + value).replaceAll("\r\n", "\n").split("\n\n");
      rest = events.pop();
      for (const event of events) {
        const lines = event.split("\n").filter((line) => line.startsWith("data:"));
        if (lines.length) yield lines.map((line) => line.slice(5).trimStart()).join("\n");
      }
    }
  } finally {
    await reader.cancel().catch(() => {});
  }
}
