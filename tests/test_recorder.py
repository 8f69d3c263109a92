"""The recorder's rows against the updates that the parameters really made, and against the formula on independent counts."""
import errno
import math
import pickle
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path

import fastai.optimizer as fo
import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch
from fastai.basics import Callback, DataLoaders, OptimWrapper, load_learner
from fastai.callback.all import CSVLogger, GradientAccumulation
from torch import nn

from helpers import At, Data, SkipAt, means, opts, plain_rect, recorded_learner, stable, unchanged_by_a_failing_fit
from radam_fastai import recorder
from radam_fastai.finder import rectified_lr_find
from radam_fastai.introspect import find_rectifier, param_counts, step_counts, updates_made
from radam_fastai.optimizer import RAdam, reference_settings
from radam_fastai.recorder import RectifierRecorder, check_csv
from radam_fastai.torch_optim import RAdamWrapper

class Felt(Callback):
    """The learning rate that each update had, read from what it did to the first weight of each group.

    Δp against m̂/(sqrt(v̂)+eps), and against m̂ in the momentum phase."""
    def before_step(self): self.before = [self._first(i).detach().clone() for i in range(2)]
    def _first(self, i): return self.model[i].weight
    def after_step(self):
        self.rates = getattr(self, 'rates', ([], []))
        for i in range(2):
            w,h = self._first(i),self.opt.hypers[i]
            if w.grad is None: continue
            s = (self.opt.opt if isinstance(self.opt, OptimWrapper) else self.opt).state.get(w, {})
            if 'step' not in s: self.rates[i].append(0.); continue # skipped before the first
            m,v = ((s[k] if k in s else s[o]).double() for k,o in (('grad_avg', 'exp_avg'), ('sqr_avg', 'exp_avg_sq')))
            t,moved = int(s['step']),(w.detach()-self.before[i]).double()
            debias = math.sqrt(1-h['sqr_mom']**t)
            eps = h['eps']/(debias if isinstance(self.opt, OptimWrapper) else 1)
            unit = m/(1-h['mom']**t)
            if 199-2*t*.99**t/(1-.99**t) > 5: unit = unit/(v.sqrt()/debias+eps)
            self.rates[i].append(-((moved*unit).sum()/(unit*unit).sum()).item())

def undisturbed(learn): learn.fit_one_cycle(3, .01)
def skipped(learn): learn.fit_one_cycle(3, .01, cbs=SkipAt(0, 7, 8, 15))
def accumulated(learn): learn.fit_one_cycle(6, .01, cbs=GradientAccumulation(8))
def frozen(learn):
    learn.freeze()
    learn.fit(1, .01)
    learn.unfreeze()
    learn.fit(2, slice(.001, .01))
def late(learn):
    learn.model[0].requires_grad_(False)
    learn.fit(1, .01)
    learn.model[0].requires_grad_(True)
    learn.fit(2, .01)
def resumed(learn):
    learn.fit(2, .01)
    learn.save('half')
    learn.fit(1, .02)
    learn.load('half')
    learn.fit(2, .01)

@pytest.mark.many
@pytest.mark.parametrize('name, run', [*((o, undisturbed) for o in opts), *(
    (o, run) for o in ('RAdam', 'wrapper', 'fastai', 'torch') for run in (skipped, accumulated, frozen, late, resumed))], ids=stable)
def test_effective_lr_is_what_moved_the_weights(name, run, tmp_path):
    learn = recorded_learner(opts[name], path=tmp_path, wd=0.)
    learn.add_cb(felt := Felt())
    run(learn)
    df = learn.rectifier.to_frame()
    for group in range(2):
        assert len(felt.rates[group]) > 6
        assert df.effective_lr[df.group == group].tolist() == pytest.approx(felt.rates[group], rel=2e-3, abs=1e-9)

