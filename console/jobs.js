// Jobs: whatever carries a `job_id`. The server knows no jobs; this view makes them of keys and events as they come.
//
//   snapshot=true: every key ──▶ those with a job_id ──▶ Job ◀── every event with that job_id, as it happens
//
// No filter of the stream says "has a job_id", so everything passes here and is looked at as text before it is parsed;
// the field on top narrows the stream to keys that begin so.

import {
  arrange,
  brief,
  clock,
  copy,
  duration,
  el,
  exact,
  icon,
  ICONS,
  int,
  isObject,
  isSelected,
  jsonUpdate,
  jsonView,
  lazily,
  merge,
  number,
  query,
  quote,
  say,
  toast,
  visible,
} from './lib.js';
import { keysWords, limits, mayWrite, reachesKey, writes } from './key.js';
import { Stream, curlKey, history, post, serverNow, write } from './server.js';

const JOBS_MAX = 2000,
  LINES_MAX = 500;
const STATUS = {
  queued: 'queued',
  pending: 'queued',
  waiting: 'queued',
  new: 'queued',
  created: 'queued',
  scheduled: 'queued',
  running: 'running',
  started: 'running',
  working: 'running',
  active: 'running',
  in_progress: 'running',
  processing: 'running',
  done: 'done',
  completed: 'done',
  complete: 'done',
  succeeded: 'done',
  success: 'done',
  finished: 'done',
  ok: 'done',
  failed: 'failed',
  error: 'failed',
  failure: 'failed',
  crashed: 'failed',
  timeout: 'failed',
  cancelled: 'stopped',
  canceled: 'stopped',
  stopped: 'stopped',
  aborted: 'stopped',
  gone: 'stopped',
};
/** The kind of a word for a status; not of constructor and what else every object has. */
const statusOf = (word) => (Object.hasOwn(STATUS, word.toLowerCase()) ? STATUS[word.toLowerCase()] : undefined);
const TIME_MAX = 8.64e15; // The last moment a Date can tell, in ms.
const WORDS = { running: 'running', queued: 'queued', done: 'done', failed: 'failed', stopped: 'stopped' };
const isOver = (job) => job.status === 'done' || job.status === 'failed' || job.status === 'stopped';
const text = (v) => (typeof v === 'string' && v !== '' ? v : undefined);
const num = (v) => {
  const n = number(v);
  return typeof n === 'number' && Number.isFinite(n) ? n : undefined;
};

/** How far something says it is, from 0 to 100: a percentage, a fraction, or so many of so many. */
export function progressOf(value) {
  if (!isObject(value)) return undefined;
  const [part, whole] =
    [
      ['done', 'total'],
      ['completed', 'total'],
      ['current', 'total'],
      ['step', 'steps'],
      ['processed', 'total'],
    ]
      .map(([a, b]) => [num(value[a]), num(value[b])])
      .find(([a, b]) => a !== undefined && b > 0) ?? [];
  const percent = num(value.percent) ?? num(value.pct) ?? num(value.progress);
  const p =
    percent === undefined ? (part === undefined ? undefined : (part / whole) * 100) : percent > 0 && percent < 1 ? percent * 100 : percent;
  return p === undefined ? undefined : Math.max(0, Math.min(100, p));
}

