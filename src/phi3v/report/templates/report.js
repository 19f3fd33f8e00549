// The report of one or several runs.

const RATES = [['samples_per_second', 'samples/s'], ['questions_per_second', 'questions/s'], ['tokens_per_second', 'tokens/s']];

(async () => {
  const { runs, written, version } = await unpack('runs');
  const one = runs.length === 1;
  const page = frame(one ? runs[0].name : `${runs.length} runs compared`);
  notes(page, runs);
  page.add('overview', 'Overview', one ? tiles(runs[0]) : comparison(runs));
  if (scoreNames(runs).length) page.add('scores', 'Scores', scoreSection(runs));
  if (runs.some((run) => run.curves.steps.length)) page.add('curves', 'Curves', ...curves(runs));
  const hasConfusion = runs.some((run) => run.confusion.after || run.confusion.before);
  let gallery = null;
  if (hasConfusion) page.add('confusion', 'Confusion', ...confusionSection(runs, (...cell) => gallery?.pick(...cell)));
  const waiting = page.add('predictions', 'Predictions', make('p', { class: 'soft' }, 'Unpacking …'));
  page.add('configuration', 'Configuration', ...configuration(runs));
  page.add('environment', 'Environment', ...settings(runs, (run) => run.environment, () => false));
  const logs = runs.filter((run) => run.log.length);
  if (logs.length) page.add('log', 'Log', logs.map((run) => make('details', {}, make('summary', {}, one ? 'the last lines of log.txt' : run.name), make('pre', { class: 'log', tabindex: 0 }, run.log.join('\n')))));
  page.body.append(make('footer', {}, `Written ${written} by phi3v ${version}. This file holds everything it shows and loads nothing.`));

  const predictions = await unpack('predictions');
  if (predictions.galleries.some((g) => g)) {
    gallery = new Gallery(runs, predictions);
    waiting.lastChild.remove();
    waiting.append(...gallery.nodes);
  } else {
    waiting.lastChild.textContent = runs.some((run) => run.status === 'running') ? 'The predictions are shown once the run has ended; “phi3v report” shows those from before training now.' : 'This run has no predictions.';
  }
  document.documentElement.dataset.ready = 'true';
})();

function notes(page, runs) {
  for (const run of runs) {
    const lines = [...run.missing];
    if (run.status === 'unfinished') lines.unshift('The run did not come to its end; this is what it left.');
    if (run.curves.averaged > 1) lines.push(`Each point of the curves is the mean of ${run.curves.averaged} logged lines.`);
    if (lines.length) page.body.append(make('div', { class: 'note', css: { 'margin-top': '1.1rem' } }, runs.length > 1 ? make('strong', {}, run.name) : null, make('ul', {}, lines.map((line) => make('li', {}, line)))));
    if (run.status === 'running') {
      let on = remember('reload') === 'on', timer = 0;
      const plan = () => { clearTimeout(timer); if (on) timer = setTimeout(() => location.reload(), 30000); };
      plan();
      page.body.append(make('div', { class: 'note', css: { 'margin-top': '1.1rem' } }, make('div', { class: 'row', css: { margin: 0 } }, 'The run was going on when this was written. ',
        make('button', { type: 'button', onclick: () => location.reload() }, 'Reload'),
        make('label', {}, make('input', { type: 'checkbox', checked: on, onchange: (event) => { on = event.target.checked; remember('reload', on ? 'on' : null); plan(); } }), 'every half minute'))));
    }
  }
}

const statusMark = (run) => make('span', { class: `status ${{ finished: 'right', running: 'soft', unfinished: 'wrong' }[run.status]}` }, run.status);
const last = (values) => (values || []).filter(isNumber).at(-1);
function facts(run) {
  const { result, curves, evaluations } = run;
  const shown = evaluations.after || evaluations.before || {};
  return {
    metric: shown.metric,
    before: evaluations.before?.score, after: evaluations.after?.score,
    score: (evaluations.after || evaluations.before)?.scores?.[shown.metric],
    questions: shown.num_questions,
    steps: result.steps ?? curves.steps.at(-1),
    seconds: result.train_seconds ?? curves.seconds.at(-1),
    rate: result.samples_per_second ?? last(curves.values.samples_per_second),
    tokens: result.tokens_per_second ?? last(curves.values.tokens_per_second),
    memory: result.peak_memory_gb ?? last(curves.values.peak_memory_gb),
    loss: last(curves.values.loss),
    best: result.best_step,
  };
}

