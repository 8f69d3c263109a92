"""The package's facts agree wherever they are written, and it builds and installs."""
import re
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from importlib import import_module
from pathlib import Path
from shutil import copytree, ignore_patterns

import pytest

import radam_fastai

tomllib = import_module('tomllib' if sys.version_info >= (3, 11) else 'tomli')

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group('packaging')]
root = Path(__file__).resolve().parent.parent

def ini(name):
    cfg = ConfigParser(delimiters=['='], interpolation=None)
    cfg.read(root/name, encoding='utf-8')
    return cfg

def lines(s): return s.strip().splitlines()

setup,facts,toml = ini('setup.cfg'),ini('settings.ini')['DEFAULT'],tomllib.loads((root/'pyproject.toml').read_text())
meta,options,extras = setup['metadata'],setup['options'],setup['options.extras_require']
scripts = lines(setup['options.entry_points']['console_scripts'])

@pytest.mark.parametrize('fact,value', [
    ('version', radam_fastai.__version__), ('lib_name', meta['name']), ('lib_path', radam_fastai.__name__),
    ('description', meta['description']), ('keywords', meta['keywords']), ('author', meta['author']),
    ('license', meta['license_expression']), ('min_python', options['python_requires'].removeprefix('>=')),
    ('requirements', ' '.join(lines(options['install_requires']))),
    *((f'{k}_requirements', ' '.join(lines(extras[k]))) for k in ('dev', 'docs')),
    ('git_url', meta['url']),
    ('console_scripts', '\n'.join(s.replace(' ', '') for s in scripts)),
    *((k, toml['tool']['nbdev'][k]) for k in ('nbs_path', 'lib_path', 'branch'))])
def test_settings_ini_agrees(fact, value):
    assert facts[fact] == value, f'settings.ini has another {fact}: mend it there'

def test_addresses_agree():
    "Of the repository and of the site that its owner's GitHub Pages serve"
    urls = dict(o.split(' = ') for o in lines(meta['project_urls']))
    assert facts['git_url'] == f"https://github.com/{facts['user']}/{facts['lib_name']}"
    assert urls['Documentation'] == facts['doc_host'] + facts['doc_baseurl'] == f"https://{facts['user']}.github.io/{facts['lib_name']}/"
    assert all(o.startswith(facts['git_url']) for k,o in urls.items() if k != 'Documentation')

def test_metadata_is_in_one_place():
    assert meta['version'] == 'attr: radam_fastai.__version__'
    assert set(toml) == {'build-system', 'tool'}, 'package metadata belongs in setup.cfg'

@pytest.mark.parametrize('entry', scripts + lines(setup['options.entry_points']['nbdev']))
def test_entry_points_exist(entry):
    module,name = entry.split('=')[1].strip().split(':')
    assert hasattr(import_module(module), name)
@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    "A wheel built from the sdist of a copy of the project, so that both are complete"
    pytest.importorskip('build')
    src = tmp_path_factory.mktemp('build')/'src'
    copytree(root, src, ignore=ignore_patterns('.git', '.venv', '__pycache__', '.ipynb_checkpoints', 'runs', 'build', 'dist', '_docs',
                                               '*.egg-info'))
    res = subprocess.run([sys.executable, '-m', 'build', '--no-isolation', '-o', src/'dist', src], capture_output=True, text=True)
    assert res.returncode == 0, res.stdout + res.stderr
    assert (src/'dist'/f'radam_fastai-{radam_fastai.__version__}.tar.gz').exists()
    return next((src/'dist').glob('*.whl'))

def test_wheel_holds_the_package_alone(wheel):
    info = f'radam_fastai-{radam_fastai.__version__}.dist-info/'
    with zipfile.ZipFile(wheel) as z: names,entries,md = z.namelist(),*(z.read(info+f).decode() for f in ('entry_points.txt', 'METADATA'))
    modules = {p.relative_to(root).as_posix() for p in (root/'radam_fastai').rglob('*.py')}
    typed = 'radam_fastai/py.typed' # type checkers read the annotations
    assert {n for n in names if not n.startswith(info)} == modules | {typed}
    assert info+'licenses/LICENSE' in names
    assert set(scripts) < set(lines(entries)) and '[nbdev]' in entries
    head = set(md.splitlines())
    assert {f'Version: {radam_fastai.__version__}', 'License-Expression: Apache-2.0', 'Requires-Python: >=3.10',
            *(f'Provides-Extra: {e}' for e in extras)} <= head

def test_links_of_the_description_are_absolute(wheel):
    "Each leads to a file of the repository that there is, pictures to the file itself; README.md keeps relative ones"
    with zipfile.ZipFile(wheel) as z: md = z.read(f'radam_fastai-{radam_fastai.__version__}.dist-info/METADATA').decode()
    readme,shown = ([(bang, link) for bang,link in re.findall(r'(!?)\[[^]]*\]\(([^\s()#]+)', text)]
                    for text in ((root/'README.md').read_text(), md.split('\n\n', 1)[1]))
    assert len(readme) == len(shown) and not any(link.startswith(facts['git_url']) for _,link in readme)
    for (bang,ours),(_,theirs) in zip(readme, shown):
        if ours.startswith('https://'): assert theirs == ours
        else:
            assert theirs == f"{facts['git_url']}/{'raw' if bang else 'blob'}/{facts['branch']}/{ours}"
            assert (root/ours).exists()

def test_package_index_can_show_it(wheel):
    pytest.importorskip('twine')
    res = subprocess.run([sys.executable, '-m', 'twine', 'check', '--strict', *wheel.parent.iterdir()], capture_output=True, text=True)
    assert res.returncode == 0, res.stdout + res.stderr

def test_wheel_installs(wheel, tmp_path):
    "Without the network, and it is the installed copy that is imported"
    pip = [sys.executable, '-m', 'pip', 'install', '-q', '--no-index', '--no-deps', '--target', tmp_path, wheel]
    subprocess.run(pip, check=True)
    code = 'import radam_fastai as r; print(r.__file__, r.__version__)'
    out = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True, check=True).stdout.split()
    assert out == [str(tmp_path/'radam_fastai'/'__init__.py'), radam_fastai.__version__]
