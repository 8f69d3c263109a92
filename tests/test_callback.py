"""The recorder's rows against the updates that the parameters really made, and against the formula on independent counts."""
import errno, math, subprocess, sys, types, warnings
from functools import partial
from importlib.machinery import ModuleSpec
from pathlib import Path

import fastai.optimizer as fo, matplotlib.pyplot as plt, numpy as np, pandas as pd, pytest, torch
from fastai.basics import Callback, CancelStepException, DataLoaders, Learner, OptimWrapper, load_learner
from fastai.callback.all import CSVLogger, GradientAccumulation, ProgressCallback
from torch import nn

from radam_fastai import callback
from radam_fastai.callback import KeepGoing, LogTo, RectifierRecorder, check_csv, rectified_lr_find
from radam_fastai.optimizer import RAdam, Ranger, reference_settings
from radam_fastai.torch_optim import RAdamWrapper
from reference import plain_rect

class Data(list):
    def new_empty(self): return Data()

def get_learner(opt_func, n=32, splitter=lambda m: [list(m[0].parameters()), list(m[1].parameters())], cbs=(), **kwargs):
    torch.manual_seed(0)
    ds = Data((torch.randn(4), torch.randn(2)) for _ in range(n))
    dls = DataLoaders.from_dsets(ds, ds, bs=4, shuffle=False, num_workers=0, device='cpu')
    learn = Learner(dls, nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), loss_func=nn.MSELoss(), opt_func=opt_func, splitter=splitter,
                    cbs=[RectifierRecorder(), *cbs], train_bn=False, **kwargs)
    learn.remove_cb(ProgressCallback)
    learn.logger = lambda *_: None
    return learn

opts = {'RAdam': RAdam, 'Ranger': partial(Ranger, k=100), 'wrapper': partial(RAdamWrapper, betas=(.9, .99)), 'fastai': fo.RAdam, 'ranger': partial(fo.ranger, k=100),
        'torch': partial(OptimWrapper, opt=torch.optim.RAdam, betas=(.9, .99))}

class Updates(Callback):
    "What each step did to the first weight, and the count and averages behind it"
    def before_step(self): self.p = self.model[0].weight.detach().clone()
    def after_step(self):
        self.seen = getattr(self, 'seen', [])
        w = self.model[0].weight
        s = (self.opt.opt if isinstance(self.opt, OptimWrapper) else self.opt).state[w]
        m,v = (s[k] if k in s else s[t] for k,t in (('grad_avg', 'exp_avg'), ('sqr_avg', 'exp_avg_sq')))
        self.seen.append(((w.detach()-self.p).double(), m.clone().double(), v.clone().double(), int(s['step']), dict(self.opt.hypers[0])))

@pytest.mark.parametrize('name', opts)
def test_effective_lr_is_what_moved_the_weights(name):
    "r_t read from the update itself: Δp against lr·m̂/(sqrt(v̂)+eps), and against lr·m̂ in the momentum phase"
    learn = get_learner(opts[name])
    learn.add_cb(up := Updates())
    learn.fit_one_cycle(3, .01, wd=0.)
    df = learn.rectifier.to_frame()
    df = df[df.group == 0].reset_index(drop=True)
    assert list(df.columns) == 'epoch batch step group rho rect adaptive lr effective_lr mom sqr_mom event'.split()
    assert df.step.tolist() == list(range(1, 25)) and df.epoch.tolist() == sum(([i]*8 for i in range(3)), []) and df.batch.tolist() == [*range(8)]*3
    for row,(moved,m,v,t,h) in zip(df.itertuples(), up.seen):
        m_hat,v_hat = m/(1-h['mom']**t),v/(1-h['sqr_mom']**t)
        eps = h['eps'] if name not in ('torch', 'wrapper') else h['eps']/math.sqrt(1-h['sqr_mom']**t)
        unit = m_hat/(v_hat.sqrt()+eps) if row.adaptive else m_hat
        assert (row.lr, row.mom, row.sqr_mom) == (h['lr'], h['mom'], h['sqr_mom'])
        assert row.effective_lr == pytest.approx(-((moved*unit).sum()/(unit*unit).sum()).item(), rel=1e-3)
        assert row.rect == pytest.approx(plain_rect(t, .99, 5)) if row.adaptive else math.isnan(row.rect) and plain_rect(t, .99, 5) is None
        assert row.rho == pytest.approx(199-2*t*.99**t/(1-.99**t))

