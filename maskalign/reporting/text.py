"""Convert the texts of an analysis to HTML: Markdown without links, images and raw HTML."""

import html

import markdown

# Markdown patterns that could load something into the page or link to another page.
LEADING_OUT = ("reference", "link", "image_link", "image_reference", "short_reference", "short_image_ref", "autolink",
               "automail", "html", "entity")  # fmt: skip


def to_html(text, plain=False):
    """Convert Markdown (with tables) to HTML; with `plain`, the text is shown unchanged.

    HTML in the text is shown as text. Headings start at the third level, below the headings of the page.
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
    # escape() has replaced every < by &lt;, and Markdown escapes the & of this again in code.
    return reader.convert(text).replace("&amp;lt;", "&lt;").replace("&amp;gt;", "&gt;").replace("&amp;amp;", "&amp;")
