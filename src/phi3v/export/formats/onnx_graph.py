"""Writing ONNX graphs: tensors go to a data file one at a time, as protobuf ends at 2 GB, and memory at some point."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

OPSET = 21
# ONNX Runtime's own operators, which its CPU, CUDA and DirectML providers have.
CONTRIB = "com.microsoft"
CONTRIB_OPERATORS = (
    "Gelu",
    "GroupQueryAttention",
    "MatMulNBits",
    "MultiHeadAttention",
    "QuickGelu",
    "SkipSimplifiedLayerNormalization",
)
ONNX_TYPES = {
    torch.float32: "FLOAT",
    torch.float16: "FLOAT16",
    torch.bfloat16: "BFLOAT16",
    torch.int64: "INT64",
    torch.int32: "INT32",
    torch.uint8: "UINT8",
}
PAGE = 4096  # bytes: tensors that begin on one can be mapped


def onnx_type(dtype: torch.dtype) -> int:
    """ONNX's number of a dtype."""
    import onnx

    number: int = getattr(onnx.TensorProto, ONNX_TYPES[dtype])
    return number


@dataclass(frozen=True)
class Value:
    """A value of a graph; arithmetic on it writes nodes. A number stands for an int64."""

    graph: GraphWriter
    name: str

    def __add__(self, other: Operand) -> Value:
        return self.graph.node("Add", self, other)

    def __sub__(self, other: Operand) -> Value:
        return self.graph.node("Sub", self, other)

    def __mul__(self, other: Operand) -> Value:
        return self.graph.node("Mul", self, other)

    def __floordiv__(self, other: Operand) -> Value:
        """Of numbers that are not negative: ONNX rounds towards zero."""
        return self.graph.node("Div", self, other)

    def __mod__(self, other: Operand) -> Value:
        return self.graph.node("Mod", self, other)

    def __lt__(self, other: Operand) -> Value:
        return self.graph.node("Less", self, other)

    def __gt__(self, other: Operand) -> Value:
        return self.graph.node("Greater", self, other)

    def equals(self, other: Operand) -> Value:
        return self.graph.node("Equal", self, other)

    def to(self, dtype: torch.dtype) -> Value:
        return self.graph.node("Cast", self, to=onnx_type(dtype))

    def reshape(self, *shape: int) -> Value:
        """As torch's; 0 keeps a size."""
        return self.graph.node("Reshape", self, shape)

    def take(self, indices: Operand, axis: int = 0) -> Value:
        return self.graph.node("Gather", self, indices, axis=axis)


Operand = Value | str | int | Sequence[int]


class GraphWriter:
    """Writes one graph to ``path``, and the bytes of its tensors to ``path`` with ``.data`` at the end."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._data_name = f"{path.name}.data"
        self._data = path.with_name(self._data_name).open("wb")
        self._nodes: list[Any] = []
        self._initializers: list[Any] = []
        self._constants: dict[tuple[int, ...] | int, Value] = {}

    def tensor(self, name: str, value: torch.Tensor) -> Value:
        """An initializer in its own dtype."""
        import onnx

        raw = value.contiguous().flatten().view(torch.uint8).numpy()
        self._data.write(b"\0" * (-self._data.tell() % PAGE))
        place = {"location": self._data_name, "offset": self._data.tell(), "length": raw.nbytes}
        self._data.write(raw.data)
        proto = onnx.TensorProto(name=name, dims=value.shape, data_type=onnx_type(value.dtype))
        proto.data_location = onnx.TensorProto.EXTERNAL
        for key, entry in place.items():
            proto.external_data.add(key=key, value=str(entry))
        self._initializers.append(proto)
        return Value(self, name)

    def weight(self, name: str, value: torch.Tensor) -> Value:
        """A tensor to compute with, in float32. It is stored in its own dtype; sessions cast it once, at loading."""
        stored = self.tensor(name, value)
        return stored if value.dtype == torch.float32 else stored.to(torch.float32)

    def constant(self, value: int | Sequence[int]) -> Value:
        """A small int64 within the graph."""
        from onnx import TensorProto, helper

        key = value if isinstance(value, int) else tuple(value)
        if key not in self._constants:
            name = f"constant_{len(self._constants)}"
            numbers, shape = ([key], []) if isinstance(key, int) else (key, [len(key)])
            self._initializers.append(helper.make_tensor(name, TensorProto.INT64, shape, numbers))
            self._constants[key] = Value(self, name)
        return self._constants[key]

    def node(self, op: str, *inputs: Operand, outputs: Sequence[str] = (), **attributes: Any) -> Value:
        """A node; returns its first output.

        Args:
            inputs: an empty name leaves an optional one out.
            outputs: names, where they matter or there are several.
        """
        from onnx import helper

        names = [value if isinstance(value, str) else self._value(value).name for value in inputs]
        outputs = list(outputs) or [""]
        outputs[0] = outputs[0] or f"{op}_{len(self._nodes)}"
        domain = CONTRIB if op in CONTRIB_OPERATORS else ""
        self._nodes.append(helper.make_node(op, names, outputs, outputs[0], domain=domain, **attributes))
        return Value(self, outputs[0])

    def _value(self, operand: Value | int | Sequence[int]) -> Value:
        return operand if isinstance(operand, Value) else self.constant(operand)

    def save(
        self,
        inputs: Mapping[str, tuple[torch.dtype, Sequence[int | str]]],
        outputs: Mapping[str, tuple[torch.dtype, Sequence[int | str]]],
    ) -> None:
        """Write the graph.

        Args:
            inputs, outputs: dtype and shape of each; a size that may vary has a name.
        """
        import onnx
        from onnx import helper

        self._data.close()
        interface = [
            [helper.make_tensor_value_info(name, onnx_type(dtype), shape) for name, (dtype, shape) in values.items()]
            for values in (inputs, outputs)
        ]
        graph = helper.make_graph(self._nodes, self.path.stem, *interface, self._initializers)
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB, 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10, producer_name="phi3v")
        onnx.save(model, self.path)