class Felt(Callback):
    "The learning rate that each update had, read from what it did to the first weight of each group: Δp against m̂/(sqrt(v̂)+eps), and against m̂ in the momentum phase"
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

@pytest.mark.parametrize('name', ['RAdam', 'wrapper', 'fastai', 'torch'])
@pytest.mark.parametrize('run', [skipped, accumulated, frozen, late, resumed])
def test_effective_lr_is_what_moved_the_weights_whatever_happens(name, run, tmp_path):
    learn = get_learner(opts[name], path=tmp_path, wd=0.)
    learn.add_cb(felt := Felt())
    run(learn)
    df = learn.rectifier.to_frame()
    for group in range(2):
        assert len(felt.rates[group]) > 6
        assert df.effective_lr[df.group == group].tolist() == pytest.approx(felt.rates[group], rel=2e-3, abs=1e-9)

@pytest.mark.parametrize('name', ['torch', 'author', 'paper'])
def test_settings_are_followed(name):
    kw = reference_settings[name]
    learn = get_learner(partial(RAdam, **kw))
    learn.fit(2, .01)
    df = learn.rectifier.to_frame().query('group == 0')
    expect = [plain_rect(t, kw['sqr_mom'], kw['threshold']) for t in range(1, 17)]
    assert df.rect.tolist() == pytest.approx([math.nan if r is None else r for r in expect], nan_ok=True)
    idle = 0 if kw['sgd_phase'] == 'skip' else .01
    assert df.effective_lr.tolist() == pytest.approx([idle if r is None else .01*r for r in expect])

class SkipAt(Callback):
    def __init__(self, *at): self.at = at
    def before_step(self):
        if self.train_iter in self.at: raise CancelStepException()

@pytest.mark.parametrize('name', ['RAdam', 'wrapper', 'fastai', 'torch'])
def test_skipped_steps(name):
    "The first, fourth and fifth batch do not step"
    learn = get_learner(opts[name])
    learn.add_cb(SkipAt(0, 3, 4))
    learn.fit(1, .01)
    df = learn.rectifier.to_frame().query('group == 1')
    assert df.step.tolist() == [0, 1, 2, 2, 2, 3, 4, 5] and df.event.tolist() == ['skipped', '', '', 'skipped', 'skipped', '', '', '']
    assert (df.effective_lr[df.event == 'skipped'] == 0).all() and (df.effective_lr[df.event == ''] > 0).all()

def test_a_restart_is_marked_behind_a_skipped_step():
    learn = get_learner(RAdam)
    learn.fit(1, .01)
    learn.add_cb(SkipAt(0))
    learn.fit(1, .01, reset_opt=True)
    df = learn.rectifier.to_frame().query('group == 0')
    assert df.event[df.event != ''].tolist() == ['skipped', 'restart'] and df.step[df.event != ''].tolist() == [0, 1]

def test_accumulated_batches_are_no_steps():
    learn = get_learner(RAdam)
    learn.add_cb(GradientAccumulation(8))
    learn.fit(2, .01)
    df = learn.rectifier.to_frame().query('group == 0')
    assert df.step.tolist() == list(range(1, 9)) and df.batch.tolist() == [1, 3, 5, 7]*2

@pytest.mark.parametrize('name', ['RAdam', 'fastai'])
def test_groups_part_when_frozen(name):
    learn = get_learner(opts[name])
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
    learn = get_learner(RAdam, splitter=lambda m: [list(m.parameters())])
    learn.model[0].requires_grad_(False)
    learn.fit(1, .01)
    learn.model[0].requires_grad_(True)
    learn.fit(1, .01)
    df = learn.rectifier.to_frame()
    assert df.step[8:].tolist() == [n for t in range(1, 9) for n in (t, 8+t)]

def test_restarts():
    learn = get_learner(RAdam)
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

def test_leaves_no_rows_elsewhere():
    learn = get_learner(RAdam)
    learn.fit(1, .01)
    rows = len(learn.rectifier.to_frame())
    learn.validate()
    learn.get_preds()
    learn.lr_find(show_plot=False, num_it=10)
    assert len(learn.rectifier.to_frame()) == rows
    learn.fit(1, .01)
    assert len(learn.rectifier.to_frame()) == rows+16

