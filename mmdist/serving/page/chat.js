// A conversation: what is sent of it, and an answer's way from the first token to the last.

import { ServerError, streamAnswer } from "./api.js";
import { asPart, megabytes } from "./media.js";

const TITLE_LENGTH = 60;
const SHORT_MS = 10; // less than this says more of the network than of the model

export const newChat = () => ({ id: crypto.randomUUID?.() ?? `${Date.now()}-${Math.random()}`, title: "", updated: 0, messages: [] });

export function titleOf(chat) {
  const first = chat.messages.find((message) => message.role === "user");
  const title = first?.text || first?.media[0]?.name || "New chat";
  return title.length > TITLE_LENGTH ? `${title.slice(0, TITLE_LENGTH - 1)}…` : title;
}

// Questions that were answered, and the last one; of a model without conversations the last one alone.
export function turns(messages, singleTurn) {
  const kept = [];
  for (const [index, message] of messages.entries()) {
    if (message.role === "user" && messages[index + 1]?.text) kept.push(message, messages[index + 1]);
  }
  const last = messages.findLast((message) => message.role === "user");
  const before = kept.filter((message) => message !== last && messages.indexOf(message) < messages.indexOf(last));
  return singleTurn ? [last] : [...before, last];
}

async function content(message) {
  const media = await Promise.all(message.media.map(asPart));
  return media.length ? [...media, { type: "text", text: message.text }] : message.text;
}

async function requestBody(messages, config, settings) {
  const sent = turns(messages, config.single_turn);
  const count = sent.reduce((sum, message) => sum + (message.media?.length ?? 0), 0);
  if (count > config.max_pictures) {
    throw new ServerError(`This chat has ${count} pictures; the server takes ${config.max_pictures}. Start a new chat.`, 413);
  }
  const body = {
    model: config.model,
    messages: [],
    max_tokens: settings.maxTokens,
    temperature: settings.temperature,
    stream: true,
    stream_options: { include_usage: true, continuous_usage_stats: true },
  };
  for (const message of sent) {
    body.messages.push({ role: message.role, content: message.role === "user" ? await content(message) : message.text });
  }
  const size = JSON.stringify(body).length;
  if (size > config.max_body_bytes) {
    throw new ServerError(`This chat's pictures come to ${megabytes(size)}; the server takes ${megabytes(config.max_body_bytes)}. Start a new chat.`, 413);
  }
  return body;
}

// Fills `answer`, the last of the chat's messages; grown(delta) after each piece. Never throws.
export async function fill(answer, chat, config, settings, signal, grown) {
  Object.assign(answer, { text: "", state: "running", error: null, status: null, figures: {} });
  const clock = { start: performance.now(), first: 0, firstTokens: 0 };
  try {
    const body = await requestBody(chat.messages, config, settings);
    for await (const { chunk, arrived } of streamAnswer(body, settings.key, signal)) {
      const choice = chunk.choices[0];
      const delta = choice?.delta?.content ?? "";
      answer.text += delta;
      measure(answer.figures, clock, arrived, delta, chunk.usage?.completion_tokens);
      if (choice?.finish_reason) answer.figures.finish = choice.finish_reason;
      grown(delta);
    }
    answer.state = "done";
  } catch (error) {
    if (error.name === "AbortError") answer.state = "stopped";
    else Object.assign(answer, { state: "failed", error: error.message, status: error.status ?? null });
  }
  answer.figures.limit = settings.maxTokens;
}

// figures.first: seconds to the first token. figures.rate: tokens a second after what arrived with it.
function measure(figures, clock, arrived, delta, tokens) {
  if (tokens !== undefined) figures.tokens = tokens;
  if (!delta) return;
  clock.first ||= arrived;
  if (arrived === clock.first) clock.firstTokens = figures.tokens;
  const elapsed = arrived - clock.first;
  figures.first = (clock.first - clock.start) / 1000;
  if (elapsed > SHORT_MS) figures.rate = ((figures.tokens - clock.firstTokens) * 1000) / elapsed;
}

const ENDS = { abort: "ended by the server", timeout: "out of time" };

export function describe(answer) {
  const { tokens, rate, first, finish, limit } = answer.figures ?? {};
  const words = [];
  if (tokens) words.push(`${tokens}\u00a0${tokens === 1 ? "token" : "tokens"}`);
  if (rate) words.push(`${rate.toFixed(rate < 100 ? 1 : 0)}\u00a0tokens/s`);
  if (first) words.push(`first token ${first.toFixed(2)}\u00a0s`);
  if (answer.state === "stopped") words.push("stopped");
  if (finish === "length") words.push(tokens === limit ? "cut at the most tokens (settings)" : "cut: the model takes no more");
  if (ENDS[finish]) words.push(ENDS[finish]);
  return words.join(" · ");
}
