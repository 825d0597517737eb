"""CIFAR files of a few images, written here in the published format, good and bad."""

from __future__ import annotations

import hashlib
import io
import pickle
import tarfile
from itertools import chain

import numpy as np
import pytest
import torch
from torchvision import datasets
from torchvision.datasets import utils

from pdarts_fast.data import load_dataset
from pdarts_fast.errors import RunError, UsageError

PER_FILE = 4
BASE = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}
TABLE = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}


def make_batch(name: str, seed: int, count: int = PER_FILE, **changes) -> dict:
    generator = np.random.default_rng(seed)
    limit = 10 if name == "cifar10" else 100
    batch = {
        "data": generator.integers(0, 256, (count, 3072), dtype=np.uint8),
        "labels" if name == "cifar10" else "fine_labels": generator.integers(
            0, limit, count
        ).tolist(),
        "batch_label": "a batch",
        "filenames": [f"{row}.png" for row in range(count)],
    }
    return {**batch, **changes}


def make_files(name: str, protocol: int = 2) -> dict[str, bytes]:
    table = TABLE[name]
    count = 10 if name == "cifar10" else 100
    files = {
        file: pickle.dumps(make_batch(name, seed), protocol)
        for seed, (file, _) in enumerate([*table.train_list, *table.test_list])
    }
    meta = {table.meta["key"]: [f"class{label}" for label in range(count)]}
    files[table.meta["filename"]] = pickle.dumps(meta, protocol)
    return files


def write(folder, files: dict[str, bytes]):
    folder.mkdir(parents=True, exist_ok=True)
    for file, content in files.items():
        (folder / file).write_bytes(content)
    return folder


def write_archive(path, members: dict[str, bytes]):
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def load(folder, name: str = "cifar10", **options):
    return load_dataset(name, folder, **{"checksum": False, **options})


