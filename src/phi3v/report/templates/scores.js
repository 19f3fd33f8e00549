// Scores with their intervals, and how often each class was answered by each.

// Rows of one track each. `entries`: [who, colour, [[kind, score], …], the most frequent reference answer].
function intervals(name, entries) {
  const rows = entries.map(([who, colour, measured, always]) => {
    const track = make('div', { class: 'track' });
    for (const [kind, score] of measured) {
      if (!isNumber(score?.value)) continue;
      const shade = kind === 'before' ? 'var(--before)' : colour, top = kind === 'before' ? 32 : 62;
      if (isNumber(score.low)) track.append(make('span', { class: 'range', css: { left: `${100 * score.low}%`, width: `${100 * (score.high - score.low)}%`, top: `${top}%`, background: shade } }));
      track.append(make('span', { class: 'point', title: `${kind}: ${percent(score.value, 2)}`, css: { left: `${100 * score.value}%`, top: `${top}%`, background: shade } }));
    }
    const figures = measured.filter(([, score]) => score).map(([kind, score]) => make('div', {},
      make('span', { class: 'soft' }, kind + ' '), make('strong', {}, percent(score.value)),
      isNumber(score.low) ? make('span', { class: 'soft' }, ` [${(100 * score.low).toFixed(1)}, ${(100 * score.high).toFixed(1)}]`) : score.note ? ` (${score.note})` : ''));
    const constant = measured.map(([, score]) => score?.most_frequent).find(isNumber);
    if (constant !== undefined) {
      const answer = `always “${always}”`;
      track.append(make('span', { class: 'constant', title: `${answer}: ${percent(constant, 2)}`, css: { left: `${100 * constant}%` } }));
      figures.push(make('div', { class: 'soft' }, `${answer} `, make('strong', {}, percent(constant))));
    }
    return [make('div', { class: 'who' }, make('span', { class: 'dot', css: { background: colour } }), who), track, make('div', { class: 'figures' }, figures)];
  });
  return make('div', { class: 'metric', css: { 'margin-bottom': '1.2rem' } }, make('h3', {}, words(name)),
    make('div', { class: 'interval' }, rows,
      make('span', { class: 'empty' }), make('div', { class: 'scale' }, ['0', '25', '50', '75', '100 %'].map((t) => make('span', {}, t))), make('span', { class: 'empty' })));
}

function scoreNames(runs) {
  const names = [];
  for (const run of runs) for (const when of ['after', 'before']) for (const name of Object.keys(run.evaluations[when]?.scores || {})) if (!names.includes(name)) names.push(name);
  return names;
}

function scoreSection(runs) {
  const brief = (text) => { const line = (text ?? '').replace(/\s+/g, ' '); return line.length > 40 ? line.slice(0, 39) + '…' : line; };
  return [
    ...runs.flatMap((run) => ['before', 'after'].map((when) => [when, run.evaluations[when]]).filter(([, e]) => e?.num_cut).map(([when, e]) =>
      make('div', { class: 'note' }, `${runs.length > 1 ? run.name + ': ' : ''}${figure(e.num_cut)} of ${figure(e.num_questions)} answers ${when} training were cut at ${figure(e.max_new_tokens)} tokens, before their end, and are scored as they are.`))),
    ...scoreNames(runs).map((name) => intervals(name, runs.flatMap((run, i) => {
      const row = (who, of) => [who, COLOURS[i % COLOURS.length], ['before', 'after'].map((when) => [when, of(run.evaluations[when])?.scores?.[name]]).filter(([, score]) => score), brief(of(run.evaluations.after || run.evaluations.before)?.most_frequent_answer)];
      const sources = Object.keys((run.evaluations.after || run.evaluations.before)?.sources || {});
      return [row(runs.length > 1 ? run.name : 'this run', (e) => e), ...sources.map((source) => row(runs.length > 1 ? `${run.name}, ${source}` : source, (e) => e?.sources?.[source]))];
    }))),
  ];
}

