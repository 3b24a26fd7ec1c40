// Wires the page: questions, answers, history, settings.

import { UNREACHABLE, loadConfig } from "./api.js";
import { describe, fill, newChat, titleOf } from "./chat.js";
import { acceptedTypes, readMedium } from "./media.js";
import { readSettings, wireSettings } from "./settings.js";
import { deleteChat, listChats, loadChat, saveChat } from "./store.js";
import { AnswerView, chatItem, clear, find, follower, mediumItem, userMessage } from "./view.js";

const SAVE_MS = 1000;
const RETRY_MS = 3000;
const OPEN_CHAT = "mmdist.chat";
const isPhone = matchMedia("(max-width: 50rem)");
const hasFinePointer = matchMedia("(pointer: fine)");

let config = null;
let chat = newChat();
let attached = [];
let running = null; // the AbortController of the answer that comes
let views = [];
let retry = 0;
let keepsHistory = true;
const follow = follower(find("scroller"));
const openSettings = wireSettings();

const say = (words) => { find("said").textContent = words; };

function showProblem(words) {
  find("problem").textContent = words ?? "";
  find("problem").hidden = !words;
}

// --- the server

async function connect() {
  clearTimeout(retry);
  try {
    config = await loadConfig();
  } catch (error) {
    find("state").textContent = error.message;
    retry = setTimeout(connect, RETRY_MS);
    return;
  }
  find("state").textContent = "";
  document.title = find("model").textContent = config.model;
  find("files").accept = acceptedTypes(config).join(",");
  const media = config.takes_video ? "a picture or video" : "a picture";
  find("attach").setAttribute("aria-label", `Add ${media}`);
  find("ask-about").textContent = `Ask about ${media}`;
  find("question").placeholder = config.example_prompt ?? "Ask something";
  find("hint").textContent = config.single_turn ? "This model has no conversation: each question stands alone, with its own picture." : "";
  find("example").hidden = !config.example;
  showButtons();
}

// --- the conversation

function showChat() {
  clear(find("messages"));
  views = [];
  for (const message of chat.messages) show(message);
  showButtons();
  follow(true);
}

function show(message) {
  if (message.role === "user") {
    find("messages").append(userMessage(message));
    return null;
  }
  const view = new AnswerView(message, {
    onAgain: () => config && run(view),
    onUnlock: () => openSettings("key"),
    onCopied: () => say("Copied"),
  });
  views.push(view);
  find("messages").append(view.article);
  view.settled();
  return view;
}

function showButtons() {
  find("empty").hidden = chat.messages.length > 0;
  find("stop").hidden = !running;
  find("send").hidden = Boolean(running);
  for (const view of views) view.isLast(view === views.at(-1) && !running);
}

async function ask() {
  const text = find("question").value.trim();
  if (running || (!text && !attached.length)) return;
  if (!config) return showProblem(UNREACHABLE);
  if (!text) return showProblem("Ask something about it.");
  showProblem(null);
  const question = { role: "user", text, media: attached };
  const answer = { role: "assistant", text: "", state: "running", figures: {} };
  chat.messages.push(question, answer);
  find("question").value = "";
  fitQuestion();
  if (!config.single_turn) setAttached([]); // without a conversation, the next question may be about the same picture
  show(question);
  await run(show(answer));
}

async function run(view) {
  const controller = running = new AbortController();
  const { answer } = view;
  const mine = chat;
  const filled = fill(answer, mine, config, readSettings(), controller.signal, (delta) => {
    view.grown(delta);
    follow();
  });
  view.settled();
  showButtons();
  follow(true);
  focusQuestion();
  await save(mine);
  const saving = setInterval(() => persist(mine), SAVE_MS);
  await filled;
  clearInterval(saving);
  if (running === controller) running = null;
  view.settled();
  showButtons();
  follow();
  say(answer.error ?? (describe(answer) || "No answer"));
  await save(mine);
  if (answer.status === 0) connect();
}

function stop() {
  running?.abort();
  focusQuestion();
}

// Not where it would bring up a keyboard on the screen.
function focusQuestion() {
  if (hasFinePointer.matches) find("question").focus();
}

// --- history

async function save(saved) {
  await persist(saved);
  await showHistory();
}

async function persist(saved) {
  Object.assign(saved, { title: titleOf(saved), updated: Date.now() });
  try {
    await saveChat(saved);
    if (saved === chat) localStorage.setItem(OPEN_CHAT, saved.id);
  } catch {
    keepsHistory = false;
  }
}

