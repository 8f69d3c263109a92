"""What the test files share: definitions to compare with, a small Learner, jobs in processes of their own, and the sums of the attacks."""
import copy
import io
import math
import os
import pickle
import re
import runpy
import struct
import sys
import tarfile
import traceback
import warnings
import zlib
from collections import Counter
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path

import fastai.optimizer as fo
import pytest
import torch
import torch.nn.functional as F
from fastai.basics import Callback, CancelStepException, DataLoaders, L, Learner, OptimWrapper, noop, params as fastai_params
from fastai.callback.all import ProgressCallback
from torch import nn

from radam_fastai.functional import radam_reference
from radam_fastai.optimizer import RAdam, Ranger
from radam_fastai.recipes import demo
from radam_fastai.recipes.checkpoint import load_checkpoint
from radam_fastai.recipes.cli import OptionError
from radam_fastai.recipes.jobs import Run, run_job
from radam_fastai.recipes.precision import DevicePrecision
from radam_fastai.recipes.records import read_records
from radam_fastai.recorder import RectifierRecorder
from radam_fastai.torch_optim import RAdamWrapper

def stable(o):
    "`o` as the name of a test, the same in all processes"
    return re.sub(r' at 0x\w+', '', str(o))

# ---- how hard the attacks are, and what became of them

FULL = bool(os.environ.get('RADAM_FULL')) # everything, instead of what fits into every test run
tally = Counter() # (what was tried, how it ended) → how often

def summary():
    "A line for each kind of attack"
    for kind in dict.fromkeys(k for k,_ in tally):
        ends = {end: n for (k,end),n in tally.items() if k == kind}
        yield f"{kind}: {sum(ends.values()):,} tried; " + ', '.join(f'{n:,} {end}' for end,n in ends.items())

# ---- the definitions, in float64, one tensor at a time

def plain_rect(step, sqr_mom, threshold):
    "r_t as the paper writes it, or None"
    r_inf = 2/(1-sqr_mom) - 1
    r = r_inf - 2*step*sqr_mom**step/(1-sqr_mom**step)
    return math.sqrt((r-4)*(r-2)*r_inf/((r_inf-4)*(r_inf-2)*r)) if r > threshold else None

def plain_step(p, g, state, *, lr, mom, sqr_mom, eps, wd=0., beta=0., decouple_wd=True, threshold=5, eps_debiased=True,
               sgd_phase='momentum', maximize=False):
    "The new value of `p` after one update with gradient `g`; `state` (m, v, t) moves along"
    if maximize: g = -g
    if not decouple_wd: g,wd = g + wd*p,0.
    m,v,t = state.get('m', torch.zeros_like(p)),state.get('v', torch.zeros_like(p)),state.get('t', 0)+1
    bias,r = math.sqrt(1-sqr_mom**t),plain_rect(t, sqr_mom, threshold)
    if not eps_debiased: eps = eps/bias
    new,m,v = radam_reference(p, g, m, v, t, lr, mom, sqr_mom, eps, wd, threshold)
    state.update(m=m, v=v, t=t)
    if r is None: return p if sgd_phase == 'skip' else new
    if not beta: return new
    softplus = torch.logaddexp(torch.zeros_like(p), (v.sqrt()/bias + eps)*beta)/beta
    return p - lr*wd*p - lr*r*m/(1-mom**t)/softplus

def plain_adam(p, g, s, *, lr, mom, sqr_mom, eps, wd=0., factor=lambda t: 1., n=0, own_count=True,
               decouple_wd=True, eps_debiased=True, beta=0., maximize=False):
    "Adam with learning rate `lr*factor(t)`, after `n` steps for the second moment alone"
    if maximize: g = -g
    if not decouple_wd: g = g + wd*p
    s['t'] = t = s.get('t', 0)+1
    s['v'] = v = sqr_mom*s.get('v', 0.) + (1-sqr_mom)*g**2
    s['k'] = k = s.get('k', 0) + (t > n or not own_count)
    if t <= n: return p
    s['m'] = m = mom*s.get('m', 0.) + (1-mom)*g
    lr = lr*factor(t)
    if decouple_wd: p = p - lr*wd*p
    m_hat,bias = m/(1-mom**k),(1-sqr_mom**t)**.5
    denom = v**.5/bias + eps if eps_debiased else (v**.5 + eps)/bias
    if beta: denom = torch.log1p(torch.exp(denom*beta))/beta
    return p - lr*m_hat/denom

