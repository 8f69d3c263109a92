"""The recorder's rows against the updates that the parameters really made, and against the formula on independent counts."""
import math
from functools import partial

import fastai.optimizer as fo, numpy as np, pandas as pd, pytest, torch
from fastai.basics import Callback, CancelStepException, DataLoaders, Learner, OptimWrapper, load_learner
from fastai.callback.all import GradientAccumulation, ProgressCallback
from torch import nn

from radam_fastai.callback import RectifierRecorder
from radam_fastai.optimizer import RAdam, Ranger, reference_settings
from radam_fastai.torch_optim import RAdamWrapper
from reference import plain_rect

class Data(list):
    def new_empty(self): return Data()

def get_learner(opt_func, n=32, splitter=lambda m: [list(m[0].parameters()), list(m[1].parameters())], **kwargs):
    torch.manual_seed(0)
    ds = Data((torch.randn(4), torch.randn(2)) for _ in range(n))
    dls = DataLoaders.from_dsets(ds, ds, bs=4, shuffle=False, num_workers=0, device='cpu')
    learn = Learner(dls, nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), loss_func=nn.MSELoss(), opt_func=opt_func, splitter=splitter,
                    cbs=RectifierRecorder(), train_bn=False, **kwargs)
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

def test_restart_and_jump():
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
    assert df.event[df.event != ''].to_dict() == {8: 'restart', 16: 'jump'} and df.step[16] == 101

def test_leaves_no_rows_elsewhere():
    learn = get_learner(RAdam)
    learn.fit(1, .01)
    rows = list(learn.rectifier.rows)
    learn.validate()
    learn.get_preds()
    learn.lr_find(show_plot=False, num_it=10)
    assert learn.rectifier.rows == rows
    learn.fit(1, .01)
    assert len(learn.rectifier.rows) == len(rows)+16

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