class Job {
  constructor(id) {
    Object.assign(this, {
      id,
      key: null,
      values: new Map(),
      keyMeta: null,
      revision: 0,
      word: '',
      status: 'running',
      progress: undefined,
      title: '',
      note: '',
      started: null,
      updated: null,
      created: 0,
      lines: [],
      seen: new Set(),
      isFull: false,
      asked: false,
      isOld: false,
      oldWord: '',
      tags: [],
    });
  }
  /** What an object says about the job: the value of its key, or the data of its events. */
  learn(value) {
    const p = progressOf(value);
    if (p !== undefined) this.progress = p;
    if (!isObject(value)) return;
    const word = text(value.status) ?? text(value.state) ?? text(value.phase);
    if (word) {
      this.word = word;
      this.status = statusOf(word) ?? 'running';
    } else if (p >= 100) this.status = 'done';
    else if (p !== undefined && this.status === 'done') this.status = 'running';
    if (text(value.error)) {
      this.note = value.error;
      if (!word) this.status = 'failed';
    }
    this.title = text(value.title) ?? text(value.name) ?? text(value.task) ?? text(value.kind) ?? this.title;
    this.note = text(value.message) ?? text(value.stage) ?? text(value.note) ?? text(value.step) ?? this.note;
    const at = num(value.started_at_ms) ?? num(value.started_ms);
    if (at > 0 && at <= TIME_MAX) this.started = at;
  }
  line(revision, ts, level, words) {
    if (revision && this.seen.has(revision)) return;
    if (revision) this.seen.add(revision);
    const line = { revision, ts, level, words: words.slice(0, 2000) };
    // History comes after what is live, and belongs before it.
    let at = this.lines.length;
    while (at > 0 && revision && this.lines[at - 1].revision > revision) at--;
    this.lines.splice(at, 0, line);
    if (this.lines.length > LINES_MAX) this.seen.delete(this.lines.shift().revision);
  }
}

const jobs_ = new Map();
const owners = new Map(); // Key to job: a removal says no job_id.
function forget() {
  jobs_.clear();
  owners.clear();
  count = 0;
  isReading = true;
}
let prefix = null,
  filter = 'all',
  wanted = null,
  count = 0,
  isReading = true,
  nodes = null,
  go = () => {},
  sample = 0;
const refresh = lazily(render, 80);

function job(id) {
  let found = jobs_.get(id);
  if (!found) {
    jobs_.set(id, (found = new Job(id)));
    if (jobs_.size > JOBS_MAX) {
      // The oldest that is over goes, or else the oldest.
      const [old] = [...jobs_.values()].filter((j) => j !== found).sort((a, b) => isOver(b) - isOver(a) || a.revision - b.revision);
      jobs_.delete(old.id);
    }
  }
  return found;
}
function takeEntry(e) {
  const j = job(e.meta.job_id);
  j.key ??= e.key;
  j.isOld = true;
  owners.set(e.key, j.id);
  j.values.set(e.key, e.value);
  j.tags = e.meta.tags ?? [];
  j.created = j.created ? Math.min(j.created, number(e.created_revision)) : number(e.created_revision);
  j.revision = Math.max(j.revision, number(e.revision));
  j.learn(e.value);
}
/** An event into its job. From history (`isOld`) it only adds lines and times, because the job is further already. */
function takeEvent(ev, isOld = false) {
  const id = ev.meta?.job_id ?? (ev.type === 'state_deleted' ? owners.get(ev.key) : undefined);
  if (typeof id !== 'string') return;
  const isNew = !jobs_.has(id);
  if (isNew && isOld) return;
  const j = job(id),
    at = number(ev.ts) * 1000,
    revision = number(ev.revision);
  if (j.started === null || at < j.started) j.started = at;
  if (j.updated === null || at > j.updated) j.updated = at;
  if (!j.created || revision < j.created) j.created = revision;
  if (!isOld) j.revision = Math.max(j.revision, revision);
  if (ev.type === 'state_updated') {
    if (!isOld) {
      j.key ??= ev.key;
      owners.set(ev.key, id);
      j.tags = ev.meta?.tags ?? j.tags;
      const was = j.word,
        old = j.values.get(ev.key);
      const value = 'patch' in ev ? merge(number(ev.prev_revision) ? old : undefined, ev.patch) : ev.value;
      j.values.set(ev.key, value);
      j.learn(value);
      if (j.word !== was && j.word) j.line(revision, at, j.status === 'failed' ? 'error' : 'status', j.word);
    } else {
      const told = 'patch' in ev ? ev.patch : ev.value,
        word = isObject(told) && (text(told.status) ?? text(told.state) ?? text(told.phase));
      if (word && word !== j.oldWord) j.line(revision, at, statusOf(word) === 'failed' ? 'error' : 'status', word);
      if (word) j.oldWord = word;
    }
  } else if (ev.type === 'state_deleted') {
    if (isOld) return;
    j.values.delete(ev.key);
    owners.delete(ev.key);
    if (j.values.size === 0 && !isOver(j)) {
      j.status = 'stopped';
      j.word = ev.reason === 'expired' ? 'expired' : 'deleted';
    }
    j.line(revision, at, 'status', ev.reason === 'expired' ? `${ev.key} expired` : `${ev.key} deleted`);
  } else if (/^(vector|collection)_/.test(ev.type)) {
    j.line(revision, at, 'soft', `${ev.type} ${ev.collection} / ${ev.id ?? ''}`);
  } else {
    if (!isOld) j.learn(ev.data);
    const d = ev.data,
      words = typeof d === 'string' ? d : isObject(d) ? (text(d.message) ?? text(d.line) ?? text(d.text) ?? text(d.msg)) : undefined;
    const level = isObject(d) && /^(error|fatal)$/i.test(d.level) ? 'error' : isObject(d) && /^warn/i.test(d.level) ? 'warn' : 'log';
    // A bare progress is the bar's; what says something, or is of another type, is a line.
    if (words !== undefined) j.line(revision, at, level, words);
    else if (ev.type !== 'progress')
      j.line(revision, at, 'soft', `${ev.type} ${d === null || d === undefined ? '' : JSON.stringify(d).slice(0, 500)}`);
  }
}
const stream = new Stream({
  onOpen(isFresh) {
    if (isFresh) forget();
  },
  onFrame(f) {
    if (f.type === '') return;
    if (f.type === 'snapshot') {
      count++;
      if (f.data.includes('"job_id"')) {
        const e = exact(f.data);
        if (e.meta?.job_id !== undefined) takeEntry(e);
      }
      if (count % 5000 === 0) refresh();
      return;
    }
    if (f.type === 'snapshot_end') {
      isReading = false;
      return refresh();
    }
    if (f.type === 'reset') {
      forget();
      return refresh();
    }
    if (!f.data.includes('"job_id"') && (f.type !== 'state_deleted' || owners.size === 0)) return;
    takeEvent(exact(f.data));
    refresh();
  },
  onStatus(status, message) {
    if (nodes) say(nodes.error, message ?? '');
  },
});

