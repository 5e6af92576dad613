// A bar of a round length, in micrometres where it is known what a pixel measures.

const WANTED = 140; // pixels of the screen, at most
const UNITS = [
  [1e9, "km"],
  [1e6, "m"],
  [1e3, "mm"],
  [1, "µm"],
  [1e-3, "nm"],
];

/** The longest round length (1, 2 or 5 of a power of ten) of up to so many. */
export function roundLength(most) {
  const power = 10 ** Math.floor(Math.log10(most));
  return [5, 2, 1].map((step) => step * power).find((length) => length <= most * (1 + 1e-9));
}

/** A length of micrometres in words. */
export function words(length) {
  const [size, unit] = UNITS.find(([each]) => length >= each * (1 - 1e-9)) ?? UNITS.at(-1);
  return `${Number((length / size).toPrecision(3))} ${unit}`;
}

/** Draw the bar: pixel is what a pixel of the screen shows, in micrometres or, where these are unknown, in pixels. */
export function drawScale(place, pixel, known) {
  const length = roundLength(pixel * WANTED);
  place.querySelector("div").style.width = `${length / pixel}px`;
  place.querySelector("span").textContent = known ? words(length) : `${Number(length.toPrecision(3))} px`;
}
