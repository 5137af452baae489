// Events: a live tail. A pause lets what comes wait; when too much waits the stream lets go, and resuming goes on from its
// last id, so nothing that is in the log is lost.

import {
  brief,
  bytes,
  clock,
  copy,
  el,
  exact,
  field,
  icon,
  ICONS,
  int,
  jsonView,
  lazily,
  number,
  query,
  quote,
  say,
  sizeOf,
  visible,
} from './lib.js';
import { VirtualList } from './list.js';
import { collectionsWords, keysWords, limits, reachesCollection, reachesKey, writes } from './key.js';
import { Stream, curlKey, post } from './server.js';

// By number, and by size: a thousand values of a megabyte are a gigabyte.
const SHOWN = 2000,
  SHOWN_CHARS = 32e6,
  HELD = 2000,
  HELD_CHARS = 16e6,
  ROW = 30;
const KINDS = ['key', 'prefix', 'types', 'job_id', 'tag', 'collection'];
const KIND_WORDS = { key: 'key', prefix: 'prefix', types: 'type', job_id: 'job', tag: 'tag', collection: 'collection' };

let shown = [],
  shownChars = 0,
  held = [],
  heldChars = 0,
  isPaused = false,
  seen = 0,
  serial = 0,
  status = '',
  chips = [],
  options = {},
  address = null,
  picked = null,
  beyond = '';
let nodes = null,
  list = null,
  go = () => {};

const stream = new Stream({
  // A snapshot that was cut off comes again from its start.
  onOpen(isFresh) {
    if (isFresh && options.snapshot) empty();
  },
  onFrame(f) {
    if (!f.type) return;
    seen++;
    f.serial = ++serial;
    if (isPaused) {
      held.push(f);
      heldChars += f.data.length;
      if (held.length >= HELD || heldChars > HELD_CHARS) {
        stream.isHeld = true;
        stream.run(false);
      }
    } else add([f]);
    draw();
  },
  onStatus(now, message) {
    status = now;
    if (nodes) {
      say(nodes.error, message ?? '');
      info();
    }
  },
});
/** Newest first. */
function add(frames) {
  for (const f of frames) {
    shown.push(f);
    shownChars += f.data.length;
  }
  // Half as many again, so that not each new one moves them all.
  if (shown.length > SHOWN * 1.5 || shownChars > SHOWN_CHARS) {
    let from = Math.max(0, shown.length - SHOWN);
    for (const f of shown.slice(0, from)) shownChars -= f.data.length;
    while (shownChars > SHOWN_CHARS / 2 && from < shown.length - 1) shownChars -= shown[from++].data.length;
    shown = shown.slice(from);
  }
  // Who has scrolled down reads: what they read stays where it is.
  if (nodes && nodes.tail.scrollTop > 4) pushed += frames.length;
}
let pushed = 0;
const at = (i) => shown[shown.length - 1 - i];

