// Small things every view uses: elements, words for numbers, JSON as it was sent.

/**
 * An element. Text becomes text nodes, never markup: what is stored here is written by strangers, and nothing in this
 * console ever goes through innerHTML.
 */
export function el(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (value === undefined) continue;
    if (name in node) node[name] = value;
    else node.setAttribute(name, value);
  }
  node.append(...children.flat().filter((c) => c != null && c !== false));
  return node;
}

/** The beginning of a text, as a part of one row. */
export const brief = (text) => visible(text.slice(0, 300).replace(/\s+/g, ' '));
/** A name with what would not be seen, or would turn its letters round, written out. */
export const visible = (name) =>
  name.replace(
    /[\u0000-\u001f\u007f-\u009f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]/g,
    (c) => `\\u${c.charCodeAt(0).toString(16).padStart(4, '0')}`,
  );

const SVG = 'http://www.w3.org/2000/svg';
/** A line icon from one path, 16 by 16. */
export function icon(path) {
  const svg = document.createElementNS(SVG, 'svg');
  svg.setAttribute('viewBox', '0 0 16 16');
  svg.setAttribute('class', 'icon');
  svg.setAttribute('aria-hidden', 'true');
  const line = document.createElementNS(SVG, 'path');
  line.setAttribute('d', path);
  svg.append(line);
  return svg;
}
export const ICONS = {
  close: 'M4 4l8 8M12 4l-8 8',
  plus: 'M8 3v10M3 8h10',
  right: 'M6 4l4 4-4 4',
  copy: 'M5.5 5.5h7v7h-7zM3.5 10.5v-7h7',
  pause: 'M5.5 4v8M10.5 4v8',
  play: 'M5 3.5l7.5 4.5L5 12.5z',
  trash: 'M3.5 4.5h9M6 4V2.5h4V4M5 4.5l.5 9h5l.5-9',
  key: 'M10 2.5a3.5 3.5 0 1 0 0 7a3.5 3.5 0 0 0 0-7zM7.5 8.5l-5 5M4 12l1.5 1.5',
  search: 'M7 2.5a4.5 4.5 0 1 0 0 9a4.5 4.5 0 0 0 0-9zM10.5 10.5l3 3',
};