@pytest.mark.parametrize('name', opts)
def test_rows(name):
    "A row an update and group, with the plain formula's numbers"
    learn = recorded_learner(opts[name])
    learn.fit_one_cycle(3, .01)
    df = learn.rectifier.to_frame()
    assert list(df.columns) == 'epoch batch step group rho rect adaptive lr effective_lr mom sqr_mom event'.split()
    df = df[df.group == 0]
    assert df[['epoch', 'batch']].to_numpy().tolist() == [[i, j] for i in range(3) for j in range(8)]
    assert df.step.tolist() == list(range(1, 25)) and df.lr.tolist() == pytest.approx(learn.recorder.hps['lr'])
    assert df.mom.tolist() == pytest.approx(learn.recorder.hps['mom'])
    assert df.rho.tolist() == pytest.approx([199-2*t*.99**t/(1-.99**t) for t in range(1, 25)])
    expect = [plain_rect(t, .99, 5) for t in range(1, 25)]
    assert df.rect.tolist() == pytest.approx([math.nan if r is None else r for r in expect], nan_ok=True)
    assert df.adaptive.tolist() == [r is not None for r in expect]

@pytest.mark.parametrize('name', ['torch', 'author', 'paper'])
def test_settings_are_followed(name):
    kw = reference_settings[name]
    learn = recorded_learner(partial(RAdam, **kw))
    learn.fit(2, .01)
    df = learn.rectifier.to_frame().query('group == 0')
    expect = [plain_rect(t, kw['sqr_mom'], kw['threshold']) for t in range(1, 17)]
    assert df.rect.tolist() == pytest.approx([math.nan if r is None else r for r in expect], nan_ok=True)
    idle = 0 if kw['sgd_phase'] == 'skip' else .01
    assert df.effective_lr.tolist() == pytest.approx([idle if r is None else .01*r for r in expect])

@pytest.mark.parametrize('name', ['RAdam', 'wrapper', 'fastai', 'torch'])
def test_skipped_steps(name):
    "The first, fourth and fifth batch do not step"
    learn = recorded_learner(opts[name])
    learn.add_cb(SkipAt(0, 3, 4))
    learn.fit(1, .01)
    df = learn.rectifier.to_frame().query('group == 1')
    assert df.step.tolist() == [0, 1, 2, 2, 2, 3, 4, 5] and df.event.tolist() == ['skipped', '', '', 'skipped', 'skipped', '', '', '']
    assert (df.effective_lr[df.event == 'skipped'] == 0).all() and (df.effective_lr[df.event == ''] > 0).all()

def test_a_restart_is_marked_behind_a_skipped_step():
    learn = recorded_learner(RAdam)
    learn.fit(1, .01)
    learn.add_cb(SkipAt(0))
    learn.fit(1, .01, reset_opt=True)
    df = learn.rectifier.to_frame().query('group == 0')
    assert df.event[df.event != ''].tolist() == ['skipped', 'restart'] and df.step[df.event != ''].tolist() == [0, 1]

@pytest.mark.parametrize('name', ['RAdam', 'fastai'])
def test_groups_part_when_frozen(name):
    learn = recorded_learner(opts[name])
    learn.fit(1, .01)
    learn.opt.freeze()
    learn.opt.zero_grad()
    for p in learn.model[0].parameters(): p.grad = None
    learn.fit(1, .01)
    learn.opt.unfreeze()
    learn.fit(1, .01)
    df = learn.rectifier.to_frame()
    assert df[df.group == 0].step.tolist() == list(range(1, 17)) and df[df.group == 1].step.tolist() == list(range(1, 25))
    assert not df.event.any()

def test_counts_that_differ_within_a_group_have_rows_of_their_own():
    learn = recorded_learner(RAdam, splitter=lambda m: [list(m.parameters())])
    learn.model[0].requires_grad_(False)
    learn.fit(1, .01)
    learn.model[0].requires_grad_(True)
    learn.fit(1, .01)
    df = learn.rectifier.to_frame()
    assert df.step[8:].tolist() == [n for t in range(1, 9) for n in (t, 8+t)]

