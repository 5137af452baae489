// State: the keys as a tree by prefix, one key beside it.
//
// A branch is what stands before the next ":" or "/". Its children are read page by page as they come in sight, keys only; a
// branch that is longer than a page is stepped over, so the first level of a million keys costs a request for each branch
// and not a thousand pages. Values are read for the rows in sight. From the first page's revision on a stream brings every
// change; what a page or a value knew already is told by its revision.

import { byBytes, bytes, copy, duration, el, exact, field, icon, ICONS, int, jsonView, lazily, merge, number, paint, pretty, query, quote, say, sizeOf, sure, toast, visible } from './lib.js';
import { keysWords, limits, reachesKey, writes } from './key.js';
import { VirtualList } from './list.js';
import { keyCount } from './overview.js';
import { Stream, cursorAfter, curlKey, get, history, read, serverNow, write } from './server.js';

const PAGE = 500, ROW = 32, PREVIEW = 160;
const LAST = '\u{10ffff}\u{10ffff}'; // After every key of a branch.
const SEPARATOR = /[:/]/;

// ---- The tree ---------------------------------------------------------------------------------------------------------
// A branch: {prefix, depth, children, isOpen, isDone, after, count, isMore, asOf}; a key: {key, revision, expires, meta, preview}.
// `sort` orders both. `after` is the name from which the next page goes on.
const branch = (prefix, depth, count = 0, isMore = false, asOf = 0) => ({ sort: prefix, prefix, depth, children: [], isOpen: false, isDone: false, after: null, count, isMore, asOf, isLoading: false, error: '' });
const leaf = (e, depth) => ({ sort: e.key, key: e.key, depth, revision: number(e.revision), created: e.created_revision, expires: number(e.expires_at_ms), meta: e.meta, preview: undefined, flash: 0 });
let root = branch('', 0), rows = [], since = null, ticket = 0;

/** Where `sort` is, or would be, among children that are in order. */
function place(children, sort) {
  let low = 0, high = children.length;
  while (low < high) { const mid = (low + high) >> 1; byBytes(children[mid].sort, sort) < 0 ? low = mid + 1 : high = mid; }
  return low;
}
const separatorIn = (prefix, key) => { const at = key.slice(prefix.length).search(SEPARATOR); return at < 0 ? -1 : prefix.length + at + 1; };

/** Reads the next children of a branch. */
async function more(b) {
  if (b.isLoading || b.isDone) return;
  b.isLoading = true;
  const mine = ticket;
  try {
    for (let added = 0, asked = 0; added < PAGE / 2 && asked < 30 && !b.isDone; asked++) {
      const r = await get(`/v1/state?${query({ prefix: b.prefix, limit: PAGE, keys_only: 'true', cursor: b.after === null ? '' : cursorAfter(b.after) })}`);
      if (mine !== ticket) return;
      if (since === null) { since = r.revision; follow(); }
      added += take(b, r);
      draw();
    }
    b.error = '';
  } catch (e) {
    if (mine !== ticket) return;
    b.error = e.message;
    b.isAway = e.status === 0 || e.status >= 500;
  } finally { b.isLoading = false; draw(); }
}
/** Sorts a page into a branch. Returns how many children it brought. */
function take(b, { items, next_cursor: next, revision }) {
  const asOf = number(revision), fresh = [];
  let group = null;
  for (const e of items) {
    const end = separatorIn(b.prefix, e.key);
    if (end < 0) { group = null; fresh.push(leaf(e, b.depth + 1)); continue; }
    const prefix = e.key.slice(0, end);
    if (group?.prefix !== prefix) fresh.push(group = Object.assign(branch(prefix, b.depth + 1, 0, false, asOf), { only: e }));
    group.count++;
  }
  b.isDone = next === null;
  b.after = items.at(-1)?.key ?? b.after;
  if (group && !b.isDone && fresh.at(-1) === group) { group.isMore = true; b.after = group.prefix + LAST; }
  let added = 0;
  for (const node of fresh) {
    // A branch of one key is that key.
    const child = node.count === 1 && !node.isMore ? leaf(node.only, b.depth + 1) : node;
    delete node.only;
    const at = place(b.children, child.sort);
    if (b.children[at]?.sort === child.sort) continue; // The stream was faster.
    b.children.splice(at, 0, child);
    added++;
  }
  return added;
}
/** The rows in sight order: a branch, then what is in it. A branch that has more ends in a row that loads it. */
function flatten(b, into) {
  for (const child of b.children) {
    into.push(child);
    if (child.isOpen) flatten(child, into);
  }
  if (!b.isDone) into.push({ loads: b, depth: b.depth + 1, sort: '' });
  return into;
}

