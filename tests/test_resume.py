"""A job that is killed at any moment ends, when it is resumed, with the numbers of a job that was not."""
import os
import random
import shutil
import signal
import time
from functools import partial

import pytest
import torch
from fastai.callback.core import Callback
from filelock import FileLock

from helpers import (
    FULL,
    At,
    CPUMixedPrecision,
    Stop,
    ended,
    equal_jobs,
    forked,
    get_learner,
    one,
    overflow,
    same_checkpoint,
    small_job,
    tally,
)
from mutate import RunsCode, damage
from radam_fastai.optimizer import RAdamFn, RangerFn
from radam_fastai.recipes import data, demo, imagenette, jobs
from radam_fastai.recipes.checkpoint import epoch_seed, load_checkpoint, save_checkpoint
from radam_fastai.recipes.cli import OptionError, RecipeError
from radam_fastai.recipes.jobs import Run, run_job, show_plan
from radam_fastai.recipes.records import read_records
from radam_fastai.torch_optim import RAdamWrapper

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures('tiny')]
quick = dict(arch='xresnet18', size=32, bs=16, epochs=3, workers=0, preset='over9000-radam')

def stopped_at(monkeypatch, batch):
    get = imagenette.get_learner
    monkeypatch.setattr(imagenette, 'get_learner', lambda *a: get(*a).add_cb(Stop(batch)))

variants = dict(radam=dict(sched='one_cycle'), bf16=dict(bf16=True, channels_last=True),
                ranger=dict(opt='ranger', channels_last=True, n_items=40, bs=8),
    adam=dict(opt='adam', mixup=.4, sh=.3, sa=True, act_fn='Mish', workers=2, aug='resize'),
    memory=dict(in_memory=True, sh=.3), free={'opt': 'schedule-free', 'sched': 'flat'})

@pytest.mark.parametrize('variant', variants)
def test_resumed_equals_uninterrupted(images, tmp_path, monkeypatch, variant):
    monkeypatch.setattr(data, 'UNPACKED', tmp_path/'unpacked')
    kw = {**quick, 'path':images, 'keep':True, **variants[variant]}
    imagenette.main(**kw, out=tmp_path/'whole')
    with monkeypatch.context() as m:
        stopped_at(m, 6)
        with pytest.raises(KeyboardInterrupt): imagenette.main(**kw, out=tmp_path/'part')
    kw['workers'] = 2-kw['workers'] # how many processes read is no part of the run
    ckpt, = (tmp_path/'part').glob('*.pth')
    assert load_checkpoint(ckpt)['epoch'] == 1
    record, = imagenette.main(**kw, out=tmp_path/'part', resume=True)
    assert [s['epoch'] for s in record['sittings']] == [0, 1]
    equal_jobs(tmp_path/'whole', tmp_path/'part')

# In the middle of a schedule

OPTS = dict(RAdam=RAdamFn, Ranger=RangerFn,
            RAdamWrapper=partial(RAdamWrapper, betas=(.9,.99), weight_decay=.1, decoupled_weight_decay=True))
FITS = dict(one_cycle=lambda learn: learn.fit_one_cycle(4, slice(.002, .02)),
            flat_cos=lambda learn: learn.fit_flat_cos(4, slice(.002, .02), pct_start=.3))

class Thaw(Callback):
    "Train the head alone for one epoch, then everything"
    def before_epoch(self): self.learn.freeze() if self.epoch == 0 else self.learn.unfreeze()
class Frozen(Callback):
    def before_fit(self): self.learn.freeze()

WITH = {'nothing else': list, 'frozen groups': lambda: [Frozen()], 'groups that thaw': lambda: [Thaw()],
    'a loss scaler': lambda: [CPUMixedPrecision(), At('after_backward', overflow, [1, 8, 9, 16])]}

