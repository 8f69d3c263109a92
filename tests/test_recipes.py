"""The commands: what they leave behind, that options take effect, and that wrong ones are refused before anything is trained."""
import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest
import torch
from fastai.layers import AvgPool
from PIL import Image

from helpers import MODULES
from radam_fastai import __version__
from radam_fastai.experiments import main as experiment
from radam_fastai.recipes import demo, imagenette, jobs, precision
from radam_fastai.recipes.cli import OptionError, RecipeError
from radam_fastai.recipes.presets import COMMON, PRESETS, published, resolve
from radam_fastai.recipes.records import read_records
from radam_fastai.recipes.report import report, terminal_table

pytestmark = pytest.mark.slow

root = Path(__file__).resolve().parent.parent
small = '--arch xresnet18 --size 32 --bs 16 --epochs 1 --workers 0'.split()

# radam-demo

def test_demo(cli, tmp_path):
    status,out,err = cli('demo', '--out', tmp_path/'new', '--epochs', 1)
    assert status == 0, err
    fig = tmp_path/'new'/'demo.png'
    assert f'figure: {fig}' in out and Image.open(fig).size[0] > 1000
    recs = read_records(tmp_path/'new'/'records.jsonl')
    runs = {(r['opt'], r['options']['lr'], r['seed']) for r in recs}
    assert runs == {(o, lr, s) for o in ('radam','adam','adam-linear') for lr in (.01,1.) for s in (42,43,44)} and len(recs) == 18
    for r in recs: assert r['recipe'] == 'demo' and f"{r['epochs'][-1]['valid_loss']:.4f}" in out
    for s in 42,43,44: assert len({r['steps']['loss'][0] for r in recs if r['seed'] == s}) == 1 # the same weights and the same batch

def test_demo_repeats(tiny, tmp_path):
    a,b,c = [demo.main(out=tmp_path, epochs=1, seed=s) for s in (1,1,4)]
    for x,y,z in zip(a, b, c): assert x['steps'] == y['steps'] and x['steps']['loss'] != z['steps']['loss']
    assert len(read_records(tmp_path/'records.jsonl')) == 54
    assert demo.main(out=tmp_path, epochs=1, seed=4, resume=True) == c

# radam-imagenette

def test_imagenette(cli, tiny, images, tmp_path, monkeypatch):
    kept = []
    get_learner = imagenette.get_learner
    monkeypatch.setattr(imagenette, 'get_learner', lambda *a: kept.append(get_learner(*a)) or kept[-1])
    status,out,err = cli('imagenette', '--path', images, '--out', tmp_path, '--runs', 2, '--n-items', 40, *small)
    assert status == 0, err
    recs = read_records(tmp_path/'records.jsonl')
    assert [r['seed'] for r in recs] == [42,43]
    for r,learn in zip(recs, kept):
        assert {k: r['data'][k] for k in ('name','size','classes','train',
                                          'valid')} == dict(name=images.name, size=32, classes=10, train=40, valid=20)
        with learn.no_bar(),learn.no_logging(): loss,acc,top5 = learn.validate()
        last = r['epochs'][-1]
        assert (last['valid_loss'], last['accuracy'], last['top_k_accuracy']) == pytest.approx((loss, acc, top5))
        for ext in 'png','csv': assert (tmp_path/f"xresnet18-radam-{r['seed']}.{ext}").exists()
    assert ' ± ' in out and (tmp_path/'table.md').exists() and not list(tmp_path.glob('*.pth'))
    alone, = imagenette.main(path=images, out=tmp_path/'alone', n_items=40, seed=43, arch='xresnet18', size=32, bs=16, epochs=1, workers=0)
    assert alone['steps'] == recs[1]['steps'] # a run depends on its own seed only

def asked(monkeypatch, images, **kw):
    "The run that options ask for, which is not trained"
    kept = []
    def run_job(runs, *a, **kw):
        kept.extend(runs)
        raise RecipeError('enough')
    monkeypatch.setattr(imagenette, 'run_job', run_job)
    with pytest.raises(RecipeError, match='enough'): imagenette.main(**{'path':images, 'workers':0, **kw})
    return kept[0]

