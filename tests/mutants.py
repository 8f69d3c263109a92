"""Break the package on purpose, one line at a time, and see the tests notice: `python tests/mutants.py [name ...]`.

Each mutant is a copy of the project with one replacement made in a module. A mutant that no test catches is a missing test.
It is not part of the suite: it takes some minutes."""
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

root = Path(__file__).resolve().parent.parent

modules = ['rectify', 'parity', 'baselines', 'optimizer', 'checkpoint', 'torch_optim', 'torch_state', 'torch_wrapper', 'learner',
           'recorder', 'loggers', 'finder', 'gradients', 'advisor', 'guard', 'mutated', 'numbers', 'bad_input'] # with tests to run

mutants = { # name: (module, what is there, what stands there instead)
    'threshold 4 instead of 5':      ('rectify', 'threshold:float=5, # The adaptive', 'threshold:float=4, # The adaptive'),
    'rho without bias correction':   ('rectify', 'math.exp(-y)/math.expm1(-y)', '-math.exp(-y)'),
    'early rho is the step count':   ('rectify', 'if y < 1: return step + _langevin(x/2) - step*_langevin(y/2)', 'if y < 1: return step'),
    'eps ignored':                   ('functional', 'adam = dict(mom=mom, sqr_mom=sqr_mom, eps=eps)',
                                      'adam = dict(mom=mom, sqr_mom=sqr_mom, eps=0.)'),
    'eps on the other side':         ('functional', 'if not eps_debiased: eps /=', 'if eps_debiased: eps /='),
    'decay scaled by r_t':           ('functional', 'if decouple_wd: wd /= lr_mult/wd_mult', 'pass'),
    'rectifier ignored':             ('functional', 'decouple_wd=decouple_wd, lr=lr*lr_mult,', 'decouple_wd=decouple_wd, lr=lr,'),
    'no decay in the momentum phase': ('functional', 'if decouple_wd and wd: torch', 'if decouple_wd and wd and r is not None: torch'),
    'L2 treated as decoupled':       ('functional', 'l2=0. if decouple_wd else wd', 'l2=0.'),
    'momentum phase not debiased':   ('functional', 'alpha=-lr*lr_mult/(1 - mom**step))\n    else', 'alpha=-lr*lr_mult)\n    else'),
    'skip moves':                    ('functional', "if r is None and sgd_phase == 'skip': return", ''),
    'softplus ignored':              ('functional', 'if r and fused and not beta and', 'if r and fused and'),
    'memory order ignored':          ('functional', "(param.device, param.dtype, param.shape, layout(param))",
                                      '(param.device, param.dtype, param.shape, layout(o))'),
    'devices mixed':                 ('functional', "== (param.device, param.dtype", '== (o.device, param.dtype'),
    'gaps in memory ignored':        ('functional', 'and is_dense(param)', ''),
    'order of gradients ignored':    ('bucket', 'if layout(p) != layout(g): ', 'if False: '),
    'a moved parameter unnoticed':   ('bucket', 'self._places() != self.places', 'False'),
    'a new state unnoticed':         ('bucket', 'all(map(is_, state.values(), self.states))', 'True'),
    'changed averages unnoticed':    ('bucket', 's[ga] is m and s[sa] is v', 'ga in s and sa in s'),
    'changed counts unnoticed':      ('bucket', "def intact(self): return {s['step'] for s in self.states} == {self.count}",
                                      "def intact(self): return True"),
    'changed do_wd unnoticed':       ('bucket', "if {s.get('do_wd', True) for s in self.states} != {self.decays}: return False", ''),
    'a late parameter unnoticed':    ('bucket', 'all([p.grad is None for p in self.idle])', 'True'),
    'do_wd ignored':                 ('bucket', 'wd=wd if self.decays else 0.', 'wd=wd'),
    'steps not counted':             ('bucket', 'self.counter.advance()', 'pass'),
    'gradients kept':                ('bucket', 'self.grads = [] # or', 'pass # or'),
    'step counts mixed':             ('bucket', "for k in ('step', *self.also)", 'for k in self.also or [0]'),
    'mom read once':                ('optimizer', 'return [check_hypers(**{k: h[k] for k in hyper_names}) for h in self.hypers]',
                                      "self._mom = getattr(self, '_mom', self.hypers[0]['mom'])\n"
                                      "        return [check_hypers(**{**{k: h[k] for k in hyper_names},\n"
                                      "                               'mom': self._mom}) for h in self.hypers]"),
    'lr read once':                 ('optimizer', 'return [check_hypers(**{k: h[k] for k in hyper_names}) for h in self.hypers]',
                                      "self._lr = getattr(self, '_lr', self.hypers[0]['lr'])\n"
                                      "        return [check_hypers(**{**{k: h[k] for k in hyper_names},\n"
                                      "                               'lr': self._lr}) for h in self.hypers]"),
    'hypers of the first group':     ('optimizer', 'self._update(b, hypers[b.group])', 'self._update(b, hypers[0])'),
    'hypers unchecked':              ('optimizer', 'return [check_hypers(**{k: h[k] for k in hyper_names}) for h in self.hypers]',
                                      'return [{k: float(h[k]) for k in hyper_names} for h in self.hypers]'),
    'gradients zeroed, not released': ('optimizer', 'for p in pg: p.grad = None',
                                       'for p in pg:\n            if p.grad is not None: p.grad.zero_()'),
    'loaded tensors aliased':        ('functional', 'return torch.empty_like(p, requires_grad=False).copy_(t.detach())', 'return t'),
    'shapes unchecked':              ('checkpoint', 'if t.shape != p.shape:', 'if False:'),
    'flags lost on loading':         ('checkpoint', 'return {k: old[k] for k in flags if k in old}', 'return {}'),
    'Lookahead one step late':       ('optimizer', 'if self.count % self.k: return', 'if (self.count-1) % self.k: return'),
    'alpha ignored':                 ('optimizer', 'torch._foreach_lerp_(slow, fast, self.alpha)', 'torch._foreach_lerp_(slow, fast, .5)'),
    'slow weights not saved':        ('optimizer', "'slow_weights': self.slow_weights}", "'slow_weights': None}"),
    'moved between groups unnoticed': ('bucket', 'list(map(len, param_lists)) == self.sizes and ', ''),
    'moved in place unnoticed':      ('bucket', 'self._orders() != self.orders', 'False'),
    'gaps unnoticed':                ('bucket', ',all(map(Tensor.is_contiguous, self.vectors))', ''),
    'averages stay behind':          ('bucket', 'if s[k].device != p.device or layout(s[k]) != order:', 'if False:'),
    'old states kept alive':         ('bucket', 'self.sizes,self.params,self.states,self.idle,self.buckets = [],[],[],[],[]',
                                      'self.sizes,self.params,self.states,self.idle,self.buckets = [],[],[],[],'
                                      'getattr(self, "buckets", [])'),
    'a count set in place unnoticed': ('bucket', ' and bool((self.all == self.count).all())', ''),
    'decay not warmed up':           ('baselines', 'scale_wd=True', 'scale_wd=False'),
    'decay warmed up in one path':   ('functional', '1-lr*wd_mult*wd', '1-lr*wd'),
    'waiting moves the first moment': ('baselines', 'bucket.grad_avgs = kept',
                                       'for o,new in zip(kept, bucket.grad_avgs): o.copy_(new)\n            bucket.grad_avgs = kept'),
    'waiting decays':                ('baselines', "'sgd_phase': 'skip', 'scale_wd'", "'sgd_phase': 'momentum', 'scale_wd'"),
    'one count for both moments':    ('baselines', "unbias = (1", 'unbias = 1. or (1'),
    'decay debiased, too':           ('baselines', "'scale_wd': False}", "'scale_wd': True}"),
    'frozen steps counted as waited': ('baselines', "if self.settings['sgd_phase'] == 'freeze': return", 'pass'),
    'the wait not saved':            ('baselines', "for s in bucket.states: s['waited'] = waited+1", 'pass'),
    'waits mixed':                   ('bucket', "for k in ('step', *self.also)", "for k in ('step',)", 'baselines'),
    'a changed wait unnoticed':      ('bucket', 'if any(len({s.get(k, 0) for s in self.states}) > 1', 'if any(False', 'baselines'),
    'any wait is loaded':            ('baselines', 'if waited > step:', 'if False:'),
    'a wait is forgotten':           ('checkpoint', 'and waited == 0):', '):', 'baselines'),
    'captured in a graph':           ('functional', 'if torch.cuda.is_available() and', 'if False and', 'around'),
    'fake tensors are believed':     ('functional', 'with no_dispatch():', 'if True:', 'around'),
    'debiased in float32':           ('functional', "device.type == 'cpu' or debias_error(step, mom, sqr_mom) <= KERNEL_TOL", 'True',
                                      'around'),
    'β1 debiases well':              ('functional', 'return error(mom) + error(sqr_mom)/2', 'return error(sqr_mom)/2', 'around'),
    'the model is not put back':     ('guard', 'model.load_state_dict(before)', 'pass', 'guard'),
    'the optimizer is not put back': ('guard', "whose,undo = 'model',[*undo, _undo_model(model)]",
                                      "whose,undo = 'model',[_undo_model(model)]", 'guard'),
    'nonsense for a factor':         ('functional', 'if r is not None and not 0 < r < math.inf:', 'if False:'),
    'warm-up one step late':         ('baselines', 'min(1., step/n_steps)', 'min(1., (step-1)/n_steps or 1e-9)'),
    'wait one step short':           ('baselines', 'None if step <= n_steps else 1.', 'None if step < n_steps else 1.'),
    'n_steps unchecked':             ('checkpoint', 'if not isinstance(n, Real) or not least <= n',
                                      'if not isinstance(n, Real) or not 0 <= n'),
    'Adam-eps after debiasing':      ('baselines', 'eps=1e-4, eps_debiased=False', 'eps=1e-4'),
    'r_t of the step before':        ('introspect', 'r = how.lr_factor(step, sqr_mom)', 'r = how.lr_factor(max(1, step-1), sqr_mom)'),
    'a frozen phase moves':          ('introspect', "idle = lr if how.sgd_phase == 'momentum' else 0.", 'idle = lr'),
    'lookahead not looked into':     ('introspect', 'return opt if inner is None else innermost(inner)', 'return opt'),
    'counts of a group averaged':    ('introspect', 'return [sorted(set(counts.values())) for',
                                      'return [sorted({sum(counts.values())//max(1, len(counts))}) for'),
    'skipped steps unmarked':        ('recorder', "'skipped' if self.skipped else 'restart'*", "'restart'*"),
    'skipped steps move':            ('recorder', "if event == 'skipped': now = now._replace(effective_lr=0.)", ''),
    'a restart unmarked':            ('recorder', 'if n and self.last.get((group,i), n-1) != n-1', 'if False'),
    'a restart hidden by a skip':    ('recorder', 'if not self.skipped: self.last.update(', 'self.last.update('),
    'the finder leaves rows':        ('recorder', "self.run,self.how = not in_finder(self.learn) and not hasattr(self, 'gather_preds')",
                                      "self.run,self.how = True"),
    'hypers stay published':         ('recorder', '        if learn.opt is view: learn.opt = opt', '        pass'),
    'the table has the last row':    ('recorder', 'float(rows[rows.adaptive][k].mean())', 'float(rows[k].iloc[-1])'),
    'validation trains':             ('recorder', 'if self.epoch_start is None or not self.in_table or', 'if not self.in_table or'),
    'a foreign file is added to':    ('recorder', 'if data and not data.startswith(header):', 'if False:'),
    'half a line stays':             ('recorder', "f.truncate(data.rfind(b'\\n')+1)", 'pass'),
    'part of a line is written':     ('files', 'with suppress(OSError): f.truncate(size)', 'pass', 'recorder'),
    'rows lost by a full disk':      ('recorder', '    else: self.saved,self.csv_failed = len(self.data),False',
                                      '    finally: self.saved = len(self.data)'),
    'loggers end the run':           ('loggers', "and not self.learn.train_iter: raise", 'or True: raise'),
    'a fit stays sat out':           ('watching', 'self.run,self.begun = True,False', 'self.begun = False', 'recorder'),
    'validation begins':             ('watching', "if event_name == 'before_train' and self.run",
                                      "if event_name == 'before_fit' and self.run", 'guard'),
    'the finder begins':             ('watching', 'not self.begun and not in_finder(self.learn):', 'not self.begun:', 'loggers'),
    'predictions need an optimizer': ('recorder', '        if opt is None: return', '        pass'),
    'a removed recorder stays':      ('recorder', "if event_name == 'before_fit' and rec not in learn.cbs:", 'if False:'),
    'fastai signals swallowed':      ('loggers', 'except _CONTROL: raise', 'except ZeroDivisionError: raise'),
    'the axis is what was asked for': ('finder', 'self.recorder.lrs[-1] *= self.rect', 'pass'),
    'the finder forgets the lr':     ('finder', 'if had_opt: learn.opt.set_hypers(**hypers)', 'if had_opt: pass'),
    'clipping not seen':             ('gradients', 'order = 100 #', 'order = 9 #'),
    'zeros on the axis':             ('gradients', 'right=True) + (x.flatten() != 0)', 'right=True) + 1'),
    'v not debiased':                ('gradients', '/ (1-np.asarray(sqr_mom)**t)[:,None]', '/ 1'),
    'advice counts from zero':       ('advisor', 'range(start+1, start+1+n_steps)', 'range(start+2, start+2+n_steps)'),
    'accumulation unknown to advice': ('advisor', '// batches_per_update(self.learn)', ''),
    'schedule of skipped epochs':    ('advisor', 'f(skipped + (1-skipped)*pct)', 'f(pct)'),
    'waiting is called momentum':    ('advisor', "momentum,first = how.sgd_phase == 'momentum',", 'momentum,first = True,'),
    'schedule of the first group':   ('advisor', 'np.ravel(f(i/n_steps))[-1]', 'np.ravel(f(i/n_steps))[0]'),
    'silent about two warm-ups':     ('advisor', 'if peak and schedule[0] < FULL', 'if False and schedule[0] < FULL'),
    'hypers do not write through':   ('torch_optim', 'set_item_pg(group, self.bwd_map[k], v)', 'pass'),
    'a second state in the wrapper': ('torch_optim', 'def state(self): return self.opt.state',
                                      'def state(self): return self.__dict__.setdefault("_state", defaultdict(dict))'),
}

