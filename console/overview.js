// Overview: what the server does now and did in the last three minutes. There is no stream of metrics, so they are asked
// for once a second, whichever view is open, and the charts have no holes.

import { Chart, POINTS } from './chart.js';
import { bytes, copy, duration, el, int, latency, number, rate, say } from './lib.js';
import { limits, mayWrite } from './key.js';
import { curlKey, get, getText } from './server.js';

/** Metrics as far as this page needs it: plain values by name, counters by route, one histogram's buckets. */
export function parseMetrics(text) {
  const out = { values: {}, requests: [], fsync: [] };
  for (const line of text.split('\n')) {
    if (line === '' || line[0] === '#') continue;
    const plain = /^([a-z_]+) (\S+)$/.exec(line);
    if (plain) {
      out.values[plain[1]] = Number(plain[2]);
      continue;
    }
    const request = /^kiss_http_requests_total\{route="([^"]*)",method="([A-Z]+)",status="(\d+)"\} (\d+)/.exec(line);
    if (request) {
      out.requests.push({ route: request[1], method: request[2], status: Number(request[3]), count: Number(request[4]) });
      continue;
    }
    const bucket = /^kiss_fsync_duration_seconds_bucket\{le="([^"]+)"\} (\d+)/.exec(line);
    if (bucket) out.fsync.push([bucket[1] === '+Inf' ? Infinity : Number(bucket[1]), Number(bucket[2])]);
  }
  return out;
}
/** A quantile of what came into a histogram between two readings; within a bucket it is taken to lie evenly. */
export function quantile(was, now, q) {
  const total = (now.at(-1)?.[1] ?? 0) - (was.at(-1)?.[1] ?? 0);
  if (!(total > 0)) return null;
  let low = 0,
    below = 0;
  for (let i = 0; i < now.length; i++) {
    const [edge, count] = now[i],
      upTo = count - (was[i]?.[1] ?? 0);
    if (upTo >= total * q) return edge === Infinity ? low : low + ((edge - low) * (total * q - below)) / Math.max(1, upTo - below);
    low = edge;
    below = upTo;
  }
  return low;
}
const isRead = (r) => r.method === 'GET' && (r.route.startsWith('/v1/state') || r.route.startsWith('/v1/vector/'));
const reads = (m) => m.requests.filter(isRead).reduce((sum, r) => sum + r.count, 0);
const failures = (m) => m.requests.filter((r) => r.status >= 500).reduce((sum, r) => sum + r.count, 0);

const DATA = Object.fromEntries(
  ['writes', 'reads', 'searches', 'p50', 'p99', 'streams', 'delivered', 'resident', 'keys', 'vectors', 'log'].map((name) => [name, []]),
);
function push(name, value) {
  DATA[name].push(value);
  if (DATA[name].length > POINTS) DATA[name].shift();
}

const cards = {};
let health = null,
  before = null,
  nodes = null,
  charts = [],
  isBusy = false,
  isRefused = false,
  healthAt = 0;

/** A chart in a card, with what it says now in its head. */
function card(name, title, options, wide = false) {
  const now = el('b', { class: 'now' }, '–'),
    note = el('span', { class: 'soft' });
  const chart = new Chart({ label: title, ...options });
  charts.push(chart);
  cards[name] = { now, note };
  const keys = options.series.length > 1 ? options.series.map((s) => el('span', { class: `swatch ${s.color.slice(2)}` }, s.name)) : [];
  return el(
    'article',
    { class: wide ? 'card chart-card wide' : 'card chart-card', id: `chart-${name}` },
    el('header', {}, el('h3', {}, title), el('div', { class: 'swatches' }, keys)),
    el('div', { class: 'figure' }, now, note),
    chart.node,
  );
}
function set(name, text, note = '') {
  say(cards[name].now, text);
  say(cards[name].note, note);
}

