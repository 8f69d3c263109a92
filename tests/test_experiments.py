"""The experiments: the same weights and batches for all, numbers that are the records', answers from records alone."""
import json
import random
import re

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from PIL import Image

from helpers import short_header
from radam_fastai.experiments import images, main as experiment, sweep, theory
from radam_fastai.experiments.images import part
from radam_fastai.experiments.main import EXPERIMENTS
from radam_fastai.experiments.sweep import METRICS, ExperimentSettings, get_runs, labels, merit_table, near_range, sweep_table
from radam_fastai.recipes.cli import OptionError, RecipeError
from radam_fastai.recipes.data import crop_flip, tensor_dls
from radam_fastai.recipes.jobs import run_job
from radam_fastai.recipes.optims import optims
from radam_fastai.recipes.records import append_record, read_records
from radam_fastai.rectify import rho_inf

pytestmark = pytest.mark.slow

# Images in memory

def rows(n=23): return torch.arange(n)[:,None]*torch.ones(n, 4),torch.arange(n)

def test_batches_are_rows_of_the_tensors():
    train,valid = rows(),rows(7)
    dls = tensor_dls(train, valid, 5)
    dls.train.rng = random.Random(3)
    xs,ys = zip(*dls.train)
    assert [len(y) for y in ys] == [5]*4 # the last three of 23 are dropped
    order = torch.cat(ys).tolist()
    assert len(set(order)) == 20 and order != sorted(order)
    for x,y in zip(xs, ys): assert torch.equal(x.cpu(), train[0][y.cpu()])
    assert torch.cat([y for _,y in dls.valid]).tolist() == list(range(7))
    again = tensor_dls(train, valid, 5)
    again.train.rng = random.Random(3)
    assert torch.cat([y for _,y in again.train]).tolist() == order # the order is a function of `rng`

def test_only_training_is_augmented():
    dls = tensor_dls(rows(), rows(), 5, augment=lambda x: -x)
    assert all((x <= 0).all() for x,_ in dls.train) and all((x >= 0).all() for x,_ in dls.valid)

def test_crop_flip_against_a_loop():
    x = torch.randn(40, 3, 6, 5)
    torch.manual_seed(0)
    got = crop_flip(x, 2)
    for image,o in zip(got, x):
        padded = np.pad(o.numpy(), ((0,0),(2,2),(2,2)))
        crops = [padded[:,i:i+6,j:j+5] for i in range(5) for j in range(5)]
        assert any(np.array_equal(image, c) or np.array_equal(image, c[:,:,::-1]) for c in crops)
    assert len({tuple(o.flatten().tolist()) for o in crop_flip(x[:1].expand(400,-1,-1,-1), 2)}) == 50 # all places, both ways

# Images in a folder

@pytest.fixture
def folder(tmp_path):
    "Ten classes of 8x8 images, eight for training and three for testing, each class a grey of its own"
    for split,n in ('train',8),('test',3):
        for c in range(10):
            (d := tmp_path/'photos'/split/f'c{c}').mkdir(parents=True)
            for i in range(n): Image.fromarray(np.full((8,8,3), 25*c+i, dtype='uint8')).save(d/f'{i}.png')
    return tmp_path/'photos'

def test_images_are_read_and_normalised(folder):
    (train,valid),about = images.load_images(folder, images.ImageSettings(size=4, bs=10))
    raw = np.repeat([25*c+i for c in range(10) for i in range(8)], 3*4*4).reshape(80,3,4,4)/255
    got = train[0].reshape(10, 8, -1).sort(dim=1)[0].reshape(80,3,4,4) # a class's images come in any order
    assert np.allclose(got, (raw-raw.mean())/raw[:,0].std(ddof=1), atol=1e-5)
    assert train[1].tolist() == [c for c in range(10) for _ in range(8)] and len(valid[1]) == 30
    assert np.allclose(valid[0][:3,0,0,0].min(), (0-raw.mean())/raw[:,0].std(ddof=1), atol=1e-5) # by the mean of the training images
    assert about['name'] == 'photos' and about['size'] == 4