near_by = dict(introspect=['recorder', 'finder'], torch_optim=['torch_state', 'torch_wrapper']) # whose tests to run next to a module's own
near_tests = dict(functional='numbers') # and first, for those that follow
unbreakable = { # of the guard, the loaders, and where numbers end
    'NaN is loaded':                 ('checkpoint', 'if not t.detach().to(p.dtype).isfinite().all():', 'if False:'),
    'a missing hyper unnoticed':     ('checkpoint', 'if lacks := set(_required) - set(new):', 'if lacks := set():'),
    'three betas':                   ('checkpoint', "two_betas(g['betas'], f'{what}: ')", 'pass'),
    'an average under two names':    ('checkpoint', 'if mixed := set(others) & set(s):', 'if mixed := set():'),
    'text for a number':             ('functional', 'if not isinstance(v, Real): raise', 'if False: raise'),
    'a count beyond counting':       ('checkpoint', 'not least <= n <= 2**53', 'not least <= n < math.inf'),
    'flags of any type':             ('checkpoint', "for k in flags: _expect(s.get(k, True), bool, f'{at}: {k}')", 'pass'),
    'slow weights unchecked':        ('optimizer', 'check_slow_weights(slow, self.param_lists)', 'pass'),
    'checksums ignored':             ('guard', 'if bad := z.testzip():', 'if bad := None:'),
    'code runs':                     ('guard', 'load_model(path, model, opt)', 'load_model(path, model, opt, weights_only=False)'),
    'code runs in a recipe':         ('recipes/checkpoint', "map_location='cpu', weights_only=True",
                                      "map_location='cpu', weights_only=False"),
    'the model is loaded first':     ('guard', '    check_model(model, model_state)\n',
                                      '    check_model(model, model_state)\n    model.load_state_dict(model_state)\n'),
    'no way back':                   ('guard', 'vars(o).clear(), vars(o).update(old)', 'pass'),
    'NaN in a weight':               ('guard', 'if t.is_floating_point() and (~t', 'if False and (~t'),
    'an optimizer is no need':       ('guard', 'if with_opt and opt_state is None: raise', 'if False: raise'),
    'rows of no table':              ('recipes/checkpoint',
                                      "if not all(isinstance(o, dict) and o.keys() == rows[0].keys() for o in rows):",
                                      'if False:'),
    'statistics stay bad':           ('guard', 'if not b.equal(was[1]): b.detach().copy_(was[1])', 'pass'),
    'bad gradients stay':            ('guard', 'self.opt.zero_grad() # or', 'pass # or'),
    'gradients are not looked at':   ('guard', 'values = [*losses, get_total_norm(grads)] if grads else losses', 'values = losses'),
    'losses are not looked at':      ('guard', 'values = [*losses, get_total_norm(grads)] if grads else losses',
                                      'values = [get_total_norm(grads)] if grads else []'),
    'looked at behind the clipping': ('guard', 'order = MixedPrecision.order+.5', 'order = MixedPrecision.order+1.5'),
    'looked at before the unscaling': ('guard', 'order = MixedPrecision.order+.5', 'order = MixedPrecision.order-.5'),
    'one process stops alone':       ('guard', 'if num_distrib() > 1: torch', 'if False: torch'),
    'broken weights are good':       ('guard', 'if bad:\n            return (f"But', 'if False:\n            return (f"But'),
    'the finder is guarded':         ('guard', "self.run = not in_finder(self.learn) and not hasattr(self, 'gather_preds')",
                                      'self.run = True'),
    'skips without end':             ('guard', 'self.n_skipped >= self.max_skips', 'False'),
    'left-over batches unnoticed':   ('guard', 'def after_train(self): self._check([]) # batches', 'def after_train(self): pass # batches'),
    'an unwritable path is late news': ('guard', 'rank_distrib() == 0: check_writable(self._path)', 'False: check_writable(self._path)'),
    'bad gradients count as none':   ('functional', "    if l2: grads = torch",
                                      "    grads = [g.nan_to_num(0., 0., 0.) for g in grads]\n    if l2: grads = torch"),
    'some eps is always there':      ('functional', 'adam = dict(mom=mom, sqr_mom=sqr_mom, eps=eps)',
                                      'adam = dict(mom=mom, sqr_mom=sqr_mom, eps=max(eps, 1e-30))'),
    'long runs count no further':    ('functional', 'kernel_step.fill_(step)', 'kernel_step.fill_(min(step, 65535))'),
    'β2 in half the digits':         ('functional', 'torch._foreach_div_(denoms, math.sqrt(1 - sqr_mom**step))',
                                      'torch._foreach_div_(denoms, math.sqrt(1 - float(torch.tensor(sqr_mom))**step))'),
}
mutants.update(unbreakable)