/** An event, into the tree. */
function apply(ev) {
  const key = ev.key, revision = number(ev.revision), isGone = ev.type === 'state_deleted', isNew = !isGone && number(ev.prev_revision) === 0;
  const trail = [];
  let b = root;
  for (;;) {
    const at = place(b.children, key), known = b.children[at];
    if (known?.key === key) { // Here, as itself.
      if (known.revision >= revision) return;
      if (isGone) {
        b.children.splice(at, 1);
        for (const up of trail) if (revision > up.asOf) up.count--;
        prune(trail);
      } else Object.assign(known, { revision, expires: number(ev.expires_at_ms), meta: ev.meta, ...('value' in ev || 'value_base64' in ev ? { preview: preview(ev), isStale: false } : { isStale: true }), flash: Date.now() });
      return;
    }
    const end = separatorIn(b.prefix, key);
    const inside = end < 0 ? null : b.children[place(b.children, key.slice(0, end))];
    if (inside?.prefix === key.slice(0, end)) { // In a branch that is known.
      inside.flash = Date.now();
      trail.push(inside);
      if (inside.isOpen || inside.children.length) { b = inside; continue; }
      if (revision > inside.asOf && !inside.isMore) {
        inside.count += isNew ? 1 : isGone ? -1 : 0;
        for (const up of trail.slice(0, -1)) if (revision > up.asOf) up.count += isNew ? 1 : isGone ? -1 : 0;
        prune(trail);
      }
      return;
    }
    if (isGone || (!b.isDone && (b.after === null || byBytes(key, b.after) > 0))) return; // Not read yet: the page will have it.
    for (const up of trail) if (isNew && revision > up.asOf) up.count++;
    const mine = Object.assign(leaf({ ...ev, created_revision: revision }, b.depth + 1), { preview: 'value' in ev || 'value_base64' in ev ? preview(ev) : undefined, flash: Date.now() });
    // A second key of a branch that was one key makes it a branch.
    const prefix = end < 0 ? null : key.slice(0, end), twin = prefix === null ? -1 : b.children.findIndex((c) => c.key?.startsWith(prefix));
    if (twin >= 0) {
      const both = branch(prefix, b.depth + 1, 2, false, revision);
      both.flash = Date.now();
      b.children.splice(twin, 1);
      b.children.splice(place(b.children, prefix), 0, both);
    } else b.children.splice(place(b.children, key), 0, mine);
    return;
  }
}
/** Branches that became empty go. */
function prune(trail) {
  for (let i = trail.length - 1; i >= 0; i--) {
    const b = trail[i], up = trail[i - 1] ?? root;
    if (b.count > 0 || b.isMore || b.children.length) return;
    up.children.splice(up.children.indexOf(b), 1);
  }
}

const stream = new Stream({
  onFrame(f) {
    if (f.type === 'reset') return void load();
    if (f.type !== 'state_updated' && f.type !== 'state_deleted') return;
    const ev = exact(f.data);
    apply(ev);
    if (open?.key === ev.key) changed(ev);
    draw();
  },
  onStatus(status, message) {
    if (!nodes) return;
    if (message) say(nodes.error, message);
    if (status === 'connected') { say(nodes.error, ''); if (root.error) more(root); }
  },
});
const follow = () => stream.open(`/v1/events?${query({ types: 'state_updated,state_deleted', since, prefix: root.prefix })}`);

/** Reads the tree anew; branches that were open open again. */
async function load() {
  ticket++;
  const wasOpen = new Set();
  (function note(b) { for (const c of b.children) if (c.isOpen) { wasOpen.add(c.prefix); note(c); } })(root);
  root = branch(prefix, -1);
  root.isOpen = true;
  since = null;
  stream.open(null);
  root.isDone = !reachesKey(prefix); // There is nothing to ask for.
  draw();
  await more(root);
  if (root.error) { if (root.isAway) setTimeout(() => root.error && since === null && load(), 1000); return; }
  const again = async (b) => { for (const c of b.children) if (wasOpen.has(c.prefix)) { c.isOpen = true; await more(c); await again(c); } };
  await again(root);
  // A single branch has nothing to choose from.
  if (root.isDone && root.children.length === 1 && root.children[0].prefix && !wasOpen.size) { root.children[0].isOpen = true; await more(root.children[0]); }
  if (open) refreshOpen();
}

