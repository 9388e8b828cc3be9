"""Real English texts for calibration and evaluation, from the test data that the gensim wheel carries."""

from __future__ import annotations

import bz2
import html
import os
import re
import tempfile

from benchmarks.wheels import cache_folder, wheel

REQUIREMENT = "gensim==4.4.0"
FOLDER = "gensim/test/test_data/"
NEWS = "lee_background.cor"
WIKIPEDIA = "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"


def news() -> list[str]:
    """300 short newspaper articles of 2000-2002, about 360,000 characters; used to calibrate."""
    return [line.strip() for line in _member(NEWS).decode().splitlines() if line.strip()]


def wikipedia() -> list[str]:
    """About a hundred Wikipedia articles of 2016 as plain paragraphs, redirects left out; used to evaluate."""
    dump = bz2.decompress(_member(WIKIPEDIA)).decode()
    sources = re.findall(r"<text[^>]*>(.*?)</text>", dump, flags=re.DOTALL)
    articles = [plain_text(html.unescape(source)) for source in sources if not source.startswith("#REDIRECT")]
    return [article for article in articles if article]


def plain_text(wikitext: str) -> str:
    """The running prose of an article's wiki markup: paragraphs, separated by empty lines.

    Templates, tables, references, files, headings, lists and comments are left out; links keep their label.
    """
    text = re.sub(r"<!--.*?-->", "", wikitext, flags=re.DOTALL)
    text = re.sub(r"<ref[^>/]*/>", "", text)
    text = re.sub(r"<(ref|math|gallery|timeline|code|pre|nowiki)\b[^>]*>.*?</\1\s*>", "", text, flags=re.DOTALL)
    text = _without_nested(text, r"\{\{[^{}]*\}\}")
    text = _without_nested(text, r"\{\|(?:(?!\{\|).)*?\|\}")
    text = re.sub(r"\[\[[^\[\]|]*\|([^\[\]|]*)\]\]", r"\1", text)
    text = re.sub(r"\[\[([^\[\]|:]*)\]\]", r"\1", text)
    text = _without_nested(text, r"\[\[[^\[\]]*\]\]")  # files, categories, other languages: what still has brackets
    text = re.sub(r"\[https?://\S*\s*([^\]]*)\]", r"\1", text)
    text = re.sub(r"<br\s*/?>", " ", text)
    text = re.sub(r"</?[a-zA-Z][^>]*>", "", text)
    text = re.sub(r"'{2,}", "", html.unescape(text)).replace("\u00a0", " ")
    text = re.sub(r"[ \t]+", " ", re.sub(r"\(\s*[;,]?\s*\)", "", text))
    lines = (line.strip() for line in text.splitlines())
    return "\n\n".join(line for line in lines if len(line) > 40 and line[0] not in "=*#:;|!{}")


def _without_nested(text: str, pattern: str) -> str:
    """`text` without all matches of `pattern`, which describes an innermost level, repeated until none is left."""
    count = 1
    while count:
        text, count = re.subn(pattern, "", text, flags=re.DOTALL)
    return text


def _member(name: str) -> bytes:
    """The bytes of a file of the wheel's test data, from the cache folder where a run before kept it."""
    kept = cache_folder() / name
    if not kept.exists():
        with wheel(REQUIREMENT) as archive:
            content = archive.read(FOLDER + name)
        descriptor, scratch = tempfile.mkstemp(dir=kept.parent)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        os.replace(scratch, kept)
    return kept.read_bytes()
