  // Cases: a task's records are listed from an index, and each case is loaded when it is looked at. Scripts, because a page from a disk may
  // load nothing else. Text from models and files only ever becomes textContent.
  const COLOURS = {{ palette|tojson }}, FOLDER = {{ folder|tojson }}, PER_PAGE = 100, SVG = "http://www.w3.org/2000/svg";
  const arrived = {};
  function loaded(what, number, record, content) { arrived[what === "index" ? number : `${number}-${record}`]?.(content); }
  function load(name) {
    return new Promise((resolve, reject) => {
      const script = document.createElement("script");
      arrived[name] = content => { delete arrived[name]; script.remove(); resolve(content); };
      script.onerror = () => { delete arrived[name]; script.remove(); reject(new Error(`${FOLDER}/${name}.js is not there`)); };
      script.src = `${FOLDER}/${name}.js`;
      document.head.append(script);
    });
  }
  function make(tag, properties = {}, ...children) {
    const element = Object.assign(document.createElement(tag), properties);
    element.append(...children);
    return element;
  }
  function draw(tag, attributes, ...children) {
    const element = document.createElementNS(SVG, tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.append(...children);
    return element;
  }
  const options = (select, names) => select.replaceChildren(...names.map(([value, text]) => make("option", { value, textContent: text })));
  const areaOf = area => `${area < 10 ? area.toFixed(2) : area.toFixed(1)} mm²`;
  const percent = score => score === null || score === undefined ? "–" : `${score} %`;

  class Cases {
    constructor(root) {
      this.root = root; this.number = root.dataset.number; this.task = root.dataset.task;
      this.part = name => root.querySelector(`[data-part=${name}]`);
      for (const name of ["sort", "flag", "modality", "structure", "most"]) this.part(name).onchange = () => this.list();
      for (const name of ["left", "right", "fill", "truth"]) this.part(name).onchange = () => this.render();
      for (const name of ["level", "width"]) this.part(name).oninput = () => this.window();
      this.part("before").onclick = () => this.step(-1);
      this.part("after").onclick = () => this.step(1);
      this.part("in").onclick = () => this.zoom(1.5);
      this.part("out").onclick = () => this.zoom(1 / 1.5);
      this.part("reset").onclick = () => this.reset();
      this.part("save").onclick = () => this.save();
      this.part("more").onclick = () => { this.shown += PER_PAGE; this.list(true); };
    }

    async open(record) {
      if (!this.index) await this.read();
      const first = this.rows[0]?.[0];
      if (record !== undefined || this.record === undefined) await this.show(record ?? first, record !== undefined);
    }

    async read() {
      try { this.index = await load(this.number); } catch (error) { this.part("note").textContent = error.message; this.index = { records: [], shown: [] }; }
      const values = place => [...new Set(this.index.records.flatMap(row => row[place]))].filter(Boolean).sort();
      for (const [name, place] of [["modality", 1], ["structure", 2], ["flag", 3]]) {
        options(this.part(name), [["", "all"], ...values(place).map(value => [value, value])]);
        this.part(name).parentNode.hidden = values(place).length < (name === "flag" ? 1 : 2);
      }
      const shown = this.index.shown.map((name, i) => [i, name]);
      options(this.part("left"), shown);
      options(this.part("right"), [["", "nothing"], ...shown.slice(1), ...shown.slice(0, 1)]);
      if (shown.length > 1) this.part("right").value = shown[1][0];
      const sorts = this.index.shown.flatMap((name, i) => [[`${i} 1`, `worst of ${name}`], [`${i} -1`, `best of ${name}`]]);
      const gains = this.index.shown.slice(1).flatMap((name, i) => [[`${i + 1} l`, `lost against ${name}`], [`${i + 1} g`, `gained against ${name}`]]);
      options(this.part("sort"), [...sorts.slice(0, 2), ...gains, ...sorts.slice(2), ["", "record"]]);
      this.list();
    }

    list(more = false) {
      if (!more) this.shown = PER_PAGE;
      const wanted = name => this.part(name).value, [which, way] = wanted("sort").split(" "), most = Number(wanted("most"));
      const score = (row, i) => row[5 + Number(i)] ?? null;
      const key = row => way === "l" || way === "g" ? (score(row, 0) - score(row, which)) * (way === "l" ? 1 : -1) : score(row, which) * Number(way);
      const known = row => score(row, which || 0) !== null && (way === "1" || way === "-1" || score(row, 0) !== null);
      this.rows = this.index.records.filter(row => (!wanted("modality") || row[1] === wanted("modality")) && (!wanted("structure") || row[2] === wanted("structure"))
        && (!wanted("flag") || row[3].includes(wanted("flag"))) && (most >= 100 || (score(row, 0) !== null && score(row, 0) <= most)));
      if (which !== "") this.rows.sort((a, b) => known(b) - known(a) || (known(a) ? key(a) - key(b) : 0) || a[0] - b[0]);
      this.part("most").nextElementSibling.textContent = `${most} %`;
      this.part("count").textContent = `${this.rows.length} of ${this.index.records.length}`;
      this.part("list").replaceChildren(...this.rows.slice(0, this.shown).map(row => make("li", {}, this.button(row))));
      this.part("more").hidden = this.rows.length <= this.shown;
    }

    button(row) {
      const words = [row[1], row[2], ...row[3]].filter(Boolean).join(", ") + (row[4] ? "" : " (no picture)");
      const button = make("button", { type: "button", onclick: () => this.show(row[0], true) }, make("span", {}, `${row[0]} `, make("small", { textContent: words })), make("b", { textContent: percent(row[5]) }));
      button.dataset.record = row[0];
      if (row[0] === this.record) button.setAttribute("aria-current", "true");
      return button;
    }

    step(by) {
      const place = this.rows.findIndex(row => row[0] === this.record), next = this.rows[Math.max(0, place + by)];
      if (next) this.show(next[0], true);
    }

    async show(record, named) {
      this.record = record;
      for (const button of this.part("list").querySelectorAll("button")) Number(button.dataset.record) === record ? button.setAttribute("aria-current", "true") : button.removeAttribute("aria-current");
      if (named) history.replaceState(null, "", `#${encodeURIComponent(this.task)}/${record}`);
      const row = this.index.records.find(found => found[0] === record);
      this.case = null;
      this.part("note").textContent = row ? "" : this.index.records.length ? `There is no record ${record}.` : this.part("note").textContent;
      if (row?.[4]) try { const found = await load(`${this.number}-${record}`); if (this.record === record) this.case = found; } catch (error) { this.part("note").textContent = error.message; }
      if (this.record !== record) return;
      this.row = row;
      this.reset();
    }

    reset() {
      const [width, height] = this.case?.size ?? [1, 1];
      this.view = [0, 0, width, height];
      this.part("level").value = 128; this.part("width").value = 256;
      this.window();
      this.render();
    }

    render() {
      const pair = this.part("pair"), talk = this.part("talk"), row = this.row, found = this.case;
      pair.replaceChildren(); talk.replaceChildren();
      pair.hidden = !found?.picture;
      const say = (name, text) => talk.append(make("dt", { textContent: name }), make("dd", { textContent: text }));
      if (!row) return;
      if (!found) {
        this.index.shown.forEach((name, i) => say(name, percent(row[5 + i])));
        if (!row[4]) this.part("note").textContent = `Record ${row[0]} has no picture in this report; --cases takes more of them.`;
        return;
      }
      this.part("note").textContent = found.problem;
      const sides = [this.part("left").value, this.part("right").value].filter(value => value !== "").map(value => this.index.shown[value]);
      if (found.picture) {
        found.examples.forEach((example, i) => pair.append(this.example(`example ${i + 1}`, example)));
        pair.append(this.panel(found.truth ? found.truth.length ? "truth" : "truth: nothing" : "picture", found.truth ?? [], null));
        if (found.truth) for (const name of new Set(sides)) {
          const shapes = found.answers[name]?.shapes ?? [];
          pair.append(this.panel(shapes.length ? name : `${name}: nothing`, shapes, this.part("truth").checked ? found.truth : null));
        }
      }
      say("Question", found.question); say("Expected", found.expected);
      if (found.extent) say("Picture", `${found.extent[1].toFixed(1)} mm wide, ${found.extent[0].toFixed(1)} mm high`);
      if (found.area !== null) say("Area", [`truth ${areaOf(found.area)}`, ...[...new Set(sides)].flatMap(name => found.answers[name] ? [`${name} ${areaOf(found.answers[name].area)}`] : [])].join(", "));
      for (const name of new Set(sides)) {
        const answer = found.answers[name];
        say(name, answer ? answer.text : "–");
        if (answer) say("", Object.entries(answer.scores).map(([score, value]) => `${score} ${value}`).join(", "));
      }
      say("File", `${found.name}, record ${row[0]}`);
    }

    example(caption, { picture, size: [width, height], shapes }) {
      const svg = draw("svg", { class: "example", viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": caption }, draw("image", { href: picture, width, height }));
      for (const path of shapes) svg.append(draw("path", { d: path, fill: COLOURS[0], "fill-opacity": .35, stroke: COLOURS[0], "stroke-width": 2.5 }));
      return make("figure", {}, svg, make("figcaption", { textContent: caption }));
    }

    panel(caption, shapes, truth) {
      const picture = this.case, [width, height] = picture.size, fill = this.part("fill").checked;
      const svg = draw("svg", { viewBox: this.view.join(" "), role: "img", "aria-label": caption }, draw("image", { href: picture.picture, width, height, filter: `url(#window-${this.number})` }));
      for (const path of picture.regions) svg.append(draw("path", { d: path, fill: "none", stroke: {{ region_colour|tojson }}, "stroke-width": 2, "stroke-dasharray": "6 4" }));
      shapes.forEach((path, i) => { const colour = COLOURS[i % COLOURS.length]; svg.append(draw("path", { d: path, fill: fill ? colour : "none", "fill-opacity": .35, stroke: colour, "stroke-width": 2.5 })); });
      for (const path of truth ?? []) svg.append(draw("path", { d: path, fill: "none", stroke: "#fff", "stroke-width": 1.3 }));
      if (picture.extent) svg.append(this.ruler());
      svg.onwheel = event => { event.preventDefault(); this.zoom(event.deltaY < 0 ? 1.2 : 1 / 1.2, svg, event); };
      svg.onpointerdown = event => { svg.setPointerCapture(event.pointerId); this.held = [event.clientX, event.clientY]; };
      svg.onpointerup = () => { this.held = null; };
      svg.onpointermove = event => this.drag(svg, event);
      svg.ondblclick = () => this.reset();
      return make("figure", {}, svg, make("figcaption", { textContent: caption }));
    }

    // The same length in mm along rows and columns, in the lower right corner of what is shown.
    ruler() {
      const [x, y, width, height] = this.view, [tall, wide] = this.case.extent, perColumn = wide / this.case.size[0], perRow = tall / this.case.size[1];
      const longest = Math.min(width * perColumn, height * perRow) / 3, power = 10 ** Math.floor(Math.log10(longest));
      const mm = [5, 2, 1].find(times => times * power <= longest) * power, right = x + width * .96, low = y + height * .95;
      const line = { d: `M${right} ${low - mm / perRow}V${low}H${right - mm / perColumn}`, fill: "none" }, font = height * .045;
      const text = { x: right - font * .4, "text-anchor": "end", y: low - font * .5, "font-size": font, "font-family": "sans-serif", fill: "#fff", stroke: "#000", "stroke-width": font / 6, "paint-order": "stroke" };
      return draw("g", { class: "ruler" }, draw("path", { ...line, stroke: "#000", "stroke-width": 4 }), draw("path", { ...line, stroke: "#fff", "stroke-width": 1.8 }), draw("text", text, `${Number(mm.toPrecision(1))} mm`));
    }

    drag(svg, event) {
      if (!this.held) return;
      const scale = this.view[2] / svg.clientWidth;
      this.view[0] -= (event.clientX - this.held[0]) * scale; this.view[1] -= (event.clientY - this.held[1]) * scale;
      this.held = [event.clientX, event.clientY];
      this.look();
    }

    zoom(by, svg, event) {
      const box = svg?.getBoundingClientRect(), [x, y, width, height] = this.view;
      const at = box ? [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height] : [.5, .5];
      this.view = [x + width * at[0] * (1 - 1 / by), y + height * at[1] * (1 - 1 / by), width / by, height / by];
      this.look();
    }

    look() {
      for (const svg of this.part("pair").querySelectorAll("svg:not(.example)")) {
        svg.setAttribute("viewBox", this.view.join(" "));
        svg.querySelector(".ruler")?.replaceWith(this.ruler());
      }
    }

    window() {
      const level = Number(this.part("level").value) / 255, slope = 256 / Math.max(1, Number(this.part("width").value));
      for (const part of this.root.querySelectorAll("filter *:not(feComponentTransfer)")) { part.setAttribute("slope", slope); part.setAttribute("intercept", .5 - slope * level); }
    }

    async save() {
      const panels = [...this.part("pair").querySelectorAll("figure")], side = 560, [, , width, height] = this.view, tall = side * height / width;
      if (!panels.length) return;
      const words = [...this.part("talk").children].map(element => element.textContent);
      const lines = [`${this.task}, record ${this.record}`, ...words.flatMap((text, i) => i % 2 ? [] : [`${text}${text ? ": " : ""}${words[i + 1]}`])];
      const sheet = draw("svg", { xmlns: SVG, width: panels.length * (side + 10), height: tall + 40 + 22 * lines.length });
      sheet.append(draw("rect", { width: "100%", height: "100%", fill: "#fff" }), draw("defs", {}, this.root.querySelector("filter").cloneNode(true)));
      panels.forEach((figure, i) => {
        const svg = figure.querySelector("svg").cloneNode(true), x = i * (side + 10);
        for (const [name, value] of Object.entries({ x, y: 0, width: side, height: tall })) svg.setAttribute(name, value);
        for (const path of svg.querySelectorAll("path")) { path.setAttribute("vector-effect", "non-scaling-stroke"); path.setAttribute("fill-rule", "evenodd"); }
        sheet.append(svg, draw("text", { x: x + 4, y: tall + 18, "font-family": "sans-serif", "font-size": 15 }, figure.querySelector("figcaption").textContent));
      });
      lines.forEach((line, i) => sheet.append(draw("text", { x: 4, y: tall + 44 + 22 * i, "font-family": "sans-serif", "font-size": 15 }, line)));
      const image = new Image(), address = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(new XMLSerializer().serializeToString(sheet))}`;
      image.src = address;
      await image.decode();
      const canvas = make("canvas", { width: image.width * 2, height: image.height * 2 });
      canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
      make("a", { href: canvas.toDataURL("image/png"), download: `${this.task}-${this.record}.png` }).click();
    }

    key(name) {
      const act = { ArrowRight: () => this.step(1), j: () => this.step(1), ArrowLeft: () => this.step(-1), k: () => this.step(-1), "+": () => this.zoom(1.5), "-": () => this.zoom(1 / 1.5),
        0: () => this.reset(), f: () => this.part("fill").click(), t: () => this.part("truth").click(), s: () => this.save() }[name];
      if (act) act();
      return Boolean(act);
    }
  }
