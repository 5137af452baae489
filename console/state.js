// State: the keys as a tree by prefix, one key beside it.
//
// A branch is what stands before the next ":" or "/". Its children are read page by page as they come in sight, keys only; a
// branch that is longer than a page is stepped over (tree.js). Values are read for the rows in sight. From the first page's
// revision on a stream brings every change; what a page or a value knew already is told by its revision.

import {
  arrange,
  bytes,
  copy,
  duration,
  el,
  exact,
  field,
  icon,
  ICONS,
  int,
  isSelected,
  jsonUpdate,
  jsonView,
  lazily,
  many,
  merge,
  number,
  paint,
  pretty,
  query,
  quote,
  say,
  sizeOf,
  sure,
  toast,
  visible,
} from './lib.js';
import { keysWords, limits, reachesKey, writes } from './key.js';
import { VirtualList } from './list.js';
import { keyCount } from './overview.js';
import { Tree } from './tree.js';
import { Stream, cursorAfter, curlKey, get, history, read, serverNow, write } from './server.js';

const PAGE = 500,
  ROW = 32,
  PREVIEW = 160,
  AGAIN_MS = 2000;

let tree = new Tree('', 0, preview),
  rows = [],
  since = null,
  ticket = 0,
  stopped = '';

/** Reads the next children of a branch. */
async function more(b) {
  if (b.isLoading || b.isDone) return;
  b.isLoading = true;
  const mine = ticket;
  try {
    for (let added = 0, asked = 0; added < PAGE / 2 && asked < 30 && !b.isDone; asked++) {
      const r = await get(
        `/v1/state?${query({ prefix: b.prefix, limit: PAGE, keys_only: 'true', cursor: b.after === null ? '' : cursorAfter(b.after) })}`,
      );
      if (mine !== ticket) return;
      if (since === null) {
        since = r.revision;
        follow();
      }
      added += tree.take(b, r);
      draw();
    }
    b.error = '';
    if (b.isDone && b !== tree.root) tree.settle(b);
  } catch (e) {
    if (mine !== ticket) return;
    b.error = e.message;
    b.isAway = e.isAway;
    // Without a position there is no stream that would tell; `load` asks for the root then.
    clearTimeout(b.timer);
    if (e.isAway && since !== null) b.timer = setTimeout(() => mine === ticket && b.error && !nodes.root.hidden && more(b), AGAIN_MS);
  } finally {
    b.isLoading = false;
    draw();
  }
}
/** What could not be read while the server was away is asked for as soon as it is back. */
function askAgain() {
  (function each(b) {
    if (b.error) more(b);
    for (const c of b.children) if (c.isOpen) each(c);
  })(tree.root);
  if (open?.failed) refreshOpen();
}
/** Counts the branches in sight that are doubtful. One after the other, and each second: a queue changes all the time. */
async function recount() {
  const mine = ticket,
    doubtful = rows.slice(Math.max(0, list.first), list.last + 1).filter((r) => r.isDoubtful && !r.children.length);
  if (!doubtful.length) return;
  try {
    for (const b of doubtful) {
      b.isDoubtful = false; // Before it is asked: what goes meanwhile makes it so again.
      const r = await get(`/v1/state?${query({ prefix: b.prefix, limit: PAGE, keys_only: 'true' })}`);
      if (mine !== ticket || b.isLoading || b.children.length) return;
      Object.assign(b, { count: r.items.length, isMore: r.next_cursor !== null, asOf: number(r.revision) });
      tree.settle(b);
    }
  } catch {
    for (const b of doubtful) b.isDoubtful = true;
  } finally {
    draw();
  }
}
const stream = new Stream({
  onFrame(f) {
    if (f.type === 'reset') return void load();
    if (f.type !== 'state_updated' && f.type !== 'state_deleted') return;
    const ev = exact(f.data);
    tree.apply(ev);
    if (open?.key === ev.key) changed(ev);
    draw();
  },
  onStatus(status, message = '') {
    stopped = message;
    if (!nodes) return;
    if (status === 'connected') askAgain();
    draw();
  },
});
const follow = () => stream.open(`/v1/events?${query({ types: 'state_updated,state_deleted', since, prefix: tree.root.prefix })}`);

/** Reads the tree anew; branches that were open open again. */
async function load() {
  ticket++;
  const wasOpen = new Set();
  (function note(b) {
    for (const c of b.children)
      if (c.isOpen) {
        wasOpen.add(c.prefix);
        note(c);
      }
  })(tree.root);
  tree = new Tree(prefix, -1, preview);
  const { root } = tree;
  root.isOpen = true;
  since = null;
  stream.open(null);
  root.isDone = !reachesKey(prefix); // There is nothing to ask for.
  draw();
  await more(root);
  if (root.error) {
    if (root.isAway) setTimeout(() => tree.root.error && since === null && load(), AGAIN_MS / 2);
    return;
  }
  const again = async (b) => {
    for (const c of b.children)
      if (wasOpen.has(c.prefix)) {
        c.isOpen = true;
        await more(c);
        await again(c);
      }
  };
  await again(root);
  // A single branch has nothing to choose from.
  if (root.isDone && root.children.length === 1 && root.children[0].prefix && !wasOpen.size) {
    root.children[0].isOpen = true;
    await more(root.children[0]);
  }
  if (open) refreshOpen();
}

// ---- Values of the rows in sight ----------------------------------------------------------------------------------------
function preview(e) {
  if ('value_base64' in e) return `${e.content_type ?? 'bytes'}, ${bytes(sizeOf(e.value_base64))}`;
  const text = JSON.stringify(e.value) ?? '';
  return text.length > PREVIEW ? `${text.slice(0, PREVIEW)}…` : text;
}
const isUnread = (r) => r.preview === undefined || r.isStale;
let isFetching = false,
  isWanted = false;
