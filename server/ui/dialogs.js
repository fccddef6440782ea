// Confirmation dialogs, and short messages about what was done.
import { h, newId } from './dom.js';

// Resolves to the form's values, or to null when the user cancels.
export function confirmDialog(title, { body = [], action, danger = false }) {
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

let hideTimer;
export function notify(text, kind = 'good') {
  const place = document.getElementById('toast');
  clearTimeout(hideTimer);
  place.replaceChildren(h('p', { class: kind }, text));
  hideTimer = setTimeout(() => place.replaceChildren(), kind === 'bad' ? 12000 : 6000);
}

// Runs `work` for a button, which is disabled meanwhile; shows the message of an error.
export async function run(button, work) {
  button.disabled = true;
  try {
    return await work();
  } catch (error) {
    if (!error.code) console.warn(error);
    notify(error.message, 'bad');
    return undefined;
  } finally {
    button.disabled = false;
  }
}
