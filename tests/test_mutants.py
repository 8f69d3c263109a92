"""The bugs that `mutants.py` plants still fit the code."""
import pytest

from mutants import mutants, planted

@pytest.mark.parametrize('name', mutants)
def test_mutant_fits(name):
    path,src = planted(name)
    compile(src, path, 'exec')
