// Curves over steps or time: all charts of a page share what is zoomed to, smoothed and hidden.

const HEIGHT = 210, LEFT = 50, RIGHT = 10, TOP = 10, BOTTOM = 26;

class View {
  constructor() {
    this.axis = 'steps';
    this.domain = null; // [low, high] of the axis, null: all
    this.smoothing = 0;
    this.log = false;
    this.hidden = new Set();
    this.charts = [];
  }
  change(values) {
    Object.assign(this, values);
    this.charts.forEach((chart) => chart.render());
    this.onchange?.();
  }
}

// Exponential moving average, corrected for its start as Adam's moments are (arXiv 1412.6980).
function smooth(values, weight) {
  if (!weight) return values;
  let mean = 0, total = 0;
  return values.map((value) => {
    if (!isNumber(value)) return null;
    mean = weight * mean + (1 - weight) * value;
    total = weight * total + (1 - weight);
    return mean / total;
  });
}

function ticks(low, high, count) {
  const raw = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => s >= raw);
  const found = [];
  for (let value = Math.ceil(low / step - 1e-9) * step; value <= high + step * 1e-6; value += step) {
    found.push(Math.abs(value) < step * 1e-9 ? 0 : Number(value.toPrecision(12)));
  }
  return found;
}

// `series`: [{name, colour, steps, seconds, values, low?, high?, marks?}]; low and high are drawn as whiskers.
class Chart {
  constructor(view, { title, series, fromZero = false, canLog = false, format = figure, choice = null, points = false, noisy = false }) {
    Object.assign(this, { view, series, fromZero, canLog, format, points, noisy });
    this.cursor = null;
    this.svg = draw('svg', { height: HEIGHT, tabindex: 0, role: 'img', 'aria-label': `${title}; arrow keys read values, plus and minus zoom, 0 shows all` });
    this.tip = make('div', { class: 'tip', hidden: true, role: 'status' });
    this.node = make('div', { class: 'chart' }, make('header', {}, make('h3', {}, title), choice), this.svg, this.tip);
    view.charts.push(this);
    this.listen();
    new ResizeObserver(() => this.render()).observe(this.node);
  }
  get smoothing() { return this.noisy ? this.view.smoothing : 0; }
  get visible() { return this.series.filter((s) => !this.view.hidden.has(s.run || s.name)); }
  get full() {
    const ends = this.view.charts.flatMap((c) => c.series).flatMap((s) => { const x = s[this.view.axis]; return x.length ? [x[0], x[x.length - 1]] : []; });
    const low = Math.min(...ends), high = Math.max(...ends);
    return ends.length ? [low, high > low ? high : low + 1] : [0, 1];
  }
  x(value) { const [low, high] = this.domain; return LEFT + (value - low) / (high - low) * (this.width - LEFT - RIGHT); }
  unx(pixel) { const [low, high] = this.domain; return low + (pixel - LEFT) / (this.width - LEFT - RIGHT) * (high - low); }
  y(value) {
    const [low, high] = this.range;
    const at = this.isLog ? (Math.log10(value) - Math.log10(low)) / (Math.log10(high) - Math.log10(low)) : (value - low) / (high - low);
    return HEIGHT - BOTTOM - at * (HEIGHT - TOP - BOTTOM);
  }
  render() {
    this.width = this.node.clientWidth;
    if (!this.width) return;
    this.domain = this.view.domain || this.full;
    const [low, high] = this.domain;
    const lines = this.visible.map((s) => {
      const x = s[this.view.axis];
      let first = x.findIndex((value) => value >= low), last = x.length;
      while (last > 0 && x[last - 1] > high) last--;
      if (first < 0) first = x.length;
      return { s, x, smoothed: smooth(s.values, this.smoothing), first, last };
    });
    const inside = lines.flatMap(({ s, first, last }) => [
      ...s.values.slice(first, last), ...(s.low || []).slice(first, last), ...(s.high || []).slice(first, last),
    ]).filter(isNumber);
    let bottom = inside.length ? inside.reduce((a, b) => Math.min(a, b)) : 0, top = inside.length ? inside.reduce((a, b) => Math.max(a, b)) : 1;
    this.isLog = this.canLog && this.view.log && bottom > 0;
    if (this.isLog) { bottom /= 1.1; top *= 1.1; } else {
      if (this.fromZero) bottom = Math.min(0, bottom);
      const pad = (top - bottom || Math.abs(top) || 1) * 0.06;
      bottom = bottom === 0 ? 0 : bottom - pad;
      top += pad;
    }
    this.range = [bottom, top];
    const parts = [];
    const levels = this.isLog ? logTicks(bottom, top) : ticks(bottom, top, 4);
    for (const level of levels) {
      const y = this.y(level);
      parts.push(draw('line', { class: 'grid', x1: LEFT, x2: this.width - RIGHT, y1: y, y2: y }),
        draw('text', { x: LEFT - 7, y: y + 4, 'text-anchor': 'end' }, this.format(level)));
    }
    const inTime = this.view.axis === 'seconds';
    for (const value of ticks(low, high, Math.max(2, Math.floor(this.width / 110)))) {
      const x = this.x(value);
      if (x < LEFT - 1 || x > this.width - RIGHT + 1) continue;
      parts.push(draw('text', { x, y: HEIGHT - 8, 'text-anchor': x > this.width - 40 ? 'end' : 'middle' }, inTime ? duration(value) : figure(value)));
    }
    parts.push(draw('line', { class: 'axis', x1: LEFT, x2: this.width - RIGHT, y1: HEIGHT - BOTTOM, y2: HEIGHT - BOTTOM }));
    const id = `clip-${this.view.charts.indexOf(this)}`;
    const inner = draw('g', { 'clip-path': `url(#${id})` });
    for (const line of lines) {
      for (const step of line.s.marks || []) {
        if (!inTime) inner.append(draw('line', { class: 'mark', x1: this.x(step), x2: this.x(step), y1: TOP, y2: HEIGHT - BOTTOM }));
      }
      const raw = this.path(line, line.s.values);
      if (this.smoothing) {
        inner.append(draw('path', { d: raw, fill: 'none', stroke: line.s.colour, 'stroke-width': 1, opacity: 0.25 }),
          draw('path', { d: this.path(line, line.smoothed), fill: 'none', stroke: line.s.colour, 'stroke-width': 2, 'stroke-linejoin': 'round' }));
      } else {
        inner.append(draw('path', { d: raw, fill: 'none', stroke: line.s.colour, 'stroke-width': 1.8, 'stroke-linejoin': 'round' }));
      }
      if (this.points) {
        line.x.forEach((value, i) => {
          if (!isNumber(line.s.values[i])) return;
          const x = this.x(value), y = this.y(line.s.values[i]);
          if (isNumber(line.s.low?.[i])) inner.append(draw('line', { x1: x, x2: x, y1: this.y(line.s.low[i]), y2: this.y(line.s.high[i]), stroke: line.s.colour, 'stroke-width': 4, opacity: 0.3 }));
          inner.append(draw('circle', { cx: x, cy: y, r: line.s.best?.[i] ? 5.5 : 3.5, fill: line.s.colour }));
        });
      }
    }
    this.over = draw('g', {});
    this.svg.setAttribute('viewBox', `0 0 ${this.width} ${HEIGHT}`);
    this.svg.replaceChildren(draw('defs', {}, draw('clipPath', { id }, draw('rect', { x: LEFT - 6, y: 0, width: this.width - LEFT - RIGHT + 12, height: HEIGHT - BOTTOM + 4 }))), ...parts, inner, this.over);
    this.lines = lines;
    if (this.cursor !== null) this.read(this.cursor);
  }
  // At most two points a pixel, the lowest and the highest of what falls on it.
  path({ x, first, last }, values) {
    const from = Math.max(0, first - 1), to = Math.min(x.length, last + 1);
    const out = [];
    let pen = 'M';
    const point = (i) => { out.push(`${pen}${this.x(x[i]).toFixed(1)} ${this.y(this.isLog ? Math.max(values[i], this.range[0] / 1e6) : values[i]).toFixed(1)}`); pen = 'L'; };
    const size = Math.max(1, Math.floor((to - from) / (this.width * 2)));
    for (let start = from; start < to; start += size) {
      if (size === 1) { if (isNumber(values[start])) point(start); else pen = 'M'; continue; }
      let low = -1, high = -1;
      for (let i = start; i < Math.min(start + size, to); i++) {
        if (!isNumber(values[i])) continue;
        if (low < 0 || values[i] < values[low]) low = i;
        if (high < 0 || values[i] > values[high]) high = i;
      }
      if (low >= 0) [Math.min(low, high), Math.max(low, high)].forEach((i, k) => { if (k === 0 || low !== high) point(i); });
    }
    return out.join('');
  }
  nearest(value) {
    let best = null;
    for (const { x } of this.lines || []) for (const at of x) if (best === null || Math.abs(at - value) < Math.abs(best - value)) best = at;
    return best;
  }
  read(value) {
    const at = this.nearest(value);
    if (at === null || at < this.domain[0] || at > this.domain[1]) return this.leave();
    this.cursor = at;
    const x = this.x(at), rows = [];
    this.over.replaceChildren(draw('line', { class: 'mark', x1: x, x2: x, y1: TOP, y2: HEIGHT - BOTTOM }));
    for (const { s, x: xs, smoothed } of this.lines) {
      let i = xs.findIndex((v) => v >= at);
      if (i < 0) i = xs.length - 1;
      if (i > 0 && Math.abs(xs[i - 1] - at) < Math.abs(xs[i] - at)) i--;
      if (!isNumber(s.values[i])) continue;
      const y = this.y(smoothed[i]);
      if (Number.isFinite(y)) this.over.append(draw('circle', { cx: this.x(xs[i]), cy: y, r: 4, fill: s.colour }));
      const range = isNumber(s.low?.[i]) ? ` [${this.format(s.low[i])}, ${this.format(s.high[i])}]` : '';
      rows.push(make('div', {}, make('span', { class: 'dot', css: { background: s.colour } }), this.lines.length > 1 ? s.name + ' ' : '',
        make('strong', {}, this.format(s.values[i])), range, this.smoothing ? ` (smoothed ${this.format(smoothed[i])})` : ''));
    }
    this.tip.replaceChildren(make('div', { class: 'soft' }, this.view.axis === 'steps' ? `step ${figure(at)}` : duration(at)), ...rows);
    this.tip.hidden = false;
    const right = x > this.width / 2;
    this.tip.style.left = right ? '' : `${x + 12}px`;
    this.tip.style.right = right ? `${this.width - x + 12}px` : '';
    this.tip.style.top = `${this.svg.offsetTop + TOP}px`;
    return undefined;
  }
  leave() {
    this.cursor = null;
    this.tip.hidden = true;
    this.over?.replaceChildren();
  }
  zoom(factor, centre) {
    const [low, high] = this.domain, middle = centre ?? (low + high) / 2, [least, most] = this.full;
    const next = [Math.max(least, middle - (middle - low) * factor), Math.min(most, middle + (high - middle) * factor)];
    this.view.change({ domain: next[0] <= least && next[1] >= most ? null : next });
  }
  listen() {
    let start = null;
    const at = (event) => event.clientX - this.svg.getBoundingClientRect().left;
    this.svg.addEventListener('pointerdown', (event) => {
      if (event.button !== 0 || !this.width) return;
      start = at(event);
      this.svg.setPointerCapture(event.pointerId);
    });
    this.svg.addEventListener('pointermove', (event) => {
      if (!this.width) return;
      const x = at(event);
      this.read(this.unx(x));
      if (start !== null && Math.abs(x - start) > 4) {
        this.over.append(draw('rect', { class: 'brush', x: Math.min(x, start), y: TOP, width: Math.abs(x - start), height: HEIGHT - TOP - BOTTOM }));
      }
    });
    this.svg.addEventListener('pointerup', (event) => {
      if (start === null) return;
      const ends = [this.unx(start), this.unx(at(event))].sort((a, b) => a - b), wide = Math.abs(at(event) - start) > 8;
      start = null;
      const [low, high] = [Math.max(ends[0], this.domain[0]), Math.min(ends[1], this.domain[1])];
      if (wide && high > low) { this.leave(); this.view.change({ domain: [low, high] }); }
    });
    this.svg.addEventListener('pointercancel', () => { start = null; this.leave(); });
    this.svg.addEventListener('pointerleave', () => { if (start === null) this.leave(); });
    this.svg.addEventListener('blur', () => this.leave());
    this.svg.addEventListener('dblclick', () => this.view.change({ domain: null }));
    this.svg.addEventListener('keydown', (event) => {
      const xs = [...new Set((this.lines || []).flatMap((l) => l.x.slice(l.first, l.last)))].sort((a, b) => a - b);
      const here = this.cursor === null ? -1 : xs.indexOf(this.cursor);
      if (event.key === 'ArrowRight' && xs.length) this.read(xs[Math.min(here + 1, xs.length - 1)]);
      else if (event.key === 'ArrowLeft' && xs.length) this.read(xs[here < 0 ? xs.length - 1 : Math.max(here - 1, 0)]);
      else if (event.key === '+' || event.key === '=') this.zoom(0.5, this.cursor);
      else if (event.key === '-') this.zoom(2, this.cursor);
      else if (event.key === '0' || event.key === 'Escape') { this.leave(); this.view.change({ domain: null }); } else return;
      event.preventDefault();
    });
  }
}