def plain_sgd(p, g, s, *, lr, mom, wd=0., decouple_wd=True, maximize=False):
    "Momentum SGD with a debiased average"
    if maximize: g = -g
    if not decouple_wd: g = g + wd*p
    s['k'] = k = s.get('k', 0)+1
    s['m'] = m = mom*s.get('m', 0.) + (1-mom)*g
    if decouple_wd: p = p - lr*wd*p
    return p - lr*m/(1-mom**k)

# ---- hundreds of steps with gaps, by an optimizer and by its definition

shapes = [(5, 7), (7,), (4, 3, 3, 3), (), (0, 3), (64, 2)]

@lru_cache(maxsize=None)
def normals(seed, dtype):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in shapes]

def tensors(dtype, seed=0): return [t.clone() for t in normals(seed, dtype)]
def params(dtype=torch.float32): return [nn.Parameter(p) for p in tensors(dtype)]

def scheduled(t, n):
    "Something like one-cycle: both lr and mom move"
    return dict(lr=.01*(1-.9*t/n), mom=.95-.1*t/n)

def has_grad(i, t):
    "The last two parameters join after 40 steps, and one misses every seventh"
    return (i < len(shapes)-2 or t > 40) and not (i == 1 and t%7 == 0)

def drive(opt, ps, n=300, sched=True, gaps=True, set_hypers=None):
    "Steps `opt` over seeded gradients, with moving hypers if `sched` and missing gradients if `gaps`"
    for t in range(1, n+1):
        if sched: (set_hypers or opt.set_hypers)(**scheduled(t, n))
        for i,(p,g) in enumerate(zip(ps, tensors(ps[0].dtype, seed=t))):
            p.grad = g if has_grad(i, t) or not gaps else None
        opt.step()
    return ps

def plain(step, n=300, sched=True, dtype=torch.float64, **kw):
    "What `drive` does, by the plain reading `step` in float64 (of gradients rounded to `dtype`)"
    ps,states = [p.double() for p in tensors(dtype)],[{} for _ in shapes]
    for t in range(1, n+1):
        for i,g in enumerate(tensors(dtype, seed=t)):
            if has_grad(i, t): ps[i] = step(ps[i], g.double(), states[i], **{**kw, **(scheduled(t, n) if sched else {})})
    return ps

def rel_err(a, b):
    "Largest difference, relative to the largest magnitude of `b`"
    a,b = a.detach().double(),b.detach().double()
    return ((a-b).abs().max()/b.abs().max()).item() if b.numel() else 0.

def compare(xs, ys, tol):
    for x,y in zip(xs, ys): assert rel_err(x, y) < tol

# ---- optimizers of any kind, and all they hold

f64 = torch.float64
def numbers(shape, seed, dtype=f64): return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=f64).to(dtype)
def flatten(groups): return [o for g in groups for o in g]
def is_torch(cls): return 'torch' in getattr(cls, 'func', cls).__module__
def param_lists(opt): return [g['params'] for g in opt.param_groups]
def params_of(opt): return flatten(param_lists(opt))
def hypers_of(opt): return getattr(opt, 'hypers', opt.param_groups) # what can be set, per group

def identical(a, b):
    "Whether two nests of containers and tensors are equal to the bit"
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and (a.dtype, a.shape) == (b.dtype, b.shape) and bool(((a == b) | (a != a) & (b != b)).all())
    if isinstance(a, dict): return a.keys() == b.keys() and all(identical(v, b[k]) for k,v in a.items())
    if isinstance(a, (list, tuple, L)): return len(a) == len(b) and all(map(identical, a, b))
    return a == b or a != a and b != b