def test_restarts():
    learn = recorded_learner(RAdam)
    learn.fit(1, .01)
    sd = learn.opt.state_dict()
    saved = {**sd, 'state': [{**s} for s in sd['state']]}
    learn.opt.clear_state()
    learn.fit(1, .01)
    for s in saved['state']: s['step'] = 100
    learn.opt.load_state_dict(saved)
    learn.fit(1, .01)
    df = learn.rectifier.to_frame().query('group == 0').reset_index()
    assert df.event[df.event != ''].to_dict() == {8: 'restart', 16: 'restart'} and df.step[16] == 101

@pytest.mark.parametrize('name', opts)
def test_to_go_on_from_a_file_is_no_restart(name, tmp_path):
    learn = recorded_learner(opts[name], path=tmp_path)
    learn.fit(2, .01)
    learn.save('a')
    again = recorded_learner(opts[name], path=tmp_path)
    again.create_opt()
    again.load('a')
    again.fit(1, .01)
    df = again.rectifier.to_frame().query('group == 0')
    assert df.step.tolist() == list(range(17, 25)) and not df.event.any()
    x = again.rectifier.plot()[0].lines[0].get_xdata()
    assert list(x) == df.step.tolist()
    plt.close('all')

@pytest.mark.filterwarnings('ignore:You are shadowing:UserWarning')
@pytest.mark.parametrize('opt_func', [RAdam, fo.RAdam])
def test_networks_that_are_trained_in_turn_do_not_restart(opt_func):
    from fastai.vision.gan import FixedGANSwitcher, GANLearner
    ds = Data((torch.randn(3), torch.randn(2)) for _ in range(64))
    dls = DataLoaders.from_dsets(ds, ds, bs=4, device='cpu', num_workers=0)
    learn = GANLearner(dls, nn.Linear(3, 2), nn.Sequential(nn.Linear(2, 1), nn.Flatten(0)), lambda fake, out, y: fake.mean(),
                       lambda real, fake: (real-fake).mean(), FixedGANSwitcher(2, 1), opt_func=opt_func, cbs=RectifierRecorder())
    with learn.no_bar(), learn.no_logging(): learn.fit(2, .01)
    df = learn.rectifier.to_frame()
    assert not df.event.any() and len(df.drop_duplicates(['epoch', 'batch'])) == 32
    counts = learn.opt.state[learn.model.critic[0].weight]['step'],learn.opt.state[learn.model.generator.weight]['step']
    # fastai's steps an idle network, too: it writes zeros
    assert set(counts) <= set(df.step) and (opt_func is fo.RAdam or counts == (21, 11))

def test_parameters_that_join_later_do_not_restart():
    learn = recorded_learner(RAdam, splitter=lambda m: [list(m.parameters())])
    late(learn)
    df = learn.rectifier.to_frame()
    assert not df.event.any() and len(df) == 8 + 2*16

def test_leaves_no_rows_elsewhere():
    learn = recorded_learner(RAdam)
    learn.fit(1, .01)
    rows = len(learn.rectifier.to_frame())
    learn.validate()
    learn.get_preds()
    learn.lr_find(show_plot=False, num_it=10)
    assert len(learn.rectifier.to_frame()) == rows
    learn.fit(1, .01)
    assert len(learn.rectifier.to_frame()) == rows+16

def test_recording_changes_nothing():
    a,b = recorded_learner(RAdam),recorded_learner(RAdam)
    b.remove_cb(RectifierRecorder)
    for l in (a, b): l.fit_one_cycle(2, .01)
    assert all(torch.equal(p, q) for p,q in zip(a.model.parameters(), b.model.parameters()))