/** When a job from the snapshot began and when it last changed: the log knows, an entry does not. */
async function askTimes(j) {
  j.asked = true;
  try {
    const at = async (revision, key) => {
      if (!revision) return null;
      const { events } = await history({ since: revision - 1, limit: 1, key });
      return events[0] && number(events[0].revision) === revision ? number(events[0].ts) * 1000 : null;
    };
    const key = j.key,
      { created, revision } = j;
    const [first, last] = [await at(created, key), await at(revision, key)];
    if (first && (j.started === null || first < j.started)) j.started = first;
    if (last && (j.updated === null || last > j.updated)) j.updated = last;
    refresh();
  } catch {
    /* older than the log: it stays unknown */
  }
}
/** The log lines of the opened job from before this page was open. */
async function askHistory(j) {
  if (j.isFull) return;
  j.isFull = true;
  try {
    let since = Math.max(0, (j.created || 1) - 1);
    for (let page = 0; page < 50; page++) {
      let r;
      try {
        r = await history({ since, job_id: j.id, limit: 1000 });
      } catch (e) {
        if (e.code !== 'revision_compacted' || number(e.body.oldest) - 1 <= since) throw e;
        since = number(e.body.oldest) - 1;
        j.isCut = true;
        continue;
      }
      if (number(r.oldest) > (j.created || 1)) j.isCut = true;
      for (const ev of r.events) takeEvent(ev, true);
      since = number(r.next_since);
      if (since >= number(r.head)) break;
    }
  } catch {
    j.isFull = false;
  }
  refresh();
}