// ---- Values of the rows in sight ----------------------------------------------------------------------------------------
function preview(e) {
  if ('value_base64' in e) return `${e.content_type ?? 'bytes'}, ${bytes(sizeOf(e.value_base64))}`;
  const text = JSON.stringify(e.value) ?? '';
  return text.length > PREVIEW ? `${text.slice(0, PREVIEW)}…` : text;
}
const isUnread = (r) => r.preview === undefined || r.isStale;
let isFetching = false, isWanted = false;
/** Asks for what lies next to each other with one request: the rows in sight are one to a few runs. */
const fetchPreviews = lazily(async () => {
  if (!nodes || nodes.root.hidden) return;
  if (isFetching) { isWanted = true; return; }
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
      const asked = rows.slice(i, end + 1), wanted = new Map(asked.map((r) => [r.key, r]));
      const before = rows[i - 1]?.key, isNext = before !== undefined && rows[i - 1].depth === first.depth;
      const r = isNext
        ? await get(`/v1/state?${query({ prefix: root.prefix, limit: wanted.size, cursor: cursorAfter(before) })}`)
        : await get(`/v1/state?${query({ prefix: first.key, limit: 1 })}`);
      for (const e of r.items) {
        const row = wanted.get(e.key);
        if (!row || row.revision > number(e.revision)) continue;
        Object.assign(row, { preview: preview(e), isStale: false, revision: number(e.revision), expires: number(e.expires_at_ms) });
        isNews = true;
      }
      // A page of large values ends early: what lies behind its last is asked for next.
      let told = isNext ? asked.length : 1;
      if (isNext && r.next_cursor !== null && r.items.length < wanted.size) while (told > 1 && asked[told - 1].key !== r.items.at(-1)?.key) told--;
      // What was asked for and did not come is gone; the stream says so too.
      for (const row of asked.slice(0, told)) if (row.revision <= number(r.revision)) row.preview ??= '';
      i += told - 1;
    }
  } catch { /* the next draw asks again */ } finally {
    isFetching = false;
    if (isNews || isWanted) draw();
  }
}, 60);

// ---- What is seen -------------------------------------------------------------------------------------------------------
let nodes = null, list = null, go = () => {}, prefix = null, open = null;
const draw = lazily(() => {
  if (!nodes) return;
  rows = flatten(root, []);
  list.set(rows.length);
  const total = root.children.reduce((n, c) => n + (c.prefix ? c.count : 1), 0), isSome = !root.isDone || root.children.some((c) => c.isMore);
  say(nodes.info, !root.children.length ? '' : prefix || keyCount() === undefined ? `${int(total)}${isSome ? '+' : ''} keys${prefix ? ' begin so' : ''}` : `${int(keyCount())} keys`);
  nodes.empty.hidden = !root.isDone || root.children.length > 0;
  nodes.makeOne.hidden = nodes.makeOne.disabled || !reachesKey(prefix ?? '');
  say(nodes.emptyTitle, !reachesKey(prefix ?? '') ? keysWords() : prefix ? 'No key begins so.' : 'No keys yet.');
  if (root.error) say(nodes.error, root.error);
}, 30);
const endsIn = (ms) => ms <= serverNow() ? 'ended' : duration((ms - serverNow()) / 1000 + 0.999);

