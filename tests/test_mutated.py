"""Checkpoints with something wrong in them: each is refused by name, with nothing changed, or loaded and then what the file says.

RADAM_FULL=1 tries ten times as many."""
import copy
import io
import json
import pickle
import random
from functools import lru_cache, partial

import fastai.optimizer as fo
import pytest
import torch

from helpers import (
    FULL,
    authors_state,
    averages,
    build,
    frozen,
    get_learner,
    identical,
    is_torch,
    numbers,
    param_lists,
    params_of,
    plain_step,
    result_of,
    run,
    tally,
)
from mutate import RunsCode, archive, damage, evil_pickles, forge, mutate
from radam_fastai.all import load_strict
from radam_fastai.optimizer import RAdam, Ranger, reference_settings
from radam_fastai.recipes.checkpoint import RECORDED, load_checkpoint, restore_run, run_state, save_checkpoint
from radam_fastai.recipes.cli import RecipeError
from radam_fastai.recipes.jobs import Run, begin, finish, plan_job, sitting
from radam_fastai.recipes.records import RunRecorder
from radam_fastai.torch_optim import RAdam as TorchRAdam, RAdamWrapper

pytestmark = pytest.mark.slow

# ---- states

both = dict(betas=(.9,.99), weight_decay=.1)
as_torch,as_author = partial(RAdam, **reference_settings['torch']),partial(RAdam, **reference_settings['author'])
decoupled = partial(TorchRAdam, decoupled_weight_decay=True)

def of(source, **kw): return run(build(partial(source, **kw)), range(8), lambda t: {1}).state_dict() # one parameter has no state
def authors():
    opt = build(TorchRAdam)
    states = [dict(t=8, m=numbers(p.shape, 7), v=numbers(p.shape, 8)**2) for p in params_of(opt)]
    return authors_state(opt, states, dict(lr=.05, betas=(.9,.99), eps=1e-8, weight_decay=.1))

SOURCES = { # who saved it, and who reads it
    'ours':           (partial(of, RAdam, wd=.1), [RAdam, decoupled]),
    'our Ranger':     (partial(of, Ranger, wd=.1), [Ranger]),
    'ours, torch':    (partial(of, TorchRAdam, **both), [as_torch, TorchRAdam]),
    'fastai RAdam':   (partial(of, fo.RAdam, wd=.1), [RAdam, decoupled]),
    'fastai Adam':    (partial(of, fo.Adam, wd=.1), [RAdam]),
    'fastai ranger':  (partial(of, fo.ranger, wd=.1), [Ranger]),
    'torch RAdam':    (partial(of, torch.optim.RAdam, **both), [as_torch, TorchRAdam]),
    'torch AdamW':    (partial(of, torch.optim.AdamW, **both), [RAdam, decoupled]),
    'authors':        (authors, [as_author, decoupled]),
}
PAIRS = {f'{name} into {getattr(t, "func", t).__module__.split(".")[-1]} {i}': (make, t) for name,(make,ts) in SOURCES.items()
         for i,t in enumerate(ts)}

@lru_cache(maxsize=None)
def valid(make): return make()

ADAMS = 'lr','mom','sqr_mom','eps','wd','beta'

def says(sd):
    "Step count and averages of each parameter (`None` without), and hyper-parameters of each group, as they stand in `sd`"
    if 'param_groups' in sd:
        states = [sd['state'].get(i, {}) for g in sd['param_groups'] for i in g['params']]
        hypers = [dict(lr=g['lr'], mom=g['betas'][0], sqr_mom=g['betas'][1], eps=g['eps'], wd=g['weight_decay'])
                  for g in sd['param_groups']]
    else: states,hypers = sd['state'],sd['hypers']
    m,v = ('exp_avg', 'exp_avg_sq') if 'param_groups' in sd else ('grad_avg', 'sqr_avg')
    hypers = [{k: float(h[k]) for k in ADAMS if k in h} for h in hypers] # what else there is belongs to the user
    return [(int(s['step']), s[m].detach().double(), s[v].detach().double()) if m in s else None for s in states], hypers, states

def rules(opt, sd):
    "The settings under which each group goes on"
    if not is_torch(type(opt)):
        s = opt.settings
        return [dict(decouple_wd=s['decouple_wd'], eps_debiased=s['eps_debiased'], sgd_phase=s['sgd_phase'],
                     maximize=s['maximize'])]*len(opt.hypers)
    groups = sd.get('param_groups', opt.param_groups)
    return [dict(decouple_wd=g.get('decoupled_weight_decay', 'buffer' in g or opt.defaults['decoupled_weight_decay']),
                 maximize=g.get('maximize', False),
                 eps_debiased=False) for g in groups]

