"The step benchmark: what it counts, what it writes and what it refuses. No test depends on how long anything takes."
import json
import shlex
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.core import Callback
from matplotlib.figure import Figure

from helpers import alive
from radam_fastai.bench import callbacks, gpu, main as command, step, train
from radam_fastai.recipes.optims import Optim
from radam_fastai.recipes.records import read_records
from radam_fastai.rectify import rectification

pytestmark = pytest.mark.slow

HERE = [o for o in step.TIMED if o not in step.missing(step.TIMED)]
RADAMS = [o for o in HERE if 'adam' not in o]

@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    "A model of three tensors, and an addition that is over at once"
    model = lambda: torch.nn.ParameterList(torch.empty(s) for s in [(4,3), (64,), ()])
    monkeypatch.setitem(step.MODELS, 'tiny', model)
    monkeypatch.setattr(step, 'ADD_SIZE', 1000)

@pytest.fixture
def cli(cli): return partial(cli, 'bench')

def stepped(name, sizes, n=1):
    "The optimizer `name` after `n` steps with the same gradients, and its parameters before and after the last"
    params = step.fresh_params(sizes)
    opt,grads = step.TIMED[name](params),[p.grad.clone() for p in params]
    for _ in range(n):
        old = [p.detach().clone() for p in params]
        for p,g in zip(params, grads): p.grad.copy_(g)
        opt.step()
    return opt,old,params

# --- models and contestants

@pytest.mark.parametrize('model, n_params, n_tensors',
                         [('xresnet18', 11_200_874, 68), ('xresnet50', 23_547_754, 167), ('small', 64_000, 1000)])
def test_models(model, n_params, n_tensors):
    sizes = step.shapes(model)
    assert (sum(s.numel() for s in sizes), len(sizes)) == (n_params, n_tensors)

def test_language_model_counts_its_tied_weights_once():
    sizes = step.shapes('awd_lstm')
    assert sizes.count((10_000, 400)) == 1 and 20e6 < sum(s.numel() for s in sizes) < 30e6

def test_copies_are_equal_and_separate():
    a,b,c = (step.fresh_params([(3,2), (), (5,)], seed=s) for s in (1, 1, 2))
    assert all(p.equal(q) and p.grad.equal(q.grad) and p.data_ptr() != q.data_ptr() for p,q in zip(a, b))
    assert not a[0].equal(c[0])

@pytest.mark.parametrize('name', HERE)
def test_step_changes_every_parameter(name):
    _,old,new = stepped(name, [(64,), (7,3), ()], n=11)
    assert all((p != q).all() and p.isfinite().all() for p,q in zip(old, new))

@pytest.mark.parametrize('name', RADAMS)
def test_first_timed_step_is_rectified(name):
    "An adaptive step has the size of lr times the rectification, a momentum step that of lr times a gradient of 0.01"
    _,old,new = stepped(name, [(1000,)], n=11)
    decay = 1-1e-3*1e-2
    moved = (new[0]-decay*old[0]).abs().median().item()
    assert moved == pytest.approx(1e-3*rectification(11, .99), rel=.05)

def test_settings_are_the_same_for_all():
    for o in step.TIMED.values():
        k = o.kwargs
        assert (k['lr'], k['eps'], k.get('wd', k.get('weight_decay'))) == (1e-3, 1e-6, 1e-2)
        assert k.get('betas', (k.get('mom'), k.get('sqr_mom'))) == (.9, .99)

def test_decay_is_decoupled():
    "With zero gradients, decoupled decay scales the weights and leaves the averages at zero"
    for name in HERE:
        params = step.fresh_params([(64,)])
        old,opt = params[0].detach().clone(),step.TIMED[name](params)
        for _ in range(20):
            params[0].grad.zero_()
            opt.step()
        decayed = params[0].detach()/old
        assert torch.allclose(decayed, decayed.mean()) and 0 < 1-decayed.mean() < 2.1e-4, name