const isFlashing = (r) => Date.now() - r.flash < 900;
function sign(i) {
  const r = rows[i];
  if (!r || r.loads || (r.key !== undefined && isUnread(r))) return Symbol('to be read');
  return `${r.depth} ${isFlashing(r) ? r.flash : ''} ${r.prefix !== undefined ? `${r.isOpen} ${r.count}${r.isMore}` : `${open?.key === r.key} ${r.expires ? endsIn(r.expires) : ''}`} ${JSON.stringify([r.sort, root.prefix, r.preview])}`;
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
  const up = r.depth === 0 ? root.prefix.slice(0, 1 + Math.max(root.prefix.lastIndexOf(':'), root.prefix.lastIndexOf('/'))) : parentOf(r);
  if (r.prefix !== undefined) {
    node.setAttribute('aria-expanded', String(r.isOpen));
    node.append(Object.assign(icon(ICONS.right)), el('span', { class: 'name' }, visible(r.prefix.slice(up.length))), el('span', { class: 'count' }, `${int(r.count)}${r.isMore ? '+' : ''}`));
    return node;
  }
  node.setAttribute('aria-selected', String(open?.key === r.key));
  if (isUnread(r)) fetchPreviews();
  node.append(el('span', { class: 'name key', title: r.key }, visible(r.key.slice(up.length)) || '(the prefix itself)'), el('span', { class: 'peek' }, r.preview ?? ''));
  if (r.expires) {
    const left = r.expires - serverNow();
    node.append(el('span', { class: left < 10_000 ? 'ends soon' : 'ends', title: 'time to live' }, endsIn(r.expires)));
  }
  return node;
}
function parentOf(r) {
  // What stands above it in the tree is a prefix of it: the longest open branch.
  const name = r.key ?? r.prefix;
  let b = root;
  for (;;) {
    const end = separatorIn(b.prefix, name), inside = end < 0 ? null : b.children[place(b.children, name.slice(0, end))];
    if (!inside?.isOpen || inside === r || inside.prefix !== name.slice(0, end)) return b.prefix;
    b = inside;
  }
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
  if (e.key === 'ArrowRight' && r?.prefix !== undefined) { r.isOpen ? list.go(i + 1) : toggle(r, true); }
  else if (e.key === 'ArrowLeft' && r) {
    if (r.isOpen) toggle(r, false);
    else { let up = i; while (up > 0 && rows[up].depth >= r.depth) up--; if (rows[up].depth < r.depth) list.go(up); }
  } else return false;
  e.preventDefault();
  return true;
}

