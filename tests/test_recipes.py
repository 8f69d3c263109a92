"""The recipes: records that survive, commands that leave evidence, options that are checked before anything is trained."""
import json, runpy, subprocess, sys
from collections import Counter
from pathlib import Path
from urllib.error import URLError

import numpy as np, pytest, torch
from fastai.callback.core import Callback, CancelStepException
from fastai.callback.training import GradientAccumulation
from fastai.torch_core import set_seed
from PIL import Image

from radam_fastai.recipes import demo, imagenette
from radam_fastai.recipes.runs import (OPTS, OptionError, RunRecorder, append_record, check_ranges, effective_lr, mean_std, read_records,
                                       record_run, rectifier_summary, runs_table)
from radam_fastai.rectify import rectification

root = Path(__file__).resolve().parent.parent

@pytest.fixture
def cli(monkeypatch, capsys, tmp_path):
    "Run a recipe as its console script does, in this process: exit status, what went to stdout and to stderr"
    def _cli(name, *args):
        script = tmp_path/f'radam-{name}'
        script.write_text(f'import sys\nfrom radam_fastai.recipes.{name} import main\nsys.exit(main())')
        monkeypatch.setattr(sys, 'argv', [str(script), *map(str, args)])
        with pytest.raises(SystemExit) as e: runpy.run_path(str(script), run_name='__main__')
        return e.value.code or 0, *capsys.readouterr()
    return _cli

@pytest.fixture(scope='module')
def images(tmp_path_factory):
    "Ten classes of 32-pixel squares in Imagenette's layout, of 6 or 7 training and 3 or 4 validation images"
    path,rng = tmp_path_factory.mktemp('images'),np.random.default_rng(0)
    for split,n in [('train',6), ('val',3)]:
        for c in range(10):
            d = path/split/f'n{c:02}'
            d.mkdir(parents=True)
            for i in range(n + c%2): Image.fromarray(rng.integers(0, 25*c+25, (32,32,3), dtype='uint8')).save(d/f'{i}.png')
    return path

small = '--arch xresnet18 --size 32 --bs 16 --epochs 1 --workers 0'.split()

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

def test_whole_last_line_without_newline(tmp_path):
    path = tmp_path/'records.jsonl'
    path.write_text('{"run": 1}')
    append_record(path, dict(run=2))
    assert read_records(path) == [dict(run=1), dict(run=2)]

# The recorder

@pytest.mark.parametrize('opt', OPTS)
def test_steps_and_epochs(opt, tmp_path):
    learn = demo.get_learner(opt)
    r = record_run(learn, lambda l: l.fit_one_cycle(1, 1e-3), tmp_path, opt=opt, seed=0)
    rects = [rectification(t, .99) if opt!='adam' else None for t in range(1, 23)]
    assert r['steps']['step'] == list(range(1, 23)) and r['steps']['rect'] == rects
    assert r['steps']['lr'] == pytest.approx([float(o) for o in learn.recorder.lrs])
    assert np.allclose(effective_lr(r['steps']), [lr*(1 if o is None else o) for lr,o in zip(r['steps']['lr'], rects)])
    train,valid,acc = learn.recorder.values[0]
    assert {k: r['epochs'][0][k] for k in ('train_loss','valid_loss','accuracy')} == dict(train_loss=train, valid_loss=valid, accuracy=acc)
    assert r['epochs'][0]['secs'] >= r['epochs'][0]['train_secs'] > 0 and r['secs'] >= r['epochs'][0]['secs']
    assert (r['rectifier'] is None) == (opt=='adam')
    hypers, = r['hypers']
    assert hypers['eps'] == 1e-6 and hypers['lr'] == r['steps']['lr'][0] == pytest.approx(1e-3/25)
    assert set(r['versions']) == {'python','torch','fastai','radam_fastai'} and r['device']['name']
    assert read_records(tmp_path/'records.jsonl') == [r]

def test_accumulated_gradients_are_one_step():
    learn,rec = demo.get_learner('radam'),RunRecorder()
    with learn.no_bar(),learn.no_logging(): learn.fit(1, cbs=[GradientAccumulation(128), rec])
    assert [s['step'] for s in rec.steps] == list(range(1, 12))

def test_rectifier_summary():
    steps = [dict(step=t, rect=rectification(t, .99)) for t in range(1, 21)]
    summ = rectifier_summary(steps)
    assert (summ['first_adaptive'], summ['n_momentum'], summ['last']) == (6, 5, rectification(20, .99))
    assert rectifier_summary(steps[:5]) is None

def test_mean_std():
    recs = [dict(opt='a', seed=s, secs=1., epochs=[dict(epoch=0, step=1, train_secs=1., secs=1., accuracy=v)]) for s,v in enumerate([.7,.8,.9])]
    assert mean_std(runs_table(recs)).accuracy[0] == '0.8000 ± 0.1000'
    assert mean_std(runs_table(recs[:1])).accuracy[0] == '0.7000'

