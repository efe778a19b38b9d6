"""An entry's configuration: written, read back, and refused where it can't be used."""

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig

from entry.config import (
    EntryError,
    check_weights,
    find_entries,
    read_entry,
    to_config,
    write_atomically,
    write_entry,
)
from tests.tiny import write_tiny_entry

KEYS = {
    *("format", "path", "solver", "steps", "nfe", "image", "t_end", "feature", "features"),
    *("classify_t_end", "labels", "precision", "tolerance", "versions"),
}


def table_of(directory: Path) -> dict[str, Any]:
    config = text_format.Parse((directory / "config.pbtxt").read_text(), ModelConfig())
    table: dict[str, Any] = json.loads(config.parameters["prg"].string_value)
    return table


@pytest.mark.parametrize("head", [True, False])
def test_what_is_written_is_read(tmp_path: Path, head: bool) -> None:
    directory = write_tiny_entry(tmp_path, head=head, versions=("1", "2", "10"))
    entry = read_entry(directory)
    write_entry(directory, entry)
    assert read_entry(directory) == entry
    assert entry.has_head == head
    assert entry.default_version == "10"
    assert list(entry.outputs()) == ["STATE", "HIDDEN", "EMBEDDING", *(["LOGITS", "KNOWN"] if head else [])]
    assert table_of(directory).keys() == KEYS - (set() if head else {"labels", "classify_t_end"})


def test_triton_is_told_what_it_needs(tmp_path: Path) -> None:
    config = to_config(read_entry(write_tiny_entry(tmp_path, size=48)))
    assert config.platform == "pytorch_libtorch"
    assert [list(i.dims) for i in config.input] == [[3, 48, 48], [1]]
    assert config.max_batch_size == 64
    assert config.version_policy.WhichOneof("policy_choice") == "all"
    # without a kind, so that one entry serves on a GPU and without
    assert [(group.count, group.kind) for group in config.instance_group] == [(2, 0)]
    policy = config.dynamic_batching.default_queue_policy
    assert (policy.default_timeout_microseconds, policy.max_queue_size) == (60_000_000, 256)
    assert policy.allow_timeout_override
    assert config.dynamic_batching.priority_levels == 2
    assert {w.batch_size for w in config.model_warmup} == {1, 8, 32, 64}