def built(*args, **kw):
    "The same, and the learner that it makes"
    run = asked(*args, **kw)
    return run,run.make()

@pytest.mark.parametrize('preset', PRESETS)
def test_presets_are_what_was_published(monkeypatch, images, preset, tmp_path):
    o,_ = resolve(preset, {})
    run,learn = built(monkeypatch, images, preset=preset, split='v2', out=tmp_path) # these images cannot be split as in v1
    learn.create_opt()
    h = learn.opt.hypers[0]
    assert (h['mom'], h['sqr_mom'], h['eps'], h['wd']) == (o.mom, .99, 1e-6, o.wd)
    opts = {p: p.split('-')[-1] for p in PRESETS if 'adam' in p} | {'article-record':'Adam', 'article':'RAdam',
                                                                    'radam-schedule-free':'RAdamScheduleFree'}
    assert type(learn.opt).__name__.lower() == opts.get(preset, 'Ranger').lower()
    mish = any(isinstance(m, torch.nn.Mish) for m in learn.model.modules())
    attention = any(type(m).__name__ == 'SimpleSelfAttention' for m in learn.model.modules())
    blurs = sum(type(m).__name__ == 'BlurPool2d' for m in learn.model.modules())
    newer = preset in ('radam','radam-schedule-free','fastai-2020-01','leaderboard-2020-10','ranger-mish-2019-09')
    assert (mish, attention) == (newer, newer) and blurs == (4 if preset == 'leaderboard-2020-10' else 0)
    normed = any(type(t).__name__ == 'Normalize' for t in learn.dls.train.after_batch.fs)
    crop = any(type(t).__name__ == 'RandomResizedCrop' for t in learn.dls.train.after_item.fs)
    whole = preset in ('radam','radam-schedule-free','leaderboard-2020-10') # images, in smaller batches
    assert normed == (preset not in ('fastai-2020-01','leaderboard-2020-10')) and crop == (not whole)
    assert learn.dls.bs == (32 if whole else 64) and run.options['size'] == 128
    assert run.options['fp16'] is torch.cuda.is_available() # without a GPU in single precision, and the record says so

V1 = {'article':.86, 'article-record':.846, 'over9000-v1-adam':.8494, 'over9000-v1-radam':.8444, 'over9000-v1-ranger':.8594,
      'ranger-mish-2019-09':.8948}
V2 = {'over9000-adam':.7784, 'over9000-radam':.7696, 'over9000-ranger':.7844, 'fastai-2020-01':.8471, 'leaderboard-2020-10':.8743}

def test_published_figures_stand_with_their_split():
    for split,figures in dict(v1=V1, v2=V2).items():
        assert {p: published(p)['mean'] for p in PRESETS if resolve(p, {})[0].split == split and published(p)} == figures
        assert all(published(p)['source'].startswith('https://') for p in figures)
    assert not published('radam') and not published('radam-schedule-free')

@pytest.fixture
def official(monkeypatch):
    "Imagenette has as many images as the folder of `images`"
    monkeypatch.setitem(imagenette.OFFICIAL, 'imagenette2', (65, 35))

def test_bf16_does_not_change_what_a_run_is(monkeypatch, official, images, tmp_path):
    run = asked(monkeypatch, images, preset='over9000-radam', out=tmp_path, bf16=True)
    assert run.about['published']['mean'] == .7696 and (run.options['bf16'], run.options['fp16']) == (True, False)

