// Masks of the answers as coloured layers: a row each with name, opacity, visibility, area and download.

export const COLOURS = ["#56b4e9", "#e69f00", "#00c08b", "#cc79a7", "#f0e442", "#d55e00"];

// The content of a data URL.
export function blobOf(url) {
  const [head, content] = url.split(",");
  const bytes = Uint8Array.from(atob(content), (character) => character.charCodeAt(0));
  return new Blob([bytes], { type: head.replace(/^data:|;base64$/g, "") });
}

export async function layerOf(mask, number) {
  const colour = COLOURS[number % COLOURS.length];
  const blob = blobOf(`data:image/png;base64,${mask.png}`);
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
  return { ...mask, colour, blob, bitmap: canvas, opacity: 0.5, visible: true };
}

export function showLayers(list, layers, repaint) {
  list.replaceChildren(...layers.map((layer, number) => row(layer, number, repaint)));
}

function row(layer, number, repaint) {
  const item = document.createElement("li");
  const swatch = Object.assign(document.createElement("span"), { className: "swatch" });
  swatch.style.background = layer.colour;
  const visible = Object.assign(document.createElement("input"), { type: "checkbox", checked: layer.visible });
  visible.addEventListener("change", () => { layer.visible = visible.checked; repaint(); });
  const name = document.createElement("label");
  name.append(visible, ` ${layer.label}`);
  const opacity = Object.assign(document.createElement("input"), { type: "range", min: 0, max: 100, value: layer.opacity * 100 });
  opacity.setAttribute("aria-label", `Opacity of ${layer.label}`);
  opacity.addEventListener("input", () => { layer.opacity = opacity.value / 100; repaint(); });
  const facts = Object.assign(document.createElement("span"), { className: "quiet" });
  facts.textContent = `${layer.area.toLocaleString("en")} px, predicted IoU ${layer.predicted_iou.toFixed(2)}`;
  item.append(swatch, name, opacity, facts, saver("PNG", layer.blob, `mask_${number}.png`), saver("JSON", asJson(layer), `mask_${number}.json`));
  return item;
}

function saver(title, blob, name) {
  const button = Object.assign(document.createElement("button"), { type: "button", textContent: title });
  button.setAttribute("aria-label", `Save ${name}`);
  button.addEventListener("click", () => {
    const link = Object.assign(document.createElement("a"), { href: URL.createObjectURL(blob), download: name });
    link.click();
    URL.revokeObjectURL(link.href);
  });
  return button;
}

function asJson({ label, rle, area, box, predicted_iou }) {
  return new Blob([JSON.stringify({ label, rle, area, box, predicted_iou })], { type: "application/json" });
}