/** Asks for what lies next to each other with one request: the rows in sight are one to a few runs. */
const fetchPreviews = lazily(async () => {
  if (!nodes || nodes.root.hidden) return;
  if (isFetching) {
    isWanted = true;
    return;
  }
  isFetching = true;
  isWanted = false;
  const mine = ticket;
  let isNews = false;
  try {
    for (let i = list.from; i <= list.to && mine === ticket; i++) {
      const first = rows[i];
      if (!first?.key || !isUnread(first)) continue;
      let end = i;
      while (end < list.to && rows[end + 1]?.key && rows[end + 1].depth === first.depth) end++;
      // Held: the tree may be another by the time of the answer.
      const asked = rows.slice(i, end + 1),
        wanted = new Map(asked.map((r) => [r.key, r]));
      const before = rows[i - 1]?.key,
        isNext = before !== undefined && rows[i - 1].depth === first.depth;
      const r = isNext
        ? await get(`/v1/state?${query({ prefix: tree.root.prefix, limit: wanted.size, cursor: cursorAfter(before) })}`)
        : await get(`/v1/state?${query({ prefix: first.key, limit: 1 })}`);
      for (const e of r.items) {
        const row = wanted.get(e.key);
        if (!row || row.revision > number(e.revision)) continue;
        Object.assign(row, { preview: preview(e), isStale: false, revision: number(e.revision), expires: number(e.expires_at_ms) });
        isNews = true;
      }
      // A page of large values ends early: what lies behind its last is asked for next.
      let told = isNext ? asked.length : 1;
      if (isNext && r.next_cursor !== null && r.items.length < wanted.size)
        while (told > 1 && asked[told - 1].key !== r.items.at(-1)?.key) told--;
      // What was asked for and did not come is gone; the stream says so too.
      for (const row of asked.slice(0, told)) if (row.revision <= number(r.revision)) row.preview ??= '';
      i += told - 1;
    }
  } catch (e) {
    if (e.isAway) setTimeout(draw, AGAIN_MS); /* It asks again. */
  } finally {
    isFetching = false;
    if (isNews || isWanted) draw();
  }
}, 60);

// ---- What is seen -------------------------------------------------------------------------------------------------------
let nodes = null,
  list = null,
  go = () => {},
  prefix = null,
  open = null;
const draw = lazily(() => {
  if (!nodes) return;
  rows = tree.rows();
  const { root } = tree;
  list.set(rows.length);
  const total = root.children.reduce((n, c) => n + (c.prefix ? c.count : 1), 0),
    isSome = !root.isDone || root.children.some((c) => c.isMore);
  say(
    nodes.info,
    !root.children.length
      ? ''
      : prefix || keyCount() === undefined
        ? `${isSome ? `${int(total)}+ keys` : many(total, 'key')}${prefix ? (total === 1 && !isSome ? ' begins so' : ' begin so') : ''}`
        : many(keyCount(), 'key'),
  );
  nodes.empty.hidden = !root.isDone || root.children.length > 0;
  nodes.makeOne.hidden = nodes.makeOne.disabled || !reachesKey(prefix ?? '');
  say(nodes.emptyTitle, !reachesKey(prefix ?? '') ? keysWords() : prefix ? 'No key begins so.' : 'No keys yet.');
  say(nodes.error, root.error || stopped);
}, 30);
const endsIn = (ms) => (ms <= serverNow() ? 'ended' : duration((ms - serverNow()) / 1000 + 0.999));

const isFlashing = (r) => Date.now() - r.flash < 900;
function sign(i) {
  const r = rows[i];
  if (!r || r.loads || (r.key !== undefined && isUnread(r))) return Symbol('to be read');
  return `${r.depth} ${isFlashing(r) ? r.flash : ''} ${r.prefix !== undefined ? `${r.isOpen} ${r.count}${r.isMore}` : `${open?.key === r.key} ${r.expires ? endsIn(r.expires) : ''}`} ${JSON.stringify([r.sort, tree.root.prefix, r.preview])}`;
}
function row(i) {
  const r = rows[i];
  if (!r) return el('div');
  const node = el('div', { class: 'node', role: 'treeitem', 'aria-level': String(r.depth + 1) });
  node.style.paddingLeft = `${r.depth * 16 + 10}px`;
  if (r.loads) {
    if (!r.loads.isLoading && !r.loads.error) queueMicrotask(() => more(r.loads));
    node.append(el('span', { class: 'soft' }, r.loads.error || 'reading …'));
    return node;
  }
  if (isFlashing(r)) node.classList.add('flash');
  // Names are shown from where their branch begins; a prefix may end in the middle of one.
  const top = tree.root.prefix;
  const up = r.depth === 0 ? top.slice(0, 1 + Math.max(top.lastIndexOf(':'), top.lastIndexOf('/'))) : tree.parentOf(r).prefix;
  if (r.prefix !== undefined) {
    node.setAttribute('aria-expanded', String(r.isOpen));
    node.append(
      Object.assign(icon(ICONS.right)),
      el('span', { class: 'name' }, visible(r.prefix.slice(up.length))),
      el('span', { class: 'count' }, `${int(r.count)}${r.isMore ? '+' : ''}`),
    );
    return node;
  }
  node.setAttribute('aria-selected', String(open?.key === r.key));
  if (isUnread(r)) fetchPreviews();
  node.append(
    el('span', { class: 'name key', title: r.key }, visible(r.key.slice(up.length)) || '(the prefix itself)'),
    el('span', { class: 'peek' }, r.preview ?? ''),
  );
  if (r.expires) {
    const left = r.expires - serverNow();
    node.append(el('span', { class: left < 10_000 ? 'ends soon' : 'ends', title: 'time to live' }, endsIn(r.expires)));
  }
  return node;
}
function toggle(b, isOpen = !b.isOpen) {
  b.isOpen = isOpen;
  if (isOpen && !b.children.length) more(b);
  draw();
}
const pick = (i) => {
  const r = rows[i];
  if (!r || r.loads) return;
  r.prefix !== undefined ? toggle(r) : choose(r.key);
};
function treeKey(e, i) {
  const r = rows[i];
  if (e.key === 'ArrowRight' && r?.prefix !== undefined) {
    r.isOpen ? list.go(i + 1) : toggle(r, true);
  } else if (e.key === 'ArrowLeft' && r) {
    if (r.isOpen) toggle(r, false);
    else {
      let up = i;
      while (up > 0 && rows[up].depth >= r.depth) up--;
      if (rows[up].depth < r.depth) list.go(up);
    }
  } else return false;
  e.preventDefault();
  return true;
}