const parse = (f) => (f.data.length < 1e6 ? exact(f.data) : JSON.parse(f.data));
/** What an event is about, in words for one row. Parsed when its row is first drawn, and not kept: it is held as text already. */
function words(f) {
  if (f.words) return f.words;
  const d = parse(f),
    content =
      d.value ??
      d.patch ??
      d.data ??
      (d.value_base64 !== undefined ? `${d.content_type}, ${bytes(sizeOf(d.value_base64))}` : undefined) ??
      d.reason ??
      (f.type === 'snapshot_end' ? `${int(number(d.count))} entries` : d.meta);
  return (f.words = {
    at: d.ts === undefined ? null : new Date(number(d.ts) * 1000),
    id: String(f.type === 'snapshot' ? d.revision : f.id),
    subject: visible(d.key ?? (d.collection ? (d.id === undefined ? d.collection : `${d.collection} / ${d.id}`) : '')),
    peek:
      f.data.length > 200_000
        ? bytes(f.data.length)
        : content === undefined
          ? ''
          : brief(typeof content === 'string' ? content : JSON.stringify(content)),
    kind:
      f.type.startsWith('state_') || f.type.startsWith('snapshot')
        ? 'state'
        : /^(vector|collection)_/.test(f.type)
          ? 'vector'
          : f.type === 'reset'
            ? 'reset'
            : 'own',
  });
}
function row(i) {
  const f = at(i);
  if (!f) return el('div'); // Cleared a moment ago; the list is about to hear of it.
  const w = words(f);
  return el(
    'div',
    { class: `event ${w.kind}${f === picked ? ' open' : ''}`, role: 'option', 'aria-selected': String(f === picked) },
    el('time', { class: 'soft' }, w.at ? clock(w.at) : ''),
    el('b', {}, visible(f.type)),
    el('span', { class: 'mono subject' }, w.subject),
    el('span', { class: 'peek mono' }, w.peek),
    el('span', { class: 'soft num' }, w.id),
  );
}
const draw = lazily(() => {
  if (!nodes) return;
  if (pushed) {
    nodes.tail.scrollTop += pushed * ROW;
    pushed = 0;
  }
  const place = picked ? shown.indexOf(picked) : -1;
  list.active = place < 0 ? -1 : shown.length - 1 - place;
  list.set(shown.length);
  nodes.empty.hidden = shown.length > 0;
  info();
}, 50);
function info() {
  nodes.pause.setAttribute('aria-pressed', String(isPaused));
  nodes.pause.replaceChildren(icon(isPaused ? ICONS.play : ICONS.pause), isPaused ? 'Resume' : 'Pause');
  nodes.live.dataset.status = isPaused ? 'paused' : status;
  say(
    nodes.info,
    isPaused
      ? `paused · ${int(held.length)} waiting${stream.isHeld ? ', the rest stays in the log' : ''}`
      : `${status === 'connected' ? 'live' : status} · ${int(seen)} ${seen === 1 ? 'event' : 'events'}`,
  );
  say(
    nodes.emptyTitle,
    beyond || (status === 'connected' ? 'Waiting for events.' : status === 'stopped' ? 'Nothing is read.' : 'Connecting …'),
  );
  nodes.emptyHelp.hidden = beyond !== '';
}
function pause(on = !isPaused) {
  isPaused = on;
  if (!on) {
    add(held);
    held = [];
    heldChars = 0;
    if (stream.isHeld) {
      stream.isHeld = false;
      stream.run(true);
    }
  }
  info();
  draw();
}

// ---- The filter ---------------------------------------------------------------------------------------------------------
const params = () => {
  const out = {};
  for (const [kind, value] of chips)
    kind === 'types' ? (out.types = out.types ? `${out.types},${value}` : value) : (out[kind] ??= []).push(value);
  return { ...out, ...options };
};
const navigate = () => go('events', params());
function addChip(kind, value) {
  if (!value || chips.some(([k, v]) => k === kind && v === value)) return;
  chips.push([kind, value]);
  navigate();
}
function drawChips() {
  const at = [...nodes.chips.children].indexOf(document.activeElement);
  nodes.chips.replaceChildren(
    ...chips.map((chip) =>
      el(
        'button',
        {
          type: 'button',
          class: 'chip',
          title: 'Remove this filter',
          onclick: () => {
            chips = chips.filter((c) => c !== chip);
            navigate();
          },
        },
        el('span', { class: 'soft' }, KIND_WORDS[chip[0]]),
        ' ',
        el('span', { class: 'mono' }, visible(chip[1])),
        icon(ICONS.close),
      ),
    ),
  );
  if (at >= 0) (nodes.chips.children[Math.min(at, chips.length - 1)] ?? nodes.filter).focus(); // The one that was removed had it.
}
function empty() {
  shown = [];
  shownChars = 0;
  held = [];
  heldChars = 0;
  seen = 0;
  picked = null;
  detail();
  draw();
}
function clear() {
  empty();
  if (stream.isHeld) {
    stream.isHeld = false;
    stream.run(true);
  }
}