/** Sets the text of a node only when it changes, so that selections and screen readers are left in peace. */
export function say(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

/** Whether text in a node is selected, if only a part: then it is read or about to be copied, and is left as it is. */
export const isSelected = (node) => {
  const s = getSelection();
  return s.type === 'Range' && s.containsNode(node, true);
};

/** Makes the children of a node these, and moves none that is in its place: what is moved loses focus, selection and press. */
export function arrange(node, children) {
  const wanted = new Set(children);
  for (const there of [...node.children]) if (!wanted.has(there)) there.remove();
  children.forEach((child, i) => {
    if (node.children[i] !== child) node.insertBefore(child, node.children[i] ?? null);
  });
}

export const int = (n) => (n == null || Number.isNaN(n) ? '–' : Math.round(n).toLocaleString('en'));
/** So many of something. */
export const many = (n, word) => `${int(n)} ${word}${n === 1 ? '' : 's'}`;
/** A rate: short, with a decimal where it matters. */
export const rate = (n) => (n == null ? '–' : n < 9.95 ? n.toFixed(n > 0.04 ? 1 : 0) : n < 99_950 ? int(n) : `${(n / 1000).toFixed(0)}k`);
/** Bytes that a text in base64 stands for. */
export const sizeOf = (base64) => (base64.length * 3) / 4 - (base64.match(/=*$/)?.[0].length ?? 0);

export function bytes(n) {
  if (n == null || Number.isNaN(n)) return '–';
  let unit = 0;
  while (n >= 1024 && unit < 4) {
    n /= 1024;
    unit++;
  }
  return `${n >= 100 || unit === 0 ? Math.round(n) : n.toFixed(1)} ${['B', 'KiB', 'MiB', 'GiB', 'TiB'][unit]}`;
}
export function duration(seconds) {
  const s = Math.max(0, Math.floor(seconds)),
    d = Math.floor(s / 86400),
    h = Math.floor(s / 3600) % 24,
    m = Math.floor(s / 60) % 60;
  return d ? `${d}d ${h}h` : h ? `${h}h ${m}m` : m ? `${m}m ${s % 60}s` : `${s}s`;
}
/** Seconds as µs, ms or s. */
export function latency(s) {
  if (s == null) return '–';
  const [n, unit] = s < 1e-3 ? [s * 1e6, 'µs'] : s < 1 ? [s * 1e3, 'ms'] : [s, 's'];
  return `${n < 9.95 && unit !== 'µs' ? n.toFixed(1) : Math.round(n)} ${unit}`;
}
/** Time of day with milliseconds. */
export const clock = (date) => `${date.toTimeString().slice(0, 8)}.${String(date.getMilliseconds()).padStart(3, '0')}`;

/** JSON whose number literals survive: what a double or its text would change stays as it was sent. */
export const exact = (text) =>
  JSON.parse(text, (_, v, context) =>
    typeof v === 'number' && JSON.rawJSON && context?.source && String(v) !== context.source ? JSON.rawJSON(context.source) : v,
  );
export const number = (v) => (typeof v === 'object' && v ? Number(v.rawJSON) : v);
const isRaw = (v) => Boolean(JSON.isRawJSON?.(v));
export const isObject = (v) => typeof v === 'object' && v !== null && !Array.isArray(v) && !isRaw(v);
export const pretty = (v) => JSON.stringify(v, null, 2);
/** Reads a field that people type JSON into. */
export function field(text, name) {
  try {
    return exact(text);
  } catch (e) {
    throw new Error(`${name} is not JSON: ${e.message}`);
  }
}
/** A query string; absent and empty values are left out, lists repeat. */
export function query(params) {
  const q = new URLSearchParams();
  for (const [name, value] of Object.entries(params)) for (const v of [value].flat()) if (v !== '' && v != null) q.append(name, v);
  return q.toString();
}
/** The order of the server: by UTF-8 bytes, which is by code points; UTF-16 differs where surrogates meet U+E000 to U+FFFF. */
export function byBytes(a, b) {
  const end = Math.min(a.length, b.length);
  for (let i = 0; i < end; i++) {
    const x = a.charCodeAt(i),
      y = b.charCodeAt(i);
    if (x === y) continue;
    const isPaired = x >= 0xd800 && x < 0xe000,
      isPairedToo = y >= 0xd800 && y < 0xe000;
    if (isPaired === isPairedToo) return x - y;
    return isPaired ? 1 : -1; // Beyond U+FFFF comes after all that needs no pair.
  }
  return a.length - b.length;
}
/** RFC 7396. By entries, so that a field named __proto__ is only a field. */
export function merge(target, patch) {
  if (!isObject(patch)) return patch;
  const out = new Map(isObject(target) ? Object.entries(target) : []);
  for (const [k, v] of Object.entries(patch)) v === null ? out.delete(k) : out.set(k, merge(out.get(k), v));
  return Object.fromEntries(out);
}

/** Runs `work` soon, once, however often it is asked for. */
export function lazily(work, ms) {
  let timer = 0;
  return () => {
    timer ||= setTimeout(() => {
      timer = 0;
      work();
    }, ms);
  };
}

/** Shows JSON text in colour, as text nodes. */
export function paint(pre, text) {
  pre.textContent = '';
  if (text.length > 40_000) return void (pre.textContent = text);
  let at = 0;
  for (const m of text.matchAll(/("(?:\\.|[^"\\])*")(\s*:)?|\b(?:true|false|null)\b|-?\d[\d.eE+-]*/g)) {
    pre.append(
      text.slice(at, m.index),
      el('span', { class: m[2] ? 'k' : m[1] ? 's' : /^[tfn]/.test(m[0]) ? 'w' : 'n' }, m[1] ?? m[0]),
      m[2] ?? '',
    );
    at = m.index + m[0].length;
  }
  pre.append(text.slice(at));
}

const CHILDREN = 200,
  LONG = 2000;
function words(v) {
  const text = JSON.stringify(v);
  if (text.length <= LONG) return [el('span', { class: 's' }, text)];
  const span = el('span', { class: 's' }, `${text.slice(0, LONG)}…`);
  const all = el(
    'button',
    {
      type: 'button',
      class: 'link',
      onclick: () => {
        span.textContent = text;
        all.remove();
      },
    },
    ` show all ${int(text.length)} characters`,
  );
  return [span, all];
}
/**
 * JSON as a tree that folds. A level is built when it is opened and in slices, so that neither depth nor size of a stored
 * value can hold the page up.
 */
export function jsonView(value, levels = 2, name) {
  const label =
    name === undefined ? [] : [el('span', { class: 'k' }, typeof name === 'number' ? String(name) : JSON.stringify(name)), ': '];
  const node = isFolded(value) ? folded(value, levels, label) : el('div', { class: 'json' }, label, scalar(value));
  return Object.assign(node, { shown: value, called: name, levels });
}
const isFolded = (v) => typeof v === 'object' && v !== null && !isRaw(v) && (Array.isArray(v) ? v.length : Object.keys(v).length) > 0;
function scalar(v) {
  if (typeof v === 'object' && v !== null && !isRaw(v)) return [Array.isArray(v) ? '[]' : '{}'];
  return typeof v === 'string' ? words(v) : [el('span', { class: typeof v === 'boolean' || v === null ? 'w' : 'n' }, JSON.stringify(v))];
}
/** An object or a list; `take(value)` shows another one in it. */
function folded(value, levels, label) {
  const sum = el('span', { class: 'soft' }),
    box = el('details', { class: 'json' }, el('summary', {}, label, sum)),
    inside = el('div');
  const more = el('button', {
    type: 'button',
    class: 'link',
    onclick: () => {
      reach += CHILDREN;
      draw();
    },
  });
  let reach = 0; // How many of its children are wanted; none until it is opened.
  const draw = () => {
    const isList = Array.isArray(value),
      names = isList ? null : Object.keys(value),
      size = isList ? value.length : names.length;
    say(sum, isList ? `[ ${int(size)} ]` : `{ ${int(size)} }`);
    if (!reach) return;
    const known = new Map([...inside.children].map((child) => [child.called, child]));
    arrange(
      inside,
      Array.from({ length: Math.min(size, reach) }, (_, i) => {
        const name = isList ? i : names[i],
          child = known.get(name);
        return child ? jsonUpdate(child, value[name]) : jsonView(value[name], levels - 1, name);
      }),
    );
    say(more, `${int(size - reach)} more`);
    if (reach >= size) more.remove();
    else if (more.parentNode !== box) box.append(more);
  };
  box.take = (next) => {
    value = next;
    draw();
  };
  const open = () => {
    if (!reach) {
      reach = CHILDREN;
      box.append(inside);
      draw();
    }
  };
  box.ontoggle = () => box.open && open();
  if (levels > 0 && (Array.isArray(value) ? value : Object.keys(value)).length <= 100) {
    box.open = true;
    open();
  }
  draw();
  return box;
}
/**
 * Shows another value in a view that is there and touches only what differs, so that what is open stays open and what has
 * the focus keeps it. Returns the view, which is another one when the kind of the value is another.
 */
export function jsonUpdate(node, value) {
  if (value === node.shown) return node;
  if (node.take && isFolded(value) && Array.isArray(value) === Array.isArray(node.shown)) node.take(value);
  else if (node.take || isFolded(value) || JSON.stringify(value) !== JSON.stringify(node.shown)) {
    const other = jsonView(value, node.levels, node.called);
    node.replaceWith(other);
    return other;
  }
  node.shown = value;
  return node;
}

/** A button that asks once more before it acts. */
export function sure(button, question, act) {
  const label = button.textContent;
  let timer = 0;
  const calm = () => {
    clearTimeout(timer);
    timer = 0;
    button.textContent = label;
    button.classList.remove('asking');
  };
  button.onclick = () => {
    if (timer) {
      calm();
      return act();
    }
    button.textContent = question;
    button.classList.add('asking');
    timer = setTimeout(calm, 4000);
  };
  return button;
}

/** A word at the edge of the page that goes by itself. */
export function toast(text, isBad = false) {
  const box = document.getElementById('toasts'),
    note = el('div', { class: isBad ? 'toast bad' : 'toast' }, text);
  box.append(note);
  while (box.children.length > 3) box.firstChild.remove();
  setTimeout(() => note.remove(), isBad ? 8000 : 3000);
}

/** Copies text; where the browser does not let us, as over plain HTTP, shows it to be copied by hand until it is put away. */
export async function copy(text, done = 'Copied') {
  try {
    await navigator.clipboard.writeText(text);
    toast(done);
  } catch {
    document.getElementById('by-hand')?.remove();
    const field = el('textarea', { readOnly: true, rows: 6, spellcheck: false, value: text, 'aria-label': 'To be copied' });
    const box = el(
      'div',
      { class: 'by-hand card', id: 'by-hand' },
      el('p', {}, 'The browser does not let this page copy. It is selected here: Ctrl C.'),
      field,
      el('div', { class: 'row end' }, el('button', { type: 'button', onclick: () => box.remove() }, 'Close')),
    );
    box.onkeydown = (e) => {
      if (e.key === 'Escape') {
        e.stopPropagation();
        box.remove();
      }
    };
    document.getElementById('toasts').before(box);
    field.select();
  }
}
/** For a POSIX shell. */
export const quote = (text) => `'${text.replaceAll("'", `'\\''`)}'`;

const known = new Map();
/** A colour of the style sheet as a canvas understands it; `light-dark()` is only resolved on an element. */
export function color(name) {
  let found = known.get(name);
  if (!found) {
    const probe = document.body.appendChild(el('i', { hidden: true }));
    probe.style.color = `var(${name})`;
    known.set(name, (found = getComputedStyle(probe).color));
    probe.remove();
  }
  return found;
}
/** After a change between light and dark. */
export const forgetColors = () => known.clear();
