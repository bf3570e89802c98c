// Regions that a user draws: how each tool collects points, how it is painted, and what the server is sent.

export const TOOLS = [
  { name: "pan", title: "Move", key: "m" },
  { name: "point", title: "Point", key: "p" },
  { name: "box", title: "Box", key: "b" },
  { name: "polygon", title: "Polygon", key: "g" },
  { name: "scribble", title: "Scribble", key: "s" },
  { name: "mask", title: "Brush", key: "r" },
];

export const BRUSH = 1 / 40; // radius of the brush, of the picture's longest side

export class Region {
  constructor(tool, size) {
    this.tool = tool;
    this.size = size; // [width, height] of the picture
    this.points = [];
  }

  begin(x, y) {
    const [px, py] = this.inside(x, y);
    if (this.tool === "polygon") this.points.push(px, py);
    else if (this.tool === "mask") this.points.push(px, py, NaN, NaN); // NaN ends a stroke
    else this.points = this.tool === "box" ? [px, py, px, py] : [px, py];
    if (this.tool === "mask") this.points.splice(-2, 2);
  }

  move(x, y) {
    const [px, py] = this.inside(x, y);
    if (this.tool === "box") this.points.splice(2, 2, px, py);
    else if (this.tool === "scribble" || this.tool === "mask") this.points.push(px, py);
    else if (this.tool === "point") this.points = [px, py];
  }

  end() {
    if (this.tool === "mask") this.points.push(NaN, NaN);
  }

  inside(x, y) {
    const [width, height] = this.size;
    return [Math.min(Math.max(x, 0), width - 0.001), Math.min(Math.max(y, 0), height - 0.001)];
  }

  get complete() {
    const [x0, y0, x1, y1] = this.points;
    if (this.tool === "polygon") return this.points.length >= 6;
    if (this.tool === "box") return Math.abs(x1 - x0) >= 1 && Math.abs(y1 - y0) >= 1;
    return this.points.length >= 2;
  }

  // What the server's field `regions` holds.
  asRequest() {
    if (this.tool === "mask") return { type: "mask", rle: runLengths(this.mask(), this.size) };
    const points = this.tool === "box" ? ordered(this.points) : this.points;
    return { type: this.tool, points: points.map((value) => Math.round(value * 1000) / 1000) };
  }

  paint(context, scale) {
    context.save();
    context.strokeStyle = context.fillStyle = "#00e5ff";
    context.lineWidth = 2 / scale;
    context.lineJoin = context.lineCap = "round";
    const path = pathOf(this.points, this.tool === "polygon");
    if (this.tool === "box") {
      const [x0, y0, x1, y1] = ordered(this.points);
      context.strokeRect(x0, y0, x1 - x0, y1 - y0);
    } else if (this.tool === "point") {
      context.beginPath();
      context.arc(this.points[0], this.points[1], 5 / scale, 0, 2 * Math.PI);
      context.fill();
    } else if (this.tool === "mask") {
      context.globalAlpha = 0.5;
      this.brush(context);
    } else context.stroke(path);
    context.restore();
  }

  brush(context) {
    context.lineWidth = 2 * BRUSH * Math.max(...this.size);
    context.lineJoin = context.lineCap = "round";
    context.stroke(pathOf(this.points, false));
  }

  // 0/1 by row, as wide as the picture.
  mask() {
    const [width, height] = this.size;
    const canvas = new OffscreenCanvas(width, height);
    const context = canvas.getContext("2d");
    context.strokeStyle = "#fff";
    this.brush(context);
    const pixels = context.getImageData(0, 0, width, height).data;
    return Uint8Array.from({ length: width * height }, (_, i) => (pixels[4 * i + 3] > 127 ? 1 : 0));
  }
}

function pathOf(points, closed) {
  const path = new Path2D();
  let begun = false;
  for (let i = 0; i < points.length; i += 2) {
    if (Number.isNaN(points[i])) begun = false;
    else if (begun) path.lineTo(points[i], points[i + 1]);
    else {
      path.moveTo(points[i], points[i + 1]);
      path.lineTo(points[i] + 0.01, points[i + 1]); // a stroke of one point is a dot
      begun = true;
    }
  }
  if (closed && points.length >= 6) path.closePath();
  return path;
}

function ordered([x0, y0, x1, y1]) {
  return [Math.min(x0, x1), Math.min(y0, y1), Math.max(x0, x1), Math.max(y0, y1)];
}

// Run lengths by columns, the first run is of zeros.
export function runLengths(mask, [width, height]) {
  const counts = [];
  let value = 0;
  let run = 0;
  for (let x = 0; x < width; x++) {
    for (let y = 0; y < height; y++) {
      if (mask[y * width + x] === value) run++;
      else {
        counts.push(run);
        value = 1 - value;
        run = 1;
      }
    }
  }
  return { size: [height, width], counts: [...counts, run] };
}
