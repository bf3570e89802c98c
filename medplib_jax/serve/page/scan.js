// Scans: uploaded, shown slice by slice, and segmented as a whole by a job of the server.

import { reasonOf } from "./talk.js";
import { save } from "./masks.js";

const $ = (id) => document.getElementById(id);
const PICTURE = /\.(png|jpe?g|webp|bmp)$/i;
const WINDOWS = ["", "soft_tissue", "lung", "brain", "bone", "liver", "mediastinum", "percentile"];
const RESULTS = [["NIfTI", "nifti", "masks.nii.gz"], ["DICOM SEG", "dicom_seg", "segmentation.dcm"], ["Table", "table", "table.tsv"]];

export const isPicture = (files) => files.length === 1 && (files[0].type.startsWith("image/") || PICTURE.test(files[0].name)) && !/\.dcm$/i.test(files[0].name);

// All files that were dropped, those in folders too.
export async function droppedFiles(transfer) {
  const entries = [...transfer.items].map((item) => item.webkitGetAsEntry?.()).filter(Boolean);
  if (!entries.some((entry) => entry.isDirectory)) return [...transfer.files];
  return (await Promise.all(entries.map(filesOf))).flat();
}

async function filesOf(entry) {
  if (entry.isFile) return [await new Promise((resolve, reject) => entry.file(resolve, reject))];
  const reader = entry.createReader();
  const found = [];
  for (;;) { // readEntries gives a hundred at a time
    const some = await new Promise((resolve, reject) => reader.readEntries(resolve, reject));
    if (!some.length) return found;
    found.push(...(await Promise.all(some.map(filesOf))).flat());
  }
}

async function answered(request) {
  const response = await request;
  if (!response.ok) throw new Error(await reasonOf(response));
  return response;
}

export class Scan {
  // onSlice is called with each slice's picture (a blob) and its place.
  constructor(onSlice, status) {
    Object.assign(this, { onSlice, status, info: null, job: null, shown: 0 });
    for (const name of WINDOWS) $("tone").append(new Option(name.replace("_", " ") || "the file's own", name));
    for (const id of ["slice", "tone"]) $(id).addEventListener("input", () => this.show());
    $("plane").addEventListener("input", () => this.choosePlane());
    $("series").addEventListener("input", () => this.chooseSeries());
    $("job").addEventListener("submit", (event) => { event.preventDefault(); this.segment(); });
    $("cancel").addEventListener("click", () => fetch(`/jobs/${this.running}/cancel`, { method: "POST" }));
  }

  get place() {
    return this.info ? `${$("plane").value}:${$("slice").value}:${this.index ?? ""}` : "";
  }

  // What a reload needs.
  get kept() {
    return this.info && { info: this.info, job: this.job, index: this.index, plane: $("plane").value, tone: $("tone").value, slice: $("slice").value };
  }

  async upload(files) {
    const form = new FormData();
    for (const file of files) form.append("files", file, "file");
    const response = await answered(fetch("/images", { method: "POST", body: form }));
    await this.open(await response.json());
  }

  async open(info, { job = null, index = info.series > 1 ? 0 : null, plane, tone = "", slice } = {}) {
    Object.assign(this, { info, index });
    $("several").hidden = info.series < 2;
    $("series").replaceChildren(...Array.from({ length: info.series }, (_, k) => new Option(k + 1, k)));
    $("series").value = index ?? 0;
    this.finished(job);
    $("scan").hidden = false;
    $("plane").replaceChildren(...Object.keys(info.planes).map((name) => new Option(name, name)));
    $("plane").value = plane ?? "acquired";
    $("tone").value = tone;
    await this.choosePlane(slice);
  }

  close() {
    this.info = null;
    this.finished(null);
    $("scan").hidden = true;
  }

  async chooseSeries() {
    const index = Number($("series").value);
    try {
      await this.open(await (await answered(fetch(`/images/${this.info.image_id}?index=${index}`))).json(), { index });
    } catch (error) {
      this.status(`This series cannot be shown: ${error.message}`, true);
    }
  }