def assert_says(opt, sd):
    "The optimizer holds what `sd` says, and its next two steps are Algorithm 2 from there"
    states,hypers,raw = says(sd)
    assert len(states) == len(params_of(opt)) and len(hypers) == len(param_lists(opt))
    for got,want,p in zip(averages(opt), states, params_of(opt)):
        assert (got is None) == (want is None)
        if want: assert got[0] == want[0] and all(identical(g, w.to(p.dtype)) for g,w in zip(got[1:], want[1:]))
    for g,h in zip(opt.param_groups, hypers):
        mine = {'mom': g['betas'][0], 'sqr_mom': g['betas'][1], 'wd': g['weight_decay'], 'beta': 0., **g} if is_torch(type(opt)) else g
        assert {k: float(mine[k]) for k in h} == h
    if 'count' in sd:
        assert opt.count == sd['count'] and (opt.slow_weights is None) == (sd['slow_weights'] is None)
        if opt.slow_weights:
            assert identical([[o.double() for o in pg] for pg in opt.slow_weights],
                             [[o.detach().double() for o in pg] for pg in sd['slow_weights']])
    per_group = [(h, r) for h,r,pg in zip(hypers, rules(opt, sd), param_lists(opt)) for _ in pg]
    ps,ss = [p.detach().clone() for p in params_of(opt)],[dict(zip('tmv', s)) if s else {} for s in states]
    lookahead = isinstance(opt, Ranger)
    for t in (0, 1):
        if lookahead and (opt.count+1)%opt.k == 0: break # the step that moves the slow weights is test_checkpoint's
        ps = [plain_step(p, numbers(p.shape, 1000+100*t+i), s, **{**h, 'wd': h['wd']*(r.get('do_wd', True))}, **rule)
              for i,(p,s,(h,rule),r) in enumerate(zip(ps, ss, per_group, raw))]
        run(opt, [t])
    for p,q in zip(params_of(opt), ps): torch.testing.assert_close(p.detach(), q, rtol=1e-6, atol=1e-9, equal_nan=True)

def named(path, how, msg):
    "Whether an error says where the trouble is: the key, or, for what is not at one key, the part of the state"
    same = dict(exp_avg='grad_avg', exp_avg_sq='sqr_avg', weight_decay='wd', betas='mom')
    keys = [k for k in path if isinstance(k, str)]
    if any(k in msg or same.get(k, k) in msg for k in keys[1:] or keys): return True
    if how == 'swap' or len(path) == 1: return any(w in msg for w in ('group', 'parameter', 'state', 'count', 'unknown'))
    part = {'state': ('parameter', 'state ', 'param_groups'), 'hypers': ('group',), 'param_groups': ('group', 'parameter', 'state ')}
    whole = how in ('cut', 'add', 'rename', 'twice') or not keys[1:] or 'params' in keys
    return whole and any(w in msg for k in keys[:1] for w in (*part.get(k, ()), 'not the state', 'unknown'))

def try_state(name, seed):
    "Load a mutated state: 'refused' or 'loaded', or an `AssertionError`"
    make,target = PAIRS[name]
    rng = random.Random(f'{name} {seed}')
    sd,path,how = mutate(valid(make), rng)
    opt = run(build(target), range(5))
    before = frozen(opt)
    about = f'{name}, seed {seed}: {how} at {path}'
    try: opt.load_state_dict(sd)
    except ValueError as e:
        assert named(path, how, str(e)) and len(str(e)) < 600, f'{about}: {e}'
        assert identical(frozen(opt), before), about
        assert identical(frozen(run(opt, range(5, 8))), whole(name)), about
        return 'refused'
    except BaseException as e: raise AssertionError(f'{about}: {type(e).__name__}: {e}') from None
    try: assert_says(opt, sd)
    except BaseException as e: raise AssertionError(f'{about}: loaded, but is not what it says: {type(e).__name__}: {e}') from None
    return 'loaded right'

@lru_cache(maxsize=None)
def whole(name): return frozen(run(build(PAIRS[name][1]), range(8)))

@pytest.mark.parametrize('name', PAIRS)
def test_states(name):
    for seed in range(200 if FULL else 20): tally['mutated states', try_state(name, seed)] += 1

def put(sd, path, v):
    for k in path[:-1]: sd = sd[k]
    sd[path[-1]] = v

