// The frame and its masks: zoom and pan, and the tools that change the masks. What a stroke did goes to `app.stroke`.

const DISTANCE = 6; // pixels within which a pointer that moved has still clicked

export class Stage {
  constructor(canvas, app) {
    Object.assign(this, { canvas, app, context: canvas.getContext('2d'), scale: 1, x: 0, y: 0, fitted: true });
    this.pointers = new Map();
    this.pointer = null; // where it hovers, in pixels of the frame
    this.points = []; // of the polygon in hand
    this.work = null; // the stroke in hand
    this.items = [];
    this.chosen = -1; // of the proposals
    this.turn = 0; // how far Tab or the wheel has gone through those under the pointer
    new ResizeObserver(() => this.resize()).observe(canvas);
    const on = (name, hear, options) => canvas.addEventListener(name, hear.bind(this), options);
    on('pointerdown', this.down);
    on('pointermove', this.move);
    on('pointerup', this.up);
    on('pointercancel', this.cancel);
    on('pointerleave', () => { if (!this.work) { this.pointer = null; this.choose(); } });
    on('wheel', this.wheel, { passive: false });
    on('dblclick', (event) => this.closePolygon(event.shiftKey));
    on('contextmenu', (event) => event.preventDefault());
  }

  // -------------------------------------------------------------------------------------------------- view

  resize() {
    const ratio = devicePixelRatio || 1, { clientWidth, clientHeight } = this.canvas;
    this.canvas.width = Math.round(clientWidth * ratio);
    this.canvas.height = Math.round(clientHeight * ratio);
    if (this.fitted) this.fit(); else this.redraw();
  }

  fit() {
    if (!this.app.mask) return;
    const { width, height } = this.app.mask, { clientWidth: w, clientHeight: h } = this.canvas, top = 60, rest = 16;
    this.scale = Math.max(0.01, Math.min((w - 2 * rest) / width, (h - top - rest) / height));
    this.x = (w - width * this.scale) / 2;
    this.y = top + (h - top - rest - height * this.scale) / 2;
    this.fitted = true;
    this.redraw();
    this.app.zoomed();
  }

  zoom(factor, x = this.canvas.clientWidth / 2, y = this.canvas.clientHeight / 2) {
    const scale = Math.min(40, Math.max(0.02, this.scale * factor));
    this.x = x - ((x - this.x) * scale) / this.scale;
    this.y = y - ((y - this.y) * scale) / this.scale;
    this.scale = scale;
    this.fitted = false;
    this.redraw();
    this.app.zoomed();
  }

  pan(x, y) {
    this.x += x;
    this.y += y;
    this.fitted = false;
    this.redraw();
  }

  place(event) {
    const box = this.canvas.getBoundingClientRect();
    return [(event.clientX - box.left - this.x) / this.scale, (event.clientY - box.top - this.y) / this.scale];
  }

  redraw() {
    if (this.coming) return;
    this.coming = true;
    requestAnimationFrame(() => { this.coming = false; this.draw(); });
  }

  draw() {
    const { context: c, app, canvas, scale } = this, ratio = devicePixelRatio || 1, { mask } = app;
    c.setTransform(1, 0, 0, 1, 0, 0);
    c.clearRect(0, 0, canvas.width, canvas.height);
    if (!mask || !app.bitmap) return;
    c.setTransform(ratio * scale, 0, 0, ratio * scale, ratio * this.x, ratio * this.y);
    c.imageSmoothingEnabled = scale < 4;
    c.imageSmoothingQuality = 'high';
    c.drawImage(app.bitmap, 0, 0, mask.width, mask.height);
    if (app.overlay) c.drawImage(mask.canvas, 0, 0);
    c.imageSmoothingEnabled = true;
    if (app.tool === 'pick' && this.items[this.chosen]) this.drawProposal(this.items[this.chosen]);
    if (this.points.length) this.drawPolygon();
    if ((app.tool === 'brush' || app.tool === 'eraser') && this.pointer) {
      c.beginPath();
      c.arc(...this.pointer, app.size / 2, 0, 2 * Math.PI);
      for (const [style, width] of [['rgb(0 0 0 / .6)', 3], [app.tool === 'eraser' ? '#fff' : app.css(app.current), 1.5]]) {
        c.strokeStyle = style;
        c.lineWidth = width / scale;
        c.stroke();
      }
    }
  }

