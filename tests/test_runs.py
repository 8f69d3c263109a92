"""What recipes share: records that survive, files that are whole, numbers that are right, reports from records alone."""
import errno
import json
import math
import os
import resource
import signal

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from fastai.callback.core import Callback, CancelStepException
from fastai.callback.training import GradientAccumulation
from PIL import Image

from radam_fastai.files import replacing
from radam_fastai.recipes import demo
from radam_fastai.recipes.cli import RecipeError, check_ranges
from radam_fastai.recipes.jobs import Run, run_job, sort_records
from radam_fastai.recipes.optims import OPTIMS, SCHEDS, Optim, Settings, optims
from radam_fastai.recipes.records import RunRecorder, append_record, read_records, read_runs, rectifier_summary, steps_frame
from radam_fastai.recipes.report import compare, conditions, groups, mean_std, report, summary
from radam_fastai.recorder import RectifierRecorder
from radam_fastai.rectify import rectification

pytestmark = pytest.mark.slow

# The file of records

def test_records_come_back(tmp_path):
    recs = [dict(run=i, text='ä\n\u2028', loss=[.1, float('inf'), None]) for i in range(3)]
    for r in recs: append_record(tmp_path/'new'/'records.jsonl', r)
    assert read_records(tmp_path/'new'/'records.jsonl') == recs

@pytest.mark.parametrize('cut', [1, 5, -1])
def test_half_a_line_loses_nothing_else(tmp_path, cut):
    path = tmp_path/'records.jsonl'
    append_record(path, dict(run=1))
    with path.open('a') as f: f.write(json.dumps(dict(run=2))[:cut])
    with pytest.warns(UserWarning, match='records.jsonl: line 2 is not a whole record'): assert read_records(path) == [dict(run=1)]
    append_record(path, dict(run=3))
    with pytest.warns(UserWarning, match='line 2'): assert read_records(path) == [dict(run=1), dict(run=3)]

@pytest.mark.parametrize('line', [b'17\n', b'\xff\xfe\n', b'{"a":\n'])
def test_lines_that_are_no_records(tmp_path, line):
    path = tmp_path/'records.jsonl'
    path.write_bytes(b'{"run": 1}\n' + line)
    with pytest.warns(UserWarning, match='line 2'): assert read_records(path) == [dict(run=1)]

def test_whole_last_line_without_newline(tmp_path):
    path = tmp_path/'records.jsonl'
    path.write_text('{"run": 1}')
    append_record(path, dict(run=2))
    assert read_records(path) == [dict(run=1), dict(run=2)]

@pytest.fixture
def no_space():
    "Files cannot grow beyond 100 kB: writing more fails, as on a full disk"
    soft,hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, old)

def test_full_disk_keeps_the_records(tmp_path, no_space):
    path = tmp_path/'records.jsonl'
    append_record(path, dict(run=1))
    before = path.read_bytes()
    with pytest.raises(OSError, match=f'could not write {path}: File too large'): append_record(path, dict(run=2, big='x'*200_000))
    assert path.read_bytes() == before

def test_full_disk_keeps_the_file(tmp_path, no_space):
    path = tmp_path/'a.bin'
    with replacing(path) as tmp: tmp.write_bytes(b'old')
    with pytest.raises(OSError, match='could not write .*a.bin: File too large'):
        with replacing(path) as tmp: tmp.write_bytes(b'x'*200_000)
    assert path.read_bytes() == b'old' and [p.name for p in tmp_path.iterdir()] == ['a.bin']

def test_nothing_changes_before_the_file_takes_its_place(tmp_path, monkeypatch):
    path = tmp_path/'a.bin'
    path.write_bytes(b'old')
    def fails(*a): raise OSError(errno.EIO, 'Input/output error')
    monkeypatch.setattr(os, 'replace', fails)
    with pytest.raises(OSError, match='could not write .*: Input/output error'):
        with replacing(path) as tmp: tmp.write_bytes(b'new')
    assert path.read_bytes() == b'old'

def test_full_disk_is_named(tmp_path):
    with pytest.raises(OSError, match='could not write .*: No space left on device'): append_record('/dev/full', dict(run=1))

# The recorder

