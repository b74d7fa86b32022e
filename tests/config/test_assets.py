"""The asset fetcher in one process: what it fetches, refuses, keeps and mends."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from crl_exp.config.errors import UserError
from crl_exp.config.files import sha256_of
from crl_exp.config.machine.asset_sources import ASSETS, Asset
from crl_exp.config.machine.assets import asset_path, hash_faults, read_manifest, write_manifest
from crl_exp.launcher.assets.command import check, fetch
from tests.helpers import asset_fakes
from tests.helpers.asset_fakes import QUIET, TEXT, files_below, tarball, text_asset, wheel

# Fixtures, by their names here.
pip_index = asset_fakes.pip_index
cache_root = asset_fakes.cache_root


def test_only_the_listed_file_is_taken(pip_index: Path, cache_root: Path) -> None:
    console = Console(file=io.StringIO(), width=200)
    asset = text_asset(pip_index)
    fetch([asset], cache_root, console)
    assert (asset_path("data/pkga") / "text.txt").read_bytes() == TEXT
    expected = {
        ".lock",
        "manifest.json",
        "data/pkga/text.txt",
        f"downloads/{asset.archive.filename}",
    }
    assert files_below(cache_root) == expected
    assert not hash_faults(cache_root, ["data/pkga"])
    said = console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    assert "data/pkga" in said and "pkga==1.0, MIT" in said and "to fetch" in said


def test_nothing_is_done_twice(pip_index: Path, cache_root: Path) -> None:
    asset = text_asset(pip_index)
    fetch([asset], cache_root, QUIET)
    before = (cache_root / "data/pkga/text.txt").stat().st_mtime_ns
    (pip_index / asset.archive.filename).unlink()
    fetch([asset], cache_root, QUIET)
    assert (cache_root / "data/pkga/text.txt").stat().st_mtime_ns == before
    # The archive is kept: making the asset again needs no network.
    fetch([asset], cache_root, QUIET, force=True)
    assert (cache_root / "data/pkga/text.txt").stat().st_mtime_ns != before


def test_a_failed_step_is_repeated_and_a_finished_one_is_not(
    pip_index: Path, cache_root: Path
) -> None:
    def interrupted(source: Path, target: Path) -> None:
        (target / "half.txt").write_bytes(TEXT[:10])
        raise KeyboardInterrupt

    first, second = text_asset(pip_index), text_asset(pip_index, "pkgb")
    with pytest.raises(KeyboardInterrupt):
        fetch([first, replace(second, convert=interrupted)], cache_root, QUIET)
    assert set(read_manifest(cache_root)) == {"data/pkga"}
    before = (cache_root / "data/pkga/text.txt").stat().st_mtime_ns
    for path in pip_index.iterdir():
        path.unlink()
    fetch([first, second], cache_root, QUIET)
    assert files_below(cache_root / "data") == {"pkga/text.txt", "pkgb/text.txt"}
    assert (cache_root / "data/pkga/text.txt").stat().st_mtime_ns == before
    assert not (cache_root / ".partial").exists()


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b[:-1] + b"?"])
def test_wrong_or_truncated_download_is_refused(
    pip_index: Path, cache_root: Path, damage: Callable[[bytes], bytes]
) -> None:
    asset = text_asset(pip_index)
    served = pip_index / asset.archive.filename
    served.write_bytes(damage(served.read_bytes()))
    with pytest.raises(UserError, match=r"data/pkga: pip could not fetch pkga==1\.0.*SHA-256"):
        fetch([asset], cache_root, QUIET)
    assert files_below(cache_root) == {".lock"}


def test_a_truncated_file_in_the_cache_is_fetched_again(pip_index: Path, cache_root: Path) -> None:
    asset = text_asset(pip_index)
    kept = cache_root / "downloads" / asset.archive.filename
    kept.parent.mkdir(parents=True)
    kept.write_bytes((pip_index / asset.archive.filename).read_bytes()[:100])
    fetch([asset], cache_root, QUIET)
    assert sha256_of(kept) == asset.archive.sha256


def test_no_network_names_the_asset_and_the_way_out(pip_index: Path, cache_root: Path) -> None:
    asset = text_asset(pip_index)
    (pip_index / asset.archive.filename).unlink()
    with pytest.raises(UserError, match=r"data/pkga.*pkga==1\.0.*make assets.*CRL_EXP_CACHE"):
        fetch([asset], cache_root, QUIET)


def test_names_in_the_archive_never_become_paths(
    pip_index: Path, cache_root: Path, tmp_path: Path
) -> None:
    evil = {"../evil.txt": b"x", str(tmp_path / "evil.txt"): b"x", "a/../../../evil.txt": b"x"}
    archive = wheel(pip_index, "pkga", {**evil, "a/text.txt": TEXT, "../up.txt": TEXT})
    asset = Asset("data/pkga", archive, members=("a/text.txt", "../up.txt"))
    fetch([asset], cache_root, QUIET)
    assert not list(tmp_path.rglob("evil.txt"))
    assert files_below(cache_root / "data") == {"pkga/text.txt", "pkga/up.txt"}


@pytest.mark.parametrize(("name", "member"), [("../x", "a/b"), ("/x", "a/b"), ("x", "a/..")])
def test_a_table_that_would_leave_the_cache_is_refused(name: str, member: str) -> None:
    with pytest.raises(AssertionError):
        Asset(name, ASSETS[0].archive, members=(member,))


def test_archive_inside_an_archive(cache_root: Path, tmp_path: Path) -> None:
    tarball(tmp_path / "inner.tar.gz", {"in/text.txt": TEXT, "in/code.py": b"1/0"})
    inner = (tmp_path / "inner.tar.gz").read_bytes()
    (cache_root / "downloads").mkdir(parents=True)
    archive = tarball(cache_root / "downloads" / "pkgs-1.0.tar.gz", {"pkgs/inner.tar.gz": inner})
    fetch([Asset("data/s", archive, ("in/text.txt",), "pkgs/inner.tar.gz")], cache_root, QUIET)
    assert files_below(cache_root / "data") == {"s/text.txt"}


def test_a_link_in_place_of_a_file_is_refused(cache_root: Path) -> None:
    link = tarfile.TarInfo("pkgs/text.txt")
    link.type, link.linkname = tarfile.SYMTYPE, "other.txt"
    (cache_root / "downloads").mkdir(parents=True)
    path = cache_root / "downloads" / "pkgs-1.0.tar.gz"
    archive = tarball(path, {"pkgs/text.txt": link, "pkgs/other.txt": TEXT})
    with pytest.raises(UserError, match="not a plain file"):
        fetch([Asset("data/s", archive, ("pkgs/text.txt",))], cache_root, QUIET)
    assert not (cache_root / "data").exists()


def test_a_member_that_is_not_there(pip_index: Path, cache_root: Path) -> None:
    with pytest.raises(UserError, match=r"data/pkga.*gone\.txt"):
        fetch([text_asset(pip_index, members=("pkga/gone.txt",))], cache_root, QUIET)


def test_missing_and_misspelt_assets(cache_root: Path) -> None:
    with pytest.raises(UserError, match=r"data/donotanswer is not in .*make assets.*CRL_EXP_CACHE"):
        asset_path("data/donotanswer")
    with pytest.raises(UserError, match="did you mean 'data/donotanswer'"):
        asset_path("data/donotanser")


def test_a_file_cut_short_is_named_and_made_again(pip_index: Path, cache_root: Path) -> None:
    asset = text_asset(pip_index)
    fetch([asset], cache_root, QUIET)
    (cache_root / "data/pkga/text.txt").write_bytes(TEXT[:-1])
    with pytest.raises(UserError, match=r"data/pkga/text\.txt has 849 bytes, not 850.*make assets"):
        asset_path("data/pkga")
    fetch([asset], cache_root, QUIET)
    assert (asset_path("data/pkga") / "text.txt").read_bytes() == TEXT
    (cache_root / "data/pkga/text.txt").unlink()
    with pytest.raises(UserError, match=r"text\.txt is missing"):
        asset_path("data/pkga")


def test_a_changed_byte_is_found_by_check_and_mended_by_force(
    pip_index: Path, cache_root: Path
) -> None:
    asset = text_asset(pip_index)
    fetch([asset], cache_root, QUIET)
    check([asset], cache_root, QUIET)
    (cache_root / "data/pkga/text.txt").write_bytes(TEXT[:-1] + b"?")
    with pytest.raises(UserError, match=r"text\.txt has another SHA-256(.|\n)*assets --force"):
        check([asset], cache_root, QUIET)
    fetch([asset], cache_root, QUIET, force=True)
    check([asset], cache_root, QUIET)


def test_another_recipe_makes_the_asset_again(pip_index: Path, cache_root: Path) -> None:
    asset = text_asset(pip_index)
    fetch([asset], cache_root, QUIET)
    upper = replace(asset, recipe=2, convert=lambda s, t: (t / "T").write_bytes(TEXT.upper()))
    fetch([upper], cache_root, QUIET)
    assert files_below(cache_root / "data") == {"pkga/T"}
    stale = {"fingerprint": "old", "files": {}}
    write_manifest(cache_root, {ASSETS[0].name: stale})
    with pytest.raises(UserError, match="made from another source: run `make assets`"):
        asset_path(ASSETS[0].name)


def test_a_damaged_manifest_is_named(cache_root: Path) -> None:
    cache_root.mkdir()
    (cache_root / "manifest.json").write_text('{"assets": {"data')
    with pytest.raises(UserError, match=r"manifest\.json is damaged .* delete it"):
        asset_path("data/donotanswer")


def test_a_cache_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="set CRL_EXP_CACHE"):
        fetch([], tmp_path / "file" / "cache", QUIET)
