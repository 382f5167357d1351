"""Values: those of tables and datasets equal what the library that wrote them gives, less nulls that Arrow added."""

from __future__ import annotations

import datetime
import json
import uuid
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
from datasets import ClassLabel, Features, Json, LargeList, List, Sequence, Value
from pyarrow import csv, ipc, parquet

from llmtrain.cli.app import run
from llmtrain.config.sections.chat import ChatConfig
from llmtrain.config.sections.data import PrepareConfig
from llmtrain.data.chat.sample_maker import SampleMaker
from llmtrain.data.chat.shapes import example_of
from llmtrain.data.chat.templates import ChatTemplate
from llmtrain.data.files.read import Row, read_rows
from llmtrain.data.files.row_faults import RowError, RowFault
from llmtrain.data.prepare.documents import open_corpus
from llmtrain.data.prepare.inputs import find_inputs
from llmtrain.errors import ConfigError
from tests.support.chat import CHATML, tiny_chat_tokenizer

TEXTS = ['é\n"x" 汉 🙂', None, ""]
DAY = datetime.date(1969, 7, 20)
MOMENT = datetime.datetime(1999, 12, 31, 23, 59, 59, 123456)
CALLS = pa.list_(pa.struct({"name": pa.string(), "arguments": pa.struct({"city": pa.string(), "zoom": pa.int8()})}))
XY = pa.struct({"x": pa.int8(), "y": pa.int8()})

