// Tiles for OpenSeadragon, which are given up once they have been scrolled or zoomed past: the server then stops, too.

import { reason } from "./server.js";

const { Point, Rect, TileSource } = window.OpenSeadragon;
const MARGIN = 0.1; // of the view on each side, in which tiles are still wanted
const FINER = 1.5; // levels by which a tile may be finer than what the screen shows
const PAST = "scrolled past";

const log = console.error.bind(console);
// OpenSeadragon logs each tile that fails. Those given up are none, and what fails is told on the page.
window.OpenSeadragon.console = Object.assign(Object.create(console), {
  error: (...words) => String(words[0]).startsWith("Tile %s failed") || log(...words),
});

/**
 * Make a source of tiles.
 * image: {width, height, halvings, tile}; span: of its width in units of the slide's; address: (halvings, row, column)
 */
export function tileSource(viewer, image, { span = 1, transparent = false, address }) {
  const source = new TileSource({
    width: image.width,
    height: image.height,
    tileSize: image.tile,
    tileOverlap: 0,
    minLevel: 0,
    maxLevel: image.halvings,
  });
  source.viewer = viewer;
  source.span = span;
  source.getTileUrl = (level, column, row) => address(image.halvings - level, row, column);
  source.hasTransparency = () => transparent;
  source.downloadTileStart = start;
  source.downloadTileAbort = (job) => {
    job.userData.ended = true;
    job.userData.controller?.abort();
  };
  return source;
}

const running = new Set();

async function start(job) {
  const { userData: own } = job;
  own.controller = new AbortController();
  running.add(job);
  try {
    if (!wanted(job)) throw new Error(PAST);
    const response = await fetch(job.src, { signal: own.controller.signal });
    if (!response.ok) throw new Error(await reason(response));
    job.finish(await createImageBitmap(await response.blob()), null, "imageBitmap");
  } catch (error) {
    if (!own.ended) job.fail(error.name === "AbortError" ? PAST : error.message, null);
  } finally {
    running.delete(job);
  }
}

/** Watch a viewer: give up tiles that are no longer wanted, and tell of those that failed. */
export function watch(viewer, onError) {
  const giveUp = () => {
    for (const job of running) if (!wanted(job)) job.userData.controller.abort();
  };
  viewer.addHandler("animation", giveUp);
  viewer.addHandler("animation-finish", giveUp);
  viewer.addHandler("tile-load-failed", ({ tile, message }) => {
    if (message === PAST) queueMicrotask(() => (tile.exists = true)); // it may be wanted again
    else if (!message.startsWith("Image load aborted")) onError(message);
  });
}

/** Whether a tile is seen, or will be where the view is going, and not much finer than the screen. */
function wanted(job) {
  const { tile, source } = job;
  const { viewport } = source.viewer;
  const { bounds } = tile;
  const place = new Rect(
    bounds.x * source.span,
    bounds.y * source.span,
    bounds.width * source.span,
    bounds.height * source.span,
  );
  return [true, false].some((now) => {
    const view = viewport.getBounds(now);
    const across = viewport.deltaPixelsFromPoints(new Point(source.span, 0), now).x * devicePixelRatio;
    const finest = source.maxLevel + Math.log2(across / source.dimensions.x) + FINER;
    return tile.level <= Math.max(finest, source.minLevel + 1) && meet(view, place);
  });
}

function meet(view, place) {
  const [x, y] = [view.width * MARGIN, view.height * MARGIN];
  return (
    place.x < view.x + view.width + x &&
    place.x + place.width > view.x - x &&
    place.y < view.y + view.height + y &&
    place.y + place.height > view.y - y
  );
}

/** Layers of tiles of one kind: a new one lies over the last until all that is seen of it is there. */
export class Tiles {
  constructor(viewer, opacity = 1) {
    this.viewer = viewer;
    this.opacity = opacity;
    this.items = [];
  }

  /** Forget the layers of a slide that is closed, those too that are still to come. */
  clear() {
    this.items = [];
  }

  show(source, index) {
    const { items } = this;
    this.viewer.addTiledImage({
      tileSource: source,
      width: source.span,
      opacity: this.opacity,
      index: this.items.length ? this.viewer.world.getIndexOfItem(this.items.at(-1)) + 1 : index,
      success: ({ item }) => {
        if (items !== this.items) {
          this.viewer.world.removeItem(item);
          return;
        }
        const earlier = [...items];
        items.push(item);
        item.setOpacity(this.opacity);
        item.whenFullyLoaded(() => earlier.forEach((each) => this.remove(each)));
      },
    });
  }

  setOpacity(opacity) {
    this.opacity = opacity;
    this.items.forEach((item) => item.setOpacity(opacity));
  }

  remove(item) {
    if (!this.items.includes(item)) return;
    this.items.splice(this.items.indexOf(item), 1);
    this.viewer.world.removeItem(item);
  }
}
