"""Write README.md from the saved nbs/index.ipynb, without Quarto and without running anything.

Cells with `#| hide` are left out, `#| echo: false` leaves a cell's outputs only, `#| output: false` its source only, links relative
to nbs/ become relative to the project, and figures among the outputs go to index_files/. `tools/docs.py` makes the site's pages
the same way, and `setup.py` the description of the package, where nothing but setuptools may be installed: so a function imports
what it needs beyond the standard library."""
import posixpath
import re
import shutil
from configparser import ConfigParser
from pathlib import Path
from typing import Callable

NOTE = "<!-- Made from nbs/index.ipynb by `make readme`: edit the notebook, not this file. -->"
FIGURES = 'index_files'
# Output in fences: indented, as nbconvert has it, it would join a list above it
TEMPLATE = """{% extends 'markdown/index.md.j2' %}
{% macro fenced(text) %}
```text
{{ text.rstrip() }}
```
{% endmacro %}
{% block stream %}{{ fenced(output.text | strip_ansi) }}{% endblock stream %}
{% block data_text %}{{ fenced(output.data['text/plain']) }}{% endblock data_text %}"""

def relink(
    md:str, # Markdown
    target:Callable # New address of a link, given the old one without its #anchor
)->str: # The same, linked from elsewhere
    "The links and pictures in `md`, Markdown's or HTML's, rewritten by `target`"
    return re.sub(r'(\]\(|(?:src|href)=")([^\s()"#]+)', lambda m: m[1] + target(m[2]), md)

def prepare(
    cell, # A notebook cell, changed in place
    target:Callable # As in `relink`
):
    "Take the directives out of `cell`, after doing what they say"
    if cell.directive('echo') == 'false': cell.metadata.transient = {'remove_source': True}
    if cell.directive('output') == 'false': cell.outputs = []
    for o in cell.get('outputs', ()):
        if 'text' in o: o.text = re.sub(r'[^\n]*\r(?!\n)', '', o.text) # what a terminal shows of a progress bar
    cell.remove_directives()
    if cell.cell_type == 'markdown': cell.set_source(relink(cell.source, target))

def to_markdown(
    nb, # A notebook, prepared
    figures:str # Folder for the figures among its outputs
)->tuple: # Markdown, and the figures' bytes by path
    "`nb` as a page, without pandas' style sheets, which would show as text"
    import nbformat
    from fastcore.nbio import nb2str
    from nbconvert import MarkdownExporter
    nb = nbformat.reads(nb2str(nb), 4)
    nb.metadata.language_info = {'name': 'python'}
    md,res = MarkdownExporter(raw_template=TEMPLATE).from_notebook_node(nb, {'output_files_dir': figures})
    return re.sub(r'<style.*?</style>\s*', '', md, flags=re.S), res.get('outputs') or {}

def readme(
    root:Path # The project's folder
)->dict: # Bytes by path relative to `root`
    "README.md and the figures that it shows"
    from fastcore.nbio import read_nb
    nbs = Path(root)/'nbs'
    def _target(link): return posixpath.normpath(f'{nbs.name}/{link}') if (nbs/link).exists() else link
    nb = read_nb(nbs/'index.ipynb')
    nb.cells = [c for c in nb.cells if not c.has_directive('hide')]
    for c in nb.cells: prepare(c, _target)
    md,figures = to_markdown(nb, FIGURES)
    md = re.sub(r'\n\s*\n', '\n\n', f'{NOTE}\n\n{md}').strip() + '\n'
    return {'README.md': md.encode(), **figures}

def description(
    root:Path # The project's folder
)->str: # Markdown
    "README.md with absolute links, because relative ones lead nowhere on a package index"
    facts = ConfigParser(interpolation=None)
    facts.read(root/'settings.ini', encoding='utf-8')
    url,branch = (facts['DEFAULT'][k] for k in ('git_url', 'branch'))
    def _target(link):
        kind = 'raw' if link.startswith(FIGURES) else 'blob'
        return f'{url}/{kind}/{branch}/{link}' if (root/link).exists() else link
    return relink((root/'README.md').read_text(encoding='utf-8'), _target)

def main():
    root = Path(__file__).resolve().parent.parent
    shutil.rmtree(root/FIGURES, ignore_errors=True)
    for name,data in readme(root).items():
        (root/name).parent.mkdir(exist_ok=True)
        (root/name).write_bytes(data)

if __name__ == '__main__': main()