ARRAYS: dict[str, pa.Array] = {
    "string": pa.array(TEXTS),
    "large_string": pa.array(TEXTS, pa.large_string()),
    "string_view": pa.array(TEXTS, pa.string_view()),
    "dictionary": pa.array(TEXTS).dictionary_encode(),
    "dictionary of large_string": pa.array(TEXTS, pa.large_string()).dictionary_encode(),
    "run_end_encoded": pa.RunEndEncodedArray.from_arrays([1, 2, 3], pa.array(TEXTS)),
    "binary": pa.array([b"\xff\x00", None, b"a"]),
    "large_binary": pa.array([b"\xff\x00", None, b"a"], pa.large_binary()),
    "binary_view": pa.array([b"\xff\x00", None, b"a"], pa.binary_view()),
    "fixed_size_binary": pa.array([b"abc", None, b"\x00\x01\x02"], pa.binary(3)),
    "null": pa.nulls(3),
    "bool": pa.array([True, None, False]),
    **{
        f"{sign}int{bits}": pa.array([0, None, 2 ** (bits - (not sign)) - 1], getattr(pa, f"{sign}int{bits}")())
        for sign in ("", "u")
        for bits in (8, 16, 32, 64)
    },
    "float16": pa.array([0.5, None, -2.0], pa.float16()),
    "float32": pa.array([0.1, None, float("inf")], pa.float32()),
    "float64": pa.array([0.1, None, 1e300]),
    "decimal32": pa.array([Decimal("1.10"), None, Decimal("-0.01")], pa.decimal32(5, 2)),
    "decimal64": pa.array([Decimal("1.10"), None, Decimal("-0.01")], pa.decimal64(12, 2)),
    "decimal128": pa.array([Decimal("1.10"), None, Decimal("-0.01")], pa.decimal128(30, 2)),
    "decimal256": pa.array([Decimal("1.10"), None, Decimal("-0.01")], pa.decimal256(60, 2)),
    "date32": pa.array([DAY, None, DAY]),
    "date64": pa.array([DAY, None, DAY], pa.date64()),
    "time32": pa.array([datetime.time(1, 2, 3), None, datetime.time()], pa.time32("s")),
    "time64": pa.array([datetime.time(1, 2, 3, 4), None, datetime.time()], pa.time64("us")),
    **{f"timestamp {unit}": pa.array([0, None, 1 << 29]).cast(pa.timestamp(unit)) for unit in ("s", "ms", "us", "ns")},
    "timestamp with a zone": pa.array([MOMENT, None, MOMENT], pa.timestamp("us", "Europe/Paris")),
    "duration": pa.array([datetime.timedelta(seconds=1), None, datetime.timedelta()], pa.duration("us")),
    "list": pa.array([["a", None], None, []]),
    "large_list": pa.array([["a", None], None, []], pa.large_list(pa.string())),
    "list_view": pa.array([["a", None], None, []], pa.list_view(pa.string())),
    "large_list_view": pa.array([["a", None], None, []], pa.large_list_view(pa.string())),
    "fixed_size_list": pa.array([[1, 2], [None, 0], [3, None]], pa.list_(pa.int64(), 2)),
    "struct": pa.array([{"a": 1, "b": None}, None, {"b": {"c": None, "d": "x"}}]),
    "list of structs": pa.array([[{"name": "f", "arguments": {"city": "Paris"}}, None], None, []], CALLS),
    "list_view of structs": pa.array(
        [[{"a": 1}, {"b": 2}], None, []], pa.list_view(pa.struct({"a": pa.int8(), "b": pa.int8()}))
    ),
    "fixed_size_list of structs": pa.array(
        [[{"a": 1}], [{"b": 1}], [None]], pa.list_(pa.struct({"a": pa.int8(), "b": pa.int8()}), 1)
    ),
    "map": pa.array([[("a", 1), ("b", None)], None, []], pa.map_(pa.string(), pa.int64())),
    "map of structs": pa.array([[("a", {"x": 1})], None, []], pa.map_(pa.string(), XY)),
    "map by structs": pa.array(
        [[[({"a": 1, "b": None}, [{"x": 1}, {"y": 2}])]], None, []],
        pa.list_(pa.map_(pa.struct({"a": pa.int8(), "b": pa.int8()}), pa.list_(XY))),
    ),
    "opaque struct": pa.ExtensionArray.from_storage(
        pa.opaque(pa.struct({"a": pa.int8(), "b": pa.int8()}), "kind", "vendor"),
        pa.array([{"a": 1}, None, {"b": 2}], pa.struct({"a": pa.int8(), "b": pa.int8()})),
    ),
    "sparse union": pa.UnionArray.from_sparse(
        pa.array([0, 2, 1], pa.int8()),
        [
            pa.array([{"a": 1, "b": None}] * 3),
            pa.array([[{"c": 1}, {"d": 2}]] * 3),
            pa.array([{"e": 1, "f": None}] * 3),
        ],
    ),
    "dictionary of structs": pa.DictionaryArray.from_arrays(
        pa.array([1, None, 0]), pa.array([{"a": 1, "b": None}, {"a": None, "b": 2}])
    ),
    "dictionary in a struct": pa.StructArray.from_arrays([pa.array(TEXTS).dictionary_encode()], ["a"]),
    "dense union": pa.UnionArray.from_dense(
        pa.array([0, 1, 0], pa.int8()), pa.array([0, 0, 1], pa.int32()), [pa.array(["a", None]), pa.array([7])]
    ),
    "uuid": pa.array([uuid.UUID(int=7).bytes, None, uuid.UUID(int=8).bytes], pa.uuid()),
    "bool8": pa.ExtensionArray.from_storage(pa.bool8(), pa.array([1, None, 0], pa.int8())),
}
"""Of every kind of type that pyarrow has: three values, of which the second is null where the type has nulls."""


def write_parquet(table: pa.Table, path: Path) -> str:
    parquet.write_table(table, path / "rows.parquet")
    return str(path / "rows.parquet")


def write_arrow_file(table: pa.Table, path: Path) -> str:
    with ipc.new_file(str(path / "rows.arrow"), table.schema) as writer:
        writer.write_table(table)
    return str(path / "rows.arrow")


def write_arrow_stream(table: pa.Table, path: Path) -> str:
    with ipc.new_stream(str(path / "rows.arrow"), table.schema) as writer:
        writer.write_table(table)
    return str(path / "rows.arrow")


def write_dataset(table: pa.Table, path: Path) -> str:
    datasets.Dataset(table).save_to_disk(path / "saved")
    return str(path / "saved")


