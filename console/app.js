// The frame: which view is shown, what the connection is like, the key and its reach, colours and the keyboard.
//
// A view is `{title, streams, mount(root), show(params), hide?, fresh?, keys?, onReset?}`. It is mounted once, when first
// opened; its streams run while it is in sight and keep their position when it is not.

import { redraw } from './chart.js';
import { events } from './events.js';
import { jobs } from './jobs.js';
import { granted, learn, limits, lockAll, mayWrite } from './key.js';
import { el, forgetColors, icon, ICONS, int, query, say } from './lib.js';
import { overview } from './overview.js';
import { Stream, hasKey, onKeyNeeded, setKey } from './server.js';
import { state } from './state.js';
import { vectors } from './vectors.js';

const $ = (id) => document.getElementById(id);
const views = { overview, state, events, vectors, jobs };
const sections = {},
  tabs = {};
let view = null;

// ---- Views ------------------------------------------------------------------------------------------------------------
for (const [name, { title }] of Object.entries(views)) {
  const tab = (tabs[name] = Object.assign(document.createElement('a'), { href: `#${name}`, textContent: title }));
  const section = (sections[name] = Object.assign(document.createElement('section'), { id: `view-${name}`, hidden: true }));
  section.setAttribute('aria-label', title);
  $('tabs').append(tab);
  $('main').append(section);
}
/** Shows a view; its parameters stand in the address, so that a reload and a bookmark find the same place. */
export function go(name, params = {}) {
  const q = query(params);
  history.replaceState(null, '', `#${name}${q ? `?${q}` : ''}`);
  route();
}
function route() {
  const [name, q = ''] = location.hash.slice(1).split('?');
  const wanted = Object.hasOwn(views, name) ? name : 'overview';
  if (view && view !== wanted) {
    views[view].hide?.();
    scrollTo(0, 0);
  }
  view = wanted;
  document.title = `${views[view].title} · KISS VDB`;
  for (const [other, tab] of Object.entries(tabs)) {
    other === view ? tab.setAttribute('aria-current', 'page') : tab.removeAttribute('aria-current');
    sections[other].hidden = other !== view;
  }
  // Coming back to a view finds it as it was left.
  tabs[view].href = location.hash || '#overview';
  if (!sections[view].hasChildNodes()) views[view].mount(sections[view], go);
  views[view].show(new URLSearchParams(q));
  showReach();
  sync();
}
addEventListener('hashchange', route);

// ---- The connection ---------------------------------------------------------------------------------------------------
// A filter that matches nothing, and a heartbeat each second that carries the newest revision: what it costs does not grow
// with what the server does. While this stream stands, what is shown is true; when it does not, the page says so.
let head = null,
  lostAt = null,
  refusal = '',
  link = 'connecting';
function setHead(n, isReset = false) {
  if (!Number.isSafeInteger(n) || (!isReset && head !== null && n <= head)) return;
  head = n;
  say($('head'), int(n));
}
const pulse = new Stream({
  heartbeat: 1000,
  onFrame(f) {
    if (f.type === 'reset') {
      setHead(JSON.parse(f.data).head, true);
    } else setHead(Number(f.id));
  },
  onStatus(status, message = '') {
    refusal = status === 'stopped' ? message : '';
    const isUp = status === 'connected';
    document.body.dataset.link = status === 'connecting' && lostAt !== null ? 'reconnecting' : status;
    link = isUp ? 'live' : refusal ? 'refused' : document.hidden ? 'asleep' : lostAt === null ? 'connecting' : 'reconnecting';
    if (isUp) {
      if (lostAt !== null) overview.poll();
      lostAt = null;
      $('auth').close();
      learn().then((isOther) => isOther && renew()); // A change of what the key may do ends its streams.
    } else if (status === 'reconnecting') lostAt ??= new Date();
    banner();
  },
});
pulse.path = '/v1/events?types=console.pulse';
function banner() {
  const isAway = lostAt !== null && !document.hidden;
  // While the page's own stream stands, the one of the view may be refused: then what the view shows grows old.
  const stalled = isAway || refusal || !view ? undefined : views[view].streams.find((s) => s.isFailing);
  $('banner').hidden = !isAway && !refusal && !stalled;
  say($('pill-text'), stalled ? 'not live' : link);
  $('pill').classList.toggle('stalled', Boolean(stalled));
  say($('hurry'), refusal ? (hasKey() ? 'Use another key' : 'Give a key') : 'Try now');
  if (refusal) say($('banner-text'), refusal);
  else if (isAway || stalled) {
    const { retryAt, trouble } = stalled ?? pulse,
      wait = Math.ceil((retryAt - Date.now()) / 1000);
    const why = trouble ? `The server opens no stream: ${trouble}.` : 'The server does not answer.';
    say(
      $('banner-text'),
      `${why} What you see is ${stalled ? 'not kept up to date' : `from ${lostAt.toTimeString().slice(0, 8)}`}. ${wait > 0 ? `Next try in ${wait} s.` : 'Trying …'}`,
    );
  }
}
setInterval(banner, 500);
$('hurry').onclick = () => {
  if (refusal) return askKey('');
  for (const stream of [pulse, ...views[view].streams]) stream.hurry();
};
/** A hidden tab lets go of its connections, of which a browser has few, and resumes where it was. */
function sync() {
  const isOn = !document.hidden;
  pulse.run(isOn);
  for (const [name, { streams }] of Object.entries(views))
    for (const stream of streams) stream.run(isOn && name === view && !stream.isHeld);
}
document.addEventListener('visibilitychange', () => {
  sync();
  if (!document.hidden) overview.poll();
});
setInterval(() => {
  if (!document.hidden && document.body.dataset.link === 'connected') overview.poll();
}, 1000);

