// The console in a real browser, against a real server.
//
//   node tests/console.mjs target/release/kiss-vdb
//
// Needs playwright-core (found from here or through NODE_PATH) and a Chromium (CHROMIUM, default /usr/bin/chromium).
// CONSOLE_HTML=console/index.html tries that file in place of the page built into the binary; SHOTS=docs writes screenshots.
import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
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
let forgiven = /(?!)/; // What the browser itself logs for answers that a test provokes.
async function open(context, at, headers) {
  const page = await context.newPage();
  page.on('console', (m) => { if (m.type() === 'error' && !forgiven.test(m.text())) errors.push(m.text()); });
  page.on('pageerror', (e) => errors.push(String(e)));
  page.on('dialog', (d) => { errors.push(`dialog: ${d.message()}`); d.dismiss(); });
  page.on('request', (r) => { if (!r.url().startsWith(new URL(at).origin) && !r.url().startsWith('data:')) errors.push(`outside: ${r.url()}`); });
  const root = new URL('/', at).href;
  await page.route(root, async (route) => {
    if (!process.env.CONSOLE_HTML) return route.continue({ headers: { ...route.request().headers(), ...headers } });
    const response = await route.fetch({ headers: { ...route.request().headers(), ...headers } }); // for its headers, the policy among them
    await route.fulfill({ response, body: readFileSync(process.env.CONSOLE_HTML, 'utf8') });
  });
  page.setDefaultTimeout(10000);
  await page.goto(at);
  return page;
}
const context = await browser.newContext({ viewport: { width: 1200, height: 800 }, colorScheme: 'light' });
const page = await open(context, url + '/');
const text = (selector) => page.locator(selector).innerText();
const row = (key) => page.locator('#keys tr').filter({ has: page.getByText(key, { exact: true }) });
const detail = (name) => page.locator(`#detail [name=${name}]`);
async function until(what, check, ms = 10000) {
  const end = Date.now() + ms;
  let last;
  while (Date.now() < end) {
    try { if (last = await check()) return last; } catch (e) { last = e; }
    await new Promise((done) => setTimeout(done, 40));
  }
  throw new Error(`never: ${what} (last: ${last})`);
}
const view = (name) => page.click(`nav a:text("${name}")`);
const state = (wanted) => until(wanted, async () => await text('#pill-text') === wanted, 15000);