# --- time, memory

def test_rounds_give_everything_a_turn_in_changing_order():
    calls,orders = [],set()
    ms = step.time_in_turn({o: (lambda o=o: calls.append(o)) for o in 'abcd'}, rounds=20, warmup=3)
    assert calls[:12] == list('aaabbbcccddd')
    for i in range(12, len(calls), 4*7): # an untimed call and a burst of six each
        turns = [calls[j:j+7] for j in range(i, i+4*7, 7)]
        assert sorted(turns) == [[o]*7 for o in 'abcd']
        orders.add(tuple(t[0] for t in turns))
    assert len(orders) > 5 and len(calls) == 12+20*4*7
    assert list(ms) == list('abcd') and all(v.shape == (20,) and (v >= 0).all() for v in ms.values())

def test_a_turn_is_timed_as_one_call_without_its_first(monkeypatch):
    now,took = [0.],iter([100., 1, 2, 3, 4, 5, 9])
    monkeypatch.setattr(step.time, 'perf_counter', lambda: now[0])
    def f(): now[0] += next(took)
    assert step.time_in_turn({'f': f}, rounds=1)['f'] == pytest.approx([24/6*1e3])

def test_ratio_is_paired():
    busy = np.array([1., 9, 1, 30, 2])
    assert step.paired_ratio(6*busy, 4*busy) == pytest.approx(1.5)

@pytest.mark.parametrize('name, lo, hi',
                         [('ours', 8, 8.1), ('ours-ranger', 12, 12.1), ('ours-adam', 8, 8.1),
    ('ours-torch', 8, 8.1), ('fastai', 8, 8), ('fastai-adam', 8, 8),
    ('fastai-ranger', 12, 12), ('torch', 8+4/64, 8+4/64), ('torch-foreach', 8+4/64, 8+4/64), ('torch-adamw-fused', 8+4/64, 8+4/64)])
def test_state_bytes(name, lo, hi):
    opt,_,new = stepped(name, [(64,)]*10)
    assert lo <= step.state_bytes(opt)/640 <= hi

def test_shared_state_counts_once():
    class Opt:
        def state_dict(self): return dict(a=[flat[:10], flat[10:]], b=(flat, {'c': torch.zeros(3)}), step=1)
    flat = torch.zeros(100)
    assert step.state_bytes(Opt()) == 4*(100+3)

def test_floor():
    assert step.floor_ms(12, 1., add_size=28) == 1
    assert step.floor_ms(1_000_000, 3., add_size=1_000_000) == pytest.approx(28/12*3)
    assert step.floor_ms(10, np.array([1., 2.]), 10).tolist() == pytest.approx([28/12, 56/12])

# --- the command

def test_run_writes_records_table_and_picture(cli, tmp_path):
    status,out,err = cli('step', '--models', 'tiny,small', '--optims', 'fastai,torch-adamw-fused', '--rounds', 2, '--threads', 1,
                         '--device', 'cpu', '--seed', 3, '--out', tmp_path/'o')
    assert status == 0 and 'Traceback' not in err
    rows = [json.loads(o) for o in (tmp_path/'o/records.jsonl').read_text().splitlines()]
    assert [(o['model'], o['optim']) for o in rows] == [(m, o) for m in ('tiny', 'small') for o in ('ours', 'fastai', 'torch-adamw-fused')]
    assert pd.read_csv(tmp_path/'o/step.csv')[['model', 'optim']].values.tolist() == [[o['model'], o['optim']] for o in rows]
    assert (tmp_path/'o/step.png').read_bytes().startswith(b'\x89PNG')
    assert all(str(tmp_path/'o'/f) in out for f in ('records.jsonl', 'step.csv', 'step.png'))
    for o in rows:
        assert o['ms'] > 0 and o['floor_ratio'] > 0 and (o['optim'] != 'ours' or o['ratio'] == 1)
        assert o['bench'] == 'step' and o['step'] == 11 and o['rect'] == rectification(11, .99) and o['rounds'] == 2
        assert o['threads'] == 1 and o['device'] == 'cpu' and o['device_name'] and o['seed'] == 3
        assert {'python', 'torch', 'fastai', 'radam_fastai'} == set(o['versions']) and o['date'].endswith('+00:00')
    assert rows[0]['n_params'] == 77 and rows[0]['n_tensors'] == 3 and rows[1]['state_bytes'] == 8

