/*
 * One stream as it is watched: every event once, in the order of seq. What a jump or a `gap` left out is fetched from the
 * history before what came after it goes on; what the history does not have comes as an event of kind `gap`.
 */

// More than this is not held while the history is read, but read from it too.
const HELD = 1000;

export class Track {
  ended = false;
  closed = false;

  #held = [];
  #advancing = false;
  #isEnding = false;
  #deliver;
  #history;
  #whenEnded;

  /** `history(after, limit)` is a page of events, shorter than `limit` or empty where no more are stored. */
  constructor(stream, seq, { deliver, history, ended }) {
    this.stream = stream;
    // The last event that was delivered, and the last one that needs not be sent to us again.
    this.seen = this.top = seq;
    this.#deliver = deliver;
    this.#history = history;
    this.#whenEnded = ended;
  }

  receive(event) {
    if (event.seq <= this.top) return;
    this.top = event.seq;
    if (this.#held.length < HELD) this.#held.push(event);
    this.#advance();
  }

  skip({ to, head }) {
    const last = Math.min(to, head);
    if (head < to && head < this.top) this.#restored(head);
    if (last <= this.top) return;
    this.top = last;
    this.#advance();
  }

  end({ head }) {
    this.top = Math.max(this.top, head);
    this.#isEnding = true;
    this.#advance();
  }

  close() {
    this.closed = true;
  }

  async #advance() {
    if (this.#advancing) return;
    this.#advancing = true;
    while (!this.closed && this.seen < this.top) {
      const [next] = this.#held;
      if (next?.seq === this.seen + 1) this.#see(this.#held.shift());
      else await this.#backfill(next === undefined ? this.top : next.seq - 1);
    }
    this.#advancing = false;
    if (!this.#isEnding || this.ended || this.closed) return;
    this.ended = true;
    this.#whenEnded();
  }

  async #backfill(upto) {
    const page = await this.#history(this.seen, upto - this.seen);
    // Meanwhile we may have been taken back, or closed.
    if (upto > this.top || this.closed) return;
    for (const event of page) {
      if (event.seq > upto) break;
      this.#miss(event.seq - 1);
      this.#see(event);
    }
    if (!page.length || page.at(-1).seq > upto) this.#miss(upto);
  }

  /** The database lost what we saw, or were to see, and numbers go on from its head. */
  #restored(head) {
    const missing = { from: head + 1, to: this.seen, head };
    this.#held = [];
    this.top = head;
    if (this.seen <= head) return;
    this.seen = head;
    this.#deliver({ stream: this.stream, seq: head, kind: "gap", body: missing, terminal: false, created_at: null });
  }

  #miss(upto) {
    if (upto <= this.seen) return;
    const missing = { from: this.seen + 1, to: upto, head: this.top };
    this.seen = upto;
    this.#deliver({ stream: this.stream, seq: upto, kind: "gap", body: missing, terminal: false, created_at: null });
  }

  #see(event) {
    this.seen = event.seq;
    this.#deliver(event);
  }
}