// `pick(run, truth, given)` shows those predictions in the gallery.
function confusionSection(runs, pick) {
  const choices = runs.flatMap((run, r) => ['after', 'before'].filter((when) => run.confusion[when]).map((when) => [`${r}-${when}`, runs.length > 1 ? `${run.name}, ${when}` : `${when} training`]));
  const place = make('div', {});
  const show = (choice) => {
    const [r, when] = choice.split('-');
    place.replaceChildren();
    fill(place, {}, confusionView(runs[r].confusion[when], (truth, given) => pick(Number(r), truth, given)));
  };
  show(choices[0][0]);
  return [make('div', { class: 'row' }, tabs('which measurement', choices, choices[0][0], show)), place];
}

function confusionView({ rows, columns, counts }, pick) {
  const sums = counts.map((line) => line.reduce((a, b) => a + b, 0));
  const dense = columns.length > 24;
  const used = columns.map((_, c) => c < rows.length || counts.some((line) => line[c] > 0));
  const table = make('table', { class: dense ? 'matrix dense' : 'matrix' },
    make('thead', {}, make('tr', {}, make('th', { scope: 'col' }), columns.map((name, c) => used[c] && make('th', { scope: 'col', title: name }, make('span', {}, name))))),
    make('tbody', {}, rows.map((truth, r) => make('tr', {}, make('th', { scope: 'row', title: truth }, truth),
      columns.map((given, c) => {
        if (!used[c]) return null;
        const count = counts[r][c], share = count / Math.max(1, sums[r]), strong = share > 0.55;
        const hue = r === c ? 'var(--right)' : 'var(--wrong)';
        return make('td', {
          'data-row': r, 'data-column': c, title: `${truth} answered by ${given}: ${count} of ${sums[r]}`,
          css: count ? { background: `color-mix(in srgb, ${hue} ${Math.round(12 + 80 * share)}%, var(--raised))`, color: strong ? 'var(--card)' : 'var(--ink)' } : {},
        }, dense || !count ? '' : count);
      })))));
  table.addEventListener('click', (event) => {
    const cell = event.target.closest('td');
    if (cell) pick(rows[cell.dataset.row], columns[cell.dataset.column]);
  });
  const mistakes = counts.flatMap((line, r) => line.map((count, c) => ({ count, r, c }))).filter(({ count, r, c }) => count && r !== c).sort((a, b) => b.count - a.count).slice(0, 8);
  const order = rows.map((name, r) => [name, counts[r][r] / Math.max(1, sums[r]), r]).sort((a, b) => dense ? a[1] - b[1] : b[1] - a[1]);
  const classes = make('div', {}, make('h3', {}, dense ? 'Right by class, the worst first' : 'Right by class'), make('div', { class: 'bars' }, order.slice(0, 30).map(([name, share, r]) => [
    make('span', { class: 'label', title: name }, name === '' ? '(empty)' : name),
    make('span', {}, make('span', { class: 'bar', css: { display: 'block', width: `${100 * share}%`, background: 'var(--right)' } })),
    make('span', { class: 'soft' }, `${percent(share)} of ${sums[r]}`)])));
  const frequent = mistakes.length ? make('div', { css: dense ? {} : { 'margin-top': '1.2rem' } }, make('h3', {}, 'Most frequent mistakes'),
    make('table', {}, make('tbody', {}, mistakes.map(({ count, r, c }) => make('tr', {},
      make('td', {}, make('button', { class: 'link', type: 'button', onclick: () => pick(rows[r], columns[c]) }, `${rows[r] || '(empty)'} → ${columns[c] || '(empty)'}`)),
      make('td', { class: 'number' }, count)))))) : null;
  return [make('p', { class: 'soft small' }, 'Rows are reference answers, columns what was answered', used[rows.length] ? `; “${columns[rows.length]}” is no reference answer` : '', '. A cell shows its questions in the gallery.'),
    dense ? make('div', { class: 'scroll', css: { 'margin-bottom': '1.2rem' } }, table) : null,
    make('div', { class: 'columns' },
      dense ? classes : make('div', { class: 'scroll' }, table),
      dense ? frequent : make('div', {}, classes, frequent))];
}
