"""Break the package on purpose, one line at a time, and see the tests notice: `python tests/mutants.py [name ...]`.

Each mutant is a copy of the project with one replacement made in a module. A mutant that no test catches is a missing test.
It is not part of the suite: it takes some minutes."""
import os, shutil, subprocess, sys, tempfile
from pathlib import Path

root = Path(__file__).resolve().parent.parent

mutants = { # name: (module, what is there, what stands there instead)
    'threshold 4 instead of 5':      ('rectify', 'threshold:float=5, # The adaptive', 'threshold:float=4, # The adaptive'),
    'rho without bias correction':   ('rectify', 'math.exp(-y)/math.expm1(-y)', '-math.exp(-y)'),
    'early rho is the step count':   ('rectify', 'if y < 1: return step + _langevin(x/2) - step*_langevin(y/2)', 'if y < 1: return step'),
    'eps ignored':                   ('functional', 'adam = dict(mom=mom, sqr_mom=sqr_mom, eps=eps)', 'adam = dict(mom=mom, sqr_mom=sqr_mom, eps=0.)'),
    'eps on the other side':         ('functional', 'if not eps_debiased: eps /=', 'if eps_debiased: eps /='),
    'decay scaled by r_t':           ('functional', 'wd=wd/r if decouple_wd else wd', 'wd=wd'),
    'rectifier ignored':             ('functional', 'decouple_wd=decouple_wd, lr=lr*r,', 'decouple_wd=decouple_wd, lr=lr,'),
    'no decay in the momentum phase': ('functional', 'if decouple_wd and wd: torch', 'if decouple_wd and wd and r is not None: torch'),
    'L2 treated as decoupled':       ('functional', 'l2=0. if decouple_wd else wd', 'l2=0.'),
    'momentum phase not debiased':   ('functional', 'alpha=-lr/(1 - mom**step))\n    else', 'alpha=-lr)\n    else'),
    'skip moves':                    ('functional', "if r is None and sgd_phase == 'skip': return", ''),
    'softplus ignored':              ('functional', 'if r is not None and fused and not beta:', 'if r is not None and fused:'),
    'memory order ignored':          ('functional', "o.dtype == param.dtype and layout(o) == layout(param)", 'o.dtype == param.dtype'),
    'devices mixed':                 ('functional', 'o.device == param.device and ', ''),
    'gaps in memory ignored':        ('functional', 'and is_dense(param)', ''),
    'order of gradients ignored':    ('bucket', 'if layout(p) != layout(g): ', 'if False: '),
    'a moved parameter unnoticed':   ('bucket', 'self._places() == self.places', 'True'),
    'a new state unnoticed':         ('bucket', 'all(map(is_, state.values(), self.states))', 'True'),
    'changed averages unnoticed':    ('bucket', 's[ga] is m and s[sa] is v and ', ''),
    'changed counts unnoticed':      ('bucket', "s['step'] is step and ", ''),
    'changed do_wd unnoticed':       ('bucket', " and s.get('do_wd', True) == decays\n", '\n'),
    'a late parameter unnoticed':    ('bucket', 'all([p.grad is None for p in self.idle])', 'True'),
    'do_wd ignored':                 ('bucket', 'wd=wd if self.decays else 0.', 'wd=wd'),
    'steps not counted':             ('bucket', 'self.counter.advance()', 'pass'),
    'gradients kept':                ('bucket', 'self.grads = [] # or', 'pass # or'),
    'step counts mixed':             ('bucket', "p.dtype,int(s['step'])", 'p.dtype,0'),
    'mom read once':                 ('optimizer', 'res = [{k: float(h[k]) for k in _hypers} for h in self.hypers]',
                                      "self._mom = getattr(self, '_mom', self.hypers[0]['mom'])\n    res = [{**{k: float(h[k]) for k in _hypers}, 'mom': float(self._mom)} for h in self.hypers]"),
    'lr read once':                  ('optimizer', 'res = [{k: float(h[k]) for k in _hypers} for h in self.hypers]',
                                      "self._lr = getattr(self, '_lr', self.hypers[0]['lr'])\n    res = [{**{k: float(h[k]) for k in _hypers}, 'lr': float(self._lr)} for h in self.hypers]"),
    'hypers of the first group':     ('optimizer', '**hypers[b.group]', '**hypers[0]'),
    'hypers unchecked':              ('optimizer', '    for h in res: check_hypers(**h)\n', ''),
    'gradients zeroed, not released': ('optimizer', 'for p in pg: p.grad = None', 'for p in pg:\n            if p.grad is not None: p.grad.zero_()'),
    'loaded tensors aliased':        ('functional', 'return torch.empty_like(p, requires_grad=False).copy_(t.detach())', 'return t'),
    'shapes unchecked':              ('checkpoint', 'if s[k].shape != p.shape:', 'if False:'),
    'flags lost on loading':         ('checkpoint', 'return {k: old[k] for k in flags if k in old}', 'return {}'),
    'Lookahead one step late':       ('optimizer', 'if self.count % self.k: return', 'if (self.count-1) % self.k: return'),
    'alpha ignored':                 ('optimizer', 'torch._foreach_lerp_(slow, fast, self.alpha)', 'torch._foreach_lerp_(slow, fast, .5)'),
    'slow weights not saved':        ('optimizer', "'slow_weights': self.slow_weights}", "'slow_weights': None}"),
    'moved between groups unnoticed': ('bucket', 'list(map(len, param_lists)) == self.sizes and ', ''),
    'moved in place unnoticed':      ('bucket', 'list(map(Tensor.stride, self.matrices)) == self.orders', 'True'),
    'averages stay behind':          ('bucket', 'if s[k].device != p.device or layout(s[k]) != order:', 'if False:'),
    'old states kept alive':         ('bucket', 'self.sizes,self.params,self.states,self.idle,self.buckets = [],[],[],[],[]', 'self.sizes,self.params,self.states,self.idle,self.buckets = [],[],[],[],getattr(self, "buckets", [])'),
    'a count set in place unnoticed': ('bucket', 'and self.counter.intact()', ''),
    'hypers do not write through':   ('torch_optim', 'set_item_pg(self.group, self.names[k], v)', 'pass'),
    'a second state in the wrapper': ('torch_optim', 'def state(self): return self.opt.state', 'def state(self): return self.__dict__.setdefault("_state", defaultdict(dict))'),
}