// ---- One key ------------------------------------------------------------------------------------------------------------
// {key, latest, tab, drafts, view, failed}. `latest` is what the server has now: an entry, null when there is none, undefined
// while that is not known. `drafts` are forms by their tab: what somebody has written there stays while they look at another
// tab. `view` is the value as it is shown; `failed` says why the key could not be read.
const opened = (key, more) => ({ key, latest: undefined, tab: 'value', drafts: {}, view: null, failed: '', timer: 0, ...more });
const isDirty = () => Object.values(open?.drafts ?? {}).some((d) => d.isDirty);
/** An answer that comes late does not take anybody away from another view. */
const isHere = () => !nodes.root.hidden;
function choose(key) {
  go('state', { prefix, key });
}
function openKey(key) {
  if (open?.key === key && !open.isNew) {
    if (open.failed) refreshOpen();
    return;
  }
  open = opened(key);
  nodes.ask.hidden = true;
  if (!reachesKey(key)) return pane(el('div', { class: 'empty' }, keysWords()));
  showTab('value');
  refreshOpen();
}
function newKey() {
  leave(() => {
    open = opened('', { latest: null, tab: 'edit', isNew: true });
    go('state', { prefix });
    showTab('edit');
    nodes.detail.querySelector('[name=key]')?.focus();
  });
}
function close() {
  leave(() => {
    open = null;
    go('state', { prefix });
    nodes.tree.focus();
  });
}
/** Goes on; when something is written and not saved, only after it is said that it may go. */
function leave(on) {
  const o = open;
  if (!isDirty()) return on();
  const discard = el(
    'button',
    {
      type: 'button',
      class: 'danger',
      onclick: () => {
        o.drafts = {};
        nodes.ask.hidden = true;
        on();
      },
    },
    'Discard it',
  );
  const stay = el('button', { type: 'button', class: 'main', id: 'stay', onclick: goOn }, 'Go on editing');
  nodes.ask.replaceChildren(el('p', {}, 'What you wrote is not saved.'), el('div', { class: 'row' }, stay, discard));
  nodes.ask.hidden = false;
  stay.focus();
}
function goOn() {
  nodes.ask.hidden = true;
  open.drafts[open.tab]?.value.focus();
}
addEventListener('beforeunload', (e) => {
  if (isDirty()) e.preventDefault();
});
/** The frame of the panel, with `body` in it. */
function pane(...body) {
  const o = open,
    focused = nodes.detail.contains(document.activeElement) ? document.activeElement.id : null;
  nodes.detail.hidden = false;
  nodes.split.classList.add('two');
  const curl = `curl ${quote(`${location.origin}/v1/state/${encodeURIComponent(o.key)}`)}${curlKey()}`;
  const isBytes = o.latest && 'value_base64' in o.latest;
  nodes.detail.replaceChildren(
    el(
      'div',
      { class: 'pane-head' },
      el('h2', { class: 'mono' }, o.isNew ? 'New key' : visible(o.key)),
      o.isNew ? null : el('button', { type: 'button', id: 'key-curl', onclick: () => copy(curl, 'Copied as curl') }, 'Copy as curl'),
      el(
        'button',
        { type: 'button', class: 'ghost', id: 'key-close', 'aria-label': 'Close', title: 'Close (Esc)', onclick: close },
        icon(ICONS.close),
      ),
    ),
    o.isNew ? '' : nodes.badges,
    nodes.ask,
    o.isNew ? '' : tabs(o.latest, isBytes),
    el('div', { class: 'pane-body' }, body),
  );
  badges();
  // What had the focus is another button now, or gone.
  if (focused !== null) (document.getElementById(focused) ?? nodes.detail.querySelector('[aria-selected=true], textarea'))?.focus();
}
function tabs(e, isBytes) {
  const o = open,
    has = (name) => e || o.drafts[name]?.isDirty;
  const tab = (name, label) =>
    el(
      'button',
      {
        type: 'button',
        role: 'tab',
        id: `tab-${name}`,
        'aria-selected': String(o.tab === name),
        tabIndex: o.tab === name ? 0 : -1,
        onclick: () => showTab(name),
      },
      o.tab !== name && o.drafts[name]?.isDirty ? `${label} (not saved)` : label,
    );
  const box = el(
    'div',
    { class: 'tabs', role: 'tablist' },
    tab('value', 'Value'),
    has('edit') ? writes(tab('edit', 'Edit')) : null,
    has('patch') && !isBytes ? writes(tab('patch', 'Patch')) : null,
    tab('history', 'History'),
  );
  box.onkeydown = (event) => {
    const all = [...box.querySelectorAll('button:not(:disabled)')],
      at = all.indexOf(document.activeElement);
    const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: -1 }[event.key];
    if (to === undefined || at < 0) return;
    event.preventDefault();
    all.at(to % all.length).focus();
  };
  return box;
}
function badges() {
  const o = open,
    e = o?.latest;
  if (!o || o.isNew) return;
  if (e) o.hasBeen = true;
  const facts =
    e === undefined
      ? []
      : e === null
        ? [el('span', { class: 'badge bad' }, o.hasBeen ? 'deleted' : 'no such key')]
        : [
            el('span', { class: 'badge' }, `revision ${e.revision}`),
            e.created_revision !== undefined && el('span', { class: 'badge' }, `created at ${e.created_revision}`),
            e.expires_at_ms != null &&
              el(
                'span',
                { class: number(e.expires_at_ms) - serverNow() < 10_000 ? 'badge bad' : 'badge warn', id: 'deadline' },
                `ends in ${endsIn(number(e.expires_at_ms))}`,
              ),
            e.meta?.job_id != null &&
              el('a', { class: 'badge', href: `#jobs?${query({ job: e.meta.job_id })}` }, `job ${visible(e.meta.job_id)}`),
            ...(e.meta?.tags ?? []).map((t) => el('a', { class: 'badge', href: `#events?${query({ tag: t })}` }, `tag ${visible(t)}`)),
            e.content_type && el('span', { class: 'badge' }, e.content_type),
          ];
  const there = [...nodes.badges.children];
  arrange(
    nodes.badges,
    facts.filter(Boolean).map((badge) => there.find((old) => old.isEqualNode(badge)) ?? badge),
  );
}
const SHOW = { value: showValue, edit: () => showEdit(false), patch: () => showEdit(true), history: showHistory };
function showTab(name) {
  open.tab = name;
  nodes.ask.hidden = true;
  SHOW[name]();
}
function hex(raw) {
  const lines = [];
  for (let at = 0; at < Math.min(raw.length, 4096); at += 16) {
    const part = [...raw.subarray(at, at + 16)];
    lines.push(
      `${at.toString(16).padStart(6, '0')}  ${part
        .map((b) => b.toString(16).padStart(2, '0'))
        .join(' ')
        .padEnd(47)}  ${part.map((b) => (b > 31 && b < 127 ? String.fromCharCode(b) : '·')).join('')}`,
    );
  }
  return lines.join('\n') + (raw.length > 4096 ? `\n… ${bytes(raw.length - 4096)} more` : '');
}
/** The value. What changes is changed in its place, so that folds, focus and an armed button stay; what is selected waits. */
function showValue() {
  const o = open,
    e = o.latest,
    v = o.view,
    isThere = v?.box.isConnected,
    kind = e && 'value_base64' in e ? 'bytes' : 'json';
  if (isThere && isSelected(v.box) && e !== v.entry) {
    v.note.hidden = false;
    return say(v.note, `${e ? `Revision ${e.revision} came in` : 'This key was deleted'}. It shows when nothing is selected here.`);
  }
  if (e === undefined)
    return pane(o.failed ? el('p', { class: 'error', role: 'alert' }, o.failed) : el('div', { class: 'empty' }, 'Reading …'));
  if (e === null) return pane(el('div', { class: 'empty' }, 'There is nothing under this key now. Its history may say why.'));
  if (isThere && v.kind === kind) {
    v.note.hidden = true;
    return kind === 'bytes' ? fillBytes(v, e) : fillJson(v, e);
  }
  o.view = {
    kind,
    box: el('div', { class: kind === 'json' ? 'value' : '', id: 'value' }),
    note: el('p', { class: 'note', id: 'waits', hidden: true }),
    entry: null,
  };
  kind === 'bytes' ? fillBytes(o.view, e) : fillJson(o.view, e);
  o.error = el('p', { class: 'error', role: 'alert' });
  const erase = sure(writes(el('button', { type: 'button', class: 'danger', id: 'delete' }, 'Delete')), 'Really delete?', () =>
    attempt(async () => {
      await write({ op: 'delete', key: o.key, if_revision: o.latest?.revision });
      toast(`${o.key} deleted`);
      if (isHere()) close();
    }),
  );
  const copyValue =
    kind === 'json'
      ? el('button', { type: 'button', id: 'copy-value', onclick: () => copy(pretty(o.view.entry.value)) }, 'Copy value')
      : null;
  pane(o.view.note, o.view.box, o.error, el('div', { class: 'row foot' }, copyValue, el('span', { class: 'grow' }), erase));
}
function fillJson(v, e) {
  v.entry ? jsonUpdate(v.box.firstChild, e.value) : v.box.append(jsonView(e.value, 3));
  v.entry = e;
}
function fillBytes(v, e) {
  const isSame = v.entry?.value_base64 === e.value_base64 && v.entry?.content_type === e.content_type;
  v.entry = e;
  if (isSame) return;
  const raw = Uint8Array.from(atob(e.value_base64), (c) => c.charCodeAt(0)),
    type = e.content_type ?? '';
  const isText = /^text\/|json|xml/.test(type),
    isPicture = /^image\/(png|jpeg|gif|webp)$/.test(type);
  v.box.replaceChildren(
    isPicture
      ? el('img', { class: 'picture', alt: e.key, src: `data:${type};base64,${e.value_base64}` })
      : el('pre', { class: 'bytes' }, isText ? new TextDecoder().decode(raw) : hex(raw)),
    el('p', { class: 'soft' }, bytes(raw.length)),
  );
}
document.addEventListener('selectionchange', () => {
  if (open?.tab === 'value' && open.view?.note.hidden === false && !isSelected(open.view.box)) showValue();
});

