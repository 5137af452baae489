// The keys as a tree by prefix, as far as it was read: no page and no network here.
//
// A branch is what stands before the next ":" or "/". Its children come page by page; a branch that is longer than a page is
// stepped over, so the first level of a million keys costs a request for each branch and not a thousand pages. What a page
// knew already when an event arrives is told by its revision.

import { byBytes, number } from './lib.js';

const LAST = '\u{10ffff}\u{10ffff}'; // After every key of a branch.
const SEPARATOR = /[:/]/;

// `sort` orders branches and keys alike. `after` is the name from which the next page goes on. `isMore`: a page ended in the
// branch, so `count` is the least there is; `isDoubtful`: of such a one something went since, so that may be less, or none at all.
const branch = (prefix, depth, count = 0, asOf = 0) => ({
  sort: prefix,
  prefix,
  depth,
  count,
  asOf,
  children: [],
  after: null,
  isOpen: false,
  isDone: false,
  isMore: false,
  isDoubtful: false,
  isLoading: false,
  error: '',
  timer: 0,
});
const leaf = (e, depth) => ({
  sort: e.key,
  key: e.key,
  depth,
  revision: number(e.revision),
  created: e.created_revision,
  expires: number(e.expires_at_ms),
  meta: e.meta,
  preview: undefined,
  flash: 0,
});

/** Where `sort` is, or would be, among children that are in order. */
function place(children, sort) {
  let low = 0,
    high = children.length;
  while (low < high) {
    const mid = (low + high) >> 1;
    if (byBytes(children[mid].sort, sort) < 0) low = mid + 1;
    else high = mid;
  }
  return low;
}

/** Where the name of the branch ends that a key belongs to, among the children of a prefix; -1 for none. */
function separatorIn(prefix, key) {
  const at = key.slice(prefix.length).search(SEPARATOR);
  return at < 0 ? -1 : prefix.length + at + 1;
}

/** The child that is, or leads to, a key or prefix. */
function childTowards(b, name) {
  const end = separatorIn(b.prefix, name);
  if (end < 0) return undefined;
  const child = b.children[place(b.children, name.slice(0, end))];
  return child?.prefix === name.slice(0, end) ? child : undefined;
}

export class Tree {
  /** All keys that begin with `prefix`; `preview` makes a row's text of an event. */
  constructor(prefix, depth, preview) {
    this.root = branch(prefix, depth);
    this.preview = preview;
  }

