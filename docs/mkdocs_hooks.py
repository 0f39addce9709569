"""What the site needs beyond MkDocs: links out of docs/ and docstring sections, both written for other readers first.

Pages link to files of the repository by relative paths, which is what GitHub follows; the site gets a copy of each
such file and a link to the copy.
"""

import os
import posixpath
import re
from pathlib import Path

import griffe
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
COPIES = "repository"  # folder of the copies, within the site
LINK = re.compile(r"(\]\()([^)\s#]+)")
RANGE = re.compile(r"-?[\d.]+ [–±] -?[\d.]+|\([+-]?[\d.]+ (?:–|to) [+-]?[\d.]+[;)]")
CELL = re.compile(r"<td>[^<]*</td>")
FLAG = re.compile(r"<code>(--[\w-]+)</code>")
SPELLINGS = [
    (r"^Example:$", "Examples:"),
    (r"^(    (?:\w+, )*\w+,)\n +((?:\w+, )*\w+: )", r"\1 \2"),  # names of one item on two lines
    (r"^    (The others are those of .*)$", r"\1"),  # a sentence about all items, behind them
]


def in_repository(page, target):
    """Path within the repository of what a link from `page` leads to; None for a link elsewhere."""
    folder = posixpath.dirname(page)
    # The copies of files lie where the files do, below a folder of their own.
    folder = posixpath.relpath(folder, COPIES) if page.startswith(f"{COPIES}/") else posixpath.join("docs", folder)
    path = posixpath.normpath(posixpath.join(folder, target))
    return None if ":" in target or path.startswith("..") else path


def outside(page, target):
    """As `in_repository`; None for a link within docs/ too."""
    path = in_repository(page, target)
    return None if path is None or path.startswith("docs/") else path


def on_files(files, config):
    """Adds the files outside docs/ that pages link to."""
    for page in files.documentation_pages():
        for _, target in LINK.findall(page.content_string):
            path = outside(page.src_uri, target)
            uri = f"{COPIES}/{path}"
            if path and (ROOT / path).is_file() and uri not in files.src_uris:
                files.append(File.generated(config, uri, abs_src_path=os.fspath(ROOT / path)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Leads links to files outside docs/ to their copies, and those of the copies back."""

    def lead(match):
        path = in_repository(page.file.src_uri, match[2]) or ""
        for uri in (f"{COPIES}/{path}", path.removeprefix("docs/")):
            if uri in files.src_uris:
                return match[1] + posixpath.relpath(uri, posixpath.dirname(page.file.src_uri) or ".")
        return match[0]

    return LINK.sub(lead, markdown)


def on_page_content(html, **_):
    """Keeps both ends of a range, a mean and its deviation, and a flag, on one line."""
    html = FLAG.sub(r'<code class="flag">\1</code>', html)
    return CELL.sub(lambda cell: RANGE.sub(r'<span class="range">\g<0></span>', cell[0]), html)


class Docstrings(griffe.Extension):
    """Puts docstrings into the words of Griffe's parser, which drops what it does not understand."""

    def on_object(self, *, obj, **_):
        if obj.docstring:
            for pattern, words in SPELLINGS:
                obj.docstring.value = re.sub(pattern, words, obj.docstring.value, flags=re.MULTILINE)
