// The picture with its masks and the region that is being drawn: zoom, pan, brightness and contrast.

import { Region } from "./shapes.js";

export class Viewer {
  constructor(stage, canvas, onRegion) {
    Object.assign(this, { stage, canvas, onRegion });
    this.context = canvas.getContext("2d");
    this.picture = null;
    this.layers = [];
    this.region = null;
    this.history = [];
    this.tool = "pan";
    this.view = { scale: 1, x: 0, y: 0 };
    this.filter = { level: 0, window: 100 };
    this.pointers = new Map();
    this.listen();
    new ResizeObserver(() => this.resize()).observe(stage);
  }

  // Another picture. One of the same size keeps zoom and place, so that slices can be compared.
  show(picture) {
    const same = this.picture?.width === picture.width && this.picture?.height === picture.height;
    this.picture = picture;
    this.layers = [];
    this.region = null;
    this.history = [];
    if (same) this.paint();
    else this.fit();
  }

  get size() {
    return [this.picture.width, this.picture.height];
  }

  resize() {
    const ratio = window.devicePixelRatio || 1;
    this.canvas.width = Math.round(this.stage.clientWidth * ratio);
    this.canvas.height = Math.round(this.stage.clientHeight * ratio);
    this.fit();
  }

  fit() {
    if (this.picture) {
      const [width, height] = this.size;
      const scale = Math.min(this.canvas.width / width, this.canvas.height / height) * 0.98;
      const x = (this.canvas.width - width * scale) / 2;
      this.view = { scale, x, y: (this.canvas.height - height * scale) / 2 };
    }
    this.paint();
  }

  zoom(factor, x, y) {
    const scale = Math.min(Math.max(this.view.scale * factor, 0.05), 60);
    const grown = scale / this.view.scale;
    this.view = { scale, x: x - (x - this.view.x) * grown, y: y - (y - this.view.y) * grown };
    this.paint();
  }

  paint() {
    const { context, canvas, view } = this;
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.clearRect(0, 0, canvas.width, canvas.height);
    if (!this.picture) return;
    context.setTransform(view.scale, 0, 0, view.scale, view.x, view.y);
    context.imageSmoothingEnabled = view.scale < 3;
    context.filter = `brightness(${100 + this.filter.level}%) contrast(${this.filter.window}%)`;
    context.drawImage(this.picture, 0, 0);
    context.filter = "none";
    for (const layer of this.layers.filter((each) => each.visible)) {
      context.globalAlpha = layer.opacity;
      if (layer.bitmap) context.drawImage(layer.bitmap, 0, 0);
      else this.paintBox(layer);
    }
    context.globalAlpha = 1;
    this.region?.paint(context, view.scale);
  }

  paintBox({ box: [x0, y0, x1, y1], colour, label }) {
    const { context, view } = this;
    context.strokeStyle = context.fillStyle = colour;
    context.lineWidth = 3 / view.scale;
    context.strokeRect(x0, y0, x1 - x0, y1 - y0);
    context.font = `${14 / view.scale}px sans-serif`;
    context.fillText(label, x0, Math.max(y0 - 4 / view.scale, 14 / view.scale));
  }

  setRegion(region) {
    this.region = region;
    this.onRegion(region);
    this.paint();
  }

  undo() {
    if (this.history.length) this.setRegion(this.history.pop());
  }

  clear() {
    if (this.region) this.remember();
    this.setRegion(null);
  }

  remember() {
    const copy = this.region && Object.assign(new Region(this.region.tool, this.region.size), { points: [...this.region.points] });
    this.history = [...this.history.slice(-30), copy];
  }

  place(event) {
    const box = this.canvas.getBoundingClientRect();
    const ratio = this.canvas.width / box.width;
    return [(event.clientX - box.left) * ratio, (event.clientY - box.top) * ratio];
  }

  toPicture([x, y]) {
    return [(x - this.view.x) / this.view.scale, (y - this.view.y) / this.view.scale];
  }

  listen() {
    this.stage.addEventListener("wheel", (event) => {
      if (!this.picture) return;
      event.preventDefault();
      this.zoom(Math.exp(-event.deltaY / 500), ...this.place(event));
    }, { passive: false });
    this.stage.addEventListener("pointerdown", (event) => this.down(event));
    this.stage.addEventListener("pointermove", (event) => this.drag(event));
    for (const name of ["pointerup", "pointercancel"]) this.stage.addEventListener(name, (event) => this.up(event));
  }

  down(event) {
    if (!this.picture) return;
    this.stage.setPointerCapture(event.pointerId);
    this.pointers.set(event.pointerId, this.place(event));
    if (this.pointers.size > 1 || this.tool === "pan") return;
    const at = this.toPicture(this.place(event));
    const goesOn = this.region?.tool === this.tool && ["polygon", "mask"].includes(this.tool);
    this.remember();
    const region = goesOn ? this.region : new Region(this.tool, this.size);
    region.begin(...at);
    this.setRegion(region);
  }

  drag(event) {
    const before = this.pointers.get(event.pointerId);
    if (!before) return;
    const now = this.place(event);
    this.pointers.set(event.pointerId, now);
    if (this.pointers.size === 2) this.pinch(event.pointerId, before, now);
    else if (this.tool === "pan") {
      this.view.x += now[0] - before[0];
      this.view.y += now[1] - before[1];
      this.paint();
    } else if (this.region) {
      this.region.move(...this.toPicture(now));
      this.setRegion(this.region);
    }
  }

  pinch(moved, before, now) {
    const other = [...this.pointers].find(([id]) => id !== moved)[1];
    const distance = ([x, y]) => Math.hypot(x - other[0], y - other[1]) || 1;
    this.zoom(distance(now) / distance(before), ...other);
  }

  up(event) {
    if (this.pointers.delete(event.pointerId) && this.tool !== "pan" && this.region) {
      this.region.end();
      this.setRegion(this.region);
    }
  }
}
