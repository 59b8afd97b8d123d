/* A watch over a connection: whoever hears nothing for too long is called, once. */

export class Pulse {
  #silent;
  #limit = 0;
  #timer = null;

  constructor(silent) {
    this.#silent = silent;
  }

  /** From now on, so many milliseconds without `heard` are too long. */
  expect(limit) {
    this.#limit = limit;
    this.heard();
  }

  heard() {
    clearTimeout(this.#timer);
    this.#timer = setTimeout(this.#silent, this.#limit);
  }

  stop() {
    clearTimeout(this.#timer);
  }
}