lasting = { # of jobs that are killed, of disks, command lines and processes; the last word is the test that is to find it
    'a checkpoint written in place': ('files', "tmp = path.with_name(f'.tmp-{path.name}')", 'tmp = path', 'resume'),
    'random numbers go on':          ('recipes/checkpoint', '        set_seed(s)\n', '', 'resume'),
    'the order of items goes on':    ('recipes/checkpoint', 'self.dls.train.rng = random.Random(s)', 'pass', 'resume'),
    'the loss scale starts anew':    ('recipes/checkpoint', "if state['scaler']: scaler.load_state_dict(state['scaler'])", 'pass',
                                      'resume'),
    'the smoothed loss starts anew': ('recipes/checkpoint',
                                      "learn.recorder.smooth_loss.val,learn.recorder.smooth_loss.count = state['smooth_loss']", 'pass',
                                      'resume'),
    'the epoch is trained again':    ('recipes/checkpoint', 'dict(epoch=learn.epoch+1,', 'dict(epoch=max(1, learn.epoch),', 'resume'),
    'the checkpoint goes first':     ('recipes/jobs', "    append_record(out/'records.jsonl', record)\n",
                                      "    if not keep: (out/f\"{record['run']}.pth\").unlink(missing_ok=True)\n"
                                      "    append_record(out/'records.jsonl', record)\n", 'resume'),
    'half a record joined to the next': ('files', "data = b'\\n' + data", 'pass', 'resume'),
    'mixed precision stays on':      ('recipes/precision', 'cast.__exit__(None, None, None)', 'pass', 'resume'),
    'two jobs in a folder':          ('recipes/jobs', "lock = FileLock(out/'.lock').acquire(timeout=0)", 'lock = nullcontext()', 'resume'),
    'half-written files pile up':    ('recipes/jobs', "for p in out.glob('.tmp-*'):", 'for p in []:', 'resume'),
    'PyTorch explains the disk':     ('files', 'return e.__context__ if isinstance(e.__context__, OSError) else e', 'return e', 'disk'),
    'an unwritable folder':          ('recipes/cli', "check(os.access(out, os.W_OK|os.X_OK)", 'check(True', 'disk'),
    'a record that is no record':    ('recipes/jobs', "check_begun(state.get('about'), path)", 'pass', 'mutated'),
    'archives may write anywhere':   ('recipes/data', "filter='data'", "filter='fully_trusted'", 'data'),
    'half an archive':               ('recipes/data', "while t.fileobj.read(2**20): pass", 'pass', 'data'),
    'all unpack at once':            ('files', "lock = FileLock(f'{tmp}.lock').acquire()",
                                      'from contextlib import nullcontext; lock = nullcontext()', 'data'),
    'NaN is in every range':         ('recipes/cli', 'check(lo <= opts[k] <= hi,', 'check(not (opts[k] < lo or opts[k] > hi),', 'fuzz'),
    'an empty list is a value':      ('recipes/cli', 'check(v != [],', 'check(True,', 'fuzz'),
    'any name will do':              ('recipes/cli', 'check(val in allowed,', 'check(True,', 'fuzz'),
    'an error is a traceback':       ('recipes/cli', '            raise SystemExit(2) from None', '            raise', 'fuzz'),
    'half of each batch twice':      ('recipes/distributed', 'b[self.rank*len(b)//self.world_size:(self.rank+1)*len(b)//self.world_size]',
                                      'b[:max(1, len(b)//self.world_size)]', 'distributed'),
    'each process validates alone':  ('recipes/distributed', 'torch.distributed.all_reduce(sums)', 'pass', 'distributed'),
    'any name for a file':           ('recipes/records', 'PureWindowsPath(name).name == name', 'True', 'runs'),
    'links are written through':     ('files', 'tmp.unlink(missing_ok=True) # it may be', 'pass # it may be', 'runs'),
    'NaN is no JSON':                ('recipes/records', "json.dumps(_named(record), default=str, allow_nan=False)",
                                      'json.dumps(record, default=str)', 'runs'),
    'no sync, no file':              ('files', 'if e.errno not in _cannot_sync: raise', 'raise', 'runs'),
    'HTML in a table':               ('recipes/report', 'html.escape(_printable(o), quote=False)', '_printable(o)', 'runs'),
    'a seed counts twice':           ('recipes/report', 'list({(_asked(r), r[\'seed\']): r for r in records}.values())', 'list(records)',
                                      'recipes'),
    'a forgotten resume':            ('recipes/jobs', 'if not (resume or anew): check_finished(', 'if False: check_finished(', 'resume'),
    'another job is this one':       ('recipes/jobs', 'plain(dict(recipe=recipe, ', "plain(dict(recipe=found['recipe'], ", 'resume'),
    'a finished checkpoint stays':   ('recipes/jobs', "p.record.get('kept') is False and", 'False and', 'resume'),
    'a group takes anothers name':   ('recipes/report', 'for i,f in same.items(): names[i]', 'for i,f in (): names[i]', 'runs'),
    'weights of NaN are accurate':   ('experiments/sweep', "end.get('valid_loss', 0.)", '0.', 'experiments'),
    'archives of one name are one':  ('recipes/data', 'cache_folder()/fingerprint(archives)/name', 'cache_folder()/name', 'data'),
    'other runs are gone on with':   ('recipes/jobs', 'for p in plan: check(not p.differs, p.differs)', 'pass', 'resume'),
    'sums in capitals':              ('recipes/data', 'name: digits.lower()', 'name: digits', 'data'),
    'the others are silent':         ('recipes/cli', 'if not (is_main() or everywhere): return', 'if not is_main(): return', 'distributed'),
    'workers outlive their job':     ('recipes/parallel', 'while os.getppid() == parent:', 'while True:', 'parallel'),
    'a copy for each worker':        ('recipes/parallel', 'mmap=True', 'mmap=False', 'parallel'),
    'all on the first GPU':          ('recipes/parallel', 'i % torch.cuda.device_count()', '0', 'parallel'),
    'threads for all':               ('recipes/parallel', 'max(1, cpus//n)', 'cpus', 'parallel'),
    'a call without end':            ('recipes/parallel', "if deaths[name,notes.get(name)] < 3: continue", 'continue', 'parallel'),
    'an error of one ends all':      ('recipes/parallel', '    except Exception as e: return Outcome(name, error',
                                      '    except KeyError as e: return Outcome(name, error', 'parallel'),
    'records as they came':          ('recipes/jobs', "sort_records(out/'records.jsonl', list(records))", 'pass', 'parallel'),
    'checkpoints of a job that ended': ('recipes/jobs', 'EpochCheckpoint.order-1', 'EpochCheckpoint.order+1', 'parallel'),
    'the plan is for one':           ('recipes/jobs', 'max(sum(left)/n, *left)', 'sum(left)', 'parallel'),
    'a run is shared':               ('recipes/jobs', 'max(sum(left)/n, *left)', 'sum(left)/n', 'parallel'),
    'underscores are unknown':       ('recipes/cli', "name.replace('_', '-') + equals + value", 'word', 'recipes'),
}
mutants.update(lasting)

