// The page: one slide in OpenSeadragon, with its list, its layers, keys, and an address that leads back.

import { Cases, verdict } from "./cases.js";
import { Channels } from "./channels.js";
import { Attention, Layers } from "./layers.js";
import { Outlines } from "./outlines.js";
import { drawScale, words } from "./scale.js";
import { ask, element, settled } from "./server.js";
import { Tiles, tileSource, watch } from "./source.js";

const { Point, Rect, Viewer } = window.OpenSeadragon;
const find = (id) => document.getElementById(id);
const OBJECTIVE_UM = 10; // micrometres per pixel at magnification 1
const MARGIN = 0.02; // of the slide, around the whole of it

const viewer = new Viewer({
  element: find("slide"),
  drawer: "canvas", // pixels come out as they are
  preserveViewport: true, // the view is ours to choose
  showNavigationControl: false,
  showNavigator: false,
  animationTime: 0.4,
  springStiffness: 9,
  zoomPerScroll: 1.3,
  visibilityRatio: 0.3,
  minZoomImageRatio: 0.6,
  maxZoomPixelRatio: 8,
  minPixelRatio: 0.7, // tiles are enlarged 1.4 times before those of the next level are fetched
  imageLoaderLimit: 16,
  maxTilesPerFrame: 16,
  timeout: 10 * 60 * 1000, // a view of all of a slide without coarse levels takes long
  gestureSettingsMouse: { clickToZoom: false, dblClickToZoom: true },
  keyboardNavEnabled: false, // the keys are the page's
});
const tiles = new Tiles(viewer);
const outlines = new Outlines(viewer);
const layers = new Layers(outlines, fail);
const attention = new Attention(viewer, fail);
const channels = new Channels((query) => showTiles(query));
let cases = null;
let current = { number: -1, about: null, loading: null };

function say(text) {
  find("notice").textContent = text;
  find("notice").hidden = !text;
}

function fail(text) {
  find("error").textContent = text;
  find("error").hidden = !text;
}

/** Open a slide, at a view {x, y, zoom} or as a whole. */
async function open(number, view) {
  current.loading?.abort();
  const loading = new AbortController();
  const opened = { number, about: null, loading };
  current = opened;
  const [listed, { signal }] = [cases.cases[number], loading];
  cases.mark(number);
  find("name").textContent = document.title = listed.id;
  showVerdict(listed);
  fail("");
  say("");
  closeSlide();
  try {
    opened.about = await ask(`slides/${number}`, { signal });
  } catch (error) {
    if (error.name !== "AbortError") fail(error.message);
    return;
  }
  if (opened !== current) return;
  say(current.about.remark);
  facts(current.about);
  channels.open(current.about);
  showTiles("");
  look(view);
  attention.open(number, current.about, signal);
  layers.open(number, current.about, signal);
}

function closeSlide() {
  viewer.close();
  viewer.world.removeAll();
  tiles.clear();
  attention.tiles.clear();
  outlines.clear(0);
  for (const id of ["attention", "outlines", "channels", "about", "scale"]) find(id).hidden = true;
  find("place").textContent = current.words = "";
}

function showTiles(query) {
  const { number, about } = current;
  if (!about) return;
  const address = (halvings, row, column) => `slides/${number}/tiles/${halvings}/${row}_${column}${query}`;
  tiles.show(tileSource(viewer, about, { transparent: about.gaps, address }), 0);
}

/** Show all of the slide, which is one unit wide in OpenSeadragon's coordinates. */
function whole(at_once = false) {
  const height = current.about.height / current.about.width;
  viewer.viewport.fitBounds(new Rect(-MARGIN, -MARGIN * height, 1 + 2 * MARGIN, (1 + 2 * MARGIN) * height), at_once);
}

/** Go to a view. */
function look(view) {
  const { about } = current;
  whole(true);
  if (!view || ![view.x, view.y, view.zoom].every(Number.isFinite) || view.zoom <= 0) return;
  viewer.viewport.zoomTo((view.zoom * about.width) / viewer.viewport.getContainerSize().x, null, true);
  viewer.viewport.panTo(new Point(view.x / about.width, view.y / about.width), true);
}

/** Pixels of the screen to one of the slide. */
function zoom(now = true) {
  return viewer.viewport.deltaPixelsFromPoints(new Point(1 / current.about.width, 0), now).x;
}

function showVerdict(listed) {
  const parts = listed.label ? [`label ${listed.label}`] : [];
  const found = verdict(listed);
  if (parts.length && found) parts.push(" · ");
  if (found) parts.push(element("span", { className: found.className }, found.text));
  find("verdict").replaceChildren(...parts);
}

function facts(about) {
  const { width, height, pixel_um: pixel } = about;
  const rows = [["size", `${width.toLocaleString("en")} × ${height.toLocaleString("en")} px`]];
  if (pixel) rows.push(["", `${words(width * pixel)} × ${words(height * pixel)}`], ["pixel", words(pixel)]);
  rows.push(["values", about.type], ["channels", about.channels.length]);
  for (const [name, share] of Object.entries(about.probabilities)) rows.push([name, `${(100 * share).toFixed(1)}%`]);
  if (about.error) rows.push(["failed", about.error]);
  find("about").hidden = false;
  find("facts").replaceChildren(...rows.flatMap(([name, text]) => [element("dt", {}, name), element("dd", {}, `${text}`)]));
}