def test_export_and_csv(tmp_path):
    learn = recorded_learner(RAdam, path=tmp_path)
    learn.logger = print # an exported Learner cannot hold a lambda
    learn.fit(1, .01)
    learn.rectifier.to_csv(tmp_path/'r.csv')
    saved,df = pd.read_csv(tmp_path/'r.csv'),learn.rectifier.to_frame()
    assert list(saved.columns) == list(df.columns)
    pd.testing.assert_frame_equal(saved.drop(columns='event'), df.drop(columns='event'))
    learn.export('l.pkl')
    again = load_learner(tmp_path/'l.pkl')
    pd.testing.assert_frame_equal(again.rectifier.to_frame(), learn.rectifier.to_frame())

def test_validation_without_an_optimizer(tmp_path):
    "Before the first fit and after an export there is none, and what validates opens no file"
    def look(learn):
        assert learn.get_preds()[0].shape == learn.get_preds()[1].shape == (4, 2)
        assert learn.validate() == [torch.nn.MSELoss()(*learn.get_preds()).item()]
    learn = recorded_learner(RAdam, path=tmp_path)
    learn.rectifier.csv = 'r.csv'
    look(learn)
    assert not (tmp_path/'r.csv').exists()
    learn.fit(1, .01)
    learn.logger = print
    learn.export('l.pkl')
    again = load_learner(tmp_path/'l.pkl')
    assert again.opt is None
    again.dls = learn.dls
    look(again)

@pytest.mark.parametrize('error', [KeyboardInterrupt, RuntimeError])
def test_a_fit_after_an_interrupted_finder_is_recorded(error):
    def interrupt(learn): raise error('out of memory')
    learn = recorded_learner(RAdam)
    with pytest.raises(error), learn.added_cbs(At('before_backward', interrupt)): learn.lr_find(show_plot=False, num_it=10)
    learn.fit(1, .01)
    assert learn.rectifier.to_frame().step.tolist()[-1] == 8

def test_a_recorder_that_was_removed_leaves_nothing():
    def interrupt(learn): raise KeyboardInterrupt
    learn = recorded_learner(RAdam)
    with pytest.raises(KeyboardInterrupt): learn.fit(1, .01, cbs=At('before_backward', interrupt))
    learn.remove_cb(RectifierRecorder)
    learn.fit(1, .01)
    assert '_call_one' not in vars(learn)

@pytest.mark.parametrize('opt', [fo.Adam, fo.SGD])
def test_other_optimizers_are_told_what_is_recorded(opt):
    learn = recorded_learner(opt)
    with pytest.warns(UserWarning, match='does not rectify.*lr, mom and sqr_mom are recorded'): learn.fit(1, .01)
    df = learn.rectifier.to_frame()
    assert len(df) == 16 and df.rect.isna().all() and (df.effective_lr == .01).all() and not df.event.any()

def foreign(module, name, **kw):
    return partial(OptimWrapper, opt=lambda ps, lr, **kws: getattr(pytest.importorskip(module), name)(ps, lr=lr, **kws), **kw)

class Train(Callback):
    "schedulefree wants to be told"
    order = -5
    def before_train(self): self.opt.opt.train()
    def after_train(self): self.opt.opt.eval()

def lookahead(opt): return lambda *args, **kwargs: fo.Lookahead(opt(*args, **kwargs), k=100)

others = { # opt_func, β2, the ρ it rectifies above, whether momentum moves the weights until then
    'Lookahead(RAdamWrapper)': (lookahead(partial(RAdamWrapper, betas=(.9, .99))), .99, 5, True),
    'Lookahead(torch)': (lookahead(opts['torch']), .99, 5, True),
    'optimi': (foreign('optimi', 'RAdam'), .99, 5, True),
    'timm': (foreign('timm.optim', 'RAdamLegacy'), .999, 5, True),
    'schedulefree': (foreign('schedulefree', 'RAdamScheduleFree'), .999, 4, False),
    'schedulefree, not silent': (foreign('schedulefree', 'RAdamScheduleFree', silent_sgd_phase=False), .999, 4, True),
    'pytorch_optimizer': (foreign('pytorch_optimizer', 'RAdam'), .999, 5, False),
    'pytorch_optimizer, SGD first': (foreign('pytorch_optimizer', 'RAdam', degenerated_to_sgd=True), .999, 5, True)}

