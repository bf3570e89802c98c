// Masks of the answers as coloured layers: a row each with name, opacity, visibility, area and download.

export const COLOURS = ["#56b4e9", "#e69f00", "#00c08b", "#cc79a7", "#f0e442", "#d55e00"];

// The content of a data URL.
export function blobOf(url) {
  const [head, content] = url.split(",");
  const bytes = Uint8Array.from(atob(content), (character) => character.charCodeAt(0));
  return new Blob([bytes], { type: head.replace(/^data:|;base64$/g, "") });
}

// A mask or a box of an answer, ready to be painted. `place`: the slice it belongs to, "" for a picture.
export async function layerOf(found, number, place) {
  const colour = COLOURS[number % COLOURS.length];
  const layer = { ...found, number, place, colour, opacity: 0.5, visible: true };
  if (found.png) {
    layer.blob = blobOf(`data:image/png;base64,${found.png}`);
    layer.bitmap = await coloured(layer.blob, colour);
  }
  return layer;
}

async function coloured(blob, colour) {
  const picture = await createImageBitmap(blob);
  const canvas = new OffscreenCanvas(picture.width, picture.height);
  const context = canvas.getContext("2d");
  context.drawImage(picture, 0, 0);
  const pixels = context.getImageData(0, 0, picture.width, picture.height);
  const [red, green, blue] = [1, 3, 5].map((i) => parseInt(colour.slice(i, i + 2), 16));
  for (let i = 0; i < pixels.data.length; i += 4) {
    const inside = pixels.data[i] > 127;
    pixels.data.set([red, green, blue, inside ? 255 : 0], i);
  }
  context.putImageData(pixels, 0, 0);
  return canvas;
}

// `exports`: more formats, {title: (layer) => promise of a blob}.
export function showLayers(list, layers, repaint, exports) {
  list.replaceChildren(...layers.map((layer) => row(layer, repaint, exports)));
}

function row(layer, repaint, exports) {
  const item = document.createElement("li");
  const swatch = Object.assign(document.createElement("span"), { className: "swatch" });
  swatch.style.background = layer.colour;
  const visible = Object.assign(document.createElement("input"), { type: "checkbox", checked: layer.visible });
  visible.addEventListener("change", () => { layer.visible = visible.checked; repaint(); });
  const name = document.createElement("label");
  name.append(visible, ` ${layer.label || `box ${layer.number + 1}`}`);
  const opacity = Object.assign(document.createElement("input"), { type: "range", min: 0, max: 100, value: layer.opacity * 100 });
  opacity.setAttribute("aria-label", `Opacity of ${layer.label}`);
  opacity.addEventListener("input", () => { layer.opacity = opacity.value / 100; repaint(); });
  const facts = Object.assign(document.createElement("span"), { className: "quiet", textContent: factsOf(layer) });
  item.append(swatch, name, opacity, facts, ...savers(layer, exports));
  return item;
}

function factsOf({ area, area_mm2, box, png, predicted_iou }) {
  if (!png) return `(${box.join(", ")})`;
  const size = area_mm2 == null ? `${area.toLocaleString("en")} px` : `${area_mm2.toLocaleString("en")} mm\u00b2`;
  return `${size}, predicted IoU ${predicted_iou.toFixed(2)}`;
}

function savers(layer, exports) {
  const name = `${layer.png ? "mask" : "box"}_${layer.number}`;
  const found = [saver("JSON", async () => asJson(layer), `${name}.json`)];
  if (!layer.png) return found;
  found.unshift(saver("PNG", async () => layer.blob, `${name}.png`));
  found.push(saver("GeoJSON", async () => asGeoJson(layer), `${name}.geojson`));
  for (const [title, { make, suffix }] of Object.entries(exports)) found.push(saver(title, () => make(layer), `${name}${suffix}`));
  return found;
}

function saver(title, make, name) {
  const button = Object.assign(document.createElement("button"), { type: "button", textContent: title });
  button.setAttribute("aria-label", `${title}: save ${name}`);
  button.addEventListener("click", async () => save(await make(), name));
  return button;
}

export function save(blob, name) {
  if (!blob) return;
  const link = Object.assign(document.createElement("a"), { href: URL.createObjectURL(blob), download: name });
  link.click();
  URL.revokeObjectURL(link.href);
}

function asJson({ label, rle, area, area_mm2, box, predicted_iou }) {
  return new Blob([JSON.stringify({ label, rle, area, area_mm2, box, predicted_iou })], { type: "application/json" });
}

// As QuPath reads it; in pixels.
function asGeoJson({ label, polygons }) {
  const coordinates = polygons.map((rings) => rings.map((ring) => [...ring, ring[0]]));
  const properties = { objectType: "annotation", name: label, classification: { name: label } };
  const features = [{ type: "Feature", geometry: { type: "MultiPolygon", coordinates }, properties }];
  return new Blob([JSON.stringify({ type: "FeatureCollection", features })], { type: "application/geo+json" });
}
