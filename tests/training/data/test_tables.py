"""Tables in all the forms that people have; nothing is lost in silence and every refusal says why."""

import base64
import io
import json
import os
import pickle

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import training.data.arrow_files
from modeling_amorlip.cli_amorlip import UserError
from tests.helpers.shards import make_config
from training.data.arrow_files import choose_cache
from training.data.csv_rows import read_rows
from training.data.dataset import PairDataset
from training.data.mixture import open_pairs


def encode(color, form="PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), color).save(buffer, form)
    return buffer.getvalue()


COLORS = ["red", "green", "blue", "white"]
FILES = [encode(color) for color in COLORS]


@pytest.fixture
def folder(tmp_path):
    """Four images, 0.png to 3.png."""
    for i, content in enumerate(FILES):
        (tmp_path / f"{i}.png").write_bytes(content)
    return tmp_path


def captions_of(path, **changes) -> list[str]:
    """Return the captions that training draws, after decoding every image."""
    config = make_config(path, **changes)
    dataset = PairDataset(open_pairs(config), config, 8)
    samples = [dataset[0, i] for i in range(len(dataset))]
    assert not any(sample.bad_samples for sample in samples)
    return [sample.caption for sample in samples]


def write_parquet(path, images, captions, **columns):
    datasets.Dataset.from_dict({"image": images, "caption": captions, **columns}).to_parquet(path)
    return path


@pytest.mark.parametrize("name, separator", [("a.tsv", "\t"), ("a.csv", "\t"), ("a.csv", ","), ("a.csv", ";")])
def test_separators_are_found(folder, name, separator):
    lines = [f"{i}.png{separator}a {color}" for i, color in enumerate(COLORS)]
    (folder / name).write_text("\n".join([f"filepath{separator}title", *lines]))
    assert captions_of(folder / name) == [f"a {color}" for color in COLORS]


def test_a_separator_may_be_given(folder):
    (folder / "a.csv").write_text("image:caption\n0.png:a\n1.png:b\n")
    assert captions_of(folder / "a.csv", csv_separator=":") == ["a", "b"]
    with pytest.raises(UserError, match="image_column 'image' is not in .*; its columns: .'image:caption'"):
        open_pairs(make_config(folder / "a.csv"))


def test_a_tab_may_be_given_as_it_is_typed(folder):
    (folder / "a.csv").write_text("image\tcaption\n0.png\ta\n")
    assert captions_of(folder / "a.csv", csv_separator="\\t") == ["a"]
    with pytest.raises(UserError, match="csv_separator is empty"):
        open_pairs(make_config(folder / "a.csv", csv_separator=""))


@pytest.mark.parametrize("separator", ["\t", ","])
def test_quotation_marks_swallow_no_rows(folder, separator):
    captions = ['"hill star', 'star" hill', '"', 'a 5" disk', '"all quoted"', '"two" halves "', '"last', 'end"']
    lines = [f"{i % 4}.png{separator}{caption}" for i, caption in enumerate(captions)]
    (folder / "a.csv").write_text("\n".join([f"image{separator}caption", *lines]) + "\n")
    captions[4] = "all quoted"
    assert captions_of(folder / "a.csv") == captions


def test_quoted_fields_are_read_as_csv(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('image,caption,x\n"a,1.png","two\nlines, ""quoted""",1\nb.png,,\n\nc.png,"",z\n')
    assert list(read_rows(str(path), ",")) == [
        ["image", "caption", "x"],
        ["a,1.png", 'two\nlines, "quoted"', "1"],
        ["b.png", "", ""],
        ["c.png", "", "z"],
    ]


def test_captions_are_text_whatever_they_look_like(folder):
    captions = ["None", "NA", "null", "1.50"]
    (folder / "a.csv").write_text("image,caption\n" + "".join(f"{i}.png,{c}\n" for i, c in enumerate(captions)))
    assert captions_of(folder / "a.csv") == captions
    write_parquet(folder / "a.parquet", FILES, [1, 2, 30, 4])
    assert captions_of(folder / "a.parquet") == ["1", "2", "30", "4"]
    write_parquet(folder / "b.parquet", FILES, [True, False, True, True])
    assert captions_of(folder / "b.parquet") == ["True", "False", "True", "True"]


def test_unreadable_files_name_the_cause(folder):
    (folder / "a.csv").write_bytes("image,caption\n0.png,café\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"is not UTF-8 \(line 2: byte 0xe9\): .* iconv -f latin1"):
        open_pairs(make_config(folder / "a.csv"))
    (folder / "b.csv").write_text("image,caption\n0.png,a\n", encoding="utf-16")
    with pytest.raises(UserError, match="is UTF-16, not UTF-8"):
        open_pairs(make_config(folder / "b.csv"))
    (folder / "c.csv").write_bytes(b"image,caption\r0.png,a\r1.png,b\r")
    with pytest.raises(UserError, match="ends lines by carriage returns alone"):
        open_pairs(make_config(folder / "c.csv"))
    (folder / "a.jsonl").write_bytes(b"")
    with pytest.raises(UserError, match="a.jsonl is empty"):
        open_pairs(make_config(folder / "a.jsonl"))
    (folder / "b.parquet").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(UserError, match="b.parquet is a Git LFS pointer"):
        open_pairs(make_config(folder / "b.parquet"))
    path = write_parquet(folder / "a.parquet", FILES, COLORS)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match="Parquet magic bytes not found"):
        open_pairs(make_config(path))


def test_rows_with_other_numbers_of_fields_are_listed(folder):
    (folder / "a.csv").write_text("image,caption\n0.png,a\n1.png,b,c\n2.png\n3.png,d\n")
    config = make_config(folder / "a.csv")
    dataset = PairDataset(open_pairs(config), config, 8)
    assert len(dataset) == 4 and [bool(dataset[0, i].bad_samples) for i in range(4)] == [False, True, True, False]
    assert "the image is 'None'" in dataset[0, 1].bad_samples[0]["reason"]


@pytest.mark.parametrize(
    "images",
    [
        FILES,
        [{"bytes": file, "path": None} for file in FILES],
        [list(file) for file in FILES],
        [np.frombuffer(file, np.uint8) for file in FILES],
        [base64.b64encode(file).decode() for file in FILES],
        [base64.urlsafe_b64encode(file).decode().rstrip("=") for file in FILES],
        [f"data:image/png;base64,{base64.b64encode(file).decode()}" for file in FILES],
        [f"{i}.png" for i in range(4)],
        [{"path": f"{i}.png"} for i in range(4)],
    ],
    ids=["bytes", "struct", "list", "uint8", "base64", "urlsafe", "data_url", "relative", "struct_path"],
)
def test_images_in_every_form(folder, images):
    path = write_parquet(folder / "a.parquet", images, COLORS)
    config = make_config(path)
    dataset = PairDataset(open_pairs(config), config, 8)
    for i, color in enumerate(COLORS):
        sample = dataset[0, i]
        assert not sample.bad_samples and sample.caption == color
        assert sample.image[:, 4, 4].tolist() == list(Image.new("RGB", (1, 1), color).getpixel((0, 0)))


def test_paths_lie_beside_the_table_first(folder, tmp_path_factory, monkeypatch):
    other = tmp_path_factory.mktemp("other")
    (other / "0.png").write_bytes(encode("black"))
    (other / "9.png").write_bytes(encode("black"))
    monkeypatch.chdir(other)
    (folder / "a.csv").write_text("image,caption\n0.png,a\n9.png,b\n")
    pairs = open_pairs(make_config(folder / "a.csv"))
    assert pairs[0]["image"] == str(folder / "0.png") and pairs[1]["image"] == "9.png"


@pytest.mark.parametrize(
    "images, message",
    [
        (["https://example.org/0.png"] * 4, "holds URLs .*img2dataset"),
        (
            [{"file": file, "width": 3} for file in FILES],
            "holds structs of file, width; they must have `bytes` or `path`",
        ),
        ([[{"bytes": file}] for file in FILES], "holds lists of dicts; it must hold one image per row"),
        ([1, 2, 3, 4], "holds ints; it must hold paths or encoded images"),
    ],
)
def test_images_in_other_forms_are_refused(tmp_path, images, message):
    with pytest.raises(UserError, match=message):
        open_pairs(make_config(write_parquet(tmp_path / "a.parquet", images, COLORS)))


@pytest.mark.parametrize(
    "setting, message",
    [
        ({"keywords_column": "caption"}, "keywords_column 'caption' .* holds text; it must hold lists of texts"),
        ({"alternative_captions_column": "kind"}, "holds text; it must hold lists of texts"),
        ({"group_column": "tags"}, "holds lists, not single values"),
        ({"group_column": "knd"}, "group_column 'knd' is not in"),
        ({"caption_column": "image"}, "every caption must be text"),
        ({"train_split": "test"}, None),
    ],
)
def test_columns_are_checked(tmp_path, setting, message):
    path = write_parquet(tmp_path / "a.parquet", FILES, COLORS, kind=list("abcd"), tags=[["a"]] * 4)
    if message is None:
        assert len(open_pairs(make_config(path, **setting))) == 4
    else:
        with pytest.raises(UserError, match=message):
            open_pairs(make_config(path, **setting))


def test_a_column_of_caption_lists_draws_one(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", FILES, [[f"{c} {i}" for i in range(5)] for c in COLORS])
    config = make_config(path)
    pairs = open_pairs(config)
    dataset = PairDataset(pairs, config, 8)
    assert {dataset[epoch, 2].caption for epoch in range(50)} == {f"blue {i}" for i in range(5)}
    assert len(list(pairs.captions())) == 20


def test_coco_captions(folder):
    images = [{"id": 10 + i, "file_name": f"{i}.png"} for i in range(4)]
    annotations = [{"image_id": 10 + i % 3, "caption": f"caption {i}"} for i in range(9)]
    (folder / "annotations").mkdir()
    (folder / "train2017").mkdir()
    for i in range(4):
        (folder / f"{i}.png").rename(folder / f"train2017/{i}.png")
    path = folder / "annotations/captions.json"
    path.write_text(json.dumps({"info": {}, "images": images, "annotations": annotations}))
    pairs = open_pairs(make_config(path))
    assert len(pairs) == 3 and pairs[1]["caption"] == ["caption 1", "caption 4", "caption 7"]
    assert "ignored: 1 images without a caption" in pairs.report()[0]
    assert captions_of(path)[0] in ("caption 0", "caption 3", "caption 6")


def test_images_with_texts_beside_them(folder):
    for i in range(3):
        (folder / f"{i}.txt").write_text(f"a {COLORS[i]}\n")
    (folder / "9.txt").write_text("alone")
    assert captions_of(folder) == ["a red", "a green", "a blue"]
    line = open_pairs(make_config(folder)).report()[0]
    assert "1 images without a caption, 1 captions without an image" in line


def write_coco(folder, number):
    images = [{"id": i, "file_name": "0.png"} for i in range(number)]
    annotations = [{"image_id": i, "caption": f"caption {i}"} for i in range(number)]
    (folder / "captions.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    return folder / "captions.json"


def write_csv(folder, number):
    (folder / "a.csv").write_text("image,caption\n" + "".join(f"0.png,caption {i}\n" for i in range(number)))
    return folder / "a.csv"


def write_texts(folder, number):
    (folder / "texts").mkdir(exist_ok=True)
    for i in range(number):
        (folder / f"texts/{i:04d}.png").write_bytes(FILES[0])
        (folder / f"texts/{i:04d}.txt").write_text(f"caption {i}")
    return folder / "texts"


WRITERS = [write_coco, write_csv, write_texts]


@pytest.mark.parametrize("write", WRITERS)
def test_workers_receive_nothing_per_row(folder, write):
    sizes = []
    for number in (10, 500):
        pairs = open_pairs(make_config(write(folder, number)))
        sizes.append(len(pickle.dumps(pairs)))
        assert pickle.loads(pickle.dumps(pairs))[9]["caption"] in ("caption 9", ["caption 9"])
    assert abs(sizes[1] - sizes[0]) < 100


@pytest.mark.parametrize("write", WRITERS)
def test_an_unwritable_cache_is_told_and_done_without(folder, write, monkeypatch):
    (folder / "home").write_text("a file where the folder would be")
    monkeypatch.setattr(training.data.arrow_files, "HF_HOME", str(folder / "home"))
    pairs = open_pairs(make_config(write(folder, 10)))
    assert "cannot be written" in pairs.report()[0] and "in memory" in pairs.report()[0]
    assert [str(caption) for caption in pairs.captions()] == [f"caption {i}" for i in range(10)]


def test_a_full_cache_of_datasets_is_told_and_done_without(folder, monkeypatch):
    (folder / "home").write_text("a file where the folder would be")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "home/datasets")
    choose_cache.cache_clear()
    try:
        pairs = open_pairs(make_config(write_parquet(folder / "a.parquet", FILES, COLORS)))
        assert [pairs[i]["caption"] for i in range(4)] == COLORS
        assert "tables are converted in" in pairs.report()[0] and "set HF_HOME" in pairs.report()[0]
    finally:
        choose_cache.cache_clear()


def test_a_damaged_table_of_the_cache_is_converted_again(folder, monkeypatch):
    monkeypatch.setattr(training.data.arrow_files, "HF_HOME", str(folder / "home"))
    path = write_csv(folder, 10)
    open_pairs(make_config(path))
    (table,) = (folder / "home/amorlip/tables").iterdir()
    for content in (b"", table.read_bytes()[:100], b"something else" * 100):
        table.write_bytes(content)
        assert list(open_pairs(make_config(path)).captions()) == [f"caption {i}" for i in range(10)]


def test_coco_files_of_other_kinds_and_odd_captions(folder):
    path = folder / "instances.json"
    path.write_text(json.dumps({"images": [{"id": 1, "file_name": "0.png"}], "annotations": [{"image_id": 1}]}))
    with pytest.raises(UserError, match="has no image with a caption: name COCO's captions_"):
        open_pairs(make_config(path))
    path.write_text(json.dumps({"images": [{"file_name": "0.png"}], "annotations": [{"image_id": 1, "caption": "a"}]}))
    with pytest.raises(UserError, match=r"not laid out as COCO's captions \(KeyError: 'id'\)"):
        open_pairs(make_config(path))
    annotations = [{"image_id": 1, "caption": text} for text in ("a \ud800", None, 5, "fine")]
    path.write_text(json.dumps({"images": [{"id": 1, "file_name": "0.png"}], "annotations": annotations}))
    assert captions_of(path) == ["fine"]


def test_pipes_and_folders_are_no_images(folder):
    os.mkfifo(folder / "pipe.png")
    (folder / "a.csv").write_text(f"image,caption\npipe.png,a\n{folder},b\n/dev/zero,c\n1.png,d\n")
    config = make_config(folder / "a.csv")
    dataset = PairDataset(open_pairs(config), config, 8)
    samples = [dataset[0, i] for i in range(4)]
    assert {sample.caption for sample in samples} == {"d"}
    assert all("is a folder, a pipe or a device" in bad["reason"] for sample in samples for bad in sample.bad_samples)


def test_tables_whose_images_are_all_missing_are_refused(folder):
    (folder / "a.csv").write_text("image,caption\nno.png,a\nnone.png,b\n")
    with pytest.raises(UserError, match="names files that are not there .*no.png"):
        open_pairs(make_config(folder / "a.csv"))
    (folder / "b.csv").write_text("image,caption\nno.png,a\n1.png,b\n")
    assert len(open_pairs(make_config(folder / "b.csv"))) == 2


def test_splits_of_saved_sets_are_checked(tmp_path):
    rows = datasets.Dataset.from_dict({"image": FILES, "caption": COLORS})
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": rows, "test": rows.select([0])}).save_to_disk(tmp_path / "two")
    assert len(open_pairs(make_config(tmp_path / "one"))) == 4
    assert len(open_pairs(make_config(tmp_path / "two", train_split="test"))) == 1
    for name in ("one", "two"):
        with pytest.raises(UserError, match="train_split 'nosuch' is not in"):
            open_pairs(make_config(tmp_path / name, train_split="nosuch"))


def test_columns_that_are_not_named_need_not_be_readable(tmp_path):
    images = [{"bytes": file, "path": None} for file in FILES]
    rows = datasets.Dataset.from_dict({"image": images, "caption": COLORS, "thumbnail": [{"bytes": b"x"}] * 4})
    rows = rows.cast_column("image", datasets.Image()).cast_column("thumbnail", datasets.Image())
    rows.to_parquet(tmp_path / "a.parquet")
    assert captions_of(tmp_path / "a.parquet") == COLORS


def test_tables_of_other_kinds_in_a_folder_are_told(tmp_path):
    for name in "ab":
        write_parquet(tmp_path / f"{name}.parquet", FILES, COLORS)
    (tmp_path / "c.csv").write_text("image,caption\na.png,cat\n")
    pairs = open_pairs(make_config(tmp_path))
    assert len(pairs) == 8
    assert "ignored: 1 tables of other kinds, such as c.csv" in pairs.parts[0].report()


def test_classes_are_captions_by_their_names(tmp_path):
    rows = datasets.Dataset.from_dict({"image": FILES, "kind": [0, 1, 1, -1]})
    rows = rows.cast_column("kind", datasets.ClassLabel(names=["cat", "big_dog"]))
    rows.to_parquet(tmp_path / "a.parquet")
    config = make_config(tmp_path / "a.parquet", caption_column="kind")
    pairs = open_pairs(config)
    assert list(pairs.captions()) == ["cat", "big_dog", "big_dog"]
    dataset = PairDataset(pairs, config, 8)
    assert dataset[0, 1].caption == "big_dog" and dataset[0, 3].bad_samples


def test_reading_a_row_does_not_copy_the_table_s_features(tmp_path, monkeypatch):
    pairs = open_pairs(make_config(write_parquet(tmp_path / "a.parquet", FILES, COLORS)))
    copies = []
    monkeypatch.setattr(datasets.Features, "copy", lambda self: copies.append(self) or self)
    assert pairs[0]["caption"] == COLORS[0]
    assert not copies


@pytest.mark.parametrize("kind, columns", [("torch", None), ("numpy", None), ("arrow", None), (None, ["group"])])
def test_saved_sets_with_a_format_are_read_as_others(tmp_path, kind, columns):
    rows = datasets.Dataset.from_dict({"image": FILES, "caption": COLORS, "group": [1, 1, 2, 2]})
    rows.with_format(kind, columns=columns).save_to_disk(tmp_path / "saved")
    assert captions_of(tmp_path / "saved", group_column="group") == COLORS
    assert open_pairs(make_config(tmp_path / "saved", group_column="group")).column("group") == [1, 1, 2, 2]


def test_views_of_text_are_text(tmp_path):
    pq.write_table(pa.table({"image": FILES, "caption": pa.array(COLORS, pa.string_view())}), tmp_path / "a.parquet")
    assert captions_of(tmp_path / "a.parquet") == COLORS


def test_one_caption_of_several_that_cannot_be_used_costs_no_pair(tmp_path):
    path = write_parquet(
        tmp_path / "a.parquet",
        FILES,
        [["a", None], ["", "b"], None, []],
        more=["c", None, "d", None],
        tags=[["x", None, ""]] * 4,
    )
    config = make_config(path, further_caption_columns=["more"], keywords_column="tags", keywords_probability=1.0)
    dataset = PairDataset(open_pairs(config), config, 8)
    drawn = [{dataset[epoch, i].caption for epoch in range(20)} for i in range(4)]
    assert (
        drawn[0] == {"a, x", "x, a", "c, x", "x, c"} and drawn[1] == {"b, x", "x, b"} and drawn[2] == {"d, x", "x, d"}
    )
    assert all(dataset[epoch, 3].bad_samples for epoch in range(20))
    assert not any(dataset[epoch, i].bad_samples for epoch in range(20) for i in range(3))


def test_nan_is_no_caption_and_numbers_are_keywords(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", FILES, [1.0, float("nan"), 2.5, 3.0], tags=[[7]] * 4)
    config = make_config(path, keywords_column="tags", keywords_probability=1.0)
    dataset = PairDataset(open_pairs(config), config, 8)
    assert set(dataset[0, 2].caption.split(", ")) == {"2.5", "7"}
    assert "the caption is 'nan'" in dataset[0, 1].bad_samples[0]["reason"]
