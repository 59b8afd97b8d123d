// A child in JavaScript, with nothing but Node: what it does with a turn are the words of its payload.
import { createInterface } from "node:readline";

const say = (line) => process.stdout.write(JSON.stringify(line) + "\n");
const held = new Set();
const taking = new Set();
let witness = null;

say({ type: "ready", protocol: Number(process.argv[2] ?? 1) });

function work(turn) {
  witness ??= turn.message_id;
  let said = 0;
  for (const word of turn.payload.split(" ")) {
    if (word === "delta") say({ type: "event", message_id: turn.message_id, kind: "delta", body: ++said });
    else if (word === "reply") reply([turn.message_id], "done");
    else if (word === "slow") setTimeout(() => reply([turn.message_id], "slow"), 300);
    else if (word === "withhold") say({ type: "withhold", code: "provider_overloaded" });
    else if (word === "take") taking.add(turn.message_id);
    else if (word === "crash") process.exit(3);
    if (word === "hold" || word === "slow" || word === "take") held.add(turn.message_id);
  }
}

function reply(ids, text) {
  ids.forEach((id) => held.delete(id));
  say({ type: "reply", message_ids: ids, body: { text } });
  leave();
}

let draining = false;
function leave() {
  if (draining && held.size === 0) process.exit(0);
}

for await (const text of createInterface({ input: process.stdin })) {
  const line = JSON.parse(text);
  if (line.type === "turn") work(line);
  else if (line.type === "stop") process.exit(0);
  else if (line.type === "drain") {
    draining = true;
    leave();
  } else {
    if (line.type === "cancelled") held.delete(line.message_id);
    if (line.type === "input" && taking.size > 0) reply([...taking, line.message_id], "both");
    const about = line.request_id ?? line.message_id;
    say({ type: "event", message_id: witness, kind: "heard", body: { line: line.type, about } });
  }
}
process.exit(0); // Its supervisor is gone.