def access_of_pyarrow(path: str) -> list[Any]:
    if path.endswith(".parquet"):
        return list(parquet.read_table(path).to_pylist())
    with open(path, "rb") as stream:
        opened = ipc.open_file(stream) if stream.read(6) == b"ARROW1" else None
        stream.seek(0)
        return list((opened or ipc.open_stream(stream)).read_all().to_pylist())


def access_of_datasets(path: str) -> list[Any]:
    return list(datasets.load_from_disk(path))


CONTAINERS: dict[str, tuple[Callable[[pa.Table, Path], str], Callable[[str], list[Any]]]] = {
    "parquet": (write_parquet, access_of_pyarrow),
    "arrow file": (write_arrow_file, access_of_pyarrow),
    "arrow stream": (write_arrow_stream, access_of_pyarrow),
    "dataset": (write_dataset, access_of_datasets),
}

CANNOT_BE_WRITTEN = {
    *(("parquet", kind) for kind in ("run_end_encoded", "dense union", "sparse union", "dictionary of structs")),
    *(("dataset", kind) for kind in ("run_end_encoded", "dense union", "decimal32", "decimal64", "uuid", "bool8")),
    *(("dataset", kind) for kind in ("list_view", "large_list_view", "list_view of structs", "map", "map of structs")),
    *(("dataset", kind) for kind in ("map by structs", "opaque struct", "sparse union", "dictionary of structs")),
}
"""What the library itself cannot write."""


