// A list of any length: only the rows in sight exist. Rows have one height, so a place is an index times it.

import { el } from './lib.js';

const BEYOND = 8; // Rows kept above and below what is in sight.
// Browsers clip elements beyond some 17 to 33 million pixels: a longer list scrolls at a coarser scale.
const HEIGHT_MAX = 15_000_000;

export class VirtualList {
  /**
   * `draw(index)` makes a row, and `sign(index)` says what it would show: a row of the same sign is kept as it is, so that what
   * is live around it disturbs neither the pointer nor a selection. `onPick(index)`: pressed, or chosen by the keyboard.
   * `onKey(event, index)` sees keys first.
   */
  constructor(box, rowHeight, { draw, sign, onPick, onKey = () => false }) {
    Object.assign(this, {
      box,
      rowHeight,
      draw,
      sign,
      onPick,
      onKey,
      drawn: new Map(),
      count: 0,
      active: -1,
      first: 0,
      last: -1,
      from: 0,
      to: -1,
      isQueued: false,
    });
    this.space = el('div', { class: 'rows' });
    box.append(this.space);
    box.tabIndex = 0;
    box.addEventListener(
      'scroll',
      () => {
        this.refresh();
      },
      { passive: true },
    );
    new ResizeObserver(() => this.refresh()).observe(box);
    // By place and not by target, and not by click: a live list may replace the row between press and release, and then
    // there is no click. A click without a press is assistive technology's.
    let press = null;
    const pick = (e) => {
      const i = this.at(e.clientY);
      if (i === null) return;
      this.active = i;
      this.onPick(i);
      this.refresh();
    };
    box.addEventListener('pointerdown', (e) => {
      press = e.button === 0 ? [e.clientX, e.clientY] : null;
    });
    box.addEventListener('pointercancel', () => {
      press = null;
    });
    box.addEventListener('pointerup', (e) => {
      if (press && Math.hypot(e.clientX - press[0], e.clientY - press[1]) < 6) pick(e);
      press = null;
    });
    box.addEventListener('click', (e) => {
      if (e.detail === 0) pick(e);
    });
    box.addEventListener('keydown', (e) => this.keydown(e));
  }
  get height() {
    return Math.min(this.count * this.rowHeight, HEIGHT_MAX);
  }
  /** Pixels of the real list above what is in sight. */
  get offset() {
    const full = this.count * this.rowHeight,
      view = this.box.clientHeight,
      room = this.height - view;
    return full <= HEIGHT_MAX || room <= 0 ? this.box.scrollTop : (this.box.scrollTop / room) * (full - view);
  }
  at(clientY) {
    const i = Math.floor((clientY - this.box.getBoundingClientRect().top - this.box.clientTop + this.offset) / this.rowHeight);
    return i >= 0 && i < this.count ? i : null;
  }
  set(count) {
    this.count = count;
    this.space.style.height = `${this.height}px`;
    if (this.active >= count) this.active = count - 1;
    this.refresh();
  }
  refresh() {
    if (this.isQueued) return;
    this.isQueued = true;
    requestAnimationFrame(() => {
      this.isQueued = false;
      this.render();
    });
  }
  render() {
    const offset = this.offset,
      view = this.box.clientHeight,
      shift = this.box.scrollTop - offset;
    this.first = Math.max(0, Math.floor(offset / this.rowHeight));
    this.last = Math.min(this.count - 1, Math.ceil((offset + view) / this.rowHeight));
    this.from = Math.max(0, this.first - BEYOND);
    this.to = Math.min(this.count - 1, this.last + BEYOND);
    const drawn = new Map();
    let place = 0;
    for (let i = this.from; i <= this.to; i++) {
      const sign = this.sign(i),
        row = this.drawn.get(sign) ?? this.draw(i);
      drawn.set(sign, row);
      row.style.transform = `translateY(${i * this.rowHeight + shift}px)`;
      row.style.height = `${this.rowHeight}px`;
      row.id = `${this.box.id}-${i}`;
      row.classList.toggle('active', i === this.active);
      const there = this.space.children[place++];
      if (there !== row) this.space.insertBefore(row, there ?? null);
    }
    while (this.space.children.length > place) this.space.lastChild.remove();
    this.drawn = drawn;
    this.active >= 0
      ? this.box.setAttribute('aria-activedescendant', `${this.box.id}-${this.active}`)
      : this.box.removeAttribute('aria-activedescendant');
  }
  /** Brings a row into sight and makes it the active one. */
  go(index) {
    this.active = Math.max(0, Math.min(this.count - 1, index));
    const top = this.active * this.rowHeight,
      view = this.box.clientHeight,
      offset = this.offset;
    const wanted = top < offset ? top : top + this.rowHeight > offset + view ? top + this.rowHeight - view : offset;
    if (wanted !== offset) {
      const full = this.count * this.rowHeight;
      this.box.scrollTop = full <= HEIGHT_MAX ? wanted : (wanted / (full - view)) * (this.height - view);
    }
    this.refresh();
  }
  keydown(e) {
    if (e.ctrlKey || e.metaKey || e.altKey || this.onKey(e, this.active)) return;
    const page = Math.max(1, Math.floor(this.box.clientHeight / this.rowHeight) - 1);
    const to = {
      ArrowDown: this.active + 1,
      j: this.active + 1,
      ArrowUp: this.active - 1,
      k: this.active - 1,
      PageDown: this.active + page,
      PageUp: this.active - page,
      Home: 0,
      End: this.count - 1,
    }[e.key];
    if (to !== undefined) {
      e.preventDefault();
      if (this.count) this.go(to);
    } else if (e.key === 'Enter' && this.active >= 0 && this.active < this.count) {
      e.preventDefault();
      this.onPick(this.active);
      this.refresh();
    }
  }
}