@pytest.mark.parametrize('opt', OPTS)
@pytest.mark.parametrize('fit', FITS)
@pytest.mark.parametrize('more', WITH)
@pytest.mark.parametrize('batch', [7, 18])
def test_resumed_in_the_middle_of_a_schedule(tmp_path, opt, fit, more, batch):
    "Of 4 epochs of 5 batches: weights, averages, slow weights, loss scale, every row, to the bit"
    def job(out, cbs=(), resume=False):
        def make(): return get_learner(OPTS[opt], dtype=torch.float32, cbs=[*WITH[more](), *cbs])
        return run_job([Run('a', 0, dict(opt=opt), make, FITS[fit], dict(name='random'))], out, 'test', resume, keep=True)
    job(tmp_path/'whole')
    with pytest.raises(KeyboardInterrupt): job(tmp_path/'part', [Stop(batch)])
    assert load_checkpoint(tmp_path/'part'/'a.pth')['epoch'] == batch//5
    job(tmp_path/'part', resume=True)
    equal_jobs(tmp_path/'whole', tmp_path/'part')
    end = load_checkpoint(tmp_path/'part'/'a.pth')
    assert (end['scaler'] is not None) == (more == 'a loss scaler')
    if end['scaler']: assert end['scaler']['scale'] == 256/2**4 and len(end['steps']) == 20-4

# Killed from outside

def kill_after(f, secs):
    "Run `f` in a process that is killed after `secs` seconds, unless it has ended: its exit status, -9 if it was killed"
    pid,end = forked(f),time.monotonic()+secs
    while time.monotonic() < end:
        done,status = os.waitpid(pid, os.WNOHANG)
        if done: return os.waitstatus_to_exitcode(status)
        time.sleep(.002)
    os.kill(pid, signal.SIGKILL)
    return ended(pid)

@pytest.fixture
def jobs_to_kill(tiny, images):
    "By name: one whose data is in memory, one with processes that read images"
    def image_job(out, resume=False):
        imagenette.main(**{**quick, 'epochs':2, 'workers':2}, path=images, runs=2, keep=True, out=out, resume=resume)
    return dict(digits=small_job, images=image_job)

@pytest.fixture(scope='module')
def uninterrupted(tmp_path_factory):
    "Runs a job once: its folder, and how long it takes"
    done = {}
    def _run(name, job):
        if name not in done:
            out,start = tmp_path_factory.mktemp(name),time.monotonic()
            assert kill_after(partial(job, out), 100) == 0
            done[name] = out,time.monotonic()-start
        return done[name]
    return _run

@pytest.fixture
def whole(jobs_to_kill, uninterrupted): return uninterrupted('digits', small_job)

@pytest.mark.slow
@pytest.mark.parametrize('name,n_kills', [('digits', 200 if FULL else 10), ('images', 50 if FULL else 5)])
def test_killed_at_random_moments(jobs_to_kill, uninterrupted, tmp_path, name, n_kills):
    "Again and again, at most four times a job; then it ends as the uninterrupted one"
    job,rng,kills = jobs_to_kill[name],random.Random(name),0
    whole,secs = uninterrupted(name, job)
    while kills < n_kills:
        out,here = tmp_path/f'{kills}',0
        while status := kill_after(partial(job, out, resume=True), rng.uniform(0, 1.2)*secs if here < 4 else 100):
            assert status == -9, 'it failed'
            here += 1
        equal_jobs(whole, out)
        tally[f'kills at random, {name}', 'gone on from to the same bits'] += here
        kills += here

def second(n, *args): return n == 2
def called(end): return lambda n, src, dst: str(dst).endswith(end)

dangerous = { # a function, and the call of it that is the last
    'checkpoint half-written': (torch, 'save', second), 'checkpoint not yet in place': (os, 'replace', second),
    'record not yet written': (jobs, 'append_record', second),
    'record half-written': (os, 'fsync', lambda n, fd: os.path.realpath(f'/proc/self/fd/{fd}').endswith('records.jsonl')),
    'steps not yet in place': (os, 'replace', called('adam-1.csv')), 'record written, checkpoint still there': (jobs, 'save_run', second),
    'report not yet written': (jobs, 'report', lambda *a: True), 'table not yet in place': (os, 'replace', called('table.md'))}