  drawPolygon() {
    const { context: c, scale, app } = this;
    c.beginPath();
    for (const point of this.points) c.lineTo(...point);
    if (this.pointer) c.lineTo(...this.pointer);
    c.fillStyle = app.css(app.current, 0.25);
    c.fill();
    c.lineWidth = 1.5 / scale;
    c.strokeStyle = '#fff';
    c.stroke();
    for (const [x, y] of this.points) c.fillRect(x - 3 / scale, y - 3 / scale, 6 / scale, 6 / scale);
    c.fillStyle = '#fff';
    for (const [x, y] of this.points) c.fillRect(x - 2.5 / scale, y - 2.5 / scale, 5 / scale, 5 / scale);
  }

  // --------------------------------------------------------------------------------------------- proposals

  /** of: the frame that they are of. */
  show(proposals, of = null) {
    const { width, height, items } = proposals || { width: 1, height: 1, items: [] };
    this.of = of;
    this.small = { width, height };
    this.items = items.map((item) => ({ ...item, inside: turnsToBits(item.mask, width * height) }));
    this.chosen = -1;
    this.turn = 0;
    this.choose();
  }

  /** Those under the pointer, the smallest first; without a pointer all of them, the best first. */
  candidates() {
    const all = this.items.map((_, k) => k);
    if (!this.pointer) return this.turned ? all : [];
    const { mask } = this.app, [x, y] = this.pointer;
    if (x < 0 || y < 0 || x >= mask.width || y >= mask.height) return [];
    const at = Math.floor((y * this.small.height) / mask.height) * this.small.width + Math.floor((x * this.small.width) / mask.width);
    return all.filter((k) => this.items[k].inside[at]).sort((a, b) => this.items[a].area - this.items[b].area);
  }

  choose(turn = 0) {
    if (turn) this.turned = true;
    const under = this.candidates(), key = under.join();
    if (key !== this.key) { this.key = key; this.turn = 0; if (turn < 0) this.turn = turn; } else this.turn += turn;
    const count = under.length, place = count ? ((this.turn % count) + count) % count : 0;
    this.chosen = count ? under[place] : -1;
    this.app.pointed(count ? { place: place + 1, count, score: this.items[this.chosen].score } : null);
    this.redraw();
    return count;
  }

  drawProposal(item) {
    const { width, height } = this.small, { app, context: c } = this, colour = app.css(app.current);
    if (!item.picture || item.colour !== colour) {
      item.colour = colour;
      item.picture = new OffscreenCanvas(width, height);
      const context = item.picture.getContext('2d'), image = context.createImageData(width, height);
      const [r, g, b] = app.rgb(app.current), inside = item.inside;
      for (let at = 0; at < inside.length; at++) {
        if (!inside[at]) continue;
        const x = at % width;
        const inner = x > 0 && x < width - 1 && inside[at - 1] && inside[at + 1] && inside[at - width] && inside[at + width];
        image.data.set(inner ? [r, g, b, 110] : [255, 255, 255, 255], 4 * at);
      }
      context.putImageData(image, 0, 0);
    }
    c.drawImage(item.picture, 0, 0, app.mask.width, app.mask.height);
  }

  /** how: 'give' the proposal to the current object, 'take' it away, or 'replace' the object's mask with it. */
  async give(how = this.app.mode) {
    const item = this.items[this.chosen];
    if (item && this.app.tool === 'pick') await this.app.giveProposal(item.number, how).catch(this.app.fail);
  }

  // ---------------------------------------------------------------------------------------------- pointers

  down(event) {
    this.canvas.focus({ preventScroll: true });
    this.pointers.set(event.pointerId, event);
    this.canvas.setPointerCapture(event.pointerId);
    this.pointer = this.place(event);
    if (this.pointers.size === 2) { this.dropStroke(); this.panning = null; return; }
    this.start = event;
    if (event.button === 1 || event.button === 2 || this.app.tool === 'hand') this.panning = event;
    else if (event.button === 0 && (this.app.tool === 'brush' || this.app.tool === 'eraser')) this.begin(event);
    else if (this.app.tool === 'pick') this.choose();
  }

  move(event) {
    const before = this.pointers.get(event.pointerId);
    if (this.pointers.size === 2 && before) {
      this.pinch(before, event);
      return;
    }
    this.pointer = this.place(event);
    if (this.panning) {
      this.pan(event.clientX - this.panning.clientX, event.clientY - this.panning.clientY);
      this.panning = event;
    } else if (this.work) {
      for (const each of event.getCoalescedEvents?.() ?? [event]) this.dab(this.place(each));
    } else if (this.app.tool === 'pick') this.choose();
    this.redraw();
  }