// ---- One key ------------------------------------------------------------------------------------------------------------
// `entry` is what is shown or edited (its revision is the condition of a save), `latest` what the server has now.
function choose(key) { go('state', { prefix, key }); }
async function openKey(key) {
  if (open?.key === key && !open.isNew) return;
  const mine = open = { key, entry: null, latest: null, tab: 'value', isDirty: false };
  if (!reachesKey(key)) return pane(el('div', { class: 'empty' }, keysWords()));
  pane(el('div', { class: 'empty' }, 'Reading …'));
  try {
    const entry = await read(key);
    if (open !== mine) return;
    if (!entry) { mine.tab = 'history'; }
    mine.entry = mine.latest = entry ?? null;
    showTab(mine.tab);
  } catch (e) { if (open === mine) pane(el('p', { class: 'error' }, e.message)); }
}
function newKey() {
  open = { key: '', entry: null, latest: null, tab: 'edit', isDirty: false, isNew: true };
  showTab('edit');
  nodes.detail.querySelector('[name=key]')?.focus();
}
function close() {
  open = null;
  go('state', { prefix });
  nodes.tree.focus();
}
/** The frame of the panel, with `body` in it. */
function pane(...body) {
  const o = open;
  nodes.detail.hidden = false;
  nodes.split.classList.add('two');
  const curl = `curl ${quote(`${location.origin}/v1/state/${encodeURIComponent(o.key)}`)}${curlKey()}`;
  const tab = (name, label) => el('button', { type: 'button', role: 'tab', id: `tab-${name}`, 'aria-selected': String(o.tab === name), onclick: () => showTab(name) }, label);
  const isBytes = o.latest && 'value_base64' in o.latest;
  nodes.detail.replaceChildren(
    el('div', { class: 'pane-head' }, el('h2', { class: 'mono' }, o.isNew ? 'New key' : o.key),
      o.isNew ? null : el('button', { type: 'button', onclick: () => copy(curl, 'Copied as curl') }, 'Copy as curl'),
      el('button', { type: 'button', class: 'ghost', 'aria-label': 'Close', title: 'Close (Esc)', onclick: close }, icon(ICONS.close))),
    o.isNew ? '' : nodes.badges,
    o.isNew ? '' : el('div', { class: 'tabs', role: 'tablist' }, tab('value', 'Value'), o.latest ? writes(tab('edit', 'Edit')) : null, o.latest && !isBytes ? writes(tab('patch', 'Patch')) : null, tab('history', 'History')),
    el('div', { class: 'pane-body' }, body));
  badges();
}
function badges() {
  const o = open, e = o?.latest;
  if (!o || o.isNew) return;
  const facts = !e ? [el('span', { class: 'badge bad' }, o.entry ? 'deleted' : 'no such key')] : [
    el('span', { class: 'badge' }, `revision ${e.revision}`), e.created_revision !== undefined && el('span', { class: 'badge' }, `created at ${e.created_revision}`),
    e.expires_at_ms != null && el('span', { class: number(e.expires_at_ms) - serverNow() < 10_000 ? 'badge bad' : 'badge warn', id: 'deadline' }, `ends in ${endsIn(number(e.expires_at_ms))}`),
    e.meta?.job_id != null && el('a', { class: 'badge', href: `#jobs?${query({ job: e.meta.job_id })}` }, `job ${e.meta.job_id}`),
    ...(e.meta?.tags ?? []).map((t) => el('a', { class: 'badge', href: `#events?${query({ tag: t })}` }, `tag ${t}`)), e.content_type && el('span', { class: 'badge' }, e.content_type)];
  nodes.badges.replaceChildren(...facts.filter(Boolean));
}
const SHOW = { value: showValue, edit: () => showEdit(false), patch: () => showEdit(true), history: showHistory };
function showTab(name) {
  open.tab = name;
  open.isDirty = false;
  SHOW[name]();
}
function hex(raw) {
  const lines = [];
  for (let at = 0; at < Math.min(raw.length, 4096); at += 16) {
    const part = [...raw.subarray(at, at + 16)];
    lines.push(`${at.toString(16).padStart(6, '0')}  ${part.map((b) => b.toString(16).padStart(2, '0')).join(' ').padEnd(47)}  ${part.map((b) => b > 31 && b < 127 ? String.fromCharCode(b) : '·').join('')}`);
  }
  return lines.join('\n') + (raw.length > 4096 ? `\n… ${bytes(raw.length - 4096)} more` : '');
}
function showValue() {
  const e = open.entry = open.latest;
  if (!e) return pane(el('div', { class: 'empty' }, 'There is nothing under this key now. Its history may say why.'));
  const erase = sure(writes(el('button', { type: 'button', class: 'danger', id: 'delete' }, 'Delete')), 'Really delete?', () => attempt(async () => {
    await write({ op: 'delete', key: e.key, if_revision: open.latest?.revision });
    toast(`${e.key} deleted`);
    close();
  }));
  const foot = el('div', { class: 'row foot' }, el('span', { class: 'grow' }), erase);
  const error = el('p', { class: 'error', role: 'alert' });
  open.error = error;
  if ('value_base64' in e) {
    const raw = Uint8Array.from(atob(e.value_base64), (c) => c.charCodeAt(0)), type = e.content_type ?? '';
    const isText = /^text\/|json|xml/.test(type), isPicture = /^image\/(png|jpeg|gif|webp)$/.test(type);
    return pane(isPicture ? el('img', { class: 'picture', alt: e.key, src: `data:${type};base64,${e.value_base64}` }) : el('pre', { class: 'bytes' }, isText ? new TextDecoder().decode(raw) : hex(raw)), el('p', { class: 'soft' }, bytes(raw.length)), error, foot);
  }
  pane(el('div', { class: 'value', id: 'value' }, jsonView(e.value, 3)), error, el('div', { class: 'row foot' }, el('button', { type: 'button', onclick: () => copy(pretty(e.value)) }, 'Copy value'), el('span', { class: 'grow' }), erase));
}
function showEdit(isPatch) {
  const o = open, e = o.entry = o.latest, isBytes = e && 'value_base64' in e;
  const value = el('textarea', { name: 'value', rows: 12, spellcheck: false, value: isPatch ? '{\n  \n}' : o.restored ?? (e && !isBytes ? pretty(e.value) ?? '' : '{}') });
  const ends = el('select', { name: 'ends' }, el('option', { value: 'keep', disabled: !e?.expires_at_ms }, 'as before'), el('option', { value: 'never' }, isPatch ? 'as it is' : 'never'), el('option', { value: 'in' }, 'in … seconds'));
  ends.value = e?.expires_at_ms && !isPatch ? 'keep' : 'never';
  if (isPatch) ends.firstChild.remove();
  const seconds = el('input', { name: 'seconds', inputMode: 'decimal', disabled: true, 'aria-label': 'Seconds' });
  const meta = el('input', { name: 'meta', class: 'mono', placeholder: '{"job_id": "1", "tags": ["a"]}', spellcheck: false, autocomplete: 'off', value: e?.meta ? JSON.stringify(e.meta) : '' });
  const name = o.isNew ? el('label', {}, 'Key ', el('input', { name: 'key', class: 'mono', autocomplete: 'off', spellcheck: false, required: true, value: reachesKey(prefix ?? '') ? prefix ?? '' : limits().prefixes[0] ?? '' })) : null;
  o.error = el('p', { class: 'error', role: 'alert' });
  o.conflict = el('div', { class: 'conflict', id: 'conflict', hidden: true });
  o.note = el('p', { class: 'note', id: 'newer', hidden: true });
  const form = o.form = el('form', { class: 'edit', onsubmit: (event) => { event.preventDefault(); attempt(() => save()); } },
    name, el('label', {}, isPatch ? 'Merge patch: fields to set, null removes one' : isBytes ? 'New value (JSON) in place of the bytes' : 'Value (JSON)', value),
    el('div', { class: 'row' }, el('label', {}, 'Ends ', ends), el('label', { class: 'seconds' }, 'Seconds ', seconds), isPatch ? null : el('label', { class: 'grow' }, 'Labels (JSON) ', meta)),
    o.note, o.conflict, o.error,
    el('div', { class: 'row foot' }, el('button', { class: 'main', id: 'save' }, isPatch ? 'Apply patch' : o.isNew ? 'Create' : 'Save'), el('span', { class: 'soft' }, isPatch ? 'merged inside the commit' : o.isNew ? 'only if it is absent' : `only if it is still revision ${e?.revision ?? 0}`)));
  o.isPatch = isPatch;
  o.restored = undefined;
  form.oninput = () => { o.isDirty = true; seconds.disabled = ends.value !== 'in'; };
  value.onkeydown = (event) => { if (event.key === 'Enter' && (event.ctrlKey || event.metaKey)) form.requestSubmit(); };
  pane(form);
  if (isPatch) { value.focus(); value.setSelectionRange(4, 4); }
}
async function attempt(work) {
  const o = open;
  const buttons = nodes.detail.querySelectorAll('.foot button');
  o.isBusy = true;
  for (const b of buttons) b.disabled = true;
  say(o.error, '');
  try { await work(); } catch (e) {
    if (open !== o) return;
    if (e.code === 'revision_conflict' && o.form) await showConflict();
    else say(o.error, e.code === 'revision_conflict' ? 'Somebody changed it in this moment. Look again.' : e.message);
  } finally { o.isBusy = false; for (const b of buttons) b.disabled = false; }
}
async function save(ifRevision) {
  const o = open, f = o.form.elements, key = o.isNew ? f.key.value : o.key, op = { op: o.isPatch ? 'patch' : 'put', key };
  op[o.isPatch ? 'patch' : 'value'] = field(f.value.value, o.isPatch ? 'The patch' : 'The value');
  if (!o.isPatch) {
    op.if_revision = ifRevision ?? o.entry?.revision ?? 0;
    if (f.meta.value.trim()) op.meta = field(f.meta.value, 'Labels');
    if (f.ends.value === 'keep' && o.entry?.expires_at_ms) op.ttl_ms = Math.max(1, number(o.entry.expires_at_ms) - serverNow());
  }
  if (f.ends.value === 'in') {
    op.ttl_ms = Math.round(Number(f.seconds.value) * 1000);
    if (!(op.ttl_ms > 0)) throw new Error('Say in how many seconds the key ends.');
  }
  const done = await write(op);
  toast(`${key} is revision ${done.revision}`);
  if (open !== o) return;
  if (o.isNew) { open = null; return choose(key); }
  o.latest = await read(key) ?? null;
  if (open === o) showTab('value');
}
/** A lost race: both values side by side, and a choice. */
async function showConflict() {
  const o = open, key = o.isNew ? o.form.elements.key.value : o.key, theirs = await read(key) ?? null;
  if (open !== o) return;
  const mine = el('pre'), other = el('pre');
  try { paint(mine, pretty(exact(o.form.elements.value.value))); } catch { mine.textContent = o.form.elements.value.value; }
  theirs && 'value' in theirs ? paint(other, pretty(theirs.value)) : other.textContent = theirs ? preview(theirs) : '(deleted)';
  const over = el('button', { type: 'button', class: 'danger', onclick: () => { o.conflict.hidden = true; attempt(() => save(theirs?.revision ?? 0)); } }, 'Write mine over it');
  const taken = el('button', { type: 'button', onclick: () => {
    if (!theirs) return close();
    if (o.isNew) { open = null; return choose(key); }
    o.latest = theirs;
    showTab('edit');
  } }, 'Take theirs');
  o.conflict.replaceChildren(el('p', {}, el('b', {}, 'Somebody wrote first. '), `You edited revision ${o.entry?.revision ?? 0}; it is ${theirs?.revision ?? 0} now. Nothing was written.`),
    el('div', { class: 'both' }, el('div', {}, el('h3', {}, 'Yours'), mine), el('div', {}, el('h3', {}, theirs ? `Theirs, revision ${theirs.revision}` : 'Theirs'), other)),
    el('div', { class: 'row' }, taken, over));
  o.conflict.hidden = false;
  o.note.hidden = true;
  if (!o.isNew) { o.latest = theirs; badges(); }
  taken.focus();
}
/** The entry after an event; undefined when that cannot be told from what is known. */
function after(old, ev) {
  const { key, revision, expires_at_ms, meta, prev_revision } = ev, isFirst = number(prev_revision) === 0;
  const entry = { key, revision, created_revision: isFirst ? revision : old?.created_revision, expires_at_ms, meta };
  if ('value_base64' in ev) return { ...entry, value_base64: ev.value_base64, content_type: ev.content_type };
  if (!('patch' in ev)) return { ...entry, value: ev.value };
  if (!isFirst && (old?.revision !== prev_revision || !('value' in old))) return undefined;
  return { ...entry, value: merge(isFirst ? undefined : old.value, ev.patch) };
}
async function changed(ev) {
  const o = open;
  if (o.latest && o.latest.revision >= ev.revision) return;
  if (o.tab === 'history') o.addChange?.(ev);
  const latest = ev.type === 'state_deleted' ? null : after(o.latest, ev);
  if (latest === undefined) return refreshOpen();
  show(latest);
}
async function refreshOpen() {
  const o = open;
  if (o.isNew || !reachesKey(o.key)) return;
  try { const now = await read(o.key) ?? null; if (open === o && now?.revision !== o.latest?.revision) show(now); } catch { /* the stream tells later */ }
}
function show(latest) {
  const o = open;
  o.latest = latest;
  badges();
  if (o.isNew || o.isBusy) return;
  if (o.tab === 'value') return showValue();
  if (o.tab === 'history') return;
  if (!o.conflict.hidden) return;
  if (o.tab === 'edit' && !o.isDirty && latest) return showEdit(false);
  o.note.hidden = false;
  say(o.note, latest ? o.isPatch ? `Revision ${latest.revision} came in. Your patch goes on top of it.` : `Revision ${latest.revision} came in while you edit ${o.entry?.revision ?? 0}. Saving will compare them.` : 'This key was deleted meanwhile.');
}
/** What the log still knows of the key, newest first. */
async function showHistory() {
  const o = open, turn = o.turn = (o.turn ?? 0) + 1, box = el('div', { class: 'timeline', id: 'history' }), info = el('p', { class: 'soft', role: 'status' }, 'Reading the log …');
  pane(info, box);
  const found = [], live = [];
  let from = 0, cut = null;
  o.addChange = (ev) => live.push(ev); // What happens while the log is read.
  const isMine = () => open === o && o.turn === turn && o.tab === 'history';
  try {
    for (;;) {
      let r;
      try { r = await history({ key: o.key, since: from, types: 'state_updated,state_deleted', limit: 1000 }); } catch (e) {
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
      say(info, `Reading the log … ${Math.floor(from / number(r.head) * 100)} %`);
    }
  } catch (e) { return void (isMine() && (info.className = 'error', say(info, e.message))); }
  const last = number(found.at(-1)?.revision ?? 0);
  found.push(...live.filter((ev) => number(ev.revision) > last));
  let count = found.length;
  const tell = () => say(info, `${int(count)} ${count === 1 ? 'change' : 'changes'}${cut ? `; the log begins at revision ${int(cut)}, what was before is gone` : ' since the log begins'}.`);
  tell();
  o.addChange = (ev) => { count++; box.prepend(change(ev)); tell(); };
  const start = (n) => {
    for (const ev of found.slice(Math.max(0, n - 200), n).reverse()) box.append(change(ev));
    if (n > 200) { const older = el('button', { type: 'button', onclick: () => { older.remove(); start(n - 200); } }, `${int(n - 200)} older`); box.append(older); }
  };
  start(found.length);
}
function change(ev) {
  const at = new Date(number(ev.ts) * 1000), isGone = ev.type === 'state_deleted', what = isGone ? ev.reason : number(ev.prev_revision) === 0 ? 'created' : 'patch' in ev ? 'patched' : 'put';
  const told = 'patch' in ev ? ev.patch : ev.value;
  const item = el('details', { class: `change ${isGone ? 'bad' : ''}` }, el('summary', {}, el('i', { class: 'dot' }), el('b', {}, what), el('span', { class: 'mono soft' }, `#${ev.revision}`),
    el('span', { class: 'peek mono' }, isGone ? '' : 'value_base64' in ev ? preview(ev) : JSON.stringify(told).slice(0, PREVIEW)), el('time', { class: 'soft', title: at.toISOString(), dateTime: at.toISOString() }, `${at.toLocaleDateString('en-CA')} ${at.toTimeString().slice(0, 8)}`)));
  item.ontoggle = () => {
    if (!item.open || item.children[1]) return;
    item.append(el('div', { class: 'value' }, jsonView(isGone ? ev : 'value_base64' in ev ? ev.value_base64 : told, 3)));
    if ('value' in ev) item.append(writes(el('button', { type: 'button', onclick: () => {
      open.restored = pretty(ev.value);
      open.latest ? showTab('edit') : (open = { ...open, isNew: true, restored: pretty(ev.value) }, showTab('edit'), nodes.detail.querySelector('[name=key]').value = ev.key);
      open.isDirty = true;
    } }, 'Edit from this value')));
  };
  return item;
}
setInterval(() => {
  if (!nodes || nodes.root.hidden) return;
  if (rows.slice(Math.max(0, list.first), list.last + 1).some((r) => r.expires || Date.now() - r.flash < 2000)) list.refresh();
  if (!prefix) draw();
  if (open?.latest?.expires_at_ms != null) { const left = nodes.badges.querySelector('#deadline'); if (left) say(left, `ends in ${endsIn(number(open.latest.expires_at_ms))}`); }
}, 500);

export const state = {
  title: 'State',
  streams: [stream],
  fresh() {
    prefix = null;
    if (!open?.isDirty) open = null; // What somebody is writing is theirs, whatever the key.
  },
  mount(section, navigate) {
    go = navigate;
    const filter = el('input', { name: 'prefix', class: 'mono', placeholder: 'keys that begin with …', autocomplete: 'off', spellcheck: false, 'aria-label': 'Prefix' });
    filter.oninput = lazily(() => filter.value !== prefix && go('state', { prefix: filter.value }), 200);
    filter.onkeydown = (e) => { if (e.key === 'ArrowDown' || e.key === 'Enter') { e.preventDefault(); nodes.tree.focus(); if (rows.length) list.go(0); } };
    nodes = {
      root: section, filter, info: el('span', { class: 'soft', id: 'state-info', role: 'status' }), error: el('p', { class: 'error', role: 'alert' }), tree: el('div', { class: 'tree', id: 'tree', role: 'tree', 'aria-label': 'Keys' }),
      emptyTitle: el('h2', {}), badges: el('div', { class: 'badges', id: 'badges' }), detail: el('aside', { class: 'card pane', id: 'detail', hidden: true }),
    };
    nodes.newKey = writes(el('button', { type: 'button', id: 'new-key', class: 'main', title: 'n', onclick: newKey }, 'New key'));
    nodes.makeOne = writes(el('button', { type: 'button', class: 'main', onclick: newKey }, 'Make one'));
    nodes.empty = el('div', { class: 'empty', hidden: true }, nodes.emptyTitle, nodes.makeOne);
    nodes.split = el('div', { class: 'split' }, el('div', { class: 'card column tree-card' }, nodes.tree, nodes.empty), nodes.detail);
    section.append(el('div', { class: 'toolbar' }, el('div', { class: 'search' }, icon(ICONS.search), filter), nodes.info, el('span', { class: 'grow' }), nodes.newKey), nodes.error, nodes.split);
    list = new VirtualList(nodes.tree, ROW, { draw: row, sign, onPick: pick, onKey: treeKey });
  },
  show(params) {
    const next = params.get('prefix') ?? '', key = params.get('key'), own = limits()?.prefixes ?? [];
    // A key with limits begins where it may look, except while somebody empties the field to type.
    if (next === '' && own.length && !reachesKey('') && nodes.filter !== document.activeElement) return go('state', { prefix: own.find((p) => key?.startsWith(p)) ?? own[0], key });
    if (nodes.filter !== document.activeElement) nodes.filter.value = next;
    if (next !== prefix) { prefix = next; root = branch('', 0); nodes.tree.scrollTop = 0; list.active = -1; load(); }
    if (key !== null) openKey(key);
    else if (open && !open.isNew) open = null;
    if (!open) { nodes.detail.hidden = true; nodes.split.classList.remove('two'); }
    draw();
  },
  keys: { n: () => nodes.newKey.click(), Escape: () => open && close() },
};