def test_recorded_command_can_be_run_again(cli, tmp_path):
    assert cli('--models', 'tiny', '--optims', 'torch', '--rounds', 1, '--out', tmp_path/'a b')[0] == 0
    first = (tmp_path/'a b/records.jsonl').read_text()
    command = json.loads(first.splitlines()[0])['command']
    assert shlex.split(command)[0] == 'radam-bench' and cli(*shlex.split(command)[1:])[0] == 0
    both = (tmp_path/'a b/records.jsonl').read_text()
    assert both.startswith(first) and len(both.splitlines()) == 4
    assert json.loads(both.splitlines()[-1])['command'] == command
    assert len(pd.read_csv(tmp_path/'a b/step.csv')) == 2

def test_threads_are_put_back(tmp_path):
    n = torch.get_num_threads()
    command.main('step', models='tiny', optims='fastai', rounds=1, threads=1, device='cpu', out=tmp_path)
    assert torch.get_num_threads() == n

def test_missing_libraries_are_named(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(step.TIMED, 'timm', Optim('nowhere RAdam', 'no_such_library.optim', 'RAdam', {}))
    df = command.main('step', models='tiny', optims='timm,fastai', rounds=1, device='cpu', out=tmp_path)
    assert df.optim.tolist() == ['ours', 'fastai']
    assert "left out, not installed: timm (to time them: pip install 'radam_fastai[bench]')" in capsys.readouterr().out

@pytest.mark.parametrize('args, words', [
    (['speed'], "speed: choose from step"),
    (['--models', 'xresnet18,vgg'], "--models vgg: choose from xresnet18, xresnet50, awd_lstm, small"),
    (['--models', ''], "--models : choose from"),
    (['--optims', 'lion'], "--optims lion: choose from ours, ours-ranger"),
    (['--rounds', '0'], "--rounds 0: must be from 1 to"),
    (['--rounds=-3'], "--rounds -3: must be from 1 to"),
    (['--warmup', '9'], "--warmup 9: must be from 10 to"),
    (['--threads=-1'], "--threads -1: must be from 1 to"),
    (['--threads', '100000'], "--threads 100000: must be from 1 to"),
    (['--device', 'tpu'], "--device tpu: choose from"),
    (['--seed=-1'], "--seed -1: must be from 0 to")])
def test_bad_option(cli, tmp_path, args, words):
    status,out,err = cli(*args, '--out', tmp_path/'o')
    assert status == 2 and out == '' and err.count('\n') == 1 and err.startswith('radam-bench: ') and words in err
    assert not (tmp_path/'o').exists()

def test_an_interruption_leaves_the_last_figure(tmp_path, monkeypatch):
    (tmp_path/'step.png').write_bytes(b'whole')
    def half(self, path, **kwargs):
        Path(path).write_bytes(b'half')
        raise KeyboardInterrupt
    monkeypatch.setattr(Figure, 'savefig', half)
    o = SimpleNamespace(out=tmp_path, what='step', models=['tiny'], rounds=1, device='cpu', threads=1, seed=0)
    with pytest.raises(KeyboardInterrupt): step.measure(o, '', lambda model, **_: [dict(a=1.)], dict(a='a'), lambda df: Figure())
    assert (tmp_path/'step.png').read_bytes() == b'whole' and (tmp_path/'step.csv').read_text() == 'a\n1.0\n'

def test_bad_folder(cli, tmp_path):
    (tmp_path/'file').touch()
    for o in (tmp_path/'file', tmp_path/'file'/'o'):
        status,_,err = cli('--models', 'tiny', '--out', o)
        assert status == 2 and err.count('\n') == 1 and f"--out {o}: " in err

def test_bad_option_in_python():
    with pytest.raises(ValueError, match="--rounds 0: must be"): command.main('step', rounds=0)

def test_help_names_everything(cli):
    status,out,_ = cli('--help')
    known = {*command.BENCHES, *step.MODELS, *step.TIMED} - {'tiny'}
    assert status == 0 and all(o in ''.join(out.split()) for o in known) # argparse breaks lines behind hyphens

# --- callbacks

@pytest.fixture
def tiny_images(monkeypatch):
    monkeypatch.setitem(step.MODELS, 'xresnet18',
                        lambda: torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, 4), torch.nn.Flatten(), torch.nn.Linear(4*16*16, 10)))

