// The console in a real browser, against a real server.
//
//   node tests/console.mjs target/release/kiss-vdb
//
// Needs playwright-core (found from here or through NODE_PATH) and a Chromium (CHROMIUM, default /usr/bin/chromium).
// CONSOLE_DIR=console tries those files in place of what is built into the binary; SHOTS=docs writes screenshots
// (with SHOTS_ONLY without the tests; ROOT is the repository, whose demo/ they show).
// Each test goes on where the one before left the page; all work against one server, which is killed and started again on
// the way. What the page shows is checked against what the API says.
import assert from 'node:assert/strict';
import { execFileSync, spawn } from 'node:child_process';
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import { tmpdir } from 'node:os';
import { join } from 'node:path';

const { chromium } = createRequire(import.meta.url)('playwright-core');
const binary = process.argv[2];
assert(binary, 'usage: node tests/console.mjs BINARY');
const dir = mkdtempSync(join(tmpdir(), 'kiss-console-'));
const servers = new Set();

/** Starts a server and waits for its banner. */
async function serve(args, env = {}) {
  const child = spawn(binary, ['serve', '--snapshot-interval', '0', ...args], { env: { ...process.env, ...env }, stdio: ['ignore', 'pipe', 'pipe'] });
  servers.add(child);
  const ended = new Promise((done) => child.once('exit', () => { servers.delete(child); done(); }));
  const url = await new Promise((done, fail) => {
    let text = '';
    const read = (chunk) => {
      text += chunk;
      const found = /ready at (http:\/\/\S+)/.exec(text);
      if (found) done(found[1]);
    };
    child.stdout.on('data', read);
    child.stderr.on('data', read);
    child.once('exit', () => fail(new Error(`the server ended: ${text}`)));
  });
  return { url, stop: (signal = 'SIGTERM') => { child.kill(signal); return ended; } };
}

const data = join(dir, 'data');
let server = await serve(['--port', '0', '--data-dir', data]);
const { url } = server;
const port = new URL(url).port;
async function api(method, path, body, type = 'application/json') {
  const res = await fetch(url + path, { method, headers: body === undefined ? {} : { 'Content-Type': type }, body: typeof body === 'string' ? body : JSON.stringify(body) });
  const text = await res.text();
  assert(res.ok, `${method} ${path}: ${res.status} ${text}`);
  return text;
}
const put = (key, value, more = {}) => api('PUT', `/v1/state/${encodeURIComponent(key)}`, { value, ...more });
const publish = (type, data, more = {}) => api('POST', '/v1/events', { type, data, ...more });

const browser = await chromium.launch({
  executablePath: process.env.CHROMIUM ?? '/usr/bin/chromium',
  args: ['--no-sandbox', '--disable-gpu', '--no-first-run', '--disable-background-networking'],
});
const errors = [];
let unloads = 0; // How often the browser asked whether a page may be left.
let forgiven = /(?!)/; // What the browser itself logs for answers that a test provokes.
async function open(context, at) {
  const page = await context.newPage();
  page.on('console', (m) => { if (m.type() === 'error' && !forgiven.test(m.text())) errors.push(`${m.text()} ${m.location().url}`); });
  page.on('pageerror', (e) => errors.push(String(e.stack)));
  page.on('dialog', (d) => { if (d.type() === 'beforeunload') unloads++; else errors.push(`dialog: ${d.message()}`); d.dismiss(); });
  page.on('request', (r) => { if (!r.url().startsWith(new URL(at).origin) && !r.url().startsWith('data:')) errors.push(`outside: ${r.url()}`); });
  if (process.env.CONSOLE_DIR) {
    await page.route((u) => u.pathname === '/' || u.pathname.startsWith('/console/'), async (route) => {
      const name = new URL(route.request().url()).pathname.slice('/console/'.length) || 'index.html';
      const type = { html: 'text/html', js: 'text/javascript', css: 'text/css' }[name.split('.').at(-1)];
      await route.fulfill({ body: readFileSync(join(process.env.CONSOLE_DIR, name), 'utf8'), headers: { 'Content-Type': type, 'Content-Security-Policy': POLICY } });
    });
  }
  page.setDefaultTimeout(10000);
  await page.goto(at);
  return page;
}
const POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";
const context = await browser.newContext({ viewport: { width: 1280, height: 820 }, colorScheme: 'light', permissions: ['clipboard-read', 'clipboard-write'] });
const page = await open(context, url + '/');
/** Another page, at a place of the same server. */
const aside = (hash) => open(context, `${url}/${hash}`);
/** What this server would answer. */
const refusal = (status, detail) => ({ status, contentType: 'application/problem+json', body: JSON.stringify({ detail, code: 'rate_limited' }) });
const text = (selector) => page.locator(selector).first().innerText();
const clipboard = () => page.evaluate(() => navigator.clipboard.readText());
const json = async (method, path, body) => JSON.parse(await api(method, path, body));
async function until(what, check, ms = 10000) {
  const end = Date.now() + ms;
  let last;
  while (Date.now() < end) {
    try { if (last = await check()) return last; } catch (e) { last = e; }
    await new Promise((done) => setTimeout(done, 40));
  }
  throw new Error(`never: ${what} (last: ${last})`);
}
const shows = (selector, pattern, ms) => until(`${selector} shows ${pattern}`, async () => pattern.test(await text(selector)), ms);
const view = (name) => page.click(`#tabs a:text-is("${name}")`);
const link = (wanted) => until(wanted, async () => await text('#pill-text') === wanted, 20000);
// The tree.
const keyName = (key) => page.locator(`#tree .name[title=${JSON.stringify(key)}]`);
const row = (key) => page.locator('#tree .node').filter({ has: page.locator(`.name[title=${JSON.stringify(key)}]`) });
const branch = (name) => page.locator('#tree .node[aria-expanded]').filter({ has: page.getByText(name, { exact: true }) });
const detail = (name) => page.locator(`#detail [name=${name}]`);
const prefix = async (p) => { await page.fill('#view-state [name=prefix]', p); await until('the address', () => new URL(page.url()).hash === (p ? `#state?${new URLSearchParams({ prefix: p })}` : '#state')); };
const saved = () => until('saved', async () => await page.locator('#detail [role=tab][aria-selected=true]').innerText() === 'Value');
/** How many pixels of a canvas are not empty. */
const inked = (selector) => page.evaluate((s) => { const c = document.querySelector(s), d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data; let n = 0; for (let i = 3; i < d.length; i += 4) n += d[i] > 0; return n; }, selector);

