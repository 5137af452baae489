// A map of vectors: their two main directions (PCA), found by power iteration on the data itself. The covariance, dim by dim
// numbers, is never made: one step is Xᵀ(X v), and costs points times dim.

import { color, el, visible } from './lib.js';

const STEPS = 40;
const COLORS = 8;

/**
 * Two directions in which rows differ most. `rows`: Float32Arrays of one length. Returns `{mean, axes, share}` with the
 * part of the variance that the two axes show.
 */
export function pca(rows) {
  const n = rows.length,
    dim = rows[0].length,
    mean = new Float64Array(dim);
  for (const r of rows) for (let d = 0; d < dim; d++) mean[d] += r[d] / n;
  let total = 0;
  for (const r of rows) for (let d = 0; d < dim; d++) total += (r[d] - mean[d]) ** 2;
  const axes = [];
  let shown = 0;
  for (let a = 0; a < 2; a++) {
    let v = Float64Array.from({ length: dim }, (_, d) => Math.sin(d * 12.9898 + a * 78.233 + 1)); // Any start does; a fixed one draws the same map again.
    let size = 0;
    for (let step = 0; step < STEPS; step++) {
      const next = new Float64Array(dim);
      for (const r of rows) {
        let dot = 0;
        for (let d = 0; d < dim; d++) dot += (r[d] - mean[d]) * v[d];
        for (let d = 0; d < dim; d++) next[d] += (r[d] - mean[d]) * dot;
      }
      for (const other of axes) {
        // Stay at right angles to what is there.
        let dot = 0;
        for (let d = 0; d < dim; d++) dot += next[d] * other[d];
        for (let d = 0; d < dim; d++) next[d] -= dot * other[d];
      }
      const length = Math.sqrt(next.reduce((sum, x) => sum + x * x, 0));
      if (!(length > 0)) {
        size = 0;
        break;
      }
      let change = 0;
      for (let d = 0; d < dim; d++) {
        const x = next[d] / length;
        change += (x - v[d]) ** 2;
        next[d] = x;
      }
      v = next;
      size = length;
      if (change < 1e-9) break;
    }
    if (size === 0) v = v.map(() => 0);
    axes.push(v);
    shown += size;
  }
  return { mean, axes, share: total > 0 ? Math.min(1, shown / total) : 0 };
}
export const project = ({ mean, axes }, row) =>
  axes.map((axis) => {
    let dot = 0;
    for (let d = 0; d < row.length; d++) dot += (row[d] - mean[d]) * axis[d];
    return dot;
  });

