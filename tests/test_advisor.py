"""The advisor's numbers against r_t on the step counts of runs that were really made, and its advice for each way to go wrong."""
import math
import re
import warnings
from functools import partial

import fastai.optimizer as fo
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from fastai.basics import DataLoaders, Learner, OptimWrapper
from fastai.callback.all import GradientAccumulation, ProgressCallback, SchedCos
from torch import nn

from helpers import Data, plain_rect
from radam_fastai.advisor import WarmupAdvisor, schedule_shape, steps_to, warmup_report
from radam_fastai.baselines import Adam2kFn, SGDFn
from radam_fastai.introspect import find_rectifier
from radam_fastai.optimizer import RAdam, RAdamFn, Ranger, reference_settings
from radam_fastai.recorder import RectifierRecorder
from radam_fastai.torch_optim import RAdamWrapper

def rects(n, sqr_mom, threshold=5, start=0): return [plain_rect(t, sqr_mom, threshold) or 0. for t in range(start+1, start+n+1)]

@pytest.mark.parametrize('sqr_mom', [.9, .99, .999])
@pytest.mark.parametrize('n, start', [(735, 0), (100, 0), (10, 0), (735, 300), (1, 5)])
def test_report(sqr_mom, n, start):
    report,r = warmup_report(sqr_mom, n, start=start),rects(n, sqr_mom, start=start)
    far = rects(5000, sqr_mom)
    assert report.mean == pytest.approx(np.mean(r)) and report.r.tolist() == pytest.approx(r) and report.n_steps == n
    assert report.first_adaptive == next(t for t,x in enumerate(far, 1) if x)
    assert report.steps_to_full == next(t for t,x in enumerate(far, 1) if x > .9)
    for share in (.1, .5): assert report.at(share) == pytest.approx(r[max(1, int(np.ceil(n*share)))-1])

def test_published_means():
    assert (round(warmup_report(.99, 735).mean, 3), round(warmup_report(.999, 735).mean, 3)) == (.855, .385)

p = lambda: [nn.Parameter(torch.ones(2))]

@pytest.mark.parametrize('opt, sqr_mom, threshold', [
    (lambda: RAdam(p(), .1, **reference_settings['paper']), .999, 4), (lambda: Ranger(p(), .1, sqr_mom=.9), .9, 5),
    (lambda: RAdamWrapper(p(), betas=(.9, .98)), .98, 5),
    (lambda: fo.Lookahead(RAdam(p(), .1, sqr_mom=.9, threshold=4)), .9, 4), (lambda: fo.RAdam(p(), .1), .99, 5),
    (lambda: fo.ranger(p(), .1), .99, 5), (lambda: OptimWrapper(p(), torch.optim.RAdam), .999, 5)])
def test_report_reads_the_optimizer(opt, sqr_mom, threshold):
    report = warmup_report(opt(), 50)
    assert report.sqr_mom == sqr_mom and report.r.tolist() == pytest.approx(rects(50, sqr_mom, threshold))

@pytest.mark.parametrize('sqr_mom, n, schedule, match', [
    (.5, 1000, None, r"sqr_mom=0.5 never rectifies \(rho_inf is 3\): every update is momentum SGD's.*or a learning rate meant for SGD"),
    (2/3, 1000, None, 'never rectifies'),
    (.999, 735, None, r'r_t is still 0.57 when the run ends.*Use sqr_mom=0.99 \(above 0.9 from update 277 on\) or a longer run'),
    (.99, 5, None, r"The run ends before its first adaptive update \(update 6\): every update is momentum SGD's. Use .*a longer run"),
    (.99, 735, 'one_cycle', 'warms up over 184 updates while the rectifier does: together they leave 0.35')])
def test_advice(sqr_mom, n, schedule, match):
    advice = warmup_report(sqr_mom, n, schedule).advice
    assert len(advice) == 1 and re.search(match, advice[0]) and advice[0] in str(warmup_report(sqr_mom, n, schedule))

@pytest.mark.parametrize('opt, match', [
    (partial(RAdam, sqr_mom=.5, sgd_phase='skip'), r'sqr_mom=0.5 never rectifies .*: no update moves the weights. Use .*such as .99.$'),
    (Adam2kFn, r'ends before its first adaptive update \(update 2,001\): no update moves the weights'),
    (SGDFn, r"^This optimizer never rectifies: every update is momentum SGD's.$")], ids=['skip', 'waits', 'SGD'])
def test_advice_knows_what_an_update_without_a_factor_is(opt, match):
    report = warmup_report(opt, 735)
    assert len(report.advice) == 1 and re.search(match, report.advice[0])
    assert f"mean r_t                {find_rectifier(opt([nn.Parameter(torch.ones(1))], lr=.1)).sgd_phase}" in str(report)

