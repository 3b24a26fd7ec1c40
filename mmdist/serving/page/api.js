// The server's side: its settings, and answers as they come (OpenAI's format, server-sent events).

export class ServerError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

export const UNREACHABLE = "The server does not answer.";

async function ask(path, options) {
  try {
    return await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError(UNREACHABLE, 0);
  }
}

export async function loadConfig() {
  const response = await ask("page/config", { cache: "no-store" });
  if (!response.ok) throw new ServerError(await errorText(response), response.status);
  return response.json();
}

async function errorText(response) {
  const text = await response.text();
  try {
    const { error } = JSON.parse(text);
    return error.message ?? error;
  } catch {
    return text.slice(0, 300) || `The server answered with status ${response.status}.`;
  }
}

// body: of /v1/chat/completions. Yields each chunk and when it arrived (ms; several may arrive as one); throws a ServerError, or an AbortError after signal.
export async function* streamAnswer(body, key, signal) {
  const headers = { "Content-Type": "application/json" };
  if (key) headers.Authorization = `Bearer ${key}`;
  const response = await ask("v1/chat/completions", { method: "POST", headers, body: JSON.stringify(body), signal });
  if (!response.ok) {
    const busy = response.status === 429 ? "The server is busy: " : "";
    throw new ServerError(busy + (await errorText(response)), response.status);
  }
  for await (const { data, arrived } of events(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ServerError(chunk.error.message ?? String(chunk.error), 500);
    yield { chunk, arrived };
  }
  throw new ServerError("The connection ended before the answer did.", 0);
}

async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const arrived = performance.now();
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines) {
        if (line.startsWith("data:")) yield { data: line.slice(5).trim(), arrived };
      }
    }
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The connection broke.", 0);
  } finally {
    reader.cancel().catch(() => {});
  }
}