def close(a, b, tol=1e-12):
    "Two optimizers hold the same parameters, or two lists the same tensors"
    xs,ys = (params_of(o) if hasattr(o, 'param_groups') else o for o in (a, b))
    for i,(x,y) in enumerate(zip(xs, ys, strict=True)):
        torch.testing.assert_close(x, y, rtol=tol, atol=tol, msg=lambda m: f'parameter {i}: {m}')

def frozen(opt):
    "A copy of all that a step or a load may change: values, averages, step counts, hyper-parameters"
    return copy.deepcopy([[p.detach() for p in params_of(opt)], opt.state_dict()])

def refuses(opt, error, match, f):
    "`f` raises `error` and leaves `opt` as it was, to the bit"
    before = frozen(opt)
    with pytest.raises(error, match=match): f()
    assert identical(frozen(opt), before)

def averages(opt):
    "(step, m, v) of each parameter, whatever they are called"
    res = []
    for p in params_of(opt):
        s = opt.state[p]
        m,v = (s.get(a, s.get(b)) for a,b in (('grad_avg', 'exp_avg'), ('sqr_avg', 'exp_avg_sq')))
        res.append(None if m is None else (int(s['step']), m, v))
    return res

def authors_state(opt, states, hypers):
    "What the authors' optimizer would save: torch's layout, `step` an int, a `buffer` in each group, none of torch's later settings"
    n = iter(range(100))
    buffer = [[None]*3 for _ in range(10)]
    buffer[8] = [8, 7.6, .04]
    return {'state': {i: {'step': s['t'], 'exp_avg': s['m'], 'exp_avg_sq': s['v']} for i,s in enumerate(states) if s},
            'param_groups': [{**hypers, 'buffer': buffer, 'params': [next(n) for _ in pg]} for pg in param_lists(opt)]}

def through_file(sd, **kw):
    "`sd` written and read again"
    f = io.BytesIO()
    torch.save(sd, f)
    f.seek(0)
    return torch.load(f, **{'weights_only': True, **kw})

# ---- groups of parameters, for fastai's optimizers and torch's

SHAPES = [[(3,4), (5,)], [(), (2,3)]] # two groups

def build(cls, shapes=SHAPES, dtype=f64, like=None, **kw):
    "An optimizer of class `cls` (fastai's kind or torch's) over groups of parameters, the same each time, or equal to those of `like`"
    n = iter(range(100))
    groups = [[nn.Parameter(numbers(s, next(n), dtype)) for s in g] for g in shapes]
    if like is not None:
        for p,q in zip(flatten(groups), params_of(like)): p.data.copy_(q.data)
    kw = copy.deepcopy({'lr': .05, **getattr(cls, 'keywords', {}), **kw})
    return cls([dict(params=g) for g in groups] if is_torch(cls) else groups, **kw)

def run(opt, steps, missing=lambda t: ()):
    "Steps with seeded gradients, none for the parameters numbered in `missing(t)`"
    for t in steps:
        for i,p in enumerate(params_of(opt)): p.grad = None if i in missing(t) else numbers(p.shape, 1000+100*t+i, p.dtype)
        opt.step()
    return opt

# ---- a list of parameters, for torch's

TORCH_SHAPES = [(3,4), (5,), ()]
TORCH_HYPERS = dict(lr=.05, betas=(.9,.99), weight_decay=.1) # with β2 .99, the sixth step is the first adaptive one
def fresh(shapes=TORCH_SHAPES, dtype=f64): return [nn.Parameter(numbers(s, i, dtype)) for i,s in enumerate(shapes)]

def torch_build(cls, shapes=TORCH_SHAPES, dtype=f64, **kw):
    "Parameters, the same each time, and an optimizer of them"
    ps = fresh(shapes, dtype)
    return ps,cls(ps, **{**TORCH_HYPERS, **kw})

def set_grads(ps, t, missing=()):
    "The gradients of step `t`, none for the parameters numbered in `missing`"
    for i,p in enumerate(ps): p.grad = None if i in missing else torch.empty_like(p).copy_(numbers(p.shape, 1000*t+i, p.dtype))

