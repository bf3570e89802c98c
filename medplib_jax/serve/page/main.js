// Puts the page together: files in, questions out, answers and masks back; a reload keeps the conversation.

import { COLOURS, blobOf, layerOf, showLayers } from "./masks.js";
import { Scan, droppedFiles, isPicture } from "./scan.js";
import { TOOLS } from "./shapes.js";
import { ask, modelNames } from "./talk.js";
import { Viewer } from "./viewer.js";

const $ = (id) => document.getElementById(id);
const KEPT = "conversation";
// `begin`: where the conversation about the picture that is shown begins; `found`: masks and boxes, each with its place.
const state = { messages: [], begin: 0, found: [], picture: null, asking: null };
const viewer = new Viewer($("stage"), $("canvas"), () => status(""));
const scan = new Scan(showSlice, status);
const EXPORTS = {
  NIfTI: { suffix: ".nii.gz", make: (layer) => scan.exported(layer, "nifti") },
  "DICOM SEG": { suffix: ".dcm", make: (layer) => scan.exported(layer, "dicom_seg") },
};

function status(text, wrong = false) {
  $("status").textContent = text;
  $("status").classList.toggle("wrong", wrong);
}

function keep() {
  const { messages, begin, found, picture } = state;
  try {
    sessionStorage.setItem(KEPT, JSON.stringify({ messages, begin, found, picture: scan.info ? null : picture, scan: scan.kept }));
  } catch {
    status("This conversation is too large to survive a reload.");
  }
}

function asUrl(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });
}

async function openFiles(files) {
  if (!files.length) return;
  restart();
  scan.close();
  try {
    if (isPicture(files)) await showPicture(await asUrl(files[0]), files[0].name);
    else {
      status("Loading the scan ...");
      await scan.upload(files);
      status("");
    }
    keep();
  } catch (error) {
    status(`This cannot be opened: ${error.message}`, true);
  }
}

async function showPicture(url, name) {
  try {
    viewer.show(await createImageBitmap(blobOf(url), { imageOrientation: "from-image" }));
  } catch {
    return status(`${name} cannot be shown: expected a PNG, JPEG, WebP or BMP picture, or a scan.`, true);
  }
  state.picture = url;
  $("hint").hidden = $("examples").hidden = true;
}

// A slice of the scan with what a job found on it, and what was answered about it.
async function showSlice(picture, masks) {
  await showPicture(await asUrl(picture), "This slice");
  state.begin = state.messages.length + (state.asking ? 1 : 0); // behind the answer that is on its way
  const own = await Promise.all(masks.map((mask, number) => layerOf(mask, number, scan.place)));
  viewer.layers = [...own, ...(await layersHere())];
  paintLayers();
  keep();
}

async function layersHere() {
  const here = state.found.map((found, number) => [found, number]).filter(([found]) => found.place === scan.place);
  return Promise.all(here.map(([found, number]) => layerOf(found, number, found.place)));
}

function paintLayers() {
  $("found").hidden = !viewer.layers.length;
  showLayers($("layers"), viewer.layers, () => viewer.paint(), scan.info ? EXPORTS : {});
  viewer.paint();
}

function restart() {
  state.asking?.abort();
  Object.assign(state, { messages: [], begin: 0, found: [], picture: null });
  $("messages").replaceChildren();
  viewer.layers = [];
  paintLayers();
  viewer.clear();
  sessionStorage.removeItem(KEPT);
  status("");
}

function addMessage(role, text) {
  const message = Object.assign(document.createElement("div"), { className: `message ${role}` });
  const who = Object.assign(document.createElement("span"), { className: "who", textContent: role === "user" ? "You" : "Model" });
  const body = document.createElement("span");
  message.append(who, body);
  setText(body, text);
  $("messages").append(message);
  $("messages").scrollTop = $("messages").scrollHeight;
  return body;
}

// Text with every <SEG> in the colour of its mask.
function setText(element, text, firstMask = 0) {
  const parts = text.split("<SEG>");
  element.replaceChildren(...parts.flatMap((part, i) => {
    if (i === parts.length - 1) return [part];
    const token = Object.assign(document.createElement("span"), { className: "token", textContent: "mask" });
    token.style.background = COLOURS[(firstMask + i) % COLOURS.length];
    return [part, token];
  }));
}

async function send(question) {
  const region = viewer.region?.complete ? viewer.region : null;
  const regions = region ? [region.asRequest()] : [];
  const shown = region ? `${question} (${region.tool === "mask" ? "brush" : region.tool})` : question;
  state.messages.push({ role: "user", text: question, shown });
  addMessage("user", shown);
  const body = addMessage("assistant", "");
  state.asking = new AbortController();
  setBusy(true);
  try {
    const [first, place] = [state.found.length, scan.place];
    const asked = { model: $("models").value, messages: requestMessages(), regions };
    const answer = await ask(asked, (text) => setText(body, text, first), state.asking.signal);
    setText(body, answer.text || "(no answer)", first);
    state.messages.push({ role: "assistant", text: answer.text, first });
    await addFound([...answer.masks, ...answer.boxes], place);
    status(answer.masks.length + answer.boxes.length ? "" : "The answer has no mask or box.");
  } catch (error) {
    state.messages.pop();
    body.parentElement.remove();
    status(error.name === "AbortError" ? "Stopped." : `No answer: ${error.message}`, error.name !== "AbortError");
  } finally {
    setBusy(false);
    state.asking = null;
    state.begin = Math.min(state.begin, state.messages.length);
    keep();
  }
}