# radam-demo

def test_demo(cli, tmp_path):
    status,out,err = cli('demo', '--out', tmp_path/'new', '--epochs', 1)
    assert status == 0, err
    fig = tmp_path/'new'/'demo.png'
    assert f'figure: {fig}' in out and Image.open(fig).size[0] > 1000
    recs = read_records(tmp_path/'new'/'records.jsonl')
    assert [r['opt'] for r in recs] == ['radam','adam'] and all(r['recipe']=='demo' for r in recs)
    for r in recs: assert f"{r['epochs'][-1]['valid_loss']:.4f}" in out
    assert recs[0]['steps']['loss'][0] == recs[1]['steps']['loss'][0] # the same weights and the same batch

def test_demo_repeats(tmp_path):
    a,b,c = [demo.main(out=tmp_path, epochs=1, seed=s) for s in (1,1,2)]
    for x,y,z in zip(a, b, c): assert x['steps'] == y['steps'] and x['steps']['loss'] != z['steps']['loss']
    assert len(read_records(tmp_path/'records.jsonl')) == 6

# radam-imagenette

def test_balanced_subset(images):
    files = imagenette.get_files(images, n_items=42, seed=3)
    count = Counter((f.parent.parent.name, f.parent.name) for f in files)
    assert len(set(files)) == len(files)
    assert [count['train',f'n{c:02}'] for c in range(10)] == [5,5] + [4]*8
    assert [count['val',f'n{c:02}'] for c in range(10)] == [round((3+c%2)*42/65) for c in range(10)]
    assert files == imagenette.get_files(images, 42, 3) != imagenette.get_files(images, 42, 4)
    assert len(imagenette.get_files(images)) == 65 + 35

def test_imagenette(cli, images, tmp_path, monkeypatch):
    kept = []
    get_learner = imagenette.get_learner
    monkeypatch.setattr(imagenette, 'get_learner', lambda *a, **kw: kept.append(get_learner(*a, **kw)) or kept[-1])
    status,out,err = cli('imagenette', '--path', images, '--out', tmp_path, '--runs', 2, '--n-items', 40, *small)
    assert status == 0, err
    recs = read_records(tmp_path/'records.jsonl')
    assert [r['seed'] for r in recs] == [42,43]
    for r,learn in zip(recs, kept):
        assert r['data'] == dict(name=images.name, size=32, classes=10, train=40, valid=20)
        with learn.no_bar(): loss,acc,top5 = learn.validate()
        last = r['epochs'][-1]
        assert (last['valid_loss'], last['accuracy'], last['top_k_accuracy']) == pytest.approx((loss, acc, top5))
        fig = tmp_path/f"xresnet18-radam-{r['seed']}.png"
        assert fig.exists() and f'figure: {fig}' in out
    assert ' ± ' in out
    alone = imagenette.main(path=images, out=tmp_path/'alone', n_items=40, seed=43, arch='xresnet18', size=32, bs=16, epochs=1, workers=0)
    assert alone[0]['steps'] == recs[1]['steps'] # a run depends on its own seed only

@pytest.mark.parametrize('args,hypers', [
    ([], dict(mom=.9, sqr_mom=.99, eps=1e-6, wd=.01)),
    (['--opt','ranger'], dict(mom=.95, sqr_mom=.99, eps=1e-6, wd=.01)),
    ('--opt adam --mom .8 --sqr-mom .95 --eps 1e-4 --wd .1 --sched one_cycle --aug none --channels-last'.split(),
     dict(mom=.8, sqr_mom=.95, eps=1e-4, wd=.1))])
def test_options_take_effect(cli, images, tmp_path, args, hypers):
    status,_,err = cli('imagenette', '--path', images, '--out', tmp_path, *small, *args)
    assert status == 0, err
    rec, = read_records(tmp_path/'records.jsonl')
    assert {k: rec['hypers'][0][k] for k in hypers} == hypers
    assert max(rec['steps']['lr']) == pytest.approx(.01)
    assert (rec['steps']['lr'][0] == pytest.approx(.01)) == ('one_cycle' not in args)

def test_workers_are_seeded(images):
    def batches(seed):
        set_seed(seed)
        return [x for x,_ in imagenette.get_dls(imagenette.get_files(images), 32, 16, workers=2).train]
    a,b,c = map(batches, (1,1,2))
    assert len(a) == 4 and all(torch.equal(x, y) and not torch.equal(x, z) for x,y,z in zip(a, b, c))

def test_norm_and_bias_are_not_decayed(images):
    learn = imagenette.get_learner(imagenette.get_dls(imagenette.get_files(images), 32, 16, workers=0), 'xresnet18', wd=.1)
    learn.create_opt()
    assert {p.ndim for p in learn.model.parameters() if not learn.opt.state[p].get('do_wd', True)} == {1}
    norms = [p for m in learn.model.modules() if isinstance(m, torch.nn.BatchNorm2d) for p in m.parameters()]
    assert not any(learn.opt.state[p].get('do_wd', True) for p in norms)

