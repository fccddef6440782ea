// The server's own HTTP interface, as everybody else uses it.

export class Problem extends Error {
  constructor(status, body) {
    super(body.detail || body.title || `the server answered ${status}`);
    Object.assign(this, { status, code: body.code ?? 'unknown', body });
  }
}

export async function call(method, path, { json, body, headers = {}, signal } = {}) {
  const all = json === undefined ? headers : { 'Content-Type': 'application/json', ...headers };
  const response = await reached(path, { method, headers: all, body: json === undefined ? body : JSON.stringify(json), signal });
  const text = await response.text();
  const given = text && /json/.test(response.headers.get('content-type') ?? '') ? JSON.parse(text) : {};
  if (!response.ok) throw new Problem(response.status, given);
  return { data: given, headers: response.headers };
}

async function reached(path, options) {
  try {
    return await fetch(path, options);
  } catch (error) {
    if (error.name === 'AbortError') throw error;
    throw new Problem(0, { detail: 'The server cannot be reached. Is it running?', code: 'unreachable' });
  }
}

export const get = async (path, signal) => (await call('GET', path, { signal })).data;
export const post = async (path, json, headers) => (await call('POST', path, { json, headers })).data;
export const part = encodeURIComponent;

// Also where the page is not served over TLS and crypto.randomUUID is missing.
export function randomKey() {
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), byte => byte.toString(16).padStart(2, '0')).join('');
}

export const live = task => task.aliases.find(alias => alias.name === 'live');
export const condition = alias => ({ 'If-Match': `"${alias.revision}"` });
