/*
 * The conversation as it is shown: the events of the stream, in its order, and below it what has not been accepted yet.
 * Everything that a person or an agent wrote is set as text.
 */

export class Log {
  #events = document.getElementById("events");
  #unsent = document.getElementById("unsent");
  #thinking = document.getElementById("thinking");
  // By message id: what the person wrote, the reply that grows, and whether it is owed an ending.
  #messages = new Map();
  #replies = new Map();
  #owed = new Set();
  #ended = new Set();
  #latest = null;
  #waitingNote = "";
  #again;
  #discard;
  #changed;

  /** `again(text, id)` sends a text, under this id where there is one; `discard(id)` forgets one; `changed()` is called after
   * everything that is shown. */
  constructor({ again, discard, changed }) {
    this.#again = again;
    this.#discard = discard;
    this.#changed = changed;
  }

  get isEmpty() {
    return !this.#events.childElementCount && !this.#unsent.childElementCount;
  }

  get isOwed() {
    return this.#owed.size > 0;
  }

  /** An event of the stream. */
  show(event) {
    const draw = {
      message: () => this.#message(event.body),
      delta: () => this.#delta(event.body ?? {}),
      queued: () => this.#queued(event.body ?? {}),
      reset: () => this.#reset(event.body ?? {}),
      status: () => this.#line("status", event.body?.text),
      reply: () => this.#reply(event.body),
      error: () => this.#error(event.body),
      gap: () => this.#line("gap", missing(event.body)),
    };
    if (Object.hasOwn(draw, event.kind)) draw[event.kind]();
    else this.#line("other", event.kind);
    this.#update();
  }

  /** A message that the person wrote, and that is not accepted yet. */
  queue(id, text) {
    const entry = this.#messages.get(id) ?? this.#person(id, text);
    entry.node.className = "entry person waiting";
    entry.note.textContent = this.#waitingNote;
    entry.actions.replaceChildren();
    this.#unsent.append(entry.node);
    this.#update();
  }

  accepted(id) {
    const { node, note, actions } = this.#messages.get(id);
    node.className = "entry person";
    note.textContent = "";
    actions.replaceChildren();
    this.#update();
  }

  failed(id, why) {
    const { node, note, actions, text } = this.#messages.get(id);
    // It is in the stream meanwhile: it was accepted after all.
    if (node.parentElement === this.#events) return;
    node.className = "entry person failed";
    note.textContent = `Not sent. ${why}`;
    const discard = button("Discard", () => {
      this.#messages.delete(id);
      node.remove();
      this.#discard(id);
      this.#update();
    });
    actions.replaceChildren(button("Send again", () => this.#again(text, id)), discard);
    this.#update();
  }

  /** What messages that wait are waiting for. */
  set waitingNote(text) {
    this.#waitingNote = text;
    for (const note of this.#unsent.querySelectorAll(".waiting > .note")) note.textContent = text;
  }

  // Kinds of events

  #message({ message_id: id, body }) {
    const entry = this.#messages.get(id) ?? this.#person(id, textOf(body));
    this.#events.append(entry.node);
    this.accepted(id);
    this.#latest = id;
    if (!this.#ended.has(id)) this.#owed.add(id);
  }

  #delta({ message_id: id, text }) {
    const of = id ?? this.#owed.values().next().value;
    // Of an attempt that went on after its turn had ended.
    if (of === undefined || this.#ended.has(of)) return;
    this.#growing(of).text.append(text ?? "");
  }

  #queued({ message_id: id, ahead }) {
    const entry = this.#messages.get(id);
    if (entry && this.#owed.has(id)) entry.note.textContent = ahead === 1 ? "One before it." : `${ahead} before it.`;
  }

  /** A new attempt at a message begins: the half answer of the one before goes. */
  #reset({ message_id: id }) {
    this.#replies.get(id)?.node.remove();
    this.#replies.delete(id);
  }

  #reply(body) {
    for (const id of body.message_ids) {
      // An answer to several messages is stored as the ending of each, and is shown once.
      const isShown = (body.together ?? []).some((other) => other !== id && this.#ended.has(other));
      if (isShown) this.#replies.get(id)?.node.remove();
      else this.#growing(id).text.textContent = textOf(body);
      this.#end(id);
    }
  }

  #error(body) {
    for (const id of body.message_ids) this.#end(id);
    const isStopped = body.code === "cancelled";
    const { node, bubble } = entry("div", isStopped ? "stopped" : "error", isStopped ? "" : "Error: ");
    this.#quote(bubble, body.message_ids);
    bubble.append(element("p", "text", body.message));
    const texts = body.message_ids.map((id) => this.#messages.get(id)?.text).filter(Boolean);
    if (!isStopped && texts.length) {
      const actions = element("p", "actions");
      actions.append(button("Send again", () => this.#again(texts.join("\n"))));
      node.append(actions);
    }
    this.#events.append(node);
  }

  #line(name, text) {
    this.#events.append(element("p", `line ${name}`, text ?? ""));
  }

  // Entries

  #person(id, text) {
    const { node, bubble } = entry("div", "person", "You: ");
    bubble.append(element("p", "text", text));
    const [note, actions] = [element("p", "note"), element("p", "actions")];
    node.append(note, actions);
    node.dataset.messageId = id;
    this.#messages.set(id, { node, note, actions, text });
    return this.#messages.get(id);
  }

  /** The reply to a message, which is not complete. */
  #growing(id) {
    const known = this.#replies.get(id);
    if (known) return known;
    const { node, bubble } = entry("div", "agent growing", "Agent: ");
    const text = element("p", "text");
    this.#quote(bubble, [id]);
    bubble.append(text);
    // Read out when it is complete, and not word by word.
    node.setAttribute("aria-busy", "true");
    this.#events.append(node);
    this.#replies.set(id, { node, text });
    return this.#replies.get(id);
  }

  /** What is answered, where another message came between. */
  #quote(bubble, ids) {
    for (const id of ids) {
      const text = this.#messages.get(id)?.text;
      if (text && id !== this.#latest) bubble.append(element("p", "quote", text));
    }
  }

  #end(id) {
    this.#owed.delete(id);
    this.#ended.add(id);
    const message = this.#messages.get(id);
    if (message) message.note.textContent = "";
    const reply = this.#replies.get(id);
    reply?.node.classList.remove("growing");
    reply?.node.removeAttribute("aria-busy");
    this.#replies.delete(id);
  }

  #update() {
    this.#thinking.hidden = !this.isOwed || [...this.#owed].some((id) => this.#replies.has(id));
    this.#changed();
  }
}

function textOf(body) {
  return typeof body?.text === "string" ? body.text : JSON.stringify(body, null, 2);
}

function missing({ from, to }) {
  return from === to ? `Event ${from} is not kept any more.` : `Events ${from} to ${to} are not kept any more.`;
}

function entry(tag, name, speaker) {
  const node = element(tag, `entry ${name}`);
  const bubble = element("div", "bubble");
  if (speaker) bubble.append(element("span", "unseen", speaker));
  node.append(bubble);
  return { node, bubble };
}

function element(tag, name, text = "") {
  const made = document.createElement(tag);
  made.className = name;
  made.textContent = text;
  return made;
}

function button(text, act) {
  const made = element("button", "quiet", text);
  made.type = "button";
  made.addEventListener("click", act);
  return made;
}
