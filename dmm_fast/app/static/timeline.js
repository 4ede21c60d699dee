// Every frame on one line: what is done, each object's score, where it was lost, and which masks were given.

const TOP = 24, LANE = 22, GUTTER = 118, RIGHT = 10;
const OPEN = 0, STALE = 2;

export class Timeline {
  constructor(box, app) {
    Object.assign(this, { box, app, canvas: box.querySelector('canvas') });
    this.context = this.canvas.getContext('2d');
    this.last = -1; // the frame that was recorded last
    this.lost = []; // in it
    new ResizeObserver(() => this.redraw()).observe(box);
    box.addEventListener('pointerdown', (event) => {
      box.setPointerCapture(event.pointerId);
      this.scrubbing = true;
      this.scrub(event);
    });
    box.addEventListener('pointermove', (event) => { if (this.scrubbing) this.scrub(event); });
    for (const name of ['pointerup', 'pointercancel']) box.addEventListener(name, () => { this.scrubbing = false; });
  }

  get width() { return this.box.clientWidth - GUTTER - RIGHT; }

  scrub(event) {
    const { frames } = this.app.clip, x = event.clientX - this.box.getBoundingClientRect().left - GUTTER;
    this.app.goto(Math.min(frames - 1, Math.max(0, Math.floor((x / this.width) * frames))), { byHand: true });
  }

  at(frame) { return GUTTER + ((frame + 0.5) / this.app.clip.frames) * this.width; }

  /** A frame that was just done. */
  record(frame, objects) {
    const { timeline } = this, bin = Math.floor(frame / timeline.width);
    if (timeline.width === 1 || (frame + 1) % timeline.width === 0) timeline.status[bin] = 1;
    const lost = objects.filter((entry) => entry.lost).map((entry) => entry.id);
    timeline.lost = timeline.lost.filter((other) => other !== frame);
    if (frame !== this.last + 1) this.lost = [];
    if (lost.some((id) => !this.lost.includes(id))) timeline.lost.push(frame);
    this.lost = lost;
    this.last = frame;
    for (const id of Object.keys(timeline.scores)) timeline.scores[id][bin] = timeline.width === 1 ? null : timeline.scores[id][bin];
    for (const entry of objects) {
      const scores = timeline.scores[entry.id];
      if (!scores) continue;
      const value = entry.given ? 1 : entry.lost ? 0 : Math.max(entry.score, 0.001);
      scores[bin] = timeline.width === 1 || scores[bin] === null ? value : Math.min(value, scores[bin]);
    }
    this.redraw();
  }

  redraw() {
    if (this.coming || !this.timeline) return;
    this.coming = true;
    requestAnimationFrame(() => { this.coming = false; this.draw(); });
  }

