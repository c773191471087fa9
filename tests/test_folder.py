"""Labels by folders: which folders are classes, which are splits, and which are neither."""

import pytest

from tasks.datasets.folder import read, recognise
from tasks.datasets.tree import Tree
from tasks.storage import FileState

LAYOUTS: dict[str, tuple[list[str], dict[str, tuple[str | None, str | None]]]] = {
    "nothing": ([], {}),
    "no labels": (["a.jpg", "b.png"], {"a.jpg": (None, None), "b.png": (None, None)}),
    "classes": (["cat/1.jpg", "dog/1.jpg"], {"cat/1.jpg": (None, "cat"), "dog/1.jpg": (None, "dog")}),
    "one class": (["cat/1.jpg", "cat/2.jpg"], {"cat/1.jpg": (None, "cat"), "cat/2.jpg": (None, "cat")}),
    "folders in classes": (["cat/x/1.jpg", "dog/1.jpg"], {"cat/x/1.jpg": (None, "cat"), "dog/1.jpg": (None, "dog")}),
    "splits of classes": (
        ["train/cat/1.jpg", "valid/dog/1.jpg", "test/cat/1.jpg"],
        {"train/cat/1.jpg": ("train", "cat"), "valid/dog/1.jpg": ("val", "dog"), "test/cat/1.jpg": ("test", "cat")},
    ),
    "other names of splits": (
        ["Training/cat/1.jpg", "Validation/cat/1.jpg", "Testing/cat/1.jpg", "dev/cat/1.jpg"],
        {
            "Training/cat/1.jpg": ("train", "cat"),
            "Validation/cat/1.jpg": ("val", "cat"),
            "Testing/cat/1.jpg": ("test", "cat"),
            "dev/cat/1.jpg": ("val", "cat"),
        },
    ),
    "classes of splits": (
        ["cat/train/1.jpg", "cat/test/2.jpg", "dog/train/1.jpg"],
        {"cat/train/1.jpg": ("train", "cat"), "cat/test/2.jpg": ("test", "cat"), "dog/train/1.jpg": ("train", "dog")},
    ),
    "splits without labels": (
        ["train/1.jpg", "test/1.jpg"], {"train/1.jpg": ("train", None), "test/1.jpg": ("test", None)}
    ),
    "one split": (["test/cat/1.jpg", "test/dog/1.jpg"], {
        "test/cat/1.jpg": ("test", "cat"), "test/dog/1.jpg": ("test", "dog")
    }),
    "wrapped classes": (["pets/v1/cat/1.jpg", "pets/v1/dog/1.jpg"], {
        "pets/v1/cat/1.jpg": (None, "cat"), "pets/v1/dog/1.jpg": (None, "dog")
    }),
    "wrapped splits": (["pets/train/cat/1.jpg", "pets/val/cat/1.jpg"], {
        "pets/train/cat/1.jpg": ("train", "cat"), "pets/val/cat/1.jpg": ("val", "cat")
    }),
    "images wrapped in splits": (["train/images/cat/1.jpg", "test/images/dog/1.jpg"], {
        "train/images/cat/1.jpg": ("train", "cat"), "test/images/dog/1.jpg": ("test", "dog")
    }),
    "splits of images": (["train/images/1.jpg", "test/images/1.jpg"], {
        "train/images/1.jpg": ("train", None), "test/images/1.jpg": ("test", None)
    }),
    "a folder called images": (["images/1.jpg"], {"images/1.jpg": (None, None)}),
    "a class called test": (["test/1.jpg", "quiz/1.jpg"], {"test/1.jpg": (None, "test"), "quiz/1.jpg": (None, "quiz")}),
    "a stray beside the classes": (["cat/1.jpg", "dog/1.jpg", "logo.png"], {
        "cat/1.jpg": (None, "cat"), "dog/1.jpg": (None, "dog"), "logo.png": ("outside the class folders", "")
    }),
    "a stray in the wrapper": (["pets/cat/1.jpg", "pets/dog/1.jpg", "pets/logo.png"], {
        "pets/cat/1.jpg": (None, "cat"), "pets/dog/1.jpg": (None, "dog"),
        "pets/logo.png": ("outside the class folders", ""),
    }),
    "a folder beside the splits": (["train/cat/1.jpg", "test/cat/1.jpg", "extra/cat/1.jpg"], {
        "train/cat/1.jpg": ("train", "cat"), "test/cat/1.jpg": ("test", "cat"),
        "extra/cat/1.jpg": ("outside the split folders", ""),
    }),
    "a folder beside many images": (["1.jpg", "2.jpg", "3.jpg", "thumbs/1.jpg"], {
        "1.jpg": (None, None), "2.jpg": (None, None), "3.jpg": (None, None), "thumbs/1.jpg": (None, None)
    }),
    "other files": (["cat/1.jpg", "dog/1.jpg", "cat/notes.txt", "README", "a.csv"], {
        "cat/1.jpg": (None, "cat"), "dog/1.jpg": (None, "dog")
    }),
    "names without extension": (["cat/0a1b", "dog/2c3d"], {"cat/0a1b": (None, "cat"), "dog/2c3d": (None, "dog")}),
    "two spellings of one name": (["train/cafe\u0301/1.jpg", "test/caf\u00e9/1.jpg"], {
        "train/cafe\u0301/1.jpg": ("train", "caf\u00e9"), "test/caf\u00e9/1.jpg": ("test", "caf\u00e9")
    }),
    "odd names": (["a b/1.jpg", "c,d;'\"/1.jpg", "::[*]?/1.jpg", "日本/1.jpg"], {
        "a b/1.jpg": (None, "a b"), "c,d;'\"/1.jpg": (None, "c,d;'\""), "::[*]?/1.jpg": (None, "::[*]?"),
        "日本/1.jpg": (None, "日本"),
    }),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_folders_say(layout):
    paths, expected = LAYOUTS[layout]
    tree = Tree("/s", {path: FileState(f"/s/{path}", "1-1", 1) for path in sorted(paths)}, {})
    labelled = read(tree, None)
    found = {image.path: (image.split, image.label) for image in labelled.images}
    found |= {reject.source.removeprefix("/s/"): (reject.reason, "") for reject in labelled.rejects}
    assert found == expected
    assert recognise(tree, None) == (labelled.saw if paths else None)
    assert recognise(tree, "labels.json") is None