async function poll() {
  if (isBusy || isRefused) return;
  isBusy = true;
  try {
    const at = performance.now();
    if (!health || at - healthAt > 2500) {
      health = await get('/v1/health');
      healthAt = at;
    }
    drawFacts();
    if (limits()) {
      if (nodes) say(nodes.error, '');
      return;
    } // The figures are about all: nothing is asked that would be refused.
    const m = Object.assign(parseMetrics(await getText('/v1/metrics')), { at: performance.now() });
    const v = m.values;
    // A restarted server counts from zero: no rate across that.
    const was = before && v.kiss_uptime_seconds >= before.values.kiss_uptime_seconds && m.at - before.at < 5000 ? before : null;
    const per = (now, then) => (was ? (Math.max(0, now - then) * 1000) / (m.at - was.at) : null);
    push('writes', per(v.kiss_revision, was?.values.kiss_revision));
    push('reads', per(reads(m), was && reads(was)));
    push('searches', per(v.kiss_searches_total, was?.values.kiss_searches_total));
    push('p50', was && quantile(was.fsync, m.fsync, 0.5));
    push('p99', was && quantile(was.fsync, m.fsync, 0.99));
    push('streams', v.kiss_streams);
    push('delivered', per(v.kiss_stream_events_total, was?.values.kiss_stream_events_total));
    push('resident', v.process_resident_memory_bytes);
    push('keys', v.kiss_key_memory_bytes);
    push('vectors', v.kiss_vector_memory_bytes);
    push('log', v.kiss_log_bytes);
    before = m;
    draw(m);
    if (nodes) say(nodes.error, '');
  } catch (e) {
    health = null;
    if (e.status === undefined) throw e; // Not the server's: ours.
    isRefused = e.status === 403 && !e.isAway; // A key with limits may not see what is about all: asking again does not help.
    if (nodes && e.status && e.status !== 401) say(nodes.error, e.message); // The others are the banner's to tell.
  } finally {
    isBusy = false;
  }
}

const MODES = {
  always: 'a write is on disk before it is answered',
  interval: 'on disk within a second; a power cut can take the last one back',
  never: 'the system decides when it reaches the disk',
  ephemeral: 'in memory only; a restart starts empty',
};
/** What is known without a right: anybody may ask for the server's health. */
function drawFacts(isPoisoned = health?.status === 'poisoned') {
  if (!nodes || !health) return;
  for (const node of [nodes.charts, nodes.tiles]) node.hidden = limits() !== null;
  nodes.part.hidden = limits() === null;
  if (limits()) nodes.start.hidden = true;
  const isWell = health.status === 'ok' && !isPoisoned,
    revision = number(health.revision);
  nodes.health.className = isWell ? 'fact good' : 'fact bad';
  say(
    nodes.health.lastChild,
    isWell ? 'healthy' : isPoisoned ? 'poisoned: a write to disk failed; reads go on, writes wait for a restart' : health.status,
  );
  nodes.mode.className = health.durability === 'always' ? 'fact good' : 'fact warn';
  nodes.mode.title = MODES[health.durability] ?? '';
  say(nodes.mode.lastChild, health.durability === 'ephemeral' ? 'in memory' : `durable: ${health.durability}`);
  say(nodes.modeText, MODES[health.durability] ?? '');
  say(nodes.up, `up ${duration(health.uptime_s)}`);
  say(nodes.version, `v${health.version}`);
  say(nodes.log, revision ? `log keeps ${int(health.oldest)} to ${int(revision)}` : 'log is empty');
}
function draw(m) {
  if (!nodes || !health) return;
  drawFacts(Boolean(m.values.kiss_poisoned) || undefined);
  const v = m.values,
    last = (name) => DATA[name].at(-1),
    peak = (name) => Math.max(0, ...DATA[name].filter((n) => n != null));
  say(nodes.up, `up ${duration(v.kiss_uptime_seconds)}`);
  say(nodes.log, v.kiss_revision ? `log keeps ${int(health.oldest)} to ${int(v.kiss_revision)}` : 'log is empty');
  set('writes', int(v.kiss_revision), `${rate(last('writes'))} writes/s · peak ${rate(peak('writes'))}`);
  set('reads', rate(last('reads')), `a second · peak ${rate(peak('reads'))}`);
  set('searches', rate(last('searches')), `a second · ${int(v.kiss_searches_total)} so far`);
  const hasSync = health.durability === 'always',
    syncs = m.fsync.at(-1)?.[1] ?? 0;
  const shown = DATA.p99.findLast((n) => n != null) ?? null;
  set('fsync', hasSync ? latency(shown) : '–', hasSync ? `p99 · ${int(syncs)} syncs` : 'no sync per write in this mode');
  set('streams', int(v.kiss_streams), `open · ${int(v.kiss_connections)} connections`);
  set('delivered', rate(last('delivered')), `events/s to streams · ${int(v.kiss_stream_events_total)} so far`);
  set('memory', bytes(v.process_resident_memory_bytes), 'resident');
  set('log', health.durability === 'ephemeral' ? 'none' : bytes(v.kiss_log_bytes), 'on disk');
  const facts = {
    keys: int(v.kiss_keys),
    'with a deadline': int(v.kiss_keys_with_ttl),
    collections: int(v.kiss_collections),
    vectors: int(v.kiss_vectors),
    'not linked yet': int(v.kiss_vectors_pending),
    snapshots: int(v.kiss_snapshots_total),
    'failed answers': int(failures(m)),
  };
  if (!nodes.tiles.children.length) for (const name of Object.keys(facts)) nodes.tiles.append(el('div', {}, el('dt', {}, name), el('dd')));
  Object.values(facts).forEach((text, i) => say(nodes.tiles.children[i].lastChild, text));
  nodes.start.hidden = v.kiss_revision > 0;
  for (const chart of charts) chart.draw();
}