def test_recording_changes_nothing():
    a,b = get_learner(RAdam),get_learner(RAdam)
    b.remove_cb(RectifierRecorder)
    for l in (a, b): l.fit_one_cycle(2, .01)
    assert all(torch.equal(p, q) for p,q in zip(a.model.parameters(), b.model.parameters()))

def test_export_and_csv(tmp_path):
    learn = get_learner(RAdam, path=tmp_path)
    learn.logger,learn.splitter = print,first_and_rest # an exported Learner cannot hold a lambda
    learn.fit(1, .01)
    learn.rectifier.to_csv(tmp_path/'r.csv')
    saved,df = pd.read_csv(tmp_path/'r.csv'),learn.rectifier.to_frame()
    assert list(saved.columns) == list(df.columns)
    pd.testing.assert_frame_equal(saved.drop(columns='event'), df.drop(columns='event'))
    learn.export('l.pkl')
    again = load_learner(tmp_path/'l.pkl')
    pd.testing.assert_frame_equal(again.rectifier.to_frame(), learn.rectifier.to_frame())

def first_and_rest(m): return [list(m[0].parameters()), list(m[1].parameters())]

@pytest.mark.parametrize('opt', [fo.Adam, fo.SGD])
def test_other_optimizers_are_told_what_is_recorded(opt):
    learn = get_learner(opt)
    with pytest.warns(UserWarning, match='does not rectify.*lr, mom and sqr_mom are recorded'): learn.fit(1, .01)
    df = learn.rectifier.to_frame()
    assert len(df) == 16 and df.rect.isna().all() and (df.effective_lr == .01).all() and not df.event.any()

def test_plot():
    learn = get_learner(RAdam)
    learn.fit(1, .01)
    axs = learn.rectifier.plot()
    y = axs[0].lines[0].get_ydata()
    assert np.isnan(y[:5]).all() and y[5] == pytest.approx(plain_rect(6, .99, 5)) and axs[1].get_xlabel() == 'update'

# --- the progress table

def means(df, epoch):
    "Over the adaptive updates"
    df = df[(df.epoch == epoch) & (df.group == 1) & (df.event != 'skipped') & df.rect.notna()]
    return [df.rect.mean(), df.effective_lr.mean()]

@pytest.mark.parametrize('name', opts)
def test_table_has_means_of_each_epoch(name):
    logged = []
    learn = get_learner(opts[name], metrics=lambda x, y: (x-y).abs().mean())
    learn.logger = lambda row: logged.append(list(row))
    learn.add_cb(SkipAt(2))
    learn.fit_one_cycle(3, .01)
    assert list(learn.recorder.metric_names) == ['epoch', 'train_loss', 'valid_loss', '<lambda>', 'rect', 'effective_lr', 'time']
    df = learn.rectifier.to_frame()
    for epoch,(values,row) in enumerate(zip(learn.recorder.values, logged)):
        assert list(values[-2:]) == pytest.approx(means(df, epoch)) and row[-3:-1] == list(values[-2:]) and len(row) == 7
        assert all(type(v) is float for v in values[-2:])

def test_table_of_a_second_fit_is_its_own():
    learn = get_learner(RAdam)
    learn.fit(1, .01)
    learn.fit(1, .02)
    df = learn.rectifier.to_frame()
    assert list(learn.recorder.values[-1][-2:]) == pytest.approx(means(df[16:], 0))

def test_validation_alone_adds_nothing_to_its_values():
    learn = get_learner(RAdam)
    learn.fit(1, .01)
    assert len(learn.validate()) == 1 and len(learn.get_preds()) == 2 and len(learn.validate()) == 1

@pytest.mark.parametrize('opt_func, table', [(fo.Adam, True), (RAdam, False)])
def test_no_columns(opt_func, table):
    learn = get_learner(opt_func)
    learn.rectifier.table = table
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        learn.fit(1, .01)
    assert list(learn.recorder.metric_names) == ['epoch', 'train_loss', 'valid_loss', 'time'] and len(learn.recorder.values[0]) == 2

def test_works_without_fastais_recorder():
    learn = get_learner(RAdam)
    learn.remove_cb(learn.recorder)
    learn.fit(1, .01)
    assert len(learn.rectifier.to_frame()) == 16

def test_csv_logger_has_the_columns(tmp_path):
    learn = get_learner(RAdam, path=tmp_path)
    learn.add_cb(CSVLogger())
    learn.fit(2, .01)
    log = learn.csv_logger.read_log()
    df = learn.rectifier.to_frame()
    assert log[['rect', 'effective_lr']].to_numpy() == pytest.approx(np.array([means(df, e) for e in range(2)]))

