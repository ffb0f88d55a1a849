"""Change a network in training: which channels belong together (`channels`), what can be done (`operations`),
by stage (`stages`), and undo what changes a function (`trial`).
"""

from effilib.surgery.channels import CONVS, NORMS, Node, Path, Structure, checked, nodes, trace, unknown
from effilib.surgery.operations import (
    adopt_,
    append_block_,
    can_remove,
    follower,
    forget_,
    insert_layer_,
    remove_block_,
    remove_layer_,
    remove_path_,
    replace_,
    select_,
)
from effilib.surgery.trial import keeping, undoing

__all__ = [
    "CONVS", "NORMS", "Node", "Path", "Structure", "adopt_", "append_block_", "can_remove", "checked",
    "follower", "forget_", "insert_layer_", "keeping", "nodes", "remove_block_", "remove_layer_",
    "remove_path_", "replace_", "select_", "trace", "undoing", "unknown",
]  # fmt: skip