@pytest.mark.filterwarnings('ignore:this cpu has no instructions')
def test_fast_takes_what_the_machine_has(cli, monkeypatch, images, tmp_path, capsys):
    # asked for, so kept
    for has,given,bf16 in [(True, {}, True), (False, {}, False), (True, dict(bf16=False), False), (False, dict(bf16=True), True)]:
        monkeypatch.setattr(precision, 'has_bf16', lambda device: has)
        run = asked(monkeypatch, images, preset='over9000-radam', out=tmp_path, fast=True, **given)
        assert {k: run.options[k] for k in ('channels_last','bf16','fp16',
                                            'compile')} == dict(channels_last=True, bf16=bf16, fp16=False, compile=False)
        assert '--fast: channels-last' in capsys.readouterr().out
    monkeypatch.setattr(precision, 'has_compiler', lambda: False)
    monkeypatch.setattr(imagenette, 'has_compiler', lambda: True)
    options = asked(monkeypatch, images, preset='radam', out=tmp_path, fast=True, channels_last=False, compile=True).options
    assert (options['channels_last'], options['compile']) == (False, True)

def test_a_compiler_is_needed_to_compile(monkeypatch, images, tmp_path):
    from torch._inductor import cpp_builder
    def ask(**kw): return asked(monkeypatch, images, preset='radam', out=tmp_path, **kw).options['compile'] # Mish is many small operations
    monkeypatch.setattr(cpp_builder, 'get_cpp_compiler', lambda: 'g++')
    assert ask(fast=True) and ask(compile=True)
    def none(): raise RuntimeError('no working C++ compiler found')
    monkeypatch.setattr(cpp_builder, 'get_cpp_compiler', none)
    assert not ask(fast=True)
    s,_ = resolve('radam', dict(compile=True, fp16=False))
    with pytest.raises(OptionError, match=r'--compile: needs a C\+\+ compiler'): imagenette.check_machine(s)

def test_bf16_that_is_imitated_is_said(monkeypatch, images, tmp_path):
    monkeypatch.setattr(precision, 'has_bf16', lambda device: False)
    with pytest.warns(UserWarning, match='no instructions for bfloat16'): asked(monkeypatch, images, out=tmp_path, bf16=True)

def test_published_figure_is_only_for_what_was_published(monkeypatch, official, images, tmp_path):
    def pub(**kw): return asked(monkeypatch, images, preset='over9000-radam', out=tmp_path, **kw).about['published']
    assert pub()['std'] == .0084 and pub(lr=1e-2, channels_last=True, arch='xresnet50')['runs'] == 20
    for kw in dict(lr=1e-3), dict(n_items=60, bs=60), dict(sa=True), dict(woof=True): assert pub(**kw) is None, kw
    monkeypatch.setitem(imagenette.OFFICIAL, 'imagenette2', (64, 36)) # the same images, divided anew
    assert pub() is None

@pytest.mark.parametrize('args,hypers', [
    ([], dict(mom=.9, sqr_mom=.99, eps=1e-6, wd=1e-4)),
    (['--preset','over9000-ranger'], dict(mom=.9, sqr_mom=.99, eps=1e-6, wd=.01)),
    ('--opt adam --mom .8 --sqrmom .95 --eps 1e-4 --wd .1 --lr 1e-3 --sched one_cycle --div 5 --pct-start .5 --channels-last'.split(),
     dict(mom=.8, sqr_mom=.95, eps=1e-4, wd=.1)),
    ('--beta 20 --sa 1 --sym 1 --act-fn ReLU --norm 0 --mixup .2 --sh .2 --smooth 0 --aug crop --pool AvgPool'.split(), dict(beta=20.))])
def test_options_take_effect(cli, tiny, images, tmp_path, args, hypers):
    status,_,err = cli('imagenette', '--path', images, '--out', tmp_path, *small, *args)
    assert status == 0, err
    rec, = read_records(tmp_path/'records.jsonl')
    assert {k: rec['hypers'][0][k] for k in hypers} == hypers
    lrs = rec['steps']['lr']
    if 'one_cycle' in args: assert lrs[0] == pytest.approx(1e-3/5) and max(lrs) == pytest.approx(1e-3) and set(rec['steps']['mom']) == {.8}
    else: assert lrs[0] == max(lrs)