function showEdit(isPatch) {
  const o = open,
    tab = isPatch ? 'patch' : 'edit';
  if (!o.drafts[tab]?.isDirty) o.drafts[tab] = draft(isPatch);
  const d = o.drafts[tab];
  pane(d.form);
  if (d.isDirty && d.conflict.hidden) tellNews(d);
  if (isPatch) d.value.focus();
  if (isPatch && !d.isDirty) d.value.setSelectionRange(4, 4);
}
/** A form to write a key or a patch. `entry` is what it began from: the condition of a save, and what is as it was. */
function draft(isPatch) {
  const o = open,
    d = { isPatch, isDirty: false, isAgreed: false, entry: null, endsWas: '' };
  d.value = el('textarea', { name: 'value', rows: 12, spellcheck: false, value: '{\n  \n}' });
  d.ends = el(
    'select',
    { name: 'ends' },
    isPatch ? null : el('option', { value: 'keep' }, 'as before'),
    el('option', { value: 'never' }, isPatch ? 'as it is' : 'never'),
    el('option', { value: 'in' }, 'in … seconds'),
  );
  d.seconds = el('input', { name: 'seconds', inputMode: 'decimal', disabled: true, 'aria-label': 'Seconds' });
  d.meta = el('input', {
    name: 'meta',
    class: 'mono',
    placeholder: '{"job_id": "1", "tags": ["a"]}',
    spellcheck: false,
    autocomplete: 'off',
  });
  d.name = o.isNew
    ? el('input', {
        name: 'key',
        class: 'mono',
        autocomplete: 'off',
        spellcheck: false,
        required: true,
        value: reachesKey(prefix ?? '') ? (prefix ?? '') : (limits().prefixes[0] ?? ''),
      })
    : null;
  d.error = el('p', { class: 'error', role: 'alert' });
  d.conflict = el('div', { class: 'conflict', id: 'conflict', hidden: true });
  d.note = el('p', { class: 'note', id: 'newer', hidden: true });
  d.what = el('span');
  d.when = el('span', { class: 'soft' });
  d.save = el('button', { class: 'main', id: 'save' });
  d.form = el(
    'form',
    {
      class: 'edit',
      onsubmit: (event) => {
        event.preventDefault();
        attempt(() => save(d), d);
      },
    },
    d.name && el('label', {}, 'Key ', d.name),
    el('label', {}, d.what, d.value),
    el(
      'div',
      { class: 'row' },
      el('label', {}, 'Ends ', d.ends),
      el('label', { class: 'seconds' }, 'Seconds ', d.seconds),
      isPatch ? null : el('label', { class: 'grow' }, 'Labels (JSON) ', d.meta),
    ),
    d.note,
    d.conflict,
    d.error,
    el('div', { class: 'row foot' }, d.save, d.when),
  );
  d.form.oninput = () => {
    d.isDirty = true;
    d.seconds.disabled = d.ends.value !== 'in';
  };
  d.value.onkeydown = (event) => {
    if (event.key === 'Enter' && (event.ctrlKey || event.metaKey)) d.form.requestSubmit();
  };
  begin(d, o.latest);
  return d;
}
/** Lets a form begin from an entry; one that nobody has written in yet follows the key so. */
function begin(d, e) {
  const isBytes = e && 'value_base64' in e,
    { selectionStart, selectionEnd } = d.value;
  d.entry = e;
  d.note.hidden = true;
  say(
    d.what,
    d.isPatch ? 'Merge patch: fields to set, null removes one' : isBytes ? 'New value (JSON) in place of the bytes' : 'Value (JSON)',
  );
  say(d.save, d.isPatch ? 'Apply patch' : open.isNew ? 'Create' : 'Save');
  say(
    d.when,
    d.isPatch ? 'merged inside the commit' : open.isNew ? 'only if it is absent' : `only if it is still revision ${e?.revision ?? 0}`,
  );
  d.ends.value = d.endsWas = e?.expires_at_ms != null && !d.isPatch ? 'keep' : 'never';
  if (d.isPatch) return;
  d.ends.firstChild.disabled = e?.expires_at_ms == null;
  d.meta.value = d.meta.defaultValue = e?.meta ? JSON.stringify(e.meta) : '';
  d.value.value = e && !isBytes ? (pretty(e.value) ?? '') : '{}';
  if (document.activeElement === d.value) d.value.setSelectionRange(selectionStart, selectionEnd);
}
/** What came in while a form was written in. */
function tellNews(d) {
  const { latest } = open;
  d.isAgreed = false;
  if (d.isPatch) say(d.save, 'Apply patch');
  d.note.hidden = latest?.revision === d.entry?.revision;
  say(
    d.note,
    latest
      ? d.isPatch
        ? `Revision ${latest.revision} came in. Your patch goes on top of it.`
        : `Revision ${latest.revision} came in while you edit ${d.entry?.revision ?? 0}. Saving will compare them.`
      : 'This key was deleted meanwhile.',
  );
}
async function attempt(work, d) {
  const o = open,
    error = d?.error ?? o.error,
    buttons = nodes.detail.querySelectorAll('.foot button');
  o.isBusy = true;
  for (const b of buttons) b.disabled = true;
  say(error, '');
  try {
    await work();
  } catch (e) {
    if (open !== o) return;
    try {
      if (e.code === 'revision_conflict' && d && !d.isPatch) await showConflict(d);
      else say(error, e.code === 'revision_conflict' ? 'Somebody changed it in this moment. Look again.' : e.message);
    } catch (other) {
      say(error, other.message);
    }
  } finally {
    o.isBusy = false;
    for (const b of buttons) b.disabled = false;
    if (open === o && o.tab === 'value') showValue(); // What came in meanwhile.
  }
}
/**
 * Deadline and labels for a save over `base`: those of the form where they were changed there, else those that `base` has.
 * `isPast`: that deadline has passed. Kept, it would take what is saved away at once; there is none then.
 */