def test_callback_bench_takes_the_steps_it_counts(tiny_images, tmp_path, monkeypatch):
    "Every Learner takes the same steps, its callbacks see all of them, and the Learners without any are the measure"
    seen = {}
    kept = callbacks.kept_bytes
    monkeypatch.setattr(callbacks, 'kept_bytes', lambda cbs: seen.update({type(cb).__name__: cb for cb in cbs}) or kept(cbs))
    df = command.main('callback', rounds=2, warmup=1, threads=1, device='cpu', out=tmp_path)
    assert df.n_steps.tolist() == [23]*len(df) and df.ratio[0] == 1 and df.callbacks[:2].tolist() == ['none', 'none, again']
    assert (df.inside_ms[:2] == 0).all() and (df.inside_ms[2:] > 0).all()
    assert df.inside_share.tolist() == pytest.approx((df.inside_ms/df.ms[0]).tolist())
    assert len(seen['RectifierRecorder'].to_frame()) == 23 and seen['RectifierRecorder'].to_frame().step.tolist() == list(range(1, 24))
    assert seen['GradientHistogram'].to_frame().step.tolist() == [10, 20] and len(seen['AdaptiveLRVariance'].to_frame()) == 23
    rows = [json.loads(l) for l in (tmp_path/'records.jsonl').read_text().splitlines()]
    assert len(rows) == len(df) and {r['bench'] for r in rows} == {'callback'} and (tmp_path/'callback.png').stat().st_size > 1000
    assert command.BENCHES['callback'].models == ['xresnet18', 'xresnet50']
    assert shlex.split(rows[0]['command'])[:4] == ['radam-bench', 'callback', '--models', 'xresnet18']

def test_time_inside_is_that_of_the_callbacks(tiny_images, monkeypatch):
    clock = iter(range(10**6))
    monkeypatch.setattr(step.time, 'perf_counter', lambda: next(clock))
    cbs = [Callback(), Callback()]
    inside = callbacks.Inside(cbs)
    for cb in cbs:
        cb.learn = None
        for event in ('before_batch', 'after_batch'): cb(event)
    assert inside.secs == 4 # one tick a call

@pytest.mark.parametrize('args, words', [
    (['callback', '--optims', 'fastai'], '--optims fastai: not an option of radam-bench callback'),
    (['callback', '--models', 'small'], '--models small: choose from xresnet18, xresnet50'),
    (['train', '--minutes', '3'], '--minutes 3.0: not an option of radam-bench train'),
    (['gpu', '--rounds', '3'], '--rounds 3: not an option of radam-bench gpu'),
    (['gpu', '--minutes', '0'], '--minutes 0.0: must be from 0.1 to'),
    (['gpu', '--path', '/no/such'], '--path /no/such: no such folder'),
    (['train', '--size', '8'], '--size 8: must be from 32 to'),
    (['callback', '--warmup', '0'], '--warmup 0: must be from 1 to'),
    (['--threads', '0'], '--threads 0: must be from 1 to')])