// ---- What is seen -----------------------------------------------------------------------------------------------------
function elapsed(j) {
  if (j.started === null) return '';
  const end = isOver(j) ? (j.updated ?? j.started) : serverNow();
  return duration((end - j.started) / 1000);
}
function left(j) {
  if (j.status !== 'running' || j.started === null || !(j.progress > 2) || j.progress >= 100) return '';
  const spent = serverNow() - j.started;
  return `about ${duration(((spent / j.progress) * (100 - j.progress)) / 1000)} left`;
}
const shown = (j) => filter === 'all' || j.status === filter;
const RANK = { running: 0, queued: 1, failed: 2, stopped: 3, done: 3 };
const percent = (j) =>
  j.progress === undefined ? '' : `${j.progress < 10 && j.progress % 1 ? j.progress.toFixed(1) : Math.floor(j.progress)}%`;

function bar(j) {
  const fill = el('i'),
    box = el(
      'div',
      { class: 'progress', role: 'progressbar', 'aria-valuemin': '0', 'aria-valuemax': '100', 'aria-label': `Job ${j.id}` },
      fill,
    );
  setBar(box, j);
  return box;
}
function setBar(box, j) {
  const isOpenEnded = j.progress === undefined && j.status === 'running';
  box.classList.toggle('endless', isOpenEnded);
  const p = j.progress ?? (j.status === 'done' ? 100 : 0);
  box.firstChild.style.width = isOpenEnded ? '' : `${p}%`;
  isOpenEnded ? box.removeAttribute('aria-valuenow') : box.setAttribute('aria-valuenow', String(Math.round(p)));
}
const cards = new Map();
function card(j) {
  let c = cards.get(j.id);
  if (!c) {
    c = {
      title: el('b', { class: 'job-title' }),
      id: el('span', { class: 'soft mono job-id' }),
      status: el('span', { class: 'status' }),
      bar: bar(j),
      note: el('span', { class: 'peek soft' }),
      side: el('span', { class: 'soft num' }),
      percent: el('span', { class: 'num strong' }),
    };
    c.node = el(
      'button',
      { type: 'button', class: 'job', onclick: () => go('jobs', { ...(prefix ? { prefix } : {}), job: j.id }) },
      el('span', { class: 'job-head' }, c.status, c.title, c.id, c.percent),
      c.bar,
      el('span', { class: 'job-foot' }, c.note, c.side),
    );
    cards.set(j.id, c);
  }
  c.node.dataset.status = j.status;
  c.node.dataset.job = j.id;
  say(c.status, visible(j.word || WORDS[j.status]));
  say(c.title, visible(j.title || j.key || j.id));
  c.title.title = c.title.textContent;
  say(c.id, j.title || j.key ? `#${visible(j.id)}` : '');
  say(c.percent, percent(j));
  setBar(c.bar, j);
  say(c.note, brief(j.note || (j.lines.findLast((l) => l.level !== 'soft')?.words ?? '')));
  tick(j, c);
  c.node.classList.toggle('open', j.id === wanted);
  if (!j.asked && j.isOld) askTimes(j);
  return c.node;
}
function tick(j, c) {
  say(c.side, [elapsed(j), left(j)].filter(Boolean).join(' · '));
}

/** Whether no job can be here: the key does not reach what begins so, or no key at all. */
const isBeyond = (at = prefix ?? '') => !reachesKey(at) && (at !== '' || !limits().prefixes.length);
function render() {
  if (!nodes) return;
  const all = [...jobs_.values()],
    counts = { all: all.length };
  for (const j of all) counts[j.status] = (counts[j.status] ?? 0) + 1;
  for (const [name, chip] of Object.entries(nodes.chips)) {
    say(chip.lastChild, int(counts[name] ?? 0));
    chip.setAttribute('aria-pressed', String(filter === name));
  }
  const list = all
    .filter(shown)
    .sort((a, b) => RANK[a.status] - RANK[b.status] || b.created - a.created)
    .slice(0, 300);
  const inPlace = nodes.list.children;
  list.forEach((j, i) => {
    const node = card(j);
    if (inPlace[i] !== node) nodes.list.insertBefore(node, inPlace[i] ?? null);
  });
  while (inPlace.length > list.length) nodes.list.lastChild.remove();
  for (const id of cards.keys()) if (!jobs_.has(id)) cards.delete(id);
  nodes.empty.hidden = list.length > 0;
  const isLoading = isReading && count > 0;
  say(
    nodes.emptyTitle,
    isLoading
      ? 'Reading …'
      : isReading
        ? 'Connecting …'
        : isBeyond()
          ? keysWords()
          : filter !== 'all' && all.length
            ? `No job is ${filter}.`
            : prefix
              ? 'No job has a key that begins so.'
              : 'No jobs yet.',
  );
  nodes.emptyHelp.hidden = isReading || all.length > 0 || isBeyond();
  say(nodes.info, isLoading ? `${int(count)} keys read` : all.length > 300 ? `newest 300 of ${int(all.length)}` : '');
  renderDetail();
}

