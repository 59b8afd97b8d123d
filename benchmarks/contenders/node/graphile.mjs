// graphile-worker with the settings that its documentation measures: a local queue of 500, batched endings, 24 at once.
import { Logger, makeWorkerUtils, run } from "graphile-worker";
import pg from "pg";
import { Contest } from "./contest.mjs";

const logger = new Logger(() => () => {});

class Graphile {
  async open(connectionString) {
    this.connectionString = connectionString;
    this.pool = new pg.Pool({ connectionString, max: 20 });
    this.utils = await makeWorkerUtils({ pgPool: this.pool, logger });
    await this.utils.migrate();
  }

  async clear() {
    await this.pool.query("truncate graphile_worker._private_jobs, graphile_worker._private_job_queues");
  }

  async enqueue(n) { await this.utils.addJob("q0", { n }); }

  async enqueueMany(numbers, delay, queues) {
    const runAt = delay ? new Date(Date.now() + 1000 * delay) : undefined;
    for (let start = 0; start < numbers.length; start += 10_000) {
      const mine = numbers.slice(start, start + 10_000);
      await this.utils.addJobs(mine.map((n) => ({ identifier: `q${n % queues}`, payload: { n }, runAt })));
    }
  }

  async begin(handler, queues) {
    const names = Array.from({ length: queues }, (_, queue) => `q${queue}`);
    this.runner = await run({
      preset: {
        worker: {
          connectionString: this.connectionString, concurrentJobs: 24, maxPoolSize: 25,
          localQueue: { size: 500 }, completeJobBatchDelay: 0, failJobBatchDelay: 0, logger,
        },
      },
      noHandleSignals: true,
      taskList: Object.fromEntries(names.map((name) => [name, ({ n }) => handler(n)])),
    });
  }

  async end() { await this.runner.stop(); }

  async left() {
    const { rows } = await this.pool.query("select count(*)::int as count from graphile_worker._private_jobs");
    return rows[0].count;
  }

  async close() {
    await this.utils.release();
    await this.pool.end();
  }
}

await new Contest(new Graphile()).converse();
