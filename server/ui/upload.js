// An archive on its way to the server. A large one goes in pieces (tus 1.0, /uploads), so that a broken connection costs
// a piece and not the whole.
import { Problem, call, part } from './api.js';

const RESUMABLE_FROM = 256 * 1024;
const PIECE = 8 * 2 ** 20;
const TRIES = 6;

// → the dataset. `progress(bytes)` while it is sent.
export async function upload(archive, type, name, progress, signal) {
  if (archive.size < RESUMABLE_FROM) {
    const text = await sent('POST', `/datasets?name=${part(name)}`, archive, { 'Content-Type': type }, progress, signal);
    return JSON.parse(text);
  }
  const id = await resumable(archive, progress, signal);
  return (await call('POST', `/datasets?upload=${part(id)}&name=${part(name)}`, { signal })).data;
}

async function resumable(archive, progress, signal) {
  const { data } = await call('POST', '/uploads', { headers: { 'Tus-Resumable': '1.0.0', 'Upload-Length': String(archive.size) }, signal });
  let at = 0, failed = 0;
  while (at < archive.size) {
    try {
      const piece = archive.slice(at, at + PIECE);
      const from = at;
      await sent('PATCH', `/uploads/${part(data.id)}`, piece, { 'Tus-Resumable': '1.0.0', 'Content-Type': 'application/offset+octet-stream', 'Upload-Offset': String(at) }, bytes => progress(from + bytes), signal);
      at += piece.size;
      failed = 0;
    } catch (error) {
      if (error.name === 'AbortError' || ++failed === TRIES || (error.status >= 400 && error.status < 500 && error.status !== 409)) throw error;
      await new Promise(resolve => setTimeout(resolve, 500 * 2 ** failed));
      at = await where(data.id, at, signal);
    }
  }
  return data.id;
}

async function where(id, before, signal) {
  try {
    const { headers } = await call('HEAD', `/uploads/${part(id)}`, { headers: { 'Tus-Resumable': '1.0.0' }, signal });
    return Number(headers.get('Upload-Offset'));
  } catch (error) {
    if (error.status === 404) throw error;
    return before; // still away: the next try finds out
  }
}

// XMLHttpRequest, because fetch does not tell how much of a body has been sent.
function sent(method, path, body, headers, progress, signal) {
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest();
    request.open(method, path);
    for (const [name, value] of Object.entries(headers)) request.setRequestHeader(name, value);
    request.upload.onprogress = event => progress(event.loaded);
    request.onload = () => request.status < 300 ? resolve(request.responseText) : reject(new Problem(request.status, read(request.responseText)));
    request.onerror = () => reject(new Problem(0, { detail: 'The connection broke while the pictures were sent.', code: 'unreachable' }));
    request.onabort = () => reject(new DOMException('stopped', 'AbortError'));
    signal?.addEventListener('abort', () => request.abort());
    request.send(body);
  });
}

function read(text) {
  try { return JSON.parse(text); } catch { return {}; }
}