  // The query that names the series, with more fields.
  query(fields) {
    return new URLSearchParams(this.index == null ? fields : { ...fields, index: this.index });
  }

  choosePlane(slice) {
    const { slices } = this.info.planes[$("plane").value];
    $("slice").max = slices - 1;
    $("slice").value = slice ?? Math.floor(slices / 2);
    return this.show();
  }

  step(by) {
    $("slice").value = Number($("slice").value) + by;
    return this.show();
  }

  async show() {
    const turn = ++this.shown;
    $("place").value = `${Number($("slice").value) + 1} / ${Number($("slice").max) + 1}`;
    const [plane, number] = this.place.split(":");
    try {
      const query = this.query({ plane, window: $("tone").value });
      const response = await answered(fetch(`/images/${this.info.image_id}/slices/${number}?${query}`));
      const picture = await response.blob();
      const found = this.job && await fetch(`/jobs/${this.job}/slices/${number}?plane=${plane}`);
      if (found?.status === 404) this.finished(null); // the server has removed it
      const masks = found?.ok ? await found.json() : [];
      if (turn === this.shown) await this.onSlice(picture, masks); // else the slider has moved on
    } catch (error) {
      this.status(`This slice cannot be shown: ${error.message}`, true);
    }
  }

  async segment() {
    const prompts = $("structures").value.split(";").map((name) => name.trim()).filter(Boolean);
    if (!prompts.length || !this.info) return;
    const { info } = this;
    this.finished(null);
    this.working(true);
    try {
      const body = JSON.stringify({ image_id: this.info.image_id, prompts, plane: $("plane").value, window: $("tone").value, index: this.index });
      const headers = { "Content-Type": "application/json" };
      const { job_id } = await (await answered(fetch("/jobs", { method: "POST", headers, body }))).json();
      this.running = job_id;
      const end = await this.follow(job_id);
      if (this.info !== info) return; // another scan or series was opened meanwhile
      if (end.status === "done") this.finished(job_id);
      this.status(end.status === "done" ? "The scan is segmented." : `The scan was not segmented: ${end.message ?? end.status}`, end.status === "error");
      if (this.job) await this.show();
    } catch (error) {
      this.status(`The scan was not segmented: ${error.message}`, true);
    } finally {
      this.working(false);
    }
  }

  // Shows the progress of a job; returns its last event.
  async follow(job) {
    const { body } = await answered(fetch(`/jobs/${job}/events`));
    const reader = body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const { done, value } = await reader.read();
      if (done) throw new Error("the server has gone");
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const event of lines.map((line) => JSON.parse(line))) {
        if (event.status) return event;
        Object.assign($("progress"), { value: event.done, max: event.total || 1 });
      }
    }
  }

  working(busy) {
    $("segment").disabled = busy;
    $("cancel").hidden = $("working").hidden = !busy;
    $("progress").value = 0;
  }

  // Offers what a finished job has found.
  finished(job) {
    this.job = job;
    $("results").replaceChildren(...(job ? RESULTS.map(([title, format, name]) => {
      const button = Object.assign(document.createElement("button"), { type: "button", textContent: title });
      button.setAttribute("aria-label", `${title} of the whole scan: save ${name}`);
      button.addEventListener("click", () => this.download(`/jobs/${job}/result?format=${format}`, {}, name));
      return button;
    }) : []));
  }

  async download(path, options, name) {
    try {
      save(await (await answered(fetch(path, options))).blob(), name);
    } catch (error) {
      this.status(`${name} cannot be saved: ${error.message}`, true);
    }
  }

  // A mask of one slice in the scan's own space.
  async exported(layer, format) {
    const [plane, number] = layer.place.split(":");
    const body = JSON.stringify({ plane, masks: [{ label: layer.label, slice: Number(number), rle: layer.rle }] });
    const headers = { "Content-Type": "application/json" };
    try {
      const path = `/images/${this.info.image_id}/export?${this.query({ format })}`;
      return await (await answered(fetch(path, { method: "POST", headers, body }))).blob();
    } catch (error) {
      this.status(`The mask cannot be saved: ${error.message}`, true);
      return null;
    }
  }
}