async function showHistory() {
  let entries = [];
  try {
    entries = keepsHistory ? await listChats() : [];
  } catch {
    keepsHistory = false;
  }
  find("no-history").hidden = keepsHistory;
  const shown = entries.map(({ id, title }) => `${id} ${title} ${id === chat.id}`).join("\n");
  if (find("chats").dataset.shown === shown) return; // focus stays where it is
  find("chats").dataset.shown = shown;
  find("chats").replaceChildren(...entries.map((entry) => chatItem(entry, entry.id === chat.id, openChat, forget)));
}

async function openChat(id) {
  if (id === chat.id) return showSide(false);
  const found = await loadChat(id);
  if (!found) return;
  for (const message of found.messages) {
    if (message.state === "running") Object.assign(message, { state: "failed", error: "This answer was interrupted." });
  }
  switchTo(found);
  localStorage.setItem(OPEN_CHAT, id);
}

function switchTo(other) {
  running?.abort();
  running = null;
  chat = other;
  setAttached([]);
  showProblem(null);
  showChat();
  showSide(false);
  showHistory();
  focusQuestion();
}

async function forget(id, title) {
  if (!confirm(`Delete the chat "${title}"?`)) return;
  if (id === chat.id) switchTo(newChat());
  await deleteChat(id);
  await showHistory();
  say("Deleted");
}

// --- pictures

function setAttached(media) {
  attached = media;
  clear(find("attached"));
  find("attached").append(...media.map((medium) => mediumItem(medium, () => {
    setAttached(attached.filter((other) => other !== medium));
    focusQuestion();
  })));
}

async function attach(files) {
  showProblem(null);
  if (!config) return showProblem(UNREACHABLE);
  const problems = [];
  for (const file of files) {
    try {
      const medium = await readMedium(file, config);
      if (config.single_turn) setAttached([medium]);
      else if (attached.length < config.max_pictures) setAttached([...attached, medium]);
      else throw new Error(`${medium.name}: at most ${config.max_pictures} pictures to a question.`);
      say(`Attached ${medium.name}`);
    } catch (error) {
      problems.push(error.message);
    }
  }
  showProblem(problems.join(" "));
  focusQuestion();
}

async function tryExample() {
  const blob = await (await fetch("page/example")).blob();
  await attach([new File([blob], "example.png", { type: blob.type })]);
  find("question").value = config.example_prompt ?? "";
  fitQuestion();
}

// --- the rest of the page

function fitQuestion() {
  const question = find("question");
  question.style.height = "auto";
  question.style.height = `${question.scrollHeight}px`;
}

function showSide(yes) {
  document.body.classList.toggle("side", yes);
  find("shade").hidden = !yes;
  find("main").inert = yes && isPhone.matches;
  find("side-open").setAttribute("aria-expanded", String(yes));
  if (yes) find("new").focus();
}

function wire() {
  find("composer").addEventListener("submit", (event) => { event.preventDefault(); ask(); });
  find("question").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing || !hasFinePointer.matches) return;
    event.preventDefault();
    ask();
  });
  find("question").addEventListener("input", fitQuestion);
  find("stop").addEventListener("click", stop);
  find("new").addEventListener("click", () => { localStorage.removeItem(OPEN_CHAT); switchTo(newChat()); });
  find("settings-open").addEventListener("click", () => openSettings());
  find("side-open").addEventListener("click", () => showSide(true));
  for (const name of ["side-close", "shade"]) {
    find(name).addEventListener("click", () => { showSide(false); find("side-open").focus(); });
  }
  find("attach").addEventListener("click", () => find("files").click());
  find("files").addEventListener("change", () => { attach([...find("files").files]); find("files").value = ""; });
  find("example").addEventListener("click", tryExample);
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || document.querySelector("dialog[open]")) return;
    if (document.body.classList.contains("side")) find("side-close").click();
    else if (running) stop();
  });
  isPhone.addEventListener("change", () => showSide(false));
  wireDrops();
}

function wireDrops() {
  const filesOf = (transfer) => [...(transfer?.files ?? [])];
  const carriesFiles = (event) => event.dataTransfer?.types.includes("Files");
  document.addEventListener("paste", (event) => {
    const files = filesOf(event.clipboardData);
    if (!files.length || event.clipboardData.getData("text/plain")) return; // office programs send a picture of a text
    event.preventDefault();
    attach(files);
  });
  document.addEventListener("dragover", (event) => {
    if (!carriesFiles(event)) return;
    event.preventDefault();
    find("drop").hidden = false;
  });
  document.addEventListener("dragleave", (event) => { if (!event.relatedTarget) find("drop").hidden = true; });
  document.addEventListener("drop", (event) => {
    find("drop").hidden = true;
    if (!carriesFiles(event)) return;
    event.preventDefault();
    attach(filesOf(event.dataTransfer));
  });
}

wire();
connect();
const last = localStorage.getItem(OPEN_CHAT);
showChat();
if (last) await openChat(last).catch(() => {});
await showHistory();
focusQuestion();