# --- loggers

class SeeHypers(Callback):
    order = 51
    def __init__(self): self.seen,self.saved = [],[]
    def after_batch(self):
        if self.training: self.seen.append([dict(h) for h in self.opt.hypers])
    def after_epoch(self): self.saved.append(self.opt.state_dict())

@pytest.mark.parametrize('name', opts)
def test_loggers_see_the_rectifier_in_the_hypers_and_nobody_else(name):
    learn = get_learner(opts[name])
    learn.add_cb(see := SeeHypers())
    names = lambda: [set(h) for h in learn.opt.hypers]
    learn.create_opt()
    before = names()
    learn.fit_one_cycle(2, .01)
    for group in range(2):
        df = learn.rectifier.to_frame().query(f'group == {group}')
        assert [h[group]['effective_lr'] for h in see.seen] == df.effective_lr.tolist()
        assert [h[group].get('rect', math.nan) for h in see.seen] == pytest.approx(df.rect.tolist(), nan_ok=True)
    assert names() == before and not any('effective_lr' in repr(sd.get('hypers', sd.get('param_groups'))) for sd in see.saved)

def test_an_interrupted_fit_leaves_the_hypers_clean_for_the_next():
    class Stop(Callback):
        def after_step(self): raise KeyboardInterrupt
    learn = get_learner(RAdam)
    with pytest.raises(KeyboardInterrupt): learn.fit(1, .01, cbs=(stop := Stop()))
    assert not {'rect', 'effective_lr'} & set(learn.opt.state_dict()['hypers'][0])
    learn.remove_cb(stop)
    learn.fit(1, .01)
    assert not {'rect', 'effective_lr'} & set(learn.opt.hypers[0])

@pytest.mark.parametrize('name', ['RAdam', 'Ranger', 'wrapper', 'fastai', 'ranger'])
def test_tensorboard(name, tmp_path):
    pytest.importorskip('tensorboard')
    from fastai.callback.tensorboard import TensorBoardCallback
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    learn = get_learner(opts[name])
    learn.add_cb(TensorBoardCallback(tmp_path, trace_model=False, log_preds=False))
    learn.fit(2, .01)
    events = EventAccumulator(str(tmp_path)).Reload()
    df = learn.rectifier.to_frame().query('group == 1')
    logged = {tag: [(s.step, s.value) for s in events.Scalars(tag)] for tag in ('rect_1', 'effective_lr_1', 'rect', 'effective_lr')}
    assert [s for s,_ in logged['rect_1']] == list(range(6, 17)) and [s for s,_ in logged['effective_lr_1']] == list(range(1, 17))
    assert [v for _,v in logged['rect_1']] == pytest.approx(df.rect[5:].tolist() if df.index[0] == 0 else df.rect.dropna().tolist())
    assert [v for _,v in logged['effective_lr_1']] == pytest.approx(df.effective_lr.tolist())
    assert [v for _,v in logged['rect']] == pytest.approx([means(df, e)[0] for e in range(2)])
    assert [v for _,v in logged['effective_lr']] == pytest.approx([means(df, e)[1] for e in range(2)])

@pytest.fixture
def wandb(monkeypatch):
    "A stand-in that keeps what is logged"
    fake = types.ModuleType('wandb')
    fake.__spec__,fake.rows = ModuleSpec('wandb', None),[]
    fake.run = types.SimpleNamespace(step=0, summary={})
    fake.config = types.SimpleNamespace(update=lambda *args, **kwargs: None)
    fake.log = lambda row, **kwargs: fake.rows.append(dict(row))
    monkeypatch.setitem(sys.modules, 'wandb', fake)
    yield fake
    sys.modules.pop('fastai.callback.wandb', None)

def wandb_callback(monkeypatch):
    import fastai.callback.wandb as module
    monkeypatch.setattr(module, '_format_config', lambda config: config) # which fails beside fastcore 2.2
    return module.WandbCallback(log=None, log_preds=False, log_model=False)