@pytest.mark.parametrize('moment', dangerous)
def test_killed_at_dangerous_moments(whole, tmp_path, monkeypatch, moment):
    "Before a function does anything, or, while something is written, with half of it done"
    where,name,when = dangerous[moment]
    f,calls = getattr(where, name),[]
    def die(*a, **kw):
        calls.append(0)
        if when(len(calls), *a):
            if name == 'save':
                f(*a, **kw)
                a[1].truncate(a[1].tell()//2)
            if name == 'fsync': os.truncate(a[0], os.fstat(a[0]).st_size//2)
            os.kill(os.getpid(), signal.SIGKILL)
        return f(*a, **kw)
    out = tmp_path/'out'
    with monkeypatch.context() as m:
        m.setattr(where, name, die)
        assert kill_after(partial(small_job, out), 100) == -9
    assert kill_after(partial(small_job, out, resume=True), 100) == 0
    # the half, which is skipped
    if moment == 'record half-written': (out/'records.jsonl').write_bytes(b''.join((out/'records.jsonl').read_bytes().splitlines(True)[1:]))
    equal_jobs(whole[0], out)
    tally['kills at dangerous moments', 'gone on from to the same bits'] += 1

# What is not gone on with

@pytest.fixture(scope='module')
def part_once(tmp_path_factory):
    out = tmp_path_factory.mktemp('once')/'part'
    with pytest.raises(KeyboardInterrupt): one(out, cbs=Stop(7))
    return out

@pytest.fixture
def part(part_once, tmp_path):
    "A folder with a run that was interrupted in its second epoch"
    return shutil.copytree(part_once, tmp_path/'part')

@pytest.mark.parametrize('change,says', [(dict(lr=.1), 'lr 0.01, not 0.1'), (dict(epochs=3), 'epochs 2, not 3'),
                                         (dict(opt='adam'), 'opt radam, not adam'),
    (dict(seed=7), 'seed 0, not 7'), (dict(data=dict(name='letters')), 'data with name digits, not letters')])
@pytest.mark.parametrize('finished', [False, True])
def test_other_options_are_named(part, change, says, finished):
    if finished: one(part, resume=True)
    before = {p.name: p.read_bytes() for p in part.iterdir()}
    with pytest.raises(OptionError, match=f'--out .*part: radam-0 was begun with {says}: give'): one(part, **change, resume=True)
    assert {p.name: p.read_bytes() for p in part.iterdir()} == before

def test_without_resume_nothing_is_touched(part):
    before = (part/'radam-0.pth').read_bytes()
    with pytest.raises(OptionError, match='radam-0 is not finished there; --resume goes on with this job, --anew begins'): one(part)
    r, = one(part, anew=True)
    assert r['run'] == 'radam-0-2' and (part/'radam-0.pth').read_bytes() == before
    assert one(part)[0]['run'] == 'radam-0-3'
    assert [r['run'] for r in read_records(part/'records.jsonl')] == ['radam-0-2','radam-0-3'] and (part/'radam-0-2.csv').exists()

def test_a_job_that_was_begun_again_and_killed(tmp_path):
    "It was cut off before its second run, of which an earlier job has another: that one begins"
    def job(epochs, cbs=None, **kw):
        def run(seed): return Run(f'a-{seed}', seed, dict(opt='radam', epochs=epochs), lambda: demo.get_learner('radam', 256).add_cbs(cbs),
                                  lambda l: l.fit_flat_cos(epochs, .01), dict(name='digits'))
        return [r['run'] for r in run_job([run(0), run(1)], tmp_path, 'demo', **kw)]
    job(1)
    with pytest.raises(KeyboardInterrupt): job(2, Stop(7), anew=True)
    with pytest.raises(OptionError, match='a-0-2 was begun with epochs 2, not 3'): job(3, resume=True)
    assert job(2, resume=True) == ['a-0-2','a-1-2']
    assert [r['options']['epochs'] for r in read_records(tmp_path/'records.jsonl')] == [1,1,2,2]

def test_another_job_in_the_folder(tmp_path):
    "It has runs of the same names and settings, which are not this one's"
    def job(recipe, epochs=1, **kw):
        run = Run('a', 0, dict(opt='radam', epochs=epochs), lambda: demo.get_learner('radam', 256), lambda l: l.fit_flat_cos(epochs, .01),
                  dict(name='digits'))
        return [r['run'] for r in run_job([run], tmp_path, recipe, **kw)]
    assert job('one') == ['a']
    with pytest.raises(OptionError, match='a was begun with recipe one, not two'): job('two', resume=True)
    assert job('two') == ['a-2'] and job('one', resume=True) == ['a'] and job('two', resume=True) == ['a-2']
    assert job('one', 2) == ['a-3'] # nothing of it was begun
    assert [r['recipe'] for r in read_records(tmp_path/'records.jsonl')] == ['one','two','one']

def test_the_plan_of_beginning_again(part, capsys):
    run = Run('radam-0', 0, dict(opt='radam', lr=.01, epochs=2), None, None, dict(name='digits'))
    for anew,says in (False, '1 of 2 epochs'), (True, 'radam-0-2'):
        show_plan([run], part, 'demo', anew=anew)
        assert says in capsys.readouterr().out

def test_finished_runs_are_not_repeated(tmp_path, monkeypatch):
    done = one(tmp_path)
    monkeypatch.setattr(jobs, 'train_run', lambda *a: pytest.fail('it trained'))
    assert one(tmp_path, resume=True) == done

def test_a_run_without_its_record_is_not_repeated(tmp_path, monkeypatch):
    "The checkpoint goes after the record is there: a job that ends between the last epoch and the record has lost nothing"
    def interrupt(*a): raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(jobs, 'append_record', interrupt)
        with pytest.raises(KeyboardInterrupt): one(tmp_path)
    monkeypatch.setattr(demo, 'get_learner', lambda *a: pytest.fail('it trained again'))
    r, = one(tmp_path, resume=True)
    assert read_records(tmp_path/'records.jsonl') == [r] and len(r['epochs']) == 2 and not list(tmp_path.glob('*.pth'))

@pytest.mark.parametrize('seed', range(30))
def test_damaged_checkpoints(part, seed):
    "Refused with the file's name, or, where the damage is in no data, read as it was"
    path,rng = part/'radam-0.pth',random.Random(seed)
    good = load_checkpoint(path)
    path.write_bytes(damage(path.read_bytes(), rng)[0])
    try: same_checkpoint(load_checkpoint(path), good)
    except RecipeError as e: assert str(path) in str(e) and len(str(e).splitlines()) == 1

def test_damaged_checkpoint_stops_the_job(part):
    path = part/'radam-0.pth'
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(RecipeError, match='radam-0.pth is not a whole checkpoint .*: delete it'): one(part, resume=True)

def test_checkpoints_run_no_code(tmp_path):
    torch.save(dict(model=RunsCode(tmp_path/'ran')), tmp_path/'a.pth')
    with pytest.raises(RecipeError, match='it contains more than data'): load_checkpoint(tmp_path/'a.pth')
    assert not (tmp_path/'ran').exists()

@pytest.mark.parametrize('state', [[1], dict(a=1), dict(model={}, opt={})])
def test_other_files_are_no_checkpoints(tmp_path, state):
    save_checkpoint(tmp_path/'a.pth', state)
    with pytest.raises(RecipeError, match='a.pth is not a checkpoint of a recipe'): load_checkpoint(tmp_path/'a.pth')

@pytest.mark.parametrize('what,change', [('model', lambda s: s['model'].popitem()),
                                         ('shape', lambda s: s['model'].update({'5.bias': torch.ones(3)})),
    ('state', lambda s: s['opt']['state'].pop()), ('average', lambda s: s['opt']['state'][0].update(grad_avg=torch.ones(3)))])
def test_checkpoint_that_does_not_fit(part, what, change):
    state = load_checkpoint(part/'radam-0.pth')
    change(state)
    save_checkpoint(part/'radam-0.pth', state)
    with pytest.raises(RecipeError, match='the checkpoint of radam-0 does not fit the model or the optimizer: '): one(part, resume=True)
    assert not (part/'records.jsonl').exists()

def test_one_job_at_a_time(part):
    with FileLock(part/'.lock'):
        with pytest.raises(OptionError, match='another job is writing there'): one(part, resume=True)
    one(part, resume=True) # free again

def test_one_of_many_that_start_at_once(tmp_path):
    "Into one folder: each does its own whole run, or is told to wait; no record is lost or mixed"
    ends = [ended(pid) for pid in [forked(partial(one, tmp_path/'out', epochs=3)) for _ in range(6)]]
    records = read_records(tmp_path/'out'/'records.jsonl')
    assert set(ends) <= {0, 2} and 2 in ends and len(records) == ends.count(0) >= 1
    assert sorted(r['run'] for r in records) == sorted(p.stem for p in (tmp_path/'out').glob('*.csv'))
    assert len({r['run'] for r in records}) == len(records)
    alone, = one(tmp_path/'alone', epochs=3)
    assert all(r['steps'] == alone['steps'] for r in records)

def test_a_killed_job_leaves_no_lock(tmp_path):
    "Not even if a process of its own outlives it, as those that read images do for some seconds"
    def job():
        with jobs.only_job(tmp_path/'out'):
            if not os.fork():
                time.sleep(3)
                os._exit(0)
            os.kill(os.getpid(), signal.SIGKILL)
    (tmp_path/'out').mkdir()
    assert ended(forked(job)) == -9
    with jobs.only_job(tmp_path/'out'): pass

def test_half_written_files_are_removed(part):
    (part/'.tmp-another.pth').write_bytes(b'half')
    one(part, resume=True)
    assert not list(part.glob('.tmp-*'))

def test_disk_full_while_saving(part, monkeypatch):
    before = (part/'radam-0.pth').read_bytes()
    def full(*a): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(torch, 'save', full)
    with pytest.raises(OSError, match='could not write .*radam-0.pth: No space left on device'): one(part, resume=True)
    assert (part/'radam-0.pth').read_bytes() == before

def test_epoch_seeds():
    assert len({epoch_seed(s, e) for s in range(50) for e in range(200)}) == 10_000
    assert epoch_seed(42, 3) == 2541583436 # another number would change every resumed run

def test_random_numbers_of_an_epoch_do_not_depend_on_those_before(tmp_path):
    "A callback that draws numbers in the first epoch changes nothing in the order of the second"
    class Draw(Callback):
        def __init__(self, n): self.n = n
        def after_train(self): torch.rand(self.n), random.random()
    a,b = one(tmp_path/'a', cbs=Draw(1)),one(tmp_path/'b', cbs=Draw(9))
    assert a[0]['steps'] == b[0]['steps']

@pytest.mark.parametrize('kept', [False, True])
def test_a_checkpoint_that_was_to_go_goes(tmp_path, monkeypatch, kept):
    "Killed between the record and the end of the checkpoint: the next job deletes it, unless it was to be kept"
    def interrupt(*a): raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(jobs, 'save_run', interrupt)
        with pytest.raises(KeyboardInterrupt): one(tmp_path, keep=kept)
    assert (tmp_path/'radam-0.pth').exists()
    one(tmp_path, resume=True)
    assert (tmp_path/'radam-0.pth').exists() == kept