schedule_free = { # name: (what is there, what stands there instead)
    'x with another β1 than y':      ("g['betas'] = betas\n    self.opt.eval()", 'pass\n    self.opt.eval()'),
    'y is saved':                    ('    self.eval()\n    return self.opt.state_dict()', '    return self.opt.state_dict()'),
    'Ctrl-C stays at y':             ('            learn.opt.eval()\n', '            pass\n'),
    'forgets at y':                  ('    self.eval()\n    for g in self.opt.param_groups: g.update',
                                      '    for g in self.opt.param_groups: g.update'),
    'norms and biases decay':        ("self.state[p].get('do_wd', True)", 'True'),
    'groups do not count':           ('g.update({k: half[k] for k in _counters})', 'None'),
    'counts survive freezing':       ('    for g in self.opt.param_groups: g.update({k: self.opt.defaults[k] for k in _counters})\n', ''),
    "the file's tensors are kept":   ('deepcopy(sd)', 'sd'),
    "the file's β1 is not y's":      ('self.state[p]}\n    self._made_with = self._betas()', 'self.state[p]}'),
    'random numbers move on':        ('with no_random(),_same', 'with _same'),
    'the data moves on':             ('        for o,rng in rngs: o.rng = rng\n', ''),
    'the data of PyTorch moves on':  ('        for g,state in states: g.set_state(state)\n', ''),
    'a limit ends the run': ('except (CancelTrainException, CancelEpochException, CancelFitException)', 'except ZeroDivisionError'),
    'a limit does not count':        ('for learn.iter,b in', 'for _,b in'),
    'hooks stay':                    (',HookCallback,', ','),
    'calibration is compiled':       ("'force_eager'", "'default'"),
    'the finder leaves statistics':  ('if not in_finder(learn): ', ''),
    'a cancelled fit keeps those of y': ('    def after_fit(self): self._calibrate()\n', ''),
    'momentum of the norms is lost': ('m.momentum = momentum', 'pass'),
    'frozen norms are computed':     (' and m.training and', ' and'),
    'trains before the schedule':    ('order = ParamScheduler.order+1', 'order = -9')}
