"""Change a network in training: which channels belong together (`channels`), what can be done (`operations`),
by stage (`stages`).
"""

from effilib.surgery.channels import CONVS, NORMS, Node, Path, Structure, checked, nodes, trace, unknown
from effilib.surgery.operations import (
    adopt_,
    append_block_,
    can_remove,
    copies,
    forget_,
    insert_layer_,
    remove_block_,
    remove_layer_,
    remove_path_,
    replace_,
    select_,
)

__all__ = [
    "CONVS", "NORMS", "Node", "Path", "Structure", "adopt_", "append_block_", "can_remove", "checked",
    "copies", "forget_", "insert_layer_", "nodes", "remove_block_", "remove_layer_", "remove_path_",
    "replace_", "select_", "trace", "unknown",
]  # fmt: skip
