// What a report does in the browser: its tables sort and filter, its plots follow the scheme, and attention fades.
"use strict";

const dark = window.matchMedia("(prefers-color-scheme: dark)");

function valueOf(cell) {
  const number = Number(cell.dataset.value ?? cell.textContent);
  return cell.textContent.trim() === "" ? -Infinity : Number.isNaN(number) ? cell.textContent.toLowerCase() : number;
}

function compare(one, other) {
  if (typeof one === typeof other) return one < other ? -1 : one > other ? 1 : 0;
  return typeof one === "number" ? -1 : 1;
}

function sortBy(table, column, header) {
  const up = header.getAttribute("aria-sort") !== "ascending";
  for (const each of table.tHead.rows[0].cells) each.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", up ? "ascending" : "descending");
  const rows = [...table.tBodies[0].rows].map((row) => [valueOf(row.cells[column]), row]);
  rows.sort((a, b) => (up ? 1 : -1) * compare(a[0], b[0]));
  table.tBodies[0].append(...rows.map(([, row]) => row));
}

for (const table of document.querySelectorAll("table.sortable")) {
  [...table.tHead.rows[0].cells].forEach((header, column) => {
    header.querySelector("button").addEventListener("click", () => sortBy(table, column, header));
  });
}

const wanted = document.getElementById("wanted");
const wrongOnly = document.getElementById("wrong-only");

function filter() {
  const text = wanted.value.toLowerCase();
  let shown = 0;
  for (const row of document.querySelector("table.sortable").tBodies[0].rows) {
    row.hidden = (wrongOnly.checked && !row.classList.contains("wrong")) || !row.textContent.toLowerCase().includes(text);
    shown += row.hidden ? 0 : 1;
  }
  document.getElementById("shown").textContent = `${shown} shown`;
}

if (wanted) {
  wanted.addEventListener("input", filter);
  wrongOnly.addEventListener("change", filter);
  filter();
}

function paintPlots() {
  const style = getComputedStyle(document.documentElement);
  const [text, line] = ["--text", "--line"].map((name) => style.getPropertyValue(name).trim());
  for (const plot of document.querySelectorAll(".plotly-graph-div")) {
    const axes = Object.keys(plot.layout ?? {}).filter((name) => /^[xy]axis/.test(name));
    const change = { "font.color": text };
    for (const axis of axes) {
      change[`${axis}.gridcolor`] = line;
      change[`${axis}.linecolor`] = line;
      change[`${axis}.zerolinecolor`] = line;
    }
    window.Plotly.relayout(plot, change).then(() => window.Plotly.Plots.resize(plot));
  }
}

if (window.Plotly) {
  paintPlots();
  dark.addEventListener("change", paintPlots);
}

for (const slider of document.querySelectorAll("input[data-fades]")) {
  const fade = () => {
    document.querySelector(slider.dataset.fades).style.opacity = slider.value / 100;
  };
  slider.addEventListener("input", fade);
  fade();
}

for (const box of document.querySelectorAll("input[data-shows]")) {
  box.addEventListener("change", () => {
    for (const each of document.querySelectorAll(box.dataset.shows)) each.style.display = box.checked ? "" : "none";
  });
}