@pytest.mark.parametrize('damage', ['cut', 'header'])
def test_an_image_that_cannot_be_read(folder, damage):
    bad = folder/'train'/'c3'/'2.png'
    bad.write_bytes(bad.read_bytes()[:30] if damage == 'cut' else short_header())
    with pytest.raises(RecipeError, match=f'{bad} is no image that can be read'):
        images.load_images(folder, images.ImageSettings(size=4, bs=10))

def test_image_learners_differ_in_the_optimizer_alone(folder):
    loaded,_ = images.load_images(folder, images.ImageSettings(size=8, n_items=20, bs=10))
    def begun(opt):
        torch.manual_seed(7)
        own = dict(opt=opt, bs=10, lr=.01, n_steps=5 if opt in ('adam-warmup','adam-2k') else None)
        learn = images.image_learner(loaded, images.ImageSettings(**{**images.SMALL, **own}))
        learn.create_opt()
        return learn
    first,*others = [begun(o) for o in optims('recipe', 'experiment')]
    for learn in others:
        for p,q in zip(first.model.parameters(), learn.model.parameters()): assert torch.equal(p, q)
        h = learn.opt.hypers[0]
        assert (h['mom'], h['wd']) == (.9, 1e-4)
        if type(learn.opt).__name__ != 'SGD': assert (h['sqr_mom'], h['eps']) == (.99, 1e-8)

@pytest.mark.filterwarnings('ignore:this cpu has no instructions')
@pytest.mark.parametrize('name,n_lrs', [('lr-robustness', 4), ('warmup-lengths', 2)])
def test_the_medium_budget(folder, name, n_lrs):
    "All images at their size, ten epochs, twelve contenders, bfloat16; here, one of them for an epoch of 80 images"
    shared,cells = EXPERIMENTS[name].budgets['medium']
    assert {k: shared[k] for k in ('size','n_items','n_valid','epochs')} == dict(size=32, n_items=None, n_valid=None, epochs=10)
    assert len(cells) == 12 and [len({c['lr'] for c in cells if c['opt'] == o}) for o in ('radam','adam')] == [n_lrs]*2
    run,dtypes = get_runs(EXPERIMENTS[name], {**shared, 'bs':16, 'epochs':1}, cells, [42], folder)[0],set()
    learn = run.make()
    learn.model[0].register_forward_hook(lambda m, x, out: dtypes.add(out.dtype))
    with learn.no_bar(),learn.no_logging(): run.fit(learn)
    assert dtypes == {torch.bfloat16} and learn.train_iter == 5 and run.options['bf16'] and run.data['size'] == 32

def test_precision_of_a_budget(cli, folder, tmp_path):
    "`--bf16 0` trains in single precision where the budget says bfloat16; a text model has no such choice"
    status,out,_ = cli('experiment', *'lr-robustness --budget medium --bf16 0 --runs 1 --opts radam --lrs .01 --epochs 1 --bs 16'.split(),
                       '--path', folder, '--out', tmp_path)
    r, = read_records(tmp_path/'records.jsonl')
    assert status == 0 and r['options']['bf16'] is False and ', float32' in out
    status,_,err = cli('experiment', 'language', '--bf16', '0', '--out', tmp_path/'text')
    assert status == 2 and 'language trains in single precision' in err and not (tmp_path/'text').exists()

@pytest.mark.parametrize('opt', optims('recipe', 'experiment'))
def test_contenders_honour_their_settings(opt):
    n = dict(n_steps=7) if opt in ('adam-warmup','adam-2k') else {}
    o = ExperimentSettings(opt=opt, mom=.8, sqr_mom=.95, eps=1e-3, wd=.2, epochs=3, **n).opt_func()([torch.nn.Parameter(torch.ones(2))],
                                                                                                    lr=.1)
    want = dict(mom=.8, wd=.2) if opt == 'sgd' else dict(mom=.8, sqr_mom=.95, eps=1e-3, wd=.2)
    assert {k: o.hypers[0][k] for k in want} == want
    if n: assert o.settings['lr_factor'].keywords == n

