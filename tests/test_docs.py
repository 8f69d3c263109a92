"""The site: every link leads somewhere, every notebook has a page, and a reader sees what is meant for him."""
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

root = Path(__file__).resolve().parent.parent
pytestmark = [pytest.mark.docs, pytest.mark.slow, pytest.mark.xdist_group('docs')]
NOTEBOOKS = [p for p in sorted((root/'nbs').rglob('*.ipynb')) if p.name != 'index.ipynb' and p.parent.name != '.ipynb_checkpoints']
ALL = next(p for p in NOTEBOOKS if '#| default_exp all"' in p.read_text()).relative_to(root/'nbs').as_posix()

def cell(source, *outputs, kind='code'):
    code = dict(execution_count=None, outputs=[dict(output_type='stream', name='stdout', text=o) for o in outputs])
    return dict(cell_type=kind, id=f'c{abs(hash(source))}', metadata={}, source=source, **(code if kind == 'code' else {}))

NEW = [cell('# A page that was new\n\n> Its subtitle', kind='markdown'),
       cell(f'See [everything](../{ALL}), `RAdamFn`, $x_t^2$ and [the tests](../../tests/README.md).', kind='markdown'),
       cell('#| hide\nhidden = 1', 'hidden output\n'), cell('#| echo: false\nunechoed = 1', 'echoed output\n'),
       cell('#| output: false\nmuted = 1', 'muted output\n'), cell('shown = 1', 'step 1\rstep 2\nlast line\n'),
       cell('\n'.join(f'assert folded != {i}' for i in range(20)), 'output of the fold\n')]

class Page(HTMLParser):
    "What a page links to, its anchors and pictures, and the text that shows unfolded (`text`) and in all (`whole`)"
    def __init__(self, path):
        super().__init__()
        self.links,self.images,self.ids,self.text,self.whole,self.open,self.h1 = [],[],{''},'','',[],''
        self.feed(path.read_text())
    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids |= {attrs.get('id'), attrs.get('name')}
        if tag == 'a': self.links.append(attrs.get('href') or '')
        if tag in ('script', 'link', 'img'): self.images.append(attrs.get('src') or attrs.get('href') or '')
        if tag in ('details', 'summary', 'script', 'article', 'h1'): self.open.append(tag)
    def handle_endtag(self, tag):
        if tag in self.open: self.open.remove(tag)
    def handle_data(self, data):
        if 'article' not in self.open or 'script' in self.open: return
        self.whole += data
        if 'details' not in self.open or 'summary' in self.open: self.text += data
        if 'h1' in self.open: self.h1 += data.removesuffix('¶')

@pytest.fixture(scope='module')
def site(tmp_path_factory):
    "The site, built from a copy of the project with two more pages, which nothing lists"
    for o in 'material','latex2mathml': pytest.importorskip(o)
    src = tmp_path_factory.mktemp('docs')/'src'
    for o in 'nbs','docs','tools','tests','index_files': shutil.copytree(root/o, src/o, ignore=shutil.ignore_patterns('__pycache__'))
    for p in root.iterdir():
        if p.is_file(): shutil.copy(p, src)
    for o in 'nbs','docs': (src/o/'how_to').mkdir(exist_ok=True)
    (src/'nbs/how_to/07_new.ipynb').write_text(json.dumps(dict(cells=NEW, metadata={}, nbformat=4, nbformat_minor=5)))
    (src/'docs/how_to/plain.md').write_text('# A plain page\n')
    cmd = [sys.executable, '-m', 'mkdocs', 'build', '--strict', '-q', '-d', src.parent/'site']
    res = subprocess.run(cmd, cwd=src, env={**os.environ, 'PYTHONPATH': str(root)}, capture_output=True, text=True)
    assert res.returncode == 0, res.stdout + res.stderr
    return src.parent/'site'

@pytest.fixture(scope='module')
def pages(site): return {p.relative_to(site).as_posix(): Page(p) for p in site.rglob('*.html')}

def test_no_link_is_broken(site, pages):
    broken = []
    for name,page in pages.items():
        if name == '404.html': continue # its links are absolute, for wherever it is shown
        for link in page.links + page.images:
            url = urlsplit(link)
            if url.scheme or url.netloc: continue
            to = ((site/name).parent/unquote(url.path)).resolve() if url.path else site/name
            if to.is_dir(): to = to/'index.html'
            if not to.exists() or to.suffix == '.html' and unquote(url.fragment) not in pages[to.relative_to(site).as_posix()].ids:
                broken.append((name, link))
    assert not broken