function tiles(run) {
  const f = facts(run);
  const tile = (name, value, more) => make('div', { class: 'tile' }, make('div', { class: 'name' }, name), make('div', { class: 'value' }, value), make('div', { class: 'more' }, more || ''));
  const scored = f.metric && (isNumber(f.after) || isNumber(f.before));
  const interval = isNumber(f.score?.low) ? `[${(100 * f.score.low).toFixed(1)}, ${(100 * f.score.high).toFixed(1)}] on ${figure(f.questions)} questions` : '';
  return [
    make('p', {}, statusMark(run), ' ', make('strong', {}, shown(run.config['method.name'])), ' training of ', make('span', { class: 'mono' }, shown(run.config['model.path'])), ' on ', make('span', { class: 'mono' }, Array.isArray(run.config['data.train']) ? run.config['data.train'].map((source) => source.name).join(', ') : shown(run.config['data.train']))),
    make('div', { class: 'tiles' },
      scored ? tile(`${words(f.metric)} ${isNumber(f.after) ? 'after' : 'before'}`, percent(f.after ?? f.before), interval) : null,
      isNumber(f.after) && isNumber(f.before) ? tile(`${words(f.metric)} before`, percent(f.before), `${f.after >= f.before ? '+' : '−'}${(100 * Math.abs(f.after - f.before)).toFixed(1)} points since`) : null,
      tile('steps', figure(f.steps), [isNumber(f.best) ? `weights of step ${f.best} kept` : '', run.result.stopped_early ? ' stopped early' : '']),
      tile('training time', duration(f.seconds), 'measuring left out'),
      tile('samples/s', figure(f.rate), isNumber(f.tokens) ? `${figure(f.tokens)} tokens/s` : ''),
      tile('peak memory', isNumber(f.memory) ? `${f.memory.toFixed(2)} GB` : NONE, (run.environment.gpus || []).length ? `${run.environment.gpus[0]}` : 'CPU'),
      tile('last loss', figure(f.loss), ''))];
}

function comparison(runs) {
  const columns = [['score before', (f) => percent(f.before)], ['score after', (f) => percent(f.after)], ['metric', (f) => words(f.metric || NONE)], ['steps', (f) => figure(f.steps)], ['time', (f) => duration(f.seconds)],
    ['samples/s', (f) => figure(f.rate)], ['tokens/s', (f) => figure(f.tokens)], ['GB', (f) => isNumber(f.memory) ? f.memory.toFixed(2) : NONE], ['last loss', (f) => figure(f.loss)]];
  return make('div', { class: 'scroll' }, make('table', { id: 'compared' },
    make('thead', {}, make('tr', {}, make('th', {}, 'run'), make('th', {}, 'method'), make('th', {}, ''), columns.map(([name]) => make('th', { class: 'number' }, name)))),
    make('tbody', {}, runs.map((run, i) => { const f = facts(run); return make('tr', {},
      make('td', {}, make('span', { class: 'dot', css: { background: COLOURS[i % COLOURS.length] } }), make('strong', {}, run.name)),
      make('td', {}, shown(run.config['method.name'])), make('td', {}, statusMark(run)), columns.map(([, value]) => make('td', { class: 'number' }, value(f)))); }))));
}