def fails(folder, message: str, error=RunError, **options) -> None:
    with pytest.raises(error, match=message) as caught:
        load(folder, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_reads_what_was_written(tmp_path, name, protocol):
    files = make_files(name, protocol)
    write(tmp_path / BASE[name], files)
    dataset = load(tmp_path, name)
    table = TABLE[name]
    for part, listed in ((dataset.train, table.train_list), (dataset.test, table.test_list)):
        batches = [pickle.loads(files[file]) for file, _ in listed]
        pixels = np.concatenate([batch["data"] for batch in batches])
        key = "labels" if name == "cifar10" else "fine_labels"
        assert np.array_equal(part.images.numpy().reshape(-1, 3072), pixels)
        assert part.labels.tolist() == [*chain(*(batch[key] for batch in batches))]
    assert dataset.train.images.shape[1:] == (3, 32, 32)
    assert dataset.num_classes == (10 if name == "cifar10" else 100)
    assert dataset.train.classes[:2] == ("class0", "class1")
    assert all(0.4 < value < 0.52 for value in dataset.mean)
    assert all(0.24 < value < 0.28 for value in dataset.std)


def python2_batch(pixels: np.ndarray) -> bytes:
    """A batch as Python 2 pickled it at protocol 2: byte strings where Python 3 has text."""
    count = bytes([len(pixels)])
    content = pixels.tobytes()
    empty_array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
    minus_one = b"J\xff\xff\xff\xff"
    dtype = b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNN" + minus_one * 2 + b"K\x00tb"
    shape = b"K" + count + b"M\x00\x0c\x86"
    string = b"T" + len(content).to_bytes(4, "little") + content
    array = empty_array + b"(K\x01" + shape + dtype + b"\x89" + string + b"tb"
    labels = b"](" + b"".join(b"K" + bytes([row]) for row in range(len(pixels))) + b"e"
    return b"\x80\x02}(U\x04data" + array + b"U\x06labels" + labels + b"u."


def test_reads_pickles_of_python_2(tmp_path):
    files = make_files("cifar10")
    pixels = make_batch("cifar10", 7)["data"]
    files["test_batch"] = python2_batch(pixels)
    dataset = load(write(tmp_path, files))
    assert np.array_equal(dataset.test.images.numpy().reshape(-1, 3072), pixels)
    assert dataset.test.labels.tolist() == [0, 1, 2, 3]


def test_files_directly_in_the_folder(tmp_path):
    assert len(load(write(tmp_path, make_files("cifar10"))).train) == 5 * PER_FILE


def test_other_image_sizes_resize(tmp_path):
    write(tmp_path, make_files("cifar10"))
    assert load(tmp_path, image_size=16).test.images.shape == (PER_FILE, 3, 16, 16)


def test_archive_is_read_in_memory_and_only_its_known_files(tmp_path):
    files = make_files("cifar10")
    members = {f"{BASE['cifar10']}/{file}": content for file, content in files.items()}
    members = {"../escaped": b"x", "/tmp/pdarts-escaped": b"x", **members, "data_batch_1": b"x"}
    write_archive(tmp_path / "cifar-10-python.tar.gz", members)
    from_archive = load(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["cifar-10-python.tar.gz"]
    assert not (tmp_path.parent / "escaped").exists()
    write(tmp_path / BASE["cifar10"], files)
    assert torch.equal(from_archive.train.images, load(tmp_path).train.images)


def test_archive_beside_the_named_folder_is_found(tmp_path):
    members = {
        f"{BASE['cifar100']}/{file}": content for file, content in make_files("cifar100").items()
    }
    write_archive(tmp_path / "cifar-100-python.tar.gz", members)
    assert len(load(tmp_path / BASE["cifar100"], "cifar100").test) == PER_FILE


def test_archive_with_a_link_in_place_of_a_file(tmp_path):
    with tarfile.open(tmp_path / "cifar-10-python.tar.gz", "w:gz") as tar:
        member = tarfile.TarInfo(f"{BASE['cifar10']}/data_batch_1")
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(member)
    fails(tmp_path, r"cifar-10-python.tar.gz: has no cifar-10-batches-py/data_batch_1.*--download")


def test_truncated_archive(tmp_path):
    path = tmp_path / "cifar-10-python.tar.gz"
    write_archive(path, {f"{BASE['cifar10']}/{k}": v for k, v in make_files("cifar10").items()})
    path.write_bytes(path.read_bytes()[:20000])
    fails(tmp_path, r"cifar-10-python.tar.gz: damaged or incomplete archive.*--download")


def test_archive_that_is_none(tmp_path):
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"<html>not found</html>")
    fails(tmp_path, r"cifar-10-python.tar.gz: damaged or incomplete archive")


@pytest.mark.parametrize("where", ["", BASE["cifar10"]], ids=["flat", "subfolder"])
@pytest.mark.parametrize("file", ["data_batch_3", "test_batch", "batches.meta"])
def test_missing_file(tmp_path, where, file):
    folder = write(tmp_path / where, make_files("cifar10"))
    (folder / file).unlink()
    fails(tmp_path, f"{file}: missing: .*--download")


def test_empty_folders(tmp_path):
    fails(tmp_path, r"holds neither cifar-10-batches-py/ nor cifar-10-python.tar.gz.*--download")
    (tmp_path / BASE["cifar10"]).mkdir()
    fails(tmp_path, "data_batch_1: missing")


def test_missing_folder(tmp_path):
    fails(tmp_path / "none", "no such folder.*--download", UsageError)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(b"", "not a readable CIFAR file", id="empty-file"),
        pytest.param(b"\x80\x02}q\x00(U", "not a readable CIFAR file", id="truncated-string"),
        pytest.param(b"\x80\x02R.", "not a readable CIFAR file", id="empty-stack"),
        pytest.param(b"\x80\x7f.", "not a readable CIFAR file", id="unknown-protocol"),
        pytest.param(b"version https://git-lfs", "not a readable CIFAR file", id="text"),
        pytest.param(pickle.dumps([1, 2]), "holds a list, wanted a dictionary", id="list"),
        pytest.param(pickle.dumps({}), "'data' must be a uint8 array, got NoneType", id="no-data"),
    ],
)
def test_damaged_batch(tmp_path, content, message):
    write(tmp_path, {**make_files("cifar10"), "data_batch_2": content})
    fails(tmp_path, f"data_batch_2: {message}")


@pytest.mark.parametrize("cut", [10, 200, 5000, 12000])
def test_truncated_batch(tmp_path, cut):
    files = make_files("cifar10")
    write(tmp_path, {**files, "data_batch_4": files["data_batch_4"][:cut]})
    fails(tmp_path, "data_batch_4: not a readable CIFAR file.*--download")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param(
            {"data": np.zeros((PER_FILE, 12288), np.uint8)},
            r"shape \[4, 12288\], wanted \[n, 3072\].*image-folder",
            id="images-of-64-pixels",
        ),
        pytest.param({"data": np.zeros(3072, np.uint8)}, r"shape \[3072\]", id="flat-data"),
        pytest.param(
            {"data": np.zeros((0, 3072), np.uint8), "labels": []}, r"shape \[0, 3072\]", id="none"
        ),
        pytest.param({"data": np.zeros((4, 3072))}, "uint8 array, got float64", id="float-data"),
        pytest.param({"labels": [0, 1]}, "has 4 images but 2 labels", id="label-count"),
        pytest.param({"labels": [0, 1, 10, 3]}, "label 10 is out of range", id="label-too-large"),
        pytest.param({"labels": [0, -1, 1, 3]}, "label -1 is out of range", id="negative-label"),
        pytest.param({"labels": [0, 1.5, 1, 3]}, "no list of integer labels", id="float-label"),
        pytest.param({"labels": None}, "no list of integer labels under 'labels'", id="no-labels"),
    ],
)
def test_wrong_batch(tmp_path, changes, message):
    files = make_files("cifar10")
    files["test_batch"] = pickle.dumps(make_batch("cifar10", 0, **changes))
    fails(write(tmp_path, files), f"test_batch: .*{message}")


