/* Calls of the gateway: an answer that is its own, or a CallFailed that says in a sentence why there is none. */

const UNREACHABLE = "The server cannot be reached.";

/** `status` is that of HTTP, or 0 where there was no answer: then it is not known whether the call was carried out. */
export class CallFailed extends Error {
  constructor(status, message, { field = null, retryAfter = 0 } = {}) {
    super(message);
    this.status = status;
    this.field = field;
    // In milliseconds.
    this.retryAfter = retryAfter;
  }

  static unreachable() {
    return new CallFailed(0, UNREACHABLE);
  }

  get mayPass() {
    return [0, 404, 408, 429].includes(this.status) || this.status >= 500;
  }
}

export async function call(url, request, timeout) {
  let answer;
  let text;
  try {
    answer = await fetch(url, { ...request, cache: "no-store", signal: AbortSignal.timeout(timeout) });
    text = await answer.text();
  } catch {
    throw CallFailed.unreachable();
  }
  const found = parsed(text);
  if (answer.ok && found !== null) return found;
  // A 200 that is not JSON comes from something in between.
  throw new CallFailed(answer.ok ? 0 : answer.status, found?.error ?? `The server answered ${answer.status}.`, {
    field: found?.field ?? null,
    retryAfter: milliseconds(answer.headers.get("Retry-After")),
  });
}

function parsed(text) {
  try {
    return JSON.parse(text);
  } catch {
    return null;
  }
}

function milliseconds(retryAfter) {
  if (retryAfter === null) return 0;
  const seconds = Number(retryAfter);
  return Math.max(0, Number.isNaN(seconds) ? Date.parse(retryAfter) - Date.now() : seconds * 1000) || 0;
}