def one_run(opt, out, cbs=None, fit=lambda l: l.fit_one_cycle(1, 1e-3)):
    "The record of one demo run, and its learner"
    kept = []
    def make(): return kept.append(demo.get_learner(opt).add_cbs(cbs)) or kept[-1]
    r, = run_job([Run(f'{opt}-0', 0, dict(opt=opt), make, fit, dict(name='digits'))], out, 'demo')
    return r,kept[0]

factors = {'radam':lambda t: rectification(t, .99), 'ranger':lambda t: rectification(t, .99), 'adam':lambda t: 1.,
    'adam-linear':lambda t: min(1, t/200), 'adam-exponential':lambda t: 1-math.exp(-.01*t), 'sgd':lambda t: None,
    'schedule-free':lambda t: rectification(t, .99, threshold=4)}

@pytest.mark.parametrize('opt', optims('recipe'))
def test_steps_and_epochs(opt, tmp_path):
    r,learn = one_run(opt, tmp_path, RectifierRecorder(table=False))
    rects = [factors[opt](t) for t in range(1, 23)]
    assert r['steps']['step'] == list(range(1, 23)) and r['steps']['rect'] == [o and pytest.approx(o, rel=1e-12) for o in rects]
    assert r['steps']['adaptive'] == [o is not None for o in rects]
    assert r['steps']['lr'] == pytest.approx([float(o) for o in learn.recorder.lrs])
    start = 0 if opt == 'schedule-free' else 1 # it waits where the others take momentum steps
    assert np.allclose(r['steps']['effective_lr'], [lr*(start if o is None else o) for lr,o in zip(r['steps']['lr'], rects)])
    train,valid,acc = learn.recorder.values[0]
    assert {k: r['epochs'][0][k] for k in ('train_loss','valid_loss','accuracy')} == dict(train_loss=train, valid_loss=valid, accuracy=acc)
    assert r['epochs'][0]['secs'] >= r['epochs'][0]['train_secs'] > 0 and r['secs'] >= r['epochs'][0]['secs']
    hypers, = r['hypers']
    assert opt == 'sgd' or hypers['eps'] == (1e-8 if opt == 'schedule-free' else 1e-6)
    assert hypers['lr'] == r['steps']['lr'][0] == pytest.approx(1e-3/25)
    assert set(r['versions']) == {'python','torch','fastai','radam_fastai'} and r['device']['name']
    assert read_records(tmp_path/'records.jsonl') == [r]
    df,theirs = pd.read_csv(tmp_path/f'{opt}-0.csv'),learn.rectifier.to_frame() # the same columns by another recorder
    assert df.loss.tolist() == pytest.approx(r['steps']['loss'], rel=1e-12)
    if opt == 'sgd': theirs['rho'] = np.nan # which the record leaves out where nothing rectifies
    for c in 'step','rho','rect','lr','effective_lr','mom','sqr_mom': assert np.allclose(df[c], theirs[c], equal_nan=True, rtol=1e-9), c
    assert (df.adaptive == theirs.adaptive).all()

@pytest.mark.parametrize('opt,adaptive', [(Optim('', 'fastai.optimizer', 'Adam', dict(sqr_mom=.99)), True), (OPTIMS['sgd'], False)])
def test_optimizers_that_rectify_nothing(opt, adaptive, tmp_path, monkeypatch):
    monkeypatch.setitem(OPTIMS, 'other', opt)
    r,_ = one_run('other', tmp_path)
    assert set(r['steps']['rect']) == {None} and set(r['steps']['adaptive']) == {adaptive} and r['rectifier'] is None
    df = pd.read_csv(tmp_path/'other-0.csv')
    assert df.rect.isna().all() and df.rho.isna().all() and (df.adaptive == adaptive).all() and (df.effective_lr == df.lr).all()

def test_records_without_the_newer_columns():
    r = rec(rectifier=dict(mean=.5), steps=dict(step=[5,6], loss=[1.,1.], lr=[.1,.1], effective_lr=[.1,.05], rect=[None,.5]))
    assert steps_frame(r).adaptive.tolist() == [False, True] and steps_frame({**r, 'rectifier':None}).adaptive.tolist() == [True, True]

