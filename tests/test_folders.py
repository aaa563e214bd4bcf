"""Images as files: every layout, what is held out of it, and what is said about those that cannot work."""

import os

import pytest

from datasets.sources import open_source
from learning import build
from options import linear


def save(root, *names):
    """Files with these names; opening a source reads none of them."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"picture")
    return root


def many(folder, classes="abc", count=20, ending="jpg"):
    return [f"{folder}{name}/{i}.{ending}" for name in classes for i in range(count)]


def opened(path, split="train", dataset="folder", **more):
    return open_source(dataset, split, folder=str(path), **more)


def inside(source, root):
    return [path.removeprefix(f"{root}{os.sep}") for path in source.images]


@pytest.mark.parametrize("val", ["val", "valid", "validation", "test"])
def test_train_and_val(tmp_path, val):
    names = ("train/b/2.jpg", "train/b/10.PNG", "train/a/deep/er/x.jpeg", "train/a-b/1.webp", f"{val}/b/1.jpg")
    save(tmp_path, *names, "train/b/notes.txt", "train/b/._2.jpg", "train/.thumbs/1.jpg", f"{val}/.DS_Store")
    source = opened(tmp_path)
    assert not source.in_memory and source.classes == ("a", "a-b", "b") and source.labels.tolist() == [0, 1, 2, 2]
    assert inside(source, tmp_path / "train") == ["a/deep/er/x.jpeg", "a-b/1.webp", "b/10.PNG", "b/2.jpg"]
    assert source.remarks == () and opened(tmp_path, "labelled").images == source.images
    test = opened(tmp_path, "val")
    assert inside(test, tmp_path) == [f"{val}/b/1.jpg"] and test.labels.tolist() == [2], "numbered as in training"
    assert test.classes == source.classes


def test_val_comes_before_test(tmp_path):
    save(tmp_path, *many("train/"), "test/a/1.jpg", "val/a/2.jpg")
    assert inside(opened(tmp_path, "val"), tmp_path) == ["val/a/2.jpg"]


def test_links_are_followed(tmp_path):
    save(tmp_path / "elsewhere", "b/1.jpg")
    save(tmp_path / "set", "train/a/1.jpg", "val/a/1.jpg")
    (tmp_path / "set" / "train" / "b").symlink_to(tmp_path / "elsewhere" / "b")
    assert opened(tmp_path / "set").classes == ("a", "b")


def test_links_do_not_go_round(tmp_path):
    save(tmp_path / "up" / "set", "a/1.jpg", "b/2.jpg")
    save(tmp_path / "far", "c/3.jpg")
    links = {"a/self": ".", "b/above": "../../..", "loop": "..", "c": "../../far/c", "../../far/c/back": "../../up"}
    for name, target in links.items():
        (tmp_path / "up" / "set" / name).symlink_to(target)
    assert inside(opened(tmp_path / "up" / "set"), tmp_path / "up" / "set") == ["a/1.jpg", "b/2.jpg", "c/3.jpg"]
    (tmp_path / "up" / "train").symlink_to("set")
    assert opened(tmp_path / "up", dataset="imagenet").classes == ("a", "b", "c")


def test_class_folders_give_up_a_tenth(tmp_path):
    save(tmp_path, *many("", "abc", 20), *many("", "d", 3), "e/1.jpg")
    train, val = opened(tmp_path), opened(tmp_path, "val")
    assert val.labels.bincount().tolist() == [2, 2, 2, 1] and train.labels.bincount().tolist() == [18, 18, 18, 2, 1]
    assert train.classes == val.classes == tuple("abcde")
    assert not set(train.images) & set(val.images) and len(train) + len(val) == 64
    assert train.remarks == (
        f"{tmp_path} has no train/ folder: its 5 folders (a, b, c, ...) are the classes.",
        f"{tmp_path} has no val/ folder: 7 of 64 images, a fixed tenth, are held out for evaluation.",
    )
    assert val.remarks == ()
    assert [path.split(os.sep)[-2] for path in val.images] == [val.classes[label] for label in val.labels]


def test_the_tenth_stays_when_the_folder_moves_or_grows(tmp_path):
    save(tmp_path / "one", *many("", "ab", 100))
    save(tmp_path / "other", *many("train/", "ab", 100))
    held = inside(opened(tmp_path / "one", "val"), tmp_path / "one")
    assert inside(opened(tmp_path / "other", "val"), tmp_path / "other" / "train") == held
    relative = os.path.relpath(tmp_path / "one")
    assert inside(opened(relative, "val"), relative) == held
    save(tmp_path / "one", "a/new.jpg", "b/new.jpg")
    grown = inside(opened(tmp_path / "one", "val"), tmp_path / "one")
    assert len(set(held) - set(grown)) <= 2, "a new image takes the place of one other of its class at most"


def test_train_without_val(tmp_path):
    save(tmp_path, *many("train/", "ab"), *many("bus/", "ab"))
    source = opened(tmp_path)
    assert len(source) == 36 and source.remarks == (
        f"{tmp_path / 'train'} is taken for the training images, and bus beside it for something else.",
        f"{tmp_path} has no val/ folder: 4 of 40 images, a fixed tenth, are held out for evaluation.",
    )


def test_wrong_level(tmp_path):
    save(tmp_path, *many("train/", "ab"), *many("val/", "ab"))
    assert len(opened(tmp_path / "train")) == 36 and len(opened(tmp_path / "train", "val")) == 4


def test_one_level_too_high(tmp_path):
    save(tmp_path, *many("split/train/", "ab"), *many("split/val/", "ab"), "readme.txt")
    with pytest.raises(ValueError, match=f"holds train/ one level below: give --data_folder {tmp_path / 'split'}"):
        opened(tmp_path)


def test_a_class_called_train(tmp_path):
    save(tmp_path, *many("", ["cat", "dog", "train"]), "val/1.jpg", "notes/readme.txt")
    with pytest.raises(ValueError, match="train holds images directly, .* like a class beside cat, dog; rename it"):
        opened(tmp_path)
    assert len(opened(tmp_path / "train")) == 20


def test_folders_beside_train_are_mentioned_without_labels_too(tmp_path):
    save(tmp_path, *many("train/", "a"), *many("bus/", "a"))
    source = opened(tmp_path)
    assert "has a single class, a: all its 20" in source.remarks[0]
    assert source.remarks[1:] == (
        f"{tmp_path / 'train'} is taken for the training images, and bus beside it for something else.",
    )


@pytest.mark.parametrize("beside", [[], ["old/1.jpg", "old/2.jpg", "new/3.jpg"]])
@pytest.mark.parametrize("part", ["", "train/"])
def test_images_in_the_folder_itself_have_no_labels(tmp_path, part, beside):
    save(tmp_path, *(part + name for name in ("2.jpg", "1.png", "._1.png", "readme.txt", *beside)))
    source, root = opened(tmp_path), tmp_path / part
    assert source.labels is None and source.classes == () and len(source) == 2 + len(beside)
    assert source.remarks == (
        f"{root} holds images directly: all its {len(source)} images are used for training, without labels.",
    )
    with pytest.raises(ValueError, match="no val/ folder and its images no labels"):
        opened(tmp_path, "val")


def test_a_single_class_is_none(tmp_path):
    save(tmp_path, *many("", "a", 30), "docs/readme.txt")
    source = opened(tmp_path)
    assert source.labels is None and len(source) == 30
    assert source.remarks[0].endswith("has a single class, a: all its 30 images are used for training, without labels.")
    assert opened(tmp_path, fraction=0.1).remarks[1].startswith("--data_fraction 0.1 keeps 3 of the 30")
    assert len(opened(save(tmp_path / "set", "train/1.jpg", "val/2.jpg"), "val")) == 1


def test_classes_of_single_images(tmp_path):
    save(tmp_path, *many("", "abc", 1))
    source = opened(tmp_path)
    assert len(source) == 3
    assert source.remarks[-1].endswith("no val/ folder: with one image per class, none is held out for evaluation.")
    with pytest.raises(ValueError, match="every class a single image"):
        opened(tmp_path, "val")


def test_fractions_of_files_are_nested_and_stay_with_the_files(tmp_path):
    for root in (tmp_path / "one", tmp_path / "other"):
        save(root, *many("train/", "abc", 30), *many("val/", "abc", 2))
    tenth, half = (inside(opened(tmp_path / "one", fraction=f), tmp_path / "one") for f in (0.1, 0.5))
    assert len(tenth) == 9 and len(half) == 45 and set(tenth) < set(half) and tenth == sorted(tenth)
    assert inside(opened(tmp_path / "other", fraction=0.1), tmp_path / "other") == tenth
    assert len(opened(tmp_path / "one", "val", fraction=0.1)) == 6


def write_list(path, *lines):
    path.write_text("\n".join(lines) + "\n")
    return path


def test_list(tmp_path):
    save(tmp_path, *many("pictures/", "abc", 4), "two words.jpg")
    names = ["two words.jpg 10", "pictures/a/0.jpg  9", "", "# pictures/none.jpg", f"{tmp_path}/pictures/b/1.jpg\t2"]
    write_list(tmp_path / "train.txt", *names, "./pictures/c/1.jpg 10")
    write_list(tmp_path / "val.txt", "pictures/a/3.jpg 10")
    source, val = opened(tmp_path / "train.txt"), opened(tmp_path / "train.txt", "val")
    assert source.classes == val.classes == ("2", "9", "10")
    assert source.labels.tolist() == [2, 1, 0, 2] and source.remarks == ()
    assert source.images[0] == str(tmp_path / "two words.jpg") and all(map(os.path.exists, source.images))
    assert val.labels.tolist() == [2] and inside(val, tmp_path) == ["pictures/a/3.jpg"]


def test_list_with_commas(tmp_path):
    save(tmp_path, "a/1.jpg", "b, c/2.jpg", "b, c/3,4.PNG")
    source = opened(write_list(tmp_path / "all.csv", "a/1.jpg,cat", "b, c/2.jpg, cat", "b, c/3,4.PNG\tdog"))
    assert source.classes == ("cat", "dog") and len(source) == 2
    source = opened(write_list(tmp_path / "plain.csv", "a/1.jpg", "b, c/3,4.PNG"))
    assert inside(source, tmp_path) == ["a/1.jpg", "b, c/3,4.PNG"] and source.labels is None


def test_list_alone(tmp_path):
    save(tmp_path, *many("", "ab"))
    path = write_list(
        tmp_path / "all.csv", *(f"{name} {'cat' if name[0] == 'a' else 'dog'}" for name in many("", "ab"))
    )
    train, val = opened(path), opened(path, "val")
    assert val.labels.bincount().tolist() == [2, 2] and len(train) == 36 and train.classes == ("cat", "dog")
    assert train.remarks == (
        f"{path} has no val list beside it: 4 of 40 images, a fixed tenth, are held out for evaluation.",
    )
    plain = opened(write_list(tmp_path / "plain", *many("", "ab")))
    assert plain.labels is None and inside(plain, tmp_path) == many("", "ab")
    assert "plain lists no labels: all its 40 images" in plain.remarks[0]


@pytest.mark.parametrize(
    "lines, message",
    [
        (["a/0.jpg cat", "a/1.jpg"], "1 of the 2 images in .*list.txt have a label; give one to all or none"),
        (["a/0.jpg", "a/9.jpg"], r"1 of 2 images looked up .* \(for example .*a/9.jpg\).* relative to the folder"),
        (["", "# nothing"], "list.txt lists no images; write a line"),
        (["a/0.jpg 1", "a/1.gif 1"], "line 2 of .*list.txt is not `path` or `path label`.*'a/1.gif 1'"),
        (["path,label", "a/0.jpg,1"], "line 1 of .*list.txt is not `path` or `path label`"),
        (["a\0b"], "list.txt is no text file"),
    ],
)
def test_lists_that_do_not_work(tmp_path, lines, message):
    save(tmp_path, *many("", "a", 2))
    with pytest.raises(ValueError, match=message):
        opened(write_list(tmp_path / "list.txt", *lines))


@pytest.mark.parametrize(
    "names, message",
    [
        ([], "no images in .*, which is empty; names of images end in .jpg, "),
        (["a/1.txt", "b/2.txt", "b/film.gif", "Makefile"], "but 2 .txt files, 1 .gif file, 1 other file; names of"),
        (["train/notes.txt", "val/a/1.jpg"], "no images in .*train, but 1 .txt file;"),
    ],
)
def test_folders_without_images(tmp_path, names, message):
    with pytest.raises(ValueError, match=message):
        opened(save(tmp_path, *names))


def test_val_has_to_fit(tmp_path):
    save(tmp_path, *many("train/", "ab"), *many("val/", "bcd", 2))
    with pytest.raises(ValueError, match="has 2 classes that the training images have not .for example c, d"):
        opened(tmp_path, "val")
    save(tmp_path, "val/1.jpg")
    with pytest.raises(ValueError, match="val has no classes, unlike the training images"):
        opened(tmp_path, "val")


def test_evaluations_need_labels(tmp_path):
    opt = linear.parse(["--data_folder", str(save(tmp_path, "1.jpg")), "--dataset", "folder"])[0]
    with pytest.raises(ValueError, match="has no labels, and an evaluation needs them; sort the images"):
        build.labelled_sources(opt, build.source(opt, "train"))


def test_imagenet(tmp_path):
    save(tmp_path, *many("train/", "ab", 3, "JPEG"), *many("val/", "ab", 2, "JPEG"), "train/stray.jpg", "docs/1.jpg")
    source = opened(tmp_path, dataset="imagenet")
    assert len(source) == 6 and source.classes == ("a", "b") and source.remarks == ()
    assert opened(tmp_path, "val", "imagenet").labels.tolist() == [0, 0, 1, 1]
    with pytest.raises(ValueError, match=f"has no folder 'train', but {tmp_path} has: give"):
        opened(tmp_path / "train", dataset="imagenet")
    with pytest.raises(ValueError, match="has no folder 'train'; put .*, or try --dataset folder"):
        opened(tmp_path / "train" / "a", dataset="imagenet")
    save(tmp_path, "val/c/1.jpg")
    with pytest.raises(ValueError, match=r"train and .*val differ in 1 classes \(for example c\)"):
        opened(tmp_path, "val", "imagenet")


def test_imagenet_without_class_folders(tmp_path):
    save(tmp_path, "train/1.png", "train/2.png")
    with pytest.raises(ValueError, match="no image in .*train lies in a class folder; .* try --dataset folder"):
        opened(tmp_path, dataset="imagenet")


def test_imagenet100(tmp_path):
    save(tmp_path, *(f"train/n{i}/1.jpg" for i in range(5)))
    (tmp_path / "list.txt").write_text("n3\nn1\n\nn4\n")
    source = opened(tmp_path, dataset="imagenet100", imagenet100path=str(tmp_path / "list.txt"))
    assert source.classes == ("n1", "n3", "n4") and source.labels.tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="100 of the 100 classes .*imagenet100.txt have no folder"):
        opened(tmp_path, dataset="imagenet100")
    with pytest.raises(ValueError, match="--imagenet100path .* is not a file"):
        opened(tmp_path, dataset="imagenet100", imagenet100path=str(tmp_path / "none.txt"))