// ---- One event ----------------------------------------------------------------------------------------------------------
function detail() {
  if (!picked && nodes.detail.contains(document.activeElement)) nodes.tail.focus();
  nodes.detail.hidden = picked === null;
  nodes.split.classList.toggle('two', picked !== null);
  if (!picked) return;
  const d = parse(picked),
    { at: time, id } = words(picked),
    only = (kind, value, label) =>
      el(
        'button',
        { type: 'button', class: 'chip', onclick: () => addChip(kind, value) },
        el('span', { class: 'soft' }, `only ${label}`),
        ' ',
        el('span', { class: 'mono' }, visible(value)),
      );
  const narrow = [
    picked.type !== 'snapshot' && !/^(reset|snapshot_end)$/.test(picked.type) && only('types', picked.type, 'type'),
    d.key !== undefined && only('key', d.key, 'key'),
    d.collection !== undefined && only('collection', d.collection, 'collection'),
    typeof d.meta?.job_id === 'string' && only('job_id', d.meta.job_id, 'job'),
    ...(Array.isArray(d.meta?.tags) ? d.meta.tags : []).filter((t) => typeof t === 'string').map((t) => only('tag', t, 'tag')),
  ];
  nodes.detail.replaceChildren(
    el(
      'div',
      { class: 'pane-head' },
      el(
        'div',
        {},
        el('h2', {}, visible(picked.type)),
        el('span', { class: 'soft' }, `revision ${id}${time ? ` · ${time.toISOString()}` : ''}`),
      ),
      el('button', { type: 'button', class: 'ghost', 'aria-label': 'Close', title: 'Close (Esc)', onclick: close }, icon(ICONS.close)),
    ),
    el('div', { class: 'chips' }, narrow.filter(Boolean)),
    el(
      'div',
      { class: 'pane-body' },
      el('div', { class: 'value' }, jsonView(d, 4)),
      el(
        'div',
        { class: 'row foot' },
        el('button', { type: 'button', onclick: () => copy(picked.data) }, 'Copy as JSON'),
        d.key !== undefined && picked.type !== 'reset'
          ? el('a', { class: 'button', href: `#state?${query({ key: d.key, prefix: d.key })}` }, 'Open the key')
          : null,
      ),
    ),
  );
}
function choose(i) {
  picked = at(i) ?? null;
  detail();
  draw();
}
function close() {
  picked = null;
  detail();
  draw();
  nodes.tail.focus();
}

// ---- Publishing -----------------------------------------------------------------------------------------------------------
async function publish(e) {
  e.preventDefault();
  const f = nodes.publish.querySelector('form').elements;
  nodes.published.className = 'soft';
  try {
    const event = { type: f.type.value.trim() };
    if (f.key.value) event.key = f.key.value;
    if (f.data.value.trim()) event.data = field(f.data.value, 'Data');
    if (f.meta.value.trim()) event.meta = field(f.meta.value, 'Labels');
    if (f.ephemeral.checked) event.ephemeral = true;
    const { revision } = await post('/v1/events', event);
    say(nodes.published, event.ephemeral ? 'sent to who listens now' : `revision ${revision}`);
  } catch (error) {
    nodes.published.className = 'error';
    say(nodes.published, error.message);
  }
}
function togglePublish(on = nodes.publish.hidden) {
  nodes.publish.hidden = !on;
  nodes.publishButton.setAttribute('aria-expanded', String(on));
  if (!on) return;
  const { key, type } = nodes.publish.querySelector('form').elements,
    isFree = reachesKey('');
  key.required = !isFree; // An event of no key is for those who reach everything.
  if (!isFree) key.value ||= limits().prefixes[0] ?? '';
  type.select();
}