function curves(runs) {
  const view = new View();
  const colour = (i) => COLOURS[i % COLOURS.length];
  const series = (key) => runs.map((run, i) => ({ name: run.name, colour: colour(i), steps: run.curves.steps, seconds: run.curves.seconds, values: run.curves.values[key] || [], marks: run.curves.resumed })).filter((s) => s.values.length);
  const charts = make('div', { class: 'charts' });
  const add = (options) => { if (options.series.length) charts.append(new Chart(view, options).node); };
  add({ title: 'loss', series: series('loss'), canLog: true, noisy: true });
  // Of mixtures: all sources of each run in one chart.
  const sources = runs.flatMap((run, i) => sourceNames(run).map((source) => ({ run, source, i })));
  const ofSource = (run, source) => runs.length > 1 ? `${run.name}, ${source}` : source;
  add({ title: 'loss by source', canLog: true, noisy: true, series: sources.map(({ run, source }, k) => ({ name: ofSource(run, source), run: run.name, colour: colour(runs.length + k), steps: run.curves.steps, seconds: run.curves.seconds, values: run.curves.values[`source/${source}/loss`] || [], marks: run.curves.resumed })).filter((s) => s.values.length) });
  const measured = [...new Set(runs.flatMap((run) => run.curves.evaluations.flatMap((e) => Object.keys(e.scores))))];
  for (const name of measured) add({ title: `${words(name)} while it trained`, points: true, format: (v) => `${Number((100 * v).toFixed(1))} %`, series: [...runs.map((run, i) => during(run, name, colour(i))), ...sources.map(({ run, source }, k) => ({ ...during(run, name, colour(runs.length + k), source), name: ofSource(run, source), run: run.name }))].filter((s) => s.values.length) });
  // Of preferences: both sides of each run in one chart.
  const sides = (key) => runs.flatMap((run, i) => [['chosen', colour(i)], ['rejected', colour(i + runs.length)]].map(([side, shade]) => ({ name: runs.length > 1 ? `${run.name}, ${side}` : side, run: run.name, colour: shade, steps: run.curves.steps, seconds: run.curves.seconds, values: run.curves.values[`${key}/${side}`] || [], marks: run.curves.resumed }))).filter((s) => s.values.length);
  add({ title: 'rewards', series: sides('rewards'), noisy: true });
  add({ title: 'reward margin, chosen over rejected', series: series('rewards/margins'), noisy: true });
  add({ title: 'pairs in which chosen has the higher reward', format: (v) => `${Number((100 * v).toFixed(1))} %`, series: series('rewards/accuracies'), noisy: true });
  add({ title: 'log-probability of an answer', series: sides('logps'), noisy: true });
  add({ title: 'tokens of an answer', series: sides('tokens'), fromZero: true, noisy: true });
  add({ title: 'KL to the reference (k2 estimate)', series: series('kl'), fromZero: true, canLog: true, noisy: true });
  add({ title: 'learning rate', series: series('learning_rate'), fromZero: true, canLog: true });
  add({ title: 'gradient norm', series: series('grad_norm'), canLog: true, noisy: true });
  const rates = RATES.filter(([key]) => series(key).length);
  if (rates.length) {
    const chart = new Chart(view, { title: 'throughput', series: series(rates[0][0]), fromZero: true, noisy: true, choice: selectBox('unit of throughput', rates, rates[0][0], (key) => { chart.series = series(key); chart.render(); }) });
    charts.append(chart.node);
  }
  add({ title: 'peak memory, GB', series: series('peak_memory_gb'), fromZero: true });
  const reset = make('button', { type: 'button', onclick: () => view.change({ domain: null }), disabled: true }, 'Show all');
  const range = make('output', { class: 'soft small' });
  view.onchange = () => {
    reset.disabled = !view.domain;
    range.textContent = view.domain ? (view.axis === 'steps' ? `steps ${view.domain.map((v) => figure(Math.round(v))).join(' to ')}` : view.domain.map(duration).join(' to ')) : '';
  };
  const strength = make('input', { type: 'range', min: 0, max: 0.98, step: 0.02, value: 0.8, 'aria-label': 'strength of smoothing', disabled: true, oninput: () => view.change({ smoothing: Number(strength.value) }) });
  const toggle = make('input', { type: 'checkbox', id: 'smooth', onchange: () => { strength.disabled = !toggle.checked; view.change({ smoothing: toggle.checked ? Number(strength.value) : 0 }); } });
  return [
    make('div', { class: 'row' },
      tabs('what the curves run over', [['steps', 'Steps'], ['seconds', 'Time']], 'steps', (axis) => view.change({ axis, domain: null })),
      make('label', {}, toggle, 'smooth'), strength,
      make('label', {}, make('input', { type: 'checkbox', onchange: (event) => view.change({ log: event.target.checked }) }), 'log scale'),
      make('span', { class: 'grow' }), range, reset),
    runs.length > 1 ? make('div', { class: 'row' }, runs.map((run, i) => make('label', {}, make('input', { type: 'checkbox', checked: true, onchange: (event) => { if (event.target.checked) view.hidden.delete(run.name); else view.hidden.add(run.name); view.change({}); } }), make('span', {}, make('span', { class: 'dot', css: { background: colour(i) } }), run.name)))) : null,
    charts,
    make('p', { class: 'soft small', css: { margin: '0.8rem 0 0' } }, 'Drag over a chart to zoom all of them, double-click for everything. With the keyboard: arrows read values, + and − zoom, 0 shows all.')];
}

