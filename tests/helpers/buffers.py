"""Where arrays lie in memory."""

import jax


def shared_buffers(tree):
    """Returns groups of leaves that lie in one buffer, which cannot be donated twice.

    XLA refuses to, on several devices with a crash of the process.
    """
    places = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if leaf.size:
            shard = leaf.addressable_shards[0].data
            name = jax.tree_util.keystr(path)
            places.setdefault(shard.unsafe_buffer_pointer(), []).append(name)
    return [names for names in places.values() if len(names) > 1]
