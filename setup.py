"The description that a package index shows; all other metadata is in setup.cfg"
import runpy
from pathlib import Path

from setuptools import setup

root = Path(__file__).resolve().parent
setup(long_description=runpy.run_path(str(root/'tools/readme.py'))['description'](root))