// Sources of the data that was trained or evaluated on, if it has several.
const sourceNames = (run) => [...new Set(['data.train', 'data.eval'].flatMap((key) => Array.isArray(run.config[key]) ? run.config[key].map((source) => source.name) : []))];

// Mid-run measurements, with those before and after at the ends; the best is a larger dot.
function during(run, name, colour, source) {
  const of = (scores, sources) => (source === undefined ? scores : sources?.[source]?.scores ?? sources?.[source])?.[name];
  const points = run.curves.evaluations.map((e) => [e.step, e.seconds, of(e.scores, e.sources), source === undefined && e.best]).filter((p) => isNumber(p[2]?.value));
  const before = of(run.evaluations.before?.scores, run.evaluations.before?.sources);
  if (points.length && isNumber(before?.value)) points.unshift([0, 0, before, false]);
  const best = points.findLastIndex((p) => p[3]);
  return { name: run.name, colour, steps: points.map((p) => p[0]), seconds: points.map((p) => p[1]), values: points.map((p) => p[2].value), low: points.map((p) => p[2].low), high: points.map((p) => p[2].high), best: points.map((_, i) => i === best) };
}

function configuration(runs) {
  return settings(runs, (run) => run.config, (run, key) => JSON.stringify(run.config[key]) !== JSON.stringify(run.defaults[key]));
}

// One run: its values, those that are set first. Several: what differs, then the rest on demand.
function settings(runs, tree, isSet) {
  const keys = [...new Set(runs.flatMap((run) => Object.keys(tree(run))))];
  if (!keys.length) return [make('p', { class: 'soft' }, 'Not known.')];
  const row = (key) => make('tr', { class: runs.some((run) => isSet(run, key)) ? 'set' : null }, make('th', { scope: 'row', class: 'mono' }, key), runs.map((run) => make('td', { class: 'mono' }, shown(tree(run)[key]))));
  const table = (chosen, id) => make('div', { class: 'scroll' }, make('table', { class: 'settings', id },
    runs.length > 1 ? make('thead', {}, make('tr', {}, make('th', {}), runs.map((run) => make('th', {}, run.name)))) : null, make('tbody', {}, chosen.map(row))));
  if (runs.length === 1) {
    const set = keys.filter((key) => isSet(runs[0], key)), rest = keys.filter((key) => !set.includes(key));
    if (!set.length) return [table(keys)];
    return [table(set), rest.length ? make('details', { css: { 'margin-top': '0.9rem' } }, make('summary', {}, `${rest.length} at their defaults`), table(rest)) : null];
  }
  const differ = keys.filter((key) => new Set(runs.map((run) => JSON.stringify(tree(run)[key]))).size > 1), same = keys.filter((key) => !differ.includes(key));
  return [make('h3', {}, 'What differs'), differ.length ? table(differ, tree(runs[0]) === runs[0].config ? 'differences' : null) : make('p', { class: 'soft' }, 'Nothing.'),
    make('details', { css: { 'margin-top': '0.9rem' } }, make('summary', {}, `${same.length} the same`), table(same))];
}
