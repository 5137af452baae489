// Vectors: the collections, searches with the approximate answer beside the exact one, and a map of a sample.

import {
  arrange,
  brief,
  bytes,
  copy,
  el,
  field,
  icon,
  ICONS,
  int,
  isObject,
  jsonView,
  lazily,
  many,
  number,
  query,
  say,
  sure,
  toast,
  visible,
} from './lib.js';
import { collectionsWords, limits, reachesCollection, writes } from './key.js';
import { VectorMap, pca, project } from './map.js';
import { Stream, get, getText, post, remove } from './server.js';

const SAMPLE_NUMBERS = 600_000,
  SAMPLE_MIN = 150,
  SAMPLE_MAX = 1500; // Vectors on the map: so many numbers are read for it.
const CHANGES = 'vector_added,vector_updated,vector_deleted,collection_created,collection_deleted';
const COLORS = 7; // One more stands for all the rest.
const path = (name, rest = '') => `/v1/vector/${encodeURIComponent(name)}${rest}`;

let collections = [],
  name = null,
  nodes = null,
  go = () => {},
  base = null,
  sampled = null,
  turn = 0,
  changed = new Set(),
  lastHits = null,
  colorBy = null,
  isRead = false;
const info = () => collections.find((c) => c.collection === name);

const stream = new Stream({
  onFrame(f) {
    if (f.type === 'reset') {
      refresh();
      return void sample();
    }
    if (!f.type) return;
    const ev = JSON.parse(f.data);
    if (ev.collection === name && ev.id !== undefined) {
      if (f.type === 'vector_deleted') {
        changed.delete(ev.id);
        map.points.delete(ev.id);
        map.draw();
      } else if (changed.size < 50) changed.add(ev.id);
      place();
    }
    if (f.type === 'collection_deleted' && ev.collection === name) {
      map.points.clear();
      map.light([], null);
      base = null;
    }
    refresh();
  },
  onStatus(status, message) {
    if (nodes && message) say(nodes.error, message);
    if (status === 'connected' && nodes) refresh();
  },
});
stream.path = `/v1/events?types=${CHANGES}`;
const map = new VectorMap({ onPick: (id) => searchBy(id) });

