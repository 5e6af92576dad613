// What is drawn over a slide: attention as tiles, and outlines.

import { ask, element, settled, short } from "./server.js";
import { Tiles, tileSource } from "./source.js";

const COLOURS = { patches: "#00e5ff", regions: "#ffc400", annotations: "#ff4fa3", tissue: "#21d07a" };
const HINTS = {
  attention: "Times the attention of a slide that is attended evenly wherever the model may look.",
  contribution: "What each cell adds to the answer (red) or takes from it (blue), where all patches were encoded.",
};
const HIDDEN_AT_FIRST = new Set(["regions"]);

export class Attention {
  constructor(viewer, onError) {
    this.viewer = viewer;
    this.onError = onError;
    this.tiles = new Tiles(viewer);
    this.section = document.getElementById("attention");
    this.on = document.getElementById("attention-on");
    this.choice = document.getElementById("map");
    this.colours = document.getElementById("colours");
    this.opacity = document.getElementById("opacity");
    this.threshold = document.getElementById("threshold");
    this.on.addEventListener("change", () => this.fade());
    this.opacity.addEventListener("input", () => this.fade());
    this.colours.addEventListener("change", () => this.draw());
    this.choice.addEventListener("change", () => this.load(this.choice.value));
    const later = settled(() => this.draw(), 120);
    this.threshold.addEventListener("input", () => {
      this.tell();
      later();
    });
  }

  async open(number, about, signal) {
    this.map = null;
    this.slide = { number, about, signal };
    this.section.hidden = !about.maps.length;
    document.getElementById("map-choice").hidden = about.maps.length < 2;
    const before = this.choice.value; // what is shown stays from slide to slide
    this.choice.replaceChildren(...about.maps.map(option));
    if (about.maps.includes(before)) this.choice.value = before;
    if (about.maps.length) await this.load(this.choice.value);
  }

  async load(name) {
    const { number, about, signal } = this.slide;
    try {
      const map = await ask(`slides/${number}/maps/${name}`, { signal });
      this.map = { ...map, name, tile: about.tile, span: (map.width * map.pitch) / about.width, number };
    } catch (error) {
      if (error.name !== "AbortError") this.onError(error.message);
      return;
    }
    const before = this.colours.value;
    this.colours.replaceChildren(...this.map.colour_maps.map(option));
    this.colours.value = this.map.colour_maps.includes(before) ? before : this.map.colours;
    document.getElementById("map-name").textContent = name[0].toUpperCase() + name.slice(1);
    document.getElementById("map-hint").textContent = HINTS[name];
    this.draw();
  }

  /** Attention below this is not shown; the slider is one of logarithms, as the colours are. */
  low() {
    const { low, high } = this.map;
    return low * (high / low) ** (0.98 * Number(this.threshold.value));
  }

  draw() {
    if (!this.map) return;
    this.tell();
    const { number, name, span, high } = this.map;
    const query = new URLSearchParams({ colours: this.colours.value, low: this.low(), high });
    const address = (halvings, row, column) => `slides/${number}/maps/${name}/${halvings}/${row}_${column}?${query}`;
    this.tiles.opacity = this.shown();
    this.tiles.show(tileSource(this.viewer, this.map, { span, transparent: true, address }));
  }

  tell() {
    const legend = document.getElementById("legend");
    legend.src = `colours/${this.colours.value}`;
    legend.alt = `${this.colours.value}, from the lowest to the highest value shown`;
    const signed = this.map.name === "contribution";
    document.getElementById("legend-low").textContent = signed ? short(-this.map.high) : short(this.low());
    document.getElementById("legend-high").textContent = short(this.map.high);
    document.getElementById("threshold-value").textContent = short(this.low());
  }

  shown() {
    return this.on.checked ? Number(this.opacity.value) : 0;
  }

  fade() {
    this.tiles.setOpacity(this.shown());
  }

  toggle() {
    this.on.checked = !this.on.checked;
    this.fade();
  }
}

export class Layers {
  constructor(outlines, onError) {
    this.outlines = outlines;
    this.onError = onError;
    this.wanted = new Map(); // by name, whether it is to be shown: it stays from slide to slide
    this.list = document.getElementById("layers");
  }

  async open(number, about, signal) {
    this.outlines.clear(about.width);
    this.boxes = new Map();
    document.getElementById("outlines").hidden = !about.outlines.length;
    this.list.replaceChildren(...about.outlines.map((name) => this.row(name)));
    await Promise.all(about.outlines.map((name) => this.load(number, name, signal)));
  }

  row(name) {
    const on = this.wanted.get(name) ?? !HIDDEN_AT_FIRST.has(name);
    const box = element("input", { type: "checkbox", checked: on });
    const swatch = element("span", { className: "swatch" });
    swatch.style.borderColor = COLOURS[name];
    const count = element("span", { className: "number" }, "…");
    box.addEventListener("change", () => this.turn(name, box.checked));
    this.boxes.set(name, { box, count });
    return element("li", {}, element("label", {}, box, element("span", {}, name), count, swatch));
  }

  async load(number, name, signal) {
    const { box, count } = this.boxes.get(name);
    try {
      const { objects, left_out } = await ask(`slides/${number}/outlines/${name}`, { signal });
      count.textContent = left_out ? `${objects.length}, ${left_out} not drawn` : `${objects.length}`;
      if (name !== "annotations") objects.forEach((each) => (each.colour = ""));
      this.outlines.set(name, objects, COLOURS[name]);
      this.outlines.turn(name, box.checked);
    } catch (error) {
      if (error.name === "AbortError") return;
      count.textContent = "failed";
      this.onError(error.message);
    }
  }

  turn(name, on) {
    if (!this.boxes.has(name)) return;
    this.wanted.set(name, on);
    this.boxes.get(name).box.checked = on;
    this.outlines.turn(name, on);
  }

  toggle(names) {
    const there = names.filter((name) => this.boxes?.has(name));
    const on = !there.some((name) => this.boxes.get(name).box.checked);
    there.forEach((name) => this.turn(name, on));
  }

  all() {
    return [...(this.boxes?.keys() ?? [])];
  }
}

function option(name) {
  return element("option", { value: name }, name);
}