@pytest.mark.parametrize('name', others)
def test_other_radams_are_read(name):
    "Step count, r_t by the plain formula; and no update moves the weights where the recorder says that none does"
    opt_func,sqr_mom,threshold,moves = others[name]
    learn = recorded_learner(opt_func, cbs=[moved := Moved()] + [Train()]*name.startswith('schedulefree'))
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        learn.fit(2, .01)
    df = learn.rectifier.to_frame().query('group == 0')
    expect = [plain_rect(t, sqr_mom, threshold) for t in range(1, 17)]
    lr = .001 if name == 'Lookahead(torch)' else .01 # fastai's Lookahead cannot set what its OptimWrapper has
    assert df.step.tolist() == list(range(1, 17)) and not df.event.any() and (df.lr == lr).all() and (df.sqr_mom == sqr_mom).all()
    assert df.rect.tolist() == pytest.approx([math.nan if r is None else r for r in expect], nan_ok=True)
    assert df.effective_lr.tolist() == pytest.approx([lr*moves if r is None else lr*r for r in expect])
    assert [m > 0 for m in moved.by] == [r is not None or moves for r in expect]
    assert 'effective_lr' in learn.recorder.metric_names

class Moved(Callback):
    "How far each step moved the first weight"
    def __init__(self): self.by = []
    def before_step(self): self.p = self.model[0].weight.detach().clone()
    def after_step(self): self.by.append((self.model[0].weight.detach() - self.p).abs().max().item())

def test_schedulefree_says_the_same():
    "It keeps the rate that it took in `scheduled_lr`"
    class Taken(Callback):
        def __init__(self): self.lrs = []
        def after_step(self): self.lrs.append(self.opt.hypers[0]['scheduled_lr'])
    learn = recorded_learner(others['schedulefree'][0], cbs=[taken := Taken(), Train()])
    learn.fit(3, .01)
    assert learn.rectifier.to_frame().query('group == 0').effective_lr.tolist() == pytest.approx(taken.lrs)

class HomeMadeRAdam(torch.optim.SGD): "One that nobody has heard of"

def test_a_radam_that_is_not_known_is_called_that():
    learn = recorded_learner(partial(OptimWrapper, opt=HomeMadeRAdam))
    with pytest.warns(UserWarning, match='how HomeMadeRAdam rectifies is not known here; its lr, mom and sqr_mom are recorded'):
        learn.fit(1, .01)
    df = learn.rectifier.to_frame()
    assert df.effective_lr.isna().all() and df.rect.isna().all() and (df.lr == .01).all()
    with pytest.raises(ValueError, match='how HomeMadeRAdam rectifies is not known here'): rectified_lr_find(learn)

def test_functions_of_fastxtend():
    "Its optimizers are fastai's with another step, which a stand-in has here: a function called radam…, from the package fastxtend"
    def radam_foreach_step(): pass
    radam_foreach_step.__module__ = 'fastxtend.optimizer.foreach'
    opt = fo.Optimizer([nn.Parameter(torch.zeros(1))], [None], lr=.1)
    opt.opt_step = radam_foreach_step
    assert find_rectifier(opt).lr_factor(6, .99) == pytest.approx(plain_rect(6, .99, 5)) and find_rectifier(opt).sgd_phase == 'momentum'