mutants.update({name: ('schedule_free', *change, 'schedule_free') for name,change in schedule_free.items()})

gpu = { # what `radam-bench gpu` and images in memory promise; of the CUDA tests, what a CPU can show
    'a failure is a success':        ('bench/gpu', "'failed' if proc.wait(secs) else", "'done' if proc.wait(secs) else", 'bench'),
    'a part outlives the command':   ('bench/gpu', 'for s in (signal.SIGTERM, signal.SIGHUP)}', 'for s in ()}', 'bench'),
    'what a part began outlives it': ('bench/gpu', 'os.killpg(proc.pid, signal.SIGKILL)', 'proc.kill()', 'bench'),
    'done is done again':            ('bench/gpu', 'if asked in done:', 'if False:', 'bench'),
    'any device counts':             ('bench/gpu', " and r['device_name'] == here['device_name']", '', 'bench'),
    'one part takes all the time':   ('bench/gpu', 'min(left, 60*o.minutes*part.share)', 'left', 'bench'),
    'time without end':              ('bench/gpu', 'elif left <= 0:', 'elif False:', 'bench'),
    'all seeds of one preset first': ('bench/gpu', 'for n in range(1, 2 if quick else SEEDS+1) for o in PRESETS[:2 if quick else None]]',
                                      'for o in PRESETS[:2 if quick else None] for n in range(1, 2 if quick else SEEDS+1)]', 'bench'),
    'the CPU has a GPU':             ('bench/gpu', "only(device)", '{}', 'bench'),
    'calls within calls count':      ('bench/step', " and not (e.cpu_parent and e.cpu_parent.name.startswith('aten::'))", '', 'bench'),
    'waits before it looks at the clock': ('bench/step', 'returned = time.perf_counter(); sync()', 'sync(); returned = time.perf_counter()',
                                           'bench'),
    'new pixels skip old ones':      ('recipes/in_memory', '/scale.clamp(min=1))', ')', 'data'),
    'mirrored crops are elsewhere':  ('recipes/in_memory', 'self.wide-sz[0]-x if self.mirrored else x', 'x', 'data'),
    'crops follow from one another': ('recipes/in_memory', '        self.seed_item(s)\n        return self.after_item(',
                                      '        return self.after_item(', 'data'),
    'changed images stay':           ('recipes/data', ' {s.st_mtime_ns}', '', 'data'),
    'a damaged file is used':        ('recipes/in_memory', 'if n != len(pixels): raise', 'if False: raise', 'data'),
    'how images are read is forgotten': ('recipes/imagenette', "if in_memory: options['in_memory'] = True", 'pass', 'bench')}