function tellScale() {
  const { about } = current;
  if (!about) return;
  const pixel = (about.pixel_um ?? 1) / zoom();
  find("scale").hidden = false;
  drawScale(find("scale"), pixel, Boolean(about.pixel_um));
  const size = about.scanned ? `${Number((OBJECTIVE_UM / pixel).toPrecision(2))}×` : `1:${Number((1 / zoom()).toPrecision(3))}`;
  find("place").textContent = current.words ? `${size} · ${current.words}` : size;
}

function tellPlace({ position }) {
  if (!current.about) return;
  const { about } = current;
  const point = viewer.viewport.pointFromPixel(position, true).times(about.width);
  const inside = point.x >= 0 && point.y >= 0 && point.x < about.width && point.y < about.height;
  current.words = inside ? `x ${Math.floor(point.x)}, y ${Math.floor(point.y)}` : "";
  tellScale();
}

function pick({ quick, position }) {
  if (!quick || !current.about) return;
  const { x, y } = viewer.viewport.pointFromPixel(position, true).times(current.about.width);
  const found = outlines.pick(x, y);
  const numbers = Object.entries(found?.measurements ?? {}).map(([name, value]) => `${name} ${Number(value.toPrecision(3))}`);
  say(found ? [found.name || "without a name", ...numbers].join(" · ") : "");
}

/** What an address asks for. */
function asked(address) {
  const query = new URLSearchParams(new URL(address).hash.slice(1));
  const number = cases.cases.findIndex(({ id }) => id === query.get("slide"));
  const [x, y, zoomed] = ["x", "y", "zoom"].map((name) => parseFloat(query.get(name)));
  return { number, view: { x, y, zoom: zoomed } };
}

const remember = settled(() => {
  if (!current.about) return;
  const centre = viewer.viewport.getCenter(false).times(current.about.width);
  const place = { x: Math.round(centre.x), y: Math.round(centre.y), zoom: Number(zoom(false).toPrecision(4)) };
  history.replaceState(null, "", `#${new URLSearchParams({ slide: current.about.id, ...place })}`);
}, 200);

/** Go where an address leads: the event's own, since that of the page may be written anew before the event comes. */
function follow({ newURL }) {
  const { number, view } = asked(newURL);
  if (number === current.number && current.about) look(view);
  else open(Math.max(number, 0), view);
}

function goTo(number) {
  if (number !== current.number) location.hash = new URLSearchParams({ slide: cases.cases[number].id });
}

function show(id, on) {
  find(id).hidden = !on;
  find(`${id}-button`).setAttribute("aria-expanded", String(on));
}

const move = (x, y) => {
  viewer.viewport.panBy(viewer.viewport.deltaPointsFromPixels(new Point(100 * x, 100 * y)));
  viewer.viewport.applyConstraints();
};
const zoomBy = (factor) => {
  viewer.viewport.zoomBy(factor);
  viewer.viewport.applyConstraints();
};
const toggle = (id) => show(id, find(id).hidden);
const KEYS = {
  n: () => goTo(cases.next(current.number, 1)),
  p: () => goTo(cases.next(current.number, -1)),
  a: () => attention.toggle(),
  o: () => layers.toggle(layers.all()),
  t: () => layers.toggle(["tissue"]),
  l: () => toggle("list"),
  y: () => toggle("panel"),
  "+": () => zoomBy(1.5),
  "=": () => zoomBy(1.5),
  "-": () => zoomBy(1 / 1.5),
  0: () => whole(),
  "/": () => find("filter").focus(),
  "?": () => find("help").showModal(),
  ArrowUp: () => move(0, -1),
  ArrowDown: () => move(0, 1),
  ArrowLeft: () => move(-1, 0),
  ArrowRight: () => move(1, 0),
};

function press(event) {
  const typing = event.target.matches("select, input:not([type='checkbox'])");
  if (typing || event.ctrlKey || event.metaKey || event.altKey || find("help").open || !KEYS[event.key]) return;
  event.preventDefault();
  KEYS[event.key]();
}

watch(viewer, fail);
viewer.addHandler("update-viewport", tellScale);
viewer.addHandler("animation-finish", remember);
viewer.addHandler("canvas-click", pick);
viewer.innerTracker.moveHandler = tellPlace;
document.addEventListener("keydown", press);
addEventListener("hashchange", follow);
for (const [id, key] of [["in", "+"], ["out", "-"], ["home", "0"], ["help", "?"], ["list", "l"], ["panel", "y"]])
  find(`${id}-button`).addEventListener("click", () => KEYS[key]());
if (matchMedia("(max-width: 900px)").matches) ["list", "panel"].forEach((id) => show(id, false));
window.viewer = viewer; // for those who look from the console

try {
  cases = new Cases(await ask("slides"));
  follow({ newURL: location.href });
} catch (error) {
  fail(error.message);
}
