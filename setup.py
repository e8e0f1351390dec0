"""
What pyproject.toml cannot say: the two files that a start of Python reads lie in site-packages themselves, in a plain
and in an editable install.
"""

import setuptools


class Distribution(setuptools.Distribution):
    """An editable install asks for `has_data` and without it leaves out what a plain one installs."""

    has_data = setuptools.Distribution.has_data_files


# A wheel keeps data in NAME.data/data; what lies in NAME.data/purelib beside it goes to site-packages.
setuptools.setup(
    distclass=Distribution,
    data_files=[("../purelib", ["lnfree_autoregister.pth", "lnfree_autoregister.py"])],
)
