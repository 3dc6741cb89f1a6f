"""What this process finds around it."""

import sys

import pytest

from lensbench.data.reading import read_documents
from lensbench.errors import LensbenchError
from lensbench.runtime.environment import needs, processor


@pytest.mark.parametrize("package", ["datasets", "accelerate"])
def test_a_missing_package_of_an_extra_is_one_line_that_says_how_to_install_it(monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(LensbenchError, match=rf"{package} is missing: python -m pip install -e '\.\[hub\]'"):
        needs("hub", package)


def test_a_text_of_the_hub_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(LensbenchError, match=r"\.\[hub\]"):
        read_documents("hf:org/name", None)


def test_the_processor_has_a_name():
    assert processor()
