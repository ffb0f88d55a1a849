"""Turn the formulas of a notebook into MathML, which browsers show without a script."""

import html as markup
import re
from xml.etree import ElementTree

__all__ = ["mathml"]

# Code comes first, so that a dollar sign in it is never taken for a formula; so does an escaped one.
FORMULA = re.compile(
    r"""
      (?P<fence>^[ \t>]*(?P<marks>`{3,}|~{3,})[^\n]*\n.*?(?:^[ \t>]*(?P=marks)|\Z))
    | (?P<span>(?<!`)(?P<ticks>`+)(?!`)(?:(?!\n\s*\n).)+?(?<!`)(?P=ticks)(?!`))
    | (?P<escaped>\\\$)
    | \$\$(?P<dollars>.+?)\$\$
    | \\{1,2}\[(?P<brackets>(?:(?!\n\s*\n).)+?)\\{1,2}\]
    | (?P<environment>\\begin\{(?P<name>[a-z]+\*?)\}.+?\\end\{(?P=name)\})
    | \\{1,2}\((?P<parentheses>(?:(?!\n\s*\n).)+?)\\{1,2}\)
    | \$(?![\s$])(?P<dollar>(?:[^$\\`\n]|\\.|\n(?!\s*\n))+?)(?<!\s)\$(?!\d)
    """,
    re.DOTALL | re.MULTILINE | re.VERBOSE,
)
HIDDEN = "\ue000{}\ue001"  # private characters, which Markdown leaves alone


def hide_formulas(text, formulas):
    """Replace each formula of a Markdown text by a placeholder: its underscores are no Markdown."""

    def hide(match):
        if match["fence"] or match["span"] or match["escaped"]:
            return match[0]
        formulas.append((match[0], match))
        return HIDDEN.format(len(formulas) - 1)

    return FORMULA.sub(hide, text)


def show_formulas(html, formulas):
    """Put MathML for the placeholders; in code and inside tags the formula's source."""

    def show(match):
        if not match["number"]:
            return re.sub(
                "\ue000(\\d+)\ue001", lambda hidden: markup.escape(formulas[int(hidden[1])][0]), match[0]
            )
        found = formulas[int(match["number"])][1]
        block = found["dollars"] or found["brackets"] or found["environment"]
        return mathml(block or found["parentheses"] or found["dollar"], display=bool(block))

    return re.sub("(?s)<pre.*?</pre>|<code.*?</code>|<[^>]*>|\ue000(?P<number>\\d+)\ue001", show, html)


BIG = r"(\\(?:big|Big|bigg|Bigg)[lrm]?)"
REWRITES = (  # what latex2mathml does not know, in words that it does
    (r"\\label\{[^}]*\}|\\(?:nonumber|notag)\b", ""),
    (r"\\(begin|end)\{(?:aligned|split|align|eqnarray|equation)\*?\}(?:\[[tbc]\])?", r"\\\1{align*}"),
    (r"\\(begin|end)\{(?:gathered|gather|multline)\*?\}", r"\\\1{matrix}"),
    (r"\\(?:operatorname\*?|mathrm)\s*\{([^{}\\]*)\}", r"\\text{\1}"),
    (r"\\operatorname\*?\s*\{arg\\[,;]\s*(max|min)\}", r"\\arg\1"),
    (rf"{BIG}\\[lr]?(?:Vert|\|)", r"\1‖"),
    (rf"{BIG}\\[lr]?vert", r"\1|"),
    (r"\\mathbb\s*\{?1\}?", "\U0001d7d9"),
)
CHILDREN = dict(mfrac=2, msub=2, msup=2, mover=2, munder=2, mroot=2, msubsup=3, munderover=3)
LIMITS = {
    "max",
    "min",
    "sup",
    "inf",
    "lim",
    "arg\u2009max",
    "arg\u2009min",
}  # limits stand under them


def mathml(latex: str, display: bool = False) -> str:
    """Return LaTeX as MathML, as a block of its own if `display`.

    What can't be converted is shown as code, never lost.

    >>> mathml("x^2")
    '<math display="inline" alttext="x^2"><mrow><msup><mi>x</mi><mn>2</mn></msup></mrow></math>'
    """
    from latex2mathml.converter import convert

    source = latex.strip()
    for pattern, replacement in REWRITES:
        source = re.sub(pattern, replacement, source)
    try:
        text = convert(source, display="block" if display else "inline")
        math = ElementTree.fromstring(text.replace(' xmlns="http://www.w3.org/1998/Math/MathML"', ""))
        for element in math.iter():
            _mend(element, display)
    except Exception:  # latex2mathml stumbles in many ways
        html = f'<code class="latex">{markup.escape(latex.strip())}</code>'
    else:
        math.set("alttext", latex.strip())
        html = ElementTree.tostring(math, encoding="unicode")
    return f'<span class="formula">{html}</span>' if display else html


def _mend(element, display):
    """Correct what browsers show badly of latex2mathml. Raises ValueError where a formula is not whole."""
    text = element.text or ""
    if len(element) != CHILDREN.get(element.tag, len(element)) or "\\" in text or element.get("linebreak"):
        raise ValueError(f"<{element.tag}> is not whole")
    if element.tag == "mo" and len(element):  # \mathop{...}
        element.tag = "mrow"
    if display and element.tag in ("msub", "msup") and element[0].text in LIMITS:
        element.tag = {"msub": "munder", "msup": "mover"}[element.tag]
    # norms: no space inside, and tall only where \left or \big asks for it
    if element.tag == "mo" and text in ("‖", "|"):
        element.attrib.update(lspace="0", rspace="0", stretchy=element.get("stretchy", "false"))
    if element.tag == "mover" and element[1].text == "\u2015":  # \overline: few fonts stretch the bar
        element.tag = "mrow"
        element.set("class", "overline")
        del element[1]
    if element.tag == "mi" and text == "~":  # \sim
        element.tag, element.text = "mo", "\u223c"
    if element.tag == "mi" and "\u27f0" <= text <= "\u27ff":  # \iff and other long arrows
        element.tag = "mo"
    if element.tag in ("mi", "mo") and len(text) > 1 and text.replace("\u2009", "").isalpha():  # \log, \max
        element.tag = "mi"
        element.set("class", "function")
    if element.get("width") == "negativethinmathspace":
        element.set("width", "-0.167em")
