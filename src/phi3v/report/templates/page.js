// What every page has: building elements, unpacking data, the head with its theme, sections, number formats.
// Texts become text nodes and attributes only; no string is ever parsed as HTML.

const SVG = 'http://www.w3.org/2000/svg';
const COLOURS = ['#3f7fdb', '#d9822b', '#2a9d6f', '#b455b8', '#c94c4c', '#7a6ad8', '#0f9bb0', '#93822f'];

function fill(node, properties, children) {
  for (const [name, value] of Object.entries(properties || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith('on')) node.addEventListener(name.slice(2), value);
    else if (name === 'css') for (const [key, text] of Object.entries(value)) node.style.setProperty(key, text);
    else node.setAttribute(name, value === true ? '' : value);
  }
  for (const child of children.flat(Infinity)) {
    if (child !== null && child !== undefined && child !== false) node.append(child instanceof Node ? child : String(child));
  }
  return node;
}
const make = (tag, properties, ...children) => fill(document.createElement(tag), properties, children);
const draw = (tag, properties, ...children) => fill(document.createElementNS(SVG, tag), properties, children);

async function unpack(id) {
  const text = atob(document.getElementById('data-' + id).textContent);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream('gzip'));
  return JSON.parse(await new Response(stream).text());
}

// A setting that outlives the page where the browser allows it; a page opened from a file may not.
function remember(key, value) {
  try {
    if (value === undefined) return localStorage.getItem('phi3v-' + key);
    if (value === null) localStorage.removeItem('phi3v-' + key);
    else localStorage.setItem('phi3v-' + key, value);
  } catch { /* no storage: nothing is remembered */ }
  return null;
}

function themeButton() {
  const names = ['auto', 'light', 'dark'];
  let theme = names.includes(remember('theme')) ? remember('theme') : 'auto';
  const button = make('button', { class: 'theme', title: 'Colours: as the system says, light or dark' });
  const apply = () => {
    if (theme === 'auto') delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = theme;
    button.textContent = { auto: '◐ auto', light: '☀ light', dark: '☾ dark' }[theme];
    button.setAttribute('aria-label', `colour theme: ${theme}`);
  };
  button.addEventListener('click', () => {
    theme = names[(names.indexOf(theme) + 1) % 3];
    remember('theme', theme);
    apply();
  });
  apply();
  return button;
}

// The frame of a page: `add(id, title, …children)` appends a section and its link.
function frame(title) {
  const nav = make('nav', { 'aria-label': 'sections' });
  const body = make('div', { class: 'wrap' });
  document.getElementById('page').append(
    make('header', { class: 'top' }, make('div', { class: 'wrap' }, make('h1', {}, title), nav, themeButton())),
    body,
  );
  return {
    body,
    add(id, name, ...children) {
      nav.append(make('a', { href: '#' + id }, name));
      const section = make('section', { id, 'aria-labelledby': id + '-title' },
        make('h2', { id: id + '-title' }, name), ...children);
      body.append(section);
      return section;
    },
  };
}

// A row of buttons of which one is chosen. `options`: [value, label, count?].
function tabs(label, options, chosen, choose) {
  const buttons = options.map(([value, text, count]) => make('button', {
    type: 'button', 'data-value': value, 'aria-pressed': String(value === chosen),
    onclick: () => { select(value); choose(value); },
  }, text, count === undefined ? null : make('span', { class: 'count' }, count.toLocaleString('en'))));
  const select = (value) => buttons.forEach((b) => b.setAttribute('aria-pressed', String(b.dataset.value === String(value))));
  const group = make('div', { class: 'tabs', role: 'group', 'aria-label': label }, buttons);
  group.select = select;
  return group;
}

function selectBox(label, options, chosen, choose) {
  const box = make('select', { 'aria-label': label, onchange: () => choose(box.value) },
    options.map(([value, text]) => make('option', { value, selected: String(value) === String(chosen) }, text)));
  return box;
}

const NONE = '–';
const isNumber = (value) => typeof value === 'number' && Number.isFinite(value);
const percent = (value, digits = 1) => isNumber(value) ? (100 * value).toFixed(digits) + ' %' : NONE;
function figure(value) {
  if (!isNumber(value)) return NONE;
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e9)) return value.toExponential(2).replace(/\.?0+e/, 'e');
  if (Number.isInteger(value)) return value.toLocaleString('en');
  return size >= 1000 ? Math.round(value).toLocaleString('en') : String(Number(value.toPrecision(4)));
}
function duration(seconds) {
  if (!isNumber(seconds)) return NONE;
  if (seconds < 60) return (seconds < 10 ? seconds.toFixed(1) : Math.round(seconds)) + ' s';
  const minutes = Math.floor(seconds / 60);
  if (minutes < 10) return `${minutes} min ${Math.floor(seconds % 60)} s`;
  if (minutes < 60) return `${minutes} min`;
  return `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}
function shown(value) {
  if (value === null || value === undefined) return NONE;
  if (typeof value === 'string') return value;
  if (Array.isArray(value) && value.every((item) => typeof item !== 'object')) return value.length ? value.join(', ') : NONE;
  return typeof value === 'number' ? String(value) : JSON.stringify(value);
}
const words = (name) => name.replaceAll('_', ' ');

// Horizontal bars. `entries`: [label, value, text].
function bars(entries, colour) {
  const most = Math.max(...entries.map((entry) => entry[1]), 1e-9);
  return make('div', { class: 'bars' }, entries.map(([label, value, text]) => [
    make('span', { class: 'label', title: label }, label === '' ? '(empty)' : label),
    make('span', {}, make('span', { class: 'bar', css: { display: 'block', width: `${100 * value / most}%`, ...(colour ? { background: colour } : {}) } })),
    make('span', { class: 'soft' }, text),
  ]));
}