# Tables

def rec(opt, lr, seed, acc, **options):
    return dict(recipe='lr-robustness', run=f'{opt}-{lr}-{seed}', opt=opt, seed=seed, options=dict(opt=opt, lr=lr, **options),
                data=dict(name='d', train=8, valid=4),
                device=dict(name='m', threads=1), versions=dict(torch='1', fastai='2'), secs=6., rectifier=None, n_steps=2,
                epochs=[dict(epoch=i, step=i+1, train_loss=1., valid_loss=1., accuracy=a, perplexity=1/max(a, 1e-9), train_secs=1.,
                             secs=1.) for i,a in enumerate((acc/2, acc))])

def test_sweep_table_against_numpy():
    rng = np.random.default_rng(0)
    accs = {(o, lr): rng.random(3) for o in ('adam','radam') for lr in (.1,.01)}
    df = sweep_table([rec(o, lr, s, a) for (o,lr),v in accs.items() for s,a in enumerate(v)])
    assert df.accuracy.tolist() == ['Adam','RAdam'] and list(df.columns) == ['accuracy','lr 0.1','lr 0.01']
    for row,o in enumerate(('adam','radam')):
        for lr in (.1,.01): assert df[f'lr {lr}'][row] == f'{np.mean(accs[o,lr]):.3f} ± {np.std(accs[o,lr], ddof=1):.3f}'

def test_runs_of_one_name_are_refused(cli, tmp_path):
    "Names have six digits of a learning rate"
    status,_,err = cli('experiment', 'lr-robustness', '--lrs', '.01,.01000001', '--runs', 1, '--out', tmp_path/'o')
    assert status == 2 and 'two runs would be called adam-lr0.01-' in err and not (tmp_path/'o').exists()

def test_labels_tell_settings_apart():
    rs = [rec('adam-warmup', .1, 0, .5, n_steps=n) for n in (10,20)] + [rec('adam', .1, s, .5)
                                                                        for s in range(3)] + [rec('adam-eps', .1, 0, .5, eps=1e-4)]
    assert labels(rs) == ['Adam, warm-up, 10 updates', 'Adam, warm-up, 20 updates', *['Adam']*3, 'Adam-eps, eps 0.0001']
    assert labels([rec('adam', .1, 0, .5, epochs=e) for e in (1,1,2)]) == ['Adam','Adam','Adam, epochs 2']
    other_data = {**rec('adam', .1, 0, .5), 'data':dict(name='e')}
    assert len(set(labels([rec('adam', .1, 0, .5), rec('adam', .1, 1, .5), other_data]))) == 2

def test_labels_tell_data_apart():
    "By what it is, and not by what its folder is called"
    def on(name, digest, seed=0): return {**rec('adam', .1, seed, .5), 'data':dict(name=name, train=8, valid=4, digest=digest)}
    assert labels([on('d','aa'), on('d','aa',1), on('d','bb')]) == ['Adam','Adam','Adam, data d bb']
    assert labels([on('d','aa'), on('e','aa',1), on('d','aa',2)]) == ['Adam']*3
    assert labels([on('d','aa'), on('d','aa',1), on('$x^$','bb')])[2] == 'Adam, data x^'

def test_an_optimizer_that_always_diverged_has_no_range():
    df = merit_table([rec('sgd', lr, 0, float('nan')) for lr in (1.,.1)] + [rec('adam', .1, 0, .5)])
    assert df.iloc[0].tolist() == ['momentum SGD','diverged','','',''] and df.iloc[1]['at lr'] == '0.1'

