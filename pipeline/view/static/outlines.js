// Outlines over the slide: rings in pixels of its finest level, drawn on a canvas that follows the view.

const { Point } = window.OpenSeadragon;
const WIDTH = 2; // of a line, pixels of the screen
const HALO = "rgb(0 0 0 / 55%)"; // around lines, so that they are seen on any colour

export class Outlines {
  constructor(viewer) {
    this.viewer = viewer;
    this.layers = new Map(); // by name: {objects, paths by colour, on}
    this.picked = null;
    this.canvas = document.createElement("canvas");
    this.canvas.className = "outlines";
    viewer.canvas.append(this.canvas);
    for (const name of ["update-viewport", "resize", "open"]) viewer.addHandler(name, () => this.draw());
  }

  clear(width) {
    this.width = width; // of the slide, pixels
    this.layers.clear();
    this.picked = null;
    this.draw();
  }

  /** Show objects {name, colour, rings, measurements}; those without a colour of their own have that of the layer. */
  set(name, objects, colour) {
    const paths = new Map();
    for (const each of objects) {
      const own = each.colour || colour;
      if (!paths.has(own)) paths.set(own, new Path2D());
      each.path = pathOf(each.rings);
      paths.get(own).addPath(each.path);
    }
    this.layers.set(name, { objects, paths, on: true });
    this.draw();
  }

  turn(name, on) {
    const layer = this.layers.get(name);
    if (layer) layer.on = on;
    this.draw();
  }

  /** The smallest of the objects under a place of the slide that are shown; it is marked. */
  pick(x, y) {
    const context = new OffscreenCanvas(1, 1).getContext("2d");
    const seen = [...this.layers.values()].filter((layer) => layer.on).flatMap((layer) => layer.objects);
    const under = seen.filter(({ path }) => context.isPointInPath(path, x, y, "evenodd"));
    this.picked = under.sort((one, other) => extent(one) - extent(other))[0] ?? null;
    this.draw();
    return this.picked;
  }

  draw() {
    const { canvas, viewer } = this;
    const context = canvas.getContext("2d");
    const size = viewer.viewport?.getContainerSize();
    if (!size || !this.width) return;
    const ratio = devicePixelRatio;
    const [across, down] = [Math.round(size.x * ratio), Math.round(size.y * ratio)];
    if (canvas.width !== across || canvas.height !== down) {
      Object.assign(canvas, { width: across, height: down });
      Object.assign(canvas.style, { width: `${size.x}px`, height: `${size.y}px` });
    }
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.clearRect(0, 0, across, down);
    const scale = viewer.viewport.deltaPixelsFromPoints(new Point(1 / this.width, 0), true).x;
    const corner = viewer.viewport.pixelFromPoint(new Point(0, 0), true);
    context.setTransform(scale * ratio, 0, 0, scale * ratio, corner.x * ratio, corner.y * ratio);
    const stroke = (path, colour, width) => {
      context.strokeStyle = colour;
      context.lineWidth = width / scale;
      context.stroke(path);
    };
    for (const { paths, on } of this.layers.values()) {
      if (!on) continue;
      for (const path of paths.values()) stroke(path, HALO, 2 * WIDTH);
      for (const [colour, path] of paths) stroke(path, colour, WIDTH);
    }
    if (this.picked) stroke(this.picked.path, "#ffffff", 2 * WIDTH);
  }
}

/** Width times height of an object. */
function extent({ rings }) {
  const sides = [0, 1].map((axis) => {
    const values = rings[0].filter((_, i) => i % 2 === axis);
    return values.reduce((a, b) => Math.max(a, b)) - values.reduce((a, b) => Math.min(a, b));
  });
  return sides[0] * sides[1];
}

function pathOf(rings) {
  const path = new Path2D();
  for (const ring of rings) {
    for (let i = 0; i < ring.length; i += 2) path[i ? "lineTo" : "moveTo"](ring[i], ring[i + 1]);
    path.closePath();
  }
  return path;
}
