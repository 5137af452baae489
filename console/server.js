// The server as the views see it: calls, the key, and event streams that come back by themselves.

import { exact, query } from './lib.js';

const KEY = 'kiss-vdb-key';
// Until an answer begins. A browser has six connections to a server without TLS, and each window holds two of them: a request
// of a third window waits in the browser, and would for good. What writes gets longer, since whether it was done is not known
// then, and so does history, for which a cold log is read.
const READ_MS = 10_000,
  LONG_MS = 30_000;
let key = sessionStorage.getItem(KEY) ?? ''; // This tab only; it goes when the tab goes.
let refused = null; // The key that was last asked about: one refusal is told once, however many requests meet it.
let skew = 0; // The server's clock minus ours, in ms, when they differ noticeably.

export const serverNow = () => Date.now() + skew;
export const hasKey = () => key !== '';
export const whichKey = () => key;
export function setKey(text) {
  key = text;
  refused = null;
  key ? sessionStorage.setItem(KEY, key) : sessionStorage.removeItem(KEY);
}
const auth = () => (key ? { Authorization: `Bearer ${key}` } : {});
/** What a command line needs besides, when the server wants a key: the variable that `kiss-vdb` reads too. */
export const curlKey = () => (key ? ' -H "Authorization: Bearer $API_KEY"' : '');
/** What is called, with the reason, when the server asks for a key. */
export const onKeyNeeded = { call: () => {} };

/** `sent` is the key that went along: an answer to one that was replaced meanwhile asks for nothing. */
async function problem(res, sent) {
  let body = {};
  try {
    body = JSON.parse(await res.text());
  } catch {
    /* not from this server: the status has to do */
  }
  const detail = body.detail ?? `${res.status} ${res.statusText}`;
  if (res.status === 401 && sent === key && refused !== key) {
    refused = key;
    onKeyNeeded.call(sent ? `That key was not accepted: ${detail}.` : '');
  }
  const text =
    res.status === 401
      ? sent
        ? `The server does not accept this key: ${detail}.`
        : 'This server asks for a key.'
      : detail.replace(/^operation 0: /, '');
  // A proxy whose server is away says so as it likes, with 404 and 403 too; only the server's own refusal is one.
  const isOwn = res.headers.get('content-type')?.startsWith('application/problem+json');
  const isAway = res.status !== 401 && (!isOwn || res.status >= 500 || res.status === 429);
  return Object.assign(new Error(text), { status: res.status, code: body.code, body, isAway });
}
/** An error of no answer. `isAway` on any error: not a refusal, and the same may be asked again. */
const away = (text) => Object.assign(new Error(text), { status: 0, isAway: true });
async function call(method, path, body, accept) {
  const sent = key,
    headers = { ...auth(), ...(body === undefined ? {} : { 'Content-Type': 'application/json' }), ...(accept ? { Accept: accept } : {}) };
  const patience = new AbortController(),
    ms = method === 'GET' && !accept ? READ_MS : LONG_MS,
    timer = setTimeout(() => patience.abort(), ms);
  let res;
  try {
    res = await fetch(path, {
      method,
      headers,
      body: body === undefined ? undefined : JSON.stringify(body),
      cache: 'no-store',
      signal: patience.signal,
    });
  } catch {
    const open = 'Perhaps too many windows of this console are open: a browser has six connections for all of them.';
    throw away(
      !patience.signal.aborted
        ? 'The server does not answer.'
        : method === 'GET'
          ? `No answer in ${ms / 1000} s. ${open}`
          : `No answer in ${ms / 1000} s, so whether it was done is not known. ${open}`,
    );
  } finally {
    clearTimeout(timer);
  }
  const date = Date.parse(res.headers.get('date'));
  if (date) skew = Math.abs(date - Date.now()) > 2000 ? date - Date.now() : 0;
  // The health of a server that is not well comes with 503, and is read all the same.
  const isHealth = path === '/v1/health' && res.headers.get('content-type')?.startsWith('application/json');
  if (!res.ok && !isHealth) throw await problem(res, sent);
  try {
    return await res.text();
  } catch {
    throw away('The server broke off its answer.');
  }
}
export const getText = (path) => call('GET', path);
export const get = async (path) => exact(await call('GET', path));
export const post = async (path, body) => exact(await call('POST', path, body));
export const remove = async (path) => exact(await call('DELETE', path));
/** A page of history. */
export const history = async (params) => exact(await call('GET', `/v1/events?${query(params)}`, undefined, 'application/json'));
/** One key, or undefined. By the list, whose query carries every key; a path cannot name "..". */
export const read = async (k) => (await get(`/v1/state?${query({ prefix: k, limit: 1 })}`)).items.find((e) => e.key === k);
/** One write. By a batch, for the same reason. */
export const write = async (op) => (await post('/v1/batch', { ops: [op] })).results[0];
/**
 * The cursor that goes on after `name`. Clients must not look inside a cursor; this page is part of the server that makes
 * them, and steps over whole branches of the tree with it. A test would notice if the two went apart.
 */
export function cursorAfter(name) {
  let text = '';
  for (const byte of new TextEncoder().encode(name)) text += String.fromCharCode(byte);
  return btoa(text).replaceAll('+', '-').replaceAll('/', '_').replaceAll('=', '');
}

