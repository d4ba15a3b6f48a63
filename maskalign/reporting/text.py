"""Texts of an analysis as HTML: Markdown without links, pictures and raw HTML."""

import html

import markdown

# Markdown that could load something into the page or lead out of it.
LEADING_OUT = ("reference", "link", "image_link", "image_reference", "short_reference", "short_image_ref", "autolink",
               "automail", "html", "entity")  # fmt: skip


def to_html(text, plain=False):
    """Markdown (with tables) as HTML; with `plain`, text as it stands.

    HTML in the text is shown as text; headings start at the third level, below the page's own.
    """
    if plain:
        return f"<pre>{html.escape(text)}</pre>"
    reader = markdown.Markdown(extensions=["tables", "sane_lists"])
    reader.preprocessors.deregister("html_block")
    reader.parser.blockprocessors.deregister("reference")
    for name in LEADING_OUT:
        if name in reader.inlinePatterns:
            reader.inlinePatterns.deregister(name)
    text = html.escape(text, quote=False).replace("&gt; ", "> ")
    text = "\n".join("##" + line if line.startswith("#") else line for line in text.splitlines())
    # escape() has replaced every <; in code, Markdown escapes the & of that once more.
    return reader.convert(text).replace("&amp;lt;", "&lt;").replace("&amp;gt;", "&gt;").replace("&amp;amp;", "&amp;")
