// Questions that must be answered, and what has been done.
import { h, newId } from './dom.js';

// Resolves to the form's values, or null when it was closed.
export function ask(title, { body = [], action, danger = false }) {
  const id = newId('dialog');
  const form = h('form', { method: 'dialog' },
    h('h2', { id }, title), ...body,
    h('div', { class: 'actions' },
      h('button', { type: 'submit', value: 'no', formnovalidate: true, class: 'quiet' }, 'Cancel'),
      h('button', { type: 'submit', value: 'yes', class: danger ? 'danger' : 'primary' }, action)));
  const dialog = h('dialog', { 'aria-labelledby': id }, form);
  document.body.append(dialog);
  dialog.showModal();
  return new Promise(resolve => dialog.addEventListener('close', () => {
    const values = Object.fromEntries(new FormData(form));
    dialog.remove();
    resolve(dialog.returnValue === 'yes' ? values : null);
  }));
}

let silence;
export function say(text, kind = 'good') {
  const place = document.getElementById('said');
  clearTimeout(silence);
  place.replaceChildren(h('p', { class: kind }, text));
  silence = setTimeout(() => place.replaceChildren(), kind === 'bad' ? 12000 : 6000);
}

// Does something for a button: no second press meanwhile, and what goes wrong is told.
export async function doing(button, work) {
  button.disabled = true;
  try {
    return await work();
  } catch (error) {
    if (!error.code) console.warn(error);
    say(error.message, 'bad');
    return undefined;
  } finally {
    button.disabled = false;
  }
}
