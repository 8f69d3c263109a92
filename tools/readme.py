"""Write README.md from the saved nbs/index.ipynb, without Quarto and without running anything.

Cells with `#| hide` are left out, `#| echo: false` leaves a cell's outputs only, links relative to nbs/ become relative to
the project, and figures among the outputs go to index_files/."""
import posixpath, re, shutil
from pathlib import Path

import nbformat
from fastcore.nbio import nb2str, read_nb
from nbconvert import MarkdownExporter

NOTE = "<!-- Made from nbs/index.ipynb by `make readme`: edit the notebook, not this file. -->"
FIGURES = 'index_files'

def relink(
    md:str, # Markdown that stands in the folder `nbs`
    nbs:Path # The project's notebooks
)->str: # The same, for the folder above
    "Links to files that exist relative to `nbs`, rewritten for its parent; other links are left as they are"
    def _sub(m):
        pre,link = m.groups()
        return pre + (posixpath.normpath(f'{nbs.name}/{link}') if (nbs/link).exists() else link)
    return re.sub(r'(\]\(|(?:src|href)=")([^\s()"#]+)', _sub, md)

def prepare(
    cell, # A notebook cell, changed in place
    nbs:Path # The project's notebooks
):
    "Take the directives out of `cell`, after doing what they say"
    if cell.directive('echo') == 'false': cell.metadata.transient = {'remove_source': True}
    cell.remove_directives()
    if cell.cell_type == 'markdown': cell.set_source(relink(cell.source, nbs))

def readme(
    root:Path # The project's folder
)->dict: # Bytes by path relative to `root`
    "README.md and the figures that it shows"
    nbs = Path(root)/'nbs'
    nb = read_nb(nbs/'index.ipynb')
    nb.cells = [c for c in nb.cells if not c.has_directive('hide')]
    for c in nb.cells: prepare(c, nbs)
    nb = nbformat.reads(nb2str(nb), 4)
    nb.metadata.language_info = {'name': 'python'}
    md,res = MarkdownExporter().from_notebook_node(nb, {'output_files_dir': FIGURES})
    md = re.sub(r'<style.*?</style>\s*', '', md, flags=re.S)  # pandas' style sheet would show as text
    md = re.sub(r'\n\s*\n', '\n\n', f'{NOTE}\n\n{md}').strip() + '\n'
    return {'README.md': md.encode(), **res.get('outputs', {})}

def main():
    root = Path(__file__).resolve().parent.parent
    shutil.rmtree(root/FIGURES, ignore_errors=True)
    for name,data in readme(root).items():
        (root/name).parent.mkdir(exist_ok=True)
        (root/name).write_bytes(data)

if __name__ == '__main__': main()
