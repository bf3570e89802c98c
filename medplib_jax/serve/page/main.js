// Puts the page together: files in, questions out, answers and masks back; a reload keeps the conversation.

import { COLOURS, blobOf, layerOf, showLayers } from "./masks.js";
import { TOOLS } from "./shapes.js";
import { ask, modelName } from "./talk.js";
import { Viewer } from "./viewer.js";

const $ = (id) => document.getElementById(id);
const KEPT = "conversation";
const state = { messages: [], masks: [], picture: null, asking: null };
const viewer = new Viewer($("stage"), $("canvas"), () => status(""));

function status(text, wrong = false) {
  $("status").textContent = text;
  $("status").classList.toggle("wrong", wrong);
}

function keep() {
  try {
    sessionStorage.setItem(KEPT, JSON.stringify({ messages: state.messages, masks: state.masks, picture: state.picture }));
  } catch {
    status("This conversation is too large to survive a reload.");
  }
}

async function openFile(file) {
  if (!file) return;
  const url = await new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
  restart();
  await showPicture(url, file.name);
  keep();
}

async function showPicture(url, name) {
  try {
    viewer.show(await createImageBitmap(blobOf(url), { imageOrientation: "from-image" }));
  } catch {
    return status(`${name} cannot be shown: expected a PNG, JPEG, WebP or BMP picture.`, true);
  }
  state.picture = url;
  $("hint").hidden = true;
}

function restart() {
  state.asking?.abort();
  Object.assign(state, { messages: [], masks: [], picture: null });
  $("messages").replaceChildren();
  viewer.layers = [];
  showLayers($("layers"), [], () => {});
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
    const first = state.masks.length;
    const answer = await ask(requestMessages(), regions, (text) => setText(body, text, first), state.asking.signal);
    setText(body, answer.text || "(no answer)", first);
    state.messages.push({ role: "assistant", text: answer.text });
    await addMasks(answer.masks);
    status(answer.masks.length ? "" : "The answer has no mask.");
  } catch (error) {
    state.messages.pop();
    body.parentElement.remove();
    status(error.name === "AbortError" ? "Stopped." : `No answer: ${error.message}`, error.name !== "AbortError");
  } finally {
    setBusy(false);
    state.asking = null;
    keep();
  }
}

// The picture stands in the first message.
function requestMessages() {
  return state.messages.map(({ role, text }, i) => {
    if (i || !state.picture) return { role, content: text };
    return { role, content: [{ type: "image_url", image_url: { url: state.picture } }, { type: "text", text }] };
  });
}

async function addMasks(masks) {
  for (const mask of masks) {
    viewer.layers.push(await layerOf(mask, state.masks.length));
    state.masks.push(mask);
  }
  showLayers($("layers"), viewer.layers, () => viewer.paint());
  viewer.paint();
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
  $("file").addEventListener("change", (event) => openFile(event.target.files[0]));
  $("undo").addEventListener("click", () => viewer.undo());
  $("clear").addEventListener("click", () => viewer.clear());
  $("fit").addEventListener("click", () => viewer.fit());
  $("stop").addEventListener("click", () => state.asking?.abort());
  $("restart").addEventListener("click", () => { const { picture } = state; restart(); state.picture = picture; keep(); });
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
    if (["TEXTAREA", "INPUT"].includes(event.target.tagName)) return;
    if (event.key === "z" && (event.ctrlKey || event.metaKey)) return viewer.undo();
    if (event.key === "0") return viewer.fit();
    const tool = TOOLS.find(({ key }) => key === event.key);
    if (tool && !event.ctrlKey && !event.metaKey && !event.altKey) chooseTool(tool.name);
  });
  const stage = $("stage");
  stage.addEventListener("dragover", (event) => { event.preventDefault(); stage.classList.add("over"); });
  stage.addEventListener("dragleave", () => stage.classList.remove("over"));
  stage.addEventListener("drop", (event) => {
    event.preventDefault();
    stage.classList.remove("over");
    openFile(event.dataTransfer.files[0]);
  });
}

async function restore() {
  const kept = JSON.parse(sessionStorage.getItem(KEPT) ?? "null");
  if (!kept) return;
  if (kept.picture) await showPicture(kept.picture, "The picture");
  state.messages = kept.messages;
  let masks = 0;
  for (const { role, text, shown } of kept.messages) {
    setText(addMessage(role, shown ?? text), shown ?? text, masks);
    if (role === "assistant") masks += text.split("<SEG>").length - 1;
  }
  await addMasks(kept.masks);
}

makeTools();
listen();
restore();
modelName().then((name) => ($("model").textContent = name), (error) => status(`No server: ${error.message}`, true));