const tests = {
  async 'the server serves the console with a policy, types and tags'() {
    if (process.env.CONSOLE_DIR) return; // Nothing of it comes from the binary then.
    const home = await fetch(url + '/');
    assert.equal(home.headers.get('content-security-policy'), POLICY);
    const html = await home.text();
    for (const [, path] of html.matchAll(/(?:src|href)="(\/console\/[^"]+)"/g)) {
      const res = await fetch(url + path);
      assert.equal(res.status, 200, path);
      assert.match(res.headers.get('content-type'), path.endsWith('.css') ? /^text\/css/ : /^text\/javascript/);
      assert.equal(res.headers.get('x-content-type-options'), 'nosniff');
      const again = await fetch(url + path, { headers: { 'If-None-Match': res.headers.get('etag') } });
      assert.equal(again.status, 304, path);
    }
    assert.equal((await fetch(`${url}/console/nothing.js`)).status, 404);
    assert.equal((await fetch(`${url}/console/..%2findex.html`)).status, 404);
  },

  async 'overview: revision, rates, health, charts'() {
    await link('live');
    assert.equal(await text('h1'), 'KISS VDB');
    await until('a first minute', () => page.locator('#start').isVisible());
    const before = await inked('#chart-writes canvas');
    for (let i = 0; i < 40; i++) await put(`seed/${i}`, { i });
    await until('revision 40', async () => await text('#head') === '40', 4000);
    await shows('#chart-writes .figure', /^40\s*[\d.]+ writes\/s · peak [1-9]/);
    await until('no longer the first minute', () => page.locator('#start').isHidden());
    await shows('#tiles', /^keys\s*40\n/);
    await shows('#health', /healthy/);
    await shows('#durability', /durable: always/);
    await shows('#log-range', /log keeps 1 to 40/);
    await shows('#chart-fsync .figure', /^\d.*(µs|ms)\s*p99 · \d+ syncs/s);
    for (let i = 0; i < 30; i++) await api('GET', `/v1/state/${encodeURIComponent(`seed/${i}`)}`);
    await shows('#chart-reads .figure', /peak [1-9]/);
    await until('a curve', async () => await inked('#chart-writes canvas') > before + 200);
    assert.match(await page.getAttribute('#chart-memory canvas', 'aria-label'), /Memory: now process [\d.]+ MiB, keys/);
    const streams = /kiss_streams (\d+)/.exec(await api('GET', '/v1/metrics'))[1];
    await shows('#chart-streams .figure', new RegExp(`^${streams}\\s*open`));
    await page.hover('#chart-memory .chart', { position: { x: 300, y: 40 } });
  },

  async 'state: create, live changes, nothing runs'() {
    await view('State');
    await until('the only branch is open', async () => await row('seed/17').count() === 1);
    await until('a value', async () => (await row('seed/17').innerText()).includes('{"i":17}'));
    await page.click('#new-key');
    await detail('key').fill('job:1');
    await detail('value').fill('{"progress": 1.10, "big": 12345678901234567890, "html": "<img src=x onerror=alert(1)>", "__proto__": {"x": 1}}');
    await detail('meta').fill('{"job_id": "1", "tags": ["a", "b"]}');
    await page.click('#save');
    await until('the row', async () => (await row('job:1').innerText()).includes('<img src=x onerror=alert(1)>'));
    await shows('#badges', /revision 41.*job 1.*tag a.*tag b/s);
    assert.match(await api('GET', '/v1/state/job:1'), /"progress":1.10,"big":12345678901234567890/);
    await shows('#value', /"big": 12345678901234567890/);
    // A patch, a put and a delete by somebody else show without a reload.
    await api('PATCH', '/v1/state/job:1', { html: null, __proto__x: null, step: 2 }, 'application/merge-patch+json');
    await until('the patch in the row', async () => { const t = await row('job:1').innerText(); return t.includes('"step":2') && !t.includes('onerror'); });
    await shows('#value', /"step": 2/);
    await page.click('#tab-edit');
    await api('PATCH', '/v1/state/job:1', { step: 3 }, 'application/merge-patch+json');
    await until('an untouched editor follows', async () => (await detail('value').inputValue()).includes('"step": 3'));
    await put('job:0', 'first');
    await until('two of a branch', async () => /job:\s*2/.test(await branch('job:').innerText()));
    await branch('job:').click();
    await until('both', async () => await row('job:0').count() === 1 && await row('job:1').count() === 1);
    await api('DELETE', '/v1/state/job:0');
    await until('it goes', async () => await row('job:0').count() === 0);
    // Hostile names and values are text, in the tree, in the panel, everywhere.
    const hostile = '<img src=x onerror=alert(2)>"\'`${1}';
    await put(hostile, { '<b>': '</script><script>alert(3)</script>' }, { meta: { tags: ['<i>'] } });
    await keyName(hostile).click();
    await shows('#value', /<\/script><script>alert\(3\)/);
    await until('its name', async () => await text('#detail h2') === hostile);
    assert.equal(await page.locator('main img, main script, main b b').count(), 0);
    // Deep and long.
    let deep = 1;
    for (let i = 0; i < 120; i++) deep = { d: deep };
    await put('deep', deep);
    await put('long', 'x'.repeat(3_000_000));
    await keyName('deep').click();
    await shows('#value', /"d": \{ 1 \}/);
    await keyName('long').click();
    await shows('#value', /show all 3,000,002 characters/);
    assert((await text('#value')).length < 5000, 'a long value is cut until asked for');
    await page.keyboard.press('Escape');
  },

  async 'state: compare and set'() {
    await keyName('job:1').click();
    await page.click('#tab-edit');
    await detail('value').fill('{"mine": true}');
    await put('job:1', { theirs: true });
    await shows('#newer', /came in while you edit/);
    forgiven = /409/;
    await page.click('#save');
    await until('both values', async () => { const t = await text('#conflict'); return t.includes('"mine": true') && t.includes('"theirs": true'); });
    assert.match(await api('GET', '/v1/state/job:1'), /"theirs":true/, 'nothing was written');
    await page.click('text=Take theirs');
    await until('theirs', async () => (await detail('value').inputValue()).includes('theirs'));
    await detail('value').fill('{"mine": 2}');
    await put('job:1', { theirs: 2 });
    await shows('#newer', /came in/);
    await detail('value').press('Control+Enter');
    await page.click('text=Write mine over it');
    await until('mine', async () => (await json('GET', '/v1/state/job:1')).value.mine === 2);
    await saved();
    // A new key that exists already.
    await page.click('#new-key');
    await detail('key').fill('job:1');
    await detail('value').fill('0');
    await page.click('#save');
    await shows('#conflict', /"mine": 2/);
    await page.click('text=Take theirs');
    await shows('#detail h2', /^job:1$/);
    await detail('value').waitFor({ state: 'detached' });
    forgiven = /(?!)/;
  },

  async 'state: patch, deadline, history, delete'() {
    await page.click('#tab-patch');
    await detail('value').fill('{"patched": [1]}');
    await page.click('#save');
    await saved();
    assert.deepEqual((await json('GET', '/v1/state/job:1')).value, { mine: 2, patched: [1] });
    await page.click('#tab-edit');
    await detail('ends').selectOption('in');
    await detail('seconds').fill('100');
    await page.click('#save');
    await saved();
    await until('a deadline', async () => /^1m 3\ds$/.test(await row('job:1').locator('.ends').innerText()));
    const before = await row('job:1').locator('.ends').innerText();
    await until('it counts down', async () => await row('job:1').locator('.ends').innerText() !== before);
    await shows('#deadline', /ends in 1m 3\ds/);
    // An edit keeps the deadline and the labels unless told otherwise.
    const was = await json('GET', '/v1/state/job:1');
    await page.click('#tab-edit');
    await detail('value').fill('"again"');
    await page.click('#save');
    await saved();
    const now = await json('GET', '/v1/state/job:1');
    assert.equal(now.value, 'again');
    assert(Math.abs(now.expires_at_ms - was.expires_at_ms) < 2500, `${now.expires_at_ms} ${was.expires_at_ms}`);
    await put('job:2', 1, { ttl_ms: 1500 });
    await until('it appears', async () => await row('job:2').count() === 1);
    await until('it ends', async () => await row('job:2').count() === 0);
    // Everything that happened to the key, as the log has it.
    const { events: log } = JSON.parse(await (await fetch(`${url}/v1/events?since=0&key=job:1&limit=1000`, { headers: { Accept: 'application/json' } })).text());
    await page.click('#tab-history');
    await until('all changes', async () => await page.locator('#history .change').count() === log.length);
    assert.match(await page.locator('#history .change').last().innerText(), /created\s*#41/);
    await put('job:1', 'again', { ttl_ms: 100_000 });
    await until('the newest comes to it', async () => await page.locator('#history .change').count() === log.length + 1);
    await page.locator('#history .change summary').last().click();
    await page.click('#history >> text=Edit from this value');
    await until('the first value', async () => (await detail('value').inputValue()).includes('onerror=alert(1)'));
    await page.click('#tab-value');
    await page.click('#delete');
    await page.click('text=Really delete?');
    await until('it goes', async () => await row('job:1').count() === 0);
    await page.click('#unsaved >> text=Discard it'); // The edit from the history is still there.
    await until('#detail is gone', () => page.locator('#detail').isHidden());
    await assert.rejects(api('GET', '/v1/state/job:1'), /404/);
  },

  async 'state: history older than the log'() {
    const small = await serve(['--port', '0', '--data-dir', join(dir, 'small'), '--max-log-mb', '2']);
    const write = (value, key = 'a') => fetch(`${small.url}/v1/state/${key}`, { method: 'PUT', headers: { 'Content-Type': 'application/json' }, body: JSON.stringify({ value, meta: { job_id: 'old' } }) });
    await write(0, 'first');
    for (let i = 0; i < 24; i++) await write(String(i).repeat(200_000));
    await fetch(`${small.url}/v1/admin/snapshot`, { method: 'POST' });
    await write('last');
    await fetch(`${small.url}/v1/admin/snapshot`, { method: 'POST' });
    const { oldest } = await (await fetch(`${small.url}/v1/health`)).json();
    assert(oldest > 1, 'the log was cut');
    forgiven = /410/;
    const other = await open(context, `${small.url}/#state?key=a`);
    await other.click('#tab-history');
    await until('it says so', async () => (await other.locator('#detail .pane-body').innerText()).includes(`the log begins at revision ${oldest}`));
    assert.equal(await other.locator('#history .change').count(), 26 - oldest + 1);
    await other.goto(`${small.url}/#jobs?job=old`);
    await until('so does the job', async () => (await other.locator('#job .log').innerText()).includes('no longer in the log'));
    forgiven = /(?!)/;
    await other.close();
    await small.stop();
  },

  async 'state: a tree of a hundred thousand keys'() {
    for (let from = 0; from < 100_000; from += 1000) {
      await api('POST', '/v1/batch', { ops: Array.from({ length: 1000 }, (_, i) => { const n = from + i; return { op: 'put', key: n < 90_000 ? `user:${String(n).padStart(6, '0')}` : `video/${n % 100}/${n}`, value: { n } }; }) });
    }
    await api('POST', '/v1/batch', { ops: [{ op: 'put', key: '..', value: 'dots' }, { op: 'put', key: 'odd/é 🙂?#%', value: null }, { op: 'put', key: 'zz', value: 'last' }] });
    await page.reload();
    // Branches are stepped over: the last key of all is on the first screen.
    await until('the last key', async () => await row('zz').count() === 1);
    await until('the total', async () => Number((await text('#state-info')).replace(/\D/g, '')) === Number(/kiss_keys (\d+)/.exec(await api('GET', '/v1/metrics'))[1]), 15000);
    await branch('user:').click();
    await until('its first', async () => await row('user:000000').count() === 1);
    const tree = page.locator('#tree');
    // Down, as fast as pages come; the page never holds more rows than are in sight.
    let steps = 0;
    await until('row 5000', async () => { steps++; await tree.evaluate((t) => { t.scrollTop = t.scrollHeight; t.scrollTop -= 32 * 8; }); return await page.evaluate(() => [...document.querySelectorAll('#tree .name.key')].some((n) => n.title > 'user:005000')); }, 20000);
    assert(await page.locator('#tree .node').count() < 70, 'a virtual list');
    await until('values of the rows in sight', () => page.evaluate(() => { const r = [...document.querySelectorAll('#tree .node')].filter((n) => n.querySelector('.name.key')?.title.startsWith('user:')); return r.length > 5 && r.some((n) => n.querySelector('.peek').textContent === `{"n":${Number(n.querySelector('.name.key').title.slice(5))}}`); }));
    // A key in the midst of many: by prefix.
    await prefix('user:0777');
    await until('its keys', async () => await row('user:077700').count() === 1);
    await shows('#state-info', /^100 keys begin so/);
    await put('user:077700', 'changed');
    await until('live', async () => (await row('user:077700').innerText()).includes('changed'));
    await put('user:0777005', 'between');
    await until('in its place', async () => await page.locator('#tree .name.key').nth(1).getAttribute('title') === 'user:0777005');
    await prefix('video/');
    await until('branches', async () => /0\/\s*100/.test(await branch('0/').innerText()));
    await put('video/0/new', 1);
    await until('a count goes up', async () => /0\/\s*101/.test(await branch('0/').innerText()));
    await api('DELETE', '/v1/state/video%2F0%2Fnew');
    await until('and down', async () => /0\/\s*100/.test(await branch('0/').innerText()));
    // What cannot be seen, or turns letters round, is written out.
    await put('bidi\u202egnp.exe', 1);
    await prefix('bidi');
    await until('written out', async () => (await page.locator('#tree .name.key').first().innerText()) === 'bidi\\u202egnp.exe');
    // A branch whose name leaves no room in a key: what comes behind it is there all the same.
    const long = Array.from({ length: 600 }, (_, i) => `${'p'.repeat(1018)}:${String(i).padStart(4, '0')}`);
    await api('POST', '/v1/batch', { ops: long.map((key) => ({ op: 'put', key, value: 1 })) });
    await prefix('');
    await page.reload();
    await until('the last key behind a long branch', async () => await row('zz').count() === 1);
    await api('POST', '/v1/batch', { ops: long.map((key) => ({ op: 'delete', key })) });
    // More than a page of the list holds: it ends early, and the rest is asked for.
    for (let i = 10; i < 34; i++) await put(`mb:${i}`, 'x'.repeat(2 << 20));
    await prefix('mb:');
    await until('all previews', () => page.evaluate(() => { const r = [...document.querySelectorAll('#tree .node .peek')]; return r.length > 18 && r.every((n) => n.textContent.startsWith('"xxx')); }), 30000);
    for (let i = 10; i < 34; i++) await api('DELETE', `/v1/state/mb:${i}`);
    for (const key of ['..', 'odd/é 🙂?#%']) {
      await prefix(key);
      await keyName(key).click();
      await page.click('#tab-edit');
      await detail('value').fill('"edited"');
      await page.click('#save');
      await until('saved', async () => (await row(key).innerText()).includes('edited'));
      await page.keyboard.press('Escape');
    }
    await api('PUT', '/v1/state/bytes', 'plain <b>text</b>', 'text/plain');
    await api('POST', '/v1/batch', { ops: [{ op: 'put', key: 'bytes2', value_base64: '/wD+AQ==' }] });
    await prefix('bytes');
    await keyName('bytes').click();
    await shows('#detail pre', /^plain <b>text<\/b>$/);
    await keyName('bytes2').click();
    await shows('#detail pre', /^000000 {2}ff 00 fe 01/);
    await page.keyboard.press('Escape');
    await prefix('');
  },

  async 'events: filters as chips, publish, detail, curl'() {
    await view('Events');
    await shows('#tail-info', /live · 0/);
    await page.fill('[name=filter]', 'job:');
    await page.keyboard.press('Enter');
    await page.selectOption('[name=kind]', 'types');
    for (const type of ['progress', 'state_updated']) { await page.fill('[name=filter]', type); await page.keyboard.press('Enter'); }
    await until('three chips', async () => await page.locator('#chips .chip').count() === 3);
    assert.match(page.url(), /#events\?types=progress%2Cstate_updated&prefix=job%3A|#events\?prefix=job%3A&types=progress%2Cstate_updated/);
    await shows('#tail-info', /live · 0/);
    await publish('other', 1, { key: 'job:1' });
    await put('elsewhere', 1);
    await publish('progress', { percent: 5, html: '<script>alert(1)</script>' }, { key: 'job:1', meta: { tags: ['x<y'] } });
    await until('one event', async () => await page.locator('.event').count() === 1);
    await page.locator('.event').first().click();
    await shows('#event', /"<script>alert\(1\)<\/script>"/);
    await page.click('#event >> text=only tag');
    await until('a fourth chip', async () => /x<y/.test(await text('#chips')));
    await shows('#tail-info', /live · 0/);
    await page.locator('#chips .chip', { hasText: 'x<y' }).click();
    await shows('#tail-info', /live · 0/);
    await page.click('#publish-open');
    await page.fill('#publish [name=key]', 'job:9');
    await page.fill('#publish [name=data]', '{"from": "console"}');
    await page.click('#publish button');
    await until('mine', async () => (await text('.event')).includes('{"from":"console"}'));
    const revision = Number(/revision (\d+)/.exec(await text('#published'))[1]);
    const stored = JSON.parse(await (await fetch(`${url}/v1/events?since=${revision - 1}`, { headers: { Accept: 'application/json' } })).text());
    assert.deepEqual(stored.events[0].data, { from: 'console' });
    await page.fill('#publish [name=data]', '{oops');
    await page.click('#publish button');
    await shows('#published', /Data is not JSON/);
    await page.fill('#publish [name=data]', '1');
    await page.check('#publish [name=ephemeral]');
    await page.click('#publish button');
    await until('an ephemeral one', async () => await page.locator('.event').count() === 2);
    await page.click('#publish-open');
    await page.click('#curl');
    await until('the clipboard', async () => /^curl -N 'http:.*prefix=job%3A.*'$/.test(await clipboard()));
    assert.match(await clipboard(), /types=progress%2Cstate_updated/);
  },

  async 'events: a pause loses nothing'() {
    await page.goto(`${url}/#events?types=tick`);
    await shows('#tail-info', /live · 0/);
    await page.click('#pause');
    for (let i = 0; i < 5; i++) await publish('tick', i);
    await shows('#tail-info', /paused · 5 waiting/);
    // What was shown of another filter goes with the next picture.
    await until('none shown', async () => await page.locator('.event').count() === 0);
    await page.click('#pause');
    await until('5 shown', async () => await page.locator('.event').count() === 5);
    // More than is held in memory: the stream lets go and resumes from the log.
    await page.click('#pause');
    for (let n = 0; n < 5; n++) await api('POST', '/v1/batch', { ops: Array.from({ length: 900 }, (_, i) => ({ op: 'event', type: 'tick', data: n * 900 + i })) });
    await shows('#tail-info', /2,000 waiting, the rest stays/);
    await page.click('#pause');
    await shows('#tail-info', /live · 4,505 events/);
    await shows('.event', /4499/);
    assert(await page.locator('.event').count() < 60, 'only what is in sight');
    // A hidden tab lets go of its connections.
    const hide = (hidden) => page.evaluate((h) => {
      Object.defineProperty(document, 'hidden', { configurable: true, get: () => h });
      document.dispatchEvent(new Event('visibilitychange'));
    }, hidden);
    await hide(true);
    await until('no streams', async () => /kiss_streams 0/.test(await api('GET', '/v1/metrics')));
    await publish('tick', 'while hidden');
    await hide(false);
    await until('what was missed', async () => (await text('.event')).includes('while hidden'));
    await view('Overview');
    await publish('tick', 'while away');
    await view('Events');
    await until('what was missed', async () => (await text('.event')).includes('while away'));
  },

  async 'events: snapshot, history, reset, refusal'() {
    await page.goto(`${url}/#events?prefix=user:00000&snapshot=true`);
    await until('the snapshot', async () => (await text('.event')).includes('10 entries'));
    await shows('#tail-info', /11 events/);
    await page.goto(`${url}/#events?since=0&key=job:1`);
    await until('history', async () => await page.locator('.event').count() > 5);
    await page.goto(`${url}/#events?since=99999999`);
    await until('a reset', async () => /reset/.test(await text('.event')) && /future/.test(await text('.event')));
    forgiven = /400/;
    await page.goto(`${url}/#events?since=yesterday`);
    await until('a refusal', async () => (await text('#tail-error')).length > 10);
    forgiven = /(?!)/;
    await page.fill('[name=since]', '');
    await page.keyboard.press('Enter');
    await shows('#tail-info', /live · 0/);
    assert.equal(await page.locator('#tail-error').innerText(), '');
  },

  async 'vectors: create, add, search, delete'() {
    await view('Vectors');
    await page.click('#new-collection');
    await page.fill('#create [name=name]', 'docs');
    await page.fill('#create [name=dim]', '3');
    await page.click('#create button');
    await shows('#collection-facts', /^0 vectors · 3 numbers each · cosine/);
    assert.equal((await json('GET', '/v1/vector/docs')).dim, 3);
    await page.click('#add summary');
    await page.fill('#add [name=id]', 'a/1');
    await page.fill('#add [name=vector]', '1 0 0');
    await page.fill('#add [name=meta]', '{"lang": "es", "title": "<b>uno</b>", "year": 2020}');
    await page.click('#add button.main');
    await shows('#added', /added at revision \d/);
    assert.deepEqual((await json('GET', '/v1/vector/docs/get?id=a/1')).vector, [1, 0, 0]);
    await api('POST', '/v1/vector/docs/upsert', { items: [
      { id: 'b', vector: [0.9, 0.1, 0], meta: { lang: 'en', title: 'two', year: 2023 } },
      { id: 'c', vector: [0, 1, 0], meta: { lang: 'es', title: 'tres', year: 2024 } },
      { id: 'd', vector: [-1, 0, 0.2] }] });
    await shows('#collection-facts', /^4 vectors/);
    await until('all on the map', async () => /^Map of 4 vectors/.test(await page.getAttribute('.map canvas', 'aria-label')));
    await page.fill('#search [name=what]', 'a/1');
    await page.keyboard.press('Enter');
    await until('hits on both sides', async () => await page.locator('.hit').count() === 8);
    await shows('#recall', /^1\.00\s*recall · 4 of 4/);
    await shows('.hit', /a\/1\s*1\.0000\s*<b>uno<\/b>/);
    const { hits } = await json('POST', '/v1/vector/docs/search', { id: 'a/1', k: 10 });
    assert.deepEqual(await page.locator('.column:nth-child(2) .hit').evaluateAll((all) => all.map((h) => h.dataset.id)), hits.map((h) => h.id));
    await until('lit', async () => await page.getAttribute('.map canvas', 'data-hits') === '4');
    await page.selectOption('#search [name=by]', 'vector');
    await page.fill('#search [name=what]', '[0, 1, 0.1]');
    await page.fill('#search [name=filters]', '{"year": {"$gte": 2023}}');
    await page.fill('#search [name=k]', '1');
    await page.selectOption('#search [name=mode]', 'exact');
    await page.keyboard.press('Escape');
    await page.click('#search button');
    await until('the filtered hit', async () => await page.locator('.hit').count() === 1 && await page.locator('.hit').getAttribute('data-id') === 'c');
    forgiven = /400/;
    await page.fill('#search [name=what]', '[1, 2]');
    await page.keyboard.press('Enter');
    await shows('#search-error', /dim|length|numbers/);
    forgiven = /(?!)/;
    assert.equal(await page.locator('.hit').count(), 0, 'no hits of the search before');
    assert.equal(await page.getAttribute('.map canvas', 'data-hits'), '0');
    assert.match(page.url(), /collection=docs/);
    await page.fill('#search [name=what]', '[0, 1, 0.1]');
    await page.keyboard.press('Enter');
    await page.locator('.hit summary').click();
    await page.click('.hit >> text=delete');
    await page.click('.hit >> text=really?');
    await shows('#collection-facts', /^3 vectors/);
    await until('off the map', async () => /^Map of 3 vectors/.test(await page.getAttribute('.map canvas', 'aria-label')));
    // An id that a field cannot show as it is.
    await api('POST', '/v1/vector/docs/upsert', { id: 'line\nbreak', vector: [0, 1, 0.2], meta: { year: 2025 } });
    await page.fill('#search [name=filters]', '');
    await page.keyboard.press('Enter');
    await until('it is found', async () => await page.locator('.hit').first().getAttribute('data-id') === 'line\nbreak');
    await page.locator('.hit summary').first().click();
    await page.click('.hit >> text=more like it');
    await until('by its id', async () => await page.inputValue('#search [name=by]') === 'id' && await page.locator('.hit').first().getAttribute('data-id') === 'line\nbreak');
    assert.equal(await text('#search-error'), '');
    await until('on the map', async () => /^Map of 4 vectors/.test(await page.getAttribute('.map canvas', 'aria-label')));
    await api('POST', '/v1/vector/docs/delete', { id: 'line\nbreak' });
    await shows('#collection-facts', /^3 vectors/);
  },

  async 'vectors: the approximate answer beside the exact one'() {
    const vector = (i) => Array.from({ length: 16 }, (_, d) => Math.round(Math.sin(i * 12.9898 + d * 78.233 + (i % 5) * d) * 1e4) / 1e4);
    await api('POST', '/v1/vector/many', { dim: 16, metric: 'l2' });
    for (let from = 0; from < 4000; from += 1000) await api('POST', '/v1/vector/many/upsert', { items: Array.from({ length: 1000 }, (_, i) => ({ id: `v${from + i}`, vector: vector(from + i), meta: { group: `g${(from + i) % 5}` } })) });
    await page.click('[data-collection=many]');
    await shows('#collection-facts', /^4,000 vectors.*graph, 4,000 linked/s, 20000);
    await until('a sample', async () => /the first 1,500 of 4,000/.test(await text('#map-info')));
    assert(await inked('.map canvas') > 1500, 'points');
    await shows('.map-card', /g0.*g4/s);
    await page.fill('#search [name=what]', 'v3999');
    await page.fill('#search [name=ef]', '10');
    await page.click('#search button');
    await until('20 hits', async () => await page.locator('.hit').count() === 20);
    const [fast, full] = [await json('POST', '/v1/vector/many/search', { id: 'v3999', ef: 10 }), await json('POST', '/v1/vector/many/search', { id: 'v3999', exact: true })];
    const right = fast.hits.filter((h) => full.hits.some((e) => e.id === h.id)).length;
    await shows('#recall', new RegExp(`recall · ${right} of 10`));
    await shows('.column-head', /Approximate.*(µs|ms).*ef 10 · scored/s);
    await until('hits that were not in the sample are on the map', async () => await page.evaluate(() => Number(/Map of (\d+)/.exec(document.querySelector('.map canvas').getAttribute('aria-label'))[1])) > 1500);
    await page.click('#drop');
    await page.click('text=Really, all of it?');
    await until('gone', async () => await page.locator('[data-collection=many]').count() === 0);
    await assert.rejects(api('GET', '/v1/vector/many'), /404/);
  },

  async 'jobs: status, progress, log and time, live'() {
    await put('job:7', { title: '<b>Render</b>', status: 'running', progress: 10 }, { meta: { job_id: '7', tags: ['render'] } });
    await view('Jobs');
    const job = page.locator('[data-job="7"]');
    await job.waitFor();
    assert.match(await job.innerText(), /running\s*<b>Render<\/b>\s*#7\s*10%/);
    assert.equal(await job.locator('.progress').getAttribute('aria-valuenow'), '10');
    await api('PATCH', '/v1/state/job:7', { progress: 42, message: 'frame 42' }, 'application/merge-patch+json');
    await until('progress', async () => /42%/.test(await job.innerText()) && /frame 42/.test(await job.innerText()));
    await publish('progress', { percent: 55 }, { key: 'job:7', meta: { job_id: '7' } });
    await until('progress by an event', async () => await job.locator('.progress').getAttribute('aria-valuenow') === '55');
    await publish('log', { level: 'warn', message: 'slow <i>disk</i>' }, { key: 'job:7', meta: { job_id: '7' } });
    await job.click();
    await shows('#job .log', /slow <i>disk<\/i>/);
    const spent = await page.locator('#job .job-state .soft').innerText();
    assert.match(spent, /^\d+s/);
    await until('time passes', async () => await page.locator('#job .job-state .soft').innerText() !== spent);
    await publish('log', 'and a plain line', { meta: { job_id: '7' } });
    await shows('#job .log', /slow.*and a plain line/s);
    await api('PATCH', '/v1/state/job:7', { progress: 100, status: 'done' }, 'application/merge-patch+json');
    await until('done', async () => /done/.test(await job.innerText()) && /100%/.test(await job.innerText()));
    await page.locator('.chip.failed').click();
    await until('none failed', async () => await page.locator('.job').count() === 0);
    await put('job:8', { status: 'failed', error: 'no space' }, { meta: { job_id: '8' } });
    await until('one', async () => /failed.*no space/s.test(await text('[data-job="8"]')));
    await page.locator('.chip.all').click();
    // A page that comes later learns start, lines and state from the log.
    await page.reload();
    await shows('#job .log', /running.*slow <i>disk<\/i>.*and a plain line.*done/s);
    await until('its time', async () => /^\d+s/.test(await page.locator('#job .job-state .soft').innerText()));
    await page.keyboard.press('Escape');
    // The page's own.
    await page.click('#sample');
    await shows('#job', /Index the handbook/);
    await until('it is done', async () => await page.locator('#job .status').innerText() === 'done' && /published/.test(await text('#job .log')), 20000);
    const id = /job=([^&]+)/.exec(page.url())[1];
    assert.equal((await json('GET', `/v1/state/job:${id}`)).value.progress, 100);
    await api('DELETE', `/v1/state/job:${id}`);
    await until('without a key it is still done', async () => /No key is left/.test(await text('#job')) && await page.locator('#job .status').innerText() === 'done');
    await page.keyboard.press('Escape');
  },

  async 'a restart of the server'() {
    forgiven = /Failed to load resource|ERR_/;
    await put('job:9', { status: 'running', progress: 1 }, { meta: { job_id: '9' } });
    await until('the job', async () => await page.locator('[data-job="9"]').count() === 1);
    await server.stop('SIGKILL');
    await link('reconnecting');
    await shows('#banner', /does not answer\. What you see is from \d\d:\d\d:\d\d/);
    await until('the link', async () => await page.getAttribute('body', 'data-link') === 'reconnecting');
    await until('greyed', () => page.evaluate(() => Number(getComputedStyle(document.querySelector('main')).opacity) < 1));
    server = await serve(['--port', port, '--data-dir', data]);
    await api('PATCH', '/v1/state/job:9', { progress: 77 }, 'application/merge-patch+json');
    await link('live');
    await until('what was missed', async () => /77%/.test(await text('[data-job="9"]')));
    await until('#banner is gone', () => page.locator('#banner').isHidden());
    // In each view.
    await view('State');
    await prefix('again');
    await put('again', 'before');
    await until('the key', async () => (await row('again').innerText()).includes('before'));
    await server.stop();
    await link('reconnecting');
    server = await serve(['--port', port, '--data-dir', data]);
    await put('again', 'after');
    await page.click('#hurry').catch(() => {}); // It may be back by itself.
    await link('live');
    await until('what was missed', async () => (await row('again').innerText()).includes('after'));
    await view('Events');
    await shows('#tail-info', /live/);
    await server.stop();
    await shows('#tail-info', /reconnecting/);
    server = await serve(['--port', port, '--data-dir', data]);
    await publish('back', 1);
    await until('resumed', async () => (await text('.event')).includes('back'), 15000);
    await view('Vectors');
    await shows('#collection-facts', /^3 vectors/);
    await page.reload();
    await shows('#collection-facts', /^3 vectors/);
    // Another, empty database at the same address: nothing of the old one stays on the page.
    await view('State');
    await prefix('again');
    await until('the key', async () => await row('again').count() === 1);
    await server.stop();
    const other = await serve(['--port', port, '--ephemeral']);
    await link('live');
    await until('an empty list', async () => await page.locator('#tree .node').count() === 0, 15000);
    await until('revision 0', async () => await text('#head') === '0');
    await view('Overview');
    await shows('#durability', /in memory/);
    await view('Jobs');
    await until('no jobs', async () => await page.locator('.job').count() === 0);
    await other.stop();
    server = await serve(['--port', port, '--data-dir', data]);
    await link('live');
    await until('the jobs are back', async () => await page.locator('[data-job="9"]').count() === 1, 15000);
    forgiven = /(?!)/;
  },

  async 'keyboard'() {
    await page.locator('body').press('2');
    await shows('[aria-current]', /^State$/);
    await page.keyboard.press('/');
    await until('the field has the focus', () => page.evaluate(() => document.activeElement.name === 'prefix'));
    await page.keyboard.press('Control+a');
    await page.keyboard.type('user:00001');
    await until('keys', async () => await row('user:000010').count() === 1 && await row('user:000000').count() === 0);
    await page.keyboard.press('ArrowDown');
    await page.keyboard.press('j');
    await page.keyboard.press('Enter');
    await shows('#detail h2', /^user:000011$/);
    await until('the focus can be seen', () => page.evaluate(() => document.activeElement.matches(':focus-visible')));
    await page.keyboard.press('Escape');
    await until('the tree has the focus', () => page.evaluate(() => document.activeElement.id === 'tree'));
    await until('#detail is gone', () => page.locator('#detail').isHidden());
    // Into a branch and out of it.
    await prefix('video/');
    await until('branches', async () => await branch('0/').count() === 1);
    await page.locator('#tree').focus();
    await page.keyboard.press('Home');
    await page.keyboard.press('ArrowRight');
    await until('open', async () => await branch('0/').getAttribute('aria-expanded') === 'true' && await row('video/0/90000').count() === 1);
    await page.keyboard.press('ArrowRight');
    await page.keyboard.press('ArrowLeft');
    await page.keyboard.press('ArrowLeft');
    await until('closed', async () => await branch('0/').getAttribute('aria-expanded') === 'false');
    // A key from the first to the last keystroke.
    await page.keyboard.press('n');
    await page.keyboard.press('Control+a');
    await page.keyboard.type('typed');
    await page.keyboard.press('Tab');
    await page.keyboard.press('Control+a');
    await page.keyboard.type('{"by": "hand"}');
    await page.keyboard.press('Control+Enter');
    await until('written', async () => (await json('GET', '/v1/state/typed')).value.by === 'hand');
    // The page has heard of it, too.
    await shows('#badges', /revision/);
    await page.keyboard.press('Escape');
    await page.locator('#tree').focus();
    await page.keyboard.press('3');
    await shows('[aria-current]', /^Events$/);
    await page.keyboard.press('p');
    await shows('#tail-info', /paused/);
    await page.keyboard.press('p');
    await page.keyboard.press('?');
    await until('#shortcuts is there', () => page.locator('#shortcuts').isVisible());
    await page.keyboard.press('Escape');
    await until('#shortcuts is gone', () => page.locator('#shortcuts').isHidden());
    await page.keyboard.press('5');
    await shows('[aria-current]', /^Jobs$/);
    // Colours: as the system, light, dark; kept over a reload.
    const ground = () => page.evaluate(() => getComputedStyle(document.body).backgroundColor);
    const light = await ground();
    await page.keyboard.press('t');
    await page.keyboard.press('t');
    await until('another ground', async () => await ground() !== light);
    await page.reload();
    await until('another ground', async () => await ground() !== light);
    await page.locator('body').press('t');
    assert.equal(await ground(), light);
  },

  async 'a key'() {
    const home = ['--port', '0', '--data-dir', join(dir, 'locked')];
    let locked = await serve(home, { API_KEY: 'open sesame' });
    home[1] = new URL(locked.url).port;
    forgiven = /401|ERR_/; // Each view that asks is refused, and while the server is away none is answered.
    const other = await open(context, `${locked.url}/`); // The page itself needs none.
    const say = (selector) => other.locator(selector).first().innerText();
    await other.locator('#auth').waitFor();
    assert.match(await say('#auth p'), /kiss-vdb keys create.*API_KEY/);
    await other.fill('#auth [name=key]', 'ключ');
    await other.click('#auth button.main');
    assert(await other.$eval('#auth [name=key]', (input) => input.validity.patternMismatch), 'no header may hold it');
    await other.fill('#auth [name=key]', 'wrong');
    await other.click('#auth button.main');
    await until('asked again', async () => /not accepted: the key is not known/.test(await say('#auth-error')));
    // It can be put off; the page says what it waits for, and asks again when told to.
    await other.keyboard.press('Escape');
    await until('a banner', async () => /does not accept this key: the key is not known\./.test(await say('#banner-text')) && await say('#pill-text') === 'refused');
    await other.click('#hurry');
    await other.locator('#auth').waitFor();
    await other.fill('#auth [name=key]', 'open sesame');
    await other.keyboard.press('Enter');
    await until('live', async () => await say('#pill-text') === 'live');
    await until('#auth is gone', () => other.locator('#auth').isHidden());
    await until('the first minute', () => other.locator('#start').isVisible());
    assert(await other.locator('#reach').isHidden(), 'this key may do everything');
    // The lines that are there to be pasted work with this key.
    const lines = await other.locator('#start pre').allInnerTexts();
    assert.equal(lines.length, 3);
    const shell = (line) => spawn('sh', ['-c', line], { env: { ...process.env, API_KEY: 'open sesame' }, stdio: ['ignore', 'pipe', 'ignore'] });
    const said = async (line, pattern) => {
      let out = '';
      const child = shell(`exec ${line}`);
      child.stdout.on('data', (chunk) => { out += chunk; });
      try { await until(`${line} says ${pattern}`, () => pattern.test(out)); } finally { child.kill(); }
    };
    await said(lines[1], /"created":true/);
    await said(lines[2], /"progress":42/);
    await other.click('#tabs a:text-is("Events")');
    await other.fill('[name=since]', '0');
    await other.keyboard.press('Enter');
    await until('the stream has the key too', async () => (await say('.event')).includes('state_updated'));
    await other.click('#curl');
    await until('the clipboard', async () => /since=0.*Bearer/.test(await clipboard()));
    await said(await clipboard(), /event: state_updated\nid: 2\n/);
    assert.equal(await other.evaluate(() => JSON.stringify([...Object.values(localStorage), document.cookie, location.href].filter((v) => v.includes('sesame')))), '[]', 'in sessionStorage only');
    // The server comes back with another key: the page asks for it and goes on where it was.
    await locked.stop();
    locked = await serve(home, { API_KEY: 'shut sesame' });
    await until('asked for the other', async () => await other.locator('#auth').isVisible() && /not accepted/.test(await say('#auth-error')), 20000);
    await other.fill('#auth [name=key]', 'shut sesame');
    await other.keyboard.press('Enter');
    await until('live again', async () => await say('#pill-text') === 'live');
    await until('both events, once', async () => await other.locator('.event').count() === 2);
    await other.close();
    forgiven = /(?!)/;
    await locked.stop();
  },

  async 'keys that may not do everything'() {
    const file = join(dir, 'keys.toml');
    const keys = (...args) => execFileSync(binary, ['keys', ...args, '--file', file], { encoding: 'utf8', stdio: ['ignore', 'pipe', 'ignore'] }).trim();
    const reader = keys('create', 'reader', '--rights', 'read'), writer = keys('create', 'writer', '--rights', 'write');
    const worker = keys('create', 'worker', '--prefix', 'jobs/', '--prefix', 'tasks:', '--collection', 'docs');
    const locked = await serve(['--port', '0', '--ephemeral', '--keys-file', file], { API_KEY: 'root' });
    const ask = async (method, path, body) => {
      const res = await fetch(locked.url + path, { method, headers: { 'Content-Type': 'application/json', Authorization: 'Bearer root' }, body: body && JSON.stringify(body) });
      assert(res.ok, `${method} ${path}: ${res.status}`);
      return res.json();
    };
    const long = 'A title that goes on and on, '.repeat(5).trim();
    await ask('POST', '/v1/batch', { ops: [
      { op: 'put', key: 'jobs/1', value: { title: long, status: 'running', progress: 5 }, meta: { job_id: '1' } },
      ...['jobs/2', 'other', 'tasks:1', 'tasks:2'].map((key) => ({ op: 'put', key, value: { n: key } }))] });
    for (const name of ['docs', 'secret']) {
      await ask('POST', `/v1/vector/${name}`, { dim: 2, metric: 'l2' });
      await ask('POST', `/v1/vector/${name}/upsert`, { id: `of ${name}`, vector: [1, 2] });
    }
    // Only that a key is missing or no longer known may be complained about: what a key may not do is not even asked for.
    forgiven = /401/;
    const other = await open(context, `${locked.url}/#state`);
    const say = (selector) => other.locator(selector).first().innerText();
    const told = (selector, pattern) => until(`${selector} shows ${pattern}`, async () => pattern.test(await say(selector)));
    const tab = (name) => other.click(`#tabs a:text-is("${name}")`);
    const key = (name) => other.locator('#tree .node').filter({ has: other.locator(`.name[title=${JSON.stringify(name)}]`) });
    const give = async (secret) => {
      await other.locator('#auth').waitFor();
      await other.fill('#auth [name=key]', secret);
      await other.keyboard.press('Enter');
    };
    const isOff = (selector, why) => until(`${selector} is off`, async () => await other.locator(selector).first().isDisabled() && why.test(await other.locator(selector).first().getAttribute('title')));

    // A key that cannot read has nothing to see here.
    forgiven = /401|403/;
    await give(writer);
    await told('#auth-error', /may not read/);
    forgiven = /401/;

    // One that only reads sees everything and is offered no change.
    await give(reader);
    await told('#reach', /The key reader reads everything and writes nothing\./);
    const only = /The key "reader" may only read\./;
    await key('other').click();
    await told('#value', /"n": "other"/);
    for (const button of ['#new-key', '#tab-edit', '#tab-patch', '#delete']) await isOff(button, only);
    await other.click('#tab-history');
    await other.locator('#history .change summary').click();
    await isOff('#history .change button', only);
    await other.keyboard.press('n');
    assert.equal(await say('#detail h2'), 'other', 'nor by the keyboard');
    await tab('Events');
    await isOff('#publish-open', only);
    await tab('Vectors');
    await told('#collections', /docs.*secret/s);
    for (const button of ['#new-collection', '#drop']) await isOff(button, only);
    await until('no form to add', () => other.locator('#add').isHidden());
    await other.fill('#search [name=what]', 'of docs');
    await other.keyboard.press('Enter');
    await other.locator('.hit summary').first().click();
    await isOff('.hit .danger', only);
    await tab('Jobs');
    await isOff('#sample', only);
    // A title has two lines, and all of it for who asks.
    await told('.job-title', /A title that goes on/);
    assert.equal(await other.locator('.job-title').getAttribute('title'), long);
    const lines = await other.locator('.job-title').evaluate((n) => n.clientHeight / parseFloat(getComputedStyle(n).lineHeight));
    assert(lines > 1.5 && lines < 2.5, `${lines} lines`);
    await tab('Overview');
    await told('#tiles', /^keys\s*5\n/);

    // One with limits begins where it may look, in each view.
    await other.click('#key');
    await told('#auth-title', /Use another key/);
    await give(worker);
    await told('#reach', /The key worker reads and writes:\s*keys\s*jobs\/…\s*keys\s*tasks:…\s*collection\s*docs/);
    await told('#part', /reaches a part of the server.*figures/s);
    await until('no figures', async () => await other.locator('#tiles').isHidden() && await other.locator('#chart-writes').isHidden());
    await told('#health', /healthy/);
    await tab('State');
    await until('the first prefix', async () => new URL(other.url()).hash.startsWith('#state?prefix=jobs%2F'));
    await until('its keys, with values', async () => /A title that/.test(await key('jobs/1').innerText()) && /"n":"jobs\/2"/.test(await key('jobs/2').innerText()));
    await other.click('#reach >> text=tasks:');
    await until('the other prefix', async () => /"n":"tasks:2"/.test(await key('tasks:2').innerText()) && await key('jobs/1').count() === 0);
    await other.fill('#view-state [name=prefix]', 'oth');
    await told('#view-state .empty h2', /^The key "worker" reaches keys that begin with jobs\/ or tasks:\.$/);
    await other.click('#new-key');
    assert.equal(await other.inputValue('#detail [name=key]'), 'jobs/');
    await other.fill('#detail [name=key]', 'jobs/new');
    await other.click('#save');
    await until('it is written', async () => (await ask('GET', '/v1/state?prefix=jobs/new')).items.length === 1);
    await told('#detail h2', /^jobs\/new$/);
    await other.goto(`${locked.url}/#state?key=other&prefix=jobs/`);
    await told('#detail .empty', /reaches keys that begin with/);
    await tab('Events');
    await told('#tail-info', /live/);
    await other.click('#publish-open');
    await until('a key within', async () => await other.inputValue('#publish [name=key]') === 'jobs/');
    await other.click('#publish button');
    await told('.event', /progress.*jobs\//s);
    await ask('PUT', '/v1/state/other', { value: 2 });
    await ask('PUT', '/v1/state/tasks:3', { value: 3 });
    await told('.event', /tasks:3/);
    assert.equal(await other.locator('.event').count(), 2, 'what is beyond is not seen');
    await other.goto(`${locked.url}/#events?prefix=other`);
    await told('#view-events .empty h2', /reaches keys that begin with/);
    await other.goto(`${locked.url}/#events?collection=secret`);
    await told('#view-events .empty h2', /reaches the collection docs\.$/);
    await tab('Vectors');
    await told('#collection-facts', /^1 vector ·/);
    await until('one alone', async () => await other.locator('.collection').count() === 1);
    await other.click('#new-collection');
    await other.fill('#create [name=name]', 'mine');
    await other.click('#create button');
    await told('#create .error', /reaches the collection docs\.$/);
    await other.goto(`${locked.url}/#vectors?collection=secret`);
    await told('#view-vectors .empty-card:not([hidden]) h2', /reaches the collection docs\.$/);
    await tab('Jobs');
    await other.locator('.job').first().waitFor();
    await other.click('#sample');
    await told('#job h2', /Index the handbook/);
    assert.match((await ask('GET', '/v1/state?prefix=jobs/sample-')).items[0].key, /^jobs\/sample-/);
    await until('it is done', async () => await say('#job .status') === 'done', 20000);
    await other.goto(`${locked.url}/#jobs?prefix=other`);
    await told('#view-jobs .empty-card h2', /reaches keys that begin with/);

    // The line about the key fits a telephone too.
    await other.setViewportSize({ width: 375, height: 780 });
    for (const name of ['Overview', 'State', 'Events', 'Vectors', 'Jobs']) {
      await tab(name);
      await until(`no sideways scroll in ${name}`, () => other.evaluate(() => document.documentElement.scrollWidth <= innerWidth && document.getElementById('reach').getBoundingClientRect().right <= innerWidth));
    }
    await other.setViewportSize({ width: 1280, height: 820 });

    // Rights that change while the page is open are taken over, without a word to whoever looks.
    await other.goto(`${locked.url}/#state`);
    await until('where it begins', async () => /A title that/.test(await key('jobs/1').innerText()));
    const before = readFileSync(file, 'utf8');
    const row = /\[\[key\]\]\s*name = "worker"[^]*?(?=\[\[key\]\]|$)/.exec(before)[0];
    writeFileSync(file, before.replace(row, row.replace(/rights = \[[^\]]*\]/, 'rights = ["read"]')));
    await told('#reach', /The key worker only reads:/);
    await isOff('#new-key', /The key "worker" may only read\./);

    // A key that is gone: the page asks for another and goes on; an edit that was under way is still there.
    writeFileSync(file, before);
    await told('#reach', /The key worker reads and writes:/);
    await key('jobs/2').click();
    await other.click('#tab-edit');
    await other.fill('#detail [name=value]', '{"mine": true}');
    keys('revoke', 'worker');
    await until('asked again', async () => await other.locator('#auth').isVisible() && /not accepted/.test(await say('#auth-error')));
    await give('root');
    await until('live', async () => await say('#pill-text') === 'live');
    await until('no limits', () => other.locator('#reach').isHidden());
    await other.click('#save');
    await until('the edit is saved', async () => (await ask('GET', '/v1/state?prefix=jobs/2')).items[0].value.mine === true);
    await other.fill('#view-state [name=prefix]', '');
    await key('other').waitFor();
    await other.close();
    forgiven = /(?!)/;
    await locked.stop();
  },

  // From here on each test has a page of its own, and faults that are put between it and the server.
  async 'state: what was opened while nobody answered is read when somebody does'() {
    await api('POST', '/v1/batch', { ops: ['away:1', 'away:2', 'away.3'].map((key) => ({ op: 'put', key, value: { of: key } })) });
    const other = await aside('#state?prefix=away');
    await other.locator('#tree .node[aria-expanded]').waitFor();
    let fault = null;
    await other.route('**/v1/state?*', (r) => fault ? fault(r) : r.continue());
    forgiven = /Failed to load resource/;
    for (const [told, answer] of [[/does not answer/, (r) => r.abort()], [/come back in 1 s/, (r) => r.fulfill(refusal(429, 'too many; come back in 1 s'))], [/^502/, (r) => r.fulfill({ status: 502, body: '<html>' })]]) {
      fault = answer;
      await other.click('#tree .node[aria-expanded] .name');
      await until('the branch says why', async () => told.test((await other.locator('#tree .soft').allInnerTexts()).join()));
      await other.click('#tree .name[title="away.3"]');
      await until('so does the key', async () => told.test(await other.locator('#detail .error').innerText()));
      assert.doesNotMatch(await other.locator('#detail').innerText(), /no such key/, 'of what nobody knows');
      fault = null;
      await until('the branch is read', async () => await other.locator('#tree .name[title="away:2"]').count() === 1);
      await until('so is the key', async () => /"of": "away\.3"/.test(await other.locator('#value').innerText()));
      await other.reload();
      await other.keyboard.press('Escape');
      await other.locator('#tree .node[aria-expanded=false]').waitFor();
    }
    // One that is never answered, as behind the streams of two other windows.
    fault = () => {};
    await other.click('#tree .name[title="away.3"]');
    await until('a word', async () => /No answer in 10 s.*windows of this console/.test(await other.locator('#detail .error').innerText()), 14000);
    fault = null;
    await until('the key is read', async () => /"of": "away\.3"/.test(await other.locator('#value').innerText()));
    forgiven = /(?!)/;
    await other.close();
  },

  async 'state: written over another, what was not changed stays as they set it'() {
    await put('terms', { v: 1 });
    const other = await aside('#state?prefix=terms&key=terms');
    await other.click('#tab-edit');
    await other.fill('#detail [name=value]', '{"mine": 1}');
    await put('terms', { theirs: 1 }, { ttl_ms: 100_000, meta: { tags: ['set', 'by them'] } });
    await other.locator('#newer').waitFor();
    forgiven = /409/;
    await other.click('#save');
    await until('their deadline and labels on both sides', async () => (await other.locator('#conflict .both').innerText()).match(/ends in 1m \d\ds · labels \{"tags":\["set","by them"\]\}/g)?.length === 2);
    await other.click('text=Write mine over it');
    const now = await until('mine', async () => { const e = await json('GET', '/v1/state/terms'); return e.value.mine && e; });
    assert.deepEqual(now.meta.tags, ['set', 'by them']);
    assert(now.expires_at_ms > Date.now() + 60_000);
    // A deadline that has passed is not kept: the save would be gone at once.
    await put('ended', 1, { ttl_ms: 5000 });
    await other.fill('#view-state [name=prefix]', 'ended');
    await other.click('#tree .name[title=ended]');
    await other.click('#tab-edit');
    await other.fill('#detail [name=value]', '"mine"');
    await until('it says so', async () => /deleted meanwhile/.test(await other.locator('#newer').innerText()));
    await other.click('#save');
    await until('that it has passed', async () => /The deadline has passed: yours would be written without one/.test(await other.locator('#conflict').innerText()));
    await other.click('text=Write mine over it');
    await until('a word', async () => /it has none now/.test(await other.locator('#toasts').innerText()));
    forgiven = /(?!)/;
    const kept = await json('GET', '/v1/state/ended');
    assert.equal(kept.value, 'mine');
    assert.equal(kept.expires_at_ms ?? null, null);
    await other.close();
  },

  async 'state: a patch does not bring a deleted key back without a word'() {
    await put('whole', { a: 1, b: 2 });
    const other = await aside('#state?prefix=whole&key=whole');
    await other.click('#tab-patch');
    await other.fill('#detail [name=value]', '{"b": 3}');
    await api('DELETE', '/v1/state/whole');
    await until('it says so', async () => /deleted meanwhile/.test(await other.locator('#newer').innerText()));
    await other.click('#save');
    await until('asked', async () => await other.locator('#save').innerText() === 'Create it from the patch');
    await assert.rejects(api('GET', '/v1/state/whole'), /404/);
    // There again, it is a patch again, and goes on top of what came in.
    await put('whole', { a: 4 });
    await until('a patch', async () => await other.locator('#save').innerText() === 'Apply patch');
    await other.click('#save');
    await until('merged', async () => JSON.stringify((await json('GET', '/v1/state/whole')).value) === '{"a":4,"b":3}');
    await other.close();
  },

  async 'state: what is written is not lost without a word'() {
    for (const key of ['draft.1', 'draft.2']) await put(key, { of: key });
    const other = await aside('#state?prefix=draft&key=draft.1');
    const value = other.locator('#detail [name=value]'), ask = other.locator('#unsaved');
    await other.click('#tab-edit');
    await value.fill('"mine"');
    await value.press('Escape');
    await until('asked', () => ask.isVisible());
    await other.keyboard.press('Escape');
    await until('back in the text', async () => await ask.isHidden() && await value.evaluate((n) => n === document.activeElement));
    await other.click('#tab-value');
    await other.click('#tab-patch');
    await other.click('#tab-edit');
    assert.equal(await value.inputValue(), '"mine"', 'over other tabs');
    await other.click('#tree .name[title="draft.2"]');
    await until('asked', () => ask.isVisible());
    assert.match(other.url(), /key=draft\.1/);
    await other.click('text=Go on editing');
    await other.fill('#view-state [name=prefix]', 'draft.');
    await until('another prefix', () => /prefix=draft\.&key=draft\.1/.test(other.url()));
    assert.equal(await value.inputValue(), '"mine"', 'over another prefix');
    const before = unloads;
    await other.evaluate(() => location.reload());
    await until('the browser asks', () => unloads === before + 1);
    await other.click('#tree .name[title="draft.2"]');
    await other.click('text=Discard it');
    await until('the other key', async () => await other.locator('#detail h2').innerText() === 'draft.2');
    await other.click('#tab-edit');
    await value.fill('"saved"');
    await other.click('#save');
    await until('saved', async () => (await json('GET', '/v1/state/draft.2')).value === 'saved');
    await until('nothing is asked any more', async () => { await other.keyboard.press('Escape'); return other.locator('#detail').isHidden(); });
    await other.close();
  },

  async 'state: a key that changes all the time can be read, copied and deleted'() {
    const beat = (n) => ({ n, inner: { same: [1, 2], text: 'to be read' }, last: n });
    await put('beat', beat(0));
    const other = await aside('#state?prefix=beat&key=beat');
    await other.locator('#value').waitFor();
    let n = 0;
    const next = async () => { await put('beat', beat(++n)); await until(`revision of ${n}`, async () => (await other.locator('#tree .peek').innerText()).includes(`"n":${n},`)); };
    const shown = () => other.locator('#value').innerText();
    await other.locator('#value summary', { hasText: '"same"' }).click(); // Folds it.
    await other.locator('#value summary', { hasText: '"inner"' }).focus();
    await next();
    await until('shown', async () => (await shown()).includes('"last": 1'));
    assert.equal(await other.evaluate(() => document.activeElement.textContent.includes('inner')), true, 'the focus stays');
    assert.equal(await other.locator('#value details', { hasText: '"same"' }).last().evaluate((d) => d.open), false, 'and what is folded');
    // What is selected waits.
    const select = () => other.evaluate(() => getSelection().selectAllChildren(document.querySelector('#value')));
    await select();
    await next();
    await until('a word', () => other.locator('#waits').isVisible());
    assert((await shown()).includes('"last": 1'));
    await other.evaluate(() => getSelection().removeAllRanges());
    await until('shown', async () => (await shown()).includes('"last": 2') && await other.locator('#waits').isHidden());
    await other.click('#delete');
    await next();
    await next();
    await until('shown', async () => (await shown()).includes('"last": 4'));
    assert.equal(await other.locator('#delete').innerText(), 'Really delete?');
    assert.equal(await other.evaluate(() => document.activeElement.id), 'delete');
    await other.keyboard.press('Enter');
    await until('gone', async () => (await fetch(`${url}/v1/state/beat`)).status === 404 && await other.locator('#detail').isHidden());
    // So too in Jobs.
    await put('beat', { status: 'running', ...beat(1) }, { meta: { job_id: 'beat' } });
    await other.goto(`${url}/#jobs?job=beat`);
    await other.locator('#job .values summary', { hasText: '"inner"' }).click();
    await other.locator('#job .values summary', { hasText: '"inner"' }).focus();
    await put('beat', { status: 'running', ...beat(7) }, { meta: { job_id: 'beat' } });
    await until('shown', async () => (await other.locator('#job .values').innerText()).includes('"last": 7'));
    assert.equal(await other.evaluate(() => document.activeElement.textContent.includes('inner')), true, 'the focus stays');
    assert.match(await other.locator('#job .values').innerText(), /to be read/, 'and what is open');
    await api('DELETE', '/v1/state/beat');
    await other.close();
  },

  async 'state: a branch of more than a page goes when its keys go'() {
    const names = (of) => Array.from({ length: 700 }, (_, i) => `${of}:${String(i).padStart(4, '0')}`);
    const all = async (op) => { for (const of of ['ghost.a', 'ghost.b']) await api('POST', '/v1/batch', { ops: names(of).map((key) => ({ op, key, ...(op === 'put' ? { value: 1 } : {}) })) }); };
    await all('put');
    await put('ghost.c', 1);
    const other = await aside('#state?prefix=ghost');
    const named = (name) => other.locator('#tree .node[aria-expanded]').filter({ has: other.getByText(name, { exact: true }) });
    await until('at least a page', async () => /500\+/.test(await named('ghost.a:').innerText()) && /500\+/.test(await named('ghost.b:').innerText()));
    await named('ghost.b:').click();
    await other.locator('#tree .name[title="ghost.b:0001"]').waitFor();
    await api('POST', '/v1/batch', { ops: names('ghost.a').slice(0, 300).map((key) => ({ op: 'delete', key })) });
    await until('how many are left', async () => /\s400$/.test(await named('ghost.a:').innerText()));
    for (const gone of [names('ghost.a').slice(300), names('ghost.b')]) await api('POST', '/v1/batch', { ops: gone.map((key) => ({ op: 'delete', key })) });
    await until('neither', async () => await other.locator('#tree .node').count() === 1);
    await other.close();
  },

  async 'a stream that is refused, and a proxy without its server'() {
    const other = await aside('#events');
    const says = (selector, pattern) => until(`${selector} says ${pattern}`, async () => pattern.test(await other.locator(selector).innerText()), 15000);
    await says('#pill-text', /^live$/);
    forgiven = /Failed to load resource|ERR_/;
    const isView = (u) => u.pathname === '/v1/events' && u.searchParams.get('types') !== 'console.pulse';
    await other.route(isView, (r) => r.fulfill(refusal(429, 'too many streams at a time')));
    await other.goto(`${url}/#events?types=other`);
    await says('#banner-text', /opens no stream: too many streams at a time\. What you see is not kept up to date\. (Next try in \d+ s\.|Trying …)/);
    await says('#pill-text', /^not live$/);
    await other.unroute(isView);
    await says('#pill-text', /^live$/);
    await says('#tail-info', /^live/);
    await until('no banner', () => other.locator('#banner').isHidden());
    // Whatever a proxy says, it is not this server's refusal.
    for (const status of [404, 403]) {
      await other.route('**/v1/**', (r) => r.fulfill({ status, contentType: 'text/html', body: '<h1>nothing here</h1>' }));
      await other.reload();
      await says('#banner-text', new RegExp(`opens no stream: ${status}.*(Next try|Trying)`));
      await other.unroute('**/v1/**');
      await says('#pill-text', /^live$/);
      await says('#tail-info', /^live/);
    }
    forgiven = /(?!)/;
    await other.close();
  },

  async 'events: bounded by size, once after a cut snapshot, and the focus stays'() {
    const other = await aside('#events?types=heavy');
    const says = (pattern) => until(`it says ${pattern}`, async () => pattern.test(await other.locator('#tail-info').innerText()), 20000);
    await says(/live · 0/);
    for (let i = 0; i < 40; i++) await publish('heavy', 'x'.repeat(1 << 20), { ephemeral: true });
    await says(/live · 40 events/);
    const rows = await other.locator('#tail .rows').evaluate((n) => n.clientHeight / 30);
    assert(rows > 10 && rows < 33, `${rows} rows of a megabyte`);
    // Enter on a filter removes it; the next one, or else the field, has the focus.
    await other.goto(`${url}/#events?types=one,two`);
    await other.locator('#chips .chip').first().focus();
    await other.keyboard.press('Enter');
    await until('on the other', async () => await other.locator('#chips .chip').count() === 1 && await other.evaluate(() => document.activeElement.classList.contains('chip')));
    await other.keyboard.press('Enter');
    await until('on the field', () => other.evaluate(() => document.activeElement.name === 'filter'));
    // A snapshot that was cut off comes anew, and does not double what is there.
    for (let i = 0; i < 3; i++) await put(`cut/${i}`, i);
    let cuts = 0;
    await other.route((u) => u.searchParams.get('snapshot') === 'true', async (r) => {
      const part = (i) => `event: snapshot\ndata: ${JSON.stringify({ key: `cut/${i}`, value: i, revision: 1 })}\n\n`;
      cuts++ ? await r.continue() : await r.fulfill({ contentType: 'text/event-stream', body: part(0) + part(1) });
    });
    await other.goto(`${url}/#events?prefix=cut/&snapshot=true`);
    await says(/live · 4 events/);
    assert.equal(await other.locator('.event').count(), 4);
    // Names that turn letters round are written out.
    await put('cut/\u202egnp.exe', 1);
    await until('written out', async () => (await other.locator('.event').first().innerText()).includes('cut/\\u202egnp.exe'));
    await other.close();
  },

  async 'vectors: a press while vectors come in is heard'() {
    for (const name of ['press1', 'press2']) await api('POST', `/v1/vector/${name}`, { dim: 2, metric: 'l2' });
    const other = await aside('#vectors?collection=press1');
    const facts = () => other.locator('#collection-facts').innerText(), one = other.locator('[data-collection=press2]');
    await until('the collection', async () => /^0 vectors/.test(await facts()));
    const box = await one.boundingBox();
    await other.mouse.move(box.x + 20, box.y + 10);
    await other.mouse.down();
    await api('POST', '/v1/vector/press2/upsert', { id: 'a', vector: [1, 2] });
    await until('it came in', async () => /^press2\s*1\s/.test(await one.innerText()));
    await other.mouse.up();
    await until('open', async () => /^1 vector · 2 numbers/.test(await facts()) && await one.getAttribute('aria-pressed') === 'true');
    for (const name of ['press1', 'press2']) await api('DELETE', `/v1/vector/${name}`);
    await other.close();
  },

  async 'jobs: odd words and times; copying by hand; tabs by keyboard'() {
    for (const [id, status] of [['odd1', 'constructor'], ['odd2', '__proto__']]) await put(`odd/${id}`, { status, started_at_ms: -1e300, title: '\u202eodd' }, { meta: { job_id: id } });
    const other = await aside('#jobs?prefix=odd/');
    const odd = other.locator('[data-job=odd1]');
    await odd.waitFor();
    await until('both run', async () => await other.locator('.chip.running b').innerText() === '2');
    await until('a time that can be', async () => /\\u202eodd/.test(await odd.innerText()) && !/\dd \d+h/.test(await odd.locator('.job-foot').innerText()));
    await odd.click();
    await other.evaluate(() => { navigator.clipboard.writeText = () => Promise.reject(new Error('plain HTTP')); });
    await other.click('text=Copy as curl');
    await until('to be copied by hand', async () => /^curl -N /.test(await other.locator('#by-hand textarea').inputValue()));
    await other.evaluate(() => new Promise((done) => setTimeout(done, 3500)));
    await other.click('#by-hand >> text=Close');
    assert.equal(await other.locator('#by-hand').count(), 0);
    await other.goto(`${url}/#state?prefix=odd/&key=odd/odd1`);
    await other.locator('#tab-edit').waitFor();
    await other.locator('#tab-value').focus();
    await other.keyboard.press('ArrowLeft');
    await other.keyboard.press('Enter');
    await until('the last tab', () => other.evaluate(() => document.activeElement.id === 'tab-history' && document.activeElement.ariaSelected === 'true'));
    await other.keyboard.press('Home');
    await other.keyboard.press('Enter');
    await until('the first tab', () => other.evaluate(() => document.activeElement.id === 'tab-value' && document.activeElement.ariaSelected === 'true'));
    await other.close();
  },

  async 'fits every width'() {
    for (const width of [375, 700, 1280]) {
      await page.setViewportSize({ width, height: 800 });
      for (const name of ['Overview', 'State', 'Events', 'Vectors', 'Jobs']) {
        await view(name);
        if (name === 'State') { await prefix('user:00001'); await keyName('user:000010').click(); await page.click('#tab-edit'); }
        if (name === 'Events') { await page.click('#publish-open'); await publish('wide', { text: 'x'.repeat(300) }, { key: 'k'.repeat(300) }); await until('it', async () => (await text('.event')).includes('wide')); await page.locator('.event').first().click(); }
        if (name === 'Vectors') { await page.fill('#search [name=what]', 'b'); await page.selectOption('#search [name=by]', 'id'); await page.fill('#search [name=filters]', ''); await page.selectOption('#search [name=mode]', 'both'); await page.fill('#search [name=k]', '10'); await page.click('#search button'); await until('hits', async () => await page.locator('.hit').count() === 6); }
        if (name === 'Jobs') await page.locator('.job').first().click();
        await until(`no sideways scroll in ${name} at ${width}`, () => page.evaluate(() => document.documentElement.scrollWidth <= innerWidth && document.body.scrollWidth <= innerWidth), 3000);
        const wide = await page.evaluate(() => [...document.querySelectorAll('main *')].filter((n) => { const b = n.getBoundingClientRect(); return b.width && b.right > innerWidth + 1 && !n.closest('.tree, .tail, pre, .value, .log'); }).map((n) => n.className || n.tagName).slice(0, 5));
        assert.deepEqual(wide, [], `${name} at ${width}: cut off on the right`);
        await page.keyboard.press('Escape');
        if (name === 'Events') await page.keyboard.press('Escape');
      }
    }
  },
};

/** Pictures for the documentation, of a server that does something. */
async function shots(into) {
  const demo = await serve(['--port', '0', '--data-dir', join(dir, 'shots')]);
  const write = async (method, path, body) => { const res = await fetch(demo.url + path, { method, headers: { 'Content-Type': 'application/json' }, body: JSON.stringify(body) }); assert(res.ok, `${method} ${path} ${res.status}`); return res.json(); };
  // Real sentences, with the embeddings that the demo carries.
  const root = process.env.ROOT ?? '.', lines = readFileSync(join(root, 'demo/corpus.ndjson'), 'utf8').trim().split('\n').map((l) => JSON.parse(l));
  const file = readFileSync(join(root, 'demo/corpus.f16.npy')), from = 10 + file.readUInt16LE(8);
  const half = (at) => { const h = file.readUInt16LE(at), e = (h >> 10) & 31, f = h & 1023, v = e ? 2 ** (e - 15) * (1 + f / 1024) : 2 ** -14 * (f / 1024); return h >> 15 ? -v : v; };
  await write('POST', '/v1/vector/sentences', { dim: 384, metric: 'cosine' });
  await write('POST', '/v1/vector/sentences/upsert', { items: lines.map(({ id, topic, text: words }, i) => ({ id, vector: Array.from({ length: 384 }, (_, d) => half(from + 2 * (i * 384 + d))), meta: { topic, text: words } })) });
  let seed = 7;
  const random = () => (seed = seed * 16807 % 2147483647) / 2147483647, normal = () => Math.sqrt(-2 * Math.log(random())) * Math.cos(6.283 * random());
  const albums = ['alps', 'forest', 'home', 'kyoto', 'lisbon', 'sea'].map((name) => [name, Array.from({ length: 48 }, () => normal() * 0.9)]);
  await write('POST', '/v1/vector/photos', { dim: 48, metric: 'l2' });
  for (let b = 0; b < 12; b++) await write('POST', '/v1/vector/photos/upsert', { items: Array.from({ length: 1000 }, (_, i) => { const [album, center] = albums[Math.floor(random() * 6)]; return { id: `IMG_${b * 1000 + i + 10000}`, vector: center.map((x) => x + normal() * 0.8), meta: { album, year: 2018 + i % 8 } }; }) });
  for (let b = 0; b < 20; b++) await write('POST', '/v1/batch', { ops: Array.from({ length: 1000 }, (_, i) => ({ op: 'put', key: `user:${String(b * 1000 + i).padStart(5, '0')}`, value: { name: ['Ada', 'Grace', 'Linus', 'Margaret', 'Ken'][i % 5], plan: i % 3 ? 'free' : 'pro' } })) });
  for (const [name, ms] of [['ada', 1800e3], ['grace', 96e3], ['ken', 640e3]]) await write('PUT', `/v1/state/session:${name}`, { value: { user: name, cart: [{ sku: 'A-17', n: 2 }, { sku: 'C-4', n: 1 }], since: '2026-03-01T09:30:00Z' }, ttl_ms: ms });
  await write('PUT', '/v1/state/config%2Ftheme', { value: { accent: 'teal', radius: 10 } });
  await write('PUT', '/v1/state/config%2Fflags', { value: { search: true, beta: ['maps', 'jobs'] } });
  const work = [['Index the handbook', 'running', 31, 'embedding, batch 4 of 13'], ['Transcode keynote.mp4', 'running', 62, 'pass 2 of 2'], ['Nightly backup', 'done', 100, '2.1 GiB written'], ['Render chapter 7', 'running', 88, 'frame 2,112 of 2,400'], ['Import orders.csv', 'failed', 47, 'row 18,201: the date is missing'], ['Send the newsletter', 'queued', 0, 'waits for the import'], ['Train the ranker', 'running', 12, 'epoch 3 of 25'], ['Resize 4,000 photos', 'done', 100, 'all done']];
  for (const [i, [title, , , ]] of work.entries()) await write('PUT', `/v1/state/job:${1041 + i}`, { value: { title, status: 'queued', progress: 0 }, meta: { job_id: String(1041 + i), tags: ['demo'] } });
  const log = (i, message, level = 'info') => write('POST', '/v1/events', { type: 'log', key: `job:${1041 + i}`, data: { level, message }, meta: { job_id: String(1041 + i) } });
  let on = true;
  const progress = work.map(() => 0), steady = (f) => (async () => { for (let n = 0; on; n++) await f(n); })(), rest = (ms) => new Promise((done) => setTimeout(done, ms));
  const load = [
    steady(async (n) => { const [, status, to, message] = work[n % 8]; const i = n % 8; await rest(120); if (status === 'queued' || progress[i] >= to) return; progress[i] = Math.min(to, progress[i] + to / 40 + 0.5); const isEnd = progress[i] >= to; await write('PATCH', `/v1/state/job:${1041 + i}`, { progress: Math.round(progress[i] * 10) / 10, status: isEnd ? status : 'running', message }); await log(i, isEnd && status === 'failed' ? message : ['read 24 documents', 'split into 310 passages', 'embedded 32 passages in 41 ms', 'wrote 32 vectors', 'checked recall: 0.98'][n / 8 % 5 | 0], isEnd && status === 'failed' ? 'error' : 'info'); }),
    steady(async (n) => { await rest(9 + 7 * Math.sin(Date.now() / 7000)); await write('PATCH', `/v1/state/user:${String(n * 37 % 20000).padStart(5, '0')}`, { seen: n }); }),
    steady(async (n) => { await rest(7 + 6 * Math.sin(Date.now() / 11000 + 1)); await (await fetch(`${demo.url}/v1/state/user:${String(n * 91 % 20000).padStart(5, '0')}`)).text(); }),
    steady(async (n) => { await rest(26 + 20 * Math.sin(Date.now() / 5000)); await write('POST', '/v1/vector/photos/search', { id: `IMG_${10000 + n * 53 % 12000}` }); }),
  ];
  const size = { width: 1280, height: 860 };
  const save = async (p, name) => writeFileSync(join(into, `console-${name}.png`), await p.screenshot());
  const visit = { async overview(p) { await rest(1500); }, async state(p) { await p.locator('#tree .node[aria-expanded]', { hasText: 'job:' }).click(); await p.locator('#tree .name[title^="job:"]').first().waitFor(); await rest(300); await p.locator('#tree .node[aria-expanded]', { hasText: 'session:' }).click(); await p.locator('#tree .name[title="session:grace"]').click(); await rest(1200); }, async events(p) { await rest(1500); await p.locator('.event', { hasText: 'log' }).first().waitFor(); await p.click('#pause'); await p.locator('.event', { hasText: 'log' }).first().click(); await rest(600); }, async vectors(p) { await p.locator('.map canvas').waitFor(); await rest(2500); await p.fill('#search [name=what]', 'space-12'); await p.click('#search button'); await rest(1500); }, async jobs(p) { await rest(1200); } };
  const at = { overview: 'overview', state: 'state', events: 'events', vectors: 'vectors?collection=sentences', jobs: 'jobs?job=1041' };
  for (const [scheme, views] of [['light', ['jobs', 'state', 'events', 'vectors', 'overview']], ['dark', ['overview', 'vectors', 'jobs']]]) {
    const ctx = await browser.newContext({ viewport: size, colorScheme: scheme }), p = await open(ctx, `${demo.url}/`);
    if (scheme === 'light') await rest(Number(process.env.SHOTS_WAIT_MS ?? 45000)); else await rest(Number(process.env.SHOTS_WAIT_MS ?? 30000));
    for (const v of views) { await p.goto(`${demo.url}/#${at[v]}`); await visit[v](p); await save(p, `${v}-${scheme}`); }
    await ctx.close();
  }
  const ctx = await browser.newContext({ viewport: { width: 375, height: 780 }, colorScheme: 'dark' }), p = await open(ctx, `${demo.url}/`);
  await p.goto(`${demo.url}/#jobs`);
  await rest(1500);
  await save(p, 'narrow');
  await ctx.close();
  on = false;
  await Promise.all(load);
  await demo.stop();
}

let failed = 0;
try {
  for (const [name, test] of Object.entries(process.env.SHOTS_ONLY ? {} : tests)) {
    const start = Date.now();
    try {
      await test();
      const seen = errors.splice(0);
      assert.equal(seen.length, 0, `the browser complained: ${seen.join('\n')}`);
      console.log(`ok   ${name} (${Date.now() - start} ms)`);
    } catch (e) {
      failed++;
      console.log(`FAIL ${name}\n${e.stack}`);
      await page.screenshot({ path: join(tmpdir(), 'console-failure.png') });
      break; // Each test goes on where the one before left the page.
    }
  }
  if (!failed && process.env.SHOTS) await shots(process.env.SHOTS);
} finally {
  await browser.close();
  for (const child of servers) child.kill('SIGKILL');
  rmSync(dir, { recursive: true, force: true });
}
process.exit(failed ? 1 : 0);