let opened = null;
function renderDetail() {
  const j = wanted === null ? null : jobs_.get(wanted);
  nodes.detail.hidden = wanted === null;
  nodes.split.classList.toggle('two', wanted !== null);
  if (wanted === null) {
    opened = null;
    return;
  }
  if (!j) {
    // Not here, or not yet.
    opened = null;
    nodes.detail.replaceChildren(detailHead(wanted), el('div', { class: 'empty' }, isReading ? 'Reading …' : 'There is no such job now.'));
    return;
  }
  if (opened?.id !== j.id || opened.job !== j) {
    const o = (opened = {
      id: j.id,
      job: j,
      status: el('span', { class: 'status big' }),
      bar: bar(j),
      percent: el('b', { class: 'now' }),
      time: el('span', { class: 'soft' }),
      note: el('p', { class: 'job-note' }),
      log: el('div', { class: 'log', role: 'log', tabIndex: 0, 'aria-label': 'Log lines' }),
      value: el('div', { class: 'values' }),
      drawn: [],
      shownValue: undefined,
    });
    o.tags = el('span', { class: 'soft' });
    const curl = `curl -N ${quote(`${location.origin}/v1/events?${query({ job_id: j.id, since: 0 })}`)}${curlKey()}`;
    nodes.detail.replaceChildren(
      detailHead(j.id, curl),
      el('div', { class: 'job-state' }, o.percent, o.status, el('span', { class: 'grow' }), o.time),
      o.bar,
      o.note,
      el('h3', {}, 'Log'),
      o.log,
      el('h3', {}, 'State'),
      o.value,
    );
    askHistory(j);
  }
  const o = opened;
  nodes.detail.dataset.status = j.status;
  say((o.title ??= nodes.detail.querySelector('h2')), visible(j.title || j.key || j.id));
  say(o.status, visible(j.word || WORDS[j.status]));
  say(o.percent, percent(j) || '');
  setBar(o.bar, j);
  say(o.note, j.note);
  say(o.time, [elapsed(j), left(j)].filter(Boolean).join(' · '));
  drawLines(o, j);
  drawState(o, j);
}
/** The job's keys and what they hold; what is selected in there waits. */
function drawState(o, j) {
  if (o.shownRevision === j.revision || isSelected(o.value)) return;
  o.shownRevision = j.revision;
  const known = new Map([...o.value.children].map((box) => [box.dataset.key, box]));
  const boxes = [...j.values].map(([k, v]) => {
    const box =
      known.get(k) ??
      el('div', { 'data-key': k }, el('a', { class: 'mono', href: `#state?${query({ prefix: k, key: k })}` }, visible(k)), el('p'));
    if (v === undefined) box.lastChild.replaceWith(el('p', { class: 'soft' }, 'bytes'));
    else if (box.lastChild.levels === undefined) box.lastChild.replaceWith(jsonView(v, 1));
    else jsonUpdate(box.lastChild, v);
    return box;
  });
  arrange(o.value, boxes.length ? boxes : [el('p', { class: 'soft' }, 'No key is left.')]);
}
function drawLines(o, j) {
  const isAtEnd = o.log.scrollHeight - o.log.scrollTop - o.log.clientHeight < 24;
  if (!j.lines.length && !j.isCut) {
    if (!o.log.firstChild?.classList?.contains('empty'))
      o.log.replaceChildren(el('div', { class: 'empty' }, 'No line yet. Publish an event of type log with this job_id.'));
    o.drawn = [];
    return;
  }
  const isSame = o.drawn.length && o.isCut === j.isCut && o.drawn.length <= j.lines.length && o.drawn.every((l, i) => l === j.lines[i]);
  const row = (l) => el('div', { class: `line is-${l.level}` }, el('time', {}, l.ts ? clock(new Date(l.ts)) : ''), el('span', {}, l.words));
  if (isSame) o.log.append(...j.lines.slice(o.drawn.length).map(row));
  else
    o.log.replaceChildren(
      ...(j.isCut ? [el('div', { class: 'line is-soft' }, el('span', {}, 'What came before is no longer in the log.'))] : []),
      ...j.lines.map(row),
    );
  o.drawn = [...j.lines];
  o.isCut = j.isCut;
  if (isAtEnd || !isSame) o.log.scrollTop = o.log.scrollHeight;
}
function detailHead(id, curl) {
  return el(
    'div',
    { class: 'pane-head' },
    el('div', {}, el('h2', {}, visible(id)), el('span', { class: 'soft mono' }, `#${visible(id)}`)),
    curl
      ? el(
          'button',
          { type: 'button', title: 'Everything about this job, in a terminal', onclick: () => copy(curl, 'Copied as curl') },
          'Copy as curl',
        )
      : null,
    el('button', { type: 'button', class: 'ghost', 'aria-label': 'Close', title: 'Close (Esc)', onclick: close }, icon(ICONS.close)),
  );
}
function close() {
  const id = wanted;
  go('jobs', prefix ? { prefix } : {});
  cards.get(id)?.node.focus();
}
setInterval(() => {
  if (!nodes || nodes.root.hidden) return;
  for (const [id, c] of cards) {
    const j = jobs_.get(id);
    if (j && c.node.isConnected && !isOver(j)) tick(j, c);
  }
  if (opened) drawState(opened, opened.job);
  if (opened && !isOver(opened.job)) say(opened.time, [elapsed(opened.job), left(opened.job)].filter(Boolean).join(' · '));
}, 1000);

