// A zip archive of files, stored without compression (pictures are compressed already). Each file is read once, for its
// checksum; the blob refers to the files on disk and does not hold them in memory.
// APPNOTE.TXT 6.3.10: local headers 4.3.7, central directory 4.3.12, zip64 4.3.14 and 4.5.3.

const FULL = 0xffffffff;
const UTF8 = 0x0800;
const PIECE = 2 ** 22; // bytes of a file in memory at once
const EPOCH = 0x0021; // 1980-01-01: the same files give the same bytes
const TABLE = Uint32Array.from({ length: 256 }, (_, n) => {
  for (let bit = 0; bit < 8; bit++) n = n & 1 ? 0xedb88320 ^ (n >>> 1) : n >>> 1;
  return n >>> 0;
});

export async function zipOf(files, progress = () => {}, signal) {
  const parts = [], central = [];
  let at = 0, read = 0;
  for (const { path, file } of files) {
    signal?.throwIfAborted();
    if (file.size >= FULL) throw new Error(`${path} is too large: expected less than 4 GB, got ${file.size} bytes`);
    const name = new TextEncoder().encode(path);
    const crc = await checksum(file);
    const header = local(name, crc, file.size);
    parts.push(header, file);
    central.push(entry(name, crc, file.size, at));
    at += header.length + file.size;
    read += file.size;
    progress(read);
  }
  const size = central.reduce((sum, header) => sum + header.length, 0);
  return new Blob([...parts, ...central, end(files.length, size, at)], { type: 'application/zip' });
}

async function checksum(file) {
  let crc = FULL;
  for (let at = 0; at < file.size; at += PIECE) {
    for (const byte of new Uint8Array(await file.slice(at, at + PIECE).arrayBuffer())) crc = TABLE[(crc ^ byte) & 255] ^ (crc >>> 8);
  }
  return (crc ^ FULL) >>> 0;
}

// Little-endian numbers: [bytes, value] each.
function packed(...numbers) {
  const view = new DataView(new ArrayBuffer(numbers.reduce((sum, [width]) => sum + width, 0)));
  let at = 0;
  for (const [width, value] of numbers) {
    if (width === 2) view.setUint16(at, value, true);
    else if (width === 4) view.setUint32(at, value, true);
    else view.setBigUint64(at, BigInt(value), true);
    at += width;
  }
  return new Uint8Array(view.buffer);
}

const joined = (...arrays) => {
  const whole = new Uint8Array(arrays.reduce((sum, array) => sum + array.length, 0));
  let at = 0;
  for (const array of arrays) { whole.set(array, at); at += array.length; }
  return whole;
};

const local = (name, crc, size) => joined(
  packed([4, 0x04034b50], [2, 20], [2, UTF8], [2, 0], [2, 0], [2, EPOCH], [4, crc], [4, size], [4, size], [2, name.length], [2, 0]), name);

function entry(name, crc, size, at) {
  const far = at >= FULL;
  const extra = far ? packed([2, 1], [2, 8], [8, at]) : new Uint8Array();
  return joined(packed([4, 0x02014b50], [2, far ? 45 : 20], [2, far ? 45 : 20], [2, UTF8], [2, 0], [2, 0], [2, EPOCH], [4, crc], [4, size], [4, size],
    [2, name.length], [2, extra.length], [2, 0], [2, 0], [2, 0], [4, 0], [4, far ? FULL : at]), name, extra);
}

export function end(count, size, at) {
  const large = count >= 0xffff || size >= FULL || at >= FULL;
  const far = large ? joined(
    packed([4, 0x06064b50], [8, 44], [2, 45], [2, 45], [4, 0], [4, 0], [8, count], [8, count], [8, size], [8, at]),
    packed([4, 0x07064b50], [4, 0], [8, at + size], [4, 1])) : new Uint8Array();
  const few = value => Math.min(value, 0xffff);
  return joined(far, packed([4, 0x06054b50], [2, 0], [2, 0], [2, few(count)], [2, few(count)], [4, Math.min(size, FULL)], [4, Math.min(at, FULL)], [2, 0]));
}