/**
 * Server-sent events over fetch rather than EventSource: all types in one place, the key as a header, and the truth about
 * why a connection failed. Resumes by Last-Event-ID, comes back by itself.
 *
 * `onFrame({id, type, data})`: type is empty for a heartbeat. `onOpen(isFresh)`: connected; fresh when there is no position
 * yet, so that what a snapshot built before has to go. `onStatus(status, message)`: connecting, connected, reconnecting,
 * stopped; a message says why it will not come back by itself. `isFailing`: the last attempt failed and there will be another;
 * `trouble` is what it was answered, or '' when there was no answer.
 */
export class Stream {
  constructor({ heartbeat = 5000, onFrame, onOpen = () => {}, onStatus = () => {} }) {
    Object.assign(this, {
      heartbeat,
      onFrame,
      onOpen,
      onStatus,
      lastId: null,
      path: null,
      retryAt: 0,
      isOn: false,
      abort: null,
      wake: null,
      isFailing: false,
      trouble: '',
    });
  }
  /** Follows another path, from its start. */
  open(path) {
    this.stop();
    this.path = path;
    this.lastId = null;
    if (this.isOn) this.start();
  }
  /** On, or off with the position kept. */
  run(isOn) {
    this.isOn = isOn;
    isOn ? this.start() : this.stop();
  }
  /** Does not wait any longer for the next attempt. */
  hurry() {
    this.wake?.();
  }
  stop() {
    this.abort?.();
    this.abort = null;
    this.isFailing = false;
    this.onStatus('stopped');
  }
  start() {
    if (this.abort || !this.path) return;
    this.onStatus('connecting');
    const life = { isOver: false, attempt: null };
    this.abort = () => {
      life.isOver = true;
      life.attempt?.abort();
      this.wake?.();
    };
    this.loop(life);
  }
  async loop(life) {
    let failures = 0;
    this.retry = 1000;
    while (!life.isOver) {
      const attempt = (life.attempt = new AbortController());
      let timer = 0,
        wait = 0;
      // Silence far beyond the heartbeat is a dead connection, whatever TCP thinks.
      const alive = () => {
        clearTimeout(timer);
        timer = setTimeout(() => attempt.abort(), this.heartbeat * 3 + 4000);
      };
      try {
        alive();
        const sent = key,
          headers = { ...auth(), Accept: 'text/event-stream', ...(this.lastId === null ? {} : { 'Last-Event-ID': this.lastId }) };
        // Without a cache mode: by that an EventSource is known, and told less of why it is refused.
        const res = await fetch(`${this.path}${this.path.includes('?') ? '&' : '?'}heartbeat_ms=${this.heartbeat}`, {
          headers,
          signal: attempt.signal,
        });
        if (life.isOver) break;
        if (!res.ok) {
          const error = await problem(res, sent);
          if (life.isOver) break;
          if (!error.isAway) {
            this.abort = null;
            this.isFailing = false;
            clearTimeout(timer);
            return this.onStatus('stopped', error.message);
          }
          wait = 1000 * Number(res.headers.get('retry-after') ?? 0);
          throw error;
        }
        refused = null;
        this.isFailing = false;
        this.onOpen(this.lastId === null);
        this.onStatus('connected');
        failures = 0;
        await this.parse(res.body, alive, life);
      } catch (e) {
        failures++;
        if (!life.isOver) Object.assign(this, { isFailing: true, trouble: e.status ? e.message : '' });
      } finally {
        clearTimeout(timer);
        attempt.abort();
      }
      if (life.isOver) break;
      wait ||= Math.min(this.retry * 2 ** Math.max(0, failures - 1), 8000) * (0.8 + Math.random() * 0.4);
      this.retryAt = Date.now() + wait;
      this.onStatus('reconnecting');
      await new Promise((done) => {
        this.wake = done;
        setTimeout(done, wait);
      });
      this.wake = null;
    }
  }
  async parse(body, alive, life) {
    const reader = body.pipeThrough(new TextDecoderStream()).getReader();
    let parts = [],
      type = '',
      data = [],
      id = null;
    for (;;) {
      const { done, value } = await reader.read();
      if (done || life.isOver) return;
      alive();
      // A value of many megabytes arrives in many chunks without an end of line: joined once, not each time.
      if (!value.includes('\n')) {
        parts.push(value);
        continue;
      }
      const lines = (parts.join('') + value).split('\n');
      parts = [lines.pop()];
      for (const raw of lines) {
        const line = raw.endsWith('\r') ? raw.slice(0, -1) : raw;
        if (line === '') {
          if (id !== null) this.lastId = id;
          if (data.length || id !== null)
            this.onFrame({ id: this.lastId, type: data.length ? type || 'message' : '', data: data.join('\n') });
          if (life.isOver) return;
          type = '';
          data = [];
          id = null;
          continue;
        }
        const colon = line.indexOf(':'),
          name = colon < 0 ? line : line.slice(0, colon);
        const text = colon < 0 ? '' : line.slice(line[colon + 1] === ' ' ? colon + 2 : colon + 1);
        if (name === 'data') data.push(text);
        else if (name === 'event') type = text;
        else if (name === 'id' && !text.includes('\0')) id = text;
        else if (name === 'retry' && /^\d+$/.test(text)) this.retry = Number(text);
      }
    }
  }
}
