"""One module per method, named as the field names it; `Info` is what notebooks' headers, the report and the
README say of it.
"""

from dataclasses import dataclass

__all__ = ["Info"]


@dataclass(frozen=True, kw_only=True)
class Info:
    """Say what a method is: name, chapter, paper, claim, cost model.

    claim: one sentence, with its conditions. cost_model: what is saved, what is added. applies: where, in a
    few words.

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
