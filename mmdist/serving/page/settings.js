// Settings: kept in this browser, the API key in this tab only.

import { find } from "./view.js";

const KEPT = { maxTokens: ["max-tokens", 512], temperature: ["temperature", 0] };
const KEY = "mmdist.key";

export function readSettings() {
  const settings = { key: sessionStorage.getItem(KEY) ?? "" };
  for (const [name, [, fallback]] of Object.entries(KEPT)) {
    settings[name] = Number(localStorage.getItem(`mmdist.${name}`) ?? fallback);
  }
  return settings;
}

// -> open(focused): shows the dialog, with the focus in that field.
export function wireSettings() {
  const dialog = find("settings");
  dialog.addEventListener("close", () => {
    if (dialog.returnValue !== "save") return;
    sessionStorage.setItem(KEY, find("key").value.trim());
    for (const [name, [id]] of Object.entries(KEPT)) localStorage.setItem(`mmdist.${name}`, find(id).value);
  });
  return (focused = "max-tokens") => {
    const settings = readSettings();
    find("key").value = settings.key;
    for (const [name, [id]] of Object.entries(KEPT)) find(id).value = settings[name];
    dialog.returnValue = "";
    dialog.showModal();
    find(focused).select();
  };
}
