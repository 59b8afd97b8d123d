// pg-boss with batches of 500, fetched without a pause while they are full, and woken by notices.
import pg from "pg";
import { PgBoss } from "pg-boss";
import { Contest } from "./contest.mjs";

class Boss {
  async open(connectionString) {
    this.pool = new pg.Pool({ connectionString, max: 2 });
    this.boss = new PgBoss({ connectionString, max: 20, useListenNotify: true });
    this.boss.on("error", (error) => process.stderr.write(`${error}\n`));
    await this.boss.start();
    await this.#create(1);
  }

  async #create(queues) {
    const known = new Set((await this.boss.getQueues()).map((queue) => queue.name));
    for (let queue = 0; queue < queues; queue++) {
      if (!known.has(`q${queue}`)) await this.boss.createQueue(`q${queue}`, { notify: true });
    }
  }

  async clear() { await this.pool.query("truncate pgboss.job_common"); }

  async enqueue(n) { await this.boss.send("q0", { n }); }

  async enqueueMany(numbers, delay, queues) {
    await this.#create(queues);
    for (let queue = 0; queue < queues; queue++) {
      const mine = numbers.filter((n) => n % queues === queue);
      for (let start = 0; start < mine.length; start += 10_000) {
        const jobs = mine.slice(start, start + 10_000).map((n) => ({ data: { n }, startAfter: delay || undefined }));
        await this.boss.insert(`q${queue}`, jobs);
      }
    }
  }

  async begin(handler, queues) {
    this.names = Array.from({ length: queues }, (_, queue) => `q${queue}`);
    const options = { batchSize: 500, pollingIntervalSeconds: 0.5, burstWhenBatchFull: true };
    for (const name of this.names) {
      await this.boss.work(name, options, async (jobs) => { await Promise.all(jobs.map((job) => handler(job.data.n))); });
    }
  }

  async end() { for (const name of this.names) await this.boss.offWork(name, { wait: true }); }

  async left() {
    const sql = "select count(*)::int as count from pgboss.job_common where state < 'completed'";
    return (await this.pool.query(sql)).rows[0].count;
  }

  async close() {
    await this.boss.stop();
    await this.pool.end();
  }
}

await new Contest(new Boss()).converse();
