"""Changes of OpenVINO's graphs: any number of rows instead of one, and the table taken out.

torch's exporter writes the shapes that it saw into the graph, the batch of one among them. Where
the rows lie in each tensor follows from where they lie in the inputs; what has to be rewritten are
shapes that fix their number, and what is joined to rows and is the same for all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from openvino import Type
from openvino import opset13 as op

Place = tuple[int, int]
"""An axis that holds the rows, and how many others of that axis lie outside of them."""

Given = Sequence[Place | None]
"""Where the rows lie in each input of a node; None in one that has none."""


class NotFollowed(Exception):
    """A graph in which the rows cannot be followed; never leaves this package."""


def take_batches(graph: Any) -> None:
    """Changes a graph of static shapes, each of whose inputs begins with an axis of one row.

    What it makes of several rows is to be compared with what it made of each: a shape does not
    always say which of its axes was meant.

    Raises:
        NotFollowed: it cannot be done; the graph is spoiled.
    """
    places: dict[tuple[str, int], Place] = {}
    for one in graph.inputs:
        if one.get_partial_shape()[0].get_length() != 1:
            raise NotFollowed("an input does not begin with one row")
        places[_key(one)] = (0, 1)
    first = np.array([0], np.int64)
    count = op.gather(op.shape_of(graph.inputs[0], "i64"), first, np.int64(0))
    for node in graph.get_ordered_ops():
        given = [places.get(_key(source)) for source in node.input_values()]
        if not any(given) or node.get_type_name() == "Result":
            continue
        rule = _RULES.get(node.get_type_name())
        found = rule(node, given, count) if rule is not None else None
        if found is None:
            raise NotFollowed(f"{node.get_type_name()} {node.get_friendly_name()}")
        for made in node.outputs():
            places[_key(made)] = found
    for one in graph.inputs:
        shape = one.get_partial_shape()
        shape[0] = -1
        one.get_node().set_partial_shape(shape)
    graph.validate_nodes_and_infer_types()
    if any(one.get_partial_shape()[0].is_static for one in graph.outputs):
        raise NotFollowed("an output has one row")


def _key(output: Any) -> tuple[str, int]:
    return output.get_node().get_name(), output.get_index()


def _shape(output: Any) -> list[int]:
    return list(output.get_shape())


def _constant(node: Any, number: int) -> list[int] | None:
    """The whole numbers in an input, if it is a constant."""
    source = node.input_value(number).get_node()
    return np.ravel(source.data).tolist() if source.get_type_name() == "Constant" else None


def _sized(shape: list[int], axis: int, count: Any) -> Any:
    """A shape in the graph, with the number of rows at an axis."""
    sides = [np.array([side], np.int64) for side in shape]
    return op.concat([*sides[:axis], count, *sides[axis + 1 :]], 0).output(0)


def _in_place(_node: Any, given: Given, _count: Any) -> Place | None:
    return given[0]


def _along_another(node: Any, given: Given, _count: Any) -> Place | None:
    """It works along axes that it names, none of which may hold the rows."""
    if given[0] is None:
        return None
    rank, kind = len(_shape(node.input_value(0))), node.get_type_name()
    axes: list[int] | None
    if kind in ("Softmax", "TopK"):
        axes = [node.get_attributes()["axis"]]
    elif kind == "Slice":
        axes = _constant(node, 4) if len(node.inputs()) > 4 else None
    else:
        axes = _constant(node, 1)
    if axes is None or given[0][0] in {axis % rank for axis in axes}:
        return None
    return given[0]


def _lined_up(node: Any, given: Given, _count: Any) -> Place | None:
    """Inputs are lined up at their last axes."""
    rank = len(_shape(node.output(0)))
    found = {
        (place[0] + rank - len(_shape(source)), place[1])
        for place, source in zip(given, node.input_values(), strict=True)
        if place is not None
    }
    return found.pop() if len(found) == 1 else None


def _joined(node: Any, given: Given, count: Any) -> Place | None:
    axis, outside = next(place for place in given if place is not None)
    along = node.get_attributes()["axis"] % len(_shape(node.output(0)))
    if along == axis or any(place not in (None, (axis, outside)) for place in given):
        return None
    for number, place in enumerate(given):
        if place is None:  # as a class token: repeated for each row
            source = node.input_value(number)
            target = _sized(_shape(source), axis, count)
            node.input(number).replace_source_output(op.broadcast(source, target).output(0))
    return axis, outside


def _reshaped(node: Any, given: Given, _count: Any) -> Place | None:
    if given[0] is None:
        return None
    before, shape = _shape(node.input_value(0)), _shape(node.output(0))
    axis, outside = given[0]
    outer = math.prod(before[:axis]) * outside  # how many lie outside of the rows, all in all
    left = [math.prod(shape[:i]) for i in range(len(shape))]
    fits = [
        i for i, side in enumerate(shape) if outer % left[i] == 0 and side % (outer // left[i]) == 0
    ]
    if not fits:
        return None
    # Of several, one in which nothing but rows lies; else axes are joined from the first on, and
    # what splits the features leaves the rows where they lay.
    joins = len(shape) < len(before)
    best = min(fits, key=lambda i: (shape[i] != 1, i if joins else i != axis))
    pattern = np.array(shape, np.int64)
    pattern[best] = -1
    node.input(1).replace_source_output(op.constant(pattern).output(0))
    return best, outer // left[best]


def _broadcast(node: Any, given: Given, count: Any) -> Place | None:
    if given[0] is None:
        return None
    shape = _shape(node.output(0))
    axis = given[0][0] + len(shape) - len(_shape(node.input_value(0)))
    if shape[axis] != 1:
        return None
    node.input(1).replace_source_output(_sized(shape, axis, count))
    return axis, given[0][1]


def _transposed(node: Any, given: Given, _count: Any) -> Place | None:
    order = _constant(node, 1)
    return (order.index(given[0][0]), given[0][1]) if order and given[0] else None


def _unsqueezed(node: Any, given: Given, _count: Any) -> Place | None:
    rank, new = len(_shape(node.output(0))), _constant(node, 1)
    if new is None or given[0] is None:
        return None
    kept = [axis for axis in range(rank) if axis not in {one % rank for one in new}]
    return kept[given[0][0]], given[0][1]


def _reduced(node: Any, given: Given, _count: Any) -> Place | None:
    """Some axes go, or keep a length of one."""
    rank, axes = len(_shape(node.input_value(0))), _constant(node, 1)
    if axes is None or given[0] is None or given[0][0] in {one % rank for one in axes}:
        return None
    gone = rank - len(_shape(node.output(0)))
    before = sum(one % rank < given[0][0] for one in axes)
    return given[0][0] - (before if gone else 0), given[0][1]


def _gathered(node: Any, given: Given, count: Any) -> Place | None:
    rank, index = len(_shape(node.input_value(0))), node.input_value(1)
    along = int(node.input_value(2).get_node().data) % rank
    data, ids, *_ = given
    if data is None and ids is not None:  # what ids stand for in a table
        return along + ids[0], ids[1]
    if data is not None and ids is None and along != data[0]:
        return data[0] + (len(_shape(index)) - 1 if along < data[0] else 0), data[1]
    if data == (along, 1) and ids == (0, 1) and len(_shape(index)) == 1:
        # One of each row's tokens, in an axis that holds those of all rows one after the other.
        zero, one = np.int64(0), np.int64(1)
        rows = op.range(zero, op.squeeze(count, zero), one, "i64")
        start = op.multiply(rows, np.int64(_shape(node.input_value(0))[along]))
        moved = op.add(index, op.convert(start, index.get_element_type().get_type_name()))
        node.input(1).replace_source_output(moved.output(0))
        return along, 1
    return None


_RULES: dict[str, Callable[[Any, Given, Any], Place | None]] = {
    **dict.fromkeys(
        (
            "AvgPool", "BatchNormInference", "Clamp", "Convert", "Convolution", "Elu", "Erf", "Exp",
            "Gelu", "GroupConvolution", "HSigmoid", "HSwish", "IsNaN", "LogicalNot", "MaxPool",
            "Negative", "Relu", "Sigmoid", "Sqrt", "Swish", "Tanh",
        ),
        _in_place,
    ),
    **dict.fromkeys(
        ("CumSum", "MVN", "Slice", "Softmax", "Split", "TopK", "VariadicSplit"), _along_another
    ),
    **dict.fromkeys(
        (
            "Add", "Divide", "Equal", "LogicalAnd", "LogicalOr", "MatMul", "Maximum", "Minimum",
            "Mod", "Multiply", "NotEqual", "Power", "ScaledDotProductAttention", "Select",
            "SquaredDifference", "Subtract",
        ),
        _lined_up,
    ),
    **dict.fromkeys(
        ("Squeeze", "ReduceL2", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum"), _reduced
    ),
    "Broadcast": _broadcast,
    "Concat": _joined,
    "Gather": _gathered,
    "Reshape": _reshaped,
    "Transpose": _transposed,
    "Unsqueeze": _unsqueezed,
}  # fmt: skip


def take_embeddings(graph: Any) -> NDArray[Any] | None:
    """Takes the table out of a text tower, which then is given its rows."""
    ids = graph.inputs[0].get_node()
    for gather in graph.get_ops():
        if gather.get_type_name() != "Gather":
            continue
        places = gather.input_value(1).get_node()
        if places.get_type_name() == "Convert":  # torch's are of another width
            places = places.input_value(0).get_node()
        if places != ids:
            continue
        weights = gather.input_value(0).get_node()
        if weights.get_type_name() == "Constant" and weights.get_element_type() == Type.f32:
            table: NDArray[Any] = weights.data
            rows = op.parameter(gather.get_output_partial_shape(0), np.float32, name="rows")
            replace_node(gather, rows)
            graph.add_parameters([rows])
            graph.validate_nodes_and_infer_types()
            return table
    graph.validate_nodes_and_infer_types()
    return None


def replace_node(node: Any, by: Any) -> None:
    for target in node.output(0).get_target_inputs():
        target.replace_source_output(by.output(0))