TRAPS = { # what a careless reader would take: into fastai's kind of state, or torch's
    'a count that no float can be': (RAdam, ('state', 0, 'step'), 10**400, 'parameter 0.*step must be a whole number'),
    'a count that float64 rounds':  (RAdam, ('state', 0, 'step'), 2**53+1, 'parameter 0.*step must be a whole number'),
    'a count beyond counting':      (RAdam, ('state', 0, 'step'), 1e300, 'parameter 0.*step must be a whole number'),
    'a wait that no float can be':  (RAdam, ('state', 0, 'waited'), 10**400, 'parameter 0.*waited in its state'),
    'another average under the name of the other library': (RAdam, ('state', 0, 'exp_avg'), torch.zeros(1), 'state 0 has exp_avg'),
    'the same in torch\'s state':   (TorchRAdam, ('state', 0, 'grad_avg'), numbers((3,4), 5), 'state 0 has grad_avg'),
    'a state of nobody':            (TorchRAdam, ('state', 9), {}, 'state for 9, which none of its groups has'),
    'a parameter twice':            (TorchRAdam, ('param_groups', 1, 'params'), [2, 0], 'name a parameter twice'),
    'a third beta':                 (TorchRAdam, ('param_groups', 0, 'betas'), (.9, .99, .5), 'group 0.*betas must be two numbers'),
    'text that means yes':          (TorchRAdam, ('param_groups', 0, 'decoupled_weight_decay'), 'no',
                                     'group 0.*decoupled_weight_decay must be a bool, got str'),
    'a number as text':             (RAdam, ('hypers', 0, 'lr'), '0.1', "group 0.*lr must be a number, got str '0.1'"),
    'an empty list of slow weights': (Ranger, ('slow_weights',), [[], []], 'slow_weights .*shapes'),
    'a slow weight of nan':         (Ranger, ('slow_weights', 0, 1), torch.full((5,), float('nan')),
                                     'parameter 1.*slow_weights in the checkpoint has nan'),
}

@pytest.mark.parametrize('name', TRAPS)
def test_traps(name):
    cls,path,value,says = TRAPS[name]
    opt = run(build(cls), range(8))
    sd,before = copy.deepcopy(opt.state_dict()),frozen(opt)
    put(sd, path, value)
    with pytest.raises(ValueError, match=says): opt.load_state_dict(sd)
    assert identical(frozen(opt), before)

@pytest.mark.parametrize('cls', [RAdam, Ranger, TorchRAdam], ids=['RAdam', 'Ranger', 'torch'])
def test_a_missing_hyper_is_not_made_up(cls):
    opt = run(build(cls), range(8))
    for k in ('lr', 'betas', 'eps', 'weight_decay') if is_torch(cls) else ('lr', 'mom', 'sqr_mom', 'eps', 'wd'):
        sd = copy.deepcopy(opt.state_dict())
        del sd['param_groups' if is_torch(cls) else 'hypers'][1][k]
        with pytest.raises(ValueError, match=f'group 1 of the checkpoint has no {k}'): opt.load_state_dict(sd)

# ---- files

LEARNERS = dict(RAdam=RAdam, Ranger=Ranger, RAdamWrapper=RAdamWrapper, adam=fo.Adam, ranger=fo.ranger)

@lru_cache(maxsize=None)
def trained(name): # a Learner, and the bytes that its `save` writes
    learn = get_learner(LEARNERS[name])
    learn.fit(2, .02)
    f = io.BytesIO()
    torch.save({'model': learn.model.state_dict(), 'opt': learn.opt.state_dict()}, f, pickle_protocol=2)
    learn.fit(1, .02) # so that what is loaded is not what is there
    return learn,f.getvalue()

def held(learn): return copy.deepcopy((dict(learn.model.state_dict()), learn.opt.state_dict()))

def plainly(path):
    "What PyTorch reads from a file, without code from it"
    import numpy as np
    from fastcore.foundation import L
    with torch.serialization.safe_globals([L, np._core.multiarray.scalar, np.dtype, np.dtypes.Float64DType]):
        return torch.load(path, weights_only=True)

def assert_loaded(learn, sd):
    "`learn` holds what `sd` says"
    model = learn.model.state_dict()
    assert model.keys() == sd['model'].keys() and all(identical(model[k], v.detach().to(model[k].dtype)) for k,v in sd['model'].items())
    states,hypers,_ = says(sd['opt'])
    opt = getattr(learn.opt, 'opt', learn.opt) if isinstance(learn.opt, RAdamWrapper) else learn.opt
    ps = [p for pg in learn.opt.param_lists for p in pg]
    for p,want in zip(ps, states, strict=True):
        s = opt.state[p]
        m,v = (s.get(a, s.get(b)) for a,b in (('grad_avg', 'exp_avg'), ('sqr_avg', 'exp_avg_sq')))
        assert (m is None) == (want is None)
        if want: assert s['step'] == want[0] and identical([m, v], [w.to(m.dtype) for w in want[1:]])
    for h,want in zip(learn.opt.hypers, hypers, strict=True):
        assert {k: float(h[k]) for k in want if k in h} == {k: v for k,v in want.items() if k in h}