def torch_run(ps, opt, steps, missing=(), after=None):
    for t in steps:
        set_grads(ps, t, missing)
        opt.step()
        if after: after(t)
    return ps

def mlp(dtype=f64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4,8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8,1)).to(dtype)

def loss_of(m, t):
    x = numbers((16,4), t, next(m.parameters()).dtype)
    return (m(x)-x.sum(1, keepdim=True)).pow(2).mean()

def fit_mlp(m, opt, steps, backward=torch.Tensor.backward):
    for t in steps:
        opt.zero_grad()
        backward(loss_of(m, t))
        opt.step()
    return list(m.parameters())

# ---- a small Learner

class Data(list):
    "A dataset that can be exported: it has an empty form"
    def new_empty(self): return Data()

def get_dls(dtype):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(20, 2, 4, 4, generator=g, dtype=torch.float64)
    y = torch.stack([x.mean((1,2,3)), x[:,0].amax((1,2))], 1)
    ds = Data(zip(x.to(dtype), y.to(dtype)))
    return DataLoaders.from_dsets(ds, Data(ds[:4]), bs=4, shuffle=False, num_workers=0, device='cpu')

def get_model():
    "A convolution with its norm, and a linear layer; no parameter starts at zero"
    torch.manual_seed(0)
    model = nn.Sequential(nn.Sequential(nn.Conv2d(2, 3, 2, bias=False), nn.BatchNorm2d(3), nn.Tanh()),
                          nn.Sequential(nn.Flatten(), nn.Linear(27, 2)))
    for p in model.parameters(): nn.init.normal_(p, std=.5)
    return model

def halves(m): return [fastai_params(m[0]), fastai_params(m[1])]
def mse(pred, y): return F.mse_loss(pred, y).float()

def get_learner(opt_func, model=None, dtype=torch.float64, loss_func=mse, splitter=halves, **kwargs):
    "A quiet Learner, 5 batches an epoch in the same order and 1 to validate, the same from call to call"
    model = (get_model() if model is None else model).to(dtype)
    learn = Learner(get_dls(dtype), model, loss_func=loss_func, opt_func=opt_func, splitter=splitter, **kwargs)
    learn.remove_cb(ProgressCallback)
    learn.logger = noop
    return learn

def weights(learn): return [p.detach().clone() for p in learn.model.parameters()]
def flat(learn): return torch.cat([p.double().flatten() for p in weights(learn)])
def steps(learn): return [int(learn.opt.state[p].get('step', 0)) for pg in learn.opt.param_lists for p in pg]
def hypers(learn): return [{k: float(h[k]) for k in ('lr','mom','sqr_mom','eps','wd')} for h in learn.opt.hypers]
def all_equal(a, b): return len(a) == len(b) and all(map(torch.equal, a, b))

def assert_close(a, b, rtol=1e-6):
    "Learners `a` and `b` hold the same parameters to `rtol`, after as many steps, under the same hyper-parameters"
    torch.testing.assert_close(flat(a), flat(b), rtol=rtol, atol=rtol/100)
    assert steps(a) == steps(b)
    assert hypers(a) == hypers(b)

def assert_same(a, b):
    "As `assert_close`, to the last bit, batch-norm statistics included"
    assert all_equal(list(a.model.state_dict().values()), list(b.model.state_dict().values()))
    assert steps(a) == steps(b)
    assert hypers(a) == hypers(b)

def train_both(pair, train, rtol=1e-6, **kwargs):
    "Two Learners, ours and fastai's, that `train` moves alike"
    a,b = (get_learner(o, **kwargs) for o in pair)
    start = flat(a)
    for learn in (a, b): train(learn)
    assert_close(a, b, rtol)
    assert (flat(a)-start).abs().max() > 1e-3
    return a,b

class At(Callback):
    "Calls `f(learn)` at `event` of the training batches numbered in `batches` (`None`: all)"
    def __init__(self, event, f, batches=None, order=0):
        self.f,self.batches,self.order = f,batches,order
        setattr(self, event, self._call)
    def _call(self):
        if self.training and (self.batches is None or self.train_iter in self.batches): self.f(self.learn)