@pytest.mark.parametrize('kw,finds', [(dict(sh=.3), 'RandomErasing'), (dict(norm=True), 'Normalize'),
                                      (dict(aug='crop'), 'RandomResizedCrop'), (dict(aug='resize'), 'Resize'), (dict(mixup=.4), 'MixUp'),
    (dict(sa=True), 'SimpleSelfAttention'), (dict(act_fn='Mish'), 'Mish'), (dict(pool='MaxBlurPool'), 'BlurPool2d'),
    (dict(pool='AvgPool'), 'AvgPool2d')])
def test_options_build(monkeypatch, tiny, images, tmp_path, kw, finds):
    off = dict(sa=False, act_fn='ReLU', pool='MaxPool', aug='crop' if kw.get('aug')=='resize' else 'resize', norm=False)
    def parts(**kw):
        learn = built(monkeypatch, images, out=tmp_path, arch='xresnet18', **{**off, **kw})[1]
        return {type(o).__name__ for o in [*learn.dls.train.after_batch.fs, *learn.dls.train.after_item.fs, *learn.cbs,
                                           *learn.model.modules()]}
    assert finds in parts(**kw) and finds not in parts()

def test_norm_and_bias_are_not_decayed(monkeypatch, images, tmp_path):
    learn = built(monkeypatch, images, arch='xresnet18', wd=.1, out=tmp_path)[1]
    learn.create_opt()
    norms = [p for m in learn.model.modules() if isinstance(m, torch.nn.BatchNorm2d) for p in m.parameters()]
    assert norms and not any(learn.opt.state[p].get('do_wd', True) for p in norms)
    assert all(learn.opt.state[p].get('do_wd', True) for p in learn.model.parameters() if p.ndim == 4)

@pytest.mark.parametrize('arch', imagenette.ARCHS)
def test_architectures(arch):
    with torch.device('meta'): assert imagenette.get_model(arch)(torch.zeros(2, 3, 128, 128)).shape == (2, 10)

@pytest.mark.parametrize('n', [1, 2, 5, 8])
def test_max_blur_pool(n):
    "By hand: the largest of each 2x2 neighbourhood, then the 1-2-1 blur of every other one; sizes as a convolution of stride 2 has them"
    x = torch.randn(2, 3, n+4, n+4)
    y = imagenette.MaxBlurPool()(x)
    assert y.shape == torch.nn.Conv2d(3, 3, 3, stride=2, padding=1)(x).shape == AvgPool(2, ceil_mode=True)(x).shape
    big = x.unfold(2, 2, 1).unfold(3, 2, 1).amax((-1,-2))
    k = torch.tensor([1.,2,1])/4
    assert torch.allclose(y[:,:,1,1], torch.einsum('ncij,i,j->nc', big[:,:,1:4,1:4], k, k), atol=1e-6)

def test_dump(cli, images):
    status,out,err = cli('imagenette', '--dump', '--preset', 'leaderboard-2020-10', '--lr', '1e-3')
    assert status == 0 and 'BlurPool2d' in out, err
    settings = json.loads(out[:out.index('}')+1])
    assert settings == {**COMMON, **PRESETS['leaderboard-2020-10'][0], 'lr':1e-3, 'fp16':torch.cuda.is_available()}

def test_help(cli):
    _,out,_ = cli('imagenette', '--help')
    for o in [*COMMON, 'preset','path','seed','workers','in_memory','out','resume','n_items','compile','channels_last','woof','runs','dump',
              'report','keep']: assert f"--{o.replace('_', '-')}" in out
    assert all(p in ''.join(out.split()) for p in PRESETS) # argparse may break a line after a dash

# Options that cannot be used

bad_demo = {'--epochs 0':'--epochs', '--bs 1':'--bs', '--bs 2000':'--bs', '--lr 0':'1e-08 to 10', '--lr nan':'--lr',
            '--seed -1':'0 to 2147483648'}
