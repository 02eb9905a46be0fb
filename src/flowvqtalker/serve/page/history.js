// Earlier videos of this browser: only their ids and a line of text are kept here, the files on the server.
import { api } from "./api.js";
import { $, ask, el, show } from "./dom.js";
import { watch } from "./result.js";

const KEY = "flowvqtalker-videos";
const MOST = 24;

function read() {
  try { return JSON.parse(localStorage.getItem(KEY)) ?? []; } catch { return []; }
}
function write(list) {
  // A browser that stores nothing only lacks the list.
  try { localStorage.setItem(KEY, JSON.stringify(list.slice(0, MOST))); } catch { /* private window */ }
}

/** Add a video, or what is new of it. `title` says what it shows, where that is known. */
export function remember({ id, created_at: made, status, samples = [] }, title) {
  if (!made) return;
  const list = read();
  const at = list.findIndex((one) => one.id === id);
  const entry = { id, made, status, title: title ?? list[at]?.title ?? "video", first: samples.find((one) => one.ready)?.index };
  if (at < 0) list.unshift(entry); else list[at] = entry;
  write(list);
  render();
}

/** Show the list; videos that the server no longer has leave it. Returns one that is still being made, or null. */
export async function restore() {
  render();
  const found = await Promise.all(read().map(({ id }) => api(`/v1/videos/${id}`).catch((problem) => problem)));
  const kept = read().filter((_, index) => found[index]?.code !== "not_found");
  write(kept);
  found.filter((one) => one.id).reverse().forEach((one) => remember(one));
  render();
  return found.find((one) => one.status === "queued" || one.status === "in_progress") ?? null;
}

let shown = "";

function render() {
  const list = read();
  if (JSON.stringify(list) === shown) return; // entries that stay keep the focus, and take the click that is under way
  shown = JSON.stringify(list);
  show("history-box", list.length > 0);
  $("history-note").textContent = "Known to this browser only.";
  $("history").replaceChildren(...list.map(({ id, made, status, title, first }) => {
    const when = new Date(1000 * made).toLocaleString([], { dateStyle: "medium", timeStyle: "short" });
    const text = { completed: when, failed: "failed", cancelled: "cancelled" }[status] ?? "in the making";
    const picture = first
      ? el("video", { src: `/v1/videos/${id}/content?sample=${first}#t=0.1`, preload: "metadata", muted: true, tabIndex: -1 })
      : el("span", { className: "blank" });
    const open = el("button", { type: "button", className: "earlier" }, picture, el("span", {}, title, el("small", {}, text)));
    open.addEventListener("click", async () => {
      try { watch(await api(`/v1/videos/${id}`)); $("result").scrollIntoView({ behavior: "smooth", block: "nearest" }); } catch { restore(); }
    });
    const remove = el("button", { type: "button", className: "remove" }, "×");
    remove.setAttribute("aria-label", `Delete the video ${title} of ${when}`);
    remove.addEventListener("click", async () => { if (await ask("Delete this video from the server?", "Delete it")) forget([id]); });
    return el("li", {}, open, remove);
  }));
}

async function forget(ids) {
  await Promise.all(ids.map((id) => api(`/v1/videos/${id}`, { method: "DELETE" }).catch(() => null)));
  write(read().filter(({ id }) => !ids.includes(id)));
  render();
}

export function setUp() {
  $("forget").addEventListener("click", async () => {
    if (await ask("Delete all these videos, here and on the server?", "Delete all")) forget(read().map(({ id }) => id));
  });
}