def test_bad_option_of_a_bench(cli, tmp_path, args, words): test_bad_option(cli, tmp_path, args, words)

# --- the training step

def test_train_bench_takes_the_step_apart(tiny_images, tmp_path, monkeypatch):
    "All settings take the same steps with the same losses, and the parts of a step add up to it"
    monkeypatch.setattr(train, 'reading_ms', lambda size, bs, workers, device: 1. if workers == 0 else 10.)
    seen = {}
    passed = train.pass_momentum_phase
    def watch(learn):
        before = [p.detach().clone() for p in learn.model.parameters()]
        passed(learn)
        assert all(map(torch.equal, before, learn.model.parameters())) and learn.opt.hypers[0]['lr'] == 1e-3
        seen[len(seen)] = learn
    monkeypatch.setattr(train, 'pass_momentum_phase', watch)
    df = command.main('train', models='xresnet18', rounds=3, warmup=1, size=64, compile=False, threads=1, device='cpu', out=tmp_path)
    assert df.settings.tolist() == ['fastai', 'fastai, channels last', 'ours', 'ours, channels last', 'ours, channels last, bf16']
    assert (df.n_steps == 7).all() and df.ratio[0] == 1
    parts = df[['forward_ms', 'backward_ms', 'step_ms', 'release_ms']]
    assert (parts > 0).all(axis=None)
    assert df.last_loss[:4].tolist() == pytest.approx([df.last_loss[0]]*4, rel=1e-4)
    assert 1e-6 < abs(df.last_loss[4]/df.last_loss[0]-1) < .05 # bfloat16 was on
    for learn in seen.values(): assert {int(s['step']) for s in learn.opt.state.values()} == {17}
    assert [next(l.model.parameters()).is_contiguous(memory_format=torch.channels_last)
            for l in seen.values()] == [False, True, False, True, True]
    assert df.images_per_sec.tolist() == pytest.approx((64e3/df.ms).tolist()) and (tmp_path/'train.png').stat().st_size > 1000
    rows = [json.loads(l) for l in (tmp_path/'records.jsonl').read_text().splitlines()]
    assert {r['bench'] for r in rows} == {'train'} and (rows[0]['reading_ms_0_workers'], rows[0]['reading_ms_in_memory']) == (1, 10)

def test_reading_is_timed_on_real_images(monkeypatch):
    from radam_fastai.recipes import imagenette
    seen,get_dls = [],imagenette.get_dls
    def watch(train, valid, *args, **kwargs):
        seen.append((len(train), len(valid)))
        return get_dls(train, valid, *args, **kwargs)
    monkeypatch.setattr(imagenette, 'get_dls', watch)
    for workers in (0, None, 1): assert train.reading_ms(32, 8, workers, n=3) > 0
    assert seen == [(30, 10), (30, 10), (60, 10)] # 3 batches; with a process, the two that it reads ahead and four

def test_parts_of_a_step_end_with_its_events(monkeypatch):
    "A clock that only callbacks turn: forward 1, backward 2, step 4, release 8"
    now = [0]
    monkeypatch.setattr(step.time, 'perf_counter', lambda: now[0])
    class Turn(Callback):
        order = 60
        def after_loss(self): now[0] += 1
        def after_backward(self): now[0] += 2
        def after_step(self): now[0] += 4
        def after_batch(self): now[0] += 8
    monkeypatch.setitem(step.MODELS, 'xresnet18', lambda: torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 10)))
    learn = callbacks.bench_learner('xresnet18', [parts := train.Parts(), Turn()], 'cpu', 0)
    callbacks.begin_fit(learn, callbacks.random_batch(4, 2, 'cpu', 0), 1)()
    assert parts.times[0].tolist() == [1, 2, 4, 8] and len(train.PARTS) == 4

# --- work of a step, growth, and all in one command