def test_variances_of_other_settings_are_not_averaged(monkeypatch):
    def run(bs, seed, n, scale):
        kinds = 'rho','first_order','exact','normal','pooled','scaled'
        seen = dict(update=[*range(1, n+1)], **{k: [scale]*n for k in kinds})
        return {**rec('radam', .01, seed, .5, sqr_mom=.9, bs=bs), 'notes':dict(variance=seen)}
    monkeypatch.setattr(theory, 'plot_lr_variance', lambda df, ax: ax.plot([0], label='x') and (ax.legend(), ax)[1])
    table = theory.show_variance([run(16, 0, 6, 1.), run(16, 1, 6, 3.), run(128, 0, 20, 100.)])['results']
    assert table.groupby('β2')['simulated'].unique().map(list).to_dict() == {'0.9':['2'], '0.9, bs 128':['100']}

@pytest.mark.parametrize('means,text', [({.1:.7,.01:.695,.001:.5}, '0.01 – 0.1 (×10)'),
                                        ({.1:.7,.01:.6,.001:.7}, '0.001 – 0.001 (×1)'),
                                        ({.1:.7,.03:.6,.01:.7,.003:.695}, '0.003 – 0.01 (×3.33)'), ({.1:.2}, '')])
def test_near_range(means, text): assert near_range(means, .7, METRICS['accuracy'].near) == text

def test_perplexity_is_better_when_it_is_lower():
    rs = [rec('adam', lr, 0, a) for lr,a in ((.1,.01),(.01,.02),(.001,.0199))]
    row = merit_table(rs, 'perplexity').iloc[0]
    assert row['best perplexity'] == '50.0' and row['at lr'] == '0.01' and row['within 1 % of its best'] == '0.001 – 0.01 (×10)'

@pytest.mark.parametrize('metric', METRICS)
def test_diverged_runs_are_the_worst(metric):
    rs = [rec('adam', .1, s, a) for s,a in enumerate((.5, .6))] + [rec('adam', .01, s, .1) for s in (0,1)]
    rs[1]['epochs'][-1][metric] = float('nan')
    assert sweep_table(rs, metric)['lr 0.1'][0] == 'diverged 1 of 2'
    assert merit_table(rs, metric)['at lr'][0] == '0.01'
    rs[1]['epochs'][-1].update({metric: .5, 'valid_loss': float('nan')}) # weights of NaN still have an accuracy
    assert sweep_table(rs, metric)['lr 0.1'][0] == 'diverged 1 of 2'

# The command


few = dict({'lr-robustness':['--opts','radam,sgd','--lrs','.03'], 'warmup-lengths':['--opts','radam,adam-warmup','--lrs','.03'],
            'variance':[], 'degenerate':[],
            'adam-2k':['--opts','radam,adam-2k','--lrs','.001','--n-items','4000'],
            'language':['--opts','radam','--lrs','.01','--n-items','4000']})

def test_degenerate_compares_runs_that_differ_in_the_optimizer_alone():
    "Two learning rates and two lengths in one folder"
    def run(opt, lr, n, **o): return dict(rec(opt, lr, 0, .5, epochs=n, **o), n_steps=n, steps=dict(loss=[lr]*n, adaptive=[False]*n))
    rs = [run(o, lr, n, **b) for lr in (.1,.2) for n in (1,2) for o,b in (('sgd',{}), ('radam',dict(sqr_mom=.5)))]
    row, = theory.show_degenerate(rs)['results'].to_dict('records')
    assert (row['runs'], row['first different loss'], row['largest difference in loss from momentum SGD']) == (4, 'never', '0')

def test_variance_keeps_learning_rates_apart():
    def run(lr): return dict(rec('radam', lr, 0, .5, sqr_mom=.9), notes=dict(variance={k: [lr] for k in cols}))
    cols = 'step','rho','first_order','exact','normal','pooled','scaled'
    assert theory.show_variance([run(.1), run(.2)])['results']['β2'].tolist() == ['0.9, lr 0.1', '0.9, lr 0.2']

def test_a_part_has_as_many_images_as_were_asked_for():
    files = {k: [f'{k}{i}' for i in range(9)] for k in 'abc'}
    assert [[f[0] for f in part(files, n)].count(k) for n in (7, 9) for k in 'abc'] == [3,2,2, 3,3,3] and len(part(files)) == 27

