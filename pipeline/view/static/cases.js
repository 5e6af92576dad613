// The list of slides: name, small picture, label and prediction.

import { element } from "./server.js";

export class Cases {
  constructor(cases) {
    this.cases = cases;
    this.links = cases.map((each, number) => this.link(each, number));
    this.rows = this.links.map((link) => element("li", {}, link));
    this.list = document.getElementById("cases");
    this.filter = document.getElementById("filter");
    this.filter.addEventListener("input", () => this.choose());
    this.choose();
  }

  link(each, number) {
    const picture = element("img", { src: `slides/${number}/thumbnail`, alt: "", loading: "lazy" });
    const frame = element("span", { className: "thumb" }, picture);
    picture.addEventListener("error", () => frame.replaceChildren("–"));
    const rows = element("span", { className: "words" }, element("b", { title: each.id }, each.id));
    if (each.label) rows.append(element("span", {}, `label ${each.label}`));
    if (verdict(each)) rows.append(element("span", { className: verdict(each).className }, verdict(each).text));
    return element("a", { href: `#slide=${encodeURIComponent(each.id)}` }, frame, rows);
  }

  /** Show those whose name, label or prediction has all words of the filter. */
  choose() {
    const sought = this.filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    const fits = (each) => {
      const text = [each.id, each.label, each.prediction, verdict(each)?.className].join(" ").toLowerCase();
      return sought.every((word) => text.includes(word));
    };
    this.shown = [...this.cases.keys()].filter((number) => fits(this.cases[number]));
    this.list.replaceChildren(...this.shown.map((number) => this.rows[number])); // to hide thousands takes seconds
    const [some, all] = [this.shown.length, this.cases.length];
    document.getElementById("count").textContent = some === all ? `${all}` : `${some} of ${all}`;
  }

  mark(number) {
    this.links.forEach((link, i) => (i === number ? link.setAttribute("aria-current", "true") : link.removeAttribute("aria-current")));
    this.links[number].scrollIntoView({ block: "nearest" });
  }

  /** The number of the next slide that is listed, in one direction or the other. */
  next(number, step) {
    const beyond = this.shown.filter((other) => (other - number) * step > 0);
    return (step > 0 ? beyond[0] : beyond.at(-1)) ?? number;
  }
}

/** What was predicted, in words, and whether that is right. */
export function verdict({ label, prediction, probability, error }) {
  if (error) return { text: "not predicted: it failed", className: "wrong" };
  if (!prediction) return null;
  const share = probability === null ? "" : ` ${(100 * probability).toFixed(0)}%`;
  // Only classes have a probability, and are right or wrong.
  const className = !label || probability === null ? "" : label === prediction ? "right" : "wrong";
  const sign = { right: "✓ ", wrong: "✗ " }[className] ?? "";
  return { text: `${sign}predicted ${prediction}${share}`, className };
}