bad_imagenette = {'--preset best':'over9000-radam', '--arch resnet50':'xse_resnext50', '--opt lion':'radam, ranger, adam',
                  '--opt sgd --sqrmom .9':'sgd has none', '--opt sgd --eps 1e-3':'sgd has none', '--sched cosine':'flat_cos, one_cycle',
                  '--aug mixup':'crop, resize',
    '--act-fn GELU':'ReLU, Mish', '--pool Pool':'AvgPool, MaxPool, MaxBlurPool', '--size 8':'16 to 1024',
    '--size 100':'--size 100: xresnet50 with --pool MaxPool', '--bs 1':'2 to 4096',
    '--bs 66':'at most 65', '--bs 32 --n-items 30':'at most 30', '--epochs 0':'1 to 1000', '--lr -1':'--lr', '--mom 1':'--mom',
    '--sqrmom 1':'--sqrmom', '--eps -1':'--eps',
    '--wd -1':'--wd', '--smooth 1':'--smooth', '--mixup -1':'--mixup', '--sh 2':'--sh', '--beta -1':'--beta', '--pct-start 1':'--pct-start',
    '--n-items 9':'10 to 60', '--n-items 61':'10 to 60',
    '--runs 0':'--runs', '--workers -1':'--workers', '--seed -1':'--seed', '--div 3':'flat_cos has none', '--sa 0 --sym 1':'--sym',
    '--fp16 1 --bf16 1':'choose one', '--fp16 1':'needs a GPU', '--split v3':'v1, v2', '--split v1':"ImageNet's names",
    '--sched one_cycle --div 0':'--div', '--sched step --pct-start .5':'step has none'}
if torch.cuda.is_available(): bad_imagenette = {k: v for k,v in bad_imagenette.items() if v != 'needs a GPU'}

def refuses(result, name, about):
    "One line on stderr, about the right thing, and exit status 2"
    status,out,err = result
    assert status == 2 and out == ''
    assert err.startswith(f'radam-{name}: ') and about in err and len(err.splitlines()) == 1

@pytest.fixture
def no_training(monkeypatch):
    for m in (demo, imagenette): monkeypatch.setattr(m, 'run_job', lambda *a, **kw: pytest.fail('it trained'))

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
    refused(images/'train', "holds no train and no val; it should hold train and val, or archives of imagenette2-160")
    for split in 'train','val':
        for c in range(10 if split=='train' else 9):
            d = tmp_path/'nine'/split/str(c)
            d.mkdir(parents=True)
            (d/'0.png').touch()
    refused(tmp_path/'nine', 'found 9')
    (tmp_path/'nine'/'val'/'X').mkdir()
    (tmp_path/'nine'/'val'/'X'/'0.png').touch()
    refused(tmp_path/'nine', 'different classes: 9, X')
    (tmp_path/'file').touch()
    for name,args in [('demo',[]), ('imagenette',['--path',images])]: refuses(cli(name, *args, '--out', tmp_path/'file'/'x'), name, '--out')

def test_missing_timm(cli, no_training, images, monkeypatch):
    monkeypatch.setitem(sys.modules, 'timm.layers', None)
    refuses(cli('imagenette', '--path', images, '--pool', 'MaxBlurPool'), 'imagenette', "pip install 'radam_fastai[blur]'")

def test_python_callers_get_an_error(images):
    with pytest.raises(OptionError, match='--epochs 0'): demo.main(epochs=0)
    with pytest.raises(OptionError, match='--arch vgg: choose from'): imagenette.main(path=images, arch='vgg')

def test_interrupted(cli, tiny, images, tmp_path, monkeypatch):
    def interrupt(*a, **kw): raise KeyboardInterrupt
    monkeypatch.setattr(imagenette, 'run_job', interrupt)
    status,_,err = cli('imagenette', '--path', images, '--out', tmp_path)
    assert (status, err) == (130, 'radam-imagenette: interrupted; --resume goes on from the last whole epoch\n')

