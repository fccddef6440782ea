// Signing in with an API key. The server keeps it in a cookie that scripts cannot read.
import { call, get, post } from './api.js';
import { run } from './dialogs.js';
import { field, h } from './dom.js';

const reload = () => dispatchEvent(new Event('lensrack:reload'));

// Returns the session, and shows the button `Sign out` when there is a key.
export async function loadSession() {
  const session = await get('/session');
  const signOut = document.getElementById('sign-out');
  signOut.hidden = !session.key;
  signOut.title = session.key ? `Signed in as ${session.name || session.key}` : '';
  return session;
}

export const needsKey = session => session.keys && !session.key;

export function show(page) {
  const key = h('input', { type: 'password', name: 'key', required: true, autocomplete: 'current-password', autocapitalize: 'none', spellcheck: 'false' });
  const button = h('button', { type: 'submit', class: 'primary' }, 'Sign in');
  const signIn = async event => {
    event.preventDefault();
    await run(button, async () => { await post('/session', { key: key.value }); reload(); });
  };
  page.append(h('h1', {}, 'Sign in'), h('p', { class: 'muted' }, 'This server requires an API key.'),
    h('form', { onsubmit: signIn, class: 'narrow' },
      field('API key', key, 'The operator of the server creates keys with: python -m server keys create'),
      h('div', { class: 'actions' }, button)));
}

document.getElementById('sign-out').addEventListener('click', event => run(event.currentTarget, async () => {
  await call('DELETE', '/session');
  reload();
}));
