"""Ends the encoder at the layer whose output the model reads."""

from torch import fx

from .token_axis import anchors, finish, layer_exit, output_node


def truncate_encoder(module: fx.GraphModule, feature_layer: int) -> fx.GraphModule:
    """Makes the exit of `feature_layer` the graph's result; later layers become dead code and go.

    Skipped when `feature_layer` is the last layer. Raises RewriteError if the graph has no such layer.
    """
    if feature_layer == len(anchors(module.graph)) - 1:
        return module
    exit_ = layer_exit(module.graph, feature_layer)
    output_node(module.graph).args = ((exit_,),)
    return finish(module)
