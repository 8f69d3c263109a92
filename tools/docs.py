"""The site's pages, for MkDocs (`hooks:` in mkdocs.yml): nothing about them is listed by hand, so a new notebook appears by itself.

README.md is the home page and every other notebook in nbs/ is a page, its number left out of the address. A notebook that makes a module is
reference: what it exports is shown by signature and docments, with the source folded away. One at the top of the package with no name
in `radam_fastai.all` is part of how it is built. A notebook that makes no module, or a page in docs/, belongs to the section that its
folder names."""
import ast
import inspect
import posixpath
import re
from collections import Counter
from configparser import ConfigParser
from html import unescape
from importlib import import_module
from pathlib import Path

from fastcore.docments import DocmentText, docments
from fastcore.nbio import mk_cell, read_nb
from latex2mathml.converter import convert
from mkdocs.structure.files import File
from nbdev.showdoc import showdoc_nm
from readme import prepare, relink, to_markdown

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = 'radam_fastai'
PAGES = {'README.md': 'index.md', 'CHANGELOG.md': 'changelog.md', 'CONTRIBUTING.md': 'contributing.md'} # beside the notebooks
LONG = 12 # lines that a cell may have before it is folded
BUILT = 'How it is built'

def is_public(name): return not any(o.startswith('_') for o in name.split('.'))

def shorten(text:str) -> str:
    "Annotations and defaults with the names of classes and functions for their representation"
    text = re.sub(r"<class '(.+?)'>|<function (?:\w+\.)*(.+?) at \w+>", lambda m: m[1] or m[2], text)
    return re.sub(r'\b(?:\w+\.)+(?=[A-Z])', '', text)

def signature(name:str, obj) -> str:
    "As one would write it, a parameter a line when it is long"
    params = [shorten(p) for p,_ in DocmentText(obj, docstring=False).params if not re.match(r'self\b', p)]
    ret = docments(obj, full=True)['return'].anno
    ret = '' if ret is inspect.Parameter.empty or inspect.isclass(obj) else f' -> {shorten(inspect.formatannotation(ret))}'
    one = f"{name}({', '.join(params)}){ret}"
    return one if len(one) <= 80 else f'{name}(\n' + ''.join(f'    {p},\n' for p in params) + f'){ret}'

def table(obj) -> str:
    "Parameters and result with annotation, default and comment; nothing if none has a comment"
    docs = {k: o for k,o in docments(obj, full=True).items() if k != 'self'}
    if not any(o.docment for o in docs.values()): return ''
    def _code(o): return '' if o is inspect.Parameter.empty else f'`{shorten(inspect.formatannotation(o))}`' # of a value, its repr
    rows = [(f'`{k}`' if k != 'return' else '**returns**', _code(o.anno), _code(o.default),
             re.sub(r'\s+', ' ', o.docment or '')) for k,o in docs.items() if k != 'return' or o.docment]
    columns = [('parameter', 'type', 'default', 'meaning'), ('---',)*4, *rows]
    if not any(default for *_,default,_ in rows): columns = [(name, anno, text) for name,anno,_,text in columns]
    return '\n'.join('| ' + ' | '.join(r) + ' |' for r in columns)

