// Chats in the browser: IndexedDB, which takes pictures as they are.

function promise(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

let opened;

function database() {
  opened ??= new Promise((resolve, reject) => {
    const request = indexedDB.open("mmdist", 1);
    request.onupgradeneeded = () => request.result.createObjectStore("chats", { keyPath: "id" });
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
  return opened;
}

const chats = async (mode) => (await database()).transaction("chats", mode).objectStore("chats");

export const saveChat = async (chat) => promise((await chats("readwrite")).put(chat));
export const deleteChat = async (id) => promise((await chats("readwrite")).delete(id));
export const loadChat = async (id) => promise((await chats("readonly")).get(id));

// The newest first; without their messages.
export async function listChats() {
  const all = await promise((await chats("readonly")).getAll());
  return all.map(({ id, title, updated }) => ({ id, title, updated })).sort((a, b) => b.updated - a.updated);
}
