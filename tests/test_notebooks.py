"""The notebooks are the source: the modules and README.md are exactly what they give; modules import from the layers below."""
import ast
import builtins
import os
import re
import runpy
import shutil
import subprocess
import sys
from configparser import ConfigParser
from importlib.util import resolve_name
from pathlib import Path
from unittest.mock import MagicMock

import pytest
from fastcore.nbio import read_nb

root = Path(__file__).resolve().parent.parent
tutorials = sorted((root/'nbs/tutorials').glob('*.ipynb'))
scripts = Path(sys.executable).parent

def files(path, pattern):
    "Bytes of the files below `path`, by relative path"
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in sorted(path.rglob(pattern))
            if not {'__pycache__', '.ipynb_checkpoints'} & set(p.parts)}

def differing(a, b): return sorted(k for k in a.keys() | b.keys() if a.get(k) != b.get(k))

@pytest.fixture
def copy(tmp_path):
    "A copy of what nbdev reads and writes"
    for d in 'nbs','radam_fastai': shutil.copytree(root/d, tmp_path/d, ignore=shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints'))
    shutil.copy(root/'pyproject.toml', tmp_path)
    return tmp_path

def run(cmd, cwd):
    env = {k:v for k,v in os.environ.items() if k != 'IN_TEST'} # nbdev-export does nothing while nbdev-test runs
    res = subprocess.run([scripts/cmd], cwd=cwd, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert res.returncode == 0 and 'Failed' not in res.stderr, f'{cmd}: {res.stdout}{res.stderr}'

def test_modules_match_notebooks(copy):
    lib = copy/'radam_fastai'
    for p in lib.rglob('*.py'):
        if p.name != '__init__.py': p.unlink() # else a module whose notebook is gone would stay unseen
    run('nbdev-export', copy)
    diff = differing(files(root/'radam_fastai', '*.py'), files(lib, '*.py'))
    assert not diff, f'not what the notebooks give: {diff}: run `make export`, and delete a module that has no notebook'

def test_notebooks_are_clean(copy):
    before = files(copy/'nbs', '*.ipynb')
    run('nbdev-clean', copy)
    diff = differing(before, files(copy/'nbs', '*.ipynb'))
    assert not diff, f'not clean: {diff}: run `make export`'

def test_readme_matches_index():
    tool = runpy.run_path(root/'tools/readme.py')
    made = tool['readme'](root)
    figures = root/tool['FIGURES']
    saved = {'README.md': (root/'README.md').read_bytes(), **{f'{figures.name}/{k}': v for k,v in files(figures, '*.*').items()}}
    diff = differing(made, saved)
    assert not diff, f'{diff} not what nbs/index.ipynb gives: run `make readme`'

def test_readme_links_exist():
    links = re.findall(r'\]\(([^\s()#]+)', (root/'README.md').read_text())
    missing = [l for l in links if '://' not in l and not (root/l).exists()]
    assert not missing, f'README.md links to files that are not there: {missing}: mend nbs/index.ipynb and run `make readme`'

LAYERS = [range(1), [1, *range(20, 30)], range(2, 10), range(10, 20), range(30, 50), range(50, 70), range(90, 100)] # numbers of notebooks
modules = {p: int(m[1]) for p in sorted((root/'radam_fastai').rglob('*.py')) # by the number of their notebook
           if (m := re.search(r'File to edit: .*/(\d\d)_', p.read_text()))}

def imported(path):
    "The modules of the package that a module imports"
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom): continue
        name = '.'*node.level + (node.module or '')
        parts = resolve_name(name, '.'.join(path.relative_to(root).parent.parts)).split('.')
        for p in [root.joinpath(*parts), *(root.joinpath(*parts, o.name) for o in node.names)]:
            if p.with_suffix('.py') in modules: yield p.with_suffix('.py')

@pytest.mark.parametrize('path', modules, ids=lambda p: p.relative_to(root/'radam_fastai').as_posix())
def test_modules_import_from_layers_below(path):
    def layer(p): return next(i for i,notebooks in enumerate(LAYERS) if modules[p] in notebooks)
    def may(p): return layer(p) < layer(path) or layer(p) == layer(path) and p.parent == path.parent
    wrong = [p.name for p in imported(path) if not may(p)]
    assert not wrong, f'{path.name} imports from {wrong}: see "How it is built" in CONTRIBUTING.md'

@pytest.mark.parametrize('path', tutorials, ids=lambda p: p.stem)
def test_tutorials_open_in_colab(path):
    "From a badge below the title; the first code cell installs the package there, and does nothing elsewhere"
    setup = ConfigParser(delimiters=['='], interpolation=None)
    setup.read(root/'setup.cfg', encoding='utf-8')
    url,folder = setup['metadata']['url'],path.parent.relative_to(root)
    title,badge,install,*_ = read_nb(path).cells
    assert title.source.startswith('# ')
    address = url.replace('https://github.com', 'https://colab.research.google.com/github')
    assert badge.source.endswith(f']({address}/blob/main/{folder}/{path.name})'), 'name the notebook where it is now'
    assert install.has_directive('hide') and install.directive('eval') == 'false', 'nbdev-test and the site leave it out'
    steps = ["if 'google.colab' in sys.modules:", f'git clone -q {url}', 'pip install', f"%cd {setup['metadata']['name']}/{folder}"]
    assert re.search('.*'.join(map(re.escape, steps)), install.source, re.S)

class Names(dict):
    "What a cell finds where none ran before it: a stand-in for each name"
    def __missing__(self, name): return getattr(builtins, name) if hasattr(builtins, name) else MagicMock(name=name)

@pytest.mark.parametrize('path', [p for p in tutorials if 'RADAM_DATA' in p.read_text()], ids=lambda p: p.stem)
def test_tutorials_need_no_archives(path, monkeypatch):
    monkeypatch.delenv('RADAM_DATA', raising=False)
    for c in read_nb(path).cells:
        if c.cell_type == 'code' and 'RADAM_DATA' in c.source: exec(c.source, {}, Names(os=os))
