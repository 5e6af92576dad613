// Which channels are shown, in which colours, and between which values.

import { element, settled, short } from "./server.js";

const SPARE = ["#ff0000", "#00ff00", "#0000ff", "#ffff00", "#ff00ff", "#00ffff", "#ffffff", "#ff8000"];
const MOST = 12;
const STEPS = 500; // of a slider

export class Channels {
  constructor(onChange) {
    this.section = document.getElementById("channels");
    this.rows = document.getElementById("rows");
    this.add = document.getElementById("add");
    this.gamma = document.getElementById("gamma");
    this.change = settled(() => onChange(this.query()), 120);
    this.gamma.addEventListener("input", () => this.tell());
    this.add.addEventListener("change", () => this.append(Number(this.add.value)));
    document.getElementById("reset").addEventListener("click", () => this.open(this.about, true));
  }

  open(about, told = false) {
    this.about = about;
    this.look = structuredClone(about.look);
    this.gamma.value = 0;
    this.section.hidden = false;
    this.draw();
    if (told) this.change();
    this.tellGamma();
  }

  /** How the slide is shown, for the address of its tiles; empty where as at first. */
  query() {
    const parts = this.look.map(({ number, colour, low, high }) => [number, colour.slice(1), low, high].join("~"));
    const gamma = this.gammaValue();
    const usual = JSON.stringify(this.look) === JSON.stringify(this.about.look) && gamma === 1;
    return usual ? "" : `?${new URLSearchParams({ channels: parts.join(","), gamma })}`;
  }

  gammaValue() {
    return Number((10 ** -Number(this.gamma.value)).toPrecision(3));
  }

  tell() {
    this.tellGamma();
    this.change();
  }

  tellGamma() {
    document.getElementById("gamma-value").textContent = this.gammaValue().toFixed(2);
  }

  append(number) {
    const taken = this.look.map(({ colour }) => colour);
    const colour = SPARE.find((each) => !taken.includes(each)) ?? "#ffffff";
    const [low, high] = this.about.ranges[number];
    this.look.push({ number, colour, low, high });
    this.draw();
    this.change();
  }

  draw() {
    const { about, look } = this;
    this.rows.replaceChildren(...(about.colours ? [this.all()] : look.map((each) => this.row(each))));
    const left = about.channels.map((name, i) => [name, i]).filter(([, i]) => !look.some(({ number }) => number === i));
    const options = left.map(([name, i]) => element("option", { value: i }, name || `channel ${i}`));
    this.add.replaceChildren(element("option", { value: "", disabled: true, selected: true }, "channel"), ...options);
    document.getElementById("more").hidden = about.colours || !left.length || look.length >= MOST;
  }

  /** One row for all colours of a photograph. */
  all() {
    const set = (name, value) => this.look.forEach((each) => (each[name] = value));
    return element("li", {}, element("span", {}, "Colours"), this.range("all colours", this.look[0], set));
  }

  row(shown) {
    const name = this.about.channels[shown.number] || `channel ${shown.number}`;
    const colour = element("input", { type: "color", value: shown.colour, "aria-label": `Colour of ${name}` });
    colour.addEventListener("input", () => {
      shown.colour = colour.value;
      this.change();
    });
    const drop = element("button", { type: "button", title: `Hide ${name}`, "aria-label": `Hide ${name}` }, "×");
    drop.addEventListener("click", () => {
      this.look = this.look.filter((each) => each !== shown);
      this.draw();
      this.change();
    });
    drop.hidden = this.look.length === 1;
    const set = (side, value) => (shown[side] = value);
    return element("li", {}, colour, element("span", { title: name }, name), drop, this.range(name, shown, set));
  }

  /** Two sliders, for the values that are black and bright. */
  range(name, shown, set) {
    const [first, last] = this.about.ranges[shown.number];
    const [least, most] = this.about.range;
    const low = Math.max(least ?? -Infinity, first - (last - first));
    const high = Math.min(most ?? Infinity, last + 2 * (last - first));
    const sliders = ["low", "high"].map((side) => {
      const words = element("span", { className: "number" }, short(shown[side]));
      const slider = element("input", { type: "range", min: low, max: high, step: (high - low) / STEPS });
      slider.value = shown[side];
      slider.setAttribute("aria-label", `${side === "low" ? "Darkest" : "Brightest"} value of ${name}`);
      slider.addEventListener("input", () => {
        set(side, Number(slider.value));
        words.textContent = short(Number(slider.value));
        this.change();
      });
      return element("span", {}, slider, words);
    });
    return element("div", { className: "range" }, ...sliders);
  }
}