// ---- The collections ------------------------------------------------------------------------------------------------------
const refresh = lazily(async () => {
  if (!nodes || nodes.root.hidden) return;
  try {
    collections = (await get('/v1/vector')).collections;
    isRead = true;
    say(nodes.error, '');
    draw();
    // How far the graphs are is in no stream: asked for while there is something to wait for.
    if (collections.some((c) => c.index.pending > 0)) setTimeout(refresh, 800);
    if (name !== null && info() && sampled !== name) sample();
  } catch (e) {
    say(nodes.error, e.message);
    if (e.isAway) setTimeout(refresh, 2000); // Its stream may stand all the time, and then says nothing of it.
  }
}, 250);
function draw() {
  if (name === null && collections.length) return go('vectors', { collection: collections[0].collection });
  const known = new Map([...nodes.list.children].map((b) => [b.dataset.collection, b]));
  arrange(
    nodes.list,
    collections.map((c) => tile(c, known.get(c.collection))),
  );
  const c = info();
  nodes.none.hidden = !isRead || collections.length > 0;
  say(nodes.noneTitle, limits()?.collections.length === 0 ? collectionsWords() : 'No collections yet.');
  nodes.body.hidden = !c;
  say(nodes.goneTitle, name !== null && !reachesCollection(name) ? collectionsWords() : 'There is no such collection.');
  nodes.gone.hidden = !collections.length || Boolean(c) || name === null;
  if (!c) return;
  say(nodes.title, visible(c.collection));
  say(
    nodes.facts,
    `${many(number(c.count), 'vector')} · ${c.dim} numbers each · ${c.metric} · ${c.index.kind === 'exact' ? 'every search looks at all' : `graph, ${int(number(c.index.indexed))} linked${c.index.pending > 0 ? `, ${int(number(c.index.pending))} pending` : ''}`} · ${bytes(number(c.memory_bytes))} · revision ${c.revision}`,
  );
}
/** The button of a collection. One that is there is kept: replaced between press and release it would not hear the click. */
function tile(c, button) {
  if (!button) {
    const part = {
      count: el('span', { class: 'big-number' }),
      kind: el('span', { class: 'soft' }),
      fill: el('i'),
      index: el('span'),
      size: el('span'),
    };
    part.bar = el('span', { class: 'progress thin' }, part.fill);
    button = Object.assign(
      el(
        'button',
        {
          type: 'button',
          class: 'collection',
          'data-collection': c.collection,
          onclick: () => go('vectors', { collection: c.collection }),
        },
        el('b', { class: 'mono' }, visible(c.collection)),
        part.count,
        part.kind,
        part.bar,
        el('span', { class: 'soft spread' }, part.index, part.size),
      ),
      { parts: part },
    );
  }
  const part = button.parts,
    indexed = number(c.index.indexed),
    pending = number(c.index.pending);
  button.classList.toggle('open', c.collection === name);
  button.setAttribute('aria-pressed', String(c.collection === name));
  say(part.count, int(number(c.count)));
  say(part.kind, `${c.dim} × ${c.metric}`);
  say(part.index, c.index.kind === 'graph' ? (pending > 0 ? `linking, ${int(pending)} to go` : 'graph') : 'exact');
  say(part.size, bytes(number(c.memory_bytes)));
  part.bar.title = `${c.index.kind}: ${int(indexed)} indexed, ${int(pending)} pending`;
  part.fill.style.width = `${(c.count ? indexed / number(c.count) : 1) * 100}%`;
  return button;
}
async function create(e) {
  e.preventDefault();
  const f = e.target.elements;
  if (!reachesCollection(f.name.value.trim())) return say(nodes.createError, collectionsWords());
  try {
    const c = await post(path(f.name.value.trim()), { dim: Number(f.dim.value), metric: f.metric.value });
    toggleCreate(false);
    toast(`${c.collection} is there`);
    collections = (await get('/v1/vector')).collections;
    go('vectors', { collection: c.collection });
  } catch (error) {
    say(nodes.createError, error.message);
  }
}
function toggleCreate(on = nodes.create.hidden) {
  nodes.create.hidden = !on;
  say(nodes.createError, '');
  if (on) nodes.create.querySelector('input').focus();
}