  /** Sorts a page into a branch. Returns how many children it brought. */
  take(b, { items, next_cursor: next, revision }) {
    const asOf = number(revision),
      fresh = [];
    let group = null;
    for (const e of items) {
      const end = separatorIn(b.prefix, e.key);
      if (end < 0) {
        group = null;
        fresh.push(leaf(e, b.depth + 1));
        continue;
      }
      const prefix = e.key.slice(0, end);
      if (group?.prefix !== prefix) {
        group = Object.assign(branch(prefix, b.depth + 1, 0, asOf), { only: e });
        fresh.push(group);
      }
      group.count++;
    }
    b.isDone = next === null;
    b.after = items.at(-1)?.key ?? b.after;
    if (group && !b.isDone && fresh.at(-1) === group) {
      group.isMore = true;
      b.after = group.prefix + LAST;
    }
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

  /** The branches that lead to a prefix, its own the last; none when it is not in the tree. */
  trailTo(wanted) {
    const trail = [];
    for (let b = this.root; b.prefix !== wanted;) {
      b = childTowards(b, wanted);
      if (!b) return [];
      trail.push(b);
    }
    return trail;
  }

  /** The branch that a row stands in: the longest open one that leads to it. */
  parentOf(row) {
    for (let b = this.root; ;) {
      const inside = childTowards(b, row.key ?? row.prefix);
      if (!inside?.isOpen || inside === row) return b;
      b = inside;
    }
  }

  /** After a branch was read to its end, or counted anew: from there on it and those above are as many as what is in them. */
  settle(b) {
    const trail = this.trailTo(b.prefix);
    for (const up of trail.toReversed()) {
      if (!up.isDone) continue;
      up.count = up.children.reduce((n, c) => n + (c.prefix === undefined ? 1 : c.count), 0);
      up.isMore = up.children.some((c) => c.isMore);
      up.asOf = 0; // What changes its children changes its count, and nothing else does.
    }
    this.#prune(trail);
  }

  /** The rows in sight order: a branch, then what is in it. A branch that has more ends in a row that loads it. */
  rows(b = this.root, into = []) {
    for (const child of b.children) {
      into.push(child);
      if (child.isOpen) this.rows(child, into);
    }
    if (!b.isDone) into.push({ loads: b, depth: b.depth + 1, sort: '' });
    return into;
  }

  /** Takes in an event about a key. */
  apply(ev) {
    const key = ev.key,
      revision = number(ev.revision),
      trail = [];
    const isGone = ev.type === 'state_deleted',
      isNew = !isGone && number(ev.prev_revision) === 0;
    const change = isNew ? 1 : isGone ? -1 : 0;
    const count = (branches) => {
      for (const up of branches) if (revision > up.asOf) up.count += change;
    };
    for (let b = this.root; ;) {
      const at = place(b.children, key),
        known = b.children[at];
      if (known?.key === key) return this.#change(b, at, ev, trail);
      const inside = childTowards(b, key);
      if (!inside) return this.#add(b, ev, trail, count);
      inside.flash = Date.now();
      trail.push(inside);
      if (inside.isOpen || inside.children.length) {
        b = inside;
        continue;
      }
      if (inside.isMore && isGone && revision > inside.asOf) inside.isDoubtful = true;
      if (revision > inside.asOf && !inside.isMore) {
        inside.count += change;
        count(trail.slice(0, -1));
        this.#prune(trail);
      }
      return;
    }
  }

  /** An event about a key that is in the tree as itself. */
  #change(b, at, ev, trail) {
    const known = b.children[at],
      revision = number(ev.revision);
    if (known.revision >= revision) return;
    if (ev.type === 'state_deleted') {
      b.children.splice(at, 1);
      for (const up of trail) if (revision > up.asOf) up.count--;
      this.#prune(trail);
      return;
    }
    Object.assign(known, { revision, expires: number(ev.expires_at_ms), meta: ev.meta, flash: Date.now() });
    if ('value' in ev || 'value_base64' in ev) Object.assign(known, { preview: this.preview(ev), isStale: false });
    else known.isStale = true;
  }

  /** An event about a key that is not in the tree. */
  #add(b, ev, trail, count) {
    const key = ev.key,
      isGone = ev.type === 'state_deleted';
    if (isGone || (!b.isDone && (b.after === null || byBytes(key, b.after) > 0))) return; // Not read yet: the page will have it.
    if (number(ev.prev_revision) === 0) count(trail);
    const end = separatorIn(b.prefix, key),
      prefix = end < 0 ? null : key.slice(0, end);
    const twin = prefix === null ? -1 : b.children.findIndex((c) => c.key?.startsWith(prefix));
    if (twin >= 0) {
      // A second key of a branch that was one key makes it a branch.
      const both = Object.assign(branch(prefix, b.depth + 1, 2, number(ev.revision)), { flash: Date.now() });
      b.children.splice(twin, 1);
      b.children.splice(place(b.children, prefix), 0, both);
      return;
    }
    const mine = Object.assign(leaf({ ...ev, created_revision: ev.revision }, b.depth + 1), { flash: Date.now() });
    if ('value' in ev || 'value_base64' in ev) mine.preview = this.preview(ev);
    b.children.splice(place(b.children, key), 0, mine);
  }

  /** Branches that became empty go. */
  #prune(trail) {
    for (let i = trail.length - 1; i >= 0; i--) {
      const b = trail[i],
        up = trail[i - 1] ?? this.root;
      if (b.count > 0 || b.isMore || b.children.length) return;
      up.children.splice(up.children.indexOf(b), 1);
    }
  }
}