def test_counts_of_a_group_are_fetched_at_once(monkeypatch):
    "They may be on the device: what makes the host wait is counted"
    waits = []
    for f in ('tolist', 'item', '__int__', '__float__', 'cpu'):
        monkeypatch.setattr(torch.Tensor, f, lambda *args, _f=getattr(torch.Tensor, f), **kw: (waits.append(f), _f(*args, **kw))[1])
    ps = [nn.Parameter(torch.zeros(2)) for _ in range(40)]
    opt = OptimWrapper([ps[:20], ps[20:]], torch.optim.RAdam, lr=.1)
    for p in ps: p.grad = torch.ones(2)
    opt.step()
    waits.clear()
    assert step_counts(opt) == [[1], [1]] and len(waits) == 2
    assert updates_made(opt) == 1 and len(waits) == 3
    assert [len(c) for c in param_counts(opt)] == [20, 20]

# --- the progress table

@pytest.mark.parametrize('name', opts)
def test_table_has_means_of_each_epoch(name):
    logged = []
    learn = recorded_learner(opts[name], metrics=lambda x, y: (x-y).abs().mean())
    learn.logger = lambda row: logged.append(list(row))
    learn.add_cb(SkipAt(2))
    learn.fit_one_cycle(3, .01)
    assert list(learn.recorder.metric_names) == ['epoch', 'train_loss', 'valid_loss', '<lambda>', 'rect', 'effective_lr', 'time']
    df = learn.rectifier.to_frame()
    for epoch,(values,row) in enumerate(zip(learn.recorder.values, logged)):
        assert list(values[-2:]) == pytest.approx(means(df, epoch)) and row[-3:-1] == list(values[-2:]) and len(row) == 7
        assert all(type(v) is float for v in values[-2:])

def test_an_epoch_of_momentum_says_so(tmp_path):
    "In the table and its values; for loggers it is a NaN"
    logged = []
    learn = recorded_learner(partial(RAdam, sqr_mom=.9), n=12, cbs=[CSVLogger()], path=tmp_path) # 3 updates an epoch
    learn.logger = lambda row: logged.append([f'{o:.6f}' if isinstance(o, float) else str(o) for o in row]) # as the progress bar writes it
    learn.fit(3, .01)
    assert [row[3:5] == ['momentum']*2 for row in logged] == [True, False, False]
    assert all(isinstance(v, float) for row in learn.recorder.values for v in row[2:]) and math.isnan(learn.recorder.values[0][-1])
    assert learn.csv_logger.read_log().rect.isna().tolist() == [True, False, False]
    assert repr(pickle.loads(pickle.dumps(learn.recorder.values[0][-1]))) == 'momentum'

def test_table_of_a_second_fit_is_its_own():
    learn = recorded_learner(RAdam)
    learn.fit(1, .01)
    learn.fit(1, .02)
    df = learn.rectifier.to_frame()
    assert list(learn.recorder.values[-1][-2:]) == pytest.approx(means(df[16:], 0))

def test_validation_alone_adds_nothing_to_its_values():
    learn = recorded_learner(RAdam)
    learn.fit(1, .01)
    assert len(learn.validate()) == 1 and len(learn.get_preds()) == 2 and len(learn.validate()) == 1

@pytest.mark.parametrize('opt_func, table', [(fo.Adam, True), (RAdam, False)])
def test_no_columns(opt_func, table):
    learn = recorded_learner(opt_func)
    learn.rectifier.table = table
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        learn.fit(1, .01)
    assert list(learn.recorder.metric_names) == ['epoch', 'train_loss', 'valid_loss', 'time'] and len(learn.recorder.values[0]) == 2

def test_works_without_fastais_recorder():
    learn = recorded_learner(RAdam)
    learn.remove_cb(learn.recorder)
    learn.fit(1, .01)
    assert len(learn.rectifier.to_frame()) == 16

# --- the file

def read_rows(path): return pd.read_csv(path, keep_default_na=False, na_values={'rho': '', 'rect': ''})

def same_rows(path, learn): pd.testing.assert_frame_equal(read_rows(path), learn.rectifier.to_frame(), check_dtype=False)

