// Attention as a heat map over the part of the picture that the network saw.
import { h } from './dom.js';

const RAMP = [[20, 11, 52], [101, 21, 110], [187, 55, 84], [240, 120, 30], [252, 225, 110]]; // dark to bright, even for the colour-blind
const OPAQUE = [0.8, 0.3]; // little attention dims the picture, much lets it show through

// grid [h][w] of shares; `crop` says how the picture was cut; width and height of the picture in pixels.
export function heatmap(grid, crop, width, height) {
  const canvas = h('canvas', { class: 'heat', role: 'img', 'aria-label': describe(grid) });
  canvas.height = grid.length;
  canvas.width = grid[0].length;
  const context = canvas.getContext('2d');
  const pixels = context.createImageData(canvas.width, canvas.height);
  const [least, most] = [Math.min(...grid.flat()), Math.max(...grid.flat())];
  grid.flat().forEach((share, index) => {
    const value = most > least ? (share - least) / (most - least) : 1;
    pixels.data.set([...tint(value), 255 * (OPAQUE[0] + (OPAQUE[1] - OPAQUE[0]) * value)], 4 * index);
  });
  context.putImageData(pixels, 0, 0);
  for (const [name, share] of Object.entries(cropBox(crop, width, height))) canvas.style.setProperty(name, `${100 * share}%`);
  return canvas;
}

function tint(value) {
  const at = Math.min(RAMP.length - 1.001, value * (RAMP.length - 1));
  const [low, high] = [RAMP[Math.floor(at)], RAMP[Math.floor(at) + 1]];
  return low.map((from, index) => from + (high[index] - from) * (at % 1));
}

// The square that the network saw, in shares of the picture's sides.
export function cropBox({ crop_mode: mode, crop_pct: kept }, width, height) {
  if (mode === 'squash') return { left: (1 - kept) / 2, top: (1 - kept) / 2, width: kept, height: kept };
  const side = kept * (mode === 'border' ? Math.max(width, height) : Math.min(width, height));
  return { left: (1 - side / width) / 2, top: (1 - side / height) / 2, width: side / width, height: side / height };
}

function describe(grid) {
  const flat = grid.flat();
  const at = flat.indexOf(Math.max(...flat));
  const [row, column] = [Math.floor(at / grid[0].length) / grid.length, (at % grid[0].length) / grid[0].length];
  const place = `${['top', 'middle', 'bottom'][Math.floor(3 * row)]} ${['left', 'centre', 'right'][Math.floor(3 * column)]}`;
  return `Attention over the picture, strongest at the ${place}`;
}
