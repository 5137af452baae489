// A live chart on a canvas: a few series over the last minutes, one point a second. Charts of a page share the pointer, so
// that one can ask what all of them showed at the same moment.

import { color, el } from './lib.js';

/** Points kept: three minutes at one a second. */
export const POINTS = 180;
const charts = new Set();
let pointed = null; // Points before now, under the pointer.
const WINDOW_MIN = 60; // A minute at first, then up to all that is kept.
const GAP = { left: 54, right: 10, top: 10, bottom: 18 };

/** A round number at or above `top`, in steps that people count in. */
function roundUp(top, base) {
  if (!(top > 0)) return base === 1024 ? 1024 : 1;
  const unit = base === 1024 ? 1024 ** Math.floor(Math.log2(top) / 10) : 10 ** Math.floor(Math.log10(top));
  const steps = base === 1024 ? [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024] : [1, 2, 3, 5, 10];
  return unit * (steps.find((s) => s * unit >= top) ?? base);
}

export class Chart {
  /**
   * `series`: `{name, color, points}` with `color` the name of a CSS variable and `points` an array that its owner
   * changes, newest last, null where nothing is known. `format` words a value; `least` is the smallest top of the scale.
   */
  constructor({ label, series, format, least = 0, base = 10 }) {
    Object.assign(this, { label, series, format, least, base });
    this.canvas = el('canvas', { role: 'img', 'aria-label': label });
    this.tip = el('div', { class: 'chart-tip', hidden: true });
    this.node = el('div', { class: 'chart' }, this.canvas, this.tip);
    this.node.onpointermove = (e) => {
      const box = this.canvas.getBoundingClientRect(),
        wide = box.width - GAP.left - GAP.right;
      const back = Math.round((1 - (e.clientX - box.left - GAP.left) / wide) * (this.window - 1));
      pointed = back >= 0 && back < this.window ? back : null;
      for (const chart of charts) chart.draw();
    };
    this.node.onpointerleave = () => {
      pointed = null;
      for (const chart of charts) chart.draw();
    };
    new ResizeObserver(() => this.draw()).observe(this.node);
    charts.add(this);
  }
  get window() {
    return Math.max(WINDOW_MIN, Math.min(POINTS, this.series[0].points.length));
  }
  draw() {
    const span = this.window;
    const { clientWidth: w, clientHeight: h } = this.node;
    if (!w || !h) return; // Hidden.
    const scale = devicePixelRatio || 1,
      c = this.canvas;
    if (c.width !== Math.round(w * scale) || c.height !== Math.round(h * scale)) {
      c.width = Math.round(w * scale);
      c.height = Math.round(h * scale);
    }
    const g = c.getContext('2d');
    g.setTransform(scale, 0, 0, scale, 0, 0);
    g.clearRect(0, 0, w, h);
    let top = this.least;
    for (const s of this.series) for (const v of s.points) if (v > top) top = v;
    top = roundUp(top, this.base);
    const x = (i) => GAP.left + (i / (span - 1)) * (w - GAP.left - GAP.right);
    const y = (v) => h - GAP.bottom - (v / top) * (h - GAP.top - GAP.bottom);
    g.font = '11px system-ui, sans-serif';
    g.lineWidth = 1;
    const rows = h > 130 ? [0, 0.5, 1] : [0, 1];
    for (const part of rows) {
      const at = Math.round(y(top * part)) + 0.5;
      g.strokeStyle = color('--grid');
      g.beginPath();
      g.moveTo(GAP.left, at);
      g.lineTo(w - GAP.right, at);
      g.stroke();
      g.fillStyle = color('--soft');
      g.textAlign = 'right';
      g.textBaseline = 'middle';
      g.fillText(this.format(top * part), GAP.left - 7, at);
    }
    g.textBaseline = 'alphabetic';
    for (const back of [0, 60, 120, 180]) {
      if (back > span) break;
      const isEdge = back > span - 8,
        at = x(Math.max(0, span - 1 - back));
      g.textAlign = back === 0 ? 'right' : isEdge ? 'left' : 'center';
      g.fillText(back ? `${back / 60} min` : 'now', at, h - 4);
    }
    this.series.forEach((s, n) => {
      const stroke = color(s.color),
        from = span - s.points.length,
        runs = [];
      let run = null;
      s.points.forEach((v, i) => {
        if (v == null) {
          run = null;
          return;
        }
        if (!run) runs.push((run = []));
        run.push([x(from + i), y(v)]);
      });
      for (const points of runs) {
        const trace = () => {
          g.beginPath();
          g.moveTo(...points[0]);
          // Monotone curves: rounded, and never above what was measured.
          for (let i = 1; i < points.length; i++) {
            const [x0, y0] = points[i - 1],
              [x1, y1] = points[i],
              half = (x0 + x1) / 2;
            g.bezierCurveTo(half, y0, half, y1, x1, y1);
          }
        };
        if (n === 0) {
          trace();
          g.lineTo(points.at(-1)[0], y(0));
          g.lineTo(points[0][0], y(0));
          g.closePath();
          const fill = g.createLinearGradient(0, Math.min(...points.map((p) => p[1])), 0, h - GAP.bottom);
          fill.addColorStop(0, stroke);
          fill.addColorStop(1, 'transparent');
          g.globalAlpha = 0.22;
          g.fillStyle = fill;
          g.fill();
          g.globalAlpha = 1;
        }
        trace();
        g.strokeStyle = stroke;
        g.lineWidth = 1.75;
        g.lineJoin = 'round';
        g.stroke();
        const [endX, endY] = points.at(-1);
        if (points === runs.at(-1) && s.points.at(-1) != null) {
          g.beginPath();
          g.arc(endX, endY, 3, 0, 7);
          g.fillStyle = stroke;
          g.fill();
        }
      }
    });
    const texts = pointed === null ? [] : this.series.map((s) => [s, s.points.at(-1 - pointed)]).filter(([, v]) => v != null);
    this.tip.hidden = texts.length === 0;
    if (texts.length) {
      const at = x(POINTS - 1 - pointed);
      g.strokeStyle = color('--soft');
      g.globalAlpha = 0.5;
      g.beginPath();
      g.moveTo(Math.round(at) + 0.5, GAP.top);
      g.lineTo(Math.round(at) + 0.5, h - GAP.bottom);
      g.stroke();
      g.globalAlpha = 1;
      for (const [s, v] of texts) {
        g.beginPath();
        g.arc(at, y(v), 3.5, 0, 7);
        g.fillStyle = color(s.color);
        g.fill();
      }
      this.tip.textContent = `${pointed ? `${pointed} s ago` : 'now'} · ${texts.map(([s, v]) => `${this.series.length > 1 ? `${s.name} ` : ''}${this.format(v)}`).join(' · ')}`;
      this.tip.style.transform = `translateX(${Math.round(Math.min(Math.max(at - this.tip.offsetWidth / 2, 4), w - this.tip.offsetWidth - 4))}px)`;
    }
    const words = this.series.map((s) => `${s.name} ${this.format(s.points.at(-1))}`).join(', ');
    c.setAttribute('aria-label', `${this.label}: now ${words}`);
  }
}
export function redraw() {
  for (const chart of charts) chart.draw();
}