def change(data, rng):
    "The file of someone who changed one value, key or tensor before saving, and what"
    sd,path,how = mutate(torch.load(io.BytesIO(data), weights_only=False), rng)
    f = io.BytesIO()
    torch.save(sd, f)
    return f.getvalue(),f'{how} at {path}'

def try_file(name, seed, path, spoil):
    "Load a spoilt file into a Learner that goes on: 'refused' or 'loaded', or an `AssertionError`"
    learn,good = trained(name)
    rng = random.Random(f'{name} {seed}')
    data,how = spoil(good, rng)
    path.write_bytes(data)
    about,before = f'{name}, seed {seed}: {how}',held(learn)
    try: load_strict(learn, path.with_suffix(''))
    except ValueError as e:
        assert str(path) in str(e), f'{about}: {e}'
        assert identical(held(learn), before), about
        return 'refused'
    except BaseException as e: raise AssertionError(f'{about}: {type(e).__name__}: {e}') from None
    try:
        sd = plainly(path)
        if spoil is damage: assert identical(held(learn), held_by(good)), 'not what was saved'
        else: assert_loaded(learn, sd)
    except BaseException as e: raise AssertionError(f'{about}: loaded, but is not what it says: {type(e).__name__}: {e}') from None
    path.write_bytes(trained(name)[1])
    for k,v in before[0].items(): learn.model.state_dict()[k].copy_(v)
    learn.opt.load_state_dict(before[1])
    return 'loaded right'

def held_by(good):
    sd = torch.load(io.BytesIO(good), weights_only=False)
    return sd['model'],sd['opt']

@pytest.mark.parametrize('name', LEARNERS)
@pytest.mark.parametrize('spoil', [damage, forge, change], ids=['damaged', 'forged', 'changed'])
def test_files(name, spoil, tmp_path):
    "Cut, turned and shuffled bytes; the same inside an archive whose checksums are right; and other values in a sound file"
    def tries(): return [try_file(name, seed, tmp_path/'a.pth', spoil) for seed in range(100 if FULL else 10)]
    for res in result_of(tries): tally[f'checkpoint files, {spoil.__name__}d', res] += 1

# ---- files that run code

def evil_files(marker):
    "Files of every kind, each of which makes the file `marker` if it is read without care"
    for name,p in evil_pickles(marker).items():
        yield f'{name}, bare',p
        yield f'{name}, in an archive',archive(p)
    learn,good = trained('RAdam')
    for at in [('x',), ('model', '0.0.weight'), ('opt', 'state', 0, 'step'), ('opt', 'hypers', 0, 'lr')]:
        for kw in {}, dict(_use_new_zipfile_serialization=False):
            sd = torch.load(io.BytesIO(good), weights_only=False)
            o = sd
            for k in at[:-1]: o = o[k]
            o[at[-1]] = RunsCode(marker)
            f = io.BytesIO()
            torch.save(sd, f, **kw)
            yield f'{at}, {kw}',f.getvalue()

@pytest.mark.filterwarnings('ignore:Detected pickle protocol')
def test_no_code_runs(tmp_path):
    marker,path = tmp_path/'ran',tmp_path/'a.pth'
    learn,before = trained('RAdam')[0],held(trained('RAdam')[0])
    live = 0
    for p in evil_pickles(marker).values(): # that they would
        try: pickle.loads(p)
        except Exception: pass
        live += marker.exists()
        marker.unlink(missing_ok=True)
    assert live >= 8
    for name,data in evil_files(marker):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=f'{path} is not a whole checkpoint'): load_strict(learn, path.with_suffix(''))
        with pytest.raises(RecipeError, match=f'{path} is not a whole checkpoint'): load_checkpoint(path)
        assert not marker.exists(), name
        tally['checkpoints that run code', 'refused'] += 2
    assert identical(held(learn), before)

# ---- recipes

def recipe_learner(name):
    "A Learner as it is at the start of a fit, trained a little, and a recorder"
    learn,rec = get_learner(LEARNERS[name]),RunRecorder()
    learn.fit(2, .02, cbs=rec)
    learn.n_epoch = 3
    return learn,rec

ASKED = Run('a', 1, dict(opt='radam', lr=.02), None, None, dict(name='random'))

