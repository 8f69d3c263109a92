"""The notebooks are the source: the modules and README.md are exactly what they give."""
import os, re, runpy, shutil, subprocess, sys
from pathlib import Path

import pytest

root = Path(__file__).resolve().parent.parent
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
        if p != lib/'__init__.py': p.unlink() # else a module whose notebook is gone would stay unseen
    run('nbdev-export', copy)
    diff = differing(files(root/'radam_fastai', '*.py'), files(lib, '*.py'))
    assert not diff, f'radam_fastai/ is not what the notebooks give, in {diff}: run `make export` after editing the notebooks, and delete what has none'

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
