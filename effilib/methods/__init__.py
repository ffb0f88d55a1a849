"""One module per method, named as the field names it; `Info` is what notebooks' headers, the report and the
README say of it.
"""

from dataclasses import dataclass

__all__ = ["Info"]


@dataclass(frozen=True, kw_only=True)
class Info:
    """name, chapter, paper, claim (one sentence, with its conditions), cost model (what is saved, what is
    added), and where it applies (a few words).

    >>> from effilib.methods import prune_train
    >>> prune_train.INFO.name, prune_train.INFO.chapter
    ('PruneTrain', '6.1')
    """

    name: str
    name_de: str
    chapter: str
    paper: str
    claim: str
    cost_model: str
    applies: str = ""
