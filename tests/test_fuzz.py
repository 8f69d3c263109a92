"""Thousands of command lines, drawn by a seeded generator: a wrong one ends in one clear line and status 2, never in a traceback."""
import inspect
import random
from importlib import import_module

import pytest
from fastcore.script import anno_parser

from helpers import FULL, MODULES, run_command, tally

pytestmark = pytest.mark.slow

N = 600 if FULL else 40 # command lines of each kind for each command

class Reached(Exception): "The command would have begun its work"

@pytest.fixture
def command(monkeypatch, capsys, tmp_path, images):
    "Run a command up to the point where it would begin to work: exit status, or 'reached'; what went to stderr"
    monkeypatch.chdir(tmp_path)
    def begin(*a, **kw): raise Reached
    for m in 'demo','imagenette','experiment': monkeypatch.setattr(import_module(f'radam_fastai.{MODULES[m]}'), 'run_job', begin)
    bench,im = import_module('radam_fastai.bench.main'),import_module('radam_fastai.recipes.imagenette')
    for k,b in bench.BENCHES.items(): monkeypatch.setitem(bench.BENCHES, k, b._replace(run=begin))
    monkeypatch.setattr(im, 'find_images', lambda path, *a: (images, 'made up') if path is None else (path, 'a folder')) # no download
    def _command(name, *args):
        try: run_command(name, args, monkeypatch, tmp_path)
        except Reached: status = 'reached'
        except SystemExit as e: status = e.code or 0
        return status,capsys.readouterr().err
    return _command

def parser(name): return anno_parser(inspect.unwrap(import_module(f'radam_fastai.{MODULES[name]}').main), pos=['name','what'])

def options(name):
    "The options of a command that take a value, and the type of each"
    return [(a.option_strings[0], a.type)
            for a in parser(name)._actions if a.option_strings and a.nargs != 0 and a.option_strings[0] not in ('-h','--pdb','--xtra')]

TEXT = ['', ' ', 'abc', '½', '0x10', '1,2', '1e', '--', '\\n', "'", '€'*50, 'x'*1000, '../..', '\x07']
NO_NUMBER,NO_INT = ['abc','½','1,2','1e','x'*200],['1.5','1e3','inf','nan']
FAR = {int:['-1','-99999999999999999999','99999999999999999999'], float:['-1','nan','inf','-inf','1e300']}

def answered(status, err, line):
    "A clear line on stderr, and nothing of Python's"
    tally['wrong command lines', 'answered in one line'] += 1
    assert status == 2, f'{line}: {status}'
    last = err.rstrip('\n').splitlines()[-1]
    assert 'Traceback' not in err and last.startswith('radam-') and len(last) < 1500, f'{line}: {err}'
    return last

@pytest.mark.parametrize('name', MODULES)
def test_wrong_type_or_far_out_of_range(command, name, tmp_path):
    "Each is certain to be wrong, so each must be refused, by the name of its option"
    rng = random.Random(f'{name} far')
    numeric = [(o, t) for o,t in options(name) if t in (int, float)]
    assert len(numeric) >= 3
    for i in range(N):
        option,type = rng.choice(numeric)
        value = rng.choice(NO_NUMBER + FAR[type] + (NO_INT if type is int else []))
        line = [*(['lr-robustness'] if name == 'experiment' else []), f'{option}={value}']
        assert option in answered(*command(name, *line), line), line
    assert {p.name for p in tmp_path.iterdir()} <= {f'radam-{name}'} # nothing was made

@pytest.mark.parametrize('name', MODULES)
def test_unknown_words(command, name):
    "Options that do not exist, names that are no choice"
    rng = random.Random(f'{name} words')
    named = {'demo':['--lr'], 'imagenette':['--preset','--opt','--arch','--act-fn','--pool','--aug','--sched','--sa','--norm','--fp16'],
             'experiment':['--budget','--opts','--lrs'], 'bench':['--models','--optims','--device']}[name]
    for i in range(N):
        word = rng.choice('yz_ä') + ''.join(rng.choices('abcxyz_ä7 ,;$\'"', k=rng.randint(0, 11))) # which no option begins with
        line = rng.choice([[f'--{word}'], [f'{rng.choice(named)}=!{word}'], [f'!{word}', 'more']])
        answered(*command(name, *(['language'] if name == 'experiment' and line[0].startswith('--') else []), *line), line)

@pytest.mark.parametrize('name', MODULES)
def test_anything_at_all(command, name):
    "Several options with any values: the command begins its work or says what is wrong; reports and dumps may end well"
    rng,seen = random.Random(f'{name} any'),{}
    opts = options(name)
    flags = [a.option_strings[0] for a in parser(name)._actions if a.option_strings and a.nargs == 0
             and a.option_strings[0] not in ('-h','--pdb')]
    def value(option, type):
        return rng.choice(TEXT + NO_INT + FAR[float] + ['0','1','2','16','64','1e-3','.5','radam','adam','xresnet18','flat_cos','Mish',
                                                        'cpu','small'])
    first = {'experiment':['lr-robustness','language','adam-2k','degenerate','no-such'],
             'bench':['step','callback','train','no-such']}.get(name)
    for i in range(N):
        chosen = rng.sample(opts, rng.randint(1, min(4, len(opts))))
        line = [*([rng.choice(first)] if first else []), *(f'{o}={value(o, t)}' for o,t in chosen),
                *rng.sample(flags, rng.randint(0, min(2, len(flags))))]
        if any(s.startswith('--out=/') or '\x00' in s for s in line): continue
        status,err = command(name, *line)
        if status in ('reached', 0): tally['command lines of any words', 'sound'] += 1
        else: answered(status, err, line)
        seen[status] = seen.get(status, 0) + 1
    assert seen.get(2, 0) > 5, seen

CONTRADICTIONS = {'imagenette':[['--fp16','1','--bf16','1'], ['--sa','0','--sym','1'], ['--sched','flat_cos','--div','3'],
                                ['--sched','flat','--pct-start','.5'], ['--bs','4096'], ['--n-items','5'],
                                ['--size','17','--pool','MaxPool']],
    'experiment':[['variance','--opts','sgd'], ['lr-robustness','--bs','4000'], ['language','--n-items','20'], ['adam-2k','--lrs','']],
    'demo':[['--bs','4096']], 'bench':[['train','--models','small'], ['callback','--optims','torch']]}

@pytest.mark.parametrize('name,line', [(n, l) for n,ls in CONTRADICTIONS.items() for l in ls])
def test_options_that_contradict(command, name, line): answered(*command(name, *line), line)