function terms(d, base) {
  const out = {},
    isEndKept = d.ends.value !== 'in' && d.ends.value === d.endsWas;
  if (d.ends.value === 'in') {
    out.ttl_ms = Math.round(Number(d.seconds.value) * 1000);
    if (!(out.ttl_ms > 0)) throw new Error('Say in how many seconds the key ends.');
  }
  if (d.isPatch) return out;
  if (isEndKept && base?.expires_at_ms != null) {
    const left = number(base.expires_at_ms) - serverNow();
    left > 0 ? (out.ttl_ms = left) : (out.isPast = true);
  }
  if (d.meta.value !== d.meta.defaultValue) {
    if (d.meta.value.trim()) out.meta = field(d.meta.value, 'Labels');
  } else if (base?.meta) out.meta = base.meta;
  return out;
}
/** Writes a form. `over`: the entry, or null, that somebody else wrote and that is to be overwritten. */
async function save(d, over) {
  const o = open,
    key = d.name ? d.name.value : o.key,
    content = field(d.value.value, d.isPatch ? 'The patch' : 'The value');
  const base = over === undefined ? d.entry : (over ?? d.entry),
    { isPast, ...rest } = terms(d, base);
  const done = d.isPatch
    ? await patch(d, { op: 'patch', key, patch: content, ...rest })
    : await write({ op: 'put', key, value: content, if_revision: (over === undefined ? d.entry : over)?.revision ?? 0, ...rest });
  if (!done) return;
  toast(`${key} is revision ${done.revision}.${isPast ? ' The deadline it had has passed: it has none now.' : ''}`);
  d.isDirty = false;
  if (open !== o) return;
  if (o.isNew) {
    open = null;
    return isHere() && choose(key);
  }
  await refreshOpen();
  if (open === o) showTab('value');
}
/**
 * A patch goes on top of whatever is there, but on top of nothing only after a yes: a fragment would become the key. Its
 * condition is only that, and is brought up to date when it fails.
 */
