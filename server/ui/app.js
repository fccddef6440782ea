// The frame: which page is shown, in which colours, and what is always true of this server.
import { get } from './api.js';
import { forget, recolour } from './charts.js';
import { fill, h } from './dom.js';
import * as askPage from './ask.js';
import * as jobPage from './job.js';
import * as rackPage from './rack.js';
import * as signIn from './session.js';
import * as taskPage from './task.js';
import * as tasksPage from './tasks.js';
import * as trainPage from './train.js';

// #/tasks, #/tasks/NAME, #/ask, #/ask/NAME, #/train, #/jobs/ID, #/rack
const PAGES = { tasks: tasksPage, task: taskPage, ask: askPage, train: trainPage, jobs: jobPage, rack: rackPage };
const SECTION = { task: 'tasks', jobs: 'train' };
const main = document.getElementById('main');
let leave = new AbortController();

async function show(first = false) {
  leave.abort();
  leave = new AbortController();
  const signal = leave.signal;
  forget();
  const [name, argument = ''] = location.hash.replace(/^#\/?/, '').split('/').map(decodeURIComponent);
  const known = name === 'tasks' && argument ? 'task' : name in PAGES ? name : 'tasks';
  mark(SECTION[known] ?? known);
  const page = h('div', { class: `page of-${known}` });
  try {
    if (signIn.stranger(await signIn.who())) signIn.show(page);
    else await PAGES[known].show(page, argument, signal);
  } catch (error) {
    if (signal.aborted) return;
    if (error.status === 401) { show(); return; } // the key has ended meanwhile
    fill(page, h('h1', {}, 'That did not work'), h('p', { class: 'problem' }, error.message));
  }
  if (signal.aborted) return;
  fill(main, page);
  const heading = page.querySelector('h1');
  document.title = `${heading?.textContent ?? ''} · lensrack`;
  if (!first) { main.focus({ preventScroll: true }); scrollTo(0, 0); }
}

function mark(section) {
  for (const link of document.querySelectorAll('nav a')) {
    if (link.hash === `#/${section}`) link.setAttribute('aria-current', 'page');
    else link.removeAttribute('aria-current');
  }
}

// --- colours ---------------------------------------------------------------------------------------------------------

const THEMES = { '': 'as the system', light: 'light', dark: 'dark' };
const button = document.getElementById('theme');

function told() {
  button.setAttribute('aria-label', `Colours: ${THEMES[document.documentElement.dataset.theme ?? '']}`);
  button.title = button.getAttribute('aria-label');
}

button.addEventListener('click', () => {
  const names = Object.keys(THEMES);
  const next = names[(names.indexOf(document.documentElement.dataset.theme ?? '') + 1) % names.length];
  if (next) document.documentElement.dataset.theme = next;
  else delete document.documentElement.dataset.theme;
  try { localStorage.setItem('lensrack.theme', next); } catch { /* then only for this visit */ }
  told();
  recolour();
});
matchMedia('(prefers-color-scheme: dark)').addEventListener('change', recolour);

// --- always ----------------------------------------------------------------------------------------------------------

async function remark() {
  const note = document.getElementById('note');
  const ready = await get('/readyz').catch(() => null);
  if (ready?.backbone && !ready.backbone.trained) {
    fill(note, h('strong', {}, 'The backbone is untrained: '), 'a small stand-in with random weights, fit for trying things out.');
    note.hidden = false;
  }
}

document.querySelector('.skip').addEventListener('click', event => { event.preventDefault(); main.focus(); });
addEventListener('hashchange', () => show());
addEventListener('lensrack:again', () => show());
told();
remark();
show(true);
