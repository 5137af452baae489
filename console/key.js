// What the key may do: asked of the server, told to the views, and shown on what they offer.
//
// A key made by `kiss-vdb keys create` may be limited to a right, to keys that begin so and to collections. The server
// refuses what is beyond; this page does not offer it, and says why in its place.

import { hasKey, onKeyNeeded, post, setKey, whichKey } from './server.js';

/** `{name, rights, prefixes?, collections?}` as `POST /v1/token` tells it; null = everything, as far as this page knows. */
let grant = null;

/** Asks what the key may do. True when that is another than before. */
export async function learn() {
  const asked = whichKey(),
    before = JSON.stringify(grant);
  let found = null;
  if (hasKey()) {
    // The shortest token there is: it is made for what comes with it.
    try {
      found = (await post('/v1/token', { ttl_ms: 1000 })).grant ?? null;
    } catch (e) {
      if (asked !== whichKey()) return false;
      // Away, or busy: what was known stays, and the next connection asks again.
      if (e.status !== 403 || e.isAway) return false;
      setKey('');
      onKeyNeeded.call('That key may not read, and this page shows what can be read.');
    }
    if (hasKey() && asked !== whichKey()) return false; // Another came in meanwhile, and asks for itself.
  }
  grant = found;
  return JSON.stringify(grant) !== before;
}
export const granted = () => grant;
export const mayWrite = () => !grant || grant.rights.includes('write') || grant.rights.includes('admin');
/** `{prefixes, collections}` for a key with limits, or null. */
export const limits = () => (grant?.prefixes ? { prefixes: grant.prefixes, collections: grant.collections } : null);
/** Whether a key, or every key that begins so, is within. */
export const reachesKey = (key) => !grant?.prefixes || grant.prefixes.some((p) => key.startsWith(p));
export const reachesCollection = (name) => !grant?.prefixes || grant.collections.some((c) => c === name || c === '*');

const list = (names) => (names.length < 2 ? names.join('') : `${names.slice(0, -1).join(', ')} or ${names.at(-1)}`);
/** What a key with limits reaches, as sentences. */
export const keysWords = () =>
  limits().prefixes.length
    ? `The key "${grant.name}" reaches keys that begin with ${list(grant.prefixes)}.`
    : `The key "${grant.name}" reaches no keys, only collections.`;
export const collectionsWords = () =>
  limits().collections.length
    ? `The key "${grant.name}" reaches the collection ${list(grant.collections)}.`
    : `The key "${grant.name}" reaches no collections, only keys.`;

/** Why something may not be written, or ''. `what` is prefixes or collections. */
function whyNot(what) {
  if (!mayWrite()) return `The key "${grant.name}" may only read.`;
  const own = limits();
  return own && !own[what].length ? (what === 'prefixes' ? keysWords() : collectionsWords()) : '';
}
function lock(node) {
  const why = whyNot(node.dataset.writes);
  if (!('disabled' in node)) {
    node.hidden = why !== '';
    return;
  }
  node.disabled = why !== '';
  node.title = why || node.dataset.title;
}
/** Marks what writes: disabled with the reason, or hidden where that cannot be, while the key may not. */
export function writes(node, what = 'prefixes') {
  node.dataset.writes = what;
  node.dataset.title = node.title;
  lock(node);
  return node;
}
/** After the key has changed. */
export function lockAll() {
  for (const node of document.querySelectorAll('[data-writes]')) lock(node);
}
