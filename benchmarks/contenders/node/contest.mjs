// What contest.py says to Python: the conversation with whoever measures, and the taking of times.
import readline from "node:readline";
import { setTimeout as sleep } from "node:timers/promises";

const now = () => performance.now();

class Score {
  constructor(wanted, pause = 0) {
    this.wanted = wanted;
    this.pause = pause;
    this.count = 0;
    this.first = this.last = 0;
    this.begun = new Map();
    this.done = new Promise((resolve) => { this.finish = resolve; });
    this.handled = this.handled.bind(this);
  }

  async handled(n) {
    const at = now();
    this.first ||= at;
    this.begun.set(n, at);
    if (this.pause) await sleep(1000 * this.pause);
    this.last = now();
    if (++this.count === this.wanted) this.finish();
  }
}

function quantiles(taken) {
  const sorted = taken.toSorted((a, b) => a - b);
  const at = (share) => sorted[Math.min(sorted.length - 1, Math.floor(share * sorted.length))];
  return { p50: at(0.5), p99: at(0.99) };
}

export class Contest {
  #contender;
  #next = 0;

  constructor(contender) { this.#contender = contender; }

  #numbers(count) {
    this.#next += count;
    return Array.from({ length: count }, (_, place) => this.#next - count + place);
  }

  async clear() {
    await this.#contender.clear();
    return {};
  }

  async bulk({ count, delay = 0, queues = 1 }) {
    const numbers = this.#numbers(count);
    const begun = now();
    await this.#contender.enqueueMany(numbers, delay, queues);
    return { rate: (1000 * count) / (now() - begun) };
  }

  async enqueue({ count, callers }) {
    const numbers = this.#numbers(count).values();
    const call = async () => { for (const n of numbers) await this.#contender.enqueue(n); };
    const begun = now();
    await Promise.all(Array.from({ length: callers }, call));
    return { rate: (1000 * count) / (now() - begun) };
  }

  async work({ count, left = 0, pause = 0, queues = 1 }) {
    const score = new Score(count, pause);
    await this.#contender.begin(score.handled, queues);
    await score.done;
    await this.#contender.end();
    const unfinished = left === 0 ? await this.#contender.left() : 0;
    if (unfinished) throw new Error(`${unfinished} of ${count} jobs were left unfinished`);
    const rss = process.resourceUsage().maxRSS / 1024;
    return { rate: (1000 * count) / (score.last - score.first), rss };
  }

  async share() {
    const score = new Score(0);
    await this.#contender.begin(score.handled, 1);
    while ((score.count && now() < score.last + 1000) || (await this.#contender.left())) await sleep(100);
    await this.#contender.end();
    const wall = (at) => (performance.timeOrigin + at) / 1000;
    return { count: score.count, first: wall(score.first), last: wall(score.last) };
  }

  async latency({ count, pause }) {
    const score = new Score(1e9);
    const taken = [];
    await this.#warm(score);
    for (const n of this.#numbers(count)) {
      const called = now();
      await this.#contender.enqueue(n);
      await this.#until(() => score.begun.has(n));
      taken.push(score.begun.get(n) - called);
      await sleep(1000 * pause);
    }
    await this.#contender.end();
    return quantiles(taken);
  }

  async steady({ rate, seconds }) {
    const score = new Score(1e9);
    const called = new Map();
    const calls = [];
    await this.#warm(score);
    const begun = now();
    for (const [place, n] of this.#numbers(Math.floor(rate * seconds)).entries()) {
      const wait = begun + (1000 * place) / rate - now();
      if (wait > 0) await sleep(wait);
      called.set(n, now());
      calls.push(this.#contender.enqueue(n));
    }
    await Promise.all(calls);
    await this.#until(() => called.keys().every((n) => score.begun.has(n)));
    const taken = now() - begun;
    await this.#contender.end();
    const latencies = called.keys().map((n) => score.begun.get(n) - called.get(n)).toArray();
    return { ...quantiles(latencies), rate: (1000 * called.size) / taken };
  }

  async #warm(score) {
    await this.#contender.begin(score.handled, 1);
    for (const n of this.#numbers(50)) {
      await this.#contender.enqueue(n);
      await this.#until(() => score.begun.has(n));
    }
  }

  // A timer is no shorter than a millisecond; turns of the loop are.
  async #until(condition) {
    while (!condition()) await new Promise(setImmediate);
  }

  async converse() {
    await this.#contender.open(process.argv[2]);
    for await (const line of readline.createInterface({ input: process.stdin })) {
      const { do: verb, ...options } = JSON.parse(line);
      const answer = await this[verb](options);
      process.stdout.write(`${JSON.stringify(answer)}\n`);
    }
    await this.#contender.close();
  }
}
