// Calls to the server's public HTTP API.

// Where the server is: '' or, behind a proxy, the path that the proxy puts it under.
const ROOT = new URL('..', import.meta.url).pathname.replace(/\/$/, '');
export const at = path => ROOT + path;

export class Problem extends Error {
  constructor(status, body) {
    super(body.detail || body.title || `the server answered ${status}`);
    Object.assign(this, { status, code: body.code ?? 'unknown', body });
  }
}

export async function call(method, path, { json, body, headers = {}, signal } = {}) {
  const allHeaders = json === undefined ? headers : { 'Content-Type': 'application/json', ...headers };
  const response = await send(path, { method, headers: allHeaders, body: json === undefined ? body : JSON.stringify(json), signal });
  const text = await response.text();
  const data = text && /json/.test(response.headers.get('content-type') ?? '') ? JSON.parse(text) : {};
  if (!response.ok) throw new Problem(response.status, data);
  return { data, headers: response.headers };
}

async function send(path, options) {
  try {
    return await fetch(at(path), options);
  } catch (error) {
    if (error.name === 'AbortError') throw error;
    throw new Problem(0, { detail: 'The server cannot be reached. Is it running?', code: 'unreachable' });
  }
}

export const get = async (path, signal) => (await call('GET', path, { signal })).data;
export const post = async (path, json, headers) => (await call('POST', path, { json, headers })).data;
export const part = encodeURIComponent;

// Works without TLS too, where crypto.randomUUID is missing.
export function randomKey() {
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), byte => byte.toString(16).padStart(2, '0')).join('');
}

export const liveAlias = task => task.aliases.find(alias => alias.name === 'live');
export const ifUnchanged = alias => ({ 'If-Match': `"${alias.revision}"` });
