/*
 * The client of a conversation: events come down by EventSource, messages go up by POST.
 *
 * Every event of a watched stream is given to `onEvent` once and in the order of its seq, whatever was skipped, sent
 * twice or cut off on the way; what is not stored any more comes as an event of kind `gap`. Messages go up in the
 * order they were sent, each under an id of its own, and leave the outbox only with a receipt, or when their sender is
 * informed that they were not accepted.
 */

import { call, CallFailed } from "./calls.js";
import { newId, Outbox, OutboxFull } from "./outbox.js";
import { Pulse } from "./pulse.js";
import { Track } from "./track.js";

export { CallFailed, OutboxFull };

const ATTEMPTS = 3;
const PAGE = 1000;
// So many heartbeats may fail to come before the connection counts as dead.
const GRACE = 3;
const ENDED = "This conversation has ended.";
const DEFAULTS = { base: ".", cap: 100, storageKey: "queue_service.outbox" };
// In milliseconds. `patience` is how long a message that failed once waits for a connection before it is tried without.
const PACES = { firstPause: 500, longestPause: 15_000, patience: 15_000, timeout: 30_000 };

/**
 * States: `closed` (before `connect`, after `disconnect`), `connecting`, `open`, `reconnecting`, `signed-out` (the server
 * wants to know who we are; `connect` again when it does), `ended` (all streams have; nothing more comes).
 */
export class ChatClient {
  state = "closed";

  #options;
  #outbox;
  #tracks = new Map();
  #tracksChanged = 0;
  #source = null;
  // A connection can die without a sign, and a browser waits on it for ever.
  #pulse = new Pulse(() => this.#startLater(null));
  #connection = null;
  // Moves on with every welcome, and whenever a connection is lost: what began before it changes nothing.
  #generation = 0;
  // The server knows what we watch, and messages may go. `open` is said when those that waited have gone.
  #ready = false;
  // What the server was told last of what we watch over this connection. One after the other: of two that are under way at
  // once, the earlier one may arrive last.
  #announced = Promise.resolve(true);
  #failures = 0;
  #starting = null;
  #flushing = Promise.resolve();
  #retry = null;
  #retryIsFirm = false;
  #awaitingOpen = [];