def test_digits_may_be_fewer(cli, tmp_path):
    one = ['--opts', 'adam', '--lrs', '.01', '--runs', 1, '--epochs', 1]
    assert cli('experiment', 'lr-robustness', *one, '--n-items', 100, '--out', tmp_path)[0] == 0
    r, = read_records(tmp_path/'records.jsonl')
    assert r['data']['train'] == 100 and r['n_steps'] == 100//32

@pytest.mark.parametrize('name', EXPERIMENTS)
def test_every_experiment_runs_without_data(cli, tmp_path, name):
    runs = 1
    status,out,err = cli('experiment', name, '--out', tmp_path, '--runs', runs, '--epochs', 1, *few[name])
    assert status == 0, err
    recs = read_records(tmp_path/'records.jsonl')
    assert recs and {r['recipe'] for r in recs} == {name} and {r['seed'] for r in recs} == {42}
    cells = {c.strip() for line in (tmp_path/'results.md').read_text().splitlines()[2:] for c in line.strip('|\n').split('|')}
    assert all(c in out for c in cells if len(c) < 30) # longer ones are on several lines
    for f in (tmp_path/'results.md', tmp_path/'table.md'): assert len(f.read_text().splitlines()) > 2
    pictures = {p.stem for p in tmp_path.glob('*.png')} - {r['run'] for r in recs} - {'all'}
    assert pictures, 'no figure'
    for p in pictures: assert Image.open(tmp_path/f'{p}.png').size[0] > 300

def test_report_needs_records_alone(cli, tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, 'run_job', lambda *a: pytest.fail('it trained'))
    for s in (0,1):
        for o,a in ('adam',.5),('radam',.6): append_record(tmp_path/str(s)/'records.jsonl', rec(o, .1, s, a+.1*s))
    status,out,err = cli('experiment', '--report', tmp_path)
    assert status == 0, err
    rows = [re.split(' {2,}', line) for line in out.splitlines()]
    assert ['RAdam', '0.650 ± 0.071'] in rows and ['Adam', '0.550 ± 0.071'] in rows
    assert '| RAdam | 0.650 ± 0.071 |' in (tmp_path/'results.md').read_text()
    assert {'results.md','merit.md','sweep.png','curves.png','table.md','all.png'} <= {p.name for p in tmp_path.iterdir()}
    append_record(tmp_path/'other'/'records.jsonl', {**rec('radam', .1, 0, .5), 'recipe':'warmup-lengths'})
    assert cli('experiment', '--report', tmp_path)[0] == 0 # each experiment has its own tables
    assert '| RAdam | 0.500 |' in (tmp_path/'warmup-lengths'/'results.md').read_text()
    assert 'Adam' in (tmp_path/'lr-robustness'/'results.md').read_text()

def test_without_a_name_they_are_listed(cli):
    status,out,_ = cli('experiment')
    assert status == 0 and all(n in out and e.question in out for n,e in EXPERIMENTS.items())
    assert all(n in ' '.join(cli('experiment', '--help')[1].split()) for n in EXPERIMENTS)

bad = {'lr-robust':'choose from lr-robustness, warmup-lengths', 'variance --budget huge':'choose from small, paper',
       'language --runs 0':'1 to 1000', 'language --seed -1':'--seed',
    'lr-robustness --opts adamw':'choose from adam, radam', 'lr-robustness --lrs 1e-3,x':"'x' is none", 'lr-robustness --lrs 0':'--lrs',
    'lr-robustness --epochs 0':'--epochs',
    'lr-robustness --bs 1':'--bs', 'lr-robustness --n-items 3':'--n-items', 'lr-robustness --path nowhere':'nowhere',
    'language --path nowhere':'nowhere', 'lr-robustness --bs 4000':'--bs 4000'}

