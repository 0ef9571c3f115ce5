"""Leaves the rows out that an encoder puts before its patches."""

import operator
from typing import cast

from torch import fx

from .token_axis import finish, output_node


def drop_prefix(module: fx.GraphModule, prefix: int) -> fx.GraphModule:
    """Makes the first result, [B, prefix + n, C], one of the n patches alone; other results stay. Skipped without a prefix."""
    if not prefix:
        return module
    output = output_node(module.graph)
    hidden, *others = cast(tuple[fx.Node, ...], output.args[0])
    with module.graph.inserting_before(output):
        patches = module.graph.call_function(operator.getitem, (hidden, (slice(None), slice(prefix, None))))
    output.args = ((patches, *others),)
    return finish(module)