def test_work_of_a_step():
    "Two results of 4 kB at once, of which the first is needed for the second; a third, by a call that makes others, after both are gone"
    x = torch.ones(1024)
    def f():
        x.exp().exp()
        torch.zeros_like(x)
    work = step.profiled(f)
    assert (work['calls'], work['extra_bytes'], work['device_ms']) == (3, 2*4096, 0)

def test_host_time_ends_before_the_device_is_waited_for(monkeypatch):
    now = [0.]
    monkeypatch.setattr(step.time, 'perf_counter', lambda: now[0])
    def turn(secs): now[0] += secs
    assert step.time_burst(lambda: turn(1), 2, lambda: turn(10)) == pytest.approx((1e3, 6e3))

def test_growth_has_tensors_of_the_named_size(tmp_path):
    df = command.main('growth', models='10x64,100x64', optims='fastai', rounds=1, threads=1, device='cpu', out=tmp_path)
    assert df[['n_tensors', 'n_params']].drop_duplicates().values.tolist() == [[10, 640], [100, 6400]]
    assert (tmp_path/'growth.png').stat().st_size > 1000 and len((tmp_path/'records.jsonl').read_text().splitlines()) == 4

def test_bars_begin_at_0():
    from matplotlib.figure import Figure
    about = dict(model='m', floor_ms=.5, n_params=1, n_tensors=1)
    rows = pd.DataFrame([dict(about, optim=k, label=k, ms=ms, ratio=ms) for k,ms in (('ours', 1.), ('fastai', 5.))])
    ax = Figure().subplots()
    step.plot_model(ax, rows)
    assert ax.get_xscale() == 'linear' and ax.get_xlim()[0] == 0 and sorted(p.get_width() for p in ax.patches) == [1, 5]
    assert [l.get_xdata()[0] for l in ax.lines] == [.5] # the memory floor

PARTS = dict(good='print(6*7)', bad='raise SystemExit(3)', slow='import time; print(1, flush=True); time.sleep(99)', late='print(2)')

@pytest.fixture
def parts(monkeypatch):
    "Four parts instead of the tests, benchmarks and presets"
    def use(*names): monkeypatch.setattr(gpu, 'bench_parts', lambda o: [gpu.Part(k, ['-c', PARTS[k]], .5) for k in names])
    monkeypatch.setattr(gpu, 'test_parts', lambda device: [])
    return use

def records(out): return [(r['part'], r['status']) for r in map(json.loads, (out/'records.jsonl').read_text().splitlines())]

def test_gpu_goes_on_after_a_failure_and_keeps_what_was_cut_off(cli, parts, tmp_path):
    parts('bad', 'slow', 'good')
    status,out,err = cli('gpu', '--device', 'cpu', '--minutes', .3, '--out', tmp_path/'o')
    assert status == 2 and f"failed: bad (see {tmp_path/'o/bad/log.txt'})" in err and 'the same command goes on' in out
    assert records(tmp_path/'o') == [('bad', 'failed'), ('slow', 'cut off'), ('good', 'done')]
    assert [(tmp_path/'o'/k/'log.txt').read_text() for k in ('slow', 'good')] == ['1\n', '42\n']

def test_gpu_does_only_what_is_missing(cli, parts, tmp_path):
    for names in (['good'], ['good', 'late']):
        parts(*names)
        assert cli('gpu', '--device', 'cpu', '--out', tmp_path/'o')[0] == 0
    assert records(tmp_path/'o') == [('good', 'done'), ('late', 'done')]
    assert (tmp_path/'o/good/log.txt').read_text() == '42\n' # once

def test_presets_have_their_first_seed_before_one_has_its_second(tmp_path):
    parts = gpu.preset_parts(tmp_path, quick=False)
    asked = [(p.name, p.words[p.words.index('--runs')+1]) for p in parts]
    assert len(asked) == len(set(asked)) == 35 and {n for _,n in asked[:7]} == {'1'}
    assert asked[0] == ('radam-v2', '1') and asked[7] == ('radam-v2', '2')
    assert gpu.preset_parts(None, quick=False) == []

