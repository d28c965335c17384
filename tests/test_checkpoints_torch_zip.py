# SPDX-License-Identifier: Apache-2.0
"""What is looked at of a torch file before torch does: needs no torch."""

import contextlib
import pickle
import zipfile
from pathlib import Path

import pytest

from meshwen.checkpoints.torch_zip import read_records
from meshwen.errors import MeshwenError


def some_archive(path: Path, pickled: bytes = pickle.dumps({}), **options: int) -> Path:
    with zipfile.ZipFile(path, "w", **options) as archive:
        archive.writestr("x/data.pkl", pickled)
        archive.writestr("x/data/0", bytes(512))
    return path


def refused_archive(path: Path) -> str:
    with pytest.raises(MeshwenError) as caught:
        read_records(path)
    message = str(caught.value)
    assert message.startswith(f"{path} cannot be loaded as torch weights")
    assert "\n" not in message
    return message


def test_records_are_where_the_archive_says(tmp_path):
    path = some_archive(tmp_path / "x.bin")
    (record,) = read_records(path)
    assert record.nbytes == 512
    assert path.read_bytes()[record.offset - 8 : record.offset] == b"x/data/0"


def test_a_compressed_archive_is_refused(tmp_path):
    path = some_archive(tmp_path / "x.bin", compression=zipfile.ZIP_DEFLATED)
    assert "is compressed" in refused_archive(path)


def test_a_pickle_that_takes_for_ever_is_refused_unread(tmp_path):
    twice = b"q\x00h\x00\x86"  # A pair of what there is.
    path = some_archive(tmp_path / "x.bin", b"\x80\x02})" + 100 * twice + b"K\x01s.")
    assert "too many objects" in refused_archive(path)
    path = some_archive(tmp_path / "y.bin", bytes((1 << 24) + 1))
    assert "16777217 bytes" in refused_archive(path)


@pytest.mark.parametrize(
    "pickled", [b"", b"\x80\x02.", b"e.", b"(((", b"h\x07.", b"\x80\x02}q\x00u."]
)
def test_a_damaged_pickle_is_refused_or_left_to_torch(tmp_path, pickled):
    with contextlib.suppress(MeshwenError):
        read_records(some_archive(tmp_path / "x.bin", pickled))


def test_a_directory_that_leads_to_another_record_is_refused(tmp_path):
    path = some_archive(tmp_path / "x.bin")
    content = path.read_bytes()
    directory = content.rindex(b"PK\1\2")
    entry = bytearray(content)
    entry[directory + 42 : directory + 46] = bytes(4)  # Where the last record is said to be.
    path.write_bytes(entry)
    assert "has another record's header" in refused_archive(path)
    for magic in (b"PK\3\5", b"\0\0\0\0"):
        path.write_bytes(content.replace(b"PK\3\4", magic))
        assert refused_archive(path)
