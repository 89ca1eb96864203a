"""CSV files of labels: rows, splits, classes and refused input."""

import logging
from pathlib import Path

import numpy as np
import pytest

from fcmae.data.table import Table, find_in_table, read_classes, read_table
from finetune.tasks import TASKS
from finetune.tasks.multilabel import Multilabel
from finetune.tasks.regress import Regress
from sparse.errors import InputError


def write(folder: Path, text: str, images: bool = True) -> Path:
    """Write a CSV file and, empty, the images that its rows name first."""
    file = folder / "labels.csv"
    file.write_text(text, encoding="utf-8")
    for line in text.splitlines()[1:] if images else []:
        path = folder / line.split(",")[0].strip('"')
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return file


def names(table: Table) -> list[str]:
    return [table.source.name(index) for index in range(len(table.source))]


def test_rows_columns_and_splits(tmp_path: Path) -> None:
    """A byte order mark, quotes, spaces, an empty line, and paths that are written differently."""
    inside = tmp_path / "b.png"
    text = (
        f'\ufeffpath, label ,split\n"a, b.png", x,train\n\n./c/../c/d.png,y,val\n{inside},x,train\n'
    )
    table = read_table(write(tmp_path, text, images=False))
    assert names(table) == ["a, b.png", "c/d.png", "b.png"]
    assert table.source.path(1) == bytes(tmp_path / "c" / "d.png")
    assert table.columns == {"label": ["x", "y", "x"]}
    assert table.rows("train").tolist() == [0, 2]
    assert table.where(1).endswith("labels.csv, line 4")


def test_classes_are_sorted_and_those_of_train(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text = (
        "path,label,split\n1.png,b,train\n2.png,a,train\n3.png,c,train\n4.png,b,val\n5.png,a,val\n"
    )
    data = find_in_table(read_table(write(tmp_path, text)), 0.0, read_classes)
    assert data.names == ("a", "b", "c")
    assert data.train.labels.tolist() == [1, 0, 2]
    assert data.val.labels.tolist() == [1, 0]
    assert data.val.name(0) == "4.png"
    assert "not in val, so never measured: 'c'" in caplog.text


def test_val_fraction_holds_back_a_share_of_each_class(tmp_path: Path) -> None:
    rows = [f"{label}{n}.png,{label}" for label in "ab" for n in range(20)]
    table = read_table(write(tmp_path, "\n".join(["path,label", *rows])))
    data = find_in_table(table, 0.25, read_classes)
    assert [np.bincount(split.labels).tolist() for split in data[:2]] == [[15, 15], [5, 5]]
    several = find_in_table(table, 0.25, lambda t, rows, _: (np.zeros((len(rows), 2)), ("x", "y")))
    assert [len(split.source) for split in several[:2]] == [30, 10]


def test_labels_of_several_classes(tmp_path: Path) -> None:
    text = "path,labels,split\n1.png,b; a,train\n2.png,,train\n3.png,b;b;,val\n"
    data = find_in_table(read_table(write(tmp_path, text)), 0.0, Multilabel.read)
    assert data.names == ("a", "b")
    assert data.train.labels.tolist() == [[True, True], [False, False]]
    assert data.val.labels.tolist() == [[False, True]]


def test_numbers_with_missing_ones(tmp_path: Path) -> None:
    text = "path,age,height,split\n1.png,3,1e2,train\n2.png,,-1.5,train\n3.png,4,,val\n"
    data = find_in_table(read_table(write(tmp_path, text)), 0.0, Regress.read)
    assert data.names == ("age", "height")
    np.testing.assert_equal(data.train.labels, [[3, 100], [np.nan, -1.5]])
    np.testing.assert_equal(data.val.labels, [[4, np.nan]])
    one, _ = Regress.read(read_table(tmp_path / "labels.csv"), np.arange(3), ("height",))
    np.testing.assert_equal(one, [[100], [-1.5], [np.nan]])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no column 'path': its first line has nothing"),
        ("file;label\n1;a\n", "has no column 'path': its first line has 'file;label'"),
        ("path,label\n", "has no rows"),
        ("path,label,label\n1,a,b\n", "has a duplicate or unnamed column: 'path', 'label'"),
        ("path,label\n1.png,a\n2.png\n", "line 3 has 1 cells for 2 columns"),
        ("path,label\n1.png,a\nx/../1.png,b\n", "'x/../1.png' twice, in lines 2 and 3"),
        ("path,label\n ,a\n", "line 2 has '' as path"),
        ("path,class,split\n1.png,a,train\n", "no column 'label': its columns are 'class'"),
        ("path,label\n1.png,a\n2.png,b\n", "has no column 'split': add it, .*--val_fraction 0.2"),
        (
            "path,label,split\n1.png,a,train\n2.png,b,train\n",
            "no row of split 'val': it has 'train'",
        ),
        ("path,label,split\n1.png,a,train\n2.png,a,val\n", "has one class, 'a'"),
        ("path,label,split\n1.png,a,train\n2.png,,train\n", "line 3 has no label"),
        (
            "path,label,split\n1.png,cat,train\n2.png,dog,train\n3.png,cta,val\n",
            r"classes that train does not have: 'cta'; did you mean cat\?",
        ),
        ("path,label,split\n1.png,a,train\n2.png,A,train\n", "similar classes 'A' and 'a'"),
    ],
)
def test_bad_files_are_refused_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        find_in_table(read_table(write(tmp_path, text, images=False)), 0.0, read_classes)
    assert "\n" not in str(error.value)