async function patch(d, op) {
  for (let tries = 0, at = open.latest?.revision ?? 0; ; tries++) {
    if (!at && !d.isAgreed) {
      d.isAgreed = true;
      d.note.hidden = false;
      say(d.note, 'This key was deleted meanwhile: the patch alone would become its value.');
      say(d.save, 'Create it from the patch');
      return null;
    }
    try {
      return await write(at ? { ...op, if_revision: at } : op);
    } catch (e) {
      if (e.code !== 'revision_conflict' || tries === 20) throw e;
      at = e.body.actual;
    }
  }
}
/** A lost race: both values side by side, with what else would be written, and a choice. */
async function showConflict(d) {
  const o = open,
    key = d.name ? d.name.value : o.key,
    theirs = (await read(key)) ?? null;
  if (open !== o) return;
  const mine = el('pre'),
    other = el('pre'),
    kept = terms(d, theirs ?? d.entry);
  try {
    paint(mine, pretty(exact(d.value.value)));
  } catch {
    mine.textContent = d.value.value;
  }
  theirs && 'value' in theirs ? paint(other, pretty(theirs.value)) : (other.textContent = theirs ? preview(theirs) : '(deleted)');
  const told = (ms, meta) =>
    `${ms === undefined ? 'no deadline' : `ends in ${duration(ms / 1000 + 0.999)}`} · ${meta ? `labels ${visible(JSON.stringify(meta))}` : 'no labels'}`;
  const ours = told(kept.ttl_ms, kept.meta),
    others = theirs ? told(theirs.expires_at_ms == null ? undefined : number(theirs.expires_at_ms) - serverNow(), theirs.meta) : '';
  const isPlain = [ours, others].every((t) => t === '' || t === told());
  const termsLine = (text) => (isPlain || !text ? null : el('p', { class: 'soft' }, text));
  const over = el(
    'button',
    {
      type: 'button',
      class: 'danger',
      onclick: () => {
        d.conflict.hidden = true;
        attempt(() => save(d, theirs), d);
      },
    },
    'Write mine over it',
  );
  const taken = el(
    'button',
    {
      type: 'button',
      onclick: () => {
        o.drafts = {};
        if (!theirs) return close();
        if (o.isNew) {
          open = null;
          return choose(key);
        }
        o.latest = theirs;
        showTab('edit');
      },
    },
    'Take theirs',
  );
  d.conflict.replaceChildren(
    el(
      'p',
      {},
      el('b', {}, 'Somebody wrote first. '),
      `You edited revision ${d.entry?.revision ?? 0}; it is ${theirs?.revision ?? 0} now. Nothing was written.${kept.isPast ? ' The deadline has passed: yours would be written without one.' : ''}`,
    ),
    el(
      'div',
      { class: 'both' },
      el('div', {}, el('h3', {}, 'Yours'), mine, termsLine(ours)),
      el('div', {}, el('h3', {}, theirs ? `Theirs, revision ${theirs.revision}` : 'Theirs'), other, termsLine(others)),
    ),
    el('div', { class: 'row' }, taken, over),
  );
  d.conflict.hidden = false;
  d.note.hidden = true;
  if (!o.isNew) {
    o.latest = theirs;
    badges();
  }
  taken.focus();
}
/** The entry after an event; undefined when that cannot be told from what is known. */
function after(old, ev) {
  const { key, revision, expires_at_ms, meta, prev_revision } = ev,
    isFirst = number(prev_revision) === 0;
  const entry = { key, revision, created_revision: isFirst ? revision : old?.created_revision, expires_at_ms, meta };
  if ('value_base64' in ev) return { ...entry, value_base64: ev.value_base64, content_type: ev.content_type };
  if (!('patch' in ev)) return { ...entry, value: ev.value };
  if (!isFirst && (old?.revision !== prev_revision || !('value' in old))) return undefined;
  return { ...entry, value: merge(isFirst ? undefined : old.value, ev.patch) };
}
function changed(ev) {
  const o = open;
  if (o.latest && o.latest.revision >= ev.revision) return;
  if (o.tab === 'history') o.addChange?.(ev);
  const latest = ev.type === 'state_deleted' ? null : after(o.latest, ev);
  if (latest === undefined) return refreshOpen();
  show(latest);
}
/** Reads the key, and asks again while there is nothing to show and nobody answers. */
async function refreshOpen() {
  const o = open,
    was = o.latest;
  if (o.isNew || !reachesKey(o.key)) return;
  try {
    const now = (await read(o.key)) ?? null;
    if (open !== o || o.latest !== was) return; // The stream was faster.
    o.failed = '';
    if (was === undefined || now?.revision !== was?.revision) show(now);
  } catch (e) {
    if (open !== o || o.latest !== undefined) return; // The stream tells later.
    o.failed = e.message;
    if (o.tab === 'value') showValue();
    clearTimeout(o.timer);
    if (e.isAway) o.timer = setTimeout(() => open === o && o.latest === undefined && isHere() && refreshOpen(), AGAIN_MS);
  }
}
function show(latest) {
  const o = open,
    isFirst = o.latest === undefined;
  o.latest = latest;
  badges();
  if (o.isNew || o.isBusy) return;
  if (isFirst) return showTab(latest ? o.tab : 'history');
  if (o.tab === 'value') return showValue();
  if (o.tab === 'history') return;
  const d = o.drafts[o.tab];
  if (!d.conflict.hidden) return;
  if (o.tab === 'edit' && !d.isDirty && latest) return begin(d, latest);
  tellNews(d);
}
/** What the log still knows of the key, newest first. */
async function showHistory() {
  const o = open,
    turn = (o.turn = (o.turn ?? 0) + 1),
    box = el('div', { class: 'timeline', id: 'history' }),
    info = el('p', { class: 'soft', role: 'status' }, 'Reading the log …');
  pane(info, box);
  const found = [],
    live = [];
  let from = 0,
    cut = null;
  o.addChange = (ev) => live.push(ev); // What happens while the log is read.
  const isMine = () => open === o && o.turn === turn && o.tab === 'history';
  try {
    for (;;) {
      let r;
      try {
        r = await history({ key: o.key, since: from, types: 'state_updated,state_deleted', limit: 1000 });
      } catch (e) {
        const oldest = number(e.body?.oldest);
        if (e.code !== 'revision_compacted' || oldest - 1 <= from) throw e;
        from = oldest - 1;
        cut = oldest;
        continue;
      }
      if (!isMine()) return;
      if (cut === null && number(r.oldest) > 1) cut = number(r.oldest); // `since=0` is the oldest there is, whatever is gone.
      found.push(...r.events);
      from = number(r.next_since);
      if (from >= number(r.head)) break;
      say(info, `Reading the log … ${Math.floor((from / number(r.head)) * 100)} %`);
    }
  } catch (e) {
    if (!isMine()) return;
    info.className = 'error';
    say(info, e.message);
    if (e.isAway) setTimeout(() => isMine() && showHistory(), AGAIN_MS);
    return;
  }
  const last = number(found.at(-1)?.revision ?? 0);
  found.push(...live.filter((ev) => number(ev.revision) > last));
  let count = found.length;
  const tell = () =>
    say(
      info,
      `${int(count)} ${count === 1 ? 'change' : 'changes'}${cut ? `; the log begins at revision ${int(cut)}, what was before is gone` : ' since the log begins'}.`,
    );
  tell();
  o.addChange = (ev) => {
    count++;
    box.prepend(change(ev));
    tell();
  };
  const start = (n) => {
    for (const ev of found.slice(Math.max(0, n - 200), n).reverse()) box.append(change(ev));
    if (n > 200) {
      const older = el(
        'button',
        {
          type: 'button',
          onclick: () => {
            older.remove();
            start(n - 200);
          },
        },
        `${int(n - 200)} older`,
      );
      box.append(older);
    }
  };
  start(found.length);
}
function change(ev) {
  const at = new Date(number(ev.ts) * 1000),
    isGone = ev.type === 'state_deleted',
    what = isGone ? ev.reason : number(ev.prev_revision) === 0 ? 'created' : 'patch' in ev ? 'patched' : 'put';
  const told = 'patch' in ev ? ev.patch : ev.value;
  const item = el(
    'details',
    { class: `change ${isGone ? 'bad' : ''}` },
    el(
      'summary',
      {},
      el('i', { class: 'dot' }),
      el('b', {}, what),
      el('span', { class: 'mono soft' }, `#${ev.revision}`),
      el('span', { class: 'peek mono' }, isGone ? '' : 'value_base64' in ev ? preview(ev) : JSON.stringify(told).slice(0, PREVIEW)),
      el(
        'time',
        { class: 'soft', title: at.toISOString(), dateTime: at.toISOString() },
        `${at.toLocaleDateString('en-CA')} ${at.toTimeString().slice(0, 8)}`,
      ),
    ),
  );
  item.ontoggle = () => {
    if (!item.open || item.children[1]) return;
    item.append(el('div', { class: 'value' }, jsonView(isGone ? ev : 'value_base64' in ev ? ev.value_base64 : told, 3)));
    if ('value' in ev)
      item.append(
        writes(
          el(
            'button',
            {
              type: 'button',
              onclick: () => {
                leave(() => {
                  if (!open.latest) {
                    open = opened(ev.key, { latest: null, isNew: true });
                    go('state', { prefix });
                  }
                  const d = (open.drafts.edit = draft(false));
                  d.value.value = pretty(ev.value);
                  d.isDirty = true;
                  if (d.name) d.name.value = ev.key;
                  showTab('edit');
                });
              },
            },
            'Edit from this value',
          ),
        ),
      );
  };
  return item;
}
setInterval(() => {
  if (nodes && !nodes.root.hidden && !document.hidden) recount();
}, 1000);
setInterval(() => {
  if (!nodes || nodes.root.hidden) return;
  if (rows.slice(Math.max(0, list.first), list.last + 1).some((r) => r.expires || Date.now() - r.flash < 2000)) list.refresh();
  if (!prefix) draw();
  if (open?.latest?.expires_at_ms != null) {
    const left = nodes.badges.querySelector('#deadline');
    if (left) say(left, `ends in ${endsIn(number(open.latest.expires_at_ms))}`);
  }
}, 500);