def test_cifar100_files_given_as_cifar10_labels(tmp_path):
    files = make_files("cifar10")
    files["data_batch_1"] = pickle.dumps(make_batch("cifar100", 0))
    fails(write(tmp_path, files), "data_batch_1: has no list of integer labels under 'labels'")


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        pytest.param({"label_names": ["a"] * 7}, "names 7 classes, cifar10 has 10", id="count"),
        pytest.param({}, "has no list of class names under 'label_names'", id="no-names"),
        pytest.param({"label_names": [1] * 10}, "has no list of class names", id="numbers"),
    ],
)
def test_wrong_class_names(tmp_path, meta, message):
    write(tmp_path, {**make_files("cifar10"), "batches.meta": pickle.dumps(meta)})
    fails(tmp_path, f"batches.meta: {message}")


class _Attack:
    def __init__(self, function, *arguments):
        self._call = (function, arguments)

    def __reduce__(self):
        return self._call


@pytest.mark.parametrize(
    "attack",
    [
        pytest.param(lambda mark: _Attack(open, str(mark), "w"), id="builtins"),
        pytest.param(lambda mark: _Attack(__import__("os").mkdir, str(mark)), id="os"),
        pytest.param(lambda mark: _Attack(np.save, str(mark), 1), id="numpy-function"),
        pytest.param(lambda mark: _Attack(eval, f"open({str(mark)!r}, 'w')"), id="eval"),
        pytest.param(lambda mark: np.array([_Attack(open, str(mark), "w")]), id="object-array"),
    ],
)
def test_pickles_that_run_code_are_refused_unrun(tmp_path, attack):
    mark = tmp_path / "attacked.npy"
    content = pickle.dumps({"data": attack(mark)}, 2)
    write(tmp_path, {**make_files("cifar10"), "data_batch_1": content})
    fails(tmp_path, "data_batch_1: not a readable CIFAR file .*malicious")
    assert not mark.exists()


@pytest.fixture
def signed(tmp_path, monkeypatch):
    """Tiny files whose sums stand in torchvision's table."""
    files = make_files("cifar10")
    table = datasets.CIFAR10

    def md5(file):
        return hashlib.md5(files[file]).hexdigest()

    monkeypatch.setattr(table, "train_list", [[file, md5(file)] for file, _ in table.train_list])
    monkeypatch.setattr(table, "test_list", [[file, md5(file)] for file, _ in table.test_list])
    monkeypatch.setattr(table, "meta", {**table.meta, "md5": md5("batches.meta")})
    return write(tmp_path, files)


def test_right_checksums_pass(signed):
    assert len(load(signed, checksum=True).train) == 5 * PER_FILE


@pytest.mark.parametrize("file", ["data_batch_5", "test_batch", "batches.meta"])
def test_wrong_checksum(signed, file):
    content = bytearray((signed / file).read_bytes())
    content[len(content) // 2] ^= 1
    (signed / file).write_bytes(content)
    fails(signed, f"{file}: MD5 is .*--download.*--no-checksum", checksum=True)


def test_published_checksums_are_verified_by_default(tmp_path):
    write(tmp_path, make_files("cifar10"))
    with pytest.raises(RunError, match=r"data_batch_1: MD5 is .*c99cafc152244af753f735de768cd75f"):
        load_dataset("cifar10", tmp_path)


def test_download_uses_torchvision_and_is_not_repeated(tmp_path, monkeypatch):
    calls = []

    def download_url(url, root, filename, md5):
        calls.append((url, md5))
        members = {f"{BASE['cifar10']}/{k}": v for k, v in make_files("cifar10").items()}
        write_archive(f"{root}/{filename}", members)

    monkeypatch.setattr(utils, "download_url", download_url)
    folder = tmp_path / "new" / "folder"
    assert len(load(folder, download=True).train) == 5 * PER_FILE
    assert len(load(folder, download=True).train) == 5 * PER_FILE
    assert calls == [(datasets.CIFAR10.url, datasets.CIFAR10.tgz_md5)]


@pytest.mark.parametrize(
    "error", [OSError("no route"), RuntimeError("File not found or corrupted.")], ids=repr
)
def test_failed_download(tmp_path, monkeypatch, error):
    def download_url(*arguments):
        raise error

    monkeypatch.setattr(utils, "download_url", download_url)
    fails(tmp_path, r"https://.*: download into .* failed", download=True)
