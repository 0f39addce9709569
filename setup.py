"""The metadata is in pyproject.toml, apart from the long description."""

import re
from pathlib import Path

from setuptools import setup

readme = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
# A package page has no files beside it: links to them become their text, pictures are left out.
readme = re.sub(r"(!?)\[([^]]*)\]\((?!https?://)[^)]*\)", lambda link: "" if link[1] else link[2], readme)

setup(long_description=readme, long_description_content_type="text/markdown")