  draw() {
    const { context: c, canvas, app, timeline } = this, ratio = devicePixelRatio || 1;
    const width = this.box.clientWidth, height = TOP + 12 + Math.max(1, app.objects.length) * LANE + 4;
    if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
      canvas.width = Math.round(width * ratio);
      canvas.height = Math.round(height * ratio);
      canvas.style.height = `${height}px`;
    }
    c.setTransform(ratio, 0, 0, ratio, 0, 0);
    c.clearRect(0, 0, width, height);
    c.font = '11.5px system-ui, "DejaVu Sans", sans-serif';
    c.textBaseline = 'middle';
    this.drawTicks(c);
    this.drawStatus(c, timeline);
    app.objects.forEach((object, k) => this.drawLane(c, object, TOP + 12 + k * LANE, timeline));
    if (!app.objects.length) { c.fillStyle = '#6f727a'; c.fillText('Objects and their scores appear here.', GUTTER + 4, TOP + 12 + LANE / 2); }
    this.drawHead(c, height);
    const { frame, clip } = app;
    this.box.setAttribute('aria-valuenow', frame + 1);
    this.box.setAttribute('aria-valuemax', clip.frames);
    this.box.setAttribute('aria-valuetext', `Frame ${frame + 1} of ${clip.frames}`);
  }

  drawTicks(c) {
    const { frames } = this.app.clip, wanted = frames / Math.max(2, this.width / 80);
    const step = [1, 2, 5].flatMap((n) => [0, 1, 2, 3, 4, 5, 6].map((e) => n * 10 ** e)).sort((a, b) => a - b).find((s) => s >= wanted);
    c.fillStyle = '#83868e';
    c.textAlign = 'center';
    for (let number = step > 2 ? 0 : 1; number <= frames; number += step) c.fillText(number || 1, this.at((number || 1) - 1), 9);
    c.textAlign = 'left';
  }

  drawStatus(c, { status }) {
    const bin = this.width / status.length;
    status.forEach((state, k) => {
      c.fillStyle = state === OPEN ? '#26292f' : '#5b616b';
      c.fillRect(GUTTER + k * bin, TOP, bin + 0.5, 5);
    });
    c.strokeStyle = '#c9a045';
    c.lineWidth = 1.5;
    spans(status, (state) => state === STALE).forEach(([from, to]) => {
      const [x0, x1] = [GUTTER + from * bin, GUTTER + to * bin];
      c.save();
      c.beginPath();
      c.rect(x0, TOP - 1, x1 - x0, 7);
      c.fillStyle = '#2b2618';
      c.fill();
      c.clip();
      c.beginPath();
      for (let x = x0 - 8; x < x1; x += 5) { c.moveTo(x, TOP + 7); c.lineTo(x + 8, TOP - 1); }
      c.stroke();
      c.restore();
    });
  }

  drawLane(c, object, top, timeline) {
    const { app } = this, scores = timeline.scores[object.id] ?? [], bin = this.width / Math.max(1, scores.length);
    const low = top + LANE - 4, high = top + 3, active = object.id === app.current;
    c.fillStyle = active ? '#24272c' : '#1f2126';
    c.fillRect(GUTTER, top + 1, this.width, LANE - 2);
    c.fillStyle = app.css(object.id);
    c.beginPath();
    c.roundRect(2, top + 7, 9, 9, 3);
    c.fill();
    c.fillStyle = active ? '#e9e9e6' : '#9b9ea6';
    c.fillText(fitted(c, object.name, GUTTER - 26), 18, top + LANE / 2 + 0.5);
    spans(scores, (score) => score === 0).forEach(([from, to]) => {
      c.fillStyle = 'rgb(226 101 95 / .55)';
      c.fillRect(GUTTER + from * bin, top + 1, Math.max(2, (to - from) * bin), LANE - 2);
    });
    spans(scores, (score) => score !== null && score !== 0).forEach(([from, to]) => {
      const x = (k) => GUTTER + (k + 0.5) * bin, y = (k) => low - scores[k] * (low - high);
      c.beginPath();
      c.moveTo(x(from) - bin / 2, y(from));
      for (let k = from; k < to; k++) c.lineTo(x(k), y(k));
      c.lineTo(x(to - 1) + bin / 2, y(to - 1));
      c.strokeStyle = app.css(object.id);
      c.lineWidth = 1.5;
      c.stroke();
      c.lineTo(x(to - 1) + bin / 2, low + 3);
      c.lineTo(x(from) - bin / 2, low + 3);
      c.fillStyle = app.css(object.id, 0.16);
      c.fill();
    });
    for (const [frame, ids] of Object.entries(timeline.ends)) {
      if (!ids.includes(object.id)) continue;
      c.fillStyle = '#e9e9e6';
      c.fillRect(this.at(+frame) - 1, top + 4, 2, LANE - 8);
    }
    for (const [frame, ids] of Object.entries(timeline.given)) {
      if (!ids.includes(object.id)) continue;
      const x = this.at(+frame), y = top + LANE / 2;
      c.beginPath();
      c.moveTo(x, y - 5.5); c.lineTo(x + 5.5, y); c.lineTo(x, y + 5.5); c.lineTo(x - 5.5, y);
      c.closePath();
      c.fillStyle = '#f2f2ee';
      c.strokeStyle = '#141518';
      c.fill();
      c.stroke();
    }
  }

  drawHead(c, height) {
    const x = this.at(this.app.frame), text = String(this.app.frame + 1), half = c.measureText(text).width / 2 + 6;
    c.fillStyle = '#6cb6e8';
    c.fillRect(x - 0.75, 16, 1.5, height - 18);
    c.beginPath();
    c.roundRect(x - half, 0, 2 * half, 18, 5);
    c.fill();
    c.fillStyle = '#0d1a24';
    c.textAlign = 'center';
    c.fillText(text, x, 9.5);
    c.textAlign = 'left';
  }
}

/** [from, to) of every run of values that `is` true of. */
function spans(values, is) {
  const found = [];
  values.forEach((value, k) => {
    if (!is(value)) return;
    const last = found[found.length - 1];
    if (last && last[1] === k) last[1] = k + 1; else found.push([k, k + 1]);
  });
  return found;
}

function fitted(c, text, width) {
  if (c.measureText(text).width <= width) return text;
  while (text && c.measureText(`${text}…`).width > width) text = text.slice(0, -1);
  return `${text}…`;
}