// ---- A job of our own, for the first minute -----------------------------------------------------------------------------
const STEPS = [
  'fetching 24 documents',
  'splitting into passages',
  'embedding, batch 1 of 3',
  'embedding, batch 2 of 3',
  'embedding, batch 3 of 3',
  'writing vectors',
  'checking recall',
  'published',
];
/** What names of our own begin with. */
const own = () => (!reachesKey('job:') && limits().prefixes[0]) || 'job:';
/** Does what a worker of yours would do, through the same API, and leaves nothing behind after ten minutes. */
async function runSample() {
  const id = `sample-${Date.now().toString(36)}${sample++}`,
    key = `${own()}${id}`,
    meta = { job_id: id, tags: ['sample'] };
  try {
    await write({ op: 'put', key, value: { title: 'Index the handbook', status: 'running', progress: 0 }, ttl_ms: 600_000, meta });
    go('jobs', { ...(prefix ? { prefix } : {}), job: id });
    for (let i = 0; i < STEPS.length; i++) {
      await new Promise((done) => setTimeout(done, 700 + Math.random() * 500));
      const progress = Math.round(((i + 1) / STEPS.length) * 100);
      await post('/v1/batch', {
        ops: [
          { op: 'patch', key, patch: { progress, message: STEPS[i], ...(progress === 100 ? { status: 'done' } : {}) } },
          { op: 'event', type: 'log', key, data: { level: 'info', message: STEPS[i] }, meta },
        ],
      });
    }
  } catch (e) {
    toast(`The sample job stopped: ${e.message}`, true);
  }
}