def test_double_warmup_in_numbers():
    "The share that one-cycle and r_t leave together, from both written out"
    share = (1-np.cos(np.pi*np.arange(184)/735/.25))/2*.96 + .04
    assert np.mean(share*rects(184, .99)) == pytest.approx(.35, abs=.005)

@pytest.mark.parametrize('sqr_mom, n, schedule, start',
                         [(.99, 735, None, 0), (.99, 735, 'flat_cos', 0), (.9, 735, lambda pct: 1-pct, 0), (.99, 735, 'one_cycle', 300)])
def test_nothing_to_advise(sqr_mom, n, schedule, start): assert warmup_report(sqr_mom, n, schedule, start).advice == []

@pytest.mark.parametrize('args, error, match', [
    ((1.,10), ValueError, r'\[0, 1\), got 1.0'), ((.99,0), ValueError, 'n_steps must be a whole number of at least 1, got 0'),
    ((.99,1.5), ValueError, 'got 1.5'), ((.99,735.), ValueError, 'got 735.0'), ((.99,math.inf), ValueError, 'n_steps .* got inf'),
    ((.99,10,None,1.5), ValueError, 'start must be a whole number of at least 0, got 1.5'),
    ((.99,10,None,-5), ValueError, 'start .* got -5'),
    ((.99,10,'cosine'), ValueError, "constant, flat_cos, one_cycle, got 'cosine'"),
    ((fo.Adam(p(), .1),10), ValueError, 'has no rectifier')])
def test_bad_input(args, error, match):
    with pytest.raises(error, match=match): warmup_report(*args)

def test_steps_to_is_the_first():
    for b in (.7, .9, .99, .999):
        how,far = find_rectifier(RAdam(p(), .1)),rects(6000, b)
        for share in (0., .3, .9): assert steps_to(how, b, share) == next((t for t,x in enumerate(far, 1) if x > share), None)
    assert steps_to(how, .6, 0.) is None

def test_schedule_shape():
    assert schedule_shape('flat_cos', 100)[[0, 74]].tolist() == [1, 1] and schedule_shape('flat_cos', 100)[-1] < .01
    assert schedule_shape(SchedCos(2., 0.), 4).tolist() == pytest.approx([(1+np.cos(np.pi*i/4))/2 for i in range(4)])
    assert schedule_shape(lambda pct: 0., 3).tolist() == [0, 0, 0]

def test_plot():
    report = warmup_report(.99, 200, 'one_cycle')
    _,ax = plt.subplots()
    assert report.plot(ax) is ax
    lines = {l.get_label(): l.get_ydata() for l in ax.lines}
    assert lines['rectifier $r_t$'][5:].tolist() == pytest.approx(rects(200, .99)[5:]) and np.isnan(lines['rectifier $r_t$'][:5]).all()
    assert lines['untuned linear'].tolist() == pytest.approx([min(1, t/200) for t in range(1, 201)])
    assert lines['untuned exponential'].tolist() == pytest.approx([1-np.exp(-t/100) for t in range(1, 201)])
    assert lines['schedule · $r_t$'][5:].tolist() == pytest.approx((report.schedule*rects(200, .99))[5:].tolist())
    plt.close('all')

# --- before a fit

def get_learner(opt_func, n=64, **kwargs):
    ds = Data((torch.randn(4), torch.randn(2)) for _ in range(n))
    learn = Learner(DataLoaders.from_dsets(ds, ds, bs=4, device='cpu', num_workers=0), nn.Linear(4, 2), loss_func=nn.MSELoss(),
                    opt_func=opt_func,
                    cbs=[WarmupAdvisor(), RectifierRecorder(), *kwargs.pop('cbs', [])], **kwargs)
    learn.remove_cb(ProgressCallback)
    learn.logger = lambda *_: None
    return learn

def said(capsys, f):
    with warnings.catch_warnings(record=True) as ws:
        warnings.simplefilter('always')
        f()
    return capsys.readouterr().out, [str(w.message)
                                     for w in ws if 'r_t' in str(w.message) or 'warms up' in str(w.message) or 'SGD' in str(w.message)]

def test_advisor_with_pytorchs_loaders(capsys):
    learn = get_learner(RAdam, cbs=[GradientAccumulation(8)])
    learn.dls = DataLoaders(*[torch.utils.data.DataLoader(dl.dataset, batch_size=4) for dl in learn.dls.loaders])
    assert 'over 8 updates\n' in said(capsys, lambda: learn.fit(1, .01))[0]