CPUMixedPrecision = partial(DevicePrecision, init_scale=256.)
def overflow(learn): learn.model[1][1].weight.grad[0,0] = math.inf

@contextmanager
def no_warnings():
    "Any warning is an error, except about the name under which fastai looks up a function of NumPy's"
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        warnings.filterwarnings('ignore', category=DeprecationWarning, message='numpy.core')
        yield

# ---- a Learner with a recorder

def first_and_rest(m): return [list(m[0].parameters()), list(m[1].parameters())]

def recorded_learner(opt_func, n=32, splitter=first_and_rest, cbs=(), **kwargs):
    "A quiet Learner of two linear layers, 8 batches an epoch and 1 to validate, with a recorder"
    torch.manual_seed(0)
    ds = Data((torch.randn(4), torch.randn(2)) for _ in range(n))
    dls = DataLoaders.from_dsets(ds, Data(ds[:4]), bs=4, shuffle=False, num_workers=0, device='cpu')
    learn = Learner(dls, nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), loss_func=nn.MSELoss(), opt_func=opt_func, splitter=splitter,
                    cbs=[RectifierRecorder(), *cbs], train_bn=False, **kwargs)
    learn.remove_cb(ProgressCallback)
    learn.logger = lambda *_: None
    return learn

opts = {'RAdam': RAdam, 'Ranger': partial(Ranger, k=100),
        'wrapper': partial(RAdamWrapper, betas=(.9, .99)), 'fastai': fo.RAdam, 'ranger': partial(fo.ranger, k=100),
        'torch': partial(OptimWrapper, opt=torch.optim.RAdam, betas=(.9, .99))}

class SkipAt(Callback):
    def __init__(self, *at): self.at = at
    def before_step(self):
        if self.train_iter in self.at: raise CancelStepException()

class Raise(Callback):
    "Raise `error` in `event` of batch 11, which is adaptive"
    def __init__(self, error, event, order=0): self.error,self.event,self.order = error,event,order
    def __call__(self, event_name):
        if event_name == self.event and self.training and self.train_iter == 11: raise self.error()

def state_of(learn):
    "Copies of the weights, the optimizer's state and the hyper-parameters"
    states = learn.opt.state_dict()['state']
    copies = [{k: v.clone() if torch.is_tensor(v) else v for k,v in s.items()}
              for s in (states.values() if isinstance(states, dict) else states)]
    return weights(learn),copies,[dict(h) for h in learn.opt.hypers]

def means(df, epoch):
    "Of r_t and the effective learning rate, over the adaptive updates of an epoch"
    df = df[(df.epoch == epoch) & (df.group == 1) & (df.event != 'skipped') & df.rect.notna()]
    return [df.rect.mean(), df.effective_lr.mean()]

def unchanged_by_a_failing_fit(learn, error, match):
    before = [p.detach().clone() for p in learn.model.parameters()]
    with pytest.raises(error, match=match): learn.fit(1, .01)
    assert all(map(torch.equal, before, learn.model.parameters())) and not len(learn.rectifier.to_frame())

# ---- commands, jobs, processes and files

MODULES = dict(demo='recipes.demo', imagenette='recipes.imagenette', experiment='experiments.main', bench='bench.main') # of the commands

def run_command(name, args, monkeypatch, tmp_path):
    "Run a command as its console script does, in this process"
    script = tmp_path/f'radam-{name}'
    script.write_text(f'import sys\nfrom radam_fastai.{MODULES[name]} import main\nsys.exit(main())')
    monkeypatch.setattr(sys, 'argv', [str(script), *map(str, args)])
    runpy.run_path(str(script), run_name='__main__')

TIMES = 'secs','train_secs','began','sittings'

def without_times(o):
    "A record without its times"
    if isinstance(o, dict): return {k: without_times(v) for k,v in o.items() if k not in TIMES}
    return [without_times(v) for v in o] if isinstance(o, list) else o