cuda = { # name: (module, what is there, what stands there instead), for tests/test_cuda.py on a CPU
    'r_t is lost':                   ('functional', 'decouple_wd=decouple_wd, lr=lr*lr_mult,', 'decouple_wd=decouple_wd, lr=lr,'),
    'L2 is forgotten':               ('functional', 'kernel = torch._fused_adamw_ if decouple_wd else torch._fused_adam_',
                                      'kernel = torch._fused_adamw_'),
    'foreach is another rule':       ('functional', 'torch._foreach_div_(denoms, math.sqrt(1 - sqr_mom**step))', 'pass'),
    'squares are rounded':           ('functional', 'if r and fused and not beta and', 'if r and False and'),
    'debiased by a float32':         ('functional', 'decouple_wd=decouple_wd, lr=lr*lr_mult,',
                                      'decouple_wd=decouple_wd,\n                     lr=lr*lr_mult*math.sqrt('
                                      '(1-float(np.float32(sqr_mom))**step)/(1-sqr_mom**step)),'),
    'momentum is not debiased':      ('functional', 'alpha=-lr*lr_mult/(1 - mom**step))\n    else', 'alpha=-lr*lr_mult)\n    else'),
    'moved states are empty':        ('functional', '.copy_(t.detach())', '.zero_()'),
    'the scaler is ignored':         ('optimizer', 'class AdamBase(Optimizer):',
                                      'class AdamBase(Optimizer):\n    _step_supports_amp_scaling = True'),
    'one count for all optimizers':  ('bucket', '        radam_step_(*part, self.counter.count+1,',
                                      "        vars(self.keys)['n'] = vars(self.keys).get('n', 0)+1\n"
                                      "        radam_step_(*part, self.keys.n,"),
    'the recorder reads a weight':   ('recorder', '        super().stepped()\n        if self.csv',
                                      '        next(self.learn.model.parameters()).sum().item()\n        super().stepped()\n'
                                      '        if self.csv'),
    'the kernel is waited for':      ('functional', 'steps = [kernel_step.fill_(step)] * len(params)',
                                      'steps = [kernel_step.fill_(step)] * len(params); kernel_step.item()'),
    'momentum is waited for':        ('functional', 'torch._foreach_lerp_(grad_avgs, grads, 1-mom)',
                                      'torch._foreach_lerp_(grad_avgs, grads, 1-mom); grads[0].sum().item()'),
    'a launch for each tensor':      ('bucket', 'if foreach is False else [lists]', 'if foreach is not True else [lists]'),
    'gradients lie row by row':      ('bucket', 'if layout(p) != layout(g): ', 'if False: '),
    'weights are laid out as before': ('bucket', 'or self._places() != self.places or self._orders() != self.orders', ''),
    'averages are on one device':    ('bucket', 'if s[k].device != p.device or layout(s[k]) != order: s[k] = copy_like(s[k], p)',
                                      's[k] = s[k].cpu()'),
    'devices are mixed':             ('bucket', 'fused, p.device, p.dtype', "fused, torch.device('cpu'), p.dtype"),
    'crops are read back':           ('recipes/in_memory', 'return torch.einsum(', 'old.sum().item()\n    return torch.einsum(')}
