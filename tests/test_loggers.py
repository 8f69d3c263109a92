"""What loggers are shown, and nobody else: TensorBoard, Weights & Biases and any tracker; callbacks that fail."""
import copy
import json
import math
import pickle
import re
import sys
import types
import warnings
from functools import partial
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
import torch
from fastai.basics import Callback, CancelBatchException, CancelEpochException, CancelFitException, CancelTrainException, load_learner
from fastai.callback.all import CSVLogger, FetchPredsCallback, ShortEpochCallback

from helpers import At, Raise, SkipAt, means, opts, recorded_learner, state_of, unchanged_by_a_failing_fit
from radam_fastai import loggers
from radam_fastai.guard import load_strict
from radam_fastai.introspect import updates_made
from radam_fastai.loggers import FailSafe, LogRectifier
from radam_fastai.optimizer import RAdam
from radam_fastai.torch_optim import RAdamWrapper

class SeeHypers(Callback):
    order = 51
    def __init__(self): self.seen,self.saved = [],[]
    def after_batch(self):
        if self.training: self.seen.append(list(self.opt.hypers.map(dict))) # `map`: they are an `L`, as without a recorder
    def after_epoch(self): self.saved.append(self.opt.state_dict())

@pytest.mark.parametrize('name', opts)
def test_loggers_see_the_rectifier_in_the_hypers_and_nobody_else(name):
    learn = recorded_learner(opts[name])
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

class SaveEachBatch(Callback):
    def after_batch(self): self.learn.save('within')

ends = {'short epochs': lambda: ShortEpochCallback(pct=.5), **{f'{e.__name__} in {event}, order {order}': partial(Raise, e, event, order)
        for e in (CancelBatchException, CancelTrainException, CancelEpochException, CancelFitException, KeyboardInterrupt, OSError)
        for event,order in (('after_step', 0), ('after_batch', 0), ('after_batch', 99))
        if (e, event) != (CancelBatchException, 'after_batch')}}

def clean(learn): return not any({'rect', 'effective_lr'} & set(h) for h in learn.opt.hypers)

@pytest.mark.many
@pytest.mark.parametrize('end, name', [(end, 'RAdam') for end in ends] + [('short epochs', name) for name in opts if name != 'RAdam'])
def test_nothing_that_loggers_see_is_ever_saved(end, name, tmp_path):
    "However a batch ends: `save`, `load`, `load_strict`, `lr_find` and `export` are as without a recorder"
    learn = recorded_learner(opts[name], cbs=[ends[end](), SaveEachBatch(), SeeHypers()], path=tmp_path)
    learn.logger = print
    try: learn.fit(3, .01)
    except (KeyboardInterrupt, OSError): pass
    assert 'effective_lr' in learn.see_hypers.seen[-1][0] # a logger saw it
    assert clean(learn) and type(learn.opt) is type(get_opt(name, learn))
    for cb in (Raise, ShortEpochCallback, SaveEachBatch, SeeHypers): learn.remove_cb(cb)
    learn.save('after')
    for file in ('within', 'after'):
        sd = torch.load(tmp_path/'models'/f'{file}.pth', weights_only=False)['opt']
        assert not any({'rect', 'effective_lr'} & set(h) for h in sd.get('hypers', sd.get('param_groups')))
        with warnings.catch_warnings():
            warnings.filterwarnings('error', 'Could not load')
            learn.load(file)
            load_strict(learn, file)
    before = copy.deepcopy(state_of(learn)[1])
    learn.lr_find(show_plot=False, num_it=10)
    for a,b in zip(before, state_of(learn)[1]): assert all(torch.equal(torch.as_tensor(a[k]), torch.as_tensor(b[k])) for k in a)
    learn.export('l.pkl')
    load_learner(tmp_path/'l.pkl')
    learn.fit(1, .01)
    assert clean(learn)

def get_opt(name, learn): return opts[name](learn.splitter(copy.deepcopy(learn.model)), lr=.1)

