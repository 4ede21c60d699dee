// An id map of the frame's size: runs in and out, painting, and drawing it in the objects' colours.

export class Mask {
  constructor(width, height) {
    this.width = width;
    this.height = height;
    this.ids = new Uint8Array(width * height);
    this.canvas = new OffscreenCanvas(width, height);
    this.context = this.canvas.getContext('2d');
    this.edge = Math.max(1, Math.round(Math.min(width, height) / 420));
    this.palette = new Uint32Array(512); // fills, then edges
  }

  // ------------------------------------------------------------------------------------------------ runs

  load(runs) {
    fillRuns(this.ids, runs);
    this.draw();
  }

  runs() {
    const { ids } = this, codes = [], longest = 0xffffff;
    for (let start = 0, i = 1; i <= ids.length; i++) {
      if (i === ids.length || ids[i] !== ids[start] || i - start === longest) {
        codes.push(((i - start) * 256 + ids[start]) >>> 0);
        start = i;
      }
    }
    return new Uint32Array(codes);
  }

  // -------------------------------------------------------------------------------------------- painting
  // Each returns the rectangle [x0, y0, x1, y1] that it touched. `only`: the id that may be painted over, or -1 for all.

  disc(x, y, radius, id, only = -1) {
    const { width, height, ids } = this;
    const y0 = Math.max(0, Math.ceil(y - radius)), y1 = Math.min(height - 1, Math.floor(y + radius));
    for (let row = y0; row <= y1; row++) {
      const half = Math.sqrt(Math.max(0, radius * radius - (row - y) ** 2));
      const x0 = Math.max(0, Math.ceil(x - half)), x1 = Math.min(width - 1, Math.floor(x + half));
      for (let at = row * width + x0, end = row * width + x1; at <= end; at++) if (only < 0 || ids[at] === only) ids[at] = id;
    }
    return [Math.max(0, Math.floor(x - radius)), y0, Math.min(width, Math.ceil(x + radius) + 1), y1 + 1];
  }

  polygon(points, id, only = -1) {
    const { width, height, ids } = this;
    const xs = points.map((p) => p[0]), ys = points.map((p) => p[1]);
    const x0 = Math.max(0, Math.floor(Math.min(...xs))), x1 = Math.min(width, Math.ceil(Math.max(...xs)) + 1);
    const y0 = Math.max(0, Math.floor(Math.min(...ys))), y1 = Math.min(height, Math.ceil(Math.max(...ys)) + 1);
    if (x1 <= x0 || y1 <= y0) return null;
    const context = new OffscreenCanvas(x1 - x0, y1 - y0).getContext('2d');
    context.beginPath();
    points.forEach(([x, y]) => context.lineTo(x - x0, y - y0));
    context.fill();
    const { data } = context.getImageData(0, 0, x1 - x0, y1 - y0);
    for (let y = y0, k = 3; y < y1; y++) {
      for (let x = x0; x < x1; x++, k += 4) {
        const at = y * width + x;
        if (data[k] > 127 && (only < 0 || ids[at] === only)) ids[at] = id;
      }
    }
    return [x0, y0, x1, y1];
  }

  stamp(runs, id, only = -1) {
    const inside = fillRuns(new Uint8Array(this.ids.length), runs);
    for (let at = 0; at < inside.length; at++) if (inside[at] && (only < 0 || this.ids[at] === only)) this.ids[at] = id;
    return [0, 0, this.width, this.height];
  }

  erase(id) {
    for (let at = 0; at < this.ids.length; at++) if (this.ids[at] === id) this.ids[at] = 0;
    return [0, 0, this.width, this.height];
  }

  // ----------------------------------------------------------------------------------- what a stroke did

  /** What differs from `before`: the smallest rectangle, its pixels then and now, and the objects concerned; or null. */
  change(before, [x0, y0, x1, y1]) {
    const { width, ids } = this, labels = new Set();
    let left = x1, right = x0, top = y1, bottom = y0;
    for (let y = y0; y < y1; y++) {
      for (let x = x0, at = y * width + x0; x < x1; x++, at++) {
        if (before[at] !== ids[at]) {
          labels.add(before[at]).add(ids[at]);
          if (x < left) left = x;
          if (x >= right) right = x + 1;
          if (y < top) top = y;
          bottom = y + 1;
        }
      }
    }
    if (!labels.size) return null;
    labels.delete(0);
    const rect = [left, top, right, bottom];
    return { rect, before: this.cut(before, rect), after: this.cut(ids, rect), labels: [...labels] };
  }

  cut(ids, [x0, y0, x1, y1]) {
    const part = new Uint8Array((x1 - x0) * (y1 - y0));
    for (let y = y0; y < y1; y++) part.set(ids.subarray(y * this.width + x0, y * this.width + x1), (y - y0) * (x1 - x0));
    return part;
  }

  /** Where `part` differs from `other`; the rest of the rectangle may have changed since they were cut. */
  paste(part, other, [x0, y0, x1, y1]) {
    for (let y = y0, k = 0; y < y1; y++) {
      for (let at = y * this.width + x0, end = y * this.width + x1; at < end; at++, k++) if (part[k] !== other[k]) this.ids[at] = part[k];
    }
    this.draw([x0, y0, x1, y1]);
  }

  has(id) { return this.ids.includes(id); }

  // --------------------------------------------------------------------------------------------- drawing

  colour(colours, strength) {
    const alpha = Math.round(255 * strength);
    for (let id = 1; id < 256; id++) {
      const [r, g, b] = colours[id];
      const base = (b << 16) | (g << 8) | r; // little-endian RGBA
      this.palette[id] = ((alpha << 24) | base) >>> 0;
      this.palette[256 + id] = ((Math.min(255, alpha * 2.2) << 24) | base) >>> 0;
    }
    this.draw();
  }

  draw(rect = [0, 0, this.width, this.height]) {
    const { width, height, ids, palette, edge } = this;
    const x0 = Math.max(0, rect[0] - edge), y0 = Math.max(0, rect[1] - edge);
    const x1 = Math.min(width, rect[2] + edge), y1 = Math.min(height, rect[3] + edge);
    if (x1 <= x0 || y1 <= y0) return;
    const image = new ImageData(x1 - x0, y1 - y0), pixels = new Uint32Array(image.data.buffer), step = edge * width;
    for (let y = y0, k = 0; y < y1; y++) {
      for (let x = x0, at = y * width + x0; x < x1; x++, at++, k++) {
        const id = ids[at];
        if (id) {
          const inner = (x < edge || ids[at - edge] === id) && (x >= width - edge || ids[at + edge] === id)
            && (y < edge || ids[at - step] === id) && (y >= height - edge || ids[at + step] === id);
          pixels[k] = palette[inner ? id : 256 + id];
        }
      }
    }
    this.context.putImageData(image, x0, y0);
  }
}

export function fillRuns(ids, runs) {
  let at = 0;
  for (const code of runs) {
    const length = code >>> 8;
    ids.fill(code & 255, at, at + length);
    at += length;
  }
  return ids;
}