@pytest.mark.parametrize('sched', SCHEDS)
def test_schedules(sched, tmp_path):
    "By hand, at the first update, before and after each change, and at the last"
    r,_ = one_run('adam', tmp_path, fit=Settings(sched=sched, epochs=4, lr=.1, mom=.8, pct_start=.5, div=10).fit)
    lr,n = r['steps']['lr'],r['n_steps']
    def cos(a, b, x): return a + (1-math.cos(math.pi*x))*(b-a)/2
    at = dict(flat=lambda x: .1, step=lambda x: .1 if x < .5 else .01 if x < .75 else .001,
              flat_cos=lambda x: .1 if x < .5 else cos(.1, 1e-6, 2*x-1),
              one_cycle=lambda x: cos(.01, .1, 2*x) if x < .5 else cos(.1, 1e-6, 2*x-1))[sched]
    assert n == 4*22 and lr == pytest.approx([at(i/n) for i in range(n)], rel=1e-5), sched
    assert set(r['steps']['mom']) == {.8 if sched == 'one_cycle' else .9}

def test_accumulated_gradients_are_one_step():
    learn,rec = demo.get_learner('radam'),RunRecorder()
    with learn.no_bar(),learn.no_logging(): learn.fit(1, cbs=[GradientAccumulation(128), rec])
    assert [s['step'] for s in rec.steps] == list(range(1, 12))

class SkipAt(Callback):
    def __init__(self, *at): self.at = at
    def before_step(self):
        if self.train_iter in self.at: raise CancelStepException()

def test_a_run_of_skipped_steps_is_an_error(tmp_path):
    def skip(): raise CancelStepException
    def make(): return demo.get_learner('radam', 256).add_cb(Callback(before_step=lambda cb: skip()))
    run = Run('a', 0, dict(opt='radam'), make, lambda l: l.fit(1), dict(name='digits'))
    for resume in (False, True):
        with pytest.raises(RecipeError, match="a: float16's scaler skipped every update"): run_job([run], tmp_path, 'demo', resume)

def test_skipped_steps_are_not_recorded():
    "As in half precision, whose first step often overflows"
    learn,rec = demo.get_learner('radam'),RunRecorder()
    with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=[rec, SkipAt(0, 3)])
    assert [s['step'] for s in rec.steps] == list(range(1, len(learn.dls.train)-1))

def test_a_batch_without_gradients_is_no_step():
    learn,rec = demo.get_learner('radam'),RunRecorder()
    def forget(): rec.opt.zero_grad()
    with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=[rec, Callback(after_backward=lambda _: forget() if not rec.iter else None)])
    assert [s['step'] for s in rec.steps] == list(range(1, len(learn.dls.train)))

def test_rectifier_summary():
    steps = [dict(step=t, rect=rectification(t, .99)) for t in range(1, 21)]
    summ = rectifier_summary(steps)
    assert (summ['first_adaptive'], summ['n_momentum'], summ['last']) == (6, 5, rectification(20, .99))
    assert rectifier_summary(steps[:5]) is None

# Reports

def rec(opt='a', seed=0, acc=.7, options={}, **kw):
    epoch = dict(epoch=0, step=1, train_loss=1., valid_loss=1., accuracy=acc, train_secs=1., secs=1.)
    steps = dict(step=[1], loss=[1.], lr=[.1], effective_lr=[.1], rect=[None])
    return {**dict(run=f'{opt}-{seed}', recipe='r', opt=opt, seed=seed, secs=60., epochs=[epoch], options=dict(opt=opt, **options),
                   data=dict(name='d', train=1, valid=1),
                   n_steps=1, rectifier=None, steps=steps, hypers=[dict(sqr_mom=.9)], versions=dict(torch='1', fastai='2'),
                   device=dict(name='m', threads=1)), **kw}

def test_groups_of_two_splits():
    "A preset's name says which split it is"
    def on(split, **kw): return rec(data=dict(name='d', train=1, valid=1, split=split), **kw)
    assert list(groups([on('v1'), on('v2'), on('v1', opt='b', preset='article', changed=[])])) == ['a, split v1', 'a, split v2', 'article']