/** What to do when there is no job yet, and may be done. */
function help() {
  const follow = `curl -X PUT ${quote(`${location.origin}/v1/state/${encodeURIComponent(`${own()}1`).replaceAll('%3A', ':').replaceAll('%2F', '/')}`)}${curlKey()} -H 'content-type: application/json' \\\n  -d '{"value":{"title":"My first job","status":"running","progress":0},"meta":{"job_id":"1"}}'`;
  nodes.emptyHelp.replaceChildren(
    el(
      'p',
      { class: 'soft' },
      'A job is any key or event with a job_id in its meta. Its value may say status, progress, title and message; its events of type log are its log.',
    ),
  );
  if (mayWrite())
    nodes.emptyHelp.append(
      el('pre', {}, follow),
      el(
        'div',
        { class: 'row' },
        el('button', { type: 'button', onclick: () => copy(follow) }, 'Copy'),
        el('button', { type: 'button', class: 'main', onclick: runSample }, 'Run a sample job'),
      ),
    );
}

export const jobs = {
  title: 'Jobs',
  streams: [stream],
  fresh() {
    prefix = null;
    if (nodes) help();
  },
  mount(root, navigate) {
    go = navigate;
    const chip = (name, label) =>
      el(
        'button',
        {
          type: 'button',
          class: `chip pick ${name}`,
          'aria-pressed': 'false',
          onclick: () => {
            filter = name;
            render();
          },
        },
        el('i', { class: 'dot' }),
        ` ${label} `,
        el('b', {}, '0'),
      );
    const field = el('input', {
      name: 'prefix',
      class: 'mono',
      placeholder: 'keys that begin with …',
      autocomplete: 'off',
      spellcheck: false,
      'aria-label': 'Only jobs whose key begins with',
    });
    field.oninput = lazily(() => go('jobs', { prefix: field.value, job: wanted ?? '' }), 300);
    nodes = {
      root,
      field,
      error: el('p', { class: 'error', role: 'alert' }),
      list: el('div', { class: 'jobs', id: 'job-list' }),
      detail: el('aside', { class: 'card pane', id: 'job', hidden: true }),
      info: el('span', { class: 'soft' }),
      chips: {
        all: chip('all', 'all'),
        running: chip('running', 'running'),
        queued: chip('queued', 'queued'),
        done: chip('done', 'done'),
        failed: chip('failed', 'failed'),
        stopped: chip('stopped', 'stopped'),
      },
      emptyTitle: el('h2', {}),
      emptyHelp: el('div', {}),
      sample: writes(el('button', { type: 'button', id: 'sample', title: 'n', onclick: runSample }, 'Run a sample job')),
    };
    help();
    nodes.empty = el('div', { class: 'card empty-card' }, nodes.emptyTitle, nodes.emptyHelp);
    nodes.split = el('div', { class: 'split' }, el('div', { class: 'column' }, nodes.list, nodes.empty), nodes.detail);
    root.append(
      el(
        'div',
        { class: 'toolbar' },
        el('div', { class: 'chips', role: 'group', 'aria-label': 'Status' }, Object.values(nodes.chips)),
        el('span', { class: 'grow' }),
        nodes.info,
        field,
        nodes.sample,
      ),
      nodes.error,
      nodes.split,
    );
    nodes.list.onkeydown = (e) => {
      const step = {
        ArrowDown: 'nextElementSibling',
        j: 'nextElementSibling',
        ArrowUp: 'previousElementSibling',
        k: 'previousElementSibling',
      }[e.key];
      if (step) {
        e.preventDefault();
        document.activeElement?.[step]?.focus();
      }
    };
  },
  show(params) {
    const next = params.get('prefix') ?? '';
    wanted = params.get('job');
    if (next !== prefix) {
      prefix = next;
      if (nodes.field.value !== prefix) nodes.field.value = prefix;
      forget();
      cards.clear();
      nodes.list.textContent = '';
      isReading = !isBeyond();
      stream.open(isReading ? `/v1/events?${query({ snapshot: 'true', prefix })}` : null);
    }
    render();
  },
  keys: { n: () => nodes.sample.click(), Escape: () => wanted !== null && close() },
};