@lru_cache(maxsize=None)
def recipe_state(name):
    learn,rec = recipe_learner(name)
    learn.epoch = 1
    about = begin(ASKED, learn, 'a', 'test')
    state = copy.deepcopy(dict(run='a', about={**about, 'sittings': [sitting(0)]}, **run_state(learn, rec)))
    return {**state, 'steps': state['steps'][:2]} # most places would be in these rows

def recipe_held(learn, rec):
    smooth = learn.recorder.smooth_loss
    return copy.deepcopy((*held(learn), smooth.val, smooth.count, learn.train_iter, rec.steps, rec.epochs, rec.hypers))

def try_recipe(name, seed, path):
    "Go on with a run from a checkpoint in which something is wrong"
    rng = random.Random(f'{name} {seed}')
    state,at,how = mutate(recipe_state(name), rng)
    (learn,rec),about = recipe_learner(name),f'{name}, seed {seed}: {how} at {at}'
    if at[0] in ('run', 'about'): return try_about(state, path, about)
    learn.fit(1, .02)
    learn.n_epoch = 3
    before = recipe_held(learn, rec)
    try:
        save_checkpoint(path, state)
        restore_run(learn, rec, load_checkpoint(path))
    except RecipeError as e:
        assert len(str(e).splitlines()) == 1, f'{about}: {e}'
        assert identical(recipe_held(learn, rec), before), about
        return 'refused'
    except BaseException as e: raise AssertionError(f'{about}: {type(e).__name__}: {e}') from None
    try:
        sd = torch.load(path, weights_only=True)
        assert_loaded(learn, sd)
        assert identical(recipe_held(learn, rec)[2:], (*sd['smooth_loss'], *(sd[k] for k in ('train_iter', 'steps', 'epochs', 'hypers'))))
    except BaseException as e: raise AssertionError(f'{about}: loaded, but is not what it says: {type(e).__name__}: {e}') from None
    return 'loaded right'

def try_about(state, path, about):
    "Go on from a checkpoint that says something else of its run: it is another run, or its record can be written"
    save_checkpoint(path, state)
    try:
        plan_job([ASKED], path.parent, 'test', {}, True)
        found = load_checkpoint(path)
        json.dumps(finish({**found['about'], 'sittings': [*found['about']['sittings'], sitting(2)]}, *(found[k] for k in RECORDED)),
                   default=str)
    except RecipeError as e:
        assert len(str(e).splitlines()) == 1, f'{about}: {e}'
        return 'refused'
    except BaseException as e: raise AssertionError(f'{about}: {type(e).__name__}: {e}') from None
    return 'loaded right'

@pytest.mark.parametrize('name', ['RAdam', 'Ranger', 'adam'])
def test_recipes(name, tmp_path):
    for seed in range(150 if FULL else 15): tally['mutated checkpoints of recipes', try_recipe(name, seed, tmp_path/'a.pth')] += 1

RECIPE_TRAPS = { # what was done to the state, and what is said of the file
    'a row without its loss':   (lambda s: s['steps'][1].pop('loss'), 'its steps are not rows of a table'),
    'a row that is none':       (lambda s: s['epochs'].append(3), 'its epochs are not rows of a table'),
    'no epochs to count':       (lambda s: s.pop('n_epoch'), 'it has no n_epoch'),
    'more epochs than there are': (lambda s: s.update(epoch=9), 'its epochs cannot be counted'),
    'half a smoothed loss':     (lambda s: s['smooth_loss'].pop(), 'its loss is not a number'),
    'a loss scale':             (lambda s: s.update(scaler=dict(scale=2.)), 'has the loss scale of another precision'),
    'a model that is a list':   (lambda s: s.update(model=[1]), 'its model is a list'),
    'a weight of nan':          (lambda s: s['model']['1.1.bias'].fill_(float('nan')),
                                 'does not fit the model or the optimizer: 1.1.bias has nan or inf'),
    'an average of nan':        (lambda s: s['opt']['state'][0]['sqr_avg'].fill_(float('nan')),
                                 'does not fit the model or the optimizer: .*parameter 0.*sqr_avg .*nan or inf'),
}

@pytest.mark.parametrize('opt', ['RAdam', 'adam'])
@pytest.mark.parametrize('name', RECIPE_TRAPS)
def test_recipe_traps(name, opt, tmp_path):
    change,says = RECIPE_TRAPS[name]
    (learn,rec),state = recipe_learner(opt),copy.deepcopy(recipe_state(opt))
    change(state)
    before = recipe_held(learn, rec)
    save_checkpoint(tmp_path/'a.pth', state)
    with pytest.raises(RecipeError, match=says): restore_run(learn, rec, load_checkpoint(tmp_path/'a.pth'))
    assert identical(recipe_held(learn, rec), before)
