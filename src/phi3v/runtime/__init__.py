"""Running exported graphs without torch or transformers: numpy, Pillow, tokenizers and the graphs' own library."""

from phi3v.runtime.session import Graphs, Runtime, graph_kind, load_runtime

__all__ = ["Graphs", "Runtime", "graph_kind", "load_runtime"]
