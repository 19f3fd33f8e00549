from __future__ import annotations

from pathlib import Path

import pytest

from phi3v.data.sources.splits import choose_eval, hash_share, split_files, split_name
from phi3v.errors import UserError

KEYS = [f"cat/{number}.jpg" for number in range(1000)]


@pytest.mark.parametrize(
    ("text", "name"),
    [(" Train ", "train"), ("validation", "val"), ("dev", "val"), ("EVAL", "eval"), ("test", "test"), ("cats", None)],
)
def test_names(text: str, name: str | None) -> None:
    assert split_name(text) == name


@pytest.mark.parametrize(
    ("total", "share", "count"), [(1, 0.5, 0), (2, 0.1, 1), (10, 0.1, 1), (25, 0.1, 3), (2, 0.9, 1), (9, 0, 0)]
)
def test_how_many_are_chosen(total: int, share: float, count: int) -> None:
    assert len(choose_eval(KEYS[:total], share)) == count


def test_the_choice_does_not_depend_on_order_and_adding_keys_hardly_moves_others() -> None:
    before = choose_eval(KEYS[:500], 0.1)
    assert choose_eval(KEYS[:500][::-1], 0.1) == before
    for added in range(1, 50):
        after = choose_eval(KEYS[: 500 + added], 0.1)
        assert len(before ^ (after & set(KEYS[:500]))) <= added
    assert {int(key[4:-4]) % 7 for key in before} == set(range(7))  # not every n-th


def test_a_hash_is_a_share() -> None:
    shares = [hash_share(key) for key in KEYS]
    assert all(0 <= share < 1 for share in shares)
    assert 0.05 < sum(share < 0.1 for share in shares) / len(shares) < 0.15
    assert hash_share("a") == hash_share("a")


def test_files_of_a_folder(tmp_path: Path) -> None:
    for name in ("my-train-1.jsonl", "my-train-2.jsonl", "Validation.json", ".hidden.json", "notes.txt"):
        (tmp_path / name).touch()
    found = split_files(tmp_path, (".json", ".jsonl"))
    assert {split: [file.name for file in files] for split, files in found.items()} == {
        "val": ["Validation.json"],
        "train": ["my-train-1.jsonl", "my-train-2.jsonl"],
    }
    (tmp_path / "other.json").touch()
    with pytest.raises(UserError, match=r"other.json: its name does not say which split it is"):
        split_files(tmp_path, (".json", ".jsonl"))


def test_one_file_is_train_and_another_form_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pets.csv").touch()
    assert split_files(tmp_path, (".csv",)) == split_files(tmp_path / "pets.csv", (".csv",))
    assert split_files(tmp_path, (".csv",)) == {"train": [tmp_path / "pets.csv"]}
    with pytest.raises(UserError, match="is no file of this form") as caught:
        split_files(tmp_path / "pets.csv", (".json",))
    assert caught.value.hint == "it takes .json"
    with pytest.raises(UserError, match=r"it holds pets\.csv"):
        split_files(tmp_path, (".json",))