@pytest.mark.parametrize('command', [['imagenette','--path','nowhere'], ['experiment','nonsense'], ['demo','--epochs','0']],
                         ids=lambda c: c[0])
def test_exit_status_of_a_process(command):
    "And nothing but its own line, no warning of a library"
    env = {k: v for k,v in os.environ.items() if k != 'PYTHONWARNINGS'}
    res = subprocess.run([sys.executable, '-m', f'radam_fastai.{MODULES[command[0]]}', *command[1:]], cwd=root, env=env,
                         capture_output=True, text=True)
    assert res.returncode == 2 and res.stdout == '' and len(res.stderr.splitlines()) == 1, res.stderr

# The terminal

def shell(line, tmp_path, **env):
    "What becomes of a line of bash in which `radam-NAME` is a command"
    for name,module in MODULES.items():
        (tmp_path/f'radam-{name}').write_text(f'#!{sys.executable}\nimport sys\nfrom radam_fastai.{module} import main\nsys.exit(main())')
        (tmp_path/f'radam-{name}').chmod(0o755)
    env = {**os.environ, 'PYTHONPATH':str(root), 'PATH':f"{tmp_path}:{os.environ['PATH']}", 'OMP_NUM_THREADS':'1', **env}
    env.pop('PYTHONWARNINGS', None)
    return subprocess.run(['bash', '-c', line], cwd=tmp_path, env=env, capture_output=True, text=True, encoding='latin1')

TALKS = {'demo': 'radam-demo --epochs 1 --anew --out o', 'imagenette': 'radam-imagenette --dump', 'experiment': 'radam-experiment',
         'bench': 'radam-bench --models small --optims ours --rounds 1 --out o'}

@pytest.mark.parametrize('name', TALKS)
def test_an_output_that_nobody_reads(tmp_path, name):
    "Closed, it is done without; a full one and a broken pipe end the command in a line, and not in a traceback"
    res = shell(f'{TALKS[name]} >&-', tmp_path)
    assert (res.returncode, res.stderr) == (0, '')
    res = shell(f'{TALKS[name]} > /dev/full', tmp_path)
    assert (res.returncode, res.stderr) == (2, f'radam-{name}: could not write to stdout: No space left on device\n')
    res = shell(f'set -o pipefail; {TALKS[name]} | true', tmp_path)
    assert res.stderr == '' and res.returncode in (0, 141) # 0 if all was in the pipe before its end was closed

@pytest.mark.parametrize('name', MODULES)
def test_help_in_ascii(tmp_path, name):
    res = shell(f'radam-{name} -h', tmp_path, PYTHONIOENCODING='ascii', LC_ALL='C')
    assert res.returncode == 0 and res.stderr == '' and '--version' in res.stdout

@pytest.mark.parametrize('name', MODULES)
def test_version(tmp_path, name):
    res = shell(f'radam-{name} --version', tmp_path)
    assert (res.returncode, res.stdout) == (0, f'radam-{name} {__version__}\n')

@pytest.mark.parametrize('spelled', ['--act_fn=Mish --pct_start .7 --n_items 20 --channels_last --woof --fp16 0',
                                     '--act-fn Mish --pct-start=.7 --n-items 20 --channels-last 1 --woof=1 --fp16=0',
                                     '--n_items=20 --woof yes --channels-last --act_fn Mish --pct_start .7 --resume 0 --fp16=no'])
def test_options_are_spelled_as_people_spell_them(cli, images, tmp_path, monkeypatch, spelled):
    got = []
    def run_job(runs, *args, **kwargs):
        got.append(runs[0].options)
        raise RecipeError('enough')
    monkeypatch.setattr(imagenette, 'run_job', run_job)
    monkeypatch.setattr(imagenette, 'find_images', lambda path, size, woof: (images, f'woof {woof}'))
    assert cli('imagenette', '--path', images, '--out', tmp_path, '--bs', 16, *spelled.split())[2] == 'radam-imagenette: enough\n'
    o, = got
    assert [o[k] for k in ('act_fn','pct_start','n_items','channels_last','fp16')] == ['Mish', .7, 20, True, False]

