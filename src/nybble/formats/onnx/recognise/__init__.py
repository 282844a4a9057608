"""Decoder models recognised in ONNX graphs: what a graph computes, whatever its nodes are called.

The graph is run on a few made-up tokens without computing anything: weights stay symbols, data
movement becomes index arrays, and everything that depends on lengths and positions only (masks,
rotary tables) is computed for real. ``model.py`` then reads the layers off the result.
"""