def test_a_report_on_recipes_with_different_metrics(tmp_path, monkeypatch):
    "The figure of the published runs shows those of their recipe"
    other = rec(opt='b', recipe='other')
    other['epochs'][0]['error_rate'] = 1-other['epochs'][0].pop('accuracy')
    append_record(tmp_path/'records.jsonl', rec(published=dict(metric='accuracy', mean=.7, source='s')))
    append_record(tmp_path/'records.jsonl', other)
    shown = []
    monkeypatch.setattr('radam_fastai.recipes.report.plot_published', lambda groups: shown.extend(groups) or plt.figure())
    assert len(report(tmp_path)) == 2 and shown == ['a'] and (tmp_path/'all.png').exists()

def test_groups_are_by_setting_and_not_by_seed():
    recs = [rec(o, s, options=dict(lr=lr, bs=8)) for o in 'ab' for lr in (.1,.2) for s in range(3)]
    assert {k: [r['seed'] for r in rs] for k,rs in groups(recs).items()} == {f'{o}, lr {lr}': [0,1,2] for o in 'ab' for lr in (.1,.2)}
    assert list(groups([rec(preset='p', changed=[]), rec(preset='p', changed=['lr'], options=dict(lr=1))])) == ['p', 'a, lr 1']
    other_data = groups([rec(), rec(seed=1, data=dict(name='e', train=1, valid=1))])
    assert len(other_data) == 2 # not averaged, though nothing in their options differs

@pytest.mark.parametrize('change, names', [
    (dict(options=dict(opt='a', bf16=True)), ['p', 'p, bf16 True']),
    (dict(options=dict(opt='a', n_items=64)), ['p', 'p, n_items 64']),
    (dict(data=dict(name='d', train=9, valid=1)), ['p, data train 1', 'p, data train 9']),
    (dict(recipe='s'), ['p, recipe r', 'p, recipe s']), (dict(options=dict(opt='a', x=None)), ['p (1)', 'p'])])
def test_no_group_takes_anothers_name(change, names):
    "The same preset in two ways: both are in the report"
    recs = [rec(preset='p', changed=[]), {**rec(preset='p', changed=[]), **change}]
    assert list(groups(recs)) == names and sum(groups(recs).values(), []) == recs

def test_a_renamed_folder_holds_the_same_data():
    recs = [rec(seed=s, data=dict(name=n, source=n, train=1, valid=1, digest='x')) for s,n in enumerate('de')]
    assert list(map(len, groups(recs).values())) == [2]

def test_every_machine_of_a_run_is_named():
    where = dict(began='now', versions=dict(torch='1', fastai='2'))
    places = [dict(epoch=i, device=dict(name='m', threads=t), **where) for i,t in enumerate((1,4))]
    assert 'Machine: m, 1 thread, float32; python ?, torch 1, fastai 2; m, 4 threads, float32;' in conditions([rec(sittings=places)])[1]

def test_summary_against_numpy():
    accs = [.71, .75, .70]
    df = summary([rec(seed=s, acc=a, published=dict(metric='accuracy', mean=.7, std=.1, runs=20, source='s')) for s,a in enumerate(accs)])
    assert df.accuracy[0] == f'{np.mean(accs):.4f} ± {np.std(accs, ddof=1):.4f}' and df.n[0] == 3
    error = (np.var(accs, ddof=1)/3 + .1**2/20)**.5
    assert df.difference[0] == f'+{np.mean(accs)-.7:.4f}, {(np.mean(accs)-.7)/error:.1f} standard errors'
    assert df.published[0] == '0.7000 ± 0.1000 (20 runs)'

@pytest.mark.parametrize('vals,pub,text',
                         [([.7], dict(mean=.8, std=.1, runs=5), '-0.1000, from one run'), ([.5,.5,.5], dict(mean=.5), '+0.0000'),
    ([.7,.9], dict(mean=.7, std=.1, runs=5), '+0.1000, from two runs'), ([.7,.8,.9], dict(mean=.7), '+0.1000, 1.7 standard errors of ours')
])
def test_compare(vals, pub, text): assert compare(vals, pub) == text

