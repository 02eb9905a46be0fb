// The server's public interface; everything the page does goes through it.
import { ask } from "./dom.js";

/** An error of the server: `message` is a sentence for the user, `field` the field it belongs to. */
export class Problem extends Error {
  constructor(body) {
    super(body.detail ?? "Something went wrong on the server.");
    this.code = body.code;
    this.field = body.field;
  }
}

/** Ask the server. `fields` (FormData) is sent as multipart, `json` as JSON; the answer is parsed JSON or null. */
export async function api(path, { method, fields, json, headers = {} } = {}) {
  const body = fields ?? (json && JSON.stringify(json));
  if (json) headers = { ...headers, "Content-Type": "application/json" };
  let answer;
  try {
    answer = await fetch(path, { method: method ?? (body ? "POST" : "GET"), body, headers });
  } catch {
    throw new Problem({ code: "offline", detail: "The server does not answer. Check that it is running, then try again." });
  }
  if (answer.ok) return answer.status === 204 ? null : answer.json();
  const problem = new Problem(await answer.json().catch(() => ({})));
  if (answer.status === 401 && path !== "/v1/session") {
    await session();
    return api(path, { method, fields, json, headers });
  }
  throw problem;
}

/** Get the cookie that owns this browser's files; asks for the token where the server wants one. */
export async function session() {
  for (let headers = {}, wrong = ""; ;) {
    try {
      return await api("/v1/session", { method: "POST", headers });
    } catch (problem) {
      if (!problem.code?.startsWith("token_")) throw problem;
      const token = await ask(`${wrong}This server asks for its token. Whoever started it knows it.`, "Go on", true);
      if (token === null) throw problem;
      headers = { Authorization: `Bearer ${token}` };
      wrong = "That was not the right token. ";
    }
  }
}

/** Form fields from an object; undefined and null are left out. */
export function form(values) {
  const made = new FormData();
  for (const [name, value] of Object.entries(values)) {
    if (value !== undefined && value !== null) made.append(name, value);
  }
  return made;
}

/** Follow a video until it ends; `seen` gets every newer state of it. Returns a function that stops following. */
export function follow(id, seen) {
  const events = new EventSource(`/v1/videos/${id}/events`);
  let open = true;
  const stop = () => { open = false; events.close(); };
  for (const name of ["progress", "completed", "failed", "cancelled"]) {
    events.addEventListener(name, (event) => {
      if (!open) return;
      if (name !== "progress") stop();
      seen(JSON.parse(event.data));
    });
  }
  events.addEventListener("error", async () => {
    // The browser connects again by itself, unless the server refused: the video may be gone.
    if (!open || events.readyState !== EventSource.CLOSED) return;
    stop();
    seen(await api(`/v1/videos/${id}`).catch((problem) => ({ id, status: "failed", samples: [], error: problem })));
  });
  return stop;
}
