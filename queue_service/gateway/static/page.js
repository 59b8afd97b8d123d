/* The bundled page: one conversation, named in the address, and whatever state it is in said in words. */

import { ChatClient } from "./chat.js";
import { Log } from "./log.js";
import { newId } from "./outbox.js";

const STATES = {
  closed: "Closed",
  connecting: "Connecting…",
  open: "Connected",
  reconnecting: "Reconnecting…",
  "signed-out": "Signed out",
  ended: "Ended",
};
// Closer to the end than this, the reader follows what comes.
const NEAR = 80;

const byId = (id) => document.getElementById(id);
const [scroller, notice, text, stop, latest] = ["scroller", "notice", "text", "stop", "latest"].map(byId);

let isFollowing = true;
let isDrawing = false;

const stream = streamOfAddress();
const log = new Log({ again: say, discard: (id) => client.discard(id), changed: () => refresh() });
const client = new ChatClient({ onEvent: (event) => log.show(event), onState: showState });

for (const { id, name, fields, receipt, error } of client.unsent) {
  if (name === "send" && fields.stream === stream) present(id, fields.body.text, receipt, error);
}
byId("stream").textContent = byId("stream").title = stream;
client.connect({ [stream]: 0 });

/** The conversation that the address names, or a new one, which it names from now on. */
function streamOfAddress() {
  const address = new URL(location.href);
  const named = address.searchParams.get("stream");
  if (named) return named;
  address.searchParams.set("stream", `chat-${newId()}`);
  history.replaceState(null, "", address);
  return address.searchParams.get("stream");
}

// Messages

function say(words, id = newId()) {
  present(id, words, client.send(stream, { text: words }, { id }));
  isFollowing = true;
}

/** Show a message that waits for its receipt. With an `error`, it was given up before. */
function present(id, words, receipt, error = null) {
  log.queue(id, words);
  if (error !== null) log.failed(id, error);
  else receipt.then(() => log.accepted(id), (failure) => log.failed(id, failure.message));
}

byId("composer").addEventListener("submit", (submitted) => {
  submitted.preventDefault();
  const words = text.value.trim();
  text.focus();
  if (!words || client.state === "ended") return;
  text.value = "";
  grow();
  say(words);
});

text.addEventListener("keydown", (key) => {
  // On a phone, Enter is for lines: there is no Shift at hand, and Send is.
  if (key.key !== "Enter" || key.shiftKey || key.isComposing || matchMedia("(pointer: coarse)").matches) return;
  key.preventDefault();
  byId("composer").requestSubmit();
});

text.addEventListener("input", grow);

/** For browsers without `field-sizing`. */
function grow() {
  if (CSS.supports("field-sizing", "content")) return;
  text.style.height = "auto";
  text.style.height = `${text.scrollHeight}px`;
}

stop.addEventListener("click", async () => {
  notice.textContent = "";
  try {
    await client.stop(stream);
  } catch (error) {
    notice.textContent = `Nothing was stopped. ${error.message}`;
  }
});

// The connection

function showState(state, error) {
  byId("connection").dataset.state = state;
  byId("connection").firstElementChild.textContent = STATES[state];
  byId("sign-in").hidden = state !== "signed-out";
  log.waitingNote = state === "open" ? "Sending…" : "Waiting for the connection…";
  text.disabled = byId("send").disabled = state === "ended";
  text.placeholder = state === "ended" ? "This conversation has ended" : "Write a message";
  // That nobody answers is what reconnecting means; an answer that says no is shown.
  notice.textContent = error?.status && error.status !== 401 ? error.message : "";
  if (state === "signed-out" && !byId("login").open) byId("login").showModal();
}

byId("sign-in").addEventListener("click", () => byId("login").showModal());

byId("login").addEventListener("submit", async (submitted) => {
  submitted.preventDefault();
  byId("login-error").textContent = "";
  const why = await login(byId("token").value);
  byId("login-error").textContent = why ?? "";
  if (why !== null) return;
  byId("token").value = "";
  byId("login").close();
  client.connect();
  text.focus();
});

/** Why not, or null. */
async function login(token) {
  const request = { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify({ token }) };
  try {
    const answer = await fetch("api/login", request);
    if (answer.ok) return null;
    if (answer.status === 404) return "This gateway cannot be signed in to from here.";
    return (await answer.json()).error;
  } catch {
    return "The server cannot be reached. Try again.";
  }
}

// What is on the screen

/** Once for all that came before the next frame. */
function refresh() {
  if (stop.hidden === log.isOwed) showStop(log.isOwed);
  byId("empty").hidden = !log.isEmpty;
  if (isDrawing) return;
  isDrawing = true;
  requestAnimationFrame(() => {
    isDrawing = false;
    if (isFollowing) scroller.scrollTop = scroller.scrollHeight;
    latest.hidden = isFollowing;
  });
}

function showStop(isShown) {
  if (!isShown && document.activeElement === stop) text.focus();
  stop.hidden = !isShown;
}

scroller.addEventListener("scroll", () => {
  isFollowing = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < NEAR;
  if (isFollowing) latest.hidden = true;
});

new ResizeObserver(() => isFollowing && (scroller.scrollTop = scroller.scrollHeight)).observe(scroller);

latest.addEventListener("click", () => {
  scroller.scrollTop = scroller.scrollHeight;
  text.focus();
});