@pytest.mark.parametrize('name', opts)
def test_files_that_carry_the_numbers_are_read(name, tmp_path):
    "As an earlier version left them behind a cancelled batch"
    learn = recorded_learner(opts[name], path=tmp_path)
    learn.fit(2, .01)
    learn.save('good')
    sd = torch.load(tmp_path/'models'/'good.pth', weights_only=False)
    for h in sd['opt'].get('hypers', sd['opt'].get('param_groups')): h.update(rect=.3, effective_lr=.003)
    torch.save(sd, tmp_path/'models'/'old.pth')
    for load in (lambda learn: learn.load('old'), lambda learn: load_strict(learn, 'old')):
        again,whole = (recorded_learner(opts[name], path=tmp_path) for _ in range(2))
        for l in (again, whole): l.create_opt()
        with warnings.catch_warnings():
            warnings.filterwarnings('error', 'Could not load')
            load(again)
        whole.load('good')
        for l in (again, whole): l.fit(1, .01)
        assert clean(again) and updates_made(again.opt) == 24
        assert all(map(torch.equal, again.model.parameters(), whole.model.parameters()))

@pytest.mark.parametrize('name', ['RAdam', 'Ranger', 'wrapper', 'fastai', 'ranger'])
def test_what_a_callback_sets_behind_a_batch_is_set(name):
    class Halve(Callback):
        def after_batch(self):
            if not self.training or self.train_iter != 4: return
            for h in self.opt.hypers: h['lr'] /= 2
            self.opt.set_hyper('wd', .125)
    learn = recorded_learner(opts[name], cbs=[Halve()])
    learn.fit(1, .01)
    assert [h['lr'] for h in learn.opt.hypers] == [.005]*2 and [h['wd'] for h in learn.opt.hypers] == [.125]*2
    assert learn.rectifier.to_frame().query('group == 1').lr.tolist() == [.01]*4 + [.005]*4

@pytest.mark.parametrize('error', [CancelBatchException, CancelTrainException, CancelEpochException, CancelFitException])
def test_a_row_is_kept_though_another_callback_cancels_what_follows(error):
    learn = recorded_learner(RAdam, cbs=[Raise(error, 'after_step')])
    learn.fit(2, .01)
    df = learn.rectifier.to_frame().query('group == 0')
    n = 16 if error is CancelBatchException else 12
    assert df.step.tolist() == list(range(1, n+1)) and not df.event.any()

@pytest.mark.parametrize('cancel', [lambda: Raise(CancelBatchException, 'before_step', 99), lambda: FirstStep()])
def test_a_batch_that_is_cancelled_before_its_step_has_no_row(cancel):
    learn = recorded_learner(RAdam, cbs=[cancel()])
    learn.fit(2, .01)
    df = learn.rectifier.to_frame().query('group == 0')
    assert df.step.tolist() == list(range(1, 16)) and not df.event.any()

class FirstStep(Callback):
    order = 99
    def before_step(self):
        if not self.train_iter: raise CancelBatchException

def test_the_table_with_predictions_fetched():
    "As WandbCallback does at the end of each epoch, inside its validation"
    learn = recorded_learner(RAdam, cbs=[FetchPredsCallback()])
    learn.fit(2, .01)
    assert [len(v) for v in learn.recorder.values] == [4]*2 and len(learn.rectifier.to_frame()) == 32

def test_hypers_that_are_shown_can_be_copied():
    "By another callback, at the end of a batch"
    copies = []
    def copied(learn): copies.extend([copy.deepcopy(learn.opt.hypers), pickle.loads(pickle.dumps(learn.opt.hypers))])
    for opt_func in RAdam, RAdamWrapper: recorded_learner(opt_func, cbs=[At('after_batch', copied)]).fit(1, .01)
    assert copies and all({'lr','effective_lr'} <= {*h} and type(h) is dict for hypers in copies[2:] for h in hypers)

@pytest.mark.parametrize('when', [0, 1])
def test_a_csv_logger_that_cannot_write(when, tmp_path):
    "It writes through the `Learner`'s logger; the table goes on, in this fit and in the next"
    class Full(CSVLogger):
        def _write_line(self, log):
            if self.epoch == when and len(seen) == when: raise OSError('disk full')
            super()._write_line(log)
    learn,seen = recorded_learner(RAdam, cbs=[FailSafe(Full(tmp_path/'log.csv'))]),[]
    learn.logger = seen.append
    with pytest.warns(UserWarning, match='Full failed to log a row .* disk full'): learn.fit(3, .01)
    learn.fit(3, .01)
    assert [row[0] for row in seen] == [0,1,2]*2