def caught(
    name:str # One of `mutants`
)->str: # The first test that failed, or nothing
    "Run the tests on a copy of the project with the mutant `name` in it"
    module,old,new = mutants[name]
    with tempfile.TemporaryDirectory() as d:
        for o in 'radam_fastai','tests': shutil.copytree(root/o, Path(d)/o, ignore=shutil.ignore_patterns('__pycache__'))
        f = Path(d)/f'radam_fastai/{module}.py'
        src = f.read_text()
        assert src.count(old) == 1, f'{name}: {old!r} stands {src.count(old)} times in {module}'
        f.write_text(src.replace(old, new))
        tests = [f'tests/test_{t}.py' for t in ('rectify', 'parity', 'optimizer', 'checkpoint', 'torch_optim', 'learner')]
        env = {**os.environ, 'PYTHONPATH': d}
        res = subprocess.run([sys.executable, '-m', 'pytest', '-x', '-q', '-p', 'no:cacheprovider', *tests], cwd=d, env=env, capture_output=True, text=True)
        return next((l.split(' - ')[0] for l in res.stdout.splitlines() if l.startswith(('FAILED', 'ERROR'))), '')

if __name__ == '__main__':
    names = sys.argv[1:] or list(mutants)
    found = {}
    for n in names:
        found[n] = caught(n)
        print(f'{n:32} {found[n] or "SURVIVED"}', flush=True)
    print(f'{sum(map(bool, found.values()))} of {len(names)} mutants caught')
    sys.exit(not all(found.values()))