@pytest.mark.parametrize('cbs, per_epoch', [([], 16), ([GradientAccumulation(8)], 8), ([GradientAccumulation(6)], 8)])
def test_advisor_knows_how_many_updates_there_will_be(capsys, cbs, per_epoch):
    learn = get_learner(RAdam, cbs=cbs)
    out,_ = said(capsys, lambda: learn.fit(3, .01))
    df = learn.rectifier.to_frame()
    assert len(df) == 3*per_epoch and f'over {len(df)} updates\n' in out
    assert f'mean r_t                {df.rect.fillna(0).mean():.3f}' in out

def test_advisor_knows_the_schedule(capsys):
    learn = get_learner(partial(RAdam, sqr_mom=.9))
    out,ws = said(capsys, lambda: learn.fit_one_cycle(4, .01))
    assert ws == [] and out.count('warms up over 16 updates') == 1 # printed, and not said again as a warning
    assert '→' not in said(capsys, lambda: get_learner(partial(RAdam, sqr_mom=.9)).fit_flat_cos(4, .01))[0]

def test_advisor_leaves_out_the_epochs_that_are_skipped(capsys):
    learn = get_learner(partial(RAdam, sqr_mom=.9))
    out,_ = said(capsys, lambda: learn.fit_one_cycle(4, .01, pct_start=.75, start_epoch=2))
    df = learn.rectifier.to_frame()
    assert len(df) == 32 and 'over 32 updates' in out and f'warms up over {df.lr.idxmax()} updates' in out

def test_advisor_goes_on_from_the_last_fit_and_speaks_once_a_fit(capsys):
    learn = get_learner(RAdam)
    said(capsys, lambda: learn.fit(2, .01))
    out,_ = said(capsys, lambda: learn.fit(2, .01))
    assert out.count('rectifier with sqr_mom=0.99 over 32 updates (after 32)') == 1
    df = learn.rectifier.to_frame()
    assert f'mean r_t                {df.rect[32:].mean():.3f}' in out

def test_advisor_is_silent_outside_fits(capsys):
    learn = get_learner(RAdam)
    def others():
        learn.lr_find(show_plot=False, num_it=10)
        learn.validate()
        learn.get_preds()
    assert 'rectifier' not in said(capsys, others)[0]

def test_advisor_and_other_optimizers(capsys):
    out,ws = said(capsys, lambda: get_learner(fo.Adam).fit(1, .01))
    assert 'has no rectifier, nothing to advise' in out

def test_the_schedule_of_several_groups_is_that_of_the_last():
    assert schedule_shape(lambda pct: np.array([1-pct, 2.]), 4).tolist() == [1, 1, 1, 1]

# --- what it takes, and what it says

@pytest.mark.parametrize('opt_func, sqr_mom',
                         [(RAdamFn, .99), (RAdam, .99), (partial(RAdam, sqr_mom=.9), .9),
                          (partial(OptimWrapper, opt=torch.optim.RAdam), .999),
                                               (partial(RAdamWrapper, betas=(.9, .98)), .98), (fo.ranger, .99)])
def test_report_takes_what_a_learner_takes(opt_func, sqr_mom):
    "An `opt_func`, a Learner before its first fit, and one after it"
    learn,want = get_learner(opt_func),warmup_report(sqr_mom, 500)
    for o in (opt_func, learn, learn.create_opt() or learn, learn.opt):
        report = warmup_report(o, 500)
        assert str(report) == str(want) and report.r.tolist() == pytest.approx(want.r.tolist())

@pytest.mark.parametrize('opt, match', [(fo.Adam, 'Optimizer has no rectifier'),
                                        (lambda: get_learner(fo.SGD), 'Optimizer has no rectifier')])
def test_report_refuses_what_has_none(opt, match):
    with pytest.raises(ValueError, match=match): warmup_report(opt if opt is fo.Adam else opt(), 10)

def test_momentum_is_called_that():
    "Its updates take the whole learning rate, as SGD's"
    report = warmup_report(.99, 5)
    assert 'mean r_t                momentum' in str(report) and "every update is momentum SGD's" in report.advice[0]
    report = warmup_report(.99, 40)
    assert 'r_t at 10 % of the run  momentum' in str(report)
    assert 'no adaptive update takes the whole of the learning rate' in report.advice[0]
    r = [x for x in rects(40, .99) if x]
    assert report.adaptive_mean == pytest.approx(np.mean(r)) and f'over the adaptive updates {np.mean(r):.3f}' in str(report)
    assert not any('never used' in o for b in (.5, .99, .999) for o in warmup_report(b, 40, 'one_cycle').advice)

def test_fine_tune_is_seen_coming(capsys):
    "While the body is frozen, once; not when all is trained"
    learn = get_learner(RAdam, splitter=lambda m: [[m.weight], [m.bias]])
    learn.freeze()
    learn.fit(1, .01)
    assert capsys.readouterr().out.count('Part of the model is frozen') == 1
    learn.unfreeze()
    learn.fit(1, .01)
    assert 'frozen' not in capsys.readouterr().out