def test_bad_cells_of_numbers_are_counted(tmp_path: Path) -> None:
    text = "path,age,split\n1.png,old,train\n2.png,nan,train\n3.png,4,val\n"
    with pytest.raises(InputError, match=r"2 cells of .* are not finite numbers: line 2 has 'old'"):
        find_in_table(read_table(write(tmp_path, text)), 0.0, Regress.read)


def test_other_mistakes(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"can't be read .No such file"):
        read_table(tmp_path / "none.csv")
    text = "path,label,split\n1.png,a,train\n2.png,b,val\n"
    with pytest.raises(InputError, match="has its own split val: leave val_fraction at 0"):
        find_in_table(read_table(write(tmp_path, text)), 0.5, read_classes)
    (tmp_path / "odd.csv").write_bytes(b"path,labels,split\n1.png,,train\n2.png,,val\n")
    with pytest.raises(InputError, match="has 1 rows without any label in 'labels'"):
        find_in_table(read_table(tmp_path / "odd.csv"), 0.0, Multilabel.read)


def test_missing_images_are_counted_and_many_are_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [f"{n}.png,{'ab'[n % 2]},{'train' if n < 15 else 'val'}" for n in range(20)]
    table = read_table(write(tmp_path, "\n".join(["path,label,split", *rows])))
    (tmp_path / "3.png").unlink()
    with caplog.at_level(logging.WARNING):
        find_in_table(table, 0.0, read_classes, max_bad=0.05)
    assert "1 of 20 images of" in caplog.text
    assert "are missing: '3.png'" in caplog.text
    (tmp_path / "17.png").unlink()
    with pytest.raises(
        InputError, match=f"2 of 20 .*; paths, with /, are absolute or relative to {tmp_path}"
    ):
        find_in_table(table, 0.0, read_classes, max_bad=0.05)


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("path,label\n1.png,3\n", ["classify"]),
        ("path,label,note\n1.png,a,good\n", ["classify"]),
        ("path,label,age\n1.png,a,3\n", ["classify", "regress"]),
        ("path,labels,split\n1.png,a;b,train\n", ["multilabel"]),
        ("path,label,labels\n1.png,a,a;b\n", ["classify", "multilabel"]),
        ("path,age,split\n1.png,3,train\n2.png,,val\n", ["regress"]),
        ("path,note\n1.png,good\n", []),
        ("path,split\n1.png,train\n", []),
    ],
)
def test_layouts_are_recognised(tmp_path: Path, text: str, kinds: list[str]) -> None:
    table = read_table(write(tmp_path, text))
    assert [name for name, kind in TASKS.items() if kind.recognises(table)] == kinds
