"""Find: the states of a kind, wherever they are in an optimizer's state."""

from typing import Any

import jax


def find_states(opt_state: Any, kind: type) -> dict[str, Any]:
    """Returns all states of a kind, at any depth, by label.

    The label is made of the dict keys on the way there (the groups of
    ``optax.partition``); of the positions in chains as well where that is not
    enough to tell states apart.
    """
    found = [
        (path, node)
        for path, node in jax.tree_util.tree_leaves_with_path(
            opt_state, is_leaf=lambda node: isinstance(node, kind)
        )
        if isinstance(node, kind)
    ]
    by_group = {_label(path, jax.tree_util.DictKey): node for path, node in found}
    if len(by_group) == len(found):
        return by_group
    keys = (jax.tree_util.DictKey, jax.tree_util.SequenceKey)
    return {_label(path, keys): node for path, node in found}


def _label(path: tuple[Any, ...], kinds: Any) -> str:
    """Returns the keys of the given kinds on a path, each followed by a slash."""
    return "".join(
        jax.tree_util.keystr((key,), simple=True) + "/"
        for key in path
        if isinstance(key, kinds)
    )