def test_every_notebook_has_a_page_that_the_navigation_lists(pages):
    titles = [re.search(r'^# (.+)', c, re.M)[1] for p in NOTEBOOKS
              for c in [next(''.join(c['source']) for c in json.loads(p.read_text())['cells'] if c['cell_type'] == 'markdown')]]
    heads = {page.h1.strip(): name for name,page in pages.items()}
    plain = [re.sub('[`*]', '', t).strip() for t in titles]
    assert not [t for t in plain if t not in heads]
    nav = (pages['index.html'].links)
    assert not [heads[t] for t in plain + ['A page that was new', 'A plain page'] if heads[t].removesuffix('index.html') not in nav]

def test_no_directive_shows(pages):
    assert not [(name, m) for name,page in pages.items() for m in re.findall(r'^\s*#\s?\|.*', page.whole, re.M)]

def test_no_memory_address_shows(pages):
    assert not [(name, m) for name,page in pages.items() for m in re.findall(r'\S* at 0x[0-9a-f]{6,}', page.whole)]

def test_a_new_notebook_shows_what_it_should(pages):
    page = pages['how_to/new/index.html']
    assert not re.search('hidden|unechoed|muted output|step 1', page.whole)
    shown = 'echoed output', 'muted = 1', 'shown = 1', 'step 2\nlast line', 'output of the fold', 'Its subtitle'
    assert not [o for o in shown if o not in page.text]
    assert 'assert folded != 19' in page.whole and 'assert folded' not in page.text
    assert any(o.endswith('/#RAdamFn') for o in page.links) and any(o.endswith('/blob/main/tests/README.md') for o in page.links)
    assert not any('.ipynb' in o for o in page.links if '://' not in o)

def test_reference_shows_signature_and_docments(site, pages):
    name = next(n for n,p in pages.items() if {'RAdam', 'RAdamFn', 'Ranger'} <= p.ids)
    page,html = pages[name],(site/name).read_text()
    table = re.search(r'id="RAdam".*?<table>(.*?)</table>', html, re.S)[1]
    rows = [re.sub('<.*?>', '', '|'.join(re.findall('<td>(.*?)</td>', r, re.S))) for r in table.split('</tr>')]
    assert 'sqr_mom|float|0.99|Gradient squared moving average (β2) coefficient, in [0, 1)' in rows
    assert 'class RAdam' in page.whole and 'class RAdam' not in page.text, 'source is folded'
    assert 'sqr_mom:float=0.99,' in page.text

@pytest.fixture(scope='module')
def browser():
    api = pytest.importorskip('playwright.sync_api')
    with api.sync_playwright() as p:
        paths = [p.chromium.executable_path, *map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))]
        if not (paths := [o for o in paths if o and Path(o).exists()]): pytest.skip('no Chromium: run `playwright install chromium`')
        browser = p.chromium.launch(executable_path=paths[0], args=['--no-sandbox'])
        yield browser
        browser.close()

class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args): pass

@pytest.fixture(scope='module')
def address(site):
    server = ThreadingHTTPServer(('127.0.0.1', 0), partial(Quiet, directory=site))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}/'
    server.shutdown()

@pytest.fixture
def tab(browser, address):
    "A tab as wide as a phone that reaches nothing but the site, and what went wrong in it"
    tab,tab_errors = browser.new_page(viewport=dict(width=375, height=800)),[]
    svg = '<svg xmlns="http://www.w3.org/2000/svg" width="1" height="1"/>'
    def _elsewhere(route):
        image = route.request.resource_type == 'image'
        route.fulfill(status=200, content_type='image/svg+xml' if image else 'application/json', body=svg if image else '{}')
    tab.route(lambda url: not url.startswith(address), _elsewhere)
    tab.on('console', lambda m: tab_errors.append(m.text) if m.type in ('error', 'warning') else None)
    tab.on('pageerror', lambda e: tab_errors.append(str(e)))
    tab.on('response', lambda r: tab_errors.append(f'{r.status} {r.url}') if r.status >= 400 else None)
    yield tab,tab_errors
    tab.close()

def test_every_page_opens_in_a_browser(pages, tab, address):
    tab,errors = tab
    wrong = {}
    for name in sorted(pages.keys() - {'404.html'}):
        tab.goto(address + name.removesuffix('index.html'), wait_until='load')
        width = tab.evaluate('document.documentElement.scrollWidth')
        blank = tab.evaluate('[...document.images].filter(o => !o.naturalWidth).map(o => o.src)')
        if errors or width > 375 or blank: wrong[name] = list(errors),width,blank
        errors.clear()
    assert not wrong

def test_search_finds_a_function(tab, address):
    tab,errors = tab
    tab.goto(address)
    tab.click('label[for=__search] >> visible=true')
    tab.fill('input[name=query]', 'first_adaptive_step')
    tab.wait_for_selector('.md-search-result__link')
    assert 'first_adaptive_step' in tab.inner_text('.md-search-result__list') and not errors