// ---- The map ----------------------------------------------------------------------------------------------------------------
const unit = (row, metric) => {
  if (metric !== 'cosine') return row;
  const length = Math.sqrt(row.reduce((s, x) => s + x * x, 0)) || 1;
  return row.map((x) => x / length);
};
const spot = (vector) => {
  const [x, y] = project(base, unit(Float32Array.from(vector, number), info()?.metric));
  return { x, y };
};
async function sample() {
  const c = info(),
    mine = ++turn;
  if (!c) return;
  sampled = name;
  const wanted = Math.max(SAMPLE_MIN, Math.min(SAMPLE_MAX, Math.floor(SAMPLE_NUMBERS / c.dim)));
  say(nodes.mapInfo, 'Reading …');
  try {
    const items = [];
    for (let cursor = ''; cursor !== null && items.length < wanted;) {
      // Plain JSON.parse: half a million numbers are to be drawn, not to be kept as they were sent.
      const r = JSON.parse(
        await getText(
          path(c.collection, `/list?${query({ limit: Math.min(500, wanted - items.length), include_vector: 'true', cursor })}`),
        ),
      );
      if (mine !== turn) return;
      items.push(...r.items);
      cursor = r.next_cursor;
      if (!r.items.length) break;
    }
    map.points.clear();
    base = null;
    map.light([], null);
    if (items.length) {
      const rows = items.map((i) => unit(Float32Array.from(i.vector), c.metric));
      base = pca(rows);
      items.forEach((i, n) => {
        const [x, y] = project(base, rows[n]);
        map.points.set(i.id, { x, y, meta: i.meta, color: 0 });
      });
    }
    const isAll = items.length >= number(c.count);
    say(
      nodes.mapInfo,
      items.length
        ? `${isAll ? 'all' : 'the first'} ${int(items.length)}${isAll ? '' : ` of ${int(number(c.count))}, by id`} · two main directions, ${Math.round(base.share * 100)} % of what differs`
        : 'Nothing to draw yet.',
    );
    paintBy();
    if (lastHits) light();
    else suggest(items);
  } catch (e) {
    if (mine === turn) {
      sampled = null;
      say(nodes.mapInfo, e.message);
    }
  }
}
/** Something to begin with: a few ids from all over the sample. */
function suggest(items) {
  const some = Array.from(
    { length: Math.min(6, items.length) },
    (_, i) => items[Math.floor(((i + 0.5) * items.length) / Math.min(6, items.length))].id,
  );
  nodes.results.replaceChildren(
    ...(some.length
      ? [
          el(
            'div',
            { class: 'try-ids' },
            el('span', { class: 'soft' }, 'Start from'),
            some.map((id) => el('button', { type: 'button', class: 'chip mono', onclick: () => searchBy(id) }, id)),
          ),
        ]
      : []),
  );
}
/** Vectors that came while the map is open. */
const place = lazily(async () => {
  const ids = [...changed],
    mine = turn;
  changed.clear();
  if (!base) {
    if (ids.length) sampled = null;
    return void refresh();
  }
  if (ids.length >= 50) return; // A bulk load: the map stays the sample it is.
  for (const id of ids) {
    try {
      const item = await get(path(name, `/get?${query({ id })}`));
      if (mine !== turn || !base) return;
      map.points.set(id, { ...spot(item.vector), meta: item.meta, color: 0 });
    } catch {
      /* gone again */
    }
  }
  paintBy();
}, 300);
/** Fields of the metadata with few enough values to have a colour each. */
function fields() {
  const found = new Map();
  for (const { meta } of map.points.values()) {
    if (!isObject(meta)) continue;
    for (const [k, v] of Object.entries(meta))
      if (['string', 'number', 'boolean'].includes(typeof v)) {
        const counts = found.get(k) ?? found.set(k, new Map()).get(k);
        if (counts.size < 40) counts.set(v, (counts.get(v) ?? 0) + 1);
      }
  }
  return [...found].filter(([, counts]) => counts.size > 1 && counts.size < 40).sort((a, b) => a[1].size - b[1].size);
}
function paintBy() {
  const all = fields();
  if (!all.some(([k]) => k === colorBy)) colorBy = (all.find(([, counts]) => counts.size > 2) ?? all[0])?.[0] ?? '';
  nodes.colorBy.replaceChildren(el('option', { value: '' }, 'one colour'), ...all.map(([k]) => el('option', { value: k }, k)));
  nodes.colorBy.value = colorBy;
  const counts = all.find(([k]) => k === colorBy)?.[1] ?? new Map();
  const top = [...counts].sort((a, b) => b[1] - a[1]).map(([v]) => v),
    rank = new Map(top.map((v, i) => [v, Math.min(i, COLORS)]));
  for (const p of map.points.values()) p.color = colorBy ? (rank.get(isObject(p.meta) ? p.meta[colorBy] : undefined) ?? COLORS) : 0;
  map.colorOf = (p) => p.color;
  nodes.legend.replaceChildren(
    ...top.slice(0, COLORS).map((v, i) => el('span', { class: `swatch c${i}` }, String(v))),
    top.length > COLORS ? el('span', { class: `swatch c${COLORS}` }, 'others') : '',
  );
  map.draw();
}
function light() {
  if (!base || !lastHits) return;
  for (const h of lastHits.hits) if (h.vector && !map.points.has(h.id)) map.points.set(h.id, { ...spot(h.vector), meta: h.meta, color: 0 });
  paintBy();
  map.light(
    lastHits.hits.map((h) => h.id),
    lastHits.vector ? spot(lastHits.vector) : null,
  );
}

