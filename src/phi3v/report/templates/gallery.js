// The predictions: filtered, sorted and searched as columns; only the cards of one page exist at a time.

const PAGE_SIZE = 48;
const KINDS = [['all', 'All'], ['right', 'Right'], ['wrong', 'Wrong'], ['changed', 'Changed'], ['gained', 'Newly right'], ['lost', 'Newly wrong'], ['cut', 'Cut']];
const normal = (text) => text.trim().replace(/^\.+|\.+$/g, '').toLowerCase(); // as the scores compare answers

class Gallery {
  constructor(runs, { galleries, thumbnails }) {
    Object.assign(this, { runs, galleries, thumbnails });
    this.run = galleries.findIndex((g) => g);
    this.state = { kind: 'all', sort: 'file', search: '', withImage: false, cell: null, page: 0 };
    this.cards = make('div', { class: 'cards', role: 'list' });
    this.count = make('p', { class: 'soft small', role: 'status' });
    this.note = make('div', {});
    this.pager = make('div', { class: 'pager' });
    this.controls = make('div', {});
    this.dialog = make('dialog', { 'aria-label': 'prediction' });
    this.dialog.addEventListener('keydown', (event) => {
      if (event.key === 'ArrowRight') this.step(1); else if (event.key === 'ArrowLeft') this.step(-1); else return;
      event.preventDefault();
    });
    this.dialog.addEventListener('click', (event) => { if (event.target === this.dialog) this.dialog.close(); });
    this.build();
  }
  get data() { return this.galleries[this.run]; }
  get nodes() { return [this.controls, this.note, this.count, this.cards, this.pager, this.dialog]; }
  kindOf(i) {
    const g = this.data, kinds = [g.right[i] === 1 ? 'right' : 'wrong'];
    if (g.cut[i] === 1) kinds.push('cut');
    if (g.right_before[i] >= 0 && g.right[i] !== g.right_before[i]) kinds.push('changed', g.right[i] === 1 ? 'gained' : 'lost');
    return kinds;
  }
  build() {
    const g = this.data, counts = Object.fromEntries(KINDS.map(([kind]) => [kind, 0]));
    counts.all = g.ids.length;
    this.kinds = g.ids.map((_, i) => { const kinds = this.kindOf(i); kinds.forEach((kind) => counts[kind]++); return kinds; });
    this.haystack = null;
    this.state.cell = null;
    const kinds = KINDS.filter(([kind]) => (g.has_before || !['changed', 'gained', 'lost'].includes(kind)) && (kind !== 'cut' || counts.cut));
    if (!kinds.some(([kind]) => kind === this.state.kind)) this.state.kind = 'all';
    this.kindTabs = tabs('which predictions', kinds.map(([kind, name]) => [kind, name, counts[kind]]), this.state.kind, (kind) => this.change({ kind }));
    let timer = 0;
    this.searchBox = make('input', {
      type: 'search', placeholder: 'Search prompts, answers, ids', 'aria-label': 'search predictions', value: this.state.search,
      oninput: () => { clearTimeout(timer); timer = setTimeout(() => this.change({ search: this.searchBox.value }), 120); },
    });
    const partly = g.images.some((places) => places.length) && g.images.some((places) => places.length && places[0] < 0);
    const sorts = [['file', 'as in the file'], ['worst', 'lowest score first'], ['best', 'highest score first'], ['longest', 'longest answer first']];
    if (g.has_before) sorts.push(['up', 'most gained first'], ['down', 'most lost first']);
    if (!sorts.some(([sort]) => sort === this.state.sort)) this.state.sort = 'file';
    const several = this.galleries.filter((one) => one).length > 1;
    this.controls.replaceChildren(
      several ? make('div', { class: 'row' }, tabs('which run', this.runs.map((run, i) => [i, run.name]).filter(([i]) => this.galleries[i]), this.run, (i) => { this.run = Number(i); this.build(); })) : '',
      make('div', { class: 'row' }, this.kindTabs),
      make('div', { class: 'row' },
        make('span', { class: 'grow' }, fill(this.searchBox, { css: { width: '100%' } }, [])),
        make('label', {}, 'sort', selectBox('sort predictions', sorts, this.state.sort, (sort) => this.change({ sort }))),
        partly ? make('label', {}, make('input', { type: 'checkbox', checked: this.state.withImage, onchange: (event) => this.change({ withImage: event.target.checked }) }), 'with image only') : null));
    this.note.replaceChildren(g.images_note ? make('p', { class: 'soft small' }, g.images_note) : '');
    this.refresh();
  }
  change(values) {
    Object.assign(this.state, values, { page: 0 });
    this.refresh();
  }
  pick(run, truth, given) {
    if (this.galleries[run] && run !== this.run) { this.run = run; this.build(); }
    this.searchBox.value = '';
    this.kindTabs.select('all');
    this.change({ kind: 'all', search: '', cell: { truth, given } });
    document.getElementById('predictions').scrollIntoView();
  }
  matches() {
    const g = this.data, { kind, search, withImage, cell, sort } = this.state;
    let found = [];
    const wanted = search.trim().toLowerCase().split(/\s+/).filter(Boolean);
    if (wanted.length && !this.haystack) {
      const lower = g.texts.map((text) => text.toLowerCase());
      this.haystack = g.ids.map((id, i) => [id, g.prompts[i], g.answers[i], ...g.references[i], ...(g.before[i] >= 0 ? [g.before[i]] : []), ...g.files[i]].map((n) => lower[n]).join('\n'));
    }
    const classes = cell && new Set(g.references.map((r) => normal(g.texts[r[0]] ?? '')));
    for (let i = 0; i < g.ids.length; i++) {
      if (kind !== 'all' && !this.kinds[i].includes(kind)) continue;
      if (withImage && !(g.images[i][0] >= 0)) continue;
      if (wanted.length && !wanted.every((word) => this.haystack[i].includes(word))) continue;
      if (cell) {
        const truth = normal(g.texts[g.references[i][0]] ?? ''), answer = normal(g.texts[g.answers[i]]);
        const given = g.right[i] === 1 ? truth : classes.has(answer) ? answer : null;
        if (truth !== cell.truth || (given ?? 'other') !== cell.given) continue;
      }
      found.push(i);
    }
    const score = (i) => g.scores[i] ?? g.right[i], gain = (i) => score(i) - (g.scores_before[i] ?? Math.max(0, g.right_before[i]));
    const keys = { worst: (i) => score(i), best: (i) => -score(i), longest: (i) => -g.texts[g.answers[i]].length, up: (i) => -gain(i), down: gain };
    if (keys[sort]) found.sort((a, b) => keys[sort](a) - keys[sort](b) || a - b);
    return found;
  }
  refresh() {
    this.found = this.matches();
    const { cell } = this.state, total = this.data.ids.length;
    this.count.replaceChildren();
    fill(this.count, {}, [`${this.found.length.toLocaleString('en')} of ${total.toLocaleString('en')} predictions, made ${this.data.when} training`,
      cell ? [`, where ${cell.truth || '(empty)'} was answered by ${cell.given || '(empty)'} `, make('button', { class: 'link', type: 'button', onclick: () => this.change({ cell: null }) }, 'show all')] : null]);
    this.show();
  }
  show(move) {
    const pages = Math.max(1, Math.ceil(this.found.length / PAGE_SIZE)), page = Math.min(this.state.page, pages - 1);
    this.state.page = page;
    const slice = this.found.slice(page * PAGE_SIZE, (page + 1) * PAGE_SIZE);
    this.cards.replaceChildren(...slice.map((i, k) => this.card(i, page * PAGE_SIZE + k)));
    if (!slice.length) this.cards.append(make('p', { class: 'soft' }, 'No prediction fits these filters.'));
    const go = (to) => { this.state.page = to; this.show(true); };
    this.pager.replaceChildren(...(pages > 1 ? [
      make('button', { type: 'button', disabled: page === 0, onclick: () => go(0), 'aria-label': 'first page' }, '«'),
      make('button', { type: 'button', disabled: page === 0, onclick: () => go(page - 1) }, 'Previous'),
      make('span', { class: 'soft' }, `page ${(page + 1).toLocaleString('en')} of ${pages.toLocaleString('en')}`),
      make('button', { type: 'button', disabled: page === pages - 1, onclick: () => go(page + 1) }, 'Next'),
      make('button', { type: 'button', disabled: page === pages - 1, onclick: () => go(pages - 1), 'aria-label': 'last page' }, '»')] : []));
    if (move) this.count.scrollIntoView({ block: 'center' });
  }
  thumbnail(i, k) {
    const g = this.data, place = g.images[i][k];
    if (place < 0) return null;
    return make('img', { src: 'data:image/webp;base64,' + this.thumbnails[this.run][place], alt: g.texts[g.files[i][k]], decoding: 'async' });
  }
  badges(i) {
    const g = this.data, right = g.right[i] === 1, changed = this.kinds[i].includes('changed');
    return make('div', { class: 'badges' },
      make('span', { class: right ? 'badge right' : 'badge wrong' }, g.right[i] < 0 ? 'not judged' : right ? 'right' : 'wrong'),
      g.cut[i] === 1 ? make('span', { class: 'badge wrong', title: 'the answer reached its limit of tokens before its end' }, 'cut') : null,
      changed ? make('span', {}, right ? 'was wrong' : 'was right') : null,
      isNumber(g.scores[i]) && g.scores[i] !== g.right[i] ? make('span', {}, `${words(g.metric || 'score')} ${g.scores[i].toFixed(2)}`) : null);
  }
  answers(i) {
    const g = this.data, text = (n) => g.texts[n] === '' ? '(empty)' : g.texts[n];
    return make('dl', { class: 'answers' },
      make('dt', {}, g.references[i].length > 1 ? 'references' : 'reference'), make('dd', {}, g.references[i].map(text).join(' · ')),
      make('dt', {}, 'answer'), make('dd', { class: g.right[i] === 1 ? 'right' : 'wrong' }, text(g.answers[i])),
      g.before[i] >= 0 ? [make('dt', {}, 'before'), make('dd', { class: 'soft' }, text(g.before[i]))] : null);
  }
  card(i, position) {
    const g = this.data, has = g.images[i].length > 0;
    const image = has && make('div', { class: 'image' }, this.thumbnail(i, 0) || make('span', {}, 'image not kept'),
      g.images[i].length > 1 ? make('span', { class: 'several' }, `${g.images[i].length} images`) : null);
    return make('div', { role: 'listitem', css: { display: 'grid' } }, make('button', { type: 'button', class: has ? 'prediction' : 'prediction bare', 'data-id': g.texts[g.ids[i]], onclick: () => this.open(position) },
      image, make('div', { class: 'texts' }, this.badges(i), make('div', { class: 'prompt' }, g.texts[g.prompts[i]]), this.answers(i))));
  }
  open(position) {
    this.position = position;
    const g = this.data, i = this.found[position], probabilities = g.probabilities[i];
    this.dialog.replaceChildren(
      make('div', { class: 'row' }, this.badges(i), make('span', { class: 'soft mono', css: { 'overflow-wrap': 'anywhere' } }, g.texts[g.ids[i]]), make('span', { class: 'grow' }),
        make('button', { type: 'button', onclick: () => this.step(-1), disabled: position === 0, 'aria-label': 'previous prediction' }, '←'),
        make('button', { type: 'button', onclick: () => this.step(1), disabled: position === this.found.length - 1, 'aria-label': 'next prediction' }, '→'),
        make('button', { type: 'button', onclick: () => this.dialog.close(), autofocus: true }, 'Close')),
      make('div', { class: 'images' }, g.images[i].map((_, k) => this.thumbnail(i, k))),
      make('div', { class: 'prompt' }, g.texts[g.prompts[i]]), this.answers(i),
      probabilities ? [make('h3', { css: { 'margin-top': '1rem' } }, 'Probabilities'), bars(Object.entries(probabilities).map(([word, p]) => [word, Number(p), percent(Number(p))]))] : null,
      g.files[i].length ? make('p', { class: 'soft small mono', css: { 'margin-top': '1rem' } }, g.files[i].map((n) => g.texts[n]).join(', ')) : null);
    if (!this.dialog.open) this.dialog.showModal();
  }
  step(by) {
    const next = this.position + by;
    if (next >= 0 && next < this.found.length) this.open(next);
  }
}