def test_report_needs_records_alone(cli, tmp_path):
    for o in 'ab': append_record(tmp_path/o/'records.jsonl', rec(o))
    status,out,err = cli('imagenette', '--report', tmp_path)
    assert status == 0 and '0.7000' in out, err
    for f in 'table.md','all.png','a/a-0.csv','a/a-0.png','b/b-0.png': assert (tmp_path/f).exists(), f
    assert Image.open(tmp_path/'all.png').size[0] > 500
    status,_,err = cli('imagenette', '--report', tmp_path/'nowhere')
    assert status == 2 and 'no such folder' in err and len(err.splitlines()) == 1

def test_mean_std():
    assert mean_std([.7,.8,.9]) == '0.8000 ± 0.1000' and mean_std([.7]) == '0.7000'

def test_ranges(): check_ranges(dict(lr=None))

# Records of anybody's making

def deep(n=100_000): return b'{"epochs":' + b'['*n + b']'*n + b'}'

HOSTILE = {'no opt': dict(opt=None), 'a formula': dict(opt='$\\b$'), 'options': dict(options=[1]), 'no epochs': dict(epochs=[]),
           'an epoch of text': dict(epochs=[dict(epoch=0, step=1, train_secs=1., secs=1., accuracy='=1+1')]),
    'uneven steps': dict(steps=dict(step=[1,2], loss=[1.], lr=[.1], effective_lr=[.1], rect=[None])),
    'steps of text': dict(steps=dict(step=[1], loss=['=cmd'], lr=[.1], effective_lr=[.1], rect=[None])),
    'a number without end': dict(epochs=[dict(epoch=0, step=1, train_secs=1., secs=1., accuracy=10**400)]), 'no hypers': dict(hypers=[]),
    'other data': dict(data=dict(name='d')),
    'a figure of nothing': dict(published=dict(metric='bleu', mean=.5)),
    'a figure of text': dict(published=dict(metric='accuracy', mean=.5, std='x')), 'runs of text': dict(published=dict(metric='accuracy',
                                                                                                        mean=.5, runs='20')),
    'a preset of no name': dict(preset=3), 'no loss': dict(epochs=[dict(epoch=0, step=1, train_secs=1., secs=1., accuracy=.5)]),
    'step 0': dict(steps=dict(step=[0], loss=[1.], lr=[.1], effective_lr=[.1], rect=[None])), 'a rectifier of text': dict(rectifier='x'),
    'a β2 of 2': dict(hypers=[dict(sqr_mom=2.)])}

@pytest.mark.parametrize('command', ['imagenette', 'experiment'])
@pytest.mark.parametrize('what', HOSTILE)
def test_a_report_leaves_out_what_is_no_record(cli, tmp_path, command, what):
    "With a warning that names the file; the others are reported"
    path,good = tmp_path/'records.jsonl',rec(recipe='lr-robustness', opt='adam', options=dict(lr=.1))
    for r in {**good, **HOSTILE[what]}, good: append_record(path, r)
    with path.open('ab') as f: f.write(deep())
    status,out,err = cli(command, '--report', tmp_path)
    assert status == 0 and '0.7' in out and all(l.startswith(f'radam-{command}: warning: {path}: ') for l in err.splitlines())
    assert 'a record is not of a run' in err and 'line 3 is not a whole record, skipped' in err

@pytest.mark.parametrize('name', ['../../victim', '/{victim}', 'a/b', '..\\victim', '', '.', '..', '.tmp-a', 'a\0b', 'a\nb', '\x1b[2J',
                                  '\ud800', 'a$\\b$'])
def test_a_report_writes_into_its_folder_alone(tmp_path, name):
    (tmp_path/'victim.csv').write_text('mine')
    inside = tmp_path/'a'/'b'
    append_record(inside/'records.jsonl', rec())
    append_record(inside/'records.jsonl', rec(run=name.format(victim=tmp_path/'victim')))
    with pytest.warns(UserWarning, match='is not a plain file name'): report(inside)
    assert (tmp_path/'victim.csv').read_text() == 'mine' and {p.name for p in tmp_path.iterdir()} == {'a','victim.csv'}

