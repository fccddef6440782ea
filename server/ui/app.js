// Routes to a page, switches the colour scheme and shows notices about the server.
import { get } from './api.js';
import { destroyCharts, recolour } from './charts.js';
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
  destroyCharts();
  const [name, argument = ''] = location.hash.replace(/^#\/?/, '').split('/').map(decodeURIComponent);
  const route = name === 'tasks' && argument ? 'task' : name in PAGES ? name : 'tasks';
  markSection(SECTION[route] ?? route);
  const page = h('div', { class: `page of-${route}` });
  try {
    if (signIn.needsKey(await signIn.loadSession())) signIn.show(page);
    else await PAGES[route].show(page, argument, signal);
  } catch (error) {
    if (signal.aborted) return;
    if (error.status === 401) { show(); return; } // the key was revoked or has expired
    fill(page, h('h1', {}, 'Something went wrong'), h('p', { class: 'problem' }, error.message));
  }
  if (signal.aborted) return;
  fill(main, page);
  const heading = page.querySelector('h1');
  document.title = `${heading?.textContent ?? ''} · lensrack`;
  if (!first) { main.focus({ preventScroll: true }); scrollTo(0, 0); }
}

function markSection(section) {
  for (const link of document.querySelectorAll('nav a')) {
    if (link.hash === `#/${section}`) link.setAttribute('aria-current', 'page');
    else link.removeAttribute('aria-current');
  }
}

// --- colours ---------------------------------------------------------------------------------------------------------

const THEMES = { '': 'system', light: 'light', dark: 'dark' };
const button = document.getElementById('theme');

function labelThemeButton() {
  button.setAttribute('aria-label', `Colour scheme: ${THEMES[document.documentElement.dataset.theme ?? '']}`);
  button.title = button.getAttribute('aria-label');
}

button.addEventListener('click', () => {
  const names = Object.keys(THEMES);
  const next = names[(names.indexOf(document.documentElement.dataset.theme ?? '') + 1) % names.length];
  if (next) document.documentElement.dataset.theme = next;
  else delete document.documentElement.dataset.theme;
  try { localStorage.setItem('lensrack.theme', next); } catch { /* no storage: the choice lasts for this visit */ }
  labelThemeButton();
  recolour();
});
matchMedia('(prefers-color-scheme: dark)').addEventListener('change', recolour);

// --- notices ---------------------------------------------------------------------------------------------------------

async function showNotice() {
  const notice = document.getElementById('notice');
  const ready = await get('/readyz').catch(() => null);
  if (ready?.backbone && !ready.backbone.trained) {
    fill(notice, h('strong', {}, 'The backbone is untrained. '), 'It has random weights and is meant for trying the server out.');
    notice.hidden = false;
  }
}

document.querySelector('.skip').addEventListener('click', event => { event.preventDefault(); main.focus(); });
addEventListener('hashchange', () => show());
addEventListener('lensrack:reload', () => show());
labelThemeButton();
showNotice();
show(true);