/** Metadata in a few words: what reads like text, or else as it is. */
function gist(meta) {
  if (!isObject(meta) || !Object.keys(meta).length) return '';
  const text = ['text', 'title', 'name', 'content'].map((k) => meta[k]).find((v) => typeof v === 'string');
  return brief(text || JSON.stringify(meta));
}
// ---- Searching --------------------------------------------------------------------------------------------------------------
function searchBy(id) {
  nodes.search.elements.by.value = 'id';
  nodes.search.elements.what.value = id;
  // The field shows it without line breaks.
  nodes.search.picked = { id, shown: nodes.search.elements.what.value };
  nodes.search.requestSubmit();
}
/** Numbers, however they were pasted: JSON, or with commas or spaces between. */
function numbers(text, what) {
  const list = field(
    text.trim().startsWith('[')
      ? text
      : `[${text
          .trim()
          .split(/[\s,]+/)
          .join(',')}]`,
    what,
  );
  if (!Array.isArray(list)) throw new Error(`${what} is not a list of numbers.`);
  return list;
}
async function search(e) {
  e.preventDefault();
  const f = nodes.search.elements,
    at = name,
    mine = (nodes.search.turn = (nodes.search.turn ?? 0) + 1);
  say(nodes.searchError, '');
  try {
    const k = Number(f.k.value) || 10,
      body = { k, include_meta: true, explain: true, include_vector: k <= 100 };
    const { picked } = nodes.search;
    if (f.by.value === 'id') body.id = picked?.shown === f.what.value ? picked.id : f.what.value;
    else body.vector = numbers(f.what.value, 'The vector');
    if (f.filters.value.trim()) body.filters = field(f.filters.value, 'The filter');
    if (f.ef.value) body.ef = Number(f.ef.value);
    const mode = f.mode.value,
      ask = async (more) => post(path(at, '/search'), { ...body, ...more });
    // One after the other, so that neither's time is the other's.
    const fast = mode === 'exact' ? null : await ask({});
    const full = mode === 'fast' ? null : await ask({ exact: true, ef: undefined });
    if (mine !== nodes.search.turn || at !== name) return;
    const hits = (fast ?? full).hits;
    const own =
      body.vector ??
      hits.find((h) => h.id === body.id)?.vector ??
      (body.id === undefined ? undefined : (await get(path(at, `/get?${query({ id: body.id })}`))).vector);
    lastHits = { hits, vector: own };
    results(fast, full);
    light();
  } catch (error) {
    if (mine !== nodes.search.turn) return;
    say(nodes.searchError, error.message);
    // What the search before found is no answer to this one.
    nodes.results.replaceChildren();
    lastHits = null;
    map.light([], null);
  }
}
function results(fast, full) {
  const box = [];
  if (fast && full) {
    const worst = number(full.hits.at(-1)?.score ?? 0),
      have = new Set(full.hits.map((h) => h.id));
    // What scores as well as the last exact hit is as right as it.
    const right = fast.hits.filter((h) => have.has(h.id) || number(h.score) >= worst).length,
      wanted = full.hits.length;
    box.push(
      el(
        'div',
        { class: 'verdict', id: 'recall' },
        el('b', { class: 'now' }, wanted ? (right / wanted).toFixed(2) : '–'),
        el('span', {}, `recall · ${right} of ${wanted}`),
        el(
          'span',
          { class: 'soft' },
          fast.explain?.plan === 'exact'
            ? 'both looked at everything: the collection is small'
            : fast.took_us < full.took_us
              ? `${(full.took_us / Math.max(1, fast.took_us)).toFixed(1)} times as fast as looking at everything`
              : 'no faster than looking at everything',
        ),
      ),
    );
  }
  const missed = fast && full ? new Set(fast.hits.map((h) => h.id)) : null,
    extra = fast && full ? new Set(full.hits.map((h) => h.id)) : null;
  const columns = [
    fast && column('Approximate', fast, extra, 'not among the exact hits'),
    full && column('Exact', full, missed, 'missed by the approximate search'),
  ].filter(Boolean);
  box.push(el('div', { class: columns.length > 1 ? 'columns two' : 'columns' }, columns));
  nodes.results.replaceChildren(...box);
}
function column(title, r, other, word) {
  const x = r.explain ?? {},
    top = number(r.hits[0]?.score ?? 0),
    last = number(r.hits.at(-1)?.score ?? 0);
  const plan = x.plan
    ? `${x.plan}${x.ef ? ` · ef ${x.ef}` : ''} · scored ${int(number(x.scored))} of ${int(number(x.matches))}${number(x.tail) ? ` · tail ${int(number(x.tail))}` : ''}${x.given_up ? ` · gave up ${x.given_up}` : ''}`
    : '';
  return el(
    'div',
    { class: 'column' },
    el(
      'div',
      { class: 'column-head' },
      el('h3', {}, title),
      el('b', {}, r.took_us < 10_000 ? `${int(number(r.took_us))} µs` : `${(number(r.took_us) / 1000).toFixed(1)} ms`),
      el('span', { class: 'soft', title: JSON.stringify(x) }, plan),
    ),
    r.hits.length
      ? el(
          'ol',
          { class: 'hits' },
          r.hits.map((h) => {
            const score = number(h.score),
              fill = el('i'),
              isOff = other && !other.has(h.id);
            // From the worst to the best hit: what tells them apart, on any metric.
            fill.style.width = `${top === last ? 100 : 15 + (85 * (score - last)) / (top - last)}%`;
            const erase = sure(
              writes(el('button', { type: 'button', class: 'link danger', 'aria-label': `Delete ${h.id}` }, 'delete'), 'collections'),
              'really?',
              async () => {
                try {
                  await post(path(name, '/delete'), { id: h.id });
                  toast(`${h.id} deleted`);
                  item.remove();
                } catch (error) {
                  toast(error.message, true);
                }
              },
            );
            const item = el(
              'li',
              { class: isOff ? 'hit off' : 'hit', title: isOff ? word : '', 'data-id': h.id },
              el(
                'details',
                {},
                el(
                  'summary',
                  {},
                  el('span', { class: 'mono id' }, visible(h.id)),
                  el('span', { class: 'score' }, fill),
                  el('span', { class: 'num' }, score.toFixed(4)),
                  el('span', { class: 'peek soft' }, gist(h.meta)),
                ),
              ),
            );
            const box = item.firstChild;
            box.ontoggle = () => {
              if (!box.open || box.children[1]) return;
              const vector = h.vector ? JSON.stringify(h.vector) : null;
              box.append(
                el(
                  'div',
                  { class: 'hit-more' },
                  h.meta ? jsonView(h.meta, 2) : el('p', { class: 'soft' }, 'no metadata'),
                  el(
                    'div',
                    { class: 'row' },
                    el('button', { type: 'button', onclick: () => searchBy(h.id) }, 'More like it'),
                    vector ? el('button', { type: 'button', onclick: () => copy(vector) }, 'Copy vector') : null,
                    erase,
                  ),
                ),
              );
            };
            return item;
          }),
        )
      : el('div', { class: 'empty' }, 'No hits.'),
  );
}