/** The picture: points, colours by a field, hits that light up, a pointer that says what is under it. */
export class VectorMap {
  constructor({ onPick }) {
    Object.assign(this, {
      points: new Map(),
      hits: new Map(),
      query: null,
      pointed: null,
      colorOf: () => 0,
      onPick,
      isQueued: false,
      glow: 1,
    });
    this.canvas = el('canvas', { role: 'img', 'aria-label': 'Map of vectors' });
    this.tip = el('div', { class: 'chart-tip', hidden: true });
    this.node = el('div', { class: 'map' }, this.canvas, this.tip);
    new ResizeObserver(() => this.draw()).observe(this.node);
    this.node.onpointermove = (e) => {
      this.point(e);
    };
    this.node.onpointerleave = () => {
      this.pointed = null;
      this.draw();
    };
    this.node.onclick = (e) => {
      this.point(e);
      if (this.pointed !== null) this.onPick(this.pointed);
    };
  }
  /** `hits`: ids by rank, `query`: where the query itself lies. */
  light(hits, query) {
    this.hits = new Map(hits.map((id, i) => [id, i]));
    this.query = query;
    this.canvas.dataset.hits = String(this.hits.size);
    if (matchMedia('(prefers-reduced-motion: reduce)').matches) {
      this.glow = 1;
      return this.draw();
    }
    const start = performance.now();
    const step = (now) => {
      this.glow = Math.min(1, (now - start) / 500);
      this.draw();
      if (this.glow < 1) requestAnimationFrame(step);
    };
    requestAnimationFrame(step);
  }
  point(e) {
    const box = this.canvas.getBoundingClientRect(),
      x = e.clientX - box.left,
      y = e.clientY - box.top;
    let best = 14 ** 2;
    this.pointed = null;
    for (const [id, p] of this.points) {
      const d = (p.px - x) ** 2 + (p.py - y) ** 2;
      if (d < best) {
        best = d;
        this.pointed = id;
      }
    }
    this.draw();
  }
  draw() {
    if (this.isQueued) return;
    this.isQueued = true;
    requestAnimationFrame(() => {
      this.isQueued = false;
      this.paint();
    });
  }
  paint() {
    const { clientWidth: w, clientHeight: h } = this.node;
    if (!w || !h) return;
    const scale = devicePixelRatio || 1,
      c = this.canvas;
    if (c.width !== Math.round(w * scale) || c.height !== Math.round(h * scale)) {
      c.width = Math.round(w * scale);
      c.height = Math.round(h * scale);
    }
    const g = c.getContext('2d');
    g.setTransform(scale, 0, 0, scale, 0, 0);
    g.clearRect(0, 0, w, h);
    let [left, right, low, high] = [Infinity, -Infinity, Infinity, -Infinity];
    const places = [...this.points.values(), ...(this.query ? [this.query] : [])];
    for (const { x, y } of places) {
      left = Math.min(left, x);
      right = Math.max(right, x);
      low = Math.min(low, y);
      high = Math.max(high, y);
    }
    const pad = 26,
      unit = Math.min((w - 2 * pad) / (right - left || 1), (h - 2 * pad) / (high - low || 1));
    const wide = Math.min((w - 2 * pad) / (right - left || 1), unit * 1.8),
      tall = Math.min((h - 2 * pad) / (high - low || 1), unit * 1.8);
    const put = (p) => {
      p.px = w / 2 + (p.x - (left + right) / 2) * wide;
      p.py = h / 2 - (p.y - (low + high) / 2) * tall;
    };
    for (const p of places) put(p);
    const palette = Array.from({ length: COLORS }, (_, i) => color(`--c${i}`)),
      ink = color('--ink'),
      isLit = this.hits.size > 0;
    const size = this.points.size > 800 ? 2.2 : this.points.size > 200 ? 3 : 4;
    for (const [id, p] of this.points) {
      if (this.hits.has(id)) continue;
      g.globalAlpha = isLit ? 0.85 - 0.5 * this.glow : 0.85;
      g.fillStyle = palette[this.colorOf(p) % COLORS];
      g.beginPath();
      g.arc(p.px, p.py, size, 0, 7);
      g.fill();
    }
    g.globalAlpha = 1;
    if (this.query) {
      g.strokeStyle = ink;
      g.lineWidth = 1;
      for (const id of this.hits.keys()) {
        const p = this.points.get(id);
        if (!p) continue;
        g.globalAlpha = 0.25;
        g.beginPath();
        g.moveTo(this.query.px, this.query.py);
        g.lineTo(this.query.px + (p.px - this.query.px) * this.glow, this.query.py + (p.py - this.query.py) * this.glow);
        g.stroke();
      }
      g.globalAlpha = 1;
    }
    for (const [id, rank] of [...this.hits].reverse()) {
      const p = this.points.get(id);
      if (!p) continue;
      const r = (rank === 0 ? 7 : 5.5) * (0.5 + 0.5 * this.glow),
        fill = palette[this.colorOf(p) % COLORS];
      g.fillStyle = fill;
      g.globalAlpha = 0.25;
      g.beginPath();
      g.arc(p.px, p.py, r * 2, 0, 7);
      g.fill();
      g.globalAlpha = 1;
      g.beginPath();
      g.arc(p.px, p.py, r, 0, 7);
      g.fill();
      g.strokeStyle = ink;
      g.lineWidth = 1.25;
      g.stroke();
    }
    if (this.query) {
      const { px, py } = this.query;
      g.strokeStyle = ink;
      g.lineWidth = 2;
      g.beginPath();
      g.moveTo(px - 7, py);
      g.lineTo(px + 7, py);
      g.moveTo(px, py - 7);
      g.lineTo(px, py + 7);
      g.stroke();
    }
    const p = this.pointed === null ? null : this.points.get(this.pointed);
    this.tip.hidden = !p;
    if (p) {
      g.strokeStyle = ink;
      g.lineWidth = 1.5;
      g.beginPath();
      g.arc(p.px, p.py, 7, 0, 7);
      g.stroke();
      const meta = p.meta ? JSON.stringify(p.meta) : '';
      this.tip.textContent = `${visible(this.pointed)}${meta ? ` · ${meta.length > 140 ? `${meta.slice(0, 140)}…` : meta}` : ''}`;
      this.tip.style.transform = `translate(${Math.round(Math.min(Math.max(p.px - this.tip.offsetWidth / 2, 4), w - this.tip.offsetWidth - 4))}px, ${Math.round(p.py > h / 2 ? p.py - this.tip.offsetHeight - 14 : p.py + 14)}px)`;
    }
    c.setAttribute(
      'aria-label',
      `Map of ${this.points.size} ${this.points.size === 1 ? 'vector' : 'vectors'}, ${this.hits.size} of them hits`,
    );
  }
}
