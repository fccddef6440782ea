// Uploads an archive. A large one is sent in pieces (tus 1.0, /uploads), so that a broken connection loses one piece and
// not the whole upload.
import { Problem, at, call, part } from './api.js';

const RESUMABLE_FROM = 256 * 1024;
const PIECE = 8 * 2 ** 20;
const MAX_TRIES = 6;

// Returns the dataset. Calls `progress(bytes)` while the archive is sent.
export async function upload(archive, type, name, progress, signal) {
  if (archive.size < RESUMABLE_FROM) {
    const text = await send('POST', `/datasets?name=${part(name)}`, archive, { 'Content-Type': type }, progress, signal);
    return JSON.parse(text);
  }
  const id = await resumable(archive, progress, signal);
  return (await call('POST', `/datasets?upload=${part(id)}&name=${part(name)}`, { signal })).data;
}

async function resumable(archive, progress, signal) {
  const { data } = await call('POST', '/uploads', { headers: { 'Tus-Resumable': '1.0.0', 'Upload-Length': String(archive.size) }, signal });
  let offset = 0, failures = 0;
  while (offset < archive.size) {
    try {
      const piece = archive.slice(offset, offset + PIECE);
      const start = offset;
      await send('PATCH', `/uploads/${part(data.id)}`, piece, { 'Tus-Resumable': '1.0.0', 'Content-Type': 'application/offset+octet-stream', 'Upload-Offset': String(offset) }, bytes => progress(start + bytes), signal);
      offset += piece.size;
      failures = 0;
    } catch (error) {
      if (error.name === 'AbortError' || ++failures === MAX_TRIES || (error.status >= 400 && error.status < 500 && error.status !== 409)) throw error;
      await new Promise(resolve => setTimeout(resolve, 500 * 2 ** failures));
      offset = await receivedBytes(data.id, offset, signal);
    }
  }
  return data.id;
}

async function receivedBytes(id, previous, signal) {
  try {
    const { headers } = await call('HEAD', `/uploads/${part(id)}`, { headers: { 'Tus-Resumable': '1.0.0' }, signal });
    return Number(headers.get('Upload-Offset'));
  } catch (error) {
    if (error.status === 404) throw error;
    return previous; // the server is still away; the next try asks again
  }
}

// XMLHttpRequest, because fetch does not report how much of a body has been sent.
function send(method, path, body, headers, progress, signal) {
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest();
    request.open(method, at(path));
    for (const [name, value] of Object.entries(headers)) request.setRequestHeader(name, value);
    request.upload.onprogress = event => progress(event.loaded);
    request.onload = () => request.status < 300 ? resolve(request.responseText) : reject(new Problem(request.status, parse(request.responseText)));
    request.onerror = () => reject(new Problem(0, { detail: 'The connection was lost during the upload.', code: 'unreachable' }));
    request.onabort = () => reject(new DOMException('stopped', 'AbortError'));
    signal?.addEventListener('abort', () => request.abort());
    request.send(body);
  });
}

function parse(text) {
  try { return JSON.parse(text); } catch { return {}; }
}
