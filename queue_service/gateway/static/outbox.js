/* What has no receipt yet, in order, kept where a reload finds it again. It refuses what is too much, and drops nothing. */

export class OutboxFull extends Error {}

export class Outbox {
  #storage;
  #key;
  #cap;
  #items = [];

  constructor({ storage = sessionStorageIfAllowed(), storageKey, cap }) {
    this.#storage = storage;
    this.#key = storageKey;
    this.#cap = cap;
    const stored = JSON.parse(this.#storage?.getItem(this.#key) ?? "[]");
    this.#items = stored.map((each) => promised(each));
  }

  /** The first that waits, and was not given up. */
  get first() {
    return this.#items.find((item) => item.error === null);
  }

  list() {
    return this.#items.map(({ id, name, fields, error, receipt }) => ({ id, name, fields, error, receipt }));
  }

  /** The promise of the receipt: the same one for what waits already; a new one, at the end, for what was given up. */
  put({ id, name, fields }) {
    const known = this.#items.find((item) => item.id === id);
    if (known?.error === null) return known.receipt;
    const others = this.#items.filter((item) => item.id !== id);
    if (others.length >= this.#cap) {
      throw new OutboxFull(`${this.#cap} messages wait to be sent already. Send this one when some of them have gone.`);
    }
    const items = [...others, promised({ id, name, fields, error: null })];
    try {
      this.#store(items);
    } catch {
      throw new OutboxFull("The browser has no room to keep this message until it is sent.");
    }
    this.#items = items;
    return items.at(-1).receipt;
  }

  settle(item, receipt) {
    this.discard(item.id);
    item.resolve(receipt);
  }

  /** The event of a message says that it was accepted. */
  accepted({ stream, seq, body }) {
    const item = this.#items.find(({ id }) => id === body?.message_id);
    if (item) this.settle(item, { status: "accepted", stream, client_message_id: item.id, seq });
  }

  giveUp(item, error) {
    item.error = error.message;
    this.#keep(this.#items);
    item.reject(error);
  }

  /** Give up what waits for a stream. */
  giveUpStream(stream, error) {
    const waiting = this.#items.filter((item) => item.error === null && item.fields.stream === stream);
    for (const item of waiting) this.giveUp(item, error);
  }

  discard(id) {
    this.#keep(this.#items.filter((item) => item.id !== id));
  }

  #keep(items) {
    this.#items = items;
    try {
      this.#store(items);
    } catch {
      // What is stored all the same goes once more after a reload, under the same id: the server takes it once.
    }
  }

  #store(items) {
    const stored = items.map(({ id, name, fields, error }) => ({ id, name, fields, error }));
    this.#storage?.setItem(this.#key, JSON.stringify(stored));
  }
}

/** An id that nobody else makes up. Pages that were not loaded safely have no `randomUUID`. */
export function newId() {
  if (crypto.randomUUID) return crypto.randomUUID();
  return [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

function promised({ id, name, fields, error }) {
  const item = { id, name, fields, error, attempts: 0 };
  item.receipt = new Promise((resolve, reject) => Object.assign(item, { resolve, reject }));
  // Nobody may be waiting for it after a reload, and the error is in the list.
  item.receipt.catch(() => {});
  return item;
}

function sessionStorageIfAllowed() {
  try {
    return globalThis.sessionStorage;
  } catch {
    return null;
  }
}
