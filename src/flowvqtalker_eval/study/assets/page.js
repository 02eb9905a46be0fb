"use strict";
// The page of a blind study. Everything stays in this browser until the participant downloads or sends the answers.
(() => {
  const study = JSON.parse(document.getElementById("study").textContent);
  const $ = (id) => document.getElementById(id);
  const FORMAT = "flowvqtalker-study-answers/1";
  const CODE = /^[A-Za-z0-9_-]{1,40}$/;
  const COLUMNS = ["clip", "position", "lip_sync", "quality", "emotion", "seconds", "plays", "revision", "problem", "answered"];

  const QUESTIONS = [
    {
      name: "lip_sync", title: "How well do the lips fit the speech?", short: "lips and speech", asked: study.speech,
      intro: "how well the lips fit the speech, from 1 (worst) to 5 (best)",
      options: [
        [5, "Excellent", "the lips always fit"], [4, "Good", "small slips, if you look for them"],
        [3, "Fair", "they are a little off, you notice it"], [2, "Poor", "they are often wrong"],
        [1, "Bad", "lips and speech do not belong together"],
      ],
    },
    {
      name: "quality", title: "How good is the image?", short: "image quality", asked: true,
      intro: "how good the image is, from 1 (worst) to 5 (best), whatever you think of the lips",
      options: [
        [5, "Excellent", "like a sharp recording"], [4, "Good", "small flaws that do not disturb"],
        [3, "Fair", "blur or flaws that disturb slightly"], [2, "Poor", "blur or flaws that disturb"],
        [1, "Bad", "blur or flaws that disturb very much"],
      ],
    },
    {
      name: "emotion", title: "Which emotion does the person show?", short: "emotion", asked: true, two: true,
      intro: "which of eight emotions the person shows; if you are unsure, the nearest",
      options: study.emotions.map(([name, label]) => [name, label, ""]),
    },
  ].filter((question) => question.asked);

  // ---- storage -----------------------------------------------------------------------------------------------------
  const memory = new Map();
  const prefix = `flowvqtalker-study:${study.study}:`;
  function stored(name) {
    try { return localStorage.getItem(prefix + name); } catch { return memory.get(name) ?? null; }
  }
  function store(name, value) {
    try {
      if (value === null) localStorage.removeItem(prefix + name); else localStorage.setItem(prefix + name, value);
    } catch {
      if (value === null) memory.delete(name); else memory.set(name, value);
      $("storage-warning").textContent = "This browser does not let the page keep your answers: please do not close or "
        + "reload it before the end.";
    }
  }

  // ---- state -------------------------------------------------------------------------------------------------------
  let session = null; // what is kept: see begin()
  let place = 0; // index in the order; -1 is the practice clip
  let shownAt = 0; // when the clip was shown
  let plays = 0; // complete plays since then
  let dirty = false; // answers on the form that are not saved
  let served = false;

  const order = () => study.plan[session.row].map((index) => study.clips[index]);
  const clip = () => (place < 0 ? study.practice : order()[place]);
  const done = () => order().filter((id) => session.answers[id]).length;
  const keep = () => { store("rater:" + session.rater, JSON.stringify(session)); store("current", session.rater); };

  // Numbered codes (P1, P2, ...) take the orders one after another; other codes are spread over them by a hash (FNV-1a).
  function rowOf(code) {
    const number = /(\d+)$/.exec(code);
    if (number) return (Number(number[1].slice(-9)) + study.plan.length - 1) % study.plan.length;
    let hash = 0x811c9dc5;
    for (const letter of code) hash = Math.imul(hash ^ letter.codePointAt(0), 0x01000193) >>> 0;
    return hash % study.plan.length;
  }
  const random = (length) => Array.from(crypto.getRandomValues(new Uint8Array(length)),
    (byte) => "abcdefghjkmnpqrstuvwxyz"[byte % 23]).join("");

  function load(code) {
    try {
      const found = JSON.parse(stored("rater:" + code));
      return found && found.format === FORMAT && found.study === study.study ? found : null;
    } catch { return null; }
  }
  function begin(code) {
    session = load(code) ?? {
      format: FORMAT, study: study.study, rater: code, session: random(16), row: rowOf(code),
      started: new Date().toISOString(), finished: null, sent: null, practised: false, comment: "",
      window: [innerWidth, innerHeight], drafts: {}, answers: {},
    };
    keep();
  }

  // ---- screens -----------------------------------------------------------------------------------------------------
  function show(name) {
    for (const screen of ["intro", "clip", "end"]) $("screen-" + screen).hidden = screen !== name;
    $("progress").hidden = name === "intro" || (name === "clip" && place < 0);
    if (name !== "clip") { $("video").removeAttribute("src"); $("video").load(); }
    scrollTo(0, 0);
  }
  function progress() {
    const total = order().length;
    $("progress-text").textContent = `${done()} of ${total} clips rated`;
    $("progress-bar").value = done() / total;
  }

  function intro() {
    const fresh = !session;
    $("return").hidden = fresh;
    $("consent").hidden = !fresh;
    if (session) {
      $("return-text").textContent = session.sent
        ? `Your answers (code ${session.rater}) have been sent. Thank you!`
        : `You have rated ${done()} of ${order().length} clips as ${session.rater}. Your answers are kept on this device.`;
      $("resume").textContent = session.sent ? "Show the last page" : "Go on where I stopped";
    } else {
      $("code").value = new URLSearchParams(location.search).get("rater") ?? "anon-" + random(8);
    }
    show("intro");
  }

  function go() { // to where the participant is
    if (!session.practised) return open(-1);
    const first = order().findIndex((id) => !session.answers[id]);
    return first < 0 ? end() : open(first);
  }

  function open(index) {
    place = index;
    const known = place < 0 ? null : session.answers[clip()];
    const draft = session.drafts[clip()];
    show("clip");
    $("clip-title").textContent = place < 0 ? "Practice" : `Clip ${place + 1} of ${order().length}`;
    $("practice-note").hidden = place >= 0;
    $("seen-note").hidden = !known;
    $("back").hidden = place <= 0;
    $("missing").textContent = "";
    $("who").textContent = `Participant ${session.rater}.`;
    $("broken").hidden = place < 0;
    $("answers").reset();
    for (const question of QUESTIONS) {
      const value = (draft ?? known ?? {})[question.name];
      if (value) $(`${question.name}-${value}`).checked = true;
    }
    plays = draft ? draft.plays : 0;
    dirty = Boolean(draft);
    shownAt = performance.now();
    const video = $("video");
    video.src = `clips/${clip()}.mp4`;
    $("cover").hidden = false;
    enable();
    if (place >= 0) progress();
    if (place + 1 < order().length) ahead(order()[place + 1]);
    $("play").focus({ preventScroll: true });
  }
  let coming = null; // the clip after this one, so that it starts at once
  function ahead(id) {
    coming = document.createElement("video");
    coming.preload = "auto";
    coming.muted = true;
    coming.src = `clips/${id}.mp4`;
  }

  function enable() {
    const answered = place >= 0 && session.answers[clip()];
    const open = Boolean(plays || (answered && !answered.problem));
    for (const field of document.querySelectorAll("#questions fieldset")) field.disabled = !open;
    const video = $("video");
    const running = !video.paused && !video.ended;
    $("play").textContent = running ? "Pause" : video.currentTime > 0 && !video.ended ? "Go on"
      : plays || answered ? "Play again" : "Play the clip";
    $("hint").textContent = answered && answered.problem && !dirty ? "You told us that this clip does not play."
      : open ? (running ? "" : "You can play it as often as you like.") : "Watch the clip to its end, then answer.";
    $("next").textContent = answered && dirty ? "Save the change" : "Next";
  }

  function end() {
    show("end");
    progress();
    if (!session.finished) { session.finished = new Date().toISOString(); keep(); }
    $("remark").value = session.comment;
    const sent = Boolean(session.sent);
    $("end-title").textContent = sent ? "Thank you! Your answers have arrived." : "That was the last clip. Thank you!";
    $("remark-box").hidden = sent;
    $("send-box").hidden = sent || !served;
    $("review-offline").hidden = sent || served;
    $("send-state").textContent = sent ? "You can close this page." : "";
    $("save-text").textContent = sent ? "If you want, keep a copy:"
      : served ? "You can also keep a copy:"
        : "Please download your answers and send the file to the person who invited you" + (study.contact ? ` (${study.contact}).` : ".");
    $("save-json").classList.toggle("primary", !served && !sent);
    $("end-title").focus({ preventScroll: true });
  }

  // ---- questions ---------------------------------------------------------------------------------------------------
  function element(tag, properties = {}, ...children) {
    const made = Object.assign(document.createElement(tag), properties);
    made.append(...children);
    return made;
  }
  function build() {
    for (const question of QUESTIONS) {
      const options = element("div", { className: question.two ? "options two" : "options" });
      for (const [value, word, why] of question.options) {
        const input = element("input", { type: "radio", name: question.name, id: `${question.name}-${value}`, value, required: true });
        const text = element("span", { className: why ? "scale" : "" });
        if (why) text.append(element("b", {}, `${value} ${word}`), element("span", { className: "why" }, why));
        else text.append(word);
        options.append(element("label", {}, input, text));
      }
      $("questions").append(element("fieldset", { id: "field-" + question.name }, element("legend", {}, question.title), options));
      $("asked").append(element("li", {}, question.intro + (question === QUESTIONS[QUESTIONS.length - 1] ? "." : ";")));
    }
    const clips = study.plan[0].length;
    $("count").textContent = clips;
    $("minutes").textContent = Math.max(1, Math.round((clips * (study.seconds + 12)) / 60));
    $("advice").textContent = (study.speech ? "Use headphones if you can, in a quiet place. " : "")
      + "A large screen is better than a small one; sit as you usually do.";
    $("leaving").textContent = "close the page, and nothing is sent. You can also delete your answers from this device.";
    if (study.contact) { $("contact").hidden = false; $("contact-text").textContent = study.contact; }
    $("attention").hidden = !study.checks;
    const wide = study.shape > 1.2;
    document.querySelector(".screen").classList.toggle("wide", wide);
  }
  const value = (name) => new FormData($("answers")).get(name);
  function values() {
    return {
      lip_sync: study.speech && value("lip_sync") ? Number(value("lip_sync")) : null,
      quality: value("quality") ? Number(value("quality")) : null,
      emotion: value("emotion"),
    };
  }
  function draft() { // what is chosen but not saved outlives a reload
    session.drafts[clip()] = { plays, ...values() };
    keep();
  }
  const same = (a, b) => ["lip_sync", "quality", "emotion"].every((name) => (a[name] ?? null) === (b[name] ?? null));

  function save(given, problem) {
    const id = clip();
    const former = session.answers[id];
    const seconds = Math.round((performance.now() - shownAt) / 100) / 10;
    delete session.drafts[id];
    dirty = false;
    if (place < 0) { session.practised = true; keep(); return; }
    session.answers[id] = {
      clip: id, position: place + 1, ...given, problem,
      seconds: Math.round(((former ? former.seconds : 0) + seconds) * 10) / 10,
      plays: (former ? former.plays : 0) + plays, revision: former ? former.revision + 1 : 0,
      answered: new Date().toISOString(),
    };
    keep();
  }
  function complete() { // are all questions answered? says which are not
    const missing = QUESTIONS.filter((question) => !value(question.name));
    $("missing").textContent = missing.length ? `Please answer: ${missing.map((question) => question.short).join(", ")}.` : "";
    if (missing.length) document.querySelector(`#field-${missing[0].name} input`).focus();
    return !missing.length;
  }
  function forward() {
    if (place + 1 < order().length) open(place + 1); else end();
  }
  async function leave(then) { // never loses or changes an answer silently
    if (dirty && place >= 0 && session.answers[clip()]) {
      const choice = await ask("You changed your answers to this clip.", [["save", "Save the change"], ["drop", "Keep the old answers"], ["stay", "Stay here"]]);
      if (choice === "save" && !complete()) return;
      if (choice === "save") save(values(), false);
      else if (choice === "drop") { delete session.drafts[clip()]; dirty = false; keep(); }
      else return;
    }
    $("video").pause();
    then();
  }
  function ask(text, choices) {
    const dialog = $("dialog");
    $("dialog-text").textContent = text;
    $("dialog-buttons").replaceChildren(...choices.map(([name, label], index) =>
      element("button", { type: "button", value: name, className: index ? "" : "primary", onclick: () => dialog.close(name) }, label)));
    dialog.returnValue = "";
    dialog.showModal();
    return new Promise((resolve) => dialog.addEventListener("close", () => resolve(dialog.returnValue), { once: true }));
  }

  // ---- results -----------------------------------------------------------------------------------------------------
  function submission() {
    const { drafts, practised, sent, answers, ...about } = session;
    return { ...about, answers: order().filter((id) => answers[id]).map((id) => answers[id]) };
  }
  function csv() {
    const cell = (entry) => (entry === null || entry === undefined ? "" : String(entry));
    const rows = submission().answers.map((answer) =>
      [session.study, session.rater, session.session, ...COLUMNS.map((name) => cell(answer[name]))].join(","));
    return [["study", "rater", "session", ...COLUMNS].join(","), ...rows].join("\r\n") + "\r\n";
  }
  function download(text, type, ending) {
    const link = element("a", {
      href: URL.createObjectURL(new Blob([text], { type })), download: `answers-${session.study}-${session.rater}.${ending}`,
    });
    document.body.append(link);
    link.click();
    link.remove();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  }
  async function send() {
    $("send").disabled = true;
    $("send-state").textContent = "Sending ...";
    try {
      const reply = await fetch("api/answers", {
        method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(submission()),
      });
      if (!reply.ok) {
        const told = await reply.json().catch(() => ({}));
        throw new Error(typeof told.detail === "string" ? told.detail : `the server answered ${reply.status}`);
      }
      session.sent = new Date().toISOString();
      keep();
      end();
    } catch (error) {
      $("send-state").textContent = `That did not work (${error.message}). Your answers are safe on this device: try again, or download them.`;
    }
    $("send").disabled = false;
  }

  // ---- events ------------------------------------------------------------------------------------------------------
  $("consent").addEventListener("submit", (event) => {
    event.preventDefault();
    const code = $("code").value.trim();
    $("code-problem").textContent = CODE.test(code) ? "" : "The code has 1 to 40 letters, digits, - or _.";
    $("agree-problem").textContent = $("agree").checked ? "" : "To take part, please tick this box.";
    if (!CODE.test(code)) $("code").focus();
    else if (!$("agree").checked) $("agree").focus();
    else { begin(code); go(); }
  });
  $("leave").addEventListener("click", intro);
  $("resume").addEventListener("click", () => go());
  $("other").addEventListener("click", () => { session = null; store("current", null); intro(); });
  $("withdraw").addEventListener("click", async () => {
    const text = `Delete all answers of ${session.rater} from this device? This cannot be undone.`
      + (session.sent ? " What was sent stays with those who run the study." : "");
    if ((await ask(text, [["stay", "Keep them"], ["delete", "Delete"]])) !== "delete") return;
    store("rater:" + session.rater, null);
    store("current", null);
    session = null;
    intro();
  });
  const video = $("video");
  $("play").addEventListener("click", () => {
    if (!video.paused && !video.ended) video.pause();
    else video.play().catch((error) => { $("hint").textContent = `The clip cannot be played (${error.name}).`; });
  });
  video.addEventListener("click", () => $("play").click());
  $("cover").addEventListener("click", () => $("play").click());
  video.addEventListener("playing", () => { $("cover").hidden = true; enable(); });
  video.addEventListener("pause", enable);
  video.addEventListener("ended", () => {
    plays += 1;
    enable();
    if (place >= 0 && !session.answers[clip()]) draft();
  });
  video.addEventListener("error", () => {
    if (video.getAttribute("src")) $("hint").textContent = "The clip cannot be loaded. Check the connection and reload the page.";
  });
  video.addEventListener("contextmenu", (event) => event.preventDefault());
  $("answers").addEventListener("change", () => {
    const known = place >= 0 && session.answers[clip()];
    dirty = !known || known.problem || !same(known, values());
    if (place >= 0 && dirty) draft();
    else if (place >= 0) { delete session.drafts[clip()]; keep(); }
    $("missing").textContent = "";
    enable();
  });
  $("answers").addEventListener("submit", (event) => {
    event.preventDefault();
    const known = place >= 0 && session.answers[clip()];
    if (known && !dirty) { leave(forward); return; }
    if (!known && !plays) { $("missing").textContent = "Please watch the clip to its end first."; $("play").focus(); return; }
    if (!complete()) return;
    save(values(), false);
    video.pause();
    if (place < 0) go(); else forward();
  });
  $("back").addEventListener("click", () => leave(() => open(place - 1)));
  $("broken").addEventListener("click", async () => {
    if ((await ask("Leave this clip out because it does not play?", [["stay", "No, try again"], ["skip", "Leave it out"]])) !== "skip") return;
    save({ lip_sync: null, quality: null, emotion: null }, true);
    forward();
  });
  $("pause").addEventListener("click", () => leave(intro));
  $("remark").addEventListener("change", () => { session.comment = $("remark").value; keep(); });
  $("send").addEventListener("click", send);
  $("review").addEventListener("click", () => open(order().length - 1));
  $("review-offline").addEventListener("click", () => open(order().length - 1));
  $("save-json").addEventListener("click", () => download(JSON.stringify(submission(), null, 1) + "\n", "application/json", "json"));
  $("save-csv").addEventListener("click", () => download(csv(), "text/csv", "csv"));
  addEventListener("storage", (event) => { // the same participant went on in another tab
    if (session && event.key === prefix + "rater:" + session.rater) {
      session = load(session.rater);
      if (session) go(); else intro();
    }
  });

  // ---- start -------------------------------------------------------------------------------------------------------
  async function reach() {
    if (!location.protocol.startsWith("http")) return false;
    try {
      const reply = await fetch("api/study");
      return reply.ok && (await reply.json()).study === study.study;
    } catch { return false; }
  }
  async function start() {
    build();
    served = await reach();
    const asked = new URLSearchParams(location.search).get("rater");
    const current = stored("current");
    session = current && (!asked || asked === current) ? load(current) : asked ? load(asked) : null;
    if (session && done()) go(); else intro();
  }
  start();
})();