  pinch(before, event) {
    const other = [...this.pointers.values()].find((p) => p.pointerId !== event.pointerId), box = this.canvas.getBoundingClientRect();
    const apart = (a, b) => Math.hypot(a.clientX - b.clientX, a.clientY - b.clientY) || 1;
    const middle = (e) => [(e.clientX + other.clientX) / 2 - box.left, (e.clientY + other.clientY) / 2 - box.top];
    const from = middle(before), to = middle(event);
    this.pan(to[0] - from[0], to[1] - from[1]);
    this.zoom(apart(event, other) / apart(before, other), ...to);
    this.pointers.set(event.pointerId, event);
  }

  async up(event) {
    const many = this.pointers.size > 1;
    this.pointers.delete(event.pointerId);
    this.pointer = this.place(event);
    if (this.panning) { this.panning = null; return; }
    if (this.work) { this.finish(); return; }
    const still = this.start && Math.hypot(event.clientX - this.start.clientX, event.clientY - this.start.clientY) < DISTANCE;
    if (many || !still || event.button !== 0) return;
    if (this.app.tool === 'pick') await this.give(event.shiftKey ? 'take' : event.altKey ? 'replace' : this.app.mode);
    if (this.app.tool === 'polygon') this.corner(event);
  }

  cancel(event) {
    this.pointers.delete(event.pointerId);
    this.dropStroke();
    this.panning = null;
  }

  wheel(event) {
    event.preventDefault();
    const box = this.canvas.getBoundingClientRect();
    if (this.app.tool === 'pick' && !event.ctrlKey && !event.metaKey && this.candidates().length) {
      if (Math.abs(event.deltaY) > 1) this.choose(event.deltaY > 0 ? 1 : -1);
    } else this.zoom(Math.exp(-event.deltaY * (event.deltaMode ? 0.05 : 0.002)), event.clientX - box.left, event.clientY - box.top);
  }

  // ----------------------------------------------------------------------------------------------- strokes

  /** Whether a stroke or a polygon is in hand. */
  get busy() { return Boolean(this.work || this.points.length); }

  async begin(event) {
    const { app } = this, taking = app.tool === 'eraser' || event.shiftKey || app.mode === 'take';
    if (!app.current) {
      if (taking) return;
      await app.addObject();
      if (!this.pointers.size) return;
    }
    this.work = { id: taking ? 0 : app.current, only: taking ? app.current : -1, before: app.mask.ids.slice(), rect: null, last: null };
    this.dab(this.pointer);
    this.redraw();
  }

  dab([x, y]) {
    const { work, app } = this, radius = app.size / 2, [x0, y0] = work.last ?? [x, y];
    const steps = Math.max(1, Math.ceil(Math.hypot(x - x0, y - y0) / Math.max(0.5, radius / 3)));
    let touched = null;
    for (let k = work.last ? 1 : 0; k <= steps; k++) {
      const rect = app.mask.disc(x0 + ((x - x0) * k) / steps, y0 + ((y - y0) * k) / steps, radius, work.id, work.only);
      touched = union(touched, rect);
    }
    work.last = [x, y];
    work.rect = union(work.rect, touched);
    app.mask.draw(touched);
    this.redraw();
  }

  finish() {
    const { before, rect } = this.work;
    this.work = null;
    this.app.stroke(before, rect);
    this.redraw();
  }

  /** The stroke or polygon in hand never was. */
  dropStroke() {
    if (this.work) {
      this.app.mask.ids.set(this.work.before);
      this.app.mask.draw();
      this.work = null;
    }
    this.points = [];
    this.redraw();
  }

  async corner(event) {
    const [x, y] = this.pointer, [first] = this.points;
    if (!this.app.current) await this.app.addObject();
    if (first && this.points.length > 2 && Math.hypot(x - first[0], y - first[1]) * this.scale < 10) this.closePolygon(event.shiftKey);
    else this.points.push([x, y]);
    this.redraw();
  }

  closePolygon(shift = false) {
    const { app, points } = this, taking = shift || app.mode === 'take';
    if (app.tool !== 'polygon' || points.length < 3) return;
    this.points = [];
    const before = app.mask.ids.slice();
    const rect = app.mask.polygon(points, taking ? 0 : app.current, taking ? app.current : -1);
    if (rect) app.stroke(before, rect);
    this.redraw();
  }
}

function union(a, b) {
  if (!a || !b) return a || b;
  return [Math.min(a[0], b[0]), Math.min(a[1], b[1]), Math.max(a[2], b[2]), Math.max(a[3], b[3])];
}

function turnsToBits(turns, size) {
  const bits = new Uint8Array(size);
  let at = 0;
  turns.forEach((length, k) => { if (k % 2) bits.fill(1, at, at + length); at += length; });
  return bits;
}