// ---- The key ----------------------------------------------------------------------------------------------------------
function askKey(why, title = 'This server asks for a key') {
  if ($('auth').open) return;
  say($('auth-title'), title);
  say($('auth-error'), why);
  $('auth').showModal();
}
onKeyNeeded.call = (why) => askKey(why);
$('auth').querySelector('form').onsubmit = (e) => {
  e.preventDefault();
  setKey(e.target.elements.key.value.trim());
  e.target.reset();
  $('auth').close();
  pulse.stop();
  learn().then(renew);
};
$('auth-cancel').onclick = () => $('auth').close();
$('key').prepend(icon(ICONS.key));
$('key').onclick = () => askKey('', 'Use another key');
/** Under another key nothing of what the one before has shown stays. */
function renew() {
  for (const stream of [pulse, ...Object.values(views).flatMap((v) => v.streams)]) stream.stop();
  for (const each of Object.values(views)) each.fresh?.();
  for (const [name, tab] of Object.entries(tabs)) tab.href = `#${name}`;
  lockAll();
  route();
  overview.poll();
}
/** A line about a key that may not do everything, with a way to each of its places. */
function showReach() {
  const key = granted(),
    own = limits(),
    name = key?.name ?? '',
    words = mayWrite()
      ? own
        ? 'reads and writes'
        : 'reads and writes everything'
      : own
        ? 'only reads'
        : 'reads everything and writes nothing';
  $('key').hidden = !hasKey();
  say($('key').lastChild, name);
  $('key').title = `${key ? `The key ${name} ${words}. ` : ''}Use another key`;
  $('reach').hidden = !key || (mayWrite() && !own);
  if ($('reach').hidden) return;
  const place = (target, word, text) =>
    el('a', { class: 'chip', href: `#${target}` }, el('span', { class: 'soft' }, word), ' ', el('span', { class: 'mono' }, text));
  const forKeys = view === 'events' || view === 'jobs' ? view : 'state',
    forCollections = view === 'events' ? view : 'vectors';
  $('reach').replaceChildren(
    el('span', {}, 'The key ', el('b', {}, name), ` ${words}${own ? ':' : '.'}`),
    el(
      'span',
      { class: 'chips' },
      own?.prefixes.map((p) => place(`${forKeys}?${query({ prefix: p })}`, 'keys', `${p}…`)) ?? [],
      own?.collections.map((c) =>
        c === '*' ? place('vectors', 'all', 'collections') : place(`${forCollections}?${query({ collection: c })}`, 'collection', c),
      ) ?? [],
      own && !own.prefixes.length && !own.collections.length
        ? el('span', { class: 'soft' }, 'nothing: neither keys nor collections are named in it')
        : null,
    ),
  );
}

// ---- Colours ----------------------------------------------------------------------------------------------------------
const THEMES = { auto: '◐', light: '☀', dark: '☾' },
  THEME = 'kiss-vdb-theme';
function theme(name) {
  if (name === 'auto') {
    delete document.documentElement.dataset.theme;
    localStorage.removeItem(THEME);
  } else {
    document.documentElement.dataset.theme = name;
    localStorage.setItem(THEME, name);
  }
  say($('theme'), THEMES[name]);
  $('theme').title = `Colours: ${name === 'auto' ? 'as the system' : name} (t)`;
  repaint();
}
function repaint() {
  forgetColors();
  redraw();
  vectors.redraw();
}
const nextTheme = () => {
  const names = Object.keys(THEMES);
  theme(names[(names.indexOf(document.documentElement.dataset.theme ?? 'auto') + 1) % names.length]);
};
$('theme').onclick = nextTheme;
matchMedia('(prefers-color-scheme: dark)').addEventListener('change', repaint);

// ---- The keyboard -----------------------------------------------------------------------------------------------------
$('help').onclick = () => $('shortcuts').showModal();
for (const link of $('shortcuts').querySelectorAll('a')) link.onclick = () => $('shortcuts').close();
addEventListener('keydown', (e) => {
  if (document.querySelector('dialog[open]')) return;
  if (e.key === 'Escape' && views[view].keys?.Escape) return void views[view].keys.Escape();
  if (e.ctrlKey || e.metaKey || e.altKey || e.target.closest('input, textarea, select')) return;
  const tab = /^[1-5]$/.test(e.key) && Object.values(tabs)[e.key - 1];
  const act = tab
    ? () => tab.click()
    : e.key === '/'
      ? () => sections[view].querySelector('input:not([type=checkbox], [hidden])')?.select()
      : e.key === '?'
        ? () => $('shortcuts').showModal()
        : e.key === 't'
          ? nextTheme
          : views[view].keys?.[e.key];
  if (act) {
    e.preventDefault();
    act();
  }
});

theme(document.documentElement.dataset.theme ?? 'auto');
// Views begin where the key may look.
learn().then(() => {
  route();
  overview.poll();
});