/** The first minute, in lines to paste: for the key at hand. */
function starter() {
  const line = (text, title) =>
    el(
      'div',
      { class: 'try' },
      el('p', { class: 'soft' }, title),
      el('pre', {}, text),
      el('button', { type: 'button', onclick: () => copy(text) }, 'Copy'),
    );
  const json = `-H 'content-type: application/json'`,
    at = location.origin;
  nodes.start.replaceChildren(
    ...[
      el('h2', {}, 'Nothing here yet. The first minute:'),
      curlKey() &&
        el(
          'p',
          { class: 'soft' },
          'This server wants a key: ',
          el('code', {}, 'export API_KEY=…'),
          ' first, with the one you gave this page.',
        ),
      line(`curl -N ${at}/v1/events${curlKey()}`, 'Watch everything that happens, in one terminal (or here, in Events).'),
      ...(mayWrite()
        ? [
            line(
              `curl -X PUT ${at}/v1/state/job:1${curlKey()} ${json} -d '{"value":{"progress":0},"meta":{"job_id":"1"}}'`,
              'A job: it shows in Jobs at once.',
            ),
            line(`curl -X PATCH ${at}/v1/state/job:1${curlKey()} ${json} -d '{"progress":42}'`, 'Its progress.'),
            el('p', { class: 'soft' }, 'Or let this page do it: ', el('a', { href: '#jobs' }, 'Jobs'), ' runs a sample job for you.'),
          ]
        : []),
    ].filter(Boolean),
  );
}

/** Keys in all, as of the last reading. */
export const keyCount = () => before?.values.kiss_keys;

export const overview = {
  title: 'Overview',
  streams: [],
  poll,
  fresh() {
    isRefused = false;
    health = before = null;
    if (nodes) starter();
  },
  mount(root) {
    const fact = (id) => el('span', { class: 'fact', id }, el('i', { class: 'dot' }), el('span', {}, '…'));
    nodes = {
      health: fact('health'),
      mode: fact('durability'),
      modeText: el('span', { class: 'soft wide-only' }),
      up: el('span', { class: 'soft' }),
      version: el('span', { class: 'soft' }),
      log: el('span', { class: 'soft', id: 'log-range' }),
      tiles: el('dl', { class: 'tiles', id: 'tiles' }),
      error: el('p', { class: 'error', role: 'alert' }),
      start: el('section', { class: 'card', id: 'start', hidden: true }),
      charts: el('div', { class: 'charts' }),
      part: el(
        'section',
        { class: 'card empty-card', id: 'part', hidden: true },
        el('h2', {}, 'This key reaches a part of the server.'),
        el(
          'p',
          { class: 'soft' },
          'The figures of this page are about the whole, so they are for keys without limits. The line above says what the key reaches, and leads there.',
        ),
      ),
    };
    const one = (name, color, points = DATA[name]) => ({ name, color: `--${color}`, points });
    root.append(
      el(
        'div',
        { class: 'facts' },
        nodes.health,
        nodes.mode,
        nodes.modeText,
        el('span', { class: 'grow' }),
        nodes.log,
        nodes.up,
        nodes.version,
      ),
      nodes.error,
      nodes.start,
      nodes.part,
      nodes.charts,
      nodes.tiles,
    );
    nodes.charts.append(
      card('writes', 'Revision', { series: [one('writes', 'teal')], format: rate, least: 10 }, true),
      card('fsync', 'Sync to disk', { series: [one('p99', 'amber'), one('p50', 'soft')], format: latency, least: 0.001 }),
      card('reads', 'Reads', { series: [one('reads', 'blue')], format: rate, least: 10 }),
      card('searches', 'Searches', { series: [one('searches', 'violet')], format: rate, least: 10 }),
      card('streams', 'Streams', { series: [one('streams', 'green')], format: int, least: 4 }),
      card('delivered', 'Events out', { series: [one('delivered', 'green')], format: rate, least: 10 }),
      card('memory', 'Memory', {
        series: [one('process', 'blue', DATA.resident), one('keys', 'teal'), one('vectors', 'violet')],
        format: bytes,
        base: 1024,
      }),
      card('log', 'Log', { series: [one('log', 'rose')], format: bytes, base: 1024 }),
    );
    starter();
    drawFacts();
  },
  show() {
    if (before) draw(before);
  },
};