def test_file_has_every_row_at_once(tmp_path):
    class Look(Callback):
        order = 60
        def after_step(self): same_rows(tmp_path/'r.csv', self.learn)
    learn = recorded_learner(RAdam, path=tmp_path)
    learn.rectifier.csv = 'r.csv'
    learn.add_cbs([SkipAt(0, 3), Look()])
    learn.fit_one_cycle(2, .01)
    learn.fit(1, .01)
    assert len(read_rows(tmp_path/'r.csv')) == 48

KILLED = '''
import os, sys
sys.path.insert(0, {tests!r})
from fastai.basics import Callback
from helpers import recorded_learner
from radam_fastai.optimizer import RAdam
class Kill(Callback):
    order = 60
    def after_step(self):
        if self.train_iter == 10: os.kill(os.getpid(), 9)
learn = recorded_learner(RAdam, path={path!r})
learn.rectifier.csv = 'r.csv'
learn.fit(2, .01, cbs=Kill())
'''

@pytest.mark.slow
def test_a_killed_run_leaves_its_rows(tmp_path):
    done = subprocess.run([sys.executable, '-c', KILLED.format(tests=str(Path(__file__).parent), path=str(tmp_path))], capture_output=True)
    assert done.returncode == -9
    learn = recorded_learner(RAdam, path=tmp_path)
    learn.fit(2, .01)
    pd.testing.assert_frame_equal(read_rows(tmp_path/'r.csv'), learn.rectifier.to_frame()[:22], check_dtype=False)

def test_a_file_that_is_there_is_gone_on_with(tmp_path):
    for _ in range(2):
        learn = recorded_learner(RAdam, path=tmp_path)
        learn.rectifier.csv = 'r.csv'
        learn.fit(1, .01)
        with open(tmp_path/'r.csv', 'a') as f: f.write('0,5,1') # cut short by a crash
    learn.rectifier.csv = None
    check_csv(tmp_path/'r.csv', RectifierRecorder.columns)
    df = read_rows(tmp_path/'r.csv')
    assert len(df) == 32
    pd.testing.assert_frame_equal(df[16:].reset_index(drop=True), learn.rectifier.to_frame(), check_dtype=False)

def test_a_last_row_of_any_bytes_is_taken_out(tmp_path):
    "A crash can leave half a character, or more bytes than characters"
    for junk in ('0,5,ä€', b'0,5,\xff\xfe'):
        path = tmp_path/'r.csv'
        check_csv(path, RectifierRecorder.columns)
        whole = path.read_bytes()
        path.write_bytes(whole + (junk if isinstance(junk, bytes) else junk.encode()))
        check_csv(path, RectifierRecorder.columns)
        assert path.read_bytes() == whole

@pytest.mark.parametrize('make, error, match', [
    (lambda p: p.mkdir(), IsADirectoryError, 'cannot write the rectifier.*r.csv: Is a directory'),
    (lambda p: p.parent.joinpath('sub').write_text(''), OSError, 'cannot write the rectifier'),
    (lambda p: p.write_text('a,b\n1,2\n'), ValueError,
     "r.csv exists and holds something other than a rectifier's rows: choose another file")])
def test_a_file_that_cannot_be_used_is_an_error_before_the_first_batch(tmp_path, make, error, match):
    make(tmp_path/'r.csv')
    was = (tmp_path/'r.csv').read_text() if (tmp_path/'r.csv').is_file() else None
    learn = recorded_learner(RAdam, path=tmp_path)
    learn.rectifier.csv = 'sub/r.csv' if (tmp_path/'sub').exists() else 'r.csv'
    unchanged_by_a_failing_fit(learn, error, match)
    assert was is None or (tmp_path/'r.csv').read_text() == was

