"""Many runs at once, on every engine: the bits of one after the other, whatever is killed; and what is refused."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from fastai.callback.core import Callback
from filelock import FileLock

from helpers import alive, equal_jobs, result_of
from radam_fastai.recipes import demo, parallel
from radam_fastai.recipes.checkpoint import EpochCheckpoint, load_checkpoint, save_checkpoint
from radam_fastai.recipes.cli import OptionError, RecipeError
from radam_fastai.recipes.jobs import EpochProgress, Run, run_job, show_plan, train_left
from radam_fastai.recipes.parallel import Engine, Outcome, ProgressBoard, ProgressWriter, pack, unpack
from radam_fastai.recipes.records import read_records

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures('tiny'), pytest.mark.xdist_group('parallel')]
tests = Path(__file__).resolve().parent

class Once(Callback):
    "Does something in the second epoch, unless it did so before"
    def __init__(self, path, do): self.path,self.do = path,do
    def before_batch(self):
        if (self.epoch, self.iter) != (1, 2) or self.path.exists(): return
        self.path.touch()
        self.do()

def die(): os.kill(os.getpid(), signal.SIGKILL)
def fail(): raise ValueError('not today')

def runs(cb=None, secs=0.):
    "Four runs of the demo's network; `cb` is of the second, and all wait `secs` seconds, the first one three times as long"
    def make(opt, seed): return demo.get_learner(opt, 256).add_cbs(cb if (opt, seed) == ('radam', 2) else None)
    def fit(wait, learn):
        time.sleep(wait)
        learn.fit_one_cycle(3, 1e-2)
    def run(opt, seed):
        wait = secs*(3 if (opt, seed) == ('radam', 1) else 1)
        return Run(f'{opt}-{seed}', seed, dict(opt=opt), partial(make, opt, seed), partial(fit, wait), dict(name='digits'))
    return [run(opt, seed) for opt in ('radam','adam') for seed in (1,2)]

@pytest.fixture(scope='module')
def folder(tmp_path_factory): return tmp_path_factory.mktemp('parallel')/'whole'

@pytest.fixture
def whole(tiny, folder):
    "The same job, one run after the other"
    if not folder.exists(): run_job(runs(), folder, 'test', keep=True)
    return folder

def needs(name): return pytest.param(name, marks=pytest.mark.skipif(not find_spec(name or 'joblib'), reason=f'{name} is not installed'))

@pytest.mark.parametrize('cluster', [None, needs('dask'), needs('ray')])
def test_same_bits_with_a_worker_killed(whole, tmp_path, cluster):
    "The first run is the last to end; of the second, a worker dies in the middle of an epoch"
    records = run_job(runs(Once(tmp_path/'died', die), 1), tmp_path/'out', 'test', keep=True, engine=Engine(2, cluster))
    equal_jobs(whole, tmp_path/'out')
    assert (tmp_path/'died').exists() and [s['epoch'] for s in records[1]['sittings']] == [0, 1]

def test_a_run_that_fails(whole, tmp_path, capsys):
    "It is named, the others are finished, and `resume` trains it"
    with pytest.raises(RecipeError, match='radam-2: ValueError: .* not today; all others are finished; --resume trains the rest'):
        run_job(runs(Once(tmp_path/'failed', fail)), tmp_path/'out', 'test', keep=True, engine=Engine(2))
    assert len(read_records(tmp_path/'out'/'records.jsonl')) == 3 and 'in fail' in capsys.readouterr().err
    run_job(runs(), tmp_path/'out', 'test', True, True, engine=Engine(2))
    equal_jobs(whole, tmp_path/'out')

def blind(folder, progress, name, share, payload=None): return parallel._work(Path('nowhere'), Path('nowhere'), name, share, payload)

def test_workers_that_do_not_see_the_folder(whole, tmp_path, monkeypatch, capsys):
    "Checkpoints come back after every epoch, and the run goes on from there"
    monkeypatch.setattr(parallel, '_work', blind) # here: in the workers, it is what it was
    records = run_job(runs(), tmp_path/'out', 'test', keep=True, engine=Engine(2))
    equal_jobs(whole, tmp_path/'out')
    assert all([s['epoch'] for s in r['sittings']] == [0, 1, 2] for r in records)
    out = capsys.readouterr().out
    assert all(out.count(f'\nadam-2: epoch {i} of 3') == 1 for i in (1,2,3))

SCRIPT = '''
import os, signal, sys
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler) # a job in the background does not inherit it
sys.path.insert(0, {tests!r})
import torch
from fastai.callback.core import Callback
from test_parallel import Engine, run_job, runs
from radam_fastai.recipes.cli import command

class Where(Callback):
    def before_batch(self): Path({here!r}, f'worker-{{os.getpid()}}').touch()
@command
def main(out:Path=None, resume:bool=False):
    torch.set_num_threads(1)
    run_job(runs(Where(), .5), out, 'test', keep=True, engine=Engine(2))
'''

@pytest.mark.parametrize('sig', [signal.SIGKILL, signal.SIGINT])
def test_the_first_process_is_killed(whole, tmp_path, sig):
    "kill -9 and Ctrl-C end the workers; the next job begins at once and loses nothing"
    (tmp_path/'job.py').write_text(SCRIPT.format(tests=str(tests), here=str(tmp_path)))
    out = tmp_path/'out'
    env = {**os.environ, 'PYTHONPATH': os.pathsep.join(sys.path)}
    job = subprocess.Popen([sys.executable, 'job.py', '--out', out], cwd=tmp_path, env=env, start_new_session=True, stderr=subprocess.PIPE,
                           text=True)
    while not list(tmp_path.glob('worker-*')): # of the second run
        assert job.poll() is None, job.stderr.read()
        time.sleep(.01)
    os.kill(job.pid, sig) if sig == signal.SIGKILL else os.killpg(job.pid, sig)
    err = job.communicate()[1]
    assert job.returncode == (-9 if sig == signal.SIGKILL else 130) and (sig == signal.SIGKILL or '--resume goes on' in err), err
    run_job(runs(), out, 'test', True, True, engine=Engine(2))
    for p in tmp_path.glob('worker-*'):
        assert not alive(p.name.partition('-')[2])
    equal_jobs(whole, out)

def test_a_job_that_has_ended_is_not_written_to(tmp_path):
    "Its folder of news is gone: a worker that lives on ends before it writes the next checkpoint"
    class Gone(ProgressWriter):
        def __call__(self, done, total, note=''):
            if note.startswith('epoch 2'): self.path = tmp_path/'gone'/'radam-1'
            super().__call__(done, total, note)
    with pytest.raises(FileNotFoundError): train_left(runs()[0], 'radam-1', 'test', tmp_path, Gone(tmp_path/'news'))
    assert load_checkpoint(tmp_path/'radam-1.pth')['epoch'] == 1 and EpochProgress.order < EpochCheckpoint.order

def test_a_call_that_always_kills_its_worker(monkeypatch, tmp_path):
    "It is given up the third time that it has nothing new to tell; the others go on"
    monkeypatch.setattr(Engine, 'start', lambda self: parallel.nullcontext(2))
    attempts = []
    def attempt(self, names):
        attempts.append(names)
        self.board.notes['a'] = 'epoch 1' if len(attempts) > 1 else ''
        if len(attempts) == 3: yield Outcome('b', 1)
        if len(attempts) == 5: yield Outcome('c', 2)
        self.lost = ['a'] if len(attempts) < 5 else []
    monkeypatch.setattr(parallel.Retries, 'attempt', attempt)
    got = list(parallel.side_by_side(dict.fromkeys('abc', len), tmp_path, Engine(2)))
    assert [(o.name, o.value) for o in got] == [('b', 1), ('a', None), ('c', 2)] and 'died three times' in got[1].error
    assert attempts == [['a','b','c']]*3 + [['a','c'], ['c']]

# What a worker gets

def private():
    "Bytes of memory that are this process's own"
    lines = Path('/proc/self/smaps_rollup').read_text().splitlines()
    return sum(int(l.split()[1])*1024 for l in lines if l.startswith('Private_Dirty'))

@pytest.mark.skipif(not Path('/proc/self/smaps_rollup').exists(), reason='Linux tells what memory is shared')
def test_data_is_mapped(tmp_path):
    "A call that reads 200 MB has not copied them, and neither has the file of two such calls"
    x = torch.ones(50, 10**6)
    pack(dict(a=lambda: x.sum(1), b=lambda: x.mean()), tmp_path/'calls')
    def grown():
        before = private()
        assert unpack(tmp_path/'calls')['a']().tolist() == [1e6]*50
        return private() - before
    assert result_of(grown) < 20e6 and (tmp_path/'calls').stat().st_size < 201e6

def test_each_worker_has_a_gpu_of_its_own(monkeypatch, tmp_path):
    "As far as there are several: made up, for three workers of two"
    cuda = dict(is_available=lambda: True, device_count=lambda: 2, set_device=(gpus := []).append)
    for k,v in cuda.items(): monkeypatch.setattr(torch.cuda, k, v)
    with parallel._as_worker(tmp_path, 3, 1),parallel._as_worker(tmp_path, 3, 1):
        with parallel._as_worker(tmp_path, 3, 1): pass
        with parallel._as_worker(tmp_path, 3, 1): pass
    assert gpus == [0, 1, 0, 0]

def test_threads_are_shared(monkeypatch, tmp_path):
    monkeypatch.setattr(parallel.defaults, 'cpus', 9)
    before = torch.get_num_threads()
    with parallel._as_worker(tmp_path, 4, 3): assert (torch.get_num_threads(), parallel.defaults.cpus) == (3, 2)
    assert (torch.get_num_threads(), parallel.defaults.cpus) == (before, 9)

# What is seen

@pytest.fixture
def clock(monkeypatch):
    now = [0.]
    monkeypatch.setattr(parallel.time, 'monotonic', lambda: now[0])
    return now

def half_way(board, folder, clock):
    "After 30 seconds, one and a half of three runs are trained, one of which was begun before"
    a,b = ProgressWriter(folder/'a'),ProgressWriter(folder/'b')
    a(0, 2)
    b(1, 4)
    board.look(folder)
    clock[0] = 30.
    a(2, 2, 'epoch 2 of 2')
    b(3, 4, 'epoch 3 of 4')
    (folder/'c').write_text('[0, 1') # it is being written
    for _ in range(2): board.look(folder)
    board.end(Outcome('a', 1), folder)
    board.look(folder)

def test_lines(tmp_path, capsys, clock):
    "One for each epoch; 1.25 runs are left, of which 1.5 took 30 seconds"
    half_way(ProgressBoard('abc'), tmp_path, clock)
    assert capsys.readouterr().out.splitlines() == ['a: epoch 2 of 2', 'b: epoch 3 of 4', '1 of 3 finished, about 0:00:25 left']

def test_bars(tmp_path, capsys, clock, monkeypatch):
    "On a terminal, of the runs that are being trained, and of all"
    monkeypatch.setattr(sys.stdout, 'isatty', lambda: True, raising=False)
    half_way(board := ProgressBoard('abc'), tmp_path, clock)
    assert capsys.readouterr().out == 'a: epoch 2 of 2\n'
    assert [(t.description, t.percentage, t.fields['note']) for t in board.bars.tasks] == [
        ('all', pytest.approx(175/3), '1 of 3 finished, about 0:00:25 left'), ('b', 75, 'epoch 3 of 4')]

def test_the_plan(whole, tmp_path, capsys):
    "Two runs of 30 seconds, two thirds of a third, none of the fourth, which takes as long as any"
    out = tmp_path/'out'
    shutil.copytree(whole, out)
    (out/'adam-2.pth').unlink()
    (out/'records.jsonl').write_text(''.join(json.dumps({**r, 'secs':30.}) + '\n' for r in read_records(out/'records.jsonl')[:2]))
    state = load_checkpoint(out/'adam-1.pth')
    save_checkpoint(out/'adam-1.pth', {**state, 'epoch':2, 'about':{**state['about'], 'secs':20.}})
    before = {p: p.read_bytes() for p in out.iterdir()}
    with FileLock(out/'.lock'): show_plan(runs(), out, 'test', Engine(2)) # the job may be going on
    text = capsys.readouterr().out
    assert [l.split() for l in text.splitlines()[1:5]] == [['radam-1','finished','0:00:30'], ['radam-2','finished','0:00:30'],
                                                           ['adam-1','2','of','3','epochs','0:00:20'], ['adam-2']]
    assert text.endswith('\n2 of 4 runs are finished, the rest takes about 0:00:30 with 2 at once\n')
    show_plan(runs(), out, 'test', Engine(cluster='dask:there'))
    assert capsys.readouterr().out.endswith('the rest takes about 0:00:40 on one worker\n')
    assert {p: p.read_bytes() for p in out.iterdir()} == before

# On the command line

@pytest.mark.parametrize('line,n', [('demo', 18), ('experiment degenerate', 24),
                                    ('imagenette --preset over9000-radam --bs 16 --runs 2 --path', 2)])
def test_plan_of_a_command(cli, tmp_path, images, line, n):
    "It lists the runs and makes nothing"
    path = [images] if line.endswith('--path') else []
    status,out,err = cli(*line.split(), *path, '--out', tmp_path/'new', '--plan', '--jobs', 2)
    assert status == 0 and out.endswith(f'\n\n0 of {n} runs are finished\n') and len(out.splitlines()) == n+3, err
    assert not (tmp_path/'new').exists()

def test_plan_of_a_folder_that_cannot_be(cli):
    status,out,err = cli('demo', '--out', 'x'*1000, '--plan')
    assert status == 0 and out.endswith('0 of 18 runs are finished\n'), err

@pytest.mark.parametrize('line,says', [
    ('--jobs 0', '--jobs 0: must be from 1 to 1024'), ('--jobs=-2', '--jobs -2: must be from 1 to'),
    ('--jobs two', "invalid int value: 'two'"), ('--cluster spark', '--cluster spark: choose from ray, dask')])
def test_refused(cli, tmp_path, line, says):
    for name in ('demo','experiment degenerate'):
        status,_,err = cli(*name.split(), '--out', tmp_path/'new', *line.split())
        assert status == 2 and says in err and not (tmp_path/'new').exists()

@pytest.mark.parametrize('name', ['ray','dask'])
def test_a_missing_package_is_named(monkeypatch, tmp_path, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(OptionError, match=rf"--cluster {name}: needs a package; pip install 'radam_fastai\[{name}\]'"):
        run_job(runs(), tmp_path, 'test', engine=Engine(2, name))

def test_processes_of_a_launch_train_one_run(monkeypatch):
    monkeypatch.setattr(parallel, 'num_distrib', lambda: 4)
    Engine()
    for o in dict(jobs=2), dict(cluster='dask'):
        with pytest.raises(OptionError, match='--jobs, --cluster: accelerate launch already shares each run'): Engine(**o)

def test_what_cannot_be_sent_is_said(tmp_path):
    "Before anything is trained"
    with pytest.raises(OptionError, match='--jobs: a run cannot be sent to another process'):
        run_job(runs(cb=(cb for cb in [])), tmp_path, 'test', engine=Engine(2))
