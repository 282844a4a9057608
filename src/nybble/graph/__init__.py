"""The graph that a model is made of: operators, builder, and their definition in NumPy."""

from nybble.graph.graph import Graph, GraphBuilder, Node, Value
from nybble.graph.rotary import rotary_frequencies

__all__ = ["Graph", "GraphBuilder", "Node", "Value", "rotary_frequencies"]