@pytest.mark.parametrize('name', ['RAdam', 'Ranger', 'wrapper', 'fastai', 'ranger'])
def test_tensorboard(name, tmp_path):
    pytest.importorskip('tensorboard')
    from fastai.callback.tensorboard import TensorBoardCallback
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    learn = recorded_learner(opts[name])
    learn.add_cb(TensorBoardCallback(tmp_path, trace_model=False, log_preds=False))
    learn.fit(2, .01)
    events = EventAccumulator(str(tmp_path)).Reload()
    df = learn.rectifier.to_frame().query('group == 1')
    logged = {tag: [(s.step, s.value) for s in events.Scalars(tag)] for tag in ('rect_1', 'effective_lr_1', 'rect', 'effective_lr')}
    assert [s for s,_ in logged['rect_1']] == list(range(6, 17)) and [s for s,_ in logged['effective_lr_1']] == list(range(1, 17))
    assert [v for _,v in logged['rect_1']] == pytest.approx(df.rect.dropna().tolist())
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

@pytest.mark.many
@pytest.mark.parametrize('name', ['RAdam', 'wrapper', 'torch'])
@pytest.mark.parametrize('bridge', ['WandbCallback', 'LogRectifier', 'FailSafe'])
def test_wandb(wandb, monkeypatch, bridge, name):
    learn = recorded_learner(opts[name])
    learn.add_cb(wandb_callback(monkeypatch) if bridge == 'WandbCallback' else LogRectifier('wandb') if bridge == 'LogRectifier'
                 else FailSafe(LogRectifier('wandb')))
    learn.fit(2, .01)
    learn.validate()
    learn.lr_find(show_plot=False)
    for group in range(2):
        df = learn.rectifier.to_frame().query(f'group == {group}')
        steps = [r for r in wandb.rows if f'effective_lr_{group}' in r]
        assert [r[f'effective_lr_{group}'] for r in steps] == df.effective_lr.tolist()
        assert [r.get(f'rect_{group}', math.nan) for r in steps] == pytest.approx(df.rect.tolist(), nan_ok=True)
        assert [r['epoch'] for r in steps] == pytest.approx([i/8 for i in range(1, 17)])
    if bridge == 'WandbCallback':
        assert [r['rect'] for r in wandb.rows if 'rect' in r] == pytest.approx([means(df, e)[0] for e in range(2)])

def without_wandb(monkeypatch): monkeypatch.setattr(loggers, 'find_spec', lambda name: None)
def without_run(monkeypatch): sys.modules['wandb'].run = None

@pytest.mark.parametrize('spoil, error, match',
                         [(without_wandb, ImportError, r"pip install 'radam_fastai\[loggers\]'"),
                          (without_run, ValueError, 'call wandb.init'),])
def test_a_logger_that_cannot_log_is_an_error_before_the_first_batch(wandb, monkeypatch, spoil, error, match):
    spoil(monkeypatch)
    for cb in (LogRectifier('wandb'), FailSafe(LogRectifier('wandb'))):
        learn = recorded_learner(RAdam)
        learn.add_cb(cb)
        unchanged_by_a_failing_fit(learn, error, match)

def test_log_to_refuses_what_is_no_logger():
    with pytest.raises(ValueError, match="'tensorbord'"): LogRectifier('tensorbord')
    learn = recorded_learner(RAdam, cbs=[LogRectifier(print)])
    learn.remove_cb(learn.rectifier)
    with pytest.raises(ValueError, match='add one to the Learner'): learn.fit(1)

def lines_for_trackers():
    "The lines that the notebook shows, by tracker"
    cells = json.loads((Path(__file__).parents[1]/'nbs'/'11_loggers.ipynb').read_text())['cells']
    text = next(t for t in (''.join(c['source']) for c in cells) if t.startswith('```python\nLogRectifier('))
    return {name: code for code,name in re.findall(r'^(LogRectifier.*?)  +# (.*)$', text, re.M)}

def stand_ins(learn):
    "Modules and objects with the signatures of packages that are not installed: what each was sent"
    sent = {k: [] for k in ('MLflow', 'Trackio', 'Comet')}
    class Mlflow:
        def log_metrics(self, metrics, step=None, synchronous=None, run_id=None, timestamp=None): sent['MLflow'].append(metrics)
    class Trackio:
        def log(self, metrics, step=None): sent['Trackio'].append(metrics)
    class Experiment:
        def log_metrics(self, dic, prefix=None, step=None, epoch=None): sent['Comet'].append(dic)
    return sent,dict(mlflow=Mlflow(), trackio=Trackio(), experiment=Experiment(), learn=learn, LogRectifier=LogRectifier)

