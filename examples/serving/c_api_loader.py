"""Runs SavedModels through TensorFlow's C API, with nothing but the standard library.

Started as `python3 -I -S c_api_loader.py LIBTENSORFLOW_CC MODEL [OP_LIBRARY ...]`:
no site-packages, so neither Keras nor NumPy nor TensorFlow's Python can be
imported. It loads the model with `TF_LoadSessionFromSavedModel`, the loader of
TensorFlow Serving, answers one line of JSON, and then one line for each request
line on its standard input:

    {"signature": str, "inputs": {name: tensor}, "repeat": int}

A tensor is `{"dtype": int, "shape": [int], "data": base64}`; the data of strings
(dtype 7) are a list of base64 in row-major order. The answer is
`{"outputs": {name: tensor}, "identical": bool, "seconds": [float]}` or
`{"error": text}`.
"""

import base64
import ctypes
import json
import sys
import time

STRING = 7
SIZE_OF_TSTRING = 24
# Bytes of an element, by the number of the type in tensorflow/c/tf_datatype.h.
ITEM_SIZES = {1: 4, 2: 8, 3: 4, 4: 1, 5: 2, 6: 1, 9: 8, 10: 1, 14: 2, 19: 2, 22: 4}


class Output(ctypes.Structure):
    _fields_ = (("operation", ctypes.c_void_p), ("index", ctypes.c_int))


class Buffer(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("length", ctypes.c_size_t),
        ("deallocator", ctypes.c_void_p),
    )


def library(path):
    tf = ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    for name, result in {
        "TF_NewStatus": pointer,
        "TF_Message": ctypes.c_char_p,
        "TF_NewGraph": pointer,
        "TF_NewSessionOptions": pointer,
        "TF_NewBuffer": ctypes.POINTER(Buffer),
        "TF_LoadSessionFromSavedModel": pointer,
        "TF_LoadLibrary": pointer,
        "TF_GraphOperationByName": pointer,
        "TF_AllocateTensor": pointer,
        "TF_TensorData": pointer,
        "TF_TensorByteSize": size,
        "TF_Dim": ctypes.c_int64,
        "TF_StringGetDataPointer": pointer,
        "TF_StringGetSize": size,
    }.items():
        getattr(tf, name).restype = result
    return tf


class Status:
    """Raises what the C API reports."""

    def __init__(self, tf):
        self.tf = tf
        self.pointer = ctypes.c_void_p(tf.TF_NewStatus())

    def check(self):
        if self.tf.TF_GetCode(self.pointer):
            raise RuntimeError(
                self.tf.TF_Message(self.pointer).decode(errors="replace")
            )


def fields_of(message):
    """(number, value) of each field of a serialised protocol buffer."""
    position = 0

    def varint():
        nonlocal position
        value = shift = 0
        while True:
            byte = message[position]
            position += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while position < len(message):
        key = varint()
        number, kind = key >> 3, key & 7
        if kind == 0:
            value = varint()
        else:
            length = varint() if kind == 2 else {1: 8, 5: 4}[kind]
            value = message[position : position + length]
            position += length
        yield number, value


def map_of(message, number):
    """A map field with string keys."""
    entries = (dict(fields_of(value)) for n, value in fields_of(message) if n == number)
    return {entry.get(1, b"").decode(): entry.get(2, b"") for entry in entries}


def tensor_info(message):
    """Name and rank (None if unknown) of a `TensorInfo`."""
    found = dict(fields_of(message))
    shape = list(fields_of(found.get(3, b"")))
    unknown = any(number == 3 and value for number, value in shape)
    rank = None if unknown else sum(number == 2 for number, _ in shape)
    return found[1].decode(), rank