def test_a_flag_before_a_name(cli, monkeypatch):
    "`--resume language` goes on with `language`"
    def run_job(runs, out, name, resume, *args): raise RecipeError(f'{name} {resume}')
    monkeypatch.setattr(experiment, 'run_job', run_job)
    assert cli('experiment', '--resume', 'variance', '--epochs', 1)[2] == 'radam-experiment: variance True\n'

def test_sgd(cli, tiny, images, tmp_path):
    status,_,err = cli('imagenette', '--path', images, '--out', tmp_path, *small, *'--opt sgd --lr .1 --mom .8 --wd .1'.split())
    assert status == 0, err
    rec, = read_records(tmp_path/'records.jsonl')
    assert {k: rec['hypers'][0][k] for k in ('mom','wd','lr')} == dict(mom=.8, wd=.1, lr=.1) and set(rec['steps']['rect']) == {None}

def test_home_folder(cli, tiny, tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path/'home'))
    monkeypatch.chdir(tmp_path)
    assert cli('demo', '--epochs', 1, '--out', '~/x')[0] == 0 and (tmp_path/'home'/'x'/'records.jsonl').exists()
    assert cli('imagenette', '--report', '~/x')[0] == 0 and (tmp_path/'home'/'x'/'table.md').exists() and not (tmp_path/'~').exists()

def test_forgotten_resume(cli, tiny, tmp_path, monkeypatch):
    "A job that was begun and is not finished is not begun again beside itself by mistake"
    demo_main = ['demo', '--epochs', 1, '--out', tmp_path]
    with monkeypatch.context() as m:
        m.setattr(jobs, 'save_run', interrupted_at(2))
        assert cli(*demo_main)[0] == 130
    (tmp_path/'records.jsonl').write_text((tmp_path/'records.jsonl').read_text().splitlines(True)[0]) # killed before the second record
    before = {p.name for p in tmp_path.iterdir()}
    status,out,err = cli(*demo_main)
    says = 'adam-42 is not finished there; --resume goes on with this job, --anew begins it again'
    assert (status, err) == (2, f'radam-demo: --out {tmp_path}: {says}\n')
    assert {p.name for p in tmp_path.iterdir()} == before and 'choose one of them' in cli(*demo_main, '--anew', '--resume')[2]
    assert cli(*demo_main, '--anew')[0] == 0 and (tmp_path/'radam-42-2.csv').exists()
    cli(*demo_main, '--resume')
    table = report(tmp_path)
    assert len(read_records(tmp_path/'records.jsonl')) == 19 and table.n.tolist() == [3]*6
    assert 'Left out: 1' in (tmp_path/'table.md').read_text()

def interrupted_at(n):
    calls = []
    def f(*args):
        calls.append(args)
        if len(calls) == n: raise KeyboardInterrupt
    return f

def test_ctrl_c_ends_the_progress_line(cli, tmp_path, monkeypatch):
    def run_job(*args, **kwargs):
        print('|███---| 50.00%', end='\r')
        raise KeyboardInterrupt
    monkeypatch.setattr(demo, 'run_job', run_job)
    monkeypatch.setattr(type(sys.stdout), 'isatty', lambda self: True)
    status,out,err = cli('demo', '--out', tmp_path)
    assert out.endswith('\r\n') and err.startswith('radam-demo: interrupted; --resume')

def test_tables_fit_a_terminal():
    rng = random.Random(0)
    for n_cols in range(1, 12):
        words = lambda: ' '.join('x'*rng.randint(1, 60) for _ in range(rng.randint(0, 6)))
        df = pd.DataFrame([{f'column {i}': words() for i in range(n_cols)} for _ in range(3)])
        text = terminal_table(df)
        assert max(map(len, text.splitlines())) <= 80
        for cell in [*df.columns, *df.values.flatten()]: assert Counter(cell) - Counter(text) == Counter() # nothing is left out