@pytest.mark.parametrize('tracker', ['Weights & Biases', 'MLflow', 'Trackio', 'Comet', 'TensorBoard'])
def test_the_line_for_each_tracker(tracker, wandb, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter  # TensorBoard is there; the others are stand-ins
    learn = recorded_learner(RAdam)
    sent,names = stand_ins(learn)
    learn.add_cb(eval(lines_for_trackers()[tracker], names | dict(writer=(writer := SummaryWriter(tmp_path)))))
    learn.fit(2, .01)
    writer.close()
    df = learn.rectifier.to_frame().query('group == 1')
    if tracker == 'TensorBoard': got = [(e.step, e.value) for e in EventAccumulator(str(tmp_path)).Reload().Scalars('effective_lr_1')]
    else: got = list(enumerate((r['effective_lr_1'] for r in (wandb.rows if tracker == 'Weights & Biases' else sent[tracker])), 1))
    assert [i for i,_ in got] == list(range(1, 17)) and [v for _,v in got] == pytest.approx(df.effective_lr.tolist())

def test_there_is_a_line_for_each_tracker():
    assert list(lines_for_trackers()) == ['Weights & Biases', 'MLflow', 'Trackio', 'Comet', 'TensorBoard']

def test_a_tracker_that_fails_does_not_end_the_fit():
    sent = []
    def fail(row):
        sent.append(row)
        if len(sent) == 3: raise ConnectionError('gone away')
    learn = recorded_learner(RAdam, cbs=[LogRectifier(fail)])
    with pytest.warns(UserWarning, match='LogRectifier failed in after_batch and takes no further part in this fit: gone away'):
        learn.fit(2, .01)
    assert len(sent) == 3 and len(learn.rectifier.to_frame()) == 32
    learn.fit(1, .01)
    assert len(sent) == 3+8

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
    learn = recorded_learner(RAdam)
    learn.add_cb(FailSafe(cb := Fragile('after_batch', 5)))
    with pytest.warns(UserWarning, match='Fragile failed in after_batch and takes no further part in this fit: the server has gone away'):
        learn.fit(2, .01)
    assert len(learn.rectifier.to_frame()) == 32 and cb.n == 5
    learn.fit(1, .01)
    assert cb.n == 5+8+1 # training and validation batches of the next fit

def test_only_a_fit_needs_a_tracker(wandb):
    "Validation, predictions and the learning rate finder log nothing"
    learn = recorded_learner(RAdam, cbs=[LogRectifier('wandb')])
    wandb.run = None
    learn.validate()
    learn.get_preds()
    learn.lr_find(show_plot=False, num_it=10)
    assert wandb.rows == []
    with pytest.raises(ValueError, match='call wandb.init'): learn.fit(1, .01)

def test_a_wrapped_callback_is_where_it_would_be(tmp_path):
    learn = recorded_learner(RAdam, path=tmp_path, cbs=[FailSafe(CSVLogger())])
    learn.fit(1, .01)
    assert len(learn.csv_logger.read_log()) == 1
    learn.remove_cb(learn.csv_logger)
    assert not hasattr(learn, 'csv_logger')

def test_a_failed_callback_takes_part_in_the_fit_after_an_interrupted_one():
    learn = recorded_learner(RAdam)
    def interrupt(learn): raise KeyboardInterrupt
    learn.add_cb(FailSafe(cb := Fragile('after_batch', 5)))
    with pytest.warns(UserWarning, match='Fragile failed'), pytest.raises(KeyboardInterrupt):
        learn.fit(2, .01, cbs=At('after_train', interrupt))
    learn.fit(1, .01)
    assert cb.n == 5+8+1

def test_keep_going_does_not_hide_errors_before_the_first_batch_nor_fastais_signals():
    learn = recorded_learner(RAdam)
    learn.add_cb(FailSafe(Fragile('before_fit', 1)))
    unchanged_by_a_failing_fit(learn, ConnectionError, 'gone away')
    learn = recorded_learner(RAdam)
    learn.add_cb(FailSafe(SkipAt(1)))
    learn.fit(1, .01)
    assert learn.rectifier.to_frame().event.tolist()[2:4] == ['skipped']*2