function logTicks(low, high) {
  const found = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++) {
    for (const m of [1, 2, 5]) { const value = m * 10 ** power; if (value >= low && value <= high) found.push(Number(value.toPrecision(3))); }
  }
  return found.length > 7 ? found.filter((value) => /^1/.test(value.toExponential())) : found;
}

// A histogram of `counts` between `edges` (one more than counts).
function histogram(title, edges, counts, unit) {
  const width = 420, height = 150, most = Math.max(...counts, 1), bar = (width - 52) / counts.length;
  const label = (value) => figure(Math.round(value));
  const parts = counts.map((count, i) => draw('rect', {
    x: 46 + i * bar + 0.5, width: Math.max(1, bar - 1), y: 10 + 112 * (1 - count / most), height: Math.max(count ? 1.5 : 0, 112 * count / most), rx: 1.5, fill: COLOURS[0],
  }, draw('title', {}, `${label(edges[i])} to ${label(edges[i + 1] - 1)} ${unit}: ${count}`)));
  for (const level of ticks(0, most, 3).filter(Number.isInteger)) {
    const y = 10 + 112 * (1 - level / most);
    parts.unshift(draw('line', { class: 'grid', x1: 46, x2: width - 6, y1: y, y2: y }), draw('text', { x: 40, y: y + 4, 'text-anchor': 'end' }, figure(level)));
  }
  const marks = [[46, edges[0], 'start'], [(46 + width - 6) / 2, (edges[0] + edges[edges.length - 1]) / 2, 'middle'], [width - 6, edges[edges.length - 1], 'end']];
  return make('div', { class: 'chart' }, make('h3', {}, title), draw('svg', { viewBox: `0 0 ${width} ${height}`, role: 'img', 'aria-label': title },
    parts, marks.map(([x, value, anchor]) => draw('text', { x, y: 140, 'text-anchor': anchor }, anchor === 'end' ? `${label(value)} ${unit}` : label(value)))));
}