def without_added_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_added_nulls(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [without_added_nulls(inner) for inner in value]
    return tuple(map(without_added_nulls, value)) if isinstance(value, tuple) else value


def values_at(path: str) -> list[Any]:
    rows = list(read_rows(path, key="data.train"))
    assert all(isinstance(row, Row) for row in rows), rows
    return [row.values for row in rows if isinstance(row, Row)]


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("kind", ARRAYS)
def test_values_are_those_of_the_librarys_own_row_access(kind: str, container: str, tmp_path: Path) -> None:
    write, access = CONTAINERS[container]
    table = pa.table({"id": pa.array([1, 2, 3]), "value": ARRAYS[kind]})
    if (container, kind) in CANNOT_BE_WRITTEN:
        with pytest.raises(
            (pa.ArrowNotImplementedError, ValueError),
            match=r"Unhandled|not yet|datasets dtype",
        ):
            write(table, tmp_path)
        return
    path = write(table, tmp_path)
    expected = [{key: without_added_nulls(value) for key, value in row.items()} for row in access(path)]
    assert values_at(path) == expected
    assert expected[0]["value"] is not None or kind == "null"


FEATURES: dict[str, tuple[Any, list[Any]]] = {
    "ClassLabel": (ClassLabel(names=["no", "yes"]), [1, 0, 1]),
    "List": (List(Value("string")), [["a"], [], ["b", "c"]]),
    "LargeList": (LargeList(Value("int8")), [[1], [], [2, 3]]),
    "Sequence of an object": (Sequence({"a": Value("int8"), "b": Value("string")}), [{"a": [1], "b": ["x"]}] * 3),
    "Translation": (datasets.Translation(languages=["de", "en"]), [{"de": "eins", "en": "one"}] * 3),
    "Array2D": (datasets.Array2D(shape=(1, 2), dtype="int32"), [[[1, 2]]] * 3),
    "Json": (Json(), [{"a": None, "b": [1.5, "é"]}, [1, {"c": {}}], "text"]),
    "List of Json": (List(Json()), [[{"a": 1}, {"b": None}], [], ["x"]]),
    "Json in an object": ({"a": Json(), "b": Value("string")}, [{"a": {"x": [None]}, "b": "y"}] * 3),
    "Json in a list of objects": (List({"f": {"p": Json()}}), [[{"f": {"p": {"type": None, "x": 1}}}], [], []]),
}


@pytest.mark.parametrize("kind", FEATURES)
@pytest.mark.parametrize("container", ["saved", "shards", "parquet"])
def test_values_of_features_are_those_of_datasets_own_row_access(kind: str, container: str, tmp_path: Path) -> None:
    feature, values = FEATURES[kind]
    rows = datasets.Dataset.from_dict({"value": values}, features=Features({"value": feature}))
    rows.save_to_disk(tmp_path / "saved")
    path = str(tmp_path / "saved")
    if container == "shards":
        [path] = map(str, (tmp_path / "saved").glob("*.arrow"))
    elif container == "parquet":
        path = str(tmp_path / "rows.parquet")
        rows.to_parquet(path)
    assert values_at(path) == [{"value": row["value"]} for row in rows]


CONVERSATIONS: list[dict[str, Any]] = [
    {
        "messages": [
            {"role": "user", "content": "weather?"},
            {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": name, "arguments": arguments}}]},
            {"role": "tool", "content": "18C", "name": name},
            {"role": "assistant", "content": "It is 18C.", "reasoning_content": "r"},
        ],
        "tools": [{"type": "function", "function": {"name": name, "parameters": {"properties": properties}}}],
    }
    for name, arguments, properties in (
        ("weather", {"city": "Paris"}, {"city": {"type": "string", "enum": ["Paris"]}}),
        ("zoom", {"level": 1.5, "at": {"x": 1}}, {"level": {"type": "number"}}),
        ("now", {"deep": [{"a": 1}, {"b": 2}]}, {"zone": {"type": "string"}}),
    )
]


def as_json_feature(rows: list[dict[str, Any]], path: Path) -> str:
    features = Features({"messages": Json(), "tools": Json()})
    datasets.Dataset.from_list(rows, features=features).save_to_disk(path / "saved")
    return str(path / "saved")


def as_loaded_json(rows: list[dict[str, Any]], path: Path) -> str:
    (path / "source.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    loaded = datasets.load_dataset(
        "json", data_files=str(path / "source.jsonl"), split="train", cache_dir=str(path / "c")
    )
    loaded.save_to_disk(path / "saved")
    return str(path / "saved")


WRITERS: dict[str, Callable[[list[dict[str, Any]], Path], str]] = {
    "parquet": lambda rows, path: write_parquet(pa.Table.from_pylist(rows), path),
    "arrow": lambda rows, path: write_arrow_file(pa.Table.from_pylist(rows), path),
    "stream": lambda rows, path: write_arrow_stream(pa.Table.from_pylist(rows), path),
    "dataset": lambda rows, path: write_dataset(pa.Table.from_pylist(rows), path),
    "json feature": as_json_feature,
    "load_dataset": as_loaded_json,
}


def samples_of(path: str) -> list[int]:
    """The tokens that a run learns from, one row after the other."""
    template = CHATML.replace('message["content"]', '(message["reasoning_content"] or "") + message["content"]')
    maker = SampleMaker(ChatTemplate(tiny_chat_tokenizer(template)), ChatConfig(train=path))
    made = maker.make(list(read_rows(path, key="data.train")))
    assert not made.faults
    return list(made.input_ids.tolist())


@pytest.mark.parametrize("writer", WRITERS)
def test_conversations_mean_the_same_in_every_format(writer: str, tmp_path: Path, capsys: Any) -> None:
    path = WRITERS[writer](CONVERSATIONS, tmp_path)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in CONVERSATIONS))
    assert [example_of(values) for values in values_at(path)] == [example_of(row) for row in CONVERSATIONS]
    assert samples_of(path) == samples_of(str(tmp_path / "rows.jsonl"))
    assert run(["convert", path, str(tmp_path / "out.jsonl")]) == 0
    assert [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()] == CONVERSATIONS
    capsys.readouterr()
    found = []
    for one in (path, str(tmp_path / "rows.jsonl")):
        assert run(["inspect", one, "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        found.append((report["characters"], [row["pieces"] for row in report["first_rows"]]))
    assert found[0] == found[1]


def test_columns_that_a_dataset_hides_are_not_read(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_list([{"text": "a", "n": 1}])
    rows.set_format("numpy", columns=["text"])
    rows.save_to_disk(tmp_path / "saved")
    assert values_at(str(tmp_path / "saved")) == [{"text": "a"}] == list(datasets.load_from_disk(tmp_path / "saved"))


def test_what_is_no_text_is_named_by_its_type(tmp_path: Path) -> None:
    path = write_parquet(pa.table({"prompt": [b"a"], "completion": ["b"]}), tmp_path)
    with pytest.raises(RowError, match="'prompt' should be text, but is a value of type bytes"):
        example_of(values_at(path)[0])


def test_a_null_of_json_text_stays(tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": None}], "tools": [{"a": None}]}
    path = as_json_feature([row], tmp_path)
    assert values_at(path) == [row]


def test_a_value_that_python_cannot_read_is_a_fault_of_its_row(tmp_path: Path) -> None:
    broken = pa.StringArray.from_buffers(3, *pa.array([b"a", b"\xff", b"c"]).buffers()[1:])
    path = write_parquet(pa.table({"text": broken}), tmp_path)
    good, bad, other = read_rows(path, key="data.train")
    assert [one.values for one in (good, other) if isinstance(one, Row)] == [{"text": "a"}, {"text": "c"}]
    assert bad.source.endswith("rows.parquet:2")
    assert isinstance(bad, RowFault)
    assert "cannot be read" in bad.message
    json_text = pa.ExtensionArray.from_storage(pa.json_(), pa.array(["1", "{", "2"]))
    [_, fault, _] = read_rows(write_arrow_file(pa.table({"text": json_text}), tmp_path), key="data.train")
    assert isinstance(fault, RowFault)


def test_two_columns_of_one_name_are_a_fault_and_none_is_lost(tmp_path: Path) -> None:
    table = pa.table([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    for write in (write_parquet, write_arrow_file, write_arrow_stream):
        [fault] = read_rows(write(table, tmp_path), key="data.train")
        assert isinstance(fault, RowFault)
        assert "two columns have the name 'text': rename one" in fault.message


TEXT_TYPES = [kind for kind in ARRAYS if "string" in kind or kind in ("dictionary", "run_end_encoded")]


@pytest.mark.parametrize("container", ["parquet", "arrow file", "dataset"])
@pytest.mark.parametrize("kind", TEXT_TYPES)
def test_prepare_finds_and_reads_text_of_every_type(kind: str, container: str, tmp_path: Path) -> None:
    if (container, kind) in CANNOT_BE_WRITTEN:
        return
    path = CONTAINERS[container][0](pa.table({"text": ARRAYS[kind].slice(0, 1)}), tmp_path)
    options = PrepareConfig(input=path, output=str(tmp_path / "out"))
    reader = open_corpus(find_inputs(options), options)
    documents = [document for piece in reader.pieces() for document in reader.read(piece).documents]
    assert [(document.text, document.error) for document in documents] == [(TEXTS[0], None)]


def test_prepare_names_the_type_of_a_column_that_is_no_text(tmp_path: Path) -> None:
    path = write_parquet(pa.table({"text": pa.array([b"a"])}), tmp_path)
    options = PrepareConfig(input=path, output=str(tmp_path / "out"))
    with pytest.raises(ConfigError, match=r"none of the usual text fields .* holds text, among 'text' \(binary\)"):
        open_corpus(find_inputs(options), options)


def test_cells_of_csv_are_text_as_they_stand_there(tmp_path: Path) -> None:
    text = 'prompt,completion,n\n"[1, 2]"," a ""b""\n",007\nnull,NaN,\n'
    (tmp_path / "rows.csv").write_text(text)
    columns = dict.fromkeys(("prompt", "completion", "n"), pa.string())
    table = csv.read_csv(
        tmp_path / "rows.csv",
        parse_options=csv.ParseOptions(newlines_in_values=True),
        convert_options=csv.ConvertOptions(column_types=columns, strings_can_be_null=False),
    )
    assert values_at(str(tmp_path / "rows.csv")) == table.to_pylist()
