// Elements from plain data. All strings become text; nothing here writes markup.

export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) set(element, name, value);
  element.append(...children.flat(3).filter(child => child !== null && child !== undefined && child !== false));
  return element;
}

function set(element, name, value) {
  if (value === null || value === undefined || value === false) return;
  if (name.startsWith('on')) element.addEventListener(name.slice(2), value);
  else if (name === 'style') for (const [key, to] of Object.entries(value)) element.style.setProperty(key, to);
  else if (name === 'value' || name === 'checked' || name === 'disabled' || name === 'selected') element[name] = value;
  else element.setAttribute(name, value === true ? '' : String(value));
}

export const fill = (element, ...children) => {
  element.replaceChildren(...children.flat(3).filter(child => child !== null && child !== undefined && child !== false));
  return element;
};

let number = 0;
export const newId = prefix => `${prefix}-${++number}`;

export function field(label, control, hint) {
  control.id ||= newId('field');
  const note = hint && h('small', { id: `${control.id}-hint`, class: 'muted' }, hint);
  if (note) control.setAttribute('aria-describedby', note.id);
  return h('div', { class: 'field' }, h('label', { for: control.id }, label), control, note);
}

export function section(title, ...children) {
  const id = newId('section');
  return h('section', { 'aria-labelledby': id }, h('h2', { id }, title), ...children);
}

// A region that scrolls sideways, with the keyboard too.
export const scrolling = (label, ...children) => h('div', { class: 'scroll', tabindex: 0, role: 'region', 'aria-label': label }, ...children);