def same_checkpoint(a, b, at=''):
    "Assert that two checkpoints hold the same bits"
    assert type(a) == type(b), at
    if isinstance(a, dict):
        assert a.keys() == b.keys(), at
        for k in a:
            if k not in TIMES: same_checkpoint(a[k], b[k], f'{at}.{k}')
    elif isinstance(a, list):
        assert len(a) == len(b), at
        for i,(x,y) in enumerate(zip(a, b)): same_checkpoint(x, y, f'{at}[{i}]')
    elif isinstance(a, torch.Tensor): assert a.dtype == b.dtype and torch.equal(a, b), at
    else: assert a == b, at

def equal_jobs(a, b):
    "Assert that two folders hold the same runs: records, checkpoints, and files of the same names"
    ra,rb = (read_records(p/'records.jsonl') for p in (a, b))
    assert len(ra) == len(rb) and without_times(ra) == without_times(rb)
    assert sorted(p.name for p in a.iterdir()) == sorted(p.name for p in b.iterdir())
    for p in a.glob('*.pth'): same_checkpoint(load_checkpoint(p), load_checkpoint(b/p.name), p.name)
    for p in a.glob('*.csv'): assert p.read_bytes() == (b/p.name).read_bytes()

class Stop(Callback):
    "Be interrupted before batch `batch` of the whole run"
    order = 200
    def __init__(self, batch): self.batch = batch
    def before_batch(self):
        if self.training and self.train_iter == self.batch: raise KeyboardInterrupt

def one(out, lr=.01, name='radam-0', seed=0, epochs=2, resume=False, data=dict(name='digits'), cbs=None, opt='radam', **kw):
    "One run of the demo's network, by `run_job`"
    def make(): return demo.get_learner(opt, 256).add_cbs(cbs)
    run = Run(name, seed, dict(opt=opt, lr=lr, epochs=epochs), make, lambda l: l.fit_flat_cos(epochs, lr), data)
    return run_job([run], out, 'demo', resume, **kw)

def small_job(out, resume=False):
    "Two runs of the demo's network with a few batches an epoch"
    def make(opt): return demo.get_learner(opt, 256)
    runs = [Run(f'{opt}-1', 1, dict(opt=opt), partial(make, opt), lambda l: l.fit_one_cycle(4, 1e-2), dict(name='digits'))
            for opt in ('ranger','adam')]
    run_job(runs, out, 'demo', resume, keep=True)

def forked(f):
    "Run `f` in a forked process: its id"
    if pid := os.fork(): return pid
    try:
        sys.stdout = sys.stderr = open(os.devnull, 'w')
        f()
        os._exit(0)
    except OptionError: os._exit(2)
    except BaseException: os._exit(1)

def alive(pid):
    "Whether a process runs; one that has ended may still wait for its parent"
    try: return Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0] not in 'ZX'
    except FileNotFoundError: return False

def ended(pid): return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def result_of(f):
    "What `f()` returns in a process of its own; a crash of that process fails the test"
    r,w = os.pipe()
    if not (pid := os.fork()):
        try: res = f()
        except BaseException: res = traceback.format_exc()
        with os.fdopen(w, 'wb') as out: pickle.dump(res, out)
        os._exit(0)
    os.close(w)
    with os.fdopen(r, 'rb') as back: data = back.read()
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status == 0 and data, f'the process ended with {status}'
    res = pickle.loads(data)
    assert not isinstance(res, str), res
    return res

def tar(path, **members):
    "An archive of regular files, or of `TarInfo`s as they are"
    with tarfile.open(path, 'w:gz') as t:
        for name,o in members.items():
            if isinstance(o, tarfile.TarInfo): t.addfile(o)
            else: t.add(o, name.replace('__', '/'))
    return path

def short_header():
    "A PNG whose first chunk is too short: of this, Pillow raises a ValueError"
    chunk = b'IHDR' + bytes(5)
    return b'\x89PNG\r\n\x1a\n' + struct.pack('>I', 5) + chunk + struct.pack('>I', zlib.crc32(chunk))