@pytest.mark.parametrize('name', ['RAdam', 'wrapper', 'torch'])
@pytest.mark.parametrize('bridge', ['WandbCallback', 'LogTo', 'KeepGoing'])
def test_wandb(wandb, monkeypatch, bridge, name):
    learn = get_learner(opts[name])
    learn.add_cb(wandb_callback(monkeypatch) if bridge == 'WandbCallback' else LogTo('wandb') if bridge == 'LogTo' else KeepGoing(LogTo('wandb')))
    learn.fit(2, .01)
    learn.validate()
    learn.lr_find(show_plot=False)
    for group in range(2):
        df = learn.rectifier.to_frame().query(f'group == {group}')
        steps = [r for r in wandb.rows if f'effective_lr_{group}' in r]
        assert [r[f'effective_lr_{group}'] for r in steps] == df.effective_lr.tolist()
        assert [r.get(f'rect_{group}', math.nan) for r in steps] == pytest.approx(df.rect.tolist(), nan_ok=True)
        assert [r['epoch'] for r in steps] == pytest.approx([i/8 for i in range(1, 17)])
    if bridge == 'WandbCallback': assert [r['rect'] for r in wandb.rows if 'rect' in r] == pytest.approx([means(df, e)[0] for e in range(2)])

def without_wandb(monkeypatch): monkeypatch.setattr(callback, 'find_spec', lambda name: None)
def without_run(monkeypatch): sys.modules['wandb'].run = None

@pytest.mark.parametrize('spoil, error, match', [(without_wandb, ImportError, r"pip install 'radam_fastai\[loggers\]'"), (without_run, ValueError, 'call wandb.init'),])
def test_a_logger_that_cannot_log_is_an_error_before_the_first_batch(wandb, monkeypatch, spoil, error, match):
    spoil(monkeypatch)
    for cb in (LogTo('wandb'), KeepGoing(LogTo('wandb'))):
        learn = get_learner(RAdam)
        learn.add_cb(cb)
        unchanged_by_a_failing_fit(learn, error, match)

def test_log_to_refuses_what_is_no_logger():
    with pytest.raises(ValueError, match="'tensorbord'"): LogTo('tensorbord')
    learn = get_learner(RAdam, cbs=[LogTo(print)])
    learn.remove_cb(learn.rectifier)
    with pytest.raises(ValueError, match='add one to the Learner'): learn.fit(1)

# --- the file

def read_rows(path): return pd.read_csv(path, keep_default_na=False, na_values={'rho': '', 'rect': ''})

def same_rows(path, learn): pd.testing.assert_frame_equal(read_rows(path), learn.rectifier.to_frame(), check_dtype=False)

def test_file_has_every_row_at_once(tmp_path):
    class Look(Callback):
        order = 60
        def after_step(self): same_rows(tmp_path/'r.csv', self.learn)
    learn = get_learner(RAdam, path=tmp_path)
    learn.rectifier.csv = 'r.csv'
    learn.add_cbs([SkipAt(0, 3), Look()])
    learn.fit_one_cycle(2, .01)
    learn.fit(1, .01)
    assert len(read_rows(tmp_path/'r.csv')) == 48

KILLED = '''
import os, sys
sys.path.insert(0, {tests!r})
from test_callback import Callback, RAdam, get_learner
class Kill(Callback):
    order = 60
    def after_step(self):
        if self.train_iter == 10: os.kill(os.getpid(), 9)
learn = get_learner(RAdam, path={path!r})
learn.rectifier.csv = 'r.csv'
learn.fit(2, .01, cbs=Kill())
'''

def test_a_killed_run_leaves_its_rows(tmp_path):
    done = subprocess.run([sys.executable, '-c', KILLED.format(tests=str(Path(__file__).parent), path=str(tmp_path))], capture_output=True)
    assert done.returncode == -9
    learn = get_learner(RAdam, path=tmp_path)
    learn.fit(2, .01)
    pd.testing.assert_frame_equal(read_rows(tmp_path/'r.csv'), learn.rectifier.to_frame()[:22], check_dtype=False)

def test_a_file_that_is_there_is_gone_on_with(tmp_path):
    for _ in range(2):
        learn = get_learner(RAdam, path=tmp_path)
        learn.rectifier.csv = 'r.csv'
        learn.fit(1, .01)
        with open(tmp_path/'r.csv', 'a') as f: f.write('0,5,1') # cut short by a crash
    learn.rectifier.csv = None
    check_csv(tmp_path/'r.csv', RectifierRecorder.columns)
    df = read_rows(tmp_path/'r.csv')
    assert len(df) == 32
    pd.testing.assert_frame_equal(df[16:].reset_index(drop=True), learn.rectifier.to_frame(), check_dtype=False)