export const state = {
  title: 'State',
  streams: [stream],
  fresh() {
    prefix = null;
    if (!isDirty()) open = null; // What somebody is writing is theirs, whatever the key.
  },
  mount(section, navigate) {
    go = navigate;
    const filter = el('input', {
      name: 'prefix',
      class: 'mono',
      placeholder: 'keys that begin with …',
      autocomplete: 'off',
      spellcheck: false,
      'aria-label': 'Prefix',
    });
    // What somebody writes stays beside whatever they look for.
    filter.oninput = lazily(
      () => filter.value !== prefix && go('state', { prefix: filter.value, key: isDirty() && !open.isNew ? open.key : null }),
      200,
    );
    filter.onkeydown = (e) => {
      if (e.key === 'ArrowDown' || e.key === 'Enter') {
        e.preventDefault();
        nodes.tree.focus();
        if (rows.length) list.go(0);
      }
    };
    nodes = {
      root: section,
      filter,
      info: el('span', { class: 'soft', id: 'state-info', role: 'status' }),
      error: el('p', { class: 'error', role: 'alert' }),
      tree: el('div', { class: 'tree', id: 'tree', role: 'tree', 'aria-label': 'Keys' }),
      emptyTitle: el('h2', {}),
      badges: el('div', { class: 'badges', id: 'badges' }),
      detail: el('aside', { class: 'card pane', id: 'detail', hidden: true }),
      ask: el('div', { class: 'conflict', id: 'unsaved', role: 'alert', hidden: true }),
    };
    nodes.newKey = writes(el('button', { type: 'button', id: 'new-key', class: 'main', title: 'n', onclick: newKey }, 'New key'));
    nodes.makeOne = writes(el('button', { type: 'button', class: 'main', onclick: newKey }, 'Make one'));
    nodes.empty = el('div', { class: 'empty', hidden: true }, nodes.emptyTitle, nodes.makeOne);
    nodes.split = el('div', { class: 'split' }, el('div', { class: 'card column tree-card' }, nodes.tree, nodes.empty), nodes.detail);
    section.append(
      el(
        'div',
        { class: 'toolbar' },
        el('div', { class: 'search' }, icon(ICONS.search), filter),
        nodes.info,
        el('span', { class: 'grow' }),
        nodes.newKey,
      ),
      nodes.error,
      nodes.split,
    );
    list = new VirtualList(nodes.tree, ROW, { draw: row, sign, onPick: pick, onKey: treeKey });
  },
  show(params) {
    const next = params.get('prefix') ?? '',
      key = params.get('key'),
      own = limits()?.prefixes ?? [];
    // A key with limits begins where it may look, except while somebody empties the field to type.
    if (next === '' && own.length && !reachesKey('') && nodes.filter !== document.activeElement)
      return go('state', { prefix: own.find((p) => key?.startsWith(p)) ?? own[0], key });
    if (open && isDirty() && (open.isNew ? key !== null : key !== open.key)) {
      go('state', { prefix, key: open.isNew ? null : open.key });
      return leave(() => {
        open = null;
        go('state', Object.fromEntries(params));
      });
    }
    if (nodes.filter !== document.activeElement) nodes.filter.value = next;
    if (next !== prefix) {
      prefix = next;
      tree = new Tree('', 0, preview);
      nodes.tree.scrollTop = 0;
      list.active = -1;
      load();
    }
    if (key !== null) openKey(key);
    else if (open && !open.isNew) open = null;
    if (!open) {
      nodes.detail.hidden = true;
      nodes.split.classList.remove('two');
    }
    draw();
  },
  keys: { n: () => nodes.newKey.click(), Escape: () => open && (nodes.ask.hidden ? close() : goOn()) },
};
