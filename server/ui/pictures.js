// A picture input: drop, paste, file choice or camera; and the frame that shows the picture.
import { fill, h, newId } from './dom.js';

const SUPPORTED = ['image/jpeg', 'image/png', 'image/webp', 'image/bmp'];

// `onPicture(blob)` receives a format that the server supports; other formats that the browser can show are converted to PNG.
export function pictureInput(onPicture, signal) {
  const choose = chooser('Choose a picture', {});
  const photograph = chooser('Take a photo', { capture: 'environment' });
  const zone = h('div', { class: 'drop', ondragover: over, ondragleave: out, ondrop: dropped },
    h('p', {}, 'Drop or paste a picture here'), h('div', { class: 'actions' }, choose, photograph));
  document.addEventListener('paste', pasted, { signal });
  return zone;

  function chooser(label, attributes) {
    const id = newId('picture');
    const input = h('input', { id, type: 'file', accept: 'image/*', class: 'hidden-input', ...attributes, onchange() { if (input.files[0]) take(input.files[0]); input.value = ''; } });
    return h('span', {}, input, h('label', { for: id, class: 'button' }, label));
  }

  function over(event) { event.preventDefault(); zone.classList.add('over'); }
  function out() { zone.classList.remove('over'); }
  function dropped(event) {
    event.preventDefault();
    out();
    const file = [...event.dataTransfer.files].find(item => item.type.startsWith('image/'));
    if (file) take(file);
  }
  function pasted(event) {
    const file = [...(event.clipboardData?.files ?? [])].find(item => item.type.startsWith('image/'));
    if (file) { event.preventDefault(); take(file); }
  }
  async function take(file) { onPicture(SUPPORTED.includes(file.type) ? file : await converted(file)); }
}

// HEIC, AVIF, GIF and any other format that this browser can show.
async function converted(file) {
  try {
    const bitmap = await createImageBitmap(file);
    const canvas = new OffscreenCanvas(bitmap.width, bitmap.height);
    canvas.getContext('2d').drawImage(bitmap, 0, 0);
    return await canvas.convertToBlob({ type: 'image/png' });
  } catch {
    return file; // the server's error names the formats that it supports
  }
}

// The picture, with a layer for a heat map.
export function pictureFrame() {
  const image = h('img', { alt: 'Your picture', class: 'shown' });
  const over = h('div', { class: 'over' });
  const frame = h('div', { class: 'frame', hidden: true }, image, over);
  let address = null;
  let holder = null; // the controls of the heat map on show; they are removed with it
  return {
    frame, image,
    show(blob) {
      if (address) URL.revokeObjectURL(address);
      address = URL.createObjectURL(blob);
      image.src = address;
      this.clear();
      frame.hidden = false;
    },
    lay(canvas) { fill(over, canvas); },
    hold(controls) { if (holder !== controls) this.clear(); holder = controls; },
    clear() { fill(over); if (holder) fill(holder); holder = null; },
  };
}