@pytest.mark.parametrize('arch', imagenette.ARCHS)
def test_architectures(arch):
    set_seed(0)
    model = imagenette.ARCHS[arch](n_out=10).eval()
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 10)

# Options that cannot be used

bad_demo = {'--epochs 0':'--epochs', '--bs 1':'--bs', '--bs 2000':'--bs', '--lr 0':'1e-08 to 10', '--lr nan':'--lr', '--seed -1':'0 to 2147483648'}
bad_imagenette = {'--arch resnet50':'xse_resnext50', '--opt sgd':'radam, ranger, adam', '--sched cosine':'flat_cos, one_cycle', '--aug mixup':'crop, none',
    '--size 8':'16 to 1024', '--bs 1':'2 to 4096', '--bs 66':'at most 65', '--bs 32 --n-items 30':'at most 30', '--epochs 0':'1 to 1000',
    '--lr -1':'--lr', '--mom 1':'--mom', '--sqr-mom 1':'--sqr-mom', '--eps -1':'--eps', '--wd -1':'--wd', '--smooth 1':'--smooth',
    '--n-items 9':'10 to 60', '--n-items 61':'10 to 60', '--runs 0':'--runs', '--workers -1':'--workers', '--seed -1':'--seed'}

def refuses(result, name, about):
    "One line on stderr, about the right thing, and exit status 2"
    status,out,err = result
    assert status == 2 and out == ''
    assert err.startswith(f'radam-{name}: ') and about in err and len(err.splitlines()) == 1

@pytest.fixture
def no_training(monkeypatch):
    for m in (demo, imagenette): monkeypatch.setattr(m, 'record_run', lambda *a, **kw: pytest.fail('it trained'))

@pytest.mark.parametrize('args', bad_demo)
def test_demo_refuses(cli, no_training, tmp_path, args):
    refuses(cli('demo', '--out', tmp_path/'new', *args.split()), 'demo', bad_demo[args])
    assert not (tmp_path/'new').exists()

@pytest.mark.parametrize('args', bad_imagenette)
def test_imagenette_refuses(cli, no_training, images, tmp_path, args):
    refuses(cli('imagenette', '--path', images, '--out', tmp_path/'new', *args.split()), 'imagenette', bad_imagenette[args])
    assert not (tmp_path/'new').exists()

def test_folders_are_checked(cli, no_training, images, tmp_path):
    def refused(path, about, *args): refuses(cli('imagenette', '--path', path, '--out', tmp_path/'out', *args), 'imagenette', about)
    refused(tmp_path/'nowhere', f"{tmp_path/'nowhere'}: no such folder")
    refused(images/'train', f"looked for {images/'train'/'train'}")
    for split in 'train','val':
        for c in range(10 if split=='train' else 9):
            d = tmp_path/'nine'/split/str(c)
            d.mkdir(parents=True)
            (d/'0.png').touch()
    refused(tmp_path/'nine', 'found 9')
    (tmp_path/'file').touch()
    for name,args in [('demo',[]), ('imagenette',['--path',images])]: refuses(cli(name, *args, '--out', tmp_path/'file'/'x'), name, '--out')

def test_failed_download(cli, no_training, monkeypatch, tmp_path):
    def offline(url): raise URLError('no network')
    monkeypatch.setattr(imagenette, 'untar_data', offline)
    refuses(cli('imagenette', '--out', tmp_path/'new', '--size', 200), 'imagenette', 'imagenette2-320.tgz (<urlopen error no network>)')

def test_python_callers_get_an_error(images):
    with pytest.raises(OptionError, match='--epochs 0'): demo.main(epochs=0)
    with pytest.raises(OptionError, match='--arch vgg: choose from'): imagenette.main(path=images, arch='vgg')
    check_ranges(dict(lr=None))

def test_exit_status_of_a_process(tmp_path):
    cmd = [sys.executable, '-m', 'radam_fastai.recipes.imagenette', '--path', str(tmp_path/'nowhere')]
    res = subprocess.run(cmd, cwd=root, capture_output=True, text=True)
    assert res.returncode == 2 and res.stdout == '' and len(res.stderr.splitlines()) == 1, res.stderr

class SkipAt(Callback):
    def __init__(self, *at): self.at = at
    def before_step(self):
        if self.train_iter in self.at: raise CancelStepException()

def test_skipped_steps_are_not_recorded():
    "As in half precision, whose first step often overflows"
    learn,rec = demo.get_learner('radam'),RunRecorder()
    with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=[rec, SkipAt(0, 3)])
    assert [s['step'] for s in rec.steps] == list(range(1, len(learn.dls.train)-1))