def unchanged_by_a_failing_fit(learn, error, match):
    before = [p.detach().clone() for p in learn.model.parameters()]
    with pytest.raises(error, match=match): learn.fit(1, .01)
    assert all(map(torch.equal, before, learn.model.parameters())) and not len(learn.rectifier.to_frame())

@pytest.mark.parametrize('make, error, match', [
    (lambda p: p.mkdir(), IsADirectoryError, 'cannot write the rectifier.*r.csv: Is a directory'),
    (lambda p: p.parent.joinpath('sub').write_text(''), OSError, 'cannot write the rectifier'),
    (lambda p: p.write_text('a,b\n1,2\n'), ValueError, "r.csv is there and holds something else than a rectifier's rows: choose another file")])
def test_a_file_that_cannot_be_used_is_an_error_before_the_first_batch(tmp_path, make, error, match):
    make(tmp_path/'r.csv')
    was = (tmp_path/'r.csv').read_text() if (tmp_path/'r.csv').is_file() else None
    learn = get_learner(RAdam, path=tmp_path)
    learn.rectifier.csv = 'sub/r.csv' if (tmp_path/'sub').exists() else 'r.csv'
    unchanged_by_a_failing_fit(learn, error, match)
    assert was is None or (tmp_path/'r.csv').read_text() == was

def test_a_full_disk_costs_no_rows(tmp_path, monkeypatch):
    "Writing fails for a while: one warning, and all rows are in the file when it works again"
    whole,calls = callback.append_whole,[]
    def full(path, data):
        calls.append(data)
        if 3 < len(calls) < 9: raise OSError(errno.ENOSPC, 'No space left on device')
        whole(path, data)
    monkeypatch.setattr(callback, 'append_whole', full)
    learn = get_learner(RAdam, path=tmp_path)
    learn.rectifier.csv = 'r.csv'
    with pytest.warns(UserWarning, match='r.csv cannot be written .No space left on device') as said: learn.fit(2, .01)
    assert sum('cannot be written' in str(w.message) for w in said) == 1
    same_rows(tmp_path/'r.csv', learn)

PARTIAL = '''
import errno, resource, sys
from pathlib import Path
from radam_fastai.callback import append_whole
path = Path(sys.argv[1])
append_whole(path, b'first\\n')
resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))
try: append_whole(path, b'second, too long\\n')
except OSError as e: print(e.errno == errno.ENOSPC)
'''

def test_what_does_not_fit_is_not_written_at_all(tmp_path):
    "The system takes the first four bytes of the second line only"
    done = subprocess.run([sys.executable, '-c', PARTIAL, str(tmp_path/'f')], capture_output=True, text=True)
    assert done.stdout == 'True\n', done.stderr
    assert (tmp_path/'f').read_bytes() == b'first\n'

# --- other callbacks that fail

class Fragile(Callback):
    order = 52
    def __init__(self, event, at): self.event,self.at,self.n = event,at,0
    def __call__(self, event_name):
        if self.run and event_name == self.event:
            self.n += 1
            if self.n == self.at: raise ConnectionError('the server has gone away')
        return super().__call__(event_name)

def test_keep_going():
    learn = get_learner(RAdam)
    learn.add_cb(KeepGoing(cb := Fragile('after_batch', 5)))
    with pytest.warns(UserWarning, match='Fragile failed in after_batch and takes no further part in this fit: the server has gone away'): learn.fit(2, .01)
    assert len(learn.rectifier.to_frame()) == 32 and cb.n == 5
    learn.fit(1, .01)
    assert cb.n == 5+16 # training and validation batches of the next fit

def test_keep_going_does_not_hide_errors_before_the_first_batch_nor_fastais_signals():
    learn = get_learner(RAdam)
    learn.add_cb(KeepGoing(Fragile('before_fit', 1)))
    unchanged_by_a_failing_fit(learn, ConnectionError, 'gone away')
    learn = get_learner(RAdam)
    learn.add_cb(KeepGoing(SkipAt(1)))
    learn.fit(1, .01)
    assert learn.rectifier.to_frame().event.tolist()[2:4] == ['skipped']*2

# --- the learning rate finder