class Model:
    def __init__(self, tf, directory):
        self.tf, self.status = tf, Status(tf)
        self.graph = ctypes.c_void_p(tf.TF_NewGraph())
        meta_graph = tf.TF_NewBuffer()
        tags = (ctypes.c_char_p * 1)(b"serve")
        self.session = ctypes.c_void_p(
            tf.TF_LoadSessionFromSavedModel(
                ctypes.c_void_p(tf.TF_NewSessionOptions()),
                None,
                directory.encode(),
                tags,
                1,
                self.graph,
                meta_graph,
                self.status.pointer,
            )
        )
        self.status.check()
        raw = ctypes.string_at(meta_graph.contents.data, meta_graph.contents.length)
        self.signatures = {
            name: (
                {n: tensor_info(info) for n, info in map_of(signature, 1).items()},
                {n: tensor_info(info) for n, info in map_of(signature, 2).items()},
            )
            for name, signature in map_of(raw, 5).items()
        }

    def endpoint(self, tensor_name):
        name, _, index = tensor_name.partition(":")
        operation = self.tf.TF_GraphOperationByName(self.graph, name.encode())
        if not operation:
            raise RuntimeError(f"no operation {name!r} in the graph")
        return Output(operation, int(index or 0))

    def run(self, signature, inputs, repeat=1):
        if signature not in self.signatures:
            raise RuntimeError(f"no signature {signature!r}: {sorted(self.signatures)}")
        wanted, answers = self.signatures[signature]
        if set(inputs) != set(wanted):
            raise RuntimeError(f"inputs {sorted(inputs)}, wanted {sorted(wanted)}")
        names, keys = list(inputs), list(answers)
        feeds = (Output * len(names))(*(self.endpoint(wanted[n][0]) for n in names))
        fetches = (Output * len(keys))(*(self.endpoint(answers[k][0]) for k in keys))
        values = (ctypes.c_void_p * len(names))(
            *(self.to_tensor(inputs[n]) for n in names)
        )
        results, seconds = [], []
        for _ in range(repeat):
            found = (ctypes.c_void_p * len(keys))()
            start = time.perf_counter()
            self.tf.TF_SessionRun(
                self.session,
                None,
                feeds,
                values,
                ctypes.c_int(len(names)),
                fetches,
                found,
                ctypes.c_int(len(keys)),
                None,
                ctypes.c_int(0),
                None,
                self.status.pointer,
            )
            seconds.append(time.perf_counter() - start)
            self.status.check()
            results.append(
                {key: self.from_tensor(t) for key, t in zip(keys, found, strict=True)}
            )
        for value in values:
            self.tf.TF_DeleteTensor(ctypes.c_void_p(value))
        return {
            "outputs": results[0],
            "identical": all(result == results[0] for result in results),
            "seconds": seconds,
        }

    def to_tensor(self, value):
        tf, shape = self.tf, value["shape"]
        count = 1
        for size in shape:
            count *= size
        is_string = value["dtype"] == STRING
        size = SIZE_OF_TSTRING if is_string else ITEM_SIZES[value["dtype"]]
        tensor = tf.TF_AllocateTensor(
            ctypes.c_int(value["dtype"]),
            (ctypes.c_int64 * len(shape))(*shape),
            ctypes.c_int(len(shape)),
            ctypes.c_size_t(count * size),
        )
        data = tf.TF_TensorData(ctypes.c_void_p(tensor))
        if is_string:
            for i, text in enumerate(value["data"]):
                place = ctypes.c_void_p(data + SIZE_OF_TSTRING * i)
                text = base64.b64decode(text)
                tf.TF_StringInit(place)
                tf.TF_StringCopy(place, text, ctypes.c_size_t(len(text)))
        elif count:
            raw = base64.b64decode(value["data"])
            if len(raw) != count * size:
                raise RuntimeError(f"{len(raw)} bytes, wanted {count * size}")
            ctypes.memmove(data, raw, len(raw))
        return tensor

    def from_tensor(self, pointer):
        tf, tensor = self.tf, ctypes.c_void_p(pointer)
        dtype = tf.TF_TensorType(tensor)
        shape = [tf.TF_Dim(tensor, i) for i in range(tf.TF_NumDims(tensor))]
        data = tf.TF_TensorData(tensor)
        length = tf.TF_TensorByteSize(tensor)
        if dtype == STRING:
            content = []
            for i in range(length // SIZE_OF_TSTRING):
                place = ctypes.c_void_p(data + SIZE_OF_TSTRING * i)
                text = ctypes.string_at(
                    tf.TF_StringGetDataPointer(place), tf.TF_StringGetSize(place)
                )
                content.append(base64.b64encode(text).decode())
        else:
            raw = ctypes.string_at(data, length) if length else b""
            content = base64.b64encode(raw).decode()
        tf.TF_DeleteTensor(tensor)
        return {"dtype": dtype, "shape": shape, "data": content}


def answer(function):
    try:
        result = function()
    except RuntimeError as error:
        result = {"error": str(error)}
    print(json.dumps(result), flush=True)
    return "error" not in result


def main():
    tf = library(sys.argv[1])
    model = None

    def load():
        nonlocal model
        status = Status(tf)
        for path in sys.argv[3:]:
            tf.TF_LoadLibrary(path.encode(), status.pointer)
            status.check()
        start = time.perf_counter()
        model = Model(tf, sys.argv[2])
        return {
            "signatures": sorted(model.signatures),
            "seconds": time.perf_counter() - start,
        }

    if not answer(load):
        return
    for line in sys.stdin:
        request = json.loads(line)
        answer(lambda request=request: model.run(**request))


if __name__ == "__main__":
    assert not [path for path in sys.path if "site-packages" in path]
    main()