def test_gpu_counts_only_what_was_done_on_this_device(cli, parts, tmp_path):
    parts('good')
    for device_name in None, 'another':
        assert cli('gpu', '--device', 'cpu', '--out', tmp_path)[0] == 0
        if device_name is None:
            row = json.loads((tmp_path/'records.jsonl').read_text())
            (tmp_path/'records.jsonl').write_text(json.dumps(row | dict(device_name='another')) + '\n')
    assert (tmp_path/'good/log.txt').read_text() == '42\n'*2

def test_gpu_begins_nothing_when_the_time_is_up(parts, tmp_path):
    o = SimpleNamespace(what='gpu', minutes=0, quick=True, path=None, threads=1, device='cpu', seed=0, out=tmp_path)
    assert gpu.run_parts([gpu.Part('late', ['-c', PARTS['late']])], o).status.tolist() == ['not reached'] and not list(tmp_path.iterdir())

def test_a_part_sees_its_gpu_alone(monkeypatch, tmp_path):
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '7')
    part = gpu.Part('seen', ['-c', 'import os; print(os.environ["CUDA_VISIBLE_DEVICES"])'])
    for device,seen in ('cpu', ''), ('cuda', '7'), ('cuda:0', '7'):
        assert gpu.run_part(part, tmp_path/device, device, 60) == 'done' and (tmp_path/device/'log.txt').read_text() == f'{seen}\n'

@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_what_ends_the_command_ends_its_part(tmp_path, number):
    "And what the part has started"
    code = f"""import signal
signal.signal(signal.SIGINT, signal.default_int_handler) # which a job in the background does not inherit
from radam_fastai.bench import gpu, main
gpu.test_parts = lambda device: [gpu.Part('two', ['-c', 'import os, time; os.fork(); print(os.getpid(), flush=True); time.sleep(99)'])]
gpu.bench_parts = lambda o: []
main.main('gpu', device='cpu', out={str(tmp_path)!r})"""
    proc = subprocess.Popen([sys.executable, '-c', code], cwd=Path(__file__).parents[1], stderr=subprocess.DEVNULL)
    log = tmp_path/'two'/'log.txt'
    while proc.poll() is None and not (log.exists() and log.read_text().count('\n') == 2): time.sleep(.02)
    pids = log.read_text().split()
    proc.send_signal(number)
    assert proc.wait() == {signal.SIGINT: -signal.SIGINT}.get(number, 128+number)
    assert not any(map(alive, pids)) and not (tmp_path/'records.jsonl').exists()

def test_a_preset_runs_seed_by_seed(cli, monkeypatch, images, tmp_path):
    "In small, in processes of their own: the second call trains the second seed alone, and the third nothing"
    monkeypatch.setenv('HOME', str(tmp_path))
    for name in 'test_parts','bench_parts': monkeypatch.setattr(gpu, name, lambda o: [])
    monkeypatch.setattr(gpu, 'PRESETS', gpu.PRESETS[:1])
    first, = gpu.preset_parts(images, quick=True)
    second = first._replace(words=[{'1': '2'}.get(w, w) if before == '--runs' else w for before,w in zip(['', *first.words], first.words)])
    for parts in ([first], [first, second], [first, second]):
        monkeypatch.setattr(gpu, 'preset_parts', lambda path, quick: parts)
        assert cli('gpu', '--device', 'cpu', '--quick', '--path', images, '--out', tmp_path/'o')[0] == 0
    assert records(tmp_path/'o') == [('radam-v2', 'done')]*2
    runs = read_records(tmp_path/'o'/'radam-v2'/'records.jsonl')
    assert [(r['seed'], r['preset'], r['data']['train']) for r in runs] == [(42, 'radam', 20), (43, 'radam', 20)]
    assert all(r['options']['in_memory'] for r in runs)
    assert len(list((tmp_path/'.radam_data').glob('decoded-*'))) == 1 # for both