@pytest.mark.parametrize('args', bad)
def test_options_that_cannot_be_used(cli, tmp_path, monkeypatch, args):
    monkeypatch.setattr(experiment, 'run_job', lambda *a: pytest.fail('it trained'))
    monkeypatch.chdir(tmp_path)
    status,out,err = cli('experiment', *args.split(), '--out', tmp_path/'new')
    assert status == 2 and out == '' and bad[args] in err and len(err.splitlines()) == 1, err
    assert not (tmp_path/'new').exists()

def test_python_callers_get_an_error():
    with pytest.raises(OptionError, match='no such experiment'): experiment.main('nonsense')

# Killed and resumed

class Stop(Callback):
    "Be interrupted in the second epoch"
    order = 200
    def before_batch(self):
        if self.training and self.epoch == 1: raise KeyboardInterrupt

def test_notes_survive_a_kill(tmp_path, tiny, monkeypatch):
    "What was noted in the first epoch is in the record of a run that was killed in the second"
    monkeypatch.setattr(sweep, 'save_figure', lambda *a: None)
    shared,cells = theory.variance.budgets['small']
    def runs(): return get_runs(theory.variance, {**shared, 'epochs':2}, cells[:1], [1])
    none = dict(write=lambda *a, **kw: None)
    whole, = run_job(runs(), tmp_path/'whole', 'variance', **none)
    make = theory.variance.make
    monkeypatch.setattr(theory.variance, 'make', lambda *a: make(*a).add_cb(Stop()))
    with pytest.raises(KeyboardInterrupt): run_job(runs(), tmp_path/'killed', 'variance', **none)
    monkeypatch.setattr(theory.variance, 'make', make)
    again, = run_job(runs(), tmp_path/'killed', 'variance', resume=True, **none)
    assert [s['epoch'] for s in again['sittings']] == [0, 1]
    assert json.dumps(again['notes']) == json.dumps(whole['notes']) and again['steps'] == whole['steps']
    assert len(whole['notes']['variance']['scaled']) == theory.VARIANCE_STEPS

# What they are about

def test_degenerate_is_sgd_to_the_bit(tmp_path, tiny):
    "And not only by its losses: the parameters are equal"
    shared,_ = theory.degenerate.budgets['small']
    kept = {}
    for o in dict(opt='sgd'),dict(opt='radam', sqr_mom=2/3),dict(opt='radam', sqr_mom=.7):
        torch.manual_seed(0)
        s = images.ImageSettings(**{**shared, **o, 'lr':.03})
        learn = images.image_learner(images.load_images(None, s)[0], s)
        learn.dls.train.rng = random.Random(0)
        with learn.no_bar(),learn.no_logging(): learn.fit(1, .03)
        kept[o.get('sqr_mom')] = torch.cat([p.detach().flatten() for p in learn.model.parameters()])
    assert rho_inf(2/3) <= 5 < rho_inf(.7)
    assert torch.equal(kept[None], kept[2/3]) and not torch.equal(kept[None], kept[.7])

@pytest.mark.parametrize('name', ['lr-robustness','warmup-lengths','variance','degenerate'])
def test_images_of_the_archive(cli, data_path, tmp_path, name):
    status,_,err = cli('experiment', name, '--path', data_path if (data_path/'cifar10.tgz').exists() else data_path/'cifar10', '--out',
                       tmp_path, '--runs', 1, '--epochs', 1, '--n-items', 1600, *few[name])
    assert status == 0, err
    assert {r['data']['name'] for r in read_records(tmp_path/'records.jsonl')} == {'cifar10'}

@pytest.mark.parametrize('name', ['adam-2k','language'])
def test_text_of_the_archive(cli, data_path, tmp_path, name):
    status,_,err = cli('experiment', name, '--path',
                       data_path if (data_path/'wikitext-2-small.tgz').exists() else data_path/'wikitext-2-small', '--out', tmp_path,
                       '--runs', 1, '--epochs', 1, *few[name])
    assert status == 0, err
    assert {r['data']['name'] for r in read_records(tmp_path/'records.jsonl')} == {'wikitext-2-small'}