mutants.update(gpu, **{name: (*change, 'cuda') for name,change in cuda.items()})

def planted(
    name:str # One of `mutants`
)->tuple: # Path of the module, and its source with the mutant in it
    "The mutant `name`, which must fit in one place"
    module,old,new,*_ = mutants[name]
    path = Path(f'radam_fastai/{module}.py')
    src = (root/path).read_text()
    assert src.count(old) == 1, f'{name}: {old!r} stands {src.count(old)} times in {path}'
    return path,src.replace(old, new)

def caught(
    name:str # One of `mutants`
)->str: # The first test that failed, or nothing
    "Run the tests on a copy of the project with the mutant `name` in it"
    (path,src),(module,_,_,*nearest) = planted(name),mutants[name]
    with tempfile.TemporaryDirectory() as d:
        for o in 'radam_fastai','tests': shutil.copytree(root/o, Path(d)/o, ignore=shutil.ignore_patterns('__pycache__'))
        (Path(d)/'nbs').symlink_to(root/'nbs') # which some tests read
        (Path(d)/path).write_text(src)
        near = [near_tests.get(module, 'mutated'), 'guard', 'mutated'] if name in unbreakable else [module, *near_by.get(module, [])]
        tests = [f'tests/test_{t}.py' for t in nearest or sorted(modules, key=lambda t: near.index(t) if t in near else len(near))]
        env = {**os.environ, 'PYTHONPATH': d}
        res = subprocess.run([sys.executable, '-m', 'pytest', '-x', '-q', '-p', 'no:cacheprovider', *tests], cwd=d, env=env,
                             capture_output=True, text=True)
        return next((l.split(' - ')[0] for l in res.stdout.splitlines() if l.startswith(('FAILED', 'ERROR'))), '')

if __name__ == '__main__':
    names = sys.argv[1:] or list(mutants)
    found = {}
    for n in names:
        found[n] = caught(n)
        print(f'{n:32} {found[n] or "SURVIVED"}', flush=True)
    print(f'{sum(map(bool, found.values()))} of {len(names)} mutants caught')
    sys.exit(not all(found.values()))
