// Other people's SSE clients against the real server, directly, over its own TLS, and through the proxies of deploy/.
//
//   node tests/clients.mjs target/release/kiss-vdb deploy
//
// Chromium's EventSource and @microsoft/fetch-event-source (in pages of another origin), the npm packages eventsource and
// eventsource-client, and curl. Writers write a sequence while the server is killed and restarted; every client comes back
// by its own means; the oracle is what was acknowledged. Needs the packages of tests/package.json, Chromium (CHROMIUM, default
// /usr/bin/chromium), openssl, curl, nginx, haproxy and caddy.
import assert from 'node:assert/strict';
import { execFileSync, spawn } from 'node:child_process';
import { mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { createServer } from 'node:http';
import { createRequire } from 'node:module';
import { createServer as createTcpServer } from 'node:net';
import { tmpdir } from 'node:os';
import { dirname, join } from 'node:path';
import { EventSource as NpmEventSource } from 'eventsource';
import { createEventSource } from 'eventsource-client';
import { chromium } from 'playwright-core';

const [binary, deploy] = process.argv.slice(2);
assert(binary && deploy, 'usage: node tests/clients.mjs BINARY DEPLOY_DIR');
const dir = mkdtempSync(join(tmpdir(), 'kiss-clients-'));
const children = new Set();
const closers = [];

// Tools.

async function until(what, check, ms = 15000) {
  const end = Date.now() + ms;
  let last;
  while (Date.now() < end) {
    if ((last = await check())) return last;
    await new Promise((done) => setTimeout(done, 25));
  }
  throw new Error(`never: ${typeof what === 'function' ? what() : what}`);
}

/** A free port below those the kernel gives to connections: nobody takes it while its server is down. */
async function freePort() {
  for (;;) {
    const port = 20000 + Math.floor(Math.random() * 12000);
    const server = createTcpServer();
    const free = await new Promise((done) => server.once('error', () => done(false)).listen(port, '127.0.0.1', () => server.close(() => done(true))));
    if (free) return port;
  }
}

function run(command, args, options = {}) {
  const child = spawn(command, args, { stdio: ['ignore', 'pipe', 'pipe'], ...options });
  children.add(child);
  child.text = '';
  child.stderr.on('data', (chunk) => { child.text += chunk; });
  child.ended = new Promise((done) => child.once('exit', (code, signal) => { children.delete(child); done(code ?? signal); }));
  child.once('error', (e) => { child.text += e; });
  return child;
}

async function call(base, method, path, body) {
  const headers = body === undefined ? {} : { 'Content-Type': 'application/json' };
  const response = await fetch(base + path, { method, headers, body: body === undefined ? undefined : JSON.stringify(body) });
  const text = await response.text();
  if (!response.ok) throw Object.assign(new Error(`${method} ${path}: ${response.status} ${text}`), { status: response.status });
  return text.startsWith('{') ? JSON.parse(text) : text;
}

/** A server that can be killed and started again on its port. */
class Server {
  constructor(port, data, env = {}) {
    Object.assign(this, { port, data, env, url: `http://127.0.0.1:${port}`, isUp: false });
  }

  async start() {
    const args = ['serve', '--port', `${this.port}`, '--data-dir', this.data, '--max-log-mb', '2', '--snapshot-interval', '0', '--log-level', 'warn'];
    this.child = run(binary, args, { env: { ...process.env, ...this.env } });
    let banner = '';
    this.child.stdout.on('data', (chunk) => { banner += chunk; });
    await until(() => `the server on ${this.port}: ${this.child.text}`, () => banner.includes('ready at'));
    this.isUp = true;
    return this;
  }

  kill() {
    this.isUp = false;
    this.child.kill('SIGKILL');
    return this.child.ended;
  }

  async stop() {
    this.isUp = false;
    this.child.kill('SIGTERM');
    assert.equal(await this.child.ended, 0, `an orderly stop: ${this.child.text}`);
  }

  /** Writes what no client watches until the log no longer reaches back to `revision`. */
  async compact(revision, base = this.url) {
    for (let n = 0; (await call(base, 'GET', '/v1/health')).oldest <= revision; n++) {
      assert(n < 40, 'the log is not shortened');
      for (let i = 0; i < 4; i++) await call(base, 'PUT', `/v1/state/bulk:${i}`, { value: 'x'.repeat(400_000) + n });
      await call(base, 'POST', '/v1/admin/snapshot');
    }
  }
}

/** Writes the sequence and knows what of it was acknowledged. */
class Writer {
  acked = new Map(); // revision -> text
  unsure = new Set(); // sent, and not answered because the server died
  next = 0;

  constructor(server) { this.server = server; }

  get last() { return Math.max(...this.acked.keys()); }

  async step() {
    const n = this.next++;
    for (;;) {
      try {
        if (n % 10 === 9) {
          const ops = [0, 1, 2].map((part) => ({ op: 'put', key: `seq:${n}`, value: `${n}.${part}` }));
          const { results } = await call(this.server.url, 'POST', '/v1/batch', { ops });
          results.forEach(({ revision }, part) => this.acked.set(revision, `${n}.${part}`));
        } else {
          const { revision } = await call(this.server.url, 'PUT', `/v1/state/seq:${n}`, { value: `${n}.0` });
          this.acked.set(revision, `${n}.0`);
        }
        return;
      } catch (e) {
        if (e.status) throw e;
        this.unsure.add(n);
        await until('the server again', () => this.server.isUp);
      }
    }
  }

  /** Four at a time, so that the log orders what was sent at once. */
  async write(count) {
    const end = this.next + count;
    await Promise.all([1, 2, 3, 4].map(async () => { while (this.next < end) await this.step(); }));
  }
}

/**
 * The oracle: every acknowledged revision after `after`, once, in order, as it was written. `others` are the revisions of
 * other writers. What was sent and never answered may be there, once for each time it was sent.
 */
function check(events, { after, last, acked, unsure, others = new Set() }) {
  const seen = new Set();
  let before = after;
  for (const { id, revision, text } of events) {
    assert.equal(id, revision, 'the id is the revision');
    assert(id > before, `${id} after ${before}: twice or out of order`);
    if (acked.has(id)) assert.equal(text, acked.get(id), `revision ${id}`);
    else assert(unsure.has(Number.parseInt(text, 10)), `${text} was never written as revision ${id}`);
    seen.add(id);
    before = id;
  }
  for (let revision = after + 1; revision <= last; revision++) {
    assert(seen.has(revision) || others.has(revision), `revision ${revision} is missing`);
  }
  assert.equal(before, events.length ? last : before, 'nothing beyond the last');
}

/** The oracle must see through these, or it proves nothing. */
function checkTheOracle(events, facts) {
  const half = events.length >> 1;
  const [before, one, two, after] = [events.slice(0, half), events[half], events[half + 1], events.slice(half + 2)];
  const broken = {
    dropped: [...before, two, ...after],
    'first dropped': events.slice(1),
    'last dropped': events.slice(0, -1),
    doubled: [...before, one, one, two, ...after],
    swapped: [...before, two, one, ...after],
    altered: [...before, { ...one, text: '7.7' }, two, ...after],
    renumbered: [...before, { ...one, revision: 1 }, two, ...after],
  };
  for (const [name, list] of Object.entries(broken)) assert.throws(() => check(list, facts), assert.AssertionError, name);
}

// Clients. Each fills `log` with { kind: 'open' | 'event' | 'error', … }.

const TYPES = ['state_updated', 'reset'];

class Client {
  log = [];
  /** Whether it takes the id of a frame that has nothing else, such as a heartbeat; HTML says it must. */
  takesBareIds = true;

  constructor(name) { this.name = name; }

  async pull() {}

  push(entry) { this.log.push({ at: Date.now(), ...entry }); }

  get opens() { return this.log.filter((e) => e.kind === 'open').length; }

  /** Events since the last call, parsed. Resets are kept apart. */
  get all() {
    return this.log.filter((e) => e.kind === 'event' && e.data).map(({ type, id, data, at }) => {
      const parsed = JSON.parse(data);
      return { type, id: Number(id), revision: parsed.revision, text: parsed.value, at, data: parsed };
    });
  }

  get events() { return this.all.filter((e) => e.type !== 'reset'); }

  get resets() { return this.all.filter((e) => e.type === 'reset'); }

  get at() { return this.all.at(-1)?.id ?? 0; }
}

function npmEventSource(name, url) {
  const client = Object.assign(new Client(name), { takesBareIds: false });
  const source = new NpmEventSource(url);
  source.onopen = () => client.push({ kind: 'open' });
  source.onerror = (e) => client.push({ kind: 'error', closed: source.readyState === 2, data: e.message });
  for (const type of TYPES) source.addEventListener(type, (e) => client.push({ kind: 'event', type, id: e.lastEventId, data: e.data }));
  closers.push(() => source.close());
  return client;
}

function npmEventSourceClient(name, url) {
  const client = Object.assign(new Client(name), { takesBareIds: false });
  const source = createEventSource({
    url,
    onConnect: () => client.push({ kind: 'open' }),
    onDisconnect: () => client.push({ kind: 'error' }),
    onMessage: ({ event, id, data }) => client.push({ kind: 'event', type: event, id, data }),
  });
  closers.push(() => source.close());
  return client;
}

/** curl -N, started again with the last id for as long as the test goes on. */
function curl(name, url, args = []) {
  const client = new Client(name);
  let [last, retry, isOver] = ['', 1000, false];
  closers.push(() => { isOver = true; });
  (async () => {
    while (!isOver) {
      const resume = last ? ['-H', `Last-Event-ID: ${last}`] : [];
      const child = run('curl', ['-sS', '-N', '--fail', '-H', 'Accept: text/event-stream', ...resume, ...args, url]);
      let [rest, isOpen] = ['', false];
      child.stdout.setEncoding('utf8').on('data', (chunk) => {
        const at = Date.now();
        if (!isOpen) client.push({ kind: 'open' });
        isOpen = true;
        const frames = (rest + chunk).split('\n\n');
        rest = frames.pop(); // a torn frame is none
        for (const frame of frames) {
          const fields = Object.fromEntries(frame.split('\n').map((line) => line.split(/: (.*)/s, 2)));
          if (fields.id !== undefined) last = fields.id;
          if (fields.retry) retry = Number(fields.retry);
          client.push({ kind: fields.data ? 'event' : 'frame', type: fields.event, id: fields.id, data: fields.data, at });
        }
      });
      const code = await child.ended;
      client.push({ kind: 'error', data: `curl ended with ${code}: ${child.text}` });
      await new Promise((done) => setTimeout(done, retry));
    }
  })();
  return client;
}

// In pages. The log is kept there and fetched.

function openEventSource([url, types]) {
  window.log = [];
  const source = (window.source = new EventSource(url));
  source.onopen = () => window.log.push({ kind: 'open' });
  source.onerror = () => window.log.push({ kind: 'error', closed: source.readyState === 2 });
  for (const type of types) {
    source.addEventListener(type, (e) => window.log.push({ kind: 'event', type, id: e.lastEventId, data: e.data, at: Date.now() }));
  }
}

async function openFetchEventSource([url, headers]) {
  window.log = [];
  const { fetchEventSource } = await import('/fetch-event-source/index.js');
  fetchEventSource(url, {
    openWhenHidden: true,
    headers,
    async onopen(response) {
      if (!response.ok) throw new Error(`status ${response.status}: ${await response.text()}`);
      window.log.push({ kind: 'open' });
    },
    // It hands over frames without data too, which HTML forbids.
    onmessage: (m) => m.data && window.log.push({ kind: 'event', type: m.event, id: m.id, data: m.data, at: Date.now() }),
    // It takes an orderly end for the end, unless told.
    onclose() { throw new Error('ended'); },
    onerror: (e) => { window.log.push({ kind: 'error', data: String(e) }); },
  });
}

async function inPage(name, context, at, how, ...args) {
  const page = await context.newPage();
  await page.goto(at);
  await page.evaluate(how, args);
  const client = Object.assign(new Client(name), { page });
  client.pull = async () => { client.log.push(...await page.evaluate(() => window.log.splice(0))); };
  return client;
}

/** Pages of an origin of their own, and the package they import. */
async function pages() {
  const folder = join(dirname(createRequire(import.meta.url).resolve('@microsoft/fetch-event-source')), '..', 'esm');
  const server = createServer((request, response) => {
    const [, name] = /^\/fetch-event-source\/(\w+)/.exec(request.url) ?? [];
    response.setHeader('Content-Type', name ? 'text/javascript' : 'text/html');
    response.end(name ? readFileSync(join(folder, `${name}.js`)) : '<!doctype html><title>a page of another origin</title>');
  });
  await new Promise((done) => server.listen(0, done));
  closers.push(() => server.close());
  return server.address().port;
}

const pull = (clients) => Promise.all(clients.map((c) => c.pull()));
const late = (clients, holds) => clients.filter((c) => !holds(c)).map((c) => `${c.name} at ${c.at}: ${JSON.stringify(c.log.slice(-3))}`).join('\n');

/** Waits until `holds` for each client. */
async function each(what, clients, holds, ms) {
  await until(() => `${what}\n${late(clients, holds)}`, async () => { await pull(clients); return clients.every(holds); }, ms);
}

const browser = await chromium.launch({
  executablePath: process.env.CHROMIUM ?? '/usr/bin/chromium',
  args: ['--no-sandbox', '--disable-gpu', '--no-first-run', '--disable-background-networking', '--host-resolver-rules=MAP db.example.com 127.0.0.1'],
});
const pagePort = await pages();
const origin = `http://127.0.0.1:${pagePort}`;

async function direct() {
  const data = join(dir, 'direct');
  const server = await new Server(await freePort(), data, { CORS_ORIGINS: origin }).start();
  const { url } = server;
  let { revision: first } = await call(url, 'PUT', '/v1/state/before', { value: 1 });
  const writer = new Writer(server);
  const others = new Set();

  // Six tabs have a profile of their own: a browser opens six connections to a host over HTTP/1.1.
  const [tabs, context] = await Promise.all([browser.newContext(), browser.newContext()]);
  const to = (query) => `${url}/v1/events?heartbeat_ms=1000&${query}`;
  // `since` is for those who forget the ids of bare frames: without it they would come back without any id, if the server
  // went before their first event, and start at the head.
  const seq = to('prefix=seq:');
  const loud = [
    ...await Promise.all([1, 2, 3, 4, 5, 6].map((n) => inPage(`tab ${n}`, tabs, origin, openEventSource, seq, TYPES))),
    await inPage('fetch-event-source', context, origin, openFetchEventSource, seq, {}),
    npmEventSource('eventsource', `${seq}&since=${first}`),
    npmEventSourceClient('eventsource-client', `${seq}&since=${first}`),
    curl('curl', seq),
  ];
  const quiet = [
    await inPage('quiet tab', context, origin, openEventSource, to('key=quiet'), TYPES),
    await inPage('quiet fetch-event-source', context, origin, openFetchEventSource, to('key=quiet'), {}),
    curl('quiet curl', to('key=quiet')),
    npmEventSource('quiet eventsource', to(`key=quiet&since=${first}`)),
    npmEventSourceClient('quiet eventsource-client', to(`key=quiet&since=${first}`)),
  ];
  const clients = [...loud, ...quiet];
  const opened = (n) => each(`${n} times open`, clients, (c) => c.opens >= n);
  await opened(1);
  const forget = () => clients.forEach((c) => c.log.splice(0));

  /** Loud clients have everything after `first`, each its own way. */
  const settled = async (what) => {
    const facts = { last: writer.last, acked: writer.acked, unsure: writer.unsure, others };
    await each(what, loud, (c) => c.at >= facts.last);
    for (const client of loud) {
      const after = client.resets.at(-1)?.id ?? first;
      const events = client.events.filter((e) => e.id > after);
      try { check(events, { ...facts, after }); } catch (e) { throw new Error(`${client.name}, ${what}: ${e.message}`); }
      checkTheOracle(events, { ...facts, after });
    }
  };

  await step('a seventh stream of one profile waits for one of six to go', async () => {
    const seventh = await inPage('seventh tab', tabs, origin, openEventSource, to('key=none'), TYPES);
    const plain = await context.newPage();
    await plain.goto(origin);
    // The other profile has room, so the server would answer.
    assert.equal(await plain.evaluate((at) => fetch(at).then((r) => r.status), `${url}/v1/health`), 200);
    await seventh.pull();
    assert.equal(seventh.opens, 0);
    const sixth = loud[5];
    await sixth.page.close();
    await each('the seventh opens', [seventh], (c) => c.opens === 1);
    await seventh.page.close();
    loud[5] = await inPage('tab 6', tabs, origin, openEventSource, seq, TYPES);
    clients[5] = loud[5];
    await each('six', [loud[5]], (c) => c.opens === 1);
  });

  await step('killed twice in the midst of writes: nothing lost, nothing twice', async () => {
    for (let round = 1; round <= 2; round++) {
      const writing = writer.write(300);
      const goal = writer.acked.size + 150;
      // Killed while events are on their way to clients that have some of them.
      await each('some', loud, (c) => c.events.length > 0);
      await until('half', () => writer.acked.size >= goal);
      await server.kill();
      await server.start();
      await writing;
      await opened(round + 1);
    }
    await settled('two kills');
    const kills = clients.every((c) => c.log.some((e) => e.kind === 'error') || c.opens === 3);
    assert(kills, 'each client noticed');
    assert(clients.every((c) => c.resets.length === 0 && !c.log.some((e) => e.closed)), 'no reset, none gave up');
    assert(quiet.every((c) => c.events.length === 0));
    console.log(`     ${writer.acked.size} acknowledged, ${writer.unsure.size} unsure, ${loud.length} clients`);
  });

  await step('heartbeats move the id, so a quiet client does not fall behind the log', async () => {
    await settled('before');
    first = writer.last;
    forget();
    await server.compact(first);
    const { revision: head, oldest } = await call(url, 'GET', '/v1/health');
    for (let revision = first + 1; revision <= head; revision++) others.add(revision);
    // A heartbeat comes after a second of silence. Who begins now has its second one after everybody's first.
    const observer = curl('observer', to('key=none'));
    await each('two heartbeats', [observer], (c) => c.log.filter((e) => e.kind === 'frame' && Number(e.id) >= head).length >= 3);
    assert(observer.log.every((e) => e.kind !== 'event'));
    await server.kill();
    await server.start();
    await opened(1);
    await each('reset', clients, (c) => c.takesBareIds || c.resets.length === 1);
    for (const client of clients) {
      // npm's eventsource 3 and eventsource-client forget bare ids: they are told what they missed, aloud.
      assert.equal(client.resets.length, client.takesBareIds ? 0 : 1, client.name);
      for (const { data: reset } of client.resets) {
        assert.deepEqual([reset.reason, reset.oldest >= oldest, reset.requested <= first], ['compacted', true, true], client.name);
      }
    }
    others.add((await call(url, 'PUT', '/v1/state/quiet', { value: 'hush' })).revision);
    await writer.write(30);
    await settled('after the log was shortened');
    await each('hush', quiet, (c) => c.events.length === 1);
    assert(quiet.every((c) => c.events[0].text === 'hush'));
  });

  await step('an orderly stop, and a log that no longer reaches back: reset, compacted', async () => {
    first = writer.last;
    const at = new Map(clients.map((c) => [c, c.at]));
    forget();
    await server.stop();
    const elsewhere = await new Server(await freePort(), data).start();
    await elsewhere.compact(first);
    await elsewhere.stop();
    await server.start();
    const { revision: head, oldest } = await call(url, 'GET', '/v1/health');
    for (let revision = first + 1; revision <= head; revision++) others.add(revision);
    await each('reset', clients, (c) => c.resets.length > 0);
    for (const client of clients) {
      const [{ data: reset, id }, ...more] = client.resets;
      assert.deepEqual([reset.reason, reset.oldest, reset.head, id, more.length], ['compacted', oldest, head, head, 0], client.name);
      // Its last event, or a heartbeat after it.
      assert(reset.requested >= at.get(client) && reset.requested <= first, `${client.name}: ${reset.requested}`);
      if (!client.takesBareIds) assert.equal(reset.requested, at.get(client), client.name);
    }
    await writer.write(30);
    await settled('after compacted');
  });

  await step('another database at the same address: reset, future', async () => {
    forget();
    await server.kill();
    server.data = join(dir, 'another');
    await server.start();
    await each('reset', clients, (c) => c.resets.length > 0);
    for (const client of clients) {
      const [{ data: reset }, ...more] = client.resets;
      assert.deepEqual([reset.reason, reset.head, more.length, reset.requested > 0], ['future', 0, 0, true], client.name);
    }
    writer.acked.clear();
    writer.unsure.clear();
    others.clear();
    await writer.write(30);
    await settled('after future');
  });

  await step('pages of listed origins may call, with a key too; others may not', async () => {
    const locked = await new Server(await freePort(), join(dir, 'locked'), { CORS_ORIGINS: `https://app.example,${origin}`, API_KEY: 'open sesame' }).start();
    const target = `${locked.url}/v1/events`;
    const with_ = (key) => ({ authorization: `Bearer ${key}`, 'last-event-id': '0' });
    const listed = await inPage('listed', context, origin, openFetchEventSource, target, with_('open sesame'));
    const wrong = await inPage('wrong key', context, origin, openFetchEventSource, target, with_('wrong'));
    // The same page under another name is another origin.
    const foreign = await inPage('foreign', context, `http://localhost:${pagePort}`, openFetchEventSource, target, with_('open sesame'));
    const plain = await inPage('foreign EventSource', context, `http://localhost:${pagePort}`, openEventSource, `${url}/v1/events`, TYPES);
    await each('open', [listed], (c) => c.opens === 1);
    const put = ([at, key]) => fetch(`${at}/v1/state/k`, { method: 'PUT', headers: { 'content-type': 'application/json', authorization: `Bearer ${key}`, 'if-none-match': '*' }, body: '{"value":"from a page"}' })
      .then(async (r) => [r.status, r.headers.get('etag'), (await r.json()).revision], (e) => [e.name]);
    assert.deepEqual(await listed.page.evaluate(put, [locked.url, 'open sesame']), [201, '"1"', 1]);
    assert.deepEqual((await listed.page.evaluate(put, [locked.url, 'wrong']))[0], 401, 'a refusal can be read');
    assert.deepEqual(await foreign.page.evaluate(put, [locked.url, 'open sesame']), ['TypeError']);
    await each('the event', [listed], (c) => c.events.length === 1);
    await each('refused', [wrong], (c) => c.log.some((e) => e.data?.includes('status 401')));
    await each('kept out', [foreign, plain], (c) => c.log.some((e) => e.kind === 'error'));
    assert.equal(foreign.opens + plain.opens, 0);
    const preflight = await fetch(`${locked.url}/v1/state/k`, { method: 'OPTIONS', headers: { Origin: origin, 'Access-Control-Request-Method': 'PATCH', 'Access-Control-Request-Headers': 'last-event-id' } });
    assert.equal(preflight.headers.get('access-control-allow-origin'), origin);
    await locked.stop();
  });

  await Promise.all([tabs.close(), context.close()]);
  await server.stop();
}

// Through proxies.

/** The file of deploy/, with other ports, names and timeouts, and nothing else changed. */
function configuration(file, changes) {
  let text = readFileSync(join(deploy, file), 'utf8');
  for (const [from, to] of changes) {
    assert(text.includes(from), `${file} has no ${from}`);
    text = text.replaceAll(from, to);
  }
  return text;
}

const proxies = {
  nginx(at, port, backend, patience) {
    const text = configuration('nginx.conf', [
      ['127.0.0.1:9917', backend], ['443 ssl', `127.0.0.1:${port} ssl`], ['/etc/ssl/db.example.com', join(dir, 'db')], ...patience ? [['5m', patience]] : [],
    ]);
    writeFileSync(join(at, 'site.conf'), text);
    const temp = ['client_body', 'proxy', 'fastcgi', 'uwsgi', 'scgi'].map((n) => `${n}_temp_path ${at}/${n};`).join(' ');
    writeFileSync(join(at, 'nginx.conf'), `daemon off; pid ${at}/pid; error_log stderr; worker_processes 1; events {} http { access_log off; ${temp} include ${at}/site.conf; }`);
    return ['nginx', ['-p', at, '-e', 'stderr', '-c', join(at, 'nginx.conf')]];
  },
  haproxy(at, port, backend, patience) {
    writeFileSync(join(at, 'haproxy.cfg'), configuration('haproxy.cfg', [
      ['127.0.0.1:9917', backend], ['bind :443', `bind 127.0.0.1:${port}`], ['/etc/haproxy/db.example.com.pem', join(dir, 'both.pem')],
      ['/etc/haproxy/away.http', join(deploy, 'away.http')], ...patience ? [['5m', patience]] : [],
    ]));
    return ['haproxy', ['-db', '-f', join(at, 'haproxy.cfg')]];
  },
  caddy(at, port, backend) {
    const text = configuration('Caddyfile', [
      ['127.0.0.1:9917', backend], ['db.example.com {', `db.example.com:${port} {\n\tbind 127.0.0.1\n\ttls ${dir}/db.pem ${dir}/db.key`],
    ]);
    writeFileSync(join(at, 'Caddyfile'), `{\n\tadmin off\n\tauto_https disable_redirects\n\tskip_install_trust\n}\n${text}`);
    return ['caddy', ['run', '--adapter', 'caddyfile', '--config', join(at, 'Caddyfile')], { env: { ...process.env, HOME: at, XDG_DATA_HOME: at, XDG_CONFIG_HOME: at } }];
  },
};

/** Starts a proxy and waits until it answers for the server. */
async function proxy(name, server, { patience } = {}) {
  const port = await freePort();
  const at = mkdtempSync(join(dir, `${name}-`));
  const [command, args, options] = proxies[name](at, port, `127.0.0.1:${server.port}`, patience);
  const child = run(command, args, options);
  const url = `https://db.example.com:${port}`;
  await until(() => `${name}: ${child.text}`, async () => (await ask(`${url}/v1/health`)).status === 200);
  return { name, url, child };
}

/** For curl: where the name is, and whom to trust. */
const tls = ['--connect-to', 'db.example.com::127.0.0.1:', '--cacert', join(dir, 'db.pem')];

/** One request by curl, over TLS that is verified. */
async function ask(url, ...args) {
  const child = run('curl', ['-sS', ...tls, '--max-time', '10', '-w', '\n%{http_code} %{http_version} %{content_type}', ...args, url]);
  let text = '';
  child.stdout.setEncoding('utf8').on('data', (chunk) => { text += chunk; });
  await new Promise((done) => child.once('close', done));
  const [, body, status, version, type] = /^(.*)\n(\d+) (\S+) (.*)$/s.exec(text);
  return { body, status: Number(status), version, type };
}

async function overOwnTls() {
  await step("the server's own HTTPS, with a token: eight streams of one profile survive a kill", async () => {
    const server = await new Server(await freePort(), join(dir, 'secure'), { TLS_CERT: join(dir, 'db.pem'), TLS_KEY: join(dir, 'db.key'), API_KEY: 'open sesame' }).start();
    const url = `https://db.example.com:${server.port}`;
    const ask_ = async (method, path, body) => {
      const { status, body: text } = await ask(url + path, '-X', method, '-H', 'Authorization: Bearer open sesame', '-H', 'Content-Type: application/json', '-d', JSON.stringify(body));
      assert([200, 201].includes(status), `${method} ${path}: ${status} ${text}`);
      return JSON.parse(text);
    };
    const { token } = await ask_('POST', '/v1/token', { prefixes: ['seq:'] });
    const context = await browser.newContext({ ignoreHTTPSErrors: true });
    const query = `/v1/events?prefix=seq:&access_token=${token}`;
    // Health needs no key, so its answer is the page: of the same origin.
    const eight = await Promise.all([1, 2, 3, 4, 5, 6, 7, 8].map((n) => inPage(`tab ${n}`, context, `${url}/v1/health`, openEventSource, query, TYPES)));
    const facts = { after: 0, acked: new Map(), unsure: new Set() };
    for (let round = 1; round <= 2; round++) {
      await each(`${round} times open`, eight, (c) => c.opens === round);
      for (let n = 0; n < 10; n++) facts.acked.set((await ask_('PUT', `/v1/state/seq:${n}`, { value: `${round}.${n}` })).revision, `${round}.${n}`);
      facts.last = Math.max(...facts.acked.keys());
      await each('everything', eight, (c) => c.at >= facts.last);
      if (round === 1) await server.kill().then(() => server.start());
    }
    assert.equal(facts.acked.size, 20);
    for (const client of eight) check(client.events, facts);
    checkTheOracle(eight[0].events, facts);
    const stranger = await inPage('no token', context, `${url}/v1/health`, openEventSource, '/v1/events', TYPES);
    await each('refused', [stranger], (c) => c.log.some((e) => e.closed));
    await context.close();
    await server.stop();
  });
}

async function throughProxies() {
  const server = await new Server(await freePort(), join(dir, 'proxied'), { ALLOWED_HOSTS: 'db.example.com' }).start();
  const running = await Promise.all(Object.keys(proxies).map((name) => proxy(name, server)));
  const context = await browser.newContext({ ignoreHTTPSErrors: true });
  const { revision: first } = await call(server.url, 'PUT', '/v1/state/before', { value: 1 });
  const writer = new Writer(server);
  const query = '/v1/events?prefix=seq:&heartbeat_ms=1000';
  const clients = [];
  for (const { name, url } of running) {
    // Eight in one profile: over HTTP/2 they share a connection. Some answer of the server is the page, for its origin.
    const eight = [1, 2, 3, 4, 5, 6, 7, 8].map((n) => inPage(`${name}, tab ${n}`, context, `${url}/v1/health`, openEventSource, query, TYPES));
    clients.push(...await Promise.all(eight), curl(`${name}, curl over HTTP/1.1`, url + query, [...tls, '--http1.1']), curl(`${name}, curl over HTTP/2`, url + query, [...tls, '--http2']));
  }
  await each('open', clients, (c) => c.opens >= 1, 30000);

  await step('through proxies: each event arrives at once', async () => {
    const acked = new Map();
    for (let n = 0; n < 20; n++) {
      await writer.write(1);
      acked.set(writer.last, Date.now());
      await each(`event ${n}`, clients, (c) => c.at >= writer.last, 1500);
    }
    for (const { name } of running) {
      const delays = clients.filter((c) => c.name.startsWith(name)).flatMap((c) => c.events.filter((e) => acked.has(e.id)).map((e) => e.at - acked.get(e.id)));
      assert(delays.length >= 200);
      const worst = Math.max(...delays);
      assert(worst < 1000, `${name}: ${worst} ms`);
      console.log(`     ${name}: at most ${worst} ms after the answer to the write`);
    }
  });

  await step('through proxies: paths and names arrive as they were sent', async () => {
    for (const { name, url } of running) {
      const path = '/v1/state/a%2Fb%20%25c/d%3Fe';
      const put = await ask(url + path, '-X', 'PUT', '-H', 'Content-Type: application/json', '-d', '{"value":1}');
      assert.equal(put.status, name === 'nginx' ? 201 : 200, `${name}: ${put.body}`);
      assert.equal(JSON.parse(put.body).key, 'a/b %c/d?e', name);
      assert.equal((await ask(`${url}/v1/health`, '--http2')).version, '2', name);
      // A page writes to where it came from, port and all: an open server refuses those of other origins.
      const { page } = clients.find((c) => c.name.startsWith(name));
      const written = (at) => page.evaluate((to) => fetch(to, { method: 'PUT', body: '{"value":1}' }).then((r) => r.status), at);
      assert.equal(await written('/v1/state/own'), name === 'nginx' ? 201 : 200, name);
      // Caddy does not serve names it does not know.
      if (name !== 'caddy') assert.equal((await ask(`${url}/v1/health`, '-H', 'Host: other.example.com')).status, 403, name);
    }
  });

  await step('through proxies: a killed server comes back, and browsers with it', async () => {
    await server.kill();
    await Promise.all(running.map(async ({ name, url }) => {
      const stream = await ask(url + query, '-H', 'Accept: text/event-stream');
      assert.deepEqual([stream.status, stream.type, stream.body], [200, 'text/event-stream', 'retry: 1000\n\n'], `${name}: a stream is told to come back`);
      // Whoever does not ask for a stream must be told the truth, and a write above all. (Over HTTP/1.1, because curl takes an
      // answer that comes before it has sent the body for a broken stream.)
      for (const args of [['-H', 'Accept: application/json'], ['--http1.1', '-X', 'POST', '-H', 'Accept: text/event-stream', '-d', '{"type":"a"}']]) {
        const { status, body } = await ask(url + query, ...args);
        assert([502, 503, 504].includes(status), `${name}, ${args}: ${status} ${body}`);
      }
    }));
    // Every browser has met the proxy without its server.
    await each('away', clients.filter((c) => c.page), (c) => c.opens >= 2);
    await server.start();
    await writer.write(100);
    await each('resumed', clients, (c) => c.at >= writer.last);
    const others = new Set();
    for (let revision = first + 1; revision <= writer.last; revision++) if (!writer.acked.has(revision)) others.add(revision);
    for (const client of clients) {
      const facts = { after: first, last: writer.last, acked: writer.acked, unsure: writer.unsure, others };
      try { check(client.events, facts); } catch (e) { throw new Error(`${client.name}: ${e.message}`); }
      assert(client.resets.length === 0 && !client.log.some((e) => e.closed), client.name);
      checkTheOracle(client.events, facts);
    }
  });

  await step('through proxies: heartbeats keep a quiet stream open', async () => {
    // Proxies that cut after 3 s of silence stand for five minutes. Caddy has no such timeout.
    await Promise.all(['nginx', 'haproxy'].map(async (name) => {
      const { url, child } = await proxy(name, server, { patience: '3s' });
      const beating = curl(`${name}, beating`, `${url}/v1/events?key=none&heartbeat_ms=1000`, tls);
      const silent = curl(`${name}, silent`, `${url}/v1/events?key=none&heartbeat_ms=60000`, tls);
      await each('cut', [silent], (c) => c.log.filter((e) => e.kind === 'error').length >= 2, 20000);
      assert.deepEqual(beating.log.filter((e) => e.kind === 'error'), [], name);
      assert(beating.log.filter((e) => e.kind === 'frame').length >= 5, name);
      child.kill();
    }));
  });

  await context.close();
  await server.stop();
}

/** Each step goes on where the one before left its clients. */
async function step(name, test) {
  const start = Date.now();
  try {
    await test();
  } catch (e) {
    throw new Error(name, { cause: e });
  }
  console.log(`ok   ${name} (${Date.now() - start} ms)`);
}

const subject = ['-subj', '/CN=db.example.com', '-addext', 'subjectAltName=DNS:db.example.com'];
const [certificate, secret] = [join(dir, 'db.pem'), join(dir, 'db.key')];
execFileSync('openssl', ['req', '-x509', '-newkey', 'rsa:2048', '-nodes', '-days', '2', ...subject, '-keyout', secret, '-out', certificate], { stdio: 'ignore' });
writeFileSync(join(dir, 'both.pem'), readFileSync(certificate, 'utf8') + readFileSync(secret, 'utf8'));

let failed = 0;
for (const part of [direct, overOwnTls, throughProxies]) {
  try {
    await part();
  } catch (e) {
    failed++;
    console.log('FAIL', e);
  }
  closers.splice(0).forEach((close) => close());
}
await browser.close();
// In order, because nginx that is killed leaves its workers behind.
for (const child of children) child.kill('SIGTERM');
try { await until('everybody ended', () => children.size === 0, 10000); } catch { for (const child of children) child.kill('SIGKILL'); }
rmSync(dir, { recursive: true, force: true });
process.exit(failed ? 1 : 0);