  /**
   * `base` is where the gateway is mounted, relative to the page. Callbacks: `onEvent(event)`, `onState(state, error)`,
   * `onOpen()`, `onClose()` (only after an `onOpen`), `onEnd(stream)`.
   */
  constructor(options = {}) {
    this.#options = { ...DEFAULTS, ...PACES, ...options };
    this.#outbox = new Outbox(this.#options);
    // The network is back, or the page is, out of the browser's cache: the connection may be dead without a sign.
    addEventListener("online", () => this.#restart());
    addEventListener("pageshow", (shown) => shown.persisted && this.#restart());
  }

  /** Watch these streams, `{name: last seq seen}`, besides those watched before, and connect. */
  connect(streams = {}) {
    for (const [stream, seq] of Object.entries(streams)) this.#track(stream, seq);
    this.#failures = 0;
    this.#start();
  }

  /** Until `connect`, nothing comes and nothing goes. What is unsent stays. */
  disconnect() {
    this.#drop();
    this.#stopWaiting();
    this.#setState("closed");
  }

  watch(stream, seq = 0) {
    this.#track(stream, seq);
    this.#subscribe();
  }

  unwatch(stream) {
    this.#forget(stream);
    this.#subscribe();
  }

  /** Watch this stream and no other. */
  switch(stream, seq = 0) {
    for (const watched of [...this.#tracks.keys()]) if (watched !== stream) this.#forget(watched);
    this.watch(stream, seq);
  }

  /** What has no receipt yet, as `{id, name, fields, receipt, error}`. With an `error` it was given up, and waits for
   * `send` under its id, or `discard`. */
  get unsent() {
    return this.#outbox.list();
  }

  /**
   * Send a message. The promise is that of the receipt; it fails with CallFailed when the server refuses the message, or
   * after three attempts, and with OutboxFull at once when too many wait already. A message that failed is sent again
   * under the same `id`: the server takes it once.
   */
  send(stream, body, { id = newId() } = {}) {
    return this.#put("send", id, { stream, client_message_id: id, body });
  }

  /** Answer a request of the agent. Retried like a message. */
  permission(stream, requestId, answer) {
    return this.#put("permission", newId(), { stream, request_id: requestId, answer });
  }

  /** Forget a message that failed. */
  discard(id) {
    this.#outbox.discard(id);
  }

  // What follows is about this moment, and is never sent later.

  stop(stream, messageId) {
    return this.#post("stop", { stream, message_id: messageId });
  }

  interrupt(stream, messageId) {
    return this.#post("interrupt", { stream, message_id: messageId });
  }

  mode(stream, mode) {
    return this.#post("mode", { stream, mode });
  }

  suspend(stream) {
    return this.#post("suspend", { stream });
  }

  close(stream) {
    return this.#post("close", { stream });
  }

  // The connection

  #start() {
    this.#drop();
    this.#setState(["closed", "connecting"].includes(this.state) ? "connecting" : "reconnecting");
    this.#pulse.expect(this.#options.timeout);
    // As events: EventSource keeps comments to itself.
    const asked = new URLSearchParams({ heartbeat: "event" });
    for (const { stream, top } of this.#tracks.values()) asked.append("cursor", `${stream}:${top}`);
    const source = (this.#source = new EventSource(this.#url(`chat/events?${asked}`)));
    const hear = (name, act) =>
      source.addEventListener(name, (frame) => {
        this.#pulse.heard();
        act(JSON.parse(frame.data));
      });
    hear("welcome", (welcome) => this.#welcome(welcome));
    hear("heartbeat", () => {});
    hear("message", (event) => this.#tracks.get(event.stream)?.receive(event));
    hear("gap", (missing) => this.#tracks.get(missing.stream)?.skip(missing));
    hear("end", (ended) => this.#tracks.get(ended.stream)?.end(ended));
    source.onerror = () => this.#lost(source);
  }

  async #welcome(welcome) {
    const generation = ++this.#generation;
    this.#connection = welcome.connection_id;
    this.#pulse.expect(1000 * GRACE * welcome.heartbeat);
    this.#ready = false;
    this.#announced = Promise.resolve(true);
    let known;
    do {
      known = this.#tracksChanged;
      if (this.#tracks.size && !(await this.#reconnect(generation))) return;
    } while (known !== this.#tracksChanged);
    this.#ready = true;
    if (!this.#retryIsFirm) this.#stopWaiting();
    await this.#flush();
    if (generation !== this.#generation) return;
    this.#failures = 0;
    this.#setState("open");
  }

  /** Tell the server what we watch. False: it does not know, or the connection this was about is gone. */
  #reconnect(generation) {
    return (this.#announced = this.#announced.then(() => this.#announce(generation)));
  }

  async #announce(generation) {
    if (generation !== this.#generation) return false;
    const streams = Object.fromEntries([...this.#tracks.values()].map(({ stream, top }) => [stream, top]));
    try {
      await this.#post("reconnect", { streams });
    } catch (error) {
      if (generation === this.#generation) this.#startLater(error);
      return false;
    }
    return generation === this.#generation;
  }

  #subscribe() {
    this.#tracksChanged += 1;
    if (this.#ready) this.#reconnect(this.#generation);
    else if (this.state === "ended") this.#start();
  }

  #lost(source) {
    const generation = ++this.#generation;
    this.#ready = false;
    this.#pulse.expect(this.#options.timeout);
    this.#setState("reconnecting");
    // A source that lost its connection makes another by itself. One that got an answer it did not like gives up, and
    // does not say what the answer was.
    if (source.readyState === EventSource.CLOSED) this.#askWhy(generation);
  }

  async #askWhy(generation) {
    const tracks = [...this.#tracks.values()];
    let why = null;
    try {
      const found = await Promise.all(tracks.map(({ stream }) => this.#get(stream, "state")));
      if (generation === this.#generation && found.length && found.every(({ state }) => state === "ended")) {
        found.forEach((state, at) => tracks[at].end(state));
        return;
      }
    } catch (error) {
      why = error;
    }
    if (generation === this.#generation) this.#startLater(why);
  }

  #startLater(error) {
    if (!this.#isWanted) return;
    this.#drop();
    if (error?.status !== 401) this.#starting = setTimeout(() => this.#start(), this.#pause(this.#failures++));
    this.#setState(error?.status === 401 ? "signed-out" : "reconnecting", error);
  }

  #restart() {
    if (this.#isWanted) this.#start();
  }

  get #isWanted() {
    return ["open", "connecting", "reconnecting"].includes(this.state);
  }

  #drop() {
    this.#generation += 1;
    this.#source?.close();
    this.#source = null;
    this.#pulse.stop();
    this.#ready = false;
    clearTimeout(this.#starting);
  }

  #setState(state, error = null) {
    const was = this.state;
    if (was === state && error === null) return;
    this.state = state;
    if (was === "open" && state !== "open") this.#notify("onClose");
    this.#notify("onState", state, error);
    if (state !== "open") return;
    for (const goOn of this.#awaitingOpen.splice(0)) goOn();
    this.#notify("onOpen");
  }

  // Streams

  #track(stream, seq) {
    if (this.#tracks.has(stream)) return;
    const track = new Track(stream, seq, {
      deliver: (event) => this.#deliver(event),
      history: (after, limit) => this.#history(track, after, limit),
      ended: () => this.#streamEnded(stream),
    });
    this.#tracks.set(stream, track);
  }

  #deliver(event) {
    // As good as its receipt, which may have been lost on the way.
    if (event.kind === "message") this.#outbox.accepted(event);
    this.#notify("onEvent", event);
  }

  #forget(stream) {
    this.#tracks.get(stream)?.close();
    this.#tracks.delete(stream);
  }

  #streamEnded(stream) {
    this.#outbox.giveUpStream(stream, new CallFailed(409, ENDED));
    this.#notify("onEnd", stream);
    if (![...this.#tracks.values()].every((track) => track.ended)) return;
    this.#drop();
    this.#setState("ended");
  }

  /** A page of the history, however long it takes; [] where the server refuses it. */
  async #history(track, after, limit) {
    for (let failures = 0; !track.closed; failures++) {
      try {
        return (await this.#get(track.stream, `events?after=${after}&limit=${Math.min(limit, PAGE)}`)).events;
      } catch (error) {
        if (error.status === 401) this.#startLater(error);
        else if (!error.mayPass || error.status === 404) break;
      }
      await this.#openOr(this.#pause(failures));
    }
    return [];
  }

  // Messages

  async #put(name, id, fields) {
    const receipt = this.#outbox.put({ id, name, fields });
    if (this.#tracks.get(fields.stream)?.ended) this.#outbox.giveUpStream(fields.stream, new CallFailed(409, ENDED));
    else if (this.#ready) this.#flush();
    return receipt;
  }

  /** Send what waits, in order, after whoever does so already. */
  #flush(force = false) {
    return (this.#flushing = this.#flushing.then(() => this.#drain(force)));
  }

  async #drain(force) {
    let item;
    while ((item = this.#outbox.first) && this.#maySend(item, force)) {
      const connection = this.#connection;
      try {
        this.#outbox.settle(item, await this.#post(item.name, item.fields));
      } catch (error) {
        this.#failed(item, error, connection);
      }
    }
  }

  #maySend(item, force) {
    return this.#retry === null && (this.#ready || (force && item.attempts > 0 && this.#isWanted));
  }

  #failed(item, error, connection) {
    if (error.status === 401) {
      // It says nothing about the message, which waits until we are known.
      this.#startLater(error);
      return;
    }
    item.attempts += 1;
    if (!error.mayPass || item.attempts >= ATTEMPTS) this.#outbox.giveUp(item, error);
    if (!error.mayPass) return;
    this.#flushLater(Math.max(this.#pause(item.attempts), error.retryAfter), error.retryAfter > 0);
    if (error.status === 404 && this.#ready && connection === this.#connection) this.#startLater(error);
  }

  /** Also where no new connection comes: events may be cut off while messages get through. */
  #flushLater(pause, isFirm) {
    this.#stopWaiting();
    this.#retryIsFirm = isFirm;
    this.#retry = setTimeout(() => {
      this.#retryIsFirm = false;
      this.#retry = setTimeout(() => this.#flushNow(), this.#ready ? 0 : this.#options.patience);
    }, pause);
  }

  #flushNow() {
    this.#stopWaiting();
    this.#flush(true);
  }

  #stopWaiting() {
    clearTimeout(this.#retry);
    this.#retry = null;
    this.#retryIsFirm = false;
  }

  // Calls

  #post(name, body) {
    const headers = { "Content-Type": "application/json" };
    if (this.#connection !== null) headers["X-Connection-ID"] = this.#connection;
    const request = { method: "POST", headers, body: JSON.stringify(body) };
    return call(this.#url(`chat/${name}`), request, this.#options.timeout);
  }

  #get(stream, what) {
    return call(this.#url(`sessions/${encodeURIComponent(stream)}/${what}`), {}, this.#options.timeout);
  }

  #url(path) {
    return new URL(`${this.#options.base}/api/${path}`, document.baseURI).href;
  }

  /** Full jitter: clients that lost the same server do not come back together. */
  #pause(failures) {
    const { firstPause, longestPause } = this.#options;
    return Math.random() * Math.min(longestPause, firstPause * 2 ** failures);
  }

  /** Resolves when the connection opens, or after a pause. */
  #openOr(pause) {
    return new Promise((goOn) => {
      this.#awaitingOpen.push(goOn);
      setTimeout(goOn, pause);
    });
  }

  /** What a callback throws is its own trouble, and is reported. */
  #notify(name, ...values) {
    try {
      this.#options[name]?.(...values);
    } catch (error) {
      reportError(error);
    }
  }
}
