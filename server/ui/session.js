// Signing in: where the server asks for keys, one is given here once and lives on in a cookie that no script can read.
import { call, get, post } from './api.js';
import { doing } from './dialogs.js';
import { field, h } from './dom.js';

export const again = () => dispatchEvent(new Event('lensrack:again'));

// What the server knows of this visitor; shows the way out where somebody is signed in.
export async function who() {
  const session = await get('/session');
  const out = document.getElementById('sign-out');
  out.hidden = !session.key;
  out.title = session.key ? `Signed in as ${session.name || session.key}` : '';
  return session;
}

export const stranger = session => session.keys && !session.key;

export function show(page) {
  const key = h('input', { type: 'password', name: 'key', required: true, autocomplete: 'current-password', autocapitalize: 'none', spellcheck: 'false' });
  const button = h('button', { type: 'submit', class: 'primary' }, 'Sign in');
  const enter = async event => {
    event.preventDefault();
    await doing(button, async () => { await post('/session', { key: key.value }); again(); });
  };
  page.append(h('h1', {}, 'Sign in'), h('p', { class: 'muted' }, 'This server asks for an API key.'),
    h('form', { onsubmit: enter, class: 'narrow' },
      field('API key', key, 'Whoever runs the server makes one with: python -m server keys create'),
      h('div', { class: 'actions' }, button)));
}

document.getElementById('sign-out').addEventListener('click', event => doing(event.currentTarget, async () => {
  await call('DELETE', '/session');
  again();
}));