export const events = {
  title: 'Events',
  streams: [stream],
  fresh() {
    address = null;
    if (nodes) togglePublish(false);
  },
  mount(section, navigateTo) {
    go = navigateTo;
    const kind = el(
      'select',
      { name: 'kind', 'aria-label': 'Filter by' },
      KINDS.map((k) => el('option', { value: k }, KIND_WORDS[k])),
    );
    kind.value = 'prefix';
    const value = el('input', {
      name: 'filter',
      class: 'mono',
      placeholder: 'add a filter, Enter',
      autocomplete: 'off',
      spellcheck: false,
      'aria-label': 'Filter value',
    });
    const adder = el(
      'form',
      {
        class: 'adder',
        onsubmit: (e) => {
          e.preventDefault();
          const text = value.value;
          value.value = '';
          addChip(kind.value, text.trim());
        },
      },
      kind,
      value,
    );
    value.onkeydown = (e) => {
      if (e.key === 'Backspace' && !value.value && chips.length) {
        chips.pop();
        navigate();
      }
    };
    const since = el('input', {
      name: 'since',
      class: 'mono',
      placeholder: 'now',
      autocomplete: 'off',
      title: 'A revision (0 = from the oldest) or a time such as 2026-01-31T12:00:00Z',
      size: 8,
    });
    since.onchange = () => {
      since.value.trim() ? (options.since = since.value.trim()) : delete options.since;
      navigate();
    };
    const snapshot = el('input', { type: 'checkbox', name: 'snapshot' });
    snapshot.onchange = () => {
      snapshot.checked ? (options.snapshot = 'true') : delete options.snapshot;
      navigate();
    };
    nodes = {
      since,
      snapshot,
      filter: value,
      chips: el('div', { class: 'chips', id: 'chips' }),
      error: el('p', { class: 'error', role: 'alert', id: 'tail-error' }),
      info: el('span', { role: 'status', id: 'tail-info' }),
      tail: el('div', { class: 'tail', id: 'tail', role: 'listbox', 'aria-label': 'Events, newest first' }),
      pause: el('button', { type: 'button', id: 'pause', title: 'p', onclick: () => pause() }),
      emptyTitle: el('h2', {}),
      detail: el('aside', { class: 'card pane', id: 'event', hidden: true }),
      published: el('span', { class: 'soft', role: 'status', id: 'published' }),
    };
    nodes.live = el('span', { class: 'live' }, el('i', { class: 'dot' }), nodes.info);
    const curl = () => {
      const q = query(params());
      copy(`curl -N ${quote(`${location.origin}/v1/events${q ? `?${q}` : ''}`)}${curlKey()}`, 'Copied as curl');
    };
    nodes.publishButton = writes(
      el(
        'button',
        { type: 'button', id: 'publish-open', title: 'n', 'aria-expanded': 'false', onclick: () => togglePublish() },
        'Publish …',
      ),
    );
    nodes.publish = el(
      'div',
      { class: 'card publish', id: 'publish', hidden: true },
      el(
        'form',
        { class: 'row', onsubmit: publish },
        el('label', {}, 'Type ', el('input', { name: 'type', value: 'progress', required: true, autocomplete: 'off' })),
        el('label', {}, 'Key ', el('input', { name: 'key', class: 'mono', autocomplete: 'off' })),
        el(
          'label',
          { class: 'grow' },
          'Data (JSON) ',
          el('input', { name: 'data', class: 'mono', value: '{"percent": 42}', spellcheck: false, autocomplete: 'off' }),
        ),
        el(
          'label',
          { class: 'grow' },
          'Labels (JSON) ',
          el('input', {
            name: 'meta',
            class: 'mono',
            placeholder: '{"job_id": "1", "tags": ["a"]}',
            spellcheck: false,
            autocomplete: 'off',
          }),
        ),
        el('label', { class: 'check' }, el('input', { type: 'checkbox', name: 'ephemeral' }), ' ephemeral'),
        el('button', { class: 'main' }, 'Publish'),
        nodes.published,
      ),
    );
    nodes.emptyHelp = el('p', { class: 'soft' }, 'Every change of a key or a vector is an event, and so is what you publish.');
    nodes.empty = el('div', { class: 'empty' }, nodes.emptyTitle, nodes.emptyHelp);
    nodes.split = el('div', { class: 'split' }, el('div', { class: 'card column tail-card' }, nodes.tail, nodes.empty), nodes.detail);
    section.append(
      el(
        'div',
        { class: 'toolbar' },
        nodes.chips,
        adder,
        el('label', { class: 'check' }, 'since ', since),
        el('label', { class: 'check' }, snapshot, ' snapshot first'),
      ),
      el(
        'div',
        { class: 'toolbar second' },
        nodes.live,
        el('span', { class: 'grow' }),
        nodes.pause,
        el('button', { type: 'button', id: 'clear', onclick: clear }, 'Clear'),
        el('button', { type: 'button', id: 'curl', onclick: curl }, 'Copy as curl'),
        nodes.publishButton,
      ),
      nodes.publish,
      nodes.error,
      nodes.split,
    );
    list = new VirtualList(nodes.tail, ROW, { draw: row, sign: (i) => at(i) && `${at(i).serial} ${at(i) === picked}`, onPick: choose });
  },
  show(given) {
    const q = given.toString();
    if (q !== address) {
      address = q;
      chips = [];
      options = {};
      for (const [name, v] of given) {
        if (name === 'types') for (const t of v.split(',').filter(Boolean)) chips.push(['types', t]);
        else if (KINDS.includes(name)) chips.push([name, v]);
        else if (name === 'since' || name === 'snapshot') options[name] = v;
      }
      nodes.since.value = options.since ?? '';
      nodes.snapshot.checked = options.snapshot === 'true';
      isPaused = false;
      stream.isHeld = false;
      empty();
      const path = query(params());
      beyond = chips.some(([k, v]) => (k === 'key' || k === 'prefix') && !reachesKey(v))
        ? keysWords()
        : chips.some(([k, v]) => k === 'collection' && !reachesCollection(v))
          ? collectionsWords()
          : '';
      stream.open(beyond ? null : `/v1/events${path ? `?${path}` : ''}`);
    }
    drawChips();
    draw();
  },
  keys: {
    p: () => pause(),
    n: () => (nodes.publish.hidden ? nodes.publishButton.click() : togglePublish(true)),
    Escape: () => (picked ? close() : togglePublish(false)),
  },
};
