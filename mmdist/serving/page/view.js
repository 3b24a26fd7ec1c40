// What is shown. Words of people and models only ever become text nodes.

import { describe } from "./chat.js";
import { isVideo } from "./media.js";

export const find = (id) => document.getElementById(id);
const fromTemplate = (id) => find(id).content.firstElementChild.cloneNode(true);
const SHOW_MORE_PX = 80; // nearer to the end than this, the view follows an answer

// A thumbnail; its address is freed with it. onRemove: none where it can no longer be taken away.
export function mediumItem(medium, onRemove) {
  const item = fromTemplate("medium");
  const [show, remove] = item.querySelectorAll("button");
  const thumbnail = document.createElement(isVideo(medium) ? "video" : "img");
  thumbnail.src = URL.createObjectURL(medium.blob);
  if (isVideo(medium)) Object.assign(thumbnail, { muted: true, preload: "metadata" });
  else thumbnail.alt = medium.name;
  show.append(thumbnail);
  show.setAttribute("aria-label", `${medium.name}: show it large`);
  show.disabled = isVideo(medium);
  show.addEventListener("click", () => showLarge(thumbnail));
  remove.hidden = !onRemove;
  remove.setAttribute("aria-label", `Remove ${medium.name}`);
  remove.addEventListener("click", () => onRemove());
  return item;
}

function showLarge(thumbnail) {
  const picture = find("large-picture");
  picture.src = thumbnail.src;
  picture.alt = thumbnail.alt;
  find("large").showModal();
}

export function clear(parent) {
  for (const shown of parent.querySelectorAll("img, video")) URL.revokeObjectURL(shown.src);
  parent.replaceChildren();
}

export function userMessage(message) {
  const article = fromTemplate("user-message");
  article.querySelector(".text").textContent = message.text;
  article.querySelector(".media").append(...message.media.map((medium) => mediumItem(medium)));
  return article;
}

// An answer's place: grown(delta) while it comes, settled() when it has ended, isLast(yes) for what can be done to it.
export class AnswerView {
  constructor(answer, { onAgain, onUnlock, onCopied }) {
    this.answer = answer;
    this.article = fromTemplate("answer");
    this.part = (name) => this.article.querySelector(name);
    this.text = this.part(".text").appendChild(document.createTextNode(answer.text));
    this.part(".again").addEventListener("click", onAgain);
    this.part(".unlock").addEventListener("click", onUnlock);
    this.part(".copy").addEventListener("click", () => this.copy(onCopied));
  }

  grown(delta) {
    this.text.appendData(delta);
    this.part(".figures").textContent = describe(this.answer);
  }

  settled() {
    const { text, state, error, status } = this.answer;
    const running = state === "running";
    this.text.data = text;
    this.article.classList.toggle("running", running);
    this.article.setAttribute("aria-busy", String(running));
    this.part(".problem").hidden = !error;
    this.part(".problem").textContent = error ?? "";
    this.part(".figures").textContent = describe(this.answer);
    this.part(".copy").hidden = running || !text;
    this.part(".unlock").hidden = status !== 401;
    this.part(".again").textContent = state === "done" || state === "stopped" ? "Regenerate" : "Try again";
  }

  isLast(yes) {
    this.part(".again").hidden = !yes || this.answer.state === "running";
  }

  async copy(onCopied) {
    try {
      await navigator.clipboard.writeText(this.answer.text);
    } catch {
      selectText(this.part(".text")); // no clipboard without https: Ctrl-C then copies
    }
    onCopied();
  }
}

function selectText(element) {
  const range = document.createRange();
  range.selectNodeContents(element);
  getSelection().removeAllRanges();
  getSelection().addRange(range);
  document.execCommand("copy");
}

export function chatItem({ id, title }, isCurrent, onOpen, onDelete) {
  const item = fromTemplate("chat");
  const [open, remove] = item.querySelectorAll("button");
  open.textContent = title;
  if (isCurrent) open.setAttribute("aria-current", "page");
  open.addEventListener("click", () => onOpen(id));
  remove.setAttribute("aria-label", `Delete the chat: ${title}`);
  remove.addEventListener("click", () => onDelete(id, title));
  return item;
}

// Follow the end of the conversation, unless the reader has scrolled up.
export function follower(scroller) {
  let follows = true;
  scroller.addEventListener("scroll", () => {
    follows = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < SHOW_MORE_PX;
  });
  return (always = false) => {
    follows ||= always;
    if (follows) scroller.scrollTop = scroller.scrollHeight;
  };
}