// The picture stands in the first message.
function requestMessages() {
  return state.messages.slice(state.begin).map(({ role, text }, i) => {
    if (i || !state.picture) return { role, content: text };
    return { role, content: [{ type: "image_url", image_url: { url: state.picture } }, { type: "text", text }] };
  });
}

async function addFound(found, place) {
  for (const one of found) {
    const layer = await layerOf(one, state.found.length, place);
    state.found.push({ ...one, place });
    if (place === scan.place) viewer.layers.push(layer);
  }
  paintLayers();
}

function setBusy(busy) {
  $("send").disabled = busy;
  $("stop").disabled = !busy;
  if (busy) status("Thinking ...");
}

function chooseTool(name) {
  viewer.tool = name;
  for (const button of $("tools").children) button.setAttribute("aria-checked", String(button.dataset.tool === name));
}

function makeTools() {
  for (const { name, title, key } of TOOLS) {
    const button = Object.assign(document.createElement("button"), { type: "button", textContent: title, title: `${title} (${key})` });
    button.setAttribute("role", "radio");
    button.dataset.tool = name;
    button.addEventListener("click", () => chooseTool(name));
    $("tools").append(button);
  }
  chooseTool("pan");
}

function listen() {
  for (const id of ["file", "folder"]) $(id).addEventListener("change", (event) => openFiles([...event.target.files]));
  $("undo").addEventListener("click", () => viewer.undo());
  $("clear").addEventListener("click", () => viewer.clear());
  $("fit").addEventListener("click", () => viewer.fit());
  $("stop").addEventListener("click", () => state.asking?.abort());
  $("restart").addEventListener("click", () => { const { picture } = state; restart(); state.picture = picture; if (scan.info) scan.show(); keep(); });
  for (const name of ["level", "window"]) {
    $(name).addEventListener("input", (event) => { viewer.filter[name] = Number(event.target.value); viewer.paint(); });
  }
  $("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    const question = $("question").value.trim();
    if (!question || state.asking) return;
    $("question").value = "";
    send(question);
  });
  $("question").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey) { event.preventDefault(); $("ask").requestSubmit(); }
  });
  document.addEventListener("keydown", (event) => {
    if (["TEXTAREA", "INPUT", "SELECT"].includes(event.target.tagName)) return;
    const step = { ArrowUp: 1, ArrowRight: 1, ArrowDown: -1, ArrowLeft: -1 }[event.key];
    if (step && scan.info && event.target.id === "stage") { event.preventDefault(); return scan.step(step); }
    if (event.key === "z" && (event.ctrlKey || event.metaKey)) return viewer.undo();
    if (event.key === "0") return viewer.fit();
    const tool = TOOLS.find(({ key }) => key === event.key);
    if (tool && !event.ctrlKey && !event.metaKey && !event.altKey) chooseTool(tool.name);
  });
  const stage = $("stage");
  stage.addEventListener("dragover", (event) => { event.preventDefault(); stage.classList.add("over"); });
  stage.addEventListener("dragleave", () => stage.classList.remove("over"));
  stage.addEventListener("drop", async (event) => {
    event.preventDefault();
    stage.classList.remove("over");
    openFiles(await droppedFiles(event.dataTransfer));
  });
}

async function restore() {
  const kept = JSON.parse(sessionStorage.getItem(KEPT) ?? "null");
  if (!kept) return;
  const { messages, begin, found } = kept;
  Object.assign(state, { messages, found });
  for (const { role, text, shown, first } of messages) setText(addMessage(role, shown ?? text), shown ?? text, first);
  if (kept.scan) await scan.open(kept.scan.info, kept.scan);
  else if (kept.picture) {
    await showPicture(kept.picture, "The picture");
    viewer.layers = await layersHere();
    paintLayers();
  }
  state.begin = begin;
  keep();
}

async function showExamples() {
  const response = await fetch("/examples");
  const names = response.ok ? await response.json() : [];
  $("examples").replaceChildren(...names.map((name, number) => {
    const picture = Object.assign(document.createElement("img"), { src: `/examples/${number}`, alt: name });
    const button = Object.assign(document.createElement("button"), { type: "button", title: name });
    button.append(picture);
    button.addEventListener("click", async () => {
      const content = await (await fetch(picture.src)).blob();
      openFiles([new File([content], name, { type: content.type })]);
    });
    const item = document.createElement("li");
    item.append(button);
    return item;
  }));
  $("examples").hidden = !names.length || Boolean(state.picture);
}

function showModels(names) {
  $("models").replaceChildren(...names.map((name) => new Option(name, name)));
}

makeTools();
listen();
restore().then(showExamples);
modelNames().then(showModels, (error) => status(`No server: ${error.message}`, true));