const tests = {
  async 'overview follows revision, rate and metrics'() {
    await state('connected');
    assert.equal(await text('h1'), 'KISS VDB');
    await until('health', async () => /health\s*ok/.test(await text('#tiles')));
    for (let i = 0; i < 40; i++) await put(`seed:${i}`, { i });
    await until('revision 40', async () => await text('#head') === '40', 3000);
    await until('40 keys', async () => /keys\s*40\n/.test(await text('#tiles')));
    assert.match(await text('#tiles'), /durability\s*always/);
    await until('a rate', async () => /peak [1-9]/.test(await text('#rate')));
    await until('a line', async () => (await page.getAttribute('#spark .line', 'd')).split('L').length > 2);
  },

  async 'state: list, create, live changes'() {
    await view('State');
    await until('40 rows', async () => await page.locator('#keys tr').count() === 40);
    await page.click('#new-key');
    await detail('key').fill('job:1');
    await detail('value').fill('{"progress": 1.10, "big": 12345678901234567890, "html": "<img src=x onerror=alert(1)>"}');
    await detail('meta').fill('{"job_id": "1", "tags": ["a", "b"]}');
    await page.click('#save');
    await until('the row', async () => (await row('job:1').innerText()).includes('<img src=x onerror=alert(1)>'));
    assert.match(await text('#badges'), /revision 41.*job 1.*tags a, b/s);
    assert.match(await api('GET', '/v1/state/job:1'), /"progress":1.10,"big":12345678901234567890/);
    // A put, a patch and a delete by somebody else show without a reload; an unedited editor follows.
    await api('PATCH', '/v1/state/job:1', { html: null, step: 2 }, 'application/merge-patch+json');
    await until('the patch', async () => await row('job:1').locator('td').nth(1).innerText() === '{"progress":1.10,"big":12345678901234567890,"step":2}');
    await until('the editor', async () => (await detail('value').inputValue()).includes('"step": 2'));
    await put('job:0', 'first');
    await until('a new row', async () => await row('job:0').count() === 1);
    assert.equal(await page.locator('#keys button').first().innerText(), 'job:0', 'in order');
    await api('DELETE', '/v1/state/job:0');
    await until('it goes', async () => await row('job:0').count() === 0);
  },

  async 'state: compare and set'() {
    await detail('value').fill('{"mine": true}');
    await put('job:1', { theirs: true });
    await until('a warning', async () => /came in while you edit/.test(await text('#detail-error')));
    forgiven = /409/;
    await page.click('#save');
    await until('both values', async () => { const t = await text('#conflict'); return t.includes('"mine": true') && t.includes('"theirs": true'); });
    assert.match(await api('GET', '/v1/state/job:1'), /"theirs":true/, 'nothing was written');
    await page.click('text=Take theirs');
    assert.match(await detail('value').inputValue(), /theirs/);
    await detail('value').fill('{"mine": 2}');
    await put('job:1', { theirs: 2 });
    await page.click('#save');
    await page.click('text=Write mine over it');
    await until('mine', async () => (await api('GET', '/v1/state/job:1')).includes('"value":{"mine":2}'));
    // A new key that exists already.
    await page.click('#new-key');
    await detail('key').fill('job:1');
    await detail('value').fill('0');
    await page.click('#save');
    await until('a conflict', async () => (await text('#conflict')).includes('"mine": 2'));
    await page.click('text=Take theirs');
    forgiven = /(?!)/;
  },

  async 'state: patch, deadline, delete'() {
    await page.click('#patch-mode');
    await detail('value').fill('{"patched": [1]}');
    await page.click('#save');
    await until('the patch', async () => (await row('job:1').innerText()).includes('{"mine":2,"patched":[1]}'));
    await detail('ends').selectOption('in');
    await detail('seconds').fill('100');
    await page.click('#save');
    await until('a deadline', async () => /^1m 3\ds$/.test(await row('job:1').locator('.ends').innerText()));
    const before = await row('job:1').locator('.ends').innerText();
    await until('it counts down', async () => await row('job:1').locator('.ends').innerText() !== before);
    // An edit keeps the deadline and the labels unless told otherwise.
    const was = JSON.parse(await api('GET', '/v1/state/job:1'));
    await detail('value').fill('"again"');
    await page.click('#save');
    const now = await until('the edit', async () => { const e = JSON.parse(await api('GET', '/v1/state/job:1')); return e.value === 'again' && e; });
    assert(Math.abs(now.expires_at_ms - was.expires_at_ms) < 1500, `${now.expires_at_ms} ${was.expires_at_ms}`);
    await put('job:2', 1, { ttl_ms: 1500 });
    await until('it appears', async () => await row('job:2').count() === 1);
    await until('it ends', async () => await row('job:2').count() === 0);
    await page.click('#delete');
    await page.click('text=Really delete');
    await until('it goes', async () => await row('job:1').count() === 0);
    assert(await page.locator('#detail').isHidden());
  },

  async 'state: prefix, pages, odd keys, bytes'() {
    const ops = Array.from({ length: 250 }, (_, i) => ({ op: 'put', key: `page:${String(i).padStart(3, '0')}`, value: i }));
    await api('POST', '/v1/batch', { ops: [...ops, { op: 'put', key: '..', value: 'dots' }, { op: 'put', key: 'odd/é 🙂?#%', value: null }] });
    await page.fill('#prefix-form [name=prefix]', 'page:');
    await until('page 1', async () => await page.locator('#keys tr').count() === 100 && await page.locator('#keys button').first().innerText() === 'page:000');
    assert.match(page.url(), /#state\?prefix=page%3A$/);
    await page.click('#next');
    await until('page 2', async () => /page 2 · 100 keys/.test(await text('#page-info')));
    assert.equal(await page.locator('#keys button').first().innerText(), 'page:100');
    await put('page:150', 'changed');
    await until('live on page 2', async () => (await row('page:150').innerText()).includes('changed'));
    await put('page:150b', 'between');
    await until('an insert', async () => await row('page:150b').count() === 1);
    await page.click('#next');
    await until('page 3', async () => await page.locator('#keys button').first().innerText() === 'page:199');
    assert.equal(await page.locator('#keys tr').count(), 51, 'the key pushed off page 2 is on page 3');
    await put('page:999', 'last');
    await until('an append', async () => await row('page:999').count() === 1);
    await put('pagf', 'outside');
    await page.click('#prev');
    await until('page 2', async () => /page 2/.test(await text('#page-info')));
    for (const key of ['..', 'odd/é 🙂?#%']) {
      await page.fill('#prefix-form [name=prefix]', key);
      await row(key).click();
      await detail('value').fill('"edited"');
      await page.click('#save');
      await until('saved', async () => (await row(key).innerText()).includes('edited'));
      await page.keyboard.press('Escape');
    }
    await api('PUT', '/v1/state/bytes', 'plain <b>text</b>', 'text/plain');
    await page.fill('#prefix-form [name=prefix]', 'bytes');
    await row('bytes').click();
    assert.equal(await text('#bytes pre'), 'plain <b>text</b>');
    assert(await page.locator('#save').isHidden());
    await page.keyboard.press('Escape');
    await page.fill('#prefix-form [name=prefix]', '');
  },

  async 'events: filter, publish, expand'() {
    await view('Events');
    await until('live', async () => /live/.test(await text('#tail-info')));
    await page.fill('#filter [name=prefix]', 'job:');
    await page.fill('#filter [name=types]', 'progress,state_updated');
    await page.click('text=Follow');
    await until('live', async () => /live · 0/.test(await text('#tail-info')));
    await publish('other', 1, { key: 'job:1' });
    await put('elsewhere', 1);
    await publish('progress', { percent: 5, html: '<script>alert(1)</script>' }, { key: 'job:1', meta: { tags: ['x'] } });
    await until('one event', async () => await page.locator('.ev').count() === 1);
    await page.locator('.ev summary').first().click();
    await until('its JSON', async () => (await text('.ev pre')).includes('"<script>alert(1)</script>"'));
    await page.click('#publish-box summary');
    await page.fill('#publish [name=key]', 'job:9');
    await page.fill('#publish [name=data]', '{"from": "console"}');
    await page.click('#publish button');
    await until('mine', async () => (await page.locator('.ev').first().innerText()).includes('{"from":"console"}'));
    await page.fill('#publish [name=data]', '{oops');
    await page.click('#publish button');
    await until('a complaint', async () => /Data is not JSON/.test(await text('#publish-info')));
    await page.fill('#publish [name=data]', '1');
    await page.check('#publish [name=ephemeral]');
    await page.click('#publish button');
    await until('an ephemeral one', async () => await page.locator('.ev').count() === 3);
    await page.click('#curl');
    assert.equal(await text('#curl-text'), `curl -N '${url}/v1/events?prefix=job%3A&types=progress%2Cstate_updated'`);
  },

  async 'events: a pause loses nothing'() {
    await page.goto(`${url}/#events?types=tick`);
    await until('live', async () => /live · 0/.test(await text('#tail-info')));
    await page.click('#pause');
    for (let i = 0; i < 5; i++) await publish('tick', i);
    await until('5 wait', async () => /paused · 5 waiting/.test(await text('#tail-info')));
    assert.equal(await page.locator('.ev').count(), 0);
    await page.click('#pause');
    await until('5 shown', async () => await page.locator('.ev').count() === 5);
    // More than is held in memory: the stream lets go and resumes from the log.
    await page.click('#pause');
    for (let n = 0; n < 5; n++) await api('POST', '/v1/batch', { ops: Array.from({ length: 900 }, (_, i) => ({ op: 'event', type: 'tick', data: n * 900 + i })) });
    await until('full', async () => /2,000 waiting, the rest stays/.test(await text('#tail-info')));
    await page.click('#pause');
    await until('all 4505', async () => /live · 4,505 events/.test(await text('#tail-info')));
    assert.match(await page.locator('.ev').first().innerText(), /4499/);
    assert.equal(await page.locator('.ev').count(), 300);
    // A hidden tab lets go of its connections.
    const hide = (hidden) => page.evaluate((h) => {
      Object.defineProperty(document, 'hidden', { configurable: true, get: () => h });
      document.dispatchEvent(new Event('visibilitychange'));
    }, hidden);
    await hide(true);
    await until('no streams', async () => /kiss_streams 0/.test(await api('GET', '/v1/metrics')));
    await publish('tick', 'while hidden');
    await hide(false);
    await until('what was missed', async () => (await page.locator('.ev').first().innerText()).includes('while hidden'));
    // Another view and back.
    await view('Overview');
    await publish('tick', 'while away');
    await view('Events');
    await until('what was missed', async () => (await page.locator('.ev').first().innerText()).includes('while away'));
  },

  async 'events: snapshot, history, reset, refusal'() {
    await page.goto(`${url}/#events?prefix=page:00&snapshot=true`);
    await until('the snapshot', async () => (await page.locator('.ev').first().innerText()).includes('10 entries'));
    assert.equal(await page.locator('.ev').count(), 11);
    await page.goto(`${url}/#events?since=0&key=job:1`);
    await until('history', async () => await page.locator('.ev').count() > 5);
    await page.goto(`${url}/#events?since=99999999`);
    await until('a reset', async () => /reset\s*future/.test(await text('.ev')));
    forgiven = /400/;
    await page.goto(`${url}/#events?since=yesterday`);
    await until('a refusal', async () => (await text('#tail-error')).length > 10);
    forgiven = /(?!)/;
    await page.fill('#filter [name=since]', '');
    await page.click('text=Follow');
    await until('live', async () => /live · 0/.test(await text('#tail-info')));
    assert.equal(await text('#tail-error'), '');
  },

  async 'vectors: collections and search'() {
    await view('Vectors');
    await until('none yet', async () => page.locator('#no-collections').isVisible());
    await api('POST', '/v1/vector/docs', { dim: 3, metric: 'cosine' });
    await api('POST', '/v1/vector/docs/upsert', { items: [
      { id: 'a/1', vector: [1, 0, 0], meta: { lang: 'es', title: '<b>uno</b>', year: 2020 } },
      { id: 'b', vector: [0.9, 0.1, 0], meta: { lang: 'en', title: 'two', year: 2023 } },
      { id: 'c', vector: [0, 1, 0], meta: { lang: 'es', title: 'tres', year: 2024 } },
      { id: 'd', vector: [-1, 0, 0.2] }] });
    await until('the collection', async () => /docs\s*cosine\s*3\s*4/.test(await text('#collections')));
    await until('the ids', async () => await page.locator('#hits tr').count() === 4);
    await page.locator('#hits button').first().click();
    await until('hits', async () => /4 hits at revision \d/.test(await text('#hits-info')) && /a\/1\s*1\.0000.*"<b>uno<\/b>"/s.test(await text('#hits')));
    assert.match(await page.locator('#hits tr').last().innerText(), /d\s*-0\.98/);
    await page.selectOption('#search [name=by]', 'vector');
    await page.fill('#search [name=what]', '0 1 0.1');
    await page.fill('#search [name=filters]', '{"year": {"$gte": 2023}}');
    await page.fill('#search [name=k]', '1');
    await page.keyboard.press('Enter');
    await until('the filtered hit', async () => /^c\s/.test(await text('#hits')) && await page.locator('#hits tr').count() === 1);
    forgiven = /400/;
    await page.fill('#search [name=what]', '[1, 2]');
    await page.keyboard.press('Enter');
    await until('a refusal', async () => /dim|length|numbers/.test(await text('#search-error')));
    forgiven = /(?!)/;
    assert.match(page.url(), /collection=docs/);
  },

  async 'a restart of the server'() {
    forgiven = /Failed to load resource|ERR_/;
    await view('State');
    await page.fill('#prefix-form [name=prefix]', 'again');
    await put('again', 'before');
    await until('the key', async () => (await row('again').innerText()).includes('before'));
    await server.stop('SIGKILL');
    await state('reconnecting');
    server = await serve(['--port', port, '--data-dir', data]);
    await put('again', 'after');
    await state('connected');
    await until('what was missed', async () => (await row('again').innerText()).includes('after'));
    await view('Events');
    await until('live', async () => /live/.test(await text('#tail-info')));
    await server.stop();
    await until('reconnecting', async () => /reconnecting/.test(await text('#tail-info')));
    server = await serve(['--port', port, '--data-dir', data]);
    await publish('back', 1);
    await until('resumed', async () => (await page.locator('.ev').first().innerText()).includes('back'), 15000);
    // Another, empty database at the same address: nothing of the old one stays on the page.
    await view('State');
    await until('the key', async () => await row('again').count() === 1);
    await server.stop();
    const other = await serve(['--port', port, '--ephemeral']);
    await state('connected');
    await until('an empty list', async () => await page.locator('#keys tr').count() === 0, 15000);
    await view('Overview');
    await until('revision 0', async () => await text('#head') === '0');
    await other.stop();
    server = await serve(['--port', port, '--data-dir', data]);
    await state('connected');
    forgiven = /(?!)/;
    await page.click('#pill');
    await state('stopped');
    const shown = await text('#head');
    await put('unseen', 1);
    await new Promise((done) => setTimeout(done, 1500));
    assert.equal(await text('#head'), shown, 'stopped means stopped');
    await page.click('#pill');
    await state('connected');
  },

  async 'keyboard'() {
    await page.locator('body').press('2');
    assert.equal(await text('[aria-current]'), 'State');
    await page.keyboard.press('/');
    assert.equal(await page.evaluate(() => document.activeElement.name), 'prefix');
    await page.keyboard.type('page:');
    await until('keys', async () => /page 1 · 100/.test(await text('#page-info')));
    await page.locator('#keys button').first().focus();
    await page.keyboard.press('ArrowDown');
    await page.keyboard.press('Enter');
    assert.equal(await text('#detail-title'), 'page:001');
    await page.keyboard.press('Escape');
    assert.equal(await page.evaluate(() => document.activeElement.textContent), 'page:001');
  },

  async 'a key'() {
    const locked = await serve(['--port', '0', '--ephemeral'], { API_KEY: 'open sesame' });
    forgiven = /401/;
    // What lets the page through stands for a proxy; the calls of the page itself have no key yet.
    const other = await open(context, locked.url + '/', { authorization: 'Bearer open sesame' });
    await other.fill('#auth [name=key]', 'wrong');
    await other.click('#auth button');
    await until('asked again', async () => other.locator('#auth').isVisible());
    forgiven = /(?!)/;
    await other.fill('#auth [name=key]', 'open sesame');
    await other.click('#auth button');
    await until('connected', async () => await other.locator('#pill-text').innerText() === 'connected');
    await until('tiles', async () => /health\s*ok/.test(await other.locator('#tiles').innerText()));
    assert(await other.locator('#auth').isHidden());
    await other.close();
    await locked.stop();
  },

  async 'fits every width'() {
    for (const width of [375, 700, 1200]) {
      await page.setViewportSize({ width, height: 800 });
      for (const name of ['Overview', 'State', 'Events', 'Vectors']) {
        await view(name);
        if (name === 'State') await page.locator('#keys button').first().click();
        await until('no sideways scroll', () => page.evaluate(() => document.documentElement.scrollWidth <= innerWidth));
        if (name === 'State') await page.keyboard.press('Escape');
      }
    }
  },
};

/** Pictures for the documentation, with something to see in them. */
async function shots(into) {
  const demo = await serve(['--port', '0', '--data-dir', join(dir, 'shots')]);
  const write = (method, path, body) => fetch(demo.url + path, { method, headers: { 'Content-Type': 'application/json' }, body: JSON.stringify(body) });
  const names = ['ada', 'grace', 'linus', 'margaret', 'ken'];
  for (let i = 0; i < 18; i++) await write('PUT', `/v1/state/job:${100 + i}`, { value: { state: i % 3 ? 'running' : 'done', progress: (i * 17) % 100, owner: names[i % 5] }, ...(i % 4 ? {} : { ttl_ms: 900000 + i * 61000 }), meta: { job_id: String(100 + i), tags: ['render'] } });
  await write('POST', '/v1/vector/docs', { dim: 8, metric: 'cosine' });
  await write('POST', '/v1/vector/docs/upsert', { items: Array.from({ length: 400 }, (_, i) => ({ id: `doc-${i}`, vector: Array.from({ length: 8 }, (_, j) => Math.sin(i * 0.7 + j * j)), meta: { lang: ['es', 'en', 'de'][i % 3], year: 2018 + i % 8 } })) });
  let on = true;
  const load = (async () => { for (let i = 0; on; i++) { await write('PATCH', `/v1/state/job:${100 + i % 18}`, { progress: i % 100 }); await new Promise((done) => setTimeout(done, 6 + 5 * Math.sin(i / 150))); } })();
  const size = { width: 1200, height: 800 };
  for (const [name, scheme, viewport, views] of [['light', 'light', size, ['overview', 'state', 'events', 'vectors']], ['dark', 'dark', size, ['state', 'overview', 'events', 'vectors']], ['narrow', 'light', { width: 375, height: 800 }, ['events', 'overview', 'state', 'vectors']]]) {
    const ctx = await browser.newContext({ viewport, colorScheme: scheme });
    const p = await open(ctx, demo.url + '/');
    await p.waitForTimeout(name === 'light' ? 40000 : 4000);
    for (const [i, v] of views.entries()) {
      await p.goto(`${demo.url}/#${v}${v === 'state' ? '?prefix=job:' : ''}`);
      await p.waitForTimeout(1500);
      if (v === 'state' && name !== 'narrow') await p.locator('#keys button').nth(3).click();
      if (v === 'vectors') await p.locator('#hits button').nth(2).click();
      await p.waitForTimeout(800);
      await p.screenshot({ path: i === 0 ? join(into, `console-${name}.png`) : join(dir, '..', `console-${name}-${v}.png`) });
    }
    await ctx.close();
  }
  on = false;
  await load;
  await demo.stop();
}

let failed = 0;
try {
  for (const [name, test] of Object.entries(tests)) {
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