class Notebook:
    "A notebook, the page that it becomes, and the public names that it exports"
    def __init__(self, path:Path):
        self.nb,self.source = read_nb(path),path.relative_to(ROOT).as_posix()
        self.page = re.sub(r'(^|/)\d+[a-z]?_', r'\1', path.relative_to(ROOT/'nbs').with_suffix('.md').as_posix())
        self.module = next((m for c in self.nb.cells for k in ('default_exp', 'export') if (m := c.directive(k))), None)
        self.names = [n for c in self.nb.cells for names,_ in self.definitions(c) for n in names]

    def is_exported(self, cell): return cell.cell_type == 'code' and any(cell.has_directive(o) for o in ('export', 'exporti', 'exports'))

    def definitions(self, cell):
        "Pairs of the public names that each statement of an exported cell binds, and the statement"
        if cell.has_directive('exporti') or not self.is_exported(cell): return
        for node in cell.parsed_() or ():
            if isinstance(node, ast.Assign): names = [o.id for t in node.targets for o in ast.walk(t) if isinstance(o, ast.Name)]
            elif isinstance(node, (ast.FunctionDef, ast.ClassDef)): names = showdoc_nm(node)
            else: continue
            if names := [n for n in ([names] if isinstance(names, str) else names) if is_public(n)]: yield names,node
            if isinstance(node, ast.ClassDef) and is_public(node.name):
                yield from (([f'{node.name}.{o.name}'], o) for o in node.body
                            if isinstance(o, ast.FunctionDef) and is_public(o.name) and ast.get_docstring(o))

    def document(self, cell, names, node, level):
        "Headings for `names`, with the signature, the docstring and the docments of what they name, or with the assignment"
        heads = '\n\n'.join(f"{'#'*level} `{n}` {{ #{n} }}" for n in names)
        if isinstance(node, ast.Assign): return f'{heads}\n\n```python\n{ast.get_source_segment(cell.source, node)}\n```'
        obj = import_module(f"{PACKAGE}.{cell.directive('export') or self.module}")
        for o in names[0].split('.'): obj = inspect.getattr_static(obj, o)
        obj = obj.fget if isinstance(obj, property) else getattr(obj, '__func__', obj)
        return '\n\n'.join([heads, f'```python\n{signature(names[0], obj)}\n```', inspect.getdoc(obj) or '', table(obj)])

    def cells(self, site):
        "What the page shows, as cells for `to_markdown`"
        level = 2
        for cell in self.nb.cells:
            if cell.has_directive('hide') or cell.has_directive('default_exp'): continue
            level = ([level] + [len(o)+1 for o in re.findall(r'^(#+) ', cell.source, re.M) if cell.cell_type == 'markdown'])[-1]
            docs,label = [self.document(cell, *o, level) for o in self.definitions(cell)],'Source' if self.is_exported(cell) else 'Code'
            prepare(cell, lambda link: site.target(self.source, self.page, link))
            if cell.cell_type == 'markdown': cell.set_source(site.link_names(cell.source, self))
            elif label == 'Source' or cell.source.count('\n') >= LONG:
                if 'transient' not in cell.metadata: docs.append(fold(label, cell.source))
                cell.metadata.transient = {'remove_source': True}
            if docs: yield mk_cell('\n\n'.join(docs), 'markdown', id=f'{cell.id}-docs', metadata={})
            yield cell

def fold(label, code): return f'??? quote "{label}"\n\n' + re.sub('^', '    ', f'```python\n{code.strip()}\n```', flags=re.M)