def test_a_full_disk_costs_no_rows(tmp_path, monkeypatch):
    "Writing fails for a while: one warning, and all rows are in the file when it works again"
    whole,calls = recorder.append_whole,[]
    def full(path, data, **kw):
        calls.append(data)
        if 3 < len(calls) < 9: raise OSError(errno.ENOSPC, 'No space left on device')
        whole(path, data, **kw)
    monkeypatch.setattr(recorder, 'append_whole', full)
    learn = recorded_learner(RAdam, path=tmp_path)
    learn.rectifier.csv = 'r.csv'
    with pytest.warns(UserWarning, match='r.csv cannot be written .No space left on device') as said: learn.fit(2, .01)
    assert sum('cannot be written' in str(w.message) for w in said) == 1
    same_rows(tmp_path/'r.csv', learn)

PARTIAL = '''
import errno, resource, sys
from pathlib import Path
from radam_fastai.files import append_whole
path = Path(sys.argv[1])
append_whole(path, b'first\\n')
resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))
try: append_whole(path, b'second, too long\\n')
except OSError as e: print(e.errno == errno.EFBIG)
'''

def test_what_does_not_fit_is_not_written_at_all(tmp_path):
    "The system takes the first four bytes of the second line only"
    done = subprocess.run([sys.executable, '-c', PARTIAL, str(tmp_path/'f')], capture_output=True, text=True)
    assert done.stdout == 'True\n', done.stderr
    assert (tmp_path/'f').read_bytes() == b'first\n'

# --- figures

def test_plot_tells_late_parameters_restarts_and_skips_apart():
    learn = recorded_learner(RAdam, splitter=lambda m: [list(m.parameters())])
    learn.model[0].requires_grad_(False)
    learn.fit(1, .01)
    learn.model[0].requires_grad_(True)
    learn.add_cb(SkipAt(3))
    learn.fit(1, .01)
    learn.opt.clear_state()
    learn.fit(1, .01)
    ax = learn.rectifier.plot()[0]
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ['group 0', 'group 0, joined later']
    lines = {l.get_label(): l for l in ax.lines}
    assert list(lines['group 0'].get_xdata()) == list(range(1, 25))
    assert list(lines['group 0, joined later'].get_xdata()) == list(range(9, 17))
    assert lines['group 0'].get_ydata()[5] == pytest.approx(plain_rect(6, .99, 5))
    assert 17 in [l.get_xdata()[0] for l in ax.lines if l.get_linestyle() == ':']
    assert [list(l.get_xdata()) for l in ax.lines if l.get_marker() == 'x' and len(l.get_xdata())] == [[12, 20], [12]]
    plt.close('all')

def test_plots_draw_into_the_axes_they_are_given():
    learn = recorded_learner(RAdam)
    learn.fit(1, .01)
    _,axs = plt.subplots(1, 2)
    assert learn.rectifier.plot(axs) is axs and axs[1].lines and axs[1].get_ylabel()
    plt.close('all')

def test_a_plot_before_a_fit_is_an_error():
    with pytest.raises(ValueError, match='nothing is recorded yet: fit first'): recorded_learner(RAdam).rectifier.plot()
    assert not plt.get_fignums()

def test_the_figure_explains_itself():
    learn = recorded_learner(RAdam)
    learn.fit(2, slice(.001, .01))
    a,b = learn.rectifier.plot()
    labels = lambda ax: [t.get_text() for t in ax.get_legend().get_texts()]
    assert a.get_title() and b.get_title() and a.get_xlabel() == b.get_xlabel() == 'update' and a.get_xlim() == b.get_xlim()
    assert labels(a) == ['groups 0, 1'] # which coincide here, but not there
    assert labels(b) == ['group 0', 'group 1', 'as set', 'lr·$r_t$', 'momentum SGD']
    for ax in (a, b):
        span, = ax.patches
        assert (span.get_x(), span.get_x()+span.get_width()) == (.5, 5.5) and 'momentum phase' in ax.texts[0].get_text()
    assert a.get_shared_x_axes().joined(a, b)
    plt.close('all')