// ---- Adding -----------------------------------------------------------------------------------------------------------------
async function add(e) {
  e.preventDefault();
  const f = e.target.elements,
    at = name;
  nodes.added.className = 'soft';
  try {
    const item = { id: f.id.value, vector: numbers(f.vector.value, 'The vector') };
    if (f.meta.value.trim()) item.meta = field(f.meta.value, 'Metadata');
    const done = await post(path(at, '/upsert'), item);
    say(nodes.added, `${done.created ? 'added' : 'replaced'} at revision ${done.revision}`);
  } catch (error) {
    nodes.added.className = 'error';
    say(nodes.added, error.message);
  }
}

export const vectors = {
  title: 'Vectors',
  streams: [stream],
  redraw: () => map.draw(),
  fresh() {
    collections = [];
    isRead = false;
    name = undefined;
    if (nodes) toggleCreate(false);
  },
  mount(section, navigate) {
    go = navigate;
    const input = (n, more) => el('input', { name: n, autocomplete: 'off', spellcheck: false, ...more });
    const option = (value, text) => el('option', { value }, text);
    const select = (n, options) =>
      el(
        'select',
        { name: n },
        options.map(([v, t]) => option(v, t)),
      );
    nodes = {
      root: section,
      error: el('p', { class: 'error', role: 'alert' }),
      list: el('div', { class: 'collections', id: 'collections' }),
      none: el('div', { class: 'card empty-card', hidden: true }),
      noneTitle: el('h2', {}),
      goneTitle: el('h2', {}),
      gone: el('div', { class: 'card empty-card', hidden: true }),
      createError: el('p', { class: 'error', role: 'alert' }),
      title: el('h2', { class: 'mono' }),
      facts: el('p', { class: 'soft', id: 'collection-facts' }),
      searchError: el('p', { class: 'error', role: 'alert', id: 'search-error' }),
      results: el('div', { class: 'results', id: 'results' }),
      mapInfo: el('span', { class: 'soft', id: 'map-info' }),
      colorBy: el('select', { 'aria-label': 'Colour by' }),
      legend: el('div', { class: 'swatches' }),
      added: el('span', { class: 'soft', role: 'status', id: 'added' }),
    };
    nodes.colorBy.onchange = () => {
      colorBy = nodes.colorBy.value;
      if (!colorBy) {
        for (const p of map.points.values()) p.color = 0;
        nodes.legend.replaceChildren();
        map.draw();
      } else paintBy();
    };
    nodes.create = el(
      'form',
      { class: 'card row create', id: 'create', hidden: true, onsubmit: create },
      el('label', { class: 'grow' }, 'Name ', input('name', { class: 'mono', required: true })),
      el('label', {}, 'Numbers ', input('dim', { type: 'number', min: 1, max: 8192, value: 384, required: true })),
      el(
        'label',
        {},
        'Metric ',
        select('metric', [
          ['cosine', 'cosine'],
          ['dot', 'dot'],
          ['l2', 'l2'],
        ]),
      ),
      el('button', { class: 'main' }, 'Create'),
      nodes.createError,
    );
    nodes.none.append(
      nodes.noneTitle,
      el('p', { class: 'soft' }, 'A collection holds vectors of one length, compared by one metric.'),
      writes(el('button', { type: 'button', class: 'main', onclick: () => toggleCreate(true) }, 'Make one'), 'collections'),
    );
    nodes.gone.append(nodes.goneTitle);
    const drop = sure(
      writes(el('button', { type: 'button', class: 'danger', id: 'drop' }, 'Delete collection'), 'collections'),
      'Really, all of it?',
      async () => {
        const gone = name;
        try {
          const r = await remove(path(gone));
          toast(`${gone} and ${many(number(r.count), 'vector')} deleted`);
          name = null;
          lastHits = null;
          collections = (await get('/v1/vector')).collections;
          go('vectors');
        } catch (e) {
          toast(e.message, true);
        }
      },
    );
    nodes.search = el(
      'form',
      { class: 'search-form', id: 'search', onsubmit: search },
      el(
        'div',
        { class: 'row' },
        el(
          'label',
          {},
          'Like ',
          select('by', [
            ['id', 'a stored id'],
            ['vector', 'a vector'],
          ]),
        ),
        el(
          'label',
          { class: 'grow' },
          'Id or numbers ',
          input('what', { class: 'mono', required: true, placeholder: 'an id, or choose a point on the map' }),
        ),
        el('button', { class: 'main' }, icon(ICONS.search), 'Search'),
      ),
      el(
        'div',
        { class: 'row' },
        el('label', { class: 'grow' }, 'Filters (JSON) ', input('filters', { class: 'mono', placeholder: '{"lang": "es"}' })),
        el('label', { class: 'narrow' }, 'k ', input('k', { type: 'number', min: 1, max: 1000, defaultValue: 10 })),
        el('label', { class: 'narrow' }, 'ef ', input('ef', { type: 'number', min: 1, max: 10000, placeholder: 'auto' })),
        el(
          'label',
          {},
          'Answer ',
          select('mode', [
            ['both', 'both, side by side'],
            ['fast', 'approximate'],
            ['exact', 'exact'],
          ]),
        ),
      ),
    );
    const id = input('id', { class: 'mono', required: true }),
      vector = input('vector', { class: 'mono', required: true, placeholder: '[0.1, 0.2, …]' });
    const adder = writes(
      el(
        'details',
        { class: 'adding', id: 'add' },
        el('summary', {}, 'Add or replace a vector'),
        el(
          'form',
          { onsubmit: add },
          el(
            'div',
            { class: 'row' },
            el('label', {}, 'Id ', id),
            el('label', { class: 'grow' }, 'Numbers ', vector),
            el(
              'button',
              {
                type: 'button',
                title: 'Fill in random numbers',
                onclick: () => {
                  vector.value = `[${Array.from({ length: info()?.dim ?? 3 }, () => (Math.random() * 2 - 1).toFixed(3)).join(', ')}]`;
                },
              },
              'Random',
            ),
          ),
          el(
            'div',
            { class: 'row' },
            el('label', { class: 'grow' }, 'Metadata (JSON) ', input('meta', { class: 'mono', placeholder: '{"lang": "es"}' })),
            el('button', { class: 'main' }, 'Write'),
          ),
          nodes.added,
        ),
      ),
      'collections',
    );
    nodes.body = el(
      'div',
      { class: 'vector-body', hidden: true },
      el(
        'div',
        { class: 'card' },
        el('div', { class: 'pane-head' }, el('div', {}, nodes.title, nodes.facts), drop),
        nodes.search,
        nodes.searchError,
        adder,
        nodes.results,
      ),
      el(
        'div',
        { class: 'card map-card' },
        el('div', { class: 'row spread' }, el('h3', {}, 'Map'), el('label', { class: 'check' }, 'colour by ', nodes.colorBy)),
        map.node,
        nodes.legend,
        nodes.mapInfo,
      ),
    );
    nodes.newCollection = writes(
      el('button', { type: 'button', id: 'new-collection', title: 'n', onclick: () => toggleCreate() }, icon(ICONS.plus), 'New collection'),
      'collections',
    );
    section.append(
      el('div', { class: 'toolbar' }, el('span', { class: 'soft' }, 'Collections'), el('span', { class: 'grow' }), nodes.newCollection),
      nodes.create,
      nodes.error,
      nodes.list,
      nodes.none,
      nodes.gone,
      nodes.body,
    );
  },
  show(params) {
    const next = params.get('collection');
    if (next !== name) {
      name = next;
      lastHits = null;
      sampled = null;
      base = null;
      turn++;
      map.points.clear();
      map.light([], null);
      nodes.results.replaceChildren();
      say(nodes.searchError, '');
      say(nodes.added, '');
      nodes.search.reset();
    }
    refresh();
    draw();
  },
  keys: { n: () => (nodes.create.hidden ? nodes.newCollection.click() : toggleCreate(true)), Escape: () => toggleCreate(false) },
};