def change(directory: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Rewrite the parameter by `edit(table)`."""
    path, table = directory / "config.pbtxt", table_of(directory)
    edit(table)
    config = text_format.Parse(path.read_text(), ModelConfig())
    config.parameters["prg"].string_value = json.dumps(table)
    path.write_text(text_format.MessageToString(config))


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (lambda t: t.pop("nfe"), "prg.nfe"),
        (lambda t: t.pop("labels"), "labels"),
        (lambda t: t["features"].pop("embedding"), "'embedding'"),
        (lambda t: t["versions"]["1"].pop("held_out"), "held_out"),
        (lambda t: t["versions"].update({"01": t["versions"].pop("1")}), "'01'"),
        (lambda t: t.update(extra=1), "prg.extra"),
        (lambda t: t.update(format=1), "format 1"),
        (lambda t: t.update(format=3), "prg.format"),
        (lambda t: t.update(steps=True), "prg.steps"),
        (lambda t: t.update(steps=0), "prg.steps"),
        (lambda t: t.update(t_end=1.5), "prg.t_end"),
        (lambda t: t.update(t_end=float("nan")), "NaN"),
        (lambda t: t.update(feature="pixels"), "prg.feature"),
        (lambda t: t.update(labels=["a", "a", "b", "c"]), "labels"),
        (lambda t: t.update(labels=["a"]), "LOGITS"),
        (lambda t: t["image"].update(preprocessing="v1"), "prg.image.preprocessing"),
        (lambda t: t["image"].update(resize=16), "resize"),
        (lambda t: t["image"].update(size=16, resize=16), "IMAGE"),
        (lambda t: t["image"].update(std=[1, 0, 1]), "prg.image.std.1"),
        (lambda t: t["features"]["hidden"].update(dim=6), "HIDDEN"),
        (lambda t: t["features"]["hidden"].update(pooling=["max"]), "hidden.pooling"),
        (lambda t: t["versions"]["1"]["calibration"].update(temperature=0), "temperature"),
        (lambda t: t["versions"]["1"].update(sha256="abc"), "prg.versions.1.sha256"),
    ],
)
def test_a_wrong_parameter_is_refused_naming_file_and_key(tmp_path: Path, edit: Any, named: str) -> None:
    directory = write_tiny_entry(tmp_path)
    change(directory, edit)
    with pytest.raises(EntryError) as error:
        read_entry(directory)
    assert named in str(error.value)
    assert str(directory) in str(error.value)


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ('platform: "pytorch_libtorch"', 'platform: "onnxruntime_onnx"', "platform"),
        ("max_batch_size: 64", "max_batch_size: 8", "max_batch_size"),
        ('name: "tiny"', 'name: "other"', "name"),
        ("TYPE_UINT8", "TYPE_FP32", "data_type"),
        ('name: "HIDDEN"', 'name: "hidden"', "HIDDEN"),
        ('key: "prg"', 'key: "gpr"', '"prg"'),
        ('platform: "', "platform: ", "config.pbtxt"),
    ],
)
def test_a_wrong_configuration_is_refused(tmp_path: Path, old: str, new: str, named: str) -> None:
    path = write_tiny_entry(tmp_path) / "config.pbtxt"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(EntryError) as error:
        read_entry(path.parent)
    assert named in str(error.value)
    assert str(path) in str(error.value)


def test_a_version_that_is_gone_or_not_listed_fails_alone(tmp_path: Path) -> None:
    directory = write_tiny_entry(tmp_path, versions=("1", "2", "3"))
    (directory / "2" / "model.pt").unlink()
    (directory / "4").mkdir()
    (directory / "4" / "model.pt").write_bytes(b"half an export")
    entry = read_entry(directory)
    assert entry.usable_versions == ("1", "3")
    assert entry.failed_versions.keys() == {"2", "4"}


def test_a_bad_entry_hides_no_other_and_hidden_folders_are_none(tmp_path: Path) -> None:
    hidden = (".snapshot", "..2026_11_27", ".ipynb_checkpoints", "@eaDir", "lost+found", "__MACOSX")
    for name in (*hidden, "bad", "good"):
        write_tiny_entry(tmp_path, name)
    (tmp_path / "bad" / "config.pbtxt").write_bytes(b"\xff\xfe")
    (tmp_path / "not-an-entry").mkdir()
    found = {name: isinstance(entry, EntryError) for name, entry in find_entries(tmp_path).items()}
    assert found == {"bad": True, "good": False}


def test_what_can_not_be_read_is_no_smaller_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("closed", "good"):
        write_tiny_entry(tmp_path, name)
    (tmp_path / "README").write_text("no folder")
    stat = Path.stat

    def denied(path: Path, **how: bool) -> object:
        if path.parent.name == "closed":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return stat(path, **how)

    monkeypatch.setattr(Path, "stat", denied)
    found = find_entries(tmp_path)
    assert list(found) == ["closed", "good"]
    assert "closed/config.pbtxt: Permission denied" in str(found["closed"])
    with pytest.raises(FileNotFoundError):
        find_entries(tmp_path / "gone")


def test_weights_that_differ_from_their_digest_are_refused(tmp_path: Path) -> None:
    directory = write_tiny_entry(tmp_path)
    entry = read_entry(directory)
    path = check_weights(directory, entry, "1")
    path.write_bytes(path.read_bytes() + b"!")
    with pytest.raises(EntryError, match=r"prg.versions.1.sha256"):
        check_weights(directory, entry, "1")


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")
    monkeypatch.setattr("os.fsync", Mock(side_effect=OSError))
    with pytest.raises(OSError):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