class Site:
    "All pages, and how they are linked"
    def __init__(self, repo:str):
        paths = sorted(p for p in (ROOT/'nbs').rglob('*.ipynb') if p.name[0] not in '_.' and p.parent.name != '.ipynb_checkpoints')
        self.repo,self.notebooks = repo,[Notebook(p) for p in paths if p.name != 'index.ipynb']
        self.pages = {**PAGES, 'nbs/index.ipynb': 'index.md', **{n.source: n.page for n in self.notebooks}}
        self.pictures = {}
        twice = [page for page,n in Counter(n.page for n in self.notebooks).items() if n > 1]
        if twice: raise ValueError(f'several notebooks would make the page {twice}: give them names that differ by more than the number')
        self.public = set(import_module(f'{PACKAGE}.all').__all__)
        self.first = {o: n.page for n in reversed(self.notebooks) for o in n.names if o in self.public}

    def target(self, source, page, link):
        "Where `link` of the file `source` leads from `page`: to a page, a picture, or the file in the repository"
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
        if '://' in link or path.startswith('..') or not (ROOT/path).exists(): return link
        if path.endswith(('.png', '.svg', '.jpg', '.gif')): to = self.pictures.setdefault(path, path)
        elif not (to := self.pages.get(path)): return f'{self.repo}/blob/main/{path}'
        return relative(to, page)

    def link_names(self, md, notebook):
        "`md`, of `notebook`, with links to what a user imports, where it is not what `notebook` is about"
        def _sub(m):
            if m[1] in notebook.names or not (page := self.first.get(m[1])): return m[0]
            return f'[{m[0]}]({relative(page, notebook.page)}#{m[1]})'
        return re.sub(r'^(?:#| {4}).*|(?<![`\[])`(\w+)`(?![`\]])', _sub, md, flags=re.M) # not in headings and code

    def nav(self, docs:list):
        "MkDocs' navigation, of the notebooks and of `docs`, the pages that are none"
        sections = {}
        def _add(page, *names): sections.setdefault(names, []).append(page)
        for page in docs: _add(page, folder(page) or BUILT)
        for n in self.notebooks:
            package = (n.module or '').rpartition('.')[0]
            if not n.module: _add(n.page, folder(n.page) or BUILT)
            elif package: _add(n.page, 'Reference', package.capitalize())
            else: _add(n.page, 'Reference' if n.module == 'all' or set(n.names) & self.public else BUILT)
        reference = sections.pop(('Reference',), []) + [{s: sections.pop((r,s))} for r,s in [o for o in sections if len(o) == 2]]
        built = sections.pop((BUILT,), []) + ['contributing.md']
        guides = [{s: pages} for (s,),pages in sorted(sections.items(), key=lambda o: (o[0] != ('Tutorials',), o[0]))]
        return [{'Home': 'index.md'}, *guides, {'Reference': reference}, {BUILT: built}, {'Changelog': 'changelog.md'}]

    def files(self):
        "The content of each page and picture with its source"
        for source in PAGES:
            yield PAGES[source],relink((ROOT/source).read_text(), lambda link: self.target(source, PAGES[source], link)),source
        for n in self.notebooks:
            n.nb.cells = list(n.cells(self))
            md,figures = to_markdown(n.nb, posixpath.basename(n.page).removesuffix('.md') + '_files')
            yield n.page,md,n.source
            yield from ((posixpath.join(posixpath.dirname(n.page), k), v, None) for k,v in figures.items())
        yield from ((k, (ROOT/k).read_bytes(), None) for k in self.pictures)

def relative(to, page): return posixpath.relpath(to, posixpath.dirname(page) or '.')

def folder(page): return posixpath.dirname(page).replace('_', ' ').capitalize()

def on_config(config):
    setup = ConfigParser(delimiters=['='], interpolation=None)
    setup.read(ROOT/'setup.cfg', encoding='utf-8')
    meta = setup['metadata']
    config.site_description,config.repo_url,config.repo_name = meta['description'],meta['url'],'GitHub'
    config.site_url = dict(o.split(' = ') for o in meta['project_urls'].strip().splitlines())['Documentation']
    config.site = Site(config.repo_url)
    config.nav = config.site.nav(sorted(p.relative_to(config.docs_dir).as_posix() for p in Path(config.docs_dir).rglob('*.md')))
    return config

def on_files(files, config):
    for uri,content,source in config.site.files():
        file = File.generated(config, uri, content=content)
        file.edit_uri = source
        files.append(file)
    return files

def on_page_markdown(markdown, page, config, files):
    "A page in no section has no neighbours to list"
    if page.parent is None: page.meta['hide'] = ['navigation']

def on_page_content(html, page, config, files):
    "Formulas as MathML, which needs no script, and tables of pandas and of progress bars with the site's look, which scroll"
    def _math(m): return f"<{m[1]} class=\"arithmatex\">{convert(unescape(m[2]), display='block' if m[1] == 'div' else 'inline')}</{m[1]}>"
    html = re.sub(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', _math, html, flags=re.S)
    return re.sub('<table[^>]*>', '<table>', html)