def state_of(learn):
    sd = learn.opt.state_dict()
    return [p.detach().clone() for p in learn.model.parameters()], [{k: v.clone() if torch.is_tensor(v) else v for k,v in s.items()} for s in (sd['state'].values() if isinstance(sd['state'], dict) else sd['state'])], [dict(h) for h in learn.opt.hypers]

@pytest.mark.parametrize('name', opts)
def test_finder_has_the_taken_rate_on_its_axis(name, monkeypatch):
    seen = {}
    def suggest(lrs, losses, num_it):
        seen['lrs'] = lrs
        return float(lrs[3]),(float(lrs[3]), float(losses[3]))
    learn = get_learner(opts[name])
    res = rectified_lr_find(learn, num_it=80, start_lr=1e-5, end_lr=.1, stop_div=False, suggest_funcs=suggest)
    set_to = [1e-5*1e4**(i/80) for i in range(80)]
    expect = [lr*plain_rect(t, .99, 5) for t,lr in enumerate(set_to, 1) if t > 8][:-5]
    assert seen['lrs'].tolist() == pytest.approx(expect, rel=1e-5) and res.suggest == pytest.approx(expect[3])
    ax = plt.gca()
    assert 'lr·$r_t$' in ax.get_xlabel()
    x = ax.lines[0].get_xdata()
    assert np.isnan(x[:5]).all() and x[5:] == pytest.approx([lr*plain_rect(t, .99, 5) for t,lr in enumerate(set_to, 1) if t > 5][:-5], rel=1e-5)
    plt.close('all')

@pytest.mark.parametrize('name', opts)
def test_finder_leaves_everything_as_found(name):
    learn = get_learner(opts[name])
    learn.fit_one_cycle(2, .01)
    model,state,hypers = state_of(learn)
    rows,recorded = learn.rectifier.to_frame(),{k: list(getattr(learn.recorder, k)) for k in ('lrs', 'losses', 'iters', 'values', 'metric_names')}
    rectified_lr_find(learn, show_plot=False)
    model2,state2,hypers2 = state_of(learn)
    assert all(map(torch.equal, model, model2)) and hypers == hypers2 and len(state) == len(state2)
    for a,b in zip(state, state2): assert a.keys() == b.keys() and all(torch.equal(torch.as_tensor(a[k]), torch.as_tensor(b[k])) for k in a)
    pd.testing.assert_frame_equal(rows, learn.rectifier.to_frame())
    assert recorded == {k: list(getattr(learn.recorder, k)) for k in recorded}
    assert not [cb for cb in learn.cbs if type(cb).__name__ == '_TakenLR']

def test_finder_on_a_fresh_learner_leaves_no_optimizer():
    learn = get_learner(RAdam)
    rectified_lr_find(learn, show_plot=False)
    assert learn.opt is None and not hasattr(learn.recorder, 'lrs')

@pytest.mark.parametrize('opt_func, num_it, match', [
    (fo.Adam, 100, 'has no rectifier: use learn.lr_find'),
    (RAdam, 40, 'num_it=40 with sqr_mom=0.99.*use a larger num_it'),
    (partial(RAdam, sqr_mom=.5), 100, 'learn.lr_find, if sqr_mom is too small to rectify')])
def test_finder_refuses(opt_func, num_it, match):
    learn = get_learner(opt_func)
    with pytest.raises(ValueError, match=match): rectified_lr_find(learn, num_it=num_it)
    assert learn.opt is None and not len(learn.rectifier.to_frame())

# --- figures

def test_plot_tells_late_parameters_restarts_and_skips_apart():
    learn = get_learner(RAdam, splitter=lambda m: [list(m.parameters())])
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
    assert list(lines['group 0'].get_xdata()) == list(range(1, 25)) and list(lines['group 0, joined later'].get_xdata()) == list(range(9, 17))
    assert lines['group 0'].get_ydata()[5] == pytest.approx(plain_rect(6, .99, 5))
    assert 17 in [l.get_xdata()[0] for l in ax.lines if l.get_linestyle() == ':']
    assert [list(l.get_xdata()) for l in ax.lines if l.get_marker() == 'x' and len(l.get_xdata())] == [[12, 20], [12]]
    plt.close('all')

def test_plots_draw_into_the_axes_they_are_given():
    learn = get_learner(RAdam)
    learn.fit(1, .01)
    _,axs = plt.subplots(1, 2)
    assert learn.rectifier.plot(axs) is axs and axs[1].lines and axs[1].get_ylabel()
    plt.close('all')