def test_a_link_is_not_written_through(tmp_path):
    "A name that a new file has until it is whole may be a link to a file elsewhere"
    (tmp_path/'victim').write_text('mine')
    (tmp_path/'.tmp-a.md').symlink_to(tmp_path/'victim')
    with replacing(tmp_path/'a.md') as tmp: tmp.write_text('new')
    assert (tmp_path/'victim').read_text() == 'mine' and (tmp_path/'a.md').read_text() == 'new' and not (tmp_path/'a.md').is_symlink()

def test_records_that_are_a_folder(cli, tmp_path):
    (tmp_path/'records.jsonl').mkdir()
    status,out,err = cli('imagenette', '--report', tmp_path)
    assert status == 2 and err == f"radam-imagenette: could not read {tmp_path/'records.jsonl'}: Is a directory\n"

def test_records_without_what_an_experiment_shows(cli, tmp_path):
    append_record(tmp_path/'records.jsonl', rec(recipe='degenerate', opt='sgd'))
    append_record(tmp_path/'records.jsonl', rec(recipe='lr-robustness', opt='adam'))
    status,out,err = cli('experiment', '--report', tmp_path)
    assert status == 2 and 'a record of lr-robustness lacks what its tables need' in err and len(err.splitlines()) == 1

def test_names_that_look_like_numbers(tmp_path):
    append_record(tmp_path/'r.jsonl', rec(data=dict(name='Infinity', train=1, valid=1)))
    assert read_runs(tmp_path/'r.jsonl')[0]['data']['name'] == 'Infinity'

def test_records_are_sorted_beside_lines_that_are_none(tmp_path):
    path = tmp_path/'records.jsonl'
    path.write_text('{"run": "b"}\n{"run": ["a"]}\nx\n{"run": "a"}\n')
    sort_records(path, ['a','b'])
    assert path.read_text() == '{"run": "a"}\n{"run": ["a"]}\nx\n{"run": "b"}\n'

def test_numbers_that_json_does_not_have(tmp_path):
    "Each line is strict JSON, as other programs read it; older lines have NaN"
    path,nan = tmp_path/'records.jsonl',math.nan
    append_record(path, rec(acc=nan, steps=dict(step=[1,2,3], loss=[nan, math.inf, -math.inf], lr=[.1]*3, effective_lr=[.1]*3,
                                                rect=[None]*3)))
    def refuse(name): raise AssertionError(name)
    assert json.loads(path.read_text(), parse_constant=refuse)['steps']['loss'] == ['NaN','Infinity','-Infinity']
    with path.open('a') as f: f.write(json.dumps(rec(acc=nan)) + '\n' + json.dumps(rec(acc=None)) + '\n')
    runs = read_runs(path)
    assert all(math.isnan(r['epochs'][0]['accuracy']) for r in runs) and runs[0]['steps']['loss'][1:] == [math.inf, -math.inf]
    assert math.isnan(runs[0]['steps']['loss'][0])
    assert summary(runs).accuracy[0].startswith('nan') and steps_frame(runs[0]).loss.tolist()[1:] == [math.inf, -math.inf]

def test_cells_are_text(tmp_path):
    "In a table for a README: no HTML, no further column, no code for a terminal"
    evil = '<img src=x onerror=alert(1)> | \x1b[2J & \n# $\\b$'
    append_record(tmp_path/'records.jsonl',
                  rec(preset=evil, changed=[], run='a', data=dict(name=evil, train=1, valid=1),
                      published=dict(metric='accuracy', mean=.5, source=evil)))
    table = report(tmp_path)
    text = (tmp_path/'table.md').read_text()
    assert not set('<>\x1b') & set(text) and '\\|' in text and '\n#' not in text
    assert all(line.replace('\\|', '').count('|') == len(table.columns)+1 for line in text.splitlines()[:3])

@pytest.mark.parametrize('code', [errno.EINVAL, errno.ENOTSUP])
def test_file_systems_that_cannot_sync(tmp_path, monkeypatch, code):
    "The file is whole: there is nothing to end a job for"
    def fails(fd): raise OSError(code, os.strerror(code))
    monkeypatch.setattr(os, 'fsync', fails)
    with replacing(tmp_path/'a') as tmp: tmp.write_text('whole')
    append_record(tmp_path/'records.jsonl', dict(run=1))
    assert (tmp_path/'a').read_text() == 'whole' and read_records(tmp_path/'records.jsonl') == [dict(run=1)]
